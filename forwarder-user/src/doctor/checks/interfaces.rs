//! The interfaces of the configuration: there, up, of a kind that works; offloads, queues, XDP mode.

use crate::{
    config::{self, XdpMode},
    diagnose::{self, fix::Fix},
    doctor::{
        checks::{file, restart},
        facts::{Device, Facts},
        finding::{Cause, Finding},
    },
    network::InterfaceKind,
    state::vlans::{self, Hidden},
};

const LRO: &str = "rx-lro";
const GRO_HW: &str = "rx-gro-hw";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, wanted) in &facts.config.interfaces {
        let Some(device) = facts.device(name) else {
            findings.push(missing(Cause::InterfaceMissing, "interface", name));
            continue;
        };
        findings.extend(not_ethernet(device));
        findings.extend(enslaved(facts, device));
        findings.extend(down(device, diagnose::Cause::InterfaceDown));
        findings.extend(offloads(device));
        findings.extend(queues(facts, device));
        findings.extend(native_impossible(device, wanted));
        findings.extend(hidden_tags(facts, device, wanted));
    }
    for name in facts.config.tunnels.keys() {
        let Some(device) = facts.device(name) else {
            let cause = Cause::Path(diagnose::Cause::TunnelDown);
            findings.push(missing(cause, "tunnel device", name));
            continue;
        };
        findings.extend(down(device, diagnose::Cause::TunnelDown));
        findings.extend(underlay(facts, device));
    }
    findings
}

/// How XDP is, or would be, attached to an interface: `native` or `generic`, and why.
#[must_use]
pub(in crate::doctor) fn mode(
    device: &Device,
    wanted: &config::Interface,
    attachment: Option<&str>,
) -> (&'static str, String) {
    let expected = expected_mode(device, wanted);
    match attachment {
        Some("xdp-native") => ("native", "attached so by the agent".to_owned()),
        Some("xdp-generic") if expected.0 == "native" => (
            "generic",
            "attached so by the agent; native would be possible after a restart".to_owned(),
        ),
        Some("xdp-generic") => ("generic", expected.1),
        _ => expected,
    }
}

fn expected_mode(device: &Device, wanted: &config::Interface) -> (&'static str, String) {
    let link = &device.link;
    let is_veth = link.kind == InterfaceKind::Veth;
    let generic = |why: &str| ("generic", why.to_owned());
    if wanted.mode == XdpMode::Generic {
        generic("the configuration says so")
    } else if device.runs_programs == Some(false) {
        let driver = link.driver.clone().unwrap_or_else(|| link.kind.to_string());
        let why = if link.kind == InterfaceKind::Bond {
            "the bond runs no XDP programs: its mode is none of balance-rr, active-backup, balance-xor and 802.3ad, or a \
             port cannot"
                .to_owned()
        } else {
            format!("the driver ({driver}) runs no XDP programs")
        };
        ("generic", why)
    } else if wanted.redirect == config::Redirect::Auto && !device.takes_redirects.unwrap_or(!is_veth) {
        generic(if is_veth {
            "frames cannot leave straight from XDP: the other end of the veth has neither XDP nor GRO"
        } else {
            "frames of this MTU cannot leave straight from XDP: the driver, or Linux before 6.3, takes none in several buffers"
        })
    } else if device.runs_programs.is_none() {
        ("native", "the kernel does not say, the agent tries".to_owned())
    } else {
        ("native", "the driver runs XDP programs".to_owned())
    }
}

fn native_impossible(device: &Device, wanted: &config::Interface) -> Option<Finding> {
    let (mode, why) = expected_mode(device, wanted);
    (wanted.mode == XdpMode::Native && mode != "native").then(|| {
        let name = &device.link.name;
        let what = format!("native mode is demanded of {name}, but {why}");
        Finding::broken(Cause::NativeImpossible, name, what).advice(format!(
            "set mode = \"auto\" for [interface.{name}]; for a veth, switch GRO on at its other end: ethtool -K PEER gro on"
        ))
    })
}

