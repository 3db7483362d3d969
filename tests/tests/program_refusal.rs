//! Ring 2: a change that fails half-way leaves the kernel's maps as they were, byte for byte, whichever of its writes is
//! the one that is refused. `reconcile` shows the same of tables in memory, for more kinds of changes.

// Helpers of tests, which clippy does not know as such.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use aya::maps::{HashMap as BpfHash, LpmTrie, MapData, PerCpuValues};
use bytemuck::{Pod, Zeroable as _};
use forwarder_common::{
    abi::{
        backend::{BackendId, GroupId},
        counter::EventCounters,
        interface::Interface,
        tunnel::{
            PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelKind, TunnelPeer,
        },
    },
    wire::Be16,
};
use forwarder_tests::{program::with_kernel, tables};
use forwarder_user::{
    config::{Config, TableSizes, load::parse},
    datapath::{
        maps::{self, ControlMaps, CounterMaps},
        object,
        pod::AsPod,
        reader,
        writer::KernelTables,
    },
    error::Error,
    health::Health,
    state::{
        apply::{Store, apply},
        desired::{Desired, Observations},
        ids::Capacity,
        overrides::Override,
        plan::{Applied, MapWrite},
        tunnels::TunnelTables,
    },
};

/// Those of the packet cases have no room for two tables of a group.
const SIZES: object::Sizes = object::Sizes {
    slots: 65_536,
    ..tables::SIZES
};

/// The kernel's maps, which refuse one write.
struct Refusing<'a> {
    tables: KernelTables<'a>,
    /// Writes until it is refused.
    left: Option<usize>,
}

