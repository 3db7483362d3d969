//! Ring 3: paths that carry less than the links at their ends.
//!
//! Client and server have jumbo frames, the tunnel takes 1450 bytes, and a link behind the tunnel 1280, of which
//! nobody is told but by ICMP. Where such a message does not arrive, the path is a black hole: small packets pass
//! and transfers stall.
//!
//! Linux sets "don't fragment" on TCP and, until it has learned better, on UDP. It does not probe by itself
//! (`tcp_mtu_probing` is off).

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    crossing::{Mode, await_mode, download, in_mode, transfer, upload},
    topology::{Extras, PORT, PROBE_ADDRESS, Peering, Site},
    udp::{Client, EchoServer},
    wait_until,
};

const JUMBO_BYTES: u16 = 9000;
/// RFC 8200 §5: every link of IPv6 carries that; no path should be narrower.
const NARROW_BYTES: u16 = 1280;
/// What VXLAN leaves of 1500 bytes.
const TUNNEL_BYTES: u16 = 1450;
/// Sent in either direction: hundreds of windows.
const LENGTH_BYTES: u32 = 8_000_000;
const UDP_PORT: u16 = 5353;
/// Until a host has taken notice of an ICMP message.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is special about a site.
#[derive(Clone, Copy, Debug)]
struct Path {
    peering: Peering,
    mode: Mode,
    /// What the gateway's link to the client takes, of which the client knows nothing.
    uplink_mtu_bytes: Option<u16>,
}

/// Runs `test` at a site with the agent running. `clamp`: announced segment sizes are lowered to what is known.
fn play(path: Path, clamp: bool, test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::peering_with(Lifetime::Process, path.peering)?;
    if let Some(mtu_bytes) = path.uplink_mtu_bytes {
        site.gateway.run(&format!("ip link set eth0 mtu {mtu_bytes}"))?;
    }
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configuration(&site, path.mode, clamp)?, "web")?;
    await_mode(&agent, path.mode)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A listener for pages and one for datagrams.
fn configuration(site: &Site, mode: Mode, clamp: bool) -> Result<Configuration> {
    let server = site.servers.first().context("a server")?;
    let configuration = site
        .web_configuration()
        .group("echo", "full", Check::None)
        .backend("echo", server.name, server.address, UDP_PORT, 1)
        .listener("echo", site.vip, UDP_PORT, "udp", "echo");
    let configuration = in_mode(configuration, mode);
    Ok(if clamp {
        configuration
    } else {
        configuration.agent_key("mss_clamp", "false")
    })
}

/// A narrow link behind the tunnel, jumbo frames at both ends.
fn narrow(mode: Mode) -> Path {
    Path {
        peering: Peering {
            client_mtu_bytes: JUMBO_BYTES,
            server_mtu_bytes: JUMBO_BYTES,
            narrow_mtu_bytes: Some(NARROW_BYTES),
            ..Peering::default()
        },
        mode,
        uplink_mtu_bytes: None,
    }
}

/// No link is narrower than the tunnel.
fn wide(mode: Mode) -> Path {
    let mut path = narrow(mode);
    path.peering.narrow_mtu_bytes = None;
    path
}

/// Transfers in both directions, with packets at their largest.
fn transfer_all(site: &Site) -> Result<()> {
    let server = site.servers.first().context("a server")?;
    for offload in [true, false] {
        site.checksum_offload(offload)?;
        let transferred = transfer(site, site.client(), server, LENGTH_BYTES)
            .with_context(|| format!("checksum offload {offload}"))?;
        println!("checksum offload {offload}: {transferred}");
    }
    Ok(())
}

/// One direction of a transfer.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Download,
    Upload,
}

