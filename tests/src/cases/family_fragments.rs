//! Fragments between an IPv4 client and an IPv6 backend, and the reverse (RFC 7915 §4.1, §5.1.1).

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, Step, UDP_SERVER, binding,
    families::{DNS, WAYS, WEB, Way},
    fragments::{cut, cut_v6},
};
use crate::{
    packet::{Builder, Checksum, segment},
    tables::{CLIENT_SIDE, SERVER_SIDE, mac_of},
};

/// Cuts a packet into fragments of so many bytes of payload, as its sender would.
fn pieces(packet: &Builder, len: usize) -> Vec<Vec<u8>> {
    let frame = packet.build();
    if packet.ends().0.is_ipv4() {
        cut(&frame, len)
    } else {
        cut_v6(&frame, len)
    }
}

/// A client's datagram of so many bytes, in fragments of so many: as they come and as they leave.
fn query(way: Way, datagram: Builder, len: usize) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (packet, out) = way.request(DNS, datagram);
    let out = out.link(SERVER_SIDE.mac, mac_of(*UDP_SERVER.ip())).ttl(63);
    (pieces(&packet, len), pieces(&out, len))
}

fn request(frame: &[u8], out: &[u8], is_first: bool) -> Step {
    let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
    Step::new(&CLIENT_SIDE, frame.to_vec(), verdict, Reason::REQUEST_FORWARDED)
        .out(out.to_vec())
        .counts(if is_first { DNS.opened() } else { DNS.request() })
}

fn reply(frame: &[u8], out: &[u8], is_first: bool) -> Step {
    let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
    Step::new(&SERVER_SIDE, frame.to_vec(), verdict, Reason::REPLY_FORWARDED)
        .out(out.to_vec())
        .counts(if is_first { DNS.first_answer() } else { DNS.reply() })
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in WAYS {
        let name = way.name();
        let case = |sentence: &str| Case::new(format!("{sentence}, {name}"), way.world()).v4_only();
        let datagram = |len: usize| Builder::udp(CLIENT, DNS.vip()).payload(len);
        let (frames, outs) = query(way, datagram(1200), 512);
        let (packet, out) = way.reply(DNS, Builder::udp(UDP_SERVER, binding(0)).payload(1200));
        let (answers, told) = (pieces(&packet, 512), pieces(&out, 512));
        let both = |order: [usize; 3]| {
            let requests = order.map(|index| request(&frames[index], &outs[index], index == 0));
            let replies = order.map(|index| reply(&answers[index], &told[index], index == 0));
            requests.into_iter().chain(replies)
        };
        cases.push(case("Fragments are translated both ways").all(both([0, 1, 2])));
        cases.push(case("Later fragments may overtake each other").all(both([0, 2, 1])));
        cases.push(
            case("A fragment that comes before the first is held")
                .then(Step::dropped(frames[1].clone(), Reason::FRAGMENT_HELD)),
        );
        let (packet, out) = way.request(WEB, Builder::tcp(segment::SYN, CLIENT, WEB.vip()).payload(600));
        let out = out.link(SERVER_SIDE.mac, mac_of(*WEB.server.ip())).ttl(63);
        let (frames, outs) = (pieces(&packet, 512), pieces(&out, 512));
        cases.push(case("Fragments of TCP are translated").all([
            request(&frames[0], &outs[0], true).counts(WEB.opened()),
            request(&frames[1], &outs[1], false).counts(WEB.request()),
        ]));
        if way.is_client_v4 {
            cases.extend(too_large(way));
            let (frames, _) = query(way, datagram(1200).checksum(Checksum::Fixed(0)), 512);
            cases.push(
                case("A fragment of a datagram without a checksum is dropped")
                    .then(Step::dropped(frames[0].clone(), Reason::UNTRANSLATABLE).counts(DNS.opened_only())),
            );
        } else {
            let (packet, out) = way.request(DNS, datagram(33));
            let out = out.link(SERVER_SIDE.mac, mac_of(*UDP_SERVER.ip())).ttl(63);
            let atomic = packet.extension(44, vec![0, 0, 0, 0, 0, 0, 0, 7]);
            cases.push(
                case("A fragment header of a whole packet is left out").then(request(
                    &atomic.build(),
                    &super::families::frame(&out),
                    true,
                )),
            );
        }
    }
    cases
}

/// What does not fit as IPv6 and may be cut is the agent's to cut: translated, but for its last hop.
fn too_large(way: Way) -> Vec<Case> {
    let mut world = way.world();
    for interface in world.interfaces.values_mut() {
        interface.mtu_bytes = 1500;
    }
    let case = |sentence: &str| Case::new(sentence, world.clone()).v4_only();
    let datagram = |len: usize| Builder::udp(CLIENT, DNS.vip()).payload(len).fragment(0);
    let handed_over = |frame: Vec<u8>, out: Vec<u8>| Step::dropped(frame, Reason::FRAGMENTED).out(out);
    let (packet, out) = way.request(DNS, datagram(1472));
    let whole = handed_over(packet.build(), out.build()).counts(DNS.opened());
    let (_, fitting) = way.request(DNS, datagram(1452));
    let fitting = fitting.link(SERVER_SIDE.mac, mac_of(*UDP_SERVER.ip())).ttl(63);
    let (frames, outs) = query(way, datagram(1952), 1480);
    let (_, handed) = way.request(DNS, datagram(1952));
    let told = packet.clone().fragment(0x4000);
    vec![
        case("A packet of IPv4 that may be cut and is too large as IPv6 is the agent's to cut").then(whole),
        case("A packet of IPv4 that fits as IPv6 is sent").then(request(
            &way.request(DNS, datagram(1452)).0.build(),
            &fitting.build(),
            true,
        )),
        case("A fragment of IPv4 that is too large as IPv6 is the agent's to cut").all([
            handed_over(frames[0].clone(), cut_v6(&handed.build(), 1480).remove(0)).counts(DNS.opened()),
            request(&frames[1], &outs[1], false),
        ]),
        case("A packet of IPv4 that may not be cut is refused with what IPv6 leaves").then(
            Step::new(&CLIENT_SIDE, told.build(), Verdict::TRANSMIT, Reason::TOO_BIG)
                .out(told.reported(3, 4, 1480).build())
                .counts(DNS.opened_only()),
        ),
    ]
}
