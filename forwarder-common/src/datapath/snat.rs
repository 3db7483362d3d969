//! The binding of a new flow: its number, and the addresses both sides will see.

use super::{Stop, Tables, parse::Frame};
use crate::{
    abi::{
        backend::{Backend, NatMode},
        flow::{FlowBinding, FlowId},
        reason::Reason,
        settings::{Settings, flag},
        snat::SnatBinding,
    },
    wire::Be16,
};

/// Takes a free flow, or the one whose connection has `ended`, and in full NAT the (address, port) that comes
/// with its number.
#[inline(always)]
pub fn bind<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    nat: NatMode,
    frame: &Frame,
    backend: &Backend,
    ended: Option<FlowId>,
) -> Result<(FlowId, FlowBinding), Stop> {
    let key = &frame.key;
    let id = match ended {
        Some(id) => id,
        None => tables.take_flow().ok_or(Stop::drop(exhausted(settings)))?,
    };
    let snat = if nat == NatMode::DNAT {
        SnatBinding {
            address: key.source,
            port: key.source_port,
        }
    } else {
        match settings.pool.binding(id) {
            Some(binding) => binding,
            None => {
                if ended.is_none() {
                    tables.return_flow(id);
                }
                return Err(Stop::drop(Reason::POOL_EXHAUSTED));
            }
        }
    };
    let binding = FlowBinding {
        client: key.source,
        vip: key.destination,
        snat: snat.address,
        backend: backend.address,
        client_port: key.source_port,
        vip_port: key.destination_port,
        snat_port: snat.port,
        backend_port: if backend.port == Be16::new(0) {
            key.destination_port
        } else {
            backend.port
        },
        protocol: key.protocol,
        reserved: 0,
    };
    Ok((id, binding))
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
