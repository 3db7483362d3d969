//! Table contents as they should be, from the configuration, the backends' health and the attached interfaces.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    time::Duration,
};

use forwarder_common::{
    abi::{
        ABI_VERSION,
        address_filter::AddressFilters,
        backend::{Backend, BackendId, BackendState, GroupId, NatMode, Selection},
        interface::Interface,
        listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, SourceKey, Vip, listener_flag},
        settings::{Settings, flag},
        snat::{SnatPool, SnatRange},
    },
    maglev,
    wire::{Be16, IpAddress},
};

use super::{
    ids::Ids,
    overrides::{Override, Overrides},
    tables::{Fresh, Place, Slots, TableInputs, TableSource},
    tiers::{self, Candidate},
    tunnels::TunnelTables,
};
use crate::{
    config::{self, Config, SynCookies, TableSizes},
    health::Health,
};

/// Seed of the flow hash: the same everywhere, so that the gateways of a fleet pick the same backends.
const HASH_SEED: u32 = 0x6d61_676c;

/// What is known besides the configuration.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// By group and backend name; absent: not probed yet, so not healthy.
    pub health: HashMap<(String, String), Health>,
    /// Backends that passive checks took out, by group and name.
    pub ejected: HashSet<(String, String)>,
    /// What operators have ordered.
    pub overrides: Overrides,
    /// Backends that start slowly, by group and backend name, with the time since when.
    pub slow_starts: BTreeMap<(String, String), Duration>,
    /// Time since the agent's start, as far as slow starts are concerned.
    pub now: Duration,
    /// By interface index.
    pub interfaces: BTreeMap<u32, Interface>,
    /// Tunnels that the programs handle.
    pub tunnels: TunnelTables,
    pub route_generation: u32,
    /// Bits of `settings::flag`.
    pub flags: u32,
    /// For SYN cookies; see `abi::settings`.
    pub cookie_key: [u64; 2],
    /// CPUs that packets come to; zero is one.
    pub cpus: u32,
    /// Addresses that concerned us before: there may be flows of them.
    pub filters: AddressFilters,
}

impl Observations {
    /// The backends of a group that take new flows as far as checks are concerned: those that neither active nor passive
    /// ones took out. If none is left that operators let take any, an ejected one is better than none.
    pub fn healthy<'a>(&self, name: &str, group: &'a config::Group) -> HashSet<&'a str> {
        let mut key = (name.to_owned(), String::new());
        let (mut healthy, mut ejected) = (HashSet::new(), HashSet::new());
        for backend in group.backends.keys() {
            key.1.clone_from(backend);
            if group.health.is_some() && self.health.get(&key) != Some(&Health::Healthy) {
                continue;
            }
            if self.ejected.contains(&key) {
                ejected.insert(backend.as_str());
            } else {
                healthy.insert(backend.as_str());
            }
        }
        let takes_flows = |backend: &&str| {
            let key = (name.to_owned(), (*backend).to_owned());
            let orders = self.overrides.get(&key).copied().unwrap_or_default();
            takes_new_flows(&group.backends[*backend], &orders)
        };
        if !ejected.is_empty() && !healthy.iter().any(takes_flows) {
            healthy.extend(ejected);
        }
        healthy
    }
}

/// What the table of listeners says of one.
fn entry(id: ListenerId, group: GroupId, listener: &config::Listener, cpus: u32) -> Listener {
    let has = |condition: bool, flag: u32| if condition { flag } else { 0 };
    let rate = listener.source_rate;
    Listener {
        id,
        group,
        max_flows: listener.max_flows.unwrap_or(0),
        flags: has(listener.sources.is_some(), listener_flag::SOURCES)
            | has(listener.syn_cookies.is_some(), listener_flag::COOKIES)
            | has(rate.is_some(), listener_flag::RATE),
        syns_per_cpu: match listener.syn_cookies {
            // At least one, or it would be "always".
            Some(SynCookies::Above(above)) => above.div_ceil(cpus.max(1)),
            Some(SynCookies::Always) | None => 0,
        },
        source_flows_per_second: rate.map_or(0, |rate| rate.flows_per_second),
        source_burst: rate.map_or(0, |rate| rate.burst),
        source_bits_v4: rate.map_or(0, |rate| {
            IpAddress::V4_PREFIX_BITS as u16 + u16::from(rate.prefix_bits_v4)
        }),
        source_bits_v6: rate.map_or(0, |rate| u16::from(rate.prefix_bits_v6)),
    }
}

