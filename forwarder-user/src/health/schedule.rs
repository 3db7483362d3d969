//! When a target is probed: a fixed cadence whose phase comes from the target's name.
//!
//! Probes of one target start `interval` apart, on a grid. Each target's grid is shifted by a phase between 0
//! and its interval, a hash of its name, so that 10 000 backends at 2 s make 5 probes a millisecond and never
//! a burst; the same targets get the same phases at each start, which makes a capture comparable with
//! yesterday's. The *first* probes don't wait for the grid, as a starting gateway has no backends until they
//! return: they are spread over [`START_WINDOW`] in the order of their phases.
//!
//! Each probe is some way off its point of the grid, the *jitter*, which differs from point to point: gateways that
//! have the same configuration and started at the same moment do not ask a server in step for ever. It is a hash as
//! well, and at most a quarter of the interval, so that two probes on the grid are never closer than half an interval.
//!
//! A probe that takes longer than its interval (the timeout may be longer) skips grid points: there is never
//! more than one probe of a target under way. Where the timeout is not longer than the interval, an outage is
//! found within fall × interval + timeout of its begin.
//!
//! Pure: no clock is read here.

use std::{
    hash::{DefaultHasher, Hash, Hasher as _},
    time::Duration,
};

use tokio::time::Instant;

/// The first probes of all targets start within this time, or within their interval if that is shorter.
pub const START_WINDOW: Duration = Duration::from_millis(200);

/// The grid of one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cadence {
    interval: Duration,
    /// Shift of the grid, below `interval`.
    phase: Duration,
    /// Where in `0..1` of its interval the phase lies, in units of 2^-32.
    fraction: u32,
    /// How far off the grid a probe may be, at most a quarter of `interval`.
    jitter: Duration,
    /// What the jitter of each point is derived from.
    seed: u64,
}

impl Cadence {
    /// The cadence of the target that `name` identifies. An `interval` of 0 counts as 1 ms, a jitter of more than 25 %
    /// as that.
    #[must_use]
    pub fn new(interval: Duration, jitter_percent: u32, name: &impl Hash) -> Self {
        let interval = interval.max(Duration::from_millis(1));
        // Keys of `new` are fixed, so the phases are the same at each start.
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let seed = hasher.finish();
        let fraction = (seed >> 32) as u32;
        Self {
            interval,
            phase: scale(interval, fraction),
            fraction,
            jitter: interval * jitter_percent.min(25) / 100,
            seed,
        }
    }

    /// When the first probe of a target starts that was added at `added`.
    #[must_use]
    pub fn first(&self, added: Instant) -> Instant {
        added + scale(self.interval.min(START_WINDOW), self.fraction)
    }

    /// When the probe after one that began at `began` and ended at `ended` starts: at the first point of the
    /// grid, counted from `epoch`, that is not before `ended` and at least half an interval after `began`
    /// (the first probe is off the grid, and two probes close together would tell nothing new); or the jitter before or
    /// after it, but never before `ended`.
    #[must_use]
    pub fn next(&self, epoch: Instant, began: Instant, ended: Instant) -> Instant {
        let origin = epoch + self.phase;
        let earliest = ended.max(began + self.interval / 2);
        let since = earliest.saturating_duration_since(origin).as_nanos();
        let interval = self.interval.as_nanos();
        let points = since.div_ceil(interval);
        let point = origin + Duration::from_nanos(u64::try_from(points * interval).unwrap_or(u64::MAX));
        if self.jitter.is_zero() {
            return point;
        }
        let mut hasher = DefaultHasher::new();
        (self.seed, points).hash(&mut hasher);
        let offset = scale(2 * self.jitter, (hasher.finish() >> 32) as u32);
        (point + offset)
            .checked_sub(self.jitter)
            .unwrap_or(point)
            .max(ended)
    }
}

