//! The table of a group that selects in turn: one cycle, in which each backend has as many turns as its weight says,
//! spread evenly.

use forwarder_common::{abi::backend::BackendId, maglev::Entry};

/// One cycle of at most `size` turns; empty when no entry has a weight. `entries` are sorted by identity, so that the
/// result does not depend on the configuration's order.
///
/// Weights are divided by their greatest common divisor; if their sum is larger than `size`, they are rounded down
/// to what fits, but nobody with a weight goes without a turn.
pub fn cycle(entries: &[Entry], size: u32) -> Vec<BackendId> {
    let divisor = entries
        .iter()
        .fold(0, |divisor, entry| gcd(divisor, entry.weight));
    if divisor == 0 {
        return Vec::new();
    }
    let weighted = entries.iter().filter(|entry| entry.weight > 0);
    let sum: u64 = weighted
        .clone()
        .map(|entry| u64::from(entry.weight / divisor))
        .sum();
    let spare = u64::from(size).saturating_sub(weighted.clone().count() as u64);
    let turns_of = |entry: &Entry| {
        let weight = u64::from(entry.weight / divisor);
        if sum <= u64::from(size) {
            weight
        } else {
            1 + weight * spare / sum
        }
    };
    // A backend's turns are 1 / turns of the cycle apart. The first is the later the further back the backend stands,
    // or those with the same weight would all be due together. In 2^-32 of the cycle, which keeps a million slots
    // apart.
    let count = weighted.clone().count() as u64;
    let mut due: Vec<(u64, BackendId)> = (0..)
        .zip(weighted)
        .flat_map(|(place, entry)| {
            let turns = turns_of(entry);
            let first = ((2 * place + 1) << 31) / count;
            (0..turns).map(move |turn| (((turn << 32) + first) / turns, BackendId(entry.value)))
        })
        .collect();
    // Stable: of those due at once, the identity decides.
    due.sort_by_key(|(at, _)| *at);
    due.into_iter().map(|(_, id)| id).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(weights: &[u32]) -> Vec<Entry> {
        (0..)
            .zip(weights)
            .map(|(number, weight)| Entry {
                value: number,
                identity: u64::from(number),
                weight: *weight,
            })
            .collect()
    }

    fn numbers(weights: &[u32], size: u32) -> Vec<u32> {
        cycle(&entries(weights), size)
            .into_iter()
            .map(|id| id.0)
            .collect()
    }

    #[test]
    fn turns_are_spread_over_the_cycle() {
        assert_eq!(numbers(&[1, 1, 1], 1021), [0, 1, 2]);
        assert_eq!(numbers(&[500, 100, 100], 1021), [0, 0, 0, 1, 0, 0, 2]);
        assert_eq!(numbers(&[3, 0, 1], 1021), [0, 0, 0, 2]);
        assert_eq!(numbers(&[1, 1, 1, 1, 4], 1021), [0, 4, 1, 4, 2, 3, 4, 4]);
    }

    #[test]
    fn without_a_weight_there_is_no_turn() {
        assert!(numbers(&[0, 0], 1021).is_empty());
        assert!(numbers(&[], 1021).is_empty());
    }

    proptest! {
        #[test]
        fn shares_follow_weights_and_nobody_waits_long(weights in prop::collection::vec(0u32..=65535, 1..40)) {
            const SIZE: u32 = 4093;
            let turns = numbers(&weights, SIZE);
            prop_assert!(turns.len() <= SIZE as usize);
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            for (number, weight) in (0..).zip(&weights) {
                let places: Vec<_> = (0..).zip(&turns).filter(|(_, turn)| **turn == number).map(|(place, _)| place).collect();
                prop_assert_eq!(places.is_empty(), *weight == 0);
                if *weight == 0 {
                    continue;
                }
                let share = places.len() as f64 / turns.len() as f64;
                prop_assert!((share - f64::from(*weight) / total as f64).abs() < 0.011, "{share} for {weight} of {total}");
                // Never two turns further apart than twice the mean, and as many as there are backends.
                let mean = turns.len() as f64 / places.len() as f64;
                let gaps = places.windows(2).map(|pair: &[usize]| pair[1] - pair[0]);
                prop_assert!(gaps.max().unwrap_or(0) as f64 <= 2.0 * mean + weights.len() as f64);
            }
        }
    }
}
