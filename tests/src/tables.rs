//! The data path's surroundings in memory: `Tables` over vectors and hash maps, `Env` over a small network that
//! `program` builds in the kernel as well.
//!
//! Table sizes are those of the kernel's maps in ring 2 ([`SIZES`]), so that both fill up at the same entry.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt::Debug,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytemuck::Zeroable;
use forwarder_common::{
    abi::{
        ABI_VERSION,
        backend::{Backend, BackendGroup, BackendHop, BackendId, BackendState, GroupId, NatMode},
        counter::{IcmpBudget, ReasonCounters, TrafficCounters},
        flow::{Direction, FlowEntry, FlowId, FlowKey, FlowReference, FlowState},
        fragment::{FragmentFlow, FragmentKey, HELD_BYTES, HeldKind},
        handshake::{Handshake, SynBudget},
        interface::{Interface, InterfaceKey, flag},
        listener::{
            Listener, ListenerId, ListenerKey, ListenerRangeKey, Source, SourceKey, Vip, VipKey,
            listener_flag,
        },
        persistence::{Persistence, PersistenceKey},
        rate::{SourceRate, SourceRateKey},
        reason::Reason,
        settings::Settings,
        snat::SnatRange,
        tunnel::{PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHopKey, TunnelPeer, TunnelPort},
    },
    datapath::{
        Env, Gauge, Hook, Outcome, Packet, Route, Tables, TrafficEvent, Walk, express,
        hint::{self, Fingerprint, Hints},
        overlay,
    },
    wire::{Be16, IpAddress, LinkPair, MacAddress},
};
use forwarder_user::{
    datapath::{
        attach::AttachmentKind,
        flows::FlowStore,
        object::Sizes,
        packet::{self, MemoryPacket, Native},
        times::monotonic_secs,
    },
    error::Error,
};

use crate::packet::Mac;

/// How many entries the tables have.
pub const SIZES: Sizes = Sizes {
    flows: 16,
    flow_keys: 24,
    flow_keys_v6: 24,
    slots: 128,
    groups: 16,
    backends: 16,
    listeners: 16,
    listener_ranges: 32,
    sources: 16,
    vips: 8,
    interfaces: 8,
    tunnel_peers: 8,
    persistence: 64,
    source_rates: 64,
};

/// All tables with their counters.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryTables {
    pub settings: Settings,
    pub vips: HashMap<VipKey, Vip>,
    pub listeners: HashMap<ListenerKey, Listener>,
    pub listener_ranges: HashMap<ListenerRangeKey, Listener>,
    pub sources: HashMap<SourceKey, Source>,
    pub groups: Vec<BackendGroup>,
    pub group_turns: Vec<Live>,
    pub persistence: HashMap<PersistenceKey, Persistence>,
    pub slots: Vec<BackendId>,
    pub backends: Vec<Backend>,
    pub interfaces: HashMap<InterfaceKey, Interface>,
    pub tunnel_ports: HashMap<u16, TunnelPort>,
    pub tunnel_endpoints: HashMap<TunnelEndpointKey, TunnelEndpoint>,
    pub tunnel_hops: HashMap<TunnelHopKey, PeerId>,
    pub tunnel_peers: HashMap<PeerId, TunnelPeer>,
    pub flow_index: HashMap<FlowKey, FlowReference>,
    /// How many keys the flow index holds.
    pub flow_keys: usize,
    pub flows: Vec<FlowEntry>,
    /// A power of two, or none.
    pub hints: Vec<Hints>,
    pub free_flows: VecDeque<FlowId>,
    pub listeners_live: Vec<Live>,
    pub backends_live: Vec<Live>,
    pub listener_counters: Vec<TrafficCounters>,
    pub backend_counters: Vec<TrafficCounters>,
    pub reason_counters: Vec<ReasonCounters>,
    pub fragments: HashMap<FragmentKey, FragmentFlow>,
    pub backend_hops: Vec<BackendHop>,
    pub icmp_budget: IcmpBudget,
    pub syn_budgets: Vec<SynBudget>,
    pub handshakes: Vec<Handshake>,
    pub source_rates: HashMap<SourceRateKey, SourceRate>,
    /// The clock stands still at this second of CLOCK_MONOTONIC: what is in a cookie depends on it.
    pub clock_secs: Option<u32>,
}

