//! The configuration: what the operator wrote, checked and complete.
//!
//! `load` reads a file into `schema` (values with their places, by way of `reader`), `validate` turns that
//! into the [`Config`] below or into *all* errors at once. Whoever holds a [`Config`] holds one that can be applied:
//! every name resolves, every default is filled in, no address is out of range. This module does no I/O
//! beyond reading the file and knows nothing of maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use forwarder_common::{
    abi::snat::PORTS_PER_ADDRESS,
    datapath::tcp_state::has_connections,
    maglev,
    wire::ipv4::{PROTOCOL_ICMP, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP},
};
use ipnet::IpNet;

pub mod address;
pub mod health;
pub mod load;
pub mod reader;
pub mod schema;
pub mod validate;

pub use address::PerFamily;
pub use health::{BodyMatch, HealthCheck, HttpProbe, Method, Probe, StatusRange, Trust, TunnelCheck};
pub use validate::{DEFAULT_HALF_OPEN_TIMEOUT, DEFAULT_IDLE_TIMEOUT};

/// A configuration that passed every check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub agent: Agent,
    /// Interfaces that get the XDP program, by name.
    pub interfaces: BTreeMap<String, Interface>,
    /// Tunnel devices that get the tcx program, by name.
    pub tunnels: BTreeMap<String, Tunnel>,
    pub snat: SnatPool,
    /// Networks joined by this gateway; their CIDRs do not overlap.
    pub networks: BTreeMap<String, Network>,
    pub groups: BTreeMap<String, Group>,
    pub listeners: BTreeMap<String, Listener>,
}

impl Config {
    /// Does any VIP or backend have an address of IPv4, of IPv6?
    pub fn families(&self) -> (bool, bool) {
        let backends = self.groups.values().flat_map(|group| group.backends.values());
        let vips = self.listeners.values().flat_map(|listener| &listener.vips);
        let addresses = backends.map(|backend| &backend.address).chain(vips);
        addresses.fold((false, false), |(v4, v6), address| {
            (v4 || address.is_ipv4(), v6 || address.is_ipv6())
        })
    }

    /// The tunnel that leads to an address, if its network is behind one.
    pub fn tunnel_to(&self, address: IpAddr) -> Option<&str> {
        let mut networks = self.networks.values();
        let holds = |network: &&Network| network.cidrs.iter().any(|cidr| cidr.contains(&address));
        networks.find(holds)?.tunnel.as_deref()
    }

    /// All VIPs, each once.
    pub fn vips(&self) -> BTreeSet<IpAddr> {
        self.listeners
            .values()
            .flat_map(|listener| listener.vips.iter().copied())
            .collect()
    }
}

/// What concerns the agent itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Where Prometheus scrapes; default `127.0.0.1:9469`.
    pub metrics_address: SocketAddr,
    /// Unix socket of the control API; default `/run/forwarder/control.sock`.
    pub control_socket: PathBuf,
    /// Whose members may use it beside the agent's user; `None`: nobody.
    pub control_group: Option<String>,
    /// The same API for readers over TCP; `None`: not served.
    pub api: Option<RemoteApi>,
    /// Concurrent flows the tables hold; 1024 to 16 777 216, default 262 144. Fixed while the agent runs.
    pub max_flows: u32,
    /// Slots of all Maglev tables together, counted twice as a new table is built beside the old one;
    /// default 4 194 304.
    pub max_slots: u32,
    /// Clients of groups with persistence whose backend is kept; 1 to 16 777 216, default 65 536. Fixed while the agent
    /// runs.
    pub max_persistent_clients: u32,
    /// Directory of a BPF file system that holds maps and links, so that they outlive the agent; default
    /// `/sys/fs/bpf/forwarder`. Fixed while the agent runs.
    pub pin_directory: PathBuf,
    /// What remains when the agent is told to stop.
    pub on_stop: OnStop,
    /// Apply the file that the agent was started with whenever it changes; default false.
    pub reload_on_change: bool,
    /// Lower the segment size that TCP connections announce to what the interfaces they pass carry; default true.
    pub mss_clamp: bool,
}

/// Where the control API is read over TCP, and what readers have to show: a certificate, the token, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteApi {
    pub listen: SocketAddr,
    /// Holds the token that requests carry.
    pub token_file: Option<PathBuf>,
    /// `None`, which only a loopback address may have: not encrypted.
    pub tls: Option<RemoteTls>,
}

