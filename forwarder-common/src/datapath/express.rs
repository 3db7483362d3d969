//! The short way, which most packets take: IPv4 without options or tags, a segment of an established connection or a
//! datagram, of a flow that is known with its next hop; and what is addressed to nobody here.
//!
//! It decides nothing that the walk would decide otherwise: the same packet comes out, the same is counted, the tables
//! are left the same. What it does not know at first sight it leaves to the walk, unchanged. Tests hold every packet of
//! theirs against both (`MemoryTables::forward` in `forwarder-tests`).
//!
//! What it saves is the generality of the walk: one bounds check for all headers, offsets known when the program is
//! compiled, nothing handed from stage to stage through memory.

use bytemuck::{Pod, Zeroable};

use super::{
    ChecksumOffload, Env, Outcome, Packet, Stop, Tables, TrafficEvent, next_hop, transport_checksum::sent,
};
use crate::{
    abi::{
        flow::{Direction, FlowBinding, FlowEntry, FlowId, FlowKeyV4, FlowState, HopKind},
        reason::Reason,
        settings::{Settings, flag},
    },
    wire::{
        Be16, IpAddress, WireHeader, checksum,
        ethernet::{ETHERTYPE_IPV4, EthernetHeader},
        ipv4::{Ipv4Header, PROTOCOL_TCP, PROTOCOL_UDP},
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, TcpHeader},
        udp::{CHECKSUM_NONE, UdpHeader},
    },
};

/// Headers of a TCP segment in one piece; a datagram of UDP with twelve bytes of payload is as long, as every frame on
/// a real network is (IEEE 802.3 §3.2.8).
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Headers {
    ethernet: EthernetHeader,
    ip: Ipv4Header,
    tcp: TcpHeader,
}

impl WireHeader for Headers {}

/// The same, with what makes a key in one piece each.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Key {
    before: [u8; EthernetHeader::LEN + Ipv4Header::LEN - 8],
    addresses: [u8; 8],
    ports: [u8; 4],
    behind: [u8; TcpHeader::LEN - 4],
}

impl Headers {
    /// The headers as those of a datagram.
    #[inline(always)]
    fn udp(&mut self) -> &mut UdpHeader {
        let bytes = bytemuck::bytes_of_mut(&mut self.tcp);
        bytemuck::from_bytes_mut(&mut bytes[..UdpHeader::LEN])
    }
}

/// What becomes of a packet, if it is one of those; else it is unchanged, and nothing was counted.
#[inline(always)]
pub fn forward<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &E,
    settings: &Settings,
) -> Option<Outcome> {
    if let ChecksumOffload::Kernel = P::CHECKSUM_OFFLOAD {
        return None;
    }
    if settings.flags & flag::CAPTURE != 0 {
        return None;
    }
    let frame_bytes = packet.linear_len();
    let headers = packet.header::<Headers>(0).ok()?;
    let (ip, ethertype) = (headers.ip, headers.ethernet.ethertype);
    let total_len = u32::from(ip.total_len.get());
    if ethertype != ETHERTYPE_IPV4
        || ip.version_ihl != 0x45
        || ip.is_fragment()
        || EthernetHeader::LEN + total_len as usize > frame_bytes
    {
        return None;
    }
    let (source_port, destination_port) = (headers.tcp.source_port, headers.tcp.destination_port);
    let is_tcp = ip.protocol == PROTOCOL_TCP;
    if is_tcp {
        if (total_len as usize) < Ipv4Header::LEN + TcpHeader::LEN {
            return None;
        }
    } else {
        let claimed = headers.udp().len.get() as usize;
        // Tunnels come in UDP.
        if ip.protocol != PROTOCOL_UDP
            || settings.flags & flag::TUNNELS != 0
            || claimed < UdpHeader::LEN
            || Ipv4Header::LEN + claimed > total_len as usize
        {
            return None;
        }
    }

    let is_opening_or_closing = is_tcp && headers.tcp.flags & (FLAG_SYN | FLAG_FIN | FLAG_RST) != 0;
    let is_seldom = is_opening_or_closing || ip.ttl <= 1;
    let Key { addresses, ports, .. } = *bytemuck::cast_ref::<Headers, Key>(headers);
    let key = FlowKeyV4::new(addresses, ports, ip.protocol);
    let is_known = settings.own.may_have(IpAddress::from_v4(ip.destination));
    let (id, direction) = if is_known
        && !is_seldom
        && let Some(reference) = tables.flow_reference_v4(&key)
    {
        (reference.id, reference.direction)
    } else {
        match settings.pool.flow_v4(ip.destination, destination_port) {
            Some(id) if !is_seldom => (id?, Direction::REPLY),
            None if !is_known && source_port != Be16::ZERO && destination_port != Be16::ZERO => {
                let outcome = Stop::pass(Reason::NOT_OURS).0;
                tables.count_reason(outcome.reason, frame_bytes);
                return Some(outcome);
            }
            _ => return None,
        }
    };
    let arrival = Arrival {
        key,
        total_len,
        frame_bytes,
        is_tcp,
    };
    if direction == Direction::REQUEST {
        carry::<true, T, E>(headers, tables, env, settings, id, &arrival)
    } else {
        carry::<false, T, E>(headers, tables, env, settings, id, &arrival)
    }
}

/// What was read of a packet.
struct Arrival {
    key: FlowKeyV4,
    /// IP bytes.
    total_len: u32,
    frame_bytes: usize,
    is_tcp: bool,
}

