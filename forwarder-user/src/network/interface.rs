//! Interfaces: what they are called, what they are, whether they carry traffic.

use std::{fmt, net::IpAddr};

use nix::errno::Errno;
use rtnetlink::packet_route::link::{
    InfoData, InfoGeneve, InfoKind, InfoVlan, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage, VlanProtocol,
};

use super::{Network, failed, one};
use crate::error::Error;

/// A network interface at the moment it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    /// The kernel's number for it, never 0 and not reused while the namespace lives (it may wrap).
    pub index: u32,
    /// `None` for interfaces without an Ethernet header.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet that it sends, in bytes.
    pub mtu_bytes: u32,
    /// Set up by the operator (`ip link set up`).
    pub is_up: bool,
    /// The lower layer can carry frames. Only meaningful while `is_up`.
    pub has_carrier: bool,
    /// Its frames begin with an Ethernet header (`false`: TUN, IPIP, WireGuard, ...).
    pub is_ethernet: bool,
    /// Next hops have to be resolved here (`false`: flag NOARP).
    pub has_neighbours: bool,
    pub kind: InterfaceKind,
    /// Number of the bond, bridge or VRF that it is a port of.
    pub controller: Option<u32>,
    /// The far end of a tunnel, in the network that carries it; `None` where it has none or several.
    pub remote: Option<IpAddr>,
    /// Of a VLAN device: its tag, and the interface below.
    pub vlan: Option<Vlan>,
    /// What somebody has noted on it (`ip link set alias`).
    pub alias: Option<String>,
    /// The kernel driver of a physical interface; `None` where sysfs does not tell.
    pub driver: Option<String>,
}

impl Interface {
    /// Whether it can carry traffic now: up and with carrier.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.is_up && self.has_carrier
    }

    pub(super) fn from_message(message: &LinkMessage) -> Self {
        let header = &message.header;
        let flags = header.flags;
        let is_ethernet = header.link_layer_type == LinkLayerType::Ether;
        let mut interface = Self {
            name: String::new(),
            index: header.index,
            mac: None,
            mtu_bytes: 0,
            is_up: flags.contains(LinkFlags::Up),
            has_carrier: flags.contains(LinkFlags::LowerUp),
            is_ethernet,
            has_neighbours: !flags.intersects(LinkFlags::Noarp | LinkFlags::Loopback),
            kind: if flags.contains(LinkFlags::Loopback) {
                InterfaceKind::Loopback
            } else {
                InterfaceKind::Physical
            },
            controller: None,
            remote: None,
            alias: None,
            vlan: None,
            driver: None,
        };
        let mut carrier = 0;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Link(index) => carrier = *index,
                LinkAttribute::IfName(name) => interface.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => interface.alias = Some(alias.clone()),
                LinkAttribute::Mtu(mtu_bytes) => interface.mtu_bytes = *mtu_bytes,
                LinkAttribute::Address(mac) if is_ethernet => {
                    interface.mac = mac.as_slice().try_into().ok();
                }
                LinkAttribute::Controller(index) => {
                    interface.controller = Some(*index).filter(|index| *index > 0);
                }
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => interface.kind = InterfaceKind::from(kind),
                            LinkInfo::Data(data) => {
                                interface.remote = remote(data);
                                interface.vlan = vlan(data);
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        // What a link in another namespace is called here, nobody knows.
        interface.vlan = interface
            .vlan
            .filter(|_| carrier > 0)
            .map(|vlan| Vlan { carrier, ..vlan });
        interface
    }

    /// Reads the driver from sysfs, which shows interfaces of the namespace it was mounted in: the index tells
    /// whether it means the same one.
    fn find_driver(&mut self) {
        let directory = format!("/sys/class/net/{}", self.name);
        let index = std::fs::read_to_string(format!("{directory}/ifindex")).ok();
        if index.and_then(|text| text.trim().parse().ok()) == Some(self.index) {
            self.driver = std::fs::read_link(format!("{directory}/device/driver"))
                .ok()
                .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        }
    }
}

