//! Tunnels between two hosts, of every kind that Linux has a device for, made as an operator would make them.
//!
//! What a kind is called, what it takes of the MTU and the commands that make it: nothing else is different between
//! labs. Most kinds need a module that a kernel may not have, so only labs in a virtual machine make them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::{Lab, Namespace, Service, command, find};

/// VNI, key or interface id, where the kind has one.
const NUMBER: u32 = 42;
/// RFC 7348 §8.
const VXLAN_PORT: u16 = 4789;
/// RFC 8926 §3.3.
const GENEVE_PORT: u16 = 6081;
/// No port is assigned for packets directly in UDP; that of `ip-fou(8)`'s example.
const FOU_PORT: u16 = 5555;
/// draft-ietf-intarea-gue-09 §11.1.
const GUE_PORT: u16 = 6080;
/// What WireGuard's own documentation uses.
const WIREGUARD_PORT: u16 = 51820;
/// IANA's port of OpenVPN.
const TUN_PORT: u16 = 1194;

/// A kind of tunnel, by the name that its device or its encapsulation has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Vxlan,
    Geneve,
    /// Ethernet in GRE, with a key.
    Gretap,
    /// IP in GRE, with a key.
    Gre,
    Ipip,
    /// A `sit` device in the mode that takes IPv4 beside IPv6.
    Sit,
    /// A `sit` device for IPv6 alone.
    Ipv6InIpv4,
    /// An `ip6tnl` device for IPv4.
    Ipv4InIpv6,
    /// An `ip6tnl` device for IPv6.
    Ipv6InIpv6,
    /// IP in GRE over IPv6, with a key.
    Gre6,
    /// VXLAN over IPv6.
    Vxlan6,
    /// IP in UDP, nothing between.
    Fou,
    Gue,
    Wireguard,
    /// ESP in tunnel mode, behind an interface.
    Xfrm,
    /// A program that carries packets of a TUN device in UDP, as OpenVPN does: here socat.
    Tun,
}

impl Kind {
    /// Is the outer packet IPv6?
    pub const fn is_over_ipv6(self) -> bool {
        matches!(
            self,
            Self::Ipv4InIpv6 | Self::Ipv6InIpv6 | Self::Gre6 | Self::Vxlan6
        )
    }

    /// Does it carry IPv6 only? All others carry IPv4 here.
    pub const fn is_for_ipv6(self) -> bool {
        matches!(self, Self::Ipv6InIpv4 | Self::Ipv6InIpv6)
    }

    /// Outer IP header and all headers up to the inner IP packet, in bytes.
    pub const fn overhead_bytes(self) -> u16 {
        const IPV4: u16 = 20;
        const IPV6: u16 = 40;
        // The option that limits nesting, which Linux sends by default (RFC 2473 §4.1.1).
        const LIMIT: u16 = 8;
        const UDP: u16 = 8;
        const ETHERNET: u16 = 14;
        const GRE_WITH_KEY: u16 = 8;
        match self {
            // VXLAN's header, and Geneve's without options, have 8 bytes.
            Self::Vxlan | Self::Geneve => IPV4 + UDP + 8 + ETHERNET,
            Self::Gretap => IPV4 + GRE_WITH_KEY + ETHERNET,
            Self::Gre => IPV4 + GRE_WITH_KEY,
            Self::Ipip | Self::Sit | Self::Ipv6InIpv4 => IPV4,
            Self::Ipv4InIpv6 | Self::Ipv6InIpv6 => IPV6 + LIMIT,
            Self::Gre6 => IPV6 + LIMIT + GRE_WITH_KEY,
            Self::Vxlan6 => IPV6 + UDP + 8 + ETHERNET,
            Self::Fou | Self::Tun => IPV4 + UDP,
            Self::Gue => IPV4 + UDP + 4,
            // Message header 16 and tag 16 (wireguard.com/protocol); the packet is padded to 16, up to the MTU.
            Self::Wireguard => IPV4 + UDP + 32,
            // SPI and number 8, initialization vector 8, padding and its length up to 5, tag 16 (RFC 4303, RFC 4106).
            Self::Xfrm => IPV4 + 37,
        }
    }
}

