//! Clients of one family, backends of the other: whole packets. Fragments and ICMP errors have files of their own.

use std::net::{SocketAddr, SocketAddrV4};

use forwarder_common::{
    abi::{
        backend::{BackendState, NatMode},
        reason::Reason,
        settings::flag,
        snat::SnatRange,
    },
    datapath::Verdict,
    wire::IpAddress,
};

use super::{
    CLIENT, Case, ICMP, SCTP, SERVER, SNAT, SNAT_COUNT, Service, Step, TCP, UDP, UDP_SERVER, VIP, binding,
    client_mac, ipv6::at, segment_size, server,
};
use crate::{
    packet::{Builder, Checksum, chunk, segment},
    tables::{CLIENT_SIDE, MemoryTables, SERVER_SIDE, TUNNEL_SIDE, in_v6, mac_of},
};

pub(super) const WEB: Service = Service::new(80, 0, 0, SERVER);
pub(super) const DNS: Service = Service::new(53, 1, 1, UDP_SERVER);
pub(super) const REMOTE: Service = Service::new(81, 2, 2, server([192, 168, 1, 20]));
pub(super) const SIGNALLING: Service = Service::new(2905, 3, 3, SERVER);
pub(super) const ECHO: Service = Service::new(0, 4, 4, SERVER);
const REMOTE_DNS: Service = Service::new(54, 5, 5, server([192, 168, 1, 20]));

/// Which way requests are translated.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub(super) is_client_v4: bool,
}

pub(super) const WAYS: [Way; 2] = [Way { is_client_v4: false }, Way { is_client_v4: true }];

impl Way {
    pub(super) fn name(self) -> &'static str {
        if self.is_client_v4 {
            "IPv4 to IPv6"
        } else {
            "IPv6 to IPv4"
        }
    }

    pub(super) fn client_side(self, end: SocketAddrV4) -> SocketAddr {
        if self.is_client_v4 { end.into() } else { at(end) }
    }

    pub(super) fn server_side(self, end: SocketAddrV4) -> SocketAddr {
        if self.is_client_v4 { at(end) } else { end.into() }
    }

    pub(super) fn world(self) -> MemoryTables {
        let mut world = MemoryTables::new(SNAT, SNAT_COUNT);
        world.settings.pool.v6.runs[0] = SnatRange {
            first: in_v6(SNAT).into(),
            count: SNAT_COUNT,
        };
        let services = [
            (WEB, TCP),
            (DNS, UDP),
            (REMOTE, TCP),
            (SIGNALLING, SCTP),
            (ECHO, ICMP),
            (REMOTE_DNS, UDP),
        ];
        for (service, protocol) in services {
            let address = self.server_side(service.server).ip();
            let backend =
                world.add_backend(*service.server.ip(), service.server.port(), BackendState::HEALTHY);
            world.backends[backend.0 as usize].address = address.into();
            world.add_listener(VIP, service.port, protocol, NatMode::FULL, &[backend; 4]);
        }
        if !self.is_client_v4 {
            let vip = IpAddress::from(in_v6(VIP));
            world.vips = world
                .vips
                .drain()
                .map(|(mut key, value)| {
                    key.address = vip;
                    (key, value)
                })
                .collect();
            world.note_addresses();
            world.listeners = world
                .listeners
                .drain()
                .map(|(mut key, value)| {
                    key.vip = vip;
                    (key, value)
                })
                .collect();
        }
        world
    }

    pub(super) fn request(self, service: Service, packet: Builder) -> (Builder, Builder) {
        let packet = packet
            .link(client_mac(CLIENT), CLIENT_SIDE.mac)
            .from(self.client_side(CLIENT))
            .to(self.client_side(service.vip()));
        let out = self
            .leaving(&packet)
            .from(self.server_side(binding(0)))
            .to(self.server_side(service.server));
        (packet, out)
    }

    pub(super) fn reply(self, service: Service, packet: Builder) -> (Builder, Builder) {
        let packet = packet
            .link(mac_of(*service.server.ip()), SERVER_SIDE.mac)
            .from(self.server_side(service.server))
            .to(self.server_side(binding(0)));
        let out = self
            .leaving(&packet)
            .from(self.client_side(service.vip()))
            .to(self.client_side(CLIENT))
            .link(CLIENT_SIDE.mac, client_mac(CLIENT));
        (packet, out.ttl(63))
    }

    /// A packet as it leaves, but for its addresses.
    fn leaving(self, packet: &Builder) -> Builder {
        packet.clone().options(Vec::new()).without_extensions().vlans(&[])
    }
}

