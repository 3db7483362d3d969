//! How long tables take to be built and swapped, what swaps cost clients, and what passive checks cost the gateway.

use std::{
    fs,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable as _;
use forwarder_common::{
    abi::backend::{BackendGroup, BackendId, Selection},
    maglev,
};
use forwarder_user::datapath::{
    maps,
    object::{self, Sizes},
    pod::AsPod,
    watch::BackendWatch,
};

use super::{Effort, Measured, Table};
use crate::{
    lab::{
        Lifetime,
        agent::Agent,
        configuration::{Check, Configuration},
        load::{Connections, wrk},
        topology::{Extras, PORT, Site},
    },
    tables::SIZES,
};

pub const NAME: &str = "tables";
pub const TITLE: &str = "The control plane";
pub const PROSE: &str = include_str!("tables.md");

const CONNECTIONS: u32 = 16;

/// How much of it.
#[derive(Clone, Copy)]
struct Extent {
    backends: &'static [u32],
    runs: usize,
    /// Changes of many backends, there and back.
    applies: usize,
    /// How many backends change at once.
    many: u32,
    /// Changes of a weight while clients send requests.
    swaps: usize,
}

impl Extent {
    const fn of(effort: Effort) -> Self {
        match effort {
            Effort::Whole => Self {
                backends: &[10, 100, 1_000, 10_000],
                runs: 15,
                applies: 3,
                many: 10_000,
                swaps: 300,
            },
            Effort::Short => Self {
                backends: &[10, 100],
                runs: 1,
                applies: 1,
                many: 100,
                swaps: 5,
            },
        }
    }
}

/// A measurement, which returns what it has found.
type Part = fn(Extent) -> Result<Table>;

/// # Errors
/// A table could not be built or written, a configuration was not applied.
pub fn run(only: &str, effort: Effort) -> Result<Measured> {
    let parts: [(&str, Part); 4] = [
        ("build", build_and_swap),
        ("looks", looks),
        ("swaps", swaps_under_load),
        ("apply", applies),
    ];
    let mut measured = Measured::default();
    for (name, part) in parts.iter().filter(|(name, _)| name.contains(only)) {
        eprintln!("{name} ...");
        measured.tables.push(part(Extent::of(effort))?);
    }
    Ok(measured)
}

fn sizes(backends: u32, slots: u32) -> Sizes {
    Sizes {
        backends,
        slots,
        ..SIZES
    }
}

fn build_and_swap(extent: Extent) -> Result<Table> {
    let mut rows = Vec::new();
    for &backends in extent.backends {
        let entries = entries(backends);
        let slot_count = maglev::size_for(backends as usize);
        let sizes = sizes(backends, slot_count * 2);
        let mut ebpf = object::load(&sizes)?;
        let (mut control, _flows, _counters) = maps::take(&mut ebpf, &sizes, None)?;
        let (mut builds, mut swaps) = (Vec::new(), Vec::new());
        for run in 0..extent.runs {
            let began = Instant::now();
            let mut turns = vec![maglev::Turn::default(); entries.len()];
            let mut slots = vec![0; slot_count as usize];
            ensure!(maglev::build(&entries, &mut turns, &mut slots), "no table");
            builds.push(began.elapsed());
            let slots: Vec<_> = slots.into_iter().map(BackendId).collect();
            // Beside the table in use, as the agent does.
            let first_slot = slot_count * (run % 2) as u32;
            let began = Instant::now();
            control.slots.write(first_slot, &slots);
            let group = BackendGroup {
                first_slot,
                slot_count,
                selection: Selection::MAGLEV,
                ..BackendGroup::zeroed()
            };
            control.groups.set(0, AsPod(group), 0)?;
            swaps.push(began.elapsed());
        }
        rows.push([
            backends.to_string(),
            slot_count.to_string(),
            spread(builds),
            spread(swaps),
        ]);
    }
    let caption = format!(
        "Maglev tables, {} runs each. A swap writes the slots and then the group, into maps of the kernel.",
        extent.runs
    );
    let header = [
        "backends",
        "slots",
        "build: median (min to max)",
        "swap: median (min to max)",
    ];
    Ok(Table::new(&caption, header, rows))
}

fn entries(backends: u32) -> Vec<maglev::Entry> {
    let mut entries: Vec<_> = (0..backends)
        .map(|number| maglev::Entry {
            value: number,
            identity: maglev::identity(&(0x0a00_0000 + number).to_be_bytes(), 80),
            weight: 100,
        })
        .collect();
    entries.sort_by_key(|entry| entry.identity);
    entries
}

/// What one look of the passive checks costs when all backends carry flows.
fn looks(extent: Extent) -> Result<Table> {
    let mut rows = Vec::new();
    for &backends in extent.backends {
        let ebpf = object::load(&sizes(backends, 1024))?;
        let watch = BackendWatch::open(&ebpf)?;
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..extent.runs {
            let began = Instant::now();
            let live = (0..backends).filter(|id| watch.is_live(BackendId(*id))).count();
            idle.push(began.elapsed());
            ensure!(live == 0, "nobody has opened a flow");
            let began = Instant::now();
            for id in 0..backends {
                watch.counters(BackendId(id))?;
            }
            busy.push(began.elapsed());
        }
        rows.push([backends.to_string(), spread(idle), spread(busy)]);
    }
    let header = [
        "backends",
        "none carries flows: median (min to max)",
        "all do: median (min to max)",
    ];
    let caption = format!("One look of the passive checks, {} runs each.", extent.runs);
    Ok(Table::new(&caption, header, rows))
}

/// Median, least and most.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let show = |time: Duration| {
        let micros = time.as_secs_f64() * 1e6;
        if micros < 1000.0 {
            format!("{micros:.1} µs")
        } else {
            format!("{:.2} ms", micros / 1000.0)
        }
    };
    let (first, last) = (times[0], times[times.len() - 1]);
    format!(
        "{} ({} to {})",
        show(times[times.len() / 2]),
        show(first),
        show(last)
    )
}

