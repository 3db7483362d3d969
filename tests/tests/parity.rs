//! Ring 2: the library and the kernel's programs agree on random packets, byte for byte, about verdicts, reasons and
//! what they leave in the tables. Needs CAP_BPF and CAP_NET_ADMIN.
//!
//! Runs for 20 seconds; `FORWARDER_PARITY_SECONDS` says otherwise.

use std::time::{Duration, Instant};

use forwarder_common::abi::reason::{DESCRIPTIONS, Reason};
use forwarder_tests::{
    program::{Kernel, action_of, with_kernel},
    tables::MemoryTables,
};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use crate::random::Scenario;

mod random;

const SECONDS_VARIABLE: &str = "FORWARDER_PARITY_SECONDS";
const SECONDS: u64 = 20;

/// Runs a scenario in both places; the tables afterwards when they agree.
fn compare(kernel: &mut Kernel, scenario: &Scenario) -> Result<MemoryTables, TestCaseError> {
    let broken = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
    let mut world = scenario.world.clone();
    kernel.fill(&world).map_err(broken)?;
    for (index, packet) in scenario.packets.iter().enumerate() {
        let (outcome, out) = world.forward(packet.program, packet.ifindex, &packet.frame);
        let (action, kernel_out) = kernel
            .run(packet.program, packet.ifindex, &packet.frame)
            .map_err(broken)?;
        let wanted = action_of(packet.program, outcome.verdict, &world.settings);
        if action != wanted {
            let reason = outcome.reason;
            return Err(TestCaseError::fail(format!(
                "packet {index}: the kernel says {action:?}, the library {wanted:?} ({reason:?})"
            )));
        }
        if out != kernel_out {
            return Err(TestCaseError::fail(format!(
                "packet {index}:\n  kernel  {kernel_out:02x?}\n  library {out:02x?}"
            )));
        }
        let counted = kernel.reason_counters().map_err(broken)?;
        if counted != world.reason_counters {
            return Err(TestCaseError::fail(format!(
                "packet {index}: {counted:?}\n  {:?}",
                world.reason_counters
            )));
        }
    }
    let differences = kernel.read(&world).map_err(broken)?.differences(&world);
    if differences.is_empty() {
        Ok(world)
    } else {
        Err(TestCaseError::fail(differences.join("\n")))
    }
}

#[test]
fn library_and_kernel_agree_on_random_packets() {
    let seconds = match std::env::var(SECONDS_VARIABLE) {
        Ok(value) => value.parse().expect("a number of seconds"),
        Err(_) => SECONDS,
    };
    with_kernel(|kernel| {
        let end = Instant::now() + Duration::from_secs(seconds);
        let kernel = std::cell::RefCell::new(kernel);
        let reasons = std::cell::RefCell::new(vec![0; Reason::COUNT]);
        while Instant::now() < end {
            // A runner that is done stays done, so each round has its own.
            let mut runner = TestRunner::new(Config {
                cases: 32,
                failure_persistence: None,
                ..Config::default()
            });
            let outcome = runner.run(&random::scenario(), |scenario| {
                let world = compare(*kernel.borrow_mut(), &scenario)?;
                for (total, counters) in reasons.borrow_mut().iter_mut().zip(world.reason_counters) {
                    *total += counters.packets;
                }
                Ok(())
            });
            match outcome {
                Ok(()) => {}
                Err(TestError::Fail(reason, scenario)) => {
                    println!("{:#?}", scenario.packets);
                    panic!("{reason}");
                }
                Err(TestError::Abort(reason)) => panic!("{reason}"),
            }
        }
        let reasons = reasons.into_inner();
        for (description, count) in DESCRIPTIONS.iter().zip(&reasons) {
            println!("{count:>9} {}", description.name);
        }
        println!("{:>9} random packets, all alike", reasons.iter().sum::<u64>());
    });
}
