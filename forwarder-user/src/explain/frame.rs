//! Frames for people: built from what somebody typed, described from their bytes.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice,
};
use forwarder_common::wire::{
    Be16, Be32, WireHeader as _, crc32c,
    sctp::{
        CHUNK_ABORT, CHUNK_DATA, CHUNK_INIT, CHUNK_INIT_ACK, CHUNK_SHUTDOWN, CHUNK_SHUTDOWN_ACK,
        CHUNK_SHUTDOWN_COMPLETE, SctpChecksum, SctpHeader,
    },
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{Protocol, address::at_port};

/// Without extension headers (RFC 8200 §3).
const IPV6_HEADER_BYTES: u16 = 40;

/// The fields of an INIT chunk, without its header and parameters (RFC 9260 §3.3.2), in bytes.
const INIT_BYTES: usize = 16;

/// A packet to be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub protocol: Protocol,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Of SCTP they stand for the chunk that does the same.
    pub flags: Vec<Flag>,
    pub ttl: u8,
    /// IP header and payload, in bytes; shorter than the headers: no payload.
    pub length_bytes: u16,
}

/// A flag of a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    Syn,
    Ack,
    Fin,
    Rst,
    Psh,
    Urg,
}

impl FromStr for Flag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "syn" => Ok(Self::Syn),
            "ack" => Ok(Self::Ack),
            "fin" => Ok(Self::Fin),
            "rst" => Ok(Self::Rst),
            "psh" => Ok(Self::Psh),
            "urg" => Ok(Self::Urg),
            _ => Err(format!(
                "\"{text}\" is no TCP flag; there are: syn, ack, fin, rst, psh, urg"
            )),
        }
    }
}

impl Wanted {
    /// The frame, with valid checksums and a payload of zeros. Its link addresses are zeros: the walk reads none.
    pub fn frame(&self) -> Vec<u8> {
        let link = PacketBuilder::ethernet2([0; 6], [0; 6]);
        let (source, destination) = (self.source.ip(), self.destination.ip());
        let (ip, ip_bytes) = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                (link.ipv4(source.octets(), destination.octets(), self.ttl), 20)
            }
            // What mixes the families is refused before; this would be nobody's packet.
            _ => (link.ipv6(as_v6(source), as_v6(destination), self.ttl), 40),
        };
        let payload = |transport_bytes: usize| {
            vec![0; usize::from(self.length_bytes).saturating_sub(ip_bytes + transport_bytes)]
        };
        let (from, to) = (self.source.port(), self.destination.port());
        let mut frame = Vec::new();
        // Writing to a vector does not fail, and the length of 16 bits has room for every payload.
        let _ = match self.protocol {
            Protocol::Tcp => ip.tcp_header(self.tcp()).write(&mut frame, &payload(20)),
            Protocol::Udp => ip.udp(from, to).write(&mut frame, &payload(8)),
            Protocol::Sctp => ip.write(&mut frame, IpNumber::SCTP, &self.sctp(&payload(SctpHeader::LEN))),
            // A reply's identifier is that of its destination.
            Protocol::Icmp if from == 0 && to != 0 => match source {
                IpAddr::V4(_) => ip.icmpv4_echo_reply(to, 1).write(&mut frame, &payload(8)),
                IpAddr::V6(_) => ip.icmpv6_echo_reply(to, 1).write(&mut frame, &payload(8)),
            },
            Protocol::Icmp => match source {
                IpAddr::V4(_) => ip.icmpv4_echo_request(from, 1).write(&mut frame, &payload(8)),
                IpAddr::V6(_) => ip.icmpv6_echo_request(from, 1).write(&mut frame, &payload(8)),
            },
        };
        frame
    }

    /// A packet with one chunk, of which this is the value; an INIT has all its fields.
    fn sctp(&self, value: &[u8]) -> Vec<u8> {
        let has = |flag| self.flags.contains(&flag);
        let (chunk_type, value_len) = match () {
            () if has(Flag::Rst) => (CHUNK_ABORT, value.len()),
            () if has(Flag::Syn) && has(Flag::Ack) => (CHUNK_INIT_ACK, value.len().max(INIT_BYTES)),
            () if has(Flag::Syn) => (CHUNK_INIT, value.len().max(INIT_BYTES)),
            () if has(Flag::Fin) => (CHUNK_SHUTDOWN, value.len()),
            () => (CHUNK_DATA, value.len()),
        };
        let header = SctpHeader {
            source_port: Be16::new(self.source.port()),
            destination_port: Be16::new(self.destination.port()),
            verification_tag: Be32::new(u32::from(chunk_type != CHUNK_INIT)),
            checksum: SctpChecksum::NONE,
            chunk_type,
            chunk_flags: 0,
            chunk_len: Be16::new((4 + value_len) as u16),
        };
        let mut packet = bytemuck::bytes_of(&header).to_vec();
        packet.resize(SctpHeader::LEN + value_len, 0);
        let checksum = SctpChecksum::new(crc32c::of(&packet));
        packet[SctpHeader::CHECKSUM_OFFSET..][..SctpChecksum::LEN]
            .copy_from_slice(bytemuck::bytes_of(&checksum));
        packet
    }

    fn tcp(&self) -> TcpHeader {
        let mut tcp = TcpHeader::new(self.source.port(), self.destination.port(), 1, 65535);
        for flag in &self.flags {
            match flag {
                Flag::Syn => tcp.syn = true,
                Flag::Ack => tcp.ack = true,
                Flag::Fin => tcp.fin = true,
                Flag::Rst => tcp.rst = true,
                Flag::Psh => tcp.psh = true,
                Flag::Urg => tcp.urg = true,
            }
        }
        tcp
    }
}

