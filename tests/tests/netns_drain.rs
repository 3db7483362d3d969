//! Ring 3: backends leave and return while traffic goes on: by order, by failure, slowly.
//! `--test-threads=1`, as the other labs.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddrV4, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    crowd::{Clients, Servers},
    load::{Connections, wrk},
    status::{BackendStatus, HEALTHY},
    topology::{Extras, PORT, Site},
    udp::{Client, EchoServer},
    wait_until,
};
use nix::sys::signal::Signal;

const GROUP: &str = "web";
const CROWD: &str = env!("CARGO_BIN_EXE_crowd");
const CROWD_PORT: u16 = 9000;
/// Connections that are open while their backend drains.
const CROWD_SIZE: usize = 10_000;
const UDP_PORT: u16 = 5353;
/// Patience with slow machines; nothing takes so long.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `test` at a site with two servers beside the gateway and two behind the tunnel.
fn play(
    configure: impl FnOnce(&Site) -> Result<Configuration>,
    test: impl FnOnce(&mut Site, Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let extras = Extras {
        second_servers: true,
        ..Extras::default()
    };
    let mut site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let configuration = configure(&site)?;
    let agent = site.start_agent(&configuration, GROUP)?;
    test(&mut site, agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A group `web` of ECS01 and ECS03 with these keys, and a listener for it.
fn two_servers(site: &Site, keys: &[(&str, &str)]) -> Result<Configuration> {
    let configuration = group(site, site.configuration(&[]), GROUP, PORT, Check::Http, keys)?;
    Ok(configuration.listener(GROUP, site.vip, PORT, "tcp", GROUP))
}

/// Adds a group of ECS01 and ECS03 on a port.
fn group(
    site: &Site,
    configuration: Configuration,
    name: &str,
    port: u16,
    check: Check,
    keys: &[(&str, &str)],
) -> Result<Configuration> {
    let configuration = configuration.group(name, "full", check);
    let mut configuration = with_keys(&configuration, &format!("group.{name}"), keys);
    for server in ["ecs01", "ecs03"] {
        configuration = configuration.backend(name, server, site.server(server)?.address, port, 100);
    }
    Ok(configuration)
}

/// Adds keys to a table.
fn with_keys(configuration: &Configuration, table: &str, keys: &[(&str, &str)]) -> Configuration {
    let header = format!("[{table}]\n");
    let keys: String = keys
        .iter()
        .map(|(key, value)| format!("{key} = {value}\n"))
        .collect();
    Configuration::from_text(
        configuration
            .to_string()
            .replace(&header, &format!("{header}{keys}")),
    )
}

/// Runs a verb with `-o json` and reads what it says.
fn order(agent: &Agent, verb: &str, arguments: &[&str]) -> Result<BackendStatus> {
    let output = agent.ask(verb, &[arguments, &["-o", "json"]].concat())?;
    ensure!(
        output.status.success(),
        "{verb} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A connection that the server answers on; returns the server's name with it.
fn connect(site: &Site) -> Result<(TcpStream, &'static str)> {
    let mut stream = site.client().inside(|| TcpStream::connect((site.vip, PORT)))??;
    stream.set_read_timeout(Some(DEADLINE))?;
    let page = get(&mut stream)?;
    let server = site.servers.iter().find(|server| page.contains(&server.page));
    Ok((
        stream,
        server.with_context(|| format!("a page of nobody: {page}"))?.name,
    ))
}

/// A connection to this server.
fn connect_to(site: &Site, name: &str) -> Result<TcpStream> {
    let found = wait_until("a connection to the server", DEADLINE, || {
        let (stream, found) = connect(site)?;
        ensure!(found == name, "{found}");
        Ok(stream)
    })?;
    Ok(found.0)
}

/// One request on a connection.
fn get(stream: &mut TcpStream) -> Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer)?;
    ensure!(length > 0, "the connection was closed");
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Awaits the end of a connection, which has to be a reset.
fn await_reset(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = [0; 64];
    match stream.read(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => anyhow::bail!("no reset, but {other:?}"),
    }
}

fn await_health(agent: &Agent, group: &str, backend: &str, health: &str) -> Result<()> {
    wait_until(&format!("{backend} to be {health}"), DEADLINE, || {
        let found = agent.backend(group, backend)?;
        ensure!(found.health == health, "{found:?}");
        Ok(())
    })
    .map(drop)
}

#[test]
fn draining_under_load_breaks_no_connection_and_fails_no_request() -> Result<()> {
    play(
        |site| {
            let configuration = two_servers(site, &[])?;
            let configuration = group(site, configuration, "crowd", CROWD_PORT, Check::None, &[])?;
            let text = configuration
                .listener("crowd", site.vip, CROWD_PORT, "tcp", "crowd")
                .to_string();
            // They are silent while the others have their turn.
            Ok(Configuration::from_text(text.replace("\"10s\"", "\"1000s\"")))
        },
        |site, agent| {
            let client = site.client();
            client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
            client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            let start = |name: &str, identity| {
                let server = site.server(name)?;
                let address = SocketAddrV4::new(server.address, CROWD_PORT);
                Servers::start(Path::new(CROWD), &server.namespace, address, identity, CROWD_SIZE)
            };
            let _servers = [start("ecs01", 1)?, start("ecs03", 2)?];
            let address = site.client_address()?;
            let vip = SocketAddrV4::new(site.vip, CROWD_PORT);
            let mut clients = Clients::start(Path::new(CROWD), client, vip, &[address], CROWD_SIZE + 500)?;
            clients.open(CROWD_SIZE)?.ensure_all(CROWD_SIZE)?;
            clients.talk()?.ensure_all(CROWD_SIZE)?;

            let (drained, load) = thread::scope(|scope| {
                let load = scope.spawn(|| {
                    wrk(
                        client,
                        site.vip,
                        PORT,
                        Connections::PerRequest,
                        16,
                        Duration::from_secs(15),
                    )
                });
                let drained = (|| {
                    wait_until("load", DEADLINE, || {
                        let opened = agent.backend(GROUP, "ecs01")?.traffic.connections_opened;
                        ensure!(opened > 100, "{opened}");
                        Ok(())
                    })?;
                    order(&agent, "drain", &["web/ecs01"])?;
                    order(&agent, "drain", &["crowd/ecs01"])
                })();
                (drained, load.join())
            });
            let drained = drained?;
            let load = load.map_err(|_| anyhow::anyhow!("wrk's thread panicked"))??;
            println!("{load:?}");
            ensure!(
                load.requests > 0 && load.socket_errors == 0 && load.refused == 0,
                "requests failed: {load:?}"
            );
            assert_eq!((drained.health.as_str(), drained.share), (HEALTHY, 0.0));
            let opened = agent.backend("crowd", "ecs01")?.traffic.connections_opened;
            clients.open(500)?.ensure_all(500)?;
            clients.talk()?.ensure_all(CROWD_SIZE + 500)?;
            wait_until("the flows to be counted", DEADLINE, || {
                let backend = agent.backend("crowd", "ecs01")?;
                assert_eq!(backend.traffic.connections_opened, opened, "a new flow");
                let drain = backend.drain.context("it drains")?;
                ensure!(drain.flows_left == opened && !drain.is_done, "{drain:?}");
                Ok(())
            })?;

            clients.close(CROWD_SIZE + 500)?;
            for backend in ["web/ecs01", "crowd/ecs01"] {
                // Waits for the end by itself.
                let drained = order(&agent, "drain", &[backend, "--wait", "--timeout", "30s"])?;
                ensure!(drained.drain.is_some_and(|drain| drain.is_done), "{backend}");
            }
            let log = std::fs::read_to_string(agent.log())?;
            assert_eq!(log.matches("drained: it has no flows any more").count(), 2);
            assert_eq!(agent.backend(GROUP, "ecs01")?.traffic.gateway_resets, 0);

            order(&agent, "undrain", &["crowd/ecs01"])?;
            clients.open(200)?.ensure_all(200)?;
            ensure!(agent.backend("crowd", "ecs01")?.traffic.connections_opened > opened);
            Ok(())
        },
    )
}

#[test]
fn orders_are_told_apart_survive_restarts_and_end_what_takes_too_long() -> Result<()> {
    play(
        |site| two_servers(site, &[]),
        |site, agent| {
            let mut kept = connect_to(site, "ecs01")?;
            for (arguments, code) in [
                (&["nobody/ecs01"][..], 2),
                (&["web/nobody"], 2),
                (&["web"], 2),
                (&["web/ecs01", "--timeout", "5"], 2),
            ] {
                let output = agent.ask("drain", arguments)?;
                assert_eq!(output.status.code(), Some(code), "{arguments:?}");
            }
            order(&agent, "weight", &["web/ecs03", "0"])?;
            order(&agent, "weight", &["web/ecs03", "300"])?;
            let share = agent.backend(GROUP, "ecs03")?.share;
            ensure!((share - 0.75).abs() < 0.01, "{share}");
            order(&agent, "drain", &["web/ecs01"])?;
            for _ in 0..20 {
                assert_eq!(connect(site)?.1, "ecs03");
            }

            // The next agent finds the orders, whatever ended this one.
            agent.end(Signal::SIGKILL)?;
            let agent = site.start_agent(&two_servers(site, &[])?, GROUP)?;
            let check = |agent: &Agent| -> Result<()> {
                let drained = agent.backend(GROUP, "ecs01")?;
                assert_eq!(drained.drain.context("it drains")?.by, "order");
                assert_eq!(drained.share, 0.0);
                assert_eq!(agent.backend(GROUP, "ecs03")?.ordered_weight, Some(300));
                Ok(())
            };
            check(&agent)?;
            get(&mut kept)?;
            // Nor does another configuration change them.
            agent.rewrite(&two_servers(
                site,
                &[("on_unhealthy", "\"keep\""), ("slow_start", "\"0s\"")],
            )?)?;
            agent.signal(Signal::SIGHUP);
            wait_until("the reload", DEADLINE, || {
                ensure!(std::fs::read_to_string(agent.log())?.contains("configuration applied"));
                Ok(())
            })?;
            check(&agent)?;
            get(&mut kept)?;

            // Its time is over: both ends are told.
            let drained = order(&agent, "drain", &["web/ecs01", "--timeout", "1s", "--wait"])?;
            ensure!(drained.drain.is_some_and(|drain| drain.is_done));
            assert_eq!(drained.flows_ended.drained, 1);
            await_reset(&mut kept)?;

            order(&agent, "weight", &["web/ecs03", "--reset"])?;
            let undrained = order(&agent, "undrain", &["web/ecs01"])?;
            ensure!((undrained.share - 0.5).abs() < 0.01 && undrained.drain.is_none());
            // In the end it is in no record either.
            agent.end(Signal::SIGKILL)?;
            let agent = site.start_agent(&two_servers(site, &[])?, GROUP)?;
            assert_eq!(agent.backend(GROUP, "ecs01")?.drain, None);
            assert_eq!(agent.backend(GROUP, "ecs03")?.ordered_weight, None);
            Ok(())
        },
    )
}

#[test]
fn connections_of_a_failed_backend_are_reset_if_its_group_says_so() -> Result<()> {
    play(
        |site| two_servers(site, &[("on_unhealthy", "\"reset\"")]),
        |site, agent| {
            let mut lost = connect_to(site, "ecs01")?;
            let mut kept = connect_to(site, "ecs03")?;
            site.server("ecs01")?.namespace.black_hole()?;
            // With a request under way that nobody will answer.
            lost.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
            await_reset(&mut lost)?;
            // The client is served at once when it tries again.
            assert_eq!(connect(site)?.1, "ecs03");
            get(&mut kept)?;
            await_health(&agent, GROUP, "ecs01", "unhealthy")?;
            let ended = agent.backend(GROUP, "ecs01")?.flows_ended;
            ensure!(ended.reset >= 1 && ended.rehashed == 0, "{ended:?}");
            Ok(())
        },
    )
}

#[test]
fn udp_flows_of_a_failed_backend_move_if_its_group_says_so() -> Result<()> {
    play(
        |site| {
            let keys = [("on_unhealthy", "\"rehash\"")];
            let configuration = two_servers(site, &keys)?;
            let configuration = group(site, configuration, "echo", UDP_PORT, Check::Tcp, &keys)?;
            let text = configuration
                .listener("echo", site.vip, UDP_PORT, "udp", "echo")
                .to_string();
            // The echo server is as well as the web server beside it. Its flows outlive the test.
            let header = "[group.echo.health]\n";
            let text = text.replace(header, &format!("{header}port = {PORT}\n"));
            Ok(Configuration::from_text(text.replace("\"10s\"", "\"300s\"")))
        },
        |site, agent| {
            await_health(&agent, "echo", "ecs01", HEALTHY)?;
            await_health(&agent, "echo", "ecs03", HEALTHY)?;
            let _servers = [
                EchoServer::start(&site.server("ecs01")?.namespace, UDP_PORT)?,
                EchoServer::start(&site.server("ecs03")?.namespace, UDP_PORT)?,
            ];
            let vip = SocketAddrV4::new(site.vip, UDP_PORT);
            let (client, _) = wait_until("a flow to ECS01", DEADLINE, || {
                let client = Client::open(site.client(), 0)?;
                let server = client.ask("first", vip)?;
                ensure!(server == "ecs01", "{server}");
                Ok(client)
            })?;
            let mut kept = connect_to(site, "ecs01")?;
            site.server("ecs01")?.namespace.black_hole()?;
            wait_until("the flow to move", DEADLINE, || {
                let server = client.ask("again", vip)?;
                ensure!(server == "ecs03", "{server}");
                Ok(())
            })?;
            ensure!(agent.backend("echo", "ecs01")?.flows_ended.rehashed >= 1);
            // An established connection can go nowhere else; it waits for its server.
            await_health(&agent, GROUP, "ecs01", "unhealthy")?;
            site.server("ecs01")?.namespace.revive()?;
            get(&mut kept)?;
            Ok(())
        },
    )
}

#[test]
fn a_backend_that_returns_takes_its_share_over_time() -> Result<()> {
    play(
        |site| two_servers(site, &[("slow_start", "\"20s\"")]),
        |site, agent| {
            // Those that were there from the start have all of theirs.
            let share = agent.backend(GROUP, "ecs03")?.share;
            ensure!((share - 0.5).abs() < 0.01, "{share}");
            site.stop_nginx("ecs03")?;
            await_health(&agent, GROUP, "ecs03", "unhealthy")?;
            site.start_nginx("ecs03")?;
            await_health(&agent, GROUP, "ecs03", HEALTHY)?;
            let mut shares = Vec::new();
            wait_until("the whole share", DEADLINE, || {
                let share = agent.backend(GROUP, "ecs03")?.share;
                if shares.last() != Some(&share) {
                    shares.push(share);
                }
                ensure!((share - 0.5).abs() < 0.01, "{share}");
                Ok(())
            })?;
            println!("{shares:?}");
            ensure!(shares.is_sorted(), "{shares:?}");
            let steps = shares.iter().filter(|share| **share > 0.0 && **share < 0.49);
            ensure!(steps.count() >= 2, "{shares:?}");
            // An order counts at once, and the return from it is slow again.
            order(&agent, "drain", &["web/ecs03"])?;
            assert_eq!(agent.backend(GROUP, "ecs03")?.share, 0.0);
            let returned = order(&agent, "undrain", &["web/ecs03"])?;
            ensure!(
                returned.share < 0.25 && returned.slow_start_percent.is_some(),
                "{returned:?}"
            );
            Ok(())
        },
    )
}

/// As [`two_servers`], with ECS02 behind them and ECS04 in a group of its own that backs them up.
fn with_tiers(site: &Site, keys: &[(&str, &str)], nearest: &[(&str, &str)]) -> Result<Configuration> {
    let mut configuration = two_servers(site, &[&[("backup", "\"far\"")], keys].concat())?;
    for server in ["ecs01", "ecs03"] {
        configuration = with_keys(&configuration, &format!("group.web.backend.{server}"), nearest);
    }
    let address = |name| Ok::<_, anyhow::Error>(site.server(name)?.address);
    configuration = configuration.backend(GROUP, "ecs02", address("ecs02")?, PORT, 100);
    configuration = with_keys(&configuration, "group.web.backend.ecs02", &[("tier", "1")]);
    let configuration = configuration.group("far", "full", Check::Http);
    Ok(configuration.backend("far", "ecs04", address("ecs04")?, PORT, 100))
}

#[test]
fn farther_tiers_and_a_backup_group_step_in_when_too_few_are_left() -> Result<()> {
    play(
        |site| with_tiers(site, &[("min_healthy_percent", "60")], &[]),
        |site, agent| {
            await_health(&agent, "far", "ecs04", HEALTHY)?;
            // All, half, a quarter in the second tier, none but the backup.
            for (stopped, serving) in [
                (None, &["ecs01", "ecs03"][..]),
                (Some("ecs03"), &["ecs01", "ecs02"]),
                (Some("ecs01"), &["ecs02", "ecs04"]),
                (Some("ecs02"), &["ecs04"]),
            ] {
                if let Some(stopped) = stopped {
                    site.stop_nginx(stopped)?;
                    await_health(&agent, GROUP, stopped, "unhealthy")?;
                }
                let mut seen = std::collections::BTreeSet::new();
                wait_until("all that serve to be seen", DEADLINE, || {
                    let (_, name) = connect(site)?;
                    assert!(serving.contains(&name), "{name} is not one of {serving:?}");
                    seen.insert(name);
                    ensure!(seen.len() == serving.len(), "{seen:?} of {serving:?}");
                    Ok(())
                })?;
            }
            site.start_nginx("ecs01")?;
            site.start_nginx("ecs03")?;
            await_health(&agent, GROUP, "ecs01", HEALTHY)?;
            await_health(&agent, GROUP, "ecs03", HEALTHY)?;
            for _ in 0..20 {
                let name = connect(site)?.1;
                ensure!(["ecs01", "ecs03"].contains(&name), "{name}");
            }
            Ok(())
        },
    )
}

#[test]
fn a_tier_without_room_overflows_into_the_next() -> Result<()> {
    play(
        |site| with_tiers(site, &[], &[("max_flows", "1")]),
        |site, _agent| {
            let mut kept = Vec::new();
            for _ in 0..3 {
                kept.push(connect(site)?);
            }
            let mut names: Vec<_> = kept.iter().map(|(_, name)| *name).collect();
            assert_eq!(names.pop(), Some("ecs02"));
            names.sort_unstable();
            assert_eq!(names, ["ecs01", "ecs03"]);
            Ok(())
        },
    )
}
