//! `cargo xtask lint`: format and clippy, every warning an error; alert rules and dashboard (`promtool`).
//!
//! The BPF crate is linted for the host, by the same dated clippy as the rest. A clippy for the BPF target
//! exists only beside some of the compilers that setup may find, each of another version with other
//! lints: the result would depend on the machine. That code for the BPF target compiles is what the
//! build shows.

use anyhow::Result;

use crate::{promtool, workspace};

/// Runs the checks, the quickest first.
///
/// # Errors
/// The first check that fails.
pub(crate) fn run() -> Result<()> {
    const STRICT: [&str; 3] = ["--", "-D", "warnings"];
    let format = workspace::cargo(&["fmt", "--all", "--check"]);
    // A workspace of its own.
    let format_fuzz = workspace::cargo(&["fmt", "--check", "--manifest-path", "tests/fuzz/Cargo.toml"]);

    let mut clippy = workspace::cargo(&["clippy", "--locked", "--all-targets"]);
    clippy.args(STRICT);

    let mut bpf = workspace::cargo(&["clippy", "--locked", "--package", "forwarder-ebpf"]);
    bpf.args(["--lib", "--bins", "--target-dir"])
        // Some crates look at the variable below, so a shared folder would be built anew at each turn.
        .arg(workspace::root().join("target/lint-bpf"))
        .args(STRICT)
        // BPF code uses unstable compiler features, as it may in the build.
        .env("RUSTC_BOOTSTRAP", "1")
        // And it has no unwinding, which the dev profile has.
        .env("CARGO_PROFILE_DEV_PANIC", "abort");

    let run = |mut command| {
        eprintln!("lint: {}", workspace::show(&command));
        workspace::run(&mut command)
    };
    run(format)?;
    run(format_fuzz)?;
    promtool::run()?;
    run(clippy)?;
    run(bpf)
}
