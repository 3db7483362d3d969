//! Ring 3: `forwarder capture` and `forwarder trace` on a running gateway: what real connections look like to the data
//! path, on both sides, which tcpdump does not see.

use std::{
    fs,
    net::{SocketAddr, SocketAddrV4},
    path::PathBuf,
    process::Output,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use forwarder_tests::{
    lab::{
        self, Lifetime, Namespace,
        agent::{self, Agent, ShowLog},
        load::curl,
        topology::{Extras, PORT, Site},
        wait_until,
    },
    packet::{Builder, ETHERNET_LEN, segment},
};
use forwarder_user::capture::TracedPacket;
use socket2::{Domain, Protocol, Socket, Type};

const DEADLINE: Duration = Duration::from_secs(10);

fn play(test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&site.web_configuration(), "web")?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

fn succeeded(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread has panicked"))?
}

/// The capture has begun as soon as its file has a header.
fn await_file(file: &PathBuf) -> Result<()> {
    wait_until("the capture to begin", DEADLINE, || {
        ensure!(fs::metadata(file)?.len() > 0, "the file is empty");
        Ok(())
    })?;
    Ok(())
}

/// Sends an acknowledgment that no connection has.
fn send_stray_segment(client: &Namespace, site: &Site) -> Result<()> {
    let source = SocketAddrV4::new("172.16.0.10".parse()?, 40_404);
    let frame = Builder::tcp(segment::ACK, source, SocketAddrV4::new(site.vip, PORT)).build();
    let socket = client
        .inside(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))))?
        .context("a raw socket")?;
    socket.send_to(
        &frame[ETHERNET_LEN..],
        &SocketAddr::new(site.vip.into(), 0).into(),
    )?;
    Ok(())
}

#[test]
fn a_capture_has_both_sides_of_a_connection_with_verdict_and_reason() -> Result<()> {
    play(|site, agent| {
        let file = site.lab.directory().join("web.pcapng");
        let name = file.to_str().context("the path is text")?;
        let port = PORT.to_string();
        thread::scope(|scope| {
            let arguments = ["--write", name, "--port", &port, "--network", "172.16.0.10"];
            let limits = ["--count", "4", "--for", "10s"];
            let capture = scope.spawn(move || agent.ask("capture", &[&arguments[..], &limits].concat()));
            await_file(&file)?;
            curl(site.client(), site.vip, PORT)?.body().context("a page")?;
            succeeded(&joined(capture)?)
        })?;
        let seen = site.client().run(&format!("tcpdump -n -r {name}"))?;
        let lines: Vec<&str> = seen.lines().collect();
        // Four requests of the client, each as it came and as it left.
        ensure!(lines.len() == 8, "{seen}");
        let vip = format!("> {}.{PORT}: Flags [S]", site.vip);
        ensure!(
            lines[0].contains("IP 172.16.0.10.") && lines[0].contains(&vip),
            "{seen}"
        );
        ensure!(
            lines[1].contains("IP 100.64.0.") && lines[1].contains("Flags [S]"),
            "{seen}"
        );
        let bytes = fs::read(&file)?;
        let text = String::from_utf8_lossy(&bytes);
        for wanted in [
            "send: request_forwarded",
            "; listener web, backend web/ecs0",
            "eth0",
        ] {
            ensure!(text.contains(wanted), "no \"{wanted}\" in the file");
        }
        Ok(())
    })
}

#[test]
fn a_trace_says_why_a_packet_went_no_further() -> Result<()> {
    play(|site, agent| {
        thread::scope(|scope| {
            let trace = scope.spawn(|| {
                let arguments = [
                    "--dropped",
                    "--port",
                    "40404",
                    "--count",
                    "1",
                    "--for",
                    "10s",
                    "-o",
                    "json",
                ];
                succeeded(&agent.ask("trace", &arguments)?)
            });
            // Until the trace has begun, nobody sees them.
            wait_until("the trace to end", DEADLINE, || {
                send_stray_segment(site.client(), site)?;
                ensure!(trace.is_finished(), "nothing was traced yet");
                Ok(())
            })?;
            let traced: TracedPacket = serde_json::from_str(&joined(trace)?)?;
            ensure!(
                (traced.verdict.as_str(), traced.reason.as_str()) == ("drop", "not_a_syn"),
                "{traced:?}"
            );
            ensure!(
                traced.interface == "eth0" && traced.becomes.is_none(),
                "{traced:?}"
            );
            ensure!(
                traced.packet.source.as_deref() == Some("172.16.0.10:40404"),
                "{traced:?}"
            );
            Ok(())
        })
    })
}

#[test]
fn one_captures_at_a_time_and_nobody_afterwards() -> Result<()> {
    play(|site, agent| {
        let file = site.lab.directory().join("all.pcapng");
        let name = file.to_str().context("the path is text")?;
        thread::scope(|scope| {
            let capture =
                scope.spawn(|| succeeded(&agent.ask("capture", &["--write", name, "--for", "3s"])?));
            await_file(&file)?;
            let refused = agent.ask("trace", &["--for", "1s"])?;
            ensure!(!refused.status.success());
            let said = String::from_utf8_lossy(&refused.stderr);
            ensure!(said.contains("somebody captures packets already"), "{said}");
            joined(capture)
        })?;
        wait_until("the maps to be free", DEADLINE, || {
            succeeded(&agent.ask("trace", &["--for", "100ms"])?)
        })?;
        // What does not exist is named.
        let refused = agent.ask("trace", &["--reason", "nonsense"])?;
        ensure!(String::from_utf8_lossy(&refused.stderr).contains("nonsense"));
        Ok(())
    })
}
