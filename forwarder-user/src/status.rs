//! What the agent knows about itself and the data path, as one value.
//!
//! The agent makes a [`Status`] when asked; `forwarder status` draws it, `-o json` prints it, and
//! the Prometheus text is derived from it. So all of them agree.
//!
//! The names of its fields are the names in the JSON, which scripts rely on: add some, but rename none.
//! tests/golden/status/sample.json shows them all. Real numbers must be finite, as JSON knows no others.

use std::net::IpAddr;

use crate::{config::address::at_port, histogram::Histogram};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Everything there is to show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    pub uptime_secs: u64,
    /// The agent's own work.
    #[serde(default)]
    pub agent: AgentStatus,
    pub interfaces: Vec<InterfaceStatus>,
    pub tunnels: Vec<TunnelStatus>,
    pub listeners: Vec<ListenerStatus>,
    pub groups: Vec<GroupStatus>,
    /// Backends that have left the configuration and whose last flows go on.
    pub leaving_backends: Vec<LeavingStatus>,
    pub pool: PoolStatus,
    /// By number of the reason, all of them, also those that never occurred.
    pub reasons: Vec<ReasonStatus>,
    /// Things an operator should look at, one sentence each: missing sysctls, a VIP without route, …
    pub warnings: Vec<String>,
}

/// How long the agent's own work takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentStatus {
    /// Turns of its loop, by what it woke up for; always all of them, in the same order.
    pub turns: Vec<TurnStatus>,
    pub changes: ChangesStatus,
}

/// Turns of the agent's loop: while one lasts, nothing else of the agent moves, though packets do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TurnStatus {
    /// What it woke up for, such as `tick`, `probe` or `request`.
    pub event: String,
    pub times: Histogram,
}

/// Configurations that were to replace the running one: by `forwarder apply`, or by SIGHUP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangesStatus {
    /// Those that were taken over: the time from their arrival until they were in force as a whole.
    pub times: Histogram,
    /// Those that were not: they changed nothing.
    pub refused: u64,
}

/// Probes of a group's backends, or of a tunnel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProbesStatus {
    /// Those that passed: the time until the answer.
    pub times: Histogram,
    /// Those that failed; one without an answer has taken its whole timeout.
    pub failed: u64,
}

/// An interface the data path is attached to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InterfaceStatus {
    pub name: String,
    /// `xdp-native`, `xdp-generic` or `tcx`.
    pub attachment: String,
    /// Do frames leave through it straight from XDP?
    pub sends: bool,
    pub is_up: bool,
}

/// A tunnel, and whether it carries packets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TunnelStatus {
    pub name: String,
    /// `native`: XDP pushes and strips the outer headers; `kernel`: the kernel's device does.
    pub mode: String,
    /// Why it is in kernel mode though the configuration leaves the choice; none otherwise.
    pub why_kernel: Option<String>,
    /// Its device.
    pub is_up: bool,
    /// The address of the far side that is probed; none without a check.
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// `healthy`, `unhealthy`, `unknown` before the first probe, or `unchecked`.
    pub health: String,
    /// Backends that are unhealthy because it is.
    pub backends_held: usize,
    /// None without a check.
    #[serde(default)]
    pub probes: Option<ProbesStatus>,
    /// Why the last probe failed; none if it passed.
    pub failure: Option<String>,
    pub diagnosis: Option<DiagnosisStatus>,
}

/// Counters since the agent's start, and rates over the last second or so. Bytes are IP bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Traffic {
    pub connections_opened: u64,
    /// New connections refused: no backend, no binding, no room.
    pub connections_refused: u64,
    /// Connections whose backend answered, and not with a TCP reset.
    pub connections_answered: u64,
    /// Connections that their backend rejected with a TCP reset. What is opened, and neither answered nor rejected, has
    /// had no answer.
    pub connections_rejected: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
    /// TCP resets from clients.
    pub client_resets: u64,
    /// TCP resets from backends.
    pub backend_resets: u64,
    /// Answers of the gateway's own: to connections it refused, and to idle ones it ended.
    pub gateway_resets: u64,
    /// Flows in the table now: active and inactive.
    pub flows: u64,
    /// Flows that carried a packet in the last sweep or whose TCP connection is established.
    pub active_flows: u64,
    /// Flows in the table that are not active: half open, closing, closed.
    pub inactive_flows: u64,
    pub rates: Rates,
}

