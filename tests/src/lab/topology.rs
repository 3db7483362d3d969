//! The networks of the three journeys that the forwarder is measured against, with the addresses and pages
//! of the products' own documentation.
//!
//! *Peering*: one remote server. *Cross-region*: a local and a remote server behind one listener, and what
//! tests need around them (more servers, more clients, a client in the remote network). The third journey,
//! *manual routes*, is cross-region with security groups on the servers.
//!
//! The connection between networks is a VXLAN device over links of 1500 bytes, so it takes 50 bytes less than
//! the networks it joins: what goes through it has to be told. Peering can be had over any other kind of tunnel.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    Lab, Lifetime, Namespace,
    agent::{self, Agent},
    configuration::{Check, Configuration},
    dual_stack,
    load::{Answer, curl},
    nginx::Nginx,
    status::HEALTHY,
    tunnel::{self, End, Kind},
    wait_until,
};

/// Back-to-origin addresses of every gateway here.
pub const POOL: &str = "100.64.0.0/26";
/// Where its probes leave from.
pub const PROBE_ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
/// The range that a server's inbound rule has to admit.
pub const BACK_TO_ORIGIN: &str = "100.64.0.0/10";
/// The port that pages are served on.
pub const PORT: u16 = 80;

const MTU_BYTES: u16 = 1500;
/// What data centres use for large frames.
const JUMBO_MTU_BYTES: u16 = 9000;

/// VIPs of the journeys.
const PEERING_VIP: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);
const CROSS_REGION_VIP: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 100);

/// A server with a page.
#[derive(Debug)]
pub struct Server {
    /// Name of its backend.
    pub name: &'static str,
    pub namespace: Namespace,
    pub address: Ipv4Addr,
    /// Whether it is behind the tunnel.
    pub is_remote: bool,
    pub page: String,
    pub nginx: Nginx,
}

/// Hosts of one journey.
#[derive(Debug)]
pub struct Site {
    pub clients: Vec<Namespace>,
    pub gateway: Namespace,
    /// The router at the far end of the tunnel.
    pub far_router: Namespace,
    /// The router between the tunnel's ends, where there is one.
    pub carrier: Option<Namespace>,
    /// A host without a server in the remote network, where there is one.
    pub remote_client: Option<Namespace>,
    pub servers: Vec<Server>,
    pub vip: Ipv4Addr,
    /// The VIP that transfers go to; unless a test says otherwise, in the family that the tunnel carries.
    pub front: IpAddr,
    /// Does its tunnel carry IPv6 only? See [`dual_stack::PEERING`].
    pub is_ipv6: bool,
    /// Interfaces of the gateway that get the XDP program.
    pub interfaces: &'static [&'static str],
    /// The gateway's tunnel device.
    pub tunnel: &'static str,
    /// (name, CIDR, whether it is behind the tunnel) of the networks joined.
    pub networks: [(&'static str, &'static str, bool); 2],
    /// The topology as a drawing.
    pub drawing: &'static str,
    /// Last, so that everything else is gone when the lab goes.
    pub lab: Lab,
}

/// What a peering lab is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peering {
    pub kind: Kind,
    /// MTU of the client's link, and of the server's. The tunnel's carrier has 1500 bytes.
    pub client_mtu_bytes: u16,
    pub server_mtu_bytes: u16,
    /// MTU of a link between the tunnel's far end and one more router, the server's; `None`: no such router.
    pub narrow_mtu_bytes: Option<u16>,
}

impl Default for Peering {
    fn default() -> Self {
        Self {
            kind: Kind::Vxlan,
            client_mtu_bytes: MTU_BYTES,
            server_mtu_bytes: MTU_BYTES,
            narrow_mtu_bytes: None,
        }
    }
}

