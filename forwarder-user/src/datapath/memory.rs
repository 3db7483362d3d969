//! Map memory in the agent's address space.
//!
//! The flow table and the slot table are arrays with `BPF_F_MMAPABLE`: sweeping a million flows or writing
//! 65 537 slots takes milliseconds here, where system calls would take a second. Programs write the same memory at the
//! same time, so everything is read and written through atomics of the fields' own sizes.

use std::{
    mem::{offset_of, size_of},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use aya::maps::MapData;
use forwarder_common::abi::{
    backend::BackendId,
    counter::CarriedCounters,
    flow::{FlowEntry, FlowId, FlowState},
};
use memmap2::{MmapOptions, MmapRaw};

use crate::error::Error;

/// An array map's values, one behind the other.
struct Memory {
    map: MmapRaw,
    /// Keeps the map alive; the mapping alone would, too, but the handle is of use.
    _data: MapData,
}

impl Memory {
    fn map(data: MapData, len_bytes: usize, name: &str) -> Result<Self, Error> {
        let fd = data.fd().as_fd().as_raw_fd();
        match MmapOptions::new().len(len_bytes).map_raw(fd) {
            Ok(map) => Ok(Self { map, _data: data }),
            Err(error) => Err(Error::host(format!(
                "the map {name} cannot be mapped into memory: {error}"
            ))),
        }
    }

    /// A pointer into the mapping, to `size` bytes at a multiple of `size`.
    fn pointer(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset + size <= self.map.len() && offset.is_multiple_of(size));
        // SAFETY: inside the mapping.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { AtomicU8::from_ptr(self.pointer(offset, 1)) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as for `byte`; the mapping starts on a page, so 4 divides the address.
        unsafe { AtomicU32::from_ptr(self.pointer(offset, 4).cast()) }
    }

    fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as for `word`, with 8.
        unsafe { AtomicU64::from_ptr(self.pointer(offset, 8).cast()) }
    }
}

/// The flow table.
pub struct FlowMemory {
    memory: Memory,
    capacity: u32,
}

const ENTRY: usize = stride(size_of::<FlowEntry>());

impl FlowMemory {
    /// Maps a flow table of `capacity` entries.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map(data: MapData, capacity: u32) -> Result<Self, Error> {
        Ok(Self {
            memory: Memory::map(data, capacity as usize * ENTRY, "FLOWS")?,
            capacity,
        })
    }

    /// Number of entries.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    fn offset(id: FlowId) -> usize {
        id.0 as usize * ENTRY
    }

    /// What an entry is.
    pub fn state(&self, id: FlowId) -> FlowState {
        FlowState(
            self.memory
                .byte(Self::offset(id) + offset_of!(FlowEntry, state))
                .load(Relaxed),
        )
    }

    /// Changes what an entry is.
    pub fn set_state(&self, id: FlowId, state: FlowState) {
        self.memory
            .byte(Self::offset(id) + offset_of!(FlowEntry, state))
            .store(state.0, Relaxed);
    }

    /// Has a packet come since this was asked last? Clears the mark.
    pub fn take_seen(&self, id: FlowId) -> bool {
        let seen = self.memory.byte(Self::offset(id) + offset_of!(FlowEntry, seen));
        // No exchange: the store is skipped where nothing came, and a mark that is set in between is only lost
        // together with the packet's own effect on a clock of one sweep.
        seen.load(Relaxed) != 0 && {
            seen.store(0, Relaxed);
            true
        }
    }

    /// Has a packet come since the mark was cleared?
    pub fn is_seen(&self, id: FlowId) -> bool {
        self.memory
            .byte(Self::offset(id) + offset_of!(FlowEntry, seen))
            .load(Relaxed)
            != 0
    }

    /// Does the flow count against limits? It no longer does afterwards.
    pub fn take_counted(&self, id: FlowId) -> bool {
        self.memory
            .byte(Self::offset(id) + offset_of!(FlowEntry, counted))
            .swap(0, Relaxed)
            != 0
    }

    /// A copy of an entry, field by field: each is whole, together they may be of different packets.
    pub fn read(&self, id: FlowId) -> FlowEntry {
        let mut words = [0u64; ENTRY / 8];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.memory.long(Self::offset(id) + index * 8).load(Relaxed);
        }
        bytemuck::cast(words)
    }
}

