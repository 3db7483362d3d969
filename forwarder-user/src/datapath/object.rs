//! The BPF object: embedded in the binary, sized for a configuration, loaded on new maps or on pinned ones.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData, MapInfo},
    programs::{ProgramError, SchedClassifier, Xdp},
};
use forwarder_common::{
    abi::{ABI_VERSION, map_name, settings::Settings},
    datapath::hint,
};
use nix::errno::Errno;

use super::{pin::PinDirectory, pod::AsPod};
use crate::{
    error::Error,
    privileges::{self, CapabilitySet, Gates},
};

/// What the build script made of `forwarder-ebpf`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder-ebpf"));

/// How many entries the tables have; fixed from load to unload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub flows: u32,
    /// Keys in the flow index: one per full-NAT flow, two per DNAT flow.
    pub flow_keys: u32,
    /// The same of IPv6.
    pub flow_keys_v6: u32,
    pub slots: u32,
    pub groups: u32,
    pub backends: u32,
    pub listeners: u32,
    /// Prefixes that the listeners' ranges of ports consist of.
    pub listener_ranges: u32,
    /// Prefixes of clients, of all listeners that admit only some.
    pub sources: u32,
    pub vips: u32,
    pub interfaces: u32,
    /// Far ends of tunnels that the programs handle, and as many ways in and next hops.
    pub tunnel_peers: u32,
    /// Clients whose backend is kept, of all groups with persistence.
    pub persistence: u32,
    /// Prefixes of clients whose rate is known, of all listeners with `source_rate`.
    pub source_rates: u32,
}

impl Sizes {
    /// Each size with the maps that have it.
    fn maps(&mut self) -> [(&mut u32, &'static [&'static str]); 14] {
        [
            (
                &mut self.flows,
                &[map_name::FLOWS, map_name::FREE_FLOWS, map_name::HANDSHAKES],
            ),
            (&mut self.flow_keys, &[map_name::FLOW_INDEX]),
            (&mut self.flow_keys_v6, &[map_name::FLOW_INDEX_V6]),
            (&mut self.slots, &[map_name::SLOTS]),
            (&mut self.groups, &[map_name::GROUPS, map_name::GROUP_TURNS]),
            (
                &mut self.backends,
                &[
                    map_name::BACKENDS,
                    map_name::BACKEND_CARRIED,
                    map_name::BACKEND_EVENTS,
                    map_name::BACKEND_HOPS,
                    map_name::BACKEND_LIVE,
                ],
            ),
            (
                &mut self.listeners,
                &[
                    map_name::LISTENERS,
                    map_name::LISTENER_CARRIED,
                    map_name::LISTENER_EVENTS,
                    map_name::LISTENER_LIVE,
                    map_name::SYN_BUDGETS,
                ],
            ),
            (&mut self.listener_ranges, &[map_name::LISTENER_RANGES]),
            (&mut self.sources, &[map_name::SOURCES]),
            (&mut self.vips, &[map_name::VIPS]),
            (&mut self.interfaces, &[map_name::INTERFACES]),
            (
                &mut self.tunnel_peers,
                &[
                    map_name::TUNNEL_PEERS,
                    map_name::TUNNEL_HOPS,
                    map_name::TUNNEL_ENDPOINTS,
                ],
            ),
            (&mut self.persistence, &[map_name::PERSISTENCE]),
            (&mut self.source_rates, &[map_name::SOURCE_RATES]),
        ]
    }

    /// With room for configurations to come, so that a change of the configuration needs no new maps.
    #[must_use]
    pub fn with_room(mut self) -> Self {
        for (size, at_least) in [
            (&mut self.groups, 1024),
            (&mut self.backends, 4096),
            (&mut self.listeners, 1024),
            // Tries take memory for what is in them.
            (&mut self.listener_ranges, 8192),
            (&mut self.sources, 131_072),
            (&mut self.vips, 1024),
            (&mut self.interfaces, 64),
            (&mut self.tunnel_peers, 4096),
        ] {
            *size = size.saturating_mul(2).max(at_least);
        }
        self
    }

    /// Number of entries by name of the map; see [`copies`].
    pub fn entries(mut self) -> Vec<(&'static str, u32)> {
        let hints = hint::buckets(self.flows);
        self.maps()
            .into_iter()
            .flat_map(|(size, maps)| maps.iter().map(move |map| (*map, *size)))
            .chain([(map_name::FLOW_HINTS, hints)])
            .collect()
    }
}

