//! Ring 3: the agent, its programs and real sockets on real links.
//!
//! Each test has a lab of its own: Chengdu with clients, the gateway and local servers, Hangzhou with remote
//! servers behind a VXLAN device (`topology`). The tests need the machine for themselves:
//! `--test-threads=1`, as `cargo xtask test netns` does it.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    load::{Answer, Connections, curl, wrk},
    nginx::{AccessLog, Nginx, large_file},
    status::{BackendStatus, HEALTHY},
    topology::{Extras, POOL, PORT, PROBE_ADDRESS, Site},
    udp::{Client, EchoServer},
    wait_until,
};
use nix::sys::signal::Signal;

/// The group of all servers.
const GROUP: &str = "web";
/// How long counters may lag behind the traffic.
const COUNTER_DEADLINE: Duration = Duration::from_secs(5);
/// Connections that wrk keeps open at a time.
const CONNECTIONS: u32 = 64;
const UDP_PORT: u16 = 5353;

/// Runs `test` at a site with the agent running and all backends of `group` healthy.
fn play(
    extras: Extras,
    group: &str,
    configure: impl Fn(&Site) -> Configuration,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site), group)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

fn four_servers() -> Extras {
    Extras {
        second_servers: true,
        ..Extras::default()
    }
}

/// One listener and one group on the servers' echo ports.
fn echo_configuration(site: &Site, servers: &[&str]) -> Result<Configuration> {
    let group = site.configuration(&[]).group("echo", "full", Check::None);
    let mut configuration = group;
    for name in servers {
        let address = site.server(name)?.address;
        configuration = configuration.backend("echo", name, address, UDP_PORT, 1);
    }
    Ok(configuration.listener("echo", site.vip, UDP_PORT, "udp", "echo"))
}

/// Weights of the load test: not all the same, and the heaviest is remote.
const WEIGHTS: [(&str, u16); 4] = [("ecs01", 100), ("ecs02", 100), ("ecs03", 50), ("ecs04", 150)];

fn weighted_configuration(site: &Site) -> Configuration {
    site.web_configuration_with(&[], "full", |server| {
        WEIGHTS
            .iter()
            .find(|(name, _)| *name == server.name)
            .map_or(0, |(_, weight)| *weight)
    })
}

/// A client that closes its connection before the server does keeps the port for a minute, and does so more
/// often with far servers. As a flow's port decides its server, the far ones' share would sink with the ports
/// left. So: all ports there are, and again after a second, as on any busy client.
fn use_all_ports_alike(client: &Namespace) -> Result<()> {
    client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")
}

/// Ten seconds of wrk: no request fails, and the agent counts what the servers' logs count.
fn load(site: &Site, agent: &Agent, kind: Connections) -> Result<()> {
    for server in &site.servers {
        server.nginx.clear_logs()?;
    }
    let before = agent.backends(GROUP)?;
    let load = wrk(
        site.client(),
        site.vip,
        PORT,
        kind,
        CONNECTIONS,
        Duration::from_secs(10),
    )?;
    println!("{kind:?}: {load:?}");
    ensure!(
        load.requests > 0 && load.socket_errors == 0 && load.refused == 0,
        "requests failed: {load:?}"
    );

    // Servers may still log what was under way, and the agent's counters may lag.
    let (logs, _) = wait_until("the agent and the servers to agree", COUNTER_DEADLINE, || {
        agree(site, agent, &before)
    })?;
    let requests: u64 = logs.iter().map(|(_, log)| log.requests()).sum();
    // What is under way when wrk's time is up is served, but no longer counted by wrk.
    ensure!(
        (load.requests..=load.requests + u64::from(CONNECTIONS)).contains(&requests),
        "wrk counted {} requests, the servers {requests}",
        load.requests
    );
    ensure!(
        logs.iter().all(|(_, log)| log.refused() == 0),
        "a server refused a request: {logs:?}"
    );

    let all: u64 = logs.iter().map(|(_, log)| log.connections()).sum();
    let all_weights: u16 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    for ((name, weight), (_, log)) in WEIGHTS.iter().zip(&logs) {
        let got = log.connections();
        let share = all as f64 * f64::from(*weight) / f64::from(all_weights);
        println!(
            "  {name}: {got} connections, its share is {share:.0}; {} requests",
            log.requests()
        );
        // Sixty-four connections are too few to show shares.
        ensure!(
            kind == Connections::KeepAlive || (got as f64 - share).abs() <= share / 10.0,
            "{name} got {got} of {all} connections, its weight's share is {share:.0}"
        );
    }
    Ok(())
}

