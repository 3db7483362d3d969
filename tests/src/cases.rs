//! The packet cases: what becomes of a packet, each with a sentence.
//!
//! One list for two rings: the library runs it in memory, the kernel runs it in the real programs. A case is a
//! world (tables, see [`world`]) and events in it: packets, each with its expected verdict, reason, bytes and
//! counters, and changes of the tables between them. Expected frames are built by `packet`, so they know
//! nothing of how the data path comes to them.

use std::net::{Ipv4Addr, SocketAddrV4};

use forwarder_common::{
    abi::{
        backend::{BackendHop, BackendId, BackendState, GroupId, NatMode},
        flow::{Direction, FlowId, FlowKey, FlowReference, FlowState, HopKind},
        interface::InterfaceKey,
        listener::{ListenerId, ListenerKey},
        reason::Reason,
        settings::flag,
        snat::PORTS_PER_ADDRESS,
    },
    datapath::{Hook, Verdict},
    wire::{Be16, LinkPair, MacAddress},
};

use crate::{
    packet::{Arp, Builder, Checksum, ETHERNET_LEN, Mac, fold, ip_len, is_reset, patched, segment, sum},
    tables::{
        CLIENT_SIDE, CLOSED_SIDE, Link, Live, MemoryTables, Program, ROUTER, SERVER_SIDE, SIZES, TUNNEL_SIDE,
        in_v6, mac_of,
    },
};

mod echo;
mod families;
mod family_errors;
mod family_fragments;
mod fragments;
mod handshake;
mod icmp_errors;
mod ipv6;
pub mod measured;
mod overlay;
pub mod recorded;
mod sctp;
mod selection;
mod twin;
mod vlan;

/// A sentence, and what it says as something that can be run.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is true; the case's name.
    pub sentence: String,
    /// The tables before the first event.
    pub world: MemoryTables,
    pub events: Vec<Event>,
    /// Why the kernel cannot show this case.
    pub library_only: Option<&'static str>,
    /// It says something of IPv4 alone.
    pub is_v4_only: bool,
}

#[derive(Clone, Debug)]
pub enum Event {
    Packet(Box<Step>),
    /// Somebody else writes the tables: the agent, or time.
    Change(fn(&mut MemoryTables)),
}

/// A packet and what must become of it.
#[derive(Clone, Debug)]
pub struct Step {
    pub program: Program,
    /// Interface it comes in by.
    pub ifindex: u32,
    pub frame: Vec<u8>,
    /// What is counted for listener and backend, where that is inside of the frame.
    pub inside: Option<Vec<u8>>,
    pub verdict: Verdict,
    pub reason: Reason,
    /// The frame afterwards.
    pub out: Vec<u8>,
    pub traffic: Traffic,
}

impl Step {
    /// Adds what this packet must have counted.
    pub fn count_into(&self, tables: &mut MemoryTables) {
        let reason = &mut tables.reason_counters[self.reason.0 as usize];
        reason.packets += 1;
        reason.bytes += self.frame.len() as u64;
        let frame = self.inside.as_ref().unwrap_or(&self.frame);
        let (listener, backend) = match self.traffic {
            Traffic::Nothing => return,
            Traffic::CookieSent(listener) => {
                tables.listener_counters[listener.0 as usize].cookies_sent += 1;
                return;
            }
            Traffic::CookieInvalid(listener) => {
                tables.listener_counters[listener.0 as usize].cookies_invalid += 1;
                return;
            }
            Traffic::Limited(listener) => {
                tables.listener_counters[listener.0 as usize].flows_limited += 1;
                return;
            }
            Traffic::AcceptedAndRefused(listener) => {
                let counters = &mut tables.listener_counters[listener.0 as usize];
                counters.cookies_accepted += 1;
                counters.flows_refused += 1;
                counters.gateway_resets += 1;
                return;
            }
            Traffic::Refused(listener) | Traffic::NotBound(listener, _) => {
                let counters = &mut tables.listener_counters[listener.0 as usize];
                counters.flows_refused += 1;
                counters.gateway_resets += u64::from(self.verdict == Verdict::TRANSMIT);
                if let Traffic::NotBound(_, backend) = self.traffic {
                    tables.backend_counters[backend.0 as usize].flows_refused += 1;
                }
                return;
            }
            Traffic::Accepted(listener, backend) => {
                tables.listener_counters[listener.0 as usize].cookies_accepted += 1;
                (listener, backend)
            }
            Traffic::Opened(listener, backend)
            | Traffic::OpenedOnly(listener, backend)
            | Traffic::Request(listener, backend)
            | Traffic::FirstAnswer(listener, backend)
            | Traffic::Reply(listener, backend) => (listener, backend),
        };
        let counters = [
            &mut tables.listener_counters[listener.0 as usize],
            &mut tables.backend_counters[backend.0 as usize],
        ];
        for counters in counters {
            if matches!(
                self.traffic,
                Traffic::Opened(..) | Traffic::OpenedOnly(..) | Traffic::Accepted(..)
            ) {
                counters.flows_opened += 1;
            }
            if matches!(
                self.traffic,
                Traffic::Opened(..) | Traffic::Request(..) | Traffic::Accepted(..)
            ) {
                counters.request_packets += 1;
                counters.request_bytes += ip_len(frame);
                counters.client_resets += u64::from(is_reset(frame));
            }
            if matches!(self.traffic, Traffic::FirstAnswer(..) | Traffic::Reply(..)) {
                counters.reply_packets += 1;
                counters.reply_bytes += ip_len(frame);
                counters.backend_resets += u64::from(is_reset(frame));
            }
            if matches!(self.traffic, Traffic::FirstAnswer(..)) {
                let is_rejected = is_reset(frame);
                counters.flows_answered += u64::from(!is_rejected);
                counters.flows_rejected += u64::from(is_rejected);
            }
        }
    }
}

/// What a packet adds to the counters of listeners and backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Traffic {
    Nothing,
    /// A flow was opened and its first packet sent.
    Opened(ListenerId, BackendId),
    /// A flow was opened, but its first packet not sent.
    OpenedOnly(ListenerId, BackendId),
    Refused(ListenerId),
    /// Refused after a backend was chosen.
    NotBound(ListenerId, BackendId),
    Request(ListenerId, BackendId),
    /// A SYN was answered with a cookie.
    CookieSent(ListenerId),
    /// A cookie opened a flow.
    Accepted(ListenerId, BackendId),
    /// A cookie came back, and there is nobody to serve.
    AcceptedAndRefused(ListenerId),
    CookieInvalid(ListenerId),
    /// Its source is too fast.
    Limited(ListenerId),
    /// The backend's answer to what opened the flow.
    FirstAnswer(ListenerId, BackendId),
    Reply(ListenerId, BackendId),
}

impl Case {
    fn new(sentence: impl Into<String>, world: MemoryTables) -> Self {
        Self {
            sentence: sentence.into(),
            world,
            events: Vec::new(),
            library_only: None,
            is_v4_only: false,
        }
    }

    fn then(mut self, step: Step) -> Self {
        self.events.push(Event::Packet(Box::new(step)));
        self
    }

    fn all(self, steps: impl IntoIterator<Item = Step>) -> Self {
        steps.into_iter().fold(self, Self::then)
    }

    fn v4_only(mut self) -> Self {
        self.is_v4_only = true;
        self
    }

    fn change(mut self, change: fn(&mut MemoryTables)) -> Self {
        self.events.push(Event::Change(change));
        self
    }
}

impl Step {
    fn new(link: &Link, frame: Vec<u8>, verdict: Verdict, reason: Reason) -> Self {
        Self {
            program: Program::Native,
            ifindex: link.ifindex,
            out: frame.clone(),
            frame,
            inside: None,
            verdict,
            reason,
            traffic: Traffic::Nothing,
        }
    }

    /// From the clients' side, up to the stack, unchanged.
    fn passed(frame: Vec<u8>, reason: Reason) -> Self {
        Self::new(&CLIENT_SIDE, frame, Verdict::PASS, reason)
    }

    /// From the clients' side, dropped.
    fn dropped(frame: Vec<u8>, reason: Reason) -> Self {
        Self::new(&CLIENT_SIDE, frame, Verdict::DROP, reason)
    }

    /// From the clients' side, a SYN that is answered with a reset.
    fn reset(frame: &Builder, reason: Reason) -> Self {
        let out = frame.refused_tcp().build();
        Self::new(&CLIENT_SIDE, frame.build(), Verdict::TRANSMIT, reason).out(out)
    }

    /// From the clients' side, a datagram that is answered with ICMP.
    fn unreachable(frame: &Builder, reason: Reason) -> Self {
        let out = frame.refused_udp().build();
        Self::new(&CLIENT_SIDE, frame.build(), Verdict::TRANSMIT, reason).out(out)
    }

    /// From the clients' side to the servers'.
    fn request(frame: &Builder, out: &Builder) -> Self {
        let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
        Self::new(&CLIENT_SIDE, frame.build(), verdict, Reason::REQUEST_FORWARDED).out(out.build())
    }

    /// From the servers' side to the clients'.
    fn reply(frame: &Builder, out: &Builder) -> Self {
        let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
        Self::new(&SERVER_SIDE, frame.build(), verdict, Reason::REPLY_FORWARDED).out(out.build())
    }

    /// From the clients' side, rewritten and up to the stack.
    fn to_stack(frame: &Builder, out: &Builder) -> Self {
        Self::passed(frame.build(), Reason::REQUEST_TO_STACK).out(out.build())
    }

    fn by(mut self, link: &Link) -> Self {
        self.ifindex = link.ifindex;
        self
    }

    fn program(mut self, program: Program) -> Self {
        self.program = program;
        self
    }

    fn in_tunnel(self) -> Self {
        self.by(&TUNNEL_SIDE).program(Program::Tunnel)
    }

    fn verdict(mut self, verdict: Verdict) -> Self {
        self.verdict = verdict;
        self
    }

    fn out(mut self, out: Vec<u8>) -> Self {
        self.out = out;
        self
    }

    fn inside(mut self, frame: Vec<u8>) -> Self {
        self.inside = Some(frame);
        self
    }

    fn counts(mut self, traffic: Traffic) -> Self {
        self.traffic = traffic;
        self
    }
}

const VIP: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);
const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 10), 50000);
const OTHER_CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 11), 50000);
const ROUTED_CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 7), 50000);
const UNRESOLVED_CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 99), 50000);
const SNAT: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
const SNAT_COUNT: u32 = 2;

/// A listener of [`world`] and the backend behind it.
#[derive(Clone, Copy, Debug)]
struct Service {
    port: u16,
    listener: ListenerId,
    backend: BackendId,
    server: SocketAddrV4,
}

impl Service {
    const fn new(port: u16, listener: u32, backend: u32, server: SocketAddrV4) -> Self {
        Self {
            port,
            listener: ListenerId(listener),
            backend: BackendId(backend),
            server,
        }
    }

    fn vip(&self) -> SocketAddrV4 {
        SocketAddrV4::new(VIP, self.port)
    }

    fn opened(&self) -> Traffic {
        Traffic::Opened(self.listener, self.backend)
    }

    fn opened_only(&self) -> Traffic {
        Traffic::OpenedOnly(self.listener, self.backend)
    }

    fn request(&self) -> Traffic {
        Traffic::Request(self.listener, self.backend)
    }

    fn reply(&self) -> Traffic {
        Traffic::Reply(self.listener, self.backend)
    }

    fn first_answer(&self) -> Traffic {
        Traffic::FirstAnswer(self.listener, self.backend)
    }

    fn refused(&self) -> Traffic {
        Traffic::Refused(self.listener)
    }

    fn not_bound(&self) -> Traffic {
        Traffic::NotBound(self.listener, self.backend)
    }
}

const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 205), 8080);
const UDP_SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 206), 5353);

const WEB: Service = Service::new(80, 0, 0, SERVER);
const DNS: Service = Service::new(53, 1, 1, UDP_SERVER);
const DNAT_WEB: Service = Service::new(8000, 2, 0, SERVER);
const DNAT_DNS: Service = Service::new(5300, 3, 1, UDP_SERVER);
/// Behind the tunnel.
const REMOTE: Service = Service::new(81, 4, 2, server([192, 168, 1, 20]));
/// On the servers' side, with an unknown link address.
const UNRESOLVED: Service = Service::new(82, 5, 3, server([172, 17, 0, 99]));
/// Where a route forbids to go.
const FORBIDDEN: Service = Service::new(83, 6, 4, server([203, 0, 113, 9]));
/// Where no route goes.
const UNROUTED: Service = Service::new(84, 7, 5, server([198, 18, 0, 1]));
/// On the clients' side.
const SAME_SIDE: Service = Service::new(85, 8, 6, server([172, 18, 0, 20]));

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
/// Of both families, where it stands for echo.
const ICMP: u8 = 1;

