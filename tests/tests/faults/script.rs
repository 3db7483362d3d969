//! The faults, and who plays them: three players at the same time, each with the cards of a deck in an order that the
//! run's seed decides, shuffled anew when all were played. One plays with servers and their links, one with the network, one
//! with the agent. A fourth fills the gateway's table now and then.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{SocketAddrV4, UdpSocket},
    path::PathBuf,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use forwarder_tests::{
    blame::{Fault, Place, Span},
    lab::{agent, agent::Agent, wait_until},
    witness::{HEADER_BYTES, Kind, Request, now_ns},
};
use nix::sys::signal::Signal;
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};

use super::site::{LISTENERS, Listener, MAX_FLOWS, SINK, SPARE, Setting, Site, TUNNELS, VIP, Witness};

/// How long a fault lasts: less than half a client's patience, as TCP doubles its pauses.
const LASTS_MS: std::ops::Range<u64> = 500..4000;
/// Between two faults of one player.
const REST_MS: std::ops::Range<u64> = 200..2500;
const DEADLINE: Duration = Duration::from_secs(20);
/// How old the agent's count of flows may be.
const CENSUS: Duration = Duration::from_secs(5);
/// A run in which the table is filled more than once; and how long it may take to become empty again.
const LONG: Duration = Duration::from_secs(300);
/// Flows that fill the table, and some.
const BURST: u16 = MAX_FLOWS as u16 + 1000;
const BURST_PORTS: u16 = 20_000;

/// A fault of a server or of a link to one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostCard {
    KillServer,
    PauseServer,
    CutServer,
    BlackHoleServer,
    CutClient,
}

/// A fault of the network between the gateway and its servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetworkCard {
    CutGatewaysUnderlay,
    CutRoutersUnderlay,
    DownTunnel,
    LosePeer,
    FlapRoute,
}

/// Something that is done to the agent. All but the last cost nobody anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AgentCard {
    Kill,
    /// A restart with the other mode of the native tunnel.
    OtherMode,
    Weights,
    TakeOut,
    Drain,
    MoveClock,
    FillDisk,
    /// With a time limit, after which open connections are ended.
    DrainHard,
}

pub(crate) const HOST_CARDS: [HostCard; 5] = [
    HostCard::KillServer,
    HostCard::PauseServer,
    HostCard::CutServer,
    HostCard::BlackHoleServer,
    HostCard::CutClient,
];
pub(crate) const NETWORK_CARDS: [NetworkCard; 5] = [
    NetworkCard::CutGatewaysUnderlay,
    NetworkCard::CutRoutersUnderlay,
    NetworkCard::DownTunnel,
    NetworkCard::LosePeer,
    NetworkCard::FlapRoute,
];
pub(crate) const AGENT_CARDS: [AgentCard; 8] = [
    AgentCard::Kill,
    AgentCard::OtherMode,
    AgentCard::Weights,
    AgentCard::TakeOut,
    AgentCard::Drain,
    AgentCard::MoveClock,
    AgentCard::FillDisk,
    AgentCard::DrainHard,
];
/// Those that the agent outlives.
pub(crate) const GENTLE_AGENT_CARDS: [AgentCard; 4] = [
    AgentCard::Weights,
    AgentCard::TakeOut,
    AgentCard::Drain,
    AgentCard::MoveClock,
];

/// The running agent and what it was told. Whoever stops it holds the lock until there is another.
pub(crate) struct Gateway {
    pub(crate) agent: Option<Agent>,
    pub(crate) setting: Setting,
}

