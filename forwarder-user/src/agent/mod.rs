//! The agent: one loop that waits for something to happen, derives what should be true, writes the difference.
//!
//! What can happen: a probe's result, a change of links, routes or neighbours, a finished diagnosis, a second has
//! passed, somebody asks for the status, a signal. Everything else is a function of what is known by then:
//! `state::desired` of configuration and observations, `state::plan` of the last desired state and the next.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::Ebpf;
use forwarder_common::abi::{
    backend::BackendId, counter::TrafficCounters, listener::ListenerId, reason::Reason, settings::flag,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::{error, info, warn};

use crate::{
    announce::Announcer,
    api::{self, Credentials, Request, Requests, StatusSource},
    config::{Config, OnStop},
    datapath::{
        attach::{Attachment, remove_filters},
        maps::{ControlMaps, CounterMaps},
        pin::PinDirectory,
    },
    diagnose::{self, Depth, Diagnosis, Subject},
    error::Error,
    fragments::FragmentHolder,
    health::{self, Health, ProbeFailure, Report, Target},
    inspect::Inspection,
    log_limit::tell_what_was_left_out,
    network::{self, Network},
    pool_watch::PoolWatch,
    state::{desired::Observations, ids::Capacity, names::Names, plan::Applied},
    status::Rates,
    sweep::{SweepThread, TimeoutTable},
};

mod change;
mod drain;
mod native;
mod own_file;
mod passive;
mod policy;
mod premises;
mod slow_start;
mod start;
mod status;
mod surroundings;
mod tables;
mod timing;
mod tunnels;

pub(crate) use policy::remove as remove_rules;
pub use premises::Premises;
pub(crate) use start::sizes;
pub use surroundings::PROBE_INTERFACE;
use surroundings::ProbeAddresses;
use tables::Tables;
use timing::{Event, Timing, Turn};

/// How often rates are computed.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// A backend that stays unhealthy is looked at again after this long: the first cause may have hidden another.
const DIAGNOSIS_INTERVAL: Duration = Duration::from_secs(3);
/// Diagnoses under way at once; each sends a dozen echo requests at most, in one second to four.
const MAX_DIAGNOSES: usize = 16;
/// Reports that may wait for the loop.
const QUEUE: usize = 1024;

/// A backend by group and name.
type BackendName = (String, String);

/// Runs the agent on its `premises`, with the configuration that was read from `file`, until SIGTERM or SIGINT; what
/// remains then is the configuration's choice; or until SIGUSR1, on which the data path remains for the next agent.
///
/// # Errors
/// When it cannot start, or the kernel refuses something on the way.
pub async fn run(config: Config, file: &Path, premises: Premises) -> Result<(), Error> {
    let mut signals = Signals::listen()?;
    let (pins, is_takeover) = (premises.pins.clone(), premises.is_takeover);
    match run_on(config, file, premises, &mut signals).await {
        Ok((OnStop::Keep, outcome)) => {
            info!("stopped: the data path goes on without an agent, and another one can take it over");
            outcome
        }
        Ok((OnStop::Detach, outcome)) => {
            remove_data_path(&pins).await?;
            info!("stopped: programs detached, nothing left behind");
            outcome
        }
        // What another agent has left goes on: it forwarded until now and still does.
        Err(error) if is_takeover => Err(error),
        Err(error) => {
            // The error that ended it is the one to tell.
            let _ = remove_data_path(&pins).await;
            Err(error)
        }
    }
}

/// Removes programs, maps and flows.
async fn remove_data_path(pins: &PinDirectory) -> Result<(), Error> {
    pins.remove()?;
    remove_filters(&Network::open()?.interfaces().await?, &[]);
    Ok(())
}

async fn run_on(
    config: Config,
    file: &Path,
    premises: Premises,
    signals: &mut Signals,
) -> Result<(OnStop, Result<(), Error>), Error> {
    let Premises {
        pins,
        is_takeover: _,
        metrics_listener,
        control_socket,
        remote,
    } = premises;
    let (remote_listener, credentials) = remote.unzip();
    let network = Network::open()?;
    let changes = network.watch().await?;

    let (mut agent, inspector) = Agent::start(config, file.to_owned(), network, &pins).await?;
    agent.credentials = credentials;
    let probe_addresses = ProbeAddresses::add(&agent).await?;
    if let Err(error) = policy::install(&agent.network, &agent.config).await {
        probe_addresses.remove(&agent).await;
        return Err(error);
    }

    let (source, requests) = StatusSource::channel();
    let (stop, stopped) = watch::channel(());
    let inspection = Inspection::from(inspector);
    let mut servers = vec![
        tokio::spawn(api::serve_metrics(
            metrics_listener,
            source.clone(),
            ended(stopped.clone()),
        )),
        tokio::spawn(api::serve_control(
            control_socket,
            source.clone(),
            inspection.clone(),
            ended(stopped.clone()),
        )),
    ];
    if let Some(listener) = remote_listener {
        let server = api::serve_remote(listener, source, inspection, ended(stopped));
        servers.push(tokio::spawn(server));
    }
    let outcome = agent.serve(signals, changes, requests).await;
    // A failure to say so changes nothing about the stop.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    drop(stop);
    for server in servers {
        if let Err(error) = server.await {
            error!(%error, "a server ended badly");
        }
    }
    // An agent that failed is started again, by whoever watches over it; traffic goes on until then.
    let (on_stop, outcome) = match outcome {
        Ok(on_stop) => (on_stop, Ok(())),
        Err(error) => (OnStop::Keep, Err(error)),
    };
    if on_stop == OnStop::Detach {
        probe_addresses.remove(&agent).await;
        if let Err(error) = agent.network.remove_made_tunnels(|_| false).await {
            error!(%error, "tunnel devices stay behind");
        }
        if let Err(error) = policy::remove(&agent.network).await {
            error!(%error, "policy rules stay behind");
        }
    }
    Ok((on_stop, outcome))
}

/// Ends when the agent does.
async fn ended(mut stopped: watch::Receiver<()>) {
    // Nothing is ever sent: it changes by being dropped.
    let _ = stopped.changed().await;
}

/// The signals that the agent listens to.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    user: Signal,
}

