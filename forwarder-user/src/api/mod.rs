//! What the agent answers: the control API over a Unix socket, the same for readers over TCP if configured, metrics
//! and the status page over TCP.
//!
//! ```text
//! control socket                              everything below, for the command line and for programs
//! GET    /v1/status                           `Status`, for `forwarder status` and `top`
//! POST   /v1/plan                             a configuration; what it would change, for `forwarder plan`
//! POST   /v1/apply                            the same, and changes it, for `forwarder apply`
//! GET    /v1/backend?group=…&backend=…        one backend of the status
//! POST   /v1/backend                          a `BackendOrder`, for `forwarder drain`, `undrain`, `weight`
//! POST   /v1/explain, GET, DELETE /v1/flows,
//! POST   /v1/capture, /v1/trace               see `inspect`
//! GET    /v1/openapi.json                     all this described for programs; docs/openapi.json
//!
//! [agent.api] listen, off by default          GET of the above, for who has a certificate or the token; `remote`
//! http://<metrics_address>/                   metrics and a page for people, without access control; `public`
//! ```
//!
//! The agent's loop owns what there is to tell, so handlers ask it (`questions`) and share no state with it.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, Uri},
    serve::Listener,
};
use futures_util::FutureExt;
use tokio::net::UnixListener;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    change::{ChangeAnswer, Submission},
    error::{Error, Errors},
    inspect::{self, Inspection},
    orders::{BackendOrder, BackendPath},
    status::{BackendStatus, Status},
};

mod control_socket;
mod description;
mod public;
mod questions;
mod refusal;
mod remote;

pub use control_socket::{ControlSocket, bind_control};
pub use public::{bind_metrics, serve_metrics};
use questions::{ANSWER_TIMEOUT, CHANGE_TIMEOUT, NoAnswer};
pub use questions::{Reply, Request, Requests, StatusSource};
pub use refusal::{Body, ErrorBody, ErrorCode, ErrorText, Parameters, Place, Refusal};
pub use remote::{Credentials, RemoteListener, bind_remote, serve_remote};

/// Where the status is.
pub const STATUS_PATH: &str = "/v1/status";
/// Where to ask what a configuration would change.
pub const PLAN_PATH: &str = "/v1/plan";
/// Where to have a configuration applied.
pub const APPLY_PATH: &str = "/v1/apply";
/// Where one backend is shown, and takes orders.
pub const BACKEND_PATH: &str = "/v1/backend";
/// Where packets are explained.
pub const EXPLAIN_PATH: &str = "/v1/explain";
/// Where packets are captured.
pub const CAPTURE_PATH: &str = "/v1/capture";
/// Where they are told of as they pass.
pub const TRACE_PATH: &str = "/v1/trace";
/// Where flows are.
pub const FLOWS_PATH: &str = "/v1/flows";
/// Where all this is described.
pub const OPENAPI_PATH: &str = "/v1/openapi.json";

/// Bytes of the longest request: a configuration of 10 000 backends takes about 1 MB, a capture in hexadecimal digits
/// more.
const MAX_REQUEST: usize = 64 << 20;
/// How long open connections may take to end once the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Every call there is, with its description.
fn calls() -> OpenApiRouter<StatusSource> {
    description::router()
        .routes(routes!(answer_status))
        .routes(routes!(answer_plan))
        .routes(routes!(answer_apply))
        .routes(routes!(answer_backend, answer_order))
        .routes(routes!(description::answer_description))
        .merge(inspect::calls())
}

/// The API as a service, of which [`serve_control`] makes a server. `inspection` answers what does not need the agent's
/// loop.
pub fn service(source: StatusSource, inspection: Inspection) -> Router {
    let (router, _) = calls().split_for_parts();
    router
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .layer(inspection.into_layer())
        .fallback(answer_not_found)
        .method_not_allowed_fallback(answer_wrong_method)
        .with_state(source)
}

/// Serves the control socket until `stop` completes, and removes its file.
///
/// # Errors
/// The listener fails for good.
pub async fn serve_control(
    socket: ControlSocket,
    source: StatusSource,
    inspection: Inspection,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let ControlSocket { listener, file } = socket;
    let listener = UnixListener::from_std(listener)
        .map_err(|error| Error::failed(format!("cannot listen on the control socket: {error}")))?;
    let outcome = serve(listener, service(source, inspection), stop).await;
    drop(file);
    outcome
}

