//! Typed handles of the maps, taken out of the loaded object once.

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, MapType, PerCpuArray, Queue},
};
use bytemuck::Pod;
use forwarder_common::abi::{
    backend::{Backend, BackendGroup, GroupId},
    counter::{ReasonCounters, TrafficCounters},
    flow::{FlowId, FlowKey, FlowKeyV4, FlowReference},
    interface::{Interface, InterfaceKey},
    listener::{Listener, ListenerKey, Source, Vip, VipKey},
    map_name,
    settings::Settings,
    tunnel::{TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelPeer, TunnelPort},
};

use super::{
    counters::TrafficMaps,
    memory::{FlowMemory, LiveMemory, SlotMemory},
    object::Sizes,
    object::kernel_error,
    pin::PinDirectory,
    pod::AsPod,
};
use crate::{
    error::Error,
    state::ids::{NameKey, NameRecord},
};

pub(super) type Table<V> = Array<MapData, AsPod<V>>;
/// aya's key holds the number of bits apart from these three words: see `abi::listener`.
pub(super) type Trie<V> = LpmTrie<MapData, [u32; 5], AsPod<V>>;
pub(super) type Hash<K, V> = HashMap<MapData, AsPod<K>, AsPod<V>>;

/// What the writer writes.
pub struct ControlMaps {
    pub names: Hash<NameKey, NameRecord>,
    pub settings: Table<Settings>,
    pub interfaces: Hash<InterfaceKey, Interface>,
    pub tunnel_ports: Table<TunnelPort>,
    pub tunnel_endpoints: Hash<TunnelEndpointKey, TunnelEndpoint>,
    pub tunnel_hops: Hash<TunnelHopKey, TunnelHop>,
    pub tunnel_peers: Table<TunnelPeer>,
    pub vips: Hash<VipKey, Vip>,
    pub listeners: Hash<ListenerKey, Listener>,
    pub listener_ranges: Trie<Listener>,
    pub sources: Trie<Source>,
    pub groups: Table<BackendGroup>,
    pub backends: Table<Backend>,
    pub slots: SlotMemory,
}

/// What the sweep works on.
pub struct FlowMaps {
    pub memory: FlowMemory,
    pub listeners_live: LiveMemory,
    pub backends_live: LiveMemory,
    pub index: FlowIndex,
    pub free: Queue<MapData, AsPod<FlowId>>,
}

/// The flow index: a map for the short keys of IPv4, one for those of IPv6.
pub struct FlowIndex {
    pub v4: Hash<FlowKeyV4, FlowReference>,
    pub v6: Hash<FlowKey, FlowReference>,
}

impl FlowIndex {
    /// # Errors
    /// The kernel's; [`MapError::KeyNotFound`] for a key that is not there.
    pub fn get(&self, key: &FlowKey) -> Result<AsPod<FlowReference>, MapError> {
        if key.is_v4() {
            self.v4.get(&AsPod(key.v4()), 0)
        } else {
            self.v6.get(&AsPod(*key), 0)
        }
    }

    /// `flags`: of the system call.
    ///
    /// # Errors
    /// The kernel's.
    pub fn insert(&mut self, key: &FlowKey, reference: FlowReference, flags: u64) -> Result<(), MapError> {
        if key.is_v4() {
            self.v4.insert(AsPod(key.v4()), AsPod(reference), flags)
        } else {
            self.v6.insert(AsPod(*key), AsPod(reference), flags)
        }
    }

    /// # Errors
    /// The kernel's; [`MapError::KeyNotFound`] for a key that is not there.
    pub fn remove(&mut self, key: &FlowKey) -> Result<(), MapError> {
        if key.is_v4() {
            self.v4.remove(&AsPod(key.v4()))
        } else {
            self.v6.remove(&AsPod(*key))
        }
    }
}

/// What the programs count, and only the agent takes back to zero.
pub struct CounterMaps {
    pub listeners: TrafficMaps,
    pub backends: TrafficMaps,
    pub reasons: PerCpuArray<MapData, AsPod<ReasonCounters>>,
    /// What backends have counted that were in a group once: a group's counters do not fall when one leaves.
    pub past: Hash<GroupId, TrafficCounters>,
}

/// The map of names, which no program reads.
const NAMES: &str = "NAMES";
/// [`CounterMaps::past`], which no program reads either.
const PAST: &str = "PAST";
/// BPF_F_NO_PREALLOC (linux/bpf.h): memory for the entries there are.
const NO_PREALLOC: u32 = 1;

