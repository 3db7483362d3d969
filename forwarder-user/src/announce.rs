//! Tells the neighbours whose addresses these are now: gratuitous ARP and unsolicited neighbour advertisements.
//!
//! VIPs and the pool's addresses are on no interface; the data path answers who asks for them. Hosts that knew them
//! at another gateway don't ask, so they are told when the agent starts, when an address comes, and when a link comes
//! back: twice, two seconds apart (RFC 5227 §2.3; RFC 4861 §7.2.6 allows three). And who asks for an IPv6 address
//! asks its solicited-node multicast group (RFC 4291 §2.7.1), which a NIC or a switch lets through to members only:
//! so the agent is one, on every Ethernet interface whose network has the address.
//!
//! Only where this matters: an address that is reached by a route is nobody's neighbour. Of a large pool the first
//! [`MAX_POOL_ADDRESSES`] of each family are told of; the others are found by asking.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr},
};

use bytemuck::{Pod, Zeroable, bytes_of};
use forwarder_common::wire::{
    Be16, Be32, IpAddress, Ipv4Address, LinkPair, MacAddress,
    arp::{ArpPacket, HARDWARE_ETHERNET, OPERATION_REQUEST},
    checksum::{finish, fold, pseudo_header, sum_bytes},
    ethernet::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader},
    icmp::{IcmpHeader, TYPE_NEIGHBOUR_ADVERTISEMENT},
    ipv6::{Ipv6Header, PROTOCOL_ICMPV6},
};
use socket2::{Domain, Socket, Type};
use tracing::{debug, info};

use crate::{
    config::{Config, address::plus},
    error::Error,
    network::{Interface, Network, PacketSocket},
};

/// Pool addresses of a family that are announced: more would be a flood, and few pools lie in a neighbour's network.
pub const MAX_POOL_ADDRESSES: u32 = 256;
/// Rounds of announcements, one a second: the first and the third send.
const ROUNDS: u32 = 3;
/// RFC 4861 §7.1.2: a receiver takes nothing with less.
const HOP_LIMIT: u8 = 255;
/// RFC 4861 §4.4: "override", as whatever was known is to be replaced.
const OVERRIDE: u32 = 0x2000_0000;
/// RFC 4861 §4.6.1: option with the target's link address.
const OPTION_TARGET_LINK: u8 = 2;
/// RFC 4291 §2.7.1: all nodes of a link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// RFC 2464 §7: where frames to it go.
const ALL_NODES_MAC: MacAddress = MacAddress::new([0x33, 0x33, 0, 0, 0, 1]);
const BROADCAST_MAC: MacAddress = MacAddress::new([0xff; 6]);

/// An interface, and the addresses of ours that lie in its networks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    interface: u32,
    name: String,
    mac: [u8; 6],
    addresses: BTreeSet<IpAddr>,
}

/// What the agent keeps to announce its addresses.
pub struct Announcer {
    socket: PacketSocket,
    /// A member of the groups; memberships end with it. `None`: this host has no IPv6.
    member: Option<Socket>,
    /// Solicited-node groups that it has joined, by interface.
    groups: BTreeSet<(u32, Ipv6Addr)>,
    places: Vec<Place>,
    /// Rounds to go.
    rounds: u32,
}

