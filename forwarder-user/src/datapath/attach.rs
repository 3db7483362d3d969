//! Hooks the programs to interfaces, by links that are pinned: they stay when the agent goes. A link that an earlier
//! agent has pinned gets the new program in one step, so no frame passes in between.
//!
//! XDP goes on in native mode where the driver can *and* frames can leave again: an answer to ARP, a redirect.
//! On a veth they can only if the other end polls: it has an XDP program, or GRO is on. Else generic mode, which
//! works everywhere and is slower.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{
        ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        tc::{self, SchedClassifierLink},
        xdp::XdpLink,
    },
    util::KernelVersion,
};
use forwarder_common::{
    abi::{
        interface::{Interface, flag},
        map_name, settings,
    },
    datapath::Hook,
};
use nix::errno::Errno;

use super::{
    object::{kernel_error, program},
    pin::PinDirectory,
};
use crate::{
    config,
    error::Error,
    network::{self, InterfaceKind},
};

/// How long an interface may take to let go of a link whose pin was removed. The kernel frees that after an RCU grace period,
/// in a work queue (`bpf_free_inode` and `bpf_link_put`, Linux 6.18), and tells nobody.
const RELEASE_PATIENCE: Duration = Duration::from_millis(500);
const RELEASE_PAUSE: Duration = Duration::from_millis(10);

/// Why the kernel, or aya, does not attach or replace.
type Refused = Box<dyn std::error::Error>;

/// What was attached where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub name: String,
    pub ifindex: u32,
    pub kind: AttachmentKind,
    /// What the data path has to know of the interface.
    pub interface: Interface,
    /// Bits of `settings::flag` that the data path needs because of it.
    pub settings_flags: u32,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentKind {
    XdpNative,
    XdpGeneric,
    Tcx,
}

impl AttachmentKind {
    /// As it appears in status and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::Tcx => "tcx",
        }
    }

    /// Where the program's packets come from, as the walk knows it.
    pub fn hook(self) -> Hook {
        match self {
            Self::XdpNative => Hook::Xdp,
            Self::XdpGeneric => Hook::XdpGeneric,
            Self::Tcx => Hook::Tcx,
        }
    }

    /// The kind with this [`Self::name`].
    pub fn named(name: &str) -> Option<Self> {
        [Self::XdpNative, Self::XdpGeneric, Self::Tcx]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

/// Attaches XDP to an interface; also says, in words, why it is not in native mode. `ports`: of a bond, those whose
/// frames it sees and which send its frames.
///
/// # Errors
/// When the kernel refuses the mode that the configuration demands.
pub fn attach_xdp(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    link: &network::Interface,
    ports: &[&network::Interface],
    wanted: &config::Interface,
) -> Result<(Attachment, Option<String>), Error> {
    if !link.is_ethernet {
        return Err(Error::host(format!(
            "interface \"{}\" ({}) is not Ethernet",
            link.name, link.kind
        ))
        .hint("name it under [tunnel] instead of [interface]"));
    }
    // The kernel takes one mode at a time. What is there stays where the configuration leaves the choice.
    let (native, generic) = (
        pins.link(AttachmentKind::XdpNative, link.index),
        pins.link(AttachmentKind::XdpGeneric, link.index),
    );
    match wanted.mode {
        config::XdpMode::Native => pins.unpin(&generic)?,
        config::XdpMode::Generic => pins.unpin(&native)?,
        config::XdpMode::Auto => {}
    }
    if wanted.mode == config::XdpMode::Generic || generic.exists() {
        return Ok((attach_generic(ebpf, pins, link, ports, wanted)?, None));
    }
    match try_native(ebpf, pins, link, ports, wanted) {
        Ok(attachment) => Ok((attachment, None)),
        Err(error) if wanted.mode == config::XdpMode::Native => Err(error),
        Err(error) => Ok((attach_generic(ebpf, pins, link, ports, wanted)?, Some(error.what))),
    }
}

/// Replaces the program of the link that is pinned at `path`. False: there is none, or its interface is gone.
fn replace(
    pins: &PinDirectory,
    path: &Path,
    update: impl FnOnce(FdLink) -> Result<(), Refused>,
) -> Result<bool, Error> {
    let Ok(pinned) = PinnedLink::from_pin(path) else {
        return Ok(false);
    };
    match update(pinned.into()) {
        Ok(()) => Ok(true),
        // The link is dead (its interface was removed), or of another kind: it is of no use to anybody.
        Err(error) => {
            tracing::debug!(%error, "the pinned link {} is not taken over", path.display());
            pins.unpin(path)?;
            Ok(false)
        }
    }
}

/// Attaches an XDP program, or replaces the one of the pinned link: then there is no new link. A new one is not pinned yet:
/// dropped, it is gone at once, while one whose pin is removed lives on for a moment.
fn attach_or_replace_xdp(
    ebpf: &mut Ebpf,
    name: &str,
    pins: &PinDirectory,
    kind: AttachmentKind,
    ifindex: u32,
    mode: XdpMode,
) -> Result<Option<FdLink>, Error> {
    let path = pins.link(kind, ifindex);
    let xdp: &mut Xdp = program(ebpf, name)?;
    let is_replaced = replace(pins, &path, |link| {
        let id = xdp.attach_to_link(XdpLink::try_from(link)?)?;
        // Out of the program's hands, or its end would be the link's; the pin keeps it.
        xdp.take_link(id).map(drop).map_err(Refused::from)
    })?;
    if is_replaced {
        return Ok(None);
    }
    let start = Instant::now();
    let id = loop {
        match xdp.attach_to_if_index(ifindex, mode) {
            // A link that was unpinned just now, in the other mode.
            Err(error) if is_taken(&error) && start.elapsed() < RELEASE_PATIENCE => {
                thread::sleep(RELEASE_PAUSE);
            }
            outcome => break outcome.map_err(|error| kernel_error("attach XDP", &error))?,
        }
    };
    let link = xdp.take_link(id).map_err(Refused::from);
    let link = link.and_then(|link| FdLink::try_from(link).map_err(Refused::from));
    Ok(Some(
        link.map_err(|error| kernel_error("attach XDP", error.as_ref()))?,
    ))
}

/// Does another program stand in the way?
fn is_taken(error: &ProgramError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::EEXIST | Errno::EBUSY)
            );
        }
        cause = error.source();
    }
    false
}

