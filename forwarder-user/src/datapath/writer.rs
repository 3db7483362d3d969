//! The only code that writes the control maps: one write of a plan at a time.

use aya::{
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, PerCpuValues, lpm_trie::Key},
    util::nr_cpus,
};
use bytemuck::{Pod, Zeroable as _};
use forwarder_common::abi::{
    backend::{Backend, BackendGroup},
    counter::TrafficCounters,
    listener::Source,
    tunnel::{TunnelPeer, TunnelPort},
};

use super::{
    maps::{ControlMaps, CounterMaps, Trie},
    object::kernel_error,
    pod::AsPod,
};
use crate::{
    error::Error,
    state::{apply::Store, plan::MapWrite},
};

/// All that plans write to.
pub struct KernelTables<'a> {
    pub control: &'a mut ControlMaps,
    pub counters: &'a mut CounterMaps,
}

impl Store for KernelTables<'_> {
    fn exchange(&mut self, write: &MapWrite) -> Result<Option<MapWrite>, Error> {
        let Self { control, counters } = self;
        let undo = match write {
            MapWrite::Name(key, value) => exchange(&mut control.names, key, value.as_deref())
                .map(|old| Some(MapWrite::Name(*key, old.map(Box::new)))),
            MapWrite::Settings(value) => {
                replace(&mut control.settings, 0, **value).map(|old| Some(MapWrite::Settings(Box::new(old))))
            }
            MapWrite::Interface(key, value) => exchange(&mut control.interfaces, key, value.as_ref())
                .map(|old| Some(MapWrite::Interface(*key, old))),
            MapWrite::TunnelPort(port, value) => {
                let value = value.unwrap_or(TunnelPort::default());
                replace(&mut control.tunnel_ports, u32::from(*port), value)
                    .map(|old| Some(MapWrite::TunnelPort(*port, Some(old))))
            }
            MapWrite::TunnelEndpoint(key, value) => {
                exchange(&mut control.tunnel_endpoints, &**key, value.as_ref())
                    .map(|old| Some(MapWrite::TunnelEndpoint(key.clone(), old)))
            }
            MapWrite::TunnelHop(key, value) => exchange(&mut control.tunnel_hops, key, value.as_ref())
                .map(|old| Some(MapWrite::TunnelHop(*key, old))),
            MapWrite::TunnelPeer(id, value) => {
                let value = value.as_deref().copied().unwrap_or(TunnelPeer::zeroed());
                replace(&mut control.tunnel_peers, u32::from(id.0), value)
                    .map(|old| Some(MapWrite::TunnelPeer(*id, Some(Box::new(old)))))
            }
            MapWrite::Backend(id, value) => {
                replace(&mut control.backends, id.0, value.unwrap_or(Backend::zeroed()))
                    .map(|old| Some(MapWrite::Backend(*id, Some(old))))
            }
            MapWrite::Slots { first, slots } => {
                // No group points there yet.
                control.slots.write(*first, slots);
                Ok(None)
            }
            MapWrite::Group(id, value) => {
                replace(&mut control.groups, id.0, value.unwrap_or(BackendGroup::zeroed()))
                    .map(|old| Some(MapWrite::Group(*id, Some(old))))
            }
            MapWrite::Vip(key, value) => {
                exchange(&mut control.vips, key, value.as_ref()).map(|old| Some(MapWrite::Vip(*key, old)))
            }
            // Plans add what is not there and remove what is.
            MapWrite::Source(key, Some(value)) => control
                .sources
                .insert(&trie_key(key), AsPod(*value), 0)
                .map(|()| Some(MapWrite::Source(*key, None))),
            MapWrite::Source(key, None) => control
                .sources
                .remove(&trie_key(key))
                .map(|()| Some(MapWrite::Source(*key, Some(Source { admitted: 1 })))),
            MapWrite::ListenerRange(key, value) => {
                exchange_prefix(&mut control.listener_ranges, key, value.as_ref())
                    .map(|old| Some(MapWrite::ListenerRange(*key, old)))
            }
            MapWrite::Listener(key, value) => exchange(&mut control.listeners, key, value.as_ref())
                .map(|old| Some(MapWrite::Listener(*key, old))),
            // Nobody has the number.
            MapWrite::ListenerCounters(id) => clear(&mut counters.listeners, id.0).map(|()| None),
            MapWrite::BackendCounters(id) => clear(&mut counters.backends, id.0).map(|()| None),
        };
        undo.map_err(|error| kernel_error(&format!("write {write}"), &error))
    }
}

/// Inserts or removes an entry; returns what was there.
fn exchange<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, AsPod<K>, AsPod<V>>,
    key: &K,
    value: Option<&V>,
) -> Result<Option<V>, MapError> {
    let key = AsPod(*key);
    let old = match map.get(&key, 0) {
        Ok(AsPod(old)) => Some(old),
        Err(MapError::KeyNotFound) => None,
        Err(error) => return Err(error),
    };
    match value {
        Some(value) => map.insert(key, AsPod(*value), 0)?,
        None if old.is_some() => map.remove(&key)?,
        None => {}
    }
    Ok(old)
}

/// As [`exchange`], of a prefix in a trie: a look-up finds a shorter prefix as well, so the keys are looked through.
fn exchange_prefix<K: Pod, V: Pod>(
    map: &mut Trie<V>,
    key: &K,
    value: Option<&V>,
) -> Result<Option<V>, MapError> {
    let key = trie_key(key);
    let mut old = None;
    for found in map.keys() {
        let found = found?;
        if (found.prefix_len(), found.data()) == (key.prefix_len(), key.data()) {
            let AsPod(value) = map.get(&key, 0)?;
            old = Some(value);
            break;
        }
    }
    match value {
        Some(value) => map.insert(&key, AsPod(*value), 0)?,
        None if old.is_some() => map.remove(&key)?,
        None => {}
    }
    Ok(old)
}

/// A trie's key as aya wants it: the number of bits, then three words.
fn trie_key<K: Pod>(key: &K) -> Key<[u32; 5]> {
    let [bits, words @ ..]: [u32; 6] = bytemuck::cast(*key);
    Key::new(bits, words)
}

/// Replaces an element; returns what was there.
fn replace<V: Pod>(map: &mut Array<MapData, AsPod<V>>, index: u32, value: V) -> Result<V, MapError> {
    let AsPod(old) = map.get(&index, 0)?;
    map.set(index, AsPod(value), 0)?;
    Ok(old)
}

fn clear(map: &mut PerCpuArray<MapData, AsPod<TrafficCounters>>, index: u32) -> Result<(), MapError> {
    let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
    let zeros = PerCpuValues::try_from(vec![AsPod(TrafficCounters::default()); cpus])?;
    map.set(index, zeros, 0)
}