/// What a signal asks for.
enum Asked {
    Stop(&'static str),
    /// Another agent comes at once.
    MakeWay,
    Reload,
}

impl Signals {
    fn listen() -> Result<Self, Error> {
        let listen =
            |kind| signal(kind).map_err(|error| Error::failed(format!("cannot listen for signals: {error}")));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hang_up: listen(SignalKind::hangup())?,
            user: listen(SignalKind::user_defined1())?,
        })
    }

    async fn received(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Asked::Stop("SIGINT"),
            _ = self.hang_up.recv() => Asked::Reload,
            _ = self.user.recv() => Asked::MakeWay,
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
    /// It takes no new flows.
    drain: Option<drain::Drain>,
}

/// Counters at one time, for rates.
struct Sample {
    taken_at: Instant,
    listeners: HashMap<ListenerId, TrafficCounters>,
    backends: HashMap<BackendId, TrafficCounters>,
}

struct Agent {
    config: Arc<Config>,
    /// Where the configuration was read from at start; SIGHUP reads it again.
    own_file: own_file::OwnFile,
    capacity: Capacity,
    /// Keys that the flow index has room for.
    flow_keys: u32,
    /// The same of IPv6.
    flow_keys_v6: u32,
    network: Network,
    pins: Arc<PinDirectory>,
    /// Holds the programs; their links are pinned.
    _ebpf: Arc<Mutex<Ebpf>>,
    flush_program_log: Box<dyn FnMut() + Send>,
    control: ControlMaps,
    counters: CounterMaps,
    sweep: SweepThread,
    /// As the sweep has them.
    timeouts: TimeoutTable,
    attachments: Vec<Attachment>,
    links_down: HashSet<String>,
    observed: Observations,
    applied: Applied,
    /// Number of the last sweep when something left the configuration last.
    left_at_sweep: u64,
    notes: BTreeMap<BackendName, BackendNotes>,
    tables: Tables,
    tunnels: tunnels::Tunnels,
    native: native::Verdicts,
    /// Far ends of tunnels that may be native, with the address they are sent to from, and what was carried to each
    /// when the tunnels were surveyed.
    ways: Vec<(IpAddr, Option<IpAddr>)>,
    way_mtus: Vec<Option<u32>>,
    /// Entries that each table of tunnels has room for.
    tunnel_room: usize,
    sample: Sample,
    listener_rates: HashMap<ListenerId, Rates>,
    /// SYN cookies per second.
    cookie_rates: HashMap<ListenerId, f64>,
    backend_rates: HashMap<BackendId, Rates>,
    warnings: Vec<String>,
    /// Warnings about VLANs whose tags native XDP does not see.
    hidden_tags: Vec<String>,
    /// The kernel did not answer when the network had changed.
    has_to_look_again: bool,
    pool_watch: PoolWatch,
    passive: passive::PassiveChecks,
    /// Who was ejected when flows were ended last.
    suspects: HashSet<BackendName>,
    /// What readers of the API over TCP have to show; none without `[agent.api]`.
    credentials: Option<watch::Sender<Credentials>>,
    /// For those who look at the live maps.
    names: watch::Sender<Arc<Names>>,
    started_at: Instant,
    timing: Timing,
    announcer: Announcer,
    /// Sends on what came too early, until the agent ends.
    _fragments: FragmentHolder,
    /// Every backend has been heard of once.
    is_ready: bool,
}

