//! Ring 1: a change of the configuration leads the tables where building them from nothing would, and no write on
//! the way leaves a number without what it stands for.
//!
//! golden/reconcile/*.txt show what `forwarder plan` prints for typical changes; `FORWARDER_BLESS=1` rewrites them.

// Helpers of tests, which clippy does not know as such.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use bytemuck::Zeroable as _;
use forwarder_common::abi::{
    backend::{Backend, BackendGroup, BackendId, GroupId},
    counter::TrafficCounters,
    interface::Interface,
    listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, Source, SourceKey, Vip, listener_flag},
    settings::Settings,
};
use forwarder_user::{
    config::{Config, TableSizes, load::parse},
    error::Error,
    state::{
        apply::{Store, apply},
        desired::{Desired, ListenerOrder, Observations},
        difference::differences,
        ids::{Capacity, Ids, NameKey, NameKind, NameRecord, NamesByNumber},
        plan::{Applied, MapWrite, SettingsChange},
    },
};
use proptest::prelude::*;

/// Slots of the slot table: enough for the largest of these configurations beside another one.
const SLOTS: u32 = 65_536;

/// The tables, without a kernel.
#[derive(Clone, Debug, PartialEq)]
struct Memory {
    names: BTreeMap<NameKey, NameRecord>,
    settings: Settings,
    interfaces: BTreeMap<u32, Interface>,
    backends: BTreeMap<BackendId, Backend>,
    slots: Vec<Option<BackendId>>,
    groups: BTreeMap<GroupId, BackendGroup>,
    vips: BTreeMap<[u8; 16], Vip>,
    listeners: BTreeMap<ListenerOrder, (ListenerKey, Listener)>,
    listener_ranges: BTreeMap<[u8; size_of::<ListenerRangeKey>()], (ListenerRangeKey, Listener)>,
    sources: BTreeMap<[u8; size_of::<SourceKey>()], (SourceKey, Source)>,
    past: BTreeMap<GroupId, TrafficCounters>,
    /// Writes until one is refused.
    refuse_after: Option<usize>,
    /// Refused ones go on being refused.
    is_broken: bool,
}

impl Memory {
    fn new() -> Self {
        Self {
            names: BTreeMap::new(),
            settings: Settings::default(),
            interfaces: BTreeMap::new(),
            backends: BTreeMap::new(),
            slots: vec![None; SLOTS as usize],
            groups: BTreeMap::new(),
            vips: BTreeMap::new(),
            listeners: BTreeMap::new(),
            listener_ranges: BTreeMap::new(),
            sources: BTreeMap::new(),
            past: BTreeMap::new(),
            refuse_after: None,
            is_broken: false,
        }
    }

    /// All bytes of all tables, but for slots that belong to no group: whoever takes them writes them first.
    fn bytes(&self) -> Self {
        let mut slots = vec![None; self.slots.len()];
        for group in self.groups.values() {
            let table = self.table(group);
            slots[group.first_slot as usize..][..table.len()].copy_from_slice(table);
        }
        Self {
            slots,
            ..self.clone()
        }
    }

    /// Panics where a number leads nowhere.
    fn check(&self, after: &MapWrite) {
        let exact = self.listeners.values().map(|(key, value)| (key.vip, value));
        let ranges = self.listener_ranges.values().map(|(key, value)| (key.vip, value));
        for (vip, listener) in exact.chain(ranges) {
            assert!(
                self.groups.contains_key(&listener.group),
                "after {after}: listener {} has no group",
                listener.id.0
            );
            assert!(
                self.vips.contains_key(&vip.octets()),
                "after {after}: listener {} has no VIP",
                listener.id.0
            );
            // Without a source it would shut everybody out.
            let has_sources = self
                .sources
                .values()
                .any(|(key, _)| key.listener.get() == listener.id.0);
            assert!(
                listener.flags & listener_flag::SOURCES == 0 || has_sources,
                "after {after}: listener {} admits nobody",
                listener.id.0
            );
            self.name(NameKind::LISTENER, listener.id.0, after);
        }
        for (id, group) in &self.groups {
            self.name(NameKind::GROUP, id.0, after);
            // Tables are long and made of few backends.
            let backends: HashSet<_> = self.table(group).iter().collect();
            for backend in backends {
                let backend = backend
                    .as_ref()
                    .unwrap_or_else(|| panic!("after {after}: group {} has no table", id.0));
                assert!(
                    self.backends.contains_key(backend),
                    "after {after}: a slot of group {} names no backend",
                    id.0
                );
            }
        }
        for id in self.backends.keys() {
            self.name(NameKind::BACKEND, id.0, after);
        }
    }

