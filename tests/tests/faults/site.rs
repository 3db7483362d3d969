//! The site: two clients, and six servers beside the gateway, behind a native tunnel and behind one of the kernel's device.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use forwarder_tests::{
    blame::Service,
    lab::{self, Lab, Lifetime, Namespace, Process, agent, configuration::Configuration, wait_until},
    witness::{Failure, Record, SERVER_PORTS, Totals},
};
use nix::sys::signal::Signal;

const WITNESS: &str = env!("CARGO_BIN_EXE_witness");
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 100);
/// An address of the second client's that nobody asks from.
pub(crate) const SPARE: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 12);
/// Flows that the gateway has room for: several times what the clients hold.
pub(crate) const MAX_FLOWS: u32 = 16_384;
/// Without packets for so long, a flow is removed.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Room for the agent's files; far more than an hour's log.
const DISK_BYTES: u64 = 64 << 20;
/// Where servers are probed: no listener's port, so that one check serves TCP and UDP.
const PROBED: u16 = 79;
/// From SIGTERM until a client has ended: its patience, and a long transfer.
const END_DEADLINE: Duration = Duration::from_secs(60);
const DEADLINE: Duration = Duration::from_secs(10);

/// A listener with its group and its servers.
pub(crate) struct Listener {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    pub(crate) is_udp: bool,
    pub(crate) nat: &'static str,
    pub(crate) on_unhealthy: &'static str,
    pub(crate) servers: &'static [u16],
}

/// Servers 1 and 2 are beside the gateway, 3 and 4 behind the native tunnel, 5 and 6 behind the kernel's device.
pub(crate) const LISTENERS: [Listener; 7] = [
    Listener {
        name: "near",
        port: 80,
        is_udp: false,
        nat: "full",
        on_unhealthy: "keep",
        servers: &[1, 2],
    },
    Listener {
        name: "native",
        port: 81,
        is_udp: false,
        nat: "full",
        on_unhealthy: "keep",
        servers: &[3, 4],
    },
    Listener {
        name: "device",
        port: 82,
        is_udp: false,
        nat: "full",
        on_unhealthy: "keep",
        servers: &[5, 6],
    },
    Listener {
        name: "mixed",
        port: 83,
        is_udp: false,
        nat: "full",
        on_unhealthy: "reset",
        servers: &[1, 3, 5],
    },
    Listener {
        name: "dnat",
        port: 84,
        is_udp: false,
        nat: "dnat",
        on_unhealthy: "keep",
        servers: &[2, 4, 6],
    },
    Listener {
        name: "datagrams",
        port: 85,
        is_udp: true,
        nat: "full",
        on_unhealthy: "rehash",
        servers: &[1, 4, 5],
    },
    SINK,
];

/// Where flows go that only fill the table.
pub(crate) const SINK: Listener = Listener {
    name: "sink",
    port: 86,
    is_udp: true,
    nat: "full",
    on_unhealthy: "keep",
    servers: &[2],
};

/// A tunnel, and what it leads to.
pub(crate) struct Tunnel {
    pub(crate) device: &'static str,
    pub(crate) network: &'static str,
    /// The far end, inside.
    pub(crate) far: Ipv4Addr,
    pub(crate) servers: [u16; 2],
}

pub(crate) const TUNNELS: [Tunnel; 2] = [
    Tunnel {
        device: "cen",
        network: "192.168.1.0/24",
        far: Ipv4Addr::new(169, 254, 42, 2),
        servers: [3, 4],
    },
    Tunnel {
        device: "vpn",
        network: "192.168.2.0/24",
        far: Ipv4Addr::new(169, 254, 43, 2),
        servers: [5, 6],
    },
];

/// What `apply` and restarts change.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// Of servers 1 to 6.
    pub(crate) weights: [u16; 6],
    /// A server that is in no group.
    pub(crate) out: Option<u16>,
    /// Who encapsulates for the first tunnel.
    pub(crate) is_native: bool,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            weights: [100; 6],
            out: None,
            is_native: true,
        }
    }
}

pub(crate) struct Host {
    pub(crate) number: u16,
    pub(crate) namespace: Namespace,
    pub(crate) address: Ipv4Addr,
    /// The other end of its cable.
    pub(crate) switch: Namespace,
    pub(crate) port: String,
}

