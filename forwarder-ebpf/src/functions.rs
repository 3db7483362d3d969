//! What packets need seldom, as functions of their own in BPF as well: each has a stack frame of its own, of the 512 bytes
//! that a chain of calls has together, and the verifier looks at it once.
//!
//! A function takes numbers and its program's context, whose type differs by hook, and answers with a number, an
//! [`Outcome`]. Everything else stands in maps: see `datapath::Walk`.

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    programs::{TcContext, XdpContext},
};
use forwarder_common::{
    abi::reason::Reason,
    datapath::{Action, Hook, Outcome, Stop, Verdict, icmp, refuse},
};

use crate::{
    env::KernelEnv,
    maps::KernelTables,
    packet::{SkbPacket, XdpPacket},
};

/// An outcome as a number.
#[inline(always)]
fn pack(outcome: Outcome) -> u64 {
    let Outcome { verdict, reason } = outcome;
    let action = match verdict.action {
        Action::Transmit => 0,
        Action::Redirect => 1,
        Action::Pass => 2,
        Action::Drop => 3,
    };
    action << 48 | u64::from(reason.0) << 32 | u64::from(verdict.ifindex)
}

/// Reverse of [`pack`].
#[inline(always)]
fn unpack(number: u64) -> Outcome {
    let action = match number >> 48 {
        0 => Action::Transmit,
        1 => Action::Redirect,
        2 => Action::Pass,
        _ => Action::Drop,
    };
    Outcome {
        verdict: Verdict {
            action,
            ifindex: number as u32,
        },
        reason: Reason((number >> 32) as u16 as u32),
    }
}

/// `datapath::icmp` for the packet under way.
#[inline(always)]
pub(crate) fn icmp(env: &KernelEnv) -> Outcome {
    unpack(match env.hook {
        Hook::Xdp => forwarder_icmp_xdp(env.ctx.cast(), env.ingress_ifindex),
        Hook::XdpGeneric => forwarder_icmp_skb(env.ctx.cast(), env.ingress_ifindex),
        Hook::Tcx => forwarder_icmp_tcx(env.ctx.cast(), env.ingress_ifindex),
    })
}

/// `datapath::refuse` for the packet under way.
#[inline(always)]
pub(crate) fn refuse(env: &KernelEnv, reason: Reason) -> Outcome {
    unpack(match env.hook {
        Hook::Xdp => forwarder_refuse_xdp(env.ctx.cast(), reason.0),
        Hook::XdpGeneric => forwarder_refuse_skb(env.ctx.cast(), reason.0),
        Hook::Tcx => forwarder_refuse_tcx(env.ctx.cast(), reason.0),
    })
}

/// Both functions of a hook: their names, the context's type, and how a packet is made of it.
macro_rules! of_hook {
    ($icmp:ident $refuse:ident $context:ty, $hook:expr, $packet:expr) => {
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $icmp(ctx: *mut $context, ingress_ifindex: u32) -> u64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return pack(Stop::pass(Reason::INTERNAL).0);
            };
            let mut env = KernelEnv {
                ctx: ctx.cast(),
                hook: $hook,
                ingress_ifindex,
            };
            let (Ok(outcome) | Err(Stop(outcome))) = icmp::forward(
                &mut $packet(ctx),
                &mut KernelTables,
                &mut env,
                settings,
                walk,
            );
            pack(outcome)
        }

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $refuse(ctx: *mut $context, reason: u32) -> u64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return pack(Stop::drop(Reason::INTERNAL).0);
            };
            let reason = Reason(reason);
            pack(refuse::answer(
                &mut $packet(ctx),
                &mut KernelTables,
                settings,
                walk,
                reason,
            ))
        }
    };
}

of_hook!(forwarder_icmp_xdp forwarder_refuse_xdp xdp_md, Hook::Xdp, |ctx| XdpPacket::<false> { ctx: XdpContext::new(ctx) });
of_hook!(forwarder_icmp_skb forwarder_refuse_skb xdp_md, Hook::XdpGeneric, |ctx| XdpPacket::<true> { ctx: XdpContext::new(ctx) });
of_hook!(forwarder_icmp_tcx forwarder_refuse_tcx __sk_buff, Hook::Tcx, |ctx| SkbPacket { ctx: TcContext::new(ctx) });