impl Agent {
    /// The loop; what is to remain after it.
    async fn serve(
        &mut self,
        signals: &mut Signals,
        mut changes: network::Watch,
        mut requests: Requests,
    ) -> Result<OnStop, Error> {
        let (report_sender, mut reports) = mpsc::channel(QUEUE);
        let (diagnosis_sender, mut diagnoses) = mpsc::channel(QUEUE);
        let diagnosing = Arc::new(Semaphore::new(MAX_DIAGNOSES));
        let targets = self.targets();
        let mut unheard: HashSet<BackendName> = targets
            .iter()
            .map(|target| (target.group.clone(), target.backend.clone()))
            .collect();
        let health = health::start(
            targets,
            self.observed.health.clone(),
            self.config.snat.probes,
            report_sender,
        );
        let mut heard = Vec::new();
        let (tunnel_sender, mut tunnel_reports) = mpsc::channel(QUEUE);
        let tunnels = health::start(
            self.tunnel_targets(),
            HashMap::new(),
            self.config.snat.probes,
            tunnel_sender,
        );
        let is_watched = sd_notify::watchdog_enabled().is_some();
        let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if !self.is_ready && unheard.is_empty() && !self.tables.cache.is_behind() {
                self.is_ready = true;
                info!(
                    "ready: {} listeners, {} backends",
                    self.applied.ids.listeners.len(),
                    self.applied.ids.backends.len()
                );
                if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                    warn!(%error, "the service manager could not be notified");
                }
            }
            let turn = Turn::default();
            tokio::select! {
                asked = turn.on(Event::Signal, signals.received()) => match asked {
                    Asked::Stop(signal) => {
                        info!("{signal}: stopping");
                        return Ok(self.config.agent.on_stop);
                    }
                    Asked::MakeWay => {
                        info!("SIGUSR1: making way for the next agent");
                        return Ok(OnStop::Keep);
                    }
                    Asked::Reload => self.reload_and_follow("SIGHUP", &health, &tunnels, &mut unheard).await?,
                },
                // All that wait, so that a thousand transitions at once are one change of the tables.
                1.. = turn.on(Event::Probe, reports.recv_many(&mut heard, QUEUE)) => {
                    let mut is_news = false;
                    for report in heard.drain(..) {
                        let name = (report.target.group.clone(), report.target.backend.clone());
                        is_news |= self.heard(&name, &report);
                        unheard.remove(&name);
                        self.diagnose_if_due(&name, &report, &diagnosing, &diagnosis_sender);
                    }
                    if is_news {
                        self.reconcile()?;
                    }
                }
                Some(event) = turn.on(Event::Passive, self.passive.happened()) => self.judged(&event)?,
                Some(built) = turn.on(Event::Table, self.tables.built()) => self.take_table(built)?,
                Some(report) = turn.on(Event::TunnelProbe, tunnel_reports.recv()) => {
                    if self.tunnel_heard(&report, &health).await {
                        self.reconcile()?;
                    }
                }
                Some((name, diagnosis)) = turn.on(Event::Diagnosis, diagnoses.recv()) => self.diagnosed(&name, diagnosis),
                changed = turn.on(Event::Network, changes.changed()) => match changed {
                    Some(changed) => self.network_changed(&changed).await?,
                    None => return Err(Error::failed("the kernel ended the subscription to network changes")),
                },
                _ = turn.on(Event::Tick, ticks.tick()) => {
                    self.pins.note_sign_of_life();
                    self.take_sample()?;
                    self.sweep.check()?;
                    self.look_for_trouble().await;
                    self.look_again().await?;
                    self.look_at_ways().await?;
                    self.announcer.tick();
                    self.forget_what_has_left()?;
                    self.look_after_drains();
                    self.go_on_with_slow_starts()?;
                    (self.flush_program_log)();
                    tell_what_was_left_out();
                    if self.config.agent.reload_on_change && self.own_file.has_changed() {
                        self.reload_and_follow("it has changed", &health, &tunnels, &mut unheard).await?;
                    }
                    // From here, so that a loop that stands still is noticed and the agent started anew.
                    if is_watched {
                        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                    }
                }
                Some(request) = turn.on(Event::Request, requests.next()) => match request {
                    Request::Status(reply) => reply.send(self.status()?),
                    Request::Backend(path, reply) => reply.send(self.backend(&path)),
                    Request::Order(order, reply) => reply.send(self.ordered(&order)),
                    Request::Capture(on, reply) => reply.send(self.capture(on)),
                    Request::Change { submission, apply, asked_at, reply } => {
                        let outcome = self.submitted(&submission, apply);
                        let mut followed = Ok(());
                        if apply && outcome.is_ok() {
                            followed = self.follow_change(&health, &tunnels, &mut unheard).await;
                            self.timing.change_applied(asked_at);
                        } else if apply {
                            self.timing.change_refused();
                        }
                        // Whoever reads "applied" may rely on its rules and routes as well.
                        reply.send(outcome);
                        followed?;
                    }
                },
            }
            self.timing.turn_ended(turn);
        }
    }

    /// Has the programs look for packets that somebody wants to see, or stop that.
    fn capture(&mut self, on: bool) -> Result<(), Error> {
        if on {
            self.observed.flags |= flag::CAPTURE;
        } else {
            self.observed.flags &= !flag::CAPTURE;
        }
        self.reconcile()
    }

    /// Reads the agent's own file again, with all that follows.
    async fn reload_and_follow(
        &mut self,
        why: &str,
        health: &health::Watch,
        tunnels: &health::Watch,
        unheard: &mut HashSet<BackendName>,
    ) -> Result<(), Error> {
        let asked_at = Instant::now();
        let is_applied = self.reload(why);
        self.follow_change(health, tunnels, unheard).await?;
        if is_applied {
            self.timing.change_applied(asked_at);
        }
        Ok(())
    }

    /// What a change of the configuration means for the network around the tables.
    async fn follow_change(
        &mut self,
        health: &health::Watch,
        tunnels: &health::Watch,
        unheard: &mut HashSet<BackendName>,
    ) -> Result<(), Error> {
        // The tables have changed; a rule that cannot be added shows in probes as well.
        if let Err(error) = policy::install(&self.network, &self.config).await {
            error!("{error}");
        }
        self.watch(health, unheard);
        self.survey_tunnels().await?;
        self.look_at_routes().await;
        self.reconcile()?;
        if self.tunnels_changed(tunnels, health) {
            self.reconcile()?;
        }
        self.resolve_next_hops().await;
        self.look_where_to_announce(false).await;
        Ok(())
    }

    /// Has the backends of a changed configuration probed.
    fn watch(&self, health: &health::Watch, unheard: &mut HashSet<BackendName>) {
        let targets = self.targets();
        let names: HashSet<_> = targets
            .iter()
            .map(|target| (target.group.clone(), target.backend.clone()))
            .collect();
        unheard.retain(|name| names.contains(name));
        health.update(targets);
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

    /// Notes what a probe has found; `true`: the tables have to follow.
    fn heard(&mut self, name: &BackendName, report: &Report) -> bool {
        let (group, backend) = name;
        self.timing.probed(report);
        if self.tunnels.hold(name) {
            return false;
        }
        self.passive_heard(name, report);
        if let Some(notes) = self.notes.get_mut(name) {
            if let Err(failure @ (ProbeFailure::CannotProbe(_) | ProbeFailure::SourceNotLocal(_))) =
                &report.result
                && notes.failure.as_ref() != Some(failure)
            {
                warn!(group, backend, "its health stays as it is: {failure}");
            }
            notes.failure = report.result.as_ref().err().cloned();
            if notes.failure.is_none() {
                notes.diagnosis = None;
            }
        }
        let Some(health) = report.transition else {
            return false;
        };
        match (&report.result, health) {
            (Err(failure), Health::Unhealthy) => {
                warn!(group, backend, address = %report.target.address, "unhealthy: {failure}");
            }
            _ => info!(group, backend, address = %report.target.address, "{health}"),
        }
        self.observed.health.insert(name.clone(), health);
        true
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
        let is_held = self.tunnels.hold(name);
        let Some(notes) = self.notes.get_mut(name).filter(|_| !is_held) else {
            return;
        };
        let is_recent = notes
            .diagnosed_at
            .is_some_and(|at| at.elapsed() < DIAGNOSIS_INTERVAL);
        if notes.is_being_diagnosed || (is_recent && report.transition.is_none()) {
            return;
        }
        notes.is_being_diagnosed = true;
        // Somebody waits for the first word; those after it may take their time.
        let depth = if notes.diagnosis.is_none() {
            Depth::Quick
        } else {
            Depth::Thorough
        };
        let subject = subject(&self.config, report.target.address);
        let (network, failure, name) = (self.network.clone(), failure.clone(), name.clone());
        let (diagnosing, sender) = (diagnosing.clone(), sender.clone());
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _permit = diagnosing.acquire().await;
            let diagnosis = diagnose::diagnose(&network, &subject, &failure, depth).await;
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
        if notes.failure.is_none() || self.tunnels.hold(name) {
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

    /// Tells those who look at the live maps what numbers stand for.
    fn publish_names(&self) {
        let names = Names::of(&self.config, &self.applied.ids, &self.attachments);
        self.names.send_replace(Arc::new(names));
    }

    fn read_sample(&self) -> Result<Sample, Error> {
        let mut sample = Sample {
            taken_at: Instant::now(),
            listeners: HashMap::new(),
            backends: HashMap::new(),
        };
        for id in self.applied.ids.listeners.values() {
            sample.listeners.insert(*id, self.counters.listener(*id)?);
        }
        for id in self.applied.ids.backends.values() {
            sample.backends.insert(*id, self.counters.backend(*id)?);
        }
        Ok(sample)
    }

    /// Reads all counters and computes rates since the last time.
    fn take_sample(&mut self) -> Result<(), Error> {
        let sample = self.read_sample()?;
        let elapsed = sample.taken_at - self.sample.taken_at;
        self.listener_rates = status::rates(&self.sample.listeners, &sample.listeners, elapsed);
        self.cookie_rates = status::cookie_rates(&self.sample.listeners, &sample.listeners, elapsed);
        self.backend_rates = status::rates(&self.sample.backends, &sample.backends, elapsed);
        self.sample = sample;
        let refused = self.counters.reason(Reason::POOL_EXHAUSTED)?.packets;
        let bindings = self.config.snat.bindings();
        if let Some(text) = self.pool_watch.look(Instant::now(), refused, bindings) {
            warn!("{text}");
        }
        Ok(())
    }
}

/// What a diagnosis has to know of a backend.
fn subject(config: &Config, backend: SocketAddr) -> Subject {
    let remote = config.networks.values().find_map(|network| {
        let cidr = network.cidrs.iter().find(|cidr| cidr.contains(&backend.ip()))?;
        Some((*cidr, network.tunnel.clone()))
    });
    Subject {
        backend,
        probe_source: config.snat.probes.towards(backend.ip()),
        snat_prefixes: config.snat.prefixes_of(backend.ip()),
        remote,
    }
}
