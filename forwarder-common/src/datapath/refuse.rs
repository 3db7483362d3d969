//! Answers a packet that may not open a flow, so that its client knows at once instead of waiting for minutes.
//!
//! TCP gets a reset (RFC 9293 §3.5.2, group 1): the SYN itself, turned round. Its options and data stay, which no
//! receiver reads in a reset, so no length changes and the checksum is updated, whoever was to compute it. UDP gets
//! ICMP "port unreachable", which sockets report as "connection refused"; where there can be none (`icmp_error`), it is
//! dropped.

use super::{
    Outcome, Packet, Stop, Verdict, echo,
    icmp_error::{self, Message},
    parse::Frame,
    transport_checksum::{self, Change},
};
use crate::{
    abi::{reason::Reason, settings::Settings},
    wire::{
        Be16, Be32,
        checksum::Delta,
        tcp::{FLAG_ACK, FLAG_RST, TcpHeader},
    },
};

/// RFC 1122 §3.2.1.7: a fresh TTL, as the answer is a packet of its own.
const ANSWER_TTL: u8 = 64;

/// Turns a packet that was refused into the answer to its sender.
///
/// # Errors
/// A drop for the same reason where there is no answer.
#[inline(always)]
pub fn answer<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    settings: &Settings,
    reason: Reason,
) -> Result<Outcome, Stop> {
    let answered = if frame.is_tcp() {
        reset(packet, frame, settings)
    } else {
        icmp_error::answer(packet, frame, settings, Message::PORT_UNREACHABLE)
    };
    match answered {
        Ok(()) => Ok(Outcome {
            verdict: Verdict::TRANSMIT,
            reason,
        }),
        Err(_) => Err(Stop::drop(reason)),
    }
}

/// A SYN becomes the reset that answers it.
#[inline(always)]
fn reset<P: Packet>(packet: &mut P, frame: &Frame, settings: &Settings) -> Result<(), Stop> {
    let state = transport_checksum::state(packet, frame, settings)?;
    let tcp = packet.header::<TcpHeader>(frame.transport_offset as usize)?;
    let before = *tcp;
    (tcp.source_port, tcp.destination_port) = (before.destination_port, before.source_port);
    tcp.sequence = Be32::new(0);
    // The SYN takes one number; data behind it (RFC 7413) need not be acknowledged to reset the connection.
    tcp.acknowledgment = Be32::new({ before.sequence }.get().wrapping_add(1));
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
