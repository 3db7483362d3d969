//! Answers ICMP echo requests to a VIP (RFC 792, RFC 1122 §3.2.2.6): "is the gateway there?".

use super::{Outcome, Packet, Stop, Tables, Verdict, parse::NETWORK_OFFSET};
use crate::{
    abi::{listener::VipKey, reason::Reason},
    wire::{
        checksum::Delta,
        ethernet::EthernetHeader,
        icmp::{IcmpHeader, TYPE_ECHO_REPLY, TYPE_ECHO_REQUEST},
        ipv4::Ipv4Header,
    },
};

/// RFC 1122 §3.2.1.7: a fresh TTL, as the reply is a packet of its own.
const REPLY_TTL: u8 = 64;

/// Turns an echo request to a VIP into its reply.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    transport_offset: usize,
) -> Result<Outcome, Stop> {
    let destination = packet.header::<Ipv4Header>(NETWORK_OFFSET)?.destination;
    let icmp = packet.header::<IcmpHeader>(transport_offset)?;
    if icmp.icmp_type != TYPE_ECHO_REQUEST
        || icmp.code != 0
        || tables.vip(&VipKey { address: destination }).is_none()
    {
        return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL));
    }
    let before = icmp.type_word();
    icmp.icmp_type = TYPE_ECHO_REPLY;
    icmp.checksum = Delta::ZERO
        .replace_raw(before, icmp.type_word())
        .apply(icmp.checksum);

    let ip = packet.header::<Ipv4Header>(NETWORK_OFFSET)?;
    let before = ip.ttl_word();
    ip.ttl = REPLY_TTL;
    ip.checksum = Delta::ZERO.replace_raw(before, ip.ttl_word()).apply(ip.checksum);
    // Swapping the addresses leaves the sum as it is.
    (ip.source, ip.destination) = (ip.destination, ip.source);

    let ethernet = packet.header::<EthernetHeader>(0)?;
    ethernet.link = { ethernet.link }.swapped();
    Ok(Outcome {
        verdict: Verdict::TRANSMIT,
        reason: Reason::ECHO_ANSWERED,
    })
}
