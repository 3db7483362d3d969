//! The metrics: [`Status`] as Prometheus text (OpenMetrics 1.0).
//!
//! Derived from the same value as `forwarder status`, so the two agree. Every family is described once, in
//! [`families`]; docs/metrics.md is generated from there. Rates are left out, as Prometheus computes them from
//! the counters.
//!
//! The number of series is bounded by the configuration: a fixed number per listener, group, backend and
//! interface, per reason, and at most one diagnosis per backend. No client's address is ever a label.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use crate::{
    histogram::Histogram,
    status::{Ejections, ListenerStatus, ProbesStatus, Status, Traffic},
};

/// What [`render`] returns, for HTTP (OpenMetrics 1.0 §4).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Stands before every name.
const PREFIX: &str = "forwarder";

/// The metrics of a status, with HELP and TYPE of each family, ending in `# EOF`.
#[must_use]
pub fn render(status: &Status) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Snapshot(status.clone())));
    let mut text = String::new();
    match text::encode(&mut text, &registry) {
        Ok(()) => text,
        Err(std::fmt::Error) => unreachable!("writing to a String does not fail"),
    }
}

/// What a family measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Only grows, from the agent's start on; its samples' names end in `_total`.
    Counter,
    Gauge,
    /// Always 1: its labels are what it says. The samples' names end in `_info`.
    Info,
    /// Durations; the samples' names end in `_bucket`, `_count` and `_sum`.
    Histogram,
}

impl Kind {
    const fn metric_type(self) -> MetricType {
        match self {
            Self::Counter => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
            Self::Info => MetricType::Info,
            Self::Histogram => MetricType::Histogram,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Whole(u64),
    Real(f64),
    Times(Histogram),
}

impl Value {
    fn encode(&self, kind: Kind, metric: &mut MetricEncoder<'_>) -> std::fmt::Result {
        match (self, kind) {
            (Self::Whole(number), Kind::Counter) => metric.encode_counter::<NoLabelSet, _, u64>(number, None),
            (Self::Real(number), Kind::Counter) => metric.encode_counter::<NoLabelSet, _, u64>(number, None),
            (Self::Whole(number), _) => metric.encode_gauge(number),
            (Self::Real(number), _) => metric.encode_gauge(number),
            (Self::Times(times), _) => {
                let bounded = times
                    .buckets
                    .iter()
                    .map(|bucket| (bucket.up_to_secs, bucket.count));
                // Not cumulative: the encoder adds up.
                let buckets: Vec<_> = bounded.chain([(f64::INFINITY, times.longer)]).collect();
                metric.encode_histogram::<NoLabelSet>(times.sum_secs, times.count(), &buckets, None)
            }
        }
    }
}

/// One line of the text.
struct Sample {
    /// In the order of the family's labels.
    labels: Vec<String>,
    value: Value,
}

impl Sample {
    fn new<const N: usize>(labels: [&str; N], value: Value) -> Self {
        Self {
            labels: labels.map(str::to_owned).to_vec(),
            value,
        }
    }

    fn whole<const N: usize>(labels: [&str; N], value: u64) -> Self {
        Self::new(labels, Value::Whole(value))
    }

    fn times<const N: usize>(labels: [&str; N], times: &Histogram) -> Self {
        Self::new(labels, Value::Times(times.clone()))
    }
}

/// Where the samples of a family come from.
type Read = dyn Fn(&Status) -> Vec<Sample>;

/// One metric, all its samples, and what there is to say about it.
struct Family {
    /// Without prefix, unit and suffix.
    name: String,
    /// The part of the name that says the unit.
    unit: Option<Unit>,
    kind: Kind,
    /// One sentence.
    help: String,
    labels: Vec<&'static str>,
    samples: Box<Read>,
}

impl Family {
    fn new(
        kind: Kind,
        name: &str,
        help: &str,
        labels: &[&'static str],
        samples: impl Fn(&Status) -> Vec<Sample> + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            unit: None,
            kind,
            help: help.to_owned(),
            labels: labels.to_vec(),
            samples: Box::new(samples),
        }
    }

    /// With prefix and unit, without suffix.
    #[cfg(test)]
    fn full_name(&self) -> String {
        let parts = [PREFIX, &self.name, self.unit.as_ref().map_or("", Unit::as_str)];
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        parts.collect::<Vec<_>>().join("_")
    }

    /// The unit is appended to the name.
    fn unit(mut self, unit: Unit) -> Self {
        self.unit = Some(unit);
        self
    }
}

/// What every listener of TCP has counted of something.
fn of_tcp_listeners(status: &Status, count: fn(&ListenerStatus) -> u64) -> Vec<Sample> {
    let listeners = status
        .listeners
        .iter()
        .filter(|listener| listener.protocol == "tcp");
    listeners
        .map(|listener| Sample::whole([&listener.name], count(listener)))
        .collect()
}

/// Every metric there is, in the order of the text.
fn families() -> Vec<Family> {
    let mut families: Vec<Family> = agent().into();
    for scope in [Scope::Listener, Scope::Group, Scope::Backend] {
        families.extend(TRAFFIC.iter().map(|measure| measure.family(scope)));
    }
    families.extend(backends());
    families.extend(gateway());
    families
}

fn agent() -> [Family; 6] {
    [
        Family::new(
            Kind::Info,
            "build",
            "The agent's build; always 1.",
            &["version"],
            |status| vec![Sample::whole([&status.version], 1)],
        ),
        Family::new(
            Kind::Gauge,
            "uptime",
            "Time since the agent's start.",
            &[],
            |status| vec![Sample::whole([], status.uptime_secs)],
        )
        .unit(Unit::Seconds),
        Family::new(
            Kind::Gauge,
            "warnings",
            "Things an operator should look at; `forwarder status` shows them in words.",
            &[],
            |status| vec![Sample::whole([], status.warnings.len() as u64)],
        ),
        Family::new(
            Kind::Histogram,
            "turn_duration",
            "Turns of the agent's loop, by what it woke up for; while one lasts, packets move and nothing else does.",
            &["event"],
            |status| {
                let turns = status.agent.turns.iter();
                turns.map(|turn| Sample::times([&turn.event], &turn.times)).collect()
            },
        )
        .unit(Unit::Seconds),
        Family::new(
            Kind::Histogram,
            "change_duration",
            "Changes of the configuration that were applied, from their arrival until they were in force as a whole.",
            &[],
            |status| vec![Sample::times([], &status.agent.changes.times)],
        )
        .unit(Unit::Seconds),
        Family::new(
            Kind::Counter,
            "changes_refused",
            "Changes of the configuration that were refused and changed nothing: by `forwarder apply`, or by SIGHUP.",
            &[],
            |status| vec![Sample::whole([], status.agent.changes.refused)],
        ),
    ]
}

/// Of what traffic is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Listener,
    Group,
    Backend,
}

impl Scope {
    const fn name(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Group => "group",
            Self::Backend => "backend",
        }
    }

