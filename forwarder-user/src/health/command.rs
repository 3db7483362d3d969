//! The probe by command: a program of this host, whose exit status decides.
//!
//! It is run without a shell, with an environment of its own: `PATH` as the agent has it, and who is probed and from
//! where. It is the agent's user, but has no capability, and can get none (`privileges`). The program leads a process group; when the probe ends, however that is, the
//! whole group is killed, so that neither a hanging child nor one that was left in the background remains.
//!
//! The end of the program is awaited without collecting it (`WNOWAIT`): until it is collected its number belongs to
//! no other process, so that the kill meets the right ones.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, ChildStderr, Command},
    runtime::Handle,
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use super::failure::{ProbeFailure, Stage};
use crate::privileges;

/// Programs that run at once: each is a process, of which a host has fewer than connections.
pub(super) const MAX_COMMANDS: usize = 64;
/// What is read of a program's standard error, in bytes; what follows is read and forgotten.
const MAX_STDERR_BYTES: usize = 64 * 1024;
/// Longest line that is shown, in characters.
const SHOWN_CHARACTERS: usize = 200;
/// `PATH` where the agent has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whom a command probes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) group: &'a str,
    pub(super) backend: &'a str,
    /// Port 0: none.
    pub(super) target: SocketAddr,
    pub(super) source: IpAddr,
}

/// Runs `command` about `subject`; status 0 passes. Returns how long it ran.
///
/// Waits for its turn while too many run (`turns`), which does not count.
///
/// # Cancellation
/// Dropping the future kills the program's process group.
pub(super) async fn probe(
    command: &[String],
    subject: Subject<'_>,
    limit: Duration,
    turns: &Semaphore,
) -> Result<Duration, ProbeFailure> {
    // The semaphore is never closed.
    let _turn = turns.acquire().await;
    let start = Instant::now();
    let mut group = Group::start(command, subject)?;
    let mut stderr = Said::of(group.child.stderr.take());
    let ended = timeout_at(start + limit, async {
        tokio::select! {
            ended = group.ended() => ended,
            never = stderr.read() => match never {},
        }
    })
    .await;
    let elapsed = start.elapsed();
    group.kill();
    let status = group.child.wait().await;
    stderr.read_rest().await;
    let said = stderr.last_line();
    match (ended, status) {
        (Err(_elapsed), _) => Err(ProbeFailure::CommandTimedOut { after: limit, said }),
        (Ok(Err(error)), _) | (_, Err(error)) => Err(ProbeFailure::CannotProbe(format!(
            "the end of the command could not be awaited: {error}"
        ))),
        (Ok(Ok(())), Ok(status)) if status.success() => Ok(elapsed),
        (Ok(Ok(())), Ok(status)) => Err(ProbeFailure::CommandFailed {
            status: describe(status),
            said,
        }),
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("signal {signal}"),
            Err(_) => format!("signal {signal}"),
        },
        (None, None) => status.to_string(),
    }
}

/// Starts a program from a thread without capabilities, so that it has none.
fn without_rights(command: &mut Command) -> io::Result<Child> {
    let runtime = Handle::current();
    thread::scope(|scope| {
        let start = scope.spawn(|| {
            let _guard = runtime.enter();
            privileges::renounce()?;
            command.spawn()
        });
        start
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that starts it panicked")))
    })
}

/// A program and everything it has started that did not leave its process group.
struct Group {
    child: Child,
    /// `None` once it was killed.
    id: Option<Pid>,
}

