//! An ICMP error, from one family to the other (RFC 7915 §4.2, §4.3, §5.2, §5.3).
//!
//! The message, the packet that it quotes and the header before both become those of the other family; what is left
//! as it stands is the quoted transport header and what follows, but for ports and checksum. So the new headers are
//! written right before that. The message's checksum is updated, not made anew: a wrong one stays wrong.
//!
//! Extensions behind the quote (RFC 4884) are cut off, as their place depends on its length in units that differ.

use super::{
    Packet, Stop, Walk,
    icmp::{self, Quoted},
    rewrite::Rewrite,
    translate::{self, Piece},
};
use crate::{
    abi::reason::Reason,
    wire::{
        Be16, Be32, IpAddress, WireHeader, checksum,
        icmp::{
            CODE_FRAGMENTATION_NEEDED, CODE_HOST_PROHIBITED, CODE_HOST_UNREACHABLE,
            CODE_HOST_UNREACHABLE_FOR_SERVICE, CODE_NETWORK_PROHIBITED, CODE_PORT_UNREACHABLE,
            CODE_PRECEDENCE_CUTOFF, CODE_PROHIBITED, CODE_PROTOCOL_UNREACHABLE, CODE_V6_BEYOND_SCOPE,
            CODE_V6_HOST_UNREACHABLE, CODE_V6_NO_ROUTE, CODE_V6_PORT_UNREACHABLE, CODE_V6_PROHIBITED,
            CODE_V6_UNKNOWN_NEXT_HEADER, IcmpHeader, TYPE_PARAMETER_PROBLEM, TYPE_TIME_EXCEEDED,
            TYPE_UNREACHABLE, TYPE_V6_PARAMETER_PROBLEM, TYPE_V6_TIME_EXCEEDED, TYPE_V6_TOO_BIG,
            TYPE_V6_UNREACHABLE,
        },
        ipv4::{Ipv4Header, PROTOCOL_ICMP},
        ipv6::{FragmentHeader, Ipv6Header, NEXT_FRAGMENT, PROTOCOL_ICMPV6},
    },
};

/// RFC 8200 §5: what every way of IPv6 carries, in bytes.
const LEAST_MTU: u32 = 1280;
/// RFC 792: ports, or an identifier.
const LEAST_QUOTE: u32 = 8;

/// What the header of a quoted packet says that both families have.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct QuotedHeader {
    piece: Piece,
    ttl: u8,
    tos: u8,
    /// What follows the IP header and that of a fragment, in bytes, in the whole packet.
    payload_len: u16,
}

/// Finds what the message becomes and how much of the quote stays; the walk's quote has both then. Only reads.
///
/// # Errors
/// [`Reason::UNTRANSLATABLE`]: the other family does not know of this.
#[inline(always)]
pub fn find<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk {
        frame, hit, quote, ..
    } = walk;
    let to_v4 = hit.rewrite.destination.is_v4();
    let quoted_ip = frame.transport_offset + IcmpHeader::LEN as u32;
    let old_len = quote.transport_offset - quoted_ip;
    let header = read(packet, quoted_ip as usize, to_v4)?;
    let new_len = translate::ip_header_len(to_v4, header.piece.is_fragment);
    let old = *packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    quote.message = if to_v4 {
        in_v4(&old, old_len)?
    } else {
        in_v6(&old, new_len, u32::from(header.payload_len) + old_len)?
    };
    let there = frame.transport_len - IcmpHeader::LEN as u32 - old_len;
    quote.kept_len = kept(&old, to_v4, old_len, there, new_len);
    Ok(())
}

/// Gives the quoted transport header the ports that the message's receiver knows; the walk's quote then has what that
/// changes in the sum of the message.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk {
        frame, hit, quote, ..
    } = walk;
    let to_v4 = hit.rewrite.destination.is_v4();
    let header = read(packet, frame.transport_offset as usize + IcmpHeader::LEN, to_v4)?;
    let quoted = Quoted {
        protocol: hit.protocol as u8,
        offset: quote.transport_offset as usize,
        len: u32::from(header.payload_len),
        end: (quote.transport_offset + quote.kept_len) as usize,
        difference: hit.difference,
    };
    quote.change = icmp::rewrite_transport(packet, frame, &hit.rewrite, quoted)?;
    Ok(())
}

