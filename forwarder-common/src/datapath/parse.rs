//! Bytes to meaning: what kind of packet, and where its parts are.
//!
//! Only reads. Length fields are checked against each other and against the frame, so later stages need not.
//! What cannot be read is left to the stack, unchanged: the kernel knows best what to do with it.

use super::{Packet, Stop};
use crate::{
    abi::{flow::FlowKey, reason::Reason},
    wire::{
        Be16, Be32, WireHeader,
        ethernet::{ETHERTYPE_ARP, ETHERTYPE_IPV4, EthernetHeader},
        icmp::IcmpHeader,
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP},
        tcp::TcpHeader,
        udp::UdpHeader,
    },
};

/// Where the network header starts in an Ethernet frame without tags.
pub const NETWORK_OFFSET: usize = EthernetHeader::LEN;

/// A packet of a flow.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub key: FlowKey,
    /// Where TCP or UDP starts, in bytes from the frame's start.
    pub transport_offset: usize,
    /// IP header and payload, in bytes.
    pub total_len: u16,
    /// TCP or UDP header and payload, in bytes.
    pub transport_len: u16,
    pub ttl: u8,
    /// Zero for UDP.
    pub tcp_flags: u8,
    /// The acknowledgment number of TCP; without a meaning unless the ACK flag is set.
    pub acknowledgment: Be32,
}

impl Frame {
    /// Is this TCP?
    #[inline(always)]
    pub const fn is_tcp(&self) -> bool {
        self.key.protocol == PROTOCOL_TCP as u32
    }
}

/// What kind of packet it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    Arp,
    /// ICMP in IPv4; it starts at this offset.
    Icmp {
        transport_offset: usize,
    },
    Flow(Frame),
}

/// Reads the headers.
#[inline(always)]
pub fn frame<P: Packet>(packet: &mut P) -> Result<Parsed, Stop> {
    let ethertype = packet.header::<EthernetHeader>(0)?.ethertype;
    if ethertype == ETHERTYPE_ARP {
        return Ok(Parsed::Arp);
    }
    if ethertype != ETHERTYPE_IPV4 {
        return Err(Stop::pass(Reason::NOT_IP));
    }
    let frame_len = packet.frame_len();
    let ip = packet.header::<Ipv4Header>(NETWORK_OFFSET)?;
    let header_len = ip.header_len();
    let total_len = ip.total_len.get();
    if ip.version() != 4
        || header_len < Ipv4Header::LEN
        || (total_len as usize) < header_len
        || NETWORK_OFFSET + total_len as usize > frame_len
    {
        return Err(Stop::pass(Reason::TRUNCATED));
    }
    if ip.is_fragment() {
        return Err(Stop::pass(Reason::FRAGMENT));
    }
    let (source, destination, protocol, ttl) = (ip.source, ip.destination, ip.protocol, ip.ttl);
    let transport_offset = NETWORK_OFFSET + header_len;
    let transport_len = total_len - header_len as u16;

    let (source_port, destination_port, tcp_flags, acknowledgment) = match protocol {
        PROTOCOL_TCP => {
            let tcp = packet.header::<TcpHeader>(transport_offset)?;
            let ports = (
                tcp.source_port,
                tcp.destination_port,
                tcp.flags,
                tcp.acknowledgment,
            );
            require(transport_len as usize >= TcpHeader::LEN)?;
            ports
        }
        PROTOCOL_UDP => {
            let udp = packet.header::<UdpHeader>(transport_offset)?;
            let ports = (udp.source_port, udp.destination_port, 0, Be32::new(0));
            let claimed = udp.len.get();
            require(claimed as usize >= UdpHeader::LEN && claimed <= transport_len)?;
            ports
        }
        PROTOCOL_ICMP => {
            require(transport_len as usize >= IcmpHeader::LEN)?;
            return Ok(Parsed::Icmp { transport_offset });
        }
        _ => return Err(Stop::pass(Reason::UNSUPPORTED_PROTOCOL)),
    };
    require(source_port != Be16::new(0) && destination_port != Be16::new(0))?;
    let key = FlowKey {
        source,
        destination,
        source_port,
        destination_port,
        protocol: u32::from(protocol),
    };
    Ok(Parsed::Flow(Frame {
        key,
        transport_offset,
        total_len,
        transport_len,
        ttl,
        tcp_flags,
        acknowledgment,
    }))
}

#[inline(always)]
fn require(condition: bool) -> Result<(), Stop> {
    if condition {
        Ok(())
    } else {
        Err(Stop::pass(Reason::TRUNCATED))
    }
}
