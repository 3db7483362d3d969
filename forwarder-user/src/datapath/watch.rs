//! Counters of backends, to be read many times a second.
//!
//! The copies per CPU of events cannot be mapped into memory, so each read is a system call. The number of a backend's live flows
//! can, so it costs nothing to know whose counters may have changed: a flow is live until a sweep after its end, and
//! the sweep comes once a second.

use aya::Ebpf;
use forwarder_common::abi::{backend::BackendId, counter::TrafficCounters, map_name};

use super::{
    counters::TrafficMaps,
    memory::LiveMemory,
    view::{again, capacity, data},
};
use crate::error::Error;

/// Handles of its own, so that it can be used on any thread.
pub struct BackendWatch {
    counters: TrafficMaps,
    live: LiveMemory,
}

impl BackendWatch {
    /// Opens the maps of a loaded object once more; call it before they are taken out.
    ///
    /// # Errors
    /// When the object lacks one or it has another type, which is a fault of the build.
    pub fn open(ebpf: &Ebpf) -> Result<Self, Error> {
        let live = data(ebpf, map_name::BACKEND_LIVE)?;
        let backends = capacity(&live)?;
        Ok(Self {
            counters: TrafficMaps::open(
                data(ebpf, map_name::BACKEND_CARRIED)?,
                again(ebpf, map_name::BACKEND_EVENTS)?,
                backends,
                map_name::BACKEND_CARRIED,
            )?,
            live: LiveMemory::map(live, backends, map_name::BACKEND_LIVE)?,
        })
    }

    /// Does the backend have flows, or had it some at the last sweep?
    pub fn is_live(&self, id: BackendId) -> bool {
        self.live.get(id.0) != 0
    }

    /// Sum over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses, which no state of the table explains.
    pub fn counters(&self, id: BackendId) -> Result<TrafficCounters, Error> {
        self.counters.sum(id.0)
    }
}
