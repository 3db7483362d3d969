//! SipHash-2-4 (Aumasson and Bernstein, 2012): a keyed hash that nobody can forge who does not know the key.
//!
//! Over whole 64-bit words, which is all that SYN cookies need; the bytes of a word count from the lowest. A word at a
//! time, as in BPF there is neither memory to gather a message in nor a loop that costs the verifier nothing.

const START: [u64; 4] = [
    0x736f_6d65_7073_6575,
    0x646f_7261_6e64_6f6d,
    0x6c79_6765_6e65_7261,
    0x7465_6462_7974_6573,
];

/// A hash under way.
#[derive(Clone, Copy, Debug)]
pub struct SipHash {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    /// Words so far.
    count: u64,
}

impl SipHash {
    /// A hash under this key.
    #[inline(always)]
    pub const fn new(key: [u64; 2]) -> Self {
        let ([low, high], [a, b, c, d]) = (key, START);
        Self {
            a: a ^ low,
            b: b ^ high,
            c: c ^ low,
            d: d ^ high,
            count: 0,
        }
    }

    /// With one more word.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, word: u64) -> Self {
        let mut next = self.mixed(word);
        next.count = self.count + 1;
        next
    }

    /// The hash of the words so far.
    #[inline(always)]
    pub const fn finish(self) -> u64 {
        let mut last = self.mixed((self.count * 8) << 56);
        last.c ^= 0xff;
        let last = last.round().round().round().round();
        last.a ^ last.b ^ last.c ^ last.d
    }

    #[inline(always)]
    const fn mixed(self, word: u64) -> Self {
        let mut next = self;
        next.d ^= word;
        next = next.round().round();
        next.a ^= word;
        next
    }

    #[inline(always)]
    const fn round(self) -> Self {
        let Self {
            mut a,
            mut b,
            mut c,
            mut d,
            count,
        } = self;
        a = a.wrapping_add(b);
        c = c.wrapping_add(d);
        b = b.rotate_left(13) ^ a;
        d = d.rotate_left(16) ^ c;
        a = a.rotate_left(32);
        c = c.wrapping_add(b);
        a = a.wrapping_add(d);
        b = b.rotate_left(17) ^ c;
        d = d.rotate_left(21) ^ a;
        c = c.rotate_left(32);
        Self { a, b, c, d, count }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The paper's appendix A has fifteen bytes; of the authors' own list (`vectors_sip64`) these are whole words: the
    /// bytes 0, 1, 2, … under the key 0 to 15.
    #[test]
    fn the_vectors_of_its_authors() {
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let none = SipHash::new(key);
        assert_eq!(
            none.finish().to_le_bytes(),
            [0x31, 0x0e, 0x0e, 0xdd, 0x47, 0xdb, 0x6f, 0x72]
        );
        let one = none.with(key[0]);
        assert_eq!(
            one.finish().to_le_bytes(),
            [0x62, 0x24, 0x93, 0x9a, 0x79, 0xf5, 0xf5, 0x93]
        );
    }

    proptest! {
        #[test]
        #[expect(deprecated, reason = "the standard library has this very function and wants nobody to rely on it")]
        fn it_is_that_of_the_standard_library(key: [u64; 2], words in proptest::collection::vec(any::<u64>(), 0..9)) {
            use core::hash::{Hasher as _, SipHasher};
            let mut theirs = SipHasher::new_with_keys(key[0], key[1]);
            words.iter().for_each(|word| theirs.write_u64(word.to_le()));
            let ours = words.iter().fold(SipHash::new(key), |hash, word| hash.with(*word));
            prop_assert_eq!(ours.finish(), theirs.finish());
        }
    }
}
