//! The walk, on one screen.

use super::{
    Action, Env, Hook, Outcome, Packet, Stop, Tables, TrafficEvent, Verdict, Walk, admission, arp, backend,
    express,
    flow::{self, Found, Hit},
    fragment::{self, part},
    handshake,
    icmp::Quote,
    listener, mss, neighbour, next_hop, open, overlay,
    parse::{self, Frame, Kind},
    quota, rate, rewrite, translate,
};
use crate::{
    abi::{
        flow::{Direction, FlowId, HopKind},
        listener::listener_flag,
        reason::Reason,
        settings::{Settings, flag},
    },
    wire::tcp::FLAG_RST,
};

/// What becomes of a packet; counts exactly one reason. `room` to work in, of any content, is asked for only where
/// the packet does not take the short way.
#[inline(always)]
pub fn forward<'w, P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    room: impl FnOnce() -> Option<&'w mut Walk>,
) -> Outcome {
    if let Some(outcome) = express::forward(packet, tables, env, settings) {
        return outcome;
    }
    let Some(walk) = room() else {
        return Stop::pass(Reason::INTERNAL).0;
    };
    look_inside(packet, tables, env, settings, walk);
    if walk.inside.is_tunnel()
        && let Some(outcome) = env.pass_through(packet, tables, settings, walk)
    {
        return outcome;
    }
    walk_on(packet, tables, env, settings, walk)
}

/// The way that every packet could take. `walk` is room to work in.
#[inline(always)]
pub fn the_walk<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
) -> Outcome {
    look_inside(packet, tables, env, settings, walk);
    walk_on(packet, tables, env, settings, walk)
}

/// The same from where it is known what is inside.
#[inline(always)]
fn walk_on<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
) -> Outcome {
    let frame_bytes = packet.frame_len();
    if settings.flags & flag::CAPTURE != 0 {
        env.capture(packet, walk);
    }
    let outcome = match stages(packet, tables, env, settings, walk, frame_bytes) {
        // An answer to what came through a tunnel goes back through it, from the device's tcx program.
        Err(Stop(refusal)) if refusal.reason.is_refusal() && walk.inside.is_tunnel() => {
            Stop::pass(Reason::TUNNEL_TO_STACK).0
        }
        Err(Stop(refusal)) if refusal.reason == Reason::SYN_COOKIE_SENT => {
            env.answer_syn(packet, tables, settings, walk)
        }
        Err(Stop(refusal)) if refusal.reason.is_refusal() => {
            refuse(packet, tables, env, settings, walk, refusal.reason)
        }
        Ok(outcome) | Err(Stop(outcome)) => outcome,
    };
    tables.count_reason(outcome.reason, frame_bytes);
    if settings.flags & flag::CAPTURE != 0 {
        env.captured(packet, walk, outcome);
    }
    outcome
}

#[inline(always)]
fn stages<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
    frame_bytes: usize,
) -> Result<Outcome, Stop> {
    walk.quote.transport_offset = Quote::NONE;
    let mut kind = parse::frame(packet, walk, frame_bytes)?;
    if kind == Kind::Icmp && !walk.inside.is_tunnel() {
        env.icmp(packet, tables, settings, walk)?;
        if !walk.quote.is_some() {
            kind = Kind::Flow;
        }
    }
    match kind {
        Kind::Flow => find_or_open(packet, tables, settings, walk)?,
        Kind::Fragment => match tables.follow(settings, walk) {
            fragment::FOUND => {}
            _ if walk.inside.is_tunnel() => return Err(Stop::pass(Reason::TUNNEL_TO_STACK)),
            reason => return Err(fragment::stop(packet, env, walk, Reason(reason as u32))),
        },
        _ if walk.inside.is_tunnel() => return Err(Stop::pass(Reason::TUNNEL_TO_STACK)),
        Kind::Arp => return arp::answer(packet, tables, settings, &walk.frame, env.ingress_ifindex()),
        // An error, whose flow is found.
        Kind::Icmp => {}
        Kind::Neighbour => {
            return neighbour::answer(packet, tables, settings, &walk.frame, env.ingress_ifindex());
        }
    }
    if walk.frame.fragment == part::FIRST {
        fragment::keep(tables, walk);
    }
    rewrite::check_ttl(&walk.frame)?;
    if walk.inside.is_tunnel() {
        overlay::check_congestion(walk.frame.tos, walk.inside.outer_tos)?;
        // For a header that is written anew; see `rewrite::leave`.
        walk.frame.tos = overlay::decapsulated_tos(walk.frame.tos, walk.inside.outer_tos);
    }
    translate::check(packet, walk)?;
    next_hop::resolve(tables, env, settings, walk)?;
    next_hop::fit(packet, env, walk)?;

    // No byte was changed above this line; below it no policy decides.
    let received_bytes = walk.frame.total_len;
    if walk.hit.by_cookie != 0 && !walk.quote.is_some() {
        packet.pass_handshake(tables, settings, walk)?;
    }
    let mtu_bytes = if mss::is_announced(&walk.frame) && settings.flags & flag::KEEP_SEGMENT_SIZE == 0 {
        next_hop::path_mtu(tables, env, walk)
    } else {
        0
    };
    if walk.frame.is_usual() {
        rewrite::apply(packet, walk, settings, mtu_bytes)?;
    } else {
        packet.rewrite_seldom(settings, walk)?;
    }
    if translate::is_due(&walk.frame, &walk.hit.rewrite) {
        packet.translate(walk)?;
    }
    packet.leave(tables, env.hook(), settings, walk)?;
    let verdict = next_hop::verdict(env, &walk.hit.hop);
    if walk.quote.is_some() {
        return Ok(sent(verdict, Reason::ICMP_FORWARDED, Reason::ICMP_TO_STACK));
    }
    count(tables, &walk.frame, &walk.hit, received_bytes);
    if verdict.action == Action::Pass && walk.hit.hop.kind == HopKind::AGENT {
        return Ok(fragment::cut(packet, env, walk));
    }
    Ok(if walk.hit.direction == Direction::REQUEST {
        sent(verdict, Reason::REQUEST_FORWARDED, Reason::REQUEST_TO_STACK)
    } else {
        sent(verdict, Reason::REPLY_FORWARDED, Reason::REPLY_TO_STACK)
    })
}

