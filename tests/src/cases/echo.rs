//! Echo through to backends: the identifier as the port it takes the part of.

use std::net::{Ipv4Addr, SocketAddrV4};

use forwarder_common::{
    abi::{
        backend::{BackendState, NatMode},
        reason::Reason,
    },
    datapath::Verdict,
};

use super::{
    CLIENT, Case, ICMP, OTHER_CLIENT, ROUTED_CLIENT, SERVER, SNAT, SNAT_COUNT, Service, Step, TCP,
    UDP_SERVER, VIP, binding, client_mac,
    icmp_errors::{ERRORS, Family, Flow, told},
    rewritten, server, syn, to_client, to_server,
};
use crate::{
    packet::{Builder, ETHERNET_LEN, Mac, patched},
    tables::{CLIENT_SIDE, MemoryTables, SERVER_SIDE, TUNNEL_SIDE, mac_of},
};

const FULL: Service = Service::new(0, 0, 0, SERVER);
/// Beside it on the VIP.
const WEB: Service = Service::new(80, 1, 0, SERVER);

/// A router between the gateway and the backends.
const BEYOND: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 206);
/// Behind the tunnel.
const REMOTE: SocketAddrV4 = server([192, 168, 1, 20]);

/// A listener of echo in this mode, and one of TCP, with one backend, whose port is one of TCP.
fn world(nat: NatMode, server: SocketAddrV4) -> MemoryTables {
    let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
    let backend = world.add_backend(*server.ip(), server.port(), BackendState::HEALTHY);
    world.add_listener(VIP, 0, ICMP, nat, &[backend; 4]);
    world.add_listener(VIP, WEB.port, TCP, nat, &[backend; 4]);
    world
}

fn full_nat() -> MemoryTables {
    world(NatMode::FULL, SERVER)
}

fn dnat() -> MemoryTables {
    world(NatMode::DNAT, SERVER)
}

/// The link address that packets to a client have, whatever its identifier.
fn mac_towards(client: SocketAddrV4) -> Mac {
    client_mac(SocketAddrV4::new(*client.ip(), CLIENT.port()))
}

fn request_of(client: SocketAddrV4) -> Builder {
    Builder::echo_request(client, FULL.vip())
        .link(mac_towards(client), CLIENT_SIDE.mac)
        .payload(56)
}

fn request() -> Builder {
    request_of(CLIENT)
}

fn reply_to(end: SocketAddrV4) -> Builder {
    Builder::echo_reply(SERVER, end)
        .link(mac_of(*SERVER.ip()), SERVER_SIDE.mac)
        .payload(56)
}

/// What the request of a client becomes that gets this binding.
fn forwarded(packet: &Builder, as_seen: SocketAddrV4) -> Step {
    Step::request(packet, &to_server(packet, as_seen, SERVER)).counts(FULL.request())
}

fn opening(packet: &Builder, as_seen: SocketAddrV4) -> Step {
    forwarded(packet, as_seen).counts(FULL.opened())
}

fn replied(packet: &Builder, client: SocketAddrV4) -> Step {
    let out = to_client(packet, FULL.vip(), client).link(CLIENT_SIDE.mac, mac_towards(client));
    Step::reply(packet, &out).counts(FULL.reply())
}

fn answered(packet: &Builder, client: SocketAddrV4) -> Step {
    replied(packet, client).counts(FULL.first_answer())
}

pub(super) fn all() -> Vec<Case> {
    [flows(), refusals(), errors(), others()].concat()
}

