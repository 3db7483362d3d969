//! What a configuration asks for: addresses, memory, and what the far side of each network has to have.
//!
//! A binding (one address and port of the SNAT pool) belongs to one flow, whatever its backend, so the sum is:
//!
//! ```text
//! flows     = wanted flows per backend x backends
//! addresses = flows / 64 512, rounded up             ports 1024 to 65535 of each
//! ```
//!
//! Flows of groups in DNAT mode count as well: they carry no address of the pool, but take a number, and the number
//! is the binding.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::abi::snat::PORTS_PER_ADDRESS;
use ipnet::IpNet;
use serde::Serialize;

use crate::{
    config::{Config, NatMode, PerFamily, Ports},
    datapath::object::{MapLayout, Sizes, copies},
};

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Requirements {
    pub pool: PoolNeeds,
    pub tables: Vec<TableNeeds>,
    /// Sum over the tables.
    pub memory_bytes: u64,
    pub networks: Vec<NetworkNeeds>,
}

/// What concurrent flows need.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PoolNeeds {
    /// As asked for; `None`: what `max_flows` allows, shared by all.
    pub flows_per_backend: Option<u64>,
    pub backends: u64,
    /// Concurrent flows of all backends together.
    pub flows: u64,
    pub flows_per_address: u32,
    /// For the flows of one backend, if it were the only one.
    pub addresses_per_backend: Option<u64>,
    /// For all flows.
    pub addresses: u64,
    /// In `snat.prefixes`, for traffic.
    pub addresses_present: u64,
    /// `agent.max_flows` as it is.
    pub max_flows: u32,
    /// What to change, in words; empty: it is enough.
    pub shortages: Vec<String>,
}

/// One table of the data path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TableNeeds {
    pub name: String,
    pub entries: u32,
    /// Key and value together; of a per-CPU table one CPU's value.
    pub entry_bytes: u64,
    /// What the kernel takes for it, all CPUs.
    pub memory_bytes: u64,
}

/// What the far side of a network has to have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NetworkNeeds {
    pub network: String,
    pub tunnel: Option<String>,
    /// The gateway's own addresses there, one of each family at most: the next hops of the routes. Empty: this host has
    /// none (yet).
    pub gateways: Vec<IpAddr>,
    /// Prefixes that have to be routed back to the gateway.
    pub prefixes: Vec<IpNet>,
    /// What the servers' inbound rules have to admit from these prefixes.
    pub admit: Vec<Admit>,
    /// For a router or server with iproute2.
    pub iproute2: Vec<String>,
    pub nftables: Vec<String>,
    pub iptables: Vec<String>,
    /// What rules cannot say.
    pub notes: Vec<String>,
}

/// One inbound rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Admit {
    /// The server.
    pub to: IpAddr,
    /// `tcp`, `udp`, `sctp`, or `icmp`, which has no ports.
    pub protocol: &'static str,
    pub first_port: u16,
    /// The same for a single port.
    pub last_port: u16,
    /// `traffic` or `probes`.
    pub purpose: &'static str,
}

/// Stands where this host does not know the address.
const UNKNOWN_GATEWAY: &str = "GATEWAY_ADDRESS";

impl Requirements {
    /// `addresses`: the gateway's own, by interface. `cpus`: possible CPUs. `layout`: all shared maps.
    pub fn of(
        config: &Config,
        flows_per_backend: Option<u64>,
        sizes: &Sizes,
        layout: &[MapLayout],
        addresses: &BTreeMap<String, Vec<IpNet>>,
        cpus: u32,
    ) -> Self {
        let tables: Vec<_> = layout.iter().map(|map| table(map, sizes, cpus)).collect();
        Self {
            pool: pool(config, flows_per_backend),
            memory_bytes: tables.iter().map(|table| table.memory_bytes).sum(),
            tables,
            networks: networks(config, addresses),
        }
    }
}

