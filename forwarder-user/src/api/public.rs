//! What the metrics address serves to everybody who reaches it: metrics for Prometheus, and a page for people.
//!
//! ```text
//! GET /metrics         Prometheus text, see `metrics`
//! GET /                the status page, with page.css, page.js, page.svg
//! GET /status.json     the same `Status` as the control API's, which the page draws
//! GET /reasons.json    what each reason of a dropped packet means
//! ```
//!
//! There is no access control, so the address is a loopback one unless the operator says otherwise, and nothing can
//! be changed here. The page is files of `page/`, in the binary; it loads nothing from elsewhere, and browsers are told
//! to let it load nothing.

use std::{
    future::Future,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
};

use axum::{
    Json, Router,
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    middleware::map_response,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get},
};
use forwarder_common::abi::reason::DESCRIPTIONS;
use serde::Serialize;

use super::{Refusal, StatusSource, questions::ANSWER_TIMEOUT, serve};
use crate::{error::Error, metrics, status::Status};

/// The page loads its own files, and nothing else; nobody shows it in a frame.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                              connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Takes the address that Prometheus scrapes.
///
/// # Errors
/// The address is in use, or not of this host.
pub fn bind_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    listen(address, "metrics", "agent.metrics_address")
}

/// Takes an address that `key` of the configuration names, to serve `what`.
pub(super) fn listen(address: SocketAddr, what: &str, key: &str) -> Result<TcpListener, Error> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| {
        let what = format!("cannot serve {what} on {address}: {error}");
        let port = address.port();
        Error::host(what).hint(match error.kind() {
            ErrorKind::AddrInUse => {
                format!("`ss -ltnp 'sport = :{port}'` shows who has it: another agent? Else change {key}")
            }
            ErrorKind::AddrNotAvailable => {
                format!(
                    "{} is not an address of this host: see `ip address`",
                    address.ip()
                )
            }
            ErrorKind::PermissionDenied => {
                format!("port {port} needs CAP_NET_BIND_SERVICE; take one from 1024 on")
            }
            _ => format!("change {key}"),
        })
    })
}

/// A bound address as the runtime takes it. Call it within a Tokio runtime.
pub(super) fn in_runtime(listener: TcpListener) -> Result<tokio::net::TcpListener, Error> {
    tokio::net::TcpListener::from_std(listener)
        .map_err(|error| Error::failed(format!("cannot listen: {error}")))
}

/// Serves metrics and page until `stop` completes; open connections then get a second to end.
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
        .route("/status.json", get(answer_status))
        .route("/reasons.json", get(answer_reasons))
        .route(
            "/",
            file("text/html; charset=utf-8", include_str!("../page/index.html")),
        )
        .route(
            "/page.css",
            file("text/css; charset=utf-8", include_str!("../page/page.css")),
        )
        .route(
            "/page.js",
            file("text/javascript; charset=utf-8", include_str!("../page/page.js")),
        )
        .route(
            "/page.svg",
            file("image/svg+xml", include_str!("../page/page.svg")),
        )
        .layer(map_response(careful))
        .with_state(source);
    serve(in_runtime(listener)?, app, stop).await
}

async fn answer_metrics(State(source): State<StatusSource>) -> Response {
    match source.ask(ANSWER_TIMEOUT).await {
        Ok(status) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&status)).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn answer_status(State(source): State<StatusSource>) -> Result<Json<Status>, Refusal> {
    Ok(Json(source.ask(ANSWER_TIMEOUT).await?))
}

/// What a reason means, for the page.
#[derive(Serialize)]
struct ReasonText {
    name: &'static str,
    text: &'static str,
    hint: &'static str,
}

async fn answer_reasons() -> Json<Vec<ReasonText>> {
    let texts = DESCRIPTIONS.iter().map(|description| ReasonText {
        name: description.name,
        text: description.text,
        hint: description.hint,
    });
    Json(texts.collect())
}

/// A file of the page.
fn file(content_type: &'static str, text: &'static str) -> MethodRouter<StatusSource> {
    get(move || async move { ([(CONTENT_TYPE, content_type)], text) })
}

/// Tells browsers what the page may do, and to ask again: the next agent's page may be another.
async fn careful(mut response: Response) -> Response {
    let headers: &mut HeaderMap = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, CONTENT_POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
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

    /// What one request is answered with.
    async fn answered(request_line: &str) -> (String, String) {
        let listener = bind_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (source, requests) = StatusSource::channel();
        answer_all(requests);
        let server = tokio::spawn(serve_metrics(listener, source, std::future::pending()));
        let answer = exchange(TcpStream::connect(address).await.unwrap(), request_line, "").await;
        server.abort();
        answer
    }

    #[tokio::test]
    async fn the_page_has_all_it_names_and_loads_nothing_from_elsewhere() {
        let (head, page) = answered("GET /").await;
        assert!(head.contains("content-type: text/html"), "{head}");
        assert!(
            head.contains("content-security-policy: default-src 'none';"),
            "{head}"
        );
        let mut files = 0;
        for attribute in ["href=\"", "src=\""] {
            for name in page
                .split(attribute)
                .skip(1)
                .filter_map(|rest| rest.split('"').next())
            {
                let (head, body) = answered(&format!("GET /{name}")).await;
                assert!(
                    head.starts_with("http/1.1 200") && !body.is_empty(),
                    "{name}: {head}"
                );
                files += 1;
            }
        }
        assert!(files >= 5, "{files}");
        for file in ["page.css", "page.js"] {
            let (head, body) = answered(&format!("GET /{file}")).await;
            assert!(head.contains("x-content-type-options: nosniff"), "{head}");
            let foreign = body.replace("http://www.w3.org/2000/svg", "");
            assert!(!foreign.contains("http"), "{file} names a foreign place");
            assert!(!body.contains("innerHTML"), "{file} writes markup");
        }
    }

    #[tokio::test]
    async fn the_page_s_numbers_are_the_api_s() {
        let (_, body) = answered("GET /status.json").await;
        assert_eq!(serde_json::from_str::<Status>(&body).unwrap(), sample());
        let (_, body) = answered("GET /reasons.json").await;
        for description in DESCRIPTIONS {
            assert!(
                body.contains(&format!("\"name\":\"{}\"", description.name)),
                "{body}"
            );
        }
        let (head, _) = answered("POST /status.json").await;
        assert!(head.starts_with("http/1.1 405"), "{head}");
    }
}
