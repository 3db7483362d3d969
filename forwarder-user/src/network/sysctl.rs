//! The kernel settings that decide whether a gateway forwards. Read only: setting them is the operator's.
//!
//! `/proc/sys/net` shows the network namespace of the thread that reads it.

use std::{fmt, fs};

use super::Network;
use crate::error::Error;

/// Source validation of an interface (RFC 3704).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpFilter {
    /// 0: no validation.
    Off,
    /// 1: the source must be routed back through the interface it came in on.
    Strict,
    /// 2: the source must be routed somewhere.
    Loose,
}

impl fmt::Display for RpFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Strict => "strict",
            Self::Loose => "loose",
        })
    }
}

impl RpFilter {
    /// Whether it drops rewritten requests, whose source is of the SNAT pool, on their way up: that source is never
    /// routed back to the interface they came in on, and often not at all.
    #[must_use]
    pub fn drops_rewritten(self, is_pool_routed: bool) -> bool {
        match self {
            Self::Off => false,
            Self::Strict => true,
            Self::Loose => !is_pool_routed,
        }
    }
}

impl Network {
    /// Whether this host forwards IPv4 packets at all.
    pub fn ip_forward(&self) -> Result<bool, Error> {
        Ok(read("ip_forward")? != 0)
    }

    /// Whether IPv6 packets that come in by the interface called `interface`, or `all`, are forwarded. The kernel
    /// looks at the interface's own setting, and writes that of `all` to every interface (ip-sysctl.rst).
    pub fn forwards_v6(&self, interface: &str) -> Result<bool, Error> {
        Ok(read_from("ipv6", &format!("conf/{interface}/forwarding"))? != 0)
    }

    /// Whether sockets that belong to no VRF take TCP out of one.
    pub fn accepts_from_vrf(&self) -> Result<bool, Error> {
        Ok(read("tcp_l3mdev_accept")? != 0)
    }

    /// Whether packets that come in by the interface called `interface` are forwarded.
    pub fn forwards(&self, interface: &str) -> Result<bool, Error> {
        Ok(read(&format!("conf/{interface}/forwarding"))? != 0)
    }

    /// The source validation in force on the interface called `interface`: the higher of its own setting and that
    /// of `all`, as the kernel takes it.
    pub fn rp_filter(&self, interface: &str) -> Result<RpFilter, Error> {
        let all = read("conf/all/rp_filter")?;
        let own = read(&format!("conf/{interface}/rp_filter"))?;
        Ok(match all.max(own) {
            0 => RpFilter::Off,
            1 => RpFilter::Strict,
            _ => RpFilter::Loose,
        })
    }
}

/// Reads `/proc/sys/net/ipv4/<name>`, a number.
fn read(name: &str) -> Result<u32, Error> {
    read_from("ipv4", name)
}

/// Reads `/proc/sys/net/<family>/<name>`, a number.
fn read_from(family: &str, name: &str) -> Result<u32, Error> {
    let path = format!("/proc/sys/net/{family}/{name}");
    let text =
        fs::read_to_string(&path).map_err(|error| Error::host(format!("cannot read {path}: {error}")))?;
    text.trim()
        .parse()
        .map_err(|_| Error::host(format!("{path} holds {text:?}, not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, set_sysctl};

    #[test]
    fn the_higher_of_all_and_own_is_in_force() {
        in_namespace(async {
            let network = Network::open().unwrap();
            for (all, own, effective) in [
                ("0", "0", RpFilter::Off),
                ("0", "1", RpFilter::Strict),
                ("1", "0", RpFilter::Strict),
                ("1", "2", RpFilter::Loose),
                ("2", "1", RpFilter::Loose),
            ] {
                set_sysctl("conf/all/rp_filter", all);
                set_sysctl("conf/lo/rp_filter", own);
                assert_eq!(
                    network.rp_filter("lo").unwrap(),
                    effective,
                    "all {all}, own {own}"
                );
            }
            set_sysctl("ip_forward", "1");
            assert!(network.ip_forward().unwrap());
            set_sysctl("ip_forward", "0");
            assert!(!network.ip_forward().unwrap());
            let error = network.rp_filter("absent").unwrap_err();
            assert!(error.what.contains("conf/absent/rp_filter"), "{error}");
        });
    }
}
