//! Neighbours: the link addresses of next hops, by ARP or neighbour discovery.

use std::{fmt, net::IpAddr};

use futures_util::StreamExt as _;
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
            NeighbourState as KernelState,
        },
    },
};

use super::{Network, errno, failed, family, one};
use crate::error::Error;

/// An entry of the kernel's neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub state: NeighbourState,
    /// Where frames to it go. Valid only while the state [is usable](NeighbourState::is_usable).
    pub mac: Option<[u8; 6]>,
}

/// What the kernel knows of a neighbour (NUD_* of linux/neighbour.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourState {
    /// An entry without a state: nobody asked yet.
    None,
    /// Asked, no answer yet.
    Incomplete,
    /// Confirmed within the last half minute or so.
    Reachable,
    /// Known, to be confirmed when next used.
    Stale,
    /// Known, in use, about to be confirmed.
    Delay,
    /// Known, being confirmed.
    Probe,
    /// Asked, and nobody answered.
    Failed,
    /// Set by the operator.
    Permanent,
    /// The interface has no address resolution.
    NoArp,
}

impl NeighbourState {
    /// Whether the kernel sends to it now (its NUD_VALID).
    #[must_use]
    pub fn is_usable(self) -> bool {
        match self {
            Self::Reachable | Self::Stale | Self::Delay | Self::Probe | Self::Permanent | Self::NoArp => true,
            Self::None | Self::Incomplete | Self::Failed => false,
        }
    }
}

impl From<KernelState> for NeighbourState {
    fn from(state: KernelState) -> Self {
        match state {
            KernelState::Incomplete => Self::Incomplete,
            KernelState::Reachable => Self::Reachable,
            KernelState::Stale => Self::Stale,
            KernelState::Delay => Self::Delay,
            KernelState::Probe => Self::Probe,
            KernelState::Failed => Self::Failed,
            KernelState::Permanent => Self::Permanent,
            KernelState::Noarp => Self::NoArp,
            // The states above are all that the kernel has.
            _ => Self::None,
        }
    }
}

impl fmt::Display for NeighbourState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Incomplete => "incomplete",
            Self::Reachable => "reachable",
            Self::Stale => "stale",
            Self::Delay => "delay",
            Self::Probe => "probe",
            Self::Failed => "failed",
            Self::Permanent => "permanent",
            Self::NoArp => "noarp",
        })
    }
}

impl Neighbour {
    /// `None` for entries that are not of IP (bridge forwarding entries).
    pub(super) fn from_message(message: &NeighbourMessage) -> Option<Self> {
        if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
            return None;
        }
        let mut address = None;
        let mut mac = None;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(inet)) => {
                    address = Some((*inet).into());
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(inet6)) => {
                    address = Some((*inet6).into());
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
                _ => {}
            }
        }
        Some(Self {
            address: address?,
            state: message.header.state.into(),
            mac,
        })
    }
}

