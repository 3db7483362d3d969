//! Ring 3: clients of one family, servers of the other (RFC 7915), beside the gateway and behind its tunnel: transfers,
//! datagrams in fragments, and what is heard of narrow links and distant routers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    crossing::{Mode, await_mode, download, in_mode, transfer, upload},
    dual_stack::{self, LOCAL_V6, REMOTE_V6, VIP_V6},
    topology::{Extras, PORT, Site},
    udp::{Client, EchoServer},
};

const UDP_PORT: u16 = 5353;
/// Sent in either direction: hundreds of windows.
const LENGTH_BYTES: u32 = 4_000_000;
/// What the link behind the tunnel takes, of which nobody is told but by ICMP.
const NARROW_BYTES: u16 = 1400;
/// By how much IPv6's header is longer.
const DIFFERENCE_BYTES: u16 = 20;

/// Whose family is which, and where the server is.
#[derive(Clone, Copy, Debug)]
struct Way {
    is_client_v4: bool,
    server: &'static str,
    mode: Mode,
}

const LOCAL: [Way; 2] = [
    way(true, "ecs01", Mode::Kernel),
    way(false, "ecs01", Mode::Kernel),
];
const REMOTE: [Way; 4] = [
    way(true, "ecs02", Mode::Kernel),
    way(false, "ecs02", Mode::Kernel),
    way(true, "ecs02", Mode::Native),
    way(false, "ecs02", Mode::Native),
];

const fn way(is_client_v4: bool, server: &'static str, mode: Mode) -> Way {
    Way {
        is_client_v4,
        server,
        mode,
    }
}

impl Way {
    fn is_remote(self) -> bool {
        self.server == "ecs02"
    }

    fn vip(self, site: &Site) -> IpAddr {
        if self.is_client_v4 {
            site.vip.into()
        } else {
            VIP_V6.into()
        }
    }

    /// Any address in the family of the client's, or of the server's.
    const fn any(is_v4: bool) -> IpAddr {
        if is_v4 {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        } else {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        }
    }

    fn configuration(self, site: &Site, clamp: bool) -> Result<Configuration> {
        let vip = self.vip(site);
        let address: IpAddr = match (self.is_client_v4, self.is_remote()) {
            (false, _) => site.server(self.server)?.address.into(),
            (true, false) => LOCAL_V6.into(),
            (true, true) => REMOTE_V6.into(),
        };
        let quoted = |text: IpAddr| format!("\"{text}\"");
        let configuration = dual_stack::configuration(site)
            .group("web", "full", Check::Http)
            .backend("web", self.server, address, PORT, 1)
            .listener("web", vip, PORT, "tcp", "web")
            .group("echo", "full", Check::None)
            .backend("echo", self.server, address, UDP_PORT, 1)
            .listener("echo", vip, UDP_PORT, "udp", "echo")
            .group("ping", "full", Check::None)
            .table("group.ping.backend.server", &[("address", &quoted(address))])
            .table(
                "listener.ping",
                &[
                    ("vip", &quoted(vip)),
                    ("protocol", "\"icmp\""),
                    ("group", "\"ping\""),
                ],
            );
        let configuration = in_mode(configuration, self.mode);
        Ok(if clamp {
            configuration
        } else {
            configuration.agent_key("mss_clamp", "false")
        })
    }
}

/// Runs `test` at a site of its own for each way. `clamp`: announced segment sizes are lowered to what is known.
fn play(
    ways: impl IntoIterator<Item = Way>,
    clamp: bool,
    prepare: impl Fn(&Site) -> Result<()>,
    test: impl Fn(Way, &Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    for way in ways {
        let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
        dual_stack::add(&site)?;
        site.front = way.vip(&site);
        prepare(&site)?;
        let show_log = ShowLog::of(&site.lab);
        let agent = site.start_agent(&way.configuration(&site, clamp)?, "web")?;
        await_mode(&agent, way.mode)?;
        if let Err(error) = test(way, &site, &agent) {
            let reasons = agent.status()?.reasons;
            let used = reasons.iter().filter(|reason| reason.packets > 0);
            let used: Vec<_> = used
                .map(|reason| format!("{} {}", reason.name, reason.packets))
                .collect();
            return Err(error.context(format!("{way:?}: {used:?}")));
        }
        show_log.all_is_well();
    }
    Ok(())
}

fn as_it_is(_: &Site) -> Result<()> {
    Ok(())
}

#[test]
fn transfers_arrive_as_they_were() -> Result<()> {
    play(LOCAL.into_iter().chain(REMOTE), true, as_it_is, |way, site, _| {
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            let server = site.server(way.server)?;
            let transferred = transfer(site, site.client(), server, LENGTH_BYTES)
                .with_context(|| format!("checksum offload {offload}"))?;
            println!("{way:?}, checksum offload {offload}: {transferred}");
        }
        Ok(())
    })
}

