//! Ring 2: the library and the kernel's programs agree byte for byte about verdicts, reasons and what they leave in the
//! tables: on random packets, and on the packet cases' packets, changed and in other orders. Needs CAP_BPF and
//! CAP_NET_ADMIN.
//!
//! Both run for half a minute, at the same time; `FORWARDER_PARITY_SECONDS` says otherwise. With
//! `FORWARDER_PARITY_PACKETS` the changed ones go on until there have been so many. `FORWARDER_PARITY_SEED` begins where
//! another run did, whose failure names it.

use std::{
    cell::RefCell,
    fs,
    iter::Cycle,
    panic::{self, AssertUnwindSafe},
    path::Path,
    time::{Duration, Instant},
    vec::IntoIter,
};

use forwarder_common::{
    abi::{
        listener::listener_flag,
        reason::{DESCRIPTIONS, Reason},
    },
    datapath::Outcome,
};
use forwarder_tests::{
    invariants::Arrival,
    program::{Kernel, action_of, with_kernel},
    script::{Kinds, Script},
    tables::{MemoryTables, Program},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

mod random;

const THIS_THREAD: Pid = Pid::from_raw(0);

const SECONDS_VARIABLE: &str = "FORWARDER_PARITY_SECONDS";
const SECONDS: u64 = 30;
const PACKETS_VARIABLE: &str = "FORWARDER_PARITY_PACKETS";
const SEED_VARIABLE: &str = "FORWARDER_PARITY_SEED";

/// Scripts with the same tables one after the other: most of these need not be written again then.
const SAME_TABLES: usize = 24;

/// Does BPF_PROG_TEST_RUN show what would become of it? It takes no frame that is too short, in tcx none that ends before
/// the IP header that its EtherType promises, of IPv6 perhaps; and it leaves VLAN tags in the frame, of which the stack
/// takes the first out before tcx.
fn can_run(arrival: &Arrival) -> bool {
    let frame = &arrival.frame;
    let is_tcx = arrival.program == Program::Tunnel;
    let is_long_enough = frame.len() >= if is_tcx { 14 + 40 } else { 14 };
    is_long_enough && !(is_tcx && matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]))
}

/// Does what becomes of packets depend on the second in which they come? The kernel's clock is another;
/// `program_handshakes` compares what there is to compare.
fn counts_seconds(world: &MemoryTables) -> bool {
    const COUNTING: u32 = listener_flag::COOKIES | listener_flag::RATE;
    let mut listeners = world.listeners.values().chain(world.listener_ranges.values());
    world.clock_secs.is_some() || listeners.any(|listener| listener.flags & COUNTING != 0)
}

thread_local! {
    /// The CPUs that this thread may run on, by turns.
    static CPUS: RefCell<Cycle<IntoIter<CpuSet>>> = {
        let allowed = sched_getaffinity(THIS_THREAD).expect("this thread's CPUs");
        let cpus: Vec<_> = (0..CpuSet::count())
            .filter(|cpu| allowed.is_set(*cpu) == Ok(true))
            .map(|cpu| {
                let mut only = CpuSet::new();
                only.set(cpu).expect("one of them");
                only
            })
            .collect();
        RefCell::new(cpus.into_iter().cycle())
    };
}

/// Leaves this thread on one CPU, the next one. What the last new flow found out about its way is kept on each, and some
/// cases keep a way there that nobody would find: a script that wandered would find both.
fn stay_on_next_cpu() {
    let next = CPUS.with_borrow_mut(Iterator::next).expect("a CPU");
    sched_setaffinity(THIS_THREAD, &next).expect("it is allowed");
}

/// Runs one packet in both places; what is different, if anything is.
fn forward(
    kernel: &mut Kernel,
    world: &mut MemoryTables,
    arrival: &Arrival,
) -> Result<(Outcome, Vec<u8>), String> {
    let (outcome, out) = world.forward(arrival.program, arrival.ifindex, &arrival.frame);
    let (action, kernel_out) = kernel
        .run(arrival.program, arrival.ifindex, &arrival.frame)
        .map_err(|error| format!("{error:#}"))?;
    let wanted = action_of(arrival.program, outcome.verdict, &world.settings);
    let frame = &arrival.frame;
    if action != wanted {
        let reason = outcome.reason;
        return Err(format!(
            "the kernel says {action:?}, the library {wanted:?} ({reason:?}):\n  packet  {frame:02x?}\n  {:?}",
            kernel
                .reason_counters()
                .map(|counters| differing(&counters, world))
        ));
    }
    if out != kernel_out {
        return Err(format!(
            "{:?}:\n  packet  {frame:02x?}\n  kernel  {kernel_out:02x?}\n  library {out:02x?}",
            outcome.reason
        ));
    }
    Ok((outcome, out))
}

/// Reasons that the two have counted otherwise.
fn differing(
    kernel: &[forwarder_common::abi::counter::ReasonCounters],
    world: &MemoryTables,
) -> Vec<(Reason, u64, u64)> {
    (0..)
        .map(Reason)
        .zip(kernel.iter().zip(&world.reason_counters))
        .filter(|(_, (kernel, library))| kernel != library)
        .map(|(reason, (kernel, library))| (reason, kernel.packets, library.packets))
        .collect()
}

/// What is different in the tables, if anything is.
fn compare_tables(kernel: &mut Kernel, world: &MemoryTables) -> Result<(), String> {
    let found = kernel.read(world).map_err(|error| format!("{error:#}"))?;
    let differences = found.differences(world);
    if differences.is_empty() {
        Ok(())
    } else {
        Err(differences.join("\n"))
    }
}

