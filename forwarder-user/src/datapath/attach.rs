//! Hooks the programs to interfaces.
//!
//! XDP goes on in native mode where the driver can *and* frames can leave again: an answer to ARP, a redirect.
//! On a veth they can only if the other end polls: it has an XDP program, or GRO is on. Else generic mode, which
//! works everywhere and is slower.

use aya::{
    Ebpf,
    programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc},
    util::KernelVersion,
};
use forwarder_common::{
    abi::{
        interface::{Interface, flag},
        map_name, settings,
    },
    datapath::Hook,
};

use super::object::{kernel_error, program};
use crate::{
    config,
    error::Error,
    network::{self, InterfaceKind},
};

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
}

/// Attaches XDP to an interface; also says, in words, why it is not in native mode.
///
/// # Errors
/// When the kernel refuses the mode that the configuration demands.
pub fn attach_xdp(
    ebpf: &mut Ebpf,
    link: &network::Interface,
    wanted: &config::Interface,
) -> Result<(Attachment, Option<String>), Error> {
    if !link.is_ethernet {
        return Err(Error::host(format!(
            "interface \"{}\" ({}) is not Ethernet",
            link.name, link.kind
        ))
        .hint("name it under [tunnel] instead of [interface]"));
    }
    if wanted.mode == config::XdpMode::Generic {
        return Ok((attach_generic(ebpf, link, wanted)?, None));
    }
    match try_native(ebpf, link, wanted) {
        Ok(attachment) => Ok((attachment, None)),
        Err(error) if wanted.mode == config::XdpMode::Native => Err(error),
        Err(error) => Ok((attach_generic(ebpf, link, wanted)?, Some(error.what))),
    }
}

fn try_native(
    ebpf: &mut Ebpf,
    link: &network::Interface,
    wanted: &config::Interface,
) -> Result<Attachment, Error> {
    let xdp: &mut Xdp = program(ebpf, map_name::PROGRAM_XDP)?;
    let id = xdp
        .attach_to_if_index(link.index, XdpMode::Driver)
        .map_err(|error| {
            kernel_error(&format!("attach XDP to \"{}\" in native mode", link.name), &error).hint(
                "set mode = \"auto\" or \"generic\" for this interface, or use a driver with native XDP",
            )
        })?;
    let sends = match wanted.redirect {
        config::Redirect::On => true,
        config::Redirect::Off => false,
        config::Redirect::Auto => can_send(link),
    };
    if !sends && wanted.redirect == config::Redirect::Auto {
        let xdp: &mut Xdp = program(ebpf, map_name::PROGRAM_XDP)?;
        xdp.detach(id)
            .map_err(|error| kernel_error("detach XDP", &error))?;
        return Err(Error::host(format!(
            "frames cannot leave \"{}\" ({}) straight from native XDP",
            link.name, link.kind
        ))
        .hint("for a veth: switch GRO on for its other end (ethtool -K PEER gro on)"));
    }
    let flags = if sends {
        flag::SEND_NATIVE | flag::SEND_GENERIC
    } else {
        0
    };
    let redirects = if link.kind == InterfaceKind::Veth {
        settings::flag::TRANSMIT_BY_REDIRECT
    } else {
        0
    };
    Ok(attachment(link, AttachmentKind::XdpNative, flags, redirects))
}

fn attach_generic(
    ebpf: &mut Ebpf,
    link: &network::Interface,
    wanted: &config::Interface,
) -> Result<Attachment, Error> {
    let xdp: &mut Xdp = program(ebpf, map_name::PROGRAM_XDP_GENERIC)?;
    xdp.attach_to_if_index(link.index, XdpMode::Skb)
        .map_err(|error| {
            kernel_error(
                &format!("attach XDP to \"{}\" in generic mode", link.name),
                &error,
            )
            .hint("see `ip link show` for a program that is attached already, and remove it")
        })?;
    let flags = if wanted.redirect == config::Redirect::Off {
        0
    } else {
        flag::SEND_GENERIC
    };
    Ok(attachment(link, AttachmentKind::XdpGeneric, flags, 0))
}

/// Attaches the tcx program to the ingress of a tunnel device.
///
/// # Errors
/// When the device has no Ethernet header, or the kernel refuses.
pub fn attach_tunnel(ebpf: &mut Ebpf, link: &network::Interface) -> Result<Attachment, Error> {
    if !link.is_ethernet {
        return Err(Error::host(format!(
            "tunnel \"{}\" ({}) carries no Ethernet header, which is not supported yet",
            link.name, link.kind
        ))
        .hint("use an Ethernet tunnel such as VXLAN, Geneve or gretap"));
    }
    // Before Linux 6.6 there is no tcx; the program then needs this queueing discipline. It may be there.
    let is_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
    if !is_tcx {
        let _ = tc::qdisc_add_clsact(&link.name);
    }
    let tunnel: &mut SchedClassifier = program(ebpf, map_name::PROGRAM_TUNNEL)?;
    tunnel
        .attach(&link.name, TcAttachType::Ingress)
        .map_err(|error| kernel_error(&format!("attach to the ingress of \"{}\"", link.name), &error))?;
    Ok(attachment(link, AttachmentKind::Tcx, 0, 0))
}

fn attachment(
    link: &network::Interface,
    kind: AttachmentKind,
    flags: u16,
    settings_flags: u32,
) -> Attachment {
    let is_physical = link.kind == InterfaceKind::Physical && link.driver.as_deref() != Some("virtio_net");
    let partial = if is_physical {
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
        },
        settings_flags: settings_flags | partial,
    }
}

/// Can frames leave the interface straight from native XDP?
fn can_send(link: &network::Interface) -> bool {
    // Where the kernel does not say (before 6.3), a veth is the one driver in doubt.
    network::takes_redirects(link.index).unwrap_or(link.kind != InterfaceKind::Veth)
}
