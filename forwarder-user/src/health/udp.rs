//! The UDP probe: one datagram from the probe address, and what comes back.
//!
//! UDP has no handshake, so silence has to be judged. If the check says what the answer contains, silence is a
//! failure, and so is another answer. If it does not, any answer will do, and so will none: many servers say nothing
//! to what they do not understand. What remains a failure then is what the network says itself: "port unreachable" by
//! the server, whose process is gone, or "host unreachable" by a router. This is how the cloud products judge,
//! too. A server that is switched off behind a router that says nothing passes such a check, so it is the weaker one.
//!
//! The socket is connected: only then does the kernel report ICMP errors, and only the target's answers.

use std::{io, net::SocketAddr, time::Duration};

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use super::{
    failure::{ProbeFailure, Stage},
    origin::Origin,
};
use crate::config::health::contains;

/// Longest datagram there is, in bytes.
const MAX_DATAGRAM_BYTES: usize = 65_535;
/// How much of a wrong answer is shown, in bytes.
const SHOWN_BYTES: usize = 64;

/// Sends `payload` to `target` from `origin` and waits for a datagram that contains `answer`.
///
/// Returns the time until the answer; where none is needed and none comes, that is `limit`.
///
/// # Cancellation
/// Dropping the future closes the socket.
pub(super) async fn probe(
    target: SocketAddr,
    origin: &Origin,
    limit: Duration,
    payload: &[u8],
    answer: Option<&[u8]>,
) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    let fail = |error: &io::Error| failure(error, start.elapsed());
    let socket = connected(target, origin).map_err(|failure| match failure {
        Ok(failure) => failure,
        Err(error) => fail(&error),
    })?;
    socket.send(payload).await.map_err(|error| fail(&error))?;
    let mut read = vec![0; if answer.is_some() { MAX_DATAGRAM_BYTES } else { 1 }];
    match (timeout_at(start + limit, socket.recv(&mut read)).await, answer) {
        (Ok(Err(error)), _) => Err(fail(&error)),
        (Ok(Ok(_)), None) => Ok(start.elapsed()),
        (Ok(Ok(length)), Some(expected)) if contains(&read[..length], expected) => Ok(start.elapsed()),
        (Ok(Ok(length)), Some(expected)) => Err(ProbeFailure::UnexpectedAnswer {
            expected: shown(expected),
            answer: shown(&read[..length]),
        }),
        (Err(_elapsed), None) => Ok(limit),
        (Err(_elapsed), Some(_)) => Err(ProbeFailure::NoAnswer { after: limit }),
    }
}

/// A socket that talks to `target` only. The outer error is one of the kernel's.
fn connected(target: SocketAddr, origin: &Origin) -> Result<UdpSocket, Result<ProbeFailure, io::Error>> {
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM.nonblocking(), None).map_err(Err)?;
    origin.bind(&socket).map_err(Ok)?;
    socket.connect(&target.into()).map_err(Err)?;
    UdpSocket::from_std(socket.into()).map_err(Err)
}

fn failure(error: &io::Error, after: Duration) -> ProbeFailure {
    if error.raw_os_error() == Some(Errno::ECONNREFUSED as i32) {
        return ProbeFailure::PortUnreachable;
    }
    ProbeFailure::from_io(error, Stage::Answer, after)
}

/// Bytes as text in quotes, escaped, and cut where they are many.
fn shown(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let dots = if cut.len() < bytes.len() { "..." } else { "" };
    format!("\"{}\"{dots}", cut.escape_ascii())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::task::JoinHandle;

    use super::*;
    use crate::health::testing::{LOOPBACK, loopback, refusing};

    const LIMIT: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(100);

    /// A server that answers one datagram with `answer`, or never; yields what came and from where.
    async fn server(answer: Option<&'static [u8]>) -> (SocketAddr, JoinHandle<(Vec<u8>, SocketAddr)>) {
        let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut read = vec![0; 2048];
            let (length, from) = socket.recv_from(&mut read).await.unwrap();
            read.truncate(length);
            match answer {
                Some(answer) => drop(socket.send_to(answer, from).await.unwrap()),
                // Open until the test is over, or the kernel would answer.
                None => std::future::pending().await,
            }
            (read, from)
        });
        (address, task)
    }

    #[tokio::test]
    async fn the_expected_answer_passes_and_the_payload_is_that_of_the_check() {
        let (address, task) = server(Some(b"PONG 1\r\n")).await;
        let source = IpAddr::from([127, 0, 0, 42]);
        let elapsed = probe(
            address,
            &Origin::Address(source),
            LIMIT,
            b"PING\x00\r\n",
            Some(b"PONG"),
        )
        .await
        .unwrap();
        assert!(elapsed < LIMIT);
        let (read, from) = task.await.unwrap();
        assert_eq!(
            (read.as_slice(), from.ip()),
            (&b"PING\x00\r\n"[..], source)
        );
    }

    #[tokio::test]
    async fn another_answer_fails_and_is_shown() {
        let (address, _task) = server(Some(b"ERR\n")).await;
        let failure = probe(address, &loopback(), LIMIT, b"PING", Some(b"PONG"))
            .await
            .unwrap_err();
        assert_eq!(
            failure.to_string(),
            r#"the answer does not contain "PONG"; it is "ERR\n""#
        );
    }

    #[tokio::test]
    async fn silence_fails_where_an_answer_is_expected_and_only_there() {
        let (address, _task) = server(None).await;
        assert_eq!(
            probe(address, &loopback(), SHORT, b"PING", Some(b"PONG")).await,
            Err(ProbeFailure::NoAnswer { after: SHORT })
        );
        assert_eq!(probe(address, &loopback(), SHORT, b"", None).await, Ok(SHORT));
    }

    #[tokio::test]
    async fn any_answer_ends_the_wait() {
        let (address, _task) = server(Some(b"what?")).await;
        let elapsed = probe(address, &loopback(), LIMIT, b"", None).await.unwrap();
        assert!(elapsed < LIMIT);
    }

    #[tokio::test]
    async fn an_unreachable_port_fails_whatever_is_expected() {
        // A TCP socket holds the number of the port, which no UDP socket listens on.
        for answer in [None, Some(&b"PONG"[..])] {
            let outcome = probe(refusing(), &loopback(), LIMIT, b"PING", answer).await;
            assert_eq!(outcome, Err(ProbeFailure::PortUnreachable));
        }
    }

    #[tokio::test]
    async fn a_source_that_is_not_ours_is_a_local_fault() {
        // RFC 5737 TEST-NET-1: no host has it.
        let source = IpAddr::from([192, 0, 2, 1]);
        let outcome = probe(refusing(), &Origin::Address(source), LIMIT, b"", None).await;
        assert_eq!(outcome, Err(ProbeFailure::SourceNotLocal(source)));
    }

    #[test]
    fn long_answers_are_cut() {
        assert_eq!(shown(&[b'a'; 65]), format!("\"{}\"...", "a".repeat(64)));
        assert_eq!(shown(b"\"\xff"), r#""\"\xff""#);
    }
}
