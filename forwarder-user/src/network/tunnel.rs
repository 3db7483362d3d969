//! Tunnel devices as their owner made them: what the programs need to know to do a device's work, and what stands in
//! the way.
//!
//! Only what a device was told is read here; which packets that means is `state::tunnels`' business. What XDP cannot do
//! for a device is collected as words, see [`TunnelDevice::obstacles`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use forwarder_common::{
    abi::tunnel::TunnelKind,
    outer::DontFragment,
    wire::tunnel::{PROTOCOL_IPIP, PROTOCOL_IPV6},
};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        link::{
            GreEncapType, GreIOFlags, InfoData, InfoGeneve, InfoGre, InfoGre6, InfoIpTunnel, InfoKind,
            InfoVxlan, Ip6TunnelFlags, LinkAttribute, LinkInfo, LinkMessage, TunnelEncapFlags,
            TunnelEncapType,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState as KernelState},
        route::{RouteAddress, RouteAttribute, RouteMetric, RouteType},
    },
};

use super::{Interface, NeighbourState, Network, failed};
use crate::error::Error;

/// The kernel's default hop limit (RFC 1700), of kinds whose 0 does not mean "the inner packet's".
const DEFAULT_TTL: u8 = 64;
/// Lowest bit of a device's type of service: the inner packet's is used (Linux, `ip_tunnel_xmit`).
const TOS_INHERIT: u8 = 1;
/// Port of VXLAN (RFC 7348 §5).
const VXLAN_PORT: u16 = 4789;
/// Port of Geneve (RFC 8926 §3.3).
const GENEVE_PORT: u16 = 6081;
/// IP6_TNL_F_IGN_ENCAP_LIMIT of linux/ip6_tunnel.h.
const IGNORE_LIMIT: u32 = 1;
/// Traffic class and flow label of `flowinfo` (linux/ipv6.h).
const FLOW_LABEL: u32 = 0x000f_ffff;

/// A tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    pub name: String,
    /// The kernel's number of it.
    pub index: u32,
    /// `None` for kinds without Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Largest inner IP packet, in bytes.
    pub mtu_bytes: u32,
    /// Number of the bridge, bond or VRF that it is a port of.
    pub controller: Option<u32>,
    pub kind: TunnelKind,
    /// Does it carry IPv4, IPv6?
    pub carries_v4: bool,
    pub carries_v6: bool,
    /// Address of this host that its packets come from; `None`: as the route says.
    pub local: Option<IpAddr>,
    /// The far end; `None`: none or several, see [`Network::far_ends`].
    pub remote: Option<IpAddr>,
    /// Number of the network; key of GRE in what it sends.
    pub id: Option<u32>,
    /// The same in what it receives.
    pub id_received: Option<u32>,
    /// UDP destination port.
    pub port: u16,
    /// First and last UDP source port; `None`: it has no range of its own.
    pub source_ports: Option<(u16, u16)>,
    /// Zero: the inner packet's.
    pub ttl: u8,
    /// `None`: the inner packet's.
    pub tos: Option<u8>,
    pub dont_fragment: DontFragment,
    /// Do its UDP headers have checksums, over IPv4 and over IPv6?
    pub has_checksum: (bool, bool),
    pub flow_label: u32,
    /// The option of IPv6 tunnels that limits nesting.
    pub limit: Option<u8>,
    /// Number of the interface that it is bound to.
    pub link: Option<u32>,
    /// What it does that XDP cannot do for it, as a clause each; empty: nothing.
    pub obstacles: Vec<String>,
}

/// Where a tunnel device sends frames for an inner link address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarEnd {
    /// Zeros: all that no other entry names.
    pub mac: [u8; 6],
    pub remote: IpAddr,
    /// `None`: as the device.
    pub port: Option<u16>,
    pub vni: Option<u32>,
}

