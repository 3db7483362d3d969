//! The benchmarks run, and none of them lies: each way in which one could is done on purpose here, and has to be an
//! error or be told. Their figures are of no interest, and no time is asserted.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use forwarder_tests::{
    bench::{
        Effort,
        frames::{self, is_the_generator},
        memory,
        nat::{self, Ways, Work, contender::Contender, site::NatSite},
        packets, tables, tunnels,
    },
    cases::measured::{Gateway, Packets},
    lab::{self, agent},
    program::in_network,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

/// The benchmarks' own BPF programs, which `cargo xtask test` builds.
const OBJECT_VARIABLE: &str = "BENCH_OBJECT";
/// Frames of a trial.
const FEW: u32 = 20_000;
const SECOND: Duration = Duration::from_secs(1);

/// The benchmarks' programs; `None`: the test can't run here.
fn object() -> Option<PathBuf> {
    if !lab::can_run_test(Some(agent::binary())) {
        return None;
    }
    let object = std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from);
    if object.is_none() {
        let is_strict = std::env::var_os("FORWARDER_TESTS_STRICT").is_some_and(|value| value == "1");
        assert!(!is_strict, "this test needs {OBJECT_VARIABLE}");
        println!("SKIP: needs {OBJECT_VARIABLE}");
    }
    object
}

fn says(error: &anyhow::Error, what: &str) {
    let text = format!("{error:#}");
    assert!(text.contains(what), "{text}");
}

#[test]
fn every_benchmark_runs_in_its_short_form() {
    let Some(object) = object() else { return };
    let packets = packets::run(&object, "", Effort::Short).unwrap();
    for figure in [
        "request, full NAT @ 1",
        "reply, full NAT @ 4096",
        "not for us @ 1",
    ] {
        assert!(packets.figures.contains_key(figure), "{:?}", packets.figures);
    }
    let nat = nat::run(&object, "", Effort::Short).unwrap();
    for figure in [
        "requests, 4096 flows, nftables",
        "replies, 1 flow, forwarder",
        "keep-alive, 32 connections, HAProxy",
        "4 MiB each, 4 connections, nginx",
    ] {
        assert!(nat.figures.contains_key(figure), "{:?}", nat.figures);
    }
    let tunnels = tunnels::run(&object, Effort::Short).unwrap();
    assert!(tunnels.figures.contains_key("requests, native"));
    assert_eq!(tables::run("", Effort::Short).unwrap().tables.len(), 4);
    let memory = memory::run(Effort::Short).unwrap();
    assert!(memory.figures["bytes per flow"] >= 100.0, "{:?}", memory.figures);
}

#[test]
fn a_packet_that_comes_out_unchanged_is_an_error() {
    let Some(object) = object() else { return };
    in_network(|| {
        let mut subject =
            packets::gateway(&object, "a lie", Gateway::PLAIN, Packets::Request, Effort::Short).unwrap();
        subject.trial().unwrap();
        // It sends each packet back as it came.
        subject.pretend("bench_empty");
        says(&subject.trial().unwrap_err(), "0 good and 4999 bad outputs");
    });
}

#[test]
fn packets_of_flows_that_are_not_there_are_an_error() {
    let Some(object) = object() else { return };
    in_network(|| {
        let gateway = Gateway {
            flows: 4096,
            ..Gateway::PLAIN
        };
        let mut subject =
            packets::gateway(&object, "a lie", gateway, Packets::Request, Effort::Short).unwrap();
        subject.trial().unwrap();
        subject.forget_flows().unwrap();
        says(&subject.trial().unwrap_err(), "bad outputs");
    });
}

#[test]
fn a_frame_that_does_not_arrive_is_an_error() {
    let Some(object) = object() else { return };
    let site = NatSite::build(Contender::Nftables, &object).unwrap();
    let mut ways = Ways::open(&object, &site).unwrap();
    for (_, way) in &mut ways.ways {
        way.trial(FEW).unwrap();
    }
    // One of a thousand.
    let rule = "table ip thief {
            chain inbound {
                type filter hook prerouting priority raw;
                ip protocol udp numgen inc mod 1000 == 7 drop
            }
        }";
    site.gateway.run_with_input("nft -f -", Some(rule)).unwrap();
    for (name, way) in &mut ways.ways {
        let error = way.trial(FEW).expect_err(name);
        says(&error, "19980 good and 0 other packets of 20000 arrived");
    }
}

/// Lets a gateway by nftables send all datagrams there, with their clients' sources.
fn translate_destinations_only(site: &NatSite, server: &str) {
    let rules = format!(
        "flush ruleset
        table ip nat {{
            chain inbound {{
                type nat hook prerouting priority dstnat;
                ip protocol udp dnat to {server}
            }}
        }}"
    );
    site.gateway
        .run_with_input("nft -f -", Some(&rules))
        .expect("nftables takes the rules");
    // Flows that exist would go on as before.
    site.gateway.run("conntrack -F").expect("flows are forgotten");
}

#[test]
fn a_frame_that_is_not_translated_is_an_error() {
    let Some(object) = object() else { return };
    let site = NatSite::build(Contender::Nftables, &object).unwrap();
    let mut ways = Ways::open(&object, &site).unwrap();
    // Where the servers are not meant to be.
    site.servers
        .run("ip address add 172.16.1.20/24 dev eth0")
        .unwrap();
    translate_destinations_only(&site, "172.16.1.20");
    let (_, way) = &mut ways.ways[0];
    let mut last = None;
    // The first ones find the neighbour.
    for _ in 0..3 {
        last = Some(way.trial(FEW).unwrap_err());
    }
    says(&last.unwrap(), "0 packets as they have to be and 20000 others");
}

