//! Networks that must be elsewhere, but are partly here: addresses and routes of this host inside them.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    config::RoutingTable,
    diagnose::fix::Fix,
    doctor::{
        facts::{Backend, Facts},
        finding::{Cause, Finding, Severity},
    },
    network::{InterfaceKind, MAIN_TABLE},
};

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = addresses(facts);
    findings.extend(routes(facts));
    findings.extend(vrfs(facts));
    findings
}

/// VRF devices that networks name.
fn vrfs(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, network) in &facts.config.networks {
        if let Some(RoutingTable::Vrf(device)) = &network.table
            && !facts.tables.contains_key(name)
        {
            let what =
                format!("network \"{name}\" is in VRF {device}, but there is no VRF device of that name");
            findings.push(
                Finding::broken(Cause::InterfaceMissing, device, what)
                    .advice("create it, or correct the name in the configuration; `ip link show type vrf` lists those that exist"),
            );
        }
    }
    findings
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The CIDRs that lead into a tunnel, and the SNAT pool, which is on no link.
fn elsewhere(facts: &Facts) -> Vec<(IpNet, String, Option<&str>)> {
    let networks = facts.config.networks.iter().filter_map(|(name, network)| {
        let tunnel = network.tunnel.as_deref()?;
        let cidrs = network.cidrs.iter();
        Some(cidrs.map(move |cidr| (*cidr, format!("network \"{name}\""), Some(tunnel))))
    });
    let pool = facts.config.snat.prefixes.iter();
    networks
        .flatten()
        .chain(pool.map(|prefix| (*prefix, "the SNAT pool".to_owned(), None)))
        .collect()
}

/// Addresses whose prefix overlaps one of those networks: the kernel looks for its hosts on that link.
fn addresses(facts: &Facts) -> Vec<Finding> {
    let elsewhere = elsewhere(facts);
    let mut findings = Vec::new();
    for device in &facts.devices {
        let name = &device.link.name;
        if device.link.kind == InterfaceKind::Loopback {
            continue;
        }
        for address in &device.addresses {
            let inside = elsewhere
                .iter()
                .find(|(cidr, _, tunnel)| *tunnel != Some(name.as_str()) && overlap(cidr, address));
            let Some((cidr, owner, tunnel)) = inside else {
                continue;
            };
            let what = format!(
                "address {address} of {name} overlaps {cidr} of {owner}: packets to it leave by {name}"
            );
            let is_pool = tunnel.is_none();
            findings.push(
                finding(facts, address.trunc(), what, is_pool)
                    .fixes([Fix::here(format!("ip address del {address} dev {name}"))])
                    .advice(format!("if {name} needs that address, give it another network: one of the two has to be renumbered")),
            );
        }
    }
    findings
}

/// Routes that somebody wrote to a part of those networks.
fn routes(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (cidr, owner, tunnel) in elsewhere(facts) {
        let Some(tunnel) = tunnel else { continue };
        for entry in &facts.policy.entries {
            let Some(device) = entry.interface.and_then(|index| facts.device_by_index(index)) else {
                continue;
            };
            let is_part = cidr.contains(&entry.prefix) && cidr != entry.prefix;
            if !is_part || entry.is_of_address || device.link.name == tunnel {
                continue;
            }
            let name = &device.link.name;
            let what = format!(
                "a route to {} through {name} overlaps {cidr} of {owner}, which is behind {tunnel}",
                entry.prefix
            );
            findings.push(
                finding(facts, entry.prefix, what, false).fixes([Fix::here(format!(
                    "ip route del {}{}",
                    entry.prefix,
                    in_table(entry.table)
                ))]),
            );
        }
    }
    findings
}

/// Broken if a backend lies there, or if it is the pool's.
fn finding(facts: &Facts, prefix: IpNet, what: String, is_pool: bool) -> Finding {
    let inside = facts
        .backends
        .iter()
        .filter(|backend| prefix.contains(&backend.address));
    let affected: Vec<_> = inside.map(Backend::label).collect();
    let severity = if is_pool || !affected.is_empty() {
        Severity::Broken
    } else {
        Severity::Warning
    };
    Finding::new(severity, Cause::OverlappingNetwork, prefix.to_string(), what).affects(affected)
}

/// Words that name a routing table in a command.
pub(super) fn in_table(table: u32) -> String {
    if table == MAIN_TABLE {
        String::new()
    } else {
        format!(" table {table}")
    }
}

/// Whether one of `findings` explains why packets to `address` go astray.
pub(super) fn captures(findings: &[Finding], address: IpAddr) -> bool {
    findings.iter().any(|finding| {
        let prefix = finding.place.parse::<IpNet>();
        finding.cause == Cause::OverlappingNetwork && prefix.is_ok_and(|prefix| prefix.contains(&address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{doctor::checks::testing::sound, network::Entry};

    fn add(facts: &mut Facts, address: &str) {
        facts.devices[0].addresses.push(address.parse().unwrap());
    }

    #[test]
    fn networks_that_are_where_they_should_be_have_nothing() {
        assert_eq!(check(&sound()), []);
    }

    #[test]
    fn an_address_inside_a_remote_network_breaks_its_backends() {
        let mut facts = sound();
        add(&mut facts, "192.168.1.77/24");
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(
            (finding.severity, finding.place.as_str()),
            (Severity::Broken, "192.168.1.0/24")
        );
        assert_eq!(finding.affects, ["web/ecs02"]);
        assert_eq!(
            finding.fixes,
            [Fix::here("ip address del 192.168.1.77/24 dev eth0")]
        );
        assert!(captures(&check(&facts), IpAddr::from([192, 168, 1, 10])));
        let mut facts = sound();
        add(&mut facts, "192.168.9.77/24");
        assert_eq!(check(&facts)[0].severity, Severity::Warning);
    }

    #[test]
    fn an_address_inside_the_pool_breaks() {
        let mut facts = sound();
        add(&mut facts, "100.64.0.9/10");
        assert_eq!(check(&facts)[0].severity, Severity::Broken);
    }

    #[test]
    fn a_longer_route_to_elsewhere_is_deleted() {
        let mut facts = sound();
        let mut entry = Entry {
            table: 7,
            prefix: "192.168.1.0/24".parse().unwrap(),
            interface: Some(1),
            is_of_address: false,
            discards: false,
        };
        facts.policy.entries.push(entry.clone());
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(finding.fixes, [Fix::here("ip route del 192.168.1.0/24 table 7")]);
        // Into the tunnel it may lead.
        entry.interface = Some(3);
        *facts.policy.entries.last_mut().unwrap() = entry;
        assert_eq!(check(&facts), []);
    }
}
