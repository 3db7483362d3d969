//! The short way, which most packets take: IP without options, extension headers or tags, a segment of an established
//! connection or a datagram, of a flow that is known with its next hop; the same out of a tunnel or into one; and what is
//! neither to nor from ours.
//!
//! It decides nothing that the walk would decide otherwise: the same packet comes out, the same is counted, the tables
//! are left the same. What it does not know at first sight it leaves to the walk, unchanged. Tests hold every packet of
//! theirs against both (`MemoryTables::forward` in `forwarder-tests`).
//!
//! What it saves is the generality of the walk: one bounds check for all headers, offsets known when the program is
//! compiled, nothing handed from stage to stage through memory. So it is compiled once for each family.

use bytemuck::{Pod, Zeroable};

use super::{
    ChecksumOffload, Env, Hook, Outcome, Packet, Stop, Tables, TrafficEvent, Verdict,
    hint::{Fingerprint, Hint},
    next_hop,
    overlay::{self, Entrant, Inside},
    transport_checksum::sent,
};
use crate::{
    abi::{
        backend::BackendId,
        flow::{
            Direction, FlowBinding, FlowEntry, FlowId, FlowKey, FlowKeyV4, FlowReference, FlowState, HopKind,
        },
        listener::ListenerId,
        reason::Reason,
        settings::{Settings, flag},
        snat::{SnatBinding, SnatPool},
        tunnel::{PeerId, TunnelKind},
    },
    wire::{
        Be16, IpAddress, WireHeader, checksum,
        ethernet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader},
        ipv4::{Ipv4Header, PROTOCOL_TCP, PROTOCOL_UDP},
        ipv6::Ipv6Header,
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, TcpHeader},
        udp::{CHECKSUM_NONE, UdpHeader},
    },
};

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
    match packet.header::<EthernetHeader>(0).ok()?.ethertype {
        ETHERTYPE_IPV4 => look_up::<false, HeadersV4, P, T, E>(packet, tables, env, settings, 0),
        ETHERTYPE_IPV6 => look_up::<false, HeadersV6, P, T, E>(packet, tables, env, settings, 0),
        _ => None,
    }
}

/// The same for what came through a tunnel of ours, in native XDP.
#[inline(always)]
pub fn through<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &E,
    settings: &Settings,
    inside: &Inside,
) -> Option<Outcome> {
    if settings.flags & flag::CAPTURE != 0 || overlay::may_carry_congestion(inside.outer_tos) {
        return None;
    }
    let offset = (inside.network_offset as usize).checked_sub(EthernetHeader::LEN)?;
    if inside.ethertype == ETHERTYPE_IPV4 {
        look_up::<true, HeadersV4, P, T, E>(packet, tables, env, settings, offset)
    } else {
        look_up::<true, HeadersV6, P, T, E>(packet, tables, env, settings, offset)
    }
}

/// What was read of an IP header.
struct Ip {
    /// IP header and payload, in bytes.
    total_len: u32,
    protocol: u8,
    /// TTL or hop limit.
    ttl: u8,
}

/// The headers of a packet in one piece, as one family has them.
///
/// They end with those of TCP: a datagram of UDP with twelve bytes of payload is as long, as every frame of IPv4 on a
/// real network is (IEEE 802.3 §3.2.8). A shorter one that a tunnel carries takes the walk.
trait Headers: WireHeader {
    type Key: PartialEq;
    const ETHERTYPE: Be16;
    /// Length of the IP header, in bytes.
    const NETWORK_LEN: usize;
    /// `FlowBinding::families` of flows that have this family on both sides.
    const FAMILIES: u32;

