//! Addresses of both families: which of them hosts may have, and where backends may be.
//!
//! Both are `std`'s [`IpAddr`]; what is IPv4 and what is IPv6 is asked where the difference matters: a source and a
//! destination are of one family ([`PerFamily`]), and each family has its own addresses that are not for hosts.
//! IPv4-mapped IPv6 addresses (RFC 4291 §2.5.5.2) are refused everywhere, as the data path writes IPv4 so.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv6Net};

const fn v4(a: u8, b: u8, bits: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, 0, 0)), bits)
}

const fn v6(first: u16, bits: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0)), bits)
}

/// Where backends may be unless the operator says otherwise: private addresses (RFC 1918), shared address space (RFC
/// 6598) and unique local addresses (RFC 4193).
pub const DEFAULT_BACKEND_RANGES: [IpNet; 5] = [
    v4(10, 0, 8),
    v4(100, 64, 10),
    v4(172, 16, 12),
    v4(192, 168, 16),
    v6(0xfc00, 7),
];

/// IPv4 written as IPv6 (RFC 4291 §2.5.5.2).
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

/// What no packet that is routed may be addressed to as a host, and why. IPv4: this network and loopback (RFC 6890),
/// multicast (RFC 5771), reserved and broadcast (RFC 1112 §4). IPv6: the same, by RFC 4291 §2.4.
const NOT_FOR_HOSTS: [(IpNet, &str); 9] = [
    (v4(0, 0, 8), NOBODY),
    (v4(127, 0, 8), NOBODY),
    (v4(224, 0, 4), NOBODY),
    (v4(240, 0, 4), NOBODY),
    (IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 128), NOBODY),
    (IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128), NOBODY),
    (IpNet::V6(MAPPED), "which is IPv4 in the form of IPv6"),
    (v6(0xfe80, 10), "which is for one link only"),
    (v6(0xff00, 8), NOBODY),
];

const NOBODY: &str = "which is not for hosts";

/// The range that `prefix` shares with addresses that are not for hosts, and why they are not: a relative clause.
pub fn not_for_hosts(prefix: IpNet) -> Option<(IpNet, &'static str)> {
    NOT_FOR_HOSTS
        .into_iter()
        .find(|(range, _)| range.contains(&prefix) || prefix.contains(range))
}

/// First and last address that a host may have. IPv4 prefixes shorter than /31 keep their network address and their
/// broadcast address for themselves (RFC 3021 for /31), IPv6 prefixes shorter than /127 the first, which is any of
/// their routers (RFC 4291 §2.6.1, RFC 6164 for /127).
pub fn hosts(prefix: IpNet) -> (IpAddr, IpAddr) {
    match prefix {
        IpNet::V4(prefix) => {
            let (first, last) = (prefix.network().to_bits(), prefix.broadcast().to_bits());
            let kept = u32::from(prefix.prefix_len() < 31);
            (
                Ipv4Addr::from_bits(first + kept).into(),
                Ipv4Addr::from_bits(last - kept).into(),
            )
        }
        IpNet::V6(prefix) => {
            let (first, last) = (prefix.network().to_bits(), prefix.broadcast().to_bits());
            let kept = u128::from(prefix.prefix_len() < 127);
            (
                Ipv6Addr::from_bits(first + kept).into(),
                Ipv6Addr::from_bits(last).into(),
            )
        }
    }
}

/// The prefixes that have the addresses of `prefix`, but no IPv4-mapped ones: those would be clients of IPv4.
pub fn without_mapped(prefix: IpNet) -> Vec<IpNet> {
    let IpNet::V6(mut rest) = prefix else {
        return vec![prefix];
    };
    let mut parts = Vec::new();
    while rest.contains(&MAPPED) && rest != MAPPED {
        let Ok(halves) = rest.subnets(rest.prefix_len() + 1) else {
            break;
        };
        for half in halves {
            if half.contains(&MAPPED) {
                rest = half;
            } else {
                parts.push(half.into());
            }
        }
    }
    if rest != MAPPED {
        parts.push(rest.into());
    }
    parts
}

/// `address` with `offset` added to it; `None` past the last address of its family.
pub fn plus(address: IpAddr, offset: u32) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => Some(Ipv4Addr::from_bits(address.to_bits().checked_add(offset)?).into()),
        IpAddr::V6(address) => {
            Some(Ipv6Addr::from_bits(address.to_bits().checked_add(offset.into())?).into())
        }
    }
}

