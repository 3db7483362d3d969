//! SYN cookies: what a SYN announced, in the sequence number of its answer, so that nothing need be remembered until
//! the client has shown that it is where it says (RFC 4987 §3.6).
//!
//! The layout is FreeBSD's: 24 bits of a keyed hash, and 8 bits of content, masked with the hash's top byte: which of
//! the usual segment sizes, which of the usual window scales, selective acknowledgment, and whether the period of time
//! is even. The hash covers addresses, ports, the client's sequence number, the period and the content. So a cookie is
//! good for its own connection, for one to two periods; the period's parity says which of the two it was, and one hash
//! decides. Who does not know the key guesses one in 2^24.
//!
//! The kernel's own (`bpf_tcp_raw_gen_syncookie_ipv4`) would hold two bits of segment size and nothing else, as the rest
//! goes into timestamps there; see ADR 18.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{flow::FlowKey, handshake::NO_SCALE},
    wire::siphash::SipHash,
};

/// How long cookies are made with one number of a period: good for as long as a client may need for the second half of
/// its handshake, even if it loses packets on the way.
const PERIOD_SECS: u32 = 64;
/// How long a cookie is good for, at most.
pub const LIFETIME_SECS: u32 = 2 * PERIOD_SECS;

/// Segment sizes that a cookie can hold: the next smaller one counts. The smallest that is seen (RFC 879 has 536 for
/// its least, some send less); IPv6's least; 1360, 1400: tunnels; 1440 and 1460: Ethernet; 8940: jumbo frames.
const SEGMENT_SIZES: [u16; 8] = [216, 536, 1220, 1360, 1400, 1440, 1460, 8940];
/// The same of window scales; none, and what Linux, the BSDs, macOS and Windows announce. A backend that is told a
/// smaller one than the client's sees a smaller window, which is always safe.
const SCALES: [u8; 8] = [NO_SCALE, 0, 2, 4, 6, 7, 8, 10];

const SCALE_SHIFT: u32 = 3;
const SELECTIVE: u32 = 1 << 6;
const ODD: u32 = 1 << 7;

/// The tables as numbers: the compiler would put arrays into a map of their own in BPF.
const PACKED_SIZES: [u64; 2] = {
    let mut packed = [0; 2];
    let mut index = 0;
    while index < 8 {
        packed[index / 4] |= (SEGMENT_SIZES[index] as u64) << (index % 4 * 16);
        index += 1;
    }
    packed
};
const PACKED_SCALES: u32 = {
    let mut packed = 0;
    let mut index = 0;
    while index < 8 {
        packed |= (SCALES[index] as u32) << (index * 4);
        index += 1;
    }
    packed
};

/// One of [`SEGMENT_SIZES`]; `index` below 8.
#[inline(always)]
const fn segment_size(index: u32) -> u32 {
    let half = if index < 4 {
        PACKED_SIZES[0]
    } else {
        PACKED_SIZES[1]
    };
    (half >> ((index & 3) * 16)) as u32 & 0xffff
}

/// One of [`SCALES`]; `index` below 8.
#[inline(always)]
const fn window_scale(index: u32) -> u32 {
    PACKED_SCALES >> (index * 4) & 15
}

/// What a SYN announces, as far as it matters.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Announced {
    /// In bytes.
    pub segment_size: u32,
    /// [`NO_SCALE`]: none.
    pub scale: u32,
    /// Non-zero: selective acknowledgments are understood.
    pub selective: u32,
    pub reserved: u32,
}

impl Announced {
    /// What a SYN without options means (RFC 9293 §3.7.1: 536).
    pub const NOTHING: Self = Self {
        segment_size: 536,
        scale: NO_SCALE as u32,
        selective: 0,
        reserved: 0,
    };
}

/// The cookie for a SYN with this 5-tuple and sequence number, at this time.
#[inline(always)]
pub fn make(key: [u64; 2], flow: &FlowKey, client_first: u32, announced: &Announced, now_secs: u32) -> u32 {
    let period = now_secs / PERIOD_SECS;
    let mut content = 0;
    // The first of each is for what is less than the second as well.
    let mut index = 1;
    while index < 8 {
        if announced.segment_size >= segment_size(index) {
            content = index;
        }
        index += 1;
    }
    if announced.scale < NO_SCALE as u32 {
        let mut scale = 1;
        let mut index = 2;
        while index < 8 {
            if announced.scale >= window_scale(index) {
                scale = index;
            }
            index += 1;
        }
        content |= scale << SCALE_SHIFT;
    }
    if announced.selective != 0 {
        content |= SELECTIVE;
    }
    if period & 1 != 0 {
        content |= ODD;
    }
    let hash = hash(key, flow, client_first, period, content);
    hash & !0xff | content ^ hash >> 24
}

