//! The Internet checksum: RFC 1071 (sum), RFC 1624 (update), RFC 1141 (history).
//!
//! Bytes are never swapped here. The one's-complement sum commutes with a byte swap (RFC 1071 §2(B)): summing
//! 16-bit words as the machine reads them and storing the result as the machine writes it gives the same bytes
//! on the wire on every machine. So all words come from [`Be16::raw`] and [`Be32::raw`], and all sums are in
//! that "machine order".
//!
//! There are two zeros in one's complement. RFC 1624 §3: an update must use `HC' = ~(~HC + ~m + m')`, which
//! cannot turn a valid checksum into the wrong zero. A [`Delta`] is the part `~m + m'`, so one flow's delta
//! can be computed once and added to every packet.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32, IpAddress, Ipv4Address};

/// Adds the carries of a 32-bit accumulator back in until 16 bits are left (RFC 1071 §2).
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum that belongs to a sum: its complement.
#[inline(always)]
pub const fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// Sum of bytes in machine order; an odd last byte is padded with zero (RFC 1071 §4.1). For tests and short
/// constant lengths: packets go through [`crate::datapath::Packet`].
#[inline(always)]
pub fn sum_bytes(bytes: &[u8]) -> u32 {
    let mut sum = 0u32;
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u32::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = *words.remainder() {
        sum += u32::from(u16::from_ne_bytes([last, 0]));
    }
    sum
}

/// What replacing words changes in a one's-complement sum: the folded sum of `~m + m'` (RFC 1624 §3).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Delta(u32);

impl Delta {
    /// Nothing changed.
    pub const ZERO: Self = Self(0);

    /// From its stored form.
    #[inline(always)]
    pub const fn from_folded(folded: u16) -> Self {
        Self(folded as u32)
    }

    /// The form that is stored: 16 bits.
    #[inline(always)]
    pub const fn folded(self) -> u16 {
        fold(self.0)
    }

    /// The delta of the opposite replacement.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self((!self.folded()) as u32)
    }

    /// Also replaces a 16-bit word. At most a dozen replacements fit before the accumulator could overflow
    /// 32 bits; the walk uses six.
    #[inline(always)]
    pub const fn replace16(self, old: Be16, new: Be16) -> Self {
        self.replace_raw(old.raw(), new.raw())
    }

    /// Also replaces a 16-bit word given in machine order.
    #[inline(always)]
    pub const fn replace_raw(self, old: u16, new: u16) -> Self {
        Self(self.0 + (!old) as u32 + new as u32)
    }

    /// Also replaces a 32-bit word.
    #[inline(always)]
    pub const fn replace32(self, old: Be32, new: Be32) -> Self {
        let (old, new) = (old.raw(), new.raw());
        self.replace_raw(old as u16, new as u16)
            .replace_raw((old >> 16) as u16, (new >> 16) as u16)
    }

    /// Also replaces an address.
    #[inline(always)]
    pub const fn replace_address(self, old: IpAddress, new: IpAddress) -> Self {
        // Folded in between, so that the accumulator has room for the other words of a packet.
        let [a, b, c, d] = old.0;
        let [e, f, g, h] = new.0;
        let delta = self
            .replace32(a, e)
            .replace32(b, f)
            .replace32(c, g)
            .replace32(d, h);
        Self(delta.folded() as u32)
    }

    /// Both changes.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(fold(self.0) as u32 + fold(other.0) as u32)
    }

    /// The updated checksum field: `~(~HC + ~m + m')`.
    #[inline(always)]
    pub const fn apply(self, checksum: Be16) -> Be16 {
        Be16::from_raw(finish((!checksum.raw()) as u32 + fold(self.0) as u32))
    }

    /// The updated field where it holds a sum that is *not* complemented: the pseudo-header sum that a sender
    /// with checksum offload leaves for its device.
    #[inline(always)]
    pub const fn apply_to_partial(self, sum: Be16) -> Be16 {
        Be16::from_raw(fold(sum.raw() as u32 + fold(self.0) as u32))
    }
}

/// Sum of the pseudo-header in machine order (RFC 9293 §3.1, RFC 768, RFC 8200 §8.1): source, destination, protocol,
/// length of transport header and payload in bytes.
#[inline(always)]
pub const fn pseudo_header(source: IpAddress, destination: IpAddress, protocol: u8, len: u32) -> u32 {
    fold(sum_address(source) + sum_address(destination)) as u32
        + u16::from_ne_bytes([0, protocol]) as u32
        + Be16::new(len as u16).raw() as u32
        + Be16::new((len >> 16) as u16).raw() as u32
}

/// [`pseudo_header`] of IPv4.
#[inline(always)]
pub const fn pseudo_header_v4(source: Ipv4Address, destination: Ipv4Address, protocol: u8, len: u32) -> u32 {
    sum32(source.0)
        + sum32(destination.0)
        + u16::from_ne_bytes([0, protocol]) as u32
        + Be16::new(len as u16).raw() as u32
}

#[inline(always)]
const fn sum_address(address: IpAddress) -> u32 {
    let [a, b, c, d] = address.0;
    sum32(a) + sum32(b) + sum32(c) + sum32(d)
}

#[inline(always)]
const fn sum32(word: Be32) -> u32 {
    (word.raw() & 0xffff) + (word.raw() >> 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 §3 computes this example by hand: sum ddf2, checksum 220d.
    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Be16::from_raw(fold(sum_bytes(&bytes))).get(), 0xddf2);
        assert_eq!(Be16::from_raw(finish(sum_bytes(&bytes))).get(), 0x220d);
    }

    /// RFC 1624 §4: HC = dd2f, m = 5555, m' = 3285 must give 0000, where RFC 1141 gave ffff.
    #[test]
    fn the_counterexample_of_rfc_1624() {
        let delta = Delta::ZERO.replace16(Be16::new(0x5555), Be16::new(0x3285));
        assert_eq!(delta.apply(Be16::new(0xdd2f)).get(), 0x0000);
    }

    proptest! {
        #[test]
        fn an_update_equals_a_recomputation(mut words: [u16; 8], new: u32, fresh: u16) {
            // A header is never all zeros, so its sum never is; RFC 1624 §3 relies on it.
            words[7] |= 1;
            let sum = |words: &[u16; 8]| finish(words.iter().map(|word| u32::from(*word)).sum());
            let before = Be16::from_raw(sum(&words));
            let (old32, old16) = (Be32::from_raw(u32::from(words[0]) | u32::from(words[1]) << 16), words[2]);
            let delta = Delta::ZERO.replace32(old32, Be32::from_raw(new)).replace_raw(old16, fresh);
            words[0] = new as u16;
            words[1] = (new >> 16) as u16;
            words[2] = fresh;
            prop_assert_eq!(delta.apply(before).raw(), sum(&words));
            prop_assert_eq!(Delta::from_folded(delta.folded()).apply(before).raw(), sum(&words));
        }

        #[test]
        fn a_reversed_delta_restores_the_checksum(checksum in 0u16..0xffff, old: u32, new: u32) {
            let delta = Delta::ZERO.replace32(Be32::from_raw(old), Be32::from_raw(new));
            let there = delta.apply(Be16::from_raw(checksum));
            prop_assert_eq!(fold(u32::from(delta.reversed().apply(there).raw())) % 0xffff, checksum % 0xffff);
        }
    }
}
