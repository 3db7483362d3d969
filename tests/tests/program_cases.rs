//! Ring 2: the packet cases through the real programs in the kernel. Needs CAP_BPF and CAP_NET_ADMIN.
//!
//! Beside each case's verdict, bytes and counters, all tables must be what the library made of them.

use forwarder_tests::{
    cases::{self, Case, Event},
    program::{Kernel, action_of, with_kernel},
};

/// What is wrong with a case; empty when its sentence is true.
fn faults(kernel: &mut Kernel, case: &Case) -> anyhow::Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut world = case.world.clone();
    kernel.fill(&world)?;
    for (index, event) in case.events.iter().enumerate() {
        let step = match event {
            Event::Change(change) => {
                change(&mut world);
                kernel.fill(&world)?;
                continue;
            }
            Event::Packet(step) => step,
        };
        let mut expected = world.clone();
        step.count_into(&mut expected);
        world.forward(step.program, step.ifindex, &step.frame);
        let wanted = action_of(step.program, step.verdict, &world.settings);
        let (action, out) = kernel.run(step.program, step.ifindex, &step.frame)?;
        if action != wanted {
            faults.push(format!("packet {index}: {action:?}, wanted {wanted:?}"));
        }
        if out != step.out {
            faults.push(format!("packet {index}: {out:02x?}\n  wanted  {:02x?}", step.out));
        }
        // The tables must be the library's, next hops with their interfaces among them, and the counters the
        // case's.
        let found = kernel.read(&world)?;
        expected.group_turns.clone_from(&world.group_turns);
        expected.persistence.clone_from(&world.persistence);
        expected.fragments.clone_from(&world.fragments);
        expected.flow_index.clone_from(&world.flow_index);
        expected.flows.clone_from(&world.flows);
        expected.handshakes.clone_from(&world.handshakes);
        expected.free_flows.clone_from(&world.free_flows);
        expected.listeners_live.clone_from(&world.listeners_live);
        expected.backends_live.clone_from(&world.backends_live);
        for difference in found.differences(&expected) {
            faults.push(format!("packet {index}: {difference}"));
        }
        kernel.fill(&world)?;
    }
    Ok(faults)
}

#[test]
fn every_case_is_true_of_the_kernel_s_programs() {
    with_kernel(|kernel| {
        let cases = cases::with_twins();
        let (mut ran, mut failed) = (0, 0);
        for case in &cases {
            if let Some(reason) = case.library_only {
                println!("library {}: {reason}", case.sentence);
                continue;
            }
            ran += 1;
            let faults = faults(kernel, case).unwrap_or_else(|error| vec![format!("{error:#}")]);
            // What holds is not told: two thousand sentences would hide the one that does not.
            if !faults.is_empty() {
                failed += 1;
                println!("FAILED  {}\n{}", case.sentence, faults.join("\n"));
            }
        }
        println!("{ran} of {} cases ran in the kernel", cases.len());
        assert_eq!(failed, 0, "cases are not true, see above");
    });
}
