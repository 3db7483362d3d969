//! Health checks: probes every backend through the path that traffic takes and says when its health turns.
//!
//! ```text
//! start() --> scheduler task --(due)--> Prober: tcp, http, ... --(result)--> Judge --> Report
//!    ^ update()      |  one probe per target, at most MAX_PROBES at once          |
//!    Watch           '---------------- schedule::Cadence <------------------------'
//! ```
//!
//! One task owns all state, so there are no locks and no order of events to wonder about. `judge` and
//! `schedule` are pure; `tcp`, `http`, `https`, `udp`, `grpc`, `icmp` and `command` do one probe each, `origin` says
//! where it leaves from. Tunnels are targets as well, of a watch of their own. A fault of the gateway itself (its probe
//! address is gone, no free descriptors) is reported but leaves health as it is: it would take out all backends
//! at once while traffic flows.
//!
//! This module knows neither maps nor routes. What a verdict leads to is the agent's business, why a probe fails
//! somewhere on the path is `diagnose`'s. A process with thousands of backends needs descriptors: one per
//! probe under way.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::{AbortHandle, JoinError, JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::config::{Backend, HealthCheck, PerFamily, Probe, TunnelCheck};

mod command;
pub mod failure;
mod grpc;
pub mod http;
mod https;
mod icmp;
pub mod judge;
pub mod origin;
pub mod schedule;
pub mod tcp;
#[cfg(test)]
mod testing;
mod udp;

pub use failure::{ProbeFailure, Stage};
pub use judge::{Health, Judge};
pub use origin::Origin;
use schedule::Cadence;

/// Probes under way at once. 10 000 backends at 2 s interval and 1 s timeout need 5 000 in the worst case, that
/// none answers; in any other, far fewer. Due probes beyond it wait their turn, which only lengthens intervals.
pub const MAX_PROBES: usize = 5000;

/// One backend to probe, or the far side of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the backend group, or of the tunnel.
    pub group: String,
    /// Name of the backend, unique in its group; empty of a tunnel.
    pub backend: String,
    /// Where the probe goes: the backend's address, and its port or the check's; port 0 where the probe needs none.
    pub address: SocketAddr,
    pub check: HealthCheck,
    /// The device that the probe leaves by, whatever the routes say; `None`: it leaves from the probe address.
    pub device: Option<Arc<str>>,
}

impl Target {
    /// The target that checks `backend`, called `name`, of `group`.
    #[must_use]
    pub fn new(group: &str, name: &str, backend: &Backend, check: &HealthCheck) -> Self {
        let port = match check.probe {
            Probe::Icmp => None,
            _ => check.port.or(backend.port),
        };
        Self {
            group: group.to_owned(),
            backend: name.to_owned(),
            address: SocketAddr::new(backend.address, port.unwrap_or(0)),
            check: check.clone(),
            device: None,
        }
    }

    /// The target that checks the tunnel that is called `name`.
    ///
    /// It is asked by the tunnel's device and from its address: the far side has to know that one, whereas a route back
    /// to the pool is the backends' affair.
    #[must_use]
    pub fn tunnel(name: &str, TunnelCheck { address, check }: &TunnelCheck) -> Self {
        Self {
            group: name.to_owned(),
            backend: String::new(),
            address: SocketAddr::new(*address, check.port.unwrap_or(0)),
            check: check.clone(),
            device: Some(name.into()),
        }
    }
}

/// What one probe found.
#[derive(Clone, Debug)]
pub struct Report {
    pub target: Arc<Target>,
    /// When the probe was to begin, by the schedule.
    pub due: Instant,
    /// When it began: later, if the machine was busy or too many probes were under way.
    pub began: Instant,
    /// The time until the answer (handshake, or head of the HTTP answer), or why there was none.
    pub result: Result<Duration, ProbeFailure>,
    /// The new health if this result changed it. The first result always does, unless it is a fault of the
    /// gateway itself ([`ProbeFailure::is_local`]), which never does.
    pub transition: Option<Health>,
    /// Health after this result; `None` only while no probe could leave the gateway.
    pub health: Option<Health>,
}

/// A group's and a backend's name.
type Name = (String, String);

