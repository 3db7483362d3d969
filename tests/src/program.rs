//! The real programs in the kernel, run on single frames (BPF_PROG_TEST_RUN) and not attached to anything.
//!
//! [`with_kernel`] makes a network namespace that looks like the cases' network (`tables::LINKS`), so that the
//! kernel's own forwarding table answers as the cases' does. The namespace belongs to one thread and is gone
//! when that ends.
//!
//! What such a run does not show: the egress interface of a redirect (look at the flow's next hop instead), and
//! partial checksums in tcx, whose mark it cannot set.

use std::{
    collections::{BTreeMap, HashMap as StdHashMap, VecDeque},
    fs,
    hash::Hash,
    io::Write as _,
    net::IpAddr,
    panic,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapError, PerCpuArray, PerCpuValues, Queue, RingBuf, lpm_trie::Key},
    programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
    util::nr_cpus,
};
use bytemuck::{Pod, Zeroable};
use forwarder_common::{
    abi::{
        counter::{CarriedCounters, EventCounters, ReasonCounters, TrafficCounters},
        flow::{FlowEntry, FlowId, FlowKey, FlowKeyV4, FlowReference},
        fragment::{FragmentFlow, FragmentKey},
        handshake::Handshake,
        map_name,
        persistence::{Persistence, PersistenceKey},
        reason::Reason,
        settings::{Settings, flag},
        tunnel::{PeerId, TunnelHop, TunnelPeer, TunnelPort},
    },
    datapath::{Action, Verdict},
};
use forwarder_user::datapath::{
    object::{self, Sizes},
    pod::AsPod,
    view::{self, Arrival, LiveMaps, Walk},
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};

use crate::tables::{
    BEHIND_ROUTER, FORBIDDEN, LINKS, Live, MemoryTables, NEIGHBOURS, Program, ROUTER, SIZES, in_v6,
};

/// The two maps of [`TrafficCounters`].
const LISTENER_MAPS: [&str; 2] = [map_name::LISTENER_CARRIED, map_name::LISTENER_EVENTS];
const BACKEND_MAPS: [&str; 2] = [map_name::BACKEND_CARRIED, map_name::BACKEND_EVENTS];
/// Set to 1 where a test that cannot run has to fail.
const STRICT_VARIABLE: &str = "FORWARDER_TESTS_STRICT";

/// Packets that the buffer for the agent has room for at least.
const MOST_HELD: usize = 64;

/// Room for what a program makes of a frame.
const OUTPUT_LEN: usize = 16 * 1024;

/// Runs `test` with the programs loaded, in a network namespace of the cases' network.
///
/// Without the rights to do so it prints `SKIP: …` and does nothing, or panics where skipping is forbidden.
///
/// # Panics
/// When the programs do not load, and whenever `test` does.
pub fn with_kernel(test: impl FnOnce(&mut Kernel) + Send) {
    in_network(|| match object::load(&SIZES) {
        Ok(ebpf) => test(&mut Kernel::new(ebpf)),
        Err(error) if error.what.contains("(os error 1)") => skip(),
        Err(error) => panic!("{error}"),
    });
}

/// Runs `test` in a network namespace of the cases' network.
///
/// Without the rights to do so it prints `SKIP: …` and does nothing, or panics where skipping is forbidden.
///
/// # Panics
/// When the network cannot be made, and whenever `test` does.
pub fn in_network(test: impl FnOnce() + Send) {
    let run = || {
        match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => {}
            Err(Errno::EPERM) => return skip(),
            Err(error) => panic!("no network namespace: {error}"),
        }
        build_network().expect("the cases' network");
        test();
    };
    // A thread of its own, as a namespace is a property of a thread and this one's must not change.
    let outcome = thread::scope(|scope| scope.spawn(run).join());
    if let Err(payload) = outcome {
        panic::resume_unwind(payload);
    }
}

fn skip() {
    let is_strict = std::env::var_os(STRICT_VARIABLE).is_some_and(|value| value == "1");
    assert!(
        !is_strict,
        "needs CAP_BPF, and {STRICT_VARIABLE}=1 forbids to skip"
    );
    println!("SKIP: needs CAP_BPF");
}