/// Is this a cookie that was made for this 5-tuple and sequence number? Then `announced` becomes what it holds.
#[inline(always)]
pub fn read(
    key: [u64; 2],
    flow: &FlowKey,
    client_first: u32,
    cookie: u32,
    now_secs: u32,
    announced: &mut Announced,
) -> bool {
    let content = (cookie ^ cookie >> 24) & 0xff;
    let now = now_secs / PERIOD_SECS;
    // This period, or the one before.
    let period = now.wrapping_sub((now ^ content >> 7) & 1);
    if hash(key, flow, client_first, period, content) & !0xff != cookie & !0xff {
        return false;
    }
    let (size, scale) = (content & 7, content >> SCALE_SHIFT & 7);
    announced.segment_size = segment_size(size);
    announced.scale = window_scale(scale);
    announced.selective = content & SELECTIVE;
    true
}

/// The hash that a cookie is made of.
#[inline(always)]
fn hash(key: [u64; 2], flow: &FlowKey, client_first: u32, period: u32, content: u32) -> u32 {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let [a, b, c, d] = flow.source.0;
    let [e, f, g, h] = flow.destination.0;
    let mut hash = SipHash::new(key);
    if !flow.is_v4() {
        hash = hash
            .with(pair(a.raw(), b.raw()))
            .with(pair(c.raw(), e.raw()))
            .with(pair(f.raw(), g.raw()));
    }
    hash.with(pair(d.raw(), h.raw()))
        .with(pair(
            client_first,
            u32::from(flow.source_port.raw()) | u32::from(flow.destination_port.raw()) << 16,
        ))
        .with(pair(period, content))
        .finish() as u32
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{Be16, IpAddress};

    const KEY: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

    fn flow(source: IpAddress, destination: IpAddress, port: u16) -> FlowKey {
        FlowKey {
            source,
            destination,
            source_port: Be16::new(port),
            destination_port: Be16::new(443),
            protocol: 6,
        }
    }

    fn v4() -> FlowKey {
        let [client, vip] = [[192, 0, 2, 7], [198, 51, 100, 10]].map(Ipv4Addr::from);
        flow(client.into(), vip.into(), 50000)
    }

    fn announced(segment_size: u32, scale: u32, selective: u32) -> Announced {
        Announced {
            segment_size,
            scale,
            selective,
            reserved: 0,
        }
    }

    fn read_at(flow: &FlowKey, first: u32, cookie: u32, now_secs: u32) -> Option<Announced> {
        let mut found = Announced::NOTHING;
        read(KEY, flow, first, cookie, now_secs, &mut found).then_some(found)
    }

    #[test]
    fn it_holds_what_common_systems_announce() {
        for (size, scale, selective) in [
            (1460, 7, 1),
            (1440, 8, 1),
            (1460, 6, 1),
            (8940, 10, 1),
            (536, 15, 0),
        ] {
            let cookie = make(KEY, &v4(), 77, &announced(size, scale, selective), 1000);
            let found = read_at(&v4(), 77, cookie, 1000).expect("it was just made");
            assert_eq!((found.segment_size, found.scale), (size, scale));
            assert_eq!(found.selective != 0, selective != 0);
        }
    }

    #[test]
    fn it_is_good_for_one_period_more_and_no_longer() {
        let made = 64 * 100;
        for later in [0, 63, 64, 127] {
            let cookie = make(KEY, &v4(), 1, &announced(1460, 7, 1), made);
            assert!(read_at(&v4(), 1, cookie, made + later).is_some(), "{later} s");
        }
        let cookie = make(KEY, &v4(), 1, &announced(1460, 7, 1), made);
        for later in [128, 129, 192, 256, 100_000] {
            assert_eq!(read_at(&v4(), 1, cookie, made + later), None, "{later} s");
        }
        // Nor is one from the future.
        assert_eq!(read_at(&v4(), 1, cookie, made - 1), None);
    }

    #[test]
    fn the_first_period_of_a_clock_has_none_before_it() {
        let cookie = make(KEY, &v4(), 1, &announced(1460, 7, 1), 3);
        assert!(read_at(&v4(), 1, cookie, 5).is_some());
    }

    proptest! {
        #[test]
        fn it_is_good_for_its_connection_only(
            first: u32, size in 0u32..20_000, scale in 0u32..16, selective in 0u32..2, now: u32, port: u16, other: u16,
            is_v6: bool, flip in 0u32..32,
        ) {
            let flow_of = |port| if is_v6 {
                let [client, vip] = [1, 2].map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
                flow(client.into(), vip.into(), port)
            } else {
                FlowKey { source_port: Be16::new(port), ..v4() }
            };
            let cookie = make(KEY, &flow_of(port), first, &announced(size, scale, selective), now);
            let found = read_at(&flow_of(port), first, cookie, now).expect("it was just made");
            // Never more than was announced.
            prop_assert!(found.segment_size <= size.max(216));
            prop_assert!(found.scale <= scale);
            prop_assert_eq!(found.scale == 15, scale == 15);
            prop_assert_eq!(found.selective != 0, selective != 0);
            // One in 2^24 would pass by chance: a failure here that cannot be repeated is that.
            if other != port {
                prop_assert_eq!(read_at(&flow_of(other), first, cookie, now), None);
            }
            prop_assert_eq!(read_at(&flow_of(port), first.wrapping_add(1), cookie, now), None);
            prop_assert_eq!(read_at(&flow_of(port), first, cookie ^ 1 << flip, now), None);
        }
    }
}
