//! Frames that the agent writes itself, link header included (packet(7)): announcements.
//!
//! It only sends: opened with protocol 0, the socket gets nothing. Two `unsafe` blocks, as neither nix nor socket2
//! makes a `sockaddr_ll` of an interface's number.

use std::{io, mem::size_of};

use nix::libc::{AF_PACKET, sockaddr_ll, socklen_t};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::{
    error::Error,
    privileges::{self, CapabilitySet},
};

/// A socket that sends whole frames.
#[derive(Debug)]
pub struct PacketSocket(Socket);

impl PacketSocket {
    /// Opens it in the network namespace of the calling thread.
    ///
    /// # Errors
    /// No CAP_NET_RAW.
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(Self(socket))
        };
        open().map_err(|error| {
            privileges::failed("cannot open a packet socket", &error, CapabilitySet::NET_RAW)
        })
    }

    /// Sends a frame by the interface with number `interface`.
    ///
    /// # Errors
    /// The interface is gone or down, or its queue is full.
    pub fn send(&self, interface: u32, frame: &[u8]) -> io::Result<()> {
        self.0.send_to(frame, &address_of(interface)?).map(drop)
    }
}

fn address_of(interface: u32) -> io::Result<SockAddr> {
    let link = sockaddr_ll {
        sll_family: AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage is larger than a sockaddr_ll and aligned for any socket address.
    *unsafe { storage.view_as::<sockaddr_ll>() } = link;
    // SAFETY: a whole sockaddr_ll was just written.
    Ok(unsafe { SockAddr::new(storage, size_of::<sockaddr_ll>() as socklen_t) })
}

#[cfg(test)]
mod tests {
    /// Else VIPs are not announced where systemd runs the agent.
    #[test]
    fn the_unit_admits_packet_sockets() {
        let unit = include_str!("../../../deploy/forwarder.service");
        let families = unit
            .lines()
            .find_map(|line| line.strip_prefix("RestrictAddressFamilies="))
            .expect("families");
        assert!(
            families.split(' ').any(|family| family == "AF_PACKET"),
            "{families}"
        );
    }
}
