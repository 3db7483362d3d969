//! Tunnels that the programs handle themselves: looking at the devices, and keeping the tables in line with them.
//!
//! Whatever changes on the network may change a tunnel (a neighbour, a forwarding entry, a route to a far end), so
//! all are looked at again each time; that is a few questions to the kernel per device.

use std::{collections::BTreeMap, net::IpAddr};

use forwarder_common::abi::interface::flag;
use tracing::{info, warn};

use super::Agent;
use crate::{
    config::{Config, RoutingTable, TunnelMode},
    error::Error,
    network::Network,
    state::tunnels::{self, Surveyed, Underlay},
};

/// Why a tunnel is in kernel mode though the configuration would have it native; `None`: it is native.
pub(super) type Verdicts = BTreeMap<String, Option<String>>;

/// Makes the devices of tunnels that the configuration describes, and removes those that it does not any more.
///
/// # Errors
/// The first device that cannot be made.
pub(super) async fn make_tunnels(network: &Network, config: &Config) -> Result<(), Error> {
    let is_wanted = |name: &str| {
        config
            .tunnels
            .get(name)
            .is_some_and(|tunnel| tunnel.made.is_some())
    };
    network.remove_made_tunnels(is_wanted).await?;
    for (name, tunnel) in &config.tunnels {
        let Some(made) = &tunnel.made else { continue };
        let mut networks = Vec::new();
        for behind in config
            .networks
            .values()
            .filter(|it| it.tunnel.as_ref() == Some(name))
        {
            let table = match behind.table {
                Some(RoutingTable::Number(number)) => Some(number),
                _ => None,
            };
            networks.extend(behind.cidrs.iter().map(|cidr| (*cidr, table)));
        }
        network.make_tunnel(name, made, &networks).await?;
        info!(tunnel = name, "its device was made");
    }
    Ok(())
}

impl Agent {
    /// Looks at all tunnel devices that may be native. Tells what is new about them.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(super) async fn survey_tunnels(&mut self) -> Result<(), Error> {
        let mut surveyed = Vec::new();
        let mut verdicts = Verdicts::new();
        for (name, tunnel) in &self.config.tunnels {
            if tunnel.mode == TunnelMode::Kernel {
                continue;
            }
            match self.survey(name).await? {
                Some(device) => surveyed.push(device),
                None => {
                    let why = "its device is none that the programs know".to_owned();
                    verdicts.insert(name.clone(), Some(why));
                }
            }
        }
        let (tables, found) = tunnels::tables(&surveyed, &self.observed.tunnels, self.tunnel_room);
        verdicts.extend(found);
        for (name, verdict) in &verdicts {
            if self.native.get(name) == Some(verdict) {
                continue;
            }
            let is_wanted = self
                .config
                .tunnels
                .get(name)
                .is_some_and(|it| it.mode == TunnelMode::Native);
            match verdict {
                None => info!(tunnel = name, "native mode: XDP encapsulates and decapsulates"),
                Some(why) if is_wanted => warn!(tunnel = name, "kernel mode instead of native: {why}"),
                Some(why) => info!(tunnel = name, "kernel mode: {why}"),
            }
        }
        self.native = verdicts;
        self.observed.tunnels = tables;
        self.ways = surveyed
            .iter()
            .flat_map(|one| {
                let local = one.device.local;
                one.underlay.keys().map(move |remote| (*remote, local))
            })
            .collect();
        self.way_mtus = self.ways_carry().await;
        Ok(())
    }

    /// Looks whether the ways to the far ends carry less than they did, or more. The kernel reports most changes, but
    /// not what it has learned by ICMP, nor that it has forgotten that; so it is asked.
    ///
    /// # Errors
    /// The tables cannot be written.
    pub(super) async fn look_at_ways(&mut self) -> Result<(), Error> {
        if self.ways_carry().await == self.way_mtus {
            return Ok(());
        }
        if let Err(error) = self.survey_tunnels().await {
            warn!(%error, "the ways of tunnels are not known; asking again in a second");
            return Ok(());
        }
        // Flows remember what fits.
        self.observed.route_generation = self.observed.route_generation.wrapping_add(1);
        self.reconcile()
    }

    /// What the way to each far end carries, where that is less than its interface sends.
    async fn ways_carry(&self) -> Vec<Option<u32>> {
        let mut carried = Vec::new();
        for (remote, local) in &self.ways {
            let way = self.network.way_to(*remote, *local).await;
            carried.push(way.and_then(|way| way.mtu_bytes));
        }
        carried
    }

    /// A device with its surroundings; `None` if it is gone or of a kind that cannot be native.
    async fn survey(&self, name: &str) -> Result<Option<Surveyed>, Error> {
        let Some(mut device) = self.network.tunnel_device(name).await? else {
            return Ok(None);
        };
        let far_ends = self.network.far_ends(device.index).await?;
        let is_over_v6 = Surveyed::remotes(&device, &far_ends).iter().any(IpAddr::is_ipv6);
        // The kernel's answer to the program is then none, whoever made the packet (`bpf_ipv6_fib_lookup` of Linux
        // 6.12).
        if is_over_v6 && !self.network.forwards_v6("all").unwrap_or(true) {
            let obstacle =
                "it is over IPv6, which this host does not forward; sysctl -w net.ipv6.conf.all.forwarding=1";
            device.obstacles.push(obstacle.to_owned());
        }
        let neighbours = self.network.neighbour_macs(device.index).await?;
        let mut underlay = BTreeMap::new();
        for remote in Surveyed::remotes(&device, &far_ends) {
            let Some(way) = self.network.way_to(remote, device.local).await else {
                continue;
            };
            let Some(local) = device.local.or(way.source) else {
                continue;
            };
            let attached = self.observed.interfaces.get(&way.interface);
            let sent_bytes = attached.map_or(0, |interface| interface.mtu_bytes);
            underlay.insert(
                remote,
                Underlay {
                    local,
                    interface: way.interface,
                    mtu_bytes: way.mtu_bytes.unwrap_or(sent_bytes).min(sent_bytes),
                    is_native: attached.is_some_and(|interface| interface.flags & flag::SEND_NATIVE != 0),
                },
            );
        }
        Ok(Some(Surveyed {
            device,
            far_ends,
            neighbours,
            underlay,
        }))
    }
}
