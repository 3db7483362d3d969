//! ICMP errors: those that the gateway translates, and those that it sends itself, in both families.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, DNAT_DNS, DNAT_WEB, DNS, REMOTE, ROUTED_CLIENT, Service, Step, UNRESOLVED_CLIENT, VIP, WEB,
    answer, binding, client_mac, from_client, from_server, ipv6::at, query, rewritten, syn, to_client,
    to_server, world, world_with_mtu,
};
use crate::{
    packet::{Builder, Checksum, ETHERNET_LEN, patched, segment},
    tables::{CLIENT_SIDE, Link, ROUTER, SERVER_SIDE, TUNNEL_SIDE, in_v6, mac_of},
};

/// A router between the gateway and the backends.
const BEYOND: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 206);
/// A host that reports and is part of no flow.
const STRANGER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 77);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

/// An ICMP type and code.
pub(super) type Kind = (u8, u8);

/// Errors with what they are called: what they are in IPv4, in IPv6, and the four bytes behind the checksum.
pub(super) const ERRORS: [(&str, Kind, Kind, u32); 7] = [
    ("network unreachable", (3, 0), (1, 0), 0),
    ("administratively prohibited", (3, 13), (1, 1), 0),
    ("host unreachable", (3, 1), (1, 3), 0),
    ("port unreachable", (3, 3), (1, 4), 0),
    ("too big", (3, 4), (2, 0), 1280),
    ("time exceeded", (11, 0), (3, 0), 0),
    ("parameter problem", (12, 0), (4, 0), 0x0600_0000),
];

impl Family {
    pub(super) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn address(self, address: Ipv4Addr) -> IpAddr {
        match self {
            Self::V4 => address.into(),
            Self::V6 => in_v6(address).into(),
        }
    }

    fn end(self, end: SocketAddrV4) -> SocketAddr {
        match self {
            Self::V4 => end.into(),
            Self::V6 => at(end),
        }
    }

    /// A packet between IPv4 addresses, as one of this family.
    pub(super) fn packet(self, packet: &Builder) -> Builder {
        match self {
            Self::V4 => packet.clone(),
            Self::V6 => packet.clone().in_v6(),
        }
    }

    pub(super) fn case(self, case: Case) -> Case {
        match self {
            Self::V4 => case.v4_only(),
            Self::V6 => case.in_ipv6_world(),
        }
    }

    /// An error by this host about a packet, of which `quoted` bytes behind the IP header are quoted.
    fn error(self, error: usize, reporter: Ipv4Addr, about: &Builder, quoted: usize) -> Builder {
        let (_, v4, v6, rest) = ERRORS[error];
        let ((kind, code), header) = match self {
            Self::V4 => (v4, 20),
            Self::V6 => (v6, 40),
        };
        let frame = about.build();
        let packet = &frame[ETHERNET_LEN..];
        Builder::icmp(kind, code, self.address(reporter), about.ends().0.ip())
            .icmp_rest(rest)
            .payload_of(&packet[..packet.len().min(header + quoted)])
    }
}

/// A flow of one family through one listener: its packets as each end and as the gateway's other side knows them.
pub(super) struct Flow {
    family: Family,
    service: Service,
    /// What the backend takes for its client.
    source: SocketAddrV4,
    /// As it comes.
    request: Builder,
    reply: Builder,
}

impl Flow {
    fn new(family: Family, service: Service) -> Self {
        let is_dnat = [DNAT_WEB.port, DNAT_DNS.port].contains(&service.port);
        let source = if is_dnat { CLIENT } else { binding(0) };
        let is_udp = [DNS.port, DNAT_DNS.port].contains(&service.port);
        let (request, reply) = if is_udp {
            (query(service), answer(service, source))
        } else {
            (syn(service), from_server(segment::SYN_ACK, service, source))
        };
        Self::of(family, service, source, request, reply)
    }

    /// By its first packets between IPv4 addresses, as they come.
    pub(super) fn of(
        family: Family,
        service: Service,
        source: SocketAddrV4,
        request: Builder,
        reply: Builder,
    ) -> Self {
        Self {
            family,
            service,
            source,
            request,
            reply,
        }
    }

    fn is_dnat(&self) -> bool {
        self.source == CLIENT
    }

    pub(super) fn opened(&self) -> Step {
        let (packet, out) = self.request();
        Step::request(&packet, &out).counts(self.service.opened())
    }

