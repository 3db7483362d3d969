//! `cargo xtask package`: the static binary and a Debian package of it, in `target/package/<architecture>`.
//!
//! The binary is linked against musl, so it runs on any distribution and in an empty container. The package is put
//! together here and packed by `dpkg-deb`: it has one program and no libraries, and tools that make packages of Rust
//! programs would have to be built first, for minutes. Control files and maintainer scripts are in `deploy/debian`.
//!
//! Manual pages and completions are made by the program itself; arm64's by the one for this machine. Times in the package
//! are the last commit's, so the same commit gives the same package.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::{toolchain::find_program, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// For which processors; others than this machine's need a cross compiler
    #[arg(long, value_enum, default_value_t)]
    arch: Architecture,
    /// What to add to the version, such as ~rc1 or +local2
    #[arg(long, default_value = "")]
    suffix: String,
}

/// An architecture, by Debian's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Architecture {
    #[default]
    Amd64,
    Arm64,
}

impl Architecture {
    fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-musl",
            Self::Arm64 => "aarch64-unknown-linux-musl",
        }
    }

    /// What compiles C (of `ring`) and links, with the Debian package that has it.
    fn compiler(self) -> (&'static str, &'static str) {
        match self {
            Self::Amd64 => ("musl-gcc", "musl-tools"),
            // Debian has no musl compiler for it. This one will do: the C code is freestanding, and what it is linked with
            // comes with Rust's target.
            Self::Arm64 => (
                "aarch64-linux-gnu-gcc",
                "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
            ),
        }
    }

    fn strip(self) -> &'static str {
        match self {
            Self::Amd64 => "strip",
            Self::Arm64 => "aarch64-linux-gnu-strip",
        }
    }
}

/// How long rustup may take for a target, in seconds.
const RUSTUP_S: u32 = 300;
/// Files of the repository with their places in the package and modes.
const FILES: [(&str, &str, u32); 8] = [
    (
        "deploy/forwarder.service",
        "usr/lib/systemd/system/forwarder.service",
        0o644,
    ),
    ("examples/minimal.toml", "etc/forwarder/example.toml", 0o644),
    (
        "deploy/prometheus-rules.yml",
        "usr/share/forwarder/prometheus-rules.yml",
        0o644,
    ),
    (
        "deploy/debian/copyright",
        "usr/share/doc/forwarder/copyright",
        0o644,
    ),
    ("LICENSE-MIT", "usr/share/doc/forwarder/LICENSE-MIT", 0o644),
    ("LICENSE-APACHE", "usr/share/doc/forwarder/LICENSE-APACHE", 0o644),
    ("README.md", "usr/share/doc/forwarder/README.md", 0o644),
    ("CHANGELOG.md", "usr/share/doc/forwarder/changelog", 0o644),
];
/// Below `etc`: an upgrade leaves alone what the operator has changed in them.
const CONFFILES: &str = "/etc/forwarder/example.toml\n";
/// Folders of the repository whose files of one kind go to a folder of the package.
const FOLDERS: [(&str, &str, &str); 2] = [
    ("docs", "md", "usr/share/doc/forwarder"),
    ("examples", "toml", "usr/share/doc/forwarder/examples"),
];
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/forwarder"),
    ("zsh", "usr/share/zsh/vendor-completions/_forwarder"),
    ("fish", "usr/share/fish/vendor_completions.d/forwarder.fish"),
];
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// What a package is made of.
pub(crate) struct Contents<'a> {
    pub(crate) architecture: Architecture,
    pub(crate) version: &'a str,
    /// The agent.
    pub(crate) binary: &'a Path,
    /// One that runs here; the same unless this machine is another.
    pub(crate) runnable: &'a Path,
    /// Debian's words for what the binary is linked with; empty: nothing.
    pub(crate) depends: &'a str,
}

/// Builds binary and package, and says where they are.
///
/// # Errors
/// Something to build with is missing, which the message names, or the build fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let architecture = arguments.arch;
    let binary = build_static(architecture)?;
    let runnable = if env::consts::ARCH == "x86_64" && architecture != Architecture::Amd64 {
        build_static(Architecture::Amd64)?
    } else {
        binary.clone()
    };
    let package = pack(&Contents {
        architecture,
        version: &version(&arguments.suffix),
        binary: &binary,
        runnable: &runnable,
        depends: "",
    })?;
    for file in [&binary, &package] {
        eprintln!("made {}", file.display());
    }
    Ok(())
}

/// The version of the package, with an addition.
pub(crate) fn version(suffix: &str) -> String {
    format!("{}{suffix}", env!("CARGO_PKG_VERSION"))
}

/// Where what is made for an architecture goes.
fn folder(architecture: Architecture) -> PathBuf {
    workspace::root()
        .join("target/package")
        .join(architecture.debian())
}

