//! Tunnels that the programs handle themselves: every kind, over both families, around both families.
//!
//! The tunnel device is the interface `tunnel0`, behind which [`REMOTE`]'s server is; the far end is a host on the
//! servers' side, so what goes into the tunnel leaves there and what comes out of it came in there.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use forwarder_common::{
    abi::{
        flow::FlowKey,
        reason::Reason,
        settings::flag,
        tunnel::{PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHopKey, TunnelKind, TunnelPort},
    },
    datapath::{Verdict, hash::flow_hash},
    outer::{Far, Inner},
    wire::{Be16, Be32, IpAddress, LinkPair, MacAddress, tunnel::vni_word},
};

use super::{
    CLIENT, Case, DNS, REMOTE, Step, Traffic, UNRESOLVED_CLIENT, VIP, binding, client_mac,
    fragments::{cut, cut_v6},
    from_client, query, to_client, to_server, world,
};
use crate::{
    packet::{self, Builder, Checksum, ETHERNET_LEN, patched, segment},
    tables::{CLIENT_SIDE, MemoryTables, SERVER_SIDE, TUNNEL_SIDE, V6_PREFIX, in_v6, mac_of},
    tunnel::{Carrier, ECN_BEHIND, Outer, geneve, gue, vxlan},
};

/// A host on the servers' side.
const FAR: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 206);
const VNI: u32 = 4242;
const KEY: u32 = 0x0102_0304;
const OPTIONS: [u8; 8] = [0x01, 0x02, 0x03, 0x01, 0xde, 0xad, 0xbe, 0xef];

/// A way to carry packets.
#[derive(Clone, Copy)]
struct Tunnel {
    name: &'static str,
    kind: TunnelKind,
    id: Option<u32>,
    port: u16,
    options: &'static [u8],
}

const fn tunnel(name: &'static str, kind: TunnelKind, id: Option<u32>, port: u16) -> Tunnel {
    Tunnel {
        name,
        kind,
        id,
        port,
        options: &[],
    }
}

const VXLAN: Tunnel = tunnel("VXLAN", TunnelKind::VXLAN, Some(VNI), 4789);

const TUNNELS: [Tunnel; 9] = [
    VXLAN,
    tunnel("Geneve", TunnelKind::GENEVE, Some(VNI), 6081),
    Tunnel {
        options: &OPTIONS,
        ..tunnel("Geneve with options", TunnelKind::GENEVE, Some(VNI), 6081)
    },
    tunnel("GRE", TunnelKind::GRE, None, 0),
    tunnel("GRE with a key", TunnelKind::GRE, Some(KEY), 0),
    tunnel("GRETAP", TunnelKind::GRETAP, None, 0),
    tunnel("IPIP", TunnelKind::IPIP, None, 0),
    tunnel("FOU", TunnelKind::FOU, None, 5555),
    tunnel("GUE", TunnelKind::GUE, None, 5556),
];

/// A tunnel between addresses of one family that carries packets of another.
#[derive(Clone, Copy)]
pub(super) struct Setting {
    tunnel: Tunnel,
    is_v6: bool,
    is_inner_v6: bool,
}

impl Setting {
    /// The tunnel of this name, over IPv4 or IPv6, around IPv4.
    pub(super) fn named(name: &str, is_v6: bool) -> Option<Self> {
        let tunnel = TUNNELS.into_iter().find(|tunnel| tunnel.name == name)?;
        Some(Self {
            tunnel,
            is_v6,
            is_inner_v6: false,
        })
    }

    fn end(&self, address: Ipv4Addr) -> IpAddr {
        if self.is_v6 {
            in_v6(address).into()
        } else {
            address.into()
        }
    }

    fn inner(&self) -> Inner {
        if self.is_inner_v6 {
            Inner::Ipv6
        } else {
            Inner::Ipv4
        }
    }