fn as_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// A packet as people read it; what its bytes do not tell is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PacketSummary {
    /// `tcp`, `udp`, `sctp`, `icmp`, `icmpv6`, `arp` or a protocol number; `?` where it cannot be read.
    pub protocol: String,
    /// With the port, if it has one; an echo message has its identifier at the client's end, and 0 at the other.
    pub source: Option<String>,
    pub destination: Option<String>,
    /// TCP: such as `SYN` or `FIN+ACK`. SCTP: the first chunk, such as `INIT`. ICMP: `echo request` or `echo reply`.
    pub flags: Option<String>,
    /// TTL, or of IPv6 the hop limit.
    pub ttl: Option<u8>,
    /// IP header and payload, in bytes.
    pub length_bytes: Option<u16>,
}

impl PacketSummary {
    /// Reads a frame.
    pub fn of(frame: &[u8]) -> Self {
        let mut summary = Self {
            protocol: "?".to_owned(),
            ..Self::default()
        };
        let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
            return summary;
        };
        let (source, destination, protocol, payload) = match &packet.net {
            Some(NetSlice::Ipv4(slice)) => {
                let ip = slice.header();
                summary.ttl = Some(ip.ttl());
                summary.length_bytes = Some(ip.total_len());
                (
                    IpAddr::V4(ip.source_addr()),
                    IpAddr::V4(ip.destination_addr()),
                    ip.protocol(),
                    slice.payload().payload,
                )
            }
            Some(NetSlice::Ipv6(slice)) => {
                let ip = slice.header();
                summary.ttl = Some(ip.hop_limit());
                summary.length_bytes = ip.payload_length().checked_add(IPV6_HEADER_BYTES);
                let payload = slice.payload();
                (
                    IpAddr::V6(ip.source_addr()),
                    IpAddr::V6(ip.destination_addr()),
                    payload.ip_number,
                    payload.payload,
                )
            }
            Some(NetSlice::Arp(_)) => {
                summary.protocol = "arp".to_owned();
                return summary;
            }
            None => return summary,
        };
        let ports = match &packet.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                summary.protocol = "tcp".to_owned();
                summary.flags = Some(flags(&tcp.to_header()));
                Some((tcp.source_port(), tcp.destination_port()))
            }
            Some(TransportSlice::Udp(udp)) => {
                summary.protocol = "udp".to_owned();
                Some((udp.source_port(), udp.destination_port()))
            }
            Some(TransportSlice::Icmpv4(icmp)) => {
                summary.protocol = "icmp".to_owned();
                match icmp.icmp_type() {
                    Icmpv4Type::EchoRequest(echo) => summary.echo(true, echo.id),
                    Icmpv4Type::EchoReply(echo) => summary.echo(false, echo.id),
                    _ => None,
                }
            }
            Some(TransportSlice::Icmpv6(icmp)) => {
                summary.protocol = "icmpv6".to_owned();
                match icmp.icmp_type() {
                    Icmpv6Type::EchoRequest(echo) => summary.echo(true, echo.id),
                    Icmpv6Type::EchoReply(echo) => summary.echo(false, echo.id),
                    _ => None,
                }
            }
            _ if protocol == IpNumber::SCTP => {
                summary.protocol = "sctp".to_owned();
                summary.sctp(payload)
            }
            _ => {
                summary.protocol = protocol.0.to_string();
                None
            }
        };
        let (source, destination) = match ports {
            Some((from, to)) => (at_port(source, from), at_port(destination, to)),
            None => (source.to_string(), destination.to_string()),
        };
        summary.source = Some(source);
        summary.destination = Some(destination);
        summary
    }
}

