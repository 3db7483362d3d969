//! What is true of IPv6 alone; what is true of both families is said in IPv4 and has a twin.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, DNS, REMOTE, SERVER, SNAT, Service, Step, VIP, WEB, binding, client_mac, query,
    segment_size, syn, world, world_with_mtu,
};
use crate::{
    packet::{Builder, Checksum, Mac, patched, segment},
    tables::{CLIENT_SIDE, SERVER_SIDE, in_v6, mac_of},
};

/// The twin of one end of a flow.
pub(super) fn at(address: SocketAddrV4) -> SocketAddr {
    (in_v6(*address.ip()), address.port()).into()
}

/// A SYN of the client's twin.
fn syn_v6(service: Service) -> Builder {
    syn(service).in_v6()
}

impl Builder {
    /// The packet between the twins of its addresses.
    pub(super) fn in_v6(self) -> Self {
        let (source, destination) = self.ends();
        let twin = |end: SocketAddr| match end {
            SocketAddr::V4(end) => at(end),
            SocketAddr::V6(_) => end,
        };
        self.from(twin(source)).to(twin(destination))
    }
}

/// A neighbour solicitation as Linux sends it: to the solicited-node group, with the sender's link address.
fn solicitation(target: Ipv6Addr) -> Builder {
    let group = {
        let [.., a, b, c] = target.octets();
        Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
    };
    neighbour_message(
        135,
        0,
        in_v6(*CLIENT.ip()),
        group,
        target,
        (1, client_mac(CLIENT)),
    )
    .link(client_mac(CLIENT), [0x33, 0x33, 0xff, 0, 0, 1])
    .ttl(255)
}

fn neighbour_message(
    kind: u8,
    flags: u32,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    target: Ipv6Addr,
    (option, mac): (u8, Mac),
) -> Builder {
    let body = [&target.octets()[..], &[option, 1], &mac].concat();
    Builder::icmp(kind, 0, source, destination)
        .icmp_rest(flags)
        .payload_of(&body)
}

/// The advertisement that answers it.
fn advertisement(target: Ipv6Addr) -> Builder {
    let client = in_v6(*CLIENT.ip());
    neighbour_message(136, 0x6000_0000, target, client, target, (2, CLIENT_SIDE.mac))
        .link(CLIENT_SIDE.mac, client_mac(CLIENT))
        .ttl(255)
}

pub(super) fn all() -> Vec<Case> {
    [neighbours(), headers(), messages(), sizes()]
        .concat()
        .into_iter()
        .map(Case::in_ipv6_world)
        .collect()
}

fn neighbours() -> Vec<Case> {
    let answered = |target: Ipv6Addr| {
        Step::new(
            &CLIENT_SIDE,
            solicitation(target).build(),
            Verdict::TRANSMIT,
            Reason::NEIGHBOUR_ANSWERED,
        )
        .out(advertisement(target).build())
    };
    let passed = |frame: Builder| Step::passed(frame.build(), Reason::NOT_OURS);
    let vip = in_v6(VIP);
    let nonce = [
        &vip.octets()[..],
        &[1, 1, 2, 0, 0, 0, 11, 10, 14, 1, 1, 2, 3, 4, 5, 6],
    ]
    .concat();
    vec![
        Case::new("A neighbour solicitation for a VIP is answered", world()).then(answered(vip)),
        Case::new(
            "A neighbour solicitation for an SNAT address is answered",
            world(),
        )
        .then(answered(in_v6(SNAT))),
        Case::new(
            "A neighbour solicitation for the mapped form of a VIP passes",
            world(),
        )
        .then(passed(solicitation(VIP.to_ipv6_mapped()))),
        Case::new("A neighbour solicitation for another address passes", world())
            .then(passed(solicitation(in_v6(*SERVER.ip())))),
        Case::new(
            "A neighbour solicitation that has passed a router passes",
            world(),
        )
        .then(passed(solicitation(vip).ttl(254))),
        Case::new("A search for a duplicate of a VIP passes", world())
            .then(passed(solicitation(vip).from((Ipv6Addr::UNSPECIFIED, 0)))),
        Case::new(
            "A neighbour solicitation without the sender's link address passes",
            world(),
        )
        .then(passed(solicitation(vip).payload_of(&vip.octets()))),
        Case::new("A neighbour solicitation with another option passes", world())
            .then(passed(solicitation(vip).payload_of(&nonce))),
        Case::new("A neighbour advertisement passes", world()).then(Step::passed(
            solicitation(vip).icmp_kind(136).build(),
            Reason::UNSUPPORTED_PROTOCOL,
        )),
    ]
}

