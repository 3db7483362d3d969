//! The configuration language: its tables, their keys, and the type and range of each value.
//!
//! [`Document`] is what the operator wrote, each value with its place. Everything that can be said of one
//! key alone is checked here; what needs two places of the file (names that must exist, networks that must
//! not overlap) is `validate`'s, and so are the defaults of whole objects. [`SHAPES`] lists every key; the
//! test of `docs/configuration.md` reads it.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use forwarder_common::abi::snat::MAX_RANGES;
use ipnet::IpNet;
use toml::de::{DeTable, DeValue};

use super::{
    MadeKind, NatMode, OnStop, OnUnhealthy, Ports, Protocol, Redirect, Selection, SynCookies, TunnelMode,
    XdpMode,
    health::read::{HEALTH, Health, TUNNEL_HEALTH, TunnelHealth},
    reader::{At, Field, Named, OptionalField, Report, Reported, Shape, Table, Wrong, integer, one_of},
};

/// Range of `agent.max_flows`.
pub const MAX_FLOWS: RangeInclusive<u32> = 1024..=16_777_216;
/// A network of VXLAN or Geneve has 24 bits (RFC 7348 §5, RFC 8926 §3.4).
pub const VNI: RangeInclusive<u32> = 0..=0x00ff_ffff;
/// A key of GRE has 32 bits (RFC 2890 §2.1).
pub const GRE_KEY: RangeInclusive<u32> = 0..=u32::MAX;
/// Zero is the inner packet's.
pub const TTL: RangeInclusive<u8> = 0..=255;
/// What IPv6 needs at least (RFC 8200 §5), up to what IP can carry.
pub const TUNNEL_MTU: RangeInclusive<u32> = 1280..=65_535;
/// Range of `agent.max_slots`; the upper end is 512 MiB of 4-byte slots.
pub const MAX_SLOTS: RangeInclusive<u32> = 1024..=134_217_728;
/// Range of a group's `slow_start`, in milliseconds.
pub const SLOW_START_MS: RangeInclusive<u64> = 0..=3_600_000;
/// Range of a group's `min_healthy_percent`.
pub const PERCENT: RangeInclusive<u8> = 0..=100;
/// Range of a backend's `tier`.
pub const TIER: RangeInclusive<u8> = 0..=3;
/// Range of `agent.max_persistent_clients`.
pub const PERSISTENT_CLIENTS: RangeInclusive<u32> = 1..=*MAX_FLOWS.end();
/// Prefixes in `snat.prefixes`, of both families.
pub const SNAT_PREFIXES: RangeInclusive<usize> = 1..=2 * MAX_RANGES;
/// CIDRs of one network, and allowed ranges of backends: enough for any routing plan, few enough to print.
pub const CIDRS: RangeInclusive<usize> = 1..=256;
/// Range of a port.
pub const PORT: RangeInclusive<u16> = 1..=65535;
/// Range of `rejected` and `silent` of a passive check; zero switches the sign off.
pub const PASSIVE_FLOWS: RangeInclusive<u32> = 0..=10_000;
/// Range of a passive check's `silent_after`, in milliseconds.
pub const SILENT_AFTER_MS: RangeInclusive<u64> = 100..=60_000;
/// Range of a passive check's ejection times, in milliseconds.
pub const EJECTION_TIME_MS: RangeInclusive<u64> = 1_000..=3_600_000;
/// Range of a listener's `idle_timeout`, in milliseconds.
pub const IDLE_TIMEOUT_MS: RangeInclusive<u64> = 10_000..=4_000_000;
/// Range of a listener's `half_open_timeout`, in milliseconds.
pub const HALF_OPEN_TIMEOUT_MS: RangeInclusive<u64> = 5_000..=300_000;
/// Range of a group's `persistence_timeout`, in milliseconds.
pub const PERSISTENCE_TIMEOUT_MS: RangeInclusive<u64> = 1_000..=86_400_000;
/// Range of a group's `persistence_prefix`, in bits.
pub const PERSISTENCE_PREFIX: RangeInclusive<u8> = 1..=32;
/// Range of a group's `persistence_prefix_v6`, in bits.
pub const PERSISTENCE_PREFIX_V6: RangeInclusive<u8> = 1..=128;
/// Entries of a listener's `vips`: enough for both families of several networks.
pub const VIPS: RangeInclusive<usize> = 1..=16;
/// Entries of a listener's `sources`.
pub const SOURCES: RangeInclusive<usize> = 1..=100_000;
/// Range of `max_flows` of a listener or backend.
pub const FLOW_LIMIT: RangeInclusive<u32> = 1..=*MAX_FLOWS.end();
/// Range of a listener's `syn_cookies` as a number, in flows per second.
pub const SYN_THRESHOLD: RangeInclusive<u32> = 1..=100_000_000;
/// Range of a listener's `source_rate` and `source_burst`, in flows (per second).
pub const SOURCE_RATE: RangeInclusive<u32> = 1..=1_000_000;
/// Range of the number of a routing table; 253 to 255 are the kernel's default, main and local ones.
pub const TABLE: RangeInclusive<u32> = 1..=u32::MAX;

