//! TCP (RFC 9293): the fixed header. Options are not read yet.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, WireHeader};

/// RFC 9293 §3.1: no more data from the sender.
pub const FLAG_FIN: u8 = 0x01;
/// RFC 9293 §3.1: synchronize sequence numbers.
pub const FLAG_SYN: u8 = 0x02;
/// RFC 9293 §3.1: reset the connection.
pub const FLAG_RST: u8 = 0x04;
/// RFC 9293 §3.1: the acknowledgment field is significant.
pub const FLAG_ACK: u8 = 0x10;

/// The 20 fixed bytes.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct TcpHeader {
    pub source_port: Be16,
    pub destination_port: Be16,
    pub sequence: Be32,
    pub acknowledgment: Be32,
    /// Header length in 32-bit words in the high four bits.
    pub data_offset: u8,
    pub flags: u8,
    pub window: Be16,
    pub checksum: Be16,
    pub urgent: Be16,
}

impl WireHeader for TcpHeader {}

impl TcpHeader {
    /// Data offset and flags as the 16-bit word that the checksum covers, in machine order.
    #[inline(always)]
    pub const fn flags_word(&self) -> u16 {
        u16::from_ne_bytes([self.data_offset, self.flags])
    }

    /// Header and options, in bytes.
    #[inline(always)]
    pub const fn header_len(&self) -> usize {
        (self.data_offset >> 4) as usize * 4
    }

    /// Where the sequence number stands, in bytes from the header's start.
    pub const SEQUENCE_OFFSET: usize = 4;
    /// Where the checksum stands, in bytes from the header's start.
    pub const CHECKSUM_OFFSET: usize = 16;
}
