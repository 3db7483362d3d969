//! Ring 4: `forwarder doctor` on devices that a lab on any kernel cannot make: a network card with large receive
//! offload, and a VRF.
//!
//! `cargo xtask test vm` boots a kernel that has them, with the card in its first network namespace, and says so
//! in `FORWARDER_TESTS_VM`. Elsewhere these tests are skipped.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent},
    configuration::Configuration,
    load::Answer,
    topology::{Extras, Site},
    wait_until,
};
use serde_json::Value;

/// Set to the name of the network card, in the virtual machine only.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// Requests that show whether all backends serve: enough that a share of one half is never missed.
const REQUESTS: u32 = 24;
/// Until the agent's programs and probes are at work on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// Name of the machine's network card, or nothing where this is no such machine.
fn card() -> Option<String> {
    let card = env::var(MACHINE_VARIABLE).ok();
    if card.is_none() {
        println!("SKIP: needs `cargo xtask test vm`");
    }
    card.filter(|_| lab::can_run_test(Some(agent::binary())))
}

fn write(site: &Site, configuration: &Configuration) -> Result<PathBuf> {
    let file = site.lab.directory().join("forwarder.toml");
    fs::write(&file, configuration.to_string())?;
    Ok(file)
}

/// What `doctor -o json` finds on the gateway.
fn findings(site: &Site, file: &Path) -> Result<Vec<Value>> {
    let (binary, file) = (agent::binary()?.display().to_string(), file.display().to_string());
    let output = site
        .gateway
        .output(&binary, &["doctor", "-c", &file, "-o", "json"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
    let findings = report["findings"].as_array().context("a list of findings")?;
    Ok(findings.clone())
}

/// The first finding, which has to be this one; its commands for the gateway are then run.
fn mend(site: &Site, file: &Path, cause: &str) -> Result<()> {
    let found = findings(site, file)?;
    let first = found.first().context("a finding")?;
    ensure!(first["cause"] == cause, "expected {cause} first: {found:#?}");
    ensure!(first["severity"] == "broken", "{first:#}");
    let fixes = first["fixes"].as_array().context("a list of fixes")?;
    ensure!(!fixes.is_empty(), "no command: {first:#}");
    for fix in fixes {
        ensure!(fix["host"] == "gateway", "{fix:#}");
        let command = fix["command"].as_str().context("a command")?;
        println!("{cause}: {command}");
        let output = site.gateway.output("sh", &["-c", command])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{command}`: {said}");
    }
    Ok(())
}

/// Causes of what is found.
fn causes(found: &[Value]) -> Vec<&str> {
    found
        .iter()
        .filter_map(|finding| finding["cause"].as_str())
        .collect()
}

/// Every server answers the client, and no request fails.
fn all_serve(site: &Site) -> Result<()> {
    let mut silent: Vec<_> = site.servers.iter().map(|server| server.name).collect();
    for _ in 0..REQUESTS {
        match site.curl()? {
            Answer::Body(page) => {
                let server = site.answered_by(&page).context("a page of a server")?;
                silent.retain(|name| *name != server.name);
            }
            Answer::Failed(why) => bail!("a request failed: {why}"),
        }
    }
    ensure!(silent.is_empty(), "no answer from {silent:?}");
    Ok(())
}

/// Forwarding switches the offload off when it is switched on itself, so it takes somebody who switches it on later.
#[test]
fn large_receive_offload() -> Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    // The kernel gives it back when the namespace goes.
    let status = Command::new("ip")
        .args(["link", "set", &card, "netns", site.gateway.name()])
        .status()?;
    ensure!(status.success(), "the card {card} cannot be moved: {status}");
    site.gateway.address(&card, "10.99.0.1/24")?;
    site.gateway.run(&format!("ip link set {card} up"))?;
    site.gateway.offload(&card, "lro", true)?;
    let configuration = site.web_configuration().interface(&card, &[("mode", "auto")]);
    let file = write(&site, &configuration)?;

    mend(&site, &file, "lro-on")?;
    let features = site.gateway.run(&format!("ethtool -k {card}"))?;
    ensure!(features.contains("large-receive-offload: off"), "{features}");
    let found = findings(&site, &file)?;
    ensure!(!causes(&found).contains(&"lro-on"), "still there: {found:#?}");
    Ok(())
}

/// The tunnel device is a VRF's, whose table lacks the route.
#[test]
fn a_vrf_without_the_route() -> Result<()> {
    if card().is_none() {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let gateway = &site.gateway;
    gateway.run("ip link add name blue type vrf table 10")?;
    gateway.run("ip link set blue up")?;
    // Takes the routes over it out of the main table.
    gateway.run(&format!("ip link set {} master blue", site.tunnel))?;
    gateway.sysctl("net/ipv4/tcp_l3mdev_accept", "1")?;
    let text = site.web_configuration().to_string();
    let text = text.replace("[network.vpc2]", "[network.vpc2]\nvrf = \"blue\"");
    let configuration = Configuration::from_text(text);
    let file = write(&site, &configuration)?;
    let rules = gateway.run("ip rule")?;

    mend(&site, &file, "table-without-route")?;
    let found = findings(&site, &file)?;
    ensure!(found.is_empty(), "{found:#?}");
    assert_eq!(gateway.run("ip rule")?, rules, "the doctor left a rule behind");

    let agent = Agent::start(&site.lab, gateway, &configuration)?;
    wait_until("the server in the VRF to serve", PATIENCE, || all_serve(&site))?;
    let with_agent = gateway.run("ip rule")?;
    ensure!(with_agent.contains("946:"), "no rule for the VRF: {with_agent}");
    let found = findings(&site, &file)?;
    ensure!(found.is_empty(), "beside the agent: {found:#?}");
    agent.stop()?;
    Ok(())
}
