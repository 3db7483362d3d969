//! Tunnels in the data path: what is inside a packet of ours, and putting headers in front of one.
//!
//! [`recognise`] only reads. The walk then looks at the inner packet where it stands; the outer headers are taken off
//! when the packet is sent on (`rewrite::leave`, or [`encapsulate`] when it goes into another tunnel), so a packet that
//! turns out to be somebody else's reaches the kernel's device as it came. What is not exactly what a tunnel of ours
//! sends (options that must be understood, checksums in GRE, fragments) is left to the kernel as well.
//!
//! Outer UDP checksums of what comes in are not checked: RFC 7348 §4.1 and RFC 8926 §3.3 leave it open, and the inner
//! packet has its own. Those of what goes out are computed without walking the payload: an inner TCP or UDP packet
//! with a right checksum sums to a number that its headers tell (Linux calls that local checksum offload).
//!
//! The ECN field follows RFC 6040: copied on the way in, and a mark of congestion is carried over on the way out. The
//! kernel's devices do the same but for one thing: they write ECT(0) outside where there is a mark inside.

use bytemuck::{Pod, Zeroable};

use super::{
    Packet, Stop, Tables, Walk,
    fragment::part,
    hash, parse,
    rewrite::{Tags, write_link},
    transport_checksum,
};
use crate::{
    abi::{
        flow::{Direction, FlowBinding, FlowId},
        reason::Reason,
        settings::Settings,
        tunnel::{OUTER_BLOCK_LEN, PeerId, TunnelEndpointKey, TunnelKind, TunnelPeer, peer_flag},
    },
    wire::{
        Be16, Be32, Field16, IpAddress, LinkPair, WireHeader, checksum,
        checksum::{Delta, finish, fold},
        ethernet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader},
        ipv4::{Ipv4Header, PROTOCOL_TCP, PROTOCOL_UDP},
        ipv6::{Ipv6Header, NEXT_DESTINATION, TunnelLimit},
        tunnel::{
            ETHERTYPE_BRIDGED, GeneveHeader, GreHeader, GreKey, GueHeader, PROTOCOL_GRE, PROTOCOL_IPIP,
            PROTOCOL_IPV6, VxlanHeader,
        },
        udp::{self, CHECKSUM_NONE, UdpHeader},
    },
};

/// RFC 3168 §5: the ECN field in the type of service.
const ECN: u8 = 0x03;
/// RFC 3168 §5: the sender does not know of ECN.
const ECN_NOT_ECT: u8 = 0x00;
/// RFC 3168 §5: ECT(1).
const ECN_ECT_1: u8 = 0x01;
/// RFC 3168 §5: congestion experienced.
const ECN_CE: u8 = 0x03;

/// A packet inside one of our tunnels.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Inside {
    /// Link addresses of the outer frame.
    pub link: LinkPair,
    /// Where the inner IP header starts, in bytes from the frame's start; zero: the packet is in none.
    pub network_offset: u32,
    /// The tunnel device; zero where there is none.
    pub ifindex: u32,
    /// Largest IP packet that the tunnel carries, in bytes.
    pub mtu_bytes: u32,
    /// What kind of packet the inner one is.
    pub ethertype: Be16,
    /// The outer packet's type of service.
    pub outer_tos: u8,
    pub reserved: [u8; 5],
}

impl Inside {
    /// Does the walk look into a tunnel?
    #[inline(always)]
    pub const fn is_tunnel(&self) -> bool {
        self.network_offset != 0
    }
}

/// An IP packet that may carry another.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Outer {
    source: IpAddress,
    destination: IpAddress,
    protocol: u8,
    tos: u8,
    /// Where its payload starts and ends, in bytes from the frame's start.
    payload: usize,
    end: usize,
}

