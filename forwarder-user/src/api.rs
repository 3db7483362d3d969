//! What the agent answers: metrics over TCP, its status over a Unix socket.
//!
//! ```text
//! GET http://<metrics_address>/metrics        Prometheus text, see `metrics`
//! GET http://<metrics_address>/               which way to go, for people
//! GET /v1/status on the control socket        `Status` as JSON, for `forwarder status`
//! POST /v1/plan                               a configuration; what it would change, for `forwarder plan`
//! POST /v1/apply                              the same, and changes it, for `forwarder apply`
//! GET /v1/backend?group=…&backend=…           one backend of the status
//! POST /v1/backend                            a `BackendOrder`, for `forwarder drain`, `undrain`, `weight`
//! /v1/explain, /v1/flows there                see `inspect`
//! ```
//!
//! The agent's loop owns what there is to tell, so handlers ask it ([`StatusSource`]) and share no state with it.
//! The control socket belongs to the agent's user (mode 0600); the metrics have no
//! access control, so their address is a loopback one unless the operator says otherwise.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    future::Future,
    io::{self, ErrorKind},
    net::SocketAddr,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State},
    http::{Method, StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::Listener,
};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    change::{ChangeAnswer, Submission},
    error::{EXIT_FAILED, Error, Errors, Location},
    metrics,
    orders::{BackendOrder, BackendPath},
    status::{BackendStatus, Status},
};

/// Where the status is, on the control socket.
pub const STATUS_PATH: &str = "/v1/status";
/// Where to ask what a configuration would change.
pub const PLAN_PATH: &str = "/v1/plan";
/// Where to have a configuration applied.
pub const APPLY_PATH: &str = "/v1/apply";
/// Where one backend is shown, and takes orders.
pub const BACKEND_PATH: &str = "/v1/backend";

/// Where packets are explained.
pub const EXPLAIN_PATH: &str = "/v1/explain";
/// Where flows are.
pub const FLOWS_PATH: &str = "/v1/flows";

/// Requests that wait for the agent's loop; beyond it askers wait to be queued.
const QUEUE: usize = 16;
/// How long the agent's loop may take to answer: it may be building a table.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// As for [`ANSWER_TIMEOUT`], where many tables may have to be built.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of the longest configuration: 10 000 backends take about 1 MB.
const MAX_SUBMISSION: usize = 64 << 20;
/// How long open connections may take to end once the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Connections that wait to be accepted on the control socket.
const BACKLOG: i32 = 128;
/// Only the agent's user, usually root, may ask.
const CONTROL_MODE: u32 = 0o600;
/// The directory of the control socket, if it has to be made: everybody may look for the socket.
const DIRECTORY_MODE: u32 = 0o755;

/// Where servers get a status from: the other end is the agent's loop.
#[derive(Clone, Debug)]
pub struct StatusSource(mpsc::Sender<Request>);

/// The agent's end: questions to answer.
#[derive(Debug)]
pub struct Requests(mpsc::Receiver<Request>);

/// One question.
#[derive(Debug)]
pub enum Request {
    Status(Reply<Status>),
    /// One backend.
    Backend(BackendPath, Reply<Result<BackendStatus, Error>>),
    /// An order for a backend, and what it is like then.
    Order(BackendOrder, Reply<Result<BackendStatus, Error>>),
    /// What this configuration would change; and change it, if `apply`.
    Change {
        submission: Submission,
        apply: bool,
        reply: Reply<Result<ChangeAnswer, Errors>>,
    },
}

/// Where an answer goes. Whoever asked may have gone, which is as well.
#[derive(Debug)]
pub struct Reply<T>(oneshot::Sender<T>);

impl<T> Reply<T> {
    pub fn send(self, answer: T) {
        let _ = self.0.send(answer);
    }
}

/// The agent's loop has no time, or has ended.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("the agent did not answer within {0:?}")]
    TooLate(Duration),
    #[error("the agent is stopping")]
    Stopping,
}

impl StatusSource {
    /// Both ends.
    #[must_use]
    pub fn channel() -> (Self, Requests) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), Requests(receiver))
    }

    /// The agent's status, if its loop answers within `patience`.
    async fn ask(&self, patience: Duration) -> Result<Status, NoAnswer> {
        self.ask_for(patience, Request::Status).await
    }

    async fn ask_for<T>(
        &self,
        patience: Duration,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, NoAnswer> {
        let asked = async {
            let (sender, receiver) = oneshot::channel();
            self.0
                .send(request(Reply(sender)))
                .await
                .map_err(|_| NoAnswer::Stopping)?;
            receiver.await.map_err(|_| NoAnswer::Stopping)
        };
        timeout(patience, asked)
            .await
            .map_err(|_| NoAnswer::TooLate(patience))?
    }
}