/// Longest name of a group, backend, network or listener, in bytes; that of a DNS label.
const NAME_BYTES: usize = 63;
/// Longest name of a network interface: Linux's `IFNAMSIZ` without the final zero.
const INTERFACE_NAME_BYTES: usize = 15;
/// Longest path of a Unix socket: Linux's `sun_path` without the final zero.
const SOCKET_PATH_BYTES: usize = 107;

const FILE: Shape = Shape {
    header: "",
    keys: &[
        "agent",
        "snat",
        "interface",
        "tunnel",
        "network",
        "group",
        "listener",
    ],
};
const AGENT: Shape = Shape {
    header: "agent",
    keys: &[
        "metrics_address",
        "control_socket",
        "control_group",
        "max_flows",
        "max_slots",
        "max_persistent_clients",
        "pin_directory",
        "on_stop",
        "reload_on_change",
        "mss_clamp",
        "allowed_backend_ranges",
        "api",
    ],
};
const REMOTE_API: Shape = Shape {
    header: "agent.api",
    keys: &["listen", "token_file", "certificate", "key", "client_ca"],
};
const SNAT: Shape = Shape {
    header: "snat",
    keys: &["prefixes", "probe_prefixes", "probe_address", "probe_address_v6"],
};
const INTERFACE: Shape = Shape {
    header: "interface.NAME",
    keys: &["mode", "redirect"],
};
const TUNNEL: Shape = Shape {
    header: "tunnel.NAME",
    keys: &[
        "mode", "kind", "remote", "local", "vni", "key", "port", "ttl", "mtu", "health",
    ],
};
const NETWORK: Shape = Shape {
    header: "network.NAME",
    keys: &["cidrs", "tunnel", "table", "vrf"],
};
const GROUP: Shape = Shape {
    header: "group.NAME",
    keys: &[
        "nat",
        "remote_ip",
        "selection",
        "persistence_timeout",
        "persistence_prefix",
        "persistence_prefix_v6",
        "on_unhealthy",
        "slow_start",
        "min_healthy_percent",
        "backup",
        "health",
        "passive",
        "backend",
    ],
};
const PASSIVE: Shape = Shape {
    header: "group.NAME.passive",
    keys: &[
        "enabled",
        "rejected",
        "silent",
        "silent_after",
        "max_ejected_percent",
        "ejection_time",
        "max_ejection_time",
    ],
};
const BACKEND: Shape = Shape {
    header: "group.NAME.backend.NAME",
    keys: &["address", "port", "weight", "max_flows", "tier"],
};
const LISTENER: Shape = Shape {
    header: "listener.NAME",
    keys: &[
        "vip",
        "vips",
        "port",
        "protocol",
        "group",
        "sources",
        "max_flows",
        "idle_timeout",
        "closing_timeout",
        "half_open_timeout",
        "reset_on_idle",
        "syn_cookies",
        "source_rate",
        "source_burst",
        "source_prefix",
        "source_prefix_v6",
    ],
};

/// Every table of the language with every key.
pub const SHAPES: &[&Shape] = &[
    &FILE,
    &AGENT,
    &REMOTE_API,
    &SNAT,
    &INTERFACE,
    &TUNNEL,
    &TUNNEL_HEALTH,
    &NETWORK,
    &GROUP,
    &HEALTH,
    &PASSIVE,
    &BACKEND,
    &LISTENER,
];

/// The whole file.
#[derive(Clone, Debug)]
pub struct Document {
    pub agent: Result<Agent, Reported>,
    pub snat: Result<Snat, Reported>,
    pub interfaces: Named<Interface>,
    pub tunnels: Named<Tunnel>,
    pub networks: Named<Network>,
    pub groups: Named<Group>,
    pub listeners: Named<Listener>,
}

/// `[agent]`
#[derive(Clone, Debug)]
pub struct Agent {
    pub metrics_address: OptionalField<SocketAddr>,
    pub control_socket: OptionalField<PathBuf>,
    pub control_group: OptionalField<String>,
    pub max_flows: OptionalField<u32>,
    pub max_slots: OptionalField<u32>,
    pub max_persistent_clients: OptionalField<u32>,
    pub pin_directory: OptionalField<PathBuf>,
    pub on_stop: OptionalField<OnStop>,
    pub reload_on_change: OptionalField<bool>,
    pub mss_clamp: OptionalField<bool>,
    pub allowed_backend_ranges: OptionalField<Vec<Field<IpNet>>>,
    pub api: Result<Option<RemoteApi>, Reported>,
}

/// `[agent.api]`
#[derive(Clone, Debug)]
pub struct RemoteApi {
    pub listen: Field<SocketAddr>,
    pub token_file: OptionalField<PathBuf>,
    pub certificate: OptionalField<PathBuf>,
    pub key: OptionalField<PathBuf>,
    pub client_ca: OptionalField<PathBuf>,
}