/// The servers' logs in the order of [`WEIGHTS`], if the agent counts for each server as many connections as
/// that server does. wrk opens one more than it uses, to see whether anybody listens, and it ends in the
/// middle of whatever it does: such connections are in the server's error log only.
fn agree(site: &Site, agent: &Agent, before: &[BackendStatus]) -> Result<Vec<(&'static str, AccessLog)>> {
    let after = agent.backends(GROUP)?;
    let opened = |backends: &[BackendStatus], name| {
        let found = backends.iter().find(|backend| backend.name == name);
        found
            .map(|backend| backend.traffic.connections_opened)
            .context("a backend of the group")
    };
    let mut logs = Vec::new();
    for (name, _) in WEIGHTS {
        let log = site.server(name)?.nginx.access_log()?.without(PROBE_ADDRESS);
        let accepted = log.connections() + log.silent_connections();
        let opened = opened(&after, name)? - opened(before, name)?;
        ensure!(
            opened == accepted,
            "{name}: the agent counts {opened} connections, the server {accepted}"
        );
        logs.push((name, log));
    }
    Ok(logs)
}

#[test]
fn load_with_checksum_offload_loses_no_request() -> Result<()> {
    play(four_servers(), GROUP, weighted_configuration, |site, agent| {
        site.checksum_offload(true)?;
        use_all_ports_alike(site.client())?;
        load(site, agent, Connections::KeepAlive)?;
        load(site, agent, Connections::PerRequest)
    })
}

#[test]
fn load_without_checksum_offload_loses_no_request() -> Result<()> {
    play(four_servers(), GROUP, weighted_configuration, |site, agent| {
        site.checksum_offload(false)?;
        use_all_ports_alike(site.client())?;
        load(site, agent, Connections::KeepAlive)?;
        load(site, agent, Connections::PerRequest)
    })
}

/// Fetches and sends a large file; both must arrive whole at whichever server is chosen.
fn transfer(site: &Site, client: &Namespace) -> Result<()> {
    let file = site.lab.directory().join("large-to-send");
    let expected = large_file();
    fs::write(&file, &expected)?;
    let url = format!("http://{}/large", site.vip);
    let got = client.output(
        "curl",
        &["--silent", "--show-error", "--fail", "--max-time", "20", &url],
    )?;
    ensure!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    ensure!(
        got.stdout == expected,
        "{} bytes arrived, or they differ",
        got.stdout.len()
    );
    let body = format!("@{}", file.display());
    let url = format!("http://{}/", site.vip);
    let sent = client.output(
        "curl",
        &[
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "20",
            "--data-binary",
            &body,
            &url,
        ],
    )?;
    ensure!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    Ok(())
}

