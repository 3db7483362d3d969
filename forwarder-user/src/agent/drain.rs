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
    pub(super) fn end_flows_of_failed(&self, before: &BTreeMap<BackendId, Backend>) {
        let is_failure = |id: &BackendId| {
            let state =
                |backends: &BTreeMap<BackendId, Backend>| backends.get(id).map(|backend| backend.state);
            state(&self.applied.desired.backends) == Some(BackendState::UNHEALTHY)
                && state(before).is_some_and(|state| state != BackendState::UNHEALTHY)
        };
        let mut failed: BTreeMap<EndCause, HashSet<BackendId>> = BTreeMap::new();
        for (group, settings) in &self.config.groups {
            let cause = match settings.on_unhealthy {
                OnUnhealthy::Keep => continue,
                OnUnhealthy::Reset => EndCause::Reset,
                OnUnhealthy::Rehash => EndCause::Rehash,
            };
            let names = settings.backends.keys().map(|name| (group.clone(), name.clone()));
            let ids = names.filter_map(|key| self.applied.ids.backends.get(&key).copied());
            for id in ids.filter(is_failure) {
                failed.entry(cause).or_default().insert(id);
            }
        }
        for (cause, backends) in failed {
            self.sweep.handle().end(backends, cause);
        }
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
