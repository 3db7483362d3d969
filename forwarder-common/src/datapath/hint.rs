//! Hints: where a packet's flow probably is.
//!
//! The flow index says it for sure, from two places in memory, each of which says where the next one is; the flow's
//! entry is the third. A hint is one place. An entry tells whose it is, so a hint may be old or wrong, and nothing
//! follows but that somebody asks the index. So there is no order to keep and nothing to clean up: the short way
//! (`datapath::express`) alone reads and writes them, of several CPUs that write a bucket at once one or none is heard.

use bytemuck::{Pod, Zeroable};

use crate::abi::flow::{Direction, FlowId, FlowKey, FlowKeyV4};

/// Hints of one bucket.
pub const WAYS: usize = 4;

/// Odd, and without a pattern: digits of the golden ratio, and of the square roots of 2, 3, 5 and 7.
const FACTORS: [u64; 5] = [
    0x9e37_79b9_7f4a_7c15,
    0x6a09_e667_f3bc_c909,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
];

/// What is compared instead of a key: of two keys the same once in 2³², within a bucket.
///
/// Not seeded. Who finds keys that share a bucket makes their packets ask the index, as all packets would without hints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// Of no packet that has a key.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    pub fn of_v4(key: &FlowKeyV4) -> Self {
        let [a, b]: [u64; 2] = bytemuck::cast(*key);
        Self::finished(a.wrapping_mul(FACTORS[0]) ^ b.wrapping_mul(FACTORS[1]).rotate_left(32))
    }

    #[inline(always)]
    pub fn of(key: &FlowKey) -> Self {
        let [a, b, c, d, e]: [u64; 5] = bytemuck::cast(*key);
        let first = a.wrapping_mul(FACTORS[0]) ^ b.wrapping_mul(FACTORS[1]).rotate_left(32);
        let second = c.wrapping_mul(FACTORS[2]) ^ d.wrapping_mul(FACTORS[3]).rotate_left(32);
        Self::finished(first.wrapping_add(second.rotate_left(16)) ^ e.wrapping_mul(FACTORS[4]))
    }

    #[inline(always)]
    const fn finished(mixed: u64) -> Self {
        let mixed = (mixed ^ mixed >> 29).wrapping_mul(FACTORS[3]);
        Self(mixed ^ mixed >> 32)
    }

    /// The number of its bucket, of 2³².
    #[inline(always)]
    pub const fn bucket(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    const fn tag(self) -> u64 {
        self.0 & 0xffff_ffff
    }
}

/// A flow and the direction of a packet of it, with what is compared.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Hint(u64);

impl Hint {
    pub const NONE: Self = Self(0);

    #[inline(always)]
    pub const fn new(fingerprint: Fingerprint, id: FlowId, direction: Direction) -> Self {
        Self(fingerprint.tag() << 32 | (id.0 as u64) << 1 & 0xffff_ffff | direction.0 as u64)
    }

    #[inline(always)]
    pub const fn id(self) -> FlowId {
        FlowId((self.0 & 0xffff_ffff) as u32 >> 1)
    }

    #[inline(always)]
    pub const fn direction(self) -> Direction {
        Direction(self.0 as u32 & 1)
    }

    /// All ones if it has this tag, else zero: without a branch, as nobody can foretell in which way a hint stands.
    #[inline(always)]
    const fn mask(self, tag: u64) -> u64 {
        let difference = self.0 >> 32 ^ tag;
        // Below 2³²: only of zero does one less have the highest bit.
        ((difference.wrapping_sub(1) as i64) >> 63) as u64
    }
}

/// One bucket: the hints that were asked for last, the latest first.
#[repr(C, align(32))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Hints([u64; WAYS]);

impl Hints {
    /// The hint with this fingerprint, or [`Hint::NONE`]. Of two the bits of both, which is a wrong hint.
    #[inline(always)]
    pub fn find(&self, fingerprint: Fingerprint) -> Hint {
        let tag = fingerprint.tag();
        let mut found = 0;
        for hint in self.0 {
            found |= hint & Hint(hint).mask(tag);
        }
        Hint(found)
    }

    /// Adds a hint, in the place of the oldest.
    #[inline(always)]
    pub fn note(&mut self, hint: Hint) {
        let [first, second, third, _] = self.0;
        self.0 = [hint.0, first, second, third];
    }

