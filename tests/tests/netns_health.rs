//! Ring 3: health checks of every kind that needs a network, and of tunnels, on real links, tunnels and servers.
//! `--test-threads=1`, as the other labs.

use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Process, Service,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    status::HEALTHY,
    topology::{Extras, PORT, PROBE_ADDRESS, Site},
    udp::EchoServer,
    wait_until,
};
use forwarder_user::status::{BackendStatus, TunnelStatus};
use nix::sys::signal::Signal;
use rcgen::{CertifiedKey, generate_simple_self_signed};

/// How long what happens may take to show; far less than [`SLOW`] checks need.
const DEADLINE: Duration = Duration::from_secs(20);
/// A check that finds nothing out within a test: it takes ten probes, 100 s.
const SLOW: [(&str, &str); 4] = [
    ("interval", "\"10s\""),
    ("timeout", "\"1s\""),
    ("rise", "10"),
    ("fall", "10"),
];
const QUICK: [(&str, &str); 4] = [
    ("interval", "\"300ms\""),
    ("timeout", "\"1s\""),
    ("rise", "1"),
    ("fall", "2"),
];
/// The far side of the tunnel of [`Site::cross_region`].
const FAR_SIDE: &str = "169.254.42.2";

/// Adds a group of one server with a check of `keys`.
fn group(
    configuration: Configuration,
    name: &str,
    (backend, address, port): (&str, Ipv4Addr, u16),
    keys: &[(&str, &str)],
) -> Configuration {
    configuration
        .table(&format!("group.{name}"), &[])
        .table(&format!("group.{name}.health"), keys)
        .backend(name, backend, address, port, 1)
}

fn server(site: &Site, name: &'static str, port: u16) -> Result<(&'static str, Ipv4Addr, u16)> {
    Ok((name, site.server(name)?.address, port))
}

fn tunnel(agent: &Agent) -> Result<TunnelStatus> {
    let tunnels = agent.status()?.tunnels;
    tunnels.into_iter().next().context("a tunnel in the status")
}

/// Waits until a backend's health is `health`, and for an unhealthy one until there is a diagnosis.
fn await_health(agent: &Agent, group: &str, name: &str, health: &str) -> Result<BackendStatus> {
    let what = format!("{group}/{name} to be {health}");
    let (status, _) = wait_until(&what, DEADLINE, || {
        let status = agent.backend(group, name)?;
        let is_explained = health == HEALTHY || status.diagnosis.is_some();
        ensure!(status.health == health && is_explained, "{status:?}");
        Ok(status)
    })?;
    Ok(status)
}

fn await_cause(agent: &Agent, group: &str, name: &str, cause: &str) -> Result<BackendStatus> {
    let what = format!("{group}/{name} to be unhealthy for {cause}");
    let (status, _) = wait_until(&what, DEADLINE, || {
        let status = agent.backend(group, name)?;
        let found = status
            .diagnosis
            .as_ref()
            .map(|diagnosis| diagnosis.cause.as_str());
        ensure!(status.health != HEALTHY && found == Some(cause), "{status:?}");
        Ok(status)
    })?;
    Ok(status)
}

fn await_tunnel(agent: &Agent, health: &str) -> Result<TunnelStatus> {
    let (status, _) = wait_until(&format!("the tunnel to be {health}"), DEADLINE, || {
        let status = tunnel(agent)?;
        ensure!(status.health == health, "{status:?}");
        Ok(status)
    })?;
    Ok(status)
}

