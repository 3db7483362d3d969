//! What the benchmark of packets measures: the cases' network with many flows, as numbers that its programs understand.
//!
//! What an output has to be is what the library makes of the same packet; that the library is right is for the cases
//! to show.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use bytemuck::Zeroable as _;
use forwarder_bench_ebpf::{CHECKED_BYTES, FloorEntry, FloorKey, Scenario, TEMPLATE_BYTES};
use forwarder_common::abi::{
    address_filter::AddressFilters,
    backend::{Backend, BackendHop, BackendId, BackendState, GroupId, NatMode},
    counter::TrafficCounters,
    flow::{FlowEntry, FlowId},
    listener::{Listener, ListenerId, ListenerKey},
    reason::Reason,
    settings,
    snat::{FIRST_PORT, PORTS_PER_ADDRESS},
};
use forwarder_common::wire::Be16;
use forwarder_user::datapath::object::Sizes;

use super::{
    DNAT_WEB, REMOTE, SERVER, SNAT, Service, TCP, UDP_SERVER, VIP, WEB, overlay::Setting, twin, world,
};
use crate::{
    packet::{self, Builder, ETHERNET_LEN, segment},
    tables::{
        BEHIND_ROUTER, CLIENT_SIDE, Live, MemoryTables, Program, ROUTER, SERVER_SIDE, SIZES, V6_PREFIX,
        mac_of,
    },
};

/// Ports that a client uses before the next client comes.
const PORTS_PER_CLIENT: u32 = 1 << 14;
/// As many flows as there are of clients behind the router, with room to spare.
pub const MOST_FLOWS: u32 = 1 << 20;
/// Where the ports of many listeners start.
const FIRST_LISTENER_PORT: u16 = 10_000;
/// Payload that keeps all that is written and looked at inside of frames.
const PAYLOAD: usize = 220;
/// Flows whose packets are looked at whole, of as many as there are.
const SAMPLES: [u32; 12] = [
    0,
    1,
    0x55,
    0xaa,
    0xfff,
    0x1234,
    0xfa5a,
    0xffff,
    0x1_5a5a,
    0x7_a5a5,
    0xc_3c3c,
    MOST_FLOWS - 1,
];

/// A gateway whose packets are measured.
#[derive(Clone, Copy, Debug)]
pub struct Gateway {
    pub way: Way,
    pub is_v6: bool,
    /// A power of two.
    pub flows: u32,
    pub listeners: u32,
    pub backends: u32,
    /// Each new flow asks for its way, as where that depends on more than the backend (ADR 21).
    pub asks: bool,
}