/// Builds [`LINKS`], [`NEIGHBOURS`] and the routes in this thread's network namespace.
fn build_network() -> Result<()> {
    // First, as links copy it when they are made: nothing is sent or learned that no test asks for.
    for (key, value) in [
        ("router_solicitations", "0"),
        ("accept_ra", "0"),
        ("addr_gen_mode", "1"),
        ("accept_dad", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/default/{key}");
        fs::write(&path, value).with_context(|| path)?;
    }
    let mut batch = String::new();
    for link in &LINKS {
        let [a, b, c, d, e, f] = link.mac;
        let (name, peer, ifindex) = (link.name, format!("{}p", link.name), link.ifindex);
        // The MTU is above all test packets: tcx would refuse to route larger ones.
        batch += &format!(
            "link add {name} index {ifindex} mtu 9000 \
             address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} type veth peer name {peer} mtu 9000\n\
             link set {peer} up\nlink set {name} up\naddress add {}/24 dev {name}\n\
             address add {}/120 dev {name} nodad\n",
            link.address,
            in_v6(link.address),
        );
    }
    for (address, [a, b, c, d, e, f]) in NEIGHBOURS {
        let link = LINKS
            .iter()
            .find(|link| link.address.octets()[..3] == address.octets()[..3])
            .context("a neighbour on no link")?;
        for address in [IpAddr::V4(address), IpAddr::V6(in_v6(address))] {
            batch += &format!(
                "neighbour add {address} lladdr {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} dev {} nud permanent\n",
                link.name
            );
        }
    }
    batch += &format!("route add {BEHIND_ROUTER}/24 via {ROUTER}\nroute add unreachable {FORBIDDEN}/24\n");
    batch += &format!(
        "route add {}/120 via {}\nroute add unreachable {}/120\n",
        in_v6(BEHIND_ROUTER),
        in_v6(ROUTER),
        in_v6(FORBIDDEN)
    );
    ip_batch(&batch)?;
    for link in &LINKS {
        for family in ["ipv4", "ipv6"] {
            let path = format!("/proc/sys/net/{family}/conf/{}/forwarding", link.name);
            let value = if link.is_forwarding { "1" } else { "0" };
            fs::write(&path, value).with_context(|| path)?;
        }
    }
    Ok(())
}

fn ip_batch(batch: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `ip`")?;
    child
        .stdin
        .take()
        .context("`ip` has no input")?
        .write_all(batch.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("`ip -batch` failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// What a program makes of the library's verdict.
pub fn action_of(program: Program, verdict: Verdict, settings: &Settings) -> Action {
    // tcx has no way of its own to send a packet back; a veth in native XDP takes none.
    let is_by_redirect = program == Program::Tunnel || settings.flags & flag::TRANSMIT_BY_REDIRECT != 0;
    match verdict.action {
        Action::Transmit if is_by_redirect => Action::Redirect,
        action => action,
    }
}

/// The loaded programs and their maps.
pub struct Kernel {
    ebpf: Ebpf,
    /// UDP ports that mean a tunnel.
    ports: Vec<u16>,
    /// What the tables that only the agent writes were filled with.
    filled: Option<MemoryTables>,
    /// Packets that a program may have handed to the agent since somebody took them.
    held: usize,
    /// Room for what a program makes of a frame.
    output: Vec<u8>,
}

impl Kernel {
    fn new(ebpf: Ebpf) -> Self {
        Self {
            ebpf,
            ports: Vec::new(),
            filled: None,
            held: 1,
            output: vec![0; OUTPUT_LEN],
        }
    }

    /// Programs with maps of these sizes; to be called [`in_network`].
    pub fn load(sizes: &Sizes) -> Result<Self> {
        Ok(Self::new(object::load(sizes)?))
    }

    /// The program of interfaces in native mode.
    pub fn xdp(&mut self) -> Result<&ProgramFd> {
        let program: &mut Xdp = object::program(&mut self.ebpf, map_name::PROGRAM_XDP)?;
        Ok(program.fd()?)
    }

    /// How many instructions the verifier followed, by program; nothing from kernels that do not tell.
    pub fn verified_instructions(&self) -> Result<BTreeMap<String, u32>> {
        let mut counts = BTreeMap::new();
        for (name, program) in self.ebpf.programs() {
            if let Some(count) = program.info()?.verified_instruction_count() {
                counts.insert(name.to_owned(), count);
            }
        }
        Ok(counts)
    }

    /// Gives all maps the content of these tables, and nothing else. What only the agent writes is left as it is where it
    /// was written so before.
    pub fn fill(&mut self, tables: &MemoryTables) -> Result<()> {
        let before = self.filled.take();
        let is_as_before = |is_same: fn(&MemoryTables, &MemoryTables) -> bool| {
            before.as_ref().is_some_and(|before| is_same(before, tables))
        };
        if !is_as_before(|a, b| a.settings == b.settings) {
            self.set_array(map_name::SETTINGS, &[tables.settings])?;
        }
        if !is_as_before(|a, b| (&a.vips, &a.listeners) == (&b.vips, &b.listeners)) {
            self.set_hash(map_name::VIPS, &tables.vips)?;
            self.set_hash(map_name::LISTENERS, &tables.listeners)?;
        }
        if !is_as_before(|a, b| (&a.listener_ranges, &a.sources) == (&b.listener_ranges, &b.sources)) {
            self.set_trie(map_name::LISTENER_RANGES, &tables.listener_ranges)?;
            self.set_trie(map_name::SOURCES, &tables.sources)?;
        }
        if !is_as_before(|a, b| a.interfaces == b.interfaces) {
            self.set_hash(map_name::INTERFACES, &tables.interfaces)?;
        }
        if !is_as_before(|a, b| {
            (&a.tunnel_ports, &a.tunnel_endpoints) == (&b.tunnel_ports, &b.tunnel_endpoints)
                && (&a.tunnel_hops, &a.tunnel_peers) == (&b.tunnel_hops, &b.tunnel_peers)
        }) {
            self.set_tunnels(tables)?;
        }
        if !is_as_before(|a, b| (&a.groups, &a.slots) == (&b.groups, &b.slots)) {
            self.set_array(map_name::GROUPS, &tables.groups)?;
            self.set_array(map_name::SLOTS, &tables.slots)?;
        }
        if !is_as_before(|a, b| a.backends == b.backends) {
            self.set_array(map_name::BACKENDS, &tables.backends)?;
        }
        self.filled = Some(tables.clone());

        let keys = || {
            tables
                .flow_index
                .iter()
                .map(|(key, reference)| (*key, *reference))
        };
        let v4 = keys()
            .filter(|(key, _)| key.is_v4())
            .map(|(key, reference)| (key.v4(), reference));
        self.set_hash(map_name::FLOW_INDEX, &v4.collect())?;
        let v6 = keys().filter(|(key, _)| !key.is_v4());
        self.set_hash(map_name::FLOW_INDEX_V6, &v6.collect())?;
        self.set_array(map_name::LISTENER_LIVE, &tables.listeners_live)?;
        self.set_array(map_name::BACKEND_LIVE, &tables.backends_live)?;
        self.set_array(map_name::GROUP_TURNS, &tables.group_turns)?;
        self.set_hash(map_name::PERSISTENCE, &tables.persistence)?;
        self.set_hash(map_name::FRAGMENTS, &tables.fragments)?;
        self.set_counters(map_name::SYN_BUDGETS, &tables.syn_budgets)?;
        self.set_array(map_name::HANDSHAKES, &tables.handshakes)?;
        self.set_hash(map_name::SOURCE_RATES, &tables.source_rates)?;
        self.set_array(map_name::FLOWS, &tables.flows)?;
        self.set_array(map_name::FLOW_HINTS, &tables.hints)?;
        if self.held > 0 {
            self.drain_held_fragments()?;
        }
        self.drain_free_flows()?;
        let mut queue = self.free_flows()?;
        for id in &tables.free_flows {
            queue.push(AsPod(*id), 0)?;
        }
        self.set_on_each_cpu(map_name::BACKEND_HOPS, &tables.backend_hops)?;
        self.set_counters(map_name::ICMP_BUDGET, &[tables.icmp_budget])?;
        self.set_traffic(LISTENER_MAPS, &tables.listener_counters)?;
        self.set_traffic(BACKEND_MAPS, &tables.backend_counters)?;
        self.set_counters(map_name::REASON_COUNTERS, &tables.reason_counters)
    }

    /// These tables with what the data path writes read from the maps. Takes the queue of free flows apart:
    /// fill the maps anew before the next run.
    pub fn read(&mut self, tables: &MemoryTables) -> Result<MemoryTables> {
        let mut flow_index = self.hash::<FlowKey, FlowReference>(map_name::FLOW_INDEX_V6)?;
        let v4 = self.hash::<FlowKeyV4, FlowReference>(map_name::FLOW_INDEX)?;
        flow_index.extend(v4.into_iter().map(|(key, reference)| (key.long(), reference)));
        Ok(MemoryTables {
            flow_index,
            flows: self.array::<FlowEntry>(map_name::FLOWS)?,
            free_flows: self.drain_free_flows()?,
            group_turns: self.array::<Live>(map_name::GROUP_TURNS)?,
            persistence: self.hash::<PersistenceKey, Persistence>(map_name::PERSISTENCE)?,
            handshakes: self.array::<Handshake>(map_name::HANDSHAKES)?,
            fragments: self.hash::<FragmentKey, FragmentFlow>(map_name::FRAGMENTS)?,
            listeners_live: self.array::<Live>(map_name::LISTENER_LIVE)?,
            backends_live: self.array::<Live>(map_name::BACKEND_LIVE)?,
            listener_counters: self.traffic(LISTENER_MAPS, tables.listener_counters.len())?,
            backend_counters: self.traffic(BACKEND_MAPS, tables.backend_counters.len())?,
            reason_counters: self.reason_counters()?,
            ..tables.clone()
        })
    }

    /// Takes what the program has handed to the agent, which would not be able to hold any more.
    fn drain_held_fragments(&mut self) -> Result<()> {
        self.held = 0;
        let mut held = RingBuf::try_from(self.map(map_name::HELD)?)?;
        while held.next().is_some() {}
        Ok(())
    }

    /// What was counted per reason.
    pub fn reason_counters(&mut self) -> Result<Vec<ReasonCounters>> {
        self.counters::<ReasonCounters, 2>(map_name::REASON_COUNTERS, Reason::COUNT)
    }

    /// Runs a program on a frame that claims to have come in by an interface of the cases' network.
    ///
    /// # Errors
    /// When the kernel refuses the frame: it asks for an Ethernet header, and in tcx for the IP header as well.
    pub fn run(&mut self, program: Program, ifindex: u32, frame: &[u8]) -> Result<(Action, Vec<u8>)> {
        let mut output = std::mem::take(&mut self.output);
        let context = match program {
            Program::Native | Program::Generic => {
                // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
                bytemuck::bytes_of(&[0, frame.len() as u32, 0, ifindex, 0, 0]).to_vec()
            }
            Program::Tunnel => {
                // struct __sk_buff up to `ifindex`; all other fields that may be given stay zero.
                let mut context = [0_u32; 11];
                context[10] = ifindex;
                bytemuck::bytes_of(&context).to_vec()
            }
        };
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = match program {
            Program::Native => {
                object::program::<Xdp>(&mut self.ebpf, map_name::PROGRAM_XDP)?.test_run(options)
            }
            Program::Generic => {
                object::program::<Xdp>(&mut self.ebpf, map_name::PROGRAM_XDP_GENERIC)?.test_run(options)
            }
            Program::Tunnel => object::program::<SchedClassifier>(&mut self.ebpf, map_name::PROGRAM_TUNNEL)?
                .test_run(options),
        }
        .with_context(|| format!("{program:?} on {} bytes", frame.len()))?;
        let out = output[..result.data_size_out as usize].to_vec();
        self.output = output;
        let action = match (program, result.return_value) {
            // linux/bpf.h, enum xdp_action
            (Program::Native | Program::Generic, 1) => Action::Drop,
            (Program::Native | Program::Generic, 2) => Action::Pass,
            (Program::Native | Program::Generic, 3) => Action::Transmit,
            (Program::Native | Program::Generic, 4) => Action::Redirect,
            // linux/pkt_cls.h, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT
            (Program::Tunnel, 0) => Action::Pass,
            (Program::Tunnel, 2) => Action::Drop,
            (Program::Tunnel, 7) => Action::Redirect,
            (program, value) => bail!("{program:?} returned {value}"),
        };
        // What goes no further may have been handed to the agent.
        self.held += usize::from(action == Action::Drop);
        if self.held > MOST_HELD {
            self.drain_held_fragments()?;
        }
        Ok((action, out))
    }

    /// The maps' other handles, for [`Self::explain`].
    pub fn live_maps(&self) -> Result<LiveMaps> {
        Ok(LiveMaps::open(&self.ebpf)?)
    }

    /// What would become of these frames.
    pub fn explain(&self, maps: &LiveMaps, arrivals: &[Arrival<'_>]) -> Result<Vec<Walk>> {
        Ok(view::walk(maps, &self.ebpf, arrivals)?)
    }

    /// One entry of the flow table.
    pub fn flow(&mut self, id: FlowId) -> Result<FlowEntry> {
        let flows: Array<_, AsPod<FlowEntry>> = Array::try_from(self.map(map_name::FLOWS)?)?;
        Ok(flows.get(&id.0, 0)?.0)
    }

    fn map(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))
    }

    /// The tables of tunnels. Of the ports, which are too many to be written each time, those that were in use before.
    fn set_tunnels(&mut self, tables: &MemoryTables) -> Result<()> {
        self.set_hash(map_name::TUNNEL_ENDPOINTS, &tables.tunnel_endpoints)?;
        let hops = tables.tunnel_hops.iter();
        let hops = hops.map(|(key, peer)| {
            (
                *key,
                TunnelHop {
                    peer: *peer,
                    reserved: 0,
                },
            )
        });
        self.set_hash(map_name::TUNNEL_HOPS, &hops.collect())?;
        let peer = |id| tables.tunnel_peers.get(&PeerId(id)).copied();
        let peers: Vec<_> = (0..SIZES.tunnel_peers as u16)
            .map(|id| peer(id).unwrap_or(TunnelPeer::zeroed()))
            .collect();
        self.set_array(map_name::TUNNEL_PEERS, &peers)?;
        let stale = std::mem::take(&mut self.ports);
        let mut ports: Array<_, AsPod<TunnelPort>> = Array::try_from(self.map(map_name::TUNNEL_PORTS)?)?;
        for port in stale {
            ports.set(u32::from(port), AsPod(TunnelPort::default()), 0)?;
        }
        for (port, meaning) in &tables.tunnel_ports {
            ports.set(u32::from(*port), AsPod(*meaning), 0)?;
        }
        self.ports = tables.tunnel_ports.keys().copied().collect();
        Ok(())
    }

    fn set_array<V: Pod>(&mut self, name: &str, values: &[V]) -> Result<()> {
        let mut array: Array<_, AsPod<V>> = Array::try_from(self.map(name)?)?;
        for (index, value) in (0..).zip(values) {
            array.set(index, AsPod(*value), 0)?;
        }
        Ok(())
    }

    fn array<V: Pod>(&mut self, name: &str) -> Result<Vec<V>> {
        let array: Array<_, AsPod<V>> = Array::try_from(self.map(name)?)?;
        (0..array.len())
            .map(|index| Ok(array.get(&index, 0)?.0))
            .collect()
    }

    fn set_hash<K: Pod, V: Pod>(&mut self, name: &str, entries: &StdHashMap<K, V>) -> Result<()> {
        let mut hash: HashMap<_, AsPod<K>, AsPod<V>> = HashMap::try_from(self.map(name)?)?;
        let stale: Vec<_> = hash.keys().collect::<Result<_, _>>()?;
        for key in stale {
            hash.remove(&key)?;
        }
        for (key, value) in entries {
            hash.insert(AsPod(*key), AsPod(*value), 0)?;
        }
        Ok(())
    }

    /// Keys are a number of bits and three words.
    fn set_trie<K: Pod, V: Pod>(&mut self, name: &str, entries: &StdHashMap<K, V>) -> Result<()> {
        let mut trie: LpmTrie<_, [u32; 5], AsPod<V>> = LpmTrie::try_from(self.map(name)?)?;
        let stale: Vec<_> = trie.keys().collect::<Result<_, _>>()?;
        for key in stale {
            trie.remove(&key)?;
        }
        for (key, value) in entries {
            let [bits, words @ ..]: [u32; 6] = bytemuck::cast(*key);
            trie.insert(&Key::new(bits, words), AsPod(*value), 0)?;
        }
        Ok(())
    }

    fn hash<K: Pod + Eq + Hash, V: Pod>(&mut self, name: &str) -> Result<StdHashMap<K, V>> {
        let hash: HashMap<_, AsPod<K>, AsPod<V>> = HashMap::try_from(self.map(name)?)?;
        hash.iter()
            .map(|entry| entry.map(|(key, value)| (key.0, value.0)).map_err(Into::into))
            .collect()
    }

    /// Puts the values on the first CPU and zeroes the others.
    fn set_counters<V: Pod>(&mut self, name: &str, values: &[V]) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let mut array: PerCpuArray<_, AsPod<V>> = PerCpuArray::try_from(self.map(name)?)?;
        for (index, value) in (0..).zip(values) {
            let mut per_cpu = vec![AsPod(V::zeroed()); cpus];
            per_cpu[0] = AsPod(*value);
            array.set(index, PerCpuValues::try_from(per_cpu)?, 0)?;
        }
        Ok(())
    }

    fn set_on_each_cpu<V: Pod>(&mut self, name: &str, values: &[V]) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let mut array: PerCpuArray<_, AsPod<V>> = PerCpuArray::try_from(self.map(name)?)?;
        for (index, value) in (0..).zip(values) {
            array.set(index, PerCpuValues::try_from(vec![AsPod(*value); cpus])?, 0)?;
        }
        Ok(())
    }

    fn set_traffic(&mut self, [carried, events]: [&str; 2], values: &[TrafficCounters]) -> Result<()> {
        let parts = |value: &TrafficCounters| {
            let mut value = *value;
            let (carried, events) = value.parts();
            (*carried, *events)
        };
        let (first, rest): (Vec<_>, Vec<_>) = values.iter().map(parts).unzip();
        let mut array: Array<_, AsPod<CarriedCounters>> = Array::try_from(self.map(carried)?)?;
        // As many for each CPU; all of it is the first one's.
        for index in 0..array.len() {
            let value = first.get(index as usize).copied().unwrap_or_default();
            array.set(index, AsPod(value), 0)?;
        }
        self.set_counters(events, &rest)
    }

    /// The first `count` values of each CPU, summed.
    fn traffic(&mut self, [carried, events]: [&str; 2], count: usize) -> Result<Vec<TrafficCounters>> {
        let all = self.array::<CarriedCounters>(carried)?;
        let events = self.counters::<EventCounters, 11>(events, count)?;
        let per_cpu = all.len() / nr_cpus().map_err(|(_, error)| error)?;
        let mut sums = Vec::new();
        for (index, events) in events.into_iter().enumerate() {
            let mut sum = TrafficCounters::new(CarriedCounters::default(), events);
            for carried in all.iter().skip(index).step_by(per_cpu) {
                sum.add_all(&TrafficCounters::new(*carried, EventCounters::default()));
            }
            sums.push(sum);
        }
        Ok(sums)
    }

    /// The first `count` values, summed over the CPUs; a value consists of `WORDS` counters.
    fn counters<V: Pod, const WORDS: usize>(&mut self, name: &str, count: usize) -> Result<Vec<V>> {
        let array: PerCpuArray<_, AsPod<V>> = PerCpuArray::try_from(self.map(name)?)?;
        (0..count as u32)
            .map(|index| {
                let mut total = [0_u64; WORDS];
                for copy in array.get(&index, 0)?.iter() {
                    let words: [u64; WORDS] = bytemuck::cast(copy.0);
                    for (total, word) in total.iter_mut().zip(words) {
                        *total += word;
                    }
                }
                Ok(bytemuck::cast(total))
            })
            .collect()
    }

    fn free_flows(&mut self) -> Result<Queue<&mut aya::maps::MapData, AsPod<FlowId>>> {
        Ok(Queue::try_from(self.map(map_name::FREE_FLOWS)?)?)
    }

    fn drain_free_flows(&mut self) -> Result<VecDeque<FlowId>> {
        let mut queue = self.free_flows()?;
        let mut ids = VecDeque::new();
        loop {
            match queue.pop(0) {
                Ok(AsPod(id)) => ids.push_back(id),
                Err(MapError::ElementNotFound) => return Ok(ids),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