    /// A request as it comes and as it leaves.
    pub(super) fn request(&self) -> (Builder, Builder) {
        let out = to_server(&self.request, self.source, self.service.server);
        (self.family.packet(&self.request), self.family.packet(&out))
    }

    /// A reply as it comes and as it leaves.
    pub(super) fn reply(&self) -> (Builder, Builder) {
        let out = to_client(&self.reply, self.service.vip(), CLIENT);
        (self.family.packet(&self.reply), self.family.packet(&out))
    }

    /// An error about the request reaches the client.
    pub(super) fn about_request(&self, error: usize, reporter: Ipv4Addr, quoted: usize) -> Step {
        let (as_sent, as_left) = self.request();
        let frame = self
            .family
            .error(error, reporter, &as_left, quoted)
            .link(mac_of(BEYOND), SERVER_SIDE.mac);
        // The quote keeps the time to live it was read with.
        let out = self
            .family
            .error(error, VIP, &as_sent.ttl(63), quoted)
            .link(CLIENT_SIDE.mac, client_mac(CLIENT))
            .ttl(63);
        let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
        Step::new(&SERVER_SIDE, frame.build(), verdict, Reason::ICMP_FORWARDED).out(out.build())
    }

    /// An error about the reply reaches the backend.
    pub(super) fn about_reply(&self, error: usize, reporter: Ipv4Addr, quoted: usize) -> Step {
        let (as_sent, as_left) = self.reply();
        let frame = self
            .family
            .error(error, reporter, &as_left, quoted)
            .link(mac_of(ROUTER), CLIENT_SIDE.mac);
        let seen_reporter = if self.is_dnat() {
            reporter
        } else {
            *self.source.ip()
        };
        let out = self
            .family
            .error(error, seen_reporter, &as_sent.ttl(63), quoted)
            .link(SERVER_SIDE.mac, mac_of(*self.service.server.ip()))
            .ttl(63);
        let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
        Step::new(&CLIENT_SIDE, frame.build(), verdict, Reason::ICMP_FORWARDED).out(out.build())
    }
}

pub(super) fn all() -> Vec<Case> {
    [
        translated(),
        untranslated(),
        own(),
        in_tunnels(),
        own_in_tunnels(),
    ]
    .concat()
}

fn translated() -> Vec<Case> {
    let mut cases = Vec::new();
    let services = [
        ("TCP in full NAT", WEB),
        ("UDP in full NAT", DNS),
        ("TCP in DNAT", DNAT_WEB),
        ("UDP in DNAT", DNAT_DNS),
    ];
    for family in Family::BOTH {
        let name = family.name();
        for (kind, service) in services {
            let flow = Flow::new(family, service);
            for (error, (text, ..)) in ERRORS.iter().enumerate() {
                let case = Case::new(
                    format!("\"{text}\" about a packet of {kind} over {name} reaches either end"),
                    world(),
                );
                let case = case
                    .then(flow.opened())
                    .then(flow.about_request(error, *service.server.ip(), 1000))
                    .then(flow.about_reply(error, *ROUTED_CLIENT.ip(), 1000));
                cases.push(family.case(case));
            }
            for quoted in [8, 9, 18, 20, 28] {
                let case = Case::new(
                    format!("An error that quotes {quoted} bytes of {kind} over {name} is translated"),
                    world(),
                );
                let case = case
                    .then(flow.opened())
                    .then(flow.about_request(4, BEYOND, quoted))
                    .then(flow.about_reply(4, *CLIENT.ip(), quoted));
                cases.push(family.case(case));
            }
            let case = Case::new(
                format!("A router on the way of {kind} over {name} is heard of from the VIP"),
                world(),
            );
            cases.push(
                family.case(
                    case.then(flow.opened())
                        .then(flow.about_request(5, STRANGER, 1000)),
                ),
            );
        }
        // Without a checksum there is none to keep right.
        let packet = query(DNS).checksum(Checksum::Fixed(0));
        if family == Family::V4 {
            let left = to_server(&packet, binding(0), DNS.server);
            let frame = family
                .error(3, *DNS.server.ip(), &left, 100)
                .link(mac_of(BEYOND), SERVER_SIDE.mac);
            let out = family
                .error(3, VIP, &packet.clone().ttl(63), 100)
                .link(CLIENT_SIDE.mac, client_mac(CLIENT))
                .ttl(63);
            let step = Step::new(
                &SERVER_SIDE,
                frame.build(),
                Verdict::redirect(CLIENT_SIDE.ifindex),
                Reason::ICMP_FORWARDED,
            );
            cases.push(
                Case::new("A quoted datagram without a checksum stays without", world())
                    .then(Step::request(&packet, &left).counts(DNS.opened()))
                    .then(step.out(out.build())),
            );
        }
    }
    cases
}