#[test]
fn large_transfers_arrive_whole_from_local_and_remote_servers() -> Result<()> {
    let extras = Extras {
        remote_client: true,
        ..four_servers()
    };
    play(extras, GROUP, Site::web_configuration, |site, _| {
        let remote_client = site.remote_client.as_ref().context("a remote client")?;
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            for client in [site.client(), remote_client] {
                for server in &site.servers {
                    server.nginx.clear_logs()?;
                }
                for _ in 0..40 {
                    transfer(site, client)
                        .with_context(|| format!("from {}, checksum offload {offload}", client.role()))?;
                    let mut is_complete = true;
                    for server in &site.servers {
                        let log = server.nginx.access_log()?.without(PROBE_ADDRESS);
                        is_complete &= log.requests() > 1;
                    }
                    if is_complete {
                        break;
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_client_inside_the_remote_network_reaches_local_and_remote_servers() -> Result<()> {
    let extras = Extras {
        remote_client: true,
        ..four_servers()
    };
    play(extras, GROUP, Site::web_configuration, |site, _| {
        let client = site.remote_client.as_ref().context("a remote client")?;
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..60 {
            match curl(client, site.vip, PORT)? {
                Answer::Body(page) => {
                    answered.insert(site.answered_by(&page).context("a page of a server")?.name);
                }
                Answer::Failed(why) => anyhow::bail!("{why}, after answers from {answered:?}"),
            }
        }
        assert_eq!(answered.len(), 4, "{answered:?}");
        Ok(())
    })
}

#[test]
fn two_clients_that_share_a_source_port_get_their_own_answers() -> Result<()> {
    let extras = Extras {
        second_client: true,
        ..Extras::default()
    };
    let configure = |site: &Site| echo_configuration(site, &["ecs01", "ecs02"]).expect("servers of the site");
    play(extras, "echo", configure, |site, _| {
        let _servers = [
            EchoServer::start(&site.server("ecs01")?.namespace, UDP_PORT)?,
            EchoServer::start(&site.server("ecs02")?.namespace, UDP_PORT)?,
        ];
        let vip = SocketAddrV4::new(site.vip, UDP_PORT);
        for port in 40_000..40_020 {
            let clients = [
                Client::open(&site.clients[0], port)?,
                Client::open(&site.clients[1], port)?,
            ];
            for round in 0..3 {
                // Both are under way at the same time.
                for (number, client) in clients.iter().enumerate() {
                    client.send(&format!("{number} {round}"), vip)?;
                }
                for (number, client) in clients.iter().enumerate() {
                    let (answer, from) = client.receive()?.context("no answer")?;
                    assert_eq!(from, vip);
                    assert!(answer.ends_with(&format!(" {number} {round}")), "{answer}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn two_listeners_share_a_backend_and_a_client_port() -> Result<()> {
    let configure = |site: &Site| {
        let configuration = echo_configuration(site, &["ecs01"]).expect("a server of the site");
        configuration.listener("echo-too", site.vip, 5454, "udp", "echo")
    };
    play(Extras::default(), "echo", configure, |site, _| {
        let server = EchoServer::start(&site.server("ecs01")?.namespace, UDP_PORT)?;
        let client = Client::open(site.client(), 40_000)?;
        for round in 0..5 {
            for port in [UDP_PORT, 5454] {
                let vip = SocketAddrV4::new(site.vip, port);
                assert_eq!(client.ask(&format!("round {round}"), vip)?, "ecs01");
            }
        }
        let peers: std::collections::BTreeSet<_> = server.peers().into_iter().collect();
        assert_eq!(peers.len(), 2, "one binding per flow: {peers:?}");
        assert!(peers.iter().all(|peer| is_in_pool(*peer.ip())), "{peers:?}");
        Ok(())
    })
}

#[test]
fn two_tcp_listeners_share_a_backend_and_a_client_port() -> Result<()> {
    let configure = |site: &Site| {
        site.web_configuration()
            .listener("web-too", site.vip, 8080, "tcp", GROUP)
    };
    play(Extras::default(), GROUP, configure, |site, _| {
        for port in [80, 8080, 80, 8080] {
            let url = format!("http://{}:{port}/", site.vip);
            let arguments = [
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                "5",
                "--local-port",
                "41000-41003",
            ];
            let output = site
                .client()
                .output("curl", &[&arguments[..], &[&url]].concat())?;
            ensure!(
                output.status.success(),
                "port {port}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    })
}

fn is_in_pool(address: Ipv4Addr) -> bool {
    let [a, b, c, d] = address.octets();
    [a, b, c] == [100, 64, 0] && d < 64 && address != PROBE_ADDRESS
}

#[test]
fn servers_of_a_full_nat_group_see_addresses_of_the_pool() -> Result<()> {
    play(Extras::default(), GROUP, Site::web_configuration, |site, _| {
        for _ in 0..20 {
            ensure!(site.curl()?.body().is_some());
        }
        for server in &site.servers {
            let log = server.nginx.access_log()?.without(PROBE_ADDRESS);
            assert!(log.sources().count() > 0, "{} got no request", server.name);
            assert!(
                log.sources().all(is_in_pool),
                "{}: {:?}",
                server.name,
                log.sources().collect::<Vec<_>>()
            );
        }
        Ok(())
    })
}

#[test]
fn servers_of_a_dnat_group_see_the_clients_address() -> Result<()> {
    let configure = |site: &Site| site.web_configuration_with(&[], "dnat", |_| 1);
    play(Extras::default(), GROUP, configure, |site, _| {
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            for _ in 0..20 {
                let answer = site.curl()?;
                ensure!(answer.body().is_some(), "{answer:?}");
            }
        }
        for server in &site.servers {
            let log = server.nginx.access_log()?.without(PROBE_ADDRESS);
            assert_eq!(
                log.sources().collect::<Vec<_>>(),
                [Ipv4Addr::new(172, 16, 0, 10)],
                "{}",
                server.name
            );
        }
        Ok(())
    })
}

#[test]
fn a_reply_after_its_flow_ended_is_dropped_and_counted() -> Result<()> {
    for name in ["ecs01", "ecs02"] {
        let configure = |site: &Site| echo_configuration(site, &[name]).expect("a server of the site");
        play(Extras::default(), "echo", configure, |site, agent| {
            let server = EchoServer::start(&site.server(name)?.namespace, UDP_PORT)?;
            let client = Client::open(site.client(), 40_000)?;
            let vip = SocketAddrV4::new(site.vip, UDP_PORT);
            assert_eq!(client.ask("hello", vip)?, name);
            let peer = *server.peers().first().context("a peer")?;
            // While the flow lives, the server may speak first.
            server.send(b"unasked", peer)?;
            assert_eq!(client.receive()?, Some(("unasked".to_owned(), vip)));

            // The agent counts flows now and then: first this one must show, then be gone.
            for (what, expected) in [("the flow to be counted", 1), ("the flow to end", 0)] {
                wait_until(what, Duration::from_secs(30), || {
                    let flows = agent.backend("echo", name)?.traffic.flows;
                    ensure!(flows == expected, "{flows} flows");
                    Ok(())
                })?;
            }
            let before = agent.packets("no_flow")?;
            server.send(b"too late", peer)?;
            assert_eq!(client.receive()?, None);
            wait_until("the drop to be counted", COUNTER_DEADLINE, || {
                let counted = agent.packets("no_flow")? - before;
                ensure!(counted == 1, "{counted} packets");
                Ok(())
            })?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_gateway_answers_arp_and_echo_requests_for_the_vip() -> Result<()> {
    play(Extras::default(), GROUP, Site::web_configuration, |site, _| {
        let vip = site.vip.to_string();
        site.client().run(&format!("ping -c 3 -i 0.2 -W 2 {vip}"))?;
        let neighbour = site.client().run(&format!("ip neigh show {vip}"))?;
        let link = site.gateway.run("ip -o link show dev eth0")?;
        let mac = neighbour
            .split_whitespace()
            .skip_while(|word| *word != "lladdr")
            .nth(1);
        let mac = mac.with_context(|| format!("no neighbour entry for the VIP: {neighbour:?}"))?;
        assert!(link.contains(mac), "{mac} is not the gateway's: {link}");
        // The stack does not know the VIP.
        assert!(!site.gateway.run("ip address")?.contains(&vip));
        Ok(())
    })
}

#[test]
fn traffic_of_the_gateway_itself_and_routed_traffic_are_left_alone() -> Result<()> {
    play(Extras::default(), GROUP, Site::web_configuration, |site, _| {
        let _own = Nginx::start(&site.lab, &site.gateway, &[8088], "the gateway's own page")?;
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            site.client().run("ping -c 2 -i 0.2 -W 2 172.16.0.1")?;
            let own = curl(site.client(), Ipv4Addr::new(172, 16, 0, 1), 8088)?;
            assert_eq!(own.body(), Some("the gateway's own page"));
            for server in &site.servers {
                site.client()
                    .run(&format!("ping -c 2 -i 0.2 -W 2 {}", server.address))?;
                let direct = curl(site.client(), server.address, PORT)?;
                assert_eq!(direct.body(), Some(server.page.as_str()));
            }
            // From an address that the server has a route back to.
            let local = site.server("ecs01")?;
            assert_eq!(
                curl(&site.gateway, local.address, PORT)?.body(),
                Some(local.page.as_str())
            );
        }
        Ok(())
    })
}

#[test]
fn generic_xdp_forwards_too() -> Result<()> {
    let configure = |site: &Site| site.web_configuration_with(&[("mode", "generic")], "full", |_| 1);
    play(four_servers(), GROUP, configure, |site, _| {
        for interface in site.interfaces {
            let link = site.gateway.run(&format!("ip link show dev {interface}"))?;
            assert!(link.contains("xdpgeneric"), "{link}");
        }
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            for _ in 0..40 {
                let answer = site.curl()?;
                ensure!(answer.body().is_some(), "{answer:?}");
            }
            transfer(site, site.client())?;
        }
        Ok(())
    })
}

#[test]
fn without_redirect_the_stack_forwards() -> Result<()> {
    let configure = |site: &Site| site.web_configuration_with(&[("redirect", "off")], "full", |_| 1);
    play(four_servers(), GROUP, configure, |site, _| {
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            for _ in 0..40 {
                let answer = site.curl()?;
                ensure!(answer.body().is_some(), "{answer:?}");
            }
            transfer(site, site.client())?;
        }
        Ok(())
    })
}

#[test]
fn a_server_beside_the_client_is_reached_through_one_nic() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    // The second client serves; requests and replies come in and go out through eth0.
    let extras = Extras {
        second_client: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let (server, page) = (&site.clients[1], "a page from next door");
    server.route(POOL, Ipv4Addr::new(172, 16, 0, 1))?;
    let nginx = Nginx::start(&site.lab, server, &[8080], page)?;
    let configuration = site
        .configuration(&[])
        .group("near", "full", Check::Http)
        .backend("near", "client2", Ipv4Addr::new(172, 16, 0, 11), 8080, 1)
        .listener("near", site.vip, PORT, "tcp", "near");
    let _agent = site.start_agent(&configuration, "near")?;
    for offload in [true, false] {
        site.checksum_offload(offload)?;
        for _ in 0..20 {
            assert_eq!(site.curl()?, Answer::Body(page.to_owned()));
        }
        transfer(&site, site.client())?;
    }
    assert!(
        nginx
            .access_log()?
            .without(PROBE_ADDRESS)
            .sources()
            .all(is_in_pool)
    );
    show_log.all_is_well();
    Ok(())
}

#[test]
fn a_backend_of_weight_0_gets_nothing() -> Result<()> {
    let configure = |site: &Site| {
        site.web_configuration_with(&[], "full", |server| if server.name == "ecs02" { 0 } else { 10 })
    };
    play(four_servers(), GROUP, configure, |site, _| {
        let load = wrk(
            site.client(),
            site.vip,
            PORT,
            Connections::PerRequest,
            CONNECTIONS,
            Duration::from_secs(1),
        )?;
        ensure!(
            load.requests > 100 && load.socket_errors == 0 && load.refused == 0,
            "{load:?}"
        );
        for server in &site.servers {
            let log = server.nginx.access_log()?.without(PROBE_ADDRESS);
            assert_eq!(
                log.requests() == 0,
                server.name == "ecs02",
                "{}: {}",
                server.name,
                log.requests()
            );
        }
        Ok(())
    })
}

/// XDP and tcx programs, addresses and routes of the gateway, as the system's tools show them.
fn traces(gateway: &Namespace) -> Result<String> {
    let mut text = gateway.run("ip -o link")?;
    // bpftool lists the programs of the namespace it runs in.
    text += &gateway.run("bpftool net")?;
    text += &gateway.run("ip -o address")?;
    text += &gateway.run("ip route show table all")?;
    Ok(text)
}

/// Everything below the BPF file system's usual place.
fn pins() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/bpf")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            found.push(entry.path());
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_stopped_agent_leaves_nothing_behind() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let site = Site::cross_region(Lifetime::Process, Extras::default())?;
        let show_log = ShowLog::of(&site.lab);
        let (before, pins_before) = (traces(&site.gateway)?, pins());
        let agent = site.start_agent(&site.web_configuration(), GROUP)?;
        ensure!(site.curl()?.body().is_some());
        let attached = traces(&site.gateway)?;
        assert!(
            attached.contains("xdp") && attached.contains(&PROBE_ADDRESS.to_string()),
            "{attached}"
        );

        let status = agent.end(signal)?;
        assert!(status.success(), "{signal}: {status}");
        // The kernel frees programs a moment after the last reference is gone.
        wait_until("the gateway to be as before", Duration::from_secs(5), || {
            let after = traces(&site.gateway)?;
            ensure!(
                after == before,
                "before:
{before}
after:
{after}"
            );
            Ok(())
        })?;
        assert_eq!(pins(), pins_before);
        assert!(!agent.control_socket().exists());
        // And plain traffic flows on.
        assert!(
            curl(site.client(), site.server("ecs02")?.address, PORT)?
                .body()
                .is_some()
        );
        show_log.all_is_well();
    }
    Ok(())
}

#[test]
fn a_backend_that_stops_is_taken_out_and_comes_back() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, four_servers())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&site.web_configuration(), GROUP)?;
    for name in ["ecs01", "ecs04"] {
        for start in [false, true] {
            if start {
                site.start_nginx(name)?;
            } else {
                site.stop_nginx(name)?;
            }
            wait_until("its health to change", Duration::from_secs(10), || {
                let health = agent.backend(GROUP, name)?.health;
                ensure!((health == HEALTHY) == start, "it is {health}");
                Ok(())
            })?;
            if !start {
                // It takes a second: others are asked whether the port is closed or filtered.
                let (diagnosis, _) = wait_until("a diagnosis", COUNTER_DEADLINE, || {
                    agent.backend(GROUP, name)?.diagnosis.context("none yet")
                })?;
                assert_eq!(diagnosis.cause, "refused");
            }
            let load = wrk(
                site.client(),
                site.vip,
                PORT,
                Connections::PerRequest,
                CONNECTIONS,
                Duration::from_secs(1),
            )?;
            ensure!(
                load.requests > 100 && load.socket_errors == 0 && load.refused == 0,
                "{name}: {load:?}"
            );
        }
    }
    show_log.all_is_well();
    Ok(())
}

#[test]
fn a_reply_finds_a_client_whose_neighbour_entry_is_gone() -> Result<()> {
    let configure = |site: &Site| echo_configuration(site, &["ecs01", "ecs02"]).expect("servers of the site");
    play(Extras::default(), "echo", configure, |site, _| {
        let servers = [
            EchoServer::start(&site.server("ecs01")?.namespace, UDP_PORT)?,
            EchoServer::start(&site.server("ecs02")?.namespace, UDP_PORT)?,
        ];
        let client = Client::open(site.client(), 40_000)?;
        let vip = SocketAddrV4::new(site.vip, UDP_PORT);
        for round in 0..5 {
            client.ask(&format!("round {round}"), vip)?;
            for interface in site.interfaces.iter().chain([&site.tunnel]) {
                site.gateway.run(&format!("ip neigh flush dev {interface}"))?;
            }
            for server in &servers {
                if let Some(peer) = server.peers().first() {
                    server.send(b"unasked", *peer)?;
                    assert_eq!(client.receive()?, Some(("unasked".to_owned(), vip)));
                }
            }
        }
        Ok(())
    })
}
