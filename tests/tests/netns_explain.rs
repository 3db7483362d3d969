//! Ring 3: `forwarder explain` and `forwarder flows` on a running gateway: what is explained is what then happens to
//! real connections, and flows that are deleted are gone.
//!
//! The tests need the machine for themselves: `--test-threads=1`, as `cargo xtask test netns` does it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::{
    lab::{
        self, Lifetime,
        agent::{self, Agent},
        load::Answer,
        topology::{Extras, PORT, Site},
        wait_until,
    },
    packet::{Builder, segment},
};
use forwarder_user::{
    explain::{Explanation, Explanations},
    flows::{FlowList, FlowPhase, FlowStatus},
};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use serde::de::DeserializeOwned;

const GROUP: &str = "web";
const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 10);
/// How long what a packet did may take to show.
const DEADLINE: Duration = Duration::from_secs(5);

/// Runs `test` at a cross-region site with one listener and all backends healthy.
fn play(test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let extras = Extras {
        second_servers: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let agent = site.start_agent(&site.web_configuration(), GROUP)?;
    let outcome = test(&site, &agent);
    if outcome.is_err() {
        println!("the agent's log ends so:\n{}", lab::tail(agent.log(), 60));
    }
    outcome
}

/// Runs `forwarder <arguments>` beside the agent; its output.
fn forwarder(site: &Site, agent: &Agent, arguments: &[&str]) -> Result<String> {
    let binary = agent.binary().to_str().context("the path is text")?;
    let socket = agent.control_socket().to_str().context("the path is text")?;
    let output = site
        .gateway
        .output(binary, &[arguments, &["--socket", socket]].concat())?;
    if !output.status.success() {
        bail!(
            "`forwarder {}` failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn json<T: DeserializeOwned>(site: &Site, agent: &Agent, arguments: &[&str]) -> Result<T> {
    let text = forwarder(site, agent, &[arguments, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

fn explain(
    site: &Site,
    agent: &Agent,
    source: SocketAddr,
    destination: SocketAddr,
    more: &[&str],
) -> Result<Explanation> {
    let (source, destination) = (source.to_string(), destination.to_string());
    json(
        site,
        agent,
        &[&["explain", "tcp", &source, &destination], more].concat(),
    )
}

fn flows(site: &Site, agent: &Agent, filters: &[&str]) -> Result<Vec<FlowStatus>> {
    let list: FlowList = json(site, agent, &[&["flows"], filters].concat())?;
    ensure!(list.matching == list.flows.len() as u64, "{list:?}");
    Ok(list.flows)
}

fn vip(site: &Site) -> SocketAddr {
    SocketAddr::from((site.vip, PORT))
}

/// A connection of the client's from this port to the VIP.
fn open(site: &Site, port: u16) -> Result<TcpStream> {
    let to = vip(site);
    site.client().inside(move || {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        // It ends with a reset, so that its port is free at once.
        let linger = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&socket, sockopt::Linger, &linger)?;
        bind(
            socket.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::from((CLIENT, port))),
        )?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        stream.set_write_timeout(Some(Duration::from_millis(500)))?;
        Ok(stream)
    })?
}

/// Asks for the page on an open connection, which stays open.
fn ask(stream: &mut TcpStream) -> Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: vip\r\n\r\n")?;
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer)?;
    ensure!(length > 0, "the server closed");
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

#[test]
fn what_is_explained_of_new_flows_is_what_they_get() -> Result<()> {
    play(|site, agent| {
        let mut backends = std::collections::HashSet::new();
        for port in 40_001..40_013 {
            let client = SocketAddr::from((CLIENT, port));
            let explained = explain(site, agent, client, vip(site), &[])?;
            ensure!(flows(site, agent, &["--client", &client.to_string()])?.is_empty());
            let choice = explained.choice.clone().context("a new flow")?;
            let backend = choice.backend.context("a backend")?;
            ensure!(
                explained.interface == "eth0" && explained.is_binding_certain,
                "{explained:?}"
            );

            let mut stream = open(site, port)?;
            let page = ask(&mut stream)?;
            let server = site.server(&backend.name)?;
            ensure!(
                page.contains(&server.page),
                "{port}: explained {backend:?}, got {page}"
            );
            let found = flows(site, agent, &["--client", &client.to_string()])?;
            let [flow] = &found[..] else { bail!("{found:?}") };
            ensure!(
                Some(flow.binding) == explained.binding,
                "explained {:?}, got {flow:?}",
                explained.binding
            );
            ensure!(
                flow.backend == backend.name && flow.backend_address == backend.address,
                "{flow:?}"
            );
            let verdict = if server.is_remote {
                "request_to_stack"
            } else {
                "request_forwarded"
            };
            ensure!(
                explained.reason == verdict,
                "{}: {}",
                server.name,
                explained.reason
            );
            backends.insert(backend.name);
        }
        println!("12 flows went where it was explained, to {backends:?}");
        ensure!(backends.len() > 1, "the flows' ports all led to {backends:?}");
        Ok(())
    })
}

#[test]
fn packets_of_a_flow_and_packets_of_none_are_explained() -> Result<()> {
    play(|site, agent| {
        let client = SocketAddr::from((CLIENT, 41_000));
        let mut stream = open(site, client.port())?;
        ask(&mut stream)?;
        let of_client = client.to_string();
        let flow = flows(site, agent, &["--client", &of_client])?.remove(0);

        // Both directions of the flow.
        let request = explain(site, agent, client, vip(site), &["--flags", "ack"])?;
        let known = request.flow.context("the request's flow")?;
        ensure!(
            known.binding == flow.binding && known.state == FlowPhase::Established,
            "{known:?}"
        );
        ensure!(request.choice.is_none() && request.direction.as_deref() == Some("request"));
        let reply = explain(
            site,
            agent,
            flow.backend_address,
            flow.binding,
            &["--flags", "ack"],
        )?;
        ensure!(
            reply.direction.as_deref() == Some("reply") && reply.reason.starts_with("reply_"),
            "{reply:?}"
        );
        ensure!(
            reply.packet_after.destination.as_deref() == Some(&of_client),
            "{:?}",
            reply.packet_after
        );

        // A stranger's reply, a segment of no connection, a port without a listener, a destination of others.
        let stranger = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 80));
        let other_port = SocketAddr::from((site.vip, 81));
        let elsewhere = SocketAddr::from((Ipv4Addr::new(172, 16, 1, 10), PORT));
        for (from, to, flags, verdict, reason) in [
            (stranger, flow.binding, "syn,ack", "drop", "no_flow"),
            (
                SocketAddr::from((CLIENT, 41_001)),
                vip(site),
                "ack",
                "drop",
                "not_a_syn",
            ),
            (client, other_port, "syn", "pass", "no_listener"),
            (client, elsewhere, "syn", "pass", "not_ours"),
        ] {
            let explained = explain(site, agent, from, to, &["--flags", flags, "--interface", "eth0"])?;
            ensure!(
                explained.verdict == verdict && explained.reason == reason,
                "{from} > {to}: {explained:?}"
            );
            ensure!(explained.bytes_before == explained.bytes_after, "{explained:?}");
        }

        // For people.
        let text = forwarder(
            site,
            agent,
            &["explain", "tcp", &of_client, &vip(site).to_string()],
        )?;
        println!("{text}");
        ensure!(text.trim_end().ends_with("Nothing was changed."), "{text}");
        let wrong = forwarder(
            site,
            agent,
            &["explain", "udp", &of_client, &of_client, "--interface", "wan"],
        );
        let error = format!("{:#}", wrong.err().context("wan has no program")?);
        ensure!(
            error.contains("exit status: 2") && error.contains("eth0, eth1, cen"),
            "{error}"
        );
        Ok(())
    })
}

/// The classic capture format: a header, and per packet 16 bytes before its own.
fn write_capture(path: &Path, frames: &[Vec<u8>]) -> Result<()> {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = frame.len() as u32;
        for word in [0, 0, length, length] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(frame);
    }
    Ok(std::fs::write(path, bytes)?)
}

