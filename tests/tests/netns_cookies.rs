//! Ring 3: listeners that answer SYNs with cookies, with real clients and servers, floods and losses; and rates of
//! sources.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use forwarder_tests::{
    lab::{
        Namespace,
        agent::Agent,
        configuration::{Check, Configuration},
        dual_stack::{self, CLIENT_V6, LOCAL_V6, REMOTE_V6, VIP_V6, play},
        load::curl,
        topology::{PORT, Site},
    },
    packet::{Builder, ETHERNET_LEN, segment},
};
use forwarder_user::network::raw::RawSockets;
use nix::sys::signal::Signal;

/// The port of the server that speaks first.
const GREETER_PORT: u16 = 2525;
const GREETING: &[u8] = b"220 ready\r\n";
/// What goes each way.
const TRANSFER_BYTES: usize = 50_000_000;
const TRANSFER_DEADLINE: Duration = Duration::from_secs(90);
/// For what is repeated after 1, 3 and 7 s if it is lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long SYNs pour in.
const FLOOD: Duration = Duration::from_secs(4);

/// The servers' web pages, and the first of `greeters` behind another port.
fn configuration(site: &Site, greeter: &str, keys: &str) -> Result<Configuration> {
    let configuration = site
        .web_configuration()
        .group("greeter", "full", Check::None)
        .backend("greeter", greeter, site.server(greeter)?.address, GREETER_PORT, 1)
        .listener("greeter", site.vip, GREETER_PORT, "tcp", "greeter");
    Ok(with_keys(&configuration, keys))
}

/// With these keys in every listener.
fn with_keys(configuration: &Configuration, keys: &str) -> Configuration {
    let last = "idle_timeout = \"10s\"";
    Configuration::from_text(
        configuration
            .to_string()
            .replace(last, &format!("{last}\n{keys}")),
    )
}

/// What a listener has counted of something.
fn counted(agent: &Agent, listener: &str, what: &str) -> Result<u64> {
    let status = serde_json::to_value(agent.status()?)?;
    let listeners = status["listeners"].as_array().context("listeners")?;
    let found = listeners.iter().find(|one| one["name"] == listener);
    found
        .and_then(|one| one[what].as_u64())
        .with_context(|| format!("{listener} counts no {what}"))
}

/// Bytes without a pattern that repeats within a segment.
fn content(seed: u32) -> Vec<u8> {
    (0..TRANSFER_BYTES as u32 / 4)
        .flat_map(|word| (word ^ seed).wrapping_mul(0x9E37_79B1).to_be_bytes())
        .collect()
}

/// A client is greeted, sends a lot and gets as much back; all must arrive whole. `meanwhile` runs on the way.
fn greeted(site: &Site, server: &Namespace, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let (up, down) = (content(1), content(2));
    let listener = server.inside(|| TcpListener::bind(("0.0.0.0", GREETER_PORT)))??;
    thread::scope(|scope| {
        let served = scope.spawn(|| -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
            stream.write_all(GREETING)?;
            let mut got = vec![0; up.len()];
            stream.read_exact(&mut got).context("the server reads")?;
            ensure!(got == up, "other bytes arrived at the server");
            stream.write_all(&down).context("the server writes")?;
            Ok(())
        });
        let address = SocketAddrV4::new(site.vip, GREETER_PORT).into();
        let mut stream = site
            .client()
            .inside(|| TcpStream::connect_timeout(&address, PATIENCE))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(TRANSFER_DEADLINE))?;
        // The client says nothing before.
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting).context("no greeting")?;
        ensure!(greeting == GREETING, "{greeting:?}");
        stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
        stream
            .write_all(&up[..TRANSFER_BYTES / 10])
            .context("the client writes")?;
        meanwhile()?;
        stream
            .write_all(&up[TRANSFER_BYTES / 10..])
            .context("the client writes")?;
        let mut got = vec![0; down.len()];
        stream.read_exact(&mut got).context("the client reads")?;
        ensure!(got == down, "other bytes arrived at the client");
        served.join().map_err(|_| anyhow!("the server panicked"))?
    })
}

