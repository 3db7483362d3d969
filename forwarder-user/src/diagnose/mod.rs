//! Why does a backend not answer? Names the missing thing, as far as a gateway can know it.
//!
//! A remote backend needs a route here, a route back to the SNAT pool on every router there, and a rule on the
//! server that admits the pool. From outside, without any one of them, all that shows is silence. This module
//! asks the kernel for what it knows of the path and sends echo requests to the next router and to the backend,
//! from our own address on the link and from the probe address: who answers whom tells which of them is
//! missing. `verdict` holds the reasoning, `echo` the asking, this file gathers.
//!
//! It changes nothing, apart from asking the kernel to resolve the next hop. Echo requests that somebody
//! filters on purpose make a verdict less precise, which its text then says. What lies beyond the first
//! router is only seen through that router's and the server's answers.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::{
    health::{Origin, ProbeFailure, tcp},
    network::{Interface, Network, Route},
};

mod echo;
pub mod fix;
mod verdict;

use echo::{Echo, PATIENCE, Pinger};
pub use verdict::{Cause, Diagnosis};
use verdict::{Evidence, TunnelEvidence};

/// Whose silence is to be explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Where the probe went.
    pub backend: SocketAddr,
    /// Where it came from: an address of this host and of the SNAT pool.
    pub probe_source: IpAddr,
    /// The SNAT pool, for hints.
    pub snat_prefixes: Vec<IpNet>,
    /// The CIDR of the configured network that holds the backend, and the tunnel that leads there; `None` if no
    /// network holds it.
    pub remote: Option<(IpNet, Option<String>)>,
}

impl Subject {
    /// What a route to the backend should cover.
    fn destination(&self) -> IpNet {
        match &self.remote {
            Some((cidr, _)) => cidr.trunc(),
            None => IpNet::from(self.backend.ip()),
        }
    }

    fn tunnel(&self) -> Option<&str> {
        self.remote.as_ref().and_then(|(_, tunnel)| tunnel.as_deref())
    }
}

/// How much time a diagnosis may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// A second.
    Quick,
    /// Four seconds where a router answers and the server behind it does not, as the router may still be looking for it.
    /// Else a second.
    Thorough,
}

/// Explains why the probe of `subject` ended in `failure`.
///
/// Failures that explain themselves (wrong status) return at once. For the others it takes as long as `depth` says, and
/// sends up to twelve echo requests, so callers with many silent backends should ask about a few.
/// Never fails: what cannot be found out makes the answer less precise.
///
/// Runs in the network namespace of the calling thread, which must be that of `network`. Needs CAP_NET_RAW.
pub async fn diagnose(
    network: &Network,
    subject: &Subject,
    failure: &ProbeFailure,
    depth: Depth,
) -> Diagnosis {
    if *failure == ProbeFailure::Refused
        && let Some(diagnosis) = verdict::from_refusal(subject, &ask_again(network, subject).await)
    {
        return diagnosis;
    }
    if let Some(diagnosis) = verdict::from_failure(subject, failure) {
        return diagnosis;
    }
    let evidence = gather(network, subject, failure, depth).await;
    tracing::debug!(backend = %subject.backend, ?evidence, "evidence");
    verdict::from_evidence(subject, &evidence)
}

/// Explains why the probe of a tunnel's far side, at `address`, ended in `failure`: its device is missing or down, or
/// it is not, and what is beyond it does not answer. Asks the kernel only.
pub async fn tunnel(network: &Network, name: &str, address: IpAddr, failure: &ProbeFailure) -> Diagnosis {
    match network.interface(name).await {
        Ok(device) => verdict::tunnel(name, address, failure, device.as_ref()),
        Err(error) => Diagnosis::unknown(error.what),
    }
}

/// Whether `target` answers an echo request of `packet_bytes` (with the IP header, at least 28) from `source`, sent
/// with "don't fragment". Takes up to a second. Needs CAP_NET_RAW.
pub async fn answers_echo(source: IpAddr, target: IpAddr, packet_bytes: usize) -> bool {
    Pinger::new(source)
        .ask_sized(Some(target), packet_bytes)
        .await
        .is_answered()
}

/// What a backend that refused says to others.
struct Refusal {
    backend_from_probe: Echo,
    /// Our own address on the way, if the backend accepts that one.
    admitted: Option<IpAddr>,
}

/// Asks a backend that refused the probe address in another way, and from another address.
async fn ask_again(network: &Network, subject: &Subject) -> Refusal {
    let backend = subject.backend.ip();
    let admitted = async {
        let route = network.route_to(backend, Some(subject.probe_source)).await.ok()?;
        let own = own_address(network, subject, &route).await?;
        let outcome = tcp::probe(subject.backend, &Origin::Address(own), PATIENCE).await;
        outcome.is_ok().then_some(own)
    };
    let pinger = Pinger::new(subject.probe_source);
    let (backend_from_probe, admitted) = tokio::join!(pinger.ask(Some(backend)), admitted);
    Refusal {
        backend_from_probe,
        admitted,
    }
}