/// What the headers behind the outer IP header say.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Carried {
    /// As in the key of the endpoint.
    id: Be32,
    port: Be16,
    kind: TunnelKind,
    detail: u8,
    /// What follows: IPv4, IPv6 or Ethernet.
    ethertype: Be16,
    /// Where it starts, in bytes from the frame's start.
    offset: usize,
}

/// Looks whether the frame is a packet of one of our tunnels, and notes in the walk what is inside. Its length fields
/// were checked then, outer and inner.
#[inline(always)]
pub fn recognise<P: Packet, T: Tables>(packet: &mut P, tables: &T, walk: &mut Walk) {
    walk.inside.network_offset = 0;
    let Ok(ethertype) = parse::link(packet, &mut walk.frame) else {
        return;
    };
    let network_offset = walk.frame.network_offset as usize;
    // Whatever cannot be read is none of ours.
    let _ = look_inside(packet, tables, ethertype, network_offset, &mut walk.inside);
}

#[inline(always)]
fn look_inside<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ethertype: Be16,
    network_offset: usize,
    inside: &mut Inside,
) -> Option<()> {
    let outer = match ethertype {
        ETHERTYPE_IPV4 => outer_v4(packet, network_offset)?,
        ETHERTYPE_IPV6 => outer_v6(packet, network_offset)?,
        _ => return None,
    };
    let carried = match outer.protocol {
        PROTOCOL_UDP => in_udp(packet, tables, &outer)?,
        PROTOCOL_GRE => in_gre(packet, &outer)?,
        protocol => Carried {
            id: Be32::new(0),
            port: Be16::ZERO,
            kind: TunnelKind::IPIP,
            detail: protocol,
            ethertype: ethertype_of(protocol)?,
            offset: outer.payload,
        },
    };
    let remote = if carried.kind == TunnelKind::VXLAN {
        IpAddress::UNSPECIFIED
    } else {
        outer.source
    };
    let endpoint = *tables.tunnel_endpoint(&TunnelEndpointKey {
        local: outer.destination,
        remote,
        id: carried.id,
        port: carried.port,
        kind: carried.kind,
        detail: carried.detail,
    })?;
    let (ethertype, network_offset) = if carried.kind.is_ethernet() {
        let inner = packet.header::<EthernetHeader>(carried.offset).ok()?;
        if inner.link.destination() != endpoint.mac {
            return None;
        }
        (inner.ethertype, carried.offset + EthernetHeader::LEN)
    } else {
        (carried.ethertype, carried.offset)
    };
    let total_len = match ethertype {
        ETHERTYPE_IPV4 => packet.header::<Ipv4Header>(network_offset).ok()?.total_len.get() as usize,
        ETHERTYPE_IPV6 => {
            let payload_len = packet.header::<Ipv6Header>(network_offset).ok()?.payload_len;
            Ipv6Header::LEN + payload_len.get() as usize
        }
        _ => return None,
    };
    if network_offset + total_len > outer.end {
        return None;
    }
    inside.link = packet.header::<EthernetHeader>(0).ok()?.link();
    inside.ethertype = ethertype;
    inside.outer_tos = outer.tos;
    inside.ifindex = endpoint.ifindex;
    inside.mtu_bytes = endpoint.mtu_bytes;
    inside.network_offset = network_offset as u32;
    Some(())
}

/// What an IP protocol number says of what is inside.
#[inline(always)]
const fn ethertype_of(protocol: u8) -> Option<Be16> {
    match protocol {
        PROTOCOL_IPIP => Some(ETHERTYPE_IPV4),
        PROTOCOL_IPV6 => Some(ETHERTYPE_IPV6),
        _ => None,
    }
}

