//! The policy rules of networks that have a routing table of their own.
//!
//! Packets to such a network are routed by its table. If that is a VRF's, its tunnel device belongs to the VRF, and
//! the kernel would look replies to clients up in the VRF's table as well: a rule for each VIP sends those, which
//! nobody but the data path makes, to the main table.

use std::collections::BTreeSet;

use crate::{
    config::{Config, RoutingTable},
    error::Error,
    network::{MAIN_TABLE, Network, PolicyRule, RULE_PRIORITY, Selector},
};

/// Makes the agent's rules those of the configuration; rules of other priorities are others'.
///
/// # Errors
/// A VRF does not exist, or no CAP_NET_ADMIN.
pub(super) async fn install(network: &Network, config: &Config) -> Result<(), Error> {
    let wanted = wanted(network, config).await?;
    let present = present(network).await?;
    // Nothing is without a rule in between.
    for rule in wanted.difference(&present) {
        network.add_rule(rule).await?;
    }
    for rule in present.difference(&wanted) {
        network.remove_rule(rule).await?;
    }
    Ok(())
}

/// Takes all of the agent's rules away.
///
/// # Errors
/// No CAP_NET_ADMIN.
pub(crate) async fn remove(network: &Network) -> Result<(), Error> {
    for rule in &present(network).await? {
        network.remove_rule(rule).await?;
    }
    Ok(())
}

async fn wanted(network: &Network, config: &Config) -> Result<BTreeSet<PolicyRule>, Error> {
    let mut rules = BTreeSet::new();
    for joined in config.networks.values() {
        let table = match &joined.table {
            None => continue,
            Some(RoutingTable::Number(number)) => *number,
            Some(RoutingTable::Vrf(device)) => network.vrf_table(device).await?,
        };
        rules.extend(joined.cidrs.iter().map(|cidr| PolicyRule {
            packets: Selector::To(*cidr),
            table,
        }));
        if let Some(RoutingTable::Vrf(_)) = joined.table {
            let vips = config.listeners.values().flat_map(|listener| &listener.vips);
            rules.extend(vips.map(|vip| PolicyRule {
                packets: Selector::From(*vip),
                table: MAIN_TABLE,
            }));
        }
    }
    Ok(rules)
}

/// The rules of the agent's priority.
async fn present(network: &Network) -> Result<BTreeSet<PolicyRule>, Error> {
    let rules = network.rules().await?;
    let ours = rules.into_iter().filter(|rule| rule.priority == RULE_PRIORITY);
    let parsed = ours.filter_map(|rule| {
        let packets = if rule.from.prefix_len() > 0 {
            Selector::From(rule.from.addr())
        } else {
            Selector::To(rule.to)
        };
        Some(PolicyRule {
            packets,
            table: rule.table?,
        })
    });
    Ok(parsed.collect())
}
