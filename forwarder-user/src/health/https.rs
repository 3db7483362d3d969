//! The HTTPS probe: the HTTP probe inside a TLS session (1.2 or 1.3).
//!
//! As with the cloud products, the server's certificate is not looked at unless the check says so: the probe asks
//! whether the server works, and servers behind a balancer often have certificates for names that only the
//! balancer knows. The name that the session asks for (SNI) is the check's host, without one there is none, as an
//! address may not stand there (RFC 6066 §3).
//!
//! Sessions are resumed where the server allows it, which spares both sides most of the arithmetic. The settings of a
//! session are made once per kind of trust and kept; those of a file are made anew when the file has changed.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    },
};

use super::{
    failure::{ProbeFailure, Stage},
    http,
    origin::Origin,
    tcp,
};
use crate::config::{HttpProbe, Trust};

/// Settings of sessions, made when first needed.
#[derive(Debug, Default)]
pub(super) struct Settings(Mutex<HashMap<Trust, Made>>);

/// When the file that they are made from was changed last, if there is one, and the settings.
type Made = (Option<SystemTime>, Arc<ClientConfig>);

impl Settings {
    async fn of(&self, trust: &Trust) -> Result<Arc<ClientConfig>, ProbeFailure> {
        let changed = match trust {
            Trust::File(file) => modified(file)?,
            Trust::Anyone | Trust::Host => None,
        };
        let mut known = self.0.lock().await;
        if let Some((of, settings)) = known.get(trust)
            && *of == changed
        {
            return Ok(settings.clone());
        }
        let wanted = trust.clone();
        let made = spawn_blocking(move || settings(&wanted)).await;
        let made = Arc::new(made.map_err(|error| ProbeFailure::CannotProbe(error.to_string()))??);
        known.insert(trust.clone(), (changed, made.clone()));
        Ok(made)
    }
}

fn unreadable(file: &Path, why: impl std::fmt::Display) -> ProbeFailure {
    ProbeFailure::CannotProbe(format!("certificate authorities in {}: {why}", file.display()))
}

fn modified(file: &Path) -> Result<Option<SystemTime>, ProbeFailure> {
    let metadata = std::fs::metadata(file).map_err(|error| unreadable(file, error))?;
    Ok(metadata.modified().ok())
}

fn settings(trust: &Trust) -> Result<ClientConfig, ProbeFailure> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| ProbeFailure::CannotProbe(error.to_string()))?;
    let authorities = match trust {
        Trust::Anyone => {
            return Ok(builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
                .with_no_client_auth());
        }
        Trust::Host => {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                let why = found.errors.first().map(ToString::to_string);
                return Err(ProbeFailure::CannotProbe(format!(
                    "this host has no certificate authorities: {}",
                    why.as_deref().unwrap_or("none found")
                )));
            }
            found.certs
        }
        Trust::File(file) => CertificateDer::pem_file_iter(file)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| unreadable(file, error))?,
    };
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(authorities);
    if let (0, Trust::File(file)) = (taken, trust) {
        return Err(unreadable(file, "there is none"));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Accepts every certificate. Signatures are checked all the same: a server that cannot sign serves nobody.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Sends the request of `check` to `target` from `origin` inside TLS and looks at the answer; see
/// [`http::probe`]. `limit` covers the TLS handshake too.
pub(super) async fn probe(
    target: SocketAddr,
    origin: &Origin,
    limit: Duration,
    check: &HttpProbe,
    trust: &Trust,
    settings: &Settings,
) -> Result<Duration, ProbeFailure> {
    let settings = settings.of(trust).await?;
    let request = http::request(target, check)?;
    let start = Instant::now();
    let stream = tcp::connect(target, origin, start, limit).await?;
    let handshake = TlsConnector::from(settings).connect(server_name(target, check), stream);
    let session = timeout_at(start + limit, handshake)
        .await
        .map_err(|_elapsed| ProbeFailure::TimedOut {
            stage: Stage::Tls,
            after: limit,
        })?
        .map_err(|error| failure(&error, start.elapsed()))?;
    http::exchange(session, start, limit, request, check).await
}

/// Who the server has to be: the check's host without its port, or the address that is probed.
fn server_name(target: SocketAddr, check: &HttpProbe) -> ServerName<'static> {
    let name = check.host.as_deref().map(|host| match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    });
    name.and_then(|name| ServerName::try_from(name.to_owned()).ok())
        .unwrap_or_else(|| ServerName::from(target.ip()))
}