/// The smallest MTU that there is, in bytes; zero: none is known.
fn least_mtu(observed: &Observations) -> u32 {
    let interfaces = observed.interfaces.values().map(|interface| interface.mtu_bytes);
    let peers = observed.tunnels.peers.values().map(|peer| peer.mtu_bytes);
    let known = interfaces.chain(peers).filter(|mtu_bytes| *mtu_bytes != 0);
    known.min().unwrap_or(0)
}

/// A group with its Maglev table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupTable {
    pub nat: NatMode,
    pub selection: Selection,
    /// Zero: none.
    pub persistence_secs: u32,
    /// 1 to 32.
    pub persistence_bits_v4: u32,
    /// 1 to 128.
    pub persistence_bits_v6: u32,
    /// Empty: no backend takes new flows.
    pub slots: Slots,
    /// The table behind that, for flows that nobody in it has room for.
    pub overflow: Slots,
}

/// What the tables should hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    pub settings: Settings,
    pub interfaces: BTreeMap<u32, Interface>,
    pub tunnels: TunnelTables,
    pub backends: BTreeMap<BackendId, Backend>,
    /// Operators' orders; they stand beside the tables, in the records of names.
    pub overrides: BTreeMap<BackendId, Override>,
    pub groups: BTreeMap<GroupId, GroupTable>,
    pub vips: BTreeMap<[u8; 16], Vip>,
    pub listeners: BTreeMap<ListenerOrder, (ListenerKey, Listener)>,
    /// Listeners with more than one port, by the prefixes that their ports consist of.
    pub listener_ranges: BTreeMap<RangeOrder, (ListenerRangeKey, Listener)>,
    /// Prefixes of clients, by listener, address and length.
    pub sources: BTreeSet<SourceOrder>,
}

/// Sorts listeners by VIP, port and protocol.
pub type ListenerOrder = ([u8; 16], u16, u8);
/// Sorts ranges of ports by VIP, first port, bits and protocol.
pub type RangeOrder = ([u8; 16], u16, u32, u8);
/// A prefix of clients: the listener, the address, its bits of 128.
pub type SourceOrder = (ListenerId, [u8; 16], u32);

/// The key of a prefix of clients.
pub fn source_key(&(listener, address, bits): &SourceOrder) -> SourceKey {
    SourceKey::new(listener, IpAddress::new(address), bits)
}

impl Desired {
    /// Nothing configured: what freshly created maps hold.
    pub fn empty() -> Self {
        Self {
            settings: Settings::default(),
            interfaces: BTreeMap::new(),
            tunnels: TunnelTables::default(),
            backends: BTreeMap::new(),
            overrides: BTreeMap::new(),
            groups: BTreeMap::new(),
            vips: BTreeMap::new(),
            listeners: BTreeMap::new(),
            listener_ranges: BTreeMap::new(),
            sources: BTreeSet::new(),
        }
    }

    /// What should be true, all tables built now.
    pub fn of(config: &Config, ids: &Ids, observed: &Observations) -> Self {
        Self::with_tables(config, ids, observed, &mut Fresh)
    }

