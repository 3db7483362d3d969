//! When flows were opened and last used, as far as the sweep knows. It writes, others read at any time.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use forwarder_common::abi::flow::FlowId;
use nix::time::{ClockId, clock_gettime};

/// Seconds of CLOCK_MONOTONIC, as the programs count them.
pub fn monotonic_secs() -> u32 {
    // Linux has this clock.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| now.tv_sec() as u32)
}

/// Two times per entry of the flow table, in seconds since the first sweep.
#[derive(Debug)]
pub struct FlowTimes {
    now_secs: AtomicU32,
    /// When a sweep first found the entry in use, plus one; zero: it is free.
    first_seen: Vec<AtomicU32>,
    last_seen: Vec<AtomicU32>,
}

impl FlowTimes {
    /// Of a table in which all entries are free.
    pub fn new(capacity: u32) -> Self {
        let zeros = || (0..capacity).map(|_| AtomicU32::new(0)).collect();
        Self {
            now_secs: AtomicU32::new(0),
            first_seen: zeros(),
            last_seen: zeros(),
        }
    }

    /// A sweep begins; returns the seconds since the one before.
    pub fn set_now(&self, now_secs: u32) -> u32 {
        now_secs.saturating_sub(self.now_secs.swap(now_secs, Relaxed))
    }

    /// The entry is in use; `was_seen`: a packet has come since the sweep before.
    pub fn found_used(&self, id: FlowId, was_seen: bool) {
        let now_secs = self.now_secs.load(Relaxed);
        let first = &self.first_seen[id.0 as usize];
        if first.load(Relaxed) == 0 {
            first.store(now_secs + 1, Relaxed);
        }
        if was_seen {
            self.last_seen[id.0 as usize].store(now_secs, Relaxed);
        }
    }

    /// The entry is free.
    pub fn found_free(&self, id: FlowId) {
        let first = &self.first_seen[id.0 as usize];
        if first.load(Relaxed) != 0 {
            first.store(0, Relaxed);
        }
    }

    /// How long ago a packet was last seen.
    pub fn idle_secs(&self, id: FlowId) -> u32 {
        self.since(self.last_seen[id.0 as usize].load(Relaxed))
    }

    /// How long ago a sweep found the flow first; `None`: none has yet.
    pub fn age_secs(&self, id: FlowId) -> Option<u32> {
        let first = self.first_seen[id.0 as usize].load(Relaxed);
        first.checked_sub(1).map(|first| self.since(first))
    }

    fn since(&self, then_secs: u32) -> u32 {
        self.now_secs.load(Relaxed).saturating_sub(then_secs)
    }
}