pub(crate) struct Site {
    pub(crate) gateway: Namespace,
    pub(crate) carrier: Namespace,
    /// The tunnels' far ends.
    pub(crate) routers: [Namespace; 2],
    pub(crate) clients: Vec<Host>,
    pub(crate) servers: Vec<Host>,
    pub(crate) lab: Lab,
}

impl Site {
    pub(crate) fn new() -> Result<Self> {
        // Else a process would end with the thread that started it, and players end before the lab.
        let lab = Lab::open(Lifetime::Keepable)?;
        lab.small_disk(&agent::directory(&lab), DISK_BYTES)?;
        let (gateway, carrier) = (lab.namespace("gateway")?, lab.namespace("carrier")?);
        let routers = [lab.namespace("router-a")?, lab.namespace("router-b")?];
        for router in [&gateway, &carrier, &routers[0], &routers[1]] {
            router.forward()?;
        }
        lab.cable((&gateway, "wan"), (&carrier, "eth0"), 1500)?;
        gateway.address("wan", "198.51.100.1/30")?;
        carrier.address("eth0", "198.51.100.2/30")?;
        gateway.route("203.0.113.0/24", Ipv4Addr::new(198, 51, 100, 2))?;
        for (number, (router, tunnel)) in (0..).zip(routers.iter().zip(&TUNNELS)) {
            let port = format!("eth{}", number + 1);
            let outside = Ipv4Addr::new(203, 0, 113, 4 * number + 2);
            lab.cable((&carrier, &port), (router, "wan"), 1500)?;
            carrier.address(&port, &format!("203.0.113.{}/30", 4 * number + 1))?;
            router.address("wan", &format!("{outside}/30"))?;
            router.route("198.51.100.0/30", Ipv4Addr::new(203, 0, 113, 4 * number + 1))?;
            let device = tunnel.device;
            let [a, b, c, _] = tunnel.far.octets();
            let near = Ipv4Addr::new(a, b, c, 1);
            let gateways = Ipv4Addr::new(198, 51, 100, 1);
            for (end, local, remote, inside) in [
                (&gateway, gateways, outside, near),
                (router, outside, gateways, tunnel.far),
            ] {
                end.run(&format!(
                    "ip link add name {device} mtu 1450 type vxlan id {c} local {local} remote {remote} dstport 4789"
                ))?;
                end.address(device, &format!("{inside}/30"))?;
                end.run(&format!("ip link set {device} up"))?;
            }
            gateway.route(tunnel.network, tunnel.far)?;
            for network in ["172.16.0.0/16", "100.64.0.0/26"] {
                router.route(network, near)?;
            }
        }
        let clients = segment(
            &lab,
            "vsw",
            (&gateway, "eth0"),
            [172, 16, 0],
            &["client", "client2"],
        )?;
        let mut servers = segment(
            &lab,
            "vsw1",
            (&gateway, "eth1"),
            [172, 16, 1],
            &["near1", "near2"],
        )?;
        let far = [["a1", "a2"], ["b1", "b2"]];
        for (number, (router, names)) in (1..).zip(routers.iter().zip(&far)) {
            let network = [192, 168, number];
            servers.extend(segment(
                &lab,
                &format!("far{number}"),
                (router, "eth1"),
                network,
                names,
            )?);
        }
        for (number, server) in (1..).zip(&mut servers) {
            server.number = number;
        }
        clients[1].namespace.address("eth0", &format!("{SPARE}/24"))?;
        Ok(Self {
            gateway,
            carrier,
            routers,
            clients,
            servers,
            lab,
        })
    }

    pub(crate) fn server(&self, number: u16) -> &Host {
        &self.servers[usize::from(number) - 1]
    }

