//! From evidence to a cause: a pure function, so that every row of its table has a test.
//!
//! Order matters. First what the failure itself says, then what this gateway knows of itself (tunnel, route,
//! link, neighbour), then what the echoes of four pairs say: router and backend, each asked from our own
//! address on the link and from the probe address.
//!
//! ```text
//! router  own probe | backend own probe |
//!         any  any  |         any  yes  | port-filtered: all paths work, so it is the port
//!         yes  no   |         any  no   | no-return-route: the router doesn't know the way back to the pool
//!         any  yes  |         any  no   | filtered: behind the router, a rule or the way back is missing; or
//!                   |                   | server-down, if the router says to either that it finds no host
//!         no   no   |         yes  no   | no-return-route-or-filtered: it lets only our own address through
//!         no   no   |         no   no   | next-hop-silent
//! no router         |         yes  no   | no-return-route-or-filtered
//! no router         |         no   no   | server-down-or-filtered
//! ```

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use nix::errno::Errno;

use super::{
    Refusal, Subject,
    echo::{Echo, Rejection},
    fix::{Fix, Host},
};
use crate::{
    health::{ProbeFailure, Stage},
    network::{Interface, NeighbourState, Route, RouteError},
};

/// Why a backend does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// This gateway has no route to the backend, or one that leads elsewhere than into its tunnel.
    NoRoute,
    /// A route of this gateway discards the packets.
    Blackholed,
    /// The interface on the way is down.
    InterfaceDown,
    /// The tunnel on the way is down or does not exist.
    TunnelDown,
    /// The next hop does not answer ARP.
    NoNeighbour,
    /// The router answers nothing, whoever asks.
    NextHopSilent,
    /// The router has no route back to the SNAT pool.
    NoReturnRoute,
    /// One of the two; from here they look the same.
    NoReturnRouteOrFiltered,
    /// Packets from the SNAT pool are dropped behind the router.
    Filtered,
    /// A firewall answers packets from the SNAT pool with a rejection.
    Rejected,
    /// The server answers the pool, only not on this port.
    PortFiltered,
    /// The last router finds no server at this address.
    ServerDown,
    /// One of the two; from here they look the same.
    ServerDownOrFiltered,
    /// A router on the way has no route to the backend.
    NoRouteBeyond,
    /// The server runs, but nothing listens on the port.
    Refused,
    /// The server accepted and broke off.
    Reset,
    /// The server answers with a status that the check does not expect.
    BadStatus,
    /// The server answers, but not what the check expects.
    BadAnswer,
    /// No TLS session comes about with the server.
    BadTls,
    /// The server answers that it does not serve.
    NotServing,
    /// The command that checks the backend says no.
    CommandFailed,
    /// The server accepted and does not answer in time.
    Timeout,
    /// The probe address is missing on this gateway.
    ProbeSourceNotLocal,
    /// This gateway could not send a probe.
    GatewayFault,
    /// None of the above.
    Unknown,
}

impl Cause {
    /// The stable kebab-case name, for labels of metrics and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoRoute => "no-route",
            Self::Blackholed => "blackholed",
            Self::InterfaceDown => "interface-down",
            Self::TunnelDown => "tunnel-down",
            Self::NoNeighbour => "no-neighbour",
            Self::NextHopSilent => "next-hop-silent",
            Self::NoReturnRoute => "no-return-route",
            Self::NoReturnRouteOrFiltered => "no-return-route-or-filtered",
            Self::Filtered => "filtered",
            Self::Rejected => "rejected",
            Self::PortFiltered => "port-filtered",
            Self::ServerDown => "server-down",
            Self::ServerDownOrFiltered => "server-down-or-filtered",
            Self::NoRouteBeyond => "no-route-beyond",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::BadStatus => "bad-status",
            Self::BadAnswer => "bad-answer",
            Self::BadTls => "bad-tls",
            Self::NotServing => "not-serving",
            Self::CommandFailed => "command-failed",
            Self::Timeout => "timeout",
            Self::ProbeSourceNotLocal => "probe-source-not-local",
            Self::GatewayFault => "gateway-fault",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a backend does not answer, for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    pub cause: Cause,
    /// What is wrong, naming addresses and interfaces; one clause.
    pub text: String,
    /// What to do about it, with the command where there is one.
    pub hint: Option<String>,
    /// The commands that mend it, in this order; empty where none can be known from here.
    pub fixes: Vec<Fix>,
}

impl Diagnosis {
    fn new(cause: Cause, text: impl Into<String>) -> Self {
        Self {
            cause,
            text: text.into(),
            hint: None,
            fixes: Vec::new(),
        }
    }

    /// Nothing could be found out, for this reason.
    pub(super) fn unknown(why: impl Into<String>) -> Self {
        Self::new(Cause::Unknown, why)
    }

