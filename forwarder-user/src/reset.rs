//! Ends connections that the gateway forgets: a reset to each end, which its TCP accepts, or an ABORT, which its SCTP
//! accepts.
//!
//! RFC 5961 §3.2: a receiver takes a reset only if its sequence number is the very one it expects next. The flow
//! keeps what each end acknowledged last, and of an idle connection that is what it expects. Both are told, or
//! the one that is not would find out only when it sends.
//!
//! RFC 9260 §8.5.1: an ABORT is taken with the verification tag that all packets to its receiver carry. The flow
//! keeps, as what an end "expects", the tag in the packets *of* that end, so it is the other end's that counts.
//!
//! And asks clients again that a SYN cookie has let in, as nobody else does: such a client takes its connection for
//! established, and the data path, which makes the backend's SYN of the client's acknowledgment, repeats nothing.

use std::net::SocketAddr;

use forwarder_common::{
    abi::flow::{FlowBinding, FlowEntry, TcpEvents},
    datapath::tcp_state::{Phase, has_connections},
    wire::{
        Be16, Be32, IpAddress, WireHeader as _,
        checksum::{finish, fold, pseudo_header, sum_bytes},
        crc32c,
        ipv4::{Ipv4Header, PROTOCOL_SCTP, PROTOCOL_TCP},
        ipv6::Ipv6Header,
        sctp::{CHUNK_ABORT, SctpChecksum, SctpHeader},
        tcp::{FLAG_ACK, FLAG_RST, TcpHeader},
    },
};
use tracing::debug;

use crate::{error::Error, network::raw::RawSockets};

/// Linux's default for packets of a host's own.
const TTL: u8 = 64;
/// Sends them: they carry a VIP or an SNAT address as their source, which this host does not own.
pub struct ResetSender {
    sockets: RawSockets,
}

impl ResetSender {
    /// Opens the sockets.
    ///
    /// # Errors
    /// When the kernel refuses, for want of CAP_NET_RAW.
    pub fn open() -> Result<Self, Error> {
        let sockets = RawSockets::open("resets")?;
        Ok(Self { sockets })
    }

    /// Tells both ends of an established connection; how many resets left. An end that is still in the handshake takes
    /// no such reset, and tries again by itself.
    pub fn end(&self, entry: &FlowEntry) -> u64 {
        // The first one is the client's.
        let ends = match (is_open(entry), is_unanswered(entry)) {
            (true, _) => 2,
            (false, true) => 1,
            (false, false) => return 0,
        };
        let sent = resets(entry).into_iter().take(ends).filter(|(to, packet)| {
            match self.sockets.send(packet, *to) {
                Ok(_) => true,
                // The other end finds out by itself when it sends next.
                Err(error) => {
                    debug!(%error, "no reset to {to}");
                    false
                }
            }
        });
        sent.count() as u64
    }

    /// Asks the client of a connection without an answer ([`is_unanswered`]) to send its acknowledgment once more, by the
    /// probe of a keepalive (RFC 9293 §3.8.4), which announces a window of zero as before.
    pub fn ask_again(&self, entry: &FlowEntry) {
        let (client, packet) = probe(entry);
        if let Err(error) = self.sockets.send(&packet, client) {
            debug!(%error, "no probe to {client}");
        }
    }
}

/// Is there a connection whose ends can be told?
pub fn is_open(entry: &FlowEntry) -> bool {
    has_connections(entry.binding.protocol)
        && matches!(entry.tcp.phase(), Phase::Established | Phase::Closing)
}

/// Has a SYN cookie opened the connection, so that its client takes it for established, and no backend has answered?
pub fn is_unanswered(entry: &FlowEntry) -> bool {
    entry.tcp.has(TcpEvents::BY_COOKIE) && entry.tcp.phase() == Phase::HalfOpen
}

