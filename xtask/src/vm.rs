//! Ring 4: tests on the kernels of Debian that users have, in QEMU.
//!
//! A machine boots one of Debian's kernels with the host's own root as its root: read-only over 9p, below an
//! overlay in memory, so the host's programs and the built tests are there and whatever tests write is gone with
//! the machine. Kernels are downloaded and unpacked into `target/vm/`, never installed. The machine has no way out:
//! its one network card leads nowhere.
//!
//! Emulated unless the processor's own virtualisation is there (see [`accelerator`]), which is about ten times
//! slower, so what is a matter of time is left out ([`LEFT_OUT`] says what and why).

use std::{
    collections::{BTreeMap, BTreeSet},
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

/// Programs that labs start again and again; the machine has them in memory, with what they load. Each start of one over
/// 9p is a hundred messages, which takes longer than the program.
const OFTEN: [&str; 20] = [
    "bash",
    "bridge",
    "cat",
    "conntrack",
    "curl",
    "ethtool",
    "ip",
    "nft",
    "nginx",
    "nsenter",
    "ping",
    "setpriv",
    "sh",
    "sleep",
    "socat",
    "sysctl",
    "tc",
    "tcpdump",
    "timeout",
    "wrk",
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

/// A test program of which some or all tests run in a machine.
struct Test {
    name: &'static str,
    options: &'static [&'static str],
    /// Parts of the names of those that run; none: all.
    parts: &'static [&'static str],
    limit_secs: u32,
    /// The only kernel it runs on, if there is one.
    only: Option<&'static str>,
}

