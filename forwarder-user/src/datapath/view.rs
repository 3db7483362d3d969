//! The live maps, read and never written: what the walk would do to a packet, without doing it.
//!
//! [`LiveView`] is `Tables` over the maps with an overlay in memory. A flow entry is copied when it is first used,
//! and whatever the walk writes (entries, keys, taken flows) stays in the overlay. So packets explained with one
//! view see each other's effects, and the kernel sees none. [`LiveEnv`] asks the kernel for routes through
//! `map_name::PROGRAM_ASK`, which is also the only way to look at the head of the queue of free flows.
//!
//! The maps are read one after the other while packets pass and the agent writes: the answer is as if the packet
//! came at about this time.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    hash,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError},
};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError, lpm_trie::Key},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use bytemuck::{Pod, Zeroable as _};
use elsa::FrozenMap;
use forwarder_common::{
    abi::{
        backend::{Backend, BackendGroup, BackendHop, BackendId, GroupId},
        counter::IcmpBudget,
        flow::{FlowEntry, FlowId, FlowKey, FlowReference, FlowState},
        fragment::{FragmentFlow, FragmentKey, HELD_BYTES, HeldKind},
        handshake::{Handshake, SynBudget},
        interface::{Interface, InterfaceKey},
        listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, Source, SourceKey, Vip, VipKey},
        map_name,
        persistence::{Persistence, PersistenceKey},
        rate::{SourceRate, SourceRateKey},
        reason::Reason,
        settings::Settings,
        tunnel::{
            PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelPeer, TunnelPort,
        },
    },
    datapath::{Env, Gauge, Hook, Outcome, Packet, Route, Tables, TrafficEvent, inquiry::Inquiry},
};

use super::{
    attach::AttachmentKind,
    maps::{FlowIndex, Hash, Table, Trie},
    memory::FlowMemory,
    object::kernel_error,
    packet,
    pod::AsPod,
    times::monotonic_secs,
};
use crate::error::Error;

/// Handles of the maps that the walk reads, beside those of the agent's other parts.
pub struct LiveMaps {
    settings: Table<Settings>,
    vips: Hash<VipKey, Vip>,
    listeners: Hash<ListenerKey, Listener>,
    listener_ranges: Trie<Listener>,
    sources: Trie<Source>,
    groups: Table<BackendGroup>,
    slots: Table<BackendId>,
    backends: Table<Backend>,
    group_turns: Table<u64>,
    persistence: Hash<PersistenceKey, Persistence>,
    handshakes: Table<Handshake>,
    source_rates: Hash<SourceRateKey, SourceRate>,
    interfaces: Hash<InterfaceKey, Interface>,
    tunnel_ports: Table<TunnelPort>,
    tunnel_endpoints: Hash<TunnelEndpointKey, TunnelEndpoint>,
    tunnel_hops: Hash<TunnelHopKey, TunnelHop>,
    tunnel_peers: Table<TunnelPeer>,
    listeners_live: Table<u64>,
    backends_live: Table<u64>,
    flow_index: FlowIndex,
    fragments: Hash<FragmentKey, FragmentFlow>,
    /// How many keys the flow index has room for.
    flow_keys: u32,
    flows: FlowMemory,
}

impl LiveMaps {
    /// Opens the maps of a loaded object once more; call it before they are taken out.
    ///
    /// # Errors
    /// When the object lacks one or it has another type, which is a fault of the build.
    pub fn open(ebpf: &Ebpf) -> Result<Self, Error> {
        let flows = data(ebpf, map_name::FLOWS)?;
        let max_flows = capacity(&flows)?;
        Ok(Self {
            settings: again(ebpf, map_name::SETTINGS)?,
            vips: again(ebpf, map_name::VIPS)?,
            listeners: again(ebpf, map_name::LISTENERS)?,
            listener_ranges: again(ebpf, map_name::LISTENER_RANGES)?,
            sources: again(ebpf, map_name::SOURCES)?,
            groups: again(ebpf, map_name::GROUPS)?,
            slots: again(ebpf, map_name::SLOTS)?,
            backends: again(ebpf, map_name::BACKENDS)?,
            group_turns: again(ebpf, map_name::GROUP_TURNS)?,
            persistence: again(ebpf, map_name::PERSISTENCE)?,
            handshakes: again(ebpf, map_name::HANDSHAKES)?,
            source_rates: again(ebpf, map_name::SOURCE_RATES)?,
            fragments: again(ebpf, map_name::FRAGMENTS)?,
            interfaces: again(ebpf, map_name::INTERFACES)?,
            tunnel_ports: again(ebpf, map_name::TUNNEL_PORTS)?,
            tunnel_endpoints: again(ebpf, map_name::TUNNEL_ENDPOINTS)?,
            tunnel_hops: again(ebpf, map_name::TUNNEL_HOPS)?,
            tunnel_peers: again(ebpf, map_name::TUNNEL_PEERS)?,
            listeners_live: again(ebpf, map_name::LISTENER_LIVE)?,
            backends_live: again(ebpf, map_name::BACKEND_LIVE)?,
            flow_index: FlowIndex {
                v4: again(ebpf, map_name::FLOW_INDEX)?,
                v6: again(ebpf, map_name::FLOW_INDEX_V6)?,
            },
            flow_keys: capacity(&data(ebpf, map_name::FLOW_INDEX)?)?,
            flows: FlowMemory::map(flows, max_flows)?,
        })
    }

