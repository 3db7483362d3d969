//! What the counters of one backend give away: has it stopped answering?
//!
//! Pure: times and counters come in, a suspicion comes out. Only signs that no living server gives count:
//!
//! - **rejected**: flow after flow was answered by a TCP reset, and none was accepted between them. Nobody listens.
//! - **silent**: flows were opened, and for the whole window not one packet came back, of whatever flow. A server's
//!   kernel answers a SYN, accepted or not, and acknowledges data, however long the application thinks about it. So a
//!   long poll is not silent, and neither is a slow application.
//! - **silent** too: requests go on without any packet back for [`REQUESTS_AFTER`]. A request alone proves nothing, as
//!   the last acknowledgement of a conversation has no answer. But that comes within a round trip of the reply it
//!   acknowledges, so what comes later asks for an answer.
//!
//! Clients that vanish leave no sign: they send nothing, or resets, which are not counted as requests.

use std::time::Duration;

use crate::config::Passive;

/// Requests that come later than this after the last reply should have had an answer: longer than any round trip to a
/// client, whose acknowledgements come that late.
pub const REQUESTS_AFTER: Duration = Duration::from_secs(2);

/// Counters of one backend, of all CPUs, since whenever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub flows_opened: u64,
    /// Of those opened, the ones whose first packet from the backend was no TCP reset.
    pub flows_answered: u64,
    /// Of those opened, the ones whose first packet from the backend was a TCP reset.
    pub flows_rejected: u64,
    /// Packets of clients, TCP resets excepted: nobody answers those.
    pub requests: u64,
    /// Packets of the backend.
    pub replies: u64,
}

impl Counts {
    /// What was counted since `before`; `None` if the counters began anew.
    fn since(&self, before: &Self) -> Option<Self> {
        Some(Self {
            flows_opened: self.flows_opened.checked_sub(before.flows_opened)?,
            flows_answered: self.flows_answered.checked_sub(before.flows_answered)?,
            flows_rejected: self.flows_rejected.checked_sub(before.flows_rejected)?,
            requests: self.requests.checked_sub(before.requests)?,
            replies: self.replies.checked_sub(before.replies)?,
        })
    }
}

/// Why a backend is suspicious.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// It answers new flows with TCP resets.
    Rejected,
    /// Nothing comes from it.
    Silent,
}

impl Cause {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::Rejected, Self::Silent];

    /// As status and metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Silent => "silent",
        }
    }
}

/// A backend that seems to answer no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    pub cause: Cause,
    /// Flows rejected, flows opened, or requests sent without an answer.
    pub count: u64,
    /// A time before the first of them: the look at the counters that did not show it yet.
    pub since: Duration,
}

/// Things without an answer, counted from the first one on.
#[derive(Clone, Copy, Debug)]
struct Unanswered {
    count: u64,
    /// The look before the first.
    since: Duration,
    /// When there were enough of them.
    enough_at: Option<Duration>,
}

impl Unanswered {
    /// Counts `more`, which came between the looks at `before` and `now`.
    fn add(this: &mut Option<Self>, more: u64, enough: u32, before: Duration, now: Duration) {
        if more == 0 {
            return;
        }
        let this = this.get_or_insert(Self {
            count: 0,
            since: before,
            enough_at: None,
        });
        this.count = this.count.saturating_add(more);
        if this.enough_at.is_none() && this.count >= u64::from(enough) {
            this.enough_at = Some(now);
        }
    }

    fn suspicion(this: Option<Self>, cause: Cause, wait: Duration, now: Duration) -> Option<Suspicion> {
        let this = this?;
        let is_due = now.saturating_sub(this.enough_at?) >= wait;
        is_due.then_some(Suspicion {
            cause,
            count: this.count,
            since: this.since,
        })
    }
}

/// The signs of one backend.
#[derive(Clone, Debug, Default)]
pub struct Signs {
    seen: Option<Counts>,
    /// The last look that showed a reply, or the first look.
    replied_at: Duration,
    rejected: Option<Unanswered>,
    opened: Option<Unanswered>,
    requests: Option<Unanswered>,
}

