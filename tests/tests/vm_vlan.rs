//! Ring 4: clients and servers in VLANs of one trunk, behind one network card of the gateway.
//!
//! A switch adds and strips the tags of clients (VLAN 5) and servers (VLAN 6); on the gateway both are devices on top
//! of the trunk, which has the XDP program. VLAN devices take a module that not every kernel has, so the tests run in
//! `cargo xtask test vm` only; elsewhere they are skipped.

use std::{collections::BTreeMap, env, fs, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lab, Lifetime, Namespace,
    agent::{self, ShowLog},
    crossing::transfer,
    nginx::Nginx,
    topology::{POOL, PORT, Server, Site},
};
use serde_json::Value;

/// Set in the virtual machine only.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// Sent in either direction.
const LENGTH_BYTES: u32 = 10_000_000;
const MTU_BYTES: u16 = 1500;
/// With room for two tags: a veth counts one of them beside its MTU.
const TRUNK_MTU_BYTES: u16 = MTU_BYTES + 4;
const PAGE: &str = "a page from VLAN 6";

/// How tags are written on the trunk, by the commands that make a device for them on top of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tags {
    /// IEEE 802.1Q.
    One,
    /// IEEE 802.1ad: both VLANs inside the outer VLAN 100.
    Two,
}

/// Makes the devices of VLAN 5 and 6 on top of `trunk`, called `trunk.5` and `trunk.6`.
fn add_vlans(host: &Namespace, trunk: &str, tags: Tags) -> Result<()> {
    let carrier = match tags {
        Tags::One => trunk.to_owned(),
        Tags::Two => {
            let outer = format!("{trunk}.100");
            host.run(&format!(
                "ip link add link {trunk} name {outer} type vlan proto 802.1ad id 100"
            ))?;
            host.run(&format!("ip link set {outer} up"))?;
            outer
        }
    };
    for vlan in [5, 6] {
        host.run(&format!(
            "ip link add link {carrier} name {trunk}.{vlan} mtu {MTU_BYTES} type vlan id {vlan}"
        ))?;
        host.run(&format!("ip link set {trunk}.{vlan} up"))?;
    }
    Ok(())
}

/// The trunk's far end is a host with both VLANs, each bridged to the cable of a host that knows nothing of them.
fn site(tags: Tags) -> Result<Site> {
    let lab = Lab::open(Lifetime::Process)?;
    let [gateway, switch, client, server] =
        ["gateway", "switch", "client", "server"].map(|role| lab.namespace(role));
    let (gateway, switch, client, server) = (gateway?, switch?, client?, server?);
    lab.cable((&gateway, "trunk"), (&switch, "trunk"), TRUNK_MTU_BYTES)?;
    lab.cable((&switch, "port5"), (&client, "eth0"), MTU_BYTES)?;
    lab.cable((&switch, "port6"), (&server, "eth0"), MTU_BYTES)?;
    for end in [&gateway, &switch] {
        // XDP sees tags in the frame only, not beside it.
        for feature in [
            "rxvlan",
            "txvlan",
            "rx-vlan-stag-hw-parse",
            "tx-vlan-stag-hw-insert",
        ] {
            end.offload("trunk", feature, false)?;
        }
        add_vlans(end, "trunk", tags)?;
    }
    for vlan in [5, 6] {
        switch.run(&format!("ip link add name vlan{vlan} type bridge"))?;
        for port in [format!("trunk.{vlan}"), format!("port{vlan}")] {
            switch.run(&format!("ip link set {port} master vlan{vlan}"))?;
        }
        switch.run(&format!("ip link set vlan{vlan} up"))?;
    }
    gateway.address("trunk.5", "10.0.5.1/24")?;
    gateway.address("trunk.6", "10.0.6.1/24")?;
    client.address("eth0", "10.0.5.10/24")?;
    server.address("eth0", "10.0.6.10/24")?;
    server.route(POOL, Ipv4Addr::new(10, 0, 6, 1))?;
    gateway.forward()?;
    let nginx = Nginx::start(&lab, &server, &[PORT], PAGE)?;
    Ok(Site {
        clients: vec![client],
        far_router: gateway.clone(),
        carrier: None,
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
        interfaces: &["trunk"],
        tunnel: "",
        networks: [
            ("clients", "10.0.5.0/24", false),
            ("servers", "10.0.6.0/24", false),
        ],
        drawing: "client (VLAN 5) ─┐
                  ├─ switch ═ trunk ═ gateway
server (VLAN 6) ─┘",
        lab,
    })
}