    /// Tables with the tunnel.
    pub(super) fn world(&self) -> MemoryTables {
        let mut world = if self.is_inner_v6 {
            Case::new("", world()).in_ipv6_world().world
        } else {
            world()
        };
        let Tunnel { kind, id, port, .. } = self.tunnel;
        let far: IpAddress = self.end(FAR).into();
        let near: IpAddress = self.end(SERVER_SIDE.address).into();
        let next = MacAddress::new(mac_of(*REMOTE.server.ip()));
        let peer = Far {
            inner: self.inner(),
            id,
            port,
            options: self.tunnel.options,
            link: LinkPair::new(next, MacAddress::new(TUNNEL_SIDE.mac)),
            has_checksum: true,
            ifindex: TUNNEL_SIDE.ifindex,
            ..Far::new(kind, near, far)
        };
        world
            .tunnel_peers
            .insert(PeerId(1), peer.peer().expect("a possible tunnel"));
        let key = TunnelHopKey {
            ifindex: TUNNEL_SIDE.ifindex,
            // What a neighbour's link address is on devices without Ethernet is of no meaning.
            mac: if kind.is_ethernet() {
                next
            } else {
                MacAddress::default()
            },
            version: if self.is_inner_v6 { 6 } else { 4 },
        };
        world.tunnel_hops.insert(key, PeerId(1));

        let is_vni = matches!(kind, TunnelKind::VXLAN | TunnelKind::GENEVE);
        let is_gre = matches!(kind, TunnelKind::GRE | TunnelKind::GRETAP);
        let detail = match (is_vni, is_gre) {
            (true, _) => 0,
            (_, true) => u8::from(id.is_some()),
            _ => self.inner().protocol(),
        };
        let key = TunnelEndpointKey {
            local: near,
            remote: if kind == TunnelKind::VXLAN {
                IpAddress::UNSPECIFIED
            } else {
                far
            },
            id: if is_vni {
                vni_word(VNI)
            } else {
                Be32::new(id.unwrap_or(0))
            },
            port: Be16::new(port),
            kind,
            detail,
        };
        let endpoint = TunnelEndpoint {
            ifindex: TUNNEL_SIDE.ifindex,
            mtu_bytes: 0,
            mac: MacAddress::new(TUNNEL_SIDE.mac),
            reserved: 0,
        };
        world.tunnel_endpoints.insert(key, endpoint);
        if kind.is_udp() {
            let meaning = TunnelPort {
                kind,
                reserved: [0; 3],
            };
            world.tunnel_ports.insert(port, meaning);
        }
        world.settings.flags |= flag::TUNNELS;
        world
    }

    /// The outer headers of a packet with this hash; those that come in if `is_received`.
    fn outer(&self, hash: u32, is_received: bool) -> Outer {
        let Tunnel { kind, id, port, .. } = self.tunnel;
        let header = match kind {
            TunnelKind::VXLAN => vxlan(VNI),
            TunnelKind::GENEVE => geneve(VNI, 0, self.tunnel.options),
            TunnelKind::GUE => gue(self.inner().protocol()),
            _ => Vec::new(),
        };
        let carrier = match kind {
            TunnelKind::GRE | TunnelKind::GRETAP => Carrier::Gre { key: id },
            TunnelKind::IPIP => Carrier::Plain,
            _ => Carrier::Udp {
                ports: (49152 + (hash >> 18) as u16, port),
                has_checksum: true,
                header,
            },
        };
        let (near, far) = ((SERVER_SIDE.mac, SERVER_SIDE.address), (mac_of(FAR), FAR));
        let inner = (TUNNEL_SIDE.mac, mac_of(*REMOTE.server.ip()));
        let (from, to, inner) = if is_received {
            (far, near, (inner.1, inner.0))
        } else {
            (near, far, inner)
        };
        Outer {
            source_mac: from.0,
            destination_mac: to.0,
            source: self.end(from.1),
            destination: self.end(to.1),
            ttl: 64,
            tos: 0,
            identification: 0,
            fragment: 0x4000,
            flow_label: if kind.is_udp() { 0 } else { hash & 0xf_ffff },
            limit: None,
            carrier,
            inner_link: kind.is_ethernet().then_some(inner),
        }
    }