/// An IPv4 packet; fragments are left to the kernel, which puts them together first.
#[inline(always)]
fn outer_v4<P: Packet>(packet: &mut P, network_offset: usize) -> Option<Outer> {
    let frame_len = packet.frame_len();
    let ip = packet.header::<Ipv4Header>(network_offset).ok()?;
    let end = network_offset + ip.total_len.get() as usize;
    if ip.version_ihl != 0x45 || ip.is_fragment() || end > frame_len {
        return None;
    }
    Some(Outer {
        source: IpAddress::from_v4(ip.source),
        destination: IpAddress::from_v4(ip.destination),
        protocol: ip.protocol,
        tos: ip.tos,
        payload: network_offset + Ipv4Header::LEN,
        end,
    })
}

/// An IPv6 packet, at most with the option that Linux sends by default: how deep tunnels may be nested.
#[inline(always)]
fn outer_v6<P: Packet>(packet: &mut P, network_offset: usize) -> Option<Outer> {
    let frame_len = packet.frame_len();
    let ip = packet.header::<Ipv6Header>(network_offset).ok()?;
    let end = network_offset + Ipv6Header::LEN + ip.payload_len.get() as usize;
    if ip.version() != 6 || end > frame_len {
        return None;
    }
    let mut outer = Outer {
        source: ip.source,
        destination: ip.destination,
        protocol: ip.next_header,
        tos: ip.traffic_class(),
        payload: network_offset + Ipv6Header::LEN,
        end,
    };
    if outer.protocol == NEXT_DESTINATION {
        let limit = packet.header::<TunnelLimit>(outer.payload).ok()?;
        if !limit.is_alone() {
            return None;
        }
        outer.protocol = limit.next_header;
        outer.payload += TunnelLimit::LEN;
    }
    Some(outer)
}

#[inline(always)]
fn in_udp<P: Packet, T: Tables>(packet: &mut P, tables: &T, outer: &Outer) -> Option<Carried> {
    let udp = packet.header::<UdpHeader>(outer.payload).ok()?;
    let (port, len) = (udp.destination_port, udp.len.get() as usize);
    let meaning = tables.tunnel_port(port.get())?;
    if meaning.kind == TunnelKind::NONE || outer.payload + len != outer.end {
        return None;
    }
    let offset = outer.payload + UdpHeader::LEN;
    let carried = |id, detail, ethertype, offset| Carried {
        id,
        port,
        kind: meaning.kind,
        detail,
        ethertype,
        offset,
    };
    match meaning.kind {
        TunnelKind::VXLAN => {
            let vxlan = packet.header::<VxlanHeader>(offset).ok()?;
            // A set bit that the kernel's device was not told of makes it drop the packet; so that is its business.
            let (flags, vni) = (vxlan.flags, vxlan.vni);
            if flags != VxlanHeader::FLAG_VNI || vni.get() & 0xff != 0 {
                return None;
            }
            Some(carried(vni, 0, ETHERTYPE_BRIDGED, offset + VxlanHeader::LEN))
        }
        TunnelKind::GENEVE => {
            let geneve = packet.header::<GeneveHeader>(offset).ok()?;
            let (protocol, vni) = (geneve.protocol, geneve.vni);
            let unknown = GeneveHeader::FLAG_CONTROL | GeneveHeader::FLAG_CRITICAL;
            if geneve.version() != 0
                || geneve.flags & unknown != 0
                || protocol != ETHERTYPE_BRIDGED
                || vni.get() & 0xff != 0
            {
                return None;
            }
            let offset = offset + GeneveHeader::LEN + geneve.options_len();
            Some(carried(vni, 0, ETHERTYPE_BRIDGED, offset))
        }
        _ => {
            let gue = *packet.header::<GueHeader>(offset).ok()?;
            if meaning.kind == TunnelKind::GUE && gue.version_len == 0 && { gue.flags } == Be16::ZERO {
                let (protocol, offset) = (gue.protocol, offset + GueHeader::LEN);
                return Some(carried(Be32::new(0), protocol, ethertype_of(protocol)?, offset));
            }
            // FOU, and version 1 of GUE: the first bits are those of an IP header.
            let protocol = match gue.version_len >> 4 {
                4 => PROTOCOL_IPIP,
                6 => PROTOCOL_IPV6,
                _ => return None,
            };
            Some(carried(Be32::new(0), protocol, ethertype_of(protocol)?, offset))
        }
    }
}

