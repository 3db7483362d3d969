//! The rewrite as data: what a packet's addresses and ports become, and the one place that changes bytes.
//!
//! Request and reply come from one [`FlowBinding`]: a request becomes `snat -> backend`, a reply
//! `vip -> client`. The checksum deltas of the two are each other's reverse, so an entry stores one pair.

use bytemuck::{Pod, Zeroable};

use super::{
    Hook, Packet, Stop, Tables, Walk, echo, fragment::part, icmp, mss, overlay, parse::Frame, sctp,
    translate, translate_error, transport_checksum,
};
use crate::{
    abi::{
        flow::{Direction, FlowBinding, FlowEntry, HopKind, NextHop},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        self, Be16, IpAddress, LinkPair, WireHeader,
        checksum::Delta,
        ethernet::{
            ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, EthernetHeader, VlanTag,
        },
        ipv4::Ipv4Header,
        ipv6::Ipv6Header,
    },
};

/// What a packet becomes.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Rewrite {
    pub source: IpAddress,
    pub destination: IpAddress,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// What the new addresses change in the IP header's sum and in the pseudo-header's.
    pub addresses: Delta,
    /// What the new ports change in the transport header's sum.
    pub ports: Delta,
    pub reserved: u32,
}

/// Source and destination port, at the start of TCP, UDP and SCTP alike.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Ports {
    pub(super) source: Be16,
    pub(super) destination: Be16,
}

impl WireHeader for Ports {}

impl Ports {
    /// Both, for the checksum of SCTP.
    #[inline(always)]
    pub(super) const fn word(&self) -> u32 {
        wire::sctp::ports(self.source, self.destination)
    }
}

impl Rewrite {
    /// The deltas of a request's addresses and ports.
    #[inline(always)]
    pub const fn deltas(binding: &FlowBinding) -> (Delta, Delta) {
        let addresses = Delta::ZERO
            .replace_address(binding.client, binding.snat)
            .replace_address(binding.vip, binding.backend);
        let ports = Delta::ZERO
            .replace16(binding.client_port, binding.snat_port)
            .replace16(binding.vip_port, binding.backend_port);
        (addresses, ports)
    }

