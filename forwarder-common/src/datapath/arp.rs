//! Answers ARP requests for VIPs and SNAT addresses (RFC 826).
//!
//! So none of them has to be an address of the host: the stack never takes a packet to one for its own, never
//! answers one with a reset, and never calls a source one "martian". Requests for other addresses pass.

use super::{Outcome, Packet, Stop, Tables, Verdict, admission, parse::Frame};
use crate::{
    abi::{
        interface::{Interface, InterfaceKey},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        LinkPair,
        arp::{ArpPacket, HARDWARE_ETHERNET, OPERATION_REPLY, OPERATION_REQUEST},
        ethernet::{ETHERTYPE_IPV4, EthernetHeader},
    },
};

/// Turns a request for one of our addresses into its answer; `ifindex` is the interface it came in by.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    settings: &Settings,
    frame: &Frame,
    ifindex: u32,
) -> Result<Outcome, Stop> {
    let arp = packet.header::<ArpPacket>(frame.network_offset as usize)?;
    let asked = arp.target_address;
    let is_request = { arp.operation } == OPERATION_REQUEST
        && { arp.hardware_type } == HARDWARE_ETHERNET
        && { arp.protocol_type } == ETHERTYPE_IPV4
        && arp.hardware_len == 6
        && arp.protocol_len == 4
        // A sender that asks for its own address announces it, or looks for a duplicate of ours.
        && { arp.sender_address } != asked;
    if !is_request || !admission::is_own(tables, settings, asked.into()) {
        return Err(Stop::pass(Reason::NOT_IP));
    }
    let Some(Interface { mac, .. }) = tables.interface(&InterfaceKey { ifindex }).copied() else {
        return Err(Stop::pass(Reason::NOT_IP));
    };
    let arp = packet.header::<ArpPacket>(frame.network_offset as usize)?;
    let (asker_mac, asker) = (arp.sender_mac, arp.sender_address);
    arp.operation = OPERATION_REPLY;
    arp.target_mac = asker_mac;
    arp.target_address = asker;
    arp.sender_mac = mac;
    arp.sender_address = asked;
    packet.header::<EthernetHeader>(0)?.link = LinkPair::new(asker_mac, mac);
    Ok(Outcome {
        verdict: Verdict::TRANSMIT,
        reason: Reason::ARP_ANSWERED,
    })
}
