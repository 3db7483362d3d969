//! Asks the kernel, the routers and the servers. Nothing is judged here.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use ipnet::IpNet;

use super::{
    Question,
    facts::{Attempt, Backend, Device, Facts, Host, Narrow},
};
use crate::{
    config::{Config, Group, HealthCheck, Ports, Probe, Protocol, RoutingTable},
    diagnose::{self, Depth, Diagnosis, Subject},
    error::Error,
    health::{self, Origin, ProbeFailure, Stage, Target, tcp},
    network::{self, Network, PolicyRule, RouteError, Rule, Selector},
    state::bonds,
};

/// Where probe addresses are local.
const PROBE_INTERFACE: &str = "lo";
/// Backends asked at once.
const MAX_PROBES: usize = 256;
/// Diagnoses at once, and in all: each takes one second to four, and a dozen echo requests at most.
const MAX_DIAGNOSES: usize = 16;
const MAX_DIAGNOSED: usize = 128;
/// How long a probe waits at least: one lost SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long a port that may be the right one has to answer.
const PORT_PATIENCE: Duration = Duration::from_millis(500);
/// The least that a path is searched down to, in bytes: what every IPv4 host takes (RFC 791), less than what every IPv6
/// link carries (RFC 8200 §5).
const LEAST_MTU_BYTES: u32 = 576;
/// Sizes tried at once when a path is narrow.
const SIZES_AT_ONCE: u32 = 15;

/// What is there for the time of the check: probe addresses, and where no agent sees to it, rules for routing tables.
pub(super) struct Loan {
    /// Addresses that probes leave from, one per prefix of the SNAT pool; the probe addresses come first.
    sources: Vec<(IpNet, IpAddr)>,
    /// Those that were not local before.
    addresses: Vec<IpAddr>,
    /// By name of the network.
    tables: BTreeMap<String, u32>,
    /// Those that were not there before.
    rules: Vec<PolicyRule>,
}

impl Loan {
    pub(super) async fn take(network: &Network, question: &Question) -> Result<Self, Error> {
        let mut loan = Self {
            sources: sources(&question.config, question.agent.is_some()),
            addresses: Vec::new(),
            tables: tables(network, &question.config).await,
            rules: Vec::new(),
        };
        match loan.fill(network, question).await {
            Ok(()) => Ok(loan),
            Err(error) => {
                loan.give_back(network).await?;
                Err(error)
            }
        }
    }

    async fn fill(&mut self, network: &Network, question: &Question) -> Result<(), Error> {
        for (_, address) in &self.sources {
            if network.add_address(PROBE_INTERFACE, *address).await? {
                self.addresses.push(*address);
            }
        }
        if question.agent.is_some() {
            return Ok(());
        }
        let present = network.policy().await?.rules;
        for (name, table) in &self.tables {
            for cidr in &question.config.networks[name].cidrs {
                let is_same = |rule: &Rule| rule.to == cidr.trunc() && rule.table == Some(*table);
                if !present.iter().any(is_same) {
                    let rule = PolicyRule {
                        packets: Selector::To(*cidr),
                        table: *table,
                    };
                    network.add_rule(&rule).await?;
                    self.rules.push(rule);
                }
            }
        }
        Ok(())
    }

    /// Undoes all that; goes on where something cannot be undone.
    pub(super) async fn give_back(&self, network: &Network) -> Result<(), Error> {
        let mut outcome = Ok(());
        for address in &self.addresses {
            let removed = network.remove_address(PROBE_INTERFACE, *address).await;
            outcome = outcome.and(removed.map(drop));
        }
        for rule in &self.rules {
            outcome = outcome.and(network.remove_rule(rule).await);
        }
        outcome
    }
}

/// The numbers of the routing tables that networks have. A VRF device that does not exist has none.
async fn tables(network: &Network, config: &Config) -> BTreeMap<String, u32> {
    let mut tables = BTreeMap::new();
    for (name, wanted) in &config.networks {
        let number = match &wanted.table {
            None => None,
            Some(RoutingTable::Number(number)) => Some(*number),
            // What is wrong with it is a finding, not an error.
            Some(RoutingTable::Vrf(device)) => network.vrf_table(device).await.ok(),
        };
        if let Some(number) = number {
            tables.insert(name.clone(), number);
        }
    }
    tables
}