    fn settings(&self) -> Result<Settings, Error> {
        match self.settings.get(&0, 0) {
            Ok(AsPod(settings)) => Ok(settings),
            Err(error) => Err(kernel_error("read the settings", &error)),
        }
    }
}

/// Another handle of a map, typed.
pub(super) fn again<T: TryFrom<Map, Error = MapError>>(ebpf: &Ebpf, name: &str) -> Result<T, Error> {
    Map::from_map_data(data(ebpf, name)?)
        .and_then(T::try_from)
        .map_err(|error| kernel_error(&format!("open the map \"{name}\" once more"), &error))
}

/// How many entries a map has.
pub(super) fn capacity(map: &MapData) -> Result<u32, Error> {
    match map.info() {
        Ok(info) => Ok(info.max_entries()),
        Err(error) => Err(kernel_error("ask for the size of a map", &error)),
    }
}

/// Another handle of a map.
pub(super) fn data(ebpf: &Ebpf, name: &str) -> Result<MapData, Error> {
    let Some(
        Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::LpmTrie(data),
    ) = ebpf.map(name)
    else {
        let what = format!("the BPF object has no map \"{name}\" that can be looked at");
        return Err(Error::failed(what).hint("rebuild the binary"));
    };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(MapError::from);
    fd.and_then(MapData::from_fd)
        .map_err(|error| kernel_error(&format!("open the map \"{name}\" once more"), &error))
}

/// The running data path, to be looked at from any thread.
pub struct Live {
    maps: LiveMaps,
    ebpf: Arc<Mutex<Ebpf>>,
}

impl Live {
    /// `maps` are those of `ebpf`.
    pub fn new(maps: LiveMaps, ebpf: Arc<Mutex<Ebpf>>) -> Self {
        Self { maps, ebpf }
    }

    /// See [`walk`].
    pub fn walk(&self, arrivals: &[Arrival<'_>]) -> Result<Vec<Walk>, Error> {
        let ebpf = self.ebpf.lock().unwrap_or_else(PoisonError::into_inner);
        walk(&self.maps, &ebpf, arrivals)
    }

    /// The flow table.
    pub fn flows(&self) -> &FlowMemory {
        &self.maps.flows
    }
}

/// A frame that would come in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub frame: &'a [u8],
    pub ifindex: u32,
    /// The program of that interface.
    pub kind: AttachmentKind,
}

/// What would become of a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Walk {
    pub outcome: Outcome,
    /// What the walk met, in order.
    pub steps: Vec<Step>,
    /// The flow that it used last, as it is then.
    pub flow: Option<(FlowId, FlowEntry)>,
    /// The frame then.
    pub frame: Vec<u8>,
}