async fn serve<L>(
    listener: L,
    app: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error>
where
    L: Listener,
    L::Addr: std::fmt::Debug,
{
    let stop = stop.shared();
    let server = axum::serve(listener, app).with_graceful_shutdown(stop.clone());
    // A client that stalls must not hold up the agent's end.
    let out_of_patience = async {
        stop.await;
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        outcome = server.into_future() => outcome.map_err(|error| Error::failed(format!("cannot serve: {error}"))),
        () = out_of_patience => Ok(()),
    }
}

/// Everything that is known
#[utoipa::path(
    get,
    operation_id = "status",
    path = STATUS_PATH,
    tag = "agent",
    responses((status = 200, body = Status), (status = "default", body = ErrorBody))
)]
async fn answer_status(State(source): State<StatusSource>) -> Result<Json<Status>, Refusal> {
    Ok(Json(source.ask(ANSWER_TIMEOUT).await?))
}

/// What a configuration would change; changes nothing
#[utoipa::path(
    post,
    operation_id = "plan",
    path = PLAN_PATH,
    tag = "configuration",
    request_body = Submission,
    responses((status = 200, body = ChangeAnswer), (status = "default", body = ErrorBody))
)]
async fn answer_plan(
    State(source): State<StatusSource>,
    Body(submission): Body<Submission>,
) -> Result<Json<ChangeAnswer>, Refusal> {
    change(&source, submission, false).await
}

/// Takes a configuration over, all or nothing; flows and counters stay
#[utoipa::path(
    post,
    operation_id = "apply",
    path = APPLY_PATH,
    tag = "configuration",
    request_body = Submission,
    responses((status = 200, body = ChangeAnswer), (status = "default", body = ErrorBody))
)]
async fn answer_apply(
    State(source): State<StatusSource>,
    Body(submission): Body<Submission>,
) -> Result<Json<ChangeAnswer>, Refusal> {
    change(&source, submission, true).await
}

async fn change(
    source: &StatusSource,
    submission: Submission,
    apply: bool,
) -> Result<Json<ChangeAnswer>, Refusal> {
    let asked_at = Instant::now();
    let request = |reply: Reply<Result<ChangeAnswer, Errors>>| Request::Change {
        submission,
        apply,
        asked_at,
        reply,
    };
    Ok(Json(source.ask_for(CHANGE_TIMEOUT, request).await??))
}

/// One backend of the status
#[utoipa::path(
    get,
    operation_id = "backend",
    path = BACKEND_PATH,
    tag = "backends",
    params(BackendPath),
    responses((status = 200, body = BackendStatus), (status = "default", body = ErrorBody))
)]
async fn answer_backend(
    State(source): State<StatusSource>,
    Parameters(path): Parameters<BackendPath>,
) -> Result<Json<BackendStatus>, Refusal> {
    let request = |reply| Request::Backend(path, reply);
    Ok(Json(source.ask_for(ANSWER_TIMEOUT, request).await??))
}

/// Has a backend drained, takes that back, or gives it another weight; holds across restarts, until another order
#[utoipa::path(
    post,
    operation_id = "order",
    path = BACKEND_PATH,
    tag = "backends",
    request_body = BackendOrder,
    responses((status = 200, body = BackendStatus), (status = "default", body = ErrorBody))
)]
async fn answer_order(
    State(source): State<StatusSource>,
    Body(order): Body<BackendOrder>,
) -> Result<Json<BackendStatus>, Refusal> {
    let request = |reply| Request::Order(order, reply);
    Ok(Json(source.ask_for(ANSWER_TIMEOUT, request).await??))
}

impl From<NoAnswer> for Refusal {
    fn from(why: NoAnswer) -> Self {
        let hint = match why {
            NoAnswer::TooLate(_) => Some("try again; if that stays so, see the agent's log"),
            NoAnswer::Stopping => None,
        };
        Self::new(ErrorCode::Unavailable, why.to_string(), hint)
    }
}

async fn answer_not_found(uri: Uri) -> Refusal {
    let hint = format!("there are {}", *description::PATHS);
    Refusal::new(
        ErrorCode::NotFound,
        format!("nothing is at {}", uri.path()),
        Some(&hint),
    )
}

async fn answer_wrong_method(method: Method) -> Refusal {
    Refusal::new(
        ErrorCode::MethodNotAllowed,
        format!("{method} is not possible here"),
        Some("GET reads; POST explains packets, plans, applies and orders; DELETE deletes flows"),
    )
}

