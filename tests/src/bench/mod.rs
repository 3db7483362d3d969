//! Benchmarks, with real servers, the real agent and the real programs. `cargo xtask bench` runs them by the binary of
//! that name; the tests run their short forms, and break them on purpose (`netns_bench.rs`).
//!
//! A benchmark returns what it has measured as data ([`Measured`]). The page and its plots are made from data alone
//! ([`page`]), so that words can change without measuring anew. Each one checks itself: what does not come out as it
//! has to is an error, never a figure.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

mod client;
pub mod failover;
pub mod frames;
pub mod memory;
pub mod nat;
pub mod packets;
pub mod page;
mod plot;
pub mod tables;
pub mod targets;
pub mod tunnels;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// For figures that are worth being told.
    Whole,
    /// To see that the benchmark runs and that its checks hold. Its figures mean nothing.
    Short,
}

impl Effort {
    /// One of two values.
    pub fn pick<T>(self, whole: T, short: T) -> T {
        match self {
            Self::Whole => whole,
            Self::Short => short,
        }
    }
}

/// The circumstances of a measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// UTC, `2026-11-22`.
    pub date: String,
    pub processors: String,
    pub kernel: String,
    /// Of the sources, with `+` behind it where they had been changed since.
    pub commit: String,
    /// Of the last minute before the run.
    pub load: String,
}

impl Made {
    /// Here and now; `root` is where the sources are.
    pub fn now(root: &Path) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processors = read("/proc/cpuinfo");
        let model = processors
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let count = processors
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count();
        let git = |arguments: &[&str]| said(Command::new("git").arg("-C").arg(root).args(arguments));
        // The page itself is made by the run.
        let is_changed = git(&[
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            ":!docs",
        ])
        .map_or(true, |text| !text.is_empty());
        let commit = git(&["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|_| "unknown".to_owned());
        Ok(Self {
            date: said(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?,
            processors: format!("{count} CPUs ({model})"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            commit: format!("{commit}{}", if is_changed { "+" } else { "" }),
            load: read("/proc/loadavg")
                .split_whitespace()
                .next()
                .unwrap_or("unknown")
                .to_owned(),
        })
    }
}

/// What a short command prints.
fn said(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("can't run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?}: {}",
        command.get_program(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a benchmark has measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub tables: Vec<Table>,
    /// What the targets are about, by name.
    pub figures: std::collections::BTreeMap<String, f64>,
    pub plots: Vec<Plot>,
    /// What a reader has to know of this run: trials that were disturbed, for example.
    pub remarks: Vec<String>,
}

impl Measured {
    /// Notes a figure that a target is about.
    pub fn figure(&mut self, name: &str, value: f64) {
        self.figures.insert(name.to_owned(), value);
    }
}

/// A table, with a sentence above it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub caption: String,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(caption: &str, header: [&str; N], rows: Vec<[String; N]>) -> Self {
        Self {
            caption: caption.to_owned(),
            header: header.map(str::to_owned).to_vec(),
            rows: rows.into_iter().map(|row| row.to_vec()).collect(),
        }
    }

    /// In Markdown, caption and all.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let mut lines = vec![
            line(&self.header),
            line(&vec!["---".to_owned(); self.header.len()]),
        ];
        lines.extend(self.rows.iter().map(|row| line(row)));
        let table = lines.join("\n");
        if self.caption.is_empty() {
            table
        } else {
            format!("{}\n\n{table}", self.caption)
        }
    }
}

/// A picture of some figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// Name of the file below `docs/images`, without its ending.
    pub name: String,
    pub title: String,
    /// Of the value's axis.
    pub unit: String,
    pub kind: PlotKind,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PlotKind {
    Bars(Vec<Bar>),
    /// Lines over one logarithmic axis, which has this name.
    Lines(String, Vec<Line>),
}

/// A bar with its spread; bars of one colour belong together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    pub label: String,
    pub colour: usize,
    pub spread: Spread,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub label: String,
    pub points: Vec<(f64, Spread)>,
}

/// The middle of several trials, and how far they went.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of trials; `None` where there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            least: *values.first()?,
            most: *values.last()?,
        })
    }

    /// All three less a constant, or as a multiple.
    #[must_use]
    pub fn map(self, change: impl Fn(f64) -> f64) -> Self {
        Self {
            median: change(self.median),
            least: change(self.least),
            most: change(self.most),
        }
    }

    /// `median (least to most)` with so many digits behind the point.
    pub fn show(&self, digits: usize) -> String {
        let Self { median, least, most } = self;
        format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
    }
}

/// How often one cost is contained in another; nothing where one of them is lost in the other's noise.
fn times(over: f64, under: f64) -> String {
    if over > 0.0 && under > 0.0 {
        format!("{:.1}", over / under)
    } else {
        "–".to_owned()
    }
}

/// Lets all contenders have their turns, so that what changes on the machine meanwhile meets all alike. The first turn
/// of each is cold and its outcome is thrown away, but not its errors.
pub fn in_turns<C, T>(
    contenders: &mut [C],
    trials: usize,
    mut trial: impl FnMut(&mut C) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut outcomes: Vec<Vec<T>> = contenders.iter().map(|_| Vec::with_capacity(trials)).collect();
    for number in 0..=trials {
        for (contender, outcomes) in contenders.iter_mut().zip(&mut outcomes) {
            let outcome = trial(contender)?;
            if number > 0 {
                outcomes.push(outcome);
            }
        }
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cold_first_turn_is_in_no_figure() {
        let mut turns = [0_u32, 0];
        let outcomes = in_turns(&mut turns, 3, |turn| {
            *turn += 1;
            Ok(if *turn == 1 { 1_000_000.0 } else { f64::from(*turn) })
        })
        .unwrap();
        assert_eq!(outcomes, [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]);
    }

    #[test]
    fn an_error_in_the_cold_turn_is_one() {
        let outcome = in_turns(&mut [()], 3, |()| -> Result<()> { anyhow::bail!("no") });
        assert!(outcome.is_err());
    }

    #[test]
    fn the_median_is_the_one_in_the_middle_of_all() {
        let spread = Spread::of(vec![9.0, 1.0, 3.0]).unwrap();
        assert_eq!(spread.show(0), "3 (1 to 9)");
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
