//! The lab itself, before anything is said with it: links, tunnel, servers and rules work by plain kernel
//! routing, and nothing is left behind, however a lab ends.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lab, Lifetime,
    load::{Answer, Connections, curl, wrk},
    topology::{Extras, PORT, Site},
    udp::{Client, EchoServer},
    wait_until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Tells [`a_lab_that_another_test_ends`] to make a lab and how to end it.
const VICTIM: &str = "FORWARDER_LAB_VICTIM";

fn everything() -> Extras {
    Extras {
        second_servers: true,
        second_client: true,
        remote_client: true,
        security_groups: false,
        eight_servers: false,
        jumbo_frames: false,
    }
}

/// Namespaces and directories whose names start with `prefix`, and processes that were started with them.
fn leftovers(prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    for folder in [Path::new("/run/netns"), Path::new("/tmp")] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) {
                names.push(folder.join(name).display().to_string());
            }
        }
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(prefix) {
            names.push(command);
        }
    }
    names
}

#[test]
fn peering_works_by_plain_routing() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::peering(Lifetime::Process)?;
    let server = &site.servers[0];
    // The rules admit the back-to-origin range and the server's own network, not the client.
    site.client()
        .route("172.17.0.0/24", Ipv4Addr::new(172, 18, 0, 1))?;
    assert!(matches!(
        curl(site.client(), server.address, PORT)?,
        Answer::Failed(_)
    ));
    // As the forwarder would: from an address of the pool.
    site.gateway.address("lo", "100.64.0.9/32")?;
    site.gateway.run_with_input(
        "nft -f -",
        Some("table ip nat { chain post { type nat hook postrouting priority srcnat; oif peering snat to 100.64.0.9; }; }"),
    )?;
    assert_eq!(
        curl(site.client(), server.address, PORT)?,
        Answer::Body(server.page.clone())
    );
    let log = server.nginx.access_log()?;
    assert_eq!(log.sources().collect::<Vec<_>>(), [Ipv4Addr::new(100, 64, 0, 9)]);
    Ok(())
}

#[test]
fn cross_region_works_by_plain_routing() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, everything())?;
    let remote_client = site.remote_client.as_ref().context("a remote client")?;
    for offload in [true, false] {
        site.checksum_offload(offload)?;
        for client in site.clients.iter().chain([remote_client]) {
            for server in &site.servers {
                let answer = curl(client, server.address, PORT)?;
                assert_eq!(
                    answer.body(),
                    Some(server.page.as_str()),
                    "{} to {}",
                    client.role(),
                    server.name
                );
            }
        }
    }
    for server in &site.servers {
        let log = server.nginx.access_log()?;
        assert_eq!(
            (log.connections(), log.requests(), log.refused()),
            (6, 6, 0),
            "{}",
            server.name
        );
    }
    Ok(())
}

#[test]
fn a_stopped_nginx_refuses_and_a_started_one_answers() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let address = site.server("ecs01")?.address;
    site.stop_nginx("ecs01")?;
    let Answer::Failed(text) = curl(site.client(), address, PORT)? else {
        panic!("it still answers")
    };
    assert!(
        text.contains("Connection refused") || text.contains("Couldn't connect"),
        "{text}"
    );
    site.start_nginx("ecs01")?;
    assert!(curl(site.client(), address, PORT)?.body().is_some());
    Ok(())
}

#[test]
fn a_security_group_admits_the_pool_and_its_own_network_only() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(
        Lifetime::Process,
        Extras {
            security_groups: true,
            ..Extras::default()
        },
    )?;
    let ecs02 = site.server("ecs02")?.address;
    assert!(matches!(curl(site.client(), ecs02, PORT)?, Answer::Failed(_)));
    assert!(curl(&site.far_router, ecs02, PORT)?.body().is_some());
    site.gateway.address("lo", "100.64.0.9/32")?;
    let from_pool = site.gateway.output(
        "curl",
        &[
            "--silent",
            "--max-time",
            "2",
            "--interface",
            "100.64.0.9",
            &format!("http://{ecs02}/"),
        ],
    )?;
    assert!(from_pool.status.success());
    Ok(())
}

