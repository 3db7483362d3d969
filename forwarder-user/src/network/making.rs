//! Tunnel devices that the agent makes where the configuration says what they are, and the routes into them.
//!
//! Such a device is marked as the agent's, and only marked ones are changed or removed. Everything else treats it as
//! any other: probes leave by it, and what XDP does not handle passes it.

use std::net::IpAddr;

use forwarder_common::{abi::tunnel::TunnelKind, outer::Far};
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::link::{
        GreIOFlags, InfoData, InfoGeneve, InfoGre, InfoGre6, InfoIpTunnel, InfoKind, InfoVxlan,
        LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
};

use super::{Network, TunnelDevice, errno, failed};
use crate::{
    config::{MadeKind, MadeTunnel},
    error::Error,
};

/// What a device of the agent's says of itself (`ip link`, "alias").
const MARK: &str = "made by forwarder";

impl MadeTunnel {
    /// What the tunnel adds to an inner IP packet, in bytes.
    fn overhead_bytes(&self) -> u32 {
        let remote = self.remote.into();
        let far = Far {
            id: self.id,
            ..Far::new(self.tunnel_kind(), remote, remote)
        };
        far.overhead_bytes() as u32
    }

    const fn tunnel_kind(&self) -> TunnelKind {
        match self.kind {
            MadeKind::Vxlan => TunnelKind::VXLAN,
            MadeKind::Geneve => TunnelKind::GENEVE,
            MadeKind::Gre => TunnelKind::GRE,
            MadeKind::Gretap => TunnelKind::GRETAP,
            MadeKind::Ipip => TunnelKind::IPIP,
        }
    }

    /// Is this the device that an earlier agent has made of the same settings?
    fn is(&self, device: &TunnelDevice) -> bool {
        device.kind == self.tunnel_kind()
            && device.remote == Some(self.remote)
            && device.id == self.id
            && device.ttl == self.ttl
            && self.local.is_none_or(|local| device.local == Some(local))
            && self.port.is_none_or(|port| device.port == port)
            && self
                .mtu_bytes
                .is_none_or(|mtu_bytes| device.mtu_bytes == mtu_bytes)
    }

    /// The device's kind and parameters as the kernel takes them.
    fn info(&self) -> (InfoKind, InfoData) {
        match self.kind {
            MadeKind::Vxlan => (InfoKind::Vxlan, InfoData::Vxlan(self.vxlan())),
            MadeKind::Geneve => (InfoKind::Geneve, InfoData::Geneve(self.geneve())),
            MadeKind::Gre if self.remote.is_ipv4() => (InfoKind::GreTun, InfoData::GreTun(self.gre())),
            MadeKind::Gre => (InfoKind::GreTun6, InfoData::GreTun6(self.gre6())),
            MadeKind::Gretap if self.remote.is_ipv4() => (InfoKind::GreTap, InfoData::GreTap(self.gre())),
            MadeKind::Gretap => (InfoKind::GreTap6, InfoData::GreTap6(self.gre6())),
            MadeKind::Ipip => {
                let kind = if self.remote.is_ipv4() {
                    InfoKind::IpIp
                } else {
                    InfoKind::Ip6Tnl
                };
                (kind, InfoData::IpTunnel(self.ip_tunnel()))
            }
        }
    }

    fn vxlan(&self) -> Vec<InfoVxlan> {
        let mut infos = vec![
            InfoVxlan::Id(self.id.unwrap_or(0)),
            InfoVxlan::Ttl(self.ttl),
            // RFC 7348 §5.
            InfoVxlan::Port(self.port.unwrap_or(4789)),
            InfoVxlan::Learning(false),
        ];
        infos.push(match self.remote {
            IpAddr::V4(address) => InfoVxlan::Group(address),
            IpAddr::V6(address) => InfoVxlan::Group6(address),
        });
        infos.extend(self.local.map(|local| match local {
            IpAddr::V4(address) => InfoVxlan::Local(address),
            IpAddr::V6(address) => InfoVxlan::Local6(address),
        }));
        infos
    }