    fn fixes(mut self, fixes: impl IntoIterator<Item = Fix>) -> Self {
        self.fixes.extend(fixes);
        self
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The tunnel that the configuration names for the backend's network.
#[derive(Clone, Debug)]
pub(super) struct TunnelEvidence {
    /// `None`: no such interface.
    pub(super) interface: Option<Interface>,
    /// The one neighbour on it that could be its router, for the hint.
    pub(super) likely_router: Option<IpAddr>,
}

/// What was found out about the path of a probe that came to nothing.
#[derive(Clone, Debug)]
pub(super) struct Evidence {
    pub(super) failure: ProbeFailure,
    /// `None`: the backend's network has no tunnel.
    pub(super) tunnel: Option<TunnelEvidence>,
    /// For packets from the probe address to the backend.
    pub(super) route: Result<Route, RouteError>,
    /// Where that route leaves; `None` if there is none.
    pub(super) egress: Option<Interface>,
    /// Our address on that interface, where it is not the probe address.
    pub(super) own_address: Option<IpAddr>,
    /// State of the next hop after the echoes; `None`: no entry, or none needed.
    pub(super) neighbour: Option<NeighbourState>,
    pub(super) router_from_own: Echo,
    pub(super) router_from_probe: Echo,
    pub(super) backend_from_own: Echo,
    pub(super) backend_from_probe: Echo,
}

impl Evidence {
    /// Whether the backend may be silent as its router is still looking for it, which takes longer than an answer.
    pub(super) fn may_be_searched_for(&self) -> bool {
        self.router_from_probe.is_answered()
            && matches!(self.backend_from_own, Echo::Silent | Echo::NotTried)
            && self.backend_from_probe == Echo::Silent
    }
}

/// What the failure alone says, where nothing about the path is in doubt; else `None`.
pub(super) fn from_failure(subject: &Subject, failure: &ProbeFailure) -> Option<Diagnosis> {
    let backend = subject.backend;
    let (address, port) = (backend.ip(), backend.port());
    Some(match failure {
        ProbeFailure::Refused => Diagnosis::new(
            Cause::Refused,
            format!("server {address} refuses connections to port {port}"),
        )
        .hint("start the server process, or correct the backend's port"),
        ProbeFailure::Reset | ProbeFailure::Closed => Diagnosis::new(
            Cause::Reset,
            format!("{backend} accepted the connection and broke it off"),
        )
        .hint("see the server's log; a TLS port answers plain HTTP like this"),
        ProbeFailure::UnexpectedStatus { status, expected } => Diagnosis::new(
            Cause::BadStatus,
            format!("{backend} answers HTTP status {status}"),
        )
        .hint(format!(
            "repair the server, or correct `path`, `host` or `expect` (now {expected})"
        )),
        ProbeFailure::MalformedAnswer(_) => Diagnosis::new(
            Cause::BadAnswer,
            format!("{backend} does not answer in HTTP/1: {failure}"),
        )
        .hint("check the port, or use a health check of kind \"tcp\""),
        ProbeFailure::UnexpectedBody { .. }
        | ProbeFailure::UnexpectedAnswer { .. }
        | ProbeFailure::NotGrpc(_) => {
            Diagnosis::new(Cause::BadAnswer, format!("{backend} answers, but {failure}"))
                .hint("repair the server, or correct what the health check sends and expects")
        }
        ProbeFailure::Tls(why) => Diagnosis::new(
            Cause::BadTls,
            format!("no TLS session with {backend} comes about: {why}"),
        )
        .hint("check that the port speaks TLS, and `host`, `verify` and `ca` of the health check"),
        ProbeFailure::GrpcStatus { .. } | ProbeFailure::NotServing(_) => {
            Diagnosis::new(Cause::NotServing, format!("{backend} does not serve: {failure}")).hint(
                "see the server's log; status 5 means that it has no such `service`, 12 no health service",
            )
        }
        ProbeFailure::CommandFailed { .. } | ProbeFailure::CommandTimedOut { .. } => {
            Diagnosis::new(Cause::CommandFailed, failure.to_string())
                .hint(format!("run the command by hand for {backend}"))
        }
        ProbeFailure::PortUnreachable => Diagnosis::new(
            Cause::Refused,
            format!("server {address} says that nothing listens on UDP port {port}"),
        )
        .hint("start the server process, or correct the backend's port"),
        ProbeFailure::CannotProbe(why) => Diagnosis::new(
            Cause::GatewayFault,
            format!("this gateway could not probe: {why}"),
        )
        .hint("correct the health check, or give this gateway what it lacks"),
        ProbeFailure::TimedOut {
            stage: Stage::Answer | Stage::Tls,
            after,
        } => Diagnosis::new(
            Cause::Timeout,
            format!("{backend} accepts connections but does not answer within {after:?}"),
        )
        .hint("the server is overloaded or hangs; if only large answers fail, check the MTU of the path"),
        ProbeFailure::SourceNotLocal(source) => not_local(*source),
        ProbeFailure::NotSent(errno) => gateway_fault(*errno),
        ProbeFailure::TimedOut {
            stage: Stage::Connect,
            ..
        }
        | ProbeFailure::NoAnswer { .. }
        | ProbeFailure::Unreachable(_)
        | ProbeFailure::Other(_) => return None,
    })
}

fn not_local(source: IpAddr) -> Diagnosis {
    Diagnosis::new(
        Cause::ProbeSourceNotLocal,
        format!("the probe address {source} is not an address of this gateway"),
    )
    .hint("restart the agent, which adds it, and find out who removed it")
}

fn gateway_fault(errno: Errno) -> Diagnosis {
    let diagnosis = Diagnosis::new(
        Cause::GatewayFault,
        format!(
            "this gateway could not send a probe: {}",
            errno.desc().to_lowercase()
        ),
    );
    match errno {
        Errno::EMFILE | Errno::ENFILE => diagnosis.hint("raise LimitNOFILE= of the service"),
        Errno::EADDRNOTAVAIL => {
            diagnosis.hint("lengthen the interval, or widen net.ipv4.ip_local_port_range")
        }
        _ => diagnosis,
    }
}

/// The verdict on the path.
pub(super) fn from_evidence(subject: &Subject, evidence: &Evidence) -> Diagnosis {
    from_failure(subject, &evidence.failure)
        .or_else(|| tunnel_down(subject, evidence))
        .or_else(|| route_wrong(subject, evidence))
        .or_else(|| egress_down(evidence))
        .or_else(|| neighbour_missing(subject, evidence))
        .or_else(|| backend_said_something(subject, evidence))
        .unwrap_or_else(|| from_silence(subject, evidence))
}

fn tunnel_down(subject: &Subject, evidence: &Evidence) -> Option<Diagnosis> {
    let found = evidence.tunnel.as_ref()?;
    let name = subject.tunnel()?;
    match &found.interface {
        None => Some(
            Diagnosis::new(
                Cause::TunnelDown,
                format!("the tunnel interface {name} does not exist"),
            )
            .hint(format!("create it, then `{}`", add_route(subject, evidence))),
        ),
        Some(interface) if !interface.is_running() => {
            let (state, cure) = down(interface);
            Some(
                Diagnosis::new(Cause::TunnelDown, format!("the tunnel interface {name} {state}"))
                    .hint(
                        // A link that was set down has lost its routes.
                        format!(
                            "{cure}; if its route is gone then: `{}`",
                            add_route(subject, evidence)
                        ),
                    )
                    .fixes(raise(interface))
                    .fixes(route_fix(subject, evidence)),
            )
        }
        Some(_) => None,
    }
}

/// Why the far side of a tunnel, at `address`, does not answer; `device` is the tunnel's, if there is one.
pub(super) fn tunnel(
    name: &str,
    address: IpAddr,
    failure: &ProbeFailure,
    device: Option<&Interface>,
) -> Diagnosis {
    let diagnosis = |text| Diagnosis::new(Cause::TunnelDown, text);
    match device {
        None => diagnosis(format!("the tunnel interface {name} does not exist")).hint("create it"),
        Some(device) if !device.is_running() => {
            let (state, cure) = down(device);
            diagnosis(format!("the tunnel interface {name} {state}"))
                .hint(cure)
                .fixes(raise(device))
        }
        Some(_) => diagnosis(format!(
            "the tunnel {name} is down: its far side {address} does not answer ({failure})"
        ))
        .hint(format!(
            "check that the far end of {name} runs and that the underlay between the two ends works; \
             `ping -I {name} {address}` asks the same"
        )),
    }
}

fn down(interface: &Interface) -> (&'static str, String) {
    if interface.is_up {
        (
            "has no carrier",
            format!("check what {} is connected to", interface.name),
        )
    } else {
        ("is down", format!("`ip link set {} up`", interface.name))
    }
}

/// The command that sets an interface up, if that is what it lacks.
fn raise(interface: &Interface) -> Option<Fix> {
    (!interface.is_up).then(|| Fix::here(format!("ip link set dev {} up", interface.name)))
}

fn route_wrong(subject: &Subject, evidence: &Evidence) -> Option<Diagnosis> {
    let address = subject.backend.ip();
    let no_route = |text| Diagnosis::new(Cause::NoRoute, text);
    match &evidence.route {
        Err(RouteError::NoRoute) => {
            let text = format!("this gateway has no route to {}", subject.destination());
            Some(
                no_route(text)
                    .hint(format!("`{}`", add_route(subject, evidence)))
                    .fixes(route_fix(subject, evidence)),
            )
        }
        Err(RouteError::SourceNotLocal(source)) => Some(not_local(*source)),
        Err(error @ (RouteError::Unreachable | RouteError::Prohibited | RouteError::Blackhole)) => Some(
            Diagnosis::new(
                Cause::Blackholed,
                format!("this gateway discards packets to {address}: {error}"),
            )
            .hint(format!(
                "`ip route get {address}` fails because of it; `ip route` shows it, delete it, then `{}`",
                add_route(subject, evidence)
            ))
            .fixes(route_fix(subject, evidence)),
        ),
        Err(RouteError::Failed(error)) => Some(Diagnosis::new(Cause::Unknown, error.what.clone())),
        Ok(_) => {
            // A default route hides that the tunnel's own is missing.
            let tunnel = subject.tunnel()?;
            let egress = evidence.egress.as_ref()?;
            (egress.name != tunnel).then(|| {
                no_route(format!(
                    "this gateway has no route to {} through {tunnel}: packets leave through {}",
                    subject.destination(),
                    egress.name
                ))
                .hint(format!("`{}`", add_route(subject, evidence)))
                .fixes(route_fix(subject, evidence))
            })
        }
    }
}

/// The command that gives the backend's network its route.
fn add_route(subject: &Subject, evidence: &Evidence) -> String {
    let destination = subject.destination();
    let Some(name) = subject.tunnel() else {
        return format!("ip route replace {destination} via <next hop>");
    };
    let tunnel = evidence.tunnel.as_ref();
    let likely_router = tunnel.and_then(|tunnel| tunnel.likely_router);
    let needs_router = tunnel
        .and_then(|tunnel| tunnel.interface.as_ref())
        .is_some_and(|link| link.has_neighbours);
    match likely_router {
        Some(router) => format!("ip route replace {destination} via {router} dev {name}"),
        None if needs_router => {
            format!("ip route replace {destination} via <router behind {name}> dev {name}")
        }
        None => format!("ip route replace {destination} dev {name}"),
    }
}

/// The same as a fix, where nothing in it has to be filled in.
fn route_fix(subject: &Subject, evidence: &Evidence) -> Option<Fix> {
    let command = add_route(subject, evidence);
    (!command.contains('<')).then(|| Fix::here(command))
}

fn egress_down(evidence: &Evidence) -> Option<Diagnosis> {
    let egress = evidence.egress.as_ref().filter(|egress| !egress.is_running())?;
    let (state, cure) = down(egress);
    Some(
        Diagnosis::new(Cause::InterfaceDown, format!("interface {} {state}", egress.name))
            .hint(cure)
            .fixes(raise(egress)),
    )
}

fn neighbour_missing(subject: &Subject, evidence: &Evidence) -> Option<Diagnosis> {
    let egress = evidence.egress.as_ref()?;
    let route = evidence.route.as_ref().ok()?;
    let echoes = [
        evidence.router_from_own,
        evidence.router_from_probe,
        evidence.backend_from_own,
        evidence.backend_from_probe,
    ];
    let unresolved = evidence.neighbour.is_some_and(|state| !state.is_usable());
    if !egress.has_neighbours || !unresolved || echoes.into_iter().any(Echo::is_answered) {
        return None;
    }
    let name = &egress.name;
    Some(match route.gateway {
        Some(router) => Diagnosis::new(
            Cause::NoNeighbour,
            format!(
                "next hop {router} does not answer {} on {name}",
                resolution(router)
            ),
        )
        .hint(if egress.kind.is_tunnel() {
            format!("check that the far end of {name} runs and that the underlay between the two ends works")
        } else {
            format!("check that {router} runs and is connected to {name}")
        })
        .fixes([Fix::wake(Host::Router(router), router)]),
        None => {
            let server = subject.backend.ip();
            Diagnosis::new(
                Cause::NoNeighbour,
                format!("server {server} does not answer {} on {name}", resolution(server)),
            )
            .hint(format!(
                "check that {server} runs and is connected to the network of {name}"
            ))
            .fixes([Fix::wake(Host::Server(server), server)])
        }
    })
}

fn backend_said_something(subject: &Subject, evidence: &Evidence) -> Option<Diagnosis> {
    let server = subject.backend.ip();
    let (by, why) = match evidence.backend_from_probe {
        Echo::Answered => {
            let port = subject.backend.port();
            let asked = match &evidence.failure {
                ProbeFailure::NoAnswer { .. } if port == 0 => {
                    let text = format!("server {server} answers echo requests again, or some of them");
                    return Some(Diagnosis::new(Cause::Unknown, text));
                }
                ProbeFailure::NoAnswer { .. } => "UDP",
                _ => "TCP",
            };
            return Some(
                Diagnosis::new(
                    Cause::PortFiltered,
                    format!("server {server} answers echo requests, but {asked} port {port} stays silent"),
                )
                .hint(format!(
                    "admit {} to {asked} port {port} in the server's inbound rule (security group, host firewall)",
                    prefixes(&subject.snat_prefixes)
                ))
                .fixes([admit_fix(subject)]),
            );
        }
        Echo::Rejected { by, why } => (by, why),
        Echo::Silent | Echo::NotSent(_) | Echo::NotTried => match evidence.backend_from_own {
            // Whoever asks: the host is not there.
            Echo::Rejected {
                by,
                why: why @ Rejection::HostUnreachable,
            } => (by, why),
            _ => return None,
        },
    };
    Some(match why {
        Rejection::NetworkUnreachable => Diagnosis::new(
            Cause::NoRouteBeyond,
            format!("router {by} has no route to {server} (it answers \"network unreachable\")"),
        )
        .hint(format!("on {by}, add a route to {}", subject.destination())),
        Rejection::Loop => Diagnosis::new(
            Cause::NoRouteBeyond,
            format!("packets to {server} run in circles (router {by} answers \"time exceeded\")"),
        )
        .hint(format!(
            "correct the route to {} on {by} and its neighbours",
            subject.destination()
        )),
        Rejection::HostUnreachable => Diagnosis::new(
            Cause::ServerDown,
            format!("router {by} finds no host {server} on its network (it answers \"host unreachable\")"),
        )
        .hint(format!("start {server}, or correct the backend's address"))
        .fixes([Fix::wake(Host::Server(server), server)]),
        Rejection::Prohibited => rejected(subject, by),
    })
}

/// A rule that says no instead of saying nothing.
fn rejected(subject: &Subject, by: IpAddr) -> Diagnosis {
    let server = subject.backend.ip();
    let host = if by == server {
        Host::Server(server)
    } else {
        Host::Router(by)
    };
    Diagnosis::new(
        Cause::Rejected,
        format!(
            "{by} rejects packets from {} to {server} by a rule",
            subject.probe_source
        ),
    )
    .hint(admit(subject))
    .fixes([Fix::admit(host, &subject.snat_prefixes)])
}

/// Refused: does nobody listen, or does a firewall say so?
pub(super) fn from_refusal(subject: &Subject, refusal: &Refusal) -> Option<Diagnosis> {
    if let Echo::Rejected {
        by,
        why: Rejection::Prohibited,
    } = refusal.backend_from_probe
    {
        return Some(rejected(subject, by));
    }
    refusal.admitted.map(|own| {
        let mut diagnosis = rejected(subject, subject.backend.ip());
        diagnosis.text = format!(
            "{} accepts {own}, but refuses {}: a rule rejects it",
            subject.backend, subject.probe_source
        );
        diagnosis
    })
}

/// The rows of the table in this module's comment, for a backend that said nothing to the probe address.
fn from_silence(subject: &Subject, evidence: &Evidence) -> Diagnosis {
    let server = subject.backend.ip();
    let probe = subject.probe_source;
    let pool = prefixes(&subject.snat_prefixes);
    let own = evidence.own_address;
    let own_text = own.map_or_else(|| "our own address".to_owned(), |own| own.to_string());

    if let Echo::NotSent(errno) = evidence.backend_from_probe {
        return Diagnosis::new(
            Cause::ServerDownOrFiltered,
            format!(
                "{}; echo requests that would tell more could not be sent ({errno})",
                evidence.failure
            ),
        )
        .hint("run as root or grant CAP_NET_RAW for a closer diagnosis");
    }

    let Some(router) = evidence.route.as_ref().ok().and_then(|route| route.gateway) else {
        return if evidence.backend_from_own.is_answered() {
            Diagnosis::new(
                Cause::NoReturnRouteOrFiltered,
                format!("server {server} answers {own_text}, but not {probe} of the SNAT pool"),
            )
            .hint(format!(
                "on {server}: `{}`, or the same in its network's route table; and {}",
                return_routes(subject, own),
                admit(subject)
            ))
            .fixes(return_fixes(subject, Host::Server(server), own))
            .fixes([admit_fix(subject)])
        } else {
            Diagnosis::new(
                Cause::ServerDownOrFiltered,
                format!("server {server} answers nothing, neither {own_text} nor {probe} of the SNAT pool"),
            )
            .hint(format!("check that {server} runs; then {}", admit(subject)))
            .fixes([admit_fix(subject)])
        };
    };

    let router_knows_own = evidence.router_from_own.is_answered();
    let router_knows_pool = evidence.router_from_probe.is_answered();
    let backend_knows_own = evidence.backend_from_own.is_answered();
    match (router_knows_own, router_knows_pool, backend_knows_own) {
        (true, false, _) => Diagnosis::new(
            Cause::NoReturnRoute,
            format!("router {router} answers {own_text}, but not {probe}: it has no route back to {pool}"),
        )
        .hint(format!(
            "on {router}: `{}`; the remote network's route table needs the same prefix",
            return_routes(subject, own)
        ))
        .fixes(return_fixes(subject, Host::Router(router), own)),
        (_, true, true) => Diagnosis::new(
            Cause::Filtered,
            format!("server {server} answers {own_text}, but not {probe}: packets from {pool} are dropped"),
        )
        .hint(admit(subject))
        .fixes([admit_fix(subject)]),
        (_, true, false) => Diagnosis::new(
            Cause::Filtered,
            format!(
                "router {router} answers {probe}, but server {server} stays silent: packets from {pool} are \
                 dropped behind it, or the server is down"
            ),
        )
        .hint(admit(subject))
        .fixes([admit_fix(subject)]),
        (false, false, true) => Diagnosis::new(
            Cause::NoReturnRouteOrFiltered,
            format!("server {server} answers {own_text}, but not {probe} of the SNAT pool"),
        )
        .hint(format!("on {router}: `{}`; and {}", return_routes(subject, own), admit(subject)))
        .fixes(return_fixes(subject, Host::Router(router), own))
        .fixes([admit_fix(subject)]),
        (false, false, false) => Diagnosis::new(
            Cause::NextHopSilent,
            match own {
                Some(own) => format!("router {router} answers neither {own} nor {probe}"),
                None => format!("router {router} does not answer {probe}"),
            },
        )
        .hint(match &evidence.egress {
            Some(egress) if egress.kind.is_tunnel() => format!(
                "check the far end of {} and the underlay, that {router} runs, and that it routes {pool} back",
                egress.name
            ),
            _ => format!("check that {router} runs and that it routes {pool} back"),
        })
        .fixes(return_fixes(subject, Host::Router(router), own)),
    }
}

fn admit(subject: &Subject) -> String {
    let pool = prefixes(&subject.snat_prefixes);
    format!(
        "admit {pool} in the server's inbound rule (security group, host firewall) and check the route to {pool} \
         in the server's network"
    )
}

fn admit_fix(subject: &Subject) -> Fix {
    Fix::admit(Host::Server(subject.backend.ip()), &subject.snat_prefixes)
}

fn return_fixes(subject: &Subject, host: Host, own: Option<IpAddr>) -> Vec<Fix> {
    let route = |own| {
        let prefixes = subject.snat_prefixes.iter();
        prefixes
            .map(|prefix| Fix::return_route(host, prefix, own))
            .collect()
    };
    own.map(route).unwrap_or_default()
}

/// The commands that route the SNAT pool back to us.
fn return_routes(subject: &Subject, own: Option<IpAddr>) -> String {
    let gateway = own.map_or_else(|| "<this gateway>".to_owned(), |own| own.to_string());
    let commands: Vec<String> = subject
        .snat_prefixes
        .iter()
        .map(|prefix| format!("ip route replace {} via {gateway}", prefix.trunc()))
        .collect();
    commands.join("; ")
}

/// How the link address of a host is asked for.
fn resolution(address: IpAddr) -> &'static str {
    if address.is_ipv4() {
        "ARP"
    } else {
        "neighbour discovery"
    }
}

fn prefixes(prefixes: &[IpNet]) -> String {
    let texts: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        time::Duration,
    };

