//! Health checks of many backends: 10 000 of them every two seconds, on real sockets of the loopback device.
//!
//! Every address of 127.0.0.0/8 is this host's, so one listener on all of them stands for all backends. What is
//! expected: every backend is asked in every interval, and never are many due at once. When probes really begin is
//! printed beside it, but not judged: a machine that lets the scheduler's thread wait makes a burst of whatever was
//! due. So is what it costs.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use forwarder_user::{
    config::{HealthCheck, Probe},
    health::{self, Target},
};
use nix::sys::resource::{Usage, UsageWho, getrusage};

const TARGETS: u32 = 10_000;
const INTERVAL: Duration = Duration::from_secs(2);
/// Intervals that are looked at, after the first one.
const ROUNDS: u32 = 3;
const WINDOW: Duration = Duration::from_millis(50);
/// The most that a window may hold, in means. Random phases alone give 1.3.
const MAX_BURST: f64 = 2.0;
/// On the slowest machine.
const DEADLINE: Duration = Duration::from_secs(120);

fn targets(port: u16) -> Vec<Target> {
    let check = HealthCheck {
        probe: Probe::Tcp,
        interval: INTERVAL,
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
        jitter_percent: 10,
        port: None,
    };
    let first = Ipv4Addr::new(127, 1, 0, 0).to_bits();
    (0..TARGETS)
        .map(|number| Target {
            group: "web".to_owned(),
            backend: format!("backend-{number}"),
            address: SocketAddr::from((Ipv4Addr::from_bits(first + number), port)),
            check: check.clone(),
            device: None,
        })
        .collect()
}

/// Accepts and closes until told to stop; returns the processor time that took.
fn serve(listener: &TcpListener, stop: &AtomicBool) -> Duration {
    while !stop.load(Ordering::Relaxed) {
        listener.accept().expect("connections come");
    }
    cpu_time(UsageWho::RUSAGE_THREAD)
}

/// The most of `times` within one of the windows from `first` on.
fn most_at_once(times: impl Iterator<Item = Instant>, first: Instant) -> u32 {
    let windows = (INTERVAL * (ROUNDS - 1)).as_millis() / WINDOW.as_millis();
    let mut counts = vec![0_u32; windows as usize];
    for at in times {
        let since = at.checked_duration_since(first).map(|since| since.as_millis());
        if let Some(count) = since.and_then(|ms| counts.get_mut((ms / WINDOW.as_millis()) as usize)) {
            *count += 1;
        }
    }
    counts.into_iter().max().unwrap_or(0)
}

fn cpu_time(of: UsageWho) -> Duration {
    let usage: Usage = getrusage(of).expect("a process may look at itself");
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec() as u64, 0) + Duration::from_micros(time.tv_usec() as u64)
    };
    seconds(usage.user_time()) + seconds(usage.system_time())
}

#[test]
fn ten_thousand_backends_are_asked_evenly() {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    // Many may come in one moment of a busy machine.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXCONN).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let server = thread::spawn({
        let stop = stop.clone();
        move || serve(&listener, &stop)
    });
    let begin = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (outcomes, due, begun) = runtime.block_on(async {
        let (sender, mut reports) = tokio::sync::mpsc::channel(1024);
        let _watch = health::start(
            targets(address.port()),
            HashMap::new(),
            IpAddr::V4(Ipv4Addr::LOCALHOST).into(),
            sender,
        );
        let mut outcomes: HashMap<String, (u32, u32)> = HashMap::new();
        let mut due = Vec::new();
        let mut begun: HashMap<String, Vec<Instant>> = HashMap::new();
        let mut lagging = TARGETS;
        // Until every backend was asked as often as it should have been, and the windows are over.
        while begin.elapsed() < INTERVAL * (ROUNDS + 1) || lagging > 0 {
            let report = tokio::time::timeout(DEADLINE, reports.recv());
            let report = report.await.expect("a report is due").expect("still probing");
            due.push(report.due.into_std());
            begun
                .entry(report.target.backend.clone())
                .or_default()
                .push(report.began.into_std());
            let (passed, failed) = outcomes.entry(report.target.backend.clone()).or_default();
            match report.result {
                Ok(_) => *passed += 1,
                Err(_) => *failed += 1,
            }
            if *passed + *failed == ROUNDS {
                lagging -= 1;
            }
            assert!(
                begin.elapsed() < DEADLINE,
                "{lagging} were not asked {ROUNDS} times"
            );
        }
        (outcomes, due, begun)
    });
    let took = begin.elapsed();
    let all = cpu_time(UsageWho::RUSAGE_SELF);
    drop(runtime);
    stop.store(true, Ordering::Relaxed);
    let _ = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, address.port()));
    let servers = server.join().unwrap();

    // Everybody, and all passed, but for what an overloaded machine drops.
    assert_eq!(outcomes.len(), TARGETS as usize);
    let probes: u32 = outcomes.values().map(|(passed, failed)| passed + failed).sum();
    let failed: u32 = outcomes.values().map(|(_, failed)| failed).sum();
    assert!(
        outcomes.values().all(|(passed, _)| *passed > 0),
        "somebody never answered"
    );
    let longest_gap = begun
        .values()
        .flat_map(|times| times.windows(2).map(|pair| pair[1] - pair[0]))
        .max()
        .unwrap();

    // And never many at once.
    let first = begin + INTERVAL + health::schedule::START_WINDOW;
    let most_due = most_at_once(due.into_iter(), first);
    let most_begun = most_at_once(begun.values().flatten().copied(), first);
    let mean = f64::from(TARGETS) * WINDOW.as_secs_f64() / INTERVAL.as_secs_f64();
    let cost = all.saturating_sub(servers);
    println!(
        "{probes} probes of {TARGETS} backends in {took:.1?}, {failed} failed: {:.1} % of one processor, {:.0} us a probe; \
         within {WINDOW:?} {mean:.0} on average, {most_due} due at most, {most_begun} begun; longest gap of one backend \
         {longest_gap:.2?}",
        100.0 * cost.as_secs_f64() / took.as_secs_f64(),
        1e6 * cost.as_secs_f64() / f64::from(probes),
    );
    assert!(
        f64::from(most_due) <= MAX_BURST * mean,
        "{most_due} probes were due within {WINDOW:?}, {mean} on average"
    );
    assert!(
        f64::from(most_due) >= 0.5 * mean,
        "the windows are where the probes are"
    );
}
