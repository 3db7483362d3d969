//! The IP packets of a frame, one inside the other, read without trust: nothing here panics, whatever the bytes.
//!
//! Shares nothing with the data path's parser, which it is there to judge. What it cannot read is no layer: a caller
//! that wants to say something of a packet says it only where there is one.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::packet::{ETHERNET_LEN, crc32c, fold, sum};

/// Protocol numbers (IANA).
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const IPIP: u8 = 4;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6: u8 = 41;
    pub const FRAGMENT: u8 = 44;
    pub const GRE: u8 = 47;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;
}

/// Tunnels in tunnels are looked into so often.
const MOST_LAYERS: usize = 4;

/// An IP packet whose length fields are true: it ends inside of the frame, and so do its headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layer {
    pub is_v4: bool,
    /// Where its IP header starts, in bytes from the frame's start; so are the next three.
    pub start: usize,
    /// Where its transport header starts, behind options and extension headers.
    pub transport: usize,
    /// Where it ends.
    pub end: usize,
    /// What stands at `transport`.
    pub protocol: u8,
    /// Offset and "more fragments" of what is not a whole packet: in bytes.
    pub piece: Option<(usize, bool)>,
    /// Of a fragment.
    pub identification: u32,
}

impl Layer {
    /// The IP packet that starts here, of whichever family its first bits say.
    pub fn at(frame: &[u8], start: usize) -> Option<Self> {
        let ip = frame.get(start..)?;
        match ip.first()? >> 4 {
            4 => Self::v4(ip, start),
            6 => Self::v6(ip, start),
            _ => None,
        }
    }

    fn v4(ip: &[u8], start: usize) -> Option<Self> {
        let header_len = usize::from(ip[0] & 0x0f) * 4;
        let total_len = word(ip, 2)?;
        let field = word(ip, 6)?;
        if header_len < 20 || total_len < header_len || total_len > ip.len() {
            return None;
        }
        let piece = ((field & 0x1fff) * 8, field & 0x2000 != 0);
        Some(Self {
            is_v4: true,
            start,
            transport: start + header_len,
            end: start + total_len,
            protocol: ip[9],
            piece: (piece != (0, false)).then_some(piece),
            identification: word(ip, 4)? as u32,
        })
    }

    fn v6(ip: &[u8], start: usize) -> Option<Self> {
        let end = 40 + word(ip, 4)?;
        if end > ip.len() {
            return None;
        }
        let (mut offset, mut next) = (40, ip[6]);
        while matches!(next, protocol::HOP_BY_HOP | protocol::DESTINATION) {
            next = *ip.get(offset)?;
            offset += (usize::from(*ip.get(offset + 1)?) + 1) * 8;
        }
        let (mut piece, mut identification) = ((0, false), 0);
        if next == protocol::FRAGMENT {
            let field = word(ip, offset + 2)?;
            next = *ip.get(offset)?;
            piece = (field & !7, field & 1 != 0);
            identification = (word(ip, offset + 4)? << 16 | word(ip, offset + 6)?) as u32;
            offset += 8;
        }
        (offset <= end).then_some(Self {
            is_v4: false,
            start,
            transport: start + offset,
            end: start + end,
            protocol: next,
            piece: (piece != (0, false)).then_some(piece),
            identification,
        })
    }