/// `[snat]`
#[derive(Clone, Debug)]
pub struct Snat {
    pub prefixes: Field<Vec<Field<IpNet>>>,
    pub probe_prefixes: OptionalField<Vec<Field<IpNet>>>,
    pub probe_address: OptionalField<IpAddr>,
    pub probe_address_v6: OptionalField<IpAddr>,
}

/// `[interface.NAME]`
#[derive(Clone, Debug)]
pub struct Interface {
    pub mode: OptionalField<XdpMode>,
    pub redirect: OptionalField<Redirect>,
}

/// `[tunnel.NAME]`
#[derive(Clone, Debug)]
pub struct Tunnel {
    pub mode: OptionalField<TunnelMode>,
    pub kind: OptionalField<MadeKind>,
    pub remote: OptionalField<IpAddr>,
    pub local: OptionalField<IpAddr>,
    pub vni: OptionalField<u32>,
    pub key: OptionalField<u32>,
    pub port: OptionalField<u16>,
    pub ttl: OptionalField<u8>,
    pub mtu: OptionalField<u32>,
    pub health: Result<Option<TunnelHealth>, Reported>,
}

/// `[network.NAME]`
#[derive(Clone, Debug)]
pub struct Network {
    pub cidrs: Field<Vec<Field<IpNet>>>,
    pub tunnel: OptionalField<String>,
    pub table: OptionalField<u32>,
    pub vrf: OptionalField<String>,
}

/// `[group.NAME]`
#[derive(Clone, Debug)]
pub struct Group {
    pub nat: OptionalField<NatMode>,
    pub remote_ip: OptionalField<bool>,
    pub selection: OptionalField<Selection>,
    pub persistence_timeout: OptionalField<Duration>,
    pub persistence_prefix: OptionalField<u8>,
    pub persistence_prefix_v6: OptionalField<u8>,
    pub on_unhealthy: OptionalField<OnUnhealthy>,
    pub slow_start: OptionalField<Duration>,
    pub min_healthy_percent: OptionalField<u8>,
    pub backup: OptionalField<String>,
    pub health: Result<Health, Reported>,
    pub passive: Result<Passive, Reported>,
    pub backends: Named<Backend>,
}

/// `[group.NAME.passive]`
#[derive(Clone, Debug)]
pub struct Passive {
    pub enabled: OptionalField<bool>,
    pub rejected: OptionalField<u32>,
    pub silent: OptionalField<u32>,
    pub silent_after: OptionalField<Duration>,
    pub max_ejected_percent: OptionalField<u8>,
    pub ejection_time: OptionalField<Duration>,
    pub max_ejection_time: OptionalField<Duration>,
}

/// `[group.NAME.backend.NAME]`
#[derive(Clone, Debug)]
pub struct Backend {
    pub address: Field<IpAddr>,
    pub port: OptionalField<u16>,
    pub weight: OptionalField<u16>,
    pub max_flows: OptionalField<u32>,
    pub tier: OptionalField<u8>,
}

/// `[listener.NAME]`
#[derive(Clone, Debug)]
pub struct Listener {
    pub vip: OptionalField<IpAddr>,
    pub vips: OptionalField<Vec<Field<IpAddr>>>,
    /// Of ICMP absent.
    pub port: OptionalField<Ports>,
    pub protocol: OptionalField<Protocol>,
    pub group: Field<String>,
    pub sources: OptionalField<Vec<Field<IpNet>>>,
    pub max_flows: OptionalField<u32>,
    pub idle_timeout: OptionalField<Duration>,
    pub closing_timeout: OptionalField<Duration>,
    pub half_open_timeout: OptionalField<Duration>,
    pub reset_on_idle: OptionalField<bool>,
    pub syn_cookies: OptionalField<Option<SynCookies>>,
    pub source_rate: OptionalField<u32>,
    pub source_burst: OptionalField<u32>,
    pub source_prefix: OptionalField<u8>,
    pub source_prefix_v6: OptionalField<u8>,
}

