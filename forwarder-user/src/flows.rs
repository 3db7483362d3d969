//! Live flows for people: listed, filtered, counted, from the flow table while it is in use.
//!
//! The names of [`FlowStatus`]' fields are the names in the JSON, which scripts rely on: add some, but rename none.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use forwarder_common::{
    abi::{
        backend::BackendId,
        flow::{FlowBinding, FlowEntry, FlowId, FlowState},
        listener::ListenerId,
    },
    datapath::tcp_state::{Phase, has_connections},
    wire::{Be16, IpAddress},
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{
    config::Protocol,
    datapath::{memory::FlowMemory, times::FlowTimes},
    error::Error,
    state::names::Names,
};

/// Flows listed unless more are asked for.
pub const DEFAULT_LIMIT: usize = 1000;
/// A UDP flow without packets for longer than this many seconds counts as idle.
const ACTIVE_SECS: u32 = 5;

/// One flow. Bytes are IP bytes; "in" is from the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowStatus {
    /// `tcp`, `udp`, `sctp` or `icmp`, whose identifier stands for the client's port.
    pub protocol: String,
    #[schema(value_type = String)]
    pub client: SocketAddr,
    #[schema(value_type = String)]
    pub vip: SocketAddr,
    pub listener: String,
    pub group: String,
    pub backend: String,
    #[schema(value_type = String)]
    pub backend_address: SocketAddr,
    /// What the backend sees as its client.
    #[schema(value_type = String)]
    pub binding: SocketAddr,
    pub state: FlowPhase,
    /// Since the agent saw it first, which is less than its age if the agent was restarted; none for a flow of the
    /// last second.
    pub age_secs: Option<u32>,
    /// Since its last packet, either way.
    pub idle_secs: u32,
    pub packets_in: u32,
    pub bytes_in: u64,
    pub packets_out: u32,
    pub bytes_out: u64,
}

/// Where a flow stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlowPhase {
    /// TCP, SCTP: the handshake is not complete.
    HalfOpen,
    Established,
    /// TCP, SCTP: one side has ended.
    Closing,
    /// TCP, SCTP: both sides have ended, or one broke off.
    Closed,
    /// UDP, ICMP: carried a packet in the last seconds.
    Active,
    /// UDP, ICMP: carried none.
    Idle,
}

impl FlowPhase {
    /// All there are, by name.
    pub const ALL: [(&'static str, Self); 6] = [
        ("half_open", Self::HalfOpen),
        ("established", Self::Established),
        ("closing", Self::Closing),
        ("closed", Self::Closed),
        ("active", Self::Active),
        ("idle", Self::Idle),
    ];

    fn of(entry: &FlowEntry, idle_secs: u32) -> Self {
        if !has_connections(entry.binding.protocol) {
            return if idle_secs <= ACTIVE_SECS {
                Self::Active
            } else {
                Self::Idle
            };
        }
        match entry.tcp.phase() {
            Phase::HalfOpen => Self::HalfOpen,
            Phase::Established => Self::Established,
            Phase::Closing => Self::Closing,
            Phase::Closed => Self::Closed,
        }
    }
}

impl fmt::Display for FlowPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Self::ALL.iter().find(|(_, phase)| phase == self);
        f.write_str(found.map_or("", |(name, _)| name))
    }
}

impl FromStr for FlowPhase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, phase)| *phase).ok_or_else(|| {
            let names = Self::ALL.map(|(name, _)| name).join(", ");
            format!("\"{text}\" is no state of a flow; there are: {names}")
        })
    }
}

/// Addresses and ports that a filter lets through: `ADDRESS`, `ADDRESS/LENGTH`, either with `:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoints {
    addresses: IpNet,
    /// `None`: any.
    port: Option<u16>,
}

impl Endpoints {
    fn has(&self, address: IpAddress, port: Be16) -> bool {
        self.addresses.contains(&address.to_std()) && self.port.is_none_or(|wanted| wanted == port.get())
    }
}