fn flows() -> Vec<Case> {
    let second_ping = request_of(SocketAddrV4::new(*CLIENT.ip(), 7));
    let no_identifier = request_of(SocketAddrV4::new(*CLIENT.ip(), 0));
    let other = request_of(OTHER_CLIENT);
    let routed = request_of(ROUTED_CLIENT);
    let no_identifier_client = SocketAddrV4::new(*CLIENT.ip(), 0);
    let mut cases =
        vec![
        Case::new(
            "An echo request to a listener of echo opens a flow: it leaves with the identifier of a binding",
            full_nat(),
        )
        .then(opening(&request(), binding(0))),
        Case::new("An echo reply comes back with the client's identifier", full_nat())
            .then(opening(&request(), binding(0)))
            .then(answered(&reply_to(binding(0)), CLIENT)),
        Case::new("All of a ping is one flow", full_nat())
            .then(opening(&request(), binding(0)))
            .then(answered(&reply_to(binding(0)), CLIENT))
            .then(forwarded(&request(), binding(0)))
            .then(replied(&reply_to(binding(0)), CLIENT)),
        Case::new("In DNAT an echo request keeps its identifier", dnat())
            .then(opening(&request(), CLIENT))
            .then(answered(&reply_to(CLIENT), CLIENT))
            .then(forwarded(&request(), CLIENT)),
        Case::new("Two clients with the same identifier are told apart", full_nat())
            .then(opening(&request(), binding(0)))
            .then(opening(&other, binding(1)))
            .then(answered(&reply_to(binding(1)), OTHER_CLIENT))
            .then(answered(&reply_to(binding(0)), CLIENT)),
        Case::new("Two pings of a client are told apart", full_nat())
            .then(opening(&request(), binding(0)))
            .then(opening(&second_ping, binding(1)))
            .then(answered(
                &reply_to(binding(1)),
                SocketAddrV4::new(*CLIENT.ip(), 7),
            )),
        Case::new("An echo request without identifier has a flow as well", full_nat())
            .then(opening(&no_identifier, binding(0)))
            .then(answered(&reply_to(binding(0)), no_identifier_client)),
        Case::new("An echo request without identifier is forwarded in DNAT", dnat())
            .then(opening(&no_identifier, no_identifier_client))
            .then(answered(&reply_to(no_identifier_client), no_identifier_client)),
        Case::new("A ping of a client behind a router is forwarded", full_nat())
            .then(opening(&routed, binding(0)))
            .then(answered(&reply_to(binding(0)), ROUTED_CLIENT)),
        Case::new("Echo and TCP of a client beside it do not mix", full_nat())
            .then(opening(&request(), binding(0)))
            .then({
                let packet = syn(WEB);
                Step::request(&packet, &to_server(&packet, binding(1), SERVER)).counts(WEB.opened())
            }),
        Case::new("A listener of echo works on a backend without a port", {
            let mut world = full_nat();
            world.backends[0].port = forwarder_common::wire::Be16::ZERO;
            world
        })
        .then(opening(&request(), binding(0)))
        .then(answered(&reply_to(binding(0)), CLIENT)),
    ];
    for len in [0, 1, 2, 57, 1472] {
        cases.push(
            Case::new(format!("An echo of {len} bytes goes there and back"), full_nat())
                .then(opening(&request().payload(len), binding(0)))
                .then(answered(&reply_to(binding(0)).payload(len), CLIENT)),
        );
    }
    for wanted in [0, 1, 0xfffe] {
        let packet = request().payload_for_checksum(wanted);
        cases.push(
            Case::new(
                format!("An echo request with a checksum near {wanted:#x} is updated right"),
                full_nat(),
            )
            .then(opening(&packet, binding(0))),
        );
    }
    let with_options = request().options(vec![1; 8]);
    let padded = request().payload(4).padding(14);
    cases.extend([
        Case::new("An echo request with IP options is forwarded", full_nat())
            .then(opening(&with_options, binding(0))),
        Case::new("An echo request with padding is forwarded", full_nat()).then(opening(&padded, binding(0))),
    ]);
    cases
}

