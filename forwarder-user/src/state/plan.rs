//! The writes that lead from one state of the tables to the next, in an order that no reader can trip over.
//!
//! Names come first, so that a number is never in use without its name. The settings come next, as no packet is ours
//! whose address their filters do not know. Backends come before the slots that name them, slots before the group that
//! points at them, groups before the listeners that name them; what goes, goes in the reverse order, after all that
//! comes. A group's table alternates between two places of the slot table: the new one is written in full, then the
//! group's entry is replaced, in one write.

use std::{collections::BTreeMap, fmt, net::SocketAddr};

use forwarder_common::{
    abi::{
        backend::{Backend, BackendGroup, BackendId, BackendState, GroupId},
        counter::TrafficCounters,
        interface::{Interface, InterfaceKey},
        listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, Source, SourceKey, Vip, VipKey},
        settings::Settings,
        tunnel::{
            PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelPeer, TunnelPort,
        },
    },
    wire::{Be16, IpAddress},
};

use super::{
    desired::{Desired, source_key},
    ids::{Ids, NameKey, NameKind, NameRecord, NamesByNumber},
    placement::Placement,
    tables::Slots,
};

/// One write. A value of `None` removes the entry.
#[derive(Clone, Debug, PartialEq)]
pub enum MapWrite {
    Name(NameKey, Option<Box<NameRecord>>),
    Settings(Box<SettingsChange>),
    Interface(InterfaceKey, Option<Interface>),
    TunnelPort(u16, Option<TunnelPort>),
    TunnelEndpoint(Box<TunnelEndpointKey>, Option<TunnelEndpoint>),
    TunnelHop(TunnelHopKey, Option<TunnelHop>),
    TunnelPeer(PeerId, Option<Box<TunnelPeer>>),
    Backend(BackendId, Option<Backend>),
    Slots {
        first: u32,
        slots: Slots,
    },
    Group(GroupId, Option<BackendGroup>),
    Vip(VipKey, Option<Vip>),
    Source(SourceKey, Option<Source>),
    Listener(ListenerKey, Option<Listener>),
    ListenerRange(ListenerRangeKey, Option<Listener>),
    /// Back to zero, before the number is given to another name.
    ListenerCounters(ListenerId),
    /// As for listeners; what it has counted becomes the past of its group, if that is there.
    BackendCounters(BackendId, Option<GroupId>),
    /// What the backends have counted that left a group.
    GroupPast(GroupId, Option<Box<TrafficCounters>>),
}

/// Settings that take the place of others: all of them are one entry.
#[derive(Clone, Debug, PartialEq)]
pub struct SettingsChange {
    pub from: Settings,
    pub to: Settings,
}

/// What the tables hold: contents, who has which number, where the slots stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    pub ids: Ids,
    pub placement: Placement,
    pub desired: Desired,
}

impl Applied {
    /// Empty tables with `slots` slots.
    pub fn nothing(slots: u32) -> Self {
        Self {
            ids: Ids::default(),
            placement: Placement::new(slots),
            desired: Desired::empty(),
        }
    }

    /// The writes that lead from here to `after`, whose placement was arranged from this one; its tables find
    /// their places now.
    pub fn writes_to(&self, after: &mut Self) -> Vec<MapWrite> {
        let contents = plan(&self.desired, &after.desired, &mut after.placement);
        if self.ids == after.ids
            && self.desired.overrides == after.desired.overrides
            && self.placement.has_same_regions(&after.placement)
        {
            return contents;
        }
        let names_before = self.ids.records(&self.placement, &self.desired.overrides);
        let names_after = after.ids.records(&after.placement, &after.desired.overrides);
        let mut writes: Vec<_> = came(&names_before, &names_after, |key, record| {
            MapWrite::Name(*key, Some(Box::new(*record)))
        })
        .collect();
        writes.extend(contents);
        for key in names_before.keys().filter(|key| !names_after.contains_key(key)) {
            match key.kind {
                NameKind::LISTENER => writes.push(MapWrite::ListenerCounters(ListenerId(key.id))),
                NameKind::BACKEND => {
                    let group = after.ids.groups.get(&names_before[key].group());
                    writes.push(MapWrite::BackendCounters(BackendId(key.id), group.copied()));
                }
                NameKind::GROUP => writes.push(MapWrite::GroupPast(GroupId(key.id), None)),
                _ => {}
            }
            writes.push(MapWrite::Name(*key, None));
        }
        writes
    }
}

