//! IPv4 (RFC 791).

use bytemuck::{Pod, Zeroable};
use network_types::ip::IpProto;

use super::{Be16, Ipv4Address, WireHeader};

/// Protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = IpProto::Icmp as u8;
/// Protocol number of TCP.
pub const PROTOCOL_TCP: u8 = IpProto::Tcp as u8;
/// Protocol number of UDP.
pub const PROTOCOL_UDP: u8 = IpProto::Udp as u8;

/// Protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = IpProto::Sctp as u8;

/// RFC 791 §3.1: more fragments follow.
const MORE_FRAGMENTS: u16 = 0x2000;
/// RFC 791 §3.1: offset in units of 8 bytes.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The 20 fixed bytes; options follow where `header_len` says more.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Ipv4Header {
    /// Version in the high, header length in 32-bit words in the low four bits.
    pub version_ihl: u8,
    pub tos: u8,
    /// Header and payload, in bytes.
    pub total_len: Be16,
    pub identification: Be16,
    /// Three flag bits, then the fragment offset.
    pub fragment: Be16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: Be16,
    pub source: Ipv4Address,
    pub destination: Ipv4Address,
}

impl WireHeader for Ipv4Header {}

impl Ipv4Header {
    /// RFC 791 §3.1: do not fragment.
    pub const DONT_FRAGMENT: Be16 = Be16::new(0x4000);

    /// The header of a packet of our own, without options and with a checksum of zero. `total_len` in bytes.
    #[inline(always)]
    pub const fn fresh(
        protocol: u8,
        ttl: u8,
        total_len: u16,
        source: Ipv4Address,
        destination: Ipv4Address,
    ) -> Self {
        Self {
            version_ihl: 0x45,
            tos: 0,
            total_len: Be16::new(total_len),
            // RFC 6864 §4.1: without a meaning in a packet that is not to be fragmented.
            identification: Be16::new(0),
            fragment: Self::DONT_FRAGMENT,
            ttl,
            protocol,
            checksum: Be16::new(0),
            source,
            destination,
        }
    }

    /// 4 for IPv4.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Header length with options, in bytes; 0 to 60, so not yet checked.
    #[inline(always)]
    pub const fn header_len(&self) -> usize {
        ((self.version_ihl & 0x0f) as usize) * 4
    }

    /// Is this packet one of several, first, middle or last?
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        self.fragment.get() & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
    }

    /// Is this a fragment without the transport header?
    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        self.fragment.get() & FRAGMENT_OFFSET != 0
    }

    /// Offset and "more fragments" as the fragment header of IPv6 has them (RFC 8200 §4.5).
    #[inline(always)]
    pub const fn fragment_of_v6(&self) -> Be16 {
        let field = self.fragment.get();
        Be16::new((field & FRAGMENT_OFFSET) << 3 | (field & MORE_FRAGMENTS != 0) as u16)
    }

    /// Reverse of [`Self::fragment_of_v6`]; the packet may be fragmented further.
    #[inline(always)]
    pub const fn set_fragment_of_v6(&mut self, offset: Be16) {
        let field = offset.get();
        self.fragment = Be16::new(field >> 3 | if field & 1 != 0 { MORE_FRAGMENTS } else { 0 });
    }

    /// May no router fragment it (RFC 791 §2.3)?
    #[inline(always)]
    pub const fn dont_fragment(&self) -> bool {
        self.fragment.raw() & Self::DONT_FRAGMENT.raw() != 0
    }

    /// Version, header length and type of service as the 16-bit word that the header checksum covers, in machine order.
    #[inline(always)]
    pub const fn tos_word(&self) -> u16 {
        u16::from_ne_bytes([self.version_ihl, self.tos])
    }

    /// TTL and protocol as the 16-bit word that the header checksum covers, in machine order.
    #[inline(always)]
    pub const fn ttl_word(&self) -> u16 {
        u16::from_ne_bytes([self.ttl, self.protocol])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum;

    /// A TCP SYN as seen on a veth pair.
    const SYN: [u8; 20] = [
        0x45, 0, 0, 60, 0x1c, 0x46, 0x40, 0, 64, 6, 0, 0, 172, 16, 0, 10, 172, 16, 0, 100,
    ];

    #[test]
    fn fragments_are_the_same_in_both_families() {
        let mut header: Ipv4Header = *bytemuck::from_bytes(&SYN);
        for (v4, v6) in [(0x2000, 0x0001), (0x20b9, 0x05c9), (0x1fff, 0xfff8), (0, 0)] {
            header.fragment = Be16::new(v4);
            assert_eq!(header.fragment_of_v6(), Be16::new(v6), "{v4:#06x}");
            header.set_fragment_of_v6(Be16::new(v6));
            assert_eq!({ header.fragment }, Be16::new(v4), "{v6:#06x}");
        }
        header.fragment = Ipv4Header::DONT_FRAGMENT;
        assert_eq!(header.fragment_of_v6(), Be16::ZERO);
    }

    #[test]
    fn fields_of_a_captured_header() {
        let header: &Ipv4Header = bytemuck::from_bytes(&SYN);
        assert_eq!((header.version(), header.header_len()), (4, 20));
        assert_eq!(header.total_len.get(), 60);
        assert!(!header.is_fragment(), "don't-fragment alone is not a fragment");
        assert_eq!(header.protocol, PROTOCOL_TCP);
        assert_ne!(checksum::finish(checksum::sum_bytes(&SYN)), 0);
    }
}