/// The resets of a connection with where to send them: to the client, and to the backend.
fn resets(entry: &FlowEntry) -> [(SocketAddr, Vec<u8>); 2] {
    let FlowBinding {
        client,
        vip,
        snat,
        backend,
        client_port,
        vip_port,
        snat_port,
        backend_port,
        ..
    } = entry.binding;
    let (to_client, to_backend) = (
        ((vip, vip_port), (client, client_port)),
        ((snat, snat_port), (backend, backend_port)),
    );
    if entry.binding.protocol == u32::from(PROTOCOL_SCTP) {
        return [
            abort(to_client.0, to_client.1, entry.backend_expects),
            abort(to_backend.0, to_backend.1, entry.client_expects),
        ];
    }
    let reset = |(from, to), expected| segment(FLAG_RST, from, to, expected, Be32::new(0));
    [
        reset(to_client, entry.client_expects),
        reset(to_backend, entry.backend_expects),
    ]
}

/// The probe of a keepalive for the client: a segment that begins one byte before those that it expects.
fn probe(entry: &FlowEntry) -> (SocketAddr, Vec<u8>) {
    let FlowBinding {
        client,
        vip,
        client_port,
        vip_port,
        ..
    } = entry.binding;
    let sequence = Be32::new(entry.client_expects.get().wrapping_sub(1));
    segment(
        FLAG_ACK,
        (vip, vip_port),
        (client, client_port),
        sequence,
        entry.backend_expects,
    )
}

/// The IP header of a packet of our own before `len` bytes.
fn ip_header(protocol: u8, source: IpAddress, destination: IpAddress, len: usize) -> Vec<u8> {
    if destination.is_v4() {
        let total_len = (Ipv4Header::LEN + len) as u16;
        let mut ip = Ipv4Header::fresh(protocol, TTL, total_len, source.low(), destination.low());
        ip.checksum = Be16::from_raw(finish(sum_bytes(bytemuck::bytes_of(&ip))));
        bytemuck::bytes_of(&ip).to_vec()
    } else {
        let ip = Ipv6Header::fresh(protocol, TTL, len as u16, source, destination);
        bytemuck::bytes_of(&ip).to_vec()
    }
}

fn abort(
    (source, source_port): (IpAddress, Be16),
    (destination, destination_port): (IpAddress, Be16),
    verification_tag: Be32,
) -> (SocketAddr, Vec<u8>) {
    let mut sctp = SctpHeader {
        source_port,
        destination_port,
        verification_tag,
        checksum: SctpChecksum::NONE,
        chunk_type: CHUNK_ABORT,
        chunk_flags: 0,
        chunk_len: Be16::new(4),
    };
    sctp.checksum = SctpChecksum::new(crc32c::of(bytemuck::bytes_of(&sctp)));
    let mut packet = ip_header(PROTOCOL_SCTP, source, destination, SctpHeader::LEN);
    packet.extend_from_slice(bytemuck::bytes_of(&sctp));
    (
        SocketAddr::new(destination.to_std(), destination_port.get()),
        packet,
    )
}

