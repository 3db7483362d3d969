//! `cargo xtask setup`: finds what building, testing and the demo need, and installs what is missing.
//!
//! Five things: rustfmt and clippy; the programs that the labs use; a compiler with `core` for BPF;
//! `bpf-linker`; `mdbook` for the documentation. Compilers come from rustup where it can download, else from Debian's packages;
//! the last two are built into `target/tools`, so they are gone with `cargo clean`. Rules for compiler and
//! linker are in `toolchain.rs`. Nothing else on the machine changes: no service is started or enabled, and a second
//! run finds everything and does nothing.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    book,
    toolchain::{CHOICE_VARIABLE, LLVM, OLDEST_LINKER, OLDEST_RUSTC, Survey, Version, find_program},
    workspace,
};

#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Say what is missing and install nothing
    #[arg(long)]
    check: bool,
}

/// Programs that must be there, and the Debian package that has each.
const PROGRAMS: [(&str, &str); 16] = [
    ("bpftool", "bpftool"),
    ("c++", "g++"),
    ("chromium", "chromium"),
    ("conntrack", "conntrack"),
    ("curl", "curl"),
    ("ethtool", "ethtool"),
    ("faketime", "faketime"),
    ("ip", "iproute2"),
    ("mmdebstrap", "mmdebstrap"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("ping", "iputils-ping"),
    ("socat", "socat"),
    ("systemd-nspawn", "systemd-container"),
    ("tcpdump", "tcpdump"),
    ("wrk", "wrk"),
];

/// Apart from the others, because these packages would start a server.
const SERVERS: [(&str, &str); 3] = [
    ("haproxy", "haproxy"),
    ("nginx", "nginx-light"),
    ("promtool", "prometheus"),
];

/// nginx's proxy of connections is a file that it loads, in a package of its own.
const NGINX_STREAM: (&str, &str) = (
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "libnginx-mod-stream",
);

/// Debian's compiler with `core` built for BPF. In Debian 12 these come from the security suite, which
/// has a new enough one for the sake of browsers; they live beside rustup's.
const DEBIAN_COMPILER: [&str; 3] = ["cargo-web", "libstd-rust-web-dev-bpf", "rustc-web"];

/// What `bpf-linker` is built against; see [`LLVM`].
const DEBIAN_LLVM: [&str; 5] = [
    "libpolly-22-dev",
    "libxml2-dev",
    "libzstd-dev",
    "llvm-22-dev",
    "zlib1g-dev",
];

/// The nightly to fetch where no rustup toolchain can be used: one whose LLVM is [`LLVM`]. Today's has
/// a newer one some day.
const NIGHTLY: &str = "nightly-2026-05-20";

/// The mdbook to build where there is none; a minute on two cores, as its server is left out.
const MDBOOK: &str = "0.5.4";

/// How long rustup may take, in seconds, until Debian's packages are tried: a machine without a way to
/// rustup's server may only notice by waiting.
const RUSTUP_COMPONENT_S: u32 = 120;
const RUSTUP_TOOLCHAIN_S: u32 = 300;

/// Finds, and unless `--check` installs.
///
/// # Errors
/// Something is missing and was not, or can't be, installed; the message says what and how to get it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check { check() } else { install() }
}

fn say(state: &str, what: &str) {
    eprintln!("{state:<10}  {what}");
}

fn check() -> Result<()> {
    let mut missing = 0;
    let mut item = |found: bool, what: &str| {
        say(if found { "found" } else { "missing" }, what);
        missing += usize::from(!found);
    };
    for tool in ["fmt", "clippy"] {
        item(has_cargo_tool(tool), &format!("cargo {tool}"));
    }
    for (program, _) in PROGRAMS.iter().chain(&SERVERS) {
        item(find_program(program).is_some(), program);
    }
    let (module, _) = NGINX_STREAM;
    item(Path::new(module).is_file(), module);
    let survey = Survey::take(&workspace::tools());
    match survey.compiler() {
        Some(compiler) => item(true, &format!("compiler for BPF: {compiler}")),
        None => item(false, "compiler for BPF"),
    }
    match survey.linker() {
        Some(linker) => item(true, &linker.to_string()),
        None => item(false, "bpf-linker"),
    }
    item(book::mdbook().is_some(), "mdbook");
    if missing > 0 {
        bail!("{missing} missing\n  hint: `cargo xtask setup` installs them");
    }
    Ok(())
}

