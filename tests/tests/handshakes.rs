//! Ring 1: connections that begin with a SYN cookie, through the library.

use anyhow::Result;
use forwarder_common::{abi::reason::Reason, datapath::Action};
use forwarder_tests::{
    handshake::{Choices, Walker, converse, world},
    tables::{Link, MemoryTables, Program},
};
use proptest::prelude::*;

mod conversations;

/// The library.
struct Library(MemoryTables);

impl Walker for Library {
    fn walk(&mut self, program: Program, link: &Link, frame: &[u8]) -> Result<(Action, Vec<u8>)> {
        let (outcome, out) = self.0.forward(program, link.ifindex, frame);
        Ok((outcome.verdict.action, out))
    }
}

fn library(choices: &Choices, second: u32) -> Library {
    let mut world = world(choices);
    world.clock_secs = Some(second);
    Library(world)
}

#[test]
fn an_everyday_connection_is_led_through() {
    let choices = Choices::usual();
    let mut library = library(&choices, 1000);
    converse(&choices, &mut library).unwrap();
    let counters = library.0.listener_counters[0];
    assert_eq!((counters.cookies_sent, counters.cookies_accepted), (1, 1));
    assert_eq!((counters.flows_opened, counters.flows_answered), (1, 1));
    assert_eq!(
        library.0.reason_counters[Reason::SYN_COOKIE_SENT.0 as usize].packets,
        1
    );
    assert_eq!(library.0.unsound(), Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_end_sees_its_own_numbers(choices in conversations::choices(), second in 0_u32..1_000_000) {
        let mut library = library(&choices, second);
        if let Err(error) = converse(&choices, &mut library) {
            return Err(TestCaseError::fail(format!("{error:#}")));
        }
        prop_assert_eq!(library.0.unsound(), Vec::<String>::new());
    }
}