    /// The IP header; `None`: the walk must look at it.
    fn ip(&self) -> Option<Ip>;
    fn source(&self) -> IpAddress;
    fn destination(&self) -> IpAddress;
    fn key(&self, protocol: u8) -> Self::Key;
    fn fingerprint(key: &Self::Key) -> Fingerprint;
    fn reference<'t, T: Tables>(tables: &'t T, key: &Self::Key) -> Option<&'t FlowReference>;
    /// As [`SnatPool::flow`], of the packet's destination.
    fn pool_flow(&self, pool: &SnatPool) -> Option<Option<FlowId>>;
    /// The key of a flow's requests, or of its replies.
    fn key_of<const REQUEST: bool>(binding: &FlowBinding) -> Self::Key;
    /// The folded sum of the pseudo-header: what a sender leaves whose device computes the checksum.
    fn pseudo_header(&self, ip: &Ip) -> u16;
    /// Writes what a packet of a flow becomes into the IP header, and a hop less; `addresses`: what that changes in a
    /// sum.
    fn rewrite<const REQUEST: bool>(&mut self, binding: &FlowBinding, addresses: u32);
    fn ethernet(&mut self) -> &mut EthernetHeader;
    fn tcp(&self) -> &TcpHeader;
    fn tcp_mut(&mut self) -> &mut TcpHeader;
    /// Are both ports there?
    #[inline(always)]
    fn has_ports(&self) -> bool {
        let (source, destination) = (self.tcp().source_port, self.tcp().destination_port);
        source != Be16::ZERO && destination != Be16::ZERO
    }
    /// The transport header as that of a datagram.
    #[inline(always)]
    fn udp(&self) -> &UdpHeader {
        bytemuck::from_bytes(&bytemuck::bytes_of(self.tcp())[..UdpHeader::LEN])
    }
    #[inline(always)]
    fn udp_mut(&mut self) -> &mut UdpHeader {
        bytemuck::from_bytes_mut(&mut bytemuck::bytes_of_mut(self.tcp_mut())[..UdpHeader::LEN])
    }
}

/// Finds the flow of a packet, whose headers are at `offset`; `INSIDE`: behind those of a tunnel, where those of Ethernet
/// may be any bytes.
#[inline(always)]
fn look_up<const INSIDE: bool, H: Headers, P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &E,
    settings: &Settings,
    offset: usize,
) -> Option<Outcome> {
    // Of what came through a tunnel it is known that all of it is there, in one piece or in several.
    let frame_bytes = if INSIDE {
        packet.frame_len()
    } else {
        packet.linear_len()
    };
    let headers = packet.header::<H>(offset).ok()?;
    let ip = headers.ip()?;
    if offset + EthernetHeader::LEN + ip.total_len as usize > frame_bytes {
        return None;
    }
    let transport_len = ip.total_len - H::NETWORK_LEN as u32;
    let is_tcp = ip.protocol == PROTOCOL_TCP;
    if is_tcp {
        if transport_len < TcpHeader::LEN as u32 {
            return None;
        }
    } else {
        let claimed = u32::from(headers.udp().len.get());
        if ip.protocol != PROTOCOL_UDP || claimed < UdpHeader::LEN as u32 || claimed > transport_len {
            return None;
        }
        // Outer packets are not of flows.
        let port = headers.udp().destination_port;
        if !INSIDE
            && settings.flags & flag::TUNNELS != 0
            && tables.tunnel_port(port.get())?.kind != TunnelKind::NONE
        {
            return None;
        }
    }

    let is_opening_or_closing = is_tcp && headers.tcp().flags & (FLAG_SYN | FLAG_FIN | FLAG_RST) != 0;
    let is_seldom = is_opening_or_closing || ip.ttl <= 1;
    let key = headers.key(ip.protocol);
    let filters = &settings.filters;
    let is_known = filters.vips.may_have(headers.destination())
        || (filters.dnat_backends.may_have(headers.source()) && headers.pool_flow(&settings.pool).is_none());
    let is_looked_up = is_known && !is_seldom;
    let fingerprint = H::fingerprint(&key);
    let mut hint = Hint::NONE;
    if is_looked_up && let Some(hints) = tables.hints(fingerprint) {
        hint = hints.find(fingerprint);
    }
    if hint == Hint::NONE {
        if is_looked_up && let Some(reference) = H::reference(tables, &key) {
            hint = Hint::new(fingerprint, reference.id, reference.direction);
            if let Some(hints) = tables.hints(fingerprint) {
                hints.note(hint);
            }
        } else {
            match headers.pool_flow(&settings.pool) {
                Some(id) if !is_seldom => hint = Hint::new(fingerprint, id?, Direction::REPLY),
                None if !INSIDE && !is_known && headers.has_ports() => {
                    let outcome = Stop::pass(Reason::NOT_OURS).0;
                    tables.count_reason(outcome.reason, frame_bytes);
                    return Some(outcome);
                }
                _ => return None,
            }
        }
    }
    let id = hint.id();
    let arrival = Arrival {
        key,
        fingerprint,
        ip,
        frame_bytes,
        is_tcp,
    };
    if hint.direction() == Direction::REQUEST {
        let departing = carry::<INSIDE, true, H, T, E>(headers, tables, env, settings, id, &arrival)?;
        Some(leave::<INSIDE, true, P, T>(
            packet, tables, settings, offset, &departing,
        ))
    } else {
        let departing = carry::<INSIDE, false, H, T, E>(headers, tables, env, settings, id, &arrival)?;
        Some(leave::<INSIDE, false, P, T>(
            packet, tables, settings, offset, &departing,
        ))
    }
}

