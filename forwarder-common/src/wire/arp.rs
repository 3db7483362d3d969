//! ARP for IPv4 over Ethernet (RFC 826), the only kind in use.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Ipv4Address, MacAddress, WireHeader};

/// RFC 826: hardware type of Ethernet.
pub const HARDWARE_ETHERNET: Be16 = Be16::new(1);
/// RFC 826: who has this address?
pub const OPERATION_REQUEST: Be16 = Be16::new(1);
/// RFC 826: here it is.
pub const OPERATION_REPLY: Be16 = Be16::new(2);

/// An ARP packet with 6-byte hardware and 4-byte protocol addresses.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct ArpPacket {
    pub hardware_type: Be16,
    pub protocol_type: Be16,
    pub hardware_len: u8,
    pub protocol_len: u8,
    pub operation: Be16,
    pub sender_mac: MacAddress,
    pub sender_address: Ipv4Address,
    pub target_mac: MacAddress,
    pub target_address: Ipv4Address,
}

impl WireHeader for ArpPacket {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_request_reads_as_its_fields() {
        let bytes: [u8; 28] = [
            0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 172, 18, 0, 10, 0, 0, 0, 0, 0, 0, 172, 18, 0, 100,
        ];
        let packet: &ArpPacket = bytemuck::from_bytes(&bytes);
        assert_eq!({ packet.operation }, OPERATION_REQUEST);
        assert_eq!(packet.target_address.octets(), [172, 18, 0, 100]);
    }
}