    fn geneve(&self) -> Vec<InfoGeneve> {
        let remote = match self.remote {
            IpAddr::V4(address) => InfoGeneve::Remote(address),
            IpAddr::V6(address) => InfoGeneve::Remote6(address),
        };
        vec![
            InfoGeneve::Id(self.id.unwrap_or(0)),
            InfoGeneve::Ttl(self.ttl),
            // RFC 8926 §3.3.
            InfoGeneve::Port(self.port.unwrap_or(6081)),
            remote,
        ]
    }

    fn gre(&self) -> Vec<InfoGre> {
        let mut infos = vec![InfoGre::Ttl(self.ttl), InfoGre::PathMTUDiscovery(true)];
        if let Some(key) = self.id {
            let flags = GreIOFlags::Key;
            infos.extend([
                InfoGre::IFlags(flags),
                InfoGre::OFlags(flags),
                InfoGre::IKey(key),
                InfoGre::OKey(key),
            ]);
        }
        if let IpAddr::V4(remote) = self.remote {
            infos.push(InfoGre::Remote(remote));
        }
        if let Some(IpAddr::V4(local)) = self.local {
            infos.push(InfoGre::Local(local));
        }
        infos
    }

    fn gre6(&self) -> Vec<InfoGre6> {
        let mut infos = vec![InfoGre6::Ttl(self.ttl)];
        if let Some(key) = self.id {
            let flags = GreIOFlags::Key;
            infos.extend([
                InfoGre6::IFlags(flags),
                InfoGre6::OFlags(flags),
                InfoGre6::IKey(key),
                InfoGre6::OKey(key),
            ]);
        }
        if let IpAddr::V6(remote) = self.remote {
            infos.push(InfoGre6::Remote(remote));
        }
        if let Some(IpAddr::V6(local)) = self.local {
            infos.push(InfoGre6::Local(local));
        }
        infos
    }

    fn ip_tunnel(&self) -> Vec<InfoIpTunnel> {
        let mut infos = vec![InfoIpTunnel::Remote(self.remote), InfoIpTunnel::Ttl(self.ttl)];
        infos.extend(self.local.map(InfoIpTunnel::Local));
        if self.remote.is_ipv4() {
            infos.push(InfoIpTunnel::PMtuDisc(true));
        } else {
            // Zero: whatever is inside.
            infos.push(InfoIpTunnel::Protocol(0.into()));
        }
        infos
    }
}

