//! Ring 4: real SCTP sockets through the gateway, to servers beside it and behind its tunnel.
//!
//! SCTP takes a module that not every kernel has, so the tests run in `cargo xtask test vm` only; elsewhere they are
//! skipped.

use std::{
    env,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    dual_stack::{self, LOCAL_V6, VIP_V6},
    topology::{Extras, Site},
    wait_until,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Set in the virtual machine only.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// RFC 4666: the port of M3UA, one of SCTP's usual guests.
const PORT: u16 = 2905;
/// Sent to the server, and back.
const LENGTH_BYTES: usize = 300_000;
/// For an answer, on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon a refusal must come: long before the INIT is repeated for the first time (RFC 9260 §16, RTO.Initial).
const AT_ONCE: Duration = Duration::from_millis(900);

fn play(
    configure: impl Fn(&Site) -> Result<Configuration>,
    group: &str,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if env::var_os(MACHINE_VARIABLE).is_none() {
        println!("SKIP: needs `cargo xtask test vm`");
        return Ok(());
    }
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    dual_stack::add(&site)?;
    // As on network cards. A veth hands XDP what is still to be cut, and what XDP leaves to the stack of that crashes the socket
    // that gets it (Linux 6.1.192 and 6.12.117: `sctp_ulpevent_make_rcvmsg` trims a packet of several pages).
    site.offload("tx-sctp-segmentation", false)?;
    // Asked for by a socket, the module would be loaded as well, if the machine allows that.
    site.gateway.run("modprobe sctp")?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site)?, group)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A group of this one server, and its listener.
fn one_server(
    site: &Site,
    mode: &str,
    nat: &str,
    vip: impl Into<IpAddr>,
    server: impl Into<IpAddr>,
) -> Configuration {
    let text = dual_stack::configuration(site).to_string();
    let text = site.interfaces.iter().fold(text, |text, interface| {
        text.replace(
            &format!("[interface.{interface}]\n"),
            &format!("[interface.{interface}]\nmode = \"{mode}\"\n"),
        )
    });
    Configuration::from_text(text)
        .group("signalling", nat, Check::None)
        .backend("signalling", "server", server, PORT, 100)
        .listener("signalling", vip, PORT, "sctp", "signalling")
}

/// A socket of a one-to-one association (RFC 6458 §4), for an address of this family. It is to be bound to one: an INIT
/// names all addresses of its sender, of which the gateway translates one.
fn socket(namespace: &Namespace, address: IpAddr) -> Result<Socket> {
    let domain = if address.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = namespace.inside(|| Socket::new(domain, Type::STREAM, Some(Protocol::SCTP)))??;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Sends back what the first client says; whom it took for its client.
fn serve(namespace: &Namespace, address: IpAddr) -> Result<JoinHandle<Result<SocketAddr>>> {
    let listening = socket(namespace, address)?;
    listening.bind(&SockAddr::from(SocketAddr::new(address, PORT)))?;
    listening.listen(8)?;
    Ok(thread::spawn(move || {
        let (mut association, client) = listening.accept()?;
        association.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = vec![0; 1 << 16];
        let mut left = LENGTH_BYTES;
        while left > 0 {
            let length = association.read(&mut buffer)?;
            ensure!(length > 0, "{left} bytes are missing");
            association.write_all(&buffer[..length])?;
            left -= length;
        }
        // The client ends it; whether that reads as an end or as an error depends on how far it has come.
        let _ = association.read(&mut buffer);
        client.as_socket().context("not of IP")
    }))
}

fn payload() -> Vec<u8> {
    (0..LENGTH_BYTES as u32)
        .map(|index| (index.wrapping_mul(0x9E37_79B1) >> 24) as u8)
        .collect()
}

/// Messages of sizes that do and do not fit a packet.
const SIZES: &[usize] = &[1, 7, 100, 1400, 1500, 5000];
/// Messages that fit a packet wherever the path is narrower than at its beginning: Linux cuts messages once, and sends
/// what turns out to be too large in fragments of IP, which are not translated.
const NARROW_SIZES: &[usize] = &[1, 7, 100, 1000, 1200];

/// One association: everything arrives, and comes back as it was.
fn talk(site: &Site, client: IpAddr, vip: IpAddr, sizes: &'static [usize]) -> Result<()> {
    let mut association = socket(site.client(), client)?;
    association.bind(&SockAddr::from(SocketAddr::new(client, 0)))?;
    association.connect(&SockAddr::from(SocketAddr::new(vip, PORT)))?;
    let sent = payload();
    let mut writer = association.try_clone()?;
    let bytes = sent.clone();
    let writing = thread::spawn(move || -> std::io::Result<()> {
        let mut rest = &bytes[..];
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(*size));
            writer.write_all(now)?;
            rest = later;
        }
        Ok(())
    });
    let mut received = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while received.len() < sent.len() {
        let length = association.read(&mut buffer)?;
        ensure!(length > 0, "ended after {} bytes", received.len());
        received.extend_from_slice(&buffer[..length]);
    }
    writing
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(received == sent, "what came back differs");
    match association.shutdown(Shutdown::Both) {
        // A server that has waited for long enough has ended it.
        Err(error) if error.kind() != ErrorKind::NotConnected => Err(error.into()),
        _ => Ok(()),
    }
}

