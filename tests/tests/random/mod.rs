//! Random packets that have a chance to mean something: from few addresses and ports, then damaged.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::net::{Ipv4Addr, SocketAddrV4};

use forwarder_common::abi::{
    backend::{BackendId, BackendState, NatMode, Selection},
    listener::ListenerId,
    settings::flag,
};
use forwarder_common::wire::Be16;
use forwarder_tests::{
    cases,
    invariants::Arrival,
    packet::{Arp, Builder, Checksum, ETHERNET_LEN, chunk, segment},
    tables::{CLIENT_SIDE, CLOSED_SIDE, MemoryTables, Program, SERVER_SIDE, TUNNEL_SIDE},
};
use proptest::{prelude::*, sample::select};

/// Tables and packets that come one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) world: MemoryTables,
    pub(crate) packets: Vec<Arrival>,
}

/// A listener of the cases' world.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    vip: SocketAddrV4,
    protocol: Protocol,
}

/// A protocol that flows have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Protocol {
    Tcp,
    Udp,
    Sctp,
    /// The client's port is the identifier.
    Echo,
}

impl Service {
    /// The first packet of a client.
    pub(crate) fn request(&self, client: SocketAddrV4) -> Vec<u8> {
        let packet = match self.protocol {
            Protocol::Tcp => Builder::tcp(segment::SYN, client, self.vip),
            Protocol::Udp => Builder::udp(client, self.vip),
            Protocol::Sctp => Builder::sctp(chunk::INIT, client, self.vip),
            Protocol::Echo => Builder::echo_request(client, self.vip),
        };
        packet.payload(5).build()
    }
}

const VIP: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);

/// A listener whose backend can be reached.
pub(crate) fn service() -> impl Strategy<Value = Service> {
    select(vec![
        (80, Protocol::Tcp),
        (53, Protocol::Udp),
        (8000, Protocol::Tcp),
        (5300, Protocol::Udp),
        (81, Protocol::Tcp),
        (82, Protocol::Tcp),
        (85, Protocol::Tcp),
    ])
    .prop_map(service_at)
}

fn service_at((port, protocol): (u16, Protocol)) -> Service {
    Service {
        vip: SocketAddrV4::new(VIP, port),
        protocol,
    }
}

/// A listener that [`world`] adds to those of the cases.
fn seldom_service() -> impl Strategy<Value = Service> {
    select(vec![
        (SCTP_PORT, Protocol::Sctp),
        (DNAT_SCTP_PORT, Protocol::Sctp),
        (0, Protocol::Echo),
    ])
    .prop_map(service_at)
}

const SCTP_PORT: u16 = 2905;
const DNAT_SCTP_PORT: u16 = 3868;

/// A client that can be reached.
pub(crate) fn client() -> impl Strategy<Value = SocketAddrV4> {
    (select(vec![[172, 18, 0], [192, 0, 2]]), 2..255_u8, 1..=u16::MAX)
        .prop_map(|([a, b, c], d, port)| SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), port))
}

fn endpoint() -> impl Strategy<Value = SocketAddrV4> {
    let client = (
        select(vec![
            [172, 18, 0, 10],
            [172, 18, 0, 11],
            [192, 0, 2, 7],
            [172, 18, 0, 99],
        ]),
        50000_u16..50003,
    );
    let vip = (
        Just(VIP.octets()),
        select(vec![80, 53, 8000, 5300, 81, 82, 83, 84, 85, 9]),
    );
    let snat = (select(vec![[100, 64, 0, 2], [100, 64, 0, 3]]), 1022_u16..1042);
    let server = (
        select(vec![
            [172, 17, 0, 205],
            [172, 17, 0, 206],
            [192, 168, 1, 20],
            [172, 17, 0, 99],
            [172, 18, 0, 20],
        ]),
        select(vec![8080, 5353]),
    );
    prop_oneof![client, vip, snat, server]
        .prop_map(|(address, port): ([u8; 4], u16)| SocketAddrV4::new(address.into(), port))
}

/// Source and destination, mostly ones that fit, and the protocol: a request, a reply to a binding, a reply
/// to a client.
fn endpoints() -> impl Strategy<Value = (SocketAddrV4, SocketAddrV4, Protocol)> {
    let address = |octets: [u8; 4], port| SocketAddrV4::new(octets.into(), port);
    let client = || {
        (select(vec![[172, 18, 0, 10], [192, 0, 2, 7]]), 50000_u16..50002)
            .prop_map(move |(octets, port)| address(octets, port))
    };
    let server = || {
        select(vec![
            (address([172, 17, 0, 205], 8080), Protocol::Tcp),
            (address([172, 17, 0, 206], 5353), Protocol::Udp),
            (address([192, 168, 1, 20], 8080), Protocol::Tcp),
            (address([172, 18, 0, 20], 8080), Protocol::Tcp),
            (address([172, 17, 0, 205], 8080), Protocol::Sctp),
            (address([172, 17, 0, 205], 0), Protocol::Echo),
        ])
    };
    let request = (client(), prop_oneof![3 => service(), 1 => seldom_service()])
        .prop_map(|(client, service)| (client, service.vip, service.protocol));
    let reply = (server(), 1024_u16..1028)
        .prop_map(move |((server, protocol), binding)| (server, address([100, 64, 0, 2], binding), protocol));
    let dnat_reply = (server(), client()).prop_map(|((server, protocol), client)| (server, client, protocol));
    let any_protocol = select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Echo]);
    prop_oneof![
        6 => request,
        5 => reply,
        2 => dnat_reply,
        1 => (endpoint(), endpoint(), any_protocol),
    ]
}