impl Test {
    /// All of a program of ring 2, with its options.
    const fn program(name: &'static str, options: &'static [&'static str], limit_secs: u32) -> Self {
        Self {
            name,
            options,
            parts: &[],
            limit_secs,
            only: None,
        }
    }

    /// Those tests of a program with these parts in their names; they need the machine for themselves.
    const fn lab(name: &'static str, parts: &'static [&'static str], limit_secs: u32) -> Self {
        Self {
            name,
            options: &["--test-threads=1"],
            parts,
            limit_secs,
            only: None,
        }
    }

    /// Not on 6.1, which would only take as long again.
    const fn once(self) -> Self {
        Self {
            options: &["--test-threads=1", "--nocapture"],
            only: Some("6.12"),
            ..self
        }
    }
}

/// One that was chosen, and the parts of its tests' names that were; none: all of them.
struct Chosen<'a> {
    test: &'static Test,
    parts: Vec<&'a str>,
}

/// What runs in a machine: ring 2, and of ring 3 what shows that packets, flows and the agent's life are the same on
/// another kernel, one or a few labs of each kind.
///
/// A lab takes half a minute on an emulated processor, so of tests that differ in nothing the kernel knows of, one runs.
const TESTS: [Test; 32] = [
    Test::program("program_budget", &["--nocapture"], 120),
    Test::program("program_cases", &[], 600),
    Test::program("program_tables", &[], 300),
    // What lists a million flows in a second does not here.
    Test::program("program_explain", &["--skip", "a_million_flows"], 240),
    Test::program("program_handshakes", &[], 240),
    Test::program("program_agreement", &[], 600),
    Test::program("program_refusal", &[], 300),
    Test::program("program_takeover", &[], 240),
    Test::program("parity", &[], 300),
    Test::lab(
        "netns_forward",
        &[
            "large_transfers",
            "servers_of_a_dnat_group",
            "answers_arp",
            "generic_xdp",
            "without_redirect",
            "leaves_nothing_behind",
        ],
        900,
    ),
    Test::lab("netns_ipv6", &["clients_reach", "datagrams_go"], 400),
    Test::lab(
        "netns_native",
        &["vxlan_whole", "datagrams_pass", "follows_its_device"],
        500,
    ),
    Test::lab("netns_tunnels", &[], 500),
    Test::lab("netns_fragments", &[], 200),
    Test::lab(
        "netns_cookies",
        &["behind_a_native_tunnel", "an_upgrade_in_the_middle"],
        400,
    ),
    Test::lab("netns_echo", &["behind_the_tunnel", "between_the_families"], 400),
    Test::lab(
        "netns_families",
        &["transfers_arrive", "fragmented_datagrams"],
        // A site for each way.
        900,
    ),
    Test::lab(
        "netns_restart",
        &[
            "survives_a_killed_agent",
            "survives_a_stop",
            "changes_its_mode",
            "another_layout",
        ],
        600,
    ),
    Test::lab("netns_reload", &["backends_come_and_go", "refuses_half_way"], 400),
    Test::lab("netns_drain", &["are_reset_if", "udp_flows"], 400),
    Test::lab("netns_capture", &["both_sides", "a_trace"], 400),
    Test::lab(
        "netns_mtu",
        &[
            "clamped_segments_cross_a_native_tunnel",
            "replies_of_a_native_tunnel",
        ],
        400,
    ),
    Test::lab(
        "netns_rules",
        &["listeners_of_many_ports", "idle_connection"],
        400,
    ),
    Test::lab("netns_selection", &["least_connections"], 200),
    Test::lab("netns_explain", &["of_new_flows"], 300),
    Test::lab("netns_jumbo", &[], 300),
    Test::lab("netns_privileges", &[], 600),
    Test::lab("vm_doctor", &[], 300),
    Test::lab("vm_sctp", &[], 600),
    Test::lab("vm_vlan", &[], 300).once(),
    Test::lab("vm_bond", &[], 400).once(),
    // A minute each.
    Test::lab("vm_tunnels", &[], 2400).once(),
];

/// Test programs of rings 2 and 3 of which nothing runs in a machine, and why.
const LEFT_OUT: [(&str, &str); 13] = [
    ("netns_api", "says nothing about the kernel"),
    ("netns_bench", "measures time"),
    (
        "netns_doctor",
        "two dozen labs; `vm_doctor` has what depends on the kernel",
    ),
    (
        "netns_faults",
        "plays faults in seconds, which are too short here",
    ),
    ("netns_floods", "compares rates"),
    ("netns_getting_started", "says nothing about the kernel"),
    (
        "netns_health",
        "ten thousand backends, each in its turn; its other labs count seconds",
    ),
    ("netns_lab", "says nothing about the data path"),
    ("netns_page", "a browser, and nothing about the kernel"),
    (
        "netns_passive",
        "counts seconds until a server is out, under load",
    ),
    ("netns_pool", "a hundred thousand connections"),
    ("netns_top", "says nothing about the kernel"),
    ("netns_years", "full load"),
];

/// Accepts what goldens do not say, as everywhere; then the machine may write to their folder, and to nothing else.
const BLESS_VARIABLE: &str = "FORWARDER_BLESS";
const GOLDENS: &str = "tests/golden";

/// What an emulated processor had better not have. With `cx16`, each locked exchange of 16 bytes, of which the kernel's
/// allocator makes many, stops all processors; `la57` is a fifth level of page tables to walk.
const PROCESSOR: &str = "max,cx16=off,la57=off";
/// The emulated counter of cycles is sound on all processors, but the kernel thinks not and would ask a device for the time.
const CLOCK: &str = "tsc=reliable clocksource=tsc";

/// Longest life of one machine.
const LIFETIME: Duration = Duration::from_secs(2 * 3600);
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
# A new time makes the overlay keep a file, or a link itself, in memory.
touch -h @OFTEN@
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
        .iter()
        .filter_map(|test| {
            let mut named = names
                .iter()
                .filter(|(part, _)| test.name.contains(part))
                .peekable();
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
    if chosen.is_empty() {
        let parts: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        let why: Vec<String> = LEFT_OUT
            .iter()
            .filter(|(name, _)| parts.iter().any(|part| name.contains(part)))
            .map(|(name, why)| format!("\n  {name} is left out: {why}"))
            .collect();
        bail!(
            "no test program of the vm ring is called like {}{}",
            parts.join(" or "),
            why.concat()
        );
    }
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
            .filter(|chosen| chosen.test.only.is_none_or(|only| only == version))
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

/// Files of [`OFTEN`], of the agent, and of the libraries that they load, with the links that lead there.
fn often(forwarder: &Path) -> Result<Vec<String>> {
    let mut paths =
        BTreeSet::from(["/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"].map(PathBuf::from));
    let programs = OFTEN.into_iter().filter_map(find_program);
    for program in programs.chain([forwarder.to_owned()]) {
        let output = Command::new("ldd").arg(&program).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
        paths.extend(libraries.map(PathBuf::from));
        paths.insert(program);
    }
    let mut files = BTreeSet::new();
    for path in paths {
        // Through all links: of `/bin/sh`, also `dash`.
        files.insert(fs::canonicalize(&path)?.display().to_string());
        files.insert(path.display().to_string());
    }
    Ok(files.into_iter().collect())
}

/// Builds the test programs; their copies by name.
fn build_tests(folder: &Path, chosen: &[Chosen<'_>]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = workspace::cargo(&["test", "--locked", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics");
    for chosen in chosen {
        command.args(["--test", chosen.test.name]);
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
            .args([
                "-machine",
                &format!("pc,accel={}", accelerator()),
                "-cpu",
                PROCESSOR,
            ])
            .args(["-smp", "2", "-m", "4096", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot", "-kernel"])
            .arg(self.image())
            .arg("-initrd")
            .arg(&initial)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet {CLOCK} panic=-1 stage={}",
                stage.display()
            ))
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
            let Test {
                name,
                options,
                limit_secs,
                ..
            } = test;
            let parts = if parts.is_empty() { test.parts } else { parts };
            let program = tests
                .get(*name)
                .with_context(|| format!("no test program {name}"))?;
            run += &format!(
                "echo '{STARTED}{name}'\ntimeout --kill-after=60 {limit_secs} {} {} {}\necho \"{ENDED}$?\"\n",
                program.display(),
                options.join(" "),
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
            .replace("@OFTEN@", &often(forwarder)?.join(" "))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::test::{Ring, test_files};

    #[test]
    fn every_test_program_of_the_kernel_runs_or_says_why_not() {
        let mut files = BTreeSet::new();
        for ring in [Ring::Program, Ring::Netns, Ring::Vm] {
            files.extend(test_files(ring).unwrap());
        }
        let left_out = LEFT_OUT.iter().map(|(name, _)| *name);
        let mut named: Vec<&str> = TESTS.iter().map(|test| test.name).chain(left_out).collect();
        named.sort_unstable();
        assert_eq!(named, files.iter().map(String::as_str).collect::<Vec<_>>());
    }

    #[test]
    fn parts_of_names_name_tests() {
        for test in &TESTS {
            let file = workspace::root().join(format!("tests/tests/{}.rs", test.name));
            let text = fs::read_to_string(&file).unwrap();
            for part in test.parts {
                let is_there = text
                    .lines()
                    .any(|line| line.starts_with("fn ") && line.contains(part));
                assert!(is_there, "{}: no test is called like {part}", test.name);
            }
        }
    }

    fn log_of(lines: &[&str]) -> (Log, bool) {
        let mut log = Log::default();
        let is_done = lines
            .iter()
            .fold(false, |is_done, line| is_done | log.add_line(line));
        (log, is_done)
    }

    #[test]
    fn what_a_machine_says_is_told_by_program() {
        let (log, is_done) = log_of(&[
            "== parity",
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "vm: status 0",
            "== netns_forward",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "vm: status 101",
            "vm: done",
        ]);
        let ran: Vec<String> = log.ran.iter().map(Ran::to_string).collect();
        assert_eq!(
            ran,
            [
                "parity ok, 2 passed, 0 failed (0 s)",
                "netns_forward FAILED, 2 passed, 1 failed (0 s)"
            ]
        );
        assert!(is_done);
    }

    #[test]
    fn a_program_without_tests_without_an_end_or_out_of_time_is_none_that_passed() {
        let none =
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.00s";
        let one =
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        for lines in [
            ["== parity", none, "vm: status 0"],
            ["== parity", one, "vm: status 124"],
            ["== parity", one, ""],
        ] {
            let (log, is_done) = log_of(&lines);
            assert!(!log.ran[0].is_ok() && !is_done, "{lines:?}");
        }
    }
}
