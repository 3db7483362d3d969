//! Ring 4: tests on the kernels of Debian that users have, in QEMU.
//!
//! A machine boots one of Debian's kernels with the host's own root as its root: read-only over 9p, below an
//! overlay in memory, so the host's programs and the built tests are there and whatever tests write is gone with
//! the machine. Kernels are downloaded and unpacked into `target/vm/`, never installed. The machine has no way out:
//! its one network card leads nowhere.
//!
//! Emulated unless the processor's own virtualisation is there (see [`accelerator`]), which is some fifteen times
//! slower, so what is a matter of time is left out ([`LEFT_OUT`] says what and why).

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{setup, test::Tally, toolchain::find_program, workspace};

/// Version, and the package that depends on its newest build. Debian 12 has both.
const KERNELS: [(&str, &str); 2] = [("6.1", "linux-image-amd64"), ("6.12", "linux-image-6.12-amd64")];

/// Programs that it takes, and their packages; installed when they are missing.
const PROGRAMS: [(&str, &str); 7] = [
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("modprobe", "kmod"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    ("wg", "wireguard-tools"),
    ("xz", "xz-utils"),
];

/// Drivers that the machine needs before it has a root.
const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio-rng",
];

/// A test program, its arguments, how long it may take, in seconds, and the only kernel it runs on, if there is one.
type Test = (&'static str, &'static [&'static str], u32, Option<&'static str>);

/// One that was chosen, and the parts of its tests' names that were; none: all of them.
struct Chosen<'a> {
    test: Test,
    parts: Vec<&'a str>,
}

/// What runs in a machine: ring 2, and of ring 3 what shows that packets, flows and the agent's life are the same on
/// another kernel.
const TESTS: [Test; 36] = [
    ("program_budget", &["--nocapture"], 120, None),
    ("program_cases", &[], 240, None),
    ("program_tables", &[], 240, None),
    ("program_explain", &["--skip", "a_million_flows"], 240, None),
    ("program_handshakes", &[], 240, None),
    ("program_agreement", &[], 400, None),
    ("program_refusal", &[], 400, None),
    ("parity", &[], 300, None),
    ("vm_doctor", &["--test-threads=1"], 300, None),
    // A minute each, and 6.1 has no other devices.
    (
        "vm_tunnels",
        &["--test-threads=1", "--nocapture"],
        2400,
        Some("6.12"),
    ),
    ("vm_vlan", &["--test-threads=1", "--nocapture"], 300, Some("6.12")),
    ("vm_bond", &["--test-threads=1", "--nocapture"], 400, Some("6.12")),
    ("vm_sctp", &["--test-threads=1", "--nocapture"], 600, None),
    (
        "netns_forward",
        &["--test-threads=1", "--skip", "load_"],
        900,
        None,
    ),
    ("netns_ipv6", &["--test-threads=1"], 900, None),
    ("netns_native", &["--test-threads=1"], 900, None),
    ("netns_tunnels", &["--test-threads=1"], 900, None),
    ("netns_echo", &["--test-threads=1"], 900, None),
    ("netns_families", &["--test-threads=1"], 900, None),
    ("netns_fragments", &["--test-threads=1"], 900, None),
    ("netns_mtu", &["--test-threads=1"], 900, None),
    ("netns_cookies", &["--test-threads=1"], 900, None),
    ("netns_drain", &["--test-threads=1"], 900, None),
    ("netns_reload", &["--test-threads=1"], 900, None),
    ("netns_restart", &["--test-threads=1"], 900, None),
    ("netns_selection", &["--test-threads=1"], 900, None),
    ("netns_rules", &["--test-threads=1"], 900, None),
    ("netns_passive", &["--test-threads=1"], 900, None),
    ("netns_health", &["--test-threads=1"], 900, None),
    ("netns_capture", &["--test-threads=1"], 900, None),
    ("netns_explain", &["--test-threads=1"], 900, None),
    ("netns_doctor", &["--test-threads=1"], 900, None),
    ("netns_jumbo", &["--test-threads=1"], 900, None),
    ("netns_privileges", &["--test-threads=1"], 900, None),
    ("netns_api", &["--test-threads=1"], 900, None),
    ("netns_lab", &["--test-threads=1"], 900, None),
];