/// Carries a packet of a flow on, if there is nothing about it to decide; `REQUEST`: to the backend, else to the
/// client.
#[inline(always)]
fn carry<const REQUEST: bool, T: Tables, E: Env>(
    headers: &mut Headers,
    tables: &mut T,
    env: &E,
    settings: &Settings,
    id: FlowId,
    arrival: &Arrival,
) -> Option<Outcome> {
    let Arrival {
        key,
        total_len,
        frame_bytes,
        is_tcp,
    } = arrival;
    let entry = tables.flow(id)?;
    let binding = &entry.binding;
    let expected = if REQUEST {
        binding.request_key_v4()
    } else {
        binding.reply_key_v4()
    };
    if entry.state != FlowState::LIVE || binding.families != FlowBinding::BOTH_V4 || expected != *key {
        return None;
    }
    let hop = if REQUEST {
        &entry.request_hop
    } else {
        &entry.reply_hop
    };
    if hop.kind != HopKind::DIRECT
        || hop.generation != settings.route_generation
        || hop.hook != env.hook() as u8
        || !hop.is_plain()
        || (hop.mtu_bytes != 0 && *total_len > u32::from(hop.mtu_bytes))
    {
        return None;
    }
    let (direction, event, reason) = if REQUEST {
        (
            Direction::REQUEST,
            TrafficEvent::Request {
                bytes: *total_len,
                reset: false,
            },
            Reason::REQUEST_FORWARDED,
        )
    } else {
        (
            Direction::REPLY,
            TrafficEvent::Reply {
                bytes: *total_len,
                reset: false,
                first: false,
            },
            Reason::REPLY_FORWARDED,
        )
    };
    // No other flag comes this way, which spares what the others would mean.
    let has_ack = *is_tcp && headers.tcp.flags & FLAG_ACK != 0;
    let flags = if has_ack { FLAG_ACK } else { 0 };
    // What a backend answers first is counted, and the walk knows how.
    if (!REQUEST && entry.reply_packets == 0) || (*is_tcp && entry.tcp.after(direction, flags) != entry.tcp) {
        return None;
    }
    let checksum = if *is_tcp {
        headers.tcp.checksum
    } else {
        headers.udp().checksum
    };
    if settings.flags & flag::PARTIAL_CHECKSUMS != 0 && checksum.raw() == pseudo_header(arrival) {
        return None;
    }

    // From here on it goes. What is read of the entry is read before the packet is written: the compiler does not know
    // that these are different places.
    let (listener, backend, verdict) = (entry.listener, entry.backend, next_hop::verdict(env, hop));
    let link = hop.link.copied();
    if entry.seen == 0 {
        entry.seen = 1;
    }
    let bytes = u64::from(*total_len);
    if REQUEST {
        if has_ack {
            entry.client_expects = headers.tcp.acknowledgment;
        }
        entry.request_packets = entry.request_packets.wrapping_add(1);
        entry.request_bytes = entry.request_bytes.wrapping_add(bytes);
    } else {
        if has_ack {
            entry.backend_expects = headers.tcp.acknowledgment;
        }
        entry.reply_packets = entry.reply_packets.wrapping_add(1);
        entry.reply_bytes = entry.reply_bytes.wrapping_add(bytes);
    }
    rewrite::<REQUEST>(headers, entry, *is_tcp, checksum);
    headers.ethernet.link = link;
    tables.count_listener(listener, event);
    tables.count_backend(backend, event);
    tables.count_reason(reason, *frame_bytes);
    Some(Outcome { verdict, reason })
}

/// The folded sum of the pseudo-header: what a sender leaves whose device computes the checksum.
#[inline(always)]
fn pseudo_header(arrival: &Arrival) -> u16 {
    checksum::fold(checksum::pseudo_header_v4(
        arrival.key.source,
        arrival.key.destination,
        arrival.key.protocol as u8,
        arrival.total_len - Ipv4Header::LEN as u32,
    ))
}

/// What a TTL that is one less changes in the sum of the IP header, whatever it was: `~m + m'` (RFC 1624 §3).
const HOP_LESS: u32 = 0xffff - u16::from_ne_bytes([1, 0]) as u32;

/// New addresses, ports and checksums, and a hop less.
#[inline(always)]
fn rewrite<const REQUEST: bool>(headers: &mut Headers, entry: &FlowEntry, is_tcp: bool, checksum: Be16) {
    let binding = &entry.binding;
    let (source, destination, source_port, destination_port, addresses, ports) = if REQUEST {
        (
            binding.snat.low(),
            binding.backend.low(),
            binding.snat_port,
            binding.backend_port,
            entry.address_delta,
            entry.port_delta,
        )
    } else {
        (
            binding.vip.low(),
            binding.client.low(),
            binding.vip_port,
            binding.client_port,
            !entry.address_delta,
            !entry.port_delta,
        )
    };
    let (addresses, ports) = (u32::from(addresses), u32::from(ports));
    let ip = &mut headers.ip;
    ip.source = source;
    ip.destination = destination;
    ip.ttl -= 1;
    ip.checksum = updated(ip.checksum, addresses + HOP_LESS);
    headers.tcp.source_port = source_port;
    headers.tcp.destination_port = destination_port;
    let new = sent(is_tcp, updated(checksum, addresses + ports));
    if is_tcp {
        headers.tcp.checksum = new;
    } else if checksum != CHECKSUM_NONE {
        headers.udp().checksum = new;
    }
}

/// A checksum after a change: `~(~HC + ~m + m')` (RFC 1624 §3). Of the change few enough words for 32 bits: the walk's
/// [`Delta`](checksum::Delta) folds it before.
#[inline(always)]
const fn updated(checksum: Be16, change: u32) -> Be16 {
    Be16::from_raw(checksum::finish(!checksum.raw() as u32 + change))
}