fn pool(config: &Config, flows_per_backend: Option<u64>) -> PoolNeeds {
    let per_address = u64::from(PORTS_PER_ADDRESS);
    let backends = config
        .groups
        .values()
        .map(|group| group.backends.len() as u64)
        .sum();
    let max_flows = config.agent.max_flows;
    let flows = match flows_per_backend {
        Some(flows) => flows.saturating_mul(backends),
        None => u64::from(max_flows),
    };
    let addresses = flows.div_ceil(per_address);
    // A prefix of IPv6 has more than enough; what is taken of it follows max_flows.
    let is_v4 = config.snat.addresses(true) > 0;
    let addresses_present = config.snat.addresses(is_v4);
    let mut shortages = Vec::new();
    if is_v4 && addresses > addresses_present {
        let missing = addresses - addresses_present;
        shortages.push(format!(
            "snat.prefixes: {missing} more address{} for traffic; a /{} holds {}",
            if missing == 1 { "" } else { "es" },
            prefix_for(missing),
            hosts(prefix_for(missing))
        ));
    }
    if flows > u64::from(max_flows) {
        shortages.push(format!("agent.max_flows: {flows} instead of {max_flows}"));
    }
    PoolNeeds {
        flows_per_backend,
        backends,
        flows,
        flows_per_address: PORTS_PER_ADDRESS,
        addresses_per_backend: flows_per_backend.map(|flows| flows.div_ceil(per_address)),
        addresses,
        addresses_present,
        max_flows,
        shortages,
    }
}

/// The longest prefix with so many addresses for traffic.
fn prefix_for(addresses: u64) -> u8 {
    (0..=32)
        .rev()
        .find(|length| hosts(*length) >= addresses)
        .unwrap_or(0)
}

/// Addresses for traffic that another prefix of this length brings: prefixes shorter than /31 lose two.
fn hosts(length: u8) -> u64 {
    let all = 1u64 << (32 - length);
    if length < 31 { all - 2 } else { all }
}

/// `enum bpf_map_type` (linux/bpf.h).
mod kind {
    pub(super) const HASH: u32 = 1;
    pub(super) const LRU_HASH: u32 = 9;
    pub(super) const PERCPU_ARRAY: u32 = 6;
    pub(super) const LPM_TRIE: u32 = 11;
    pub(super) const QUEUE: u32 = 22;
    pub(super) const RINGBUF: u32 = 27;
}

/// The kernel's `struct htab_elem` without key and value, and a bucket (kernel/bpf/hashtab.c, Linux 6.18).
const HASH_ELEMENT_BYTES: u64 = 48;
const HASH_BUCKET_BYTES: u64 = 16;
/// The pages of a ring buffer's positions, and what keeps track of its pages (kernel/bpf/ringbuf.c, Linux 6.18).
const RINGBUF_EXTRA_BYTES: u64 = 4 * 4096;
/// `struct lpm_trie_node` without the key's data and the value; an entry may need an intermediate node as well.
const LPM_NODE_BYTES: u64 = 40;

fn table(map: &MapLayout, sizes: &Sizes, cpus: u32) -> TableNeeds {
    let entries = sizes
        .entries()
        .into_iter()
        .find(|(name, _)| *name == map.name)
        .map_or(map.entries, |(_, entries)| entries)
        .saturating_mul(copies(&map.name, cpus));
    let (count, key, value) = (
        u64::from(entries),
        u64::from(map.key_bytes),
        u64::from(map.value_bytes),
    );
    let cpus = u64::from(cpus);
    let padded = value.next_multiple_of(8);
    let hash = |elements: u64| {
        elements * (HASH_ELEMENT_BYTES + key.next_multiple_of(8) + padded)
            + count.next_power_of_two() * HASH_BUCKET_BYTES
    };
    let (entry_bytes, memory_bytes) = match map.kind {
        // Each CPU has an element in reserve; where old ones make room, there is none.
        kind::HASH => (key + value, hash(count + cpus)),
        kind::LRU_HASH => (key + value, hash(count)),
        // Nothing is taken before there are entries; this is for all of them.
        kind::LPM_TRIE => (key + value, count * 2 * (LPM_NODE_BYTES + key + value)),
        // Each CPU's copy of the value, and the pointer to them.
        kind::PERCPU_ARRAY => (value, count * (padded * cpus + 8)),
        kind::QUEUE => (value, (count + 1) * value),
        // Its entries are bytes, beside pages of positions.
        kind::RINGBUF => (1, count + RINGBUF_EXTRA_BYTES),
        // An array: the index takes nothing.
        _ => (value, count * padded),
    };
    TableNeeds {
        name: map.name.clone(),
        entries,
        entry_bytes,
        memory_bytes,
    }
}

