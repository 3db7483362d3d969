//! What is known of the host and of each path. Only data, so that every check is a pure function of it.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;

use crate::{
    config::Config,
    diagnose::Diagnosis,
    health::ProbeFailure,
    network::{Interface, Offloads, Policy, Queues, Route, RouteError, RpFilter},
    status::Status,
};

/// Everything.
#[derive(Clone, Debug)]
pub struct Facts {
    pub file: PathBuf,
    /// Without the groups and listeners that were not asked about.
    pub config: Config,
    pub host: Host,
    /// All interfaces of the host.
    pub devices: Vec<Device>,
    /// Routing rules and tables, as written down.
    pub policy: Policy,
    /// Numbers of the routing tables that networks of the configuration have of their own, by the network's name.
    pub tables: BTreeMap<String, u32>,
    /// For each VIP: the link address of another host that answers for it, by ARP or neighbour discovery.
    pub vips: BTreeMap<IpAddr, Option<[u8; 6]>>,
    pub backends: Vec<Backend>,
}

/// The host itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// Its first two numbers.
    pub kernel_version: (u32, u32),
    /// Cores that packets can be spread over.
    pub cores: u32,
    pub forwards: bool,
    /// The same of IPv6.
    pub forwards_v6: bool,
    /// Programs are compiled to machine code; `None`: the kernel does not say, as it always does.
    pub has_jit: Option<bool>,
    /// A route leads to the SNAT pool: loose source validation lets it pass.
    pub is_pool_routed: bool,
    pub agent: Option<Status>,
}

/// An interface. What costs a question each is known of those in the configuration only.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub link: Interface,
    pub addresses: Vec<IpNet>,
    pub rp_filter: Option<RpFilter>,
    pub forwards: Option<bool>,
    /// The same of IPv6; `None` also where the interface has none.
    pub forwards_v6: Option<bool>,
    pub offloads: Option<Offloads>,
    pub queues: Option<Queues>,
    /// The driver runs XDP programs.
    pub runs_programs: Option<bool>,
    /// The driver takes frames by redirect.
    pub takes_redirects: Option<bool>,
    /// For a tunnel with one far end: the interface that carries its packets, and that one's MTU in bytes.
    pub underlay: Option<(String, u32)>,
    /// For a VRF device: its routing table.
    pub vrf_table: Option<u32>,
}

/// A backend and the way to it.
#[derive(Clone, Debug)]
pub struct Backend {
    pub group: String,
    pub name: String,
    pub address: IpAddr,
    /// `None`: the one that the client asked for.
    pub port: Option<u16>,
    /// Where it was asked; `None`: it serves no TCP, so an echo request was sent instead.
    pub probed_port: Option<u16>,
    /// For packets from the probe address.
    pub route: Result<Route, RouteError>,
    /// Interfaces of the configuration that packets from the pool come in by and are not forwarded the same way:
    /// where they leave instead; `None`: nowhere.
    pub astray: Vec<(String, Option<String>)>,
    /// Name of the interface that route leaves by.
    pub egress: Option<String>,
    /// One per prefix of the SNAT pool that can be asked from; the probe address's comes first.
    pub attempts: Vec<Attempt>,
    /// Ports of this configuration that it does answer on, asked if it refuses the probed one.
    pub open_ports: Vec<u16>,
    /// What the path carries, if that is less than the interface it leaves by.
    pub narrow: Option<Narrow>,
}

/// One probe.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub prefix: IpNet,
    pub source: IpAddr,
    pub outcome: Result<Duration, ProbeFailure>,
    /// Why it failed; `None`: it did not, or there were too many to find out.
    pub diagnosis: Option<Diagnosis>,
}

/// The network that holds an address, as the configuration has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote<'a> {
    pub name: &'a str,
    pub cidr: IpNet,
    pub tunnel: Option<&'a str>,
    /// Number of the routing table of its own.
    pub table: Option<u32>,
}

/// A path that loses large packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// The MTU of the interface it leaves by, in bytes.
    pub mtu_bytes: u32,
    /// The largest packet that was answered, in bytes.
    pub carried_bytes: u32,
}

impl Facts {
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.link.name == name)
    }

    pub fn device_by_index(&self, index: u32) -> Option<&Device> {
        self.devices.iter().find(|device| device.link.index == index)
    }

    /// Whether packets that come in by the interface pass the data path.
    pub fn is_attached(&self, name: &str) -> bool {
        self.config.interfaces.contains_key(name) || self.config.tunnels.contains_key(name)
    }

    /// The network that holds an address.
    pub fn network_of(&self, address: IpAddr) -> Option<Remote<'_>> {
        self.config.networks.iter().find_map(|(name, network)| {
            let cidr = network.cidrs.iter().find(|cidr| cidr.contains(&address))?;
            Some(Remote {
                name,
                cidr: cidr.trunc(),
                tunnel: network.tunnel.as_deref(),
                table: self.tables.get(name).copied(),
            })
        })
    }
}

impl Backend {
    /// As findings name it.
    pub fn label(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// Whom its packets are handed to on the link.
    pub fn next_hop(&self) -> Option<IpAddr> {
        self.route.as_ref().ok().map(|route| route.next_hop(self.address))
    }
}