/// What the players share.
pub(crate) struct Stage<'a> {
    pub(crate) site: &'a Site,
    pub(crate) gateway: Mutex<Gateway>,
    servers: Mutex<Vec<Witness>>,
    faults: Mutex<Vec<Fault>>,
    absences: Mutex<Vec<Span>>,
    has_ended: Mutex<bool>,
    /// It has.
    end: Condvar,
    /// How often the agent may be restarted until the table has room again: each time, flows without packets begin to
    /// wait anew, so a gateway whose agent is restarted every minute never gets rid of them.
    restarts: AtomicUsize,
    /// Words that start the agent with a clock of its own, which the file moves.
    launcher: Vec<String>,
    clock: PathBuf,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn span_from_now() -> Span {
    Span {
        from_ns: now_ns(),
        until_ns: None,
    }
}

/// A pace of faults: nothing is awaited.
fn rest(random: &mut StdRng, milliseconds: std::ops::Range<u64>) {
    thread::sleep(Duration::from_millis(random.random_range(milliseconds)));
}

impl<'a> Stage<'a> {
    /// Starts servers and agent.
    pub(crate) fn set(site: &'a Site) -> Result<Self> {
        let servers = (1..=6)
            .map(|number| site.serve(number))
            .collect::<Result<Vec<_>>>()?;
        let clock = site.lab.directory().join("clock");
        fs::write(&clock, "+0")?;
        let preload = site.gateway.run("faketime -m -f +0 printenv LD_PRELOAD")?;
        let launcher = vec![
            "env".to_owned(),
            format!("LD_PRELOAD={}", preload.trim()),
            format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
            // Looked at once a second.
            "FAKETIME_CACHE_DURATION=1".to_owned(),
            // Nobody can move that one.
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
            "NO_FAKE_STAT=1".to_owned(),
        ];
        let this = Self {
            site,
            gateway: Mutex::new(Gateway {
                agent: None,
                setting: Setting::default(),
            }),
            servers: Mutex::new(servers),
            faults: Mutex::default(),
            absences: Mutex::default(),
            has_ended: Mutex::new(false),
            end: Condvar::new(),
            restarts: AtomicUsize::new(usize::MAX),
            launcher,
            clock,
        };
        this.start(&mut this.gateway())?;
        Ok(this)
    }