const fn server(octets: [u8; 4]) -> SocketAddrV4 {
    let [a, b, c, d] = octets;
    SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), 8080)
}

/// The tables that most cases start from: one listener per way a packet can go.
pub fn world() -> MemoryTables {
    let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
    let services = [
        (WEB, TCP, NatMode::FULL),
        (DNS, UDP, NatMode::FULL),
        (DNAT_WEB, TCP, NatMode::DNAT),
        (DNAT_DNS, UDP, NatMode::DNAT),
        (REMOTE, TCP, NatMode::FULL),
        (UNRESOLVED, TCP, NatMode::FULL),
        (FORBIDDEN, TCP, NatMode::FULL),
        (UNROUTED, TCP, NatMode::FULL),
        (SAME_SIDE, TCP, NatMode::FULL),
    ];
    let mut servers = 0;
    for (service, protocol, nat) in services {
        if service.backend.0 == servers {
            let (address, port) = (*service.server.ip(), service.server.port());
            world.add_backend(address, port, BackendState::HEALTHY);
            servers += 1;
        }
        let listener = world.add_listener(VIP, service.port, protocol, nat, &[service.backend; 4]);
        assert_eq!(listener, service.listener);
    }
    world
}

/// [`world`], whose interfaces may hand in partial checksums.
pub fn world_with_partial_checksums() -> MemoryTables {
    let mut world = world();
    world.settings.flags |= flag::PARTIAL_CHECKSUMS;
    world
}

/// A world with [`WEB`]'s listener only, whose group has these slots; backend 0 is [`SERVER`], 1 is
/// [`UDP_SERVER`], both in the given state.
fn world_with_slots(states: [BackendState; 2], slots: &[u32]) -> MemoryTables {
    let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
    for (server, state) in [SERVER, UDP_SERVER].into_iter().zip(states) {
        world.add_backend(*server.ip(), server.port(), state);
    }
    let slots: Vec<_> = slots.iter().copied().map(BackendId).collect();
    world.add_listener(VIP, WEB.port, TCP, NatMode::FULL, &slots);
    world
}

/// The binding of the flow with this number, which is the one that the n-th new flow gets.
fn binding(number: u16) -> SocketAddrV4 {
    SocketAddrV4::new(SNAT, 1024 + number)
}

/// Link address of a client: of the router in front of clients that are not on the link.
fn client_mac(client: SocketAddrV4) -> Mac {
    match client {
        CLIENT | OTHER_CLIENT => mac_of(*client.ip()),
        _ => mac_of(ROUTER),
    }
}

/// A TCP segment of a client.
fn from_client(flags: u8, client: SocketAddrV4, service: Service) -> Builder {
    Builder::tcp(flags, client, service.vip()).link(client_mac(client), CLIENT_SIDE.mac)
}

/// A SYN of [`CLIENT`].
fn syn(service: Service) -> Builder {
    from_client(segment::SYN, CLIENT, service)
}

/// A datagram of [`CLIENT`].
fn query(service: Service) -> Builder {
    Builder::udp(CLIENT, service.vip())
        .link(client_mac(CLIENT), CLIENT_SIDE.mac)
        .payload(33)
}

/// A TCP segment of a local server.
fn from_server(flags: u8, service: Service, to: SocketAddrV4) -> Builder {
    Builder::tcp(flags, service.server, to).link(mac_of(*service.server.ip()), SERVER_SIDE.mac)
}

/// A datagram of a local server.
fn answer(service: Service, to: SocketAddrV4) -> Builder {
    Builder::udp(service.server, to)
        .link(mac_of(*service.server.ip()), SERVER_SIDE.mac)
        .payload(120)
}

/// A packet as it leaves for a host on the servers' side.
fn to_server(packet: &Builder, source: SocketAddrV4, server: SocketAddrV4) -> Builder {
    packet
        .clone()
        .from(source)
        .to(server)
        .ttl(63)
        .link(SERVER_SIDE.mac, mac_of(*server.ip()))
}

/// A packet as it leaves for a client.
fn to_client(packet: &Builder, source: SocketAddrV4, client: SocketAddrV4) -> Builder {
    packet
        .clone()
        .from(source)
        .to(client)
        .ttl(63)
        .link(CLIENT_SIDE.mac, client_mac(client))
}

/// A packet as it goes up to the stack: only addresses and ports are new.
fn rewritten(packet: &Builder, source: SocketAddrV4, destination: SocketAddrV4) -> Builder {
    packet.clone().from(source).to(destination)
}

/// A request of [`CLIENT`] in full NAT under the first binding.
fn web_request(flags: u8, payload: usize) -> Step {
    let packet = from_client(flags, CLIENT, WEB).payload(payload);
    Step::request(&packet, &to_server(&packet, binding(0), WEB.server)).counts(WEB.request())
}

/// Its reply.
fn web_reply(flags: u8, payload: usize) -> Step {
    let packet = from_server(flags, WEB, binding(0)).payload(payload);
    let traffic = if flags == segment::SYN_ACK {
        WEB.first_answer()
    } else {
        WEB.reply()
    };
    Step::reply(&packet, &to_client(&packet, WEB.vip(), CLIENT)).counts(traffic)
}

/// The SYN that opens the flow of [`web_request`].
fn web_opening() -> Step {
    web_request(segment::SYN, 0).counts(WEB.opened())
}

fn web_handshake() -> [Step; 3] {
    [
        web_opening(),
        web_reply(segment::SYN_ACK, 0),
        web_request(segment::ACK, 0),
    ]
}

/// A connection of [`web_handshake`] from SYN to the last FIN.
fn web_connection() -> Vec<Step> {
    let mut steps = web_handshake().to_vec();
    steps.extend([
        web_request(segment::ACK, 100),
        web_reply(segment::ACK, 1460),
        web_reply(segment::FIN, 0),
        web_request(segment::FIN, 0),
    ]);
    steps
}

/// All cases.
pub fn all() -> Vec<Case> {
    [
        requests(),
        replies(),
        lifecycles(),
        listeners(),
        backends(),
        selection::all(),
        bindings(),
        refusals(),
        limits(),
        next_hops(),
        shared_ways(),
        tunnels(),
        arp(),
        icmp(),
        lengths(),
        others(),
        checksums(),
        partial_checksums(),
        segment_sizes().into_iter().map(Case::v4_only).collect(),
        sctp::all(),
        echo::all(),
        families::all(),
        family_errors::all(),
        family_fragments::all(),
        fragments::all(),
        handshake::all(),
        icmp_errors::all(),
        ipv6::all(),
        vlan::all(),
        overlay::all(),
    ]
    .concat()
}

/// All cases with their twins in generic XDP and in IPv6.
pub fn with_twins() -> Vec<Case> {
    all().into_iter().flat_map(Case::with_twins).collect()
}

fn requests() -> Vec<Case> {
    let with_options = syn(WEB)
        .tcp_options(vec![
            2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7,
        ])
        .payload(11);
    let ecn = from_client(segment::SYN | 0xc0, CLIENT, WEB);
    let datagram = query(DNS);
    let dnat_syn = syn(DNAT_WEB);
    let dnat_datagram = query(DNAT_DNS);
    let other_client = from_client(segment::SYN, OTHER_CLIENT, WEB);
    let empty = query(DNS).payload(0);
    let mut cases = vec![
        Case::new(
            "A SYN to a listener opens a flow: it leaves from the first binding",
            world(),
        )
        .then(web_opening()),
        Case::new("A SYN keeps its options and payload", world()).then(
            Step::request(&with_options, &to_server(&with_options, binding(0), SERVER)).counts(WEB.opened()),
        ),
        Case::new("A SYN that offers ECN opens a flow", world())
            .then(Step::request(&ecn, &to_server(&ecn, binding(0), SERVER)).counts(WEB.opened())),
        Case::new("A datagram to a listener opens a flow", world()).then(
            Step::request(&datagram, &to_server(&datagram, binding(0), UDP_SERVER)).counts(DNS.opened()),
        ),
        Case::new("A datagram without payload opens a flow", world())
            .then(Step::request(&empty, &to_server(&empty, binding(0), UDP_SERVER)).counts(DNS.opened())),
        Case::new(
            "A DNAT listener's SYN keeps the client's address and port",
            world(),
        )
        .then(Step::request(&dnat_syn, &to_server(&dnat_syn, CLIENT, SERVER)).counts(DNAT_WEB.opened())),
        Case::new(
            "A DNAT listener's datagram keeps the client's address and port",
            world(),
        )
        .then(
            Step::request(&dnat_datagram, &to_server(&dnat_datagram, CLIENT, UDP_SERVER))
                .counts(DNAT_DNS.opened()),
        ),
        Case::new(
            "Two clients with the same source port get a binding each",
            world(),
        )
        .then(web_opening())
        .then(
            Step::request(&other_client, &to_server(&other_client, binding(1), SERVER)).counts(WEB.opened()),
        ),
        Case::new("A retransmitted SYN stays with its flow", world())
            .then(web_opening())
            .then(web_request(segment::SYN, 0)),
        Case::new("A second datagram stays with the first one's flow", world())
            .then(
                Step::request(&datagram, &to_server(&datagram, binding(0), UDP_SERVER)).counts(DNS.opened()),
            )
            .then(
                Step::request(&datagram, &to_server(&datagram, binding(0), UDP_SERVER)).counts(DNS.request()),
            ),
        Case::new("Data of an established connection is forwarded", world())
            .all(web_handshake())
            .then(web_request(segment::ACK, 1460)),
    ];
    let strays = [
        ("An ACK", segment::ACK),
        ("A SYN+ACK", segment::SYN_ACK),
        ("A reset", segment::RST),
        ("A FIN", segment::FIN),
        ("A SYN+FIN", segment::SYN | segment::FIN),
        ("A SYN+RST", segment::SYN | segment::RST),
        ("A segment without flags", 0),
    ];
    for (what, flags) in strays {
        let packet = from_client(flags, CLIENT, WEB);
        cases.push(
            Case::new(
                format!("{what} to a listener belongs to no flow and opens none"),
                world(),
            )
            .then(Step::dropped(packet.build(), Reason::NOT_A_SYN)),
        );
    }
    cases
}

