//! Which listener a packet is for: the exact port, else any port.

use super::{Stop, Tables};
use crate::{
    abi::{
        flow::FlowKey,
        listener::{Listener, ListenerKey, VipKey},
        reason::Reason,
    },
    wire::Be16,
};

/// The listener of a request without a flow.
#[inline(always)]
pub fn lookup<T: Tables>(tables: &T, key: &FlowKey) -> Result<Listener, Stop> {
    let exact = ListenerKey::new(key.destination, key.destination_port, key.protocol as u8);
    if let Some(listener) = tables.listener(&exact) {
        return Ok(*listener);
    }
    let any_port = ListenerKey::new(key.destination, Be16::new(0), key.protocol as u8);
    if let Some(listener) = tables.listener(&any_port) {
        return Ok(*listener);
    }
    let is_vip = tables
        .vip(&VipKey {
            address: key.destination,
        })
        .is_some();
    Err(Stop::pass(if is_vip {
        Reason::NO_LISTENER
    } else {
        Reason::NOT_OURS
    }))
}