fn install() -> Result<()> {
    install_cargo_tools()?;

    let missing: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .collect();
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    let found = PROGRAMS.len() - missing.len();
    say(
        "found",
        &format!("{found} of {} programs for labs and builds", PROGRAMS.len()),
    );

    let mut survey = Survey::take(&workspace::tools());
    if survey.compiler().is_none() && ask_rustup(&survey) {
        survey = Survey::take(&workspace::tools());
    }
    if survey.compiler().is_none() && env::var(CHOICE_VARIABLE).is_ok_and(|name| name != "system") {
        // The choice rules out Debian's compiler, so installing that would not help.
        survey.choose().map_err(anyhow::Error::msg)?;
    }
    match survey.compiler() {
        Some(compiler) => say("found", &format!("compiler for BPF: {compiler}")),
        None => packages.extend(DEBIAN_COMPILER),
    }
    match survey.linker() {
        Some(linker) => say("found", &linker.to_string()),
        None if find_llvm_config().is_none() => packages.extend(DEBIAN_LLVM),
        None => {}
    }

    let mut servers: Vec<&str> = SERVERS
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    let (module, package) = NGINX_STREAM;
    if !Path::new(module).is_file() {
        servers.push(package);
    }
    if !servers.is_empty() || !packages.is_empty() {
        let apt = Apt::prepare(&[packages.as_slice(), &servers].concat())?;
        if !packages.is_empty() {
            apt.install(&packages, None)?;
        }
        if !servers.is_empty() {
            apt.install(&servers, Some(&without_services()?))?;
        }
    }
    for (program, _) in SERVERS.iter().filter(|(_, package)| !servers.contains(package)) {
        say("found", program);
    }

    if survey.linker().is_none() {
        install_linker()?;
    }
    if book::mdbook().is_none() {
        install_mdbook()?;
    }
    say("found", "mdbook");
    // Packages that were installed may still not have brought what they should.
    Survey::take(&workspace::tools())
        .choose()
        .map(drop)
        .map_err(anyhow::Error::msg)
}

/// Installs the packages of those programs that are missing, for what few machines do.
///
/// # Errors
/// They can't be installed; the message says how to get them.
pub(crate) fn install_programs(programs: &[(&str, &str)]) -> Result<()> {
    let packages: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    Apt::prepare(&packages)?.install(&packages, None)
}

fn has_cargo_tool(tool: &str) -> bool {
    succeeds(workspace::cargo(&[tool, "--version"]))
}

/// Whether a command succeeds; what it prints is of no interest.
fn succeeds(mut command: Command) -> bool {
    let silent = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    silent.status().is_ok_and(|status| status.success())
}

/// rustfmt and clippy belong to the dated toolchain of `rust-toolchain.toml`, which rustup completes.
fn install_cargo_tools() -> Result<()> {
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !has_cargo_tool(tool) {
            say("installing", &format!("{component}, by rustup"));
            rustup(RUSTUP_COMPONENT_S, &["component", "add", component]).with_context(|| {
                format!("`cargo {tool}` is missing\n  hint: install {component} for the compiler that `rustc --version` shows here")
            })?;
        }
    }
    say("found", "cargo fmt, cargo clippy");
    Ok(())
}

/// Runs rustup for at most `limit_s` seconds.
fn rustup(limit_s: u32, arguments: &[&str]) -> Result<()> {
    if find_program("rustup").is_none() {
        bail!("there is no rustup here");
    }
    let mut command = Command::new("timeout");
    command
        // Stays in the terminal's foreground, so that Ctrl-C reaches rustup.
        .arg("--foreground")
        .arg(limit_s.to_string())
        .arg("rustup")
        .args(arguments)
        .current_dir(workspace::root());
    workspace::run(&mut command)
}

/// Asks rustup for a compiler with the source of `core`: the missing source for one that is here, else a
/// nightly. False if it can't: Debian's packages are next.
fn ask_rustup(survey: &Survey) -> bool {
    let choice = env::var(CHOICE_VARIABLE).ok();
    if choice.as_deref() == Some("system") || find_program("rustup").is_none() {
        return false;
    }
    let upgradable = survey.compilers.iter().find(|compiler| {
        compiler.name != "system" && compiler.version >= OLDEST_RUSTC && compiler.llvm <= survey.linker_llvm()
    });
    let attempt = match upgradable {
        Some(compiler) => {
            say("installing", &format!("rust-src for {compiler}, by rustup"));
            rustup(
                RUSTUP_COMPONENT_S,
                &["component", "add", "rust-src", "--toolchain", &compiler.name],
            )
        }
        None => {
            say("installing", &format!("{NIGHTLY} with rust-src, by rustup"));
            let profile = ["--profile", "minimal", "--component", "rust-src"];
            rustup(
                RUSTUP_TOOLCHAIN_S,
                &[["toolchain", "install", NIGHTLY].as_slice(), &profile].concat(),
            )
        }
    };
    if let Err(error) = &attempt {
        say("no luck", &format!("{error:#}; Debian's packages are next"));
    }
    attempt.is_ok()
}

/// Debian's package manager, with fresh package lists.
struct Apt;