fn is_of_every_link(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

impl Network {
    /// The neighbour `address` on the interface with number `interface`; `None` if the kernel has no entry.
    pub async fn neighbour(&self, interface: u32, address: IpAddr) -> Result<Option<Neighbour>, Error> {
        let what = format_args!("look up neighbour {address}").to_string();
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = interface;
        message
            .attributes
            .push(NeighbourAttribute::Destination(match address {
                IpAddr::V4(address) => NeighbourAddress::Inet(address),
                IpAddr::V6(address) => NeighbourAddress::Inet6(address),
            }));
        // rtnetlink itself only dumps the whole table; the kernel (since 5.0) answers for one entry.
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(message));
        request.header.flags = NLM_F_REQUEST;
        let answers = self
            .handle
            .clone()
            .request(request)
            .map_err(|error| failed(&what, &error))?
            .map(|answer| match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry)) => Ok(entry),
                NetlinkPayload::Error(error) => Err(rtnetlink::Error::NetlinkError(error)),
                _ => Err(rtnetlink::Error::UnexpectedMessage(answer)),
            });
        let entry = one(answers, Errno::ENOENT)
            .await
            .map_err(|error| failed(&what, &error))?;
        Ok(entry.as_ref().and_then(Neighbour::from_message))
    }

    /// All neighbours on the interface with number `interface`, but for groups and link-local addresses of IPv6: every
    /// link has those.
    pub async fn neighbours(&self, interface: u32) -> Result<Vec<Neighbour>, Error> {
        let entries = self
            .all(|handle| handle.neighbours().get().execute())
            .await
            .map_err(|error| failed("list the neighbours", &error))?;
        let of_interface = entries.iter().filter(|entry| entry.header.ifindex == interface);
        let neighbours = of_interface.filter_map(Neighbour::from_message);
        Ok(neighbours
            .filter(|neighbour| !is_of_every_link(neighbour.address))
            .collect())
    }

    /// Asks the kernel to resolve `address` on the interface with number `interface`, or to confirm it if it is
    /// stale, as if a packet were to be sent there. Does not wait for the outcome, which [`Network::watch`]
    /// reports. Does nothing to a neighbour that is reachable or being asked.
    ///
    /// # Errors
    /// The interface does not exist or is down.
    pub async fn resolve_neighbour(&self, interface: u32, address: IpAddr) -> Result<(), Error> {
        let request = self
            .handle
            .neighbours()
            .add(interface, address)
            .state(KernelState::None)
            .flags(NeighbourFlags::Use)
            // Without it an existing entry is an error.
            .replace();
        match request.execute().await {
            Err(error) if errno(&error) == Some(Errno::ENETDOWN) => Err(Error::failed(format!(
                "cannot resolve neighbour {address}: the interface is down"
            ))),
            Err(error) => Err(failed(format_args!("resolve neighbour {address}"), &error)),
            Ok(()) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use futures_util::{FutureExt as _, future};

    use super::*;
    use crate::network::testing::{in_namespace, ip, veth_with_answering_peer};

    #[test]
    fn resolves_who_is_there_and_fails_who_is_not() {
        in_namespace(async {
            let interface = veth_with_answering_peer("fa", "10.7.0.1/24", "10.7.0.2/24");
            let network = Network::open().unwrap();
            let index = network.interface(interface).await.unwrap().unwrap().index;
            let mut watch = network.watch().await.unwrap();
            let present = IpAddr::from([10, 7, 0, 2]);
            let absent = IpAddr::from([10, 7, 0, 3]);
            assert_eq!(network.neighbour(index, present).await.unwrap(), None);

            network.resolve_neighbour(index, present).await.unwrap();
            network.resolve_neighbour(index, absent).await.unwrap();
            while !network
                .neighbour(index, present)
                .await
                .unwrap()
                .unwrap()
                .state
                .is_usable()
            {
                watch.changed().await.unwrap();
            }
            let peer = network.interface("fa-peer").await.unwrap().unwrap();
            let resolved = network.neighbour(index, present).await.unwrap().unwrap();
            assert_eq!((resolved.address, resolved.mac), (present, peer.mac));
            // Asking again changes nothing.
            network.resolve_neighbour(index, present).await.unwrap();
            assert!(
                network
                    .neighbour(index, present)
                    .await
                    .unwrap()
                    .unwrap()
                    .state
                    .is_usable()
            );

            let asked = network.neighbour(index, absent).await.unwrap().unwrap();
            assert!(!asked.state.is_usable(), "{asked:?}");
            assert_eq!(network.neighbours(index).await.unwrap().len(), 2);
        });
    }

    #[test]
    fn many_may_ask_for_lists_at_the_same_time_and_stop_waiting() {
        in_namespace(async {
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            // More than the kernel answers at once, which is 32 kB.
            let entries: String = (0..1000)
                .map(|n| {
                    let (high, low) = (n / 250, n % 250 + 1);
                    format!("neigh add 10.7.{high}.{low} lladdr 02:00:00:00:{high:02x}:{low:02x} dev fa nud permanent\n")
                })
                .collect();
            let mut batch = tempfile::NamedTempFile::new().unwrap();
            batch.write_all(entries.as_bytes()).unwrap();
            ip(&format!("-batch {}", batch.path().display()));
            let network = Network::open().unwrap();
            let index = network.interface("fa").await.unwrap().unwrap().index;
            for _ in 0..20 {
                let abandoned = network.neighbours(index);
                assert!(abandoned.now_or_never().is_none());
                // One after the other, so that the second question comes when the first has been asked, and before the
                // runtime has looked whether there are answers.
                let all = (0..8).map(async |turns| {
                    for _ in 0..turns {
                        tokio::task::yield_now().await;
                    }
                    network.neighbours(index).await
                });
                for listed in future::join_all(all).await {
                    assert_eq!(listed.unwrap().len(), 1000);
                }
            }
        });
    }

    #[test]
    fn permanent_entries_are_usable_and_a_missing_interface_is_an_error() {
        in_namespace(async {
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            ip("neigh add 10.7.0.9 lladdr 02:00:00:00:00:09 dev fa nud permanent");
            let network = Network::open().unwrap();
            let index = network.interface("fa").await.unwrap().unwrap().index;
            let neighbour = network
                .neighbour(index, IpAddr::from([10, 7, 0, 9]))
                .await
                .unwrap()
                .unwrap();
            assert_eq!(neighbour.state, NeighbourState::Permanent);
            assert_eq!(neighbour.mac, Some([2, 0, 0, 0, 0, 9]));
            assert!(
                network
                    .resolve_neighbour(9999, IpAddr::from([10, 7, 0, 9]))
                    .await
                    .is_err()
            );
        });
    }
}