impl Document {
    /// Reads the whole file; what is wrong goes to `report`.
    pub fn read(root: &DeTable<'_>, report: &Report) -> Self {
        let file = Table::root(report, &FILE, root);
        Self {
            agent: file.table("agent", &AGENT, |table| Agent {
                metrics_address: table.optional("metrics_address", socket_address),
                control_socket: table.optional("control_socket", socket_path),
                control_group: table.optional("control_group", text("the name of a group of users")),
                max_flows: table.optional("max_flows", integer(MAX_FLOWS)),
                max_slots: table.optional("max_slots", integer(MAX_SLOTS)),
                max_persistent_clients: table.optional("max_persistent_clients", integer(PERSISTENT_CLIENTS)),
                pin_directory: table.optional("pin_directory", pin_directory),
                on_stop: table.optional(
                    "on_stop",
                    one_of(&[("detach", OnStop::Detach), ("keep", OnStop::Keep)]),
                ),
                reload_on_change: table.optional("reload_on_change", boolean),
                mss_clamp: table.optional("mss_clamp", boolean),
                allowed_backend_ranges: table.optional_list("allowed_backend_ranges", CIDRS, prefix),
                api: table.optional_table("api", &REMOTE_API, |table| RemoteApi {
                    listen: table.required("listen", "\"127.0.0.1:9470\"", socket_address),
                    token_file: table.optional("token_file", absolute_path),
                    certificate: table.optional("certificate", absolute_path),
                    key: table.optional("key", absolute_path),
                    client_ca: table.optional("client_ca", absolute_path),
                }),
            }),
            snat: file.required_table("snat", &SNAT, |table| Snat {
                prefixes: table.required_list("prefixes", "[\"100.64.0.0/26\"]", SNAT_PREFIXES, prefix),
                probe_prefixes: table.optional_list("probe_prefixes", SNAT_PREFIXES, prefix),
                probe_address: table.optional("probe_address", address_v4),
                probe_address_v6: table.optional("probe_address_v6", address_v6),
            }),
            interfaces: file.required_named("interface", &INTERFACE, interface_name, |table| Interface {
                mode: table.optional(
                    "mode",
                    one_of(&[
                        ("auto", XdpMode::Auto),
                        ("native", XdpMode::Native),
                        ("generic", XdpMode::Generic),
                    ]),
                ),
                redirect: table.optional(
                    "redirect",
                    one_of(&[
                        ("auto", Redirect::Auto),
                        ("on", Redirect::On),
                        ("off", Redirect::Off),
                    ]),
                ),
            }),
            tunnels: file.named("tunnel", &TUNNEL, interface_name, |table| Tunnel {
                mode: table.optional("mode", tunnel_mode),
                kind: table.optional("kind", made_kind),
                remote: table.optional("remote", outer_address),
                local: table.optional("local", outer_address),
                vni: table.optional("vni", integer(VNI)),
                key: table.optional("key", integer(GRE_KEY)),
                port: table.optional("port", integer(PORT)),
                ttl: table.optional("ttl", integer(TTL)),
                mtu: table.optional("mtu", integer(TUNNEL_MTU)),
                health: table.optional_table("health", &TUNNEL_HEALTH, TunnelHealth::read),
            }),
            networks: file.named("network", &NETWORK, name, |table| Network {
                cidrs: table.required_list("cidrs", "[\"192.168.0.0/16\"]", CIDRS, prefix),
                tunnel: table.optional("tunnel", text("the name of a tunnel")),
                table: table.optional("table", integer(TABLE)),
                vrf: table.optional("vrf", vrf),
            }),
            groups: file.named("group", &GROUP, name, |table| Group {
                nat: table.optional("nat", one_of(&[("full", NatMode::Full), ("dnat", NatMode::Dnat)])),
                remote_ip: table.optional("remote_ip", boolean),
                selection: table.optional(
                    "selection",
                    one_of(&[
                        ("maglev", Selection::Maglev),
                        ("source-ip", Selection::SourceIp),
                        ("round-robin", Selection::RoundRobin),
                        ("least-connections", Selection::LeastConnections),
                    ]),
                ),
                persistence_timeout: table.optional("persistence_timeout", duration(PERSISTENCE_TIMEOUT_MS)),
                persistence_prefix: table.optional("persistence_prefix", integer(PERSISTENCE_PREFIX)),
                persistence_prefix_v6: table
                    .optional("persistence_prefix_v6", integer(PERSISTENCE_PREFIX_V6)),
                on_unhealthy: table.optional(
                    "on_unhealthy",
                    one_of(&[
                        ("keep", OnUnhealthy::Keep),
                        ("reset", OnUnhealthy::Reset),
                        ("rehash", OnUnhealthy::Rehash),
                    ]),
                ),
                slow_start: table.optional("slow_start", duration(SLOW_START_MS)),
                min_healthy_percent: table.optional("min_healthy_percent", integer(PERCENT)),
                backup: table.optional("backup", text("the name of another backend group")),
                health: table.table("health", &HEALTH, Health::read),
                passive: table.table("passive", &PASSIVE, Passive::read),
                backends: table.required_named("backend", &BACKEND, name, |table| Backend {
                    address: table.required("address", "\"192.168.1.10\"", address),
                    port: table.optional("port", integer(PORT)),
                    weight: table.optional("weight", integer(0..=u16::MAX)),
                    max_flows: table.optional("max_flows", integer(FLOW_LIMIT)),
                    tier: table.optional("tier", integer(TIER)),
                }),
            }),
            listeners: file.required_named("listener", &LISTENER, name, Listener::read),
        }
    }
}

