//! The agent's state as a [`Status`], and rates from counters.

use std::{collections::HashMap, hash::Hash, time::Duration};

use forwarder_common::abi::{counter::TrafficCounters, listener::ListenerId, reason::DESCRIPTIONS};

use super::Agent;
use crate::{
    config::NatMode,
    datapath::{attach::AttachmentKind, flows::FlowCount},
    error::Error,
    health::Health,
    state::desired::slow_start_percent,
    status::{
        BackendStatus, DiagnosisStatus, FlowsEnded, GroupStatus, InterfaceStatus, ListenerStatus, PoolStatus,
        Rates, ReasonStatus, Status, Traffic,
    },
    sweep::{Census, EndCause, EndedFlows},
};

impl Agent {
    /// Everything that is known.
    pub(super) fn status(&self) -> Result<Status, Error> {
        let census = self.sweep.census();
        let ended = self.sweep.ended();
        let capacity = u64::from(self.config.agent.max_flows);
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_secs: self.started_at.elapsed().as_secs(),
            agent: self.timing_status(),
            interfaces: Vec::new(),
            tunnels: self.tunnel_status(),
            listeners: Vec::new(),
            groups: Vec::new(),
            leaving_backends: self.leaving(&census),
            pool: PoolStatus {
                capacity,
                used: census.used,
                free: capacity.saturating_sub(census.used),
            },
            reasons: Vec::new(),
            warnings: self.warnings.clone(),
        };
        for attachment in &self.attachments {
            status.interfaces.push(InterfaceStatus {
                name: attachment.name.clone(),
                attachment: attachment.kind.name().to_owned(),
                sends: attachment.kind == AttachmentKind::Tcx || attachment.interface.flags != 0,
                is_up: !self.links_down.contains(&attachment.name),
            });
        }
        for (name, listener) in &self.config.listeners {
            let id = self.applied.ids.listeners[name];
            let count = census.listeners.get(&id).copied().unwrap_or_default();
            let rates = self.listener_rates.get(&id).copied().unwrap_or_default();
            let counters = self.counters.listener(id)?;
            let mut traffic = traffic(&counters, count, rates);
            traffic.gateway_resets += ended.listener_resets.get(&id).copied().unwrap_or(0);
            status.listeners.push(ListenerStatus {
                name: name.clone(),
                vip: listener.vips[0],
                vips: listener.vips.clone(),
                port: listener.ports.to_string(),
                protocol: listener.protocol.name().to_owned(),
                group: listener.group.clone(),
                max_flows: listener.max_flows,
                syn_cookies: listener.syn_cookies.map(|when| when.to_string()),
                source_rate: listener.source_rate.map(|rate| rate.flows_per_second),
                cookies_sent: counters.cookies_sent,
                cookies_sent_rate: self.cookie_rates.get(&id).copied().unwrap_or_default(),
                cookies_accepted: counters.cookies_accepted,
                cookies_invalid: counters.cookies_invalid,
                flows_limited: counters.flows_limited,
                traffic,
            });
        }
        for name in self.config.groups.keys() {
            status.groups.push(self.group_status(name, &census, &ended)?);
        }
        for description in DESCRIPTIONS {
            let counters = self.counters.reason(description.reason)?;
            status.reasons.push(ReasonStatus {
                name: description.name.to_owned(),
                verdict: description.verdict.name().to_owned(),
                packets: counters.packets,
                bytes: counters.bytes,
            });
        }
        Ok(status)
    }

    pub(super) fn group_status(
        &self,
        name: &str,
        census: &Census,
        ended: &EndedFlows,
    ) -> Result<GroupStatus, Error> {
        let group = &self.config.groups[name];
        let mut status = GroupStatus {
            name: name.to_owned(),
            nat: match group.nat {
                NatMode::Full => "full".to_owned(),
                NatMode::Dnat => "dnat".to_owned(),
            },
            healthy_backends: 0,
            unhealthy_backends: 0,
            ejected_backends: 0,
            probes: group.health.as_ref().map(|_| self.timing.probes(name)),
            traffic: Traffic::default(),
            backends: Vec::new(),
        };
        for (backend_name, backend) in &group.backends {
            let key = (name.to_owned(), backend_name.clone());
            let id = self.applied.ids.backends[&key];
            let ejection = self.passive.ejection(&key);
            let health = match (&group.health, self.observed.health.get(&key)) {
                (None, _) | (_, Some(Health::Healthy)) if ejection.is_some() => "ejected",
                (None, _) | (_, Some(Health::Healthy)) => "healthy",
                (_, Some(Health::Unhealthy)) => "unhealthy",
                (_, None) => "unknown",
            };
            match health {
                "healthy" => status.healthy_backends += 1,
                "ejected" => status.ejected_backends += 1,
                _ => status.unhealthy_backends += 1,
            }
            let count = census.backends.get(&id).copied().unwrap_or_default();
            let rates = self.backend_rates.get(&id).copied().unwrap_or_default();
            let mut traffic = traffic(&self.counters.backend(id)?, count, rates);
            traffic.gateway_resets += ended.backend_resets.get(&id).copied().unwrap_or(0);
            status.traffic.add(&traffic);
            let notes = &self.notes[&key];
            let flows = |cause| ended.flows.get(&(id, cause)).copied().unwrap_or(0);
            status.backends.push(BackendStatus {
                name: backend_name.clone(),
                address: backend.address,
                port: backend.port,
                tunnel: self.config.tunnel_to(backend.address).map(str::to_owned),
                weight: backend.weight,
                ordered_weight: self.ordered_weight(&key),
                max_flows: backend.max_flows,
                health: health.to_owned(),
                share: self.tables.share(self.applied.ids.groups[name], id),
                drain: self.drain_status(&key, id, census),
                flows_ended: FlowsEnded {
                    drained: flows(EndCause::Drain),
                    reset: flows(EndCause::Reset),
                    rehashed: flows(EndCause::Rehash),
                },
                slow_start_percent: self
                    .observed
                    .slow_starts
                    .get(&key)
                    .map(|since| slow_start_percent(group, *since, self.observed.now)),
                failure: notes.failure.as_ref().map(ToString::to_string),
                diagnosis: notes.diagnosis.as_ref().map(|diagnosis| DiagnosisStatus {
                    cause: diagnosis.cause.name().to_owned(),
                    text: diagnosis.text.clone(),
                    hint: diagnosis.hint.clone(),
                }),
                ejection,
                ejections: self.passive.ejections(&key),
                traffic,
            });
        }
        // Those that have left it count on, as long as they have flows and after that: a counter never falls.
        let leaving = self.applied.ids.leaving_backends.iter();
        for (_, id) in leaving.filter(|((group, _), _)| group == name) {
            let count = census.backends.get(id).copied().unwrap_or_default();
            let mut traffic = traffic(&self.counters.backend(*id)?, count, Rates::default());
            traffic.gateway_resets += ended.backend_resets.get(id).copied().unwrap_or(0);
            status.traffic.add(&traffic);
        }
        let past = self.counters.past(self.applied.ids.groups[name])?;
        status
            .traffic
            .add(&traffic(&past, FlowCount::default(), Rates::default()));
        Ok(status)
    }
}

