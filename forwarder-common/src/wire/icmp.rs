//! ICMP (RFC 792) and its form for IPv6 (RFC 4443): echo, errors, and the neighbours of RFC 4861.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, WireHeader};

/// RFC 792: echo reply.
pub const TYPE_ECHO_REPLY: u8 = 0;
/// RFC 792: destination unreachable.
pub const TYPE_UNREACHABLE: u8 = 3;
/// RFC 792: host unreachable, a code of [`TYPE_UNREACHABLE`].
pub const CODE_HOST_UNREACHABLE: u8 = 1;
/// RFC 792: protocol unreachable, a code of [`TYPE_UNREACHABLE`].
pub const CODE_PROTOCOL_UNREACHABLE: u8 = 2;
/// RFC 792: port unreachable, a code of [`TYPE_UNREACHABLE`].
pub const CODE_PORT_UNREACHABLE: u8 = 3;
/// RFC 1191 §4: fragmentation needed and "do not fragment" set, a code of [`TYPE_UNREACHABLE`].
pub const CODE_FRAGMENTATION_NEEDED: u8 = 4;
/// RFC 1122 §3.2.2.1: the network is administratively prohibited, a code of [`TYPE_UNREACHABLE`].
pub const CODE_NETWORK_PROHIBITED: u8 = 9;
/// RFC 1122 §3.2.2.1: so is the host.
pub const CODE_HOST_PROHIBITED: u8 = 10;
/// RFC 1122 §3.2.2.1: host unreachable for this type of service, a code of [`TYPE_UNREACHABLE`].
pub const CODE_HOST_UNREACHABLE_FOR_SERVICE: u8 = 12;
/// RFC 1812 §5.2.7.1: communication is administratively prohibited, a code of [`TYPE_UNREACHABLE`].
pub const CODE_PROHIBITED: u8 = 13;
/// RFC 1812 §5.2.7.1: precedence cutoff in effect, a code of [`TYPE_UNREACHABLE`].
pub const CODE_PRECEDENCE_CUTOFF: u8 = 15;
/// RFC 792: echo request.
pub const TYPE_ECHO_REQUEST: u8 = 8;
/// RFC 792: time to live exceeded in transit, with code 0.
pub const TYPE_TIME_EXCEEDED: u8 = 11;
/// RFC 792: a header field is wrong.
pub const TYPE_PARAMETER_PROBLEM: u8 = 12;

/// RFC 4443 §3.1: destination unreachable.
pub const TYPE_V6_UNREACHABLE: u8 = 1;
/// RFC 4443 §3.1: no route to destination, a code of [`TYPE_V6_UNREACHABLE`].
pub const CODE_V6_NO_ROUTE: u8 = 0;
/// RFC 4443 §3.1: administratively prohibited, a code of [`TYPE_V6_UNREACHABLE`].
pub const CODE_V6_PROHIBITED: u8 = 1;
/// RFC 4443 §3.1: beyond the scope of the source address, a code of [`TYPE_V6_UNREACHABLE`].
pub const CODE_V6_BEYOND_SCOPE: u8 = 2;
/// RFC 4443 §3.1: address unreachable, a code of [`TYPE_V6_UNREACHABLE`].
pub const CODE_V6_HOST_UNREACHABLE: u8 = 3;
/// RFC 4443 §3.1: port unreachable, a code of [`TYPE_V6_UNREACHABLE`].
pub const CODE_V6_PORT_UNREACHABLE: u8 = 4;
/// RFC 4443 §3.2: packet too big.
pub const TYPE_V6_TOO_BIG: u8 = 2;
/// RFC 4443 §3.3: hop limit exceeded in transit, with code 0.
pub const TYPE_V6_TIME_EXCEEDED: u8 = 3;
/// RFC 4443 §3.4: a header field is wrong.
pub const TYPE_V6_PARAMETER_PROBLEM: u8 = 4;
/// RFC 4443 §3.4: unrecognized next header, a code of [`TYPE_V6_PARAMETER_PROBLEM`].
pub const CODE_V6_UNKNOWN_NEXT_HEADER: u8 = 1;
/// RFC 4443 §4.1: echo request.
pub const TYPE_V6_ECHO_REQUEST: u8 = 128;
/// RFC 4443 §4.2: echo reply.
pub const TYPE_V6_ECHO_REPLY: u8 = 129;
/// RFC 4861 §4.3.
pub const TYPE_NEIGHBOUR_SOLICITATION: u8 = 135;
/// RFC 4861 §4.4.
pub const TYPE_NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Type, code and checksum with the four bytes that every type uses in its own way.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct IcmpHeader {
    pub icmp_type: u8,
    pub code: u8,
    pub checksum: Be16,
    pub rest: Be32,
}

impl WireHeader for IcmpHeader {}

impl IcmpHeader {
    /// Where the checksum stands, in bytes from the header's start.
    pub const CHECKSUM_OFFSET: usize = 2;

    /// A header whose remaining bytes, and checksum, are zero.
    #[inline(always)]
    pub const fn of_type(icmp_type: u8, code: u8) -> Self {
        Self {
            icmp_type,
            code,
            checksum: Be16::from_raw(0),
            rest: Be32::new(0),
        }
    }

    /// The identifier of an echo message (RFC 792, RFC 4443 §4.1).
    #[inline(always)]
    pub const fn identifier(&self) -> Be16 {
        let [a, b, _, _] = self.rest.raw().to_ne_bytes();
        Be16::from_raw(u16::from_ne_bytes([a, b]))
    }

    /// Replaces it.
    #[inline(always)]
    pub const fn set_identifier(&mut self, identifier: Be16) {
        let [_, _, c, d] = self.rest.raw().to_ne_bytes();
        let [a, b] = identifier.raw().to_ne_bytes();
        self.rest = Be32::from_raw(u32::from_ne_bytes([a, b, c, d]));
    }

    /// Type and code as the 16-bit word that the checksum covers, in machine order.
    #[inline(always)]
    pub const fn type_word(&self) -> u16 {
        u16::from_ne_bytes([self.icmp_type, self.code])
    }
}