impl Signs {
    /// Looks at the counters as they are at `now`; the look before was at `before`, and everything that is new came
    /// between the two. The first look shows nothing: nobody knows how old its numbers are.
    pub fn look(
        &mut self,
        before: Duration,
        now: Duration,
        counts: &Counts,
        limits: &Passive,
    ) -> Option<Suspicion> {
        let seen = self.seen.replace(*counts);
        let Some(new) = seen.and_then(|seen| counts.since(&seen)) else {
            *self = Self {
                seen: self.seen,
                replied_at: now,
                ..Self::default()
            };
            return None;
        };
        // Whether an accepted flow came before or after the rejected ones of the same look is not known: in doubt for
        // the backend.
        if new.flows_answered > 0 {
            self.rejected = None;
        } else if let Some(enough) = limits.rejected {
            Unanswered::add(&mut self.rejected, new.flows_rejected, enough, before, now);
        }
        if new.replies > 0 {
            self.replied_at = now;
            self.opened = None;
            self.requests = None;
        } else if let Some(enough) = limits.silent {
            Unanswered::add(&mut self.opened, new.flows_opened, enough, before, now);
            if limits.counts_requests && before.saturating_sub(self.replied_at) >= REQUESTS_AFTER {
                Unanswered::add(&mut self.requests, new.requests, enough, before, now);
            }
        }
        self.suspicion(now, limits)
    }

    fn suspicion(&self, now: Duration, limits: &Passive) -> Option<Suspicion> {
        // Changed limits may have switched a sign off that was counted before.
        limits
            .rejected
            .and_then(|_| Unanswered::suspicion(self.rejected, Cause::Rejected, Duration::ZERO, now))
            .or_else(|| {
                limits.silent?;
                let after = limits.silent_after;
                Unanswered::suspicion(self.opened, Cause::Silent, after, now)
                    .or_else(|| Unanswered::suspicion(self.requests, Cause::Silent, after, now))
            })
    }