fn checksum() -> impl Strategy<Value = Checksum> {
    prop_oneof![
        6 => Just(Checksum::Complete),
        3 => Just(Checksum::Partial),
        1 => select(vec![0, 0xffff, 0xfffe]).prop_map(Checksum::Fixed),
    ]
}

/// TCP options: mostly a segment size, here and there behind others, cut short or with a length that lies.
fn tcp_options() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![
        4 => any::<u16>().prop_map(|size| [vec![2, 4], size.to_be_bytes().to_vec()].concat()),
        2 => Just(vec![1]),
        1 => Just(vec![0]),
        1 => Just(vec![4, 2]),
        1 => Just(vec![8, 10, 1, 2, 3, 4, 5, 6, 7, 8]),
        1 => proptest::collection::vec(0..12_u8, 1..8),
    ];
    proptest::collection::vec(option, 0..5).prop_map(|options| {
        let mut bytes = options.concat();
        bytes.truncate(40);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    })
}

fn flow_packet() -> impl Strategy<Value = Vec<u8>> {
    let flags = select(vec![
        segment::SYN,
        segment::SYN,
        segment::SYN,
        segment::SYN,
        segment::SYN_ACK,
        segment::ACK,
        segment::FIN,
        segment::RST,
    ]);
    let len = prop_oneof![4 => 0..100_usize, 1 => 480..520_usize, 1 => 1000..3000_usize];
    (
        endpoints(),
        flags,
        len,
        checksum(),
        prop_oneof![8 => Just(64_u8), 1 => 0..4_u8],
        prop_oneof![8 => Just(0_usize), 1 => 1..10_usize],
        prop_oneof![8 => Just(0_usize), 1 => 1..40_usize],
        tcp_options(),
    )
        .prop_map(
            |(
                (source, destination, protocol),
                flags,
                len,
                checksum,
                ttl,
                option_words,
                padding,
                tcp_options,
            )| {
                let packet = match protocol {
                    Protocol::Tcp => Builder::tcp(flags, source, destination).tcp_options(tcp_options),
                    Protocol::Udp => Builder::udp(source, destination),
                    Protocol::Sctp => Builder::sctp(chunk_like(flags), source, destination),
                    Protocol::Echo if source.port() == 0 => Builder::echo_reply(source, destination),
                    Protocol::Echo => Builder::echo_request(source, destination),
                };
                packet
                    .payload(len)
                    .checksum(checksum)
                    .ttl(ttl)
                    .options(vec![1; option_words * 4])
                    .padding(padding)
                    .build()
            },
        )
}

/// The chunk of SCTP that does what a segment with these flags does.
fn chunk_like(flags: u8) -> u8 {
    match flags {
        segment::SYN => chunk::INIT,
        segment::SYN_ACK => chunk::INIT_ACK,
        segment::FIN => chunk::SHUTDOWN,
        segment::RST => chunk::ABORT,
        _ => chunk::DATA,
    }
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let icmp = (
        endpoint(),
        endpoint(),
        select(vec![0_u8, 3, 8, 8]),
        0..2_u8,
        0..80_usize,
    )
        .prop_map(|(source, destination, kind, code, len)| {
            Builder::icmp(kind, code, *source.ip(), *destination.ip())
                .payload(len)
                .build()
        });
    let arp = (endpoint(), endpoint(), 0..4_u16).prop_map(|(sender, target, operation)| {
        let mac = [2, 0, 0, 0, 0, 7];
        Arp {
            operation,
            sender_mac: mac,
            sender: *sender.ip(),
            target_mac: [0; 6],
            target: *target.ip(),
        }
        .build(mac, [0xff; 6])
    });
    prop_oneof![10 => flow_packet(), 1 => icmp, 1 => arp]
}

/// What BPF_PROG_TEST_RUN takes at least.
const XDP_LEN: usize = ETHERNET_LEN;
/// What it takes in tcx, where it wants to see the IP header that the EtherType promises, of IPv6 perhaps.
const TCX_LEN: usize = ETHERNET_LEN + 40;

/// A frame with some bytes overwritten, mostly in its headers, and perhaps cut short.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let hit = (prop_oneof![6 => 12..60_usize, 1 => 0..4000_usize], any::<u8>());
    (
        frame(),
        prop_oneof![3 => Just(0_usize), 1 => 1..4_usize]
            .prop_flat_map(move |count| proptest::collection::vec(hit.clone(), count)),
        prop::option::weighted(0.1, any::<prop::sample::Index>()),
    )
        .prop_map(|(mut frame, hits, cut)| {
            for (offset, byte) in hits {
                if let Some(target) = frame.get_mut(offset) {
                    *target = byte;
                }
            }
            if let Some(cut) = cut {
                frame.truncate(XDP_LEN + cut.index(frame.len() - XDP_LEN));
            }
            frame
        })
}