/// What is no connection. Both ends send more than a frame takes. Of what comes from IPv4, first fragments fill a link of 1500 bytes, and
/// their header gets longer by 28: the agent cuts them.
#[test]
fn fragmented_datagrams_and_pings_arrive_as_they_were() -> Result<()> {
    play(
        LOCAL.into_iter().chain(REMOTE),
        true,
        as_it_is,
        |way, site, agent| {
            let server = site.server(way.server)?;
            let _echo = EchoServer::start_on(&server.namespace, Way::any(!way.is_client_v4), UDP_PORT)?;
            let to = SocketAddr::new(way.vip(site), UDP_PORT);
            // Of 1473, the last fragment has a single byte.
            for length in [1, 1400, 1473, 1800, 1990] {
                let client = Client::open_on(site.client(), Way::any(way.is_client_v4), 0)?;
                let payload: String = ('a'..='z').cycle().take(length).collect();
                // Twice: the first may be answered by what the path takes.
                let name = client.ask(&payload, to).or_else(|_| client.ask(&payload, to));
                let name = name.with_context(|| format!("{length} bytes"))?;
                ensure!(name == server.namespace.role(), "{name} answered");
            }
            if way.is_remote() {
                return hear_of_the_distant_router(way, site);
            }
            let cut = agent.packets("fragmented")?;
            ensure!(cut > 0, "the agent has cut nothing");
            Ok(())
        },
    )
}

/// The link behind the tunnel is narrower than all else, and a client learns of it by ICMP alone, in its own family.
#[test]
fn requests_shrink_to_a_narrow_link_by_icmp_alone() -> Result<()> {
    let narrow = |site: &Site| {
        let line = format!("ip link set eth1 mtu {NARROW_BYTES}");
        site.far_router.run(&line).map(drop)
    };
    play(REMOTE, false, narrow, |way, site, _| {
        upload(site, site.client(), site.server(way.server)?, LENGTH_BYTES)?;
        let expected = if way.is_client_v4 {
            NARROW_BYTES - DIFFERENCE_BYTES
        } else {
            NARROW_BYTES + DIFFERENCE_BYTES
        };
        let learned = learned_mtu(site.client(), way.vip(site))?;
        ensure!(learned == Some(expected), "learned {learned:?}");
        Ok(())
    })
}

/// The client's link is narrow, and the server learns of it from the gateway.
#[test]
fn replies_shrink_to_the_clients_link_by_icmp_alone() -> Result<()> {
    let narrow = |site: &Site| {
        let line = format!("ip link set eth0 mtu {NARROW_BYTES}");
        site.gateway.run(&line).map(drop)
    };
    play(
        LOCAL.into_iter().chain([REMOTE[2]]),
        false,
        narrow,
        |way, site, _| {
            download(site, site.client(), site.server(way.server)?, LENGTH_BYTES)?;
            Ok(())
        },
    )
}

/// The far router reports in the server's family; the client hears of it in its own, from the VIP.
fn hear_of_the_distant_router(way: Way, site: &Site) -> Result<()> {
    let vip = way.vip(site);
    let ping = |hops: &str| -> Result<String> {
        let text = vip.to_string();
        let arguments = ["-c", "1", "-W", "2", "-t", hops, &text];
        let output = site.client().output("ping", &arguments)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for hops in ["1", "2"] {
        let said = ping(hops)?;
        ensure!(
            said.contains(&format!("From {vip}"))
                && (said.contains("Time to live exceeded") || said.contains("Hop limit")),
            "{hops} hops: {said}"
        );
    }
    let said = ping("3")?;
    ensure!(said.contains("1 received"), "{said}");
    Ok(())
}

/// What a host has learned of the path to an address, in bytes; `None`: nothing.
fn learned_mtu(host: &Namespace, destination: IpAddr) -> Result<Option<u16>> {
    let route = host.run(&format!("ip route get {destination}"))?;
    let mtu = route.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    mtu.map(|mtu| mtu.parse().with_context(|| route.clone()))
        .transpose()
}
