//! Checks the host and every path of a configuration, before anything fails or afterwards.
//!
//! ```text
//! gather  the only part that asks (kernel, servers, routers): a Config becomes Facts
//! checks  pure: Facts become Findings; one file per thing that is checked
//! finding what is wrong, how likely it is the cause of the rest, the commands that mend it
//! report  Facts and Findings as one value, for text and JSON
//! ```
//!
//! It works beside a running agent and without one. It changes nothing that stays: probe addresses that are
//! not there are added to `lo` and removed at the end, also after a failure or a Ctrl-C; the kernel resolves
//! neighbours, as it does for any packet. The same goes for the rules of networks with a routing table of their own,
//! where no agent has added them.

mod checks;
pub mod facts;
pub mod finding;
mod gather;
pub mod report;

use std::{os::unix::net::UnixStream, path::PathBuf};

use tokio::signal::unix::{SignalKind, signal};

pub use checks::findings;
use facts::Facts;

use crate::{config::Config, error::Error, network::Network, status::Status};

/// What to check.
#[derive(Clone, Debug)]
pub struct Question {
    /// Where the configuration comes from, for commands that change it.
    pub file: PathBuf,
    pub config: Config,
    /// What the running agent says; `None`: none runs.
    pub agent: Option<Status>,
    /// Only this backend group and its listeners.
    pub group: Option<String>,
}

/// Gathers what there is to know. Takes a few seconds if something does not answer, else much less.
///
/// # Errors
/// Rights are missing (CAP_NET_ADMIN for probe addresses, CAP_NET_RAW for echo requests), the kernel refuses to
/// answer, or SIGINT or SIGTERM came.
pub async fn examine(question: Question) -> Result<Facts, Error> {
    let listen =
        |kind| signal(kind).map_err(|error| Error::failed(format!("cannot listen for signals: {error}")));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let network = Network::open()?;
    // One that comes up while we look finds our addresses there, and counts on them from then on.
    let socket = question.config.agent.control_socket.clone();
    let had_agent = question.agent.is_some() || UnixStream::connect(&socket).is_ok();
    let loan = gather::Loan::take(&network, &question).await?;
    let outcome = tokio::select! {
        facts = gather::gather(&network, question, &loan) => facts,
        _ = interrupt.recv() => Err(Error::failed("interrupted")),
        _ = terminate.recv() => Err(Error::failed("terminated")),
    };
    if had_agent || UnixStream::connect(&socket).is_err() {
        loan.give_back(&network).await?;
    }
    outcome
}