fn pin(link: FdLink, path: &Path) -> Result<(), Error> {
    link.pin(path)
        .map(drop)
        .map_err(|error| kernel_error(&format!("pin the link {}", path.display()), &error))
}

fn try_native(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    link: &network::Interface,
    ports: &[&network::Interface],
    wanted: &config::Interface,
) -> Result<Attachment, Error> {
    let kind = AttachmentKind::XdpNative;
    let path = pins.link(kind, link.index);
    let made = attach_or_replace_xdp(
        ebpf,
        map_name::PROGRAM_XDP,
        pins,
        kind,
        link.index,
        XdpMode::Driver,
    )
    .map_err(|mut error| {
        error.what = format!("\"{}\" in native mode: {}", link.name, error.what);
        error.hint(if link.kind == InterfaceKind::Bond {
            "native XDP takes a bond in mode balance-rr, active-backup, balance-xor or 802.3ad, and ports that all can; else \
             set mode = \"auto\" or \"generic\" for this interface"
        } else {
            "set mode = \"auto\" or \"generic\" for this interface, or use a driver with native XDP"
        })
    })?;
    if let Some(obstacle) = obstacle(link, ports, wanted.redirect) {
        drop(made);
        pins.unpin(&path)?;
        return Err(obstacle);
    }
    if let Some(made) = made {
        pin(made, &path)?;
    }
    let flags = if wanted.redirect == config::Redirect::Off {
        0
    } else {
        flag::SEND_NATIVE | flag::SEND_GENERIC
    };
    let redirects = if has_veth(link, ports) {
        settings::flag::TRANSMIT_BY_REDIRECT
    } else {
        0
    };
    Ok(attachment(link, ports, kind, flags, redirects))
}

fn attach_generic(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    link: &network::Interface,
    ports: &[&network::Interface],
    wanted: &config::Interface,
) -> Result<Attachment, Error> {
    let kind = AttachmentKind::XdpGeneric;
    let made = attach_or_replace_xdp(
        ebpf,
        map_name::PROGRAM_XDP_GENERIC,
        pins,
        kind,
        link.index,
        XdpMode::Skb,
    )
    .map_err(|mut error| {
        error.what = format!("\"{}\" in generic mode: {}", link.name, error.what);
        error.hint("see `ip link show` for a program that is attached already, and remove it")
    })?;
    if let Some(made) = made {
        pin(made, &pins.link(kind, link.index))?;
    }
    let flags = if wanted.redirect == config::Redirect::Off {
        0
    } else {
        flag::SEND_GENERIC
    };
    Ok(attachment(link, ports, kind, flags, 0))
}

/// Attaches the tcx program to the ingress of a tunnel device.
///
/// # Errors
/// When the kernel refuses.
pub fn attach_tunnel(
    ebpf: &mut Ebpf,
    pins: &PinDirectory,
    link: &network::Interface,
) -> Result<Attachment, Error> {
    let refused = |error: Refused| {
        kernel_error(
            &format!("attach to the ingress of \"{}\"", link.name),
            error.as_ref(),
        )
    };
    let path = pins.link(AttachmentKind::Tcx, link.index);
    let tunnel: &mut SchedClassifier = program(ebpf, map_name::PROGRAM_TUNNEL)?;
    if !has_tcx() {
        // The discipline may be there.
        let _ = tc::qdisc_add_clsact(&link.name);
        remove_filter(&link.name);
        let attach = |tunnel: &mut SchedClassifier| {
            let id = tunnel.attach(&link.name, TcAttachType::Ingress)?;
            tunnel.take_link(id).map_err(Refused::from)
        };
        // It would go with this process, and the data path is to go on without.
        std::mem::forget(attach(tunnel).map_err(refused)?);
        return Ok(attachment(link, &[], AttachmentKind::Tcx, 0, 0));
    }
    let is_replaced = replace(pins, &path, |found| {
        let id = tunnel.attach_to_link(SchedClassifierLink::try_from(found)?)?;
        tunnel.take_link(id).map(drop).map_err(Refused::from)
    })?;
    if !is_replaced {
        let attach = |tunnel: &mut SchedClassifier| {
            let id = tunnel.attach(&link.name, TcAttachType::Ingress)?;
            FdLink::try_from(tunnel.take_link(id)?).map_err(Refused::from)
        };
        pin(attach(tunnel).map_err(refused)?, &path)?;
    }
    Ok(attachment(link, &[], AttachmentKind::Tcx, 0, 0))
}

