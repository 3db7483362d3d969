//! The HTTP probe: one HTTP/1.1 GET from the probe address; the status decides.
//!
//! hyper speaks HTTP over the socket of the TCP probe. Only the head of the answer counts, as with every
//! other balancer; the body is read, up to a bound and without a verdict, so that the server does not log a
//! client that left early. `Connection: close` makes the server end the connection. Redirects are not
//! followed: a 302 says that the server works, and its target may be another server.
//!
//! No TLS and no HTTP/2: the configuration has neither.

use std::{
    convert::Infallible,
    error::Error as _,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    failure::{ProbeFailure, Stage},
    tcp::{self, FAREWELL, MAX_READ_BYTES},
};
use crate::config::StatusRange;

/// How the probe names itself in the servers' logs.
const USER_AGENT: &str = "forwarder-health";

/// Bound of the answer's head, in bytes: four times what common servers allow for a request's head.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Sends `GET path` to `target` from `source` and compares the status with `expect`.
///
/// `host` is the Host header, by default `target` itself. Returns the time until the head of the answer was
/// complete. `timeout` covers everything up to the verdict: handshake, request, head of the answer. A path or
/// host that cannot stand in a request is [`ProbeFailure::NotSent`].
///
/// # Cancellation
/// Dropping the future closes the socket. After the verdict a task of its own reads the body, for half a second
/// at most.
pub async fn probe(
    target: SocketAddrV4,
    source: Ipv4Addr,
    limit: Duration,
    path: &str,
    host: Option<&str>,
    expect: &[StatusRange],
) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    let request = request(target, path, host)?;
    let stream = tcp::connect(target, source, start, limit).await?;
    let fail = |error: &hyper::Error| classify(error, start.elapsed());

    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| fail(&error))?;
    // The connection moves the bytes while others wait for them. Its own end, good or bad, reaches them as the
    // end of the answer or of the body.
    let mut transport = Box::pin(async {
        let _ = connection.await;
        std::future::pending::<Infallible>().await
    });

    let answered = tokio::select! {
        answered = timeout_at(start + limit, sender.send_request(request)) => answered,
        never = &mut transport => match never {},
    };
    let response = answered
        .map_err(|_elapsed| ProbeFailure::TimedOut {
            stage: Stage::Answer,
            after: limit,
        })?
        .map_err(|error| fail(&error))?;
    let elapsed = start.elapsed();
    let status = response.status().as_u16();
    tokio::spawn(async move {
        let body = timeout(FAREWELL, read_bounded(response.into_body()));
        // No verdict hangs on the body.
        tokio::select! {
            _ = body => (),
            never = transport => match never {},
        }
    });
    if expect
        .iter()
        .any(|range| (range.first..=range.last).contains(&status))
    {
        Ok(elapsed)
    } else {
        Err(ProbeFailure::UnexpectedStatus {
            status,
            expected: ranges(expect),
        })
    }
}

fn request(
    target: SocketAddrV4,
    path: &str,
    host: Option<&str>,
) -> Result<Request<Empty<Bytes>>, ProbeFailure> {
    let host = host.map_or_else(|| target.to_string(), str::to_owned);
    Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        // The configuration is validated, so this is a fault of ours, never of the backend.
        .map_err(|_invalid| ProbeFailure::NotSent(Errno::EINVAL))
}

/// Reads the body to its end or to [`MAX_READ_BYTES`].
async fn read_bounded(mut body: Incoming) {
    let mut total = 0;
    while total < MAX_READ_BYTES {
        match body.frame().await {
            Some(Ok(frame)) => total += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => break,
        }
    }
}

fn classify(error: &hyper::Error, elapsed: Duration) -> ProbeFailure {
    if error.is_parse() {
        return ProbeFailure::MalformedAnswer(error.to_string());
    }
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return ProbeFailure::from_io(io, Stage::Answer, elapsed);
        }
        source = cause.source();
    }
    ProbeFailure::Closed
}

