//! The project's chores: `cargo xtask <verb>`, one verb per file.
//!
//! xtask depends on no crate of the workspace: it runs cargo and binaries, so it works where they don't
//! build yet. What it says goes to stderr.

mod bench;
mod book;
mod bpf;
mod build;
mod clean_root;
mod demo;
mod fuzz;
mod lint;
mod package;
mod promtool;
mod screenshots;
mod setup;
mod test;
#[allow(dead_code)] // shared with forwarder-user/build.rs; each of the two leaves some of it unused
mod toolchain;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's chores")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find what building, testing and the demo need, and install what is missing
    Setup(setup::Arguments),
    /// Build the release binary `forwarder`, with the BPF programs inside
    Build,
    /// Build the static binary and the Debian package
    Package(package::Arguments),
    /// Check format and lints, the BPF programs' too; alert rules and dashboard
    Lint,
    /// Run the tests: everything there is, or one ring
    Test(test::Arguments),
    /// Measure it, in a lab of network namespaces
    Bench(bench::Arguments),
    /// Make the documentation a book, and look for dead links
    Book,
    /// Make the pictures of the documentation anew
    Screenshots,
    /// Show the forwarder at work, in a lab of network namespaces
    Demo(demo::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Setup(arguments) => setup::run(&arguments),
        Verb::Build => build::run(),
        Verb::Package(arguments) => package::run(&arguments),
        Verb::Lint => lint::run(),
        Verb::Test(arguments) => test::run(&arguments),
        Verb::Bench(arguments) => bench::run(&arguments),
        Verb::Book => book::run(),
        Verb::Screenshots => screenshots::run(),
        Verb::Demo(arguments) => demo::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints an error with its causes, and without a backtrace, which tells a user nothing.
fn report(error: &anyhow::Error) {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  cause: {cause}");
    }
}
