//! CPU time of everything that has to do with a request: client, servers, gateway, and what the kernel does for them.
//!
//! All of them are bound to one CPU. So what the kernel does for a packet is done in the thread that sent it or in the
//! one that the kernel has for when there is too much, and the sum over these threads is all of it. Other programs on
//! that CPU make the run longer, but are not in the sum.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike as _,
    },
    unistd::{SysconfVar, sysconf},
};

use crate::bench::frames::{CPU, ksoftirqd, ran};

/// CPU time so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    own: Duration,
    /// Of the CPU, whoever had it.
    all: Duration,
}

/// CPU time between two looks.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// Of those who were asked about.
    pub own: Duration,
    /// Of the CPU, of anybody else.
    pub foreign: Duration,
}

impl Usage {
    /// Of these threads, of all children of this process that have ended, and of the kernel's own thread.
    ///
    /// # Errors
    /// One of the threads is gone.
    pub fn take(threads: &[i32]) -> Result<Self> {
        let mut own = ran(&ksoftirqd()?)?;
        for thread in threads {
            own += ran(&thread.to_string()).with_context(|| format!("no thread {thread}"))?;
        }
        let children = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let children = (children.user_time() + children.system_time()).num_microseconds();
        Ok(Self {
            own: Duration::from_nanos(own) + Duration::from_micros(children.try_into()?),
            all: busy(&fs::read_to_string("/proc/stat")?, CPU)?,
        })
    }

    /// What was used since.
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
        .with_context(|| format!("no CPU {cpu} in /proc/stat"))?;
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
    fn time_of_others_is_not_ours() {
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
