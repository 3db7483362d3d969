//! The TCP probe: a handshake from the probe address, then a polite goodbye.
//!
//! **Source.** The socket binds to the probe address, so that the probe takes the routes, the tunnel and the
//! back-to-origin route that traffic takes. It binds with `IP_BIND_ADDRESS_NO_PORT`: the port is then chosen
//! at connect time and must be unique per *destination* only. Without it every probe of the last minute
//! holds a port of the probe address alone, and about 470 probes a second exhaust them all.
//!
//! **Close.** The probe ends with FIN, not RST. `SO_LINGER` 0 would spare this gateway the TIME_WAIT entry,
//! but servers and firewalls take an RST for a fault: nginx logs "connection reset by peer", databases
//! count an aborted client, intrusion detection counts a scan. A FIN costs one TIME_WAIT entry (some
//! 250 bytes) for 60 s: 300 000 of them for 10 000 backends every 2 s, and the kernel drops the surplus
//! above `net.ipv4.tcp_max_tw_buckets` harmlessly. To keep servers that speak first (SSH, SMTP, MySQL)
//! from getting an RST for their greeting, the probe half-closes and reads until the server closes too, for
//! at most half a second.
//!
//! A handshake is answered by the server's kernel: a process that hangs but still listens passes. That is
//! what the HTTP probe is for.

use std::{net::SocketAddr, time::Duration};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout, timeout_at},
};

use super::{
    failure::{ProbeFailure, Stage},
    origin::Origin,
};

/// How long a connection that gave its verdict waits for the server to close: more than most round trips.
pub(super) const FAREWELL: Duration = Duration::from_millis(500);

/// What a probe reads of a greeting or a body before it stops being polite, in bytes.
pub(super) const MAX_READ_BYTES: usize = 64 * 1024;

/// Makes one TCP handshake with `target` from `origin`.
///
/// Returns the time until the handshake was complete. `timeout` covers everything up to the verdict.
///
/// # Cancellation
/// Dropping the future closes the socket. After the verdict a task of its own ends the connection, within half
/// a second.
pub async fn probe(target: SocketAddr, origin: &Origin, timeout: Duration) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    let stream = connect(target, origin, start, timeout).await?;
    let elapsed = start.elapsed();
    // Beside the verdict, which a server that never closes must not delay; ends by itself.
    tokio::spawn(say_goodbye(stream));
    Ok(elapsed)
}

/// A connection to `target` from `origin`, made before `start + limit`.
pub(super) async fn connect(
    target: SocketAddr,
    origin: &Origin,
    start: Instant,
    limit: Duration,
) -> Result<TcpStream, ProbeFailure> {
    let fail = |error: &std::io::Error| ProbeFailure::from_io(error, Stage::Connect, start.elapsed());
    let socket = match target {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|error| fail(&error))?;
    setsockopt(&socket, IpBindAddressNoPort, &true).map_err(ProbeFailure::NotSent)?;
    origin.bind(&socket)?;
    match timeout_at(start + limit, socket.connect(target)).await {
        Err(_elapsed) => Err(ProbeFailure::TimedOut {
            stage: Stage::Connect,
            after: limit,
        }),
        Ok(Err(error)) => Err(fail(&error)),
        Ok(Ok(stream)) => Ok(stream),
    }
}

/// Sends FIN and reads until the server closes, too much came or [`FAREWELL`] has passed.
async fn say_goodbye(mut stream: TcpStream) {
    let farewell = async {
        stream.shutdown().await?;
        let mut unread = [0; 4096];
        let mut total = 0;
        while total < MAX_READ_BYTES {
            match stream.read(&mut unread).await? {
                0 => break,
                read => total += read,
            }
        }
        std::io::Result::Ok(())
    };
    // The verdict stands: whatever the server makes of our leaving is its own affair.
    let _ = timeout(FAREWELL, farewell).await;
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::health::testing::{Server, loopback, refusing};

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn passes_when_the_server_accepts_and_ends_without_a_reset() {
        let server = Server::read_to_end().await;
        let elapsed = probe(server.address, &loopback(), LIMIT).await.unwrap();
        assert!(elapsed < LIMIT);
        // EOF, no data, no ECONNRESET.
        assert_eq!(server.ended().await.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_server_that_speaks_first_sees_no_reset() {
        let server = Server::greet(b"220 ready\r\n").await;
        probe(server.address, &loopback(), LIMIT).await.unwrap();
        assert_eq!(server.ended().await.unwrap(), b"");
    }

    #[tokio::test]
    async fn the_probe_leaves_from_the_probe_address() {
        let server = Server::read_to_end().await;
        let source = IpAddr::from([127, 0, 0, 42]);
        probe(server.address, &Origin::Address(source), LIMIT)
            .await
            .unwrap();
        assert_eq!(server.peer().await.ip(), source);
    }

    #[tokio::test]
    async fn a_probe_may_be_tied_to_a_device() {
        let server = Server::read_to_end().await;
        let device = |name: &str| Origin::Device(name.into());
        probe(server.address, &device("lo"), LIMIT).await.unwrap();
        server.ended().await.unwrap();
        let failure = probe(refusing(), &device("no-such-device"), LIMIT)
            .await
            .unwrap_err();
        assert_eq!(failure, ProbeFailure::Other(nix::errno::Errno::ENODEV));
        // Of a tunnel that is no finding about this gateway, but about the tunnel.
        assert!(!failure.is_local());
    }

    #[tokio::test]
    async fn refused() {
        assert_eq!(
            probe(refusing(), &loopback(), LIMIT).await,
            Err(ProbeFailure::Refused)
        );
    }

    #[tokio::test]
    async fn a_full_backlog_times_out() {
        let server = Server::never_accepting().await;
        let limit = Duration::from_millis(50);
        assert_eq!(
            probe(server.address, &loopback(), limit).await,
            Err(ProbeFailure::TimedOut {
                stage: Stage::Connect,
                after: limit
            })
        );
    }

    #[tokio::test]
    async fn a_source_that_is_not_ours_is_a_local_fault() {
        // RFC 5737 TEST-NET-1: no host has it.
        let source = IpAddr::from([192, 0, 2, 1]);
        let failure = probe(refusing(), &Origin::Address(source), LIMIT)
            .await
            .unwrap_err();
        assert_eq!(failure, ProbeFailure::SourceNotLocal(source));
        assert!(failure.is_local());
    }
}
