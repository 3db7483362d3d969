//! How BPF crates are built: the arguments, flags and environment of the second cargo.
//!
//! They need another target, another compiler and a linker of their own. aya-build is not used: it overwrites the
//! compiler flags and so can't set the CPU level, and asks rustup for a nightly that a machine may not have.
//!
//! A module of two programs like `toolchain.rs`, xtask and `forwarder-user/build.rs`; needs `std` only.

use std::{env, process::Command};

use crate::toolchain::{Compiler, Core, Linker};

/// The command that builds a BPF package, for programs that run on `arch`.
pub(crate) fn cargo(
    package: &str,
    compiler: &Compiler,
    linker: &Linker,
    target: &str,
    arch: &str,
) -> Command {
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
        .args(["build", "--locked", "--release", "--package", package, "--bins"])
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
