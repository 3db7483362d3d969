//! Which listener a packet is for: the one on its port, else the one with the narrowest range of ports around it.

use super::{Stop, Tables};
use crate::abi::{
    flow::FlowKey,
    listener::{Listener, ListenerKey, ListenerRangeKey, VipKey},
    reason::Reason,
    settings::Settings,
};

/// The listener of a request without a flow.
#[inline(always)]
pub fn lookup<T: Tables>(tables: &T, settings: &Settings, key: &FlowKey) -> Result<Listener, Stop> {
    let address = key.destination;
    // First, as most packets that are not ours end here.
    if !settings.filters.vips.may_have(address) {
        return Err(Stop::pass(Reason::NOT_OURS));
    }
    let (protocol, port) = (key.protocol as u8, key.destination_port);
    if let Some(listener) = tables.listener(&ListenerKey::new(address, port, protocol)) {
        return Ok(listener.copied());
    }
    let Some(vip) = tables.vip(&VipKey { address }) else {
        return Err(Stop::pass(Reason::NOT_OURS));
    };
    if vip.range_listeners != 0
        && let Some(listener) = tables.listener_range(&ListenerRangeKey::new(address, protocol, port, 16))
    {
        return Ok(listener.copied());
    }
    Err(Stop::pass(Reason::NO_LISTENER))
}