impl Requests {
    /// The next question; `None` when every [`StatusSource`] is gone. May be used in `select!`: a question is
    /// never lost.
    pub async fn next(&mut self) -> Option<Request> {
        self.0.recv().await
    }
}

/// An error as JSON: `{"error": {"what": …, "hint": …}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The first, or only one.
    pub error: ErrorText,
    /// All of them where there may be several: what is wrong with a configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ErrorText>,
}

/// What is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorText {
    pub what: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// From 1; absent when the whole file is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// What a command that meets this error exits with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

impl ErrorText {
    fn new(what: String, hint: Option<String>) -> Self {
        Self {
            what,
            hint,
            file: None,
            line: None,
            exit_code: None,
        }
    }
}

impl From<&Error> for ErrorText {
    fn from(error: &Error) -> Self {
        let location = error.location.as_ref();
        Self {
            file: location.map(|location| location.file.clone()),
            line: location.map(|location| location.line).filter(|line| *line > 0),
            exit_code: Some(error.exit_code),
            ..Self::new(error.what.clone(), error.hint.clone())
        }
    }
}

impl From<ErrorText> for Error {
    fn from(text: ErrorText) -> Self {
        Self {
            what: text.what,
            location: text.file.map(|file| Location {
                file,
                line: text.line.unwrap_or(0),
            }),
            hint: text.hint,
            exit_code: text.exit_code.unwrap_or(EXIT_FAILED),
        }
    }
}

/// Takes the address that Prometheus scrapes. Call it within a Tokio runtime.
///
/// # Errors
/// The address is in use, or not of this host.
pub fn bind_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    bound.map_err(|error| {
        let what = format!("cannot serve metrics on {address}: {error}");
        let port = address.port();
        Error::host(what).hint(match error.kind() {
            ErrorKind::AddrInUse => format!(
                "`ss -ltnp 'sport = :{port}'` shows who has it: another agent? Else change agent.metrics_address"
            ),
            ErrorKind::AddrNotAvailable => {
                format!("{} is not an address of this host: see `ip address`", address.ip())
            }
            ErrorKind::PermissionDenied => format!("port {port} needs CAP_NET_BIND_SERVICE; take one from 1024 on"),
            _ => "change agent.metrics_address".to_owned(),
        })
    })
}

/// The control socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a bound Unix socket.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that the file of another agent stays.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // If it can't be removed, the next agent finds it stale and removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Takes the control socket: makes its directory if need be, and replaces the socket of an agent that is no more.
/// Call it within a Tokio runtime.
///
/// # Errors
/// Another agent answers there, something else than a socket is there, or rights are missing.
pub fn bind_control(path: &Path) -> Result<ControlSocket, Error> {
    let failed = |action: &str, error: &io::Error| {
        let what = format!("cannot {action} the control socket {}: {error}", path.display());
        let error_hint = match error.kind() {
            ErrorKind::PermissionDenied => {
                "run as root, or choose a place that you may write as agent.control_socket"
            }
            _ => "check the path, or choose another as agent.control_socket",
        };
        Error::host(what).hint(error_hint)
    };
    if let Some(directory) = path.parent() {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(directory);
        made.map_err(|error| failed("make the directory of", &error))?;
    }
    let listener = match listen(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            make_room(path, &failed)?;
            listen(path)
        }
        outcome => outcome,
    };
    let listener = listener.map_err(|error| failed("make", &error))?;
    let identity = identity(path).map_err(|error| failed("find", &error))?;
    Ok(ControlSocket {
        listener,
        file: SocketFile {
            path: path.to_owned(),
            identity,
        },
    })
}

/// Removes what a dead agent left at `path`.
fn make_room(path: &Path, failed: &dyn Fn(&str, &io::Error) -> Error) -> Result<(), Error> {
    let metadata = fs::symlink_metadata(path).map_err(|error| failed("replace", &error))?;
    if !metadata.file_type().is_socket() {
        let what = format!("{} is no socket, so it stays", path.display());
        return Err(Error::host(what).hint("move it away, or choose another path as agent.control_socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(
            Error::host(format!("another agent holds the control socket {}", path.display())).hint(format!(
                "stop it first; `ss -lxp | grep {}` shows its process. A second agent needs an agent.control_socket and \
                 an agent.metrics_address of its own",
                path.display()
            )),
        ),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("replace", &error))
        }
        Err(error) => Err(failed("replace", &error)),
    }
}

