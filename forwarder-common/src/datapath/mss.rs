//! Clamps the TCP maximum segment size to what both sides of the gateway carry (RFC 9293 §3.7.1, RFC 879).
//!
//! A tunnel carries less than the Ethernet it runs over. Both ends announce in their SYN what their own link takes
//! and would send segments that do not fit. So a SYN that passes, in either direction, must not announce more than
//! the smaller of the two interfaces it passes carries.
//!
//! Only an MSS that is the first option is seen: Linux, the BSDs, macOS and Windows all put it there, and a walk
//! through options costs the verifier more than the whole rest of the stage.

use bytemuck::{Pod, Zeroable};

use super::{Packet, Stop, parse::Frame, rewrite::Rewrite};
use crate::wire::{
    Be16, WireHeader,
    checksum::Delta,
    ipv4::Ipv4Header,
    ipv6::Ipv6Header,
    tcp::{FLAG_SYN, TcpHeader},
};

/// RFC 9293 §3.1: kind of the maximum segment size option.
const KIND_MSS: u8 = 2;
/// IP and TCP header without options: what an MTU leaves to a segment is this less (RFC 9293 §3.7.1).
#[inline(always)]
const fn headers(frame: &Frame, rewrite: &Rewrite) -> u32 {
    // Between families, the longer one.
    let ip = if frame.is_v4() && rewrite.destination.is_v4() {
        Ipv4Header::LEN
    } else {
        Ipv6Header::LEN
    };
    (ip + TcpHeader::LEN) as u32
}

/// The option as it stands behind the TCP header.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MssOption {
    kind: u8,
    len: u8,
    value: Be16,
}

impl WireHeader for MssOption {}

/// Does this packet announce a segment size?
#[inline(always)]
pub const fn is_announced(frame: &Frame) -> bool {
    frame.is_tcp()
        && frame.tcp_flags & FLAG_SYN != 0
        && frame.transport_len as usize >= TcpHeader::LEN + MssOption::LEN
}

/// Lowers the announced segment size to what fits `mtu_bytes`, and says what that changes in the sum of the
/// transport header. Zero: unknown, nothing is changed.
#[inline(always)]
pub fn clamp<P: Packet>(
    packet: &mut P,
    frame: &Frame,
    rewrite: &Rewrite,
    mtu_bytes: u32,
) -> Result<Delta, Stop> {
    let data_offset = packet
        .header::<TcpHeader>(frame.transport_offset as usize)?
        .data_offset;
    if mtu_bytes <= headers(frame, rewrite) || data_offset >> 4 < 6 {
        return Ok(Delta::ZERO);
    }
    let largest = (mtu_bytes - headers(frame, rewrite)).min(u16::MAX as u32) as u16;
    let option = packet.header::<MssOption>(frame.transport_offset as usize + TcpHeader::LEN)?;
    let announced = option.value;
    if option.kind != KIND_MSS || option.len as usize != MssOption::LEN || announced.get() <= largest {
        return Ok(Delta::ZERO);
    }
    option.value = Be16::new(largest);
    Ok(Delta::ZERO.replace16(announced, Be16::new(largest)))
}
