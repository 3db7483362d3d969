//! From one family to the other: new headers in place of the old ones (RFC 7915 §4.1, §5.1).
//!
//! Addresses come from the flow, not from a prefix (RFC 6052): client and backend never see the other's family. Options
//! and extension headers are left out, as the standard wants, but for those of fragments. Ports and transport checksum
//! are right before: an address and its mapped form have the same sum.
//!
//! What IPv4 lets routers cut, and does not fit as IPv6, the agent cuts: see `next_hop::fit`. ICMP errors are translated
//! by `translate_error`.

use super::{
    ChecksumOffload, Packet, Stop, Walk,
    flow::Hit,
    fragment::part,
    parse::Frame,
    rewrite::{self, Rewrite},
    translate_error, transport_checksum,
};
use crate::{
    abi::{flow::HopKind, reason::Reason},
    wire::{
        Be16, Be32, Field16, LinkPair, WireHeader, checksum,
        ethernet::EthernetHeader,
        icmp::IcmpHeader,
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_UDP},
        ipv6::{FragmentHeader, Ipv6Header, NEXT_FRAGMENT, PROTOCOL_ICMPV6},
        sctp::SctpHeader,
        udp::{self, CHECKSUM_NONE, UdpHeader},
    },
};

/// By how much the header of IPv6 is longer than that of IPv4 without options.
pub const DIFFERENCE: u32 = (Ipv6Header::LEN - Ipv4Header::LEN) as u32;
/// RFC 7915 §5.1: what is no larger may be fragmented behind the gateway, as no IPv6 node sends less.
const FRAGMENTABLE: u32 = 1260;
/// What the kernel's adapter sums: a jumbo frame (`Packet::sum`).
const MOST_SUMMED: u32 = 9000;
/// RFC 4443 §2.4 (c): an ICMP error of IPv6 has at most so many bytes.
pub(super) const MOST_OF_ERROR: u32 = 1280;

/// Does the packet leave in the other family?
#[inline(always)]
pub const fn is_due(frame: &Frame, rewrite: &Rewrite) -> bool {
    frame.is_v4() != rewrite.destination.is_v4()
}

/// Can the packet leave in the other family?
///
/// # Errors
/// A drop for an ICMP error that the other family has no equal of, and for a datagram without a checksum that needs one
/// and is not all there (RFC 7915 §4.5), of which the kernel has put several together, or which is too long to sum.
#[inline(always)]
pub fn check<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    if !is_due(&walk.frame, &walk.hit.rewrite) {
        return Ok(());
    }
    if walk.quote.is_some() {
        return packet.find_equal_error(walk);
    }
    let is_in_parts = walk.frame.fragment == part::FIRST || packet.segment_size() != 0;
    let is_too_long = walk.frame.transport_len > MOST_SUMMED;
    if (is_in_parts || is_too_long) && lacks_checksum(packet, &walk.frame)? {
        return Err(Stop::drop(Reason::UNTRANSLATABLE));
    }
    Ok(())
}

/// Length of the packet as it leaves, without options and extension headers where it is translated; of an ICMP error
/// then, the most that it may be.
#[inline(always)]
pub const fn len_then(walk: &Walk) -> u32 {
    let (frame, rewrite) = (&walk.frame, &walk.hit.rewrite);
    if !is_due(frame, rewrite) {
        return frame.total_len;
    }
    let len = frame.transport_len + header_len(rewrite.destination.is_v4(), frame);
    if walk.quote.is_some() && len > MOST_OF_ERROR {
        return MOST_OF_ERROR;
    }
    len
}

/// Length of the IP header that a packet gets in this family.
#[inline(always)]
pub(super) const fn header_len(to_v4: bool, frame: &Frame) -> u32 {
    ip_header_len(to_v4, frame.fragment != part::WHOLE)
}

