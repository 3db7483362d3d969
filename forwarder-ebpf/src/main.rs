//! The programs: build the adapters, run the walk, turn its verdict into the hook's action.
#![no_std]
#![no_main]
// Inline assembly for BPF; both toolchains that build this crate allow unstable features.
#![feature(asm_experimental_arch)]

mod capture;
mod env;
mod functions;
mod maps;
mod packet;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    helpers::generated::{bpf_redirect, bpf_redirect_neigh},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use forwarder_common::{
    abi::{reason::Reason, settings::flag},
    datapath::{Action, Env as _, Hook, Packet as _, Verdict, inquiry::Inquiry, pipeline},
};

use crate::{
    env::KernelEnv,
    maps::KernelTables,
    packet::{SkbPacket, XdpPacket},
};

/// Frames of an interface in native mode.
#[xdp(frags)]
#[inline(always)]
pub(crate) fn forwarder_xdp(ctx: XdpContext) -> u32 {
    ingress::<false>(ctx)
}

/// Frames of an interface in generic mode, where the mark of a partial checksum stays with the frame.
#[xdp(frags)]
#[inline(always)]
pub(crate) fn forwarder_skb(ctx: XdpContext) -> u32 {
    ingress::<true>(ctx)
}

#[inline(always)]
fn ingress<const GENERIC: bool>(ctx: XdpContext) -> u32 {
    let Some(settings) = KernelTables::settings() else {
        return xdp_action::XDP_PASS;
    };
    let ingress_ifindex = ctx.ingress_ifindex() as u32;
    let mut env = KernelEnv {
        ctx: ctx.as_ptr(),
        hook: if GENERIC { Hook::XdpGeneric } else { Hook::Xdp },
        ingress_ifindex,
    };
    let mut packet = XdpPacket::<GENERIC> { ctx };
    let outcome = pipeline::forward(
        &mut packet,
        &mut KernelTables,
        &mut env,
        settings,
        KernelTables::walk,
    );
    if outcome.reason == Reason::INTERNAL {
        debug!(
            &packet.ctx,
            "a table held something impossible; ifindex {}", ingress_ifindex
        );
    }
    let Verdict { action, ifindex } = outcome.verdict;
    match action {
        Action::Transmit if settings.flags & flag::TRANSMIT_BY_REDIRECT == 0 => xdp_action::XDP_TX,
        // SAFETY: a helper without pointers.
        Action::Transmit => unsafe { bpf_redirect(KernelTables::bond_or(ingress_ifindex), 0) as u32 },
        // SAFETY: a helper without pointers.
        Action::Redirect => unsafe { bpf_redirect(ifindex, 0) as u32 },
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// Packets that the kernel has taken out of a tunnel.
#[classifier]
#[inline(always)]
pub(crate) fn forwarder_tunnel(ctx: TcContext) -> i32 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return TC_ACT_OK;
    };
    // SAFETY: the kernel passes a valid context.
    let ingress_ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let mut env = KernelEnv {
        ctx: ctx.as_ptr(),
        hook: Hook::Tcx,
        ingress_ifindex,
    };
    let mut packet = SkbPacket::new(ctx);
    let outcome = pipeline::forward(&mut packet, &mut KernelTables, &mut env, settings, || {
        Some(&mut *walk)
    });
    let Verdict { action, ifindex } = outcome.verdict;
    match action {
        // SAFETY: a helper without pointers.
        Action::Transmit => unsafe { bpf_redirect(ingress_ifindex, 0) as i32 },
        // The kernel replaces a link header, but makes none.
        Action::Redirect
            if walk.frame.network_offset == 0 && !packet.push_link_header(walk.frame.is_v4()) =>
        {
            TC_ACT_SHOT
        }
        // SAFETY: no parameters: the kernel finds the next hop of the packet's own destination.
        Action::Redirect => unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 },
        Action::Pass => TC_ACT_OK,
        Action::Drop => TC_ACT_SHOT,
    }
}

/// Answers the agent's question about a packet that is not there, see `datapath::inquiry`. Changes nothing but the
/// answer.
#[xdp]
pub(crate) fn forwarder_ask(ctx: XdpContext) -> u32 {
    let context = ctx.as_ptr();
    let mut packet = XdpPacket::<true> { ctx };
    let Ok(inquiry) = packet.header::<Inquiry>(0) else {
        return xdp_action::XDP_DROP;
    };
    let mut env = KernelEnv {
        ctx: context,
        hook: Hook::XdpGeneric,
        ingress_ifindex: inquiry.ingress_ifindex,
    };
    let route = env.route(&inquiry.key());
    inquiry.answer(route, KernelTables::next_free_flow());
    xdp_action::XDP_PASS
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends its helpers to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
