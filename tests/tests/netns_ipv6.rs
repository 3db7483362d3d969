//! Ring 3: IPv6 clients, VIPs, pool and backends, beside the gateway and behind its tunnel.
//!
//! The VIP and the pool are on no host: neighbour solicitations for them are answered by the data path, and their
//! servers know the pool by a route.

use std::{
    net::{SocketAddr, SocketAddrV6, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    dual_stack::{self, CLIENT_V6, LOCAL_V6, REMOTE_V6, VIP_V6},
    load::curl,
    topology::{Extras, PORT, Site},
    wait_until,
};

const UDP_PORT: u16 = 5353;
/// How long a client waits for an answer before it asks again.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a server waits for somebody to ask.
const IDLE: Duration = Duration::from_secs(4);

fn play(
    configure: impl Fn(&Site) -> Configuration,
    group: &str,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    dual_stack::add(&site)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site), group)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A listener on the IPv6 VIP in front of both servers' IPv6 addresses.
fn web(site: &Site) -> Configuration {
    dual_stack::configuration(site)
        .group("web", "full", Check::Http)
        .backend("web", "ecs01", LOCAL_V6, PORT, 100)
        .backend("web", "ecs02", REMOTE_V6, PORT, 100)
        .listener("web", VIP_V6, PORT, "tcp", "web")
}

#[test]
fn clients_reach_servers_beside_the_gateway_and_behind_the_tunnel() -> Result<()> {
    play(web, "web", |site, agent| {
        let mut answers = [0_u32; 2];
        for _ in 0..60 {
            let answer = curl(site.client(), VIP_V6, PORT)?;
            let page = answer.body().with_context(|| format!("{answer:?}"))?;
            let server = site.answered_by(page).context("a page that nobody has")?;
            answers[usize::from(server.is_remote)] += 1;
        }
        println!("{answers:?} answers from the local and the remote server");
        ensure!(answers.iter().all(|count| *count > 0), "{answers:?}");

        // The servers see the pool, not the client; the large page needs a clamped MSS through the tunnel.
        let url = format!("http://[{VIP_V6}]:{PORT}/large");
        for _ in 0..8 {
            let line = [
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                "10",
                "--output",
                "/dev/null",
                &url,
            ];
            let output = site.client().output("curl", &line)?;
            ensure!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let explained = asked(
            agent,
            "explain",
            &["tcp", &at(CLIENT_V6, 41_000), &at(VIP_V6, PORT)],
        )?;
        ensure!(explained.contains("listener web -> group web"), "{explained}");
        let flows = asked(agent, "flows", &["--vip", &at(VIP_V6, PORT)])?;
        ensure!(flows.contains(&format!("[{CLIENT_V6}]")), "{flows}");
        Ok(())
    })
}

#[test]
fn the_vip_answers_pings_and_is_nobody_s_address() -> Result<()> {
    play(web, "web", |site, _| {
        site.client().run(&format!("ping -6 -c 3 -i 0.2 -W 2 {VIP_V6}"))?;
        let addresses = site.gateway.run("ip -6 address show")?;
        ensure!(!addresses.contains(&VIP_V6.to_string()), "{addresses}");
        Ok(())
    })
}

/// A client that knows the VIPs at another gateway does not ask; it is told.
#[test]
fn neighbours_are_told_whose_the_vips_are_now() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    dual_stack::add(&site)?;
    let vips = [site.vip.to_string(), VIP_V6.to_string()];
    for vip in &vips {
        site.client().run(&format!(
            "ip neigh replace {vip} lladdr 02:00:00:00:00:99 dev eth0 nud stale"
        ))?;
    }
    let show_log = ShowLog::of(&site.lab);
    let configuration = web(&site).listener("web4", site.vip, PORT + 1, "tcp", "web");
    let _agent = site.start_agent(&configuration, "web")?;
    let link = site.gateway.run("ip -brief link show eth0")?;
    let mac = link
        .split_whitespace()
        .nth(2)
        .context("a link address")?
        .to_owned();
    for vip in &vips {
        wait_until(
            "the client to know the new gateway",
            Duration::from_secs(10),
            || {
                let known = site.client().run(&format!("ip neigh show {vip} dev eth0"))?;
                ensure!(known.contains(&mac), "{vip} should be at {mac}: {known}");
                Ok(())
            },
        )?;
    }
    // Who asks for the VIP asks this group, and NICs let only their own groups through.
    let groups = site.gateway.run("ip maddress show dev eth0")?;
    ensure!(groups.contains("ff02::1:ff00:100"), "{groups}");
    show_log.all_is_well();
    Ok(())
}

#[test]
fn datagrams_go_both_ways() -> Result<()> {
    let configure = |site: &Site| {
        dual_stack::configuration(site)
            .group("echo", "full", Check::None)
            .backend("echo", "ecs01", LOCAL_V6, UDP_PORT, 1)
            .backend("echo", "ecs02", REMOTE_V6, UDP_PORT, 1)
            .listener("echo", VIP_V6, UDP_PORT, "udp", "echo")
    };
    play(configure, "echo", |site, agent| {
        let servers = ["ecs01", "ecs02"].map(|name| -> Result<_> {
            let socket = open(&site.server(name)?.namespace, UDP_PORT, IDLE)?;
            Ok(thread::spawn(move || echo(&socket, name)))
        });
        let to = SocketAddrV6::new(VIP_V6, UDP_PORT, 0, 0);
        let mut answered = Vec::new();
        for number in 0..20 {
            let client = open(site.client(), 0, PATIENCE)?;
            answered.push(wait_until("an answer", Duration::from_secs(10), || {
                client.send_to(format!("{number}").as_bytes(), to)?;
                let mut buffer = [0; 64];
                let (length, from) = client.recv_from(&mut buffer).map_err(|error| {
                    let status = agent.status().map(|status| {
                        let used = status.reasons.into_iter().filter(|reason| reason.packets > 0);
                        used.map(|reason| format!("{} {}", reason.name, reason.packets))
                            .collect::<Vec<_>>()
                    });
                    anyhow::anyhow!("{error}; {status:?}")
                })?;
                ensure!(from == SocketAddr::V6(to), "{from} answered");
                Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
            })?);
        }
        for server in servers {
            let peers = server?
                .join()
                .map_err(|_| anyhow::anyhow!("a server ended badly"))?;
            ensure!(!peers.is_empty(), "one server was never asked: {answered:?}");
            ensure!(
                peers
                    .iter()
                    .all(|peer| peer.ip().to_string().starts_with("fd64::")),
                "{peers:?}"
            );
        }
        Ok(())
    })
}

/// Answers with its name until nobody asks any more; returns who did.
fn echo(socket: &UdpSocket, name: &str) -> Vec<SocketAddr> {
    let mut peers = Vec::new();
    let mut buffer = [0; 64];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        peers.push(peer);
        let answer = [name.as_bytes(), b" ", &buffer[..length]].concat();
        // The client tells whether it arrived.
        let _ = socket.send_to(&answer, peer);
    }
    peers
}

fn open(namespace: &Namespace, port: u16, patience: Duration) -> Result<UdpSocket> {
    let socket = namespace.inside(|| UdpSocket::bind(("::", port)))??;
    socket.set_read_timeout(Some(patience))?;
    Ok(socket)
}

fn at(address: std::net::Ipv6Addr, port: u16) -> String {
    SocketAddrV6::new(address, port, 0, 0).to_string()
}

/// What a verb that asks the agent prints.
fn asked(agent: &Agent, verb: &str, arguments: &[&str]) -> Result<String> {
    let output = agent.ask(verb, arguments)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
