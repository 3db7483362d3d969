//! Benchmarks in labs of network namespaces, with real servers and the real agent. What they measure is printed, or
//! written into docs/benchmarks.md with its plots. It installs and builds nothing: `cargo xtask bench` does.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use forwarder_tests::{
    bench::{
        Effort, Made, Measured, failover, memory, nat, packets,
        page::{self, Results},
        tables, tunnels,
    },
    lab,
};

/// Exit statuses of the project's programs.
const EXIT_FAILED: u8 = 1;
const EXIT_HOST: u8 = 3;

/// Measures the forwarder in network namespaces of this machine. Needs root.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// What to measure; without: all but failover, and the page is written
    #[arg(value_enum)]
    name: Option<Name>,
    /// Only what has TEXT in its name: packets; tables (build, looks, swaps, apply); nat (packets, requests)
    #[arg(long, value_name = "TEXT", requires = "name")]
    only: Option<String>,
    /// Write `on_unhealthy = VALUE` into the group (failover)
    #[arg(long, value_name = "VALUE")]
    on_unhealthy: Option<String>,
    /// Put the outcome into docs/benchmarks.md
    #[arg(long, conflicts_with_all = ["short", "only"])]
    write: bool,
    /// Few trials, only to see that the benchmarks run; their figures mean nothing, and nothing is written
    #[arg(long)]
    short: bool,
    /// The benchmarks' own BPF programs
    #[arg(long, env = "BENCH_OBJECT")]
    object: PathBuf,
    /// Where the sources are
    #[arg(long, default_value = ".")]
    root: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Packets,
    Nat,
    Tunnels,
    Tables,
    Memory,
    Failover,
}

impl Name {
    /// Those on the page. What needs a quiet machine most comes first.
    const PAGE: [Self; 5] = [
        Self::Packets,
        Self::Nat,
        Self::Tunnels,
        Self::Tables,
        Self::Memory,
    ];

    /// As the benchmark calls itself; `None`: it is not on the page.
    const fn on_page(self) -> Option<&'static str> {
        match self {
            Self::Packets => Some(packets::NAME),
            Self::Nat => Some(nat::NAME),
            Self::Tunnels => Some(tunnels::NAME),
            Self::Tables => Some(tables::NAME),
            Self::Memory => Some(memory::NAME),
            Self::Failover => None,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let missing = lab::missing();
    if !missing.is_empty() {
        eprintln!("error: this machine lacks {}", missing.join("; "));
        return ExitCode::from(EXIT_HOST);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let names = arguments.name.map_or(Name::PAGE.to_vec(), |name| vec![name]);
    let is_written = !arguments.short && (arguments.write || arguments.name.is_none());
    for name in &names {
        ensure!(
            !is_written || name.on_page().is_some(),
            "{name:?} is not on the page\n  hint: without --write it is printed"
        );
    }
    let made = Made::now(&arguments.root)?;
    for name in names {
        let measured = measure(arguments, name).with_context(|| format!("{name:?}"))?;
        println!("{}\n", page::print(&made, &measured));
        if let (true, Some(name)) = (is_written, name.on_page()) {
            write(&arguments.root, name, &made, measured)?;
        }
    }
    Ok(())
}

/// After each benchmark: a later one that fails takes nothing with it.
fn write(root: &Path, name: &str, made: &Made, measured: Measured) -> Result<()> {
    let mut results = Results::load(root)?;
    results.set(name, made.clone(), measured);
    results.write(root)
}

fn measure(arguments: &Arguments, name: Name) -> Result<Measured> {
    let only = arguments.only.as_deref().unwrap_or_default();
    let object = &arguments.object;
    let effort = if arguments.short {
        Effort::Short
    } else {
        Effort::Whole
    };
    eprintln!("{name:?} ...");
    match name {
        Name::Packets => packets::run(object, only, effort),
        Name::Nat => nat::run(object, only, effort),
        Name::Tunnels => tunnels::run(object, effort),
        Name::Tables => tables::run(only, effort),
        Name::Memory => memory::run(effort),
        Name::Failover => failover::run(arguments.on_unhealthy.as_deref(), effort),
    }
}