impl Default for MemoryTables {
    fn default() -> Self {
        Self {
            settings: Settings {
                abi_version: ABI_VERSION,
                route_generation: 7,
                hash_seed: 0x5eed,
                ..Settings::default()
            },
            vips: HashMap::new(),
            listeners: HashMap::new(),
            listener_ranges: HashMap::new(),
            sources: HashMap::new(),
            groups: vec![BackendGroup::zeroed(); SIZES.groups as usize],
            group_turns: vec![Live(0); SIZES.groups as usize],
            persistence: HashMap::new(),
            slots: vec![BackendId(0); SIZES.slots as usize],
            backends: vec![Backend::zeroed(); SIZES.backends as usize],
            interfaces: HashMap::new(),
            tunnel_ports: HashMap::new(),
            tunnel_endpoints: HashMap::new(),
            tunnel_hops: HashMap::new(),
            tunnel_peers: HashMap::new(),
            flow_index: HashMap::new(),
            flow_keys: SIZES.flow_keys as usize,
            flows: vec![FlowEntry::zeroed(); SIZES.flows as usize],
            hints: vec![Hints::default(); hint::buckets(SIZES.flows) as usize],
            free_flows: (0..SIZES.flows).map(FlowId).collect(),
            listeners_live: vec![Live(0); SIZES.listeners as usize],
            backends_live: vec![Live(0); SIZES.backends as usize],
            listener_counters: vec![TrafficCounters::default(); SIZES.listeners as usize],
            backend_counters: vec![TrafficCounters::default(); SIZES.backends as usize],
            reason_counters: vec![ReasonCounters::default(); Reason::COUNT],
            fragments: HashMap::new(),
            backend_hops: vec![BackendHop::default(); SIZES.backends as usize],
            icmp_budget: IcmpBudget::default(),
            syn_budgets: vec![SynBudget::default(); SIZES.listeners as usize],
            handshakes: vec![Handshake::default(); SIZES.flows as usize],
            source_rates: HashMap::new(),
            clock_secs: None,
        }
    }
}

impl MemoryTables {
    /// Tables with the interfaces of [`LINKS`] and this many consecutive SNAT addresses.
    pub fn new(first_snat: Ipv4Addr, snat_count: u32) -> Self {
        let mut tables = Self::default();
        tables.settings.pool.v4.runs[0] = SnatRange {
            first: first_snat.into(),
            count: snat_count,
        };
        for link in &LINKS {
            let flags = if link.can_send {
                flag::SEND_NATIVE | flag::SEND_GENERIC
            } else {
                0
            };
            let mac = MacAddress::new(link.mac);
            let key = InterfaceKey {
                ifindex: link.ifindex,
            };
            tables.interfaces.insert(
                key,
                Interface {
                    mac,
                    flags,
                    mtu_bytes: 0,
                    carrier_ifindex: 0,
                    vlans: [0; 2],
                },
            );
        }
        tables
    }

    /// A backend under the first id that is free.
    pub fn add_backend(&mut self, address: Ipv4Addr, port: u16, state: BackendState) -> BackendId {
        let free = self
            .backends
            .iter()
            .position(|backend| backend.state == BackendState::ABSENT)
            .expect("room for a backend");
        self.backends[free] = Backend {
            address: address.into(),
            port: Be16::new(port),
            state,
            reserved: 0,
            max_flows: 0,
            weight: 1,
        };
        BackendId(free as u32)
    }

    /// A listener on a VIP for a new group whose slots are these.
    pub fn add_listener(
        &mut self,
        vip: Ipv4Addr,
        port: u16,
        protocol: u8,
        nat: NatMode,
        slots: &[BackendId],
    ) -> ListenerId {
        let listener = self.add_group(vip, nat, slots);
        self.listeners
            .insert(ListenerKey::new(vip.into(), Be16::new(port), protocol), listener);
        listener.id
    }

