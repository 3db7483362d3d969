//! The routing policy: rules and tables as they are written down, to find out which line of them decides.
//!
//! What the kernel decides is asked of the kernel (`route`); this says why.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::{
    IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{Network, failed};
use crate::error::Error;

/// The table of this host's own addresses.
const TABLE_LOCAL: u32 = 255;

/// A line of `ip rule`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub priority: u32,
    pub from: IpNet,
    pub to: IpNet,
    /// Where it sends packets; `None` for rules that do something else.
    pub table: Option<u32>,
    /// It looks at more than addresses (interfaces, marks, ports).
    pub is_conditional: bool,
}

/// A line of `ip route`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub table: u32,
    pub prefix: IpNet,
    /// Number of the interface; `None` for routes that discard, or have several next hops.
    pub interface: Option<u32>,
    /// The kernel made it because of an address.
    pub is_of_address: bool,
    /// It discards (blackhole, unreachable, prohibit).
    pub discards: bool,
}

/// Rules in their order, and the routes of all tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub rules: Vec<Rule>,
    pub entries: Vec<Entry>,
}

/// The line that decides over a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    pub rule: &'a Rule,
    /// `None`: every table it was sent to had nothing; `rule` is then the last of them.
    pub entry: Option<&'a Entry>,
}

impl Policy {
    /// Which line decides over packets from `source` to `destination`, as far as addresses tell. `None` without
    /// rules.
    #[must_use]
    pub fn decide(&self, source: IpAddr, destination: IpAddr) -> Option<Decision<'_>> {
        let mut last = None;
        let matching = self.rules.iter().filter(|rule| {
            !rule.is_conditional && rule.from.contains(&source) && rule.to.contains(&destination)
        });
        for rule in matching {
            let Some(table) = rule.table else { continue };
            let entry = self
                .entries
                .iter()
                .filter(|entry| entry.table == table && entry.prefix.contains(&destination))
                .max_by_key(|entry| entry.prefix.prefix_len());
            if entry.is_some() {
                return Some(Decision { rule, entry });
            }
            if last.is_none() && table != TABLE_LOCAL {
                last = Some(Decision { rule, entry: None });
            }
        }
        last
    }
}

impl Network {
    /// All rules of both families, in their order.
    pub async fn rules(&self) -> Result<Vec<Rule>, Error> {
        let mut rules = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let messages: Vec<RuleMessage> = self
                .all(move |handle| handle.rule().get(version).execute())
                .await
                .map_err(|error| failed("list the routing rules", &error))?;
            rules.extend(messages.iter().filter_map(rule));
        }
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// Whether the rules of IPv4 look at nothing but destinations.
    pub async fn routes_by_destination(&self) -> Result<bool, Error> {
        let rules = self.rules().await?;
        let mut of_v4 = rules.iter().filter(|rule| matches!(rule.from, IpNet::V4(_)));
        Ok(of_v4.all(|rule| !rule.is_conditional && rule.from.prefix_len() == 0))
    }

    /// All rules and all routes.
    pub async fn policy(&self) -> Result<Policy, Error> {
        let rules = self.rules().await?;
        let mut entries = Vec::new();
        for question in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let routes: Vec<RouteMessage> = self
                .all(move |handle| handle.route().get(question).execute())
                .await
                .map_err(|error| failed("list the routes", &error))?;
            entries.extend(routes.iter().filter_map(entry));
        }
        Ok(Policy { rules, entries })
    }
}

/// All addresses of a family; `None` for families that are not IP.
fn everything(family: AddressFamily) -> Option<IpNet> {
    match family {
        AddressFamily::Inet => Some(IpNet::V4(Ipv4Net::default())),
        AddressFamily::Inet6 => Some(IpNet::V6(Ipv6Net::default())),
        _ => None,
    }
}

fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let everything = everything(header.family)?;
    let mut rule = Rule {
        priority: 0,
        from: everything,
        to: everything,
        table: (header.action == RuleAction::ToTable).then_some(header.table.into()),
        is_conditional: header.tos != 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) if rule.table.is_some() => rule.table = Some(*table),
            RuleAttribute::Source(address) => {
                rule.from = IpNet::new(*address, header.src_len).ok()?;
            }
            RuleAttribute::Destination(address) => {
                rule.to = IpNet::new(*address, header.dst_len).ok()?;
            }
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::FwMark(_)
            | RuleAttribute::TunId(_)
            | RuleAttribute::L3MDev(true)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => rule.is_conditional = true,
            _ => {}
        }
    }
    Some(rule)
}

fn entry(message: &RouteMessage) -> Option<Entry> {
    let header = &message.header;
    let mut entry = Entry {
        table: header.table.into(),
        prefix: everything(header.address_family)?,
        interface: None,
        is_of_address: header.protocol == RouteProtocol::Kernel,
        discards: matches!(
            header.kind,
            RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
        ),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => entry.table = *table,
            RouteAttribute::Oif(interface) => entry.interface = Some(*interface),
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                entry.prefix = IpNet::new((*address).into(), header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                entry.prefix = IpNet::new((*address).into(), header.destination_prefix_length).ok()?;
            }
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{
        MAIN_TABLE,
        testing::{in_namespace, ip},
    };

    #[test]
    fn names_the_line_that_decides() {
        in_namespace(async {
            ip("link set lo up");
            ip("link add fa type veth peer name fb");
            ip("link set fa up");
            ip("link set fb up");
            ip("address add 10.7.0.1/24 dev fa");
            ip("route add 192.168.0.0/16 via 10.7.0.2");
            ip("route add unreachable default metric 4278198272 table 42");
            ip("rule add to 192.168.0.0/16 lookup 42");
            ip("rule add fwmark 1 lookup 43 priority 7");
            ip("rule add from 100.64.0.0/26 lookup 44 priority 9");
            let network = Network::open().unwrap();
            let fa = network.interface("fa").await.unwrap().unwrap().index;
            let policy = network.policy().await.unwrap();
            let pool = IpAddr::from([100, 64, 0, 1]);

            let remote = policy.decide(pool, IpAddr::from([192, 168, 1, 10])).unwrap();
            assert_eq!(remote.rule.table, Some(42));
            let entry = remote.entry.unwrap();
            assert!(entry.discards && entry.prefix.prefix_len() == 0, "{entry:?}");

            // Table 44 is empty and decides nothing.
            let local = policy.decide(pool, IpAddr::from([10, 7, 0, 9])).unwrap();
            assert_eq!(local.rule.table, Some(MAIN_TABLE));
            let entry = local.entry.unwrap();
            assert_eq!((entry.interface, entry.is_of_address), (Some(fa), true));
            assert_eq!(entry.prefix, "10.7.0.0/24".parse().unwrap());

            let nowhere = policy.decide(pool, IpAddr::from([172, 16, 0, 1])).unwrap();
            assert_eq!((nowhere.rule.table, nowhere.entry), (Some(44), None));
        });
    }
}
