//! The only code that writes the control maps: one write of a plan at a time.

use aya::maps::{Array, HashMap, MapData, MapError, lpm_trie::Key};
use bytemuck::{Pod, Zeroable as _};
use forwarder_common::abi::{
    backend::{Backend, BackendGroup, BackendId, GroupId},
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
            MapWrite::ListenerCounters(id) => counters.listeners.clear(id.0).map(|()| None),
            MapWrite::BackendCounters(id, group) => {
                return retire(counters, *id, *group).map(|()| None);
            }
            MapWrite::GroupPast(id, value) => exchange(&mut counters.past, id, value.as_deref())
                .map(|old| Some(MapWrite::GroupPast(*id, old.map(Box::new)))),
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

/// As [`exchange`], of a prefix in a trie. A look-up finds a shorter prefix as well; what one bit less finds, too, is
/// none of this prefix, as no two prefixes that hold each other have the same value: those of a listener stand apart.
fn exchange_prefix<K: Pod, V: Pod + PartialEq>(
    map: &mut Trie<V>,
    key: &K,
    value: Option<&V>,
) -> Result<Option<V>, MapError> {
    let find = |map: &Trie<V>, bits: u32, words: [u32; 5]| match map.get(&Key::new(bits, words), 0) {
        Ok(AsPod(found)) => Ok(Some(found)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    };
    let key = trie_key(key);
    let (bits, words) = (key.prefix_len(), key.data());
    let found = find(map, bits, words)?;
    let shorter = find(map, bits.saturating_sub(1), words)?;
    let old = found.filter(|_| found != shorter);
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

/// Clears a backend's counters; what they were is its group's past. No step back is needed: together they are the same.
fn retire(counters: &mut CounterMaps, id: BackendId, group: Option<GroupId>) -> Result<(), Error> {
    let refused = |error: &MapError| kernel_error("clear the counters of a backend", error);
    let Some(group) = group else {
        return counters.backends.clear(id.0).map_err(|error| refused(&error));
    };
    let before = counters.past(group)?;
    let mut after = before;
    after.add_all(&counters.backend(id)?);
    exchange(&mut counters.past, &group, Some(&after)).map_err(|error| refused(&error))?;
    counters.backends.clear(id.0).map_err(|error| {
        // Or it would count twice. If this is refused as well, it does, and nothing else is wrong.
        let _ = exchange(&mut counters.past, &group, Some(&before));
        refused(&error)
    })
}