impl Apt {
    /// # Errors
    /// There is none here, or this user may not use it; the message says what to install by hand.
    fn prepare(packages: &[&str]) -> Result<Self> {
        let wanted = packages.join(" ");
        if find_program("apt-get").is_none() {
            bail!(
                "missing: {wanted} (names of Debian 12's packages)\n  hint: there is no apt-get here; install their like by this system's own means, then try again"
            );
        }
        // The owner of /proc/self is the user as whom this process runs.
        let is_root = fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0);
        if !is_root {
            bail!(
                "missing packages, and only root may install them\n  hint: sudo apt-get install --no-install-recommends {wanted}"
            );
        }
        // One source out of several may be broken and not be ours; the installation will tell.
        if Self::run(&mut Self::command(&["update"])).is_err() {
            say(
                "no luck",
                "apt-get update failed; trying with the package lists as they are",
            );
        }
        Ok(Self)
    }

    /// Installs packages; `path` replaces the PATH of their installation scripts.
    fn install(&self, packages: &[&str], path: Option<&str>) -> Result<()> {
        let names = packages.join(" ");
        say("installing", &format!("{names}, by apt-get"));
        let mut command = Self::command(&["install", "--yes", "--no-install-recommends"]);
        if let Some(path) = path {
            command.args(["-o", &format!("DPkg::Path={path}")]);
        }
        Self::run(command.args(packages))?;
        say("installed", &names);
        Ok(())
    }

    fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            // Another one may be at work, as after a machine's first start.
            .args(["-q", "-o", "DPkg::Lock::Timeout=120"])
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// What apt-get says is shown only if it fails: it says much.
    fn run(command: &mut Command) -> Result<()> {
        let output = command.output().context("can't run apt-get")?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            eprintln!("{}", String::from_utf8_lossy(&said));
        }
        workspace::expect_success(command, output.status).context(
            "Debian's packages could not be installed, see above\n  hint: the package source must be reachable, and on Debian 12 include bookworm-security",
        )
    }
}

/// A PATH for installation scripts in which the programs that start and enable services do nothing: we
/// want nginx's program for the labs, not a server on port 80, now or after the next boot. The
/// same of Prometheus, of which we want promtool. What was installed before is never touched.
fn without_services() -> Result<String> {
    let folder = workspace::tools().join("no-services");
    let idle = find_program("true").context("this system has no `true`")?;
    fs::create_dir_all(&folder)?;
    for name in [
        "invoke-rc.d",
        "update-rc.d",
        "deb-systemd-helper",
        "deb-systemd-invoke",
    ] {
        let link = folder.join(name);
        if !link.is_symlink() {
            symlink(&idle, &link).with_context(|| link.display().to_string())?;
        }
    }
    Ok(format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()))
}

/// `llvm-config` of the right LLVM: Debian's, or the one in PATH.
fn find_llvm_config() -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{LLVM}/bin/llvm-config"));
    [debian]
        .into_iter()
        .chain(find_program("llvm-config"))
        .find(|path| llvm_config(path, "--version").is_some_and(|text| is_our_llvm(&text)))
}

fn is_our_llvm(version: &str) -> bool {
    Version::parse(version).is_some_and(|Version(major, ..)| major == LLVM)
}

fn llvm_config(program: &Path, question: &str) -> Option<String> {
    let output = Command::new(program).arg(question).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// Builds `mdbook`: Debian 12 has no package of it.
fn install_mdbook() -> Result<()> {
    say("installing", &format!("mdbook {MDBOOK}, built here in a minute"));
    let mut command = workspace::cargo(&["install", "mdbook", "--locked", "--version", MDBOOK]);
    command
        .args(["--no-default-features", "--features", "search", "--root"])
        .arg(workspace::tools())
        .env_remove("CARGO_TARGET_DIR");
    workspace::run(&mut command)
}

/// Builds `bpf-linker` against [`LLVM`].
fn install_linker() -> Result<()> {
    let config = find_llvm_config().with_context(|| {
        format!("LLVM {LLVM} for bpf-linker is missing\n  hint: install llvm-{LLVM}-dev, so that `llvm-config --version` says {LLVM}")
    })?;
    let folder = config.parent().context("llvm-config is in no folder")?;
    let libraries = llvm_config(&config, "--libdir").context("llvm-config tells no --libdir")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([folder.to_owned()].into_iter().chain(env::split_paths(&path)))?;

    say(
        "installing",
        &format!("bpf-linker {OLDEST_LINKER}, built here in some minutes"),
    );
    let mut command = workspace::cargo(&["install", "bpf-linker", "--locked"]);
    command
        .args(["--version", &OLDEST_LINKER.to_string(), "--force", "--root"])
        .arg(workspace::tools())
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
        .env("PATH", path)
        .env("LIBRARY_PATH", &libraries)
        .env("LD_LIBRARY_PATH", &libraries)
        .env_remove("CARGO_TARGET_DIR");
    workspace::run(&mut command)?;
    let survey = Survey::take(&workspace::tools());
    let linker = survey.linker().context("bpf-linker was built but does not run")?;
    say("installed", &linker.to_string());
    Ok(())
}