#[test]
fn a_tunnel_that_is_cut_and_a_server_that_is_down_are_told_apart() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let far_side = format!("\"{FAR_SIDE}\"");
    let tunnel_check = [&[("address", far_side.as_str())][..], &QUICK].concat();
    let mut configuration = site
        .configuration(&[])
        .table("tunnel.cen.health", &tunnel_check)
        .table("group.web", &[])
        .table("group.web.health", &SLOW);
    for name in ["ecs01", "ecs02"] {
        configuration = configuration.backend("web", name, site.server(name)?.address, PORT, 1);
    }
    let configuration = configuration.listener("web", site.vip, PORT, "tcp", "web");
    let configuration = group(configuration, "quick", server(&site, "ecs02", PORT)?, &QUICK);
    let agent = site.start_agent(&configuration, "web")?;
    let healthy = await_tunnel(&agent, HEALTHY)?;
    ensure!(healthy.is_up && healthy.backends_held == 0, "{healthy:?}");
    let metric = |agent: &Agent| {
        Ok::<_, anyhow::Error>(
            agent
                .metrics()?
                .sum("forwarder_tunnel_healthy", &[("tunnel", "cen")]),
        )
    };
    ensure!(metric(&agent)? == 1.0);
    let metrics = agent.metrics()?;
    let passed = |name: &str, label| metrics.sum(name, &[label]);
    ensure!(passed("forwarder_tunnel_probe_duration_seconds_count", ("tunnel", "cen")) >= 1.0);
    ensure!(passed("forwarder_group_probe_duration_seconds_count", ("group", "quick")) >= 1.0);
    ensure!(passed("forwarder_turn_duration_seconds_count", ("event", "probe")) >= 1.0);
    ensure!(passed("forwarder_tunnel_probes_failed_total", ("tunnel", "cen")) == 0.0);

    // The underlay loses everything; the tunnel's device stays up.
    let cut = "table ip cut {
            chain carrier {
                type filter hook prerouting priority -300
                iifname wan drop
            }
        }
        ";
    site.far_router.run_with_input("nft -f -", Some(cut))?;
    let down = await_tunnel(&agent, "unhealthy")?;
    ensure!(down.is_up && down.backends_held == 2, "{down:?}");
    ensure!(metric(&agent)? == 0.0);
    let failed = agent
        .metrics()?
        .sum("forwarder_tunnel_probes_failed_total", &[("tunnel", "cen")]);
    ensure!(failed >= 1.0, "{failed}");
    // At once: by themselves, the slow check would take minutes.
    for group in ["web", "quick"] {
        let status = await_cause(&agent, group, "ecs02", "tunnel-down")?;
        let text = status
            .diagnosis
            .map(|diagnosis| diagnosis.text)
            .unwrap_or_default();
        ensure!(
            text.contains("tunnel cen is down") && text.contains(FAR_SIDE),
            "{text}"
        );
    }
    let log = fs::read_to_string(agent.log())?;
    ensure!(
        log.contains("unhealthy: the tunnel cen is down"),
        "the log names the tunnel"
    );
    for _ in 0..20 {
        let answer = site.curl()?;
        let by = answer
            .body()
            .and_then(|page| site.answered_by(page))
            .map(|server| server.name);
        ensure!(by == Some("ecs01"), "{answer:?}");
    }

    site.far_router.run("nft delete table ip cut")?;
    await_tunnel(&agent, HEALTHY)?;
    // Its own next success, although `rise` is ten.
    for group in ["web", "quick"] {
        await_health(&agent, group, "ecs02", HEALTHY)?;
    }

    // The server stops: that is not the tunnel.
    site.stop_nginx("ecs02")?;
    let refused = await_cause(&agent, "quick", "ecs02", "refused")?;
    let status = tunnel(&agent)?;
    ensure!(
        status.health == HEALTHY && status.backends_held == 0,
        "{status:?}"
    );
    let text = refused
        .diagnosis
        .map(|diagnosis| diagnosis.text)
        .unwrap_or_default();
    ensure!(text.contains("server 192.168.1.10"), "{text}");
    // Its whole host is gone: that is not the tunnel either.
    site.server("ecs02")?.namespace.run("ip link set eth0 down")?;
    // Its router would believe for up to 45 s that it is there (RFC 4861 §6.3.2, which Linux follows for ARP too).
    site.far_router.run("ip neigh flush to 192.168.1.10")?;
    let gone = await_cause(&agent, "quick", "ecs02", "server-down")?;
    let text = gone.diagnosis.map(|diagnosis| diagnosis.text).unwrap_or_default();
    ensure!(
        text.contains("192.168.1.10") && !text.contains("tunnel"),
        "{text}"
    );
    // Its router looks for it for three seconds; until then, nobody blames a rule.
    let log = fs::read_to_string(agent.log())?;
    ensure!(!log.contains("cause=filtered"), "{log}");

    // The check leaves the configuration while it holds backends: they are let go.
    site.far_router.run_with_input("nft -f -", Some(cut))?;
    await_tunnel(&agent, "unhealthy")?;
    let text = configuration.to_string();
    let (before, rest) = text.split_once("[tunnel.cen.health]").context("the check")?;
    let (_, after) = rest.split_once("\n\n").context("what follows it")?;
    agent.rewrite(&Configuration::from_text(format!("{before}{after}")))?;
    agent.signal(Signal::SIGHUP);
    let unchecked = await_tunnel(&agent, "unchecked")?;
    ensure!(unchecked.backends_held == 0, "{unchecked:?}");
    site.far_router.run("nft delete table ip cut")?;
    site.server("ecs02")?.namespace.run("ip link set eth0 up")?;
    site.server("ecs02")?
        .namespace
        .route("100.64.0.0/26", Ipv4Addr::new(192, 168, 1, 1))?;
    site.start_nginx("ecs02")?;
    await_health(&agent, "quick", "ecs02", HEALTHY)?;
    show_log.all_is_well();
    Ok(())
}