/// `whole` × `fraction` / 2^32.
fn scale(whole: Duration, fraction: u32) -> Duration {
    let nanos = (whole.as_nanos() * u128::from(fraction)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ten_thousand_targets_never_burst() {
        let interval = Duration::from_secs(2);
        let epoch = Instant::now();
        let mut first_per_ms = [0_u32; 200];
        let mut grid_per_10_ms = [0_u32; 200];
        for number in 0..10_000 {
            let cadence = Cadence::new(interval, 10, &("web", format!("backend-{number}")));
            let first = cadence.first(epoch);
            first_per_ms[(first - epoch).as_millis() as usize] += 1;
            let next = cadence.next(epoch, first, first);
            grid_per_10_ms[((next - epoch).as_millis() % 2000) as usize / 10] += 1;
        }
        // The mean is 50 per bucket; a Poisson bucket passes 100 once in 10^10.
        assert!(
            first_per_ms.iter().all(|count| (10..100).contains(count)),
            "{first_per_ms:?}"
        );
        assert!(
            grid_per_10_ms.iter().all(|count| (10..100).contains(count)),
            "{grid_per_10_ms:?}"
        );
    }

    #[test]
    fn the_phase_depends_on_the_name_only() {
        let interval = Duration::from_secs(1);
        assert_eq!(
            Cadence::new(interval, 10, &("web", "a")),
            Cadence::new(interval, 10, &("web", "a"))
        );
        assert_ne!(
            Cadence::new(interval, 10, &("web", "a")),
            Cadence::new(interval, 10, &("web", "b"))
        );
    }

    proptest! {
        #[test]
        fn starts_promptly_and_stays_on_the_grid(
            interval_ms in 100_u64..300_000,
            timeout_ms in 0_u64..300_000,
            name in ".{0,12}",
        ) {
            let interval = Duration::from_millis(interval_ms);
            let took = Duration::from_millis(timeout_ms);
            let epoch = Instant::now();
            let cadence = Cadence::new(interval, 0, &name);

            let first = cadence.first(epoch);
            prop_assert!(first - epoch < START_WINDOW.min(interval));

            let second = cadence.next(epoch, first, first);
            prop_assert!(second - first >= interval / 2);
            prop_assert!(second - first <= interval * 3 / 2);

            // On the grid, quick probes are one interval apart; slow ones a whole number of intervals.
            prop_assert_eq!(cadence.next(epoch, second, second) - second, interval);
            let third = cadence.next(epoch, second, second + took);
            prop_assert!(third >= second + took);
            prop_assert!(third - (second + took) <= interval);
            prop_assert_eq!((third - second).as_nanos() % interval.as_nanos(), 0);
        }

        #[test]
        fn jitter_moves_probes_but_never_close_together(
            interval_ms in 100_u64..300_000,
            jitter_percent in 1_u32..=25,
            name in ".{0,12}",
        ) {
            let interval = Duration::from_millis(interval_ms);
            let jitter = interval * jitter_percent / 100;
            let epoch = Instant::now();
            let grid = Cadence::new(interval, 0, &name);
            let cadence = Cadence::new(interval, jitter_percent, &name);
            let mut began = cadence.first(epoch);
            let mut point = grid.next(epoch, began, began);
            let mut offsets = Vec::new();
            for round in 0..20 {
                let next = cadence.next(epoch, began, began);
                prop_assert!(next + jitter >= point && next <= point + jitter);
                let least = if round == 0 { interval / 4 } else { interval / 2 };
                // Parts of the interval are rounded to nanoseconds.
                prop_assert!(next - began + Duration::from_nanos(9) >= least);
                offsets.push(next + jitter - point);
                began = next;
                point += interval;
            }
            // Not all the same: they are spread over twice the jitter.
            let spread = *offsets.iter().max().unwrap_or(&jitter) - *offsets.iter().min().unwrap_or(&jitter);
            prop_assert!(spread > jitter / 2, "{:?}", offsets);
        }
    }
}