fn replies() -> Vec<Case> {
    let datagram = query(DNS);
    let opening =
        Step::request(&datagram, &to_server(&datagram, binding(0), UDP_SERVER)).counts(DNS.opened());
    let dns_answer = answer(DNS, binding(0));
    let dnat_syn = syn(DNAT_WEB);
    let dnat_opening =
        Step::request(&dnat_syn, &to_server(&dnat_syn, CLIENT, SERVER)).counts(DNAT_WEB.opened());
    let dnat_reply = from_server(segment::SYN_ACK, DNAT_WEB, CLIENT);
    let dnat_query = query(DNAT_DNS);
    let dnat_query_opening =
        Step::request(&dnat_query, &to_server(&dnat_query, CLIENT, UDP_SERVER)).counts(DNAT_DNS.opened());
    let dnat_answer = answer(DNAT_DNS, CLIENT);
    let routed = from_client(segment::SYN, ROUTED_CLIENT, WEB);
    let routed_reply = from_server(segment::SYN_ACK, WEB, binding(0));

    let stray = |packet: Builder| Step::dropped(packet.build(), Reason::NO_FLOW).by(&SERVER_SIDE);
    let other_host = SocketAddrV4::new(*UDP_SERVER.ip(), SERVER.port());
    let other_port = SocketAddrV4::new(*SERVER.ip(), SERVER.port() + 1);
    let reply = from_server(segment::SYN_ACK, WEB, binding(0));
    let same_ports_udp = Builder::udp(SERVER, binding(0)).link(mac_of(*SERVER.ip()), SERVER_SIDE.mac);
    let last = SocketAddrV4::new(Ipv4Addr::new(100, 64, 0, 3), 65535);
    let beside = SocketAddrV4::new(Ipv4Addr::new(100, 64, 0, 4), 1024);
    vec![
        Case::new("A reply returns to its client from the VIP", world())
            .then(web_opening())
            .then(web_reply(segment::SYN_ACK, 0)),
        Case::new("A datagram's reply returns to its client from the VIP", world())
            .then(opening)
            .then(
                Step::reply(&dns_answer, &to_client(&dns_answer, DNS.vip(), CLIENT))
                    .counts(DNS.first_answer()),
            ),
        Case::new(
            "A DNAT listener's reply, addressed to the client, comes from the VIP",
            world(),
        )
        .then(dnat_opening.clone())
        .then(
            Step::reply(&dnat_reply, &to_client(&dnat_reply, DNAT_WEB.vip(), CLIENT))
                .counts(DNAT_WEB.first_answer()),
        ),
        Case::new(
            "A DNAT listener's reply to a datagram comes from the VIP",
            world(),
        )
        .then(dnat_query_opening)
        .then(
            Step::reply(&dnat_answer, &to_client(&dnat_answer, DNAT_DNS.vip(), CLIENT))
                .counts(DNAT_DNS.first_answer()),
        ),
        Case::new(
            "A reply to a client behind a router leaves for the router",
            world(),
        )
        .then(Step::request(&routed, &to_server(&routed, binding(0), SERVER)).counts(WEB.opened()))
        .then(
            Step::reply(&routed_reply, &to_client(&routed_reply, WEB.vip(), ROUTED_CLIENT))
                .counts(WEB.first_answer()),
        ),
        Case::new(
            "Each of two clients with the same source port gets its own replies",
            world(),
        )
        .then(web_opening())
        .then({
            let packet = from_client(segment::SYN, OTHER_CLIENT, WEB);
            Step::request(&packet, &to_server(&packet, binding(1), SERVER)).counts(WEB.opened())
        })
        .then({
            let packet = from_server(segment::SYN_ACK, WEB, binding(1));
            Step::reply(&packet, &to_client(&packet, WEB.vip(), OTHER_CLIENT)).counts(WEB.first_answer())
        })
        .then(web_reply(segment::SYN_ACK, 0)),
        Case::new("A packet to an SNAT address without a flow is dropped", world())
            .then(stray(reply.clone())),
        Case::new(
            "A reply from another host than the flow's backend is dropped",
            world(),
        )
        .then(web_opening())
        .then(stray(reply.clone().from(other_host))),
        Case::new(
            "A reply from another port than the flow's backend is dropped",
            world(),
        )
        .then(web_opening())
        .then(stray(reply.clone().from(other_port))),
        Case::new("A reply of another protocol than the flow's is dropped", world())
            .then(web_opening())
            .then(stray(same_ports_udp)),
        Case::new(
            "A packet to an SNAT address and a port below 1024 is dropped",
            world(),
        )
        .then(stray(reply.clone().to(SocketAddrV4::new(SNAT, 1023)))),
        Case::new("A client's packet to an SNAT address is dropped", world()).then(Step::dropped(
            from_client(segment::SYN, CLIENT, WEB)
                .to(SocketAddrV4::new(SNAT, 80))
                .build(),
            Reason::NO_FLOW,
        )),
        Case::new("A packet to a binding beyond the flow table is dropped", world())
            .then(stray(reply.clone().to(last))),
        Case::new("A packet to an address beside the pool is not ours", world())
            .then(Step::passed(reply.clone().to(beside).build(), Reason::NOT_OURS).by(&SERVER_SIDE)),
        Case::new(
            "A DNAT reply from another port of the backend is not ours",
            world(),
        )
        .then(dnat_opening)
        .then(Step::passed(dnat_reply.from(other_port).build(), Reason::NOT_OURS).by(&SERVER_SIDE)),
        Case::new(
            "A reply that comes in by the clients' side is transmitted",
            world(),
        )
        .then(web_opening())
        .then(
            web_reply(segment::SYN_ACK, 0)
                .by(&CLIENT_SIDE)
                .verdict(Verdict::TRANSMIT),
        ),
    ]
}

/// The agent took the flow's keys away.
fn unlink_all(world: &mut MemoryTables) {
    world.flow_index.clear();
    for flow in &mut world.flows {
        if flow.state == FlowState::LIVE {
            flow.state = FlowState::UNLINKED;
        }
    }
}

/// All groups' slots lead to the second backend.
fn use_second_backend(world: &mut MemoryTables) {
    world.slots.fill(BackendId(1));
}

fn fail_first_backend(world: &mut MemoryTables) {
    world.backends[0].state = BackendState::UNHEALTHY;
    use_second_backend(world);
}

fn lifecycles() -> Vec<Case> {
    let to_second = |packet: &Builder, source| {
        Step::request(packet, &to_server(packet, source, UDP_SERVER))
            .counts(Traffic::Opened(WEB.listener, BackendId(1)))
    };
    let dnat = |flags| from_client(flags, CLIENT, DNAT_WEB);
    let dnat_opening = {
        let packet = dnat(segment::SYN);
        Step::request(&packet, &to_server(&packet, CLIENT, SERVER)).counts(DNAT_WEB.opened())
    };
    let dnat_reset = {
        let packet = dnat(segment::RST);
        Step::request(&packet, &to_server(&packet, CLIENT, SERVER)).counts(DNAT_WEB.request())
    };
    let dnat_reopening = {
        let packet = dnat(segment::SYN);
        Step::request(&packet, &to_server(&packet, CLIENT, UDP_SERVER))
            .counts(Traffic::Opened(DNAT_WEB.listener, BackendId(1)))
    };
    let second_reply = {
        let packet = Builder::tcp(segment::SYN_ACK, UDP_SERVER, CLIENT)
            .link(mac_of(*UDP_SERVER.ip()), SERVER_SIDE.mac);
        Step::reply(&packet, &to_client(&packet, DNAT_WEB.vip(), CLIENT))
            .counts(Traffic::FirstAnswer(DNAT_WEB.listener, BackendId(1)))
    };
    let old_reply = from_server(segment::ACK, DNAT_WEB, CLIENT);
    vec![
        Case::new("A connection runs from its SYN to its last FIN", world())
            .all(web_connection())
            .then(web_reply(segment::ACK, 0)),
        Case::new(
            "A SYN after both FINs opens a new connection under the old binding",
            world(),
        )
        .all(web_connection())
        .all(web_handshake()),
        Case::new("A SYN after the backend's reset opens a new connection", world())
            .all(web_handshake())
            .then(web_reply(segment::RST, 0))
            .then(web_opening()),
        Case::new("A SYN after the client's reset opens a new connection", world())
            .all(web_handshake())
            .then(web_request(segment::RST, 0))
            .then(web_opening()),
        Case::new("Data after both FINs is still forwarded: stragglers", world())
            .all(web_connection())
            .then(web_request(segment::ACK, 1)),
        Case::new("After one FIN the other side goes on sending", world())
            .all(web_handshake())
            .then(web_request(segment::FIN, 0))
            .then(web_reply(segment::ACK, 1000)),
        Case::new(
            "A SYN after one recorded FIN opens a new connection: the other FIN may have passed unrecorded",
            world(),
        )
        .all(web_handshake())
        .then(web_reply(segment::FIN, 0))
        .all(web_handshake()),
        Case::new(
            "A SYN of an established connection's ports stays with its flow",
            world(),
        )
        .all(web_handshake())
        .then(web_request(segment::SYN, 0)),
        Case::new("A reopened connection may get another backend", world())
            .all(web_connection())
            .change(use_second_backend)
            .then(to_second(&syn(WEB), binding(0)))
            .then(
                Step::dropped(
                    from_server(segment::ACK, WEB, binding(0)).build(),
                    Reason::NO_FLOW,
                )
                .by(&SERVER_SIDE),
            ),
        Case::new(
            "A reopened DNAT connection leaves nothing of the old one",
            world(),
        )
        .then(dnat_opening.clone())
        .then(dnat_reset.clone())
        .change(use_second_backend)
        .then(dnat_reopening)
        .then(second_reply)
        .then(Step::passed(old_reply.build(), Reason::NOT_OURS).by(&SERVER_SIDE)),
        Case::new("A reopened DNAT connection to the same backend goes on", world())
            .then(dnat_opening.clone())
            .then(dnat_reset)
            .then(dnat_opening)
            .then({
                let packet = from_server(segment::SYN_ACK, DNAT_WEB, CLIENT);
                Step::reply(&packet, &to_client(&packet, DNAT_WEB.vip(), CLIENT))
                    .counts(DNAT_WEB.first_answer())
            }),
        Case::new("A connection is not reopened without a healthy backend", world())
            .all(web_connection())
            .change(|world| {
                world
                    .backends
                    .iter_mut()
                    .for_each(|backend| backend.state = BackendState::UNHEALTHY);
            })
            .then(Step::reset(&syn(WEB), Reason::NO_BACKEND).counts(WEB.refused())),
        Case::new("A reply after its flow ended is dropped", world())
            .all(web_handshake())
            .change(unlink_all)
            .then(
                Step::dropped(
                    from_server(segment::ACK, WEB, binding(0)).build(),
                    Reason::NO_FLOW,
                )
                .by(&SERVER_SIDE),
            ),
        Case::new("Data after its flow ended is dropped", world())
            .all(web_handshake())
            .change(unlink_all)
            .then(Step::dropped(
                from_client(segment::ACK, CLIENT, WEB).build(),
                Reason::NOT_A_SYN,
            )),
        Case::new(
            "A SYN after its flow ended gets another binding while stragglers may hold the old",
            world(),
        )
        .then(web_opening())
        .change(unlink_all)
        .then({
            let packet = syn(WEB);
            Step::request(&packet, &to_server(&packet, binding(1), SERVER)).counts(WEB.opened())
        }),
        Case::new(
            "A SYN while the agent ends its flow is dropped and takes nothing",
            world(),
        )
        .then(web_opening())
        .change(|world| world.flows[0].state = FlowState::UNLINKED)
        .then(Step::dropped(syn(WEB).build(), Reason::FLOW_CONFLICT).counts(WEB.not_bound())),
        Case::new("A reply of a freed binding's last flow is dropped", world())
            .then(web_opening())
            .change(|world| {
                unlink_all(world);
                world.flows[0].state = FlowState::FREE;
            })
            .then(
                Step::dropped(
                    from_server(segment::ACK, WEB, binding(0)).build(),
                    Reason::NO_FLOW,
                )
                .by(&SERVER_SIDE),
            ),
    ]
}

fn listeners() -> Vec<Case> {
    let mut any_port = world();
    any_port.add_range_listener(VIP, (0, 0), TCP, NatMode::FULL, &[BackendId(1)]);
    let any_listener = ListenerId(9);
    let high_port = syn(WEB).to(SocketAddrV4::new(VIP, 65535));
    let udp_to_web = query(WEB);
    let unknown_port = syn(WEB).to(SocketAddrV4::new(VIP, 4444));
    let elsewhere = syn(WEB).to(SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 205), 80));
    let gateway = syn(WEB).to(SocketAddrV4::new(CLIENT_SIDE.address, 80));

    let mut shared = world();
    let second = shared.add_listener(VIP, 8443, TCP, NatMode::FULL, &[WEB.backend]);
    let shared_syn = syn(WEB).to(SocketAddrV4::new(VIP, 8443));
    let mut shared_dnat = world();
    let second_dnat = shared_dnat.add_listener(VIP, 8443, TCP, NatMode::DNAT, &[WEB.backend]);
    let dnat_syn = syn(DNAT_WEB);
    let dnat_opening =
        Step::request(&dnat_syn, &to_server(&dnat_syn, CLIENT, SERVER)).counts(DNAT_WEB.opened());
    let other_port = shared_syn.clone().from(SocketAddrV4::new(*CLIENT.ip(), 50001));
    let web_after = syn(WEB);
    vec![
        Case::new(
            "A listener for any port takes the ports that have none",
            any_port.clone(),
        )
        .then(
            Step::request(&high_port, &to_server(&high_port, binding(0), UDP_SERVER))
                .counts(Traffic::Opened(any_listener, BackendId(1))),
        ),
        Case::new("A listener's own port beats any port", any_port.clone()).then(web_opening()),
        Case::new(
            "A reply of a listener for any port comes from the port that was asked",
            any_port,
        )
        .then(
            Step::request(&high_port, &to_server(&high_port, binding(0), UDP_SERVER))
                .counts(Traffic::Opened(any_listener, BackendId(1))),
        )
        .then({
            let packet = Builder::tcp(segment::SYN_ACK, UDP_SERVER, binding(0))
                .link(mac_of(*UDP_SERVER.ip()), SERVER_SIDE.mac);
            let out = to_client(&packet, SocketAddrV4::new(VIP, 65535), CLIENT);
            Step::reply(&packet, &out).counts(Traffic::FirstAnswer(any_listener, BackendId(1)))
        }),
        Case::new("A port of the VIP without a listener passes", world())
            .then(Step::passed(unknown_port.build(), Reason::NO_LISTENER)),
        Case::new("A listener's port in another protocol passes", world())
            .then(Step::passed(udp_to_web.build(), Reason::NO_LISTENER)),
        Case::new("A packet to another host passes", world())
            .then(Step::passed(elsewhere.build(), Reason::NOT_OURS)),
        Case::new("A packet to the gateway itself passes", world())
            .then(Step::passed(gateway.build(), Reason::NOT_OURS)),
        Case::new("Two full-NAT listeners share a backend and a client port", shared)
            .then(web_opening())
            .then(
                Step::request(&shared_syn, &to_server(&shared_syn, binding(1), SERVER))
                    .counts(Traffic::Opened(second, WEB.backend)),
            ),
        Case::new(
            "Two DNAT listeners cannot share a backend and a client port",
            shared_dnat.clone(),
        )
        .then(dnat_opening.clone())
        .then(
            Step::dropped(shared_syn.build(), Reason::FLOW_CONFLICT)
                .counts(Traffic::NotBound(second_dnat, WEB.backend)),
        ),
        Case::new(
            "Two DNAT listeners share a backend as long as client ports differ",
            shared_dnat.clone(),
        )
        .then(dnat_opening.clone())
        .then(
            Step::request(
                &other_port,
                &to_server(&other_port, SocketAddrV4::new(*CLIENT.ip(), 50001), SERVER),
            )
            .counts(Traffic::Opened(second_dnat, WEB.backend)),
        ),
        Case::new(
            "A refused DNAT flow gives its number back to the end of the queue",
            {
                shared_dnat.free_flows.truncate(2);
                shared_dnat
            },
        )
        .then(dnat_opening.clone())
        .then(
            Step::dropped(shared_syn.build(), Reason::FLOW_CONFLICT)
                .counts(Traffic::NotBound(second_dnat, WEB.backend)),
        )
        .then(Step::request(&web_after, &to_server(&web_after, binding(1), SERVER)).counts(WEB.opened())),
        Case::new(
            "A full-NAT and a DNAT listener share a backend and a client port",
            world(),
        )
        .then(dnat_opening)
        .then(Step::request(&web_after, &to_server(&web_after, binding(1), SERVER)).counts(WEB.opened())),
    ]
}