/// The probe addresses, and for every other prefix one that no flow uses: its network address. A prefix of one or
/// two addresses has none to spare while an agent uses them.
fn sources(config: &Config, has_agent: bool) -> Vec<(IpNet, IpAddr)> {
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for prefix in &config.snat.prefixes {
        let probe = config.snat.probes.iter().find(|probe| prefix.contains(probe));
        if let Some(probe) = probe {
            first.push((*prefix, probe));
        } else if prefix.prefix_len() + 1 < prefix.max_prefix_len() || !has_agent {
            others.push((*prefix, prefix.network()));
        }
    }
    first.append(&mut others);
    first
}

pub(super) async fn gather(network: &Network, question: Question, loan: &Loan) -> Result<Facts, Error> {
    let config = narrowed(question.config, question.group.as_deref());
    let mut devices = Vec::new();
    let links = network.interfaces().await?;
    let bonded: HashSet<u32> = links
        .iter()
        .filter(|link| config.interfaces.contains_key(&link.name))
        .flat_map(|link| bonds::ports(&links, link.index))
        .map(|port| port.index)
        .collect();
    for link in links {
        let is_ours = config.interfaces.contains_key(&link.name)
            || config.tunnels.contains_key(&link.name)
            || bonded.contains(&link.index);
        devices.push(device(network, link, is_ours).await?);
    }
    let vips = config.vips();
    ask_for_vips(network, &devices, &vips).await;

    let mut facts = Facts {
        file: question.file,
        host: host(network, &config, question.agent).await?,
        policy: network.policy().await?,
        tables: loan.tables.clone(),
        vips: BTreeMap::new(),
        backends: Vec::new(),
        devices,
        config,
    };
    facts.backends = probe_all(network, &facts, &loan.sources).await;
    explain(network, &mut facts).await;
    look_for_ports(&mut facts).await;
    measure_paths(&mut facts).await;
    for vip in vips {
        let owner = owner(network, &facts.devices, vip).await;
        facts.vips.insert(vip, owner);
    }
    Ok(facts)
}

/// Without the groups and listeners that nobody asked about.
fn narrowed(mut config: Config, group: Option<&str>) -> Config {
    if let Some(group) = group {
        config.groups.retain(|name, _| name == group);
        config.listeners.retain(|_, listener| listener.group == group);
    }
    config
}

async fn host(
    network: &Network,
    config: &Config,
    agent: Option<crate::status::Status>,
) -> Result<Host, Error> {
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = kernel.split(['.', '-']).map_while(|number| number.parse().ok());
    Ok(Host {
        kernel_version: (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)),
        kernel,
        cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
        forwards: network.ip_forward()?,
        has_jit: read("/proc/sys/net/core/bpf_jit_enable").map(|text| text != "0"),
        forwards_v6: network.forwards_v6("all").unwrap_or(true),
        // Of IPv4 alone: IPv6 validates no sources.
        is_pool_routed: match config.snat.ranges.iter().find(|(first, _)| first.is_ipv4()) {
            Some((first, _)) => network
                .route_to(*first, None)
                .await
                .is_ok_and(|route| !route.is_local),
            None => true,
        },
        agent,
    })
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

async fn device(network: &Network, link: network::Interface, is_ours: bool) -> Result<Device, Error> {
    let mut device = Device {
        addresses: network.addresses(link.index).await?,
        rp_filter: None,
        forwards: None,
        forwards_v6: None,
        offloads: None,
        queues: None,
        runs_programs: None,
        takes_redirects: None,
        underlay: None,
        vrf_table: None,
        link,
    };
    if device.link.kind.to_string() == "vrf" {
        device.vrf_table = network.vrf_table(&device.link.name).await.ok();
    }
    if is_ours {
        let link = &device.link;
        device.rp_filter = network.rp_filter(&link.name).ok();
        device.forwards = network.forwards(&link.name).ok();
        device.forwards_v6 = network.forwards_v6(&link.name).ok();
        device.offloads = network::offloads(link.index);
        device.queues = network::queues(link.index);
        device.runs_programs = network::runs_programs(link.index);
        device.takes_redirects = network::takes_redirects(link.index, link.mtu_bytes);
        if let Some(remote) = link.remote
            && let Ok(route) = network.route_to(remote, None).await
            && let Some(carrier) = network.interface_by_index(route.interface).await?
        {
            device.underlay = Some((carrier.name, carrier.mtu_bytes));
        }
    }
    Ok(device)
}

/// Interfaces on whose network an address lies.
fn on_link(devices: &[Device], address: IpAddr) -> impl Iterator<Item = &Device> {
    devices.iter().filter(move |device| {
        let mut prefixes = device.addresses.iter();
        device.link.is_running()
            && prefixes.any(|prefix| prefix.contains(&address) && prefix.addr() != address)
    })
}

