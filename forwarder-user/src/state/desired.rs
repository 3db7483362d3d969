//! Table contents as they should be, from the configuration, the backends' health and the attached interfaces.

use std::collections::{BTreeMap, HashMap};

use forwarder_common::{
    abi::{
        ABI_VERSION,
        backend::{Backend, BackendId, BackendState, GroupId, NatMode},
        interface::Interface,
        listener::{Listener, ListenerKey, Vip},
        settings::Settings,
        snat::{SnatPool, SnatRange},
    },
    maglev,
    wire::{
        Be16, Ipv4Address,
        ipv4::{PROTOCOL_TCP, PROTOCOL_UDP},
    },
};

use super::ids::Ids;
use crate::{
    config::{self, Config, Protocol},
    health::Health,
};

/// Seed of the flow hash: the same everywhere, so that the gateways of a fleet pick the same backends.
const HASH_SEED: u32 = 0x6d61_676c;

/// What is known besides the configuration.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// By group and backend name; absent: not probed yet, so not healthy.
    pub health: HashMap<(String, String), Health>,
    /// By interface index.
    pub interfaces: BTreeMap<u32, Interface>,
    pub route_generation: u32,
    /// Bits of `settings::flag`.
    pub flags: u32,
}

/// A group with its Maglev table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupTable {
    pub nat: NatMode,
    /// Empty: no backend takes new flows.
    pub slots: Vec<BackendId>,
}

/// What the tables should hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    pub settings: Settings,
    pub interfaces: BTreeMap<u32, Interface>,
    pub backends: BTreeMap<BackendId, Backend>,
    pub groups: BTreeMap<GroupId, GroupTable>,
    pub vips: BTreeMap<[u8; 4], Vip>,
    pub listeners: BTreeMap<ListenerOrder, (ListenerKey, Listener)>,
}

/// Sorts listeners by VIP, port and protocol.
pub type ListenerOrder = ([u8; 4], u16, u8);

impl Desired {
    /// Nothing configured: what freshly created maps hold.
    pub fn empty() -> Self {
        Self {
            settings: Settings::default(),
            interfaces: BTreeMap::new(),
            backends: BTreeMap::new(),
            groups: BTreeMap::new(),
            vips: BTreeMap::new(),
            listeners: BTreeMap::new(),
        }
    }

    /// What should be true.
    pub fn of(config: &Config, ids: &Ids, observed: &Observations) -> Self {
        let mut desired = Self::empty();
        desired.settings = Settings {
            abi_version: ABI_VERSION,
            route_generation: observed.route_generation,
            hash_seed: HASH_SEED,
            flags: observed.flags,
            pool: pool(&config.snat),
        };
        desired.interfaces.clone_from(&observed.interfaces);
        for (name, group) in &config.groups {
            desired.add_group(name, group, ids, observed);
        }
        for (name, listener) in &config.listeners {
            let protocol = match listener.protocol {
                Protocol::Tcp => PROTOCOL_TCP,
                Protocol::Udp => PROTOCOL_UDP,
            };
            let vip = listener.vip.octets();
            desired.vips.entry(vip).or_insert(Vip { listeners: 0 }).listeners += 1;
            let key = ListenerKey::new(Ipv4Address::new(vip), Be16::new(listener.port), protocol);
            let value = Listener {
                id: ids.listeners[name],
                group: ids.groups[&listener.group],
                idle_timeout_secs: listener.idle_timeout.as_secs() as u32,
            };
            desired
                .listeners
                .insert((vip, listener.port, protocol), (key, value));
        }
        desired
    }

    fn add_group(&mut self, name: &str, group: &config::Group, ids: &Ids, observed: &Observations) {
        let mut entries = Vec::new();
        for (backend_name, backend) in &group.backends {
            let key = (name.to_owned(), backend_name.clone());
            let id = ids.backends[&key];
            let is_healthy = group.health.is_none() || observed.health.get(&key) == Some(&Health::Healthy);
            let state = if is_healthy {
                BackendState::HEALTHY
            } else {
                BackendState::UNHEALTHY
            };
            let address = backend.address.octets();
            self.backends.insert(
                id,
                Backend {
                    address: Ipv4Address::new(address),
                    port: Be16::new(backend.port),
                    state,
                    reserved: 0,
                },
            );
            if is_healthy {
                let identity = maglev::identity(address, backend.port);
                entries.push(maglev::Entry {
                    value: id.0,
                    identity,
                    weight: u32::from(backend.weight),
                });
            }
        }
        let nat = match group.nat {
            config::NatMode::Full => NatMode::FULL,
            config::NatMode::Dnat => NatMode::DNAT,
        };
        let slots = table(entries, maglev::size_for(group.backends.len()));
        self.groups.insert(ids.groups[name], GroupTable { nat, slots });
    }
}

/// The Maglev table of a group's healthy backends; empty when none has a weight.
fn table(mut entries: Vec<maglev::Entry>, size: u32) -> Vec<BackendId> {
    entries.sort_by_key(|entry| entry.identity);
    let mut turns = vec![maglev::Turn::default(); entries.len()];
    let mut slots = vec![0; size as usize];
    if maglev::build(&entries, &mut turns, &mut slots) {
        slots.into_iter().map(BackendId).collect()
    } else {
        Vec::new()
    }
}

fn pool(snat: &config::SnatPool) -> SnatPool {
    let mut pool = SnatPool::default();
    for (range, (first, count)) in pool.ranges.iter_mut().zip(&snat.ranges) {
        *range = SnatRange {
            first: u32::from(*first),
            count: *count,
        };
    }
    pool
}
