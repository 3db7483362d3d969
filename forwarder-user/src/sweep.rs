//! The thread that sweeps the flow table once a second.
//!
//! A thread of its own: a sweep of a million flows takes milliseconds of memory reads and, after a burst of
//! closed connections, many system calls, which must not delay the agent's loop.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use forwarder_common::abi::{backend::BackendId, listener::ListenerId};

pub use crate::datapath::flows::Census;
use crate::{
    config::{DEFAULT_HALF_OPEN_TIMEOUT, DEFAULT_IDLE_TIMEOUT},
    datapath::flows::{Sweeper, Timeouts},
    error::Error,
    reset::ResetSender,
};

/// Idle times are known to this precision.
const INTERVAL: Duration = Duration::from_secs(1);

/// For flows whose listener is gone from the configuration.
const OF_NO_LISTENER: Timeouts = Timeouts {
    idle: DEFAULT_IDLE_TIMEOUT,
    closing: DEFAULT_IDLE_TIMEOUT,
    half_open: DEFAULT_HALF_OPEN_TIMEOUT,
    reset_on_idle: false,
};

/// Timeouts by listener.
pub type TimeoutTable = HashMap<ListenerId, Timeouts>;

/// How many resets were sent to the ends of idle connections.
#[derive(Clone, Debug, Default)]
pub struct IdleResets {
    pub listeners: HashMap<ListenerId, u64>,
    pub backends: HashMap<BackendId, u64>,
}

/// The running thread; dropping it stops it.
pub struct SweepThread {
    timeouts: Arc<Mutex<TimeoutTable>>,
    resets: Arc<Mutex<IdleResets>>,
    latest: Arc<Mutex<Result<Census, Error>>>,
    /// Dropped to stop the thread.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SweepThread {
    /// Starts sweeping.
    pub fn start(mut sweeper: Sweeper, timeouts: TimeoutTable, sender: ResetSender) -> Self {
        let timeouts = Arc::new(Mutex::new(timeouts));
        let resets = Arc::new(Mutex::new(IdleResets::default()));
        let latest = Arc::new(Mutex::new(Ok(Census::default())));
        let (stop, stopped) = mpsc::channel::<()>();
        let shared = (latest.clone(), timeouts.clone(), resets.clone());
        let thread = thread::spawn(move || {
            let started_at = Instant::now();
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let (latest, timeouts, resets) = &shared;
                let table = lock(timeouts).clone();
                let of = |listener| table.get(&listener).copied().unwrap_or(OF_NO_LISTENER);
                let outcome = sweeper.sweep(started_at.elapsed(), of);
                for entry in outcome.iter().flat_map(|census| &census.ended_idle) {
                    let sent = sender.end(entry);
                    let mut resets = lock(resets);
                    *resets.listeners.entry(entry.listener).or_insert(0) += sent;
                    *resets.backends.entry(entry.backend).or_insert(0) += sent;
                }
                *lock(latest) = outcome;
            }
        });
        Self {
            timeouts,
            resets,
            latest,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// From the next sweep on these timeouts hold.
    pub fn set_timeouts(&self, timeouts: TimeoutTable) {
        *lock(&self.timeouts) = timeouts;
    }

    /// The resets sent so far.
    pub fn idle_resets(&self) -> IdleResets {
        lock(&self.resets).clone()
    }

    /// What the last sweep has found.
    pub fn census(&self) -> Census {
        lock(&self.latest).as_ref().cloned().unwrap_or_default()
    }

    /// Did the last sweep work?
    ///
    /// # Errors
    /// Its error, if it did not.
    pub fn check(&self) -> Result<(), Error> {
        lock(&self.latest).as_ref().map(|_| ()).map_err(Clone::clone)
    }
}

impl Drop for SweepThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it has aborted the process already.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
