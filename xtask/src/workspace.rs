//! What the verbs share: where the workspace is, and how to run its cargo.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    io::BufReader,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Root of the clone.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where `cargo xtask setup` puts programs that it builds. In `target`, because they belong to this
/// clone; not in `CARGO_TARGET_DIR`, because the build script looks for them here.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs xtask, at the root of the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.current_dir(root()).args(arguments);
    command
}

/// Runs a command to its end.
///
/// # Errors
/// It can't be started, or doesn't succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("can't run {}", show(command)))?;
    expect_success(command, status)
}

/// # Errors
/// The command did not succeed.
pub(crate) fn expect_success(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{} failed ({status})", show(command));
    }
    Ok(())
}

/// The command as a user would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Builds the named binaries of the workspace in release mode, all in one call: cargo then chooses the
/// dependencies' features once and builds them once.
///
/// # Errors
/// The build fails.
pub(crate) fn build_release(names: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut binaries = BTreeMap::new();
    let command = release(names, |message| {
        if let (Some(name), Some(file)) = (message["target"]["name"].as_str(), message["executable"].as_str())
        {
            binaries.insert(name.to_owned(), PathBuf::from(file));
        }
    })?;
    for name in names {
        if !binaries.contains_key(*name) {
            bail!("{command} built no binary {name:?}");
        }
    }
    Ok(binaries)
}

/// The BPF object that the release binary `forwarder` embeds, or the one that is to be embedded everywhere.
///
/// # Errors
/// The build fails.
pub(crate) fn bpf_object() -> Result<PathBuf> {
    if let Some(given) = env::var_os("FORWARDER_BPF_OBJECT") {
        return Ok(given.into());
    }
    let mut object = None;
    let command = release(&["forwarder"], |message| {
        let is_ours = message["reason"] == "build-script-executed"
            && message["package_id"]
                .as_str()
                .is_some_and(|id| id.contains("forwarder-user"));
        if let (true, Some(folder)) = (is_ours, message["out_dir"].as_str()) {
            object = Some(Path::new(folder).join("forwarder-ebpf"));
        }
    })?;
    object.with_context(|| format!("{command} ran no build script of the agent"))
}

/// Builds binaries in release mode and gives each of cargo's messages to `each`; the command.
fn release(names: &[&str], mut each: impl FnMut(&Value)) -> Result<String> {
    let mut command = cargo(&["build", "--locked", "--release"]);
    command.arg("--message-format=json-render-diagnostics");
    for name in names {
        command.args(["--bin", name]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't run {}", show(&command)))?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    for message in serde_json::Deserializer::from_reader(BufReader::new(stdout)).into_iter() {
        each(&message.context("can't read cargo's messages")?);
    }
    expect_success(&command, child.wait()?)?;
    Ok(show(&command))
}

/// The target that this machine's programs are built for.
///
/// # Errors
/// cargo does not tell.
pub(crate) fn host() -> Result<String> {
    let output = cargo(&["-vV"]).output().context("can't run cargo")?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("cargo does not tell its host")
}