#[test]
fn the_packets_of_a_capture_see_each_other_s_effects() -> Result<()> {
    play(|site, agent| {
        let client = |port| SocketAddr::from((CLIENT, port));
        let frames = [
            Builder::tcp(segment::ACK, client(42_000), vip(site)).build(),
            Builder::tcp(segment::SYN, client(42_000), vip(site)).build(),
            Builder::tcp(segment::ACK, client(42_000), vip(site)).build(),
            Builder::tcp(segment::SYN, client(42_001), vip(site)).build(),
        ];
        let file = site.lab.directory().join("made.pcap");
        write_capture(&file, &frames)?;
        let path = file.to_str().context("the path is text")?;
        let explained: Explanations = json(site, agent, &["explain", "--pcap", path])?;
        let [before, opening, after, second] = &explained.packets[..] else {
            bail!("{explained:?}");
        };
        ensure!(before.reason == "not_a_syn", "{before:?}");
        ensure!(
            opening.binding.is_some() && opening.is_binding_certain,
            "{opening:?}"
        );
        ensure!(
            after.flow.as_ref().map(|flow| flow.binding) == opening.binding,
            "{after:?}"
        );
        ensure!(
            second.binding.is_some() && second.binding != opening.binding && !second.is_binding_certain,
            "{second:?}"
        );
        ensure!(flows(site, agent, &[])?.is_empty(), "explaining opened a flow");

        // What tcpdump sees of a real connection, which explains itself again from its start.
        let real = site.lab.directory().join("real.pcap");
        let real = real.to_str().context("the path is text")?;
        let mut tcpdump = site.client().command("tcpdump");
        let mut tcpdump = tcpdump
            .args(["-i", "eth0", "-w", real, "-U", "-c", "3", "--immediate-mode"])
            .args(["src host 172.16.0.10 and tcp dst port 80"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .context("tcpdump")?;
        let mut said = tcpdump.stderr.take().context("tcpdump's errors")?;
        let (mut heard, mut chunk) = (String::new(), [0; 512]);
        while !heard.contains("listening on") {
            let length = said.read(&mut chunk)?;
            ensure!(length > 0, "tcpdump ended: {heard}");
            heard += &String::from_utf8_lossy(&chunk[..length]);
        }
        let mut stream = open(site, 42_002)?;
        ask(&mut stream)?;
        ensure!(tcpdump.wait()?.success(), "{heard}");
        let text = forwarder(site, agent, &["explain", "--pcap", real, "--interface", "eth0"])?;
        println!("{text}");
        let lines: Vec<_> = text.lines().collect();
        ensure!(
            lines.len() == 5 && lines[1..4].iter().all(|line| line.contains("request_")),
            "{text}"
        );
        Ok(())
    })
}

#[test]
fn flows_are_listed_counted_and_deleted() -> Result<()> {
    play(|site, agent| {
        let mut streams = Vec::new();
        for port in 43_000..43_008 {
            let mut stream = open(site, port)?;
            ask(&mut stream)?;
            streams.push(stream);
        }
        let all = flows(site, agent, &[])?;
        ensure!(all.len() == 8, "{all:?}");
        for flow in &all {
            ensure!(
                flow.state == FlowPhase::Established
                    && flow.listener == "web"
                    && flow.packets_in >= 3
                    && flow.packets_out >= 2
                    && flow.bytes_in > 120
                    && flow.bytes_out > 300,
                "{flow:?}"
            );
        }
        // Filters, alone and together; the agent's own count agrees.
        let count = |filters: &[&str]| -> Result<usize> {
            let text = forwarder(site, agent, &[&["flows", "--count"], filters].concat())?;
            Ok(text.trim().parse()?)
        };
        let first = &all[0];
        let of_backend = all.iter().filter(|flow| flow.backend == first.backend).count();
        let vip = vip(site).to_string();
        for (filters, expected) in [
            (&["--client", "172.16.0.0/24"][..], 8),
            (&["--client", "172.16.0.10:43001"], 1),
            (&["--client", "172.16.0.11"], 0),
            (&["--vip", &vip], 8),
            (&["--backend", &first.backend], of_backend),
            (&["--backend", &format!("web/{}", first.backend)], of_backend),
            (&["--backend", &first.backend_address.to_string()], of_backend),
            (
                &["--listener", "web", "--protocol", "tcp", "--state", "established"],
                8,
            ),
            (&["--protocol", "udp"], 0),
            (&["--state", "half_open"], 0),
        ] {
            ensure!(count(filters)? == expected, "{filters:?}: {}", count(filters)?);
        }
        let limited: FlowList = json(site, agent, &["flows", "--limit", "3"])?;
        ensure!(limited.flows.len() == 3 && limited.matching == 8, "{limited:?}");
        let text = forwarder(site, agent, &["flows"])?;
        println!("{text}");
        ensure!(text.lines().count() == 9, "{text}");
        wait_until("the flows' age to be known", DEADLINE, || {
            let flows = flows(site, agent, &[])?;
            ensure!(
                flows.iter().all(|flow| flow.age_secs.is_some_and(|age| age >= 1)),
                "{flows:?}"
            );
            Ok(())
        })?;

        // Deleting asks what, deletes that, and nothing else.
        for arguments in [
            &["flows", "--delete"][..],
            &["flows", "--delete", "--listener", "wbe"],
        ] {
            let refused = forwarder(site, agent, arguments);
            let error = format!("{:#}", refused.err().context("it must be refused")?);
            ensure!(error.contains("exit status: 2"), "{error}");
        }
        let text = forwarder(
            site,
            agent,
            &["flows", "--delete", "--client", "172.16.0.10:43000"],
        )?;
        ensure!(text.trim() == "1 flow deleted", "{text}");
        ensure!(count(&[])? == 7);
        let deleted = all
            .iter()
            .find(|flow| flow.client.port() == 43_000)
            .context("it was there")?;
        ensure!(
            ask(&mut streams[0]).is_err(),
            "the deleted flow's connection still works"
        );
        for stream in &mut streams[1..] {
            ask(stream)?;
        }
        let refused = agent.packets("not_a_syn")?;
        ensure!(refused > 0, "the deleted flow's packets went somewhere");

        // A new connection from the same port works, with another binding: the old one is held back.
        drop(streams.remove(0));
        let (mut again, _) = wait_until("the port to be free", DEADLINE, || open(site, 43_000))?;
        ask(&mut again)?;
        let flow = flows(site, agent, &["--client", "172.16.0.10:43000"])?.remove(0);
        ensure!(
            flow.binding != deleted.binding,
            "{flow:?} has the deleted flow's binding"
        );
        ensure!(matches!(site.curl()?, Answer::Body(_)));

        let all: serde_json::Value = json(site, agent, &["flows", "--delete", "--all"])?;
        ensure!(all["deleted"].as_u64() >= Some(8), "{all}");
        ensure!(count(&[])? == 0);
        ensure!(matches!(site.curl()?, Answer::Body(_)), "no new connections work");
        Ok(())
    })
}
