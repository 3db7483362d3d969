//! The maps, and `Tables` over them.
//!
//! Sizes here are the smallest that load; the agent sets the real ones before loading.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, RingBuf, lpm_trie::Key},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns},
    macros::btf_map,
    maps::ring_buf::RingBufEntry,
};
use forwarder_common::{
    abi::{
        backend::{Backend, BackendGroup, BackendHop, BackendId, GroupId},
        capture::{CaptureFilter, CaptureRoom, CapturedPacket},
        counter::{CarriedCounters, EventCounters, IcmpBudget, ReasonCounters},
        flow::{FlowEntry, FlowId, FlowKey, FlowKeyV4, FlowReference},
        fragment::{FragmentFlow, FragmentKey, HeldPacket},
        handshake::{Handshake, SynBudget},
        interface::{Interface, InterfaceKey},
        listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, Source, SourceKey, Vip, VipKey},
        persistence::{Persistence, PersistenceKey},
        rate::{SourceRate, SourceRateKey},
        reason::Reason,
        settings::Settings,
        tunnel::{
            PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelPeer, TunnelPort,
        },
    },
    datapath::{
        Gauge, Tables, TrafficEvent, Walk, backend, fragment, handshake,
        hint::{Fingerprint, Hints},
        open, rate,
    },
};

use crate::packet::SCRATCH_WORDS;

/// Packets at a time whose fragments are followed.
const FRAGMENTED_PACKETS: usize = 8192;
/// For fragments on their way to the agent; a power of two and whole pages.
const HELD_BUFFER_BYTES: usize = 256 << 10;
/// The same for captured packets: a thousand.
const CAPTURE_BUFFER_BYTES: usize = 4 << 20;

#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
static LISTENERS: HashMap<ListenerKey, Listener, 1> = HashMap::new();
#[btf_map]
static LISTENER_RANGES: LpmTrie<[u32; 5], Listener, 1> = LpmTrie::new();
#[btf_map]
static SOURCES: LpmTrie<[u32; 5], Source, 1> = LpmTrie::new();
#[btf_map]
static VIPS: HashMap<VipKey, Vip, 1> = HashMap::new();
#[btf_map]
static GROUPS: Array<BackendGroup, 1> = Array::new();
#[btf_map]
static GROUP_TURNS: Array<Live, 1> = Array::new();
#[btf_map]
static PERSISTENCE: LruHashMap<PersistenceKey, Persistence, 1> = LruHashMap::new();
#[btf_map]
static SLOTS: Array<BackendId, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static BACKENDS: Array<Backend, 1> = Array::new();
#[btf_map]
static INTERFACES: HashMap<InterfaceKey, Interface, 1> = HashMap::new();
#[btf_map]
static TUNNEL_PORTS: Array<TunnelPort, 65_536> = Array::new();
#[btf_map]
static TUNNEL_ENDPOINT: HashMap<TunnelEndpointKey, TunnelEndpoint, 1> = HashMap::new();
#[btf_map]
static TUNNEL_HOPS: HashMap<TunnelHopKey, TunnelHop, 1> = HashMap::new();
#[btf_map]
static TUNNEL_PEERS: Array<TunnelPeer, 1> = Array::new();
#[btf_map]
static FLOW_INDEX: HashMap<FlowKeyV4, FlowReference, 1> = HashMap::new();
#[btf_map]
static FLOW_INDEX_V6: HashMap<FlowKey, FlowReference, 1> = HashMap::new();
#[btf_map]
static FLOW_HINTS: Array<Hints, 1> = Array::new();
/// Number of the last bucket; there are a power of two. The agent sets it before loading, so it is a constant to the
/// kernel's compiler.
#[unsafe(no_mangle)]
static LAST_HINTS: u32 = 0;
#[btf_map]
static FLOWS: Array<FlowEntry, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static FREE_FLOWS: Queue<FlowId, 1> = Queue::new();
#[btf_map]
static LISTENER_LIVE: Array<Live, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static BACKEND_LIVE: Array<Live, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static SYN_BUDGETS: PerCpuArray<SynBudget, 1> = PerCpuArray::new();
#[btf_map]
static HANDSHAKES: Array<Handshake, 1> = Array::new();
#[btf_map]
static SOURCE_RATES: LruHashMap<SourceRateKey, SourceRate, 1> = LruHashMap::new();
#[btf_map]
static LISTENER_CARRY: Array<CarriedCounters, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static BACKEND_CARRY: Array<CarriedCounters, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
/// As `LAST_HINTS`.
#[unsafe(no_mangle)]
static LISTENERS_A_CPU: u32 = 0;
#[unsafe(no_mangle)]
static BACKENDS_A_CPU: u32 = 0;
#[btf_map]
static LISTENER_EVENTS: PerCpuArray<EventCounters, 1> = PerCpuArray::new();
#[btf_map]
static BACKEND_EVENTS: PerCpuArray<EventCounters, 1> = PerCpuArray::new();
#[btf_map]
static BACKEND_HOPS: PerCpuArray<BackendHop, 1> = PerCpuArray::new();
#[btf_map]
static REASON_COUNT: PerCpuArray<ReasonCounters, { Reason::COUNT }> = PerCpuArray::new();

