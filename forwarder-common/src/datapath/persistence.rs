//! Persistence: a client's new flow goes where its last one went, for as long as that serves and not too much time
//! has passed between them. It is kept by address, so it survives every change of the group's table.

use super::{
    Tables,
    backend::{Found, NONE},
    quota,
};
use crate::{
    abi::{
        backend::{BackendId, BackendState, GroupId},
        persistence::{Persistence, PersistenceKey},
    },
    wire::IpAddress,
};

/// The backend of the client's last flow, if it takes another one; else [`NONE`]. Counts as use.
#[inline(always)]
pub fn recall<T: Tables>(tables: &mut T, id: GroupId, client: &IpAddress, now_secs: u32) -> Found {
    let Some((key, timeout_secs)) = key(tables, id, client) else {
        return NONE;
    };
    let Some(kept) = tables.persistence(&key).copied() else {
        return NONE;
    };
    // Signed: another CPU may have used it in the second that begins here only now.
    if now_secs.wrapping_sub(kept.used_secs) as i32 >= timeout_secs as i32 {
        return NONE;
    }
    let Some(backend) = tables.backend(kept.backend).copied() else {
        return NONE;
    };
    let is_the_same = backend.address == kept.address && backend.port == kept.port;
    if !is_the_same
        || backend.state != BackendState::HEALTHY
        || !quota::has_room(tables, kept.backend, &backend)
    {
        return NONE;
    }
    if let Some(kept) = tables.persistence(&key) {
        kept.used_secs = now_secs;
    }
    Found::from(kept.backend.0)
}

/// Keeps where a client's new flow goes, in a group with persistence.
#[inline(always)]
pub fn keep<T: Tables>(
    tables: &mut T,
    id: GroupId,
    client: &IpAddress,
    backend_id: BackendId,
    now_secs: u32,
) {
    let Some((key, _)) = key(tables, id, client) else {
        return;
    };
    let Some(backend) = tables.backend(backend_id) else {
        return;
    };
    let kept = Persistence {
        backend: backend_id,
        address: backend.address,
        port: backend.port,
        reserved: 0,
        used_secs: now_secs,
    };
    tables.keep_persistence(&key, kept);
}

/// The client's key, and for how long what stands behind it holds; `None`: the group has no persistence.
#[inline(always)]
fn key<T: Tables>(tables: &T, id: GroupId, client: &IpAddress) -> Option<(PersistenceKey, u32)> {
    let group = tables.group(id)?;
    if group.persistence_secs == 0 {
        return None;
    }
    let bits = if client.is_v4() {
        IpAddress::V4_PREFIX_BITS + group.persistence_bits_v4
    } else {
        group.persistence_bits_v6
    };
    Some((PersistenceKey::new(id, *client, bits), group.persistence_secs))
}
