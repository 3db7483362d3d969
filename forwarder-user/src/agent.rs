//! The agent: one loop that waits for something to happen, derives what should be true, writes the difference.
//!
//! What can happen: a probe's result, a change of links, routes or neighbours, a finished diagnosis, a second has
//! passed, somebody asks for the status, a signal. Everything else is a function of what is known by then:
//! `state::desired` of configuration and observations, `state::plan` of the last desired state and the next.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddrV4,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use forwarder_common::{
    abi::{
        backend::BackendId,
        counter::TrafficCounters,
        listener::ListenerId,
        reason::{DESCRIPTIONS, Reason},
    },
    maglev,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::{debug, error, info, warn};

use crate::{
    api::{self, Requests, StatusSource},
    config::{self, Config, NatMode, Protocol},
    datapath::{
        attach::{self, Attachment, AttachmentKind},
        flows::{FlowCount, Sweeper, Timeouts},
        maps::{self, ControlMaps, CounterMaps},
        object::{self, Sizes},
        view::{Live, LiveMaps},
        writer,
    },
    diagnose::{self, Diagnosis, Subject},
    error::Error,
    health::{self, Health, ProbeFailure, Report, Target},
    inspect::{self, Inspector},
    network::{self, LinkState, Network, RpFilter},
    pool_watch::PoolWatch,
    reset::ResetSender,
    state::{
        desired::{Desired, Observations},
        ids::Ids,
        names::Names,
        plan::{Placement, plan},
    },
    status::{
        BackendStatus, DiagnosisStatus, GroupStatus, InterfaceStatus, ListenerStatus, PoolStatus, Rates,
        ReasonStatus, Status, Traffic,
    },
    sweep::{Census, IdleResets, SweepThread, TimeoutTable},
};

/// How often rates are computed.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// A backend that stays unhealthy is looked at again after this long: the first cause may have hidden another.
const DIAGNOSIS_INTERVAL: Duration = Duration::from_secs(3);
/// Diagnoses under way at once; each sends a handful of echo requests.
const MAX_DIAGNOSES: usize = 4;
/// Reports that may wait for the loop.
const QUEUE: usize = 1024;

/// A backend by group and name.
type BackendName = (String, String);

/// Runs the agent until SIGTERM or SIGINT; leaves nothing behind.
///
/// # Errors
/// When it cannot start, or the kernel refuses something on the way.
pub async fn run(config: Config) -> Result<(), Error> {
    let mut signals = Signals::listen()?;
    let metrics_listener = api::bind_metrics(config.agent.metrics_address)?;
    let control_socket = api::bind_control(&config.agent.control_socket)?;
    let network = Network::open()?;
    let changes = network.watch().await?;

    let (mut agent, inspector) = Agent::start(config, network).await?;
    let probe_address = ProbeAddress::add(&agent).await?;

    let (source, requests) = StatusSource::channel();
    let (stop, stopped) = watch::channel(());
    let servers = [
        tokio::spawn(api::serve_metrics(
            metrics_listener,
            source.clone(),
            ended(stopped.clone()),
        )),
        tokio::spawn(api::serve_control(
            control_socket,
            source,
            inspect::routes(inspector),
            ended(stopped),
        )),
    ];
    let outcome = agent.serve(&mut signals, changes, requests).await;
    // A failure to say so changes nothing about the stop.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    drop(stop);
    for server in servers {
        if let Err(error) = server.await {
            error!(%error, "a server ended badly");
        }
    }
    probe_address.remove(&agent.network).await;
    info!("stopped: programs detached, nothing left behind");
    outcome
}

/// Ends when the agent does.
async fn ended(mut stopped: watch::Receiver<()>) {
    // Nothing is ever sent: it changes by being dropped.
    let _ = stopped.changed().await;
}

/// The signals that end the agent.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self, Error> {
        let listen =
            |kind| signal(kind).map_err(|error| Error::failed(format!("cannot listen for signals: {error}")));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The probe address, local while the agent runs.
struct ProbeAddress {
    address: std::net::Ipv4Addr,
    /// It was not there before.
    is_ours: bool,
}

/// Where the probe address is local.
const PROBE_INTERFACE: &str = "lo";

impl ProbeAddress {
    async fn add(agent: &Agent) -> Result<Self, Error> {
        let address = agent.config.snat.probe_address;
        let is_ours = agent.network.add_address(PROBE_INTERFACE, address).await?;
        Ok(Self { address, is_ours })
    }

