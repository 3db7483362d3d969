//! Packets through a gateway and its tunnel, one way at a time: the data path that pushes and strips outer headers
//! itself, the kernel's device behind the data path, and nftables in front of the kernel's device.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use super::{
    Bar, Effort, Measured, Plot, PlotKind, Spread, Table,
    frames::{OneWay, PAYLOAD, POOLS, Trial, Wanted, between_neighbours, is_the_generator, mac, payload},
    in_turns, times,
};
use crate::{
    lab::{
        Lab, Lifetime, Namespace,
        agent::Agent,
        configuration::Check,
        crossing::{self, Mode},
        topology::{Peering, Site},
    },
    packet::{Builder, Mac},
    tunnel::{Carrier, Outer, vxlan},
};

pub const NAME: &str = "tunnels";
pub const TITLE: &str = "A tunnel";
pub const PROSE: &str = include_str!("tunnels.md");

/// The client's and the server's UDP ports.
const CLIENT_PORT: u16 = 40_000;
const SERVER_PORT: u16 = 5353;
/// Of the lab's VXLAN device.
const VNI: u32 = 42;
const VXLAN_PORT: u16 = 4789;
/// The gateway's address of the pool in nftables' rules.
const NFT_POOL: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);

/// Who is the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Nobody: generator and far end are neighbours.
    Nobody,
    Native,
    Kernel,
    Nftables,
}

impl Who {
    const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no gateway",
            Self::Native => "native",
            Self::Kernel => "kernel's device",
            Self::Nftables => "nftables and the kernel's device",
        }
    }
}

/// A gateway with its lab.
struct Candidate {
    who: Who,
    requests: OneWay,
    replies: OneWay,
    _agent: Option<Agent>,
    _site: Option<Site>,
    _lab: Option<Lab>,
}

/// # Errors
/// A packet did not arrive, or not as it has to be.
pub fn run(object: &Path, effort: Effort) -> Result<Measured> {
    let (trials, count) = (effort.pick(9, 1), effort.pick(400_000, 20_000));
    let mut candidates = Vec::new();
    for who in [Who::Nobody, Who::Native, Who::Kernel, Who::Nftables] {
        eprintln!("preparing: {} ...", who.name());
        candidates.push(match who {
            Who::Nobody => nobody(object)?,
            _ => gateway(object, who)?,
        });
    }
    eprintln!("{trials} trials of each ...");
    let outcomes = in_turns(&mut candidates, trials, |candidate| {
        let mut both = |path: fn(&mut Candidate) -> &mut OneWay| {
            path(candidate).trial(count).with_context(|| candidate.who.name())
        };
        Ok([both(|c| &mut c.requests)?, both(|c| &mut c.replies)?])
    })?;
    let outcomes: Vec<_> = candidates
        .iter()
        .map(|candidate| candidate.who)
        .zip(outcomes)
        .collect();
    report(&outcomes, trials, count)
}

fn report(outcomes: &[(Who, Vec<[Trial; 2]>)], trials: usize, count: u32) -> Result<Measured> {
    let mut measured = Measured::default();
    let (mut rows, mut bars) = (Vec::new(), Vec::new());
    for (way, name) in ["requests", "replies"].into_iter().enumerate() {
        let spread = |trials: &[[Trial; 2]], of: fn(&Trial) -> f64| {
            Spread::of(trials.iter().map(|trial| of(&trial[way])).collect()).context("no trial")
        };
        let of = |wanted: Who| {
            let found = outcomes.iter().find(|(who, _)| *who == wanted);
            found.map(|(_, trials)| trials.as_slice()).context("a candidate")
        };
        let cpu = |who| Ok::<_, anyhow::Error>(spread(of(who)?, |trial| trial.nanoseconds)?.median);
        let floor = cpu(Who::Nobody)?;
        let alone = spread(of(Who::Nobody)?, |trial| trial.packets_per_second)?.median;
        let nftables = cpu(Who::Nftables)? - floor;
        for (colour, (who, trials)) in outcomes.iter().enumerate() {
            let rate = spread(trials, |trial| trial.packets_per_second)?.median;
            let all = spread(trials, |trial| trial.nanoseconds)?;
            let own = all.map(|value| value - floor);
            if *who != Who::Nobody {
                measured.figure(&format!("{name}, {}", who.name()), own.median);
                bars.push(Bar {
                    label: format!("{name}, {}", who.name()),
                    colour,
                    spread: own,
                });
                if is_the_generator(rate, alone) {
                    measured.remarks.push(format!(
                        "{name}, {}: as fast as the generator alone; its figures are the generator's.",
                        who.name()
                    ));
                }
            }
            rows.push([
                name.to_owned(),
                who.name().to_owned(),
                format!("{:.0}", rate / 1000.0),
                all.show(0),
                format!("{:.0}", own.median),
                if *who == Who::Nobody {
                    String::new()
                } else {
                    times(nftables, own.median)
                },
            ]);
        }
    }
    let header = [
        "",
        "gateway",
        "1000 packets/s, median",
        "CPU per packet, ns: median (min to max)",
        "less no gateway",
        "packets per CPU second, nftables = 1",
    ];
    let caption = format!(
        "VXLAN, one UDP flow in full NAT, {PAYLOAD} bytes of payload, veth. {trials} trials of {count} packets by turns, all on \
         one CPU; each packet was checked where it arrived."
    );
    measured.tables.push(Table::new(&caption, header, rows));
    measured.plots.push(Plot {
        name: "bench-tunnels".to_owned(),
        title: "CPU time of the gateway per packet through VXLAN".to_owned(),
        unit: "ns per packet".to_owned(),
        kind: PlotKind::Bars(bars),
    });
    Ok(measured)
}

