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
/// NETDEV_XDP_ACT_NDO_XMIT_SG: also those that are in several buffers.
const FEATURE_NDO_XMIT_SG: u64 = 64;
/// MTU up to which drivers have a frame in one buffer: most of a page, less what they keep free.
const ONE_BUFFER_BYTES: u32 = 3000;

/// Are frames of such an MTU in several buffers?
pub const fn takes_several_buffers(mtu_bytes: u32) -> bool {
    mtu_bytes > ONE_BUFFER_BYTES
}

/// Does the device, with this MTU, take frames by redirect? `None`: the kernel does not say. One that does not redirects no
/// frames in several buffers (`xdp_do_redirect` before Linux 6.3).
///
/// For a veth the answer depends on its other end, which must have an XDP program or GRO, at the time of the call.
/// It asks in the network namespace of the calling thread.
pub fn takes_redirects(ifindex: u32, mtu_bytes: u32) -> Option<bool> {
    let wanted = if takes_several_buffers(mtu_bytes) {
        FEATURE_NDO_XMIT | FEATURE_NDO_XMIT_SG
    } else {
        FEATURE_NDO_XMIT
    };
    match features(ifindex) {
        Some(features) => Some(features & wanted == wanted),
        None => takes_several_buffers(mtu_bytes).then_some(false),
    }
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