async fn gather(network: &Network, subject: &Subject, failure: &ProbeFailure, depth: Depth) -> Evidence {
    let backend = subject.backend.ip();
    let tunnel = look_at_tunnel(network, subject).await;
    let route = network.route_to(backend, Some(subject.probe_source)).await;
    let mut evidence = Evidence {
        failure: failure.clone(),
        tunnel,
        route,
        egress: None,
        own_address: None,
        neighbour: None,
        router_from_own: Echo::NotTried,
        router_from_probe: Echo::NotTried,
        backend_from_own: Echo::NotTried,
        backend_from_probe: Echo::NotTried,
    };
    let Ok(route) = evidence.route else {
        return evidence;
    };
    evidence.egress = network.interface_by_index(route.interface).await.ok().flatten();
    let Some(egress) = evidence.egress.as_ref().filter(|egress| egress.is_running()) else {
        return evidence;
    };
    evidence.own_address = own_address(network, subject, &route).await;

    // Resolved by the kernel's own request first: one that a packet from the pool causes carries the pool's
    // address, which a router without a route back to it may not answer.
    let next_hop = route.next_hop(backend);
    if egress.has_neighbours {
        // If it cannot be asked, the state below will say so.
        let _ = network.resolve_neighbour(route.interface, next_hop).await;
    }
    let from_own = evidence.own_address.map(Pinger::new);
    let from_probe = Pinger::new(subject.probe_source);
    let ask_own = async |target| match &from_own {
        Some(pinger) => pinger.ask(target).await,
        None => Echo::NotTried,
    };
    let search_from_own = async || match &from_own {
        Some(pinger) => pinger.search(Some(backend)).await,
        None => Echo::NotTried,
    };
    (
        evidence.router_from_own,
        evidence.backend_from_own,
        evidence.router_from_probe,
        evidence.backend_from_probe,
    ) = tokio::join!(
        ask_own(route.gateway),
        ask_own(Some(backend)),
        from_probe.ask(route.gateway),
        from_probe.ask(Some(backend)),
    );
    if depth == Depth::Thorough && evidence.may_be_searched_for() {
        // From both: the probes themselves may have used up what the router says to the probe address
        // (`icmp_ratelimit`, by address).
        (evidence.backend_from_own, evidence.backend_from_probe) =
            tokio::join!(search_from_own(), from_probe.search(Some(backend)));
    }
    if egress.has_neighbours {
        let neighbour = network.neighbour(route.interface, next_hop).await.ok().flatten();
        evidence.neighbour = neighbour.map(|neighbour| neighbour.state);
    }
    evidence
}

/// The address that this gateway itself would use on the way to the backend.
async fn own_address(network: &Network, subject: &Subject, route: &Route) -> Option<IpAddr> {
    let is_own = |address: &IpAddr| *address != subject.probe_source;
    let chosen = network
        .route_to(subject.backend.ip(), None)
        .await
        .ok()
        .and_then(|route| route.source);
    if let Some(chosen) = chosen.filter(is_own) {
        return Some(chosen);
    }
    let addresses = network.addresses(route.interface).await.ok()?;
    addresses.iter().map(IpNet::addr).find(is_own)
}

async fn look_at_tunnel(network: &Network, subject: &Subject) -> Option<TunnelEvidence> {
    let name = subject.tunnel()?;
    let interface = network.interface(name).await.ok()?;
    let likely_router = match &interface {
        Some(interface) => likely_router(network, interface).await,
        None => None,
    };
    Some(TunnelEvidence {
        interface,
        likely_router,
    })
}

/// The router behind a tunnel whose route is gone: the only neighbour there, or the only other address of a
/// prefix that holds two.
async fn likely_router(network: &Network, tunnel: &Interface) -> Option<IpAddr> {
    let prefixes = network.addresses(tunnel.index).await.ok()?;
    let on_link = |address: IpAddr| prefixes.iter().any(|prefix| prefix.contains(&address));
    let neighbours = network.neighbours(tunnel.index).await.ok()?;
    let mut known = neighbours.iter().filter(|neighbour| neighbour.state.is_usable());
    if let (Some(only), None) = (known.next(), known.next())
        && on_link(only.address)
    {
        return Some(only.address);
    }
    let [prefix] = prefixes.as_slice() else {
        return None;
    };
    let mut others = prefix.hosts().take(3).filter(|host| *host != prefix.addr());
    match (others.next(), others.next()) {
        (Some(only), None) if prefix.prefix_len() >= prefix.max_prefix_len() - 2 => Some(only),
        _ => None,
    }
}