    fn table(&self, group: &BackendGroup) -> &[Option<BackendId>] {
        let count = group.slot_count + group.overflow_slot_count;
        &self.slots[group.first_slot as usize..(group.first_slot + count) as usize]
    }

    fn name(&self, kind: NameKind, id: u32, after: &MapWrite) -> &NameRecord {
        self.names
            .get(&NameKey { kind, id })
            .unwrap_or_else(|| panic!("after {after}: {kind:?} {id} has no name"))
    }

    /// What a packet finds, with names for numbers and places.
    fn meaning(&self) -> Meaning {
        let now = MapWrite::Settings(Box::new(SettingsChange {
            from: self.settings,
            to: self.settings,
        }));
        let backend = |id: BackendId| {
            let record = self.name(NameKind::BACKEND, id.0, &now);
            format!("{}/{}", record.group(), record.name())
        };
        let groups = self.groups.iter().map(|(id, group)| {
            let slots = self
                .table(group)
                .iter()
                .flatten()
                .map(|id| backend(*id))
                .collect();
            let name = self.name(NameKind::GROUP, id.0, &now).name();
            (name, (group.nat.0, slots))
        });
        let describe = |listener: &Listener| {
            let group = self.name(NameKind::GROUP, listener.group.0, &now).name();
            let name = self.name(NameKind::LISTENER, listener.id.0, &now).name();
            let rest = Listener {
                id: ListenerId(0),
                group: GroupId(0),
                ..*listener
            };
            format!("{name} -> {group} {rest:?}")
        };
        let exact = self
            .listeners
            .values()
            .map(|(key, value)| (format!("{key:?}"), describe(value)));
        let ranges = self
            .listener_ranges
            .values()
            .map(|(key, value)| (format!("{key:?}"), describe(value)));
        let sources = self.sources.values().map(|(key, _)| {
            let name = self.name(NameKind::LISTENER, key.listener.get(), &now).name();
            format!("{name} {:?}/{}", key.address, key.prefix_bits)
        });
        Meaning {
            settings: format!("{:?}", self.settings),
            interfaces: format!("{:?}", self.interfaces),
            backends: self
                .backends
                .iter()
                .map(|(id, value)| (backend(*id), format!("{value:?}")))
                .collect(),
            groups: groups.collect(),
            vips: self
                .vips
                .iter()
                .map(|(address, vip)| (*address, vip.listeners))
                .collect(),
            listeners: exact.chain(ranges).collect(),
            sources: sources.collect(),
        }
    }
}

/// [`Memory::meaning`].
#[derive(Clone, Debug, PartialEq)]
struct Meaning {
    settings: String,
    interfaces: String,
    backends: BTreeMap<String, String>,
    groups: BTreeMap<String, (u32, Vec<String>)>,
    vips: BTreeMap<[u8; 16], u32>,
    listeners: BTreeMap<String, String>,
    sources: BTreeSet<String>,
}

fn exchange<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> Option<V> {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    }
}

