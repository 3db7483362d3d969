//! The BPF object: embedded in the binary, sized for a configuration, loaded.

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    programs::{ProgramError, SchedClassifier, Xdp},
};
use forwarder_common::abi::map_name;

use crate::error::Error;

/// What the build script made of `forwarder-ebpf`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder-ebpf"));

/// How many entries the tables have; fixed from load to unload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub flows: u32,
    /// Keys in the flow index: one per full-NAT flow, two per DNAT flow.
    pub flow_keys: u32,
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
}

/// Loads maps and programs; nothing is attached yet.
///
/// # Errors
/// When the kernel refuses: with its own words, and what to do about the usual causes.
pub fn load(sizes: &Sizes) -> Result<Ebpf, Error> {
    let mut ebpf = EbpfLoader::new()
        .map_max_entries(map_name::FLOWS, sizes.flows)
        .map_max_entries(map_name::FREE_FLOWS, sizes.flows)
        .map_max_entries(map_name::FLOW_INDEX, sizes.flow_keys)
        .map_max_entries(map_name::SLOTS, sizes.slots)
        .map_max_entries(map_name::GROUPS, sizes.groups)
        .map_max_entries(map_name::BACKENDS, sizes.backends)
        .map_max_entries(map_name::BACKEND_COUNTERS, sizes.backends)
        .map_max_entries(map_name::BACKEND_LIVE, sizes.backends)
        .map_max_entries(map_name::LISTENERS, sizes.listeners)
        .map_max_entries(map_name::LISTENER_COUNTERS, sizes.listeners)
        .map_max_entries(map_name::LISTENER_LIVE, sizes.listeners)
        .map_max_entries(map_name::LISTENER_RANGES, sizes.listener_ranges)
        .map_max_entries(map_name::SOURCES, sizes.sources)
        .map_max_entries(map_name::VIPS, sizes.vips)
        .map_max_entries(map_name::INTERFACES, sizes.interfaces)
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
    let hint = match errno.map(nix::errno::Errno::from_raw) {
        Some(nix::errno::Errno::EPERM | nix::errno::Errno::EACCES) => {
            "run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        }
        Some(nix::errno::Errno::ENOMEM) => "lower agent.max_flows or agent.max_slots, or add memory",
        _ => "see docs/troubleshooting.md, \"The kernel refuses the program\"",
    };
    Error::host(text).hint(hint)
}

/// An error of the kernel about an operation on a loaded object.
pub fn kernel_error(what: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    refused(what, error)
}