/// Length of an IP header without options but, in IPv6, that of fragments.
#[inline(always)]
pub(super) const fn ip_header_len(is_v4: bool, is_fragment: bool) -> u32 {
    if is_v4 {
        Ipv4Header::LEN as u32
    } else if is_fragment {
        (Ipv6Header::LEN + FragmentHeader::LEN) as u32
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

/// Makes the packet, whose transport header is rewritten, one of the other family.
#[inline(always)]
pub fn apply<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    if walk.quote.is_some() {
        translate_error::apply(packet, walk)
    } else {
        headers(packet, walk)
    }
}

/// Which part of a packet another one is.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    /// RFC 8200 §4.5: the offset and whether more follow, as in a fragment header.
    pub offset: Be16,
    pub is_fragment: bool,
    pub identification: Be32,
}

impl Piece {
    /// Which part the frame is. A whole one gets an identification that differs between packets of a flow, as small
    /// ones may be fragmented in IPv4 (RFC 7915 §5.1): its transport checksum, which covers sequence numbers and payload.
    #[inline(always)]
    fn of<P: Packet>(packet: &mut P, frame: &Frame) -> Result<Self, Stop> {
        if frame.fragment == part::WHOLE {
            let offset = match frame.key.protocol as u8 {
                PROTOCOL_ICMP => frame.transport_offset as usize + IcmpHeader::CHECKSUM_OFFSET,
                PROTOCOL_SCTP => frame.transport_offset as usize + SctpHeader::CHECKSUM_OFFSET,
                _ => transport_checksum::field_offset(frame),
            };
            return Ok(Self::whole(packet.header::<Field16>(offset)?.value));
        }
        let offset = if frame.is_v4() {
            packet
                .header::<Ipv4Header>(frame.network_offset as usize)?
                .fragment_of_v6()
        } else {
            // The last header before what is cut.
            packet
                .header::<FragmentHeader>(frame.transport_offset as usize - FragmentHeader::LEN)?
                .offset
        };
        Ok(Self {
            offset,
            is_fragment: true,
            identification: frame.identification,
        })
    }

    /// All of a packet, told apart by this number.
    #[inline(always)]
    pub(super) const fn whole(identification: Be16) -> Self {
        Self {
            offset: Be16::ZERO,
            is_fragment: false,
            identification: Be32::new(identification.get() as u32),
        }
    }
}

/// Replaces the headers of IP; the walk's frame then says where things are now. Transport header and checksum are those
/// of the packet that leaves, but for a datagram without a checksum, which gets one if IPv6 asks for it (RFC 7915 §4.5).
#[inline(always)]
pub(super) fn headers<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk { frame, hit, .. } = walk;
    let to_v4 = hit.rewrite.destination.is_v4();
    if !to_v4 {
        complete(packet, frame, &hit.rewrite)?;
    }
    let piece = Piece::of(packet, frame)?;
    let link = link(packet)?;
    let len = header_len(to_v4, frame);
    frame.transport_offset =
        packet.replace_headers(frame.network_offset, frame.transport_offset, len, to_v4)?;
    finish(packet, frame, hit, hit.protocol, piece, link)
}

/// The link header; without a meaning where the kernel looks after it.
#[inline(always)]
pub(super) fn link<P: Packet>(packet: &mut P) -> Result<LinkPair, Stop> {
    match P::CHECKSUM_OFFLOAD {
        ChecksumOffload::Kernel => Ok(LinkPair::default()),
        _ => Ok(packet.header::<EthernetHeader>(0)?.link),
    }
}

