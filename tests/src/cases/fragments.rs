//! Fragments, cut from whole packets: what the first has decides for the others.

use std::net::Ipv4Addr;

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, DNAT_DNS, DNS, OTHER_CLIENT, REMOTE, Service, Step, VIP, WEB, answer, binding, client_mac,
    from_client, query, rewritten, to_client, to_server, world,
};
use crate::{
    packet::{Builder, ETHERNET_LEN, segment, with_ipv4_header},
    tables::{MemoryTables, SERVER_SIDE},
};

pub(super) const IDENTIFICATION: u16 = 0x4711;

/// Cuts an IPv4 frame without options into fragments of so many bytes of payload each, a multiple of eight.
pub(super) fn cut(frame: &[u8], len: usize) -> Vec<Vec<u8>> {
    let (header, payload) = frame.split_at(ETHERNET_LEN + 20);
    let count = payload.len().div_ceil(len);
    payload
        .chunks(len)
        .enumerate()
        .map(|(index, part)| {
            let more = if index + 1 < count { 0x2000 } else { 0 };
            let field = more | (index * len / 8) as u16;
            with_ipv4_header(header, IDENTIFICATION, field, part)
        })
        .collect()
}

/// The same of an IPv6 frame without extension headers: each fragment gets a fragment header.
pub(super) fn cut_v6(frame: &[u8], len: usize) -> Vec<Vec<u8>> {
    let (header, payload) = frame.split_at(ETHERNET_LEN + 40);
    let count = payload.len().div_ceil(len);
    payload
        .chunks(len)
        .enumerate()
        .map(|(index, part)| {
            let mut fragment = header.to_vec();
            let next = std::mem::replace(&mut fragment[ETHERNET_LEN + 6], 44);
            let payload_len = (part.len() + 8) as u16;
            fragment[ETHERNET_LEN + 4..ETHERNET_LEN + 6].copy_from_slice(&payload_len.to_be_bytes());
            let more = u16::from(index + 1 < count);
            fragment.extend([next, 0]);
            fragment.extend(((index * len) as u16 | more).to_be_bytes());
            fragment.extend(u32::from(IDENTIFICATION).to_be_bytes());
            fragment.extend(part);
            fragment
        })
        .collect()
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn cut(self, packet: &Builder) -> Vec<Vec<u8>> {
        match self {
            Self::V4 => cut(&packet.build(), 512),
            Self::V6 => cut_v6(&packet.clone().in_v6().build(), 512),
        }
    }

    fn case(self, sentence: &str, world: MemoryTables) -> Case {
        match self {
            Self::V4 => Case::new(sentence, world).v4_only(),
            Self::V6 => Case::new(format!("{sentence}, in IPv6"), world),
        }
    }

    fn done(self, case: Case) -> Case {
        match self {
            Self::V4 => case,
            Self::V6 => case.in_ipv6_world(),
        }
    }

    /// A datagram of a client in three fragments, and what they become.
    fn query(self, service: Service) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let packet = query(service).payload(1200);
        let source = if service.port == DNAT_DNS.port {
            CLIENT
        } else {
            binding(0)
        };
        (
            self.cut(&packet),
            self.cut(&to_server(&packet, source, service.server)),
        )
    }

    fn answer(self, service: Service) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let packet = answer(service, binding(0)).payload(1200);
        (
            self.cut(&packet),
            self.cut(&to_client(&packet, service.vip(), CLIENT)),
        )
    }
}

fn request(service: Service, frame: &[u8], out: &[u8], is_first: bool) -> Step {
    let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
    let step = Step::new(
        &super::CLIENT_SIDE,
        frame.to_vec(),
        verdict,
        Reason::REQUEST_FORWARDED,
    )
    .out(out.to_vec());
    step.counts(if is_first {
        service.opened()
    } else {
        service.request()
    })
}

fn reply(service: Service, frame: &[u8], out: &[u8], is_first: bool) -> Step {
    let verdict = Verdict::redirect(super::CLIENT_SIDE.ifindex);
    let step = Step::new(&SERVER_SIDE, frame.to_vec(), verdict, Reason::REPLY_FORWARDED).out(out.to_vec());
    step.counts(if is_first {
        service.first_answer()
    } else {
        service.reply()
    })
}

