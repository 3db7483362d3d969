//! NAT without a tunnel, beside what else could do it: nftables, HAProxy and nginx, each on a gateway of the same lab.
//!
//! Two benchmarks. *Packets*: live frames of UDP, see [`super::frames`]. *Requests*: wrk and nginx. In both all happens on
//! one CPU, and the gateway's part is what all of it costs more than the same without a gateway.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Bar, Effort, Measured, Plot, PlotKind, Spread, Table,
    frames::{self, OneWay, Wanted, between_neighbours, is_the_generator, mac, payload},
    in_turns, times,
};
use crate::{
    lab::load::{Connections, Wrk, run_wrk},
    packet::Builder,
};

pub mod contender;
pub mod cpu;
pub mod site;

use contender::Contender;
use cpu::Usage;
use site::{NatSite, PAGE_BYTES};

pub const NAME: &str = "nat";
pub const TITLE: &str = "NAT beside nftables, HAProxy and nginx";
pub const PROSE: &str = include_str!("nat.md");

/// The client's UDP ports start here.
const CLIENT_PORT: u16 = 20_000;
/// Flows of the benchmark of packets.
const MANY_FLOWS: u32 = 4096;
/// A trial during which others had more than this part of the CPU is told.
const DISTURBED: f64 = 0.1;

/// How much of it.
#[derive(Clone, Copy)]
struct Extent {
    packet_trials: usize,
    packets: u32,
    request_trials: usize,
    duration: Duration,
}

impl Extent {
    fn of(effort: Effort) -> Self {
        Self {
            packet_trials: effort.pick(9, 1),
            packets: effort.pick(400_000, 20_000),
            request_trials: effort.pick(7, 1),
            duration: Duration::from_secs(effort.pick(2, 1)),
        }
    }
}

/// What has `only` in its name: packets, requests.
///
/// # Errors
/// A lab could not be made, a packet was lost, a request failed.
pub fn run(object: &Path, only: &str, effort: Effort) -> Result<Measured> {
    let extent = Extent::of(effort);
    let mut measured = Measured::default();
    let mut sites = Contender::ALL
        .into_iter()
        .map(|contender| {
            eprintln!("preparing: {} ...", contender.name());
            NatSite::build(contender, object).with_context(|| contender.name())
        })
        .collect::<Result<Vec<_>>>()?;
    if "packets".contains(only) {
        packets(object, &sites, extent, &mut measured)?;
    }
    if "requests".contains(only) {
        requests(&mut sites, extent, &mut measured)?;
    }
    Ok(measured)
}

/// The contenders' configurations, as they are used, in Markdown.
pub fn configurations() -> String {
    [
        Contender::Forwarder,
        Contender::Nftables,
        Contender::Haproxy,
        Contender::Nginx,
    ]
    .into_iter()
    .map(|contender| {
        let (language, text) = contender.shown();
        format!("{}:\n\n```{language}\n{}\n```", contender.name(), text.trim())
    })
    .collect::<Vec<_>>()
    .join("\n\n")
}

