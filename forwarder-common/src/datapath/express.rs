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
        Be16, IpAddress, WireHeader,
        checksum::{self, Delta},
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
    if source_port == Be16::ZERO || destination_port == Be16::ZERO {
        return None;
    }
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

    let pool = settings.pool.flow_v4(ip.destination, destination_port);
    if pool.is_none() && !settings.own.may_have(IpAddress::from_v4(ip.destination)) {
        let outcome = Stop::pass(Reason::NOT_OURS).0;
        tables.count_reason(outcome.reason, frame_bytes);
        return Some(outcome);
    }
    if is_tcp && headers.tcp.flags & (FLAG_SYN | FLAG_FIN | FLAG_RST) != 0 || ip.ttl <= 1 {
        return None;
    }
    let key = FlowKeyV4 {
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        protocol: u32::from(ip.protocol),
    };
    let (id, direction) = match pool {
        Some(id) => (id?, Direction::REPLY),
        None => {
            let reference = tables.flow_reference_v4(&key)?;
            (reference.id, reference.direction)
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
        || hop.peer != 0
        || hop.vlans != [0; 2]
        || (hop.mtu_bytes != 0 && *total_len > u32::from(hop.mtu_bytes))
    {
        return None;
    }
    let direction = if REQUEST {
        Direction::REQUEST
    } else {
        Direction::REPLY
    };
    let tcp_flags = if *is_tcp { headers.tcp.flags } else { 0 };
    // What a backend answers first is counted, and the walk knows how.
    if (!REQUEST && entry.reply_packets == 0)
        || (*is_tcp && entry.tcp.after(direction, tcp_flags) != entry.tcp)
    {
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

    // From here on it goes.
    let bytes = u64::from(*total_len);
    if entry.seen == 0 {
        entry.seen = 1;
    }
    if REQUEST {
        if tcp_flags & FLAG_ACK != 0 {
            entry.client_expects = headers.tcp.acknowledgment;
        }
        entry.request_packets = entry.request_packets.wrapping_add(1);
        entry.request_bytes = entry.request_bytes.wrapping_add(bytes);
    } else {
        if tcp_flags & FLAG_ACK != 0 {
            entry.backend_expects = headers.tcp.acknowledgment;
        }
        entry.reply_packets = entry.reply_packets.wrapping_add(1);
        entry.reply_bytes = entry.reply_bytes.wrapping_add(bytes);
    }
    let hop = if REQUEST {
        &entry.request_hop
    } else {
        &entry.reply_hop
    };
    headers.ethernet.link = hop.link.copied();
    rewrite::<REQUEST>(headers, entry, *is_tcp, checksum);
    let (listener, backend, verdict) = (entry.listener, entry.backend, next_hop::verdict(env, hop));
    let (event, reason) = if REQUEST {
        (
            TrafficEvent::Request {
                bytes: *total_len,
                reset: false,
            },
            Reason::REQUEST_FORWARDED,
        )
    } else {
        (
            TrafficEvent::Reply {
                bytes: *total_len,
                reset: false,
                first: false,
            },
            Reason::REPLY_FORWARDED,
        )
    };
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

/// New addresses, ports and checksums, and a hop less.
#[inline(always)]
fn rewrite<const REQUEST: bool>(headers: &mut Headers, entry: &FlowEntry, is_tcp: bool, checksum: Be16) {
    let (mut addresses, mut ports) = (
        Delta::from_folded(entry.address_delta),
        Delta::from_folded(entry.port_delta),
    );
    let binding = &entry.binding;
    let ip = &mut headers.ip;
    if REQUEST {
        ip.source = binding.snat.low();
        ip.destination = binding.backend.low();
        headers.tcp.source_port = binding.snat_port;
        headers.tcp.destination_port = binding.backend_port;
    } else {
        (addresses, ports) = (addresses.reversed(), ports.reversed());
        ip.source = binding.vip.low();
        ip.destination = binding.client.low();
        headers.tcp.source_port = binding.vip_port;
        headers.tcp.destination_port = binding.client_port;
    }
    let before = ip.ttl_word();
    ip.ttl -= 1;
    ip.checksum = addresses.replace_raw(before, ip.ttl_word()).apply(ip.checksum);
    let new = sent(is_tcp, addresses.and(ports).apply(checksum));
    if is_tcp {
        headers.tcp.checksum = new;
    } else if checksum != CHECKSUM_NONE {
        headers.udp().checksum = new;
    }
}
