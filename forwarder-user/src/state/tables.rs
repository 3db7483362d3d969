//! The groups' tables: what each is built from, and which ones are at hand.
//!
//! A table is built once for its inputs and kept ([`TableCache`]). While the agent runs, a change of health first
//! changes the backend's state, which the data path heeds at once, and leaves the table as it is ([`Later`]); the new
//! one is built beside the agent's loop and takes the old one's place when it is there. Where tables have to fit
//! their configuration at once, at a start and when a configuration is applied, they are built on the spot ([`Now`]).

use std::{collections::HashMap, sync::Arc};

use forwarder_common::{
    abi::backend::{BackendId, GroupId, Selection},
    maglev::{self, Entry},
};

use super::turns;

/// The slots of a table. Shared: a table of 10 000 backends has 4 MB.
pub type Slots = Arc<[BackendId]>;

/// Largest table that is built on the spot in any case: it takes less than half a millisecond.
const ON_THE_SPOT: u32 = 4093;

/// All that a table depends on: equal inputs give equal tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableInputs {
    selection: Selection,
    /// Most slots that it may have; a Maglev table has as many.
    size: u32,
    /// By identity, so that the order of the configuration does not matter.
    entries: Vec<Entry>,
}

impl TableInputs {
    /// Inputs of a table with at most `size` slots, a prime. Backends without a weight are left out.
    pub fn new(selection: Selection, size: u32, mut entries: Vec<Entry>) -> Self {
        entries.retain(|entry| entry.weight > 0);
        entries.sort_by_key(|entry| (entry.identity, entry.value));
        Self {
            selection,
            size,
            entries,
        }
    }

    /// The table; empty when no backend has a weight.
    pub fn build(&self) -> Slots {
        if self.entries.is_empty() {
            return Slots::default();
        }
        match self.selection {
            Selection::ROUND_ROBIN => return turns::cycle(&self.entries, self.size).into(),
            // Once each: the data path compares those that it looks at by their weight.
            Selection::LEAST_CONNECTIONS => {
                return self.entries.iter().map(|entry| BackendId(entry.value)).collect();
            }
            _ => {}
        }
        let mut turns = vec![maglev::Turn::default(); self.entries.len()];
        let mut slots = vec![0; self.size as usize];
        if maglev::build(&self.entries, &mut turns, &mut slots) {
            slots.into_iter().map(BackendId).collect()
        } else {
            Slots::default()
        }
    }

    fn is_quick(&self) -> bool {
        self.size <= ON_THE_SPOT || self.entries.is_empty()
    }
}

/// Which table of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    First,
    /// Behind the first, for the tier that comes next.
    Overflow,
}

/// A table by its group.
pub type TableKey = (GroupId, Place);

/// Where tables come from.
pub trait TableSource {
    /// A table of a group for now.
    fn slots(&mut self, key: TableKey, inputs: TableInputs) -> Slots;
}

/// Builds every table.
#[derive(Debug)]
pub struct Fresh;

impl TableSource for Fresh {
    fn slots(&mut self, _: TableKey, inputs: TableInputs) -> Slots {
        inputs.build()
    }
}

/// Leaves all tables empty, for those who do not look at them.
#[derive(Debug)]
pub struct NoTables;

impl TableSource for NoTables {
    fn slots(&mut self, _: TableKey, _: TableInputs) -> Slots {
        Slots::default()
    }
}

/// A table that is to be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    key: TableKey,
    /// Of the cache, when the job was given out.
    generation: u64,
    inputs: TableInputs,
}

/// A table that was built.
#[derive(Clone, Debug)]
pub struct Built {
    job: Job,
    slots: Slots,
}

impl Job {
    /// Builds the table, which may take a second.
    pub fn run(self) -> Built {
        let slots = self.inputs.build();
        Built { job: self, slots }
    }
}

/// One table.
#[derive(Clone, Debug)]
struct Cached {
    inputs: TableInputs,
    slots: Slots,
    /// What the table should be built from by now, if it is not.
    wanted: Option<TableInputs>,
    is_under_way: bool,
}

/// The tables in force, with what they were built from.
#[derive(Debug, Default)]
pub struct TableCache {
    tables: HashMap<TableKey, Cached>,
    /// Rises with every change of the configuration.
    generation: u64,
}

