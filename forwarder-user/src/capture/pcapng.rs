//! Captured packets as a file for Wireshark (pcapng, draft-ietf-opsawg-pcapng).
//!
//! An interface block for each interface and kind of link, before its first packet. Each packet has its verdict and
//! reason as a comment, and its direction: in as it came, out as it left.

use std::{borrow::Cow, collections::HashMap, time::Duration};

use forwarder_common::abi::capture::{CAPTURED_BYTES, CapturedPacket};
use pcap_parser::{
    BOM_MAGIC, EPB_MAGIC, EnhancedPacketBlock, IDB_MAGIC, InterfaceDescriptionBlock, Linktype, OptionCode,
    PcapNGOption, SHB_MAGIC, SectionHeaderBlock, ToVec as _,
};

use super::{TracedPacket, captured, is_bare};
use crate::error::Error;

/// epb_flags (draft-ietf-opsawg-pcapng §4.3): option code, and directions.
const FLAGS: OptionCode = OptionCode(2);
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// if_tsresol: nanoseconds.
const NANOSECONDS: u8 = 9;

/// Writes blocks; knows which interfaces the file has.
#[derive(Default)]
pub struct Writer {
    /// By name and kind of link.
    interfaces: HashMap<(String, i32), u32>,
}

/// One packet as the file has it.
struct Frame<'a> {
    interface: &'a str,
    bytes: &'a [u8],
    len: u32,
    direction: u32,
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes what a file begins with.
    ///
    /// # Errors
    /// A block cannot be made.
    pub fn begin(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        let application = concat!("forwarder ", env!("CARGO_PKG_VERSION"));
        let mut block = SectionHeaderBlock {
            block_type: SHB_MAGIC,
            block_len1: 0,
            bom: BOM_MAGIC,
            major_version: 1,
            minor_version: 0,
            section_len: -1,
            options: vec![option(OptionCode::ShbUserAppl, application.as_bytes())],
            block_len2: 0,
        };
        out.extend(block.to_vec().map_err(|error| cannot(&error))?);
        Ok(())
    }

    /// Writes a packet: as it came, and as it left if it did.
    ///
    /// # Errors
    /// A block cannot be made.
    pub fn write(
        &mut self,
        packet: &CapturedPacket,
        time: Duration,
        traced: &TracedPacket,
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let comment = traced.comment(packet.reason);
        let before = Frame {
            interface: &traced.interface,
            bytes: captured(&packet.before, packet.before_captured),
            len: packet.before_len,
            direction: INBOUND,
        };
        self.frame(&before, time, &comment, out)?;
        if traced.becomes.is_none() && traced.egress.is_none() {
            return Ok(());
        }
        let after = Frame {
            // What goes to the stack leaves by nothing that is known here.
            interface: traced.egress.as_ref().unwrap_or(&traced.interface),
            bytes: captured(&packet.after, packet.after_captured),
            len: packet.after_len,
            direction: OUTBOUND,
        };
        self.frame(&after, time, &comment, out)
    }

    fn frame(
        &mut self,
        frame: &Frame<'_>,
        time: Duration,
        comment: &str,
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let link = if is_bare(frame.bytes, frame.len) {
            Linktype::RAW
        } else {
            Linktype::ETHERNET
        };
        let if_id = self.interface(frame.interface, link, out)?;
        let nanos = time.as_nanos() as u64;
        let direction = frame.direction.to_le_bytes();
        let mut block = EnhancedPacketBlock {
            block_type: EPB_MAGIC,
            block_len1: 0,
            if_id,
            ts_high: (nanos >> 32) as u32,
            ts_low: nanos as u32,
            caplen: frame.bytes.len() as u32,
            origlen: frame.len,
            data: frame.bytes,
            options: vec![
                option(OptionCode::Comment, comment.as_bytes()),
                option(FLAGS, &direction),
            ],
            block_len2: 0,
        };
        out.extend(block.to_vec().map_err(|error| cannot(&error))?);
        Ok(())
    }

    /// The number of an interface, whose block is written if it is new.
    fn interface(&mut self, name: &str, link: Linktype, out: &mut Vec<u8>) -> Result<u32, Error> {
        let key = (name.to_owned(), link.0);
        if let Some(number) = self.interfaces.get(&key) {
            return Ok(*number);
        }
        let mut block = InterfaceDescriptionBlock {
            block_type: IDB_MAGIC,
            block_len1: 0,
            linktype: link,
            reserved: 0,
            snaplen: CAPTURED_BYTES as u32,
            options: vec![option(OptionCode::IfName, name.as_bytes())],
            block_len2: 0,
            if_tsresol: NANOSECONDS,
            if_tsoffset: 0,
        };
        out.extend(block.to_vec().map_err(|error| cannot(&error))?);
        let number = self.interfaces.len() as u32;
        self.interfaces.insert(key, number);
        Ok(number)
    }
}

