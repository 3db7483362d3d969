//! Which backends of a group serve now: its tiers, the nearest first.

use forwarder_common::maglev::Entry;

/// The tier of a backup group's backends: behind all others.
pub const BACKUP: u8 = u8::MAX;

/// A backend as far as tiers are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub entry: Entry,
    /// 0 is the nearest.
    pub tier: u8,
    /// As configured or ordered, of whatever health.
    pub weight: u16,
    /// Is it healthy, and not drained?
    pub takes_flows: bool,
}

/// The backends for a group's table, and those for the one behind it.
///
/// Tiers 0 to k are used together, k being the smallest for which the weight of their backends that take flows is above
/// zero and at least `min_healthy_percent` of the weight of all backends of tier 0; all tiers if that is true of none.
/// The next tier that has a backend that takes flows is for those that none of the first has room for.
pub fn choose(candidates: &[Candidate], min_healthy_percent: u8) -> (Vec<Entry>, Vec<Entry>) {
    let weight = |candidates: &mut dyn Iterator<Item = &Candidate>| -> u64 {
        candidates.map(|candidate| u64::from(candidate.weight)).sum()
    };
    let nearest = weight(&mut candidates.iter().filter(|candidate| candidate.tier == 0));
    let is_enough = |tier: u8| {
        let serving = weight(
            &mut candidates
                .iter()
                .filter(|candidate| candidate.takes_flows && candidate.tier <= tier),
        );
        serving > 0 && serving * 100 >= u64::from(min_healthy_percent) * nearest
    };
    let mut tiers: Vec<u8> = candidates.iter().map(|candidate| candidate.tier).collect();
    tiers.sort_unstable();
    tiers.dedup();
    let last = tiers
        .iter()
        .copied()
        .find(|tier| is_enough(*tier))
        .unwrap_or(BACKUP);
    let serving = |of: &dyn Fn(u8) -> bool| -> Vec<Entry> {
        candidates
            .iter()
            .filter(|candidate| candidate.takes_flows && of(candidate.tier))
            .map(|candidate| candidate.entry)
            .collect()
    };
    let beyond = tiers
        .iter()
        .copied()
        .find(|tier| *tier > last && !serving(&|other| other == *tier).is_empty());
    let overflow = beyond.map_or_else(Vec::new, |tier| serving(&|other| other == tier));
    (serving(&|tier| tier <= last), overflow)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates by number: tier, weight, whether they take flows.
    fn candidates(of: &[(u8, u16, bool)]) -> Vec<Candidate> {
        (0..)
            .zip(of)
            .map(|(value, (tier, weight, takes_flows))| Candidate {
                entry: Entry {
                    value,
                    identity: u64::from(value),
                    weight: u32::from(*weight),
                },
                tier: *tier,
                weight: *weight,
                takes_flows: *takes_flows,
            })
            .collect()
    }

    fn chosen(of: &[(u8, u16, bool)], percent: u8) -> (Vec<u32>, Vec<u32>) {
        let (first, overflow) = choose(&candidates(of), percent);
        let numbers = |entries: Vec<Entry>| entries.iter().map(|entry| entry.value).collect();
        (numbers(first), numbers(overflow))
    }

    #[test]
    fn the_next_tier_waits_until_nobody_of_the_nearest_is_left() {
        let up = [(0, 1, true), (0, 1, true), (1, 1, true), (2, 1, true)];
        assert_eq!(chosen(&up, 0), (vec![0, 1], vec![2]));
        let half = [(0, 1, false), (0, 1, true), (1, 1, true)];
        assert_eq!(chosen(&half, 0), (vec![1], vec![2]));
        let none = [(0, 1, false), (0, 1, false), (1, 1, false), (2, 1, true)];
        assert_eq!(chosen(&none, 0), (vec![3], vec![]));
        assert_eq!(chosen(&[(0, 1, false), (1, 1, false)], 0), (vec![], vec![]));
    }

    #[test]
    fn the_next_tier_helps_when_too_few_are_healthy() {
        // The example of docs/configuration.md: 3 of 4 are 75 %, 2 of 4 are 50 %.
        let local = |healthy: usize| {
            let mut all: Vec<_> = (0..4).map(|number| (0, 100, number < healthy)).collect();
            all.extend([(1, 100, true), (1, 100, true), (BACKUP, 1, true)]);
            all
        };
        assert_eq!(chosen(&local(3), 60), (vec![0, 1, 2], vec![4, 5]));
        assert_eq!(chosen(&local(2), 60), (vec![0, 1, 4, 5], vec![6]));
        assert_eq!(chosen(&local(0), 60), (vec![4, 5, 6], vec![]));
        assert_eq!(chosen(&local(0), 50), (vec![4, 5], vec![6]));
    }

    #[test]
    fn the_overflow_is_for_a_tier_that_serves() {
        let gap = [(0, 1, true), (1, 1, false), (2, 1, true)];
        assert_eq!(chosen(&gap, 0), (vec![0], vec![2]));
        assert_eq!(chosen(&[(0, 1, true)], 100), (vec![0], vec![]));
    }
}
