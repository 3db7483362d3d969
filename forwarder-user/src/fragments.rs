//! What a program cannot do with fragments (`datapath::fragment`): hold them, and make several packets of one.
//!
//! The data path knows the flow of a fragment only from its packet's first, and cannot keep a packet itself. It hands
//! early ones over; here they wait for a second at most, and are sent on when the first has passed. Memory is bounded:
//! of too many, the oldest go.
//!
//! It also hands over what IPv4 lets routers cut and does not fit as IPv6, which is cut here (RFC 7915 §4).
//!
//! What is sent leaves by a raw socket and the host's routes, as in a tunnel in kernel mode. Without an agent it is lost.

use std::{
    collections::VecDeque,
    io::{self, PipeReader, PipeWriter},
    net::SocketAddr,
    os::fd::AsFd as _,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytemuck::Zeroable as _;
use forwarder_common::{
    abi::{
        flow::FlowEntry,
        fragment::{FragmentFlow, HeldKind, HeldPacket},
    },
    datapath::{Walk, fragment},
    wire::{
        Be16, Be32, IpAddress, WireHeader as _,
        ipv6::{FragmentHeader, Ipv6Header, NEXT_FRAGMENT},
    },
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tracing::{debug, error};

use crate::{
    datapath::{
        held::HeldMaps,
        packet::{Bare, MemoryPacket},
    },
    error::Error,
    network::raw::RawSockets,
};

/// Fragments that are held at a time: 2 MB. Far more than reordering in a network makes.
const MOST: usize = 1000;
/// How long one is held. Packets overtake each other by milliseconds.
const LIFETIME: Duration = Duration::from_secs(1);
/// Payload of a fragment that is cut here, in bytes: what 1280 bytes, the least that IPv6 carries, leave.
const PIECE: usize = 1280 - Ipv6Header::LEN - FragmentHeader::LEN;
/// Set in the identification of packets that are cut here: those of packets cut before have 16 bits.
const OF_AGENT: u32 = 1 << 31;
/// How often those that wait are looked at: nothing tells that a first fragment has passed.
const LOOK_MILLIS: u8 = 10;

/// Holds fragments until it is dropped.
pub struct FragmentHolder {
    /// Closed to end the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl FragmentHolder {
    /// Starts a thread that holds them.
    ///
    /// # Errors
    /// No CAP_NET_RAW, or no thread.
    pub fn start(maps: HeldMaps) -> Result<Self, Error> {
        let sockets = RawSockets::open("fragments")?;
        let cannot = |error| Error::failed(format!("cannot start a thread for fragments: {error}"));
        let (stopped, stop) = io::pipe().map_err(cannot)?;
        let thread = thread::Builder::new()
            .name("fragments".to_owned())
            .spawn(move || hold(maps, Sender { sockets, count: 0 }, &stopped))
            .map_err(cannot)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for FragmentHolder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

fn hold(mut maps: HeldMaps, mut sender: Sender, stopped: &PipeReader) {
    let mut waiting: VecDeque<(Instant, Box<HeldPacket>)> = VecDeque::new();
    loop {
        let timeout = if waiting.is_empty() {
            PollTimeout::NONE
        } else {
            PollTimeout::from(LOOK_MILLIS)
        };
        let mut events = [
            PollFd::new(maps.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut events, timeout) {
            Err(Errno::EINTR) | Ok(_) => {}
            Err(error) => {
                error!(%error, "early fragments are lost from now on");
                return;
            }
        }
        if events[1].any().unwrap_or(true) {
            return;
        }
        while let Some(mut packet) = maps.take() {
            if packet.kind == HeldKind::TOO_LARGE {
                sender.send_cut(&mut packet);
                continue;
            }
            if waiting.len() == MOST {
                waiting.pop_front();
            }
            waiting.push_back((Instant::now(), Box::new(packet)));
        }
        waiting.retain(|(since, fragment)| {
            let Some(first) = maps.first(&fragment.key) else {
                return since.elapsed() < LIFETIME;
            };
            if let Some(entry) = maps.flow(first.id)
                && let Some((to, packet)) = released(fragment, &entry, first)
            {
                sender.send(&packet, to);
            }
            false
        });
    }
}

struct Sender {
    sockets: RawSockets,
    /// Packets of IPv6 cut so far.
    count: u32,
}

impl Sender {
    /// Sends a packet as it is.
    fn send(&self, packet: &[u8], to: IpAddress) {
        let to = SocketAddr::new(to.to_std(), 0);
        if let Err(error) = self.sockets.send(packet, to) {
            // Its receiver gives the packet up, as after any loss.
            debug!(%error, "no fragment to {to}");
        }
    }

    /// Sends a finished packet of IPv6 in fragments.
    fn send_cut(&mut self, held: &mut HeldPacket) {
        self.count = self.count.wrapping_add(1);
        let identification = Be32::new(self.count | OF_AGENT);
        let packet = held.packet.get_mut(..held.len as usize);
        let sent = packet.and_then(|packet| {
            let to = take_hop(packet)?;
            cut(packet, identification).map(|pieces| pieces.iter().for_each(|piece| self.send(piece, to)))
        });
        if sent.is_none() {
            debug!("a packet of IPv6 is not cut: its hops have ended");
        }
    }
}

/// The fragment as it leaves, and where it goes; `None`: it is of no flow any more, or at its end.
fn released(fragment: &HeldPacket, entry: &FlowEntry, first: FragmentFlow) -> Option<(IpAddress, Vec<u8>)> {
    let bytes = fragment.packet.get(..fragment.len as usize)?;
    let mut packet = MemoryPacket::<Bare>::new(bytes.to_vec());
    let mut walk = Walk::zeroed();
    fragment::release(&mut packet, &mut walk, first, entry).ok()?;
    Some((walk.hit.rewrite.destination, packet.bytes))
}

/// Takes a hop off a packet of IPv6, and says where it goes; `None`: there is none left, or no header.
fn take_hop(packet: &mut [u8]) -> Option<IpAddress> {
    let ip: &mut Ipv6Header = bytemuck::from_bytes_mut(packet.get_mut(..Ipv6Header::LEN)?);
    ip.hop_limit = ip.hop_limit.checked_sub(1).filter(|left| *left > 0)?;
    Some(ip.destination())
}

/// Cuts a packet of IPv6 into fragments that every way carries (RFC 8200 §4.5); it may be one itself, with nothing but
/// the fragment header behind that of IP. `identification` is for a whole one.
fn cut(packet: &[u8], identification: Be32) -> Option<Vec<Vec<u8>>> {
    let (header, payload) = packet.split_at_checked(Ipv6Header::LEN)?;
    let mut header: Ipv6Header = bytemuck::pod_read_unaligned(header);
    let (mut fragment, payload) = if header.next_header == NEXT_FRAGMENT {
        let (fragment, payload) = payload.split_at_checked(FragmentHeader::LEN)?;
        (bytemuck::pod_read_unaligned::<FragmentHeader>(fragment), payload)
    } else {
        let fragment = FragmentHeader {
            next_header: header.next_header,
            reserved: 0,
            offset: Be16::ZERO,
            identification,
        };
        (fragment, payload)
    };
    header.next_header = NEXT_FRAGMENT;
    let (first, has_more) = (fragment.offset.get() & !7, fragment.has_more());
    let count = payload.len().div_ceil(PIECE);
    let pieces = payload.chunks(PIECE).enumerate().map(|(index, piece)| {
        let more = u16::from(has_more || index + 1 < count);
        fragment.offset = Be16::new(first.wrapping_add((index * PIECE) as u16) | more);
        header.payload_len = Be16::new((FragmentHeader::LEN + piece.len()) as u16);
        [bytemuck::bytes_of(&header), bytemuck::bytes_of(&fragment), piece].concat()
    });
    Some(pieces.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of IPv6 with so much payload, in which bytes are told apart.
    fn packet(len: usize, fragment: Option<(u16, u32)>) -> Vec<u8> {
        let extra = fragment.map_or(0, |_| FragmentHeader::LEN);
        let next = if fragment.is_some() { NEXT_FRAGMENT } else { 17 };
        let mut header = Ipv6Header::zeroed();
        header.version_class_flow = Be32::new(6 << 28);
        (header.payload_len, header.next_header, header.hop_limit) =
            (Be16::new((len + extra) as u16), next, 60);
        let mut bytes = bytemuck::bytes_of(&header).to_vec();
        if let Some((offset, identification)) = fragment {
            bytes.extend_from_slice(bytemuck::bytes_of(&FragmentHeader {
                next_header: 17,
                reserved: 0,
                offset: Be16::new(offset),
                identification: Be32::new(identification),
            }));
        }
        bytes.extend((0..len).map(|index| (index % 251) as u8));
        bytes
    }

    /// Offsets in bytes, whether more follow, identification; and the payload put together.
    fn reassembled(pieces: &[Vec<u8>]) -> (Vec<(u16, bool, u32)>, Vec<u8>) {
        let mut headers = Vec::new();
        let mut payload = Vec::new();
        for piece in pieces {
            assert!(piece.len() <= 1280, "{} bytes", piece.len());
            let ip: Ipv6Header = bytemuck::pod_read_unaligned(&piece[..Ipv6Header::LEN]);
            assert_eq!(
                (ip.payload_len.get() as usize, ip.next_header),
                (piece.len() - Ipv6Header::LEN, NEXT_FRAGMENT)
            );
            let start = Ipv6Header::LEN + FragmentHeader::LEN;
            let fragment: FragmentHeader = bytemuck::pod_read_unaligned(&piece[Ipv6Header::LEN..start]);
            assert_eq!({ fragment.next_header }, 17);
            headers.push((
                fragment.offset.get() & !7,
                fragment.has_more(),
                fragment.identification.get(),
            ));
            payload.extend_from_slice(&piece[start..]);
        }
        (headers, payload)
    }

    #[test]
    fn a_packet_is_cut_into_fragments_that_every_way_carries() {
        let whole = packet(1460, None);
        let pieces = cut(&whole, Be32::new(7)).expect("it has a header");
        let (headers, payload) = reassembled(&pieces);
        assert_eq!(headers, [(0, true, 7), (1232, false, 7)]);
        assert_eq!(payload, whole[Ipv6Header::LEN..]);
    }

    #[test]
    fn a_fragment_is_cut_into_fragments_of_the_same_packet() {
        for (more, last) in [(1, true), (0, false)] {
            let middle = packet(1480, Some((2960 | more, 0x4711)));
            let pieces = cut(&middle, Be32::new(7)).expect("it has headers");
            let (headers, payload) = reassembled(&pieces);
            assert_eq!(headers, [(2960, true, 0x4711), (4192, last, 0x4711)]);
            assert_eq!(payload, middle[Ipv6Header::LEN + FragmentHeader::LEN..]);
        }
    }

    #[test]
    fn a_packet_without_hops_left_goes_no_further() {
        let mut last = packet(8, None);
        last[7] = 1;
        assert_eq!(take_hop(&mut last), None);
        assert!(take_hop(&mut packet(8, None)).is_some());
        assert_eq!(cut(&[0x60; 20], Be32::new(7)), None);
    }
}
