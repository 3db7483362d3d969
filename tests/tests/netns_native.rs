//! Ring 3: tunnels that the programs handle themselves, against an ordinary device of the kernel at the far end.
//!
//! The site is that of the other tests, but that the interface which carries the tunnel has the XDP program as well,
//! and the tunnel is in native mode. That packets of flows do not touch the gateway's own device is told by its
//! counters.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    topology::{Extras, Site},
    udp::{Client, EchoServer},
    wait_until,
};

/// The port of the transfers.
const TRANSFER_PORT: u16 = 9000;
const UDP_PORT: u16 = 5353;
/// What goes each way.
const TRANSFER_BYTES: usize = 50_000_000;
/// For a transfer each way.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(60);
/// Until the agent has seen a change.
const NOTICE_DEADLINE: Duration = Duration::from_secs(5);
/// The far end inside the tunnel.
const FAR: Ipv4Addr = Ipv4Addr::new(169, 254, 42, 2);
/// Packets that the gateway's own device may see: probes, what opens a flow, pings.
const FEW_PACKETS: u64 = 500;

/// All servers in one group, by TCP and UDP; the tunnel in this mode, and `wan`, which carries it, an interface if
/// `wan`.
fn configuration(site: &Site, servers: &[&str], nat: &str, mode: &str, wan: bool) -> Result<Configuration> {
    let mut configuration = site.configuration(&[]);
    if wan {
        configuration = configuration.interface("wan", &[]);
    }
    for (group, port) in [("tcp", TRANSFER_PORT), ("udp", UDP_PORT)] {
        configuration = configuration.group(group, nat, Check::None);
        for name in servers {
            configuration = configuration.backend(group, name, site.server(name)?.address, port, 1);
        }
        configuration = configuration.listener(group, site.vip, port, group, group);
    }
    let text = configuration.to_string();
    Ok(Configuration::from_text(
        text.replace("mode = \"kernel\"", &format!("mode = \"{mode}\"")),
    ))
}

fn play(
    extras: Extras,
    configure: impl Fn(&Site) -> Result<Configuration>,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = Agent::start(&site.lab, &site.gateway, &configure(&site)?)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// Bytes without a pattern that repeats within a segment.
fn content(seed: u32) -> Vec<u8> {
    (0..TRANSFER_BYTES as u32 / 4)
        .flat_map(|word| (word ^ seed).wrapping_mul(0x9E37_79B1).to_be_bytes())
        .collect()
}

/// Sends a lot from the client through the VIP to whoever serves, and as much back; both must arrive whole.
fn transfer(client: &Namespace, server: &Namespace, vip: Ipv4Addr) -> Result<()> {
    let (up, down) = (content(1), content(2));
    let listener = server.inside(|| TcpListener::bind(("0.0.0.0", TRANSFER_PORT)))??;
    thread::scope(|scope| {
        let served = scope.spawn(|| -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
            let mut got = vec![0; up.len()];
            stream.read_exact(&mut got).context("the server reads")?;
            ensure!(got == up, "other bytes arrived at the server");
            stream.write_all(&down).context("the server writes")?;
            Ok(())
        });
        let address = SocketAddrV4::new(vip, TRANSFER_PORT).into();
        let mut stream = client.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
        stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
        stream.set_write_timeout(Some(TRANSFER_DEADLINE))?;
        stream.write_all(&up).context("the client writes")?;
        let mut got = vec![0; down.len()];
        stream.read_exact(&mut got).context("the client reads")?;
        ensure!(got == down, "other bytes arrived at the client");
        served.join().map_err(|_| anyhow!("the server panicked"))?
    })
}

/// Packets that the gateway's tunnel device has received and sent.
fn device_packets(site: &Site) -> Result<u64> {
    let shown = site
        .gateway
        .run(&format!("ip -stats -json link show dev {}", site.tunnel))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let packets = |direction: &str| shown[0]["stats64"][direction]["packets"].as_u64();
    packets("rx")
        .zip(packets("tx"))
        .map(|(rx, tx)| rx + tx)
        .context("statistics of the device")
}

/// The mode of the tunnel, and why it is not native.
fn mode(agent: &Agent) -> Result<(String, Option<String>)> {
    let tunnel = agent.status()?.tunnels.into_iter().next().context("a tunnel")?;
    Ok((tunnel.mode, tunnel.why_kernel))
}

fn await_native(agent: &Agent) -> Result<()> {
    wait_until("the tunnel to be native", NOTICE_DEADLINE, || {
        let mode = mode(agent)?;
        ensure!(mode.0 == "native", "{mode:?}");
        Ok(())
    })?;
    Ok(())
}

/// Nothing of a transfer through `server` enters the gateway's tunnel device.
fn transfers_past_the_device(site: &Site, agent: &Agent, client: &Namespace, server: &str) -> Result<()> {
    await_native(agent)?;
    // The first exchange makes the kernel resolve who is behind the tunnel.
    site.gateway.run(&format!("ping -c 1 -W 2 {FAR}"))?;
    let before = device_packets(site)?;
    transfer(client, &site.server(server)?.namespace, site.vip)?;
    let seen = device_packets(site)? - before;
    println!("{seen} packets of 2 x {TRANSFER_BYTES} bytes went through the device");
    ensure!(
        seen < FEW_PACKETS,
        "{seen} packets went through the kernel's device"
    );
    Ok(())
}

