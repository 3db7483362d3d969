//! What the kernel says of TCP resets while a lab is there: who sent one, who got one, of which socket, and from Linux 6.12
//! on why (`include/trace/events/tcp.h`).
//!
//! It speaks of all hosts at once. A reset that somebody got and no host sent is the gateway's.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use super::{
    Lab,
    undo::{self, Undo},
};
use crate::blame::seconds;

/// Room per processor for the newest: some hundred thousand.
const ROOM_KIB: u32 = 16 << 10;
const EVENTS: [&str; 2] = ["tcp_send_reset", "tcp_receive_reset"];

/// The record; it ends with the lab.
#[derive(Debug)]
pub struct Resets(PathBuf);

impl Resets {
    /// Begins to record.
    ///
    /// # Errors
    /// The kernel does not trace, or has its file system not mounted.
    pub fn record(lab: &Lab) -> Result<Self> {
        let directory = undo::make(&lab.id, || {
            let directory = lab.id.trace_directory();
            fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
            Ok((directory.clone(), Undo::Trace(directory)))
        })?;
        let set = |file: &str, value: &str| {
            fs::write(directory.join(file), value).with_context(|| format!("cannot set {file} to {value}"))
        };
        set("trace_clock", "mono")?;
        set("buffer_size_kb", &ROOM_KIB.to_string())?;
        for event in EVENTS {
            set(&format!("events/tcp/{event}/enable"), "1")?;
        }
        Ok(Self(directory))
    }

    /// A line for each reset between two moments of the monotonic clock, in nanoseconds, as far as they are not forgotten.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn between(&self, from_ns: u64, until_ns: u64) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.0.join("trace")).context("cannot read the record of resets")?;
        let is_meant =
            |line: &&str| moment(line).is_some_and(|at| at >= seconds(from_ns) && at <= seconds(until_ns));
        Ok(text
            .lines()
            .filter(is_meant)
            .map(|line| line.trim().to_owned())
            .collect())
    }
}

/// When a line was written: `task-pid [processor] flags seconds: event: …`.
fn moment(line: &str) -> Option<f64> {
    let (head, _) = line.split_once(": ")?;
    head.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_moments_and_headings_none() {
        let line = "          witness-81 [001] b.s21   812.000250: tcp_send_reset: skbaddr=1 src=10.0.0.1:80 reason=X: y";
        assert_eq!(moment(line), Some(812.000_25));
        assert_eq!(
            moment("#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION"),
            None
        );
        assert_eq!(moment("# tracer: nop"), None);
    }
}
