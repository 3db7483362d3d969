//! Where the rewritten packet goes next.
//!
//! A flow remembers its next hop in each direction. It is valid for one *route generation*: whenever routes,
//! neighbours or links change, the agent counts the generation up, and the next packet of each flow asks the
//! kernel again. So a hit costs no route lookup and none is ever stale.
//!
//! Where the way to a backend depends on its address alone ([`ONE_WAY`]), a new flow takes the one that the last new
//! flow to it has found that came in by the same interface, of the same generation: so the kernel is asked once for each
//! backend, and not for each flow.

use super::{
    Env, Hook, Packet, Route, Stop, Tables, Verdict, Walk,
    flow::{self, Hit},
    translate,
};
use crate::{
    abi::{
        flow::{Direction, FlowKey, HopKind, NextHop},
        interface::{Interface, InterfaceKey, flag},
        reason::Reason,
        settings::{
            Settings,
            flag::{ONE_WAY, TUNNELS},
        },
        tunnel::{PeerId, TunnelHopKey},
    },
    wire::{Be16, MacAddress, WireHeader as _, ipv4::PROTOCOL_UDP, tcp::TcpHeader, udp::UdpHeader},
};

/// Brings the next hop in the walk's hit up to date; asks for a route only if the flow remembers none that holds.
#[inline(always)]
pub fn resolve<T: Tables, E: Env>(
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let hop = &walk.hit.hop;
    if hop.kind != HopKind::UNKNOWN
        && hop.generation == settings.route_generation
        && hop.hook == env.hook() as u8
    {
        return Ok(());
    }
    env.find_next_hop(tables, settings, walk)
}

