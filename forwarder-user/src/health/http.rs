//! The HTTP probe: one HTTP/1.1 request from the probe address; the status decides, and the body if the check
//! says so.
//!
//! hyper speaks HTTP over the socket of the TCP probe, or over the TLS session of `https`. Without a text to look
//! for only the head of the answer counts, as with every other balancer; the body is read, up to a bound and without
//! a verdict, so that the server does not log a client that left early. `Connection: close` makes the server end
//! the connection. Redirects are not followed: a 302 says that the server works, and its target may be another
//! server.
//!
//! No HTTP/2: servers that speak it speak HTTP/1.1 as well, unless they speak gRPC, which has a probe of its own.

use std::{convert::Infallible, error::Error as _, net::SocketAddr, time::Duration};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout, timeout_at},
};

use super::{
    failure::{ProbeFailure, Stage},
    origin::Origin,
    tcp::{self, FAREWELL, MAX_READ_BYTES},
};
use crate::config::{HttpProbe, Method, StatusRange};

/// How the probe names itself in the servers' logs.
pub(super) const USER_AGENT: &str = "forwarder-health";

/// Bound of the answer's head, in bytes: four times what common servers allow for a request's head.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Sends the request of `check` to `target` from `origin` and looks at the answer.
///
/// Returns the time until the head of the answer was complete. `limit` covers everything up to the verdict:
/// handshake, request, head of the answer, and its body where the check looks at that. A path or host that cannot
/// stand in a request is [`ProbeFailure::NotSent`].
///
/// # Cancellation
/// Dropping the future closes the socket. After the verdict a task of its own reads the body, for half a second
/// at most.
pub async fn probe(
    target: SocketAddr,
    origin: &Origin,
    limit: Duration,
    check: &HttpProbe,
) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    let request = request(target, check)?;
    let stream = tcp::connect(target, origin, start, limit).await?;
    exchange(stream, start, limit, request, check).await
}

/// Sends `request` over `stream`, which was begun at `start`, and looks at the answer as `check` says.
pub(super) async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    start: Instant,
    limit: Duration,
    request: Request<Empty<Bytes>>,
    check: &HttpProbe,
) -> Result<Duration, ProbeFailure> {
    let fail = |error: &hyper::Error| classify(error, start.elapsed());
    let late = |_elapsed| ProbeFailure::TimedOut {
        stage: Stage::Answer,
        after: limit,
    };

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
    let response = answered.map_err(late)?.map_err(|error| fail(&error))?;
    let elapsed = start.elapsed();
    let status = response.status().as_u16();
    let is_expected = check
        .expect
        .iter()
        .any(|range| (range.first..=range.last).contains(&status));
    let mut body = response.into_body();
    let mut verdict = Ok(elapsed);
    if !is_expected {
        verdict = Err(ProbeFailure::UnexpectedStatus {
            status,
            expected: ranges(&check.expect),
        });
    } else if let Some(expected) = &check.body {
        let read = tokio::select! {
            read = timeout_at(start + limit, read_bounded(&mut body)) => read,
            never = &mut transport => match never {},
        };
        if !expected.is_in(&read.map_err(late)?) {
            verdict = Err(ProbeFailure::UnexpectedBody {
                expected: expected.to_string(),
            });
        }
    }
    tokio::spawn(async move {
        let rest = timeout(FAREWELL, read_bounded(&mut body));
        // No verdict hangs on the rest of the body.
        tokio::select! {
            _ = rest => (),
            never = transport => match never {},
        }
    });
    verdict
}

