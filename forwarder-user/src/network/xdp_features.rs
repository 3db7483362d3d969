//! What a driver can do with XDP frames, as the kernel tells it (generic netlink family "netdev", since Linux
//! 6.3; Documentation/netlink/specs/netdev.yaml).

use super::genetlink;

/// NETDEV_CMD_DEV_GET.
const COMMAND_GET: u8 = 1;
/// NETDEV_A_DEV_IFINDEX.
const ATTRIBUTE_IFINDEX: u16 = 1;
/// NETDEV_A_DEV_XDP_FEATURES.
const ATTRIBUTE_XDP_FEATURES: u16 = 3;
/// NETDEV_XDP_ACT_BASIC: native mode.
const FEATURE_BASIC: u64 = 1;
/// NETDEV_XDP_ACT_NDO_XMIT: frames can be sent to the device by redirect.
const FEATURE_NDO_XMIT: u64 = 4;

/// Does the device take frames by redirect? `None`: the kernel does not say.
///
/// For a veth the answer depends on its other end, which must have an XDP program or GRO, at the time of the call.
/// It asks in the network namespace of the calling thread.
pub fn takes_redirects(ifindex: u32) -> Option<bool> {
    features(ifindex).map(|features| features & FEATURE_NDO_XMIT != 0)
}

/// Does the driver run XDP programs itself? As [`takes_redirects`].
pub fn runs_programs(ifindex: u32) -> Option<bool> {
    features(ifindex).map(|features| features & FEATURE_BASIC != 0)
}

fn features(ifindex: u32) -> Option<u64> {
    let question = genetlink::number(ATTRIBUTE_IFINDEX, ifindex)?;
    let answer = genetlink::ask("netdev", COMMAND_GET, question)?;
    let attributes = answer.attrs().get_attr_handle();
    attributes.get_attr_payload_as(ATTRIBUTE_XDP_FEATURES).ok()
}