/// PEM files of the API over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Who has certified the clients; `None`: they need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// What remains when the agent is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnStop {
    /// Nothing: programs are detached, flows end.
    Detach,
    /// Everything: the data path goes on until another agent takes it over.
    Keep,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// Native where the driver can, else generic; the log says which.
    Auto,
    Native,
    Generic,
}

/// Whether frames may leave through an interface straight from XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// The agent tries it at start.
    Auto,
    On,
    /// Frames that leave here are rewritten in XDP and forwarded by the stack.
    Off,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub mode: XdpMode,
    pub redirect: Redirect,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub mode: TunnelMode,
    /// The device that the agent makes; `None`: the operator makes it.
    pub made: Option<MadeTunnel>,
    /// `None`: whether it carries packets is only seen by the backends behind it.
    pub health: Option<TunnelCheck>,
}

/// A tunnel device that the agent makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeTunnel {
    pub kind: MadeKind,
    pub remote: IpAddr,
    /// Of the family of `remote`; `None`: as the route says.
    pub local: Option<IpAddr>,
    /// VNI of VXLAN and Geneve, key of GRE.
    pub id: Option<u32>,
    /// UDP destination port, of kinds over UDP.
    pub port: Option<u16>,
    /// Zero: the inner packet's.
    pub ttl: u8,
    /// `None`: what the interface to `remote` leaves.
    pub mtu_bytes: Option<u32>,
}

/// Kinds of tunnels that the agent makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeKind {
    Vxlan,
    Geneve,
    Gre,
    Gretap,
    /// IP in IP.
    Ipip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelMode {
    /// Native if the device does nothing that XDP cannot do for it.
    Auto,
    /// XDP pushes and strips the outer headers on the interface that carries the tunnel.
    Native,
    /// The stack encapsulates; a tcx program on the device takes the replies.
    Kernel,
}

/// The back-to-origin addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnatPool {
    /// Prefixes as written, in order, not overlapping: those for traffic, then those for probes.
    pub prefixes: Vec<IpNet>,
    /// The addresses health probes leave from, one for each family that the pool has: each inside one of the
    /// prefixes for probes if there are any of its family, else of those for traffic. By default the first address of
    /// the first one that a host may have.
    pub probes: PerFamily,
    /// What traffic uses: runs of (first address, number of addresses), the prefixes for traffic without the probe
    /// addresses and without those that are not for hosts; of each family at most 8 runs. Of IPv6 only as many
    /// addresses as `max_flows` can use.
    pub ranges: Vec<(IpAddr, u32)>,
}

impl SnatPool {
    /// How many bindings there are: flows at a time with full NAT. A flow's number is its binding in the pool of
    /// either family, so the smaller one counts.
    pub fn bindings(&self) -> u64 {
        let [v4, v6] = [true, false].map(|is_v4| self.addresses(is_v4) * u64::from(PORTS_PER_ADDRESS));
        match (v4, v6) {
            (0, only) | (only, 0) => only,
            (v4, v6) => v4.min(v6),
        }
    }

    /// Addresses of a family for traffic.
    pub fn addresses(&self, is_v4: bool) -> u64 {
        let runs = self.ranges.iter().filter(|(first, _)| first.is_ipv4() == is_v4);
        runs.map(|(_, count)| u64::from(*count)).sum()
    }

    /// The prefixes of the family of `address`.
    pub fn prefixes_of(&self, address: IpAddr) -> Vec<IpNet> {
        let is_same = |prefix: &&IpNet| prefix.addr().is_ipv4() == address.is_ipv4();
        self.prefixes.iter().filter(is_same).copied().collect()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub cidrs: Vec<IpNet>,
    /// Name of the tunnel that leads there; `None`: reached without one.
    pub tunnel: Option<String>,
    /// Where its route is; `None`: wherever the host's own rules lead.
    pub table: Option<RoutingTable>,
}

/// A routing table besides the main one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoutingTable {
    /// By number, 1 to 4 294 967 295.
    Number(u32),
    /// That of a VRF device.
    Vrf(String),
}