    /// The frame in the family of the inner packets.
    fn frame(&self, builder: &Builder) -> Vec<u8> {
        let frame = builder.build();
        if self.is_inner_v6 {
            packet::in_ipv6(&frame, V6_PREFIX).expect("a packet with a twin")
        } else {
            frame
        }
    }

    fn hash(&self) -> u32 {
        self.hash_with_ports(CLIENT.port(), REMOTE.port)
    }

    /// Later fragments have none.
    fn hash_with_ports(&self, source_port: u16, destination_port: u16) -> u32 {
        let address = |address: Ipv4Addr| -> IpAddress {
            if self.is_inner_v6 {
                in_v6(address).into()
            } else {
                address.into()
            }
        };
        let key = FlowKey {
            source: address(*CLIENT.ip()),
            destination: address(VIP),
            source_port: Be16::new(source_port),
            destination_port: Be16::new(destination_port),
            protocol: 6,
        };
        flow_hash(&key, 0x5eed)
    }

    /// A packet's fragments of 64 bytes of payload.
    fn pieces(&self, packet: &Builder) -> Vec<Vec<u8>> {
        let frame = self.frame(packet);
        if self.is_inner_v6 {
            cut_v6(&frame, 64)
        } else {
            cut(&frame, 64)
        }
    }

    /// A request of [`CLIENT`] in three fragments goes into the tunnel.
    fn request_in_pieces(&self, packet: &Builder) -> Vec<Step> {
        let outs = self.pieces(&to_server(packet, binding(0), REMOTE.server));
        let later = self.hash_with_ports(0, 0);
        let hashes = [self.hash(), later, later];
        let steps = self.pieces(packet).into_iter().zip(outs).zip(hashes);
        steps
            .map(|((frame, out), hash)| {
                let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
                Step::new(&CLIENT_SIDE, frame, verdict, Reason::REQUEST_FORWARDED)
                    .out(self.outer(hash, false).around(&out))
            })
            .collect()
    }

    /// A reply in three fragments comes out of the tunnel.
    fn reply_in_pieces(&self, inner: &Builder) -> Vec<Step> {
        let outs = self.pieces(&to_client(inner, REMOTE.vip(), CLIENT));
        let steps = self.pieces(inner).into_iter().zip(outs);
        steps
            .map(|(frame, out)| {
                Step::new(
                    &SERVER_SIDE,
                    self.outer(0, true).around(&frame),
                    Verdict::redirect(CLIENT_SIDE.ifindex),
                    Reason::REPLY_FORWARDED,
                )
                .inside(frame)
                .out(out)
            })
            .collect()
    }

    /// A request of [`CLIENT`] goes into the tunnel.
    fn request(&self, packet: &Builder) -> Step {
        let out = self.frame(&to_server(packet, binding(0), REMOTE.server));
        let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
        Step::new(
            &CLIENT_SIDE,
            self.frame(packet),
            verdict,
            Reason::REQUEST_FORWARDED,
        )
        .out(self.outer(self.hash(), false).around(&out))
    }

    /// What comes out of the tunnel, whole.
    pub(super) fn received(&self, inner: &Builder) -> Vec<u8> {
        self.outer(0, true).around(&self.frame(inner))
    }

    /// A reply comes out of the tunnel and goes to the client.
    fn reply(&self, inner: &Builder) -> Step {
        let out = self.frame(&to_client(inner, REMOTE.vip(), CLIENT));
        let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
        Step::new(
            &SERVER_SIDE,
            self.received(inner),
            verdict,
            Reason::REPLY_FORWARDED,
        )
        .inside(self.frame(inner))
        .out(out)
    }