/// How packets to a far end leave this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Number of the interface that they leave by.
    pub interface: u32,
    /// The source address that the kernel would choose, or was asked about.
    pub source: Option<IpAddr>,
    /// Largest packet that gets there, in bytes, where that is less than the interface sends: the route says so, or
    /// the kernel has heard of it by ICMP (RFC 1191, RFC 8201), which it forgets after a while.
    pub mtu_bytes: Option<u32>,
}

impl TunnelDevice {
    /// `None` for devices of other kinds, such as WireGuard or TUN.
    pub(super) fn from_message(message: &LinkMessage) -> Option<Self> {
        let interface = Interface::from_message(message);
        let infos = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })?;
        let kind = infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        })?;
        let data = infos.iter().find_map(|info| match info {
            LinkInfo::Data(data) => Some(data),
            _ => None,
        })?;
        let mut device = Self {
            name: interface.name,
            index: interface.index,
            mac: interface.mac,
            mtu_bytes: interface.mtu_bytes,
            controller: interface.controller,
            kind: TunnelKind::NONE,
            carries_v4: true,
            carries_v6: true,
            local: None,
            remote: None,
            id: None,
            id_received: None,
            port: 0,
            source_ports: None,
            ttl: 0,
            tos: Some(0),
            dont_fragment: DontFragment::Always,
            has_checksum: (true, true),
            flow_label: 0,
            limit: None,
            link: None,
            obstacles: Vec::new(),
        };
        match (data, kind) {
            (InfoData::Vxlan(infos), _) => device.read_vxlan(infos),
            (InfoData::Geneve(infos), _) => device.read_geneve(infos),
            (InfoData::IpTunnel(infos), kind) => device.read_ip_tunnel(infos, kind),
            (InfoData::GreTun(infos), _) => device.read_gre(infos, TunnelKind::GRE),
            (InfoData::GreTap(infos), _) => device.read_gre(infos, TunnelKind::GRETAP),
            (InfoData::GreTun6(infos), _) => device.read_gre6(infos, TunnelKind::GRE),
            (InfoData::GreTap6(infos), _) => device.read_gre6(infos, TunnelKind::GRETAP),
            _ => return None,
        }
        if device.remote.is_some_and(|remote| remote.is_multicast()) {
            device.remote = None;
            device.obstacle("its far end is a multicast group");
        }
        Some(device)
    }

    fn obstacle(&mut self, what: impl Into<String>) {
        self.obstacles.push(what.into());
    }

    fn set_local(&mut self, address: impl Into<IpAddr>) {
        self.local = Some(address.into()).filter(|address| !address.is_unspecified());
    }

    fn set_remote(&mut self, address: impl Into<IpAddr>) {
        self.remote = Some(address.into()).filter(|address| !address.is_unspecified());
    }

    fn set_tos(&mut self, tos: u8) {
        self.tos = (tos & TOS_INHERIT == 0).then_some(tos);
    }

    fn set_mark(&mut self, mark: u32) {
        if mark != 0 {
            self.obstacle("its packets carry a firewall mark");
        }
    }

    fn read_vxlan(&mut self, infos: &[InfoVxlan]) {
        self.kind = TunnelKind::VXLAN;
        self.port = VXLAN_PORT;
        self.dont_fragment = DontFragment::Never;
        for info in infos {
            match info {
                InfoVxlan::Id(id) => self.id = Some(*id),
                InfoVxlan::Group(address) => self.set_remote(*address),
                InfoVxlan::Group6(address) => self.set_remote(*address),
                InfoVxlan::Local(address) => self.set_local(*address),
                InfoVxlan::Local6(address) => self.set_local(*address),
                InfoVxlan::Link(index) => self.link = Some(*index).filter(|index| *index != 0),
                InfoVxlan::Tos(tos) => self.set_tos(*tos),
                InfoVxlan::Ttl(ttl) => self.ttl = *ttl,
                InfoVxlan::Label(label) => self.flow_label = *label & FLOW_LABEL,
                InfoVxlan::PortRange(range) => self.source_ports = Some(*range).filter(|range| range.1 != 0),
                InfoVxlan::Port(port) => self.port = *port,
                InfoVxlan::UDPCsum(is_on) => self.has_checksum.0 = *is_on,
                InfoVxlan::UDPZeroCsumTX(is_on) => self.has_checksum.1 = !is_on,
                InfoVxlan::Df(df) => self.dont_fragment = dont_fragment(u8::from(*df)),
                InfoVxlan::CollectMetadata(true) => {
                    self.obstacle("it is external: its far ends are chosen packet by packet");
                }
                InfoVxlan::Gbp => self.obstacle("it sends group policies"),
                InfoVxlan::Gpe => self.obstacle("it uses the generic protocol extension"),
                InfoVxlan::RemCsumTX(true) | InfoVxlan::RemCsumRX(true) => {
                    self.obstacle("it offloads checksums to the far end");
                }
                InfoVxlan::Vnifilter(true) => self.obstacle("it carries several networks"),
                _ => {}
            }
        }
        let inherits = infos
            .iter()
            .any(|info| matches!(info, InfoVxlan::TtlInherit(on) if *on != 0));
        if self.ttl == 0 && !inherits {
            self.ttl = DEFAULT_TTL;
        }
        self.id_received = self.id;
    }

    fn read_geneve(&mut self, infos: &[InfoGeneve]) {
        self.kind = TunnelKind::GENEVE;
        self.port = GENEVE_PORT;
        self.dont_fragment = DontFragment::Never;
        let mut inherits = false;
        for info in infos {
            match info {
                InfoGeneve::Id(id) => self.id = Some(*id),
                InfoGeneve::Remote(address) => self.set_remote(*address),
                InfoGeneve::Remote6(address) => self.set_remote(*address),
                InfoGeneve::Local(address) => self.set_local(*address),
                InfoGeneve::Local6(address) => self.set_local(*address),
                InfoGeneve::Ttl(ttl) => self.ttl = *ttl,
                InfoGeneve::TtlInherit(is_on) => inherits = *is_on,
                InfoGeneve::Tos(tos) => self.set_tos(*tos),
                InfoGeneve::Port(port) => self.port = *port,
                InfoGeneve::UdpCsum(is_on) => self.has_checksum.0 = *is_on,
                InfoGeneve::UdpZeroCsum6Tx(is_on) => self.has_checksum.1 = !is_on,
                InfoGeneve::Label(label) => self.flow_label = *label & FLOW_LABEL,
                InfoGeneve::Df(df) => self.dont_fragment = dont_fragment(u8::from(*df)),
                InfoGeneve::CollectMetadata => {
                    self.obstacle("it is external: its far ends are chosen packet by packet");
                }
                InfoGeneve::InnerProtoInherit => self.obstacle("it carries IP without Ethernet"),
                _ => {}
            }
        }
        if self.ttl == 0 && !inherits {
            self.ttl = DEFAULT_TTL;
        }
        self.id_received = self.id;
    }

    fn read_ip_tunnel(&mut self, infos: &[InfoIpTunnel], kind: &InfoKind) {
        self.kind = TunnelKind::IPIP;
        let mut flow_info = 0;
        let mut checksums = TunnelEncapFlags::empty();
        for info in infos {
            match info {
                InfoIpTunnel::Local(address) => self.set_local(*address),
                InfoIpTunnel::Remote(address) => self.set_remote(*address),
                InfoIpTunnel::Link(index) => self.link = Some(*index).filter(|index| *index != 0),
                InfoIpTunnel::Ttl(ttl) => self.ttl = *ttl,
                InfoIpTunnel::Tos(tos) => self.set_tos(*tos),
                InfoIpTunnel::PMtuDisc(false) => self.dont_fragment = DontFragment::Inherit,
                InfoIpTunnel::EncapLimit(limit) => self.limit = Some(*limit),
                InfoIpTunnel::FlowInfo(info) => flow_info = *info,
                InfoIpTunnel::Protocol(protocol) => {
                    // Zero: any. MPLS and others carry nothing of ours.
                    let protocol = u8::from(*protocol);
                    self.carries_v4 = protocol == 0 || protocol == PROTOCOL_IPIP;
                    self.carries_v6 = protocol == 0 || protocol == PROTOCOL_IPV6;
                }
                InfoIpTunnel::EncapType(TunnelEncapType::None) => {}
                InfoIpTunnel::EncapType(TunnelEncapType::Fou) => self.kind = TunnelKind::FOU,
                InfoIpTunnel::EncapType(TunnelEncapType::Gue) => self.kind = TunnelKind::GUE,
                InfoIpTunnel::EncapType(_) => self.obstacle("it carries something else than IP"),
                InfoIpTunnel::EncapFlags(flags) => checksums = *flags,
                InfoIpTunnel::EncapSPort(port) => {
                    self.source_ports = Some((*port, *port)).filter(|(port, _)| *port != 0);
                }
                InfoIpTunnel::EncapDPort(port) => self.port = *port,
                InfoIpTunnel::CollectMetadata => {
                    self.obstacle("it is external: its far ends are chosen packet by packet");
                }
                InfoIpTunnel::FwMark(mark) => self.set_mark(*mark),
                _ => {}
            }
        }
        if *kind == InfoKind::Ip6Tnl {
            let flags = infos.iter().find_map(|info| match info {
                InfoIpTunnel::Ipv6Flags(flags) => Some(*flags),
                _ => None,
            });
            let flags = flags.unwrap_or(Ip6TunnelFlags::empty());
            self.set_flow_info(flow_info, flags.bits());
        }
        if checksums.bits() & REMOTE_CHECKSUM != 0 {
            self.obstacle("it offloads checksums to the far end");
        }
        self.has_checksum = (
            checksums.bits() & CHECKSUM != 0,
            checksums.bits() & CHECKSUM6 != 0,
        );
    }

    /// Traffic class, flow label and limit of an IPv6 tunnel, as its flags say.
    fn set_flow_info(&mut self, flow_info: u32, flags: u32) {
        self.flow_label = flow_info & FLOW_LABEL;
        self.tos = Some((flow_info >> 20) as u8);
        if flags & Ip6TunnelFlags::UseOrigTclass.bits() != 0 {
            self.tos = None;
        }
        if flags & IGNORE_LIMIT != 0 {
            self.limit = None;
        }
        if flags & Ip6TunnelFlags::UseOrigFlowlabel.bits() != 0 {
            self.obstacle("it copies flow labels");
        }
        if flags & Ip6TunnelFlags::UseOrigFwMark.bits() != 0 {
            self.obstacle("it copies firewall marks");
        }
        if flags & Ip6TunnelFlags::RcvDscpCopy.bits() != 0 {
            self.obstacle("it copies the type of service of what it receives");
        }
    }

    fn set_gre_flags(&mut self, sent: GreIOFlags, received: GreIOFlags, keys: (u32, u32)) {
        let both = sent | received;
        if both.contains(GreIOFlags::Seq) {
            self.obstacle("it numbers its packets (seq)");
        }
        if both.contains(GreIOFlags::Checksum) {
            self.obstacle("its packets have GRE checksums (csum)");
        }
        self.id = sent.contains(GreIOFlags::Key).then_some(keys.0);
        self.id_received = received.contains(GreIOFlags::Key).then_some(keys.1);
    }

    fn read_gre(&mut self, infos: &[InfoGre], kind: TunnelKind) {
        self.kind = kind;
        let (mut sent, mut received) = (GreIOFlags::empty(), GreIOFlags::empty());
        let mut keys = (0, 0);
        for info in infos {
            match info {
                InfoGre::Local(address) => self.set_local(*address),
                InfoGre::Remote(address) => self.set_remote(*address),
                InfoGre::Link(index) => self.link = Some(*index).filter(|index| *index != 0),
                InfoGre::OFlags(flags) => sent = *flags,
                InfoGre::IFlags(flags) => received = *flags,
                InfoGre::OKey(key) => keys.0 = *key,
                InfoGre::IKey(key) => keys.1 = *key,
                InfoGre::Ttl(ttl) => self.ttl = *ttl,
                InfoGre::Tos(tos) => self.set_tos(*tos),
                InfoGre::PathMTUDiscovery(false) => self.dont_fragment = DontFragment::Inherit,
                InfoGre::EncapType(kind) => self.set_gre_encapsulation(*kind),
                InfoGre::CollectMetadata => {
                    self.obstacle("it is external: its far ends are chosen packet by packet");
                }
                InfoGre::FwMask(mark) => self.set_mark(*mark),
                _ => {}
            }
        }
        self.set_gre_flags(sent, received, keys);
    }

    fn read_gre6(&mut self, infos: &[InfoGre6], kind: TunnelKind) {
        self.kind = kind;
        let (mut sent, mut received) = (GreIOFlags::empty(), GreIOFlags::empty());
        let mut keys = (0, 0);
        let (mut flow_info, mut flags) = (0, 0);
        for info in infos {
            match info {
                InfoGre6::Local(address) => self.set_local(*address),
                InfoGre6::Remote(address) => self.set_remote(*address),
                InfoGre6::Link(index) => self.link = Some(*index).filter(|index| *index != 0),
                InfoGre6::OFlags(flags) => sent = *flags,
                InfoGre6::IFlags(flags) => received = *flags,
                InfoGre6::OKey(key) => keys.0 = *key,
                InfoGre6::IKey(key) => keys.1 = *key,
                InfoGre6::Ttl(ttl) => self.ttl = *ttl,
                InfoGre6::EncapLimit(limit) => self.limit = Some(*limit),
                InfoGre6::FlowLabel(info) => flow_info = *info,
                InfoGre6::EncapType(kind) => self.set_gre_encapsulation(*kind),
                InfoGre6::CollectMetadata => {
                    self.obstacle("it is external: its far ends are chosen packet by packet");
                }
                InfoGre6::FwMask(mark) => self.set_mark(*mark),
                InfoGre6::Other(other) => flags = flags_of(other).unwrap_or(flags),
                _ => {}
            }
        }
        self.set_gre_flags(sent, received, keys);
        self.set_flow_info(flow_info, flags);
    }

    fn set_gre_encapsulation(&mut self, kind: GreEncapType) {
        if kind != GreEncapType::None {
            self.obstacle("it carries GRE in UDP");
        }
    }
}

