//! Numbers become names again, for people: the reverse of `ids`, with what goes with a name.

use std::collections::HashMap;

use forwarder_common::abi::{
    backend::{BackendId, GroupId},
    listener::ListenerId,
};

use super::ids::Ids;
use crate::{
    config::Config,
    datapath::attach::{Attachment, AttachmentKind},
};

/// What the data path's numbers stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    listeners: HashMap<ListenerId, String>,
    groups: HashMap<GroupId, String>,
    backends: HashMap<BackendId, BackendName>,
    /// In the order of the configuration: interfaces, then tunnels.
    pub interfaces: Vec<InterfaceName>,
}

/// A backend's name and its group's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendName {
    pub group: String,
    pub name: String,
    /// `None`: the configuration has no such backend any more.
    pub weight: Option<u16>,
}

/// An interface that a program is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceName {
    pub name: String,
    pub ifindex: u32,
    pub kind: AttachmentKind,
}

impl Names {
    /// The names of everything in a configuration.
    pub fn of(config: &Config, ids: &Ids, attachments: &[Attachment]) -> Self {
        let backends = ids
            .backends
            .iter()
            .chain(&ids.leaving_backends)
            .map(|((group, name), id)| {
                let found = config
                    .groups
                    .get(group)
                    .and_then(|group| group.backends.get(name));
                let name = BackendName {
                    group: group.clone(),
                    name: name.clone(),
                    weight: found.map(|backend| backend.weight),
                };
                (*id, name)
            });
        Self {
            listeners: ids
                .listeners
                .iter()
                .chain(&ids.leaving_listeners)
                .map(|(name, id)| (*id, name.clone()))
                .collect(),
            groups: ids.groups.iter().map(|(name, id)| (*id, name.clone())).collect(),
            backends: backends.collect(),
            interfaces: attachments
                .iter()
                .map(|attachment| InterfaceName {
                    name: attachment.name.clone(),
                    ifindex: attachment.ifindex,
                    kind: attachment.kind,
                })
                .collect(),
        }
    }

    /// A listener's name, or its number where a flow has outlived it.
    pub fn listener(&self, id: ListenerId) -> String {
        self.listeners.get(&id).cloned().unwrap_or_else(|| number(id.0))
    }

    /// The number of a listener.
    pub fn listener_id(&self, name: &str) -> Option<ListenerId> {
        let found = self.listeners.iter().find(|(_, known)| *known == name);
        found.map(|(id, _)| *id)
    }

    /// All listeners, sorted.
    pub fn listener_names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.listeners.values().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Numbers of all backends with this name, in one group or in all.
    pub fn backend_ids(&self, group: Option<&str>, name: &str) -> Vec<BackendId> {
        self.backends
            .iter()
            .filter(|(_, known)| known.name == name && group.is_none_or(|group| known.group == group))
            .map(|(id, _)| *id)
            .collect()
    }

    /// A group's name, or its number.
    pub fn group(&self, id: GroupId) -> String {
        self.groups.get(&id).cloned().unwrap_or_else(|| number(id.0))
    }

    /// A backend's name, or its number.
    pub fn backend(&self, id: BackendId) -> BackendName {
        self.backends.get(&id).cloned().unwrap_or_else(|| BackendName {
            group: "?".to_owned(),
            name: number(id.0),
            weight: None,
        })
    }
}

fn number(id: u32) -> String {
    format!("#{id}")
}
