//! Facts and findings as one value; its JSON is documented in docs/doctor.md. Add fields, but rename none.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use super::{
    checks::{answer, findings, mode},
    facts::{Attempt, Backend, Device, Facts},
    finding::{Finding, Severity},
};

/// What `forwarder doctor` says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub file: String,
    /// Nothing was found that breaks traffic.
    pub well: bool,
    /// The likeliest cause of the others first, warnings last.
    pub findings: Vec<Finding>,
    pub host: HostReport,
    pub interfaces: Vec<InterfaceReport>,
    pub listeners: Vec<ListenerReport>,
    pub backends: Vec<BackendReport>,
}

#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    pub kernel: String,
    pub forwarding: bool,
    /// `None`: the kernel does not say.
    pub bpf_jit: Option<bool>,
    pub agent_running: bool,
}

/// An interface or tunnel of the configuration.
#[derive(Clone, Debug, Serialize)]
pub struct InterfaceReport {
    pub name: String,
    /// `veth`, `vxlan`, …; `missing` if it does not exist.
    pub kind: String,
    /// Up and with carrier.
    pub up: bool,
    pub mtu_bytes: u32,
    /// `native`, `generic`; `tcx` for a tunnel.
    pub mode: &'static str,
    /// Why that mode.
    pub why: String,
    /// Receive queues, where the device tells.
    pub queues: Option<u32>,
    /// `off`, `strict`, `loose`.
    pub rp_filter: Option<String>,
    /// Those of receive offloads that are on and matter here: `gro`, `lro`, `gro-hw`.
    pub offloads: Vec<&'static str>,
}

/// A listener on one of its VIPs.
#[derive(Clone, Debug, Serialize)]
pub struct ListenerReport {
    pub name: String,
    pub vip: IpAddr,
    /// One port, a range, or `any`.
    pub port: String,
    pub protocol: &'static str,
    pub group: String,
    /// The interface on whose network the VIP lies.
    pub interface: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendReport {
    pub group: String,
    pub name: String,
    pub address: IpAddr,
    /// `None`: the one that the client asked for.
    pub port: Option<u16>,
    /// Where the route to it leaves.
    pub interface: Option<String>,
    /// The router on the way; `None`: it is on the link, or there is no route.
    pub router: Option<IpAddr>,
    /// `answers`, or how it does not.
    pub answer: String,
    pub probes: Vec<ProbeReport>,
}

/// A probe from one prefix of the SNAT pool.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeReport {
    pub prefix: IpNet,
    pub source: IpAddr,
    pub answered: bool,
    /// Until the answer.
    pub micros: Option<u64>,
    /// Why there was none.
    pub failure: Option<String>,
}

impl Report {
    #[must_use]
    pub fn of(facts: &Facts) -> Self {
        let findings = findings(facts);
        Self {
            file: facts.file.display().to_string(),
            well: findings.iter().all(|finding| finding.severity < Severity::Broken),
            findings,
            host: HostReport {
                kernel: facts.host.kernel.clone(),
                forwarding: facts.host.forwards,
                bpf_jit: facts.host.has_jit,
                agent_running: facts.host.agent.is_some(),
            },
            interfaces: interfaces(facts),
            listeners: listeners(facts),
            backends: facts.backends.iter().map(BackendReport::of).collect(),
        }
    }

    /// Findings of one severity.
    #[must_use]
    pub fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .count()
    }
}

fn interfaces(facts: &Facts) -> Vec<InterfaceReport> {
    let attachments = facts.host.agent.iter().flat_map(|agent| &agent.interfaces);
    let attachment = |name: &str| {
        let found = attachments.clone().find(|interface| interface.name == name);
        found.map(|interface| interface.attachment.as_str())
    };
    let interfaces = facts.config.interfaces.iter().map(|(name, wanted)| {
        InterfaceReport::of(facts.device(name), name, |device| {
            mode(device, wanted, attachment(name))
        })
    });
    let tunnels = facts.config.tunnels.keys().map(|name| {
        InterfaceReport::of(facts.device(name), name, |_| {
            ("tcx", "replies are taken from the device".to_owned())
        })
    });
    interfaces.chain(tunnels).collect()
}

