//! Headers between an outer UDP or IP header and what it carries: VXLAN (RFC 7348), Geneve (RFC 8926), GRE (RFC 2784,
//! RFC 2890) and GUE (draft-ietf-intarea-gue). FOU and IP in IP (RFC 2003, RFC 4213, RFC 2473) have none.
//!
//! Not read: VXLAN's group policy and generic protocol extensions, GRE's checksums and sequence numbers, GUE's options.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, WireHeader};

/// Protocol number of IPv4 in IP (RFC 2003).
pub const PROTOCOL_IPIP: u8 = 4;
/// Protocol number of IPv6 in IP (RFC 4213, RFC 2473).
pub const PROTOCOL_IPV6: u8 = 41;
/// Protocol number of GRE (RFC 2784).
pub const PROTOCOL_GRE: u8 = 47;

/// EtherType of an Ethernet frame inside another protocol (RFC 1701 and RFC 7637: transparent Ethernet bridging).
pub const ETHERTYPE_BRIDGED: Be16 = Be16::new(0x6558);

/// A 24-bit network number as the word that it stands in: in the upper 24 bits.
#[inline(always)]
pub const fn vni_word(vni: u32) -> Be32 {
    Be32::new(vni << 8)
}

/// RFC 7348 §5.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct VxlanHeader {
    pub flags: Be32,
    /// The network's number in the upper 24 bits, and 8 reserved ones.
    pub vni: Be32,
}

impl WireHeader for VxlanHeader {}

impl VxlanHeader {
    /// RFC 7348 §5: the I flag; the VNI is valid. All other bits are reserved.
    pub const FLAG_VNI: Be32 = Be32::new(0x0800_0000);
}

/// RFC 8926 §3.4, without options.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct GeneveHeader {
    /// Version in the upper 2 bits; length of the options in words of 4 bytes in the lower 6.
    pub version_len: u8,
    pub flags: u8,
    /// EtherType of what follows.
    pub protocol: Be16,
    /// The network's number in the upper 24 bits, and 8 reserved ones.
    pub vni: Be32,
}

impl WireHeader for GeneveHeader {}

impl GeneveHeader {
    /// RFC 8926 §3.4: the packet is for the endpoint itself.
    pub const FLAG_CONTROL: u8 = 0x80;
    /// RFC 8926 §3.4: one of the options must be understood by who reads the packet.
    pub const FLAG_CRITICAL: u8 = 0x40;

    /// 0 is the only one there is.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.version_len >> 6
    }

    /// Length of the options, in bytes: 0 to 252.
    #[inline(always)]
    pub const fn options_len(&self) -> usize {
        (self.version_len & 0x3f) as usize * 4
    }
}

/// RFC 2784 §2.1, without the fields that a flag announces.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct GreHeader {
    pub flags: Be16,
    /// EtherType of what follows.
    pub protocol: Be16,
}

impl WireHeader for GreHeader {}

impl GreHeader {
    /// RFC 2890 §2: a key follows. No other flag is read; the three bits of the version must be zero.
    pub const FLAG_KEY: Be16 = Be16::new(0x2000);
}

/// RFC 2890 §2.1.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct GreKey {
    pub key: Be32,
}

impl WireHeader for GreKey {}

/// draft-ietf-intarea-gue §3.2, version 0 without options. In version 1 an IP header stands in its place, which the
/// first bits tell: `01` begins the version of IPv4 and of IPv6.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct GueHeader {
    /// Version in the upper 2 bits, then the control flag; length of the options in words of 4 bytes in the lower 5.
    pub version_len: u8,
    /// IP protocol number of what follows.
    pub protocol: u8,
    pub flags: Be16,
}

impl WireHeader for GueHeader {}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.18 sends it for `ip link add ... type vxlan id 4242`.
    #[test]
    fn a_vxlan_header_has_its_number_in_the_upper_bits() {
        let bytes = [0x08, 0, 0, 0, 0, 0x10, 0x92, 0];
        let header: &VxlanHeader = bytemuck::from_bytes(&bytes);
        assert_eq!({ header.flags }, VxlanHeader::FLAG_VNI);
        assert_eq!({ header.vni }, vni_word(4242));
    }

    /// RFC 8926 §3.4: version 0, two words of options, the critical bit.
    #[test]
    fn a_geneve_header_says_how_long_its_options_are() {
        let bytes = [0x02, 0x40, 0x65, 0x58, 0, 0, 7, 0];
        let header: &GeneveHeader = bytemuck::from_bytes(&bytes);
        assert_eq!((header.version(), header.options_len()), (0, 8));
        assert_eq!(header.flags, GeneveHeader::FLAG_CRITICAL);
        assert_eq!({ header.protocol }, ETHERTYPE_BRIDGED);
        assert_eq!({ header.vni }, vni_word(7));
    }

    /// RFC 2890 §2: only the key is there.
    #[test]
    fn a_gre_header_with_a_key() {
        let bytes = [0x20, 0, 8, 0];
        let header: &GreHeader = bytemuck::from_bytes(&bytes);
        assert_eq!({ header.flags }, GreHeader::FLAG_KEY);
        assert_eq!({ header.protocol }.get(), 0x0800);
    }
}