#[test]
fn large_transfers_pass_a_native_vxlan_whole() -> Result<()> {
    let configure = |site: &Site| configuration(site, &["ecs02"], "full", "native", true);
    play(Extras::default(), configure, |site, agent| {
        for offload in [false, true] {
            site.checksum_offload(offload)?;
            transfers_past_the_device(site, agent, site.client(), "ecs02")
                .with_context(|| format!("checksum offload {offload}"))?;
        }
        Ok(())
    })
}

#[test]
fn large_transfers_pass_a_native_vxlan_in_dnat_mode() -> Result<()> {
    let configure = |site: &Site| configuration(site, &["ecs02"], "dnat", "auto", true);
    play(Extras::default(), configure, |site, agent| {
        transfers_past_the_device(site, agent, site.client(), "ecs02")
    })
}

#[test]
fn a_client_behind_the_tunnel_is_served_natively_by_servers_on_both_sides() -> Result<()> {
    for server in ["ecs01", "ecs02"] {
        let configure = |site: &Site| configuration(site, &[server], "full", "native", true);
        let extras = Extras {
            remote_client: true,
            ..Extras::default()
        };
        play(extras, configure, |site, agent| {
            let client = site.remote_client.as_ref().context("a remote client")?;
            transfers_past_the_device(site, agent, client, server)
        })
        .with_context(|| format!("served by {server}"))?;
    }
    Ok(())
}

#[test]
fn datagrams_pass_and_what_is_not_ours_stays_with_the_kernel() -> Result<()> {
    let configure = |site: &Site| configuration(site, &["ecs02"], "full", "native", true);
    play(Extras::default(), configure, |site, agent| {
        await_native(agent)?;
        let server = site.server("ecs02")?;
        let _echo = EchoServer::start(&server.namespace, UDP_PORT)?;
        let client = Client::open(site.client(), 40_000)?;
        for round in 0..20 {
            let answer = client.ask(&format!("round {round}"), SocketAddrV4::new(site.vip, UDP_PORT))?;
            ensure!(answer == "ecs02", "{answer}");
        }
        // Through the kernel's device: the gateway's own pings, both ways, and a client's to the server itself.
        let before = device_packets(site)?;
        site.gateway.run(&format!("ping -c 3 -i 0.2 -W 2 {FAR}"))?;
        site.far_router.run("ping -c 3 -i 0.2 -W 2 169.254.42.1")?;
        site.client()
            .run(&format!("ping -c 3 -i 0.2 -W 2 {}", server.address))?;
        ensure!(device_packets(site)? >= before + 18, "the pings went elsewhere");
        Ok(())
    })
}

#[test]
fn a_tunnel_that_cannot_be_native_says_why_and_works() -> Result<()> {
    let configure = |site: &Site| configuration(site, &["ecs02"], "full", "auto", false);
    play(Extras::default(), configure, |site, agent| {
        let (mode, why) = mode(agent)?;
        ensure!(mode == "kernel", "{mode}");
        let why = why.context("a reason")?;
        ensure!(why.contains("[interface.NAME]"), "{why}");
        transfer(site.client(), &site.server("ecs02")?.namespace, site.vip)
    })
}

#[test]
fn a_tunnel_follows_its_device() -> Result<()> {
    let configure = |site: &Site| configuration(site, &["ecs02"], "full", "auto", true);
    play(Extras::default(), configure, |site, agent| {
        await_native(agent)?;
        transfers_past_the_device(site, agent, site.client(), "ecs02")?;
        // The far end has another address, and the device is told.
        site.far_router.address("lo", "198.18.0.2/32")?;
        site.gateway
            .route("198.18.0.2/32", Ipv4Addr::new(198, 51, 100, 2))?;
        let carrier = site.carrier.as_ref().context("a carrier")?;
        carrier.route("198.18.0.2/32", Ipv4Addr::new(203, 0, 113, 2))?;
        let rules = "table ip seen { chain input { type filter hook input priority 0; \
                     ip daddr 198.18.0.2 udp dport 4789 counter; }; }";
        site.far_router.run_with_input("nft -f -", Some(rules))?;
        site.gateway
            .run("ip link set cen type vxlan id 42 local 198.51.100.1 remote 198.18.0.2 nolearning")?;
        // What it has learned goes before what it is told.
        let learned = site.gateway.run("bridge fdb show dev cen")?;
        for entry in learned.lines().filter(|line| line.contains("dst 203.0.113.2")) {
            let mac = entry.split(' ').next().context("a link address")?;
            site.gateway.run(&format!("bridge fdb del {mac} dev cen"))?;
        }
        transfers_past_the_device(site, agent, site.client(), "ecs02")?;
        let seen = site.far_router.run("nft list table ip seen")?;
        let packets = seen
            .split_once("packets ")
            .and_then(|(_, rest)| rest.split(' ').next());
        let packets: u64 = packets.context("a counter")?.parse()?;
        ensure!(packets > 10_000, "{packets} packets went to the new address");
        Ok(())
    })
}
