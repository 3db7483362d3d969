//! Addresses of this host: those the agent owns come and go with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::{
    AddressMessageBuilder,
    packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo},
};

use super::{Network, errno, failed, host_bits};
use crate::error::Error;

impl Network {
    /// The addresses of the interface with number `interface`, with their prefix lengths, IPv4 first. Link-local IPv6
    /// addresses are left out: they are no names for other networks.
    pub async fn addresses(&self, interface: u32) -> Result<Vec<IpNet>, Error> {
        let messages = self
            .all(move |handle| handle.address().get().set_link_index_filter(interface).execute())
            .await
            .map_err(|error| failed("list the addresses", &error))?;
        let mut addresses: Vec<_> = messages.iter().filter_map(parse).collect();
        addresses.sort_by_key(|address| address.addr().is_ipv6());
        Ok(addresses)
    }

    /// Gives `address` alone to the interface called `interface`. True if this call added it, false if it was there
    /// before, so that whoever added it knows what to remove.
    ///
    /// Packets may carry it as their source when a socket binds to it, but the kernel does not choose it for others:
    /// it gets scope `host`, of IPv6 a preferred lifetime of zero (RFC 4862 §5.5.4). It stays out of ARP announcements.
    ///
    /// # Errors
    /// The interface does not exist; no CAP_NET_ADMIN.
    pub async fn add_address(&self, interface: &str, address: IpAddr) -> Result<bool, Error> {
        let index = self.index_of(interface).await?;
        let mut request = self.handle.address().add(index, address, host_bits(address));
        let message = request.message_mut();
        match address {
            IpAddr::V4(_) => message.header.scope = AddressScope::Host,
            IpAddr::V6(_) => message.attributes.extend([
                AddressAttribute::CacheInfo(deprecated()),
                // Or sockets cannot use it until the kernel has looked for a duplicate, on a loopback device too.
                AddressAttribute::Flags(AddressFlags::Nodad),
            ]),
        }
        match request.execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(false),
            Err(error) => Err(failed(
                format_args!("add address {address} to interface \"{interface}\""),
                &error,
            )),
        }
    }

    /// Takes `address` from the interface called `interface`. True if this call removed it, false if it was not
    /// there (nor the interface).
    ///
    /// # Errors
    /// No CAP_NET_ADMIN.
    pub async fn remove_address(&self, interface: &str, address: IpAddr) -> Result<bool, Error> {
        let Some(found) = self.interface(interface).await? else {
            return Ok(false);
        };
        let message = match address {
            IpAddr::V4(address) => AddressMessageBuilder::<Ipv4Addr>::new()
                .index(found.index)
                .address(address, 32)
                .build(),
            IpAddr::V6(address) => AddressMessageBuilder::<Ipv6Addr>::new()
                .index(found.index)
                .address(address, 128)
                .build(),
        };
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

/// For ever, but not to be chosen.
fn deprecated() -> CacheInfo {
    let mut lifetimes = CacheInfo::default();
    lifetimes.ifa_preferred = 0;
    lifetimes.ifa_valid = u32::MAX;
    lifetimes
}

fn parse(message: &AddressMessage) -> Option<IpNet> {
    // On a point-to-point interface `Address` is the far end's; `Local` is ours wherever it is there. Of IPv6 it
    // usually is not.
    let attributes = message.attributes.iter();
    let address = attributes.fold(None, |found, attribute| match (attribute, found) {
        (AddressAttribute::Local(local), _) => Some(*local),
        (AddressAttribute::Address(address), None) => Some(*address),
        _ => found,
    })?;
    let is_link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    if is_link_local {
        return None;
    }
    IpNet::new(address, message.header.prefix_len).ok()
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
            let address = IpAddr::from([100, 64, 0, 1]);

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

            let v6: IpAddr = "fd64::1".parse().unwrap();
            assert!(network.add_address("lo", v6).await.unwrap());
            assert!(!network.add_address("lo", v6).await.unwrap());
            assert!(
                network
                    .addresses(lo)
                    .await
                    .unwrap()
                    .contains(&"fd64::1/128".parse().unwrap())
            );
            tokio::net::UdpSocket::bind((v6, 0)).await.unwrap();
            assert!(network.remove_address("lo", v6).await.unwrap());
            assert!(!network.remove_address("lo", v6).await.unwrap());

            let error = network.add_address("absent", address).await.unwrap_err();
            assert_eq!(error.what, "interface \"absent\" does not exist");
            assert!(!network.remove_address("absent", address).await.unwrap());
        });
    }
}
