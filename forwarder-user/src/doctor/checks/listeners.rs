//! VIPs: whether clients' packets to them get here.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::doctor::{
    checks::attach,
    facts::{Device, Facts},
    finding::{Cause, Finding},
};

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (vip, owner) in &facts.vips {
        let listeners = facts.config.listeners.iter();
        let names: Vec<_> = listeners
            .filter(|(_, listener)| listener.vips.contains(vip))
            .map(|(name, _)| name.clone())
            .collect();
        let finding = match owner {
            Some(mac) => Some(taken(*vip, *mac)),
            None => unreachable(facts, *vip),
        };
        findings.extend(finding.map(|finding| finding.affects(names)));
    }
    findings
}

fn taken(vip: IpAddr, mac: [u8; 6]) -> Finding {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let what = format!(
        "another host ({mac}) answers {} for VIP {vip}: clients may reach that one",
        if vip.is_ipv4() {
            "ARP"
        } else {
            "neighbour discovery"
        }
    );
    Finding::warning(Cause::VipTaken, vip.to_string(), what).advice(format!(
        "if it is no gateway that shares the VIP, on that host: ip address del {} dev DEVICE",
        IpNet::from(vip)
    ))
}

/// The data path answers ARP and neighbour discovery for a VIP where it is attached, so there the VIP's network has
/// to be.
fn unreachable(facts: &Facts, vip: IpAddr) -> Option<Finding> {
    let holds = |device: &&Device| {
        device
            .addresses
            .iter()
            .any(|prefix| prefix.prefix_len() < prefix.max_prefix_len() && prefix.contains(&vip))
    };
    let holders: Vec<_> = facts.devices.iter().filter(holds).collect();
    if holders.iter().any(|device| facts.is_attached(&device.link.name)) {
        return None;
    }
    let Some(holder) = holders.first() else {
        let what = format!(
            "VIP {vip} lies in no network of an attached interface: only a router that has a route to it through this \
             gateway brings clients here"
        );
        let own = facts
            .config
            .interfaces
            .keys()
            .filter_map(|name| facts.device(name))
            .flat_map(|device| &device.addresses)
            .find(|address| address.addr().is_ipv4() == vip.is_ipv4());
        let via = own.map_or_else(|| "GATEWAY".to_owned(), |own| own.addr().to_string());
        return Some(
            Finding::warning(Cause::VipUnrouted, vip.to_string(), what).advice(format!(
                "if there is none yet, on the clients' router: ip route replace {} via {via}",
                IpNet::from(vip)
            )),
        );
    };
    let name = &holder.link.name;
    let what = format!(
        "VIP {vip} lies in a network of {name}, which is no [interface] of the configuration: nobody answers clients \
         there"
    );
    Some(Finding::broken(Cause::VipNotAttached, name, what).fixes(attach(facts, name)))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{
        diagnose::fix::Fix,
        doctor::{checks::testing::sound, finding::Severity},
    };

    const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 100));

    #[test]
    fn a_vip_on_an_attached_network_has_nothing() {
        assert_eq!(check(&sound()), []);
    }

    #[test]
    fn the_interface_that_is_not_attached_is_named() {
        let mut facts = sound();
        facts.config.interfaces.remove("eth0");
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::VipNotAttached, Severity::Broken)
        );
        assert_eq!(finding.affects, ["web"]);
        assert_eq!(
            finding.fixes,
            [Fix::here(
                r#"printf '\n[interface."%s"]\n' eth0 >> /etc/forwarder.toml"#
            )]
        );
    }

    #[test]
    fn a_vip_of_no_network_here_may_be_routed() {
        let mut facts = sound();
        facts.devices[0].addresses.clear();
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::VipUnrouted, Severity::Warning)
        );
        assert!(
            finding
                .advice
                .as_ref()
                .unwrap()
                .contains("ip route replace 172.16.0.100/32 via 172.16.1.1")
        );
    }

    #[test]
    fn another_owner_is_named() {
        let mut facts = sound();
        facts.vips.insert(VIP, Some([2, 0, 0, 0, 0, 9]));
        let [finding] = &check(&facts)[..] else { panic!() };
        assert!(finding.what.contains("02:00:00:00:00:09"), "{}", finding.what);
    }
}