/// The tag of a VLAN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// Number of the interface that carries its frames.
    pub carrier: u32,
    /// 1 to 4094.
    pub id: u16,
    /// The tag is a service tag (802.1ad) instead of a customer's (802.1Q).
    pub is_service: bool,
}

/// The tag that a VLAN device was made with; its carrier is told elsewhere.
fn vlan(data: &InfoData) -> Option<Vlan> {
    let InfoData::Vlan(infos) = data else {
        return None;
    };
    let id = infos.iter().find_map(|info| match info {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })?;
    let is_service = infos.contains(&InfoVlan::Protocol(VlanProtocol::Ieee8021Ad));
    Some(Vlan {
        carrier: 0,
        id,
        is_service,
    })
}

/// The far end that a tunnel device was made with.
fn remote(data: &InfoData) -> Option<IpAddr> {
    let address = match data {
        InfoData::Vxlan(infos) => infos.iter().find_map(|info| match info {
            InfoVxlan::Group(address) => Some(IpAddr::V4(*address)),
            InfoVxlan::Group6(address) => Some(IpAddr::V6(*address)),
            _ => None,
        }),
        InfoData::Geneve(infos) => infos.iter().find_map(|info| match info {
            InfoGeneve::Remote(address) => Some(IpAddr::V4(*address)),
            InfoGeneve::Remote6(address) => Some(IpAddr::V6(*address)),
            _ => None,
        }),
        _ => None,
    };
    address.filter(|address| !address.is_unspecified() && !address.is_multicast())
}

/// What an interface is. Displays as `ip -details link` calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceKind {
    /// Hardware, or what a hypervisor shows as such.
    Physical,
    Loopback,
    Veth,
    Vxlan,
    Geneve,
    /// TUN or TAP; [`Interface::is_ethernet`] tells them apart.
    Tun,
    Ipip,
    Gre,
    Gretap,
    Wireguard,
    Bond,
    Bridge,
    Vlan,
    /// Any other, by the kernel's name.
    Other(String),
}

impl InterfaceKind {
    /// Whether frames leave it inside packets of another network.
    #[must_use]
    pub fn is_tunnel(&self) -> bool {
        match self {
            Self::Vxlan
            | Self::Geneve
            | Self::Tun
            | Self::Ipip
            | Self::Gre
            | Self::Gretap
            | Self::Wireguard => true,
            Self::Other(name) => matches!(
                name.as_str(),
                "sit"
                    | "vti"
                    | "vti6"
                    | "xfrm"
                    | "ip6tnl"
                    | "ip6gre"
                    | "ip6gretap"
                    | "erspan"
                    | "ip6erspan"
                    | "bareudp"
                    | "gtp"
            ),
            Self::Physical | Self::Loopback | Self::Veth | Self::Bond | Self::Bridge | Self::Vlan => false,
        }
    }
}

impl InterfaceKind {
    /// What the tunnel adds to an inner IP packet, in bytes: outer IPv4 header without options, the tunnel's own
    /// headers, the inner Ethernet header where there is one. `None` for what is not a tunnel or varies.
    #[must_use]
    pub fn overhead_bytes(&self) -> Option<u32> {
        match self {
            // IPv4 20, UDP 8, VXLAN or Geneve without options 8, Ethernet 14.
            Self::Vxlan | Self::Geneve => Some(50),
            Self::Ipip => Some(20),
            Self::Gre => Some(24),
            Self::Gretap => Some(38),
            // IPv4 20, UDP 8, message header 16, tag 16.
            Self::Wireguard => Some(60),
            _ => None,
        }
    }
}

impl From<&InfoKind> for InterfaceKind {
    fn from(kind: &InfoKind) -> Self {
        match kind {
            InfoKind::Veth => Self::Veth,
            InfoKind::Vxlan => Self::Vxlan,
            InfoKind::Geneve => Self::Geneve,
            InfoKind::Tun => Self::Tun,
            InfoKind::IpIp => Self::Ipip,
            InfoKind::GreTun => Self::Gre,
            InfoKind::GreTap => Self::Gretap,
            InfoKind::Wireguard => Self::Wireguard,
            InfoKind::Bond => Self::Bond,
            InfoKind::Bridge => Self::Bridge,
            InfoKind::Vlan => Self::Vlan,
            other => Self::Other(other.to_string()),
        }
    }
}