/// What a cross-region lab has beside one client, ECS01 and ECS02.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// ECS03 beside ECS01 and ECS04 beside ECS02.
    pub second_servers: bool,
    /// The same, and ECS05 to ECS08 beside ECS01.
    pub eight_servers: bool,
    /// A second client beside the first.
    pub second_client: bool,
    /// A client in the remote network.
    pub remote_client: bool,
    /// Inbound rules on ECS01 and ECS02.
    pub security_groups: bool,
    /// 9000 bytes in the gateway's own networks.
    pub jumbo_frames: bool,
}

/// A host to be put on a segment.
struct Host {
    name: &'static str,
    address: &'static str,
    page: &'static str,
}

const CLIENT: Host = Host {
    name: "client",
    address: "172.16.0.10",
    page: "",
};
const CLIENT2: Host = Host {
    name: "client2",
    address: "172.16.0.11",
    page: "",
};
const REMOTE_CLIENT: Host = Host {
    name: "remote-client",
    address: "192.168.1.50",
    page: "",
};
const ECS01: Host = Host {
    name: "ecs01",
    address: "172.16.1.10",
    page: "Hello World! This is ECS01 in Chengdu.",
};
const ECS02: Host = Host {
    name: "ecs02",
    address: "192.168.1.10",
    page: "Hello World! This is ECS02 in Hangzhou.",
};
const ECS03: Host = Host {
    name: "ecs03",
    address: "172.16.1.11",
    page: "Hello World! This is ECS03 in Chengdu.",
};
const ECS04: Host = Host {
    name: "ecs04",
    address: "192.168.1.11",
    page: "Hello World! This is ECS04 in Hangzhou.",
};

const MORE_LOCAL: [Host; 4] = [
    Host {
        name: "ecs05",
        address: "172.16.1.12",
        page: "Hello World! This is ECS05 in Chengdu.",
    },
    Host {
        name: "ecs06",
        address: "172.16.1.13",
        page: "Hello World! This is ECS06 in Chengdu.",
    },
    Host {
        name: "ecs07",
        address: "172.16.1.14",
        page: "Hello World! This is ECS07 in Chengdu.",
    },
    Host {
        name: "ecs08",
        address: "172.16.1.15",
        page: "Hello World! This is ECS08 in Chengdu.",
    },
];

const PEERING_DRAWING: &str =
    "  VPC-Test-01  172.18.0.0/24                                VPC-Test-02  172.17.0.0/24
  client ─────────────── gateway ═══ peering (VXLAN) ═══ transit ─────────────── ECS-Test
  172.18.0.10            172.18.0.1                      172.17.0.1           172.17.0.205
                         VIP 172.18.0.100                                     nginx, inbound rules
                         back-to-origin 100.64.0.0/26";

const CROSS_REGION_DRAWING: &str =
    "  Chengdu: VPC1 172.16.0.0/12                       Hangzhou: VPC2 192.168.0.0/16

  client ── VSW 172.16.0.0/24 ───┐                  ┌── VSW3 192.168.1.0/24 ── ECS02
  172.16.0.10                    │                  │                   192.168.1.10
                              gateway ═ VXLAN ═ transit-hangzhou               nginx
                                 │      over transit-chengdu
  ECS01 ── VSW1 172.16.1.0/24 ───┘      VIP 172.16.0.100
  172.16.1.10                           back-to-origin 100.64.0.0/26
  nginx";

impl Site {
    /// One remote server over a peering connection.
    pub fn peering(lifetime: Lifetime) -> Result<Self> {
        Self::peering_with(lifetime, Peering::default())
    }

