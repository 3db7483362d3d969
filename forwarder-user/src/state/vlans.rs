//! VLAN devices on top of attached interfaces: what the data path has to know to send their frames itself.
//!
//! The kernel's routes lead to the VLAN device; the program sits on the interface below, where frames carry the tag.
//! Pure: from what the interfaces are to entries of the interface table. One customer tag, or one behind a service tag,
//! is what the data path writes; packets to devices with other tags are left to the stack, which knows them.

use std::collections::BTreeMap;

use forwarder_common::{abi::interface::Interface, wire::MacAddress};

use crate::network::{self, Vlan};

/// Entries for the VLAN devices of `interfaces` whose frames leave by one of `attached`, by interface number.
pub fn entries(
    interfaces: &[network::Interface],
    attached: &BTreeMap<u32, Interface>,
) -> BTreeMap<u32, Interface> {
    let vlan_of = |index: u32| interfaces.iter().find(|one| one.index == index)?.vlan;
    let entry = |device: &network::Interface| -> Option<(u32, Interface)> {
        let own = device.vlan?;
        let (carrier, vlans) = match vlan_of(own.carrier) {
            None => (own.carrier, tags(None, own)?),
            Some(outer) => (outer.carrier, tags(Some(outer), own)?),
        };
        // A program on the device itself sees its frames without tags and needs nothing of this.
        if !attached.contains_key(&carrier) || attached.contains_key(&device.index) {
            return None;
        }
        let entry = Interface {
            mac: device.mac.map(MacAddress::new).unwrap_or_default(),
            flags: 0,
            mtu_bytes: device.mtu_bytes,
            carrier_ifindex: carrier,
            vlans,
        };
        Some((device.index, entry))
    };
    interfaces.iter().filter_map(entry).collect()
}

/// The identifiers as the data path has them, the outer one first.
fn tags(outer: Option<Vlan>, own: Vlan) -> Option<[u16; 2]> {
    match outer {
        None if !own.is_service => Some([own.id, 0]),
        Some(outer) if outer.is_service && !own.is_service => Some([outer.id, own.id]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::InterfaceKind;

    fn device(index: u32, vlan: Option<(u32, u16, bool)>) -> network::Interface {
        network::Interface {
            name: format!("if{index}"),
            index,
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu_bytes: 1496,
            is_up: true,
            has_carrier: true,
            is_ethernet: true,
            has_neighbours: true,
            kind: InterfaceKind::Vlan,
            controller: None,
            remote: None,
            vlan: vlan.map(|(carrier, id, is_service)| Vlan {
                carrier,
                id,
                is_service,
            }),
            driver: None,
            alias: None,
        }
    }

    #[test]
    fn frames_of_a_vlan_device_leave_by_its_carrier_with_its_tags() {
        let interfaces = [
            device(1, None),
            device(2, Some((1, 100, false))),
            device(3, Some((1, 200, true))),
            device(4, Some((3, 201, false))),
            // Two customer tags; a service tag alone; on an interface without program.
            device(5, Some((2, 300, false))),
            device(6, None),
            device(7, Some((6, 400, false))),
        ];
        let nic = Interface {
            mac: MacAddress::default(),
            flags: 3,
            mtu_bytes: 1500,
            carrier_ifindex: 0,
            vlans: [0; 2],
        };
        let found = entries(&interfaces, &BTreeMap::from([(1, nic)]));
        let found: Vec<_> = found
            .iter()
            .map(|(index, one)| (*index, one.carrier_ifindex, one.vlans))
            .collect();
        assert_eq!(found, [(2, 1, [100, 0]), (4, 1, [200, 201])]);
        let own = entries(&interfaces, &BTreeMap::from([(1, nic), (2, nic)]));
        assert!(!own.contains_key(&2), "it has a program of its own");
    }
}