/// One segment of TCP in a hundred is lost on its way into this host.
fn lose_some(namespace: &Namespace) -> Result<()> {
    namespace.run("nft add table inet losses")?;
    namespace.run_with_input(
        "nft -f -",
        Some(
            "add chain inet losses in { type filter hook input priority 0; }\n\
             add rule inet losses in tcp dport != 80 meta random < 42949672 counter drop\n",
        ),
    )?;
    Ok(())
}

fn is_by_cookie(agent: &Agent, listener: &str) -> Result<()> {
    let (sent, accepted) = (
        counted(agent, listener, "cookies_sent")?,
        counted(agent, listener, "cookies_accepted")?,
    );
    ensure!(
        sent >= accepted && accepted > 0,
        "{sent} cookies, {accepted} accepted"
    );
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard_and_all_arrives_through_losses() -> Result<()> {
    let configure = |site: &Site| configuration(site, "ecs01", "syn_cookies = \"always\"");
    play("web", configure, |site, agent| {
        let server = &site.server("ecs01")?.namespace;
        lose_some(site.client())?;
        lose_some(server)?;
        greeted(site, server, || Ok(()))?;
        let lost = server.run("nft list chain inet losses in")?;
        ensure!(!lost.contains("packets 0 "), "nothing was lost: {lost}");
        is_by_cookie(agent, "greeter")
    })
}

#[test]
fn a_server_that_speaks_first_is_heard_although_its_syn_was_lost() -> Result<()> {
    let configure = |site: &Site| configuration(site, "ecs01", "syn_cookies = \"always\"");
    play("web", configure, |site, agent| {
        let server = &site.server("ecs01")?.namespace;
        server.run("nft add table inet losses")?;
        // The first two.
        let rules = format!(
            "add chain inet losses in {{ type filter hook input priority 0; }}\n\
             add rule inet losses in tcp dport {GREETER_PORT} tcp flags syn numgen inc mod 1000000 < 2 counter drop\n"
        );
        server.run_with_input("nft -f -", Some(&rules))?;
        greeted(site, server, || Ok(()))?;
        let lost = server.run("nft list chain inet losses in")?;
        ensure!(lost.contains("packets 2 "), "{lost}");
        is_by_cookie(agent, "greeter")
    })
}

#[test]
fn so_is_one_behind_the_tunnel() -> Result<()> {
    let configure = |site: &Site| configuration(site, "ecs02", "syn_cookies = \"always\"");
    play("web", configure, |site, agent| {
        greeted(site, &site.server("ecs02")?.namespace, || Ok(()))?;
        is_by_cookie(agent, "greeter")
    })
}

#[test]
fn so_is_one_behind_a_native_tunnel() -> Result<()> {
    let configure = |site: &Site| {
        let text = configuration(site, "ecs02", "syn_cookies = \"always\"")?
            .interface("wan", &[])
            .to_string();
        Ok(Configuration::from_text(
            text.replace("mode = \"kernel\"", "mode = \"native\""),
        ))
    };
    play("web", configure, |site, agent| {
        greeted(site, &site.server("ecs02")?.namespace, || Ok(()))?;
        is_by_cookie(agent, "greeter")
    })
}

#[test]
fn an_upgrade_in_the_middle_loses_nothing() -> Result<()> {
    let configure = |site: &Site| configuration(site, "ecs01", "syn_cookies = \"always\"");
    play("web", configure, |site, agent| {
        let server = &site.server("ecs01")?.namespace;
        greeted(site, server, || {
            agent.end(Signal::SIGKILL)?;
            let again = site.start_agent(&configure(site)?, "web")?;
            // The key is the old one, or cookies under way would be lost.
            is_by_cookie(&again, "greeter")?;
            std::mem::forget(again);
            Ok(())
        })
    })
}

#[test]
fn pages_come_from_servers_of_both_families_and_sides() -> Result<()> {
    let configure = |site: &Site| {
        let configuration = dual_stack::configuration(site)
            .group("web", "full", Check::Http)
            .backend("web", "ecs01", LOCAL_V6, PORT, 100)
            .backend("web", "ecs02", REMOTE_V6, PORT, 100)
            .listener("web", VIP_V6, PORT, "tcp", "web")
            .listener("translated", site.vip, PORT, "tcp", "web");
        Ok(with_keys(&configuration, "syn_cookies = \"always\""))
    };
    play("web", configure, |site, agent| {
        for vip in [IpAddr::V6(VIP_V6), IpAddr::V4(site.vip)] {
            let mut sides = [0; 2];
            for _ in 0..30 {
                let answer = curl(site.client(), vip, PORT)?;
                let page = answer.body().with_context(|| format!("{answer:?}"))?;
                let server = site.answered_by(page).context("a page that nobody has")?;
                sides[usize::from(server.is_remote)] += 1;
            }
            ensure!(sides.iter().all(|count| *count > 0), "{sides:?}");
        }
        is_by_cookie(agent, "web")?;
        is_by_cookie(agent, "translated")?;
        let client = SocketAddr::from((CLIENT_V6, 41_000)).to_string();
        let vip = SocketAddr::from((VIP_V6, PORT)).to_string();
        let explained = agent.ask("explain", &["tcp", &client, &vip])?;
        let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
        ensure!(
            explained.contains("would answer it") && explained.contains("syn_cookie_sent"),
            "{explained}"
        );
        Ok(())
    })
}

/// Sends SYNs from forged clients until told to stop; how many.
fn flood(client: &Namespace, vip: SocketAddrV4, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    client.inside(|| -> Result<()> {
        let sockets = RawSockets::open("floods")?;
        let end = Instant::now() + 4 * FLOOD;
        for number in 0_u32.. {
            if stop.load(Ordering::Relaxed) || Instant::now() > end {
                break;
            }
            let source = SocketAddrV4::new(Ipv4Addr::from_bits(0x0a80_0000 + number % 0x40_0000), 1025);
            let packet = Builder::tcp(segment::SYN, source, vip).build();
            // A full queue only slows it down.
            if sockets.send(&packet[ETHERNET_LEN..], SocketAddr::V4(vip)).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    })?
}

#[test]
fn new_clients_get_in_through_a_flood() -> Result<()> {
    let configure = |site: &Site| {
        let configuration = configuration(site, "ecs01", "syn_cookies = 100")?;
        // Few flows, which a flood without cookies fills in no time.
        Ok(configuration.agent_key("max_flows", "2048"))
    };
    play("web", configure, |site, agent| {
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let vip = SocketAddrV4::new(site.vip, PORT);
        thread::scope(|scope| {
            let flooding = scope.spawn(|| flood(site.client(), vip, &stop, &sent));
            let begin = Instant::now();
            let mut pages = 0;
            let asked = (|| -> Result<()> {
                while begin.elapsed() < FLOOD {
                    let answer = site.curl()?;
                    ensure!(answer.body().is_some(), "after {pages} pages: {answer:?}");
                    pages += 1;
                }
                Ok(())
            })();
            stop.store(true, Ordering::Relaxed);
            flooding.join().map_err(|_| anyhow!("the flood panicked"))??;
            asked?;
            let (sent, cookies) = (
                sent.load(Ordering::Relaxed),
                counted(agent, "web", "cookies_sent")?,
            );
            println!("{sent} SYNs, {cookies} cookies, {pages} pages");
            ensure!(
                sent > 5_000 && cookies > sent / 2,
                "{sent} SYNs, {cookies} cookies"
            );
            ensure!(pages >= 10, "{pages} pages");
            is_by_cookie(agent, "web")
        })
    })
}

#[test]
fn clients_that_open_too_fast_have_to_wait() -> Result<()> {
    let keys = "source_rate = 5\nsource_burst = 10\nsource_prefix = 24";
    play(
        "web",
        |site| Ok(with_keys(&site.web_configuration(), keys)),
        |site, agent| {
            let vip = SocketAddr::from((site.vip, PORT));
            let begin = Instant::now();
            let mut opened = 0_u64;
            while begin.elapsed() < Duration::from_secs(3) {
                let connected = site
                    .client()
                    .inside(|| TcpStream::connect_timeout(&vip, Duration::from_millis(50)))?;
                opened += u64::from(connected.is_ok());
            }
            let limited = counted(agent, "web", "flows_limited")?;
            println!("{opened} opened, {limited} SYNs dropped");
            // A burst, and a second's more for each that begins.
            ensure!((10..=10 + 5 * 5).contains(&opened), "{opened} opened");
            ensure!(limited > 10, "{limited} dropped");
            ensure!(agent.packets("source_rate")? == limited);
            Ok(())
        },
    )
}
