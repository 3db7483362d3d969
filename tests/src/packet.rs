//! Frames built field by field, and checks of finished frames.
//!
//! Checksums are computed here over the whole packet, in big-endian order, and share nothing with the data
//! path's incremental updates: a case's expected frame is *built*, never derived from what the data path did.
//! Lengths that lie are made with [`patched`], after building.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use forwarder_common::wire::tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Length of an Ethernet header without tags, in bytes: where IPv4 and ARP start.
pub const ETHERNET_LEN: usize = 14;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// Flags of the usual TCP segments.
pub mod segment {
    use super::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN};

    pub const SYN: u8 = FLAG_SYN;
    pub const SYN_ACK: u8 = FLAG_SYN | FLAG_ACK;
    pub const ACK: u8 = FLAG_ACK;
    pub const FIN: u8 = FLAG_FIN | FLAG_ACK;
    pub const RST: u8 = FLAG_RST;
}

/// Types of SCTP's chunks (RFC 9260 §3.2).
pub mod chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const SACK: u8 = 3;
    pub const HEARTBEAT: u8 = 4;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN: u8 = 7;
    pub const SHUTDOWN_ACK: u8 = 8;
    pub const ERROR: u8 = 9;
    pub const COOKIE_ECHO: u8 = 10;
    pub const COOKIE_ACK: u8 = 11;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// What the transport checksum field holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// The checksum.
    Complete,
    /// What a sender with checksum offload leaves to its device: the sum of the pseudo-header, not
    /// complemented; of SCTP zero.
    Partial,
    /// This.
    Fixed(u16),
}

#[derive(Clone, Debug)]
enum Transport {
    Tcp {
        flags: u8,
        numbers: TcpNumbers,
        options: Vec<u8>,
    },
    Udp,
    /// With one chunk, whose value is the payload.
    Sctp {
        tag: u32,
        chunk: u8,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    /// An ICMP echo message. Its identifier is the client's port: the source of a request, the destination of a reply.
    Echo {
        is_request: bool,
    },
    /// A protocol without a header of ours.
    Other(u8),
}

/// The numbers of a TCP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpNumbers {
    pub sequence: u32,
    pub acknowledgment: u32,
    pub window: u16,
}

impl TcpNumbers {
    /// Those of segments that were given no others.
    pub const DEFAULT: Self = Self {
        sequence: 0x1234_5678,
        acknowledgment: 0x9abc_def0,
        window: 0xfaf0,
    };
}

/// An IP packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Builder {
    source_mac: Mac,
    destination_mac: Mac,
    vlans: Vec<u16>,
    source: SocketAddr,
    destination: SocketAddr,
    /// Hop limit of IPv6.
    ttl: u8,
    /// TOS or traffic class.
    tos: u8,
    identification: u16,
    fragment: u16,
    options: Vec<u8>,
    /// IPv6: number of the first extension header, and all of them with the place for the last one's successor.
    extensions: Vec<(u8, Vec<u8>)>,
    transport: Transport,
    payload: Vec<u8>,
    checksum: Checksum,
    surplus: Vec<u8>,
    padding: Vec<u8>,
}

