//! Ring 3: `forwarder doctor` on labs that are broken in one way each.
//!
//! It has to name the cause first, without an agent and beside one, and its commands, pasted on the machines it
//! names, have to mend it: afterwards it finds nothing, and traffic flows. No test knows a command: they come from
//! the JSON. Two are for service managers, which labs lack; the lab does what they say (`Patient::paste`).
//!
//! Large receive offload is missing here: no device of a namespace has it (veth, VXLAN, TUN, bridge, macvlan), so
//! that check is tested in a machine that has such a card (`vm_doctor.rs`).

use std::{fs, net::Ipv4Addr, path::PathBuf, process::Output, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent},
    configuration::{Check, Configuration},
    load::Answer,
    nginx::large_file,
    topology::{Extras, PORT, PROBE_ADDRESS, Site},
    wait_until,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Requests that show whether all backends serve: enough that a share of one half is never missed.
const REQUESTS: u32 = 24;
/// Until a mended backend is healthy again: two probes, and what the probe under way still waits for.
const RECOVERY: Duration = Duration::from_secs(10);
/// Causes that may hide behind one another.
const ROUNDS: usize = 3;

/// A lab, its configuration file and perhaps its agent.
struct Patient {
    site: Site,
    file: PathBuf,
    agent: Option<Agent>,
}

impl Patient {
    fn new(site: Site, configuration: &Configuration) -> Result<Self> {
        let file = site.lab.directory().join("forwarder.toml");
        fs::write(&file, configuration.to_string())?;
        Ok(Self {
            site,
            file,
            agent: None,
        })
    }

    /// Starts the agent with the file as it is now, instead of the one that runs.
    fn start_agent(&mut self) -> Result<()> {
        if let Some(agent) = self.agent.take() {
            agent.stop()?;
        }
        let configuration = Configuration::from_text(fs::read_to_string(&self.file)?);
        self.agent = Some(Agent::start(&self.site.lab, &self.site.gateway, &configuration)?);
        Ok(())
    }

    fn doctor(&self, arguments: &[&str]) -> Result<Output> {
        let (binary, file) = (agent::binary()?, self.file.display().to_string());
        let command = [&["doctor", "-c", &file], arguments].concat();
        self.site.gateway.output(&binary.display().to_string(), &command)
    }

