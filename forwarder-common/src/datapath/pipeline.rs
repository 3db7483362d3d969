//! The walk, on one screen.

use super::{
    Action, Env, Outcome, Packet, Stop, Tables, TrafficEvent, Verdict, admission, arp, backend, echo,
    flow::{self, Found, Hit},
    listener, mss, next_hop,
    parse::{self, Frame, Parsed},
    rewrite, snat,
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
        Found::Ended(id) => open(tables, settings, &frame, Some(id))?,
        Found::Nothing => open(tables, settings, &frame, None)?,
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

/// The slow path, once per flow.
#[inline(always)]
fn open<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    frame: &Frame,
    ended: Option<FlowId>,
) -> Result<Hit, Stop> {
    let listener = listener::lookup(tables, &frame.key)?;
    admission::admit(frame)?;
    admission::refuse_own_source(tables, settings, frame)?;
    rewrite::check_ttl(frame)?;
    let opened = open_for(tables, settings, frame, ended, &listener);
    let event = if opened.is_ok() {
        TrafficEvent::FlowOpened
    } else {
        TrafficEvent::FlowRefused
    };
    tables.count_listener(listener.id, event);
    opened
}

#[inline(always)]
fn open_for<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    frame: &Frame,
    ended: Option<FlowId>,
    listener: &Listener,
) -> Result<Hit, Stop> {
    let group = *tables.group(listener.group).ok_or(Stop::drop(Reason::INTERNAL))?;
    let (backend_id, backend) = backend::select(tables, settings, &group, &frame.key)?;
    let (id, binding) = snat::bind(tables, settings, group.nat, frame, &backend, ended)?;
    let hit = flow::open(tables, id, ended.is_some(), &binding, listener, backend_id, frame)?;
    tables.count_backend(backend_id, TrafficEvent::FlowOpened);
    Ok(hit)
}

#[inline(always)]
fn count<T: Tables>(tables: &mut T, frame: &Frame, hit: &Hit) {
    let bytes = frame.total_len;
    let reset = frame.tcp_flags & FLAG_RST != 0;
    let event = if hit.direction == Direction::REQUEST {
        TrafficEvent::Request { bytes, reset }
    } else {
        TrafficEvent::Reply { bytes, reset }
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
