//! What the kernel knows of the network around this gateway, and the few things we change in it.
//!
//! Everything goes through rtnetlink, one request per question, so that an answer is never older than its
//! question; nothing is cached. [`Network`] asks and changes, [`Watch`] says when to ask again. We change three
//! things only: addresses that the agent owns ([`Network::add_address`]), its policy rules ([`Network::add_rule`])
//! and neighbours that the kernel should resolve ([`Network::resolve_neighbour`]); routes and links belong to the
//! operator.
//!
//! A [`Network`] belongs to the network namespace of the thread that opened it, wherever it is used later.
//! (Sysctls are the exception: the kernel shows those of the thread that reads them.) IPv4 and IPv6 alike.

use std::{fmt::Display, net::IpAddr, sync::Arc};

use futures_util::{Stream, TryStreamExt as _};
use nix::errno::Errno;
use rtnetlink::{Handle, packet_route::AddressFamily};
use tokio::{sync::Mutex, task::AbortHandle};

use crate::{
    error::Error,
    privileges::{self, CapabilitySet},
};

mod address;
mod ethtool;
mod fib;
mod genetlink;
mod interface;
mod making;
mod neighbour;
mod packet_socket;
pub mod raw;
mod route;
mod rule;
mod sysctl;
#[cfg(test)]
mod testing;
mod tunnel;
mod watch;
mod xdp_features;

pub use ethtool::{Offloads, Queues, offloads, queues};
pub use fib::{Decision, Entry, Policy, Rule};
pub use interface::{Interface, InterfaceKind, Vlan};
pub use neighbour::{Neighbour, NeighbourState};
pub use packet_socket::PacketSocket;
pub use route::{Route, RouteError};
pub use rule::{MAIN_TABLE, PolicyRule, RULE_PRIORITY, Selector};
pub use sysctl::RpFilter;
pub use tunnel::{FarEnd, TunnelDevice, Way};
pub use watch::{Changes, LinkChange, LinkState, Watch};
pub use xdp_features::{runs_programs, takes_redirects, takes_several_buffers};

/// A connection to the kernel's routing tables. Cheap to clone; the last clone closes it.
#[derive(Clone, Debug)]
pub struct Network {
    handle: Handle,
    /// Held by who asks for a list, see [`Network::all`].
    listing: Arc<Mutex<()>>,
    _connection: Arc<AbortOnDrop>,
}

impl Network {
    /// Connects to the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refuses a netlink socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _unsolicited) = rtnetlink::new_connection()
            .map_err(|error| Error::host(format!("cannot open a netlink socket: {error}")))?;
        let connection = AbortOnDrop(tokio::spawn(connection).abort_handle());
        Ok(Self {
            handle,
            listing: Arc::default(),
            _connection: Arc::new(connection),
        })
    }

    /// The answers to a question that has many.
    ///
    /// One such question at a time, and to its end: on a socket where it still answers one, the kernel refuses the next
    /// (EBUSY, `__netlink_dump_start` of net/netlink/af_netlink.c). Whoever asks may stop waiting, so the answers go to
    /// a task of its own.
    async fn all<T, S>(
        &self,
        ask: impl FnOnce(&Handle) -> S + Send + 'static,
    ) -> Result<Vec<T>, rtnetlink::Error>
    where
        T: Send + 'static,
        S: Stream<Item = Result<T, rtnetlink::Error>> + Send + 'static,
    {
        let (handle, listing) = (self.handle.clone(), self.listing.clone());
        let answers = tokio::spawn(async move {
            let _turn = listing.lock_owned().await;
            ask(&handle).try_collect().await
        });
        // It fails as the runtime ends, as a request does then.
        answers.await.unwrap_or(Err(rtnetlink::Error::RequestFailed))
    }
}

/// The task that moves a connection's messages; without this it would outlive the connection's users.
#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Bits of a whole address of this family.
pub(super) fn host_bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Its family, as rtnetlink has it.
fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The errno that the kernel answered with, if it answered.
fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(Errno::from_raw(message.raw_code().abs())),
        _ => None,
    }
}

/// `cannot <what>: <why>`, with a hint where the kernel's reason needs one.
fn failed(what: impl Display, error: &rtnetlink::Error) -> Error {
    match errno(error) {
        Some(Errno::EPERM) => privileges::refused(
            format_args!("cannot {what}: {}", Errno::EPERM.desc()),
            CapabilitySet::NET_ADMIN,
        ),
        Some(errno) => Error::failed(format!("cannot {what}: {}", errno.desc())),
        None => Error::failed(format!("cannot {what}: {error}")),
    }
}

/// The one answer of a request that has one; `None` if the kernel answered with `absent`, which says that the
/// thing does not exist.
async fn one<T>(
    answers: impl Stream<Item = Result<T, rtnetlink::Error>>,
    absent: Errno,
) -> Result<Option<T>, rtnetlink::Error> {
    let mut answers = std::pin::pin!(answers);
    match answers.try_next().await {
        Ok(answer) => Ok(answer),
        Err(error) if errno(&error) == Some(absent) => Ok(None),
        Err(error) => Err(error),
    }
}
