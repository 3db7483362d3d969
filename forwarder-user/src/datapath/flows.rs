//! The sweep: which flows are in use, which have ended, and giving back what they held.
//!
//! The data path keeps no clock; it marks a flow as seen. Once a second the sweep takes the marks, so it knows
//! to the second when a flow was last used, and unlinks flows that were idle for longer than their phase
//! allows. An entry is freed in two steps: its keys leave the flow index in one sweep, its number goes back to
//! the free list in a later one, when no packet that was under way can be using it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use forwarder_common::{
    abi::{
        backend::BackendId,
        flow::{Direction, FlowBinding, FlowEntry, FlowId, FlowKey, FlowReference, FlowState, TcpEvents},
        listener::ListenerId,
    },
    datapath::tcp_state::{CLOSED_TIMEOUT, Phase, has_connections},
};

use super::{maps::FlowMaps, object::kernel_error, pod::AsPod, times::FlowTimes};
use crate::{error::Error, reset::is_unanswered};

/// Flows of a listener or backend at the time of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// An established connection, or another flow that carried a packet since the sweep before.
    pub active: u64,
    /// All others: half open, closing, closed, idle UDP or ICMP.
    pub inactive: u64,
    /// Of the inactive ones: connections that have ended and are only held back.
    pub closed: u64,
}

impl FlowCount {
    /// Flows that may still carry packets.
    pub fn open(&self) -> u64 {
        (self.active + self.inactive).saturating_sub(self.closed)
    }
}

/// Why flows end before their time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndCause {
    /// Their backend has drained for as long as it may: all of them.
    Drain,
    /// Their backend has failed and its group says `reset`: all of them.
    Reset,
    /// Their backend has failed and its group says `rehash`: those that another one can serve, which are UDP, ICMP and
    /// connections whose handshake has had no answer.
    Rehash,
}

impl EndCause {
    fn concerns(self, entry: &FlowEntry) -> bool {
        if !is_connection(entry) {
            return true;
        }
        match self {
            // What has ended needs no end.
            Self::Drain | Self::Reset => entry.tcp.phase() != Phase::Closed,
            Self::Rehash => entry.tcp.phase() == Phase::HalfOpen && !entry.tcp.has(TcpEvents::ANSWERED),
        }
    }
}

/// What a sweep has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub listeners: HashMap<ListenerId, FlowCount>,
    pub backends: HashMap<BackendId, FlowCount>,
    /// Entries that are not free.
    pub used: u64,
    /// Idle connections that both ends were told to give up, in this sweep.
    pub ended_idle: Vec<FlowEntry>,
    /// Connections that a SYN cookie opened, whose clients are to be asked once more for what becomes the SYN to the
    /// backend: none has answered for 1, 3, 7, 15… seconds, as TCP repeats a SYN (RFC 6298 §5.5).
    pub unanswered: Vec<FlowEntry>,
    /// Sweeps before this one.
    pub number: u64,
}

/// How long the flows of a listener may be without packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// An established connection, and what has none.
    pub idle: Duration,
    /// One side of a connection has ended.
    pub closing: Duration,
    /// The handshake of a connection is not complete.
    pub half_open: Duration,
    /// Are both ends of an idle connection to be told?
    pub reset_on_idle: bool,
}

/// What a sweep works on: the live maps, or a test's tables.
pub trait FlowStore {
    fn capacity(&self) -> u32;
    fn state(&self, id: FlowId) -> FlowState;
    fn set_state(&mut self, id: FlowId, state: FlowState);
    /// Has a packet come since this was asked last? Clears the mark.
    fn take_seen(&mut self, id: FlowId) -> bool;
    fn is_seen(&self, id: FlowId) -> bool;
    /// Does the flow count against limits? It no longer does afterwards.
    fn take_counted(&mut self, id: FlowId) -> bool;
    fn read(&self, id: FlowId) -> FlowEntry;
    fn insert_key(&mut self, key: &FlowKey, reference: FlowReference);
    /// Takes a key out of the index if it leads to this flow. Where an agent was killed between two steps, it may be
    /// gone and belong to another one by now.
    fn remove_key(&mut self, key: &FlowKey, id: FlowId);
    /// Counts a flow out.
    fn leave(&mut self, listener: ListenerId, backend: BackendId);
    /// Puts a flow at the end of the free list.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn give_back(&mut self, id: FlowId) -> Result<(), Error>;
}

