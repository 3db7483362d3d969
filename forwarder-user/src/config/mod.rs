//! The configuration: what the operator wrote, checked and complete.
//!
//! `load` reads a file into `schema` (values with their places, by way of `reader`), `validate` turns that
//! into the [`Config`] below or into *all* errors at once. Whoever holds a [`Config`] holds one that can be applied:
//! every name resolves, every default is filled in, no address is out of range. This module does no I/O
//! beyond reading the file and knows nothing of maps.

use std::{collections::BTreeMap, net::Ipv4Addr, net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;

pub mod load;
pub mod reader;
pub mod schema;
pub mod validate;

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

/// What concerns the agent itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Where Prometheus scrapes; default `127.0.0.1:9469`.
    pub metrics_address: SocketAddr,
    /// Unix socket of the control API; default `/run/forwarder/control.sock`.
    pub control_socket: PathBuf,
    /// Concurrent flows the tables hold; 1024 to 16 777 216, default 262 144. Fixed while the agent runs.
    pub max_flows: u32,
    /// Slots of all Maglev tables together, counted twice as a new table is built beside the old one;
    /// default 4 194 304.
    pub max_slots: u32,
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelMode {
    /// The stack encapsulates; a tcx program on the device takes the replies.
    Kernel,
}

/// The back-to-origin addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnatPool {
    /// Prefixes as written, in order, not overlapping; 1 to 8 of them.
    pub prefixes: Vec<Ipv4Net>,
    /// The address health probes leave from; inside one of `prefixes`, by default the first address of the
    /// first prefix (its network address where the prefix is shorter than /31 is skipped).
    pub probe_address: Ipv4Addr,
    /// What traffic uses: runs of (first address, number of addresses), `prefixes` without the probe
    /// address and without network and broadcast addresses of prefixes shorter than /31; 1 to 8 runs.
    pub ranges: Vec<(Ipv4Addr, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub cidrs: Vec<Ipv4Net>,
    /// Name of the tunnel that leads there; `None`: reached without one.
    pub tunnel: Option<String>,
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
    /// `None`: backends are taken as healthy without asking.
    pub health: Option<HealthCheck>,
    /// By name; never empty.
    pub backends: BTreeMap<String, Backend>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub address: Ipv4Addr,
    /// 1 to 65535.
    pub port: u16,
    /// 0 (no new flows) to 65535.
    pub weight: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: Probe,
    /// 100 ms to 300 s.
    pub interval: Duration,
    /// 50 ms to 300 s.
    pub timeout: Duration,
    /// Successes in a row that make an unhealthy backend healthy, 1 to 10.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy, 1 to 10.
    pub fall: u32,
    /// Port to probe; `None`: the backend's own.
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A TCP handshake.
    Tcp,
    /// An HTTP/1.1 GET whose status must be one of `expect`.
    Http {
        path: String,
        host: Option<String>,
        expect: Vec<StatusRange>,
    },
}

/// Inclusive range of HTTP status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRange {
    pub first: u16,
    pub last: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub vip: Ipv4Addr,
    /// 1 to 65535.
    pub port: u16,
    pub protocol: Protocol,
    /// Name of its backend group.
    pub group: String,
    /// A flow without packets for this long is removed; 10 s to 4000 s, default 300 s.
    pub idle_timeout: Duration,
}
