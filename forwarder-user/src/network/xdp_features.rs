//! What a driver can do with XDP frames, as the kernel tells it (generic netlink family "netdev", since Linux
//! 6.3; Documentation/netlink/specs/netdev.yaml).

use neli::{
    consts::{nl::NlmF, socket::NlFamily},
    genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, NlattrBuilder},
    nl::NlPayload,
    router::synchronous::NlRouter,
    types::{Buffer, GenlBuffer},
    utils::Groups,
};

/// NETDEV_CMD_DEV_GET.
const COMMAND_GET: u8 = 1;
/// NETDEV_A_DEV_IFINDEX.
const ATTRIBUTE_IFINDEX: u16 = 1;
/// NETDEV_A_DEV_XDP_FEATURES.
const ATTRIBUTE_XDP_FEATURES: u16 = 3;
/// NETDEV_XDP_ACT_NDO_XMIT: frames can be sent to the device by redirect.
const FEATURE_NDO_XMIT: u64 = 4;

/// Does the device take frames by redirect? `None`: the kernel does not say.
///
/// For a veth the answer depends on its other end, which must have an XDP program or GRO, at the time of the call.
/// It asks in the network namespace of the calling thread.
pub fn takes_redirects(ifindex: u32) -> Option<bool> {
    // Every failure on the way means the same: this kernel does not say.
    features(ifindex).map(|features| features & FEATURE_NDO_XMIT != 0)
}

fn features(ifindex: u32) -> Option<u64> {
    let (router, _) = NlRouter::connect(NlFamily::Generic, None, Groups::empty()).ok()?;
    let family = router.resolve_genl_family("netdev").ok()?;
    let kind = AttrTypeBuilder::default()
        .nla_type(ATTRIBUTE_IFINDEX)
        .build()
        .ok()?;
    let mut attributes: GenlBuffer<u16, Buffer> = GenlBuffer::new();
    attributes.push(
        NlattrBuilder::default()
            .nla_type(kind)
            .nla_payload(ifindex)
            .build()
            .ok()?,
    );
    let question = GenlmsghdrBuilder::default()
        .cmd(COMMAND_GET)
        .version(1)
        .attrs(attributes)
        .build()
        .ok()?;
    let answers = router
        .send::<_, _, u16, Genlmsghdr<u8, u16>>(
            family,
            NlmF::REQUEST | NlmF::ACK,
            NlPayload::Payload(question),
        )
        .ok()?;
    answers.filter_map(Result::ok).find_map(|answer| {
        let attributes = answer.get_payload()?.attrs().get_attr_handle();
        attributes.get_attr_payload_as(ATTRIBUTE_XDP_FEATURES).ok()
    })
}