impl Listener {
    fn read(table: &Table<'_>) -> Self {
        let protocol = table.optional("protocol", one_of(&Protocol::ALL));
        let is_icmp = matches!(
            protocol,
            Ok(Some(At {
                value: Protocol::Icmp,
                ..
            }))
        );
        Self {
            vip: match table.misspelt("vip") {
                Some(reported) => Err(reported),
                None => table.optional("vip", address),
            },
            vips: table.optional_list("vips", VIPS, address),
            port: if is_icmp {
                table.optional("port", ports)
            } else {
                table.required("port", "80", ports).map(Some)
            },
            protocol,
            group: table.required("group", "\"web\"", text("the name of a backend group")),
            sources: table.optional_list("sources", SOURCES, prefix),
            max_flows: table.optional("max_flows", integer(FLOW_LIMIT)),
            idle_timeout: table.optional("idle_timeout", duration(IDLE_TIMEOUT_MS)),
            closing_timeout: table.optional("closing_timeout", duration(IDLE_TIMEOUT_MS)),
            half_open_timeout: table.optional("half_open_timeout", duration(HALF_OPEN_TIMEOUT_MS)),
            reset_on_idle: table.optional("reset_on_idle", boolean),
            syn_cookies: table.optional("syn_cookies", syn_cookies),
            source_rate: table.optional("source_rate", integer(SOURCE_RATE)),
            source_burst: table.optional("source_burst", integer(SOURCE_RATE)),
            source_prefix: table.optional("source_prefix", integer(PERSISTENCE_PREFIX)),
            source_prefix_v6: table.optional("source_prefix_v6", integer(PERSISTENCE_PREFIX_V6)),
        }
    }
}

impl Passive {
    fn read(table: &Table<'_>) -> Self {
        Self {
            enabled: table.optional("enabled", boolean),
            rejected: table.optional("rejected", integer(PASSIVE_FLOWS)),
            silent: table.optional("silent", integer(PASSIVE_FLOWS)),
            silent_after: table.optional("silent_after", duration(SILENT_AFTER_MS)),
            max_ejected_percent: table.optional("max_ejected_percent", integer(0..=100)),
            ejection_time: table.optional("ejection_time", duration(EJECTION_TIME_MS)),
            max_ejection_time: table.optional("max_ejection_time", duration(EJECTION_TIME_MS)),
        }
    }
}

/// `"off"`, `"always"`, or how many flows per second are opened without.
fn syn_cookies(value: &DeValue<'_>) -> Result<Option<SynCookies>, Wrong> {
    match value {
        DeValue::String(text) if &**text == "off" => Ok(None),
        DeValue::String(text) if &**text == "always" => Ok(Some(SynCookies::Always)),
        _ => integer(SYN_THRESHOLD)(value)
            .map(|above| Some(SynCookies::Above(above)))
            .map_err(|wrong| wrong.or_else_be("\"off\", \"always\"")),
    }
}

/// The rule of names that a name breaks, if any.
fn name(name: &str) -> Option<&'static str> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(good);
    (!fits).then_some("a name has 1 to 63 characters out of A-Z a-z 0-9 . _ -")
}

/// The rule of interface names that a name breaks, if any.
fn interface_name(interface: &str) -> Option<&'static str> {
    name(interface).or_else(|| {
        let fits = interface.len() <= INTERFACE_NAME_BYTES && ![".", ".."].contains(&interface);
        (!fits).then_some("the name of a network device has at most 15 characters and is not \".\" or \"..\"")
    })
}

pub(super) fn boolean(value: &DeValue<'_>) -> Result<bool, Wrong> {
    value.as_bool().ok_or_else(|| Wrong::must_be("true or false"))
}

fn vrf(value: &DeValue<'_>) -> Result<String, Wrong> {
    let name = value.as_str().filter(|text| interface_name(text).is_none());
    name.map(str::to_owned)
        .ok_or_else(|| Wrong::must_be("the name of a VRF device"))
}

