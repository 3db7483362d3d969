//! Ring 3: ping through the gateway to servers, beside it and behind its tunnel, and what `traceroute -I` would see.
//!
//! Who has answered shows in the time to live: the gateway's own answers arrive with all of it.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    configuration::{Check, Configuration},
    dual_stack::{self, LOCAL_V6, VIP_V6, play},
    topology::Site,
};

const GROUP: &str = "servers";

/// A listener of echo in front of one server, which need not have a port, and is checked by echo requests.
fn echo(site: &Site, nat: &str, vip: impl Into<IpAddr>, server: impl Into<IpAddr>) -> Configuration {
    dual_stack::configuration(site)
        .group(GROUP, nat, Check::None)
        .table(
            &format!("group.{GROUP}.backend.server"),
            &[("address", &format!("\"{}\"", server.into()))],
        )
        .table(
            "listener.ping",
            &[
                ("vip", &format!("\"{}\"", vip.into())),
                ("protocol", "\"icmp\""),
                ("group", &format!("\"{GROUP}\"")),
            ],
        )
}

/// The time to live that replies arrive with; all of them arrive.
fn ping(site: &Site, vip: impl Into<IpAddr>, options: &str) -> Result<u8> {
    let vip = vip.into();
    let said = site
        .client()
        .run(&format!("ping -c 3 -i 0.2 -W 2 {options} {vip}"))?;
    let ttl = said.split("ttl=").nth(1).context("no reply")?;
    let digits: String = ttl.chars().take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}

/// Who says that a ping with so few hops ends there.
fn ends_at(site: &Site, vip: impl Into<IpAddr>, hops: u8) -> Result<String> {
    let vip = vip.into();
    let output = site.client().output(
        "ping",
        &["-c", "1", "-W", "2", "-t", &hops.to_string(), &vip.to_string()],
    )?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("Time to live exceeded"), "{said}");
    let from = said.split("From ").nth(1).context("from nobody")?;
    Ok(from.split_whitespace().next().unwrap_or_default().to_owned())
}

#[test]
fn a_ping_reaches_a_server_beside_the_gateway() -> Result<()> {
    let configure = |site: &Site| Ok(echo(site, "full", site.vip, site.server("ecs01")?.address));
    play(GROUP, configure, |site, agent| {
        // A hop less than the server's own.
        ensure!(ping(site, site.vip, "")? == 63);
        ensure!(ping(site, site.vip, "-s 1400")? == 63);
        let output = agent.ask("flows", &["--protocol", "icmp"])?;
        let flows = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            flows.contains("icmp") && flows.contains("ping") && flows.contains("100.64.0."),
            "{flows}"
        );
        // The first hop of a route that `traceroute -I` shows is the gateway.
        ensure!(ends_at(site, site.vip, 1)? == site.vip.to_string());
        Ok(())
    })
}

#[test]
fn a_ping_reaches_a_server_behind_the_tunnel() -> Result<()> {
    let configure = |site: &Site| Ok(echo(site, "full", site.vip, site.server("ecs02")?.address));
    play(GROUP, configure, |site, _| {
        // The gateway and the far router take a hop each.
        ensure!(ping(site, site.vip, "")? == 62);
        ensure!(ends_at(site, site.vip, 1)? == site.vip.to_string());
        // The far router reports, and its message is translated: the client hears of it from the VIP.
        ensure!(ends_at(site, site.vip, 2)? == site.vip.to_string());
        Ok(())
    })
}

#[test]
fn in_dnat_the_server_sees_who_pings() -> Result<()> {
    let configure = |site: &Site| Ok(echo(site, "dnat", site.vip, site.server("ecs01")?.address));
    play(GROUP, configure, |site, agent| {
        ensure!(ping(site, site.vip, "")? == 63);
        let output = agent.ask("flows", &["--protocol", "icmp", "-o", "json"])?;
        let flows: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let flow = &flows["flows"][0];
        ensure!(flow["binding"] == flow["client"], "{flow}");
        Ok(())
    })
}

#[test]
fn a_ping_over_ipv6_is_forwarded_too() -> Result<()> {
    let configure = |site: &Site| Ok(echo(site, "full", VIP_V6, LOCAL_V6));
    play(GROUP, configure, |site, _| {
        ensure!(ping(site, VIP_V6, "")? == 63);
        Ok(())
    })
}

#[test]
fn a_ping_is_translated_between_the_families() -> Result<()> {
    let configure = |site: &Site| Ok(echo(site, "full", VIP_V6, site.server("ecs01")?.address));
    play(GROUP, configure, |site, _| {
        ensure!(ping(site, VIP_V6, "")? == 63);
        Ok(())
    })?;
    let configure = |site: &Site| Ok(echo(site, "full", site.vip, LOCAL_V6));
    play(GROUP, configure, |site, _| {
        ensure!(ping(site, site.vip, "")? == 63);
        Ok(())
    })
}

#[test]
fn without_a_server_a_ping_is_told_so() -> Result<()> {
    let configure = |site: &Site| {
        // Nobody has the second address.
        let silent = echo(site, "full", site.vip, "172.16.1.77".parse::<IpAddr>()?).to_string();
        Ok(Configuration::from_text(silent)
            .group("web", "full", Check::None)
            .backend("web", "ecs01", site.server("ecs01")?.address, 80, 100)
            .listener("web", site.vip, 80, "tcp", "web"))
    };
    play(GROUP, configure, |site, agent| {
        let drained = agent.ask("drain", &[&format!("{GROUP}/server")])?;
        ensure!(drained.status.success(), "{drained:?}");
        let vip = site.vip.to_string();
        let output = site.client().output("ping", &["-c", "1", "-W", "2", &vip])?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(said.contains("Destination Host Unreachable"), "{said}");
        Ok(())
    })
}
