//! What the next agent, or the next configuration, takes over of the backends' health.

use std::collections::{BTreeMap, HashMap};

use forwarder_common::abi::backend::{BackendId, BackendState};

use super::{ids::Ids, plan::Applied};
use crate::{config::Config, health::Health};

/// The health that backends of `config` start from: what is known of them, or what the tables say where an earlier
/// agent knew it or nobody asked. A backend at another address than before starts as unknown.
pub fn inherited_health(
    before: &Applied,
    known: &HashMap<(String, String), Health>,
    config: &Config,
    ids: &Ids,
) -> HashMap<(String, String), Health> {
    let addresses: BTreeMap<BackendId, _> = before
        .desired
        .backends
        .iter()
        .map(|(id, backend)| (*id, (backend.address.to_std(), backend.port.get(), backend.state)))
        .collect();
    let mut health = HashMap::new();
    for (group, settings) in &config.groups {
        for (name, backend) in &settings.backends {
            let key = (group.clone(), name.clone());
            let Some((address, port, state)) = ids.backends.get(&key).and_then(|id| addresses.get(id)) else {
                continue;
            };
            if (*address, *port) != (backend.address, backend.port.unwrap_or(0)) {
                continue;
            }
            match known.get(&key) {
                Some(known) => drop(health.insert(key, *known)),
                // A backend drains only while it is healthy.
                None if [BackendState::HEALTHY, BackendState::DRAINING].contains(state) => {
                    health.insert(key, Health::Healthy);
                }
                None => {}
            }
        }
    }
    health
}