    /// What comes out of the tunnel is left to its device.
    fn to_device(self, inner: &Builder) -> Step {
        let frame = self.received(inner);
        Step::new(&SERVER_SIDE, frame, Verdict::PASS, Reason::TUNNEL_TO_STACK)
    }
}

/// A segment of the server behind the tunnel.
fn from_remote(flags: u8) -> Builder {
    Builder::tcp(flags, REMOTE.server, binding(0))
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for tunnel in TUNNELS {
        for (is_v6, outer) in [(false, "IPv4"), (true, "IPv6")] {
            for (is_inner_v6, inner) in [(false, "IPv4"), (true, "IPv6")] {
                let setting = Setting {
                    tunnel,
                    is_v6,
                    is_inner_v6,
                };
                cases.extend(carried(
                    &setting,
                    &format!("{inner} in {} over {outer}", tunnel.name),
                ));
            }
        }
    }
    cases.extend(edges());
    cases.extend(established());
    cases.into_iter().map(Case::v4_only).collect()
}

/// A connection through a tunnel, and what of it is the kernel's.
fn carried(setting: &Setting, name: &str) -> [Case; 4] {
    let request = |flags, payload| from_client(flags, CLIENT, REMOTE).payload(payload);
    let connection = [
        setting.request(&request(segment::SYN, 0)).counts(REMOTE.opened()),
        setting
            .reply(&from_remote(segment::SYN_ACK))
            .counts(REMOTE.first_answer()),
        setting
            .request(&request(segment::ACK, 33))
            .counts(REMOTE.request()),
        setting
            .reply(&from_remote(segment::ACK).payload(101))
            .counts(REMOTE.reply()),
    ];
    let syn = Builder::tcp(segment::SYN, REMOTE.server, REMOTE.vip());
    [
        Case::new(format!("A connection goes through {name}"), setting.world()).all(connection),
        Case::new(format!("Fragments go through {name}"), setting.world())
            .all(in_order(
                setting.request_in_pieces(&request(segment::SYN, 109)),
                [REMOTE.opened(), REMOTE.request(), REMOTE.request()],
            ))
            .all(in_order(
                setting.reply_in_pieces(&from_remote(segment::SYN_ACK).payload(109)),
                [REMOTE.first_answer(), REMOTE.reply(), REMOTE.reply()],
            )),
        Case::new(format!("A SYN out of {name} is its device's"), setting.world())
            .then(setting.to_device(&syn)),
        Case::new(
            format!("A stranger's reply out of {name} is dropped"),
            setting.world(),
        )
        .then(Step::new(
            &SERVER_SIDE,
            setting.received(&from_remote(segment::ACK)),
            Verdict::DROP,
            Reason::NO_FLOW,
        )),
    ]
}

/// Steps with what they count.
fn in_order(steps: Vec<Step>, counts: [Traffic; 3]) -> impl Iterator<Item = Step> {
    steps
        .into_iter()
        .zip(counts)
        .map(|(step, counts)| step.counts(counts))
}