#[inline(always)]
fn in_gre<P: Packet>(packet: &mut P, outer: &Outer) -> Option<Carried> {
    let gre = packet.header::<GreHeader>(outer.payload).ok()?;
    let (flags, ethertype) = (gre.flags, gre.protocol);
    let mut offset = outer.payload + GreHeader::LEN;
    let (id, detail) = match flags {
        GreHeader::FLAG_KEY => {
            let key = packet.header::<GreKey>(offset).ok()?.key;
            offset += GreKey::LEN;
            (key, 1)
        }
        Be16::ZERO => (Be32::new(0), 0),
        _ => return None,
    };
    let kind = if ethertype == ETHERTYPE_BRIDGED {
        TunnelKind::GRETAP
    } else {
        TunnelKind::GRE
    };
    Some(Carried {
        id,
        port: Be16::ZERO,
        kind,
        detail,
        ethertype,
        offset,
    })
}

/// May a packet with these two types of service leave its tunnel?
///
/// # Errors
/// [`Reason::CONGESTION_UNHEARD`]: RFC 6040 §4.2, the network marked congestion, and the inner packet's sender does not look
/// at such marks, so the packet must be dropped instead.
#[inline(always)]
pub const fn check_congestion(inner_tos: u8, outer_tos: u8) -> Result<(), Stop> {
    if inner_tos & ECN == ECN_NOT_ECT && outer_tos & ECN == ECN_CE {
        Err(Stop::drop(Reason::CONGESTION_UNHEARD))
    } else {
        Ok(())
    }
}

/// The inner packet's type of service behind the tunnel (RFC 6040 §4.2).
#[inline(always)]
pub const fn decapsulated_tos(inner_tos: u8, outer_tos: u8) -> u8 {
    match (inner_tos & ECN, outer_tos & ECN) {
        (ECN_NOT_ECT, _) | (ECN_CE, _) => inner_tos,
        (_, ECN_CE) => inner_tos | ECN_CE,
        (_, ECN_ECT_1) => inner_tos & !ECN | ECN_ECT_1,
        (_, _) => inner_tos,
    }
}

/// Can the outer packet's type of service change the inner one's ([`decapsulated_tos`]), or its end ([`check_congestion`])?
/// Not with ECT(0), nor without ECN.
#[inline(always)]
pub const fn may_carry_congestion(outer_tos: u8) -> bool {
    // Of ECT(1) and CE.
    outer_tos & ECN_ECT_1 != 0
}

/// Carries a mark of congestion from the outer packet over to the inner one.
#[inline(always)]
pub fn carry_congestion<P: Packet>(packet: &mut P, inside: &Inside) -> Result<(), Stop> {
    let offset = inside.network_offset as usize;
    if inside.ethertype == ETHERTYPE_IPV4 {
        let ip = packet.header::<Ipv4Header>(offset)?;
        let old = ip.tos_word();
        ip.tos = decapsulated_tos(ip.tos, inside.outer_tos);
        ip.checksum = Delta::ZERO.replace_raw(old, ip.tos_word()).apply(ip.checksum);
    } else {
        let ip = packet.header::<Ipv6Header>(offset)?;
        let tos = decapsulated_tos(ip.traffic_class(), inside.outer_tos);
        ip.version_class_flow = Ipv6Header::first_word(tos, ip.flow_label());
    }
    Ok(())
}

/// What the outer headers take from the inner packet.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Carrier {
    tos: u8,
    ttl: u8,
    /// Non-zero: the inner packet is not to be fragmented.
    dont_fragment: u8,
    version: u8,
    identification: u16,
}

