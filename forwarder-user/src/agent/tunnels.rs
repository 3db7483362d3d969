//! Tunnels: their health, apart from the backends' behind them, and what it means for those.
//!
//! While a tunnel is unhealthy, the checked backends behind it are *held*: unhealthy at once, whatever their own
//! probes say, with the tunnel as the cause, as asking the servers would only find out the same later. When it is
//! healthy again they are let go: the next success of a backend's own probe, which is asked for promptly, makes it
//! healthy.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::{Agent, BackendName};
use crate::{
    config::Config,
    diagnose::{self, Diagnosis},
    health::{self, Health, ProbeFailure, Report, Target},
    status::{DiagnosisStatus, TunnelStatus},
};

/// What is known of the tunnels that are checked.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    notes: BTreeMap<String, TunnelNotes>,
    /// The tunnel that holds each of these backends.
    held: BTreeMap<BackendName, String>,
}

#[derive(Debug, Default)]
struct TunnelNotes {
    health: Option<Health>,
    /// Why the last probe failed.
    failure: Option<ProbeFailure>,
    /// Why it is unhealthy.
    diagnosis: Option<Diagnosis>,
}

impl Tunnels {
    /// Does an unhealthy tunnel hold this backend?
    pub(super) fn hold(&self, backend: &BackendName) -> bool {
        self.held.contains_key(backend)
    }

    /// The tunnel that should hold each backend.
    fn wanted(&self, config: &Config) -> BTreeMap<BackendName, String> {
        let is_down = |tunnel: &String| {
            let notes = self.notes.get(tunnel);
            notes.is_some_and(|notes| notes.health == Some(Health::Unhealthy))
        };
        let mut wanted = BTreeMap::new();
        for network in config.networks.values() {
            let Some(tunnel) = network.tunnel.as_ref().filter(|tunnel| is_down(tunnel)) else {
                continue;
            };
            // Without a check backends count as healthy, whatever anybody says.
            for (group, settings) in config.groups.iter().filter(|(_, group)| group.health.is_some()) {
                let behind = settings
                    .backends
                    .iter()
                    .filter(|(_, backend)| network.cidrs.iter().any(|cidr| cidr.contains(&backend.address)));
                wanted.extend(behind.map(|(name, _)| ((group.clone(), name.clone()), tunnel.clone())));
            }
        }
        wanted
    }
}

/// Tunnels to probe.
fn targets(config: &Config) -> Vec<Target> {
    let checked = config.tunnels.iter();
    checked
        .filter_map(|(name, tunnel)| Some(Target::tunnel(name, tunnel.health.as_ref()?)))
        .collect()
}

impl Agent {
    pub(super) fn tunnel_targets(&self) -> Vec<Target> {
        targets(&self.config)
    }

    /// Follows a changed configuration; `true`: the tables have to follow.
    pub(super) fn tunnels_changed(&mut self, tunnels: &health::Watch, backends: &health::Watch) -> bool {
        let config = self.config.clone();
        let is_checked = |name: &String| {
            config
                .tunnels
                .get(name)
                .is_some_and(|tunnel| tunnel.health.is_some())
        };
        self.tunnels.notes.retain(|name, _| is_checked(name));
        tunnels.update(targets(&config));
        self.hold_backends(backends)
    }

    /// Notes what a tunnel's probe has found; `true`: the tables have to follow.
    pub(super) async fn tunnel_heard(&mut self, report: &Report, backends: &health::Watch) -> bool {
        self.timing.tunnel_probed(report);
        let tunnel = &report.target.group;
        let failure = report.result.as_ref().err();
        let diagnosis = match (failure, report.transition) {
            (Some(failure), Some(Health::Unhealthy)) => {
                Some(diagnose::tunnel(&self.network, tunnel, report.target.address.ip(), failure).await)
            }
            _ => None,
        };
        let notes = self.tunnels.notes.entry(tunnel.clone()).or_default();
        notes.failure = failure.cloned();
        notes.health = report.health;
        match report.transition {
            None => return false,
            Some(Health::Healthy) => info!(tunnel, "healthy"),
            Some(Health::Unhealthy) => {
                if let (Some(failure), Some(found)) = (failure, &diagnosis) {
                    let hint = found.hint.as_deref().unwrap_or_default();
                    warn!(tunnel, cause = %found.cause, hint, "unhealthy: {failure}: {}", found.text);
                }
            }
        }
        notes.diagnosis = diagnosis;
        self.hold_backends(backends)
    }

