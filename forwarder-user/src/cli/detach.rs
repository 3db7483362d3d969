//! `forwarder detach`: removes everything that an agent has left: what is pinned, the probe address, rules, tunnel devices.
//! Traffic stops, flows end.

use std::path::PathBuf;

use super::{args::DetachArgs, output};
use crate::{
    agent::{PROBE_INTERFACE, remove_rules},
    config::{load::load, validate::DEFAULT_PIN_DIRECTORY},
    datapath::{attach::remove_filters, pin::PinDirectory},
    error::{Error, Errors},
    network::Network,
};

/// Detaches programs, removes maps and what else an agent that stops would take away.
///
/// # Errors
/// An agent runs on them; rights are missing.
pub fn detach(args: &DetachArgs) -> Result<(), Errors> {
    let directory = match (&args.pin_directory, &args.config) {
        (Some(directory), _) => directory.clone(),
        (None, Some(file)) => load(file)?.agent.pin_directory,
        (None, None) => PathBuf::from(DEFAULT_PIN_DIRECTORY),
    };
    let Some(pins) = PinDirectory::open_existing(&directory)? else {
        output::text(&format!("nothing is pinned in {}", directory.display()))?;
        return Ok(());
    };
    let addresses = pins.probe_addresses();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::host(format!("cannot start the runtime: {error}")))?;
    let links = runtime.block_on(async {
        let network = Network::open()?;
        for address in addresses.iter() {
            network.remove_address(PROBE_INTERFACE, address).await?;
        }
        network.remove_made_tunnels(|_| false).await?;
        remove_rules(&network).await?;
        network.interfaces().await
    })?;
    pins.remove()?;
    remove_filters(&links, &[]);
    output::text(&format!(
        "detached: programs, maps and flows of {} are gone",
        directory.display()
    ))?;
    Ok(())
}
