//! Ring 3: what a listener, a group and a backend admit, limit, refuse and forget, on real links and sockets.
//! `--test-threads=1`, as the other labs.

use std::{
    fmt::Display,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    process::Output,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    load::KeptConnection,
    status::HEALTHY,
    topology::{Extras, PORT, Site},
    udp::{Client, EchoServer},
    wait_until,
};
use forwarder_user::status::Traffic;
use socket2::{Domain, Socket, Type};

/// The group of all servers' pages.
const GROUP: &str = "web";
/// A group of servers that a test opens itself.
const RAW: &str = "raw";
const RAW_PORT: u16 = 9000;
const DEADLINE: Duration = Duration::from_secs(10);
/// A handshake in a lab takes milliseconds; what is lost is sent again after a second.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How long status and counters may lag behind the traffic.
const COUNTER_DEADLINE: Duration = Duration::from_secs(5);
/// How long the number of an ended flow is held back (`CLOSED_TIMEOUT`), and what sweep and status lag behind.
const HOLD: Duration = Duration::from_secs(60 + 10);

/// Runs `test` at a site with the agent running and all backends of `group` healthy.
fn play(
    extras: Extras,
    group: &str,
    configure: impl Fn(&Site) -> Configuration,
    test: impl FnOnce(&mut Site, &Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site), group)?;
    test(&mut site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// A TOML string.
fn quoted(value: impl Display) -> String {
    format!("\"{value}\"")
}

/// `[listener.NAME]` for TCP with the keys of `more`.
fn listener(
    configuration: Configuration,
    name: &str,
    vip: SocketAddrV4,
    group: &str,
    more: &[(&str, &str)],
) -> Configuration {
    let (address, port, group) = (quoted(vip.ip()), vip.port().to_string(), quoted(group));
    let mut keys = vec![("vip", address.as_str()), ("port", &port), ("group", &group)];
    keys.extend(more);
    configuration.table(&format!("listener.{name}"), &keys)
}

/// A backend of a server, with keys beside its address.
fn backend(
    configuration: Configuration,
    site: &Site,
    group: &str,
    name: &str,
    more: &[(&str, &str)],
) -> Configuration {
    let server = site.server(name).expect("a server of the site");
    let address = quoted(server.address);
    let mut keys = vec![("address", address.as_str())];
    keys.extend(more);
    configuration.table(&format!("group.{group}.backend.{name}"), &keys)
}

/// The group [`RAW`] of both servers on [`RAW_PORT`], unchecked.
fn raw_group(site: &Site, backend_keys: &[(&str, &str)]) -> Configuration {
    let port = RAW_PORT.to_string();
    let keys = [&[("port", port.as_str())], backend_keys].concat();
    let group = site.configuration(&[]).group(RAW, "full", Check::None);
    ["ecs01", "ecs02"].into_iter().fold(group, |configuration, name| {
        backend(configuration, site, RAW, name, &keys)
    })
}

fn raw_vip(site: &Site) -> SocketAddrV4 {
    SocketAddrV4::new(site.vip, RAW_PORT)
}

/// Opens a connection within [`AT_ONCE`].
fn connect(client: &Namespace, to: SocketAddrV4) -> Result<io::Result<TcpStream>> {
    client.inside(|| TcpStream::connect_timeout(&to.into(), AT_ONCE))
}

/// As [`connect`], from an address of the client's that is not its first.
fn connect_from(client: &Namespace, from: Ipv4Addr, to: SocketAddrV4) -> Result<io::Result<TcpStream>> {
    client.inside(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddrV4::new(from, 0).into())?;
        socket.connect_timeout(&to.into(), AT_ONCE)?;
        Ok(socket.into())
    })
}

