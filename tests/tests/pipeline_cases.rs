//! Ring 1: the packet cases through the library, and what must hold for every packet.

use std::collections::HashSet;

use forwarder_common::{
    abi::{
        listener::VipKey,
        reason::{Reason, VerdictKind},
        settings::flag,
    },
    datapath::Action,
    wire::Ipv4Address,
};
use forwarder_tests::{
    cases::{
        self, Case, Event,
        measured::{Gateway, Packets, Way},
    },
    packet::wrong_checksums,
    tables::{MemoryTables, Program},
};
use proptest::prelude::*;

mod random;

/// What is wrong with a case; empty when its sentence is true.
fn faults(case: &Case) -> Vec<String> {
    let mut faults = Vec::new();
    let mut world = case.world.clone();
    for (index, event) in case.events.iter().enumerate() {
        let step = match event {
            Event::Change(change) => {
                change(&mut world);
                continue;
            }
            Event::Packet(step) => step,
        };
        let mut expected = world.clone();
        step.count_into(&mut expected);
        let counted_before = world.counted_flows();
        let (outcome, out) = world.forward(step.program, step.ifindex, &step.frame);
        if (outcome.verdict, outcome.reason) != (step.verdict, step.reason) {
            faults.push(format!(
                "packet {index}: {outcome:?}\n  wanted {:?} {:?}",
                step.verdict, step.reason
            ));
        }
        if out != step.out {
            faults.push(format!("packet {index}: {out:02x?}\n  wanted  {:02x?}", step.out));
        }
        // Only counters are compared: what the flow table must hold shows in the packets that follow.
        expected.group_turns.clone_from(&world.group_turns);
        expected.persistence.clone_from(&world.persistence);
        expected.flow_index.clone_from(&world.flow_index);
        expected.flows.clone_from(&world.flows);
        expected.free_flows.clone_from(&world.free_flows);
        // What counts against limits is what says so in the flow table.
        let counted = world.counted_flows();
        for (live, before, after) in [
            (&mut expected.listeners_live, counted_before.0, counted.0),
            (&mut expected.backends_live, counted_before.1, counted.1),
        ] {
            for ((live, before), after) in live.iter_mut().zip(before).zip(after) {
                live.0 = live.0 + after.0 - before.0;
            }
        }
        for difference in world.differences(&expected) {
            faults.push(format!("packet {index}: {difference}"));
        }
    }
    faults
}

#[test]
fn every_case_is_true_of_the_library() {
    let cases = cases::with_twins();
    let mut failed = 0;
    for case in &cases {
        let faults = faults(case);
        if faults.is_empty() {
            println!("ok      {}", case.sentence);
        } else {
            failed += 1;
            println!("FAILED  {}\n{}", case.sentence, faults.join("\n"));
        }
    }
    println!("{} cases, {} of them written", cases.len(), cases::all().len());
    assert_eq!(failed, 0, "cases are not true, see above");
}

#[test]
fn every_sentence_is_said_once() {
    let mut seen = HashSet::new();
    for case in cases::all() {
        assert!(!case.events.is_empty(), "{}", case.sentence);
        assert!(seen.insert(case.sentence.clone()), "{}", case.sentence);
    }
    assert!(seen.len() >= 75, "{} cases", seen.len());
}

#[test]
fn the_cases_reach_every_reason() {
    let reached: HashSet<Reason> = cases::all()
        .iter()
        .flat_map(|case| &case.events)
        .filter_map(|event| match event {
            Event::Packet(step) => Some(step.reason),
            Event::Change(_) => None,
        })
        .collect();
    for description in forwarder_common::abi::reason::DESCRIPTIONS {
        assert!(reached.contains(&description.reason), "{}", description.name);
    }
}

#[test]
fn expected_frames_have_valid_checksums_where_they_leave() {
    for case in cases::all() {
        for event in &case.events {
            if let Event::Packet(step) = event
                && step.program != Program::Generic
                && matches!(step.verdict.action, Action::Transmit | Action::Redirect)
                && wrong_checksums(&step.frame).is_empty()
            {
                assert_eq!(
                    wrong_checksums(&step.out),
                    Vec::<&str>::new(),
                    "{}",
                    case.sentence
                );
            }
        }
    }
}