/// Replaces the headers of the message and of what it quotes; the walk's frame then says where things are now.
#[inline(always)]
pub fn apply<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk {
        frame, hit, quote, ..
    } = walk;
    let rewrite = &hit.rewrite;
    let to_v4 = rewrite.destination.is_v4();
    let message = frame.transport_offset;
    let quoted_ip = message + IcmpHeader::LEN as u32;
    let anchor = quote.transport_offset;
    let old_len = anchor - quoted_ip;

    let header = read(packet, quoted_ip as usize, to_v4)?;
    let new_len = translate::ip_header_len(to_v4, header.piece.is_fragment);
    let old = *packet.header::<IcmpHeader>(message as usize)?;
    let there = frame.transport_len - IcmpHeader::LEN as u32 - old_len;
    let (new, kept) = (quote.message, quote.kept_len);
    let cut_at = anchor + kept;
    let tail = if kept < there {
        packet.sum(cut_at as usize, (there - kept) as usize)?
    } else {
        0
    };
    let before = packet.sum(quoted_ip as usize, old_len as usize)?;
    let pseudo_before = pseudo_header(
        to_v4,
        &frame.key.source,
        &frame.key.destination,
        frame.transport_len,
    );
    packet.cut(cut_at as usize)?;
    let link = translate::link(packet)?;
    frame.transport_len = IcmpHeader::LEN as u32 + new_len + kept;

    let len = translate::ip_header_len(to_v4, false) + IcmpHeader::LEN as u32 + new_len;
    let anchor = packet.replace_headers(frame.network_offset, anchor, len, to_v4)?;
    let quoted_ip = anchor - new_len;
    let after = write(packet, quoted_ip as usize, rewrite, hit.protocol, header)?;
    frame.transport_offset = quoted_ip - IcmpHeader::LEN as u32;
    let pseudo_after = pseudo_header(!to_v4, &rewrite.source, &rewrite.destination, frame.transport_len);
    let change = quote
        .change
        .replace_raw(old.type_word(), new.type_word())
        .replace32(old.rest, new.rest)
        .replace_raw(before as u16, after)
        .replace_raw(tail as u16, 0)
        .replace_raw(pseudo_before, pseudo_after);
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    *icmp = new;
    icmp.checksum = change.apply(old.checksum);
    let piece = Piece::whole(icmp.checksum);
    translate::finish(packet, frame, hit, u32::from(PROTOCOL_ICMP), piece, link)
}

/// The folded sum of an ICMP message's pseudo-header, which only that of IPv6 has (RFC 4443 §2.3).
#[inline(always)]
fn pseudo_header(is_v6: bool, source: &IpAddress, destination: &IpAddress, len: u32) -> u16 {
    if is_v6 {
        checksum::fold(checksum::pseudo_header(
            source.copied(),
            destination.copied(),
            PROTOCOL_ICMPV6,
            len,
        ))
    } else {
        0
    }
}

/// Reads the quoted IP header, which is known to be one of the other family than the new one.
#[inline(always)]
fn read<P: Packet>(packet: &mut P, offset: usize, to_v4: bool) -> Result<QuotedHeader, Stop> {
    if !to_v4 {
        let ip = packet.header::<Ipv4Header>(offset)?;
        return Ok(QuotedHeader {
            piece: Piece {
                offset: ip.fragment_of_v6(),
                is_fragment: ip.is_fragment(),
                identification: Be32::new(u32::from(ip.identification.get())),
            },
            ttl: ip.ttl,
            tos: ip.tos,
            payload_len: ip.total_len.get().wrapping_sub(ip.header_len() as u16),
        });
    }
    let ip = packet.header::<Ipv6Header>(offset)?;
    let mut header = QuotedHeader {
        piece: Piece::whole(Be16::ZERO),
        ttl: ip.hop_limit,
        tos: ip.traffic_class(),
        payload_len: ip.payload_len.get(),
    };
    if ip.next_header == NEXT_FRAGMENT {
        let fragment = packet.header::<FragmentHeader>(offset + Ipv6Header::LEN)?;
        header.piece = Piece {
            offset: fragment.offset,
            is_fragment: true,
            identification: fragment.identification,
        };
        header.payload_len = header.payload_len.wrapping_sub(FragmentHeader::LEN as u16);
    }
    Ok(header)
}