impl FromStr for Endpoints {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "\"{text}\" is not ADDRESS, ADDRESS/LENGTH or one of them with :PORT, such as 192.0.2.0/24:443 or \
                 [2001:db8::/32]:443"
            )
        };
        // An IPv6 address has colons of its own, so with a port it stands in brackets (RFC 3986 §3.2.2).
        let (addresses, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((addresses, "")) => (addresses, None),
            Some((addresses, rest)) => (addresses, Some(rest.strip_prefix(':').ok_or_else(wrong)?)),
            None if text.matches(':').count() > 1 => (text, None),
            None => match text.split_once(':') {
                Some((addresses, port)) => (addresses, Some(port)),
                None => (text, None),
            },
        };
        let addresses = if addresses.contains('/') {
            addresses.parse().map_err(|_| wrong())?
        } else {
            IpNet::from(addresses.parse::<IpAddr>().map_err(|_| wrong())?)
        };
        let port = port.map(str::parse).transpose().map_err(|_| wrong())?;
        Ok(Self { addresses, port })
    }
}

impl TryFrom<String> for Endpoints {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Endpoints> for String {
    fn from(endpoints: Endpoints) -> Self {
        endpoints.to_string()
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = if self.addresses.prefix_len() == self.addresses.max_prefix_len() {
            self.addresses.addr().to_string()
        } else {
            self.addresses.to_string()
        };
        match (self.port, self.addresses) {
            (Some(port), IpNet::V6(_)) => write!(f, "[{addresses}]:{port}"),
            (Some(port), IpNet::V4(_)) => write!(f, "{addresses}:{port}"),
            (None, _) => f.write_str(&addresses),
        }
    }
}

/// Which flows are meant; what is absent, lets all through. The query of `/v1/flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct FlowQuery {
    /// `ADDRESS`, `ADDRESS/LENGTH`, either with `:PORT`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub client: Option<Endpoints>,
    /// As `client`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub vip: Option<Endpoints>,
    /// A backend's name, `GROUP/NAME`, or its address as in `client`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listener: Option<String>,
    /// `tcp`, `udp`, `sctp` or `icmp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<FlowPhase>,
    /// Most flows to list; 0: none, they are only counted. Default 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// To delete: all flows, as no filter is given.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

impl FlowQuery {
    /// Does it leave any flow out?
    #[must_use]
    pub fn filters(&self) -> bool {
        *self
            != Self {
                limit: self.limit,
                all: self.all,
                ..Self::default()
            }
    }
}

/// Flows that a query lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowList {
    /// How many there are, listed or not.
    pub matching: u64,
    pub flows: Vec<FlowStatus>,
}

/// What a deletion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    pub deleted: u64,
}

/// A query whose names have been looked up.
struct Filter {
    client: Option<Endpoints>,
    vip: Option<Endpoints>,
    backend: Option<WantedBackend>,
    listener: Option<ListenerId>,
    protocol: Option<u32>,
    state: Option<FlowPhase>,
}

enum WantedBackend {
    At(Endpoints),
    Named(Vec<BackendId>),
}

impl Filter {
    fn of(query: &FlowQuery, names: &Names) -> Result<Self, Error> {
        let listener = match &query.listener {
            Some(name) => Some(names.listener_id(name).ok_or_else(|| {
                Error::usage(format!("there is no listener \"{name}\""))
                    .hint(format!("listeners: {}", names.listener_names().join(", ")))
            })?),
            None => None,
        };
        let backend = match &query.backend {
            Some(text) => Some(match text.parse() {
                Ok(endpoints) => WantedBackend::At(endpoints),
                Err(_) => WantedBackend::Named(named_backends(text, names)?),
            }),
            None => None,
        };
        let protocol = match query.protocol.as_deref() {
            Some(wanted) => {
                let found = Protocol::ALL.iter().find(|(name, _)| *name == wanted);
                let (_, protocol) = found.ok_or_else(|| {
                    Error::usage(format!("\"{wanted}\" is no protocol of flows"))
                        .hint("tcp, udp, sctp or icmp")
                })?;
                Some(u32::from(protocol.number()))
            }
            None => None,
        };
        Ok(Self {
            client: query.client,
            vip: query.vip,
            backend,
            listener,
            protocol,
            state: query.state,
        })
    }

