//! Protocol headers as fixed-size byte structs.
//!
//! Contract of a [`WireHeader`]: packed (alignment 1), no padding, every bit pattern is a value. So a reference
//! to one may point anywhere in a packet, and reading a header never fails once its bytes are known to exist. What
//! the bytes *mean* (is this IPv4? is the length a lie?) is the business of `datapath::parse`.
//!
//! Header numbers (EtherType, protocol numbers) come from `network-types`. Its header structs are not used:
//! they have no bytemuck derives, so without `unsafe` no reference to one can be made from bytes, and its
//! Ethernet header is aligned to 2.
//!
//! Multi-byte fields are [`Be16`] and [`Be32`], which hold network byte order. They compare and hash without
//! conversion and have no arithmetic, so a byte-order mix-up does not compile. On their own they are aligned
//! like any number: the verifier refuses misaligned accesses to the stack.

use bytemuck::{Pod, Zeroable};

pub mod arp;
pub mod checksum;
pub mod crc32c;
pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod sctp;
pub mod siphash;
pub mod tcp;
pub mod tunnel;
pub mod udp;

/// A header that can be overlaid on packet bytes; see the module text for the contract.
pub trait WireHeader: Pod {
    /// Size on the wire in bytes, without options.
    const LEN: usize = size_of::<Self>();
}

/// A 16-bit field on its own, such as a checksum.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Field16 {
    pub value: Be16,
}

impl WireHeader for Field16 {}

/// A 32-bit field on its own, such as a word of options.
#[repr(C, packed)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Field32 {
    pub value: Be32,
}

impl WireHeader for Field32 {}

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct Be16(u16);

impl Be16 {
    pub const ZERO: Self = Self(0);

    /// From host byte order.
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes as the machine reads them, for sums that are byte-order neutral (RFC 1071 §2(B)).
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// Reverse of [`Self::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }
}

impl core::fmt::Debug for Be16 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// A 32-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct Be32(u32);

impl Be32 {
    /// From host byte order.
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self(value.to_be())
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be(self.0)
    }

    /// The four bytes as the machine reads them, for sums that are byte-order neutral (RFC 1071 §2(B)).
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// Reverse of [`Self::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// Its first `bits` bits, zeros behind them; more than 32 are all.
    #[inline(always)]
    pub const fn prefix(self, bits: u32) -> Self {
        // Shifted in 64 bits: by 32, which leaves none, a shift of 32 bits is undefined.
        let bits = if bits > 32 { 32 } else { bits };
        let mask = !((u32::MAX as u64 >> bits) as u32);
        Self(self.0 & mask.to_be())
    }
}

impl core::fmt::Debug for Be32 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.get())
    }
}

/// An IPv4 address in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct Ipv4Address(pub Be32);

impl Ipv4Address {
    /// From its four octets, most significant first.
    #[inline(always)]
    pub const fn new(octets: [u8; 4]) -> Self {
        Self(Be32(u32::from_ne_bytes(octets)))
    }

    /// Its four octets, most significant first.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 4] {
        self.0.0.to_ne_bytes()
    }

    /// As a number in host byte order, so that neighbouring addresses differ by one.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    /// Reverse of [`Self::number`].
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        Self(Be32::new(number))
    }
}

impl From<core::net::Ipv4Addr> for Ipv4Address {
    fn from(address: core::net::Ipv4Addr) -> Self {
        Self::new(address.octets())
    }
}

impl From<Ipv4Address> for core::net::Ipv4Addr {
    fn from(address: Ipv4Address) -> Self {
        address.octets().into()
    }
}

impl core::fmt::Debug for Ipv4Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::Ipv4Addr::from(*self).fmt(f)
    }
}

/// An address of either family in network byte order: IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2).
///
/// The mapped form has the same one's-complement sum as the four bytes alone, since its prefix adds 0xffff, which is
/// zero there. So checksum deltas come out right whichever family an address changes to.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct IpAddress(pub [Be32; 4]);

impl IpAddress {
    /// No address: `::`.
    pub const UNSPECIFIED: Self = Self([Be32(0); 4]);
    /// Bits of an address.
    pub const BITS: u32 = 128;
    /// Bits in front of a mapped IPv4 address.
    pub const V4_PREFIX_BITS: u32 = 96;

