//! Fragments: which flow those without a transport header belong to, and what the agent holds or cuts.

use bytemuck::{Pod, Zeroable};

use super::flow::{Direction, FlowId};
use crate::wire::{Be32, IpAddress};

/// Key of the fragment table: what the fragments of one packet share (RFC 791 §3.2, RFC 8200 §4.5).
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct FragmentKey {
    pub source: IpAddress,
    pub destination: IpAddress,
    /// Of IPv4 in the low 16 bits.
    pub identification: Be32,
    /// IP protocol number.
    pub protocol: u32,
}

/// Value of the fragment table: the flow of the first fragment.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct FragmentFlow {
    pub id: FlowId,
    pub direction: Direction,
    /// When the first fragment passed, in seconds of CLOCK_MONOTONIC.
    pub seen_secs: u32,
}

/// Bytes of a packet that is held at most: what an Ethernet frame takes, and a power of two, as the verifier wants a
/// mask.
pub const HELD_BYTES: usize = 2048;

/// Why a packet was handed to the agent.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct HeldKind(pub u32);

impl HeldKind {
    /// It is a fragment that came before its packet's first, and is sent on when that has passed.
    pub const EARLY: Self = Self(0);
    /// It is of IPv6, done but for its hop limit, and has to be cut, as an IPv4 router would have cut it.
    pub const TOO_LARGE: Self = Self(1);
}

/// A packet that the data path cannot send itself.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct HeldPacket {
    /// Of an early fragment.
    pub key: FragmentKey,
    pub kind: HeldKind,
    /// Of `packet`, which begins with its IP header.
    pub len: u32,
    pub packet: [u8; HELD_BYTES],
}