/// TUNNEL_ENCAP_FLAG_CSUM, _CSUM6 and _REMCSUM of linux/if_tunnel.h.
const CHECKSUM: u16 = 1;
const CHECKSUM6: u16 = 2;
const REMOTE_CHECKSUM: u16 = 4;
/// IFLA_GRE_FLAGS of linux/if_tunnel.h: IP6_TNL_F_* of an IPv6 GRE device.
const GRE_FLAGS: u16 = 13;

fn flags_of(attribute: &rtnetlink::packet_core::DefaultNla) -> Option<u32> {
    use rtnetlink::packet_core::Nla as _;
    let mut value = [0; 4];
    if attribute.kind() != GRE_FLAGS || attribute.value_len() != value.len() {
        return None;
    }
    attribute.emit_value(&mut value);
    Some(u32::from_ne_bytes(value))
}

/// VXLAN_DF_* and GENEVE_DF_* of linux/if_link.h.
fn dont_fragment(df: u8) -> DontFragment {
    match df {
        0 => DontFragment::Never,
        1 => DontFragment::Always,
        _ => DontFragment::Inherit,
    }
}

impl FarEnd {
    /// `None` for what is no forwarding entry of a tunnel device with one far end.
    fn from_message(message: &NeighbourMessage) -> Option<Self> {
        let (mut mac, mut remote, mut port, mut vni) = (None, None, None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
                NeighbourAttribute::Destination(address) => remote = ip_address(address),
                NeighbourAttribute::Port(number) => port = Some(*number),
                NeighbourAttribute::Vni(number) => vni = Some(*number),
                _ => {}
            }
        }
        Some(Self {
            mac: mac?,
            remote: remote?,
            port,
            vni,
        })
    }
}