    /// An IPv4 address, mapped.
    #[inline(always)]
    pub const fn from_v4(address: Ipv4Address) -> Self {
        Self([Be32(0), Be32(0), Be32::new(0xffff), address.0])
    }

    /// From its sixteen octets, most significant first.
    #[inline(always)]
    pub const fn new(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self([
            Be32(u32::from_ne_bytes([a, b, c, d])),
            Be32(u32::from_ne_bytes([e, f, g, h])),
            Be32(u32::from_ne_bytes([i, j, k, l])),
            Be32(u32::from_ne_bytes([m, n, o, p])),
        ])
    }

    /// A copy, word by word. The compiler makes of a plain one a call that copies byte by byte, where it knows
    /// neither the alignment nor that source and destination are different places (LLVM 22, BPF): 16 loops instead of
    /// 4 moves.
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        let [a, b, c, d] = self.0;
        Self([a, b, c, d])
    }

    /// Is this an IPv4 address?
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0].0 == 0 && self.0[1].0 == 0 && self.0[2].0 == Be32::new(0xffff).0
    }

    /// Its last four octets: the address itself when it is of IPv4.
    #[inline(always)]
    pub const fn low(self) -> Ipv4Address {
        Ipv4Address(self.0[3])
    }

    /// The address `offset` places behind this one; wraps around within the last four octets.
    #[inline(always)]
    pub const fn plus(self, offset: u32) -> Self {
        let [a, b, c, d] = self.0;
        Self([a, b, c, Be32::new(d.get().wrapping_add(offset))])
    }

    /// How many places behind `first` this address is, if both share all but their last four octets.
    #[inline(always)]
    pub const fn offset_from(self, first: Self) -> Option<u32> {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, first.0);
        if a.0 != e.0 || b.0 != f.0 || c.0 != g.0 {
            return None;
        }
        Some(d.get().wrapping_sub(h.get()))
    }

    /// Its first `bits` bits, at most 128; zeros behind them.
    #[inline(always)]
    pub const fn prefix(self, bits: u32) -> Self {
        let [a, b, c, d] = self.0;
        Self([
            a.prefix(bits),
            b.prefix(bits.saturating_sub(32)),
            c.prefix(bits.saturating_sub(64)),
            d.prefix(bits.saturating_sub(96)),
        ])
    }

    /// Its sixteen octets, most significant first.
    pub fn octets(self) -> [u8; 16] {
        bytemuck::cast(self.0)
    }

    /// The standard library's form.
    pub fn to_std(self) -> core::net::IpAddr {
        core::net::Ipv6Addr::from(self.octets()).to_canonical()
    }
}

impl From<Ipv4Address> for IpAddress {
    #[inline(always)]
    fn from(address: Ipv4Address) -> Self {
        Self::from_v4(address)
    }
}

impl From<core::net::Ipv4Addr> for IpAddress {
    fn from(address: core::net::Ipv4Addr) -> Self {
        Self::from_v4(address.into())
    }
}

impl From<core::net::Ipv6Addr> for IpAddress {
    fn from(address: core::net::Ipv6Addr) -> Self {
        Self::new(address.octets())
    }
}

impl From<core::net::IpAddr> for IpAddress {
    fn from(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(address) => address.into(),
            core::net::IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<IpAddress> for core::net::IpAddr {
    fn from(address: IpAddress) -> Self {
        address.to_std()
    }
}

impl core::fmt::Debug for IpAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.to_std().fmt(f)
    }
}

/// An Ethernet address. Held as 16-bit words, so that copies on the BPF stack are aligned.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct MacAddress([u16; 3]);

impl MacAddress {
    /// From its six octets, in the order they are sent.
    #[inline(always)]
    pub const fn new(octets: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = octets;
        Self([
            u16::from_ne_bytes([a, b]),
            u16::from_ne_bytes([c, d]),
            u16::from_ne_bytes([e, f]),
        ])
    }

    /// From its three words as they stand in memory.
    #[inline(always)]
    pub const fn from_words(words: [u16; 3]) -> Self {
        Self(words)
    }

    /// Its six octets, in the order they are sent.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 6] {
        let [[a, b], [c, d], [e, f]] = [
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
        ];
        [a, b, c, d, e, f]
    }
}

