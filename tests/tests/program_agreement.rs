//! Ring 2: what the agent believes of its backends is what the data path reads, after ten thousand random flaps of
//! health, orders, changes of the configuration and restarts, through the agent's own plans into the kernel's maps.

// Helpers of tests, which clippy does not know as such.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    path::Path,
};

use aya::Ebpf;
use forwarder_common::abi::backend::{BackendId, BackendState};
use forwarder_tests::program::with_kernel;
use forwarder_user::{
    config::{Config, TableSizes, load::parse},
    datapath::{
        maps::{self, ControlMaps, CounterMaps},
        object::{self, Sizes},
        reader,
        writer::KernelTables,
    },
    health::Health,
    state::{
        apply::apply,
        desired::{Desired, Observations},
        ids::{Capacity, Ids},
        inherit::inherited_health,
        overrides::{self, Override},
        plan::Applied,
        tables::{Job, TableCache},
    },
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

const FLAPS: usize = 10_000;
/// Flaps between two comparisons.
const BATCH: usize = 20;
/// A group of this size has a table that is built beside the agent's loop.
const LARGE: usize = 90;

const SIZES: Sizes = Sizes {
    flows: 1024,
    flow_keys_v6: 1,
    flow_keys: 1024,
    slots: 131_072,
    groups: 16,
    backends: 1024,
    listeners: 16,
    listener_ranges: 16,
    sources: 16,
    vips: 16,
    interfaces: 8,
    tunnel_peers: 8,
    persistence: 16,
    source_rates: 1,
};

/// A backend by group and name.
type Name = (String, String);

/// What is really the case.
#[derive(Clone, Debug, Default)]
struct Truth {
    /// Backends that were found healthy, or not.
    healthy: BTreeMap<Name, bool>,
    orders: BTreeMap<Name, Override>,
}

/// An agent without probes, network and programs.
struct Agent<'a> {
    config: Config,
    observed: Observations,
    applied: Applied,
    cache: TableCache,
    jobs: Vec<Job>,
    control: &'a mut ControlMaps,
    counters: &'a mut CounterMaps,
}

impl<'a> Agent<'a> {
    /// Takes over what is in the tables.
    fn start(config: Config, control: &'a mut ControlMaps, counters: &'a mut CounterMaps) -> Self {
        let before = reader::read(control).unwrap();
        let ids = before.ids.next(&config, &Capacity::UNLIMITED).unwrap();
        let observed = Observations {
            health: inherited_health(&before, &HashMap::new(), &config, &ids),
            overrides: overrides::named(&before.desired.overrides, &ids),
            ..Observations::default()
        };
        let mut agent = Self {
            config: config.clone(),
            observed,
            applied: before,
            cache: TableCache::default(),
            jobs: Vec::new(),
            control,
            counters,
        };
        agent.configure(config);
        agent
    }

    /// Takes over a configuration, whose tables are built at once.
    fn configure(&mut self, config: Config) {
        let ids = self.applied.ids.next(&config, &Capacity::UNLIMITED).unwrap();
        let sizes = config
            .groups
            .iter()
            .map(|(name, group)| (ids.groups[name], TableSizes::of(group, &config.groups).sum()));
        let placement = self.applied.placement.arrange(sizes).unwrap();
        self.observed.health = inherited_health(&self.applied, &self.observed.health, &config, &ids);
        self.observed
            .overrides
            .retain(|name, _| ids.backends.contains_key(name));
        let mut tables = self.cache.now();
        let desired = Desired::with_tables(&config, &ids, &self.observed, &mut tables);
        let tables = tables.finish();
        self.write(Applied {
            ids,
            placement,
            desired,
        });
        self.cache.replace(tables);
        self.config = config;
    }

    /// Follows what was observed, without waiting for tables.
    fn reconcile(&mut self) {
        let ids = self.applied.ids.clone();
        let desired = Desired::with_tables(&self.config, &ids, &self.observed, &mut self.cache.later());
        let placement = self.applied.placement.clone();
        self.write(Applied {
            ids,
            placement,
            desired,
        });
        self.jobs.extend(self.cache.jobs(2));
    }