impl TableCache {
    /// As a source that never makes anybody wait: a table that takes time stays as it is for now, and becomes a
    /// [`Job`].
    pub fn later(&mut self) -> Later<'_> {
        Later(self)
    }

    /// As a source of tables that are right at once. The cache stays as it is until [`Self::replace`].
    pub fn now(&self) -> Now<'_> {
        Now {
            cache: self,
            tables: HashMap::new(),
        }
    }

    /// Another configuration is in force, with the tables that [`Now`] gave out. Tables under way are of no use any
    /// more.
    pub fn replace(&mut self, next: NextTables) {
        self.generation += 1;
        self.tables = next.0;
    }

    /// Is a table to be built, or under way?
    pub fn is_behind(&self) -> bool {
        self.tables.values().any(|table| table.wanted.is_some())
    }

    /// Tables to be built, so that at most `limit` are under way at a time.
    pub fn jobs(&mut self, limit: usize) -> Vec<Job> {
        let under_way = self.tables.values().filter(|table| table.is_under_way).count();
        let generation = self.generation;
        let waiting = self.tables.iter_mut().filter(|(_, table)| !table.is_under_way);
        let jobs = waiting.filter_map(|(key, table)| {
            let inputs = table.wanted.clone()?;
            Some((
                table,
                Job {
                    key: *key,
                    generation,
                    inputs,
                },
            ))
        });
        jobs.take(limit.saturating_sub(under_way))
            .map(|(table, job)| {
                table.is_under_way = true;
                job
            })
            .collect()
    }

    /// Takes a table that was built; `true`: it is the one in force from now on. It is not where the configuration is
    /// another one by now, nor where the one in force is wanted again. Where yet another one is wanted, it still comes
    /// nearer to that than the one before: else a group whose backends change faster than its table is built would
    /// keep an old one for ever.
    pub fn take(&mut self, built: Built) -> bool {
        let Built { job, slots } = built;
        if job.generation != self.generation {
            return false;
        }
        let Some(table) = self.tables.get_mut(&job.key) else {
            return false;
        };
        table.is_under_way = false;
        let Some(wanted) = &table.wanted else {
            return false;
        };
        if *wanted == job.inputs {
            table.wanted = None;
        }
        (table.inputs, table.slots) = (job.inputs, slots);
        true
    }
}

/// See [`TableCache::later`].
#[derive(Debug)]
pub struct Later<'a>(&'a mut TableCache);

impl TableSource for Later<'_> {
    fn slots(&mut self, key: TableKey, inputs: TableInputs) -> Slots {
        let known = self.0.tables.get_mut(&key);
        match known {
            Some(table) if table.inputs == inputs => table.wanted = None,
            Some(table) if !inputs.is_quick() => table.wanted = Some(inputs),
            _ => {
                let is_under_way = known.is_some_and(|table| table.is_under_way);
                let table = Cached {
                    slots: inputs.build(),
                    inputs,
                    wanted: None,
                    is_under_way,
                };
                self.0.tables.insert(key, table);
            }
        }
        self.0.tables[&key].slots.clone()
    }
}

/// See [`TableCache::now`].
#[derive(Debug)]
pub struct Now<'a> {
    cache: &'a TableCache,
    tables: HashMap<TableKey, Cached>,
}

/// The tables of a configuration that may come into force.
#[derive(Debug)]
pub struct NextTables(HashMap<TableKey, Cached>);

impl Now<'_> {
    /// What was given out.
    pub fn finish(self) -> NextTables {
        NextTables(self.tables)
    }
}

