//! ICMP echo (RFC 792, RFC 4443 §4).
//!
//! A request to a VIP is answered here (RFC 1122 §3.2.2.6): "is the gateway there?". If the VIP has a listener of echo,
//! the request goes on to a backend instead, and its reply comes back: "is a backend there?".
//!
//! Echo messages have an identifier where others have two ports. It takes the part of the client's (RFC 5508 §3.1);
//! the other port is zero. So a request's identifier stands in the key's source port, a reply's in the destination
//! port, and pool, flow index and rewrite treat it as what it is: the number that the client chose, or the pool. Both
//! families have ICMP's protocol number in the key, as one flow may be of both.

use super::{
    Outcome, Packet, Stop, Tables, Verdict, Walk, flow,
    parse::Frame,
    rewrite::{self, Rewrite},
    translate,
};
use crate::{
    abi::{
        flow::{Direction, FlowKey, HopKind},
        listener::{ListenerKey, VipKey},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        Be16, IpAddress,
        checksum::{self, Delta},
        ethernet::EthernetHeader,
        icmp::{IcmpHeader, TYPE_ECHO_REPLY, TYPE_ECHO_REQUEST, TYPE_V6_ECHO_REPLY, TYPE_V6_ECHO_REQUEST},
        ipv4::{Ipv4Header, PROTOCOL_ICMP},
        ipv6::{Ipv6Header, PROTOCOL_ICMPV6},
    },
};

/// RFC 1122 §3.2.1.7: a fresh TTL, as the reply is a packet of its own.
const REPLY_TTL: u8 = 64;

/// What an ICMP message is to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Request,
    Reply,
    /// No echo.
    Other,
}

impl Kind {
    /// The kind of a message of this family.
    #[inline(always)]
    pub const fn of(icmp: &IcmpHeader, is_v4: bool) -> Self {
        match (icmp.icmp_type, is_v4) {
            _ if icmp.code != 0 => Self::Other,
            (TYPE_ECHO_REQUEST, true) | (TYPE_V6_ECHO_REQUEST, false) => Self::Request,
            (TYPE_ECHO_REPLY, true) | (TYPE_V6_ECHO_REPLY, false) => Self::Reply,
            _ => Self::Other,
        }
    }

    /// Its type in a family, for an echo.
    #[inline(always)]
    const fn number(self, is_v4: bool) -> u8 {
        match (self, is_v4) {
            (Self::Request, true) => TYPE_ECHO_REQUEST,
            (Self::Request, false) => TYPE_V6_ECHO_REQUEST,
            (_, true) => TYPE_ECHO_REPLY,
            (_, false) => TYPE_V6_ECHO_REPLY,
        }
    }
}

/// Gives the key what an echo message has in place of ports.
#[inline(always)]
pub const fn set_key(key: &mut FlowKey, kind: Kind, identifier: Be16) {
    key.protocol = PROTOCOL_ICMP as u32;
    if matches!(kind, Kind::Request) {
        key.source_port = identifier;
        key.destination_port = Be16::ZERO;
    } else {
        key.source_port = Be16::ZERO;
        key.destination_port = identifier;
    }
}

/// The identifier that a message leaves with.
#[inline(always)]
pub const fn identifier(rewrite: &Rewrite, kind: Kind) -> Be16 {
    match kind {
        Kind::Request => rewrite.source_port,
        _ => rewrite.destination_port,
    }
}

/// Reads an echo message that is for a backend, or comes from one: the frame's key becomes that of its flow.
///
/// # Errors
/// The end of the walk for all others: a request to a VIP is answered.
#[inline(always)]
pub fn find<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let Walk { frame, key, .. } = walk;
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    let kind = Kind::of(icmp, frame.is_v4());
    key.source = frame.key.source.copied();
    key.destination = frame.key.destination.copied();
    set_key(key, kind, icmp.identifier());
    let is_forwarded = match kind {
        Kind::Request => {
            let listener = ListenerKey::new(key.destination.copied(), Be16::ZERO, PROTOCOL_ICMP);
            tables.listener(&listener).is_some()
        }
        Kind::Reply => flow::is_known(tables, settings, key),
        Kind::Other => false,
    };
    if !is_forwarded {
        return Err(match answer(packet, tables, frame) {
            Ok(outcome) => Stop(outcome),
            Err(stop) => stop,
        });
    }
    frame.key.source_port = key.source_port;
    frame.key.destination_port = key.destination_port;
    frame.key.protocol = key.protocol;
    Ok(())
}

