//! Tunnels in the library: what is put in front of a packet, what is recognised, and what is left alone.

use std::net::{IpAddr, SocketAddrV4};

use bytemuck::Zeroable;
use forwarder_common::{
    abi::tunnel::{TunnelEndpoint, TunnelEndpointKey, TunnelKind, TunnelPort},
    datapath::{
        Walk,
        overlay::{self, Inner, Inside},
        rewrite::Tags,
    },
    outer::{self, DontFragment, Far},
    wire::{Be16, Be32, IpAddress, LinkPair, MacAddress, checksum::fold, tunnel::vni_word},
};
use forwarder_tests::{
    packet::{Builder, Checksum, ETHERNET_LEN, Mac, patched, segment, wrong_checksums},
    tables::MemoryTables,
    tunnel::{Carrier, ECN_BEHIND, Outer, geneve, gue, vxlan},
};
use forwarder_user::datapath::packet::{MemoryPacket, Native};

const CLIENT: &str = "100.64.0.2:40000";
const BACKEND: &str = "192.168.1.10:80";
const HASH: u32 = 0x8000_1234;
/// The middle of the dynamic ports, as the hash is in the middle of all hashes.
const SOURCE_PORT: u16 = 57344;
const OWN_MAC: Mac = [2, 0, 0, 0, 0, 0x11];
const PEER_MAC: Mac = [2, 0, 0, 0, 0, 0x22];
const INNER_OWN: Mac = [2, 0, 0, 0, 1, 0x11];
const INNER_PEER: Mac = [2, 0, 0, 0, 1, 0x22];
const V4: (&str, &str) = ("172.31.0.1", "172.31.0.2");
const V6: (&str, &str) = ("fd00::1", "fd00::2");
const VNI: u32 = 0x00ab_cdef;
const KEY: u32 = 0x0102_0304;
const OPTIONS: [u8; 8] = [0x01, 0x02, 0x03, 0x01, 0xde, 0xad, 0xbe, 0xef];

/// A tunnel and how its packets look.
struct Tunnel {
    name: &'static str,
    kind: TunnelKind,
    id: Option<u32>,
    port: u16,
    options: &'static [u8],
    carrier: fn(bool) -> Carrier,
}

fn udp(port: u16, has_checksum: bool, header: Vec<u8>) -> Carrier {
    Carrier::Udp {
        ports: (SOURCE_PORT, port),
        has_checksum,
        header,
    }
}

const fn tunnel(
    name: &'static str,
    kind: TunnelKind,
    id: Option<u32>,
    port: u16,
    carrier: fn(bool) -> Carrier,
) -> Tunnel {
    Tunnel {
        name,
        kind,
        id,
        port,
        options: &[],
        carrier,
    }
}