fn traffic(counters: &TrafficCounters, flows: FlowCount, rates: Rates) -> Traffic {
    Traffic {
        connections_opened: counters.flows_opened,
        connections_refused: counters.flows_refused,
        connections_answered: counters.flows_answered,
        connections_rejected: counters.flows_rejected,
        packets_in: counters.request_packets,
        bytes_in: counters.request_bytes,
        packets_out: counters.reply_packets,
        bytes_out: counters.reply_bytes,
        client_resets: counters.client_resets,
        backend_resets: counters.backend_resets,
        gateway_resets: counters.gateway_resets,
        flows: flows.active + flows.inactive,
        active_flows: flows.active,
        inactive_flows: flows.inactive,
        rates,
    }
}

/// SYN cookies per second between two samples of listeners' counters.
pub(super) fn cookie_rates(
    before: &HashMap<ListenerId, TrafficCounters>,
    after: &HashMap<ListenerId, TrafficCounters>,
    elapsed: Duration,
) -> HashMap<ListenerId, f64> {
    let rate = |(id, after): (&ListenerId, &TrafficCounters)| {
        let before = before.get(id).copied().unwrap_or_default();
        let sent = after.cookies_sent.saturating_sub(before.cookies_sent);
        (*id, per_second(sent, elapsed))
    };
    after.iter().map(rate).collect()
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64().max(1e-3)
}

/// Rates between two samples of counters.
pub(super) fn rates<K: Copy + Eq + Hash>(
    before: &HashMap<K, TrafficCounters>,
    after: &HashMap<K, TrafficCounters>,
    elapsed: Duration,
) -> HashMap<K, Rates> {
    let per_second = |before: u64, after: u64| per_second(after.saturating_sub(before), elapsed);
    let rate = |key: &K, after: &TrafficCounters| {
        let before = before.get(key).copied().unwrap_or_default();
        Rates {
            connections: per_second(before.flows_opened, after.flows_opened),
            packets_in: per_second(before.request_packets, after.request_packets),
            bytes_in: per_second(before.request_bytes, after.request_bytes),
            packets_out: per_second(before.reply_packets, after.reply_packets),
            bytes_out: per_second(before.reply_bytes, after.reply_bytes),
        }
    };
    after
        .iter()
        .map(|(key, after)| (*key, rate(key, after)))
        .collect()
}
