//! Ports of bonds that have the XDP program: what the data path has to know to take their frames for the bond's.
//!
//! The kernel runs the program of a bond in native mode on the ports, where a frame's interface is the port; routes and
//! addresses are the bond's. Pure: from what the interfaces are to entries of the interface table.

use std::collections::BTreeMap;

use forwarder_common::abi::interface::Interface;

use crate::network::{self, InterfaceKind};

/// The ports of the bond with number `index`; none, if it is none.
pub fn ports(interfaces: &[network::Interface], index: u32) -> Vec<&network::Interface> {
    let is_bond = interfaces
        .iter()
        .any(|one| one.index == index && one.kind == InterfaceKind::Bond);
    let ports = interfaces.iter().filter(|one| one.controller == Some(index));
    ports.filter(|_| is_bond).collect()
}

/// Entries for the ports of `attached` bonds, by interface number. Their frames are answered and sent as the bond's.
pub fn entries(
    interfaces: &[network::Interface],
    attached: &BTreeMap<u32, Interface>,
) -> BTreeMap<u32, Interface> {
    let mut entries = BTreeMap::new();
    for (bond, entry) in attached {
        for port in ports(interfaces, *bond) {
            let entry = Interface {
                flags: 0,
                carrier_ifindex: *bond,
                ..*entry
            };
            entries.insert(port.index, entry);
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use forwarder_common::wire::MacAddress;

    fn link(index: u32, kind: InterfaceKind, controller: Option<u32>) -> network::Interface {
        network::Interface {
            name: format!("if{index}"),
            index,
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu_bytes: 1500,
            is_up: true,
            has_carrier: true,
            is_ethernet: true,
            has_neighbours: true,
            kind,
            controller,
            remote: None,
            vlan: None,
            driver: None,
            alias: None,
        }
    }

    #[test]
    fn a_port_stands_for_its_bond() {
        let interfaces = [
            link(1, InterfaceKind::Bond, None),
            link(2, InterfaceKind::Physical, Some(1)),
            link(3, InterfaceKind::Physical, Some(1)),
            link(4, InterfaceKind::Bridge, None),
            link(5, InterfaceKind::Physical, Some(4)),
        ];
        let nic = |last| Interface {
            mac: MacAddress::new([2, 0, 0, 0, 0, last]),
            flags: 3,
            mtu_bytes: 1500,
            carrier_ifindex: 0,
            vlans: [0; 2],
        };
        let found = entries(&interfaces, &BTreeMap::from([(1, nic(1)), (4, nic(4))]));
        let expected = Interface {
            flags: 0,
            carrier_ifindex: 1,
            ..nic(1)
        };
        assert_eq!(found, BTreeMap::from([(2, expected), (3, expected)]));
    }
}
