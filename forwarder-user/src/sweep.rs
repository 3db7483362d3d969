//! The thread that sweeps the flow table once a second.
//!
//! A thread of its own: a sweep of a million flows takes milliseconds of memory reads and, after a burst of
//! closed connections, many system calls, which must not delay the agent's loop.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use forwarder_common::abi::{
    backend::BackendId,
    flow::{FlowBinding, FlowEntry, FlowId},
    listener::ListenerId,
};
use tokio::sync::oneshot;
use tracing::info;

pub use crate::datapath::flows::{Census, EndCause};
use crate::{
    config::{DEFAULT_HALF_OPEN_TIMEOUT, DEFAULT_IDLE_TIMEOUT},
    datapath::{
        flows::{Sweeper, Timeouts},
        free_list::await_running_programs,
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

/// What became of flows that the sweep ended although nobody had closed them.
#[derive(Clone, Debug, Default)]
pub struct EndedFlows {
    /// Resets sent to ends of connections, by listener.
    pub listener_resets: HashMap<ListenerId, u64>,
    /// The same by backend.
    pub backend_resets: HashMap<BackendId, u64>,
    /// Flows that were ended on purpose.
    pub flows: HashMap<(BackendId, EndCause), u64>,
}

impl EndedFlows {
    fn add_resets(&mut self, entry: &FlowEntry, sent: u64) {
        *self.listener_resets.entry(entry.listener).or_insert(0) += sent;
        *self.backend_resets.entry(entry.backend).or_insert(0) += sent;
    }
}

/// The running thread; dropping it stops it.
pub struct SweepThread {
    timeouts: Arc<Mutex<TimeoutTable>>,
    ended: Arc<Mutex<EndedFlows>>,
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
    /// End the flows on these backends.
    End(HashSet<BackendId>, EndCause),
    Stop,
}

impl SweepHandle {
    /// When flows were opened and used.
    pub fn times(&self) -> &FlowTimes {
        &self.times
    }

    /// Has the flows on these backends ended, as far as the cause concerns them, with a reset to both ends of their
    /// connections. Packets that are under way as this is called have passed by then, so a flow that one of them opens
    /// is found as well.
    pub fn end(&self, backends: HashSet<BackendId>, cause: EndCause) {
        // The agent is stopping: another one will see what is left.
        let _ = self.orders.send(Order::End(backends, cause));
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
        let ended = Arc::new(Mutex::new(EndedFlows::default()));
        let latest = Arc::new(Mutex::new(Ok(Census::default())));
        let (orders, ordered) = mpsc::channel();
        let handle = SweepHandle {
            orders,
            times: sweeper.times(),
        };
        let shared = (latest.clone(), timeouts.clone(), ended.clone());
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
                    Ok(Order::End(backends, cause)) => {
                        await_running_programs();
                        let entries = sweeper.end(&backends, cause);
                        let mut ended = lock(&shared.2);
                        for entry in &entries {
                            *ended.flows.entry((entry.backend, cause)).or_insert(0) += 1;
                            ended.add_resets(entry, sender.end(entry));
                        }
                        drop(ended);
                        if !entries.is_empty() {
                            info!(
                                "{} flows of {} backends ended: {cause:?}",
                                entries.len(),
                                backends.len()
                            );
                        }
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                }
                let (latest, timeouts, ended) = &shared;
                let table = lock(timeouts).clone();
                let of = |listener| table.get(&listener).copied().unwrap_or(OF_NO_LISTENER);
                let outcome = sweeper.sweep(started_at.elapsed(), of);
                for entry in outcome.iter().flat_map(|census| &census.ended_idle) {
                    let sent = sender.end(entry);
                    lock(ended).add_resets(entry, sent);
                }
                for entry in outcome.iter().flat_map(|census| &census.unanswered) {
                    sender.ask_again(entry);
                }
                *lock(latest) = outcome;
                next_sweep = Instant::now() + INTERVAL;
            }
        });
        Self {
            timeouts,
            ended,
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

    /// Flows ended so far although nobody had closed them.
    pub fn ended(&self) -> EndedFlows {
        lock(&self.ended).clone()
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