/// Lets the kernel ask who has the VIPs; [`owner`] reads the answer.
async fn ask_for_vips(network: &Network, devices: &[Device], vips: &BTreeSet<IpAddr>) {
    for vip in vips {
        for device in on_link(devices, *vip).filter(|device| device.link.has_neighbours) {
            // If it cannot be asked, nobody will have answered.
            let _ = network.resolve_neighbour(device.link.index, *vip).await;
        }
    }
}

/// The link address of a host that answers ARP for `vip`. The data path does not answer this host's own questions,
/// so it is another's.
async fn owner(network: &Network, devices: &[Device], vip: IpAddr) -> Option<[u8; 6]> {
    for device in on_link(devices, vip).filter(|device| device.link.has_neighbours) {
        let neighbour = network.neighbour(device.link.index, vip).await;
        if let Ok(Some(neighbour)) = neighbour
            && neighbour.state.is_usable()
        {
            return neighbour.mac;
        }
    }
    None
}

/// Looks up the route to every backend and asks it from every source.
async fn probe_all(network: &Network, facts: &Facts, sources: &[(IpNet, IpAddr)]) -> Vec<Backend> {
    let mut probes = Vec::new();
    for (group_name, group) in &facts.config.groups {
        let check = check(&facts.config, group_name, group);
        for (name, backend) in &group.backends {
            // Without a port of its own it can be asked where the check says only.
            let target = check
                .as_ref()
                .filter(|check| check.port.or(backend.port).is_some() || !check.probe.needs_port())
                .map(|check| Target::new(group_name, name, backend, check));
            let is_same = |(_, source): &&(IpNet, IpAddr)| source.is_ipv4() == backend.address.is_ipv4();
            let sources: Vec<_> = sources.iter().filter(is_same).copied().collect();
            probes.push(async move {
                let route = network
                    .route_to(backend.address, sources.first().map(|(_, source)| *source))
                    .await;
                let mut found = Backend {
                    group: group_name.clone(),
                    name: name.clone(),
                    address: backend.address,
                    port: backend.port,
                    probed_port: target.as_ref().map(|target| target.address.port()),
                    egress: None,
                    astray: Vec::new(),
                    attempts: Vec::new(),
                    open_ports: Vec::new(),
                    narrow: None,
                    route,
                };
                if let Ok(route) = &found.route {
                    found.egress = facts
                        .device_by_index(route.interface)
                        .map(|device| device.link.name.clone());
                    // By the kernel's own request first, which carries the address that the link knows.
                    let _ = network
                        .resolve_neighbour(route.interface, route.next_hop(backend.address))
                        .await;
                }
                found.astray = astray(network, facts, &found).await;
                for (prefix, source) in sources {
                    let outcome = match &target {
                        Some(target) => health::probe(target, source.into()).await,
                        None => echo(source, backend.address).await,
                    };
                    found.attempts.push(Attempt {
                        prefix,
                        source,
                        outcome,
                        diagnosis: None,
                    });
                }
                found
            });
        }
    }
    stream::iter(probes).buffered(MAX_PROBES).collect().await
}

/// Rules and VRFs may send packets that are forwarded elsewhere than those that this host sends.
async fn astray(network: &Network, facts: &Facts, backend: &Backend) -> Vec<(String, Option<String>)> {
    let mut astray = Vec::new();
    let mut ranges = facts.config.snat.ranges.iter();
    let range = ranges.find(|(first, _)| first.is_ipv4() == backend.address.is_ipv4());
    let (Ok(route), Some((source, _))) = (&backend.route, range) else {
        return astray;
    };
    let interfaces = facts
        .config
        .interfaces
        .keys()
        .filter_map(|name| facts.device(name));
    for device in interfaces.filter(|device| device.link.is_running() && device.forwards == Some(true)) {
        let forwarded = network
            .forwarded_route(backend.address, *source, device.link.index)
            .await;
        let leaves_by = match forwarded {
            Ok(forwarded) if forwarded.interface == route.interface => continue,
            Ok(forwarded) => facts
                .device_by_index(forwarded.interface)
                .map(|device| device.link.name.clone()),
            // Source validation is looked at elsewhere.
            Err(RouteError::Failed(_)) => continue,
            Err(_) => None,
        };
        astray.push((device.link.name.clone(), leaves_by));
    }
    astray
}