/// Distance of two elements in an array map's memory: the kernel rounds their size up to 8 (array_map_alloc).
const fn stride(size: usize) -> usize {
    size.next_multiple_of(8)
}

const SLOT: usize = stride(size_of::<BackendId>());

/// The slot table.
pub struct SlotMemory {
    memory: Memory,
}

impl SlotMemory {
    /// Maps a slot table of `slots` slots.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map(data: MapData, slots: u32) -> Result<Self, Error> {
        Ok(Self {
            memory: Memory::map(data, slots as usize * SLOT, "SLOTS")?,
        })
    }

    /// A copy of `count` slots from index `first` on.
    pub fn read(&self, first: u32, count: u32) -> Vec<BackendId> {
        (first..first.saturating_add(count))
            .map(|index| BackendId(self.memory.word(index as usize * SLOT).load(Relaxed)))
            .collect()
    }

    /// Number of slots.
    pub fn capacity(&self) -> u32 {
        (self.memory.map.len() / SLOT) as u32
    }

    /// Writes slots from index `first` on.
    pub fn write(&self, first: u32, slots: &[BackendId]) {
        for (index, slot) in slots.iter().enumerate() {
            self.memory
                .word((first as usize + index) * SLOT)
                .store(slot.0, Relaxed);
        }
    }
}

/// Numbers of live flows, by listener or by backend.
pub struct LiveMemory {
    memory: Memory,
}

impl LiveMemory {
    /// Maps an array of `len` numbers.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map(data: MapData, len: u32, name: &str) -> Result<Self, Error> {
        Ok(Self {
            memory: Memory::map(data, len as usize * size_of::<u64>(), name)?,
        })
    }

    /// The number at an index.
    pub fn get(&self, index: u32) -> u64 {
        self.memory.long(index as usize * size_of::<u64>()).load(Relaxed)
    }

    /// Counts one flow out.
    pub fn leave(&self, index: u32) {
        self.memory
            .long(index as usize * size_of::<u64>())
            .fetch_sub(1, Relaxed);
    }
}

/// What packets are counted in, by listener or by backend: an entry for each of them, of each CPU.
pub struct CarriedMemory {
    memory: Memory,
    ids: u32,
    cpus: u32,
}

const CARRIED: usize = stride(size_of::<CarriedCounters>());

impl CarriedMemory {
    /// Maps the counters of `ids` listeners or backends.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map(data: MapData, ids: u32, cpus: u32, name: &str) -> Result<Self, Error> {
        let len = ids as usize * cpus as usize * CARRIED;
        Ok(Self {
            memory: Memory::map(data, len, name)?,
            ids,
            cpus,
        })
    }

    /// Where each CPU's copy begins.
    fn copies(&self, id: u32) -> impl Iterator<Item = usize> + use<> {
        let ids = self.ids as usize;
        (0..self.cpus as usize).map(move |cpu| (cpu * ids + id as usize) * CARRIED)
    }

    /// Sum over all CPUs.
    pub fn sum(&self, id: u32) -> CarriedCounters {
        let mut sum = [0_u64; CARRIED / 8];
        for offset in self.copies(id) {
            for (number, word) in sum.iter_mut().enumerate() {
                *word = word.wrapping_add(self.memory.long(offset + number * 8).load(Relaxed));
            }
        }
        bytemuck::cast(sum)
    }

    /// Takes them back to zero. What a packet counts meanwhile may be lost, or be there still.
    pub fn clear(&self, id: u32) {
        for offset in self.copies(id) {
            for number in 0..CARRIED / 8 {
                self.memory.long(offset + number * 8).store(0, Relaxed);
            }
        }
    }
}
