//! Names become numbers: the data path knows listeners, groups and backends by index.
//!
//! A name keeps its number as long as it is in the configuration, across changes of it and restarts of the agent:
//! counters and flows go by numbers. A listener or backend that leaves the configuration keeps its number until
//! the flows on it have ended; a group, to which no flow refers, only until the change is done. New names take the
//! lowest numbers that nobody has, in the names' order, so one configuration on empty tables always gives the same.
//!
//! Numbers and names are written beside the tables ([`NameKey`], [`NameRecord`]): the next agent reads them there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
};

use bytemuck::{Pod, Zeroable};
use forwarder_common::abi::{
    backend::{BackendId, GroupId},
    listener::ListenerId,
};

use super::{overrides::Override, placement::Placement};
use crate::{config::Config, error::Error};

/// The numbers of everything in a configuration, and of what has left it but still has flows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    pub listeners: BTreeMap<String, ListenerId>,
    pub groups: BTreeMap<String, GroupId>,
    /// By group and backend name.
    pub backends: BTreeMap<(String, String), BackendId>,
    /// Not in the configuration any more.
    pub leaving_listeners: BTreeMap<String, ListenerId>,
    /// Not in the configuration any more; by group and backend name.
    pub leaving_backends: BTreeMap<(String, String), BackendId>,
}

/// How many numbers of each kind the tables have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub listeners: u32,
    pub groups: u32,
    pub backends: u32,
    pub vips: u32,
}

impl Capacity {
    /// As many as there are numbers.
    pub const UNLIMITED: Self = Self {
        listeners: u32::MAX,
        groups: u32::MAX,
        backends: u32::MAX,
        vips: u32::MAX,
    };
}

impl Ids {
    /// Numbers everything, on empty tables.
    pub fn assign(config: &Config) -> Self {
        // Without a limit nothing can be refused.
        Self::default()
            .next(config, &Capacity::UNLIMITED)
            .unwrap_or_default()
    }

    /// The numbers under another configuration.
    ///
    /// # Errors
    /// The tables have too few numbers, one error for each kind.
    pub fn next(&self, config: &Config, capacity: &Capacity) -> Result<Self, Vec<Error>> {
        let backends = config.groups.iter().flat_map(|(group, settings)| {
            settings
                .backends
                .keys()
                .map(move |name| (group.clone(), name.clone()))
        });
        let (listeners, leaving_listeners) = renumber(
            &self.listeners,
            &self.leaving_listeners,
            config.listeners.keys().cloned(),
            ListenerId,
            |id| id.0,
        );
        let (groups, _) = renumber(
            &self.groups,
            &BTreeMap::new(),
            config.groups.keys().cloned(),
            GroupId,
            |id| id.0,
        );
        let (backends, leaving_backends) = renumber(
            &self.backends,
            &self.leaving_backends,
            backends,
            BackendId,
            |id| id.0,
        );
        let next = Self {
            listeners,
            groups,
            backends,
            leaving_listeners,
            leaving_backends,
        };
        let keys: usize = config
            .listeners
            .values()
            .map(|listener| listener.vips.len())
            .sum();
        let mut errors = Vec::new();
        for (kind, highest, capacity) in [
            (
                "listeners",
                next.listeners.values().map(|id| id.0).max(),
                capacity.listeners,
            ),
            (
                "backend groups",
                next.groups.values().map(|id| id.0).max(),
                capacity.groups,
            ),
            (
                "backends",
                next.backends.values().map(|id| id.0).max(),
                capacity.backends,
            ),
            (
                "VIPs of listeners",
                (keys as u32).checked_sub(1),
                capacity.listeners,
            ),
            ("VIPs", (config.vips().len() as u32).checked_sub(1), capacity.vips),
        ] {
            if highest.is_some_and(|highest| highest >= capacity) {
                errors.push(
                    Error::usage(format!(
                        "the tables in use have room for {capacity} {kind}, counting those that still have flows"
                    ))
                    .hint("`forwarder detach`, then start the agent anew: its tables will be larger; flows end"),
                );
            }
        }
        if errors.is_empty() { Ok(next) } else { Err(errors) }
    }

    /// The same without those that have left and have no flows any more.
    #[must_use]
    pub fn without(&self, listeners: &HashSet<ListenerId>, backends: &HashSet<BackendId>) -> Self {
        let mut next = self.clone();
        next.leaving_listeners.retain(|_, id| !listeners.contains(id));
        next.leaving_backends.retain(|_, id| !backends.contains(id));
        next
    }

