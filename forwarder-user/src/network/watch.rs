//! Says when the network changed, so that whoever depends on it asks again.
//!
//! The kernel's notifications are hints here, not the truth: a batch of them becomes one [`Changes`], whose
//! reader looks up what it needs through [`Network`]. That is immune to lost and reordered
//! messages, and a storm of route updates costs one look at the routes. Two notes on what the kernel does
//! *not* say: when a link goes down, it flushes the IPv4 routes through it without a word, so every link
//! change counts as a route change, and so do address changes.
//!
//! Neighbours change state all the time. Reported is only what a sender of frames would notice: an entry
//! became usable or unusable, or its MAC address changed.

use std::{collections::HashMap, net::IpAddr};

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{AddressFamily, RouteNetlinkMessage, neighbour::NeighbourMessage},
};

use super::{AbortOnDrop, Interface, Neighbour, NeighbourState, Network, TunnelDevice};
use crate::error::Error;

/// What happened since the last time. At least one field says something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Links that went up, down or away, in order; the last one about a link is its state now.
    pub links: Vec<LinkChange>,
    /// Routes or rules may have changed.
    pub routes: bool,
    /// Addresses of this host changed.
    pub addresses: bool,
    /// Neighbours became usable or unusable, or moved to another MAC address.
    pub neighbours: bool,
    /// Tunnel devices were changed, or where they send to.
    pub tunnels: bool,
    /// The kernel dropped notifications as they came too fast: anything may have changed, links too.
    pub overrun: bool,
}

impl Changes {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A link's new state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkChange {
    pub name: String,
    /// The kernel's number of the interface.
    pub index: u32,
    pub state: LinkState,
}

/// Whether a link carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Up and with carrier. New links that come up are reported too.
    Up,
    /// Set down, or lost its carrier.
    Down,
    /// Deleted, renamed or moved to another namespace.
    Gone,
}

type Messages = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send + Unpin>;

/// A subscription to changes; dropping it ends it.
pub struct Watch {
    messages: Messages,
    seen: Seen,
    _connection: AbortOnDrop,
}

impl Network {
    /// Subscribes to changes of links, addresses, routes, rules and neighbours. What changes after this returned is
    /// reported.
    ///
    /// Like [`Network::open`], it watches the namespace of the calling thread.
    pub async fn watch(&self) -> Result<Watch, Error> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _handle, messages) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|error| Error::host(format!("cannot watch the network: {error}")))?;
        let connection = AbortOnDrop(tokio::spawn(connection).abort_handle());
        // Subscribed first, listed second: a change between the two is seen twice rather than never.
        let mut seen = Seen::default();
        for device in self.tunnel_devices().await? {
            seen.devices.insert(device.index, device);
        }
        for interface in self.interfaces().await? {
            seen.links
                .insert(interface.index, (interface.name.clone(), interface.is_running()));
        }
        let messages = Box::new(messages.map(|(message, _sender)| message));
        Ok(Watch {
            messages,
            seen,
            _connection: connection,
        })
    }
}

impl Watch {
    /// Waits for a change and returns it together with all others that the kernel has reported by then. `None` when
    /// the kernel closed the subscription, which it has no reason to.
    ///
    /// # Cancellation
    /// Loses nothing when it is dropped while waiting.
    pub async fn changed(&mut self) -> Option<Changes> {
        loop {
            let mut changes = Changes::default();
            let first = self.messages.next().await?;
            self.seen.note(&first, &mut changes);
            while let Some(Some(message)) = self.messages.next().now_or_never() {
                self.seen.note(&message, &mut changes);
            }
            if !changes.is_empty() {
                return Some(changes);
            }
        }
    }
}

/// What was reported last, to tell changes from repetitions.
#[derive(Default)]
struct Seen {
    /// Name and whether it carries traffic, by interface number.
    links: HashMap<u32, (String, bool)>,
    /// Tunnel devices as they are now, by interface number.
    devices: HashMap<u32, TunnelDevice>,
    /// Neighbours by interface number and address. The kernel bounds its table, and thereby this one.
    neighbours: HashMap<(u32, IpAddr), Reach>,
}

/// What a sender of frames knows of a neighbour.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// At this MAC address, where the interface has any.
    Usable(Option<[u8; 6]>),
    Unreachable,
}