/// How often a map has each of its entries: where every CPU has its own without the kernel knowing of it.
pub fn copies(name: &str, cpus: u32) -> u32 {
    if [map_name::LISTENER_CARRIED, map_name::BACKEND_CARRIED].contains(&name) {
        cpus
    } else {
        1
    }
}

/// A map as the programs of this binary need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapLayout {
    pub name: String,
    /// `enum bpf_map_type` of the kernel.
    pub kind: u32,
    pub key_bytes: u32,
    pub value_bytes: u32,
    pub flags: u32,
    /// Entries unless [`Sizes`] says otherwise.
    pub entries: u32,
}

/// Scratch memory and messages of the programs: each load has its own.
fn is_shared(name: &str) -> bool {
    !(name == "SCRATCH" || name.starts_with("AYA_LOG") || name.starts_with('.'))
}

/// The maps of this binary's object that one agent leaves to the next, by name.
///
/// # Errors
/// The object cannot be read, which is a fault of the build.
pub fn layout() -> Result<Vec<MapLayout>, Error> {
    let object = aya_obj::Object::parse(OBJECT)
        .map_err(|error| Error::failed(format!("the BPF object cannot be read: {error}")))?;
    let mut maps: Vec<_> = object
        .maps
        .iter()
        .filter(|(name, _)| is_shared(name))
        .map(|(name, map)| MapLayout {
            name: name.clone(),
            kind: map.map_type(),
            key_bytes: map.key_size(),
            value_bytes: map.value_size(),
            flags: map.map_flags(),
            entries: map.max_entries(),
        })
        .collect();
    maps.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(maps)
}

/// CPUs that per-CPU maps have values for.
///
/// # Errors
/// The kernel does not say.
pub fn possible_cpus() -> Result<u32, Error> {
    aya::util::nr_cpus()
        .map(|cpus| cpus as u32)
        .map_err(|(path, error)| Error::host(format!("cannot count the CPUs: {path}: {error}")))
}

