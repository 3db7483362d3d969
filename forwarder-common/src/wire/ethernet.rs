//! Ethernet II (IEEE 802.3). VLAN tags are not read yet: a tagged frame is somebody else's EtherType to us.

use bytemuck::{Pod, Zeroable};
use network_types::eth::EtherType;

use super::{Be16, LinkPair, WireHeader};

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::from_raw(EtherType::Ipv4 as u16);
/// EtherType of IPv6 (RFC 2464 §3).
pub const ETHERTYPE_IPV6: Be16 = Be16::from_raw(EtherType::Ipv6 as u16);
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
