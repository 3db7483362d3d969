//! Ring 1: the packet cases through the library, and what must hold for every packet.

use std::collections::{BTreeMap, HashSet};

use forwarder_common::{
    abi::{
        flow::{FlowId, FlowState},
        listener::VipKey,
        reason::{DESCRIPTIONS, Reason},
        settings::flag,
    },
    datapath::{Action, hint::Hints},
    wire::Ipv4Address,
};
use forwarder_tests::{
    cases::{
        self, Case, Event,
        measured::{Gateway, Packets, Way},
        recorded::recordings,
    },
    invariants::{self, Arrival},
    packet::{ETHERNET_LEN, fold, patched, sum, wrong_checksums},
    tables::{CLIENT_SIDE, MemoryTables, Program},
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
        expected.fragments.clone_from(&world.fragments);
        expected.flow_index.clone_from(&world.flow_index);
        expected.flows.clone_from(&world.flows);
        expected.handshakes.clone_from(&world.handshakes);
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
fn what_clients_have_sent_is_forwarded_whole() {
    let mut reasons = BTreeMap::new();
    for recording in recordings() {
        let mut tables = recording.world;
        for frame in &recording.frames {
            let (outcome, out) = tables.forward(Program::Native, CLIENT_SIDE.ifindex, frame);
            let wrong = wrong_checksums(&out);
            assert!(wrong.is_empty(), "{}: {wrong:?} in {out:02x?}", recording.name);
            *reasons
                .entry(DESCRIPTIONS[outcome.reason.0 as usize].name)
                .or_insert(0) += 1;
        }
    }
    // Ports 80 and 53; port 81 leads into the kernel's tunnel; echo messages in pieces and multicast are for the stack.
    let expected = [
        ("request_forwarded", 98),
        ("request_to_stack", 2),
        ("echo_answered", 11),
        ("arp_answered", 2),
        ("neighbour_answered", 2),
        ("unsupported_protocol", 10),
        ("not_ours", 1),
    ];
    assert_eq!(reasons, BTreeMap::from(expected));
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

/// Without this test the short way could be closed, and nothing but the benchmark would tell.
#[test]
fn established_flows_and_strangers_take_the_short_way() {
    use Packets::{Answer, NoListener, Opening, Others, Reply, Request};
    let tunnels = ["VXLAN", "Geneve", "GRE", "GRETAP", "IPIP", "GUE", "FOU"];
    let tunnels = tunnels.into_iter().map(|name| (Way::Tunnel(name, false), false));
    let ways = [(Way::FullNat, false), (Way::FullNat, true), (Way::Dnat, false)];
    for (way, is_v6) in ways.into_iter().chain(tunnels) {
        let gateway = Gateway {
            way,
            is_v6,
            ..Gateway::PLAIN
        };
        for (packets, is_short) in [
            (Request, true),
            (Reply, true),
            (Others, true),
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

/// Which packets of tunnels go short; that they become the same as on the walk is what `MemoryTables::forward` sees to.
#[test]
fn what_is_seldom_about_a_tunnel_s_packet_is_for_the_walk() {
    let gateway = Gateway {
        way: Way::Tunnel("IPIP", false),
        ..Gateway::PLAIN
    };
    let check = |what: &str, mut world: MemoryTables, ifindex: u32, frame: &[u8], is_short: bool| {
        assert_eq!(world.takes_the_short_way(ifindex, frame), is_short, "{what}");
        world.forward(Program::Native, ifindex, frame).0.reason
    };
    let (request, world) = gateway.stream_and_tables(Packets::Request).unwrap();
    let (reply, after_reply) = gateway.stream_and_tables(Packets::Reply).unwrap();
    let changed = |world: &MemoryTables, change: &dyn Fn(&mut MemoryTables)| {
        let mut world = world.clone();
        change(&mut world);
        world
    };
    let len = u16::try_from(request.frame.len() - ETHERNET_LEN).unwrap();
    let with_mtu = |mtu_bytes| changed(&world, &|world| world.flows[0].request_hop.mtu_bytes = mtu_bytes);
    let there = |what, world, is_short| check(what, world, request.ifindex, &request.frame, is_short);
    there("as large as the tunnel's MTU", with_mtu(len), true);
    let reason = there("larger", with_mtu(len - 1), false);
    assert_eq!(reason, Reason::REQUEST_TO_STACK, "it may be fragmented");
    let tagged = changed(&world, &|world| world.flows[0].request_hop.vlans = [5, 6]);
    there("tagged as it leaves", tagged, true);
    let reason = there(
        "no such far end",
        changed(&world, &|world| world.tunnel_peers.clear()),
        true,
    );
    assert_eq!(reason, Reason::INTERNAL);

    let back =
        |what, frame: &[u8], is_short| check(what, after_reply.clone(), reply.ifindex, frame, is_short);
    let outer_len = ETHERNET_LEN + 20;
    let inner = &reply.frame[outer_len..];
    back("as it is", &reply.frame, true);
    let tag = |frame: &[u8]| [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat();
    back("a tag outside", &tag(&reply.frame), true);
    back("two", &tag(&tag(&reply.frame)), true);
    back("padding", &[&reply.frame[..], &[0xa5; 6]].concat(), true);
    back(
        "ECT(1) outside",
        &patched(reply.frame.clone(), ETHERNET_LEN + 1, &[1]),
        false,
    );
    let into_another = changed(&after_reply, &|world| world.flows[0].reply_hop.peer = 1);
    check(
        "into another tunnel",
        into_another.clone(),
        reply.ifindex,
        &reply.frame,
        false,
    );
    let plain = [&request.frame[..ETHERNET_LEN], inner].concat();
    check("a reply into a tunnel", into_another, reply.ifindex, &plain, true);

    // A client's packet in the same tunnel, to a backend on this side.
    let local = changed(&world, &|world| world.flows[0].request_hop.peer = 0);
    let inner = &request.frame[ETHERNET_LEN..];
    let total_len = u16::try_from(20 + inner.len()).unwrap().to_be_bytes();
    let outer = patched(reply.frame[..outer_len].to_vec(), ETHERNET_LEN + 2, &total_len);
    let from_tunnel = [&outer[..], inner].concat();
    let reason = check(
        "a request out of a tunnel",
        local,
        reply.ifindex,
        &from_tunnel,
        true,
    );
    assert_eq!(reason, Reason::REQUEST_FORWARDED);
    check("and into it", world.clone(), reply.ifindex, &from_tunnel, false);

    let partial =
        |world: &MemoryTables| changed(world, &|world| world.settings.flags |= flag::PARTIAL_CHECKSUMS);
    let with_partial = |frame: &[u8], network: usize| {
        // Of the pseudo-header: addresses, protocol, length.
        let len = frame.len() - network - 20;
        let partial = fold(sum(&frame[network + 12..network + 20]) + 6 + len as u64);
        patched(frame.to_vec(), network + 20 + 16, &partial.to_be_bytes())
    };
    let frame = with_partial(&request.frame, ETHERNET_LEN);
    check(
        "a partial checksum",
        partial(&world),
        request.ifindex,
        &frame,
        false,
    );
    let frame = with_partial(&reply.frame, outer_len);
    check(
        "a partial checksum inside",
        partial(&after_reply),
        reply.ifindex,
        &frame,
        false,
    );
}

#[test]
fn a_hint_finds_its_flow_and_a_wrong_one_is_forgotten() {
    for (way, is_v6) in [(Way::FullNat, false), (Way::FullNat, true), (Way::Dnat, false)] {
        let gateway = Gateway {
            way,
            is_v6,
            ..Gateway::PLAIN
        };
        let (stream, mut world) = gateway.stream_and_tables(Packets::Request).unwrap();
        let none = vec![Hints::default(); 8];
        world.hints = none.clone();
        let forward =
            |world: &mut MemoryTables| world.forward(Program::Native, stream.ifindex, &stream.frame);
        let sent = forward(&mut world);
        assert_ne!(world.hints, none, "{gateway:?}: noted");

        let mut without_index = world.clone();
        without_index.flow_index.clear();
        assert!(
            without_index.takes_the_short_way(stream.ifindex, &stream.frame),
            "{gateway:?}"
        );

        // The flow ended, and the same connection came again under another number.
        let mut moved = world.clone();
        let again = FlowId(moved.flows.len() as u32);
        moved.flows.push(moved.flows[0]);
        moved.flows[0].state = FlowState::FREE;
        for reference in moved.flow_index.values_mut() {
            reference.id = again;
        }
        assert!(
            !moved.takes_the_short_way(stream.ifindex, &stream.frame),
            "{gateway:?}"
        );
        assert_eq!(forward(&mut moved), sent, "{gateway:?}");
        assert_eq!(moved.hints, none, "{gateway:?}: forgotten");
        assert_eq!(forward(&mut moved), sent, "{gateway:?}");
        assert_ne!(moved.hints, none, "{gateway:?}: noted");
        assert_ne!(moved.hints, world.hints, "{gateway:?}: another number");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_tables_and_packets_stay_sound(scenario in random::scenario()) {
        let mut world = scenario.world.clone();
        for packet in &scenario.packets {
            invariants::forward(&mut world, packet);
        }
    }

    #[test]
    fn a_reply_restores_what_its_request_said(client in random::client(), service in random::service()) {
        let mut world = cases::world();
        // Our own addresses open no flow; the cases say so.
        let source = Ipv4Address::from(*client.ip());
        prop_assume!(!world.settings.pool.contains(source.into()) && !world.vips.contains_key(&VipKey { address: source.into() }));
        let request = Arrival {
            program: Program::Native,
            ifindex: CLIENT_SIDE.ifindex,
            frame: service.request(client),
        };
        let (outcome, there) = invariants::forward(&mut world, &request);
        prop_assert!(matches!(outcome.reason, Reason::REQUEST_FORWARDED | Reason::REQUEST_TO_STACK));
        let reason = invariants::check_reply(&world, &request, outcome, &there);
        prop_assert!(matches!(reason, Some(Reason::REPLY_FORWARDED | Reason::REPLY_TO_STACK)), "{:?}", reason);
    }

    #[test]
    fn random_bytes_are_never_forwarded_by_accident(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
        let arrival = Arrival { program: Program::Native, ifindex: CLIENT_SIDE.ifindex, frame };
        invariants::forward(&mut cases::world(), &arrival);
    }
}
