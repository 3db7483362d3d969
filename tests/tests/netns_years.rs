//! Ring 3: what a gateway goes through in years, in minutes: its agent is killed, upgraded and reloaded again and again
//! under full load, with thousands of connections open. No request fails, no connection is lost, no counter falls.
//! `--test-threads=1`, as the other labs.
//!
//! `FORWARDER_RESTARTS` says how often each of the three is done.

use std::{
    collections::BTreeMap,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    crowd::{Clients, Servers},
    load::{Connections, wrk},
    status::{HEALTHY, Metrics},
    topology::{Extras, PORT, Site},
    upgrade, wait_until,
};
use nix::sys::signal::Signal;

const GROUP: &str = "web";
const CROWD: &str = env!("CARGO_BIN_EXE_crowd");
const CROWD_GROUP: &str = "crowd";
const CROWD_PORT: u16 = 9000;
/// Connections that are open all the time, and used.
const CROWD_SIZE: usize = 10_000;
/// Kills, upgrades and reloads unless `FORWARDER_RESTARTS` says otherwise.
const RESTARTS: usize = 3;
const WRK_CONNECTIONS: u32 = 64;
/// wrk is started again and again, as nobody knows how long all steps take.
const SLICE: Duration = Duration::from_secs(5);
/// What the agent counts itself, which starts at zero with it (docs/metrics.md).
const OF_THE_AGENT: [&str; 5] = [
    "forwarder_changes_refused_total",
    "forwarder_group_probes_failed_total",
    "forwarder_tunnel_probes_failed_total",
    "forwarder_backend_ejections_total",
    "forwarder_backend_flows_ended_total",
];
/// Patience with slow machines; nothing takes so long.
const DEADLINE: Duration = Duration::from_secs(60);

/// What happens to the agent.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// `kill -9` and a start.
    Kill,
    /// A stop, and a start of a binary with other programs.
    Upgrade,
    /// `forwarder apply` of other backends.
    Reload,
}

impl Step {
    /// Counters that may fall by it: its new agent starts them at zero.
    const fn resets(self) -> &'static [&'static str] {
        match self {
            Self::Kill | Self::Upgrade => &OF_THE_AGENT,
            Self::Reload => &[],
        }
    }
}

const STEPS: [Step; 3] = [Step::Kill, Step::Upgrade, Step::Reload];

/// Backends of the two groups, with their weights.
struct Backends {
    web: &'static [(&'static str, u16)],
    crowd: &'static [(&'static str, u16)],
}

/// What the gateway is reloaded with, in turn. Connections stay with backends that leave.
const CONFIGURATIONS: [Backends; 3] = [
    Backends {
        web: &[("ecs01", 100), ("ecs02", 100)],
        crowd: &[("ecs01", 100), ("ecs03", 100)],
    },
    Backends {
        web: &[("ecs01", 10), ("ecs03", 300), ("ecs04", 50)],
        crowd: &[("ecs01", 100)],
    },
    Backends {
        web: &[("ecs01", 100), ("ecs02", 50), ("ecs03", 100), ("ecs04", 100)],
        crowd: &[("ecs03", 7)],
    },
];

fn configuration(site: &Site, backends: &Backends) -> Result<Configuration> {
    let mut configuration = site
        .configuration(&[])
        .agent_key("on_stop", "\"keep\"")
        .group(GROUP, "full", Check::Http)
        .group(CROWD_GROUP, "full", Check::None);
    for (group, port, names) in [
        (GROUP, PORT, backends.web),
        (CROWD_GROUP, CROWD_PORT, backends.crowd),
    ] {
        for (name, weight) in names {
            let address = site.server(name)?.address;
            configuration = configuration.backend(group, name, address, port, *weight);
        }
        configuration = configuration.listener(group, site.vip, port, "tcp", group);
    }
    // Nobody's turn to speak may come too late, whatever the load is.
    Ok(Configuration::from_text(
        configuration.to_string().replace("\"10s\"", "\"1000s\""),
    ))
}