    /// What should be true, with the groups' tables from `tables`.
    pub fn with_tables(
        config: &Config,
        ids: &Ids,
        observed: &Observations,
        tables: &mut impl TableSource,
    ) -> Self {
        let mut desired = Self::empty();
        desired.settings = Settings {
            abi_version: ABI_VERSION,
            route_generation: observed.route_generation,
            hash_seed: HASH_SEED,
            flags: observed.flags | configured_flags(config) | tunnels_flag(&observed.tunnels),
            cookie_key: observed.cookie_key,
            least_mtu_bytes: least_mtu(observed),
            reserved: 0,
            pool: pool(&config.snat),
            filters: filters(config, &observed.filters),
        };
        desired.interfaces.clone_from(&observed.interfaces);
        desired.tunnels.clone_from(&observed.tunnels);
        for name in config.groups.keys() {
            desired.add_group(name, config, ids, observed, tables);
        }
        for (name, listener) in &config.listeners {
            let protocol = listener.protocol.number();
            let id = ids.listeners[name];
            let value = entry(id, ids.groups[&listener.group], listener, observed.cpus);
            for address in listener.vips.iter().copied().map(IpAddress::from) {
                let vip = address.octets();
                let entry = desired.vips.entry(vip).or_insert(Vip {
                    listeners: 0,
                    range_listeners: 0,
                });
                entry.listeners += 1;
                if let Some(port) = listener.ports.single() {
                    let key = ListenerKey::new(address, Be16::new(port), protocol);
                    desired.listeners.insert((vip, port, protocol), (key, value));
                    continue;
                }
                entry.range_listeners += 1;
                for (port, bits) in listener.ports.prefixes() {
                    let key = ListenerRangeKey::new(address, protocol, Be16::new(port), bits);
                    desired
                        .listener_ranges
                        .insert((vip, port, bits, protocol), (key, value));
                }
            }
            for source in listener.sources.iter().flatten() {
                let address = IpAddress::from(source.network());
                let before = if address.is_v4() {
                    IpAddress::V4_PREFIX_BITS
                } else {
                    0
                };
                desired
                    .sources
                    .insert((id, address.octets(), before + u32::from(source.prefix_len())));
            }
        }
        desired
    }

    fn add_group(
        &mut self,
        name: &str,
        config: &Config,
        ids: &Ids,
        observed: &Observations,
        tables: &mut impl TableSource,
    ) {
        let group = &config.groups[name];
        let mut candidates = Vec::new();
        for standing in standings(name, group, ids, observed) {
            let Standing {
                id, orders, backend, ..
            } = standing;
            if !orders.is_none() {
                self.overrides.insert(id, orders);
            }
            self.backends.insert(id, backend);
            candidates.push(standing.candidate());
        }
        if let Some(backup) = &group.backup {
            let standings = standings(backup, &config.groups[backup], ids, observed);
            candidates.extend(standings.map(|standing| Candidate {
                tier: tiers::BACKUP,
                ..standing.candidate()
            }));
        }
        let nat = match group.nat {
            config::NatMode::Full => NatMode::FULL,
            config::NatMode::Dnat => NatMode::DNAT,
        };
        let selection = match group.selection {
            config::Selection::Maglev => Selection::MAGLEV,
            config::Selection::SourceIp => Selection::SOURCE_IP,
            config::Selection::RoundRobin => Selection::ROUND_ROBIN,
            config::Selection::LeastConnections => Selection::LEAST_CONNECTIONS,
        };
        let id = ids.groups[name];
        let sizes = TableSizes::of(group, &config.groups);
        let (first, overflow) = tiers::choose(&candidates, group.min_healthy_percent);
        let mut slots =
            |place, size, entries| tables.slots((id, place), TableInputs::new(selection, size, entries));
        let persistence = group.persistence;
        self.groups.insert(
            id,
            GroupTable {
                nat,
                selection,
                persistence_secs: persistence.map_or(0, |persistence| whole_secs(persistence.timeout)),
                persistence_bits_v4: persistence.map_or(32, |persistence| persistence.prefix_bits_v4.into()),
                persistence_bits_v6: persistence
                    .map_or(IpAddress::BITS, |persistence| persistence.prefix_bits_v6.into()),
                slots: slots(Place::First, sizes.first, first),
                overflow: slots(Place::Overflow, sizes.overflow, overflow),
            },
        );
    }
}

/// How a backend stands, from its configuration and all that is known of it.
struct Standing {
    id: BackendId,
    orders: Override,
    tier: u8,
    /// As configured or ordered.
    weight: u16,
    backend: Backend,
}

impl Standing {
    fn candidate(&self) -> Candidate {
        let backend = &self.backend;
        Candidate {
            entry: maglev::Entry {
                value: self.id.0,
                identity: maglev::identity(&octets(backend.address), backend.port.get()),
                weight: backend.weight,
            },
            tier: self.tier,
            weight: self.weight,
            takes_flows: backend.state == BackendState::HEALTHY,
        }
    }
}

