//! Facts of a sound gateway, for tests to break: a client side `eth0`, a local server behind `eth1`, a remote one
//! behind the tunnel `cen` over `wan`.

use std::{collections::BTreeMap, net::IpAddr, path::Path, time::Duration};

use crate::{
    config,
    doctor::facts::{Attempt, Backend, Device, Facts, Host},
    network::{Entry, Interface, InterfaceKind, MAIN_TABLE, Offloads, Policy, Route, Rule},
};

const CONFIG: &str = r#"
[snat]
prefixes = ["100.64.0.0/26"]
[interface.eth0]
[interface.eth1]
[tunnel.cen]
[network.vpc1]
cidrs = ["172.16.0.0/12"]
[network.vpc2]
cidrs = ["192.168.0.0/16"]
tunnel = "cen"
[group.web.health]
kind = "http"
[group.web.backend.ecs01]
address = "172.16.1.10"
port = 80
[group.web.backend.ecs02]
address = "192.168.1.10"
port = 80
[listener.web]
vip = "172.16.0.100"
port = 80
group = "web"
"#;

pub(in crate::doctor) fn offloads(active: &[&str], switchable: &[&str]) -> Offloads {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Offloads {
        active: set(active),
        switchable: set(switchable),
    }
}

pub(in crate::doctor) fn device(name: &str, index: u32, kind: InterfaceKind, addresses: &[&str]) -> Device {
    Device {
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        rp_filter: Some(crate::network::RpFilter::Off),
        forwards: Some(true),
        forwards_v6: Some(true),
        offloads: Some(offloads(&["rx-gro"], &["rx-gro"])),
        queues: None,
        runs_programs: Some(true),
        takes_redirects: Some(true),
        underlay: None,
        vrf_table: None,
        link: Interface {
            name: name.to_owned(),
            index,
            mac: None,
            mtu_bytes: 1500,
            is_up: true,
            has_carrier: true,
            is_ethernet: true,
            has_neighbours: true,
            kind,
            controller: None,
            remote: None,
            alias: None,
            vlan: None,
            driver: None,
        },
    }
}

fn backend(name: &str, address: [u8; 4], egress: &str, interface: u32, gateway: Option<[u8; 4]>) -> Backend {
    Backend {
        group: "web".to_owned(),
        name: name.to_owned(),
        address: address.into(),
        port: Some(80),
        probed_port: Some(80),
        route: Ok(Route {
            interface,
            gateway: gateway.map(IpAddr::from),
            source: None,
            is_local: false,
        }),
        egress: Some(egress.to_owned()),
        astray: Vec::new(),
        attempts: vec![Attempt {
            prefix: "100.64.0.0/26".parse().unwrap(),
            source: IpAddr::from([100, 64, 0, 1]),
            outcome: Ok(Duration::from_millis(1)),
            diagnosis: None,
        }],
        open_ports: Vec::new(),
        narrow: None,
    }
}

fn entry(prefix: &str, interface: u32, is_of_address: bool) -> Entry {
    Entry {
        table: MAIN_TABLE,
        prefix: prefix.parse().unwrap(),
        interface: Some(interface),
        is_of_address,
        discards: false,
    }
}

pub(in crate::doctor) fn sound() -> Facts {
    let config =
        config::load::parse(CONFIG, Path::new("test.toml")).unwrap_or_else(|errors| panic!("{errors}"));
    let mut cen = device("cen", 3, InterfaceKind::Vxlan, &["169.254.42.1/30"]);
    cen.link.mtu_bytes = 1450;
    cen.underlay = Some(("wan".to_owned(), 1500));
    Facts {
        file: "/etc/forwarder.toml".into(),
        host: Host {
            kernel: "6.12.0".to_owned(),
            kernel_version: (6, 12),
            cores: 2,
            forwards: true,
            forwards_v6: true,
            has_jit: Some(true),
            is_pool_routed: false,
            agent: None,
        },
        devices: vec![
            device("eth0", 1, InterfaceKind::Veth, &["172.16.0.1/24"]),
            device("eth1", 2, InterfaceKind::Veth, &["172.16.1.1/24"]),
            cen,
            device("wan", 4, InterfaceKind::Veth, &["198.51.100.1/30"]),
        ],
        policy: Policy {
            rules: vec![Rule {
                priority: 32766,
                from: "0.0.0.0/0".parse().unwrap(),
                to: "0.0.0.0/0".parse().unwrap(),
                table: Some(MAIN_TABLE),
                is_conditional: false,
            }],
            entries: vec![
                entry("172.16.0.0/24", 1, true),
                entry("172.16.1.0/24", 2, true),
                entry("192.168.0.0/16", 3, false),
            ],
        },
        vips: BTreeMap::from([(IpAddr::from([172, 16, 0, 100]), None)]),
        tables: BTreeMap::new(),
        backends: vec![
            backend("ecs01", [172, 16, 1, 10], "eth1", 2, None),
            backend("ecs02", [192, 168, 1, 10], "cen", 3, Some([169, 254, 42, 2])),
        ],
        config,
    }
}
