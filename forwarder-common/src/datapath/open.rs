//! Opens a flow, once a backend is chosen: a place among the live flows, a binding, an entry.
//!
//! Everything it reads and writes stands in the walk and in the tables, and its answer is a number: so the kernel can
//! run it as a function of its own, with a stack of its own frame only and verified once.

use super::{Stop, Tables, TrafficEvent, Walk, flow, handshake, quota, snat};
use crate::abi::{
    backend::{Backend, BackendId, NatMode},
    flow::FlowId,
    reason::Reason,
    settings::Settings,
};

/// What became of it: [`DONE`], or the number of the reason why not.
pub type Opened = i64;
/// The flow is open and the walk has its hit.
pub const DONE: Opened = -1;

/// Opens a flow to this backend for the walk's frame, which the walk's listener admits. `ended`: the entry it takes
/// over, see [`flow::Found::Ended`].
#[inline(always)]
pub fn open<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    backend: BackendId,
    ended: Option<FlowId>,
) -> Opened {
    match try_open(tables, settings, walk, backend, ended) {
        Ok(()) => DONE,
        Err(Stop(outcome)) => Opened::from(outcome.reason.0),
    }
}

#[inline(always)]
fn try_open<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    id: BackendId,
    ended: Option<FlowId>,
) -> Result<(), Stop> {
    let broken = Stop::drop(Reason::INTERNAL);
    let nat = tables.group(walk.listener.group).ok_or(broken)?.nat;
    let backend = *tables.backend(id).ok_or(broken)?;
    quota::enter(tables, &walk.listener, id, &backend)?;
    let opened = bind(tables, settings, walk, nat, id, &backend, ended);
    let listener = walk.listener.id;
    if opened.is_ok() {
        tables.count_listener(listener, TrafficEvent::FlowOpened);
        tables.count_backend(id, TrafficEvent::FlowOpened);
    } else {
        tables.count_backend(id, TrafficEvent::FlowRefused);
        quota::leave(tables, listener, id);
    }
    opened
}

#[inline(always)]
fn bind<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    nat: NatMode,
    id: BackendId,
    backend: &Backend,
    ended: Option<FlowId>,
) -> Result<(), Stop> {
    let flow = snat::bind(tables, settings, nat, backend, ended, walk)?;
    if handshake::is_opening(&walk.frame) {
        handshake::keep(tables, walk, flow);
    }
    flow::open(tables, flow, ended.is_some(), id, walk)
}
