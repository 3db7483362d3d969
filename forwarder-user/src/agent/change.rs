//! Changes of the configuration while the agent runs: planned, printed, applied as a whole or not at all.

use std::{collections::HashSet, sync::Arc};

use tracing::{error, info, warn};

use super::{
    Agent, BackendName,
    start::{group_sizes, keeps_bindings, no_room, sizes, timeouts},
};
use crate::{
    api::Credentials,
    change::{ChangeAnswer, Submission},
    config::{self, Config},
    error::{Error, Errors},
    state::{
        desired::{Desired, Observations, pool},
        difference::{differences, restart_needed},
        ids::NamesByNumber,
        inherit::inherited_health,
        plan::{Applied, MapWrite},
        tables::NextTables,
    },
};

/// A change that can be made.
struct Planned {
    config: Config,
    observed: Observations,
    after: Applied,
    tables: NextTables,
    writes: Vec<MapWrite>,
    /// Read anew, with what `[agent.api]` says.
    credentials: Option<Credentials>,
    answer: ChangeAnswer,
}

impl Agent {
    /// Plans a configuration that somebody sent, and applies it if `apply`.
    pub(super) fn submitted(&mut self, submission: &Submission, apply: bool) -> Result<ChangeAnswer, Errors> {
        let config = config::load::parse(&submission.text, &submission.file)?;
        let planned = self.planned(config)?;
        if apply {
            self.make(planned)
        } else {
            Ok(planned.answer)
        }
    }