impl Seen {
    fn note(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>, changes: &mut Changes) {
        let message = match &message.payload {
            NetlinkPayload::InnerMessage(message) => message,
            NetlinkPayload::Overrun(_) => {
                changes.overrun = true;
                return;
            }
            _ => return,
        };
        match message {
            // The bridge code sends its own kind of link messages under its own family.
            RouteNetlinkMessage::NewLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.note_link(&Interface::from_message(link), changes);
                if let Some(device) = TunnelDevice::from_message(link) {
                    let before = self.devices.insert(device.index, device);
                    changes.tunnels |= before.as_ref() != self.devices.get(&link.header.index);
                }
            }
            RouteNetlinkMessage::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.note_link_gone(link.header.index, changes);
                changes.tunnels |= self.devices.remove(&link.header.index).is_some();
            }
            // Forwarding entries: the kernel reports those that are new, moved or gone.
            RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry)
                if entry.header.family == AddressFamily::Bridge =>
            {
                changes.tunnels |= self.devices.contains_key(&entry.header.ifindex);
            }
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
                changes.addresses = true;
                changes.routes = true;
            }
            RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_)
            | RouteNetlinkMessage::NewRule(_)
            | RouteNetlinkMessage::DelRule(_) => changes.routes = true,
            RouteNetlinkMessage::NewNeighbour(entry) => self.note_neighbour(entry, true, changes),
            RouteNetlinkMessage::DelNeighbour(entry) => self.note_neighbour(entry, false, changes),
            _ => {}
        }
    }

    fn note_link(&mut self, interface: &Interface, changes: &mut Changes) {
        let Interface { index, name, .. } = interface;
        if self
            .links
            .get(index)
            .is_some_and(|(old_name, _)| old_name != name)
        {
            self.note_link_gone(*index, changes);
        }
        let running = interface.is_running();
        let before = self.links.insert(*index, (name.clone(), running));
        if before.map(|(_, was_running)| was_running) == Some(running) {
            return;
        }
        let state = if running { LinkState::Up } else { LinkState::Down };
        changes.links.push(LinkChange {
            name: name.clone(),
            index: *index,
            state,
        });
        changes.routes = true;
    }

    fn note_link_gone(&mut self, index: u32, changes: &mut Changes) {
        if let Some((name, _)) = self.links.remove(&index) {
            changes.links.push(LinkChange {
                name,
                index,
                state: LinkState::Gone,
            });
            changes.routes = true;
            let known = self.neighbours.len();
            self.neighbours.retain(|(interface, _), _| *interface != index);
            changes.neighbours |= self.neighbours.len() != known;
        }
    }

    fn note_neighbour(&mut self, entry: &NeighbourMessage, exists: bool, changes: &mut Changes) {
        let Some(neighbour) = Neighbour::from_message(entry) else {
            return;
        };
        let key = (entry.header.ifindex, neighbour.address);
        let before = self.neighbours.get(&key).copied();
        changes.neighbours |= if !exists {
            self.neighbours.remove(&key);
            // One that was usable before the watch began is not known: its end must count.
            before != Some(Reach::Unreachable)
        } else if neighbour.state.is_usable() {
            self.neighbours.insert(key, Reach::Usable(neighbour.mac)) != Some(Reach::Usable(neighbour.mac))
        } else if neighbour.state == NeighbourState::Failed || before.is_some() {
            self.neighbours.insert(key, Reach::Unreachable) != Some(Reach::Unreachable)
        } else {
            // The first attempt to resolve it is under way.
            false
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    /// Waits until a batch satisfies `wanted`; returns it.
    async fn until(watch: &mut Watch, wanted: impl Fn(&Changes) -> bool) -> Changes {
        loop {
            let changes = watch.changed().await.unwrap();
            if wanted(&changes) {
                return changes;
            }
        }
    }

    fn has_link(changes: &Changes, name: &str, state: LinkState) -> bool {
        changes
            .links
            .iter()
            .any(|link| link.name == name && link.state == state)
    }

    #[test]
    fn links_come_and_go_by_name() {
        in_namespace(async {
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            let network = Network::open().unwrap();
            let mut watch = network.watch().await.unwrap();

            ip("link set fb up");
            let changes = until(&mut watch, |changes| has_link(changes, "fa", LinkState::Up)).await;
            assert!(changes.routes, "a link change is a route change");
            ip("link set fb down");
            until(&mut watch, |changes| has_link(changes, "fa", LinkState::Down)).await;
            ip("link set fa down");
            ip("link set fa name fc");
            until(&mut watch, |changes| has_link(changes, "fa", LinkState::Gone)).await;
            ip("link delete fc");
            until(&mut watch, |changes| has_link(changes, "fc", LinkState::Gone)).await;
        });
    }

    #[test]
    fn many_routes_are_one_change() {
        in_namespace(async {
            ip("link set lo up");
            let network = Network::open().unwrap();
            let mut watch = network.watch().await.unwrap();
            for number in 0..20 {
                ip(&format!("route add blackhole 10.9.{number}.0/24"));
            }
            let changes = watch.changed().await.unwrap();
            assert!(
                changes.routes && changes.links.is_empty() && !changes.neighbours,
                "{changes:?}"
            );
            ip("address add 100.64.0.1/32 dev lo");
            let changes = until(&mut watch, |changes| changes.addresses).await;
            assert!(changes.routes, "{changes:?}");
            // Everything so far has been reported; nothing repeats itself.
            while watch.changed().now_or_never().is_some() {}
            ip("rule add from 100.64.0.0/10 lookup 77");
            assert!(watch.changed().await.unwrap().routes);
        });
    }

    #[test]
    fn neighbours_count_when_usability_or_address_changes() {
        in_namespace(async {
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            let network = Network::open().unwrap();
            let mut watch = network.watch().await.unwrap();
            for change in [
                "neigh add 10.7.0.9 lladdr 02:00:00:00:00:09 dev fa nud stale",
                "neigh replace 10.7.0.9 lladdr 02:00:00:00:00:0a dev fa nud stale",
                "neigh del 10.7.0.9 dev fa",
            ] {
                ip(change);
                until(&mut watch, |changes| changes.neighbours).await;
                while watch.changed().now_or_never().is_some() {}
            }
            ip("neigh add 10.7.0.9 lladdr 02:00:00:00:00:09 dev fa nud stale");
            until(&mut watch, |changes| changes.neighbours).await;
            // Another state of the same usable entry is no change; the route that follows shows that it was seen.
            ip("neigh change 10.7.0.9 lladdr 02:00:00:00:00:09 dev fa nud permanent");
            ip("route add blackhole 10.9.0.0/24");
            let mut reported = watch.changed().await.unwrap();
            while !reported.routes {
                assert!(!reported.neighbours, "{reported:?}");
                reported = watch.changed().await.unwrap();
            }
            assert!(!reported.neighbours, "{reported:?}");
        });
    }
}
