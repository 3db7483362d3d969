//! Builds the BPF programs and leaves the object at `$OUT_DIR/forwarder-ebpf`, for the agent to embed.
//!
//! The BPF crate needs another target, another compiler and a linker of its own, so this script calls a
//! second cargo for it (`bpf.rs`).
//!
//! `FORWARDER_BPF_OBJECT=<file>` embeds that object instead and needs no BPF toolchain: for packagers who
//! build it apart. `FORWARDER_BPF_TOOLCHAIN` narrows the search for a compiler, see `toolchain.rs`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

// Shared with xtask as a file, because a crate of its own for it would be built for every user of the
// agent, and because what `cargo xtask setup` looks for must be what is used here. xtask tests it.
#[path = "../xtask/src/toolchain.rs"]
#[allow(dead_code)] // each of the two programs leaves some of it unused
mod toolchain;

#[path = "../xtask/src/bpf.rs"]
mod bpf;

use toolchain::Survey;

const OBJECT_VARIABLE: &str = "FORWARDER_BPF_OBJECT";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let object = out_dir.join("forwarder-ebpf");

    println!("cargo::rerun-if-env-changed={OBJECT_VARIABLE}");
    if let Some(prebuilt) = env::var_os(OBJECT_VARIABLE) {
        let prebuilt = PathBuf::from(prebuilt);
        println!("cargo::rerun-if-changed={}", prebuilt.display());
        return copy(&prebuilt, &object);
    }

    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir
        .parent()
        .ok_or("forwarder-user is not inside its workspace")?;
    for source in ["forwarder-ebpf", "forwarder-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    println!("cargo::rerun-if-env-changed={}", toolchain::CHOICE_VARIABLE);

    let survey = Survey::take(&workspace.join("target/tools"));
    let (compiler, linker) = survey.choose()?;
    for program in [compiler.rustc(), linker.path.clone()] {
        println!("cargo::rerun-if-changed={}", program.display());
    }

    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let target_dir = out_dir.join("bpf");
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let mut command = bpf::cargo("forwarder-ebpf", compiler, linker, target, &arch);
    command
        .current_dir(workspace)
        .arg("--target-dir")
        .arg(&target_dir);
    let status = command
        .status()
        .map_err(|error| format!("can't run {}: {error}", compiler.cargo().display()))?;
    if !status.success() {
        return Err(format!(
            "the BPF programs did not build ({status})\n  with {compiler}\n  and {linker}"
        ));
    }
    copy(&target_dir.join(target).join("release/forwarder-ebpf"), &object)
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("can't copy {} to {}: {error}", from.display(), to.display()))
}