fn backends() -> Vec<Case> {
    use BackendState as State;
    let packet = syn(WEB);
    let to_second = Step::request(&packet, &to_server(&packet, binding(0), UDP_SERVER))
        .counts(Traffic::Opened(WEB.listener, BackendId(1)));
    let refused = |reason| Step::reset(&syn(WEB), reason).counts(WEB.refused());
    let faulty = Step::dropped(syn(WEB).build(), Reason::INTERNAL).counts(WEB.refused());
    let mut empty = world();
    empty.groups[0].slot_count = 0;
    let mut dangling_slots = world();
    dangling_slots.groups[0].first_slot = SIZES.slots;
    let mut dangling_group = world();
    let key = ListenerKey::new(VIP.into(), Be16::new(WEB.port), TCP);
    if let Some(listener) = dangling_group.listeners.get_mut(&key) {
        listener.group = GroupId(SIZES.groups);
    }
    let second_client = from_client(segment::SYN, OTHER_CLIENT, WEB);
    let mut cases = vec![
        Case::new(
            "A slot of an unhealthy backend is skipped",
            world_with_slots([State::UNHEALTHY, State::HEALTHY], &[0, 0, 0, 1]),
        )
        .then(to_second.clone()),
        Case::new(
            "A slot of a draining backend is skipped",
            world_with_slots([State::DRAINING, State::HEALTHY], &[0, 0, 1, 0]),
        )
        .then(to_second.clone()),
        Case::new(
            "A slot of an absent backend is skipped",
            world_with_slots([State::HEALTHY; 2], &[15, 15, 1]),
        )
        .then(to_second),
        Case::new(
            "A slot beyond the backend table is skipped",
            world_with_slots([State::HEALTHY; 2], &[400, 0]),
        )
        .then(web_opening()),
        Case::new(
            "No flow opens while all backends are unhealthy",
            world_with_slots([State::UNHEALTHY; 2], &[0, 1, 0, 1]),
        )
        .then(refused(Reason::NO_BACKEND)),
        Case::new("No flow opens in an empty group", empty).then(refused(Reason::NO_BACKEND)),
        Case::new(
            "A healthy backend more than 16 slots away is not found",
            world_with_slots([State::UNHEALTHY, State::UNHEALTHY], &[0; 64]),
        )
        .then(refused(Reason::NO_BACKEND)),
        Case::new(
            "A group whose slots do not exist is an internal fault",
            dangling_slots,
        )
        .then(faulty.clone()),
        Case::new(
            "A listener whose group does not exist is an internal fault",
            dangling_group,
        )
        .then(faulty),
        Case::new(
            "A draining backend keeps its connections and gets no new ones",
            world_with_slots([State::HEALTHY; 2], &[0]),
        )
        .all(web_handshake())
        .change(|world| {
            world.backends[0].state = State::DRAINING;
            use_second_backend(world);
        })
        .then(web_request(segment::ACK, 10))
        .then(web_reply(segment::ACK, 10))
        .then(
            Step::request(&second_client, &to_server(&second_client, binding(1), UDP_SERVER))
                .counts(Traffic::Opened(WEB.listener, BackendId(1))),
        ),
        Case::new("An unhealthy backend's connections go on", world())
            .all(web_handshake())
            .change(|world| world.backends[0].state = State::UNHEALTHY)
            .then(web_request(segment::ACK, 10)),
        Case::new(
            "A SYN is repeated to the backend that has not answered yet",
            world_with_slots([State::HEALTHY; 2], &[0]),
        )
        .then(web_opening())
        .then(web_request(segment::SYN, 0)),
        Case::new(
            "A SYN that is repeated after its backend has failed goes to another one",
            world_with_slots([State::HEALTHY; 2], &[0]),
        )
        .then(web_opening())
        .change(fail_first_backend)
        .then(
            Step::request(&syn(WEB), &to_server(&syn(WEB), binding(0), UDP_SERVER))
                .counts(Traffic::Opened(WEB.listener, BackendId(1))),
        )
        .then(
            Step::dropped(
                from_server(segment::SYN_ACK, WEB, binding(0)).build(),
                Reason::NO_FLOW,
            )
            .by(&SERVER_SIDE),
        ),
        Case::new(
            "A SYN that is repeated after its backend has failed is refused if there is no other",
            world(),
        )
        .then(web_opening())
        .change(|world| world.backends[0].state = State::UNHEALTHY)
        .then(refused(Reason::NO_BACKEND)),
        Case::new(
            "A SYN that is repeated after its backend has answered and then failed stays there",
            world_with_slots([State::HEALTHY; 2], &[0]),
        )
        .then(web_opening())
        .then(web_reply(segment::SYN_ACK, 0))
        .change(fail_first_backend)
        .then(web_request(segment::SYN, 0)),
        Case::new("A backend's reset in answer to a SYN is a rejected flow", world())
            .then(web_opening())
            .then(web_reply(segment::RST, 0).counts(WEB.first_answer())),
        Case::new(
            "What acknowledges a SYN without being one is no answer yet, and the reset that follows rejects the flow",
            world(),
        )
        .then(web_opening())
        .then(web_reply(segment::ACK, 0))
        .then(web_reply(segment::RST, 0).counts(WEB.first_answer())),
        Case::new("A backend's reset of a connection is no rejected flow", world())
            .all(web_handshake())
            .then(web_reply(segment::RST, 0)),
    ];
    // Pinned: gateways of a fleet must pick the same slot, also when one of them is older.
    for (client_port, slot) in PINNED_SLOTS {
        let client = SocketAddrV4::new(*CLIENT.ip(), client_port);
        let packet = syn(WEB).from(client);
        let slots = [0, 1, 2, 3].map(|number| u32::from(number == slot));
        cases.push(
            Case::new(
                format!("Client port {client_port} starts from slot {slot} of 4"),
                world_with_slots([State::HEALTHY; 2], &slots),
            )
            .then(
                Step::request(&packet, &to_server(&packet, binding(0), UDP_SERVER))
                    .counts(Traffic::Opened(WEB.listener, BackendId(1))),
            )
            .v4_only(),
        );
    }
    cases
}

/// Computed from the description in `datapath::hash`, not by it.
const PINNED_SLOTS: [(u16, u32); 4] = [(50003, 0), (50001, 1), (50000, 2), (50002, 3)];

/// How a client learns that it was refused.
fn refusals() -> Vec<Case> {
    let mut full = world();
    full.free_flows.clear();
    let mut exhausted = full.clone();
    exhausted.settings.flags |= flag::POOL_IS_SMALLER;
    let options = vec![2, 4, 5, 0xb4, 4, 2, 1, 3, 3, 7, 0, 0];
    let full_reason = Reason::FLOW_TABLE_FULL;
    let mut cases = vec![
        Case::new("A used-up pool is told from a full table", exhausted)
            .then(Step::reset(&syn(WEB), Reason::POOL_EXHAUSTED).counts(WEB.not_bound())),
        Case::new("The reset keeps the options of the SYN", full.clone())
            .then(Step::reset(&syn(WEB).tcp_options(options), full_reason).counts(WEB.not_bound())),
        Case::new("The reset of a SYN with data acknowledges the SYN", full.clone())
            .then(Step::reset(&syn(WEB).payload(7), full_reason).counts(WEB.not_bound())),
        Case::new("The reset goes back through the router it came by", full.clone()).then(
            Step::reset(&from_client(segment::SYN, ROUTED_CLIENT, WEB), full_reason).counts(WEB.not_bound()),
        ),
        Case::new("The reset starts with a fresh time to live", full.clone())
            .then(Step::reset(&syn(WEB).ttl(2), full_reason).counts(WEB.not_bound())),
        Case::new("A SYN with IP options is reset", full.clone())
            .then(Step::reset(&syn(WEB).options(vec![1; 8]), full_reason).counts(WEB.not_bound())),
        Case::new(
            "A refused datagram with IP options is quoted with them",
            full.clone(),
        )
        .then(Step::unreachable(&query(DNS).options(vec![1; 8]), full_reason).counts(DNS.not_bound())),
        Case::new("A SYN out of a tunnel is reset", full.clone()).then({
            let packet = Builder::tcp(segment::SYN, REMOTE.server, WEB.vip())
                .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
            Step::reset(&packet, full_reason)
                .in_tunnel()
                .counts(WEB.not_bound())
        }),
        Case::new("A refused datagram out of a tunnel is answered", full.clone()).then({
            let packet =
                Builder::udp(REMOTE.server, DNS.vip()).link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
            Step::unreachable(&packet, full_reason)
                .in_tunnel()
                .counts(DNS.not_bound())
        }),
    ];
    for len in [0, 1, 18, 28, 100, 1472] {
        let packet = query(DNS).payload(len);
        cases.push(
            Case::new(
                format!("A refused datagram of {len} bytes is answered with \"port unreachable\""),
                full.clone(),
            )
            .then(Step::unreachable(&packet, full_reason).counts(DNS.not_bound())),
        );
    }
    cases.push(
        Case::new("The padding of a short datagram is not quoted", full.clone())
            .then(Step::unreachable(&query(DNS).payload(0).padding(18), full_reason).counts(DNS.not_bound())),
    );
    cases.push(
        Case::new(
            "A refused datagram without a checksum is quoted without one",
            full,
        )
        .then(
            Step::unreachable(&query(DNS).checksum(Checksum::Fixed(0)), full_reason).counts(DNS.not_bound()),
        ),
    );
    cases
}

