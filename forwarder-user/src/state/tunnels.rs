//! From tunnel devices to the tables with which the programs do their work: who is a far end, what comes in, which
//! next hop on a device leads where.
//!
//! A device is handled *natively* or not at all: [`tables`] says for each which, and why not. Peers keep their
//! numbers from one time to the next, as flows remember them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::{
    abi::tunnel::{
        PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHop, TunnelHopKey, TunnelKind, TunnelPeer,
        TunnelPort,
    },
    outer::{Far, Inner},
    wire::{Be16, Be32, IpAddress, LinkPair, MacAddress, tunnel::vni_word},
};

use crate::network::{FarEnd, TunnelDevice};

/// The tables of tunnels that the programs handle.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TunnelTables {
    pub peers: BTreeMap<PeerId, TunnelPeer>,
    pub hops: BTreeMap<HopOrder, (TunnelHopKey, TunnelHop)>,
    pub endpoints: BTreeMap<EndpointOrder, (TunnelEndpointKey, TunnelEndpoint)>,
    pub ports: BTreeMap<u16, TunnelPort>,
}

/// Sorts next hops by their bytes.
pub type HopOrder = [u8; size_of::<TunnelHopKey>()];
/// Sorts endpoints by their bytes.
pub type EndpointOrder = [u8; size_of::<TunnelEndpointKey>()];

impl TunnelTables {
    /// Adds what comes in, and what its port means.
    pub fn add_endpoint(&mut self, key: TunnelEndpointKey, value: TunnelEndpoint) {
        if key.kind.is_udp() {
            let meaning = TunnelPort {
                kind: key.kind,
                reserved: [0; 3],
            };
            self.ports.insert(key.port.get(), meaning);
        }
        self.endpoints.insert(bytemuck::cast(key), (key, value));
    }
}

/// How this host sends to a far end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The address of this host that packets come from.
    pub local: IpAddr,
    /// Number of the interface that they leave by.
    pub interface: u32,
    /// Largest packet that it sends, in bytes.
    pub mtu_bytes: u32,
    /// Does it run the XDP program in the driver?
    pub is_native: bool,
}

/// A tunnel device with all that was found around it.
#[derive(Clone, Debug)]
pub struct Surveyed {
    pub device: TunnelDevice,
    pub far_ends: Vec<FarEnd>,
    /// Link addresses of neighbours on it.
    pub neighbours: Vec<[u8; 6]>,
    /// By far end; absent: no route.
    pub underlay: BTreeMap<IpAddr, Underlay>,
}

impl Surveyed {
    /// The far ends that packets may go to.
    pub fn remotes(device: &TunnelDevice, far_ends: &[FarEnd]) -> BTreeSet<IpAddr> {
        let remotes = far_ends.iter().map(|far| far.remote).chain(device.remote);
        remotes.filter(|remote| !remote.is_multicast()).collect()
    }

    /// The far end behind an inner link address: the entry for it, or else the only one for all others. Zeros stand
    /// for kinds without link addresses.
    fn far_end(&self, mac: [u8; 6]) -> Option<FarEnd> {
        let mut entries = self.far_ends.iter().filter(|far| far.mac == mac).peekable();
        let by_default = self.far_ends.iter().filter(|far| far.mac == [0; 6]);
        let mut found: Vec<_> = if entries.peek().is_some() {
            entries.collect()
        } else {
            by_default.collect()
        };
        match (found.pop(), self.device.remote) {
            // Frames go to all of them: the kernel copies.
            (Some(_), _) if !found.is_empty() => None,
            (Some(far), _) => Some(*far),
            (None, Some(remote)) => Some(FarEnd {
                mac,
                remote,
                port: None,
                vni: None,
            }),
            (None, None) => None,
        }
    }

    /// Why the programs cannot do the device's work; `None`: they can.
    fn obstacle(&self) -> Option<String> {
        let device = &self.device;
        if let Some(obstacle) = device.obstacles.first() {
            return Some(obstacle.clone());
        }
        if device.controller.is_some() {
            return Some("it is a port of a bridge or another device".to_owned());
        }
        if Self::remotes(device, &self.far_ends).is_empty() {
            return Some("it has no far end: neither `remote` nor a forwarding entry".to_owned());
        }
        if self.underlay.is_empty() {
            return Some("there is no route to its far end".to_owned());
        }
        let is_native = |underlay: &&Underlay| {
            underlay.is_native && device.link.is_none_or(|link| link == underlay.interface)
        };
        if !self.underlay.values().any(|underlay| is_native(&underlay)) {
            return Some(
                "its packets leave by an interface without the XDP program in native mode; name it as [interface.NAME]"
                    .to_owned(),
            );
        }
        None
    }

    /// Largest inner packet to a far end.
    fn mtu_bytes(&self, far: &Far<'_>, underlay: &Underlay) -> u32 {
        let carried = underlay.mtu_bytes.saturating_sub(far.overhead_bytes() as u32);
        if underlay.mtu_bytes == 0 {
            self.device.mtu_bytes
        } else {
            self.device.mtu_bytes.min(carried)
        }
    }