/// How packets get to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    FullNat,
    Dnat,
    /// In full NAT through the tunnel of this name, over IPv4 or IPv6.
    Tunnel(&'static str, bool),
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packets {
    /// A flow's first, its first answer, and what completes the handshake.
    Opening,
    Answer,
    Request,
    Reply,
    /// A SYN while no flow is free.
    Refused,
    /// To a VIP's port without a listener.
    NoListener,
    /// Not for us.
    Others,
}

/// Packets of one kind.
#[derive(Clone)]
pub struct Stream {
    pub ifindex: u32,
    pub reason: Reason,
    pub scenario: Scenario,
    /// Any flow's frame, whole.
    pub frame: Vec<u8>,
    pub samples: Vec<Sample>,
}

/// One flow's packet, and what becomes of it.
#[derive(Clone)]
pub struct Sample {
    pub flow: u32,
    pub frame: Vec<u8>,
    pub output: Vec<u8>,
}

impl Gateway {
    /// What other measurements vary one of.
    pub const PLAIN: Self = Self {
        way: Way::FullNat,
        is_v6: false,
        flows: 1,
        listeners: 1,
        backends: 1,
        asks: false,
    };

    fn service(&self) -> Service {
        match self.way {
            Way::FullNat => WEB,
            Way::Dnat => DNAT_WEB,
            Way::Tunnel(..) => REMOTE,
        }
    }

    fn setting(&self) -> Option<Setting> {
        match self.way {
            Way::Tunnel(name, is_v6) => Setting::named(name, is_v6),
            _ => None,
        }
    }

    /// Room for all that, and for flows that open while others are measured.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            flows: self.flows,
            flow_keys: self.flows * 2,
            flow_keys_v6: if self.is_v6 { self.flows * 2 } else { 1 },
            slots: SIZES.slots + self.slots(),
            backends: SIZES.backends + self.backends,
            listeners: SIZES.listeners + self.listeners,
            ..SIZES
        }
    }

    /// Slots of a group of many backends.
    const fn slots(&self) -> u32 {
        if self.backends > 1 { 1 << 16 } else { 0 }
    }

    /// The tables before the first packet, without room for flows.
    pub fn tables(&self) -> MemoryTables {
        let mut tables = self.setting().map_or_else(world, |setting| setting.world());
        tables.settings.pool.v4.runs[0].count = MOST_FLOWS.div_ceil(PORTS_PER_ADDRESS);
        if !self.asks {
            tables.settings.flags |= settings::flag::ONE_WAY;
        }
        self.add_listeners(&mut tables);
        self.add_backends(&mut tables);
        if self.way != Way::Dnat {
            for group in &mut tables.groups {
                group.nat = NatMode::FULL;
            }
        }
        tables.settings.filters = AddressFilters::default();
        tables.note_addresses();
        tables.flow_keys = self.flows as usize * 2;
        tables.flows.clear();
        tables.hints.clear();
        tables.handshakes.clear();
        tables.free_flows = (0..self.flows).map(FlowId).collect();
        if self.is_v6 {
            twin::in_ipv6(&tables)
        } else {
            tables
        }
    }

    fn add_listeners(&self, tables: &mut MemoryTables) {
        let count = SIZES.listeners + self.listeners;
        tables.listeners_live.resize(count as usize, Live(0));
        tables
            .listener_counters
            .resize(count as usize, TrafficCounters::default());
        if self.listeners > 1 {
            let group = GroupId(self.service().listener.0);
            for (number, id) in (0..).zip(SIZES.listeners..count) {
                let key = ListenerKey::new(VIP.into(), Be16::new(FIRST_LISTENER_PORT + number), TCP);
                let listener = Listener {
                    id: ListenerId(id),
                    group,
                    ..Listener::zeroed()
                };
                tables.listeners.insert(key, listener);
            }
        }
    }

    fn add_backends(&self, tables: &mut MemoryTables) {
        let count = (SIZES.backends + self.backends) as usize;
        tables.backends.resize(count, Backend::zeroed());
        tables.backends_live.resize(count, Live(0));
        tables.backend_hops.resize(count, BackendHop::default());
        tables.backend_counters.resize(count, TrafficCounters::default());
        if self.backends > 1 {
            for number in 0..self.backends {
                let host = if number % 2 == 0 { SERVER } else { UDP_SERVER };
                tables.backends[(SIZES.backends + number) as usize] = Backend {
                    address: (*host.ip()).into(),
                    port: Be16::new(20_000 + (number / 2) as u16),
                    state: BackendState::HEALTHY,
                    reserved: 0,
                    max_flows: 0,
                    weight: 1,
                };
            }
            let ids = (0..self.slots()).map(|slot| BackendId(SIZES.backends + slot % self.backends));
            tables.slots.extend(ids);
            let group = &mut tables.groups[self.service().listener.0 as usize];
            (group.first_slot, group.slot_count) = (SIZES.slots, self.slots());
        }
    }

    fn client(flow: u32) -> SocketAddrV4 {
        let address = Ipv4Addr::from(u32::from(BEHIND_ROUTER) + flow / PORTS_PER_CLIENT);
        SocketAddrV4::new(address, FIRST_PORT + (flow % PORTS_PER_CLIENT) as u16)
    }

    fn binding(&self, flow: u32) -> SocketAddrV4 {
        if self.way == Way::Dnat {
            return Self::client(flow);
        }
        let address = Ipv4Addr::from(u32::from(SNAT) + flow / PORTS_PER_ADDRESS);
        SocketAddrV4::new(address, FIRST_PORT + (flow % PORTS_PER_ADDRESS) as u16)
    }

    fn listener_port(&self, flow: u32) -> u16 {
        if self.listeners > 1 {
            FIRST_LISTENER_PORT + (flow % self.listeners) as u16
        } else {
            self.service().port
        }
    }

    fn family(&self, frame: Vec<u8>) -> Result<Vec<u8>> {
        if self.is_v6 {
            packet::in_ipv6(&frame, V6_PREFIX).context("a frame without a twin")
        } else {
            Ok(frame)
        }
    }

    /// A flow's packet as it comes in.
    fn frame(&self, packets: Packets, flow: u32) -> Result<Vec<u8>> {
        let flags = match packets {
            Packets::Opening | Packets::Refused => segment::SYN,
            Packets::Answer => segment::SYN_ACK,
            _ => segment::ACK,
        };
        if matches!(packets, Packets::Answer | Packets::Reply) {
            let server = self.service().server;
            let reply = Builder::tcp(flags, server, self.binding(flow)).payload(PAYLOAD);
            return match self.setting() {
                Some(setting) => Ok(setting.received(&reply)),
                None => self.family(reply.link(mac_of(*server.ip()), SERVER_SIDE.mac).build()),
            };
        }
        let destination = match packets {
            Packets::NoListener => SocketAddrV4::new(VIP, 9),
            Packets::Others => SERVER,
            _ => SocketAddrV4::new(VIP, self.listener_port(flow)),
        };
        let request = Builder::tcp(flags, Self::client(flow), destination)
            .link(mac_of(ROUTER), CLIENT_SIDE.mac)
            .payload(PAYLOAD);
        self.family(request.build())
    }

    /// Packets of all flows, and what the library makes of some.
    pub fn stream(&self, packets: Packets) -> Result<Stream> {
        Ok(self.stream_and_tables(packets)?.0)
    }

    /// The same, and the tables after the last of these.
    pub fn stream_and_tables(&self, packets: Packets) -> Result<(Stream, MemoryTables)> {
        let mut tables = self.tables();
        tables.flows = vec![FlowEntry::zeroed(); self.flows as usize];
        let is_reply = matches!(packets, Packets::Answer | Packets::Reply);
        let ifindex = if is_reply {
            SERVER_SIDE.ifindex
        } else {
            CLIENT_SIDE.ifindex
        };
        let before: &[Packets] = match packets {
            Packets::Answer => &[Packets::Opening],
            Packets::Request | Packets::Reply => &[Packets::Opening, Packets::Answer],
            _ => &[],
        };
        let mut samples = Vec::new();
        let mut reason = None;
        for flow in SAMPLES.into_iter().filter(|flow| *flow < self.flows) {
            tables.free_flows.clear();
            if packets != Packets::Refused {
                tables.free_flows.push_back(FlowId(flow));
            }
            for packets in before {
                // Many backends: who answers is not known, and nobody has to.
                if *packets == Packets::Opening || self.backends == 1 {
                    let side = if *packets == Packets::Answer {
                        &SERVER_SIDE
                    } else {
                        &CLIENT_SIDE
                    };
                    tables.forward(Program::Native, side.ifindex, &self.frame(*packets, flow)?);
                }
            }
            let frame = self.frame(packets, flow)?;
            let (outcome, output) = tables.forward(Program::Native, ifindex, &frame);
            ensure!(
                *reason.get_or_insert(outcome.reason) == outcome.reason,
                "{self:?}, {packets:?}, flow {flow}: {:?}",
                outcome.reason
            );
            samples.push(Sample { flow, frame, output });
        }
        let first = samples.first().context("no flow")?;
        let frame = first.frame.clone();
        let scenario = self.scenario(packets, &samples)?;
        let stream = Stream {
            ifindex,
            reason: reason.context("no flow")?,
            scenario,
            frame,
            samples,
        };
        Ok((stream, tables))
    }

    fn scenario(&self, packets: Packets, samples: &[Sample]) -> Result<Scenario> {
        let frame = &samples[0].frame;
        let is_reply = matches!(packets, Packets::Answer | Packets::Reply);
        // Headers in front of the inner packet's IP header.
        let whole = self.family(
            Builder::tcp(segment::ACK, SERVER, SERVER)
                .payload(PAYLOAD)
                .build(),
        )?;
        let start = (frame.len() - whole.len() + ETHERNET_LEN) as u32;
        let (addresses, len, ip_checksum) = if self.is_v6 {
            (8, 40, 0)
        } else {
            (12, 20, start + 10)
        };
        let address_len = if self.is_v6 { 16 } else { 4 };
        let (address, port, other_port) = if is_reply {
            (addresses + address_len, 2, 0)
        } else {
            (addresses, 0, 2)
        };
        let (first, ports) = if is_reply && self.way != Way::Dnat {
            (SNAT, PORTS_PER_ADDRESS)
        } else {
            (BEHIND_ROUTER, PORTS_PER_CLIENT)
        };
        let other_ports = if is_reply { 1 } else { self.listeners.max(1) };
        let at = |offset: u32| u16::from_ne_bytes([frame[offset as usize], frame[offset as usize + 1]]);
        let transport = start + len;
        let mut scenario = Scenario {
            frame_len: frame.len() as u32,
            output_len: samples[0].output.len() as u32,
            // The last four bytes.
            address_offset: start + address + address_len - 4,
            port_offset: transport + port,
            other_port_offset: transport + other_port,
            ip_checksum_offset: ip_checksum,
            transport_checksum_offset: transport + 16,
            first_address: first.into(),
            first_port: FIRST_PORT.into(),
            ports,
            first_other_port: u16::from_be(at(transport + other_port)).into(),
            other_ports,
            flow_mask: self.flows - 1,
            // Far apart, so that no flow is a neighbour of the last one's.
            stride: 0x9e37_79b1,
            ..Scenario::zeroed()
        };
        let zeroed = [
            (scenario.address_offset, 4),
            (scenario.port_offset, 2),
            (scenario.other_port_offset, 2),
            (ip_checksum, if ip_checksum == 0 { 0 } else { 2 }),
            (scenario.transport_checksum_offset, 2),
        ];
        ensure!(
            zeroed
                .iter()
                .all(|(offset, _)| *offset as usize + 4 <= TEMPLATE_BYTES),
            "headers too long"
        );
        // What the checksums cover besides the fields: their own sums less the fields'.
        let less = |offset: u32| u32::from(!at(offset));
        let address = less(scenario.address_offset) + less(scenario.address_offset + 2);
        if ip_checksum != 0 {
            scenario.ip_sum = less(ip_checksum) + address;
        }
        scenario.transport_sum = less(scenario.transport_checksum_offset)
            + address
            + less(scenario.port_offset)
            + less(scenario.other_port_offset);
        let mut template = frame[..TEMPLATE_BYTES].to_vec();
        for (offset, len) in zeroed {
            template[offset as usize..][..len].fill(0);
        }
        bytemuck::cast_slice_mut::<_, u8>(&mut scenario.frame)[..TEMPLATE_BYTES].copy_from_slice(&template);
        let expected: &mut [u8] = bytemuck::cast_slice_mut(&mut scenario.expected);
        expected.copy_from_slice(&samples[0].output[..CHECKED_BYTES]);
        let mask: &mut [u8] = bytemuck::cast_slice_mut(&mut scenario.mask);
        for (index, bits) in mask.iter_mut().enumerate() {
            let is_same = samples
                .iter()
                .all(|sample| sample.output[index] == samples[0].output[index]);
            *bits = if is_same { 0xff } else { 0 };
        }
        Ok(scenario)
    }

    /// The minimal program's flow for each of ours: it makes of requests in full NAT what the data path does.
    pub fn floor(&self) -> impl Iterator<Item = (FloorKey, FloorEntry)> + use<> {
        let gateway = *self;
        (0..self.flows).map(move |flow| {
            let client = Self::client(flow);
            let binding = gateway.binding(flow);
            let vip = SocketAddrV4::new(VIP, gateway.listener_port(flow));
            let word = |address: &Ipv4Addr| u32::from_ne_bytes(address.octets());
            let ports = |source: u16, destination: u16| {
                let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
                u32::from_ne_bytes([a, b, c, d])
            };
            let key = FloorKey {
                source: word(client.ip()),
                destination: word(vip.ip()),
                ports: ports(client.port(), vip.port()),
                protocol: TCP.into(),
            };
            let mut link = [0; 12];
            link[..6].copy_from_slice(&mac_of(*SERVER.ip()));
            link[6..].copy_from_slice(&SERVER_SIDE.mac);
            let (source, destination) = (word(binding.ip()), word(SERVER.ip()));
            let new_ports = ports(binding.port(), SERVER.port());
            let change = |before: u32, after: u32| {
                (!before & 0xffff) + (!before >> 16) + (after & 0xffff) + (after >> 16)
            };
            let fold = |sum: u32| {
                let sum = (sum & 0xffff) + (sum >> 16);
                (sum & 0xffff) + (sum >> 16)
            };
            let entry = FloorEntry {
                link: bytemuck::pod_read_unaligned(&link),
                source,
                destination,
                ports: new_ports,
                address_delta: fold(change(key.source, source) + change(key.destination, destination)),
                port_delta: fold(change(key.ports, new_ports)),
            };
            (key, entry)
        })
    }
}