fn headers() -> Vec<Case> {
    /// A header of options that says nothing: PadN (RFC 8200 §4.2).
    fn padding(units: usize) -> Vec<u8> {
        let mut bytes = vec![0; 8 * (units + 1)];
        bytes[1..4].copy_from_slice(&[units as u8, 1, (8 * units + 4) as u8]);
        bytes
    }
    let opened = |packet: &Builder| {
        let out = packet
            .clone()
            .link(SERVER_SIDE.mac, mac_of(*SERVER.ip()))
            .from(at(binding(0)))
            .to(at(SERVER))
            .ttl(63);
        Step::request(packet, &out).counts(WEB.opened())
    };
    let by_name = |number: u8| {
        let packet = syn_v6(WEB).extension(number, padding(0));
        Step::passed(packet.build(), Reason::EXTENSION_HEADER)
    };
    let mapped = |address: Ipv4Addr| SocketAddr::from((address.to_ipv6_mapped(), 50000));
    let three = syn_v6(WEB)
        .extension(0, padding(0))
        .extension(60, padding(2))
        .extension(60, padding(1));
    let mut cases = vec![
        Case::new("Hop-by-hop options are read over", world())
            .then(opened(&syn_v6(WEB).extension(0, padding(0)))),
        Case::new("Destination options are read over", world())
            .then(opened(&syn_v6(WEB).extension(60, padding(3)))),
        Case::new("Three headers of options are read over", world()).then(opened(&three)),
        Case::new("A fourth header of options passes by name", world()).then(Step::passed(
            three.clone().extension(60, padding(0)).build(),
            Reason::EXTENSION_HEADER,
        )),
        Case::new(
            "An extension header that is longer than the packet passes",
            world(),
        )
        .then(Step::passed(
            patched(syn_v6(WEB).extension(0, padding(0)).build(), 14 + 41, &[200]),
            Reason::TRUNCATED,
        )),
        Case::new("A traffic class is kept", world()).then(opened(&syn_v6(WEB).tos(0xb8))),
        Case::new("A packet from a mapped address passes", world()).then(Step::passed(
            syn_v6(WEB).from(mapped(*CLIENT.ip())).build(),
            Reason::MARTIAN,
        )),
        Case::new("A packet to a mapped address passes", world())
            .then(Step::passed(syn_v6(WEB).to(mapped(VIP)).build(), Reason::MARTIAN)),
        Case::new("A length of IPv6 that is longer than the frame passes", world()).then(Step::passed(
            patched(syn_v6(WEB).build(), 14 + 4, &[0, 21]),
            Reason::TRUNCATED,
        )),
        Case::new("A length of IPv6 that cuts the TCP header passes", world()).then(Step::passed(
            patched(syn_v6(WEB).build(), 14 + 4, &[0, 19]),
            Reason::TRUNCATED,
        )),
    ];
    for (number, name) in [
        (43, "routing header"),
        (50, "ESP"),
        (51, "AH"),
        (135, "mobility header"),
        (59, "nothing"),
    ] {
        cases.push(
            Case::new(format!("An IPv6 packet with {name} passes by name"), world()).then(by_name(number)),
        );
    }
    cases
}

fn messages() -> Vec<Case> {
    let echo = |kind: u8| {
        Builder::icmp(kind, 0, in_v6(*CLIENT.ip()), in_v6(VIP))
            .link(client_mac(CLIENT), CLIENT_SIDE.mac)
            .payload(56)
    };
    let reply = Builder::icmp(129, 0, in_v6(VIP), in_v6(*CLIENT.ip()))
        .link(CLIENT_SIDE.mac, client_mac(CLIENT))
        .payload(56);
    let mut full = world();
    full.free_flows.clear();
    let mut cases = vec![
        Case::new("An ICMPv6 echo request to a VIP is answered", world()).then(
            Step::new(
                &CLIENT_SIDE,
                echo(128).build(),
                Verdict::TRANSMIT,
                Reason::ECHO_ANSWERED,
            )
            .out(reply.build()),
        ),
        Case::new("An ICMPv6 echo reply to a VIP passes", world())
            .then(Step::passed(echo(129).build(), Reason::UNSUPPORTED_PROTOCOL)),
        Case::new("ICMP of IPv4 in an IPv6 packet passes", world()).then(Step::passed(
            patched(echo(128).build(), 14 + 6, &[1]),
            Reason::UNSUPPORTED_PROTOCOL,
        )),
    ];
    for len in [0, 1, 100, 1224, 1225, 1400] {
        let packet = query(DNS).in_v6().payload(len);
        cases.push(
            Case::new(
                format!("A refused datagram of IPv6 with {len} bytes is answered with \"port unreachable\""),
                full.clone(),
            )
            .then(Step::unreachable(&packet, Reason::FLOW_TABLE_FULL).counts(DNS.not_bound())),
        );
    }
    cases
}

fn sizes() -> Vec<Case> {
    // What 1450 bytes leave behind the two headers.
    const LARGEST: u16 = 1390;
    let announcing = |packet: Builder, bytes| packet.tcp_options(segment_size(bytes));
    let to_server = |packet: Builder| {
        packet
            .link(SERVER_SIDE.mac, mac_of(*SERVER.ip()))
            .from(at(binding(0)))
            .to(at(SERVER))
            .ttl(63)
    };
    let request = |from: u16, to: u16| {
        let packet = announcing(syn_v6(WEB), from);
        Step::request(&packet, &to_server(announcing(syn_v6(WEB), to))).counts(WEB.opened())
    };
    let remote = announcing(syn_v6(REMOTE), 1440);
    let remote_out = announcing(syn_v6(REMOTE), LARGEST)
        .from(at(binding(0)))
        .to(at(REMOTE.server));
    let partial = announcing(syn_v6(WEB), 1440).checksum(Checksum::Partial);
    vec![
        Case::new(
            "A SYN's segment size in IPv6 is lowered to what its way carries",
            world_with_mtu(),
        )
        .then(request(1440, LARGEST)),
        Case::new(
            "A SYN's segment size in IPv6 that just fits is left alone",
            world_with_mtu(),
        )
        .then(request(LARGEST, LARGEST)),
        Case::new(
            "A SYN of IPv6 into a tunnel announces what the tunnel carries",
            world_with_mtu(),
        )
        .then(Step::to_stack(&remote, &remote_out).counts(REMOTE.opened())),
        Case::new(
            "A partial checksum of IPv6 is completed over the lowered segment size",
            world_with_mtu(),
        )
        .then(Step::request(&partial, &to_server(announcing(syn_v6(WEB), LARGEST))).counts(WEB.opened())),
        Case::new("A segment of IPv6 without a flow is dropped", world()).then(Step::dropped(
            syn_v6(WEB).flags(segment::ACK).build(),
            Reason::NOT_A_SYN,
        )),
    ]
}