impl Traffic {
    /// Adds another's counters and rates.
    pub fn add(&mut self, other: &Self) {
        self.connections_opened += other.connections_opened;
        self.connections_refused += other.connections_refused;
        self.connections_answered += other.connections_answered;
        self.connections_rejected += other.connections_rejected;
        self.packets_in += other.packets_in;
        self.bytes_in += other.bytes_in;
        self.packets_out += other.packets_out;
        self.bytes_out += other.bytes_out;
        self.client_resets += other.client_resets;
        self.backend_resets += other.backend_resets;
        self.gateway_resets += other.gateway_resets;
        self.flows += other.flows;
        self.active_flows += other.active_flows;
        self.inactive_flows += other.inactive_flows;
        self.rates.connections += other.rates.connections;
        self.rates.packets_in += other.rates.packets_in;
        self.rates.bytes_in += other.rates.bytes_in;
        self.rates.packets_out += other.rates.packets_out;
        self.rates.bytes_out += other.rates.bytes_out;
    }
}

/// Per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    pub connections: f64,
    pub packets_in: f64,
    pub bytes_in: f64,
    pub packets_out: f64,
    pub bytes_out: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ListenerStatus {
    pub name: String,
    /// The first of `vips`.
    #[schema(value_type = String)]
    pub vip: IpAddr,
    /// The addresses it listens on, of either family.
    #[schema(value_type = Vec<String>)]
    pub vips: Vec<IpAddr>,
    /// `80`, `8000-8099` or `any`.
    pub port: String,
    /// `tcp`, `udp`, `sctp` or `icmp`.
    pub protocol: String,
    pub group: String,
    /// Flows that it may have at a time; none: as many as the table has room for.
    #[serde(default)]
    pub max_flows: Option<u32>,
    /// When it answers SYNs with cookies: `always`, or beyond so many flows per second (`2000`); none: never.
    #[serde(default)]
    pub syn_cookies: Option<String>,
    /// New flows that one prefix of clients may open per second; none: as many as it likes.
    #[serde(default)]
    pub source_rate: Option<u32>,
    /// SYNs that were answered with a cookie.
    #[serde(default)]
    pub cookies_sent: u64,
    /// The same per second, of late. More than none is a flood, or a limit that is too low, unless it is always so.
    #[serde(default)]
    pub cookies_sent_rate: f64,
    /// Connections that were opened by a cookie that came back.
    #[serde(default)]
    pub cookies_accepted: u64,
    /// Acknowledgments without a connection, and without a cookie of ours, while cookies were sent.
    #[serde(default)]
    pub cookies_invalid: u64,
    /// New flows dropped, as they came faster from one prefix than `source_rate` lets them.
    #[serde(default)]
    pub flows_limited: u64,
    #[serde(flatten)]
    pub traffic: Traffic,
}

impl ListenerStatus {
    /// Are there more new connections than it opens without cookies?
    #[must_use]
    pub fn is_flooded(&self) -> bool {
        self.cookies_sent_rate > 0.0 && self.syn_cookies.as_deref() != Some("always")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupStatus {
    pub name: String,
    /// `full` or `dnat`.
    pub nat: String,
    pub healthy_backends: usize,
    pub unhealthy_backends: usize,
    /// Healthy as far as active checks know, and ejected by passive ones.
    pub ejected_backends: usize,
    /// None without a check.
    #[serde(default)]
    pub probes: Option<ProbesStatus>,
    /// Sum over its backends.
    #[serde(flatten)]
    pub traffic: Traffic,
    pub backends: Vec<BackendStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackendStatus {
    pub name: String,
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// None: the one that the client asked for.
    pub port: Option<u16>,
    /// The tunnel that it is behind; none: it is reached without one.
    #[serde(default)]
    pub tunnel: Option<String>,
    /// As configured.
    pub weight: u16,
    /// The weight that holds in its place, by an operator's order.
    pub ordered_weight: Option<u16>,
    /// Flows that it may have at a time; none: as many as the table has room for.
    #[serde(default)]
    pub max_flows: Option<u32>,
    /// `healthy`, `unhealthy`, `unknown` before the first probe, or `ejected`: healthy as far as active checks know, but
    /// passive ones took it out.
    pub health: String,
    /// Share of the group's slots, 0 to 1.
    pub share: f64,
    /// It takes no new flows, whatever its health is.
    pub drain: Option<DrainStatus>,
    pub flows_ended: FlowsEnded,
    /// How much of its weight it has while it starts slowly, in percent; none: all.
    pub slow_start_percent: Option<u32>,
    /// Why the last probe failed; none if it passed.
    pub failure: Option<String>,
    pub diagnosis: Option<DiagnosisStatus>,
    /// Why passive checks took it out; none if they did not.
    pub ejection: Option<EjectionStatus>,
    pub ejections: Ejections,
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// How far a backend is that takes no new flows while those it has finish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainStatus {
    /// `order`, or `weight` where its weight is zero.
    pub by: String,
    /// Flows that may still carry packets, as of the last sweep.
    pub flows_left: u64,
    /// It has no flows any more.
    pub is_done: bool,
    /// Until what is left is ended; none: it may go on.
    pub ends_in_secs: Option<u32>,
}

/// Flows that the agent ended before their time, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowsEnded {
    /// As they were left when a draining time was over.
    pub drained: u64,
    /// As the backend failed and its group has `on_unhealthy = "reset"`.
    pub reset: u64,
    /// As the backend failed and its group has `on_unhealthy = "rehash"`.
    pub rehashed: u64,
}

/// A backend that has left the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeavingStatus {
    pub group: String,
    pub name: String,
    /// Flows that may still carry packets, as of the last sweep. When it has none, also none that are held back, it is
    /// gone.
    pub flows_left: u64,
}

impl BackendStatus {
    /// Address and port, or the address alone where the port is the one that clients ask for.
    pub fn endpoint(&self) -> String {
        match self.port {
            Some(port) => at_port(self.address, port),
            None => self.address.to_string(),
        }
    }
}

/// What the agent found out about a backend that does not answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiagnosisStatus {
    /// Stable kebab-case name, such as `no-return-route`.
    pub cause: String,
    pub text: String,
    pub hint: Option<String>,
}

