//! SCTP: associations by their ports, the checksum that follows them, and what ends a flow.

use std::net::{Ipv4Addr, SocketAddrV4};

use forwarder_common::{
    abi::{
        backend::{BackendState, NatMode},
        reason::Reason,
        settings::flag,
    },
    datapath::Verdict,
};

use super::{
    CLIENT, Case, Checksum, ICMP, OTHER_CLIENT, ROUTED_CLIENT, SCTP, SERVER, SNAT, SNAT_COUNT, Service, Step,
    VIP, binding, client_mac,
    icmp_errors::{ERRORS, Family, Flow, told},
    rewritten, server, to_client, to_server,
};
use crate::{
    packet::{Builder, ETHERNET_LEN, chunk, patched},
    tables::{CLIENT_SIDE, MemoryTables, Program, SERVER_SIDE, TUNNEL_SIDE, mac_of},
};

const FULL: Service = Service::new(2905, 0, 0, SERVER);
const DNAT: Service = Service::new(3868, 1, 1, SERVER);
const REMOTE: Service = Service::new(36412, 2, 2, server([192, 168, 1, 20]));
/// On the clients' side.
const SAME_SIDE: Service = Service::new(36422, 3, 3, server([172, 18, 0, 20]));

/// A router between the gateway and the backends.
const BEYOND: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 206);

fn world() -> MemoryTables {
    let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
    let services = [
        (FULL, NatMode::FULL),
        (DNAT, NatMode::DNAT),
        (REMOTE, NatMode::FULL),
        (SAME_SIDE, NatMode::FULL),
    ];
    for (service, nat) in services {
        let (address, port) = (*service.server.ip(), service.server.port());
        let backend = world.add_backend(address, port, BackendState::HEALTHY);
        let listener = world.add_listener(VIP, service.port, SCTP, nat, &[backend; 4]);
        assert_eq!((listener, backend), (service.listener, service.backend));
    }
    world
}

/// [`world`], whose interfaces may hand in packets without checksum.
fn world_with_partial_checksums() -> MemoryTables {
    let mut world = world();
    world.settings.flags |= flag::PARTIAL_CHECKSUMS;
    world
}

/// A packet of a client; an INIT has no tag yet.
fn from_client(kind: u8, client: SocketAddrV4, service: Service) -> Builder {
    let packet = Builder::sctp(kind, client, service.vip())
        .link(client_mac(client), CLIENT_SIDE.mac)
        .payload(16);
    if kind == chunk::INIT {
        packet.tag(0)
    } else {
        packet
    }
}

fn init(service: Service) -> Builder {
    from_client(chunk::INIT, CLIENT, service)
}

fn from_server(kind: u8, service: Service, to: SocketAddrV4) -> Builder {
    Builder::sctp(kind, service.server, to)
        .link(mac_of(*service.server.ip()), SERVER_SIDE.mac)
        .payload(20)
}

/// A packet of [`CLIENT`] in full NAT under the first binding.
fn request(kind: u8) -> Step {
    let packet = from_client(kind, CLIENT, FULL);
    Step::request(&packet, &to_server(&packet, binding(0), FULL.server)).counts(FULL.request())
}

fn reply(kind: u8) -> Step {
    let packet = from_server(kind, FULL, binding(0));
    let traffic = if kind == chunk::INIT_ACK {
        FULL.first_answer()
    } else {
        FULL.reply()
    };
    Step::reply(&packet, &to_client(&packet, FULL.vip(), CLIENT)).counts(traffic)
}

fn opening() -> Step {
    request(chunk::INIT).counts(FULL.opened())
}

fn handshake() -> [Step; 4] {
    [
        opening(),
        reply(chunk::INIT_ACK),
        request(chunk::COOKIE_ECHO),
        reply(chunk::COOKIE_ACK),
    ]
}

pub(super) fn all() -> Vec<Case> {
    [lives(), checksums(), refusals(), errors(), others()].concat()
}