/// Which addresses a rewritten request carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NatMode {
    Full,
    Dnat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub nat: NatMode,
    /// May backends be outside the networks that are reached without a tunnel?
    pub remote_ip: bool,
    pub selection: Selection,
    /// Do the flows of a client stay together?
    pub persistence: Option<Persistence>,
    /// What becomes of the flows of a backend that fails.
    pub on_unhealthy: OnUnhealthy,
    /// How long a backend that is new or healthy again takes to reach its whole share; up to 1 h, zero: no time.
    pub slow_start: Duration,
    /// A further tier helps when the weight of healthy backends is below this share of tier 0's, 0 to 100 %; at 0 only
    /// when there is none.
    pub min_healthy_percent: u8,
    /// Name of the group whose backends are its last tier; it has the same NAT mode, and there are no cycles.
    pub backup: Option<String>,
    /// `None`: backends are taken as healthy without asking.
    pub health: Option<HealthCheck>,
    /// `None`: what the data path counts ejects nobody.
    pub passive: Option<Passive>,
    /// By name; never empty.
    pub backends: BTreeMap<String, Backend>,
}

/// How a group picks a backend for a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// By the hash of the flow's 5-tuple, consistently: the default.
    Maglev,
    /// The same by the client's address alone.
    SourceIp,
    /// One after the other.
    RoundRobin,
    /// The one with the fewest flows for its weight.
    LeastConnections,
}

/// What becomes of the flows of a backend that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnhealthy {
    /// They stay on it until they end: the default.
    Keep,
    /// Both ends of TCP connections are reset; the next packet of a UDP flow opens one elsewhere.
    Reset,
    /// Those that another backend can serve go there: UDP, and TCP whose handshake has had no answer.
    Rehash,
}

/// A client's new flow goes where its last one went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Persistence {
    /// If that was opened less than this long ago; whole seconds, 1 s to 24 h.
    pub timeout: Duration,
    /// Clients are the same whose IPv4 addresses share so many leading bits, 1 to 32.
    pub prefix_bits_v4: u8,
    /// The same of IPv6, 1 to 128.
    pub prefix_bits_v6: u8,
}

/// When the data path's counters take a backend out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passive {
    /// By how many rejected flows outnumber accepted ones, 1 to 10 000; `None`: any number.
    pub rejected: Option<u32>,
    /// Flows without an answer, 1 to 10 000; `None`: any number.
    pub silent: Option<u32>,
    /// For how long they have been so, 100 ms to 60 s.
    pub silent_after: Duration,
    /// Is all traffic TCP, which answers every request? Else requests without an answer are no sign, and any packet
    /// back is an answer.
    pub counts_requests: bool,
    /// Share of the group's backends that may be out, 0 to 100; with more, nobody is ejected.
    pub max_ejected_percent: u8,
    /// How long a first ejection lasts, 1 s to 1 h; each in a row twice as long as the one before.
    pub ejection_time: Duration,
    /// The longest, `ejection_time` to 1 h.
    pub max_ejection_time: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub address: IpAddr,
    /// 1 to 65535; `None`: the one that the client asked for.
    pub port: Option<u16>,
    /// 0 (no new flows) to 65535.
    pub weight: u16,
    /// Most flows at a time; `None`: no limit of its own.
    pub max_flows: Option<u32>,
    /// 0, the nearest, to 3.
    pub tier: u8,
}

/// Most slots that a group's tables may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSizes {
    pub first: u32,
    /// Of the table behind that, for further tiers; 0: there are none.
    pub overflow: u32,
}

impl TableSizes {
    /// Of one group among all.
    pub fn of(group: &Group, groups: &BTreeMap<String, Group>) -> Self {
        let backup = group.backup.as_ref().and_then(|name| groups.get(name));
        let backups = backup.map_or(0, |backup| backup.backends.len());
        let farther = group.backends.values().filter(|backend| backend.tier > 0).count();
        Self {
            first: maglev::size_for(group.backends.len() + backups),
            overflow: match farther + backups {
                0 => 0,
                beyond => maglev::size_for(beyond),
            },
        }
    }

    /// Both together.
    pub fn sum(self) -> u32 {
        self.first + self.overflow
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
    /// Echo of ICMP and ICMPv6.
    Icmp,
}

impl Protocol {
    /// All there are, by their names.
    pub const ALL: [(&'static str, Self); 4] = [
        ("tcp", Self::Tcp),
        ("udp", Self::Udp),
        ("sctp", Self::Sctp),
        ("icmp", Self::Icmp),
    ];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Icmp => "icmp",
        }
    }

