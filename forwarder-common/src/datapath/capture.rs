//! Which packets are captured.
//!
//! A packet is looked at twice: when it comes, by what it is, and when its reason is known. Off, this costs a bit of
//! the settings that are read anyway.

use super::{Packet, Walk, parse, parse::Frame};
use crate::{
    abi::{capture::CaptureFilter, reason::Reason},
    wire::{Be16, IpAddress, ipv4::PROTOCOL_ICMP, ipv6::PROTOCOL_ICMPV6},
};

/// May the filter be true of a packet, by what it is? What cannot be read is wanted only if no more is asked for. Reads
/// the packet, or what is inside of it, into the walk, as `pipeline` will again.
#[inline(always)]
pub fn is_wanted<P: Packet>(packet: &mut P, walk: &mut Walk, filter: &CaptureFilter) -> bool {
    let len = packet.frame_len();
    let is_read = parse::frame(packet, walk, len).is_ok();
    matches(filter, &walk.frame, is_read)
}

/// Is the filter true of this frame?
#[inline(always)]
fn matches(filter: &CaptureFilter, frame: &Frame, is_read: bool) -> bool {
    let key = &frame.key;
    let asks_for_address =
        (filter.mask.0[0].raw() | filter.mask.0[1].raw() | filter.mask.0[2].raw() | filter.mask.0[3].raw())
            != 0;
    if !is_read {
        return !asks_for_address && filter.port == Be16::ZERO && filter.protocol == 0;
    }
    let protocol = if key.protocol == PROTOCOL_ICMPV6 as u32 {
        PROTOCOL_ICMP as u32
    } else {
        key.protocol
    };
    (filter.protocol == 0 || filter.protocol as u32 == protocol)
        && (filter.port == Be16::ZERO
            || filter.port == key.source_port
            || filter.port == key.destination_port)
        && (!asks_for_address || is_in(filter, &key.source) || is_in(filter, &key.destination))
}

#[inline(always)]
const fn is_in(filter: &CaptureFilter, address: &IpAddress) -> bool {
    let mut different = 0;
    let mut word = 0;
    while word < 4 {
        different |= (address.0[word].raw() ^ filter.network.0[word].raw()) & filter.mask.0[word].raw();
        word += 1;
    }
    different == 0
}

/// Is this one of the reasons that are asked for?
#[inline(always)]
pub const fn has_reason(filter: &CaptureFilter, reason: Reason) -> bool {
    filter.reasons >> (reason.0 & 63) & 1 != 0
}

const _: () = assert!(Reason::COUNT <= 64, "a bit for each reason");

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    fn filter() -> CaptureFilter {
        CaptureFilter {
            reasons: 1 << Reason::NOT_IP.0,
            one_in: 1,
            ..CaptureFilter::zeroed()
        }
    }

    fn frame() -> Frame {
        let mut frame = Frame::zeroed();
        frame.key.source = IpAddress::from(core::net::Ipv4Addr::new(192, 0, 2, 7));
        frame.key.destination = IpAddress::from(core::net::Ipv4Addr::new(198, 51, 100, 1));
        (frame.key.source_port, frame.key.destination_port) = (Be16::new(50_000), Be16::new(80));
        frame.key.protocol = 6;
        frame
    }

    #[test]
    fn an_empty_filter_wants_everything_even_what_cannot_be_read() {
        assert!(matches(&filter(), &frame(), true));
        assert!(matches(&filter(), &frame(), false));
    }

    #[test]
    fn every_condition_has_to_hold_on_one_end() {
        let mut one = filter();
        one.network = IpAddress::from(core::net::Ipv4Addr::new(198, 51, 100, 0));
        one.mask = IpAddress::from(core::net::Ipv6Addr::from(u128::MAX << 8));
        (one.port, one.protocol) = (Be16::new(50_000), 6);
        assert!(matches(&one, &frame(), true));
        assert!(!matches(&one, &frame(), false), "not known to be");
        for change in [
            |one: &mut CaptureFilter| one.port = Be16::new(81),
            |one: &mut CaptureFilter| one.protocol = 17,
            |one: &mut CaptureFilter| one.network.0[3] = crate::wire::Be32::new(0xc633_6500),
        ] {
            let mut other = one;
            change(&mut other);
            assert!(!matches(&other, &frame(), true));
        }
        assert!(has_reason(&one, Reason::NOT_IP) && !has_reason(&one, Reason::NOT_OURS));
    }
}