/// Who may open flows, and how many.
fn limits() -> Vec<Case> {
    let mut ranged = world();
    let range = ranged.add_range_listener(VIP, (8192, 5), TCP, NatMode::FULL, &[BackendId(0)]);
    let any = ranged.add_range_listener(VIP, (0, 0), TCP, NatMode::FULL, &[BackendId(1)]);
    let at_port = |port| syn(WEB).to(SocketAddrV4::new(VIP, port));
    let to_range = |port| {
        let packet = at_port(port);
        Step::request(&packet, &to_server(&packet, binding(0), SERVER))
            .counts(Traffic::Opened(range, BackendId(0)))
    };
    let to_any = |port| {
        let packet = at_port(port);
        Step::request(&packet, &to_server(&packet, binding(0), UDP_SERVER))
            .counts(Traffic::Opened(any, BackendId(1)))
    };
    let mut same_port = ranged.clone();
    same_port.backends[0].port = Be16::new(0);
    let kept = at_port(8200);
    let mut sourced = world();
    sourced.admit_source(WEB.listener, Ipv4Addr::new(172, 18, 0, 8), 29);
    let stranger = from_client(segment::SYN, ROUTED_CLIENT, WEB);
    let mut nested = sourced.clone();
    nested.admit_source(WEB.listener, Ipv4Addr::new(192, 0, 2, 7), 32);
    let mut everybody = world();
    everybody.admit_source(WEB.listener, Ipv4Addr::UNSPECIFIED, 0);
    let mut one_flow = world();
    one_flow
        .listener_mut(WEB.listener)
        .for_each(|listener| listener.max_flows = 1);
    let second = from_client(segment::SYN, OTHER_CLIENT, WEB);
    let mut full_backend = world_with_slots([BackendState::HEALTHY; 2], &[0]);
    full_backend.backends[0].max_flows = 1;
    let mut spilling = world_with_slots([BackendState::HEALTHY; 2], &[0, 0, 0, 1]);
    spilling.backends[0].max_flows = 1;
    spilling.backends_live[0] = Live(1);
    let spilled = syn(WEB);
    vec![
        Case::new("A listener takes the first port of its range", ranged.clone()).then(to_range(8192)),
        Case::new("A listener takes the last port of its range", ranged.clone()).then(to_range(10239)),
        Case::new("A port below a range is the wider listener's", ranged.clone()).then(to_any(8191)),
        Case::new("A port above a range is the wider listener's", ranged.clone()).then(to_any(10240)),
        Case::new("A range of TCP ports takes no datagrams", ranged).then(Step::passed(
            query(WEB).to(SocketAddrV4::new(VIP, 8200)).build(),
            Reason::NO_LISTENER,
        )),
        Case::new(
            "A backend without a port gets the port that was asked for",
            same_port,
        )
        .then(
            Step::request(
                &kept,
                &to_server(&kept, binding(0), SocketAddrV4::new(*SERVER.ip(), 8200))
                    .link(SERVER_SIDE.mac, mac_of(*SERVER.ip())),
            )
            .counts(Traffic::Opened(range, BackendId(0))),
        ),
        Case::new("A client that the listener admits opens a flow", sourced.clone()).then(web_opening()),
        Case::new(
            "A client that the listener does not admit is dropped in silence",
            sourced.clone(),
        )
        .then(Step::dropped(stranger.build(), Reason::SOURCE_NOT_ALLOWED)),
        Case::new("One address may be admitted beside a prefix", nested)
            .then(Step::request(&stranger, &to_server(&stranger, binding(0), SERVER)).counts(WEB.opened())),
        Case::new("Clients of another listener are not asked for", sourced).then({
            let packet = from_client(segment::SYN, ROUTED_CLIENT, DNAT_WEB);
            Step::request(&packet, &to_server(&packet, ROUTED_CLIENT, SERVER)).counts(DNAT_WEB.opened())
        }),
        Case::new("A prefix of length zero admits everybody", everybody)
            .then(Step::request(&stranger, &to_server(&stranger, binding(0), SERVER)).counts(WEB.opened())),
        Case::new(
            "The last flow below a listener's limit is opened, the next refused",
            one_flow.clone(),
        )
        .then(web_opening())
        .then(Step::reset(&second, Reason::LISTENER_LIMIT).counts(WEB.refused()))
        .then(web_reply(segment::SYN_ACK, 0)),
        Case::new(
            "A flow that the agent has counted out makes room for another",
            one_flow.clone(),
        )
        .then(web_opening())
        .change(|world| {
            world.flows[0].counted = 0;
            world.listeners_live[0] = Live(0);
            world.backends_live[0] = Live(0);
        })
        .then(Step::request(&second, &to_server(&second, binding(1), SERVER)).counts(WEB.opened())),
        Case::new(
            "A connection reopened in place of its ended self needs no room of its own",
            one_flow,
        )
        .all(web_connection())
        .then(web_opening()),
        Case::new(
            "A backend at its limit refuses when no other has room",
            full_backend,
        )
        .then(web_opening())
        .then(Step::reset(&second, Reason::BACKEND_LIMIT).counts(WEB.refused())),
        Case::new(
            "A flow goes past a backend at its limit to one with room",
            spilling,
        )
        .then(
            Step::request(&spilled, &to_server(&spilled, binding(0), UDP_SERVER))
                .counts(Traffic::Opened(WEB.listener, BackendId(1))),
        ),
    ]
}

fn bindings() -> Vec<Case> {
    let refused = |reason| Step::reset(&syn(WEB), reason).counts(WEB.not_bound());
    let faulty = Step::dropped(syn(WEB).build(), Reason::INTERNAL).counts(WEB.not_bound());
    let packet = syn(WEB);
    let mut full = world();
    full.free_flows.clear();
    let mut exhausted = world();
    exhausted.free_flows = [FlowId(SNAT_COUNT * PORTS_PER_ADDRESS), FlowId(3)].into();
    let mut no_pool = world();
    no_pool.settings.pool.v4.runs[0].count = 0;
    let mut beyond = world();
    beyond.free_flows = [FlowId(SIZES.flows), FlowId(5)].into();
    let mut order = world();
    order.free_flows = [FlowId(9), FlowId(2)].into();
    let dnat_syn = syn(DNAT_WEB);
    let dnat_refused = Step::reset(&dnat_syn, Reason::FLOW_TABLE_FULL).counts(DNAT_WEB.not_bound());
    vec![
        Case::new("No flow opens when the flow table is full", full).then(refused(Reason::FLOW_TABLE_FULL)),
        Case::new("A flow beyond the pool is refused and given back", exhausted)
            .then(refused(Reason::POOL_EXHAUSTED))
            .then(Step::request(&packet, &to_server(&packet, binding(3), SERVER)).counts(WEB.opened())),
        Case::new("Full NAT needs a pool", no_pool.clone()).then(refused(Reason::POOL_EXHAUSTED)),
        Case::new("DNAT needs no pool", no_pool)
            .then(Step::request(&dnat_syn, &to_server(&dnat_syn, CLIENT, SERVER)).counts(DNAT_WEB.opened())),
        Case::new("A free number beyond the flow table is an internal fault", beyond).then(faulty),
        Case::new("Bindings are used in the order in which they became free", order)
            .then(Step::request(&packet, &to_server(&packet, binding(9), SERVER)).counts(WEB.opened())),
        Case::new(
            "No flow opens when the flow index is full",
            world_with_free_keys(0),
        )
        .then(refused(Reason::FLOW_TABLE_FULL)),
        Case::new(
            "No DNAT flow opens when the flow index is full",
            world_with_free_keys(0),
        )
        .then(dnat_refused.clone()),
        Case::new(
            "A DNAT flow enters both keys or neither: one is refused, and room for one remains",
            world_with_free_keys(1),
        )
        .then(dnat_refused)
        .then(Step::request(&packet, &to_server(&packet, binding(1), SERVER)).counts(WEB.opened())),
    ]
}

/// [`world`] with room for so many more keys in the flow index.
fn world_with_free_keys(free: u32) -> MemoryTables {
    let mut world = world();
    for number in free..SIZES.flow_keys {
        let key = FlowKey {
            source: Ipv4Addr::new(192, 0, 2, 200).into(),
            destination: VIP.into(),
            source_port: Be16::new(1000 + number as u16),
            destination_port: Be16::new(1),
            protocol: u32::from(TCP),
        };
        let reference = FlowReference {
            id: FlowId(15),
            direction: Direction::REQUEST,
        };
        world.flow_index.insert(key, reference);
    }
    world
}

/// Link addresses that no route leads to: whoever sends there used a remembered next hop.
const REMEMBERED: [Mac; 2] = [[2, 0, 0, 0, 99, 1], [2, 0, 0, 0, 99, 2]];

/// Lets the first flow's requests, which have left already, remember these link addresses.
fn remember(world: &mut MemoryTables) {
    let [source, destination] = REMEMBERED.map(MacAddress::new);
    world.flows[0].request_hop.link = LinkPair::new(destination, source);
}

fn next_hops() -> Vec<Case> {
    let ttl = |value| syn(WEB).ttl(value);
    let lasting = ttl(2);
    let remote = syn(REMOTE);
    let unresolved = syn(UNRESOLVED);
    let same_side = syn(SAME_SIDE);
    let same_side_out = same_side
        .clone()
        .from(binding(0))
        .to(SAME_SIDE.server)
        .ttl(63)
        .link(CLIENT_SIDE.mac, mac_of(*SAME_SIDE.server.ip()));
    let transmitted = Step::request(&same_side, &same_side_out)
        .verdict(Verdict::TRANSMIT)
        .counts(SAME_SIDE.opened());
    let mut by_redirect = world();
    by_redirect.settings.flags |= flag::TRANSMIT_BY_REDIRECT;
    let closed = syn(WEB).link(mac_of(Ipv4Addr::new(172, 19, 0, 10)), CLOSED_SIDE.mac);
    let unresolved_client = from_client(segment::SYN, UNRESOLVED_CLIENT, WEB);
    let unresolved_reply = from_server(segment::SYN_ACK, WEB, binding(0));
    let unroutable_client = from_client(
        segment::SYN,
        SocketAddrV4::new(Ipv4Addr::new(8, 8, 8, 8), 50000),
        WEB,
    );
    let data = from_client(segment::ACK, CLIENT, WEB);
    let remembered = to_server(&data, binding(0), SERVER).link(REMEMBERED[0], REMEMBERED[1]);
    let mut no_send = world();
    if let Some(interface) = no_send.interfaces.get_mut(&InterfaceKey {
        ifindex: SERVER_SIDE.ifindex,
    }) {
        interface.flags = 0;
    }
    let mut unknown_interface = world();
    unknown_interface.interfaces.remove(&InterfaceKey {
        ifindex: SERVER_SIDE.ifindex,
    });
    let stack_out = rewritten(&syn(WEB), binding(0), SERVER);
    vec![
        Case::new("A packet whose TTL is 2 leaves with 1", world()).then(
            Step::request(&lasting, &to_server(&lasting, binding(0), SERVER).ttl(1)).counts(WEB.opened()),
        ),
        Case::new(
            "A request that goes back where it came from is transmitted",
            world(),
        )
        .then(transmitted.clone()),
        Case::new(
            "A transmitted request is the same on a veth, which sends it by redirect",
            by_redirect,
        )
        .then(transmitted),
        Case::new(
            "A request into a tunnel goes to the stack, which counts the TTL down",
            world(),
        )
        .then(
            Step::to_stack(&remote, &rewritten(&remote, binding(0), REMOTE.server)).counts(REMOTE.opened()),
        ),
        Case::new(
            "A second request into a tunnel goes to the stack as well",
            world(),
        )
        .then(Step::to_stack(&remote, &rewritten(&remote, binding(0), REMOTE.server)).counts(REMOTE.opened()))
        .then(
            Step::to_stack(&remote, &rewritten(&remote, binding(0), REMOTE.server)).counts(REMOTE.request()),
        ),
        Case::new(
            "A request to a neighbour without link address goes to the stack",
            world(),
        )
        .then(
            Step::to_stack(
                &unresolved,
                &rewritten(&unresolved, binding(0), UNRESOLVED.server),
            )
            .counts(UNRESOLVED.opened()),
        ),
        Case::new(
            "A reply to a neighbour without link address goes to the stack",
            world(),
        )
        .then(
            Step::request(
                &unresolved_client,
                &to_server(&unresolved_client, binding(0), SERVER),
            )
            .counts(WEB.opened()),
        )
        .then(
            Step::passed(unresolved_reply.build(), Reason::REPLY_TO_STACK)
                .by(&SERVER_SIDE)
                .out(rewritten(&unresolved_reply, WEB.vip(), UNRESOLVED_CLIENT).build())
                .counts(WEB.first_answer()),
        ),
        Case::new(
            "A request out of an interface that XDP cannot send through goes to the stack",
            no_send,
        )
        .then(Step::to_stack(&syn(WEB), &stack_out).counts(WEB.opened())),
        Case::new(
            "A request out of an interface that is not ours goes to the stack",
            unknown_interface,
        )
        .then(Step::to_stack(&syn(WEB), &stack_out).counts(WEB.opened())),
        Case::new("A request without a route is dropped", world())
            .then(Step::dropped(syn(UNROUTED).build(), Reason::NO_ROUTE).counts(UNROUTED.opened_only())),
        Case::new("A request that a route forbids is dropped", world())
            .then(Step::dropped(syn(FORBIDDEN).build(), Reason::NO_ROUTE).counts(FORBIDDEN.opened_only())),
        Case::new("A reply to a client without a route is dropped", world())
            .then(
                Step::request(
                    &unroutable_client,
                    &to_server(&unroutable_client, binding(0), SERVER),
                )
                .counts(WEB.opened()),
            )
            .then(
                Step::dropped(
                    from_server(segment::SYN_ACK, WEB, binding(0)).build(),
                    Reason::NO_ROUTE,
                )
                .by(&SERVER_SIDE),
            ),
        Case::new(
            "A request from an interface that does not forward is dropped",
            world(),
        )
        .then(
            Step::dropped(closed.build(), Reason::FORWARDING_DISABLED)
                .by(&CLOSED_SIDE)
                .counts(WEB.opened_only()),
        ),
        Case::new("A flow remembers its next hop", world())
            .then(web_opening())
            .change(remember)
            .then(Step::request(&data, &remembered).counts(WEB.request())),
        Case::new(
            "A next hop of another route generation is looked up again",
            world(),
        )
        .then(web_opening())
        .change(remember)
        .change(|world| world.settings.route_generation += 1)
        .then(web_request(segment::ACK, 0)),
        Case::new("A next hop of another hook is looked up again", world())
            .then(web_opening())
            .change(remember)
            .change(|world| world.flows[0].request_hop.hook = Hook::Tcx as u8)
            .then(web_request(segment::ACK, 0)),
        Case::new("A connection may move to another ingress interface", world())
            .all(web_handshake())
            .then(web_request(segment::ACK, 5).by(&TUNNEL_SIDE)),
    ]
}

