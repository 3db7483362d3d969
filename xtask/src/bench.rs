//! `cargo xtask bench`: prepares the machine, builds in release mode, and hands over to the benchmarks.
//!
//! They are a binary of `forwarder-tests`, because they use the tests' lab.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{bpf, setup, toolchain::Survey, workspace};

/// Where benchmarks and their tests look for the benchmarks' own BPF programs.
pub(crate) const OBJECT_VARIABLE: &str = "BENCH_OBJECT";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What to measure; without: all but failover, and docs/benchmarks.md is written
    #[arg(value_enum)]
    name: Option<Name>,
    /// Put the outcome into docs/benchmarks.md
    #[arg(long)]
    write: bool,
    /// Few trials, only to see that the benchmarks run; nothing is written
    #[arg(long)]
    short: bool,
    /// Write `on_unhealthy = VALUE` into the group (failover)
    #[arg(long, value_name = "VALUE")]
    on_unhealthy: Option<String>,
    /// Only what has TEXT in its name: packets; tables (build, looks, swaps, apply); nat (packets, requests)
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// What a packet costs, in nanoseconds, beside the least that it could
    Packets,
    /// Packets and requests through a gateway, beside nftables, HAProxy and nginx
    Nat,
    /// Packets per second and CPU time per packet through tunnels, natively and by the kernel's device
    Tunnels,
    /// Time to build and swap tables and to apply configurations, requests lost by swaps, and the cost of passive checks
    Tables,
    /// Memory per flow and per backend, in the kernel's maps and in the agent
    Memory,
    /// Requests that fail, and for how long, when servers and the tunnel do
    Failover,
}

/// Becomes the benchmark: its exit status is that of `cargo xtask bench`, and Ctrl-C reaches it as it would any
/// program, so that it can tear its lab down.
///
/// # Errors
/// Setup or build fails, or the benchmark can't be started.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(&setup::Arguments::default())?;
    let binaries = workspace::build_release(&["forwarder", "bench"])?;
    let mut bench = Command::new(&binaries["bench"]);
    bench
        .current_dir(workspace::root())
        .env("FORWARDER_BIN", &binaries["forwarder"])
        .env(OBJECT_VARIABLE, build_programs()?);
    if let Some(name) = arguments.name.and_then(|name| name.to_possible_value()) {
        bench.arg(name.get_name());
    }
    for (option, is_set) in [("--write", arguments.write), ("--short", arguments.short)] {
        if is_set {
            bench.arg(option);
        }
    }
    for (option, value) in [
        ("--on-unhealthy", &arguments.on_unhealthy),
        ("--only", &arguments.only),
    ] {
        if let Some(value) = value {
            bench.args([option, value]);
        }
    }
    Err(bench.exec()).context("can't start the benchmark")
}

/// Builds the BPF programs of benchmarks and floods: the object.
pub(crate) fn build_programs() -> Result<PathBuf> {
    const PACKAGE: &str = "forwarder-bench-ebpf";
    let survey = Survey::take(&workspace::tools());
    let (compiler, linker) = survey.choose().map_err(anyhow::Error::msg)?;
    let target = if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    };
    let folder = workspace::root().join("target/bench-bpf");
    let mut cargo = bpf::cargo(PACKAGE, compiler, linker, target, std::env::consts::ARCH);
    workspace::run(
        cargo
            .current_dir(workspace::root())
            .arg("--target-dir")
            .arg(&folder),
    )?;
    Ok(folder.join(target).join("release").join(PACKAGE))
}
