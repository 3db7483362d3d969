//! The Debian package on a machine of its own: installed, configured, started, upgraded under traffic, purged.
//!
//! The machine is Debian's smallest system with systemd as its first process, in a container (systemd-nspawn) that stands
//! where the gateway of the lab is: network and servers are the lab's, the BPF file system is its own. What it does not
//! show: another kernel than this machine's, and a start at boot of a real machine.
//!
//! `cargo xtask test package` makes what this needs and names it: `FORWARDER_PACKAGES`, two packages of the same agent
//! with rising versions, and `FORWARDER_CLEAN_ROOT`, an archive of the system.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Process, Service,
    load::{Connections, KeptConnection, curl, wrk},
    topology::{Extras, POOL, PORT, PROBE_ADDRESS, Site},
    wait_until,
};
use forwarder_user::privileges::KEPT;
use nix::sys::signal::Signal;

const CONNECTIONS: u32 = 32;
/// Longer than an upgrade takes on a busy machine.
const LOAD: Duration = Duration::from_secs(20);
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const DEADLINE: Duration = Duration::from_secs(15);
/// Of 100, as systemd-analyze(1) rates units: what an agent of the network can hardly do without comes to 24.
const MAX_EXPOSURE: u32 = 25;
/// Changes of the unit until a reboot.
const DROP_IN: &str = "/run/systemd/system/forwarder.service.d";
/// Seconds instead of the half a minute of the unit; the agent gives a sign every second.
const WATCHDOG_S: u32 = 4;
const CONFIGURATION: &str = "/etc/forwarder/forwarder.toml";
/// Where the machine finds the packages.
const PACKAGES: &str = "/packages";

/// The container.
struct Machine {
    process: Process,
    root: PathBuf,
    /// Its first process, as this host numbers it.
    first: i32,
}

impl Machine {
    /// Boots it in the gateway's network namespace.
    fn boot(site: &Site, archive: &Path, packages: &Path) -> Result<Self> {
        let root = site.lab.directory().join("root");
        let bpf = site.lab.directory().join("bpf");
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&bpf)?;
        let mut tar = Command::new("tar");
        tar.args(["--exclude=./dev/*", "-xf"])
            .arg(archive)
            .arg("-C")
            .arg(&root);
        ensure!(
            tar.status()?.success(),
            "{} cannot be unpacked",
            archive.display()
        );
        let launch = format!(
            "mount -t bpf bpf {bpf} -o mode=0700 && exec systemd-nspawn --quiet --boot --console=pipe --register=no \
             --keep-unit --directory={root} --capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON,CAP_NET_RAW \
             --system-call-filter=bpf --bind={bpf}:/sys/fs/bpf --bind-ro={packages}:{PACKAGES}",
            bpf = bpf.display(),
            root = root.display(),
            packages = packages.display(),
        );
        let arguments: Vec<_> = ["--mount", "--", "sh", "-c", &launch]
            .into_iter()
            .map(OsStr::new)
            .collect::<Vec<_>>();
        let log = site.lab.directory().join("machine.log");
        let service = Service {
            name: "the machine",
            program: Path::new("unshare"),
            arguments: &arguments,
            environment: &[],
            stop_signal: Signal::SIGTERM,
            log: &log,
        };
        let process = site.lab.spawn(&site.gateway, &service)?;
        let mut machine = Self {
            process,
            root,
            first: 0,
        };
        wait_until("the machine to boot", BOOT_DEADLINE, || {
            let pid = machine.process.pid();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let first = children.split_whitespace().next();
            machine.first = first.with_context(|| lab::tail(&log, 20))?.parse()?;
            let state = machine.try_run("systemctl is-system-running")?;
            ensure!(["running", "degraded"].contains(&state.0.trim()), "{state:?}");
            Ok(())
        })?;
        Ok(machine)
    }

    /// What a line of shell prints in the machine, on both ways, and whether it succeeded.
    fn try_run(&self, line: &str) -> Result<(String, bool)> {
        let output = Command::new("nsenter")
            .args(["--all", "--target", &self.first.to_string(), "--"])
            .args(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"])
            .args(["DEBIAN_FRONTEND=noninteractive", "sh", "-c", line])
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((
            String::from_utf8_lossy(&said).into_owned(),
            output.status.success(),
        ))
    }

    /// As [`Self::try_run`], which has to succeed.
    fn run(&self, line: &str) -> Result<String> {
        match self.try_run(line)? {
            (said, true) => Ok(said),
            (said, false) => bail!("`{line}` failed on the machine: {said}{}", self.journal()?),
        }
    }

    fn journal(&self) -> Result<String> {
        Ok(self.try_run("journalctl --no-pager -n 60 -u forwarder")?.0)
    }

    /// What systemd knows of the unit.
    fn unit(&self, property: &str) -> Result<String> {
        let said = self.run(&format!("systemctl show --value --property={property} forwarder"))?;
        Ok(said.trim().to_owned())
    }

    fn install(&self, package: &Path) -> Result<()> {
        let name = package
            .file_name()
            .and_then(OsStr::to_str)
            .context("a package has a name")?;
        self.run(&format!("apt-get install --yes {PACKAGES}/{name}"))
            .map(drop)
    }

    /// /proc/PID/status of the agent.
    fn agent_status(&self) -> Result<String> {
        self.run(&format!("cat /proc/{}/status", self.unit("MainPID")?))
    }
}

