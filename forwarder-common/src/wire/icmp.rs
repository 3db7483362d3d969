//! ICMP (RFC 792): echo, and the message that a port is not reachable.

use bytemuck::{Pod, Zeroable};

use super::{Be16, WireHeader};

/// RFC 792: echo reply.
pub const TYPE_ECHO_REPLY: u8 = 0;
/// RFC 792: destination unreachable.
pub const TYPE_UNREACHABLE: u8 = 3;
/// RFC 792: port unreachable, a code of [`TYPE_UNREACHABLE`].
pub const CODE_PORT_UNREACHABLE: u8 = 3;
/// RFC 792: echo request.
pub const TYPE_ECHO_REQUEST: u8 = 8;

/// Type, code and checksum with the four bytes that every type uses in its own way.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct IcmpHeader {
    pub icmp_type: u8,
    pub code: u8,
    pub checksum: Be16,
    pub rest: [u8; 4],
}

impl WireHeader for IcmpHeader {}

impl IcmpHeader {
    /// A header whose remaining bytes, and checksum, are zero.
    #[inline(always)]
    pub const fn of_type(icmp_type: u8, code: u8) -> Self {
        Self {
            icmp_type,
            code,
            checksum: Be16::from_raw(0),
            rest: [0; 4],
        }
    }

    /// Type and code as the 16-bit word that the checksum covers, in machine order.
    #[inline(always)]
    pub const fn type_word(&self) -> u16 {
        u16::from_ne_bytes([self.icmp_type, self.code])
    }
}