fn client(site: &Site) -> Result<IpAddr> {
    let said = site.client().run("ip -4 -o address show dev eth0")?;
    let prefix = said.split_whitespace().nth(3).context("no address")?;
    Ok(prefix.split('/').next().unwrap_or_default().parse()?)
}

fn association(mode: &str, nat: &str, name: &str, offload: bool) -> Result<()> {
    let configure = |site: &Site| Ok(one_server(site, mode, nat, site.vip, site.server(name)?.address));
    play(configure, "signalling", |site, agent| {
        site.checksum_offload(offload)?;
        let server = site.server(name)?;
        let serving = serve(&server.namespace, server.address.into())?;
        let client = client(site)?;
        let sizes = if server.is_remote { NARROW_SIZES } else { SIZES };
        talk(site, client, site.vip.into(), sizes)?;
        let seen = serving
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        let is_pool = matches!(seen.ip(), IpAddr::V4(address) if address.octets()[..2] == [100, 64]);
        ensure!(is_pool == (nat == "full"), "{seen}");
        let (straight, by_stack) = (
            agent.packets("request_forwarded")?,
            agent.packets("request_to_stack")?,
        );
        println!("{mode}, {nat}, {name}, offload {offload}: {straight} straight, {by_stack} by the stack");
        // Its end was followed: the last words have passed.
        wait_until("the flow to be closed", PATIENCE, || {
            let output = agent.ask("flows", &["--protocol", "sctp", "--state", "closed", "--count"])?;
            let count = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            ensure!(count == "1", "{count:?} closed flows");
            Ok(())
        })?;
        Ok(())
    })
}

#[test]
fn full_nat_to_a_local_server() -> Result<()> {
    for offload in [true, false] {
        association("native", "full", "ecs01", offload)?;
    }
    Ok(())
}

#[test]
fn full_nat_to_a_remote_server() -> Result<()> {
    for offload in [true, false] {
        association("native", "full", "ecs02", offload)?;
    }
    Ok(())
}

#[test]
fn dnat_to_a_local_server() -> Result<()> {
    association("native", "dnat", "ecs01", true)
}

#[test]
fn between_the_families() -> Result<()> {
    let configure = |site: &Site| Ok(one_server(site, "native", "full", site.vip, LOCAL_V6));
    play(configure, "signalling", |site, _| {
        let serving = serve(&site.server("ecs01")?.namespace, LOCAL_V6.into())?;
        talk(site, client(site)?, site.vip.into(), NARROW_SIZES)?;
        let seen = serving
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(seen.is_ipv6(), "{seen}");
        Ok(())
    })?;
    let configure = |site: &Site| {
        Ok(one_server(
            site,
            "native",
            "full",
            VIP_V6,
            site.server("ecs01")?.address,
        ))
    };
    play(configure, "signalling", |site, _| {
        let server = site.server("ecs01")?;
        let serving = serve(&server.namespace, server.address.into())?;
        talk(site, dual_stack::CLIENT_V6.into(), VIP_V6.into(), NARROW_SIZES)?;
        let seen = serving
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(seen.is_ipv4(), "{seen}");
        Ok(())
    })
}

#[test]
fn generic_xdp_leaves_checksums_to_the_kernel() -> Result<()> {
    association("generic", "full", "ecs01", true)?;
    association("generic", "full", "ecs01", false)
}

#[test]
fn a_refused_association_is_told_at_once() -> Result<()> {
    let nobody = Ipv4Addr::new(172, 16, 1, 77);
    let configure = |site: &Site| Ok(one_server(site, "native", "full", site.vip, nobody));
    play(configure, "signalling", |site, agent| {
        let drained = agent.ask("drain", &["signalling/server"])?;
        ensure!(drained.status.success(), "{drained:?}");
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            let address = client(site)?;
            let socket = socket(site.client(), address)?;
            let before = Instant::now();
            let refused = socket.connect(&SockAddr::from(SocketAddr::new(site.vip.into(), PORT)));
            let error = refused.err().context("somebody has taken it")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
            ensure!(before.elapsed() < AT_ONCE, "after {:?}", before.elapsed());
        }
        Ok(())
    })
}