/// New flows that share the way to their backend.
fn shared_ways() -> Vec<Case> {
    /// Nobody would find this way; so who takes it has not asked.
    fn divert(world: &mut MemoryTables) -> &mut BackendHop {
        let known = &mut world.backend_hops[WEB.backend.0 as usize];
        let [source, destination] = REMEMBERED.map(MacAddress::new);
        known.hop.link = LinkPair::new(destination, source);
        known
    }
    let mut sharing = world();
    sharing.settings.flags |= flag::ONE_WAY;
    let next = from_client(segment::SYN, OTHER_CLIENT, WEB);
    let asks = to_server(&next, binding(1), SERVER);
    let shares = asks.clone().link(REMEMBERED[0], REMEMBERED[1]);
    let mut over_v6 = sharing.clone();
    let generation = over_v6.settings.route_generation;
    let known = divert(&mut over_v6);
    known.address = in_v6(*SERVER.ip()).into();
    known.ingress_ifindex = CLIENT_SIDE.ifindex;
    known.hop.ifindex = SERVER_SIDE.ifindex;
    known.hop.generation = generation;
    known.hop.kind = HopKind::DIRECT;
    known.hop.hook = Hook::Xdp as u8;
    let first = syn(WEB);
    let case = |sentence: &str, change: fn(&mut MemoryTables), out: &Builder| {
        Case::new(sentence, sharing.clone())
            .then(web_opening())
            .change(change)
            .then(Step::request(&next, out).counts(WEB.opened()))
    };
    vec![
        case(
            "A new flow takes the way that the last one to its backend has found",
            |world| {
                divert(world);
            },
            &shares,
        ),
        case(
            "A backend's way of another route generation is not taken",
            |world| {
                divert(world);
                world.settings.route_generation += 1;
            },
            &asks,
        ),
        case(
            "A way to another backend that had the number is not taken",
            |world| divert(world).address = UDP_SERVER.ip().to_owned().into(),
            &asks,
        ),
        case(
            "A backend's way that another hook has found is not taken",
            |world| divert(world).hop.hook = Hook::Tcx as u8,
            &asks,
        ),
        case(
            "A backend's way that a packet of another interface has found is not taken",
            |world| divert(world).ingress_ifindex = SERVER_SIDE.ifindex,
            &asks,
        ),
        Case::new(
            "Where the way to a backend is known, it is still asked whether the ingress interface forwards",
            sharing.clone(),
        )
        .then(web_opening())
        .then(
            Step::dropped(next.build(), Reason::FORWARDING_DISABLED)
                .by(&CLOSED_SIDE)
                .counts(WEB.opened_only()),
        ),
        case(
            "Where ways depend on more than the backend, each new flow asks for its own",
            |world| {
                divert(world);
                world.settings.flags &= !flag::ONE_WAY;
            },
            &asks,
        ),
        Case::new(
            "Over IPv6, whose routes may depend on the source, each new flow asks for its own",
            over_v6,
        )
        .then(
            Step::request(
                &first.clone().in_v6(),
                &to_server(&first, binding(0), SERVER).in_v6(),
            )
            .counts(WEB.opened()),
        )
        .in_ipv6_world(),
    ]
}

fn tunnels() -> Vec<Case> {
    let packet = syn(REMOTE);
    let opening =
        Step::to_stack(&packet, &rewritten(&packet, binding(0), REMOTE.server)).counts(REMOTE.opened());
    let tunnel_link = |packet: Builder| packet.link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
    let reply = tunnel_link(Builder::tcp(segment::SYN_ACK, REMOTE.server, binding(0)).payload(7));
    // The kernel writes the link addresses when it sends.
    let out = rewritten(&reply, REMOTE.vip(), CLIENT).ttl(63);
    let zero = reply.clone().payload_for_checksum(0);
    let becomes_zero = out.clone().payload_for_checksum(0);
    let before_zero = rewritten(&becomes_zero, REMOTE.server, binding(0)).ttl(64);
    let sent =
        |packet: &Builder, out: &Builder| Step::reply(packet, out).in_tunnel().counts(REMOTE.first_answer());

    let unresolved_client = from_client(segment::SYN, UNRESOLVED_CLIENT, REMOTE);
    let inner_client = SocketAddrV4::new(*REMOTE.server.ip(), 41000);
    let inner_syn = tunnel_link(Builder::tcp(segment::SYN, inner_client, WEB.vip()));
    let inner_query = tunnel_link(Builder::udp(inner_client, DNS.vip()).payload(9));
    let request = |packet: &Builder, out: &Builder| {
        Step::new(
            &TUNNEL_SIDE,
            packet.build(),
            Verdict::redirect(SERVER_SIDE.ifindex),
            Reason::REQUEST_FORWARDED,
        )
        .in_tunnel()
        .out(out.build())
    };
    let to_second = |packet: &Builder| rewritten(packet, binding(0), UDP_SERVER).ttl(63);
    let no_checksum = inner_query.clone().checksum(Checksum::Fixed(0));
    let udp_zero = to_second(&inner_query).payload_for_checksum(0);
    let udp_before_zero = rewritten(&udp_zero, inner_client, DNS.vip()).ttl(64);
    let stray = tunnel_link(from_server(segment::ACK, REMOTE, binding(0)));
    let elsewhere = reply
        .clone()
        .to(SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 205), 80));
    let question = Arp {
        operation: 1,
        sender_mac: mac_of(*REMOTE.server.ip()),
        sender: *REMOTE.server.ip(),
        target_mac: [0; 6],
        target: SNAT,
    };
    let echo = Builder::icmp(8, 0, *REMOTE.server.ip(), VIP).payload(10);
    let echo = tunnel_link(echo);
    vec![
        Case::new(
            "A reply out of a tunnel is redirected to the clients' side",
            world(),
        )
        .then(opening.clone())
        .then(sent(&reply, &out)),
        Case::new(
            "A reply out of a tunnel whose TCP checksum is zero stays valid",
            world(),
        )
        .then(opening.clone())
        .then(sent(&zero, &rewritten(&zero, REMOTE.vip(), CLIENT).ttl(63))),
        Case::new(
            "A reply out of a tunnel whose TCP checksum becomes zero stays valid",
            world(),
        )
        .then(opening.clone())
        .then(sent(&before_zero, &becomes_zero)),
        Case::new(
            "The kernel finds the link address for a reply out of a tunnel",
            world(),
        )
        .then(
            Step::to_stack(
                &unresolved_client,
                &rewritten(&unresolved_client, binding(0), REMOTE.server),
            )
            .counts(REMOTE.opened()),
        )
        .then(sent(
            &reply,
            &rewritten(&reply, REMOTE.vip(), UNRESOLVED_CLIENT).ttl(63),
        )),
        Case::new("A reply out of a tunnel without a flow is dropped", world())
            .then(Step::dropped(stray.build(), Reason::NO_FLOW).in_tunnel()),
        Case::new("Other packets out of a tunnel pass", world())
            .then(Step::passed(elsewhere.build(), Reason::NOT_OURS).in_tunnel()),
        Case::new(
            "A client inside the remote network reaches a local backend",
            world(),
        )
        .then(request(&inner_syn, &rewritten(&inner_syn, binding(0), SERVER).ttl(63)).counts(WEB.opened()))
        .then({
            let packet = from_server(segment::SYN_ACK, WEB, binding(0));
            Step::passed(packet.build(), Reason::REPLY_TO_STACK)
                .by(&SERVER_SIDE)
                .out(rewritten(&packet, WEB.vip(), inner_client).build())
                .counts(WEB.first_answer())
        }),
        Case::new(
            "A client inside the remote network reaches a backend there",
            world(),
        )
        .then({
            let packet = tunnel_link(Builder::tcp(segment::SYN, inner_client, REMOTE.vip()));
            let out = rewritten(&packet, binding(0), REMOTE.server).ttl(63);
            request(&packet, &out)
                .verdict(Verdict::redirect(TUNNEL_SIDE.ifindex))
                .counts(REMOTE.opened())
        })
        .then(
            sent(&reply, &rewritten(&reply, REMOTE.vip(), inner_client).ttl(63))
                .verdict(Verdict::redirect(TUNNEL_SIDE.ifindex)),
        ),
        Case::new("A datagram out of a tunnel is forwarded", world())
            .then(request(&inner_query, &to_second(&inner_query)).counts(DNS.opened())),
        Case::new(
            "A datagram out of a tunnel without checksum stays without",
            world(),
        )
        .then(request(&no_checksum, &to_second(&no_checksum)).counts(DNS.opened())),
        Case::new(
            "A datagram out of a tunnel whose checksum becomes zero is sent with all ones",
            world(),
        )
        .then(request(&udp_before_zero, &udp_zero).counts(DNS.opened())),
        Case::new(
            "An ARP request out of a tunnel for an SNAT address is answered",
            world(),
        )
        .then(
            Step::new(
                &TUNNEL_SIDE,
                question.build(question.sender_mac, BROADCAST),
                Verdict::TRANSMIT,
                Reason::ARP_ANSWERED,
            )
            .in_tunnel()
            .out(arp_answer(&question, TUNNEL_SIDE.mac)),
        ),
        Case::new("An echo request out of a tunnel to a VIP is answered", world()).then(
            Step::new(
                &TUNNEL_SIDE,
                echo.build(),
                Verdict::TRANSMIT,
                Reason::ECHO_ANSWERED,
            )
            .in_tunnel()
            .out(echo_answer(&echo, *REMOTE.server.ip())),
        ),
    ]
}

const BROADCAST: Mac = [0xff; 6];

fn arp_answer(question: &Arp, mac: Mac) -> Vec<u8> {
    Arp {
        operation: 2,
        sender_mac: mac,
        sender: question.target,
        target_mac: question.sender_mac,
        target: question.sender,
    }
    .build(mac, question.sender_mac)
}

fn arp() -> Vec<Case> {
    let question = Arp {
        operation: 1,
        sender_mac: mac_of(*CLIENT.ip()),
        sender: *CLIENT.ip(),
        target_mac: [0; 6],
        target: VIP,
    };
    let ask = |question: Arp| question.build(question.sender_mac, BROADCAST);
    let answered = |question: Arp| {
        Step::new(
            &CLIENT_SIDE,
            ask(question),
            Verdict::TRANSMIT,
            Reason::ARP_ANSWERED,
        )
        .out(arp_answer(&question, CLIENT_SIDE.mac))
    };
    let passed = |frame: Vec<u8>| Step::passed(frame, Reason::NOT_IP);
    let snat = Arp {
        target: SNAT,
        ..question
    };
    let probe = Arp {
        sender: Ipv4Addr::UNSPECIFIED,
        ..question
    };
    let other = Arp {
        target: CLIENT_SIDE.address,
        ..question
    };
    let gratuitous = Arp {
        sender: VIP,
        ..question
    };
    let reply = Arp {
        operation: 2,
        ..question
    };
    let unicast = question.build(question.sender_mac, CLIENT_SIDE.mac);
    let mut unknown_interface = world();
    unknown_interface.interfaces.clear();
    let ask_len = ask(question).len();
    let mut padded = ask(question);
    padded.extend([0; 18]);
    let mut padded_answer = arp_answer(&question, CLIENT_SIDE.mac);
    padded_answer.extend([0; 18]);
    vec![
        Case::new("An ARP request for a VIP is answered", world()).then(answered(question)),
        Case::new("An ARP request for an SNAT address is answered", world()).then(answered(snat)),
        Case::new("An ARP request sent to us alone is answered", world()).then(
            Step::new(&CLIENT_SIDE, unicast, Verdict::TRANSMIT, Reason::ARP_ANSWERED)
                .out(arp_answer(&question, CLIENT_SIDE.mac)),
        ),
        Case::new("An ARP request keeps its padding", world()).then(
            Step::new(&CLIENT_SIDE, padded, Verdict::TRANSMIT, Reason::ARP_ANSWERED).out(padded_answer),
        ),
        Case::new(
            "An ARP probe for a VIP is answered: the address is taken",
            world(),
        )
        .then(answered(probe)),
        Case::new("An ARP request for another address passes", world()).then(passed(ask(other))),
        Case::new("An ARP announcement of a VIP passes", world()).then(passed(ask(gratuitous))),
        Case::new("An ARP reply passes", world()).then(passed(ask(reply))),
        Case::new("An ARP request of another hardware type passes", world()).then(passed(patched(
            ask(question),
            ETHERNET_LEN,
            &[0, 6],
        ))),
        Case::new("An ARP request for another protocol passes", world()).then(passed(patched(
            ask(question),
            ETHERNET_LEN + 2,
            &[0x86, 0xdd],
        ))),
        Case::new("An ARP request with long hardware addresses passes", world()).then(passed(patched(
            ask(question),
            ETHERNET_LEN + 4,
            &[8],
        ))),
        Case::new("An ARP request with long protocol addresses passes", world()).then(passed(patched(
            ask(question),
            ETHERNET_LEN + 5,
            &[16],
        ))),
        Case::new(
            "An ARP request on an interface that is not ours passes",
            unknown_interface,
        )
        .then(passed(ask(question))),
        Case::new("An ARP request that is cut short passes", world()).then(Step::passed(
            ask(question)[..ask_len - 1].to_vec(),
            Reason::TRUNCATED,
        )),
    ]
}

