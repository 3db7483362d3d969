//! Packets as the data path sees them, before and after translation, with verdict and reason: for `forwarder capture`
//! as pcapng, for `forwarder trace` as lines. What XDP takes, tcpdump does not see.
//!
//! One asker at a time has the maps; the programs look for packets only while there is one. The filter is theirs, so
//! what nobody asked for costs little even then. What they cannot hand over in time is lost and counted.

use std::{
    io::{self, PipeReader, PipeWriter},
    os::fd::AsFd as _,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use axum::body::Bytes;
use bytemuck::Zeroable as _;
use forwarder_common::{
    abi::{
        capture::{CAPTURED_BYTES, CaptureFilter, CapturedPacket},
        reason::{DESCRIPTIONS, Reason},
    },
    wire::{Be16, IpAddress},
};
use futures_util::stream::{self, Stream};
use ipnet::IpNet;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedMutexGuard, mpsc},
};
use utoipa::ToSchema;

use crate::{
    api::StatusSource, config::Protocol, datapath::capture::CaptureMaps, error::Error, state::names::Names,
};

mod pcapng;
mod trace;

pub use pcapng::Writer;
pub use trace::TracedPacket;

/// Bytes of what is sent at once, about.
const CHUNK_BYTES: usize = 256 << 10;
/// How many of them may wait for a slow reader; then packets wait in the ring buffer, and are lost when that is full.
const CHUNKS: usize = 16;

/// Which packets are wanted: those that everything said here is true of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CaptureRequest {
    /// Source or destination, as the packet comes, lies in this prefix; of a packet in a native tunnel, the inner one.
    #[schema(value_type = Option<String>)]
    pub network: Option<IpNet>,
    /// Source or destination port.
    pub port: Option<u16>,
    /// `tcp`, `udp`, `sctp` or `icmp`.
    pub protocol: Option<String>,
    /// Names of reasons, as in the status; none: all.
    pub reasons: Vec<String>,
    /// Of so many packets one, on each CPU; none: all.
    pub one_in: Option<u32>,
    /// Bytes of each packet, 1 to 2048; none: 2048.
    pub snap_bytes: Option<u32>,
    /// Ends after so many; none: does not end by itself.
    pub packets: Option<u64>,
}

impl CaptureRequest {
    /// As the programs have it.
    ///
    /// # Errors
    /// What is not possible, with what is.
    pub fn filter(&self) -> Result<CaptureFilter, Error> {
        let mut filter = CaptureFilter {
            reasons: self.reasons()?,
            ..CaptureFilter::zeroed()
        };
        if let Some(network) = self.network {
            filter.network = IpAddress::from(network.network());
            // Of IPv4 addresses the first 96 bits are always the same.
            let bits = u32::from(network.prefix_len()) + if network.addr().is_ipv4() { 96 } else { 0 };
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            filter.mask = IpAddress::new(mask.to_be_bytes());
        }
        filter.port = Be16::new(self.port.unwrap_or(0));
        if let Some(name) = &self.protocol {
            let found = Protocol::ALL.iter().find(|(known, _)| known == name);
            let (_, protocol) = found.ok_or_else(|| {
                Error::usage(format!("\"{name}\" is no protocol of flows"))
                    .hint("one of tcp, udp, sctp, icmp")
            })?;
            filter.protocol = u16::from(protocol.number());
        }
        filter.one_in = self.one_in.unwrap_or(1);
        filter.snap_bytes = self.snap_bytes.unwrap_or(CAPTURED_BYTES as u32);
        if filter.one_in == 0 {
            return Err(Error::usage("one packet of none cannot be captured").hint("one_in is 1 or more"));
        }
        if !(1..=CAPTURED_BYTES as u32).contains(&filter.snap_bytes) {
            let what = format!("{} bytes of a packet cannot be captured", filter.snap_bytes);
            return Err(Error::usage(what).hint(format!("snap_bytes is 1 to {CAPTURED_BYTES}")));
        }
        Ok(filter)
    }

    fn reasons(&self) -> Result<u64, Error> {
        if self.reasons.is_empty() {
            return Ok(u64::MAX);
        }
        let mut bits = 0;
        for name in &self.reasons {
            let found = DESCRIPTIONS.iter().find(|description| description.name == name);
            let found = found.ok_or_else(|| {
                Error::usage(format!("no reason \"{name}\"")).hint("`forwarder status --reasons` lists them")
            })?;
            bits |= 1 << found.reason.0;
        }
        Ok(bits)
    }
}

