//! Packets that somebody wants to see: which, and what the data path says of them.

use bytemuck::{Pod, Zeroable};

use crate::wire::{Be16, IpAddress};

/// Bytes of a packet that are captured at most: a power of two, as the verifier wants a mask, above what an Ethernet
/// frame takes.
pub const CAPTURED_BYTES: usize = 2048;

/// Which packets are captured: those that everything here is true of.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct CaptureFilter {
    /// A bit for each reason's number.
    pub reasons: u64,
    /// Source or destination, as it comes, has these bits where `mask` has ones.
    pub network: IpAddress,
    pub mask: IpAddress,
    /// Source or destination port; zero: any.
    pub port: Be16,
    /// IP protocol number, of both families' ICMP that of IPv4; zero: any.
    pub protocol: u16,
    /// Of so many packets one, on each CPU; 1: all.
    pub one_in: u32,
    /// Bytes that are captured before and after, up to [`CAPTURED_BYTES`].
    pub snap_bytes: u32,
    pub reserved: u32,
}

/// A packet on its way: what was captured of it when it came. One per CPU.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct CaptureRoom {
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub time_nanos: u64,
    /// Packets that the filter was true of.
    pub matched: u64,
    /// Of those, packets that found no room on their way to the agent.
    pub lost: u64,
    /// Non-zero: the filter may be true of this packet; its reason is not known yet.
    pub is_wanted: u32,
    /// Of the frame, in bytes.
    pub len: u32,
    /// Of these bytes.
    pub captured_len: u32,
    pub reserved: u32,
    pub bytes: [u64; CAPTURED_BYTES / 8],
}

/// A packet that was captured, as it came and as it left.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct CapturedPacket {
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub time_nanos: u64,
    /// Number of the reason.
    pub reason: u32,
    /// What became of it: as `datapath::Action`, counted from zero.
    pub action: u32,
    pub ingress_ifindex: u32,
    /// Of a redirect, else zero.
    pub egress_ifindex: u32,
    /// Of the flow, which forwarded packets have.
    pub listener: u32,
    pub backend: u32,
    /// Of the frame when it came, in bytes, and how many of them are here.
    pub before_len: u32,
    pub before_captured: u32,
    /// The same of the frame when it left.
    pub after_len: u32,
    pub after_captured: u32,
    pub before: [u64; CAPTURED_BYTES / 8],
    pub after: [u64; CAPTURED_BYTES / 8],
}