    /// [`Self::peering`] made of other things.
    pub fn peering_with(lifetime: Lifetime, peering: Peering) -> Result<Self> {
        let lab = Lab::open(lifetime)?;
        let gateway = lab.namespace("gateway")?;
        let client = lab.namespace("client")?;
        let transit = lab.namespace("transit")?;
        let server = lab.namespace("ecs-test")?;

        let is_ipv6 = peering.kind.is_for_ipv6();
        if is_ipv6 || peering.kind.is_over_ipv6() {
            for host in [&gateway, &client, &transit, &server] {
                dual_stack::allow(host)?;
            }
        }
        lab.cable((&gateway, "eth0"), (&client, "eth0"), peering.client_mtu_bytes)?;
        gateway.address("eth0", "172.18.0.1/24")?;
        client.address("eth0", "172.18.0.10/24")?;
        let branch = match peering.narrow_mtu_bytes {
            Some(mtu_bytes) => Some(narrow(&lab, &transit, mtu_bytes)?),
            None => None,
        };
        let router = branch.as_ref().unwrap_or(&transit);
        lab.cable((router, "eth1"), (&server, "eth0"), peering.server_mtu_bytes)?;
        router.address("eth1", "172.17.0.1/24")?;
        server.address("eth0", "172.17.0.205/24")?;
        server.steer("eth0")?;
        lab.cable((&gateway, "wan"), (&transit, "wan"), MTU_BYTES)?;
        gateway.address("wan", "198.51.100.1/30")?;
        transit.address("wan", "198.51.100.2/30")?;
        gateway.forward()?;
        transit.forward()?;
        if is_ipv6 || peering.kind.is_over_ipv6() {
            for router in [&gateway, &transit] {
                router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
            }
        }
        if peering.kind.is_over_ipv6() {
            gateway.run("ip address add 2001:db8:51::1/64 dev wan nodad")?;
            transit.run("ip address add 2001:db8:51::2/64 dev wan nodad")?;
        }

        let (near, far) = (Ipv4Addr::new(169, 254, 18, 1), Ipv4Addr::new(169, 254, 18, 2));
        let ends = [
            end(&gateway, Ipv4Addr::new(198, 51, 100, 1), near),
            end(&transit, Ipv4Addr::new(198, 51, 100, 2), far),
        ];
        tunnel::join(&lab, peering.kind, "peering", ends, MTU_BYTES)?;
        // VPC-Test-01's route table; then VPC-Test-02's, in its router and on its server.
        if is_ipv6 {
            dual_stack::add_peering([&gateway, &client, &transit, &server])?;
        } else {
            gateway.route("172.17.0.0/24", far)?;
        }
        for destination in ["172.18.0.0/24", POOL] {
            if !is_ipv6 {
                transit.route(destination, near)?;
            }
            if let Some(branch) = &branch {
                branch.route(destination, NARROW[0])?;
            }
            server.route(destination, Ipv4Addr::new(172, 17, 0, 1))?;
        }
        if branch.is_some() {
            transit.route("172.17.0.0/24", NARROW[1])?;
        }
        // Its rules are of IPv4, and would admit nothing else.
        if !is_ipv6 {
            server.security_group(&["172.17.0.0/24", BACK_TO_ORIGIN])?;
        }

        let page = "Welcome to nginx on ECS-Test in VPC-Test-02!";
        let nginx = Nginx::start(&lab, &server, &[PORT], page)?;
        Ok(Self {
            clients: vec![client],
            gateway,
            far_router: transit,
            carrier: None,
            remote_client: None,
            servers: vec![Server {
                name: "ecs-test",
                namespace: server,
                address: Ipv4Addr::new(172, 17, 0, 205),
                is_remote: true,
                page: page.to_owned(),
                nginx,
            }],
            vip: PEERING_VIP,
            is_ipv6,
            front: if is_ipv6 {
                dual_stack::PEERING.vip.into()
            } else {
                PEERING_VIP.into()
            },
            interfaces: &["eth0"],
            tunnel: "peering",
            networks: [
                ("vpc-test-01", "172.18.0.0/24", false),
                ("vpc-test-02", "172.17.0.0/24", true),
            ],
            drawing: PEERING_DRAWING,
            lab,
        })
    }