impl Carrier {
    #[inline(always)]
    fn of<P: Packet>(packet: &mut P, network_offset: usize) -> Result<Self, Stop> {
        let ip = packet.header::<Ipv4Header>(network_offset)?;
        if ip.version() == 4 {
            return Ok(Self {
                tos: ip.tos,
                ttl: ip.ttl,
                dont_fragment: u8::from(ip.dont_fragment()),
                version: 4,
                // The fragments of one packet share a number.
                identification: ip.identification.raw() ^ ip.fragment.raw().rotate_left(5),
            });
        }
        let ip = packet.header::<Ipv6Header>(network_offset)?;
        Ok(Self {
            tos: ip.traffic_class(),
            ttl: ip.hop_limit,
            dont_fragment: 1,
            version: 6,
            identification: 0,
        })
    }
}

/// A packet about to be put into a tunnel.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inner {
    /// Where its IP header and its transport header start, in bytes from the frame's start.
    pub network_offset: usize,
    pub transport_offset: usize,
    /// IP header and payload, in bytes.
    pub total_len: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Is it one of several fragments?
    pub is_fragment: bool,
    /// The same for all packets of the flow, so that they take one way.
    pub hash: u32,
}

/// So many bytes of outer headers.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Block([u32; OUTER_BLOCK_LEN / 4]);

impl WireHeader for Block {}

impl Block {
    /// Word by word: an assignment of the whole would become a loop over bytes.
    #[inline(always)]
    const fn set(&mut self, words: &[u32; OUTER_BLOCK_LEN / 4]) {
        let mut number = 0;
        while number < words.len() {
            self.0[number] = words[number];
            number += 1;
        }
    }
}

/// Puts the walk's rewritten packet into the tunnel of its next hop.
///
/// # Errors
/// [`Reason::INTERNAL`] when there is no room or no such peer.
#[inline(always)]
pub fn encapsulate<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    settings: &Settings,
    walk: &Walk,
) -> Result<(), Stop> {
    let (frame, hop) = (&walk.frame, &walk.hit.hop);
    let peer = tables
        .tunnel_peer(PeerId(hop.peer as u16))
        .ok_or(Stop::drop(Reason::INTERNAL))?;
    let inner = Inner {
        network_offset: frame.network_offset as usize,
        transport_offset: frame.transport_offset as usize,
        total_len: frame.total_len as u16,
        protocol: frame.key.protocol as u8,
        is_fragment: frame.fragment != part::WHOLE,
        hash: hash::flow_hash(&frame.key, settings.hash_seed),
    };
    push(packet, peer, hop.link, hop.tags(), &inner)
}

/// A packet of the short way, rewritten, that is about to leave through a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entrant {
    /// Its flow, and its direction in it.
    pub id: FlowId,
    pub direction: Direction,
    /// Its next hop's.
    pub peer: PeerId,
    /// IP header and payload, in bytes.
    pub total_len: u16,
}

/// [`encapsulate`] for a packet of the short way, whose headers have one place.
///
/// # Errors
/// As [`encapsulate`].
#[inline(always)]
pub fn enter<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    entrant: &Entrant,
) -> Result<(), Stop> {
    let broken = Stop::drop(Reason::INTERNAL);
    let entry = tables.flow(entrant.id).ok_or(broken)?;
    let binding = &entry.binding;
    let (hop, hash) = if entrant.direction == Direction::REQUEST {
        let key = binding.request_key();
        (&entry.request_hop, hash::flow_hash(&key, settings.hash_seed))
    } else {
        let key = binding.reply_key();
        (&entry.reply_hop, hash::flow_hash(&key, settings.hash_seed))
    };
    let network_len = if binding.families == FlowBinding::BOTH_V4 {
        Ipv4Header::LEN
    } else {
        Ipv6Header::LEN
    };
    let inner = Inner {
        network_offset: EthernetHeader::LEN,
        transport_offset: EthernetHeader::LEN + network_len,
        total_len: entrant.total_len,
        protocol: binding.protocol as u8,
        is_fragment: false,
        hash,
    };
    let (link, tags) = (hop.link.copied(), hop.tags());
    let peer = tables.tunnel_peer(entrant.peer).ok_or(broken)?;
    push(packet, peer, link, tags, &inner)
}

