//! ICMP: errors about packets of flows (RFC 792, RFC 4443); echo messages are told apart from them here.
//!
//! An error quotes the packet it is about as its sender saw it, behind the gateway's translation. It goes on to the
//! end that sent that packet, with the quote as that end knows it (RFC 5508 §4.2, RFC 3022 §4.3), and itself
//! addressed like the flow's own packets: a client hears of everything beyond the gateway from the VIP, a backend in
//! full NAT from the SNAT address, since its network may admit no other. In DNAT mode, where the backend sees
//! clients, it sees who reports.
//!
//! So path MTU discovery works through the gateway, and traceroute shows it as a hop.

use bytemuck::{Pod, Zeroable};

use super::{
    Packet, Stop, Tables, Walk,
    echo::{self, Kind},
    flow::{self, Hit},
    handshake,
    parse::Frame,
    rewrite::{self, Ports, Rewrite},
    translate, transport_checksum,
};
use crate::{
    abi::{
        flow::{Direction, FlowKey, HopKind},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        Be32, Field16, Field32, IpAddress, WireHeader,
        checksum::Delta,
        icmp::{
            IcmpHeader, TYPE_PARAMETER_PROBLEM, TYPE_TIME_EXCEEDED, TYPE_UNREACHABLE,
            TYPE_V6_PARAMETER_PROBLEM, TYPE_V6_TIME_EXCEEDED, TYPE_V6_TOO_BIG, TYPE_V6_UNREACHABLE,
        },
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP},
        ipv6::{FragmentHeader, Ipv6Header, NEXT_FRAGMENT, PROTOCOL_ICMPV6},
        sctp::{SctpChecksum, SctpHeader},
        tcp::TcpHeader,
        udp::CHECKSUM_NONE,
    },
};

/// RFC 792: an error quotes at least so many bytes of what follows the IP header: the ports, or the identifier.
const QUOTED: usize = 8;

/// What an ICMP error quotes.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Quote {
    /// Where the quoted transport header starts, in bytes from the frame's start, or [`Self::NONE`].
    pub transport_offset: u32,
    /// Non-zero: the receiver hears of the host that reports.
    pub keeps_sender: u32,
    /// What the message becomes in the other family, without a checksum: by `translate_error::find`, as is the next.
    pub message: IcmpHeader,
    /// How many bytes behind the quoted IP header stay.
    pub kept_len: u32,
    /// What new ports change in the sum of the message: by `translate_error::rewrite`.
    pub change: Delta,
}

impl Quote {
    /// Where the quoted transport header of a packet starts that is no error.
    pub const NONE: u32 = 0;

    /// Is the packet an error?
    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        self.transport_offset != Self::NONE
    }
}

/// Finds the flow that an error is about: the walk gets its hit and the quote. An echo message that is of a flow, or
/// may open one, gets its key.
///
/// # Errors
/// The end of the walk for other messages: an echo request to a VIP is answered.
#[inline(always)]
pub fn find<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let icmp_type = packet
        .header::<IcmpHeader>(walk.frame.transport_offset as usize)?
        .icmp_type;
    if !is_error(icmp_type, walk.frame.is_v4()) {
        return echo::find(packet, tables, settings, walk);
    }
    walk.quote.transport_offset = read_quote(packet, &walk.frame, &mut walk.key)? as u32;
    flow::find(tables, settings, walk)?;
    if walk.hit.by_cookie != 0 && walk.hit.direction == Direction::REQUEST {
        walk.hit.difference = handshake::difference(tables, walk.hit.id);
    }
    // In DNAT mode the backend knows the client, and so may know who reports.
    walk.quote.keeps_sender = u32::from(walk.hit.rewrite.source == walk.key.source);
    Ok(())
}

/// Translates an error and what it quotes.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, walk: &mut Walk) -> Result<(), Stop> {
    let Walk {
        frame, hit, quote, ..
    } = walk;
    let is_sent = hit.hop.kind == HopKind::DIRECT;
    let change = rewrite_quote(packet, frame, hit, quote.transport_offset as usize)?;
    address(frame, &mut hit.rewrite, quote);
    let pseudo = if frame.is_v4() {
        Delta::ZERO
    } else {
        hit.rewrite.addresses
    };
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    icmp.checksum = change.and(pseudo).apply(icmp.checksum);
    rewrite::network(packet, frame, &hit.rewrite, is_sent)
}

#[inline(always)]
const fn is_error(icmp_type: u8, is_v4: bool) -> bool {
    if is_v4 {
        matches!(
            icmp_type,
            TYPE_UNREACHABLE | TYPE_TIME_EXCEEDED | TYPE_PARAMETER_PROBLEM
        )
    } else {
        matches!(
            icmp_type,
            TYPE_V6_UNREACHABLE | TYPE_V6_TOO_BIG | TYPE_V6_TIME_EXCEEDED | TYPE_V6_PARAMETER_PROBLEM
        )
    }
}