/// The programs that run at each pinned link, by the kernel's tag of their instructions.
fn tags(site: &Site) -> Result<BTreeMap<String, String>> {
    let ask = |command: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&site.gateway.run(command)?)?)
    };
    let mut tags = BTreeMap::new();
    for entry in std::fs::read_dir(site.lab.pin_directory())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with("link-") {
            continue;
        }
        let path = site.lab.pin_directory().join(&name);
        let link = ask(&format!("bpftool -j link show pinned {}", path.display()))?;
        let program = ask(&format!("bpftool -j prog show id {}", link["prog_id"]))?;
        let tag = program["tag"].as_str().context("a program has a tag")?;
        tags.insert(name, tag.to_owned());
    }
    ensure!(!tags.is_empty(), "nothing is attached");
    Ok(tags)
}

/// TCP segments that a host has sent again.
fn retransmitted(host: &Namespace) -> Result<u64> {
    let text = host.run("cat /proc/net/snmp")?;
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let names = tcp.next().context("names of TCP's counters")?;
    let values = tcp.next().context("TCP's counters")?;
    let (_, value) = names
        .split(' ')
        .zip(values.split(' '))
        .find(|(name, _)| *name == "RetransSegs")
        .context("RetransSegs")?;
    Ok(value.parse()?)
}

/// A gateway whose agent comes and goes.
struct Gateway<'a> {
    site: &'a Site,
    /// This one, and one with other programs.
    binaries: [PathBuf; 2],
    /// Which of them runs.
    binary: usize,
    /// Which of [`CONFIGURATIONS`] is in force.
    configuration: usize,
    agent: Agent,
    last: Metrics,
}

impl Gateway<'_> {
    fn take(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Kill => self.kill(),
            Step::Upgrade => self.upgrade(),
            Step::Reload => self.reload(),
        }
    }

    fn start(&mut self) -> Result<()> {
        let configuration = configuration(self.site, &CONFIGURATIONS[self.configuration])?;
        self.agent = self
            .site
            .start_agent_binary(&self.binaries[self.binary], &configuration, GROUP)?;
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        self.agent.end(Signal::SIGKILL)?;
        self.start()
    }

    /// As a package does it: the old one is stopped, the new one started.
    fn upgrade(&mut self) -> Result<()> {
        let before = tags(self.site)?;
        let status = self.agent.stop()?;
        ensure!(status.success(), "the agent ended with {status}");
        assert_eq!(tags(self.site)?, before, "the programs stay");
        self.binary = (self.binary + 1) % self.binaries.len();
        self.start()?;
        let after = tags(self.site)?;
        ensure!(
            before.keys().eq(after.keys()) && before.iter().all(|(link, tag)| after[link] != *tag),
            "not every link has another program: {before:?}, {after:?}"
        );
        Ok(())
    }

    fn reload(&mut self) -> Result<()> {
        self.configuration = (self.configuration + 1) % CONFIGURATIONS.len();
        let backends = &CONFIGURATIONS[self.configuration];
        self.agent.rewrite(&configuration(self.site, backends)?)?;
        let file = self.agent.configuration().to_str().context("the path is text")?;
        let output = self.agent.ask("apply", &["-c", file, "-o", "json"])?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // Those that are new take part before the next step.
        wait_until("all backends to be healthy", DEADLINE, || {
            let found = self.agent.backends(GROUP)?;
            ensure!(
                found.len() == backends.web.len() && found.iter().all(|one| one.health == HEALTHY),
                "{found:?}"
            );
            Ok(())
        })
        .map(drop)
    }

    /// No counter has fallen but those that may, and packets are counted still.
    fn look(&mut self, may_fall: &[&str]) -> Result<()> {
        let now = self.agent.metrics()?;
        let mut fallen = now.fallen_since(&self.last);
        fallen.retain(|text| !may_fall.iter().any(|name| text.starts_with(name)));
        ensure!(fallen.is_empty(), "counters fell: {fallen:#?}");
        let packets = |metrics: &Metrics| metrics.sum("forwarder_listener_packets_total", &[]);
        ensure!(packets(&now) > packets(&self.last), "nothing was forwarded");
        self.last = now;
        Ok(())
    }
}

