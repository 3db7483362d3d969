//! The host around the data path: links, routes, settings, the probe address.

use std::{collections::HashSet, mem, net::IpAddr};

use forwarder_common::abi::settings::flag;
use tracing::{debug, error, info, warn};

use super::{Agent, start::around};
use crate::{
    config::{Config, PerFamily, RoutingTable},
    error::Error,
    network::{self, LinkState, Network, RpFilter},
};

/// The probe addresses, local while the agent runs.
pub(super) struct ProbeAddresses {
    /// Those that were not there before.
    ours: PerFamily,
}

/// Where the probe addresses are local.
pub const PROBE_INTERFACE: &str = "lo";

impl ProbeAddresses {
    /// Adds the addresses, or takes over those that an earlier agent added.
    pub(super) async fn add(agent: &Agent) -> Result<Self, Error> {
        let wanted = agent.config.snat.probes;
        let left = agent.pins.probe_addresses();
        for address in left.iter().filter(|address| !wanted.has(*address)) {
            agent.network.remove_address(PROBE_INTERFACE, address).await?;
        }
        let mut ours = Vec::new();
        for address in wanted.iter() {
            let is_new = agent.network.add_address(PROBE_INTERFACE, address).await?;
            if is_new || left.has(address) {
                ours.push(address);
            }
        }
        let ours: PerFamily = ours.into_iter().collect();
        agent.pins.note_probe_addresses(ours)?;
        Ok(Self { ours })
    }

    pub(super) async fn remove(self, agent: &Agent) {
        for address in self.ours.iter() {
            if let Err(error) = agent.network.remove_address(PROBE_INTERFACE, address).await {
                error!(%error, "probe address {address} stays behind");
            }
        }
    }
}

impl Agent {
    /// Looks at the host's settings again; logs what is new.
    pub(super) async fn look_for_trouble(&mut self) {
        let mut warnings = match warnings(&self.network, &self.config, &self.links_down).await {
            Ok(warnings) => warnings,
            Err(error) => vec![format!("this host's settings are not known: {error}")],
        };
        warnings.extend_from_slice(&self.hidden_tags);
        for warning in warnings.iter().filter(|warning| !self.warnings.contains(warning)) {
            warn!("{warning}");
        }
        self.warnings = warnings;
    }

    /// Makes every flow ask for its route anew, and says which attached links came or went.
    pub(super) async fn network_changed(&mut self, changes: &network::Changes) -> Result<(), Error> {
        for change in &changes.links {
            if !self
                .attachments
                .iter()
                .any(|attachment| attachment.name == change.name)
            {
                continue;
            }
            match change.state {
                LinkState::Up => {
                    self.links_down.remove(&change.name);
                    info!(interface = change.name, "link up");
                }
                LinkState::Down => {
                    self.links_down.insert(change.name.clone());
                    warn!(interface = change.name, "link down");
                }
                LinkState::Gone => {
                    self.links_down.insert(change.name.clone());
                    error!(
                        interface = change.name,
                        "the interface is gone; restart the agent when it is back"
                    );
                }
            }
        }
        if let Err(error) = self
            .look_around(changes.overrun || !changes.links.is_empty())
            .await
        {
            // What was known before serves meanwhile, and an agent that goes would know no more.
            warn!(%error, "what has changed in the network is not known; asking again in a second");
            self.has_to_look_again = true;
        }
        let has_other_routes =
            changes.routes || changes.addresses || changes.overrun || !changes.links.is_empty();
        if has_other_routes {
            self.look_at_routes().await;
        }
        self.observed.route_generation = self.observed.route_generation.wrapping_add(1);
        self.reconcile()?;
        if has_other_routes {
            self.resolve_next_hops().await;
        }
        let came_up = changes.links.iter().any(|link| link.state == LinkState::Up);
        if changes.addresses || changes.overrun || came_up {
            self.look_where_to_announce(came_up).await;
        }
        Ok(())
    }

    /// Looks at tunnels, and at interfaces where those have changed.
    async fn look_around(&mut self, at_interfaces: bool) -> Result<(), Error> {
        if at_interfaces {
            (self.observed.interfaces, self.hidden_tags) = around(&self.network, &self.attachments).await?;
        }
        self.survey_tunnels().await
    }

