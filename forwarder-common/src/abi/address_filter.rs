//! Which addresses may concern us: Bloom filters with one hash, so that what passes by costs no lookup.
//!
//! An address that was added is always found; of those that were not, as many as there are bits set, in 4096. An address
//! stays when its listener or backend goes, as its flows go on.

use bytemuck::{Pod, Zeroable};

use crate::wire::IpAddress;

/// 64-bit words: eight cache lines, of which a packet reads one.
const WORDS: usize = 64;
/// Bits of the hash: the number of a word, and that of a bit in it.
const BITS: u32 = WORDS.ilog2() + u64::BITS.ilog2();

/// The filter; empty by default.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct AddressFilter {
    words: [u64; WORDS],
}

impl Default for AddressFilter {
    fn default() -> Self {
        Self::zeroed()
    }
}

impl AddressFilter {
    /// Adds an address.
    pub fn add(&mut self, address: IpAddress) {
        let (word, bit) = place(address);
        self.words[word] |= bit;
    }

    /// Was this address added? Yes, or perhaps.
    #[inline(always)]
    pub const fn may_have(&self, address: IpAddress) -> bool {
        let (word, bit) = place(address);
        self.words[word] & bit != 0
    }
}

/// A whole packet of TCP or UDP that none of these finds is not ours, but for those that come to the SNAT pool, which
/// tells by itself. ICMP errors are told by the packet that they quote, and fragments by that which has the ports.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct AddressFilters {
    /// VIPs: where requests go.
    pub vips: AddressFilter,
    /// Backends of groups in DNAT mode: where replies come from that are addressed to clients, so to anybody.
    pub dnat_backends: AddressFilter,
}

/// The word of an address and its bit in that. The multiplier is Knuth's for hashes of 32 bits (The Art of Computer
/// Programming, vol. 3, §6.4): 2³² divided by the golden ratio; the upper bits of the product depend on all others.
#[inline(always)]
const fn place(address: IpAddress) -> (usize, u64) {
    let [a, b, c, d] = address.0;
    let mixed = a.raw() ^ b.raw().rotate_left(8) ^ c.raw().rotate_left(16) ^ d.raw();
    let hash = mixed.wrapping_mul(0x9e37_79b1) >> (u32::BITS - BITS);
    ((hash as usize >> 6) & (WORDS - 1), 1 << (hash & 63))
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn addresses() -> impl Iterator<Item = IpAddress> {
        let v4 = (0..100).map(|last| Ipv4Addr::new(198, 51, 100, last).into());
        let v6 = (0..100).map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).into());
        v4.chain(v6)
    }

    #[test]
    fn an_address_that_was_added_is_found() {
        let mut filter = AddressFilter::default();
        for address in addresses() {
            filter.add(address);
        }
        assert!(addresses().all(|address| filter.may_have(address)));
    }

    #[test]
    fn few_others_are_found() {
        let mut filter = AddressFilter::default();
        addresses().take(16).for_each(|address| filter.add(address));
        let found = (0..=u16::MAX).filter(|low| {
            let [third, fourth] = low.to_be_bytes();
            filter.may_have(Ipv4Addr::new(10, 7, third, fourth).into())
        });
        // 16 of 4096 bits.
        assert!(found.count() < 65_536 / 128);
        assert!(!AddressFilter::default().may_have(Ipv4Addr::LOCALHOST.into()));
    }
}