fn missing(cause: Cause, kind: &str, name: &str) -> Finding {
    Finding::broken(
        cause,
        name,
        format!("the {kind} {name} of the configuration does not exist"),
    )
    .advice("create it, or correct the name in the configuration; `ip -brief link` lists those that exist")
}

fn not_ethernet(device: &Device) -> Option<Finding> {
    let link = &device.link;
    (!link.is_ethernet).then(|| {
        let what = format!(
            "{} ({}) has no Ethernet header, which is supported for tunnels only",
            link.name, link.kind
        );
        Finding::broken(Cause::NotEthernet, &link.name, what).advice(
            "if it is a tunnel, name it under [tunnel] instead of [interface]; else use an Ethernet device",
        )
    })
}

/// XDP sits below a bond or bridge then, where addresses and routes are not.
fn enslaved(facts: &Facts, device: &Device) -> Option<Finding> {
    let name = &device.link.name;
    let upper = facts.device_by_index(device.link.controller?)?;
    let (upper, kind) = (&upper.link.name, &upper.link.kind);
    if !matches!(kind, InterfaceKind::Bond | InterfaceKind::Bridge) && kind.to_string() != "team" {
        return None;
    }
    let rename = format!(
        r#"sed -i -E 's/^\[interface\."?{}"?\]/[interface."{upper}"]/' {}"#,
        name.replace('.', r"\."),
        file(facts)
    );
    Some(
        Finding::broken(
            Cause::InterfaceEnslaved,
            name,
            format!("{name} is a port of the {kind} {upper}: routes and addresses are there, the data path would be here"),
        )
        .fixes([Fix::here(rename)])
        .fixes(restart(facts)),
    )
}

fn down(device: &Device, cause: diagnose::Cause) -> Option<Finding> {
    let link = &device.link;
    let finding =
        |what: &str| Finding::broken(Cause::Path(cause), &link.name, format!("{} {what}", link.name));
    if !link.is_up {
        let fix = Fix::here(format!("ip link set dev {} up", link.name));
        Some(finding("is down").fixes([fix]))
    } else if !link.has_carrier {
        Some(finding("has no carrier").advice("check what it is connected to: cable, switch port, other end"))
    } else {
        None
    }
}

fn offloads(device: &Device) -> Vec<Finding> {
    let name = &device.link.name;
    let Some(offloads) = &device.offloads else {
        return Vec::new();
    };
    let is_on = |feature: &str| offloads.active.contains(feature);
    let switch_off = |feature: &str| Fix::here(format!("ethtool -K {name} {feature} off"));
    let mut findings = Vec::new();
    if is_on(LRO) {
        let what = format!(
            "large receive offload of {name} merges packets that cannot be forwarded then: the stack drops them, and \
             drivers refuse XDP with it"
        );
        findings.push(Finding::broken(Cause::LroOn, name, what).fixes([switch_off("lro")]));
    }
    if is_on(GRO_HW) && offloads.switchable.contains(GRO_HW) {
        let what = format!(
            "receive offload in hardware (rx-gro-hw) of {name} merges packets before XDP sees them; larger ones than \
             the MTU go to the stack"
        );
        findings.push(Finding::warning(Cause::GroHwOn, name, what).fixes([switch_off(GRO_HW)]));
    }
    findings
}

/// In native mode; in generic mode the kernel keeps the tag with the frame.
fn hidden_tags(facts: &Facts, device: &Device, wanted: &config::Interface) -> Vec<Finding> {
    if expected_mode(device, wanted).0 != "native" {
        return Vec::new();
    }
    let links: Vec<_> = facts.devices.iter().map(|device| device.link.clone()).collect();
    let offloads = |index| facts.device_by_index(index)?.offloads.clone();
    let finding = |hidden: Hidden| {
        let finding = Finding::broken(Cause::VlanTagsHidden, &hidden.name, hidden.to_string());
        if hidden.is_switchable {
            finding.fixes([Fix::here(hidden.command())])
        } else {
            finding.advice(format!(
                "the driver does not let the tags stay: set mode = \"generic\" for [interface.{}]",
                device.link.name
            ))
        }
    };
    let hidden = vlans::hidden(&links, device.link.index, offloads);
    hidden.into_iter().map(finding).collect()
}