fn untranslated() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let name = family.name();
        let header = if family == Family::V4 { 20 } else { 40 };
        let flow = Flow::new(family, WEB);
        let (_, left) = flow.request();
        let error = |about: &Builder| {
            family
                .error(3, *WEB.server.ip(), about, 100)
                .link(mac_of(BEYOND), SERVER_SIDE.mac)
        };
        let to_us = error(&left);
        let other_port = error(&left.clone().from(family.end(binding(7))));
        let other_end = error(&left.clone().to(family.end(SocketAddrV4::new(STRANGER, 8080))));
        let foreign = error(
            &left
                .clone()
                .from(family.end(SocketAddrV4::new(STRANGER, 1024)))
                .to(family.end(SocketAddrV4::new(BEYOND, 80))),
        );
        let stop = |frame: Vec<u8>, verdict: Verdict, reason: Reason| {
            Step::new(&SERVER_SIDE, frame, verdict, reason)
        };
        let inner = ETHERNET_LEN + header + 8;
        let short = family
            .error(3, *WEB.server.ip(), &left, 7)
            .link(mac_of(BEYOND), SERVER_SIDE.mac);
        let says = |what: &str| format!("An ICMP error over {name} {what}");
        let protocol_at = if family == Family::V4 { 9 } else { 6 };
        let last = to_us.clone().ttl(1).build();
        let list = vec![
            Case::new(says("about no flow of the pool is dropped"), world()).then(stop(
                to_us.build(),
                Verdict::DROP,
                Reason::NO_FLOW,
            )),
            Case::new(says("about a free binding is dropped"), world())
                .then(flow.opened())
                .then(stop(other_port.build(), Verdict::DROP, Reason::NO_FLOW)),
            Case::new(says("that names another backend is dropped"), world())
                .then(flow.opened())
                .then(stop(other_end.build(), Verdict::DROP, Reason::NO_FLOW)),
            Case::new(says("about somebody else's packet passes"), world())
                .then(flow.opened())
                .then(stop(foreign.build(), Verdict::PASS, Reason::NOT_OURS)),
            Case::new(says("that quotes too little passes"), world())
                .then(flow.opened())
                .then(stop(short.build(), Verdict::PASS, Reason::TRUNCATED)),
            Case::new(says("that quotes another IP version passes"), world())
                .then(flow.opened())
                .then(stop(
                    patched(to_us.build(), inner, &[0x15]),
                    Verdict::PASS,
                    Reason::UNSUPPORTED_PROTOCOL,
                )),
            Case::new(says("that quotes another protocol passes"), world())
                .then(flow.opened())
                .then(stop(
                    patched(to_us.build(), inner + protocol_at, &[47]),
                    Verdict::PASS,
                    Reason::UNSUPPORTED_PROTOCOL,
                )),
            Case::new(says("whose own time to live ends is dropped in silence"), world())
                .then(flow.opened())
                .then(stop(last, Verdict::DROP, Reason::TTL_EXCEEDED)),
            Case::new(says("of an unknown type passes"), world())
                .then(flow.opened())
                .then(stop(
                    to_us
                        .clone()
                        .icmp_kind(if family == Family::V4 { 5 } else { 137 })
                        .build(),
                    Verdict::PASS,
                    Reason::UNSUPPORTED_PROTOCOL,
                )),
        ];
        cases.extend(list.into_iter().map(|case| family.case(case)));
    }
    let flow = Flow::new(Family::V4, WEB);
    let (_, left) = flow.request();
    // To a client whose link address is not known.
    let request = from_client(segment::SYN, UNRESOLVED_CLIENT, WEB);
    let unresolved = Family::V4
        .error(3, BEYOND, &to_server(&request, binding(0), WEB.server), 100)
        .link(mac_of(BEYOND), SERVER_SIDE.mac);
    let out = Family::V4
        .error(3, VIP, &request.clone().ttl(63), 100)
        .link(mac_of(BEYOND), SERVER_SIDE.mac);
    let to_stack = Step::new(
        &SERVER_SIDE,
        unresolved.build(),
        Verdict::PASS,
        Reason::ICMP_TO_STACK,
    );
    cases.push(
        Case::new("An ICMP error that the stack routes is translated, too", world())
            .then(Step::request(&request, &to_server(&request, binding(0), WEB.server)).counts(WEB.opened()))
            .then(to_stack.out(out.build())),
    );
    let fragment = Family::V4
        .error(3, *WEB.server.ip(), &left.fragment(0x0010), 100)
        .link(mac_of(BEYOND), SERVER_SIDE.mac);
    cases.push(
        Case::new("An ICMP error that quotes a later fragment passes", world())
            .then(flow.opened())
            .then(Step::new(
                &SERVER_SIDE,
                fragment.build(),
                Verdict::PASS,
                Reason::UNSUPPORTED_PROTOCOL,
            )),
    );
    cases
}

