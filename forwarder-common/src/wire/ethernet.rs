//! Ethernet II (IEEE 802.3) and VLAN tags (IEEE 802.1Q, 802.1ad).

use bytemuck::{Pod, Zeroable};
use network_types::eth::EtherType;

use super::{Be16, LinkPair, WireHeader};

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::from_raw(EtherType::Ipv4 as u16);
/// EtherType of IPv6 (RFC 2464).
pub const ETHERTYPE_IPV6: Be16 = Be16::from_raw(EtherType::Ipv6 as u16);
/// EtherType of a VLAN tag (IEEE 802.1Q).
pub const ETHERTYPE_VLAN: Be16 = Be16::from_raw(EtherType::Ieee8021q as u16);
/// EtherType of the outer of two VLAN tags (IEEE 802.1ad).
pub const ETHERTYPE_SERVICE_VLAN: Be16 = Be16::from_raw(EtherType::Ieee8021ad as u16);
/// EtherType of ARP (RFC 826).
pub const ETHERTYPE_ARP: Be16 = Be16::from_raw(EtherType::Arp as u16);

/// The 14 bytes in front of every frame.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct EthernetHeader {
    pub link: LinkPair,
    pub ethertype: Be16,
}

impl WireHeader for EthernetHeader {}

impl EthernetHeader {
    /// A copy of the addresses; see [`IpAddress::copied`](super::IpAddress::copied).
    #[inline(always)]
    pub const fn link(&self) -> LinkPair {
        LinkPair([self.link.0[0], self.link.0[1], self.link.0[2]])
    }
}

/// A VLAN tag, seen from behind the EtherType that announces it.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct VlanTag {
    /// Three bits of priority, one of "may be dropped first", twelve of identifier.
    pub control: Be16,
    /// Of what follows.
    pub ethertype: Be16,
}

impl WireHeader for VlanTag {}

impl VlanTag {
    /// IEEE 802.1Q §9.6: the identifier's bits.
    pub const ID: u16 = 0x0fff;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethertypes_are_in_network_byte_order() {
        assert_eq!(ETHERTYPE_IPV4.get(), 0x0800);
        assert_eq!(ETHERTYPE_ARP.get(), 0x0806);
        assert_eq!(EthernetHeader::LEN, 14);
    }
}