/// Accepts what goldens do not say, as everywhere; then the machine may write to their folder, and to nothing else.
const BLESS_VARIABLE: &str = "FORWARDER_BLESS";
const GOLDENS: &str = "tests/golden";

/// Longest life of one machine.
const LIFETIME: Duration = Duration::from_secs(3600);
/// What the machine says before the name of a test program that it starts.
const STARTED: &str = "== ";
/// What it says after one, before its exit status.
const ENDED: &str = "vm: status ";
/// What it says last.
const DONE: &str = "vm: done";

/// A card with large receive offload, that leads nowhere.
const CARD: [&str; 4] = [
    "-netdev",
    "user,id=card,restrict=on",
    "-device",
    "vmxnet3,netdev=card",
];

/// First program of the machine: finds the host's root.
const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
fail() { $B echo "vm: $1" > /dev/ttyS0; $B poweroff -f; }
$B mount -t devtmpfs dev /dev
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
for module in $($B cat /modules/order); do $B insmod /modules/$module.ko || fail "no module $module"; done
$B mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host || fail "no root"
$B mount -t tmpfs -o size=80% memory /memory
$B mkdir /memory/upper /memory/work
$B mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root || fail "no overlay"
for folder in dev proc sys; do $B mount --move /$folder /root/$folder; done
exec $B switch_root /root /bin/sh "$stage"
"#;

/// Second program, in the host's root: what a distribution's own would have made ready, as far as labs need it.
const STAGE: &str = r#"export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs run /run
mkdir -p /run/netns /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
exec < /dev/null > /dev/hvc0 2>&1
release=$(uname -r)
mkdir -p /lib/modules/$release
mount --bind @MODULES@ /lib/modules/$release
ip link set lo up
modprobe vmxnet3
for device in /sys/class/net/*; do
  [ -e $device/device/driver ] && ip link set "${device##*/}" name card0
done
export FORWARDER_TESTS_STRICT=1 FORWARDER_TESTS_VM=card0 FORWARDER_BIN=@FORWARDER@
@GOLDENS@
cd @TESTS@
echo "vm: Linux $release"
@RUN@
echo "@DONE@"
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// Runs the tests on every kernel, one machine after the other; what each kernel came to, and whether all is well.
/// `choice` narrows that down: versions of kernels, and parts of names of test programs, where one with a colon goes on
/// with a part of the names of its tests.
///
/// # Errors
/// A kernel cannot be had, a machine does not boot or end, or nothing is left to run.
pub(crate) fn run(forwarder: &Path, choice: &[String]) -> Result<(String, bool)> {
    let (versions, names): (Vec<&str>, Vec<&str>) = choice
        .iter()
        .map(String::as_str)
        .partition(|word| KERNELS.iter().any(|(version, _)| version == word));
    let names: Vec<(&str, &str)> = names
        .into_iter()
        .map(|name| name.split_once(':').unwrap_or((name, "")))
        .collect();
    let chosen: Vec<Chosen<'_>> = TESTS
        .into_iter()
        .filter_map(|test| {
            let mut named = names.iter().filter(|(part, _)| test.0.contains(part)).peekable();
            let is_chosen = names.is_empty() || named.peek().is_some();
            is_chosen.then(|| Chosen {
                test,
                parts: named
                    .map(|(_, part)| *part)
                    .filter(|part| !part.is_empty())
                    .collect(),
            })
        })
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no test program of the vm ring is called like {}",
        names
            .iter()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(" or ")
    );
    setup::install_programs(&PROGRAMS)?;
    let folder = workspace::root().join("target/vm");
    let forwarder = strip("forwarder", forwarder, &folder)?;
    let tests = build_tests(&folder, &chosen)?;
    let mut summary = Vec::new();
    let mut is_ok = true;
    for (version, package) in KERNELS {
        if !versions.is_empty() && !versions.contains(&version) {
            continue;
        }
        let here: Vec<&Chosen<'_>> = chosen
            .iter()
            .filter(|chosen| chosen.test.3.is_none_or(|only| only == version))
            .collect();
        if here.is_empty() {
            continue;
        }
        let kernel = Kernel::get(&folder, version, package)?;
        eprintln!("vm: Linux {}", kernel.release);
        let ran = kernel.boot(&forwarder, &here, &tests)?;
        for ran in &ran {
            eprintln!("vm: Linux {version}: {ran}");
        }
        let failed = ran.iter().filter(|ran| !ran.is_ok()).count();
        is_ok &= failed == 0;
        summary.push(match failed {
            0 => format!("Linux {version} ok"),
            failed => format!("Linux {version} FAILED ({failed} of {} test programs)", ran.len()),
        });
    }
    ensure!(
        !summary.is_empty(),
        "no kernel was chosen that any of these runs on"
    );
    Ok((summary.join(", "), is_ok))
}