    fn write(&mut self, mut next: Applied) {
        let writes = self.applied.writes_to(&mut next);
        let mut tables = KernelTables {
            control: self.control,
            counters: self.counters,
        };
        apply(&mut tables, &writes).unwrap();
        self.applied = next;
    }

    /// Finishes a table that was under way.
    fn finish(&mut self, job: Job) {
        if self.cache.take(job.run()) {
            self.reconcile();
        }
        self.jobs.extend(self.cache.jobs(2));
    }

    /// The flows of all that have left have ended.
    fn forget(&mut self) {
        let listeners = self.applied.ids.leaving_listeners.values().copied().collect();
        let backends = self.applied.ids.leaving_backends.values().copied().collect();
        self.write(Applied {
            ids: self.applied.ids.without(&listeners, &backends),
            ..self.applied.clone()
        });
    }

    /// Compares belief, tables and truth.
    fn check(&self, truth: &Truth) {
        let read = reader::read(self.control).unwrap();
        assert_eq!(read.desired.backends, self.applied.desired.backends);
        assert_eq!(read.desired.overrides, self.applied.desired.overrides);
        assert!(read.desired.groups == self.applied.desired.groups, "slots differ");
        assert_eq!(read.desired.listeners, self.applied.desired.listeners);
        let mut numbers = Ids {
            leaving_backends: BTreeMap::new(),
            leaving_listeners: BTreeMap::new(),
            ..self.applied.ids.clone()
        };
        // To the tables, those that have left are still there.
        numbers.backends.extend(self.applied.ids.leaving_backends.clone());
        numbers
            .listeners
            .extend(self.applied.ids.leaving_listeners.clone());
        assert_eq!(read.ids, numbers);

        let mut takes_flows = HashSet::new();
        for (name, id) in &self.applied.ids.backends {
            let backend = &self.config.groups[&name.0].backends[&name.1];
            let orders = truth.orders.get(name).copied().unwrap_or_default();
            let is_drained = orders.is_drained || orders.weight.unwrap_or(backend.weight) == 0;
            let expected = match truth.healthy.get(name) {
                Some(true) if is_drained => BackendState::DRAINING,
                Some(true) => BackendState::HEALTHY,
                _ => BackendState::UNHEALTHY,
            };
            assert_eq!(read.desired.backends[id].state, expected, "{name:?}");
            if expected == BackendState::HEALTHY {
                takes_flows.insert(*id);
            }
        }
        for (id, group) in &read.desired.groups {
            let slots: HashSet<BackendId> =
                group.slots.iter().chain(group.overflow.iter()).copied().collect();
            for slot in &slots {
                // A table may lag behind; that nobody is there it may never say.
                assert!(
                    read.desired.backends.contains_key(slot),
                    "group {id:?}: {slot:?} is nobody"
                );
                assert!(
                    !self.jobs.is_empty() || takes_flows.contains(slot),
                    "group {id:?}: {slot:?} takes no flows"
                );
            }
        }
    }
}

/// Configuration number `version` of a few.
fn config(version: usize) -> Config {
    let mut text = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n".to_owned();
    let groups = [("small", 5), ("large", LARGE), ("tiers", 8), ("far", 3)];
    for (number, (group, count)) in groups.into_iter().enumerate() {
        let more = if group == "tiers" {
            "backup = \"far\"\nmin_healthy_percent = 50\n"
        } else {
            ""
        };
        writeln!(
            text,
            "[listener.{group}]\nvip = \"192.0.2.1\"\nport = {}\ngroup = \"{group}\"\n[group.{group}]\n{more}",
            80 + number
        )
        .unwrap();
        // Some backends are away in some versions, one is elsewhere.
        for backend in (0..count).filter(|backend| (backend + version) % 7 != 1) {
            let port = if backend == 3 { 8000 + version } else { 80 };
            let tier = if group == "tiers" && backend > 0 {
                backend % 3
            } else {
                0
            };
            writeln!(
                text,
                "[group.{group}.backend.b{backend}]\naddress = \"10.0.{number}.{}\"\nport = {port}\nweight = {}\ntier = {tier}",
                backend + 1,
                backend % 4 + 1
            )
            .unwrap();
        }
    }
    parse(&text, Path::new("random.toml")).unwrap_or_else(|errors| panic!("{errors}\n{text}"))
}