/// The writes from `before` to `after`; `placement`, which has room for all groups of `after`, moves along.
pub fn plan(before: &Desired, after: &Desired, placement: &mut Placement) -> Vec<MapWrite> {
    let mut writes = Vec::new();
    let interface = |ifindex: &u32| InterfaceKey { ifindex: *ifindex };
    let vip = |address: &[u8; 16]| VipKey {
        address: IpAddress::new(*address),
    };
    // What comes, or changes.
    writes.extend(came(&before.interfaces, &after.interfaces, |ifindex, value| {
        MapWrite::Interface(interface(ifindex), Some(*value))
    }));
    let (tunnels, next) = (&before.tunnels, &after.tunnels);
    writes.extend(came(&tunnels.peers, &next.peers, |id, value| {
        MapWrite::TunnelPeer(*id, Some(Box::new(*value)))
    }));
    writes.extend(came(&tunnels.hops, &next.hops, |_, (key, value)| {
        MapWrite::TunnelHop(*key, Some(*value))
    }));
    writes.extend(came(&tunnels.endpoints, &next.endpoints, |_, (key, value)| {
        MapWrite::TunnelEndpoint(Box::new(*key), Some(*value))
    }));
    writes.extend(came(&tunnels.ports, &next.ports, |port, value| {
        MapWrite::TunnelPort(*port, Some(*value))
    }));
    // With them, or behind them: a new route generation makes flows look for their next hops again. Before what makes
    // addresses ours: the replies of a backend in DNAT mode are none of ours until the filters know its address.
    if before.settings != after.settings {
        writes.push(MapWrite::Settings(Box::new(SettingsChange {
            from: before.settings,
            to: after.settings,
        })));
    }
    writes.extend(came(&before.backends, &after.backends, |id, value| {
        MapWrite::Backend(*id, Some(*value))
    }));
    for (id, group) in &after.groups {
        if before.groups.get(id) == Some(group) && placement.is_written(*id) {
            continue;
        }
        let Some(first) = placement.turn(*id) else {
            continue;
        };
        let slot_count = group.slots.len() as u32;
        for (first, slots) in [(first, &group.slots), (first + slot_count, &group.overflow)] {
            if !slots.is_empty() {
                writes.push(MapWrite::Slots {
                    first,
                    slots: slots.clone(),
                });
            }
        }
        let value = BackendGroup {
            first_slot: first,
            slot_count,
            overflow_slot_count: group.overflow.len() as u32,
            nat: group.nat,
            selection: group.selection,
            persistence_secs: group.persistence_secs,
            persistence_bits_v4: group.persistence_bits_v4,
            persistence_bits_v6: group.persistence_bits_v6,
        };
        writes.push(MapWrite::Group(*id, Some(value)));
    }
    writes.extend(came(&before.vips, &after.vips, |address, value| {
        MapWrite::Vip(vip(address), Some(*value))
    }));
    writes.extend(
        after
            .sources
            .difference(&before.sources)
            .map(|source| MapWrite::Source(source_key(source), Some(ADMITTED))),
    );
    writes.extend(came(
        &before.listener_ranges,
        &after.listener_ranges,
        |_, (key, value)| MapWrite::ListenerRange(*key, Some(*value)),
    ));
    writes.extend(came(&before.listeners, &after.listeners, |_, (key, value)| {
        MapWrite::Listener(*key, Some(*value))
    }));
    // What goes.
    writes.extend(went(&before.listeners, &after.listeners, |_, (key, _)| {
        MapWrite::Listener(*key, None)
    }));
    writes.extend(went(
        &before.listener_ranges,
        &after.listener_ranges,
        |_, (key, _)| MapWrite::ListenerRange(*key, None),
    ));
    writes.extend(
        before
            .sources
            .difference(&after.sources)
            .map(|source| MapWrite::Source(source_key(source), None)),
    );
    writes.extend(went(&before.vips, &after.vips, |address, _| {
        MapWrite::Vip(vip(address), None)
    }));
    writes.extend(went(&before.groups, &after.groups, |id, _| {
        MapWrite::Group(*id, None)
    }));
    writes.extend(went(&before.backends, &after.backends, |id, _| {
        MapWrite::Backend(*id, None)
    }));
    writes.extend(went(&tunnels.ports, &next.ports, |port, _| {
        MapWrite::TunnelPort(*port, None)
    }));
    writes.extend(went(&tunnels.endpoints, &next.endpoints, |_, (key, _)| {
        MapWrite::TunnelEndpoint(Box::new(*key), None)
    }));
    writes.extend(went(&tunnels.hops, &next.hops, |_, (key, _)| {
        MapWrite::TunnelHop(*key, None)
    }));
    writes.extend(went(&tunnels.peers, &next.peers, |id, _| {
        MapWrite::TunnelPeer(*id, None)
    }));
    writes.extend(went(&before.interfaces, &after.interfaces, |ifindex, _| {
        MapWrite::Interface(interface(ifindex), None)
    }));
    writes
}