/// The request of `check` to `target`.
pub(super) fn request(target: SocketAddr, check: &HttpProbe) -> Result<Request<Empty<Bytes>>, ProbeFailure> {
    let host = check
        .host
        .as_ref()
        .map_or_else(|| target.to_string(), String::clone);
    let mut request = Request::builder()
        .method(check.method.name())
        .uri(&check.path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close");
    if check.method == Method::Post {
        // An empty one: without its length some servers answer 411.
        request = request.header(header::CONTENT_LENGTH, "0");
    }
    request
        .body(Empty::new())
        // The configuration is validated, so this is a fault of ours, never of the backend.
        .map_err(|_invalid| ProbeFailure::NotSent(Errno::EINVAL))
}

/// The body to its end or to [`MAX_READ_BYTES`], or what came of it before the connection broke.
async fn read_bounded(body: &mut Incoming) -> Vec<u8> {
    let mut read = Vec::new();
    while read.len() < MAX_READ_BYTES {
        match body.frame().await {
            Some(Ok(frame)) => read.extend(frame.data_ref().into_iter().flatten()),
            Some(Err(_)) | None => break,
        }
    }
    read.truncate(MAX_READ_BYTES);
    read
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
    use crate::{
        config::BodyMatch,
        health::testing::{Server, get, loopback, refusing},
    };

    const LIMIT: Duration = Duration::from_secs(5);

    async fn ask(server: &Server) -> Result<Duration, ProbeFailure> {
        probe(server.address, &loopback(), LIMIT, &get("/")).await
    }

    async fn ask_for_body(server: &Server, text: &str) -> Result<Duration, ProbeFailure> {
        let check = HttpProbe {
            body: Some(BodyMatch::Text(text.into())),
            ..get("/")
        };
        probe(server.address, &loopback(), LIMIT, &check).await
    }

    #[tokio::test]
    async fn the_body_decides_where_the_check_looks_at_it() {
        const ANSWER: &[u8] =
            b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\n{\"state\":\"up\"}";
        let server = Server::answer(ANSWER).await;
        ask_for_body(&server, "\"up\"").await.unwrap();
        let server = Server::answer(ANSWER).await;
        let failure = ask_for_body(&server, "\"ready\"").await.unwrap_err();
        assert_eq!(failure.to_string(), r#"the body does not contain "\"ready\"""#);
    }

    #[tokio::test]
    async fn the_status_goes_before_the_body() {
        let server = Server::answer(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nup").await;
        let failure = ask_for_body(&server, "up").await.unwrap_err();
        assert_eq!(failure.name(), "unexpected-status");
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_late_where_it_counts() {
        let server = Server::answer_and_stay(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nstart").await;
        let check = HttpProbe {
            body: Some(BodyMatch::Text("end".into())),
            ..get("/")
        };
        let limit = Duration::from_millis(100);
        let outcome = probe(server.address, &loopback(), limit, &check).await;
        assert_eq!(
            outcome,
            Err(ProbeFailure::TimedOut {
                stage: Stage::Answer,
                after: limit
            })
        );
    }

    #[tokio::test]
    async fn a_text_behind_the_bound_is_not_found() {
        let length = MAX_READ_BYTES + 4;
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + MAX_READ_BYTES, b'x');
        answer.extend(b"text");
        let server = Server::answer(&answer).await;
        let failure = ask_for_body(&server, "text").await.unwrap_err();
        assert_eq!(failure.name(), "unexpected-body");
    }

    #[tokio::test]
    async fn the_method_is_that_of_the_check() {
        for (method, length) in [
            (Method::Head, None),
            (Method::Options, None),
            (Method::Post, Some("0")),
        ] {
            let server = Server::answer(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").await;
            let check = HttpProbe {
                method,
                ..get("/state")
            };
            probe(server.address, &loopback(), LIMIT, &check).await.unwrap();
            let request = String::from_utf8(server.ended().await.unwrap()).unwrap();
            assert!(
                request.starts_with(&format!("{} /state HTTP/1.1\r\n", method.name())),
                "{request}"
            );
            let sent = request
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            assert_eq!(sent, length, "{request}");
        }
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
        let check = HttpProbe {
            host: Some("example.org".into()),
            ..get("/up?deep=1")
        };
        probe(server.address, &loopback(), LIMIT, &check).await.unwrap();
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
        let outcome = probe(server.address, &loopback(), limit, &get("/")).await;
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
        let outcome = probe(refusing(), &loopback(), LIMIT, &get("/")).await;
        assert_eq!(outcome, Err(ProbeFailure::Refused));
    }
}
