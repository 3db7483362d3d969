//! Packets that the agent writes itself, from addresses that are not this host's (raw(7), ipv6(7)): the host routes
//! them.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    error::Error,
    privileges::{self, CapabilitySet},
};

/// IPPROTO_RAW (linux/in.h): the sender writes the IP header itself.
const PROTOCOL_RAW: i32 = 255;

/// A raw socket of each family.
pub struct RawSockets {
    v4: Socket,
    /// `None`: this host has no IPv6.
    v6: Option<Socket>,
}

impl RawSockets {
    /// Opens the sockets; `purpose` is what they are for, in the plural.
    ///
    /// # Errors
    /// When the kernel refuses, for want of CAP_NET_RAW.
    pub fn open(purpose: &str) -> Result<Self, Error> {
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(PROTOCOL_RAW)))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        };
        match open(Domain::IPV4) {
            Ok(v4) => Ok(Self {
                v4,
                v6: open(Domain::IPV6).ok(),
            }),
            Err(error) => {
                let what = format!("cannot open a raw socket for {purpose}");
                Err(privileges::failed(&what, &error, CapabilitySet::NET_RAW))
            }
        }
    }

    /// Sends a packet, which begins with its IP header. The port of `to` has no meaning.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&self, packet: &[u8], to: SocketAddr) -> io::Result<usize> {
        let socket = if to.is_ipv4() {
            Some(&self.v4)
        } else {
            self.v6.as_ref()
        };
        let socket = socket.ok_or(io::ErrorKind::Unsupported)?;
        // Of IPv6, Linux takes the port for a protocol, and refuses any but the socket's.
        socket.send_to(packet, &SocketAddr::new(to.ip(), 0).into())
    }
}
