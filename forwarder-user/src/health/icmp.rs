//! The ICMP probe: one echo request from the probe address, answered by the server's kernel.
//!
//! surge-ping speaks ICMP. One raw socket serves all probes of an origin, as each raw socket of a host gets a copy
//! of every ICMP packet that comes in; an answer finds its probe by address, identifier and sequence number. Raw,
//! as only such a socket also hears what routers say instead. Needs CAP_NET_RAW.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::errno::Errno;
use surge_ping::{Client, Config, ICMP, IcmpPacket, PingIdentifier, PingSequence, SurgeError};
use tokio::{sync::Mutex, time::Instant};

use super::{
    failure::{ProbeFailure, Stage},
    origin::Origin,
};

/// What an echo request carries beside its headers, in bytes.
const PAYLOAD_BYTES: usize = 12;
/// Type "destination unreachable" (RFC 792).
const UNREACHABLE: u8 = 3;
/// Type "echo reply" (RFC 792).
const ECHO_REPLY: u8 = 0;
/// Type "time exceeded" (RFC 792).
const TIME_EXCEEDED: u8 = 11;

/// Sockets for echo requests, made when first needed.
#[derive(Default)]
pub(super) struct Echoes {
    /// By origin and whether they speak IPv4's ICMP, as an origin that is a device has both.
    clients: Mutex<HashMap<(Origin, bool), Client>>,
    /// Number of the next request.
    next: AtomicU32,
}

impl Echoes {
    async fn client(&self, origin: &Origin, is_v4: bool) -> Result<Client, ProbeFailure> {
        let mut clients = self.clients.lock().await;
        let key = (origin.clone(), is_v4);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let kind = if is_v4 { ICMP::V4 } else { ICMP::V6 };
        let config = Config::builder().kind(kind).sock_type_hint(socket2::Type::RAW);
        let config = match origin {
            Origin::Address(address) => config.bind(SocketAddr::new(*address, 0)),
            Origin::Device(device) => config.interface(device),
        };
        let client = Client::new(&config.build()).map_err(|error| match error.raw_os_error() {
            // Not allowed to have such a socket, which is nothing about the path.
            Some(errno) if errno == Errno::EPERM as i32 => ProbeFailure::NotSent(Errno::EPERM),
            _ => origin.failure(&error),
        })?;
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// Closes the socket of an origin, so that the next probe opens another: a device may have gone and come back
    /// as another one of the same name, to which the socket is not bound.
    async fn forget(&self, origin: &Origin, is_v4: bool) {
        if let Origin::Device(_) = origin {
            self.clients.lock().await.remove(&(origin.clone(), is_v4));
        }
    }

    /// An identifier and sequence number that no other request under way has. Other programs start elsewhere.
    fn number(&self) -> (PingIdentifier, PingSequence) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let first = std::process::id() as u16 | 0x8000;
        (
            PingIdentifier(first.wrapping_add((number >> 16) as u16)),
            PingSequence(number as u16),
        )
    }
}

/// Sends an echo request to `target` from `origin`; returns the time until the reply.
///
/// # Cancellation
/// Nothing is left behind by dropping the future.
pub(super) async fn probe(
    target: IpAddr,
    origin: &Origin,
    limit: Duration,
    echoes: &Echoes,
) -> Result<Duration, ProbeFailure> {
    let client = echoes.client(origin, target.is_ipv4()).await?;
    let (identifier, sequence) = echoes.number();
    let start = Instant::now();
    let mut pinger = client.pinger(target, identifier).await;
    pinger.timeout(limit);
    let outcome = match pinger.ping(sequence, &[0; PAYLOAD_BYTES]).await {
        Ok((IcmpPacket::V4(packet), _)) => meaning(packet.get_icmp_type().0, packet.get_icmp_code().0, limit),
        Ok((IcmpPacket::V6(packet), _)) => {
            meaning_v6(packet.get_icmpv6_type().0, packet.get_icmpv6_code().0, limit)
        }
        Err(SurgeError::IOError(error)) => Err(unsent(&error, start.elapsed())),
        Err(_) => Err(ProbeFailure::NoAnswer { after: limit }),
    };
    if outcome.is_err() {
        echoes.forget(origin, target.is_ipv4()).await;
    }
    outcome.map(|()| start.elapsed())
}

/// What an ICMP message says of the target.
fn meaning(kind: u8, code: u8, limit: Duration) -> Result<(), ProbeFailure> {
    let unreachable = |errno| Err(ProbeFailure::Unreachable(errno));
    match (kind, code) {
        (ECHO_REPLY, _) => Ok(()),
        (UNREACHABLE, 0 | 5 | 6 | 11) => unreachable(Errno::ENETUNREACH),
        (UNREACHABLE, 1 | 7 | 8 | 12) => unreachable(Errno::EHOSTUNREACH),
        // A rule says no, some in the words of another protocol.
        (UNREACHABLE, 2 | 3 | 9 | 10 | 13) => unreachable(Errno::EPERM),
        // The TTL ran out: a routing loop.
        (TIME_EXCEEDED, _) => unreachable(Errno::ELOOP),
        _ => Err(ProbeFailure::NoAnswer { after: limit }),
    }
}

