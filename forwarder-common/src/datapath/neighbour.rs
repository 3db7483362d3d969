//! Answers IPv6 neighbour solicitations for VIPs and SNAT addresses (RFC 4861 §7.2.4): what `arp` is to IPv4.

use bytemuck::{Pod, Zeroable};

use super::{Outcome, Packet, Stop, Tables, Verdict, admission, parse::Frame, rewrite};
use crate::{
    abi::{interface::InterfaceKey, reason::Reason, settings::Settings},
    wire::{
        Be16, Be32, IpAddress, LinkPair, MacAddress, WireHeader, checksum,
        ethernet::EthernetHeader,
        icmp::{IcmpHeader, TYPE_NEIGHBOUR_ADVERTISEMENT, TYPE_NEIGHBOUR_SOLICITATION},
        ipv6::{Ipv6Header, PROTOCOL_ICMPV6},
    },
};

/// RFC 4861 §7.1.1: a message with a smaller hop limit has passed a router and is forged.
const HOP_LIMIT: u8 = 255;
/// RFC 4861 §4.4: "solicited" and "override".
const FLAGS: u32 = 0x6000_0000;
/// RFC 4861 §4.6.1: option with the target's link address.
const OPTION_TARGET_LINK: u8 = 2;

/// A solicitation or an advertisement with one option, the link address of its sender or target.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Message {
    icmp: IcmpHeader,
    target: IpAddress,
    option: u8,
    /// In units of 8 bytes.
    option_len: u8,
    mac: MacAddress,
}

impl WireHeader for Message {}

/// Turns a solicitation for one of our addresses into its answer; `ifindex` is the interface it came in by.
///
/// One without the sender's link address, or from the unspecified address, passes: the first is a sender's choice
/// that no system makes, the second looks for a duplicate of the address (RFC 4862 §5.4).
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    settings: &Settings,
    frame: &Frame,
    ifindex: u32,
) -> Result<Outcome, Stop> {
    let pass = Stop::pass(Reason::NOT_OURS);
    let offset = frame.transport_offset as usize;
    if frame.transport_len as usize != Message::LEN || frame.ttl != HOP_LIMIT {
        return Err(pass);
    }
    let message = packet.header::<Message>(offset)?;
    let asked = message.target;
    // A mapped address is not one of IPv6, whatever we have of IPv4.
    let is_ours = !asked.is_v4() && admission::is_own(tables, settings, asked);
    if message.icmp.icmp_type != TYPE_NEIGHBOUR_SOLICITATION
        || message.icmp.code != 0
        || frame.key.source == IpAddress::UNSPECIFIED
        || !is_ours
    {
        return Err(pass);
    }
    let Some(mac) = tables
        .interface(&InterfaceKey { ifindex })
        .map(|interface| interface.mac)
    else {
        return Err(pass);
    };
    let asker = frame.key.source;
    let message = packet.header::<Message>(offset)?;
    *message = Message {
        icmp: IcmpHeader {
            rest: Be32::new(FLAGS),
            ..IcmpHeader::of_type(TYPE_NEIGHBOUR_ADVERTISEMENT, 0)
        },
        target: asked,
        option: OPTION_TARGET_LINK,
        option_len: 1,
        mac,
    };
    let pseudo = checksum::pseudo_header(asked, asker, PROTOCOL_ICMPV6, Message::LEN as u32);
    let sum = pseudo + checksum::sum_bytes(bytemuck::bytes_of(message));
    message.icmp.checksum = Be16::from_raw(checksum::finish(sum));

    let ip = packet.header::<Ipv6Header>(frame.network_offset as usize)?;
    ip.set_addresses(&asked, &asker);
    let asker_mac = packet.header::<EthernetHeader>(0)?.link.source();
    rewrite::write_link(packet, LinkPair::new(asker_mac, mac), frame.tags(), false)?;
    Ok(Outcome {
        verdict: Verdict::TRANSMIT,
        reason: Reason::NEIGHBOUR_ANSWERED,
    })
}