    /// What is to be written beside the tables.
    pub fn records(
        &self,
        placement: &Placement,
        overrides: &BTreeMap<BackendId, Override>,
    ) -> BTreeMap<NameKey, NameRecord> {
        let mut records = BTreeMap::new();
        for (name, id) in self.listeners.iter().chain(&self.leaving_listeners) {
            let key = NameKey {
                kind: NameKind::LISTENER,
                id: id.0,
            };
            records.insert(key, NameRecord::new("", name));
        }
        for (name, id) in &self.groups {
            let key = NameKey {
                kind: NameKind::GROUP,
                id: id.0,
            };
            let mut record = NameRecord::new("", name);
            if let Some((first, size)) = placement.region(*id) {
                (record.first_slot, record.table_slots) = (first, size);
            }
            records.insert(key, record);
        }
        for ((group, name), id) in self.backends.iter().chain(&self.leaving_backends) {
            let key = NameKey {
                kind: NameKind::BACKEND,
                id: id.0,
            };
            let mut record = NameRecord::new(group, name);
            overrides
                .get(id)
                .copied()
                .unwrap_or_default()
                .write_to(&mut record);
            records.insert(key, record);
        }
        records
    }

    /// What the records of an earlier agent say.
    pub fn restore(records: &BTreeMap<NameKey, NameRecord>) -> Self {
        let mut ids = Self::default();
        for (key, record) in records {
            let name = record.name();
            match key.kind {
                NameKind::LISTENER => {
                    ids.listeners.insert(name, ListenerId(key.id));
                }
                NameKind::GROUP => {
                    ids.groups.insert(name, GroupId(key.id));
                }
                NameKind::BACKEND => {
                    ids.backends.insert((record.group(), name), BackendId(key.id));
                }
                // Of a later version; what it means by it is not ours to change.
                _ => {}
            }
        }
        ids
    }
}

/// Names by number, as messages have them. A plan of ten thousand writes asks for as many.
#[derive(Debug, Default)]
pub struct NamesByNumber<'a> {
    pub listeners: HashMap<ListenerId, &'a str>,
    pub groups: HashMap<GroupId, &'a str>,
    /// By group and backend name.
    pub backends: HashMap<BackendId, (&'a str, &'a str)>,
}

impl<'a> NamesByNumber<'a> {
    /// Of several states of the numbers: what the first of them knows counts.
    pub fn of(states: &[&'a Ids]) -> Self {
        let mut names = Self::default();
        for ids in states.iter().rev() {
            let listeners = ids.leaving_listeners.iter().chain(&ids.listeners);
            names
                .listeners
                .extend(listeners.map(|(name, id)| (*id, name.as_str())));
            names
                .groups
                .extend(ids.groups.iter().map(|(name, id)| (*id, name.as_str())));
            let backends = ids.leaving_backends.iter().chain(&ids.backends);
            names
                .backends
                .extend(backends.map(|((group, name), id)| (*id, (group.as_str(), name.as_str()))));
        }
        names
    }
}

/// Numbers of the wanted names and of those that are not wanted any more.
fn renumber<N: Ord + Clone, I: Copy + Ord>(
    present: &BTreeMap<N, I>,
    leaving: &BTreeMap<N, I>,
    wanted: impl Iterator<Item = N>,
    id: impl Fn(u32) -> I,
    number: impl Fn(I) -> u32,
) -> (BTreeMap<N, I>, BTreeMap<N, I>) {
    let mut old: BTreeMap<N, I> = present.clone();
    old.extend(leaving.iter().map(|(name, id)| (name.clone(), *id)));
    let taken: BTreeSet<u32> = old.values().map(|id| number(*id)).collect();
    let mut free = (0..).filter(|candidate| !taken.contains(candidate));
    let mut numbered = BTreeMap::new();
    for name in wanted {
        let id = match old.remove(&name) {
            Some(id) => id,
            // There are more numbers than names that fit into memory.
            None => id(free.next().unwrap_or(u32::MAX)),
        };
        numbered.insert(name, id);
    }
    (numbered, old)
}

/// What a number is the number of.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Pod, Zeroable)]
pub struct NameKind(pub u32);

impl NameKind {
    pub const LISTENER: Self = Self(0);
    pub const GROUP: Self = Self(1);
    pub const BACKEND: Self = Self(2);
}

/// Key of the name table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Pod, Zeroable)]
pub struct NameKey {
    pub kind: NameKind,
    pub id: u32,
}

/// Bytes of a name; validation allows one less.
const NAME_BYTES: usize = 64;

/// Value of the name table, which only agents read. Part of the layout that `ABI_VERSION` counts.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct NameRecord {
    /// Of a backend; filled up with zeros.
    group: [u8; NAME_BYTES],
    name: [u8; NAME_BYTES],
    /// Of a group: where its two tables stand in the slot table.
    pub first_slot: u32,
    /// Of a group: slots of one table.
    pub table_slots: u32,
    /// Of a backend: bits of [`override_flag`].
    pub override_flags: u32,
    /// Of a backend with [`override_flag::WEIGHT`]: 0 to 65535.
    pub weight: u32,
    /// Of a backend with [`override_flag::UNTIL`]: seconds of CLOCK_MONOTONIC.
    pub drain_until_secs: u32,
    pub reserved: u32,
}