/// Changes an echo message; between the families, its type as well (RFC 7915 §4.2, §5.2).
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, walk: &Walk) -> Result<(), Stop> {
    let (frame, rewrite) = (&walk.frame, &walk.hit.rewrite);
    let is_translated = translate::is_due(frame, rewrite);
    if !is_translated {
        let is_sent = walk.hit.hop.kind == HopKind::DIRECT;
        rewrite::network(packet, frame, rewrite, is_sent)?;
    }
    let kind = if walk.hit.direction == Direction::REQUEST {
        Kind::Request
    } else {
        Kind::Reply
    };
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    icmp.set_identifier(identifier(rewrite, kind));
    let mut change = rewrite.ports;
    if is_translated {
        let (to_v4, len) = (!frame.is_v4(), frame.transport_len);
        change = change.and(if to_v4 {
            translate(icmp, kind, to_v4, &frame.key.source, &frame.key.destination, len)
        } else {
            translate(icmp, kind, to_v4, &rewrite.source, &rewrite.destination, len)
        });
    } else if !frame.is_v4() {
        change = change.and(rewrite.addresses);
    }
    icmp.checksum = change.apply(icmp.checksum);
    Ok(())
}

/// Gives an echo message its type in the other family: what that changes under its checksum. Only ICMPv6 has a
/// pseudo-header there (RFC 4443 §2.3), of these two addresses and the message's length in bytes.
#[inline(always)]
pub(super) fn translate(
    icmp: &mut IcmpHeader,
    kind: Kind,
    to_v4: bool,
    source: &IpAddress,
    destination: &IpAddress,
    len: u32,
) -> Delta {
    let before = icmp.type_word();
    icmp.icmp_type = kind.number(to_v4);
    let change = Delta::ZERO.replace_raw(before, icmp.type_word());
    let pseudo = checksum::pseudo_header(source.copied(), destination.copied(), PROTOCOL_ICMPV6, len);
    let pseudo = checksum::fold(pseudo);
    if to_v4 {
        change.replace_raw(pseudo, 0)
    } else {
        change.replace_raw(0, pseudo)
    }
}

/// Turns an echo request to a VIP into its reply.
#[inline(always)]
fn answer<P: Packet, T: Tables>(packet: &mut P, tables: &T, frame: &Frame) -> Result<Outcome, Stop> {
    let is_v4 = frame.is_v4();
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    let address = frame.key.destination;
    if Kind::of(icmp, is_v4) != Kind::Request || tables.vip(&VipKey { address }).is_none() {
        return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL));
    }
    let before = icmp.type_word();
    icmp.icmp_type = Kind::Reply.number(is_v4);
    icmp.checksum = Delta::ZERO
        .replace_raw(before, icmp.type_word())
        .apply(icmp.checksum);

    turn(packet, frame, REPLY_TTL)?;
    Ok(Outcome {
        verdict: Verdict::TRANSMIT,
        reason: Reason::ECHO_ANSWERED,
    })
}

/// Sends a packet back to where it came from: addresses swapped, which leaves all sums as they are, and a fresh TTL.
#[inline(always)]
pub fn turn<P: Packet>(packet: &mut P, frame: &Frame, ttl: u8) -> Result<(), Stop> {
    let offset = frame.network_offset as usize;
    if frame.is_v4() {
        let ip = packet.header::<Ipv4Header>(offset)?;
        let before = ip.ttl_word();
        ip.ttl = ttl;
        ip.checksum = Delta::ZERO.replace_raw(before, ip.ttl_word()).apply(ip.checksum);
        (ip.source, ip.destination) = (ip.destination, ip.source);
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        ip.hop_limit = ttl;
        ip.set_addresses(&frame.key.destination, &frame.key.source);
    }
    // Packets of some tunnels begin with IP.
    if offset != 0 {
        let ethernet = packet.header::<EthernetHeader>(0)?;
        ethernet.link = { ethernet.link }.swapped();
    }
    Ok(())
}