#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentFlow, FRAGMENTED_PACKETS> = LruHashMap::new();
#[btf_map]
static HELD: RingBuf<HeldPacket, HELD_BUFFER_BYTES> = RingBuf::new();
#[btf_map]
static CAPTURE_FILTER: Array<CaptureFilter, 1> = Array::new();
#[btf_map]
static CAPTURE_ROOM: PerCpuArray<CaptureRoom, 1> = PerCpuArray::new();
#[btf_map]
static CAPTURED: RingBuf<CapturedPacket, CAPTURE_BUFFER_BYTES> = RingBuf::new();
#[btf_map]
static ICMP_BUDGET: PerCpuArray<IcmpBudget, 1> = PerCpuArray::new();

/// What the stages of one packet hand on; nothing in it outlives the packet.
#[btf_map]
static WALK: PerCpuArray<Walk, 1> = PerCpuArray::new();

/// Where payload is copied to be summed: the BPF stack is too small.
#[btf_map]
static SCRATCH: PerCpuArray<[u64; SCRATCH_WORDS], 1> = PerCpuArray::new();

/// What is captured.
#[inline(always)]
pub(crate) fn capture_filter() -> Option<&'static CaptureFilter> {
    CAPTURE_FILTER.get(0)
}

/// Room for this CPU's packet as it came.
#[inline(always)]
pub(crate) fn capture_room() -> Option<&'static mut CaptureRoom> {
    // SAFETY: this CPU's own element; one packet at a time uses it.
    CAPTURE_ROOM.get_ptr_mut(0).map(|room| unsafe { &mut *room })
}

/// Room for one captured packet on its way to the agent.
#[inline(always)]
pub(crate) fn captured_packet() -> Option<RingBufEntry<CapturedPacket>> {
    CAPTURED.reserve(0)
}

/// Room for one packet on its way to the agent.
#[inline(always)]
pub(crate) fn held_packet() -> Option<RingBufEntry<HeldPacket>> {
    HELD.reserve(0)
}

/// This CPU's scratch buffer.
#[inline(always)]
pub(crate) fn scratch() -> Option<*mut [u64; SCRATCH_WORDS]> {
    SCRATCH.get_ptr_mut(0)
}

/// Makes the compiler forget what it knows of the walk, and write what it has put off: the next function finds the
/// walk in its map, where the compiler does not see it look.
#[inline(always)]
pub(crate) fn lend(walk: &Walk) {
    // SAFETY: moves a register onto itself. `black_box` would do, but takes eight bytes of stack each time.
    unsafe {
        core::arch::asm!(
            "{walk} = {walk}",
            walk = inlateout(reg) core::ptr::from_ref(walk) => _,
            options(nostack)
        );
    }
}

