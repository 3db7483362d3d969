//! What an earlier agent has left in the tables.

use std::collections::BTreeMap;

use aya::maps::{HashMap, MapData, lpm_trie::Key};
use bytemuck::Pod;
use forwarder_common::abi::{
    backend::BackendState,
    listener::{ListenerId, ListenerRangeKey, SourceKey},
};

use super::{maps::ControlMaps, object::kernel_error, pod::AsPod};
use crate::{
    error::Error,
    state::{
        desired::{Desired, GroupTable},
        ids::Ids,
        overrides,
        placement::Placement,
        plan::Applied,
        tables::Slots,
        tunnels::TunnelTables,
    },
};

/// Reads the control maps. Fresh maps read as [`Applied::nothing`].
///
/// # Errors
/// When the kernel refuses.
pub fn read(maps: &ControlMaps) -> Result<Applied, Error> {
    let refused = |error: &aya::maps::MapError| kernel_error("read the tables", error);
    let records: BTreeMap<_, _> = entries(&maps.names)?.into_iter().collect();
    let ids = Ids::restore(&records);
    let mut placement = Placement::new(maps.slots.capacity());
    let mut desired = Desired::empty();
    desired.overrides = overrides::restore(&records);
    let AsPod(settings) = maps.settings.get(&0, 0).map_err(|error| refused(&error))?;
    desired.settings = settings;
    for (key, value) in entries(&maps.interfaces)? {
        desired.interfaces.insert(key.ifindex, value);
    }
    desired.tunnels = tunnels(maps)?;
    for (key, value) in entries(&maps.vips)? {
        desired.vips.insert(key.address.octets(), value);
    }
    for (key, value) in entries(&maps.listeners)? {
        let order = (key.vip.octets(), key.port.get(), key.protocol.get() as u8);
        desired.listeners.insert(order, (key, value));
    }
    for entry in maps.listener_ranges.iter() {
        let (key, AsPod(value)) = entry.map_err(|error| refused(&error))?;
        let key: ListenerRangeKey = range_key(&key);
        let bits = (key.prefix_bits + 16).saturating_sub(ListenerRangeKey::BITS);
        let order = (key.vip.octets(), key.port.get(), bits, key.protocol.get() as u8);
        desired.listener_ranges.insert(order, (key, value));
    }
    for entry in maps.sources.iter() {
        let (key, _) = entry.map_err(|error| refused(&error))?;
        let key: SourceKey = range_key(&key);
        let bits = key.prefix_bits.saturating_sub(32);
        desired
            .sources
            .insert((ListenerId(key.listener.get()), key.address.octets(), bits));
    }
    for id in ids.backends.values() {
        let AsPod(backend) = maps.backends.get(&id.0, 0).map_err(|error| refused(&error))?;
        if backend.state != BackendState::ABSENT {
            desired.backends.insert(*id, backend);
        }
    }
    for (key, record) in &records {
        let Some(id) = ids.groups.get(&record.name()).filter(|id| id.0 == key.id) else {
            continue;
        };
        let AsPod(group) = maps.groups.get(&id.0, 0).map_err(|error| refused(&error))?;
        placement.restore(*id, record.first_slot, record.table_slots, &group);
        let behind = group.first_slot.saturating_add(group.slot_count);
        let table = |first: u32, count: u32| {
            if first.saturating_add(count) <= maps.slots.capacity() {
                maps.slots.read(first, count).into()
            } else {
                Slots::default()
            }
        };
        desired.groups.insert(
            *id,
            GroupTable {
                nat: group.nat,
                selection: group.selection,
                persistence_secs: group.persistence_secs,
                persistence_bits_v4: group.persistence_bits_v4,
                persistence_bits_v6: group.persistence_bits_v6,
                slots: table(group.first_slot, group.slot_count),
                overflow: table(behind, group.overflow_slot_count),
            },
        );
    }
    Ok(Applied {
        ids,
        placement,
        desired,
    })
}

/// The tunnels' tables. What UDP ports mean follows from the endpoints: the table of ports is too large to be read.
fn tunnels(maps: &ControlMaps) -> Result<TunnelTables, Error> {
    let mut tunnels = TunnelTables::default();
    for (key, value) in entries(&maps.tunnel_endpoints)? {
        tunnels.add_endpoint(key, value);
    }
    for (key, value) in entries(&maps.tunnel_hops)? {
        tunnels.hops.insert(bytemuck::cast(key), (key, value));
        let AsPod(peer) = maps
            .tunnel_peers
            .get(&u32::from(value.peer.0), 0)
            .map_err(|error| kernel_error("read the tables", &error))?;
        tunnels.peers.insert(value.peer, peer);
    }
    Ok(tunnels)
}

/// The other way round from `writer::trie_key`.
fn range_key<K: Pod>(key: &Key<[u32; 5]>) -> K {
    let [a, b, c, d, e] = key.data();
    bytemuck::cast([key.prefix_len(), a, b, c, d, e])
}

fn entries<K: Pod, V: Pod>(map: &HashMap<MapData, AsPod<K>, AsPod<V>>) -> Result<Vec<(K, V)>, Error> {
    map.iter()
        .map(|entry| match entry {
            Ok((AsPod(key), AsPod(value))) => Ok((key, value)),
            Err(error) => Err(kernel_error("read the tables", &error)),
        })
        .collect()
}