    async fn remove(self, network: &Network) {
        if self.is_ours
            && let Err(error) = network.remove_address(PROBE_INTERFACE, self.address).await
        {
            error!(%error, "the probe address stays behind");
        }
    }
}

/// What is known of a backend besides its health.
#[derive(Default)]
struct BackendNotes {
    failure: Option<ProbeFailure>,
    diagnosis: Option<Diagnosis>,
    is_being_diagnosed: bool,
    diagnosed_at: Option<Instant>,
}

/// Counters at one time, for rates.
struct Sample {
    taken_at: Instant,
    listeners: HashMap<ListenerId, TrafficCounters>,
    backends: HashMap<BackendId, TrafficCounters>,
}

struct Agent {
    config: Arc<Config>,
    ids: Ids,
    network: Network,
    /// Holds the programs' links: dropping it detaches them.
    _ebpf: Arc<Mutex<Ebpf>>,
    flush_program_log: Box<dyn FnMut() + Send>,
    control: ControlMaps,
    counters: CounterMaps,
    sweep: SweepThread,
    attachments: Vec<Attachment>,
    links_down: HashSet<String>,
    observed: Observations,
    desired: Desired,
    placement: Placement,
    notes: BTreeMap<BackendName, BackendNotes>,
    shares: HashMap<BackendId, f64>,
    sample: Sample,
    listener_rates: HashMap<ListenerId, Rates>,
    backend_rates: HashMap<BackendId, Rates>,
    warnings: Vec<String>,
    pool_watch: PoolWatch,
    started_at: Instant,
}

impl Agent {
    /// Loads, attaches, fills the tables.
    async fn start(config: Config, network: Network) -> Result<(Self, Inspector), Error> {
        let started_at = Instant::now();
        let mut links = Vec::new();
        for name in config.interfaces.keys().chain(config.tunnels.keys()) {
            links.push(existing(&network, name).await?);
        }
        let sizes = sizes(&config);
        let mut ebpf = object::load(&sizes)?;
        let program_log = program_log(&mut ebpf);
        let live_maps = LiveMaps::open(&ebpf)?;
        let (control, flow_maps, counters) = maps::take(&mut ebpf, &sizes)?;
        let ids = Ids::assign(&config);
        let sweep = SweepThread::start(
            Sweeper::start(flow_maps)?,
            timeouts(&config, &ids),
            ResetSender::open()?,
        );

        let mut attachments = Vec::new();
        for link in &links {
            let attachment = match config.interfaces.get(&link.name) {
                Some(wanted) => {
                    let (attachment, why_generic) = attach::attach_xdp(&mut ebpf, link, wanted)?;
                    if let Some(why) = why_generic {
                        info!(interface = link.name, "generic XDP: {why}");
                    }
                    attachment
                }
                None => attach::attach_tunnel(&mut ebpf, link)?,
            };
            info!(interface = link.name, kind = %link.kind, "attached: {}", attachment.kind.name());
            attachments.push(attachment);
        }

        let placement = Placement::new(
            config
                .groups
                .iter()
                .map(|(name, group)| (ids.groups[name], maglev::size_for(group.backends.len()))),
        );
        let observed = Observations {
            health: HashMap::new(),
            interfaces: attachments
                .iter()
                .map(|one| (one.ifindex, one.interface))
                .collect(),
            route_generation: 1,
            flags: attachments
                .iter()
                .fold(0, |flags, one| flags | one.settings_flags),
        };
        let ebpf = Arc::new(Mutex::new(ebpf));
        // Nothing changes names while the agent runs.
        let (_, names) = watch::channel(Arc::new(Names::of(&config, &ids, &attachments)));
        let inspector = Inspector {
            live: Live::new(live_maps, ebpf.clone()),
            names,
            sweep: sweep.handle(),
            network: network.clone(),
        };
        let mut agent = Self {
            notes: ids
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
            ids,
            network,
            _ebpf: ebpf,
            flush_program_log: program_log,
            control,
            counters,
            sweep,
            attachments,
            observed,
            desired: Desired::empty(),
            placement,
            shares: HashMap::new(),
            sample: Sample {
                taken_at: started_at,
                listeners: HashMap::new(),
                backends: HashMap::new(),
            },
            listener_rates: HashMap::new(),
            backend_rates: HashMap::new(),
            warnings: Vec::new(),
            pool_watch: PoolWatch::default(),
            started_at,
        };
        agent.look_for_trouble().await?;
        agent.reconcile()?;
        agent.resolve_next_hops().await;
        Ok((agent, inspector))
    }

