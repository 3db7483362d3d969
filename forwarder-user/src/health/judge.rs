//! Turns probe results into health: a pure rise and fall machine, one per backend.
//!
//! A healthy backend becomes unhealthy after `fall` failures in a row, an unhealthy one healthy after
//! `rise` successes in a row, so that one lost packet takes nobody out and one lucky answer takes nobody
//! back in. The *first* result decides at once. Before it nothing is known: waiting rise × interval
//! would leave a freshly started gateway without backends for seconds although all of them answer, and
//! taking an unknown backend as healthy would send it the first clients. A first verdict that was bad luck
//! is corrected by the next probes like any other.
//!
//! No clock and no I/O: when to probe is `schedule`'s business, how is `tcp`'s and `http`'s.

use std::fmt;

/// Whether a backend takes new flows, as far as its probes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    Healthy,
    Unhealthy,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        })
    }
}

/// The rise and fall machine of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judge {
    rise: u32,
    fall: u32,
    health: Option<Health>,
    /// Results in a row that contradict `health`; below the threshold that would turn it.
    contradictions: u32,
}

impl Judge {
    /// A judge that knows nothing yet.
    ///
    /// `rise`: successes in a row that make an unhealthy backend healthy; `fall`: failures in a row that make a
    /// healthy one unhealthy. 0 counts as 1.
    #[must_use]
    pub fn new(rise: u32, fall: u32) -> Self {
        Self {
            rise: rise.max(1),
            fall: fall.max(1),
            health: None,
            contradictions: 0,
        }
    }

    /// A judge that goes on from an earlier one's verdict; see [`Self::new`].
    #[must_use]
    pub fn knowing(rise: u32, fall: u32, health: Option<Health>) -> Self {
        Self {
            health,
            ..Self::new(rise, fall)
        }
    }

    /// The same verdict under new thresholds; the run of contradictions starts over.
    #[must_use]
    pub fn with_thresholds(&self, rise: u32, fall: u32) -> Self {
        Self {
            health: self.health,
            ..Self::new(rise, fall)
        }
    }

    /// Unhealthy from now on, until the next result: a success is enough, a failure starts the run of successes over.
    pub fn doubt(&mut self) {
        self.health = Some(Health::Unhealthy);
        self.contradictions = self.rise - 1;
    }

    /// Takes one result into account; `Some(new health)` if it changed the verdict, which the first result
    /// always does.
    pub fn observe(&mut self, passed: bool) -> Option<Health> {
        let seen = if passed {
            Health::Healthy
        } else {
            Health::Unhealthy
        };
        if self.health == Some(seen) {
            self.contradictions = 0;
            return None;
        }
        let needed = match self.health {
            None => 1,
            Some(Health::Unhealthy) => self.rise,
            Some(Health::Healthy) => self.fall,
        };
        self.contradictions += 1;
        if self.contradictions < needed {
            return None;
        }
        self.contradictions = 0;
        self.health = Some(seen);
        self.health
    }

    /// The verdict so far; `None` before the first result.
    #[must_use]
    pub fn health(&self) -> Option<Health> {
        self.health
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_result_decides_at_once() {
        assert_eq!(Judge::new(10, 10).observe(true), Some(Health::Healthy));
        assert_eq!(Judge::new(10, 10).observe(false), Some(Health::Unhealthy));
    }

    #[test]
    fn falls_after_fall_failures_in_a_row_and_rises_after_rise_successes() {
        let mut judge = Judge::new(2, 3);
        judge.observe(true);
        assert_eq!(
            [false, false, true].map(|passed| judge.observe(passed)),
            [None; 3]
        );
        let fallen = [false, false, false].map(|passed| judge.observe(passed));
        assert_eq!(fallen, [None, None, Some(Health::Unhealthy)]);
        assert_eq!([true, false, true].map(|passed| judge.observe(passed)), [None; 3]);
        assert_eq!(judge.observe(true), Some(Health::Healthy));
    }

    #[test]
    fn new_thresholds_keep_the_verdict_and_forget_the_run() {
        let mut judge = Judge::new(1, 3);
        judge.observe(true);
        judge.observe(false);
        judge.observe(false);
        let mut judge = judge.with_thresholds(1, 2);
        assert_eq!(judge.health(), Some(Health::Healthy));
        assert_eq!(judge.observe(false), None);
        assert_eq!(judge.observe(false), Some(Health::Unhealthy));
    }

    /// The rule in its plainest form, over the whole history: the verdict turns when, and only when, the last
    /// `threshold` results since the previous turn all contradict it.
    fn by_definition(rise: u32, fall: u32, history: &[bool]) -> Option<Health> {
        let mut health = None;
        let mut turned_at = 0;
        for end in 1..=history.len() {
            let threshold = match health {
                None => 1,
                Some(Health::Unhealthy) => rise as usize,
                Some(Health::Healthy) => fall as usize,
            };
            let since = &history[turned_at..end];
            let opposite = match health {
                None => history[end - 1],
                Some(now) => now == Health::Unhealthy,
            };
            if since.len() >= threshold
                && since[since.len() - threshold..]
                    .iter()
                    .all(|seen| *seen == opposite)
            {
                health = Some(if opposite {
                    Health::Healthy
                } else {
                    Health::Unhealthy
                });
                turned_at = end;
            }
        }
        health
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            rise in 1_u32..=10,
            fall in 1_u32..=10,
            history in prop::collection::vec(any::<bool>(), 0..200),
        ) {
            let mut judge = Judge::new(rise, fall);
            for (index, passed) in history.iter().enumerate() {
                let before = judge.health();
                let transition = judge.observe(*passed);
                prop_assert_eq!(judge.health(), by_definition(rise, fall, &history[..=index]));
                // A transition is reported exactly when the verdict changes, and names the new one.
                prop_assert_eq!(transition.is_some(), before != judge.health());
                prop_assert!(transition.is_none() || transition == judge.health());
            }
        }

        #[test]
        fn runs_shorter_than_the_threshold_change_nothing(
            rise in 2_u32..=10,
            fall in 2_u32..=10,
            rounds in 1_usize..50,
            healthy in any::<bool>(),
        ) {
            let mut judge = Judge::new(rise, fall);
            judge.observe(healthy);
            let short = if healthy { fall } else { rise } - 1;
            for _ in 0..rounds {
                for _ in 0..short {
                    prop_assert_eq!(judge.observe(!healthy), None);
                }
                prop_assert_eq!(judge.observe(healthy), None);
            }
        }
    }

    #[test]
    fn a_doubted_target_needs_one_success_or_all_of_them() {
        let mut judge = Judge::knowing(3, 2, Some(Health::Healthy));
        judge.doubt();
        assert_eq!(judge.health(), Some(Health::Unhealthy));
        assert_eq!(judge.observe(true), Some(Health::Healthy));
        judge.doubt();
        let results = [false, true, true, true].map(|passed| judge.observe(passed));
        assert_eq!(results, [None, None, None, Some(Health::Healthy)]);
    }
}