impl PacketSummary {
    /// The ports of an echo message.
    fn echo(&mut self, is_request: bool, identifier: u16) -> Option<(u16, u16)> {
        let (name, ports) = if is_request {
            ("echo request", (identifier, 0))
        } else {
            ("echo reply", (0, identifier))
        };
        self.flags = Some(name.to_owned());
        Some(ports)
    }

    /// The ports of a packet of SCTP; `None`: it is cut short.
    fn sctp(&mut self, packet: &[u8]) -> Option<(u16, u16)> {
        let header: &SctpHeader = bytemuck::from_bytes(packet.get(..SctpHeader::LEN)?);
        self.flags = Some(chunk(header.chunk_type));
        Some(({ header.source_port }.get(), { header.destination_port }.get()))
    }
}

/// The name of a chunk of SCTP (RFC 9260 §3.2).
fn chunk(chunk_type: u8) -> String {
    let name = match chunk_type {
        CHUNK_DATA => "DATA",
        CHUNK_INIT => "INIT",
        CHUNK_INIT_ACK => "INIT ACK",
        3 => "SACK",
        4 => "HEARTBEAT",
        5 => "HEARTBEAT ACK",
        CHUNK_ABORT => "ABORT",
        CHUNK_SHUTDOWN => "SHUTDOWN",
        CHUNK_SHUTDOWN_ACK => "SHUTDOWN ACK",
        9 => "ERROR",
        10 => "COOKIE ECHO",
        11 => "COOKIE ACK",
        CHUNK_SHUTDOWN_COMPLETE => "SHUTDOWN COMPLETE",
        _ => return format!("chunk {chunk_type}"),
    };
    name.to_owned()
}

fn flags(tcp: &TcpHeader) -> String {
    let set: Vec<_> = [
        (tcp.syn, "SYN"),
        (tcp.fin, "FIN"),
        (tcp.rst, "RST"),
        (tcp.psh, "PSH"),
        (tcp.urg, "URG"),
        (tcp.ack, "ACK"),
    ]
    .into_iter()
    .filter_map(|(is_set, name)| is_set.then_some(name))
    .collect();
    if set.is_empty() {
        "none".to_owned()
    } else {
        set.join("+")
    }
}