    /// The loop.
    async fn serve(
        &mut self,
        signals: &mut Signals,
        mut changes: network::Watch,
        mut requests: Requests,
    ) -> Result<(), Error> {
        let (report_sender, mut reports) = mpsc::channel(QUEUE);
        let (diagnosis_sender, mut diagnoses) = mpsc::channel(QUEUE);
        let diagnosing = Arc::new(Semaphore::new(MAX_DIAGNOSES));
        let targets = self.targets();
        let mut unheard: HashSet<BackendName> = targets
            .iter()
            .map(|target| (target.group.clone(), target.backend.clone()))
            .collect();
        let _health = health::start(targets, self.config.snat.probe_address, report_sender);
        let mut is_ready = false;
        let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if !is_ready && unheard.is_empty() {
                is_ready = true;
                info!(
                    "ready: {} listeners, {} backends",
                    self.ids.listeners.len(),
                    self.ids.backends.len()
                );
                if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                    warn!(%error, "the service manager could not be notified");
                }
            }
            tokio::select! {
                signal = signals.received() => {
                    info!("{signal}: stopping");
                    return Ok(());
                }
                Some(report) = reports.recv() => {
                    let name = (report.target.group.clone(), report.target.backend.clone());
                    self.heard(&name, &report)?;
                    unheard.remove(&name);
                    self.diagnose_if_due(&name, &report, &diagnosing, &diagnosis_sender);
                }
                Some((name, diagnosis)) = diagnoses.recv() => self.diagnosed(&name, diagnosis),
                changed = changes.changed() => match changed {
                    Some(changed) => self.network_changed(&changed).await?,
                    None => return Err(Error::failed("the kernel ended the subscription to network changes")),
                },
                _ = ticks.tick() => {
                    self.take_sample()?;
                    self.sweep.check()?;
                    self.look_for_trouble().await?;
                    (self.flush_program_log)();
                }
                Some(request) = requests.next() => request.answer(self.status()?),
            }
        }
    }

    /// Looks at the host's settings again; logs what is new.
    async fn look_for_trouble(&mut self) -> Result<(), Error> {
        let warnings = warnings(&self.network, &self.config, &self.links_down).await?;
        for warning in warnings.iter().filter(|warning| !self.warnings.contains(warning)) {
            warn!("{warning}");
        }
        self.warnings = warnings;
        Ok(())
    }

    /// Writes the difference between what is and what should be.
    fn reconcile(&mut self) -> Result<(), Error> {
        let next = Desired::of(&self.config, &self.ids, &self.observed);
        let writes = plan(&self.desired, &next, &mut self.placement);
        for write in &writes {
            debug!("write {write}");
        }
        writer::apply(&mut self.control, &writes)?;
        self.shares.clear();
        for group in next.groups.values() {
            let slot = 1.0 / group.slots.len() as f64;
            for backend in &group.slots {
                *self.shares.entry(*backend).or_default() += slot;
            }
        }
        self.desired = next;
        Ok(())
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for (name, group) in &self.config.groups {
            if let Some(check) = &group.health {
                targets.extend(
                    group
                        .backends
                        .iter()
                        .map(|(backend, at)| Target::new(name, backend, at, check)),
                );
            }
        }
        targets
    }

    fn heard(&mut self, name: &BackendName, report: &Report) -> Result<(), Error> {
        let (group, backend) = name;
        if let Some(notes) = self.notes.get_mut(name) {
            notes.failure = report.result.as_ref().err().cloned();
            if notes.failure.is_none() {
                notes.diagnosis = None;
            }
        }
        let Some(health) = report.transition else {
            return Ok(());
        };
        match (&report.result, health) {
            (Err(failure), Health::Unhealthy) => {
                warn!(group, backend, address = %report.target.address, "unhealthy: {failure}");
            }
            _ => info!(group, backend, address = %report.target.address, "{health}"),
        }
        self.observed.health.insert(name.clone(), health);
        self.reconcile()
    }

    /// Starts looking for the cause of a failure, if the backend is unhealthy and nobody is looking.
    fn diagnose_if_due(
        &mut self,
        name: &BackendName,
        report: &Report,
        diagnosing: &Arc<Semaphore>,
        sender: &mpsc::Sender<(BackendName, Diagnosis)>,
    ) {
        let (Err(failure), Some(Health::Unhealthy)) = (&report.result, report.health) else {
            return;
        };
        let Some(notes) = self.notes.get_mut(name) else {
            return;
        };
        let is_recent = notes
            .diagnosed_at
            .is_some_and(|at| at.elapsed() < DIAGNOSIS_INTERVAL);
        if notes.is_being_diagnosed || (is_recent && report.transition.is_none()) {
            return;
        }
        notes.is_being_diagnosed = true;
        let subject = subject(&self.config, report.target.address);
        let (network, failure, name) = (self.network.clone(), failure.clone(), name.clone());
        let (diagnosing, sender) = (diagnosing.clone(), sender.clone());
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _permit = diagnosing.acquire().await;
            let diagnosis = diagnose::diagnose(&network, &subject, &failure).await;
            // The loop has ended: nobody wants to know.
            let _ = sender.send((name, diagnosis)).await;
        });
    }

    fn diagnosed(&mut self, name: &BackendName, diagnosis: Diagnosis) {
        let Some(notes) = self.notes.get_mut(name) else {
            return;
        };
        notes.is_being_diagnosed = false;
        notes.diagnosed_at = Some(Instant::now());
        if notes.failure.is_none() {
            return;
        }
        let is_news = notes.diagnosis.as_ref().map(|known| known.cause) != Some(diagnosis.cause);
        if is_news {
            let (group, backend) = name;
            let hint = diagnosis.hint.as_deref().unwrap_or_default();
            warn!(group, backend, cause = %diagnosis.cause, hint, "{}", diagnosis.text);
        }
        notes.diagnosis = Some(diagnosis);
    }

    /// Makes every flow ask for its route anew, and says which attached links came or went.
    async fn network_changed(&mut self, changes: &network::Changes) -> Result<(), Error> {
        for change in &changes.links {
            if !self
                .attachments
                .iter()
                .any(|attachment| attachment.name == change.name)
            {
                continue;
            }
            match change.state {
                LinkState::Up => {
                    self.links_down.remove(&change.name);
                    info!(interface = change.name, "link up");
                }
                LinkState::Down => {
                    self.links_down.insert(change.name.clone());
                    warn!(interface = change.name, "link down");
                }
                LinkState::Gone => {
                    self.links_down.insert(change.name.clone());
                    error!(
                        interface = change.name,
                        "the interface is gone; restart the agent when it is back"
                    );
                }
            }
        }
        self.observed.route_generation = self.observed.route_generation.wrapping_add(1);
        self.reconcile()?;
        if changes.routes || changes.addresses || changes.overrun || !changes.links.is_empty() {
            self.resolve_next_hops().await;
        }
        Ok(())
    }

    /// Asks the kernel to find out the link addresses of the backends' next hops, before traffic needs them.
    async fn resolve_next_hops(&self) {
        let mut asked = HashSet::new();
        for backend in self
            .config
            .groups
            .values()
            .flat_map(|group| group.backends.values())
        {
            let Ok(route) = self.network.route_to(backend.address, None).await else {
                continue;
            };
            let next_hop = (route.interface, route.next_hop(backend.address));
            if asked.insert(next_hop)
                && let Err(error) = self.network.resolve_neighbour(next_hop.0, next_hop.1).await
            {
                debug!(%error, "next hop {} not resolved", next_hop.1);
            }
        }
    }

    /// Reads all counters and computes rates since the last time.
    fn take_sample(&mut self) -> Result<(), Error> {
        let mut sample = Sample {
            taken_at: Instant::now(),
            listeners: HashMap::new(),
            backends: HashMap::new(),
        };
        for id in self.ids.listeners.values() {
            sample.listeners.insert(*id, self.counters.listener(*id)?);
        }
        for id in self.ids.backends.values() {
            sample.backends.insert(*id, self.counters.backend(*id)?);
        }
        let elapsed = sample.taken_at - self.sample.taken_at;
        self.listener_rates = rates(&self.sample.listeners, &sample.listeners, elapsed);
        self.backend_rates = rates(&self.sample.backends, &sample.backends, elapsed);
        self.sample = sample;
        let refused = self.counters.reason(Reason::POOL_EXHAUSTED)?.packets;
        let bindings = self.config.snat.bindings();
        if let Some(text) = self.pool_watch.look(Instant::now(), refused, bindings) {
            warn!("{text}");
        }
        Ok(())
    }

    /// Everything that is known.
    fn status(&self) -> Result<Status, Error> {
        let census = self.sweep.census();
        let resets = self.sweep.idle_resets();
        let capacity = u64::from(self.config.agent.max_flows);
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_secs: self.started_at.elapsed().as_secs(),
            interfaces: Vec::new(),
            listeners: Vec::new(),
            groups: Vec::new(),
            pool: PoolStatus {
                capacity,
                used: census.used,
                free: capacity.saturating_sub(census.used),
            },
            reasons: Vec::new(),
            warnings: self.warnings.clone(),
        };
        for attachment in &self.attachments {
            status.interfaces.push(InterfaceStatus {
                name: attachment.name.clone(),
                attachment: attachment.kind.name().to_owned(),
                sends: attachment.kind == AttachmentKind::Tcx || attachment.interface.flags != 0,
                is_up: !self.links_down.contains(&attachment.name),
            });
        }
        for (name, listener) in &self.config.listeners {
            let id = self.ids.listeners[name];
            let count = census.listeners.get(&id).copied().unwrap_or_default();
            let rates = self.listener_rates.get(&id).copied().unwrap_or_default();
            let mut traffic = traffic(&self.counters.listener(id)?, count, rates);
            traffic.gateway_resets += resets.listeners.get(&id).copied().unwrap_or(0);
            status.listeners.push(ListenerStatus {
                name: name.clone(),
                vip: listener.vip,
                port: listener.ports.to_string(),
                protocol: match listener.protocol {
                    Protocol::Tcp => "tcp".to_owned(),
                    Protocol::Udp => "udp".to_owned(),
                },
                group: listener.group.clone(),
                traffic,
            });
        }
        for name in self.config.groups.keys() {
            status.groups.push(self.group_status(name, &census, &resets)?);
        }
        for description in DESCRIPTIONS {
            let counters = self.counters.reason(description.reason)?;
            status.reasons.push(ReasonStatus {
                name: description.name.to_owned(),
                verdict: description.verdict.name().to_owned(),
                packets: counters.packets,
                bytes: counters.bytes,
            });
        }
        Ok(status)
    }

    fn group_status(&self, name: &str, census: &Census, resets: &IdleResets) -> Result<GroupStatus, Error> {
        let group = &self.config.groups[name];
        let mut status = GroupStatus {
            name: name.to_owned(),
            nat: match group.nat {
                NatMode::Full => "full".to_owned(),
                NatMode::Dnat => "dnat".to_owned(),
            },
            healthy_backends: 0,
            unhealthy_backends: 0,
            traffic: Traffic::default(),
            backends: Vec::new(),
        };
        for (backend_name, backend) in &group.backends {
            let key = (name.to_owned(), backend_name.clone());
            let id = self.ids.backends[&key];
            let health = match (&group.health, self.observed.health.get(&key)) {
                (None, _) | (_, Some(Health::Healthy)) => "healthy",
                (_, Some(Health::Unhealthy)) => "unhealthy",
                (_, None) => "unknown",
            };
            if health == "healthy" {
                status.healthy_backends += 1;
            } else {
                status.unhealthy_backends += 1;
            }
            let count = census.backends.get(&id).copied().unwrap_or_default();
            let rates = self.backend_rates.get(&id).copied().unwrap_or_default();
            let mut traffic = traffic(&self.counters.backend(id)?, count, rates);
            traffic.gateway_resets += resets.backends.get(&id).copied().unwrap_or(0);
            status.traffic.add(&traffic);
            let notes = &self.notes[&key];
            status.backends.push(BackendStatus {
                name: backend_name.clone(),
                address: backend.address,
                port: backend.port,
                weight: backend.weight,
                health: health.to_owned(),
                share: self.shares.get(&id).copied().unwrap_or(0.0),
                failure: notes.failure.as_ref().map(ToString::to_string),
                diagnosis: notes.diagnosis.as_ref().map(|diagnosis| DiagnosisStatus {
                    cause: diagnosis.cause.name().to_owned(),
                    text: diagnosis.text.clone(),
                    hint: diagnosis.hint.clone(),
                }),
                traffic,
            });
        }
        Ok(status)
    }
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