/// What was read of a packet.
struct Arrival<K> {
    key: K,
    fingerprint: Fingerprint,
    ip: Ip,
    frame_bytes: usize,
    is_tcp: bool,
}

/// A packet that is ready to leave, but for outer headers.
struct Departing {
    id: FlowId,
    listener: ListenerId,
    backend: BackendId,
    verdict: Verdict,
    /// The far end of the tunnel that it leaves through, if any.
    peer: PeerId,
    /// IP header and payload, in bytes.
    total_len: u32,
    frame_bytes: usize,
}

/// Makes of a packet of a flow what it becomes, if there is nothing about it to decide; `REQUEST`: for the backend, else
/// for the client.
#[inline(always)]
fn carry<const INSIDE: bool, const REQUEST: bool, H: Headers, T: Tables, E: Env>(
    headers: &mut H,
    tables: &mut T,
    env: &E,
    settings: &Settings,
    id: FlowId,
    arrival: &Arrival<H::Key>,
) -> Option<Departing> {
    let Arrival {
        key,
        fingerprint,
        ip,
        frame_bytes,
        is_tcp,
    } = arrival;
    let entry = tables.flow(id)?;
    if entry.state != FlowState::LIVE || H::key_of::<REQUEST>(&entry.binding) != *key {
        if let Some(hints) = tables.hints(*fingerprint) {
            hints.forget(*fingerprint);
        }
        return None;
    }
    if entry.binding.families != H::FAMILIES {
        return None;
    }
    let hop = if REQUEST {
        &entry.request_hop
    } else {
        &entry.reply_hop
    };
    let is_into_tunnel = !INSIDE && env.hook() == Hook::Xdp && hop.peer != 0;
    if hop.kind != HopKind::DIRECT
        || hop.generation != settings.route_generation
        || hop.hook != env.hook() as u8
        || !(hop.is_plain() || is_into_tunnel)
        || (hop.mtu_bytes != 0 && ip.total_len > u32::from(hop.mtu_bytes))
    {
        return None;
    }
    let direction = if REQUEST {
        Direction::REQUEST
    } else {
        Direction::REPLY
    };
    // No other flag comes this way, which spares what the others would mean.
    let has_ack = *is_tcp && headers.tcp().flags & FLAG_ACK != 0;
    let flags = if has_ack { FLAG_ACK } else { 0 };
    // What a backend answers first is counted, and the walk knows how.
    if (!REQUEST && entry.reply_packets == 0) || (*is_tcp && entry.tcp.after(direction, flags) != entry.tcp) {
        return None;
    }
    let checksum = if *is_tcp {
        headers.tcp().checksum
    } else {
        headers.udp().checksum
    };
    if settings.flags & flag::PARTIAL_CHECKSUMS != 0 && checksum.raw() == headers.pseudo_header(ip) {
        return None;
    }

    // From here on it goes. What is read of the entry is read before the packet is written: the compiler does not know
    // that these are different places.
    let departing = Departing {
        id,
        listener: entry.listener,
        backend: entry.backend,
        verdict: next_hop::verdict(env, hop),
        peer: PeerId(hop.peer as u16),
        total_len: ip.total_len,
        frame_bytes: *frame_bytes,
    };
    let link = hop.link.copied();
    if entry.seen == 0 {
        entry.seen = 1;
    }
    let bytes = u64::from(ip.total_len);
    if REQUEST {
        if has_ack {
            entry.client_expects = headers.tcp().acknowledgment;
        }
        entry.request_packets = entry.request_packets.wrapping_add(1);
        entry.request_bytes = entry.request_bytes.wrapping_add(bytes);
    } else {
        if has_ack {
            entry.backend_expects = headers.tcp().acknowledgment;
        }
        entry.reply_packets = entry.reply_packets.wrapping_add(1);
        entry.reply_bytes = entry.reply_bytes.wrapping_add(bytes);
    }
    rewrite::<REQUEST, H>(headers, entry, *is_tcp, checksum);
    if INSIDE {
        let ethertype = H::ETHERTYPE;
        *headers.ethernet() = EthernetHeader { link, ethertype };
    } else if departing.peer == PeerId::NONE {
        headers.ethernet().link = link;
    }
    Some(departing)
}