    /// What `doctor -o json` says; its exit status has to agree.
    fn examine(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.doctor(&[&["-o", "json"], arguments].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
        let expected = i32::from(report["well"] != Value::Bool(true));
        ensure!(
            output.status.code() == Some(expected),
            "{}: {report:#}",
            output.status
        );
        Ok(report)
    }

    /// It breaks for this reason above all, whether or not an agent runs.
    fn expect(&self, cause: &str) -> Result<Value> {
        let report = self.examine(&[])?;
        let first = &report["findings"][0];
        ensure!(
            first["cause"] == cause && first["severity"] == "broken",
            "expected {cause} first: {report:#}"
        );
        let addresses = self.site.gateway.run("ip -oneline address show dev lo")?;
        ensure!(
            self.agent.is_some() || !addresses.contains("100.64."),
            "a probe address was left behind: {addresses}"
        );
        Ok(first.clone())
    }

    /// Does what a finding says, where it says so.
    fn paste(&mut self, finding: &Value) -> Result<()> {
        let fixes = finding["fixes"].as_array().context("a list of fixes")?;
        ensure!(!fixes.is_empty(), "no command: {finding:#}");
        for fix in fixes {
            let command = fix["command"].as_str().context("a command")?;
            println!("{}: {command}", fix["host"]);
            match command {
                "systemctl restart forwarder" => self.start_agent()?,
                "systemctl start nginx" => {
                    let address: Ipv4Addr = serde_json::from_value(fix["address"].clone())?;
                    let server = self.site.servers.iter().find(|server| server.address == address);
                    let name = server.context("a server")?.name;
                    self.site.start_nginx(name)?;
                }
                command => {
                    let host = self.host(fix)?;
                    let output = host.output("sh", &["-c", command])?;
                    let said = String::from_utf8_lossy(&output.stderr);
                    ensure!(output.status.success(), "`{command}` on {}: {said}", host.role());
                }
            }
        }
        Ok(())
    }

    /// The machine that a command is for.
    fn host(&self, fix: &Value) -> Result<&Namespace> {
        match fix["host"].as_str() {
            Some("gateway") => Ok(&self.site.gateway),
            Some("router") => Ok(&self.site.far_router),
            Some("server") => {
                let address: Ipv4Addr = serde_json::from_value(fix["address"].clone())?;
                let server = self.site.servers.iter().find(|server| server.address == address);
                Ok(&server.context("a server")?.namespace)
            }
            other => bail!("a host called {other:?}"),
        }
    }

    /// Nothing is found any more, warnings included.
    fn is_well(&self) -> Result<()> {
        let report = self.examine(&[])?;
        let findings = report["findings"].as_array().context("a list of findings")?;
        ensure!(findings.is_empty(), "{report:#}");
        Ok(())
    }
}

/// Every server answers the client, and no request fails.
fn all_serve(site: &Site) -> Result<()> {
    let mut silent: Vec<_> = site.servers.iter().map(|server| server.name).collect();
    for _ in 0..REQUESTS {
        match site.curl()? {
            Answer::Body(page) => {
                let server = site.answered_by(&page).context("a page of a server")?;
                silent.retain(|name| *name != server.name);
            }
            Answer::Failed(why) => bail!("a request failed: {why}"),
        }
    }
    ensure!(silent.is_empty(), "no answer from {silent:?}");
    Ok(())
}

/// Large files reach every server.
fn all_take_large_files(site: &Site) -> Result<()> {
    all_serve(site)?;
    let file = site.lab.directory().join("large-to-send");
    fs::write(&file, &large_file()[..256 << 10])?;
    for _ in 0..REQUESTS {
        let url = format!("http://{}/", site.vip);
        let body = format!("@{}", file.display());
        let arguments = [
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "4",
            "--data-binary",
            &body,
            &url,
        ];
        let output = site.client().output("curl", &arguments)?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn can_run() -> bool {
    lab::can_run_test(Some(agent::binary()))
}

/// Breaks a sound lab by `spoil`, expects `cause` first, does what the doctor says until it has nothing left to say,
/// and expects `works` of the agent then and not before.
fn heal(
    cause: &str,
    configure: impl FnOnce(&mut Site) -> Configuration,
    spoil: impl FnOnce(&mut Site) -> Result<()>,
    works: impl Fn(&Site) -> Result<()>,
) -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let configuration = configure(&mut site);
    spoil(&mut site)?;
    let mut patient = Patient::new(site, &configuration)?;

    patient.expect(cause)?;
    patient.start_agent()?;
    let finding = patient.expect(cause)?;
    println!("{finding:#}");
    ensure!(works(&patient.site).is_err(), "it works, broken as it is");

    patient.paste(&finding)?;
    // What it hid may show now.
    for _ in 1..ROUNDS {
        let next = patient.examine(&[])?["findings"][0].clone();
        if next.is_null() {
            break;
        }
        ensure!(next["cause"] != cause, "still there: {next:#}");
        patient.paste(&next)?;
    }
    patient.is_well()?;
    wait_until("traffic to flow", RECOVERY, || works(&patient.site))?;
    Ok(())
}

/// [`heal`] with the configuration that fits the lab and ordinary requests.
fn heal_host(cause: &str, spoil: impl FnOnce(&mut Site) -> Result<()>) -> Result<()> {
    heal(cause, |site| site.web_configuration(), spoil, all_serve)
}

/// A namespace of the lab that [`Site`] has no handle for.
fn run_in(site: &Site, role: &str, arguments: &str) -> Result<()> {
    let name = site.gateway.name().replace("gateway", role);
    site.gateway.run(&format!("ip -n {name} {arguments}")).map(drop)
}

#[test]
fn a_wrong_route() -> Result<()> {
    heal_host("wrong-route", |site| {
        site.gateway
            .run("ip route replace 192.168.0.0/16 via 198.51.100.2")
            .map(drop)
    })
}

#[test]
fn a_missing_route() -> Result<()> {
    heal_host("no-route", |site| {
        site.gateway.run("ip route del 192.168.0.0/16").map(drop)
    })
}

#[test]
fn a_missing_back_to_origin_route() -> Result<()> {
    heal_host("no-return-route", |site| {
        site.far_router.run("ip route del 100.64.0.0/26").map(drop)
    })
}

#[test]
fn strict_source_validation() -> Result<()> {
    heal_host("rp-filter", |site| {
        site.gateway.sysctl("net/ipv4/conf/eth0/rp_filter", "1")
    })
}

#[test]
fn a_tunnel_that_is_down() -> Result<()> {
    heal_host("tunnel-down", |site| {
        site.gateway.run("ip link set cen down").map(drop)
    })
}

#[test]
fn a_carrier_with_too_small_an_mtu() -> Result<()> {
    let spoil = |site: &mut Site| {
        // A link that drops what is too large. Without segments that only a real one would cut.
        run_in(site, "transit-chengdu", "link set eth0 mtu 1400")?;
        for feature in [
            "tx-udp_tnl-segmentation",
            "tx-udp_tnl-csum-segmentation",
            "tso",
            "gso",
        ] {
            site.gateway.offload("wan", feature, false)?;
        }
        Ok(())
    };
    heal(
        "mtu-too-small",
        |site| site.web_configuration(),
        spoil,
        all_take_large_files,
    )
}

#[test]
fn a_vip_whose_interface_is_not_attached() -> Result<()> {
    let configure = |site: &mut Site| {
        site.interfaces = &["eth1"];
        site.web_configuration()
    };
    heal("vip-not-attached", configure, |_| Ok(()), all_serve)
}

#[test]
fn a_host_address_inside_a_remote_network() -> Result<()> {
    heal_host("overlapping-network", |site| {
        site.gateway.run("ip link add name lan type bridge")?;
        site.gateway.run("ip link set lan up")?;
        site.gateway.address("lan", "192.168.1.1/24")
    })
}

#[test]
fn a_host_route_inside_a_remote_network() -> Result<()> {
    heal_host("overlapping-network", |site| {
        site.gateway
            .run("ip route add 192.168.1.0/25 via 198.51.100.2")
            .map(drop)
    })
}

#[test]
fn a_host_that_does_not_forward() -> Result<()> {
    heal_host("forwarding-off", |site| {
        site.gateway.sysctl("net/ipv4/ip_forward", "0")
    })
}

#[test]
fn a_missing_neighbour() -> Result<()> {
    heal_host("no-neighbour", |site| {
        site.far_router.run("ip link set cen arp off")?;
        site.gateway.run("ip neigh flush dev cen").map(drop)
    })
}

#[test]
fn a_remote_firewall_that_drops() -> Result<()> {
    heal_host("filtered", |site| {
        site.server("ecs02")?
            .namespace
            .security_group(&["192.168.0.0/16"])
    })
}

/// A firewall that answers the pool with `verdict`.
fn reject(site: &Site, server: &str, verdict: &str) -> Result<()> {
    let script = format!(
        "table inet filter {{ chain input {{ type filter hook input priority filter; policy accept; {verdict}; }}; }}"
    );
    let server = site.server(server)?;
    server
        .namespace
        .run_with_input("nft -f -", Some(&script))
        .map(drop)
}

#[test]
fn a_remote_firewall_that_rejects() -> Result<()> {
    heal_host("rejected", |site| {
        reject(site, "ecs02", "ip saddr 100.64.0.0/10 reject")
    })
}

#[test]
fn a_firewall_that_refuses_in_the_servers_name() -> Result<()> {
    let verdict = "ip saddr 100.64.0.0/10 tcp dport 80 reject with tcp reset";
    heal_host("rejected", |site| reject(site, "ecs01", verdict))
}

#[test]
fn a_server_that_is_stopped() -> Result<()> {
    heal_host("refused", |site| site.stop_nginx("ecs02"))
}

#[test]
fn a_wrong_port() -> Result<()> {
    let configure = |site: &mut Site| {
        let mut configuration = site.configuration(&[]).group("web", "full", Check::Http);
        for server in &site.servers {
            let port = if server.is_remote { 8081 } else { PORT };
            configuration = configuration.backend("web", server.name, server.address, port, 100);
        }
        configuration.listener("web", site.vip, PORT, "tcp", "web")
    };
    heal("wrong-port", configure, |_| Ok(()), all_serve)
}

/// As a VRF does it: a table of its own that ends in "unreachable".
#[test]
fn a_routing_table_without_the_route() -> Result<()> {
    heal_host("table-without-route", |site| {
        site.gateway.run("ip rule add to 192.168.0.0/16 lookup 42")?;
        site.gateway
            .run("ip route add unreachable default metric 4278198272 table 42")
            .map(drop)
    })
}

#[test]
fn a_rule_for_forwarded_packets_only() -> Result<()> {
    heal_host("forwarded-elsewhere", |site| {
        site.gateway
            .run("ip rule add priority 500 iif eth0 to 192.168.0.0/16 lookup 77")?;
        site.gateway
            .run("ip route add unreachable default table 77")
            .map(drop)
    })
}

/// Without an agent, which adds the rule for the network's table, the doctor borrows one for as long as it looks.
#[test]
fn a_routing_table_of_the_configuration_without_the_route() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let text = site.web_configuration().to_string();
    let text = text.replace("[network.vpc2]", "[network.vpc2]\ntable = 42");
    site.gateway.run("ip route del 192.168.0.0/16")?;
    let mut patient = Patient::new(site, &Configuration::from_text(text))?;
    let rules = patient.site.gateway.run("ip rule")?;
    let finding = patient.expect("table-without-route")?;
    patient.paste(&finding)?;
    patient.is_well()?;
    assert_eq!(patient.site.gateway.run("ip rule")?, rules);
    Ok(())
}

#[test]
fn a_sound_gateway_is_left_as_it_was() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let configuration = site.web_configuration();
    let mut patient = Patient::new(site, &configuration)?;
    let look = |site: &Site| -> Result<String> {
        let commands = [
            "ip address",
            "ip route show table all",
            "ip rule",
            "ip -details link show dev eth0",
        ];
        commands.iter().map(|command| site.gateway.run(command)).collect()
    };
    let before = look(&patient.site)?;
    patient.is_well()?;
    assert_eq!(look(&patient.site)?, before);
    let text = String::from_utf8(patient.doctor(&[])?.stdout)?;
    println!("{text}");
    assert!(text.starts_with("all well\n"), "{text}");