/// What is true of all kinds, shown of one.
fn edges() -> Vec<Case> {
    let setting = Setting {
        tunnel: VXLAN,
        is_v6: false,
        is_inner_v6: false,
    };
    let opening = || {
        let syn = from_client(segment::SYN, CLIENT, REMOTE);
        setting.request(&syn).counts(REMOTE.opened())
    };
    let case = |sentence: &str, step: Step| Case::new(sentence, setting.world()).then(opening()).then(step);
    let reply = from_remote(segment::SYN_ACK);
    // RFC 3168: ECT(0) inside, congestion experienced outside.
    let marked = |inner_tos: u8| {
        let mut outer = setting.outer(0, true);
        outer.tos = 3;
        outer.around(&with_tos(reply.build(), inner_tos))
    };
    let out = to_client(&reply, REMOTE.vip(), CLIENT).build();
    let to_server_side = |frame, verdict, reason| Step::new(&SERVER_SIDE, frame, verdict, reason);
    let stranger = |change: fn(&mut Outer)| {
        let mut outer = setting.outer(0, true);
        change(&mut outer);
        outer.around(&reply.build())
    };
    let echo = Builder::icmp(8, 0, *REMOTE.server.ip(), VIP).payload(56);
    let unresolved_syn = from_client(segment::SYN, UNRESOLVED_CLIENT, REMOTE)
        .link(client_mac(UNRESOLVED_CLIENT), CLIENT_SIDE.mac);
    let unresolved_out = to_server(&unresolved_syn, binding(0), REMOTE.server).build();
    let unresolved_key = FlowKey {
        source: (*UNRESOLVED_CLIENT.ip()).into(),
        destination: VIP.into(),
        source_port: Be16::new(UNRESOLVED_CLIENT.port()),
        destination_port: Be16::new(REMOTE.port),
        protocol: 6,
    };
    let unresolved = Step::new(
        &CLIENT_SIDE,
        unresolved_syn.build(),
        Verdict::redirect(SERVER_SIDE.ifindex),
        Reason::REQUEST_FORWARDED,
    )
    .out(
        setting
            .outer(flow_hash(&unresolved_key, 0x5eed), false)
            .around(&unresolved_out),
    );
    let stripped =
        Builder::tcp(segment::SYN_ACK, REMOTE.vip(), UNRESOLVED_CLIENT).link(mac_of(FAR), SERVER_SIDE.mac);
    vec![
        case(
            "A mark of congestion outside is carried over to a packet whose sender looks at it",
            to_server_side(
                marked(2),
                Verdict::redirect(CLIENT_SIDE.ifindex),
                Reason::REPLY_FORWARDED,
            )
            .inside(reply.build())
            .out(with_tos(out, 3))
            .counts(REMOTE.first_answer()),
        ),
        case(
            "A packet whose sender does not look at marks of congestion is dropped in place of one",
            to_server_side(marked(0), Verdict::DROP, Reason::CONGESTION_UNHEARD),
        ),
        case(
            "A packet of another network passes, though it came in at our port",
            to_server_side(
                stranger(|outer| {
                    outer.carrier = Carrier::Udp {
                        ports: (50000, 4789),
                        has_checksum: false,
                        header: vxlan(VNI + 1),
                    };
                }),
                Verdict::PASS,
                Reason::NOT_OURS,
            ),
        ),
        case(
            "A frame for somebody else inside of the tunnel passes",
            to_server_side(
                stranger(|outer| outer.inner_link = Some(([2, 0, 0, 0, 0, 9], [0xff; 6]))),
                Verdict::PASS,
                Reason::NOT_OURS,
            ),
        ),
        case(
            "An echo request out of the tunnel is its device's",
            setting.to_device(&echo),
        ),
        case(
            "A packet out of the tunnel whose time has come is its device's to answer",
            setting.to_device(&reply.clone().ttl(1)),
        ),
        Case::new(
            "A reply that the stack has to route leaves its tunnel behind",
            setting.world(),
        )
        .then(unresolved.counts(REMOTE.opened()))
        .then(
            to_server_side(setting.received(&reply), Verdict::PASS, Reason::REPLY_TO_STACK)
                .inside(reply.build())
                .out(stripped.build())
                .counts(REMOTE.first_answer()),
        ),
        Case::new(
            "A SYN goes to the stack while the far end's neighbour is not known",
            {
                let mut world = setting.world();
                for peer in world.tunnel_peers.values_mut() {
                    peer.remote = Ipv4Addr::new(172, 17, 0, 99).into();
                }
                world
            },
        )
        .then({
            let syn = from_client(segment::SYN, CLIENT, REMOTE);
            let out = syn.clone().from(binding(0)).to(REMOTE.server);
            Step::to_stack(&syn, &out).counts(REMOTE.opened())
        }),
    ]
}

