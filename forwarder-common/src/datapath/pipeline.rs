//! The walk, on one screen.

use super::{
    Action, Env, Outcome, Packet, Stop, Tables, TrafficEvent, Verdict, admission, arp, backend, echo,
    flow::{self, Found, Hit},
    listener, mss, next_hop,
    parse::{self, Frame, Parsed},
    quota, refuse, rewrite, snat,
};
use crate::{
    abi::{
        flow::{Direction, FlowId},
        listener::Listener,
        reason::Reason,
        settings::Settings,
    },
    wire::tcp::FLAG_RST,
};

/// What becomes of a packet; counts exactly one reason.
#[inline(always)]
pub fn forward<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> Outcome {
    let frame_bytes = packet.frame_len();
    let outcome = match walk(packet, tables, env, settings) {
        Ok(outcome) | Err(Stop(outcome)) => outcome,
    };
    tables.count_reason(outcome.reason, frame_bytes);
    outcome
}

#[inline(always)]
fn walk<P: Packet, T: Tables, E: Env>(
    packet: &mut P,
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> Result<Outcome, Stop> {
    let frame = match parse::frame(packet)? {
        Parsed::Flow(frame) => frame,
        Parsed::Arp => return arp::answer(packet, tables, settings, env.ingress_ifindex()),
        Parsed::Icmp { transport_offset } => return echo::answer(packet, tables, transport_offset),
    };
    let hit = match flow::lookup(tables, settings, &frame)? {
        Found::Hit(hit) => hit,
        found => {
            let listener = admit(tables, settings, &frame)?;
            match open(tables, env, settings, &frame, &listener, found.ended()) {
                Ok(hit) => hit,
                Err(Stop(refusal)) => return refuse(packet, tables, settings, &frame, &listener, refusal),
            }
        }
    };
    rewrite::check_ttl(&frame)?;
    let hop = next_hop::resolve(tables, env, settings, &hit, frame.key.protocol)?;
    let hop = next_hop::fitting(tables, env, hop, frame.total_len);
    let mtu_bytes = if mss::is_announced(&frame) {
        next_hop::path_mtu(tables, env, &hop)
    } else {
        0
    };

    // No byte was changed above this line; below it no policy decides.
    rewrite::apply(
        packet,
        &frame,
        &hit.rewrite,
        &hop,
        env.hook(),
        settings,
        mtu_bytes,
    )?;
    count(tables, &frame, &hit);
    let verdict = next_hop::verdict(env, &hop);
    Ok(Outcome {
        verdict,
        reason: reason(hit.direction, verdict),
    })
}

/// The listener that a packet without a flow may open one of.
#[inline(always)]
fn admit<T: Tables>(tables: &mut T, settings: &Settings, frame: &Frame) -> Result<Listener, Stop> {
    let listener = listener::lookup(tables, &frame.key)?;
    admission::admit(frame)?;
    admission::refuse_own_source(tables, settings, frame)?;
    admission::admit_source(tables, &listener, frame)?;
    rewrite::check_ttl(frame)?;
    Ok(listener)
}

/// The slow path, once per flow.
#[inline(always)]
fn open<T: Tables, E: Env>(
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    frame: &Frame,
    listener: &Listener,
    ended: Option<FlowId>,
) -> Result<Hit, Stop> {
    if let Some(id) = ended {
        quota::leave_ended(tables, id);
    }
    let group = *tables.group(listener.group).ok_or(Stop::drop(Reason::INTERNAL))?;
    let (backend_id, backend) = backend::select(tables, env, settings, listener.group, &group, &frame.key)?;
    quota::enter(tables, listener, backend_id, &backend)?;
    let opened = snat::bind(tables, settings, group.nat, frame, &backend, ended).and_then(|(id, binding)| {
        flow::open(tables, id, ended.is_some(), &binding, listener, backend_id, frame)
    });
    if opened.is_ok() {
        tables.count_listener(listener.id, TrafficEvent::FlowOpened);
        tables.count_backend(backend_id, TrafficEvent::FlowOpened);
    } else {
        tables.count_backend(backend_id, TrafficEvent::FlowRefused);
        quota::leave(tables, listener.id, backend_id);
    }
    opened
}

/// A listener's packet that could not open a flow.
#[inline(always)]
fn refuse<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    frame: &Frame,
    listener: &Listener,
    refusal: Outcome,
) -> Result<Outcome, Stop> {
    tables.count_listener(listener.id, TrafficEvent::FlowRefused);
    if !refusal.reason.is_refusal() {
        return Err(Stop(refusal));
    }
    let outcome = refuse::answer(packet, frame, settings, refusal.reason)?;
    tables.count_listener(listener.id, TrafficEvent::RefusalSent);
    Ok(outcome)
}

#[inline(always)]
fn count<T: Tables>(tables: &mut T, frame: &Frame, hit: &Hit) {
    let bytes = frame.total_len;
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

#[inline(always)]
fn reason(direction: Direction, verdict: Verdict) -> Reason {
    match (direction, verdict.action) {
        (Direction::REQUEST, Action::Pass) => Reason::REQUEST_TO_STACK,
        (Direction::REQUEST, _) => Reason::REQUEST_FORWARDED,
        (_, Action::Pass) => Reason::REPLY_TO_STACK,
        (_, _) => Reason::REPLY_FORWARDED,
    }
}
