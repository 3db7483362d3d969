//! Offloads and queues of a device, as `ethtool -k` and `ethtool -l` show them (generic netlink family "ethtool",
//! since Linux 5.7; Documentation/networking/ethtool-netlink.rst).

use std::collections::BTreeSet;

use neli::{genl::Nlattr, types::Buffer};

use super::genetlink;

const FAMILY: &str = "ethtool";
/// ETHTOOL_MSG_FEATURES_GET.
const COMMAND_FEATURES: u8 = 11;
/// ETHTOOL_MSG_CHANNELS_GET.
const COMMAND_CHANNELS: u8 = 17;
/// ETHTOOL_A_*_HEADER of every message, with the device in it.
const ATTRIBUTE_HEADER: u16 = 1;
/// ETHTOOL_A_HEADER_DEV_INDEX.
const HEADER_INDEX: u16 = 1;
/// ETHTOOL_A_FEATURES_HW: what can be switched.
const FEATURES_SWITCHABLE: u16 = 2;
/// ETHTOOL_A_FEATURES_ACTIVE: what is on.
const FEATURES_ACTIVE: u16 = 4;
/// ETHTOOL_A_BITSET_NOMASK: only bits that are set are listed; else they have ETHTOOL_A_BITSET_BIT_VALUE.
const BITSET_NOMASK: u16 = 1;
/// ETHTOOL_A_BITSET_BITS.
const BITSET_BITS: u16 = 3;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;
/// ETHTOOL_A_CHANNELS_RX_MAX and COMBINED_MAX, RX_COUNT and COMBINED_COUNT.
const CHANNELS_MAX: [u16; 2] = [2, 5];
const CHANNELS_COUNT: [u16; 2] = [6, 9];

/// Offloads by the kernel's name: `rx-lro`, `rx-gro-hw`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    pub active: BTreeSet<String>,
    /// Those that `ethtool -K` can change.
    pub switchable: BTreeSet<String>,
}

/// Receive queues of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    pub count: u32,
    /// As many as it can have.
    pub most: u32,
}

/// The offloads of a device; `None`: the kernel does not say. It asks in the network namespace of the calling
/// thread.
#[must_use]
pub fn offloads(ifindex: u32) -> Option<Offloads> {
    let answer = genetlink::ask(FAMILY, COMMAND_FEATURES, device(ifindex)?)?;
    let attributes = answer.attrs();
    let names = |kind| {
        let set = attributes
            .iter()
            .find(|attribute| *attribute.nla_type().nla_type() == kind);
        set.map(names).unwrap_or_default()
    };
    Some(Offloads {
        active: names(FEATURES_ACTIVE),
        switchable: names(FEATURES_SWITCHABLE),
    })
}

/// The receive queues of a device that can tell. As [`offloads`].
#[must_use]
pub fn queues(ifindex: u32) -> Option<Queues> {
    let answer = genetlink::ask(FAMILY, COMMAND_CHANNELS, device(ifindex)?)?;
    let attributes = answer.attrs().get_attr_handle();
    let sum = |kinds: [u16; 2]| {
        let number = |kind| attributes.get_attr_payload_as::<u32>(kind).unwrap_or_default();
        kinds.map(number).iter().sum()
    };
    let queues = Queues {
        count: sum(CHANNELS_COUNT),
        most: sum(CHANNELS_MAX),
    };
    (queues.count > 0).then_some(queues)
}

fn device(ifindex: u32) -> Option<genetlink::Attribute> {
    genetlink::nested(ATTRIBUTE_HEADER, &genetlink::number(HEADER_INDEX, ifindex)?)
}

/// The names of the bits that are set.
fn names(set: &Nlattr<u16, Buffer>) -> BTreeSet<String> {
    let Ok(set) = set.get_attr_handle::<u16>() else {
        return BTreeSet::new();
    };
    let lists_set_only = set.get_attribute(BITSET_NOMASK).is_some();
    let Ok(bits) = set.get_nested_attributes::<u16>(BITSET_BITS) else {
        return BTreeSet::new();
    };
    let name = |bit: &Nlattr<u16, Buffer>| {
        let bit = bit.get_attr_handle::<u16>().ok()?;
        let is_set = lists_set_only || bit.get_attribute(BIT_VALUE).is_some();
        let name = bit.get_attr_payload_as_with_len::<String>(BIT_NAME).ok()?;
        is_set.then_some(name)
    };
    bits.iter().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{
        Network,
        testing::{in_namespace, ip},
    };

    #[test]
    fn shows_what_ethtool_shows() {
        in_namespace(async {
            ip("link add fa numrxqueues 2 type veth peer name fb");
            let network = Network::open().unwrap();
            let fa = network.interface("fa").await.unwrap().unwrap().index;
            let switch = |arguments: &str| {
                let status = std::process::Command::new("ethtool")
                    .args(arguments.split(' '))
                    .status();
                assert!(status.unwrap().success(), "ethtool {arguments}");
            };
            switch("-K fa gro on");
            let on = offloads(fa).unwrap();
            assert!(
                on.active.contains("rx-gro") && on.switchable.contains("rx-gro"),
                "{on:?}"
            );
            assert!(
                !on.active.contains("rx-lro") && !on.switchable.contains("rx-lro"),
                "{on:?}"
            );
            switch("-K fa gro off");
            assert!(!offloads(fa).unwrap().active.contains("rx-gro"));

            switch("-L fa rx 2");
            let queues = queues(fa).unwrap();
            assert_eq!((queues.count, queues.most), (2, 2));
            assert_eq!(offloads(9999), None);
        });
    }
}