impl TableSource for Now<'_> {
    fn slots(&mut self, key: TableKey, inputs: TableInputs) -> Slots {
        let known = self.cache.tables.get(&key).filter(|table| table.inputs == inputs);
        let slots = known.map_or_else(|| inputs.build(), |table| table.slots.clone());
        let table = Cached {
            inputs,
            slots: slots.clone(),
            wanted: None,
            is_under_way: false,
        };
        self.tables.insert(key, table);
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: TableKey = (GroupId(3), Place::First);
    /// Too large to be built on the spot.
    const LARGE: u32 = 8191;

    fn inputs(size: u32, backends: &[u32]) -> TableInputs {
        let entry = |number: &u32| Entry {
            value: *number,
            identity: maglev::identity(&number.to_be_bytes(), 80),
            weight: 1,
        };
        TableInputs::new(Selection::MAGLEV, size, backends.iter().map(entry).collect())
    }

    /// A cache whose group has a table of these backends in force.
    fn with(size: u32, backends: &[u32]) -> TableCache {
        let mut cache = TableCache::default();
        let mut now = cache.now();
        now.slots(KEY, inputs(size, backends));
        let next = now.finish();
        cache.replace(next);
        cache
    }

    fn ask(cache: &mut TableCache, backends: &[u32]) -> Slots {
        cache.later().slots(KEY, inputs(LARGE, backends))
    }

    #[test]
    fn a_large_table_stays_until_the_next_one_is_there() {
        let mut cache = with(LARGE, &[1, 2]);
        let before = ask(&mut cache, &[1, 2]);
        assert!(!cache.is_behind() && cache.jobs(9).is_empty());
        assert!(Arc::ptr_eq(&before, &ask(&mut cache, &[2])));
        assert!(cache.is_behind());
        let job = cache.jobs(9).pop().unwrap();
        assert!(cache.jobs(9).is_empty(), "one at a time");
        assert!(cache.take(job.run()));
        assert!(!cache.is_behind());
        let after = ask(&mut cache, &[2]);
        assert_eq!(after, inputs(LARGE, &[2]).build());
        assert!(Arc::ptr_eq(&after, &ask(&mut cache, &[2])), "built once");
    }

    #[test]
    fn small_and_empty_tables_are_there_at_once() {
        let mut cache = with(1021, &[1, 2]);
        let small = inputs(1021, &[2]);
        assert_eq!(cache.later().slots(KEY, small.clone()), small.build());
        let mut cache = with(LARGE, &[1]);
        assert!(ask(&mut cache, &[]).is_empty());
        assert!(!cache.is_behind());
    }

    #[test]
    fn a_table_that_is_not_wanted_any_more_is_dropped() {
        let mut cache = with(LARGE, &[1, 2]);
        let before = ask(&mut cache, &[2]);
        let job = cache.jobs(9).pop().unwrap();
        ask(&mut cache, &[1, 2]);
        assert!(!cache.take(job.run()), "the backend is back");
        assert!(Arc::ptr_eq(&before, &ask(&mut cache, &[1, 2])));

        ask(&mut cache, &[2]);
        let job = cache.jobs(9).pop().unwrap();
        let mut now = cache.now();
        now.slots(KEY, inputs(LARGE, &[1, 2, 3]));
        let next = now.finish();
        cache.replace(next);
        assert!(!cache.take(job.run()), "the configuration is another one");
        assert_eq!(ask(&mut cache, &[1, 2, 3]), inputs(LARGE, &[1, 2, 3]).build());
    }

    #[test]
    fn a_group_that_changes_faster_than_its_table_is_built_gets_tables_all_the_same() {
        let mut cache = with(LARGE, &[1, 2, 3]);
        ask(&mut cache, &[2, 3]);
        let job = cache.jobs(9).pop().unwrap();
        ask(&mut cache, &[3]);
        assert!(cache.take(job.run()));
        assert_eq!(ask(&mut cache, &[3]), inputs(LARGE, &[2, 3]).build());
        let job = cache.jobs(9).pop().unwrap();
        assert!(cache.take(job.run()));
        assert_eq!(ask(&mut cache, &[3]), inputs(LARGE, &[3]).build());
    }

    #[test]
    fn jobs_under_way_are_limited() {
        let mut cache = TableCache::default();
        let mut now = cache.now();
        for group in 0..3 {
            now.slots((GroupId(group), Place::First), inputs(LARGE, &[1, 2]));
        }
        let next = now.finish();
        cache.replace(next);
        for group in 0..3 {
            cache
                .later()
                .slots((GroupId(group), Place::First), inputs(LARGE, &[2]));
        }
        let first = cache.jobs(2);
        assert_eq!(first.len(), 2);
        assert!(cache.jobs(2).is_empty());
        for job in first {
            cache.take(job.run());
        }
        assert_eq!(cache.jobs(2).len(), 1);
    }

    #[test]
    fn what_a_configuration_shares_with_the_one_before_is_not_built_again() {
        let mut cache = with(LARGE, &[1, 2]);
        let before = ask(&mut cache, &[1, 2]);
        let mut now = cache.now();
        assert!(Arc::ptr_eq(&before, &now.slots(KEY, inputs(LARGE, &[2, 1]))));
    }
}