/// Writes the quoted IP header anew, crosswise: it went the other way. Its folded sum.
#[inline(always)]
fn write<P: Packet>(
    packet: &mut P,
    offset: usize,
    rewrite: &Rewrite,
    protocol: u32,
    header: QuotedHeader,
) -> Result<u16, Stop> {
    let (source, destination) = (&rewrite.destination, &rewrite.source);
    let to_v4 = source.is_v4();
    let protocol = translate::protocol_number(protocol, to_v4);
    let piece = header.piece;
    if to_v4 {
        let ip = packet.header::<Ipv4Header>(offset)?;
        let total_len = header.payload_len.wrapping_add(Ipv4Header::LEN as u16);
        *ip = Ipv4Header::fresh(protocol, header.ttl, total_len, source.low(), destination.low());
        ip.tos = header.tos;
        if piece.is_fragment {
            ip.set_fragment_of_v6(piece.offset);
            ip.identification = Be16::new(piece.identification.get() as u16);
        }
        ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
        // A header with its checksum sums up to all ones, which is zero.
        return Ok(0);
    }
    let fragment_len = if piece.is_fragment {
        FragmentHeader::LEN as u16
    } else {
        0
    };
    let next_header = if piece.is_fragment {
        NEXT_FRAGMENT
    } else {
        protocol
    };
    let ip = packet.header::<Ipv6Header>(offset)?;
    ip.version_class_flow = Be32::new(6 << 28 | u32::from(header.tos) << 20);
    ip.payload_len = Be16::new(header.payload_len.wrapping_add(fragment_len));
    ip.next_header = next_header;
    ip.hop_limit = header.ttl;
    ip.set_addresses(source, destination);
    let mut len = Ipv6Header::LEN;
    if piece.is_fragment {
        translate::write_fragment_header(packet, offset + len, protocol, piece)?;
        len += FragmentHeader::LEN;
    }
    Ok(packet.sum(offset, len)? as u16)
}

/// How many bytes behind the quoted IP header stay, of those that are there: all, or what the message says that the
/// quote has (RFC 4884 §3), and no more than an error of IPv6 may have. Even, unless all stay.
#[inline(always)]
const fn kept(old: &IcmpHeader, to_v4: bool, old_len: u32, there: u32, new_len: u32) -> u32 {
    let rest = old.rest.get();
    // RFC 4884 §4: in IPv4 words of 32 bits, in IPv6 of 64; zero: the quote ends with the message.
    let claimed = match (to_v4, old.icmp_type) {
        (true, TYPE_V6_UNREACHABLE | TYPE_V6_TIME_EXCEEDED) => (rest >> 24) * 8,
        (false, _) => (rest >> 16 & 0xff) * 4,
        _ => 0,
    };
    let mut kept = there;
    if claimed > old_len + LEAST_QUOTE && claimed - old_len < kept {
        kept = (claimed - old_len) & !1;
    }
    let most = translate::MOST_OF_ERROR - (Ipv6Header::LEN + IcmpHeader::LEN) as u32 - new_len;
    if !to_v4 && kept > most {
        kept = most & !1;
    }
    kept
}

/// The message of IPv4 (RFC 7915 §5.2). `quoted_len`: of the quoted IPv6 header, in bytes.
///
/// # Errors
/// [`Reason::UNTRANSLATABLE`] where there is none.
#[inline(always)]
fn in_v4(old: &IcmpHeader, quoted_len: u32) -> Result<IcmpHeader, Stop> {
    let rest = old.rest.get();
    let (icmp_type, code, rest) = match (old.icmp_type, old.code) {
        (TYPE_V6_UNREACHABLE, CODE_V6_NO_ROUTE | CODE_V6_BEYOND_SCOPE | CODE_V6_HOST_UNREACHABLE) => {
            (TYPE_UNREACHABLE, CODE_HOST_UNREACHABLE, 0)
        }
        (TYPE_V6_UNREACHABLE, CODE_V6_PROHIBITED) => (TYPE_UNREACHABLE, CODE_HOST_PROHIBITED, 0),
        (TYPE_V6_UNREACHABLE, CODE_V6_PORT_UNREACHABLE) => (TYPE_UNREACHABLE, CODE_PORT_UNREACHABLE, 0),
        (TYPE_V6_TOO_BIG, _) => {
            let mtu_bytes = rest.saturating_sub(quoted_len - Ipv4Header::LEN as u32);
            (
                TYPE_UNREACHABLE,
                CODE_FRAGMENTATION_NEEDED,
                mtu_bytes.min(u32::from(u16::MAX)),
            )
        }
        (TYPE_V6_TIME_EXCEEDED, code) => (TYPE_TIME_EXCEEDED, code, 0),
        (TYPE_V6_PARAMETER_PROBLEM, 0) => (TYPE_PARAMETER_PROBLEM, 0, pointer_in_v4(rest)? << 24),
        (TYPE_V6_PARAMETER_PROBLEM, CODE_V6_UNKNOWN_NEXT_HEADER) => {
            (TYPE_UNREACHABLE, CODE_PROTOCOL_UNREACHABLE, 0)
        }
        _ => return Err(Stop::drop(Reason::UNTRANSLATABLE)),
    };
    Ok(IcmpHeader {
        rest: Be32::new(rest),
        ..IcmpHeader::of_type(icmp_type, code)
    })
}

