//! What must hold for every packet, whatever it is and whatever came before it.
//!
//! One list for the random packets of ring 1, the fuzz targets, and the inputs that once broke something. Each check
//! panics with what it found, which is how a fuzzer and a test both learn of it. Nothing is compared with what the data
//! path says of itself: packets are read by `layers`.

use forwarder_common::{
    abi::{
        counter::{ReasonCounters, TrafficCounters},
        flow::TcpEvents,
        reason::{Reason, VerdictKind},
        settings::flag,
    },
    datapath::{Action, Outcome},
};

use crate::{
    layers::{self, Layer, protocol},
    packet::is_reset,
    tables::{MemoryTables, Program},
};

/// A frame on its way into a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Arrival {
    pub program: Program,
    /// The interface it comes in by.
    pub ifindex: u32,
    pub frame: Vec<u8>,
}

/// Runs the library on a frame, and checks what must hold of every one: what becomes of it, and its bytes then.
///
/// # Panics
/// When something does not hold.
pub fn forward(world: &mut MemoryTables, arrival: &Arrival) -> (Outcome, Vec<u8>) {
    let reasons = world.reason_counters.clone();
    let traffic = traffic_of(world);
    let was_sound = world.unsound().is_empty();
    let (outcome, out) = world.forward(arrival.program, arrival.ifindex, &arrival.frame);
    check_counters(&reasons, world, arrival, outcome);
    check_traffic(traffic, world, outcome.reason);
    check_bytes(world, arrival, outcome, &out);
    if was_sound {
        assert_eq!(world.unsound(), Vec::<String>::new(), "after {outcome:?}");
    }
    (outcome, out)
}

/// Each packet is counted under the reason that it ends with, and no other, with all its bytes.
fn check_counters(before: &[ReasonCounters], world: &MemoryTables, arrival: &Arrival, outcome: Outcome) {
    for ((index, before), after) in (0..).zip(before).zip(&world.reason_counters) {
        let is_this = u64::from(Reason(index) == outcome.reason);
        let wanted = ReasonCounters {
            packets: before.packets + is_this,
            bytes: before.bytes + is_this * arrival.frame.len() as u64,
        };
        assert_eq!(
            *after,
            wanted,
            "counted under {:?}, but it was {outcome:?}",
            Reason(index)
        );
    }
    assert!(
        outcome.reason.description().is_some(),
        "{outcome:?} is no reason of the list"
    );
}

/// What all listeners have counted, and all backends.
fn traffic_of(world: &MemoryTables) -> [TrafficCounters; 2] {
    [&world.listener_counters, &world.backend_counters].map(|counters| {
        let mut total = TrafficCounters::default();
        for one in counters {
            total.flows_opened += one.flows_opened;
            total.request_packets += one.request_packets;
            total.request_bytes += one.request_bytes;
            total.reply_packets += one.reply_packets;
            total.reply_bytes += one.reply_bytes;
            total.flows_answered += one.flows_answered;
            total.flows_rejected += one.flows_rejected;
            total.client_resets += one.client_resets;
            total.backend_resets += one.backend_resets;
        }
        total
    })
}

/// What listeners count, backends count: of a packet that goes on one, in its direction.
fn check_traffic(before: [TrafficCounters; 2], world: &MemoryTables, reason: Reason) {
    for (before, after) in before.into_iter().zip(traffic_of(world)) {
        let counted = (
            after.request_packets - before.request_packets,
            after.reply_packets - before.reply_packets,
        );
        let wanted: &[(u64, u64)] = match reason {
            Reason::REQUEST_FORWARDED | Reason::REQUEST_TO_STACK => &[(1, 0)],
            Reason::REPLY_FORWARDED | Reason::REPLY_TO_STACK => &[(0, 1)],
            Reason::FRAGMENTED => &[(1, 0), (0, 1)],
            // Cut, or else too large: counted before the agent was asked.
            Reason::UNTRANSLATABLE => &[(0, 0), (1, 0), (0, 1)],
            _ => &[(0, 0)],
        };
        assert!(
            wanted.contains(&counted),
            "{reason:?} counted {counted:?} packets"
        );
    }
    let [listeners, backends] = traffic_of(world);
    let [listeners_before, backends_before] = before;
    let difference = |after: &TrafficCounters, before: &TrafficCounters| {
        [
            after.flows_opened - before.flows_opened,
            after.request_bytes - before.request_bytes,
            after.reply_bytes - before.reply_bytes,
            after.flows_answered - before.flows_answered,
            after.flows_rejected - before.flows_rejected,
            after.client_resets - before.client_resets,
            after.backend_resets - before.backend_resets,
        ]
    };
    assert_eq!(
        difference(&listeners, &listeners_before),
        difference(&backends, &backends_before),
        "{reason:?}: listeners and backends count the same"
    );
}