/// Two neighbours.
fn nobody(object: &Path) -> Result<Candidate> {
    let lab = Lab::open(Lifetime::Process)?;
    let (left, right) = (lab.namespace("left")?, lab.namespace("right")?);
    lab.cable((&left, "eth0"), (&right, "eth0"), 1500)?;
    let (a, b) = (
        SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), CLIENT_PORT),
        SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 2), SERVER_PORT),
    );
    let ends = (
        ((&left as &Namespace, "eth0"), a),
        ((&right as &Namespace, "eth0"), b),
    );
    Ok(Candidate {
        who: Who::Nobody,
        requests: between_neighbours(object, ends.0, ends.1, 1)?,
        replies: between_neighbours(object, ends.1, ends.0, 1)?,
        _agent: None,
        _site: None,
        _lab: Some(lab),
    })
}

/// The journey "peering" with one UDP flow.
fn gateway(object: &Path, who: Who) -> Result<Candidate> {
    let site = Site::peering_with(Lifetime::Process, Peering::default())?;
    let server = site.servers.first().context("a server")?;
    let vip = SocketAddrV4::new(site.vip, SERVER_PORT);
    let backend = SocketAddrV4::new(server.address, SERVER_PORT);
    let client = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 10), CLIENT_PORT);
    let mode = if who == Who::Native {
        Mode::Native
    } else {
        Mode::Kernel
    };
    let agent = if who == Who::Nftables {
        nftables(&site, vip, backend)?;
        None
    } else {
        let configuration = site
            .configuration(&[])
            .group("udp", "full", Check::None)
            .backend("udp", server.name, server.address, SERVER_PORT, 1)
            .table(
                "listener.udp",
                &[
                    ("vip", &format!("\"{}\"", site.vip)),
                    ("port", &SERVER_PORT.to_string()),
                    ("protocol", "\"udp\""),
                    ("group", "\"udp\""),
                    // While the others have their turns.
                    ("idle_timeout", "\"1h\""),
                ],
            );
        let agent = Agent::start(&site.lab, &site.gateway, &crossing::in_mode(configuration, mode))?;
        crossing::await_mode(&agent, mode)?;
        Some(agent)
    };

    let (client_side, gateway_side) = ((site.client(), "eth0"), (&site.gateway, "eth0"));
    let (far, near) = ((&site.far_router, "wan"), (&site.gateway, "wan"));
    let request = Builder::udp(client, vip)
        .link(mac(client_side)?, mac(gateway_side)?)
        .payload_of(&payload())
        .build();
    let (near_end, far_end) = (Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(198, 51, 100, 2));
    let outer = |source: Ipv4Addr, destination: Ipv4Addr, link: (Mac, Mac), inner: (Mac, Mac)| Outer {
        source_mac: link.0,
        destination_mac: link.1,
        source: source.into(),
        destination: destination.into(),
        ttl: 64,
        tos: 0,
        identification: 0,
        fragment: 0x4000,
        flow_label: 0,
        limit: None,
        carrier: Carrier::Udp {
            ports: (55_555, VXLAN_PORT),
            has_checksum: false,
            header: vxlan(VNI),
        },
        inner_link: Some(inner),
    };
    let devices = [(&site.far_router, site.tunnel), (&site.gateway, site.tunnel)];
    let inner_link = (mac(devices[0])?, mac(devices[1])?);
    let tunnelled_len = outer(near_end, far_end, inner_link, inner_link)
        .around(&request)
        .len();
    let mut requests = OneWay::new(
        object,
        client_side,
        far,
        request.clone(),
        1,
        wanted(tunnelled_len, POOLS, *backend.ip()),
    )?;
    requests.warm_up(1)?;
    let binding = requests.seen()?.source;
    let reply = Builder::udp(backend, binding).payload_of(&payload()).build();
    let frame = outer(far_end, near_end, (mac(far)?, mac(near)?), inner_link).around(&reply);
    let mut replies = OneWay::new(
        object,
        far,
        client_side,
        frame,
        1,
        wanted(request.len(), (*vip.ip()).into(), *client.ip()),
    )?;
    replies.warm_up(1)?;
    Ok(Candidate {
        who,
        requests,
        replies,
        _agent: agent,
        _site: Some(site),
        _lab: None,
    })
}

fn wanted(len: usize, source: Ipv4Net, destination: Ipv4Addr) -> Wanted {
    Wanted {
        len,
        source,
        destination: destination.into(),
    }
}

/// The same by the kernel's own means.
fn nftables(site: &Site, vip: SocketAddrV4, backend: SocketAddrV4) -> Result<()> {
    let script = format!(
        "table ip nat {{
            chain inbound {{
                type nat hook prerouting priority dstnat;
                ip daddr {} udp dport {} dnat to {backend}
            }}
            chain outbound {{
                type nat hook postrouting priority srcnat;
                oifname {} snat to {NFT_POOL}
            }}
        }}",
        vip.ip(),
        vip.port(),
        site.tunnel,
    );
    site.gateway.run_with_input("nft -f -", Some(&script))?;
    for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        site.gateway.sysctl(&format!("net/netfilter/{key}"), "3600")?;
    }
    Ok(())
}
