//! Two configurations compared: what changes, in the words of the file, and what cannot change while the agent runs.

use std::{collections::BTreeMap, fmt::Debug};

use crate::{
    change::{Action, Change},
    config::{
        Backend, Config, Group, Listener, NatMode, OnUnhealthy, Persistence, Selection, SynCookies,
        TunnelCheck, TunnelMode,
        address::{all_at_port, at_port},
    },
    error::Error,
};

/// What changes from `before` to `after`, in the order in which it is written; from nothing everything is created.
pub fn differences(before: Option<&Config>, after: &Config) -> Vec<Change> {
    let nothing = Config {
        interfaces: BTreeMap::new(),
        tunnels: BTreeMap::new(),
        networks: BTreeMap::new(),
        groups: BTreeMap::new(),
        listeners: BTreeMap::new(),
        ..after.clone()
    };
    let before_or_nothing = before.unwrap_or(&nothing);
    let mut changes = Vec::new();
    let mut removals = Vec::new();
    if before.is_none() || before_or_nothing.snat != after.snat {
        let action = if before.is_none() {
            Action::Create
        } else {
            Action::Change
        };
        let prefixes: Vec<_> = after.snat.prefixes.iter().map(ToString::to_string).collect();
        let probes: Vec<_> = after.snat.probes.iter().map(|probe| probe.to_string()).collect();
        changes.push(Change {
            action,
            object: "snat".to_owned(),
            detail: format!("{}, probes from {}", prefixes.join(", "), probes.join(" and ")),
        });
    }
    let mut compare = Compare {
        changes: &mut changes,
        removals: &mut removals,
    };
    compare.maps(
        "interface",
        &before_or_nothing.interfaces,
        &after.interfaces,
        |_| String::new(),
    );
    compare.maps(
        "tunnel",
        &before_or_nothing.tunnels,
        &after.tunnels,
        |tunnel| match &tunnel.health {
            None => String::new(),
            Some(TunnelCheck { address, check }) => {
                format!("{} of {address} every {:?}", check.probe, check.interval)
            }
        },
    );
    compare.maps(
        "network",
        &before_or_nothing.networks,
        &after.networks,
        |network| {
            let cidrs: Vec<_> = network.cidrs.iter().map(ToString::to_string).collect();
            match &network.tunnel {
                Some(tunnel) => format!("{} through {tunnel}", cidrs.join(", ")),
                None => cidrs.join(", "),
            }
        },
    );
    // Of groups without their backends, which are compared one by one.
    let bare = |config: &Config| -> BTreeMap<String, Group> {
        let of = |(name, group): (&String, &Group)| {
            let bare = Group {
                backends: BTreeMap::new(),
                ..group.clone()
            };
            (name.clone(), bare)
        };
        config.groups.iter().map(of).collect()
    };
    compare.maps("group", &bare(before_or_nothing), &bare(after), describe_group);
    let backends = |config: &Config| -> BTreeMap<String, Backend> {
        let of = |(name, group): (&String, &Group)| {
            let name = name.clone();
            group
                .backends
                .clone()
                .into_iter()
                .map(move |(backend, value)| (format!("{name}/{backend}"), value))
        };
        config.groups.iter().flat_map(of).collect()
    };
    compare.maps(
        "backend",
        &backends(before_or_nothing),
        &backends(after),
        describe_backend,
    );
    compare.maps(
        "listener",
        &before_or_nothing.listeners,
        &after.listeners,
        describe_listener,
    );
    changes.extend(removals.into_iter().rev());
    changes
}

struct Compare<'a> {
    changes: &'a mut Vec<Change>,
    removals: &'a mut Vec<Change>,
}

impl Compare<'_> {
    fn maps<V: PartialEq + Debug>(
        &mut self,
        kind: &str,
        before: &BTreeMap<String, V>,
        after: &BTreeMap<String, V>,
        describe: impl Fn(&V) -> String,
    ) {
        for (name, value) in after {
            let action = match before.get(name) {
                None => Action::Create,
                Some(old) if old != value => Action::Change,
                Some(_) => continue,
            };
            let detail = match before.get(name).map(&describe) {
                Some(old) if old != describe(value) => format!("{old} -> {}", describe(value)),
                _ => describe(value),
            };
            self.changes.push(Change {
                action,
                object: format!("{kind} {name}"),
                detail,
            });
        }
        for name in before.keys().filter(|name| !after.contains_key(*name)) {
            let detail = match kind {
                "backend" | "listener" => "its flows go on until they end",
                _ => "",
            };
            self.removals.push(Change {
                action: Action::Remove,
                object: format!("{kind} {name}"),
                detail: detail.to_owned(),
            });
        }
    }
}

