//! The sweep: which flows are in use, which have ended, and giving back what they held.
//!
//! The data path keeps no clock; it marks a flow as seen. Once a second the sweep takes the marks, so it knows
//! to the second when a flow was last used, and unlinks flows that were idle for longer than their phase
//! allows. An entry is freed in two steps: its keys leave the flow index in one sweep, its number goes back to
//! the free list in a later one, when no packet that was under way can be using it.

use std::{collections::HashMap, time::Duration};

use forwarder_common::{
    abi::{
        backend::BackendId,
        flow::{Direction, FlowEntry, FlowId, FlowReference, FlowState},
        listener::ListenerId,
    },
    datapath::tcp_state::Phase,
    wire::ipv4::PROTOCOL_TCP,
};

use super::{maps::FlowMaps, object::kernel_error, pod::AsPod};
use crate::error::Error;

/// Flows of a listener or backend at the time of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// An established TCP connection, or another flow that carried a packet since the sweep before.
    pub active: u64,
    /// All others: half open, closing, closed, idle UDP.
    pub inactive: u64,
}

/// What a sweep has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub listeners: HashMap<ListenerId, FlowCount>,
    pub backends: HashMap<BackendId, FlowCount>,
    /// Entries that are not free.
    pub used: u64,
}

/// Sweeps a flow table.
pub struct Sweeper {
    maps: FlowMaps,
    /// Per entry: when a packet was last seen, in seconds since the first sweep.
    last_seen_secs: Vec<u32>,
}

impl Sweeper {
    /// Takes charge of an empty flow table: puts all entries on the free list.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(mut maps: FlowMaps) -> Result<Self, Error> {
        let capacity = maps.memory.capacity();
        for id in 0..capacity {
            maps.free
                .push(AsPod(FlowId(id)), 0)
                .map_err(|error| kernel_error("fill the list of free flows", &error))?;
        }
        Ok(Self {
            maps,
            last_seen_secs: vec![0; capacity as usize],
        })
    }

    /// Looks at every entry once. `now`: time since the first sweep.
    ///
    /// # Errors
    /// When the kernel refuses to give an entry back to the free list.
    pub fn sweep(&mut self, now: Duration) -> Result<Census, Error> {
        let now_secs = now.as_secs() as u32;
        let mut census = Census::default();
        for number in 0..self.maps.memory.capacity() {
            let id = FlowId(number);
            let state = self.maps.memory.state(id);
            if state == FlowState::FREE {
                continue;
            }
            census.used += 1;
            let was_seen = self.maps.memory.take_seen(id);
            let last_seen_secs = &mut self.last_seen_secs[number as usize];
            if was_seen {
                *last_seen_secs = now_secs;
            }
            let idle = Duration::from_secs(u64::from(now_secs.saturating_sub(*last_seen_secs)));
            if state == FlowState::UNLINKED {
                // Its connection has ended, so what held its keys back holds the number back as well.
                if idle >= Phase::Closed.timeout(Duration::ZERO) {
                    self.free(id)?;
                }
                continue;
            }
            let entry = self.maps.memory.read(id);
            if idle >= timeout(&entry) {
                self.unlink(id, &entry);
            } else {
                let is_active = if is_tcp(&entry) {
                    entry.tcp.phase() == Phase::Established
                } else {
                    was_seen
                };
                for count in [
                    census.listeners.entry(entry.listener).or_default(),
                    census.backends.entry(entry.backend).or_default(),
                ] {
                    if is_active {
                        count.active += 1;
                    } else {
                        count.inactive += 1;
                    }
                }
            }
        }
        Ok(census)
    }

    /// Takes the keys of a flow out of the index, unless a packet comes at the same moment.
    fn unlink(&mut self, id: FlowId, entry: &FlowEntry) {
        let request_key = AsPod(entry.binding.request_key());
        // Not there: the data path unlinked it itself. Anything else shows as a key that stays.
        let _ = self.maps.index.remove(&request_key);
        if self.maps.memory.is_seen(id) {
            let reference = AsPod(FlowReference {
                id,
                direction: Direction::REQUEST,
            });
            let _ = self.maps.index.insert(request_key, reference, NO_EXIST);
            return;
        }
        if entry.binding.is_dnat() {
            let _ = self.maps.index.remove(&AsPod(entry.binding.reply_key()));
        }
        self.maps.memory.set_state(id, FlowState::UNLINKED);
    }

    fn free(&mut self, id: FlowId) -> Result<(), Error> {
        self.maps.memory.set_state(id, FlowState::FREE);
        self.maps
            .free
            .push(AsPod(id), 0)
            .map_err(|error| kernel_error("free a flow", &error))
    }
}

/// BPF_NOEXIST (linux/bpf.h): insert only.
const NO_EXIST: u64 = 1;

fn is_tcp(entry: &FlowEntry) -> bool {
    entry.binding.protocol == u32::from(PROTOCOL_TCP)
}

/// How long a flow may be idle.
fn timeout(entry: &FlowEntry) -> Duration {
    let idle = Duration::from_secs(u64::from(entry.idle_timeout_secs));
    if is_tcp(entry) {
        entry.tcp.phase().timeout(idle)
    } else {
        idle
    }
}
