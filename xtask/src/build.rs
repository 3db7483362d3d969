//! `cargo xtask build`: the release binary.

use anyhow::Result;

use crate::workspace;

/// Builds the agent and says where it is.
///
/// # Errors
/// The build fails; it says itself what is missing.
pub(crate) fn run() -> Result<()> {
    for (_, file) in workspace::build_release(&["forwarder"])? {
        eprintln!("built {}", file.display());
    }
    Ok(())
}
