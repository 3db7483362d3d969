//! The checksum of TCP and UDP, also where the sender left it to its device.
//!
//! A packet from a local socket, through veth, tap or virtio, may arrive with a *partial* checksum: the field
//! holds the sum of the pseudo-header, not complemented, and the device would have added the rest (Linux calls
//! this CHECKSUM_PARTIAL). The frame does not say so; that mark stays in the kernel's own metadata, which native
//! XDP neither shows nor keeps when the frame leaves by transmit or redirect. So:
//!
//! - A field that equals the pseudo-header sum *and* makes no valid checksum is partial. The first test costs a few
//!   additions, the second walks the payload and runs only after the first has hit: for complete checksums
//!   once in 65 536 packets.
//! - A partial field takes the address change with the opposite sign and no port change.
//! - If the frame then leaves from native XDP, the checksum is completed here, over the whole payload.
//! - tcx has the kernel's helper, which knows the mark.
//!
//! The test is off unless `flag::PARTIAL_CHECKSUMS` is set: frames of a physical NIC are never partial.

use super::{ChecksumOffload, Packet, Stop, fragment::part, parse::Frame};
use crate::{
    abi::settings::{Settings, flag},
    wire::{
        Be16, Field16,
        checksum::{self, Delta},
        tcp::TcpHeader,
        udp::{self, CHECKSUM_NONE, UdpHeader},
    },
};

/// Where the checksum stands in a header of TCP, else of UDP, in bytes.
#[inline(always)]
pub const fn offset(is_tcp: bool) -> usize {
    if is_tcp {
        TcpHeader::CHECKSUM_OFFSET
    } else {
        UdpHeader::CHECKSUM_OFFSET
    }
}

/// Where a packet's checksum stands, in bytes from the frame's start.
#[inline(always)]
pub const fn field_offset(frame: &Frame) -> usize {
    frame.transport_offset as usize + offset(frame.is_tcp())
}

#[inline(always)]
fn pseudo_header(frame: &Frame) -> u32 {
    let key = &frame.key;
    checksum::pseudo_header(
        key.source,
        key.destination,
        key.protocol as u8,
        frame.transport_len,
    )
}

/// Who has computed a packet's checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its sender, or nobody (UDP without one); or the kernel takes care of it.
    Complete,
    /// Its sender left it to the device; this is the folded sum of transport header and payload.
    Partial { sum: u32 },
}

/// Who has computed this packet's checksum?
#[inline(always)]
pub fn state<P: Packet>(packet: &mut P, frame: &Frame, settings: &Settings) -> Result<State, Stop> {
    if let ChecksumOffload::Kernel = P::CHECKSUM_OFFLOAD {
        return Ok(State::Complete);
    }
    // A sender computes the checksum itself before it fragments.
    if settings.flags & flag::PARTIAL_CHECKSUMS == 0 || frame.fragment != part::WHOLE {
        return Ok(State::Complete);
    }
    let field = packet.header::<Field16>(field_offset(frame))?.value.raw();
    let pseudo = u32::from(checksum::fold(pseudo_header(frame)));
    if u32::from(field) != pseudo {
        return Ok(State::Complete);
    }
    let sum = packet.sum(frame.transport_offset as usize, frame.transport_len as usize)?;
    let is_valid = checksum::fold(pseudo + sum) == 0xffff;
    Ok(if is_valid {
        State::Complete
    } else {
        State::Partial { sum }
    })
}

/// The folded sum of the pseudo-header if the kernel seems to owe the packet's checksum in tcx, where the field holds
/// that sum then.
#[inline(always)]
pub fn owed<P: Packet>(packet: &mut P, frame: &Frame) -> Result<Option<u16>, Stop> {
    if frame.fragment != part::WHOLE {
        return Ok(None);
    }
    let field = packet.header::<Field16>(field_offset(frame))?.value.raw();
    let pseudo = checksum::fold(pseudo_header(frame));
    Ok((field == pseudo).then_some(pseudo))
}

/// What changes under a transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// In the pseudo-header.
    pub addresses: Delta,
    /// In the transport header.
    pub words: Delta,
}

/// Brings the checksum in line with a change. `is_sent`: the frame leaves straight from the program.
#[inline(always)]
pub fn update<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    change: Change,
    state: State,
    is_sent: bool,
) -> Result<(), Stop> {
    let offset = field_offset(frame);
    if let ChecksumOffload::Kernel = P::CHECKSUM_OFFLOAD {
        return packet.adjust_checksum(offset, change.addresses, change.words, !frame.is_tcp());
    }
    let field = packet.header::<Field16>(offset)?;
    let old = field.value;
    let both = change.addresses.and(change.words);
    field.value = match state {
        State::Partial { sum } if is_sent && matches!(P::CHECKSUM_OFFLOAD, ChecksumOffload::LostOnSend) => {
            // The sum covers the field, which holds the sum of the old pseudo-header; the delta makes it the
            // sum of the new one and accounts for the new ports.
            sent(
                frame.is_tcp(),
                Be16::from_raw(checksum::finish(sum + u32::from(both.folded()))),
            )
        }
        State::Partial { .. } => change.addresses.apply_to_partial(old),
        State::Complete if !frame.is_tcp() && old == CHECKSUM_NONE => CHECKSUM_NONE,
        State::Complete => sent(frame.is_tcp(), both.apply(old)),
    };
    Ok(())
}

/// A computed checksum as it is sent; TCP sends a zero as it is.
#[inline(always)]
pub const fn sent(is_tcp: bool, checksum: Be16) -> Be16 {
    if is_tcp { checksum } else { udp::computed(checksum) }
}