/// The three ways through one contender.
pub struct Ways {
    contender: Contender,
    pub ways: Vec<(&'static str, OneWay)>,
}

impl Ways {
    /// Opens all flows.
    pub fn open(object: &Path, site: &NatSite) -> Result<Self> {
        let client = site.client_address(CLIENT_PORT);
        let (near, far) = (site.client_end(), site.server_end());
        let one_way = |flows: u32| -> Result<OneWay> {
            let mut way = if site.contender.is_floor() {
                between_neighbours(object, (near, client), (far, site.udp_target()), flows)?
            } else {
                let frame = Builder::udp(client, site.udp_target())
                    .link(mac(near)?, mac(site.gateway_end())?)
                    .payload_of(&payload())
                    .build();
                let wanted = Wanted {
                    len: frame.len(),
                    ..site::SERVERS_WANTED
                };
                OneWay::new(object, near, far, frame, flows, wanted)?
            };
            way.warm_up(flows)?;
            Ok(way)
        };
        let mut ways = vec![("requests, 4096 flows", one_way(MANY_FLOWS)?)];
        let mut single = one_way(1)?;
        let seen = single.seen()?;
        ways.insert(0, ("requests, 1 flow", single));
        let server = std::net::SocketAddrV4::new(seen.destination, site::UDP_PORT);
        let mut replies = if site.contender.is_floor() {
            between_neighbours(object, (far, server), (near, client), 1)?
        } else {
            let frame = Builder::udp(server, seen.source)
                .link(mac(far)?, mac(site.gateway_far_end())?)
                .payload_of(&payload())
                .build();
            let wanted = Wanted {
                len: frame.len(),
                source: site::VIP.into(),
                destination: (*client.ip()).into(),
            };
            OneWay::new(object, far, near, frame, 1, wanted)?
        };
        replies.warm_up(1)?;
        ways.insert(1, ("replies, 1 flow", replies));
        Ok(Self {
            contender: site.contender,
            ways,
        })
    }
}

fn packets(object: &Path, sites: &[NatSite], extent: Extent, measured: &mut Measured) -> Result<()> {
    let mut all = sites
        .iter()
        .filter(|site| !site.contender.is_proxy())
        .map(|site| {
            eprintln!("opening flows: {} ...", site.contender.name());
            Ways::open(object, site).with_context(|| site.contender.name())
        })
        .collect::<Result<Vec<_>>>()?;
    eprintln!("{} trials of packets ...", extent.packet_trials);
    let outcomes = in_turns(&mut all, extent.packet_trials, |ways| {
        let contender = ways.contender;
        ways.ways
            .iter_mut()
            .map(|(name, way)| {
                way.trial(extent.packets)
                    .with_context(|| format!("{}, {name}", contender.name()))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    let names: Vec<_> = all[0].ways.iter().map(|(name, _)| *name).collect();
    let (mut rows, mut bars) = (Vec::new(), Vec::new());
    for (number, name) in names.iter().enumerate() {
        let spread = |trials: &[Vec<frames::Trial>], of: fn(&frames::Trial) -> f64| {
            Spread::of(trials.iter().map(|trial| of(&trial[number])).collect()).context("no trial")
        };
        let own_of = |wanted: Contender| -> Result<Spread> {
            let position = all.iter().position(|one| one.contender == wanted);
            let trials = &outcomes[position.context("a contender")?];
            spread(trials, |trial| trial.nanoseconds)
        };
        let floor = own_of(Contender::Nobody)?.median;
        let wire = own_of(Contender::Wire)?.median;
        let nftables = own_of(Contender::Nftables)?.median - floor;
        let alone = spread(&outcomes[0], |trial| trial.packets_per_second)?.median;
        for (colour, (ways, trials)) in all.iter().zip(&outcomes).enumerate() {
            let contender = ways.contender;
            let rate = spread(trials, |trial| trial.packets_per_second)?;
            let cpu = spread(trials, |trial| trial.nanoseconds)?;
            let own = cpu.map(|value| value - floor);
            if !contender.is_floor() {
                measured.figure(&format!("{name}, {}", contender.name()), own.median);
                bars.push(Bar {
                    label: format!("{name}, {}", contender.name()),
                    colour,
                    spread: own,
                });
                if is_the_generator(rate.median, alone) {
                    measured.remarks.push(format!(
                        "{name}, {}: as fast as the generator alone; its figures are the generator's.",
                        contender.name()
                    ));
                }
            }
            rows.push([
                (*name).to_owned(),
                contender.name().to_owned(),
                format!("{:.0}", rate.median / 1000.0),
                cpu.show(0),
                blank_if(contender == Contender::Nobody, format!("{:.0}", own.median)),
                blank_if(contender.is_floor(), format!("{:.0}", cpu.median - wire)),
                blank_if(contender.is_floor(), times(nftables, own.median)),
            ]);
        }
    }
    let caption = format!(
        "Packets: UDP in full NAT, {} bytes of payload. {} trials of {} packets by turns, all on one CPU; each packet was \
         checked where it arrived.",
        frames::PAYLOAD,
        extent.packet_trials,
        extent.packets
    );
    let header = [
        "",
        "gateway",
        "1000 packets/s, median",
        "CPU per packet, ns: median (min to max)",
        "less no gateway",
        "less a wire",
        "packets per CPU second, nftables = 1",
    ];
    measured.tables.push(Table::new(&caption, header, rows));
    measured.plots.push(Plot {
        name: "bench-nat-packets".to_owned(),
        title: "CPU time of the gateway per packet, full NAT".to_owned(),
        unit: "ns per packet".to_owned(),
        kind: PlotKind::Bars(bars),
    });
    Ok(())
}

/// A cell that some rows have.
fn blank_if(is_blank: bool, text: String) -> String {
    if is_blank { String::new() } else { text }
}

/// What wrk does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Small answers on connections that stay.
    KeepAlive,
    /// A connection for each small answer.
    PerRequest,
    /// One request at a time, for the time that it takes.
    Single,
    /// Large answers.
    Large,
}

impl Work {
    pub const ALL: [Self; 4] = [Self::KeepAlive, Self::PerRequest, Self::Single, Self::Large];

    const fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive, 32 connections",
            Self::PerRequest => "a connection per request, 32 at a time",
            Self::Single => "keep-alive, 1 connection",
            Self::Large => "4 MiB each, 4 connections",
        }
    }

    const fn connections(self) -> u32 {
        match self {
            Self::KeepAlive | Self::PerRequest => 32,
            Self::Single => 1,
            Self::Large => 4,
        }
    }

    const fn kind(self) -> Connections {
        match self {
            Self::PerRequest => Connections::PerRequest,
            _ => Connections::KeepAlive,
        }
    }

    const fn path(self) -> &'static str {
        match self {
            Self::Large => "/large",
            _ => "/",
        }
    }
}

/// One run of wrk through a gateway.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    pub requests_per_second: f64,
    pub half_within: Duration,
    pub most_within: Duration,
    pub bytes_per_second: f64,
    /// CPU time of everybody for a request.
    pub cpu_per_request: Duration,
    /// Part of the time in which the CPU was somebody else's.
    pub foreign: f64,
    pub took: Duration,
    /// CPU time of everybody.
    pub ran: Duration,
}

