//! Fragments that came before their packet's first: held here, and sent on when that has passed.
//!
//! The data path knows the flow of a fragment only from the first, and cannot keep a packet itself. It hands early
//! ones over (`datapath::fragment`); here they wait for a second at most. Memory is bounded: of too many, the oldest
//! go. What is sent on leaves by a raw socket and the host's routes, as in a tunnel in kernel mode.
//!
//! Without an agent, early fragments are lost; those in order are not its business.

use std::{
    collections::VecDeque,
    io::{self, PipeReader, PipeWriter},
    net::SocketAddr,
    os::fd::AsFd as _,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use forwarder_common::{
    abi::{
        flow::{Direction, FlowEntry, FlowState},
        fragment::{FragmentFlow, HeldFragment},
    },
    wire::{IpAddress, WireHeader as _, checksum::Delta, ipv4::Ipv4Header, ipv6::Ipv6Header},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tracing::{debug, error};

use crate::{datapath::held::HeldMaps, error::Error, network::raw::RawSockets};

/// Fragments that are held at a time: 2 MB. Far more than reordering in a network makes.
const MOST: usize = 1000;
/// How long one is held. Packets overtake each other by milliseconds.
const LIFETIME: Duration = Duration::from_secs(1);
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
            .spawn(move || hold(maps, &sockets, &stopped))
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

fn hold(mut maps: HeldMaps, sockets: &RawSockets, stopped: &PipeReader) {
    let mut waiting: VecDeque<(Instant, Box<HeldFragment>)> = VecDeque::new();
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
        while let Some(fragment) = maps.take() {
            if waiting.len() == MOST {
                waiting.pop_front();
            }
            waiting.push_back((Instant::now(), Box::new(fragment)));
        }
        waiting.retain(|(since, fragment)| {
            let Some(first) = maps.first(&fragment.key) else {
                return since.elapsed() < LIFETIME;
            };
            send(&maps, sockets, fragment, first);
            false
        });
    }
}

fn send(maps: &HeldMaps, sockets: &RawSockets, fragment: &HeldFragment, first: FragmentFlow) {
    let Some(entry) = maps.flow(first.id) else {
        return;
    };
    let Some((to, packet)) = translated(fragment, &entry, first.direction) else {
        return;
    };
    if let Err(error) = sockets.send(&packet, to) {
        // Its receiver gives the packet up, as after any loss.
        debug!(%error, "no fragment to {to}");
    }
}

/// The packet with the addresses of its flow, and where it goes; `None`: it is not of this flow, or at its end.
fn translated(
    fragment: &HeldFragment,
    entry: &FlowEntry,
    direction: Direction,
) -> Option<(SocketAddr, Vec<u8>)> {
    let (key, expected) = (&fragment.key, entry.key(direction));
    let binding = &entry.binding;
    let (source, destination) = if direction == Direction::REQUEST {
        (binding.snat, binding.backend)
    } else {
        (binding.vip, binding.client)
    };
    let is_of_flow = entry.state == FlowState::LIVE
        && (key.source, key.destination, key.protocol)
            == (expected.source, expected.destination, expected.protocol)
        && destination.is_v4() == key.destination.is_v4();
    let mut packet = fragment.packet.get(..fragment.len as usize)?.to_vec();
    if !is_of_flow || !readdress(&mut packet, key, source, destination) {
        return None;
    }
    Some((SocketAddr::new(destination.to_std(), 0), packet))
}

/// Writes new addresses and takes a hop; `false`: there is none left, or no header.
fn readdress(
    packet: &mut [u8],
    key: &forwarder_common::abi::fragment::FragmentKey,
    source: IpAddress,
    destination: IpAddress,
) -> bool {
    if destination.is_v4() {
        let Some(header) = packet.get_mut(..Ipv4Header::LEN) else {
            return false;
        };
        let ip: &mut Ipv4Header = bytemuck::from_bytes_mut(header);
        if ip.ttl <= 1 {
            return false;
        }
        let before = ip.ttl_word();
        ip.ttl -= 1;
        ip.checksum = Delta::ZERO
            .replace_address(key.source, source)
            .replace_address(key.destination, destination)
            .replace_raw(before, ip.ttl_word())
            .apply(ip.checksum);
        ip.source = source.low();
        ip.destination = destination.low();
        return true;
    }
    let Some(header) = packet.get_mut(..Ipv6Header::LEN) else {
        return false;
    };
    let ip: &mut Ipv6Header = bytemuck::from_bytes_mut(header);
    if ip.hop_limit <= 1 {
        return false;
    }
    ip.hop_limit -= 1;
    ip.set_addresses(&source, &destination);
    true
}
