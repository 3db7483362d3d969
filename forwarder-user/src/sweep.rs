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

use forwarder_common::abi::{
    backend::BackendId,
    flow::{FlowBinding, FlowId},
    listener::ListenerId,
};
use tokio::sync::oneshot;

pub use crate::datapath::flows::Census;
use crate::{
    config::{DEFAULT_HALF_OPEN_TIMEOUT, DEFAULT_IDLE_TIMEOUT},
    datapath::{
        flows::{Sweeper, Timeouts},
        times::FlowTimes,
    },
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
    handle: SweepHandle,
    thread: Option<JoinHandle<()>>,
}

/// What others may ask of the thread.
#[derive(Clone, Debug)]
pub struct SweepHandle {
    orders: mpsc::Sender<Order>,
    times: Arc<FlowTimes>,
}

#[derive(Debug)]
enum Order {
    /// Delete these flows, if they are still there, and say how many were.
    Delete(Vec<(FlowId, FlowBinding)>, oneshot::Sender<u64>),
    Stop,
}

impl SweepHandle {
    /// When flows were opened and used.
    pub fn times(&self) -> &FlowTimes {
        &self.times
    }

    /// Deletes flows, if they are still there; says how many were.
    ///
    /// # Errors
    /// The agent is stopping.
    pub async fn delete(&self, flows: Vec<(FlowId, FlowBinding)>) -> Result<u64, Error> {
        let (sender, receiver) = oneshot::channel();
        let stopping = || Error::failed("the agent is stopping");
        self.orders
            .send(Order::Delete(flows, sender))
            .map_err(|_| stopping())?;
        receiver.await.map_err(|_| stopping())
    }
}

impl SweepThread {
    /// Starts sweeping.
    pub fn start(mut sweeper: Sweeper, timeouts: TimeoutTable, sender: ResetSender) -> Self {
        let timeouts = Arc::new(Mutex::new(timeouts));
        let resets = Arc::new(Mutex::new(IdleResets::default()));
        let latest = Arc::new(Mutex::new(Ok(Census::default())));
        let (orders, ordered) = mpsc::channel();
        let handle = SweepHandle {
            orders,
            times: sweeper.times(),
        };
        let shared = (latest.clone(), timeouts.clone(), resets.clone());
        let thread = thread::spawn(move || {
            let started_at = Instant::now();
            // At once for the first time: there may be flows of an earlier agent.
            let mut next_sweep = started_at;
            loop {
                match ordered.recv_timeout(next_sweep.saturating_duration_since(Instant::now())) {
                    Ok(Order::Delete(flows, done)) => {
                        let deleted = flows.iter().filter(|(id, binding)| sweeper.delete(*id, binding));
                        // Whoever asked may have gone.
                        let _ = done.send(deleted.count() as u64);
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                }
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
                next_sweep = Instant::now() + INTERVAL;
            }
        });
        Self {
            timeouts,
            resets,
            latest,
            handle,
            thread: Some(thread),
        }
    }

    /// For those who look at flows or delete some.
    pub fn handle(&self) -> SweepHandle {
        self.handle.clone()
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
        // It may have ended already, by a panic.
        let _ = self.handle.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it has aborted the process already.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