fn networks(config: &Config, addresses: &BTreeMap<String, Vec<IpNet>>) -> Vec<NetworkNeeds> {
    config
        .networks
        .iter()
        .map(|(name, network)| {
            let is_inside = |address: IpAddr| network.cidrs.iter().any(|cidr| cidr.contains(&address));
            let own: PerFamily = match &network.tunnel {
                Some(tunnel) => addresses.get(tunnel).into_iter().flatten().map(IpNet::addr).collect(),
                None => config
                    .interfaces
                    .keys()
                    .filter_map(|interface| addresses.get(interface))
                    .flatten()
                    .map(IpNet::addr)
                    .filter(|address| is_inside(*address))
                    .collect(),
            };
            let admit = admitted(config, is_inside);
            let has_dnat = config.groups.values().any(|group| {
                group.nat == NatMode::Dnat && group.backends.values().any(|backend| is_inside(backend.address))
            });
            let mut notes = Vec::new();
            if has_dnat {
                notes.push(
                    "servers of groups in DNAT mode see the clients' addresses: they need the same route and rules for \
                     those"
                        .to_owned(),
                );
            }
            // Servers of one family only see addresses of that.
            let has = |prefix: &&IpNet| {
                let mut cidrs = network.cidrs.iter();
                cidrs.any(|cidr| cidr.addr().is_ipv4() == prefix.addr().is_ipv4())
            };
            let prefixes: Vec<_> = config.snat.prefixes.iter().filter(has).copied().collect();
            let mut needs = NetworkNeeds {
                network: name.clone(),
                tunnel: network.tunnel.clone(),
                gateways: own.iter().collect(),
                iproute2: Vec::new(),
                nftables: nftables(&prefixes, &admit),
                iptables: iptables(&prefixes, &admit),
                prefixes,
                admit,
                notes,
            };
            let routes = needs.routes().map(|(prefix, gateway)| {
                let via = gateway.map_or_else(|| UNKNOWN_GATEWAY.to_owned(), |gateway| gateway.to_string());
                format!("ip route add {prefix} via {via}")
            });
            needs.iproute2 = routes.collect();
            if needs.routes().any(|(_, gateway)| gateway.is_none()) {
                let device = network.tunnel.as_deref().unwrap_or("an interface of the configuration");
                needs.notes.push(format!(
                    "write the gateway's address on {device} for {UNKNOWN_GATEWAY}: this host has none there"
                ));
            }
            needs
        })
        .collect()
}

impl NetworkNeeds {
    /// The prefixes to be routed, each with the gateway's address of its family.
    pub fn routes(&self) -> impl Iterator<Item = (IpNet, Option<IpAddr>)> + '_ {
        self.prefixes.iter().map(|prefix| {
            let mut gateways = self.gateways.iter();
            let gateway = gateways.find(|gateway| gateway.is_ipv4() == prefix.addr().is_ipv4());
            (*prefix, gateway.copied())
        })
    }
}

/// What the servers inside a network have to let in.
fn admitted(config: &Config, is_inside: impl Fn(IpAddr) -> bool) -> Vec<Admit> {
    let mut admit = BTreeSet::new();
    for (name, group) in &config.groups {
        let protocols: BTreeSet<_> = config
            .listeners
            .values()
            .filter(|listener| listener.group == *name)
            .map(|listener| (listener.protocol.name(), listener.ports))
            .collect();
        for backend in group
            .backends
            .values()
            .filter(|backend| is_inside(backend.address))
        {
            for (protocol, ports) in &protocols {
                // The backend's own port, or the one that the client asked for.
                let ports = match backend.port {
                    Some(port) if *ports != Ports::NONE => Ports::one(port),
                    _ => *ports,
                };
                admit.insert(Admit {
                    to: backend.address,
                    protocol,
                    first_port: ports.first,
                    last_port: ports.last,
                    purpose: "traffic",
                });
            }
            let checked = group
                .health
                .as_ref()
                .and_then(|check| check.port.or(backend.port));
            if let Some(port) = checked {
                let is_admitted = admit.iter().any(|one| {
                    (one.to, one.protocol) == (backend.address, "tcp")
                        && (one.first_port..=one.last_port).contains(&port)
                });
                if !is_admitted {
                    admit.insert(Admit {
                        to: backend.address,
                        protocol: "tcp",
                        first_port: port,
                        last_port: port,
                        purpose: "probes",
                    });
                }
            }
        }
    }
    admit.into_iter().collect()
}

