//! The control API over TCP, for readers: off unless `[agent.api]` is written, and then only for who has a client
//! certificate of the configured authority, or the token, or both where both are configured.
//!
//! Only GET is answered: nothing can be changed from afar, and packets are explained on the host. Without TLS a token
//! is taken on a loopback address only, which the configuration's checks see to.
//!
//! Certificates and token are read at start, and again whenever a configuration is applied, so that renewed ones need no
//! restart. What a file lacks then is an error of that change, and the old ones go on.

use std::{
    fs,
    future::{Future, pending},
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{Request, State},
    http::{Method, header::AUTHORIZATION},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    serve::Listener,
};
use subtle::ConstantTimeEq;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
    server::TlsStream,
};
use tracing::debug;

use super::{
    ErrorCode, Refusal, StatusSource,
    public::{in_runtime, listen},
    serve, service,
};
use crate::{
    config::{RemoteApi, RemoteTls},
    error::Error,
    inspect::Inspection,
};

/// Shortest token, in bytes: 128 bits as hexadecimal digits.
const MIN_TOKEN_BYTES: usize = 32;
/// How long a client may take to agree on TLS.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients that agree on TLS at a time; others wait to be accepted.
const HANDSHAKES: usize = 64;
/// After this long the next connection is tried when one could not be accepted, for want of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// The bits of a file's mode that let others than its owner and group read or write it.
const OTHERS: u32 = 0o007;

/// The bound address, with what clients have to show, as of the last change.
pub struct RemoteListener {
    listener: std::net::TcpListener,
    credentials: watch::Receiver<Credentials>,
}

/// What clients have to show, and what they are shown.
#[derive(Clone)]
pub struct Credentials {
    tls: Option<TlsAcceptor>,
    token: Option<Token>,
}

impl Credentials {
    /// Reads certificates and token.
    ///
    /// # Errors
    /// A file is not what it should be.
    pub fn read(remote: &RemoteApi) -> Result<Self, Error> {
        Ok(Self {
            tls: remote.tls.as_ref().map(acceptor).transpose()?,
            token: remote.token_file.as_deref().map(Token::read).transpose()?,
        })
    }
}

/// What a client without a certificate has to know.
#[derive(Clone)]
struct Token(Arc<[u8]>);

impl Token {
    /// # Errors
    /// The file can't be read, others may read it, or what it holds can be guessed.
    fn read(file: &Path) -> Result<Self, Error> {
        let failed = |error: io::Error| {
            Error::host(format!(
                "agent.api.token_file: cannot read {}: {error}",
                file.display()
            ))
            .hint("check the path, and that the agent's user may read it")
        };
        let mode = fs::metadata(file).map_err(failed)?.permissions().mode();
        if mode & OTHERS != 0 {
            return Err(Error::host(format!(
                "agent.api.token_file: everybody may read {}",
                file.display()
            ))
            .hint(format!("`chmod 0600 {}`, and write a new token", file.display())));
        }
        let text = fs::read_to_string(file).map_err(failed)?;
        let token = text.trim();
        if token.len() < MIN_TOKEN_BYTES {
            return Err(Error::host(format!(
                "agent.api.token_file: the token in {} has less than {MIN_TOKEN_BYTES} characters",
                file.display()
            ))
            .hint("`openssl rand -hex 32` makes one"));
        }
        Ok(Self(token.as_bytes().into()))
    }

