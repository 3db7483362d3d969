//! Turns a packet into the ICMP message that tells its sender what became of it (RFC 792, RFC 4443).
//!
//! The message quotes as much of the packet as fits the size that every path carries (RFC 1812 §4.3.2.3, RFC 4443
//! §2.4 (c)), comes from the address that the packet was for, and goes where it came from, one for one and never
//! longer than by its own headers: nothing to amplify.
//!
//! There is none about ICMP but echo messages, to no address that many hosts share, and no more than a thousand a
//! second; nor for a packet in generic XDP with a partial checksum, which the kernel would complete in the middle of
//! the message.
//!
//! In tcx the kernel, or the device, will do that: a checksum that is still owed (Linux: CHECKSUM_PARTIAL, also of
//! packets that it has aggregated) is computed over the quote, from its transport header to the end, which is also the
//! message's. The message's own checksum is made for what the quote will be then: the sum of a pseudo-header and of
//! a segment with the right checksum is all ones, so that of the segment is the pseudo-header's complement. What is
//! owed is told by the field, which holds the pseudo-header's sum; one of 65 536 checksums looks so by chance, and
//! the message about that packet is lost.

use super::{
    ANSWER_TTL, ChecksumOffload, Packet, Stop, Tables,
    parse::Frame,
    rewrite, sctp,
    transport_checksum::{self, State},
};
use crate::{
    abi::{reason::Reason, settings::Settings},
    wire::{
        Be16, Be32, IpAddress, WireHeader, checksum,
        ethernet::EthernetHeader,
        icmp::{
            CODE_FRAGMENTATION_NEEDED, CODE_HOST_UNREACHABLE, CODE_PORT_UNREACHABLE,
            CODE_V6_HOST_UNREACHABLE, CODE_V6_PORT_UNREACHABLE, IcmpHeader, TYPE_TIME_EXCEEDED,
            TYPE_UNREACHABLE, TYPE_V6_TIME_EXCEEDED, TYPE_V6_TOO_BIG, TYPE_V6_UNREACHABLE,
        },
        ipv4::{Ipv4Header, PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP},
        ipv6::{Ipv6Header, PROTOCOL_ICMPV6},
    },
};

/// Messages that one CPU sends in a second: as many as Linux sent in all (net.ipv4.icmp_msgs_per_sec) until 2024.
const PER_SECOND: u32 = 1000;
/// RFC 1812 §4.3.2.3: an ICMP message of IPv4 has at most 576 bytes.
const QUOTE_V4: u32 = 576 - (Ipv4Header::LEN + IcmpHeader::LEN) as u32;
/// RFC 4443 §2.4 (c): one of IPv6 at most 1280.
const QUOTE_V6: u32 = 1280 - (Ipv6Header::LEN + IcmpHeader::LEN) as u32;

/// What there is to say, in both families.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    v4: (u8, u8),
    v6: (u8, u8),
    /// The four bytes behind the checksum.
    rest: u32,
}

impl Message {
    /// Nobody serves that port (RFC 1122 §4.1.3.1, RFC 4443 §3.1).
    pub const PORT_UNREACHABLE: Self = Self {
        v4: (TYPE_UNREACHABLE, CODE_PORT_UNREACHABLE),
        v6: (TYPE_V6_UNREACHABLE, CODE_V6_PORT_UNREACHABLE),
        rest: 0,
    };
    /// Nobody is there (RFC 792; RFC 4443 §3.1, "address unreachable").
    pub const HOST_UNREACHABLE: Self = Self {
        v4: (TYPE_UNREACHABLE, CODE_HOST_UNREACHABLE),
        v6: (TYPE_V6_UNREACHABLE, CODE_V6_HOST_UNREACHABLE),
        rest: 0,
    };
    /// The packet has passed too many routers (RFC 792, RFC 4443 §3.3).
    pub const TIME_EXCEEDED: Self = Self {
        v4: (TYPE_TIME_EXCEEDED, 0),
        v6: (TYPE_V6_TIME_EXCEEDED, 0),
        rest: 0,
    };

    /// Packets of more than `mtu_bytes` do not get through (RFC 1191 §4, RFC 4443 §3.2).
    #[inline(always)]
    pub const fn too_big(mtu_bytes: u16) -> Self {
        Self {
            v4: (TYPE_UNREACHABLE, CODE_FRAGMENTATION_NEEDED),
            v6: (TYPE_V6_TOO_BIG, 0),
            rest: mtu_bytes as u32,
        }
    }
}