/// Entries of a bridge's family do not say which one their addresses have.
fn ip_address(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        NeighbourAddress::Other(bytes) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|bytes| Ipv4Addr::from(bytes).into());
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(|bytes| Ipv6Addr::from(bytes).into()))
                .ok()
        }
        _ => None,
    }
}

impl Network {
    /// The tunnel device called `name`; `None` if there is none, or it is of a kind that the programs do not know.
    pub async fn tunnel_device(&self, name: &str) -> Result<Option<TunnelDevice>, Error> {
        let mut devices = self.tunnel_devices().await?.into_iter();
        Ok(devices.find(|device| device.name == name))
    }

    /// All tunnel devices of kinds that the programs know.
    pub(super) async fn tunnel_devices(&self) -> Result<Vec<TunnelDevice>, Error> {
        let links = self
            .all(|handle| handle.link().get().execute())
            .await
            .map_err(|error| failed("list the tunnel devices", &error))?;
        Ok(links.iter().filter_map(TunnelDevice::from_message).collect())
    }

    /// Where the tunnel device with number `interface` sends frames, as its forwarding table says.
    pub async fn far_ends(&self, interface: u32) -> Result<Vec<FarEnd>, Error> {
        let entries = self
            .all(|handle| {
                let request = handle.neighbours().get();
                request.set_address_family(AddressFamily::Bridge).execute()
            })
            .await
            .map_err(|error| failed("list the forwarding entries", &error))?;
        let of_interface = entries.iter().filter(|entry| entry.header.ifindex == interface);
        Ok(of_interface.filter_map(FarEnd::from_message).collect())
    }