fn echo_answer(request: &Builder, asker: Ipv4Addr) -> Vec<u8> {
    request
        .clone()
        .icmp_kind(0)
        .from(SocketAddrV4::new(VIP, 0))
        .to(SocketAddrV4::new(asker, 0))
        .ttl(64)
        .link_swapped()
        .build()
}

fn icmp() -> Vec<Case> {
    let message = |kind, code, to| {
        Builder::icmp(kind, code, *CLIENT.ip(), to)
            .link(mac_of(*CLIENT.ip()), CLIENT_SIDE.mac)
            .payload(56)
    };
    let answered = |request: &Builder| {
        Step::new(
            &CLIENT_SIDE,
            request.build(),
            Verdict::TRANSMIT,
            Reason::ECHO_ANSWERED,
        )
        .out(echo_answer(request, *CLIENT.ip()))
    };
    let passed = |request: &Builder| Step::passed(request.build(), Reason::UNSUPPORTED_PROTOCOL);
    let echo = message(8, 0, VIP);
    // The reply is the request with another type, so a checksum near the wrap shows a wrong carry.
    let near_wrap = echo.clone().payload(58).ttl(1);
    let cut = echo.clone().payload(0).build();
    let outside = patched(
        echo.clone().payload(0).padding(26).build(),
        ETHERNET_LEN + 2,
        &[0, 20],
    );
    vec![
        Case::new("An echo request to a VIP is answered with a fresh TTL", world())
            .then(answered(&echo.clone().ttl(7))),
        Case::new(
            "An echo request whose TTL is 1 is answered, as it is for us",
            world(),
        )
        .then(answered(&near_wrap)),
        Case::new("An echo request without payload is answered", world())
            .then(answered(&echo.clone().payload(0))),
        Case::new(
            "An echo request with odd payload and IP options is answered",
            world(),
        )
        .then(answered(&echo.clone().payload(57).options(vec![1; 12]))),
        Case::new("An echo request with padding is answered", world())
            .then(answered(&echo.clone().payload(0).padding(18))),
        Case::new("An echo request to another address passes", world()).then(passed(&message(
            8,
            0,
            CLIENT_SIDE.address,
        ))),
        Case::new("An echo request to an SNAT address passes", world()).then(passed(&message(8, 0, SNAT))),
        Case::new("An echo request with a code passes", world()).then(passed(&message(8, 1, VIP))),
        Case::new("An echo reply to a VIP passes", world()).then(passed(&message(0, 0, VIP))),
        Case::new("An ICMP error to a VIP passes", world()).then(passed(&message(3, 3, VIP))),
        Case::new("An echo request that the frame cuts short passes", world()).then(Step::passed(
            patched(cut[..cut.len() - 1].to_vec(), ETHERNET_LEN + 2, &[0, 27]),
            Reason::TRUNCATED,
        )),
        Case::new("An echo request outside of its packet is padding", world())
            .then(Step::passed(outside, Reason::TRUNCATED)),
    ]
}

fn lengths() -> Vec<Case> {
    const IP: usize = ETHERNET_LEN;
    let truncated = |frame: Vec<u8>| Step::passed(frame, Reason::TRUNCATED);
    let frame = || syn(WEB).payload(40).build();
    let datagram = || query(DNS).build();
    let mut cases = Vec::new();
    for words in [6, 7, 15] {
        let packet = syn(WEB).options(vec![1; (words - 5) * 4]).payload(3);
        cases.push(
            Case::new(
                format!("A header of {words} words, options in it, is rewritten"),
                world(),
            )
            .then(Step::request(&packet, &to_server(&packet, binding(0), SERVER)).counts(WEB.opened())),
        );
    }
    let with_options = query(DNS).options(vec![1; 40]);
    let padded = syn(WEB).padding(6);
    let padded_datagram = query(DNS).payload(1).padding(17);
    let shorter_datagram = query(DNS).padding(2);
    // The length in the UDP header may be less than what IP carries.
    let shorter = |packet: &Builder| patched(packet.build(), IP + 2, &[0, 20 + 8 + 33 + 2]);
    let fix_header = |frame: Vec<u8>| {
        let frame = patched(frame, IP + 10, &[0, 0]);
        let checksum = !fold(sum(&frame[IP..IP + 20]));
        patched(frame, IP + 10, &checksum.to_be_bytes())
    };
    let lying_offset = |packet: &Builder| {
        let frame = packet.build();
        let field = IP + 20 + 12;
        // Keep the sum: what the data offset gains, the urgent pointer loses.
        patched(
            patched(frame, field, &[0xf0]),
            IP + 20 + 18,
            &(!0xa000_u16).to_be_bytes(),
        )
    };
    cases.extend([
        Case::new("A datagram behind 40 bytes of IP options is rewritten", world()).then(
            Step::request(&with_options, &to_server(&with_options, binding(0), UDP_SERVER))
                .counts(DNS.opened()),
        ),
        Case::new("Padding behind a packet stays as it is", world())
            .then(Step::request(&padded, &to_server(&padded, binding(0), SERVER)).counts(WEB.opened())),
        Case::new("Padding behind a datagram stays as it is", world()).then(
            Step::request(
                &padded_datagram,
                &to_server(&padded_datagram, binding(0), UDP_SERVER),
            )
            .counts(DNS.opened()),
        ),
        Case::new("A datagram may be shorter than its packet", world()).then({
            let out = to_server(&shorter_datagram, binding(0), UDP_SERVER);
            let mut step = Step::request(&shorter_datagram, &out).counts(DNS.opened());
            step.frame = fix_header(shorter(&shorter_datagram));
            step.out(fix_header(shorter(&out)))
        }),
        Case::new("A TCP header length that lies is the backend's business", world()).then({
            let packet = syn(WEB);
            let out = to_server(&packet, binding(0), SERVER);
            let mut step = Step::request(&packet, &out).counts(WEB.opened());
            step.frame = lying_offset(&packet);
            step.out(lying_offset(&out))
        }),
        Case::new("A header length below 5 words passes", world()).then(truncated(patched(
            frame(),
            IP,
            &[0x44],
        ))),
        Case::new("A header length of zero passes", world()).then(truncated(patched(frame(), IP, &[0x40]))),
        Case::new("A header length beyond the packet passes", world()).then(truncated(patched(
            syn(WEB).build(),
            IP,
            &[0x4f],
        ))),
        Case::new("A header length that leaves too little for TCP passes", world()).then(truncated(patched(
            syn(WEB).payload(39).build(),
            IP,
            &[0x4f],
        ))),
        Case::new("Another IP version passes", world()).then(truncated(patched(frame(), IP, &[0x65]))),
        Case::new("A length beyond the frame passes", world()).then(truncated(patched(
            frame(),
            IP + 2,
            &[0, 81],
        ))),
        Case::new("The longest length there is passes", world()).then(truncated(patched(
            frame(),
            IP + 2,
            &[0xff, 0xff],
        ))),
        Case::new("A length below the header's passes", world()).then(truncated(patched(
            frame(),
            IP + 2,
            &[0, 19],
        ))),
        Case::new("A length of zero passes", world()).then(truncated(patched(frame(), IP + 2, &[0, 0]))),
        Case::new("A length that cuts the TCP header passes", world()).then(truncated(patched(
            frame(),
            IP + 2,
            &[0, 39],
        ))),
        Case::new("A length that cuts the UDP header passes", world()).then(truncated(patched(
            datagram(),
            IP + 2,
            &[0, 27],
        ))),
        Case::new("A UDP length beyond the packet passes", world()).then(truncated(patched(
            datagram(),
            IP + 20 + 4,
            &[0, 8 + 34],
        ))),
        Case::new("A UDP length below its header's passes", world()).then(truncated(patched(
            datagram(),
            IP + 20 + 4,
            &[0, 7],
        ))),
        Case::new("TCP's source port zero passes", world()).then(truncated(
            syn(WEB).from(SocketAddrV4::new(*CLIENT.ip(), 0)).build(),
        )),
        Case::new("TCP's destination port zero passes", world())
            .then(truncated(syn(WEB).to(SocketAddrV4::new(VIP, 0)).build())),
        Case::new("UDP's source port zero passes", world()).then(truncated(
            query(DNS).from(SocketAddrV4::new(*CLIENT.ip(), 0)).build(),
        )),
        Case::new("A frame of an Ethernet header only passes", world())
            .then(truncated(frame()[..IP].to_vec())),
        Case::new("A frame that cuts the IP header passes", world())
            .then(truncated(frame()[..IP + 19].to_vec())),
        Case::new("A frame that ends with the IP header passes", world()).then(truncated(patched(
            frame()[..IP + 20].to_vec(),
            IP + 2,
            &[0, 20],
        ))),
        Case::new("A frame that cuts the TCP header passes", world()).then(truncated(patched(
            frame()[..IP + 39].to_vec(),
            IP + 2,
            &[0, 39],
        ))),
        Case::new("A frame that cuts the UDP header passes", world()).then(truncated(patched(
            datagram()[..IP + 27].to_vec(),
            IP + 2,
            &[0, 27],
        ))),
        {
            let mut case = Case::new("A frame that cuts the Ethernet header passes", world())
                .then(truncated(frame()[..IP - 1].to_vec()));
            case.library_only = Some("BPF_PROG_TEST_RUN refuses frames below 14 bytes");
            case
        },
    ]);
    cases
}

fn others() -> Vec<Case> {
    let passed = |frame: Vec<u8>, reason| Step::passed(frame, reason);
    let unfragmented = syn(WEB).fragment(0x4000);
    let unsupported = |protocol| {
        let packet = Builder::other(protocol, *CLIENT.ip(), VIP)
            .link(mac_of(*CLIENT.ip()), CLIENT_SIDE.mac)
            .payload(40);
        passed(packet.build(), Reason::UNSUPPORTED_PROTOCOL)
    };
    let from = |octets: [u8; 4]| {
        let packet = syn(WEB).from(SocketAddrV4::new(octets.into(), 50000));
        Step::request(&packet, &to_server(&packet, binding(0), SERVER)).counts(WEB.opened())
    };
    let own = |service, source| Step::dropped(syn(service).from(source).build(), Reason::OWN_SOURCE);
    let ethertype = |kind: [u8; 2]| patched(syn(WEB).build(), 12, &kind);
    vec![
        Case::new("A packet that must not be fragmented is none", world()).then(
            Step::request(&unfragmented, &to_server(&unfragmented, binding(0), SERVER)).counts(WEB.opened()),
        ),
        Case::new("An IPv4 packet that claims to be IPv6 passes", world())
            .then(passed(ethertype([0x86, 0xdd]), Reason::TRUNCATED)),
        Case::new("A frame with a length for an EtherType passes", world())
            .then(passed(ethertype([0, 46]), Reason::NOT_IP)),
        Case::new("A GRE packet to a VIP passes", world()).then(unsupported(47)),
        // Whom to believe is the business of the network's filters: the data path has no list of sources.
        Case::new("A SYN from a loopback address is a SYN", world()).then(from([127, 0, 0, 1])),
        Case::new("A SYN from a multicast address is a SYN", world()).then(from([224, 0, 0, 1])),
        Case::new("A SYN from a VIP has come back to us", world())
            .then(own(WEB, SocketAddrV4::new(VIP, 50000))),
        Case::new("A SYN from an SNAT address has come back to us", world()).then(own(WEB, binding(0))),
        Case::new(
            "A SYN from an SNAT address to a DNAT listener would share a binding, and is dropped",
            world(),
        )
        .then(web_opening())
        .then(own(DNAT_WEB, binding(0))),
    ]
}

/// The packet `out` with the error that `packet`'s transport checksum has: what an update of a field that the
/// data path takes for a checksum must leave.
fn with_same_error(packet: &Builder, out: &Builder) -> Builder {
    let total = |packet: &Builder| {
        let frame = packet.build();
        let ip = &frame[ETHERNET_LEN..];
        fold(sum(&ip[12..]) + u64::from(ip[9]) + (ip.len() - 20) as u64)
    };
    let cleared = out.clone().checksum(Checksum::Fixed(0));
    let field = fold(u64::from(total(packet)) + u64::from(!total(&cleared)));
    out.clone().checksum(Checksum::Fixed(field))
}