/// Can the address be that of one host (RFC 1122 §3.2.2, RFC 4443 §2.4 (e.6))?
#[inline(always)]
const fn is_host(address: IpAddress) -> bool {
    let first = if address.is_v4() {
        address.low().octets()[0]
    } else {
        address.0[0].get().to_be_bytes()[0]
    };
    if address.is_v4() {
        first != 0 && first != 127 && first < 224
    } else {
        first != 0 && first != 0xff
    }
}

/// Takes one of this second's messages, if there are any left (RFC 1812 §4.3.2.8, RFC 4443 §2.4 (f)).
#[inline(always)]
fn has_budget<T: Tables>(tables: &mut T) -> bool {
    let now_secs = tables.now_secs();
    let Some(budget) = tables.icmp_budget() else {
        return false;
    };
    if budget.second != now_secs {
        budget.second = now_secs;
        budget.sent = 0;
    }
    budget.sent += 1;
    budget.sent <= PER_SECOND
}

/// Turns the packet into the message about it.
///
/// # Errors
/// A drop, where there can be none.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    frame: &Frame,
    message: Message,
) -> Result<(), Stop> {
    let none = Stop::drop(Reason::INTERNAL);
    // Of ICMP only echo messages come here.
    let is_about_data = matches!(
        frame.key.protocol as u8,
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP | PROTOCOL_ICMP
    );
    if !is_about_data || !is_host(frame.key.source) || !has_budget(tables) {
        return Err(none);
    }
    let owed = match P::CHECKSUM_OFFLOAD {
        _ if frame.is_sctp() => {
            if sctp::is_left_to_kernel(packet, frame, settings)? {
                return Err(none);
            }
            None
        }
        // Echo messages: nobody leaves their checksum to a device.
        _ if !frame.is_usual() => None,
        ChecksumOffload::Kernel => transport_checksum::owed(packet, frame)?,
        ChecksumOffload::Kept => {
            if let State::Partial { .. } = transport_checksum::state(packet, frame, settings)? {
                return Err(none);
            }
            None
        }
        ChecksumOffload::LostOnSend => None,
    };
    let is_v4 = frame.is_v4();
    let network = frame.network_offset as usize;
    let (ip_len, limit) = if is_v4 {
        (Ipv4Header::LEN, QUOTE_V4)
    } else {
        (Ipv6Header::LEN, QUOTE_V6)
    };
    let quote_len = frame.total_len.min(limit);
    let link = { packet.header::<EthernetHeader>(0)?.link }.swapped();
    packet.cut(network + quote_len as usize)?;
    packet.grow(network, ip_len + IcmpHeader::LEN)?;
    // Packets of some tunnels begin with IP.
    if network != 0 {
        rewrite::write_link(packet, link, frame.tags(), is_v4)?;
    }

    let payload_len = IcmpHeader::LEN as u32 + quote_len;
    let (source, destination) = (frame.key.destination, frame.key.source);
    let ((icmp_type, code), pseudo) = if is_v4 {
        let ip = packet.header::<Ipv4Header>(network)?;
        let total_len = Ipv4Header::LEN as u32 + payload_len;
        *ip = Ipv4Header::fresh(
            PROTOCOL_ICMP,
            ANSWER_TTL,
            total_len as u16,
            source.low(),
            destination.low(),
        );
        ip.checksum = Be16::from_raw(checksum::finish(checksum::sum_bytes(bytemuck::bytes_of(ip))));
        (message.v4, 0)
    } else {
        *packet.header::<Ipv6Header>(network)? = Ipv6Header::fresh(
            PROTOCOL_ICMPV6,
            ANSWER_TTL,
            payload_len as u16,
            source,
            destination,
        );
        let pseudo = checksum::pseudo_header(source, destination, PROTOCOL_ICMPV6, payload_len);
        (message.v6, pseudo)
    };
    let transport = network + ip_len;
    let quote = transport + IcmpHeader::LEN;
    let quoted = match owed {
        Some(pseudo_header) => {
            let header_len = frame.transport_offset as usize - network;
            packet.sum(quote, header_len)? + u32::from(!pseudo_header)
        }
        None => packet.sum(quote, quote_len as usize)?,
    };
    let icmp = packet.header::<IcmpHeader>(transport)?;
    *icmp = IcmpHeader {
        rest: Be32::new(message.rest),
        ..IcmpHeader::of_type(icmp_type, code)
    };
    let own = checksum::sum_bytes(bytemuck::bytes_of(icmp));
    icmp.checksum = Be16::from_raw(checksum::finish(own + quoted + pseudo));
    Ok(())
}