    fn lets_through(&self, entry: &FlowEntry, idle_secs: u32) -> bool {
        let binding = &entry.binding;
        let is_backend = match &self.backend {
            Some(WantedBackend::At(endpoints)) => endpoints.has(binding.backend, binding.backend_port),
            Some(WantedBackend::Named(ids)) => ids.contains(&entry.backend),
            None => true,
        };
        is_backend
            && self
                .client
                .is_none_or(|wanted| wanted.has(binding.client, binding.client_port))
            && self
                .vip
                .is_none_or(|wanted| wanted.has(binding.vip, binding.vip_port))
            && self.listener.is_none_or(|wanted| wanted == entry.listener)
            && self.protocol.is_none_or(|wanted| wanted == binding.protocol)
            && self
                .state
                .is_none_or(|wanted| wanted == FlowPhase::of(entry, idle_secs))
    }
}

fn named_backends(text: &str, names: &Names) -> Result<Vec<BackendId>, Error> {
    let ids = match text.split_once('/') {
        Some((group, name)) => names.backend_ids(Some(group), name),
        None => names.backend_ids(None, text),
    };
    if ids.is_empty() {
        return Err(Error::usage(format!("there is no backend \"{text}\""))
            .hint("give a name, GROUP/NAME or an address; `forwarder status` shows them"));
    }
    Ok(ids)
}

/// The flow table as it can be read at any time.
#[derive(Clone, Copy)]
pub struct FlowTable<'a> {
    pub memory: &'a FlowMemory,
    pub times: &'a FlowTimes,
    pub names: &'a Names,
}

impl FlowTable<'_> {
    /// Calls `visit` with every flow that the query lets through.
    fn each(&self, query: &FlowQuery, mut visit: impl FnMut(FlowId, &FlowEntry)) -> Result<(), Error> {
        let filter = Filter::of(query, self.names)?;
        for id in (0..self.memory.capacity()).map(FlowId) {
            if self.memory.state(id) != FlowState::LIVE {
                continue;
            }
            let entry = self.memory.read(id);
            if filter.lets_through(&entry, self.times.idle_secs(id)) {
                visit(id, &entry);
            }
        }
        Ok(())
    }

    /// The flows that a query lets through.
    ///
    /// # Errors
    /// It names something that does not exist.
    pub fn list(&self, query: &FlowQuery) -> Result<FlowList, Error> {
        let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
        let mut list = FlowList::default();
        self.each(query, |id, entry| {
            list.matching += 1;
            if list.flows.len() < limit {
                list.flows.push(self.status(id, entry));
            }
        })?;
        Ok(list)
    }

    /// Numbers and bindings of the flows that a query lets through.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn bindings(&self, query: &FlowQuery) -> Result<Vec<(FlowId, FlowBinding)>, Error> {
        let mut found = Vec::new();
        self.each(query, |id, entry| found.push((id, entry.binding)))?;
        Ok(found)
    }

    /// One flow for people.
    pub fn status(&self, id: FlowId, entry: &FlowEntry) -> FlowStatus {
        let binding = &entry.binding;
        let at = |address: IpAddress, port: Be16| SocketAddr::new(address.to_std(), port.get());
        let backend = self.names.backend(entry.backend);
        let idle_secs = self.times.idle_secs(id);
        FlowStatus {
            protocol: Protocol::of_number(binding.protocol).map_or_else(
                || binding.protocol.to_string(),
                |protocol| protocol.name().to_owned(),
            ),
            client: at(binding.client, binding.client_port),
            vip: at(binding.vip, binding.vip_port),
            listener: self.names.listener(entry.listener),
            group: backend.group,
            backend: backend.name,
            backend_address: at(binding.backend, binding.backend_port),
            binding: at(binding.snat, binding.snat_port),
            state: FlowPhase::of(entry, idle_secs),
            age_secs: self.times.age_secs(id),
            idle_secs,
            packets_in: entry.request_packets,
            bytes_in: entry.request_bytes,
            packets_out: entry.reply_packets,
            bytes_out: entry.reply_bytes,
        }
    }
}