    /// Transport header and payload.
    pub fn segment<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        &frame[self.transport..self.end]
    }

    /// Source and destination, without ports.
    pub fn addresses(&self, frame: &[u8]) -> [IpAddr; 2] {
        if self.is_v4 {
            let at = |at: usize| -> IpAddr {
                let octets: [u8; 4] = std::array::from_fn(|index| frame[self.start + at + index]);
                octets.into()
            };
            [at(12), at(16)]
        } else {
            let at = |at: usize| -> IpAddr {
                let octets: [u8; 16] = std::array::from_fn(|index| frame[self.start + at + index]);
                Ipv6Addr::from(octets).into()
            };
            [at(8), at(24)]
        }
    }

    /// Source and destination with ports; `None` for what has no ports here.
    pub fn ends(&self, frame: &[u8]) -> Option<[SocketAddr; 2]> {
        let has_ports = matches!(self.protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
        let is_first = self.piece.is_none_or(|(offset, _)| offset == 0);
        if !has_ports || !is_first {
            return None;
        }
        let segment = self.segment(frame);
        let [source, destination] = self.addresses(frame);
        Some([
            SocketAddr::new(source, word(segment, 0)? as u16),
            SocketAddr::new(destination, word(segment, 2)? as u16),
        ])
    }

    /// TTL or hop limit.
    pub fn ttl(&self, frame: &[u8]) -> u8 {
        frame[self.start + if self.is_v4 { 8 } else { 7 }]
    }

    /// Where the payload of TCP, UDP, SCTP or an echo message starts, in bytes from the frame's start; `None`: it has none
    /// of those headers, or not all of it.
    pub fn payload(&self, frame: &[u8]) -> Option<usize> {
        let segment = self.segment(frame);
        let (header_len, least) = match self.protocol {
            protocol::TCP => (usize::from(*segment.get(12)? >> 4) * 4, 20),
            protocol::UDP => (8, 8),
            protocol::SCTP => (12, 12),
            protocol::ICMP | protocol::ICMPV6 => (8, 8),
            _ => return None,
        };
        (header_len >= least && header_len <= segment.len()).then_some(self.transport + header_len)
    }

    /// Sum of the pseudo-header, for this protocol and so many bytes.
    fn pseudo(&self, frame: &[u8], len: usize) -> u64 {
        let addresses = if self.is_v4 { 12..20 } else { 8..40 };
        let bytes = &frame[self.start + addresses.start..self.start + addresses.end];
        sum(bytes) + u64::from(self.protocol) + len as u64
    }

    /// Where the transport checksum of 16 bits stands, the bytes that it covers, and the sum of what it covers beside them;
    /// `None`: it has no such checksum, or not here, or says itself that it is longer than it is.
    fn checksum<'a>(&self, frame: &'a [u8]) -> Option<(usize, &'a [u8], u64)> {
        let segment = self.segment(frame);
        // A datagram may end before its IP packet does.
        let datagram = word(segment, 4).and_then(|len| segment.get(..len));
        let (at, covered) = match (self.protocol, self.is_v4) {
            (protocol::TCP, _) => (16, segment),
            (protocol::UDP, _) => (6, datagram?),
            (protocol::ICMP, true) | (protocol::ICMPV6, false) => (2, segment),
            _ => return None,
        };
        let beside = match self.protocol {
            protocol::ICMP => 0,
            _ => self.pseudo(frame, covered.len()),
        };
        (covered.len() >= at + 2 && self.piece.is_none()).then_some((at, covered, beside))
    }

    /// Which of its checksums are wrong. A UDP checksum of zero is none: RFC 768, and RFC 6935 for tunnels.
    pub fn wrong_checksums(&self, frame: &[u8]) -> Vec<&'static str> {
        let mut wrong = Vec::new();
        if self.is_v4 && fold(sum(&frame[self.start..self.start + self.header_len(frame)])) != 0xffff {
            wrong.push("IPv4");
        }
        let segment = self.segment(frame);
        if let Some((at, covered, beside)) = self.checksum(frame) {
            let is_none = self.protocol == protocol::UDP && segment[at..at + 2] == [0, 0];
            // Zero if everything is zero, the checksum as well. That is wrong, but what an incremental update (RFC 1624)
            // makes of an echo reply of zeros, which it cannot tell from others: see docs/limitations.md.
            let is_right = matches!(fold(beside + sum(covered)), 0 | 0xffff);
            if !is_none && !is_right {
                wrong.push("transport");
            }
        }
        if self.protocol == protocol::SCTP && self.piece.is_none() && segment.len() >= 12 {
            let mut zeroed = segment.to_vec();
            zeroed[8..12].fill(0);
            if crc32c(&zeroed).to_le_bytes() != segment[8..12] {
                wrong.push("SCTP");
            }
        }
        wrong
    }

    /// Does the transport checksum look like one that was left to a device: the sum of the pseudo-header, whether it is
    /// right as well or not? What has none, or does not say its length, may pass for one.
    pub fn may_be_partial(&self, frame: &[u8]) -> bool {
        let segment = self.segment(frame);
        self.checksum(frame).is_none_or(|(at, ..)| {
            let field = u64::from(segment[at]) << 8 | u64::from(segment[at + 1]);
            fold(field) == fold(self.pseudo(frame, segment.len()))
        })
    }

    /// Length of the IPv4 header with its options, in bytes.
    fn header_len(&self, frame: &[u8]) -> usize {
        usize::from(frame[self.start] & 0x0f) * 4
    }

    /// Makes all its checksums right.
    pub fn repair(&self, frame: &mut [u8]) {
        if self.is_v4 {
            let header = self.start..self.start + self.header_len(frame);
            put(frame, self.start + 10, 0);
            let value = !fold(sum(&frame[header]));
            put(frame, self.start + 10, value);
        }
        if let Some((at, ..)) = self.checksum(frame) {
            put(frame, self.transport + at, 0);
            let (_, covered, beside) = self.checksum(frame).expect("as before");
            let value = match !fold(beside + sum(covered)) {
                // RFC 768: zero means "none", so a computed zero is sent as all ones.
                0 if self.protocol == protocol::UDP => 0xffff,
                value => value,
            };
            put(frame, self.transport + at, value);
        }
        if self.protocol == protocol::SCTP && self.piece.is_none() && self.segment(frame).len() >= 12 {
            frame[self.transport + 8..self.transport + 12].fill(0);
            let crc = crc32c(self.segment(frame));
            frame[self.transport + 8..self.transport + 12].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

/// The IP packets of an Ethernet frame, the outermost first. `ports`: UDP ports that mean a tunnel.
pub fn of(frame: &[u8], ports: &[u16]) -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut next = network_offset(frame);
    while layers.len() < MOST_LAYERS
        && let Some(layer) = next.and_then(|start| Layer::at(frame, start))
    {
        layers.push(layer);
        next = inside(frame, &layer, ports);
    }
    layers
}

/// The first IP packet of a frame.
pub fn outermost(frame: &[u8]) -> Option<Layer> {
    Layer::at(frame, network_offset(frame)?)
}

/// Makes all checksums right that there are, from the inside out.
#[must_use]
pub fn repaired(mut frame: Vec<u8>, ports: &[u16]) -> Vec<u8> {
    for layer in of(&frame, ports).into_iter().rev() {
        layer.repair(&mut frame);
    }
    frame
}

/// Where what follows the link header and its VLAN tags starts, if that says to be IP.
fn network_offset(frame: &[u8]) -> Option<usize> {
    let mut offset = ETHERNET_LEN;
    while matches!(frame.get(offset - 2..offset)?, [0x81, 0] | [0x88, 0xa8]) {
        offset += 4;
    }
    matches!(frame.get(offset - 2..offset)?, [8, 0] | [0x86, 0xdd]).then_some(offset)
}

/// Where the IP packet inside of this one starts.
fn inside(frame: &[u8], layer: &Layer, ports: &[u16]) -> Option<usize> {
    if layer.piece.is_some() {
        return None;
    }
    let segment = layer.segment(frame);
    let behind_link = |offset: usize| {
        let start = layer.transport + offset;
        network_offset(&frame[start.min(layer.end)..layer.end]).map(|offset| start + offset)
    };
    let (header_len, ethertype) = match layer.protocol {
        protocol::IPIP | protocol::IPV6 => return Some(layer.transport),
        protocol::GRE => {
            let flags = word(segment, 0)?;
            let words = [0x8000, 0x2000, 0x1000]
                .iter()
                .filter(|flag| flags & **flag != 0)
                .count();
            (4 + 4 * words, word(segment, 2)?)
        }
        protocol::UDP if ports.contains(&(word(segment, 2)? as u16)) => {
            match (*segment.get(8)?, *segment.get(9)?, word(segment, 10)?) {
                // FOU: nothing between.
                (0x40..=0x4f | 0x60..=0x6f, ..) => (8, 0x0800),
                // Geneve, with options.
                (first @ ..=0x3f, _, 0x6558) => (16 + usize::from(first) * 4, 0x6558),
                // GUE, with options.
                (first @ ..=0x1f, protocol::IPIP | protocol::IPV6, _) => {
                    (12 + usize::from(first) * 4, 0x0800)
                }
                // VXLAN.
                (first, ..) if first & 0x08 != 0 => (16, 0x6558),
                _ => return None,
            }
        }
        _ => return None,
    };
    match ethertype {
        0x6558 => behind_link(header_len),
        0x0800 | 0x86dd => Some(layer.transport + header_len),
        _ => None,
    }
}

/// Sixteen bits, big-endian.
fn word(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(*bytes.get(at)?) << 8 | usize::from(*bytes.get(at + 1)?))
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::packet::{Builder, chunk, segment};

    const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 7), 50000);
    const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 10), 80);

    #[test]
    fn what_is_repaired_is_right_and_what_is_damaged_is_not() {
        for packet in [
            Builder::tcp(segment::SYN, CLIENT, VIP).payload(3),
            Builder::udp(CLIENT, VIP).options(vec![1; 8]).payload(5),
            Builder::sctp(chunk::INIT, CLIENT, VIP).payload(16),
            Builder::echo_request(CLIENT, VIP).payload(56).vlans(&[5]),
        ] {
            let mut frame = packet.build();
            let layer = outermost(&frame).expect("IP");
            assert_eq!(layer.wrong_checksums(&frame), Vec::<&str>::new(), "{packet:?}");
            frame[layer.start + 8] ^= 1;
            frame[layer.end - 1] ^= 1;
            assert_eq!(layer.wrong_checksums(&frame).len(), 2, "{packet:?}");
            let frame = repaired(frame, &[]);
            assert_eq!(layer.wrong_checksums(&frame), Vec::<&str>::new(), "{packet:?}");
        }
    }

    #[test]
    fn what_is_in_a_tunnel_is_a_layer_of_its_own() {
        for case in crate::cases::all()
            .iter()
            .filter(|case| case.sentence.contains("tunnel"))
        {
            let ports: Vec<u16> = case.world.tunnel_ports.keys().copied().collect();
            for event in &case.events {
                if let crate::cases::Event::Packet(step) = event
                    && let Some(inside) = &step.inside
                    && outermost(&step.frame).is_some_and(|layer| layer.piece.is_none())
                    && step.frame != *inside
                {
                    let layers = of(&step.frame, &ports);
                    let innermost = layers.last().expect("layers");
                    let expected = outermost(inside).expect("IP");
                    let text = &case.sentence;
                    assert!(layers.len() > 1, "{text}");
                    assert_eq!(innermost.ends(&step.frame), expected.ends(inside), "{text}");
                }
            }
        }
    }

    #[test]
    fn lengths_that_lie_are_no_layer() {
        let frame = Builder::tcp(segment::SYN, CLIENT, VIP).build();
        assert!(outermost(&frame[..frame.len() - 1]).is_none());
        assert!(outermost(&frame[..20]).is_none());
        assert!(outermost(&[]).is_none());
    }
}