/// Transfers from VLAN to VLAN, `mode` being that of the trunk.
fn play(tags: Tags, mode: &str) -> Result<()> {
    if env::var_os(MACHINE_VARIABLE).is_none() {
        println!("SKIP: needs `cargo xtask test vm`");
        return Ok(());
    }
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = site(tags)?;
    let show_log = ShowLog::of(&site.lab);
    let configuration = site.web_configuration_with(&[("mode", mode)], "full", |_| 1);
    let agent = site.start_agent(&configuration, "web")?;
    site.client()
        .run(&format!("ping -c 3 -i 0.2 -W 5 {}", site.vip))?;
    let transferred = transfer(&site, site.client(), &site.servers[0], LENGTH_BYTES)?;
    let (straight, by_stack) = (
        agent.packets("request_forwarded")?,
        agent.packets("request_to_stack")?,
    );
    println!("{tags:?}, {mode}: {transferred}; {straight} requests straight, {by_stack} by the stack");
    // Generic XDP leaves aggregated packets to the stack, which segments them.
    ensure!(
        straight > 0 && (mode == "generic" || straight > by_stack),
        "{straight} requests left straight from XDP, {by_stack} by the stack"
    );
    show_log.all_is_well();
    Ok(())
}

#[test]
fn one_tag_in_native_mode() -> Result<()> {
    play(Tags::One, "native")
}

#[test]
fn one_tag_in_generic_mode() -> Result<()> {
    play(Tags::One, "generic")
}

#[test]
fn two_tags_in_native_mode() -> Result<()> {
    play(Tags::Two, "native")
}

#[test]
fn two_tags_in_generic_mode() -> Result<()> {
    play(Tags::Two, "generic")
}

/// What `doctor -o json` finds on the gateway, by cause, with its commands.
fn findings(site: &Site, file: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let (binary, file) = (agent::binary()?.display().to_string(), file.display().to_string());
    let output = site
        .gateway
        .output(&binary, &["doctor", "-c", &file, "-o", "json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().context("a list of findings")?;
    Ok(findings
        .iter()
        .map(|finding| {
            let fixes = finding["fixes"].as_array().into_iter().flatten();
            let commands = fixes.map(|fix| text(&fix["command"])).collect();
            (text(&finding["cause"]), commands)
        })
        .collect())
}

#[test]
fn the_doctor_finds_tags_that_the_card_takes_out() -> Result<()> {
    const CAUSE: &str = "vlan-tags-hidden";
    if env::var_os(MACHINE_VARIABLE).is_none() || !lab::can_run_test(Some(agent::binary())) {
        println!("SKIP: needs `cargo xtask test vm`");
        return Ok(());
    }
    let site = site(Tags::One)?;
    let configuration = site.web_configuration_with(&[("mode", "native")], "full", |_| 1);
    let file = site.lab.directory().join("forwarder.toml");
    fs::write(&file, configuration.to_string())?;
    let found = findings(&site, &file)?;
    ensure!(!found.contains_key(CAUSE), "{found:?}");

    site.gateway.offload("trunk", "rxvlan", true)?;
    let found = findings(&site, &file)?;
    for command in found.get(CAUSE).with_context(|| format!("{found:?}"))? {
        site.gateway.run(command)?;
    }
    let found = findings(&site, &file)?;
    ensure!(!found.contains_key(CAUSE), "still there: {found:?}");
    Ok(())
}