/// The verdict is that of the reason; what is not translated stays as it is; what is, is right afterwards.
fn check_bytes(world: &MemoryTables, arrival: &Arrival, outcome: Outcome, out: &[u8]) {
    let reason = outcome.reason;
    let frame = &arrival.frame;
    let described = reason.description().expect("a reason of the list").verdict;
    let kind = match outcome.verdict.action {
        Action::Transmit | Action::Redirect => VerdictKind::Send,
        Action::Pass => VerdictKind::Pass,
        Action::Drop => VerdictKind::Drop,
    };
    let is_refusal = described == VerdictKind::Refuse;
    if is_refusal {
        assert_ne!(kind, VerdictKind::Pass, "{reason:?}");
    } else {
        assert_eq!(described, kind, "{reason:?}");
    }
    let is_rewritten = kind == VerdictKind::Send
        || matches!(
            reason,
            Reason::REQUEST_TO_STACK | Reason::REPLY_TO_STACK | Reason::ICMP_TO_STACK
        );
    if !is_rewritten {
        // What is dropped nobody sees; of what is cut, the agent has the packet as it is by now.
        if kind != VerdictKind::Drop {
            assert_eq!(frame, out, "{reason:?} leaves a packet as it is");
        }
        return;
    }
    check_checksums(world, arrival, reason, out);
    if !is_refusal && reason != Reason::ARP_ANSWERED && reason != Reason::NEIGHBOUR_ANSWERED {
        check_payload(world, arrival, reason, out);
    }
}

/// What has right checksums when it comes has right ones when it goes, in all layers.
fn check_checksums(world: &MemoryTables, arrival: &Arrival, reason: Reason, out: &[u8]) {
    let ports = tunnel_ports(world);
    let came = layers::of(&arrival.frame, &ports);
    let may_be_partial =
        world.settings.flags & flag::PARTIAL_CHECKSUMS != 0 || arrival.program == Program::Tunnel;
    let is_right = came.iter().all(|layer| {
        layer.wrong_checksums(&arrival.frame).is_empty()
            && !(may_be_partial && layer.may_be_partial(&arrival.frame))
    });
    if came.is_empty() || !is_right {
        return;
    }
    let left = as_it_left(arrival, out, &ports);
    assert!(!left.is_empty(), "{reason:?}: what left can't be read");
    for (depth, layer) in left.iter().enumerate() {
        let wrong = layer.wrong_checksums(out);
        assert!(
            wrong.is_empty(),
            "{reason:?}: {wrong:?} checksums wrong in layer {depth}"
        );
    }
}

/// The packet that is forwarded keeps its payload, and takes a hop if it leaves straight from the program.
fn check_payload(world: &MemoryTables, arrival: &Arrival, reason: Reason, out: &[u8]) {
    let is_of_flow = matches!(
        reason,
        Reason::REQUEST_FORWARDED
            | Reason::REPLY_FORWARDED
            | Reason::REQUEST_TO_STACK
            | Reason::REPLY_TO_STACK
    );
    if !is_of_flow {
        return;
    }
    let ports = tunnel_ports(world);
    let (came, left) = (
        layers::of(&arrival.frame, &ports),
        as_it_left(arrival, out, &ports),
    );
    assert!(!left.is_empty(), "{reason:?}: what left can't be read");
    // A payload may look like a packet in a tunnel; so the ends that both have are compared, if there is no doubt.
    let (Some(came), Some(left)) = (came.last(), left.last()) else {
        return;
    };
    if came.protocol != left.protocol && !is_icmp(came.protocol) {
        return;
    }
    let segment = [came.segment(&arrival.frame), left.segment(out)];
    let payload = [came.payload(&arrival.frame), left.payload(out)];
    if is_led(world, came, left, payload) {
        return;
    }
    assert_eq!(segment[0].len(), segment[1].len(), "{reason:?}: another length");
    let is_first = came.piece.is_none_or(|(offset, _)| offset == 0);
    match payload {
        [Some(before), Some(after)] if is_first => {
            let (before, after) = (&arrival.frame[before..came.end], &out[after..left.end]);
            assert!(before == after, "{reason:?}: another payload");
        }
        _ if !is_first => assert!(segment[0] == segment[1], "{reason:?}: another payload"),
        _ => {}
    }
    let is_sent = matches!(reason, Reason::REQUEST_FORWARDED | Reason::REPLY_FORWARDED);
    let hops = u8::from(is_sent);
    let ttl = (came.ttl(&arrival.frame), left.ttl(out));
    assert_eq!(ttl.0.wrapping_sub(hops), ttl.1, "{reason:?}: hops");
}

