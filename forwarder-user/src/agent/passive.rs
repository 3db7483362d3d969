//! Passive checks in the agent: what is watched, and what an ejection leads to.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{info, warn};

use super::{Agent, BackendName};
use crate::{
    datapath::watch::BackendWatch,
    error::Error,
    health::{Health, Report},
    passive::{Active, Cause, Event, Group, Member, PassiveThread},
    status::{EjectionStatus, Ejections},
};

/// A backend that is out.
struct Ejected {
    cause: Cause,
    until: Instant,
    times: u32,
}

/// The thread that watches, and what it has found.
pub(super) struct PassiveChecks {
    thread: PassiveThread,
    events: UnboundedReceiver<Event>,
    ejected: BTreeMap<BackendName, Ejected>,
    counts: BTreeMap<BackendName, Ejections>,
}

impl PassiveChecks {
    pub(super) fn start(reader: BackendWatch) -> Self {
        let (thread, events) = PassiveThread::start(reader);
        Self {
            thread,
            events,
            ejected: BTreeMap::new(),
            counts: BTreeMap::new(),
        }
    }

    /// The next thing that happens.
    pub(super) async fn happened(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    pub(super) fn ejection(&self, name: &BackendName) -> Option<EjectionStatus> {
        let ejected = self.ejected.get(name)?;
        let remaining = ejected.until.saturating_duration_since(Instant::now());
        Some(EjectionStatus {
            cause: ejected.cause.name().to_owned(),
            remaining_secs: remaining.as_secs_f64(),
            times: ejected.times,
        })
    }

    pub(super) fn ejections(&self, name: &BackendName) -> Ejections {
        self.counts.get(name).copied().unwrap_or_default()
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Ejected {
                name,
                cause,
                count,
                detection,
                until,
                times,
            } => {
                let (group, backend) = name;
                let until = self.thread.instant(*until);
                let time = until.saturating_duration_since(Instant::now());
                warn!(
                    group,
                    backend,
                    cause = cause.name(),
                    times,
                    detection_ms = detection.as_millis() as u64,
                    "ejected for {} s: {}, found at most {} ms after the first",
                    time.as_secs_f64().round(),
                    what(*cause, *count),
                    detection.as_millis()
                );
                let counts = self.counts.entry(name.clone()).or_default();
                match cause {
                    Cause::Rejected => counts.rejected += 1,
                    Cause::Silent => counts.silent += 1,
                }
                let ejected = Ejected {
                    cause: *cause,
                    until,
                    times: *times,
                };
                self.ejected.insert(name.clone(), ejected);
            }
            Event::Withheld { name, cause, out, of } => {
                let (group, backend) = name;
                warn!(
                    group,
                    backend,
                    cause = cause.name(),
                    "not ejected, although it answers no more: {out} of {of} backends are out, and one more would be \
                     more than max_ejected_percent"
                );
            }
            Event::Readmitted { name, after } => {
                let (group, backend) = name;
                self.ejected.remove(name);
                info!(group, backend, "readmitted after {}", seconds(*after));
            }
        }
    }
}

fn what(cause: Cause, count: u64) -> String {
    match cause {
        Cause::Rejected => format!("{count} new flows were answered by TCP resets"),
        Cause::Silent => format!("nothing came back for {count} new flows or requests"),
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

impl Agent {
    /// Has the backends of the configuration watched.
    pub(super) fn configure_passive(&mut self) {
        let mut groups = Vec::new();
        for (name, group) in &self.config.groups {
            let Some(limits) = group.passive else { continue };
            let backends = group.backends.iter().map(|(backend, at)| {
                let name = (name.clone(), backend.clone());
                let is_healthy = self.observed.health.get(&name) == Some(&Health::Healthy);
                Member {
                    id: self.applied.ids.backends[&name],
                    address: (at.address, at.port.unwrap_or(0)),
                    active: Active {
                        rise: group.health.as_ref().map(|check| check.rise),
                        is_healthy: group.health.is_none() || is_healthy,
                    },
                    name,
                }
            });
            groups.push(Group {
                limits,
                backends: backends.collect(),
            });
        }
        let ids = &self.applied.ids.backends;
        self.passive.counts.retain(|name, _| ids.contains_key(name));
        self.passive.thread.configure(groups);
    }

    /// A probe has ended.
    pub(super) fn passive_heard(&self, name: &BackendName, report: &Report) {
        // Others do not change what the judge thinks.
        if report.transition.is_none() && !self.passive.ejected.contains_key(name) {
            return;
        }
        if let Some(id) = self.applied.ids.backends.get(name) {
            let is_healthy = report.health == Some(Health::Healthy);
            self.passive.thread.probed(*id, report.result.is_ok(), is_healthy);
        }
    }

    /// Ejects or readmits backends: `first` and whatever has happened since.
    pub(super) fn judged(&mut self, first: &Event) -> Result<(), Error> {
        self.passive.note(first);
        while let Ok(event) = self.passive.events.try_recv() {
            self.passive.note(&event);
        }
        let ejected = self.passive.ejected.keys().cloned().collect();
        if self.observed.ejected == ejected {
            return Ok(());
        }
        self.observed.ejected = ejected;
        self.reconcile()
    }
}
