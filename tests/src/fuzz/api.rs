//! Requests to the control API, which anybody who may talk to its socket can send: every call that reads a body, and
//! those that read a query.
//!
//! The service is the agent's own, with its handlers; behind it, the configuration is read as the agent reads it. There
//! is no data path to look at, so what asks for one is read and then refused; what its handlers would do with the
//! packets and filters they were sent is done here.

use std::path::PathBuf;

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Method, Request as HttpRequest, StatusCode, header::CONTENT_TYPE},
};
use forwarder_user::{
    api::{
        APPLY_PATH, BACKEND_PATH, CAPTURE_PATH, EXPLAIN_PATH, ErrorBody, FLOWS_PATH, PLAN_PATH, Request,
        Requests, StatusSource, TRACE_PATH, service,
    },
    capture::CaptureRequest,
    change::{ChangeAnswer, Submission},
    config,
    error::Error,
    explain::{Bytes, ExplainRequest, frame::PacketSummary},
    inspect::Inspection,
    orders::{BackendOrder, Order},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt as _;

use super::Target;
use crate::cases::{self, Event};

pub(super) const API: Target = Target {
    name: "api",
    run,
    seeds,
};

/// What there is to ask, by the first byte of an input; the rest is the body, or the query.
const CALLS: [(Method, &str); 9] = [
    (Method::POST, PLAN_PATH),
    (Method::POST, APPLY_PATH),
    (Method::POST, BACKEND_PATH),
    (Method::POST, EXPLAIN_PATH),
    (Method::POST, CAPTURE_PATH),
    (Method::POST, TRACE_PATH),
    (Method::GET, BACKEND_PATH),
    (Method::GET, FLOWS_PATH),
    (Method::DELETE, FLOWS_PATH),
];

/// Bytes of an answer: more than any error says.
const MOST_ANSWERED: usize = 64 << 20;

/// The service, and where it and the agent behind it run.
struct Server {
    runtime: Runtime,
    service: Router,
}

impl Server {
    fn start() -> Self {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let (source, requests) = StatusSource::channel();
        runtime.spawn(answer_all(requests));
        Self {
            runtime,
            service: service(source, Inspection::none()),
        }
    }

    fn ask(&self, request: HttpRequest<Body>) -> (StatusCode, Vec<u8>) {
        self.runtime.block_on(async {
            let answer = self.service.clone().oneshot(request).await;
            let answer = answer.unwrap_or_else(|error| match error {});
            let status = answer.status();
            let body = to_bytes(answer.into_body(), MOST_ANSWERED)
                .await
                .expect("an answer in memory");
            (status, body.to_vec())
        })
    }
}

thread_local! {
    static SERVER: Server = Server::start();
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let mut add = |call: u8, body: &[u8]| seeds.push([&[call], body].concat());
    for (index, text) in super::config::texts().into_iter().enumerate() {
        let submission = Submission {
            file: PathBuf::from("forwarder.toml"),
            text,
        };
        add((index % 2) as u8, json(&submission).as_bytes());
    }
    for order in [
        Order::Drain {
            timeout_secs: Some(300),
        },
        Order::Undrain,
        Order::Weight { weight: Some(7) },
        Order::Weight { weight: None },
    ] {
        let path = "web/ecs01".parse().expect("a path");
        add(2, json(&BackendOrder { path, order }).as_bytes());
    }
    for case in cases::all().iter().step_by(40) {
        let frames = case.events.iter().filter_map(|event| match event {
            Event::Packet(step) => Some(Bytes(step.frame.clone())),
            Event::Change(_) => None,
        });
        let request = ExplainRequest {
            interface: Some("eth0".to_owned()),
            packets: frames.collect(),
        };
        add(3, json(&request).as_bytes());
    }
    let filter = CaptureRequest {
        network: "192.0.2.0/24".parse().ok(),
        port: Some(80),
        protocol: Some("tcp".to_owned()),
        reasons: vec!["no_route".to_owned()],
        one_in: Some(3),
        snap_bytes: Some(96),
        packets: Some(5),
    };
    for call in [4, 5] {
        add(call, json(&filter).as_bytes());
        add(call, json(&CaptureRequest::default()).as_bytes());
    }
    add(6, b"group=web&backend=ecs01");
    for call in [7, 8] {
        add(call, b"all=true");
        add(
            call,
            b"client=192.0.2.7&vip=198.51.100.10:80&state=established&limit=10",
        );
        add(
            call,
            b"backend=web/ecs01&listener=web&protocol=udp&snat=100.64.0.2",
        );
    }
    seeds
}

fn run(bytes: &[u8]) {
    let Some((call, rest)) = bytes.split_first() else {
        return;
    };
    let (method, path) = &CALLS[usize::from(*call) % CALLS.len()];
    let is_body = *method == Method::POST;
    let uri = if is_body {
        (*path).to_owned()
    } else {
        let query: String = rest
            .iter()
            .filter(|byte| byte.is_ascii_graphic())
            .map(|byte| char::from(*byte))
            .collect();
        format!("{path}?{query}")
    };
    let body = if is_body { rest.to_vec() } else { Vec::new() };
    let request = HttpRequest::builder()
        .method(method.clone())
        .uri(uri)
        .header(CONTENT_TYPE, "application/json")
        .body(Body::from(body));
    // What is no URI does not reach a service.
    let Ok(request) = request else {
        return;
    };
    let (status, answer) = SERVER.with(|server| server.ask(request));
    check_answer(status, &answer, path);
    match *path {
        PLAN_PATH | APPLY_PATH => check_read::<Submission>(rest),
        BACKEND_PATH if is_body => check_read::<BackendOrder>(rest),
        EXPLAIN_PATH => {
            check_read::<ExplainRequest>(rest);
            if let Ok(request) = serde_json::from_slice::<ExplainRequest>(rest) {
                for packet in &request.packets {
                    assert!(!PacketSummary::of(&packet.0).protocol.is_empty());
                }
            }
        }
        CAPTURE_PATH | TRACE_PATH => {
            check_read::<CaptureRequest>(rest);
            if let Ok(request) = serde_json::from_slice::<CaptureRequest>(rest)
                && let Err(error) = request.filter()
            {
                assert!(!error.what.is_empty());
            }
        }
        _ => {}
    }
}

/// Answers as the agent's loop does where no agent is needed for it, until nobody can ask any more.
async fn answer_all(mut requests: Requests) {
    while let Some(request) = requests.next().await {
        match request {
            Request::Change {
                submission, reply, ..
            } => {
                let config = config::load::parse(&submission.text, &submission.file);
                reply.send(config.map(|_| ChangeAnswer::default()));
            }
            Request::Backend(path, reply) => reply.send(Err(unknown(&path.to_string()))),
            Request::Order(order, reply) => reply.send(Err(unknown(&order.path.to_string()))),
            Request::Capture(_, reply) => reply.send(Ok(())),
            Request::Status(reply) => drop(reply),
        }
    }
}

fn unknown(name: &str) -> Error {
    Error::usage(format!("no backend \"{}\"", name.escape_debug()))
}

/// A request is never the cause of what is the agent's fault, and what is wrong is told in one form.
fn check_answer(status: StatusCode, answer: &[u8], path: &str) {
    let looks = [EXPLAIN_PATH, CAPTURE_PATH, TRACE_PATH, FLOWS_PATH].contains(&path);
    match status {
        StatusCode::OK => {
            let answer: ChangeAnswer = serde_json::from_slice(answer).expect("what a call answers");
            assert!(!answer.applied);
        }
        StatusCode::BAD_REQUEST
        | StatusCode::PAYLOAD_TOO_LARGE
        | StatusCode::UNSUPPORTED_MEDIA_TYPE
        | StatusCode::UNPROCESSABLE_ENTITY => check_errors(answer),
        StatusCode::SERVICE_UNAVAILABLE if looks => check_errors(answer),
        other => panic!("{path}: {other}: {}", String::from_utf8_lossy(answer)),
    }
}

fn check_errors(answer: &[u8]) {
    let body: ErrorBody = serde_json::from_slice(answer).expect("errors in their form");
    assert!(!body.errors.is_empty());
    for error in body.errors {
        assert!(!error.what.is_empty());
    }
}

/// What can be read means the same when it is written and read again.
fn check_read<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(body: &[u8]) {
    if let Ok(read) = serde_json::from_slice::<T>(body) {
        let again: T = serde_json::from_str(&json(&read)).expect("what was just written");
        assert_eq!(read, again);
    }
}

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("it can be written as JSON")
}
