//! Answers a packet that goes no further, so that its sender knows at once instead of waiting for minutes.
//!
//! What may not open a flow: of TCP it gets a reset (RFC 9293 §3.5.2, group 1): the SYN itself, turned round. Its
//! options and data stay, which no receiver reads in a reset, so no length changes and the checksum is updated, whoever
//! was to compute it. Of SCTP it gets an ABORT. Of UDP it gets ICMP "port unreachable", which sockets report as
//! "connection refused", and an echo request "host unreachable".
//!
//! A packet whose time to live has ended, or that does not fit, gets its ICMP message. Where there can be none
//! (`icmp_error`), it is dropped.

use super::{
    ANSWER_TTL, Outcome, Packet, Stop, Tables, Verdict, Walk, echo,
    fragment::part,
    handshake,
    icmp_error::{self, Message},
    parse::Frame,
    sctp, translate,
    transport_checksum::{self, Change},
};
use crate::{
    abi::{reason::Reason, settings::Settings},
    wire::{
        Be16, Be32, WireHeader,
        checksum::Delta,
        ipv4::{Ipv4Header, PROTOCOL_ICMP},
        tcp::{FLAG_ACK, FLAG_RST, FLAG_SYN, TcpHeader},
    },
};

/// Turns a packet that was refused into the answer to its sender: what becomes of it.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &Walk,
    reason: Reason,
) -> Outcome {
    let frame = &walk.frame;
    let message = match reason {
        Reason::TTL_EXCEEDED => Message::TIME_EXCEEDED,
        Reason::TOO_BIG => Message::too_big(fitting(walk)),
        _ if frame.key.protocol == u32::from(PROTOCOL_ICMP) => Message::HOST_UNREACHABLE,
        _ => Message::PORT_UNREACHABLE,
    };
    let answered = if frame.fragment == part::LATER || walk.quote.is_some() {
        // RFC 1122 §3.2.2: no errors about fragments but the first, nor about errors.
        Err(Stop::drop(reason))
    } else if reason.is_flow_refusal() && frame.is_tcp() {
        reset(packet, frame, settings)
    } else if reason.is_flow_refusal() && frame.is_sctp() {
        sctp::abort(packet, frame, settings)
    } else {
        icmp_error::answer(packet, tables, settings, frame, message)
    };
    let verdict = if answered.is_ok() {
        Verdict::TRANSMIT
    } else {
        Verdict::DROP
    };
    Outcome { verdict, reason }
}

/// The size that fits, in the sender's family.
#[inline(always)]
fn fitting(walk: &Walk) -> u16 {
    let mtu_bytes = walk.hit.hop.mtu_bytes;
    let difference = (translate::header_len(false, &walk.frame) - Ipv4Header::LEN as u32) as u16;
    match (walk.frame.is_v4(), walk.hit.rewrite.destination.is_v4()) {
        (true, false) => mtu_bytes.saturating_sub(difference),
        (false, true) => mtu_bytes.saturating_add(translate::DIFFERENCE as u16),
        _ => mtu_bytes,
    }
}

/// A SYN becomes the reset that answers it; so does what brings a SYN cookie back (RFC 9293 §3.10.7.4: with the number
/// that it acknowledges).
#[inline(always)]
fn reset<P: Packet>(packet: &mut P, frame: &Frame, settings: &Settings) -> Result<(), Stop> {
    let state = transport_checksum::state(packet, frame, settings)?;
    let tcp = packet.header::<TcpHeader>(frame.transport_offset as usize)?;
    let before = *tcp;
    (tcp.source_port, tcp.destination_port) = (before.destination_port, before.source_port);
    tcp.sequence = if handshake::is_opening(frame) {
        before.acknowledgment
    } else {
        Be32::new(0)
    };
    // The SYN takes one number; data behind it (RFC 7413) need not be acknowledged to reset the connection.
    let taken = u32::from(before.flags & FLAG_SYN != 0);
    tcp.acknowledgment = Be32::new({ before.sequence }.get().wrapping_add(taken));
    tcp.flags = FLAG_RST | FLAG_ACK;
    tcp.window = Be16::new(0);
    // Swapped ports and addresses leave the sum as it is.
    let delta = Delta::ZERO
        .replace32(before.sequence, tcp.sequence)
        .replace32(before.acknowledgment, tcp.acknowledgment)
        .replace_raw(before.flags_word(), tcp.flags_word())
        .replace16(before.window, tcp.window);
    let change = Change {
        addresses: Delta::ZERO,
        words: delta,
    };
    transport_checksum::update(packet, frame, change, state, true)?;

    echo::turn(packet, frame, ANSWER_TTL)
}
