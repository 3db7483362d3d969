//! SCTP: what its packets do to a flow, and how they are changed (RFC 9260).
//!
//! An association through the gateway has one address at each end. Its chunks are followed by the first of each packet,
//! told in the flags of TCP that mean the same, so one tracker (`tcp_state`) serves both.
//!
//! The checksum covers the packet and no pseudo-header, so addresses do not matter to it and ports do; see
//! `wire::crc32c`. Two kinds of packets have none: those whose sender left it to the device, through veth or virtio
//! (CHECKSUM_PARTIAL with `csum_not_inet`), whose field is zero, and of which native XDP loses that mark, as with TCP
//! (see `transport_checksum`); there it is computed over the whole packet.

use super::{ANSWER_TTL, ChecksumOffload, Packet, Stop, Walk, parse::Frame, rewrite, translate};
use crate::{
    abi::{
        flow::HopKind,
        reason::Reason,
        settings::{Settings, flag},
    },
    wire::{
        Be16, WireHeader, checksum, crc32c,
        ethernet::EthernetHeader,
        ipv4::{Ipv4Header, PROTOCOL_SCTP},
        ipv6::Ipv6Header,
        sctp::{
            CHUNK_ABORT, CHUNK_INIT, CHUNK_INIT_ACK, CHUNK_SHUTDOWN, CHUNK_SHUTDOWN_ACK,
            CHUNK_SHUTDOWN_COMPLETE, SctpChecksum, SctpHeader, SctpInit,
        },
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN},
    },
};

/// RFC 9260 §3.2: type, flags and length; an ABORT need not have more (§3.3.7).
const CHUNK_HEADER_LEN: u16 = 4;

/// The flags of a TCP segment that does what a packet with this first chunk does.
///
/// The last word counts as one more end of its sender's side: what asked for it may have stood behind another chunk.
#[inline(always)]
pub const fn flags(chunk_type: u8) -> u8 {
    match chunk_type {
        CHUNK_INIT => FLAG_SYN,
        CHUNK_INIT_ACK => FLAG_SYN | FLAG_ACK,
        CHUNK_ABORT => FLAG_RST,
        CHUNK_SHUTDOWN | CHUNK_SHUTDOWN_ACK | CHUNK_SHUTDOWN_COMPLETE => FLAG_FIN | FLAG_ACK,
        _ => FLAG_ACK,
    }
}

/// Did the sender leave this checksum to its device? In tcx the kernel knows and needs not be asked: nobody else
/// sends a zero, but for one checksum in 2^32.
#[inline(always)]
fn is_owed<P: Packet>(checksum: SctpChecksum, settings: &Settings) -> bool {
    let may_be = matches!(P::CHECKSUM_OFFLOAD, ChecksumOffload::Kernel)
        || settings.flags & flag::PARTIAL_CHECKSUMS != 0;
    may_be && checksum == SctpChecksum::NONE
}

/// Will the kernel write the checksum of this packet as it sends it?
#[inline(always)]
pub fn is_left_to_kernel<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    settings: &Settings,
) -> Result<bool, Stop> {
    let checksum = packet
        .header::<SctpHeader>(frame.transport_offset as usize)?
        .checksum;
    Ok(is_owed::<P>(checksum, settings) && !matches!(P::CHECKSUM_OFFLOAD, ChecksumOffload::LostOnSend))
}

/// Changes a packet.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, settings: &Settings, walk: &Walk) -> Result<(), Stop> {
    let (frame, rewrite) = (&walk.frame, &walk.hit.rewrite);
    let is_sent = walk.hit.hop.kind == HopKind::DIRECT;
    if !translate::is_due(frame, rewrite) {
        rewrite::network(packet, frame, rewrite, is_sent)?;
    }
    let offset = frame.transport_offset as usize;
    let sctp = packet.header::<SctpHeader>(offset)?;
    let before = sctp.ports();
    sctp.source_port = rewrite.source_port;
    sctp.destination_port = rewrite.destination_port;
    if !is_owed::<P>(sctp.checksum, settings) {
        sctp.checksum = { sctp.checksum }.replaced(before, sctp.ports(), frame.transport_len);
    } else if is_sent && matches!(P::CHECKSUM_OFFLOAD, ChecksumOffload::LostOnSend) {
        let crc = packet.crc(offset, frame.transport_len as usize)?;
        packet.header::<SctpHeader>(offset)?.checksum = SctpChecksum::new(crc);
    }
    Ok(())
}

/// Turns an INIT into the ABORT that refuses it: with the tag that its sender chose and the T bit clear (RFC 9260 §8.4,
/// case 3).
///
/// # Errors
/// A drop in tcx, where the kernel may owe a checksum over what is cut off, and where it would write one to a place that
/// options have moved.
#[inline(always)]
pub fn abort<P: Packet>(packet: &mut P, frame: &Frame, settings: &Settings) -> Result<(), Stop> {
    let none = Stop::drop(Reason::INTERNAL);
    if let ChecksumOffload::Kernel = P::CHECKSUM_OFFLOAD {
        return Err(none);
    }
    let is_v4 = frame.is_v4();
    let ip_len = if is_v4 { Ipv4Header::LEN } else { Ipv6Header::LEN };
    let network = frame.network_offset as usize;
    let transport = network + ip_len;
    let is_kernels = is_left_to_kernel(packet, frame, settings)?;
    if is_kernels && transport != frame.transport_offset as usize {
        return Err(none);
    }
    let initiate_tag = packet
        .header::<SctpInit>(frame.transport_offset as usize)?
        .initiate_tag;
    packet.cut(transport + SctpHeader::LEN)?;

    let ethernet = packet.header::<EthernetHeader>(0)?;
    ethernet.link = { ethernet.link }.swapped();
    let (source, destination) = (&frame.key.destination, &frame.key.source);
    if is_v4 {
        let ip = packet.header::<Ipv4Header>(network)?;
        *ip = Ipv4Header::fresh(
            PROTOCOL_SCTP,
            ANSWER_TTL,
            (Ipv4Header::LEN + SctpHeader::LEN) as u16,
            source.low(),
            destination.low(),
        );
        ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
    } else {
        *packet.header::<Ipv6Header>(network)? = Ipv6Header::fresh(
            PROTOCOL_SCTP,
            ANSWER_TTL,
            SctpHeader::LEN as u16,
            source.copied(),
            destination.copied(),
        );
    }
    let sctp = packet.header::<SctpHeader>(transport)?;
    *sctp = SctpHeader {
        source_port: frame.key.destination_port,
        destination_port: frame.key.source_port,
        verification_tag: initiate_tag,
        checksum: SctpChecksum::NONE,
        chunk_type: CHUNK_ABORT,
        chunk_flags: 0,
        chunk_len: Be16::new(CHUNK_HEADER_LEN),
    };
    if !is_kernels {
        sctp.checksum = SctpChecksum::new(crc32c::of(bytemuck::bytes_of(sctp)));
    }
    Ok(())
}
