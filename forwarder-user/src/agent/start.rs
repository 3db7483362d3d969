//! The agent's start: on new tables, or on those that an earlier agent has left and that carry traffic.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::Read as _,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use forwarder_common::abi::{
    backend::GroupId,
    flow::FlowId,
    interface::Interface,
    snat::{PORTS_PER_ADDRESS, SnatPool},
};
use nix::unistd::{SysconfVar, sysconf};
use tokio::sync::watch;
use tracing::{debug, info};

use super::{
    Agent, BackendNotes, Sample, own_file::OwnFile, passive::PassiveChecks, tables::Tables, timing::Timing,
};
use crate::{
    announce::Announcer,
    capture::Capturer,
    config::{self, Config, NatMode, TableSizes},
    datapath::{
        attach::{self, Attachment, AttachmentKind},
        capture::CaptureMaps,
        flows::{Sweeper, Timeouts},
        free_list::Handover,
        held::HeldMaps,
        maps,
        object::{self, Sizes},
        pin::PinDirectory,
        reader,
        view::{Live, LiveMaps},
        watch::BackendWatch,
    },
    error::Error,
    fragments::FragmentHolder,
    inspect::Inspector,
    network::{self, Network},
    pool_watch::PoolWatch,
    reset::ResetSender,
    state::{
        bonds,
        desired::{Desired, Observations, pool},
        ids::{Capacity, Ids},
        inherit::inherited_health,
        names::Names,
        overrides,
        placement::NoRoom,
        plan::Applied,
        vlans,
    },
    sweep::{SweepThread, TimeoutTable},
};

