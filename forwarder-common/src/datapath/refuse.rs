//! Answers a packet that may not open a flow, so that its client knows at once instead of waiting for minutes.
//!
//! TCP gets a reset (RFC 9293 §3.5.2, group 1): the SYN itself, turned round. Its options and data stay, which no
//! receiver reads in a reset, so no length changes and the checksum is updated, whoever was to compute it. UDP gets
//! ICMP "port unreachable" (RFC 792, RFC 1122 §4.1.3.1), which sockets report as "connection refused".
//!
//! An answer is never longer than what an Ethernet frame takes anyway and goes where the packet came from, one for
//! one: nothing to amplify. Not answered, but dropped: UDP with IP options, UDP in tcx, where the kernel may still owe
//! the checksum of what would be quoted, and UDP whose checksum is partial.

use super::{
    ChecksumOffload, Outcome, Packet, Stop, Verdict,
    parse::{Frame, NETWORK_OFFSET},
    rewrite::Rewrite,
    transport_checksum::{self, State},
};
use crate::{
    abi::{reason::Reason, settings::Settings},
    wire::{
        Be16, Be32, WireHeader,
        checksum::{self, Delta},
        ethernet::{ETHERTYPE_IPV4, EthernetHeader},
        icmp::{CODE_PORT_UNREACHABLE, IcmpHeader, TYPE_UNREACHABLE},
        ipv4::{Ipv4Header, PROTOCOL_ICMP},
        tcp::{FLAG_ACK, FLAG_RST, TcpHeader},
        udp::UdpHeader,
    },
};

/// RFC 1122 §3.2.1.7: a fresh TTL, as the answer is a packet of its own.
const ANSWER_TTL: u8 = 64;

/// What an ICMP message quotes (RFC 792: the header and 8 bytes of what follows).
#[repr(C, packed)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Quote {
    ip: Ipv4Header,
    udp: UdpHeader,
}

impl WireHeader for Quote {}

/// What stands before the quote.
const FRONT: usize = Ipv4Header::LEN + IcmpHeader::LEN;

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
        unreachable(packet, frame, settings)
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
    let tcp = packet.header::<TcpHeader>(frame.transport_offset)?;
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
    let rewrite = Rewrite::of_transport(delta);
    transport_checksum::update(packet, frame, &rewrite, state, true)?;

    let ip = packet.header::<Ipv4Header>(NETWORK_OFFSET)?;
    let before = ip.ttl_word();
    ip.ttl = ANSWER_TTL;
    ip.checksum = Delta::ZERO.replace_raw(before, ip.ttl_word()).apply(ip.checksum);
    (ip.source, ip.destination) = (ip.destination, ip.source);

    let ethernet = packet.header::<EthernetHeader>(0)?;
    ethernet.link = { ethernet.link }.swapped();
    Ok(())
}

/// A UDP packet becomes the ICMP message that quotes it.
#[inline(always)]
fn unreachable<P: Packet>(packet: &mut P, frame: &Frame, settings: &Settings) -> Result<(), Stop> {
    let none = Stop::drop(Reason::INTERNAL);
    let has_options = frame.transport_offset != NETWORK_OFFSET + Ipv4Header::LEN;
    if has_options || matches!(P::CHECKSUM_OFFLOAD, ChecksumOffload::Kernel) {
        return Err(none);
    }
    if let State::Partial { .. } = transport_checksum::state(packet, frame, settings)? {
        return Err(none);
    }
    let link = { packet.header::<EthernetHeader>(0)?.link }.swapped();
    packet.cut_and_grow(NETWORK_OFFSET + Quote::LEN, FRONT)?;

    *packet.header::<EthernetHeader>(0)? = EthernetHeader {
        link,
        ethertype: ETHERTYPE_IPV4,
    };
    let quote = packet.header::<Quote>(NETWORK_OFFSET + FRONT)?;
    let quoted = checksum::fold(checksum::sum_bytes(bytemuck::bytes_of(quote)));
    let (vip, client) = (quote.ip.destination, quote.ip.source);

    let icmp = packet.header::<IcmpHeader>(NETWORK_OFFSET + Ipv4Header::LEN)?;
    *icmp = IcmpHeader::of_type(TYPE_UNREACHABLE, CODE_PORT_UNREACHABLE);
    icmp.checksum = Be16::from_raw(checksum::finish(u32::from(icmp.type_word()) + u32::from(quoted)));

    let ip = packet.header::<Ipv4Header>(NETWORK_OFFSET)?;
    *ip = Ipv4Header::fresh(
        PROTOCOL_ICMP,
        ANSWER_TTL,
        (FRONT + Quote::LEN) as u16,
        vip,
        client,
    );
    ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
    Ok(())
}