fn refusals() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut none = full_nat();
    none.backends[0].state = BackendState::UNHEALTHY;
    let mut full = full_nat();
    full.free_flows.clear();
    let mut limited = full_nat();
    limited
        .listener_mut(FULL.listener)
        .for_each(|listener| listener.max_flows = 1);
    for family in Family::BOTH {
        let name = family.name();
        let (kind, code) = if family == Family::V4 { (3, 1) } else { (1, 3) };
        let unreachable = |packet: &Builder, reason| {
            let packet = family.packet(packet);
            Step::new(&CLIENT_SIDE, packet.build(), Verdict::TRANSMIT, reason)
                .out(packet.reported(kind, code, 0).build())
        };
        let first = family.packet(&request());
        let opened = Step::request(&first, &family.packet(&to_server(&request(), binding(0), SERVER)))
            .counts(FULL.opened());
        let expired = family.packet(&request().ttl(1));
        let list = [
            Case::new(
                format!("A ping over {name} that no backend takes is told \"host unreachable\""),
                none.clone(),
            )
            .then(unreachable(&request(), Reason::NO_BACKEND).counts(FULL.refused())),
            Case::new(
                format!("A ping over {name} without a free flow is told so"),
                full.clone(),
            )
            .then(unreachable(&request(), Reason::FLOW_TABLE_FULL).counts(FULL.not_bound())),
            Case::new(
                format!("A ping over {name} beyond a listener's limit is told so"),
                limited.clone(),
            )
            .then(opened)
            .then(unreachable(&request_of(OTHER_CLIENT), Reason::LISTENER_LIMIT).counts(FULL.refused())),
            Case::new(
                format!("An echo request over {name} whose time to live is 1 ends here, as on any router"),
                full_nat(),
            )
            .then(told(&CLIENT_SIDE, &expired, Reason::TTL_EXCEEDED, 0)),
        ];
        cases.extend(list.into_iter().map(|case| family.case(case)));
    }
    let mut sourced = full_nat();
    sourced.admit_source(FULL.listener, *OTHER_CLIENT.ip(), 32);
    cases.extend([
        Case::new(
            "A ping from elsewhere than its listener admits is dropped",
            sourced,
        )
        .then(Step::dropped(request().build(), Reason::SOURCE_NOT_ALLOWED)),
        Case::new("A ping from a VIP is dropped", full_nat()).then(Step::dropped(
            request().from(SocketAddrV4::new(VIP, 9)).build(),
            Reason::OWN_SOURCE,
        )),
    ]);
    cases
}

fn errors() -> Vec<Case> {
    let mut cases = Vec::new();
    let modes = [
        ("full NAT", NatMode::FULL, binding(0)),
        ("DNAT", NatMode::DNAT, CLIENT),
    ];
    for family in Family::BOTH {
        let name = family.name();
        for (mode, nat, source) in modes {
            let flow = Flow::of(family, FULL, source, request(), reply_to(source));
            for (error, (text, ..)) in ERRORS.iter().enumerate() {
                let case = Case::new(
                    format!("\"{text}\" about a ping in {mode} over {name} reaches either end"),
                    world(nat, SERVER),
                );
                cases.push(
                    family.case(
                        case.then(flow.opened())
                            .then(flow.about_request(error, BEYOND, 1000))
                            .then(flow.about_reply(error, *CLIENT.ip(), 1000)),
                    ),
                );
            }
            let case = Case::new(
                format!("An error that quotes 8 bytes of a ping in {mode} over {name} is translated"),
                world(nat, SERVER),
            );
            cases.push(
                family.case(
                    case.then(flow.opened())
                        .then(flow.about_request(5, BEYOND, 8))
                        .then(flow.about_reply(5, *CLIENT.ip(), 8)),
                ),
            );
        }
        // A timestamp request, or of IPv6 an advertisement, quoted in an error.
        let other = Builder::icmp(13, 0, SNAT, *SERVER.ip());
        let (_, left) = Flow::of(family, FULL, binding(0), request(), reply_to(binding(0))).request();
        let header = if family == Family::V4 { 20 } else { 40 };
        let mut quoted = left.build();
        quoted[ETHERNET_LEN + header] = if family == Family::V4 { 13 } else { 136 };
        let (kind, code) = if family == Family::V4 { (11, 0) } else { (3, 0) };
        let (reported, to) = {
            let (source, destination) = family.packet(&other).ends();
            (destination.ip(), source.ip())
        };
        let error = Builder::icmp(kind, code, reported, to)
            .payload_of(&quoted[ETHERNET_LEN..])
            .link(mac_of(BEYOND), SERVER_SIDE.mac);
        let case = Case::new(
            format!("An error over {name} about another message of ICMP passes"),
            full_nat(),
        );
        cases.push(family.case(case.then(Step::new(
            &SERVER_SIDE,
            error.build(),
            Verdict::PASS,
            Reason::UNSUPPORTED_PROTOCOL,
        ))));
    }
    cases
}