/// Table sizes for a configuration.
fn sizes(config: &Config) -> Sizes {
    let has_dnat = config.groups.values().any(|group| group.nat == NatMode::Dnat);
    let backends: usize = config.groups.values().map(|group| group.backends.len()).sum();
    let listeners = config.listeners.values();
    let ranges = listeners
        .clone()
        .filter(|listener| listener.ports.single().is_none())
        .map(|listener| listener.ports.prefixes().len())
        .sum();
    let sources = listeners
        .flat_map(|listener| &listener.sources)
        .map(Vec::len)
        .sum();
    let vips: HashSet<_> = config.listeners.values().map(|listener| listener.vip).collect();
    Sizes {
        flows: config.agent.max_flows,
        flow_keys: config
            .agent
            .max_flows
            .saturating_mul(if has_dnat { 2 } else { 1 }),
        slots: config.agent.max_slots,
        groups: config.groups.len() as u32,
        backends: backends as u32,
        listeners: config.listeners.len() as u32,
        listener_ranges: at_least_one(ranges),
        sources: at_least_one(sources),
        vips: vips.len() as u32,
        interfaces: (config.interfaces.len() + config.tunnels.len()) as u32,
    }
}

/// The kernel makes no map without entries.
fn at_least_one(entries: usize) -> u32 {
    (entries as u32).max(1)
}

