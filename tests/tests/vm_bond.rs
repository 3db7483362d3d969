//! Ring 4: a gateway whose only interface is a bond of two network cards, which are named nowhere.
//!
//! Clients and servers hang on the switch that both cards lead to. The kernel runs the bond's program on the cards, and
//! chooses the one that a frame leaves by. Bonds take a module that not every kernel has, so the tests run in
//! `cargo xtask test vm` only; elsewhere they are skipped.

use std::{env, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lab, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    crossing::transfer,
    nginx::Nginx,
    topology::{POOL, PORT, Server, Site},
    wait_until,
};

/// Set in the virtual machine only.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// Sent in either direction.
const LENGTH_BYTES: u32 = 10_000_000;
const MTU_BYTES: u16 = 1500;
const PAGE: &str = "a page from behind the bond";
/// Until ports are joined, or a card's end is noticed (`miimon`, LACP).
const PATIENCE: Duration = Duration::from_secs(20);

/// Mode of the gateway's bond, as the kernel calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bond {
    ActiveBackup,
    Xor,
    Lacp,
    /// One that XDP cannot do in native mode.
    Tlb,
}

impl Bond {
    const fn name(self) -> &'static str {
        match self {
            Self::ActiveBackup => "active-backup",
            Self::Xor => "balance-xor",
            Self::Lacp => "802.3ad lacp_rate fast",
            Self::Tlb => "balance-tlb",
        }
    }

    /// Does the switch have to know of it?
    const fn is_at_both_ends(self) -> bool {
        matches!(self, Self::Xor | Self::Lacp)
    }
}

/// Makes `bond0` of two interfaces.
fn add_bond(host: &Namespace, bond: Bond, ports: [&str; 2]) -> Result<()> {
    host.run(&format!(
        "ip link add bond0 type bond miimon 50 mode {}",
        bond.name()
    ))?;
    for port in ports {
        host.run(&format!("ip link set {port} down"))?;
        host.run(&format!("ip link set {port} master bond0"))?;
        host.run(&format!("ip link set {port} up"))?;
    }
    host.run("ip link set bond0 up").map(drop)
}

fn site(bond: Bond) -> Result<Site> {
    let lab = Lab::open(Lifetime::Process)?;
    let [gateway, switch, client, server] =
        ["gateway", "switch", "client", "server"].map(|role| lab.namespace(role));
    let (gateway, switch, client, server) = (gateway?, switch?, client?, server?);
    for card in ["card0", "card1"] {
        lab.cable((&gateway, card), (&switch, card), MTU_BYTES)?;
    }
    lab.cable((&switch, "port0"), (&client, "eth0"), MTU_BYTES)?;
    lab.cable((&switch, "port1"), (&server, "eth0"), MTU_BYTES)?;
    add_bond(&gateway, bond, ["card0", "card1"])?;
    switch.run("ip link add name bridge type bridge")?;
    let uplinks: &[&str] = if bond.is_at_both_ends() {
        add_bond(&switch, bond, ["card0", "card1"])?;
        &["bond0"]
    } else {
        &["card0", "card1"]
    };
    for port in uplinks.iter().chain(&["port0", "port1"]) {
        switch.run(&format!("ip link set {port} master bridge"))?;
    }
    switch.run("ip link set bridge up")?;
    gateway.address("bond0", "10.0.5.1/24")?;
    gateway.address("bond0", "10.0.6.1/24")?;
    client.address("eth0", "10.0.5.10/24")?;
    server.address("eth0", "10.0.6.10/24")?;
    server.route(POOL, Ipv4Addr::new(10, 0, 6, 1))?;
    gateway.forward()?;
    wait_until("the bond to carry frames", PATIENCE, || {
        gateway.run("ping -c 1 -W 1 10.0.6.10")
    })?;
    let nginx = Nginx::start(&lab, &server, &[PORT], PAGE)?;
    Ok(Site {
        clients: vec![client],
        far_router: gateway.clone(),
        carrier: Some(switch),
        gateway,
        remote_client: None,
        servers: vec![Server {
            name: "server",
            namespace: server,
            address: Ipv4Addr::new(10, 0, 6, 10),
            is_remote: false,
            page: PAGE.to_owned(),
            nginx,
        }],
        vip: Ipv4Addr::new(10, 0, 5, 100),
        front: Ipv4Addr::new(10, 0, 5, 100).into(),
        is_ipv6: false,
        interfaces: &["bond0"],
        tunnel: "",
        networks: [
            ("clients", "10.0.5.0/24", false),
            ("servers", "10.0.6.0/24", false),
        ],
        drawing: "client ─┐        ┌─ card0 ─┐
        switch            bond0 gateway
server ─┘        └─ card1 ─┘",
        lab,
    })
}

/// Runs `test` with the agent on a bond; its program has to be attached in this way.
fn play(bond: Bond, attachment: &str, test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if env::var_os(MACHINE_VARIABLE).is_none() {
        println!("SKIP: needs `cargo xtask test vm`");
        return Ok(());
    }
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = site(bond)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&site.web_configuration(), "web")?;
    let status = agent.status()?;
    let interface = status.interfaces.first().context("an interface")?;
    ensure!(interface.attachment == attachment, "{interface:?}");
    site.client()
        .run(&format!("ping -c 3 -i 0.2 -W 5 {}", site.vip))?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// Transfers in both directions; nearly all leaves straight from XDP.
fn transfer_natively(site: &Site, agent: &Agent) -> Result<()> {
    let transferred = transfer(site, site.client(), &site.servers[0], LENGTH_BYTES)?;
    let (straight, by_stack) = (
        agent.packets("request_forwarded")?,
        agent.packets("request_to_stack")?,
    );
    println!("{transferred}; {straight} requests straight, {by_stack} by the stack");
    ensure!(
        straight > by_stack,
        "{straight} requests left straight from XDP, {by_stack} by the stack"
    );
    Ok(())
}

#[test]
fn active_backup_goes_on_by_the_other_card() -> Result<()> {
    play(Bond::ActiveBackup, "xdp-native", |site, agent| {
        transfer_natively(site, agent)?;
        let bonding = site.gateway.run("ip -details link show dev bond0")?;
        let active = bonding
            .split_whitespace()
            .skip_while(|word| *word != "active_slave")
            .nth(1)
            .context("an active card")?;
        let switch = site.carrier.as_ref().context("a switch")?;
        switch.run(&format!("ip link set {active} down"))?;
        wait_until("the other card to serve", PATIENCE, || {
            let answer = site.curl()?;
            ensure!(answer.body() == Some(PAGE), "{answer:?}");
            Ok(())
        })?;
        transfer_natively(site, agent)
    })
}

#[test]
fn balance_xor_is_native() -> Result<()> {
    play(Bond::Xor, "xdp-native", transfer_natively)
}

#[test]
fn lacp_is_native() -> Result<()> {
    play(Bond::Lacp, "xdp-native", transfer_natively)
}

#[test]
fn a_mode_without_native_xdp_is_served_in_generic_mode() -> Result<()> {
    play(Bond::Tlb, "xdp-generic", |site, _| {
        transfer(site, site.client(), &site.servers[0], LENGTH_BYTES).map(drop)
    })
}
