//! Frames from a capture file (pcap or pcapng).

use std::{fs::File, path::Path};

use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

use crate::error::Error;

/// Frames that one request explains; beyond it the request would be too large.
pub const MAX_FRAMES: usize = 10_000;
/// Longest block of a capture that is read, in bytes: tcpdump's default snapshot length is 262 144.
const MAX_BLOCK: usize = 1 << 20;

/// Reads all frames of a capture, in order.
///
/// # Errors
/// The file can't be read, is no capture, is damaged, holds more than [`MAX_FRAMES`], or frames of a link that is
/// neither Ethernet nor plain IP.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let file = path.display();
    let opened = File::open(path).map_err(|error| Error::usage(format!("cannot read {file}: {error}")))?;
    let damaged = |error: &PcapError<&[u8]>| match error {
        PcapError::HeaderNotRecognized | PcapError::Eof => Error::usage(format!("{file} is no capture"))
            .hint("give a file that `tcpdump -w FILE` or Wireshark wrote"),
        other => Error::usage(format!("{file} is damaged: {other:?}")),
    };
    let mut reader = create_reader(MAX_BLOCK, opened).map_err(|error| damaged(&error))?;
    let mut frames = Vec::new();
    let mut links = Vec::new();
    loop {
        match reader.next() {
            Ok((offset, block)) => {
                match block {
                    PcapBlockOwned::LegacyHeader(header) => links = vec![header.network],
                    PcapBlockOwned::Legacy(packet) => {
                        frames.push(frame(
                            &links,
                            0,
                            packet.data,
                            packet.caplen,
                            packet.origlen,
                            path,
                        )?);
                    }
                    PcapBlockOwned::NG(Block::SectionHeader(_)) => links.clear(),
                    PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                        links.push(interface.linktype);
                    }
                    PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                        let (data, kept, whole) = (packet.data, packet.caplen, packet.origlen);
                        frames.push(frame(&links, packet.if_id as usize, data, kept, whole, path)?);
                    }
                    PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                        let kept = packet.origlen.min(packet.data.len() as u32);
                        frames.push(frame(&links, 0, packet.data, kept, packet.origlen, path)?);
                    }
                    PcapBlockOwned::NG(_) => {}
                }
                reader.consume(offset);
            }
            Err(PcapError::Eof) => return Ok(frames),
            Err(PcapError::Incomplete(_)) => match reader.refill() {
                Ok(()) => {}
                Err(error) => return Err(damaged(&error)),
            },
            Err(error) => return Err(damaged(&error)),
        }
        if frames.len() > MAX_FRAMES {
            return Err(
                Error::usage(format!("{file} holds more than {MAX_FRAMES} packets"))
                    .hint(format!("cut it: tcpdump -r {file} -c {MAX_FRAMES} -w FILE")),
            );
        }
    }
}

/// A captured packet as an Ethernet frame of its full length.
fn frame(
    links: &[Linktype],
    interface: usize,
    data: &[u8],
    kept: u32,
    whole: u32,
    path: &Path,
) -> Result<Vec<u8>, Error> {
    let header: &[u8] = match links.get(interface) {
        Some(&Linktype::ETHERNET) => &[],
        Some(&Linktype::RAW | &Linktype::IPV4) => &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0],
        Some(&Linktype::LINUX_SLL | &Linktype(276)) => {
            let what = format!("{} was captured on all interfaces at once", path.display());
            return Err(Error::usage(what)
                .hint("capture on the interface that packets arrive by: tcpdump -i INTERFACE -w FILE"));
        }
        other => {
            let what = format!(
                "{} holds frames that are not Ethernet ({other:?})",
                path.display()
            );
            return Err(Error::usage(what).hint("capture on an Ethernet interface"));
        }
    };
    let mut frame = header.to_vec();
    frame.extend(&data[..data.len().min(kept as usize)]);
    frame.resize(
        header.len() + (whole as usize).min(u16::MAX as usize + 18).max(kept as usize),
        0,
    );
    Ok(frame)
}