/// Reads the packet that an error quotes. `key` becomes the 5-tuple of an answer to it, which is that of the flow's
/// packets in the error's direction. Returns where the quoted transport header starts.
///
/// # Errors
/// Passes what quotes no packet that could be ours.
#[inline(always)]
fn read_quote<P: Packet>(packet: &mut P, frame: &Frame, key: &mut FlowKey) -> Result<usize, Stop> {
    let offset = quote_offset(frame);
    let unread = Stop::pass(Reason::UNSUPPORTED_PROTOCOL);
    let (protocol, header_len) = if frame.is_v4() {
        let ip = packet.header::<Ipv4Header>(offset)?;
        if ip.version() != 4 || ip.header_len() < Ipv4Header::LEN || ip.is_later_fragment() {
            return Err(unread);
        }
        key.source = IpAddress::from_v4(ip.destination);
        key.destination = IpAddress::from_v4(ip.source);
        (ip.protocol, ip.header_len())
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        if ip.version() != 6 {
            return Err(unread);
        }
        key.source = ip.destination();
        key.destination = ip.source();
        if key.source.is_v4() || key.destination.is_v4() {
            return Err(Stop::pass(Reason::MARTIAN));
        }
        let protocol = ip.next_header;
        if protocol == NEXT_FRAGMENT {
            let fragment = packet.header::<FragmentHeader>(offset + Ipv6Header::LEN)?;
            if fragment.is_later() {
                return Err(unread);
            }
            (fragment.next_header, Ipv6Header::LEN + FragmentHeader::LEN)
        } else {
            (protocol, Ipv6Header::LEN)
        }
    };
    let is_echo = is_icmp(protocol, frame.is_v4());
    if !is_echo && !matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP) {
        return Err(unread);
    }
    if IcmpHeader::LEN + header_len + QUOTED > frame.transport_len as usize {
        return Err(Stop::pass(Reason::TRUNCATED));
    }
    let transport_offset = offset + header_len;
    if is_echo {
        let icmp = packet.header::<IcmpHeader>(transport_offset)?;
        // That of the answer.
        let kind = match Kind::of(icmp, frame.is_v4()) {
            Kind::Request => Kind::Reply,
            Kind::Reply => Kind::Request,
            Kind::Other => return Err(unread),
        };
        echo::set_key(key, kind, icmp.identifier());
    } else {
        let ports = packet.header::<Ports>(transport_offset)?;
        key.source_port = ports.destination;
        key.destination_port = ports.source;
        key.protocol = u32::from(protocol);
    }
    Ok(transport_offset)
}

/// Is this the ICMP of its family?
#[inline(always)]
const fn is_icmp(protocol: u8, is_v4: bool) -> bool {
    protocol == if is_v4 { PROTOCOL_ICMP } else { PROTOCOL_ICMPV6 }
}

#[inline(always)]
const fn quote_offset(frame: &Frame) -> usize {
    frame.transport_offset as usize + IcmpHeader::LEN
}

/// Gives the quoted packet the addresses and ports that the error's receiver knows: it went the other way, so they are
/// those of a packet in the error's direction, crosswise. Returns what that changes in the sum of the message.
#[inline(always)]
fn rewrite_quote<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    hit: &Hit,
    transport_offset: usize,
) -> Result<Delta, Stop> {
    let rewrite = &hit.rewrite;
    let offset = quote_offset(frame);
    let mut change = rewrite.addresses;
    let header_len = (transport_offset - offset) as u32;
    let len = if frame.is_v4() {
        let ip = packet.header::<Ipv4Header>(offset)?;
        let before = ip.checksum;
        ip.checksum = rewrite.addresses.apply(before);
        change = change.replace16(before, ip.checksum);
        ip.source = rewrite.destination.low();
        ip.destination = rewrite.source.low();
        u32::from(ip.total_len.get()).wrapping_sub(header_len)
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        ip.set_addresses(&rewrite.destination, &rewrite.source);
        u32::from(ip.payload_len.get()).wrapping_sub(header_len - Ipv6Header::LEN as u32)
    };
    let quoted = Quoted {
        protocol: hit.protocol as u8,
        offset: transport_offset,
        len,
        end: (frame.transport_offset + frame.transport_len) as usize,
        difference: hit.difference,
    };
    Ok(change.and(rewrite_transport(packet, frame, rewrite, quoted)?))
}

/// A quoted packet behind its IP header.
#[repr(align(8))]
#[derive(Clone, Copy)]
pub(super) struct Quoted {
    /// That of the flow: of both families' ICMP that of IPv4.
    pub protocol: u8,
    /// Where it starts, in bytes from the frame's start.
    pub offset: usize,
    /// How long it was as a whole, in bytes.
    pub len: u32,
    /// Where the quote ends.
    pub end: usize,
    /// By how much the sequence number of TCP is raised, see `Hit::difference`.
    pub difference: u32,
}