/// The backends of a group.
fn standings<'a>(
    name: &'a str,
    group: &'a config::Group,
    ids: &'a Ids,
    observed: &'a Observations,
) -> impl Iterator<Item = Standing> + 'a {
    let healthy = observed.healthy(name, group);
    group.backends.iter().map(move |(backend_name, backend)| {
        let key = (name.to_owned(), backend_name.clone());
        let is_healthy = healthy.contains(backend_name.as_str());
        let orders = observed.overrides.get(&key).copied().unwrap_or_default();
        let percent = observed
            .slow_starts
            .get(&key)
            .map_or(100, |since| slow_start_percent(group, *since, observed.now));
        let state = match (is_healthy, takes_new_flows(backend, &orders)) {
            (false, _) => BackendState::UNHEALTHY,
            (true, false) => BackendState::DRAINING,
            (true, true) => BackendState::HEALTHY,
        };
        let weight = weight(backend, &orders);
        Standing {
            id: ids.backends[&key],
            orders,
            tier: backend.tier,
            weight,
            backend: Backend {
                address: backend.address.into(),
                port: Be16::new(backend.port.unwrap_or(0)),
                state,
                reserved: 0,
                max_flows: backend.max_flows.unwrap_or(0),
                // In hundredths, so that small weights have steps in a slow start, too. Only the ratio counts.
                weight: u32::from(weight) * percent,
            },
        }
    })
}

