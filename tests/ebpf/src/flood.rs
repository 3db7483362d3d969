//! A generator of floods: each frame has another source address and another number, and valid checksums.

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::{
    helpers::generated::{bpf_get_prandom_u32, bpf_redirect},
    macros::{map, xdp},
    maps::Array,
    programs::XdpContext,
};
use forwarder_bench_ebpf::{FLOOD_BYTES, Flood};
use forwarder_common::wire::checksum::fold;

use crate::programs::{Words, start};

#[map]
static FLOOD: Array<Flood> = Array::with_max_entries(1, 0);

/// The place of a field in the flood's frame.
#[inline(always)]
fn field<T>(flood: &mut Flood, mut offset: u32) -> *mut T {
    // SAFETY: arithmetic on one register. The verifier sees the bound, which the compiler would drop.
    unsafe {
        core::arch::asm!(
            "{offset} &= 127",
            offset = inlateout(reg) offset,
            options(pure, nomem, nostack)
        );
    }
    let frame: *mut u8 = (&raw mut flood.frame).cast();
    frame.wrapping_add(offset as usize).cast()
}

/// Sends the next frame; for live frames, whose memory comes round again as its last user left it.
#[xdp(frags)]
pub(crate) fn bench_flood(ctx: XdpContext) -> u32 {
    // SAFETY: one flood at a time, on one CPU.
    let Some(flood) = FLOOD.get_ptr_mut(0).map(|flood| unsafe { &mut *flood }) else {
        return xdp_action::XDP_ABORTED;
    };
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    // SAFETY: as above.
    let number = unsafe { bpf_get_prandom_u32() } as u16 | 1;
    let address = (flood.network | (random & flood.host_mask)).to_be();
    let address_sum = (address & 0xffff) + (address >> 16);
    let number_sum = u32::from(number);
    let ip_sum = flood.ip_sum + address_sum + number_sum * flood.is_number_in_ip;
    let transport_sum = flood.transport_sum
        + address_sum * flood.is_address_in_transport
        + number_sum * flood.is_number_in_transport;
    // SAFETY: within the frame and the room behind it, whatever the offset.
    unsafe { field::<u32>(flood, flood.address_offset).write_unaligned(address) };
    for (offset, value) in [
        (flood.number_offset, number),
        (flood.ip_checksum_offset, !fold(ip_sum)),
        (flood.transport_checksum_offset, !fold(transport_sum)),
    ] {
        if offset != 0 {
            // SAFETY: as above.
            unsafe { field::<u16>(flood, offset).write_unaligned(value) };
        }
    }
    let Some(frame) = start::<Words<{ FLOOD_BYTES / 4 }>>(&ctx) else {
        return xdp_action::XDP_ABORTED;
    };
    let words = (&raw mut frame.0).cast::<u32>();
    for place in 0..FLOOD_BYTES / 4 {
        // SAFETY: one of the words of `frame`.
        unsafe { words.add(place).write_unaligned(flood.frame[place]) };
    }
    flood.frames += 1;
    // SAFETY: a helper without pointers.
    unsafe { bpf_redirect(flood.ifindex, 0) as u32 }
}