/// Why a backend is out, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EjectionStatus {
    /// `rejected`: it answered new flows with TCP resets. `silent`: nothing came from it.
    pub cause: String,
    /// Until its time is over; at 0 it waits for a probe that passes.
    pub remaining_secs: f64,
    /// Ejections in a row, this one included.
    pub times: u32,
}

/// How often a backend was ejected since the agent's start, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ejections {
    pub rejected: u64,
    pub silent: u64,
}

/// SNAT bindings, each of which one flow holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// Flows the table has room for, each with its binding.
    pub capacity: u64,
    /// Held now.
    pub used: u64,
    pub free: u64,
}

impl PoolStatus {
    /// Share of the bindings that is held, 0 to 1; 0 of an empty pool.
    #[must_use]
    pub fn usage(&self) -> f64 {
        if self.capacity == 0 {
            0.0
        } else {
            self.used as f64 / self.capacity as f64
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReasonStatus {
    pub name: String,
    /// `send`, `pass`, `drop` or `refuse`.
    pub verdict: String,
    pub packets: u64,
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::{testing::sample, *};

    #[test]
    fn json_has_the_names_that_scripts_rely_on() {
        let json = serde_json::to_string_pretty(&sample()).unwrap() + "\n";
        testing::assert_same_as_file("tests/golden/status/sample.json", &json);
    }

    #[test]
    fn an_empty_pool_is_not_used() {
        assert_eq!(PoolStatus::default().usage(), 0.0);
    }
}

/// For tests of everything that shows a status.
#[cfg(test)]
pub(crate) mod testing {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use forwarder_common::abi::reason::DESCRIPTIONS;

    use super::{ReasonStatus, Status};

    fn workspace(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
    }

    /// A gateway with one backend in trouble; its reasons are those of this build, with the sample's numbers.
    pub(crate) fn sample() -> Status {
        let json = fs::read_to_string(workspace("tests/golden/status/sample.json")).unwrap();
        let mut status: Status = serde_json::from_str(&json).unwrap();
        let counted = std::mem::take(&mut status.reasons);
        status.reasons = DESCRIPTIONS
            .iter()
            .map(|description| {
                let known = counted.iter().find(|reason| reason.name == description.name);
                ReasonStatus {
                    name: description.name.to_owned(),
                    verdict: description.verdict.name().to_owned(),
                    packets: known.map_or(0, |reason| reason.packets),
                    bytes: known.map_or(0, |reason| reason.bytes),
                }
            })
            .collect();
        status
    }

    /// Compares with a file of the repository; writes it instead if `FORWARDER_BLESS` is set.
    pub(crate) fn assert_same_as_file(path: &str, text: &str) {
        let file = workspace(path);
        if std::env::var_os("FORWARDER_BLESS").is_some() {
            fs::write(&file, text).unwrap();
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            text == expected,
            "{path} differs: if this is right, run again with FORWARDER_BLESS=1 and read the difference\n{text}"
        );
    }
}