impl Announcer {
    /// Opens its sockets in the network namespace of the calling thread.
    ///
    /// # Errors
    /// No CAP_NET_RAW.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: PacketSocket::open()?,
            member: Socket::new(Domain::IPV6, Type::DGRAM, None).ok(),
            groups: BTreeSet::new(),
            places: Vec::new(),
            rounds: 0,
        })
    }

    /// Looks where the addresses of `config` lie now. What is new, or everything if `again`, is announced by the next
    /// [`Self::tick`]s.
    ///
    /// # Errors
    /// The kernel does not list its interfaces.
    pub async fn look(&mut self, network: &Network, config: &Config, again: bool) -> Result<(), Error> {
        let places = places(network, config).await?;
        if again || places != self.places {
            self.rounds = ROUNDS;
        }
        self.places = places;
        self.join();
        Ok(())
    }

    /// To be called once a second.
    pub fn tick(&mut self) {
        if self.rounds == 0 {
            return;
        }
        if self.rounds == ROUNDS {
            for place in &self.places {
                info!(
                    interface = place.name,
                    "announcing {} addresses",
                    place.addresses.len()
                );
            }
        }
        if self.rounds % 2 == 1 {
            for place in &self.places {
                for address in &place.addresses {
                    if let Err(error) = self.socket.send(place.interface, &frame(place.mac, *address)) {
                        debug!(%error, interface = place.name, "{address} not announced");
                    }
                }
            }
        }
        self.rounds -= 1;
    }

    /// Joins and leaves solicited-node groups, so that it is in those of the addresses.
    fn join(&mut self) {
        let Some(member) = &self.member else { return };
        let wanted: BTreeSet<_> = self
            .places
            .iter()
            .flat_map(|place| {
                let groups = place.addresses.iter().filter_map(solicited_node);
                groups.map(|group| (place.interface, group))
            })
            .collect();
        for (interface, group) in self.groups.difference(&wanted) {
            // Of an interface that is gone there is nothing to leave.
            let _ = member.leave_multicast_v6(group, *interface);
        }
        let mut joined: BTreeSet<_> = self.groups.intersection(&wanted).copied().collect();
        for (interface, group) in wanted.difference(&self.groups) {
            match member.join_multicast_v6(group, *interface) {
                Ok(()) => drop(joined.insert((*interface, *group))),
                // An interface that went and came back under the same number.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    joined.insert((*interface, *group));
                }
                Err(error) => debug!(%error, interface, "group {group} not joined"),
            }
        }
        self.groups = joined;
    }
}

/// The interfaces that the data path takes packets from, or whose carrier it does, with the addresses that lie in
/// their networks.
async fn places(network: &Network, config: &Config) -> Result<Vec<Place>, Error> {
    let interfaces = network.interfaces().await?;
    let by_index: BTreeMap<u32, &Interface> = interfaces.iter().map(|one| (one.index, one)).collect();
    let ours = addresses(config);
    let mut places = Vec::new();
    for interface in &interfaces {
        let is_attached = carriers(interface, &by_index).any(|one| config.interfaces.contains_key(&one.name));
        let Some(mac) = interface.mac.filter(|_| is_attached && interface.is_running()) else {
            continue;
        };
        let prefixes = network.addresses(interface.index).await?;
        let addresses: BTreeSet<_> = ours
            .iter()
            .copied()
            .filter(|address| prefixes.iter().any(|prefix| prefix.contains(address)))
            .collect();
        if !addresses.is_empty() {
            places.push(Place {
                interface: interface.index,
                name: interface.name.clone(),
                mac,
                addresses,
            });
        }
    }
    Ok(places)
}

/// An interface and those that carry its frames, at most two tags deep.
fn carriers<'a>(
    interface: &'a Interface,
    by_index: &'a BTreeMap<u32, &'a Interface>,
) -> impl Iterator<Item = &'a Interface> {
    let below = |one: &&'a Interface| {
        let vlan = one.vlan?;
        by_index.get(&vlan.carrier).copied()
    };
    std::iter::successors(Some(interface), below).take(3)
}

/// VIPs, and the first addresses of the pool.
fn addresses(config: &Config) -> BTreeSet<IpAddr> {
    let mut all = config.vips();
    for is_v4 in [true, false] {
        let runs = config
            .snat
            .ranges
            .iter()
            .filter(|(first, _)| first.is_ipv4() == is_v4);
        let each = runs.flat_map(|(first, count)| (0..*count).filter_map(|offset| plus(*first, offset)));
        all.extend(each.take(MAX_POOL_ADDRESSES as usize));
    }
    all
}

/// The group that is asked for an IPv6 address (RFC 4291 §2.7.1): its last 24 bits behind ff02::1:ff00:0.
fn solicited_node(address: &IpAddr) -> Option<Ipv6Addr> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    let [.., a, b] = address.segments();
    Some(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (a & 0xff), b))
}

/// The frame that announces `address` at `mac`.
fn frame(mac: [u8; 6], address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(MacAddress::new(mac), address.into()),
        IpAddr::V6(address) => advertisement(MacAddress::new(mac), address.into()),
    }
}