/// The message of IPv6 (RFC 7915 §4.2). `quoted_len`: of the new quoted header; `total_len`: of the packet quoted; both
/// in bytes.
///
/// # Errors
/// [`Reason::UNTRANSLATABLE`] where there is none.
#[inline(always)]
fn in_v6(old: &IcmpHeader, quoted_len: u32, total_len: u32) -> Result<IcmpHeader, Stop> {
    let rest = old.rest.get();
    let (icmp_type, code, rest) = match (old.icmp_type, old.code) {
        (TYPE_UNREACHABLE, CODE_PROTOCOL_UNREACHABLE) => (
            TYPE_V6_PARAMETER_PROBLEM,
            CODE_V6_UNKNOWN_NEXT_HEADER,
            Ipv6Header::NEXT_HEADER_OFFSET,
        ),
        (TYPE_UNREACHABLE, CODE_PORT_UNREACHABLE) => (TYPE_V6_UNREACHABLE, CODE_V6_PORT_UNREACHABLE, 0),
        (TYPE_UNREACHABLE, CODE_FRAGMENTATION_NEEDED) => {
            let mtu_bytes = match rest & 0xffff {
                0 => plateau(total_len),
                mtu_bytes => mtu_bytes,
            };
            let mtu_bytes = mtu_bytes + quoted_len - Ipv4Header::LEN as u32;
            (TYPE_V6_TOO_BIG, 0, mtu_bytes.max(LEAST_MTU))
        }
        (
            TYPE_UNREACHABLE,
            CODE_NETWORK_PROHIBITED | CODE_HOST_PROHIBITED | CODE_PROHIBITED | CODE_PRECEDENCE_CUTOFF,
        ) => (TYPE_V6_UNREACHABLE, CODE_V6_PROHIBITED, 0),
        (TYPE_UNREACHABLE, 0..=CODE_HOST_UNREACHABLE_FOR_SERVICE) => {
            (TYPE_V6_UNREACHABLE, CODE_V6_NO_ROUTE, 0)
        }
        (TYPE_TIME_EXCEEDED, code) => (TYPE_V6_TIME_EXCEEDED, code, 0),
        // A pointer (RFC 792), or one to a bad length (RFC 1108); code 1 is of an option, which IPv6 does not have.
        (TYPE_PARAMETER_PROBLEM, 0 | 2) => (TYPE_V6_PARAMETER_PROBLEM, 0, pointer_in_v6(rest >> 24)?),
        _ => return Err(Stop::drop(Reason::UNTRANSLATABLE)),
    };
    Ok(IcmpHeader {
        rest: Be32::new(rest),
        ..IcmpHeader::of_type(icmp_type, code)
    })
}

/// The largest size below this one that links have (RFC 1191 §7.1), for routers that do not say theirs; of sizes that
/// every way of IPv6 carries, any.
#[inline(always)]
const fn plateau(total_len: u32) -> u32 {
    match total_len {
        32_001.. => 32_000,
        17_915.. => 17_914,
        8_167.. => 8_166,
        4_353.. => 4_352,
        2_003.. => 2_002,
        1_493.. => 1_492,
        _ => LEAST_MTU - translate::DIFFERENCE,
    }
}

/// Which byte of an IPv4 header says what a byte of IPv6's does (RFC 7915 §5.2, figure 6).
#[inline(always)]
fn pointer_in_v4(pointer: u32) -> Result<u32, Stop> {
    match pointer {
        0 | 1 => Ok(pointer),
        4 | 5 => Ok(2),
        6 => Ok(9),
        7 => Ok(8),
        8..24 => Ok(12),
        24..40 => Ok(16),
        _ => Err(Stop::drop(Reason::UNTRANSLATABLE)),
    }
}

/// Which byte of an IPv6 header says what a byte of IPv4's does (RFC 7915 §4.2, figure 3).
#[inline(always)]
fn pointer_in_v6(pointer: u32) -> Result<u32, Stop> {
    match pointer {
        0 | 1 => Ok(pointer),
        2 | 3 => Ok(4),
        8 => Ok(7),
        9 => Ok(6),
        12..16 => Ok(8),
        16..20 => Ok(24),
        _ => Err(Stop::drop(Reason::UNTRANSLATABLE)),
    }
}
