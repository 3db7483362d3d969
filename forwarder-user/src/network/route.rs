//! Where the kernel would send a packet.

use std::net::Ipv4Addr;

use nix::errno::Errno;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
};
use thiserror::Error as ThisError;

use super::{Network, errno, failed};
use crate::error::Error;

/// How packets to one destination leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Number of the interface they leave through; for a local destination, of `lo`.
    pub interface: u32,
    /// The router; `None` if the destination is on the link.
    pub gateway: Option<Ipv4Addr>,
    /// The source address that the kernel would choose (or was asked about).
    pub source: Option<Ipv4Addr>,
    /// The destination is an address of this host.
    pub is_local: bool,
}

impl Route {
    /// Whom to resolve on the link for packets to `destination`: the router, or the destination itself.
    #[must_use]
    pub fn next_hop(&self, destination: Ipv4Addr) -> Ipv4Addr {
        self.gateway.unwrap_or(destination)
    }
}

/// Why the kernel would not send a packet. Displays as one clause.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum RouteError {
    /// No route matches (ENETUNREACH).
    #[error("no route matches")]
    NoRoute,
    /// A route of type `unreachable` matches (EHOSTUNREACH).
    #[error("the route is of type unreachable")]
    Unreachable,
    /// A route of type `prohibit` matches (EACCES).
    #[error("the route is of type prohibit")]
    Prohibited,
    /// A route of type `blackhole` matches (EINVAL).
    #[error("the route is of type blackhole")]
    Blackhole,
    /// The address to send from is not one of this host.
    #[error("the source address {0} is not an address of this host")]
    SourceNotLocal(Ipv4Addr),
    /// The question failed.
    #[error("{}", .0.what)]
    Failed(Error),
}

impl Network {
    /// Asks the kernel which way a packet to `destination` goes, through its rules and tables.
    ///
    /// `from` is the source address that the packet has, which must be one of this host's; `None` lets the kernel
    /// choose. With several next hops for one route the kernel names one of them.
    pub async fn route_to(&self, destination: Ipv4Addr, from: Option<Ipv4Addr>) -> Result<Route, RouteError> {
        let outcome = self.look_up(destination, from, None).await;
        // A source that is not ours gives ENETUNREACH (EINVAL on older kernels), as does a missing route.
        if let (Err(RouteError::NoRoute | RouteError::Blackhole), Some(source)) = (&outcome, from) {
            let source_is_local = self
                .look_up(source, None, None)
                .await
                .is_ok_and(|route: Route| route.is_local);
            if !source_is_local {
                return Err(RouteError::SourceNotLocal(source));
            }
        }
        outcome
    }

    /// Asks the kernel which way it forwards a packet from `source` to `destination` that comes in by the interface
    /// with number `interface`.
    ///
    /// Where the kernel does not forward, or validates sources and finds this one wrong, the answer is an error of
    /// its own: [`RouteError::Unreachable`], [`RouteError::Failed`].
    pub async fn forwarded_route(
        &self,
        destination: Ipv4Addr,
        source: Ipv4Addr,
        interface: u32,
    ) -> Result<Route, RouteError> {
        self.look_up(destination, Some(source), Some(interface)).await
    }

    async fn look_up(
        &self,
        destination: Ipv4Addr,
        from: Option<Ipv4Addr>,
        by: Option<u32>,
    ) -> Result<Route, RouteError> {
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(destination, 32);
        if let Some(from) = from {
            builder = builder.source_prefix(from, 32);
        }
        if let Some(by) = by {
            builder = builder.input_interface(by);
        }
        let what = format_args!("look up the route to {destination}").to_string();
        let answers = self.handle.route().get(builder.build()).execute();
        match super::one(answers, Errno::ENETUNREACH).await {
            Ok(Some(message)) => parse(&message, destination).map_err(RouteError::Failed),
            Ok(None) => Err(RouteError::NoRoute),
            Err(error) => Err(match errno(&error) {
                Some(Errno::EHOSTUNREACH) => RouteError::Unreachable,
                Some(Errno::EACCES) => RouteError::Prohibited,
                Some(Errno::EINVAL) => RouteError::Blackhole,
                _ => RouteError::Failed(failed(what, &error)),
            }),
        }
    }
}

