//! What the counters of one backend give away: has it stopped answering?
//!
//! Pure: times and counters come in, a suspicion comes out. Only signs that no living server gives count:
//!
//! - **rejected**: so many more new flows were answered by a TCP reset than were accepted. Nobody listens.
//! - **silent**: flows were opened, and for the whole window not one new flow had an answer. A server's kernel answers a
//!   SYN, accepted or not, however long the application thinks about its requests. So a long poll is not silent, and
//!   neither is a slow application; but one whose kernel drops SYNs, as no more fit into its queue, should not
//!   be sent more of them.
//! - **silent** too: requests go on without any packet back for [`REQUESTS_AFTER`]. A request alone proves nothing, as
//!   the last acknowledgement of a conversation has no answer. But that comes within a round trip of the reply it
//!   acknowledges, so what comes later asks for an answer.
//!
//! What is sent to vanished clients is no answer of new flows: a server that hears nothing any more goes on repeating
//! what was not acknowledged. Where UDP is among the traffic, any packet back ends the silence, and requests do not
//! count.
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
    /// Of those opened, the ones that the backend answered, by SYN and ACK where it is TCP.
    pub flows_answered: u64,
    /// Of those opened, the ones that the backend answered by a TCP reset.
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

    fn suspicion(this: Option<Self>, wait: Duration, now: Duration) -> Option<Suspicion> {
        let this = this?;
        let is_due = now.saturating_sub(this.enough_at?) >= wait;
        is_due.then_some(Suspicion {
            cause: Cause::Silent,
            count: this.count,
            since: this.since,
        })
    }
}

/// Rejected flows, from the first one on.
#[derive(Clone, Copy, Debug)]
struct Rejections {
    count: u64,
    /// By how many they outnumber the accepted ones, up to twice the number that is too many: so a few accepted flows
    /// clear a backend that is well again, however long it was not.
    surplus: u64,
    /// The look before the first.
    since: Duration,
}

impl Rejections {
    /// Which of the flows of one look came first is not known.
    fn add(this: Option<Self>, new: &Counts, enough: u32, before: Duration) -> Option<Self> {
        let this = this.unwrap_or(Self {
            count: 0,
            surplus: 0,
            since: before,
        });
        let surplus = this
            .surplus
            .saturating_add(new.flows_rejected)
            .saturating_sub(new.flows_answered);
        (surplus > 0).then_some(Self {
            count: this.count.saturating_add(new.flows_rejected),
            surplus: surplus.min(u64::from(enough) * 2),
            since: this.since,
        })
    }

    fn suspicion(this: Option<Self>, enough: u32) -> Option<Suspicion> {
        let this = this.filter(|this| this.surplus >= u64::from(enough))?;
        Some(Suspicion {
            cause: Cause::Rejected,
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
    rejected: Option<Rejections>,
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
        if let Some(enough) = limits.rejected {
            self.rejected = Rejections::add(self.rejected, &new, enough, before);
        }
        if let Some(enough) = limits.silent {
            let answers = if limits.counts_requests {
                new.flows_answered + new.flows_rejected
            } else {
                new.replies
            };
            if answers > 0 {
                self.opened = None;
            } else {
                Unanswered::add(&mut self.opened, new.flows_opened, enough, before, now);
            }
            if new.replies > 0 {
                self.replied_at = now;
                self.requests = None;
            } else if limits.counts_requests && before.saturating_sub(self.replied_at) >= REQUESTS_AFTER {
                Unanswered::add(&mut self.requests, new.requests, enough, before, now);
            }
        }
        self.suspicion(now, limits)
    }

    fn suspicion(&self, now: Duration, limits: &Passive) -> Option<Suspicion> {
        // Changed limits may have switched a sign off that was counted before.
        limits
            .rejected
            .and_then(|enough| Rejections::suspicion(self.rejected, enough))
            .or_else(|| {
                limits.silent?;
                let after = limits.silent_after;
                Unanswered::suspicion(self.opened, after, now)
                    .or_else(|| Unanswered::suspicion(self.requests, after, now))
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
    fn accepted_flows_clear_a_backend_as_long_as_they_are_as_many() {
        let mut scene = Scene::new(limits());
        for _ in 0..100 {
            assert_eq!(scene.look(rejected(4)), None);
            assert_eq!(scene.look(answered(4)), None);
        }
        assert_eq!(scene.look(rejected(4)), None);
        assert_eq!(scene.look(answered(1)), None);
        assert_eq!(scene.look(rejected(1)), None);
        let began = scene.now - 3 * LOOK;
        assert_eq!(scene.look(rejected(1)).unwrap().since, began);
    }

    #[test]
    fn a_backend_that_is_well_again_is_cleared_however_long_it_was_not() {
        let mut scene = Scene::new(limits());
        for _ in 0..1000 {
            scene.look(rejected(100));
        }
        assert!(scene.look(answered(5)).is_some());
        assert_eq!(scene.look(answered(1)), None);
        assert_eq!(scene.look(answered(4)), None);
        assert_eq!(scene.look(rejected(4)), None);
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
    fn one_answered_flow_ends_the_silence() {
        let mut scene = Scene::new(limits());
        for _ in 0..50 {
            assert_eq!(scene.look(opened(100)), None);
            assert_eq!(scene.quiet(Duration::from_millis(400)), None);
            assert_eq!(scene.look(answered(1)), None);
        }
    }

    const REPLY: Counts = Counts {
        flows_opened: 0,
        flows_answered: 0,
        flows_rejected: 0,
        requests: 0,
        replies: 1,
    };

    #[test]
    fn a_server_that_only_repeats_itself_is_silent_unless_udp_is_among_it() {
        for (is_tcp, is_silent) in [(true, true), (false, false)] {
            let mut scene = Scene::new(Passive {
                counts_requests: is_tcp,
                ..limits()
            });
            scene.look(opened(5));
            let found = (0..20).find_map(|_| scene.look(REPLY));
            assert_eq!(found.is_some(), is_silent);
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
        /// Whatever else comes, a backend that accepts more flows than it rejects is beyond suspicion.
        #[test]
        fn a_backend_that_accepts_flows_is_never_suspected(news in prop::collection::vec(any_counts(), 0..200)) {
            let mut scene = Scene::new(limits());
            for mut new in news {
                new.flows_answered = new.flows_rejected + 1;
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
            ], 1..40),
            is_tcp: bool,
        ) {
            let mut scene = Scene::new(Passive { counts_requests: is_tcp, ..limits() });
            for end in 1..=news.len() {
                let found = scene.look(news[end - 1]);
                let past = &news[..end];
                // More than these are forgotten: see `surplus`.
                let surplus = past.iter().fold(0_u64, |surplus, new| {
                    (surplus + new.flows_rejected).saturating_sub(new.flows_answered).min(10)
                });
                let is_answer = |new: &Counts| {
                    if is_tcp { new.flows_answered + new.flows_rejected > 0 } else { new.replies > 0 }
                };
                let since_reply = past.iter().rposition(is_answer).map_or(0, |at| at + 1);
                // Those that have waited for the window: ten looks.
                let waited = end.saturating_sub(10).max(since_reply);
                let silent: u64 = past[since_reply..waited].iter().map(|new| new.flows_opened).sum();
                let expected = if surplus >= 5 {
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
