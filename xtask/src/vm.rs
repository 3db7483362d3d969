//! Ring 4: tests on the kernels of Debian that users have, in QEMU.
//!
//! A machine boots one of Debian's kernels with the host's own root as its root: read-only over 9p, below an
//! overlay in memory, so the host's programs and the built tests are there and whatever tests write is gone with
//! the machine. Kernels are downloaded and unpacked into `target/vm/`, never installed. The machine has no way out:
//! its one network card leads nowhere.
//!
//! Emulated unless the processor's own virtualisation is there (`kvm_intel`, `kvm_amd`), so it takes minutes, and
//! tests that measure time are left out.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{toolchain::find_program, workspace};

/// Version, and the package that depends on its newest build. Debian 12 has both.
const KERNELS: [(&str, &str); 2] = [("6.1", "linux-image-amd64"), ("6.12", "linux-image-6.12-amd64")];

/// Programs that it takes, and their packages.
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

/// What runs in a machine.
///
/// Of ring 3 only what needs no load: an emulated processor is too slow for the load tests' bounds, and for the
/// million flows of `program_explain`.
const TESTS: [Test; 11] = [
    ("program_budget", &["--nocapture"], 120, None),
    ("program_cases", &[], 240, None),
    ("program_tables", &[], 240, None),
    ("program_explain", &["--skip", "a_million_flows"], 240, None),
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
    ("netns_forward", &["--test-threads=1", "generic_xdp"], 400, None),
];

/// Longest life of one machine.
const LIFETIME: Duration = Duration::from_secs(3600);
/// What the machine says last, before the number of test programs that failed.
const DONE: &str = "vm: failed test programs: ";

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
cd @TESTS@
echo "vm: Linux $release"
failed=0
@RUN@
echo "@DONE@$failed"
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
    let missing: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        bail!(
            "virtual machines need more programs\n  hint: apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    let folder = workspace::root().join("target/vm");
    let forwarder = strip("forwarder", forwarder, &folder)?;
    let tests = build_tests(&folder, &chosen)?;
    let mut summary = Vec::new();
    let mut is_ok = true;
    for (version, package) in KERNELS {
        if !versions.is_empty() && !versions.contains(&version) {
            continue;
        }
        let kernel = Kernel::get(&folder, version, package)?;
        eprintln!("vm: Linux {}", kernel.release);
        let here: Vec<&Chosen<'_>> = chosen
            .iter()
            .filter(|chosen| chosen.test.3.is_none_or(|only| only == version))
            .collect();
        let failed = kernel.boot(&forwarder, &here, &tests)?;
        is_ok &= failed == 0;
        summary.push(match failed {
            0 => format!("Linux {version} ok"),
            failed => format!("Linux {version} FAILED ({failed} test programs)"),
        });
    }
    Ok((summary.join(", "), is_ok))
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

    /// Boots it and waits for its end; how many test programs failed.
    fn boot(
        &self,
        forwarder: &Path,
        chosen: &[&Chosen<'_>],
        tests: &BTreeMap<String, PathBuf>,
    ) -> Result<usize> {
        let stage = self.folder.join("stage.sh");
        fs::write(&stage, self.stage(forwarder, chosen, tests)?)?;
        let initial = self.initial_files()?;
        let log = self.folder.join("console.log");
        let accelerator = if ["kvm_intel", "kvm_amd"]
            .iter()
            .any(|module| Path::new("/sys/module").join(module).is_dir())
        {
            "kvm:tcg"
        } else {
            "tcg"
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", &format!("pc,accel={accelerator}"), "-cpu", "max"])
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
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut machine = command.spawn().context("can't run qemu-system-x86_64")?;
        let failed = listen(&mut machine);
        // It may have ended already, which is no error.
        let _ = machine.kill();
        machine.wait()?;
        failed?.with_context(|| {
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
                "echo '== {name}'\ntimeout {timeout_secs} {} {} {} || {{ echo \"{name}: status $?\"; failed=$((failed + 1)); }}\n",
                program.display(),
                arguments.join(" "),
                parts.join(" ")
            );
        }
        let modules = self.folder.join("lib/modules").join(&self.release);
        let folder = workspace::root().join("tests");
        Ok(STAGE
            .replace("@MODULES@", &modules.display().to_string())
            .replace("@FORWARDER@", &forwarder.display().to_string())
            .replace("@TESTS@", &folder.display().to_string())
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

/// Shows what the machine prints until it is done; then how many test programs failed, or nothing if it ended
/// without saying so or lived too long.
fn listen(machine: &mut Child) -> Result<Option<usize>> {
    let output = machine.stdout.take().context("QEMU has no output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let end = Instant::now() + LIFETIME;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                let line = line.trim_end();
                println!("{line}");
                if let Some(count) = line.strip_prefix(DONE) {
                    return Ok(Some(count.parse()?));
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
