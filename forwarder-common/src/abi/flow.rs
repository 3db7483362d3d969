//! Flows: one entry per flow, which serves both directions.
//!
//! A flow's number ([`FlowId`]) is at the same time its SNAT binding (see `abi::snat`), so a full-NAT reply
//! finds its entry by array index, with no second hash entry: both directions exist or neither does, because
//! they are one entry. DNAT replies carry no binding and get a key of their own.
//!
//! The data path keeps no clock. A packet sets `seen`; the agent clears it on each sweep and keeps the time
//! of the last sweep that found it set. So idle times survive an agent's restart as "seen just now", and a hit
//! costs no clock read.
use bytemuck::{Pod, Zeroable};

use super::{backend::BackendId, listener::ListenerId};
use crate::wire::{Be16, Be32, IpAddress, Ipv4Address, LinkPair};

/// Index in the flow table.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct FlowId(pub u32);

/// The 5-tuple as it stands in the packet; of IPv6 the key of the flow index.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct FlowKey {
    pub source: IpAddress,
    pub destination: IpAddress,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// IP protocol number; 32 bits wide because a key has no bytes to spare for padding.
    pub protocol: u32,
}

impl FlowKey {
    /// Is it of IPv4? Then [`Self::v4`] is its key in the flow index.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.source.is_v4()
    }

    /// The short form.
    #[inline(always)]
    pub const fn v4(&self) -> FlowKeyV4 {
        FlowKeyV4 {
            source: self.source.low(),
            destination: self.destination.low(),
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
        }
    }
}

/// A 5-tuple of IPv4 in 16 bytes: key of its own flow index, as the cost of a lookup grows with the key.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct FlowKeyV4 {
    pub source: Ipv4Address,
    pub destination: Ipv4Address,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// IP protocol number.
    pub protocol: u32,
}

impl FlowKeyV4 {
    /// From the bytes as they stand in a packet: source and destination; both ports.
    ///
    /// In two stores: what hashes and compares a key reads more at a time than a field, and waits where that was
    /// written in pieces (Intel 64 Optimization Manual, "Store Forwarding").
    #[inline(always)]
    pub fn new(addresses: [u8; 8], ports: [u8; 4], protocol: u8) -> Self {
        let (ports, protocol) = (u64::from(u32::from_ne_bytes(ports)), u64::from(protocol));
        let second = if cfg!(target_endian = "little") {
            ports | protocol << 32
        } else {
            ports << 32 | protocol
        };
        bytemuck::cast([u64::from_ne_bytes(addresses), second])
    }

    /// The long form.
    #[inline(always)]
    pub const fn long(&self) -> FlowKey {
        FlowKey {
            source: IpAddress::from_v4(self.source),
            destination: IpAddress::from_v4(self.destination),
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
        }
    }
}

/// Value of the flow index.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct FlowReference {
    pub id: FlowId,
    pub direction: Direction,
}

/// Which way a packet goes.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Direction(pub u32);

impl Direction {
    /// Client to backend.
    pub const REQUEST: Self = Self(0);
    /// Backend to client.
    pub const REPLY: Self = Self(1);
}

/// The addresses and ports of a flow on both sides of the gateway.
///
/// Both rewrites come from here, so they cannot drift apart: a request leaves as `snat -> backend`, a reply as
/// `vip -> client`. In DNAT mode `snat` equals `client`.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct FlowBinding {
    pub client: IpAddress,
    pub vip: IpAddress,
    pub snat: IpAddress,
    pub backend: IpAddress,
    pub client_port: Be16,
    pub vip_port: Be16,
    pub snat_port: Be16,
    pub backend_port: Be16,
    /// IP protocol number.
    pub protocol: u32,
    /// [`Self::BOTH_V4`], [`Self::BOTH_V6`], or zero.
    pub families: u32,
}

impl FlowBinding {
    /// In `families`: client and backend are of IPv4.
    pub const BOTH_V4: u32 = 4;
    /// In `families`: client and backend are of IPv6.
    pub const BOTH_V6: u32 = 6;

    /// A copy, field by field; see [`IpAddress::copied`].
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        Self {
            client: self.client.copied(),
            vip: self.vip.copied(),
            snat: self.snat.copied(),
            backend: self.backend.copied(),
            ..*self
        }
    }

    /// The 5-tuple of a request as it arrives.
    #[inline(always)]
    pub const fn request_key(&self) -> FlowKey {
        FlowKey {
            source: self.client,
            destination: self.vip,
            source_port: self.client_port,
            destination_port: self.vip_port,
            protocol: self.protocol,
        }
    }

    /// The 5-tuple of a reply as it arrives.
    #[inline(always)]
    pub const fn reply_key(&self) -> FlowKey {
        FlowKey {
            source: self.backend,
            destination: self.snat,
            source_port: self.backend_port,
            destination_port: self.snat_port,
            protocol: self.protocol,
        }
    }

    /// The short form of [`Self::request_key`], where that is of IPv4.
    #[inline(always)]
    pub const fn request_key_v4(&self) -> FlowKeyV4 {
        FlowKeyV4 {
            source: self.client.low(),
            destination: self.vip.low(),
            source_port: self.client_port,
            destination_port: self.vip_port,
            protocol: self.protocol,
        }
    }

    /// The short form of [`Self::reply_key`], where that is of IPv4.
    #[inline(always)]
    pub const fn reply_key_v4(&self) -> FlowKeyV4 {
        FlowKeyV4 {
            source: self.backend.low(),
            destination: self.snat.low(),
            source_port: self.backend_port,
            destination_port: self.snat_port,
            protocol: self.protocol,
        }
    }

    /// Do replies of both arrive with the same 5-tuple?
    #[inline(always)]
    pub fn has_replies_of(&self, other: &Self) -> bool {
        self.backend == other.backend
            && self.snat == other.snat
            && self.backend_port == other.backend_port
            && self.snat_port == other.snat_port
            && self.protocol == other.protocol
    }

    /// Does a reply arrive at the client's own address? Then it needs a key in the flow index.
    #[inline(always)]
    pub fn is_dnat(&self) -> bool {
        self.snat == self.client && self.snat_port == self.client_port
    }
}

