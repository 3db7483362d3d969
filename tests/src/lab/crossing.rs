//! What a user sends through a gateway and a tunnel: a long transfer in either direction, datagrams, echo requests.
//!
//! The checks are the same whatever the tunnel is and whoever encapsulates. The other end is always the kernel's.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Lifetime, Namespace,
    agent::{Agent, ShowLog},
    command,
    configuration::{Check, Configuration},
    dual_stack::{self, PEERING},
    nginx::pattern,
    topology::{PORT, Peering, Server, Site},
    tunnel::Kind,
    udp::{Client, EchoServer},
    wait_until,
};

/// For one transfer; an emulated processor takes most of it.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(120);
/// Until the agent knows all about a tunnel.
const MODE_DEADLINE: Duration = Duration::from_secs(10);
/// Where the echo server listens.
const ECHO_PORT: u16 = 5353;
/// Datagrams from the empty one to the largest that the tightest tunnel carries whole, with the answer's name.
const DATAGRAMS_BYTES: [usize; 4] = [0, 1, 700, 1300];
/// The part of what is transferred that may go through the device of a native tunnel: the agent's probes, and the first
/// packets of a flow while the kernel resolves neighbours.
const FEW_BYTES: u64 = 20;

/// The gateway, to the client; and the router behind the tunnel.
const NEAR_ROUTER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
const FAR_ROUTER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

/// Who encapsulates on the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The tunnel device.
    Kernel,
    /// The data path, beside the device.
    Native,
}

impl Mode {
    /// As configuration and status call it.
    const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Native => "native",
        }
    }
}

/// Builds a site behind a tunnel of this kind, starts the agent on its gateway and sends through it whatever there
/// is, `length_bytes` in either direction.
pub fn cross(kind: Kind, mode: Mode, length_bytes: u32) -> Result<Transferred> {
    let peering = Peering {
        kind,
        ..Peering::default()
    };
    let site = Site::peering_with(Lifetime::Process, peering)?;
    let show_log = ShowLog::of(&site.lab);
    let server = site.servers.first().context("a server")?;
    if !site.is_ipv6 {
        site.client().route(site.networks[1].1, NEAR_ROUTER)?;
    }
    let agent = site.start_agent(&configuration(&site, server, mode), "web")?;
    await_mode(&agent, mode)?;

    let before = bytes(&site)?;
    let transferred = transfer(&site, site.client(), server, length_bytes)?;
    let through_device = bytes(&site)? - before;
    let is_as_wanted = match mode {
        Mode::Kernel => through_device >= 2 * u64::from(length_bytes),
        Mode::Native => through_device < u64::from(length_bytes) / FEW_BYTES,
    };
    ensure!(
        is_as_wanted,
        "{mode:?}: of 2 x {length_bytes} bytes, {through_device} went through the device"
    );
    datagrams(&site, server, ECHO_PORT, &DATAGRAMS_BYTES)?;
    echo_requests(&site)?;
    show_log.all_is_well();
    Ok(transferred)
}

fn configuration(site: &Site, server: &Server, mode: Mode) -> Configuration {
    let (base, address) = if site.is_ipv6 {
        let web = dual_stack::configuration(site)
            .group("web", "full", Check::Http)
            .backend("web", server.name, PEERING.server, PORT, 100)
            .listener("web", PEERING.vip, PORT, "tcp", "web");
        (web, IpAddr::from(PEERING.server))
    } else {
        (site.web_configuration(), server.address.into())
    };
    let configuration = base
        .group("echo", "full", Check::None)
        .backend("echo", server.name, address, ECHO_PORT, 1)
        .listener("echo", site.front, ECHO_PORT, "udp", "echo");
    in_mode(configuration, mode)
}

/// The configuration of a site with its tunnel in this mode; all are written for the kernel's.
pub fn in_mode(configuration: Configuration, mode: Mode) -> Configuration {
    match mode {
        Mode::Kernel => configuration,
        Mode::Native => {
            let configuration = configuration.interface("wan", &[]).to_string();
            Configuration::from_text(configuration.replace("mode = \"kernel\"", "mode = \"native\""))
        }
    }
}

/// Waits until the agent's tunnel is in this mode.
pub fn await_mode(agent: &Agent, mode: Mode) -> Result<()> {
    wait_until("the tunnel's mode", MODE_DEADLINE, || {
        let tunnel = agent.status()?.tunnels.into_iter().next().context("a tunnel")?;
        ensure!(
            tunnel.mode == mode.name(),
            "{}: {:?}",
            tunnel.mode,
            tunnel.why_kernel
        );
        Ok(())
    })?;
    Ok(())
}

