//! The lab: a client, a gateway, servers at four addresses of one host, two cables. Without a gateway, one cable.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use super::{
    contender::{self, Contender, Running},
    cpu,
};
use crate::{
    bench::frames::{End, POOLS, Wanted},
    lab::{
        Lab, Lifetime, Namespace, Process,
        nginx::large_file,
        topology::{POOL, PORT},
    },
};

pub const VIP: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 100);
pub const SERVERS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(172, 16, 1, 16),
    Ipv4Addr::new(172, 16, 1, 17),
    Ipv4Addr::new(172, 16, 1, 18),
    Ipv4Addr::new(172, 16, 1, 19),
];
/// What a packet has to be when it comes to the servers; its length is to follow.
pub(super) const SERVERS_WANTED: Wanted = Wanted {
    len: 0,
    source: POOLS,
    destination: Ipv4Net::new_assert(SERVERS[0], 30),
};
pub const UDP_PORT: u16 = 5353;
/// First and last of the gateway's addresses in nftables' rules.
pub(super) const NFT_POOL: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 64, 0, 2), Ipv4Addr::new(100, 64, 0, 5)];
/// Of a small answer, without its header.
pub const PAGE_BYTES: usize = 128;
/// Where the servers' nginx tells how many requests it had.
const STATUS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
const MTU_BYTES: u16 = 1500;
const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 10);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 10);
const GATEWAY_FAR: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 1);

/// The client's and the servers' interface; the gateway's towards the client, and towards the servers.
const HOST: &str = "eth0";
pub(super) const NEAR: &str = "eth0";
pub(super) const FAR: &str = "eth1";

/// A contender's lab.
pub struct NatSite {
    pub contender: Contender,
    client: Namespace,
    pub gateway: Namespace,
    pub servers: Namespace,
    running: Running,
    server: Option<Process>,
    /// How often the servers were asked how many requests they had.
    looks: u64,
    /// Last, so that everything else is gone when the lab goes.
    pub lab: Lab,
}

impl NatSite {
    /// Builds the lab and starts servers and contender. `object`: the benchmarks' programs.
    pub fn build(contender: Contender, object: &Path) -> Result<Self> {
        let lab = Lab::open(Lifetime::Process)?;
        let client = lab.namespace("client")?;
        let gateway = lab.namespace("gateway")?;
        let servers = lab.namespace("servers")?;
        if contender == Contender::Nobody {
            lab.cable((&client, HOST), (&servers, HOST), MTU_BYTES)?;
        } else {
            lab.cable((&client, HOST), (&gateway, NEAR), MTU_BYTES)?;
            lab.cable((&gateway, FAR), (&servers, HOST), MTU_BYTES)?;
        }
        if contender.is_floor() {
            client.address(HOST, &format!("{NEIGHBOUR}/24"))?;
        } else {
            client.address(HOST, &format!("{CLIENT}/24"))?;
            gateway.address(NEAR, "172.16.0.1/24")?;
            gateway.address(FAR, &format!("{GATEWAY_FAR}/24"))?;
            gateway.forward()?;
        }
        for server in SERVERS {
            servers.address(HOST, &format!("{server}/24"))?;
        }
        if !contender.is_floor() {
            for destination in ["172.16.0.0/24", POOL] {
                servers.route(destination, GATEWAY_FAR)?;
            }
        }
        if !contender.is_floor() && contender != Contender::Forwarder {
            // The data path answers for its VIP itself.
            gateway.address(NEAR, &format!("{VIP}/32"))?;
        }
        for host in [&client, &gateway] {
            host.sysctl("net/ipv4/ip_local_port_range", "10000 65000")?;
        }
        // Frames as from a network.
        for (host, interface) in [(&client, HOST), (&servers, HOST)] {
            for feature in ["tso", "gso", "tx"] {
                host.offload(interface, feature, false)?;
            }
        }
        let mut site = Self {
            contender,
            client,
            gateway,
            servers,
            running: Running::Kernel,
            server: None,
            looks: 0,
            lab,
        };
        site.start_servers()?;
        site.running = contender.start(&site.lab, &site.gateway, object)?;
        Ok(site)
    }

