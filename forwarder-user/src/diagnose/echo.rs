//! Echo requests (ping) from a chosen address: who answers whom?
//!
//! surge-ping speaks ICMP; here is what its answers mean. The socket is raw, as only raw sockets also hear the
//! errors that routers send (no route, prohibited), which often name the fault outright. Needs CAP_NET_RAW.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use nix::errno::Errno;
use surge_ping::{
    Client, Config, ICMP, IcmpPacket, Icmpv4Packet, Icmpv6Packet, PingIdentifier, PingSequence, SurgeError,
};
use tokio::time::sleep;

/// How long an answer may take. More than a round trip around the Earth.
pub(super) const PATIENCE: Duration = Duration::from_millis(900);
/// How long a router may take to say that it finds no host. Linux asks three times for it, a second apart
/// (`mcast_solicit` and `retrans_time_ms`, `Documentation/networking/ip-sysctl.rst`; arp(7)), and so do others.
pub(super) const SEARCH_PATIENCE: Duration = Duration::from_millis(3300);

/// Size of an echo request that no path is too narrow for, in bytes with its IP header.
const SMALL_BYTES: usize = 60;
/// ICMP header of an echo request, in bytes.
const ICMP_BYTES: usize = 8;

/// When a second request follows, in case the first was lost.
const SECOND_AFTER: Duration = Duration::from_millis(300);

/// Type "destination unreachable" (RFC 792).
const ICMP_UNREACHABLE: u8 = 3;
/// Type "time exceeded" (RFC 792).
const ICMP_TIME_EXCEEDED: u8 = 11;

/// What came of an echo request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Answered,
    /// Nothing came back in time.
    Silent,
    /// A router or host sent an ICMP error instead.
    Rejected {
        by: IpAddr,
        why: Rejection,
    },
    /// It could not be sent.
    NotSent(Errno),
    /// There was nothing to ask, or no address to ask from.
    NotTried,
}

/// What an ICMP error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// No route there (codes 0, 5, 6, 11).
    NetworkUnreachable,
    /// On the link, but does not answer ARP (codes 1, 7, 8, 12).
    HostUnreachable,
    /// A rule forbids it (codes 9, 10, 13). REJECT rules also say "port" or "protocol unreachable" (3, 2), which
    /// no echo request can earn otherwise.
    Prohibited,
    /// The TTL ran out: a routing loop.
    Loop,
}

impl Echo {
    pub(super) fn is_answered(self) -> bool {
        self == Self::Answered
    }
}

/// Sends echo requests from one address.
pub(super) struct Pinger(Result<Client, Errno>);

impl Pinger {
    pub(super) fn new(source: IpAddr) -> Self {
        let config = Config::builder()
            .kind(if source.is_ipv4() { ICMP::V4 } else { ICMP::V6 })
            .sock_type_hint(socket2::Type::RAW)
            .bind(SocketAddr::new(source, 0))
            .build();
        Self(Client::new(&config).map_err(|error| errno_of(&error)))
    }

    /// Asks `target` twice, [`SECOND_AFTER`] apart; the first answer counts. Takes [`PATIENCE`] at most.
    pub(super) async fn ask(&self, target: Option<IpAddr>) -> Echo {
        self.ask_within(PATIENCE, target, SMALL_BYTES).await
    }

    /// As [`Self::ask`], with packets of `packet_bytes`. The kernel sets "don't fragment" in them as long as they
    /// fit what it knows of the path.
    pub(super) async fn ask_sized(&self, target: Option<IpAddr>, packet_bytes: usize) -> Echo {
        self.ask_within(PATIENCE, target, packet_bytes).await
    }

    /// As [`Self::ask`], and waits for up to [`SEARCH_PATIENCE`] for what a router has to say that looks for `target`.
    pub(super) async fn search(&self, target: Option<IpAddr>) -> Echo {
        self.ask_within(SEARCH_PATIENCE, target, SMALL_BYTES).await
    }

    async fn ask_within(&self, patience: Duration, target: Option<IpAddr>, packet_bytes: usize) -> Echo {
        let Some(target) = target else {
            return Echo::NotTried;
        };
        let headers_bytes = ICMP_BYTES + if target.is_ipv4() { 20 } else { 40 };
        let payload = vec![0x5a; packet_bytes.saturating_sub(headers_bytes)];
        let client = match &self.0 {
            Ok(client) => client,
            Err(errno) => return Echo::NotSent(*errno),
        };
        let second = async {
            sleep(SECOND_AFTER).await;
            request(client, target, 1, &payload, patience - SECOND_AFTER).await
        };
        let first = request(client, target, 0, &payload, patience);
        tokio::pin!(first, second);
        tokio::select! {
            echo = &mut first => match echo {
                Echo::Silent => second.await,
                said => said,
            },
            echo = &mut second => match echo {
                Echo::Silent | Echo::NotSent(_) => first.await,
                said => said,
            },
        }
    }
}

async fn request(client: &Client, target: IpAddr, sequence: u16, payload: &[u8], patience: Duration) -> Echo {
    // Diagnoses that run at once must not take each other's answers.
    static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(0);
    let identifier = NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
    let mut pinger = client.pinger(target, PingIdentifier(identifier)).await;
    pinger.timeout(patience);
    match pinger.ping(PingSequence(sequence), payload).await {
        Ok((IcmpPacket::V4(packet), _)) => meaning(&packet),
        Ok((IcmpPacket::V6(packet), _)) => meaning_v6(&packet),
        Err(SurgeError::IOError(error)) => Echo::NotSent(errno_of(&error)),
        Err(_) => Echo::Silent,
    }
}

fn meaning(packet: &Icmpv4Packet) -> Echo {
    let by = IpAddr::V4(packet.get_source());
    let rejected = |why| Echo::Rejected { by, why };
    match (packet.get_icmp_type().0, packet.get_icmp_code().0) {
        (0, _) => Echo::Answered,
        (ICMP_UNREACHABLE, 0 | 5 | 6 | 11) => rejected(Rejection::NetworkUnreachable),
        (ICMP_UNREACHABLE, 1 | 7 | 8 | 12) => rejected(Rejection::HostUnreachable),
        (ICMP_UNREACHABLE, 2 | 3 | 9 | 10 | 13) => rejected(Rejection::Prohibited),
        (ICMP_TIME_EXCEEDED, _) => rejected(Rejection::Loop),
        _ => Echo::Silent,
    }
}

/// By RFC 4443 §3.1 and §3.3.
fn meaning_v6(packet: &Icmpv6Packet) -> Echo {
    let by = IpAddr::V6(packet.get_source());
    let rejected = |why| Echo::Rejected { by, why };
    match (packet.get_icmpv6_type().0, packet.get_icmpv6_code().0) {
        (129, _) => Echo::Answered,
        (1, 0 | 2) => rejected(Rejection::NetworkUnreachable),
        (1, 3) => rejected(Rejection::HostUnreachable),
        (1, 1 | 4..=6) => rejected(Rejection::Prohibited),
        (3, 0) => rejected(Rejection::Loop),
        _ => Echo::Silent,
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
