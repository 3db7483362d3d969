//! Passive checks: the data path's own counters tell that a backend answers no more, many times a second.
//!
//! ```text
//! counters --(a look)--> signs, one per backend --(suspicion)--> judge --> Event
//!                                                                  ^
//!             groups and limits, results of active probes ---------'
//! ```
//!
//! A thread of its own reads: neither a slow plan of the agent's loop nor thousands of system calls delay the other.
//! `signs` and `judge` are pure. What an ejection leads to is the agent's business.

use std::{
    collections::HashMap,
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use forwarder_common::abi::{backend::BackendId, counter::TrafficCounters};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::error;

use crate::error::Error;

pub mod judge;
pub mod signs;

pub use judge::{Active, Event, Group, Judge, Member};
pub use signs::{Cause, Counts};

/// Between two looks, if they cost little.
pub const INTERVAL: Duration = Duration::from_millis(50);
/// Looks may take this part of a CPU's time; with more to read they become rarer.
const PAUSE_PER_COST: u32 = 25;
/// The rarest they become.
const MAX_INTERVAL: Duration = Duration::from_secs(1);

/// Where the counters are read: the live maps, or a test's.
pub trait Reader: Send {
    /// May the counters have changed within the last second?
    fn is_live(&self, id: BackendId) -> bool;
    /// The counters.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn counters(&self, id: BackendId) -> Result<TrafficCounters, Error>;
}

impl Reader for crate::datapath::watch::BackendWatch {
    fn is_live(&self, id: BackendId) -> bool {
        self.is_live(id)
    }

    fn counters(&self, id: BackendId) -> Result<TrafficCounters, Error> {
        self.counters(id)
    }
}

impl From<TrafficCounters> for Counts {
    fn from(counters: TrafficCounters) -> Self {
        Self {
            flows_opened: counters.flows_opened,
            flows_answered: counters.flows_answered,
            flows_rejected: counters.flows_rejected,
            // Read while packets are counted: the reset may be in, and its packet not yet.
            requests: counters.request_packets.saturating_sub(counters.client_resets),
            replies: counters.reply_packets,
        }
    }
}

#[derive(Debug)]
enum Order {
    Configure(Vec<Group>),
    Probed {
        id: BackendId,
        passed: bool,
        is_healthy: bool,
    },
    Stop,
}

/// The running thread; dropping it stops it.
pub struct PassiveThread {
    orders: mpsc::Sender<Order>,
    epoch: Instant,
    thread: Option<JoinHandle<()>>,
}

impl PassiveThread {
    /// Starts it, with nobody to watch yet. Events come in the order in which they happen.
    pub fn start(reader: impl Reader + 'static) -> (Self, UnboundedReceiver<Event>) {
        let (orders, ordered) = mpsc::channel();
        // Bounded by nature: at most a few per backend and ejection time.
        let (sender, events) = unbounded_channel();
        let epoch = Instant::now();
        let watcher = Watcher {
            reader,
            epoch,
            events: sender,
            judge: Judge::default(),
            was_live: HashMap::new(),
            is_failing: false,
        };
        let thread = thread::spawn(move || watcher.run(&ordered));
        let this = Self {
            orders,
            epoch,
            thread: Some(thread),
        };
        (this, events)
    }

    /// From now on these backends are watched.
    pub fn configure(&self, groups: Vec<Group>) {
        self.order(Order::Configure(groups));
    }

    /// A probe of a backend has passed or failed, and active checks call it healthy or not.
    pub fn probed(&self, id: BackendId, passed: bool, is_healthy: bool) {
        self.order(Order::Probed {
            id,
            passed,
            is_healthy,
        });
    }

    /// A time of an event's.
    pub fn instant(&self, time: Duration) -> Instant {
        self.epoch + time
    }

    fn order(&self, order: Order) {
        // It runs until it is told to stop.
        let _ = self.orders.send(order);
    }
}

impl Drop for PassiveThread {
    fn drop(&mut self) {
        self.order(Order::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic in it has aborted the process already.
            let _ = thread.join();
        }
    }
}

/// What the thread works with.
struct Watcher<R> {
    reader: R,
    epoch: Instant,
    events: UnboundedSender<Event>,
    judge: Judge,
    /// Of those read before: did they have flows then?
    was_live: HashMap<BackendId, bool>,
    is_failing: bool,
}

impl<R: Reader> Watcher<R> {
    fn run(mut self, orders: &mpsc::Receiver<Order>) {
        let mut next_look = self.epoch;
        loop {
            let pause = next_look.saturating_duration_since(Instant::now());
            let order = if self.judge.is_idle() {
                orders.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else if pause.is_zero() {
                // Orders may come without end.
                Err(RecvTimeoutError::Timeout)
            } else {
                orders.recv_timeout(pause)
            };
            match order {
                Ok(Order::Configure(groups)) => {
                    let events = self.judge.configure(groups, self.epoch.elapsed());
                    self.tell(events);
                    let watched: std::collections::HashSet<_> = self.judge.backends().collect();
                    self.was_live.retain(|id, _| watched.contains(id));
                }
                Ok(Order::Probed {
                    id,
                    passed,
                    is_healthy,
                }) => self.judge.probed(id, passed, is_healthy, self.epoch.elapsed()),
                Err(RecvTimeoutError::Timeout) => next_look = self.look(),
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Looks at everybody's counters; says when to do so again.
    fn look(&mut self) -> Instant {
        let began = Instant::now();
        let mut reads = Vec::new();
        let mut failure = None;
        for id in self.judge.backends() {
            let is_live = self.reader.is_live(id);
            // Once more after it went quiet; and everybody once, to know what is old.
            let was_live = self.was_live.insert(id, is_live);
            if !is_live && was_live == Some(false) {
                continue;
            }
            match self.reader.counters(id) {
                Ok(counters) => reads.push((id, counters.into())),
                Err(error) => failure = Some(error),
            }
        }
        // Of the time when reading began: what was counted later may be in or not, and is new the next time.
        let events = self.judge.look(began - self.epoch, &reads);
        self.tell(events);
        let is_failing = failure.is_some();
        if let Some(failure) = failure.filter(|_| !self.is_failing) {
            error!("passive checks see nothing: {failure}");
        }
        self.is_failing = is_failing;
        Instant::now() + pause(began.elapsed())
    }

    fn tell(&self, events: Vec<Event>) {
        for event in events {
            // The agent's loop has ended: nobody wants to know.
            let _ = self.events.send(event);
        }
    }
}

/// How long to wait after a look that took so long.
fn pause(cost: Duration) -> Duration {
    cost.saturating_mul(PAUSE_PER_COST).clamp(INTERVAL, MAX_INTERVAL)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        sync::{Arc, Mutex},
    };

    use super::*;

    #[test]
    fn looks_that_cost_much_become_rarer() {
        assert_eq!(pause(Duration::ZERO), INTERVAL);
        assert_eq!(pause(Duration::from_millis(1)), INTERVAL);
        assert_eq!(pause(Duration::from_millis(10)), Duration::from_millis(250));
        assert_eq!(pause(Duration::from_secs(10)), MAX_INTERVAL);
    }

    #[test]
    fn client_resets_are_no_requests() {
        let counters = TrafficCounters {
            request_packets: 10,
            client_resets: 4,
            ..TrafficCounters::default()
        };
        assert_eq!(Counts::from(counters).requests, 6);
    }

    /// Counters that a test changes, and how often each was read.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<HashMap<u32, Entry>>>);

    /// Counters, whether flows are live, and the number of reads.
    type Entry = (TrafficCounters, bool, u64);

    impl Fake {
        fn change(&self, id: u32, change: impl FnOnce(&mut Entry)) {
            change(self.0.lock().unwrap().entry(id).or_default());
        }

        fn reads(&self, id: u32) -> u64 {
            self.0.lock().unwrap().get(&id).map_or(0, |entry| entry.2)
        }
    }

    impl Reader for Fake {
        fn is_live(&self, id: BackendId) -> bool {
            self.0.lock().unwrap().get(&id.0).is_some_and(|entry| entry.1)
        }

        fn counters(&self, id: BackendId) -> Result<TrafficCounters, Error> {
            let mut all = self.0.lock().unwrap();
            let entry = all.entry(id.0).or_default();
            entry.2 += 1;
            Ok(entry.0)
        }
    }

    fn group() -> Group {
        let member = |id: u32| Member {
            id: BackendId(id),
            name: ("web".to_owned(), format!("web-{id}")),
            address: (IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + id)), 80),
            active: Active {
                rise: None,
                is_healthy: true,
            },
        };
        Group {
            limits: signs::tests::limits(),
            backends: (0..3).map(member).collect(),
        }
    }

    async fn next(events: &mut UnboundedReceiver<Event>) -> Event {
        let event = tokio::time::timeout(Duration::from_secs(60), events.recv()).await;
        event.expect("an event is due").expect("the thread runs")
    }

    #[tokio::test]
    async fn the_thread_ejects_and_reads_only_who_carries_flows() {
        let fake = Fake::default();
        let (thread, mut events) = PassiveThread::start(fake.clone());
        thread.configure(vec![group()]);
        let all_known = async {
            while (0..3).any(|id| fake.reads(id) == 0) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all_known)
            .await
            .unwrap();
        fake.change(1, |(counters, is_live, _)| {
            counters.flows_opened += 9;
            counters.flows_rejected += 9;
            *is_live = true;
        });
        match next(&mut events).await {
            Event::Ejected {
                name, cause, count, ..
            } => {
                assert_eq!((name.1.as_str(), cause, count), ("web-1", Cause::Rejected, 9));
            }
            other => panic!("{other:?}"),
        }
        assert!(fake.reads(1) >= 2);
        assert_eq!(
            (fake.reads(0), fake.reads(2)),
            (1, 1),
            "nothing can have changed there"
        );
        // Without the group nobody is ejected.
        thread.configure(Vec::new());
        assert!(matches!(next(&mut events).await, Event::Readmitted { .. }));
        drop(thread);
        assert!(events.recv().await.is_none());
    }
}
