//! Ring 3: who may ask a running agent, and for what: members of `control_group` on its socket, readers with a
//! certificate and the token over TCP. `--test-threads=1`, as the other labs.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lab, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    topology::{Extras, Site},
    wait_until,
};
use nix::{sys::signal::Signal, unistd::Group};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);
/// The gateway's address on the clients' network, with a port of ours.
const REMOTE: &str = "172.16.0.1:9470";
const LOOPBACK: &str = "127.0.0.1:9470";
const TOKEN: &str = "00112233445566778899aabbccddeeff";
const NEXT_TOKEN: &str = "ffeeddccbbaa99887766554433221100";
/// A user and a group that every Debian has; the user is not in the group.
const USER: &str = "65534";
const GROUP: &str = "daemon";

/// Runs `test` with an agent whose configuration `prepare` has finished.
fn play(
    prepare: impl FnOnce(&Site, Configuration) -> Result<Configuration>,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let configuration = prepare(&site, site.web_configuration())?;
    let agent = site.start_agent(&configuration, "web")?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// Writes a file that only its owner may read.
fn write(lab: &Lab, name: &str, text: &str) -> Result<PathBuf> {
    let file = lab.directory().join(name);
    fs::write(&file, text)?;
    fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    Ok(file)
}

fn quoted(file: &Path) -> String {
    format!("\"{}\"", file.display())
}

/// Somebody who certifies.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// Writes certificate and key of a name or an address.
    fn certify(&self, lab: &Lab, file: &str, name: &str) -> Result<(PathBuf, PathBuf)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([name.to_owned()])?;
        // Without a name of its own it would look like the authority's own certificate.
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.0)?;
        Ok((
            write(lab, &format!("{file}.pem"), &certificate.pem())?,
            write(lab, &format!("{file}.key"), &key.serialize_pem())?,
        ))
    }
}

/// What came of a request: the HTTP status, or 0 without an answer; and the body, or what curl says instead.
fn ask(from: &Namespace, url: &str, arguments: &[&str]) -> Result<(u16, String)> {
    let mut all = vec![
        "--silent",
        "--show-error",
        "--max-time",
        "5",
        "--write-out",
        "\n%{http_code}",
    ];
    all.extend(arguments);
    all.push(url);
    let output = from.output("curl", &all)?;
    let text = String::from_utf8(output.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("curl says the status last")?;
    let status = status.parse()?;
    Ok(match status {
        0 => (0, String::from_utf8_lossy(&output.stderr).into_owned()),
        _ => (status, body.to_owned()),
    })
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}")
}