/// What stands behind the prefix of a client that may open flows.
const ADMITTED: Source = Source { admitted: 1 };

/// Entries that are new or have another value.
fn came<K: Ord, V: PartialEq>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
    write: impl Fn(&K, &V) -> MapWrite,
) -> impl Iterator<Item = MapWrite> {
    after
        .iter()
        .filter(|(key, value)| before.get(key) != Some(value))
        .map(move |(key, value)| write(key, value))
}

/// Entries that are no more.
fn went<K: Ord, V>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
    write: impl Fn(&K, &V) -> MapWrite,
) -> impl Iterator<Item = MapWrite> {
    before
        .iter()
        .filter(|(key, _)| !after.contains_key(key))
        .map(move |(key, value)| write(key, value))
}

impl MapWrite {
    /// The write as one line for people, with the name behind its number where there is one.
    pub fn describe(&self, names: &NamesByNumber<'_>) -> String {
        let name = match self {
            Self::Backend(id, _) | Self::BackendCounters(id, _) => names
                .backends
                .get(id)
                .map(|(group, name)| format!("{group}/{name}")),
            Self::Group(id, _) | Self::GroupPast(id, _) => names.groups.get(id).map(ToString::to_string),
            Self::Listener(_, Some(Listener { id, .. }))
            | Self::ListenerRange(_, Some(Listener { id, .. }))
            | Self::ListenerCounters(id) => names.listeners.get(id).map(ToString::to_string),
            _ => None,
        };
        match name {
            Some(name) => format!("{self} ({name})"),
            None => self.to_string(),
        }
    }
}

impl SettingsChange {
    /// What differs, for people.
    fn parts(&self) -> Vec<String> {
        let Self { from, to } = self;
        [
            (
                from.abi_version != to.abi_version,
                format!("layout {}", to.abi_version),
            ),
            (
                from.route_generation != to.route_generation,
                format!("route generation {}", to.route_generation),
            ),
            (from.hash_seed != to.hash_seed, "hash seed".to_owned()),
            (from.flags != to.flags, "what the programs look for".to_owned()),
            (from.cookie_key != to.cookie_key, "key of SYN cookies".to_owned()),
            (
                from.least_mtu_bytes != to.least_mtu_bytes,
                format!("smallest MTU {}", to.least_mtu_bytes),
            ),
            (from.pool != to.pool, "SNAT pool".to_owned()),
            (from.filters != to.filters, "address filters".to_owned()),
        ]
        .into_iter()
        .filter_map(|(differs, what)| differs.then_some(what))
        .collect()
    }
}