/// Ports by protocol: rules go to every server of a family of the network alike.
fn ports(admit: &[Admit], is_v4: bool) -> BTreeMap<&'static str, BTreeSet<Ports>> {
    let mut ports: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for one in admit.iter().filter(|one| one.to.is_ipv4() == is_v4) {
        ports.entry(one.protocol).or_default().insert(Ports {
            first: one.first_port,
            last: one.last_port,
        });
    }
    ports
}

fn nftables(prefixes: &[IpNet], admit: &[Admit]) -> Vec<String> {
    let mut rules = Vec::new();
    for (is_v4, ip) in [(true, "ip"), (false, "ip6")] {
        let family = prefixes.iter().filter(|prefix| prefix.addr().is_ipv4() == is_v4);
        let sources = join(&family.collect::<Vec<_>>());
        rules.extend(ports(admit, is_v4).into_iter().map(|(protocol, ports)| {
            if ports.contains(&Ports::NONE) {
                let protocol = icmp_of(is_v4, protocol, "icmpv6");
                return format!(
                    "nft insert rule inet filter input {ip} saddr {{ {sources} }} {protocol} type echo-request accept"
                );
            }
            let ports: Vec<_> = ports.into_iter().map(|ports| between(ports, "-")).collect();
            format!(
                "nft insert rule inet filter input {ip} saddr {{ {sources} }} {protocol} dport {{ {} }} accept",
                join(&ports)
            )
        }));
    }
    rules
}

fn iptables(prefixes: &[IpNet], admit: &[Admit]) -> Vec<String> {
    let mut rules = Vec::new();
    for prefix in prefixes {
        let is_v4 = prefix.addr().is_ipv4();
        let command = if is_v4 { "iptables" } else { "ip6tables" };
        for (protocol, ports) in ports(admit, is_v4) {
            for port in ports {
                if port == Ports::NONE {
                    let protocol = icmp_of(is_v4, protocol, "ipv6-icmp");
                    rules.push(format!("{command} -I INPUT -s {prefix} -p {protocol} -j ACCEPT"));
                    continue;
                }
                rules.push(format!(
                    "{command} -I INPUT -s {prefix} -p {protocol} --dport {} -j ACCEPT",
                    between(port, ":")
                ));
            }
        }
    }
    rules
}

/// ICMP as a firewall's command wants it: of IPv6 it has a name of its own.
fn icmp_of(is_v4: bool, v4: &'static str, v6: &'static str) -> &'static str {
    if is_v4 { v4 } else { v6 }
}

/// Ports as a firewall's command wants them: always two for a range, even for any port.
fn between(ports: Ports, sign: &str) -> String {
    match ports.single() {
        Some(port) => port.to_string(),
        None => format!("{}{sign}{}", ports.first, ports.last),
    }
}