/// What the packets of flows that are known show, which take the short way.
fn established() -> [Case; 2] {
    let setting = Setting {
        tunnel: VXLAN,
        is_v6: false,
        is_inner_v6: false,
    };
    let handshake = [
        setting
            .request(&from_client(segment::SYN, CLIENT, REMOTE))
            .counts(REMOTE.opened()),
        setting
            .reply(&from_remote(segment::SYN_ACK))
            .counts(REMOTE.first_answer()),
    ];
    let reply = from_remote(segment::ACK).payload(33);
    let out = to_client(&reply, REMOTE.vip(), CLIENT).build();
    let marked = (0..16_u8).map(|fields| {
        let (inner_tos, outer_tos) = (fields / 4, fields % 4);
        let inner = with_tos(reply.build(), inner_tos);
        let mut outer = setting.outer(0, true);
        outer.tos = outer_tos;
        let frame = outer.around(&inner);
        match ECN_BEHIND[usize::from(inner_tos)][usize::from(outer_tos)] {
            Some(tos) => {
                let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
                Step::new(&SERVER_SIDE, frame, verdict, Reason::REPLY_FORWARDED)
                    .inside(inner)
                    .out(with_tos(out.clone(), tos))
                    .counts(REMOTE.reply())
            }
            None => Step::new(&SERVER_SIDE, frame, Verdict::DROP, Reason::CONGESTION_UNHEARD),
        }
    });

    let mut world = setting.world();
    let server = SocketAddrV4::new(*REMOTE.server.ip(), DNS.server.port());
    world.backends[DNS.backend.0 as usize].address = (*server.ip()).into();
    let key = FlowKey {
        source: (*CLIENT.ip()).into(),
        destination: VIP.into(),
        source_port: Be16::new(CLIENT.port()),
        destination_port: Be16::new(DNS.port),
        protocol: 17,
    };
    let there = |query: Builder| {
        let out = to_server(&query, binding(0), server).build();
        let verdict = Verdict::redirect(SERVER_SIDE.ifindex);
        Step::new(&CLIENT_SIDE, query.build(), verdict, Reason::REQUEST_FORWARDED)
            .out(setting.outer(flow_hash(&key, 0x5eed), false).around(&out))
    };
    let back = |answer: Builder| {
        let out = to_client(&answer, DNS.vip(), CLIENT).build();
        let verdict = Verdict::redirect(CLIENT_SIDE.ifindex);
        Step::new(
            &SERVER_SIDE,
            setting.received(&answer),
            verdict,
            Reason::REPLY_FORWARDED,
        )
        .inside(answer.build())
        .out(out)
    };
    let answer = |len| Builder::udp(server, binding(0)).payload(len);
    [
        Case::new(
            "Marks of congestion meet those inside of an established connection",
            setting.world(),
        )
        .all(handshake)
        .all(marked),
        Case::new(
            "Datagrams go through a tunnel, with and without a checksum, and short ones",
            world,
        )
        .then(there(query(DNS)).counts(DNS.opened()))
        .then(back(answer(120)).counts(DNS.first_answer()))
        .then(there(query(DNS)).counts(DNS.request()))
        .then(there(query(DNS).checksum(Checksum::Fixed(0))).counts(DNS.request()))
        .then(back(answer(12)).counts(DNS.reply()))
        .then(back(answer(11)).counts(DNS.reply()))
        .then(back(answer(120).checksum(Checksum::Fixed(0))).counts(DNS.reply())),
    ]
}

/// A frame with another type of service, and the checksum that belongs to it.
fn with_tos(frame: Vec<u8>, tos: u8) -> Vec<u8> {
    let mut frame = patched(frame, ETHERNET_LEN + 1, &[tos]);
    frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].fill(0);
    let checksum = !packet::fold(packet::sum(&frame[ETHERNET_LEN..ETHERNET_LEN + 20]));
    patched(frame, ETHERNET_LEN + 10, &checksum.to_be_bytes())
}