/// How long each listener's flows live.
fn timeouts(config: &Config, ids: &Ids) -> TimeoutTable {
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

/// What an operator should look at on this host.
async fn warnings(network: &Network, config: &Config, down: &HashSet<String>) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    if !network.ip_forward()? {
        warnings.push(
            "this host does not forward: traffic to tunnels and unresolved neighbours is dropped; \
             sysctl -w net.ipv4.ip_forward=1"
                .to_owned(),
        );
    }
    // A rewritten request goes up with a source of the pool, to which this host usually has no route.
    let is_pool_routed = match config.snat.ranges.first() {
        Some((first, _)) => network.route_to(*first, None).await.is_ok(),
        None => true,
    };
    for name in config.interfaces.keys() {
        // An interface that is gone has no setting; that it is gone is said elsewhere.
        let filter = network.rp_filter(name).unwrap_or(RpFilter::Off);
        if filter.drops_rewritten(is_pool_routed) {
            warnings.push(format!(
                "{name}: source validation drops rewritten requests on their way to a tunnel; \
                 sysctl -w net.ipv4.conf.{name}.rp_filter=0 net.ipv4.conf.all.rp_filter=0"
            ));
        }
    }
    warnings.extend(
        down.iter()
            .map(|name| format!("{name}: the link is down; ip link set {name} up")),
    );
    Ok(warnings)
}