/// Runs the walk on frames that come one after the other, each seeing what those before it would have changed.
/// `maps` are those of `ebpf`; nothing in them changes.
///
/// # Errors
/// The kernel refuses to answer a question.
pub fn walk(maps: &LiveMaps, ebpf: &Ebpf, arrivals: &[Arrival<'_>]) -> Result<Vec<Walk>, Error> {
    let trace = Trace::default();
    let mut view = LiveView {
        maps,
        ebpf,
        trace: &trace,
        reads: Reads::default(),
        changes: Changes::default(),
    };
    let mut walks = Vec::new();
    for arrival in arrivals {
        let settings = maps.settings()?;
        let mut env = LiveEnv {
            ebpf,
            trace: &trace,
            hook: arrival.kind.hook(),
            ingress_ifindex: arrival.ifindex,
        };
        let (outcome, frame) = packet::forward(arrival.kind, arrival.frame, &mut view, &mut env, &settings);
        let steps = trace.take()?;
        let last = steps.iter().rev().find_map(|step| match step {
            Step::Flow(id, _) => Some(*id),
            _ => None,
        });
        walks.push(Walk {
            outcome,
            flow: last.and_then(|id| Some((id, *view.changes.flows.get(&id)?))),
            steps,
            frame,
        });
    }
    Ok(walks)
}

/// What the walk met on its way, in order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// A listener has the packet's destination.
    Listener(Listener),
    Group(GroupId, BackendGroup),
    /// The backend of the client's last flow.
    Persistence(BackendId),
    /// A slot of the slot table, by its index there.
    Slot(u32, BackendId),
    Backend(BackendId, Backend),
    /// The number of a new flow; `is_certain`: the kernel would give it this very one.
    Taken {
        id: FlowId,
        is_certain: bool,
    },
    /// An entry before the walk changed it.
    Flow(FlowId, FlowEntry),
    Route(Route),
}

/// Keeps the steps of one walk.
#[derive(Debug, Default)]
struct Trace {
    steps: RefCell<Vec<Step>>,
    /// The first question that the kernel refused to answer.
    failure: RefCell<Option<Error>>,
}

impl Trace {
    fn add(&self, step: Step) {
        self.steps.borrow_mut().push(step);
    }

    fn fail(&self, error: Error) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// The steps since this was asked last, unless the kernel refused to answer a question on the way: then they
    /// mean nothing.
    fn take(&self) -> Result<Vec<Step>, Error> {
        match self.failure.take() {
            Some(error) => Err(error),
            None => Ok(self.steps.take()),
        }
    }
}

/// What was read of one table; each key once.
type Seen<K, V> = FrozenMap<K, Box<Option<V>>>;

/// What was read of tables that the walk only reads.
#[derive(Default)]
struct Reads {
    vips: Seen<VipKey, Vip>,
    listeners: Seen<ListenerKey, Listener>,
    listener_ranges: Seen<ListenerRangeKey, Listener>,
    groups: Seen<GroupId, BackendGroup>,
    backends: Seen<BackendId, Backend>,
    interfaces: Seen<InterfaceKey, Interface>,
    tunnel_endpoints: Seen<TunnelEndpointKey, TunnelEndpoint>,
    tunnel_peers: Seen<PeerId, TunnelPeer>,
    flow_index: Seen<FlowKey, FlowReference>,
    fragments: Seen<FragmentKey, FragmentFlow>,
}

/// What the walk would have written.
#[derive(Default)]
struct Changes {
    /// `None`: removed.
    flow_index: HashMap<FlowKey, Option<FlowReference>>,
    /// Room in the flow index; `None`: nobody has asked yet.
    keys_left: Option<u32>,
    flows: HashMap<FlowId, FlowEntry>,
    taken: HashSet<FlowId>,
    listeners_live: HashMap<ListenerId, LiveCount>,
    backends_live: HashMap<BackendId, LiveCount>,
    group_turns: HashMap<GroupId, LiveCount>,
    persistence: HashMap<PersistenceKey, Persistence>,
    syn_budgets: HashMap<ListenerId, SynBudget>,
    handshakes: HashMap<FlowId, Handshake>,
    source_rates: HashMap<SourceRateKey, SourceRate>,
    icmp_budget: IcmpBudget,
}

/// A number of live flows, or of turns.
struct LiveCount(u64);

impl Gauge for LiveCount {
    fn get(&self) -> u64 {
        self.0
    }

    fn add(&mut self, difference: i64) -> u64 {
        let before = self.0;
        self.0 = before.wrapping_add_signed(difference);
        before
    }
}

/// `Tables` over the live maps; see the module's text.
struct LiveView<'a> {
    maps: &'a LiveMaps,
    ebpf: &'a Ebpf,
    trace: &'a Trace,
    reads: Reads,
    changes: Changes,
}