/// One end of a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    pub namespace: &'a Namespace,
    /// Interface to the network that carries the tunnel.
    pub carrier: &'a str,
    /// Addresses in that network; the second where the tunnel is over IPv6.
    pub outside: Ipv4Addr,
    pub outside_v6: Ipv6Addr,
    /// Addresses of the tunnel device, in a /30 and a /64; the second where the tunnel is for IPv6.
    pub inside: Ipv4Addr,
    pub inside_v6: Ipv6Addr,
}

impl End<'_> {
    /// The address in the carrier that this kind of tunnel has.
    const fn outside_of(&self, kind: Kind) -> IpAddr {
        if kind.is_over_ipv6() {
            IpAddr::V6(self.outside_v6)
        } else {
            IpAddr::V4(self.outside)
        }
    }
}

/// Joins two ends by devices called `name`, for a carrier of `carrier_mtu_bytes`.
pub fn join(lab: &Lab, kind: Kind, name: &str, ends: [End<'_>; 2], carrier_mtu_bytes: u16) -> Result<()> {
    let [a, b] = ends;
    match kind {
        Kind::Fou | Kind::Gue => load("fou")?,
        Kind::Tun if !Path::new("/dev/net/tun").exists() => load("tun")?,
        // The kernel loads what the device takes when it is made.
        _ => {}
    }
    let keys = if kind == Kind::Wireguard {
        Some([wireguard_keys(&a)?, wireguard_keys(&b)?])
    } else {
        None
    };
    for (number, (this, other)) in [(a, b), (b, a)].into_iter().enumerate() {
        let add = |settings: &str| {
            let mtu_bytes = carrier_mtu_bytes - kind.overhead_bytes();
            this.namespace
                .run(&format!(
                    "ip link add name {name} mtu {mtu_bytes} type {settings}"
                ))
                .map(drop)
        };
        let (local, remote) = (this.outside_of(kind), other.outside_of(kind));
        match kind {
            Kind::Vxlan | Kind::Vxlan6 => add(&format!(
                "vxlan id {NUMBER} local {local} remote {remote} dstport {VXLAN_PORT}"
            )),
            Kind::Geneve => add(&format!(
                "geneve id {NUMBER} remote {remote} dstport {GENEVE_PORT}"
            )),
            Kind::Gretap => add(&format!("gretap key {NUMBER} local {local} remote {remote}")),
            Kind::Gre => add(&format!("gre key {NUMBER} local {local} remote {remote}")),
            Kind::Ipip => add(&format!("ipip local {local} remote {remote}")),
            Kind::Sit => add(&format!("sit mode any local {local} remote {remote}")),
            Kind::Ipv6InIpv4 => add(&format!("sit mode ip6ip local {local} remote {remote}")),
            Kind::Ipv4InIpv6 => add(&format!("ip6tnl mode ipip6 local {local} remote {remote}")),
            Kind::Ipv6InIpv6 => add(&format!("ip6tnl mode ip6ip6 local {local} remote {remote}")),
            Kind::Gre6 => add(&format!("ip6gre key {NUMBER} local {local} remote {remote}")),
            Kind::Fou => {
                // 4: IPv4 in IP.
                this.namespace
                    .run(&format!("ip fou add port {FOU_PORT} ipproto 4"))?;
                add(&format!(
                    "ipip local {local} remote {remote} encap fou encap-sport auto encap-dport {FOU_PORT}"
                ))
            }
            Kind::Gue => {
                this.namespace.run(&format!("ip fou add port {GUE_PORT} gue"))?;
                add(&format!(
                    "ipip local {local} remote {remote} encap gue encap-sport auto encap-dport {GUE_PORT}"
                ))
            }
            Kind::Wireguard => add("wireguard"),
            Kind::Tun => carry(
                lab,
                name,
                &this,
                &other,
                carrier_mtu_bytes - kind.overhead_bytes(),
            ),
            Kind::Xfrm => {
                protect(&this, &other)?;
                add(&format!("xfrm dev {} if_id {NUMBER}", this.carrier))
            }
        }?;
        if let Some(keys) = &keys {
            let file = lab.directory().join(format!("{}.key", this.namespace.role()));
            fs::write(&file, &keys[number].private)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            this.namespace.run(&format!(
                "wg set {name} listen-port {WIREGUARD_PORT} private-key {} peer {} allowed-ips 0.0.0.0/0 endpoint {remote}:{WIREGUARD_PORT}",
                file.display(),
                keys[1 - number].public
            ))?;
        }
        if kind.is_for_ipv6() {
            this.namespace
                .run(&format!("ip address add {}/64 dev {name} nodad", this.inside_v6))?;
        } else {
            this.namespace.address(name, &format!("{}/30", this.inside))?;
        }
        this.namespace.run(&format!("ip link set {name} up"))?;
    }
    Ok(())
}

fn load(module: &str) -> Result<()> {
    command::run("modprobe", &[module]).map(drop)
}

/// What a WireGuard interface knows itself by.
struct Keys {
    private: String,
    public: String,
}

fn wireguard_keys(end: &End<'_>) -> Result<Keys> {
    let private = end.namespace.run("wg genkey")?;
    let public = end.namespace.run_with_input("wg pubkey", Some(&private))?;
    Ok(Keys {
        private,
        public: public.trim().to_owned(),
    })
}

/// Makes a TUN device, and starts the program that carries its packets to the other end.
fn carry(lab: &Lab, name: &str, this: &End<'_>, other: &End<'_>, mtu_bytes: u16) -> Result<()> {
    this.namespace
        .run(&format!("ip tuntap add dev {name} mode tun"))?;
    this.namespace
        .run(&format!("ip link set {name} mtu {mtu_bytes}"))?;
    let device = format!("TUN,tun-name={name},tun-type=tun,iff-no-pi");
    let carrier = format!(
        "UDP4-DATAGRAM:{}:{TUN_PORT},bind={}:{TUN_PORT}",
        other.outside, this.outside
    );
    let process = lab.spawn(
        this.namespace,
        &Service {
            name: "socat",
            program: &find("socat").context("socat is not installed")?,
            arguments: &[device.as_ref(), carrier.as_ref()],
            environment: &[],
            stop_signal: Signal::SIGTERM,
            log: &lab
                .directory()
                .join(format!("socat-{}.log", this.namespace.role())),
        },
    )?;
    // The lab stops it.
    drop(process);
    Ok(())
}

/// Security associations and policies of one end, as a key exchange would have left them: what leaves by the
/// interface is encrypted, and only what was encrypted comes in by it.
fn protect(this: &End<'_>, other: &End<'_>) -> Result<()> {
    for (from, to, direction) in [
        (this.outside, other.outside, "out"),
        (other.outside, this.outside, "in"),
        (other.outside, this.outside, "fwd"),
    ] {
        if direction != "fwd" {
            // The number of an association has to differ by direction only where both ends are one host. A key of
            // 16 bytes and a salt of 4 (RFC 4106 §8.1).
            this.namespace.run(&format!(
                "ip xfrm state add src {from} dst {to} proto esp spi {NUMBER} reqid {NUMBER} mode tunnel \
                 aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128 if_id {NUMBER}"
            ))?;
        }
        this.namespace.run(&format!(
            "ip xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir {direction} \
             tmpl src {from} dst {to} proto esp reqid {NUMBER} mode tunnel if_id {NUMBER}"
        ))?;
    }
    Ok(())
}
