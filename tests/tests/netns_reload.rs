//! Ring 3: the configuration changes while the agent runs; flows, counters and what did not change stay.
//! `--test-threads=1`, as the other labs.

use std::{process::Output, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    load::{Connections, KeptConnection, curl, wrk},
    status::HEALTHY,
    topology::{Extras, POOL, PORT, PROBE_ADDRESS, Site},
    wait_until,
};
use nix::sys::signal::Signal;

const GROUP: &str = "web";
const CONNECTIONS: u32 = 32;
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `test` at a site with four servers of which the agent knows `names`.
fn play(names: &[&str], test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    play_in("full", names, test)
}

/// The same with a NAT mode.
fn play_in(nat: &str, names: &[&str], test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let extras = Extras {
        second_servers: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(
        &with_nat(
            &site,
            nat,
            &names.iter().map(|name| (*name, 100)).collect::<Vec<_>>(),
        ),
        GROUP,
    )?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

/// One listener, and a group of these servers with their weights.
fn with(site: &Site, servers: &[(&str, u16)]) -> Configuration {
    with_nat(site, "full", servers)
}

fn with_nat(site: &Site, nat: &str, servers: &[(&str, u16)]) -> Configuration {
    let mut configuration = site.configuration(&[]).group(GROUP, nat, Check::Http);
    for (name, weight) in servers {
        let address = site.server(name).expect("a server of the site").address;
        configuration = configuration.backend(GROUP, name, address, PORT, *weight);
    }
    let configuration = configuration.listener("web", site.vip, PORT, "tcp", GROUP);
    // A slow machine needs longer for its orders than the ten seconds that flows may be idle in labs.
    let text = configuration
        .to_string()
        .replace("idle_timeout = \"10s\"", "idle_timeout = \"300s\"");
    Configuration::from_text(text)
}

/// Writes the configuration to a file of its own and runs a verb on it.
fn verb(site: &Site, agent: &Agent, verb: &str, configuration: &Configuration) -> Result<Output> {
    let file = site.lab.directory().join("next.toml");
    std::fs::write(&file, configuration.to_string())?;
    agent.ask(
        verb,
        &["-c", file.to_str().context("the path is text")?, "-o", "json"],
    )
}

fn apply(site: &Site, agent: &Agent, configuration: &Configuration) -> Result<serde_json::Value> {
    let output = verb(site, agent, "apply", configuration)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn wait_for_health(agent: &Agent, backends: usize) -> Result<()> {
    wait_until("all backends to be healthy", DEADLINE, || {
        let found = agent.backends(GROUP)?;
        ensure!(
            found.len() == backends && found.iter().all(|one| one.health == HEALTHY),
            "{found:?}"
        );
        Ok(())
    })
    .map(drop)
}

fn opened(agent: &Agent, name: &str) -> Result<u64> {
    Ok(agent.backend(GROUP, name)?.traffic.connections_opened)
}

/// Connections opened to the group, by whatever backend.
fn group_opened(agent: &Agent) -> Result<u64> {
    let groups = agent.status()?.groups;
    let group = groups.iter().find(|one| one.name == GROUP).context("the group")?;
    Ok(group.traffic.connections_opened)
}

#[test]
fn backends_come_and_go_and_open_connections_stay() -> Result<()> {
    play(&["ecs01", "ecs02"], |site, agent| {
        // A connection to each server.
        let mut kept = Vec::new();
        for name in ["ecs01", "ecs02"] {
            let page = &site.server(name)?.page;
            let (connection, _) = wait_until("a connection to each server", DEADLINE, || {
                let mut connection = KeptConnection::open(site.client(), site.vip, PORT)?;
                ensure!(connection.get()? == *page);
                Ok(connection)
            })?;
            kept.push((connection, page.clone()));
        }
        let before = opened(agent, "ecs02")?;
        let all = with(site, &[("ecs01", 100), ("ecs02", 100), ("ecs03", 100)]);

        // What `plan` says is what `apply` does, and then there is nothing left to do.
        let plan: serde_json::Value = serde_json::from_slice(&verb(site, agent, "plan", &all)?.stdout)?;
        assert_eq!(plan["agent_is_running"], true);
        assert_eq!(plan["applied"], false);
        assert_eq!(agent.backends(GROUP)?.len(), 2, "plan changes nothing");
        let applied = apply(site, agent, &all)?;
        assert_eq!(applied["applied"], true);
        assert_eq!(
            (&plan["changes"], &plan["writes"]),
            (&applied["changes"], &applied["writes"])
        );
        let again: serde_json::Value = serde_json::from_slice(&verb(site, agent, "plan", &all)?.stdout)?;
        assert_eq!(again["changes"], serde_json::json!([]));

        wait_for_health(agent, 3)?;
        wait_until("the new server to answer", DEADLINE, || {
            let answer = site.curl()?;
            ensure!(answer.body() == Some(&site.server("ecs03")?.page), "{answer:?}");
            Ok(())
        })?;
        assert_eq!(agent.backend(GROUP, "ecs03")?.share.round(), 0.0);
        // It may have answered while the new server was waited for.
        let so_far = opened(agent, "ecs02")?;
        ensure!(so_far >= before, "counters go on");

        // ECS02 goes; its connection does not.
        apply(site, agent, &with(site, &[("ecs01", 100), ("ecs03", 300)]))?;
        for _ in 0..30 {
            let answer = site.curl()?;
            ensure!(
                answer
                    .body()
                    .is_some_and(|body| *body != site.server("ecs02").unwrap().page),
                "{answer:?}"
            );
        }
        for (connection, page) in &mut kept {
            assert_eq!(connection.get()?, *page);
        }
        let share = agent.backend(GROUP, "ecs03")?.share;
        ensure!((share - 0.75).abs() < 0.01, "{share}");

        // It comes back under its old number: its counters go on, although it was away.
        apply(site, agent, &all)?;
        assert_eq!(opened(agent, "ecs02")?, so_far);

        // Away for good: once its connection has ended, its number is free, and a newcomer counts from zero.
        apply(site, agent, &with(site, &[("ecs01", 100)]))?;
        let (ecs02, page) = &mut kept[1];
        assert_eq!(ecs02.get()?, *page);
        kept.clear();
        wait_until(
            "the agent to say that ECS02 is drained",
            Duration::from_secs(120),
            || {
                let log = std::fs::read_to_string(agent.log())?;
                let drained = log
                    .lines()
                    .filter(|line| line.contains("drained") && line.contains("ecs02"));
                ensure!(drained.count() == 1, "not yet");
                Ok(())
            },
        )?;
        let of_group = group_opened(agent)?;
        apply(site, agent, &with(site, &[("ecs01", 100), ("ecs04", 100)]))?;
        assert_eq!(opened(agent, "ecs04")?, 0);
        // What ECS02 and ECS03 have counted stays their group's, and another agent knows it, too.
        let sum: u64 = ["ecs01", "ecs04"]
            .into_iter()
            .map(|name| opened(agent, name))
            .sum::<Result<u64>>()?;
        ensure!(of_group > sum && group_opened(agent)? >= of_group, "{of_group}");
        agent.end(Signal::SIGKILL)?;
        let agent = site.start_agent(&with(site, &[("ecs01", 100), ("ecs04", 100)]), GROUP)?;
        ensure!(group_opened(&agent)? >= of_group);
        Ok(())
    })
}

#[test]
fn connections_in_dnat_stay_when_their_backends_have_gone_and_other_agents_come() -> Result<()> {
    play_in("dnat", &["ecs01", "ecs02"], |site, agent| {
        let mut kept = Vec::new();
        for name in ["ecs01", "ecs02"] {
            let page = &site.server(name)?.page;
            let (connection, _) = wait_until("a connection to each server", DEADLINE, || {
                let mut connection = KeptConnection::open(site.client(), site.vip, PORT)?;
                ensure!(connection.get()? == *page);
                Ok(connection)
            })?;
            kept.push((connection, page.clone()));
        }
        let mut answers = || -> Result<()> {
            for (connection, page) in &mut kept {
                assert_eq!(connection.get()?, *page);
            }
            Ok(())
        };
        let others = with_nat(site, "dnat", &[("ecs03", 100)]);
        apply(site, agent, &others)?;
        answers()?;
        agent.end(Signal::SIGKILL)?;
        answers()?;
        let agent = site.start_agent(&others, GROUP)?;
        answers()?;
        // A configuration that has forgotten them twice.
        apply(site, &agent, &with_nat(site, "dnat", &[("ecs04", 100)]))?;
        answers()
    })
}

#[test]
fn reloads_under_load_lose_no_request() -> Result<()> {
    for kind in [Connections::KeepAlive, Connections::PerRequest] {
        play(&["ecs01", "ecs02"], |site, agent| {
            site.client()
                .sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
            site.client().sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            let configurations = [
                with(
                    site,
                    &[("ecs01", 100), ("ecs02", 100), ("ecs03", 100), ("ecs04", 50)],
                ),
                with(site, &[("ecs01", 10), ("ecs03", 300)]),
                with(site, &[("ecs01", 100), ("ecs02", 100)]).listener("more", site.vip, 8080, "tcp", GROUP),
                with(site, &[("ecs01", 100), ("ecs02", 100)]),
            ];
            let (reloads, load) = thread::scope(|scope| {
                let load = scope.spawn(|| {
                    wrk(
                        site.client(),
                        site.vip,
                        PORT,
                        kind,
                        CONNECTIONS,
                        Duration::from_secs(10),
                    )
                });
                let mut last = 0;
                let reloads = configurations
                    .iter()
                    .cycle()
                    .take(12)
                    .try_for_each(|configuration| {
                        apply(site, agent, configuration)?;
                        // ECS01 is in all of them.
                        wait_until("traffic", DEADLINE, || {
                            let now = agent.backend(GROUP, "ecs01")?.traffic.packets_in;
                            ensure!(now >= last, "a counter went back: {now} after {last}");
                            ensure!(now > last, "no packet since {last}");
                            last = now;
                            Ok(())
                        })
                        .map(drop)
                    });
                (reloads, load.join())
            });
            reloads?;
            let load = load.map_err(|_| anyhow::anyhow!("wrk's thread panicked"))??;
            println!("{kind:?}: {load:?}");
            ensure!(
                load.requests > 0 && load.socket_errors == 0 && load.refused == 0,
                "requests failed: {load:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn listeners_come_and_go_and_a_restart_knows_them() -> Result<()> {
    play(&["ecs01"], |site, agent| {
        let two = with(site, &[("ecs01", 100)]).listener("more", site.vip, 8080, "tcp", GROUP);
        ensure!(curl(site.client(), site.vip, 8080)?.body().is_none());
        // By the signal this time, from the agent's own file.
        agent.rewrite(&two)?;
        agent.signal(Signal::SIGHUP);
        wait_until("the new listener to answer", DEADLINE, || {
            let answer = curl(site.client(), site.vip, 8080)?;
            ensure!(answer.body().is_some(), "{answer:?}");
            Ok(())
        })?;
        let mut kept = KeptConnection::open(site.client(), site.vip, 8080)?;
        let page = kept.get()?;
        apply(site, agent, &with(site, &[("ecs01", 100)]))?;
        ensure!(curl(site.client(), site.vip, 8080)?.body().is_none());
        assert_eq!(kept.get()?, page, "the removed listener's connection goes on");

        // Another agent, with a configuration of its own, finds the numbers where they were.
        let before = agent.status()?.listeners[0].traffic.connections_opened;
        agent.end(Signal::SIGKILL)?;
        let agent = site.start_agent(&two, GROUP)?;
        assert_eq!(kept.get()?, page);
        let status = agent.status()?;
        assert_eq!(status.listeners.len(), 2);
        let web = status
            .listeners
            .iter()
            .find(|one| one.name == "web")
            .context("web")?;
        assert_eq!(web.traffic.connections_opened, before);
        Ok(())
    })
}

#[test]
fn a_file_that_changes_is_applied_if_it_says_so() -> Result<()> {
    play(&["ecs01", "ecs02"], |site, agent| {
        agent.end(Signal::SIGKILL)?;
        let watched = |configuration: Configuration| configuration.agent_key("reload_on_change", "true");
        let both = watched(with(site, &[("ecs01", 100), ("ecs02", 100)]));
        let agent = site.start_agent(&both, GROUP)?;
        let log = || Ok::<_, anyhow::Error>(std::fs::read_to_string(agent.log())?);
        let mut kept = KeptConnection::open(site.client(), site.vip, PORT)?;
        let page = kept.get()?;

        // Written in place.
        agent.rewrite(&watched(with(site, &[("ecs01", 100), ("ecs03", 100)])))?;
        let names = |agent: &Agent| -> Result<Vec<String>> {
            Ok(agent.backends(GROUP)?.into_iter().map(|one| one.name).collect())
        };
        wait_until("the change to be applied", DEADLINE, || {
            ensure!(
                names(&agent)? == ["ecs01", "ecs03"],
                "{}",
                lab::tail(agent.log(), 5)
            );
            Ok(())
        })?;
        ensure!(log()?.contains("+ backend web/ecs03"), "the plan is in the log");
        // What is wrong is refused, and what was in force stays so.
        agent.rewrite(&Configuration::from_text("[agent]\nnonsense = 1\n".to_owned()))?;
        wait_until("the agent to refuse", DEADLINE, || {
            ensure!(log()?.contains("not reloaded"), "{}", lab::tail(agent.log(), 3));
            Ok(())
        })?;
        assert_eq!(names(&agent)?, ["ecs01", "ecs03"]);
        // By another file that takes its name, as editors do. It does not want to be watched any more.
        let other = agent.configuration().with_extension("swp");
        std::fs::write(&other, with(site, &[("ecs01", 100)]).to_string())?;
        std::fs::rename(&other, agent.configuration())?;
        wait_until("the change to be applied", DEADLINE, || {
            ensure!(names(&agent)? == ["ecs01"], "{}", lab::tail(agent.log(), 5));
            Ok(())
        })?;
        let reloads = log()?.matches("it has changed").count();
        agent.rewrite(&both)?;
        agent.signal(Signal::SIGHUP);
        wait_until("the reload", DEADLINE, || {
            ensure!(names(&agent)?.len() == 2, "{}", lab::tail(agent.log(), 5));
            Ok(())
        })?;
        assert_eq!(log()?.matches("it has changed").count(), reloads);
        assert_eq!(kept.get()?, page);
        Ok(())
    })
}

#[test]
fn what_is_wrong_or_fixed_is_refused_and_changes_nothing() -> Result<()> {
    play(&["ecs01", "ecs02"], |site, agent| {
        let before = agent.status()?;
        let good = with(site, &[("ecs01", 100), ("ecs02", 100)]);
        // Every error at once, with its line.
        let broken = good
            .clone()
            .table("listener.broken", &[("vip", "\"nowhere\""), ("port", "0")]);
        let output = verb(site, agent, "apply", &broken)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        ensure!(
            stderr.matches("next.toml:").count() >= 3,
            "vip, port and group are wrong: {stderr}"
        );
        for (configuration, key) in [
            (good.clone().agent_key("max_flows", "65536"), "agent.max_flows"),
            (good.clone().interface("wan", &[]), "[interface]"),
            (
                Configuration::default().raw(&good.to_string().replace("\"full\"", "\"dnat\"")),
                "DNAT mode",
            ),
            (
                Configuration::default().raw(
                    &good
                        .to_string()
                        .replace("100.64.0.0/26", "100.64.1.0/26")
                        .replace(&PROBE_ADDRESS.to_string(), "100.64.1.1"),
                ),
                "snat.prefixes",
            ),
        ] {
            for kind in ["plan", "apply"] {
                let output = verb(site, agent, kind, &configuration)?;
                let stderr = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), Some(2), "{kind} {key}: {stderr}");
                ensure!(stderr.contains(key), "{kind}: {stderr}");
            }
        }
        // Nor does the signal bring a broken file into force.
        agent.rewrite(&broken)?;
        agent.signal(Signal::SIGHUP);
        wait_until("the agent to refuse", DEADLINE, || {
            let log = std::fs::read_to_string(agent.log())?;
            ensure!(log.contains("not reloaded"), "{}", lab::tail(agent.log(), 3));
            Ok(())
        })?;
        let after = agent.status()?;
        assert_eq!(after.listeners.len(), before.listeners.len());
        assert_eq!(after.groups[0].backends.len(), 2);
        ensure!(site.curl()?.body().is_some());

        // More addresses behind the present ones are no trouble.
        let more = Configuration::default().raw(
            &good
                .to_string()
                .replace("[\"100.64.0.0/26\"]", "[\"100.64.0.0/26\", \"100.64.9.0/28\"]"),
        );
        apply(site, agent, &more)?;
        ensure!(site.curl()?.body().is_some());
        Ok(())
    })
}

/// The tables that a configuration becomes, byte for byte. The settings are left out: they count changes of routes.
fn tables(site: &Site) -> Result<Vec<String>> {
    let dump = |name: &str| {
        let path = site.lab.pin_directory().join(name);
        site.gateway
            .run(&format!("bpftool -j map dump pinned {}", path.display()))
    };
    [
        "NAMES",
        "INTERFACES",
        "VIPS",
        "LISTENERS",
        "LISTENER_RANGES",
        "SOURCES",
        "GROUPS",
        "BACKENDS",
    ]
    .into_iter()
    .map(dump)
    .collect()
}

/// A change of so many prefixes of ports that they do not fit into the kernel's table: it refuses one of the last writes.
#[test]
fn a_reload_that_the_kernel_refuses_half_way_changes_nothing() -> Result<()> {
    play(&["ecs01", "ecs02"], |site, agent| {
        let mut kept = KeptConnection::open(site.client(), site.vip, PORT)?;
        let page = kept.get()?;
        let before = tables(site)?;
        let mut too_much = with(site, &[("ecs01", 7), ("ecs03", 300)]);
        for number in 0..290 {
            too_much = too_much.table(
                &format!("listener.range{number}"),
                &[
                    (
                        "vip",
                        &format!("\"198.18.{}.{}\"", number / 100, number % 100 + 1),
                    ),
                    ("port", "\"1-65534\""),
                    ("group", "\"web\""),
                ],
            );
        }
        let output = verb(site, agent, "apply", &too_much)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        ensure!(
            stderr.contains("the kernel refused to write listener 198.18.")
                && stderr.contains("(os error 28)")
                && !stderr.contains("undoing"),
            "{stderr}"
        );
        ensure!(tables(site)? == before, "the tables are not what they were");
        let status = agent.status()?;
        assert_eq!(status.listeners.len(), 1);
        let names: Vec<_> = status.groups[0]
            .backends
            .iter()
            .map(|backend| (backend.name.as_str(), backend.weight))
            .collect();
        assert_eq!(names, [("ecs01", 100), ("ecs02", 100)]);
        assert_eq!(kept.get()?, page);
        ensure!(site.curl()?.body().is_some());
        // And it is none the worse for it.
        apply(site, agent, &with(site, &[("ecs01", 100), ("ecs03", 100)]))?;
        wait_for_health(agent, 2)
    })
}

#[test]
fn what_plan_prints_is_what_the_kernel_takes_and_the_far_side_needs() -> Result<()> {
    play(&["ecs01", "ecs02"], |site, agent| {
        let good = with(site, &[("ecs01", 100), ("ecs02", 100)]);
        let plan: serde_json::Value = serde_json::from_slice(&verb(site, agent, "plan", &good)?.stdout)?;

        // Memory: within a page and two percent of the kernel's own account.
        let tables = plan["tables"].as_array().context("tables")?;
        assert!(tables.len() > 10, "{tables:?}");
        for table in tables {
            let name = table["name"].as_str().context("a name")?;
            // Lists carry a number, and tries take memory for what is in them.
            if name == "FREE_FLOWS" || ["LISTENER_RANGES", "SOURCES"].contains(&name) {
                continue;
            }
            let path = site.lab.pin_directory().join(name);
            let shown = site
                .gateway
                .run(&format!("bpftool -j map show pinned {}", path.display()))?;
            let shown: serde_json::Value = serde_json::from_str(&shown)?;
            let kernel = shown["bytes_memlock"].as_f64().context("bytes_memlock")?;
            let printed = table["memory_bytes"].as_f64().context("memory_bytes")?;
            ensure!(
                (kernel - printed).abs() <= 8192.0 + kernel * 0.02,
                "{name}: the kernel takes {kernel} bytes, plan says {printed}"
            );
            assert_eq!(shown["max_entries"], table["entries"], "{name}");
        }

        // The far side: its route is gone, and the command that plan prints brings it back.
        let networks = plan["networks"].as_array().context("networks")?;
        let far = networks
            .iter()
            .find(|one| one["network"] == "vpc2")
            .context("vpc2")?;
        let route = far["iproute2"][0].as_str().context("a route")?;
        site.far_router.run(&format!("ip route del {POOL}"))?;
        wait_until("ECS02 to fail", DEADLINE, || {
            let health = agent.backend(GROUP, "ecs02")?.health;
            ensure!(health != HEALTHY);
            Ok(())
        })?;
        site.far_router.run(route)?;
        wait_for_health(agent, 2)?;
        // And so does its rule, on a server that admits nothing else.
        let server = &site.server("ecs02")?.namespace;
        server.run_with_input(
            "nft -f -",
            Some("table inet filter { chain input { type filter hook input priority filter; policy drop; iif lo accept; }; }"),
        )?;
        wait_until("ECS02 to fail", DEADLINE, || {
            let health = agent.backend(GROUP, "ecs02")?.health;
            ensure!(health != HEALTHY);
            Ok(())
        })?;
        for rule in far["nftables"].as_array().context("rules")? {
            // As a shell would read it: nothing in it is quoted.
            server.run(rule.as_str().context("a rule")?)?;
        }
        wait_for_health(agent, 2)
    })
}
