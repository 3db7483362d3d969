//! ICMP errors between an IPv4 client and an IPv6 backend, and the reverse (RFC 7915).

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, SERVER, Step, binding, client_mac,
    families::{DNS, ECHO, REMOTE, SIGNALLING, WAYS, WEB, Way, frame},
    fragments::{cut, cut_v6},
    icmp_errors::Kind,
};
use crate::{
    packet::{Builder, ETHERNET_LEN, chunk, patched, segment},
    tables::{CLIENT_SIDE, SERVER_SIDE, TUNNEL_SIDE, mac_of},
};

/// Type and code, and the four bytes behind the checksum.
type Message = (Kind, u32);

/// What the messages of IPv4 are in IPv6; `None`: nothing.
const IN_V6: [(Message, Option<Message>); 30] = [
    (((3, 0), 0), Some(((1, 0), 0))),
    (((3, 1), 0), Some(((1, 0), 0))),
    (((3, 2), 0), Some(((4, 1), 6))),
    (((3, 3), 0), Some(((1, 4), 0))),
    (((3, 4), 1400), Some(((2, 0), 1420))),
    (((3, 4), 1000), Some(((2, 0), 1280))),
    (((3, 4), 0), Some(((2, 0), 1280))),
    (((3, 5), 0), Some(((1, 0), 0))),
    (((3, 6), 0), Some(((1, 0), 0))),
    (((3, 7), 0), Some(((1, 0), 0))),
    (((3, 8), 0), Some(((1, 0), 0))),
    (((3, 9), 0), Some(((1, 1), 0))),
    (((3, 10), 0), Some(((1, 1), 0))),
    (((3, 11), 0), Some(((1, 0), 0))),
    (((3, 12), 0), Some(((1, 0), 0))),
    (((3, 13), 0), Some(((1, 1), 0))),
    (((3, 14), 0), None),
    (((3, 15), 0), Some(((1, 1), 0))),
    (((3, 16), 0), None),
    (((11, 0), 0), Some(((3, 0), 0))),
    (((11, 1), 0), Some(((3, 1), 0))),
    (((12, 0), 0x0100_0000), Some(((4, 0), 1))),
    (((12, 0), 0x0300_0000), Some(((4, 0), 4))),
    (((12, 0), 0x0600_0000), None),
    (((12, 0), 0x0800_0000), Some(((4, 0), 7))),
    (((12, 0), 0x0900_0000), Some(((4, 0), 6))),
    (((12, 2), 0x0d00_0000), Some(((4, 0), 8))),
    (((12, 0), 0x1300_0000), Some(((4, 0), 24))),
    (((12, 0), 0x1400_0000), None),
    (((12, 1), 0), None),
];

/// What the messages of IPv6 are in IPv4.
const IN_V4: [(Message, Option<Message>); 20] = [
    (((1, 0), 0), Some(((3, 1), 0))),
    (((1, 1), 0), Some(((3, 10), 0))),
    (((1, 2), 0), Some(((3, 1), 0))),
    (((1, 3), 0), Some(((3, 1), 0))),
    (((1, 4), 0), Some(((3, 3), 0))),
    (((1, 5), 0), None),
    (((2, 0), 1400), Some(((3, 4), 1380))),
    (((2, 0), 100_000), Some(((3, 4), 65_535))),
    (((3, 0), 0), Some(((11, 0), 0))),
    (((3, 1), 0), Some(((11, 1), 0))),
    (((4, 0), 0), Some(((12, 0), 0))),
    (((4, 0), 2), None),
    (((4, 0), 5), Some(((12, 0), 0x0200_0000))),
    (((4, 0), 6), Some(((12, 0), 0x0900_0000))),
    (((4, 0), 7), Some(((12, 0), 0x0800_0000))),
    (((4, 0), 23), Some(((12, 0), 0x0c00_0000))),
    (((4, 0), 39), Some(((12, 0), 0x1000_0000))),
    (((4, 0), 40), None),
    (((4, 1), 6), Some(((3, 2), 0))),
    (((4, 2), 0), None),
];

/// An error as it comes and as it leaves.
const UNREACHABLE: (Message, Message) = (((3, 1), 0), ((1, 0), 0));
const UNREACHABLE_V6: (Message, Message) = (((1, 3), 0), ((3, 1), 0));

/// Where a quote ends.
const ALL: usize = 2000;

/// The IP packet in a frame, with so many bytes behind its header.
fn quote(frame: &[u8], len: usize) -> &[u8] {
    let packet = &frame[ETHERNET_LEN..];
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    &packet[..packet.len().min(header + len)]
}

fn message((kind, rest): Message, from: &Builder, quoted: &[u8]) -> Builder {
    let (source, destination) = from.ends();
    Builder::icmp(kind.0, kind.1, destination.ip(), source.ip())
        .icmp_rest(rest)
        .payload_of(quoted)
}