/// Status ranges as the configuration writes them: `200-299, 404`.
fn ranges(expect: &[StatusRange]) -> String {
    let texts: Vec<String> = expect
        .iter()
        .map(|range| match range {
            StatusRange { first, last } if first == last => first.to_string(),
            StatusRange { first, last } => format!("{first}-{last}"),
        })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::testing::{LOOPBACK, Server, refusing};

    const LIMIT: Duration = Duration::from_secs(5);
    const EXPECT: &[StatusRange] = &[StatusRange {
        first: 200,
        last: 399,
    }];

    async fn ask(server: &Server) -> Result<Duration, ProbeFailure> {
        probe(server.address, LOOPBACK, LIMIT, "/", None, EXPECT).await
    }

    #[tokio::test]
    async fn an_expected_status_passes_and_the_request_is_as_documented() {
        let server =
            Server::answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        ask(&server).await.unwrap();
        let address = server.address;
        let request = String::from_utf8(server.ended().await.unwrap()).unwrap();
        assert!(request.starts_with("GET / HTTP/1.1\r\n"), "{request}");
        for line in [
            format!("host: {address}"),
            "user-agent: forwarder-health".into(),
            "connection: close".into(),
        ] {
            assert!(
                request.lines().any(|sent| sent == line),
                "no {line:?} in {request}"
            );
        }
    }

    #[tokio::test]
    async fn path_and_host_are_those_of_the_check() {
        let server = Server::answer(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        probe(
            server.address,
            LOOPBACK,
            LIMIT,
            "/up?deep=1",
            Some("example.org"),
            EXPECT,
        )
        .await
        .unwrap();
        let request = String::from_utf8(server.ended().await.unwrap()).unwrap();
        assert!(request.starts_with("GET /up?deep=1 HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nhost: example.org\r\n"), "{request}");
    }

    #[tokio::test]
    async fn status_500_fails_and_says_what_was_expected() {
        let server = Server::answer(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n").await;
        let failure = ask(&server).await.unwrap_err();
        assert_eq!(
            failure,
            ProbeFailure::UnexpectedStatus {
                status: 500,
                expected: "200-399".into()
            }
        );
    }

    #[tokio::test]
    async fn a_body_without_end_does_not_change_the_verdict() {
        let server = Server::answer_and_stay(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nstart").await;
        ask(&server).await.unwrap();
    }

    #[tokio::test]
    async fn garbage_is_malformed() {
        let server = Server::answer(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
        let failure = ask(&server).await.unwrap_err();
        assert!(matches!(failure, ProbeFailure::MalformedAnswer(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn a_head_without_bound_is_malformed() {
        let mut answer = b"HTTP/1.1 200 OK\r\nX: ".to_vec();
        answer.resize(MAX_HEAD_BYTES * 2, b'x');
        let server = Server::answer(&answer).await;
        let failure = ask(&server).await.unwrap_err();
        assert!(matches!(failure, ProbeFailure::MalformedAnswer(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn a_close_without_an_answer_is_named() {
        let server = Server::answer(b"").await;
        assert_eq!(ask(&server).await, Err(ProbeFailure::Closed));
    }

    #[tokio::test]
    async fn half_a_head_is_a_close_too() {
        let server = Server::answer(b"HTTP/1.1 200 OK\r\nContent-").await;
        assert_eq!(ask(&server).await, Err(ProbeFailure::Closed));
    }

    #[tokio::test]
    async fn a_reset_is_named() {
        let server = Server::reset().await;
        assert_eq!(ask(&server).await, Err(ProbeFailure::Reset));
    }

    #[tokio::test]
    async fn silence_after_the_handshake_is_a_late_answer() {
        let server = Server::answer_and_stay(b"").await;
        let limit = Duration::from_millis(50);
        let outcome = probe(server.address, LOOPBACK, limit, "/", None, EXPECT).await;
        assert_eq!(
            outcome,
            Err(ProbeFailure::TimedOut {
                stage: Stage::Answer,
                after: limit
            })
        );
    }

    #[tokio::test]
    async fn refused() {
        let outcome = probe(refusing(), LOOPBACK, LIMIT, "/", None, EXPECT).await;
        assert_eq!(outcome, Err(ProbeFailure::Refused));
    }
}