    pub(crate) fn configuration(&self, setting: &Setting) -> Configuration {
        let mut text = format!(
            "[agent]\ncontrol_socket = \"{}\"\npin_directory = \"{}\"\non_stop = \"keep\"\nmax_flows = {MAX_FLOWS}\n\
             [snat]\nprefixes = [\"100.64.0.0/26\"]\nprobe_address = \"100.64.0.1\"\n\
             [interface.eth0]\n[interface.eth1]\n[interface.wan]\n\
             [network.near]\ncidrs = [\"172.16.0.0/16\"]\n",
            agent::control_socket(&self.lab).display(),
            self.lab.pin_directory().display(),
        );
        // Writing to a String cannot fail.
        for tunnel in &TUNNELS {
            let is_native = tunnel.device == "cen" && setting.is_native;
            let _ = write!(
                text,
                "[tunnel.{0}]\nmode = \"{1}\"\n\
                 [tunnel.{0}.health]\naddress = \"{2}\"\ninterval = \"500ms\"\ntimeout = \"400ms\"\n\
                 [network.{0}]\ncidrs = [\"{3}\"]\ntunnel = \"{0}\"\n",
                tunnel.device,
                if is_native { "native" } else { "kernel" },
                tunnel.far,
                tunnel.network,
            );
        }
        for listener in &LISTENERS {
            let Listener {
                name,
                port,
                nat,
                on_unhealthy,
                ..
            } = listener;
            let _ = write!(
                text,
                "[group.{name}]\nnat = \"{nat}\"\non_unhealthy = \"{on_unhealthy}\"\n\
                 [group.{name}.health]\nkind = \"tcp\"\nport = {}\ninterval = \"500ms\"\ntimeout = \"400ms\"\n\
                 [listener.{name}]\nvip = \"{VIP}\"\nport = {port}\nprotocol = \"{}\"\ngroup = \"{name}\"\n\
                 idle_timeout = \"{}s\"\n",
                SERVER_PORTS + PROBED,
                if listener.is_udp { "udp" } else { "tcp" },
                IDLE_TIMEOUT.as_secs(),
            );
            for server in listener
                .servers
                .iter()
                .filter(|server| setting.out != Some(**server) || listener.servers.len() == 1)
            {
                let _ = write!(
                    text,
                    "[group.{name}.backend.s{server}]\naddress = \"{}\"\nport = {}\nweight = {}\n",
                    self.server(*server).address,
                    SERVER_PORTS + port,
                    setting.weights[usize::from(*server) - 1],
                );
            }
        }
        Configuration::from_text(text)
    }

    pub(crate) fn services(&self) -> BTreeMap<u16, Service> {
        let service = |listener: &Listener| Service {
            servers: listener.servers.to_vec(),
            resets: listener.on_unhealthy == "reset",
            moves: listener.on_unhealthy == "rehash",
        };
        LISTENERS.iter().map(|one| (one.port, service(one))).collect()
    }

    /// Starts a server's witness and waits until it serves.
    pub(crate) fn serve(&self, number: u16) -> Result<Witness> {
        let host = self.server(number);
        let (tcp, udp) = ports(|listener| listener.servers.contains(&number));
        let mut arguments = vec!["serve".to_owned(), format!("--tcp={PROBED}")];
        arguments.extend(tcp);
        arguments.extend(udp);
        Witness::start(&self.lab, host, host.namespace.role(), &arguments)
    }

    /// Starts a client's witness. `name` is its log's.
    pub(crate) fn ask(&self, client: usize, name: &str) -> Result<Witness> {
        let host = &self.clients[client];
        let (tcp, udp) = ports(|listener| listener.name != SINK.name);
        let mut arguments = vec!["ask".to_owned(), format!("--vip={VIP}")];
        arguments.extend(tcp);
        arguments.extend(udp);
        Witness::start(&self.lab, host, name, &arguments)
    }

    /// Each listener has a group of its name; backends are named by the server's number.
    pub(crate) fn backend(listener: &Listener, server: u16) -> String {
        format!("{}/s{server}", listener.name)
    }
}

fn ports(is_wanted: impl Fn(&Listener) -> bool) -> (Vec<String>, Vec<String>) {
    let (udp, tcp): (Vec<_>, Vec<_>) = LISTENERS
        .iter()
        .filter(|listener| is_wanted(listener))
        .partition(|listener| listener.is_udp);
    let word =
        |kind: &str, all: Vec<&Listener>| all.iter().map(|one| format!("--{kind}={}", one.port)).collect();
    (word("tcp", tcp), word("udp", udp))
}