/// A socket whose file has [`CONTROL_MODE`] from its first moment on.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux gives the file the mode of the unbound socket, less the umask; changing it after the bind would
    // leave a moment in which others may connect.
    let as_file = File::from(OwnedFd::from(socket));
    as_file.set_permissions(Permissions::from_mode(CONTROL_MODE))?;
    let socket = Socket::from(OwnedFd::from(as_file));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
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

/// Serves the control socket until `stop` completes, and removes its file. `inspection` answers what does not need
/// the agent's loop.
///
/// # Errors
/// The listener fails for good.
pub async fn serve_control(
    socket: ControlSocket,
    source: StatusSource,
    inspection: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let ControlSocket { listener, file } = socket;
    let app = Router::new()
        .route(STATUS_PATH, get(answer_status))
        .route(PLAN_PATH, post(answer_plan))
        .route(APPLY_PATH, post(answer_apply))
        .route(BACKEND_PATH, get(answer_backend).post(answer_order))
        .layer(DefaultBodyLimit::max(MAX_SUBMISSION))
        .with_state(source)
        .merge(inspection)
        .fallback(answer_not_found)
        .method_not_allowed_fallback(answer_wrong_method);
    let outcome = serve(listener, app, stop).await;
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

async fn answer_status(State(source): State<StatusSource>) -> Response {
    match source.ask(ANSWER_TIMEOUT).await {
        Ok(status) => Json(status).into_response(),
        Err(why) => no_answer(&why),
    }
}

async fn answer_plan(State(source): State<StatusSource>, Json(submission): Json<Submission>) -> Response {
    answer_change(&source, submission, false).await
}

async fn answer_apply(State(source): State<StatusSource>, Json(submission): Json<Submission>) -> Response {
    answer_change(&source, submission, true).await
}

async fn answer_backend(State(source): State<StatusSource>, Query(path): Query<BackendPath>) -> Response {
    answer_one(
        source
            .ask_for(ANSWER_TIMEOUT, |reply| Request::Backend(path, reply))
            .await,
    )
}

async fn answer_order(State(source): State<StatusSource>, Json(order): Json<BackendOrder>) -> Response {
    answer_one(
        source
            .ask_for(ANSWER_TIMEOUT, |reply| Request::Order(order, reply))
            .await,
    )
}

fn answer_one(answer: Result<Result<BackendStatus, Error>, NoAnswer>) -> Response {
    match answer {
        Ok(Ok(backend)) => Json(backend).into_response(),
        Ok(Err(error)) => refused(vec![ErrorText::from(&error)]),
        Err(why) => no_answer(&why),
    }
}

/// What the agent refuses, with all that is wrong.
fn refused(errors: Vec<ErrorText>) -> Response {
    let first = errors
        .first()
        .cloned()
        .unwrap_or_else(|| ErrorText::new("refused".to_owned(), None));
    let body = ErrorBody { error: first, errors };
    (StatusCode::UNPROCESSABLE_ENTITY, Json(body)).into_response()
}

async fn answer_change(source: &StatusSource, submission: Submission, apply: bool) -> Response {
    let request = |reply| Request::Change {
        submission,
        apply,
        reply,
    };
    match source.ask_for(CHANGE_TIMEOUT, request).await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(errors)) => refused(errors.0.iter().map(ErrorText::from).collect()),
        Err(why) => no_answer(&why),
    }
}

fn no_answer(why: &NoAnswer) -> Response {
    match why {
        NoAnswer::TooLate(_) => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            why.to_string(),
            Some("try again; if that stays so, see the agent's log"),
        ),
        NoAnswer::Stopping => refuse(StatusCode::SERVICE_UNAVAILABLE, why.to_string(), None),
    }
}

async fn answer_not_found(uri: Uri) -> Response {
    let hint = format!(
        "there are {STATUS_PATH}, {PLAN_PATH}, {APPLY_PATH}, {BACKEND_PATH}, {EXPLAIN_PATH} and {FLOWS_PATH}"
    );
    refuse(
        StatusCode::NOT_FOUND,
        format!("nothing is at {}", uri.path()),
        Some(&hint),
    )
}

async fn answer_wrong_method(method: Method) -> Response {
    let what = format!("{method} is not possible here");
    refuse(
        StatusCode::METHOD_NOT_ALLOWED,
        what,
        Some("GET reads; POST explains packets, plans, applies and orders; DELETE deletes flows"),
    )
}