#[test]
fn a_frame_that_shows_its_client_to_the_server_is_an_error() {
    let Some(object) = object() else { return };
    let site = NatSite::build(Contender::Nftables, &object).unwrap();
    let mut ways = Ways::open(&object, &site).unwrap();
    // One of the servers.
    translate_destinations_only(&site, "172.16.1.16");
    let (_, way) = &mut ways.ways[0];
    let error = way.trial(FEW).unwrap_err();
    says(&error, "0 packets as they have to be and 20000 others");
}

#[test]
fn a_gateway_that_has_opened_no_flow_gives_no_figure() {
    let Some(object) = object() else { return };
    let site = NatSite::build(Contender::Nftables, &object).unwrap();
    // The VIP answers for itself, as there are no rules.
    site.gateway.run("nft flush ruleset").unwrap();
    assert!(Ways::open(&object, &site).is_err());
}

#[test]
fn a_gateway_as_fast_as_the_generator_is_told() {
    let Some(object) = object() else { return };
    // No gateway at all is as fast as one can be.
    let site = NatSite::build(Contender::Nobody, &object).unwrap();
    let mut ways = Ways::open(&object, &site).unwrap();
    let (_, way) = &mut ways.ways[0];
    let mut best = || {
        let rates = (0..9).map(|_| way.trial(FEW).unwrap().packets_per_second);
        rates.fold(0.0, f64::max)
    };
    let (alone, again) = (best(), best());
    assert!(
        is_the_generator(again, alone) || is_the_generator(alone, again),
        "{alone} and {again}"
    );
}

/// A program that keeps the benchmarks' CPU busy, and what it has used of it.
fn with_a_burner<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let is_over = AtomicBool::new(false);
    let is_burning = AtomicBool::new(false);
    thread::scope(|scope| {
        let burner = scope.spawn(|| {
            let mut cpus = CpuSet::new();
            cpus.set(frames::CPU)
                .expect("this thread may be bound to a CPU and timed");
            sched_setaffinity(Pid::from_raw(0), &cpus).expect("this thread may be bound to a CPU and timed");
            let now = || {
                Duration::from(
                    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
                        .expect("this thread may be bound to a CPU and timed"),
                )
            };
            let before = now();
            is_burning.store(true, Relaxed);
            while !is_over.load(Relaxed) {
                std::hint::spin_loop();
            }
            now() - before
        });
        while !is_burning.load(Relaxed) {
            thread::yield_now();
        }
        let outcome = work();
        is_over.store(true, Relaxed);
        (outcome, burner.join().expect("the burner ends"))
    })
}

#[test]
fn cpu_time_of_another_program_is_not_in_a_frames_cost() {
    let Some(object) = object() else { return };
    let site = NatSite::build(Contender::Nobody, &object).unwrap();
    let mut ways = Ways::open(&object, &site).unwrap();
    let (_, way) = &mut ways.ways[0];
    let (trial, burnt) = with_a_burner(|| way.trial(400_000).unwrap());
    assert!(burnt > trial.took / 10, "{burnt:?} of {:?}", trial.took);
    // Both had the same CPU. The burner's time is of somewhat more than the trial.
    let most = trial.took.saturating_sub(burnt.mul_f64(0.5));
    assert!(trial.ran < most, "{trial:?}, and the other {burnt:?}");
}

#[test]
fn cpu_time_of_another_program_is_not_in_a_requests_cost_and_is_told() {
    let Some(object) = object() else { return };
    let mut site = NatSite::build(Contender::Nobody, &object).unwrap();
    let (trial, burnt) = with_a_burner(|| nat::trial(&mut site, Work::KeepAlive, "/", SECOND).unwrap());
    assert!(burnt > trial.took / 10, "{burnt:?} of {:?}", trial.took);
    let most = trial.took.saturating_sub(burnt.mul_f64(0.5));
    assert!(trial.ran < most, "{trial:?}, and the other {burnt:?}");
    assert!(trial.is_disturbed(), "{trial:?}");
}

#[test]
fn answers_that_say_no_are_an_error() {
    let Some(object) = object() else { return };
    let mut site = NatSite::build(Contender::Haproxy, &object).unwrap();
    nat::trial(&mut site, Work::KeepAlive, "/", SECOND).unwrap();
    let error = nat::trial(&mut site, Work::KeepAlive, "/missing", SECOND).unwrap_err();
    says(&error, "answers that say no");
}

#[test]
fn answers_that_the_servers_did_not_give_are_an_error() {
    let Some(object) = object() else { return };
    let mut site = NatSite::build(Contender::Nginx, &object).unwrap();
    nat::trial(&mut site, Work::KeepAlive, "/", SECOND).unwrap();
    // A gateway that answers itself is fast.
    let path = site.lab.directory();
    let path = path.display();
    site.replace_contender(&format!(
        "daemon off; master_process off; pid {path}/other.pid; error_log {path}/other.log;
        events {{ worker_connections 1024; }}
        http {{
            client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;
            uwsgi_temp_path {path}/d; scgi_temp_path {path}/e; access_log off;
            server {{ listen 172.16.0.100:80; location / {{ return 200 '{}'; }} }}
        }}",
        "x".repeat(200)
    ))
    .unwrap();
    let error = nat::trial(&mut site, Work::KeepAlive, "/", SECOND).unwrap_err();
    says(&error, "and the servers gave 0");
}