fn tunnels() -> Vec<Tunnel> {
    vec![
        tunnel("vxlan", TunnelKind::VXLAN, Some(VNI), 4789, |sum| {
            udp(4789, sum, vxlan(VNI))
        }),
        tunnel("geneve", TunnelKind::GENEVE, Some(VNI), 6081, |sum| {
            udp(6081, sum, geneve(VNI, 0, &[]))
        }),
        Tunnel {
            options: &OPTIONS,
            ..tunnel(
                "geneve with options",
                TunnelKind::GENEVE,
                Some(VNI),
                6081,
                |sum| udp(6081, sum, geneve(VNI, 0, &OPTIONS)),
            )
        },
        tunnel("gre", TunnelKind::GRE, None, 0, |_| Carrier::Gre { key: None }),
        tunnel("gre with key", TunnelKind::GRE, Some(KEY), 0, |_| Carrier::Gre {
            key: Some(KEY),
        }),
        tunnel("gretap", TunnelKind::GRETAP, Some(KEY), 0, |_| Carrier::Gre {
            key: Some(KEY),
        }),
        tunnel("ipip", TunnelKind::IPIP, None, 0, |_| Carrier::Plain),
        tunnel("fou", TunnelKind::FOU, None, 5555, |sum| {
            udp(5555, sum, Vec::new())
        }),
        tunnel("gue", TunnelKind::GUE, None, 5556, |sum| udp(5556, sum, gue(4))),
    ]
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn mac(octets: Mac) -> MacAddress {
    MacAddress::new(octets)
}

impl Tunnel {
    fn far(&self, (local, remote): (&str, &str), has_checksum: bool) -> Far<'static> {
        Far {
            id: self.id,
            port: self.port,
            options: self.options,
            link: LinkPair::new(mac(INNER_PEER), mac(INNER_OWN)),
            has_checksum,
            ..Far::new(self.kind, address(local).into(), address(remote).into())
        }
    }

    fn outer(&self, (local, remote): (&str, &str), has_checksum: bool) -> Outer {
        let carrier = (self.carrier)(has_checksum);
        let is_udp = matches!(carrier, Carrier::Udp { .. });
        Outer {
            source_mac: OWN_MAC,
            destination_mac: PEER_MAC,
            source: address(local),
            destination: address(remote),
            ttl: 64,
            tos: 0,
            identification: 0,
            fragment: 0x4000,
            flow_label: if is_udp { 0 } else { HASH & 0xf_ffff },
            limit: None,
            carrier,
            inner_link: self.kind.is_ethernet().then_some((INNER_OWN, INNER_PEER)),
        }
    }

    /// Tables of who receives what [`Self::outer`] sends.
    fn receiver(&self, (remote, local): (&str, &str)) -> MemoryTables {
        let mut tables = MemoryTables::default();
        let is_vni = matches!(self.kind, TunnelKind::VXLAN | TunnelKind::GENEVE);
        let is_gre = matches!(self.kind, TunnelKind::GRE | TunnelKind::GRETAP);
        let key = TunnelEndpointKey {
            local: address(local).into(),
            remote: if self.kind == TunnelKind::VXLAN {
                IpAddress::UNSPECIFIED
            } else {
                address(remote).into()
            },
            id: match self.id {
                Some(id) if is_vni => vni_word(id),
                id => Be32::new(id.unwrap_or(0)),
            },
            port: Be16::new(self.port),
            kind: self.kind,
            detail: if is_gre {
                u8::from(self.id.is_some())
            } else if is_vni {
                0
            } else {
                4
            },
        };
        let value = TunnelEndpoint {
            ifindex: 77,
            mtu_bytes: 1400,
            mac: mac(INNER_PEER),
            reserved: 0,
        };
        tables.tunnel_endpoints.insert(key, value);
        if self.kind.is_udp() {
            let meaning = TunnelPort {
                kind: self.kind,
                reserved: [0; 3],
            };
            tables.tunnel_ports.insert(self.port, meaning);
        }
        tables
    }
}

fn socket(text: &str) -> SocketAddrV4 {
    text.parse().expect("an address")
}

/// Inner packets with the names of what is special about them.
fn inner_packets() -> Vec<(&'static str, Builder)> {
    let (client, backend) = (socket(CLIENT), socket(BACKEND));
    vec![
        ("tcp", Builder::tcp(segment::ACK, client, backend).payload(100)),
        (
            "tcp of an odd length",
            Builder::tcp(segment::ACK, client, backend).payload(33),
        ),
        ("udp", Builder::udp(client, backend).payload(11)),
        (
            "udp without checksum",
            Builder::udp(client, backend)
                .payload(21)
                .checksum(Checksum::Fixed(0)),
        ),
        (
            "ip options",
            Builder::udp(client, backend).options(vec![1; 8]).payload(4),
        ),
        (
            "icmp",
            Builder::icmp(8, 0, *client.ip(), *backend.ip()).payload(56),
        ),
    ]
}

fn inner_of(frame: &[u8]) -> Inner {
    let header_len = usize::from(frame[ETHERNET_LEN] & 0x0f) * 4;
    Inner {
        network_offset: ETHERNET_LEN,
        transport_offset: ETHERNET_LEN + header_len,
        total_len: (frame.len() - ETHERNET_LEN) as u16,
        protocol: frame[ETHERNET_LEN + 9],
        is_fragment: false,
        hash: HASH,
    }
}

fn encapsulated(frame: &[u8], far: &Far<'_>) -> Vec<u8> {
    let mut packet = MemoryPacket::<Native>::new(frame.to_vec());
    let peer = far.peer().expect("a possible tunnel");
    assert_eq!(usize::from(peer.outer_len), far.overhead_bytes());
    let link = LinkPair::new(mac(PEER_MAC), mac(OWN_MAC));
    overlay::push(&mut packet, &peer, link, Tags::NONE, &inner_of(frame)).expect("it fits");
    packet.bytes
}

