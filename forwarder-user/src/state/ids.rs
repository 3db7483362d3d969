//! Names become numbers: the data path knows listeners, groups and backends by index.
//!
//! Numbers follow the names' order, so one configuration always gives the same; they hold while the agent runs.

use std::collections::BTreeMap;

use forwarder_common::abi::{
    backend::{BackendId, GroupId},
    listener::ListenerId,
};

use crate::config::Config;

/// The numbers of everything in a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    pub listeners: BTreeMap<String, ListenerId>,
    pub groups: BTreeMap<String, GroupId>,
    /// By group and backend name.
    pub backends: BTreeMap<(String, String), BackendId>,
}

impl Ids {
    /// Numbers everything.
    pub fn assign(config: &Config) -> Self {
        let backends = config
            .groups
            .iter()
            .flat_map(|(group, settings)| settings.backends.keys().map(|name| (group.clone(), name.clone())));
        Self {
            listeners: config
                .listeners
                .keys()
                .cloned()
                .zip((0..).map(ListenerId))
                .collect(),
            groups: config.groups.keys().cloned().zip((0..).map(GroupId)).collect(),
            backends: backends.zip((0..).map(BackendId)).collect(),
        }
    }
}