/// Where SYN cookies are, the gateway leads handshakes: a segment without payload may become another of them, at most with
/// the byte of a probe.
fn is_led(world: &MemoryTables, came: &Layer, left: &Layer, payload: [Option<usize>; 2]) -> bool {
    let [Some(before), Some(after)] = payload else {
        return false;
    };
    let has_cookies = world.flows.iter().any(|flow| flow.tcp.has(TcpEvents::BY_COOKIE));
    has_cookies && came.protocol == protocol::TCP && before == came.end && after + 1 >= left.end
}

fn is_icmp(number: u8) -> bool {
    matches!(number, protocol::ICMP | protocol::ICMPV6)
}

/// The layers of a frame as it left. What tcx has translated keeps its link header, which the kernel then writes.
fn as_it_left(arrival: &Arrival, out: &[u8], ports: &[u16]) -> Vec<Layer> {
    let found = layers::of(out, ports);
    if found.is_empty() && arrival.program == Program::Tunnel {
        return layers::outermost(&arrival.frame)
            .and_then(|came| Layer::at(out, came.start))
            .into_iter()
            .collect();
    }
    found
}

fn tunnel_ports(world: &MemoryTables) -> Vec<u16> {
    world.tunnel_ports.keys().copied().collect()
}

/// The reply to a request that went on finds its way back, and its addresses are those of the request.
///
/// `world` is that after the request, and is left alone. Returns what became of the reply; `None` of what has no ports,
/// goes through a tunnel or in pieces, or ends its connection.
///
/// # Panics
/// When the reply finds no flow, or is translated to something else.
pub fn check_reply(world: &MemoryTables, request: &Arrival, outcome: Outcome, out: &[u8]) -> Option<Reason> {
    if !matches!(
        outcome.reason,
        Reason::REQUEST_FORWARDED | Reason::REQUEST_TO_STACK
    ) {
        return None;
    }
    let ports = tunnel_ports(world);
    let came = layers::of(&request.frame, &ports);
    let ([came], [left]) = (&came[..], &as_it_left(request, out, &ports)[..]) else {
        return None;
    };
    let (Some([client, vip]), Some(_)) = (came.ends(&request.frame), left.ends(out)) else {
        return None;
    };
    if left.piece.is_some() || came.piece.is_some() || ends_its_connection(left, out) {
        return None;
    }
    let frame = turned_back(out, left)?;
    let reply = Arrival {
        program: Program::Native,
        ifindex: crate::tables::SERVER_SIDE.ifindex,
        frame,
    };
    let mut world = world.clone();
    let (outcome, back) = forward(&mut world, &reply);
    assert!(
        !matches!(
            outcome.reason,
            Reason::NO_FLOW | Reason::NOT_OURS | Reason::NO_LISTENER | Reason::NOT_A_SYN
        ),
        "the reply is of no flow: {outcome:?}"
    );
    if !matches!(outcome.reason, Reason::REPLY_FORWARDED | Reason::REPLY_TO_STACK) {
        return Some(outcome.reason);
    }
    let back_layers = layers::of(&back, &ports);
    let restored = back_layers.last().expect("a reply that can be read");
    assert_eq!(restored.ends(&back), Some([vip, client]), "the reply's ends");
    Some(outcome.reason)
}

fn ends_its_connection(layer: &Layer, frame: &[u8]) -> bool {
    match layer.protocol {
        protocol::TCP => is_reset(frame),
        // What ends an association is several chunks, of which the first decides; and shutdowns.
        protocol::SCTP => layer
            .segment(frame)
            .get(12)
            .is_none_or(|chunk| matches!(chunk, 6 | 7 | 8 | 14)),
        _ => false,
    }
}

/// The frame with source and destination exchanged, addresses and ports, which leaves all checksums of 16 bits valid;
/// `None`: it has no ports. Its hops are plenty.
pub fn turned_back(frame: &[u8], layer: &Layer) -> Option<Vec<u8>> {
    layer.ends(frame)?;
    let mut back = frame.to_vec();
    let (address, len) = if layer.is_v4 { (12, 4) } else { (8, 16) };
    for index in 0..len {
        back.swap(layer.start + address + index, layer.start + address + len + index);
    }
    for index in 0..2 {
        back.swap(layer.transport + index, layer.transport + 2 + index);
    }
    let ethertype = if layer.is_v4 { [8, 0] } else { [0x86, 0xdd] };
    back[layer.start - 2..layer.start].copy_from_slice(&ethertype);
    back[layer.start + if layer.is_v4 { 8 } else { 7 }] = 64;
    let was_right = layer.wrong_checksums(frame).is_empty();
    if was_right {
        layer.repair(&mut back);
    }
    Some(back)
}