/// Checks that the pinned maps are what this binary needs for tables of at least the sizes `needed`, and returns the
/// sizes they have; what is not pinned gets room to grow.
///
/// # Errors
/// Their layout is another one: all differences, and the way out.
pub fn adopt(pins: &PinDirectory, needed: &Sizes) -> Result<Sizes, Error> {
    let mut sizes = needed.with_room();
    let cpus = possible_cpus()?;
    let needed = needed.entries();
    let mut differences = Vec::new();
    for map in layout()? {
        if !pins.has_map(&map.name) {
            continue;
        }
        let info = MapInfo::from_pin(pins.map(&map.name))
            .map_err(|error| refused(&format!("open the pinned map {}", map.name), &error))?;
        let kind = info.map_type().map_or(0, |kind| kind as u32);
        let found = (kind, info.key_size(), info.value_size(), info.map_flags());
        if found != (map.kind, map.key_bytes, map.value_bytes, map.flags) {
            differences.push(format!(
                "{}: keys of {} and values of {} bytes, this version needs {} and {}",
                map.name,
                info.key_size(),
                info.value_size(),
                map.key_bytes,
                map.value_bytes
            ));
            continue;
        }
        let has = info.max_entries() / copies(&map.name, cpus);
        let size = sizes
            .maps()
            .into_iter()
            .find(|(_, maps)| maps.contains(&map.name.as_str()))
            .map(|(size, _)| size);
        let wanted = needed
            .iter()
            .find(|(name, _)| *name == map.name)
            .map_or(map.entries, |(_, entries)| *entries);
        let is_enough = match size {
            Some(size) => {
                *size = has;
                // A flow's number is its binding, and the free list holds all of them.
                has == wanted || (has > wanted && map.name != map_name::FLOWS)
            }
            None => has == wanted,
        };
        if !is_enough {
            let setting = match map.name.as_str() {
                map_name::FLOWS => " (agent.max_flows)",
                map_name::SLOTS => " (agent.max_slots)",
                map_name::PERSISTENCE => " (agent.max_persistent_clients)",
                map_name::FLOW_INDEX => " (agent.max_flows, twice that with a group in DNAT mode)",
                _ => "",
            };
            differences.push(format!(
                "{}: {has} entries, {wanted} are needed{setting}",
                map.name
            ));
        }
    }
    let version = abi_version(pins)?;
    if version.is_some_and(|version| version != ABI_VERSION) {
        differences.insert(
            0,
            format!(
                "ABI version {}, this binary has {ABI_VERSION}",
                version.unwrap_or_default()
            ),
        );
    }
    if differences.is_empty() {
        return Ok(sizes);
    }
    Err(Error::host(format!(
        "the tables pinned in {} have another layout, so they cannot be taken over:\n  {}",
        pins.path().display(),
        differences.join("\n  ")
    ))
    .hint(format!(
        "either undo that change, or remove them with `forwarder detach --pin-directory {}`: traffic stops and flows \
         end; then start the agent anew",
        pins.path().display()
    )))
}

/// The version in the pinned settings; `None`: nothing was written to them yet.
fn abi_version(pins: &PinDirectory) -> Result<Option<u32>, Error> {
    if !pins.has_map(map_name::SETTINGS) {
        return Ok(None);
    }
    let map = MapData::from_pin(pins.map(map_name::SETTINGS))
        .map_err(|error| refused("open the pinned settings", &error))?;
    if map.info().map_or(0, |info| info.value_size()) as usize != size_of::<Settings>() {
        // Said already, among the differences.
        return Ok(None);
    }
    let settings: Array<_, AsPod<Settings>> = aya::maps::Map::Array(map)
        .try_into()
        .map_err(|error: aya::maps::MapError| refused("open the pinned settings", &error))?;
    match settings.get(&0, 0) {
        Ok(AsPod(settings)) => Ok(Some(settings.abi_version).filter(|version| *version != 0)),
        Err(error) => Err(refused("read the pinned settings", &error)),
    }
}

/// Loads programs and new maps; nothing is attached yet.
///
/// # Errors
/// When the kernel refuses: with its own words, and what to do about the usual causes.
pub fn load(sizes: &Sizes) -> Result<Ebpf, Error> {
    let constants = Constants::of(sizes)?;
    finish(&mut loader(sizes, &constants))
}

/// As [`load`], on pinned maps; maps that are not there yet are made and pinned. `free_list` is the path of a list
/// that is to be made.
///
/// # Errors
/// As for [`load`].
pub fn load_pinned(sizes: &Sizes, pins: &PinDirectory, free_list: &Path) -> Result<Ebpf, Error> {
    let maps = layout()?;
    let constants = Constants::of(sizes)?;
    let mut loader = loader(sizes, &constants);
    for map in &maps {
        let path = if map.name == map_name::FREE_FLOWS {
            free_list.to_owned()
        } else {
            pins.map(&map.name)
        };
        loader.map_pin_path(&map.name, path);
    }
    finish(&mut loader)
}

/// What the programs know when they are loaded.
struct Constants {
    cpus: u32,
    last_hints: u32,
    listeners: u32,
    backends: u32,
}