/// The processor's own virtualisation, where QEMU can use it for a kernel as it is; else emulation.
///
/// `/dev/kvm` alone says little: that of `kvm_pvm` (a cloud's machine without nested virtualisation) runs kernels made
/// for it, and emulates others instruction by instruction, until one that it does not know.
fn accelerator() -> &'static str {
    let has_module = |module| Path::new("/sys/module").join(module).is_dir();
    if ["kvm_intel", "kvm_amd"].into_iter().any(has_module) {
        "kvm:tcg"
    } else {
        "tcg"
    }
}

/// A copy without debug information, a fiftieth of the size: the machine reads it over 9p.
fn strip(name: &str, program: &Path, folder: &Path) -> Result<PathBuf> {
    let programs = folder.join("programs");
    fs::create_dir_all(&programs).with_context(|| programs.display().to_string())?;
    let copy = programs.join(name);
    workspace::run(Command::new("strip").arg("-o").arg(&copy).arg(program))?;
    Ok(copy)
}

/// Builds the test programs; their copies by name.
fn build_tests(folder: &Path, chosen: &[Chosen<'_>]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = workspace::cargo(&["test", "--locked", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics");
    for chosen in chosen {
        command.args(["--test", chosen.test.0]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("can't run cargo")?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut programs = BTreeMap::new();
    for message in serde_json::Deserializer::from_reader(BufReader::new(stdout)).into_iter() {
        let message: Value = message.context("can't read cargo's messages")?;
        if let (Some(name), Some(file), Some("test")) = (
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
            message["target"]["kind"][0].as_str(),
        ) {
            programs.insert(name.to_owned(), strip(name, Path::new(file), folder)?);
        }
    }
    workspace::expect_success(&command, child.wait()?)?;
    Ok(programs)
}

/// An unpacked kernel.
struct Kernel {
    /// `6.12.117+deb12-amd64`.
    release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The newest build of a version that apt offers, downloaded unless it is there.
    fn get(folder: &Path, version: &str, package: &str) -> Result<Self> {
        let output = Command::new("apt-cache").args(["depends", package]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let newest = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(&format!("linux-image-{version}.")))
            .with_context(|| {
                format!("apt has no Linux {version}: {package} needs Debian 12\n  hint: apt-get update")
            })?;
        let release = newest.trim_start_matches("linux-image-").to_owned();
        let kernel = Self {
            folder: folder.join(&release),
            release,
        };
        if kernel.image().is_file() {
            return Ok(kernel);
        }
        let download = folder.join("download");
        let _ = fs::remove_dir_all(&download);
        fs::create_dir_all(&download)?;
        workspace::run(
            Command::new("apt-get")
                .args(["download", newest])
                .current_dir(&download),
        )?;
        let file = fs::read_dir(&download)?
            .next()
            .context("apt downloaded nothing")??;
        // Under another name until it is whole.
        let unpacked = download.join("unpacked");
        workspace::run(Command::new("dpkg").arg("-x").arg(file.path()).arg(&unpacked))?;
        workspace::run(
            Command::new("depmod")
                .arg("-b")
                .arg(&unpacked)
                .arg(&kernel.release),
        )?;
        fs::rename(&unpacked, &kernel.folder)?;
        fs::remove_dir_all(&download)?;
        Ok(kernel)
    }

    fn image(&self) -> PathBuf {
        self.folder.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Boots it and waits for its end; what became of each test program.
    fn boot(
        &self,
        forwarder: &Path,
        chosen: &[&Chosen<'_>],
        tests: &BTreeMap<String, PathBuf>,
    ) -> Result<Vec<Ran>> {
        let stage = self.folder.join("stage.sh");
        fs::write(&stage, self.stage(forwarder, chosen, tests)?)?;
        let initial = self.initial_files()?;
        let log = self.folder.join("console.log");
        let goldens = if env::var_os(BLESS_VARIABLE).is_some() {
            let folder = workspace::root().join(GOLDENS);
            vec![
                String::from("-virtfs"),
                format!(
                    "local,path={},mount_tag=goldens,security_model=none",
                    folder.display()
                ),
            ]
        } else {
            Vec::new()
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", &format!("pc,accel={}", accelerator()), "-cpu", "max"])
            .args(["-smp", "2", "-m", "4096", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot", "-kernel"])
            .arg(self.image())
            .arg("-initrd")
            .arg(&initial)
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 stage={}", stage.display()))
            .args(["-serial", &format!("file:{}", log.display())])
            .args(["-device", "virtio-serial-pci", "-device", "virtio-rng-pci"])
            .args([
                "-chardev",
                "stdio,id=out,signal=off",
                "-device",
                "virtconsole,chardev=out",
            ])
            .args([
                "-virtfs",
                "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            ])
            .args(CARD)
            .args(goldens)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut machine = command.spawn().context("can't run qemu-system-x86_64")?;
        let ran = listen(&mut machine);
        // It may have ended already, which is no error.
        let _ = machine.kill();
        machine.wait()?;
        ran?.with_context(|| {
            let text = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let last: Vec<_> = text.lines().rev().take(20).collect();
            let last: Vec<_> = last.into_iter().rev().collect();
            format!("Linux {} ended early or hung\n{}", self.release, last.join("\n"))
        })
    }

    /// The script of [`STAGE`], for these programs.
    fn stage(
        &self,
        forwarder: &Path,
        chosen: &[&Chosen<'_>],
        tests: &BTreeMap<String, PathBuf>,
    ) -> Result<String> {
        let mut run = String::new();
        for Chosen { test, parts } in chosen {
            let (name, arguments, timeout_secs, _) = *test;
            let program = tests
                .get(name)
                .with_context(|| format!("no test program {name}"))?;
            run += &format!(
                "echo '{STARTED}{name}'\ntimeout {timeout_secs} {} {} {}\necho \"{ENDED}$?\"\n",
                program.display(),
                arguments.join(" "),
                parts.join(" ")
            );
        }
        let modules = self.folder.join("lib/modules").join(&self.release);
        let folder = workspace::root().join("tests");
        let goldens = if env::var_os(BLESS_VARIABLE).is_some() {
            format!(
                "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 goldens {} && export {BLESS_VARIABLE}=1",
                workspace::root().join(GOLDENS).display()
            )
        } else {
            String::new()
        };
        Ok(STAGE
            .replace("@MODULES@", &modules.display().to_string())
            .replace("@FORWARDER@", &forwarder.display().to_string())
            .replace("@TESTS@", &folder.display().to_string())
            .replace("@GOLDENS@", &goldens)
            .replace("@DONE@", DONE)
            .replace("@RUN@", &run))
    }

    /// The archive that the kernel boots with: busybox, drivers and [`INIT`].
    fn initial_files(&self) -> Result<PathBuf> {
        let folder = self.folder.join("initial");
        let _ = fs::remove_dir_all(&folder);
        for name in ["bin", "dev", "host", "memory", "modules", "proc", "root", "sys"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let busybox = find_program("busybox").context("no busybox")?;
        fs::copy(busybox, folder.join("bin/busybox"))?;
        let mut order: Vec<String> = Vec::new();
        for module in MODULES {
            for file in self.module_files(module)? {
                let name = file
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                let name = name.split('.').next().unwrap_or_default().to_owned();
                if order.contains(&name) {
                    continue;
                }
                let plain = folder.join(format!("modules/{name}.ko"));
                if file.extension().is_some_and(|extension| extension == "xz") {
                    let output = Command::new("xz").arg("-dc").arg(&file).output()?;
                    ensure!(output.status.success(), "cannot unpack {}", file.display());
                    fs::write(plain, output.stdout)?;
                } else {
                    fs::copy(&file, plain)?;
                }
                order.push(name);
            }
        }
        fs::write(folder.join("modules/order"), order.join("\n"))?;
        let init = folder.join("init");
        fs::write(&init, INIT)?;
        workspace::run(Command::new("chmod").arg("+x").arg(&init))?;
        let archive = self.folder.join("initial.cpio");
        let mut cpio = Command::new("cpio");
        cpio.args(["--quiet", "-o", "-H", "newc"])
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(fs::File::create(&archive)?);
        let mut child = cpio.spawn().context("can't run cpio")?;
        let mut names = child.stdin.take().context("cpio has no input")?;
        let found = Command::new("find").arg(".").current_dir(&folder).output()?;
        names.write_all(&found.stdout)?;
        drop(names);
        workspace::expect_success(&cpio, child.wait()?)?;
        Ok(archive)
    }

    /// Files of a module and of those that it needs, in the order of loading; none if it is built in.
    fn module_files(&self, module: &str) -> Result<Vec<PathBuf>> {
        let output = Command::new("modprobe")
            .arg("-d")
            .arg(&self.folder)
            .args(["-S", &self.release, "-D", module])
            .output()?;
        ensure!(
            output.status.success(),
            "modprobe: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.strip_prefix("insmod "))
            .filter_map(|line| line.split_whitespace().next())
            .map(PathBuf::from)
            .collect())
    }
}

/// What became of a test program.
#[derive(Debug)]
struct Ran {
    name: String,
    tally: Tally,
    /// Exit status; none until it ends.
    status: Option<u8>,
    took: Duration,
}

impl Ran {
    /// One in which no test ran says nothing about the kernel.
    fn is_ok(&self) -> bool {
        self.status == Some(0) && self.tally.failed == 0 && self.tally.passed > 0
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match (self.is_ok(), self.status) {
            (true, _) => "ok",
            // `timeout` says so.
            (false, Some(124)) => "TOOK TOO LONG",
            (false, _) => "FAILED",
        };
        let Self {
            name, tally, took, ..
        } = self;
        let Tally { passed, failed, .. } = tally;
        write!(
            f,
            "{name} {verdict}, {passed} passed, {failed} failed ({} s)",
            took.as_secs()
        )
    }
}

/// What a machine's lines say about its test programs.
#[derive(Default)]
struct Log {
    ran: Vec<Ran>,
    started: Option<Instant>,
}

impl Log {
    /// Takes the next line; whether it is the last.
    fn add_line(&mut self, line: &str) -> bool {
        if let Some(name) = line.strip_prefix(STARTED) {
            self.started = Some(Instant::now());
            self.ran.push(Ran {
                name: name.to_owned(),
                tally: Tally::default(),
                status: None,
                took: Duration::ZERO,
            });
        } else if let Some(ran) = self.ran.last_mut() {
            ran.tally.add_line(line);
            if let Some(status) = line.strip_prefix(ENDED) {
                ran.status = status.parse().ok();
                ran.took = self.started.map_or(Duration::ZERO, |started| started.elapsed());
            }
        }
        line == DONE
    }
}

/// Shows what the machine prints until it is done; then what became of its test programs, or nothing if it ended
/// without saying so or lived too long.
fn listen(machine: &mut Child) -> Result<Option<Vec<Ran>>> {
    let output = machine.stdout.take().context("QEMU has no output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut log = Log::default();
    let end = Instant::now() + LIFETIME;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                let line = line.trim_end();
                println!("{line}");
                if log.add_line(line) {
                    return Ok(Some(log.ran));
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