    /// A listener on the ports of a VIP that share these bits with `port`, for a new group whose slots are these.
    pub fn add_range_listener(
        &mut self,
        vip: Ipv4Addr,
        (port, port_bits): (u16, u32),
        protocol: u8,
        nat: NatMode,
        slots: &[BackendId],
    ) -> ListenerId {
        let listener = self.add_group(vip, nat, slots);
        let key = ListenerRangeKey::new(vip.into(), protocol, Be16::new(port), port_bits);
        self.listener_ranges.insert(key, listener);
        let vip = self.vips.get_mut(&VipKey { address: vip.into() });
        vip.expect("the VIP just entered").range_listeners += 1;
        listener.id
    }

    /// Only clients of this prefix may open flows of a listener, and those of other prefixes added so.
    pub fn admit_source(&mut self, listener: ListenerId, address: Ipv4Addr, bits: u32) {
        let key = SourceKey::new(listener, address.into(), IpAddress::V4_PREFIX_BITS + bits);
        self.sources.insert(key, Source { admitted: 1 });
        for entry in self.listener_mut(listener) {
            entry.flags |= listener_flag::SOURCES;
        }
    }

    /// The entries of a listener.
    pub fn listener_mut(&mut self, id: ListenerId) -> impl Iterator<Item = &mut Listener> {
        let entries = self
            .listeners
            .values_mut()
            .chain(self.listener_ranges.values_mut());
        entries.filter(move |listener| listener.id == id)
    }

    fn add_group(&mut self, vip: Ipv4Addr, nat: NatMode, slots: &[BackendId]) -> Listener {
        let id = (self.listeners.len() + self.listener_ranges.len()) as u32;
        let vip_entry = self.vips.entry(VipKey { address: vip.into() }).or_insert(Vip {
            listeners: 0,
            range_listeners: 0,
        });
        vip_entry.listeners += 1;
        let first_slot = self
            .groups
            .iter()
            .map(|group| group.first_slot + group.slot_count + group.overflow_slot_count)
            .max()
            .unwrap_or(0);
        self.slots[first_slot as usize..][..slots.len()].copy_from_slice(slots);
        self.groups[id as usize] = BackendGroup {
            first_slot,
            slot_count: slots.len() as u32,
            nat,
            ..BackendGroup::zeroed()
        };
        self.note_addresses();
        Listener {
            id: ListenerId(id),
            group: GroupId(id),
            max_flows: 0,
            flags: 0,
            syns_per_cpu: 0,
            source_flows_per_second: 0,
            source_burst: 0,
            source_bits_v4: 0,
            source_bits_v6: 0,
        }
    }

    /// How many flows say that they count against limits, by listener and by backend.
    pub fn counted_flows(&self) -> (Vec<Live>, Vec<Live>) {
        let mut listeners = vec![Live(0); self.listeners_live.len()];
        let mut backends = vec![Live(0); self.backends_live.len()];
        for flow in self.flows.iter().filter(|flow| flow.counted != 0) {
            listeners[flow.listener.0 as usize].0 += 1;
            backends[flow.backend.0 as usize].0 += 1;
        }
        (listeners, backends)
    }

    /// What no order of packets may lead to: a binding that two live flows share towards the same backend, a flow
    /// with one direction only, a free one in use, a count that is none.
    pub fn unsound(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut references: HashMap<FlowReference, usize> = HashMap::new();
        for reference in self.flow_index.values() {
            *references.entry(*reference).or_default() += 1;
        }
        let mut free = HashSet::new();
        for id in &self.free_flows {
            if !free.insert(*id) {
                found.push(format!("flow {} is free twice", id.0));
            }
        }
        let mut bindings = HashMap::new();
        for (id, flow) in (0..).map(FlowId).zip(&self.flows) {
            let is_live = flow.state == FlowState::LIVE;
            for (direction, wanted) in [
                (Direction::REQUEST, is_live),
                (Direction::REPLY, is_live && flow.binding.is_dnat()),
            ] {
                let count = references.remove(&FlowReference { id, direction }).unwrap_or(0);
                if count != usize::from(wanted) {
                    found.push(format!("flow {} has {count} keys {direction:?}", id.0));
                }
            }
            if flow.state != FlowState::FREE && free.contains(&id) {
                found.push(format!("flow {} is free and in use", id.0));
            }
            if is_live && let Some(other) = bindings.insert(flow.binding.reply_key(), id) {
                found.push(format!("flows {} and {} share a binding", other.0, id.0));
            }
        }
        if !references.is_empty() {
            found.push(format!("keys of no flow: {references:?}"));
        }
        let (listeners, backends) = self.counted_flows();
        if (&self.listeners_live, &self.backends_live) != (&listeners, &backends) {
            found.push("the numbers of live flows are not those of the flow table".to_owned());
        }
        found
    }

