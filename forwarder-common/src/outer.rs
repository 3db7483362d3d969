//! The headers that a tunnel puts in front of a packet, made once for all packets to a far end.
//!
//! The agent calls this when it fills the table of peers; `datapath::overlay` copies the result and writes into it what
//! differs between packets. Fields that do are zero here, and the sums over the rest are part of the result.
//!
//! References: VXLAN RFC 7348, Geneve RFC 8926, GRE RFC 2784 and RFC 2890, IP in IP RFC 2003, RFC 4213 and RFC 2473,
//! GUE draft-ietf-intarea-gue.

use bytemuck::{Zeroable, bytes_of};

use crate::{
    abi::tunnel::{OUTER_BLOCK_LEN, OUTER_LEN_MAX, TunnelKind, TunnelPeer, peer_flag},
    wire::{
        Be16, Be32, IpAddress, LinkPair, MacAddress, WireHeader,
        checksum::{fold, sum_bytes},
        ethernet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader},
        ipv4::{Ipv4Header, PROTOCOL_UDP},
        ipv6::{Ipv6Header, NEXT_DESTINATION, TunnelLimit},
        tunnel::{
            ETHERTYPE_BRIDGED, GeneveHeader, GreHeader, GreKey, GueHeader, PROTOCOL_GRE, PROTOCOL_IPIP,
            PROTOCOL_IPV6, VxlanHeader, vni_word,
        },
        udp::UdpHeader,
    },
};

/// RFC 6335 §6: dynamic ports, which RFC 7348 §5 recommends as source ports.
const DYNAMIC_PORTS: (u16, u16) = (49152, 65535);

/// Whether the outer IPv4 packet may be fragmented on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DontFragment {
    Never,
    #[default]
    Always,
    /// As the inner packet.
    Inherit,
}

/// Family of the inner packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Inner {
    #[default]
    Ipv4,
    Ipv6,
}

impl Inner {
    const fn ethertype(self) -> Be16 {
        match self {
            Self::Ipv4 => ETHERTYPE_IPV4,
            Self::Ipv6 => ETHERTYPE_IPV6,
        }
    }

    /// The IP protocol number that says so.
    pub const fn protocol(self) -> u8 {
        match self {
            Self::Ipv4 => PROTOCOL_IPIP,
            Self::Ipv6 => PROTOCOL_IPV6,
        }
    }
}

/// A far end and how packets to it look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Far<'a> {
    pub kind: TunnelKind,
    pub inner: Inner,
    /// Outer source and destination, of one family.
    pub local: IpAddress,
    pub remote: IpAddress,
    /// Number of the network (VXLAN, Geneve: 24 bits); key of GRE, where `None` is none.
    pub id: Option<u32>,
    /// UDP destination port.
    pub port: u16,
    /// First and last UDP source port; `None`: the dynamic ones.
    pub source_ports: Option<(u16, u16)>,
    /// Options of Geneve: a multiple of 4 bytes, at most 24.
    pub options: &'a [u8],
    /// Addresses of the inner frame, for kinds that have one.
    pub link: LinkPair,
    /// Hop limit of the outer packet; zero: the inner packet's.
    pub ttl: u8,
    /// Type of service of the outer packet; `None`: the inner packet's.
    pub tos: Option<u8>,
    pub dont_fragment: DontFragment,
    /// Does the outer UDP header have a checksum?
    pub has_checksum: bool,
    /// Flow label of an outer IPv6 packet.
    pub flow_label: u32,
    /// How many tunnels may be nested in an outer IPv6 packet, as an option that says so (RFC 2473 §4.1.1); not for
    /// UDP.
    pub limit: Option<u8>,
    /// The tunnel device; zero where there is none.
    pub ifindex: u32,
    /// Largest inner IP packet, in bytes.
    pub mtu_bytes: u32,
}