/// What a diagnosis has to know of a backend.
fn subject(config: &Config, backend: SocketAddrV4) -> Subject {
    let remote = config.networks.values().find_map(|network| {
        let cidr = network.cidrs.iter().find(|cidr| cidr.contains(backend.ip()))?;
        Some((*cidr, network.tunnel.clone()))
    });
    Subject {
        backend,
        probe_source: config.snat.probe_address,
        snat_prefixes: config.snat.prefixes.clone(),
        remote,
    }
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

fn traffic(counters: &TrafficCounters, flows: FlowCount, rates: Rates) -> Traffic {
    Traffic {
        connections_opened: counters.flows_opened,
        connections_refused: counters.flows_refused,
        packets_in: counters.request_packets,
        bytes_in: counters.request_bytes,
        packets_out: counters.reply_packets,
        bytes_out: counters.reply_bytes,
        client_resets: counters.client_resets,
        backend_resets: counters.backend_resets,
        gateway_resets: counters.gateway_resets,
        flows: flows.active + flows.inactive,
        active_flows: flows.active,
        inactive_flows: flows.inactive,
        rates,
    }
}

fn rates<K: Copy + Eq + std::hash::Hash>(
    before: &HashMap<K, TrafficCounters>,
    after: &HashMap<K, TrafficCounters>,
    elapsed: Duration,
) -> HashMap<K, Rates> {
    let per_second =
        |before: u64, after: u64| after.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(1e-3);
    let rate = |key: &K, after: &TrafficCounters| {
        let before = before.get(key).copied().unwrap_or_default();
        Rates {
            connections: per_second(before.flows_opened, after.flows_opened),
            packets_in: per_second(before.request_packets, after.request_packets),
            bytes_in: per_second(before.request_bytes, after.request_bytes),
            packets_out: per_second(before.reply_packets, after.reply_packets),
            bytes_out: per_second(before.reply_bytes, after.reply_bytes),
        }
    };
    after
        .iter()
        .map(|(key, after)| (*key, rate(key, after)))
        .collect()
}
