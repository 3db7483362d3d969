//! Captures packets for the agent: as they come, as they leave, and why. Two functions per hook, called only while
//! somebody captures.

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes, bpf_xdp_load_bytes},
    programs::{TcContext, XdpContext},
};
use forwarder_common::{
    abi::{
        capture::{CAPTURED_BYTES, CaptureFilter, CaptureRoom},
        reason::Reason,
    },
    datapath::{Action, Hook, Outcome, Packet, capture},
};

use crate::{
    env::KernelEnv,
    maps::{self, KernelTables},
    packet::{SkbPacket, XdpPacket, masked},
};

const MASK: u64 = CAPTURED_BYTES as u64 - 1;

/// Keeps the packet under way as it came, if the filter may be true of it.
#[inline(always)]
pub(crate) fn before(env: &KernelEnv) {
    match env.hook {
        Hook::Xdp | Hook::XdpGeneric => forwarder_capture_xdp(env.ctx.cast()),
        Hook::Tcx => forwarder_capture_tcx(env.ctx.cast()),
    };
}

/// Hands the packet under way to the agent, if the filter is true of it.
#[inline(always)]
pub(crate) fn after(env: &KernelEnv, outcome: Outcome) {
    let (reason, ifindex) = (outcome.reason.0, outcome.verdict.ifindex);
    let action = match outcome.verdict.action {
        Action::Transmit => 0,
        Action::Redirect => 1,
        Action::Pass => 2,
        Action::Drop => 3,
    };
    let reason = reason | action << 16;
    match env.hook {
        Hook::Xdp | Hook::XdpGeneric => {
            forwarder_captured_xdp(env.ctx.cast(), reason, ifindex, env.ingress_ifindex)
        }
        Hook::Tcx => forwarder_captured_tcx(env.ctx.cast(), reason, ifindex, env.ingress_ifindex),
    };
}

/// How many bytes of a frame are captured, at least one. The verifier refuses a length that may be zero; see
/// `packet::forwarder_sum_xdp`.
#[inline(always)]
fn captured_len(filter: &CaptureFilter, len: u32) -> u32 {
    masked::<MASK>(filter.snap_bytes.min(len) as usize - 1) as u32 + 1
}

macro_rules! before {
    ($capture:ident $context:ty, $packet:expr, $load:expr) => {
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $capture(ctx: *mut $context) -> i64 {
            let (Some(filter), Some(room)) = (maps::capture_filter(), maps::capture_room()) else {
                return -1;
            };
            let Some(walk) = KernelTables::walk() else {
                return -1;
            };
            let mut packet = $packet(ctx);
            room.is_wanted = 0;
            if !capture::is_wanted(&mut packet, walk, filter) {
                return 0;
            }
            let len = packet.frame_len() as u32;
            let captured_len = captured_len(filter, len);
            let bytes = room.bytes.as_mut_ptr();
            // SAFETY: the helper writes `captured_len` bytes at most, no more than the array has, and checks that the
            // frame has as many.
            if unsafe { $load(ctx.cast(), 0, bytes.cast(), captured_len) } < 0 {
                return -1;
            }
            // SAFETY: a helper without parameters.
            room.time_nanos = unsafe { bpf_ktime_get_ns() };
            room.len = len;
            room.captured_len = captured_len;
            room.is_wanted = 1;
            0
        }
    };
}

before!(forwarder_capture_xdp xdp_md, |ctx| XdpPacket::<false> { ctx: XdpContext::new(ctx) }, bpf_xdp_load_bytes);
before!(forwarder_capture_tcx __sk_buff, |ctx| SkbPacket::new(TcContext::new(ctx)), bpf_skb_load_bytes);

/// Is this packet's reason one that is asked for, and its turn?
#[inline(always)]
fn is_due(filter: &CaptureFilter, room: &mut CaptureRoom, reason: Reason) -> bool {
    // Not the next packet's, should that begin before somebody captures and end after.
    let is_wanted = core::mem::replace(&mut room.is_wanted, 0) != 0;
    if !is_wanted || !capture::has_reason(filter, reason) {
        return false;
    }
    room.matched += 1;
    filter.one_in <= 1 || room.matched.is_multiple_of(u64::from(filter.one_in))
}

macro_rules! after {
    ($captured:ident $context:ty, $packet:expr, $load:expr) => {
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $captured(
            ctx: *mut $context,
            reason: u32,
            egress_ifindex: u32,
            ingress_ifindex: u32,
        ) -> i64 {
            let (Some(filter), Some(room)) = (maps::capture_filter(), maps::capture_room()) else {
                return -1;
            };
            let Some(walk) = KernelTables::walk() else {
                return -1;
            };
            if !is_due(filter, room, Reason(reason & 0xffff)) {
                return 0;
            }
            let len = $packet(ctx).frame_len() as u32;
            let captured_len = captured_len(filter, len);
            let Some(mut entry) = maps::captured_packet() else {
                room.lost += 1;
                return 0;
            };
            // SAFETY: the kernel's memory, as large as the struct, for whose integers all bytes are values.
            let captured = unsafe { &mut *entry.as_mut_ptr() };
            captured.time_nanos = room.time_nanos;
            captured.reason = reason & 0xffff;
            captured.action = reason >> 16;
            captured.ingress_ifindex = ingress_ifindex;
            captured.egress_ifindex = egress_ifindex;
            captured.listener = walk.hit.listener.0 as u32;
            captured.backend = walk.hit.backend.0 as u32;
            captured.before_len = room.len;
            captured.before_captured = room.captured_len;
            captured.after_len = len;
            captured.after_captured = captured_len;
            for (to, from) in captured.before.iter_mut().zip(&room.bytes) {
                // SAFETY: both are references. Volatile, as the compiler would call memcpy, which BPF has not.
                let word = unsafe { core::ptr::read_volatile(from) };
                // SAFETY: as above.
                unsafe { core::ptr::write_volatile(to, word) };
            }
            let bytes = captured.after.as_mut_ptr();
            // SAFETY: as in the function before.
            if unsafe { $load(ctx.cast(), 0, bytes.cast(), captured_len) } < 0 {
                captured.after_captured = 0;
            }
            entry.submit(0);
            0
        }
    };
}

after!(forwarder_captured_xdp xdp_md, |ctx| XdpPacket::<false> { ctx: XdpContext::new(ctx) }, bpf_xdp_load_bytes);
after!(forwarder_captured_tcx __sk_buff, |ctx| SkbPacket { ctx: TcContext::new(ctx) }, bpf_skb_load_bytes);
