//! Sequences of packets through the data path as a library, from the packet cases.

use std::{cell::RefCell, collections::BTreeMap, env, sync::LazyLock};

use forwarder_common::{
    abi::{reason::Reason, settings::flag},
    datapath::Outcome,
};

use super::Target;
use crate::{
    cases,
    invariants::{self, Arrival, check_reply},
    layers::{self, Layer, protocol},
    script::{Kinds, Script, reassembled},
    tables::Program,
};

/// Whatever packets.
pub(super) const WALK: Target = Target {
    name: "walk",
    run: |bytes| play(bytes, Kinds::All),
    seeds: || seeds(Kinds::All),
};

/// ICMP errors about packets of flows.
pub(super) const ICMP: Target = Target {
    name: "icmp",
    run: |bytes| play(bytes, Kinds::Errors),
    seeds: || seeds(Kinds::Errors),
};

/// Packets in pieces.
pub(super) const FRAGMENTS: Target = Target {
    name: "fragments",
    run: |bytes| play(bytes, Kinds::Pieces),
    seeds: || seeds(Kinds::Pieces),
};

fn seeds(kinds: Kinds) -> Vec<Vec<u8>> {
    cases::with_twins()
        .iter()
        .map(|case| match kinds {
            Kinds::All => Script::of_case(case),
            _ => Script::of_case_and(case, kinds),
        })
        .chain(Script::recorded())
        .map(|script| script.bytes())
        .collect()
}

/// Is every script to be told before it is played? For a look at one that breaks something.
static IS_TOLD: LazyLock<bool> = LazyLock::new(|| env::var_os("FORWARDER_FUZZ_TELL").is_some());

/// A piece that went on, and what it became.
struct Piece {
    arrival: Arrival,
    outcome: Outcome,
    out: Vec<u8>,
}

fn play(bytes: &[u8], kinds: Kinds) {
    let script = Script::read(bytes, kinds);
    if *IS_TOLD {
        eprintln!("{}", script.describe());
    }
    let world = RefCell::new(script.world());
    let groups: RefCell<BTreeMap<usize, Vec<Piece>>> = RefCell::new(BTreeMap::new());
    script.play(
        |arrival, group| {
            let world = &mut *world.borrow_mut();
            let (outcome, out) = invariants::forward(world, arrival);
            check_reply(world, arrival, outcome, &out);
            check_error(arrival, outcome, &out);
            if let Some(group) = group {
                let piece = Piece {
                    arrival: arrival.clone(),
                    outcome,
                    out: out.clone(),
                };
                groups.borrow_mut().entry(group).or_default().push(piece);
            }
            Some((outcome, out))
        },
        |change| change(&mut world.borrow_mut()),
    );
    for pieces in groups.borrow().values() {
        check_pieces(pieces, world.borrow().settings.flags);
    }
}

/// Of an ICMP error that goes on, the quoted packet is as the receiver sent it: it comes from where the error goes, and
/// its header's checksum is right if it was.
fn check_error(arrival: &Arrival, outcome: Outcome, out: &[u8]) {
    if !matches!(outcome.reason, Reason::ICMP_FORWARDED | Reason::ICMP_TO_STACK) {
        return;
    }
    let quoted = |frame: &[u8]| -> Option<(Layer, Vec<u8>)> {
        let layers = layers::of(frame, &[]);
        let [layer] = &layers[..] else {
            return None;
        };
        let is_icmp = matches!(layer.protocol, protocol::ICMP | protocol::ICMPV6);
        let quote = layer.segment(frame).get(8..)?;
        is_icmp.then(|| (*layer, quote.to_vec()))
    };
    let (Some((_, came)), Some((layer, left))) = (quoted(&arrival.frame), quoted(out)) else {
        return;
    };
    let is_v4 = left.first().is_some_and(|first| first >> 4 == 4);
    assert_eq!(is_v4, layer.is_v4, "an error quotes a packet of its own family");
    let source = if is_v4 { left.get(12..16) } else { left.get(8..24) };
    let [_, receiver] = layer.addresses(out);
    let octets = match receiver {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    assert_eq!(
        source,
        Some(&octets[..]),
        "an error goes to the source of what it quotes"
    );
    let is_right = |quote: &[u8]| {
        let len = usize::from(quote[0] & 0x0f) * 4;
        quote
            .get(..len)
            .is_some_and(|header| crate::packet::fold(crate::packet::sum(header)) == 0xffff)
    };
    if came[0] >> 4 == 4 && is_v4 && is_right(&came) {
        assert!(is_right(&left), "the quoted header's checksum");
    }
}

/// What goes on in pieces is put together to the packet that it was, with a right transport checksum and all its payload.
fn check_pieces(pieces: &[Piece], flags: u32) {
    let are_all_sent = pieces.iter().all(|piece| {
        matches!(
            piece.outcome.reason,
            Reason::REQUEST_FORWARDED
                | Reason::REPLY_FORWARDED
                | Reason::REQUEST_TO_STACK
                | Reason::REPLY_TO_STACK
        )
    });
    let is_plain = flags & flag::TUNNELS == 0
        && pieces
            .iter()
            .all(|piece| piece.arrival.program != Program::Tunnel);
    if !are_all_sent || !is_plain {
        return;
    }
    let came: Vec<_> = pieces.iter().map(|piece| &piece.arrival.frame[..]).collect();
    let left: Vec<_> = pieces.iter().map(|piece| &piece.out[..]).collect();
    let Some((layer, whole)) = reassembled(&came) else {
        return;
    };
    // Not what the frame's length fields say, which are of the first piece.
    let is_right = |layer: &Layer, packet: &[u8]| !layer.wrong_checksums(packet).contains(&"transport");
    let was_right = is_right(&layer, &whole);
    let (layer_then, whole_then) = reassembled(&left).expect("pieces that make up a packet again");
    assert_eq!(
        layer.segment(&whole).len(),
        layer_then.segment(&whole_then).len(),
        "all of the packet"
    );
    if was_right {
        assert!(is_right(&layer_then, &whole_then), "the whole packet's checksum");
    }
    if let (Some(before), Some(after)) = (layer.payload(&whole), layer_then.payload(&whole_then)) {
        assert!(
            whole[before..] == whole_then[after..],
            "the whole packet's payload"
        );
    }
}