/// A trie's key in the form that aya names.
///
/// Ours are aligned, as the verifier wants keys on the stack to be; aya's is packed, with the same bytes.
#[inline(always)]
fn trie_key<K>(key: &K) -> &Key<[u32; 5]> {
    const { assert!(size_of::<K>() == size_of::<Key<[u32; 5]>>()) };
    // SAFETY: the same size, alignment 1, plain integers on both sides.
    unsafe { &*core::ptr::from_ref(key).cast() }
}

/// A constant that the agent sets before loading; Rust's compiler must not believe what it is now.
#[inline(always)]
fn constant(of: &'static u32) -> u32 {
    // SAFETY: a reference is valid.
    unsafe { core::ptr::read_volatile(of) }
}

/// The CPU that the program runs on, until it ends.
#[inline(always)]
fn cpu() -> u32 {
    // SAFETY: a helper without parameters.
    unsafe { bpf_get_smp_processor_id() }
}

/// Flows that count against a limit.
#[repr(transparent)]
pub(crate) struct Live(u64);

impl Gauge for Live {
    #[inline(always)]
    fn get(&self) -> u64 {
        self.0
    }

    #[inline(always)]
    fn add(&mut self, difference: i64) -> u64 {
        let mut number = difference;
        // SAFETY: the pointer is this map value's. Assembly, as the target has no atomics in Rust's eyes; the
        // instruction needs Linux 5.12.
        unsafe {
            core::arch::asm!(
                "{number} = atomic_fetch_add((u64 *)({pointer} + 0), {number})",
                number = inlateout(reg) number,
                pointer = in(reg) &raw mut self.0,
                options(nostack)
            );
        }
        number as u64
    }
}

/// The slow path, the choice of a backend and the searches for it, as functions of their own in BPF as well: inlined,
/// each of their rounds multiplies what the verifier has to follow behind it (more than 1 000 000 instructions, Linux
/// 6.18).
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_choose(hash: u32, now_secs: u32) -> i64 {
    let Some(walk) = KernelTables::walk() else {
        return backend::BROKEN;
    };
    backend::choose(&mut KernelTables, walk, hash, now_secs)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_follow() -> i64 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return i64::from(Reason::INTERNAL.0);
    };
    fragment::follow(&mut KernelTables, settings, walk)
}

/// The step of a loop, whose rounds the verifier would else multiply.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_option(place: u32, len: u32) -> u32 {
    let Some(walk) = KernelTables::walk() else {
        return len;
    };
    handshake::next_option(&mut walk.room, place, len)
}

/// `handshake::next_option` for the packet under way.
#[inline(always)]
pub(crate) fn next_option(place: u32, len: u32) -> u32 {
    forwarder_option(place, len)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_charge() -> i64 {
    let Some(walk) = KernelTables::walk() else {
        return i64::from(Reason::INTERNAL.0);
    };
    rate::charge(&mut KernelTables, walk)
}

/// `ended`: the number of the flow to take over, or a negative one.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_open(backend: u32, ended: i64) -> i64 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return i64::from(Reason::INTERNAL.0);
    };
    let ended = if ended < 0 {
        None
    } else {
        Some(FlowId(ended as u32))
    };
    open::open(&mut KernelTables, settings, walk, BackendId(backend), ended)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_search(first_slot: u32, slot_count: u32, slot: u32) -> i64 {
    backend::search(&mut KernelTables, first_slot, slot_count, slot)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_least(first_slot: u32, slot_count: u32, slot: u32) -> i64 {
    backend::search_least(&mut KernelTables, first_slot, slot_count, slot)
}

/// The kernel's maps as the walk sees them.
pub(crate) struct KernelTables;

impl KernelTables {
    /// The settings; `None` never happens, but the verifier wants to see it checked.
    #[inline(always)]
    pub(crate) fn settings() -> Option<&'static Settings> {
        SETTINGS.get(0)
    }

    /// The bond that an interface is a port of, else the interface itself.
    #[inline(always)]
    pub(crate) fn bond_or(ifindex: u32) -> u32 {
        match KernelTables.interface(&InterfaceKey { ifindex }) {
            Some(port) if port.carrier_ifindex != 0 => port.carrier_ifindex,
            _ => ifindex,
        }
    }

    /// This CPU's walk; `None` as for the settings.
    #[inline(always)]
    pub(crate) fn walk() -> Option<&'static mut Walk> {
        // SAFETY: this CPU's own element, which one packet uses at a time: programs of the hooks run with bottom
        // halves off. Functions that ask for it again do so while their caller, who lent it to them, waits.
        WALK.get_ptr_mut(0).map(|walk| unsafe { &mut *walk })
    }

    /// The flow that [`Tables::take_flow`] takes next; it stays where it is.
    #[inline(always)]
    pub(crate) fn next_free_flow() -> Option<FlowId> {
        FREE_FLOWS.peek().ok().flatten()
    }
}

