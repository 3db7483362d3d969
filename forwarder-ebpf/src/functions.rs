//! What packets need seldom, as functions of their own in BPF as well: each has a stack frame of its own, of the 512
//! bytes that a chain of calls has together, and the verifier looks at it once.
//!
//! A function takes numbers and its program's context, whose type differs by hook, and answers with a number, an
//! [`Outcome`]. Everything else stands in maps: see `datapath::Walk`.

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    programs::{TcContext, XdpContext},
};
use forwarder_common::{
    abi::{
        flow::{Direction, FlowId},
        reason::Reason,
        tunnel::PeerId,
    },
    datapath::{
        Action, Hook, Outcome, Stop, Verdict, express, handshake, icmp, next_hop, overlay, refuse, rewrite,
        translate, translate_error,
    },
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

/// In place of an outcome: the walk goes on.
const ON: u64 = u64::MAX;

/// `datapath::icmp::find` for the packet under way.
#[inline(always)]
pub(crate) fn icmp(env: &KernelEnv) -> Result<(), Stop> {
    let found = match env.hook {
        Hook::Xdp | Hook::XdpGeneric => forwarder_icmp_xdp(env.ctx.cast()),
        Hook::Tcx => forwarder_icmp_tcx(env.ctx.cast()),
    };
    if found == ON {
        Ok(())
    } else {
        Err(Stop(unpack(found)))
    }
}

/// Functions for which native and generic XDP are the same: their names, the context's type, and how a packet is made
/// of it.
macro_rules! of_context {
    ($icmp:ident $equal:ident $translate:ident $admit:ident $context:ty, $packet:expr) => {
        /// `ended`: the number of the flow to take over, or a negative one.
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $admit(ctx: *mut $context, ended: i64) -> i64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return i64::from(Reason::INTERNAL.0);
            };
            let ended = if ended < 0 {
                None
            } else {
                Some(FlowId(ended as u32))
            };
            handshake::admit(&mut $packet(ctx), &mut KernelTables, settings, walk, ended)
        }

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $icmp(ctx: *mut $context) -> u64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return pack(Stop::pass(Reason::INTERNAL).0);
            };
            match icmp::find(&mut $packet(ctx), &mut KernelTables, settings, walk) {
                Ok(()) => ON,
                Err(Stop(outcome)) => pack(outcome),
            }
        }

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $equal(ctx: *mut $context) -> i64 {
            let Some(walk) = KernelTables::walk() else {
                return i64::from(Reason::INTERNAL.0);
            };
            number(translate_error::find(&mut $packet(ctx), walk))
        }

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $translate(ctx: *mut $context) -> i64 {
            let Some(walk) = KernelTables::walk() else {
                return i64::from(Reason::INTERNAL.0);
            };
            number(translate::apply(&mut $packet(ctx), walk))
        }
    };
}

of_context!(forwarder_icmp_xdp forwarder_equal_xdp forwarder_translate_xdp forwarder_admit_xdp xdp_md, |ctx| XdpPacket::<false> { ctx: XdpContext::new(ctx) });
of_context!(forwarder_icmp_tcx forwarder_equal_tcx forwarder_translate_tcx forwarder_admit_tcx __sk_buff, |ctx| SkbPacket { ctx: TcContext::new(ctx) });

/// `datapath::rewrite::apply_seldom` for a frame in XDP.
#[inline(always)]
pub(crate) fn seldom_xdp(ctx: *mut xdp_md, is_generic: bool) -> Result<(), Stop> {
    outcome(if is_generic {
        forwarder_seldom_skb(ctx)
    } else {
        forwarder_seldom_xdp(ctx)
    })
}

/// `datapath::rewrite::apply_seldom` for a packet in tcx.
#[inline(always)]
pub(crate) fn seldom_tcx(ctx: *mut __sk_buff) -> Result<(), Stop> {
    outcome(forwarder_seldom_tcx(ctx))
}

/// `datapath::handshake::admit` for a frame in XDP.
#[inline(always)]
pub(crate) fn admit_xdp(ctx: *mut xdp_md, ended: Option<FlowId>) -> handshake::Admitted {
    forwarder_admit_xdp(ctx, ended.map_or(-1, |id| i64::from(id.0)))
}

