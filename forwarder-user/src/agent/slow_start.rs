//! Slow start: a backend that is new, or takes new flows again, gets its share over a time.
//!
//! Steps are as far apart as the agent's samples, so a group's table is built at most once a second for it. While the
//! agent gets ready everybody is new, and nobody starts slowly; nor does anybody after a restart, as nobody has left.

use std::collections::BTreeMap;

use forwarder_common::abi::backend::{Backend, BackendId, BackendState};

use super::{Agent, BackendName};
use crate::{
    config::Config,
    error::Error,
    state::{
        desired::{Desired, Observations, slow_start_percent},
        ids::Ids,
        tables::NoTables,
    },
};

impl Agent {
    /// Lets the time of slow starts pass.
    pub(super) fn go_on_with_slow_starts(&mut self) -> Result<(), Error> {
        self.observed.now = self.started_at.elapsed();
        if self.observed.slow_starts.is_empty() {
            return Ok(());
        }
        // With the last step of those that are done.
        let outcome = self.reconcile();
        let Observations { slow_starts, now, .. } = &mut self.observed;
        slow_starts.retain(|(group, _), since| {
            let group = self.config.groups.get(group);
            group.is_some_and(|group| slow_start_percent(group, *since, *now) < 100)
        });
        outcome
    }

    /// Notes which backends take new flows and did not `before`; returns them.
    pub(super) fn begin_slow_starts(
        &self,
        config: &Config,
        ids: &Ids,
        before: &BTreeMap<BackendId, Backend>,
        observed: &mut Observations,
    ) -> Vec<BackendName> {
        let mut begun = Vec::new();
        let is_slow = config.groups.values().any(|group| !group.slow_start.is_zero());
        if !self.is_ready || !is_slow {
            return begun;
        }
        let after = Desired::with_tables(config, ids, observed, &mut NoTables).backends;
        let takes_flows = |backends: &BTreeMap<BackendId, Backend>, id| {
            backends
                .get(id)
                .is_some_and(|backend| backend.state == BackendState::HEALTHY)
        };
        for (key, id) in &ids.backends {
            let (group, _) = key;
            if !takes_flows(&after, id) {
                observed.slow_starts.remove(key);
            } else if !takes_flows(before, id)
                && config
                    .groups
                    .get(group)
                    .is_some_and(|group| !group.slow_start.is_zero())
            {
                observed
                    .slow_starts
                    .insert(key.clone(), self.started_at.elapsed());
                begun.push(key.clone());
            }
        }
        begun
    }
}
