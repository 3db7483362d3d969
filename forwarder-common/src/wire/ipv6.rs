//! IPv6 (RFC 8200): the fixed header. Extension headers are not read here.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, IpAddress, WireHeader};

/// Version 6, in the first word of the header.
const VERSION: u32 = 6 << 28;
/// RFC 6437 §2: the flow label, in the first word of the header.
const FLOW_LABEL: u32 = 0x000f_ffff;

/// The 40 fixed bytes.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Ipv6Header {
    /// Version, traffic class and flow label: 4, 8 and 20 bits.
    pub first_word: Be32,
    /// Everything behind this header, in bytes.
    pub payload_len: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: IpAddress,
    pub destination: IpAddress,
}

impl WireHeader for Ipv6Header {}

impl Ipv6Header {
    /// Version, traffic class and flow label as one word; of the label the low 20 bits count.
    #[inline(always)]
    pub const fn first_word(traffic_class: u8, flow_label: u32) -> Be32 {
        Be32::new(VERSION | (traffic_class as u32) << 20 | flow_label & FLOW_LABEL)
    }

    /// 6 for IPv6.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        (self.first_word.get() >> 28) as u8
    }

    /// DSCP and ECN, as IPv4's type of service.
    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        (self.first_word.get() >> 20) as u8
    }

    /// RFC 6437.
    #[inline(always)]
    pub const fn flow_label(&self) -> u32 {
        self.first_word.get() & FLOW_LABEL
    }
}

/// A destination options header (RFC 8200 §4.6) with one option: how many tunnels may be nested (RFC 2473 §4.1.1). Linux
/// puts it in front of what an IPv6 tunnel carries.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TunnelLimit {
    pub next_header: u8,
    /// Length of this header behind its first 8 bytes, in units of 8 bytes.
    pub len: u8,
    pub option: u8,
    pub option_len: u8,
    pub limit: u8,
    /// PadN of three bytes.
    pub padding: [u8; 3],
}

impl WireHeader for TunnelLimit {}

impl TunnelLimit {
    /// RFC 8200 §4.6: destination options.
    pub const PROTOCOL: u8 = 60;
    /// RFC 2473 §4.1.1: the option's type.
    const OPTION: u8 = 4;

    /// In front of this protocol.
    #[inline(always)]
    pub const fn new(next_header: u8, limit: u8) -> Self {
        Self {
            next_header,
            len: 0,
            option: Self::OPTION,
            option_len: 1,
            limit,
            padding: [1, 1, 0],
        }
    }

    /// Is the limit the only option?
    #[inline(always)]
    pub const fn is_alone(&self) -> bool {
        self.len == 0 && self.option == Self::OPTION && self.option_len == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_has_three_fields() {
        let mut header = Ipv6Header::zeroed();
        header.first_word = Ipv6Header::first_word(0xab, 0xfff1_2345);
        assert_eq!(
            (header.version(), header.traffic_class(), header.flow_label()),
            (6, 0xab, 0x1_2345)
        );
        assert_eq!(bytemuck::bytes_of(&header)[..4], [0x6a, 0xb1, 0x23, 0x45]);
    }
}