/// Interfaces that forward.
const OPEN: [u32; 3] = [CLIENT_SIDE.ifindex, SERVER_SIDE.ifindex, TUNNEL_SIDE.ifindex];

fn packet() -> impl Strategy<Value = Arrival> {
    let program = prop_oneof![
        4 => Just(Program::Native),
        1 => Just(Program::Generic),
        1 => Just(Program::Tunnel),
    ];
    (
        program,
        prop_oneof![9 => select(OPEN.to_vec()), 1 => Just(CLOSED_SIDE.ifindex)],
        damaged(),
    )
        .prop_map(|(program, ifindex, frame)| {
            let is_short = frame.len() < TCX_LEN;
            Arrival {
                program: if is_short { Program::Native } else { program },
                ifindex,
                frame,
            }
        })
}

/// The cases' tables, as they are or with something scarce or broken.
fn world() -> impl Strategy<Value = MemoryTables> {
    let changes: Vec<fn(&mut MemoryTables)> = vec![
        |_| {},
        |_| {},
        |_| {},
        |world| world.free_flows.truncate(2),
        |world| world.free_flows.clear(),
        |world| {
            let everybody = world.listeners.values_mut();
            everybody.for_each(|listener| listener.max_flows = 2);
        },
        |world| {
            world
                .backends
                .iter_mut()
                .for_each(|backend| backend.max_flows = 1);
        },
        |world| {
            for id in [ListenerId(0), ListenerId(1)] {
                world.admit_source(id, Ipv4Addr::new(172, 18, 0, 0), 24);
            }
        },
        |world| {
            // What had a port of its own is within a range now, and one backend keeps the port asked for.
            world.listeners.clear();
            world.listener_ranges.clear();
            world.add_range_listener(VIP, (80, 13), 6, NatMode::FULL, &[BackendId(0), BackendId(1)]);
            world.add_range_listener(VIP, (0, 0), 17, NatMode::DNAT, &[BackendId(1)]);
            world.backends[1].port = Be16::new(0);
        },
        |world| world.settings.pool.v4.runs[0].count = 0,
        |world| set_mtu(world, 1400),
        |world| set_mtu(world, 9000),
        |world| set_mtu(world, 68),
        |world| world.backends[0].state = BackendState::UNHEALTHY,
        |world| world.settings.flags |= flag::TRANSMIT_BY_REDIRECT,
        |world| world.groups[0].first_slot = u32::MAX,
        |world| select_by(world, Selection::SOURCE_IP),
        |world| select_by(world, Selection::ROUND_ROBIN),
        |world| select_by(world, Selection::LEAST_CONNECTIONS),
        |world| {
            select_by(world, Selection::LEAST_CONNECTIONS);
            world.backends[0].max_flows = 2;
            world.groups[0].persistence_secs = 600;
            world.groups[0].persistence_bits_v4 = 31;
        },
        |world| {
            world
                .interfaces
                .values_mut()
                .for_each(|interface| interface.flags = 0);
        },
        // A DNAT listener beside another one with the same backend.
        |world| {
            world.add_listener(VIP, 86, 6, NatMode::DNAT, &[BackendId(0)]);
            world.groups[0].nat = NatMode::DNAT;
            world.note_addresses();
        },
    ];
    let plain = prop_oneof![Just(cases::world()), Just(cases::world_with_partial_checksums()),];
    (plain, select(changes), any::<bool>()).prop_map(|(mut world, change, forwards_echo)| {
        world.add_listener(VIP, SCTP_PORT, 132, NatMode::FULL, &[BackendId(0)]);
        world.add_listener(VIP, DNAT_SCTP_PORT, 132, NatMode::DNAT, &[BackendId(0)]);
        if forwards_echo {
            world.add_listener(VIP, 0, 1, NatMode::FULL, &[BackendId(0)]);
        }
        change(&mut world);
        world
    })
}

/// The first group selects so, among three slots and two of an overflow table.
fn select_by(world: &mut MemoryTables, selection: Selection) {
    let slots = [0, 1, 0, 6, 1].map(BackendId);
    world.slots[100..105].copy_from_slice(&slots);
    let group = &mut world.groups[0];
    (group.first_slot, group.slot_count, group.overflow_slot_count) = (100, 3, 2);
    group.selection = selection;
}

fn set_mtu(world: &mut MemoryTables, mtu_bytes: u32) {
    for interface in world.interfaces.values_mut() {
        interface.mtu_bytes = mtu_bytes;
    }
}

/// Tables, and up to 60 packets.
pub(crate) fn scenario() -> impl Strategy<Value = Scenario> {
    (world(), proptest::collection::vec(packet(), 1..60))
        .prop_map(|(world, packets)| Scenario { world, packets })
}