/// `datapath::handshake::admit` for a packet in tcx.
#[inline(always)]
pub(crate) fn admit_tcx(ctx: *mut __sk_buff, ended: Option<FlowId>) -> handshake::Admitted {
    forwarder_admit_tcx(ctx, ended.map_or(-1, |id| i64::from(id.0)))
}

/// `datapath::handshake::pass` for a frame in XDP.
#[inline(always)]
pub(crate) fn pass_xdp(ctx: *mut xdp_md, is_generic: bool) -> Result<(), Stop> {
    outcome(if is_generic {
        forwarder_pass_skb(ctx)
    } else {
        forwarder_pass_xdp(ctx)
    })
}

/// `datapath::handshake::pass` for a packet in tcx.
#[inline(always)]
pub(crate) fn pass_tcx(ctx: *mut __sk_buff) -> Result<(), Stop> {
    outcome(forwarder_pass_tcx(ctx))
}

/// `datapath::handshake::answer` for the packet under way.
#[inline(always)]
pub(crate) fn answer_syn(env: &KernelEnv) -> Outcome {
    unpack(match env.hook {
        Hook::Xdp => forwarder_syn_xdp(env.ctx.cast()),
        Hook::XdpGeneric => forwarder_syn_skb(env.ctx.cast()),
        Hook::Tcx => forwarder_syn_tcx(env.ctx.cast()),
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

/// What a function answers that has done what it was asked for; else the number of the reason why not.
const DONE: i64 = -1;

#[inline(always)]
fn outcome(number: i64) -> Result<(), Stop> {
    match number {
        DONE => Ok(()),
        reason => Err(Stop::drop(Reason(reason as u32))),
    }
}

#[inline(always)]
fn number(outcome: Result<(), Stop>) -> i64 {
    match outcome {
        Ok(()) => DONE,
        Err(Stop(outcome)) => i64::from(outcome.reason.0),
    }
}

/// `datapath::next_hop::find` for the walk's flow, in XDP.
#[inline(always)]
pub(crate) fn next_hop(env: &KernelEnv) -> Result<(), Stop> {
    let is_native = u32::from(env.hook == Hook::Xdp);
    outcome(forwarder_next_hop(env.ctx.cast(), is_native, env.ingress_ifindex))
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_next_hop(ctx: *mut xdp_md, is_native: u32, ingress_ifindex: u32) -> i64 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return i64::from(Reason::INTERNAL.0);
    };
    let mut env = KernelEnv {
        ctx: ctx.cast(),
        hook: if is_native != 0 {
            Hook::Xdp
        } else {
            Hook::XdpGeneric
        },
        ingress_ifindex,
    };
    number(next_hop::find(&mut KernelTables, &mut env, settings, walk))
}

/// `datapath::overlay::recognise` for a frame in native XDP.
#[inline(always)]
pub(crate) fn recognise(ctx: *mut xdp_md) {
    forwarder_inside(ctx);
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_inside(ctx: *mut xdp_md) -> i64 {
    let Some(walk) = KernelTables::walk() else {
        return i64::from(Reason::INTERNAL.0);
    };
    let mut packet = XdpPacket::<false> {
        ctx: XdpContext::new(ctx),
    };
    overlay::recognise(&mut packet, &KernelTables, walk);
    DONE
}

/// `datapath::express::through` for a frame in native XDP.
#[inline(always)]
pub(crate) fn pass_through(env: &KernelEnv) -> Option<Outcome> {
    match forwarder_through(env.ctx.cast(), env.ingress_ifindex) {
        ON => None,
        outcome => Some(unpack(outcome)),
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_through(ctx: *mut xdp_md, ingress_ifindex: u32) -> u64 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return ON;
    };
    let mut packet = XdpPacket::<false> {
        ctx: XdpContext::new(ctx),
    };
    let env = KernelEnv {
        ctx: ctx.cast(),
        hook: Hook::Xdp,
        ingress_ifindex,
    };
    express::through(&mut packet, &mut KernelTables, &env, settings, &walk.inside).map_or(ON, pack)
}

/// `datapath::overlay::enter` for a frame in native XDP.
#[inline(always)]
pub(crate) fn enter_tunnel(ctx: *mut xdp_md, entrant: &overlay::Entrant) -> Result<(), Stop> {
    let overlay::Entrant {
        id,
        direction,
        peer,
        total_len,
    } = *entrant;
    outcome(forwarder_enter(
        ctx,
        id.0,
        direction.0,
        u32::from(peer.0),
        u32::from(total_len),
    ))
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_enter(ctx: *mut xdp_md, id: u32, direction: u32, peer: u32, total_len: u32) -> i64 {
    let Some(settings) = KernelTables::settings() else {
        return i64::from(Reason::INTERNAL.0);
    };
    let mut packet = XdpPacket::<false> {
        ctx: XdpContext::new(ctx),
    };
    let entrant = overlay::Entrant {
        id: FlowId(id),
        direction: Direction(direction),
        peer: PeerId(peer as u16),
        total_len: total_len as u16,
    };
    number(overlay::enter(&mut packet, &mut KernelTables, settings, &entrant))
}

/// `datapath::rewrite::leave` for a frame in XDP.
#[inline(always)]
pub(crate) fn leave(ctx: *mut xdp_md, hook: Hook) -> Result<(), Stop> {
    outcome(forwarder_leave(ctx, u32::from(hook == Hook::Xdp)))
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_leave(ctx: *mut xdp_md, is_native: u32) -> i64 {
    let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
        return i64::from(Reason::INTERNAL.0);
    };
    let mut packet = XdpPacket::<false> {
        ctx: XdpContext::new(ctx),
    };
    let hook = if is_native != 0 {
        Hook::Xdp
    } else {
        Hook::XdpGeneric
    };
    number(rewrite::leave(&mut packet, &KernelTables, hook, settings, walk))
}

/// `datapath::translate_error::find` for a frame in XDP.
#[inline(always)]
pub(crate) fn equal_xdp(ctx: *mut xdp_md) -> Result<(), Stop> {
    outcome(forwarder_equal_xdp(ctx))
}

/// `datapath::translate_error::find` for a packet in tcx.
#[inline(always)]
pub(crate) fn equal_tcx(ctx: *mut __sk_buff) -> Result<(), Stop> {
    outcome(forwarder_equal_tcx(ctx))
}

/// `datapath::translate::apply` for a frame in XDP.
#[inline(always)]
pub(crate) fn translate_xdp(ctx: *mut xdp_md) -> Result<(), Stop> {
    outcome(forwarder_translate_xdp(ctx))
}

/// `datapath::translate::apply` for a packet in tcx.
#[inline(always)]
pub(crate) fn translate_tcx(ctx: *mut __sk_buff) -> Result<(), Stop> {
    outcome(forwarder_translate_tcx(ctx))
}

/// Functions of a hook: their names, the context's type, and how a packet is made of it.
macro_rules! of_hook {
    ($refuse:ident $seldom:ident $syn:ident $pass:ident $context:ty, $packet:expr) => {
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $syn(ctx: *mut $context) -> u64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return pack(Stop::drop(Reason::INTERNAL).0);
            };
            pack(handshake::answer(
                &mut $packet(ctx),
                &mut KernelTables,
                settings,
                walk,
            ))
        }

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $pass(ctx: *mut $context) -> i64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return i64::from(Reason::INTERNAL.0);
            };
            number(handshake::pass(
                &mut $packet(ctx),
                &mut KernelTables,
                settings,
                walk,
            ))
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

        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $seldom(ctx: *mut $context) -> i64 {
            let (Some(settings), Some(walk)) = (KernelTables::settings(), KernelTables::walk()) else {
                return i64::from(Reason::INTERNAL.0);
            };
            number(rewrite::apply_seldom(&mut $packet(ctx), settings, walk))
        }
    };
}

of_hook!(forwarder_refuse_xdp forwarder_seldom_xdp forwarder_syn_xdp forwarder_pass_xdp xdp_md, |ctx| XdpPacket::<false> { ctx: XdpContext::new(ctx) });
of_hook!(forwarder_refuse_skb forwarder_seldom_skb forwarder_syn_skb forwarder_pass_skb xdp_md, |ctx| XdpPacket::<true> { ctx: XdpContext::new(ctx) });
of_hook!(forwarder_refuse_tcx forwarder_seldom_tcx forwarder_syn_tcx forwarder_pass_tcx __sk_buff, |ctx| SkbPacket { ctx: TcContext::new(ctx) });