impl Builder {
    fn new(transport: Transport, source: SocketAddr, destination: SocketAddr) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4());
        Self {
            source_mac: [0; 6],
            destination_mac: [0; 6],
            vlans: Vec::new(),
            source,
            destination,
            ttl: 64,
            tos: 0,
            identification: 0xbeef,
            fragment: 0,
            options: Vec::new(),
            extensions: Vec::new(),
            transport,
            payload: Vec::new(),
            checksum: Checksum::Complete,
            surplus: Vec::new(),
            padding: Vec::new(),
        }
    }

    /// A TCP segment with these flags.
    pub fn tcp(flags: u8, source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        let transport = Transport::Tcp {
            flags,
            numbers: TcpNumbers::DEFAULT,
            options: Vec::new(),
        };
        Self::new(transport, source.into(), destination.into())
    }

    /// A UDP datagram.
    pub fn udp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        Self::new(Transport::Udp, source.into(), destination.into())
    }

    /// A packet of SCTP with this chunk.
    pub fn sctp(chunk: u8, source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        let tag = 0x7a67_0001;
        Self::new(Transport::Sctp { tag, chunk }, source.into(), destination.into())
    }

    /// An ICMP message of this type and code; of IPv6 between IPv6 addresses.
    pub fn icmp(kind: u8, code: u8, source: impl Into<IpAddr>, destination: impl Into<IpAddr>) -> Self {
        let (source, destination) = (
            SocketAddr::new(source.into(), 0),
            SocketAddr::new(destination.into(), 0),
        );
        let rest = [0x0b, 0xad, 0, 1];
        Self::new(Transport::Icmp { kind, code, rest }, source, destination)
    }

    /// An echo request, whose identifier is the source's port.
    pub fn echo_request(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        let transport = Transport::Echo { is_request: true };
        Self::new(transport, source.into(), destination.into())
    }

    /// An echo reply, whose identifier is the destination's port.
    pub fn echo_reply(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        let transport = Transport::Echo { is_request: false };
        Self::new(transport, source.into(), destination.into())
    }

    /// A packet of another protocol.
    pub fn other(protocol: u8, source: impl Into<IpAddr>, destination: impl Into<IpAddr>) -> Self {
        let (source, destination) = (
            SocketAddr::new(source.into(), 0),
            SocketAddr::new(destination.into(), 0),
        );
        Self::new(Transport::Other(protocol), source, destination)
    }

    #[must_use]
    pub fn link(mut self, source: Mac, destination: Mac) -> Self {
        (self.source_mac, self.destination_mac) = (source, destination);
        self
    }

    /// Link addresses of the answer.
    #[must_use]
    pub fn link_swapped(self) -> Self {
        let (source, destination) = (self.source_mac, self.destination_mac);
        self.link(destination, source)
    }

    #[must_use]
    pub fn from(mut self, source: impl Into<SocketAddr>) -> Self {
        self.source = source.into();
        self
    }

    #[must_use]
    pub fn to(mut self, destination: impl Into<SocketAddr>) -> Self {
        self.destination = destination.into();
        self
    }

    /// Source and destination.
    pub fn ends(&self) -> (SocketAddr, SocketAddr) {
        (self.source, self.destination)
    }

    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// TOS or traffic class.
    #[must_use]
    pub fn tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// VLAN tags with these numbers, the outer one first: 802.1Q for one, 802.1ad and 802.1Q for two.
    #[must_use]
    pub fn vlans(mut self, numbers: &[u16]) -> Self {
        self.vlans = numbers.to_vec();
        self
    }

    /// An extension header of IPv6 behind those there are, with this number; its first byte, the number of what
    /// follows, is filled in.
    #[must_use]
    pub fn extension(mut self, number: u8, bytes: Vec<u8>) -> Self {
        assert!(bytes.len().is_multiple_of(8));
        self.extensions.push((number, bytes));
        self
    }

    /// Flags and offset of fragmentation, as they stand in the header.
    #[must_use]
    pub fn fragment(mut self, field: u16) -> Self {
        self.fragment = field;
        self
    }

    /// IPv4 options: a multiple of 4 bytes, at most 40.
    #[must_use]
    pub fn options(mut self, options: Vec<u8>) -> Self {
        assert!(options.len().is_multiple_of(4) && options.len() <= 40);
        self.options = options;
        self
    }

    /// Numbers of a TCP segment.
    #[must_use]
    pub fn numbers(mut self, new: TcpNumbers) -> Self {
        match &mut self.transport {
            Transport::Tcp { numbers, .. } => *numbers = new,
            other => panic!("{other:?} has no sequence numbers"),
        }
        self
    }

    /// TCP options: a multiple of 4 bytes, at most 40.
    #[must_use]
    pub fn tcp_options(mut self, new: Vec<u8>) -> Self {
        assert!(new.len().is_multiple_of(4) && new.len() <= 40);
        match &mut self.transport {
            Transport::Tcp { options, .. } => *options = new,
            other => panic!("{other:?} has no TCP options"),
        }
        self
    }

    /// ICMP type.
    /// The reset that answers this SYN when the SYN itself is turned round: options and data stay.
    ///
    /// # Panics
    /// When this is no TCP segment.
    #[must_use]
    pub fn refused_tcp(&self) -> Self {
        let mut reset = self
            .clone()
            .link_swapped()
            .from(self.destination)
            .to(self.source)
            .ttl(64);
        let Transport::Tcp { flags, numbers, .. } = &mut reset.transport else {
            panic!("not TCP: {self:?}");
        };
        *flags = segment::RST | segment::ACK;
        *numbers = TcpNumbers {
            sequence: 0,
            acknowledgment: numbers.sequence.wrapping_add(1),
            window: 0,
        };
        reset
    }

    /// The ABORT that answers this INIT: with the tag that its value begins with.
    ///
    /// # Panics
    /// When this is no INIT.
    #[must_use]
    pub fn refused_sctp(&self) -> Self {
        let Transport::Sctp {
            chunk: chunk::INIT, ..
        } = self.transport
        else {
            panic!("no INIT: {self:?}");
        };
        let initiate_tag = self.payload.first_chunk().expect("a tag");
        let mut abort = Self::sctp(chunk::ABORT, self.destination, self.source)
            .tag(u32::from_be_bytes(*initiate_tag))
            .link(self.destination_mac, self.source_mac)
            .vlans(&self.vlans);
        if self.source.is_ipv4() {
            abort = abort.identification(0).fragment(0x4000);
        }
        abort
    }

    /// The verification tag of SCTP.
    #[must_use]
    pub fn tag(mut self, new: u32) -> Self {
        match &mut self.transport {
            Transport::Sctp { tag, .. } => *tag = new,
            other => panic!("{other:?} is not SCTP"),
        }
        self
    }

    /// The ICMP message "port unreachable" that answers this datagram.
    #[must_use]
    pub fn refused_udp(&self) -> Self {
        if self.source.is_ipv4() {
            self.reported(3, 3, 0)
        } else {
            self.reported(1, 4, 0)
        }
    }

    /// The ICMP error of this type and code about this packet, from the address that it was for: it quotes what fits
    /// the size that every path carries.
    #[must_use]
    pub fn reported(&self, kind: u8, code: u8, rest: u32) -> Self {
        let is_v4 = self.source.is_ipv4();
        let link_len = ETHERNET_LEN + 4 * self.vlans.len();
        let limit = if is_v4 { 576 - 28 } else { 1280 - 48 };
        let frame = self.build();
        let packet = &frame[link_len..frame.len() - self.padding.len()];
        let mut message = Self::icmp(kind, code, self.destination.ip(), self.source.ip())
            .link(self.destination_mac, self.source_mac)
            .vlans(&self.vlans)
            .payload_of(&packet[..packet.len().min(limit)])
            .icmp_rest(rest);
        if is_v4 {
            message = message.fragment(0x4000);
            message.identification = 0;
        }
        message
    }

    /// The four bytes behind an ICMP checksum.
    #[must_use]
    pub fn icmp_rest(mut self, new: u32) -> Self {
        match &mut self.transport {
            Transport::Icmp { rest, .. } => *rest = new.to_be_bytes(),
            other => panic!("{other:?} is not ICMP"),
        }
        self
    }

    /// TCP flags.
    #[must_use]
    pub fn flags(mut self, new: u8) -> Self {
        match &mut self.transport {
            Transport::Tcp { flags, .. } => *flags = new,
            other => panic!("{other:?} is not TCP"),
        }
        self
    }

    /// Identification of an IPv4 packet.
    #[must_use]
    pub fn identification(mut self, identification: u16) -> Self {
        self.identification = identification;
        self
    }

    /// Without any extension header of IPv6.
    #[must_use]
    pub fn without_extensions(mut self) -> Self {
        self.extensions.clear();
        self
    }

    #[must_use]
    pub fn icmp_kind(mut self, new: u8) -> Self {
        match &mut self.transport {
            Transport::Icmp { kind, .. } => *kind = new,
            other => panic!("{other:?} has no ICMP type"),
        }
        self
    }

    /// So many bytes of payload, no two neighbours equal.
    #[must_use]
    pub fn payload(mut self, len: usize) -> Self {
        self.payload = (0..len).map(|index| (index * 7 + 0x31) as u8).collect();
        self
    }

    /// This payload.
    #[must_use]
    pub fn payload_of(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }

    #[must_use]
    pub fn checksum(mut self, checksum: Checksum) -> Self {
        self.checksum = checksum;
        self
    }

    /// Changes the payload's first two bytes so that the transport checksum is `wanted`, which no packet has
    /// as 0xffff. Addresses and ports must be set before.
    #[must_use]
    pub fn payload_for_checksum(mut self, wanted: u16) -> Self {
        assert!(wanted != 0xffff && self.payload.len() >= 2);
        self.payload[..2].fill(0);
        let segment = self.segment(0);
        let sum = fold(self.pseudo_sum(segment.len()) + sum(&segment));
        let word = fold(u64::from(!wanted) + u64::from(!sum));
        self.payload[..2].copy_from_slice(&word.to_be_bytes());
        self
    }

    /// Bytes behind the packet, as Ethernet needs to reach 60.
    #[must_use]
    pub fn padding(mut self, len: usize) -> Self {
        self.padding = vec![0xa5; len];
        self
    }

    /// Bytes of the IP packet behind the datagram, as options of UDP are (draft-ietf-tsvwg-udp-options).
    #[must_use]
    pub fn surplus(mut self, len: usize) -> Self {
        self.surplus = vec![0x5a; len];
        self
    }

    /// The folded sum of the pseudo-header: a partial checksum.
    pub fn partial_checksum(&self) -> u16 {
        fold(self.pseudo_sum(self.segment(0).len()))
    }

    fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp { .. } => TCP,
            Transport::Udp => UDP,
            Transport::Sctp { .. } => SCTP,
            Transport::Icmp { .. } | Transport::Echo { .. } if self.source.is_ipv4() => ICMP,
            Transport::Icmp { .. } | Transport::Echo { .. } => ICMPV6,
            Transport::Other(protocol) => protocol,
        }
    }

    fn pseudo_sum(&self, len: usize) -> u64 {
        sum(&octets(self.source)) + sum(&octets(self.destination)) + u64::from(self.protocol()) + len as u64
    }

    /// Transport header and payload with this in the checksum field.
    fn segment(&self, checksum: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ports = [self.source.port(), self.destination.port()];
        match &self.transport {
            Transport::Tcp {
                flags,
                numbers,
                options,
            } => {
                ports.iter().for_each(|port| bytes.extend(port.to_be_bytes()));
                bytes.extend(numbers.sequence.to_be_bytes());
                bytes.extend(numbers.acknowledgment.to_be_bytes());
                bytes.extend([((20 + options.len()) * 4) as u8, *flags]);
                bytes.extend(numbers.window.to_be_bytes());
                bytes.extend(checksum.to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(options);
            }
            Transport::Udp => {
                ports.iter().for_each(|port| bytes.extend(port.to_be_bytes()));
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend(checksum.to_be_bytes());
            }
            Transport::Sctp { tag, chunk } => {
                ports.iter().for_each(|port| bytes.extend(port.to_be_bytes()));
                bytes.extend(tag.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend([*chunk, 0]);
                bytes.extend(((4 + self.payload.len()) as u16).to_be_bytes());
            }
            Transport::Icmp { kind, code, rest } => {
                bytes.extend([*kind, *code]);
                bytes.extend(checksum.to_be_bytes());
                bytes.extend(rest);
            }
            Transport::Echo { is_request } => {
                let (kind, identifier) = match (is_request, self.source.is_ipv4()) {
                    (true, true) => (8, ports[0]),
                    (true, false) => (128, ports[0]),
                    (false, true) => (0, ports[1]),
                    (false, false) => (129, ports[1]),
                };
                bytes.extend([kind, 0]);
                bytes.extend(checksum.to_be_bytes());
                bytes.extend(identifier.to_be_bytes());
                bytes.extend([0, 1]);
            }
            Transport::Other(_) => {}
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn transport_checksum(&self) -> u16 {
        let segment = self.segment(0);
        match (self.checksum, &self.transport) {
            (Checksum::Fixed(value), _) => value,
            // Another field; see `build`.
            (_, Transport::Sctp { .. }) => 0,
            (Checksum::Partial, _) => self.partial_checksum(),
            (Checksum::Complete, Transport::Icmp { .. } | Transport::Echo { .. })
                if self.source.is_ipv4() =>
            {
                !fold(sum(&segment))
            }
            (Checksum::Complete, transport) => {
                let value = !fold(self.pseudo_sum(segment.len()) + sum(&segment));
                // RFC 768: zero means "none", so a computed zero is sent as all ones.
                let is_udp = matches!(transport, Transport::Udp);
                if is_udp && value == 0 { 0xffff } else { value }
            }
        }
    }

    /// The frame.
    pub fn build(&self) -> Vec<u8> {
        let mut segment = self.segment(self.transport_checksum());
        if let (Transport::Sctp { .. }, Checksum::Complete) = (&self.transport, self.checksum) {
            let crc = crc32c(&segment);
            segment[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        segment.extend(&self.surplus);
        let (mut ethertype, ip) = if self.source.is_ipv4() {
            (0x0800_u16, self.ipv4_header(segment.len()))
        } else {
            (0x86dd, self.ipv6_headers(segment.len()))
        };
        let mut tags = Vec::new();
        for (depth, number) in self.vlans.iter().enumerate().rev() {
            tags.splice(..0, [number.to_be_bytes(), ethertype.to_be_bytes()].concat());
            ethertype = if depth == 0 && self.vlans.len() > 1 {
                0x88a8
            } else {
                0x8100
            };
        }
        let mut frame = Vec::new();
        frame.extend(self.destination_mac);
        frame.extend(self.source_mac);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(tags);
        frame.extend(ip);
        frame.extend(segment);
        frame.extend(&self.padding);
        frame
    }

    fn ipv4_header(&self, segment_len: usize) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let mut ip = vec![0x40 | (header_len / 4) as u8, self.tos];
        ip.extend(((header_len + segment_len) as u16).to_be_bytes());
        ip.extend(self.identification.to_be_bytes());
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, self.protocol(), 0, 0]);
        ip.extend(octets(self.source));
        ip.extend(octets(self.destination));
        ip.extend(&self.options);
        let checksum = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        ip
    }

    fn ipv6_headers(&self, segment_len: usize) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut next = self.protocol();
        for (number, bytes) in self.extensions.iter().rev() {
            let mut bytes = bytes.clone();
            bytes[0] = std::mem::replace(&mut next, *number);
            extensions.splice(..0, bytes);
        }
        let mut ip = (0x6000_0000_u32 | u32::from(self.tos) << 20)
            .to_be_bytes()
            .to_vec();
        ip.extend(((extensions.len() + segment_len) as u16).to_be_bytes());
        ip.extend([next, self.ttl]);
        ip.extend(octets(self.source));
        ip.extend(octets(self.destination));
        ip.extend(extensions);
        ip
    }
}

/// The 4 or 16 octets of an address.
fn octets(address: SocketAddr) -> Vec<u8> {
    match address.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An ARP packet in an Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub struct Arp {
    /// 1: request, 2: reply.
    pub operation: u16,
    pub sender_mac: Mac,
    pub sender: Ipv4Addr,
    pub target_mac: Mac,
    pub target: Ipv4Addr,
}

impl Arp {
    /// The frame, with these link addresses.
    pub fn build(&self, source: Mac, destination: Mac) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(destination);
        frame.extend(source);
        frame.extend(0x0806_u16.to_be_bytes());
        frame.extend([0, 1, 8, 0, 6, 4]);
        frame.extend(self.operation.to_be_bytes());
        frame.extend(self.sender_mac);
        frame.extend(self.sender.octets());
        frame.extend(self.target_mac);
        frame.extend(self.target.octets());
        frame
    }
}

/// A frame with the link and IPv4 header of another, but for identification, fragmentation, length and checksum, before
/// this payload.
pub fn with_ipv4_header(header: &[u8], identification: u16, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = header.to_vec();
    let ip = &mut frame[ETHERNET_LEN..];
    ip[2..4].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
    ip[4..6].copy_from_slice(&identification.to_be_bytes());
    ip[6..8].copy_from_slice(&fragment.to_be_bytes());
    ip[10..12].fill(0);
    let checksum = !fold(sum(ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A frame with some bytes replaced; checksums stay as they are.
pub fn patched(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

/// RFC 8200 §4.5: what follows is part of a packet.
const FRAGMENT: u8 = 44;

/// What a frame carries: its IP packet without padding, cut into parts.
struct Ip<'f> {
    /// Of IPv4 with options.
    header: &'f [u8],
    /// Of fragments that of their header in IPv6.
    protocol: u8,
    /// Source and destination.
    addresses: &'f [u8],
    segment: &'f [u8],
}

/// The IP packet of a frame, behind whatever VLAN tags; `None`: there is none. Of IPv6 without extension headers.
///
/// # Panics
/// When its length fields lie.
fn ip(frame: &[u8]) -> Option<Ip<'_>> {
    let offset = network_offset(frame)?;
    let ip = &frame[offset..];
    let len = |at: usize| usize::from(u16::from_be_bytes([ip[at], ip[at + 1]]));
    if !matches!(frame[offset - 2..offset], [8, 0] | [0x86, 0xdd]) {
        return None;
    }
    // What tcx has translated keeps its link header until the kernel sends it.
    match ip[0] >> 4 {
        4 => {
            let header_len = usize::from(ip[0] & 0x0f) * 4;
            Some(Ip {
                header: &ip[..header_len],
                protocol: if len(6) & 0x3fff == 0 { ip[9] } else { FRAGMENT },
                addresses: &ip[12..20],
                segment: &ip[header_len..len(2)],
            })
        }
        6 => Some(Ip {
            header: &ip[..40],
            protocol: ip[6],
            addresses: &ip[8..40],
            segment: &ip[40..40 + len(4)],
        }),
        _ => None,
    }
}

/// Where what follows the link header and its VLAN tags starts.
fn network_offset(frame: &[u8]) -> Option<usize> {
    let mut offset = ETHERNET_LEN;
    while matches!(frame.get(offset - 2..offset)?, [0x81, 0] | [0x88, 0xa8]) {
        offset += 4;
    }
    frame.get(offset..).map(|_| offset)
}

/// Which checksums of a frame are wrong; empty for frames that have none. A UDP checksum of zero is none in IPv4.
///
/// # Panics
/// When the frame's length fields lie.
pub fn wrong_checksums(frame: &[u8]) -> Vec<&'static str> {
    let Some(ip) = ip(frame) else {
        return Vec::new();
    };
    let is_v4 = ip.addresses.len() == 8;
    let segment = match ip.protocol {
        // What is behind the datagram is not under its checksum (RFC 768).
        UDP => ip.segment.get(..datagram_len(ip.segment)).unwrap_or(ip.segment),
        _ => ip.segment,
    };
    let pseudo = sum(ip.addresses) + u64::from(ip.protocol) + segment.len() as u64;
    let mut wrong = Vec::new();
    if is_v4 && fold(sum(ip.header)) != 0xffff {
        wrong.push("IPv4");
    }
    match ip.protocol {
        TCP if fold(pseudo + sum(segment)) != 0xffff => wrong.push("TCP"),
        UDP if (segment[6..8] != [0, 0] || !is_v4) && fold(pseudo + sum(segment)) != 0xffff => {
            wrong.push("UDP");
        }
        ICMP if fold(sum(segment)) != 0xffff => wrong.push("ICMP"),
        ICMPV6 if fold(pseudo + sum(segment)) != 0xffff => wrong.push("ICMPv6"),
        SCTP if !has_crc(segment) => wrong.push("SCTP"),
        _ => {}
    }
    wrong
}

/// Bytes of a datagram of UDP, as its header says.
fn datagram_len(segment: &[u8]) -> usize {
    usize::from(u16::from_be_bytes([segment[4], segment[5]]))
}

/// Bytes of a frame's IP packet, header and payload, as its header says.
///
/// # Panics
/// When the frame has none.
pub fn ip_len(frame: &[u8]) -> u64 {
    let offset = network_offset(frame).expect("an Ethernet frame");
    let len = |at: usize| u64::from(u16::from_be_bytes([frame[offset + at], frame[offset + at + 1]]));
    if frame[offset] >> 4 == 4 {
        len(2)
    } else {
        40 + len(4)
    }
}

/// Is this a TCP segment with RST, or an ABORT of SCTP?
pub fn is_reset(frame: &[u8]) -> bool {
    ip(frame).is_some_and(|ip| match ip.protocol {
        TCP => ip.segment[13] & segment::RST != 0,
        SCTP => ip.segment[12] == chunk::ABORT,
        _ => false,
    })
}

/// Does a packet of SCTP have the right checksum?
fn has_crc(segment: &[u8]) -> bool {
    let Some(field) = segment.get(8..12) else {
        return false;
    };
    let mut zeroed = segment.to_vec();
    zeroed[8..12].fill(0);
    crc32c(&zeroed).to_le_bytes() == field
}

/// CRC32c, bit by bit (RFC 9260 appendix A).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut register = u32::MAX;
    for byte in bytes {
        register ^= u32::from(*byte);
        for _ in 0..8 {
            register = register >> 1 ^ if register & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    !register
}

/// The same packet in IPv6: of each address the last four octets are those of the IPv4 address, behind `prefix`.
/// `None` for what has no such twin: other protocols than TCP, UDP, SCTP and ICMP echo, fragments, options, checksums that are not
/// right, lengths that lie.
pub fn in_ipv6(frame: &[u8], prefix: [u8; 12]) -> Option<Vec<u8>> {
    let offset = network_offset(frame)?;
    let header = frame.get(offset..offset + 20)?;
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if frame[offset - 2..offset] != [8, 0]
        || header[0] != 0x45
        || is_fragment
        || total_len < 28.min(frame.len() - offset)
        || offset + total_len > frame.len()
    {
        return None;
    }
    let packet = ip(frame)?;
    let checksum_at = match packet.protocol {
        TCP if packet.segment.len() >= 20 => 16,
        UDP if packet.segment.len() >= 8
            && packet.segment[6..8] != [0, 0]
            && datagram_len(packet.segment) == packet.segment.len() =>
        {
            6
        }
        ICMP if packet.segment.len() >= 8 && matches!(packet.segment[..2], [8 | 0, 0]) => 2,
        // Nothing of its own changes.
        SCTP if packet.segment.len() >= 16 => usize::MAX,
        _ => return None,
    };
    if !wrong_checksums(frame).is_empty() {
        return None;
    }
    let addresses: Vec<u8> = packet
        .addresses
        .chunks(4)
        .flat_map(|address| [&prefix, address].concat())
        .collect();
    let mut segment = packet.segment.to_vec();
    let mut protocol = packet.protocol;
    if protocol == ICMP {
        protocol = ICMPV6;
        segment[0] = if segment[0] == 8 { 128 } else { 129 };
    }
    if protocol != SCTP {
        segment[checksum_at..checksum_at + 2].fill(0);
        let pseudo = sum(&addresses) + u64::from(protocol) + segment.len() as u64;
        let checksum = match !fold(pseudo + sum(&segment)) {
            0 if protocol == UDP => 0xffff,
            checksum => checksum,
        };
        segment[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    let mut twin = frame[..offset - 2].to_vec();
    twin.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    twin.extend((segment.len() as u16).to_be_bytes());
    twin.extend([protocol, header[8]]);
    twin.extend(addresses);
    twin.extend(segment);
    twin.extend(&frame[offset + total_len..]);
    Some(twin)
}

/// Sum of big-endian words; an odd last byte is padded with zero (RFC 1071).
pub fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | word.get(1).map_or(0, |low| u64::from(*low)))
        .sum()
}

/// Adds carries back in until 16 bits are left (RFC 1071).
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV4;

    use super::*;

    const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 7), 50000);
    const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 10), 80);

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)), 0xddf2);
    }

    #[test]
    fn the_examples_of_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn built_packets_have_valid_checksums_and_damaged_ones_do_not() {
        let packets = [
            Builder::tcp(segment::SYN, CLIENT, VIP)
                .tcp_options(vec![2, 4, 5, 0xb4])
                .payload(3),
            Builder::udp(CLIENT, VIP).options(vec![1; 8]).payload(5),
            Builder::icmp(8, 0, *CLIENT.ip(), *VIP.ip()).payload(56),
            Builder::sctp(chunk::INIT, CLIENT, VIP).payload(16),
            Builder::echo_request(CLIENT, VIP).payload(56),
        ];
        for packet in packets {
            let mut frame = packet.build();
            assert_eq!(wrong_checksums(&frame), Vec::<&str>::new(), "{packet:?}");
            frame[ETHERNET_LEN + 8] ^= 1;
            let last = frame.len() - 1;
            frame[last] ^= 1;
            assert_eq!(wrong_checksums(&frame).len(), 2, "{packet:?}");
        }
    }

    #[test]
    fn a_payload_can_be_made_for_any_checksum() {
        for wanted in [0, 1, 0x1234, 0xfffe] {
            let packet = Builder::tcp(segment::ACK, CLIENT, VIP)
                .payload(11)
                .payload_for_checksum(wanted);
            assert_eq!(packet.transport_checksum(), wanted);
            assert_eq!(wrong_checksums(&packet.build()), Vec::<&str>::new());
        }
    }
}