/// After a change of the configuration or a restart: what has gone is forgotten, what moved is unknown again.
fn follow(truth: &mut Truth, before: &Config, after: &Config) {
    let place = |config: &Config, name: &Name| {
        let backend = config.groups.get(&name.0)?.backends.get(&name.1)?;
        Some((backend.address, backend.port))
    };
    truth
        .healthy
        .retain(|name, _| place(before, name) == place(after, name));
    truth.orders.retain(|name, _| place(after, name).is_some());
}

#[test]
fn agent_and_data_path_agree_after_ten_thousand_flaps() {
    with_kernel(|_| {
        let seed = rand::random();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let mut ebpf: Ebpf = object::load(&SIZES).unwrap();
        let (mut control, _flows, mut counters) = maps::take(&mut ebpf, &SIZES, None).unwrap();
        let mut truth = Truth::default();
        let mut version = 0;
        let mut agent = Agent::start(config(version), &mut control, &mut counters);
        let (mut late, mut restarts) = (0, 0);
        for flap in 1..=FLAPS {
            let names: Vec<Name> = agent.applied.ids.backends.keys().cloned().collect();
            let name = names[random.random_range(0..names.len())].clone();
            let is_healthy = !truth.healthy.get(&name).copied().unwrap_or(false);
            truth.healthy.insert(name.clone(), is_healthy);
            let health = if is_healthy {
                Health::Healthy
            } else {
                Health::Unhealthy
            };
            agent.observed.health.insert(name.clone(), health);
            if random.random_ratio(1, 10) {
                let orders = Override {
                    is_drained: random.random(),
                    drain_until_secs: random.random::<bool>().then(|| random.random()),
                    weight: random.random::<bool>().then(|| random.random_range(0..5)),
                };
                truth.orders.insert(name.clone(), orders);
                agent.observed.overrides.insert(name, orders);
                truth.orders.retain(|_, orders| !orders.is_none());
                agent.observed.overrides.retain(|_, orders| !orders.is_none());
            }
            agent.reconcile();
            late += usize::from(!agent.jobs.is_empty());
            if !agent.jobs.is_empty() && random.random_ratio(1, 8) {
                let job = agent.jobs.swap_remove(random.random_range(0..agent.jobs.len()));
                agent.finish(job);
            }
            if random.random_ratio(1, 100) {
                version = random.random_range(0..5);
                let next = config(version);
                follow(&mut truth, &agent.config, &next);
                agent.configure(next);
            }
            if random.random_ratio(1, 200) {
                agent.forget();
            }
            if random.random_ratio(1, 100) {
                // It is killed, whatever is under way; the next one may have another configuration.
                let before = agent.config.clone();
                drop(agent);
                version = random.random_range(0..5);
                let next = config(version);
                follow(&mut truth, &before, &next);
                // What was found unhealthy is as good as never probed.
                truth.healthy.retain(|_, is_healthy| *is_healthy);
                agent = Agent::start(next, &mut control, &mut counters);
                restarts += 1;
                agent.check(&truth);
            }
            if flap % BATCH == 0 {
                agent.check(&truth);
            }
        }
        while let Some(job) = agent.jobs.pop() {
            agent.finish(job);
        }
        agent.check(&truth);
        assert!(
            late > FLAPS / 100 && restarts > 10,
            "{late} late tables, {restarts} restarts"
        );
    });
}
