//! Frames from a capture file (pcap or pcapng).

use std::{fs::File, io::Read, path::Path};

use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

use crate::error::Error;

/// Frames that one request explains; beyond it the request would be too large.
pub const MAX_FRAMES: usize = 10_000;
/// Bytes of all of them: as hexadecimal digits, what the agent takes in one request. Little of that need be in the file, as
/// what was cut off is zeros again.
const MAX_BYTES: usize = 31 << 20;
/// Longest block of a capture that is read, in bytes: tcpdump's default snapshot length is 262 144.
const MAX_BLOCK: usize = 1 << 20;

/// Reads all frames of a capture, in order.
///
/// # Errors
/// The file can't be read, is no capture, is damaged, holds more than [`MAX_FRAMES`] or too many bytes, or frames of a
/// link that is neither Ethernet nor plain IP.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let opened =
        File::open(path).map_err(|error| Error::usage(format!("cannot read {}: {error}", path.display())))?;
    read_from(opened, path)
}

/// Reads all frames of a capture, in order; `path` is what errors call it.
///
/// # Errors
/// As [`read`].
pub fn read_from(source: impl Read + Send, path: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let file = path.display();
    let damaged = |error: &PcapError<&[u8]>| match error {
        PcapError::HeaderNotRecognized | PcapError::Eof => Error::usage(format!("{file} is no capture"))
            .hint("give a file that `tcpdump -w FILE` or Wireshark wrote"),
        other => Error::usage(format!("{file} is damaged: {other:?}")),
    };
    let mut reader = create_reader(MAX_BLOCK, source).map_err(|error| damaged(&error))?;
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut links = Vec::new();
    let mut bytes = 0;
    loop {
        let known = frames.len();
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
        bytes += frames[known..].iter().map(Vec::len).sum::<usize>();
        if bytes > MAX_BYTES {
            return Err(
                Error::usage(format!("the packets of {file} are more than {MAX_BYTES} bytes"))
                    .hint(format!("cut it: tcpdump -r {file} -c {known} -w FILE")),
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A capture in the classic format; each packet is its bytes and its original length.
    fn classic(link: u32, packets: &[(&[u8], u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |words: &[u32], data: &[u8]| {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend(data);
        };
        put(&[0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, link], &[]);
        for (data, whole) in packets {
            put(&[0, 0, data.len() as u32, *whole], data);
        }
        bytes
    }

    /// The same as pcapng: section, interface, one block per packet.
    fn next_generation(link: u32, packets: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut block = |kind: u32, words: &[u32], data: &[u8]| {
            let padding = data.len().next_multiple_of(4) - data.len();
            let length = (12 + words.len() * 4 + data.len() + padding) as u32;
            for word in [&[kind, length], words].concat() {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(data);
            bytes.extend(vec![0; padding]);
            bytes.extend(length.to_le_bytes());
        };
        block(0x0a0d_0d0a, &[0x1a2b_3c4d, 1, u32::MAX, u32::MAX], &[]);
        block(1, &[link, 65_535], &[]);
        for data in packets {
            let length = data.len() as u32;
            block(6, &[0, 0, 0, length, length], data);
        }
        bytes
    }

    fn read_bytes(bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn both_formats_give_the_frames_in_order() {
        let (one, two) = ([1_u8; 60], [2_u8; 61]);
        let classic = classic(1, &[(&one, 60), (&two, 61)]);
        assert_eq!(read_bytes(&classic).unwrap(), [one.to_vec(), two.to_vec()]);
        let ng = next_generation(1, &[&one, &two]);
        assert_eq!(read_bytes(&ng).unwrap(), [one.to_vec(), two.to_vec()]);
        assert!(read_bytes(&classic[..24]).unwrap().is_empty());
    }

    #[test]
    fn what_was_cut_off_is_zeros_and_plain_ip_gets_a_link_header() {
        let frames = read_bytes(&classic(1, &[(&[7; 54], 1514)])).unwrap();
        assert_eq!((frames[0].len(), frames[0][53], frames[0][54]), (1514, 7, 0));
        let frames = read_bytes(&classic(101, &[(&[0x45; 20], 20)])).unwrap();
        assert_eq!((frames[0].len(), &frames[0][12..15]), (34, &[8, 0, 0x45][..]));
    }

    #[test]
    fn few_bytes_of_many_long_packets_do_not_become_all_of_the_memory() {
        let many = |count| classic(1, &vec![(&[7_u8; 54][..], 65_535); count]);
        assert_eq!(read_bytes(&many(400)).unwrap().len(), 400);
        let error = read_bytes(&many(600)).unwrap_err();
        assert!(error.what.contains("more than 32505856 bytes"), "{error}");
        assert!(error.hint.unwrap().contains("-c 496 "));
    }

    #[test]
    fn what_cannot_be_explained_is_refused_with_a_way_out() {
        for (bytes, expected) in [
            (b"no capture at all, but long enough".to_vec(), "is no capture"),
            (Vec::new(), "is no capture"),
            (classic(113, &[(&[0; 60], 60)]), "captured on all interfaces"),
            (classic(105, &[(&[0; 60], 60)]), "not Ethernet"),
            (classic(1, &[(&[0; 60], 60)])[..70].to_vec(), "is damaged"),
        ] {
            let error = read_bytes(&bytes).unwrap_err();
            assert!(error.what.contains(expected), "{error}");
            assert_eq!(error.exit_code, crate::error::EXIT_USAGE);
        }
        let missing = read(Path::new("/nonexistent.pcap")).unwrap_err();
        assert!(
            missing.what.starts_with("cannot read /nonexistent.pcap: "),
            "{missing}"
        );
    }
}
