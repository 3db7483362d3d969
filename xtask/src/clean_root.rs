//! A clean Debian system for tests of the package: the smallest that boots, as an archive in `target/package`.
//!
//! It is made once and kept, by `mmdebstrap` from the packages that this machine's apt offers, so that nothing of this
//! machine itself is in it: no compiler, no library that a build has left.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{toolchain::find_program, workspace};

/// Debian 12.
const SUITE: &str = "bookworm";
/// What makes it boot in a container.
const PACKAGES: &str = "systemd,systemd-sysv,dbus";
/// Where Debian 12 says which mirror its packages come from; other files there are others' packages.
const SOURCES: [&str; 2] = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];

/// The archive, made unless it is there.
///
/// # Errors
/// There is no `mmdebstrap`, no right to use it, or the packages cannot be had.
pub(crate) fn get() -> Result<PathBuf> {
    let folder = workspace::root().join("target/package");
    let archive = folder.join(format!("{SUITE}.tar"));
    if archive.is_file() {
        return Ok(archive);
    }
    if find_program("mmdebstrap").is_none() {
        bail!("mmdebstrap is missing\n  hint: apt-get install mmdebstrap systemd-container");
    }
    fs::create_dir_all(&folder)?;
    // Under another name until it is whole.
    let unfinished = folder.join(format!("unfinished-{SUITE}.tar"));
    eprintln!("package: making a clean Debian system, once");
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=apt"])
        .arg(format!("--include={PACKAGES}"))
        .arg(SUITE)
        .arg(&unfinished);
    if let Some(sources) = SOURCES.into_iter().find(|path| Path::new(path).is_file()) {
        command.arg(sources);
    }
    workspace::run(&mut command)?;
    fs::rename(&unfinished, &archive)?;
    Ok(archive)
}
