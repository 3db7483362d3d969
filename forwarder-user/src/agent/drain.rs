//! Backends that take no new flows while theirs finish: by order, by a weight of zero, or because their group resets or
//! moves the flows of a backend that fails.

use std::collections::{BTreeMap, HashSet};

use forwarder_common::abi::backend::{Backend, BackendId, BackendState};
use tracing::info;

use super::Agent;
use crate::{
    config::OnUnhealthy,
    datapath::{flows::FlowCount, times::monotonic_secs},
    error::Error,
    health::Health,
    orders::{BackendOrder, BackendPath, Order},
    state::desired::takes_new_flows,
    status::{BackendStatus, DrainStatus, LeavingStatus},
    sweep::{Census, EndCause},
};

/// How far the draining of a backend is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drain {
    /// Number of the last sweep when it began.
    since_sweep: u64,
    is_done: bool,
}

impl Agent {
    /// Carries out an order for a backend.
    pub(super) fn ordered(&mut self, order: &BackendOrder) -> Result<BackendStatus, Error> {
        let BackendPath { group, backend } = &order.path;
        self.find(&order.path)?;
        let key = (group.clone(), backend.clone());
        let mut orders = self.observed.overrides.get(&key).copied().unwrap_or_default();
        match order.order {
            Order::Drain { timeout_secs } => {
                orders.is_drained = true;
                orders.drain_until_secs = timeout_secs.map(|secs| monotonic_secs().saturating_add(secs));
                match timeout_secs {
                    Some(secs) => info!(group, backend, "draining; what is left after {secs} s is ended"),
                    None => info!(group, backend, "draining"),
                }
            }
            Order::Undrain => {
                (orders.is_drained, orders.drain_until_secs) = (false, None);
                info!(group, backend, "takes new flows again");
            }
            Order::Weight { weight } => {
                orders.weight = weight;
                match weight {
                    Some(weight) => info!(group, backend, "weight {weight} by order"),
                    None => info!(group, backend, "weight as configured"),
                }
            }
        }
        if orders.is_none() {
            self.observed.overrides.remove(&key);
        } else {
            self.observed.overrides.insert(key, orders);
        }
        self.reconcile()?;
        self.look_after_drains();
        self.backend(&order.path)
    }

    /// A backend as the status shows it.
    pub(super) fn backend(&self, path: &BackendPath) -> Result<BackendStatus, Error> {
        self.find(path)?;
        let group = self.group_status(&path.group, &self.sweep.census(), &self.sweep.ended())?;
        let found = group.backends.into_iter().find(|one| one.name == path.backend);
        found.ok_or_else(|| Error::failed(format!("backend {path} is not in its group's status")))
    }

    /// Is there such a backend?
    fn find(&self, path: &BackendPath) -> Result<(), Error> {
        let BackendPath { group, backend } = path;
        let list = |names: Vec<&str>| names.join(", ");
        let Some(known) = self.config.groups.get(group) else {
            let names = self.config.groups.keys().map(String::as_str).collect();
            return Err(Error::usage(format!("there is no backend group {group:?}"))
                .hint(format!("groups: {}", list(names))));
        };
        if !known.backends.contains_key(backend) {
            let names = known.backends.keys().map(String::as_str).take(20).collect();
            return Err(
                Error::usage(format!("group {group:?} has no backend {backend:?}")).hint(format!(
                    "backends of {group}: {}{}",
                    list(names),
                    if known.backends.len() > 20 { ", …" } else { "" }
                )),
            );
        }
        Ok(())
    }

    /// Notes which backends drain, says which are done, ends flows whose time is over.
    pub(super) fn look_after_drains(&mut self) {
        let census = self.sweep.census();
        let mut over = HashSet::new();
        for (group, settings) in &self.config.groups {
            for (name, backend) in &settings.backends {
                let key = (group.clone(), name.clone());
                let (Some(id), Some(notes)) = (self.applied.ids.backends.get(&key), self.notes.get_mut(&key))
                else {
                    continue;
                };
                let orders = self.observed.overrides.get(&key).copied().unwrap_or_default();
                if takes_new_flows(backend, &orders) {
                    notes.drain = None;
                    continue;
                }
                let drain = notes.drain.get_or_insert(Drain {
                    since_sweep: census.number,
                    is_done: false,
                });
                let left = flows_left(&census, *id);
                // A sweep that had begun before may have missed a flow that was opened just before.
                if left == 0 && census.number >= drain.since_sweep + 2 && !drain.is_done {
                    drain.is_done = true;
                    info!(group, backend = name, "drained: it has no flows any more");
                }
                if left > 0 {
                    drain.is_done = false;
                    if orders
                        .drain_until_secs
                        .is_some_and(|until| until <= monotonic_secs())
                    {
                        over.insert(*id);
                    }
                }
            }
        }
        if !over.is_empty() {
            self.sweep.handle().end(over, EndCause::Drain);
        }
    }