/// An error as an answer.
pub fn refuse(code: StatusCode, what: String, hint: Option<&str>) -> Response {
    let body = ErrorBody {
        error: ErrorText::new(what, hint.map(str::to_owned)),
        errors: Vec::new(),
    };
    (code, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdUnixListener;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        task::JoinHandle,
    };

    use super::*;
    use crate::status::testing::sample;

    /// Answers with the sample until nobody can ask any more.
    fn answer_all(mut requests: Requests) -> JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                if let Request::Status(reply) = request {
                    reply.send(sample());
                }
            }
        })
    }

    /// Sends one request and returns head and body of the answer.
    async fn exchange(
        mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
        request_line: &str,
    ) -> (String, String) {
        let request = format!("{request_line} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }

    async fn stopped(stop: oneshot::Receiver<()>) {
        // Dropped or sent: both say stop.
        let _ = stop.await;
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[tokio::test]
    async fn metrics_are_served_until_the_agent_stops() {
        let listener = bind_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (source, requests) = StatusSource::channel();
        let agent = answer_all(requests);
        let (stop, told) = oneshot::channel();
        let server = tokio::spawn(serve_metrics(listener, source, stopped(told)));

        let (head, body) = exchange(TcpStream::connect(address).await.unwrap(), "GET /metrics").await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
            "{head}"
        );
        assert_eq!(body, metrics::render(&sample()));
        let (_, body) = exchange(TcpStream::connect(address).await.unwrap(), "GET /").await;
        assert!(body.contains("/metrics"), "{body}");
        let (head, _) = exchange(TcpStream::connect(address).await.unwrap(), "GET /elsewhere").await;
        assert!(head.starts_with("http/1.1 404"), "{head}");

        // A connection that says nothing does not hold up the end.
        let _idle = TcpStream::connect(address).await.unwrap();
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        agent.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn the_control_socket_answers_in_json_and_is_removed() {
        let directory = directory();
        let path = directory.path().join("run/forwarder/control.sock");
        let (source, requests) = StatusSource::channel();
        let agent = answer_all(requests);
        let (stop, told) = oneshot::channel();
        let socket = bind_control(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, CONTROL_MODE);
        let server = tokio::spawn(serve_control(socket, source, Router::new(), stopped(told)));
        let connect = || tokio::net::UnixStream::connect(&path);

        let (head, body) = exchange(connect().await.unwrap(), "GET /v1/status").await;
        assert!(
            head.starts_with("http/1.1 200") && head.contains("application/json"),
            "{head}"
        );
        assert_eq!(serde_json::from_str::<Status>(&body).unwrap(), sample());
        let (head, body) = exchange(connect().await.unwrap(), "GET /v2/status").await;
        assert!(head.starts_with("http/1.1 404"), "{head}");
        assert_eq!(
            body,
            r#"{"error":{"what":"nothing is at /v2/status","hint":"there are /v1/status, /v1/plan, /v1/apply, /v1/backend, /v1/explain and /v1/flows"}}"#
        );
        let (head, body) = exchange(connect().await.unwrap(), "DELETE /v1/status").await;
        assert!(head.starts_with("http/1.1 405"), "{head}");
        assert!(serde_json::from_str::<ErrorBody>(&body).is_ok(), "{body}");

        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        agent.await.unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn an_agent_that_stops_says_so() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let (source, requests) = StatusSource::channel();
        drop(requests);
        let (_stop, told) = oneshot::channel();
        let server = tokio::spawn(serve_control(
            bind_control(&path).unwrap(),
            source,
            Router::new(),
            stopped(told),
        ));
        let (head, body) = exchange(
            tokio::net::UnixStream::connect(&path).await.unwrap(),
            "GET /v1/status",
        )
        .await;
        assert!(head.starts_with("http/1.1 503"), "{head}");
        assert_eq!(body, r#"{"error":{"what":"the agent is stopping"}}"#);
        server.abort();
    }

    #[tokio::test]
    async fn a_busy_agent_is_not_waited_for_without_end() {
        let (source, _requests) = StatusSource::channel();
        let answer = source.ask(Duration::from_millis(1)).await;
        assert_eq!(
            answer.unwrap_err().to_string(),
            "the agent did not answer within 1ms"
        );
    }

    #[tokio::test]
    async fn a_second_agent_is_refused_and_the_first_keeps_its_socket() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let first = bind_control(&path).unwrap();
        let error = bind_control(&path).unwrap_err();
        assert_eq!(
            error.what,
            format!("another agent holds the control socket {}", path.display())
        );
        assert_eq!(error.exit_code, crate::error::EXIT_HOST);
        assert!(error.hint.is_some());
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn the_socket_of_a_dead_agent_is_replaced() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(bind_control(&path).unwrap());
    }

    #[tokio::test]
    async fn what_is_no_socket_stays() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        fs::write(&path, "mine").unwrap();
        let error = bind_control(&path).unwrap_err();
        assert!(error.what.ends_with("is no socket, so it stays"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn the_socket_of_a_successor_stays() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let first = bind_control(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind_control(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
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
