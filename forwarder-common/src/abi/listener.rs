//! Listeners: which packets open a flow, and towards which group.

use bytemuck::{Pod, Zeroable};

use super::backend::GroupId;
use crate::wire::{Be16, Ipv4Address};

/// Index of a listener in the counter table; stable while the agent runs.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct ListenerId(pub u32);

/// Key of the listener table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct ListenerKey {
    pub vip: Ipv4Address,
    /// Zero: any port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    pub reserved: u8,
}

impl ListenerKey {
    /// The key of a listener; port zero stands for any port.
    #[inline(always)]
    pub const fn new(vip: Ipv4Address, port: Be16, protocol: u8) -> Self {
        Self {
            vip,
            port,
            protocol,
            reserved: 0,
        }
    }
}

/// Value of the listener table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Listener {
    pub id: ListenerId,
    pub group: GroupId,
    /// A flow without packets for this many seconds is removed.
    pub idle_timeout_secs: u32,
}

/// Key of the VIP table: an address that we answer ARP and echo requests for.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct VipKey {
    pub address: Ipv4Address,
}

/// Value of the VIP table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Vip {
    /// How many listeners use it; never zero in the table.
    pub listeners: u32,
}
