//! One question to a generic netlink family, asked in the network namespace of the calling thread.

use neli::{
    consts::{nl::NlmF, socket::NlFamily},
    genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder},
    nl::NlPayload,
    router::synchronous::NlRouter,
    types::{Buffer, GenlBuffer},
    utils::Groups,
};

/// An attribute of a question or an answer.
pub(super) type Attribute = Nlattr<u16, Buffer>;
/// An answer; its attributes are read through `attrs()`.
pub(super) type Answer = Genlmsghdr<u8, u16>;

/// A question's attribute that holds one number.
pub(super) fn number(kind: u16, value: u32) -> Option<Attribute> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().ok()?;
    let builder = NlattrBuilder::default().nla_type(kind);
    builder.nla_payload(value).build().ok()
}

/// A question's attribute that holds another.
pub(super) fn nested(kind: u16, inner: &Attribute) -> Option<Attribute> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().ok()?;
    let outer = NlattrBuilder::default().nla_type(kind).nla_payload(Buffer::new());
    outer.build().ok()?.nest(inner).ok()
}

/// Sends `command` with `attribute` to `family`; the first answer. `None`: this kernel does not say, for whatever
/// reason.
pub(super) fn ask(family: &str, command: u8, attribute: Attribute) -> Option<Answer> {
    let (router, _) = NlRouter::connect(NlFamily::Generic, None, Groups::empty()).ok()?;
    let family = router.resolve_genl_family(family).ok()?;
    let mut attributes: GenlBuffer<u16, Buffer> = GenlBuffer::new();
    attributes.push(attribute);
    let question = GenlmsghdrBuilder::default()
        .cmd(command)
        .version(1)
        .attrs(attributes)
        .build()
        .ok()?;
    let answers = router
        .send::<_, _, u16, Answer>(family, NlmF::REQUEST | NlmF::ACK, NlPayload::Payload(question))
        .ok()?;
    answers
        .filter_map(Result::ok)
        .find_map(|answer| answer.get_payload().cloned())
}