/// An nginx with a certificate of its own for `name`.
fn start_tls(site: &Site, host: &str, port: u16, name: &str) -> Result<(Process, PathBuf)> {
    let directory = site.lab.directory().join(format!("tls-{host}"));
    fs::create_dir(&directory)?;
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.to_owned()])?;
    let certificate = directory.join("certificate.pem");
    fs::write(&certificate, cert.pem())?;
    fs::write(directory.join("key.pem"), signing_key.serialize_pem())?;
    let path = directory.display();
    let text = format!(
        "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log info; events {{}}
        http {{
            client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;
            uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;
            access_log {path}/access.log;
            log_format lab '$remote_addr $ssl_server_name $request_method $uri';
            server {{
                listen {port} ssl; ssl_certificate {path}/certificate.pem; ssl_certificate_key {path}/key.pem;
                access_log {path}/access.log lab;
                location / {{ return 200 '{{\"state\": \"ready\"}}'; }}
            }}
        }}"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, text)?;
    let errors = directory.join("error.log");
    let program = lab::find("nginx").context("nginx is not installed")?;
    let service = Service {
        name: "nginx with TLS",
        program: &program,
        arguments: &["-c".as_ref(), file.as_ref(), "-e".as_ref(), errors.as_ref()],
        environment: &[],
        stop_signal: Signal::SIGQUIT,
        log: &errors,
    };
    let process = site.lab.spawn(&site.server(host)?.namespace, &service)?;
    Ok((process, certificate))
}

