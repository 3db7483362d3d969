//! VLAN devices on top of attached interfaces: what the data path has to know to send their frames itself.
//!
//! The kernel's routes lead to the VLAN device; the program sits on the interface below, where frames carry the tag.
//! Pure: from what the interfaces are to entries of the interface table. One customer tag, or one behind a service tag,
//! is what the data path writes; packets to devices with other tags are left to the stack, which knows them.

use std::{collections::BTreeMap, fmt};

use forwarder_common::{abi::interface::Interface, wire::MacAddress};

use super::bonds;
use crate::network::{self, Offloads, Vlan};

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

/// Tags of VLAN devices that a network card takes out of the frames, so that XDP in native mode does not see them.
/// Displays as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// The card.
    pub name: String,
    /// The VLAN devices that get no answers.
    pub vlans: Vec<String>,
    /// There are service tags among them.
    has_service_tags: bool,
    /// Can it be told to leave them?
    pub is_switchable: bool,
}

impl Hidden {
    /// What makes them visible.
    #[must_use]
    pub fn command(&self) -> String {
        let service = if self.has_service_tags {
            " rx-vlan-stag-hw-parse off tx-vlan-stag-hw-insert off"
        } else {
            ""
        };
        format!("ethtool -K {} rxvlan off txvlan off{service}", self.name)
    }
}

impl fmt::Display for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} takes VLAN tags out of frames before XDP sees them: VIPs of {} are answered without tags, which nobody \
             there hears",
            self.name,
            self.vlans.join(", ")
        )
    }
}

/// Cards below the interface with number `attached` (itself, or the ports of a bond) that hide the tags of VLAN devices
/// on top of it. `offloads` asks a device for its own.
pub fn hidden(
    interfaces: &[network::Interface],
    attached: u32,
    offloads: impl Fn(u32) -> Option<Offloads>,
) -> Vec<Hidden> {
    let carried_by = |index: u32| {
        interfaces
            .iter()
            .filter(move |one| one.vlan.is_some_and(|vlan| vlan.carrier == index))
    };
    let outer: Vec<_> = carried_by(attached).collect();
    let vlans: Vec<_> = outer
        .iter()
        .copied()
        .chain(outer.iter().flat_map(|one| carried_by(one.index)))
        .collect();
    if vlans.is_empty() {
        return Vec::new();
    }
    let has_service_tags = outer
        .iter()
        .any(|one| one.vlan.is_some_and(|vlan| vlan.is_service));
    let feature = if has_service_tags { SERVICE_TAGS } else { TAGS };
    let ports = bonds::ports(interfaces, attached);
    let itself = interfaces
        .iter()
        .filter(|one| one.index == attached && ports.is_empty());
    itself
        .chain(ports.iter().copied())
        .filter_map(|card| {
            let offloads = offloads(card.index)?;
            offloads.active.contains(feature).then(|| Hidden {
                name: card.name.clone(),
                vlans: vlans.iter().map(|one| one.name.clone()).collect(),
                has_service_tags,
                is_switchable: offloads.switchable.contains(feature),
            })
        })
        .collect()
}

/// The kernel's names of `rx-vlan-offload` for customer tags and for service tags (net/ethtool/common.c).
const TAGS: &str = "rx-vlan-hw-parse";
const SERVICE_TAGS: &str = "rx-vlan-stag-hw-parse";

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

    #[test]
    fn a_card_that_takes_tags_out_is_told_of_with_the_vlans_it_silences() {
        let mut card = device(1, None);
        card.kind = InterfaceKind::Physical;
        let links = [card.clone(), device(2, Some((1, 100, false)))];
        let with = |names: &[&str]| Offloads {
            active: names.iter().map(|name| (*name).to_owned()).collect(),
            switchable: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(hidden(&links, 1, |_| Some(with(&["rx-gro"]))), []);
        assert_eq!(hidden(&links[..1], 1, |_| Some(with(&[TAGS]))), []);
        let found = hidden(&links, 1, |_| Some(with(&[TAGS])));
        assert_eq!(found[0].command(), "ethtool -K if1 rxvlan off txvlan off");
        assert!(
            found[0].is_switchable && found[0].to_string().contains("if2"),
            "{found:?}"
        );

        // Of a bond, its ports count.
        let mut bond = card.clone();
        bond.kind = InterfaceKind::Bond;
        let mut port = device(9, None);
        port.controller = Some(1);
        let links = [bond, port, device(3, Some((1, 200, true)))];
        let of_port = |index| (index == 9).then(|| with(&[SERVICE_TAGS]));
        let found = hidden(&links, 1, of_port);
        assert_eq!((found.len(), found[0].name.as_str()), (1, "if9"));
        assert!(
            found[0].command().ends_with("tx-vlan-stag-hw-insert off"),
            "{found:?}"
        );
    }
}
