//! Listeners: which packets open a flow, and towards which group.

use bytemuck::{Pod, Zeroable};

use super::backend::GroupId;
use crate::wire::{Be16, Be32, IpAddress};

/// Index of a listener in the counter table; stable while the agent runs.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct ListenerId(pub u32);

/// Key of the listener table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct ListenerKey {
    pub vip: IpAddress,
    pub port: Be16,
    /// IP protocol number.
    pub protocol: Be16,
}

impl ListenerKey {
    /// The key of a listener on one port.
    #[inline(always)]
    pub const fn new(vip: IpAddress, port: Be16, protocol: u8) -> Self {
        Self {
            vip,
            port,
            protocol: Be16::new(protocol as u16),
        }
    }
}

/// Value of the listener table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Listener {
    pub id: ListenerId,
    pub group: GroupId,
    /// Most flows at a time; zero: no limit of its own.
    pub max_flows: u32,
    /// Bits of [`listener_flag`].
    pub flags: u32,
    /// SYNs in a second that open flows, of each CPU; those beyond are answered with a cookie. Has a meaning with
    /// [`listener_flag::COOKIES`].
    pub syns_per_cpu: u32,
    /// Flows that the clients of one prefix may open per second. Has a meaning with [`listener_flag::RATE`], as what
    /// follows.
    pub source_flows_per_second: u32,
    /// Flows that they may open at once after a while without any.
    pub source_burst: u32,
    /// Leading bits, of 128, of the addresses of such a prefix in IPv4, mapped.
    pub source_bits_v4: u16,
    /// The same of IPv6.
    pub source_bits_v6: u16,
}

impl Listener {
    /// A copy, field by field; see [`IpAddress::copied`].
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        Self { ..*self }
    }
}

/// Bits of [`Listener::flags`].
pub mod listener_flag {
    /// Only clients that the source table names for this listener may open flows.
    pub const SOURCES: u32 = 1;
    /// SYNs may be answered with cookies.
    pub const COOKIES: u32 = 2;
    /// The clients of a prefix may open so many flows per second.
    pub const RATE: u32 = 4;
}

/// Key of the table of listeners with more than one port: a trie over VIP, protocol and port, so that a range of
/// ports is a few prefixes and any port is one.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct ListenerRangeKey {
    /// How many of the bits behind this field count.
    pub prefix_bits: u32,
    pub vip: IpAddress,
    /// IP protocol number.
    pub protocol: Be16,
    pub port: Be16,
}

impl ListenerRangeKey {
    /// The bits of VIP, protocol and port: those of a packet's key.
    pub const BITS: u32 = IpAddress::BITS + 32;

    /// The key of the ports that share their first `port_bits` bits with `port`.
    #[inline(always)]
    pub const fn new(vip: IpAddress, protocol: u8, port: Be16, port_bits: u32) -> Self {
        Self {
            prefix_bits: Self::BITS - 16 + port_bits,
            vip,
            protocol: Be16::new(protocol as u16),
            port,
        }
    }
}

/// Key of the table of clients that a listener admits: a trie over listener and source address.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct SourceKey {
    /// How many of the bits behind this field count.
    pub prefix_bits: u32,
    /// The listener's id.
    pub listener: Be32,
    pub address: IpAddress,
}

impl SourceKey {
    /// The key of the addresses that share their first `address_bits` of 128 bits with `address`.
    #[inline(always)]
    pub const fn new(listener: ListenerId, address: IpAddress, address_bits: u32) -> Self {
        Self {
            prefix_bits: 32 + address_bits,
            listener: Be32::new(listener.0),
            address,
        }
    }
}

/// Value of the table of admitted clients.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Source {
    /// One; a trie has no values without bytes.
    pub admitted: u32,
}

/// Key of the VIP table: an address that we answer ARP and echo requests for.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct VipKey {
    pub address: IpAddress,
}

/// Value of the VIP table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Vip {
    /// How many listeners use it; never zero in the table.
    pub listeners: u32,
    /// How many of them have more than one port.
    pub range_listeners: u32,
}