fn lives() -> Vec<Case> {
    let dnat = init(DNAT);
    let dnat_reply = from_server(chunk::INIT_ACK, DNAT, CLIENT);
    let other = from_client(chunk::INIT, OTHER_CLIENT, FULL);
    let routed = from_client(chunk::INIT, ROUTED_CLIENT, FULL);
    let mut cases = vec![
        Case::new(
            "An INIT to a listener opens a flow: it leaves from the first binding",
            world(),
        )
        .then(opening()),
        Case::new("An INIT is forwarded in DNAT, and so is its answer", world())
            .then(Step::request(&dnat, &to_server(&dnat, CLIENT, DNAT.server)).counts(DNAT.opened()))
            .then(
                Step::reply(&dnat_reply, &to_client(&dnat_reply, DNAT.vip(), CLIENT))
                    .counts(DNAT.first_answer()),
            ),
        Case::new("An association lives from INIT to its last word", world())
            .all(handshake())
            .all([
                request(chunk::DATA),
                reply(chunk::SACK),
                reply(chunk::DATA),
                request(chunk::SACK),
                request(chunk::HEARTBEAT),
                reply(chunk::ERROR),
                request(chunk::SHUTDOWN),
                reply(chunk::SHUTDOWN_ACK),
                request(chunk::SHUTDOWN_COMPLETE),
            ]),
        Case::new("A retransmitted INIT stays with its flow", world())
            .then(opening())
            .then(request(chunk::INIT)),
        Case::new(
            "An INIT that restarts an association stays with its flow",
            world(),
        )
        .all(handshake())
        .then(request(chunk::INIT)),
        Case::new("Two clients with the same port have an association each", world())
            .then(opening())
            .then(Step::request(&other, &to_server(&other, binding(1), FULL.server)).counts(FULL.opened())),
        Case::new("An INIT of a client behind a router opens a flow", world())
            .then(Step::request(&routed, &to_server(&routed, binding(0), FULL.server)).counts(FULL.opened())),
        Case::new("An ABORT of the backend answers an INIT", world())
            .then(opening())
            .then(reply(chunk::ABORT).counts(FULL.first_answer())),
        Case::new("An INIT after an ABORT of the client opens anew", world())
            .all(handshake())
            .then(request(chunk::ABORT))
            .then(opening()),
        Case::new("An INIT after an ABORT of the backend opens anew", world())
            .all(handshake())
            .then(reply(chunk::ABORT))
            .then(opening()),
        Case::new("An INIT after the last word opens anew", world())
            .all(handshake())
            .all([
                request(chunk::SHUTDOWN),
                reply(chunk::SHUTDOWN_ACK),
                request(chunk::SHUTDOWN_COMPLETE),
            ])
            .then(opening()),
    ];
    let strays = [
        ("DATA", chunk::DATA),
        ("INIT ACK", chunk::INIT_ACK),
        ("SACK", chunk::SACK),
        ("HEARTBEAT", chunk::HEARTBEAT),
        ("ABORT", chunk::ABORT),
        ("SHUTDOWN", chunk::SHUTDOWN),
        ("SHUTDOWN ACK", chunk::SHUTDOWN_ACK),
        ("COOKIE ECHO", chunk::COOKIE_ECHO),
        ("SHUTDOWN COMPLETE", chunk::SHUTDOWN_COMPLETE),
        ("chunk of an unknown type", 0xc1),
    ];
    for (what, kind) in strays {
        let packet = from_client(kind, CLIENT, FULL);
        cases.push(
            Case::new(
                format!("A {what} to a listener belongs to no flow and opens none"),
                world(),
            )
            .then(Step::dropped(packet.build(), Reason::NOT_A_SYN)),
        );
    }
    cases
}