/// A packet that the gateway itself reports to its sender.
pub(super) fn told(link: &Link, packet: &Builder, reason: Reason, mtu_bytes: u32) -> Step {
    let is_v4 = packet.ends().0.is_ipv4();
    let (kind, code) = match (reason, is_v4) {
        (Reason::TOO_BIG, true) => (3, 4),
        (Reason::TOO_BIG, false) => (2, 0),
        (_, true) => (11, 0),
        (_, false) => (3, 0),
    };
    let out = packet.reported(kind, code, mtu_bytes).build();
    Step::new(link, packet.build(), Verdict::TRANSMIT, reason).out(out)
}

fn own() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let name = family.name();
        let headers = if family == Family::V4 { 40 } else { 60 };
        let flow = Flow::new(family, WEB);
        let (request, _) = flow.request();
        let (reply, _) = flow.reply();
        let remote = family.packet(&syn(REMOTE));
        let datagram = |len: usize| family.packet(&query(DNS).payload(len).fragment(0x4000));
        let segment = |packet: &Builder, len: usize| {
            let packet = packet.clone().flags(segment::ACK).payload(len - headers);
            if family == Family::V4 {
                packet.fragment(0x4000)
            } else {
                packet
            }
        };
        let expired =
            |packet: &Builder, ttl: u8| told(&CLIENT_SIDE, &packet.clone().ttl(ttl), Reason::TTL_EXCEEDED, 0);
        let big_reply = segment(&reply, 1461);
        let unheard = |source: Ipv4Addr| {
            let packet = family
                .packet(&syn(WEB))
                .ttl(1)
                .from(family.end(SocketAddrV4::new(source, 50000)));
            Step::dropped(packet.build(), Reason::TTL_EXCEEDED)
        };
        let mut list = vec![
            Case::new(
                format!("A packet over {name} whose time to live is 1 ends here"),
                world(),
            )
            .then(expired(&request, 1)),
            Case::new(
                format!("A packet over {name} whose time to live is 0 ends here"),
                world(),
            )
            .then(expired(&request, 0)),
            Case::new(
                format!("A datagram over {name} whose time to live is 1 ends here"),
                world(),
            )
            .then(expired(&family.packet(&query(DNS)), 1)),
            Case::new(
                format!(
                    "A packet over {name} for the stack to route ends here as well when its time to live is 1"
                ),
                world(),
            )
            .then(expired(&remote, 1)),
            Case::new(
                format!("A reply over {name} whose time to live is 1 ends here"),
                world(),
            )
            .then(flow.opened())
            .then(told(&SERVER_SIDE, &reply.clone().ttl(1), Reason::TTL_EXCEEDED, 0)),
            Case::new(
                format!("A request over {name} that does not fit is told what does"),
                world_with_mtu(),
            )
            .then(flow.opened())
            .then(told(
                &CLIENT_SIDE,
                &segment(&request, 1451),
                Reason::TOO_BIG,
                1450,
            )),
            Case::new(
                format!("A reply over {name} that fits where requests do not is sent"),
                world_with_mtu(),
            )
            .then(flow.opened())
            .then({
                let out = big_reply
                    .clone()
                    .link(CLIENT_SIDE.mac, client_mac(CLIENT))
                    .from(family.end(WEB.vip()))
                    .to(family.end(CLIENT))
                    .ttl(63);
                Step::reply(&big_reply, &out).counts(WEB.reply())
            }),
            Case::new(
                format!("A datagram over {name} that does not fit opens its flow and is told what does"),
                world_with_mtu(),
            )
            .then(
                told(&CLIENT_SIDE, &datagram(1500 - headers), Reason::TOO_BIG, 1450)
                    .counts(DNS.opened_only()),
            ),
        ];
        if family == Family::V4 {
            list.extend([
                Case::new("Nobody is told at a loopback address", world())
                    .then(unheard([127, 0, 0, 1].into())),
                Case::new("Nobody is told at a multicast address", world())
                    .then(unheard([224, 0, 0, 9].into())),
                Case::new("Nobody is told at address zero", world()).then(unheard([0, 0, 0, 7].into())),
            ]);
        }
        cases.extend(list.into_iter().map(|case| family.case(case)));
    }
    let fragmentable = query(DNS).payload(1460);
    cases.push(
        Case::new(
            "A datagram that does not fit and may be fragmented is left to the stack",
            world_with_mtu(),
        )
        .then(
            Step::to_stack(&fragmentable, &rewritten(&fragmentable, binding(0), DNS.server))
                .counts(DNS.opened()),
        )
        .v4_only(),
    );
    cases
}