#[test]
fn kills_upgrades_and_reloads_lose_no_request_no_connection_and_no_count() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let restarts = match std::env::var("FORWARDER_RESTARTS") {
        Ok(text) => text.parse().context("FORWARDER_RESTARTS is a number")?,
        Err(_) => RESTARTS,
    };
    let extras = Extras {
        second_servers: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let client = site.client();
    client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let binaries = [agent::binary()?, site.lab.directory().join("upgrade")];
    upgrade::with_other_programs(&binaries[0], &binaries[1])?;

    let agent = site.start_agent(&configuration(&site, &CONFIGURATIONS[0])?, GROUP)?;
    let serve = |name: &str, identity| {
        let server = site.server(name)?;
        let address = SocketAddrV4::new(server.address, CROWD_PORT);
        Servers::start(Path::new(CROWD), &server.namespace, address, identity, CROWD_SIZE)
    };
    let _servers = [serve("ecs01", 1)?, serve("ecs03", 2)?];
    let vip = SocketAddrV4::new(site.vip, CROWD_PORT);
    let source = site.client_address()?;
    let mut clients = Clients::start(Path::new(CROWD), client, vip, &[source], CROWD_SIZE)?;
    clients.open(CROWD_SIZE)?.ensure_all(CROWD_SIZE)?;
    clients.talk()?.ensure_all(CROWD_SIZE)?;

    let last = agent.metrics()?;
    let mut gateway = Gateway {
        site: &site,
        binaries,
        binary: 0,
        configuration: 0,
        agent,
        last,
    };
    let has_ended = AtomicBool::new(false);
    let is_on = || !has_ended.load(Ordering::Relaxed);
    let sent_again = retransmitted(client)?;
    let (steps, requests, talks) = thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<BTreeMap<&str, u64>> {
            let mut requests = BTreeMap::new();
            let kinds = [("kept", Connections::KeepAlive), ("new", Connections::PerRequest)];
            for (name, kind) in kinds.iter().cycle().take_while(|_| is_on()) {
                let load = wrk(client, site.vip, PORT, *kind, WRK_CONNECTIONS, SLICE)?;
                ensure!(
                    load.requests > 0 && load.socket_errors == 0 && load.refused == 0,
                    "requests failed on {name} connections: {load:?}"
                );
                *requests.entry(*name).or_default() += load.requests;
            }
            Ok(requests)
        });
        let talk = scope.spawn(|| -> Result<usize> {
            let mut talks = 0;
            while is_on() {
                clients.talk()?.ensure_all(CROWD_SIZE)?;
                talks += 1;
            }
            Ok(talks)
        });
        let steps = (|| -> Result<Vec<String>> {
            let mut took = [Duration::ZERO; STEPS.len()];
            for round in 1..=restarts {
                for (step, took) in STEPS.into_iter().zip(&mut took) {
                    let start = Instant::now();
                    gateway.take(step).with_context(|| format!("{step:?} {round}"))?;
                    gateway
                        .look(step.resets())
                        .with_context(|| format!("after {step:?} {round}"))?;
                    *took += start.elapsed();
                    if load.is_finished() || talk.is_finished() {
                        bail!("the load ended at {step:?} {round}");
                    }
                }
            }
            let said = STEPS.iter().zip(took).map(|(step, took)| {
                let each = took.as_secs_f64() / restarts.max(1) as f64;
                format!("{restarts} x {step:?} of {each:.1} s")
            });
            Ok(said.collect())
        })();
        has_ended.store(true, Ordering::Relaxed);
        (steps, load.join(), talk.join())
    });
    // What the load says explains what the steps say.
    let requests = requests.map_err(|_| anyhow!("wrk's thread panicked"))??;
    let talks = talks.map_err(|_| anyhow!("the crowd's thread panicked"))??;
    let steps = steps?;
    println!(
        "{}; no failure of {requests:?} requests and {talks} x {CROWD_SIZE} on open connections; segments sent again: {}",
        steps.join(", "),
        retransmitted(client)? - sent_again
    );

    clients.talk()?.ensure_all(CROWD_SIZE)?;
    gateway.look(&[])?;
    let opened = gateway.last.sum(
        "forwarder_listener_connections_total",
        &[("listener", CROWD_GROUP)],
    );
    assert_eq!(opened, CROWD_SIZE as f64, "they are the ones that were opened");
    clients.close(CROWD_SIZE)?;
    show_log.all_is_well();
    Ok(())
}