    /// Does a request show it (RFC 6750 §2.1)? Takes as long for a wrong one as for the right one.
    fn is_shown_by(&self, request: &Request) -> bool {
        let shown = request.headers().get(AUTHORIZATION).and_then(|value| {
            let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        shown.is_some_and(|shown| shown.as_bytes().ct_eq(&self.0).into())
    }
}

/// Takes the address, and reads certificates and token; newer ones are sent to the second.
///
/// # Errors
/// The address is in use or not of this host, or a file is not what it should be.
pub fn bind_remote(remote: &RemoteApi) -> Result<(RemoteListener, watch::Sender<Credentials>), Error> {
    let (sender, credentials) = watch::channel(Credentials::read(remote)?);
    let listener = listen(remote.listen, "the API", "agent.api.listen")?;
    let listener = RemoteListener {
        listener,
        credentials,
    };
    Ok((listener, sender))
}

fn acceptor(tls: &RemoteTls) -> Result<TlsAcceptor, Error> {
    let unusable = |key: &str, file: &Path, why: &dyn std::fmt::Display| {
        Error::host(format!("agent.api.{key}: cannot use {}: {why}", file.display()))
            .hint("a PEM file that the agent's user may read")
    };
    let certificates = |key: &str, file: &Path| {
        CertificateDer::pem_file_iter(file)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| unusable(key, file, &error))
    };
    let chain = certificates("certificate", &tls.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| unusable("key", &tls.key, &error))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::failed(format!("cannot set TLS up: {error}")))?;
    let builder = match &tls.client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates("client_ca", file)? {
                roots
                    .add(authority)
                    .map_err(|error| unusable("client_ca", file, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unusable("client_ca", file, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let settings = builder
        .with_single_cert(chain, key)
        .map_err(|error| unusable("certificate", &tls.certificate, &error))?;
    Ok(TlsAcceptor::from(Arc::new(settings)))
}

/// Serves readers until `stop` completes.
///
/// # Errors
/// The listener fails for good.
pub async fn serve_remote(
    remote: RemoteListener,
    source: StatusSource,
    inspection: Inspection,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let RemoteListener {
        listener,
        credentials,
    } = remote;
    let listener = in_runtime(listener)?;
    // The last layer is the first that a request meets.
    let app = service(source, inspection)
        .layer(middleware::from_fn(only_reading))
        .layer(middleware::from_fn_with_state(
            credentials.clone(),
            only_with_token,
        ));
    // Whether there is TLS does not change: that would be another `[agent.api]`, which takes a restart.
    let has_tls = credentials.borrow().tls.is_some();
    if has_tls {
        serve(TlsListener::start(listener, credentials), app, stop).await
    } else {
        serve(listener, app, stop).await
    }
}

async fn only_reading(request: Request, next: Next) -> Response {
    if [Method::GET, Method::HEAD].contains(request.method()) {
        return next.run(request).await;
    }
    let what = format!("{} is not possible from afar", request.method());
    let hint = "nothing can be changed here; ask the control socket, on the agent's host";
    Refusal::new(ErrorCode::MethodNotAllowed, what, Some(hint)).into_response()
}

async fn only_with_token(
    State(credentials): State<watch::Receiver<Credentials>>,
    request: Request,
    next: Next,
) -> Response {
    let token = credentials.borrow().token.clone();
    if token.is_none_or(|token| token.is_shown_by(&request)) {
        return next.run(request).await;
    }
    let hint = "send `Authorization: Bearer TOKEN` with what is in agent.api.token_file";
    Refusal::new(
        ErrorCode::Unauthorized,
        "the token is missing or wrong",
        Some(hint),
    )
    .into_response()
}

/// Connections whose TLS has been agreed on. Clients that dawdle over that hold up nobody else.
struct TlsListener {
    address: io::Result<SocketAddr>,
    agreed: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    /// Ends with this.
    _task: JoinSet<()>,
}

impl TlsListener {
    fn start(listener: TcpListener, credentials: watch::Receiver<Credentials>) -> Self {
        let address = listener.local_addr();
        let (sender, agreed) = mpsc::channel(HANDSHAKES);
        let mut task = JoinSet::new();
        task.spawn(agree(listener, credentials, sender));
        Self {
            address,
            agreed,
            _task: task,
        }
    }
}

async fn agree(
    listener: TcpListener,
    credentials: watch::Receiver<Credentials>,
    sender: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!(%error, "a connection to the API could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while handshakes.try_join_next().is_some() {}
        let Some(acceptor) = credentials.borrow().tls.clone() else {
            continue;
        };
        let sender = sender.clone();
        handshakes.spawn(async move {
            let _place = place;
            match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                // Without a receiver the server has ended.
                Ok(Ok(session)) => drop(sender.send((session, peer)).await),
                Ok(Err(error)) => debug!(%peer, %error, "no TLS with a client of the API"),
                Err(_) => debug!(%peer, "a client of the API did not finish its TLS handshake"),
            }
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        match self.agreed.recv().await {
            Some(session) => session,
            // The task goes on as long as this does.
            None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.address {
            Ok(address) => Ok(*address),
            Err(error) => Err(error.kind().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, path::PathBuf};

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tempfile::TempDir;
    use tokio_rustls::{
        TlsConnector,
        rustls::{ClientConfig, pki_types::ServerName},
    };

    use super::{
        super::testing::{answer_all, exchange},
        *,
    };

    const TOKEN: &str = "00112233445566778899aabbccddeeff";

    fn token_file(directory: &TempDir, mode: u32) -> PathBuf {
        let file = directory.path().join("token");
        fs::write(&file, format!("{TOKEN}\n")).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        file
    }

    /// Serves until the test ends.
    fn serve(remote: &RemoteApi) -> (SocketAddr, watch::Sender<Credentials>) {
        let (listener, credentials) = bind_remote(remote).unwrap();
        let address = listener.listener.local_addr().unwrap();
        let (source, requests) = StatusSource::channel();
        answer_all(requests);
        tokio::spawn(serve_remote(listener, source, Inspection::none(), pending()));
        (address, credentials)
    }

    fn remote(token_file: Option<PathBuf>, tls: Option<RemoteTls>) -> RemoteApi {
        RemoteApi {
            listen: "127.0.0.1:0".parse().unwrap(),
            token_file,
            tls,
        }
    }

    #[tokio::test]
    async fn who_knows_the_token_may_read_and_change_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (address, _credentials) = serve(&remote(Some(token_file(&directory, 0o600)), None));
        let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
        for (line, more, status) in [
            ("GET /v1/status", bearer.as_str(), "200"),
            ("GET /v1/openapi.json", &bearer, "200"),
            ("GET /v1/status", "", "401"),
            ("GET /v1/status", "Authorization: Bearer 0011\r\n", "401"),
            (
                "GET /v1/status",
                &format!("Authorization: Basic {TOKEN}\r\n"),
                "401",
            ),
            // Without the token nothing is told, not even what there is.
            ("GET /v1/nothing", "", "401"),
            ("POST /v1/apply", &bearer, "405"),
            ("DELETE /v1/flows?all=true", &bearer, "405"),
        ] {
            let stream = TcpStream::connect(address).await.unwrap();
            let (head, body) = exchange(stream, line, more).await;
            assert!(
                head.starts_with(&format!("http/1.1 {status}")),
                "{line} {more:?}: {head}"
            );
            assert!(serde_json::from_str::<serde_json::Value>(&body).is_ok(), "{body}");
        }
    }

    #[tokio::test]
    async fn a_new_token_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = token_file(&directory, 0o600);
        let remote = remote(Some(file.clone()), None);
        let (address, credentials) = serve(&remote);
        let ask = async |token: &str| {
            let stream = TcpStream::connect(address).await.unwrap();
            let bearer = format!("Authorization: Bearer {token}\r\n");
            exchange(stream, "GET /v1/openapi.json", &bearer).await.0
        };
        let newer = "ffeeddccbbaa99887766554433221100";
        fs::write(file, newer).unwrap();
        assert!(
            ask(TOKEN).await.starts_with("http/1.1 200"),
            "not read before it is asked for"
        );
        credentials.send_replace(Credentials::read(&remote).unwrap());
        assert!(ask(TOKEN).await.starts_with("http/1.1 401"));
        assert!(ask(newer).await.starts_with("http/1.1 200"));
    }

    #[tokio::test]
    async fn a_token_that_others_can_read_or_guess_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = token_file(&directory, 0o604);
        let refused = |file: &Path| match bind_remote(&remote(Some(file.to_owned()), None)) {
            Err(error) => error.what,
            Ok(_) => panic!("taken"),
        };
        assert!(refused(&file).contains("everybody may read"));
        let file = token_file(&directory, 0o600);
        fs::write(&file, "secret\n").unwrap();
        assert!(refused(&file).contains("less than 32 characters"));
        assert!(refused(Path::new("/nonexistent")).contains("cannot read /nonexistent"));
    }

    /// An authority, and what it has certified for a name: PEM files of certificate and key.
    struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn certify(&self, name: &str) -> (String, KeyPair) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([name.to_owned()]).unwrap();
            (params.signed_by(&key, &self.0).unwrap().pem(), key)
        }
    }

    /// A client that trusts `server`, with a certificate of `own` if there is one.
    fn client(server: &Authority, own: Option<&Authority>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(server.0.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let settings = match own {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let (certificate, key) = authority.certify("reader");
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(settings))
    }

    #[tokio::test]
    async fn only_a_certificate_of_the_configured_authority_is_let_in() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = directory.path().join(name);
            fs::write(&file, text).unwrap();
            file
        };
        let (ours, theirs) = (Authority::new(), Authority::new());
        let (certificate, key) = ours.certify("localhost");
        let tls = RemoteTls {
            certificate: write("server.pem", &certificate),
            key: write("server.key", &key.serialize_pem()),
            client_ca: Some(write("ca.pem", &ours.0.pem())),
        };
        let remote = remote(None, Some(tls));
        let (address, credentials) = serve(&remote);
        // A client that says nothing holds up nobody.
        let _silent = TcpStream::connect(address).await.unwrap();
        let ask = async |connector: TlsConnector| {
            let stream = TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from("localhost").unwrap();
            let mut session = connector.connect(name, stream).await?;
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            session
                .write_all(b"GET /v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                .await?;
            let mut answer = String::new();
            session.read_to_string(&mut answer).await?;
            io::Result::Ok(answer)
        };
        let answer = ask(client(&ours, Some(&ours))).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        ask(client(&ours, None)).await.unwrap_err();
        ask(client(&ours, Some(&theirs))).await.unwrap_err();

        // The authority of the readers is another one from now on.
        write("ca.pem", &theirs.0.pem());
        credentials.send_replace(Credentials::read(&remote).unwrap());
        ask(client(&ours, Some(&ours))).await.unwrap_err();
        ask(client(&ours, Some(&theirs))).await.unwrap();
    }
}
