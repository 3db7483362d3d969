//! One network namespace: commands, addresses, routes, rules and sockets in it.
//!
//! Namespaces are entered with `nsenter --net` and `setns`, never with `ip netns exec`: that one mounts a
//! new /sys, and the BPF file system would be out of sight.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::process::CommandExt,
    panic,
    path::Path,
    process::{Command, Output},
    thread,
};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::{
    command,
    undo::{self, LabId, Undo},
};

/// Where `ip netns` keeps its names.
pub(super) const DIRECTORY: &str = "/run/netns";

/// A host of the lab. Cheap to clone; the namespace itself belongs to the lab.
#[derive(Clone, Debug)]
pub struct Namespace {
    role: String,
    name: String,
}

impl Namespace {
    /// Makes the namespace: loopback up, no IPv6 noise, no source validation.
    pub(super) fn make(lab: &LabId, role: &str) -> Result<Self> {
        let name = lab.namespace(role);
        let this = Self {
            role: role.to_owned(),
            name: name.clone(),
        };
        undo::make(lab, || {
            command::run("ip", &["netns", "add", &name])?;
            Ok(((), Undo::Namespace(name)))
        })?;
        // Before there are links: they copy "default". Duplicate address detection and router
        // solicitations would be frames that no test sent.
        this.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        this.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        // The system manager's default for new interfaces is 2 on many distributions.
        this.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
        this.sysctl("net/ipv4/conf/default/rp_filter", "0")?;
        this.run("ip link set lo up")?;
        Ok(this)
    }

    /// What this host is in the topology: `client`, `gateway`, …
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Name as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Words that put a command line into this namespace.
    pub fn enter(&self) -> String {
        format!("nsenter --net={DIRECTORY}/{}", self.name)
    }

    /// A command in this namespace that ends with this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = command::mortal("nsenter");
        command
            .arg(format!("--net={DIRECTORY}/{}", self.name))
            .arg("--")
            .arg(program);
        command
    }

    /// A command in this namespace that outlives this process.
    pub(super) fn immortal_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={DIRECTORY}/{}", self.name))
            .arg("--")
            .arg(program)
            .process_group(0);
        command
    }

    /// Runs a command line, split at spaces, and returns its standard output. It must succeed.
    pub fn run(&self, line: &str) -> Result<String> {
        self.run_with_input(line, None)
    }

    /// As [`Self::run`], with something to read.
    pub fn run_with_input(&self, line: &str, input: Option<&str>) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().context("an empty command line")?);
        command.args(words);
        command::finish(command, input).with_context(|| format!("in the namespace {}", self.role))
    }

    /// Runs a command to its end, whatever its exit status is.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(program);
        command.args(arguments);
        command::output(command, None).with_context(|| format!("in the namespace {}", self.role))
    }

    /// Runs `work` on a thread that lives in this namespace. Sockets it opens stay there for ever, so they
    /// can be handed out.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = Path::new(DIRECTORY).join(&self.name);
        let file = File::open(&path).with_context(|| format!("no namespace {}", path.display()))?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            worker.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Sets a value below /proc/sys, `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.inside(|| fs::write(Path::new("/proc/sys").join(key), value))?
            .with_context(|| format!("cannot set {key} = {value} in the namespace {}", self.role))
    }

    /// Lets one processor receive all frames of a flow, as the queues of a real NIC do.
    ///
    /// A virtual device's frames are received by whatever processor sent them, so an ACK and the request behind
    /// it may be at work at the same time, and Linux 6.18 may answer the request by a reset: it finds no socket
    /// in the moment in which the connection's takes the place of the handshake's ("inet: Avoid ehash lookup
    /// race in inet_ehash_insert"). That is one connection of 100 000, at 27 000 a second.
    pub fn steer(&self, interface: &str) -> Result<()> {
        let processors = thread::available_parallelism()?.get().min(32);
        let mask = u64::MAX >> (64 - processors);
        let path = format!("/sys/class/net/{interface}/queues/rx-0/rps_cpus");
        // Unlike `nsenter`, it shows the namespace's own devices below /sys.
        let arguments = [
            "netns",
            "exec",
            &self.name,
            "sh",
            "-c",
            &format!("echo {mask:x} > {path}"),
        ];
        command::run("ip", &arguments)
            .map(drop)
            .with_context(|| format!("in the namespace {}", self.role))
    }

    /// Makes this host a router.
    pub fn forward(&self) -> Result<()> {
        self.sysctl("net/ipv4/ip_forward", "1")
    }

    /// Gives an interface an address, `172.16.0.1/24`.
    pub fn address(&self, interface: &str, cidr: &str) -> Result<()> {
        self.run(&format!("ip address add {cidr} dev {interface}"))
            .map(drop)
    }

    /// Adds a route through a neighbour.
    pub fn route(&self, destination: &str, via: Ipv4Addr) -> Result<()> {
        self.run(&format!("ip route add {destination} via {via}"))
            .map(drop)
    }

    /// Switches an offload of an interface: `tx`, `gro`, …
    pub fn offload(&self, interface: &str, feature: &str, on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        self.run(&format!("ethtool -K {interface} {feature} {state}"))
            .map(drop)
    }

    /// Drops every packet that comes in, as a crashed kernel does; [`Self::revive`] ends it.
    pub fn black_hole(&self) -> Result<()> {
        let script = "table ip black_hole {
                chain inbound { type filter hook prerouting priority raw; policy drop; }
            }";
        self.run_with_input("nft -f -", Some(script)).map(drop)
    }

    /// Takes packets again after [`Self::black_hole`].
    pub fn revive(&self) -> Result<()> {
        self.run("nft delete table ip black_hole").map(drop)
    }

    /// Admits nothing from outside but new connections from `sources`, as a security group's inbound rules
    /// do; replies and what the host sends to itself pass.
    pub fn security_group(&self, sources: &[&str]) -> Result<()> {
        let script = format!(
            "table ip security_group {{
                set admitted {{ type ipv4_addr; flags interval; elements = {{ {} }}; }}
                chain inbound {{
                    type filter hook input priority filter; policy drop;
                    iif lo accept
                    ct state established,related accept
                    ip saddr @admitted accept
                }}
            }}",
            sources.join(", ")
        );
        self.run_with_input("nft -f -", Some(&script)).map(drop)
    }
}
