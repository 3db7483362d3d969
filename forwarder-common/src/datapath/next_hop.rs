//! Where the rewritten packet goes next.
//!
//! A flow remembers its next hop in each direction. It is valid for one *route generation*: whenever routes,
//! neighbours or links change, the agent counts the generation up, and the next packet of each flow asks the
//! kernel again. So a hit costs no route lookup and none is ever stale.

use super::{Env, Hook, Route, Stop, Tables, Verdict, Walk, flow};
use crate::abi::{
    flow::{FlowKey, HopKind, NextHop},
    interface::InterfaceKey,
    reason::Reason,
    settings::Settings,
};

/// Brings the next hop in the walk's hit up to date; asks for a route only if the flow remembers none that holds.
#[inline(always)]
pub fn resolve<T: Tables, E: Env>(
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let hook = env.hook();
    let Walk { hit, key, .. } = walk;
    let hop = &mut hit.hop;
    if hop.kind != HopKind::UNKNOWN && hop.generation == settings.route_generation && hop.hook == hook as u8 {
        return Ok(());
    }
    *key = FlowKey {
        source: hit.rewrite.source,
        destination: hit.rewrite.destination,
        source_port: hit.rewrite.source_port,
        destination_port: hit.rewrite.destination_port,
        protocol: hit.protocol,
    };
    // Field by field; see `IpAddress::copied`. The others are written below or have no meaning without a link.
    hop.generation = settings.route_generation;
    hop.hook = hook as u8;
    hop.mtu_bytes = 0;
    hop.peer = 0;
    hop.vlans = [0; 2];
    match env.route(key) {
        Route::Neighbour { ifindex, link } => {
            leave_by(tables, hook, ifindex, hop);
            let is_direct = tables.can_send(hook, hop.ifindex);
            hop.kind = if is_direct {
                HopKind::DIRECT
            } else {
                HopKind::STACK
            };
            hop.link = link;
        }
        Route::Interface { ifindex } => {
            // tcx lets the kernel resolve the neighbour. From XDP the stack has to do it, with this very
            // packet, which by then is addressed to somebody else: it cannot be taken for the host's.
            hop.kind = if hook == Hook::Tcx {
                HopKind::DIRECT
            } else {
                HopKind::STACK
            };
            leave_by(tables, hook, ifindex, hop);
            if hook != Hook::Tcx && tables.can_send(hook, hop.ifindex) {
                // Not remembered: as soon as the neighbour is known, packets leave from here.
                return Ok(());
            }
        }
        Route::None => return Err(Stop::drop(Reason::NO_ROUTE)),
        Route::ForwardingDisabled => return Err(Stop::drop(Reason::FORWARDING_DISABLED)),
    }
    flow::store_hop(tables, hit.id, hit.direction, hop);
    Ok(())
}

/// Takes an egress interface into the next hop. Frames of a VLAN device leave from XDP by its carrier, with tags.
#[inline(always)]
fn leave_by<T: Tables>(tables: &T, hook: Hook, ifindex: u32, hop: &mut NextHop) {
    hop.ifindex = ifindex;
    let Some(egress) = tables.interface(&InterfaceKey { ifindex }) else {
        return;
    };
    hop.mtu_bytes = egress.mtu_bytes.min(u32::from(u16::MAX)) as u16;
    if hook != Hook::Tcx && egress.carrier_ifindex != 0 {
        hop.ifindex = egress.carrier_ifindex;
        hop.vlans = egress.vlans;
    }
}

/// Does the packet fit its way? One that may be fragmented is left to the stack, which does so.
///
/// In tcx the kernel looks after lengths. Generic XDP is handed packets above the MTU, aggregated (GRO, or a sender's
/// TSO through a veth), which the stack segments: there TCP is never too big.
///
/// # Errors
/// [`Reason::TOO_BIG`], with the size that fits in the walk's next hop.
#[inline(always)]
pub fn fit<E: Env>(env: &E, walk: &mut Walk) -> Result<(), Stop> {
    let Walk { frame, hit, .. } = walk;
    if hit.hop.mtu_bytes == 0 || frame.total_len <= u32::from(hit.hop.mtu_bytes) || env.hook() == Hook::Tcx {
        return Ok(());
    }
    let is_aggregated = env.hook() == Hook::XdpGeneric && frame.is_tcp();
    if frame.is_whole != 0 && !is_aggregated {
        return Err(Stop::drop(Reason::TOO_BIG));
    }
    hit.hop.kind = HopKind::STACK;
    Ok(())
}

/// The smaller MTU of the two interfaces the packet passes; zero: neither is known.
#[inline(always)]
pub fn path_mtu<T: Tables, E: Env>(tables: &T, env: &E, hop: &NextHop) -> u32 {
    let key = InterfaceKey {
        ifindex: env.ingress_ifindex(),
    };
    let ingress = tables.interface(&key).map_or(0, |interface| interface.mtu_bytes);
    let egress = u32::from(hop.mtu_bytes);
    if ingress == 0 || (egress != 0 && egress < ingress) {
        egress
    } else {
        ingress
    }
}

/// The verdict that sends a packet there.
#[inline(always)]
pub fn verdict<E: Env>(env: &E, hop: &NextHop) -> Verdict {
    if hop.kind != HopKind::DIRECT {
        Verdict::PASS
    } else if env.hook() != Hook::Tcx && hop.ifindex == env.ingress_ifindex() {
        Verdict::TRANSMIT
    } else {
        Verdict::redirect(hop.ifindex)
    }
}
