//! Frames for people: built from what somebody typed, described from their bytes.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{Protocol, address::at_port};

/// Without extension headers (RFC 8200 §3).
const IPV6_HEADER_BYTES: u16 = 40;

/// A packet to be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub protocol: Protocol,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TCP only.
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
        let mut frame = Vec::new();
        // Writing to a vector does not fail, and the length of 16 bits has room for every payload.
        let _ = match self.protocol {
            Protocol::Tcp => ip.tcp_header(self.tcp()).write(&mut frame, &payload(20)),
            Protocol::Udp => ip
                .udp(self.source.port(), self.destination.port())
                .write(&mut frame, &payload(8)),
        };
        frame
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
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `arp` or a protocol number; `?` where it cannot be read.
    pub protocol: String,
    /// With the port, if it has one.
    pub source: Option<String>,
    pub destination: Option<String>,
    /// TCP: such as `SYN` or `FIN+ACK`.
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
        let (source, destination, protocol) = match &packet.net {
            Some(NetSlice::Ipv4(slice)) => {
                let ip = slice.header();
                summary.ttl = Some(ip.ttl());
                summary.length_bytes = Some(ip.total_len());
                (
                    IpAddr::V4(ip.source_addr()),
                    IpAddr::V4(ip.destination_addr()),
                    ip.protocol(),
                )
            }
            Some(NetSlice::Ipv6(slice)) => {
                let ip = slice.header();
                summary.ttl = Some(ip.hop_limit());
                summary.length_bytes = ip.payload_length().checked_add(IPV6_HEADER_BYTES);
                let protocol = slice.payload().ip_number;
                (
                    IpAddr::V6(ip.source_addr()),
                    IpAddr::V6(ip.destination_addr()),
                    protocol,
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
            Some(TransportSlice::Icmpv4(_)) => {
                summary.protocol = "icmp".to_owned();
                None
            }
            Some(TransportSlice::Icmpv6(_)) => {
                summary.protocol = "icmpv6".to_owned();
                None
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
