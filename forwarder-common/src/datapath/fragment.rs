//! Fragments follow the first of their packet, which alone has the ports (RFC 791 §3.2, RFC 8200 §4.5).
//!
//! When a first fragment passes, the table keeps its flow under what all fragments of the packet share. Later ones are
//! given new addresses only. The table is bounded and the entry used least recently makes room; an entry serves as long
//! as a host would wait for the rest.
//!
//! A fragment that comes before its packet's first is handed to the agent, which sends it on when that has passed
//! (`Env::hold`): a program cannot keep a packet.

use super::{
    Env, Hook, Outcome, Packet, Stop, Tables, Walk, admission,
    parse::{self, Frame, Kind},
    rewrite, translate,
};
use crate::{
    abi::{
        flow::{Direction, FlowEntry, FlowState, HopKind},
        fragment::{FragmentFlow, FragmentKey, HeldKind},
        reason::Reason,
        settings::Settings,
    },
    wire::ipv4::{PROTOCOL_TCP, PROTOCOL_UDP},
};

/// RFC 8200 §4.5: reassembly is given up after 60 seconds; Linux waits for 30 (net.ipv4.ipfrag_time).
const LIFETIME_SECS: i32 = 30;

/// What part of a packet a frame carries: values of [`Frame::fragment`].
pub mod part {
    /// All of it.
    pub const WHOLE: u32 = 0;
    /// Its beginning, with the transport header.
    pub const FIRST: u32 = 1;
    /// Something behind that.
    pub const LATER: u32 = 2;
}

/// What the fragments of the frame's packet share.
#[inline(always)]
pub const fn key(frame: &Frame) -> FragmentKey {
    FragmentKey {
        source: frame.key.source.copied(),
        destination: frame.key.destination.copied(),
        identification: frame.identification,
        protocol: frame.key.protocol,
    }
}

/// Keeps the flow of a first fragment.
#[inline(always)]
pub fn keep<T: Tables>(tables: &mut T, walk: &Walk) {
    let flow = FragmentFlow {
        id: walk.hit.id,
        direction: walk.hit.direction,
        seen_secs: tables.now_secs(),
    };
    tables.keep_fragment(&key(&walk.frame), flow);
}

/// Whether a later fragment has a flow: [`FOUND`], or the number of the reason why not.
pub type Followed = i64;
/// The walk has the hit.
pub const FOUND: Followed = -1;

/// Looks for the flow of a later fragment, and counts the fragment.
///
/// Without a first fragment the answer is [`Reason::FRAGMENT_HELD`] for one of our addresses: whether it can be held is
/// for the caller to find out. Numbers out, so that the kernel can run it as a function of its own.
#[inline(always)]
pub fn follow<T: Tables>(tables: &mut T, settings: &Settings, walk: &mut Walk) -> Followed {
    let now_secs = tables.now_secs();
    let Some(kept) = tables.fragment(&key(&walk.frame)) else {
        return Followed::from(without_first(tables, settings, walk).0);
    };
    let FragmentFlow {
        id,
        direction,
        seen_secs,
    } = *kept;
    let gone = Followed::from(Reason::FRAGMENT.0);
    let Walk { frame, hit, .. } = walk;
    let Some(entry) = tables.flow(id) else {
        return gone;
    };
    // Signed: the agent's clock, in `explain`, is finer than the program's.
    if now_secs.wrapping_sub(seen_secs) as i32 > LIFETIME_SECS || !is_of(entry, direction, frame) {
        return gone;
    }
    if entry.seen == 0 {
        entry.seen = 1;
    }
    let bytes = u64::from(frame.total_len);
    if direction == Direction::REQUEST {
        entry.request_packets = entry.request_packets.wrapping_add(1);
        entry.request_bytes = entry.request_bytes.wrapping_add(bytes);
    } else {
        entry.reply_packets = entry.reply_packets.wrapping_add(1);
        entry.reply_bytes = entry.reply_bytes.wrapping_add(bytes);
    }
    hit.set(id, direction, entry);
    FOUND
}

/// Is the fragment of this flow? The number may have been given to another one since the packet's first passed.
#[inline(always)]
fn is_of(entry: &FlowEntry, direction: Direction, frame: &Frame) -> bool {
    let expected = entry.key(direction);
    entry.state == FlowState::LIVE
        && expected.source == frame.key.source
        && expected.destination == frame.key.destination
        && expected.protocol == frame.key.protocol
}

/// Makes a held fragment, which begins with its IP header, one of its flow now that its packet's first has passed, and
/// takes a hop: what the rest of the walk would have done. For the agent.
///
/// # Errors
/// When it is of no flow any more, or at its last hop.
pub fn release<P: Packet>(
    packet: &mut P,
    walk: &mut Walk,
    first: FragmentFlow,
    entry: &FlowEntry,
) -> Result<(), Stop> {
    let len = packet.frame_len();
    let kind = parse::frame(packet, walk, len)?;
    if kind != Kind::Fragment || !is_of(entry, first.direction, &walk.frame) {
        return Err(Stop::drop(Reason::FRAGMENT));
    }
    rewrite::check_ttl(&walk.frame)?;
    walk.hit.set(first.id, first.direction, entry);
    walk.hit.hop.kind = HopKind::DIRECT;
    let Walk { frame, hit, .. } = walk;
    if translate::is_due(frame, &hit.rewrite) {
        return translate::headers(packet, walk);
    }
    rewrite::network(packet, frame, &hit.rewrite, true)
}

/// A later fragment whose packet's first has not passed.
#[inline(always)]
fn without_first<T: Tables>(tables: &T, settings: &Settings, walk: &Walk) -> Reason {
    if !matches!(walk.frame.key.protocol as u8, PROTOCOL_TCP | PROTOCOL_UDP) {
        return Reason::UNSUPPORTED_PROTOCOL;
    }
    if !admission::is_own(tables, settings, walk.frame.key.destination.copied()) {
        return Reason::NOT_OURS;
    }
    Reason::FRAGMENT_HELD
}

/// What becomes of a fragment that could not be followed.
#[inline(always)]
pub fn stop<P: Packet, E: Env>(packet: &mut P, env: &mut E, walk: &Walk, reason: Reason) -> Stop {
    match reason {
        Reason::UNSUPPORTED_PROTOCOL | Reason::NOT_OURS => Stop::pass(reason),
        // In tcx the kernel may have the packet in pieces.
        Reason::FRAGMENT_HELD if env.hook() != Hook::Tcx && env.hold(packet, walk, HeldKind::EARLY) => {
            Stop::drop(reason)
        }
        _ => Stop::drop(Reason::FRAGMENT),
    }
}

/// A packet that an IPv4 sender lets routers cut, and that is too large now that it is IPv6: the agent cuts it
/// (RFC 7915 §4).
#[inline(always)]
pub fn cut<P: Packet, E: Env>(packet: &mut P, env: &mut E, walk: &Walk) -> Outcome {
    let reason = if env.hold(packet, walk, HeldKind::TOO_LARGE) {
        Reason::FRAGMENTED
    } else {
        Reason::UNTRANSLATABLE
    };
    Stop::drop(reason).0
}
