//! The maps of captured packets: what is wanted, and what the programs hand over.

use std::os::fd::{AsFd, BorrowedFd};

use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, RingBuf},
};
use forwarder_common::abi::{
    capture::{CaptureFilter, CaptureRoom, CapturedPacket},
    map_name,
};

use super::{maps::Table, object::kernel_error, pod::AsPod, view::again};
use crate::error::Error;

/// The maps of captured packets.
pub struct CaptureMaps {
    filter: Table<CaptureFilter>,
    rooms: PerCpuArray<MapData, AsPod<CaptureRoom>>,
    ring: RingBuf<MapData>,
}

/// What has become of the packets that the filter was true of, on all CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CaptureCounts {
    pub matched: u64,
    /// Found no room on their way here.
    pub lost: u64,
}

impl CaptureMaps {
    /// Takes the ring buffer out of a loaded object and opens the others once more.
    ///
    /// # Errors
    /// When the object lacks one, which is a fault of the build, or the kernel refuses.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let missing = |name: &str| {
            Error::failed(format!("the BPF object has no map {name}")).hint("rebuild the binary")
        };
        let filter = again(ebpf, map_name::CAPTURE_FILTER)?;
        let rooms = again(ebpf, map_name::CAPTURE_ROOM)?;
        let ring = ebpf
            .take_map(map_name::CAPTURED)
            .ok_or_else(|| missing(map_name::CAPTURED))?;
        let ring = RingBuf::try_from(ring).map_err(|error| kernel_error("watch for packets", &error))?;
        Ok(Self { filter, rooms, ring })
    }

    /// Says what is wanted, and forgets what was captured for somebody else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn want(&mut self, filter: CaptureFilter) -> Result<(), Error> {
        while self.ring.next().is_some() {}
        self.filter
            .set(0, AsPod(filter), 0)
            .map_err(|error| kernel_error("write what is to be captured", &error))
    }

    /// The next packet; `None`: there is none now.
    pub fn take(&mut self) -> Option<Box<CapturedPacket>> {
        let item = self.ring.next()?;
        bytemuck::try_pod_read_unaligned(&item).ok().map(Box::new)
    }

    /// Counts since the maps were made.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counts(&self) -> Result<CaptureCounts, Error> {
        let rooms = self
            .rooms
            .get(&0, 0)
            .map_err(|error| kernel_error("read how many packets were captured", &error))?;
        Ok(rooms
            .iter()
            .fold(CaptureCounts::default(), |sum, AsPod(room)| CaptureCounts {
                matched: sum.matched + room.matched,
                lost: sum.lost + room.lost,
            }))
    }
}

/// Readable when there are packets.
impl AsFd for CaptureMaps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