fn checksums() -> Vec<Case> {
    use Checksum::{Complete, Partial};

    let mut cases = Vec::new();
    let data = |len: usize| from_client(chunk::DATA, CLIENT, FULL).payload(len);
    for len in [0, 1, 2, 3, 4, 5, 255, 256, 1000, 1452, 4000] {
        let packet = data(len);
        cases.push(
            Case::new(
                format!("The checksum over {len} bytes of a chunk follows the ports"),
                world(),
            )
            .then(opening())
            .then(
                Step::request(&packet, &to_server(&packet, binding(0), FULL.server)).counts(FULL.request()),
            ),
        );
    }
    for len in [0, 1, 489, 492, 493, 496, 1000, 1452] {
        let packet = data(len).checksum(Partial);
        let out = to_server(&packet, binding(0), FULL.server).checksum(Complete);
        cases.push(
            Case::new(
                format!(
                    "A checksum over {len} bytes of a chunk that the sender left out is computed when the frame leaves"
                ),
                world_with_partial_checksums(),
            )
            .then(opening())
            .then(Step::request(&packet, &out).counts(FULL.request())),
        );
    }
    let partial = init(FULL).checksum(Partial);
    let partial_remote = init(REMOTE).checksum(Partial);
    let same_side = init(SAME_SIDE).checksum(Partial);
    let same_side_out = to_client(&same_side, binding(0), SAME_SIDE.server)
        .link(CLIENT_SIDE.mac, mac_of(*SAME_SIDE.server.ip()))
        .checksum(Complete);
    let dnat = init(DNAT).checksum(Partial);
    let padded = init(FULL).padding(6).checksum(Partial);
    let with_options = init(FULL).options(vec![1; 12]).checksum(Partial);
    let wrong = patched(init(FULL).build(), ETHERNET_LEN + 28, &[0xde, 0xad, 0xbe, 0xef]);
    let mut wrong_out = to_server(&init(FULL), binding(0), FULL.server).build();
    // As far from the right one as it was.
    let right = init(FULL).build();
    for index in ETHERNET_LEN + 28..ETHERNET_LEN + 32 {
        wrong_out[index] ^= right[index] ^ wrong[index];
    }
    cases.extend([
        Case::new(
            "A checksum that is there is updated where some are left out",
            world_with_partial_checksums(),
        )
        .then(opening()),
        Case::new("A wrong checksum stays wrong", world())
            .then(
                Step::new(
                    &CLIENT_SIDE,
                    wrong,
                    Verdict::redirect(SERVER_SIDE.ifindex),
                    Reason::REQUEST_FORWARDED,
                )
                .out(wrong_out)
                .counts(FULL.opened()),
            )
            .v4_only(),
        Case::new(
            "A checksum that the sender left out stays so on the way to the stack",
            world_with_partial_checksums(),
        )
        .then(
            Step::to_stack(
                &partial_remote,
                &rewritten(&partial_remote, binding(0), REMOTE.server),
            )
            .counts(REMOTE.opened()),
        ),
        Case::new(
            "A checksum that the sender left out stays so in generic XDP",
            world_with_partial_checksums(),
        )
        .then(
            Step::request(&partial, &to_server(&partial, binding(0), FULL.server))
                .program(Program::Generic)
                .counts(FULL.opened()),
        ),
        Case::new(
            "A checksum that the sender left out is computed where the frame turns back",
            world_with_partial_checksums(),
        )
        .then(
            Step::request(&same_side, &same_side_out)
                .verdict(Verdict::TRANSMIT)
                .counts(SAME_SIDE.opened()),
        ),
        Case::new(
            "A checksum that the sender left out is computed in DNAT",
            world_with_partial_checksums(),
        )
        .then(
            Step::request(&dnat, &to_server(&dnat, CLIENT, DNAT.server).checksum(Complete))
                .counts(DNAT.opened()),
        ),
        Case::new(
            "Padding is no part of a checksum of SCTP",
            world_with_partial_checksums(),
        )
        .then(
            Step::request(
                &padded,
                &to_server(&padded, binding(0), FULL.server).checksum(Complete),
            )
            .counts(FULL.opened()),
        ),
        Case::new(
            "A checksum that the sender left out is computed behind IP options",
            world_with_partial_checksums(),
        )
        .then(
            Step::request(
                &with_options,
                &to_server(&with_options, binding(0), FULL.server).checksum(Complete),
            )
            .counts(FULL.opened()),
        ),
    ]);
    cases
}