    fn start_servers(&mut self) -> Result<()> {
        let directory = self.lab.directory().join("servers");
        fs::create_dir(&directory)?;
        fs::write(directory.join("large"), large_file())?;
        let path = directory.display();
        let page = "x".repeat(PAGE_BYTES);
        let configuration = format!(
            "daemon off;
master_process off;
pid {path}/nginx.pid;
error_log {path}/error.log;
events {{ worker_connections 8192; }}
http {{
    client_body_temp_path {path}/body;
    proxy_temp_path {path}/proxy;
    fastcgi_temp_path {path}/fastcgi;
    uwsgi_temp_path {path}/uwsgi;
    scgi_temp_path {path}/scgi;
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    default_type text/plain;
    server {{
        listen {PORT} backlog=4096;
        location = / {{ return 200 \"{page}\"; }}
        location = /large {{ root {path}; }}
        location / {{ return 404; }}
    }}
    server {{
        listen {STATUS};
        location / {{ stub_status; }}
    }}
}}
"
        );
        let file = directory.join("nginx.conf");
        fs::write(&file, configuration)?;
        let log = directory.join("error.log");
        let arguments = ["-c".as_ref(), file.as_os_str(), "-e".as_ref(), log.as_os_str()];
        let process = contender::bound(&self.lab, &self.servers, "nginx", &arguments, &log)?;
        contender::await_listener(&self.servers, &process, STATUS)?;
        self.server = Some(process);
        Ok(())
    }

    /// Stops the servers.
    pub fn stop_servers(&mut self) -> Result<()> {
        match self.server.take() {
            Some(server) => server.stop().map(drop),
            None => Ok(()),
        }
    }

    /// Puts another program with nginx's configuration in the contender's place, which listens at the VIP.
    pub fn replace_contender(&mut self, configuration: &str) -> Result<()> {
        if let Running::Proxy(proxy) = &self.running {
            proxy.stop()?;
        }
        let file = self.lab.directory().join("other.conf");
        fs::write(&file, configuration)?;
        let arguments = ["-c".as_ref(), file.as_os_str()];
        self.running = contender::proxy(&self.lab, &self.gateway, "nginx", &arguments)?;
        Ok(())
    }

    /// The threads of everything that stays: servers and contender.
    pub fn threads(&self) -> Result<Vec<i32>> {
        let mut threads = Vec::new();
        if let Some(server) = &self.server {
            threads.extend(cpu::threads_of(server.pid())?);
        }
        match &self.running {
            Running::Kernel | Running::Programs(_) => {}
            Running::Agent(agent) => threads.extend(cpu::threads_of(agent.pid())?),
            Running::Proxy(proxy) => threads.extend(cpu::threads_of(proxy.pid())?),
        }
        Ok(threads)
    }

    /// Requests that the servers have answered so far.
    pub fn served(&mut self) -> Result<u64> {
        let text = self.servers.inside(|| -> Result<String> {
            let mut stream = TcpStream::connect(STATUS)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        self.looks += 1;
        let requests = parse_served(&text).with_context(|| format!("not nginx's status: {text}"))?;
        Ok(requests - self.looks)
    }

    pub const fn client(&self) -> &Namespace {
        &self.client
    }

    pub(super) fn client_end(&self) -> End<'_> {
        (&self.client, HOST)
    }

    pub(super) fn server_end(&self) -> End<'_> {
        (&self.servers, HOST)
    }

    pub(super) fn gateway_end(&self) -> End<'_> {
        (&self.gateway, NEAR)
    }

    pub(super) fn gateway_far_end(&self) -> End<'_> {
        (&self.gateway, FAR)
    }

    pub(super) fn client_address(&self, port: u16) -> SocketAddrV4 {
        let address = if self.contender.is_floor() {
            NEIGHBOUR
        } else {
            CLIENT
        };
        SocketAddrV4::new(address, port)
    }

    fn target(&self, port: u16) -> SocketAddrV4 {
        let address = if self.contender.is_floor() {
            SERVERS[0]
        } else {
            VIP
        };
        SocketAddrV4::new(address, port)
    }

    /// Where datagrams and requests go.
    pub fn udp_target(&self) -> SocketAddrV4 {
        self.target(UDP_PORT)
    }

    pub fn http_target(&self) -> SocketAddrV4 {
        self.target(PORT)
    }
}

/// The third number of the line below `server accepts handled requests`; the request for the status is in it.
fn parse_served(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("server accepts handled requests")?;
    rest.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_third_number_of_the_status() {
        let text = "HTTP/1.1 200 OK\r\n\r\nActive connections: 1 \nserver accepts handled requests\n 4 3 17 \n\
                    Reading: 0 Writing: 1 Waiting: 0 \n";
        assert_eq!(parse_served(text), Some(17));
        assert_eq!(parse_served("HTTP/1.1 404 Not Found"), None);
    }
}