    /// How packets to `remote` leave; `None`: no route.
    pub async fn way_to(&self, remote: IpAddr, from: Option<IpAddr>) -> Option<Way> {
        let request = match (remote, from) {
            (IpAddr::V4(remote), from) => {
                let builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(remote, 32);
                match from {
                    Some(IpAddr::V4(from)) => builder.source_prefix(from, 32).build(),
                    _ => builder.build(),
                }
            }
            (IpAddr::V6(remote), from) => {
                let builder = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(remote, 128);
                match from {
                    Some(IpAddr::V6(from)) => builder.source_prefix(from, 128).build(),
                    _ => builder.build(),
                }
            }
        };
        let mut answers = std::pin::pin!(self.handle.route().get(request).execute());
        // Whatever the kernel says instead of a route means that there is none.
        let route = answers.try_next().await.ok()??;
        let (mut interface, mut source, mut mtu_bytes) = (None, from, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some((*address).into()),
                RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some((*address).into()),
                RouteAttribute::Metrics(metrics) => {
                    mtu_bytes = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(bytes) => Some(*bytes),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        let is_sent = route.header.kind == RouteType::Unicast;
        interface.filter(|_| is_sent).map(|interface| Way {
            interface,
            source,
            mtu_bytes,
        })
    }

    /// Link addresses of the usable neighbours on the interface with number `interface`, of both families, with the IP
    /// version of each.
    pub async fn neighbour_macs(&self, interface: u32) -> Result<Vec<[u8; 6]>, Error> {
        let mut macs = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let entries = self
                .all(move |handle| handle.neighbours().get().set_address_family(family).execute())
                .await
                .map_err(|error| failed("list the neighbours", &error))?;
            let of_interface = entries.iter().filter(|entry| entry.header.ifindex == interface);
            macs.extend(of_interface.filter_map(usable_mac));
        }
        macs.sort_unstable();
        macs.dedup();
        Ok(macs)
    }
}

fn usable_mac(entry: &NeighbourMessage) -> Option<[u8; 6]> {
    let is_usable =
        entry.header.state != KernelState::Noarp && NeighbourState::from(entry.header.state).is_usable();
    let mac = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    mac.filter(|_| is_usable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    #[test]
    fn a_vxlan_device_says_all_that_its_packets_need() {
        in_namespace(async {
            ip(
                "link add fx type vxlan id 77 local 127.0.0.1 remote 127.0.0.9 dstport 4790 srcport 50000 50100 ttl 9 tos 0x10 df set",
            );
            ip("link set fx mtu 1400 address 02:00:00:00:00:77 up");
            let network = Network::open().unwrap();
            let device = network.tunnel_device("fx").await.unwrap().unwrap();
            assert_eq!(
                (device.kind, device.id, device.port),
                (TunnelKind::VXLAN, Some(77), 4790)
            );
            assert_eq!(device.local, Some([127, 0, 0, 1].into()));
            assert_eq!(device.remote, Some([127, 0, 0, 9].into()));
            assert_eq!(device.source_ports, Some((50000, 50100)));
            assert_eq!((device.ttl, device.tos), (9, Some(16)));
            assert_eq!(device.dont_fragment, DontFragment::Always);
            assert_eq!(
                (device.mtu_bytes, device.mac),
                (1400, Some([2, 0, 0, 0, 0, 0x77]))
            );
            assert!(device.obstacles.is_empty(), "{:?}", device.obstacles);

            ip("neigh add 10.7.0.9 lladdr 02:00:00:00:00:09 dev fx nud permanent");
            assert_eq!(
                network.neighbour_macs(device.index).await.unwrap(),
                [[2, 0, 0, 0, 0, 9]]
            );
            let far_ends = network.far_ends(device.index).await.unwrap();
            let by_default = FarEnd {
                mac: [0; 6],
                remote: [127, 0, 0, 9].into(),
                port: None,
                vni: None,
            };
            assert_eq!(far_ends, [by_default]);
        });
    }

    #[test]
    fn a_changed_device_is_reported() {
        in_namespace(async {
            ip("link add fx type vxlan id 77 local 127.0.0.1 remote 127.0.0.9 dstport 4790");
            ip("link set fx up");
            let network = Network::open().unwrap();
            let mut watch = network.watch().await.unwrap();
            for change in [
                "link set fx type vxlan id 77 local 127.0.0.1 remote 127.0.0.8",
                "link set fx mtu 1300",
            ] {
                ip(change);
                while !watch.changed().await.unwrap().tunnels {}
            }
            let device = network.tunnel_device("fx").await.unwrap().unwrap();
            assert_eq!(device.remote, Some([127, 0, 0, 8].into()));
            let far_ends = network.far_ends(device.index).await.unwrap();
            assert_eq!(far_ends.len(), 1, "{far_ends:?}");
            assert_eq!(far_ends[0].remote, IpAddr::from([127, 0, 0, 8]));
        });
    }

    #[test]
    fn what_xdp_cannot_do_is_said() {
        in_namespace(async {
            ip("link set lo up");
            ip("link add fx type vxlan external");
            ip("link add fy type vxlan id 7 group 239.1.1.1 dev lo");
            ip("link add fz type veth peer name fw");
            let network = Network::open().unwrap();
            let external = network.tunnel_device("fx").await.unwrap().unwrap();
            assert!(external.obstacles[0].contains("external"), "{external:?}");
            let group = network.tunnel_device("fy").await.unwrap().unwrap();
            assert!(group.obstacles[0].contains("multicast"), "{group:?}");
            assert_eq!(network.tunnel_device("fz").await.unwrap(), None);
        });
    }
}
