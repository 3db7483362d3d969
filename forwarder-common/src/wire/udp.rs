//! UDP (RFC 768).

use bytemuck::{Pod, Zeroable};

use super::{Be16, WireHeader};

/// RFC 768: a checksum of zero means that the sender generated none.
pub const CHECKSUM_NONE: Be16 = Be16::from_raw(0);

/// A checksum as it is sent (RFC 768): a computed zero as all ones, as zero means "none".
#[inline(always)]
pub const fn computed(checksum: Be16) -> Be16 {
    if checksum.raw() == CHECKSUM_NONE.raw() {
        Be16::from_raw(0xffff)
    } else {
        checksum
    }
}

/// The whole header.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct UdpHeader {
    pub source_port: Be16,
    pub destination_port: Be16,
    /// Header and payload, in bytes.
    pub len: Be16,
    pub checksum: Be16,
}

impl WireHeader for UdpHeader {}

impl UdpHeader {
    /// Where the checksum stands, in bytes from the header's start.
    pub const CHECKSUM_OFFSET: usize = 6;
}