#[cfg(test)]
mod tests {

    use bytemuck::Zeroable as _;
    use forwarder_common::abi::flow::TcpEvents;

    use super::*;

    fn entry() -> FlowEntry {
        let mut entry = FlowEntry::zeroed();
        entry.state = FlowState::LIVE;
        entry.binding.protocol = Protocol::Tcp.number().into();
        entry.binding.client = IpAddr::from([192, 0, 2, 7]).into();
        entry.binding.client_port = Be16::new(51000);
        entry.binding.backend = IpAddr::from([10, 20, 0, 5]).into();
        entry.binding.backend_port = Be16::new(8443);
        entry.tcp = TcpEvents::OPENED;
        entry
    }

    fn lets_through(change: impl Fn(&mut FlowQuery)) -> bool {
        let mut query = FlowQuery::default();
        change(&mut query);
        Filter::of(&query, &Names::default())
            .unwrap()
            .lets_through(&entry(), 0)
    }

    #[test]
    fn endpoints_are_read_and_written() {
        for text in [
            "192.0.2.7",
            "192.0.2.0/24",
            "192.0.2.7:51000",
            "192.0.2.0/24:443",
            "2001:db8::7",
            "2001:db8::/32",
            "[2001:db8::7]:51000",
            "[2001:db8::/32]:443",
        ] {
            assert_eq!(text.parse::<Endpoints>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "web",
            "192.0.2.7:",
            "192.0.2.7:70000",
            "192.0.2.0/33",
            "[::1",
            "::1]:80",
            "[::1]80",
        ] {
            assert!(text.parse::<Endpoints>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_filter_lets_its_flows_through_and_no_others() {
        assert!(lets_through(|_| ()));
        for (text, expected) in [
            ("192.0.2.7", true),
            ("192.0.2.0/24:51000", true),
            ("192.0.2.7:51001", false),
            ("192.0.3.0/24", false),
        ] {
            let client = lets_through(|query| query.client = Some(text.parse().unwrap()));
            assert_eq!(client, expected, "{text}");
        }
        assert!(lets_through(
            |query| query.backend = Some("10.20.0.5:8443".to_owned())
        ));
        assert!(!lets_through(|query| query.backend = Some("10.20.0.6".to_owned())));
        assert!(lets_through(|query| query.protocol = Some("tcp".to_owned())));
        assert!(!lets_through(|query| query.protocol = Some("udp".to_owned())));
        assert!(lets_through(|query| query.state = Some(FlowPhase::HalfOpen)));
        assert!(!lets_through(|query| query.state = Some(FlowPhase::Closed)));
    }

    #[test]
    fn a_name_that_nothing_has_is_an_error() {
        let query = FlowQuery {
            listener: Some("wbe".to_owned()),
            ..FlowQuery::default()
        };
        let error = Filter::of(&query, &Names::default()).err().unwrap();
        assert_eq!(error.what, "there is no listener \"wbe\"");
    }

    #[test]
    fn a_query_survives_the_way_through_a_url() {
        let query = FlowQuery {
            client: Some("192.0.2.0/24:443".parse().unwrap()),
            state: Some(FlowPhase::HalfOpen),
            limit: Some(3),
            ..FlowQuery::default()
        };
        let text = serde_urlencoded::to_string(&query).unwrap();
        assert_eq!(serde_urlencoded::from_str::<FlowQuery>(&text).unwrap(), query);
        assert!(query.filters());
        let unfiltered = FlowQuery {
            limit: Some(3),
            all: true,
            ..FlowQuery::default()
        };
        assert!(!unfiltered.filters());
    }
}
