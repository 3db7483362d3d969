//! IPv6 (RFC 8200): the fixed header and the extension headers that are read over.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, IpAddress, WireHeader};

/// RFC 8200 §4.3: hop-by-hop options.
pub const NEXT_HOP_BY_HOP: u8 = 0;
/// RFC 8200 §4.4: routing header.
pub const NEXT_ROUTING: u8 = 43;
/// RFC 8200 §4.5: fragment header.
pub const NEXT_FRAGMENT: u8 = 44;
/// RFC 4303: encapsulating security payload.
pub const NEXT_ESP: u8 = 50;
/// RFC 4302: authentication header.
pub const NEXT_AH: u8 = 51;
/// RFC 4443: ICMP for IPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;
/// RFC 8200 §4.7: nothing follows.
pub const NEXT_NONE: u8 = 59;
/// RFC 8200 §4.6: destination options.
pub const NEXT_DESTINATION: u8 = 60;
/// RFC 6275: mobility header.
pub const NEXT_MOBILITY: u8 = 135;

/// The 40 fixed bytes.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Ipv6Header {
    /// Version in the high four bits, then eight bits of traffic class and twenty of flow label.
    pub version_class_flow: Be32,
    /// What follows this header, in bytes.
    pub payload_len: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: IpAddress,
    pub destination: IpAddress,
}

impl WireHeader for Ipv6Header {}

impl Ipv6Header {
    /// Where the number of what follows stands, in bytes from the header's start.
    pub const NEXT_HEADER_OFFSET: u32 = 6;
    /// The flow label in the first word.
    const FLOW_LABEL: u32 = 0x000f_ffff;

    /// The header of a packet of our own. `payload_len` in bytes.
    #[inline(always)]
    pub const fn fresh(
        next_header: u8,
        hop_limit: u8,
        payload_len: u16,
        source: IpAddress,
        destination: IpAddress,
    ) -> Self {
        Self {
            version_class_flow: Be32::new(6 << 28),
            payload_len: Be16::new(payload_len),
            next_header,
            hop_limit,
            source,
            destination,
        }
    }

    /// A copy of the source; see [`IpAddress::copied`].
    #[inline(always)]
    pub const fn source(&self) -> IpAddress {
        IpAddress([
            self.source.0[0],
            self.source.0[1],
            self.source.0[2],
            self.source.0[3],
        ])
    }

    /// A copy of the destination.
    #[inline(always)]
    pub const fn destination(&self) -> IpAddress {
        IpAddress([
            self.destination.0[0],
            self.destination.0[1],
            self.destination.0[2],
            self.destination.0[3],
        ])
    }

    /// Writes both addresses.
    #[inline(always)]
    pub const fn set_addresses(&mut self, source: &IpAddress, destination: &IpAddress) {
        let [a, b, c, d] = source.0;
        (
            self.source.0[0],
            self.source.0[1],
            self.source.0[2],
            self.source.0[3],
        ) = (a, b, c, d);
        let [a, b, c, d] = destination.0;
        (
            self.destination.0[0],
            self.destination.0[1],
            self.destination.0[2],
            self.destination.0[3],
        ) = (a, b, c, d);
    }

    /// 6 for IPv6.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        (self.version_class_flow.get() >> 28) as u8
    }

    /// Version, traffic class and flow label as one word; of the label the low 20 bits count (RFC 6437 §2).
    #[inline(always)]
    pub const fn first_word(traffic_class: u8, flow_label: u32) -> Be32 {
        Be32::new(6 << 28 | (traffic_class as u32) << 20 | flow_label & Self::FLOW_LABEL)
    }

    /// RFC 6437.
    #[inline(always)]
    pub const fn flow_label(&self) -> u32 {
        self.version_class_flow.get() & Self::FLOW_LABEL
    }

    /// What IPv4 calls TOS.
    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }
}

/// What extension headers without a form of their own begin with (RFC 8200 §4.2; 6564).
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct ExtensionHeader {
    pub next_header: u8,
    /// In units of 8 bytes, without the first 8.
    pub len: u8,
    pub rest: [u8; 6],
}

impl WireHeader for ExtensionHeader {}

impl ExtensionHeader {
    /// The header's length in bytes: 8 to 2048.
    #[inline(always)]
    pub const fn len_bytes(&self) -> usize {
        (self.len as usize + 1) * 8
    }
}

/// A destination options header with one option: how many tunnels may be nested (RFC 2473 §4.1.1). Linux puts it in
/// front of what an IPv6 tunnel carries.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TunnelLimit {
    pub next_header: u8,
    /// In units of 8 bytes, without the first 8.
    pub len: u8,
    pub option: u8,
    pub option_len: u8,
    pub limit: u8,
    /// PadN of three bytes.
    pub padding: [u8; 3],
}

impl WireHeader for TunnelLimit {}

impl TunnelLimit {
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

/// RFC 8200 §4.5.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct FragmentHeader {
    pub next_header: u8,
    pub reserved: u8,
    /// Offset in units of 8 bytes in the high 13 bits; the lowest says that more follow.
    pub offset: Be16,
    pub identification: Be32,
}

impl WireHeader for FragmentHeader {}

impl FragmentHeader {
    /// Is this another fragment than the first?
    #[inline(always)]
    pub const fn is_later(&self) -> bool {
        self.offset.get() & !7 != 0
    }

    /// Do more follow?
    #[inline(always)]
    pub const fn has_more(&self) -> bool {
        self.offset.get() & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_has_three_fields() {
        let mut header = Ipv6Header::zeroed();
        header.version_class_flow = Ipv6Header::first_word(0xab, 0xfff1_2345);
        let fields = (header.version(), header.traffic_class(), header.flow_label());
        assert_eq!(fields, (6, 0xab, 0x1_2345));
        assert_eq!(bytemuck::bytes_of(&header)[..4], [0x6a, 0xb1, 0x23, 0x45]);
    }

    /// An echo request as seen on a veth pair.
    const ECHO: [u8; 40] = [
        0x60, 0x1b, 0x2c, 0x3d, 0, 64, 58, 63, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xfd, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    ];

    #[test]
    fn fields_of_a_captured_header() {
        let header: &Ipv6Header = bytemuck::from_bytes(&ECHO);
        assert_eq!((header.version(), header.traffic_class()), (6, 1));
        assert_eq!(
            (header.payload_len.get(), header.next_header, header.hop_limit),
            (64, PROTOCOL_ICMPV6, 63)
        );
        assert_eq!({ header.destination }.low().octets(), [0, 0, 0, 2]);
        assert!(!{ header.source }.is_v4());
    }
}