/// Puts the headers of `peer` in front of the inner packet, in a frame with these link addresses and tags. What stood
/// in front of the inner packet is gone.
///
/// # Errors
/// As [`encapsulate`].
#[inline(always)]
pub fn push<P: Packet>(
    packet: &mut P,
    peer: &TunnelPeer,
    link: LinkPair,
    tags: Tags,
    inner: &Inner,
) -> Result<(), Stop> {
    let carrier = Carrier::of(packet, inner.network_offset)?;
    let is_v6 = peer.flags & peer_flag::IPV6 != 0;
    let has_checksum = peer.flags & peer_flag::UDP_CHECKSUM != 0;
    let payload_sum = if has_checksum {
        sum(packet, inner, &carrier)?
    } else {
        0
    };
    let distinct = distinct_word(packet, inner)?;

    let outer_len = peer.outer_len as usize;
    if outer_len < OUTER_BLOCK_LEN {
        return Err(Stop::drop(Reason::INTERNAL));
    }
    let start = tags.link_len();
    packet.move_start(inner.network_offset as i32 - (start + outer_len) as i32)?;
    write_link(packet, link, tags, !is_v6)?;
    for (number, block) in peer.outer.iter().enumerate() {
        let end = (number + 1) * OUTER_BLOCK_LEN;
        if end <= outer_len {
            packet.header::<Block>(start + end - OUTER_BLOCK_LEN)?.set(block);
        }
    }
    packet
        .header::<Block>(start + outer_len - OUTER_BLOCK_LEN)?
        .set(&peer.outer_end);

    let dscp = if peer.flags & peer_flag::INHERIT_DSCP != 0 {
        carrier.tos
    } else {
        peer.tos
    };
    // RFC 6040 §4.1: normal mode.
    let tos = dscp & !ECN | carrier.tos & ECN;
    let ttl = if peer.ttl == 0 { carrier.ttl } else { peer.ttl };
    let ip_len = if is_v6 { Ipv6Header::LEN } else { Ipv4Header::LEN };
    let udp_len = outer_len - ip_len + inner.total_len as usize;
    if is_v6 {
        let label = if peer.flags & peer_flag::HASH_FLOW_LABEL != 0 {
            inner.hash
        } else {
            peer.flow_label
        };
        let ip = packet.header::<Ipv6Header>(start)?;
        ip.version_class_flow = Ipv6Header::first_word(tos, label);
        ip.payload_len = Be16::new(udp_len as u16);
        ip.hop_limit = ttl;
    } else {
        let ip = packet.header::<Ipv4Header>(start)?;
        ip.tos = tos;
        ip.ttl = ttl;
        ip.total_len = Be16::new((ip_len + udp_len) as u16);
        let mut sum = u32::from(peer.ip_sum);
        if peer.flags & peer_flag::INHERIT_DONT_FRAGMENT != 0 && carrier.dont_fragment != 0 {
            ip.fragment = Ipv4Header::DONT_FRAGMENT;
            sum += u32::from(ip.fragment.raw());
        }
        if !ip.dont_fragment() {
            ip.identification = Be16::from_raw(carrier.identification ^ distinct);
        }
        // Zero where the peer's sum was taken.
        sum += u32::from(u16::from_ne_bytes([0, tos])) + u32::from(u16::from_ne_bytes([ttl, 0]));
        sum += u32::from(ip.total_len.raw()) + u32::from(ip.identification.raw());
        ip.checksum = Be16::from_raw(finish(sum));
    }
    if peer.source_ports == 0 {
        return Ok(());
    }
    let udp = packet.header::<UdpHeader>(start + ip_len)?;
    let port = u32::from(peer.source_port) + (inner.hash >> 16) * u32::from(peer.source_ports) / 0x1_0000;
    udp.source_port = Be16::new(port as u16);
    udp.len = Be16::new(udp_len as u16);
    if has_checksum {
        // The length counts twice: in the header and in the pseudo-header.
        let sum = u32::from(peer.udp_sum) + payload_sum + u32::from(udp.source_port.raw());
        let checksum = finish(sum + 2 * u32::from(udp.len.raw()));
        udp.checksum = udp::computed(Be16::from_raw(checksum));
    }
    Ok(())
}

