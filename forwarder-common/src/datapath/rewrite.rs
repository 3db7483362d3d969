//! The rewrite as data: what a packet's addresses and ports become, and the one place that changes bytes.
//!
//! Request and reply come from one [`FlowBinding`]: a request becomes `snat -> backend`, a reply
//! `vip -> client`. The checksum deltas of the two are each other's reverse, so an entry stores one pair.

use super::{Hook, Packet, Stop, mss, parse::Frame, parse::NETWORK_OFFSET, transport_checksum};
use crate::{
    abi::{
        flow::{Direction, FlowBinding, FlowEntry, HopKind, NextHop},
        reason::Reason,
        settings::Settings,
    },
    wire::{Be16, Ipv4Address, checksum::Delta, ethernet::EthernetHeader, ipv4::Ipv4Header},
};

/// What a packet becomes.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rewrite {
    pub source: Ipv4Address,
    pub destination: Ipv4Address,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// What the new addresses change in the IP header's sum and in the pseudo-header's.
    pub addresses: Delta,
    /// What the new ports change in the transport header's sum.
    pub ports: Delta,
}

/// Source and destination port, at the start of TCP and UDP alike.
#[repr(C, packed)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Ports {
    source: Be16,
    destination: Be16,
}

impl crate::wire::WireHeader for Ports {}

impl Rewrite {
    /// The deltas of a request's addresses and ports.
    #[inline(always)]
    pub const fn deltas(binding: &FlowBinding) -> (Delta, Delta) {
        let addresses = Delta::ZERO
            .replace32(binding.client.0, binding.snat.0)
            .replace32(binding.vip.0, binding.backend.0);
        let ports = Delta::ZERO
            .replace16(binding.client_port, binding.snat_port)
            .replace16(binding.vip_port, binding.backend_port);
        (addresses, ports)
    }

    /// No new addresses or ports: only this change of words under the transport checksum.
    #[inline(always)]
    pub const fn of_transport(ports: Delta) -> Self {
        Self {
            source: Ipv4Address::new([0; 4]),
            destination: Ipv4Address::new([0; 4]),
            source_port: Be16::new(0),
            destination_port: Be16::new(0),
            addresses: Delta::ZERO,
            ports,
        }
    }

    /// The rewrite of one direction of a flow.
    #[inline(always)]
    pub fn of(entry: &FlowEntry, direction: Direction) -> Self {
        let binding = &entry.binding;
        let (addresses, ports) = (
            Delta::from_folded(entry.address_delta),
            Delta::from_folded(entry.port_delta),
        );
        if direction == Direction::REQUEST {
            Self {
                source: binding.snat,
                destination: binding.backend,
                source_port: binding.snat_port,
                destination_port: binding.backend_port,
                addresses,
                ports,
            }
        } else {
            Self {
                source: binding.vip,
                destination: binding.client,
                source_port: binding.vip_port,
                destination_port: binding.client_port,
                addresses: addresses.reversed(),
                ports: ports.reversed(),
            }
        }
    }
}

/// May the packet travel on?
///
/// # Errors
/// [`Reason::TTL_EXCEEDED`]: RFC 1812 §5.3.1, a router must not forward it.
#[inline(always)]
pub const fn check_ttl(frame: &Frame) -> Result<(), Stop> {
    if frame.ttl <= 1 {
        Err(Stop::drop(Reason::TTL_EXCEEDED))
    } else {
        Ok(())
    }
}

/// Changes the packet.
///
/// `mtu_bytes`: what an announced segment size has to fit, see `mss`; zero: it is left alone. The TTL is decremented unless the stack routes the packet, which then does it.
#[inline(always)]
pub fn apply<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    rewrite: &Rewrite,
    hop: &NextHop,
    hook: Hook,
    settings: &Settings,
    mtu_bytes: u32,
) -> Result<(), Stop> {
    let is_sent = hop.kind == HopKind::DIRECT;
    let checksum = transport_checksum::state(packet, frame, settings)?;
    let segment_size = if mtu_bytes == 0 {
        Delta::ZERO
    } else {
        mss::clamp(packet, frame, mtu_bytes)?
    };
    // The checksum does not care where in the transport header a word changed.
    let transport = Rewrite {
        ports: rewrite.ports.and(segment_size),
        ..*rewrite
    };

    let ip = packet.header::<Ipv4Header>(NETWORK_OFFSET)?;
    let mut delta = rewrite.addresses;
    if is_sent {
        let before = ip.ttl_word();
        ip.ttl -= 1;
        delta = delta.replace_raw(before, ip.ttl_word());
    }
    ip.checksum = delta.apply(ip.checksum);
    ip.source = rewrite.source;
    ip.destination = rewrite.destination;

    let ports = packet.header::<Ports>(frame.transport_offset)?;
    ports.source = rewrite.source_port;
    ports.destination = rewrite.destination_port;

    transport_checksum::update(packet, frame, &transport, checksum, is_sent)?;

    // In tcx the kernel writes the link header as it sends.
    if is_sent && hook != Hook::Tcx {
        packet.header::<EthernetHeader>(0)?.link = hop.link;
    }
    Ok(())
}
