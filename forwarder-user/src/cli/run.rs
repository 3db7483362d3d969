//! `forwarder run`: the agent in the foreground.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use super::args::{LogFormat, RunArgs};
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
    log(args)?;
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

fn log(args: &RunArgs) -> Result<(), Error> {
    let filter = args.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Error::usage(format!("--log \"{filter}\": {error}")).hint(
            "a level such as \"debug\", or levels per module such as \"info,forwarder_user::health=debug\"",
        )
    })?;
    let is_terminal = std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let outcome = match args.log_format {
        LogFormat::Json => subscriber.json().try_init(),
        LogFormat::Auto if !is_terminal => subscriber.json().try_init(),
        LogFormat::Auto | LogFormat::Text => {
            let has_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            subscriber.with_target(false).with_ansi(has_colour).try_init()
        }
    };
    outcome.map_err(|error| Error::failed(format!("cannot start logging: {error}")))
}
