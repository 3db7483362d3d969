//! Where the rewritten packet goes next.
//!
//! A flow remembers its next hop in each direction. It is valid for one *route generation*: whenever routes,
//! neighbours or links change, the agent counts the generation up, and the next packet of each flow asks the
//! kernel again. So a hit costs no route lookup and none is ever stale.

use super::{Env, Hook, Route, Stop, Tables, Verdict, flow::Hit};
use crate::abi::{
    flow::{FlowKey, HopKind, NextHop},
    interface::InterfaceKey,
    reason::Reason,
    settings::Settings,
};

/// The next hop of a packet of this flow; asks for a route only if the flow remembers none that holds.
#[inline(always)]
pub fn resolve<T: Tables, E: Env>(
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    hit: &Hit,
    protocol: u32,
) -> Result<NextHop, Stop> {
    let hook = env.hook();
    if hit.hop.kind != HopKind::UNKNOWN
        && hit.hop.generation == settings.route_generation
        && hit.hop.hook == hook as u8
    {
        return Ok(hit.hop);
    }
    let rewritten = FlowKey {
        source: hit.rewrite.source,
        destination: hit.rewrite.destination,
        source_port: hit.rewrite.source_port,
        destination_port: hit.rewrite.destination_port,
        protocol,
    };
    let mut hop = NextHop {
        generation: settings.route_generation,
        hook: hook as u8,
        ..NextHop::default()
    };
    match env.route(&rewritten) {
        Route::Neighbour { ifindex, link } => {
            let is_direct = tables.can_send(hook, ifindex);
            hop.kind = if is_direct {
                HopKind::DIRECT
            } else {
                HopKind::STACK
            };
            hop.ifindex = ifindex;
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
            hop.ifindex = ifindex;
            if hook != Hook::Tcx && tables.can_send(hook, ifindex) {
                // Not remembered: as soon as the neighbour is known, packets leave from here.
                return Ok(hop);
            }
        }
        Route::None => return Err(Stop::drop(Reason::NO_ROUTE)),
        Route::ForwardingDisabled => return Err(Stop::drop(Reason::FORWARDING_DISABLED)),
    }
    super::flow::store_hop(tables, hit.id, hit.direction, hop);
    Ok(hop)
}

/// The next hop for a packet of this length: generic XDP refuses to send packets above the egress MTU, which arrive
/// there aggregated (GRO, or a sender's TSO through a veth). The stack segments them.
#[inline(always)]
pub fn fitting<T: Tables, E: Env>(tables: &T, env: &E, hop: NextHop, total_len: u16) -> NextHop {
    if env.hook() != Hook::XdpGeneric || hop.kind != HopKind::DIRECT {
        return hop;
    }
    match tables.interface(&InterfaceKey { ifindex: hop.ifindex }) {
        Some(egress) if egress.mtu_bytes != 0 && u32::from(total_len) > egress.mtu_bytes => NextHop {
            kind: HopKind::STACK,
            ..hop
        },
        _ => hop,
    }
}

/// The smaller MTU of the two interfaces the packet passes; zero: neither is known.
#[inline(always)]
pub fn path_mtu<T: Tables, E: Env>(tables: &T, env: &E, hop: &NextHop) -> u32 {
    let mtu = |ifindex| {
        tables
            .interface(&InterfaceKey { ifindex })
            .map_or(0, |interface| interface.mtu_bytes)
    };
    let (ingress, egress) = (mtu(env.ingress_ifindex()), mtu(hop.ifindex));
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