fn join(items: &[impl ToString]) -> String {
    let items: Vec<_> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::load::parse;

    const CONFIG: &str = r#"
        [agent]
        max_flows = 64_512
        [snat]
        prefixes = ["100.64.0.0/30"]
        [interface.eth0]
        [tunnel.cen]
        mode = "kernel"
        [network.local]
        cidrs = ["172.16.0.0/12"]
        [network.far]
        cidrs = ["192.168.0.0/16"]
        tunnel = "cen"
        [group.web.health]
        port = 8081
        [group.web.backend.a]
        address = "192.168.1.10"
        port = 80
        [group.web.backend.b]
        address = "172.16.1.10"
        port = 8080
        [listener.web]
        vip = "172.16.0.100"
        port = 80
        group = "web"
    "#;

    fn requirements(flows_per_backend: Option<u64>) -> Requirements {
        let config = parse(CONFIG, Path::new("test.toml")).unwrap();
        let sizes = Sizes {
            flows: 64_512,
            flow_keys: 64_512,
            flow_keys_v6: 1,
            slots: 4096,
            groups: 1,
            backends: 2,
            listeners: 1,
            vips: 1,
            listener_ranges: 1,
            sources: 1,
            interfaces: 2,
            tunnel_peers: 8,
            persistence: 65_536,
            source_rates: 65_536,
        };
        let layout = crate::datapath::object::layout().unwrap();
        let addresses = BTreeMap::from([("cen".to_owned(), vec!["169.254.42.1/30".parse().unwrap()])]);
        Requirements::of(&config, flows_per_backend, &sizes, &layout, &addresses, 4)
    }

    #[test]
    fn a_binding_serves_one_flow_whatever_its_backend() {
        let enough = requirements(Some(32_256)).pool;
        assert_eq!(
            (enough.flows, enough.addresses, enough.addresses_present),
            (64_512, 1, 1)
        );
        assert!(enough.shortages.is_empty(), "{:?}", enough.shortages);
        let short = requirements(Some(32_257)).pool;
        assert_eq!((short.flows, short.addresses), (64_514, 2));
        assert_eq!(
            short.shortages,
            [
                "snat.prefixes: 1 more address for traffic; a /32 holds 1",
                "agent.max_flows: 64514 instead of 64512"
            ]
        );
        assert_eq!(requirements(Some(120_000)).pool.addresses_per_backend, Some(2));
        assert_eq!(requirements(None).pool.flows, 64_512);
    }

    #[test]
    fn another_prefix_is_as_small_as_can_be() {
        for (addresses, length) in [(1, 32), (2, 31), (3, 29), (6, 29), (7, 28), (254, 24), (255, 23)] {
            assert_eq!(prefix_for(addresses), length, "{addresses}");
        }
    }

    #[test]
    fn every_shared_table_is_counted_with_the_real_size_of_its_entries() {
        let requirements = requirements(None);
        let flows = requirements
            .tables
            .iter()
            .find(|table| table.name == "FLOWS")
            .unwrap();
        assert_eq!(
            (flows.entries, flows.entry_bytes, flows.memory_bytes),
            (64_512, 192, 64_512 * 192)
        );
        let names: Vec<_> = requirements
            .tables
            .iter()
            .map(|table| table.name.as_str())
            .collect();
        for name in [
            "BACKENDS",
            "FLOW_INDEX",
            "FREE_FLOWS",
            "LISTENERS",
            "SETTINGS",
            "SLOTS",
        ] {
            assert!(names.contains(&name), "{names:?}");
        }
        assert!(requirements.memory_bytes > flows.memory_bytes);
    }

    #[test]
    fn the_far_side_gets_routes_and_rules_to_paste() {
        let networks = requirements(None).networks;
        assert_eq!(networks[0].network, "far");
        assert_eq!(
            networks[0].iproute2,
            ["ip route add 100.64.0.0/30 via 169.254.42.1"]
        );
        assert_eq!(
            networks[0].nftables,
            ["nft insert rule inet filter input ip saddr { 100.64.0.0/30 } tcp dport { 80, 8081 } accept"]
        );
        assert_eq!(
            networks[0].iptables,
            [
                "iptables -I INPUT -s 100.64.0.0/30 -p tcp --dport 80 -j ACCEPT",
                "iptables -I INPUT -s 100.64.0.0/30 -p tcp --dport 8081 -j ACCEPT"
            ]
        );
        // Without an address of the gateway there, the command says what to fill in.
        assert_eq!(
            networks[1].iproute2,
            ["ip route add 100.64.0.0/30 via GATEWAY_ADDRESS"]
        );
        assert_eq!(networks[1].notes.len(), 1);
    }
}