impl fmt::Display for MapWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(key, record) => {
                let kind = match key.kind {
                    NameKind::LISTENER => "listener",
                    NameKind::GROUP => "group",
                    _ => "backend",
                };
                match record {
                    Some(record) if key.kind == NameKind::BACKEND => {
                        write!(f, "name {kind} {}: {}/{}", key.id, record.group(), record.name())
                    }
                    Some(record) => write!(f, "name {kind} {}: {}", key.id, record.name()),
                    None => write!(f, "remove name {kind} {}", key.id),
                }
            }
            Self::Settings(change) => write!(f, "settings: {}", change.parts().join(", ")),
            Self::Interface(key, Some(value)) => write!(f, "interface {}: {:?}", key.ifindex, value.mac),
            Self::Interface(key, None) => write!(f, "remove interface {}", key.ifindex),
            Self::TunnelPort(port, Some(_)) => write!(f, "tunnel port {port}"),
            Self::TunnelPort(port, None) => write!(f, "remove tunnel port {port}"),
            Self::TunnelEndpoint(key, Some(value)) => write!(
                f,
                "tunnel endpoint {:?} from {:?}: interface {}",
                key.local, key.remote, value.ifindex
            ),
            Self::TunnelEndpoint(key, None) => {
                write!(f, "remove tunnel endpoint {:?} from {:?}", key.local, key.remote)
            }
            Self::TunnelHop(key, Some(value)) => write!(
                f,
                "tunnel next hop {:?} on interface {}: peer {}",
                key.mac, key.ifindex, value.peer.0
            ),
            Self::TunnelHop(key, None) => {
                write!(
                    f,
                    "remove tunnel next hop {:?} on interface {}",
                    key.mac, key.ifindex
                )
            }
            Self::TunnelPeer(id, Some(peer)) => {
                write!(f, "tunnel peer {}: {:?} -> {:?}", id.0, peer.local, peer.remote)
            }
            Self::TunnelPeer(id, None) => write!(f, "remove tunnel peer {}", id.0),
            Self::Backend(id, Some(backend)) => {
                let state = match backend.state {
                    BackendState::HEALTHY => "healthy",
                    BackendState::DRAINING => "draining",
                    _ => "unhealthy",
                };
                write!(
                    f,
                    "backend {}: {} {state}",
                    id.0,
                    at(backend.address, backend.port)
                )
            }
            Self::Backend(id, None) => write!(f, "remove backend {}", id.0),
            Self::Slots { first, slots } => write!(f, "slots {first}..{}", *first as usize + slots.len()),
            Self::Group(id, Some(group)) => {
                write!(
                    f,
                    "group {}: {} slots from {}",
                    id.0, group.slot_count, group.first_slot
                )
            }
            Self::Group(id, None) => write!(f, "remove group {}", id.0),
            Self::Vip(key, Some(_)) => write!(f, "vip {:?}", key.address),
            Self::Vip(key, None) => write!(f, "remove vip {:?}", key.address),
            Self::Source(key, value) => write!(
                f,
                "{}source {:?}/{} of listener {}",
                if value.is_some() { "" } else { "remove " },
                key.address,
                key.prefix_bits
                    - 32
                    - if key.address.is_v4() {
                        IpAddress::V4_PREFIX_BITS
                    } else {
                        0
                    },
                key.listener.get()
            ),
            Self::ListenerRange(key, value) => {
                write!(
                    f,
                    "{}listener {} ({} bits) protocol {:?}",
                    if value.is_some() { "" } else { "remove " },
                    at(key.vip, key.port),
                    key.prefix_bits + 16 - ListenerRangeKey::BITS,
                    key.protocol,
                )?;
                match value {
                    Some(value) => write!(f, ": group {}", value.group.0),
                    None => Ok(()),
                }
            }
            Self::Listener(key, Some(value)) => {
                write!(
                    f,
                    "listener {} protocol {:?}: group {}",
                    at(key.vip, key.port),
                    key.protocol,
                    value.group.0
                )
            }
            Self::Listener(key, None) => {
                write!(
                    f,
                    "remove listener {} protocol {:?}",
                    at(key.vip, key.port),
                    key.protocol
                )
            }
            Self::ListenerCounters(id) => write!(f, "clear counters of listener {}", id.0),
            Self::BackendCounters(id, _) => write!(f, "clear counters of backend {}", id.0),
            Self::GroupPast(id, None) => write!(f, "clear counters of group {}", id.0),
            Self::GroupPast(id, Some(_)) => write!(f, "counters of group {}", id.0),
        }
    }
}