    const fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Listener => &["listener"],
            Self::Group => &["group"],
            Self::Backend => &["group", "backend"],
        }
    }

    /// Everything of this scope: the values of its labels, and its traffic.
    fn each(self, status: &Status) -> Vec<(Vec<String>, Traffic)> {
        match self {
            Self::Listener => status
                .listeners
                .iter()
                .map(|listener| (vec![listener.name.clone()], listener.traffic))
                .collect(),
            Self::Group => status
                .groups
                .iter()
                .map(|group| (vec![group.name.clone()], group.traffic))
                .collect(),
            Self::Backend => status
                .groups
                .iter()
                .flat_map(|group| {
                    group
                        .backends
                        .iter()
                        .map(|backend| (vec![group.name.clone(), backend.name.clone()], backend.traffic))
                })
                .collect(),
        }
    }
}

/// Something that is counted of traffic.
struct Measure {
    kind: Kind,
    name: &'static str,
    unit: Option<Unit>,
    help: &'static str,
    /// The label that tells its values apart, if there are several.
    label: Option<&'static str>,
    /// Values of the label, with the numbers; one without a label's value where there is none.
    values: fn(&Traffic) -> Vec<(&'static str, u64)>,
}

const TRAFFIC: [Measure; 7] = [
    Measure {
        kind: Kind::Counter,
        name: "connections",
        unit: None,
        help: "TCP connections and UDP flows opened",
        label: None,
        values: |traffic| vec![("", traffic.connections_opened)],
    },
    Measure {
        kind: Kind::Counter,
        name: "connections_refused",
        unit: None,
        help: "New connections refused: no backend, a limit, no SNAT binding, or no room; of a backend or group, those for want of a binding or room",
        label: None,
        values: |traffic| vec![("", traffic.connections_refused)],
    },
    Measure {
        kind: Kind::Counter,
        name: "first_answers",
        unit: None,
        help: "Opened connections by the backend's answer: accepted, or rejected by a TCP reset; those missing here had none",
        label: Some("answer"),
        values: |traffic| {
            vec![
                ("accepted", traffic.connections_answered),
                ("rejected", traffic.connections_rejected),
            ]
        },
    },
    Measure {
        kind: Kind::Counter,
        name: "packets",
        unit: None,
        help: "Packets forwarded: in, from clients to backends; out, back to them",
        label: Some("direction"),
        values: |traffic| vec![("in", traffic.packets_in), ("out", traffic.packets_out)],
    },
    Measure {
        kind: Kind::Counter,
        name: "",
        unit: Some(Unit::Bytes),
        help: "Bytes of the forwarded IP packets, headers included: in, from clients to backends; out, back to them",
        label: Some("direction"),
        values: |traffic| vec![("in", traffic.bytes_in), ("out", traffic.bytes_out)],
    },
    Measure {
        kind: Kind::Counter,
        name: "resets",
        unit: None,
        help: "TCP resets by who sent them; the gateway's own go to refused and to idle connections, and include ICMP messages for UDP",
        label: Some("origin"),
        values: |traffic| {
            vec![
                ("client", traffic.client_resets),
                ("backend", traffic.backend_resets),
                ("gateway", traffic.gateway_resets),
            ]
        },
    },
    Measure {
        kind: Kind::Gauge,
        name: "flows",
        unit: None,
        help: "Flows in the table now: active ones, and those that are half open, closing or silent",
        label: Some("state"),
        values: |traffic| {
            vec![
                ("active", traffic.active_flows),
                ("inactive", traffic.inactive_flows),
            ]
        },
    },
];

impl Measure {
    fn family(&self, scope: Scope) -> Family {
        let (label, values) = (self.label, self.values);
        let mut labels = scope.labels().to_vec();
        labels.extend(label);
        let name = match self.name {
            "" => scope.name().to_owned(),
            name => format!("{}_{name}", scope.name()),
        };
        let help = format!("{}; by {}.", self.help, scope.name());
        let mut family = Family::new(self.kind, &name, &help, &labels, move |status| {
            let mut samples = Vec::new();
            for (owner, traffic) in scope.each(status) {
                for (value, number) in values(&traffic) {
                    let mut labels = owner.clone();
                    labels.extend(label.map(|_| value.to_owned()));
                    samples.push(Sample {
                        labels,
                        value: Value::Whole(number),
                    });
                }
            }
            samples
        });
        family.unit.clone_from(&self.unit);
        family
    }
}

/// All of [`BackendStatus::health`](crate::status::BackendStatus::health).
const HEALTH: [&str; 4] = ["healthy", "unhealthy", "unknown", "ejected"];

fn backends() -> [Family; 16] {
    let of_backends = |read: fn(&crate::status::BackendStatus) -> Value| {
        move |status: &Status| {
            let mut samples = Vec::new();
            for group in &status.groups {
                for backend in &group.backends {
                    samples.push(Sample::new([&group.name, &backend.name], read(backend)));
                }
            }
            samples
        }
    };
    let of_one = &["group", "backend"];
    let checked = |status: &Status| -> Vec<(String, ProbesStatus)> {
        let groups = status.groups.iter();
        groups
            .filter_map(|group| Some((group.name.clone(), group.probes.clone()?)))
            .collect()
    };
    [
        Family::new(
            Kind::Histogram,
            "group_probe_duration",
            "Probes of the group's backends that passed: time until the answer; of groups with a check.",
            &["group"],
            move |status| {
                let groups = checked(status).into_iter();
                groups
                    .map(|(group, probes)| Sample::times([&group], &probes.times))
                    .collect()
            },
        )
        .unit(Unit::Seconds),
        Family::new(
            Kind::Counter,
            "group_probes_failed",
            "Probes of the group's backends that failed; of groups with a check.",
            &["group"],
            move |status| {
                let groups = checked(status).into_iter();
                groups
                    .map(|(group, probes)| Sample::whole([&group], probes.failed))
                    .collect()
            },
        ),
        Family::new(
            Kind::Gauge,
            "listener_flows_limit",
            "Flows that the listener may have at a time; of listeners with a limit (max_flows).",
            &["listener"],
            |status| {
                let limited = status.listeners.iter().filter_map(|listener| {
                    Some(Sample::whole([&listener.name], u64::from(listener.max_flows?)))
                });
                limited.collect()
            },
        ),
        Family::new(
            Kind::Counter,
            "listener_syn_cookies_sent",
            "SYNs that were answered with a cookie; of listeners of TCP.",
            &["listener"],
            |status| of_tcp_listeners(status, |listener| listener.cookies_sent),
        ),
        Family::new(
            Kind::Counter,
            "listener_syn_cookies_accepted",
            "Connections that were opened by a SYN cookie that came back; of listeners of TCP.",
            &["listener"],
            |status| of_tcp_listeners(status, |listener| listener.cookies_accepted),
        ),
        Family::new(
            Kind::Counter,
            "listener_syn_cookies_invalid",
            "Acknowledgments without a connection, and without a cookie of ours, while cookies were sent; of listeners of TCP.",
            &["listener"],
            |status| of_tcp_listeners(status, |listener| listener.cookies_invalid),
        ),
        Family::new(
            Kind::Counter,
            "listener_flows_limited",
            "New flows dropped, as they came faster from one prefix of clients than source_rate lets them.",
            &["listener"],
            |status| {
                let listeners = status.listeners.iter();
                listeners
                    .map(|listener| Sample::whole([&listener.name], listener.flows_limited))
                    .collect()
            },
        ),
        Family::new(
            Kind::Gauge,
            "backend_flows_limit",
            "Flows that the backend may have at a time; of backends with a limit (max_flows).",
            of_one,
            |status| {
                let mut samples = Vec::new();
                for group in &status.groups {
                    for backend in &group.backends {
                        if let Some(limit) = backend.max_flows {
                            samples.push(Sample::whole([&group.name, &backend.name], u64::from(limit)));
                        }
                    }
                }
                samples
            },
        ),
        Family::new(
            Kind::Gauge,
            "group_backends",
            "Backends of the group, by health; unknown before the first probe, ejected by passive checks.",
            &["group", "health"],
            |status| {
                let mut samples = Vec::new();
                for group in &status.groups {
                    for health in HEALTH {
                        let count = group
                            .backends
                            .iter()
                            .filter(|backend| backend.health == health)
                            .count();
                        samples.push(Sample::whole([&group.name, health], count as u64));
                    }
                }
                samples
            },
        ),
        Family::new(
            Kind::Gauge,
            "backend_healthy",
            "1 if the backend is healthy, else 0.",
            of_one,
            of_backends(|backend| Value::Whole(u64::from(backend.health == "healthy"))),
        ),
        Family::new(
            Kind::Gauge,
            "backend_weight",
            "The backend's weight, as configured.",
            of_one,
            of_backends(|backend| Value::Whole(u64::from(backend.weight))),
        ),
        Family::new(
            Kind::Gauge,
            "backend_draining",
            "1 if the backend takes no new flows whatever its health is, by order or for its weight of 0; else 0.",
            of_one,
            of_backends(|backend| Value::Whole(u64::from(backend.drain.is_some()))),
        ),
        Family::new(
            Kind::Counter,
            "backend_flows_ended",
            "Flows that the agent ended before their time: drained, when the time of `forwarder drain` was over; reset and rehashed, as the backend failed (on_unhealthy).",
            &["group", "backend", "cause"],
            |status| {
                let mut samples = Vec::new();
                for group in &status.groups {
                    for backend in &group.backends {
                        let ended = backend.flows_ended;
                        for (cause, count) in [
                            ("drained", ended.drained),
                            ("reset", ended.reset),
                            ("rehashed", ended.rehashed),
                        ] {
                            samples.push(Sample::whole([&group.name, &backend.name, cause], count));
                        }
                    }
                }
                samples
            },
        ),
        Family::new(
            Kind::Gauge,
            "backend_slot_share",
            "Share of the group's slots, and so of its new flows, that the backend has now, 0 to 1.",
            of_one,
            of_backends(|backend| Value::Real(backend.share)),
        ),
        Family::new(
            Kind::Counter,
            "backend_ejections",
            "How often passive checks took the backend out: it rejected flows, or it was silent.",
            &["group", "backend", "cause"],
            |status| {
                let mut samples = Vec::new();
                for group in &status.groups {
                    for backend in &group.backends {
                        let Ejections { rejected, silent } = backend.ejections;
                        for (cause, count) in [("rejected", rejected), ("silent", silent)] {
                            samples.push(Sample::whole([&group.name, &backend.name, cause], count));
                        }
                    }
                }
                samples
            },
        ),
        Family::new(
            Kind::Gauge,
            "backend_diagnosis",
            "Always 1, for a backend that does not answer: the cause that the agent found.",
            &["group", "backend", "cause"],
            |status| {
                let mut samples = Vec::new();
                for group in &status.groups {
                    for backend in &group.backends {
                        if let Some(diagnosis) = &backend.diagnosis {
                            samples.push(Sample::whole([&group.name, &backend.name, &diagnosis.cause], 1));
                        }
                    }
                }
                samples
            },
        ),
    ]
}

fn gateway() -> [Family; 9] {
    let by_reason = &["reason", "verdict"];
    let probed = |status: &Status| -> Vec<(String, ProbesStatus)> {
        let tunnels = status.tunnels.iter();
        tunnels
            .filter_map(|tunnel| Some((tunnel.name.clone(), tunnel.probes.clone()?)))
            .collect()
    };
    [
        Family::new(
            Kind::Counter,
            "packets",
            "Packets seen by the data path, by the reason of their verdict (docs/reasons.md).",
            by_reason,
            |status| {
                let sample = |reason: &crate::status::ReasonStatus| {
                    Sample::whole([&reason.name, &reason.verdict], reason.packets)
                };
                status.reasons.iter().map(sample).collect()
            },
        ),
        Family::new(
            Kind::Counter,
            "",
            "Frame bytes seen by the data path, by the reason of their verdict (docs/reasons.md).",
            by_reason,
            |status| {
                let sample = |reason: &crate::status::ReasonStatus| {
                    Sample::whole([&reason.name, &reason.verdict], reason.bytes)
                };
                status.reasons.iter().map(sample).collect()
            },
        )
        .unit(Unit::Bytes),
        Family::new(
            Kind::Gauge,
            "pool_bindings",
            "SNAT bindings, each held by one flow: used ones and free ones.",
            &["state"],
            |status| {
                vec![
                    Sample::whole(["used"], status.pool.used),
                    Sample::whole(["free"], status.pool.free),
                ]
            },
        ),
        Family::new(
            Kind::Gauge,
            "pool_used_ratio",
            "Share of the SNAT bindings that flows hold, 0 to 1; at 1 new flows are refused.",
            &[],
            |status| vec![Sample::new([], Value::Real(status.pool.usage()))],
        ),
        Family::new(
            Kind::Gauge,
            "tunnel_healthy",
            "1 if the far side of the tunnel answers its health check, else 0; of tunnels with a check.",
            &["tunnel"],
            |status| {
                let checked = status
                    .tunnels
                    .iter()
                    .filter(|tunnel| tunnel.health != "unchecked");
                let sample = |tunnel: &crate::status::TunnelStatus| {
                    Sample::whole([&tunnel.name], u64::from(tunnel.health == "healthy"))
                };
                checked.map(sample).collect()
            },
        ),
        Family::new(
            Kind::Histogram,
            "tunnel_probe_duration",
            "Probes of the tunnel's far side that passed: time until the answer; of tunnels with a check.",
            &["tunnel"],
            move |status| {
                let tunnels = probed(status).into_iter();
                tunnels
                    .map(|(tunnel, probes)| Sample::times([&tunnel], &probes.times))
                    .collect()
            },
        )
        .unit(Unit::Seconds),
        Family::new(
            Kind::Counter,
            "tunnel_probes_failed",
            "Probes of the tunnel's far side that failed; of tunnels with a check.",
            &["tunnel"],
            move |status| {
                let tunnels = probed(status).into_iter();
                tunnels
                    .map(|(tunnel, probes)| Sample::whole([&tunnel], probes.failed))
                    .collect()
            },
        ),
        Family::new(
            Kind::Gauge,
            "interface_up",
            "1 if the interface that the data path is attached to is up, else 0.",
            &["interface", "attachment"],
            |status| {
                let sample = |interface: &crate::status::InterfaceStatus| {
                    Sample::whole(
                        [&interface.name, &interface.attachment],
                        u64::from(interface.is_up),
                    )
                };
                status.interfaces.iter().map(sample).collect()
            },
        ),
        Family::new(
            Kind::Gauge,
            "interface_sends",
            "1 if frames leave through the interface straight from the data path, 0 if the stack sends them.",
            &["interface", "attachment"],
            |status| {
                let sample = |interface: &crate::status::InterfaceStatus| {
                    Sample::whole(
                        [&interface.name, &interface.attachment],
                        u64::from(interface.sends),
                    )
                };
                status.interfaces.iter().map(sample).collect()
            },
        ),
    ]
}

/// A status, as the encoder wants it.
#[derive(Debug)]
struct Snapshot(Status);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        for family in families() {
            // The encoder joins prefix, name and unit; without a name, the unit is the name.
            let (name, unit) = match (family.name.as_str(), &family.unit) {
                ("", Some(unit)) => (unit.as_str(), None),
                (name, unit) => (name, unit.as_ref()),
            };
            let mut metric =
                encoder.encode_descriptor(name, &family.help, unit, family.kind.metric_type())?;
            for sample in (family.samples)(&self.0) {
                let labels: Vec<(&str, String)> = family.labels.iter().copied().zip(sample.labels).collect();
                if family.kind == Kind::Info {
                    metric.encode_info(&labels)?;
                } else if labels.is_empty() {
                    // As a family it would be written with `{}`.
                    sample.value.encode(family.kind, &mut metric)?;
                } else {
                    sample
                        .value
                        .encode(family.kind, &mut metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod expressions;

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use forwarder_common::abi::reason::DESCRIPTIONS;

    use super::*;
    use crate::status::testing::{assert_same_as_file, sample};

    /// One family of a text that is known to be well formed.
    #[derive(Debug)]
    struct Found {
        metric_type: String,
        samples: BTreeMap<String, f64>,
    }

    /// Reads OpenMetrics text and panics at whatever the format does not allow.
    fn read(text: &str) -> BTreeMap<String, Found> {
        let mut families: BTreeMap<String, Found> = BTreeMap::new();
        let mut lines = text.lines().peekable();
        loop {
            let line = lines.next().expect("a text ends in # EOF");
            if line == "# EOF" {
                assert_eq!(lines.next(), None, "nothing follows # EOF");
                return families;
            }
            let (name, help) = line
                .strip_prefix("# HELP ")
                .expect(line)
                .split_once(' ')
                .expect(line);
            assert!(help.ends_with('.') && !help.contains(['\n', '\\', '"']), "{line}");
            assert!(name.starts_with("forwarder_"), "{line}");
            assert!(name.chars().all(|c| c == '_' || c.is_ascii_lowercase()), "{line}");
            assert!(
                !name.contains("__") && !name.ends_with("_total") && !name.ends_with("_info"),
                "{line}"
            );
            let line = lines.next().expect("TYPE follows HELP");
            let metric_type = line
                .strip_prefix(&format!("# TYPE {name} "))
                .expect(line)
                .to_owned();
            let suffixes: &[&str] = match metric_type.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_count", "_sum"],
                _ => panic!("{line}"),
            };
            if let Some(line) = lines.next_if(|line| line.starts_with("# UNIT ")) {
                let unit = line.strip_prefix(&format!("# UNIT {name} ")).expect(line);
                assert!(name.ends_with(&format!("_{unit}")), "{line}");
            }
            let mut samples = BTreeMap::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (series, value) = line.rsplit_once(' ').expect(line);
                let (metric, labels) = series.split_at(series.find('{').unwrap_or(series.len()));
                let suffix = metric.strip_prefix(name).expect(line);
                assert!(suffixes.contains(&suffix), "{line}");
                read_labels(labels, line);
                let value: f64 = value.parse().expect(line);
                assert!(value.is_finite() && value >= 0.0, "{line}");
                // Of histograms, which have several samples for the same labels, with the suffix.
                let key = if suffixes.len() > 1 {
                    &series[name.len()..]
                } else {
                    labels
                };
                assert_eq!(samples.insert(key.to_owned(), value), None, "twice: {line}");
            }
            let family = Found { metric_type, samples };
            assert!(
                families.insert(name.to_owned(), family).is_none(),
                "twice: {name}"
            );
        }
    }

    fn read_labels(labels: &str, line: &str) {
        if labels.is_empty() {
            return;
        }
        let inner = labels
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
            .expect(line);
        let mut seen = HashSet::new();
        for label in inner.split(',') {
            let (key, value) = label.split_once('=').expect(line);
            assert!(seen.insert(key), "twice: {line}");
            assert!(key.chars().all(|c| c == '_' || c.is_ascii_lowercase()), "{line}");
            let value = value
                .strip_prefix('"')
                .and_then(|rest| rest.strip_suffix('"'))
                .expect(line);
            assert!(!value.is_empty() && !value.contains(['"', '\\']), "{line}");
        }
    }

    #[test]
    fn the_text_is_as_expected() {
        assert_same_as_file("tests/golden/status/metrics.txt", &render(&sample()));
    }

    #[test]
    fn the_text_is_well_formed_and_complete() {
        let read = read(&render(&sample()));
        assert_eq!(read.len(), families().len());
        assert_eq!(read["forwarder_packets"].samples.len(), DESCRIPTIONS.len());
        assert_eq!(read["forwarder_packets"].metric_type, "counter");
        assert_eq!(
            read["forwarder_backend_healthy"].samples[r#"{group="web",backend="ecs02"}"#],
            0.0
        );
        assert_eq!(
            read["forwarder_listener_bytes"].samples[r#"{listener="web",direction="in"}"#],
            5_120_000.0
        );
        assert_eq!(read["forwarder_build"].metric_type, "info");
        let probes = &read["forwarder_group_probe_duration_seconds"].samples;
        assert_eq!(probes[r#"_count{group="web"}"#], 4124.0);
        assert_eq!(
            probes[r#"_bucket{le="0.003",group="web"}"#], 4120.0,
            "buckets add up"
        );
        assert_eq!(probes[r#"_bucket{le="+Inf",group="web"}"#], 4124.0);
        assert_eq!(read["forwarder_change_duration_seconds"].samples["_count"], 3.0);
    }

    #[test]
    fn names_keep_what_an_operator_wrote() {
        let mut status = sample();
        status.listeners[0].name = "web.v1-eu_2".to_owned();
        assert!(render(&status).contains(r#"forwarder_listener_connections_total{listener="web.v1-eu_2"} "#));
    }

    #[test]
    fn the_number_of_series_does_not_depend_on_traffic() {
        let count = |status: &Status| {
            read(&render(status))
                .values()
                .map(|family| family.samples.len())
                .sum::<usize>()
        };
        let busy = sample();
        let mut idle = busy.clone();
        for reason in &mut idle.reasons {
            (reason.packets, reason.bytes) = (0, 0);
        }
        for listener in &mut idle.listeners {
            listener.traffic = Traffic::default();
        }
        assert_eq!(count(&busy), count(&idle));
    }

    #[test]
    fn docs_metrics_md_is_current() {
        let mut page = String::from(METRICS_INTRODUCTION);
        for family in families() {
            let name = family.full_name();
            let suffix = match family.kind {
                Kind::Counter => "_total",
                Kind::Gauge | Kind::Histogram => "",
                Kind::Info => "_info",
            };
            let kind = family.kind.metric_type();
            let kind = kind.as_str();
            let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
            page += &format!(
                "| `{name}{suffix}` | {kind} | {} | {} |\n",
                labels.join(", "),
                family.help
            );
        }
        page += METRICS_END;
        assert_same_as_file("docs/metrics.md", &page);
    }

    const METRICS_INTRODUCTION: &str = "\
<!-- Generated from forwarder-user/src/metrics.rs: `FORWARDER_BLESS=1 cargo test -p forwarder-user docs_` -->
# Metrics

The agent serves them at `http://127.0.0.1:9469/metrics`; `metrics_address` in the configuration changes the address.
Beside them, at `/`, is a [page for people](operations.md#status-page). The format is OpenMetrics 1.0, which Prometheus reads.

- Counters of listeners, groups, backends and packets are the data path's: they go on when the agent is restarted or reloaded, and
  start at zero with new tables. A group's do not fall when a backend leaves it. What the agent counts itself (failed probes,
  ejections, flows that it ended, resets it sent for them, refused changes) starts at zero with it. *In* is from clients to backends
  (requests), *out* is back (replies), on whatever interface. A *connection* is a TCP connection or a UDP flow.
- There are no rates: `rate(forwarder_listener_connections_total[1m])` computes them. `forwarder status` shows some.
- The number of series is bounded by the configuration: it does not grow with clients or flows.
- A histogram is three kinds of samples: `…_bucket` by the label `le` (seconds), `…_count`, `…_sum`. All have the same buckets,
  from 0.1 ms to 10 s. `histogram_quantile(0.99, sum by (le, group) (rate(forwarder_group_probe_duration_seconds_bucket[5m])))`
  is the time that 99 of 100 probes do not exceed, where a mean would hide the slow ones.

| name | type | labels | meaning |
|---|---|---|---|
";

    const METRICS_END: &str = "
## Values of labels

| label | values |
|---|---|
| `listener`, `group`, `backend`, `interface` | names of the configuration |
| `direction` | `in`, `out` |
| `origin` | `client`, `backend`, `gateway` |
| `state` | of flows: `active`, `inactive`; of bindings: `used`, `free` |
| `health` | `healthy`, `unhealthy`, `unknown`, `ejected` |
| `attachment` | `xdp-native`, `xdp-generic`, `tcx` |
| `verdict` | `send`, `pass`, `drop`, `refuse` |
| `reason` | see [reasons](reasons.md) |
| `cause` | of `backend_diagnosis`: as in `forwarder status -o json`, such as `no-return-route`; of ejections: `rejected`, `silent`; of ended flows: `drained`, `reset`, `rehashed` |
| `answer` | `accepted`, `rejected` |
| `event` | `signal`, `probe`, `passive`, `table`, `tunnel-probe`, `diagnosis`, `network`, `tick`, `request` |

## What answers what

What the load balancers of clouds show, and where it is here. `listener` may be `group` or `backend` as well.

| question | expression |
|---|---|
| concurrent connections | `sum by (listener) (forwarder_listener_flows)` |
| active, inactive connections | `forwarder_listener_flows{state=\"active\"}`, `{state=\"inactive\"}` |
| new connections per second | `rate(forwarder_listener_connections_total[1m])` |
| packets and bytes per second, in and out | `rate(forwarder_listener_packets_total[1m])`, `rate(forwarder_listener_bytes_total[1m])` |
| healthy, unhealthy servers | `forwarder_group_backends` |
| resets from clients, servers, the gateway | `rate(forwarder_listener_resets_total[1m])` |
| use of the SNAT pool and of the flow table | `forwarder_pool_used_ratio`; every flow holds a binding, so they are used up together |
| use of a limit | `sum by (listener) (forwarder_listener_flows) / on (listener) forwarder_listener_flows_limit` |
| drops by reason | `rate(forwarder_packets_total{verdict=\"drop\"}[1m])`, `{verdict=\"refuse\"}` |
| how long a new configuration takes | `forwarder_change_duration_seconds` |

[deploy/grafana-dashboard.json](../deploy/grafana-dashboard.json) draws all of this.

## Worth an alert

[deploy/prometheus-rules.yml](../deploy/prometheus-rules.yml) has these as rules, and more.

```text
min by (group) (forwarder_group_backends{health=\"healthy\"}) == 0               nobody serves the group
forwarder_backend_healthy == 0                                                 a backend is out
forwarder_pool_used_ratio > 0.8                                                flows will soon be refused
rate(forwarder_listener_connections_refused_total[5m]) > 0                     flows are being refused
sum by (reason) (rate(forwarder_packets_total{verdict=\"drop\"}[5m])) > 100      many drops, and why
forwarder_interface_up == 0                                                    an interface is down
forwarder_warnings > 0                                                         see `forwarder status`
```
";

    #[test]
    fn docs_reasons_md_is_current() {
        let mut page = String::from(REASONS_INTRODUCTION);
        for description in DESCRIPTIONS {
            let verdict = description.verdict.name();
            page += &format!(
                "| {} | `{}` | {verdict} | {} | {} |\n",
                description.reason.0,
                description.name,
                description.text,
                // A pipe would end the cell.
                description.hint.replace('|', "\\|"),
            );
        }
        assert_same_as_file("docs/reasons.md", &page);
    }

    const REASONS_INTRODUCTION: &str = "\
<!-- Generated from forwarder-common/src/abi/reason.rs: `FORWARDER_BLESS=1 cargo test -p forwarder-user docs_` -->
# Reasons

Every packet that reaches the data path ends with exactly one of these reasons, which is counted: in
`forwarder_packets_total{reason=…,verdict=…}` and `forwarder_bytes_total` (see [metrics](metrics.md)), and in
`forwarder status`, which lists the drops. Numbers and names are never reused.

*send*: the packet leaves straight from the data path. *pass*: it goes up to the host's stack. *drop*: it ends here.
*refuse*: it ends here, and its sender is told: by a TCP reset, or by ICMP \"port unreachable\" for UDP.

| number | name | verdict | what happened | what to do |
|---|---|---|---|---|
";
}