#[test]
fn the_access_log_counts_what_wrk_did() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let server = site.server("ecs02")?;
    for kind in [Connections::KeepAlive, Connections::PerRequest] {
        server.nginx.clear_logs()?;
        let load = wrk(
            site.client(),
            server.address,
            PORT,
            kind,
            16,
            Duration::from_secs(1),
        )?;
        assert_eq!((load.socket_errors, load.refused), (0, 0));
        let log = server.nginx.access_log()?;
        // wrk does not count what is under way when its time is up, at most one request per connection.
        assert!(
            (load.requests..=load.requests + 16).contains(&log.requests()),
            "{load:?}, {}",
            log.requests()
        );
        match kind {
            Connections::KeepAlive => assert_eq!(log.connections(), 16),
            Connections::PerRequest => assert_eq!(log.connections(), log.requests()),
        }
    }
    Ok(())
}

#[test]
fn an_echo_server_names_itself_and_remembers_its_peers() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let ecs02 = site.server("ecs02")?;
    let server = EchoServer::start(&ecs02.namespace, 5353)?;
    let client = Client::open(site.client(), 40_000)?;
    let address = std::net::SocketAddrV4::new(ecs02.address, 5353);
    assert_eq!(client.ask("hello", address)?, "ecs02");
    assert_eq!(server.peers(), ["172.16.0.10:40000".parse()?]);
    Ok(())
}

/// The start of all names of a lab.
fn name_of(lab: &Lab) -> Result<String> {
    Ok(lab
        .directory()
        .file_name()
        .context("a directory has a name")?
        .to_string_lossy()
        .into_owned())
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, everything())?;
    let name = name_of(&site.lab)?;
    // Four servers with a process each, the directory, and the namespaces: more than ten.
    assert!(leftovers(&name).len() > 10);
    drop(site);
    assert_eq!(leftovers(&name), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_panicking_test_leaves_nothing() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let (send_name, name) = mpsc::channel();
    let panicked = thread::spawn(move || {
        let site = Site::peering(Lifetime::Process).unwrap();
        send_name.send(name_of(&site.lab).unwrap()).unwrap();
        panic!("on purpose: the lab has to go all the same");
    });
    let name = name.recv()?;
    assert!(panicked.join().is_err());
    assert_eq!(leftovers(&name), Vec::<String>::new());
    Ok(())
}

#[test]
fn an_interrupted_or_terminated_lab_leaves_nothing() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (pid, status) = end_victim(signal)?;
        assert_eq!(status.code(), Some(130), "{signal}");
        assert_eq!(
            leftovers(&format!("fwd-{pid}-")),
            Vec::<String>::new(),
            "{signal}"
        );
    }
    Ok(())
}

#[test]
fn a_killed_lab_has_no_processes_left_and_the_next_one_sweeps_the_rest() -> Result<()> {
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let (pid, status) = end_victim(Signal::SIGKILL)?;
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    // Servers end with it, on the kernel's initiative and so a moment later.
    wait_until(
        "the servers of a killed lab to end",
        Duration::from_secs(5),
        || {
            let left = leftovers(&format!("fwd-{pid}-"));
            ensure!(!left.iter().any(|name| name.contains("nginx")), "{left:?}");
            Ok(())
        },
    )?;
    assert_ne!(leftovers(&format!("fwd-{pid}-")), Vec::<String>::new());
    drop(Lab::open(Lifetime::Process)?);
    assert_eq!(leftovers(&format!("fwd-{pid}-")), Vec::<String>::new());
    Ok(())
}

/// Runs this program once more with a lab in it, ends it by `signal` when the lab is up, and returns its
/// process id and how it ended.
fn end_victim(signal: Signal) -> Result<(u32, std::process::ExitStatus)> {
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["--exact", "a_lab_that_another_test_ends", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = victim.id();
    let output = BufReader::new(victim.stdout.take().context("a pipe")?);
    let is_up = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("the lab is up"));
    kill(Pid::from_raw(i32::try_from(pid)?), signal)?;
    let status = victim.wait()?;
    assert!(is_up, "the victim ended before its lab was up: {status}");
    Ok((pid, status))
}

/// Not a test of its own: the process that [`end_victim`] ends.
#[test]
fn a_lab_that_another_test_ends() -> Result<()> {
    if std::env::var_os(VICTIM).is_none() {
        return Ok(());
    }
    let _site = Site::peering(Lifetime::Process)?;
    println!("the lab is up");
    thread::sleep(Duration::from_secs(60));
    Ok(())
}
