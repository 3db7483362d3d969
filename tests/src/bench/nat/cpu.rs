//! Whose the CPU time is: the gateway's is what its own threads ran, on a CPU that client and servers do not use.
//!
//! What the kernel does for an interface is done by a thread of the interface's (threaded NAPI), so its time is as plain
//! as that of a program. What is not in it: interrupts that no thread is charged for, the cost of waking an idle CPU.

use std::{fs, io, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, SysconfVar, sysconf},
};

/// Where client and servers run, and where the gateway does.
pub const CLIENT: usize = 0;
pub const GATEWAY: usize = 1;
/// The kernel cuts names of threads to this length.
const COMM_LEN: usize = 15;

/// CPU time so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Of the threads that were asked about.
    pub own: Duration,
    /// Of the gateway's CPU, whoever had it.
    all: Duration,
}

/// CPU time between two looks.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// Of the gateway.
    pub own: Duration,
    /// Of the gateway's CPU, of anybody else.
    pub foreign: Duration,
}

impl Usage {
    /// # Errors
    /// One of the threads is gone.
    pub fn take(threads: &[i32]) -> Result<Self> {
        let mut own = 0;
        for thread in threads {
            let path = format!("/proc/{thread}/schedstat");
            let text = fs::read_to_string(&path).with_context(|| path)?;
            let first = text.split_whitespace().next().context("an empty schedstat")?;
            own += first.parse::<u64>()?;
        }
        Ok(Self {
            own: Duration::from_nanos(own),
            all: busy(&fs::read_to_string("/proc/stat")?, GATEWAY)?,
        })
    }

    pub fn since(&self, before: &Self) -> Used {
        let own = self.own.saturating_sub(before.own);
        Used {
            own,
            foreign: self.all.saturating_sub(before.all).saturating_sub(own),
        }
    }
}

/// How long a CPU was not idle, by the text of `/proc/stat`.
fn busy(stat: &str, cpu: usize) -> Result<Duration> {
    let name = format!("cpu{cpu} ");
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix(&name))
        .with_context(|| format!("this machine has no CPU {cpu}, which the gateway is to have"))?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map(|word| Ok(word.parse()?))
        .collect::<Result<_>>()?;
    // user nice system idle iowait irq softirq steal guest guest_nice; the last two are in the first two (proc(5)).
    ensure!(ticks.len() >= 8, "a short line in /proc/stat");
    let ticks = ticks[..3].iter().chain(&ticks[5..8]).sum::<u64>();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no ticks")? as f64;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second))
}

/// All threads of a process.
pub fn threads_of(process: i32) -> Result<Vec<i32>> {
    fs::read_dir(format!("/proc/{process}/task"))
        .with_context(|| format!("no process {process}"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
        .collect()
}

/// The kernel's threads for an interface in threaded NAPI.
pub fn threads_of_interface(interface: &str) -> Result<Vec<i32>> {
    let mut wanted = format!("napi/{interface}-");
    wanted.truncate(COMM_LEN);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(process) = entry?.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        match fs::read_to_string(format!("/proc/{process}/comm")) {
            Ok(name) if name.starts_with(&wanted) => found.push(process),
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::NotFound) && error.raw_os_error() != Some(3) =>
            {
                return Err(error.into());
            }
            _ => {}
        }
    }
    ensure!(
        !found.is_empty(),
        "no thread {wanted}*: the kernel has no threaded NAPI for it"
    );
    Ok(found)
}

/// Binds a thread to one CPU.
pub fn bind(thread: i32, cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(thread), &cpus)
        .with_context(|| format!("can't bind thread {thread} to CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_busy_when_it_neither_idles_nor_waits() {
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 100 20 30 9999 777 5 40 5 100 20\nintr 5\n";
        assert_eq!(busy(stat, 1).unwrap(), Duration::from_secs(2));
        assert!(busy(stat, 2).is_err());
    }

    #[test]
    fn time_of_others_is_not_the_gateways() {
        let before = Usage {
            own: Duration::from_millis(500),
            all: Duration::from_millis(700),
        };
        let after = Usage {
            own: Duration::from_millis(600),
            all: Duration::from_millis(1700),
        };
        let used = after.since(&before);
        assert_eq!((used.own.as_millis(), used.foreign.as_millis()), (100, 900));
    }
}
