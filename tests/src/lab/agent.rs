//! The gateway's agent, as systemd would run it: started, awaited by its readiness message, stopped.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::ExitStatus,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{
    Lab, Namespace, Process, Service,
    configuration::Configuration,
    status::{self, BackendStatus, Metrics, Status},
    tail,
};

/// Where the agent serves its metrics unless the configuration says otherwise, inside its namespace.
pub const METRICS_ADDRESS: &str = "127.0.0.1:9469";
/// From its start until the first round of health results is in; loading the programs takes most of it.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// The same on an emulated processor, which takes half a minute for the programs where others take one second.
const READY_DEADLINE_EMULATED: Duration = Duration::from_secs(120);
/// Set in a machine of the vm ring.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// From a signal to its end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How often to look whether the agent has ended while it is awaited.
const LOOK: Duration = Duration::from_millis(100);

/// Shows the agent's log if the test ends badly, before the lab and the log with it are gone.
#[derive(Debug)]
pub struct ShowLog {
    log: PathBuf,
    is_well: bool,
}

impl ShowLog {
    pub fn of(lab: &Lab) -> Self {
        Self {
            log: log(lab),
            is_well: false,
        }
    }

    /// The test has passed.
    pub fn all_is_well(mut self) {
        self.is_well = true;
    }
}

impl Drop for ShowLog {
    fn drop(&mut self) {
        if !self.is_well {
            println!("the agent's log ends so:\n{}", tail(&self.log, 60));
        }
    }
}

/// The running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    namespace: Namespace,
    files: Files,
    /// From its start to its readiness message.
    pub ready_after: Duration,
}

/// Where an agent of a lab has its files.
#[derive(Clone, Debug)]
struct Files {
    binary: PathBuf,
    configuration: PathBuf,
    control_socket: PathBuf,
    notify_socket: PathBuf,
    log: PathBuf,
}

impl Files {
    fn new(lab: &Lab, binary: &Path) -> Result<Self> {
        let directory = directory(lab);
        fs::create_dir_all(&directory)?;
        Ok(Self {
            binary: binary.to_owned(),
            configuration: directory.join("forwarder.toml"),
            control_socket: control_socket(lab),
            notify_socket: directory.join("notify.sock"),
            log: log(lab),
        })
    }
}

/// Where a lab's agent has its files: configuration, log and sockets.
pub fn directory(lab: &Lab) -> PathBuf {
    lab.directory().join("agent")
}

/// Where the configuration of a lab's agent has to put the control socket.
pub fn control_socket(lab: &Lab) -> PathBuf {
    directory(lab).join("control.sock")
}

/// The log of a lab's agent, whether or not it was started.
pub fn log(lab: &Lab) -> PathBuf {
    directory(lab).join("agent.log")
}

/// The agent's binary: `FORWARDER_BIN`, else `forwarder` beside this program or in the release folder
/// beside this program's.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FORWARDER_BIN") {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("FORWARDER_BIN names {}, which does not exist", path.display());
        }
        return Ok(path);
    }
    let own = std::env::current_exe()?;
    let folder = own.parent().context("a program lies in a folder")?;
    let candidates = [
        "forwarder",
        "../forwarder",
        "../release/forwarder",
        "../../release/forwarder",
    ];
    candidates
        .map(|name| folder.join(name))
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no `forwarder` beside {}: build it, or set FORWARDER_BIN",
                own.display()
            )
        })
}

impl Agent {
    /// Starts the agent in the gateway's namespace and waits until it says that it is ready.
    pub fn start(lab: &Lab, gateway: &Namespace, configuration: &Configuration) -> Result<Self> {
        Self::start_by(lab, gateway, configuration, &[])
    }

    /// As [`Self::start`], of a binary of one's own.
    pub fn start_binary(
        lab: &Lab,
        gateway: &Namespace,
        configuration: &Configuration,
        binary: &Path,
    ) -> Result<Self> {
        Self::start_as(lab, gateway, configuration, binary, &[])
    }

    /// As [`Self::start`], by a program that becomes the agent: `launcher` is it and its arguments, to which the
    /// agent's command line is added. Empty: none.
    pub fn start_by(
        lab: &Lab,
        gateway: &Namespace,
        configuration: &Configuration,
        launcher: &[&str],
    ) -> Result<Self> {
        Self::start_as(lab, gateway, configuration, &binary()?, launcher)
    }

