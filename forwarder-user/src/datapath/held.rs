//! Packets that the data path has handed over, and what it knows of the flows of fragments.

use std::os::fd::{AsFd, BorrowedFd};

use super::{
    maps::Hash,
    memory::FlowMemory,
    object::kernel_error,
    pod::AsPod,
    view::{again, capacity, data},
};
use crate::error::Error;
use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use forwarder_common::abi::{
    flow::{FlowEntry, FlowId},
    fragment::{FragmentFlow, FragmentKey, HeldPacket},
    map_name,
};

/// The maps of fragments.
pub struct HeldMaps {
    ring: RingBuf<MapData>,
    firsts: Hash<FragmentKey, FragmentFlow>,
    flows: FlowMemory,
}

impl HeldMaps {
    /// Takes the ring buffer out of a loaded object and opens the others once more.
    ///
    /// # Errors
    /// When the object lacks one, which is a fault of the build, or the kernel refuses.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let flows = data(ebpf, map_name::FLOWS)?;
        let max_flows = capacity(&flows)?;
        let firsts = again(ebpf, map_name::FRAGMENTS)?;
        let ring = ebpf
            .take_map(map_name::HELD)
            .ok_or_else(|| Error::failed("the BPF object has no map HELD").hint("rebuild the binary"))?;
        let ring = RingBuf::try_from(ring)
            .map_err(|error| kernel_error("watch for packets that are handed over", &error))?;
        Ok(Self {
            ring,
            firsts,
            flows: FlowMemory::map(flows, max_flows)?,
        })
    }

    /// The next packet that was handed over; `None`: there is none now.
    pub fn take(&mut self) -> Option<HeldPacket> {
        let item = self.ring.next()?;
        bytemuck::try_pod_read_unaligned(&item).ok()
    }

    /// The flow of the first fragment, if that has passed.
    pub fn first(&self, key: &FragmentKey) -> Option<FragmentFlow> {
        self.firsts.get(&AsPod(*key), 0).ok().map(|AsPod(flow)| flow)
    }

    /// A flow as it is now; `None`: there is none of that number.
    pub fn flow(&self, id: FlowId) -> Option<FlowEntry> {
        (id.0 < self.flows.capacity()).then(|| self.flows.read(id))
    }
}

/// Readable when there are packets.
impl AsFd for HeldMaps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
