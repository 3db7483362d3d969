//! Answers ICMP echo requests to a VIP (RFC 792, RFC 1122 §3.2.2.6; RFC 4443 §4.2): "is the gateway there?".

use super::{Outcome, Packet, Stop, Tables, Verdict, parse::Frame};
use crate::{
    abi::{listener::VipKey, reason::Reason},
    wire::{
        checksum::Delta,
        ethernet::EthernetHeader,
        icmp::{IcmpHeader, TYPE_ECHO_REPLY, TYPE_ECHO_REQUEST, TYPE_V6_ECHO_REPLY, TYPE_V6_ECHO_REQUEST},
        ipv4::Ipv4Header,
        ipv6::Ipv6Header,
    },
};

/// RFC 1122 §3.2.1.7: a fresh TTL, as the reply is a packet of its own.
const REPLY_TTL: u8 = 64;

/// Turns an echo request to a VIP into its reply.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(packet: &mut P, tables: &T, frame: &Frame) -> Result<Outcome, Stop> {
    let is_v4 = frame.is_v4();
    let (request, reply) = if is_v4 {
        (TYPE_ECHO_REQUEST, TYPE_ECHO_REPLY)
    } else {
        (TYPE_V6_ECHO_REQUEST, TYPE_V6_ECHO_REPLY)
    };
    let icmp = packet.header::<IcmpHeader>(frame.transport_offset as usize)?;
    let address = frame.key.destination;
    if icmp.icmp_type != request || icmp.code != 0 || tables.vip(&VipKey { address }).is_none() {
        return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL));
    }
    let before = icmp.type_word();
    icmp.icmp_type = reply;
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