/// What a packet's tables and bytes must look like afterwards, whatever it was.
fn check_invariants(world: &MemoryTables, action: Action, reason: Reason, frame: &[u8], out: &[u8]) {
    let description = reason.description().expect("a reason of the list");
    let kind = match action {
        Action::Transmit | Action::Redirect => VerdictKind::Send,
        Action::Pass => VerdictKind::Pass,
        Action::Drop => VerdictKind::Drop,
    };
    let is_refusal = description.verdict == VerdictKind::Refuse;
    if is_refusal {
        assert_ne!(kind, VerdictKind::Pass, "{reason:?}");
    } else {
        assert_eq!(description.verdict, kind, "{reason:?}");
    }
    let is_rewritten =
        kind == VerdictKind::Send || reason == Reason::REQUEST_TO_STACK || reason == Reason::REPLY_TO_STACK;
    if !is_rewritten {
        assert_eq!(frame, out, "{reason:?} leaves a packet as it is");
    } else if reason != Reason::ARP_ANSWERED && wrong_checksums(frame).is_empty() {
        assert_eq!(wrong_checksums(out), Vec::<&str>::new(), "{reason:?}");
    }
    if !is_refusal {
        assert_eq!(frame.len(), out.len());
    }

    assert_eq!(world.unsound(), Vec::<String>::new());
}

/// Without this test the short way could be closed, and nothing but the benchmark would tell.
#[test]
fn established_flows_and_strangers_take_the_short_way() {
    use Packets::{Answer, NoListener, Opening, Others, Reply, Request};
    for (way, is_v6) in [(Way::FullNat, false), (Way::FullNat, true), (Way::Dnat, false)] {
        let gateway = Gateway {
            way,
            is_v6,
            ..Gateway::PLAIN
        };
        for (packets, is_short) in [
            (Request, true),
            (Reply, true),
            // In DNAT mode an address of nobody may be a client's.
            (Others, way != Way::Dnat),
            (Opening, false),
            (Answer, false),
            (NoListener, false),
        ] {
            let (stream, mut world) = gateway.stream_and_tables(packets).unwrap();
            let frame = &stream.frame;
            assert_eq!(
                world.takes_the_short_way(stream.ifindex, frame),
                is_short,
                "{gateway:?} {packets:?}"
            );
            let mut capturing = world.clone();
            capturing.settings.flags |= flag::CAPTURE;
            assert!(!capturing.takes_the_short_way(stream.ifindex, frame));
            if packets == Request {
                world.settings.route_generation += 1;
                assert!(
                    !world.takes_the_short_way(stream.ifindex, frame),
                    "the route is old"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_tables_and_packets_stay_sound(scenario in random::scenario()) {
        let mut world = scenario.world.clone();
        for packet in &scenario.packets {
            let before = world.counted_reasons();
            let (outcome, out) = world.forward(packet.program, packet.ifindex, &packet.frame);
            let counted: u64 = world.counted_reasons().iter().map(|(_, counters)| counters.packets).sum();
            let counted_before: u64 = before.iter().map(|(_, counters)| counters.packets).sum();
            prop_assert_eq!(counted, counted_before + 1);
            check_invariants(&world, outcome.verdict.action, outcome.reason, &packet.frame, &out);
        }
    }

    #[test]
    fn a_reply_restores_what_its_request_said(client in random::client(), service in random::service()) {
        let mut world = cases::world();
        // Our own addresses open no flow; the cases say so.
        let source = Ipv4Address::from(*client.ip());
        prop_assume!(!world.settings.pool.contains(source.into()) && !world.vips.contains_key(&VipKey { address: source.into() }));
        let request = service.request(client);
        let (outcome, there) = world.forward(Program::Native, 11, &request);
        prop_assert!(matches!(outcome.reason, Reason::REQUEST_FORWARDED | Reason::REQUEST_TO_STACK));
        let reply = random::turned_back(&there);
        let (outcome, back) = world.forward(Program::Native, 12, &reply);
        prop_assert!(matches!(outcome.reason, Reason::REPLY_FORWARDED | Reason::REPLY_TO_STACK), "{:?}", outcome);
        prop_assert_eq!(random::addresses(&random::turned_back(&back)), random::addresses(&request));
        prop_assert_eq!(wrong_checksums(&back), Vec::<&str>::new());
    }

    #[test]
    fn random_bytes_are_never_forwarded_by_accident(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut world = cases::world();
        let (outcome, out) = world.forward(Program::Native, 11, &bytes);
        check_invariants(&world, outcome.verdict.action, outcome.reason, &bytes, &out);
    }
}