fn others() -> Vec<Case> {
    let unsupported = |frame: Vec<u8>| Step::passed(frame, Reason::UNSUPPORTED_PROTOCOL);
    let from_server =
        |packet: &Builder, verdict, reason| Step::new(&SERVER_SIDE, packet.build(), verdict, reason);
    let stray = reply_to(binding(3));
    let stranger = reply_to(binding(0)).from(UDP_SERVER);
    let below = reply_to(SocketAddrV4::new(SNAT, 7));
    let to_vip = Builder::echo_reply(CLIENT, FULL.vip()).link(client_mac(CLIENT), CLIENT_SIDE.mac);
    let coded = patched(request().build(), ETHERNET_LEN + 21, &[1]);
    let remote = || world(NatMode::FULL, REMOTE);
    let tunnel_link = |packet: Builder| packet.link(mac_of(*REMOTE.ip()), TUNNEL_SIDE.mac);
    let back = tunnel_link(Builder::echo_reply(REMOTE, binding(0)).payload(9));
    let back_out = rewritten(&back, FULL.vip(), CLIENT).ttl(63);
    let inner_client = SocketAddrV4::new(*REMOTE.ip(), 77);
    let inner = tunnel_link(Builder::echo_request(inner_client, FULL.vip()).payload(9));
    let inner_out = rewritten(&inner, binding(0), SERVER).ttl(63);
    vec![
        Case::new(
            "An echo reply to an SNAT address without a flow is dropped",
            full_nat(),
        )
        .then(from_server(&stray, Verdict::DROP, Reason::NO_FLOW)),
        Case::new(
            "An echo reply of another host than the one asked is dropped",
            full_nat(),
        )
        .then(opening(&request(), binding(0)))
        .then(from_server(&stranger, Verdict::DROP, Reason::NO_FLOW)),
        Case::new(
            "An echo reply to an SNAT address with an identifier that no flow has is dropped",
            full_nat(),
        )
        .then(from_server(&below, Verdict::DROP, Reason::NO_FLOW)),
        Case::new(
            "An echo reply to a VIP with a listener of echo passes",
            full_nat(),
        )
        .then(unsupported(to_vip.build())),
        Case::new("An echo reply to the client of no flow in DNAT passes", dnat()).then(from_server(
            &reply_to(CLIENT),
            Verdict::PASS,
            Reason::UNSUPPORTED_PROTOCOL,
        )),
        Case::new(
            "An echo request with a code passes a listener of echo",
            full_nat(),
        )
        .then(unsupported(coded)),
        Case::new(
            "An echo request goes into a tunnel and its reply comes back",
            remote(),
        )
        .then(Step::to_stack(&request(), &rewritten(&request(), binding(0), REMOTE)).counts(FULL.opened()))
        .then(
            Step::reply(&back, &back_out)
                .in_tunnel()
                .counts(FULL.first_answer()),
        ),
        Case::new("An echo request out of a tunnel opens a flow", full_nat()).then(
            Step::new(
                &TUNNEL_SIDE,
                inner.build(),
                Verdict::redirect(SERVER_SIDE.ifindex),
                Reason::REQUEST_FORWARDED,
            )
            .out(inner_out.build())
            .in_tunnel()
            .counts(FULL.opened()),
        ),
        Case::new(
            "Fragments of an echo request to a listener of echo pass",
            full_nat(),
        )
        .then(unsupported(request().fragment(0x2000).build()))
        .then(unsupported(request().fragment(0x0010).build())),
    ]
}