    /// Reads the agent's own file again and applies it; a file with errors changes nothing. Whether it was applied.
    pub(super) fn reload(&mut self, why: &str) -> bool {
        info!("reloading {}: {why}", self.own_file.path().display());
        self.own_file.is_being_read();
        let reloading = sd_notify::NotifyState::monotonic_usec_now()
            .map(|now| vec![sd_notify::NotifyState::Reloading, now])
            .unwrap_or_else(|_| vec![sd_notify::NotifyState::Reloading]);
        // Without a service manager there is nobody to tell, here and below.
        let _ = sd_notify::notify(&reloading);
        let outcome = config::load::load(self.own_file.path())
            .and_then(|config| self.planned(config))
            .and_then(|planned| self.make(planned));
        let is_applied = outcome.is_ok();
        if let Err(errors) = outcome {
            self.timing.change_refused();
            for one in &errors.0 {
                error!("not reloaded: {one}");
            }
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        is_applied
    }

    /// What leads from here to `config`.
    fn planned(&self, config: Config) -> Result<Planned, Errors> {
        let mut errors = restart_needed(&self.config, &config);
        // One that is to be read elsewhere has been refused just so.
        let readers = config.agent.api.as_ref().filter(|_| errors.is_empty());
        let credentials = readers
            .map(Credentials::read)
            .transpose()
            .unwrap_or_else(|error| {
                errors.push(error);
                None
            });
        let pools = [&self.config, &config].map(|config| pool(&config.snat));
        if !keeps_bindings(&pools[0], &pools[1], self.config.agent.max_flows) {
            errors.push(
                Error::usage("snat.prefixes cannot change so while flows hold their addresses").hint(
                    "add prefixes behind the present ones; to take some away, stop the agent, `forwarder detach`, \
                     start it: flows end",
                ),
            );
        }
        if sizes(&config).flow_keys > self.flow_keys {
            errors.push(
                Error::usage("the first backend group in DNAT mode needs a larger flow index").hint(
                    "stop the agent, `forwarder detach`, start it with the new configuration: flows end",
                ),
            );
        }
        if sizes(&config).flow_keys_v6 > self.flow_keys_v6 {
            errors.push(
                Error::usage(if self.flow_keys_v6 > 1 {
                    "the first backend group in DNAT mode needs a larger flow index of IPv6"
                } else {
                    "the first IPv6 VIP or backend needs a flow index of IPv6"
                })
                .hint("stop the agent, `forwarder detach`, start it with the new configuration: flows end"),
            );
        }
        let ids = match self.applied.ids.next(&config, &self.capacity) {
            Ok(ids) => ids,
            Err(more) => {
                errors.extend(more);
                return Err(Errors(errors));
            }
        };
        let placement = self
            .applied
            .placement
            .arrange(group_sizes(&config, &ids))
            .map_err(no_room);
        let placement = match placement {
            Ok(placement) if errors.is_empty() => placement,
            Ok(_) => return Err(Errors(errors)),
            Err(error) => {
                errors.push(error);
                return Err(Errors(errors));
            }
        };
        let mut observed = Observations {
            health: inherited_health(&self.applied, &self.observed.health, &config, &ids),
            overrides: self
                .observed
                .overrides
                .iter()
                .filter(|(name, _)| ids.backends.contains_key(*name))
                .map(|(name, orders)| (name.clone(), *orders))
                .collect(),
            filters: self.applied.desired.settings.filters,
            ..self.observed.clone()
        };
        self.begin_slow_starts(&config, &ids, &self.applied.desired.backends, &mut observed);
        let mut tables = self.tables.cache.now();
        let mut after = Applied {
            desired: Desired::with_tables(&config, &ids, &observed, &mut tables),
            ids,
            placement,
        };
        let writes = self.applied.writes_to(&mut after);
        let names = NamesByNumber::of(&[&after.ids, &self.applied.ids]);
        let answer = ChangeAnswer {
            applied: false,
            changes: differences(Some(&self.config), &config),
            writes: writes.iter().map(|write| write.describe(&names)).collect(),
        };
        Ok(Planned {
            config,
            observed,
            after,
            tables: tables.finish(),
            writes,
            credentials,
            answer,
        })
    }

    fn make(&mut self, planned: Planned) -> Result<ChangeAnswer, Errors> {
        let Planned {
            config,
            observed,
            after,
            tables,
            writes,
            credentials,
            mut answer,
        } = planned;
        self.execute(after, &writes)?;
        self.tables.cache.replace(tables);
        self.observed = observed;
        self.config = Arc::new(config);
        if let (Some(sender), Some(credentials)) = (&self.credentials, credentials) {
            sender.send_replace(credentials);
        }
        self.timing.retain(&self.config);
        self.publish_names();
        self.configure_passive();
        let names: HashSet<&BackendName> = self.applied.ids.backends.keys().collect();
        self.notes.retain(|name, _| names.contains(name));
        for name in names {
            self.notes.entry(name.clone()).or_default();
        }
        let mut timeouts = timeouts(&self.config, &self.applied.ids);
        // Flows of what has left keep the timeouts they had.
        for (id, known) in self.timeouts.drain() {
            timeouts.entry(id).or_insert(known);
        }
        let ids = &self.applied.ids;
        let numbered: HashSet<_> = ids
            .listeners
            .values()
            .chain(ids.leaving_listeners.values())
            .collect();
        timeouts.retain(|id, _| numbered.contains(id));
        self.sweep.set_timeouts(timeouts.clone());
        self.timeouts = timeouts;
        self.left_at_sweep = self.sweep.census().number;
        for change in &answer.changes {
            info!("{change}");
        }
        info!(
            "configuration applied: {} changes, {} writes",
            answer.changes.len(),
            writes.len()
        );
        answer.applied = true;
        Ok(answer)
    }

    /// Gives numbers back whose listener or backend has left the configuration, once no flow is on them.
    pub(super) fn forget_what_has_left(&mut self) -> Result<(), Error> {
        let ids = &self.applied.ids;
        if ids.leaving_listeners.is_empty() && ids.leaving_backends.is_empty() {
            return Ok(());
        }
        let census = self.sweep.census();
        // A sweep that had begun already may have missed a flow that was opened just before.
        if census.number < self.left_at_sweep + 2 {
            return Ok(());
        }
        let listeners: HashSet<_> = ids
            .leaving_listeners
            .values()
            .copied()
            .filter(|id| !census.listeners.contains_key(id))
            .collect();
        let backends: HashSet<_> = ids
            .leaving_backends
            .values()
            .copied()
            .filter(|id| !census.backends.contains_key(id))
            .collect();
        if listeners.is_empty() && backends.is_empty() {
            return Ok(());
        }
        for (name, _) in ids
            .leaving_listeners
            .iter()
            .filter(|(_, id)| listeners.contains(id))
        {
            info!(
                listener = name,
                "drained: it had left the configuration, and now has no flows"
            );
        }
        for ((group, backend), _) in ids
            .leaving_backends
            .iter()
            .filter(|(_, id)| backends.contains(id))
        {
            info!(
                group,
                backend, "drained: it had left the configuration, and now has no flows"
            );
        }
        let next = Applied {
            ids: ids.without(&listeners, &backends),
            ..self.applied.clone()
        };
        if let Err(error) = self.write(next) {
            warn!("numbers that nobody uses stay taken: {error}");
        }
        Ok(())
    }
}