/// A quoted packet as its sender knows it, with the time to live that it was read with: what IPv4 has and IPv6 has not
/// is made up.
fn as_sent(packet: &Builder) -> Builder {
    let packet = packet.clone().ttl(63).without_extensions().options(Vec::new());
    if packet.ends().0.is_ipv4() {
        packet.identification(0).fragment(0x4000)
    } else {
        packet
    }
}

/// An error about a request: `read` is what the server's side has seen of it, `sent` what the client knows.
struct About {
    read: Vec<u8>,
    sent: Vec<u8>,
}

impl About {
    fn request(way: Way, service: super::Service, packet: Builder) -> Self {
        let (packet, left) = way.request(service, packet);
        Self {
            read: left.ttl(63).build(),
            sent: as_sent(&packet).build(),
        }
    }

    /// Reaches the client.
    fn step(&self, way: Way, (before, after): (Message, Message), quoted: (usize, usize)) -> Step {
        let seen = Builder::tcp(0, way.server_side(binding(0)), way.server_side(SERVER));
        let known = Builder::tcp(0, way.client_side(CLIENT), way.client_side(WEB.vip()));
        let error = message(before, &seen, quote(&self.read, quoted.0));
        let out = message(after, &known, quote(&self.sent, quoted.1));
        forwarded(error.link(mac_of(*SERVER.ip()), SERVER_SIDE.mac), out)
    }
}

fn forwarded(error: Builder, out: Builder) -> Step {
    let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
    let out = out.link(CLIENT_SIDE.mac, client_mac(CLIENT)).ttl(63);
    Step::new(&SERVER_SIDE, error.build(), verdict, Reason::ICMP_FORWARDED).out(frame(&out))
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in WAYS {
        let name = way.name();
        let case = |sentence: &str| Case::new(format!("{sentence}, {name}"), way.world()).v4_only();
        let syn = || Builder::tcp(segment::SYN, CLIENT, WEB.vip());
        let opened = |service: super::Service, packet: Builder| {
            let (packet, out) = way.request(service, packet);
            let out = out.link(SERVER_SIDE.mac, mac_of(*service.server.ip())).ttl(63);
            let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
            Step::new(&CLIENT_SIDE, packet.build(), verdict, Reason::REQUEST_FORWARDED)
                .out(frame(&out))
                .counts(service.opened())
        };
        // Errors about requests come in the servers' family.
        let (messages, back, usual): (&[_], &[_], _) = if way.is_client_v4 {
            (&IN_V4, &IN_V6, UNREACHABLE_V6)
        } else {
            (&IN_V6, &IN_V4, UNREACHABLE)
        };
        let about = About::request(way, WEB, syn());
        for (before, after) in messages {
            let ((kind, code), rest) = before;
            let step = match after {
                Some(after) => about.step(way, (*before, *after), (ALL, ALL)),
                None => {
                    let step = about.step(way, (*before, *before), (ALL, ALL));
                    let frame = step.frame.clone();
                    Step::new(&SERVER_SIDE, frame, Verdict::DROP, Reason::UNTRANSLATABLE)
                }
            };
            let does = if after.is_some() {
                "reaches the client"
            } else {
                "has no equal"
            };
            cases.push(
                case(&format!("An ICMP error {kind}/{code} with {rest:#x} {does}"))
                    .then(opened(WEB, syn()))
                    .then(step),
            );
        }
        let (packet, out) = way.reply(WEB, Builder::tcp(segment::SYN_ACK, SERVER, binding(0)));
        for (before, after) in back
            .iter()
            .filter_map(|(before, after)| Some((before, (*after)?)))
        {
            let ((kind, code), rest) = before;
            let seen = out.build();
            let known = as_sent(&packet).build();
            let error = message(*before, &out, quote(&seen, ALL)).link(client_mac(CLIENT), CLIENT_SIDE.mac);
            let told = message(after, &packet, quote(&known, ALL))
                .link(SERVER_SIDE.mac, mac_of(*SERVER.ip()))
                .ttl(63);
            let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
            cases.push(
                case(&format!(
                    "An ICMP error {kind}/{code} with {rest:#x} reaches the backend"
                ))
                .then(opened(WEB, syn()))
                .then(
                    Step::new(&CLIENT_SIDE, error.build(), verdict, Reason::ICMP_FORWARDED).out(frame(&told)),
                ),
            );
        }
        for (what, service, packet) in [
            ("TCP", WEB, syn()),
            ("UDP", DNS, Builder::udp(CLIENT, DNS.vip()).payload(33)),
            (
                "SCTP",
                SIGNALLING,
                Builder::sctp(chunk::INIT, CLIENT, SIGNALLING.vip()).payload(16),
            ),
            (
                "echo",
                ECHO,
                Builder::echo_request(CLIENT, ECHO.vip()).payload(33),
            ),
        ] {
            let about = About::request(way, service, packet.clone());
            // Part of a checksum cannot be brought up to date.
            for quoted in [8, 9, 12, 18, 28]
                .into_iter()
                .filter(|quoted| what != "SCTP" || *quoted != 9)
            {
                cases.push(
                    case(&format!(
                        "An error that quotes {quoted} bytes of {what} is translated"
                    ))
                    .then(opened(service, packet.clone()))
                    .then(about.step(way, usual, (quoted, quoted))),
                );
            }
        }
        cases.push(
            case("The quoted traffic class stays")
                .then(opened(WEB, syn().tos(0xb8)))
                .then(About::request(way, WEB, syn().tos(0xb8)).step(way, usual, (ALL, ALL))),
        );
        // 1192: what 1280 bytes leave behind two headers of IPv6 and that of ICMP.
        let datagram = Builder::udp(CLIENT, DNS.vip()).payload(1300);
        let most = if way.is_client_v4 { ALL } else { 1192 };
        cases.push(
            case("A long quote is cut to what an error of IPv6 may have")
                .then(opened(DNS, datagram.clone()))
                .then(About::request(way, DNS, datagram).step(way, usual, (ALL, most))),
        );
        // RFC 4884: 128 bytes of the packet, which the message says in its family's words, then the extension.
        let datagram = Builder::udp(CLIENT, DNS.vip()).payload(200);
        let about = About::request(way, DNS, datagram.clone());
        let (exceeded, kept) = if way.is_client_v4 {
            ((((3, 0), 16 << 24), ((11, 0), 0)), 88)
        } else {
            ((((11, 0), 32 << 16), ((3, 0), 0)), 108)
        };
        cases.push(
            case("What follows the quote is cut off")
                .then(opened(DNS, datagram))
                .then(about.step(way, exceeded, (kept + 20, kept))),
        );
        let pieces = |packet: &Builder| {
            let frame = packet.build();
            let cut = if packet.ends().0.is_ipv4() { cut } else { cut_v6 };
            cut(&frame, 64).remove(0)
        };
        let datagram = Builder::udp(CLIENT, DNS.vip()).payload(200);
        let (packet, left) = way.request(DNS, datagram.clone());
        let about = About {
            read: pieces(&left.ttl(63)),
            sent: pieces(&packet.ttl(63)),
        };
        cases.push(
            case("A quoted first fragment is one in the other family")
                .then(opened(DNS, datagram))
                .then(about.step(way, usual, (ALL, ALL))),
        );
        cases.push(out_of_a_tunnel(way, usual));
        if !way.is_client_v4 {
            let wrong = with_wrong_checksum(&About::request(way, WEB, syn()).step(way, usual, (ALL, ALL)));
            cases.push(
                case("A wrong checksum stays wrong")
                    .then(opened(WEB, syn()))
                    .then(wrong),
            );
            let datagram = Builder::udp(CLIENT, DNS.vip()).payload(33);
            let (packet, _) = way.request(DNS, datagram.clone());
            let (_, left) = way.request(DNS, datagram.clone());
            let about = About {
                read: left.ttl(63).options(vec![1; 8]).build(),
                sent: as_sent(&packet).build(),
            };
            let mut step = about.step(way, usual, (ALL, ALL));
            step.out = About::request(way, DNS, datagram.clone())
                .step(way, usual, (ALL, ALL))
                .out;
            cases.push(
                case("Options of a quoted packet are left out")
                    .then(opened(DNS, datagram))
                    .then(step),
            );
        }
    }
    cases
}