fn held(frame: &[u8]) -> Step {
    Step::dropped(frame.to_vec(), Reason::FRAGMENT_HELD)
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (name, service) in [("full NAT", DNS), ("DNAT", DNAT_DNS)] {
            let (frames, outs) = family.query(service);
            let step = |index: usize| request(service, &frames[index], &outs[index], index == 0);
            let case = family.case(
                &format!("Fragments of a datagram in {name} follow the first"),
                world(),
            );
            cases.push(family.done(case.all([step(0), step(1), step(2)])));
            let case = family.case(
                &format!("Fragments of a datagram in {name} follow the first in any order"),
                world(),
            );
            cases.push(family.done(case.all([step(0), step(2), step(1)])));
        }
        let (frames, outs) = family.query(DNS);
        let (answers, answered) = family.answer(DNS);
        let opened = || request(DNS, &frames[0], &outs[0], true);
        let replied = |index: usize| reply(DNS, &answers[index], &answered[index], index == 0);
        cases.push(
            family.done(
                family
                    .case("Fragments of an answer follow the first", world())
                    .then(opened())
                    .all([replied(0), replied(1), replied(2)]),
            ),
        );
        cases.push(
            family.done(
                family
                    .case("A fragment that comes before its first is held", world())
                    .then(held(&frames[1])),
            ),
        );
        cases.push(
            family.done(
                family
                    .case(
                        "A fragment of an answer that comes before its first is held",
                        world(),
                    )
                    .then(opened())
                    .then(held(&answers[2]))
                    .then(replied(0))
                    .then(replied(2)),
            ),
        );
        let other = query(DNS)
            .from(OTHER_CLIENT)
            .link(client_mac(OTHER_CLIENT), super::CLIENT_SIDE.mac)
            .payload(1200);
        cases.push(
            family.done(
                family
                    .case("A fragment of another client does not follow", world())
                    .then(opened())
                    .then(held(&family.cut(&other)[1])),
            ),
        );
        let foreign = query(DNS)
            .to(std::net::SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 9), 53))
            .payload(1200);
        cases.push(
            family.done(
                family
                    .case("A fragment that is not for us passes", world())
                    .then(Step::passed(family.cut(&foreign)[1].clone(), Reason::NOT_OURS)),
            ),
        );
        let large = match family {
            Family::V4 => cut(&query(DNS).payload(5000).build(), 2504),
            Family::V6 => cut_v6(&query(DNS).payload(5000).in_v6().build(), 2504),
        };
        cases.push(
            family.done(
                family
                    .case("A fragment that is too large to be held is dropped", world())
                    .then(Step::dropped(large[1].clone(), Reason::FRAGMENT)),
            ),
        );
        let mut full = world();
        full.free_flows.clear();
        let refused = &family.cut(&query(DNS).payload(1200))[1];
        cases.push(
            family.done(
                family
                    .case("A fragment after a refused first is held in vain", full)
                    .then(held(refused)),
            ),
        );
        let remote = from_client(segment::SYN, CLIENT, REMOTE).payload(1200);
        let (frames, outs) = (
            family.cut(&remote),
            family.cut(&rewritten(&remote, binding(0), REMOTE.server)),
        );
        let to_stack = |index: usize| {
            let step = Step::passed(frames[index].clone(), Reason::REQUEST_TO_STACK).out(outs[index].clone());
            step.counts(if index == 0 {
                REMOTE.opened()
            } else {
                REMOTE.request()
            })
        };
        cases.push(
            family.done(
                family
                    .case("Fragments into a tunnel are left to the stack", world())
                    .all([to_stack(0), to_stack(1), to_stack(2)]),
            ),
        );
        let reset = from_client(segment::RST | segment::ACK, CLIENT, WEB);
        cases.push(
            family.done(
                family
                    .case("A fragment after another's reset is none", world())
                    .then(to_stack(0))
                    .then(Step::dropped(
                        match family {
                            Family::V4 => reset.build(),
                            Family::V6 => reset.in_v6().build(),
                        },
                        Reason::NOT_A_SYN,
                    ))
                    .then(to_stack(1)),
            ),
        );
        let oldest = family.cut(&from_client(segment::ACK, CLIENT, WEB).payload(600));
        cases.push(
            family.done(
                family
                    .case(
                        "A first fragment without a flow opens none unless it may",
                        world(),
                    )
                    .then(Step::dropped(oldest[0].clone(), Reason::NOT_A_SYN))
                    .then(held(&oldest[1])),
            ),
        );
        let echo = match family {
            Family::V4 => Builder::icmp(8, 0, *CLIENT.ip(), VIP),
            Family::V6 => Builder::icmp(128, 0, *CLIENT.ip(), VIP),
        };
        let echo = family.cut(
            &echo
                .link(client_mac(CLIENT), super::CLIENT_SIDE.mac)
                .payload(1200),
        );
        cases.push(
            family.done(
                family
                    .case("Fragments of an echo request pass", world())
                    .then(Step::passed(echo[0].clone(), Reason::UNSUPPORTED_PROTOCOL))
                    .then(Step::passed(echo[1].clone(), Reason::UNSUPPORTED_PROTOCOL)),
            ),
        );
    }
    cases
}