/// An ARP announcement (RFC 5227 §2.3): a request for one's own address, which everybody learns from.
fn arp(mac: MacAddress, address: Ipv4Address) -> Vec<u8> {
    let link = EthernetHeader {
        link: LinkPair::new(BROADCAST_MAC, mac),
        ethertype: ETHERTYPE_ARP,
    };
    let arp = ArpPacket {
        hardware_type: HARDWARE_ETHERNET,
        protocol_type: ETHERTYPE_IPV4,
        hardware_len: 6,
        protocol_len: 4,
        operation: OPERATION_REQUEST,
        sender_mac: mac,
        sender_address: address,
        target_mac: MacAddress::new([0; 6]),
        target_address: address,
    };
    [bytes_of(&link), bytes_of(&arp)].concat()
}

/// A neighbour advertisement with the target's link address.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Advertisement {
    icmp: IcmpHeader,
    target: IpAddress,
    option: u8,
    /// In units of 8 bytes.
    option_len: u8,
    mac: MacAddress,
}

/// An unsolicited neighbour advertisement (RFC 4861 §7.2.6) to all nodes of the link.
fn advertisement(mac: MacAddress, address: IpAddress) -> Vec<u8> {
    let everybody = IpAddress::from(ALL_NODES);
    let length = size_of::<Advertisement>() as u16;
    let link = EthernetHeader {
        link: LinkPair::new(ALL_NODES_MAC, mac),
        ethertype: ETHERTYPE_IPV6,
    };
    let ip = Ipv6Header::fresh(PROTOCOL_ICMPV6, HOP_LIMIT, length, address, everybody);
    let mut message = Advertisement {
        icmp: IcmpHeader {
            rest: Be32::new(OVERRIDE),
            ..IcmpHeader::of_type(TYPE_NEIGHBOUR_ADVERTISEMENT, 0)
        },
        target: address,
        option: OPTION_TARGET_LINK,
        option_len: 1,
        mac,
    };
    let pseudo = pseudo_header(address, everybody, PROTOCOL_ICMPV6, length.into());
    let sum = u32::from(fold(pseudo)) + sum_bytes(bytes_of(&message));
    message.icmp.checksum = Be16::from_raw(finish(sum));
    [bytes_of(&link), bytes_of(&ip), bytes_of(&message)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn an_arp_announcement_asks_everybody_for_our_own_address() {
        let frame = frame(MAC, "172.18.0.100".parse().unwrap());
        let expected = [
            &[0xff; 6][..],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[172, 18, 0, 100],
            &[0; 6],
            &[172, 18, 0, 100],
        ];
        assert_eq!(frame, expected.concat());
    }

    #[test]
    fn an_advertisement_tells_all_nodes_and_its_checksum_is_right() {
        let frame = frame(MAC, "2001:db8::10".parse().unwrap());
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(
            &frame[..14],
            [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x86, 0xdd]
        );
        assert_eq!(frame[21], 255);
        assert_eq!(&frame[54..56], [136, 0]);
        assert_eq!(&frame[58..62], [0x20, 0, 0, 0]);
        assert_eq!(&frame[78..], [2, 1, 2, 0, 0, 0, 0, 9]);
        let pseudo = sum_bytes(&frame[22..54]) + sum_bytes(&[0, 0, 0, 32, 0, 0, 0, 58]);
        assert_eq!(fold(pseudo + sum_bytes(&frame[54..])), 0xffff);
    }

    #[test]
    fn the_group_of_an_address_has_its_last_24_bits() {
        let group = |text: &str| solicited_node(&text.parse().unwrap()).map(|group| group.to_string());
        assert_eq!(group("2001:db8::12:3456"), Some("ff02::1:ff12:3456".to_owned()));
        assert_eq!(group("10.0.0.1"), None);
    }

    #[test]
    fn of_a_large_pool_the_first_addresses_are_announced() {
        let text = "agent.max_flows = 1024\nsnat.prefixes = [\"100.64.0.0/16\", \"fd64::/64\"]\n[interface.eth0]\n\
                    [group.web.backend.a]\naddress = \"10.0.0.1\"\nport = 80\n\
                    [listener.web]\nvips = [\"10.0.0.100\", \"2001:db8::10\"]\nport = 80\ngroup = \"web\"\n";
        let config = crate::config::load::parse(text, std::path::Path::new("test.toml")).unwrap();
        let all = addresses(&config);
        let v4 = all.iter().filter(|address| address.is_ipv4()).count();
        assert_eq!(
            (v4, all.len() - v4),
            (1 + 256, 1 + 1),
            "1024 flows need one address of IPv6"
        );
    }
}
