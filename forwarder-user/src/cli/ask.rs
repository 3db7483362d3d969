//! The way to the agent: one request over its control socket, one answer in JSON.

use std::{io, ops::ControlFlow, path::Path, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    api::ErrorBody,
    error::{Error, Errors},
};

/// Longer than the agent itself waits for its loop, so that its own words arrive.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(70);
/// Bytes of the longest answer that is read: 10 000 backends take about 8 MB, a million flows about 300.
const MAX_ANSWER: usize = 512 << 20;

/// What the agent answers to GET.
///
/// # Errors
/// No agent answers, rights are missing, or it refuses.
pub fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Error> {
    ask(socket, Method::GET, path, &[])
}

/// What the agent answers to DELETE.
///
/// # Errors
/// As for [`get`].
pub fn delete<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Error> {
    ask(socket, Method::DELETE, path, &[])
}

/// What the agent answers to POST with this as JSON.
///
/// # Errors
/// As for [`get`].
pub fn post<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> Result<T, Error> {
    let body = serde_json::to_vec(body)
        .map_err(|error| Error::failed(format!("cannot write the request as JSON: {error}")))?;
    ask(socket, Method::POST, path, &body)
}

/// As [`post`], for requests that may have several things wrong.
///
/// # Errors
/// As for [`get`], all at once.
pub fn submit<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> Result<T, Errors> {
    let body = serde_json::to_vec(body)
        .map_err(|error| Error::failed(format!("cannot write the request as JSON: {error}")))?;
    ask_for_all(socket, Method::POST, path, &body)
}

/// What the agent answers to POST with this as JSON, as it comes, until it ends, `take` breaks, or `limit` has passed.
///
/// # Errors
/// As for [`submit`], and those of `take`.
pub fn stream(
    socket: &Path,
    path: &str,
    body: &impl Serialize,
    limit: Option<Duration>,
    mut take: impl FnMut(&[u8]) -> Result<ControlFlow<()>, Error>,
) -> Result<(), Errors> {
    let body = serde_json::to_vec(body)
        .map_err(|error| Error::failed(format!("cannot write the request as JSON: {error}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::host(format!("cannot wait for an answer: {error}")))?;
    runtime.block_on(async {
        let read = read_stream(socket, path, &body, &mut take);
        match limit {
            // That the time is over is how it should end.
            Some(limit) => timeout(limit, read).await.unwrap_or(Ok(())),
            None => read.await,
        }
    })
}

async fn read_stream(
    socket: &Path,
    path: &str,
    body: &[u8],
    take: &mut impl FnMut(&[u8]) -> Result<ControlFlow<()>, Error>,
) -> Result<(), Errors> {
    let broke_off = |error: &dyn std::fmt::Display| {
        Error::failed(format!("the agent on {} broke off: {error}", socket.display()))
    };
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| not_connected(socket, &error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broke_off(&error))?;
    let connection = tokio::spawn(connection);
    let request = request(Method::POST, path, body).map_err(|error| broke_off(&error))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|error| broke_off(&error))?;
    let (code, mut body) = (answer.status(), answer.into_body());
    if code != StatusCode::OK {
        let collected = body.collect().await.map_err(|error| broke_off(&error))?;
        return Err(refused(socket, code, &collected.to_bytes()));
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broke_off(&error))?;
        if let Some(chunk) = frame.data_ref()
            && take(chunk)?.is_break()
        {
            break;
        }
    }
    connection.abort();
    Ok(())
}

/// Does an agent listen there?
pub fn is_running(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

fn ask<T: DeserializeOwned>(socket: &Path, method: Method, path: &str, body: &[u8]) -> Result<T, Error> {
    ask_for_all(socket, method, path, body).map_err(first)
}

/// The one error of answers that have one.
fn first(errors: Errors) -> Error {
    let mut errors = errors.0.into_iter();
    errors
        .next()
        .unwrap_or_else(|| Error::failed("the agent refuses without a reason"))
}

fn ask_for_all<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: &[u8],
) -> Result<T, Errors> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::host(format!("cannot wait for an answer: {error}")))?;
    runtime.block_on(async {
        timeout(ANSWER_TIMEOUT, exchange(socket, method, path, body))
            .await
            .unwrap_or_else(|_| {
                let what = format!("the agent on {} does not answer", socket.display());
                Err(Error::failed(what)
                    .hint("see its log: `journalctl -u forwarder`")
                    .into())
            })
    })
}