impl Group {
    fn start(command: &[String], subject: Subject<'_>) -> Result<Self, ProbeFailure> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(ProbeFailure::CannotProbe("the command is empty".to_owned()));
        };
        let Subject {
            group,
            backend,
            target,
            source,
        } = subject;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
            )
            .env("FORWARDER_GROUP", group)
            .env("FORWARDER_BACKEND", backend)
            .env("FORWARDER_ADDRESS", target.ip().to_string())
            .env("FORWARDER_SOURCE", source.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        if target.port() != 0 {
            command.env("FORWARDER_PORT", target.port().to_string());
        }
        let child = without_rights(&mut command).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                ProbeFailure::CannotProbe(format!("{program}: {error}"))
            }
            // Too many processes, too few descriptors.
            _ => match ProbeFailure::from_io(&error, Stage::Connect, Duration::ZERO) {
                failure if failure.is_local() => failure,
                _ => ProbeFailure::CannotProbe(format!("{program}: {error}")),
            },
        })?;
        Ok(Self {
            id: child
                .id()
                .and_then(|id| i32::try_from(id).ok())
                .map(Pid::from_raw),
            child,
        })
    }

    /// Waits until the program itself has ended, without collecting it. The thread that waits ends with the program,
    /// which does not outlive `self`.
    fn ended(&self) -> impl Future<Output = io::Result<()>> + Send + 'static {
        let id = self.id;
        async move {
            let Some(id) = id else { return Ok(()) };
            let wait = spawn_blocking(move || {
                loop {
                    match waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                        Err(Errno::EINTR) => {}
                        // Collected already: it was killed for good.
                        Ok(_) | Err(Errno::ECHILD) => return Ok(()),
                        Err(errno) => return Err(io::Error::from(errno)),
                    }
                }
            });
            wait.await.map_err(io::Error::other)?
        }
    }

    /// Kills whatever of the group still runs. Nothing is killed after the program was collected.
    fn kill(&mut self) {
        if let Some(id) = self.id.take() {
            // There is none left to kill, at worst.
            let _ = killpg(id, Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a program writes to its standard error.
struct Said<R> {
    pipe: Option<R>,
    text: Vec<u8>,
}

impl Said<ChildStderr> {
    fn of(pipe: Option<ChildStderr>) -> Self {
        Self {
            pipe,
            text: Vec::new(),
        }
    }
}

impl<R: AsyncRead + Unpin> Said<R> {
    /// Reads on and on, so that the program never waits for a reader.
    async fn read(&mut self) -> std::convert::Infallible {
        self.read_to_end().await;
        std::future::pending().await
    }

    /// Reads what is left. All who could write are dead, or have left the group and are not waited for.
    async fn read_rest(&mut self) {
        let _ = tokio::time::timeout(Duration::from_millis(100), self.read_to_end()).await;
    }

    async fn read_to_end(&mut self) {
        let mut piece = [0; 4096];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut piece).await {
                Ok(length) if length > 0 => {
                    self.text.extend(&piece[..length]);
                    // The last line is wanted.
                    let surplus = self.text.len().saturating_sub(MAX_STDERR_BYTES);
                    self.text.drain(..surplus);
                }
                Ok(_) | Err(_) => self.pipe = None,
            }
        }
    }

    fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.text);
        let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        // Escaped: a terminal obeys control characters.
        let escaped = last.unwrap_or_default().escape_debug().to_string();
        escaped
            .replace("\\\"", "\"")
            .replace("\\'", "'")
            .chars()
            .take(SHOWN_CHARACTERS)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    async fn run_with(script: &str, limit: Duration) -> Result<Duration, ProbeFailure> {
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let subject = Subject {
            group: "web",
            backend: "ecs01",
            target: "10.0.0.11:8080".parse().unwrap(),
            source: IpAddr::from([100, 64, 0, 1]),
        };
        probe(&command, subject, limit, &Semaphore::new(1)).await
    }

    async fn run(script: &str) -> Result<Duration, ProbeFailure> {
        run_with(script, LIMIT).await
    }

    #[tokio::test]
    async fn status_0_passes_and_the_program_knows_whom_to_probe() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("environment");
        run(&format!("env | sort > {}; pwd >> {0}", file.display()))
            .await
            .unwrap();
        let text = fs::read_to_string(file).unwrap();
        for line in [
            "FORWARDER_GROUP=web",
            "FORWARDER_BACKEND=ecs01",
            "FORWARDER_ADDRESS=10.0.0.11",
            "FORWARDER_PORT=8080",
            "FORWARDER_SOURCE=100.64.0.1",
            "/",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in {text}");
        }
        let inherited = |name: &str| text.lines().any(|line| line.starts_with(name));
        assert!(inherited("PATH=") && !inherited("CARGO"), "{text}");
    }

    #[tokio::test]
    async fn another_status_fails_with_the_last_line_of_standard_error() {
        let failure = run("echo first >&2; echo 'no leader: \"db\"' >&2; echo >&2; exit 3")
            .await
            .unwrap_err();
        assert_eq!(
            failure.to_string(),
            "the command ended with exit status 3: no leader: \"db\""
        );
        let failure = run("kill -TERM $$").await.unwrap_err();
        assert_eq!(failure.to_string(), "the command ended with signal SIGTERM");
    }

    #[tokio::test]
    async fn a_program_that_writes_much_is_read_to_its_end() {
        let script = "i=0; while [ $i -lt 20000 ]; do echo line $i of many >&2; i=$((i+1)); done; exit 1";
        let failure = run(script).await.unwrap_err();
        assert!(failure.to_string().ends_with(": line 19999 of many"), "{failure}");
    }

    /// Whether the process is gone, or dead and not collected by init yet.
    fn is_dead(pid: &str) -> bool {
        let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
        stat.map_or(true, |stat| {
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
        })
    }

    async fn await_death(file: &Path) {
        let pid = fs::read_to_string(file).unwrap();
        let until = Instant::now() + LIMIT;
        while !is_dead(pid.trim()) {
            assert!(Instant::now() < until, "{pid} lives");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn the_whole_group_is_killed_when_time_is_up() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!(
            "sleep 1000 & echo $! > {}.new; mv {0}.new {0}; echo waiting >&2; wait",
            file.display()
        );
        let limit = Duration::from_secs(2);
        let failure = run_with(&script, limit).await.unwrap_err();
        assert_eq!(failure.to_string(), "the command did not end within 2s: waiting");
        await_death(&file).await;
    }

    #[tokio::test]
    async fn what_a_program_leaves_behind_is_killed_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        // The child holds standard error open.
        let elapsed = run(&format!("sleep 1000 & echo $! > {}", file.display()))
            .await
            .unwrap();
        assert!(elapsed < LIMIT);
        await_death(&file).await;
    }

    #[tokio::test]
    async fn a_dropped_probe_kills_its_program() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!(
            "echo $$ > {}.new; mv {0}.new {0}; exec sleep 1000",
            file.display()
        );
        let task = tokio::spawn(async move { run_with(&script, Duration::from_secs(1000)).await });
        let until = Instant::now() + LIMIT;
        while !file.exists() {
            assert!(Instant::now() < until, "it must start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        task.abort();
        let _ = task.await;
        await_death(&file).await;
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_started_says_nothing_about_the_backend() {
        let subject = Subject {
            group: "web",
            backend: "ecs01",
            target: "10.0.0.11:0".parse().unwrap(),
            source: IpAddr::from([127, 0, 0, 1]),
        };
        let command = ["/no/such/program".to_owned()];
        let failure = probe(&command, subject, LIMIT, &Semaphore::new(1))
            .await
            .unwrap_err();
        assert!(failure.is_local(), "{failure:?}");
        assert!(failure.to_string().contains("/no/such/program"), "{failure}");
    }

    #[tokio::test]
    async fn waiting_for_a_turn_does_not_count() {
        let turns = Semaphore::new(1);
        let subject = Subject {
            group: "web",
            backend: "ecs01",
            target: "10.0.0.11:0".parse().unwrap(),
            source: IpAddr::from([127, 0, 0, 1]),
        };
        let command = ["/bin/sh", "-c", "test -z \"$FORWARDER_PORT\""].map(str::to_owned);
        let limit = Duration::from_secs(3);
        let turn = turns.acquire().await.unwrap();
        let start = Instant::now();
        let wait = async {
            tokio::time::sleep(limit + Duration::from_millis(200)).await;
            drop(turn);
        };
        let (outcome, ()) = tokio::join!(probe(&command, subject, limit, &turns), wait);
        outcome.unwrap();
        assert!(start.elapsed() > limit, "it waited for its turn");
    }
}