/// Takes off what is before `offset`, or puts a packet into its tunnel, if it has one, and counts it.
#[inline(always)]
fn leave<const INSIDE: bool, const REQUEST: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    offset: usize,
    departing: &Departing,
) -> Outcome {
    let Departing {
        id,
        listener,
        backend,
        verdict,
        peer,
        total_len,
        frame_bytes,
    } = *departing;
    let (direction, event, reason) = if REQUEST {
        (
            Direction::REQUEST,
            TrafficEvent::Request {
                bytes: total_len,
                reset: false,
            },
            Reason::REQUEST_FORWARDED,
        )
    } else {
        (
            Direction::REPLY,
            TrafficEvent::Reply {
                bytes: total_len,
                reset: false,
                first: false,
            },
            Reason::REPLY_FORWARDED,
        )
    };
    let moved = if INSIDE {
        packet.move_start(offset as i32)
    } else if peer != PeerId::NONE {
        let entrant = Entrant {
            id,
            direction,
            peer,
            total_len: total_len as u16,
        };
        packet.enter_tunnel(tables, settings, &entrant)
    } else {
        Ok(())
    };
    if let Err(Stop(outcome)) = moved {
        tables.count_reason(outcome.reason, frame_bytes);
        return outcome;
    }
    tables.count_listener(listener, event);
    tables.count_backend(backend, event);
    tables.count_reason(reason, frame_bytes);
    Outcome { verdict, reason }
}

/// New addresses, ports and checksums, and a hop less.
#[inline(always)]
fn rewrite<const REQUEST: bool, H: Headers>(
    headers: &mut H,
    entry: &FlowEntry,
    is_tcp: bool,
    checksum: Be16,
) {
    let binding = &entry.binding;
    let (source_port, destination_port, addresses, ports) = if REQUEST {
        (
            binding.snat_port,
            binding.backend_port,
            entry.address_delta,
            entry.port_delta,
        )
    } else {
        (
            binding.vip_port,
            binding.client_port,
            !entry.address_delta,
            !entry.port_delta,
        )
    };
    let (addresses, ports) = (u32::from(addresses), u32::from(ports));
    headers.rewrite::<REQUEST>(binding, addresses);
    let tcp = headers.tcp_mut();
    tcp.source_port = source_port;
    tcp.destination_port = destination_port;
    let new = sent(is_tcp, updated(checksum, addresses + ports));
    if is_tcp {
        tcp.checksum = new;
    } else if checksum != CHECKSUM_NONE {
        headers.udp_mut().checksum = new;
    }
}

