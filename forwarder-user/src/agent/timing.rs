//! How long the agent's own work takes: turns of its loop, changes of the configuration, health probes.
//!
//! Each is a histogram of the status, and so of the metrics. A turn is measured from the moment when the loop has got
//! what it waited for until it waits again; meanwhile nothing else of the agent moves, though packets do.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use super::Agent;
use crate::{
    config::Config,
    health::Report,
    histogram::Histogram,
    status::{AgentStatus, ChangesStatus, ProbesStatus, TurnStatus},
};

/// What the loop wakes up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A request to stop or to reload.
    Signal,
    /// Results of backends' probes.
    Probe,
    /// Passive checks took a backend out, or let it back in.
    Passive,
    /// A table of slots is built.
    Table,
    /// The result of a tunnel's probe.
    TunnelProbe,
    /// A diagnosis is finished.
    Diagnosis,
    /// Links, routes or neighbours have changed.
    Network,
    /// A second has passed.
    Tick,
    /// Somebody asks, orders, or sends a configuration.
    Request,
}

impl Event {
    const ALL: [Self; 9] = [
        Self::Signal,
        Self::Probe,
        Self::Passive,
        Self::Table,
        Self::TunnelProbe,
        Self::Diagnosis,
        Self::Network,
        Self::Tick,
        Self::Request,
    ];

    /// As the status and the metrics call it.
    fn name(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Probe => "probe",
            Self::Passive => "passive",
            Self::Table => "table",
            Self::TunnelProbe => "tunnel-probe",
            Self::Diagnosis => "diagnosis",
            Self::Network => "network",
            Self::Tick => "tick",
            Self::Request => "request",
        }
    }
}

/// One turn of the loop: it waits for many events, and one of them starts the clock.
#[derive(Debug, Default)]
pub(super) struct Turn(Cell<Option<(Event, Instant)>>);

impl Turn {
    /// Waits for something, and notes when it came. Safe to cancel where `wait` is.
    pub(super) async fn on<T>(&self, event: Event, wait: impl Future<Output = T>) -> T {
        let came = wait.await;
        self.0.set(Some((event, Instant::now())));
        came
    }

    /// What it was about, and how long it took.
    fn end(self) -> Option<(Event, Duration)> {
        let (event, began) = self.0.into_inner()?;
        Some((event, began.elapsed()))
    }
}

/// Everything that is measured, since the agent's start.
#[derive(Debug, Default)]
pub(super) struct Timing {
    turns: [Histogram; Event::ALL.len()],
    changes: ChangesStatus,
    /// By group.
    probes: BTreeMap<String, ProbesStatus>,
    /// By tunnel.
    tunnel_probes: BTreeMap<String, ProbesStatus>,
}

impl Timing {
    pub(super) fn turn_ended(&mut self, turn: Turn) {
        if let Some((event, took)) = turn.end() {
            self.turns[event as usize].observe(took);
        }
    }

    /// A configuration is in force as a whole, with its rules and routes; `asked_at` is when it reached the agent.
    pub(super) fn change_applied(&mut self, asked_at: Instant) {
        self.changes.times.observe(asked_at.elapsed());
    }

    /// A configuration was not taken over.
    pub(super) fn change_refused(&mut self) {
        self.changes.refused += 1;
    }

    pub(super) fn probed(&mut self, report: &Report) {
        count(&mut self.probes, report);
    }

    pub(super) fn tunnel_probed(&mut self, report: &Report) {
        count(&mut self.tunnel_probes, report);
    }

    /// Those of a group; none was probed yet if it is not known.
    pub(super) fn probes(&self, group: &str) -> ProbesStatus {
        self.probes.get(group).cloned().unwrap_or_default()
    }

    pub(super) fn tunnel_probes(&self, tunnel: &str) -> ProbesStatus {
        self.tunnel_probes.get(tunnel).cloned().unwrap_or_default()
    }

    /// Forgets what is not in the configuration any more.
    pub(super) fn retain(&mut self, config: &Config) {
        self.probes.retain(|name, _| config.groups.contains_key(name));
        let tunnels: HashSet<_> = config.tunnels.keys().collect();
        self.tunnel_probes.retain(|name, _| tunnels.contains(name));
    }

    fn status(&self) -> AgentStatus {
        let turns = Event::ALL.iter().zip(&self.turns);
        AgentStatus {
            turns: turns
                .map(|(event, times)| TurnStatus {
                    event: event.name().to_owned(),
                    times: times.clone(),
                })
                .collect(),
            changes: self.changes.clone(),
        }
    }
}

fn count(by_name: &mut BTreeMap<String, ProbesStatus>, report: &Report) {
    // A clone of the name only for the first.
    if !by_name.contains_key(&report.target.group) {
        by_name.insert(report.target.group.clone(), ProbesStatus::default());
    }
    let Some(probes) = by_name.get_mut(&report.target.group) else {
        return;
    };
    match &report.result {
        Ok(took) => probes.times.observe(*took),
        Err(_) => probes.failed += 1,
    }
}

impl Agent {
    pub(super) fn timing_status(&self) -> AgentStatus {
        self.timing.status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_has_its_place_and_its_name() {
        for (index, event) in Event::ALL.into_iter().enumerate() {
            assert_eq!(event as usize, index);
        }
        let names: HashSet<_> = Event::ALL.map(Event::name).into();
        assert_eq!(names.len(), Event::ALL.len());
    }

    #[tokio::test]
    async fn a_turn_belongs_to_the_event_that_came_and_not_to_those_it_waited_for_in_vain() {
        let turn = Turn::default();
        tokio::select! {
            () = turn.on(Event::Tick, std::future::pending()) => {}
            () = turn.on(Event::Probe, std::future::ready(())) => {}
        }
        let mut timing = Timing::default();
        timing.turn_ended(turn);
        let status = timing.status();
        let counted: Vec<_> = status
            .turns
            .iter()
            .filter(|turn| turn.times.count() > 0)
            .collect();
        assert_eq!(counted.len(), 1);
        assert_eq!(counted[0].event, "probe");
    }

    #[test]
    fn a_turn_without_an_event_is_none() {
        let mut timing = Timing::default();
        timing.turn_ended(Turn::default());
        assert!(timing.status().turns.iter().all(|turn| turn.times.count() == 0));
    }
}
