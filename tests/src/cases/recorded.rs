//! What clients on Linux have sent to a VIP with the cases' addresses: HTTP, a TLS client's beginning, datagrams and pings, some
//! in fragments, of both families, and what their hosts sent beside it. `tests/captures/record.sh` records it anew.

use pcap_file::pcap::PcapReader;

use super::{twin, world};
use crate::{layers::protocol, packet::segment, tables::MemoryTables};

const CLIENTS: &[u8] = include_bytes!("../../captures/clients.pcap");
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Frames in their order, and the tables in which they mean something.
#[derive(Clone, Debug)]
pub struct Recording {
    pub name: String,
    pub world: MemoryTables,
    pub frames: Vec<Vec<u8>>,
}

/// One for each connection and what came before the next one.
///
/// # Panics
/// When the file is none of frames.
pub fn recordings() -> Vec<Recording> {
    let mut reader = PcapReader::new(CLIENTS).expect("a capture");
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet() {
        frames.push(packet.expect("a frame").data.into_owned());
    }
    let (v6, v4): (Vec<_>, Vec<_>) = frames
        .into_iter()
        .partition(|frame| frame[12..14] == ETHERTYPE_IPV6);
    let of = |family: &str, world: MemoryTables, frames: &[Vec<u8>]| {
        let parts = frames.chunk_by(|_, next| !opens_connection(next));
        (1..)
            .zip(parts)
            .map(|(number, frames)| Recording {
                name: format!("recorded {family}, part {number}"),
                world: world.clone(),
                frames: frames.to_vec(),
            })
            .collect::<Vec<_>>()
    };
    let mut all = of("IPv4", world(), &v4);
    all.extend(of("IPv6", twin::in_ipv6(&world()), &v6));
    all
}

/// Is this a SYN? IPv4 without options, as all connections of the recording are of.
fn opens_connection(frame: &[u8]) -> bool {
    let (protocol, transport) = if frame[12..14] == ETHERTYPE_IPV6 {
        (frame[20], 14 + 40)
    } else {
        (frame[23], 14 + 20)
    };
    protocol == self::protocol::TCP
        && frame
            .get(transport + 13)
            .is_some_and(|flags| flags & (segment::SYN | segment::ACK) == segment::SYN)
}