/// Takes off what stands in front of the inner packet, for the stack, to which it is as if it had come without a
/// tunnel.
#[inline(always)]
pub fn strip<P: Packet>(packet: &mut P, inside: &Inside) -> Result<(), Stop> {
    packet.move_start(inside.network_offset as i32 - EthernetHeader::LEN as i32)?;
    write_link(
        packet,
        inside.link,
        Tags::NONE,
        inside.ethertype == ETHERTYPE_IPV4,
    )
}

/// A word that differs between packets of a flow: their transport checksum, which covers sequence numbers and payload.
#[inline(always)]
fn distinct_word<P: Packet>(packet: &mut P, inner: &Inner) -> Result<u16, Stop> {
    if inner.is_fragment {
        return Ok(0);
    }
    let offset = match inner.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP => transport_checksum::offset(inner.protocol == PROTOCOL_TCP),
        _ => 2,
    };
    Ok(packet
        .header::<Field16>(inner.transport_offset + offset)?
        .value
        .raw())
}

/// Sum of the whole inner packet in machine order.
#[inline(always)]
fn sum<P: Packet>(packet: &mut P, inner: &Inner, carrier: &Carrier) -> Result<u32, Stop> {
    if let Some(sum) = sum_by_headers(packet, inner, carrier)? {
        return Ok(sum);
    }
    packet.sum(inner.network_offset, inner.total_len as usize)
}

/// The same by the headers alone: a segment with a right checksum sums to the complement of its pseudo-header, an IPv4
/// header with a right one to nothing. `None`: the packet has none, or is of another kind.
#[inline(always)]
fn sum_by_headers<P: Packet>(packet: &mut P, inner: &Inner, carrier: &Carrier) -> Result<Option<u32>, Stop> {
    let header_len = inner.transport_offset - inner.network_offset;
    let is_known = match inner.protocol {
        _ if inner.is_fragment => false,
        PROTOCOL_TCP => true,
        PROTOCOL_UDP => {
            let checksum = packet.header::<UdpHeader>(inner.transport_offset)?.checksum;
            checksum != CHECKSUM_NONE
        }
        _ => false,
    };
    if !is_known {
        return Ok(None);
    }
    let transport_len = inner.total_len - header_len as u16;
    if carrier.version == 4 {
        let ip = packet.header::<Ipv4Header>(inner.network_offset)?;
        let pseudo = checksum::pseudo_header(
            ip.source.into(),
            ip.destination.into(),
            inner.protocol,
            u32::from(transport_len),
        );
        return Ok((header_len == Ipv4Header::LEN).then(|| u32::from(finish(pseudo))));
    }
    let ip = packet.header::<Ipv6Header>(inner.network_offset)?;
    // Addresses and length stand in the header as in the pseudo-header, so they cancel out.
    let first_word = ip.version_class_flow.raw();
    let rest = (first_word & 0xffff) + (first_word >> 16) + u32::from(u16::from_ne_bytes([0, ip.hop_limit]));
    let protocol = u32::from(u16::from_ne_bytes([ip.next_header, 0]));
    let pseudo = u32::from(u16::from_ne_bytes([0, inner.protocol]));
    Ok((header_len == Ipv6Header::LEN).then(|| rest + protocol + u32::from(!fold(pseudo))))
}