    patient.start_agent()?;
    let before = look(&patient.site)?;
    patient.is_well()?;
    assert_eq!(look(&patient.site)?, before);
    let report = patient.examine(&["--group", "web"])?;
    assert_eq!(report["host"]["agent_running"], true);
    assert_eq!(report["interfaces"][0]["mode"], "native");
    let unknown = patient.doctor(&["--group", "wbe"])?;
    assert_eq!(unknown.status.code(), Some(2));
    all_serve(&patient.site)
}

/// Beside the agent, which uses all but one address of the other prefix for traffic.
#[test]
fn every_prefix_of_the_pool_needs_its_way_back() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    site.server("ecs02")?
        .namespace
        .route("100.64.8.0/24", Ipv4Addr::new(192, 168, 1, 1))?;
    let text = site.web_configuration().to_string();
    let text = text.replace("\"100.64.0.0/26\"", "\"100.64.0.0/26\", \"100.64.8.0/24\"");
    let mut patient = Patient::new(site, &Configuration::from_text(text))?;
    patient.start_agent()?;
    // The remote router lacks it, and the local server.
    for cause in ["no-return-route", "no-return-route-or-filtered"] {
        let finding = patient.expect(cause)?;
        ensure!(!finding.to_string().contains("100.64.0.0/26"), "{finding:#}");
        patient.paste(&finding)?;
    }
    patient.is_well()
}