/// Writes the IP header before the transport header, which is of this protocol (of both families' ICMP, IPv4's), and
/// the link header where the stack wants one; in the frame, where these are and how long the packet is.
#[inline(always)]
pub(super) fn finish<P: Packet>(
    packet: &mut P,
    frame: &mut Frame,
    hit: &Hit,
    protocol: u32,
    piece: Piece,
    link: LinkPair,
) -> Result<(), Stop> {
    let rewrite = &hit.rewrite;
    let is_sent = hit.hop.kind == HopKind::DIRECT;
    let to_v4 = rewrite.destination.is_v4();
    let len = ip_header_len(to_v4, piece.is_fragment);
    frame.network_offset = frame.transport_offset - len;
    frame.total_len = frame.transport_len + len;
    frame.key.source = rewrite.source.copied();
    frame.key.destination = rewrite.destination.copied();
    let protocol = protocol_number(protocol, to_v4);
    let ttl = frame.ttl - u8::from(is_sent);
    let offset = frame.network_offset as usize;
    if to_v4 {
        let ip = packet.header::<Ipv4Header>(offset)?;
        *ip = Ipv4Header::fresh(
            protocol,
            ttl,
            frame.total_len as u16,
            rewrite.source.low(),
            rewrite.destination.low(),
        );
        ip.tos = frame.tos;
        if piece.is_fragment || frame.total_len <= FRAGMENTABLE {
            ip.set_fragment_of_v6(piece.offset);
            ip.identification = Be16::new(piece.identification.get() as u16);
        }
        ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        ip.version_class_flow = Be32::new(6 << 28 | (frame.tos as u32) << 20);
        ip.payload_len = Be16::new((frame.total_len - Ipv6Header::LEN as u32) as u16);
        ip.next_header = if piece.is_fragment {
            NEXT_FRAGMENT
        } else {
            protocol
        };
        ip.hop_limit = ttl;
        ip.set_addresses(&rewrite.source, &rewrite.destination);
        if piece.is_fragment {
            write_fragment_header(packet, offset + Ipv6Header::LEN, protocol, piece)?;
        }
    }
    // What is sent gets its link header later; the stack wants one before the header that it reads.
    match P::CHECKSUM_OFFLOAD {
        ChecksumOffload::Kernel => Ok(()),
        _ if is_sent => Ok(()),
        _ => rewrite::relink(packet, frame, link),
    }
}

/// Writes a fragment header.
#[inline(always)]
pub(super) fn write_fragment_header<P: Packet>(
    packet: &mut P,
    offset: usize,
    protocol: u8,
    piece: Piece,
) -> Result<(), Stop> {
    *packet.header::<FragmentHeader>(offset)? = FragmentHeader {
        next_header: protocol,
        reserved: 0,
        offset: piece.offset,
        identification: piece.identification,
    };
    Ok(())
}

/// Is it a datagram without a checksum? Only IPv4 has such.
#[inline(always)]
fn lacks_checksum<P: Packet>(packet: &mut P, frame: &Frame) -> Result<bool, Stop> {
    if frame.key.protocol as u8 != PROTOCOL_UDP || frame.fragment == part::LATER {
        return Ok(false);
    }
    let offset = transport_checksum::field_offset(frame);
    let checksum = packet.header::<Field16>(offset)?.value;
    Ok(checksum == CHECKSUM_NONE)
}

/// Gives a datagram without a checksum one.
#[inline(always)]
fn complete<P: Packet>(packet: &mut P, frame: &Frame, rewrite: &Rewrite) -> Result<(), Stop> {
    if !lacks_checksum(packet, frame)? {
        return Ok(());
    }
    let offset = transport_checksum::field_offset(frame);
    // The datagram may end before the IP packet does; what is between is not under its checksum (RFC 768).
    let len = packet
        .header::<UdpHeader>(frame.transport_offset as usize)?
        .len
        .get();
    let sum = packet.sum(frame.transport_offset as usize, len as usize)?;
    let pseudo = checksum::pseudo_header(
        rewrite.source.copied(),
        rewrite.destination.copied(),
        PROTOCOL_UDP,
        len as u32,
    );
    let checksum = checksum::finish(u32::from(checksum::fold(pseudo)) + sum);
    packet.header::<Field16>(offset)?.value = udp::computed(Be16::from_raw(checksum));
    Ok(())
}