/// `80`, `"8000-8099"` or `"any"`.
fn ports(value: &DeValue<'_>) -> Result<Ports, Wrong> {
    let wrong = || {
        let (first, last) = (PORT.start(), PORT.end());
        Wrong::must_be(format!(
            "a number from {first} to {last}, a range such as \"8000-8099\", or \"any\""
        ))
    };
    match value {
        DeValue::Integer(_) => integer(PORT)(value).map(Ports::one).map_err(|_| wrong()),
        DeValue::String(text) if text == "any" => Ok(Ports::ANY),
        DeValue::String(text) => match text.split_once('-') {
            Some((first, last)) => match (first.trim().parse(), last.trim().parse()) {
                (Ok(first), Ok(last)) if first >= 1 && first <= last => Ok(Ports { first, last }),
                _ => Err(wrong()),
            },
            None if text.parse::<u16>().is_ok() => Err(wrong().hint("write it without quotes")),
            None => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

fn text(must_be: &'static str) -> impl Fn(&DeValue<'_>) -> Result<String, Wrong> {
    move |value| {
        value
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Wrong::must_be(must_be))
    }
}

fn parsed<T: FromStr>(value: &DeValue<'_>) -> Option<T> {
    value.as_str().and_then(|text| text.parse().ok())
}

pub(super) fn address(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    parsed(value).ok_or_else(|| {
        let wrong = Wrong::must_be("an address such as \"10.0.0.1\" or \"fd00::1\"");
        if parsed::<IpNet>(value).is_some() {
            wrong.hint("write the address without its prefix length")
        } else if value
            .as_str()
            .is_some_and(|text| text.starts_with('[') || text.contains('%'))
        {
            wrong.hint("write the address alone, without brackets and without an interface")
        } else {
            wrong
        }
    })
}

fn address_v4(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let is_v4 = IpAddr::is_ipv4;
    address(value).ok().filter(is_v4).ok_or_else(|| {
        let wrong = Wrong::must_be("an IPv4 address such as \"100.64.0.1\"");
        match address(value) {
            Ok(_) => wrong.hint("the one of IPv6 is probe_address_v6"),
            Err(_) => wrong,
        }
    })
}

fn address_v6(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let is_v6 = IpAddr::is_ipv6;
    address(value)
        .ok()
        .filter(is_v6)
        .ok_or_else(|| Wrong::must_be("an IPv6 address such as \"fd00::1\""))
}

fn prefix(value: &DeValue<'_>) -> Result<IpNet, Wrong> {
    let wrong = || Wrong::must_be("a prefix such as \"10.0.0.0/8\" or \"fd00::/8\"");
    let Some(prefix) = parsed::<IpNet>(value) else {
        return Err(match parsed::<IpAddr>(value) {
            Some(address) => wrong().hint(format!("write \"{}\" for this one address", IpNet::from(address))),
            None => wrong(),
        });
    };
    if prefix.trunc() == prefix {
        Ok(prefix)
    } else {
        Err(Wrong::must_be("a prefix without host bits").hint(format!("write \"{}\"", prefix.trunc())))
    }
}

fn socket_address(value: &DeValue<'_>) -> Result<SocketAddr, Wrong> {
    parsed(value).ok_or_else(|| {
        let wrong = Wrong::must_be("an address and port such as \"127.0.0.1:9469\"");
        match parsed::<IpAddr>(value) {
            Some(address) => wrong.hint(format!("write \"{}\"", SocketAddr::new(address, 9469))),
            None => wrong,
        }
    })
}

fn socket_path(value: &DeValue<'_>) -> Result<PathBuf, Wrong> {
    let wrong = || Wrong::must_be(format!("an absolute path of at most {SOCKET_PATH_BYTES} bytes"));
    let path = Path::new(value.as_str().ok_or_else(wrong)?);
    let fits = path.is_absolute() && path.as_os_str().len() <= SOCKET_PATH_BYTES;
    let printable = !path.to_string_lossy().contains(char::is_control);
    if fits && printable {
        Ok(path.to_owned())
    } else {
        Err(wrong())
    }
}

pub(super) fn absolute_path(value: &DeValue<'_>) -> Result<PathBuf, Wrong> {
    let path = value.as_str().map(Path::new);
    let path = path.filter(|path| path.is_absolute() && !path.to_string_lossy().contains(char::is_control));
    path.map(Path::to_owned)
        .ok_or_else(|| Wrong::must_be("an absolute path"))
}

/// A directory of a BPF file system, which reserves names with a dot for itself (bpf_lookup, kernel/bpf/inode.c).
fn pin_directory(value: &DeValue<'_>) -> Result<PathBuf, Wrong> {
    let wrong = || Wrong::must_be("an absolute path without dots");
    let path = Path::new(value.as_str().ok_or_else(wrong)?);
    let text = path.to_string_lossy();
    if path.is_absolute() && path.parent().is_some() && !text.contains(|c: char| c == '.' || c.is_control()) {
        Ok(path.to_owned())
    } else {
        Err(wrong().hint("a directory of its own in a BPF file system, such as \"/sys/fs/bpf/forwarder\""))
    }
}

fn made_kind(value: &DeValue<'_>) -> Result<MadeKind, Wrong> {
    one_of(&[
        ("vxlan", MadeKind::Vxlan),
        ("geneve", MadeKind::Geneve),
        ("gre", MadeKind::Gre),
        ("gretap", MadeKind::Gretap),
        ("ipip", MadeKind::Ipip),
    ])(value)
}

/// An address in the network that carries a tunnel.
fn outer_address(value: &DeValue<'_>) -> Result<IpAddr, Wrong> {
    let is_host = |address: &IpAddr| !address.is_unspecified() && !address.is_multicast();
    parsed(value)
        .filter(is_host)
        .ok_or_else(|| Wrong::must_be("the address of a host, such as \"203.0.113.2\" or \"2001:db8::2\""))
}

fn tunnel_mode(value: &DeValue<'_>) -> Result<TunnelMode, Wrong> {
    one_of(&[
        ("auto", TunnelMode::Auto),
        ("native", TunnelMode::Native),
        ("kernel", TunnelMode::Kernel),
    ])(value)
}

/// Units of durations with their milliseconds, the longest first.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A whole number with a unit: `"250ms"`, `"2s"`, `"1m"`, `"1h"`. One unit only, so that there is one way
/// to write a duration and nothing to guess.
pub(super) fn duration(range_ms: RangeInclusive<u64>) -> impl Fn(&DeValue<'_>) -> Result<Duration, Wrong> {
    move |value| {
        let wrong = || {
            let (first, last) = (show_duration(*range_ms.start()), show_duration(*range_ms.end()));
            Wrong::must_be(format!("a duration from {first} to {last}"))
        };
        let text = match value {
            DeValue::String(text) => text,
            DeValue::Integer(number) => {
                return Err(wrong().hint(format!("write it with a unit: \"{number}s\"")));
            }
            _ => return Err(wrong()),
        };
        let Some((count, factor)) = count_and_unit(text) else {
            return Err(wrong().hint("write a whole number with one unit: \"250ms\", \"2s\", \"1m\", \"1h\""));
        };
        count
            .checked_mul(factor)
            .filter(|ms| range_ms.contains(ms))
            .map(Duration::from_millis)
            .ok_or_else(wrong)
    }
}

/// A whole number, and the milliseconds of its unit.
fn count_and_unit(text: &str) -> Option<(u64, u64)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    Some((count.parse().ok()?, *factor))
}

/// A duration as the language writes it, for the command line.
///
/// # Errors
/// What it must be.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    count_and_unit(text)
        .and_then(|(count, factor)| count.checked_mul(factor))
        .map(Duration::from_millis)
        .ok_or_else(|| "write a whole number with one unit, such as 30s, 5m or 1h".to_owned())
}