/// How a group's backends are asked: as its health check does, patiently; without one by a handshake, if they serve
/// TCP at all.
fn check(config: &Config, name: &str, group: &Group) -> Option<HealthCheck> {
    let serves_tcp = || {
        let mut listeners = config.listeners.values();
        listeners.any(|listener| listener.group == name && listener.protocol == Protocol::Tcp)
    };
    match &group.health {
        Some(check) => Some(HealthCheck {
            timeout: check.timeout.max(PATIENCE),
            ..check.clone()
        }),
        None => serves_tcp().then_some(HealthCheck {
            probe: Probe::Tcp,
            interval: PATIENCE,
            timeout: PATIENCE,
            rise: 1,
            fall: 1,
            jitter_percent: 0,
            port: None,
        }),
    }
}

async fn echo(source: IpAddr, target: IpAddr) -> Result<Duration, ProbeFailure> {
    let start = Instant::now();
    if diagnose::answers_echo(source, target, 64).await {
        Ok(start.elapsed())
    } else {
        Err(ProbeFailure::TimedOut {
            stage: Stage::Connect,
            after: start.elapsed(),
        })
    }
}

/// Finds out why backends are silent. A prefix of the pool is asked about on its own only if others get through.
async fn explain(network: &Network, facts: &mut Facts) {
    let mut diagnoses = Vec::new();
    for (number, backend) in facts.backends.iter().enumerate() {
        let failed = backend
            .attempts
            .iter()
            .enumerate()
            .filter_map(|(attempt, asked)| {
                let failure = asked.outcome.as_ref().err()?;
                Some((attempt, asked, failure))
            });
        let gets_through = backend.attempts.iter().any(|attempt| attempt.outcome.is_ok());
        for (attempt, asked, failure) in failed.take(if gets_through { usize::MAX } else { 1 }) {
            let all = facts.config.snat.prefixes_of(backend.address);
            let remote = facts
                .network_of(backend.address)
                .map(|remote| (remote.cidr, remote.tunnel.map(str::to_owned)));
            let subject = Subject {
                backend: SocketAddr::new(backend.address, backend.probed_port.unwrap_or(0)),
                probe_source: asked.source,
                snat_prefixes: if gets_through { vec![asked.prefix] } else { all },
                remote,
            };
            let failure = failure.clone();
            diagnoses.push(async move {
                let diagnosis = diagnose::diagnose(network, &subject, &failure, Depth::Thorough).await;
                (number, attempt, diagnosis)
            });
        }
    }
    diagnoses.truncate(MAX_DIAGNOSED);
    let found: Vec<(usize, usize, Diagnosis)> =
        stream::iter(diagnoses).buffered(MAX_DIAGNOSES).collect().await;
    for (backend, attempt, diagnosis) in found {
        facts.backends[backend].attempts[attempt].diagnosis = Some(diagnosis);
    }
}

/// Asks backends that refuse on the other ports that this configuration knows.
async fn look_for_ports(facts: &mut Facts) {
    let mut ports: BTreeSet<u16> = facts
        .config
        .listeners
        .values()
        .filter(|listener| listener.ports != Ports::NONE)
        .filter_map(|listener| listener.ports.single())
        .collect();
    for group in facts.config.groups.values() {
        ports.extend(group.backends.values().filter_map(|backend| backend.port));
    }
    let refused = facts.backends.iter_mut().filter(|backend| {
        let mut outcomes = backend.attempts.iter().map(|attempt| &attempt.outcome);
        outcomes.any(|outcome| *outcome == Err(ProbeFailure::Refused))
    });
    for backend in refused.take(MAX_DIAGNOSED) {
        let Some(source) = backend.attempts.first().map(|attempt| attempt.source) else {
            continue;
        };
        let asked = ports.iter().filter(|port| Some(**port) != backend.probed_port);
        let answers = asked.map(|port| async {
            let target = SocketAddr::new(backend.address, *port);
            let outcome = tcp::probe(target, &Origin::Address(source), PORT_PATIENCE).await;
            outcome.is_ok().then_some(*port)
        });
        let found: Vec<_> = stream::iter(answers).buffered(MAX_DIAGNOSES).collect().await;
        backend.open_ports = found.into_iter().flatten().collect();
    }
}

