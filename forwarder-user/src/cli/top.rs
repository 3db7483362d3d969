//! `forwarder top`: the status as a dashboard, see `tui`.

use super::args::TopArgs;
use crate::{error::Errors, tui::terminal};

/// Shows the dashboard until the user has enough.
///
/// # Errors
/// This is no terminal. An agent that does not answer is no error: it is shown, and asked again.
pub fn top(args: &TopArgs) -> Result<(), Errors> {
    Ok(terminal::show(&args.agent.socket, args.interval)?)
}
