//! Bytes to meaning: what kind of packet, and where its parts are.
//!
//! Only reads. Length fields are checked against each other and against the frame, so later stages need not.
//! What cannot be read is left to the stack, unchanged: the kernel knows best what to do with it.
//!
//! Read over: up to two VLAN tags, IPv4 options, and of IPv6 up to three extension headers of options. Routing headers,
//! IPsec and the like pass by name: translating under them would break what they protect or promise.

use bytemuck::{Pod, Zeroable};

use super::{Packet, Stop, Walk, fragment::part, rewrite::Tags, sctp, tcp_state};
use crate::{
    abi::{flow::FlowKey, reason::Reason},
    wire::{
        Be16, Be32, IpAddress, WireHeader,
        ethernet::{
            ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN,
            EthernetHeader, VlanTag,
        },
        icmp::{IcmpHeader, TYPE_NEIGHBOUR_SOLICITATION},
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP},
        ipv6::{
            ExtensionHeader, FragmentHeader, Ipv6Header, NEXT_AH, NEXT_DESTINATION, NEXT_ESP, NEXT_FRAGMENT,
            NEXT_HOP_BY_HOP, NEXT_MOBILITY, NEXT_NONE, NEXT_ROUTING, PROTOCOL_ICMPV6,
        },
        sctp::SctpHeader,
        tcp::TcpHeader,
        udp::UdpHeader,
    },
};

/// Extension headers that are read over. RFC 8200 §4.1 recommends an order with at most three of options.
const EXTENSIONS: usize = 3;

/// A packet: its flow key, and where its parts are, in bytes from the frame's start.
///
/// A plain struct of numbers, as in the kernel it stands in a map (see [`super::Walk`]).
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Frame {
    pub key: FlowKey,
    /// Where the IP header starts.
    pub network_offset: u32,
    /// Where TCP, UDP, SCTP or ICMP starts.
    pub transport_offset: u32,
    /// IP header and payload, in bytes.
    pub total_len: u32,
    /// Transport header and payload, in bytes.
    pub transport_len: u32,
    /// The acknowledgment number of TCP, the verification tag of SCTP; without a meaning unless the ACK flag is set.
    pub acknowledgment: Be32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Of SCTP those that mean the same ([`sctp::flags`]); of other protocols zero.
    pub tcp_flags: u8,
    /// TOS or traffic class.
    pub tos: u8,
    /// Non-zero: no router may fragment it (RFC 791 §2.3, RFC 8200 §5).
    pub is_whole: u8,
    /// VLAN tags, the outer one first; zero identifiers where there are none.
    pub vlans: [Be16; 2],
    pub vlan_count: u32,
    /// One of [`part`].
    pub fragment: u32,
    /// What fragments of one packet share; zero in whole packets.
    pub identification: Be32,
}

impl Frame {
    /// Is this TCP?
    #[inline(always)]
    pub const fn is_tcp(&self) -> bool {
        self.key.protocol == PROTOCOL_TCP as u32
    }

    /// Is this SCTP?
    #[inline(always)]
    pub const fn is_sctp(&self) -> bool {
        self.key.protocol == PROTOCOL_SCTP as u32
    }

    /// Is this TCP or UDP, as most packets are?
    #[inline(always)]
    pub const fn is_usual(&self) -> bool {
        self.is_tcp() || self.key.protocol == PROTOCOL_UDP as u32
    }

    /// Does it belong to a connection, whose phases are followed?
    #[inline(always)]
    pub const fn is_of_connection(&self) -> bool {
        tcp_state::has_connections(self.key.protocol)
    }

    /// Is this IPv4?
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.key.is_v4()
    }

    /// Its VLAN tags.
    #[inline(always)]
    pub const fn tags(&self) -> Tags {
        Tags {
            control: self.vlans,
            count: self.vlan_count,
        }
    }
}

/// What kind of packet it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// TCP, UDP or SCTP.
    Flow,
    Arp,
    /// ICMP of either family.
    Icmp,
    /// A neighbour solicitation of IPv6.
    Neighbour,
    /// A fragment without transport header; the key has no ports.
    Fragment,
}