    /// Zeroes all counters.
    pub fn clear_counters(&mut self) {
        self.listener_counters.fill(TrafficCounters::default());
        self.backend_counters.fill(TrafficCounters::default());
        self.reason_counters.fill(ReasonCounters::default());
    }

    /// The reasons counted so far, with packets and bytes.
    pub fn counted_reasons(&self) -> Vec<(Reason, ReasonCounters)> {
        (0..)
            .map(Reason)
            .zip(self.reason_counters.iter().copied())
            .filter(|(_, counters)| *counters != ReasonCounters::default())
            .collect()
    }

    /// What differs in the tables that the data path writes, one line each.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        fn compare<T: PartialEq + Debug>(found: &mut Vec<String>, what: &str, left: &[T], right: &[T]) {
            for (index, (left, right)) in left.iter().zip(right).enumerate() {
                if left != right {
                    found.push(format!("{what} {index}:\n  {left:?}\n  {right:?}"));
                }
            }
        }
        let mut found = Vec::new();
        if self.flow_index != other.flow_index {
            found.push(format!(
                "flow index:\n  {:?}\n  {:?}",
                self.flow_index, other.flow_index
            ));
        }
        if self.free_flows != other.free_flows {
            found.push(format!(
                "free flows:\n  {:?}\n  {:?}",
                self.free_flows, other.free_flows
            ));
        }
        // Two runs may be a second apart.
        let timeless = |tables: &Self| -> HashMap<_, _> {
            let entries = tables.persistence.iter();
            entries
                .map(|(key, kept)| {
                    (
                        *key,
                        Persistence {
                            used_secs: 0,
                            ..*kept
                        },
                    )
                })
                .collect()
        };
        if timeless(self) != timeless(other) {
            found.push(format!(
                "persistence:\n  {:?}\n  {:?}",
                self.persistence, other.persistence
            ));
        }
        let timeless = |tables: &Self| -> HashMap<_, _> {
            let entries = tables.fragments.iter();
            entries
                .map(|(key, kept)| {
                    (
                        *key,
                        FragmentFlow {
                            seen_secs: 0,
                            ..*kept
                        },
                    )
                })
                .collect()
        };
        if timeless(self) != timeless(other) {
            found.push(format!(
                "fragments:\n  {:?}\n  {:?}",
                self.fragments, other.fragments
            ));
        }
        compare(
            &mut found,
            "turns of group",
            &self.group_turns,
            &other.group_turns,
        );
        compare(&mut found, "flow", &self.flows, &other.flows);
        compare(&mut found, "handshake", &self.handshakes, &other.handshakes);
        compare(
            &mut found,
            "live flows of listener",
            &self.listeners_live,
            &other.listeners_live,
        );
        compare(
            &mut found,
            "live flows of backend",
            &self.backends_live,
            &other.backends_live,
        );
        compare(
            &mut found,
            "listener counters",
            &self.listener_counters,
            &other.listener_counters,
        );
        compare(
            &mut found,
            "backend counters",
            &self.backend_counters,
            &other.backend_counters,
        );
        compare(
            &mut found,
            "reason counters",
            &self.reason_counters,
            &other.reason_counters,
        );
        found
    }

    /// Enters the VIPs and the backends in DNAT mode into the address filters, as the agent does.
    pub fn note_addresses(&mut self) {
        let filters = &mut self.settings.filters;
        for key in self.vips.keys() {
            filters.vips.add(key.address);
        }
        for group in self.groups.iter().filter(|group| group.nat == NatMode::DNAT) {
            let count = group.slot_count + group.overflow_slot_count;
            for id in &self.slots[group.first_slot as usize..][..count as usize] {
                filters.dnat_backends.add(self.backends[id.0 as usize].address);
            }
        }
    }

    /// Does a frame in native XDP take the short way (`datapath::express`)? Changes nothing.
    pub fn takes_the_short_way(&self, ifindex: u32, frame: &[u8]) -> bool {
        let mut packet = MemoryPacket::<Native>::new(frame.to_vec());
        let env = MemoryEnv {
            hook: Hook::Xdp,
            ingress_ifindex: ifindex,
        };
        let (settings, mut tables) = (&self.settings, self.clone());
        if express::forward(&mut packet, &mut tables, &env, settings).is_some() {
            return true;
        }
        let mut walk = Walk::zeroed();
        overlay::recognise(&mut packet, self, &mut walk);
        walk.inside.is_tunnel()
            && express::through(&mut packet, &mut tables, &env, settings, &walk.inside).is_some()
    }

    /// Runs the library on a frame as one of the programs would: what becomes of it, and its bytes then.
    pub fn forward(&mut self, program: Program, ifindex: u32, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let settings = self.settings;
        let mut env = MemoryEnv {
            hook: program.kind().hook(),
            ingress_ifindex: ifindex,
        };
        let mut before = self.clone();
        let done = packet::forward(program.kind(), frame, self, &mut env, &settings);
        let long = packet::forward_the_long_way(program.kind(), frame, &mut before, &mut env, &settings);
        assert_eq!(done, long, "the short way and the long way, of {frame:02x?}");
        let differences = before.differences(self);
        assert!(
            differences.is_empty(),
            "the short way and the long way: {differences:?}"
        );
        done
    }
}