/// Gives a quoted transport header the ports that the error's receiver knows, or the identifier, and the checksum that
/// belongs to them and to the new addresses. Returns what that changes in the sum of the message.
#[inline(always)]
pub(super) fn rewrite_transport<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    rewrite: &Rewrite,
    quoted: Quoted,
) -> Result<Delta, Stop> {
    let change = rewrite.ports;
    if quoted.protocol == PROTOCOL_ICMP {
        return Ok(change.and(rewrite_quoted_echo(packet, frame, rewrite, quoted)?));
    }
    if quoted.protocol == PROTOCOL_SCTP {
        return Ok(change.and(rewrite_quoted_sctp(packet, rewrite, quoted)?));
    }
    let ports = packet.header::<Ports>(quoted.offset)?;
    ports.source = rewrite.destination_port;
    ports.destination = rewrite.source_port;
    let is_tcp = quoted.protocol == PROTOCOL_TCP;
    let mut change = change;
    if is_tcp && quoted.difference != 0 {
        // It is within the bytes that every error quotes.
        let field = packet.header::<Field32>(quoted.offset + TcpHeader::SEQUENCE_OFFSET)?;
        let before = field.value;
        field.value = Be32::new(before.get().wrapping_add(quoted.difference));
        change = change.and(Delta::ZERO.replace32(before, field.value));
    }
    let checksum_offset = quoted.offset + transport_checksum::offset(is_tcp);
    // Of TCP the quote may end before the checksum.
    if checksum_offset + Field16::LEN > quoted.end {
        return Ok(change);
    }
    let field = packet.header::<Field16>(checksum_offset)?;
    let before = field.value;
    if is_tcp || before != CHECKSUM_NONE {
        let after = rewrite.addresses.and(change).apply(before);
        field.value = transport_checksum::sent(is_tcp, after);
        return Ok(change.replace16(before, field.value));
    }
    Ok(change)
}

/// Gives a quoted echo message the identifier that the error's receiver knows, and its type in the other family where
/// it is one of that. Returns what that changes in the sum of the message, but for the identifier.
#[inline(always)]
fn rewrite_quoted_echo<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    rewrite: &Rewrite,
    quoted: Quoted,
) -> Result<Delta, Stop> {
    let (is_v4, is_translated) = (frame.is_v4(), translate::is_due(frame, rewrite));
    // Between the families, its addresses of IPv6, which stand under the checksum.
    let (source, destination) = if is_translated && !is_v4 {
        let ip = packet.header::<Ipv6Header>(quote_offset(frame))?;
        (ip.source(), ip.destination())
    } else {
        (rewrite.source.copied(), rewrite.destination.copied())
    };
    let icmp = packet.header::<IcmpHeader>(quoted.offset)?;
    let kind = Kind::of(icmp, is_v4);
    // It went the other way.
    let identifier = match kind {
        Kind::Request => rewrite.destination_port,
        _ => rewrite.source_port,
    };
    icmp.set_identifier(identifier);
    let (type_before, before) = (icmp.type_word(), icmp.checksum);
    let change = if is_translated {
        rewrite.ports.and(echo::translate(
            icmp,
            kind,
            !is_v4,
            &source,
            &destination,
            quoted.len,
        ))
    } else if is_v4 {
        rewrite.ports
    } else {
        rewrite.addresses.and(rewrite.ports)
    };
    icmp.checksum = change.apply(before);
    Ok(Delta::ZERO
        .replace_raw(type_before, icmp.type_word())
        .replace16(before, icmp.checksum))
}

/// Gives a quoted packet of SCTP the ports that the error's receiver knows. Returns what that changes in the sum of the
/// message, but for the ports.
#[inline(always)]
fn rewrite_quoted_sctp<P: Packet>(packet: &mut P, rewrite: &Rewrite, quoted: Quoted) -> Result<Delta, Stop> {
    let ports = packet.header::<Ports>(quoted.offset)?;
    let before = ports.word();
    ports.source = rewrite.destination_port;
    ports.destination = rewrite.source_port;
    let after = ports.word();
    if quoted.offset + SctpHeader::CHECKSUM_OFFSET + SctpChecksum::LEN > quoted.end {
        return Ok(Delta::ZERO);
    }
    let field = packet.header::<SctpChecksum>(quoted.offset + SctpHeader::CHECKSUM_OFFSET)?;
    let old = *field;
    if old == SctpChecksum::NONE {
        return Ok(Delta::ZERO);
    }
    *field = old.replaced(before, after, quoted.len);
    Ok(Delta::ZERO.replace32(Be32::from_raw(old.raw()), Be32::from_raw(field.raw())))
}

/// Makes the rewrite that of the message itself: who reports, to whom, and what that changes.
#[inline(always)]
fn address(frame: &Frame, rewrite: &mut Rewrite, quote: &Quote) {
    if quote.keeps_sender != 0 {
        rewrite.source = frame.key.source.copied();
    }
    rewrite.addresses = Delta::ZERO
        .replace_address(frame.key.source, rewrite.source)
        .replace_address(frame.key.destination, rewrite.destination);
}
