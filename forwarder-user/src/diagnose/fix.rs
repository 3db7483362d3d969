//! Commands that mend what a diagnosis found, ready to be pasted on the machine they are for.
//!
//! They may be pasted twice: they set, they do not add. A machine's own names that cannot be known from here
//! (interfaces, chains of a firewall) are asked for by the command itself.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde::Serialize;

/// The machine that a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "host", content = "address", rename_all = "kebab-case")]
pub enum Host {
    /// This one.
    Gateway,
    /// The one that routes for the servers, by its address towards this gateway.
    Router(IpAddr),
    /// A backend's.
    Server(IpAddr),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway => f.write_str("this gateway"),
            Self::Router(address) => write!(f, "router {address}"),
            Self::Server(address) => write!(f, "server {address}"),
        }
    }
}

/// A command for `sh`, and where to run it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fix {
    #[serde(flatten)]
    pub host: Host,
    pub command: String,
}

impl Fix {
    pub fn new(host: Host, command: impl Into<String>) -> Self {
        Self {
            host,
            command: command.into(),
        }
    }

    /// A command for this gateway.
    pub fn here(command: impl Into<String>) -> Self {
        Self::new(Host::Gateway, command)
    }

    /// Routes `prefix` of the SNAT pool back to us, who are `gateway` there.
    pub(super) fn return_route(host: Host, prefix: &IpNet, gateway: IpAddr) -> Self {
        Self::new(host, format!("ip route replace {} via {gateway}", prefix.trunc()))
    }

    /// Makes the device that has `address` answer.
    pub(super) fn wake(host: Host, address: IpAddr) -> Self {
        Self::new(host, format!("ip link set dev {} up arp on", device_of(address)))
    }

    /// Admits `sources` in every chain of nftables (also those of iptables-nft) that looks at what comes in.
    pub(super) fn admit(host: Host, sources: &[IpNet]) -> Self {
        let hook = match host {
            Host::Server(_) => "input",
            Host::Gateway | Host::Router(_) => "forward",
        };
        // All of one family, that of the backend.
        let ip = match sources.first() {
            Some(IpNet::V6(_)) => "ip6",
            _ => "ip",
        };
        let sources: Vec<_> = sources.iter().map(|prefix| prefix.trunc().to_string()).collect();
        Self::new(
            host,
            format!(
                "nft list chains | awk '$1 == \"table\" {{ table = $2 \" \" $3; family = $2 }} $1 == \"chain\" {{ chain = $2 }} \
                 /type filter hook {hook}/ && (family == \"{ip}\" || family == \"inet\") {{ print table, chain }}' | \
                 while read -r chain; do nft \"insert rule $chain {ip} saddr {{ {} }} accept\"; done",
                sources.join(", ")
            ),
        )
    }
}

/// Shell words that stand for the name of the device that has `address`.
pub(crate) fn device_of(address: IpAddr) -> String {
    let family = if address.is_ipv4() { "-4" } else { "-6" };
    format!("\"$(ip -oneline {family} address show to {address} | awk '{{ print $2; exit }}')\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fix_says_where_in_json() {
        let router = Host::Router(IpAddr::from([10, 255, 0, 2]));
        let fix = Fix::return_route(
            router,
            &"100.64.0.0/26".parse().unwrap(),
            IpAddr::from([10, 255, 0, 1]),
        );
        assert_eq!(
            serde_json::to_string(&fix).unwrap(),
            r#"{"host":"router","address":"10.255.0.2","command":"ip route replace 100.64.0.0/26 via 10.255.0.1"}"#
        );
        assert_eq!(
            serde_json::to_string(&Fix::here("true")).unwrap(),
            r#"{"host":"gateway","command":"true"}"#
        );
    }

    #[test]
    fn commands_are_one_line() {
        let pool = ["100.64.0.0/26".parse().unwrap(), "100.64.1.0/25".parse().unwrap()];
        let server = Host::Server(IpAddr::from([192, 168, 1, 10]));
        let admit = Fix::admit(server, &pool).command;
        assert!(
            admit.contains("hook input/") && !admit.contains('\n') && !admit.contains("  "),
            "{admit}"
        );
        assert!(
            admit.contains("ip saddr { 100.64.0.0/26, 100.64.1.0/25 } accept"),
            "{admit}"
        );
    }
}