/// A translated packet's frame: of IPv4, small ones may be fragmented and are told apart by their transport checksum.
pub(super) fn frame(out: &Builder) -> Vec<u8> {
    let frame = out.build();
    let (source, _) = out.ends();
    if source.is_ipv6() {
        return frame;
    }
    let total_len = u16::from_be_bytes([frame[16], frame[17]]);
    if total_len > 1260 {
        return out.clone().identification(0).fragment(0x4000).build();
    }
    let at = 34
        + match frame[23] {
            TCP => 16,
            UDP => 6,
            SCTP => 8,
            _ => 2,
        };
    let checksum = u16::from_be_bytes([frame[at], frame[at + 1]]);
    out.clone().identification(checksum).fragment(0).build()
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in WAYS {
        let name = way.name();
        let tcp = |flags: u8| Builder::tcp(flags, CLIENT, WEB.vip());
        let udp = || Builder::udp(CLIENT, DNS.vip());
        let request = |service: Service, packet: Builder| {
            let (packet, out) = way.request(service, packet);
            let out = out.link(SERVER_SIDE.mac, mac_of(*service.server.ip())).ttl(63);
            let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
            Step::new(&CLIENT_SIDE, packet.build(), verdict, Reason::REQUEST_FORWARDED).out(frame(&out))
        };
        let reply = |service: Service, packet: Builder| {
            let (packet, out) = way.reply(service, packet);
            let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
            Step::new(&SERVER_SIDE, packet.build(), verdict, Reason::REPLY_FORWARDED).out(frame(&out))
        };
        let opened = || request(WEB, tcp(segment::SYN)).counts(WEB.opened());
        let case = |sentence: &str| Case::new(format!("{sentence}, {name}"), way.world()).v4_only();
        cases.push(case("A connection is translated both ways").all([
            opened(),
            reply(WEB, Builder::tcp(segment::SYN_ACK, SERVER, binding(0))).counts(WEB.first_answer()),
            request(WEB, tcp(segment::ACK).payload(7)).counts(WEB.request()),
            reply(WEB, Builder::tcp(segment::ACK, SERVER, binding(0)).payload(1300)).counts(WEB.reply()),
        ]));
        for len in [0, 1, 33, 1231, 1232, 1233, 1300] {
            cases.push(
                case(&format!("A datagram of {len} bytes is translated"))
                    .then(request(DNS, udp().payload(len)).counts(DNS.opened())),
            );
        }
        cases.push(
            case("An association of SCTP is translated both ways").all([
                request(
                    SIGNALLING,
                    Builder::sctp(chunk::INIT, CLIENT, SIGNALLING.vip()).payload(16),
                )
                .counts(SIGNALLING.opened()),
                reply(
                    SIGNALLING,
                    Builder::sctp(chunk::INIT_ACK, SERVER, binding(0)).payload(200),
                )
                .counts(SIGNALLING.first_answer()),
                request(
                    SIGNALLING,
                    Builder::sctp(chunk::DATA, CLIENT, SIGNALLING.vip()).payload(1300),
                )
                .counts(SIGNALLING.request()),
            ]),
        );
        for len in [0, 1, 56, 1300] {
            cases.push(
                case(&format!("An echo of {len} bytes is translated both ways")).all([
                    request(ECHO, Builder::echo_request(CLIENT, ECHO.vip()).payload(len))
                        .counts(ECHO.opened()),
                    reply(ECHO, Builder::echo_reply(SERVER, binding(0)).payload(len))
                        .counts(ECHO.first_answer()),
                ]),
            );
        }
        cases.push(
            case("The traffic class stays")
                .then(request(WEB, tcp(segment::SYN).tos(0xb8)).counts(WEB.opened())),
        );
        cases.push(
            case("Tags are taken off")
                .then(request(WEB, tcp(segment::SYN).vlans(&[7, 5])).counts(WEB.opened())),
        );
        if way.is_client_v4 {
            cases.push(
                case("Options are left out")
                    .then(request(WEB, tcp(segment::SYN).options(vec![1; 8])).counts(WEB.opened())),
            );
            let (packet, _) = way.request(DNS, udp().payload(33).checksum(Checksum::Fixed(0)));
            let (_, out) = way.request(DNS, udp().payload(33));
            let out = out.link(SERVER_SIDE.mac, mac_of(*DNS.server.ip())).ttl(63);
            let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
            cases.push(
                case("A datagram without a checksum gets one").then(
                    Step::new(&CLIENT_SIDE, packet.build(), verdict, Reason::REQUEST_FORWARDED)
                        .out(frame(&out))
                        .counts(DNS.opened()),
                ),
            );
            let (packet, _) = way.request(
                DNS,
                udp()
                    .payload(5)
                    .surplus(9)
                    .padding(4)
                    .checksum(Checksum::Fixed(0)),
            );
            let (_, out) = way.request(DNS, udp().payload(5).surplus(9).padding(4));
            let out = out.link(SERVER_SIDE.mac, mac_of(*DNS.server.ip())).ttl(63);
            cases.push(
                case("What is behind a datagram in its packet and frame is not under its checksum").then(
                    Step::new(&CLIENT_SIDE, packet.build(), verdict, Reason::REQUEST_FORWARDED)
                        .out(frame(&out))
                        .counts(DNS.opened()),
                ),
            );
        } else {
            let options = [0, 0, 1, 4, 0, 0, 0, 0].to_vec();
            cases.push(
                case("Extension headers are left out").then(
                    request(WEB, tcp(segment::SYN).in_v6().extension(60, options)).counts(WEB.opened()),
                ),
            );
        }
        let (packet, out) = way.request(REMOTE, Builder::tcp(segment::SYN, CLIENT, REMOTE.vip()));
        cases.push(
            case("A request into a tunnel is translated for the stack").then(
                Step::passed(packet.build(), Reason::REQUEST_TO_STACK)
                    .out(frame(&out))
                    .counts(REMOTE.opened()),
            ),
        );
        if !way.is_client_v4 {
            let (packet, out) = way.request(REMOTE_DNS, Builder::udp(CLIENT, REMOTE_DNS.vip()));
            let opened = Step::passed(packet.build(), Reason::REQUEST_TO_STACK)
                .out(frame(&out))
                .counts(REMOTE_DNS.opened());
            let answer = |checksum: Option<Checksum>| {
                let answer = Builder::udp(REMOTE_DNS.server, binding(0)).payload(33);
                way.reply(
                    REMOTE_DNS,
                    match checksum {
                        Some(checksum) => answer.checksum(checksum),
                        None => answer,
                    },
                )
            };
            let link = |packet: Builder| packet.link(mac_of(*REMOTE_DNS.server.ip()), TUNNEL_SIDE.mac);
            let packet = link(answer(Some(Checksum::Fixed(0))).0).build();
            let mut out = link(answer(None).1).build();
            // The kernel writes the link header as it sends.
            out[12..14].copy_from_slice(&packet[12..14]);
            let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
            let reply = Step::new(&TUNNEL_SIDE, packet, verdict, Reason::REPLY_FORWARDED)
                .in_tunnel()
                .out(out)
                .counts(REMOTE_DNS.first_answer());
            cases.push(
                case("A datagram without a checksum out of a tunnel gets one")
                    .then(opened)
                    .then(reply),
            );
        }
        let mut partial = way.world();
        partial.settings.flags |= flag::PARTIAL_CHECKSUMS;
        let syn = || tcp(segment::SYN).payload(1).padding(5);
        let answer = || {
            Builder::tcp(segment::SYN_ACK, SERVER, binding(0))
                .payload(1)
                .padding(5)
        };
        let (sent, _) = way.request(WEB, syn());
        let (answered, _) = way.reply(WEB, answer());
        cases.push(
            Case::new(
                format!("A partial checksum is completed over the packet and not over its padding, {name}"),
                partial,
            )
            .v4_only()
            .all([
                Step {
                    frame: sent.checksum(Checksum::Partial).build(),
                    ..request(WEB, syn()).counts(WEB.opened())
                },
                Step {
                    frame: answered.checksum(Checksum::Partial).build(),
                    ..reply(WEB, answer()).counts(WEB.first_answer())
                },
            ]),
        );
        let mut clamped = way.world();
        for interface in clamped.interfaces.values_mut() {
            interface.mtu_bytes = 1500;
        }
        let (packet, _) = way.request(WEB, tcp(segment::SYN).tcp_options(segment_size(1460)));
        let (_, out) = way.request(WEB, tcp(segment::SYN).tcp_options(segment_size(1440)));
        let out = out.link(SERVER_SIDE.mac, mac_of(*SERVER.ip())).ttl(63);
        let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
        cases.push(
            Case::new(
                format!("A segment size has to fit the longer header, {name}"),
                clamped,
            )
            .v4_only()
            .then(
                Step::new(&CLIENT_SIDE, packet.build(), verdict, Reason::REQUEST_FORWARDED)
                    .out(frame(&out))
                    .counts(WEB.opened()),
            ),
        );
    }
    cases
}