impl FlowStore for FlowMaps {
    fn capacity(&self) -> u32 {
        self.memory.capacity()
    }

    fn state(&self, id: FlowId) -> FlowState {
        self.memory.state(id)
    }

    fn set_state(&mut self, id: FlowId, state: FlowState) {
        self.memory.set_state(id, state);
    }

    fn take_seen(&mut self, id: FlowId) -> bool {
        self.memory.take_seen(id)
    }

    fn is_seen(&self, id: FlowId) -> bool {
        self.memory.is_seen(id)
    }

    fn take_counted(&mut self, id: FlowId) -> bool {
        self.memory.take_counted(id)
    }

    fn read(&self, id: FlowId) -> FlowEntry {
        self.memory.read(id)
    }

    fn insert_key(&mut self, key: &FlowKey, reference: FlowReference) {
        // A key that is there already belongs to a newer flow.
        let _ = self.index.insert(key, reference, NO_EXIST);
    }

    fn remove_key(&mut self, key: &FlowKey, id: FlowId) {
        if self.index.get(key).is_ok_and(|AsPod(found)| found.id == id) {
            // Not there any more: the data path unlinked it itself. Anything else shows as a key that stays.
            let _ = self.index.remove(key);
        }
    }

    fn leave(&mut self, listener: ListenerId, backend: BackendId) {
        self.listeners_live.leave(listener.0);
        self.backends_live.leave(backend.0);
    }

    fn give_back(&mut self, id: FlowId) -> Result<(), Error> {
        self.free
            .push(AsPod(id), 0)
            .map_err(|error| kernel_error("free a flow", &error))
    }
}

/// Sweeps a flow table.
pub struct Sweeper<S = FlowMaps> {
    store: S,
    times: Arc<FlowTimes>,
    sweeps: u64,
}

