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

/// What [`search`] found: the backend's id, or one of the constants, which are negative.
pub type Found = i64;
/// No backend takes new flows.
pub const NONE: Found = -1;
/// Those that take new flows have as many as they may have.
pub const FULL: Found = -2;
/// A slot does not exist.
pub const BROKEN: Found = -3;

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
    let slot = hash::scale(hash::flow_hash(key, settings.hash_seed), group.slot_count);
    let found = tables.search(group.first_slot, group.slot_count, slot);
    if found < 0 {
        return Err(Stop::drop(match found {
            NONE => Reason::NO_BACKEND,
            FULL => Reason::BACKEND_LIMIT,
            _ => Reason::INTERNAL,
        }));
    }
    let id = BackendId(found as u32);
    let backend = *tables.backend(id).ok_or(Stop::drop(Reason::INTERNAL))?;
    Ok((id, backend))
}

/// Looks for a backend from slot number `slot` of a group on, around its end; see [`Found`].
///
/// One number in, one out: so the kernel can run it as a function that its verifier looks at once, and not once
/// for each way that leads here.
#[inline(always)]
pub fn search<T: Tables>(tables: &mut T, first_slot: u32, slot_count: u32, mut slot: u32) -> Found {
    let mut found = NONE;
    for _ in 0..ATTEMPTS {
        let Some(id) = tables.slot(first_slot.wrapping_add(slot)) else {
            return BROKEN;
        };
        if let Some(backend) = tables.backend(id).copied()
            && backend.state == BackendState::HEALTHY
        {
            if quota::has_room(tables, id, &backend) {
                return Found::from(id.0);
            }
            found = FULL;
        }
        slot += 1;
        if slot >= slot_count {
            slot = 0;
        }
    }
    found
}
