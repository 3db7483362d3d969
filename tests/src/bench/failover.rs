//! What clients notice when a server or the tunnel fails: eight servers, two of them behind the tunnel, wrk at full
//! rate, and a steady client that notes the fate of each of its requests.

use std::{
    fs, thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    Effort, Measured, Table,
    client::{self, PATIENCE, PERIOD, Request},
};
use crate::lab::{
    Lifetime,
    agent::Agent,
    configuration::Configuration,
    load::{Connections, Load, wrk},
    tail,
    topology::{Extras, PORT, Site},
};
use anyhow::{Context, Result, ensure};

const GROUP: &str = "web";
/// Connections of wrk's, each for one request.
const CONNECTIONS: u32 = 32;
/// Before the fault.
const WARM_UP: Duration = Duration::from_secs(3);
/// After it: longer than active checks need.
const AFTERMATH: Duration = Duration::from_secs(12);
/// An answer that took longer is called late; the second SYN of a client comes after 1 s.
const LATE: Duration = Duration::from_millis(500);

/// Something that goes wrong.
struct Case {
    name: &'static str,
    /// Servers that are out then.
    servers: &'static [&'static str],
    make: fn(&mut Site) -> Result<()>,
}

const CASES: [Case; 4] = [
    Case {
        name: "`kill -9` on a server",
        servers: &["ecs03"],
        make: |site| site.kill_nginx("ecs03"),
    },
    Case {
        name: "a server is black-holed",
        servers: &["ecs03"],
        make: |site| site.server("ecs03")?.namespace.black_hole(),
    },
    Case {
        name: "the tunnel is cut (2 servers)",
        servers: &["ecs02", "ecs04"],
        make: |site| site.far_router.run("ip link set wan down").map(drop),
    },
    Case {
        name: "a server accepts and never answers",
        servers: &["ecs03"],
        make: |site| site.pause_nginx("ecs03"),
    },
];

/// # Errors
/// A lab could not be made, or a request failed before anything was wrong.
pub fn run(on_unhealthy: Option<&str>, effort: Effort) -> Result<Measured> {
    let mut rows = Vec::new();
    for case in CASES.iter().take(effort.pick(CASES.len(), 1)) {
        eprintln!("{} ...", case.name);
        rows.push(play(case, on_unhealthy).with_context(|| case.name.to_owned())?);
    }
    let caption = format!(
        "8 servers, 2 of them behind a tunnel; health checks by HTTP every 2 s, timeout 1 s, fall 3; passive checks by \
         default{}. wrk: {CONNECTIONS} connections, a new one for each request. Steady client: a request every {} ms on a \
         connection of its own; one without an answer for {} s has failed.",
        on_unhealthy.map_or_else(String::new, |value| format!("; `on_unhealthy = \"{value}\"`")),
        PERIOD.as_millis(),
        PATIENCE.as_secs(),
    );
    let header = [
        "case",
        "found after",
        "by",
        "requests of the steady client",
        "failed",
        "last failed one sent after",
        "answered late (> 500 ms)",
        "requests of wrk",
        "its errors",
    ];
    Ok(Measured {
        tables: vec![Table::new(&caption, header, rows)],
        ..Measured::default()
    })
}

fn play(case: &Case, on_unhealthy: Option<&str>) -> Result<[String; 9]> {
    let extras = Extras {
        eight_servers: true,
        ..Extras::default()
    };
    let mut site = Site::cross_region(Lifetime::Process, extras)?;
    let agent = site.start_agent(&configuration(&site, on_unhealthy), GROUP)?;
    let time = WARM_UP + AFTERMATH;
    let (client, vip) = (site.client().clone(), site.vip);
    let (load, requests, fault, fault_clock) = thread::scope(|scope| -> Result<_> {
        let load = scope.spawn(|| wrk(&client, vip, PORT, Connections::PerRequest, CONNECTIONS, time));
        let requests = scope.spawn(|| client::steady(&client, vip, time));
        thread::sleep(WARM_UP);
        let (fault, clock) = (Instant::now(), SystemTime::now());
        (case.make)(&mut site)?;
        let load = load.join().expect("it does not panic")?;
        let requests = requests.join().expect("it does not panic")?;
        Ok((load, requests, fault, clock))
    })?;
    let found = found(&agent, case.servers, fault_clock)
        .with_context(|| format!("the agent's log ends so:\n{}", tail(agent.log(), 20)))?;
    row(case, &load, &requests, fault, &found)
}