fn option<'a>(code: OptionCode, value: &'a [u8]) -> PcapNGOption<'a> {
    PcapNGOption {
        code,
        len: value.len() as u16,
        value: Cow::Borrowed(value),
    }
}

fn cannot(error: &impl std::fmt::Debug) -> Error {
    Error::failed(format!("cannot write a packet as pcapng: {error:?}"))
}

#[cfg(test)]
mod tests {
    use pcap_parser::{Block, PcapBlockOwned, PcapNGReader, traits::PcapReaderIterator as _};

    use super::{super::trace::testing::forwarded, *};
    use crate::state::names::Names;

    /// (interface, direction, captured, length, comment, nanoseconds) of the packets in a file.
    fn read(file: &[u8]) -> Vec<(String, u32, usize, u32, String, u64)> {
        let mut reader = PcapNGReader::new(65_536, file).unwrap();
        let (mut interfaces, mut packets) = (Vec::new(), Vec::new());
        while let Ok((len, block)) = reader.next() {
            match block {
                PcapBlockOwned::NG(Block::InterfaceDescription(block)) => {
                    let name = block.options.iter().find(|one| one.code == OptionCode::IfName);
                    let value = name.unwrap();
                    let name = &value.value[..value.len as usize];
                    interfaces.push(String::from_utf8(name.to_vec()).unwrap());
                    assert_eq!(block.if_tsresol, NANOSECONDS);
                }
                PcapBlockOwned::NG(Block::EnhancedPacket(block)) => {
                    let value = |code| {
                        let one = block.options.iter().find(|one| one.code == code).unwrap();
                        one.value[..one.len as usize].to_vec()
                    };
                    packets.push((
                        interfaces[block.if_id as usize].clone(),
                        u32::from_le_bytes(value(FLAGS).try_into().unwrap()),
                        block.caplen as usize,
                        block.origlen,
                        String::from_utf8(value(OptionCode::Comment)).unwrap(),
                        u64::from(block.ts_high) << 32 | u64::from(block.ts_low),
                    ));
                }
                _ => {}
            }
            reader.consume(len);
        }
        packets
    }

    #[test]
    fn a_file_has_both_sides_of_a_packet_with_comments() {
        let mut writer = Writer::new();
        let mut file = Vec::new();
        writer.begin(&mut file).unwrap();
        let time = Duration::new(1_700_000_000, 7);
        for snap in [2048, 33] {
            let packet = forwarded(snap);
            let traced = TracedPacket::of(&packet, time, 0, &Names::default());
            writer.write(&packet, time, &traced, &mut file).unwrap();
        }
        let packets = read(&file);
        let seen: Vec<_> = packets
            .iter()
            .map(|(interface, direction, captured, len, ..)| {
                (interface.as_str(), *direction, *captured, *len)
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("interface 2", INBOUND, 54, 54),
                ("interface 3", OUTBOUND, 54, 54),
                ("interface 2", INBOUND, 33, 54),
                ("interface 3", OUTBOUND, 33, 54),
            ]
        );
        for (.., comment, nanos) in packets {
            assert!(
                comment.starts_with("send: request_forwarded by interface 3"),
                "{comment}"
            );
            assert_eq!(nanos, 1_700_000_000_000_000_007);
        }
    }

    #[test]
    fn what_is_dropped_is_there_once() {
        let mut packet = forwarded(2048);
        packet.action = 3;
        let traced = TracedPacket::of(&packet, Duration::ZERO, 0, &Names::default());
        let (mut writer, mut file) = (Writer::new(), Vec::new());
        writer.begin(&mut file).unwrap();
        writer.write(&packet, Duration::ZERO, &traced, &mut file).unwrap();
        assert_eq!(read(&file).len(), 1);
    }
}