/// A number of live flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Live(pub u64);

impl Gauge for Live {
    fn get(&self) -> u64 {
        self.0
    }

    fn add(&mut self, difference: i64) -> u64 {
        let before = self.0;
        self.0 = before.wrapping_add_signed(difference);
        before
    }
}

/// Number of bits and the bits of a trie's key.
fn split_prefix<K: bytemuck::Pod>(key: &K) -> (u32, &[u8]) {
    let (len, bits) = bytemuck::bytes_of(key).split_at(4);
    (u32::from_ne_bytes(len.try_into().expect("four bytes")), bits)
}

/// The value with the longest prefix that the key has. The bits of a prefix stand behind its length.
fn longest<'t, K: bytemuck::Pod, V>(entries: &'t HashMap<K, V>, key: &K) -> Option<&'t V> {
    let bit = |bytes: &[u8], place: u32| bytes[place as usize / 8] >> (7 - place % 8) & 1;
    let (_, wanted) = split_prefix(key);
    let matching = entries.iter().filter(|(prefix, _)| {
        let (len, value) = split_prefix(*prefix);
        (0..len).all(|place| bit(value, place) == bit(wanted, place))
    });
    matching
        .max_by_key(|(prefix, _)| split_prefix(*prefix).0)
        .map(|(_, value)| value)
}

impl Tables for MemoryTables {
    type Gauge = Live;

    fn listener_range(&self, key: &ListenerRangeKey) -> Option<&Listener> {
        longest(&self.listener_ranges, key)
    }

    fn is_source_admitted(&self, key: &SourceKey) -> bool {
        longest(&self.sources, key).is_some()
    }

    fn listener_live(&mut self, id: ListenerId) -> Option<&mut Live> {
        self.listeners_live.get_mut(id.0 as usize)
    }