#[test]
fn readers_over_tcp_need_certificate_and_token_and_change_nothing() -> Result<()> {
    let (ours, theirs) = (Authority::new()?, Authority::new()?);
    let address = REMOTE.rsplit_once(':').context("address and port")?.0;
    play(
        |site, configuration| {
            let lab = &site.lab;
            let (certificate, key) = ours.certify(lab, "server", address)?;
            let readers = write(lab, "readers.pem", &ours.0.pem())?;
            let token = write(lab, "token", TOKEN)?;
            Ok(configuration.table(
                "agent.api",
                &[
                    ("listen", &format!("\"{REMOTE}\"")),
                    ("token_file", &quoted(&token)),
                    ("certificate", &quoted(&certificate)),
                    ("key", &quoted(&key)),
                    ("client_ca", &quoted(&readers)),
                ],
            ))
        },
        |site, agent| {
            let lab = &site.lab;
            let trusted = write(lab, "ca.pem", &ours.0.pem())?;
            let identity = |authority: &Authority, file: &str| -> Result<Vec<String>> {
                let (certificate, key) = authority.certify(lab, file, "reader")?;
                let words = ["--cacert", "--cert", "--key"];
                let files = [&trusted, &certificate, &key];
                Ok(words
                    .iter()
                    .zip(files)
                    .flat_map(|(word, file)| [(*word).to_owned(), file.display().to_string()])
                    .collect())
            };
            let (our_reader, their_reader) = (identity(&ours, "ours")?, identity(&theirs, "theirs")?);
            let nobody = &our_reader[..2];
            let get = |identity: &[String], path: &str, more: &[&str]| {
                let mut arguments: Vec<&str> = identity.iter().map(String::as_str).collect();
                arguments.extend(more);
                ask(site.client(), &format!("https://{REMOTE}{path}"), &arguments)
            };
            let token = bearer(TOKEN);

            // From another host: what the socket says.
            let (status, body) = get(&our_reader, "/v1/status", &["-H", &token])?;
            ensure!(status == 200, "{status}: {body}");
            let body: Value = serde_json::from_str(&body)?;
            ensure!(body["groups"][0]["name"] == "web", "{body}");
            ensure!(get(&our_reader, "/v1/flows?limit=1", &["-H", &token])?.0 == 200);

            let wrong = bearer(NEXT_TOKEN);
            let order = r#"{"group": "web", "backend": "ecs01", "order": "drain"}"#;
            for (what, identity, path, more, expected) in [
                ("no token", &*our_reader, "/v1/status", vec![], 401),
                (
                    "a wrong token",
                    &our_reader,
                    "/v1/status",
                    vec!["-H", &wrong],
                    401,
                ),
                ("no certificate", nobody, "/v1/status", vec!["-H", &token], 0),
                (
                    "another's certificate",
                    &their_reader,
                    "/v1/status",
                    vec!["-H", &token],
                    0,
                ),
                (
                    "an order",
                    &our_reader,
                    "/v1/backend",
                    vec!["-H", &token, "--json", order],
                    405,
                ),
                (
                    "a configuration",
                    &our_reader,
                    "/v1/apply",
                    vec!["-H", &token, "--json", "{}"],
                    405,
                ),
                (
                    "a packet",
                    &our_reader,
                    "/v1/explain",
                    vec!["-H", &token, "--json", "{}"],
                    405,
                ),
                (
                    "a deletion",
                    &our_reader,
                    "/v1/flows?all=true",
                    vec!["-H", &token, "-X", "DELETE"],
                    405,
                ),
            ] {
                let (status, body) = get(identity, path, &more)?;
                ensure!(status == expected, "{what}: {status} {body}");
            }
            ensure!(
                agent.backend("web", "ecs01")?.drain.is_none(),
                "the order was refused"
            );

            // Renewed files are taken over by a reload: other readers, another token.
            fs::write(lab.directory().join("readers.pem"), theirs.0.pem())?;
            fs::write(lab.directory().join("token"), NEXT_TOKEN)?;
            ensure!(
                get(&our_reader, "/v1/status", &["-H", &token])?.0 == 200,
                "nobody has told the agent yet"
            );
            agent.signal(Signal::SIGHUP);
            wait_until("the new reader to be let in", DEADLINE, || {
                let (status, _) = get(&their_reader, "/v1/status", &["-H", &wrong])?;
                ensure!(status == 200, "{status}");
                Ok(())
            })?;
            ensure!(
                get(&our_reader, "/v1/status", &["-H", &wrong])?.0 == 0,
                "the old reader"
            );
            ensure!(
                get(&their_reader, "/v1/status", &["-H", &token])?.0 == 401,
                "the old token"
            );

            // What cannot be used is refused, with everything else of that change, and the old goes on.
            fs::set_permissions(lab.directory().join("token"), Permissions::from_mode(0o604))?;
            let file = agent.configuration().to_str().context("the path is text")?;
            let output = agent.ask("apply", &["-c", file])?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                !output.status.success() && said.contains("everybody may read"),
                "{}: {said}",
                output.status
            );
            ensure!(get(&their_reader, "/v1/status", &["-H", &wrong])?.0 == 200);
            ensure!(agent.status()?.agent.changes.refused == 1);
            ensure!(agent.status()?.agent.changes.times.count() == 1);
            Ok(())
        },
    )
}

#[test]
fn on_loopback_a_token_is_enough_and_on_the_socket_membership() -> Result<()> {
    play(
        |site, configuration| {
            let token = write(&site.lab, "token", TOKEN)?;
            Ok(configuration
                .agent_key("control_group", &format!("\"{GROUP}\""))
                .table(
                    "agent.api",
                    &[
                        ("listen", &format!("\"{LOOPBACK}\"")),
                        ("token_file", &quoted(&token)),
                    ],
                ))
        },
        |site, agent| {
            let gateway = &site.gateway;
            let url = format!("http://{LOOPBACK}/v1/status");
            ensure!(ask(gateway, &url, &["-H", &bearer(TOKEN)])?.0 == 200);
            ensure!(ask(gateway, &url, &[])?.0 == 401);
            ensure!(ask(gateway, &url, &["-H", &bearer(NEXT_TOKEN)])?.0 == 401);
            ensure!(ask(gateway, &url, &["-H", &bearer(TOKEN), "-X", "POST"])?.0 == 405);

            let socket = agent.control_socket();
            // The lab's own directories are not in question here.
            for directory in socket.ancestors().skip(1).take(2) {
                fs::set_permissions(directory, Permissions::from_mode(0o755))?;
            }
            ensure!(fs::metadata(socket)?.permissions().mode() & 0o777 == 0o660);
            let socket = socket.to_str().context("the path is text")?;
            let gid = Group::from_name(GROUP)?.context("the group exists")?.gid;
            let as_user = |group: &str, order: &str| {
                let output = gateway.output(
                    "setpriv",
                    &[
                        "--reuid",
                        USER,
                        "--regid",
                        group,
                        "--clear-groups",
                        "curl",
                        "--silent",
                        "--fail",
                        "--max-time",
                        "5",
                        "--unix-socket",
                        socket,
                        "http://localhost/v1/backend",
                        "--json",
                        order,
                    ],
                )?;
                anyhow::Ok(output.status.success())
            };
            let order = |what: &str| format!(r#"{{"group": "web", "backend": "ecs01", "order": "{what}"}}"#);
            ensure!(!as_user(USER, &order("drain"))?, "a stranger gave an order");
            ensure!(agent.backend("web", "ecs01")?.drain.is_none());
            ensure!(
                as_user(&gid.to_string(), &order("drain"))?,
                "a member could not give one"
            );
            ensure!(agent.backend("web", "ecs01")?.drain.is_some());
            ensure!(as_user(&gid.to_string(), &order("undrain"))?);
            Ok(())
        },
    )
}