impl fmt::Display for InterfaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Physical => "physical",
            Self::Loopback => "loopback",
            Self::Veth => "veth",
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
            Self::Tun => "tun",
            Self::Ipip => "ipip",
            Self::Gre => "gre",
            Self::Gretap => "gretap",
            Self::Wireguard => "wireguard",
            Self::Bond => "bond",
            Self::Bridge => "bridge",
            Self::Vlan => "vlan",
            Self::Other(name) => name,
        })
    }
}

impl Network {
    /// All interfaces, in the kernel's order.
    pub async fn interfaces(&self) -> Result<Vec<Interface>, Error> {
        let messages = self
            .all(|handle| handle.link().get().execute())
            .await
            .map_err(|error| failed("list the interfaces", &error))?;
        let mut interfaces: Vec<_> = messages.iter().map(Interface::from_message).collect();
        interfaces.iter_mut().for_each(Interface::find_driver);
        Ok(interfaces)
    }

    /// The interface called `name`; `None` if there is none.
    pub async fn interface(&self, name: &str) -> Result<Option<Interface>, Error> {
        let request = self.handle.link().get().match_name(name);
        match one(request.execute(), Errno::ENODEV).await {
            Ok(message) => Ok(message.map(|message| with_driver(&message))),
            // The kernel refuses names that no interface can have: longer than 15 bytes, or empty.
            Err(error) if matches!(super::errno(&error), Some(Errno::ERANGE | Errno::EINVAL)) => Ok(None),
            Err(error) => Err(failed(format_args!("look up interface \"{name}\""), &error)),
        }
    }

    /// The interface with the kernel's number `index`; `None` if there is none.
    pub async fn interface_by_index(&self, index: u32) -> Result<Option<Interface>, Error> {
        let request = self.handle.link().get().match_index(index);
        let message = one(request.execute(), Errno::ENODEV)
            .await
            .map_err(|error| failed(format_args!("look up interface {index}"), &error))?;
        Ok(message.map(|message| with_driver(&message)))
    }
}

fn with_driver(message: &LinkMessage) -> Interface {
    let mut interface = Interface::from_message(message);
    interface.find_driver();
    interface
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    #[test]
    fn says_what_each_interface_is() {
        in_namespace(async {
            ip("link add fa address 02:00:00:00:00:0a mtu 1400 type veth peer name fb");
            ip("link add fx type vxlan id 7 local 127.0.0.1 dstport 4789");
            ip("link set fa up");
            let network = Network::open().unwrap();

            let veth = network.interface("fa").await.unwrap().unwrap();
            assert_eq!(veth.kind, InterfaceKind::Veth);
            assert_eq!(veth.mac, Some([2, 0, 0, 0, 0, 0x0a]));
            assert_eq!(veth.mtu_bytes, 1400);
            assert!(veth.is_up && !veth.has_carrier && !veth.is_running(), "{veth:?}");
            ip("link set fb up");
            let veth = network.interface_by_index(veth.index).await.unwrap().unwrap();
            assert!(veth.is_running(), "{veth:?}");

            let all = network.interfaces().await.unwrap();
            let find = |name: &str| all.iter().find(|interface| interface.name == name).unwrap();
            assert_eq!(find("lo").kind, InterfaceKind::Loopback);
            assert!(!find("lo").has_neighbours);
            assert_eq!(find("fx").kind, InterfaceKind::Vxlan);
            assert!(find("fx").kind.is_tunnel() && find("fx").is_ethernet && !find("fx").is_up);

            assert_eq!(network.interface("absent").await.unwrap(), None);
            assert_eq!(network.interface("a-name-longer-than-any").await.unwrap(), None);
            assert_eq!(network.interface("").await.unwrap(), None);
            assert_eq!(network.interface_by_index(9999).await.unwrap(), None);
        });
    }
}