    /// Removes what has this fingerprint.
    #[inline(always)]
    pub fn forget(&mut self, fingerprint: Fingerprint) {
        let tag = fingerprint.tag();
        for hint in &mut self.0 {
            *hint &= !Hint(*hint).mask(tag);
        }
    }
}

/// How many buckets there are for so many flows: half as many, so that full NAT fills half of the hints and DNAT, with
/// two keys a flow, all; a power of two.
pub const fn buckets(flows: u32) -> u32 {
    flows.div_ceil(2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::{collections::HashSet, vec, vec::Vec};

    use super::*;
    use crate::wire::Be16;

    fn key(client: u32, port: u16) -> FlowKeyV4 {
        FlowKeyV4 {
            source: Ipv4Addr::from_bits(0x0a00_0000 + client).into(),
            destination: Ipv4Addr::new(198, 51, 100, 10).into(),
            source_port: Be16::new(port),
            destination_port: Be16::new(443),
            protocol: 6,
        }
    }

    fn long_key(client: u16, port: u16) -> FlowKey {
        FlowKey {
            source: Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, client).into(),
            destination: Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 1).into(),
            source_port: Be16::new(port),
            destination_port: Be16::new(443),
            protocol: 6,
        }
    }

    #[test]
    fn a_hint_says_what_was_noted_until_it_is_forgotten() {
        let fingerprints: Vec<_> = (0..6).map(|port| Fingerprint::of_v4(&key(1, port))).collect();
        let mut hints = Hints::default();
        assert_eq!(hints.find(fingerprints[0]), Hint::NONE);
        for (number, fingerprint) in (7..).zip(&fingerprints) {
            hints.note(Hint::new(*fingerprint, FlowId(number), Direction(number & 1)));
        }
        for (number, fingerprint) in (7..).zip(&fingerprints) {
            let hint = hints.find(*fingerprint);
            if number < 9 {
                assert_eq!(hint, Hint::NONE, "the oldest two made room");
            } else {
                assert_eq!(
                    (hint.id(), hint.direction()),
                    (FlowId(number), Direction(number & 1))
                );
            }
        }
        hints.forget(fingerprints[4]);
        assert_eq!(hints.find(fingerprints[4]), Hint::NONE);
        assert_eq!(hints.find(fingerprints[5]).id(), FlowId(12));
    }

    #[test]
    fn a_hint_of_the_last_flow_there_can_be_keeps_its_number() {
        let hint = Hint::new(Fingerprint(u64::MAX), FlowId(u32::MAX >> 1), Direction::REPLY);
        assert_eq!(
            (hint.id(), hint.direction()),
            (FlowId(u32::MAX >> 1), Direction::REPLY)
        );
    }

    /// No worse than thrown at random: of a Poisson distribution with the mean 2, 5.3 % are above 4.
    fn check_spread(fingerprints: impl Iterator<Item = Fingerprint>) {
        const BUCKETS: usize = 1 << 15;
        let mut counts = vec![0_u32; BUCKETS];
        let mut tags = HashSet::new();
        for fingerprint in fingerprints {
            counts[fingerprint.bucket() as usize % BUCKETS] += 1;
            tags.insert(fingerprint);
        }
        assert_eq!(tags.len(), 1 << 16, "all differ");
        let full = counts.iter().filter(|count| **count > WAYS as u32).count();
        assert!(full < 2_000, "{full} of 32768 buckets run over");
    }

    #[test]
    fn flows_of_few_clients_and_of_many_spread_over_the_buckets() {
        check_spread((0..1 << 16).map(|port: u32| Fingerprint::of_v4(&key(0, port as u16))));
        check_spread((0..1 << 16).map(|client| Fingerprint::of_v4(&key(client, 40_000))));
        check_spread(
            (0..1 << 16).map(|number| Fingerprint::of_v4(&key(number >> 8, 1024 + (number as u16 & 0xff)))),
        );
        check_spread((0..1 << 16).map(|port: u32| Fingerprint::of(&long_key(0, port as u16))));
        check_spread((0..1 << 16).map(|client: u32| Fingerprint::of(&long_key(client as u16, 40_000))));
    }

    #[test]
    fn there_is_a_bucket_for_two_flows() {
        assert_eq!(
            [1, 2, 3, 64_512, 65_536, 65_537].map(buckets),
            [1, 1, 2, 32_768, 32_768, 65_536]
        );
    }
}