impl Store for Refusing<'_> {
    fn exchange(&mut self, write: &MapWrite) -> Result<Option<MapWrite>, Error> {
        match &mut self.left {
            Some(0) => {
                self.left = None;
                return Err(Error::failed(format!("refused: {write}")));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        self.tables.exchange(write)
    }
}

/// Keys and values of a map, sorted.
type Bytes = BTreeMap<Vec<u8>, Vec<u8>>;

fn of_hash<K: Pod, V: Pod>(map: &BpfHash<MapData, AsPod<K>, AsPod<V>>) -> Bytes {
    map.iter()
        .map(|entry| {
            let (AsPod(key), AsPod(value)) = entry.unwrap();
            (
                bytemuck::bytes_of(&key).to_vec(),
                bytemuck::bytes_of(&value).to_vec(),
            )
        })
        .collect()
}

fn of_trie<V: Pod>(map: &LpmTrie<MapData, [u32; 5], AsPod<V>>) -> Bytes {
    map.iter()
        .map(|entry| {
            let (key, AsPod(value)) = entry.unwrap();
            let words = [&[key.prefix_len()][..], &key.data()].concat();
            (
                bytemuck::cast_slice(&words).to_vec(),
                bytemuck::bytes_of(&value).to_vec(),
            )
        })
        .collect()
}

fn of_array<V: Pod>(map: &aya::maps::Array<MapData, AsPod<V>>) -> Bytes {
    // Of the 65 536 tunnel ports only those around the ones in use.
    (0..map.len())
        .filter(|index| map.len() < 65_536 || (4700..4900).contains(index))
        .map(|index| {
            let AsPod(value) = map.get(&index, 0).unwrap();
            (index.to_be_bytes().to_vec(), bytemuck::bytes_of(&value).to_vec())
        })
        .collect()
}

/// All that the writer writes: every byte, and what the next agent would make of it, which has the slots in use.
#[derive(PartialEq)]
struct Dump {
    bytes: [(&'static str, Bytes); 13],
    read: Applied,
    /// Flows opened by backends, past and present: the past may have grown by what a backend has lost.
    opened: u64,
}

fn dump(control: &ControlMaps, counters: &CounterMaps) -> Dump {
    let past = counters.past.iter().map(|entry| entry.unwrap().1.0.flows_opened);
    let present = (0..SIZES.backends).map(|id| counters.backend(BackendId(id)).unwrap().flows_opened);
    Dump {
        bytes: [
            ("NAMES", of_hash(&control.names)),
            ("SETTINGS", of_array(&control.settings)),
            ("INTERFACES", of_hash(&control.interfaces)),
            ("TUNNEL_PORTS", of_array(&control.tunnel_ports)),
            ("TUNNEL_ENDPOINTS", of_hash(&control.tunnel_endpoints)),
            ("TUNNEL_HOPS", of_hash(&control.tunnel_hops)),
            ("TUNNEL_PEERS", of_array(&control.tunnel_peers)),
            ("VIPS", of_hash(&control.vips)),
            ("LISTENERS", of_hash(&control.listeners)),
            ("LISTENER_RANGES", of_trie(&control.listener_ranges)),
            ("SOURCES", of_trie(&control.sources)),
            ("GROUPS", of_array(&control.groups)),
            ("BACKENDS", of_array(&control.backends)),
        ],
        read: reader::read(control).unwrap(),
        opened: past.chain(present).sum(),
    }
}

/// What was observed so far: health of all, an interface, tunnels.
fn observed(config: &Config, generation: u32, tunnels: TunnelTables) -> Observations {
    let health: HashMap<_, _> = config
        .groups
        .iter()
        .flat_map(|(group, settings)| {
            settings
                .backends
                .keys()
                .map(move |name| ((group.clone(), name.clone()), Health::Healthy))
        })
        .collect();
    Observations {
        health,
        interfaces: BTreeMap::from([(2 + generation % 2, Interface::zeroed())]),
        route_generation: generation,
        tunnels,
        ..Observations::default()
    }
}

fn next(before: &Applied, config: &Config, observed: &Observations) -> Applied {
    let ids = before.ids.next(config, &Capacity::UNLIMITED).unwrap();
    let sizes = config
        .groups
        .iter()
        .map(|(name, group)| (ids.groups[name], TableSizes::of(group, &config.groups).sum()));
    Applied {
        placement: before.placement.arrange(sizes).unwrap(),
        desired: Desired::of(config, &ids, observed),
        ids,
    }
}

/// What the flows have left that have ended.
fn without_leaving(before: &Applied) -> Applied {
    let listeners = before.ids.leaving_listeners.values().copied().collect();
    let backends = before.ids.leaving_backends.values().copied().collect();
    Applied {
        ids: before.ids.without(&listeners, &backends),
        ..before.clone()
    }
}

fn config(text: &str) -> Config {
    let text = format!("[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n{text}");
    parse(&text, Path::new("test.toml")).unwrap_or_else(|errors| panic!("{errors}\n{text}"))
}

const WEB: &str = r#"
[listener.web]
vip = "192.0.2.1"
port = 80
group = "web"
[listener.many]
vip = "192.0.2.2"
port = "1000-1003"
group = "web"
[group.web.backend.a]
address = "10.0.0.1"
port = 80
[group.web.backend.b]
address = "10.0.0.2"
port = 80
"#;
/// Backend `b` leaves, `a` moves and `c` comes; a listener goes, one changes its ports, one comes with its group.
const OTHER: &str = r#"
[listener.many]
vip = "192.0.2.3"
port = "2000-2011"
sources = ["10.0.0.0/8", "172.16.0.0/24"]
group = "web"
[listener.api]
vip = "192.0.2.1"
port = 443
group = "api"
[group.web]
nat = "dnat"
[group.web.backend.a]
address = "10.0.0.9"
port = 80
weight = 7
[group.web.backend.c]
address = "10.0.0.3"
port = 80
[group.api.backend.x]
address = "10.0.1.1"
port = 443
"#;

/// Tunnels to as many far ends as this, of different contents in every version.
fn tunnels(peers: u16, version: u8) -> TunnelTables {
    let mut tunnels = TunnelTables::default();
    for peer in 0..peers {
        let mut key = TunnelEndpointKey::zeroed();
        key.kind = TunnelKind::VXLAN;
        key.port = Be16::new(4789 + peer);
        let mut endpoint = TunnelEndpoint::zeroed();
        endpoint.ifindex = u32::from(version);
        tunnels.add_endpoint(key, endpoint);
        let mut key = TunnelHopKey::zeroed();
        key.ifindex = u32::from(peer);
        let hop = TunnelHop {
            peer: PeerId(peer),
            ..TunnelHop::zeroed()
        };
        tunnels.hops.insert(bytemuck::cast(key), (key, hop));
        let mut content = TunnelPeer::zeroed();
        content.ifindex = u32::from(version);
        tunnels.peers.insert(PeerId(peer), content);
    }
    tunnels
}

#[test]
fn whichever_write_the_kernel_refuses_its_maps_are_what_they_were() {
    with_kernel(|_| {
        let mut ebpf = object::load(&SIZES).unwrap();
        let (mut control, _flows, mut counters) = maps::take(&mut ebpf, &SIZES, None).unwrap();
        let (web, other) = (config(WEB), config(OTHER));
        let mut unhealthy = observed(&other, 3, tunnels(1, 2));
        unhealthy
            .health
            .insert(("web".to_owned(), "a".to_owned()), Health::Unhealthy);
        let drained = Override {
            is_drained: true,
            ..Override::default()
        };
        unhealthy
            .overrides
            .insert(("web".to_owned(), "c".to_owned()), drained);
        let steps = [
            ("a first start", &web, observed(&web, 1, TunnelTables::default())),
            ("tunnels come", &web, observed(&web, 2, tunnels(2, 1))),
            (
                "much comes, goes and changes",
                &other,
                observed(&other, 3, tunnels(1, 2)),
            ),
            ("health and orders", &other, unhealthy),
            ("back again", &web, observed(&web, 4, TunnelTables::default())),
        ];
        let mut applied = Applied::nothing(SIZES.slots);
        let mut refused = 0;
        for (what, config, observed) in &steps {
            for has_ended in [false, true] {
                let mut after = if has_ended {
                    without_leaving(&applied)
                } else {
                    next(&applied, config, observed)
                };
                let writes = applied.writes_to(&mut after);
                if has_ended {
                    // Whoever leaves has counted something.
                    for write in &writes {
                        if let MapWrite::BackendCounters(id, Some(GroupId(0))) = write {
                            count(&mut counters, *id, 10);
                        }
                    }
                }
                let before = dump(&control, &counters);
                for (number, write) in writes.iter().enumerate() {
                    let mut store = Refusing {
                        tables: KernelTables {
                            control: &mut control,
                            counters: &mut counters,
                        },
                        left: Some(number),
                    };
                    let error = apply(&mut store, &writes).unwrap_err();
                    assert_eq!(error.what, format!("refused: {write}"), "{what}");
                    let found = dump(&control, &counters);
                    for (found, before) in found.bytes.iter().zip(&before.bytes) {
                        assert_eq!(found, before, "{what}: {write} was refused");
                    }
                    assert!(found == before, "{what}: {write} was refused");
                }
                refused += writes.len();
                let mut tables = KernelTables {
                    control: &mut control,
                    counters: &mut counters,
                };
                apply(&mut tables, &writes).unwrap();
                applied = after;
                assert!(reader::read(&control).unwrap().desired.groups == applied.desired.groups);
            }
        }
        println!("{refused} writes were refused, one at a time");
        assert!(refused > 60, "{refused}");
        // Of the backends that have left, the group is still there.
        assert!(counters.past(GroupId(0)).unwrap().flows_opened >= 10);
    });
}

/// Flows that a backend has opened.
fn count(counters: &mut CounterMaps, id: BackendId, flows_opened: u64) {
    let cpus = aya::util::nr_cpus().unwrap();
    let mut values = vec![AsPod(EventCounters::default()); cpus];
    values[0].0.flows_opened = flows_opened;
    counters
        .backends
        .events
        .set(id.0, PerCpuValues::try_from(values).unwrap(), 0)
        .unwrap();
}
