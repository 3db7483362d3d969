//! Who watches the agent: its memory, files, threads, the sizes of its tables, and that no counter falls.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use forwarder_tests::lab::status::Metrics;

use super::{script::Stage, site::Site};

const PAUSE: Duration = Duration::from_millis(500);
/// Counters of the data path: they go on whatever happens to the agent. Those of backends start anew when one returns
/// that had gone for good.
const LASTING: [&str; 10] = [
    "forwarder_packets_total",
    "forwarder_bytes_total",
    "forwarder_listener_connections_total",
    "forwarder_listener_connections_refused_total",
    "forwarder_listener_packets_total",
    "forwarder_listener_bytes_total",
    "forwarder_group_connections_total",
    "forwarder_group_connections_refused_total",
    "forwarder_group_packets_total",
    "forwarder_group_bytes_total",
];

/// What the agent took at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) pid: i32,
    pub(crate) resident_kib: u64,
    pub(crate) files: u64,
    pub(crate) threads: u64,
    /// What the kernel takes for the tables.
    pub(crate) table_bytes: u64,
}

/// Looks until it is told to end.
pub(crate) fn watch(stage: &Stage<'_>, has_ended: &AtomicBool) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut last: Option<Metrics> = None;
    while !has_ended.load(Ordering::Relaxed) {
        {
            // Nobody stops it meanwhile.
            let gateway = stage.gateway();
            let agent = gateway.agent.as_ref().context("no agent")?;
            let metrics = agent.metrics().context("a scrape")?;
            if let Some(last) = &last {
                let fallen: Vec<_> = metrics
                    .fallen_since(last)
                    .into_iter()
                    .filter(|text| LASTING.iter().any(|name| text.split(' ').next() == Some(name)))
                    .collect();
                ensure!(fallen.is_empty(), "counters fell: {fallen:#?}");
            }
            samples.push(sample(stage.site, agent.pid())?);
            last = Some(metrics);
        }
        // A pace: samples are compared over time.
        thread::sleep(PAUSE);
    }
    Ok(samples)
}

fn sample(site: &Site, pid: i32) -> Result<Sample> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().next());
        Ok(word
            .with_context(|| format!("no {name} in the status"))?
            .parse()?)
    };
    Ok(Sample {
        pid,
        resident_kib: field("VmRSS:")?,
        files: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
        threads: field("Threads:")?,
        table_bytes: table_bytes(site)?,
    })
}

/// Of all pinned tables together, as their descriptors say it (`/proc/self/fdinfo`).
fn table_bytes(site: &Site) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(site.lab.pin_directory())? {
        let path = entry?.path();
        if is_link(&path) {
            continue;
        }
        // A list of free flows may just have gone.
        let Ok(table) = MapData::from_pin(&path) else {
            continue;
        };
        let number = table.fd().as_fd().as_raw_fd();
        let shown = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let line = shown.lines().find_map(|line| line.strip_prefix("memlock:"));
        bytes += line.context("no memlock")?.trim().parse::<u64>()?;
    }
    ensure!(bytes > 1 << 20, "the tables take {bytes} bytes only");
    Ok(bytes)
}

/// A quantity that has to be flat: its name, how to read it, and how much the later half may exceed the earlier one by.
struct Flat {
    name: &'static str,
    of: fn(&Sample) -> u64,
    slack: fn(u64) -> u64,
}

const FLAT: [Flat; 4] = [
    Flat {
        name: "resident memory, KiB",
        of: |sample| sample.resident_kib,
        // An allocator's pages.
        slack: |before| 1024 + before / 50,
    },
    Flat {
        name: "open files",
        of: |sample| sample.files,
        // Probes that happen to be under way: those of 17 backends and 2 tunnels.
        slack: |_| 19,
    },
    Flat {
        name: "threads",
        of: |sample| sample.threads,
        slack: |_| 4,
    },
    Flat {
        name: "tables, bytes",
        of: |sample| sample.table_bytes,
        // Of tables that are not allocated beforehand the kernel counts the entries.
        slack: |before| before / 200,
    },
];

/// Checks that the most of each quantity in the second half is that of the first; all samples are of one agent.
pub(crate) fn ensure_flat(samples: &[Sample]) -> Result<()> {
    ensure!(samples.len() >= 8, "only {} samples", samples.len());
    ensure!(
        samples.iter().all(|sample| sample.pid == samples[0].pid),
        "not all samples are of one agent: it ended by itself"
    );
    let (first, second) = samples.split_at(samples.len() / 2);
    for Flat { name, of, slack } in FLAT {
        let most = |half: &[Sample]| half.iter().map(of).max().unwrap_or_default();
        let (before, after) = (most(first), most(second));
        println!("{name}: at most {before} in the first half, {after} in the second");
        ensure!(
            after <= before + slack(before),
            "{name} grew from {before} to {after}"
        );
    }
    Ok(())
}

/// Whether a program's link is pinned there, and no table.
fn is_link(pin: &Path) -> bool {
    pin.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("link-"))
}

/// What groups have counted with backends that have left: a group each.
const SUMS: &str = "PAST";

/// A table of the data path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    name: String,
    /// What the kernel takes for it.
    bytes: u64,
    /// Of tables whose entries come and go.
    entries: Option<usize>,
}

/// All pinned tables, in the order of their names.
pub(crate) fn tables(site: &Site) -> Result<Vec<Table>> {
    let ask = |command: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&site.gateway.run(command)?)?)
    };
    let mut tables = Vec::new();
    for entry in fs::read_dir(site.lab.pin_directory())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A new list of free flows has a new number.
        let name = name
            .trim_end_matches(|letter: char| letter.is_ascii_digit())
            .to_owned();
        if is_link(&path) || name == SUMS {
            continue;
        }
        let Ok(shown) = ask(&format!("bpftool -j map show pinned {}", path.display())) else {
            continue;
        };
        let kind = shown["type"].as_str().unwrap_or_default();
        let entries = if kind.ends_with("hash") || kind == "lpm_trie" {
            let dump = ask(&format!("bpftool -j map dump pinned {}", path.display()))?;
            Some(dump.as_array().context("a list of entries")?.len())
        } else {
            None
        };
        tables.push(Table {
            name,
            bytes: shown["bytes_memlock"].as_u64().unwrap_or_default(),
            entries,
        });
    }
    tables.sort_by(|a, b| a.name.cmp(&b.name));
    ensure!(tables.len() > 10, "only these tables: {tables:?}");
    Ok(tables)
}