    /// Begins anew: what was counted so far is no sign any more.
    pub fn forget(&mut self, now: Duration) {
        *self = Self {
            seen: self.seen,
            replied_at: now,
            ..Self::default()
        };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOOK: Duration = Duration::from_millis(50);

    /// The defaults of a TCP group.
    pub(in crate::passive) fn limits() -> Passive {
        Passive {
            rejected: Some(5),
            silent: Some(5),
            silent_after: Duration::from_millis(500),
            counts_requests: true,
            max_ejected_percent: 50,
            ejection_time: Duration::from_secs(10),
            max_ejection_time: Duration::from_secs(300),
        }
    }

    /// A backend and a clock that goes from look to look.
    struct Scene {
        signs: Signs,
        limits: Passive,
        now: Duration,
        counts: Counts,
    }

    impl Scene {
        fn new(limits: Passive) -> Self {
            let mut scene = Self {
                signs: Signs::default(),
                limits,
                now: Duration::from_secs(100),
                counts: Counts::default(),
            };
            assert_eq!(scene.look(Counts::default()), None);
            scene
        }

        /// One more look, before which `new` was counted.
        fn look(&mut self, new: Counts) -> Option<Suspicion> {
            let before = self.now;
            self.now += LOOK;
            let counts = &mut self.counts;
            counts.flows_opened += new.flows_opened;
            counts.flows_answered += new.flows_answered;
            counts.flows_rejected += new.flows_rejected;
            counts.requests += new.requests;
            counts.replies += new.replies;
            self.signs.look(before, self.now, &self.counts, &self.limits)
        }

        /// Looks until there is a suspicion, at most for `time`; says after how long it came.
        fn quiet(&mut self, time: Duration) -> Option<(Duration, Suspicion)> {
            let start = self.now;
            while self.now < start + time {
                if let Some(suspicion) = self.look(Counts::default()) {
                    return Some((self.now - start, suspicion));
                }
            }
            None
        }
    }

    fn rejected(flows: u64) -> Counts {
        Counts {
            flows_opened: flows,
            flows_rejected: flows,
            requests: flows,
            replies: flows,
            ..Counts::default()
        }
    }

    fn answered(flows: u64) -> Counts {
        Counts {
            flows_opened: flows,
            flows_answered: flows,
            requests: flows * 5,
            replies: flows * 5,
            ..Counts::default()
        }
    }

    fn opened(flows: u64) -> Counts {
        Counts {
            flows_opened: flows,
            requests: flows,
            ..Counts::default()
        }
    }

    fn requests(packets: u64) -> Counts {
        Counts {
            requests: packets,
            ..Counts::default()
        }
    }

    #[test]
    fn rejected_flows_in_a_row_are_a_sign_at_once() {
        let mut scene = Scene::new(limits());
        let before = scene.now;
        assert_eq!(scene.look(rejected(4)), None);
        let suspicion = scene.look(rejected(1)).unwrap();
        assert_eq!((suspicion.cause, suspicion.count), (Cause::Rejected, 5));
        assert_eq!(
            suspicion.since, before,
            "it began after the look before the first"
        );
    }

    #[test]
    fn an_accepted_flow_between_rejected_ones_clears_the_backend() {
        let mut scene = Scene::new(limits());
        for _ in 0..100 {
            assert_eq!(scene.look(rejected(4)), None);
            assert_eq!(scene.look(answered(1)), None);
        }
        let mut both = rejected(1000);
        both.flows_answered = 1;
        assert_eq!(scene.look(both), None, "which came first is not known");
    }

    #[test]
    fn unanswered_flows_are_a_sign_when_enough_of_them_have_waited() {
        let mut scene = Scene::new(limits());
        scene.look(answered(10));
        let began = scene.now;
        assert_eq!(scene.look(opened(4)), None);
        assert_eq!(scene.quiet(Duration::from_secs(60)), None, "four are not enough");
        assert_eq!(scene.look(opened(1)), None);
        let (took, suspicion) = scene.quiet(Duration::from_secs(2)).unwrap();
        assert_eq!(took, Duration::from_millis(500));
        assert_eq!(
            (suspicion.cause, suspicion.count, suspicion.since),
            (Cause::Silent, 5, began)
        );
    }

    #[test]
    fn one_packet_of_any_flow_ends_the_silence() {
        let mut scene = Scene::new(limits());
        for _ in 0..50 {
            assert_eq!(scene.look(opened(100)), None);
            assert_eq!(scene.quiet(Duration::from_millis(400)), None);
            let packet = Counts {
                replies: 1,
                ..Counts::default()
            };
            assert_eq!(scene.look(packet), None);
        }
    }

    #[test]
    fn a_long_poll_that_waits_is_no_sign() {
        let mut scene = Scene::new(limits());
        // Opened, asked and acknowledged; the answer takes its time, and clients keep their connections alive.
        scene.look(answered(100));
        for _ in 0..20 {
            assert_eq!(scene.quiet(Duration::from_secs(15)), None);
            let keep_alive = Counts {
                requests: 100,
                replies: 100,
                ..Counts::default()
            };
            assert_eq!(scene.look(keep_alive), None);
        }
    }

    #[test]
    fn last_acknowledgements_are_no_sign_and_vanished_clients_neither() {
        let mut scene = Scene::new(limits());
        scene.look(answered(100));
        // A client far away acknowledges the end of a download.
        for _ in 0..20 {
            assert_eq!(scene.look(requests(10)), None);
        }
        assert_eq!(scene.quiet(Duration::from_secs(60)), None);
        // The server sends to clients that are gone.
        for _ in 0..20 {
            let lonely = Counts {
                replies: 3,
                ..Counts::default()
            };
            assert_eq!(scene.look(lonely), None);
            assert_eq!(scene.quiet(Duration::from_secs(1)), None);
        }
    }

    #[test]
    fn requests_that_go_on_without_any_answer_are_a_sign() {
        let mut scene = Scene::new(limits());
        scene.look(answered(100));
        let began = scene.now;
        // Retransmissions on open connections; nobody opens one.
        let found = (0..100).find_map(|_| scene.look(requests(2))).unwrap();
        assert_eq!(found.cause, Cause::Silent);
        assert!(
            found.since >= began + REQUESTS_AFTER,
            "earlier ones prove nothing"
        );
        assert!(scene.now - began < Duration::from_secs(4));
    }

    #[test]
    fn requests_of_a_group_without_answers_by_nature_do_not_count() {
        let mut scene = Scene::new(Passive {
            counts_requests: false,
            ..limits()
        });
        for _ in 0..200 {
            assert_eq!(scene.look(requests(1000)), None);
        }
        scene.limits.silent = None;
        for _ in 0..200 {
            assert_eq!(scene.look(opened(1000)), None);
        }
    }

    #[test]
    fn a_sign_that_is_switched_off_is_none() {
        let mut scene = Scene::new(limits());
        scene.look(rejected(5)).unwrap();
        scene.limits.rejected = None;
        assert_eq!(scene.look(rejected(5)), None);
    }

    #[test]
    fn what_was_counted_before_the_first_look_is_no_sign() {
        let mut signs = Signs::default();
        let old = Counts {
            flows_opened: 1000,
            flows_rejected: 1000,
            ..Counts::default()
        };
        let mut now = Duration::ZERO;
        for _ in 0..100 {
            assert_eq!(signs.look(now, now + LOOK, &old, &limits()), None);
            now += LOOK;
        }
    }

    #[test]
    fn counters_that_begin_anew_are_no_sign() {
        let mut scene = Scene::new(limits());
        scene.look(answered(1000));
        scene.counts = Counts::default();
        assert_eq!(scene.look(rejected(500)), None);
    }

    #[test]
    fn forgotten_signs_have_to_come_again() {
        let mut scene = Scene::new(limits());
        scene.look(rejected(5)).unwrap();
        scene.signs.forget(scene.now);
        assert_eq!(scene.look(rejected(4)), None);
        assert!(scene.look(rejected(1)).is_some());
    }

    prop_compose! {
        fn any_counts()(opened in 0_u64..50, answered in 0_u64..50, rejected in 0_u64..50, requests in 0_u64..50, replies in 0_u64..50) -> Counts {
            Counts { flows_opened: opened, flows_answered: answered, flows_rejected: rejected, requests, replies }
        }
    }

    proptest! {
        /// Whatever else comes, a backend that accepts a flow between any two looks is beyond suspicion.
        #[test]
        fn a_backend_that_accepts_flows_is_never_suspected(news in prop::collection::vec(any_counts(), 0..200)) {
            let mut scene = Scene::new(limits());
            for mut new in news {
                new.flows_answered += 1;
                new.replies += 1;
                prop_assert_eq!(scene.look(new), None);
            }
        }

        /// The rules in their plainest form, over the whole history.
        #[test]
        fn agrees_with_the_definition(
            news in prop::collection::vec(prop_oneof![
                3 => Just(Counts::default()),
                1 => any_counts(),
                2 => (0_u64..4).prop_map(opened),
                1 => (0_u64..4).prop_map(rejected),
            ], 1..80),
        ) {
            let mut scene = Scene::new(Passive { counts_requests: false, ..limits() });
            for end in 1..=news.len() {
                let found = scene.look(news[end - 1]);
                let past = &news[..end];
                let since_answer = past.iter().rposition(|new| new.flows_answered > 0).map_or(0, |at| at + 1);
                let in_a_row: u64 = past[since_answer..].iter().map(|new| new.flows_rejected).sum();
                let since_reply = past.iter().rposition(|new| new.replies > 0).map_or(0, |at| at + 1);
                // Those that have waited for the window: ten looks.
                let waited = end.saturating_sub(10).max(since_reply);
                let silent: u64 = past[since_reply..waited].iter().map(|new| new.flows_opened).sum();
                let expected = if in_a_row >= 5 {
                    Some(Cause::Rejected)
                } else if silent >= 5 {
                    Some(Cause::Silent)
                } else {
                    None
                };
                prop_assert_eq!(found.map(|found| found.cause), expected, "after {} looks", end);
            }
        }
    }
}
