//! The writes that lead from one desired state to the next, in an order that no reader can trip over.
//!
//! Backends come before the slots that name them, slots before the group that points at them, groups before the
//! listeners that name them. A group's table alternates between two regions of the slot table: the new one is
//! written in full, then the group's entry is replaced, in one write.

use std::{collections::BTreeMap, fmt};

use forwarder_common::{
    abi::{
        backend::{Backend, BackendGroup, BackendId, BackendState, GroupId},
        interface::{Interface, InterfaceKey},
        listener::{Listener, ListenerKey, ListenerRangeKey, SourceKey, Vip, VipKey},
        settings::Settings,
    },
    wire::Ipv4Address,
};

use super::desired::{Desired, source_key};

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum MapWrite {
    Settings(Box<Settings>),
    Interface(InterfaceKey, Interface),
    Backend(BackendId, Backend),
    Slots { first: u32, slots: Vec<BackendId> },
    Group(GroupId, BackendGroup),
    Vip(VipKey, Vip),
    Source(SourceKey),
    Listener(ListenerKey, Listener),
    ListenerRange(ListenerRangeKey, Listener),
}

/// Where each group's table stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    regions: BTreeMap<GroupId, Region>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    first: u32,
    /// Slots of one table; there is room for two.
    size: u32,
    /// Which of the two is in use: 0 or 1.
    side: u32,
}

impl Placement {
    /// Places tables of these sizes one behind the other.
    pub fn new(sizes: impl IntoIterator<Item = (GroupId, u32)>) -> Self {
        let mut placement = Self::default();
        let mut first = 0;
        for (group, size) in sizes {
            placement.regions.insert(group, Region { first, size, side: 1 });
            first += 2 * size;
        }
        placement
    }
}

/// The writes from `before` to `after`; `placement` moves along.
pub fn plan(before: &Desired, after: &Desired, placement: &mut Placement) -> Vec<MapWrite> {
    let mut writes = Vec::new();
    for (ifindex, interface) in &after.interfaces {
        if before.interfaces.get(ifindex) != Some(interface) {
            writes.push(MapWrite::Interface(
                InterfaceKey { ifindex: *ifindex },
                *interface,
            ));
        }
    }
    if before.settings != after.settings {
        writes.push(MapWrite::Settings(Box::new(after.settings)));
    }
    for (id, backend) in &after.backends {
        if before.backends.get(id) != Some(backend) {
            writes.push(MapWrite::Backend(*id, *backend));
        }
    }
    for (id, group) in &after.groups {
        if before.groups.get(id) == Some(group) {
            continue;
        }
        let Some(region) = placement.regions.get_mut(id) else {
            continue;
        };
        region.side = 1 - region.side;
        let first = region.first + region.side * region.size;
        let slot_count = group.slots.len() as u32;
        if slot_count > 0 {
            writes.push(MapWrite::Slots {
                first,
                slots: group.slots.clone(),
            });
        }
        writes.push(MapWrite::Group(
            *id,
            BackendGroup {
                first_slot: first,
                slot_count,
                nat: group.nat,
                reserved: 0,
            },
        ));
    }
    for (address, vip) in &after.vips {
        if before.vips.get(address) != Some(vip) {
            writes.push(MapWrite::Vip(
                VipKey {
                    address: Ipv4Address::new(*address),
                },
                *vip,
            ));
        }
    }
    for source in after.sources.difference(&before.sources) {
        writes.push(MapWrite::Source(source_key(source)));
    }
    for (order, (key, listener)) in &after.listener_ranges {
        if before.listener_ranges.get(order) != Some(&(*key, *listener)) {
            writes.push(MapWrite::ListenerRange(*key, *listener));
        }
    }
    for (order, (key, listener)) in &after.listeners {
        if before.listeners.get(order) != Some(&(*key, *listener)) {
            writes.push(MapWrite::Listener(*key, *listener));
        }
    }
    writes
}

impl fmt::Display for MapWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(settings) => write!(f, "settings: route generation {}", settings.route_generation),
            Self::Interface(key, value) => write!(f, "interface {}: {:?}", key.ifindex, value.mac),
            Self::Backend(id, backend) => {
                let state = match backend.state {
                    BackendState::HEALTHY => "healthy",
                    BackendState::DRAINING => "draining",
                    _ => "unhealthy",
                };
                write!(
                    f,
                    "backend {}: {:?}:{:?} {state}",
                    id.0, backend.address, backend.port
                )
            }
            Self::Slots { first, slots } => write!(f, "slots {first}..{}", *first as usize + slots.len()),
            Self::Group(id, group) => {
                write!(
                    f,
                    "group {}: {} slots from {}",
                    id.0, group.slot_count, group.first_slot
                )
            }
            Self::Vip(key, _) => write!(f, "vip {:?}", key.address),
            Self::Source(key) => write!(
                f,
                "source {:?}/{} of listener {}",
                key.address,
                key.prefix_bits - 32,
                key.listener.get()
            ),
            Self::ListenerRange(key, value) => write!(
                f,
                "listener {:?}:{:?} ({} bits) protocol {:?}: group {}",
                key.vip,
                key.port,
                key.prefix_bits + 16 - ListenerRangeKey::BITS,
                key.protocol,
                value.group.0
            ),
            Self::Listener(key, value) => {
                write!(
                    f,
                    "listener {:?}:{:?} protocol {}: group {}",
                    key.vip, key.port, key.protocol, value.group.0
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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

    fn table(desired: &Desired) -> &GroupTable {
        &desired.groups[&GroupId(0)]
    }

    #[test]
    fn a_start_writes_backends_before_slots_before_group_before_listener() {
        let (config, mut placement) = (config(), Placement::new([(GroupId(0), 1021)]));
        let after = Desired::of(&config, &Ids::assign(&config), &healthy(&["a", "b"]));
        let writes: Vec<_> = plan(&Desired::empty(), &after, &mut placement)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            writes,
            [
                "settings: route generation 0",
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
        let (config, mut placement) = (config(), Placement::new([(GroupId(0), 1021)]));
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
        let (config, mut placement) = (config(), Placement::new([(GroupId(0), 1021)]));
        let after = Desired::of(&config, &Ids::assign(&config), &healthy(&[]));
        let writes = plan(&Desired::empty(), &after, &mut placement);
        assert!(table(&after).slots.is_empty());
        assert!(!writes.iter().any(|write| matches!(write, MapWrite::Slots { .. })));
    }

    #[test]
    fn nothing_changed_nothing_to_write() {
        let config = config();
        let desired = Desired::of(&config, &Ids::assign(&config), &healthy(&["a"]));
        assert!(plan(&desired, &desired, &mut Placement::new([(GroupId(0), 1021)])).is_empty());
    }
}