/// The packages and the archive; `None`: this is not `cargo xtask test package`.
fn given() -> Option<(Vec<PathBuf>, PathBuf)> {
    let packages: Vec<_> = env::split_paths(&env::var_os("FORWARDER_PACKAGES")?).collect();
    Some((packages, env::var_os("FORWARDER_CLEAN_ROOT")?.into()))
}

/// The example that the package has, as an operator would make it fit: other addresses, and one backend behind a tunnel.
fn edited(example: &str, site: &Site) -> Result<String> {
    let server = |is_remote: bool| {
        let mut servers = site.servers.iter();
        let server = servers.find(|server| server.is_remote == is_remote);
        Ok::<_, anyhow::Error>(server.context("a server")?.address.to_string())
    };
    let interfaces: Vec<_> = site
        .interfaces
        .iter()
        .map(|name| format!("[interface.{name}]\n"))
        .collect();
    let mut text = example.to_owned();
    for (from, to) in [
        ("100.64.0.0/28", POOL),
        ("[interface.eth0]\n", &interfaces.concat()),
        ("\"10.0.0.11\"", &format!("\"{}\"", server(false)?)),
        ("\"10.0.0.12\"", &format!("\"{}\"", server(true)?)),
        ("\"10.0.0.100\"", &format!("\"{}\"", site.vip)),
        ("8080", &PORT.to_string()),
    ] {
        ensure!(text.contains(from), "the example has no {from}");
        text = text.replace(from, to);
    }
    text += &format!("\n[tunnel.{}]\nmode = \"kernel\"\n", site.tunnel);
    for (name, cidr, is_remote) in site.networks {
        text += &format!("\n[network.{name}]\ncidrs = [\"{cidr}\"]\n");
        if is_remote {
            text += &format!("tunnel = \"{}\"\n", site.tunnel);
        }
    }
    Ok(text)
}