/// 4 or 16 of them.
fn octets(address: IpAddress) -> Vec<u8> {
    match address.to_std() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A backend's weight as operators have ordered it, or else as it is configured.
pub fn weight(backend: &config::Backend, orders: &Override) -> u16 {
    orders.weight.unwrap_or(backend.weight)
}

/// Is a healthy backend to take new flows? If not, it drains.
pub fn takes_new_flows(backend: &config::Backend, orders: &Override) -> bool {
    !orders.is_drained && weight(backend, orders) > 0
}

/// How much of its weight a backend has that has started slowly at `since`: 1 to 100.
pub fn slow_start_percent(group: &config::Group, since: Duration, now: Duration) -> u32 {
    let millis = group.slow_start.as_millis();
    let elapsed = now.saturating_sub(since).as_millis();
    (elapsed * 100)
        .checked_div(millis)
        .map_or(100, |percent| percent.clamp(1, 100) as u32)
}

/// A part of a second counts as one.
fn whole_secs(time: Duration) -> u32 {
    (time.as_secs() + u64::from(time.subsec_nanos() > 0)) as u32
}

/// VIPs and backends in DNAT mode, those of now and those of before.
fn filters(config: &Config, before: &AddressFilters) -> AddressFilters {
    let mut filters = *before;
    for vip in config.vips() {
        filters.vips.add(vip.into());
    }
    for group in config.groups.values() {
        if group.nat == config::NatMode::Dnat {
            for backend in group.backends.values() {
                filters.dnat_backends.add(backend.address.into());
            }
        }
    }
    filters
}

/// What the configuration says about flags of the settings.
fn configured_flags(config: &Config) -> u32 {
    // Does the pool run out before the flow table does?
    let pool = u64::from(config.agent.max_flows) >= config.snat.bindings();
    [
        (pool, flag::POOL_IS_SMALLER),
        (!config.agent.mss_clamp, flag::KEEP_SEGMENT_SIZE),
    ]
    .iter()
    .filter(|(is_set, _)| *is_set)
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// Whether the programs handle a tunnel.
fn tunnels_flag(tunnels: &TunnelTables) -> u32 {
    if tunnels.endpoints.is_empty() {
        0
    } else {
        flag::TUNNELS
    }
}

/// The pool as the data path knows it.
pub fn pool(snat: &config::SnatPool) -> SnatPool {
    let mut pool = SnatPool::default();
    for (family, is_v4) in [(&mut pool.v4, true), (&mut pool.v6, false)] {
        let ranges = snat.ranges.iter().filter(|(first, _)| first.is_ipv4() == is_v4);
        for (run, (first, count)) in family.runs.iter_mut().zip(ranges) {
            *run = SnatRange {
                first: (*first).into(),
                count: *count,
            };
        }
    }
    pool
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use forwarder_common::abi::address_filter::AddressFilter;

    use super::*;

    #[test]
    fn a_backend_takes_new_flows_if_active_and_passive_checks_say_so() {
        let text = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n\
            [group.web.backend]\na = { address = \"10.0.0.1\", port = 80 }\nb = { address = \"10.0.0.2\", port = 80 }\n\
            c = { address = \"10.0.0.3\", port = 80 }\n[listener.web]\nvip = \"10.0.0.100\"\nport = 80\ngroup = \"web\"\n";
        let config = config::load::parse(text, Path::new("test.toml")).unwrap();
        let key = |name: &str| ("web".to_owned(), name.to_owned());
        let healthy = |health: &[&str], ejected: &[&str]| {
            let observed = Observations {
                health: health.iter().map(|name| (key(name), Health::Healthy)).collect(),
                ejected: ejected.iter().map(|name| key(name)).collect(),
                ..Observations::default()
            };
            let mut names: Vec<_> = observed
                .healthy("web", &config.groups["web"])
                .into_iter()
                .collect();
            names.sort_unstable();
            names.join("")
        };
        assert_eq!(healthy(&["a", "b"], &[]), "ab", "c is not known yet");
        assert_eq!(healthy(&["a", "b", "c"], &["b"]), "ac");
        assert_eq!(healthy(&["b"], &["b", "c"]), "b", "a suspect is better than none");
        assert_eq!(healthy(&[], &["b"]), "", "but not one that fails its probes");
    }

    #[test]
    fn an_ejected_backend_takes_new_flows_while_all_others_drain() {
        let text = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n\
            [group.web.backend]\na = { address = \"10.0.0.1\", port = 80 }\nb = { address = \"10.0.0.2\", port = 80 }\n\
            c = { address = \"10.0.0.3\", port = 80, weight = 0 }\n\
            [listener.web]\nvip = \"10.0.0.100\"\nport = 80\ngroup = \"web\"\n";
        let config = config::load::parse(text, Path::new("test.toml")).unwrap();
        let key = |name: &str| ("web".to_owned(), name.to_owned());
        let mut observed = Observations {
            health: ["a", "b", "c"].map(|name| (key(name), Health::Healthy)).into(),
            ejected: HashSet::from([key("b")]),
            ..Observations::default()
        };
        let takes_flows =
            |observed: &Observations| observed.healthy("web", &config.groups["web"]).contains("b");
        assert!(!takes_flows(&observed));
        let drained = Override {
            is_drained: true,
            ..Override::default()
        };
        observed.overrides.insert(key("a"), drained);
        assert!(takes_flows(&observed));
    }

    #[test]
    fn the_filters_have_every_vip_and_dnat_backend_and_keep_those_that_went() {
        let parse = |vip: &str, backend: &str, nat: &str| {
            let text = format!(
                "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n[group.web]\nnat = \"{nat}\"\n\
                 backend.a = {{ address = \"{backend}\", port = 80 }}\n\
                 [listener.web]\nvip = \"{vip}\"\nport = 80\ngroup = \"web\"\n"
            );
            config::load::parse(&text, Path::new("test.toml")).unwrap()
        };
        let address = |text: &str| IpAddress::from(text.parse::<std::net::IpAddr>().unwrap());
        let vips = ["10.0.0.100", "10.0.0.101"];
        let backends = ["10.0.0.1", "10.0.0.2"];
        let has = |filter: &AddressFilter, addresses: [&str; 2]| {
            addresses.map(|text| filter.may_have(address(text)))
        };

        let first = filters(&parse(vips[0], backends[0], "full"), &AddressFilters::default());
        assert_eq!(has(&first.vips, vips), [true, false]);
        assert_eq!(
            has(&first.dnat_backends, backends),
            [false; 2],
            "their replies come to the pool"
        );
        let dnat = filters(&parse(vips[1], backends[0], "dnat"), &first);
        assert_eq!(
            has(&dnat.vips, vips),
            [true; 2],
            "there may be flows of the old one"
        );
        assert_eq!(has(&dnat.dnat_backends, backends), [true, false]);
        let other = filters(&parse(vips[1], backends[1], "dnat"), &dnat);
        assert_eq!(
            has(&other.dnat_backends, backends),
            [true; 2],
            "the old one may have flows"
        );
        assert_eq!(filters(&parse(vips[1], backends[1], "full"), &other), other);
    }
}