/// Reads the headers of a packet, or of what is inside, into the walk. `frame_len` in bytes.
#[inline(always)]
pub fn frame<P: Packet>(packet: &mut P, walk: &mut Walk, frame_len: usize) -> Result<Kind, Stop> {
    let Walk { frame, inside, .. } = walk;
    // What not every packet has would else be that of the packet before.
    frame.key.source_port = Be16::ZERO;
    frame.key.destination_port = Be16::ZERO;
    frame.tcp_flags = 0;
    frame.acknowledgment = Be32::new(0);
    frame.vlans = [Be16::new(0); 2];
    frame.vlan_count = 0;
    frame.network_offset = 0;
    let ethertype = if inside.is_tunnel() {
        frame.network_offset = inside.network_offset;
        inside.ethertype
    } else if packet.begins_with_link() {
        link(packet, frame)?
    } else {
        match packet.header::<Ipv4Header>(0)?.version() {
            4 => ETHERTYPE_IPV4,
            _ => ETHERTYPE_IPV6,
        }
    };
    let (protocol, transport_offset) = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet, frame, frame_len)?,
        ETHERTYPE_IPV6 => ipv6(packet, frame, frame_len)?,
        ETHERTYPE_ARP => return Ok(Kind::Arp),
        _ => return Err(Stop::pass(Reason::NOT_IP)),
    };
    frame.transport_offset = transport_offset;
    frame.key.protocol = u32::from(protocol);
    if frame.fragment == part::LATER {
        return Ok(Kind::Fragment);
    }
    transport(packet, frame, protocol)
}

/// Reads the link header and the tags behind it; the EtherType of what follows.
#[inline(always)]
pub(super) fn link<P: Packet>(packet: &mut P, frame: &mut Frame) -> Result<Be16, Stop> {
    let mut offset = EthernetHeader::LEN;
    let mut ethertype = packet.header::<EthernetHeader>(0)?.ethertype;
    if ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_SERVICE_VLAN {
        let tag = *packet.header::<VlanTag>(offset)?;
        frame.vlans[0] = tag.control;
        frame.vlan_count = 1;
        offset += VlanTag::LEN;
        ethertype = tag.ethertype;
        if ethertype == ETHERTYPE_VLAN {
            let tag = *packet.header::<VlanTag>(offset)?;
            frame.vlans[1] = tag.control;
            frame.vlan_count = 2;
            offset += VlanTag::LEN;
            ethertype = tag.ethertype;
        }
    }
    frame.network_offset = offset as u32;
    Ok(ethertype)
}

/// Reads an IPv4 header: the protocol, and where it starts.
#[inline(always)]
fn ipv4<P: Packet>(packet: &mut P, frame: &mut Frame, frame_len: usize) -> Result<(u8, u32), Stop> {
    let offset = frame.network_offset as usize;
    let ip = packet.header::<Ipv4Header>(offset)?;
    let header_len = ip.header_len();
    let total_len = ip.total_len.get() as usize;
    if ip.version() != 4
        || header_len < Ipv4Header::LEN
        || total_len < header_len
        || offset + total_len > frame_len
    {
        return Err(Stop::pass(Reason::TRUNCATED));
    }
    (frame.fragment, frame.identification) = if !ip.is_fragment() {
        (part::WHOLE, Be32::new(0))
    } else if ip.is_later_fragment() {
        (part::LATER, Be32::new(ip.identification.get() as u32))
    } else {
        (part::FIRST, Be32::new(ip.identification.get() as u32))
    };
    frame.key.source = IpAddress::from_v4(ip.source);
    frame.key.destination = IpAddress::from_v4(ip.destination);
    frame.ttl = ip.ttl;
    frame.tos = ip.tos;
    frame.is_whole = u8::from(ip.dont_fragment());
    frame.total_len = total_len as u32;
    frame.transport_len = (total_len - header_len) as u32;
    Ok((ip.protocol, (offset + header_len) as u32))
}