/// Before Linux 6.6 there is no tcx and no link that could be pinned, but a queueing discipline with a filter that stays
/// until somebody removes it.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

/// Removes the tunnel program's filter from an interface that may have one.
fn remove_filter(interface: &str) {
    let _ = tc::qdisc_detach_program(interface, TcAttachType::Ingress, map_name::PROGRAM_TUNNEL);
}

/// Removes the filters that agents have left behind, where the kernel has no tcx, from all of these interfaces that
/// are none of `attachments`.
pub fn remove_filters(links: &[network::Interface], attachments: &[Attachment]) {
    if has_tcx() {
        return;
    }
    let is_ours = |link: &network::Interface| attachments.iter().any(|one| one.ifindex == link.index);
    for link in links.iter().filter(|link| !is_ours(link)) {
        remove_filter(&link.name);
    }
}

/// Removes the pinned links that are none of `attachments`: of interfaces that have left the configuration, or the
/// host.
///
/// # Errors
/// The pin directory cannot be read or written.
pub fn detach_others(pins: &PinDirectory, attachments: &[Attachment]) -> Result<(), Error> {
    for link in pins.links()? {
        let is_ours = attachments
            .iter()
            .any(|one| (one.kind, one.ifindex) == (link.kind, link.ifindex));
        if !is_ours {
            pins.unpin(&link.path)?;
        }
    }
    Ok(())
}

fn attachment(
    link: &network::Interface,
    ports: &[&network::Interface],
    kind: AttachmentKind,
    flags: u16,
    settings_flags: u32,
) -> Attachment {
    let is_physical = |link: &network::Interface| {
        link.kind == InterfaceKind::Physical && link.driver.as_deref() != Some("virtio_net")
    };
    let is_bond_of_such = !ports.is_empty() && ports.iter().all(|port| is_physical(port));
    let partial = if is_physical(link) || is_bond_of_such {
        0
    } else {
        settings::flag::PARTIAL_CHECKSUMS
    };
    Attachment {
        name: link.name.clone(),
        ifindex: link.index,
        kind,
        interface: Interface {
            mac: link
                .mac
                .map(forwarder_common::wire::MacAddress::new)
                .unwrap_or_default(),
            flags,
            mtu_bytes: link.mtu_bytes,
            carrier_ifindex: 0,
            vlans: [0; 2],
        },
        settings_flags: settings_flags | partial,
    }
}

/// Why frames that are to leave the interface straight from native XDP cannot.
fn obstacle(
    link: &network::Interface,
    ports: &[&network::Interface],
    redirect: config::Redirect,
) -> Option<Error> {
    let network::Interface { name, mtu_bytes, .. } = link;
    let cannot = |what: &str| {
        Error::host(format!(
            "{what} cannot leave \"{name}\" ({}, MTU {mtu_bytes}) straight from native XDP",
            link.kind
        ))
    };
    let is_told = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 3, 0));
    match redirect {
        config::Redirect::Off => return None,
        // `xdp_do_redirect` before Linux 6.3, whatever anybody says.
        _ if !is_told && network::takes_several_buffers(*mtu_bytes) => {
            return Some(
                cannot("frames in several buffers")
                    .hint("Linux can from 6.3 on; before, lower the MTU to 3000, or set mode = \"generic\""),
            );
        }
        config::Redirect::On => return None,
        config::Redirect::Auto => {}
    }
    match network::takes_redirects(link.index, *mtu_bytes) {
        Some(true) => None,
        Some(false) => Some(cannot("frames").hint(
            "for a veth: switch GRO on for its other end (ethtool -K PEER gro on); for a driver that takes no frames in several \
             buffers: lower the MTU to 3000",
        )),
        // A veth is the one driver in doubt.
        None if has_veth(link, ports) => Some(
            Error::host(format!(
                "the kernel does not say whether frames can leave \"{name}\" ({}) straight from native XDP",
                link.kind
            ))
            .hint(
                "Linux says so from 6.3 on; before, switch GRO on for its other end (ethtool -K PEER gro on), and set \
                 redirect = \"on\" for this interface",
            ),
        ),
        None => None,
    }
}

/// Is it a veth, or a bond with one?
fn has_veth(link: &network::Interface, ports: &[&network::Interface]) -> bool {
    link.kind == InterfaceKind::Veth || ports.iter().any(|port| port.kind == InterfaceKind::Veth)
}