fn in_tunnels() -> Vec<Case> {
    Family::BOTH
        .into_iter()
        .map(|family| {
            let packet = family.packet(&from_client(segment::SYN, CLIENT, REMOTE));
            let left = packet
                .clone()
                .from(family.end(binding(0)))
                .to(family.end(REMOTE.server));
            let frame = family
                .error(4, *REMOTE.server.ip(), &left, 1000)
                .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
            let out = family
                .error(4, VIP, &packet, 1000)
                .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac)
                .ttl(63);
            let error = Step::new(
                &TUNNEL_SIDE,
                frame.build(),
                Verdict::redirect(CLIENT_SIDE.ifindex),
                Reason::ICMP_FORWARDED,
            );
            let case = Case::new(
                format!(
                    "An ICMP error over {} out of a tunnel reaches the client",
                    family.name()
                ),
                world(),
            );
            family.case(
                case.then(Step::to_stack(&packet, &left).counts(REMOTE.opened()))
                    .then(error.in_tunnel().out(out.build())),
            )
        })
        .collect()
}

/// What the gateway reports of packets out of a kernel tunnel, to the host behind it.
fn own_in_tunnels() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let name = family.name();
        let ip_len = if family == Family::V4 { 20 } else { 40 };
        let opening = |case: Case| {
            let packet = family.packet(&syn(REMOTE));
            let left = packet
                .clone()
                .from(family.end(binding(0)))
                .to(family.end(REMOTE.server));
            case.then(Step::to_stack(&packet, &left).counts(REMOTE.opened()))
        };
        let reply = |len: usize| {
            let reply = Builder::tcp(segment::ACK, REMOTE.server, binding(0))
                .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac)
                .payload(len - ip_len - 20)
                .fragment(if family == Family::V4 { 0x4000 } else { 0 });
            family.packet(&reply)
        };
        let is_told =
            |packet: &Builder, reason, mtu_bytes| told(&TUNNEL_SIDE, packet, reason, mtu_bytes).in_tunnel();
        // The kernel, or the device, completes the quoted checksum, and the message's is made for that.
        let owed = reply(100).ttl(1);
        let partial = owed.clone().checksum(Checksum::Partial).build();
        let field = |start: usize| start..start + 2;
        let own = &partial[field(ETHERNET_LEN + ip_len + 16)];
        let out = owed.reported(if ip_len == 20 { 11 } else { 3 }, 0, 0).build();
        let out = patched(out, ETHERNET_LEN + ip_len + 8 + ip_len + 16, own);
        let list = [
            opening(Case::new(
                format!("A reply over {name} out of a tunnel that does not fit the client's link is told what does"),
                world_with_mtu(),
            ))
            .then(is_told(&reply(1501), Reason::TOO_BIG, 1500)),
            opening(Case::new(
                format!("A reply over {name} out of a tunnel whose time to live is 1 is told so"),
                world(),
            ))
            .then(is_told(&reply(100).ttl(1), Reason::TTL_EXCEEDED, 0)),
            opening(Case::new(
                format!("What is told of a packet over {name} whose checksum the kernel owes is right once it is paid"),
                world(),
            ))
            .then(
                Step::new(&TUNNEL_SIDE, partial.clone(), Verdict::TRANSMIT, Reason::TTL_EXCEEDED)
                    .in_tunnel()
                    .out(out),
            ),
        ];
        cases.extend(list.into_iter().map(|case| family.case(case)));
    }
    cases
}
