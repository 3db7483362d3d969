//! Backend groups, their slots, and backends.

use bytemuck::{Pod, Zeroable};

use super::flow::NextHop;
use crate::wire::{Be16, IpAddress};

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

/// How a group picks a backend for a new flow.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Selection(pub u32);

impl Selection {
    /// The slot that the 5-tuple's hash names, in a Maglev table.
    pub const MAGLEV: Self = Self(0);
    /// The slot that the client's address names, in a Maglev table.
    pub const SOURCE_IP: Self = Self(1);
    /// The slot after the one before, in a table that holds the turns of one cycle.
    pub const ROUND_ROBIN: Self = Self(2);
    /// Of the backends from the slot on that the hash names, the one with the fewest flows for its weight, in a table
    /// that holds each once.
    pub const LEAST_CONNECTIONS: Self = Self(3);
}

/// A backend group: where its tables stand in the slot table, and how they are used.
///
/// New tables are written beside the old ones; then this value is replaced in one update. So no packet sees
/// half a table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct BackendGroup {
    /// Index of the first slot.
    pub first_slot: u32,
    /// Number of slots; zero: no backend takes new flows.
    pub slot_count: u32,
    /// Number of slots of the table behind that one, for flows that no backend of the first has room for; zero: none.
    pub overflow_slot_count: u32,
    pub nat: NatMode,
    pub selection: Selection,
    /// For how long a client's next flow goes where its last one went; zero: it does not.
    pub persistence_secs: u32,
    /// Clients are the same whose IPv4 addresses share so many leading bits, 1 to 32.
    pub persistence_bits_v4: u32,
    /// The same of IPv6, 1 to 128.
    pub persistence_bits_v6: u32,
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
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Backend {
    pub address: IpAddress,
    /// Zero: the port that the client asked for.
    pub port: Be16,
    pub state: BackendState,
    pub reserved: u8,
    /// Most flows at a time; zero: no limit of its own.
    pub max_flows: u32,
    /// Its share of the flows beside the others of its group; zero: none.
    pub weight: u32,
}

/// Where requests to a backend go next, as this CPU's last new flow found it; see `datapath::next_hop`.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct BackendHop {
    /// The backend's: its number may be another's by now.
    pub address: IpAddress,
    pub hop: NextHop,
    /// Where the flow's packet came in: whether that interface forwards is part of the answer.
    pub ingress_ifindex: u32,
    pub reserved: u32,
}