impl core::fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d, e, g] = self.octets();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Destination and source of a frame, as they stand side by side in its header.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
pub struct LinkPair([u32; 3]);

impl LinkPair {
    /// A frame's addresses.
    #[inline(always)]
    pub const fn new(destination: MacAddress, source: MacAddress) -> Self {
        let ([a, b, c], [d, e, f]) = (destination.0, source.0);
        Self([join(a, b), join(c, d), join(e, f)])
    }

    /// Whom the frame is for.
    #[inline(always)]
    pub const fn destination(self) -> MacAddress {
        let [[a, b], [c, _], _] = self.words();
        MacAddress([a, b, c])
    }

    /// Whom the frame is from.
    #[inline(always)]
    pub const fn source(self) -> MacAddress {
        let [_, [_, d], [e, f]] = self.words();
        MacAddress([d, e, f])
    }

    /// A copy, word by word; see [`IpAddress::copied`].
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        let [a, b, c] = self.0;
        Self([a, b, c])
    }

    /// The addresses of a frame that goes back.
    #[inline(always)]
    pub const fn swapped(self) -> Self {
        Self::new(self.source(), self.destination())
    }

    #[inline(always)]
    const fn words(self) -> [[u16; 2]; 3] {
        [split(self.0[0]), split(self.0[1]), split(self.0[2])]
    }
}

impl core::fmt::Debug for LinkPair {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?} -> {:?}", self.source(), self.destination())
    }
}

/// Two words in memory order as one.
#[inline(always)]
const fn join(first: u16, second: u16) -> u32 {
    if cfg!(target_endian = "little") {
        first as u32 | (second as u32) << 16
    } else {
        (first as u32) << 16 | second as u32
    }
}

/// Reverse of [`join`].
#[inline(always)]
const fn split(both: u32) -> [u16; 2] {
    if cfg!(target_endian = "little") {
        [both as u16, (both >> 16) as u16]
    } else {
        [(both >> 16) as u16, both as u16]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_network_byte_order() {
        assert_eq!(bytemuck::bytes_of(&Be16::new(0x1234)), [0x12, 0x34]);
        assert_eq!(Be32::from_raw(Be32::new(0xa1b2_c3d4).raw()).get(), 0xa1b2_c3d4);
        let (a, b) = (
            MacAddress::new([1, 2, 3, 4, 5, 6]),
            MacAddress::new([7, 8, 9, 10, 11, 12]),
        );
        let pair = LinkPair::new(a, b);
        assert_eq!(bytemuck::bytes_of(&pair), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!((pair.swapped().destination(), pair.swapped().source()), (b, a));
        assert_eq!(
            Ipv4Address::from_number(Ipv4Address::new([10, 0, 0, 255]).number() + 1).octets(),
            [10, 0, 1, 0]
        );
    }

    #[test]
    fn an_ipv4_address_is_told_from_one_of_ipv6() {
        let v4 = IpAddress::from(core::net::Ipv4Addr::new(10, 0, 0, 7));
        assert!(v4.is_v4());
        assert_eq!(v4.low().octets(), [10, 0, 0, 7]);
        assert_eq!(v4.to_std(), core::net::IpAddr::from([10, 0, 0, 7]));
        let v6 = IpAddress::from(core::net::Ipv6Addr::LOCALHOST);
        assert!(!v6.is_v4());
        assert_eq!(v6.to_std(), core::net::IpAddr::V6(core::net::Ipv6Addr::LOCALHOST));
    }

    #[test]
    fn a_prefix_of_an_address_keeps_its_first_bits() {
        let address = IpAddress::new([0xff; 16]);
        for bits in [0, 1, 31, 32, 33, 64, 95, 96, 127, 128] {
            let wanted = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            assert_eq!(
                address.prefix(bits),
                IpAddress::new(wanted.to_be_bytes()),
                "{bits} bits"
            );
        }
    }

    #[test]
    fn a_mapped_address_has_the_sum_of_its_four_bytes() {
        let v4 = Ipv4Address::new([192, 168, 1, 20]);
        let mapped = checksum::fold(checksum::sum_bytes(bytemuck::bytes_of(&IpAddress::from(v4))));
        assert_eq!(mapped, checksum::fold(checksum::sum_bytes(&v4.octets())));
    }
}
