//! Backend groups, their slots, and backends.

use bytemuck::{Pod, Zeroable};

use crate::wire::{Be16, Ipv4Address};

/// Index of a group in the group table.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct GroupId(pub u32);

/// Index of a backend in the backend table and in the counter table; a backend of two groups has two.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
pub struct BackendId(pub u32);

/// Which addresses a rewritten request carries.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct NatMode(pub u32);

impl NatMode {
    /// Source and destination are rewritten: the backend sees an address of the SNAT pool.
    pub const FULL: Self = Self(0);
    /// Only the destination is rewritten: the backend sees the client.
    pub const DNAT: Self = Self(1);
}

/// A backend group: where its Maglev table stands in the slot table.
///
/// A new table is written beside the old one; then this value is replaced in one update. So no packet sees
/// half a table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct BackendGroup {
    /// Index of the first slot.
    pub first_slot: u32,
    /// Number of slots; zero: no backend takes new flows.
    pub slot_count: u32,
    pub nat: NatMode,
    pub reserved: u32,
}

/// Whether a backend takes new flows.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct BackendState(pub u8);

impl BackendState {
    /// No backend has this id.
    pub const ABSENT: Self = Self(0);
    /// Takes new flows.
    pub const HEALTHY: Self = Self(1);
    /// Takes none; packets of its flows are still sent.
    pub const UNHEALTHY: Self = Self(2);
    /// Keeps old flows only.
    pub const DRAINING: Self = Self(3);
}

/// A server.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Backend {
    pub address: Ipv4Address,
    /// Zero: the port that the client asked for.
    pub port: Be16,
    pub state: BackendState,
    pub reserved: u8,
    /// Most flows at a time; zero: no limit of its own.
    pub max_flows: u32,
    pub reserved2: u32,
}
