//! Addresses of this host: those the agent owns come and go with it.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use nix::errno::Errno;
use rtnetlink::{
    AddressMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage, AddressScope},
    },
};

use super::{Network, errno, failed};
use crate::error::Error;

impl Network {
    /// The IPv4 addresses of the interface with number `interface`, with their prefix lengths.
    pub async fn addresses(&self, interface: u32) -> Result<Vec<Ipv4Net>, Error> {
        let request = self.handle.address().get().set_link_index_filter(interface);
        let messages = request.execute().try_collect::<Vec<_>>().await;
        let messages = messages.map_err(|error| failed("list the addresses", &error))?;
        Ok(messages.iter().filter_map(parse).collect())
    }

    /// Gives `address`/32 to the interface called `interface`. True if this call added it, false if it was there
    /// before, so that whoever added it knows what to remove.
    ///
    /// The address gets scope `host`: packets may carry it as their source when a socket binds to it, but the
    /// kernel never chooses it for others, and it stays out of ARP announcements.
    ///
    /// # Errors
    /// The interface does not exist; no CAP_NET_ADMIN.
    pub async fn add_address(&self, interface: &str, address: Ipv4Addr) -> Result<bool, Error> {
        let index = self.index_of(interface).await?;
        let mut request = self.handle.address().add(index, address.into(), 32);
        request.message_mut().header.scope = AddressScope::Host;
        match request.execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(false),
            Err(error) => Err(failed(
                format_args!("add address {address} to interface \"{interface}\""),
                &error,
            )),
        }
    }

    /// Takes `address`/32 from the interface called `interface`. True if this call removed it, false if it was not
    /// there (nor the interface).
    ///
    /// # Errors
    /// No CAP_NET_ADMIN.
    pub async fn remove_address(&self, interface: &str, address: Ipv4Addr) -> Result<bool, Error> {
        let Some(found) = self.interface(interface).await? else {
            return Ok(false);
        };
        let message = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(found.index)
            .address(address, 32)
            .build();
        match self.handle.address().del(message).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EADDRNOTAVAIL) => Ok(false),
            Err(error) => Err(failed(
                format_args!("remove address {address} from interface \"{interface}\""),
                &error,
            )),
        }
    }

    async fn index_of(&self, interface: &str) -> Result<u32, Error> {
        match self.interface(interface).await? {
            Some(interface) => Ok(interface.index),
            None => Err(Error::host(format!("interface \"{interface}\" does not exist"))
                .hint("`ip link` lists those that do")),
        }
    }
}

fn parse(message: &AddressMessage) -> Option<Ipv4Net> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    // On a point-to-point interface `Address` is the far end's; `Local` is ours everywhere.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(local)) => Some(*local),
        _ => None,
    })?;
    Ipv4Net::new(local, message.header.prefix_len).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    #[test]
    fn adding_and_removing_tell_whether_they_changed_anything() {
        in_namespace(async {
            ip("link set lo up");
            let network = Network::open().unwrap();
            let lo = network.interface("lo").await.unwrap().unwrap().index;
            let address = Ipv4Addr::new(100, 64, 0, 1);

            assert!(!network.remove_address("lo", address).await.unwrap());
            assert!(network.add_address("lo", address).await.unwrap());
            assert!(!network.add_address("lo", address).await.unwrap());
            let addresses = network.addresses(lo).await.unwrap();
            assert!(
                addresses.contains(&"100.64.0.1/32".parse().unwrap()),
                "{addresses:?}"
            );
            assert!(
                addresses.contains(&"127.0.0.1/8".parse().unwrap()),
                "{addresses:?}"
            );

            // Sockets may use it, the kernel does not choose it for others.
            tokio::net::UdpSocket::bind((address, 0)).await.unwrap();

            assert!(network.remove_address("lo", address).await.unwrap());
            assert!(!network.remove_address("lo", address).await.unwrap());

            let error = network.add_address("absent", address).await.unwrap_err();
            assert_eq!(error.what, "interface \"absent\" does not exist");
            assert!(!network.remove_address("absent", address).await.unwrap());
        });
    }
}