/// A TCP segment without data, options and window.
fn segment(
    flags: u8,
    (source, source_port): (IpAddress, Be16),
    (destination, destination_port): (IpAddress, Be16),
    sequence: Be32,
    acknowledgment: Be32,
) -> (SocketAddr, Vec<u8>) {
    let mut packet = ip_header(PROTOCOL_TCP, source, destination, TcpHeader::LEN);
    let mut tcp = TcpHeader {
        source_port,
        destination_port,
        sequence,
        acknowledgment,
        data_offset: ((TcpHeader::LEN / 4) << 4) as u8,
        flags,
        window: Be16::new(0),
        checksum: Be16::new(0),
        urgent: Be16::new(0),
    };
    let pseudo = pseudo_header(source, destination, PROTOCOL_TCP, TcpHeader::LEN as u32);
    let sum = u32::from(fold(pseudo)) + sum_bytes(bytemuck::bytes_of(&tcp));
    tcp.checksum = Be16::from_raw(finish(sum));
    packet.extend_from_slice(bytemuck::bytes_of(&tcp));
    (
        SocketAddr::new(destination.to_std(), destination_port.get()),
        packet,
    )
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use bytemuck::Zeroable;

    use super::*;

    fn entry(protocol: u8) -> FlowEntry {
        let mut entry = FlowEntry::zeroed();
        entry.binding = FlowBinding {
            client: IpAddr::from([192, 0, 2, 7]).into(),
            vip: IpAddr::from([198, 51, 100, 10]).into(),
            snat: IpAddr::from([100, 64, 0, 2]).into(),
            backend: IpAddr::from([10, 0, 0, 5]).into(),
            client_port: Be16::new(51000),
            vip_port: Be16::new(443),
            snat_port: Be16::new(1024),
            backend_port: Be16::new(8443),
            protocol: u32::from(protocol),
            families: 0,
        };
        entry.client_expects = Be32::new(0x0102_0304);
        entry.backend_expects = Be32::new(0x0506_0708);
        entry
    }

    #[test]
    fn each_end_of_sctp_gets_the_tag_that_packets_to_it_carry() {
        let [client, backend] = resets(&entry(PROTOCOL_SCTP));
        assert_eq!(client.0, "192.0.2.7:51000".parse().unwrap());
        assert_eq!(backend.1[12..20], [100, 64, 0, 2, 10, 0, 0, 5]);
        assert_eq!(client.1[20..28], [0x01, 0xbb, 0xc7, 0x38, 5, 6, 7, 8]);
        assert_eq!(backend.1[20..28], [0x04, 0x00, 0x20, 0xfb, 1, 2, 3, 4]);
        for (_, mut packet) in [client, backend] {
            assert_eq!(packet[32..], [6, 0, 0, 4]);
            let checksum: [u8; 4] = packet[28..32].try_into().unwrap();
            packet[28..32].fill(0);
            assert_eq!(u32::from_le_bytes(checksum), crc32c::of(&packet[20..]));
        }
    }

    #[test]
    fn a_client_that_takes_its_connection_for_established_is_told_before_a_backend_has_answered() {
        let mut entry = entry(PROTOCOL_TCP);
        entry.tcp = TcpEvents::OPENED;
        assert!(!is_unanswered(&entry));
        entry.tcp = TcpEvents::OPENED.with(TcpEvents::BY_COOKIE);
        assert!(is_unanswered(&entry) && !is_open(&entry));
        entry.tcp = entry.tcp.with(TcpEvents::ANSWERED.with(TcpEvents::ESTABLISHED));
        assert!(!is_unanswered(&entry) && is_open(&entry));
    }

    #[test]
    fn a_client_that_waits_for_a_backend_is_asked_for_its_acknowledgment_again() {
        let (to, packet) = probe(&entry(PROTOCOL_TCP));
        assert_eq!(to, "192.0.2.7:51000".parse().unwrap());
        assert_eq!(packet[12..20], [198, 51, 100, 10, 192, 0, 2, 7]);
        // One less than the client expects, and what the backend expects; only ACK; no window.
        assert_eq!(packet[24..36], [1, 2, 3, 3, 5, 6, 7, 8, 0x50, 0x10, 0, 0]);
        let pseudo =
            sum_bytes(&packet[12..20]) + u32::from(u16::from_ne_bytes([0, 6])) + u32::from(20_u16.to_be());
        assert_eq!(fold(pseudo + sum_bytes(&packet[20..])), 0xffff);
    }

    #[test]
    fn each_end_gets_the_sequence_number_it_expects_from_the_address_it_knows() {
        let [client, backend] = resets(&entry(PROTOCOL_TCP));
        assert_eq!(client.0, "192.0.2.7:51000".parse().unwrap());
        assert_eq!(backend.0, "10.0.0.5:8443".parse().unwrap());
        assert_eq!(client.1[12..20], [198, 51, 100, 10, 192, 0, 2, 7]);
        assert_eq!(client.1[20..28], [0x01, 0xbb, 0xc7, 0x38, 1, 2, 3, 4]);
        assert_eq!(backend.1[12..20], [100, 64, 0, 2, 10, 0, 0, 5]);
        assert_eq!(backend.1[20..28], [0x04, 0x00, 0x20, 0xfb, 5, 6, 7, 8]);
        for (_, packet) in [client, backend] {
            assert_eq!(fold(sum_bytes(&packet[..20])), 0xffff);
            let pseudo = sum_bytes(&packet[12..20])
                + u32::from(u16::from_ne_bytes([0, 6]))
                + u32::from(20_u16.to_be());
            assert_eq!(fold(pseudo + sum_bytes(&packet[20..])), 0xffff);
        }
    }
}
