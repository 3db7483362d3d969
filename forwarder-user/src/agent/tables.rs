//! The data path's tables are kept as they should be. Large tables of groups are built on threads of their own: their
//! backends' states, which the data path heeds as well, need not wait for them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use forwarder_common::abi::backend::{BackendId, GroupId};
use tokio::{sync::mpsc, task::spawn_blocking};
use tracing::{debug, info};

use super::Agent;
use crate::{
    datapath::writer::KernelTables,
    error::Error,
    state::{
        apply::apply,
        desired::{Desired, GroupTable},
        plan::{Applied, MapWrite},
        tables::{Built, Slots, TableCache},
    },
};

/// Tables that are built at once; the gateway has other work, too.
const BUILDERS: usize = 2;

/// The tables of all groups.
pub(super) struct Tables {
    pub(super) cache: TableCache,
    sender: mpsc::UnboundedSender<Built>,
    receiver: mpsc::UnboundedReceiver<Built>,
    /// Shares by group, with the slots they were counted in.
    shares: HashMap<GroupId, (Slots, HashMap<BackendId, f64>)>,
}

impl Tables {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            cache: TableCache::default(),
            sender,
            receiver,
            shares: HashMap::new(),
        }
    }

    /// The next table that is there.
    pub(super) async fn built(&mut self) -> Option<Built> {
        self.receiver.recv().await
    }

    /// Starts to build what is to be built.
    fn build(&mut self) {
        for job in self.cache.jobs(BUILDERS) {
            let sender = self.sender.clone();
            spawn_blocking(move || {
                // The agent may have stopped meanwhile.
                let _ = sender.send(job.run());
            });
        }
    }

    /// Counts the slots of groups whose table is another one than before.
    fn count_shares(&mut self, groups: &BTreeMap<GroupId, GroupTable>) {
        self.shares.retain(|id, _| groups.contains_key(id));
        for (id, group) in groups {
            let known = self
                .shares
                .get(id)
                .is_some_and(|(slots, _)| Arc::ptr_eq(slots, &group.slots));
            if known {
                continue;
            }
            let slot = 1.0 / group.slots.len() as f64;
            let mut shares = HashMap::new();
            for backend in group.slots.iter() {
                *shares.entry(*backend).or_default() += slot;
            }
            self.shares.insert(*id, (group.slots.clone(), shares));
        }
    }

    /// A backend's share of a group's slots, 0 to 1.
    pub(super) fn share(&self, group: GroupId, backend: BackendId) -> f64 {
        let shares = self.shares.get(&group);
        shares
            .and_then(|(_, shares)| shares.get(&backend))
            .copied()
            .unwrap_or(0.0)
    }
}

impl Agent {
    /// Writes the difference between what is and what should be.
    pub(super) fn reconcile(&mut self) -> Result<(), Error> {
        let mut observed = std::mem::take(&mut self.observed);
        let begun = self.begin_slow_starts(
            &self.config,
            &self.applied.ids,
            &self.applied.desired.backends,
            &mut observed,
        );
        self.observed = observed;
        for (group, backend) in begun {
            info!(group, backend, "slow start");
        }
        let desired = Desired::with_tables(
            &self.config,
            &self.applied.ids,
            &self.observed,
            &mut self.tables.cache.later(),
        );
        let next = Applied {
            desired,
            ids: self.applied.ids.clone(),
            placement: self.applied.placement.clone(),
        };
        let before = self.applied.desired.backends.clone();
        self.write(next)?;
        self.tables.build();
        self.end_flows_of_failed(&before);
        Ok(())
    }

    /// A table is there: swaps it in.
    pub(super) fn take_table(&mut self, built: Built) -> Result<(), Error> {
        if self.tables.cache.take(built) {
            return self.reconcile();
        }
        // It was not wanted any more; another one may wait for its turn.
        self.tables.build();
        Ok(())
    }

    /// Leads the tables to `next`.
    pub(super) fn write(&mut self, mut next: Applied) -> Result<(), Error> {
        let writes = self.applied.writes_to(&mut next);
        self.execute(next, &writes)
    }

    /// Executes `writes`, which lead to `next`: all or nothing.
    pub(super) fn execute(&mut self, next: Applied, writes: &[MapWrite]) -> Result<(), Error> {
        for write in writes {
            debug!("write {write}");
        }
        let mut tables = KernelTables {
            control: &mut self.control,
            counters: &mut self.counters,
        };
        apply(&mut tables, writes)?;
        self.tables.count_shares(&next.desired.groups);
        let is_renamed = self.applied.ids != next.ids;
        self.applied = next;
        if is_renamed {
            self.publish_names();
        }
        Ok(())
    }
}