#[test]
fn checks_of_every_kind_ask_real_servers_through_the_tunnel() -> Result<()> {
    const TLS_PORT: u16 = 443;
    const UDP_PORT: u16 = 5353;
    const NAME: &str = "shop.example";
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    // Else the kernel sends one "port unreachable" a second to one address, and three checks want their own.
    let sysctl = |key, value| site.server("ecs02")?.namespace.sysctl(key, value);
    sysctl("net/ipv4/icmp_ratelimit", "0")?;
    let (tls, certificate) = start_tls(&site, "ecs02", TLS_PORT, NAME)?;
    let echo = EchoServer::start(&site.server("ecs02")?.namespace, UDP_PORT)?;
    let script = site.lab.directory().join("check.sh");
    fs::write(
        &script,
        "#!/bin/sh\nexec curl --silent --show-error --fail --max-time 1 --interface \"$FORWARDER_SOURCE\" \
         \"http://$FORWARDER_ADDRESS:$FORWARDER_PORT/\"\n",
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;

    let ca = format!("\"{}\"", certificate.display());
    let command = format!("[\"{}\"]", script.display());
    let host = format!("\"{NAME}\"");
    let other = "\"other.example\"";
    let kind = |kind: &'static str, keys: &[(&'static str, String)]| -> Vec<(&'static str, String)> {
        let quick = QUICK.map(|(key, value)| (key, value.to_owned()));
        [&[("kind", format!("\"{kind}\""))], keys, &quick].concat()
    };
    let body = ("body_regex", "'\"state\": *\"ready\"'".to_owned());
    let checks = [
        (
            "tls",
            TLS_PORT,
            kind("https", &[("path", "\"/tls\"".into()), body.clone()]),
        ),
        (
            "signed",
            TLS_PORT,
            kind("https", &[("host", host.clone()), ("ca", ca.clone()), body]),
        ),
        (
            "stranger",
            TLS_PORT,
            kind("https", &[("host", other.to_owned()), ("ca", ca)]),
        ),
        (
            "unready",
            TLS_PORT,
            kind("https", &[("body", "\"draining\"".to_owned())]),
        ),
        (
            "udp",
            UDP_PORT,
            kind(
                "udp",
                &[("send", "\"hi\"".into()), ("answer", "\"ecs02 hi\"".into())],
            ),
        ),
        ("silent", UDP_PORT, kind("udp", &[])),
        ("ping", PORT, kind("icmp", &[])),
        ("command", PORT, kind("command", &[("command", command)])),
    ];
    let mut configuration = site
        .configuration(&[])
        .listener("udp", site.vip, UDP_PORT, "udp", "unwritten");
    // Without a word about its check, as it serves UDP only.
    configuration = configuration.table("group.unwritten", &[]);
    configuration = configuration.backend("unwritten", "ecs02", site.server("ecs02")?.address, UDP_PORT, 1);
    for (name, port, keys) in &checks {
        let keys: Vec<_> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
        configuration = group(configuration, name, server(&site, "ecs02", *port)?, &keys);
    }
    let agent = site.start_agent(&configuration, "udp")?;
    for name in ["tls", "signed", "udp", "silent", "ping", "command", "unwritten"] {
        await_health(&agent, name, "ecs02", HEALTHY)?;
    }
    let stranger = await_cause(&agent, "stranger", "ecs02", "bad-tls")?;
    let failure = stranger.failure.unwrap_or_default();
    ensure!(failure.contains("not valid for name"), "{failure}");
    let unready = await_cause(&agent, "unready", "ecs02", "bad-answer")?;
    ensure!(unready.failure.is_some_and(|why| why.contains("draining")));

    // All came from the probe address.
    let probe = PROBE_ADDRESS.to_string();
    ensure!(echo.peers().iter().all(|peer| *peer.ip() == PROBE_ADDRESS));
    let asked = fs::read_to_string(certificate.with_file_name("access.log"))?;
    ensure!(
        asked.lines().any(|line| line == format!("{probe} {NAME} GET /"))
            && asked.lines().any(|line| line == format!("{probe} - GET /tls"))
            && asked.lines().all(|line| line.starts_with(&probe)),
        "{asked}"
    );
    let log = site.server("ecs02")?.nginx.access_log()?;
    ensure!(log.sources().any(|source| source == PROBE_ADDRESS), "{log:?}");

    drop(echo);
    tls.stop()?;
    site.stop_nginx("ecs02")?;
    for (name, failure) in [
        ("udp", "port unreachable"),
        ("silent", "port unreachable"),
        ("unwritten", "port unreachable"),
        ("tls", "refused"),
        ("command", "exit status 7: curl: (7)"),
    ] {
        let status = await_health(&agent, name, "ecs02", "unhealthy")?;
        let said = status.failure.unwrap_or_default();
        ensure!(said.contains(failure), "{name}: {said}");
    }
    ensure!(agent.backend("ping", "ecs02")?.health == HEALTHY);
    site.server("ecs02")?
        .namespace
        .sysctl("net/ipv4/icmp_echo_ignore_all", "1")?;
    let status = await_health(&agent, "ping", "ecs02", "unhealthy")?;
    ensure!(status.failure.is_some_and(|why| why.contains("no answer")));
    show_log.all_is_well();
    Ok(())
}

