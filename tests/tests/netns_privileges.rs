//! Ring 3: what the agent may do, as root, as another user, and in a container; and what it says when that is too little.
//! `--test-threads=1`, as the other labs.
//!
//! The container is made by hand, of what every runtime makes one of: a mount namespace whose root is read-only and
//! holds only what is given, and user 0 with the four capabilities. It has no user namespace, and no seccomp filter.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    status::HEALTHY,
    topology::{Extras, PORT, Site},
    wait_until,
};
use forwarder_user::privileges::KEPT;
use nix::sys::signal::Signal;

/// A user without an account or any rights.
const USER: u32 = 4711;
/// As setpriv(1) takes them.
const FOUR: &str = "+bpf,+net_admin,+perfmon,+net_raw";
/// What a health check by command writes about itself.
const REPORT: &str = "command.status";

/// A field of /proc/PID/status.
fn field(status: &str, name: &str) -> Result<String> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line
        .with_context(|| format!("no {name} in {status}"))?
        .trim()
        .to_owned())
}

/// A set of capabilities of /proc/PID/status.
fn set(status: &str, name: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&field(status, name)?, 16)?)
}

fn agent_directory(site: &Site) -> std::path::PathBuf {
    site.lab.directory().join("agent")
}

/// The site's configuration, with a backend that is checked by a command, which writes down what it may do.
fn configuration(site: &Site, pins: &Path) -> Result<Configuration> {
    let directory = agent_directory(site);
    fs::create_dir_all(&directory)?;
    let script = directory.join("check");
    let report = directory.join(REPORT);
    fs::write(
        &script,
        // Whoever reads it finds it whole, also while the next check runs.
        format!(
            "#!/bin/sh\ncat /proc/self/status > {0}.new && mv {0}.new {0}\n",
            report.display()
        ),
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let server = &site.servers[0];
    let text = site
        .web_configuration()
        .table("group.told", &[])
        .table(
            "group.told.health",
            &[
                ("kind", "\"command\""),
                ("command", &format!("[\"{}\"]", script.display())),
                ("interval", "\"300ms\""),
                ("timeout", "\"1s\""),
                ("rise", "1"),
            ],
        )
        .backend("told", server.name, server.address, PORT, 1)
        .to_string();
    let own = site.lab.pin_directory();
    Ok(Configuration::from_text(text.replace(
        &own.display().to_string(),
        &pins.display().to_string(),
    )))
}

/// Every file below the pins, and they themselves, are their owner's alone; seen from within the agent's mounts.
fn ensure_pins_are_closed(agent: &Agent, pins: &Path) -> Result<()> {
    let pins = Path::new("/proc")
        .join(agent.pid().to_string())
        .join("root")
        .join(pins.strip_prefix("/")?);
    let mode = |path: &Path| -> Result<u32> {
        let metadata = fs::metadata(path).with_context(|| format!("{}", path.display()))?;
        Ok(metadata.permissions().mode() & 0o777)
    };
    ensure!(mode(&pins)? == 0o700, "{:o}", mode(&pins)?);
    let mut count = 0;
    for entry in fs::read_dir(&pins)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            ensure!(mode(&entry.path())? & 0o077 == 0, "{}", entry.path().display());
            count += 1;
        }
    }
    ensure!(count > 10, "only {count} pins in {}", pins.display());
    Ok(())
}

/// Traffic flows, probes of both kinds work, and neither the agent nor what it starts may do more than it needs.
fn is_well_with_little(site: &Site, agent: &Agent, pins: &Path, bounding: u64) -> Result<()> {
    for group in ["web", "told"] {
        wait_until("healthy backends", Duration::from_secs(15), || {
            let backends = agent.backends(group)?;
            let other = backends.iter().find(|backend| backend.health != HEALTHY);
            ensure!(other.is_none(), "{other:?}");
            Ok(())
        })?;
    }
    for _ in 0..8 {
        let answer = site.curl()?;
        ensure!(
            answer.body().is_some_and(|page| site.answered_by(page).is_some()),
            "{answer:?}"
        );
    }
    // Asks the live maps, by a test run of a program.
    let question = ["explain", "tcp", "192.0.2.7:51000"];
    let explained = agent.ask(
        question[0],
        &[question[1], question[2], &format!("{}:{PORT}", site.vip)],
    )?;
    ensure!(explained.status.success(), "{explained:?}");

    // Threads as well as the process: each has capabilities of its own. One that has ended meanwhile may do nothing.
    let mut alive = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", agent.pid()))? {
        let thread = thread?.path();
        let status = match fs::read_to_string(thread.join("status")) {
            Err(_) if !thread.exists() => continue,
            status => status.with_context(|| format!("{}", thread.display()))?,
        };
        alive += 1;
        assert_eq!(set(&status, "CapEff")?, KEPT.bits(), "{status}");
        assert_eq!(set(&status, "CapPrm")?, KEPT.bits(), "{status}");
        assert_eq!(set(&status, "CapInh")?, 0, "{status}");
        assert_eq!(set(&status, "CapAmb")?, 0, "{status}");
        assert_eq!(set(&status, "CapBnd")?, bounding, "{status}");
        assert_eq!(field(&status, "NoNewPrivs")?, "1");
    }
    ensure!(alive > 0, "the agent has no thread");
    let status = fs::read_to_string(agent_directory(site).join(REPORT)).context("no report of the check")?;
    for name in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(set(&status, name)?, 0, "{status}");
    }
    assert_eq!(field(&status, "NoNewPrivs")?, "1");

    let mode = fs::metadata(agent.control_socket())?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    ensure_pins_are_closed(agent, pins)
}