    fn backend_live(&mut self, id: BackendId) -> Option<&mut Live> {
        self.backends_live.get_mut(id.0 as usize)
    }

    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        self.vips.get(key)
    }

    fn listener(&self, key: &ListenerKey) -> Option<&Listener> {
        self.listeners.get(key)
    }

    fn group(&self, id: GroupId) -> Option<&BackendGroup> {
        self.groups.get(id.0 as usize)
    }

    fn group_turns(&mut self, id: GroupId) -> Option<&mut Live> {
        self.group_turns.get_mut(id.0 as usize)
    }

    fn persistence(&mut self, key: &PersistenceKey) -> Option<&mut Persistence> {
        self.persistence.get_mut(key)
    }

    fn keep_persistence(&mut self, key: &PersistenceKey, value: Persistence) {
        self.persistence.insert(*key, value);
    }

    fn slot(&self, index: u32) -> Option<BackendId> {
        self.slots.get(index as usize).copied()
    }

    fn backend(&self, id: BackendId) -> Option<&Backend> {
        self.backends.get(id.0 as usize)
    }

    fn interface(&self, key: &InterfaceKey) -> Option<&Interface> {
        self.interfaces.get(key)
    }

    fn tunnel_port(&self, port: u16) -> Option<TunnelPort> {
        // The kernel's is an array: each port has a meaning.
        Some(self.tunnel_ports.get(&port).copied().unwrap_or_default())
    }

    fn tunnel_endpoint(&self, key: &TunnelEndpointKey) -> Option<&TunnelEndpoint> {
        self.tunnel_endpoints.get(key)
    }

    fn tunnel_hop(&self, key: &TunnelHopKey) -> Option<PeerId> {
        self.tunnel_hops.get(key).copied()
    }

    fn tunnel_peer(&self, id: PeerId) -> Option<&TunnelPeer> {
        self.tunnel_peers.get(&id)
    }

    fn flow_reference(&self, key: &FlowKey) -> Option<&FlowReference> {
        self.flow_index.get(key)
    }

    fn flow(&mut self, id: FlowId) -> Option<&mut FlowEntry> {
        self.flows.get_mut(id.0 as usize)
    }

    fn hints(&mut self, fingerprint: Fingerprint) -> Option<&mut Hints> {
        let last = self.hints.len().wrapping_sub(1);
        self.hints.get_mut(fingerprint.bucket() as usize & last)
    }

    fn insert_flow_reference(&mut self, key: &FlowKey, reference: FlowReference) -> bool {
        let keys = self
            .flow_index
            .keys()
            .filter(|other| other.is_v4() == key.is_v4());
        let has_room = keys.count() < self.flow_keys;
        if !has_room || self.flow_index.contains_key(key) {
            return false;
        }
        self.flow_index.insert(*key, reference);
        true
    }

    fn remove_flow_reference(&mut self, key: &FlowKey) {
        self.flow_index.remove(key);
    }

    fn take_flow(&mut self) -> Option<FlowId> {
        self.free_flows.pop_front()
    }

    fn return_flow(&mut self, id: FlowId) {
        self.free_flows.push_back(id);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentFlow> {
        self.fragments.get(key)
    }

    fn keep_fragment(&mut self, key: &FragmentKey, flow: FragmentFlow) {
        self.fragments.insert(*key, flow);
    }

    fn backend_hop(&mut self, id: BackendId) -> Option<&mut BackendHop> {
        self.backend_hops.get_mut(id.0 as usize)
    }

    fn icmp_budget(&mut self) -> Option<&mut IcmpBudget> {
        Some(&mut self.icmp_budget)
    }

    fn syn_budget(&mut self, id: ListenerId) -> Option<&mut SynBudget> {
        self.syn_budgets.get_mut(id.0 as usize)
    }

    fn handshake(&mut self, id: FlowId) -> Option<&mut Handshake> {
        self.handshakes.get_mut(id.0 as usize)
    }

    fn source_rate(&mut self, key: &SourceRateKey) -> Option<&mut SourceRate> {
        self.source_rates.get_mut(key)
    }

    fn keep_source_rate(&mut self, key: &SourceRateKey, value: SourceRate) {
        self.source_rates.insert(*key, value);
    }

    fn now_secs(&mut self) -> u32 {
        self.clock_secs.unwrap_or_else(monotonic_secs)
    }

    fn count_listener(&mut self, id: ListenerId, event: TrafficEvent) {
        if let Some(counters) = self.listener_counters.get_mut(id.0 as usize) {
            counters.add(event);
        }
    }

    fn count_backend(&mut self, id: BackendId, event: TrafficEvent) {
        if let Some(counters) = self.backend_counters.get_mut(id.0 as usize) {
            counters.add(event);
        }
    }

    fn count_reason(&mut self, reason: Reason, frame_bytes: usize) {
        self.reason_counters[reason.0 as usize].add(frame_bytes);
    }
}

impl FlowStore for MemoryTables {
    fn capacity(&self) -> u32 {
        self.flows.len() as u32
    }