fn queues(facts: &Facts, device: &Device) -> Option<Finding> {
    let queues = device.queues?;
    let wanted = queues.most.min(facts.host.cores);
    let name = &device.link.name;
    (device.link.kind == InterfaceKind::Physical && queues.count < wanted).then(|| {
        let what = format!(
            "{name} uses {} of {} receive queues: no more cores than that forward",
            queues.count, queues.most
        );
        Finding::warning(Cause::FewQueues, name, what)
            .fixes([Fix::here(format!("ethtool -L {name} combined {wanted}"))])
    })
}

/// A tunnel that promises more than what carries it.
fn underlay(facts: &Facts, device: &Device) -> Option<Finding> {
    let link = &device.link;
    let (carrier, carrier_bytes) = device.underlay.as_ref()?;
    let overhead_bytes = link.kind.overhead_bytes()?;
    let outer_bytes = link.mtu_bytes + overhead_bytes;
    let fits_bytes = carrier_bytes.saturating_sub(overhead_bytes);
    (outer_bytes > *carrier_bytes).then(|| {
        let name = &link.name;
        let what = format!(
            "{name} takes packets of {} bytes and adds {overhead_bytes}, but {carrier}, which carries it, takes \
             {carrier_bytes}: large packets are cut in two or lost",
            link.mtu_bytes
        );
        Finding::warning(Cause::MtuTooSmall, name, what)
            .fixes([Fix::here(format!("ip link set dev {name} mtu {fits_bytes}"))])
            .fixes(restart(facts))
            .advice(format!("the far end of {name} needs the same MTU"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Redirect,
        doctor::{
            checks::testing::{device, offloads, sound},
            finding::Severity,
        },
        network::{Queues, Vlan},
    };

    fn only(facts: &Facts) -> Finding {
        let findings = check(facts);
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings[0].clone()
    }

    #[test]
    fn sound_interfaces_have_nothing() {
        assert_eq!(check(&sound()), []);
    }

    #[test]
    fn lro_is_switched_off() {
        let mut facts = sound();
        facts.devices[0].offloads = Some(offloads(&["rx-gro", "rx-lro"], &["rx-lro"]));
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::LroOn, Severity::Broken)
        );
        assert_eq!(finding.fixes, [Fix::here("ethtool -K eth0 lro off")]);
    }

    #[test]
    fn hardware_gro_is_remarked_on_where_it_can_be_switched() {
        let mut facts = sound();
        facts.devices[0].offloads = Some(offloads(&["rx-gro-hw"], &[]));
        assert_eq!(check(&facts), []);
        facts.devices[0].offloads = Some(offloads(&["rx-gro-hw"], &["rx-gro-hw"]));
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::GroHwOn, Severity::Warning)
        );
        assert_eq!(finding.fixes, [Fix::here("ethtool -K eth0 rx-gro-hw off")]);
    }

    #[test]
    fn tags_that_native_mode_does_not_see_are_left_in_the_frame() {
        let mut facts = sound();
        let mut vlan = device("eth0.5", 50, InterfaceKind::Vlan, &[]);
        vlan.link.vlan = Some(Vlan {
            carrier: 1,
            id: 5,
            is_service: false,
        });
        facts.devices.push(vlan);
        assert_eq!(check(&facts), []);
        facts.devices[0].offloads = Some(offloads(&["rx-vlan-hw-parse"], &["rx-vlan-hw-parse"]));
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::VlanTagsHidden, Severity::Broken)
        );
        assert_eq!(
            finding.fixes,
            [Fix::here("ethtool -K eth0 rxvlan off txvlan off")]
        );
        facts.config.interfaces.get_mut("eth0").unwrap().mode = XdpMode::Generic;
        assert_eq!(check(&facts), []);
    }

    #[test]
    fn a_bond_that_cannot_be_native_says_what_could() {
        let facts = sound();
        let mut bond = facts.devices[0].clone();
        bond.link.kind = InterfaceKind::Bond;
        bond.runs_programs = Some(false);
        let (name, why) = mode(&bond, &facts.config.interfaces["eth0"], None);
        assert!(name == "generic" && why.contains("active-backup"), "{why}");
    }

    #[test]
    fn what_is_missing_or_down_is_named() {
        let mut facts = sound();
        facts.devices.retain(|device| device.link.name != "eth1");
        assert_eq!(
            (only(&facts).cause, only(&facts).place.as_str()),
            (Cause::InterfaceMissing, "eth1")
        );
        let mut facts = sound();
        facts.devices[0].link.is_up = false;
        assert_eq!(only(&facts).fixes, [Fix::here("ip link set dev eth0 up")]);
        let mut facts = sound();
        facts.devices[0].link.has_carrier = false;
        assert_eq!(only(&facts).cause, Cause::Path(diagnose::Cause::InterfaceDown));
        let mut facts = sound();
        facts.devices.retain(|device| device.link.name != "cen");
        assert_eq!(only(&facts).cause, Cause::Path(diagnose::Cause::TunnelDown));
        let mut facts = sound();
        facts.devices[0].link.is_ethernet = false;
        assert_eq!(only(&facts).cause, Cause::NotEthernet);
    }

    #[test]
    fn a_port_of_a_bond_gives_way_to_the_bond() {
        let mut facts = sound();
        let mut bond = device("bond0", 77, InterfaceKind::Bond, &[]);
        facts.devices[0].link.controller = Some(77);
        facts.devices.push(bond.clone());
        let finding = only(&facts);
        assert_eq!(finding.cause, Cause::InterfaceEnslaved);
        assert_eq!(
            finding.fixes[0].command,
            r#"sed -i -E 's/^\[interface\."?eth0"?\]/[interface."bond0"]/' /etc/forwarder.toml"#
        );
        // A VRF is no such thing.
        bond.link.kind = InterfaceKind::Other("vrf".to_owned());
        *facts.devices.last_mut().unwrap() = bond;
        assert_eq!(check(&facts), []);
    }

    #[test]
    fn a_nic_with_idle_queues_is_remarked_on() {
        let mut facts = sound();
        facts.host.cores = 8;
        facts.devices[0].link.kind = InterfaceKind::Physical;
        facts.devices[0].queues = Some(Queues { count: 1, most: 4 });
        let finding = only(&facts);
        assert_eq!(finding.fixes, [Fix::here("ethtool -L eth0 combined 4")]);
        facts.host.cores = 1;
        assert_eq!(check(&facts), []);
    }

    #[test]
    fn a_tunnel_leaves_room_for_its_headers() {
        let mut facts = sound();
        let cen = facts
            .devices
            .iter_mut()
            .find(|device| device.link.name == "cen")
            .unwrap();
        cen.underlay = Some(("wan".to_owned(), 1400));
        let finding = only(&facts);
        assert_eq!(
            (finding.cause, finding.severity),
            (Cause::MtuTooSmall, Severity::Warning)
        );
        assert_eq!(finding.fixes, [Fix::here("ip link set dev cen mtu 1350")]);
    }

    #[test]
    fn the_mode_comes_with_its_reason() {
        let facts = sound();
        let mut eth0 = facts.devices[0].clone();
        let mut wanted = facts.config.interfaces["eth0"].clone();
        assert_eq!(mode(&eth0, &wanted, None).0, "native");
        assert_eq!(mode(&eth0, &wanted, Some("xdp-generic")).0, "generic");
        eth0.takes_redirects = Some(false);
        let (name, why) = mode(&eth0, &wanted, None);
        assert!(name == "generic" && why.contains("GRO"), "{why}");
        wanted.redirect = Redirect::Off;
        assert_eq!(mode(&eth0, &wanted, None).0, "native");
        eth0.link.mtu_bytes = 9000;
        assert_eq!(mode(&eth0, &wanted, None).0, "native");
        eth0.runs_programs = Some(false);
        wanted.mode = XdpMode::Native;
        assert!(native_impossible(&eth0, &wanted).is_some());
    }
}