    fn start_as(
        lab: &Lab,
        gateway: &Namespace,
        configuration: &Configuration,
        binary: &Path,
        launcher: &[&str],
    ) -> Result<Self> {
        let files = Files::new(lab, binary)?;
        // A full disk has no room for what is there already.
        let text = configuration.to_string();
        if fs::read_to_string(&files.configuration).ok().as_ref() != Some(&text) {
            fs::write(&files.configuration, text)?;
        }
        // A second agent of the same lab finds the first one's.
        let _ = fs::remove_file(&files.notify_socket);
        let notifications = UnixDatagram::bind(&files.notify_socket)?;
        notifications.set_read_timeout(Some(LOOK))?;
        // The agent may be another user.
        fs::set_permissions(&files.notify_socket, fs::Permissions::from_mode(0o777))?;
        let start = Instant::now();
        let mut words: Vec<&OsStr> = launcher.iter().map(OsStr::new).collect();
        words.extend([
            files.binary.as_os_str(),
            "run".as_ref(),
            "-c".as_ref(),
            files.configuration.as_ref(),
        ]);
        let service = Service {
            name: "the agent",
            program: Path::new(words[0]),
            arguments: &words[1..],
            environment: &[
                ("NOTIFY_SOCKET", files.notify_socket.as_ref()),
                // The log goes to a file that people read.
                ("FORWARDER_LOG_FORMAT", OsStr::new("text")),
                ("NO_COLOR", OsStr::new("1")),
            ],
            stop_signal: Signal::SIGTERM,
            log: &files.log,
        };
        let process = lab.spawn(gateway, &service)?;
        await_readiness(&process, &notifications)?;
        Ok(Self {
            process,
            namespace: gateway.clone(),
            files,
            ready_after: start.elapsed(),
        })
    }

    /// What `forwarder status -o json` says.
    pub fn status(&self) -> Result<Status> {
        let socket = self.files.control_socket.to_str().context("the path is text")?;
        let binary = self.files.binary.to_str().context("the path is text")?;
        let output = self
            .namespace
            .output(binary, &["status", "-o", "json", "--socket", socket])?;
        if !output.status.success() {
            bail!(
                "`forwarder status` failed ({}): {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        status::parse(&output.stdout)
    }

    /// The backends of a group.
    pub fn backends(&self, group: &str) -> Result<Vec<BackendStatus>> {
        status::backends(self.status()?, group)
    }

    /// One backend of a group.
    pub fn backend(&self, group: &str, name: &str) -> Result<BackendStatus> {
        let found = self
            .backends(group)?
            .into_iter()
            .find(|backend| backend.name == name);
        found.with_context(|| format!("no backend {name:?} in group {group:?} of the status"))
    }

    /// Packets that ended for a reason of the data path (`forwarder_common::abi::reason`).
    pub fn packets(&self, reason: &str) -> Result<u64> {
        let found = self.status()?.reasons.into_iter().find(|one| one.name == reason);
        Ok(found
            .with_context(|| format!("no reason {reason:?} in the status"))?
            .packets)
    }

    /// What Prometheus would scrape.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.namespace.run(&format!(
            "curl --silent --show-error --fail --max-time 5 http://{METRICS_ADDRESS}/metrics"
        ))?)
    }

    /// Runs a verb of the agent's program beside it, whatever its exit status is.
    pub fn verb(&self, arguments: &[&str]) -> Result<std::process::Output> {
        let binary = self.files.binary.to_str().context("the path is text")?;
        self.namespace.output(binary, arguments)
    }

    /// As [`Self::verb`], for those that talk to the agent.
    pub fn ask(&self, verb: &str, arguments: &[&str]) -> Result<std::process::Output> {
        let socket = self.files.control_socket.to_str().context("the path is text")?;
        let mut all = vec![verb, "--socket", socket];
        all.extend(arguments);
        self.verb(&all)
    }

    /// Writes another configuration to the file that the agent was started with.
    pub fn rewrite(&self, configuration: &Configuration) -> Result<()> {
        Ok(fs::write(&self.files.configuration, configuration.to_string())?)
    }

    /// The file that the agent was started with.
    pub fn configuration(&self) -> &Path {
        &self.files.configuration
    }

    /// Sends a signal that does not end it.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Sends a signal and returns how the agent ended.
    pub fn end(&self, signal: Signal) -> Result<ExitStatus> {
        self.process.signal(signal);
        // A second stop request changes nothing, and one that does not listen is killed.
        self.process.wait(STOP_DEADLINE).map_or_else(|| self.stop(), Ok)
    }

    /// Stops it with SIGTERM, as systemd does, and returns how it ended.
    pub fn stop(&self) -> Result<ExitStatus> {
        self.process.stop()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.process.ended()
    }

    /// Its log so far.
    pub fn log(&self) -> &Path {
        &self.files.log
    }

    pub fn control_socket(&self) -> &Path {
        &self.files.control_socket
    }

    pub fn binary(&self) -> &Path {
        &self.files.binary
    }
}

/// Waits for `READY=1` (`sd_notify(3)`) or the end of the process.
fn await_readiness(process: &Process, notifications: &UnixDatagram) -> Result<()> {
    let start = Instant::now();
    let mut message = [0; 4096];
    let deadline = match env::var_os(MACHINE_VARIABLE) {
        Some(_) => READY_DEADLINE_EMULATED,
        None => READY_DEADLINE,
    };
    while start.elapsed() < deadline {
        match notifications.recv(&mut message) {
            Ok(length) => {
                if message[..length]
                    .split(|byte| *byte == b'\n')
                    .any(|line| line == b"READY=1")
                {
                    return Ok(());
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if let Some(status) = process.ended() {
                    bail!(
                        "the agent ended with {status} instead of getting ready:\n{}",
                        tail(process.log(), 20)
                    );
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!(
        "the agent was not ready after {} s:\n{}",
        deadline.as_secs(),
        tail(process.log(), 20)
    )
}