impl Trial {
    /// Whether others had so much of the CPU that it matters.
    pub fn is_disturbed(&self) -> bool {
        self.foreign > DISTURBED
    }
}

/// Runs wrk once.
///
/// # Errors
/// wrk saw an error, or the servers have not answered what it received.
pub fn trial(site: &mut NatSite, work: Work, path: &str, duration: Duration) -> Result<Trial> {
    let url = format!("http://{}{path}", site.http_target());
    let served_before = site.served()?;
    let (before, began) = (Usage::take(&site.threads()?)?, Instant::now());
    let load = run_wrk(
        site.client(),
        &Wrk {
            url: &url,
            kind: work.kind(),
            connections: work.connections(),
            threads: 1,
            duration,
            cpu: Some(frames::CPU),
            has_latency: true,
        },
    )?;
    let took = began.elapsed();
    let used = Usage::take(&site.threads()?)?.since(&before);
    let served = site.served()? - served_before;
    ensure!(
        load.socket_errors == 0 && load.refused == 0,
        "{} errors of sockets and {} answers that say no",
        load.socket_errors,
        load.refused
    );
    ensure!(load.requests > 0, "wrk received nothing");
    // Those whose answer wrk did not wait for any more.
    let most = load.requests + u64::from(work.connections());
    ensure!(
        (load.requests..=most).contains(&served),
        "wrk received {} answers, and the servers gave {served}",
        load.requests
    );
    let latency = |time: Option<Duration>| time.context("wrk told no latency");
    if work != Work::Large && path == "/" {
        let least = load.rate * PAGE_BYTES as f64;
        ensure!(load.bytes_per_second > least * 0.9, "answers without their body");
    }
    Ok(Trial {
        requests_per_second: load.rate,
        half_within: latency(load.half_within)?,
        most_within: latency(load.most_within)?,
        bytes_per_second: load.bytes_per_second,
        cpu_per_request: used.own.div_f64(served as f64),
        foreign: used.foreign.as_secs_f64() / took.as_secs_f64(),
        took,
        ran: used.own,
    })
}