    /// Becomes the rewrite of one direction of a flow.
    #[inline(always)]
    pub fn set(&mut self, entry: &FlowEntry, direction: Direction) {
        let binding = &entry.binding;
        let (addresses, ports) = (
            Delta::from_folded(entry.address_delta),
            Delta::from_folded(entry.port_delta),
        );
        if direction == Direction::REQUEST {
            self.source = binding.snat.copied();
            self.destination = binding.backend.copied();
            self.source_port = binding.snat_port;
            self.destination_port = binding.backend_port;
            self.addresses = addresses;
            self.ports = ports;
        } else {
            self.source = binding.vip.copied();
            self.destination = binding.client.copied();
            self.source_port = binding.vip_port;
            self.destination_port = binding.client_port;
            self.addresses = addresses.reversed();
            self.ports = ports.reversed();
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

/// Changes a packet of TCP or UDP.
///
/// `mtu_bytes`: what an announced segment size has to fit, see `mss`; zero: it is left alone. The TTL is decremented
/// unless the stack routes the packet, which then does it.
#[inline(always)]
pub fn apply<P: Packet>(
    packet: &mut P,
    walk: &Walk,
    settings: &Settings,
    mtu_bytes: u32,
) -> Result<(), Stop> {
    let (frame, rewrite, hop) = (&walk.frame, &walk.hit.rewrite, &walk.hit.hop);
    let is_sent = hop.kind == HopKind::DIRECT;
    if frame.fragment == part::LATER {
        if !translate::is_due(frame, rewrite) {
            network(packet, frame, rewrite, is_sent)?;
        }
    } else {
        let checksum = transport_checksum::state(packet, frame, settings)?;
        let segment_size = if mtu_bytes == 0 {
            Delta::ZERO
        } else {
            mss::clamp(packet, frame, rewrite, mtu_bytes)?
        };
        if !translate::is_due(frame, rewrite) {
            network(packet, frame, rewrite, is_sent)?;
        }

        let ports = packet.header::<Ports>(frame.transport_offset as usize)?;
        ports.source = rewrite.source_port;
        ports.destination = rewrite.destination_port;

        // The checksum does not care where in the transport header a word changed.
        let change = transport_checksum::Change {
            addresses: rewrite.addresses,
            words: rewrite.ports.and(segment_size),
        };
        transport_checksum::update(packet, frame, change, checksum, is_sent)?;
    }
    Ok(())
}

/// Changes any other packet.
#[inline(always)]
pub fn apply_seldom<P: Packet>(packet: &mut P, settings: &Settings, walk: &mut Walk) -> Result<(), Stop> {
    if walk.quote.is_some() {
        if translate::is_due(&walk.frame, &walk.hit.rewrite) {
            return translate_error::rewrite(packet, walk);
        }
        icmp::rewrite(packet, walk)
    } else if walk.frame.is_sctp() {
        sctp::rewrite(packet, settings, walk)
    } else {
        echo::rewrite(packet, walk)
    }
}

/// New addresses; and, in a packet that is sent, a hop less.
#[inline(always)]
pub fn network<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    rewrite: &Rewrite,
    is_sent: bool,
) -> Result<(), Stop> {
    let offset = frame.network_offset as usize;
    if !frame.is_v4() {
        let ip = packet.header::<Ipv6Header>(offset)?;
        ip.hop_limit -= u8::from(is_sent);
        ip.set_addresses(&rewrite.source, &rewrite.destination);
        return Ok(());
    }
    let ip = packet.header::<Ipv4Header>(offset)?;
    let mut delta = rewrite.addresses;
    if is_sent {
        let before = ip.ttl_word();
        ip.ttl -= 1;
        delta = delta.replace_raw(before, ip.ttl_word());
    }
    ip.checksum = delta.apply(ip.checksum);
    ip.source = rewrite.source.low();
    ip.destination = rewrite.destination.low();
    Ok(())
}

/// Puts in front of the rewritten IP packet what belongs there on its way, whatever stood there before. The stack gets
/// what it would have got without a tunnel.
#[inline(always)]
pub fn leave<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    hook: Hook,
    settings: &Settings,
    walk: &Walk,
) -> Result<(), Stop> {
    let hop = &walk.hit.hop;
    let is_sent = hop.kind == HopKind::DIRECT;
    if hook == Hook::Tcx {
        // The kernel writes the link header as it sends.
        return Ok(());
    }
    // A packet of the other family by now has a new header, with nothing but a link header before it where that is
    // for the stack.
    let is_translated = walk.frame.is_v4() != (walk.inside.ethertype == ETHERTYPE_IPV4);
    if walk.inside.is_tunnel() && !is_translated {
        overlay::carry_congestion(packet, &walk.inside)?;
        if !is_sent {
            return overlay::strip(packet, &walk.inside);
        }
    }
    match is_sent {
        false => Ok(()),
        true if hook == Hook::Xdp && hop.peer != 0 => overlay::encapsulate(packet, tables, settings, walk),
        true => link(packet, &walk.frame, hop),
    }
}

/// The link header and the tags for the next hop, whatever stood before the IP header.
#[inline(always)]
fn link<P: Packet>(packet: &mut P, frame: &Frame, hop: &NextHop) -> Result<(), Stop> {
    let tags = hop.tags();
    let surplus = frame.network_offset as i32 - tags.link_len() as i32;
    if surplus != 0 {
        packet.move_start(surplus)?;
    }
    write_link(packet, hop.link, tags, frame.is_v4())
}

/// The link header and the tags that the frame had, right before its new IP header.
#[inline(always)]
pub fn relink<P: Packet>(packet: &mut P, frame: &mut Frame, link: LinkPair) -> Result<(), Stop> {
    let tags = frame.tags();
    packet.move_start(frame.network_offset as i32 - tags.link_len() as i32)?;
    frame.transport_offset = frame.transport_offset + tags.link_len() as u32 - frame.network_offset;
    frame.network_offset = tags.link_len() as u32;
    write_link(packet, link, tags, frame.is_v4())
}

/// VLAN tags of a frame.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tags {
    /// The outer one first.
    pub control: [Be16; 2],
    pub count: u32,
}

impl Tags {
    /// A frame without.
    pub const NONE: Self = Self {
        control: [Be16::ZERO; 2],
        count: 0,
    };

    /// Length of the link header with them, in bytes.
    #[inline(always)]
    pub const fn link_len(&self) -> usize {
        EthernetHeader::LEN + self.count as usize * VlanTag::LEN
    }
}

impl NextHop {
    /// The tags that frames leave with.
    #[inline(always)]
    pub const fn tags(&self) -> Tags {
        let [outer, inner] = self.vlans;
        Tags {
            control: [Be16::new(outer), Be16::new(inner)],
            count: (outer != 0) as u32 + (inner != 0) as u32,
        }
    }
}

/// Writes the link header and the tags, for which there is room before the IP header.
#[inline(always)]
pub fn write_link<P: Packet>(packet: &mut P, link: LinkPair, tags: Tags, is_v4: bool) -> Result<(), Stop> {
    let network = if is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    // IEEE 802.1ad: the outer of two tags has an EtherType of its own.
    let ethertype = match tags.count {
        0 => network,
        1 => ETHERTYPE_VLAN,
        _ => ETHERTYPE_SERVICE_VLAN,
    };
    *packet.header::<EthernetHeader>(0)? = EthernetHeader { link, ethertype };
    if tags.count >= 1 {
        *packet.header::<VlanTag>(EthernetHeader::LEN)? = VlanTag {
            control: tags.control[0],
            ethertype: if tags.count == 1 { network } else { ETHERTYPE_VLAN },
        };
    }
    if tags.count >= 2 {
        *packet.header::<VlanTag>(EthernetHeader::LEN + VlanTag::LEN)? = VlanTag {
            control: tags.control[1],
            ethertype: network,
        };
    }
    Ok(())
}