/// What ended the handshake: TLS itself, or the connection below it.
fn failure(error: &std::io::Error, after: Duration) -> ProbeFailure {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(tls) => ProbeFailure::Tls(tls.to_string()),
        None => ProbeFailure::from_io(error, Stage::Tls, after),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, net::IpAddr};

    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinHandle,
    };
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{
            ServerConfig,
            pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
        },
    };

    use super::*;
    use crate::health::testing::{LOOPBACK, Server, get, loopback, refusing};

    const LIMIT: Duration = Duration::from_secs(5);

    /// A server with a certificate of its own for `names`.
    struct Tls {
        address: SocketAddr,
        certificate: String,
        /// The name that each session asked for.
        task: JoinHandle<Vec<Option<String>>>,
    }

    impl Tls {
        /// Serves `sessions` sessions, failed ones included.
        async fn serve(names: &[&str], sessions: usize) -> Self {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
            let settings = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![cert.der().clone()], key)
                .unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(settings));
            let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            let task = tokio::spawn(async move {
                let mut asked = Vec::new();
                for _ in 0..sessions {
                    let (stream, _) = listener.accept().await.unwrap();
                    let Ok(mut session) = acceptor.accept(stream).await else {
                        asked.push(None);
                        continue;
                    };
                    asked.push(session.get_ref().1.server_name().map(str::to_owned));
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(session.read_u8().await.unwrap());
                    }
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
                    session.write_all(answer).await.unwrap();
                    session.shutdown().await.unwrap();
                }
                asked
            });
            Self {
                address,
                certificate: cert.pem(),
                task,
            }
        }

        async fn ask(&self, host: Option<&str>, trust: &Trust) -> Result<Duration, ProbeFailure> {
            let check = HttpProbe {
                host: host.map(str::to_owned),
                ..get("/")
            };
            probe(
                self.address,
                &loopback(),
                LIMIT,
                &check,
                trust,
                &Settings::default(),
            )
            .await
        }
    }

    #[tokio::test]
    async fn any_certificate_will_do_unless_told_otherwise() {
        let server = Tls::serve(&["unknown.example"], 1).await;
        server.ask(None, &Trust::Anyone).await.unwrap();
        assert_eq!(server.task.await.unwrap(), [None], "an address is no server name");
    }

    #[tokio::test]
    async fn the_server_is_asked_for_by_the_name_of_the_check() {
        let server = Tls::serve(&["shop.example"], 2).await;
        server.ask(Some("shop.example"), &Trust::Anyone).await.unwrap();
        server
            .ask(Some("shop.example:8443"), &Trust::Anyone)
            .await
            .unwrap();
        let asked = server.task.await.unwrap();
        assert_eq!(
            asked,
            [Some("shop.example".to_owned()), Some("shop.example".to_owned())]
        );
    }

    #[tokio::test]
    async fn a_certificate_has_to_be_signed_by_the_file_and_for_the_name() {
        let server = Tls::serve(&["shop.example"], 4).await;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        fs::write(&file, &server.certificate).unwrap();
        let trust = Trust::File(file.clone());
        server.ask(Some("shop.example"), &trust).await.unwrap();

        let failure = server.ask(Some("other.example"), &trust).await.unwrap_err();
        assert!(
            matches!(&failure, ProbeFailure::Tls(why) if why.contains("not valid for name")),
            "{failure:?}"
        );
        // Nobody that this host trusts has signed it, if this host trusts anybody.
        let failure = server.ask(Some("shop.example"), &Trust::Host).await.unwrap_err();
        assert!(
            matches!(failure, ProbeFailure::Tls(_) | ProbeFailure::CannotProbe(_)),
            "{failure:?}"
        );
        let stranger = generate_simple_self_signed(["shop.example".to_owned()]).unwrap();
        fs::write(&file, stranger.cert.pem()).unwrap();
        let failure = server.ask(Some("shop.example"), &trust).await.unwrap_err();
        assert!(matches!(failure, ProbeFailure::Tls(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn a_changed_file_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        let trust = Trust::File(file.clone());
        let settings = Settings::default();
        let gone = settings.of(&trust).await.unwrap_err();
        assert!(gone.is_local(), "{gone:?}");
        fs::write(&file, "nothing").unwrap();
        assert!(settings.of(&trust).await.unwrap_err().is_local());

        let signed = generate_simple_self_signed(["a.example".to_owned()]).unwrap();
        fs::write(&file, signed.cert.pem()).unwrap();
        let first = settings.of(&trust).await.unwrap();
        assert!(Arc::ptr_eq(&first, &settings.of(&trust).await.unwrap()));
        let later = fs::metadata(&file).unwrap().modified().unwrap() + Duration::from_secs(2);
        fs::File::options()
            .write(true)
            .open(&file)
            .and_then(|file| file.set_modified(later))
            .unwrap();
        assert!(!Arc::ptr_eq(&first, &settings.of(&trust).await.unwrap()));
    }

    #[tokio::test]
    async fn a_server_without_tls_is_named() {
        let server = Server::greet(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let settings = Settings::default();
        let failure = probe(
            server.address,
            &loopback(),
            LIMIT,
            &get("/"),
            &Trust::Anyone,
            &settings,
        )
        .await
        .unwrap_err();
        assert!(matches!(failure, ProbeFailure::Tls(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn silence_in_the_handshake_and_refusal_are_told_apart() {
        let server = Server::read_to_end().await;
        let settings = Settings::default();
        let limit = Duration::from_millis(100);
        let outcome = probe(
            server.address,
            &loopback(),
            limit,
            &get("/"),
            &Trust::Anyone,
            &settings,
        )
        .await;
        assert_eq!(
            outcome,
            Err(ProbeFailure::TimedOut {
                stage: Stage::Tls,
                after: limit
            })
        );
        let outcome = probe(
            refusing(),
            &loopback(),
            LIMIT,
            &get("/"),
            &Trust::Anyone,
            &settings,
        )
        .await;
        assert_eq!(outcome, Err(ProbeFailure::Refused));
    }

    #[test]
    fn the_server_is_the_host_without_its_port_or_the_address() {
        let target = SocketAddr::new(IpAddr::from([10, 0, 0, 1]), 443);
        let of = |host: Option<&str>| {
            let check = HttpProbe {
                host: host.map(str::to_owned),
                ..get("/")
            };
            server_name(target, &check).to_str().into_owned()
        };
        assert_eq!(of(Some("a.example:8443")), "a.example");
        assert_eq!(of(None), "10.0.0.1");
        assert_eq!(of(Some("10.0.0.2")), "10.0.0.2");
    }
}
