//! Which backend serves a new flow: the one that served its client before, or one from the group's table.

use super::{Gauge as _, Stop, Tables, Walk, hash, persistence, quota};
use crate::abi::{
    backend::{BackendId, BackendState, GroupId, Selection},
    reason::Reason,
    settings::Settings,
};

/// How many slots are tried before giving up. The agent takes a failed backend out of the table; until it has,
/// the slots behind it step in. With half of a group failed at once, one new flow in 65 536 finds none.
const ATTEMPTS: u32 = 16;

/// What a search found: the backend's id, or one of the constants, which are negative.
pub type Found = i64;
/// No backend takes new flows.
pub const NONE: Found = -1;
/// Those that take new flows have as many as they may have.
pub const FULL: Found = -2;
/// A slot does not exist.
pub const BROKEN: Found = -3;

/// A backend that takes new flows and has room for one.
#[inline(always)]
pub fn select<T: Tables>(tables: &mut T, settings: &Settings, walk: &Walk) -> Result<BackendId, Stop> {
    let key = &walk.frame.key;
    let group = tables
        .group(walk.listener.group)
        .ok_or(Stop::drop(Reason::INTERNAL))?;
    let has_persistence = group.persistence_secs != 0;
    let hash = if group.selection == Selection::SOURCE_IP {
        hash::source_hash(key.source, settings.hash_seed)
    } else {
        hash::flow_hash(key, settings.hash_seed)
    };
    let now_secs = if has_persistence { tables.now_secs() } else { 0 };
    let found = tables.choose(walk, hash, now_secs);
    if found < 0 {
        return Err(Stop::drop(match found {
            NONE => Reason::NO_BACKEND,
            FULL => Reason::BACKEND_LIMIT,
            _ => Reason::INTERNAL,
        }));
    }
    Ok(BackendId(found as u32))
}

/// Chooses a backend of the group of the walk's listener for the client of its frame; see [`Found`].
///
/// Numbers in, one out: so the kernel can run it, and the searches below, as functions that its verifier looks at
/// once, and not once for each way that leads there. Their stack is short, too, so each step looks up the group for
/// itself, which costs a nanosecond, instead of keeping a copy.
#[inline(always)]
pub fn choose<T: Tables>(tables: &mut T, walk: &Walk, hash: u32, now_secs: u32) -> Found {
    let (id, client) = (walk.listener.group, &walk.frame.key.source);
    let found = persistence::recall(tables, id, client, now_secs);
    if found >= 0 {
        return found;
    }
    let mut found = search_first(tables, id, hash);
    if found == NONE || found == FULL {
        found = search_overflow(tables, id, hash, found);
    }
    if found >= 0 {
        persistence::keep(tables, id, client, BackendId(found as u32), now_secs);
    }
    found
}

/// Searches the group's first table.
#[inline(always)]
fn search_first<T: Tables>(tables: &mut T, id: GroupId, hash: u32) -> Found {
    let Some(group) = tables.group(id) else {
        return BROKEN;
    };
    let (selection, first_slot, slot_count) = (group.selection, group.first_slot, group.slot_count);
    if slot_count == 0 {
        return NONE;
    }
    let mut slot = hash::scale(hash, slot_count);
    if selection == Selection::ROUND_ROBIN {
        let Some(turns) = tables.group_turns(id) else {
            return BROKEN;
        };
        slot = (turns.add(1) % u64::from(slot_count)) as u32;
    }
    look(tables, selection, first_slot, slot_count, slot)
}

/// Searches the table behind the group's first one, in which `found` was found. "Full" says more than "none".
#[inline(always)]
fn search_overflow<T: Tables>(tables: &mut T, id: GroupId, hash: u32, found: Found) -> Found {
    let Some(group) = tables.group(id) else {
        return BROKEN;
    };
    let first_slot = group.first_slot.wrapping_add(group.slot_count);
    let (selection, slot_count) = (group.selection, group.overflow_slot_count);
    if slot_count == 0 {
        return found;
    }
    match look(
        tables,
        selection,
        first_slot,
        slot_count,
        hash::scale(hash, slot_count),
    ) {
        NONE => found,
        beyond => beyond,
    }
}

#[inline(always)]
fn look<T: Tables>(
    tables: &mut T,
    selection: Selection,
    first_slot: u32,
    slot_count: u32,
    slot: u32,
) -> Found {
    if selection == Selection::LEAST_CONNECTIONS {
        tables.search_least(first_slot, slot_count, slot)
    } else {
        tables.search(first_slot, slot_count, slot)
    }
}

/// The first backend with room from slot number `slot` of a table on, around its end.
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

/// Of the backends in the slots from number `slot` on, the one with the fewest live flows for its weight, counting the
/// one that is about to be opened; of equals, the first. In tables of up to 16 backends these are all.
#[inline(always)]
pub fn search_least<T: Tables>(tables: &mut T, first_slot: u32, slot_count: u32, mut slot: u32) -> Found {
    let mut found = NONE;
    let (mut least_flows, mut least_weight) = (0_u64, 0_u64);
    for _ in 0..ATTEMPTS {
        let Some(id) = tables.slot(first_slot.wrapping_add(slot)) else {
            return BROKEN;
        };
        if let Some(backend) = tables.backend(id).copied()
            && backend.state == BackendState::HEALTHY
            && let Some(flows) = quota::live(tables, id)
        {
            let (flows_then, weight) = (flows.wrapping_add(1), u64::from(backend.weight));
            if !quota::is_room_beside(flows, &backend) {
                if found < 0 {
                    found = FULL;
                }
            } else if found < 0 || flows_then.wrapping_mul(least_weight) < least_flows.wrapping_mul(weight) {
                (least_flows, least_weight) = (flows_then, weight);
                found = Found::from(id.0);
            }
        }
        slot += 1;
        if slot >= slot_count {
            slot = 0;
        }
    }
    found
}
