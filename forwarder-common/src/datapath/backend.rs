//! Which backend serves a new flow: its Maglev slot, or a slot nearby.

use super::{Stop, Tables, hash, quota};
use crate::abi::{
    backend::{Backend, BackendGroup, BackendId, BackendState},
    flow::FlowKey,
    reason::Reason,
    settings::Settings,
};

/// How many slots are tried before giving up. The agent takes a failed backend out of the table; until it has,
/// the slots behind it step in. With half of a group failed at once, one new flow in 65 536 finds none.
const ATTEMPTS: u32 = 16;

/// A backend that takes new flows and has room for one.
#[inline(always)]
pub fn select<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    group: &BackendGroup,
    key: &FlowKey,
) -> Result<(BackendId, Backend), Stop> {
    if group.slot_count == 0 {
        return Err(Stop::drop(Reason::NO_BACKEND));
    }
    let mut reason = Reason::NO_BACKEND;
    let mut slot = hash::scale(hash::flow_hash(key, settings.hash_seed), group.slot_count);
    for _ in 0..ATTEMPTS {
        let id = tables
            .slot(group.first_slot.wrapping_add(slot))
            .ok_or(Stop::drop(Reason::INTERNAL))?;
        if let Some(backend) = tables.backend(id).copied()
            && backend.state == BackendState::HEALTHY
        {
            if quota::has_room(tables, id, &backend) {
                return Ok((id, backend));
            }
            reason = Reason::BACKEND_LIMIT;
        }
        slot += 1;
        if slot >= group.slot_count {
            slot = 0;
        }
    }
    Err(Stop::drop(reason))
}
