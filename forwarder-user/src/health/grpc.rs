//! The gRPC probe: `grpc.health.v1.Health/Check` over HTTP/2 without TLS.
//!
//! The call is hyper's HTTP/2 with two messages of one field each, so they are written and read by hand: a code
//! generator and its runtime would be ten times as much. The protocol:
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>, the service:
//! <https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto>.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    HeaderMap, Request, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http2,
    header,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::errno::Errno;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    failure::{ProbeFailure, Stage},
    http::USER_AGENT,
    origin::Origin,
    tcp::{self, FAREWELL},
};

const METHOD: &str = "/grpc.health.v1.Health/Check";
/// Length of an answer's messages: one enumerated value takes a few bytes.
const MAX_ANSWER_BYTES: usize = 4096;
/// A message begins with its compression and its length.
const PREFIX_BYTES: usize = 5;
/// Key of field 1 with the wire type of strings and messages.
const STRING_FIELD_1: u8 = 0x0a;
/// `ServingStatus.SERVING`.
const SERVING: u64 = 1;

/// Asks `target` from `origin` whether `service` serves; an empty one stands for the whole server.
///
/// Returns the time until the answer was complete. `limit` covers everything up to the verdict.
///
/// # Cancellation
/// Dropping the future closes the connection. After the verdict a task of its own ends it, within half a second.
pub(super) async fn probe(
    target: SocketAddr,
    origin: &Origin,
    limit: Duration,
    service: &str,
    host: Option<&str>,
) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    let request = request(target, limit, service, host)?;
    let stream = tcp::connect(target, origin, start, limit).await?;
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failure(&error, start.elapsed()))?;
    // Moves the bytes while others wait for them; why it ended is theirs to hear.
    let mut transport = Box::pin(async {
        let _ = connection.await;
        std::future::pending::<Infallible>().await
    });
    let call = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failure(&error, start.elapsed()))?;
        verdict(response).await
    };
    let answered = tokio::select! {
        answered = timeout_at(start + limit, call) => answered,
        never = &mut transport => match never {},
    };
    let elapsed = start.elapsed();
    // Without a sender the connection says goodbye and ends.
    drop(sender);
    tokio::spawn(timeout(FAREWELL, transport));
    answered.map_err(|_elapsed| ProbeFailure::TimedOut {
        stage: Stage::Answer,
        after: limit,
    })??;
    Ok(elapsed)
}

fn request(
    target: SocketAddr,
    limit: Duration,
    service: &str,
    host: Option<&str>,
) -> Result<Request<Full<Bytes>>, ProbeFailure> {
    let authority = host.map_or_else(|| target.to_string(), str::to_owned);
    Request::post(format!("http://{authority}{METHOD}"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, USER_AGENT)
        .header("grpc-timeout", format!("{}m", limit.as_millis()))
        .body(Full::from(question(service)))
        // The configuration is validated, so this is a fault of ours, never of the backend.
        .map_err(|_invalid| ProbeFailure::NotSent(Errno::EINVAL))
}

/// `HealthCheckRequest { service }`, as one message that is not compressed.
fn question(service: &str) -> Vec<u8> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(STRING_FIELD_1);
        let mut length = service.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend(service.as_bytes());
    }
    let mut question = vec![0];
    question.extend((message.len() as u32).to_be_bytes());
    question.extend(message);
    question
}

async fn verdict(response: hyper::Response<Incoming>) -> Result<(), ProbeFailure> {
    if response.status() != StatusCode::OK {
        return Err(ProbeFailure::NotGrpc(format!(
            "HTTP status {}",
            response.status().as_u16()
        )));
    }
    let (head, body) = response.into_parts();
    // An error may come without a body, in the head.
    grpc_status(&head.headers)?;
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| ProbeFailure::NotGrpc(error.to_string()))?;
    match body.trailers() {
        Some(trailers) => grpc_status(trailers)?,
        None if !head.headers.contains_key("grpc-status") => {
            return Err(ProbeFailure::NotGrpc("it has no status".to_owned()));
        }
        None => {}
    }
    match serving_status(&body.to_bytes()) {
        Some(SERVING) => Ok(()),
        Some(0) => Err(ProbeFailure::NotServing("UNKNOWN")),
        Some(2) => Err(ProbeFailure::NotServing("NOT_SERVING")),
        Some(3) => Err(ProbeFailure::NotServing("SERVICE_UNKNOWN")),
        Some(_) | None => Err(ProbeFailure::NotGrpc("it holds no health status".to_owned())),
    }
}