fn recognised(frame: &[u8], tables: &MemoryTables) -> Option<Inside> {
    let mut packet = MemoryPacket::<Native>::new(frame.to_vec());
    let mut walk = Walk::zeroed();
    overlay::recognise(&mut packet, tables, &mut walk);
    assert_eq!(packet.bytes, frame, "looking changes nothing");
    Some(walk.inside).filter(Inside::is_tunnel)
}

#[test]
fn every_kind_over_both_families_has_the_bytes_that_its_rfc_says() {
    for tunnel in tunnels() {
        for ends in [V4, V6] {
            for has_checksum in [false, true] {
                for (special, builder) in inner_packets() {
                    let frame = builder.build();
                    let what = format!("{}, {ends:?}, checksum {has_checksum}, {special}", tunnel.name);
                    let out = encapsulated(&frame, &tunnel.far(ends, has_checksum));
                    let expected = tunnel.outer(ends, has_checksum).around(&frame);
                    assert_eq!(hex(&out), hex(&expected), "{what}");
                    // RFC 6935: a tunnel's UDP over IPv6 may have none.
                    if has_checksum || ends == V4 {
                        assert_eq!(wrong_checksums(&out), Vec::<&str>::new(), "{what}");
                    }
                }
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn what_one_end_sends_the_other_recognises_and_strips() {
    for tunnel in tunnels() {
        for ends in [V4, V6] {
            let frame = inner_packets()[0].1.build();
            let out = tunnel.outer(ends, true).around(&frame);
            let what = format!("{}, {ends:?}", tunnel.name);
            let inside = recognised(&out, &tunnel.receiver(ends)).expect(&what);
            assert_eq!(
                (inside.ifindex, inside.mtu_bytes, inside.outer_tos),
                (77, 1400, 0),
                "{what}"
            );
            assert_eq!(inside.ethertype, Be16::new(0x0800), "{what}");
            let mut packet = MemoryPacket::<Native>::new(out);
            overlay::strip(&mut packet, &inside).unwrap();
            let expected = [&PEER_MAC, &OWN_MAC, &frame[12..]].concat();
            assert_eq!(hex(&packet.bytes), hex(&expected), "{what}");
        }
    }
}

#[test]
fn what_is_not_exactly_ours_is_left_alone() {
    let frame = inner_packets()[0].1.build();
    let find = |name: &str| tunnels().into_iter().find(|tunnel| tunnel.name == name).unwrap();
    let of = |name: &str, change: fn(&mut Outer)| {
        let tunnel = find(name);
        let mut outer = tunnel.outer(V4, false);
        change(&mut outer);
        recognised(&outer.around(&frame), &tunnel.receiver(V4))
    };
    let as_it_is = |_: &mut Outer| {};
    assert!(of("vxlan", as_it_is).is_some());
    assert_eq!(
        of("vxlan", |outer| outer.destination = address("172.31.0.9")),
        None,
        "not to us"
    );
    assert_eq!(
        of("geneve", |outer| outer.source = address("172.31.0.9")),
        None,
        "from a stranger"
    );
    assert!(
        of("vxlan", |outer| outer.source = address("172.31.0.9")).is_some(),
        "VXLAN knows none"
    );
    assert_eq!(
        of("vxlan", |outer| outer.carrier = udp(4789, false, vxlan(VNI + 1))),
        None,
        "another network"
    );
    assert_eq!(
        of("vxlan", |outer| outer.carrier = udp(4790, false, vxlan(VNI))),
        None,
        "another port"
    );
    assert_eq!(
        of("vxlan", |outer| outer.inner_link = Some((INNER_OWN, [0xff; 6]))),
        None,
        "a broadcast is the kernel's"
    );
    assert_eq!(of("vxlan", |outer| outer.fragment = 0x2000), None, "a fragment");
    assert_eq!(
        of("vxlan", |outer| outer.carrier =
            udp(4789, false, [&[0x0c], &vxlan(VNI)[1..]].concat())),
        None,
        "another flag"
    );
    assert_eq!(
        of("vxlan", |outer| outer.carrier =
            udp(4789, false, [&[0], &vxlan(VNI)[1..]].concat())),
        None,
        "without the flag of the VNI"
    );
    assert!(
        of("geneve", |outer| outer.carrier =
            udp(6081, false, geneve(VNI, 0, &OPTIONS)))
        .is_some()
    );
    assert_eq!(
        of("geneve", |outer| outer.carrier =
            udp(6081, false, geneve(VNI, 0x40, &OPTIONS))),
        None,
        "critical options"
    );
    assert_eq!(
        of("geneve", |outer| outer.carrier =
            udp(6081, false, geneve(VNI, 0x80, &[]))),
        None,
        "control"
    );
    assert_eq!(
        of("gre", |outer| outer.carrier = Carrier::Gre { key: Some(KEY) }),
        None,
        "a key"
    );
    assert_eq!(
        of("gre with key", |outer| outer.carrier = Carrier::Gre { key: None }),
        None,
        "no key"
    );
    assert_eq!(
        of("gre with key", |outer| outer.carrier =
            Carrier::Gre { key: Some(KEY + 1) }),
        None
    );
    assert_eq!(
        of("gue", |outer| outer.carrier = udp(5556, false, gue(41))),
        None,
        "IPv6 is not carried"
    );
}

#[test]
fn lengths_that_lie_are_left_to_the_kernel() {
    let frame = inner_packets()[0].1.build();
    let tunnel = &tunnels()[0];
    let tables = tunnel.receiver(V4);
    let good = tunnel.outer(V4, false).around(&frame);
    assert!(recognised(&good, &tables).is_some());
    for len in 0..good.len() {
        assert_eq!(
            recognised_or_short(&good[..len], &tables),
            None,
            "cut to {len} bytes"
        );
    }
    let udp_len = patched(good.clone(), ETHERNET_LEN + 24, &[0, 40]);
    assert_eq!(recognised(&udp_len, &tables), None, "UDP is shorter than IP says");
    let inner_len = patched(good.clone(), ETHERNET_LEN + 50 + 2, &[0xff, 0xff]);
    assert_eq!(
        recognised(&inner_len, &tables),
        None,
        "the inner packet is longer than the outer one"
    );
    let ipv6 = patched(good, ETHERNET_LEN + 48, &[0x88, 0x47]);
    assert_eq!(recognised(&ipv6, &tables), None, "neither IPv4 nor IPv6 inside");
}

fn recognised_or_short(frame: &[u8], tables: &MemoryTables) -> Option<Inside> {
    if frame.len() < ETHERNET_LEN {
        None
    } else {
        recognised(frame, tables)
    }
}

#[test]
fn linux_nests_ipv6_tunnels_with_a_limit() {
    let frame = inner_packets()[0].1.build();
    let tunnel = tunnels()
        .into_iter()
        .find(|tunnel| tunnel.name == "ipip")
        .unwrap();
    let far = Far {
        limit: Some(4),
        ..tunnel.far(V6, false)
    };
    let expected = Outer {
        limit: Some(4),
        ..tunnel.outer(V6, false)
    };
    assert_eq!(hex(&encapsulated(&frame, &far)), hex(&expected.around(&frame)));
    let inside = recognised(&expected.around(&frame), &tunnel.receiver(V6)).unwrap();
    assert_eq!(inside.network_offset as usize, ETHERNET_LEN + 48);
}

#[test]
fn hop_limit_service_and_fragmentation_may_come_from_inside() {
    let builder = inner_packets().remove(0).1.ttl(17).fragment(0x4000);
    let frame = patched_tos(&builder.build(), 0xba);
    let tunnel = &tunnels()[0];
    let far = Far {
        ttl: 0,
        tos: None,
        dont_fragment: DontFragment::Inherit,
        ..tunnel.far(V4, true)
    };
    let expected = Outer {
        ttl: 17,
        tos: 0xba,
        ..tunnel.outer(V4, true)
    };
    assert_eq!(hex(&encapsulated(&frame, &far)), hex(&expected.around(&frame)));
    let fixed = Far {
        tos: Some(0x40),
        ..tunnel.far(V4, true)
    };
    let expected = Outer {
        tos: 0x42,
        ..tunnel.outer(V4, true)
    };
    assert_eq!(
        hex(&encapsulated(&frame, &fixed)),
        hex(&expected.around(&frame)),
        "ECN is always inherited"
    );
}

/// A frame with another type of service and the checksum that belongs to it.
fn patched_tos(frame: &[u8], tos: u8) -> Vec<u8> {
    let mut frame = patched(frame.to_vec(), ETHERNET_LEN + 1, &[tos]);
    frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].fill(0);
    let sum = !forwarder_tests::packet::fold(forwarder_tests::packet::sum(
        &frame[ETHERNET_LEN..ETHERNET_LEN + 20],
    ));
    patched(frame, ETHERNET_LEN + 10, &sum.to_be_bytes())
}

#[test]
fn packets_that_may_be_fragmented_differ_in_their_identification() {
    let tunnel = &tunnels()[0];
    let far = Far {
        dont_fragment: DontFragment::Never,
        ..tunnel.far(V4, false)
    };
    let (client, backend) = (socket(CLIENT), socket(BACKEND));
    let mut seen = std::collections::HashSet::new();
    for len in 0..50 {
        let frame = Builder::tcp(segment::ACK, client, backend).payload(len).build();
        let out = encapsulated(&frame, &far);
        assert_eq!(wrong_checksums(&out), Vec::<&str>::new());
        assert_eq!(out[ETHERNET_LEN + 6] & 0x40, 0);
        seen.insert([out[ETHERNET_LEN + 4], out[ETHERNET_LEN + 5]]);
    }
    assert_eq!(seen.len(), 50);
}

#[test]
fn congestion_is_heard_behind_the_tunnel() {
    for (inner, row) in (0..).zip(ECN_BEHIND) {
        for (outer_ecn, expected) in (0..).zip(row) {
            let frame = patched_tos(&inner_packets()[0].1.build(), 0xb8 | inner);
            let inside = Inside {
                network_offset: ETHERNET_LEN as u32,
                ethertype: Be16::new(0x0800),
                outer_tos: outer_ecn,
                ..Inside::zeroed()
            };
            let may_leave = overlay::check_congestion(0xb8 | inner, outer_ecn).is_ok();
            assert_eq!(may_leave, expected.is_some(), "{inner} in {outer_ecn}");
            if !overlay::may_carry_congestion(outer_ecn) {
                assert_eq!(expected, Some(inner), "{inner} in {outer_ecn}: the short way");
            }
            let mut packet = MemoryPacket::<Native>::new(frame);
            overlay::carry_congestion(&mut packet, &inside).unwrap();
            if let Some(expected) = expected {
                assert_eq!(
                    packet.bytes[ETHERNET_LEN + 1],
                    0xb8 | expected,
                    "{inner} in {outer_ecn}"
                );
                assert_eq!(wrong_checksums(&packet.bytes), Vec::<&str>::new());
            }
        }
    }
}

#[test]
fn source_ports_stay_in_their_range_and_spread() {
    let tunnel = &tunnels()[0];
    let frame = inner_packets()[0].1.build();
    let far = Far {
        source_ports: Some((50000, 50003)),
        ..tunnel.far(V4, false)
    };
    let peer = far.peer().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for hash in (0..=u32::MAX).step_by(0x0100_0001) {
        let mut packet = MemoryPacket::<Native>::new(frame.clone());
        let inner = Inner {
            hash,
            ..inner_of(&frame)
        };
        let link = LinkPair::new(mac(PEER_MAC), mac(OWN_MAC));
        overlay::push(&mut packet, &peer, link, Tags::NONE, &inner).unwrap();
        seen.insert(u16::from_be_bytes([packet.bytes[34], packet.bytes[35]]));
    }
    assert_eq!(Vec::from_iter(seen), [50000, 50001, 50002, 50003]);
}

#[test]
fn impossible_tunnels_are_refused() {
    let tunnel = &tunnels()[0];
    assert!(tunnel.far((V4.0, V6.1), true).peer().is_none(), "two families");
    let large = Far {
        id: Some(1 << 24),
        ..tunnel.far(V4, true)
    };
    assert!(large.peer().is_none(), "25 bits");
    let options = Far {
        options: &[0; 40],
        ..tunnels()[1].far(V6, true)
    };
    assert!(options.peer().is_none(), "too many options");
    assert_eq!(outer::Inner::Ipv6.protocol(), 41);
    assert_eq!(fold(0), 0);
}
