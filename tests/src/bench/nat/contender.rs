//! Who is the gateway, and how it is configured: as a good operator would for a gateway with one CPU, which
//! is what it has.

use std::{
    ffi::OsStr,
    fs,
    net::SocketAddrV4,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::Array,
    programs::{Xdp, xdp::XdpMode},
};
use nix::sys::signal::Signal;

use super::site::{self, FAR, NEAR, SERVERS, UDP_PORT, VIP};
use crate::bench::frames::{CPU, ifindex};
use crate::lab::{
    Lab, Namespace, Process, Service,
    agent::{self, Agent},
    configuration::{Check, Configuration},
    find, tail,
    topology::{POOL, PORT, PROBE_ADDRESS},
    wait_until,
};

/// nginx's proxy of connections, where Debian's package puts it.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// From the start of a proxy to its first connection.
const START_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// Client and servers are neighbours.
    Nobody,
    /// They still are, at both ends of an XDP program that hands each frame over as it is.
    Wire,
    Forwarder,
    Nftables,
    Haproxy,
    Nginx,
}

/// What runs on the gateway.
pub enum Running {
    /// The kernel alone.
    Kernel,
    Agent(Box<Agent>),
    /// Attached for as long as they are held.
    Programs(Box<Ebpf>),
    Proxy(Process),
}

impl Contender {
    /// In the order of the tables.
    pub const ALL: [Self; 6] = [
        Self::Nobody,
        Self::Wire,
        Self::Forwarder,
        Self::Nftables,
        Self::Haproxy,
        Self::Nginx,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no gateway",
            Self::Wire => "a wire",
            Self::Forwarder => "forwarder",
            Self::Nftables => "nftables",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }

    /// Changes nothing: what the others' figures are without.
    pub const fn is_floor(self) -> bool {
        matches!(self, Self::Nobody | Self::Wire)
    }

    /// Works on connections, not on packets.
    pub const fn is_proxy(self) -> bool {
        matches!(self, Self::Haproxy | Self::Nginx)
    }

    /// Its configuration as a reader may take it, and the language that it is in.
    pub fn shown(self) -> (&'static str, String) {
        match self {
            Self::Nobody | Self::Wire => ("text", String::new()),
            Self::Forwarder => {
                let (socket, pins) = ("/run/forwarder/control.sock", "/sys/fs/bpf/forwarder");
                let text = forwarder(Path::new(socket), Path::new(pins));
                ("toml", text.to_string())
            }
            Self::Nftables => ("text", nftables()),
            Self::Haproxy => ("text", haproxy()),
            Self::Nginx => ("nginx", nginx(Path::new("/run/nginx"))),
        }
    }

    /// Starts it; when this returns it takes connections. `object`: the benchmarks' programs.
    pub fn start(self, lab: &Lab, gateway: &Namespace, object: &Path) -> Result<Running> {
        let directory = lab.directory();
        match self {
            Self::Nobody => Ok(Running::Kernel),
            Self::Wire => Ok(Running::Programs(Box::new(wire(gateway, object)?))),
            Self::Forwarder => {
                let configuration = forwarder(&agent::control_socket(lab), &lab.pin_directory());
                let launcher = ["taskset", "-c", &CPU.to_string()];
                let agent = Agent::start_by(lab, gateway, &configuration, &launcher)?;
                Ok(Running::Agent(Box::new(agent)))
            }
            Self::Nftables => {
                gateway.run_with_input("nft -f -", Some(&nftables()))?;
                // While the others have their turns.
                for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
                    gateway.sysctl(&format!("net/netfilter/{key}"), "3600")?;
                }
                Ok(Running::Kernel)
            }
            Self::Haproxy => {
                let file = write(&directory, "haproxy.cfg", &haproxy())?;
                let arguments = ["-db".as_ref(), "-f".as_ref(), file.as_os_str()];
                proxy(lab, gateway, "haproxy", &arguments)
            }
            Self::Nginx => {
                let file = write(&directory, "stream.conf", &nginx(&directory))?;
                let log = directory.join("stream.log");
                let arguments = ["-c".as_ref(), file.as_os_str(), "-e".as_ref(), log.as_os_str()];
                proxy(lab, gateway, "nginx", &arguments)
            }
        }
    }
}

/// Joins the gateway's interfaces.
fn wire(gateway: &Namespace, object: &Path) -> Result<Ebpf> {
    let mut ebpf = Ebpf::load_file(object).with_context(|| format!("{}", object.display()))?;
    let ends = [ifindex((gateway, NEAR))?, ifindex((gateway, FAR))?];
    let mut wire: Array<_, [u32; 2]> = Array::try_from(ebpf.map_mut("WIRE").context("WIRE")?)?;
    wire.set(0, ends, 0)?;
    let program: &mut Xdp = ebpf.program_mut("bench_wire").context("bench_wire")?.try_into()?;
    program.load()?;
    for interface in [NEAR, FAR] {
        gateway
            .inside(|| program.attach(interface, XdpMode::Driver))?
            .with_context(|| format!("attach to {interface}"))?;
    }
    Ok(ebpf)
}

