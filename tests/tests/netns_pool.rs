//! Ring 3: the SNAT pool with as many real connections as it has room for.
//!
//! A client with several addresses, the gateway, and a host with the servers' addresses. The number of connections to
//! eight backends can be raised to a million: `FORWARDER_CROWD=1000000`; that takes some 12 GB of memory.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lab, Lifetime, Namespace,
    agent::{self, Agent},
    configuration::{Check, Configuration},
    crowd::{Clients, Servers, Tally},
    wait_until,
};
use forwarder_user::status::Status;

const CROWD: &str = env!("CARGO_BIN_EXE_crowd");
/// How many connections the test with eight backends opens.
const CROWD_VARIABLE: &str = "FORWARDER_CROWD";
const DEFAULT_CROWD: usize = 100_000;

const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 250), 80);
const GROUP: &str = "web";
const PORT: u16 = 8080;
/// Ports of one address of the pool.
const PORTS: usize = 64_512;
/// Connections from one address of the client: far enough below its ports that the kernel finds a free one fast.
const PER_SOURCE: usize = 25_000;
/// Longer than it takes to open and ask all connections: they are silent while the others have their turn.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a closed connection holds its binding, and what sweep and status lag behind.
const HOLD: Duration = Duration::from_secs(60 + 15);

struct Site {
    lab: Lab,
    gateway: Namespace,
    client: Namespace,
    server: Namespace,
    sources: Vec<Ipv4Addr>,
    backends: Vec<SocketAddrV4>,
}

impl Site {
    fn new(backends: u8, connections: usize) -> Result<Self> {
        let lab = Lab::open(Lifetime::Process)?;
        let (gateway, client, server) = (
            lab.namespace("gateway")?,
            lab.namespace("client")?,
            lab.namespace("server")?,
        );
        gateway.forward()?;
        lab.cable((&gateway, "eth0"), (&client, "eth0"), 1500)?;
        lab.cable((&gateway, "eth1"), (&server, "eth0"), 1500)?;
        gateway.address("eth0", "172.18.0.1/24")?;
        gateway.address("eth1", "172.17.0.1/24")?;
        let sources: Vec<_> = (0..connections.div_ceil(PER_SOURCE))
            .map(|number| Ipv4Addr::new(172, 18, 0, 10 + number as u8))
            .collect();
        for source in &sources {
            client.address("eth0", &format!("{source}/24"))?;
        }
        client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        let backends: Vec<_> = (0..backends)
            .map(|number| SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 10 + number), PORT))
            .collect();
        for backend in &backends {
            server.address("eth0", &format!("{}/24", backend.ip()))?;
        }
        server.sysctl("net/core/somaxconn", "4096")?;
        for network in ["172.18.0.0/24", "100.64.0.0/10"] {
            server.route(network, Ipv4Addr::new(172, 17, 0, 1))?;
        }
        Ok(Self {
            lab,
            gateway,
            client,
            server,
            sources,
            backends,
        })
    }

    /// `pool`: the `[snat]` prefixes for traffic.
    fn configuration(&self, pool: &str, max_flows: usize) -> Configuration {
        let quoted = |text: &dyn std::fmt::Display| format!("\"{text}\"");
        let mut configuration = Configuration::default()
            .table(
                "agent",
                &[
                    (
                        "control_socket",
                        &quoted(&agent::control_socket(&self.lab).display()),
                    ),
                    ("max_flows", &max_flows.to_string()),
                ],
            )
            .table(
                "snat",
                &[
                    ("prefixes", &format!("[{}]", quoted(&pool))),
                    ("probe_prefixes", "[\"100.64.8.0/32\"]"),
                ],
            )
            .interface("eth0", &[])
            .interface("eth1", &[])
            .group(GROUP, "full", Check::Tcp);
        for (number, backend) in self.backends.iter().enumerate() {
            configuration =
                configuration.backend(GROUP, &format!("b{number}"), *backend.ip(), backend.port(), 1);
        }
        configuration.table(
            "listener.web",
            &[
                ("vip", &quoted(VIP.ip())),
                ("port", &VIP.port().to_string()),
                ("group", &quoted(&GROUP)),
                ("idle_timeout", &quoted(&format!("{}s", IDLE_TIMEOUT.as_secs()))),
            ],
        )
    }

    fn start(&self, configuration: &Configuration) -> Result<Agent> {
        let agent = Agent::start(&self.lab, &self.gateway, configuration)?;
        wait_until("all backends to be healthy", Duration::from_secs(10), || {
            let backends = agent.backends(GROUP)?;
            ensure!(
                backends.iter().all(|backend| backend.health == "healthy"),
                "{backends:?}"
            );
            Ok(())
        })?;
        Ok(agent)
    }

    fn servers(&self, connections: usize) -> Result<Vec<Servers>> {
        let each = connections.div_ceil(self.backends.len());
        // Consistent hashing spreads within a few percent.
        let each = if self.backends.len() > 1 {
            each + each / 10
        } else {
            each
        };
        let start = |(identity, address): (u8, &SocketAddrV4)| {
            Servers::start(Path::new(CROWD), &self.server, *address, identity, each)
        };
        (1..).zip(&self.backends).map(start).collect()
    }

    fn clients(&self, connections: usize) -> Result<Clients> {
        Clients::start(Path::new(CROWD), &self.client, VIP, &self.sources, connections)
    }
}