/// Takes the way that the backend's last new flow has found, or asks for a route.
///
/// # Errors
/// Always a drop: [`Reason::NO_ROUTE`], [`Reason::FORWARDING_DISABLED`].
#[inline(always)]
pub fn find<T: Tables, E: Env>(
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let (hook, ingress_ifindex) = (env.hook(), env.ingress_ifindex());
    let is_shared = is_shared(settings, walk);
    let Walk { hit, key, .. } = walk;
    if is_shared && recall(tables, settings, hook, ingress_ifindex, hit) {
        flow::store_hop(tables, hit.id, hit.direction, &hit.hop);
        return Ok(());
    }
    let hop = &mut hit.hop;
    *key = FlowKey {
        source: hit.rewrite.source,
        destination: hit.rewrite.destination,
        source_port: hit.rewrite.source_port,
        destination_port: hit.rewrite.destination_port,
        protocol: u32::from(translate::protocol_number(
            hit.protocol,
            hit.rewrite.destination.is_v4(),
        )),
    };
    // Field by field; see `IpAddress::copied`. The others are written below or have no meaning without a link.
    hop.generation = settings.route_generation;
    hop.hook = hook as u8;
    hop.mtu_bytes = 0;
    hop.peer = 0;
    hop.vlans = [0; 2];
    let route = env.route(key);
    if hook == Hook::Xdp
        && settings.flags & TUNNELS != 0
        && let Some(id) = peer(tables, &route, key.is_v4())
    {
        if into_tunnel(tables, env, key, id, hop) {
            remember(tables, is_shared, ingress_ifindex, hit);
        }
        return Ok(());
    }
    match route {
        Route::Neighbour { ifindex, link } => {
            hop.kind = if leave_by(tables, hook, ifindex, hop) {
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
            let can_send = leave_by(tables, hook, ifindex, hop);
            if hook != Hook::Tcx && can_send {
                // Not remembered: as soon as the neighbour is known, packets leave from here.
                return Ok(());
            }
        }
        Route::None => return Err(Stop::drop(Reason::NO_ROUTE)),
        Route::ForwardingDisabled => return Err(Stop::drop(Reason::FORWARDING_DISABLED)),
    }
    remember(tables, is_shared, ingress_ifindex, hit);
    Ok(())
}

/// Is the packet's way that of all requests to its backend?
#[inline(always)]
fn is_shared(settings: &Settings, walk: &Walk) -> bool {
    settings.flags & ONE_WAY != 0
        && walk.hit.direction == Direction::REQUEST
        && walk.hit.rewrite.destination.is_v4()
}

/// Takes the way to the hit's backend from what is known of it, if that holds.
#[inline(always)]
fn recall<T: Tables>(
    tables: &mut T,
    settings: &Settings,
    hook: Hook,
    ingress_ifindex: u32,
    hit: &mut Hit,
) -> bool {
    let Some(known) = tables.backend_hop(hit.backend) else {
        return false;
    };
    let holds = known.hop.kind != HopKind::UNKNOWN
        && known.hop.generation == settings.route_generation
        && known.hop.hook == hook as u8
        && known.ingress_ifindex == ingress_ifindex
        && known.address == hit.rewrite.destination;
    if holds {
        hit.hop = known.hop.copied();
    }
    holds
}

/// Remembers where the hit's packets go, in its flow and for those of its backend that it shares its way with.
#[inline(always)]
fn remember<T: Tables>(tables: &mut T, is_shared: bool, ingress_ifindex: u32, hit: &Hit) {
    flow::store_hop(tables, hit.id, hit.direction, &hit.hop);
    if is_shared && let Some(known) = tables.backend_hop(hit.backend) {
        known.address = hit.rewrite.destination.copied();
        known.hop = hit.hop.copied();
        known.ingress_ifindex = ingress_ifindex;
    }
}

/// The far end of a native tunnel that a route leads to.
#[inline(always)]
fn peer<T: Tables>(tables: &T, route: &Route, is_v4: bool) -> Option<PeerId> {
    let (ifindex, mac) = match *route {
        Route::Neighbour { ifindex, link } => (ifindex, link.destination()),
        Route::Interface { ifindex } => (ifindex, MacAddress::default()),
        Route::None | Route::ForwardingDisabled => return None,
    };
    let find = |mac| {
        tables.tunnel_hop(&TunnelHopKey {
            ifindex,
            mac,
            version: if is_v4 { 4 } else { 6 },
        })
    };
    // Devices without Ethernet give their neighbours an address as well: some bytes of their own IP address
    // (`arp_constructor`, Linux 6.12).
    find(mac).or_else(|| find(MacAddress::default()))
}

/// The next hop on the way to a far end. `false`: its neighbour is not known yet, and until then packets go to the
/// stack, whose device makes it ask. `key` is room to work in.
#[inline(always)]
fn into_tunnel<T: Tables, E: Env>(
    tables: &T,
    env: &mut E,
    key: &mut FlowKey,
    id: PeerId,
    hop: &mut NextHop,
) -> bool {
    hop.kind = HopKind::STACK;
    let Some(far) = tables.tunnel_peer(id) else {
        return false;
    };
    *key = FlowKey {
        source: far.local.copied(),
        destination: far.remote.copied(),
        source_port: Be16::ZERO,
        destination_port: Be16::ZERO,
        protocol: u32::from(PROTOCOL_UDP),
    };
    let mtu_bytes = far.mtu_bytes.min(u32::from(u16::MAX)) as u16;
    hop.mtu_bytes = mtu_bytes;
    let Route::Neighbour { ifindex, link } = env.route(key) else {
        return false;
    };
    if !leave_by(tables, Hook::Xdp, ifindex, hop) {
        return false;
    }
    hop.kind = HopKind::DIRECT;
    hop.link = link;
    hop.peer = u32::from(id.0);
    hop.mtu_bytes = mtu_bytes;
    true
}

/// Takes an egress interface into the next hop: can frames leave through it straight from this hook? Frames of a VLAN
/// device leave from XDP by its carrier, with tags.
#[inline(always)]
fn leave_by<T: Tables>(tables: &T, hook: Hook, ifindex: u32, hop: &mut NextHop) -> bool {
    hop.ifindex = ifindex;
    let Some(egress) = tables.interface(&InterfaceKey { ifindex }) else {
        return hook == Hook::Tcx;
    };
    hop.mtu_bytes = egress.mtu_bytes.min(u32::from(u16::MAX)) as u16;
    if hook == Hook::Tcx || egress.carrier_ifindex == 0 {
        return egress.can_send(hook);
    }
    hop.ifindex = egress.carrier_ifindex;
    hop.vlans = egress.vlans;
    let carrier = InterfaceKey {
        ifindex: egress.carrier_ifindex,
    };
    tables
        .interface(&carrier)
        .is_some_and(|carrier| carrier.can_send(hook))
}

impl Interface {
    /// Can frames leave through it straight from this hook? Through all others the stack sends.
    #[inline(always)]
    const fn can_send(&self, hook: Hook) -> bool {
        let wanted = match hook {
            Hook::Xdp => flag::SEND_NATIVE,
            Hook::XdpGeneric => flag::SEND_GENERIC,
            Hook::Tcx => return true,
        };
        self.flags & wanted != 0
    }
}

/// Does the packet fit its way? One that may be fragmented is left to the stack, which does so, or to the agent.
///
/// Generic XDP is handed packets above the MTU, aggregated (GRO, or a sender's TSO through a veth), which the stack
/// segments: there TCP is never too big. In tcx the kernel says how large the segments are.
///
/// # Errors
/// [`Reason::TOO_BIG`]; the size that fits is in the walk's next hop.
#[inline(always)]
pub fn fit<P: Packet, E: Env>(packet: &mut P, env: &E, walk: &mut Walk) -> Result<(), Stop> {
    let len = translate::len_then(walk);
    let Walk { frame, hit, .. } = walk;
    let mtu_bytes = u32::from(hit.hop.mtu_bytes);
    if mtu_bytes == 0 || len <= mtu_bytes {
        return Ok(());
    }
    let segment_size = packet.segment_size();
    if segment_size != 0 {
        // Of SCTP the kernel does not say how large the largest is (Linux: GSO_BY_FRAGS).
        if !frame.is_usual() {
            return Ok(());
        }
        let offset = frame.transport_offset as usize;
        let header_len = if frame.is_tcp() {
            packet.header::<TcpHeader>(offset)?.header_len()
        } else {
            UdpHeader::LEN
        };
        if len - frame.transport_len + header_len as u32 + segment_size <= mtu_bytes {
            return Ok(());
        }
    }
    let is_aggregated = env.hook() == Hook::XdpGeneric && frame.is_tcp();
    if frame.is_whole != 0 && !is_aggregated {
        return Err(Stop::drop(Reason::TOO_BIG));
    }
    // Of IPv6 no router fragments what it forwards, the stack neither.
    hit.hop.kind = if hit.rewrite.destination.is_v4() || is_aggregated {
        HopKind::STACK
    } else {
        HopKind::AGENT
    };
    Ok(())
}

/// The smaller MTU of the two interfaces the packet passes; zero: neither is known.
#[inline(always)]
pub fn path_mtu<T: Tables, E: Env>(tables: &T, env: &E, walk: &Walk) -> u32 {
    let key = InterfaceKey {
        ifindex: env.ingress_ifindex(),
    };
    let ingress = if walk.inside.is_tunnel() {
        walk.inside.mtu_bytes
    } else {
        tables.interface(&key).map_or(0, |interface| interface.mtu_bytes)
    };
    let egress = u32::from(walk.hit.hop.mtu_bytes);
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