    pub(crate) fn gateway(&self) -> MutexGuard<'_, Gateway> {
        lock(&self.gateway)
    }

    pub(crate) fn faults(&self) -> Vec<Fault> {
        lock(&self.faults).clone()
    }

    pub(crate) fn absences(&self) -> Vec<Span> {
        lock(&self.absences).clone()
    }

    /// Waits so long, or until somebody gives up.
    pub(crate) fn last(&self, length: Duration) {
        let ended = self
            .end
            .wait_timeout_while(lock(&self.has_ended), length, |has_ended| !*has_ended);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }

    fn has_ended(&self) -> bool {
        *lock(&self.has_ended)
    }

    /// There is another part.
    pub(crate) fn go_on(&self) {
        *lock(&self.has_ended) = false;
    }

    /// Another agent, with the setting of the beginning.
    pub(crate) fn restore(&self) -> Result<()> {
        let mut gateway = self.gateway();
        if let Some(agent) = gateway.agent.take() {
            agent.end(Signal::SIGUSR1)?;
            agent.stop()?;
        }
        gateway.setting = Setting::default();
        self.start(&mut gateway)?;
        drop(gateway);
        self.await_health()
    }

    /// Nobody plays another card.
    pub(crate) fn end(&self) {
        *lock(&self.has_ended) = true;
        self.end.notify_all();
    }

    /// All groups have all their servers.
    pub(crate) fn await_health(&self) -> Result<()> {
        let gateway = self.gateway();
        let agent = gateway.agent.as_ref().context("no agent")?;
        wait_until("all backends to be healthy", DEADLINE, || {
            for group in agent.status()?.groups {
                ensure!(group.healthy_backends == group.backends.len(), "{group:?}");
            }
            Ok(())
        })
        .map(drop)
    }

    fn start(&self, gateway: &mut Gateway) -> Result<()> {
        let launcher: Vec<&str> = self.launcher.iter().map(String::as_str).collect();
        let configuration = self.site.configuration(&gateway.setting);
        gateway.agent = Some(Agent::start_by(
            &self.site.lab,
            &self.site.gateway,
            &configuration,
            &launcher,
        )?);
        Ok(())
    }

    /// Lets a fault begin; returns its number.
    fn begin(&self, name: String, place: Place, old: &[Kind], new: &[Kind]) -> usize {
        self.begin_fault(Fault {
            name,
            span: span_from_now(),
            place,
            old: old.to_vec(),
            new: new.to_vec(),
            is_fatal: false,
        })
    }

    fn begin_fault(&self, fault: Fault) -> usize {
        let mut faults = lock(&self.faults);
        faults.push(fault);
        faults.len() - 1
    }

    fn over(&self, fault: usize) {
        lock(&self.faults)[fault].span.until_ns = Some(now_ns());
    }

    /// Plays cards until the stage is told to end.
    pub(crate) fn play<C: Copy + std::fmt::Debug>(
        &self,
        cards: &[C],
        mut random: StdRng,
        play: impl Fn(&Self, C, &mut StdRng) -> Result<()>,
    ) -> Result<()> {
        let mut deck = Vec::new();
        while !self.has_ended() {
            if deck.is_empty() {
                deck = cards.to_vec();
                deck.shuffle(&mut random);
            }
            if let Some(card) = deck.pop() {
                let outcome = play(self, card, &mut random).with_context(|| {
                    // A card that cannot be played may have killed the agent.
                    let gateway = self.gateway();
                    let ended = gateway.agent.as_ref().and_then(Agent::ended);
                    format!("playing {card:?}; the agent's end: {ended:?}")
                });
                if outcome.is_err() {
                    self.end();
                    return outcome;
                }
            }
            rest(&mut random, REST_MS);
        }
        Ok(())
    }

    pub(crate) fn play_host(&self, card: HostCard, random: &mut StdRng) -> Result<()> {
        use Kind::{Refused, Reset, Silence, Unreachable};
        let number = random.random_range(1..=6);
        let host = self.site.server(number);
        let role = host.namespace.role();
        let servers = Place::Servers(vec![number]);
        match card {
            HostCard::KillServer => {
                let fault = self.begin_fault(Fault {
                    name: format!("kill -9 on {role}"),
                    span: span_from_now(),
                    place: servers,
                    old: vec![Reset, Silence],
                    new: vec![Refused, Reset, Silence],
                    is_fatal: true,
                });
                lock(&self.servers)[usize::from(number) - 1].kill()?;
                rest(random, LASTS_MS);
                let witness = self.site.serve(number)?;
                lock(&self.servers)[usize::from(number) - 1] = witness;
                self.over(fault);
            }
            HostCard::PauseServer => {
                let fault = self.begin(format!("{role} hangs"), servers, &[Silence], &[Silence]);
                lock(&self.servers)[usize::from(number) - 1].signal(Signal::SIGSTOP);
                rest(random, LASTS_MS);
                lock(&self.servers)[usize::from(number) - 1].signal(Signal::SIGCONT);
                self.over(fault);
            }
            HostCard::CutServer => {
                let fault = self.begin(
                    format!("the link of {role} is down"),
                    servers,
                    &[Silence, Unreachable],
                    &[Silence, Unreachable, Refused],
                );
                self.cut(&host.switch, &host.port, random)?;
                self.over(fault);
            }
            HostCard::BlackHoleServer => {
                let fault = self.begin(
                    format!("{role} takes no packets"),
                    servers,
                    &[Silence],
                    &[Silence, Refused],
                );
                host.namespace.black_hole()?;
                rest(random, LASTS_MS);
                host.namespace.revive()?;
                self.over(fault);
            }
            HostCard::CutClient => {
                let host = &self.site.clients[random.random_range(0..2)];
                let fault = self.begin(
                    format!("the link of client {} is down", host.number),
                    Place::Client(host.number),
                    &[Silence, Unreachable],
                    &[Silence, Unreachable],
                );
                self.cut(&host.switch, &host.port, random)?;
                self.over(fault);
            }
        }
        Ok(())
    }

    fn cut(
        &self,
        host: &forwarder_tests::lab::Namespace,
        interface: &str,
        random: &mut StdRng,
    ) -> Result<()> {
        host.run(&format!("ip link set {interface} down"))?;
        rest(random, LASTS_MS);
        host.run(&format!("ip link set {interface} up")).map(drop)
    }

    pub(crate) fn play_network(&self, card: NetworkCard, random: &mut StdRng) -> Result<()> {
        use Kind::{Refused, Silence, Unreachable};
        let number = random.random_range(0..TUNNELS.len());
        let tunnel = &TUNNELS[number];
        let (gateway, device) = (&self.site.gateway, tunnel.device);
        let route = format!("ip route replace {} via {}", tunnel.network, tunnel.far);
        let begin = |name: String, servers: &[u16]| {
            self.begin(
                name,
                Place::Servers(servers.to_vec()),
                &[Silence, Unreachable],
                &[Silence, Unreachable, Refused],
            )
        };
        let fault = match card {
            NetworkCard::CutGatewaysUnderlay => {
                let fault = begin("the gateway's underlay is down".to_owned(), &[3, 4, 5, 6]);
                self.cut(&self.site.carrier, "eth0", random)?;
                fault
            }
            NetworkCard::CutRoutersUnderlay => {
                let fault = begin(format!("the far underlay of {device} is down"), &tunnel.servers);
                self.cut(&self.site.carrier, &format!("eth{}", number + 1), random)?;
                fault
            }
            NetworkCard::DownTunnel => {
                let fault = begin(format!("the device {device} is down"), &tunnel.servers);
                self.cut(gateway, device, random)?;
                // It went with the device.
                gateway.run(&route)?;
                fault
            }
            NetworkCard::LosePeer => {
                let fault = begin(format!("the peer of {device} takes no packets"), &tunnel.servers);
                self.site.routers[number].black_hole()?;
                rest(random, LASTS_MS);
                self.site.routers[number].revive()?;
                fault
            }
            NetworkCard::FlapRoute => {
                let fault = begin(format!("the route to {device} flaps"), &tunnel.servers);
                for _ in 0..random.random_range(2..8) {
                    gateway.run(&format!("ip route replace unreachable {}", tunnel.network))?;
                    rest(random, 20..400);
                    gateway.run(&route)?;
                    rest(random, 20..400);
                }
                fault
            }
        };
        self.over(fault);
        Ok(())
    }

    /// Fills the flow table now and then, until the stage is told to end.
    pub(crate) fn fill_tables(&self, length: Duration, mut random: StdRng) -> Result<()> {
        // Within a short run once, and towards its end: nobody gets in while the table is full.
        let rests = if length < LONG {
            length.as_millis() as u64 / 2..length.as_millis() as u64 * 2 / 3
        } else {
            60_000..180_000
        };
        loop {
            self.last(Duration::from_millis(random.random_range(rests.clone())));
            if self.has_ended() {
                return Ok(());
            }
            let outcome = self.fill_table().context("filling the table");
            if outcome.is_err() {
                self.end();
                return outcome;
            }
        }
    }

    /// Opens more flows than there is room for, and waits until they are gone: a number is held back for a minute.
    fn fill_table(&self) -> Result<()> {
        self.restarts.store(1, Ordering::Relaxed);
        let outcome = self.fill_and_wait();
        self.restarts.store(usize::MAX, Ordering::Relaxed);
        outcome
    }

    fn fill_and_wait(&self) -> Result<()> {
        let fault = self.begin(
            "the flow table is full".to_owned(),
            Place::Gateway,
            &[],
            &[Kind::Refused, Kind::Silence],
        );
        self.site.clients[1].namespace.inside(|| -> Result<()> {
            for port in BURST_PORTS..BURST_PORTS + BURST {
                let request = Request {
                    listener: SINK.port,
                    is_silent: true,
                    connection: u64::from(port),
                    offset: 0,
                    length: 0,
                    answer_offset: 0,
                    answer_length: 0,
                    pause_ns: 0,
                };
                let bytes: [u8; HEADER_BYTES] = request.to_bytes();
                let socket = UdpSocket::bind((SPARE, port))?;
                // A link that is down at the moment is another's affair.
                let _ = socket.send_to(&bytes, SocketAddrV4::new(VIP, SINK.port));
            }
            Ok(())
        })??;
        let used = || -> Result<u64> {
            Ok(self
                .gateway()
                .agent
                .as_ref()
                .context("no agent")?
                .status()?
                .pool
                .used)
        };
        // The status is some seconds old at most. Where the client's link was down, the table is not full.
        let is_full = wait_until("the status to show it", CENSUS, || {
            ensure!(used()? > u64::from(MAX_FLOWS) / 2);
            Ok(())
        });
        let began = Instant::now();
        while is_full.is_ok() && !self.has_ended() {
            let used = used()?;
            if used < u64::from(MAX_FLOWS) / 2 {
                self.over(fault);
                return Ok(());
            }
            ensure!(began.elapsed() < LONG, "{used} bindings are still in use");
            // The status is as of the last sweep, and nobody tells of the next.
            thread::sleep(Duration::from_millis(500));
        }
        if is_full.is_err() {
            self.over(fault);
        }
        Ok(())
    }

    pub(crate) fn play_agent(&self, card: AgentCard, random: &mut StdRng) -> Result<()> {
        match card {
            AgentCard::Kill => self.restart(Signal::SIGKILL, |_| (), random),
            AgentCard::OtherMode => self.restart(
                Signal::SIGUSR1,
                |setting| setting.is_native = !setting.is_native,
                random,
            ),
            AgentCard::Weights => {
                let weights = [0; 6].map(|_: u16| random.random_range(1..300));
                self.apply(|setting| setting.weights = weights)
            }
            AgentCard::TakeOut => {
                let server = random.random_range(1..=6);
                let listeners = LISTENERS.iter().filter(|one| one.servers.contains(&server));
                let faults: Vec<_> = listeners.map(|one| self.out(one, server, &[])).collect();
                self.apply(|setting| setting.out = Some(server))?;
                rest(random, LASTS_MS);
                self.apply(|setting| setting.out = None)?;
                faults.into_iter().for_each(|fault| self.over(fault));
                Ok(())
            }
            AgentCard::Drain | AgentCard::DrainHard => {
                let listener = &LISTENERS[random.random_range(0..LISTENERS.len() - 1)];
                let server = listener.servers[random.random_range(0..listener.servers.len())];
                let backend = Site::backend(listener, server);
                let (kinds, words): (&[_], &[_]) = if card == AgentCard::DrainHard {
                    (&[Kind::Reset], &[backend.as_str(), "--timeout", "1s"])
                } else {
                    (&[], &[backend.as_str()])
                };
                let fault = self.out(listener, server, kinds);
                self.order("drain", words)?;
                rest(random, LASTS_MS);
                self.order("undrain", &[&backend])?;
                self.over(fault);
                Ok(())
            }
            AgentCard::MoveClock => self.move_clock(random),
            AgentCard::FillDisk => self.fill_disk(random),
        }
    }

    /// A server leaves a listener by order: no reason for a request to fail, but for those of `old`.
    fn out(&self, listener: &Listener, server: u16, old: &[Kind]) -> usize {
        let place = Place::Backend {
            listener: listener.port,
            server,
        };
        let how = if old.is_empty() {
            ""
        } else {
            ", and its connections end"
        };
        self.begin(
            format!("{} is taken out{how}", Site::backend(listener, server)),
            place,
            old,
            &[],
        )
    }

    fn order(&self, verb: &str, words: &[&str]) -> Result<()> {
        let gateway = self.gateway();
        let output = gateway.agent.as_ref().context("no agent")?.ask(verb, words)?;
        ensure!(
            output.status.success(),
            "{verb} {words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    fn apply(&self, change: impl FnOnce(&mut Setting)) -> Result<()> {
        let mut gateway = self.gateway();
        change(&mut gateway.setting);
        let configuration = self.site.configuration(&gateway.setting);
        let agent = gateway.agent.as_ref().context("no agent")?;
        agent.rewrite(&configuration)?;
        let file = agent.configuration().to_str().context("the path is text")?;
        let output = agent.ask("apply", &["-c", file])?;
        ensure!(
            output.status.success(),
            "apply: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Ends the agent in a way that keeps the data path, and starts another.
    fn restart(&self, signal: Signal, change: impl FnOnce(&mut Setting), random: &mut StdRng) -> Result<()> {
        let left = self
            .restarts
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_err() {
            return Ok(());
        }
        let mut gateway = self.gateway();
        let absence = {
            let mut absences = lock(&self.absences);
            absences.push(span_from_now());
            absences.len() - 1
        };
        if let Some(agent) = gateway.agent.take() {
            agent.end(signal)?;
            agent.stop()?;
        }
        change(&mut gateway.setting);
        rest(random, 0..1500);
        self.start(&mut gateway)?;
        lock(&self.absences)[absence].until_ns = Some(now_ns());
        Ok(())
    }

    /// Moves the agent's wall clock, sees that it reads another one, and moves it back.
    fn move_clock(&self, random: &mut StdRng) -> Result<()> {
        for offset in ["+400d", "-20y", "+3h"] {
            fs::write(&self.clock, offset)?;
            rest(random, 1100..2000);
        }
        fs::write(&self.clock, "-20y")?;
        // An order is written into the log, with the time as the agent reads it.
        let listener = &LISTENERS[0];
        let backend = Site::backend(listener, listener.servers[0]);
        let fault = self.out(listener, listener.servers[0], &[]);
        let seen = wait_until("the agent's clock to move", DEADLINE, || {
            self.order("drain", &[&backend])?;
            self.order("undrain", &[&backend])?;
            let log = forwarder_tests::lab::tail(&agent::log(&self.site.lab), 3);
            ensure!(log.contains("20") && !log.contains(&today()?), "{log}");
            Ok(())
        });
        self.over(fault);
        fs::write(&self.clock, "+0")?;
        rest(random, 1100..2000);
        seen.map(drop)
    }

    /// Fills the disk that has the agent's log, configuration and sockets; sees that the agent obeys, and that another one
    /// starts in its place.
    fn fill_disk(&self, random: &mut StdRng) -> Result<()> {
        let ballast = agent::directory(&self.site.lab).join("ballast");
        let mut file = File::create(&ballast)?;
        let block = [1; 4096];
        while file.write_all(&block).is_ok() {}
        let outcome = (|| {
            let log = agent::log(&self.site.lab);
            let before = fs::metadata(&log)?.len();
            let listener = &LISTENERS[1];
            let backend = Site::backend(listener, listener.servers[0]);
            let fault = self.out(listener, listener.servers[0], &[]);
            // More lines than what is left of the log's last page takes.
            for _ in 0..40 {
                self.order("drain", &[&backend])?;
                self.order("undrain", &[&backend])?;
            }
            self.over(fault);
            if fs::metadata(&log)?.len() >= before + 4096 {
                bail!("the disk is not full");
            }
            if random.random_bool(0.5) {
                self.restart(Signal::SIGKILL, |_| (), random)?;
            }
            Ok(())
        })();
        fs::remove_file(&ballast)?;
        outcome
    }
}

/// The date as the log has it.
fn today() -> Result<String> {
    let output = std::process::Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