/// The agent, linked statically, without symbols.
///
/// # Errors
/// As for [`run`].
pub(crate) fn build_static(architecture: Architecture) -> Result<PathBuf> {
    let (compiler, package) = architecture.compiler();
    if find_program(compiler).is_none() {
        bail!("{compiler} is missing\n  hint: apt-get install {package}");
    }
    let target = architecture.target();
    has_target(target)?;
    let variable = target.replace('-', "_");
    let mut command = workspace::cargo(&["build", "--locked", "--release", "--package", "forwarder-user"]);
    command
        .args(["--bin", "forwarder", "--target", target])
        .env(format!("CC_{variable}"), compiler);
    if architecture == Architecture::Arm64 {
        command.env(
            format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()),
            compiler,
        );
    }
    workspace::run(&mut command)?;
    let built = workspace::target().join(target).join("release/forwarder");
    let folder = folder(architecture);
    fs::create_dir_all(&folder)?;
    let binary = folder.join("forwarder");
    workspace::run(
        Command::new(architecture.strip())
            .arg("-o")
            .arg(&binary)
            .arg(&built),
    )?;
    Ok(binary)
}

/// Has rustup fetch the standard library for `target`, unless it is there.
fn has_target(target: &str) -> Result<()> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .current_dir(workspace::root())
        .output()
        .context("can't run rustc")?;
    let root = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    if root.join("lib/rustlib").join(target).is_dir() {
        return Ok(());
    }
    let mut rustup = Command::new("timeout");
    rustup
        .args([
            "--foreground",
            &RUSTUP_S.to_string(),
            "rustup",
            "target",
            "add",
            target,
        ])
        .current_dir(workspace::root());
    workspace::run(&mut rustup).with_context(|| {
        format!("Rust's standard library for {target} is missing, and rustup can't fetch it")
    })
}

/// Makes the package.
///
/// # Errors
/// A file is missing, the program does not write its pages, or there is no `dpkg-deb`.
pub(crate) fn pack(contents: &Contents<'_>) -> Result<PathBuf> {
    let Contents {
        architecture,
        version,
        ..
    } = contents;
    let folder = folder(*architecture);
    let root = folder.join("root");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root)?;
    fill(contents, &root)?;
    write_control(contents, &root)?;
    let package = folder.join(format!("forwarder_{version}_{}.deb", architecture.debian()));
    let mut command = Command::new("dpkg-deb");
    command
        .args(["--root-owner-group", "-Zxz", "-z6", "--build"])
        .args([&root, &package])
        .env("SOURCE_DATE_EPOCH", last_commit_time()?)
        .stdout(Stdio::null());
    workspace::run(&mut command)?;
    fs::remove_dir_all(&root)?;
    Ok(package)
}

/// Puts everything but the control files into `root`.
fn fill(contents: &Contents<'_>, root: &Path) -> Result<()> {
    put(contents.binary, &root.join("usr/bin/forwarder"), 0o755)?;
    for (from, to, mode) in FILES {
        put(&workspace::root().join(from), &root.join(to), mode)?;
    }
    for (from, extension, to) in FOLDERS {
        for path in files(&workspace::root().join(from))? {
            if let Some(name) = path.file_name()
                && path.extension().is_some_and(|found| found == extension)
            {
                put(&path, &root.join(to).join(name), 0o644)?;
            }
        }
    }
    write(
        &root.join("usr/share/doc/forwarder/third-party.txt"),
        &third_party(contents.architecture)?,
    )?;
    for (shell, to) in COMPLETIONS {
        let output = Command::new(contents.runnable)
            .args(["completions", shell])
            .output()?;
        ensure!(output.status.success(), "no completions for {shell}");
        write(&root.join(to), &String::from_utf8(output.stdout)?)?;
    }
    let pages = root.join("usr/share/man/man8");
    fs::create_dir_all(&pages)?;
    workspace::run(
        Command::new(contents.runnable)
            .arg("man")
            .arg(&pages)
            .stdout(Stdio::null()),
    )?;
    for page in files(&pages)? {
        fs::set_permissions(&page, fs::Permissions::from_mode(0o644))?;
        workspace::run(Command::new("gzip").args(["-9n"]).arg(&page))?;
    }
    workspace::run(
        Command::new("gzip")
            .args(["-9n"])
            .arg(root.join("usr/share/doc/forwarder/changelog")),
    )
}

fn write_control(contents: &Contents<'_>, root: &Path) -> Result<()> {
    let control = root.join("DEBIAN");
    let deploy = workspace::root().join("deploy/debian");
    let text = fs::read_to_string(deploy.join("control"))?;
    let mut bytes = 0;
    let mut sums = String::new();
    for file in all_files(root)? {
        bytes += fs::metadata(&file)?.len();
        let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
        if !name.starts_with("etc/") {
            let output = Command::new("md5sum").arg(&file).output()?;
            let said = String::from_utf8(output.stdout)?;
            let sum = said.split_whitespace().next().context("md5sum says nothing")?;
            writeln!(sums, "{sum}  {name}")?;
        }
    }
    let text = text
        .replace("@VERSION@", contents.version)
        .replace("@ARCHITECTURE@", contents.architecture.debian())
        .replace("@KIB@", &(bytes / 1024).to_string());
    let text = match contents.depends {
        "" => text.replace("Depends: @DEPENDS@\n", ""),
        depends => text.replace("@DEPENDS@", depends),
    };
    write(&control.join("control"), &text)?;
    write(&control.join("conffiles"), CONFFILES)?;
    write(&control.join("md5sums"), &sums)?;
    for script in SCRIPTS {
        put(&deploy.join(script), &control.join(script), 0o755)?;
    }
    Ok(())
}

fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    Ok(())
}

/// The files of a folder, in order.
fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_file()).collect())
}

/// The files below a folder, in order.
fn all_files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = files(folder)?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(all_files(&path)?);
        }
    }
    Ok(found)
}

/// Seconds since 1970.
fn last_commit_time() -> Result<String> {
    let output = Command::new("git")
        .args(["log", "-1", "--format=%ct"])
        .current_dir(workspace::root())
        .output()
        .context("can't run git")?;
    let text = String::from_utf8(output.stdout)?.trim().to_owned();
    // A source tree without git has no commit: then the times are those of the files.
    Ok(if text.is_empty() { "0".to_owned() } else { text })
}

/// The crates that are linked into the agent, and their licences' texts, each once.
fn third_party(architecture: Architecture) -> Result<String> {
    let mut command = workspace::cargo(&["metadata", "--locked", "--format-version", "1"]);
    let output = command
        .args(["--filter-platform", architecture.target()])
        .output()
        .context("can't run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let mut text = String::from("Crates in the binary, with the licences that they are offered under.\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in linked(&metadata)? {
        let field = |name: &str| package[name].as_str().unwrap_or("-");
        let name = format!("{} {}", field("name"), field("version"));
        writeln!(text, "{name}: {} {}", field("license"), field("repository"))?;
        let folder = Path::new(field("manifest_path"))
            .parent()
            .context("a manifest lies in a folder")?;
        for file in files(folder)? {
            let is_licence = file.file_name().is_some_and(|name| {
                let name = name.to_string_lossy().to_uppercase();
                ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"]
                    .iter()
                    .any(|start| name.starts_with(start))
            });
            if is_licence && let Ok(licence) = fs::read_to_string(&file) {
                texts.entry(licence).or_default().push(name.clone());
            }
        }
    }
    for (licence, names) in texts {
        writeln!(text, "\n{}\n{}:\n\n{licence}", "=".repeat(80), names.join(", "))?;
    }
    Ok(text)
}

/// What `forwarder-user` needs when it runs, of other people's.
fn linked(metadata: &Value) -> Result<Vec<&Value>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages = metadata["packages"].as_array().context("no packages")?;
    let by_id: BTreeMap<&str, &Value> = packages
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let nodes: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .filter_map(|node| Some((node["id"].as_str()?.to_owned(), node)))
        .collect();
    let root = by_id
        .iter()
        .find(|(_, package)| package["name"] == "forwarder-user")
        .context("no package forwarder-user")?;
    let mut waiting = vec![(*root.0).to_owned()];
    let mut found = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if !found.insert(id.clone()) {
            continue;
        }
        let node = nodes.get(&id).context("a package without a node")?;
        for dependency in list(&node["deps"]) {
            let is_linked = list(&dependency["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null());
            if is_linked && let Some(id) = dependency["pkg"].as_str() {
                waiting.push(id.to_owned());
            }
        }
    }
    let others = found
        .iter()
        .filter_map(|id| by_id.get(id.as_str()).copied())
        .filter(|package| !package["source"].is_null());
    let mut others: Vec<_> = others.collect();
    others.sort_by_key(|package| package["name"].as_str().map(str::to_owned));
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_leaves_build_and_test_dependencies_out() {
        let node = |id: &str, deps: &[(&str, Option<&str>)]| {
            let deps: Vec<_> = deps
                .iter()
                .map(|(id, kind)| serde_json::json!({"pkg": id, "dep_kinds": [{"kind": kind}]}))
                .collect();
            serde_json::json!({"id": id, "deps": deps})
        };
        let package =
            |id: &str, source: Option<&str>| serde_json::json!({"id": id, "name": id, "source": source});
        let crates = Some("crates.io");
        let metadata = serde_json::json!({
            "packages": [package("forwarder-user", None), package("common", None), package("b", crates),
                package("a", crates), package("tested", crates), package("built", crates)],
            "resolve": {"nodes": [
                node("forwarder-user", &[("common", None), ("b", None), ("tested", Some("dev")), ("built", Some("build"))]),
                node("common", &[("a", None)]), node("a", &[]), node("b", &[]), node("tested", &[]), node("built", &[]),
            ]},
        });
        let names: Vec<_> = linked(&metadata)
            .unwrap()
            .into_iter()
            .map(|package| package["name"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn everything_that_goes_into_the_package_is_there() {
        for (from, ..) in FILES {
            assert!(workspace::root().join(from).is_file(), "{from}");
        }
        for script in SCRIPTS {
            assert!(
                workspace::root().join("deploy/debian").join(script).is_file(),
                "{script}"
            );
        }
    }
}