fn refusals() -> Vec<Case> {
    let mut none = world();
    none.backends
        .iter_mut()
        .for_each(|backend| backend.state = BackendState::UNHEALTHY);
    let mut full = world();
    full.free_flows.clear();
    let mut limited = world();
    limited
        .listener_mut(FULL.listener)
        .for_each(|listener| listener.max_flows = 1);
    let mut sourced = world();
    sourced.admit_source(FULL.listener, *OTHER_CLIENT.ip(), 32);
    let mut none_partial = none.clone();
    none_partial.settings.flags |= flag::PARTIAL_CHECKSUMS;
    let aborted = |packet: &Builder, reason| {
        Step::new(&CLIENT_SIDE, packet.build(), Verdict::TRANSMIT, reason).out(packet.refused_sctp().build())
    };
    let partial = init(FULL).checksum(Checksum::Partial);
    let second = from_client(chunk::INIT, OTHER_CLIENT, FULL);
    let with_options = init(FULL).options(vec![1; 8]);
    let partial_with_options = with_options.clone().checksum(Checksum::Partial);
    let inner = Builder::sctp(chunk::INIT, REMOTE.server, FULL.vip())
        .link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac)
        .payload(16);
    let unanswered = |packet: &Builder| Step::dropped(packet.build(), Reason::NO_BACKEND);
    let kept = aborted(&partial, Reason::NO_BACKEND)
        .out(partial.refused_sctp().checksum(Checksum::Partial).build())
        .program(Program::Generic);
    vec![
        Case::new(
            "An INIT that no backend takes is answered with an ABORT",
            none.clone(),
        )
        .then(aborted(&init(FULL), Reason::NO_BACKEND).counts(FULL.refused())),
        Case::new("An INIT with a long list of parameters is aborted", none.clone())
            .then(aborted(&init(FULL).payload(400), Reason::NO_BACKEND).counts(FULL.refused())),
        Case::new("An INIT with tags is aborted with the same tags", none.clone())
            .then(aborted(&init(FULL).vlans(&[7, 5]), Reason::NO_BACKEND).counts(FULL.refused()))
            .v4_only(),
        Case::new("An INIT with IP options is aborted without them", none.clone())
            .then(aborted(&with_options, Reason::NO_BACKEND).counts(FULL.refused())),
        Case::new(
            "An INIT without checksum is aborted with one",
            none_partial.clone(),
        )
        .then(aborted(&partial, Reason::NO_BACKEND).counts(FULL.refused())),
        Case::new(
            "An INIT whose checksum the kernel adds is aborted by a packet to which it adds one, too",
            none_partial.clone(),
        )
        .then(kept.counts(FULL.refused())),
        Case::new(
            "An INIT with IP options whose checksum the kernel adds is dropped",
            none_partial,
        )
        .then(
            unanswered(&partial_with_options)
                .program(Program::Generic)
                .counts(FULL.refused()),
        ),
        Case::new("A refused INIT out of a tunnel is dropped", none)
            .then(unanswered(&inner).in_tunnel().counts(FULL.refused())),
        Case::new("An INIT without a free flow is aborted", full)
            .then(aborted(&init(FULL), Reason::FLOW_TABLE_FULL).counts(FULL.not_bound())),
        Case::new("An INIT beyond a listener's limit is aborted", limited)
            .then(opening())
            .then(aborted(&second, Reason::LISTENER_LIMIT).counts(FULL.refused())),
        Case::new(
            "An INIT from elsewhere than a listener admits is dropped",
            sourced,
        )
        .then(Step::dropped(init(FULL).build(), Reason::SOURCE_NOT_ALLOWED)),
        Case::new("An INIT from a VIP is dropped", world()).then(Step::dropped(
            init(FULL).from(SocketAddrV4::new(VIP, 5000)).build(),
            Reason::OWN_SOURCE,
        )),
    ]
}