impl Far<'_> {
    /// An IPv4 packet in IPv4, with a TTL of 64, not to be fragmented: where to begin.
    pub fn new(kind: TunnelKind, local: IpAddress, remote: IpAddress) -> Self {
        Self {
            kind,
            inner: Inner::Ipv4,
            local,
            remote,
            id: None,
            port: 0,
            source_ports: None,
            options: &[],
            link: LinkPair::new(MacAddress::default(), MacAddress::default()),
            ttl: 64,
            tos: Some(0),
            dont_fragment: DontFragment::Always,
            has_checksum: false,
            flow_label: 0,
            limit: None,
            ifindex: 0,
            mtu_bytes: 0,
        }
    }

    /// What its headers add to an inner IP packet, in bytes.
    pub const fn overhead_bytes(&self) -> usize {
        let ip = if self.local.is_v4() {
            Ipv4Header::LEN
        } else {
            Ipv6Header::LEN
        };
        let udp = if self.kind.is_udp() { UdpHeader::LEN } else { 0 };
        let ethernet = if self.kind.is_ethernet() {
            EthernetHeader::LEN
        } else {
            0
        };
        let own = match self.kind {
            TunnelKind::VXLAN => VxlanHeader::LEN,
            TunnelKind::GENEVE => GeneveHeader::LEN + self.options.len(),
            TunnelKind::GRE | TunnelKind::GRETAP => {
                GreHeader::LEN + if self.id.is_some() { GreKey::LEN } else { 0 }
            }
            TunnelKind::GUE => GueHeader::LEN,
            _ => 0,
        };
        let limit = if self.has_limit() { TunnelLimit::LEN } else { 0 };
        ip + limit + udp + own + ethernet
    }

    const fn has_limit(&self) -> bool {
        self.limit.is_some() && !self.local.is_v4() && !self.kind.is_udp()
    }

    /// The table's entry; `None` if addresses of two families, a number of more than 24 bits or options of a wrong
    /// length make one impossible.
    pub fn peer(&self) -> Option<TunnelPeer> {
        let is_v4 = self.local.is_v4();
        let is_vni = matches!(self.kind, TunnelKind::VXLAN | TunnelKind::GENEVE);
        let is_possible = is_v4 == self.remote.is_v4()
            && self.kind != TunnelKind::NONE
            && self.options.len().is_multiple_of(4)
            && (!is_vni || self.id.is_some_and(|id| id < 1 << 24))
            && self.overhead_bytes() <= OUTER_LEN_MAX;
        if !is_possible {
            return None;
        }
        let protocol = match self.kind {
            TunnelKind::GRE | TunnelKind::GRETAP => PROTOCOL_GRE,
            TunnelKind::IPIP => self.inner.protocol(),
            _ => PROTOCOL_UDP,
        };
        let mut headers = Headers::default();
        if is_v4 {
            let mut ip = Ipv4Header::fresh(protocol, 0, 0, self.local.low(), self.remote.low());
            if self.dont_fragment != DontFragment::Always {
                ip.fragment = Be16::new(0);
            }
            headers.push(bytes_of(&ip));
        } else {
            let next = if self.has_limit() {
                NEXT_DESTINATION
            } else {
                protocol
            };
            headers.push(bytes_of(&Ipv6Header::fresh(next, 0, 0, self.local, self.remote)));
        }
        let ip_len = headers.len;
        if let Some(limit) = self.limit.filter(|_| self.has_limit()) {
            headers.push(bytes_of(&TunnelLimit::new(protocol, limit)));
        }
        self.push_own(&mut headers);

        let udp = sum_bytes(headers.written(ip_len));
        let addresses = sum_bytes(bytes_of(&self.local)) + sum_bytes(bytes_of(&self.remote));
        // The prefix that makes IPv4 addresses long is in neither pseudo-header.
        let addresses = if is_v4 {
            sum_bytes(&self.local.low().octets()) + sum_bytes(&self.remote.low().octets())
        } else {
            addresses
        };
        let (source_port, last) = self.source_ports.unwrap_or(DYNAMIC_PORTS);
        let flags = [
            (!is_v4, peer_flag::IPV6),
            (self.has_checksum && self.kind.is_udp(), peer_flag::UDP_CHECKSUM),
            (self.tos.is_none(), peer_flag::INHERIT_DSCP),
            (
                self.dont_fragment == DontFragment::Inherit,
                peer_flag::INHERIT_DONT_FRAGMENT,
            ),
            (
                self.flow_label == 0 && !self.kind.is_udp(),
                peer_flag::HASH_FLOW_LABEL,
            ),
        ];
        let end = headers.len - OUTER_BLOCK_LEN;
        Some(TunnelPeer {
            outer: bytemuck::cast(headers.bytes),
            outer_end: bytemuck::pod_read_unaligned(&headers.bytes[end..headers.len]),
            local: self.local,
            remote: self.remote,
            ifindex: self.ifindex,
            mtu_bytes: self.mtu_bytes,
            flow_label: self.flow_label,
            outer_len: headers.len as u16,
            flags: flags
                .iter()
                .filter(|(is_set, _)| *is_set)
                .map(|(_, flag)| flag)
                .sum(),
            ip_sum: fold(sum_bytes(headers.bytes.get(..ip_len)?)),
            udp_sum: fold(udp + addresses + u32::from(u16::from_ne_bytes([0, protocol]))),
            source_port,
            source_ports: if self.kind.is_udp() {
                last.saturating_sub(source_port).saturating_add(1)
            } else {
                0
            },
            ttl: self.ttl,
            tos: self.tos.unwrap_or(0),
            kind: self.kind,
            reserved: [0; 5],
        })
    }

    /// Everything behind the outer IP header.
    fn push_own(&self, headers: &mut Headers) {
        if self.kind.is_udp() {
            headers.push(bytes_of(&UdpHeader {
                destination_port: Be16::new(self.port),
                ..UdpHeader::zeroed()
            }));
        }
        match self.kind {
            TunnelKind::VXLAN => headers.push(bytes_of(&VxlanHeader {
                flags: VxlanHeader::FLAG_VNI,
                vni: vni_word(self.id.unwrap_or(0)),
            })),
            TunnelKind::GENEVE => {
                headers.push(bytes_of(&GeneveHeader {
                    version_len: (self.options.len() / 4) as u8,
                    flags: 0,
                    protocol: ETHERTYPE_BRIDGED,
                    vni: vni_word(self.id.unwrap_or(0)),
                }));
                headers.push(self.options);
            }
            TunnelKind::GRE | TunnelKind::GRETAP => {
                let bridged = self.kind == TunnelKind::GRETAP;
                headers.push(bytes_of(&GreHeader {
                    flags: if self.id.is_some() {
                        GreHeader::FLAG_KEY
                    } else {
                        Be16::new(0)
                    },
                    protocol: if bridged {
                        ETHERTYPE_BRIDGED
                    } else {
                        self.inner.ethertype()
                    },
                }));
                if let Some(key) = self.id {
                    headers.push(bytes_of(&GreKey { key: Be32::new(key) }));
                }
            }
            TunnelKind::GUE => headers.push(bytes_of(&GueHeader {
                version_len: 0,
                protocol: self.inner.protocol(),
                flags: Be16::new(0),
            })),
            _ => {}
        }
        if self.kind.is_ethernet() {
            headers.push(bytes_of(&EthernetHeader {
                link: self.link,
                ethertype: self.inner.ethertype(),
            }));
        }
    }
}

/// Headers one behind the other. Their length was checked before.
struct Headers {
    bytes: [u8; OUTER_LEN_MAX],
    len: usize,
}

impl Default for Headers {
    fn default() -> Self {
        Self {
            bytes: [0; OUTER_LEN_MAX],
            len: 0,
        }
    }
}

impl Headers {
    fn push(&mut self, header: &[u8]) {
        self.bytes[self.len..][..header.len()].copy_from_slice(header);
        self.len += header.len();
    }

    fn written(&self, from: usize) -> &[u8] {
        &self.bytes[from..self.len]
    }
}