/// Processor time that a process has used.
fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(") ").context("a name in brackets")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    // User and system time, in hundredths of a second (proc(5)).
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

#[test]
fn an_agent_with_ten_thousand_backends_goes_on() -> Result<()> {
    const BACKENDS: u32 = 10_000;
    const SERVER_PORT: u16 = 8000;
    const INTERVAL: Duration = Duration::from_secs(2);
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let lab = lab::Lab::open(Lifetime::Process)?;
    let show_log = ShowLog::of(&lab);
    let (gateway, server) = (lab.namespace("gateway")?, lab.namespace("server")?);
    lab.cable((&gateway, "eth0"), (&server, "eth0"), 1500)?;
    gateway.forward()?;
    gateway.address("eth0", "10.1.0.1/24")?;
    server.address("eth0", "10.1.0.2/24")?;
    // One host has the addresses of all.
    server.run("ip route add local 10.200.0.0/16 dev lo")?;
    gateway.route("10.200.0.0/16", Ipv4Addr::new(10, 1, 0, 2))?;
    server.route("100.64.0.0/26", Ipv4Addr::new(10, 1, 0, 1))?;
    let listener = server.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, SERVER_PORT)))??;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXCONN)?;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let notes = asked.clone();
    // Ends with the process.
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if let Ok(address) = stream.local_addr() {
                notes.lock().unwrap().push(address.ip());
            }
        }
    });

    let mut text = Configuration::new(&agent::control_socket(&lab), &lab.pin_directory())
        .snat("100.64.0.0/26", PROBE_ADDRESS)
        .interface("eth0", &[])
        .table("group.web.backend", &[])
        .to_string();
    for number in 0..BACKENDS {
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 200, 0, 1).to_bits() + number);
        text += &format!("b{number} = {{ address = \"{address}\", port = {SERVER_PORT} }}\n");
    }
    let vip = Ipv4Addr::new(10, 1, 0, 100);
    let configuration = Configuration::from_text(text).listener("web", vip, 80, "tcp", "web");
    let agent = Agent::start(&lab, &gateway, &configuration)?;
    wait_until("all backends to be healthy", 3 * DEADLINE, || {
        let status = agent.status()?;
        let healthy = status.groups[0].healthy_backends;
        ensure!(healthy == BACKENDS as usize, "{healthy} are");
        Ok(())
    })?;

    let (before, start) = (cpu_time(agent.pid())?, Instant::now());
    asked.lock().unwrap().clear();
    let (_, took) = wait_until("everybody to be asked again", 3 * DEADLINE, || {
        let seen = asked.lock().unwrap().iter().collect::<HashSet<_>>().len();
        ensure!(
            seen == BACKENDS as usize && start.elapsed() > 2 * INTERVAL,
            "{seen} were"
        );
        Ok(())
    })?;
    let (used, probes) = (cpu_time(agent.pid())? - before, asked.lock().unwrap().len());
    println!(
        "ready after {:.1?}; {BACKENDS} backends asked {probes} times in {took:.1?} with {:.0} % of one processor",
        agent.ready_after,
        100.0 * used.as_secs_f64() / took.as_secs_f64(),
    );
    let log = fs::read_to_string(agent.log())?;
    ensure!(!log.contains("unhealthy"), "somebody was called unhealthy");
    ensure!(agent.stop()?.success());
    show_log.all_is_well();
    Ok(())
}