#[cfg(test)]
pub(crate) mod testing {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::oneshot,
        task::JoinHandle,
    };

    use super::*;
    use crate::status::testing::sample;

    /// Answers with the sample until nobody can ask any more.
    pub(crate) fn answer_all(mut requests: Requests) -> JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                if let Request::Status(reply) = request {
                    reply.send(sample());
                }
            }
        })
    }

    /// Sends one request with more lines in its head, and returns head, in lower case, and body of the answer.
    pub(crate) async fn exchange(
        mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
        request_line: &str,
        more: &str,
    ) -> (String, String) {
        let request = format!("{request_line} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n{more}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }

    pub(crate) async fn stopped(stop: oneshot::Receiver<()>) {
        // Dropped or sent: both say stop.
        let _ = stop.await;
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use serde_json::Value;
    use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle};

    use super::{
        testing::{answer_all, exchange, stopped},
        *,
    };
    use crate::status::testing::{assert_same_as_file, sample};

    struct Server {
        directory: tempfile::TempDir,
        stop: oneshot::Sender<()>,
        task: JoinHandle<Result<(), Error>>,
    }

    impl Server {
        fn start(source: StatusSource) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let socket = bind_control(&directory.path().join("control.sock"), None).unwrap();
            let (stop, told) = oneshot::channel();
            let task = tokio::spawn(serve_control(socket, source, Inspection::none(), stopped(told)));
            Self {
                directory,
                stop,
                task,
            }
        }

        async fn ask(&self, request_line: &str, more: &str) -> (String, String) {
            let stream = UnixStream::connect(self.directory.path().join("control.sock"));
            exchange(stream.await.unwrap(), request_line, more).await
        }
    }

    fn codes(body: &str) -> Vec<ErrorCode> {
        let body: ErrorBody = serde_json::from_str(body).expect(body);
        body.errors.into_iter().map(|error| error.code).collect()
    }

    #[tokio::test]
    async fn the_control_socket_answers_in_json_and_is_removed() {
        let (source, requests) = StatusSource::channel();
        let agent = answer_all(requests);
        let server = Server::start(source);
        let (head, body) = server.ask("GET /v1/status", "").await;
        assert!(
            head.starts_with("http/1.1 200") && head.contains("application/json"),
            "{head}"
        );
        assert_eq!(serde_json::from_str::<Status>(&body).unwrap(), sample());

        let path = server.directory.path().join("control.sock");
        assert!(path.exists());
        server.stop.send(()).unwrap();
        server.task.await.unwrap().unwrap();
        agent.await.unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn whatever_is_wrong_with_a_request_is_told_in_one_form() {
        let (source, requests) = StatusSource::channel();
        drop(requests);
        let server = Server::start(source);
        let json = "Content-Type: application/json\r\n";
        let with = |body: &str| format!("{json}Content-Length: {}\r\n\r\n{body}", body.len());
        for (line, more, status, code) in [
            ("GET /v1/status", "", "503", ErrorCode::Unavailable),
            ("GET /v2/status", "", "404", ErrorCode::NotFound),
            ("DELETE /v1/status", "", "405", ErrorCode::MethodNotAllowed),
            ("GET /v1/backend?group=web", "", "400", ErrorCode::Malformed),
            ("POST /v1/apply", "", "415", ErrorCode::Malformed),
            ("POST /v1/apply", &with("{"), "400", ErrorCode::Malformed),
            (
                "POST /v1/backend",
                &with(r#"{"group": "web"}"#),
                "400",
                ErrorCode::Malformed,
            ),
        ] {
            let (head, body) = server.ask(line, more).await;
            assert!(head.starts_with(&format!("http/1.1 {status}")), "{line}: {head}");
            assert_eq!(codes(&body), [code], "{line}");
        }
        let (_, body) = server.ask("GET /v1/status", "").await;
        assert_eq!(
            body,
            r#"{"errors":[{"code":"unavailable","what":"the agent is stopping"}]}"#
        );
        let (_, body) = server.ask("GET /v2/status", "").await;
        assert!(body.contains("/v1/flows"), "the hint says what there is: {body}");
    }

    fn description() -> Value {
        let text = calls().into_openapi().to_json().unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[tokio::test]
    async fn the_description_has_every_call_and_no_other() {
        let (source, _requests) = StatusSource::channel();
        let server = Server::start(source);
        let description = description();
        for (path, item) in description["paths"].as_object().unwrap() {
            let mut described: BTreeSet<String> = item.as_object().unwrap().keys().cloned().collect();
            if described.contains("get") {
                // Every GET can be had without its body (RFC 9110 §9.3.2).
                described.insert("head".to_owned());
            }
            // No call has this method, so the answer lists those that the path does have.
            let (head, _) = server.ask(&format!("TRACE {path}"), "").await;
            let routed: BTreeSet<String> = head
                .lines()
                .find_map(|line| line.strip_prefix("allow: "))
                .unwrap_or_else(|| panic!("{path} has no route: {head}"))
                .split(',')
                .map(str::to_owned)
                .collect();
            assert_eq!(described, routed, "{path}");
        }
        // The command line knows no path that is not described.
        let known: BTreeSet<&str> = [
            STATUS_PATH,
            PLAN_PATH,
            APPLY_PATH,
            BACKEND_PATH,
            EXPLAIN_PATH,
            CAPTURE_PATH,
            TRACE_PATH,
            FLOWS_PATH,
            OPENAPI_PATH,
        ]
        .into();
        let described: BTreeSet<&str> = description["paths"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(known, described);
    }

    #[tokio::test]
    async fn what_is_served_has_the_described_shape() {
        let description = description();
        let schemas = &description["components"]["schemas"];
        let status = serde_json::to_value(sample()).unwrap();
        conforms(
            &status,
            &serde_json::json!({"$ref": "#/components/schemas/Status"}),
            schemas,
            "status",
        );
        let error = ErrorBody::from(Refusal::new(ErrorCode::Failed, "broken", Some("mend it")));
        conforms(
            &serde_json::to_value(error).unwrap(),
            &serde_json::json!({"$ref": "#/components/schemas/ErrorBody"}),
            schemas,
            "error",
        );
    }

    /// Enough of JSON Schema for the description's own schemas: every field of `value` is described, and of the
    /// described type; every field that must be there is.
    fn conforms(value: &Value, schema: &Value, schemas: &Value, place: &str) {
        if let Some(name) = schema["$ref"].as_str() {
            let name = name.rsplit('/').next().unwrap();
            assert!(!schemas[name].is_null(), "{place}: there is no schema {name}");
            return conforms(value, &schemas[name], schemas, place);
        }
        if let Some(options) = schema["oneOf"].as_array() {
            let option = options
                .iter()
                .find(|option| (option["type"] == "null") == value.is_null());
            return conforms(
                value,
                option.unwrap_or_else(|| panic!("{place}: {value}")),
                schemas,
                place,
            );
        }
        if value.is_object() {
            let mut fields = serde_json::Map::new();
            let mut required = Vec::new();
            collect(schema, schemas, &mut fields, &mut required);
            for (name, value) in value.as_object().unwrap() {
                let field = fields
                    .get(name)
                    .unwrap_or_else(|| panic!("{place}: {name} is not described"));
                conforms(value, field, schemas, &format!("{place}.{name}"));
            }
            for name in required {
                assert!(value.get(&name).is_some(), "{place}: {name} is missing");
            }
            return;
        }
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let kinds: Vec<&str> = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
            kind => kind.as_str().into_iter().collect(),
        };
        assert!(kinds.contains(&kind), "{place}: {value} is none of {kinds:?}");
        for item in value.as_array().into_iter().flatten() {
            conforms(item, &schema["items"], schemas, place);
        }
    }

    /// The fields of a schema, of those that it is made of too.
    fn collect(
        schema: &Value,
        schemas: &Value,
        fields: &mut serde_json::Map<String, Value>,
        required: &mut Vec<String>,
    ) {
        if let Some(name) = schema["$ref"].as_str() {
            let name = name.rsplit('/').next().unwrap();
            return collect(&schemas[name], schemas, fields, required);
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            collect(part, schemas, fields, required);
        }
        if let Some(own) = schema["properties"].as_object() {
            fields.extend(own.clone());
        }
        let own = schema["required"].as_array().into_iter().flatten();
        required.extend(own.filter_map(Value::as_str).map(str::to_owned));
    }

    #[test]
    fn docs_openapi_json_is_current() {
        let description = description();
        assert!(
            description["openapi"]
                .as_str()
                .is_some_and(|version| version.starts_with("3.1"))
        );
        let mut text = serde_json::to_string_pretty(&description).unwrap();
        text.push('\n');
        assert_same_as_file("docs/openapi.json", &text);
        assert!(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../docs/api.md")
                .exists()
        );
    }
}
