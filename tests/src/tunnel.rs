//! Outer headers of tunnels, byte by byte from the RFCs. They share nothing with how the data path makes them.

use std::net::IpAddr;

use crate::packet::{ETHERNET_LEN, Mac, fold, sum};

/// The ECN field behind a tunnel (RFC 6040 §4.2, figure 4): rows are the inner field, columns the outer one; `None`: dropped.
pub const ECN_BEHIND: [[Option<u8>; 4]; 4] = [
    [Some(0), Some(0), Some(0), None],
    [Some(1), Some(1), Some(1), Some(3)],
    [Some(2), Some(1), Some(2), Some(3)],
    [Some(3), Some(3), Some(3), Some(3)],
];

/// What stands in front of an inner packet.
#[derive(Clone, Debug)]
pub struct Outer {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    pub tos: u8,
    /// IPv4 only.
    pub identification: u16,
    /// Flags and offset of IPv4.
    pub fragment: u16,
    /// IPv6 only.
    pub flow_label: u32,
    /// The IPv6 option that limits nesting.
    pub limit: Option<u8>,
    pub carrier: Carrier,
    /// Link addresses of the inner frame, source first, where the tunnel carries frames.
    pub inner_link: Option<(Mac, Mac)>,
}

/// How the inner packet travels.
#[derive(Clone, Debug, PartialEq)]
pub enum Carrier {
    /// IP in IP.
    Plain,
    /// Behind a GRE header.
    Gre { key: Option<u32> },
    /// Behind a UDP header and these bytes.
    Udp {
        ports: (u16, u16),
        has_checksum: bool,
        header: Vec<u8>,
    },
}

/// RFC 7348 §5.
pub fn vxlan(vni: u32) -> Vec<u8> {
    let mut header = vec![0x08, 0, 0, 0];
    header.extend((vni << 8).to_be_bytes());
    header
}

/// RFC 8926 §3.4, with these options and flags.
pub fn geneve(vni: u32, flags: u8, options: &[u8]) -> Vec<u8> {
    let mut header = vec![(options.len() / 4) as u8, flags, 0x65, 0x58];
    header.extend((vni << 8).to_be_bytes());
    header.extend(options);
    header
}

/// draft-ietf-intarea-gue §3.2, version 0.
pub fn gue(protocol: u8) -> Vec<u8> {
    vec![0, protocol, 0, 0]
}

impl Outer {
    /// The frame that carries the IP packet of `inner`, an Ethernet frame without tags or padding.
    pub fn around(&self, inner: &[u8]) -> Vec<u8> {
        let (ethertype, packet) = (&inner[12..ETHERNET_LEN], &inner[ETHERNET_LEN..]);
        let ip_protocol = if ethertype == [0x08, 0x00] { 4 } else { 41 };
        let mut carried = Vec::new();
        if let Some((source, destination)) = self.inner_link {
            carried.extend(destination);
            carried.extend(source);
            carried.extend(ethertype);
        }
        carried.extend(packet);
        let (mut protocol, mut payload) = match &self.carrier {
            Carrier::Plain => (ip_protocol, carried),
            Carrier::Gre { key } => {
                let mut gre = vec![if key.is_some() { 0x20 } else { 0 }, 0];
                gre.extend(if self.inner_link.is_some() {
                    &[0x65, 0x58]
                } else {
                    ethertype
                });
                gre.extend(key.iter().flat_map(|key| key.to_be_bytes()));
                gre.extend(carried);
                (47, gre)
            }
            Carrier::Udp {
                ports,
                has_checksum,
                header,
            } => {
                let len = (8 + header.len() + carried.len()) as u16;
                let mut udp = Vec::new();
                for field in [ports.0, ports.1, len, 0] {
                    udp.extend(field.to_be_bytes());
                }
                udp.extend(header);
                udp.extend(carried);
                if *has_checksum {
                    let value = !fold(self.pseudo_sum(17, udp.len()) + sum(&udp));
                    let value = if value == 0 { 0xffff } else { value };
                    udp[6..8].copy_from_slice(&value.to_be_bytes());
                }
                (17, udp)
            }
        };
        if let Some(limit) = self.limit {
            payload.splice(..0, [protocol, 0, 4, 1, limit, 1, 1, 0]);
            protocol = 60;
        }
        let mut frame = Vec::new();
        frame.extend(self.destination_mac);
        frame.extend(self.source_mac);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut ip = vec![0x45, self.tos];
                ip.extend(((20 + payload.len()) as u16).to_be_bytes());
                ip.extend(self.identification.to_be_bytes());
                ip.extend(self.fragment.to_be_bytes());
                ip.extend([self.ttl, protocol, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                let checksum = !fold(sum(&ip));
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                frame.extend([0x08, 0x00]);
                frame.extend(ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd]);
                let first = 6 << 28 | u32::from(self.tos) << 20 | self.flow_label;
                frame.extend(first.to_be_bytes());
                frame.extend((payload.len() as u16).to_be_bytes());
                frame.extend([protocol, self.ttl]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
        frame.extend(payload);
        frame
    }

    fn pseudo_sum(&self, protocol: u8, len: usize) -> u64 {
        let octets = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        sum(&octets(self.source)) + sum(&octets(self.destination)) + u64::from(protocol) + len as u64
    }
}