impl LiveView<'_> {
    fn found<V>(&self, table: &str, outcome: Result<AsPod<V>, MapError>) -> Option<V> {
        match outcome {
            Ok(AsPod(value)) => Some(value),
            Err(MapError::KeyNotFound | MapError::OutOfBounds { .. }) => None,
            Err(error) => {
                self.trace
                    .fail(kernel_error(&format!("read the map \"{table}\""), &error));
                None
            }
        }
    }

    /// The value of a key, asked for once.
    fn read<'v, K: Eq + hash::Hash, V>(
        &'v self,
        table: &str,
        seen: &'v Seen<K, V>,
        key: K,
        ask: impl FnOnce() -> Result<AsPod<V>, MapError>,
    ) -> Option<&'v V> {
        let value = match seen.get(&key) {
            Some(value) => value,
            None => seen.insert(key, Box::new(self.found(table, ask()))),
        };
        value.as_ref()
    }

    /// How many keys the flow index has room for, counted by the flows whose keys are in it.
    fn keys_left(&mut self) -> &mut u32 {
        let flows = &self.maps.flows;
        self.changes.keys_left.get_or_insert_with(|| {
            let live = (0..flows.capacity())
                .map(FlowId)
                .filter(|id| flows.state(*id) == FlowState::LIVE);
            let keys = live.map(|id| 1 + u32::from(flows.read(id).binding.is_dnat()));
            self.maps.flow_keys.saturating_sub(keys.sum())
        })
    }

    /// A free flow behind the head of the queue. Which one comes next there cannot be seen.
    fn any_free_flow(&self) -> Option<FlowId> {
        let (flows, taken) = (&self.maps.flows, &self.changes.taken);
        (0..flows.capacity())
            .map(FlowId)
            .find(|id| flows.state(*id) == FlowState::FREE && !taken.contains(id))
    }
}

/// A trie's key as aya wants it: the number of bits apart from the words.
fn trie_key<K: Pod>(key: &K) -> Key<[u32; 5]> {
    let [bits, words @ ..]: [u32; 6] = bytemuck::cast(*key);
    Key::new(bits, words)
}