impl<S: FlowStore> Sweeper<S> {
    /// Takes charge of an empty flow table: puts all entries on the free list.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(mut store: S) -> Result<Self, Error> {
        for id in 0..store.capacity() {
            store.give_back(FlowId(id))?;
        }
        Ok(Self::resume(store))
    }

    /// Takes charge of a flow table in use, whose free list is complete (`free_list`). Its flows count as seen just
    /// now.
    pub fn resume(store: S) -> Self {
        let times = Arc::new(FlowTimes::new(store.capacity()));
        Self {
            store,
            times,
            sweeps: 0,
        }
    }

    /// When flows were opened and used, for others to read.
    pub fn times(&self) -> Arc<FlowTimes> {
        self.times.clone()
    }

    /// Removes a flow whether or not it is in use, unless another has its place by now; `true`: it did. The number is
    /// held back from now on, as the connection's ends may not know yet.
    pub fn delete(&mut self, id: FlowId, binding: &FlowBinding) -> bool {
        let entry = self.store.read(id);
        if entry.state != FlowState::LIVE || entry.binding != *binding {
            return false;
        }
        // First, so that a packet under way finds no live flow, whichever key it came by.
        self.store.set_state(id, FlowState::UNLINKED);
        self.store.remove_key(&binding.request_key(), id);
        if binding.is_dnat() {
            self.store.remove_key(&binding.reply_key(), id);
        }
        self.leave(id, &entry);
        self.times.found_used(id, true);
        true
    }

    /// Ends the flows on these backends that the cause concerns; returns what they were like then.
    pub fn end(&mut self, backends: &HashSet<BackendId>, cause: EndCause) -> Vec<FlowEntry> {
        let mut ended = Vec::new();
        for number in 0..self.store.capacity() {
            let id = FlowId(number);
            if self.store.state(id) != FlowState::LIVE {
                continue;
            }
            let entry = self.store.read(id);
            if backends.contains(&entry.backend) && cause.concerns(&entry) && self.delete(id, &entry.binding)
            {
                // Again: what its ends expect is as new as can be.
                ended.push(self.store.read(id));
            }
        }
        ended
    }

    /// What it works on.
    pub fn store(&mut self) -> &mut S {
        &mut self.store
    }

    /// Looks at every entry once. `now`: time since the first sweep. `timeouts`: of a listener.
    ///
    /// # Errors
    /// When the kernel refuses to give an entry back to the free list.
    pub fn sweep(
        &mut self,
        now: Duration,
        timeouts: impl Fn(ListenerId) -> Timeouts,
    ) -> Result<Census, Error> {
        let since_last_secs = self.times.set_now(now.as_secs() as u32);
        let mut census = Census {
            number: self.sweeps,
            ..Census::default()
        };
        self.sweeps += 1;
        for number in 0..self.store.capacity() {
            let id = FlowId(number);
            let state = self.store.state(id);
            if state == FlowState::FREE {
                self.times.found_free(id);
                continue;
            }
            census.used += 1;
            let was_seen = self.store.take_seen(id);
            self.times.found_used(id, was_seen);
            let idle = Duration::from_secs(u64::from(self.times.idle_secs(id)));
            if state == FlowState::UNLINKED {
                // Its connection has ended, so what held its keys back holds the number back as well.
                if idle >= CLOSED_TIMEOUT {
                    // Counted out already, unless an agent was killed before it did.
                    let entry = self.store.read(id);
                    self.leave(id, &entry);
                    self.free(id)?;
                }
                continue;
            }
            let entry = self.store.read(id);
            let timeouts = timeouts(entry.listener);
            // Its client answers when it is asked again, so what counts is since when the backend is silent.
            let is_silent = is_unanswered(&entry) && !entry.tcp.has(TcpEvents::ANSWERED);
            let waited = if is_silent {
                Duration::from_secs(u64::from(self.times.age_secs(id).unwrap_or_default()))
            } else {
                idle
            };
            if waited >= timeout(&entry, &timeouts) {
                let is_unlinked = self.unlink(id, &entry);
                let is_open =
                    is_connection(&entry) && matches!(entry.tcp.phase(), Phase::Established | Phase::Closing);
                // A client whose connection a SYN cookie opened takes it for established.
                let is_due = (is_open && timeouts.reset_on_idle) || is_unanswered(&entry);
                if is_unlinked && is_due {
                    census.ended_idle.push(entry);
                }
                continue;
            }
            if is_silent && !was_seen && self.has_doubled(id, since_last_secs) {
                census.unanswered.push(entry);
            }
            let is_closed = is_connection(&entry) && entry.tcp.phase() == Phase::Closed;
            if is_closed {
                self.leave(id, &entry);
            }
            let is_active = if is_connection(&entry) {
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
                    count.closed += u64::from(is_closed);
                }
            }
        }
        Ok(census)
    }

    /// Takes the keys of a flow out of the index, unless a packet comes at the same moment: then `false`.
    pub fn unlink(&mut self, id: FlowId, entry: &FlowEntry) -> bool {
        let request_key = entry.binding.request_key();
        self.store.remove_key(&request_key, id);
        if self.store.is_seen(id) {
            let reference = FlowReference {
                id,
                direction: Direction::REQUEST,
            };
            self.store.insert_key(&request_key, reference);
            return false;
        }
        if entry.binding.is_dnat() {
            self.store.remove_key(&entry.binding.reply_key(), id);
        }
        self.store.set_state(id, FlowState::UNLINKED);
        self.leave(id, entry);
        true
    }

    /// Has one of the ages 1, 3, 7, 15… seconds come since the sweep before?
    fn has_doubled(&self, id: FlowId, since_last_secs: u32) -> bool {
        let age_secs = self.times.age_secs(id).unwrap_or_default();
        let before_secs = age_secs.saturating_sub(since_last_secs);
        (age_secs + 1).ilog2() > (before_secs + 1).ilog2()
    }

    /// Counts a flow out, once.
    fn leave(&mut self, id: FlowId, entry: &FlowEntry) {
        if self.store.take_counted(id) {
            self.store.leave(entry.listener, entry.backend);
        }
    }

    fn free(&mut self, id: FlowId) -> Result<(), Error> {
        self.store.set_state(id, FlowState::FREE);
        self.store.give_back(id)
    }
}

/// BPF_NOEXIST (linux/bpf.h): insert only.
const NO_EXIST: u64 = 1;

fn is_connection(entry: &FlowEntry) -> bool {
    has_connections(entry.binding.protocol)
}

/// How long a flow may be idle.
fn timeout(entry: &FlowEntry, timeouts: &Timeouts) -> Duration {
    if !is_connection(entry) {
        return timeouts.idle;
    }
    match entry.tcp.phase() {
        Phase::HalfOpen => timeouts.half_open,
        Phase::Established => timeouts.idle,
        Phase::Closing => timeouts.closing,
        Phase::Closed => CLOSED_TIMEOUT,
    }
}