/// A checksum after a change: `~(~HC + ~m + m')` (RFC 1624 §3). Of the change few enough words for 32 bits: the walk's
/// [`Delta`](checksum::Delta) folds it before.
#[inline(always)]
const fn updated(checksum: Be16, change: u32) -> Be16 {
    Be16::from_raw(checksum::finish(!checksum.raw() as u32 + change))
}

/// What both families have.
macro_rules! other_headers {
    () => {
        #[inline(always)]
        fn ethernet(&mut self) -> &mut EthernetHeader {
            &mut self.ethernet
        }

        #[inline(always)]
        fn tcp(&self) -> &TcpHeader {
            &self.tcp
        }

        #[inline(always)]
        fn tcp_mut(&mut self) -> &mut TcpHeader {
            &mut self.tcp
        }
    };
}

#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct HeadersV4 {
    ethernet: EthernetHeader,
    ip: Ipv4Header,
    tcp: TcpHeader,
}

impl WireHeader for HeadersV4 {}

/// The same, with what makes a key in one piece each.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KeyV4 {
    before: [u8; EthernetHeader::LEN + Ipv4Header::LEN - 8],
    addresses: [u8; 8],
    ports: [u8; 4],
    behind: [u8; TcpHeader::LEN - 4],
}

/// What a TTL that is one less changes in the sum of the IP header, whatever it was: `~m + m'` (RFC 1624 §3).
const HOP_LESS: u32 = 0xffff - u16::from_ne_bytes([1, 0]) as u32;

impl Headers for HeadersV4 {
    type Key = FlowKeyV4;
    const ETHERTYPE: Be16 = ETHERTYPE_IPV4;
    const NETWORK_LEN: usize = Ipv4Header::LEN;
    const FAMILIES: u32 = FlowBinding::BOTH_V4;

    #[inline(always)]
    fn ip(&self) -> Option<Ip> {
        let ip = self.ip;
        let total_len = u32::from(ip.total_len.get());
        if ip.version_ihl != 0x45 || ip.is_fragment() || total_len < Ipv4Header::LEN as u32 {
            return None;
        }
        Some(Ip {
            total_len,
            protocol: ip.protocol,
            ttl: ip.ttl,
        })
    }

    #[inline(always)]
    fn source(&self) -> IpAddress {
        IpAddress::from_v4(self.ip.source)
    }

    #[inline(always)]
    fn destination(&self) -> IpAddress {
        IpAddress::from_v4(self.ip.destination)
    }

    #[inline(always)]
    fn key(&self, protocol: u8) -> FlowKeyV4 {
        let KeyV4 { addresses, ports, .. } = *bytemuck::cast_ref(self);
        FlowKeyV4::new(addresses, ports, protocol)
    }

    #[inline(always)]
    fn fingerprint(key: &FlowKeyV4) -> Fingerprint {
        Fingerprint::of_v4(key)
    }