/// Hosts at one switch, with `uplink` as the router of their /24. The switch is theirs, so that their links can be cut.
fn segment(
    lab: &Lab,
    name: &str,
    uplink: (&Namespace, &str),
    network: [u8; 3],
    roles: &[&str],
) -> Result<Vec<Host>> {
    let switch = lab.namespace(name)?;
    switch.run("ip link add name bridge type bridge")?;
    switch.run("ip link set bridge up")?;
    let [a, b, c] = network;
    let router = Ipv4Addr::new(a, b, c, 1);
    lab.cable(uplink, (&switch, "uplink"), 1500)?;
    switch.run("ip link set uplink master bridge")?;
    uplink.0.address(uplink.1, &format!("{router}/24"))?;
    let mut hosts = Vec::new();
    for (number, role) in (0..).zip(roles) {
        let namespace = lab.namespace(role)?;
        let port = format!("port{number}");
        lab.cable((&namespace, "eth0"), (&switch, &port), 1500)?;
        switch.run(&format!("ip link set {port} master bridge"))?;
        let address = Ipv4Addr::new(a, b, c, 10 + number);
        namespace.address("eth0", &format!("{address}/24"))?;
        namespace.route("default", router)?;
        // Else the kernel of a server or client resets a connection now and then.
        namespace.steer("eth0")?;
        hosts.push(Host {
            number: u16::from(number) + 1,
            namespace,
            address,
            switch: switch.clone(),
            port,
        });
    }
    Ok(hosts)
}

/// A process of `witness`, and the file with its records.
pub(crate) struct Witness {
    process: Process,
    log: PathBuf,
}

impl Witness {
    fn start(lab: &Lab, host: &Host, name: &str, arguments: &[String]) -> Result<Self> {
        let log = lab.directory().join(format!("{name}.jsonl"));
        let before = ready(&log);
        let identity = [
            format!("--number={}", host.number),
            format!("--address={}", host.address),
        ];
        let all: Vec<&OsStr> = arguments.iter().chain(&identity).map(OsStr::new).collect();
        let process = lab.spawn(
            &host.namespace,
            &lab::Service {
                name,
                program: Path::new(WITNESS),
                arguments: &all,
                environment: &[],
                stop_signal: Signal::SIGTERM,
                log: &log,
            },
        )?;
        wait_until("a witness to be ready", DEADLINE, || {
            if let Some(status) = process.ended() {
                bail!("it ended with {status}: {}", lab::tail(&log, 5));
            }
            ensure!(ready(&log) > before, "{}", lab::tail(&log, 5));
            Ok(())
        })?;
        Ok(Self { process, log })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// `kill -9`, awaited.
    pub(crate) fn kill(&self) -> Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.wait(DEADLINE).context("it does not end")?;
        self.process.stop().map(drop)
    }

    /// Tells a client to end, and awaits that.
    pub(crate) fn end(&self) -> Result<()> {
        self.process.signal(Signal::SIGTERM);
        let status = self.process.wait(END_DEADLINE).context("a client does not end")?;
        ensure!(
            status.success(),
            "a client ended with {status}: {}",
            lab::tail(&self.log, 5)
        );
        self.process.stop().map(drop)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.process.ended().is_some()
    }
}

fn ready(log: &Path) -> usize {
    let text = fs::read_to_string(log).unwrap_or_default();
    let word = serde_json::to_string(&Record::Ready).unwrap_or_default();
    text.lines().filter(|line| *line == word).count()
}

/// What all witnesses of a site have written so far.
#[derive(Default)]
pub(crate) struct Testimony {
    pub(crate) failures: Vec<Failure>,
    pub(crate) violations: Vec<String>,
    pub(crate) totals: BTreeMap<u16, Totals>,
}

impl Testimony {
    pub(crate) fn of(site: &Site) -> Result<Self> {
        let mut this = Self::default();
        for entry in fs::read_dir(site.lab.directory())? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "jsonl") {
                continue;
            }
            for line in fs::read_to_string(&path)?.lines() {
                let who = path
                    .file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                // What is no record is what a program says that ends badly.
                match serde_json::from_str(line).with_context(|| format!("{who} says: {line}"))? {
                    Record::Ready => {}
                    Record::Failure(failure) => this.failures.push(failure),
                    Record::Violation { what, at_ns } => this.violations.push(format!(
                        "{:.3} s, {who}: {what}",
                        forwarder_tests::blame::seconds(at_ns)
                    )),
                    Record::Totals(totals) => {
                        for (listener, one) in totals {
                            this.totals.entry(listener).or_default().add(one);
                        }
                    }
                }
            }
        }
        Ok(this)
    }
}