    fn far<'a>(&self, end: &FarEnd, underlay: &Underlay, inner: Inner) -> Far<'a> {
        let device = &self.device;
        let mac = MacAddress::new(end.mac);
        let own = MacAddress::new(device.mac.unwrap_or_default());
        let has_checksum = if end.remote.is_ipv4() {
            device.has_checksum.0
        } else {
            device.has_checksum.1
        };
        let mut far = Far {
            inner,
            id: end.vni.or(device.id),
            port: end.port.unwrap_or(device.port),
            source_ports: device.source_ports,
            link: LinkPair::new(mac, own),
            ttl: device.ttl,
            tos: device.tos,
            dont_fragment: device.dont_fragment,
            has_checksum,
            flow_label: device.flow_label,
            limit: device.limit,
            ifindex: device.index,
            ..Far::new(device.kind, underlay.local.into(), end.remote.into())
        };
        far.mtu_bytes = self.mtu_bytes(&far, underlay);
        far
    }
}

/// The tables of these devices, and for each by name why the programs do not do its work, if they do not. At most
/// `room` entries of a kind; `before` says which numbers peers have had.
pub fn tables(
    devices: &[Surveyed],
    before: &TunnelTables,
    room: usize,
) -> (TunnelTables, BTreeMap<String, Option<String>>) {
    let mut tables = TunnelTables::default();
    let mut verdicts = BTreeMap::new();
    let mut numbers = Numbers::new(before, room);
    for surveyed in devices {
        let mut obstacle = surveyed.obstacle();
        if obstacle.is_none() && !add(&mut tables, surveyed, &mut numbers) {
            obstacle = Some(format!("there is room for {room} far ends only"));
        }
        verdicts.insert(surveyed.device.name.clone(), obstacle);
    }
    (tables, verdicts)
}

/// Adds a device; `false`: not everything found room.
fn add(tables: &mut TunnelTables, surveyed: &Surveyed, numbers: &mut Numbers) -> bool {
    let device = &surveyed.device;
    let mut has_room = true;
    let inners = [
        (device.carries_v4, Inner::Ipv4, 4),
        (device.carries_v6, Inner::Ipv6, 6),
    ];
    let neighbours = if device.kind.is_ethernet() {
        surveyed.neighbours.as_slice()
    } else {
        &[[0; 6]]
    };
    for mac in neighbours {
        let Some(end) = surveyed.far_end(*mac) else {
            continue;
        };
        let end = FarEnd { mac: *mac, ..end };
        let Some(underlay) = surveyed
            .underlay
            .get(&end.remote)
            .filter(|underlay| underlay.is_native)
        else {
            continue;
        };
        for (_, inner, version) in inners.iter().filter(|(is_carried, ..)| *is_carried) {
            let Some(peer) = surveyed.far(&end, underlay, *inner).peer() else {
                continue;
            };
            let key = TunnelHopKey {
                ifindex: device.index,
                mac: MacAddress::new(*mac),
                version: *version,
            };
            let Some(id) = numbers.of(&key) else {
                has_room = false;
                continue;
            };
            tables.peers.insert(id, peer);
            let hop = TunnelHop {
                peer: id,
                reserved: 0,
            };
            tables.hops.insert(bytemuck::cast(key), (key, hop));
        }
    }
    for (remote, underlay) in &surveyed.underlay {
        for (_, inner, _) in inners.iter().filter(|(is_carried, ..)| *is_carried) {
            tables_entrance(tables, device, *remote, underlay, *inner);
        }
    }
    has_room && tables.endpoints.len() <= numbers.room
}

/// What comes in from a far end.
fn tables_entrance(
    tables: &mut TunnelTables,
    device: &TunnelDevice,
    remote: IpAddr,
    underlay: &Underlay,
    inner: Inner,
) {
    let kind = device.kind;
    let is_vni = matches!(kind, TunnelKind::VXLAN | TunnelKind::GENEVE);
    let is_gre = matches!(kind, TunnelKind::GRE | TunnelKind::GRETAP);
    let id = device.id_received.unwrap_or(0);
    let key = TunnelEndpointKey {
        local: underlay.local.into(),
        remote: if kind == TunnelKind::VXLAN {
            IpAddress::UNSPECIFIED
        } else {
            remote.into()
        },
        id: if is_vni {
            vni_word(id)
        } else {
            Be32::new(if is_gre { id } else { 0 })
        },
        port: Be16::new(if kind.is_udp() { device.port } else { 0 }),
        kind,
        detail: if is_gre {
            u8::from(device.id_received.is_some())
        } else if is_vni {
            0
        } else {
            inner.protocol()
        },
    };
    let value = TunnelEndpoint {
        ifindex: device.index,
        mtu_bytes: device.mtu_bytes,
        mac: MacAddress::new(device.mac.unwrap_or_default()),
        reserved: 0,
    };
    tables.add_endpoint(key, value);
}

/// Numbers of peers. Zero is none; who had a number keeps it, and a new one was nobody's the last time.
struct Numbers {
    known: BTreeMap<HopOrder, PeerId>,
    taken: BTreeSet<PeerId>,
    room: usize,
}

