//! Where the kernel would send a packet.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use nix::errno::Errno;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType, RouteVia},
};
use thiserror::Error as ThisError;

use super::{Network, errno, failed, host_bits};
use crate::error::Error;

/// How packets to one destination leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Number of the interface they leave through; for a local destination, of `lo`.
    pub interface: u32,
    /// The router; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The source address that the kernel would choose (or was asked about).
    pub source: Option<IpAddr>,
    /// The destination is an address of this host.
    pub is_local: bool,
}

impl Route {
    /// Whom to resolve on the link for packets to `destination`: the router, or the destination itself.
    #[must_use]
    pub fn next_hop(&self, destination: IpAddr) -> IpAddr {
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
    SourceNotLocal(IpAddr),
    /// The question failed.
    #[error("{}", .0.what)]
    Failed(Error),
}

impl Network {
    /// Asks the kernel which way a packet to `destination` goes, through its rules and tables.
    ///
    /// `from` is the source address that the packet has, which must be one of this host's; `None` lets the kernel
    /// choose. With several next hops for one route the kernel names one of them.
    pub async fn route_to(&self, destination: IpAddr, from: Option<IpAddr>) -> Result<Route, RouteError> {
        let outcome = self.look_up(destination, from, None).await;
        // An IPv4 source that is not ours gives ENETUNREACH (EINVAL on older kernels), as does a missing route. An
        // IPv6 source is not looked at.
        if let (Err(RouteError::NoRoute | RouteError::Blackhole) | Ok(_), Some(source)) = (&outcome, from)
            && (outcome.is_err() || source.is_ipv6())
        {
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
        destination: IpAddr,
        source: IpAddr,
        interface: u32,
    ) -> Result<Route, RouteError> {
        self.look_up(destination, Some(source), Some(interface)).await
    }

    /// Whether the route to `destination`, if there is one, has one next hop, which all packets take. `false` as well where
    /// the kernel does not answer.
    pub async fn has_one_next_hop(&self, destination: Ipv4Addr) -> bool {
        let Ok(mut message) = question(destination.into(), None, None) else {
            return false;
        };
        // The route itself, instead of what it says about one packet.
        message.header.flags |= RouteFlags::FibMatch;
        let mut answers = std::pin::pin!(self.handle.route().get(message).execute());
        let route = match answers.try_next().await {
            Ok(Some(route)) => route,
            Ok(None) => return false,
            // Nothing is sent there; see `look_up`.
            Err(error) => {
                let discards = [
                    Errno::ENETUNREACH,
                    Errno::EHOSTUNREACH,
                    Errno::EACCES,
                    Errno::EINVAL,
                ];
                return errno(&error).is_some_and(|errno| discards.contains(&errno));
            }
        };
        // It names an interface, or several next hops, or the number of an object that may have several.
        let has = |is_wanted: fn(&RouteAttribute) -> bool| route.attributes.iter().any(is_wanted);
        has(|attribute| matches!(attribute, RouteAttribute::Oif(_)))
            && !has(|attribute| matches!(attribute, RouteAttribute::MultiPath(_)))
    }

    async fn look_up(
        &self,
        destination: IpAddr,
        from: Option<IpAddr>,
        by: Option<u32>,
    ) -> Result<Route, RouteError> {
        let what = format_args!("look up the route to {destination}").to_string();
        let message = question(destination, from, by)
            .map_err(|error| RouteError::Failed(Error::failed(format!("cannot {what}: {error}"))))?;
        let answers = self.handle.route().get(message).execute();
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

/// What the kernel is asked.
///
/// # Errors
/// Source and destination are of different families.
fn question(destination: IpAddr, from: Option<IpAddr>, by: Option<u32>) -> Result<RouteMessage, String> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination, host_bits(destination))
        .map_err(|error| error.to_string())?;
    if let Some(from) = from {
        builder = builder
            .source_prefix(from, host_bits(from))
            .map_err(|error| error.to_string())?;
    }
    if let Some(by) = by {
        builder = builder.input_interface(by);
    }
    Ok(builder.build())
}

fn parse(message: &RouteMessage, destination: IpAddr) -> Result<Route, Error> {
    let mut interface = None;
    let mut gateway = None;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address))
            | RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(address))
            | RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(via) => {
                return Err(Error::failed(format!(
                    "the route to {destination} has a next hop that is not IP ({via:?})"
                ))
                .hint("give the route an IP next hop"));
            }
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some((*address).into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some((*address).into()),
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
    fn tells_routes_with_several_next_hops_and_rules_that_look_at_more_than_destinations() {
        in_namespace(async {
            ip("link set lo up");
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            ip("address add 10.7.0.1/24 dev fa");
            ip("route add 192.168.1.0/24 via 10.7.0.2");
            ip("route add 192.168.2.0/24 nexthop via 10.7.0.2 nexthop via 10.7.0.3");
            ip("nexthop add id 2 via 10.7.0.2 dev fa");
            ip("nexthop add id 3 via 10.7.0.3 dev fa");
            ip("nexthop add id 9 group 2/3");
            ip("route add 192.168.3.0/24 nhid 9");
            ip("route add 192.168.4.0/24 nhid 2");
            ip("route add unreachable 192.168.5.0/24");
            let network = Network::open().unwrap();
            for (net, has_one) in [(1, true), (2, false), (3, false), (4, true), (5, true), (6, true)] {
                let destination = Ipv4Addr::new(192, 168, net, 1);
                assert_eq!(
                    network.has_one_next_hop(destination).await,
                    has_one,
                    "{destination}"
                );
            }
            // As an operator may set it: the kernel then names the object and nothing else.
            set_sysctl("nexthop_compat_mode", "0");
            assert!(!network.has_one_next_hop(Ipv4Addr::new(192, 168, 3, 1)).await);

            assert!(network.routes_by_destination().await.unwrap());
            ip("rule add to 192.168.9.0/24 lookup 9");
            assert!(network.routes_by_destination().await.unwrap());
            for rule in [
                "from 10.7.0.0/24 lookup 9",
                "fwmark 1 lookup 9",
                "ipproto tcp lookup 9",
            ] {
                ip(&format!("rule add {rule}"));
                assert!(!network.routes_by_destination().await.unwrap(), "{rule}");
                ip(&format!("rule del {rule}"));
            }
        });
    }

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
            let own = IpAddr::from([10, 7, 0, 1]);
            let pool = IpAddr::from([100, 64, 0, 1]);
            let router = IpAddr::from([10, 7, 0, 2]);
            let remote = |net, host| IpAddr::from([192, 168, net, host]);

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
                (IpAddr::from([172, 16, 0, 1]), RouteError::NoRoute),
            ] {
                assert_eq!(network.route_to(destination, None).await, Err(expected.clone()));
                assert_eq!(network.route_to(destination, Some(pool)).await, Err(expected));
            }
            ip("rule add iif fb to 192.168.1.0/24 lookup 77");
            ip("route add unreachable default table 77");
            set_sysctl("ip_forward", "1");
            let fb = network.interface("fb").await.unwrap().unwrap().index;
            let client = IpAddr::from([100, 64, 0, 7]);
            let forwarded = network.forwarded_route(remote(1, 9), client, fa).await.unwrap();
            assert_eq!((forwarded.interface, forwarded.gateway), (fa, Some(router)));
            assert_eq!(
                network.forwarded_route(remote(1, 9), client, fb).await,
                Err(RouteError::Unreachable)
            );
            let foreign = IpAddr::from([100, 64, 0, 99]);
            assert_eq!(
                network.route_to(remote(1, 9), Some(foreign)).await,
                Err(RouteError::SourceNotLocal(foreign))
            );
            let mixed = network.route_to(remote(5, 9), None).await.unwrap();
            assert_eq!(mixed.gateway, Some("fe80::2".parse().unwrap()));
        });
    }

    #[test]
    fn tells_every_kind_of_ipv6_route() {
        in_namespace(async {
            ip("link set lo up");
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            ip("address add fd07::1/64 dev fa nodad");
            ip("address add fd64::1/128 dev lo nodad");
            ip("route add fd00:1::/64 via fd07::2");
            ip("route add blackhole fd00:2::/64");
            ip("route add prohibit fd00:3::/64");
            ip("route add unreachable fd00:4::/64");
            let network = Network::open().unwrap();
            let fa = network.interface("fa").await.unwrap().unwrap().index;
            let address = |text: &str| -> IpAddr { text.parse().unwrap() };
            let (own, pool, router) = (address("fd07::1"), address("fd64::1"), address("fd07::2"));

            let routed = network.route_to(address("fd00:1::9"), None).await.unwrap();
            assert_eq!(
                (routed.interface, routed.gateway, routed.source),
                (fa, Some(router), Some(own))
            );
            let from_pool = network.route_to(address("fd00:1::9"), Some(pool)).await.unwrap();
            assert_eq!(from_pool.next_hop(address("fd00:1::9")), router);
            assert!(network.route_to(own, None).await.unwrap().is_local);
            for (destination, expected) in [
                ("fd00:2::9", RouteError::Blackhole),
                ("fd00:3::9", RouteError::Prohibited),
                ("fd00:4::9", RouteError::Unreachable),
                ("2001:db8::1", RouteError::NoRoute),
            ] {
                let found = network.route_to(address(destination), Some(pool)).await;
                assert_eq!(found, Err(expected), "{destination}");
            }
            let foreign = address("fd64::99");
            assert_eq!(
                network.route_to(address("fd00:1::9"), Some(foreign)).await,
                Err(RouteError::SourceNotLocal(foreign))
            );
        });
    }
}