/// Is the connection refused, and at once?
fn ensure_refused(client: &Namespace, to: SocketAddrV4) -> Result<()> {
    let start = Instant::now();
    let outcome = connect(client, to)?;
    let error = match outcome {
        Ok(_) => bail!("a connection to {to} is open"),
        Err(error) => error,
    };
    ensure!(
        error.kind() == ErrorKind::ConnectionRefused,
        "{error} after {:?}",
        start.elapsed()
    );
    println!("refused after {:.1} ms", start.elapsed().as_secs_f64() * 1000.0);
    Ok(())
}

/// Does nobody answer?
fn ensure_silence(outcome: &io::Result<TcpStream>) -> Result<()> {
    let is_silent = outcome
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::TimedOut);
    ensure!(is_silent, "not silence: {outcome:?}");
    Ok(())
}

/// A server's socket that takes connections.
struct Server {
    name: &'static str,
    listener: TcpListener,
}

impl Server {
    fn open(site: &Site, name: &'static str, port: u16) -> Result<Self> {
        let namespace = &site.server(name)?.namespace;
        let listener = namespace.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))??;
        listener.set_nonblocking(true)?;
        Ok(Self { name, listener })
    }

    fn both(site: &Site, port: u16) -> Result<[Self; 2]> {
        Ok([Self::open(site, "ecs01", port)?, Self::open(site, "ecs02", port)?])
    }
}

/// An open connection with both its ends, which have talked to each other.
#[derive(Debug)]
struct Connection {
    server_name: &'static str,
    client: TcpStream,
    server: TcpStream,
}

impl Connection {
    /// Opens one, whichever of the servers takes it.
    fn open(client: &Namespace, to: SocketAddrV4, servers: &[Server]) -> Result<Self> {
        Self::of(connect(client, to)??, servers)
    }

    /// Of a client's end, the only one that no server has taken yet.
    fn of(client: TcpStream, servers: &[Server]) -> Result<Self> {
        let ((server_name, server), _) = wait_until("a server to accept", DEADLINE, || {
            let mut accepted = servers
                .iter()
                .filter_map(|server| Some((server.name, server.listener.accept().ok()?.0)));
            accepted.next().context("none did")
        })?;
        server.set_nonblocking(false)?;
        for end in [&client, &server] {
            end.set_read_timeout(Some(DEADLINE))?;
        }
        let this = Self {
            server_name,
            client,
            server,
        };
        this.talk()?;
        Ok(this)
    }

    /// A request and a reply of different lengths.
    fn talk(&self) -> Result<()> {
        for (mut from, mut to, text) in [
            (&self.client, &self.server, &b"request"[..]),
            (&self.server, &self.client, &b"the reply to it"[..]),
        ] {
            from.write_all(text)?;
            let mut got = vec![0; text.len()];
            to.read_exact(&mut got)?;
            ensure!(got == text, "{got:?}");
        }
        Ok(())
    }

    /// Both ends close, the client first.
    fn close(self) {
        drop(self.client);
        drop(self.server);
    }
}

/// Waits until a reason has counted this many packets.
fn await_packets(agent: &Agent, reason: &str, count: u64) -> Result<()> {
    wait_until(&format!("{count} × {reason}"), COUNTER_DEADLINE, || {
        let counted = agent.packets(reason)?;
        ensure!(counted == count, "{counted}");
        Ok(())
    })
    .map(drop)
}

fn traffic(agent: &Agent, listener: &str) -> Result<Traffic> {
    let found = agent
        .status()?
        .listeners
        .into_iter()
        .find(|one| one.name == listener);
    Ok(found
        .with_context(|| format!("no listener {listener:?} in the status"))?
        .traffic)
}

fn two_clients() -> Extras {
    Extras {
        second_client: true,
        ..Extras::default()
    }
}