fn configuration(site: &Site, on_unhealthy: Option<&str>) -> Configuration {
    let value = on_unhealthy.map(|value| format!("\"{value}\""));
    let mut keys = vec![("nat", "\"full\"")];
    keys.extend(value.as_deref().map(|value| ("on_unhealthy", value)));
    let group = site
        .configuration(&[])
        .table("group.web", &keys)
        .table("group.web.health", &[("kind", "\"http\"")]);
    site.servers
        .iter()
        .fold(group, |configuration, server| {
            configuration.backend(GROUP, server.name, server.address, PORT, 100)
        })
        .listener("web", site.vip, PORT, "tcp", GROUP)
}

/// When the log says that these servers are out, as time since the fault, and the words that say it.
fn found(agent: &Agent, servers: &[&str], fault: SystemTime) -> Result<Vec<(Duration, &'static str)>> {
    let log = fs::read_to_string(agent.log())?;
    let of = |server: &&str| {
        let lines = log
            .lines()
            .filter(|line| line.contains(&format!("backend=\"{server}\"")));
        let found = lines.filter_map(|line| {
            let by = if line.contains(" ejected for ") {
                "passive"
            } else if line.contains(" unhealthy: ") {
                "active"
            } else {
                return None;
            };
            Some((since(fault, line)?, by))
        });
        found
            .into_iter()
            .next()
            .with_context(|| format!("{server} was not found"))
    };
    servers.iter().map(of).collect()
}

/// How long after `start` a line was written; its time is UTC, and a run shorter than a day.
fn since(start: SystemTime, line: &str) -> Option<Duration> {
    const DAY: Duration = Duration::from_secs(86_400);
    let (_, time) = line
        .split_whitespace()
        .next()?
        .strip_suffix('Z')?
        .split_once('T')?;
    let mut parts = time.split(':');
    let hours: f64 = parts.next()?.parse().ok()?;
    let minutes: f64 = parts.next()?.parse().ok()?;
    let seconds: f64 = parts.next()?.parse().ok()?;
    let written = hours * 3600.0 + minutes * 60.0 + seconds;
    let start = start.duration_since(UNIX_EPOCH).ok()?.as_secs_f64() % DAY.as_secs_f64();
    Some(Duration::from_secs_f64(
        (written - start).rem_euclid(DAY.as_secs_f64()),
    ))
}

fn row(
    case: &Case,
    load: &Load,
    requests: &[Request],
    fault: Instant,
    found: &[(Duration, &str)],
) -> Result<[String; 9]> {
    let early = requests
        .iter()
        .filter(|one| one.failure.is_some() && one.sent_at + one.took < fault);
    ensure!(early.count() == 0, "requests failed before anything was wrong");
    let failed: Vec<_> = requests.iter().filter(|one| one.failure.is_some()).collect();
    let late = requests
        .iter()
        .filter(|one| one.failure.is_none() && one.took > LATE)
        .count();
    let last = failed
        .iter()
        .map(|one| one.sent_at.saturating_duration_since(fault))
        .max();
    for failure in &failed {
        eprintln!(
            "  sent {:>6} ms after the fault: {}",
            failure.sent_at.saturating_duration_since(fault).as_millis(),
            failure.failure.as_deref().unwrap_or_default()
        );
    }
    let times: Vec<_> = found.iter().map(|(time, _)| milliseconds(*time)).collect();
    let mut by: Vec<_> = found.iter().map(|(_, by)| *by).collect();
    by.dedup();
    Ok([
        case.name.to_owned(),
        times.join(", "),
        format!("{} check", by.join(", ")),
        requests.len().to_string(),
        failed.len().to_string(),
        last.map_or_else(|| "–".to_owned(), milliseconds),
        late.to_string(),
        load.requests.to_string(),
        (load.socket_errors + load.refused).to_string(),
    ])
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}