/// Waits until this many bindings are in use.
fn await_used(agent: &Agent, used: usize, deadline: Duration) -> Result<Status> {
    let what = format!("{used} bindings to be in use");
    let (status, after) = wait_until(&what, deadline, || {
        let status = agent.status()?;
        ensure!(
            status.pool.used == used as u64,
            "{:?}, {:?}",
            status.pool,
            status.listeners[0].traffic
        );
        Ok(status)
    })?;
    println!("{used} bindings in use after {:.1} s", after.as_secs_f64());
    Ok(status)
}

/// Closes all connections, some at a time: a host with too many that are half closed drops them without telling the
/// other end (`tcp_out_of_resources` of Linux), and nobody between them can know.
fn close_all(agent: &Agent, clients: &mut Clients) -> Result<()> {
    while !clients.is_empty() {
        clients.close(clients.len().min(10_000))?;
        let left = clients.len() as u64;
        wait_until("the others to be closed", Duration::from_secs(10), || {
            let traffic = agent.status()?.listeners[0].traffic;
            ensure!(traffic.active_flows == left, "{traffic:?}, {left} are open");
            Ok(())
        })?;
    }
    Ok(())
}

/// Runs `test`; shows the agent's log if it fails.
fn play(backends: u8, connections: usize, test: impl FnOnce(&Site) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::new(backends, connections)?;
    let outcome = test(&site);
    if outcome.is_err() {
        println!(
            "the agent's log ends so:\n{}",
            lab::tail(&agent::log(&site.lab), 60)
        );
    }
    outcome
}

fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let outcome = work()?;
    println!("{what}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(outcome)
}

#[test]
fn every_binding_of_the_pool_is_used_before_the_first_refusal_and_used_again() -> Result<()> {
    let pool = 2 * PORTS;
    play(1, pool, |site| {
        let _servers = site.servers(pool)?;
        let agent = site.start(&site.configuration("100.64.0.0/31", pool))?;
        let mut clients = site.clients(pool + 200)?;

        let most = pool * 99 / 100;
        let tally = timed("99 % of the pool", || clients.open(most))?;
        tally.ensure_all(most)?;
        timed("each is answered", || clients.talk())?.ensure_all(most)?;
        clients.open(1)?.ensure_all(1)?;
        clients.open(pool - most - 1)?.ensure_all(pool - most - 1)?;
        await_used(&agent, pool, Duration::from_secs(5))?;

        // Full: the client is told.
        let refused = clients.open(100)?;
        ensure!(
            refused
                == Tally {
                    refused: 100,
                    ..Tally::default()
                },
            "not refused: {refused:?}"
        );
        let status = agent.status()?;
        let listener = &status.listeners[0].traffic;
        ensure!(
            (listener.connections_refused, listener.gateway_resets) == (100, 100),
            "{listener:?}"
        );
        let backend = &agent.backends(GROUP)?[0].traffic;
        ensure!(
            (backend.flows, backend.connections_refused) == (pool as u64, 100),
            "{backend:?}"
        );
        ensure!(agent.packets("pool_exhausted")? == 100, "by another reason");
        let log = wait_until("the log to say so", Duration::from_secs(5), || {
            let log = fs::read_to_string(agent.log())?;
            let line = log.lines().find(|line| line.contains("the SNAT pool is used up"));
            line.map(str::to_owned).context("no word of it")
        })?;
        println!("{}", log.0);
        ensure!(log.0.contains("add 1 address"), "{}", log.0);
        clients.talk()?.ensure_all(pool)?;

        // What a closed connection held is used again, after no packet of it can come any more.
        clients.close(1000)?;
        await_used(&agent, pool - 1000, HOLD)?;
        clients.open(1000)?.ensure_all(1000)?;
        await_used(&agent, pool, Duration::from_secs(5))?;
        ensure!(clients.open(1)?.refused == 1, "a binding from nowhere");

        close_all(&agent, &mut clients)?;
        await_used(&agent, 0, HOLD)?;
        Ok(())
    })
}

#[test]
fn many_connections_to_eight_backends_stay_where_they_were_opened() -> Result<()> {
    let crowd = match std::env::var(CROWD_VARIABLE) {
        Ok(value) => value.parse().context("a number of connections")?,
        Err(_) => DEFAULT_CROWD,
    };
    play(8, crowd, |site| {
        // 14 to 126 addresses.
        let pool = if crowd < 14 * PORTS {
            "100.64.0.0/28"
        } else {
            "100.64.0.0/25"
        };
        let _servers = site.servers(crowd)?;
        let agent = site.start(&site.configuration(pool, crowd))?;
        let mut clients = site.clients(crowd)?;
        let tally = timed("opened", || clients.open(crowd))?;
        tally.ensure_all(crowd)?;
        timed("answered", || clients.talk())?.ensure_all(crowd)?;
        await_used(&agent, crowd, Duration::from_secs(5))?;
        let share = crowd as f64 / 8.0;
        for backend in agent.backends(GROUP)? {
            let flows = backend.traffic.flows as f64;
            println!("{}: {flows} flows", backend.name);
            ensure!(
                (flows - share).abs() < share / 10.0,
                "{} has {flows} of {share}",
                backend.name
            );
        }
        timed("closed", || close_all(&agent, &mut clients))?;
        await_used(&agent, 0, HOLD)?;
        Ok(())
    })
}