impl Network {
    /// Makes the device `name`, up, with routes to these networks through it, in a routing table where one is named.
    /// One that an earlier agent has made of the same settings stays.
    ///
    /// # Errors
    /// There is a device of that name that somebody else has made, or the kernel refuses.
    pub async fn make_tunnel(
        &self,
        name: &str,
        tunnel: &MadeTunnel,
        networks: &[(IpNet, Option<u32>)],
    ) -> Result<(), Error> {
        let what = || format!("make the tunnel device \"{name}\"");
        let found = self
            .interface(name)
            .await?
            .filter(|link| link.alias.as_deref() == Some(MARK));
        if let Some(link) = found
            && self
                .tunnel_device(name)
                .await?
                .is_some_and(|device| tunnel.is(&device))
        {
            for (cidr, table) in networks {
                self.route_into(link.index, *cidr, *table).await?;
            }
            return Ok(());
        }
        if !self.remove_made_tunnel(name).await? {
            return Err(Error::host(format!(
                "the device \"{name}\" exists, and the agent has not made it"
            ))
            .hint(format!(
                "remove kind below [tunnel.{name}] to use that device, or remove the device"
            )));
        }
        let (mut tunnel, way) = (*tunnel, self.way_to(tunnel.remote, tunnel.local).await);
        let way = way.ok_or_else(|| {
            Error::host(format!(
                "cannot {}: there is no route to {}",
                what(),
                tunnel.remote
            ))
        })?;
        tunnel.local = tunnel.local.or(way.source);
        let link = self.interface_by_index(way.interface).await?;
        let carried = link.map_or(0, |link| link.mtu_bytes.saturating_sub(tunnel.overhead_bytes()));
        let mtu_bytes = tunnel.mtu_bytes.unwrap_or(carried.max(1280));
        let (kind, data) = tunnel.info();
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu_bytes),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
        ];
        let request = self.handle.link().add(message);
        request.execute().await.map_err(|error| match errno(&error) {
            Some(Errno::EOPNOTSUPP) => {
                Error::host(format!("cannot {}: this kernel has no such device", what()))
                    .hint("load its module, such as `modprobe ipip`")
            }
            _ => failed(what(), &error),
        })?;
        let made = self.interface(name).await?;
        let index = made.map(|made| made.index).ok_or_else(|| {
            Error::failed(format!(
                "the tunnel device \"{name}\" is gone as soon as it was made"
            ))
        })?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::IfAlias(MARK.to_owned())];
        let request = self.handle.link().set(message);
        request.execute().await.map_err(|error| failed(what(), &error))?;
        for (cidr, table) in networks {
            self.route_into(index, *cidr, *table).await?;
        }
        Ok(())
    }

    async fn route_into(&self, index: u32, cidr: IpNet, table: Option<u32>) -> Result<(), Error> {
        let table = table.unwrap_or(super::MAIN_TABLE);
        let message = match cidr {
            IpNet::V4(cidr) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(cidr.network(), cidr.prefix_len())
                .output_interface(index)
                .table_id(table)
                .scope(rtnetlink::packet_route::route::RouteScope::Link)
                .build(),
            IpNet::V6(cidr) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(cidr.network(), cidr.prefix_len())
                .output_interface(index)
                .table_id(table)
                .build(),
        };
        let request = self.handle.route().add(message).replace();
        request
            .execute()
            .await
            .map_err(|error| failed(format_args!("route {cidr} into a tunnel"), &error))
    }

    /// Removes all devices that an agent has made and whose names are not `wanted`.
    pub async fn remove_made_tunnels(&self, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        for link in self.interfaces().await? {
            if link.alias.as_deref() == Some(MARK) && !wanted(&link.name) {
                self.remove_made_tunnel(&link.name).await?;
            }
        }
        Ok(())
    }

    /// Removes the device `name` with its routes, if the agent has made it; `false`: somebody else has.
    async fn remove_made_tunnel(&self, name: &str) -> Result<bool, Error> {
        let Some(link) = self.interface(name).await? else {
            return Ok(true);
        };
        if link.alias.as_deref() != Some(MARK) {
            return Ok(false);
        }
        let request = self.handle.link().del(link.index);
        request
            .execute()
            .await
            .map_err(|error| failed(format_args!("remove the tunnel device \"{name}\""), &error))?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_namespace, ip};

    #[test]
    fn a_device_is_made_with_its_routes_and_removed_with_them() {
        in_namespace(async {
            ip("link add fa mtu 1400 type veth peer name fb");
            ip("address add 10.7.0.1/24 dev fa");
            ip("link set fa up");
            ip("link set fb up");
            let network = Network::open().unwrap();
            let tunnel = MadeTunnel {
                kind: MadeKind::Vxlan,
                remote: [10, 7, 0, 2].into(),
                local: None,
                id: Some(42),
                port: None,
                ttl: 64,
                mtu_bytes: None,
            };
            let networks = [("192.168.0.0/16".parse().unwrap(), None)];
            // Twice: what an earlier agent has made stays.
            for _ in 0..2 {
                network.make_tunnel("fx", &tunnel, &networks).await.unwrap();
            }
            let device = network.tunnel_device("fx").await.unwrap().unwrap();
            assert_eq!((device.id, device.port, device.mtu_bytes), (Some(42), 4789, 1350));
            assert_eq!(device.remote, Some([10, 7, 0, 2].into()));
            assert_eq!(device.local, Some([10, 7, 0, 1].into()));
            let way = network.way_to([192, 168, 1, 10].into(), None).await;
            assert_eq!(way.map(|way| way.interface), Some(device.index));
            let other = MadeTunnel {
                id: Some(43),
                ..tunnel
            };
            network.make_tunnel("fx", &other, &networks).await.unwrap();
            let device = network.tunnel_device("fx").await.unwrap().unwrap();
            assert_eq!(device.id, Some(43));
            network.remove_made_tunnels(|_| false).await.unwrap();
            assert_eq!(network.interface("fx").await.unwrap(), None);

            ip("link add fx type vxlan id 7 local 10.7.0.1 remote 10.7.0.9 dstport 4789");
            let error = network.make_tunnel("fx", &tunnel, &networks).await.unwrap_err();
            assert!(error.what.contains("has not made it"), "{error}");
        });
    }
}