    fn state(&self, id: FlowId) -> FlowState {
        self.flows[id.0 as usize].state
    }

    fn set_state(&mut self, id: FlowId, state: FlowState) {
        self.flows[id.0 as usize].state = state;
    }

    fn take_seen(&mut self, id: FlowId) -> bool {
        std::mem::take(&mut self.flows[id.0 as usize].seen) != 0
    }

    fn is_seen(&self, id: FlowId) -> bool {
        self.flows[id.0 as usize].seen != 0
    }

    fn take_counted(&mut self, id: FlowId) -> bool {
        std::mem::take(&mut self.flows[id.0 as usize].counted) != 0
    }

    fn read(&self, id: FlowId) -> FlowEntry {
        self.flows[id.0 as usize]
    }

    fn insert_key(&mut self, key: &FlowKey, reference: FlowReference) {
        self.insert_flow_reference(key, reference);
    }

    fn remove_key(&mut self, key: &FlowKey, id: FlowId) {
        if self.flow_index.get(key).is_some_and(|found| found.id == id) {
            self.flow_index.remove(key);
        }
    }

    fn leave(&mut self, listener: ListenerId, backend: BackendId) {
        self.listeners_live[listener.0 as usize].0 -= 1;
        self.backends_live[backend.0 as usize].0 -= 1;
    }

    fn give_back(&mut self, id: FlowId) -> Result<(), Error> {
        self.free_flows.push_back(id);
        Ok(())
    }
}

/// The programs of the BPF object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// XDP in native mode.
    Native,
    /// XDP in generic mode.
    Generic,
    /// tcx on the ingress of a tunnel device.
    Tunnel,
}

impl Program {
    /// How the agent would attach it.
    pub fn kind(self) -> AttachmentKind {
        match self {
            Self::Native => AttachmentKind::XdpNative,
            Self::Generic => AttachmentKind::XdpGeneric,
            Self::Tunnel => AttachmentKind::Tcx,
        }
    }
}

/// The network around the data path, see [`LINKS`].
struct MemoryEnv {
    hook: Hook,
    ingress_ifindex: u32,
}

impl Env for MemoryEnv {
    fn hook(&self) -> Hook {
        self.hook
    }

    fn ingress_ifindex(&self) -> u32 {
        self.ingress_ifindex
    }

    fn route(&mut self, key: &FlowKey) -> Route {
        route(self.ingress_ifindex, key.source, key.destination)
    }

    fn hold<P: Packet>(&mut self, _packet: &mut P, walk: &Walk, _why: HeldKind) -> bool {
        walk.frame.total_len as usize <= HELD_BYTES
    }
}

/// An interface of the gateway in the cases' network.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub name: &'static str,
    pub ifindex: u32,
    pub mac: Mac,
    /// The gateway's own address; the network is its /24.
    pub address: Ipv4Addr,
    /// Can frames leave through it straight from XDP?
    pub can_send: bool,
    /// Does the kernel forward what comes in by it?
    pub is_forwarding: bool,
}

/// Where clients are.
pub const CLIENT_SIDE: Link = Link {
    name: "client0",
    ifindex: 11,
    mac: [2, 0, 0, 0, 11, 1],
    address: Ipv4Addr::new(172, 18, 0, 1),
    can_send: true,
    is_forwarding: true,
};
/// Where backends beside the gateway are.
pub const SERVER_SIDE: Link = Link {
    name: "server0",
    ifindex: 12,
    mac: [2, 0, 0, 0, 12, 1],
    address: Ipv4Addr::new(172, 17, 0, 1),
    can_send: true,
    is_forwarding: true,
};
/// Where remote backends are: only the stack can send there.
pub const TUNNEL_SIDE: Link = Link {
    name: "tunnel0",
    ifindex: 13,
    mac: [2, 0, 0, 0, 13, 1],
    address: Ipv4Addr::new(192, 168, 1, 1),
    can_send: false,
    is_forwarding: true,
};
/// An interface that does not forward.
pub const CLOSED_SIDE: Link = Link {
    name: "closed0",
    ifindex: 14,
    mac: [2, 0, 0, 0, 14, 1],
    address: Ipv4Addr::new(172, 19, 0, 1),
    can_send: true,
    is_forwarding: false,
};

