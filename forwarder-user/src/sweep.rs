//! The thread that sweeps the flow table once a second.
//!
//! A thread of its own: a sweep of a million flows takes milliseconds of memory reads and, after a burst of
//! closed connections, many system calls, which must not delay the agent's loop.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub use crate::datapath::flows::Census;
use crate::{datapath::flows::Sweeper, error::Error};

/// Idle times are known to this precision.
const INTERVAL: Duration = Duration::from_secs(1);

/// The running thread; dropping it stops it.
pub struct SweepThread {
    latest: Arc<Mutex<Result<Census, Error>>>,
    /// Dropped to stop the thread.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SweepThread {
    /// Starts sweeping.
    pub fn start(mut sweeper: Sweeper) -> Self {
        let latest = Arc::new(Mutex::new(Ok(Census::default())));
        let (stop, stopped) = mpsc::channel::<()>();
        let shared = latest.clone();
        let thread = thread::spawn(move || {
            let started_at = Instant::now();
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let outcome = sweeper.sweep(started_at.elapsed());
                *lock(&shared) = outcome;
            }
        });
        Self {
            latest,
            stop: Some(stop),
            thread: Some(thread),
        }
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