    /// Its number in the keys of listeners and flows, of both families.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
            Self::Sctp => PROTOCOL_SCTP,
            Self::Icmp => PROTOCOL_ICMP,
        }
    }

    /// Reverse of [`Self::number`]; `None` for a number that no flow has.
    pub fn of_number(number: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .map(|(_, protocol)| protocol)
            .find(|protocol| u32::from(protocol.number()) == number)
    }

    /// Has it connections, which begin and end?
    pub fn has_connections(self) -> bool {
        has_connections(self.number().into())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// 1 to 16 addresses, of either family; never one twice.
    pub vips: Vec<IpAddr>,
    pub ports: Ports,
    pub protocol: Protocol,
    /// Name of its backend group.
    pub group: String,
    /// Clients that may open flows; `None`: all. Not overlapping, no IPv4-mapped addresses.
    pub sources: Option<Vec<IpNet>>,
    /// Most flows at a time; `None`: no limit of its own.
    pub max_flows: Option<u32>,
    /// A flow without packets for this long is removed; 10 s to 4000 s, default 300 s, of ICMP 60 s.
    pub idle_timeout: Duration,
    /// The same once one side of a connection has ended; 10 s to 4000 s, default that of `idle_timeout`.
    pub closing_timeout: Duration,
    /// The same while the handshake of a connection is not complete; 5 s to 300 s, default 75 s.
    pub half_open_timeout: Duration,
    /// Are both ends of a connection reset when it is removed for being idle?
    pub reset_on_idle: bool,
    /// When SYNs are answered with cookies; `None`: never, the default.
    pub syn_cookies: Option<SynCookies>,
    /// How fast clients open flows; `None`: as fast as they like.
    pub source_rate: Option<SourceRate>,
}

/// When SYNs of a listener are answered with cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynCookies {
    Always,
    /// Those beyond so many in a second.
    Above(u32),
}

impl fmt::Display for SynCookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("always"),
            Self::Above(flows_per_second) => flows_per_second.fmt(f),
        }
    }
}

/// How fast the clients of one prefix may open flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRate {
    pub flows_per_second: u32,
    /// Most flows at once, after a while without any; no less than a second's.
    pub burst: u32,
    /// 1 to 32.
    pub prefix_bits_v4: u8,
    /// 1 to 128.
    pub prefix_bits_v6: u8,
}

/// The ports of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// 1 to 65535; 0 of [`Self::NONE`].
    pub first: u16,
    /// `first` to 65535.
    pub last: u16,
}

impl Ports {
    /// Every port there is.
    pub const ANY: Self = Self {
        first: 1,
        last: u16::MAX,
    };

    /// For ICMP, which has none.
    pub const NONE: Self = Self { first: 0, last: 0 };

    /// One port.
    pub const fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// The port, if it is one; 0 if there is none.
    pub fn single(self) -> Option<u16> {
        (self.first == self.last).then_some(self.first)
    }

    /// Do they have a port in common?
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The fewest prefixes (value, bits) that cover these ports and no other.
    pub fn prefixes(self) -> Vec<(u16, u32)> {
        // All ports: zero, which no packet has, makes it one prefix.
        let mut next = if self == Self::ANY {
            0
        } else {
            u32::from(self.first)
        };
        let last = u32::from(self.last);
        let mut prefixes = Vec::new();
        while next <= last {
            let mut free_bits = next.trailing_zeros().min(16);
            while next + (1 << free_bits) - 1 > last {
                free_bits -= 1;
            }
            prefixes.push((next as u16, 16 - free_bits));
            next += 1 << free_bits;
        }
        prefixes
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.single() {
            _ if *self == Self::NONE => Ok(()),
            Some(port) => write!(f, "{port}"),
            None if *self == Self::ANY => f.write_str("any"),
            None => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_prefixes_of_ports_cover_them_and_no_other(a in 1_u16.., b in 1_u16.., port in 1_u16..) {
            let ports = Ports { first: a.min(b), last: a.max(b) };
            let prefixes = ports.prefixes();
            let covering = prefixes.iter().filter(|(value, bits)| (port ^ value).checked_shr(16 - bits).unwrap_or(0) == 0);
            prop_assert_eq!(covering.count(), usize::from((ports.first..=ports.last).contains(&port)));
            prop_assert!(prefixes.len() <= 30);
        }
    }

    #[test]
    fn any_port_is_one_prefix() {
        assert_eq!(Ports::ANY.prefixes(), [(0, 0)]);
        assert_eq!(
            Ports {
                first: 8000,
                last: 8099
            }
            .to_string(),
            "8000-8099"
        );
    }
}