/// Takes all maps out of a loaded object.
///
/// # Errors
/// When the object lacks one or it has another type, which is a fault of the build.
pub fn take(
    ebpf: &mut Ebpf,
    sizes: &Sizes,
    pins: Option<&PinDirectory>,
) -> Result<(ControlMaps, FlowMaps, CounterMaps), Error> {
    let control = ControlMaps {
        names: names(sizes, pins)?,
        settings: typed(ebpf, map_name::SETTINGS)?,
        interfaces: typed(ebpf, map_name::INTERFACES)?,
        tunnel_ports: typed(ebpf, map_name::TUNNEL_PORTS)?,
        tunnel_endpoints: typed(ebpf, map_name::TUNNEL_ENDPOINTS)?,
        tunnel_hops: typed(ebpf, map_name::TUNNEL_HOPS)?,
        tunnel_peers: typed(ebpf, map_name::TUNNEL_PEERS)?,
        vips: typed(ebpf, map_name::VIPS)?,
        listeners: typed(ebpf, map_name::LISTENERS)?,
        listener_ranges: typed(ebpf, map_name::LISTENER_RANGES)?,
        sources: typed(ebpf, map_name::SOURCES)?,
        groups: typed(ebpf, map_name::GROUPS)?,
        backends: typed(ebpf, map_name::BACKENDS)?,
        slots: SlotMemory::map(array(ebpf, map_name::SLOTS)?, sizes.slots)?,
    };
    let flows = FlowMaps {
        memory: FlowMemory::map(array(ebpf, map_name::FLOWS)?, sizes.flows)?,
        listeners_live: LiveMemory::map(
            array(ebpf, map_name::LISTENER_LIVE)?,
            sizes.listeners,
            map_name::LISTENER_LIVE,
        )?,
        backends_live: LiveMemory::map(
            array(ebpf, map_name::BACKEND_LIVE)?,
            sizes.backends,
            map_name::BACKEND_LIVE,
        )?,
        index: FlowIndex {
            v4: typed(ebpf, map_name::FLOW_INDEX)?,
            v6: typed(ebpf, map_name::FLOW_INDEX_V6)?,
        },
        free: typed(ebpf, map_name::FREE_FLOWS)?,
    };
    let counters = CounterMaps {
        listeners: TrafficMaps::open(
            array(ebpf, map_name::LISTENER_CARRIED)?,
            typed(ebpf, map_name::LISTENER_EVENTS)?,
            sizes.listeners,
            map_name::LISTENER_CARRIED,
        )?,
        backends: TrafficMaps::open(
            array(ebpf, map_name::BACKEND_CARRIED)?,
            typed(ebpf, map_name::BACKEND_EVENTS)?,
            sizes.backends,
            map_name::BACKEND_CARRIED,
        )?,
        reasons: typed(ebpf, map_name::REASON_COUNTERS)?,
        past: own(PAST, sizes.groups.saturating_mul(2), pins)?,
    };
    Ok((control, flows, counters))
}

fn names(sizes: &Sizes, pins: Option<&PinDirectory>) -> Result<Hash<NameKey, NameRecord>, Error> {
    // One that leaves the configuration and one that comes for it may be there together.
    let entries = sizes
        .listeners
        .saturating_add(sizes.groups)
        .saturating_add(sizes.backends)
        .saturating_mul(2);
    own(NAMES, entries, pins)
}

/// A map that only agents know, and so is not in the object: the pinned one, or a new one.
fn own<K: Pod, V: Pod>(name: &str, entries: u32, pins: Option<&PinDirectory>) -> Result<Hash<K, V>, Error> {
    let open = || -> Result<MapData, Box<dyn std::error::Error>> {
        let pin = pins.map(|pins| pins.map(name));
        if let Some(path) = pin.as_ref().filter(|path| path.exists()) {
            return Ok(MapData::from_pin(path)?);
        }
        let object = aya_obj::Map::new_from_params(
            MapType::Hash as u32,
            size_of::<K>() as u32,
            size_of::<V>() as u32,
            entries,
            NO_PREALLOC,
        );
        let data = MapData::create(object, name, None)?;
        if let Some(path) = pin {
            data.pin(path)?;
        }
        Ok(data)
    };
    open()
        .and_then(|data| Ok(Map::HashMap(data).try_into()?))
        .map_err(|error| kernel_error(&format!("open the map \"{name}\""), error.as_ref()))
}

fn take_one(ebpf: &mut Ebpf, name: &str) -> Result<Map, Error> {
    ebpf.take_map(name).ok_or_else(|| {
        Error::failed(format!("the BPF object has no map \"{name}\"")).hint("rebuild the binary")
    })
}

fn typed<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<T, Error> {
    take_one(ebpf, name)?
        .try_into()
        .map_err(|error| kernel_error(&format!("open the map \"{name}\""), &error))
}

/// The bare handle of an array, for mapping it into memory.
fn array(ebpf: &mut Ebpf, name: &str) -> Result<MapData, Error> {
    match take_one(ebpf, name)? {
        Map::Array(data) => Ok(data),
        _ => Err(Error::failed(format!("the map \"{name}\" is not an array")).hint("rebuild the binary")),
    }
}