/// How many addresses there are from `first` to `last`, both of one family; at most 2³² - 1.
pub fn count(first: IpAddr, last: IpAddr) -> u32 {
    let count = match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            (u128::from(last.to_bits()) + 1).saturating_sub(first.to_bits().into())
        }
        (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
            (last.to_bits() - first.to_bits()).saturating_add(1)
        }
        _ => 0,
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// An address and a port, or what stands for ports, as one writes them together (RFC 3986 §3.2.2); the address alone
/// where that is empty.
pub fn at_port(address: IpAddr, port: impl Display) -> String {
    let port = port.to_string();
    if port.is_empty() {
        return address.to_string();
    }
    match address {
        IpAddr::V4(address) => format!("{address}:{port}"),
        IpAddr::V6(address) => format!("[{address}]:{port}"),
    }
}

/// The same for several addresses.
pub fn all_at_port(addresses: &[IpAddr], port: impl Display) -> String {
    let all: Vec<_> = addresses.iter().map(|address| at_port(*address, &port)).collect();
    all.join(", ")
}

/// The name of an address's family.
pub fn family_name(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// One address of each family, where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerFamily {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl PerFamily {
    /// The one to send to `target` from; the unspecified address, which leaves the choice to the kernel, if there is
    /// none of its family.
    pub fn towards(self, target: IpAddr) -> IpAddr {
        match target {
            IpAddr::V4(_) => self.v4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            IpAddr::V6(_) => self.v6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
        }
    }

    /// Those there are, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.v4.map(IpAddr::V4);
        v4.into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Is it one of them?
    pub fn has(self, address: IpAddr) -> bool {
        self.iter().any(|one| one == address)
    }
}

impl From<IpAddr> for PerFamily {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self {
                v4: Some(address),
                v6: None,
            },
            IpAddr::V6(address) => Self {
                v4: None,
                v6: Some(address),
            },
        }
    }
}

impl FromIterator<IpAddr> for PerFamily {
    /// The first of each family.
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let mut both = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(address) => both.v4 = both.v4.or(Some(address)),
                IpAddr::V6(address) => both.v6 = both.v6.or(Some(address)),
            }
        }
        both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn each_family_has_addresses_that_are_not_for_hosts() {
        for bad in [
            "0.0.0.0/0",
            "127.0.0.1/32",
            "224.0.0.5/32",
            "255.255.255.255/32",
            "::/0",
            "::1/128",
            "::/128",
            "::ffff:10.0.0.1/128",
            "fe80::1/128",
            "ff02::1/128",
        ] {
            assert!(not_for_hosts(net(bad)).is_some(), "{bad}");
        }
        for good in ["10.0.0.0/8", "198.51.100.1/32", "2001:db8::/32", "fd00::1/128"] {
            assert_eq!(not_for_hosts(net(good)), None, "{good}");
        }
    }

    #[test]
    fn the_first_address_of_an_ipv6_prefix_is_its_routers() {
        let hosts = |text| {
            let (first, last) = hosts(net(text));
            format!("{first} {last} {}", count(first, last))
        };
        assert_eq!(hosts("fd00::/126"), "fd00::1 fd00::3 3");
        assert_eq!(hosts("fd00::/127"), "fd00:: fd00::1 2");
        assert_eq!(hosts("fd00::5/128"), "fd00::5 fd00::5 1");
        assert_eq!(
            hosts("fd00::/64"),
            format!("fd00::1 fd00::ffff:ffff:ffff:ffff {}", u32::MAX)
        );
        assert_eq!(hosts("100.64.0.0/30"), "100.64.0.1 100.64.0.2 2");
    }

    #[test]
    fn clients_of_ipv6_are_no_clients_of_ipv4() {
        assert_eq!(without_mapped(net("2001:db8::/32")), [net("2001:db8::/32")]);
        assert_eq!(without_mapped(net("0.0.0.0/0")), [net("0.0.0.0/0")]);
        let parts = without_mapped(net("::/0"));
        assert_eq!(parts.len(), 96);
        let has = |address: &str| {
            parts
                .iter()
                .any(|part| part.contains(&address.parse::<IpAddr>().unwrap()))
        };
        assert!(
            has("::1") && has("2001:db8::1") && has("ffff::") && has("::1:0:0:0") && has("::fffe:1.2.3.4")
        );
        assert!(!has("::ffff:1.2.3.4"));
    }

    #[test]
    fn a_probe_leaves_from_the_address_of_its_target_s_family() {
        let both: PerFamily = ["100.64.0.1", "fd00::1", "fd00::2"]
            .map(|text| text.parse::<IpAddr>().unwrap())
            .into_iter()
            .collect();
        assert_eq!(
            both.towards("10.0.0.1".parse().unwrap()).to_string(),
            "100.64.0.1"
        );
        assert_eq!(both.towards("fd00::9".parse().unwrap()).to_string(), "fd00::1");
        let v4 = PerFamily::from("100.64.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(v4.towards("fd00::9".parse().unwrap()).to_string(), "::");
        assert_eq!(both.iter().count(), 2);
    }
}