fn parse(message: &RouteMessage, destination: Ipv4Addr) -> Result<Route, Error> {
    let mut interface = None;
    let mut gateway = None;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address))
            | RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(*address),
            RouteAttribute::Via(via) => {
                return Err(Error::failed(format!(
                    "the route to {destination} has a next hop that is not IPv4 ({via:?})"
                ))
                .hint("give the route an IPv4 next hop"));
            }
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(*address),
            _ => {}
        }
    }
    let interface = interface
        .ok_or_else(|| Error::failed(format!("the kernel's route to {destination} names no interface")))?;
    Ok(Route {
        interface,
        gateway,
        source,
        is_local: message.header.kind == RouteType::Local,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip, set_sysctl};

    #[test]
    fn tells_every_kind_of_route() {
        in_namespace(async {
            ip("link set lo up");
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            ip("address add 10.7.0.1/24 dev fa");
            ip("address add 100.64.0.1/32 dev lo");
            ip("route add 192.168.1.0/24 via 10.7.0.2");
            ip("route add blackhole 192.168.2.0/24");
            ip("route add prohibit 192.168.3.0/24");
            ip("route add unreachable 192.168.4.0/24");
            ip("route add 192.168.5.0/24 via inet6 fe80::2 dev fa");
            let network = Network::open().unwrap();
            let fa = network.interface("fa").await.unwrap().unwrap().index;
            let own = Ipv4Addr::new(10, 7, 0, 1);
            let pool = Ipv4Addr::new(100, 64, 0, 1);
            let router = Ipv4Addr::new(10, 7, 0, 2);
            let remote = |net, host| Ipv4Addr::new(192, 168, net, host);

            let on_link = network.route_to(router, None).await.unwrap();
            assert_eq!(
                on_link,
                Route {
                    interface: fa,
                    gateway: None,
                    source: Some(own),
                    is_local: false
                }
            );
            assert_eq!(on_link.next_hop(router), router);

            let routed = network.route_to(remote(1, 9), None).await.unwrap();
            assert_eq!(
                routed,
                Route {
                    interface: fa,
                    gateway: Some(router),
                    source: Some(own),
                    is_local: false
                }
            );
            assert_eq!(routed.next_hop(remote(1, 9)), router);
            let from_pool = network.route_to(remote(1, 9), Some(pool)).await.unwrap();
            assert_eq!((from_pool.interface, from_pool.gateway), (fa, Some(router)));

            assert!(network.route_to(own, None).await.unwrap().is_local);

            for (destination, expected) in [
                (remote(2, 9), RouteError::Blackhole),
                (remote(3, 9), RouteError::Prohibited),
                (remote(4, 9), RouteError::Unreachable),
                (Ipv4Addr::new(172, 16, 0, 1), RouteError::NoRoute),
            ] {
                assert_eq!(network.route_to(destination, None).await, Err(expected.clone()));
                assert_eq!(network.route_to(destination, Some(pool)).await, Err(expected));
            }
            ip("rule add iif fb to 192.168.1.0/24 lookup 77");
            ip("route add unreachable default table 77");
            set_sysctl("ip_forward", "1");
            let fb = network.interface("fb").await.unwrap().unwrap().index;
            let client = Ipv4Addr::new(100, 64, 0, 7);
            let forwarded = network.forwarded_route(remote(1, 9), client, fa).await.unwrap();
            assert_eq!((forwarded.interface, forwarded.gateway), (fa, Some(router)));
            assert_eq!(
                network.forwarded_route(remote(1, 9), client, fb).await,
                Err(RouteError::Unreachable)
            );
            let foreign = Ipv4Addr::new(100, 64, 0, 99);
            assert_eq!(
                network.route_to(remote(1, 9), Some(foreign)).await,
                Err(RouteError::SourceNotLocal(foreign))
            );
            let failure = network.route_to(remote(5, 9), None).await.unwrap_err();
            assert!(failure.to_string().contains("not IPv4"), "{failure}");
        });
    }
}
