//! `cargo xtask screenshots`: makes docs/images anew, from a real agent with traffic in a lab.
//!
//! The work is done by a binary of `forwarder-tests`, because it uses the tests' lab.

use std::process::Command;

use anyhow::Result;

use crate::{setup, workspace};

/// # Errors
/// Setup or build fails, or a picture can't be made.
pub(crate) fn run() -> Result<()> {
    setup::run(&setup::Arguments::default())?;
    let binaries = workspace::build_release(&["forwarder", "screenshots"])?;
    let mut screenshots = Command::new(&binaries["screenshots"]);
    screenshots
        .env("FORWARDER_BIN", &binaries["forwarder"])
        .arg("--out")
        .arg(workspace::root().join("docs/images"));
    workspace::run(&mut screenshots)
}