/// Bytes that have passed the gateway's tunnel device, in and out.
fn bytes(site: &Site) -> Result<u64> {
    let said = site
        .gateway
        .run(&format!("ip -json -statistics link show dev {}", site.tunnel))?;
    let links: Value = serde_json::from_str(&said)?;
    let statistics = &links[0]["stats64"];
    ["rx", "tx"]
        .iter()
        .map(|direction| {
            statistics[direction]["bytes"]
                .as_u64()
                .context("a number of bytes")
        })
        .sum()
}

/// How long a transfer took in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transferred {
    pub length_bytes: u32,
    pub download: Duration,
    pub upload: Duration,
}

impl fmt::Display for Transferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = |took: Duration| f64::from(self.length_bytes) / 1e6 / took.as_secs_f64();
        write!(
            f,
            "{} MB, download {:.1} MB/s, upload {:.1} MB/s",
            self.length_bytes / 1_000_000,
            rate(self.download),
            rate(self.upload)
        )
    }
}

/// [`download`] and [`upload`].
pub fn transfer(site: &Site, client: &Namespace, server: &Server, length_bytes: u32) -> Result<Transferred> {
    Ok(Transferred {
        length_bytes,
        download: download(site, client, server, length_bytes)?,
        upload: upload(site, client, server, length_bytes)?,
    })
}

/// Downloads `length_bytes` from the VIP, where `server` answers; they have to arrive as they were, by their SHA-256.
/// How long that took.
pub fn download(site: &Site, client: &Namespace, server: &Server, length_bytes: u32) -> Result<Duration> {
    let content = pattern(length_bytes);
    let (original, received) = (original(site, &content)?, site.lab.directory().join("received"));
    server.nginx.serve_large(&content)?;
    let url = format!("http://{}/large", SocketAddr::new(site.front, PORT));
    let took = curl(client, &["--output", text(&received)?], &url).context("download")?;
    ensure!(
        digest(&received)? == digest(&original)?,
        "the download differs from the original"
    );
    Ok(took)
}

/// The other way round.
pub fn upload(site: &Site, client: &Namespace, server: &Server, length_bytes: u32) -> Result<Duration> {
    let original = original(site, &pattern(length_bytes))?;
    let url = format!("http://{}/taken/upload", SocketAddr::new(site.front, PORT));
    let took = curl(client, &["--upload-file", text(&original)?], &url).context("upload")?;
    ensure!(
        digest(&server.nginx.taken("upload"))? == digest(&original)?,
        "the upload differs from the original"
    );
    Ok(took)
}

/// A file of this content.
fn original(site: &Site, content: &[u8]) -> Result<PathBuf> {
    let file = site.lab.directory().join("original");
    fs::write(&file, content)?;
    Ok(file)
}

/// Asks the echo server `server` through the VIP by datagrams, from the smallest to the largest of `lengths_bytes`.
fn datagrams(site: &Site, server: &Server, port: u16, lengths_bytes: &[usize]) -> Result<()> {
    let any = if site.is_ipv6 {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let echo = EchoServer::start_on(&server.namespace, any, port)?;
    let client = Client::open_on(site.client(), any, 0)?;
    for length_bytes in lengths_bytes {
        let name = client
            .ask(&"x".repeat(*length_bytes), SocketAddr::new(site.front, port))
            .with_context(|| format!("{length_bytes} bytes"))?;
        ensure!(name == server.namespace.role(), "{name} answered");
    }
    ensure!(echo.was_asked(), "somebody else answered");
    Ok(())
}

/// Echo requests to the VIP, from either side of the tunnel; and to the router at the other end, which are none of the
/// forwarder's business and go through the same tunnel.
fn echo_requests(site: &Site) -> Result<()> {
    let far_router = if site.is_ipv6 {
        PEERING.far_router.into()
    } else {
        IpAddr::from(FAR_ROUTER)
    };
    for (host, destination) in [
        (site.client(), site.front),
        (site.client(), far_router),
        (&site.far_router, site.front),
    ] {
        host.run(&format!("ping -c 3 -i 0.2 -W 5 {destination}"))?;
    }
    Ok(())
}

/// One request that succeeds; how long it took.
fn curl(client: &Namespace, arguments: &[&str], url: &str) -> Result<Duration> {
    let start = Instant::now();
    let deadline = TRANSFER_DEADLINE.as_secs().to_string();
    let mut all = vec!["--silent", "--show-error", "--fail", "--max-time", &deadline];
    all.extend(arguments);
    all.push(url);
    let output = client.output("curl", &all)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(start.elapsed())
}

/// SHA-256 of a file, in hexadecimal digits.
fn digest(file: &Path) -> Result<String> {
    let said = command::run("sha256sum", &[text(file)?])?;
    let digest = said.split_whitespace().next().context("a digest")?;
    Ok(digest.to_owned())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the path is text")
}
