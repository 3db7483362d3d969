//! How many flows a listener and a backend may have at a time.
//!
//! Both are counted exactly, by all CPUs together, whether they have a limit or not: a limit that is set later
//! has to know. The agent counts a flow out when its connection has ended or its time is over, long before its
//! entry is free for another.

use super::{Gauge, Stop, Tables};
use crate::abi::{
    backend::{Backend, BackendId},
    flow::FlowId,
    listener::{Listener, ListenerId},
    reason::Reason,
};

/// Counts a new flow in.
///
/// # Errors
/// [`Reason::LISTENER_LIMIT`] or [`Reason::BACKEND_LIMIT`]; then nothing is counted.
#[inline(always)]
pub fn enter<T: Tables>(
    tables: &mut T,
    listener: &Listener,
    backend_id: BackendId,
    backend: &Backend,
) -> Result<(), Stop> {
    let gauge = tables
        .listener_live(listener.id)
        .ok_or(Stop::drop(Reason::INTERNAL))?;
    if !enter_one(gauge, listener.max_flows) {
        return Err(Stop::drop(Reason::LISTENER_LIMIT));
    }
    let is_backend_entered = match tables.backend_live(backend_id) {
        Some(gauge) => enter_one(gauge, backend.max_flows),
        None => false,
    };
    if !is_backend_entered {
        if let Some(gauge) = tables.listener_live(listener.id) {
            gauge.add(-1);
        }
        return Err(Stop::drop(Reason::BACKEND_LIMIT));
    }
    Ok(())
}

/// Counts a flow out.
#[inline(always)]
pub fn leave<T: Tables>(tables: &mut T, listener: ListenerId, backend: BackendId) {
    if let Some(gauge) = tables.listener_live(listener) {
        gauge.add(-1);
    }
    if let Some(gauge) = tables.backend_live(backend) {
        gauge.add(-1);
    }
}

/// Counts out a flow whose entry is about to serve another connection, unless the agent has done so already.
#[inline(always)]
pub fn leave_ended<T: Tables>(tables: &mut T, id: FlowId) {
    let Some(entry) = tables.flow(id) else { return };
    let (was_counted, listener, backend) = (entry.counted != 0, entry.listener, entry.backend);
    entry.counted = 0;
    if was_counted {
        leave(tables, listener, backend);
    }
}

/// Has a backend room for one more? A look ahead: [`enter`] decides.
#[inline(always)]
pub fn has_room<T: Tables>(tables: &mut T, id: BackendId, backend: &Backend) -> bool {
    live(tables, id).is_some_and(|flows| is_room_beside(flows, backend))
}

/// How many flows a backend has now.
#[inline(always)]
pub fn live<T: Tables>(tables: &mut T, id: BackendId) -> Option<u64> {
    tables.backend_live(id).map(|gauge| gauge.get())
}

/// May a backend have one more beside so many?
#[inline(always)]
pub fn is_room_beside(flows: u64, backend: &Backend) -> bool {
    flows <= last_place(backend.max_flows)
}

/// Counts first and looks then, so that of two CPUs at the last place one gets it.
#[inline(always)]
fn enter_one<G: Gauge>(gauge: &mut G, limit: u32) -> bool {
    let before = gauge.add(1);
    if before > last_place(limit) {
        gauge.add(-1);
        return false;
    }
    true
}

/// The largest number of other flows beside which there is room: without a limit, any. In one comparison, as the
/// verifier follows each branch of the loop that asks for room.
#[inline(always)]
const fn last_place(limit: u32) -> u64 {
    (limit as u64).wrapping_sub(1)
}