impl Agent {
    /// Loads, attaches, fills the tables. Where an earlier agent has left a data path, that goes on until the new
    /// programs replace the old ones, and nothing is touched if this one cannot take it over.
    pub(super) async fn start(
        config: Config,
        file: PathBuf,
        network: Network,
        pins: &Arc<PinDirectory>,
    ) -> Result<(Self, Inspector), Error> {
        let started_at = Instant::now();
        let own_file = OwnFile::new(file);
        super::native::make_tunnels(&network, &config).await?;
        let mut links = Vec::new();
        for name in config.interfaces.keys().chain(config.tunnels.keys()) {
            links.push(existing(&network, name).await?);
        }
        let is_takeover = pins.is_in_use()?;
        let sizes = object::adopt(pins, &sizes(&config))?;
        let (old_lists, free_list) = pins.free_lists()?;
        let mut ebpf = object::load_pinned(&sizes, pins, &free_list)?;
        let program_log = program_log(&mut ebpf);
        let live_maps = LiveMaps::open(&ebpf)?;
        let backend_watch = BackendWatch::open(&ebpf)?;
        let held_maps = HeldMaps::open(&mut ebpf)?;
        let capturer = Capturer::new(CaptureMaps::open(&mut ebpf)?);
        let (control, mut flow_maps, counters) = maps::take(&mut ebpf, &sizes, Some(pins))?;
        let before = reader::read(&control)?;
        let capacity = Capacity {
            listeners: sizes.listeners,
            groups: sizes.groups,
            backends: sizes.backends,
            vips: sizes.vips,
        };
        let applied = take_over(&before, &config, &capacity, sizes.flows)
            // Nobody uses the new list yet.
            .inspect_err(|_| drop(pins.unpin(&free_list)))?;

        let reset_sender = ResetSender::open()?;
        let announcer = Announcer::open()?;
        let fragments = FragmentHolder::start(held_maps)?;
        let mut handover = Handover::open(old_lists, sizes.flows)?;
        handover.advance(&mut flow_maps)?;
        let all_links = network.interfaces().await?;
        let mut attachments = Vec::new();
        for link in &links {
            let ports = bonds::ports(&all_links, link.index);
            attachments.push(attached(&mut ebpf, pins, link, &ports, &config)?);
        }
        attach::detach_others(pins, &attachments)?;
        attach::remove_filters(&all_links, &attachments);
        pins.note_agent(&config.agent.control_socket)?;
        let found = handover.finish(&mut flow_maps, Some(pins))?;
        if is_takeover {
            info!(
                "took over the data path that is pinned in {}; {found} free flows had been lost",
                pins.path().display()
            );
        }
        let timeouts = timeouts(&config, &applied.ids);
        let sweep = SweepThread::start(Sweeper::resume(flow_maps), timeouts.clone(), reset_sender);

        let (interfaces, hidden_tags) = around(&network, &attachments).await?;
        let observed = Observations {
            health: inherited_health(&before, &HashMap::new(), &config, &applied.ids),
            slow_starts: BTreeMap::new(),
            now: Duration::ZERO,
            overrides: overrides::named(&before.desired.overrides, &applied.ids),
            interfaces,
            ejected: HashSet::new(),
            tunnels: before.desired.tunnels.clone(),
            // Flows ask for their routes anew: the programs or the interfaces may be others.
            route_generation: before.desired.settings.route_generation.wrapping_add(1),
            flags: attachments
                .iter()
                .fold(0, |flags, one| flags | one.settings_flags),
            cookie_key: match before.desired.settings.cookie_key {
                [0, 0] => random_key()?,
                key => key,
            },
            cpus: online_cpus(),
            filters: before.desired.settings.filters,
        };
        let ebpf = Arc::new(Mutex::new(ebpf));
        let (names, names_seen) = watch::channel(Arc::new(Names::of(&config, &applied.ids, &attachments)));
        let inspector = Inspector {
            live: Live::new(live_maps, ebpf.clone()),
            names: names_seen,
            sweep: sweep.handle(),
            network: network.clone(),
            capturer,
        };
        let mut agent = Self {
            notes: applied
                .ids
                .backends
                .keys()
                .map(|name| (name.clone(), BackendNotes::default()))
                .collect(),
            links_down: links
                .iter()
                .filter(|link| !link.is_running())
                .map(|link| link.name.clone())
                .collect(),
            config: Arc::new(config),
            own_file,
            capacity,
            flow_keys: sizes.flow_keys,
            flow_keys_v6: sizes.flow_keys_v6,
            network,
            pins: pins.clone(),
            _ebpf: ebpf,
            flush_program_log: program_log,
            control,
            counters,
            sweep,
            timeouts,
            attachments,
            observed,
            applied: before,
            left_at_sweep: 0,
            tables: Tables::new(),
            tunnels: super::tunnels::Tunnels::default(),
            native: super::native::Verdicts::new(),
            ways: Vec::new(),
            way_mtus: Vec::new(),
            tunnel_room: sizes.tunnel_peers as usize,
            sample: Sample {
                taken_at: started_at,
                listeners: HashMap::new(),
                backends: HashMap::new(),
            },
            listener_rates: HashMap::new(),
            cookie_rates: HashMap::new(),
            backend_rates: HashMap::new(),
            warnings: Vec::new(),
            hidden_tags,
            has_to_look_again: false,
            pool_watch: PoolWatch::default(),
            passive: PassiveChecks::start(backend_watch),
            suspects: HashSet::new(),
            names,
            started_at,
            timing: Timing::default(),
            credentials: None,
            announcer,
            _fragments: fragments,
            is_ready: false,
        };
        agent.look_for_trouble().await;
        agent.survey_tunnels().await?;
        agent.look_at_routes().await;
        let mut tables = agent.tables.cache.now();
        let desired = Desired::with_tables(&agent.config, &applied.ids, &agent.observed, &mut tables);
        let tables = tables.finish();
        agent.write(Applied { desired, ..applied })?;
        agent.tables.cache.replace(tables);
        agent.sample = agent.read_sample()?;
        agent.configure_passive();
        agent.resolve_next_hops().await;
        agent.look_where_to_announce(true).await;
        Ok((agent, inspector))
    }
}

