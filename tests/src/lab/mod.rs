//! Labs: networks of namespaces, links, tunnels and real servers on this machine, made for one test or one
//! demonstration and gone afterwards, however it ends.
//!
//! `Lab` owns everything; the other types are handles. A lab's names start with `fwd-<pid>-<number>-`, so
//! labs of parallel processes do not meet, and what a killed process left is recognised and swept.
//! Topologies (the journeys of the cloud products that the forwarder is measured against) are in `topology`.
//!
//! A lab needs root. It does no traffic outside its own namespaces.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};

pub mod agent;
pub mod browser;
mod command;
pub mod configuration;
pub mod crossing;
pub mod crowd;
pub mod dual_stack;
pub mod load;
mod namespace;
pub mod nginx;
mod process;
pub mod status;
pub mod topology;
pub mod trace;
pub mod tunnel;
pub mod udp;
mod undo;
pub mod upgrade;
mod wait;

pub use namespace::Namespace;
pub use process::Process;
pub use wait::wait_until;

/// Programs that labs use, and the Debian package of each.
const PROGRAMS: [(&str, &str); 13] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("ethtool", "ethtool"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("ping", "iputils-ping"),
    ("socat", "socat"),
    ("wrk", "wrk"),
    ("bpftool", "bpftool"),
    ("tcpdump", "tcpdump"),
    ("faketime", "faketime"),
];

/// Whether a lab ends with this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Always, even when it is killed.
    Process,
    /// Only if nobody calls [`Lab::keep`]: its processes can go on without this one.
    Keepable,
}

/// A program that stays.
#[derive(Clone, Copy, Debug)]
pub struct Service<'a> {
    /// For messages.
    pub name: &'a str,
    /// The program itself, not one that starts it: signals go to this process.
    pub program: &'a Path,
    pub arguments: &'a [&'a OsStr],
    pub environment: &'a [(&'a str, &'a OsStr)],
    /// What it knows as "stop".
    pub stop_signal: Signal,
    /// File for its standard output and error.
    pub log: &'a Path,
}

/// A lab; dropping it removes everything it made, in reverse order.
#[derive(Debug)]
pub struct Lab {
    id: undo::LabId,
    lifetime: Lifetime,
    kept: bool,
}

impl Lab {
    /// Opens an empty lab, after removing what killed processes left of theirs.
    pub fn open(lifetime: Lifetime) -> Result<Self> {
        Ok(Self {
            id: undo::open()?,
            lifetime,
            kept: false,
        })
    }

    /// Whether [`Self::keep`] is allowed.
    pub fn is_keepable(&self) -> bool {
        self.lifetime == Lifetime::Keepable
    }

    /// Where files of the lab go; removed with it.
    pub fn directory(&self) -> PathBuf {
        self.id.directory()
    }

    /// Where an agent of the lab pins its maps and links; removed with the lab.
    pub fn pin_directory(&self) -> PathBuf {
        self.id.pin_directory()
    }

    /// Makes a directory of the lab a disk of its own, that has room for so many bytes; unmounted with the lab.
    pub fn small_disk(&self, directory: &Path, bytes: u64) -> Result<()> {
        ensure!(
            directory.starts_with(self.directory()),
            "not a directory of the lab"
        );
        fs::create_dir_all(directory)?;
        let options = format!("size={bytes}");
        mount(
            Some("tmpfs"),
            directory,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot mount a disk on {}", directory.display()))
    }

    /// Adds a host without links.
    pub fn namespace(&self, role: &str) -> Result<Namespace> {
        Namespace::make(&self.id, role)
    }

    /// Joins two hosts by a cable: a pair of virtual Ethernet devices, both up.
    ///
    /// Receive offload (GRO) is on at both ends: without it, or an XDP program, a virtual device drops frames
    /// that XDP redirects into its peer. It is switched on when the device is up, as before that the kernel does
    /// not note that frames can be redirected there (`veth_set_features` of Linux 6.18).
    pub fn cable(&self, a: (&Namespace, &str), b: (&Namespace, &str), mtu_bytes: u16) -> Result<()> {
        let ((a, a_name), (b, b_name)) = (a, b);
        a.run(&format!(
            "ip link add name {a_name} mtu {mtu_bytes} type veth peer name {b_name} mtu {mtu_bytes} netns {}",
            b.name()
        ))?;
        for (end, name) in [(a, a_name), (b, b_name)] {
            end.run(&format!("ip link set {name} up"))?;
            end.offload(name, "gro", true)?;
        }
        Ok(())
    }

    /// Joins `uplink` and `hosts` to one Ethernet segment. Two ends are joined by a cable, more by a switch
    /// in a namespace of its own, called `name`.
    pub fn segment(
        &self,
        name: &str,
        uplink: (&Namespace, &str),
        hosts: &[(&Namespace, &str)],
        mtu_bytes: u16,
    ) -> Result<()> {
        if let [host] = hosts {
            return self.cable(uplink, *host, mtu_bytes);
        }
        let switch = self.namespace(name)?;
        switch.run("ip link add name bridge type bridge")?;
        switch.run("ip link set bridge up")?;
        for (number, end) in std::iter::once(&uplink).chain(hosts).enumerate() {
            let port = format!("port{number}");
            self.cable(*end, (&switch, &port), mtu_bytes)?;
            switch.run(&format!("ip link set {port} master bridge"))?;
        }
        Ok(())
    }

    /// Starts a process in a namespace that stays until it is stopped.
    pub fn spawn(&self, namespace: &Namespace, service: &Service<'_>) -> Result<Process> {
        let mut command = match self.lifetime {
            Lifetime::Process => namespace.command(service.program),
            Lifetime::Keepable => namespace.immortal_command(service.program),
        };
        command
            .args(service.arguments)
            .envs(service.environment.iter().copied());
        Process::start(&self.id, service.name, command, service.stop_signal, service.log)
    }

    /// Leaves the lab up when this process ends, until [`remove_kept`].
    pub fn keep(mut self) -> Result<()> {
        if !self.is_keepable() {
            bail!("this lab was opened to end with its process");
        }
        undo::keep(&self.id)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.kept {
            undo::close(&self.id);
        }
    }
}

/// Removes kept labs, of whichever process; returns how many there were.
pub fn remove_kept() -> Result<usize> {
    undo::remove_kept()
}

/// What this host lacks to run a lab, as one sentence each; empty when it can.
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::Uid::effective().is_root() {
        missing.push("root rights (network namespaces, BPF)".to_owned());
    }
    for (program, package) in PROGRAMS {
        if find(program).is_none() {
            missing.push(format!(
                "the program `{program}` (Debian: apt-get install {package})"
            ));
        }
    }
    missing
}

/// Whether a test that needs a lab (and `binary`, the agent's) can run on this host. If not, it says so and
/// the test is skipped; with `FORWARDER_TESTS_STRICT=1` it panics instead.
pub fn can_run_test(binary: Option<Result<PathBuf>>) -> bool {
    let mut missing = missing();
    if let Some(Err(error)) = binary {
        missing.push(format!("{error:#}"));
    }
    if missing.is_empty() {
        return true;
    }
    let why = missing.join("; ");
    let is_strict = std::env::var_os("FORWARDER_TESTS_STRICT").is_some_and(|value| value == "1");
    assert!(!is_strict, "this test needs {why}");
    println!("SKIP: needs {why}");
    false
}

/// Full path of a program; administrators' folders are looked at even if they are not in `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// The last lines of a file, or nothing where there is no such file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