#[test]
fn a_listener_with_sources_admits_its_clients_and_is_silent_to_others() -> Result<()> {
    let configure = |site: &Site| {
        listener(
            raw_group(site, &[]),
            "some",
            raw_vip(site),
            RAW,
            &[("sources", "[\"172.16.0.10/32\", \"10.0.0.0/8\"]")],
        )
    };
    play(two_clients(), RAW, configure, |site, agent| {
        let servers = Server::both(site, RAW_PORT)?;
        let vip = raw_vip(site);
        let admitted = Connection::open(&site.clients[0], vip, &servers)?;
        ensure_silence(&connect(&site.clients[1], vip)?)?;
        let dropped = agent.packets("source_not_allowed")?;
        ensure!(dropped > 0, "by another reason: {:?}", agent.status()?.reasons);
        // Nothing was opened for it, and who was admitted stays.
        let traffic = traffic(agent, "some")?;
        ensure!(
            (traffic.connections_opened, traffic.gateway_resets) == (1, 0),
            "{traffic:?}"
        );
        admitted.talk()
    })
}

#[test]
fn a_listener_with_a_hundred_thousand_sources_admits_exactly_those() -> Result<()> {
    const PREFIXES: u32 = 100_000;
    let clients = [Ipv4Addr::new(172, 16, 0, 10), Ipv4Addr::new(172, 16, 0, 11)];
    // Every other /28 from 10.0.0.0 on, and last of all a client.
    let prefix = |number: u32| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + 32 * number);
    let far = PREFIXES - 2;
    let configuration = |site: &Site, last: &Ipv4Addr| {
        let mut sources: Vec<_> = (0..=far)
            .map(|number| quoted(format_args!("{}/28", prefix(number))))
            .collect();
        sources.push(quoted(format_args!("{last}/32")));
        assert_eq!(sources.len(), PREFIXES as usize);
        let sources = format!("[{}]", sources.join(", "));
        listener(
            raw_group(site, &[]),
            "many",
            raw_vip(site),
            RAW,
            &[("sources", &sources)],
        )
    };
    let configure = |site: &Site| configuration(site, &clients[0]);
    play(two_clients(), RAW, configure, |site, agent| {
        println!(
            "the agent was ready after {:.2} s with {PREFIXES} prefixes",
            agent.ready_after.as_secs_f64()
        );
        let servers = Server::both(site, RAW_PORT)?;
        let vip = raw_vip(site);
        let open = Connection::open(&site.clients[0], vip, &servers)?;
        ensure_silence(&connect(&site.clients[1], vip)?)?;

        // Both edges of the first and the last /28, and right beside them.
        let client = &site.clients[0];
        site.gateway.route("10.0.0.0/8", clients[0])?;
        for number in [0, far] {
            let first = u32::from(prefix(number));
            for (address, is_admitted) in [
                (first, true),
                (first + 15, true),
                (first + 16, false),
                (first.wrapping_sub(1), false),
            ] {
                let address = Ipv4Addr::from(address);
                client.address("eth0", &format!("{address}/32"))?;
                let outcome = connect_from(client, address, vip)?;
                if is_admitted {
                    let stream = outcome.with_context(|| format!("from {address}"))?;
                    Connection::of(stream, &servers)?.close();
                } else {
                    ensure_silence(&outcome).with_context(|| format!("from {address}"))?;
                }
            }
        }
        ensure!(agent.packets("source_not_allowed")? >= 5, "by another reason");

        // The other client instead, while the agent runs: that is for new flows.
        let start = Instant::now();
        ensure_applied(&apply(site, agent, &configuration(site, &clients[1]))?)?;
        println!(
            "another one of them was applied in {:.2} s",
            start.elapsed().as_secs_f64()
        );
        Connection::open(&site.clients[1], vip, &servers)?.close();
        ensure_silence(&connect(client, vip)?)?;
        open.talk()?;
        Ok(())
    })
}