    /// Asks the kernel again what it did not answer.
    pub(super) async fn look_again(&mut self) -> Result<(), Error> {
        if !mem::take(&mut self.has_to_look_again) {
            return Ok(());
        }
        let anything = network::Changes {
            overrun: true,
            ..network::Changes::default()
        };
        self.network_changed(&anything).await
    }

    /// Finds out which neighbours are to be told of which addresses; `again`: also those that have been told.
    pub(super) async fn look_where_to_announce(&mut self, again: bool) {
        // Without announcements neighbours find the addresses when they ask, or when what they know is too old.
        if let Err(error) = self.announcer.look(&self.network, &self.config, again).await {
            warn!(%error, "addresses are not announced");
        }
    }

    /// Finds out whether the way to a backend depends on its address alone, so that new flows share it.
    pub(super) async fn look_at_routes(&mut self) {
        self.observed.flags &= !flag::ONE_WAY;
        if self.has_one_way_each().await {
            self.observed.flags |= flag::ONE_WAY;
        }
    }

    async fn has_one_way_each(&self) -> bool {
        // What is not known is not relied on.
        if !self.network.routes_by_destination().await.unwrap_or(false) {
            return false;
        }
        let backends = self
            .config
            .groups
            .values()
            .flat_map(|group| group.backends.values());
        let addresses: HashSet<IpAddr> = backends.map(|backend| backend.address).collect();
        for address in addresses {
            if let IpAddr::V4(address) = address
                && !self.network.has_one_next_hop(address).await
            {
                return false;
            }
        }
        true
    }

    /// Asks the kernel to find out the link addresses of the backends' next hops, before traffic needs them.
    pub(super) async fn resolve_next_hops(&self) {
        let mut asked = HashSet::new();
        for backend in self
            .config
            .groups
            .values()
            .flat_map(|group| group.backends.values())
        {
            let Ok(route) = self.network.route_to(backend.address, None).await else {
                continue;
            };
            let next_hop = (route.interface, route.next_hop(backend.address));
            if asked.insert(next_hop)
                && let Err(error) = self.network.resolve_neighbour(next_hop.0, next_hop.1).await
            {
                debug!(%error, "next hop {} not resolved", next_hop.1);
            }
        }
    }
}

/// What an operator should look at on this host.
async fn warnings(network: &Network, config: &Config, down: &HashSet<String>) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    let (uses_v4, uses_v6) = config.families();
    if uses_v4 && !network.ip_forward()? {
        warnings.push(
            "this host does not forward: traffic to tunnels and unresolved neighbours is dropped; \
             sysctl -w net.ipv4.ip_forward=1"
                .to_owned(),
        );
    }
    // Without IPv6 in the kernel there is no such setting, and other things fail louder.
    if uses_v6 && !network.forwards_v6("all").unwrap_or(true) {
        warnings.push(
            "this host does not forward IPv6: traffic to tunnels and unresolved neighbours is dropped; \
             sysctl -w net.ipv6.conf.all.forwarding=1 (where its own address comes by router advertisements, accept_ra=2 \
             on that interface first)"
                .to_owned(),
        );
    }
    let has_vrf = config
        .networks
        .values()
        .any(|network| matches!(network.table, Some(RoutingTable::Vrf(_))));
    if has_vrf && !network.accepts_from_vrf().unwrap_or(true) {
        warnings.push(
            "answers to health probes of backends in a VRF are not taken; sysctl -w net.ipv4.tcp_l3mdev_accept=1"
                .to_owned(),
        );
    }
    // A rewritten request goes up with a source of the pool, to which this host usually has no route.
    let is_pool_routed = match config.snat.ranges.iter().find(|(first, _)| first.is_ipv4()) {
        Some((first, _)) => network.route_to(*first, None).await.is_ok(),
        None => true,
    };
    for name in config.interfaces.keys() {
        // An interface that is gone has no setting; that it is gone is said elsewhere.
        let filter = network.rp_filter(name).unwrap_or(RpFilter::Off);
        if filter.drops_rewritten(is_pool_routed) {
            warnings.push(format!(
                "{name}: source validation drops rewritten requests on their way to a tunnel; \
                 sysctl -w net.ipv4.conf.{name}.rp_filter=0 net.ipv4.conf.all.rp_filter=0"
            ));
        }
    }
    warnings.extend(
        down.iter()
            .map(|name| format!("{name}: the link is down; ip link set {name} up")),
    );
    Ok(warnings)
}