/// What an entry is.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct FlowState(pub u8);

impl FlowState {
    /// Nobody's.
    pub const FREE: Self = Self(0);
    /// Its keys are in the flow index.
    pub const LIVE: Self = Self(1);
    /// Its keys are gone; the agent frees it when no packet can be using it any more.
    pub const UNLINKED: Self = Self(2);
}

/// What the TCP tracker has seen, as bits; see `datapath::tcp_state`.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct TcpEvents(pub u8);

/// How to reach the next station.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct HopKind(pub u8);

impl HopKind {
    /// Not looked up yet.
    pub const UNKNOWN: Self = Self(0);
    /// Frames leave `ifindex` straight from the program.
    pub const DIRECT: Self = Self(1);
    /// The rewritten packet goes up; the stack routes it.
    pub const STACK: Self = Self(2);
    /// The agent cuts and sends it. Of a packet, never of a flow.
    pub const AGENT: Self = Self(3);
}

/// Where a packet goes after its rewrite; cached in the flow until routes change.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct NextHop {
    /// Link addresses of the frame; meaningful for `HopKind::DIRECT` from XDP.
    pub link: LinkPair,
    /// Egress interface.
    pub ifindex: u32,
    /// Value of `Settings::route_generation` when this was looked up.
    pub generation: u32,
    pub kind: HopKind,
    /// Hook that looked it up (`datapath::Hook`); another hook asks anew, as it can send differently.
    pub hook: u8,
    /// Largest IP packet that the egress interface carries, in bytes; zero: unknown, or more than 16 bits say.
    pub mtu_bytes: u16,
    /// The tunnel peer that packets are encapsulated for (`abi::tunnel::PeerId`); zero: none.
    pub peer: u32,
    /// VLAN identifiers that frames leave with, the outer one first; zero: none.
    pub vlans: [u16; 2],
}

impl NextHop {
    /// Do frames leave without tags and outer headers?
    #[inline(always)]
    pub const fn is_plain(&self) -> bool {
        let [outer, inner] = self.vlans;
        self.peer | outer as u32 | inner as u32 == 0
    }

    /// A copy, field by field; see [`IpAddress::copied`].
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        let [outer, inner] = self.vlans;
        Self {
            link: self.link.copied(),
            ifindex: self.ifindex,
            generation: self.generation,
            kind: self.kind,
            hook: self.hook,
            mtu_bytes: self.mtu_bytes,
            peer: self.peer,
            vlans: [outer, inner],
        }
    }
}

/// One flow. 192 bytes: three cache lines; what a packet is compared with stands in the first.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct FlowEntry {
    pub binding: FlowBinding,
    pub state: FlowState,
    /// Non-zero: a packet came since the agent's last sweep.
    pub seen: u8,
    pub tcp: TcpEvents,
    /// Non-zero: the flow counts among the live ones of its listener and backend.
    pub counted: u8,
    pub listener: ListenerId,
    pub backend: BackendId,
    /// Checksum delta of a request's addresses, folded (`wire::checksum::Delta`); a reply's is its reverse.
    pub address_delta: u16,
    /// Checksum delta of a request's ports, folded.
    pub port_delta: u16,
    pub request_hop: NextHop,
    pub reply_hop: NextHop,
    /// What the client acknowledged last: the sequence number it expects next (RFC 9293 §3.4). A reset with it is
    /// one that the client accepts (RFC 5961 §3.2).
    pub client_expects: Be32,
    /// The same of the backend.
    pub backend_expects: Be32,
    /// IP bytes.
    pub request_bytes: u64,
    /// IP bytes.
    pub reply_bytes: u64,
    pub request_packets: u32,
    pub reply_packets: u32,
}

impl FlowEntry {
    /// The 5-tuple of a packet of this direction as it arrives.
    #[inline(always)]
    pub fn key(&self, direction: Direction) -> FlowKey {
        if direction == Direction::REQUEST {
            self.binding.request_key()
        } else {
            self.binding.reply_key()
        }
    }
}

const _: () = assert!(size_of::<FlowEntry>() == 192);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dnat_binding_is_told_by_its_client_address() {
        let mut binding = FlowBinding::zeroed();
        binding.client = Ipv4Address::new([192, 0, 2, 7]).into();
        binding.client_port = Be16::new(5000);
        binding.snat = binding.client;
        binding.snat_port = binding.client_port;
        assert!(binding.is_dnat());
        binding.snat = Ipv4Address::new([100, 64, 0, 2]).into();
        assert!(!binding.is_dnat());
        assert_eq!(binding.reply_key().destination, binding.snat);
    }
}
