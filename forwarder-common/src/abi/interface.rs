//! Interfaces the programs are attached to.

use bytemuck::{Pod, Zeroable};

use crate::wire::MacAddress;

/// Key of the interface table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct InterfaceKey {
    pub ifindex: u32,
}

/// Bits of [`Interface::flags`].
pub mod flag {
    /// Frames may leave through this interface straight from native XDP.
    pub const SEND_NATIVE: u16 = 1;
    /// Frames may leave through this interface straight from generic XDP.
    pub const SEND_GENERIC: u16 = 2;
}

/// Value of the interface table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Interface {
    /// Link address we answer ARP with; all zeros where the link has none.
    pub mac: MacAddress,
    pub flags: u16,
    /// Largest IP packet in bytes; zero: unknown.
    pub mtu_bytes: u32,
    /// Of a VLAN device: the interface that carries its frames; of a port of a bond: the bond, which routes and
    /// addresses belong to; else zero.
    pub carrier_ifindex: u32,
    /// Its VLAN identifiers, the outer one first; zero: none.
    pub vlans: [u16; 2],
}