/// How packets are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// A file for Wireshark: each packet twice, as it came and as it left, unless it was dropped or passed unchanged.
    Pcapng,
    /// A [`TracedPacket`] in JSON on each line.
    Lines,
}

/// The maps, for one asker at a time.
#[derive(Clone)]
pub struct Capturer(Arc<Mutex<CaptureMaps>>);

impl Capturer {
    pub fn new(maps: CaptureMaps) -> Self {
        Self(Arc::new(Mutex::new(maps)))
    }

    /// Takes the maps, says what is wanted and has the programs look for it.
    ///
    /// # Errors
    /// Somebody else has the maps, the request is not possible, or the agent has no time.
    pub async fn begin(
        &self,
        request: &CaptureRequest,
        form: Form,
        names: Arc<Names>,
        agent: StatusSource,
    ) -> Result<Reading, Error> {
        let filter = request.filter()?;
        let mut maps = self.0.clone().try_lock_owned().map_err(|_| {
            Error::failed("somebody captures packets already")
                .hint("one capture or trace runs at a time: end the other one")
        })?;
        maps.want(filter)?;
        let lost_before = maps.counts()?.lost;
        agent.capture(true).await?;
        let session = Session {
            maps,
            form,
            writer: Writer::new(),
            clock: since_the_epoch(),
            left: request.packets.unwrap_or(u64::MAX),
            lost_before,
            lost: 0,
            names,
        };
        session.start(agent)
    }
}

/// What CLOCK_MONOTONIC has to be added to for the time of day.
fn since_the_epoch() -> Duration {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    now.saturating_sub(monotonic)
}

/// What somebody reads; the capture ends when it is dropped.
pub struct Reading {
    chunks: mpsc::Receiver<Result<Bytes, Error>>,
    /// Closed, it wakes the thread.
    _stop: PipeWriter,
}

impl Reading {
    /// What is told of the packets, as it comes.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send {
        stream::unfold(self, |mut reading| async move {
            let chunk = reading.chunks.recv().await?;
            Some((chunk, reading))
        })
    }
}

/// A capture that runs, in a thread of its own.
struct Session {
    maps: OwnedMutexGuard<CaptureMaps>,
    form: Form,
    writer: Writer,
    /// When CLOCK_MONOTONIC was zero.
    clock: Duration,
    /// Packets until the end.
    left: u64,
    /// Packets that were lost before the session, and in it as far as told.
    lost_before: u64,
    lost: u64,
    names: Arc<Names>,
}

impl Session {
    fn start(mut self, agent: StatusSource) -> Result<Reading, Error> {
        let cannot = |error| Error::failed(format!("cannot start a thread for packets: {error}"));
        let (stopped, stop) = io::pipe().map_err(cannot)?;
        let (sender, chunks) = mpsc::channel(CHUNKS);
        let runtime = Handle::current();
        let run = move || {
            if let Err(error) = self.run(&sender, &stopped) {
                // Whoever reads may have gone.
                let _ = sender.blocking_send(Err(error));
            }
            // Without an agent there are no programs that it could tell. Only then may others have the maps: else the
            // programs would be told after the next capture has begun.
            let _ = runtime.block_on(agent.capture(false));
        };
        let thread = thread::Builder::new().name("capture".to_owned());
        thread.spawn(run).map_err(cannot)?;
        Ok(Reading { chunks, _stop: stop })
    }

    /// Tells of packets until enough were told of, or nobody reads any more.
    fn run(
        &mut self,
        sender: &mpsc::Sender<Result<Bytes, Error>>,
        stopped: &PipeReader,
    ) -> Result<(), Error> {
        let mut chunk = Vec::new();
        if self.form == Form::Pcapng {
            self.writer.begin(&mut chunk)?;
        }
        loop {
            while self.left > 0
                && chunk.len() < CHUNK_BYTES
                && let Some(packet) = self.maps.take()
            {
                self.left -= 1;
                self.tell(&packet, &mut chunk)?;
            }
            if !chunk.is_empty() {
                if sender
                    .blocking_send(Ok(Bytes::from(std::mem::take(&mut chunk))))
                    .is_err()
                {
                    return Ok(());
                }
                continue;
            }
            if self.left == 0 {
                return Ok(());
            }
            let mut events = [
                PollFd::new(self.maps.as_fd(), PollFlags::POLLIN),
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut events, PollTimeout::NONE) {
                Err(Errno::EINTR) | Ok(_) => {}
                Err(error) => return Err(Error::failed(format!("cannot wait for packets: {error}"))),
            }
            if events[1].any().unwrap_or(true) {
                return Ok(());
            }
        }
    }