/// The same of ICMPv6 (RFC 4443 §3.1, §3.3, §4.2).
fn meaning_v6(kind: u8, code: u8, limit: Duration) -> Result<(), ProbeFailure> {
    let unreachable = |errno| Err(ProbeFailure::Unreachable(errno));
    match (kind, code) {
        (129, _) => Ok(()),
        (1, 0 | 2) => unreachable(Errno::ENETUNREACH),
        (1, 3) => unreachable(Errno::EHOSTUNREACH),
        // A rule says no, some in the words of another protocol.
        (1, 1 | 4..=6) => unreachable(Errno::EPERM),
        (3, 0) => unreachable(Errno::ELOOP),
        _ => Err(ProbeFailure::NoAnswer { after: limit }),
    }
}

fn unsent(error: &io::Error, after: Duration) -> ProbeFailure {
    ProbeFailure::from_io(error, Stage::Connect, after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::testing::loopback;

    const LIMIT: Duration = Duration::from_secs(5);

    /// Raw sockets need rights that a test may lack.
    fn can_run() -> bool {
        let raw = socket2::Socket::new(
            socket2::Domain::IPV4,
            socket2::Type::RAW,
            Some(socket2::Protocol::ICMPV4),
        );
        if raw.is_err() {
            println!("SKIP: needs CAP_NET_RAW");
        }
        raw.is_ok()
    }

    #[tokio::test]
    async fn many_at_once_each_get_their_own_answer() {
        if !can_run() {
            return;
        }
        let echoes = std::sync::Arc::new(Echoes::default());
        let mut probes = tokio::task::JoinSet::new();
        for last in 1..=200 {
            let echoes = echoes.clone();
            probes.spawn(
                async move { probe(IpAddr::from([127, 0, 0, last]), &loopback(), LIMIT, &echoes).await },
            );
        }
        while let Some(outcome) = probes.join_next().await {
            outcome.unwrap().unwrap();
        }
        assert_eq!(echoes.clients.lock().await.len(), 1);
    }

    #[tokio::test]
    async fn a_device_that_does_not_exist_fails_and_a_source_that_is_not_ours_is_a_local_fault() {
        if !can_run() {
            return;
        }
        let echoes = Echoes::default();
        let target = IpAddr::from([127, 0, 0, 1]);
        let device = Origin::Device("no-such-device".into());
        let failure = probe(target, &device, LIMIT, &echoes).await.unwrap_err();
        assert_eq!(failure, ProbeFailure::Other(Errno::ENODEV));
        probe(target, &Origin::Device("lo".into()), LIMIT, &echoes)
            .await
            .unwrap();
        // RFC 5737 TEST-NET-1: no host has it.
        let source = IpAddr::from([192, 0, 2, 1]);
        let failure = probe(target, &Origin::Address(source), LIMIT, &echoes)
            .await
            .unwrap_err();
        assert_eq!(failure, ProbeFailure::SourceNotLocal(source));
    }

    #[test]
    fn what_routers_say_is_told_apart() {
        let name = |kind, code| meaning(kind, code, LIMIT).map_err(|failure| failure.to_string());
        assert_eq!(name(ECHO_REPLY, 0), Ok(()));
        assert_eq!(name(UNREACHABLE, 0), Err("network unreachable".to_owned()));
        assert_eq!(name(UNREACHABLE, 1), Err("host unreachable".to_owned()));
        assert!(name(UNREACHABLE, 13).is_err() && name(TIME_EXCEEDED, 0).is_err());
        assert_eq!(meaning_v6(129, 0, LIMIT), Ok(()));
        assert_eq!(
            meaning_v6(1, 3, LIMIT),
            Err(ProbeFailure::Unreachable(Errno::EHOSTUNREACH))
        );
        // Neighbour solicitations come in by such a socket, too.
        assert_eq!(
            meaning_v6(135, 0, LIMIT),
            Err(ProbeFailure::NoAnswer { after: LIMIT })
        );
        assert_eq!(meaning(5, 0, LIMIT), Err(ProbeFailure::NoAnswer { after: LIMIT }));
    }

    #[test]
    fn numbers_do_not_repeat_soon() {
        let echoes = Echoes::default();
        let first = echoes.number();
        assert_ne!(first.1.0, echoes.number().1.0);
        echoes.next.store(1 << 16, Ordering::Relaxed);
        let later = echoes.number();
        assert_eq!(first.1.0, later.1.0);
        assert_ne!(first.0.0, later.0.0);
    }
}