fn requests(sites: &mut [NatSite], extent: Extent, measured: &mut Measured) -> Result<()> {
    let mut rows = Vec::new();
    let mut bars = Vec::new();
    let (mut disturbed, mut all) = (0, 0);
    let position = |wanted: Contender| {
        let found = Contender::ALL.iter().position(|one| *one == wanted);
        found.context("a contender")
    };
    let (nobody, wire) = (position(Contender::Nobody)?, position(Contender::Wire)?);
    let haproxy = position(Contender::Haproxy)?;
    for work in Work::ALL {
        eprintln!("{} trials of {} ...", extent.request_trials, work.name());
        let outcomes = in_turns(sites, extent.request_trials, |site| {
            let contender = site.contender;
            trial(site, work, work.path(), extent.duration)
                .with_context(|| format!("{}, {}", contender.name(), work.name()))
        })?;
        let micros = |trial: &Trial| trial.cpu_per_request.as_secs_f64() * 1e6;
        // Each trial less the floor's of the same turn.
        let less = |floor: usize, trials: &[Trial]| {
            let pairs = trials.iter().zip(&outcomes[floor]);
            Spread::of(
                pairs
                    .map(|(trial, floor)| micros(trial) - micros(floor))
                    .collect(),
            )
            .context("no trial")
        };
        let spread_of = |trials: &[Trial], of: fn(&Trial) -> f64| {
            Spread::of(trials.iter().map(of).collect()).context("no trial")
        };
        let alone = spread_of(&outcomes[nobody], |trial| trial.requests_per_second)?.median;
        let reference = less(nobody, &outcomes[haproxy])?.median;
        for (colour, (site, trials)) in sites.iter().zip(&outcomes).enumerate() {
            disturbed += trials.iter().filter(|trial| trial.is_disturbed()).count();
            all += trials.len();
            let contender = site.contender;
            let spread = |of| spread_of(trials, of);
            let cpu = spread(|trial| trial.cpu_per_request.as_secs_f64() * 1e6)?;
            let own = less(nobody, trials)?;
            let at_work = less(wire, trials)?;
            let rate = spread(|trial| trial.requests_per_second)?;
            let done = if work == Work::Large {
                let bytes = spread(|trial| trial.bytes_per_second / 1e6)?;
                format!("{} MB/s", bytes.show(0))
            } else {
                rate.show(0)
            };
            let name = format!("{}, {}", work.name(), contender.name());
            if contender != Contender::Nobody {
                measured.figure(&name, own.median);
            }
            if !contender.is_floor() {
                measured.figure(&format!("{name}, less a wire"), at_work.median);
                bars.push((work, colour, contender, own));
                if is_the_generator(rate.median, alone) {
                    measured.remarks.push(format!(
                        "{}, {}: nearly as many requests as without a gateway; its rate and latency are those of client and \
                         servers.",
                        work.name(),
                        contender.name()
                    ));
                }
            }
            let milliseconds = |spread: Spread| format!("{:.2}", spread.median * 1e3);
            rows.push([
                work.name().to_owned(),
                contender.name().to_owned(),
                done,
                milliseconds(spread(|trial| trial.half_within.as_secs_f64())?),
                milliseconds(spread(|trial| trial.most_within.as_secs_f64())?),
                cpu.show(1),
                blank_if(contender == Contender::Nobody, own.show(1)),
                blank_if(contender.is_floor(), at_work.show(1)),
                blank_if(contender.is_floor(), times(reference, own.median)),
            ]);
        }
    }
    let header = [
        "",
        "gateway",
        "requests/s: median (min to max)",
        "p50, ms",
        "p99, ms",
        "CPU per request, µs: median (min to max)",
        "less no gateway",
        "less a wire",
        "requests per CPU second of the gateway, HAProxy = 1",
    ];
    let caption = format!(
        "Requests: answers of {PAGE_BYTES} bytes, or of 4 MiB. {} trials of {} s by turns; client, gateway and servers on one \
         CPU.",
        extent.request_trials,
        extent.duration.as_secs()
    );
    measured.tables.push(Table::new(&caption, header, rows));
    measured.remarks.push(format!(
        "In {disturbed} of {all} trials of requests other programs had more than a tenth of the CPU; their time is in no figure \
         of CPU time, but in rates and latency."
    ));
    for (work, name, title) in [
        (
            Work::KeepAlive,
            "bench-nat-keep-alive",
            "CPU time of the gateway per request, connections kept",
        ),
        (
            Work::PerRequest,
            "bench-nat-per-request",
            "CPU time of the gateway per request, each on a new connection",
        ),
        (
            Work::Large,
            "bench-nat-large",
            "CPU time of the gateway per transfer of 4 MiB",
        ),
    ] {
        let of_work = bars.iter().filter(|bar| bar.0 == work);
        measured.plots.push(Plot {
            name: name.to_owned(),
            title: title.to_owned(),
            unit: "µs".to_owned(),
            kind: PlotKind::Bars(
                of_work
                    .map(|(_, colour, contender, spread)| Bar {
                        label: contender.name().to_owned(),
                        colour: *colour,
                        spread: *spread,
                    })
                    .collect(),
            ),
        });
    }
    Ok(())
}
