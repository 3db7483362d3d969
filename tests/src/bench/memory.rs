//! Memory: what the kernel says that each map of a running agent takes, and the agent's own.
//!
//! Maps are of the agent that runs, by their pins; what the kernel takes for one is in `fdinfo` (`memlock`). What a flow
//! or a backend takes is the difference of two agents that differ in nothing else.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;

use super::{Effort, Measured, Table, tables::Many};
use crate::lab::{
    Lab, Lifetime,
    agent::Agent,
    topology::{Extras, Site},
};

pub const NAME: &str = "memory";
pub const TITLE: &str = "Memory";
pub const PROSE: &str = include_str!("memory.md");

const KIB: f64 = 1024.0;
const MIB: f64 = KIB * KIB;
/// The agent's defaults, and what they are compared with.
const FLOWS: u32 = 262_144;
const MORE_FLOWS: u32 = 1_048_576;
const FEW_BACKENDS: u32 = 8;

/// What one agent takes.
struct Footprint {
    backends: u32,
    flows: u32,
    /// Bytes of each map.
    maps: BTreeMap<String, u64>,
    /// Bytes that the agent has for itself; the maps that it sees in its own memory are not in it.
    resident: u64,
}

impl Footprint {
    fn kernel(&self) -> u64 {
        self.maps.values().sum()
    }
}

/// # Errors
/// An agent does not start, or the kernel does not tell what its maps take.
pub fn run(effort: Effort) -> Result<Measured> {
    let many = effort.pick(10_000, 100);
    let mut footprints = Vec::new();
    for (backends, flows) in [(FEW_BACKENDS, FLOWS), (many, FLOWS), (FEW_BACKENDS, MORE_FLOWS)] {
        eprintln!("{backends} backends, room for {flows} flows ...");
        footprints.push(footprint(backends, flows)?);
    }
    report(&footprints)
}

fn footprint(backends: u32, flows: u32) -> Result<Footprint> {
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let configuration = Many::new(backends)
        .configuration(&site)
        .agent_key("max_flows", &flows.to_string());
    let pool = configuration.to_string().replace(
        crate::lab::topology::POOL,
        // As large as the most flows need.
        "100.64.0.0/24",
    );
    let configuration = crate::lab::configuration::Configuration::from_text(pool);
    let agent = Agent::start(&site.lab, &site.gateway, &configuration)?;
    // It says that it is ready when its tables are in force; what it used to build them is still its own.
    let maps = maps(&site.lab)?;
    ensure!(!maps.is_empty(), "the agent has pinned no map");
    Ok(Footprint {
        backends,
        flows,
        maps,
        resident: resident(agent.pid())?,
    })
}

/// Bytes that each pinned map of a lab's agent takes.
fn maps(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(lab.pin_directory())? {
        let path = entry?.path();
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        // There are links and folders, too.
        let Ok(map) = MapData::from_pin(&path) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        if !info.contains("map_type:") {
            continue;
        }
        let taken = info
            .lines()
            .find_map(|line| line.strip_prefix("memlock:"))
            .with_context(|| format!("the kernel does not tell what {name} takes"))?;
        found.insert(name, taken.trim().parse()?);
    }
    Ok(found)
}

fn resident(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .context("no RssAnon")?;
    let kib: u64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib * 1024)
}

fn report(footprints: &[Footprint]) -> Result<Measured> {
    let [few, many, more_flows] = footprints else {
        anyhow::bail!("three agents");
    };
    let mut measured = Measured::default();
    let show = |bytes: f64| {
        if bytes >= MIB {
            format!("{:.1} MiB", bytes / MIB)
        } else if bytes >= 10.0 * KIB {
            format!("{:.0} KiB", bytes / KIB)
        } else {
            format!("{bytes:.0} B")
        }
    };
    let whole = footprints.iter().map(|one| {
        [
            one.backends.to_string(),
            one.flows.to_string(),
            show(one.kernel() as f64),
            show(one.resident as f64),
        ]
    });
    measured.tables.push(Table::new(
        "Agents that have just started, with one group and one listener; the kernel's maps, and the agent's own memory.",
        ["backends", "`max_flows`", "maps", "agent"],
        whole.collect(),
    ));

    let flows = f64::from(MORE_FLOWS - FLOWS);
    let mut rows = Vec::new();
    for (name, taken) in &more_flows.maps {
        let before = few.maps.get(name).context("the same maps")?;
        if taken > before {
            let per_flow = (taken - before) as f64 / flows;
            rows.push(["flow".to_owned(), format!("`{name}`"), show(per_flow)]);
        }
    }
    let per_flow = (more_flows.kernel() as f64 - few.kernel() as f64) / flows;
    rows.push(["flow".to_owned(), "all maps".to_owned(), show(per_flow)]);
    let added = f64::from(many.backends - few.backends);
    rows.push([
        "backend".to_owned(),
        "all maps, beyond their room at start".to_owned(),
        show((many.kernel() as f64 - few.kernel() as f64) / added),
    ]);
    rows.push([
        "backend".to_owned(),
        "agent".to_owned(),
        show((many.resident as f64 - few.resident as f64) / added),
    ]);
    measured.tables.push(Table::new(
        "What one more takes.",
        ["one more", "where", "bytes"],
        rows,
    ));
    let mut largest: Vec<_> = few.maps.iter().collect();
    largest.sort_by_key(|(_, taken)| std::cmp::Reverse(**taken));
    let largest = largest
        .into_iter()
        .take(8)
        .map(|(name, taken)| [format!("`{name}`"), show(*taken as f64)])
        .collect();
    measured.tables.push(Table::new(
        &format!(
            "The largest maps of an agent with {} backends and room for {} flows.",
            few.backends, few.flows
        ),
        ["map", "takes"],
        largest,
    ));
    measured.figure("bytes per flow", per_flow);
    Ok(measured)
}
