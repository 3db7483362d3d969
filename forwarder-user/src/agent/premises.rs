//! What an agent takes before it gives up its rights: the pins, the addresses it serves on, the control socket.
//!
//! Mounting the BPF file system, a port below 1024, a socket for a group and files of another user may each need a
//! capability for one moment, which the agent then is without (`privileges`). So these are taken first, in the only
//! thread there is, and without a runtime.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    api::{self, ControlSocket, Credentials, RemoteListener},
    config::Config,
    datapath::pin::PinDirectory,
    error::Error,
};

/// All of it.
pub struct Premises {
    pub(super) pins: Arc<PinDirectory>,
    /// Another agent has left a data path, which goes on whatever becomes of this one.
    pub(super) is_takeover: bool,
    pub(super) metrics_listener: std::net::TcpListener,
    pub(super) control_socket: ControlSocket,
    pub(super) remote: Option<(RemoteListener, watch::Sender<Credentials>)>,
}

impl Premises {
    /// Takes them, and nothing if one of them is not to be had.
    ///
    /// # Errors
    /// Another agent holds them, an address or file is not what it should be, or rights are missing.
    pub fn take(config: &Config) -> Result<Self, Error> {
        // Before anything else is taken: whoever holds the pins is the agent.
        let pins = Arc::new(PinDirectory::open(&config.agent.pin_directory)?);
        let is_takeover = pins.is_in_use()?;
        let take_others = || {
            let metrics_listener = api::bind_metrics(config.agent.metrics_address)?;
            let group = config.agent.control_group.as_deref();
            Ok(Self {
                pins: pins.clone(),
                is_takeover,
                metrics_listener,
                control_socket: api::bind_control(&config.agent.control_socket, group)?,
                remote: config.agent.api.as_ref().map(api::bind_remote).transpose()?,
            })
        };
        take_others().inspect_err(|_| leave(&pins, is_takeover))
    }

    /// Gives them back, as an agent does that does not start.
    pub fn leave(self) {
        leave(&self.pins, self.is_takeover);
    }
}

fn leave(pins: &PinDirectory, is_takeover: bool) {
    if !is_takeover {
        // The error that ended the start is the one to tell.
        let _ = pins.remove();
    }
}