/// What operators have ordered for a backend; see [`Override`].
pub mod override_flag {
    /// It takes no new flows.
    pub const DRAINED: u32 = 1;
    /// Its flows are ended at a time.
    pub const UNTIL: u32 = 2;
    /// It has another weight than in the configuration.
    pub const WEIGHT: u32 = 4;
}

impl NameRecord {
    pub(super) fn new(group: &str, name: &str) -> Self {
        let mut record = Self::zeroed();
        for (field, text) in [(&mut record.group, group), (&mut record.name, name)] {
            for (to, from) in field.iter_mut().zip(text.bytes()) {
                *to = from;
            }
        }
        record
    }

    pub fn name(&self) -> String {
        text(&self.name)
    }

    pub fn group(&self) -> String {
        text(&self.group)
    }
}

fn text(field: &[u8; NAME_BYTES]) -> String {
    let length = field.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    String::from_utf8_lossy(&field[..length]).into_owned()
}

impl fmt::Debug for NameRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group(), self.name())?;
        if self.table_slots > 0 {
            write!(f, " 2x{} slots from {}", self.table_slots, self.first_slot)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;

    fn config(backends: &[&str]) -> Config {
        let mut text = r#"
            [snat]
            prefixes = ["100.64.0.0/26"]
            [interface.eth0]
            [listener.web]
            vip = "192.0.2.1"
            port = 80
            group = "web"
        "#
        .to_owned();
        for (number, name) in backends.iter().enumerate() {
            text += &format!(
                "[group.web.backend.{name}]\naddress = \"10.0.0.{}\"\nport = 80\n",
                number + 1
            );
        }
        config::load::parse(&text, Path::new("test.toml")).unwrap()
    }

    fn backend(name: &str) -> (String, String) {
        ("web".to_owned(), name.to_owned())
    }

    #[test]
    fn a_name_keeps_its_number_and_a_number_is_not_given_away_while_flows_are_on_it() {
        let before = Ids::assign(&config(&["b", "c"]));
        let after = before.next(&config(&["a", "c"]), &Capacity::UNLIMITED).unwrap();
        assert_eq!(after.backends[&backend("c")], before.backends[&backend("c")]);
        assert_eq!(after.leaving_backends[&backend("b")], BackendId(0));
        assert_eq!(after.backends[&backend("a")], BackendId(2));

        // It comes back: its counters go on.
        let back = after.next(&config(&["b", "c"]), &Capacity::UNLIMITED).unwrap();
        assert_eq!(back.backends[&backend("b")], BackendId(0));
        // Its flows have ended: the number is free for another.
        let ended = after.without(&HashSet::new(), &HashSet::from([BackendId(0)]));
        let other = ended.next(&config(&["d", "c"]), &Capacity::UNLIMITED).unwrap();
        assert_eq!(other.backends[&backend("d")], BackendId(0));
    }

    #[test]
    fn the_records_tell_the_next_agent_everything() {
        let ids = Ids::assign(&config(&["b", "c"]));
        assert_eq!(
            Ids::restore(&ids.records(&Placement::new(4096), &BTreeMap::new())),
            ids
        );
    }

    #[test]
    fn more_names_than_numbers_are_refused_by_kind() {
        let capacity = Capacity {
            backends: 1,
            ..Capacity::UNLIMITED
        };
        let errors = Ids::default().next(&config(&["a", "b"]), &capacity).unwrap_err();
        assert_eq!(errors.len(), 1);
        assert!(errors[0].what.contains("room for 1 backends"), "{}", errors[0]);
    }
}
