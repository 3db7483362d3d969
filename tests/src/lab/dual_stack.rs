//! IPv6 beside IPv4 in the cross-region lab: the same hosts, links and tunnel with addresses and routes of their own;
//! and in the peering lab, where a tunnel carries nothing else.
//!
//! Nothing of the gateway's VIPs and pool is configured on any host: who has them, the data path answers.

use std::net::Ipv6Addr;

use anyhow::Result;

use super::{
    Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    topology::{Extras, Site},
};

/// Back-to-origin addresses of IPv6; the first is for probes.
pub const POOL_V6: &str = "fd64::/64";
/// Lies in the clients' network.
pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x16, 0, 0, 0, 0, 0, 0x100);
/// The client's address.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x16, 0, 0, 0, 0, 0, 0x10);
/// ECS01's, beside the gateway.
pub const LOCAL_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x16, 1, 0, 0, 0, 0, 0x10);
/// ECS02's, behind the tunnel.
pub const REMOTE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc0, 1, 0, 0, 0, 0, 0x10);

/// The peering lab's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peering {
    pub vip: Ipv6Addr,
    pub server: Ipv6Addr,
    /// The router behind the tunnel.
    pub far_router: Ipv6Addr,
}

/// Addresses in the peering lab, whose networks are fd00:18::/64 and, behind the tunnel, fd00:17::/64.
pub const PEERING: Peering = Peering {
    vip: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x100),
    server: Ipv6Addr::new(0xfd00, 0x17, 0, 0, 0, 0, 0, 0x205),
    far_router: Ipv6Addr::new(0xfd00, 0x17, 0, 0, 0, 0, 0, 1),
};

/// Lets a host have IPv6. Labs of IPv4 do without, so that nothing is said on their links that no test asked for.
pub(super) fn allow(host: &Namespace) -> Result<()> {
    for interfaces in ["all", "default"] {
        host.sysctl(&format!("net/ipv6/conf/{interfaces}/disable_ipv6"), "0")?;
    }
    Ok(())
}

/// Gives gateway, client, far router and server of a peering site their IPv6 addresses and routes; the tunnel has its
/// own.
pub(super) fn add_peering([gateway, client, far, server]: [&Namespace; 4]) -> Result<()> {
    for (host, interface, address) in [
        (gateway, "eth0", "fd00:18::1/64"),
        (client, "eth0", "fd00:18::10/64"),
        (far, "eth1", "fd00:17::1/64"),
        (server, "eth0", "fd00:17::205/64"),
    ] {
        host.run(&format!("ip address add {address} dev {interface} nodad"))?;
    }
    for (host, to, via) in [
        (gateway, "fd00:17::/64", "fd18::2"),
        (client, "fd00:17::/64", "fd00:18::1"),
        (far, "fd00:18::/64", "fd18::1"),
        (far, POOL_V6, "fd18::1"),
        (server, "fd00:18::/64", "fd00:17::1"),
        (server, POOL_V6, "fd00:17::1"),
    ] {
        host.run(&format!("ip route add {to} via {via}"))?;
    }
    Ok(())
}

/// Gives the hosts of a cross-region site their IPv6 addresses and routes.
pub fn add(site: &Site) -> Result<()> {
    let (gateway, far, client) = (&site.gateway, &site.far_router, site.client());
    let (local, remote) = (&site.server("ecs01")?.namespace, &site.server("ecs02")?.namespace);
    for host in [gateway, far, client, local, remote] {
        allow(host)?;
    }
    for router in [gateway, far] {
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    for (host, interface, address) in [
        (gateway, "eth0", "fd00:16::1/64"),
        (client, "eth0", "fd00:16::10/64"),
        (gateway, "eth1", "fd00:16:1::1/64"),
        (local, "eth0", "fd00:16:1::10/64"),
        (gateway, site.tunnel, "fd42::1/64"),
        (far, site.tunnel, "fd42::2/64"),
        (far, "eth1", "fd00:c0:1::1/64"),
        (remote, "eth0", "fd00:c0:1::10/64"),
    ] {
        // Without the second that a new address waits for objections (RFC 4862 §5.4): these are known to be free.
        host.run(&format!("ip address add {address} dev {interface} nodad"))?;
    }
    let route = |host: &Namespace, to: &str, via: &str| -> Result<()> {
        host.run(&format!("ip route add {to} via {via}")).map(drop)
    };
    route(gateway, "fd00:c0::/32", "fd42::2")?;
    route(client, "fd00:16::/32", "fd00:16::1")?;
    for to in ["fd00:16::/32", POOL_V6] {
        route(local, to, "fd00:16:1::1")?;
        route(far, to, "fd42::1")?;
        route(remote, to, "fd00:c0:1::1")?;
    }
    Ok(())
}

/// What the agent has to know of it: the pool's prefix and the networks, beside those of IPv4.
pub fn configuration(site: &Site) -> Configuration {
    let text = site.configuration(&[]).to_string();
    let mut text = text.replace("prefixes = [", &format!("prefixes = [\"{POOL_V6}\", "));
    for (v4, v6) in [
        ("172.16.0.0/12", "fd00:16::/32"),
        ("192.168.0.0/16", "fd00:c0::/32"),
        ("172.18.0.0/24", "fd00:18::/64"),
        ("172.17.0.0/24", "fd00:17::/64"),
    ] {
        text = text.replace(&format!("\"{v4}\""), &format!("\"{v4}\", \"{v6}\""));
    }
    Configuration::from_text(text)
}

/// Runs `test` at a cross-region site of both families, with the agent running and all backends of `group` healthy.
pub fn play(
    group: &str,
    configure: impl Fn(&Site) -> Result<Configuration>,
    test: impl FnOnce(&Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !super::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    add(&site)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site)?, group)?;
    if let Err(error) = test(&site, &agent) {
        // What became of the packets tells why.
        let status = agent.status().map(|status| status.reasons);
        for reason in status.into_iter().flatten().filter(|reason| reason.packets > 0) {
            println!("{:>9} {}", reason.packets, reason.name);
        }
        return Err(error);
    }
    show_log.all_is_well();
    Ok(())
}