fn write(directory: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, text)?;
    Ok(path)
}

/// Starts a proxy and waits until it listens.
pub(super) fn proxy(lab: &Lab, gateway: &Namespace, name: &str, arguments: &[&OsStr]) -> Result<Running> {
    let log = lab.directory().join(format!("{name}.log"));
    let process = bound(lab, gateway, name, arguments, &log)?;
    await_listener(gateway, &process, SocketAddrV4::new(VIP, PORT))?;
    Ok(Running::Proxy(process))
}

/// Starts a program on the CPU where all happens.
pub(super) fn bound(
    lab: &Lab,
    namespace: &Namespace,
    name: &str,
    arguments: &[&OsStr],
    log: &Path,
) -> Result<Process> {
    let program = find(name)
        .with_context(|| format!("{name} is not installed\n  hint: `cargo xtask setup` does it"))?;
    let cpu = CPU.to_string();
    let mut words: Vec<&OsStr> = vec!["-c".as_ref(), cpu.as_ref(), program.as_os_str()];
    words.extend(arguments);
    // It becomes the program.
    let taskset = find("taskset").context("taskset is not installed")?;
    lab.spawn(
        namespace,
        &Service {
            name,
            program: &taskset,
            arguments: &words,
            environment: &[],
            stop_signal: Signal::SIGTERM,
            log,
        },
    )
}

/// Waits until a program listens.
pub(super) fn await_listener(namespace: &Namespace, process: &Process, address: SocketAddrV4) -> Result<()> {
    wait_until("a server that listens", START_DEADLINE, || {
        if let Some(status) = process.ended() {
            anyhow::bail!("it ended with {status}: {}", tail(process.log(), 5));
        }
        namespace.inside(|| std::net::TcpStream::connect(address))??;
        Ok(())
    })?;
    Ok(())
}

fn forwarder(control_socket: &Path, pin_directory: &Path) -> Configuration {
    let mut configuration = Configuration::new(control_socket, pin_directory)
        .snat(POOL, PROBE_ADDRESS)
        .interface(NEAR, &[("mode", "native")])
        .interface(FAR, &[("mode", "native")])
        .network("lab", "172.16.0.0/16", None);
    for (name, port, protocol, check, timeout) in [
        ("web", PORT, "tcp", Check::Tcp, "10m"),
        // While the others have their turns.
        ("udp", UDP_PORT, "udp", Check::None, "1h"),
    ] {
        configuration = configuration.group(name, "full", check);
        for (number, server) in (1..).zip(SERVERS) {
            configuration = configuration.backend(name, &format!("s{number}"), server, port, 1);
        }
        configuration = configuration.table(
            &format!("listener.{name}"),
            &[
                ("vip", &format!("\"{VIP}\"")),
                ("port", &port.to_string()),
                ("protocol", &format!("\"{protocol}\"")),
                ("group", &format!("\"{name}\"")),
                ("idle_timeout", &format!("\"{timeout}\"")),
            ],
        );
    }
    configuration
}

fn nftables() -> String {
    let servers: Vec<_> = (0..)
        .zip(SERVERS)
        .map(|(number, server)| format!("{number} : {server}"))
        .collect();
    let servers = servers.join(", ");
    let count = SERVERS.len();
    let [first, last] = site::NFT_POOL;
    format!(
        "table ip nat {{
    chain inbound {{
        type nat hook prerouting priority dstnat;
        ip daddr {VIP} tcp dport {PORT} dnat to numgen inc mod {count} map {{ {servers} }}
        ip daddr {VIP} udp dport {UDP_PORT} dnat to numgen inc mod {count} map {{ {servers} }}
    }}
    chain outbound {{
        type nat hook postrouting priority srcnat;
        oifname \"{FAR}\" ct status dnat snat to {first}-{last}
    }}
}}
"
    )
}

fn haproxy() -> String {
    let servers: String = (1..)
        .zip(SERVERS)
        .map(|(number, server)| format!("    server s{number} {server}:{PORT} check\n"))
        .collect();
    format!(
        "global
    # As many as the gateway has CPUs.
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    option splice-auto
    timeout connect 5s
    timeout client 10m
    timeout server 10m
frontend web
    bind {VIP}:{PORT}
    default_backend web
backend web
    balance roundrobin
{servers}"
    )
}

fn nginx(directory: &Path) -> String {
    let servers: String = SERVERS
        .iter()
        .map(|server| format!("        server {server}:{PORT};\n"))
        .collect();
    let path = directory.display();
    format!(
        "load_module {STREAM_MODULE};
# As many as the gateway has CPUs; the lab stops and starts it, so it stays in the foreground.
worker_processes 1;
daemon off;
master_process off;
pid {path}/stream.pid;
events {{
    worker_connections 8192;
    multi_accept on;
}}
stream {{
    upstream web {{
{servers}    }}
    server {{
        listen {VIP}:{PORT} reuseport backlog=4096;
        proxy_pass web;
        proxy_connect_timeout 5s;
        proxy_timeout 10m;
        proxy_buffer_size 64k;
    }}
}}
"
    )
}
