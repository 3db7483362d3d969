//! The agent's configuration file, written as an operator would write it, one table at a time.

use std::{
    fmt::{self, Write},
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use aya::util::KernelVersion;

/// A configuration file under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    text: String,
}

impl Configuration {
    #[must_use]
    pub fn new(control_socket: &Path, pin_directory: &Path) -> Self {
        Self::default().table(
            "agent",
            &[
                ("control_socket", &quoted(&control_socket.display())),
                ("pin_directory", &quoted(&pin_directory.display())),
            ],
        )
    }

    /// A file as it is.
    #[must_use]
    pub fn raw(mut self, text: &str) -> Self {
        text.clone_into(&mut self.text);
        self
    }

    /// Adds `key = value` to the `[agent]` table, which is the first.
    #[must_use]
    pub fn agent_key(mut self, key: &str, value: &str) -> Self {
        self.text = self
            .text
            .replacen("[agent]\n", &format!("[agent]\n{key} = {value}\n"), 1);
        self
    }

    /// A file that was written before, and perhaps changed since.
    #[must_use]
    pub fn from_text(text: String) -> Self {
        Self { text }
    }

    /// Adds `[name]` with `keys`, whose values are TOML.
    #[must_use]
    pub fn table(mut self, name: &str, keys: &[(&str, &str)]) -> Self {
        let gap = if self.text.is_empty() { "" } else { "\n" };
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{gap}[{name}]");
        for (key, value) in keys {
            let _ = writeln!(self.text, "{key} = {value}");
        }
        self
    }

    /// The back-to-origin addresses.
    #[must_use]
    pub fn snat(self, prefix: &str, probe_address: Ipv4Addr) -> Self {
        let keys = [
            ("prefixes", format!("[{}]", quoted(&prefix))),
            ("probe_address", quoted(&probe_address)),
        ];
        self.table(
            "snat",
            &keys.each_ref().map(|(key, value)| (*key, value.as_str())),
        )
    }

    /// An interface that gets the XDP program, with `keys` whose values are strings: `mode`, `redirect`.
    ///
    /// Before Linux 6.3 the kernel does not say whether the other end of a veth takes frames, and an operator has to; those
    /// of labs do.
    #[must_use]
    pub fn interface(self, name: &str, keys: &[(&str, &str)]) -> Self {
        let is_told = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 3, 0));
        let mut keys = keys.to_vec();
        if !is_told && keys.iter().all(|(key, _)| *key != "redirect") {
            keys.push(("redirect", "on"));
        }
        let keys: Vec<_> = keys.iter().map(|(key, value)| (*key, quoted(value))).collect();
        let keys: Vec<_> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
        self.table(&format!("interface.{name}"), &keys)
    }

    /// A network and the tunnel that leads there, which is declared with it.
    #[must_use]
    pub fn network(self, name: &str, cidr: &str, tunnel: Option<&str>) -> Self {
        let cidrs = format!("[{}]", quoted(&cidr));
        let name = format!("network.{name}");
        match tunnel {
            None => self.table(&name, &[("cidrs", &cidrs)]),
            Some(tunnel) => self
                .table(&format!("tunnel.{tunnel}"), &[("mode", "\"kernel\"")])
                .table(&name, &[("cidrs", &cidrs), ("tunnel", &quoted(&tunnel))]),
        }
    }

    /// A group, `nat` being `full` or `dnat`, with the health check of the labs.
    #[must_use]
    pub fn group(self, name: &str, nat: &str, check: Check) -> Self {
        let this = self.table(&format!("group.{name}"), &[("nat", &quoted(&nat))]);
        let health = format!("group.{name}.health");
        match check {
            Check::None => this.table(&health, &[("kind", "\"none\"")]),
            Check::Tcp | Check::Http => this.table(
                &health,
                &[
                    (
                        "kind",
                        if check == Check::Tcp {
                            "\"tcp\""
                        } else {
                            "\"http\""
                        },
                    ),
                    ("interval", "\"500ms\""),
                    ("timeout", "\"400ms\""),
                    ("rise", "2"),
                    ("fall", "3"),
                ],
            ),
        }
    }

    #[must_use]
    pub fn backend(
        self,
        group: &str,
        name: &str,
        address: impl Into<IpAddr>,
        port: u16,
        weight: u16,
    ) -> Self {
        self.table(
            &format!("group.{group}.backend.{name}"),
            &[
                ("address", &quoted(&address.into())),
                ("port", &port.to_string()),
                ("weight", &weight.to_string()),
            ],
        )
    }

    /// A listener; `protocol` is `tcp` or `udp`.
    #[must_use]
    pub fn listener(
        self,
        name: &str,
        vip: impl Into<IpAddr>,
        port: u16,
        protocol: &str,
        group: &str,
    ) -> Self {
        self.table(
            &format!("listener.{name}"),
            &[
                ("vip", &quoted(&vip.into())),
                ("port", &port.to_string()),
                ("protocol", &quoted(&protocol)),
                ("group", &quoted(&group)),
                // The shortest there is, so that tests see flows end.
                ("idle_timeout", "\"10s\""),
            ],
        )
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// How the labs check a backend's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    None,
    Tcp,
    Http,
}

/// A TOML string. Addresses, names and paths of the labs hold nothing to escape.
fn quoted(value: &impl fmt::Display) -> String {
    format!("\"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_takes_what_is_written_here() {
        let probe = Ipv4Addr::new(100, 64, 0, 1);
        let backend = Ipv4Addr::new(192, 168, 1, 10);
        let mut configuration =
            Configuration::new(Path::new("/run/lab/control.sock"), Path::new("/sys/fs/bpf/lab"))
                .agent_key("on_stop", "\"keep\"")
                .snat("100.64.0.0/26", probe)
                .interface("eth0", &[("mode", "generic"), ("redirect", "off")])
                .network("vpc1", "172.16.0.0/12", None)
                .network("vpc2", "192.168.0.0/16", Some("cen"));
        for (port, (group, nat, check, protocol)) in (80..).zip([
            ("echo", "full", Check::None, "udp"),
            ("web", "full", Check::Http, "tcp"),
            ("kept", "dnat", Check::Tcp, "tcp"),
        ]) {
            configuration = configuration
                .group(group, nat, check)
                .backend(group, "ecs02", backend, port, 100);
            configuration =
                configuration.listener(group, Ipv4Addr::new(172, 16, 0, 100), port, protocol, group);
        }
        let config = forwarder_user::config::load::parse(&configuration.to_string(), Path::new("lab.toml"));
        let config = config.unwrap_or_else(|errors| panic!("{errors}\n{configuration}"));
        assert_eq!(config.listeners.len(), 3);
        assert_eq!(config.snat.probes, IpAddr::V4(probe).into());
    }
}