/// Ctrl-C in the middle of it takes the probe address away again.
#[test]
fn an_interrupted_doctor_cleans_up() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    // Silence keeps it busy for seconds.
    site.server("ecs02")?
        .namespace
        .security_group(&["192.168.0.0/16"])?;
    let configuration = site.web_configuration();
    let patient = Patient::new(site, &configuration)?;
    let has_address = || -> Result<bool> {
        let addresses = patient.site.gateway.run("ip -oneline address show dev lo")?;
        Ok(addresses.contains(&PROBE_ADDRESS.to_string()))
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let binary = agent::binary()?;
        let service = lab::Service {
            name: "the doctor",
            program: &binary,
            arguments: &["doctor".as_ref(), "-c".as_ref(), patient.file.as_ref()],
            environment: &[],
            stop_signal: signal,
            log: &patient.site.lab.directory().join("doctor.log"),
        };
        let process = patient.site.lab.spawn(&patient.site.gateway, &service)?;
        wait_until("the probe address", RECOVERY, || {
            ensure!(has_address()?, "not there yet");
            Ok(())
        })?;
        let status = process.stop()?;
        assert_eq!(
            status.code(),
            Some(1),
            "{signal}: {}",
            lab::tail(process.log(), 5)
        );
        assert!(!has_address()?, "{signal}");
    }
    Ok(())
}
