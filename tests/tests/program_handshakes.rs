//! Ring 2: connections that begin with a SYN cookie, through the kernel's programs and the library side by side, byte
//! for byte. Needs CAP_BPF and CAP_NET_ADMIN.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use forwarder_common::datapath::Action;
use forwarder_tests::{
    handshake::{Walker, converse, world},
    program::{Kernel, action_of, with_kernel},
    tables::{Link, MemoryTables, Program},
};
use nix::time::{ClockId, clock_gettime};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

mod conversations;

/// How long random connections are led through both.
const DURATION: Duration = Duration::from_secs(5);
/// How far the kernel's coarse clock may be behind the library's: a tick of the slowest (`CONFIG_HZ=100`).
const TICK: Duration = Duration::from_millis(10);

/// Both, which must agree.
struct Both<'a> {
    kernel: &'a mut Kernel,
    library: MemoryTables,
}

impl Walker for Both<'_> {
    fn walk(&mut self, program: Program, link: &Link, frame: &[u8]) -> Result<(Action, Vec<u8>)> {
        let (outcome, out) = self.library.forward(program, link.ifindex, frame);
        let (action, kernel_out) = self.kernel.run(program, link.ifindex, frame)?;
        let wanted = action_of(program, outcome.verdict, &self.library.settings);
        ensure!(
            action == wanted,
            "the kernel says {action:?}, the library {outcome:?}"
        );
        ensure!(
            kernel_out == out,
            "\n  kernel  {kernel_out:02x?}\n  library {out:02x?}"
        );
        Ok((outcome.verdict.action, out))
    }
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .expect("Linux has this clock")
        .into()
}

#[test]
fn library_and_kernel_lead_the_same_connections() {
    with_kernel(|kernel| {
        let end = Instant::now() + DURATION;
        let mut runner = TestRunner::default();
        let (mut count, mut passed_over) = (0, 0);
        while Instant::now() < end || count == 0 {
            let choices = conversations::choices().new_tree(&mut runner).unwrap().current();
            let library = world(&choices);
            kernel.fill(&library).unwrap();
            let second = (now() - TICK).as_secs();
            let mut both = Both {
                kernel: &mut *kernel,
                library,
            };
            let conversed = converse(&choices, &mut both);
            let library = both.library;
            if now().as_secs() != second {
                // The two may have asked the clock in two seconds: whatever came of it says nothing.
                passed_over += 1;
                continue;
            }
            conversed.unwrap_or_else(|error| panic!("{error:#}\n{choices:#?}"));
            let differences = kernel.read(&library).unwrap().differences(&library);
            assert!(differences.is_empty(), "{}\n{choices:#?}", differences.join("\n"));
            count += 1;
        }
        println!("{count} connections, all alike; {passed_over} at the turn of a period");
    });
}