impl Tables for LiveView<'_> {
    type Gauge = LiveCount;

    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        self.read(map_name::VIPS, &self.reads.vips, *key, || {
            self.maps.vips.get(&AsPod(*key), 0)
        })
    }

    fn listener(&self, key: &ListenerKey) -> Option<&Listener> {
        let found = self.read(map_name::LISTENERS, &self.reads.listeners, *key, || {
            self.maps.listeners.get(&AsPod(*key), 0)
        });
        found.inspect(|listener| self.trace.add(Step::Listener(**listener)))
    }

    fn listener_range(&self, key: &ListenerRangeKey) -> Option<&Listener> {
        let found = self.read(
            map_name::LISTENER_RANGES,
            &self.reads.listener_ranges,
            *key,
            || self.maps.listener_ranges.get(&trie_key(key), 0),
        );
        found.inspect(|listener| self.trace.add(Step::Listener(**listener)))
    }

    fn is_source_admitted(&self, key: &SourceKey) -> bool {
        self.found(map_name::SOURCES, self.maps.sources.get(&trie_key(key), 0))
            .is_some()
    }

    fn group(&self, id: GroupId) -> Option<&BackendGroup> {
        let found = self.read(map_name::GROUPS, &self.reads.groups, id, || {
            self.maps.groups.get(&id.0, 0)
        });
        found.inspect(|group| self.trace.add(Step::Group(id, **group)))
    }

    fn slot(&self, index: u32) -> Option<BackendId> {
        let found = self.found(map_name::SLOTS, self.maps.slots.get(&index, 0));
        found.inspect(|id| self.trace.add(Step::Slot(index, *id)))
    }

    fn backend(&self, id: BackendId) -> Option<&Backend> {
        let found = self.read(map_name::BACKENDS, &self.reads.backends, id, || {
            self.maps.backends.get(&id.0, 0)
        });
        found.inspect(|backend| self.trace.add(Step::Backend(id, **backend)))
    }

    fn group_turns(&mut self, id: GroupId) -> Option<&mut LiveCount> {
        let turns = self.found(map_name::GROUP_TURNS, self.maps.group_turns.get(&id.0, 0))?;
        Some(self.changes.group_turns.entry(id).or_insert(LiveCount(turns)))
    }

    fn persistence(&mut self, key: &PersistenceKey) -> Option<&mut Persistence> {
        if !self.changes.persistence.contains_key(key) {
            let found = self.maps.persistence.get(&AsPod(*key), 0);
            let kept = self.found(map_name::PERSISTENCE, found)?;
            self.trace.add(Step::Persistence(kept.backend));
            self.changes.persistence.insert(*key, kept);
        }
        self.changes.persistence.get_mut(key)
    }

    fn keep_persistence(&mut self, key: &PersistenceKey, value: Persistence) {
        self.changes.persistence.insert(*key, value);
    }

    fn interface(&self, key: &InterfaceKey) -> Option<&Interface> {
        self.read(map_name::INTERFACES, &self.reads.interfaces, *key, || {
            self.maps.interfaces.get(&AsPod(*key), 0)
        })
    }

    fn tunnel_port(&self, port: u16) -> Option<TunnelPort> {
        self.found(
            map_name::TUNNEL_PORTS,
            self.maps.tunnel_ports.get(&u32::from(port), 0),
        )
    }

    fn tunnel_endpoint(&self, key: &TunnelEndpointKey) -> Option<&TunnelEndpoint> {
        self.read(
            map_name::TUNNEL_ENDPOINTS,
            &self.reads.tunnel_endpoints,
            *key,
            || self.maps.tunnel_endpoints.get(&AsPod(*key), 0),
        )
    }

    fn tunnel_hop(&self, key: &TunnelHopKey) -> Option<PeerId> {
        let found = self.found(map_name::TUNNEL_HOPS, self.maps.tunnel_hops.get(&AsPod(*key), 0));
        found.map(|hop| hop.peer)
    }

    fn tunnel_peer(&self, id: PeerId) -> Option<&TunnelPeer> {
        self.read(map_name::TUNNEL_PEERS, &self.reads.tunnel_peers, id, || {
            self.maps.tunnel_peers.get(&u32::from(id.0), 0)
        })
    }

    fn flow_reference(&self, key: &FlowKey) -> Option<&FlowReference> {
        match self.changes.flow_index.get(key) {
            Some(changed) => changed.as_ref(),
            None => self.read(map_name::FLOW_INDEX, &self.reads.flow_index, *key, || {
                self.maps.flow_index.get(key)
            }),
        }
    }

    fn flow(&mut self, id: FlowId) -> Option<&mut FlowEntry> {
        let flows = &self.maps.flows;
        if id.0 >= flows.capacity() {
            return None;
        }
        let entry = self.changes.flows.entry(id).or_insert_with(|| flows.read(id));
        self.trace.add(Step::Flow(id, *entry));
        Some(entry)
    }

    fn insert_flow_reference(&mut self, key: &FlowKey, reference: FlowReference) -> bool {
        if *self.keys_left() == 0 || self.flow_reference(key).is_some() {
            return false;
        }
        *self.keys_left() -= 1;
        self.changes.flow_index.insert(*key, Some(reference));
        true
    }

    fn remove_flow_reference(&mut self, key: &FlowKey) {
        if self.flow_reference(key).is_some() {
            *self.keys_left() += 1;
        }
        self.changes.flow_index.insert(*key, None);
    }

    fn take_flow(&mut self) -> Option<FlowId> {
        let head = match ask(self.ebpf, &Inquiry::zeroed()) {
            Ok(inquiry) => inquiry.free_flow()?,
            Err(error) => {
                self.trace.fail(error);
                return None;
            }
        };
        let is_certain = !self.changes.taken.contains(&head);
        let id = if is_certain { head } else { self.any_free_flow()? };
        self.changes.taken.insert(id);
        self.trace.add(Step::Taken { id, is_certain });
        Some(id)
    }

    // It would go to the queue's end, out of sight.
    fn return_flow(&mut self, _id: FlowId) {}

    fn listener_live(&mut self, id: ListenerId) -> Option<&mut LiveCount> {
        let live = self.found(map_name::LISTENER_LIVE, self.maps.listeners_live.get(&id.0, 0))?;
        Some(self.changes.listeners_live.entry(id).or_insert(LiveCount(live)))
    }

    fn backend_live(&mut self, id: BackendId) -> Option<&mut LiveCount> {
        let live = self.found(map_name::BACKEND_LIVE, self.maps.backends_live.get(&id.0, 0))?;
        Some(self.changes.backends_live.entry(id).or_insert(LiveCount(live)))
    }

    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentFlow> {
        self.read(map_name::FRAGMENTS, &self.reads.fragments, *key, || {
            self.maps.fragments.get(&AsPod(*key), 0)
        })
    }

    // Whoever asks about a packet asks about one.
    fn keep_fragment(&mut self, _key: &FragmentKey, _flow: FragmentFlow) {}

    // As of `syn_budget`; the kernel is asked for the route.
    fn backend_hop(&mut self, _id: BackendId) -> Option<&mut BackendHop> {
        None
    }

    fn icmp_budget(&mut self) -> Option<&mut IcmpBudget> {
        Some(&mut self.changes.icmp_budget)
    }

    // The kernel's is another for each CPU, and nobody knows on which one a packet would come: it is taken as unused in
    // this second, so that what passes the limit of a listener is what passes it with any packets.
    fn syn_budget(&mut self, id: ListenerId) -> Option<&mut SynBudget> {
        Some(self.changes.syn_budgets.entry(id).or_default())
    }

    fn handshake(&mut self, id: FlowId) -> Option<&mut Handshake> {
        if !self.changes.handshakes.contains_key(&id) {
            let found = self.found(map_name::HANDSHAKES, self.maps.handshakes.get(&id.0, 0))?;
            self.changes.handshakes.insert(id, found);
        }
        self.changes.handshakes.get_mut(&id)
    }

    fn source_rate(&mut self, key: &SourceRateKey) -> Option<&mut SourceRate> {
        if !self.changes.source_rates.contains_key(key) {
            let found = self.maps.source_rates.get(&AsPod(*key), 0);
            let found = self.found(map_name::SOURCE_RATES, found)?;
            self.changes.source_rates.insert(*key, found);
        }
        self.changes.source_rates.get_mut(key)
    }

    fn keep_source_rate(&mut self, key: &SourceRateKey, value: SourceRate) {
        self.changes.source_rates.insert(*key, value);
    }

    fn now_secs(&mut self) -> u32 {
        monotonic_secs()
    }

    // Nothing is counted.

    fn count_listener(&mut self, _id: ListenerId, _event: TrafficEvent) {}

    fn count_backend(&mut self, _id: BackendId, _event: TrafficEvent) {}

    fn count_reason(&mut self, _reason: Reason, _frame_bytes: usize) {}
}