impl Tables for KernelTables {
    type Gauge = Live;

    #[inline(always)]
    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        // SAFETY: the value is only read; the agent replaces values as a whole.
        unsafe { VIPS.get(key) }
    }

    #[inline(always)]
    fn listener(&self, key: &ListenerKey) -> Option<&Listener> {
        // SAFETY: as for `vip`.
        unsafe { LISTENERS.get(key) }
    }

    #[inline(always)]
    fn listener_range(&self, key: &ListenerRangeKey) -> Option<&Listener> {
        // SAFETY: as for `vip`.
        LISTENER_RANGES.get(trie_key(key))
    }

    #[inline(always)]
    fn is_source_admitted(&self, key: &SourceKey) -> bool {
        SOURCES.get(trie_key(key)).is_some()
    }

    #[inline(always)]
    fn group(&self, id: GroupId) -> Option<&BackendGroup> {
        GROUPS.get(id.0)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<BackendId> {
        SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn backend(&self, id: BackendId) -> Option<&Backend> {
        BACKENDS.get(id.0)
    }

    #[inline(always)]
    fn open(
        &mut self,
        _: &Settings,
        walk: &mut Walk,
        backend: BackendId,
        ended: Option<FlowId>,
    ) -> open::Opened {
        lend(walk);
        forwarder_open(backend.0, ended.map_or(-1, |id| i64::from(id.0)))
    }

    #[inline(always)]
    fn follow(&mut self, _: &Settings, walk: &mut Walk) -> fragment::Followed {
        lend(walk);
        forwarder_follow()
    }

    #[inline(always)]
    fn choose(&mut self, walk: &Walk, hash: u32, now_secs: u32) -> backend::Found {
        lend(walk);
        forwarder_choose(hash, now_secs)
    }

    #[inline(always)]
    fn charge(&mut self, walk: &Walk) -> rate::Charged {
        lend(walk);
        forwarder_charge()
    }

    #[inline(always)]
    fn search(&mut self, first_slot: u32, slot_count: u32, slot: u32) -> backend::Found {
        forwarder_search(first_slot, slot_count, slot)
    }

    #[inline(always)]
    fn search_least(&mut self, first_slot: u32, slot_count: u32, slot: u32) -> backend::Found {
        forwarder_least(first_slot, slot_count, slot)
    }

    #[inline(always)]
    fn group_turns(&mut self, id: GroupId) -> Option<&mut Live> {
        // SAFETY: array elements live as long as the program. All writers use atomic instructions.
        GROUP_TURNS.get_ptr_mut(id.0).map(|turns| unsafe { &mut *turns })
    }

    #[inline(always)]
    fn persistence(&mut self, key: &PersistenceKey) -> Option<&mut Persistence> {
        // SAFETY: the kernel keeps the memory of an entry until the program ends. Another CPU may write it: fields are
        // plain integers, and what they name is looked up and compared.
        PERSISTENCE.get_ptr_mut(key).map(|kept| unsafe { &mut *kept })
    }

    #[inline(always)]
    fn keep_persistence(&mut self, key: &PersistenceKey, value: Persistence) {
        // Without memory for it, the client's next flow goes where the table says.
        let _ = PERSISTENCE.insert(key, value, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn interface(&self, key: &InterfaceKey) -> Option<&Interface> {
        // SAFETY: as for `vip`.
        unsafe { INTERFACES.get(key) }
    }

    #[inline(always)]
    fn tunnel_port(&self, port: u16) -> Option<TunnelPort> {
        TUNNEL_PORTS.get(u32::from(port)).copied()
    }

    #[inline(always)]
    fn tunnel_endpoint(&self, key: &TunnelEndpointKey) -> Option<&TunnelEndpoint> {
        // SAFETY: as for `vip`.
        unsafe { TUNNEL_ENDPOINT.get(key) }
    }

    #[inline(always)]
    fn tunnel_hop(&self, key: &TunnelHopKey) -> Option<PeerId> {
        // SAFETY: as for `vip`.
        unsafe { TUNNEL_HOPS.get(key) }.map(|hop| hop.peer)
    }

    #[inline(always)]
    fn tunnel_peer(&self, id: PeerId) -> Option<&TunnelPeer> {
        TUNNEL_PEERS.get(u32::from(id.0))
    }

    #[inline(always)]
    fn flow_reference(&self, key: &FlowKey) -> Option<&FlowReference> {
        if key.is_v4() {
            // SAFETY: as for `vip`.
            unsafe { FLOW_INDEX.get(key.v4()) }
        } else {
            // SAFETY: as for `vip`.
            unsafe { FLOW_INDEX_V6.get(key) }
        }
    }

    #[inline(always)]
    fn flow_reference_v4(&self, key: &FlowKeyV4) -> Option<&FlowReference> {
        // SAFETY: as for `vip`.
        unsafe { FLOW_INDEX.get(key) }
    }

    #[inline(always)]
    fn flow_reference_v6(&self, key: &FlowKey) -> Option<&FlowReference> {
        // SAFETY: as for `vip`.
        unsafe { FLOW_INDEX_V6.get(key) }
    }

    #[inline(always)]
    fn flow(&mut self, id: FlowId) -> Option<&mut FlowEntry> {
        // SAFETY: array elements live as long as the program. Another CPU may write the same entry: fields
        // are plain integers written whole, and none is trusted for memory safety.
        FLOWS.get_ptr_mut(id.0).map(|entry| unsafe { &mut *entry })
    }

    #[inline(always)]
    fn hints(&mut self, fingerprint: Fingerprint) -> Option<&mut Hints> {
        // SAFETY: as for `flow`.
        FLOW_HINTS
            .get_ptr_mut(fingerprint.bucket() & constant(&LAST_HINTS))
            .map(|hints| unsafe { &mut *hints })
    }

    #[inline(always)]
    fn insert_flow_reference(&mut self, key: &FlowKey, reference: FlowReference) -> bool {
        let flags = u64::from(BPF_NOEXIST);
        if key.is_v4() {
            FLOW_INDEX.insert(key.v4(), reference, flags).is_ok()
        } else {
            FLOW_INDEX_V6.insert(key, reference, flags).is_ok()
        }
    }

    #[inline(always)]
    fn remove_flow_reference(&mut self, key: &FlowKey) {
        // A key that is gone already is as good as removed.
        let _ = if key.is_v4() {
            FLOW_INDEX.remove(key.v4())
        } else {
            FLOW_INDEX_V6.remove(key)
        };
    }

    #[inline(always)]
    fn take_flow(&mut self) -> Option<FlowId> {
        FREE_FLOWS.pop().ok().flatten()
    }

    #[inline(always)]
    fn return_flow(&mut self, id: FlowId) {
        // The queue has room for every flow there is.
        let _ = FREE_FLOWS.push(id, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn listener_live(&mut self, id: ListenerId) -> Option<&mut Live> {
        // SAFETY: array elements live as long as the program. All writers use atomic instructions.
        LISTENER_LIVE.get_ptr_mut(id.0).map(|live| unsafe { &mut *live })
    }

    #[inline(always)]
    fn backend_live(&mut self, id: BackendId) -> Option<&mut Live> {
        // SAFETY: as for `listener_live`.
        BACKEND_LIVE.get_ptr_mut(id.0).map(|live| unsafe { &mut *live })
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentFlow> {
        // SAFETY: the value is only read, and what it names is looked up and compared.
        unsafe { FRAGMENTS.get(key) }
    }

    #[inline(always)]
    fn keep_fragment(&mut self, key: &FragmentKey, flow: FragmentFlow) {
        // Without memory for it, later fragments are dropped.
        let _ = FRAGMENTS.insert(key, flow, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn icmp_budget(&mut self) -> Option<&mut IcmpBudget> {
        // SAFETY: this CPU's own element, as for `count_listener`.
        ICMP_BUDGET.get_ptr_mut(0).map(|budget| unsafe { &mut *budget })
    }

    #[inline(always)]
    fn backend_hop(&mut self, id: BackendId) -> Option<&mut BackendHop> {
        // SAFETY: this CPU's own element, as for `count_listener`.
        BACKEND_HOPS.get_ptr_mut(id.0).map(|known| unsafe { &mut *known })
    }

    #[inline(always)]
    fn syn_budget(&mut self, id: ListenerId) -> Option<&mut SynBudget> {
        // SAFETY: this CPU's own element, as for `count_listener`.
        SYN_BUDGETS
            .get_ptr_mut(id.0)
            .map(|budget| unsafe { &mut *budget })
    }

    #[inline(always)]
    fn handshake(&mut self, id: FlowId) -> Option<&mut Handshake> {
        // SAFETY: array elements live as long as the program. Another CPU may write the same one: fields are plain
        // integers, and none is trusted for memory safety.
        HANDSHAKES.get_ptr_mut(id.0).map(|kept| unsafe { &mut *kept })
    }

    #[inline(always)]
    fn source_rate(&mut self, key: &SourceRateKey) -> Option<&mut SourceRate> {
        // SAFETY: as for `persistence`.
        SOURCE_RATES.get_ptr_mut(key).map(|rate| unsafe { &mut *rate })
    }

    #[inline(always)]
    fn keep_source_rate(&mut self, key: &SourceRateKey, value: SourceRate) {
        // Without memory for it, this flow is not counted.
        let _ = SOURCE_RATES.insert(key, value, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn now_secs(&mut self) -> u32 {
        // SAFETY: a helper without parameters.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn count_listener(&mut self, id: ListenerId, event: TrafficEvent) {
        if let Some(counters) = LISTENER_CARRY.get_ptr_mut(id.0 + cpu() * constant(&LISTENERS_A_CPU)) {
            // SAFETY: this CPU's own element; programs of one hook are not preempted by each other here.
            unsafe { &mut *counters }.add(event);
        }
        if !event.is_carried_only()
            && let Some(counters) = LISTENER_EVENTS.get_ptr_mut(id.0)
        {
            // SAFETY: as above.
            unsafe { &mut *counters }.add(event);
        }
    }

    #[inline(always)]
    fn count_backend(&mut self, id: BackendId, event: TrafficEvent) {
        if let Some(counters) = BACKEND_CARRY.get_ptr_mut(id.0 + cpu() * constant(&BACKENDS_A_CPU)) {
            // SAFETY: as for `count_listener`.
            unsafe { &mut *counters }.add(event);
        }
        if !event.is_carried_only()
            && let Some(counters) = BACKEND_EVENTS.get_ptr_mut(id.0)
        {
            // SAFETY: as for `count_listener`.
            unsafe { &mut *counters }.add(event);
        }
    }

    #[inline(always)]
    fn count_reason(&mut self, reason: Reason, frame_bytes: usize) {
        if let Some(counters) = REASON_COUNT.get_ptr_mut(reason.0) {
            // SAFETY: as for `count_listener`.
            unsafe { &mut *counters }.add(frame_bytes);
        }
    }
}