impl Store for Memory {
    fn exchange(&mut self, write: &MapWrite) -> Result<Option<MapWrite>, Error> {
        match &mut self.refuse_after {
            Some(0) => {
                if !self.is_broken {
                    self.refuse_after = None;
                }
                return Err(Error::failed(format!("refused: {write}")));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        let undo = match write {
            MapWrite::Name(key, value) => {
                let old = exchange(&mut self.names, *key, value.as_deref().copied());
                Some(MapWrite::Name(*key, old.map(Box::new)))
            }
            MapWrite::Settings(change) => {
                let old = std::mem::replace(&mut self.settings, change.to);
                Some(MapWrite::Settings(Box::new(SettingsChange {
                    from: change.to,
                    to: old,
                })))
            }
            MapWrite::Interface(key, value) => Some(MapWrite::Interface(
                *key,
                exchange(&mut self.interfaces, key.ifindex, *value),
            )),
            MapWrite::Backend(id, value) => {
                Some(MapWrite::Backend(*id, exchange(&mut self.backends, *id, *value)))
            }
            MapWrite::Slots { first, slots } => {
                let in_use = self.groups.values().map(|group| {
                    group.first_slot..group.first_slot + group.slot_count + group.overflow_slot_count
                });
                for range in in_use {
                    let end = first + slots.len() as u32;
                    assert!(
                        range.is_empty() || end <= range.start || range.end <= *first,
                        "{write} overwrites a table in use, {range:?}"
                    );
                }
                assert!(*first as usize + slots.len() <= SLOTS as usize, "{write}");
                for (slot, backend) in self.slots[*first as usize..].iter_mut().zip(slots.iter()) {
                    *slot = Some(*backend);
                }
                None
            }
            MapWrite::Group(id, value) => Some(MapWrite::Group(*id, exchange(&mut self.groups, *id, *value))),
            MapWrite::Vip(key, value) => Some(MapWrite::Vip(
                *key,
                exchange(&mut self.vips, key.address.octets(), *value),
            )),
            MapWrite::Listener(key, value) => {
                let order = (key.vip.octets(), key.port.get(), key.protocol.get() as u8);
                let old = exchange(&mut self.listeners, order, value.map(|value| (*key, value)));
                Some(MapWrite::Listener(*key, old.map(|(_, value)| value)))
            }
            MapWrite::ListenerRange(key, value) => {
                let old = exchange(
                    &mut self.listener_ranges,
                    bytemuck::cast(*key),
                    value.map(|value| (*key, value)),
                );
                Some(MapWrite::ListenerRange(*key, old.map(|(_, value)| value)))
            }
            MapWrite::Source(key, value) => {
                let old = exchange(
                    &mut self.sources,
                    bytemuck::cast(*key),
                    value.map(|value| (*key, value)),
                );
                Some(MapWrite::Source(*key, old.map(|(_, value)| value)))
            }
            MapWrite::TunnelPort(..)
            | MapWrite::TunnelEndpoint(..)
            | MapWrite::TunnelHop(..)
            | MapWrite::TunnelPeer(..) => unreachable!("no tunnel here is native: {write}"),
            MapWrite::ListenerCounters(_) | MapWrite::BackendCounters(..) => None,
            MapWrite::GroupPast(id, value) => {
                let old = exchange(&mut self.past, *id, value.as_deref().copied());
                Some(MapWrite::GroupPast(*id, old.map(Box::new)))
            }
        };
        self.check(write);
        Ok(undo)
    }
}

fn next(before: &Applied, config: &Config) -> Applied {
    let ids = before.ids.next(config, &Capacity::UNLIMITED).unwrap();
    let sizes = config
        .groups
        .iter()
        .map(|(name, group)| (ids.groups[name], TableSizes::of(group, &config.groups).sum()));
    let placement = before.placement.arrange(sizes).unwrap();
    Applied {
        desired: Desired::of(config, &ids, &observed()),
        ids,
        placement,
    }
}

fn observed() -> Observations {
    Observations {
        interfaces: BTreeMap::from([(2, Interface::zeroed())]),
        route_generation: 1,
        ..Observations::default()
    }
}

fn from_nothing(config: &Config) -> (Applied, Memory) {
    let nothing = Applied::nothing(SLOTS);
    let mut applied = next(&nothing, config);
    let mut memory = Memory::new();
    apply(&mut memory, &nothing.writes_to(&mut applied)).unwrap();
    (applied, memory)
}

fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/reconcile");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

const BEFORE: &str = "--- before\n";
const AFTER: &str = "--- after\n";
const CHANGES: &str = "--- changes\n";

/// What every configuration of the files begins with.
const COMMON: &str = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n";

#[test]
fn plans_are_as_the_files_say_and_lead_where_a_fresh_start_would() {
    let is_blessing = std::env::var_os("FORWARDER_BLESS").is_some_and(|value| value == "1");
    assert!(golden().len() >= 8);
    for file in golden() {
        let text = fs::read_to_string(&file).unwrap();
        let (sentence, rest) = text.split_once(BEFORE).expect("a configuration before");
        let (before, rest) = rest.split_once(AFTER).expect("a configuration after");
        let (after, expected) = rest.split_once(CHANGES).unwrap_or((rest, ""));
        let [config, config_after] = [before, after]
            .map(|text| parse(&format!("{COMMON}{text}"), &file).unwrap_or_else(|errors| panic!("{errors}")));

        let (applied, mut memory) = from_nothing(&config);
        let mut applied_after = next(&applied, &config_after);
        let writes = applied.writes_to(&mut applied_after);
        apply(&mut memory, &writes).unwrap();
        assert_eq!(
            memory.meaning(),
            from_nothing(&config_after).1.meaning(),
            "{}",
            file.display()
        );

        let mut plan = String::new();
        for change in differences(Some(&config), &config_after) {
            writeln!(plan, "{change}").unwrap();
        }
        plan += "--- writes\n";
        let names = NamesByNumber::of(&[&applied_after.ids, &applied.ids]);
        for write in &writes {
            writeln!(plan, "{}", write.describe(&names)).unwrap();
        }
        if is_blessing {
            fs::write(
                &file,
                format!("{sentence}{BEFORE}{before}{AFTER}{after}{CHANGES}{plan}"),
            )
            .unwrap();
        } else {
            assert_eq!(
                plan,
                expected,
                "{} (FORWARDER_BLESS=1 rewrites it)",
                file.display()
            );
        }
    }
}

/// A group of a random configuration: number of backends, weight of the first, NAT, first address.
type RandomGroup = (usize, u16, bool, u8);

/// A listener of a random configuration: its group, how many ports, which clients (0: all).
type RandomListener = (u8, u16, u8);

/// Groups by name, and listeners by port.
type Random = (BTreeMap<u8, RandomGroup>, BTreeMap<u16, RandomListener>);

fn configuration() -> impl Strategy<Value = Random> {
    let backends = prop_oneof![4 => 1usize..4, 1 => 9usize..13];
    let group = (backends, 1u16..4, any::<bool>(), 0u8..3);
    (
        prop::collection::btree_map(0u8..4, group, 1..4),
        prop::collection::btree_map(80u16..85, (0u8..4, 0u16..12, 0u8..3), 1..5),
    )
}

fn text((groups, listeners): &Random) -> String {
    let mut text = COMMON.to_owned();
    for (name, (backends, weight, is_dnat, address)) in groups {
        let nat = if *is_dnat { "dnat" } else { "full" };
        writeln!(
            text,
            "[group.g{name}]\nnat = \"{nat}\"\n[group.g{name}.health]\nkind = \"none\""
        )
        .unwrap();
        for backend in 0..*backends {
            let weight = if backend == 0 { *weight } else { 1 };
            // The second of many stands behind the others.
            let tier = usize::from(backend == 1 && *backends > 2);
            writeln!(
                text,
                "[group.g{name}.backend.b{backend}]\naddress = \"10.{address}.{name}.{}\"\nport = 80\nweight = {weight}\ntier = {tier}",
                backend + 1
            )
            .unwrap();
        }
    }
    let names: Vec<_> = groups.keys().collect();
    for (port, (group, more_ports, sources)) in listeners {
        let group = names[*group as usize % names.len()];
        writeln!(
            text,
            "[listener.l{port}]\nvip = \"192.0.2.{}\"\ngroup = \"g{group}\"",
            port % 2 + 1
        )
        .unwrap();
        match more_ports {
            0..6 => writeln!(text, "port = {port}").unwrap(),
            more => writeln!(text, "port = \"{port}00-{port}{more:02}\"").unwrap(),
        }
        if *sources > 0 {
            writeln!(text, "sources = [\"10.0.0.0/8\", \"172.16.{sources}.0/24\"]").unwrap();
        }
    }
    text
}

fn config_of(random: &Random) -> Config {
    let text = text(random);
    parse(&text, Path::new("random.toml")).unwrap_or_else(|errors| panic!("{errors}\n{text}"))
}

/// Refuses the first write, then the second, and so on: nothing has changed each time, byte for byte.
fn refuse_each(before: &Memory, writes: &[MapWrite]) {
    let bytes = before.bytes();
    for (refused, write) in writes.iter().enumerate() {
        let mut memory = before.clone();
        memory.refuse_after = Some(refused);
        let error = apply(&mut memory, writes).unwrap_err();
        assert_eq!(error.what, format!("refused: {write}"));
        assert_eq!(error.hint, None);
        assert!(
            memory.bytes() == bytes,
            "write {refused} of {}, {write}, was refused: what was before it was not undone",
            writes.len()
        );
    }
}

#[test]
fn a_typical_change_that_is_refused_anywhere_changes_nothing() {
    let mut refused = 0;
    for file in golden() {
        let text = fs::read_to_string(&file).unwrap();
        let (_, rest) = text.split_once(BEFORE).expect("a configuration before");
        let (before, rest) = rest.split_once(AFTER).expect("a configuration after");
        let (after, _) = rest.split_once(CHANGES).unwrap_or((rest, ""));
        let [before, after] = [before, after]
            .map(|text| parse(&format!("{COMMON}{text}"), &file).unwrap_or_else(|errors| panic!("{errors}")));
        // There, back, and what is left when the flows of what has gone have ended.
        let (mut applied, mut memory) = from_nothing(&before);
        for config in [&after, &before, &after] {
            let mut there = next(&applied, config);
            let writes = applied.writes_to(&mut there);
            refuse_each(&memory, &writes);
            apply(&mut memory, &writes).unwrap();
            applied = there;
            refused += writes.len();
        }
        let listeners = applied.ids.leaving_listeners.values().copied().collect();
        let backends = applied.ids.leaving_backends.values().copied().collect();
        let mut ended = Applied {
            ids: applied.ids.without(&listeners, &backends),
            ..applied.clone()
        };
        let writes = applied.writes_to(&mut ended);
        refuse_each(&memory, &writes);
        refused += writes.len();
    }
    println!("{refused} writes were refused, one at a time");
    assert!(refused > 50, "{refused}");
}

#[test]
fn a_first_start_that_is_refused_anywhere_leaves_empty_tables() {
    let file = &golden()[0];
    let text = fs::read_to_string(file).unwrap();
    let before = text
        .split_once(BEFORE)
        .and_then(|(_, rest)| rest.split_once(AFTER));
    let config = parse(&format!("{COMMON}{}", before.unwrap().0), file).unwrap();
    let nothing = Applied::nothing(SLOTS);
    let mut applied = next(&nothing, &config);
    refuse_each(&Memory::new(), &nothing.writes_to(&mut applied));
}

/// Whoever reads it knows that neither state is in force, and what to do.
#[test]
fn an_error_while_undoing_is_told_with_the_first_one_and_the_way_out() {
    let file = &golden()[0];
    let text = fs::read_to_string(file).unwrap();
    let before = text
        .split_once(BEFORE)
        .and_then(|(_, rest)| rest.split_once(AFTER));
    let config = parse(&format!("{COMMON}{}", before.unwrap().0), file).unwrap();
    let nothing = Applied::nothing(SLOTS);
    let mut applied = next(&nothing, &config);
    let writes = nothing.writes_to(&mut applied);
    for refused in 1..writes.len() {
        let mut memory = Memory::new();
        memory.refuse_after = Some(refused);
        memory.is_broken = true;
        let error = apply(&mut memory, &writes).unwrap_err();
        let first = format!("refused: {}", writes[refused]);
        assert!(
            error.what.starts_with(&first)
                && error.what[first.len()..]
                    .contains("undoing what was done before it failed, too: refused: "),
            "{error}"
        );
        assert!(
            error
                .hint
                .as_ref()
                .is_some_and(|hint| hint.contains("restart the agent")),
            "{error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    /// Ten times ten changes.
    #[test]
    fn any_chain_of_changes_leads_where_a_fresh_start_would(
        chain in prop::collection::vec((configuration(), any::<bool>()), 11)
    ) {
        let (mut applied, mut memory) = from_nothing(&config_of(&chain[0].0));
        for (random, flows_end) in &chain[1..] {
            let config = config_of(random);
            let mut after = next(&applied, &config);
            let writes = applied.writes_to(&mut after);
            apply(&mut memory, &writes).unwrap();
            prop_assert_eq!(memory.meaning(), from_nothing(&config).1.meaning());
            applied = after;
            // What the next agent would read is what this one knows.
            let mut read = forwarder_user::state::ids::Ids::restore(&memory.names);
            read.leaving_backends.clone_from(&applied.ids.leaving_backends);
            read.leaving_listeners.clone_from(&applied.ids.leaving_listeners);
            read.backends.retain(|name, _| !applied.ids.leaving_backends.contains_key(name));
            read.listeners.retain(|name, _| !applied.ids.leaving_listeners.contains_key(name));
            prop_assert_eq!(&read, &applied.ids);
            if *flows_end {
                let listeners = applied.ids.leaving_listeners.values().copied().collect();
                let backends = applied.ids.leaving_backends.values().copied().collect();
                let mut ended = Applied { ids: applied.ids.without(&listeners, &backends), ..applied.clone() };
                let writes = applied.writes_to(&mut ended);
                apply(&mut memory, &writes).unwrap();
                applied = ended;
                prop_assert_eq!(memory.meaning(), from_nothing(&config).1.meaning());
            }
        }
    }

    /// Whichever write is refused, the tables are what they were before.
    #[test]
    fn a_refused_write_undoes_all_before_it(before in configuration(), after in configuration()) {
        let (applied, memory) = from_nothing(&config_of(&before));
        let mut next = next(&applied, &config_of(&after));
        refuse_each(&memory, &applied.writes_to(&mut next));
    }

    /// Whatever order the file is in, and whatever a gateway had before.
    #[test]
    fn two_gateways_with_shuffled_configurations_have_the_same_tables(
        random in configuration(),
        earlier in configuration(),
        shuffle in any::<prop::sample::Index>(),
        by_turns: bool,
    ) {
        let common = text(&random);
        let mut tables: Vec<String> = common
            .split("\n[")
            .skip(1)
            .map(|table| format!("\n[{table}"))
            .collect();
        let (first, _) = common.split_once("\n[").unwrap();
        if by_turns {
            tables.iter_mut().for_each(|table| {
                if !table.contains(".health]") && !table.contains(".backend.") && table.contains("[group.") {
                    table.push_str("\nselection = \"round-robin\"");
                }
            });
        }
        let ordered = format!("{first}{}", tables.concat());
        let at = shuffle.index(tables.len());
        tables.rotate_left(at);
        tables.reverse();
        // The last of them may lack its end of line.
        let shuffled = format!("{first}{}", tables.join("\n"));
        let [ordered, shuffled] = [ordered, shuffled]
            .map(|text| parse(&text, Path::new("random.toml")).unwrap_or_else(|errors| panic!("{errors}\n{text}")));

        let (one, memory) = from_nothing(&ordered);
        prop_assert!(Desired::of(&shuffled, &Ids::assign(&shuffled), &observed()) == one.desired);
        // The other one had something else before, and so has other numbers.
        let (before, mut other) = from_nothing(&config_of(&earlier));
        let mut after = next(&before, &shuffled);
        let writes = before.writes_to(&mut after);
        apply(&mut other, &writes).unwrap();
        prop_assert_eq!(other.meaning(), memory.meaning());
    }
}