/// An address and a port as one writes them together.
fn at(address: IpAddress, port: Be16) -> SocketAddr {
    SocketAddr::new(address.to_std(), port.get())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use forwarder_common::abi::ABI_VERSION;

    use super::*;
    use crate::{
        config::{self, Config},
        health::Health,
        state::{
            desired::{GroupTable, Observations},
            ids::Ids,
        },
    };

    const CONFIG: &str = r#"
        [snat]
        prefixes = ["100.64.0.0/26"]
        [interface.eth0]
        [group.web.backend.a]
        address = "10.0.0.1"
        port = 80
        [group.web.backend.b]
        address = "10.0.0.2"
        port = 80
        [listener.web]
        vip = "192.0.2.1"
        port = 80
        group = "web"
    "#;

    fn config() -> Config {
        config::load::parse(CONFIG, Path::new("test.toml")).unwrap()
    }

    fn healthy(names: &[&str]) -> Observations {
        let health = names
            .iter()
            .map(|name| (("web".into(), (*name).into()), Health::Healthy))
            .collect();
        Observations {
            health,
            ..Observations::default()
        }
    }

    fn placement() -> Placement {
        Placement::new(4096).arrange([(GroupId(0), 1021)]).unwrap()
    }

    fn table(desired: &Desired) -> &GroupTable {
        &desired.groups[&GroupId(0)]
    }

    #[test]
    fn a_start_writes_backends_before_slots_before_group_before_listener() {
        let (config, mut placement) = (config(), placement());
        let after = Desired::of(&config, &Ids::assign(&config), &healthy(&["a", "b"]));
        let writes: Vec<_> = plan(&Desired::empty(), &after, &mut placement)
            .iter()
            .map(ToString::to_string)
            .collect();
        let settings = format!("settings: layout {ABI_VERSION}, hash seed, SNAT pool, address filters");
        assert_eq!(
            writes,
            [
                settings.as_str(),
                "backend 0: 10.0.0.1:80 healthy",
                "backend 1: 10.0.0.2:80 healthy",
                "slots 0..1021",
                "group 0: 1021 slots from 0",
                "vip 192.0.2.1",
                "listener 192.0.2.1:80 protocol 6: group 0",
            ]
        );
    }

    #[test]
    fn a_failed_backend_is_written_first_and_its_table_goes_to_the_other_region() {
        let (config, mut placement) = (config(), placement());
        let ids = Ids::assign(&config);
        let before = Desired::of(&config, &ids, &healthy(&["a", "b"]));
        plan(&Desired::empty(), &before, &mut placement);
        let after = Desired::of(&config, &ids, &healthy(&["b"]));
        let writes: Vec<_> = plan(&before, &after, &mut placement)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            writes,
            [
                "backend 0: 10.0.0.1:80 unhealthy",
                "slots 1021..2042",
                "group 0: 1021 slots from 1021"
            ]
        );
        assert!(table(&after).slots.iter().all(|slot| *slot == BackendId(1)));
    }

    #[test]
    fn without_a_healthy_backend_the_group_has_no_slots() {
        let (config, mut placement) = (config(), placement());
        let after = Desired::of(&config, &Ids::assign(&config), &healthy(&[]));
        let writes = plan(&Desired::empty(), &after, &mut placement);
        assert!(table(&after).slots.is_empty());
        assert!(!writes.iter().any(|write| matches!(write, MapWrite::Slots { .. })));
    }

    #[test]
    fn nothing_changed_nothing_to_write() {
        let config = config();
        let desired = Desired::of(&config, &Ids::assign(&config), &healthy(&["a"]));
        let mut placement = placement();
        plan(&Desired::empty(), &desired, &mut placement);
        assert!(plan(&desired, &desired, &mut placement).is_empty());
    }
}
