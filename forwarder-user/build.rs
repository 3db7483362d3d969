//! Builds the BPF programs and leaves the object at `$OUT_DIR/forwarder-ebpf`, for the agent to embed.
//!
//! The BPF crate needs another target, another compiler and a linker of its own, so this script calls a
//! second cargo for it. It doesn't use aya-build, which overwrites the compiler flags and so can't set
//! the CPU level, and which asks rustup for a nightly that a machine may not have.
//!
//! `FORWARDER_BPF_OBJECT=<file>` embeds that object instead and needs no BPF toolchain: for packagers who
//! build it apart. `FORWARDER_BPF_TOOLCHAIN` narrows the search for a compiler, see `toolchain.rs`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

// Shared with xtask as a file, because a crate of its own for it would be built for every user of the
// agent, and because what `cargo xtask setup` looks for must be what is used here. xtask tests it.
#[path = "../xtask/src/toolchain.rs"]
#[allow(dead_code)] // each of the two programs leaves some of it unused
mod toolchain;

use toolchain::{Compiler, Core, Linker, Survey};

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
    let mut command = cargo(compiler, linker, target, &variable("CARGO_CFG_TARGET_ARCH")?);
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

/// The command that builds the BPF crate, for programs that run on `arch`.
fn cargo(compiler: &Compiler, linker: &Linker, target: &str, arch: &str) -> Command {
    let mut command = Command::new(compiler.cargo());
    for (name, _) in env::vars_os() {
        if is_of_the_outer_build(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command
        .env("RUSTC", compiler.rustc())
        // BPF needs unstable compiler features; this lets a stable compiler have them.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(linker, arch).join("\x1f"))
        .args([
            "build",
            "--locked",
            "--release",
            "--package",
            "forwarder-ebpf",
            "--bins",
        ])
        .args(["--target", target])
        // bpf-linker optimises the whole program; LTO before it only takes time.
        .args(["--config", "profile.release.lto=\"off\""]);
    if compiler.core == Some(Core::Source) {
        command.args(["-Z", "build-std=core"]);
    }
    command
}

fn rustflags(linker: &Linker, arch: &str) -> Vec<String> {
    vec![
        // v1 and v2 lack instructions that the verifier needs to follow an encapsulating program; v4
        // is refused by Linux 6.1.
        "-Ctarget-cpu=v3".into(),
        // Packet headers have alignment 1. Without this every field is put together from single bytes.
        "-Ctarget-feature=+allows-misaligned-mem-access".into(),
        format!("-Clinker={}", linker.path.display()),
        // BTF describes the maps to the loader, and is made from debug information.
        "-Clink-arg=--btf".into(),
        "-Cdebuginfo=2".into(),
        // aya-ebpf reads registers of the machine that the program runs on.
        format!("--cfg=bpf_target_arch=\"{arch}\""),
    ]
}

/// Whether a variable speaks of the build that runs this script: its compiler, flags, wrappers and
/// profile must not reach the second cargo. What the user says of cargo's home, of registries and of the
/// network stays, and so does the job server, which keeps both within the same number of jobs.
fn is_of_the_outer_build(variable: &str) -> bool {
    const KEPT: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_MAKEFLAGS",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_ALIAS_",
    ];
    const DROPPED: [&str; 4] = ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"];
    let starts = |prefixes: &[&str]| prefixes.iter().any(|p| variable.starts_with(p));
    starts(&DROPPED) && !starts(&KEPT)
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("can't copy {} to {}: {error}", from.display(), to.display()))
}