/// Attaches the program that belongs on this interface, or replaces the one that is there.
fn attached(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    link: &network::Interface,
    ports: &[&network::Interface],
    config: &Config,
) -> Result<Attachment, Error> {
    let attachment = match config.interfaces.get(&link.name) {
        Some(wanted) => {
            let (attachment, why_generic) = attach::attach_xdp(ebpf, pins, link, ports, wanted)?;
            if let Some(why) = why_generic {
                info!(interface = link.name, "generic XDP: {why}");
            }
            attachment
        }
        None => attach::attach_tunnel(ebpf, pins, link)?,
    };
    info!(interface = link.name, kind = %link.kind, "attached: {}", attachment.kind.name());
    Ok(attachment)
}

/// Numbers and places for `config` on the tables as they are; contents are still the old ones.
fn take_over(before: &Applied, config: &Config, capacity: &Capacity, flows: u32) -> Result<Applied, Error> {
    let old_pool = before.desired.settings.pool;
    if old_pool != SnatPool::default() && !keeps_bindings(&old_pool, &pool(&config.snat), flows) {
        return Err(Error::host(
            "snat.prefixes gives flows other addresses than those that the pinned tables hold",
        )
        .hint(
            "write the old prefixes in the old order, new ones behind them; or `forwarder detach` first: flows end",
        ));
    }
    // All of them are worth knowing, but one is enough to stop at.
    let ids = before.ids.next(config, capacity).map_err(|errors| {
        errors
            .into_iter()
            .next()
            .unwrap_or_else(|| Error::failed("no room"))
    })?;
    let placement = before
        .placement
        .arrange(group_sizes(config, &ids))
        .map_err(no_room)?;
    Ok(Applied {
        ids,
        placement,
        desired: before.desired.clone(),
    })
}

/// Slots that the tables of each group take at a time.
pub(super) fn group_sizes(config: &Config, ids: &Ids) -> Vec<(GroupId, u32)> {
    config
        .groups
        .iter()
        .map(|(name, group)| (ids.groups[name], TableSizes::of(group, &config.groups).sum()))
        .collect()
}

pub(super) fn no_room(error: NoRoom) -> Error {
    Error::usage(format!(
        "the old and the new tables of the backend groups do not fit side by side: {error}"
    ))
    .hint("change fewer groups at a time; or `forwarder detach`, then start with a higher agent.max_slots: flows end")
}

/// Do flows keep their addresses and ports when the pool changes so?
pub(super) fn keeps_bindings(before: &SnatPool, after: &SnatPool, flows: u32) -> bool {
    (0..flows)
        .step_by(PORTS_PER_ADDRESS as usize)
        .map(FlowId)
        .all(|id| {
            [true, false].into_iter().all(|is_v4| {
                let held = before.binding(id, is_v4);
                held.is_none() || held == after.binding(id, is_v4)
            })
        })
}

/// What the data path has to know of interfaces: of those that it is attached to, of VLAN devices on top of them and of
/// the ports of bonds; and warnings about tags that it does not see.
pub(super) async fn around(
    network: &Network,
    attachments: &[Attachment],
) -> Result<(BTreeMap<u32, Interface>, Vec<String>), Error> {
    let mut all: BTreeMap<_, _> = attachments
        .iter()
        .map(|one| (one.ifindex, one.interface))
        .collect();
    let links = network.interfaces().await?;
    let below = bonds::entries(&links, &all);
    let above = vlans::entries(&links, &all);
    all.extend(below);
    all.extend(above);
    let native = attachments
        .iter()
        .filter(|one| one.kind == AttachmentKind::XdpNative);
    let warnings = native
        .flat_map(|one| vlans::hidden(&links, one.ifindex, network::offloads))
        .map(|hidden| format!("{hidden}; {}", hidden.command()));
    Ok((all, warnings.collect()))
}

