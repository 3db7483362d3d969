//! How long things took, as numbers of events by duration: a mean would hide the few that took long.
//!
//! All histograms share one row of bounds, from a tenth of a millisecond to ten seconds in steps of about three. That is
//! fine enough to tell a slow path from a fast one, and few enough series for a histogram per backend group.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Upper bounds, in seconds.
const BOUNDS_SECS: [f64; 11] = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// Numbers of events by how long they took, since the agent's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Histogram {
    /// By bound; an event is counted in one bucket only.
    pub buckets: Vec<Bucket>,
    /// Events that took longer than the last bucket's bound.
    pub longer: u64,
    /// All durations together, in seconds.
    pub sum_secs: f64,
}

/// Events that took no longer than this, and longer than the bucket before allows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Bucket {
    pub up_to_secs: f64,
    pub count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        let empty = |up_to_secs| Bucket { up_to_secs, count: 0 };
        Self {
            buckets: BOUNDS_SECS.map(empty).to_vec(),
            longer: 0,
            sum_secs: 0.0,
        }
    }
}

impl Histogram {
    /// Counts an event.
    pub fn observe(&mut self, took: Duration) {
        let secs = took.as_secs_f64();
        self.sum_secs += secs;
        match self.buckets.iter_mut().find(|bucket| secs <= bucket.up_to_secs) {
            Some(bucket) => bucket.count += 1,
            None => self.longer += 1,
        }
    }

    /// How many events there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.longer + self.buckets.iter().map(|bucket| bucket.count).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_counted_once_in_the_bucket_of_its_duration() {
        let mut histogram = Histogram::default();
        for micros in [0, 100, 101, 1_000_000, 10_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let counts: Vec<u64> = histogram.buckets.iter().map(|bucket| bucket.count).collect();
        assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!((histogram.longer, histogram.count()), (1, 5));
        assert!((histogram.sum_secs - 11.000_202).abs() < 1e-9, "{histogram:?}");
    }

    #[test]
    fn bounds_ascend() {
        assert!(BOUNDS_SECS.is_sorted());
    }
}