    use super::*;
    use crate::{error::Error, network::InterfaceKind};

    const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 10));
    const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 255, 0, 2));
    const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 255, 0, 1));
    const PROBE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1));

    fn subject() -> Subject {
        Subject {
            backend: SocketAddr::new(SERVER, 8080),
            probe_source: PROBE,
            snat_prefixes: vec!["100.64.0.0/26".parse().unwrap(), "100.64.1.0/25".parse().unwrap()],
            remote: Some(("192.168.0.0/16".parse().unwrap(), Some("vx-peer".into()))),
        }
    }

    fn interface(name: &str, kind: InterfaceKind) -> Interface {
        Interface {
            name: name.into(),
            index: 7,
            mac: None,
            mtu_bytes: 1450,
            is_up: true,
            has_carrier: true,
            is_ethernet: true,
            has_neighbours: true,
            kind,
            controller: None,
            remote: None,
            alias: None,
            vlan: None,
            driver: None,
        }
    }

    fn timed_out() -> ProbeFailure {
        ProbeFailure::TimedOut {
            stage: Stage::Connect,
            after: Duration::from_secs(1),
        }
    }

    /// A path that is sound as far as this gateway can see, behind which all is silent.
    fn evidence() -> Evidence {
        let tunnel = interface("vx-peer", InterfaceKind::Vxlan);
        Evidence {
            failure: timed_out(),
            tunnel: Some(TunnelEvidence {
                interface: Some(tunnel.clone()),
                likely_router: Some(ROUTER),
            }),
            route: Ok(Route {
                interface: 7,
                gateway: Some(ROUTER),
                source: Some(OWN),
                is_local: false,
            }),
            egress: Some(tunnel),
            own_address: Some(OWN),
            neighbour: Some(NeighbourState::Reachable),
            router_from_own: Echo::Silent,
            router_from_probe: Echo::Silent,
            backend_from_own: Echo::Silent,
            backend_from_probe: Echo::Silent,
        }
    }

    fn judged(change: impl FnOnce(&mut Evidence)) -> Diagnosis {
        let mut evidence = evidence();
        change(&mut evidence);
        from_evidence(&subject(), &evidence)
    }

    #[track_caller]
    fn assert_hint(diagnosis: &Diagnosis, cause: Cause, part: &str) {
        assert_eq!(diagnosis.cause, cause, "{diagnosis:?}");
        let hint = diagnosis.hint.as_deref().unwrap_or_default();
        assert!(hint.contains(part), "{part:?} is not in {hint:?}");
    }

    #[test]
    fn plain_failures_need_no_evidence() {
        let table = [
            (ProbeFailure::Refused, Cause::Refused),
            (ProbeFailure::Reset, Cause::Reset),
            (ProbeFailure::Closed, Cause::Reset),
            (
                ProbeFailure::UnexpectedStatus {
                    status: 500,
                    expected: "200-399".into(),
                },
                Cause::BadStatus,
            ),
            (
                ProbeFailure::MalformedAnswer("invalid HTTP version parsed".into()),
                Cause::BadAnswer,
            ),
            (
                ProbeFailure::TimedOut {
                    stage: Stage::Answer,
                    after: Duration::from_secs(1),
                },
                Cause::Timeout,
            ),
            (ProbeFailure::SourceNotLocal(PROBE), Cause::ProbeSourceNotLocal),
            (ProbeFailure::NotSent(Errno::EMFILE), Cause::GatewayFault),
        ];
        for (failure, cause) in table {
            let diagnosis = from_failure(&subject(), &failure).unwrap();
            assert_eq!(diagnosis.cause, cause, "{failure:?}");
            assert!(diagnosis.hint.is_some(), "{failure:?}");
            // They win over any evidence.
            assert_eq!(judged(|evidence| evidence.failure = failure.clone()), diagnosis);
        }
        assert_eq!(from_failure(&subject(), &timed_out()), None);
        assert_eq!(
            from_failure(&subject(), &ProbeFailure::Unreachable(Errno::EHOSTUNREACH)),
            None
        );
    }

    #[test]
    fn a_missing_route_gets_its_command() {
        let gone = |evidence: &mut Evidence| {
            evidence.route = Err(RouteError::NoRoute);
            evidence.egress = None;
        };
        let diagnosis = judged(gone);
        assert_hint(
            &diagnosis,
            Cause::NoRoute,
            "`ip route replace 192.168.0.0/16 via 10.255.0.2 dev vx-peer`",
        );
        assert_eq!(diagnosis.text, "this gateway has no route to 192.168.0.0/16");

        // A tunnel without ARP needs no router, one with ARP and without a known router gets a placeholder.
        let diagnosis = judged(|evidence| {
            gone(evidence);
            let tunnel = evidence.tunnel.as_mut().unwrap();
            tunnel.likely_router = None;
            tunnel.interface.as_mut().unwrap().has_neighbours = false;
        });
        assert_hint(
            &diagnosis,
            Cause::NoRoute,
            "`ip route replace 192.168.0.0/16 dev vx-peer`",
        );
        let diagnosis = judged(|evidence| {
            gone(evidence);
            evidence.tunnel.as_mut().unwrap().likely_router = None;
        });
        assert_hint(
            &diagnosis,
            Cause::NoRoute,
            "via <router behind vx-peer> dev vx-peer",
        );

        // Without a network of its own, the backend's address is the destination.
        let mut evidence = evidence();
        gone(&mut evidence);
        evidence.tunnel = None;
        let alone = Subject {
            remote: None,
            ..subject()
        };
        let diagnosis = from_evidence(&alone, &evidence);
        assert_hint(
            &diagnosis,
            Cause::NoRoute,
            "`ip route replace 192.168.1.10/32 via <next hop>`",
        );
    }

    #[test]
    fn a_default_route_does_not_hide_the_missing_one() {
        let diagnosis = judged(|evidence| evidence.egress = Some(interface("eth0", InterfaceKind::Physical)));
        assert_hint(
            &diagnosis,
            Cause::NoRoute,
            "ip route replace 192.168.0.0/16 via 10.255.0.2 dev vx-peer",
        );
        assert!(
            diagnosis.text.contains("packets leave through eth0"),
            "{}",
            diagnosis.text
        );
    }

    #[test]
    fn routes_that_discard_are_named() {
        for error in [
            RouteError::Blackhole,
            RouteError::Prohibited,
            RouteError::Unreachable,
        ] {
            let diagnosis = judged(|evidence| evidence.route = Err(error.clone()));
            assert_hint(&diagnosis, Cause::Blackholed, "ip route get 192.168.1.10");
        }
        let diagnosis = judged(|evidence| evidence.route = Err(RouteError::SourceNotLocal(PROBE)));
        assert_eq!(diagnosis.cause, Cause::ProbeSourceNotLocal);
        let diagnosis =
            judged(|evidence| evidence.route = Err(RouteError::Failed(Error::failed("netlink is broken"))));
        assert_eq!(
            (diagnosis.cause, diagnosis.text.as_str()),
            (Cause::Unknown, "netlink is broken")
        );
    }

    #[test]
    fn a_tunnel_that_is_down_or_missing_comes_before_its_lost_route() {
        let diagnosis = judged(|evidence| {
            evidence.route = Err(RouteError::NoRoute);
            evidence
                .tunnel
                .as_mut()
                .unwrap()
                .interface
                .as_mut()
                .unwrap()
                .is_up = false;
        });
        assert_hint(&diagnosis, Cause::TunnelDown, "`ip link set vx-peer up`");
        let diagnosis = judged(|evidence| evidence.tunnel.as_mut().unwrap().interface = None);
        assert_eq!(diagnosis.cause, Cause::TunnelDown);
        assert!(diagnosis.text.contains("does not exist"));
        let diagnosis = judged(|evidence| {
            evidence
                .tunnel
                .as_mut()
                .unwrap()
                .interface
                .as_mut()
                .unwrap()
                .has_carrier = false;
        });
        assert!(diagnosis.text.contains("no carrier"), "{diagnosis:?}");
    }

    #[test]
    fn an_interface_without_carrier_is_named() {
        let mut evidence = evidence();
        let mut eth1 = interface("eth1", InterfaceKind::Physical);
        eth1.has_carrier = false;
        evidence.egress = Some(eth1);
        evidence.tunnel = None;
        let local = Subject {
            remote: Some(("192.168.0.0/16".parse().unwrap(), None)),
            ..subject()
        };
        let diagnosis = from_evidence(&local, &evidence);
        assert_eq!(diagnosis.cause, Cause::InterfaceDown);
        assert_eq!(diagnosis.text, "interface eth1 has no carrier");
    }

    #[test]
    fn a_next_hop_that_does_not_answer_arp_is_named() {
        for state in [NeighbourState::Failed, NeighbourState::Incomplete] {
            let diagnosis = judged(|evidence| {
                evidence.neighbour = Some(state);
                // The kernel's own error about it must not be taken for a router's.
                evidence.backend_from_probe = Echo::Rejected {
                    by: OWN,
                    why: Rejection::HostUnreachable,
                };
            });
            assert_hint(&diagnosis, Cause::NoNeighbour, "far end of vx-peer");
            assert!(diagnosis.text.contains("10.255.0.2"));
        }
        let on_link = judged(|evidence| {
            evidence.neighbour = Some(NeighbourState::Failed);
            evidence.route = Ok(Route {
                interface: 7,
                gateway: None,
                source: Some(OWN),
                is_local: false,
            });
        });
        assert_eq!(on_link.cause, Cause::NoNeighbour);
        assert!(
            on_link.text.contains("server 192.168.1.10 does not answer ARP"),
            "{}",
            on_link.text
        );
        // Who answers exists, whatever the table says.
        let answered = judged(|evidence| {
            evidence.neighbour = Some(NeighbourState::Failed);
            evidence.router_from_own = Echo::Answered;
        });
        assert_eq!(answered.cause, Cause::NoReturnRoute);
    }

    #[test]
    fn what_routers_say_is_believed() {
        let table = [
            (Rejection::NetworkUnreachable, Cause::NoRouteBeyond),
            (Rejection::Loop, Cause::NoRouteBeyond),
            (Rejection::HostUnreachable, Cause::ServerDown),
            (Rejection::Prohibited, Cause::Rejected),
        ];
        for (why, cause) in table {
            let diagnosis = judged(|evidence| {
                evidence.failure = ProbeFailure::Unreachable(Errno::EHOSTUNREACH);
                evidence.backend_from_probe = Echo::Rejected { by: ROUTER, why };
            });
            assert_eq!(diagnosis.cause, cause);
            assert!(diagnosis.text.contains("10.255.0.2"), "{}", diagnosis.text);
        }
    }

    /// A router that has sent the probe address too many errors lately tells only our own address.
    #[test]
    fn a_host_that_is_not_found_is_down_whoever_is_told() {
        let told_own = |why| {
            judged(|evidence| {
                evidence.router_from_own = Echo::Answered;
                evidence.router_from_probe = Echo::Answered;
                evidence.backend_from_own = Echo::Rejected { by: ROUTER, why };
            })
        };
        assert_eq!(told_own(Rejection::HostUnreachable).cause, Cause::ServerDown);
        // What is forbidden to our own address says nothing about the pool's.
        assert_eq!(told_own(Rejection::Prohibited).cause, Cause::Filtered);
    }

    #[test]
    fn a_router_is_given_time_to_look_for_a_silent_server() {
        let waits = |change: fn(&mut Evidence)| {
            let mut evidence = evidence();
            evidence.router_from_probe = Echo::Answered;
            change(&mut evidence);
            evidence.may_be_searched_for()
        };
        assert!(waits(|_| {}));
        assert!(waits(|evidence| evidence.backend_from_own = Echo::NotTried));
        assert!(!waits(|evidence| evidence.router_from_probe = Echo::Silent));
        assert!(!waits(|evidence| evidence.backend_from_own = Echo::Answered));
        assert!(!waits(|evidence| evidence.backend_from_probe = Echo::Answered));
        assert!(!waits(
            |evidence| evidence.backend_from_probe = Echo::NotSent(Errno::EPERM)
        ));
    }

    /// The table in the module's comment, all 2^4 rows with a router and all 2^2 without.
    #[test]
    fn every_row_of_silence() {
        let echo = |answered| if answered { Echo::Answered } else { Echo::Silent };
        for bits in 0..16_u8 {
            let [router_own, router_probe, backend_own, backend_probe] =
                [8, 4, 2, 1].map(|bit| bits & bit != 0);
            let expected = match (router_own, router_probe, backend_own, backend_probe) {
                (_, _, _, true) => Cause::PortFiltered,
                (true, false, _, false) => Cause::NoReturnRoute,
                (_, true, _, false) => Cause::Filtered,
                (false, false, true, false) => Cause::NoReturnRouteOrFiltered,
                (false, false, false, false) => Cause::NextHopSilent,
            };
            let diagnosis = judged(|evidence| {
                evidence.router_from_own = echo(router_own);
                evidence.router_from_probe = echo(router_probe);
                evidence.backend_from_own = echo(backend_own);
                evidence.backend_from_probe = echo(backend_probe);
            });
            assert_eq!(diagnosis.cause, expected, "{bits:04b}");
        }
        for (backend_own, backend_probe, expected) in [
            (true, true, Cause::PortFiltered),
            (false, true, Cause::PortFiltered),
            (true, false, Cause::NoReturnRouteOrFiltered),
            (false, false, Cause::ServerDownOrFiltered),
        ] {
            let diagnosis = judged(|evidence| {
                evidence.route = Ok(Route {
                    interface: 7,
                    gateway: None,
                    source: Some(OWN),
                    is_local: false,
                });
                evidence.backend_from_own = echo(backend_own);
                evidence.backend_from_probe = echo(backend_probe);
            });
            assert_eq!(diagnosis.cause, expected, "{backend_own} {backend_probe}");
        }
    }

    #[test]
    fn a_rejection_is_told_from_a_closed_port() {
        let refused = |backend_from_probe, admitted| {
            from_refusal(
                &subject(),
                &Refusal {
                    backend_from_probe,
                    admitted,
                },
            )
        };
        assert_eq!(refused(Echo::Answered, None), None);
        assert_eq!(refused(Echo::Silent, None), None);
        // The server's firewall rejects all that the pool sends, or only this port; a router's does.
        let rule = |by| Echo::Rejected {
            by,
            why: Rejection::Prohibited,
        };
        for (diagnosis, host) in [
            (refused(rule(SERVER), None), Host::Server(SERVER)),
            (refused(Echo::Answered, Some(OWN)), Host::Server(SERVER)),
            (refused(rule(ROUTER), None), Host::Router(ROUTER)),
        ] {
            let diagnosis = diagnosis.unwrap();
            assert_eq!(
                (diagnosis.cause, diagnosis.fixes[0].host),
                (Cause::Rejected, host)
            );
        }
    }

    #[test]
    fn what_can_be_mended_from_here_has_its_command() {
        let commands = |diagnosis: Diagnosis| -> Vec<String> {
            diagnosis.fixes.into_iter().map(|fix| fix.command).collect()
        };
        let route = "ip route replace 192.168.0.0/16 via 10.255.0.2 dev vx-peer";
        let no_route = |evidence: &mut Evidence| evidence.route = Err(RouteError::NoRoute);
        assert_eq!(commands(judged(no_route)), [route]);
        let down = judged(|evidence| {
            no_route(evidence);
            evidence
                .tunnel
                .as_mut()
                .unwrap()
                .interface
                .as_mut()
                .unwrap()
                .is_up = false;
        });
        assert_eq!(commands(down), ["ip link set dev vx-peer up", route]);
        // A command with a blank in it could not be pasted.
        let unknown = judged(|evidence| {
            no_route(evidence);
            evidence.tunnel.as_mut().unwrap().likely_router = None;
        });
        assert_eq!(commands(unknown), [""; 0]);
    }

    #[test]
    fn hints_name_every_prefix_of_the_pool() {
        let diagnosis = judged(|evidence| evidence.router_from_own = Echo::Answered);
        assert_hint(
            &diagnosis,
            Cause::NoReturnRoute,
            "on 10.255.0.2: `ip route replace 100.64.0.0/26 via 10.255.0.1; ip route replace 100.64.1.0/25 via 10.255.0.1`",
        );
        let diagnosis = judged(|evidence| evidence.router_from_probe = Echo::Answered);
        assert_hint(
            &diagnosis,
            Cause::Filtered,
            "admit 100.64.0.0/26, 100.64.1.0/25 in the server's inbound rule",
        );
    }

    #[test]
    fn without_rights_for_echo_requests_it_says_so() {
        let diagnosis = judged(|evidence| {
            evidence.backend_from_probe = Echo::NotSent(Errno::EPERM);
            evidence.router_from_probe = Echo::NotSent(Errno::EPERM);
        });
        assert_hint(&diagnosis, Cause::ServerDownOrFiltered, "CAP_NET_RAW");
    }

    #[test]
    fn names_are_kebab_case() {
        assert_eq!(
            Cause::NoReturnRouteOrFiltered.to_string(),
            "no-return-route-or-filtered"
        );
    }
}