/// Sends packets as large as they may be, to one backend per next hop that answers small ones.
async fn measure_paths(facts: &mut Facts) {
    let mut measured = BTreeSet::new();
    for number in 0..facts.backends.len() {
        let backend = &facts.backends[number];
        let answered = backend.attempts.iter().find(|attempt| attempt.outcome.is_ok());
        let (Some(answered), Ok(route)) = (answered, &backend.route) else {
            continue;
        };
        let Some(device) = facts.device_by_index(route.interface) else {
            continue;
        };
        let (source, address, mtu_bytes) = (answered.source, backend.address, device.link.mtu_bytes);
        let path = (route.interface, route.next_hop(address));
        if measured.contains(&path) || mtu_bytes <= LEAST_MTU_BYTES {
            continue;
        }
        if answers(source, address, mtu_bytes).await {
            measured.insert(path);
        } else if answers(source, address, LEAST_MTU_BYTES).await {
            measured.insert(path);
            let carried_bytes = largest(source, address, mtu_bytes).await;
            facts.backends[number].narrow = Some(Narrow {
                mtu_bytes,
                carried_bytes,
            });
        }
    }
}

async fn answers(source: IpAddr, address: IpAddr, packet_bytes: u32) -> bool {
    diagnose::answers_echo(source, address, packet_bytes as usize).await
}

/// The largest packet that is answered, where those of [`LEAST_MTU_BYTES`] are and those of `too_large` are not.
async fn largest(source: IpAddr, address: IpAddr, too_large: u32) -> u32 {
    let (mut carried, mut lost) = (LEAST_MTU_BYTES, too_large);
    while lost - carried > 1 {
        let step = (lost - carried).div_ceil(SIZES_AT_ONCE + 1);
        let sizes = (1..=SIZES_AT_ONCE)
            .map(|number| carried + number * step)
            .filter(|size| *size < lost);
        let asked = sizes.map(|size| async move { (size, answers(source, address, size).await) });
        let found: Vec<_> = stream::iter(asked)
            .buffered(SIZES_AT_ONCE as usize)
            .collect()
            .await;
        let (mut best, mut worst) = (carried, lost);
        for (size, is_answered) in found {
            if is_answered {
                best = best.max(size);
            } else if size > best {
                worst = worst.min(size);
            }
        }
        // A lost answer must not turn the bounds around.
        (carried, lost) = (best, if worst > best { worst } else { best + 1 });
    }
    carried
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::address::plus;

    fn config(prefixes: &str) -> Config {
        let text = format!(
            "[snat]\nprefixes = {prefixes}\n[interface.eth0]\n[group.web.backend.a]\naddress = \"10.0.0.9\"\nport = 80\n\
             [group.db.backend.b]\naddress = \"10.0.0.8\"\nport = 81\n\
             [listener.web]\nvip = \"10.0.0.100\"\nport = 80\ngroup = \"web\"\n\
             [listener.db]\nvip = \"10.0.0.100\"\nport = 81\nprotocol = \"udp\"\ngroup = \"db\"\n"
        );
        let config = crate::config::load::parse(&text, std::path::Path::new("test.toml"));
        config.unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[test]
    fn every_prefix_is_asked_from_an_address_that_no_flow_uses() {
        let config = config("[\"100.64.0.0/26\", \"100.64.1.0/25\", \"100.64.2.7/32\"]");
        let addresses = |has_agent| -> Vec<String> {
            let sources = sources(&config, has_agent);
            for (_, source) in &sources {
                let in_use = config.snat.ranges.iter().any(|(first, count)| {
                    plus(*first, *count).is_some_and(|end| (*first..end).contains(source))
                });
                assert!(!has_agent || !in_use, "{source}");
            }
            sources.iter().map(|(_, source)| source.to_string()).collect()
        };
        assert_eq!(addresses(true), ["100.64.0.1", "100.64.1.0"]);
        assert_eq!(addresses(false), ["100.64.0.1", "100.64.1.0", "100.64.2.7"]);
    }

    #[test]
    fn one_group_leaves_the_others_alone() {
        let config = narrowed(config("[\"100.64.0.0/26\"]"), Some("db"));
        assert_eq!(config.groups.keys().collect::<Vec<_>>(), ["db"]);
        assert_eq!(config.listeners.keys().collect::<Vec<_>>(), ["db"]);
    }

    #[test]
    fn a_udp_group_without_a_check_gets_an_echo_request() {
        let mut config = config("[\"100.64.0.0/26\"]");
        let check_of = |config: &Config, name: &str| check(config, name, &config.groups[name]);
        assert_eq!(check_of(&config, "web").unwrap().timeout, PATIENCE);
        for group in config.groups.values_mut() {
            group.health = None;
        }
        assert_eq!(check_of(&config, "web").unwrap().probe, Probe::Tcp);
        assert_eq!(check_of(&config, "db"), None);
    }
}
