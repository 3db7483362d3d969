//! Tunnels that the programs handle themselves: looking at the devices, and keeping the tables in line with them.
//!
//! Whatever changes on the network may change a tunnel (a neighbour, a forwarding entry, a route to a far end), so
//! all are looked at again each time; that is a few questions to the kernel per device.

use std::collections::BTreeMap;

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
        Ok(())
    }

    /// A device with its surroundings; `None` if it is gone or of a kind that cannot be native.
    async fn survey(&self, name: &str) -> Result<Option<Surveyed>, Error> {
        let Some(device) = self.network.tunnel_device(name).await? else {
            return Ok(None);
        };
        let far_ends = self.network.far_ends(device.index).await?;
        let neighbours = self.network.neighbour_macs(device.index).await?;
        let mut underlay = BTreeMap::new();
        for remote in Surveyed::remotes(&device, &far_ends) {
            let Some((interface, source)) = self.network.way_to(remote, device.local).await else {
                continue;
            };
            let Some(local) = device.local.or(source) else {
                continue;
            };
            let attached = self.observed.interfaces.get(&interface);
            underlay.insert(
                remote,
                Underlay {
                    local,
                    interface,
                    mtu_bytes: attached.map_or(0, |interface| interface.mtu_bytes),
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