    /// Local and remote servers behind one listener.
    pub fn cross_region(lifetime: Lifetime, extras: Extras) -> Result<Self> {
        let lab = Lab::open(lifetime)?;
        let gateway = lab.namespace("gateway")?;
        let chengdu = lab.namespace("transit-chengdu")?;
        let hangzhou = lab.namespace("transit-hangzhou")?;
        for router in [&gateway, &chengdu, &hangzhou] {
            router.forward()?;
        }

        // The carrier: the transit router of the gateway's region sees tunnel packets only.
        lab.cable((&gateway, "wan"), (&chengdu, "eth0"), MTU_BYTES)?;
        gateway.address("wan", "198.51.100.1/30")?;
        chengdu.address("eth0", "198.51.100.2/30")?;
        lab.cable((&chengdu, "eth1"), (&hangzhou, "wan"), MTU_BYTES)?;
        chengdu.address("eth1", "203.0.113.1/30")?;
        hangzhou.address("wan", "203.0.113.2/30")?;
        gateway.route("203.0.113.0/30", Ipv4Addr::new(198, 51, 100, 2))?;
        hangzhou.route("198.51.100.0/30", Ipv4Addr::new(203, 0, 113, 1))?;
        let (near, far) = (Ipv4Addr::new(169, 254, 42, 1), Ipv4Addr::new(169, 254, 42, 2));
        let ends = [
            end(&gateway, Ipv4Addr::new(198, 51, 100, 1), near),
            end(&hangzhou, Ipv4Addr::new(203, 0, 113, 2), far),
        ];
        tunnel::join(&lab, Kind::Vxlan, "cen", ends, MTU_BYTES)?;

        let mut clients = vec![&CLIENT];
        clients.extend(extras.second_client.then_some(&CLIENT2));
        let (mut local, mut remote) = (vec![&ECS01], vec![&ECS02]);
        if extras.second_servers || extras.eight_servers {
            local.push(&ECS03);
            remote.push(&ECS04);
        }
        if extras.eight_servers {
            local.extend(&MORE_LOCAL);
        }
        let mut remote_hosts = remote.clone();
        remote_hosts.extend(extras.remote_client.then_some(&REMOTE_CLIENT));
        let mtu_bytes = if extras.jumbo_frames {
            JUMBO_MTU_BYTES
        } else {
            MTU_BYTES
        };
        let clients = subnet(&lab, "vsw", (&gateway, "eth0", "172.16.0.1"), &clients, mtu_bytes)?;
        let local_hosts = subnet(&lab, "vsw1", (&gateway, "eth1", "172.16.1.1"), &local, mtu_bytes)?;
        let router = (&hangzhou, "eth1", "192.168.1.1");
        let mut remote_hosts = subnet(&lab, "vsw3", router, &remote_hosts, MTU_BYTES)?;

        // VPC1's route table; then VPC2's, in its router and on its hosts.
        gateway.route("192.168.0.0/16", far)?;
        for host in clients.iter().chain(&local_hosts) {
            let router = host_router(host, &clients);
            host.route("172.16.0.0/12", router)?;
            host.route("192.168.0.0/16", router)?;
        }
        for host in &local_hosts {
            host.route(POOL, Ipv4Addr::new(172, 16, 1, 1))?;
        }
        for destination in ["172.16.0.0/12", POOL] {
            hangzhou.route(destination, near)?;
            for host in &remote_hosts {
                host.route(destination, Ipv4Addr::new(192, 168, 1, 1))?;
            }
        }
        let remote_client = if extras.remote_client {
            remote_hosts.pop()
        } else {
            None
        };

        if extras.security_groups {
            for (hosts, cidr) in [(&local_hosts, "172.16.0.0/12"), (&remote_hosts, "192.168.0.0/16")] {
                for host in hosts {
                    host.security_group(&[cidr, BACK_TO_ORIGIN])?;
                }
            }
        }

        let local = local_hosts
            .into_iter()
            .zip(local)
            .map(|(namespace, host)| (namespace, host, false));
        let remote = remote_hosts
            .into_iter()
            .zip(remote)
            .map(|(namespace, host)| (namespace, host, true));
        let servers = local
            .chain(remote)
            .map(|(namespace, host, is_remote)| {
                Ok(Server {
                    name: host.name,
                    nginx: Nginx::start(&lab, &namespace, &[PORT], host.page)?,
                    namespace,
                    address: host.address.parse()?,
                    is_remote,
                    page: host.page.to_owned(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            clients,
            gateway,
            far_router: hangzhou,
            carrier: Some(chengdu),
            remote_client,
            servers,
            vip: CROSS_REGION_VIP,
            front: CROSS_REGION_VIP.into(),
            is_ipv6: false,
            interfaces: &["eth0", "eth1"],
            tunnel: "cen",
            networks: [("vpc1", "172.16.0.0/12", false), ("vpc2", "192.168.0.0/16", true)],
            drawing: CROSS_REGION_DRAWING,
            lab,
        })
    }

    /// The client that requests come from.
    pub fn client(&self) -> &Namespace {
        &self.clients[0]
    }

    /// The client's own address.
    pub fn client_address(&self) -> Result<Ipv4Addr> {
        let text = self.client().run("ip -4 -o address show dev eth0")?;
        let word = text.split_whitespace().find(|word| word.contains('/'));
        let (address, _) = word.and_then(|word| word.split_once('/')).context("an address")?;
        Ok(address.parse()?)
    }

    pub fn server(&self, name: &str) -> Result<&Server> {
        self.servers
            .iter()
            .find(|server| server.name == name)
            .with_context(|| format!("no server {name}"))
    }

    /// Stops a server's nginx, as `systemctl stop nginx` there would.
    pub fn stop_nginx(&mut self, name: &str) -> Result<()> {
        self.nginx_mut(name)?.0.stop()
    }

    /// Kills a server's nginx (`kill -9`).
    pub fn kill_nginx(&mut self, name: &str) -> Result<()> {
        self.nginx_mut(name)?.0.kill()
    }

    /// Suspends a server's nginx: connections are accepted and never answered.
    pub fn pause_nginx(&mut self, name: &str) -> Result<()> {
        self.nginx_mut(name)?.0.pause();
        Ok(())
    }

    /// Starts a server's nginx again.
    pub fn start_nginx(&mut self, name: &str) -> Result<()> {
        let (nginx, lab) = self.nginx_mut(name)?;
        nginx.restart(lab)
    }

    fn nginx_mut(&mut self, name: &str) -> Result<(&mut Nginx, &Lab)> {
        let server = self.servers.iter_mut().find(|server| server.name == name);
        Ok((
            &mut server.with_context(|| format!("no server {name}"))?.nginx,
            &self.lab,
        ))
    }

    /// One request of the client's to the VIP.
    pub fn curl(&self) -> Result<Answer> {
        curl(self.client(), self.vip, PORT)
    }

    /// The server that a page comes from.
    pub fn answered_by(&self, page: &str) -> Option<&Server> {
        self.servers.iter().find(|server| server.page == page)
    }

    /// The part of the agent's configuration that describes this site; groups and listeners are to follow.
    /// `interface_keys` are set for every interface.
    pub fn configuration(&self, interface_keys: &[(&str, &str)]) -> Configuration {
        let mut configuration =
            Configuration::new(&agent::control_socket(&self.lab), &self.lab.pin_directory())
                .snat(POOL, PROBE_ADDRESS);
        for interface in self.interfaces {
            configuration = configuration.interface(interface, interface_keys);
        }
        for (name, cidr, is_remote) in self.networks {
            configuration = configuration.network(name, cidr, is_remote.then_some(self.tunnel));
        }
        configuration
    }

    /// One listener `web` on port 80, and all servers in its group `web`.
    pub fn web_configuration(&self) -> Configuration {
        self.web_configuration_with(&[], "full", |_| 100)
    }

    /// [`Self::web_configuration`] with keys for the interfaces, the NAT mode and a weight for each server.
    pub fn web_configuration_with(
        &self,
        interface_keys: &[(&str, &str)],
        nat: &str,
        weight: impl Fn(&Server) -> u16,
    ) -> Configuration {
        let group = self.configuration(interface_keys).group("web", nat, Check::Http);
        self.servers
            .iter()
            .fold(group, |configuration, server| {
                configuration.backend("web", server.name, server.address, PORT, weight(server))
            })
            .listener("web", self.vip, PORT, "tcp", "web")
    }

    /// Starts the agent and waits until it calls every backend of `group` healthy.
    pub fn start_agent(&self, configuration: &Configuration, group: &str) -> Result<Agent> {
        self.start_agent_binary(&agent::binary()?, configuration, group)
    }

    /// As [`Self::start_agent`], of a binary of one's own.
    pub fn start_agent_binary(
        &self,
        binary: &Path,
        configuration: &Configuration,
        group: &str,
    ) -> Result<Agent> {
        let agent = Agent::start_binary(&self.lab, &self.gateway, configuration, binary)?;
        wait_until("all backends to be healthy", Duration::from_secs(10), || {
            let backends = agent.backends(group)?;
            let other = backends.iter().find(|backend| backend.health != HEALTHY);
            ensure!(other.is_none(), "{other:?}");
            Ok(())
        })?;
        Ok(agent)
    }

    /// Switches transmit checksum offload of every client and server: with it, their packets come to XDP on
    /// the gateway with a checksum that is not computed yet.
    pub fn checksum_offload(&self, on: bool) -> Result<()> {
        self.offload("tx", on)
    }

    /// Switches an offload of every client and server, by its name in ethtool.
    pub fn offload(&self, feature: &str, on: bool) -> Result<()> {
        let servers = self.servers.iter().map(|server| &server.namespace);
        for host in self.clients.iter().chain(servers).chain(&self.remote_client) {
            host.offload("eth0", feature, on)?;
        }
        Ok(())
    }
}

/// The router of a host of VPC1: the gateway's address on the host's subnet.
fn host_router(host: &Namespace, clients: &[Namespace]) -> Ipv4Addr {
    let is_client = clients.iter().any(|client| client.name() == host.name());
    if is_client {
        Ipv4Addr::new(172, 16, 0, 1)
    } else {
        Ipv4Addr::new(172, 16, 1, 1)
    }
}

/// Makes `hosts` and joins them and `router` (namespace, interface, address) to one /24.
fn subnet(
    lab: &Lab,
    name: &str,
    router: (&Namespace, &str, &str),
    hosts: &[&Host],
    mtu_bytes: u16,
) -> Result<Vec<Namespace>> {
    let namespaces = hosts
        .iter()
        .map(|host| lab.namespace(host.name))
        .collect::<Result<Vec<_>>>()?;
    let ends: Vec<_> = namespaces.iter().map(|namespace| (namespace, "eth0")).collect();
    lab.segment(name, (router.0, router.1), &ends, mtu_bytes)?;
    router.0.address(router.1, &format!("{}/24", router.2))?;
    for (namespace, host) in namespaces.iter().zip(hosts) {
        namespace.address("eth0", &format!("{}/24", host.address))?;
        namespace.steer("eth0")?;
    }
    Ok(namespaces)
}

/// Ends of the link between the two routers of a remote network.
const NARROW: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 17, 0, 1), Ipv4Addr::new(10, 17, 0, 2)];

/// Makes a router behind `router`, at the end of a link of `mtu_bytes`.
fn narrow(lab: &Lab, router: &Namespace, mtu_bytes: u16) -> Result<Namespace> {
    let branch = lab.namespace("branch")?;
    lab.cable((router, "eth1"), (&branch, "eth0"), mtu_bytes)?;
    router.address("eth1", &format!("{}/30", NARROW[0]))?;
    branch.address("eth0", &format!("{}/30", NARROW[1]))?;
    branch.forward()?;
    Ok(branch)
}

/// The end of a tunnel on a host whose interface `wan` leads to the other end.
fn end(namespace: &Namespace, outside: Ipv4Addr, inside: Ipv4Addr) -> End<'_> {
    let number = |address: Ipv4Addr| u16::from(address.octets()[3]);
    End {
        namespace,
        carrier: "wan",
        outside,
        outside_v6: Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, number(outside)),
        inside,
        inside_v6: Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, number(inside)),
    }
}
