//! Where a probe leaves from, and the binding of its socket to that.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;

use super::failure::{ProbeFailure, Stage};

/// Where probes leave from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// An address of this host, by whatever device its routes say.
    Address(IpAddr),
    /// This device, with the address that the kernel picks for it.
    Device(Arc<str>),
}

impl Origin {
    /// Binds a socket that is not connected yet.
    pub(super) fn bind(&self, socket: &impl AsFd) -> Result<(), ProbeFailure> {
        let socket = SockRef::from(socket);
        let bound = match self {
            Self::Address(address) => socket.bind(&SocketAddr::new(*address, 0).into()),
            Self::Device(device) => socket.bind_device(Some(device.as_bytes())),
        };
        bound.map_err(|error| self.failure(&error))
    }

    /// What an error of [`Self::bind`] means.
    pub(super) fn failure(&self, error: &std::io::Error) -> ProbeFailure {
        match self {
            Self::Address(address) if error.kind() == ErrorKind::AddrNotAvailable => {
                ProbeFailure::SourceNotLocal(*address)
            }
            _ => ProbeFailure::from_io(error, Stage::Connect, Duration::ZERO),
        }
    }
}