/// Pages of both servers come through the VIP.
fn await_pages(site: &Site) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    wait_until("pages of both servers", DEADLINE, || {
        let answer = curl(site.client(), site.vip, PORT)?;
        let server = answer.body().and_then(|page| site.answered_by(page));
        seen.insert(server.context("no page of a server")?.name);
        ensure!(seen.len() == 2, "only {seen:?}");
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_package_is_installed_upgraded_under_traffic_and_purged() -> Result<()> {
    let Some((packages, archive)) = given() else {
        let is_strict = env::var_os("FORWARDER_TESTS_STRICT").is_some_and(|value| value == "1");
        assert!(
            !is_strict,
            "FORWARDER_PACKAGES and FORWARDER_CLEAN_ROOT are missing"
        );
        println!("SKIP: needs packages; `cargo xtask test package` makes them");
        return Ok(());
    };
    let [old, new] = packages.as_slice() else {
        bail!("two packages are needed: {packages:?}");
    };
    if !lab::can_run_test(None) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let folder = old.parent().context("packages lie in a folder")?;
    let machine = Machine::boot(&site, &archive, folder)?;

    // Nobody becomes a gateway by installing a package, and nothing to build with is needed.
    let (said, has_compiler) = machine.try_run("command -v cc gcc clang rustc ld")?;
    ensure!(!has_compiler && said.is_empty(), "the clean root has {said}");
    machine.install(old)?;
    machine.run("systemd-analyze verify --man=no forwarder.service")?;
    machine.run(&format!(
        "systemd-analyze security --no-pager --threshold={MAX_EXPOSURE} forwarder.service"
    ))?;
    assert_eq!(machine.unit("UnitFileState")?, "enabled");
    assert_eq!(machine.unit("ActiveState")?, "inactive");
    machine.run("systemctl start forwarder")?;
    assert_eq!(
        machine.unit("ActiveState")?,
        "inactive",
        "without a configuration"
    );
    for file in [
        "/usr/share/man/man8/forwarder-run.8.gz",
        "/usr/share/bash-completion/completions/forwarder",
        "/usr/share/doc/forwarder/operations.md",
        "/usr/share/doc/forwarder/third-party.txt",
    ] {
        machine.run(&format!("test -s {file}"))?;
    }

    // The example, made to fit.
    let example = machine.run("cat /etc/forwarder/example.toml")?;
    fs::write(
        machine.root.join(CONFIGURATION.trim_start_matches('/')),
        edited(&example, &site)?,
    )?;
    machine.run(&format!("forwarder check -c {CONFIGURATION}"))?;
    machine.run("systemctl start forwarder")?;
    assert_eq!(machine.unit("ActiveState")?, "active", "{}", machine.journal()?);
    await_pages(&site)?;
    let status = machine.agent_status()?;
    for set in ["CapPrm", "CapEff"] {
        ensure!(
            status.contains(&format!("{set}:\t{:016x}", KEPT.bits())),
            "{status}"
        );
    }
    ensure!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    machine.run("systemctl reload forwarder")?;
    machine.run("forwarder status")?;

    // The upgrade: no request fails, an open connection goes on, although on_stop is "detach".
    let before = machine.unit("MainPID")?;
    let mut kept = KeptConnection::open(site.client(), site.vip, PORT)?;
    let page = kept.get()?;
    let load = thread::scope(|scope| {
        let load = scope.spawn(|| {
            wrk(
                site.client(),
                site.vip,
                PORT,
                Connections::KeepAlive,
                CONNECTIONS,
                LOAD,
            )
        });
        let single = scope.spawn(|| {
            wrk(
                site.client(),
                site.vip,
                PORT,
                Connections::PerRequest,
                CONNECTIONS,
                LOAD,
            )
        });
        let upgraded = machine.install(new);
        ensure!(!load.is_finished(), "the upgrade took longer than the load");
        let join = |load: thread::ScopedJoinHandle<'_, Result<_>>| {
            load.join().unwrap_or_else(|_| bail!("wrk panicked"))
        };
        upgraded?;
        Ok([join(load)?, join(single)?])
    })?;
    for load in &load {
        ensure!(
            load.requests > 100 && load.socket_errors == 0 && load.refused == 0,
            "{load:?}"
        );
    }
    println!("upgrade under load: {load:?}");
    assert_eq!(kept.get()?, page, "an open connection outlives the upgrade");
    assert_eq!(machine.unit("ActiveState")?, "active", "{}", machine.journal()?);
    ensure!(machine.unit("MainPID")? != before, "the old agent still runs");
    let installed = machine.run("dpkg-query --show --showformat='${Version}' forwarder")?;
    ensure!(
        new.display().to_string().contains(&format!("_{installed}_")),
        "{installed}"
    );
    await_pages(&site)?;

    // An agent that stands still is replaced, and its traffic does not notice.
    machine.run(&format!(
        "mkdir {DROP_IN} && printf '[Service]\\nWatchdogSec={WATCHDOG_S}\\n' > {DROP_IN}/quick.conf && \
         systemctl daemon-reload && systemctl restart forwarder"
    ))?;
    let still = machine.unit("MainPID")?;
    machine.run(&format!("kill -STOP {still}"))?;
    wait_until("the watchdog", DEADLINE, || {
        assert_eq!(kept.get()?, page, "beside an agent that stands still");
        let now = (machine.unit("ActiveState")?, machine.unit("MainPID")?);
        ensure!(now.0 == "active" && now.1 != still, "{now:?}");
        Ok(())
    })?;
    assert_eq!(machine.unit("NRestarts")?, "1", "{}", machine.journal()?);
    machine.run(&format!("rm -r {DROP_IN}"))?;

    // A removal takes the data path away and leaves the configuration, a purge leaves nothing.
    machine.run("test -e /sys/fs/bpf/forwarder")?;
    machine.run("apt-get remove --yes forwarder")?;
    machine.run("test ! -e /sys/fs/bpf/forwarder")?;
    machine.run(&format!("test -e {CONFIGURATION}"))?;
    let addresses = site.gateway.run("ip address show lo")?;
    ensure!(!addresses.contains(&PROBE_ADDRESS.to_string()), "{addresses}");
    let attached = site.gateway.run("bpftool net")?;
    ensure!(!attached.contains("forwarder"), "{attached}");
    machine.run("apt-get purge --yes forwarder")?;
    let left = machine.run(&format!(
        "find / -xdev -iname '*forwarder*' -not -path '{PACKAGES}/*' -not -path '/proc/*'"
    ))?;
    ensure!(left.is_empty(), "a purge leaves {left}");
    machine.process.stop()?;
    Ok(())
}