/// One bit more in the checksum of an ICMP message, on both sides.
fn with_wrong_checksum(step: &Step) -> Step {
    let flipped = |frame: &[u8]| {
        let at = ETHERNET_LEN + 2 + if frame[ETHERNET_LEN] >> 4 == 4 { 20 } else { 40 };
        let word = u16::from_be_bytes([frame[at], frame[at + 1]]);
        (at, (word ^ 0x8000).to_be_bytes())
    };
    let (at, bytes) = flipped(&step.frame);
    let mut wrong = step.clone();
    wrong.frame = patched(step.frame.clone(), at, &bytes);
    let (at, bytes) = flipped(&step.out);
    wrong.out = patched(step.out.clone(), at, &bytes);
    wrong
}

/// By the tcx program, for a request that the stack has sent into the tunnel.
fn out_of_a_tunnel(way: Way, (before, after): (Message, Message)) -> Case {
    let (packet, left) = way.request(REMOTE, Builder::tcp(segment::SYN, CLIENT, REMOTE.vip()));
    let opened = Step::passed(packet.build(), Reason::REQUEST_TO_STACK)
        .out(frame(&left))
        .counts(REMOTE.opened());
    let link = |error: Builder| error.link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
    let error = link(message(before, &left, quote(&left.clone().ttl(63).build(), ALL)));
    let out = link(message(after, &packet, quote(&as_sent(&packet).build(), ALL))).ttl(63);
    let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
    let mut out = frame(&out);
    // The kernel writes the link header as it sends.
    out[12..14].copy_from_slice(&error.build()[12..14]);
    let step = Step::new(&TUNNEL_SIDE, error.build(), verdict, Reason::ICMP_FORWARDED);
    Case::new(
        format!("An ICMP error out of a tunnel is translated, {}", way.name()),
        way.world(),
    )
    .v4_only()
    .then(opened)
    .then(step.in_tunnel().out(out))
}