/// Finds what is inside of a packet of a tunnel. Only native XDP can take headers off and put them on: elsewhere the
/// stack holds on to what it knows of them.
#[inline(always)]
fn look_inside<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &T,
    env: &E,
    settings: &Settings,
    walk: &mut Walk,
) {
    walk.inside.network_offset = 0;
    if env.hook() == Hook::Xdp && settings.flags & flag::TUNNELS != 0 {
        packet.recognise(tables, walk);
    }
}

/// The end of the walk of a packet that goes on, by the program or by the stack.
#[inline(always)]
fn sent(verdict: Verdict, forwarded: Reason, to_stack: Reason) -> Outcome {
    let reason = if verdict.action == Action::Pass {
        to_stack
    } else {
        forwarded
    };
    Outcome { verdict, reason }
}

/// The flow of a packet, which it may open.
#[inline(always)]
fn find_or_open<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let found = flow::lookup(tables, settings, walk)?;
    if found == Found::Hit {
        return Ok(());
    }
    if walk.inside.is_tunnel() {
        return Err(Stop::pass(Reason::TUNNEL_TO_STACK));
    }
    admit(packet, tables, settings, walk, found.ended())?;
    open_flow(tables, settings, walk, found.ended())
}

/// May a packet without a flow open one of a listener?
#[inline(always)]
fn admit<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    ended: Option<FlowId>,
) -> Result<(), Stop> {
    walk.listener = listener::lookup(tables, settings, &walk.frame.key)?;
    let has_cookies = walk.listener.flags & listener_flag::COOKIES != 0 && walk.frame.is_tcp();
    if !has_cookies || !handshake::may_have_cookie(&walk.frame) {
        admission::admit(&walk.frame)?;
    }
    admission::refuse_own_source(tables, settings, &walk.frame)?;
    admission::admit_source(tables, &walk.listener, &walk.frame)?;
    rewrite::check_ttl(&walk.frame)?;
    if has_cookies {
        handshake::outcome(packet.admit_handshake(tables, settings, walk, ended))?;
    }
    if walk.listener.flags & listener_flag::RATE != 0 {
        rate::outcome(tables.charge(walk))?;
    }
    Ok(())
}

/// The slow path, once per flow.
#[inline(always)]
fn open_flow<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    ended: Option<FlowId>,
) -> Result<(), Stop> {
    if let Some(id) = ended {
        quota::leave_ended(tables, id);
    }
    let opened = backend::select(tables, settings, walk).and_then(|backend| {
        match tables.open(settings, walk, backend, ended) {
            open::DONE => Ok(()),
            reason => Err(Stop::drop(Reason(reason as u32))),
        }
    });
    if opened.is_err() {
        tables.count_listener(walk.listener.id, TrafficEvent::FlowRefused);
    }
    opened
}

/// A packet that goes no further, and whose sender is told.
#[inline(always)]
fn refuse<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &Walk,
    reason: Reason,
) -> Outcome {
    let outcome = env.refuse(packet, tables, settings, walk, reason);
    if outcome.verdict == Verdict::TRANSMIT && reason.is_flow_refusal() {
        tables.count_listener(walk.listener.id, TrafficEvent::RefusalSent);
    }
    outcome
}

#[inline(always)]
fn count<T: Tables>(tables: &mut T, frame: &Frame, hit: &Hit, bytes: u32) {
    let reset = frame.tcp_flags & FLAG_RST != 0;
    let event = if hit.direction == Direction::REQUEST {
        TrafficEvent::Request { bytes, reset }
    } else {
        TrafficEvent::Reply {
            bytes,
            reset,
            first: hit.is_first_answer != 0,
        }
    };
    tables.count_listener(hit.listener, event);
    tables.count_backend(hit.backend, event);
}
