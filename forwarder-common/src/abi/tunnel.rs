//! Tunnels that the programs handle themselves, without the kernel's device.
//!
//! What goes out is a matter of a [`TunnelPeer`]: the finished outer headers, made by the agent (`crate::outer`), in
//! which the data path only writes what differs between packets. So it knows nothing of kinds when it sends, and
//! sends all of them alike.
//!
//! What comes in is recognised by its [`TunnelEndpointKey`]: addresses, kind and number must be those of a tunnel. A
//! UDP port ([`TunnelPort`]) or an IP protocol says what kind to look for, which costs next to nothing for packets that
//! are none.

use bytemuck::{Pod, Zeroable};

use crate::wire::{Be16, Be32, IpAddress, MacAddress};

/// How packets travel inside others.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct TunnelKind(pub u8);

impl TunnelKind {
    /// Nothing of ours.
    pub const NONE: Self = Self(0);
    /// Ethernet in VXLAN (RFC 7348).
    pub const VXLAN: Self = Self(1);
    /// Ethernet in Geneve (RFC 8926).
    pub const GENEVE: Self = Self(2);
    /// IP in GRE (RFC 2784, RFC 2890).
    pub const GRE: Self = Self(3);
    /// Ethernet in GRE.
    pub const GRETAP: Self = Self(4);
    /// IP in IP, in all four combinations of families (RFC 2003, RFC 4213, RFC 2473).
    pub const IPIP: Self = Self(5);
    /// IP in UDP.
    pub const FOU: Self = Self(6);
    /// IP in UDP with a header between (draft-ietf-intarea-gue).
    pub const GUE: Self = Self(7);

    /// Is the inner packet an Ethernet frame?
    #[inline(always)]
    pub const fn is_ethernet(self) -> bool {
        matches!(self, Self::VXLAN | Self::GENEVE | Self::GRETAP)
    }

    /// Is the outer packet UDP?
    #[inline(always)]
    pub const fn is_udp(self) -> bool {
        matches!(self, Self::VXLAN | Self::GENEVE | Self::FOU | Self::GUE)
    }
}

/// Index in the table of peers; zero: none.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct PeerId(pub u16);

impl PeerId {
    /// No peer: the packet leaves without outer headers.
    pub const NONE: Self = Self(0);
}

/// Key of the table that says which peer a next hop on a tunnel device is.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct TunnelHopKey {
    /// The tunnel device.
    pub ifindex: u32,
    /// The next hop's link address inside the tunnel; zeros for kinds without Ethernet.
    pub mac: MacAddress,
    /// Version of the inner IP packet, 4 or 6: the headers in front of it say which.
    pub version: u16,
}

/// Its value.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TunnelHop {
    pub peer: PeerId,
    pub reserved: u16,
}

/// Bits of [`TunnelPeer::flags`].
pub mod peer_flag {
    /// The outer packet is IPv6.
    pub const IPV6: u16 = 1;
    /// The UDP header has a checksum.
    pub const UDP_CHECKSUM: u16 = 2;
    /// The outer DSCP is the inner packet's.
    pub const INHERIT_DSCP: u16 = 4;
    /// The outer packet is not to be fragmented where the inner one is not; IPv6 never is on its way.
    pub const INHERIT_DONT_FRAGMENT: u16 = 8;
    /// The flow label of the outer packet carries the flow's hash (RFC 6438), as it has no UDP port for it.
    pub const HASH_FLOW_LABEL: u16 = 16;
}

/// Bytes of outer headers that a peer has room for: IPv6, UDP, Geneve, 24 bytes of options, inner Ethernet, and 2.
pub const OUTER_LEN_MAX: usize = 96;
/// The outer headers are copied in blocks of so many bytes.
pub const OUTER_BLOCK_LEN: usize = 16;

/// A far end of a tunnel: how to reach it, and the headers to put in front of an inner packet.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TunnelPeer {
    /// The headers from the outer IP header to the inner one, in network byte order. Zero in them: lengths, TTL, type
    /// of service, flow label, identification, UDP source port and all checksums.
    pub outer: [[u32; OUTER_BLOCK_LEN / 4]; OUTER_LEN_MAX / OUTER_BLOCK_LEN],
    /// The last block's worth of [`Self::outer`].
    pub outer_end: [u32; OUTER_BLOCK_LEN / 4],
    /// Outer source: an address of ours.
    pub local: IpAddress,
    /// Outer destination.
    pub remote: IpAddress,
    /// The tunnel device; zero where there is none.
    pub ifindex: u32,
    /// Largest inner IP packet, in bytes.
    pub mtu_bytes: u32,
    /// RFC 6437, host byte order.
    pub flow_label: u32,
    /// Length of the outer headers in bytes; zero: there is no such peer.
    pub outer_len: u16,
    /// Bits of [`peer_flag`].
    pub flags: u16,
    /// Folded sum of the outer IP header as it stands in [`Self::outer`].
    pub ip_sum: u16,
    /// Folded sum of all behind the outer IP header as it stands in [`Self::outer`], and of the addresses and
    /// protocol of its pseudo-header.
    pub udp_sum: u16,
    /// First UDP source port, host byte order.
    pub source_port: u16,
    /// How many source ports there are; zero: no UDP.
    pub source_ports: u16,
    /// Hop limit of the outer packet; zero: the inner packet's.
    pub ttl: u8,
    /// Type of service of the outer packet but for ECN, which is the inner packet's (RFC 6040).
    pub tos: u8,
    pub kind: TunnelKind,
    pub reserved: [u8; 5],
}

/// What a UDP destination port means to us.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct TunnelPort {
    pub kind: TunnelKind,
    pub reserved: [u8; 3],
}

/// Key of the table of endpoints: what all packets of a tunnel that come in have in common.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct TunnelEndpointKey {
    /// Outer destination: an address of ours.
    pub local: IpAddress,
    /// Outer source; unspecified for VXLAN, whose devices take packets from everybody.
    pub remote: IpAddress,
    /// Number of the network (`wire::tunnel::vni_word`) or key of GRE; else zero.
    pub id: Be32,
    /// UDP destination port; else zero.
    pub port: Be16,
    pub kind: TunnelKind,
    /// IP in IP, FOU, GUE: protocol number of what is inside. GRE: 1 with a key, 0 without. Else zero.
    pub detail: u8,
}

/// What comes in there.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TunnelEndpoint {
    /// The tunnel device; zero where there is none.
    pub ifindex: u32,
    /// Largest inner IP packet that the tunnel carries, in bytes.
    pub mtu_bytes: u32,
    /// Whom an inner frame must be for; of no meaning for kinds without Ethernet.
    pub mac: MacAddress,
    pub reserved: u16,
}
