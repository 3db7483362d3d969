//! Ring 3: fragments of real datagrams, in order and out of it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::{
    lab::{
        self, Lifetime, Namespace,
        agent::{self, Agent, ShowLog},
        configuration::{Check, Configuration},
        topology::{Extras, Site},
        udp::{Client, EchoServer},
    },
    packet::{Builder, ETHERNET_LEN, with_ipv4_header},
};
use socket2::{Domain, Protocol, Socket, Type};

const UDP_PORT: u16 = 5353;
/// More than a frame takes, so that answers are fragments too.
const PAYLOAD: usize = 1800;

fn configuration(site: &Site) -> Result<Configuration> {
    let mut configuration = site.configuration(&[]).group("echo", "full", Check::None);
    for name in ["ecs01", "ecs02"] {
        configuration = configuration.backend("echo", name, site.server(name)?.address, UDP_PORT, 100);
    }
    Ok(configuration.listener("echo", site.vip, UDP_PORT, "udp", "echo"))
}

fn play(test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configuration(&site)?, "echo")?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A datagram's fragments of 600 bytes, as IP packets.
fn fragments(source: SocketAddrV4, destination: SocketAddrV4, identification: u16) -> Vec<Vec<u8>> {
    let frame = Builder::udp(source, destination).payload(PAYLOAD).build();
    let (header, payload) = frame.split_at(ETHERNET_LEN + 20);
    let count = payload.len().div_ceil(600);
    payload
        .chunks(600)
        .enumerate()
        .map(|(index, part)| {
            let more = if index + 1 < count { 0x2000 } else { 0 };
            let field = more | (index * 600 / 8) as u16;
            with_ipv4_header(header, identification, field, part)[ETHERNET_LEN..].to_vec()
        })
        .collect()
}

/// A socket whose sender writes the IP header.
fn raw_socket(namespace: &Namespace) -> Result<Socket> {
    namespace
        .inside(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))))?
        .context("a raw socket")
}

fn address_of(namespace: &Namespace) -> Result<Ipv4Addr> {
    let text = namespace.run("ip -4 -o address show scope global")?;
    let address = text.split_whitespace().nth(3).context("no address")?;
    let (address, _) = address.split_once('/').context("no prefix")?;
    Ok(address.parse()?)
}

#[test]
fn fragments_arrive_in_any_order() -> Result<()> {
    play(|site, agent| {
        let _servers = [
            EchoServer::start(&site.server("ecs01")?.namespace, UDP_PORT)?,
            EchoServer::start(&site.server("ecs02")?.namespace, UDP_PORT)?,
        ];
        let vip = SocketAddrV4::new(site.vip, UDP_PORT);
        let to = SocketAddr::from(vip).into();
        let raw = raw_socket(site.client())?;
        let source = address_of(site.client())?;
        let mut answered_by = [0; 2];
        // Several flows of each order, so that both servers, beside the gateway and behind the tunnel, have some.
        for (number, order) in [[0, 1, 2, 3], [3, 0, 1, 2], [3, 2, 1, 0], [1, 0, 3, 2]]
            .into_iter()
            .cycle()
            .take(32)
            .enumerate()
        {
            let client = Client::open(site.client(), 42_000 + number as u16)?;
            let parts = fragments(
                SocketAddrV4::new(source, client.port()?),
                vip,
                1000 + number as u16,
            );
            ensure!(parts.len() == 4, "{} fragments", parts.len());
            for index in order {
                raw.send_to(&parts[index], &to)?;
            }
            let (answer, from) = client
                .receive()?
                .with_context(|| format!("no answer to fragments in the order {order:?}"))?;
            ensure!(from == vip, "{from} answered");
            let server = usize::from(answer.starts_with("ecs02 "));
            ensure!(answer.len() > PAYLOAD, "{} bytes came back", answer.len());
            answered_by[server] += 1;
        }
        println!("{answered_by:?} answers");
        ensure!(answered_by.iter().all(|count| *count > 0), "{answered_by:?}");
        let held = agent.packets("fragment_held")?;
        ensure!(held > 0, "no fragment came too early");
        Ok(())
    })
}