/// A running set of health checks; dropping it stops them.
#[derive(Debug)]
pub struct Watch {
    targets: watch::Sender<Vec<Target>>,
    doubts: mpsc::UnboundedSender<Vec<Name>>,
    scheduler: JoinHandle<()>,
}

impl Watch {
    /// Replaces the whole list of targets.
    ///
    /// A target that did not change keeps its health and its schedule. One whose check changed keeps its health
    /// and is probed promptly; one whose address changed starts over as unknown. Of those that are gone nothing
    /// is reported any more. If a group and backend occur twice, the last one counts.
    pub fn update(&self, targets: Vec<Target>) {
        self.targets.send_replace(targets);
    }

    /// Takes these targets as unhealthy until they prove otherwise, and asks them promptly: the next success makes one
    /// healthy, whatever its `rise`. For those whose health was decided by something else in the meantime.
    pub fn doubt(&self, names: Vec<(String, String)>) {
        // The scheduler ends only with this watch, or when nobody reads its reports.
        let _ = self.doubts.send(names);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.scheduler.abort();
    }
}

/// Starts probing `targets`, each from the one of `sources` of its family; both must be this host's.
///
/// The first probes start within [`schedule::START_WINDOW`]. Every result is reported; when `reports` is full,
/// probing waits for the reader, and when its receiver is dropped, probing ends.
///
/// `known` is the health of targets that were probed before, by group and backend name: they need `fall` failures to
/// become unhealthy, where the first result decides on others.
///
/// # Panics
/// Outside of a tokio runtime.
#[must_use = "dropping the watch stops the checks"]
pub fn start(
    targets: Vec<Target>,
    known: HashMap<(String, String), Health>,
    sources: PerFamily,
    reports: mpsc::Sender<Report>,
) -> Watch {
    let (sender, receiver) = watch::channel(targets);
    let (doubts, doubted) = mpsc::unbounded_channel();
    let mut scheduler = Scheduler::new(sources, reports);
    scheduler.known = known;
    let scheduler = tokio::spawn(scheduler.run(receiver, doubted));
    Watch {
        targets: sender,
        doubts,
        scheduler,
    }
}

/// A target and what is known of it.
struct Entry {
    target: Arc<Target>,
    judge: Judge,
    cadence: Cadence,
    /// The probe under way.
    probe: Option<AbortHandle>,
}

/// Names one incarnation of a target; never reused, so what belongs to a replaced one is recognised.
type EntryId = u64;

struct Ended {
    entry: EntryId,
    due: Instant,
    began: Instant,
    result: Result<Duration, ProbeFailure>,
}

struct Scheduler {
    prober: Arc<Prober>,
    reports: mpsc::Sender<Report>,
    /// Where the grid of each cadence begins.
    epoch: Instant,
    entries: HashMap<EntryId, Entry>,
    by_name: HashMap<(String, String), EntryId>,
    /// Of targets that have not been seen yet.
    known: HashMap<(String, String), Health>,
    next_id: EntryId,
    /// What starts when, soonest first. Holds ids of removed entries until their time comes.
    due: BinaryHeap<Reverse<(Instant, EntryId)>>,
    probes: JoinSet<Ended>,
}

impl Scheduler {
    fn new(sources: PerFamily, reports: mpsc::Sender<Report>) -> Self {
        Self {
            prober: Arc::new(Prober::new(sources)),
            reports,
            epoch: Instant::now(),
            entries: HashMap::new(),
            by_name: HashMap::new(),
            known: HashMap::new(),
            next_id: 0,
            due: BinaryHeap::new(),
            probes: JoinSet::new(),
        }
    }