/// Transfers in one direction, of which the sender learns by ICMP alone that the path takes `expected_bytes`.
///
/// At a site of its own: a host that has learned of a path announces smaller segments on its next connection, so the
/// other end would have nothing to learn.
fn learn_by_transfer(path: Path, direction: Direction, expected_bytes: u16) -> Result<()> {
    for offload in [true, false] {
        play(path, false, |site, _| {
            site.checksum_offload(offload)?;
            let server = site.servers.first().context("a server")?;
            let learned = match direction {
                Direction::Upload => {
                    upload(site, site.client(), server, LENGTH_BYTES)?;
                    learned_mtu(site.client(), site.vip)?
                }
                Direction::Download => {
                    download(site, site.client(), server, LENGTH_BYTES)?;
                    let log = server.nginx.access_log()?.without(PROBE_ADDRESS);
                    let address = log.sources().next().context("a flow's address")?;
                    learned_mtu(&server.namespace, address)?
                }
            };
            ensure!(
                learned == Some(expected_bytes),
                "{direction:?}, checksum offload {offload}: learned {learned:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// What a host has learned of the path to an address, in bytes; `None`: nothing.
fn learned_mtu(host: &Namespace, destination: Ipv4Addr) -> Result<Option<u16>> {
    let route = host.run(&format!("ip route get {destination}"))?;
    let mtu = route.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    mtu.map(|mtu| mtu.parse().with_context(|| route.clone()))
        .transpose()
}

/// Sends a datagram from the client that is too large for the path, which it learns, and then one that fits.
fn learn_by_datagram(site: &Site, expected_bytes: u16) -> Result<()> {
    let server = site.servers.first().context("a server")?;
    let _echo = EchoServer::start(&server.namespace, UDP_PORT)?;
    let vip = SocketAddrV4::new(site.vip, UDP_PORT);
    let client = Client::open(site.client(), 0)?;
    // IPv4 and UDP header take 28 bytes; the answer begins with the server's name and a space.
    let fitting = usize::from(expected_bytes) - 28 - server.namespace.role().len() - 1;
    client.ask(&"x".repeat(fitting), vip)?;
    ensure!(
        learned_mtu(site.client(), site.vip)?.is_none(),
        "nothing was too large"
    );
    client.send(&"x".repeat(usize::from(expected_bytes) - 28 + 1), vip)?;
    wait_until("the client to learn the path's MTU", PATIENCE, || {
        let learned = learned_mtu(site.client(), site.vip)?;
        ensure!(learned == Some(expected_bytes), "{learned:?}");
        Ok(())
    })?;
    client.ask(&"x".repeat(fitting), vip)?;
    Ok(())
}

#[test]
fn clamped_segments_cross_a_tunnel_between_jumbo_links() -> Result<()> {
    play(wide(Mode::Kernel), true, |site, _| transfer_all(site))
}

#[test]
fn clamped_segments_cross_a_native_tunnel_between_jumbo_links() -> Result<()> {
    play(wide(Mode::Native), true, |site, _| transfer_all(site))
}

#[test]
fn clamped_segments_cross_a_narrow_link_behind_the_tunnel() -> Result<()> {
    play(narrow(Mode::Kernel), true, |site, _| transfer_all(site))
}

#[test]
fn clamped_segments_cross_a_narrow_link_behind_a_native_tunnel() -> Result<()> {
    play(narrow(Mode::Native), true, |site, _| transfer_all(site))
}

#[test]
fn requests_shrink_to_the_tunnel_by_icmp_alone() -> Result<()> {
    learn_by_transfer(wide(Mode::Kernel), Direction::Upload, TUNNEL_BYTES)
}

#[test]
fn requests_shrink_to_a_native_tunnel_by_icmp_alone() -> Result<()> {
    learn_by_transfer(wide(Mode::Native), Direction::Upload, TUNNEL_BYTES)
}

#[test]
fn requests_shrink_to_a_narrow_link_by_icmp_alone() -> Result<()> {
    learn_by_transfer(narrow(Mode::Kernel), Direction::Upload, NARROW_BYTES)
}

#[test]
fn requests_shrink_to_a_narrow_link_behind_a_native_tunnel_by_icmp_alone() -> Result<()> {
    learn_by_transfer(narrow(Mode::Native), Direction::Upload, NARROW_BYTES)
}

#[test]
fn replies_shrink_to_a_narrow_link_by_icmp_alone() -> Result<()> {
    learn_by_transfer(narrow(Mode::Kernel), Direction::Download, NARROW_BYTES)
}

#[test]
fn replies_shrink_to_the_clients_link_by_icmp_alone() -> Result<()> {
    let path = Path {
        uplink_mtu_bytes: Some(NARROW_BYTES),
        ..wide(Mode::Kernel)
    };
    learn_by_transfer(path, Direction::Download, NARROW_BYTES)
}

#[test]
fn replies_of_a_native_tunnel_shrink_to_the_clients_link_by_icmp_alone() -> Result<()> {
    let path = Path {
        uplink_mtu_bytes: Some(NARROW_BYTES),
        ..wide(Mode::Native)
    };
    learn_by_transfer(path, Direction::Download, NARROW_BYTES)
}

#[test]
fn a_datagram_that_does_not_fit_the_tunnel_is_answered_by_the_vip() -> Result<()> {
    for mode in [Mode::Kernel, Mode::Native] {
        play(wide(mode), true, |site, _| learn_by_datagram(site, TUNNEL_BYTES))?;
    }
    Ok(())
}

#[test]
fn a_datagram_that_does_not_fit_behind_the_tunnel_is_heard_of() -> Result<()> {
    for mode in [Mode::Kernel, Mode::Native] {
        play(narrow(mode), true, |site, _| {
            learn_by_datagram(site, NARROW_BYTES)
        })?;
    }
    Ok(())
}

/// The tunnel's own packets must not be fragmented, and a link that carries them, behind the first router, takes less
/// than the gateway's. The kernel hears of it by ICMP, and what it has learned counts for native packets too.
#[test]
fn requests_shrink_to_what_carries_a_native_tunnel() -> Result<()> {
    const CARRIED_BYTES: u16 = 1400;
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    site.gateway
        .run("ip link set cen type vxlan id 42 local 198.51.100.1 remote 203.0.113.2 df set")?;
    let carrier = site.carrier.as_ref().context("a router below the tunnel")?;
    for (host, interface) in [(carrier, "eth1"), (&site.far_router, "wan")] {
        host.run(&format!("ip link set {interface} mtu {CARRIED_BYTES}"))?;
    }
    let show_log = ShowLog::of(&site.lab);
    let server = site.server("ecs02")?;
    let configuration = site
        .configuration(&[])
        .group("web", "full", Check::Http)
        .backend("web", server.name, server.address, PORT, 1)
        .listener("web", site.vip, PORT, "tcp", "web");
    let agent = site.start_agent(&in_mode(configuration, Mode::Native), "web")?;
    await_mode(&agent, Mode::Native)?;
    upload(&site, site.client(), server, LENGTH_BYTES)?;
    let learned = learned_mtu(site.client(), site.vip)?;
    // VXLAN takes 50 bytes.
    ensure!(learned == Some(CARRIED_BYTES - 50), "learned {learned:?}");
    show_log.all_is_well();
    Ok(())
}