#[test]
fn root_keeps_four_capabilities_and_its_commands_none() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let pins = site.lab.pin_directory();
    // Somebody was careless with it.
    fs::create_dir_all(&pins)?;
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o755))?;
    let configuration = configuration(&site, &pins)?;
    let agent = Agent::start(&site.lab, &site.gateway, &configuration)?;
    is_well_with_little(&site, &agent, &pins, 0)?;

    // A reload and a takeover need no more.
    agent.rewrite(&configuration.clone().agent_key("on_stop", "\"keep\""))?;
    let applied = agent.verb(&[
        "apply",
        "-c",
        &agent.configuration().display().to_string(),
        "--socket",
        &agent.control_socket().display().to_string(),
    ])?;
    ensure!(applied.status.success(), "{applied:?}");
    agent.end(Signal::SIGKILL)?;
    let agent = Agent::start(&site.lab, &site.gateway, &configuration)?;
    is_well_with_little(&site, &agent, &pins, 0)?;
    ensure!(agent.stop()?.success());
    ensure!(!pins.exists(), "the pins are still there");
    show_log.all_is_well();
    Ok(())
}

#[test]
fn another_user_with_the_four_capabilities_is_enough() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let directory = agent_directory(&site);
    // A BPF file system of its own, as /sys/fs/bpf lets in nobody but root.
    let mounted = directory.join("bpf");
    let pins = mounted.join("pins");
    let configuration = configuration(&site, &pins)?;
    fs::create_dir_all(&mounted)?;
    chown(&directory, Some(USER), Some(USER))?;
    let launch = format!(
        "mount -t bpf bpf {mounted} && chown {USER}:{USER} {mounted} && exec setpriv --reuid={USER} --regid={USER} \
         --clear-groups --inh-caps={FOUR} --ambient-caps={FOUR} --bounding-set=-all,{FOUR} -- \"$@\"",
        mounted = mounted.display()
    );
    let launcher = ["unshare", "--mount", "--", "sh", "-c", &launch, "sh"];
    let agent = Agent::start_by(&site.lab, &site.gateway, &configuration, &launcher)?;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    ensure!(field(&status, "Uid")?.starts_with(&USER.to_string()), "{status}");
    is_well_with_little(&site, &agent, &pins, KEPT.bits())?;
    ensure!(agent.stop()?.success());
    show_log.all_is_well();
    Ok(())
}

#[test]
fn a_container_with_the_four_capabilities_is_enough() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let pins = site.lab.pin_directory();
    let configuration = configuration(&site, &pins)?;
    // Where the container's root is: read-only, with a /tmp of its own, the host's BPF file system, and the folder that
    // holds configuration and control socket. The binary may lie anywhere below /.
    let root = site.lab.directory().join("root");
    fs::create_dir_all(&root)?;
    let binary = agent::binary()?;
    let launch = format!(
        "set -e; mount -t tmpfs tmpfs {root}; cd {root}; mkdir -p sys proc usr tmp dev .{folder} .{program}; \
         for link in bin lib lib64 sbin; do ln -s usr/$link $link; done; \
         mount --bind /usr usr; mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev; \
         mount --bind {folder} .{folder}; mount --bind {program} .{program}; \
         mount -o remount,bind,ro usr; mount -o remount,ro {root}; \
         exec chroot {root} setpriv --inh-caps=-all --bounding-set=-all,{FOUR} -- \"$@\"",
        root = root.display(),
        folder = agent_directory(&site).display(),
        program = binary.parent().context("the binary lies in a folder")?.display(),
    );
    let launcher = [
        "unshare", "--mount", "--ipc", "--uts", "--", "sh", "-c", &launch, "sh",
    ];
    let agent = Agent::start_by(&site.lab, &site.gateway, &configuration, &launcher)?;
    is_well_with_little(&site, &agent, &pins, KEPT.bits())?;
    ensure!(agent.stop()?.success());
    ensure!(!pins.exists(), "the pins are still there");
    show_log.all_is_well();
    Ok(())
}

#[test]
fn a_missing_capability_is_named() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let pins = site.lab.pin_directory();
    let file = agent_directory(&site).join("forwarder.toml");
    let text = configuration(&site, &pins)?.to_string();
    fs::write(&file, text)?;
    for (missing, name) in [
        ("bpf", "CAP_BPF"),
        ("perfmon", "CAP_PERFMON"),
        ("net_raw", "CAP_NET_RAW"),
        ("net_admin", "CAP_NET_ADMIN"),
    ] {
        let output = site.gateway.output(
            "setpriv",
            &[
                "--inh-caps=-all",
                &format!("--bounding-set=-{missing},-sys_admin"),
                "--",
                &agent::binary()?.display().to_string(),
                "run",
                "-c",
                &file.display().to_string(),
            ],
        )?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "without {name}: {said}");
        ensure!(
            said.contains(&format!("{name} missing")),
            "without {name}: {said}"
        );
        ensure!(said.contains(&format!("grant {name}:")), "without {name}: {said}");
        ensure!(!pins.exists(), "without {name} something was left behind");
    }
    Ok(())
}
