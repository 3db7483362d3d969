//! Crowds of real TCP connections, each held by one of several processes (`crowd`).

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Namespace;

/// Connections of one client process, below what a process may have of files (20 000 is a common limit).
const PER_CLIENT: usize = 18_000;
/// The same of a server process, with room for the kernel's uneven spread.
const PER_SERVER: usize = 14_000;

/// What became of some connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub done: usize,
    /// Answered with a reset or an ICMP error.
    pub refused: usize,
    /// Answered by another server than at first, or with what was not asked.
    pub wrong: usize,
    pub failed: usize,
    /// Why the first one failed.
    pub failure: Option<String>,
}

impl Tally {
    /// Checks that this many connections went well, and none in another way.
    pub fn ensure_all(&self, count: usize) -> Result<()> {
        let wanted = Self {
            done: count,
            ..Self::default()
        };
        ensure!(*self == wanted, "not all {count}: {self:?}");
        Ok(())
    }

    /// Counts a failure.
    pub fn fail(&mut self, error: &io::Error) {
        self.failed += 1;
        self.failure.get_or_insert_with(|| error.to_string());
    }

    fn add(&mut self, other: Self) {
        self.done += other.done;
        self.refused += other.refused;
        self.wrong += other.wrong;
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
    }
}

/// A process of the crowd; its end is that of its standard input.
#[derive(Debug)]
struct Member {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Member {
    fn start(program: &Path, namespace: &Namespace, arguments: &[String]) -> Result<Self> {
        let mut process = namespace
            .command(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().context("a pipe was asked for")?);
        let mut member = Self {
            process,
            input,
            output,
        };
        let ready = member.line()?;
        ensure!(ready == "ready", "{arguments:?} says {ready:?}");
        Ok(member)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        let input = self.input.as_mut().context("told after its end")?;
        Ok(writeln!(input, "{command}")?)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        drop(self.input.take());
        // It ends by itself now; if it cannot be awaited there is nothing to await.
        let _ = self.process.wait();
    }
}

/// Servers that hold many connections.
#[derive(Debug)]
pub struct Servers {
    _members: Vec<Member>,
}

impl Servers {
    /// Starts servers on an address, enough for `connections`. `identity` is what clients know them by.
    pub fn start(
        program: &Path,
        namespace: &Namespace,
        address: SocketAddrV4,
        identity: u8,
        connections: usize,
    ) -> Result<Self> {
        let arguments = [
            "serve".to_owned(),
            format!("--address={address}"),
            format!("--identity={identity}"),
        ];
        let members =
            (0..connections.div_ceil(PER_SERVER)).map(|_| Member::start(program, namespace, &arguments));
        Ok(Self {
            _members: members.collect::<Result<_>>()?,
        })
    }
}

/// Clients that hold many connections.
#[derive(Debug)]
pub struct Clients {
    members: Vec<Member>,
    /// How many connections each of them has.
    open: Vec<usize>,
}

impl Clients {
    /// Starts clients that can hold this many connections, from these addresses in turn.
    pub fn start(
        program: &Path,
        namespace: &Namespace,
        to: SocketAddrV4,
        from: &[Ipv4Addr],
        connections: usize,
    ) -> Result<Self> {
        let mut arguments = vec!["connect".to_owned(), format!("--to={to}"), "--from".to_owned()];
        arguments.extend(from.iter().map(ToString::to_string));
        let members: Vec<_> = (0..connections.div_ceil(PER_CLIENT))
            .map(|_| Member::start(program, namespace, &arguments))
            .collect::<Result<_>>()?;
        Ok(Self {
            open: vec![0; members.len()],
            members,
        })
    }

    /// How many connections are open.
    pub fn len(&self) -> usize {
        self.open.iter().sum()
    }

    /// Whether no connection is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Opens connections.
    pub fn open(&mut self, count: usize) -> Result<Tally> {
        let room: Vec<_> = self.open.iter().map(|open| PER_CLIENT - open).collect();
        let shares = spread(count, &room)?;
        let tallies = self.tell(&shares, |share| format!("open {share}"))?;
        let mut total = Tally::default();
        for (open, tally) in self.open.iter_mut().zip(tallies) {
            *open += tally.done;
            total.add(tally);
        }
        Ok(total)
    }

    /// Asks on every connection who is at its other end.
    pub fn talk(&mut self) -> Result<Tally> {
        let shares = self.open.clone();
        let tallies = self.tell(&shares, |_| "talk".to_owned())?;
        let mut total = Tally::default();
        tallies.into_iter().for_each(|tally| total.add(tally));
        Ok(total)
    }

    /// Closes connections, the oldest first.
    pub fn close(&mut self, count: usize) -> Result<()> {
        let shares = spread(count, &self.open)?;
        let tallies = self.tell(&shares, |share| format!("close {share}"))?;
        for (open, tally) in self.open.iter_mut().zip(tallies) {
            *open -= tally.done;
        }
        Ok(())
    }

    /// Tells each member its share, all at once, and hears what became of it; those without a share rest.
    fn tell(&mut self, shares: &[usize], command: impl Fn(usize) -> String) -> Result<Vec<Tally>> {
        for (member, share) in self
            .members
            .iter_mut()
            .zip(shares)
            .filter(|(_, share)| **share > 0)
        {
            member.tell(&command(*share))?;
        }
        self.members
            .iter_mut()
            .zip(shares)
            .map(|(member, share)| {
                if *share == 0 {
                    return Ok(Tally::default());
                }
                let line = member.line()?;
                serde_json::from_str(&line).with_context(|| format!("a client says {line:?}"))
            })
            .collect()
    }
}

/// Shares that add up to `count`, none above its limit, as even as can be.
fn spread(count: usize, limits: &[usize]) -> Result<Vec<usize>> {
    let mut shares = vec![0; limits.len()];
    let mut left = count;
    while left > 0 {
        let with_room: Vec<_> = (0..limits.len())
            .filter(|index| shares[*index] < limits[*index])
            .collect();
        ensure!(!with_room.is_empty(), "{count} connections do not fit {limits:?}");
        let each = left.div_ceil(with_room.len());
        for index in with_room {
            let share = each.min(limits[index] - shares[index]).min(left);
            shares[index] += share;
            left -= share;
        }
    }
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_and_keep_their_limits() {
        assert_eq!(spread(10, &[4, 4, 4]).unwrap(), [4, 4, 2]);
        assert_eq!(spread(7, &[1, 9]).unwrap(), [1, 6]);
        assert_eq!(spread(0, &[1]).unwrap(), [0]);
        assert!(spread(3, &[1, 1]).is_err());
    }
}