    fn tell(&mut self, packet: &CapturedPacket, chunk: &mut Vec<u8>) -> Result<(), Error> {
        let time = self.clock + Duration::from_nanos(packet.time_nanos);
        let lost = self.maps.counts()?.lost.saturating_sub(self.lost_before);
        let newly_lost = lost - std::mem::replace(&mut self.lost, lost);
        let traced = TracedPacket::of(packet, time, newly_lost, &self.names);
        match self.form {
            Form::Pcapng => self.writer.write(packet, time, &traced, chunk),
            Form::Lines => {
                let line = serde_json::to_vec(&traced)
                    .map_err(|error| Error::failed(format!("cannot write a packet as JSON: {error}")))?;
                chunk.extend_from_slice(&line);
                chunk.push(b'\n');
                Ok(())
            }
        }
    }
}

/// Does a frame of this length begin with IP, as those of some tunnels do?
fn is_bare(frame: &[u8], len: u32) -> bool {
    let word = |at: usize| {
        Some(u32::from(u16::from_be_bytes([
            *frame.get(at)?,
            *frame.get(at + 1)?,
        ])))
    };
    match frame.first().map(|first| first >> 4) {
        Some(4) => word(2) == Some(len),
        Some(6) => word(4).map(|payload| payload + 40) == Some(len),
        _ => false,
    }
}

/// The bytes of a frame that were captured.
fn captured(words: &[u64], len: u32) -> &[u8] {
    let bytes = bytemuck::cast_slice(words);
    bytes.get(..len as usize).unwrap_or(bytes)
}

/// Names of the reasons of packets that go no further.
pub fn reasons_of_drops() -> Vec<String> {
    use forwarder_common::abi::reason::VerdictKind;
    let is_drop = |verdict| matches!(verdict, VerdictKind::Drop | VerdictKind::Refuse);
    DESCRIPTIONS
        .iter()
        .filter(|description| is_drop(description.verdict))
        .map(|description| description.name.to_owned())
        .collect()
}

/// A reason's name, of a newer program its number.
fn reason_name(number: u32) -> String {
    Reason(number)
        .description()
        .map_or_else(|| number.to_string(), |description| description.name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_becomes_a_filter() {
        let request = CaptureRequest {
            network: Some("192.0.2.0/24".parse().unwrap()),
            port: Some(80),
            protocol: Some("tcp".to_owned()),
            reasons: vec!["no_route".to_owned(), "not_ip".to_owned()],
            ..CaptureRequest::default()
        };
        let filter = request.filter().unwrap();
        assert_eq!(filter.mask.octets()[11..], [255, 255, 255, 255, 0]);
        assert_eq!(filter.network.octets()[10..], [255, 255, 192, 0, 2, 0]);
        assert_eq!(filter.reasons, 1 << Reason::NO_ROUTE.0 | 1 << Reason::NOT_IP.0);
        assert_eq!((filter.port.get(), filter.protocol, filter.one_in), (80, 6, 1));
        assert_eq!(filter.snap_bytes, 2048);

        let all = CaptureRequest::default().filter().unwrap();
        assert_eq!((all.reasons, all.mask), (u64::MAX, IpAddress::UNSPECIFIED));
        let whole = CaptureRequest {
            network: Some("::/0".parse().unwrap()),
            ..CaptureRequest::default()
        };
        assert_eq!(whole.filter().unwrap().mask, IpAddress::UNSPECIFIED);
    }

    #[test]
    fn what_is_not_possible_is_said_with_what_is() {
        let with = |change: fn(&mut CaptureRequest)| {
            let mut request = CaptureRequest::default();
            change(&mut request);
            request.filter().unwrap_err().to_string()
        };
        for (said, wanted) in [
            (with(|one| one.reasons = vec!["nonsense".to_owned()]), "nonsense"),
            (with(|one| one.protocol = Some("gre".to_owned())), "gre"),
            (with(|one| one.one_in = Some(0)), "none"),
            (with(|one| one.snap_bytes = Some(4096)), "4096"),
        ] {
            assert!(said.contains(wanted), "{said}");
        }
    }

    #[test]
    fn frames_without_a_link_header_are_told_apart() {
        let v4 = [
            0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
        ];
        assert!(is_bare(&v4, 20));
        assert!(!is_bare(&v4, 60), "its length is another");
        assert!(!is_bare(&[2, 0, 0, 0, 0, 1], 6));
        assert!(!is_bare(&[], 0));
    }
}