/// The status that headers or trailers carry; OK where there is none.
fn grpc_status(headers: &HeaderMap) -> Result<(), ProbeFailure> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status").map(str::parse) {
        None | Some(Ok(0)) => Ok(()),
        Some(Ok(code)) => Err(ProbeFailure::GrpcStatus {
            code,
            message: text("grpc-message").unwrap_or_default().to_owned(),
        }),
        Some(Err(_)) => Err(ProbeFailure::NotGrpc("its status is no number".to_owned())),
    }
}

/// `HealthCheckResponse.status` of the first message; 0 where the field is absent, as always in this encoding.
fn serving_status(body: &[u8]) -> Option<u64> {
    let (prefix, rest) = body.split_at_checked(PREFIX_BYTES)?;
    let [compressed, length @ ..] = prefix else {
        return None;
    };
    let length = u32::from_be_bytes(length.try_into().ok()?);
    if *compressed != 0 {
        return None;
    }
    let mut message = rest.get(..usize::try_from(length).ok()?)?;
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match key & 7 {
            0 => {
                let value = varint(&mut message)?;
                if key >> 3 == 1 {
                    status = value;
                }
            }
            1 => message = message.get(8..)?,
            2 => {
                let length = varint(&mut message)?;
                message = message.get(usize::try_from(length).ok()?..)?;
            }
            5 => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

/// Takes a number of 7 bits per byte, the lowest first.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn failure(error: &hyper::Error, after: Duration) -> ProbeFailure {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return ProbeFailure::from_io(io, Stage::Answer, after);
        }
        source = cause.source();
    }
    let why = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    ProbeFailure::NotGrpc(why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;
    use tonic::{codegen::tokio_stream::wrappers::TcpListenerStream, transport};
    use tonic_health::{ServingStatus, server::health_reporter};

    use super::*;
    use crate::health::testing::{LOOPBACK, Server, loopback, refusing};

    const LIMIT: Duration = Duration::from_secs(5);

    async fn ask(target: SocketAddr, service: &str) -> Result<Duration, ProbeFailure> {
        probe(target, &loopback(), LIMIT, service, None).await
    }

    /// The health service of another implementation, with two services.
    async fn grpc_server() -> SocketAddr {
        let (reporter, service) = health_reporter();
        reporter
            .set_service_status("shop.Cart", ServingStatus::Serving)
            .await;
        reporter
            .set_service_status("shop.Stock", ServingStatus::NotServing)
            .await;
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(
            transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        address
    }

    #[tokio::test]
    async fn a_server_and_its_services_are_asked() {
        let server = grpc_server().await;
        ask(server, "").await.unwrap();
        ask(server, "shop.Cart").await.unwrap();
        assert_eq!(
            ask(server, "shop.Stock").await,
            Err(ProbeFailure::NotServing("NOT_SERVING"))
        );
        let unknown = ask(server, "shop.None").await.unwrap_err();
        assert!(
            matches!(unknown, ProbeFailure::GrpcStatus { code: 5, .. }),
            "{unknown:?}"
        );
    }

    #[tokio::test]
    async fn a_web_server_is_no_grpc_server() {
        let server = Server::greet(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
        let failure = ask(server.address, "").await.unwrap_err();
        assert!(matches!(failure, ProbeFailure::NotGrpc(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn silence_refusal_and_a_close_are_told_apart() {
        let server = Server::read_to_end().await;
        let limit = Duration::from_millis(100);
        assert_eq!(
            probe(server.address, &loopback(), limit, "", None).await,
            Err(ProbeFailure::TimedOut {
                stage: Stage::Answer,
                after: limit
            })
        );
        assert_eq!(ask(refusing(), "").await, Err(ProbeFailure::Refused));
    }

    #[test]
    fn messages_are_those_of_the_specification() {
        assert_eq!(question(""), [0, 0, 0, 0, 0]);
        assert_eq!(question("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = question(&"x".repeat(300));
        assert_eq!(&long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
        let status = |message: &[u8]| {
            let mut body = vec![0, 0, 0, 0, message.len() as u8];
            body.extend(message);
            serving_status(&body)
        };
        assert_eq!(status(&[8, 1]), Some(1));
        assert_eq!(status(&[]), Some(0));
        // Fields that a later version may have.
        assert_eq!(
            status(&[
                0x12, 2, 9, 9, 0x1d, 0, 0, 0, 0, 8, 2, 0x21, 0, 0, 0, 0, 0, 0, 0, 0
            ]),
            Some(2)
        );
        for wrong in [&[8][..], &[0x12, 9, 0], &[0x0b]] {
            assert_eq!(status(wrong), None, "{wrong:?}");
        }
        assert_eq!(serving_status(&[1, 0, 0, 0, 2, 8, 1]), None, "compressed");
        assert_eq!(serving_status(&[0, 0, 0, 0, 3, 8, 1]), None, "cut");
    }

    proptest! {
        #[test]
        fn no_answer_panics(body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = serving_status(&body);
        }
    }
}