    async fn run(
        mut self,
        mut targets: watch::Receiver<Vec<Target>>,
        mut doubted: mpsc::UnboundedReceiver<Vec<Name>>,
    ) {
        targets.mark_changed();
        loop {
            let next = self.due.peek().map(|Reverse((at, _))| *at);
            tokio::select! {
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let list = targets.borrow_and_update().clone();
                    self.replace_targets(list);
                }
                Some(names) = doubted.recv() => self.doubt(&names),
                Some(ended) = self.probes.join_next() => {
                    let Some(report) = self.conclude(ended) else { continue };
                    if self.reports.send(report).await.is_err() {
                        return;
                    }
                }
                () = sleep_until(next.unwrap_or(self.epoch)), if next.is_some() && self.has_room() => {
                    self.begin_due(Instant::now());
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.probes.len() < MAX_PROBES
    }

    fn replace_targets(&mut self, list: Vec<Target>) {
        let mut wanted = HashSet::with_capacity(list.len());
        for target in list {
            let name = (target.group.clone(), target.backend.clone());
            wanted.insert(name.clone());
            let old = self.by_name.get(&name).copied();
            if let Some(entry) = old.and_then(|id| self.entries.get(&id))
                && *entry.target == target
            {
                continue;
            }
            let old = old.and_then(|id| self.remove(id));
            self.add(name, target, old);
        }
        let gone: Vec<EntryId> = self
            .by_name
            .iter()
            .filter(|(name, _)| !wanted.contains(*name))
            .map(|(_, id)| *id)
            .collect();
        for id in gone {
            self.remove(id);
        }
        self.by_name.retain(|name, _| wanted.contains(name));
    }

    fn add(&mut self, name: (String, String), target: Target, old: Option<Entry>) {
        let known = self.known.remove(&name);
        let check = &target.check;
        let judge = match old {
            Some(old) if old.target.address == target.address => {
                old.judge.with_thresholds(check.rise, check.fall)
            }
            None => Judge::knowing(check.rise, check.fall, known),
            Some(_) => Judge::new(check.rise, check.fall),
        };
        let cadence = Cadence::new(check.interval, check.jitter_percent, &name);
        let id = self.next_id;
        self.next_id += 1;
        self.due.push(Reverse((cadence.first(Instant::now()), id)));
        self.entries.insert(
            id,
            Entry {
                target: Arc::new(target),
                judge,
                cadence,
                probe: None,
            },
        );
        self.by_name.insert(name, id);
    }

    /// As [`Watch::doubt`]. A probe under way was sent before and counts no more.
    fn doubt(&mut self, names: &[Name]) {
        for name in names {
            let Some(old) = self.by_name.get(name).copied().and_then(|id| self.remove(id)) else {
                continue;
            };
            let target = Target::clone(&old.target);
            self.add(name.clone(), target, Some(old));
            if let Some(entry) = self.by_name.get(name).and_then(|id| self.entries.get_mut(id)) {
                entry.judge.doubt();
            }
        }
    }

    fn remove(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if let Some(probe) = &entry.probe {
            probe.abort();
        }
        Some(entry)
    }

    fn begin_due(&mut self, now: Instant) {
        while self.has_room()
            && let Some(Reverse((at, id))) = self.due.peek().copied()
            && at <= now
        {
            self.due.pop();
            if let Some(entry) = self.entries.get_mut(&id) {
                let target = Arc::clone(&entry.target);
                let prober = Arc::clone(&self.prober);
                entry.probe = Some(self.probes.spawn(async move {
                    let began = Instant::now();
                    Ended {
                        entry: id,
                        due: at,
                        began,
                        result: prober.probe(&target).await,
                    }
                }));
            }
        }
    }

    /// Judges the result of a probe and plans the next one; `None` if its target is gone.
    fn conclude(&mut self, ended: Result<Ended, JoinError>) -> Option<Report> {
        let Ended {
            entry: id,
            due,
            began,
            result,
        } = match ended {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Aborted as its target was removed.
            Err(_) => return None,
        };
        let entry = self.entries.get_mut(&id)?;
        entry.probe = None;
        self.due.push(Reverse((
            entry.cadence.next(self.epoch, began, Instant::now()),
            id,
        )));
        let transition = match &result {
            Ok(_) => entry.judge.observe(true),
            Err(failure) if failure.is_local() => None,
            Err(_) => entry.judge.observe(false),
        };
        Some(Report {
            target: Arc::clone(&entry.target),
            due,
            began,
            result,
            transition,
            health: entry.judge.health(),
        })
    }
}

/// Probes one target once, now, from the one of `sources` of its family.
pub async fn probe(target: &Target, sources: PerFamily) -> Result<Duration, ProbeFailure> {
    Prober::new(sources).probe(target).await
}

/// What probes share: sockets, settings, turns.
struct Prober {
    sources: PerFamily,
    tls: https::Settings,
    echoes: icmp::Echoes,
    commands: Semaphore,
}

impl Prober {
    fn new(sources: PerFamily) -> Self {
        Self {
            sources,
            tls: https::Settings::default(),
            echoes: icmp::Echoes::default(),
            commands: Semaphore::new(command::MAX_COMMANDS),
        }
    }

    /// Probes one target once, now.
    async fn probe(&self, target: &Target) -> Result<Duration, ProbeFailure> {
        let Target { address, check, .. } = target;
        let (address, limit) = (*address, check.timeout);
        let source = self.sources.towards(address.ip());
        let origin = match &target.device {
            Some(device) => Origin::Device(device.clone()),
            None => Origin::Address(source),
        };
        match &check.probe {
            Probe::Tcp => tcp::probe(address, &origin, limit).await,
            Probe::Http(http) => http::probe(address, &origin, limit, http).await,
            Probe::Https(http, trust) => https::probe(address, &origin, limit, http, trust, &self.tls).await,
            Probe::Udp { send, answer } => udp::probe(address, &origin, limit, send, answer.as_deref()).await,
            Probe::Grpc { service, host } => {
                grpc::probe(address, &origin, limit, service, host.as_deref()).await
            }
            Probe::Icmp => icmp::probe(address.ip(), &origin, limit, &self.echoes).await,
            Probe::Command(words) => {
                let subject = command::Subject {
                    group: &target.group,
                    backend: &target.backend,
                    target: address,
                    source,
                };
                command::probe(words, subject, limit, &self.commands).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::{net::TcpListener, time::timeout};

    use super::{
        testing::{LOOPBACK, Server, get, refusing},
        *,
    };
    use crate::config::StatusRange;

    const INTERVAL: Duration = Duration::from_millis(100);

    fn target(backend: &str, address: SocketAddr) -> Target {
        let check = HealthCheck {
            probe: Probe::Tcp,
            interval: INTERVAL,
            timeout: Duration::from_secs(2),
            rise: 2,
            fall: 2,
            jitter_percent: 0,
            port: None,
        };
        Target {
            group: "web".into(),
            backend: backend.into(),
            address,
            check,
            device: None,
        }
    }

    async fn next(reports: &mut mpsc::Receiver<Report>) -> Report {
        timeout(Duration::from_secs(10), reports.recv())
            .await
            .expect("a report is due")
            .expect("still probing")
    }

    /// The next report about `backend`.
    async fn next_of(reports: &mut mpsc::Receiver<Report>, backend: &str) -> Report {
        loop {
            let report = next(reports).await;
            if report.target.backend == backend {
                return report;
            }
        }
    }

    fn fresh(targets: Vec<Target>, source: IpAddr, reports: mpsc::Sender<Report>) -> Watch {
        start(targets, HashMap::new(), source.into(), reports)
    }

    #[tokio::test]
    async fn a_known_backend_does_not_fall_at_its_first_failure() {
        let (sender, mut reports) = mpsc::channel(16);
        let known = ["web-1", "web-2"].map(|name| target(name, refusing()));
        let name = (known[0].group.clone(), known[0].backend.clone());
        let _watch = start(
            known.to_vec(),
            HashMap::from([(name.clone(), Health::Healthy)]),
            LOOPBACK.into(),
            sender,
        );
        let mut seen = HashSet::new();
        while seen.len() < 2 {
            let report = reports.recv().await.unwrap();
            if seen.insert(report.target.backend.clone()) {
                let expected = (report.target.backend != name.1).then_some(Health::Unhealthy);
                assert_eq!(report.transition, expected, "{}", report.target.backend);
            }
        }
    }

    #[tokio::test]
    async fn the_first_reports_decide_and_come_promptly() {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let begin = Instant::now();
        let (sender, mut reports) = mpsc::channel(16);
        let _watch = fresh(
            vec![
                target("up", listener.local_addr().unwrap()),
                target("down", refusing()),
            ],
            LOOPBACK,
            sender,
        );
        let up = next_of(&mut reports, "up").await;
        assert_eq!(
            (up.transition, up.health),
            (Some(Health::Healthy), Some(Health::Healthy))
        );
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_backend_falls_when_its_server_stops_and_rises_when_it_returns() {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, mut reports) = mpsc::channel(16);
        let _watch = fresh(vec![target("web-1", address)], LOOPBACK, sender);
        assert_eq!(next(&mut reports).await.transition, Some(Health::Healthy));

        drop(listener);
        let mut failures = 0;
        loop {
            let report = next(&mut reports).await;
            failures += u32::from(report.result.is_err());
            if report.transition.is_some() {
                assert_eq!(report.transition, Some(Health::Unhealthy));
                break;
            }
        }
        assert_eq!(failures, 2);

        let _listener = TcpListener::bind(address).await.unwrap();
        let mut successes = 0;
        loop {
            let report = next(&mut reports).await;
            successes += u32::from(report.result.is_ok());
            if report.transition.is_some() {
                assert_eq!(report.transition, Some(Health::Healthy));
                break;
            }
        }
        assert_eq!(successes, 2);
    }

    #[tokio::test]
    async fn an_http_check_sees_the_status() {
        let server = Server::answer(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").await;
        let mut target = target("web-1", server.address);
        let mut http = get("/");
        http.expect = [(200, 299), (404, 404)]
            .map(|(first, last)| StatusRange { first, last })
            .to_vec();
        target.check.probe = Probe::Http(http);
        let (sender, mut reports) = mpsc::channel(16);
        let _watch = fresh(vec![target], LOOPBACK, sender);
        let report = next(&mut reports).await;
        assert_eq!(report.transition, Some(Health::Unhealthy));
        assert_eq!(
            report.result.unwrap_err().to_string(),
            "HTTP status 503, expected 200-299, 404"
        );
    }

    #[tokio::test]
    async fn a_fault_of_the_gateway_changes_no_health() {
        let (sender, mut reports) = mpsc::channel(16);
        // RFC 5737 TEST-NET-1: no host has it.
        let _watch = fresh(
            vec![target("web-1", refusing())],
            IpAddr::from([192, 0, 2, 1]),
            sender,
        );
        for _ in 0..3 {
            let report = next(&mut reports).await;
            assert!(report.result.unwrap_err().is_local());
            assert_eq!((report.transition, report.health), (None, None));
        }
    }

    #[tokio::test]
    async fn update_adds_removes_and_keeps() {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let kept = target("kept", listener.local_addr().unwrap());
        let (sender, mut reports) = mpsc::channel(16);
        let watch = fresh(
            vec![kept.clone(), target("removed", refusing())],
            LOOPBACK,
            sender,
        );
        assert_eq!(
            next_of(&mut reports, "kept").await.transition,
            Some(Health::Healthy)
        );
        assert_eq!(
            next_of(&mut reports, "removed").await.health,
            Some(Health::Unhealthy)
        );

        watch.update(vec![kept.clone(), target("added", refusing())]);
        let added = next_of(&mut reports, "added").await;
        assert_eq!(added.transition, Some(Health::Unhealthy));
        // The update is in force: the one that stayed is not unknown again, the other one is gone.
        for _ in 0..10 {
            let report = next(&mut reports).await;
            assert_ne!(report.target.backend, "removed");
            assert_eq!(report.transition, None);
        }

        // A changed check keeps the verdict, a changed address does not.
        let mut retuned = kept.clone();
        retuned.check.fall = 7;
        watch.update(vec![retuned.clone()]);
        let report = loop {
            let report = next_of(&mut reports, "kept").await;
            if *report.target == retuned {
                break report;
            }
        };
        assert_eq!((report.transition, report.health), (None, Some(Health::Healthy)));
        let mut moved = retuned;
        moved.address = refusing();
        watch.update(vec![moved.clone()]);
        let report = loop {
            let report = next_of(&mut reports, "kept").await;
            if *report.target == moved {
                break report;
            }
        };
        assert_eq!(report.transition, Some(Health::Unhealthy));
    }

    #[tokio::test]
    async fn a_doubted_target_is_asked_promptly_and_its_next_success_is_enough() {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let mut up = target("up", listener.local_addr().unwrap());
        up.check.interval = Duration::from_secs(300);
        up.check.rise = 10;
        let mut down = target("down", refusing());
        down.check.interval = Duration::from_secs(300);
        let (sender, mut reports) = mpsc::channel(16);
        let watch = fresh(vec![up, down], LOOPBACK, sender);
        for _ in 0..2 {
            assert!(next(&mut reports).await.transition.is_some());
        }
        let names = ["up", "down", "unknown"].map(|name| ("web".to_owned(), name.to_owned()));
        watch.doubt(names.to_vec());
        // Within ten seconds, not within five minutes.
        let mut seen = HashMap::new();
        for _ in 0..2 {
            let report = next(&mut reports).await;
            seen.insert(report.target.backend.clone(), (report.transition, report.health));
        }
        assert_eq!(seen["up"], (Some(Health::Healthy), Some(Health::Healthy)));
        assert_eq!(seen["down"], (None, Some(Health::Unhealthy)));
    }

    #[tokio::test]
    async fn a_tunnel_is_asked_by_its_device() {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let check = TunnelCheck {
            address: address.ip(),
            check: HealthCheck {
                port: Some(address.port()),
                ..target("", address).check
            },
        };
        // RFC 5737 TEST-NET-1: no host has it, and none is needed.
        let source = IpAddr::from([192, 0, 2, 1]);
        probe(&Target::tunnel("lo", &check), source.into()).await.unwrap();
        let failure = probe(&Target::tunnel("gone", &check), source.into())
            .await
            .unwrap_err();
        assert_eq!(failure.name(), "other");
    }

    #[tokio::test]
    async fn every_kind_of_probe_reaches_its_server() {
        let mut target = target("ecs01", refusing());
        target.check.timeout = Duration::from_secs(5);
        let command = ["/bin/sh", "-c", "test $FORWARDER_BACKEND = ecs01"].map(str::to_owned);
        let udp = Probe::Udp {
            send: Vec::new(),
            answer: None,
        };
        let grpc = Probe::Grpc {
            service: String::new(),
            host: None,
        };
        for (probe_of, expected) in [
            (Probe::Tcp, Err("refused")),
            (Probe::Http(get("/")), Err("refused")),
            (
                Probe::Https(get("/"), crate::config::Trust::Anyone),
                Err("refused"),
            ),
            (udp, Err("port-unreachable")),
            (grpc, Err("refused")),
            (Probe::Command(command.to_vec()), Ok(())),
        ] {
            target.check.probe = probe_of;
            let outcome = probe(&target, LOOPBACK.into()).await;
            let outcome = outcome.map(drop).map_err(|failure| failure.name());
            assert_eq!(outcome, expected, "{:?}", target.check.probe);
        }
    }

    #[tokio::test]
    async fn dropping_the_watch_ends_probing_even_when_nobody_reads() {
        let (sender, mut reports) = mpsc::channel(1);
        let address = refusing();
        let targets = (0..8)
            .map(|number| target(&format!("web-{number}"), address))
            .collect();
        let watch = fresh(targets, LOOPBACK, sender);
        next(&mut reports).await;
        drop(watch);
        // What was in the channel comes out, then it is closed.
        while timeout(Duration::from_secs(10), reports.recv())
            .await
            .expect("the channel must close")
            .is_some()
        {}
    }

    #[tokio::test]
    async fn one_silent_backend_does_not_delay_the_others() {
        let silent = Server::never_accepting().await;
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let (sender, mut reports) = mpsc::channel(16);
        let _watch = fresh(
            vec![
                target("silent", silent.address),
                target("up", listener.local_addr().unwrap()),
            ],
            LOOPBACK,
            sender,
        );
        // Several rounds pass before the silent one's first timeout of 2 s.
        for _ in 0..5 {
            assert_eq!(next(&mut reports).await.target.backend, "up");
        }
        assert_eq!(
            next_of(&mut reports, "silent").await.result.unwrap_err().name(),
            "connect-timeout"
        );
    }
}