fn errors() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let name = family.name();
        for (nat, service, source) in [("full NAT", FULL, binding(0)), ("DNAT", DNAT, CLIENT)] {
            let request = init(service);
            let reply = from_server(chunk::INIT_ACK, service, source);
            let flow = Flow::of(family, service, source, request, reply);
            for (error, (text, ..)) in ERRORS.iter().enumerate() {
                let case = Case::new(
                    format!("\"{text}\" about SCTP in {nat} over {name} reaches either end"),
                    world(),
                );
                cases.push(
                    family.case(
                        case.then(flow.opened())
                            .then(flow.about_request(error, BEYOND, 1000))
                            .then(flow.about_reply(error, *CLIENT.ip(), 1000)),
                    ),
                );
            }
            for quoted in [8, 12, 20] {
                let case = Case::new(
                    format!("An error that quotes {quoted} bytes of SCTP in {nat} over {name} is translated"),
                    world(),
                );
                cases.push(
                    family.case(
                        case.then(flow.opened())
                            .then(flow.about_request(0, BEYOND, quoted))
                            .then(flow.about_reply(0, *CLIENT.ip(), quoted)),
                    ),
                );
            }
        }
        let expired = family.packet(&init(FULL).ttl(1));
        let case = Case::new(
            format!("A packet of SCTP over {name} whose time to live is 1 ends here"),
            world(),
        );
        cases.push(family.case(case.then(told(&CLIENT_SIDE, &expired, Reason::TTL_EXCEEDED, 0))));
    }
    cases
}

fn others() -> Vec<Case> {
    let frame = init(FULL).build();
    let ip_len = |len: u8| patched(frame.clone(), ETHERNET_LEN + 2, &[0, len]);
    let cut = |len: usize| init(FULL).build()[..len].to_vec();
    let truncated = |frame: Vec<u8>| Step::passed(frame, Reason::TRUNCATED);
    let no_port = |at: usize| patched(frame.clone(), at, &[0, 0]);
    let elsewhere = init(Service::new(2906, 0, 0, SERVER));
    let tunnel_link = |packet: Builder| packet.link(mac_of(*REMOTE.server.ip()), TUNNEL_SIDE.mac);
    let to_tunnel = init(REMOTE);
    let answer = tunnel_link(Builder::sctp(chunk::INIT_ACK, REMOTE.server, binding(0)).payload(8));
    let answer_out = rewritten(&answer, REMOTE.vip(), CLIENT).ttl(63);
    let owed = answer.clone().checksum(Checksum::Partial);
    let owed_out = answer_out.clone().checksum(Checksum::Partial);
    let first = init(FULL).fragment(0x2000).build();
    let later = init(FULL).fragment(0x0010).build();
    let opened_remote = || {
        Step::to_stack(&to_tunnel, &rewritten(&to_tunnel, binding(0), REMOTE.server)).counts(REMOTE.opened())
    };
    let stray = from_server(chunk::DATA, FULL, binding(3));
    vec![
        Case::new("SCTP to a port without listener passes", world())
            .then(Step::passed(elsewhere.build(), Reason::NO_LISTENER)),
        Case::new("SCTP to a VIP without any listener of it passes", {
            let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
            let backend = world.add_backend(*SERVER.ip(), 0, BackendState::HEALTHY);
            world.add_listener(VIP, 0, ICMP, NatMode::FULL, &[backend]);
            world
        })
        .then(Step::passed(init(FULL).build(), Reason::NO_LISTENER)),
        Case::new("SCTP to an SNAT address without a flow is dropped", world()).then(Step::new(
            &SERVER_SIDE,
            stray.build(),
            Verdict::DROP,
            Reason::NO_FLOW,
        )),
        Case::new("A frame that cuts the header of SCTP passes", world())
            .then(truncated(cut(ETHERNET_LEN + 20 + 15))),
        Case::new("An IP length that leaves SCTP no chunk passes", world()).then(truncated(ip_len(20 + 15))),
        Case::new("SCTP from port 0 passes", world()).then(truncated(no_port(ETHERNET_LEN + 20))),
        Case::new("SCTP to port 0 passes", world()).then(truncated(no_port(ETHERNET_LEN + 22))),
        Case::new("Fragments of SCTP pass", world())
            .then(Step::passed(first, Reason::UNSUPPORTED_PROTOCOL))
            .then(Step::passed(later, Reason::UNSUPPORTED_PROTOCOL)),
        Case::new("SCTP goes into a tunnel and comes back", world())
            .then(opened_remote())
            .then(
                Step::reply(&answer, &answer_out)
                    .in_tunnel()
                    .counts(REMOTE.first_answer()),
            ),
        Case::new(
            "A checksum that the kernel owes stays so out of a tunnel",
            world(),
        )
        .then(opened_remote())
        .then(
            Step::reply(&owed, &owed_out)
                .in_tunnel()
                .counts(REMOTE.first_answer()),
        ),
    ]
}
