//! The host: kernel, forwarding, source validation.

use crate::{
    config::NatMode,
    diagnose::fix::Fix,
    doctor::{
        facts::{Backend, Facts},
        finding::{Cause, Finding, Severity},
    },
};

/// The oldest kernel that this is meant for.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
const KEEP: &str = "to keep it over a reboot, write the setting to a file in /etc/sysctl.d";

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let host = &facts.host;
    let mut findings = Vec::new();
    if host.kernel_version < OLDEST_KERNEL {
        let (major, minor) = OLDEST_KERNEL;
        let what = format!(
            "kernel {} is older than {major}.{minor}, from which on this is meant to work",
            host.kernel
        );
        findings.push(
            Finding::warning(Cause::KernelTooOld, "kernel", what).advice("update the kernel of this gateway"),
        );
    }
    if host.has_jit == Some(false) {
        let fix = Fix::here("sysctl -w net.core.bpf_jit_enable=1");
        let what = "BPF programs are interpreted, which costs several times the CPU";
        findings.push(
            Finding::warning(Cause::JitOff, "net.core.bpf_jit_enable", what)
                .fixes([fix])
                .advice(KEEP),
        );
    }
    findings.extend(forwarding(facts));
    findings.extend(source_validation(facts));
    findings
}

fn forwarding(facts: &Facts) -> Vec<Finding> {
    let off = |setting: String, what: String| {
        let fix = Fix::here(format!("sysctl -w {setting}=1"));
        Finding::broken(Cause::ForwardingOff, setting, what)
            .fixes([fix])
            .advice(KEEP)
    };
    let (uses_v4, uses_v6) = facts.config.families();
    let mut findings = Vec::new();
    if uses_v6 && !facts.host.forwards_v6 {
        let what = "this host does not forward IPv6: requests to tunnels and packets to next hops that have to be \
                    resolved are dropped";
        findings.push(off("net.ipv6.conf.all.forwarding".to_owned(), what.to_owned()).advice(
            "if this gateway has its own IPv6 address by router advertisements, set accept_ra=2 on that interface first: \
             forwarding switches 1 off",
        ));
    } else if uses_v6 {
        let silent = facts
            .devices
            .iter()
            .filter(|device| device.forwards_v6 == Some(false));
        findings.extend(silent.map(|device| {
            let name = &device.link.name;
            off(
                format!("net.ipv6.conf.{name}.forwarding"),
                format!("IPv6 packets that come in by {name} are not forwarded"),
            )
        }));
    }
    if !uses_v4 {
        return findings;
    }
    if !facts.host.forwards {
        let what = "this host does not forward: requests to tunnels and packets to next hops that have to be \
                    resolved are dropped";
        findings.push(off("net.ipv4.ip_forward".to_owned(), what.to_owned()));
        return findings;
    }
    let silent = facts
        .devices
        .iter()
        .filter(|device| device.forwards == Some(false));
    findings.extend(silent.map(|device| {
        let name = &device.link.name;
        off(
            format!("net.ipv4.conf.{name}.forwarding"),
            format!("packets that come in by {name} are not forwarded"),
        )
    }));
    findings
}

/// Rewritten requests to backends behind a tunnel go up the stack, which looks at their source.
fn source_validation(facts: &Facts) -> Vec<Finding> {
    let through_stack = facts.backends.iter().filter(|backend| {
        let is_full = facts.config.groups[&backend.group].nat == NatMode::Full;
        let egress = backend.egress.as_ref().filter(|_| backend.address.is_ipv4());
        is_full && egress.is_some_and(|egress| !facts.config.interfaces.contains_key(egress))
    });
    let affected: Vec<_> = through_stack.map(Backend::label).collect();
    let severity = if affected.is_empty() {
        Severity::Warning
    } else {
        Severity::Broken
    };
    let dropping = facts.devices.iter().filter_map(|device| {
        let filter = device.rp_filter?;
        let is_hit = facts.config.interfaces.contains_key(&device.link.name);
        (is_hit && filter.drops_rewritten(facts.host.is_pool_routed)).then_some((&device.link.name, filter))
    });
    dropping
        .map(|(name, filter)| {
            let what = format!(
                "source validation (rp_filter, {filter}) of {name} drops rewritten requests on their way to a tunnel: \
                 their source is of the SNAT pool"
            );
            let fix = Fix::here(format!(
                "sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{name}.rp_filter=0"
            ));
            Finding::new(severity, Cause::RpFilter, name, what)
                .affects(affected.clone())
                .fixes([fix])
                .advice(KEEP)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{doctor::checks::testing::sound, network::RpFilter};

    #[test]
    fn a_sound_host_has_nothing() {
        assert_eq!(check(&sound()), []);
    }

    #[test]
    fn forwarding_is_asked_of_the_host_then_of_its_interfaces() {
        let mut facts = sound();
        facts.host.forwards = false;
        for device in &mut facts.devices {
            device.forwards = Some(false);
        }
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(finding.cause, Cause::ForwardingOff);
        assert_eq!(finding.fixes, [Fix::here("sysctl -w net.ipv4.ip_forward=1")]);
        facts.host.forwards = true;
        let findings = check(&facts);
        assert!(
            findings
                .iter()
                .any(|one| one.place == "net.ipv4.conf.eth0.forwarding"),
            "{findings:?}"
        );
    }

    #[test]
    fn source_validation_breaks_only_what_goes_up_the_stack() {
        let mut facts = sound();
        facts.devices[0].rp_filter = Some(RpFilter::Strict);
        let [finding] = &check(&facts)[..] else { panic!() };
        assert_eq!(
            (finding.severity, finding.place.as_str()),
            (Severity::Broken, "eth0")
        );
        assert_eq!(finding.affects, ["web/ecs02"]);
        facts.backends.retain(|backend| backend.name == "ecs01");
        assert_eq!(check(&facts)[0].severity, Severity::Warning);

        facts.devices[0].rp_filter = Some(RpFilter::Loose);
        assert_eq!(check(&facts).len(), 1);
        facts.host.is_pool_routed = true;
        assert_eq!(check(&facts), []);
    }

    #[test]
    fn old_kernels_and_interpreters_are_remarked_on() {
        let mut facts = sound();
        facts.host.kernel_version = (5, 10);
        facts.host.has_jit = Some(false);
        let causes: Vec<_> = check(&facts).iter().map(|finding| finding.cause).collect();
        assert_eq!(causes, [Cause::KernelTooOld, Cause::JitOff]);
    }
}
