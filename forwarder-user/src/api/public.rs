//! What the metrics address serves to everybody who reaches it: metrics for Prometheus.
//!
//! There is no access control, so the address is a loopback one unless the operator says otherwise, and nothing can
//! be changed here.

use std::{future::Future, io::ErrorKind, net::SocketAddr};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;

use super::{StatusSource, questions::ANSWER_TIMEOUT, serve};
use crate::{error::Error, metrics};

/// Takes the address that Prometheus scrapes. Call it within a Tokio runtime.
///
/// # Errors
/// The address is in use, or not of this host.
pub fn bind_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    listen(address, "metrics", "agent.metrics_address")
}

/// Takes an address that `key` of the configuration names, to serve `what`.
pub(super) fn listen(address: SocketAddr, what: &str, key: &str) -> Result<TcpListener, Error> {
    let bound = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    bound.map_err(|error| {
        let what = format!("cannot serve {what} on {address}: {error}");
        let port = address.port();
        Error::host(what).hint(match error.kind() {
            ErrorKind::AddrInUse => {
                format!("`ss -ltnp 'sport = :{port}'` shows who has it: another agent? Else change {key}")
            }
            ErrorKind::AddrNotAvailable => {
                format!("{} is not an address of this host: see `ip address`", address.ip())
            }
            ErrorKind::PermissionDenied => format!("port {port} needs CAP_NET_BIND_SERVICE; take one from 1024 on"),
            _ => format!("change {key}"),
        })
    })
}

/// Serves the metrics until `stop` completes; open connections then get a second to end.
///
/// # Errors
/// The listener fails for good.
pub async fn serve_metrics(
    listener: TcpListener,
    source: StatusSource,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let app = Router::new()
        .route("/metrics", get(answer_metrics))
        .route("/", get(answer_front_page))
        .with_state(source);
    serve(listener, app, stop).await
}

async fn answer_metrics(State(source): State<StatusSource>) -> Response {
    match source.ask(ANSWER_TIMEOUT).await {
        Ok(status) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&status)).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn answer_front_page() -> String {
    format!(
        "forwarder {}\n\n/metrics  for Prometheus\n\nFor people: `forwarder status`, on this host.\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use tokio::{net::TcpStream, sync::oneshot};

    use super::{
        super::testing::{answer_all, exchange, stopped},
        *,
    };
    use crate::status::testing::sample;

    #[tokio::test]
    async fn metrics_are_served_until_the_agent_stops() {
        let listener = bind_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (source, requests) = StatusSource::channel();
        let agent = answer_all(requests);
        let (stop, told) = oneshot::channel();
        let server = tokio::spawn(serve_metrics(listener, source, stopped(told)));
        let connect = || async { TcpStream::connect(address).await.unwrap() };

        let (head, body) = exchange(connect().await, "GET /metrics", "").await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
            "{head}"
        );
        assert_eq!(body, metrics::render(&sample()));
        let (_, body) = exchange(connect().await, "GET /", "").await;
        assert!(body.contains("/metrics"), "{body}");
        let (head, _) = exchange(connect().await, "GET /elsewhere", "").await;
        assert!(head.starts_with("http/1.1 404"), "{head}");

        // A connection that says nothing does not hold up the end.
        let _idle = connect().await;
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        agent.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn an_address_in_use_is_explained() {
        let first = bind_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let error = bind_metrics(address).unwrap_err();
        assert!(
            error
                .what
                .starts_with(&format!("cannot serve metrics on {address}")),
            "{error}"
        );
        assert!(error.hint.is_some_and(|hint| hint.contains("ss -ltnp")));
        let error = bind_metrics("192.0.2.1:9469".parse().unwrap()).unwrap_err();
        assert!(
            error
                .hint
                .is_some_and(|hint| hint.contains("192.0.2.1 is not an address"))
        );
    }
}