    #[inline(always)]
    fn reference<'t, T: Tables>(tables: &'t T, key: &FlowKeyV4) -> Option<&'t FlowReference> {
        tables.flow_reference_v4(key)
    }

    #[inline(always)]
    fn pool_flow(&self, pool: &SnatPool) -> Option<Option<FlowId>> {
        pool.flow_v4(self.ip.destination, self.tcp.destination_port)
    }

    #[inline(always)]
    fn key_of<const REQUEST: bool>(binding: &FlowBinding) -> FlowKeyV4 {
        if REQUEST {
            binding.request_key_v4()
        } else {
            binding.reply_key_v4()
        }
    }

    #[inline(always)]
    fn pseudo_header(&self, ip: &Ip) -> u16 {
        let header = self.ip;
        checksum::fold(checksum::pseudo_header_v4(
            header.source,
            header.destination,
            ip.protocol,
            ip.total_len - Ipv4Header::LEN as u32,
        ))
    }

    #[inline(always)]
    fn rewrite<const REQUEST: bool>(&mut self, binding: &FlowBinding, addresses: u32) {
        let (source, destination) = if REQUEST {
            (binding.snat.low(), binding.backend.low())
        } else {
            (binding.vip.low(), binding.client.low())
        };
        self.ip.source = source;
        self.ip.destination = destination;
        self.ip.ttl -= 1;
        self.ip.checksum = updated(self.ip.checksum, addresses + HOP_LESS);
    }

    other_headers!();
}

#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct HeadersV6 {
    ethernet: EthernetHeader,
    ip: Ipv6Header,
    tcp: TcpHeader,
}

impl WireHeader for HeadersV6 {}

impl Headers for HeadersV6 {
    type Key = FlowKey;
    const ETHERTYPE: Be16 = ETHERTYPE_IPV6;
    const NETWORK_LEN: usize = Ipv6Header::LEN;
    const FAMILIES: u32 = FlowBinding::BOTH_V6;

    #[inline(always)]
    fn ip(&self) -> Option<Ip> {
        let ip = &self.ip;
        // Mapped addresses are for the walk to refuse.
        if ip.version() != 6 || ip.source().is_v4() || ip.destination().is_v4() {
            return None;
        }
        Some(Ip {
            total_len: Ipv6Header::LEN as u32 + u32::from(ip.payload_len.get()),
            protocol: ip.next_header,
            ttl: ip.hop_limit,
        })
    }

    #[inline(always)]
    fn source(&self) -> IpAddress {
        self.ip.source()
    }

    #[inline(always)]
    fn destination(&self) -> IpAddress {
        self.ip.destination()
    }

    #[inline(always)]
    fn key(&self, protocol: u8) -> FlowKey {
        FlowKey {
            source: self.ip.source(),
            destination: self.ip.destination(),
            source_port: self.tcp.source_port,
            destination_port: self.tcp.destination_port,
            protocol: u32::from(protocol),
        }
    }

    #[inline(always)]
    fn fingerprint(key: &FlowKey) -> Fingerprint {
        Fingerprint::of(key)
    }

    #[inline(always)]
    fn reference<'t, T: Tables>(tables: &'t T, key: &FlowKey) -> Option<&'t FlowReference> {
        tables.flow_reference_v6(key)
    }

    #[inline(always)]
    fn pool_flow(&self, pool: &SnatPool) -> Option<Option<FlowId>> {
        pool.flow_v6(SnatBinding {
            address: self.ip.destination(),
            port: self.tcp.destination_port,
        })
    }

    #[inline(always)]
    fn key_of<const REQUEST: bool>(binding: &FlowBinding) -> FlowKey {
        if REQUEST {
            binding.request_key()
        } else {
            binding.reply_key()
        }
    }

    #[inline(always)]
    fn pseudo_header(&self, ip: &Ip) -> u16 {
        checksum::fold(checksum::pseudo_header(
            self.ip.source(),
            self.ip.destination(),
            ip.protocol,
            ip.total_len - Ipv6Header::LEN as u32,
        ))
    }

    #[inline(always)]
    fn rewrite<const REQUEST: bool>(&mut self, binding: &FlowBinding, _addresses: u32) {
        let (source, destination) = if REQUEST {
            (&binding.snat, &binding.backend)
        } else {
            (&binding.vip, &binding.client)
        };
        self.ip.set_addresses(source, destination);
        self.ip.hop_limit -= 1;
    }

    other_headers!();
}