fn swaps_under_load(extent: Extent) -> Result<Table> {
    let extras = Extras {
        eight_servers: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let agent = site.start_agent(&site.web_configuration(), "web")?;
    let mut rows = Vec::new();
    for (kind, name) in [
        (Connections::PerRequest, "one per request"),
        (Connections::KeepAlive, "kept open"),
    ] {
        eprintln!("{} swaps, connections {name} ...", extent.swaps);
        let is_over = AtomicBool::new(false);
        let (client, vip) = (site.client().clone(), site.vip);
        let (requests, errors, took) = thread::scope(|scope| -> Result<_> {
            let load = scope.spawn(|| -> Result<_> {
                let (mut requests, mut errors) = (0, 0);
                while !is_over.load(Relaxed) {
                    let load = wrk(&client, vip, PORT, kind, CONNECTIONS, Duration::from_secs(2))?;
                    requests += load.requests;
                    errors += load.socket_errors + load.refused;
                }
                Ok((requests, errors))
            });
            let began = Instant::now();
            let outcome =
                (0..extent.swaps).try_for_each(|swap| change_weight(&site, &agent, 50 + (swap % 100) as u16));
            let took = began.elapsed();
            is_over.store(true, Relaxed);
            let (requests, errors) = load.join().expect("it does not panic")?;
            outcome?;
            Ok((requests, errors, took))
        })?;
        rows.push([
            name.to_owned(),
            extent.swaps.to_string(),
            format!("{:.1} s", took.as_secs_f64()),
            requests.to_string(),
            errors.to_string(),
        ]);
    }
    let header = ["connections", "swaps", "within", "requests", "lost"];
    let caption = format!(
        "8 servers; the weight of one changes by `forwarder apply`, wrk has {CONNECTIONS} connections."
    );
    Ok(Table::new(&caption, header, rows))
}

fn change_weight(site: &Site, agent: &Agent, weight: u16) -> Result<()> {
    let configuration: Configuration =
        site.web_configuration_with(
            &[],
            "full",
            |server| if server.name == "ecs01" { weight } else { 101 },
        );
    let file = site.lab.directory().join("next.toml");
    fs::write(&file, configuration.to_string())?;
    let output = agent.ask("apply", &["-c", file.to_str().context("the path is text")?])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Backends of one group: how many, weight of all, where they are, the first part of their names, and the weight of the
/// first.
#[derive(Clone, Copy)]
pub(super) struct Many {
    count: u32,
    weight: u16,
    network: u8,
    name: &'static str,
    first_weight: u16,
}

impl Many {
    pub(super) const fn new(count: u32) -> Self {
        Self {
            count,
            weight: 100,
            network: 20,
            name: "a",
            first_weight: 100,
        }
    }

    pub(super) fn configuration(self, site: &Site) -> Configuration {
        let mut configuration =
            site.configuration(&[])
                .agent_key("max_slots", "8388608")
                .group("web", "full", Check::None);
        for number in 0..self.count {
            let address = Ipv4Addr::new(172, self.network, (number >> 8) as u8, number as u8);
            let weight = if number == 0 {
                self.first_weight
            } else {
                self.weight
            };
            let name = format!("{}{number}", self.name);
            configuration = configuration.backend("web", &name, address, PORT, weight);
        }
        configuration.listener("web", site.vip, PORT, "tcp", "web")
    }
}

/// From `forwarder apply` to its end: then the tables are in force, and all that follows from them.
fn applies(extent: Extent) -> Result<Table> {
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let first = Many::new(extent.many);
    let agent = Agent::start(&site.lab, &site.gateway, &first.configuration(&site))?;
    let mut rows = Vec::new();
    for (what, changed) in [
        ("nothing", first),
        (
            "the weight of one",
            Many {
                first_weight: 50,
                ..first
            },
        ),
        ("the weights of all", Many { weight: 50, ..first }),
        ("the addresses of all", Many { network: 21, ..first }),
        ("all go, as many others come", Many { name: "b", ..first }),
    ] {
        eprintln!("{} backends: {what} ...", extent.many);
        let mut times = Vec::new();
        // There and back, so that each run changes as much as the first.
        for _ in 0..extent.applies {
            for next in [changed, first] {
                let file = site.lab.directory().join("next.toml");
                fs::write(&file, next.configuration(&site).to_string())?;
                let began = Instant::now();
                let output = agent.ask("apply", &["-c", file.to_str().context("the path is text")?])?;
                times.push(began.elapsed());
                ensure!(
                    output.status.success(),
                    "{what}: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
        }
        rows.push([what.to_owned(), spread(times)]);
    }
    let caption = format!(
        "`forwarder apply` of {} backends in one group, {} runs each, from the command's start to its end.",
        extent.many,
        extent.applies * 2
    );
    Ok(Table::new(
        &caption,
        ["what changes", "median (min to max)"],
        rows,
    ))
}