async fn exchange<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: &[u8],
) -> Result<T, Errors> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| not_connected(socket, &error))?;
    let (code, body) = send(stream, method, path, body)
        .await
        .map_err(|error| Error::failed(format!("the agent on {} broke off: {error}", socket.display())))?;
    if code != StatusCode::OK {
        return Err(refused(socket, code, &body));
    }
    serde_json::from_slice(&body).map_err(|error| {
        Error::failed(format!("the agent's answer is of another shape: {error}"))
            .hint("the agent is of another version: use its own binary, or restart it")
            .into()
    })
}

/// The agent's own words.
fn refused(socket: &Path, code: StatusCode, body: &[u8]) -> Errors {
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { errors }) => Errors(errors.into_iter().map(Error::from).collect()),
        Err(_) => Error::failed(format!("{} answers HTTP status {code}", socket.display()))
            .hint("is this the control socket of an agent?")
            .into(),
    }
}

fn request(method: Method, path: &str, body: &[u8]) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
    Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "agent")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::copy_from_slice(body)))
}

fn not_connected(socket: &Path, error: &io::Error) -> Error {
    let path = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::failed(format!(
            "no agent answers on {path}"
        ))
        .hint(
            "start one with `forwarder run -c FILE` or `systemctl start forwarder`; if its configuration has \
                 another agent.control_socket, name that with --socket",
        ),
        io::ErrorKind::PermissionDenied => Error::host(format!("no permission to ask the agent on {path}"))
            .hint("run this as root, as the user that the agent runs as, or as a member of its agent.control_group"),
        _ => Error::failed(format!("cannot ask the agent on {path}: {error}")),
    }
}

/// One request and its answer.
async fn send(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: &[u8],
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = request(method, path, body)?;
    let answer = async move {
        let answer = sender.send_request(request).await?;
        let code = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await?;
        Ok((code, body.to_bytes()))
    };
    // The connection moves the bytes; that it ends well or badly shows in the answer.
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{Request as Asked, STATUS_PATH, StatusSource, bind_control, serve_control},
        inspect::Inspection,
        status::{Status, testing::sample},
    };

    #[tokio::test]
    async fn the_agent_is_asked_over_its_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let (source, mut requests) = StatusSource::channel();
        let server = tokio::spawn(serve_control(
            bind_control(&path, None).unwrap(),
            source,
            Inspection::none(),
            std::future::pending(),
        ));
        let (answer, ()) = tokio::join!(exchange::<Status>(&path, Method::GET, STATUS_PATH, &[]), async {
            match requests.next().await.unwrap() {
                Asked::Status(reply) => reply.send(sample()),
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(answer.unwrap(), sample());

        // And its refusals arrive in its own words.
        drop(requests);
        assert_eq!(
            exchange::<Status>(&path, Method::GET, STATUS_PATH, &[])
                .await
                .map_err(first)
                .unwrap_err()
                .what,
            "the agent is stopping"
        );
        server.abort();
    }

    #[tokio::test]
    async fn without_an_agent_the_hint_says_how_to_start_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let missing = exchange::<Status>(&path, Method::GET, STATUS_PATH, &[])
            .await
            .map_err(first)
            .unwrap_err();
        assert_eq!(missing.what, format!("no agent answers on {}", path.display()));
        assert!(missing.hint.as_ref().unwrap().contains("forwarder run"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert_eq!(
            exchange::<Status>(&path, Method::GET, STATUS_PATH, &[])
                .await
                .map_err(first)
                .unwrap_err(),
            missing
        );
        let denied = not_connected(&path, &io::ErrorKind::PermissionDenied.into());
        assert_eq!(denied.exit_code, crate::error::EXIT_HOST);
        assert!(denied.hint.is_some());
    }
}
