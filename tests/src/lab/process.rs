//! Processes that stay: servers and the agent. They are stopped with the signal they know as "stop", and
//! killed when they do not listen.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use super::undo::{self, LabId, Undo};

/// How long a process may take to stop before it is killed; the agent detaches its programs meanwhile.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// A child and how it ended, shared by its owner, the registry and the thread that awaits it.
pub(super) struct Running {
    name: String,
    pid: Pid,
    stop_signal: Signal,
    /// `Some` from the moment on that its pid may belong to another process.
    ended: Mutex<Option<ExitStatus>>,
    changed: Condvar,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

impl Running {
    fn ended(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal, unless the process has ended: its pid is not reused while the lock is held.
    fn signal(&self, signal: Signal) {
        let ended = self.ended();
        if ended.is_none() {
            // A process that has ended but is not reaped yet takes any signal.
            let _ = kill(self.pid, signal);
        }
    }

    /// Waits for the end of the process; `None` when it still runs after `deadline`.
    fn wait(&self, deadline: Duration) -> Option<ExitStatus> {
        let (ended, _) = self
            .changed
            .wait_timeout_while(self.ended(), deadline, |ended| ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        *ended
    }

    /// Stops the process and returns how it ended.
    pub(super) fn stop(&self) -> Option<ExitStatus> {
        self.signal(self.stop_signal);
        self.wait(STOP_DEADLINE).or_else(|| {
            self.signal(Signal::SIGKILL);
            self.wait(STOP_DEADLINE)
        })
    }

    /// Reaps the child when it ends.
    fn await_end(&self, mut child: Child) {
        // Look first, without reaping: until the status is noted nobody else may get this pid.
        while let Err(nix::errno::Errno::EINTR) =
            waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        {}
        let mut ended = self.ended();
        *ended = child.wait().ok();
        self.changed.notify_all();
    }
}

/// A running process of a lab, with its standard output and error in one file.
#[derive(Debug)]
pub struct Process {
    lab: LabId,
    running: Arc<Running>,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, whose program must *become* the process (`exec`), not start it.
    pub(super) fn start(
        lab: &LabId,
        name: &str,
        mut command: Command,
        stop_signal: Signal,
        log: &Path,
    ) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let running = undo::make(lab, || {
            let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
            let pid = Pid::from_raw(i32::try_from(child.id()).context("a pid fits i32")?);
            let running = Arc::new(Running {
                name: name.to_owned(),
                pid,
                stop_signal,
                ended: Mutex::new(None),
                changed: Condvar::new(),
            });
            let awaited = Arc::clone(&running);
            thread::Builder::new()
                .name(format!("await {name}"))
                .spawn(move || awaited.await_end(child))?;
            Ok((Arc::clone(&running), Undo::Process(running)))
        })?;
        Ok(Self {
            lab: lab.clone(),
            running,
            log: log.to_owned(),
        })
    }

    pub fn pid(&self) -> i32 {
        self.running.pid.as_raw()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.running.ended()
    }

    /// The file its output goes to.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits until it ends by itself or by a signal; `None` when it still runs after `deadline`.
    pub fn wait(&self, deadline: Duration) -> Option<ExitStatus> {
        self.running.wait(deadline)
    }

    /// Sends a signal other than those of [`Self::stop`].
    pub fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }

    /// Stops it and returns how it ended.
    pub fn stop(&self) -> Result<ExitStatus> {
        let status = self.running.stop();
        undo::forget(&self.lab, &self.running);
        status.ok_or_else(|| anyhow!("{:?} does not end, not even by SIGKILL", self.running))
    }
}