fn describe_group(group: &Group) -> String {
    let nat = match group.nat {
        NatMode::Full => "full NAT",
        NatMode::Dnat => "DNAT",
    };
    let selection = match group.selection {
        Selection::Maglev => "",
        Selection::SourceIp => ", by source IP",
        Selection::RoundRobin => ", in turn",
        Selection::LeastConnections => ", by least connections",
    };
    let health = match &group.health {
        None => "no health check".to_owned(),
        Some(check) => format!("{} every {:?}", check.probe, check.interval),
    };
    let mut text = format!("{nat}{selection}, {health}");
    text.push_str(match group.on_unhealthy {
        OnUnhealthy::Keep => "",
        OnUnhealthy::Reset => ", flows of failed backends are reset",
        OnUnhealthy::Rehash => ", flows of failed backends move",
    });
    if group.min_healthy_percent > 0 {
        text.push_str(&format!(
            ", further tiers below {}% healthy",
            group.min_healthy_percent
        ));
    }
    if let Some(backup) = &group.backup {
        text.push_str(&format!(", backup {backup}"));
    }
    if !group.slow_start.is_zero() {
        text.push_str(&format!(", slow start over {:?}", group.slow_start));
    }
    if let Some(Persistence {
        timeout,
        prefix_bits_v4,
        prefix_bits_v6,
    }) = group.persistence
    {
        text.push_str(&format!(
            ", clients of one /{prefix_bits_v4} or IPv6 /{prefix_bits_v6} stay together for {timeout:?}"
        ));
    }
    text
}

fn describe_backend(backend: &Backend) -> String {
    let port = backend
        .port
        .map_or_else(|| "*".to_owned(), |port| port.to_string());
    let mut text = format!("{}, weight {}", at_port(backend.address, port), backend.weight);
    if backend.tier > 0 {
        text.push_str(&format!(", tier {}", backend.tier));
    }
    if let Some(max_flows) = backend.max_flows {
        text.push_str(&format!(", at most {max_flows} flows"));
    }
    text
}

fn describe_listener(listener: &Listener) -> String {
    let mut text = format!(
        "{} {} to group {}, idle timeout {:?}",
        listener.protocol.name(),
        all_at_port(&listener.vips, listener.ports),
        listener.group,
        listener.idle_timeout
    );
    if let Some(sources) = &listener.sources {
        text.push_str(&format!(", {} prefixes of clients", sources.len()));
    }
    if let Some(max_flows) = listener.max_flows {
        text.push_str(&format!(", at most {max_flows} flows"));
    }
    match listener.syn_cookies {
        Some(SynCookies::Always) => text.push_str(", SYN cookies"),
        Some(SynCookies::Above(above)) => {
            text.push_str(&format!(", SYN cookies above {above} flows per second"));
        }
        None => {}
    }
    if let Some(rate) = listener.source_rate {
        text.push_str(&format!(
            ", {} flows per second of a /{} or /{}, {} at once",
            rate.flows_per_second, rate.prefix_bits_v4, rate.prefix_bits_v6, rate.burst
        ));
    }
    text
}

/// What differs although it is fixed while the agent runs: one error for each key.
pub fn restart_needed(before: &Config, after: &Config) -> Vec<Error> {
    // How a tunnel is checked has nothing to do with what is attached to it.
    let devices = |config: &Config| -> Vec<(String, TunnelMode)> {
        let modes = config.tunnels.iter();
        modes.map(|(name, tunnel)| (name.clone(), tunnel.mode)).collect()
    };
    let (old, new) = (&before.agent, &after.agent);
    let flows_end = "stop the agent, `forwarder detach`, start it: flows end";
    let flows_stay = "restart the agent with on_stop = \"keep\" in force: flows go on";
    let fixed = [
        ("agent.max_flows", old.max_flows != new.max_flows, flows_end),
        ("agent.max_slots", old.max_slots != new.max_slots, flows_end),
        (
            "agent.max_persistent_clients",
            old.max_persistent_clients != new.max_persistent_clients,
            flows_end,
        ),
        (
            "agent.pin_directory",
            old.pin_directory != new.pin_directory,
            flows_end,
        ),
        (
            "agent.metrics_address",
            old.metrics_address != new.metrics_address,
            flows_stay,
        ),
        (
            "agent.control_socket",
            old.control_socket != new.control_socket,
            flows_stay,
        ),
        (
            "agent.control_group",
            old.control_group != new.control_group,
            flows_stay,
        ),
        ("[agent.api]", old.api != new.api, flows_stay),
        (
            "snat.probe_address",
            before.snat.probes != after.snat.probes,
            flows_stay,
        ),
        ("[interface]", before.interfaces != after.interfaces, flows_stay),
        ("[tunnel]", devices(before) != devices(after), flows_stay),
    ];
    fixed
        .into_iter()
        .filter(|(_, differs, _)| *differs)
        .map(|(key, _, hint)| {
            Error::usage(format!(
                "{key} cannot change while the agent runs: restart needed"
            ))
            .hint(hint)
        })
        .collect()
}