impl InterfaceReport {
    fn of(device: Option<&Device>, name: &str, mode: impl FnOnce(&Device) -> (&'static str, String)) -> Self {
        let (mode, why) = device.map_or_else(|| ("none", "it does not exist".to_owned()), mode);
        let is_on = |feature: &str| {
            let offloads = device.and_then(|device| device.offloads.as_ref());
            offloads.is_some_and(|offloads| offloads.active.contains(feature))
        };
        let offloads = [("rx-gro", "gro"), ("rx-lro", "lro"), ("rx-gro-hw", "gro-hw")];
        Self {
            name: name.to_owned(),
            kind: device.map_or_else(|| "missing".to_owned(), |device| device.link.kind.to_string()),
            up: device.is_some_and(|device| device.link.is_running()),
            mtu_bytes: device.map_or(0, |device| device.link.mtu_bytes),
            mode,
            why,
            queues: device.and_then(|device| device.queues).map(|queues| queues.count),
            rp_filter: device
                .and_then(|device| device.rp_filter)
                .map(|filter| filter.to_string()),
            offloads: offloads
                .into_iter()
                .filter(|(feature, _)| is_on(feature))
                .map(|(_, name)| name)
                .collect(),
        }
    }
}

fn listeners(facts: &Facts) -> Vec<ListenerReport> {
    let holder = |vip: &IpAddr| {
        let mut devices = facts.devices.iter();
        let found = devices.find(|device| device.addresses.iter().any(|prefix| prefix.contains(vip)));
        found.map(|device| device.link.name.clone())
    };
    let report = |name: &str, listener: &crate::config::Listener, vip: IpAddr| ListenerReport {
        name: name.to_owned(),
        vip,
        port: listener.ports.to_string(),
        protocol: listener.protocol.name(),
        group: listener.group.clone(),
        interface: holder(&vip),
    };
    let listeners = facts.config.listeners.iter();
    listeners
        .flat_map(|(name, listener)| listener.vips.iter().map(move |vip| report(name, listener, *vip)))
        .collect()
}

impl BackendReport {
    fn of(backend: &Backend) -> Self {
        Self {
            group: backend.group.clone(),
            name: backend.name.clone(),
            address: backend.address,
            port: backend.port,
            interface: backend.egress.clone(),
            router: backend.route.as_ref().ok().and_then(|route| route.gateway),
            answer: answer(backend),
            probes: backend.attempts.iter().map(ProbeReport::of).collect(),
        }
    }
}

impl ProbeReport {
    fn of(attempt: &Attempt) -> Self {
        Self {
            prefix: attempt.prefix,
            source: attempt.source,
            answered: attempt.outcome.is_ok(),
            micros: attempt.outcome.as_ref().ok().map(|time| time.as_micros() as u64),
            failure: attempt.outcome.as_ref().err().map(ToString::to_string),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use serde_json::Value;

    use super::*;
    use crate::doctor::checks::testing::sound;

    fn keys(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    found.insert(name.clone());
                    keys(value, found);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
            _ => {}
        }
    }

    #[test]
    fn a_sound_gateway_is_well() {
        let report = Report::of(&sound());
        assert!(report.well, "{:?}", report.findings);
        assert_eq!(report.interfaces.len(), 3);
        assert_eq!(report.listeners[0].interface.as_deref(), Some("eth0"));
    }

    #[test]
    fn every_field_is_documented() {
        let mut facts = sound();
        facts.host.forwards = false;
        facts.devices[2].underlay = Some(("wan".to_owned(), 1400));
        let mut found = BTreeSet::new();
        keys(&serde_json::to_value(Report::of(&facts)).unwrap(), &mut found);
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/doctor.md");
        let page = fs::read_to_string(page).unwrap();
        let (_, json) = page.split_once("## JSON").unwrap();
        for key in found {
            let spellings = [
                format!("`{key}`"),
                format!("`{key}[]`"),
                format!("`….{key}`"),
                format!("`….{key}[]`"),
            ];
            assert!(spellings.iter().any(|text| json.contains(text)), "{key}");
        }
    }
}
