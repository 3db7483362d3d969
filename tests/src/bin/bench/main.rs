//! Benchmarks in labs of network namespaces, with real servers and the real agent. Each prints tables in Markdown, as
//! they stand in docs/failover.md. It installs and builds nothing: `cargo xtask bench` does.

mod client;
mod failover;
mod packets;
mod tables;
mod tunnels;

use std::{fs, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use forwarder_tests::lab;

/// Exit statuses of the project's programs.
const EXIT_FAILED: u8 = 1;
const EXIT_HOST: u8 = 3;

/// Measures the forwarder in network namespaces of this machine. Needs root.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    #[command(subcommand)]
    name: Name,
}

#[derive(Subcommand)]
enum Name {
    /// Requests that fail, and for how long, when servers and the tunnel do
    Failover {
        /// Write `on_unhealthy = VALUE` into the group
        #[arg(long)]
        on_unhealthy: Option<String>,
    },
    /// Time to build and swap tables and to apply configurations, requests lost by swaps, and the cost of passive checks
    Tables {
        /// Only what has this in its name: build, looks, swaps, apply
        #[arg(long)]
        only: Option<String>,
    },
    /// What a packet costs, in nanoseconds, beside the least that it could
    Packets {
        /// The benchmark's own BPF programs
        #[arg(long, env = "BENCH_OBJECT")]
        object: PathBuf,
        /// Only what has this in its name, and the minimal program for one flow
        #[arg(long)]
        only: Option<String>,
    },
    /// Packets per second and CPU time per packet through tunnels, natively and by the kernel's device
    Tunnels {
        /// The benchmark's own BPF programs
        #[arg(long, env = "BENCH_OBJECT")]
        object: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let missing = lab::missing();
    if !missing.is_empty() {
        eprintln!("error: this machine lacks {}", missing.join("; "));
        return ExitCode::from(EXIT_HOST);
    }
    println!("{}\n", machine());
    let outcome = match arguments.name {
        Name::Failover { on_unhealthy } => failover::run(on_unhealthy.as_deref()),
        Name::Tables { only } => tables::run(only.as_deref().unwrap_or_default()),
        Name::Packets { object, only } => packets::run(&object, only.as_deref().unwrap_or_default()),
        Name::Tunnels { object } => tunnels::run(&object),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// What the numbers depend on.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    let count = processors
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let load = read("/proc/loadavg");
    format!(
        "Machine: {count} CPUs ({model}), Linux {}, load before the run {}.",
        read("/proc/sys/kernel/osrelease").trim(),
        load.split_whitespace().next().unwrap_or("unknown"),
    )
}

/// A table in Markdown.
fn markdown<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let line = |cells: Vec<&str>| format!("| {} |", cells.join(" | "));
    let mut text = vec![line(header.to_vec()), line(vec!["---"; N])];
    text.extend(
        rows.iter()
            .map(|row| line(row.iter().map(String::as_str).collect())),
    );
    text.join("\n")
}
