//! The binding of a new flow: its number, and the addresses both sides will see.

use super::{Stop, Tables, Walk};
use crate::{
    abi::{
        backend::{Backend, NatMode},
        flow::{FlowBinding, FlowId},
        reason::Reason,
        settings::{Settings, flag},
    },
    wire::{Be16, ipv4::PROTOCOL_ICMP},
};

/// Takes a free flow, or the one whose connection has `ended`, and in full NAT the (address, port) of the backend's
/// family that comes with its number.
#[inline(always)]
pub fn bind<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    nat: NatMode,
    backend: &Backend,
    ended: Option<FlowId>,
    walk: &mut Walk,
) -> Result<FlowId, Stop> {
    let Walk { frame, binding, .. } = walk;
    let key = &frame.key;
    let id = match ended {
        Some(id) => id,
        None => tables.take_flow().ok_or(Stop::drop(exhausted(settings)))?,
    };
    let is_v4 = backend.address.is_v4();
    if nat == NatMode::DNAT && is_v4 == key.is_v4() {
        binding.snat = key.source;
        binding.snat_port = key.source_port;
    } else {
        let Some(snat) = settings.pool.binding(id, is_v4) else {
            if ended.is_none() {
                tables.return_flow(id);
            }
            return Err(Stop::drop(Reason::POOL_EXHAUSTED));
        };
        binding.snat = snat.address;
        binding.snat_port = snat.port;
    }
    binding.client = key.source;
    binding.vip = key.destination;
    binding.backend = backend.address;
    binding.client_port = key.source_port;
    binding.vip_port = key.destination_port;
    // Echo messages have no port at that end.
    binding.backend_port = if backend.port == Be16::new(0) || key.protocol == u32::from(PROTOCOL_ICMP) {
        key.destination_port
    } else {
        backend.port
    };
    binding.protocol = key.protocol;
    binding.families = match (key.is_v4(), is_v4) {
        (true, true) => FlowBinding::BOTH_V4,
        (false, false) => FlowBinding::BOTH_V6,
        _ => 0,
    };
    Ok(id)
}

/// What there is too little of when no flow is free: the smaller of pool and flow table.
#[inline(always)]
const fn exhausted(settings: &Settings) -> Reason {
    if settings.flags & flag::POOL_IS_SMALLER != 0 {
        Reason::POOL_EXHAUSTED
    } else {
        Reason::FLOW_TABLE_FULL
    }
}