    /// How far a backend is with draining, if it drains.
    pub(super) fn drain_status(
        &self,
        key: &(String, String),
        id: BackendId,
        census: &Census,
    ) -> Option<DrainStatus> {
        let drain = self.notes.get(key)?.drain?;
        let orders = self.observed.overrides.get(key).copied().unwrap_or_default();
        let until = orders.drain_until_secs;
        Some(DrainStatus {
            by: if orders.is_drained { "order" } else { "weight" }.to_owned(),
            flows_left: flows_left(census, id),
            is_done: drain.is_done,
            ends_in_secs: until.map(|until| until.saturating_sub(monotonic_secs())),
        })
    }

    /// The weight that somebody ordered, where it is not the configured one.
    pub(super) fn ordered_weight(&self, key: &(String, String)) -> Option<u16> {
        self.observed.overrides.get(key)?.weight
    }

    /// Backends that have left the configuration and still have flows.
    pub(super) fn leaving(&self, census: &Census) -> Vec<LeavingStatus> {
        let leaving = self.applied.ids.leaving_backends.iter();
        leaving
            .map(|((group, name), id)| LeavingStatus {
                group: group.clone(),
                name: name.clone(),
                flows_left: flows_left(census, *id),
            })
            .collect()
    }

    /// Ends or moves the flows of backends that have just failed, where their group says so. The data path knows
    /// already.
    pub(super) fn end_flows_of_failed(&mut self, before: &BTreeMap<BackendId, Backend>) {
        let suspects = std::mem::replace(&mut self.suspects, self.observed.ejected.clone());
        let mut failed: BTreeMap<EndCause, HashSet<BackendId>> = BTreeMap::new();
        for (group, settings) in &self.config.groups {
            for backend in settings.backends.keys() {
                let key = (group.clone(), backend.clone());
                let Some(id) = self.applied.ids.backends.get(&key) else {
                    continue;
                };
                let state = |backends: &BTreeMap<BackendId, Backend>| Some(backends.get(id)?.state);
                let states = [state(before), state(&self.applied.desired.backends)];
                let is_suspect = [&suspects, &self.observed.ejected]
                    .iter()
                    .all(|ejected| ejected.contains(&key));
                let passes =
                    settings.health.is_none() || self.observed.health.get(&key) == Some(&Health::Healthy);
                if let Some(cause) = end_cause(settings.on_unhealthy, states, is_suspect && passes) {
                    failed.entry(cause).or_default().insert(*id);
                }
            }
        }
        for (cause, backends) in failed {
            self.sweep.handle().end(backends, cause);
        }
    }
}

/// Which of its flows a backend loses as its state changes. `was_last_resort`: it was ejected before, passes its probes,
/// and only had new flows while its group had nobody better. Then it is no failure that it has no more of them, and those
/// that it has answered go on.
fn end_cause(
    on_unhealthy: OnUnhealthy,
    [before, now]: [Option<BackendState>; 2],
    was_last_resort: bool,
) -> Option<EndCause> {
    let is_failure = now == Some(BackendState::UNHEALTHY) && before? != BackendState::UNHEALTHY;
    match on_unhealthy {
        _ if !is_failure => None,
        OnUnhealthy::Keep => None,
        OnUnhealthy::Reset if !was_last_resort => Some(EndCause::Reset),
        OnUnhealthy::Reset | OnUnhealthy::Rehash => Some(EndCause::Rehash),
    }
}

/// Flows of a backend that may still carry packets.
fn flows_left(census: &Census, id: BackendId) -> u64 {
    census.backends.get(&id).map_or(0, FlowCount::open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_better_than_none_keeps_what_it_has_answered() {
        let (healthy, unhealthy) = (Some(BackendState::HEALTHY), Some(BackendState::UNHEALTHY));
        let reset = |states, was_last_resort| end_cause(OnUnhealthy::Reset, states, was_last_resort);
        assert_eq!(reset([healthy, unhealthy], false), Some(EndCause::Reset));
        assert_eq!(reset([healthy, unhealthy], true), Some(EndCause::Rehash));
        for states in [
            [healthy, healthy],
            [unhealthy, unhealthy],
            [None, unhealthy],
            [unhealthy, healthy],
        ] {
            assert_eq!(reset(states, false), None, "{states:?}");
        }
        assert_eq!(end_cause(OnUnhealthy::Keep, [healthy, unhealthy], false), None);
        let moved = end_cause(OnUnhealthy::Rehash, [healthy, unhealthy], false);
        assert_eq!(moved, Some(EndCause::Rehash));
    }

    #[test]
    fn connections_that_have_ended_are_not_left() {
        let mut census = Census::default();
        let count = FlowCount {
            active: 3,
            inactive: 5,
            closed: 4,
        };
        census.backends.insert(BackendId(1), count);
        assert_eq!(flows_left(&census, BackendId(1)), 4);
        assert_eq!(flows_left(&census, BackendId(2)), 0);
    }
}