impl Numbers {
    fn new(before: &TunnelTables, room: usize) -> Self {
        let known: BTreeMap<_, _> = before
            .hops
            .iter()
            .map(|(key, (_, hop))| (*key, hop.peer))
            .collect();
        let taken = known.values().copied().chain([PeerId::NONE]).collect();
        Self { known, taken, room }
    }

    fn of(&mut self, key: &TunnelHopKey) -> Option<PeerId> {
        let order = bytemuck::cast(*key);
        if let Some(known) = self.known.get(&order) {
            return Some(*known);
        }
        let last = u16::try_from(self.room).unwrap_or(u16::MAX);
        let free = (1..last).map(PeerId).find(|id| !self.taken.contains(id))?;
        self.taken.insert(free);
        self.known.insert(order, free);
        Some(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forwarder_common::outer::DontFragment;

    fn device() -> TunnelDevice {
        TunnelDevice {
            name: "vx".to_owned(),
            index: 9,
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu_bytes: 1450,
            controller: None,
            kind: TunnelKind::VXLAN,
            carries_v4: true,
            carries_v6: true,
            local: None,
            remote: Some([10, 0, 0, 2].into()),
            id: Some(42),
            id_received: Some(42),
            port: 4789,
            source_ports: None,
            ttl: 64,
            tos: Some(0),
            dont_fragment: DontFragment::Never,
            has_checksum: (true, true),
            flow_label: 0,
            limit: None,
            link: None,
            obstacles: Vec::new(),
        }
    }

    fn surveyed() -> Surveyed {
        let underlay = Underlay {
            local: [10, 0, 0, 1].into(),
            interface: 3,
            mtu_bytes: 1480,
            is_native: true,
        };
        Surveyed {
            device: device(),
            far_ends: Vec::new(),
            neighbours: vec![[2, 0, 0, 0, 0, 2]],
            underlay: BTreeMap::from([([10, 0, 0, 2].into(), underlay)]),
        }
    }

    #[test]
    fn a_neighbour_behind_the_only_far_end_is_a_peer_for_each_family() {
        let (tables, verdicts) = tables(&[surveyed()], &TunnelTables::default(), 64);
        assert_eq!(verdicts["vx"], None);
        assert_eq!((tables.peers.len(), tables.hops.len()), (2, 2));
        let peer = &tables.peers[&PeerId(1)];
        assert_eq!(
            (peer.outer_len, peer.mtu_bytes),
            (50, 1430),
            "the underlay has less room"
        );
        assert_eq!(tables.ports[&4789].kind, TunnelKind::VXLAN);
        let (key, endpoint) = tables.endpoints.values().next().unwrap();
        assert_eq!((key.remote, key.id), (IpAddress::UNSPECIFIED, vni_word(42)));
        assert_eq!((endpoint.ifindex, endpoint.mtu_bytes), (9, 1450));
    }

    #[test]
    fn peers_keep_their_numbers() {
        let (first, _) = tables(&[surveyed()], &TunnelTables::default(), 64);
        let mut more = surveyed();
        more.neighbours.insert(0, [2, 0, 0, 0, 0, 1]);
        let (second, _) = tables(&[more], &first, 64);
        assert_eq!(second.peers.len(), 4);
        for (id, peer) in &first.peers {
            assert_eq!(second.peers[id], *peer);
        }
    }

    #[test]
    fn what_stands_in_the_way_is_said() {
        let said = |change: fn(&mut Surveyed)| {
            let mut surveyed = surveyed();
            change(&mut surveyed);
            let (tables, verdicts) = tables(&[surveyed], &TunnelTables::default(), 64);
            assert_eq!(tables, TunnelTables::default());
            verdicts["vx"].clone().unwrap()
        };
        assert!(said(|it| it.device.controller = Some(4)).contains("bridge"));
        assert!(said(|it| it.device.remote = None).contains("no far end"));
        assert!(said(|it| it.underlay.clear()).contains("no route"));
        assert!(said(|it| it.underlay.values_mut().for_each(|at| at.is_native = false)).contains("XDP"));
        assert!(said(|it| it.device.obstacles.push("it is external".to_owned())).contains("external"));
    }

    #[test]
    fn a_forwarding_entry_beats_the_default_and_two_defaults_are_none() {
        let mut surveyed = surveyed();
        let far = |mac, last| FarEnd {
            mac,
            remote: [10, 0, 0, last].into(),
            port: None,
            vni: None,
        };
        surveyed.far_ends = vec![far([0; 6], 2), far([2, 0, 0, 0, 0, 2], 7)];
        assert_eq!(
            surveyed.far_end([2, 0, 0, 0, 0, 2]).unwrap().remote,
            IpAddr::from([10, 0, 0, 7])
        );
        assert_eq!(
            surveyed.far_end([2, 0, 0, 0, 0, 3]).unwrap().remote,
            IpAddr::from([10, 0, 0, 2])
        );
        surveyed.far_ends.push(far([0; 6], 8));
        assert_eq!(surveyed.far_end([2, 0, 0, 0, 0, 3]), None);
    }
}