/// Reads an IPv6 header and the extension headers behind it: the protocol, and where it starts.
#[inline(always)]
fn ipv6<P: Packet>(packet: &mut P, frame: &mut Frame, frame_len: usize) -> Result<(u8, u32), Stop> {
    let offset = frame.network_offset as usize;
    let ip = packet.header::<Ipv6Header>(offset)?;
    let payload_len = ip.payload_len.get() as usize;
    if ip.version() != 6 || offset + Ipv6Header::LEN + payload_len > frame_len {
        return Err(Stop::pass(Reason::TRUNCATED));
    }
    let mut protocol = ip.next_header;
    (frame.fragment, frame.identification) = (part::WHOLE, Be32::new(0));
    frame.key.source = ip.source();
    frame.key.destination = ip.destination();
    frame.ttl = ip.hop_limit;
    frame.tos = ip.traffic_class();
    frame.is_whole = 1;
    // RFC 4291 §2.5.5.2, RFC 6890 §2.2.3: mapped addresses are not for the wire; here they would pass for IPv4.
    if frame.key.source.is_v4() || frame.key.destination.is_v4() {
        return Err(Stop::pass(Reason::MARTIAN));
    }
    let mut extensions_len = 0;
    for _ in 0..EXTENSIONS {
        if !matches!(protocol, NEXT_HOP_BY_HOP | NEXT_DESTINATION) {
            break;
        }
        let extension = packet.header::<ExtensionHeader>(offset + Ipv6Header::LEN + extensions_len)?;
        protocol = extension.next_header;
        extensions_len += extension.len_bytes();
    }
    if protocol == NEXT_FRAGMENT {
        let fragment = packet.header::<FragmentHeader>(offset + Ipv6Header::LEN + extensions_len)?;
        protocol = fragment.next_header;
        extensions_len += FragmentHeader::LEN;
        // RFC 6946: one that is neither is a whole packet.
        if fragment.is_later() {
            frame.fragment = part::LATER;
            frame.identification = fragment.identification;
        } else if fragment.has_more() {
            frame.fragment = part::FIRST;
            frame.identification = fragment.identification;
        }
    }
    require(extensions_len <= payload_len)?;
    let transport_offset = offset + Ipv6Header::LEN + extensions_len;
    match protocol {
        _ if frame.fragment == part::LATER => {}
        NEXT_FRAGMENT | NEXT_HOP_BY_HOP | NEXT_DESTINATION | NEXT_ROUTING | NEXT_ESP | NEXT_AH
        | NEXT_MOBILITY | NEXT_NONE => {
            return Err(Stop::pass(Reason::EXTENSION_HEADER));
        }
        _ => {}
    }
    frame.total_len = (Ipv6Header::LEN + payload_len) as u32;
    frame.transport_len = (payload_len - extensions_len) as u32;
    Ok((protocol, transport_offset as u32))
}

/// Reads the transport header.
#[inline(always)]
fn transport<P: Packet>(packet: &mut P, frame: &mut Frame, protocol: u8) -> Result<Kind, Stop> {
    let (offset, len) = (frame.transport_offset as usize, frame.transport_len as usize);
    let (source_port, destination_port) = match (protocol, frame.is_v4()) {
        (PROTOCOL_TCP, _) => {
            let tcp = packet.header::<TcpHeader>(offset)?;
            frame.tcp_flags = tcp.flags;
            frame.acknowledgment = tcp.acknowledgment;
            let ports = (tcp.source_port, tcp.destination_port);
            require(len >= TcpHeader::LEN)?;
            ports
        }
        (PROTOCOL_UDP, _) => {
            let udp = packet.header::<UdpHeader>(offset)?;
            let ports = (udp.source_port, udp.destination_port);
            let claimed = udp.len.get() as usize;
            require(claimed >= UdpHeader::LEN && (claimed <= len || frame.fragment == part::FIRST))?;
            ports
        }
        // The checksum of SCTP depends on how long the whole packet is, which its first fragment does not say.
        (PROTOCOL_SCTP | PROTOCOL_ICMP | PROTOCOL_ICMPV6, _) if frame.fragment != part::WHOLE => {
            return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL));
        }
        (PROTOCOL_SCTP, _) => {
            let sctp = packet.header::<SctpHeader>(offset)?;
            frame.tcp_flags = sctp::flags(sctp.chunk_type);
            frame.acknowledgment = sctp.verification_tag;
            let ports = (sctp.source_port, sctp.destination_port);
            require(len >= SctpHeader::LEN)?;
            ports
        }
        (PROTOCOL_ICMP, true) => {
            require(len >= IcmpHeader::LEN)?;
            return Ok(Kind::Icmp);
        }
        (PROTOCOL_ICMPV6, false) => {
            let icmp_type = packet.header::<IcmpHeader>(offset)?.icmp_type;
            require(len >= IcmpHeader::LEN)?;
            return Ok(if icmp_type == TYPE_NEIGHBOUR_SOLICITATION {
                Kind::Neighbour
            } else {
                Kind::Icmp
            });
        }
        _ => return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL)),
    };
    require(source_port != Be16::new(0) && destination_port != Be16::new(0))?;
    frame.key.source_port = source_port;
    frame.key.destination_port = destination_port;
    Ok(Kind::Flow)
}

#[inline(always)]
fn require(condition: bool) -> Result<(), Stop> {
    if condition {
        Ok(())
    } else {
        Err(Stop::pass(Reason::TRUNCATED))
    }
}
