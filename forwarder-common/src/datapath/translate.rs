//! From one family to the other: a new IP header in place of the old one (RFC 7915 §4.1, §5.1).
//!
//! Addresses come from the flow, not from a prefix (RFC 6052): client and backend never see the other's family. Options
//! and extension headers are left out, as the standard wants. Ports and transport checksum are right before: an address
//! and its mapped form have the same sum.
//!
//! Not translated: fragments, whose headers differ too much, and ICMP errors, so that path MTU discovery between
//! families rests on the segment sizes that are clamped, and on what the gateway itself reports.

use super::{
    ChecksumOffload, Packet, Stop, Walk,
    fragment::part,
    parse::Frame,
    rewrite::{self, Rewrite},
    transport_checksum,
};
use crate::{
    abi::{flow::HopKind, reason::Reason},
    wire::{
        Be16, Be32, Field16, WireHeader, checksum,
        ethernet::EthernetHeader,
        icmp::IcmpHeader,
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_UDP},
        ipv6::{Ipv6Header, PROTOCOL_ICMPV6},
        sctp::SctpHeader,
        udp::{self, CHECKSUM_NONE},
    },
};

/// By how much the header of IPv6 is longer than that of IPv4 without options.
pub const DIFFERENCE: u32 = (Ipv6Header::LEN - Ipv4Header::LEN) as u32;
/// RFC 7915 §5.1: what is no larger may be fragmented behind the gateway, as no IPv6 node sends less.
const FRAGMENTABLE: u32 = 1260;

/// Does the packet leave in the other family?
#[inline(always)]
pub const fn is_due(frame: &Frame, rewrite: &Rewrite) -> bool {
    frame.is_v4() != rewrite.destination.is_v4()
}

/// Can the packet leave in the other family?
///
/// # Errors
/// Drops fragments.
#[inline(always)]
pub const fn check(walk: &Walk) -> Result<(), Stop> {
    if is_due(&walk.frame, &walk.hit.rewrite) && walk.frame.fragment != part::WHOLE {
        return Err(Stop::drop(Reason::UNTRANSLATABLE));
    }
    Ok(())
}

/// Length of the packet as it leaves, without options and extension headers where it is translated.
#[inline(always)]
pub const fn len_then(walk: &Walk) -> u32 {
    let (frame, rewrite) = (&walk.frame, &walk.hit.rewrite);
    if !is_due(frame, rewrite) {
        return frame.total_len;
    }
    frame.transport_len + header_len(rewrite.destination.is_v4())
}

#[inline(always)]
const fn header_len(is_v4: bool) -> u32 {
    if is_v4 {
        Ipv4Header::LEN as u32
    } else {
        Ipv6Header::LEN as u32
    }
}

/// The number that stands in an IP header of this family for a flow's protocol: both have their own ICMP.
#[inline(always)]
pub const fn protocol_number(protocol: u32, is_v4: bool) -> u8 {
    if protocol == PROTOCOL_ICMP as u32 && !is_v4 {
        PROTOCOL_ICMPV6
    } else {
        protocol as u8
    }
}

/// Replaces the IP header; the walk's frame then says where things are now. Transport header and checksum are those of
/// the packet that leaves, but for a datagram without a checksum, which gets one if IPv6 asks for it (RFC 7915 §4.5).
#[inline(always)]
pub fn header<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk { frame, hit, .. } = walk;
    let rewrite = &hit.rewrite;
    let is_sent = hit.hop.kind == HopKind::DIRECT;
    let is_v4 = rewrite.destination.is_v4();
    if !is_v4 {
        complete(packet, frame, rewrite)?;
    }
    let distinct = distinct_word(packet, frame)?;
    let link = match P::CHECKSUM_OFFLOAD {
        // The kernel looks after it.
        ChecksumOffload::Kernel => None,
        _ => Some(packet.header::<EthernetHeader>(0)?.link),
    };
    frame.transport_offset = packet.resize_network(frame, is_v4)?;
    frame.network_offset = frame.transport_offset - header_len(is_v4);
    frame.total_len = frame.transport_len + header_len(is_v4);
    let protocol = protocol_number(frame.key.protocol, is_v4);
    let ttl = frame.ttl - u8::from(is_sent);
    frame.key.source = rewrite.source.copied();
    frame.key.destination = rewrite.destination.copied();
    let offset = frame.network_offset as usize;
    if is_v4 {
        let ip = packet.header::<Ipv4Header>(offset)?;
        *ip = Ipv4Header::fresh(
            protocol,
            ttl,
            frame.total_len as u16,
            rewrite.source.low(),
            rewrite.destination.low(),
        );
        ip.tos = frame.tos;
        if frame.total_len <= FRAGMENTABLE {
            ip.fragment = Be16::new(0);
            ip.identification = distinct;
        }
        ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        ip.version_class_flow = Be32::new(6 << 28 | (frame.tos as u32) << 20);
        ip.payload_len = Be16::new(frame.transport_len as u16);
        ip.next_header = protocol;
        ip.hop_limit = ttl;
        ip.set_addresses(&rewrite.source, &rewrite.destination);
    }
    // What is sent gets its link header later; the stack wants one before the header that it reads.
    match link {
        Some(link) if !is_sent => rewrite::relink(packet, frame, link),
        _ => Ok(()),
    }
}

/// A word that differs between packets of a flow, for want of an identification (RFC 7915 §5.1): the transport
/// checksum, which covers sequence numbers and payload.
#[inline(always)]
fn distinct_word<P: Packet>(packet: &mut P, frame: &Frame) -> Result<Be16, Stop> {
    let offset = match frame.key.protocol as u8 {
        PROTOCOL_ICMP => frame.transport_offset as usize + IcmpHeader::CHECKSUM_OFFSET,
        PROTOCOL_SCTP => frame.transport_offset as usize + SctpHeader::CHECKSUM_OFFSET,
        _ => transport_checksum::field_offset(frame),
    };
    Ok(packet.header::<Field16>(offset)?.value)
}

/// Gives a datagram without a checksum one.
#[inline(always)]
fn complete<P: Packet>(packet: &mut P, frame: &Frame, rewrite: &Rewrite) -> Result<(), Stop> {
    if frame.key.protocol as u8 != PROTOCOL_UDP {
        return Ok(());
    }
    let offset = transport_checksum::field_offset(frame);
    if { packet.header::<Field16>(offset)?.value } != CHECKSUM_NONE {
        return Ok(());
    }
    if let ChecksumOffload::Kernel = P::CHECKSUM_OFFLOAD {
        return Err(Stop::drop(Reason::UNTRANSLATABLE));
    }
    let sum = packet.sum(frame.transport_offset as usize, frame.transport_len as usize)?;
    let pseudo = checksum::pseudo_header(
        rewrite.source.copied(),
        rewrite.destination.copied(),
        PROTOCOL_UDP,
        frame.transport_len,
    );
    let checksum = checksum::finish(u32::from(checksum::fold(pseudo)) + sum);
    packet.header::<Field16>(offset)?.value = udp::computed(Be16::from_raw(checksum));
    Ok(())
}