fn checksums() -> Vec<Case> {
    let no_checksum = query(DNS).checksum(Checksum::Fixed(0));
    let no_checksum_reply = answer(DNS, binding(0)).checksum(Checksum::Fixed(0));
    let opening = |packet: &Builder, out: &Builder, service: Service| {
        Step::request(packet, out).counts(service.opened())
    };
    let udp_zero = to_server(&query(DNS), binding(0), UDP_SERVER).payload_for_checksum(0);
    let before_udp_zero = rewritten(&udp_zero, CLIENT, DNS.vip())
        .ttl(64)
        .link(client_mac(CLIENT), CLIENT_SIDE.mac);
    let udp_ones = query(DNS).payload_for_checksum(0);
    let base = syn(WEB).payload(9);
    let tcp_zero = base.clone().payload_for_checksum(0);
    let becomes_zero = to_server(&base, binding(0), SERVER).payload_for_checksum(0);
    let before_zero = rewritten(&becomes_zero, CLIENT, WEB.vip())
        .ttl(64)
        .link(client_mac(CLIENT), CLIENT_SIDE.mac);
    let tcp_high = base.clone().payload_for_checksum(0xfffe);
    let wrong = base.clone().checksum(Checksum::Fixed(0x1234));
    let wrong_out = with_same_error(&wrong, &to_server(&wrong, binding(0), SERVER));
    let ones = base
        .clone()
        .payload_for_checksum(0)
        .checksum(Checksum::Fixed(0xffff));
    let ones_out = to_server(&ones, binding(0), SERVER).checksum(Checksum::Complete);
    vec![
        Case::new("A datagram without checksum stays without", world())
            .then(opening(
                &no_checksum,
                &to_server(&no_checksum, binding(0), UDP_SERVER),
                DNS,
            ))
            .then(
                Step::reply(
                    &no_checksum_reply,
                    &to_client(&no_checksum_reply, DNS.vip(), CLIENT),
                )
                .counts(DNS.first_answer()),
            ),
        Case::new(
            "A datagram whose checksum becomes zero is sent with all ones",
            world(),
        )
        .then(opening(&before_udp_zero, &udp_zero, DNS)),
        Case::new("A datagram whose checksum is all ones is updated", world()).then(opening(
            &udp_ones,
            &to_server(&udp_ones, binding(0), UDP_SERVER),
            DNS,
        )),
        Case::new("A TCP checksum of zero is a checksum", world()).then(opening(
            &tcp_zero,
            &to_server(&tcp_zero, binding(0), SERVER),
            WEB,
        )),
        Case::new("A TCP checksum that becomes zero stays zero", world()).then(opening(
            &before_zero,
            &becomes_zero,
            WEB,
        )),
        Case::new("A TCP checksum one below all ones is updated", world()).then(opening(
            &tcp_high,
            &to_server(&tcp_high, binding(0), SERVER),
            WEB,
        )),
        Case::new("A TCP checksum of all ones stands for zero", world()).then(opening(&ones, &ones_out, WEB)),
        Case::new("A wrong checksum is not put right", world()).then(opening(&wrong, &wrong_out, WEB)),
    ]
}

fn partial_checksums() -> Vec<Case> {
    use Checksum::{Complete, Partial};
    let partial_syn = |service: Service| syn(service).checksum(Partial);
    let mut cases = Vec::new();
    for len in [0, 1, 2, 3, 487, 488, 489, 508, 996, 1459, 1460, 3000] {
        let packet = partial_syn(WEB).payload(len);
        let out = to_server(&packet, binding(0), SERVER).checksum(Complete);
        cases.push(
            Case::new(
                format!("A partial TCP checksum over {len} bytes is completed when the frame leaves"),
                world_with_partial_checksums(),
            )
            .then(Step::request(&packet, &out).counts(WEB.opened())),
        );
    }
    for len in [0, 1, 500, 1471, 1472] {
        let packet = query(DNS).payload(len).checksum(Partial);
        let out = to_server(&packet, binding(0), UDP_SERVER).checksum(Complete);
        cases.push(
            Case::new(
                format!("A partial UDP checksum over {len} bytes is completed when the frame leaves"),
                world_with_partial_checksums(),
            )
            .then(Step::request(&packet, &out).counts(DNS.opened())),
        );
    }
    let with_options = partial_syn(WEB)
        .options(vec![1; 20])
        .tcp_options(vec![1; 12])
        .payload(5);
    let padded = query(DNS).payload(3).padding(15).checksum(Partial);
    let same_side = partial_syn(SAME_SIDE).payload(77);
    let same_side_out = same_side
        .clone()
        .from(binding(0))
        .to(SAME_SIDE.server)
        .ttl(63)
        .link(CLIENT_SIDE.mac, mac_of(*SAME_SIDE.server.ip()))
        .checksum(Complete);
    let remote = partial_syn(REMOTE).payload(21);
    let reply = from_server(segment::SYN_ACK, WEB, binding(0))
        .payload(333)
        .checksum(Partial);
    let udp_zero = to_server(&query(DNS), binding(0), UDP_SERVER).payload_for_checksum(0);
    let before_udp_zero = rewritten(&udp_zero, CLIENT, DNS.vip())
        .ttl(64)
        .link(client_mac(CLIENT), CLIENT_SIDE.mac)
        .checksum(Partial);
    let chance = syn(WEB).payload(50);
    let chance = chance.clone().payload_for_checksum(chance.partial_checksum());
    let unmarked = partial_syn(WEB).payload(50);
    let unmarked_out = with_same_error(&unmarked, &to_server(&unmarked, binding(0), SERVER));
    let no_checksum = query(DNS).checksum(Checksum::Fixed(0));
    let dnat = partial_syn(DNAT_WEB).payload(8);
    let opened = |packet: &Builder, out: &Builder, service: Service| {
        Step::request(packet, out).counts(service.opened())
    };
    let out_of =
        |packet: &Builder, server: SocketAddrV4| to_server(packet, binding(0), server).checksum(Complete);
    cases.extend([
        Case::new(
            "A partial checksum behind IP and TCP options is completed",
            world_with_partial_checksums(),
        )
        .then(opened(&with_options, &out_of(&with_options, SERVER), WEB)),
        Case::new("Padding is no part of a checksum", world_with_partial_checksums()).then(opened(
            &padded,
            &out_of(&padded, UDP_SERVER),
            DNS,
        )),
        Case::new(
            "A partial checksum is completed in DNAT",
            world_with_partial_checksums(),
        )
        .then(opened(
            &dnat,
            &to_server(&dnat, CLIENT, SERVER).checksum(Complete),
            DNAT_WEB,
        )),
        Case::new(
            "A partial checksum is completed when the frame is transmitted",
            world_with_partial_checksums(),
        )
        .then(opened(&same_side, &same_side_out, SAME_SIDE).verdict(Verdict::TRANSMIT)),
        Case::new(
            "A partial checksum stays partial on the way to the stack",
            world_with_partial_checksums(),
        )
        .then(
            Step::to_stack(&remote, &rewritten(&remote, binding(0), REMOTE.server)).counts(REMOTE.opened()),
        ),
        Case::new(
            "A partial checksum of a reply is completed when the frame leaves",
            world_with_partial_checksums(),
        )
        .then(web_opening())
        .then(
            Step::reply(&reply, &to_client(&reply, WEB.vip(), CLIENT).checksum(Complete))
                .counts(WEB.first_answer()),
        ),
        Case::new(
            "A partial UDP checksum that completes to zero is sent with all ones",
            world_with_partial_checksums(),
        )
        .then(opened(&before_udp_zero, &udp_zero, DNS)),
        Case::new(
            "A checksum that equals the pseudo-header's sum by chance is a checksum",
            world_with_partial_checksums(),
        )
        .then(opened(&chance, &to_server(&chance, binding(0), SERVER), WEB)),
        Case::new(
            "A complete checksum is updated where partial ones are expected",
            world_with_partial_checksums(),
        )
        .all(web_handshake()),
        Case::new(
            "A datagram without checksum stays without where partial ones are expected",
            world_with_partial_checksums(),
        )
        .then(opened(
            &no_checksum,
            &to_server(&no_checksum, binding(0), UDP_SERVER),
            DNS,
        )),
        Case::new(
            "Nobody looks for partial checksums where none are expected",
            world(),
        )
        .then(opened(&unmarked, &unmarked_out, WEB)),
        Case::new(
            "Generic XDP leaves a partial checksum to the device",
            world_with_partial_checksums(),
        )
        .then(opened(&unmarked, &to_server(&unmarked, binding(0), SERVER), WEB).program(Program::Generic)),
    ]);
    cases
}

/// [`world_with_partial_checksums`], whose clients' side carries 1500 and all others 1450 bytes.
fn world_with_mtu() -> MemoryTables {
    let mut world = world_with_partial_checksums();
    for (key, interface) in &mut world.interfaces {
        interface.mtu_bytes = if key.ifindex == CLIENT_SIDE.ifindex {
            1500
        } else {
            1450
        };
    }
    world
}

/// TCP options with this segment size in front, and a window scale.
fn segment_size(bytes: u16) -> Vec<u8> {
    let [high, low] = bytes.to_be_bytes();
    vec![2, 4, high, low, 1, 3, 3, 7]
}

fn segment_sizes() -> Vec<Case> {
    // What 1450 bytes leave behind the two headers.
    const LARGEST: u16 = 1410;
    let announcing = |packet: &Builder, bytes| packet.clone().tcp_options(segment_size(bytes));
    let request = |packet: &Builder, out: &Builder| {
        Step::request(packet, &to_server(out, binding(0), SERVER)).counts(WEB.opened())
    };
    let (large, fitting) = (announcing(&syn(WEB), 1460), announcing(&syn(WEB), LARGEST));
    let small = announcing(&syn(WEB), 536);
    let partial = large.clone().checksum(Checksum::Partial);
    let remote = announcing(&syn(REMOTE), 1460);
    let remote_out = |packet: &Builder| rewritten(packet, binding(0), REMOTE.server);
    let reply = from_server(segment::SYN_ACK, WEB, binding(0));
    let data = announcing(&from_client(segment::ACK, CLIENT, WEB), 1460);
    let second = syn(WEB).tcp_options(vec![1, 1, 1, 1, 2, 4, 5, 0xb4]);
    let tunnel_reply = Builder::tcp(segment::SYN_ACK, REMOTE.server, binding(0))
        .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
    let in_payload = syn(WEB).payload_of(&[2, 4, 0xff, 0xff]);
    vec![
        Case::new(
            "A SYN's segment size is lowered to what its way carries",
            world_with_mtu(),
        )
        .then(request(&large, &fitting)),
        Case::new(
            "A SYN's segment size that just fits is left alone",
            world_with_mtu(),
        )
        .then(request(&fitting, &fitting)),
        Case::new("A SYN's small segment size is not raised", world_with_mtu()).then(request(&small, &small)),
        Case::new(
            "A SYN's segment size is left alone where no MTU is known",
            world(),
        )
        .then(request(&large, &large)),
        Case::new(
            "A partial checksum is completed over the lowered segment size",
            world_with_mtu(),
        )
        .then(request(&partial, &fitting)),
        Case::new(
            "A partial checksum on the way to the stack does not know the lowered segment size",
            world_with_mtu(),
        )
        .then({
            let packet = remote.clone().checksum(Checksum::Partial);
            let out = announcing(&packet, LARGEST);
            Step::to_stack(&packet, &remote_out(&out)).counts(REMOTE.opened())
        }),
        Case::new(
            "A SYN into a tunnel announces what the tunnel carries",
            world_with_mtu(),
        )
        .then(Step::to_stack(&remote, &remote_out(&announcing(&remote, LARGEST))).counts(REMOTE.opened())),
        Case::new(
            "A SYN+ACK's segment size is lowered to what its way carries",
            world_with_mtu(),
        )
        .then(web_opening())
        .then({
            let packet = announcing(&reply, 8960);
            let out = to_client(&announcing(&reply, LARGEST), WEB.vip(), CLIENT);
            Step::reply(&packet, &out).counts(WEB.first_answer())
        }),
        Case::new(
            "A SYN+ACK out of a tunnel announces what the tunnel carries",
            world_with_mtu(),
        )
        .then({
            let packet = syn(REMOTE);
            Step::to_stack(&packet, &remote_out(&packet)).counts(REMOTE.opened())
        })
        .then({
            let packet = announcing(&tunnel_reply, 1460);
            let out = rewritten(&announcing(&tunnel_reply, LARGEST), REMOTE.vip(), CLIENT).ttl(63);
            Step::reply(&packet, &out)
                .in_tunnel()
                .counts(REMOTE.first_answer())
        }),
        Case::new(
            "Data that looks like a segment size option is data",
            world_with_mtu(),
        )
        .then(request(&in_payload, &in_payload)),
        Case::new("A segment size outside of a SYN is left alone", world_with_mtu())
            .all(web_handshake())
            .then(Step::request(&data, &to_server(&data, binding(0), SERVER)).counts(WEB.request())),
        Case::new(
            "A segment size behind another option is not seen",
            world_with_mtu(),
        )
        .then(request(&second, &second)),
    ]
}