impl Constants {
    fn of(sizes: &Sizes) -> Result<Self, Error> {
        Ok(Self {
            cpus: possible_cpus()?,
            last_hints: hint::buckets(sizes.flows) - 1,
            listeners: sizes.listeners,
            backends: sizes.backends,
        })
    }
}

fn loader<'a>(sizes: &Sizes, constants: &'a Constants) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader
        .override_global(map_name::LAST_HINTS, &constants.last_hints, true)
        .override_global(map_name::LISTENERS_PER_CPU, &constants.listeners, true)
        .override_global(map_name::BACKENDS_PER_CPU, &constants.backends, true);
    for (name, entries) in sizes.entries() {
        loader.map_max_entries(name, entries.saturating_mul(copies(name, constants.cpus)));
    }
    loader
}

fn finish(loader: &mut EbpfLoader<'_>) -> Result<Ebpf, Error> {
    let mut ebpf = loader
        .load(OBJECT)
        .map_err(|error| refused("create the maps", &error))?;
    for name in [
        map_name::PROGRAM_XDP,
        map_name::PROGRAM_XDP_GENERIC,
        map_name::PROGRAM_ASK,
    ] {
        let program: &mut Xdp = program(&mut ebpf, name)?;
        program.load().map_err(|error| refused_program(name, &error))?;
    }
    let tunnel: &mut SchedClassifier = program(&mut ebpf, map_name::PROGRAM_TUNNEL)?;
    tunnel
        .load()
        .map_err(|error| refused_program(map_name::PROGRAM_TUNNEL, &error))?;
    Ok(ebpf)
}

/// A program of the object by name and type.
///
/// # Errors
/// When this build's object lacks it, which is a fault of the build.
pub fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program>,
{
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or_else(|| {
            Error::failed(format!("the BPF object has no program \"{name}\"")).hint("rebuild the binary")
        })
}

fn refused_program(name: &str, error: &ProgramError) -> Error {
    refused(&format!("load the program \"{name}\""), error)
}

/// An error with all its causes on one line each, and a hint for the ones users meet.
fn refused(what: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    let mut text = format!("the kernel refused to {what}");
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut errno = None;
    while let Some(error) = cause {
        text.push_str(&format!("\n  {error}"));
        errno = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error)
            .or(errno);
        cause = error.source();
    }
    let needed = privileges::KEPT - CapabilitySet::NET_RAW;
    let hint = match errno.map(Errno::from_raw) {
        Some(Errno::EPERM) => return privileges::refused(text, needed),
        // The verifier refuses a program so, too, and says why above.
        Some(Errno::EACCES) if Gates::look().hint(needed).is_some() => {
            return privileges::refused(text, needed);
        }
        Some(Errno::ENOMEM) => "lower agent.max_flows or agent.max_slots, or add memory",
        _ => "see docs/troubleshooting.md, \"The kernel refuses the program\"",
    };
    Error::host(text).hint(hint)
}

/// An error of the kernel about an operation on a loaded object.
pub fn kernel_error(what: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    refused(what, error)
}

#[cfg(test)]
mod tests {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget};

    use super::OBJECT;

    /// In BPF they are functions that go byte by byte; the walk copies its structs word by word.
    #[test]
    fn the_programs_call_no_memory_functions() {
        let object = object::File::parse(OBJECT).expect("an ELF file");
        let called: Vec<_> = object
            .sections()
            .flat_map(|section| section.relocations())
            .filter_map(|(_, relocation)| match relocation.target() {
                RelocationTarget::Symbol(symbol) => object.symbol_by_index(symbol).ok()?.name().ok(),
                _ => None,
            })
            .collect();
        assert!(called.contains(&"forwarder_open"), "calls are seen: {called:?}");
        let copies: Vec<_> = called.iter().filter(|name| name.starts_with("mem")).collect();
        assert!(copies.is_empty(), "{copies:?}; `llvm-objdump -dr` shows where");
    }
}
