//! `forwarder run`: the agent in the foreground.

use super::{args::RunArgs, log};
use crate::{
    agent::{self, Premises},
    config,
    error::{Error, Errors},
    privileges,
};

/// Runs the agent until it is told to stop.
///
/// # Errors
/// The configuration's, all at once, before anything is touched; or the one that ended the agent.
pub fn run(args: &RunArgs) -> Result<(), Errors> {
    let config = config::load::load(&args.config.config)?;
    log::start(args)?;
    let premises = Premises::take(&config)?;
    // Before there is another thread: each has what the one that starts it has.
    if let Err(error) = privileges::keep_the_needed() {
        premises.leave();
        return Err(error.into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("cannot start the runtime: {error}")))?;
    Ok(runtime.block_on(agent::run(config, &args.config.config, premises))?)
}
