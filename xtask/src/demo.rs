//! `cargo xtask demo`: prepares the machine, builds, and hands over to the demo.
//!
//! The demo itself is a binary of `forwarder-tests`, because it uses the tests' lab.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{setup, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Show only this journey
    #[arg(long, value_enum)]
    journey: Option<Journey>,
    /// Leave the lab up, and print commands to play with it
    #[arg(long)]
    keep: bool,
    /// Take down the labs that --keep left, and do nothing else
    #[arg(long, conflicts_with_all = ["journey", "keep"])]
    down: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Journey {
    /// One remote backend behind a tunnel
    Peering,
    /// Local and remote backends behind one listener, and a failover
    CrossRegion,
    /// Each route and rule a remote backend needs, taken away in turn
    ManualRoutes,
}

/// Becomes the demo: its exit status is the status of `cargo xtask demo`, and Ctrl-C reaches it as it
/// would any program, so that it can tear its lab down.
///
/// # Errors
/// Setup or build fails, or the demo can't be started.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(&setup::Arguments::default())?;
    let binaries = workspace::build_release(&["forwarder", "demo"])?;
    let mut demo = Command::new(&binaries["demo"]);
    demo.current_dir(workspace::root())
        .env("FORWARDER_BIN", &binaries["forwarder"]);
    if let Some(journey) = arguments.journey.and_then(|j| j.to_possible_value()) {
        demo.args(["--journey", journey.get_name()]);
    }
    for (wanted, option) in [(arguments.keep, "--keep"), (arguments.down, "--down")] {
        if wanted {
            demo.arg(option);
        }
    }
    Err(demo.exec()).context("can't start the demo")
}