/// Runs a script in both places; how many packets there were, by reason. What panics is different, too.
fn compare_script(kernel: &mut Kernel, script: &Script) -> Result<Vec<u64>, String> {
    stay_on_next_cpu();
    panic::catch_unwind(AssertUnwindSafe(|| play_in_both(kernel, script))).unwrap_or_else(|payload| {
        let message = payload.downcast_ref::<String>().cloned();
        Err(message.unwrap_or_else(|| "a panic, see above".to_owned()))
    })
}

fn play_in_both(kernel: &mut Kernel, script: &Script) -> Result<Vec<u64>, String> {
    kernel
        .fill(&script.world())
        .map_err(|error| format!("{error:#}"))?;
    let state = RefCell::new((kernel, script.world(), Ok(()), vec![0; Reason::COUNT]));
    script.play(
        |arrival, _| {
            let (kernel, world, outcome, reasons) = &mut *state.borrow_mut();
            if outcome.is_err() || !can_run(arrival) || counts_seconds(world) {
                return None;
            }
            match forward(kernel, world, arrival) {
                Ok((what, out)) => {
                    reasons[what.reason.0 as usize] += 1;
                    Some((what, out))
                }
                Err(difference) => {
                    *outcome = Err(difference);
                    None
                }
            }
        },
        |change| {
            let (kernel, world, outcome, _) = &mut *state.borrow_mut();
            if outcome.is_ok() {
                *outcome = compare_tables(kernel, world);
                change(world);
                let filled = kernel.fill(world).map_err(|error| format!("{error:#}"));
                *outcome = outcome.clone().and(filled);
            }
        },
    );
    let (kernel, world, outcome, reasons) = state.into_inner();
    outcome?;
    compare_tables(kernel, &world)?;
    Ok(reasons)
}

/// A number that a variable gives.
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is a number, not {value}"))
    })
}

fn duration() -> Duration {
    Duration::from_secs(number(SECONDS_VARIABLE).unwrap_or(SECONDS))
}

fn print(reasons: &[u64], what: &str, start: Instant) {
    for (description, count) in DESCRIPTIONS.iter().zip(reasons) {
        println!("{count:>9} {}", description.name);
    }
    let total = reasons.iter().sum::<u64>();
    println!("{total:>9} {what}, all alike, in {} s", start.elapsed().as_secs());
}

#[test]
fn library_and_kernel_agree_on_changed_packets_of_the_cases() {
    let seed = number(SEED_VARIABLE).unwrap_or_else(|| rand::rng().random());
    let packets = number(PACKETS_VARIABLE);
    with_kernel(|kernel| {
        let start = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut reasons = vec![0; Reason::COUNT];
        let mut scripts = 0_u64;
        let is_enough = |reasons: &[u64]| match packets {
            Some(packets) => reasons.iter().sum::<u64>() >= packets,
            None => start.elapsed() >= duration(),
        };
        while !is_enough(&reasons) {
            let mut script = Script::random(&mut rng);
            if script.is_library_only() {
                continue;
            }
            for _ in 0..SAME_TABLES {
                match compare_script(kernel, &script) {
                    Ok(counts) => reasons
                        .iter_mut()
                        .zip(counts)
                        .for_each(|(total, count)| *total += count),
                    Err(first) => {
                        let shortest = script.shrunk(|shorter| compare_script(kernel, shorter).is_err());
                        println!("{}\n{:02x?}", shortest.describe(), shortest.bytes());
                        let difference = compare_script(kernel, &shortest)
                            .err()
                            .unwrap_or_else(|| format!("only once: {first}"));
                        panic!("{difference}\n  {SEED_VARIABLE}={seed}, script {scripts}");
                    }
                }
                scripts += 1;
                script = script.changed_again(&mut rng);
            }
        }
        print(&reasons, "changed packets", start);
        println!("{scripts:>9} scripts, {SEED_VARIABLE}={seed}");
    });
}

#[test]
fn library_and_kernel_agree_on_what_once_broke_something() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    with_kernel(|kernel| {
        for (name, kinds) in [
            ("walk", Kinds::All),
            ("icmp", Kinds::Errors),
            ("fragments", Kinds::Pieces),
        ] {
            for entry in fs::read_dir(folder.join(name)).into_iter().flatten() {
                let path = entry.expect("an entry").path();
                let script = Script::read(&fs::read(&path).expect("a script"), kinds);
                if let Err(difference) = compare_script(kernel, &script) {
                    panic!("{}: {difference}", path.display());
                }
                println!("ok      {}", path.display());
            }
        }
    });
}

#[test]
fn library_and_kernel_agree_on_random_packets() {
    with_kernel(|kernel| {
        let start = Instant::now();
        let kernel = RefCell::new(kernel);
        let reasons = RefCell::new(vec![0; Reason::COUNT]);
        while start.elapsed() < duration() {
            // A runner that is done stays done, so each round has its own.
            let mut runner = TestRunner::new(Config {
                cases: 32,
                failure_persistence: None,
                ..Config::default()
            });
            let outcome = runner.run(&random::scenario(), |scenario| {
                let kernel = &mut **kernel.borrow_mut();
                let mut world = scenario.world.clone();
                stay_on_next_cpu();
                let mut compare = || -> Result<(), String> {
                    kernel.fill(&world).map_err(|error| format!("{error:#}"))?;
                    for (index, packet) in scenario.packets.iter().enumerate() {
                        forward(kernel, &mut world, packet)
                            .map_err(|text| format!("packet {index}: {text}"))?;
                    }
                    compare_tables(kernel, &world)
                };
                compare().map_err(TestCaseError::fail)?;
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
        print(&reasons.into_inner(), "random packets", start);
    });
}
