//! How fast the clients of one prefix open flows of a listener.

use bytemuck::{Pod, Zeroable};

use super::listener::ListenerId;
use crate::wire::IpAddress;

/// Key of the table of rates.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct SourceRateKey {
    pub listener: ListenerId,
    /// The leading bits that clients share; the others are zero.
    pub source: IpAddress,
}

impl SourceRateKey {
    /// The key of a client; `bits` of the 128 of its address count.
    #[inline(always)]
    pub const fn new(listener: ListenerId, source: IpAddress, bits: u32) -> Self {
        Self {
            listener,
            source: source.prefix(bits),
        }
    }
}

/// Value of the table of rates.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct SourceRate {
    /// When `left` was right, in seconds of CLOCK_MONOTONIC.
    pub second: u32,
    /// Flows that may still be opened.
    pub left: u32,
}