impl std::fmt::Display for PacketSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.protocol)?;
        if let (Some(source), Some(destination)) = (&self.source, &self.destination) {
            write!(f, " {source} > {destination}")?;
        }
        if let Some(flags) = &self.flags {
            write!(f, " {flags}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(protocol: Protocol) -> Wanted {
        Wanted {
            protocol,
            source: "192.0.2.7:51000".parse().unwrap(),
            destination: "198.51.100.10:443".parse().unwrap(),
            flags: vec![Flag::Syn],
            ttl: 63,
            length_bytes: 60,
        }
    }

    #[test]
    fn a_frame_is_what_was_asked_for() {
        let frame = wanted(Protocol::Tcp).frame();
        assert_eq!(frame.len(), 14 + 60);
        let summary = PacketSummary::of(&frame);
        assert_eq!(summary.to_string(), "tcp 192.0.2.7:51000 > 198.51.100.10:443 SYN");
        assert_eq!((summary.ttl, summary.length_bytes), (Some(63), Some(60)));
        let udp = PacketSummary::of(&wanted(Protocol::Udp).frame());
        assert_eq!(udp.to_string(), "udp 192.0.2.7:51000 > 198.51.100.10:443");
    }

    #[test]
    fn a_frame_of_ipv6_as_well() {
        let v6 = |protocol| Wanted {
            source: "[2001:db8::7]:51000".parse().unwrap(),
            destination: "[2001:db8::10]:443".parse().unwrap(),
            length_bytes: 100,
            ..wanted(protocol)
        };
        let frame = v6(Protocol::Tcp).frame();
        assert_eq!(frame.len(), 14 + 100);
        let summary = PacketSummary::of(&frame);
        assert_eq!(
            summary.to_string(),
            "tcp [2001:db8::7]:51000 > [2001:db8::10]:443 SYN"
        );
        assert_eq!((summary.ttl, summary.length_bytes), (Some(63), Some(100)));
        let udp = PacketSummary::of(&v6(Protocol::Udp).frame());
        assert_eq!(udp.to_string(), "udp [2001:db8::7]:51000 > [2001:db8::10]:443");
    }

    #[test]
    fn frames_of_sctp_and_of_echo() {
        let sctp = |flags: &[Flag]| {
            let wanted = Wanted {
                flags: flags.to_vec(),
                ..wanted(Protocol::Sctp)
            };
            PacketSummary::of(&wanted.frame()).to_string()
        };
        let ends = "192.0.2.7:51000 > 198.51.100.10:443";
        assert_eq!(sctp(&[Flag::Syn]), format!("sctp {ends} INIT"));
        assert_eq!(sctp(&[]), format!("sctp {ends} DATA"));
        let frame = wanted(Protocol::Sctp).frame();
        let mut packet = frame[14 + 20..].to_vec();
        packet[8..12].fill(0);
        assert_eq!(crc32c::of(&packet).to_le_bytes(), frame[14 + 28..14 + 32]);

        let echo = |source: &str, destination: &str| {
            let wanted = Wanted {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                ..wanted(Protocol::Icmp)
            };
            PacketSummary::of(&wanted.frame()).to_string()
        };
        assert_eq!(
            echo("192.0.2.7:77", "198.51.100.10:0"),
            "icmp 192.0.2.7:77 > 198.51.100.10:0 echo request"
        );
        assert_eq!(
            echo("[fd00::5]:0", "[fd00::7]:77"),
            "icmpv6 [fd00::5]:0 > [fd00::7]:77 echo reply"
        );
    }

    #[test]
    fn a_length_below_the_headers_is_that_of_the_headers() {
        let short = Wanted {
            length_bytes: 0,
            ..wanted(Protocol::Tcp)
        };
        assert_eq!(PacketSummary::of(&short.frame()).length_bytes, Some(40));
    }

    #[test]
    fn flags_are_named_together() {
        let closing = Wanted {
            flags: vec![Flag::Ack, Flag::Fin],
            ..wanted(Protocol::Tcp)
        };
        assert_eq!(
            PacketSummary::of(&closing.frame()).flags.as_deref(),
            Some("FIN+ACK")
        );
    }

    #[test]
    fn bytes_that_mean_nothing_are_said_so() {
        assert_eq!(PacketSummary::of(&[1, 2, 3]).to_string(), "?");
    }
}
