//! SCTP (RFC 9260): the common header and the beginning of the first chunk.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, WireHeader, crc32c};

/// RFC 9260 §3.3.1: carries payload.
pub const CHUNK_DATA: u8 = 0;
/// RFC 9260 §3.3.2: opens an association; the only chunk of its packet.
pub const CHUNK_INIT: u8 = 1;
/// RFC 9260 §3.3.3: answers that; the only chunk of its packet.
pub const CHUNK_INIT_ACK: u8 = 2;
/// RFC 9260 §3.3.7: ends an association at once.
pub const CHUNK_ABORT: u8 = 6;
/// RFC 9260 §3.3.8: asks to end an association.
pub const CHUNK_SHUTDOWN: u8 = 7;
/// RFC 9260 §3.3.9: agrees.
pub const CHUNK_SHUTDOWN_ACK: u8 = 8;
/// RFC 9260 §3.3.13: is the last word; the only chunk of its packet.
pub const CHUNK_SHUTDOWN_COMPLETE: u8 = 14;

/// The common header (RFC 9260 §3.1) and the header of the first chunk (§3.2), which every packet has.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct SctpHeader {
    pub source_port: Be16,
    pub destination_port: Be16,
    /// By which the receiver tells the association from older ones; it chose the number itself.
    pub verification_tag: Be32,
    pub checksum: SctpChecksum,
    pub chunk_type: u8,
    pub chunk_flags: u8,
    /// Header and value of the chunk, in bytes, without padding.
    pub chunk_len: Be16,
}

impl WireHeader for SctpHeader {}

/// A packet's first word as the checksum's arithmetic has it, the first byte lowest.
#[inline(always)]
pub const fn ports(source: Be16, destination: Be16) -> u32 {
    let [a, b] = source.raw().to_ne_bytes();
    let [c, d] = destination.raw().to_ne_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl SctpHeader {
    /// Where the checksum stands, in bytes from the header's start.
    pub const CHECKSUM_OFFSET: usize = 8;

    /// Both ports as the checksum's arithmetic has them.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        ports(self.source_port, self.destination_port)
    }
}

/// An INIT chunk in its packet, as far as its first field.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct SctpInit {
    pub header: SctpHeader,
    /// The verification tag of all packets to the sender.
    pub initiate_tag: Be32,
}

impl WireHeader for SctpInit {}

/// The checksum field: a CRC32c of the whole packet with this field zero, the lowest byte first (RFC 9260 appendix
/// A). No pseudo-header is under it.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct SctpChecksum(u32);

impl WireHeader for SctpChecksum {}

impl SctpChecksum {
    /// What the field holds while the checksum is computed, and when its sender leaves that to its device (Linux 6.12,
    /// `sctp_packet_pack`).
    pub const NONE: Self = Self(0);

    /// From the CRC.
    #[inline(always)]
    pub const fn new(crc: u32) -> Self {
        Self(crc.to_le())
    }

    /// The checksum after the first word of a packet of `len` bytes, its ports, has changed.
    #[inline(always)]
    pub fn replaced(self, old_ports: u32, new_ports: u32, len: u32) -> Self {
        Self(self.0 ^ crc32c::of_change(old_ports ^ new_ports, len).to_le())
    }

    /// The field as the machine reads it.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_follows_the_ports() {
        let mut bytes = [0x5a; 40];
        let header: &mut SctpHeader = bytemuck::from_bytes_mut(&mut bytes[..SctpHeader::LEN]);
        header.checksum = SctpChecksum::NONE;
        let crc = crc32c::of(&bytes);
        let mut changed = bytes;
        let header: &mut SctpHeader = bytemuck::from_bytes_mut(&mut changed[..SctpHeader::LEN]);
        let before = header.ports();
        header.source_port = Be16::new(5000);
        header.destination_port = Be16::new(2905);
        let after = header.ports();
        let updated = SctpChecksum::new(crc).replaced(before, after, 40);
        assert_eq!(updated, SctpChecksum::new(crc32c::of(&changed)));
        assert_eq!(bytemuck::bytes_of(&SctpChecksum::new(0x0102_0304)), [4, 3, 2, 1]);
    }
}