/// `Env` that asks the kernel, for a packet that would come in by an interface.
struct LiveEnv<'a> {
    ebpf: &'a Ebpf,
    trace: &'a Trace,
    hook: Hook,
    ingress_ifindex: u32,
}

impl Env for LiveEnv<'_> {
    fn hook(&self) -> Hook {
        self.hook
    }

    fn ingress_ifindex(&self) -> u32 {
        self.ingress_ifindex
    }

    fn hold<P: Packet>(
        &mut self,
        _packet: &mut P,
        walk: &forwarder_common::datapath::Walk,
        _why: HeldKind,
    ) -> bool {
        walk.frame.total_len as usize <= HELD_BYTES
    }

    fn route(&mut self, key: &FlowKey) -> Route {
        let route = match ask(self.ebpf, &Inquiry::new(key, self.ingress_ifindex)) {
            Ok(inquiry) => inquiry.route().unwrap_or(Route::None),
            Err(error) => {
                self.trace.fail(error);
                Route::None
            }
        };
        self.trace.add(Step::Route(route));
        route
    }
}

/// XDP_PASS of linux/bpf.h: the question was understood.
const ANSWERED: u32 = 2;

/// The question with its answer.
fn ask(ebpf: &Ebpf, question: &Inquiry) -> Result<Inquiry, Error> {
    let program = ebpf
        .program(map_name::PROGRAM_ASK)
        .and_then(|program| <&Xdp>::try_from(program).ok());
    let program = program.ok_or_else(|| {
        Error::failed("the BPF object has no program that answers questions").hint("rebuild the binary")
    })?;
    let mut answer = Inquiry::zeroed();
    let options = TestRunOptions {
        data_in: Some(bytemuck::bytes_of(question)),
        data_out: Some(bytemuck::bytes_of_mut(&mut answer)),
        ..TestRunOptions::new()
    };
    match program.test_run(options) {
        Ok(result) if result.return_value == ANSWERED => Ok(answer),
        Ok(result) => Err(Error::failed(format!(
            "the kernel's answer is {}",
            result.return_value
        ))),
        Err(error) => Err(kernel_error("answer a question about a route", &error)),
    }
}