/// A duration as one would write it: in seconds where they are whole, else in milliseconds.
fn show_duration(ms: u64) -> String {
    if ms.is_multiple_of(1000) {
        format!("{}s", ms / 1000)
    } else {
        format!("{ms}ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::health::read::{
        EXPECTATIONS, INTERVAL_MS, JITTER_PERCENT, PAYLOAD_BYTES, TEXT_BYTES, THRESHOLD, TIMEOUT_MS, WORDS,
    };

    const DOCS: &str = include_str!("../../../docs/configuration.md");

    fn value(text: &str) -> DeValue<'_> {
        DeValue::parse(text).unwrap().into_inner()
    }

    #[test]
    fn durations_have_one_unit() {
        let read = |text: &str| duration(50..=7_200_000)(&value(text)).ok().map(|d| d.as_millis());
        assert_eq!(read(r#""250ms""#), Some(250));
        assert_eq!(read(r#""2s""#), Some(2000));
        assert_eq!(read(r#""1m""#), Some(60_000));
        assert_eq!(read(r#""2h""#), Some(7_200_000));
        for wrong in ["", "s", "2", "2 s", "-2s", "2s500ms", "2sec", "49ms", "3h"] {
            assert_eq!(read(&format!("{wrong:?}")), None, "{wrong}");
        }
        assert_eq!(read("2"), None);
    }

    #[test]
    fn integers_may_be_written_as_toml_allows() {
        let read = |text| integer(PORT)(&value(text)).ok();
        assert_eq!(read("8_080"), Some(8080));
        assert_eq!(read("0x1f90"), Some(8080));
        assert_eq!(read("+80"), Some(80));
        assert_eq!(read("340282366920938463463374607431768211456"), None);
    }

    #[test]
    fn ports_are_a_number_a_range_or_any() {
        let read = |text| ports(&value(text)).ok().map(|ports| (ports.first, ports.last));
        assert_eq!(read("80"), Some((80, 80)));
        assert_eq!(read(r#""8000-8099""#), Some((8000, 8099)));
        assert_eq!(read(r#""any""#), Some((1, 65535)));
        for wrong in [
            "0",
            "65536",
            r#""80""#,
            r#""90-80""#,
            r#""0-80""#,
            r#""-80""#,
            r#""all""#,
            "true",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    /// The part of docs/configuration.md below the heading of a table.
    fn section(header: &str) -> &'static str {
        let heading = format!("\n## `[{header}]`");
        let start = DOCS
            .find(&heading)
            .unwrap_or_else(|| panic!("docs/configuration.md lacks {heading:?}"));
        let rest = &DOCS[start + heading.len()..];
        &rest[..rest.find("\n## ").unwrap_or(rest.len())]
    }

    /// Whether `key` of `outer` is a table, which has a section of its own.
    fn is_table(outer: &Shape, key: &str) -> bool {
        let header = format!("{}.{key}", outer.header);
        SHAPES
            .iter()
            .any(|inner| inner.header == header || inner.header == format!("{header}.NAME"))
    }

    #[test]
    fn every_table_and_key_is_documented() {
        for shape in SHAPES.iter().filter(|shape| !shape.header.is_empty()) {
            let rows = section(shape.header)
                .lines()
                .filter_map(|line| line.strip_prefix("| `"));
            let documented: Vec<&str> = rows.filter_map(|row| row.split('`').next()).collect();
            let keys: Vec<&str> = shape
                .keys
                .iter()
                .copied()
                .filter(|key| !is_table(shape, key))
                .collect();
            assert_eq!(documented, keys, "the rows of [{}]", shape.header);
        }
    }

    #[test]
    fn ranges_in_the_documentation_are_those_of_the_code() {
        let numbers = |range: RangeInclusive<u32>| format!("{} to {}", range.start(), range.end());
        let counts = |range: RangeInclusive<usize>| format!("{} to {}", range.start(), range.end());
        let durations = |range: RangeInclusive<u64>| {
            format!(
                "{} to {}",
                show_duration(*range.start()),
                show_duration(*range.end())
            )
        };
        let shares = |range: RangeInclusive<u32>| format!("{}% to {}%", range.start(), range.end());
        let port = format!("{} to {}", PORT.start(), PORT.end());
        for (header, key, range) in [
            ("agent", "max_flows", numbers(MAX_FLOWS)),
            ("agent", "max_slots", numbers(MAX_SLOTS)),
            ("agent", "max_persistent_clients", numbers(PERSISTENT_CLIENTS)),
            ("agent", "allowed_backend_ranges", counts(CIDRS)),
            ("snat", "prefixes", counts(SNAT_PREFIXES)),
            ("network.NAME", "cidrs", counts(CIDRS)),
            (
                "group.NAME",
                "persistence_timeout",
                durations(PERSISTENCE_TIMEOUT_MS),
            ),
            ("group.NAME", "slow_start", durations(SLOW_START_MS)),
            ("group.NAME", "min_healthy_percent", "0 to 100".to_owned()),
            ("group.NAME.backend.NAME", "tier", "0 to 3".to_owned()),
            ("group.NAME", "persistence_prefix", "1 to 32".to_owned()),
            ("group.NAME", "persistence_prefix_v6", "1 to 128".to_owned()),
            ("listener.NAME", "vips", counts(VIPS)),
            ("group.NAME.health", "expect", counts(EXPECTATIONS)),
            ("group.NAME.health", "command", counts(WORDS)),
            ("group.NAME.health", "send", counts(PAYLOAD_BYTES)),
            ("group.NAME.health", "answer", counts(PAYLOAD_BYTES)),
            ("group.NAME.health", "body", counts(TEXT_BYTES)),
            ("group.NAME.health", "jitter", shares(JITTER_PERCENT)),
            ("tunnel.NAME.health", "interval", durations(INTERVAL_MS)),
            ("tunnel.NAME.health", "timeout", durations(TIMEOUT_MS)),
            ("tunnel.NAME.health", "rise", numbers(THRESHOLD)),
            ("tunnel.NAME.health", "fall", numbers(THRESHOLD)),
            ("tunnel.NAME.health", "jitter", shares(JITTER_PERCENT)),
            ("tunnel.NAME.health", "port", port.clone()),
            ("group.NAME.health", "interval", durations(INTERVAL_MS)),
            ("group.NAME.health", "timeout", durations(TIMEOUT_MS)),
            ("group.NAME.health", "rise", numbers(THRESHOLD)),
            ("group.NAME.health", "fall", numbers(THRESHOLD)),
            ("group.NAME.health", "port", port.clone()),
            ("group.NAME.backend.NAME", "port", port.clone()),
            ("group.NAME.backend.NAME", "weight", format!("0 to {}", u16::MAX)),
            ("group.NAME.backend.NAME", "max_flows", numbers(FLOW_LIMIT)),
            ("network.NAME", "table", numbers(TABLE)),
            ("snat", "probe_prefixes", counts(SNAT_PREFIXES)),
            ("listener.NAME", "port", port),
            ("listener.NAME", "sources", counts(SOURCES)),
            ("listener.NAME", "max_flows", numbers(FLOW_LIMIT)),
            ("listener.NAME", "syn_cookies", numbers(SYN_THRESHOLD)),
            ("listener.NAME", "source_rate", numbers(SOURCE_RATE)),
            ("listener.NAME", "source_burst", numbers(SOURCE_RATE)),
            ("listener.NAME", "source_prefix", "1 to 32".to_owned()),
            ("listener.NAME", "source_prefix_v6", "1 to 128".to_owned()),
            ("listener.NAME", "closing_timeout", durations(IDLE_TIMEOUT_MS)),
            (
                "listener.NAME",
                "half_open_timeout",
                durations(HALF_OPEN_TIMEOUT_MS),
            ),
            ("listener.NAME", "idle_timeout", durations(IDLE_TIMEOUT_MS)),
        ] {
            let start = format!("| `{key}` |");
            let row = section(header)
                .lines()
                .find(|line| line.starts_with(&start))
                .unwrap();
            assert!(row.contains(&range), "[{header}]: {row:?} should say {range:?}");
        }
    }

    #[test]
    fn the_examples_of_the_documentation_are_valid() {
        // Those below the tables' headings are pieces of one file, in its order.
        let pieces: Vec<&str> = DOCS
            .split("```toml\n")
            .skip(1)
            .filter_map(|part| part.split("```").next())
            .collect();
        assert_eq!(pieces.len(), SHAPES.len() - 1);
        let whole = pieces.join("\n");
        if let Err(errors) = crate::config::load::parse(&whole, Path::new("docs/configuration.md")) {
            panic!("{errors}\n{whole}");
        }
    }
}