#[test]
fn listeners_of_many_ports_leave_the_port_as_the_client_asked_for_it() -> Result<()> {
    let any_vip = Ipv4Addr::new(172, 16, 0, 101);
    let configure = |site: &Site| {
        let mut configuration = site
            .web_configuration()
            .group("same", "full", Check::None)
            .listener("inside", site.vip, 8050, "tcp", GROUP);
        for name in ["ecs01", "ecs02"] {
            configuration = backend(configuration, site, "same", name, &[]);
        }
        for (name, vip, port, protocol) in [
            ("range", site.vip, "8000-8099", "tcp"),
            ("any", any_vip, "any", "tcp"),
            ("range-udp", site.vip, "5000-5999", "udp"),
        ] {
            configuration = configuration.table(
                &format!("listener.{name}"),
                &[
                    ("vip", &quoted(vip)),
                    ("port", &quoted(port)),
                    ("protocol", &quoted(protocol)),
                    ("group", "\"same\""),
                ],
            );
        }
        configuration
    };
    play(Extras::default(), GROUP, configure, |site, agent| {
        let client = site.client();
        // Each port has servers of its own, so it is the one that was asked for. Enough connections that both
        // servers, the local and the remote one, get some.
        for (vip, port) in [
            (site.vip, 8000),
            (site.vip, 8037),
            (site.vip, 8099),
            (any_vip, 1),
            (any_vip, 8050),
            (any_vip, 65_535),
        ] {
            let servers = Server::both(site, port)?;
            let to = SocketAddrV4::new(vip, port);
            let mut seen = std::collections::BTreeSet::new();
            wait_until("both servers to be chosen", DEADLINE, || {
                let connection = Connection::open(client, to, &servers)?;
                ensure!(connection.server.local_addr()?.port() == port, "{connection:?}");
                seen.insert(connection.server_name);
                connection.close();
                ensure!(seen.len() == 2, "{to}: {seen:?}");
                Ok(())
            })?;
        }
        ensure!(agent.packets("no_listener")? == 0, "a port was missed");

        // The listener of one port inside the range: its group has pages.
        let _servers = Server::both(site, 8050)?;
        let mut kept = KeptConnection::open(client, site.vip, 8050)?;
        let page = kept.get()?;
        ensure!(site.answered_by(&page).is_some(), "{page}");

        let _echo = [
            EchoServer::start(&site.server("ecs01")?.namespace, 5353)?,
            EchoServer::start(&site.server("ecs02")?.namespace, 5353)?,
        ];
        Client::open(client, 0)?.ask("hello", SocketAddrV4::new(site.vip, 5353))?;

        for (passed, port) in [(1, 7999), (2, 8100)] {
            let outcome = connect(client, SocketAddrV4::new(site.vip, port))?;
            ensure!(outcome.is_err(), "{port} is served");
            wait_until("the SYN to pass", COUNTER_DEADLINE, || {
                let counted = agent.packets("no_listener")?;
                ensure!(counted >= passed, "{counted} packets");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn one_connection_more_than_a_listener_may_have_is_refused_at_once() -> Result<()> {
    const LIMIT: usize = 8;
    let configure = |site: &Site| {
        listener(
            raw_group(site, &[]),
            "few",
            raw_vip(site),
            RAW,
            &[("max_flows", &LIMIT.to_string())],
        )
    };
    play(Extras::default(), RAW, configure, |site, agent| {
        let servers = Server::both(site, RAW_PORT)?;
        let (client, vip) = (site.client(), raw_vip(site));
        let mut open = Vec::new();
        for number in 0..LIMIT {
            open.push(Connection::open(client, vip, &servers).with_context(|| format!("number {number}"))?);
        }
        ensure_refused(client, vip)?;
        await_packets(agent, "listener_limit", 1)?;
        let counted = traffic(agent, "few")?;
        ensure!(
            (counted.connections_opened, counted.connections_refused) == (LIMIT as u64, 1),
            "{counted:?}"
        );
        open.pop().context("an open connection")?.close();
        let (next, after) = wait_until("a place to be free", DEADLINE, || {
            Connection::open(client, vip, &servers)
        })?;
        println!("a place was free after {:.2} s", after.as_secs_f64());
        open.push(next);
        ensure_refused(client, vip)?;
        open.iter().try_for_each(Connection::talk)
    })
}

#[test]
fn connections_go_to_the_backend_with_room_and_are_refused_when_none_has_any() -> Result<()> {
    const LIMIT: usize = 4;
    let configure = |site: &Site| {
        let configuration = raw_group(site, &[("max_flows", &LIMIT.to_string())]);
        listener(configuration, "raw", raw_vip(site), RAW, &[])
    };
    play(Extras::default(), RAW, configure, |site, agent| {
        let servers = Server::both(site, RAW_PORT)?;
        let (client, vip) = (site.client(), raw_vip(site));
        let mut open = Vec::new();
        for number in 0..2 * LIMIT {
            open.push(Connection::open(client, vip, &servers).with_context(|| format!("number {number}"))?);
        }
        for name in ["ecs01", "ecs02"] {
            let got = open.iter().filter(|one| one.server_name == name).count();
            ensure!(got == LIMIT, "{name} has {got}");
        }
        ensure_refused(client, vip)?;
        await_packets(agent, "backend_limit", 1)?;

        for name in ["ecs02", "ecs01"] {
            let which = open.iter().position(|one| one.server_name == name);
            open.swap_remove(which.context("one of its connections")?).close();
            let (next, _) = wait_until("a place to be free", DEADLINE, || {
                Connection::open(client, vip, &servers)
            })?;
            assert_eq!(next.server_name, name, "only it had room");
            open.push(next);
            ensure_refused(client, vip)?;
        }
        open.iter().try_for_each(Connection::talk)
    })
}

#[test]
fn clients_of_a_group_without_a_healthy_backend_are_told_at_once() -> Result<()> {
    let extras = Extras {
        remote_client: true,
        ..Extras::default()
    };
    let configure = |site: &Site| {
        site.web_configuration_with(&[("mode", "native")], "full", |_| 1)
            .listener("datagrams", site.vip, 5353, "udp", GROUP)
    };
    play(extras, GROUP, configure, |site, agent| {
        for name in ["ecs01", "ecs02"] {
            site.stop_nginx(name)?;
        }
        wait_until("all backends to be unhealthy", DEADLINE, || {
            let backends = agent.backends(GROUP)?;
            ensure!(backends.iter().all(|one| one.health != HEALTHY), "{backends:?}");
            Ok(())
        })?;
        let web = SocketAddrV4::new(site.vip, PORT);
        let remote_client = site.remote_client.as_ref().context("a remote client")?;
        // With a checksum that the sender left to its device, and with one that is complete.
        for offload in [true, false] {
            site.checksum_offload(offload)?;
            ensure_refused(site.client(), web)
                .with_context(|| format!("a client on a link, checksum offload {offload}"))?;
            ensure_refused(remote_client, web)
                .with_context(|| format!("a client behind the tunnel, checksum offload {offload}"))?;
        }
        let socket = site
            .client()
            .inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        socket.set_read_timeout(Some(AT_ONCE))?;
        socket.connect(SocketAddrV4::new(site.vip, 5353))?;
        socket.send(b"anybody?")?;
        let answer = socket.recv(&mut [0; 64]);
        ensure!(
            answer
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused),
            "not told: {answer:?}"
        );

        await_packets(agent, "no_backend", 5)?;
        for (listener, count) in [("web", 4.0), ("datagrams", 1.0)] {
            let metrics = agent.metrics()?;
            let labels = [("listener", listener), ("origin", "gateway")];
            assert_eq!(
                metrics.sum("forwarder_listener_resets_total", &labels),
                count,
                "{listener}"
            );
            assert_eq!(
                metrics.sum(
                    "forwarder_listener_connections_refused_total",
                    &[("listener", listener)]
                ),
                count,
                "{listener}"
            );
        }

        // Once there is a server again, so is the service.
        site.start_nginx("ecs01")?;
        wait_until("an answer", DEADLINE, || {
            let answer = site.curl()?;
            ensure!(answer.body().is_some(), "{answer:?}");
            Ok(())
        })
        .map(drop)
    })
}

#[test]
fn both_ends_of_an_idle_connection_get_a_reset_where_the_listener_says_so() -> Result<()> {
    // (name of listener and group, server, port, reset_on_idle)
    const CASES: [(&str, &str, u16, bool); 4] = [
        ("local", "ecs01", 9001, true),
        ("remote", "ecs02", 9002, true),
        ("quiet-local", "ecs01", 9003, false),
        ("quiet-remote", "ecs02", 9004, false),
    ];
    let configure = |site: &Site| {
        let mut configuration = site.configuration(&[]);
        for (name, server, port, reset) in CASES {
            configuration = configuration.group(name, "full", Check::None);
            configuration = backend(configuration, site, name, server, &[("port", &port.to_string())]);
            let keys = [
                ("idle_timeout", "\"10s\""),
                ("reset_on_idle", if reset { "true" } else { "false" }),
            ];
            configuration = listener(
                configuration,
                name,
                SocketAddrV4::new(site.vip, port),
                name,
                &keys,
            );
        }
        configuration
    };
    play(Extras::default(), "local", configure, |site, agent| {
        let mut connections = Vec::new();
        for (_, server, port, _) in CASES {
            let server = Server::open(site, server, port)?;
            let vip = SocketAddrV4::new(site.vip, port);
            let connection = Connection::open(site.client(), vip, &[server])?;
            // Of more than one request, so that the numbers are not those of the handshake.
            connection.talk()?;
            connections.push(connection);
        }
        let idle_since = Instant::now();
        // Flows are counted once a second: first they must show, then be gone.
        for (what, flows) in [("the flow to be counted", 1), ("the flow to be removed", 0)] {
            for (name, ..) in CASES {
                wait_until(what, Duration::from_secs(20), || {
                    let traffic = traffic(agent, name)?;
                    ensure!(traffic.flows == flows, "{name}: {traffic:?}");
                    Ok(())
                })?;
            }
        }
        println!("removed after {:.1} s", idle_since.elapsed().as_secs_f64());
        ensure!(idle_since.elapsed() >= Duration::from_secs(9), "too early");

        for ((name, _, _, is_told), connection) in CASES.iter().zip(&mut connections) {
            for (end, stream) in [
                ("the client", &mut connection.client),
                ("the server", &mut connection.server),
            ] {
                // A reset that was sent is here by now, or within a moment.
                let patience = if *is_told { DEADLINE } else { AT_ONCE };
                stream.set_read_timeout(Some(patience))?;
                let kind = stream.read(&mut [0; 64]).map_err(|error| error.kind());
                let is_right = if *is_told {
                    kind == Err(ErrorKind::ConnectionReset)
                } else {
                    matches!(kind, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut))
                };
                ensure!(is_right, "{name}, {end}: {kind:?}");
            }
            wait_until("the resets to be counted", COUNTER_DEADLINE, || {
                let resets = traffic(agent, name)?.gateway_resets;
                ensure!(resets == if *is_told { 2 } else { 0 }, "{name}: {resets}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_handshake_that_nobody_answers_gives_its_binding_back() -> Result<()> {
    let configure = |site: &Site| {
        listener(
            raw_group(site, &[]),
            "raw",
            raw_vip(site),
            RAW,
            &[("half_open_timeout", "\"5s\"")],
        )
    };
    play(Extras::default(), RAW, configure, |site, agent| {
        for server in &site.servers {
            server.namespace.run_with_input(
                "nft -f -",
                Some(&format!(
                    "table inet filter {{ chain input {{ type filter hook input priority filter; tcp dport {RAW_PORT} drop; }}; }}"
                )),
            )?;
        }
        // It gives up before its SYN would be sent again.
        let start = Instant::now();
        ensure_silence(&connect(site.client(), raw_vip(site))?)?;
        let flows = agent.ask("flows", &["-o", "json"])?;
        let flows: serde_json::Value = serde_json::from_slice(&flows.stdout)?;
        assert_eq!(flows["matching"], 1, "{flows}");
        assert_eq!(flows["flows"][0]["state"], "half_open", "{flows}");

        wait_until("the flow to be removed", DEADLINE, || {
            let flows = agent.ask("flows", &["--count"])?.stdout;
            ensure!(flows.trim_ascii() == b"0", "{}", String::from_utf8_lossy(&flows));
            Ok(())
        })?;
        println!("removed after {:.1} s", start.elapsed().as_secs_f64());
        let is_soon = (Duration::from_secs(4)..Duration::from_secs(9)).contains(&start.elapsed());
        ensure!(is_soon, "after {:?}", start.elapsed());

        // A late answer must not meet another flow: the binding is held back.
        assert_eq!(agent.status()?.pool.used, 1);
        wait_until("the binding to be free", HOLD, || {
            let pool = agent.status()?.pool;
            ensure!(pool.used == 0, "{pool:?}");
            Ok(())
        })?;
        println!("free after {:.1} s", start.elapsed().as_secs_f64());
        Ok(())
    })
}

/// The group of pages with these servers and a value for `remote_ip`.
fn pages(site: &Site, remote_ip: bool, names: &[&str]) -> Configuration {
    let remote_ip = if remote_ip { "true" } else { "false" };
    let mut configuration = site
        .configuration(&[])
        .table("group.web", &[("remote_ip", remote_ip)])
        .table(
            "group.web.health",
            &[
                ("kind", "\"http\""),
                ("interval", "\"500ms\""),
                ("timeout", "\"400ms\""),
            ],
        );
    for name in names {
        configuration = backend(configuration, site, GROUP, name, &[("port", "80")]);
    }
    listener(
        configuration,
        "web",
        SocketAddrV4::new(site.vip, PORT),
        GROUP,
        &[],
    )
}

fn apply(site: &Site, agent: &Agent, configuration: &Configuration) -> Result<Output> {
    let file = site.lab.directory().join("next.toml");
    std::fs::write(&file, configuration.to_string())?;
    agent.ask("apply", &["-c", file.to_str().context("the path is text")?])
}

fn ensure_applied(output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Waits for a new connection that this server answers.
fn await_answer_of(site: &Site, name: &str) -> Result<()> {
    let page = &site.server(name)?.page;
    wait_until(&format!("an answer of {name}"), DEADLINE, || {
        let answer = site.curl()?;
        ensure!(answer.body() == Some(page), "{answer:?}");
        Ok(())
    })
    .map(drop)
}

#[test]
fn remote_backends_are_forbidden_and_allowed_while_the_agent_runs() -> Result<()> {
    let both = ["ecs01", "ecs02"];
    let configure = |site: &Site| pages(site, true, &both);
    play(Extras::default(), GROUP, configure, |site, agent| {
        let pid = agent.pid();
        let page = site.server("ecs01")?.page.clone();
        let (mut kept, _) = wait_until("a connection to the local server", DEADLINE, || {
            let mut connection = KeptConnection::open(site.client(), site.vip, PORT)?;
            ensure!(connection.get()? == page);
            Ok(connection)
        })?;

        // Forbidden while there is one: the operator is told which, and nothing changes.
        let forbidden = pages(site, false, &both);
        let text = forbidden.to_string();
        let heading = text.lines().position(|line| line == "[group.web.backend.ecs02]");
        // Lines count from 1, and the address follows the heading.
        let line = heading.context("the backend's table")? + 2;
        let output = apply(site, agent, &forbidden)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{said}");
        assert_eq!(output.status.code(), Some(2), "{said}");
        for wanted in ["ecs02", "remote_ip", &format!("next.toml:{line}")] {
            ensure!(said.contains(wanted), "no {wanted:?} in: {said}");
        }
        assert_eq!(agent.backends(GROUP)?.len(), 2);
        for name in both {
            await_answer_of(site, name)?;
        }
        assert_eq!(kept.get()?, page);

        // Without it, the same is applied.
        ensure_applied(&apply(site, agent, &pages(site, false, &["ecs01"]))?)?;
        for _ in 0..20 {
            let answer = site.curl()?;
            ensure!(answer.body() == Some(&page), "{answer:?}");
        }
        assert_eq!(kept.get()?, page);

        // Allowed again.
        ensure_applied(&apply(site, agent, &pages(site, true, &both))?)?;
        for name in both {
            await_answer_of(site, name)?;
        }
        assert_eq!(kept.get()?, page);
        assert_eq!(agent.pid(), pid);
        let log = std::fs::read_to_string(agent.log())?;
        assert_eq!(log.matches("ready:").count(), 1, "the agent began anew");
        Ok(())
    })
}

/// The routing rules of the gateway at the agent's priority, as `ip rule` prints them.
fn policy_rules(site: &Site) -> Result<Vec<String>> {
    let rules = site.gateway.run("ip -4 rule show")?;
    let ours = rules.lines().filter_map(|line| line.strip_prefix("946:"));
    Ok(ours.map(|line| line.trim().to_owned()).collect())
}

#[test]
fn a_network_is_reached_by_the_routing_table_that_is_written_for_it() -> Result<()> {
    const FAR: &str = "192.168.0.0/16";
    let extras = Extras {
        remote_client: true,
        ..Extras::default()
    };
    let configuration = |site: &Site, table: u32| {
        let text = site.web_configuration().to_string();
        let heading = "[network.vpc2]\n";
        assert!(text.contains(heading), "{text}");
        Configuration::from_text(text.replace(heading, &format!("{heading}table = {table}\n")))
    };
    let configure = |site: &Site| {
        let far_router = "169.254.42.2";
        site.gateway
            .run(&format!("ip route del {FAR}"))
            .expect("the main table has it");
        for table in [42, 43] {
            site.gateway
                .run(&format!("ip route add {FAR} via {far_router} table {table}"))
                .expect("a route of another table");
        }
        // What an agent that was killed has left.
        site.gateway
            .run("ip rule add priority 946 to 10.9.0.0/16 lookup 77")
            .expect("a rule");
        configuration(site, 42)
    };
    // All backends are healthy, the remote one by the table's route.
    play(extras, GROUP, configure, |site, agent| {
        assert_eq!(policy_rules(site)?, [format!("from all to {FAR} lookup 42")]);
        let remote_client = site.remote_client.as_ref().context("a remote client")?;
        let reach_both = || {
            for client in [site.client(), remote_client] {
                for server in &site.servers {
                    wait_until(&format!("an answer of {}", server.name), DEADLINE, || {
                        let answer = lab::load::curl(client, site.vip, PORT)?;
                        ensure!(answer.body().is_some(), "to {}: {answer:?}", client.role());
                        ensure!(answer.body() == Some(server.page.as_str()), "by another");
                        Ok(())
                    })?;
                }
            }
            anyhow::Ok(())
        };
        reach_both()?;

        let mut kept = KeptConnection::open(remote_client, site.vip, PORT)?;
        let page = kept.get()?;
        ensure_applied(&apply(site, agent, &configuration(site, 43))?)?;
        assert_eq!(policy_rules(site)?, [format!("from all to {FAR} lookup 43")]);
        // Nothing needs the former table any more.
        site.gateway.run("ip route flush table 42")?;
        assert_eq!(kept.get()?, page);
        reach_both()?;

        let status = agent.stop()?;
        ensure!(status.success(), "{status}");
        assert_eq!(policy_rules(site)?, Vec::<String>::new());
        Ok(())
    })
}