/// An interface of the configuration, which has to exist.
async fn existing(network: &Network, name: &str) -> Result<network::Interface, Error> {
    if let Some(link) = network.interface(name).await? {
        return Ok(link);
    }
    let names: Vec<_> = network
        .interfaces()
        .await?
        .into_iter()
        .map(|link| link.name)
        .collect();
    Err(Error::host(format!("interface \"{name}\" does not exist"))
        .hint(format!("interfaces of this host: {}", names.join(", "))))
}

/// Table sizes that a configuration needs.
pub(crate) fn sizes(config: &Config) -> Sizes {
    let has_dnat = config.groups.values().any(|group| group.nat == NatMode::Dnat);
    let backends: usize = config.groups.values().map(|group| group.backends.len()).sum();
    let listeners = config.listeners.values();
    let ranges = listeners
        .clone()
        .filter(|listener| listener.ports.single().is_none())
        .map(|listener| listener.ports.prefixes().len() * listener.vips.len())
        .sum();
    let sources = listeners
        .clone()
        .flat_map(|listener| &listener.sources)
        .map(Vec::len)
        .sum();
    // A listener has its ports on each of its VIPs.
    let keys: usize = listeners.clone().map(|listener| listener.vips.len()).sum();
    let (_, has_v6) = config.families();
    let flow_keys = config
        .agent
        .max_flows
        .saturating_mul(if has_dnat { 2 } else { 1 });
    Sizes {
        flows: config.agent.max_flows,
        flow_keys,
        flow_keys_v6: if has_v6 { flow_keys } else { 1 },
        slots: config.agent.max_slots,
        groups: config.groups.len() as u32,
        backends: backends as u32,
        listeners: keys as u32,
        listener_ranges: at_least_one(ranges),
        sources: at_least_one(sources),
        vips: config.vips().len() as u32,
        interfaces: (config.interfaces.len() + config.tunnels.len()) as u32,
        // How many neighbours there are on a tunnel's device is found out later.
        tunnel_peers: at_least_one(config.tunnels.len()),
        persistence: config.agent.max_persistent_clients,
        source_rates: RATED_PREFIXES,
    }
}

/// Prefixes of clients whose rate is known: 8 MB. More than that at once are as good as forged, and of those one is
/// forgotten for another.
const RATED_PREFIXES: u32 = 65_536;

/// CPUs that packets may come to now.
fn online_cpus() -> u32 {
    sysconf(SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten()
        .and_then(|cpus| u32::try_from(cpus).ok())
        .unwrap_or(1)
}

/// A key that nobody can guess.
fn random_key() -> Result<[u64; 2], Error> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| {
            Error::host(format!("cannot read /dev/urandom, for a key: {error}"))
                .hint("every Linux has it; in a container, mount /dev")
        })?;
    let [low, high]: [[u8; 8]; 2] = bytemuck::cast(bytes);
    Ok([low, high].map(u64::from_le_bytes))
}

/// The kernel makes no map without entries.
fn at_least_one(entries: usize) -> u32 {
    (entries as u32).max(1)
}

/// How long each listener's flows live.
pub(super) fn timeouts(config: &Config, ids: &Ids) -> TimeoutTable {
    let of = |listener: &config::Listener| Timeouts {
        idle: listener.idle_timeout,
        closing: listener.closing_timeout,
        half_open: listener.half_open_timeout,
        reset_on_idle: listener.reset_on_idle,
    };
    let listeners = config.listeners.iter();
    listeners
        .map(|(name, listener)| (ids.listeners[name], of(listener)))
        .collect()
}

/// Lets the programs' own messages join the agent's log, at debug level, each time it is called.
fn program_log(ebpf: &mut Ebpf) -> Box<dyn FnMut() + Send> {
    match EbpfLogger::init(ebpf) {
        Ok(mut logger) => Box::new(move || logger.flush()),
        // The programs run without.
        Err(error) => {
            debug!(%error, "the programs' messages are not available");
            Box::new(|| ())
        }
    }
}
