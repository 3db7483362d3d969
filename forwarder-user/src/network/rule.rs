//! Policy rules: which routing table a network behind a tunnel is looked up in.
//!
//! The data path's route lookups obey them, and so does the stack for what goes up. All rules of one priority are
//! the agent's: that is how it knows its own again after a crash.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_route::{
    link::{InfoData, InfoVrf, LinkAttribute, LinkInfo},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{Network, errno, failed, family, host_bits, one};
use crate::error::Error;

/// Before the rule of VRFs (1000, linux/l3mdev), which would claim replies for the tunnel's own table.
pub const RULE_PRIORITY: u32 = 946;

/// The main routing table (RT_TABLE_MAIN, linux/rtnetlink.h).
pub const MAIN_TABLE: u32 = 254;

/// Packets of a kind are routed by this table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyRule {
    pub packets: Selector,
    pub table: u32,
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Selector {
    To(IpNet),
    From(IpAddr),
}

impl Network {
    /// Adds a rule, unless it is there.
    ///
    /// # Errors
    /// No CAP_NET_ADMIN.
    pub async fn add_rule(&self, rule: &PolicyRule) -> Result<(), Error> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = message(rule);
        match request.execute().await {
            Ok(()) => Ok(()),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            Err(error) => Err(failed(format_args!("add the rule \"{rule}\""), &error)),
        }
    }

    /// Takes a rule away, if it is there.
    ///
    /// # Errors
    /// No CAP_NET_ADMIN.
    pub async fn remove_rule(&self, rule: &PolicyRule) -> Result<(), Error> {
        match self.handle.rule().del(message(rule)).execute().await {
            Ok(()) => Ok(()),
            Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(()),
            Err(error) => Err(failed(format_args!("remove the rule \"{rule}\""), &error)),
        }
    }

    /// The routing table of the VRF device called `name`.
    ///
    /// # Errors
    /// There is no such device, or it is no VRF.
    pub async fn vrf_table(&self, name: &str) -> Result<u32, Error> {
        let request = self.handle.link().get().match_name(name.to_owned());
        let message = one(request.execute(), Errno::ENODEV)
            .await
            .map_err(|error| failed(format_args!("look up VRF \"{name}\""), &error))?;
        let Some(message) = message else {
            return Err(
                Error::host(format!("VRF \"{name}\" does not exist")).hint(format!(
                    "ip link add {name} type vrf table 100; ip link set {name} up"
                )),
            );
        };
        let infos = message.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        let table = infos.flatten().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vrf(data)) => data.iter().find_map(|data| match data {
                InfoVrf::TableId(table) => Some(*table),
                _ => None,
            }),
            _ => None,
        });
        table.ok_or_else(|| {
            Error::host(format!("interface \"{name}\" is no VRF"))
                .hint("`ip link show type vrf` lists those there are")
        })
    }
}

fn message(rule: &PolicyRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Table(rule.table),
        RuleAttribute::Priority(RULE_PRIORITY),
    ];
    match rule.packets {
        Selector::To(prefix) => {
            message.header.family = family(prefix.addr());
            message.header.dst_len = prefix.prefix_len();
            let network = RuleAttribute::Destination(prefix.network());
            message.attributes.push(network);
        }
        Selector::From(address) => {
            message.header.family = family(address);
            message.header.src_len = host_bits(address);
            message.attributes.push(RuleAttribute::Source(address));
        }
    }
    message
}

impl std::fmt::Display for PolicyRule {
    /// As `ip rule` takes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.packets {
            Selector::To(prefix) => write!(f, "to {prefix}")?,
            Selector::From(address) => write!(f, "from {address}")?,
        }
        write!(f, " lookup {} priority {RULE_PRIORITY}", self.table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    #[test]
    fn a_rule_leads_to_its_table_while_it_is_there() {
        in_namespace(async {
            ip("link add ra type veth peer name rb");
            ip("addr add 10.9.0.1/24 dev ra");
            ip("link set ra up");
            ip("link set rb up");
            ip("route add 192.168.0.0/16 via 10.9.0.2 table 100");
            let network = Network::open().unwrap();
            let backend = IpAddr::from([192, 168, 1, 10]);
            let rule = PolicyRule {
                packets: Selector::To("192.168.0.0/16".parse().unwrap()),
                table: 100,
            };
            assert!(network.route_to(backend, None).await.is_err());
            network.add_rule(&rule).await.unwrap();
            network.add_rule(&rule).await.unwrap();
            assert!(network.route_to(backend, None).await.is_ok());
            network.remove_rule(&rule).await.unwrap();
            network.remove_rule(&rule).await.unwrap();
            assert!(network.route_to(backend, None).await.is_err());
            let large = PolicyRule {
                packets: Selector::From(backend),
                table: 100_000,
            };
            assert_eq!(large.to_string(), "from 192.168.1.10 lookup 100000 priority 946");
            network.add_rule(&large).await.unwrap();
            network.remove_rule(&large).await.unwrap();
        });
    }

    #[test]
    fn what_is_no_vrf_is_named() {
        in_namespace(async {
            ip("link add ra type veth peer name rb");
            let network = Network::open().unwrap();
            let error = network.vrf_table("ra").await.unwrap_err();
            assert_eq!(error.what, "interface \"ra\" is no VRF");
            let error = network.vrf_table("red").await.unwrap_err();
            assert_eq!(error.what, "VRF \"red\" does not exist");
        });
    }
}