/// The gateway's interfaces.
pub const LINKS: [Link; 4] = [CLIENT_SIDE, SERVER_SIDE, TUNNEL_SIDE, CLOSED_SIDE];

/// Hosts whose link address the gateway knows; that of others on its links it does not.
pub const NEIGHBOURS: [(Ipv4Addr, Mac); 8] = [
    (Ipv4Addr::new(172, 18, 0, 10), [2, 0, 0, 0, 11, 10]),
    (Ipv4Addr::new(172, 18, 0, 11), [2, 0, 0, 0, 11, 11]),
    (Ipv4Addr::new(172, 18, 0, 20), [2, 0, 0, 0, 11, 20]),
    (ROUTER, [2, 0, 0, 0, 11, 254]),
    (Ipv4Addr::new(172, 17, 0, 205), [2, 0, 0, 0, 12, 205]),
    (Ipv4Addr::new(172, 17, 0, 206), [2, 0, 0, 0, 12, 206]),
    (Ipv4Addr::new(192, 168, 1, 20), [2, 0, 0, 0, 13, 20]),
    (Ipv4Addr::new(172, 19, 0, 10), [2, 0, 0, 0, 14, 10]),
];

/// What stands before each IPv4 address of this network in its IPv6 twin.
pub const V6_PREFIX: [u8; 12] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The IPv6 twin of an address of this network.
pub fn in_v6(address: Ipv4Addr) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..12].copy_from_slice(&V6_PREFIX);
    octets[12..].copy_from_slice(&address.octets());
    octets.into()
}

/// The next router on the clients' side.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 254);
/// The /24 behind [`ROUTER`].
pub const BEHIND_ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 0);
/// A /24 with a route that forbids.
pub const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);

fn network(address: Ipv4Addr) -> [u8; 3] {
    let [a, b, c, _] = address.octets();
    [a, b, c]
}

/// Is it an address of IPv6 that means something on one link only, and so is never forwarded: of a group, of the link or of
/// the host itself?
fn is_of_one_link(address: IpAddress) -> bool {
    match address.to_std() {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => {
            address.is_multicast() || address.is_unicast_link_local() || address.is_loopback()
        }
    }
}

/// What the kernel's forwarding table says in this network.
fn route(ingress_ifindex: u32, source: IpAddress, destination: IpAddress) -> Route {
    if is_of_one_link(source) || is_of_one_link(destination) {
        return Route::None;
    }
    let is_closed = LINKS
        .iter()
        .any(|link| link.ifindex == ingress_ifindex && !link.is_forwarding);
    if is_closed {
        return Route::ForwardingDisabled;
    }
    let is_v4 = destination.is_v4();
    let is_known = is_v4 || destination.octets()[..12] == V6_PREFIX;
    let destination = Ipv4Addr::from(destination.low());
    if !is_known {
        return Route::None;
    }
    let next = if network(destination) == network(BEHIND_ROUTER) {
        ROUTER
    } else {
        destination
    };
    let Some(link) = LINKS.iter().find(|link| network(link.address) == network(next)) else {
        return Route::None;
    };
    // Not forwarded to: the gateway's own address, and IPv4's broadcast address or IPv6's anycast address of routers. In
    // IPv4 the first address of a network is a host's, to Linux since 5.14.
    let last = if is_v4 { 255 } else { 0 };
    if next == link.address || next.octets()[3] == last {
        return Route::None;
    }
    match NEIGHBOURS.iter().find(|(address, _)| *address == next) {
        Some((_, mac)) => Route::Neighbour {
            ifindex: link.ifindex,
            link: LinkPair::new(MacAddress::new(*mac), MacAddress::new(link.mac)),
        },
        None => Route::Interface {
            ifindex: link.ifindex,
        },
    }
}

/// The link address of a neighbour.
///
/// # Panics
/// When the gateway does not know it.
pub fn mac_of(address: Ipv4Addr) -> Mac {
    let neighbour = NEIGHBOURS.iter().find(|(known, _)| *known == address);
    neighbour
        .unwrap_or_else(|| panic!("{address} is not a known neighbour"))
        .1
}