    /// Holds and lets go of backends as the tunnels' health says; `true`: the tables have to follow.
    fn hold_backends(&mut self, backends: &health::Watch) -> bool {
        let wanted = self.tunnels.wanted(&self.config);
        let before = std::mem::replace(&mut self.tunnels.held, wanted);
        let mut is_news = false;
        for (name, tunnel) in &self.tunnels.held {
            let diagnosis = self
                .tunnels
                .notes
                .get(tunnel)
                .and_then(|notes| notes.diagnosis.clone());
            let notes = self.notes.entry(name.clone()).or_default();
            notes.diagnosis = diagnosis;
            if before.get(name) == Some(tunnel) {
                continue;
            }
            let (group, backend) = name;
            let known = self.observed.health.insert(name.clone(), Health::Unhealthy);
            if known != Some(Health::Unhealthy) {
                is_news = true;
                warn!(group, backend, cause = %diagnose::Cause::TunnelDown, "unhealthy: the tunnel {tunnel} is down");
            }
        }
        let mut released = Vec::new();
        for name in before
            .into_keys()
            .filter(|name| !self.tunnels.held.contains_key(name))
        {
            if let Some(notes) = self.notes.get_mut(&name) {
                (notes.failure, notes.diagnosis) = (None, None);
            }
            released.push(name);
        }
        if !released.is_empty() {
            backends.doubt(released);
        }
        if is_news {
            // They count as out there as well.
            self.configure_passive();
        }
        is_news
    }

    pub(super) fn tunnel_status(&self) -> Vec<TunnelStatus> {
        let mut tunnels = Vec::new();
        for (name, tunnel) in &self.config.tunnels {
            let notes = self.tunnels.notes.get(name);
            let health = match (&tunnel.health, notes.and_then(|notes| notes.health)) {
                (None, _) => "unchecked",
                (Some(_), None) => "unknown",
                (Some(_), Some(Health::Healthy)) => "healthy",
                (Some(_), Some(Health::Unhealthy)) => "unhealthy",
            };
            let failure = notes.and_then(|notes| notes.failure.as_ref());
            let diagnosis = notes.and_then(|notes| notes.diagnosis.as_ref());
            let verdict = self.native.get(name);
            tunnels.push(TunnelStatus {
                name: name.clone(),
                mode: if verdict == Some(&None) {
                    "native"
                } else {
                    "kernel"
                }
                .to_owned(),
                why_kernel: verdict.cloned().flatten(),
                is_up: !self.links_down.contains(name),
                address: tunnel.health.as_ref().map(|check| check.address),
                health: health.to_owned(),
                backends_held: self
                    .tunnels
                    .held
                    .values()
                    .filter(|holder| *holder == name)
                    .count(),
                probes: tunnel.health.as_ref().map(|_| self.timing.tunnel_probes(name)),
                failure: failure.map(ToString::to_string),
                diagnosis: diagnosis.map(|diagnosis| DiagnosisStatus {
                    cause: diagnosis.cause.name().to_owned(),
                    text: diagnosis.text.clone(),
                    hint: diagnosis.hint.clone(),
                }),
            });
        }
        tunnels
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONFIG: &str = r#"
        snat.prefixes = ["100.64.0.0/26"]
        [interface.eth0]
        [tunnel.east.health]
        address = "169.254.1.2"
        [tunnel.west.health]
        address = "169.254.2.2"
        kind = "tcp"
        port = 179
        [tunnel.south]
        [network.east]
        cidrs = ["192.168.0.0/17"]
        tunnel = "east"
        [network.west]
        cidrs = ["192.168.128.0/17", "10.3.0.0/16"]
        tunnel = "west"
        [group.web.backend]
        local = { address = "10.0.0.11", port = 80 }
        east = { address = "192.168.1.10", port = 80 }
        west = { address = "10.3.0.10", port = 80 }
        [group.raw.health]
        kind = "none"
        [group.raw.backend]
        east = { address = "192.168.1.10", port = 81 }
        [listener.web]
        vip = "10.0.0.100"
        port = 80
        group = "web"
    "#;

    fn with_health(tunnels: &[(&str, Health)]) -> Tunnels {
        let mut known = Tunnels::default();
        for (name, health) in tunnels {
            let notes = known.notes.entry((*name).to_owned()).or_default();
            notes.health = Some(*health);
        }
        known
    }

    #[test]
    fn tunnels_with_a_check_are_asked_by_their_device() {
        let config = crate::config::load::parse(CONFIG, Path::new("test.toml")).unwrap();
        let asked: Vec<_> = targets(&config)
            .into_iter()
            .map(|target| (target.group, target.address.to_string(), target.device))
            .collect();
        let expected = [("east", "169.254.1.2:0"), ("west", "169.254.2.2:179")]
            .map(|(name, address)| (name.to_owned(), address.to_owned(), Some(name.into())));
        assert_eq!(asked, expected);
    }

    #[test]
    fn an_unhealthy_tunnel_holds_the_checked_backends_behind_it() {
        let config = crate::config::load::parse(CONFIG, Path::new("test.toml")).unwrap();
        let held = |tunnels: &[(&str, Health)]| {
            let wanted = with_health(tunnels).wanted(&config);
            let mut names: Vec<_> = wanted.into_iter().collect();
            names.sort();
            names
                .into_iter()
                .map(|((group, backend), tunnel)| format!("{group}/{backend} by {tunnel}"))
                .collect::<Vec<_>>()
        };
        assert!(held(&[]).is_empty());
        assert!(held(&[("east", Health::Healthy), ("west", Health::Healthy)]).is_empty());
        assert_eq!(held(&[("east", Health::Unhealthy)]), ["web/east by east"]);
        assert_eq!(
            held(&[("east", Health::Unhealthy), ("west", Health::Unhealthy)]),
            ["web/east by east", "web/west by west"]
        );
    }
}
