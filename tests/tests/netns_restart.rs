//! Ring 3: the agent dies, is stopped, comes back; traffic and flows go on. `--test-threads=1`, as the other labs.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::maps::{Map, MapData, Queue};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    load::{Connections, KeptConnection, wrk},
    topology::{Extras, PORT, PROBE_ADDRESS, Site},
    wait_until,
};
use nix::sys::signal::Signal;

const GROUP: &str = "web";
const CONNECTIONS: u32 = 64;
/// Long enough for some restarts: loading programs on a machine under full load takes its time.
const LOAD: Duration = Duration::from_secs(20);

/// Runs `test` at a site whose agent is running with all backends healthy.
fn play(
    configure: impl Fn(&Site) -> Configuration,
    test: impl FnOnce(&Site, Agent) -> Result<()>,
) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&configure(&site), GROUP)?;
    test(&site, agent)?;
    show_log.all_is_well();
    Ok(())
}

fn keeping(site: &Site) -> Configuration {
    site.web_configuration().agent_key("on_stop", "\"keep\"")
}

/// Links and maps that hold the data path, by bpftool.
fn programs(site: &Site) -> Result<String> {
    site.gateway.run("bpftool net")
}

/// Counters of the group `web`: connections opened, refused, requests' packets.
fn counters(agent: &Agent) -> Result<(u64, u64, u64)> {
    let mut sum = (0, 0, 0);
    for backend in agent.backends(GROUP)? {
        sum.0 += backend.traffic.connections_opened;
        sum.1 += backend.traffic.connections_refused;
        sum.2 += backend.traffic.packets_in;
    }
    Ok(sum)
}

/// A connection stays open while the agent goes and comes back; it and all counters go on.
fn a_connection_survives(
    site: &Site,
    mut agent: Agent,
    signal: Signal,
    configuration: &Configuration,
) -> Result<()> {
    // Behind the tunnel: its program is held by other means than those of network cards, and before Linux 6.6 by others
    // again.
    let page = &site.server("ecs02")?.page;
    let (mut kept, _) = wait_until("a connection through the tunnel", Duration::from_secs(10), || {
        let mut kept = KeptConnection::open(site.client(), site.vip, PORT)?;
        ensure!(kept.get()? == *page);
        Ok(kept)
    })?;
    for round in 1..=3 {
        let before = counters(&agent)?;
        let log_before: Vec<_> = site
            .servers
            .iter()
            .map(|server| {
                server
                    .nginx
                    .access_log()
                    .map(|log| log.without(PROBE_ADDRESS).connections())
            })
            .collect::<Result<_>>()?;
        agent.end(signal)?;
        // Nobody is there.
        ensure!(agent.status().is_err(), "the agent answers after its end");
        assert_eq!(kept.get()?, *page, "round {round}, without an agent");
        // New connections need no agent, either.
        let other = KeptConnection::open(site.client(), site.vip, PORT)?.get()?;
        ensure!(site.answered_by(&other).is_some(), "{other}");

        agent = site.start_agent(configuration, GROUP)?;
        assert_eq!(kept.get()?, *page, "round {round}, with a new agent");
        let after = counters(&agent)?;
        assert_eq!(after.0, before.0 + 1, "one connection was opened meanwhile");
        assert_eq!(after.1, before.1);
        ensure!(after.2 > before.2, "counters go on: {before:?}, {after:?}");
        let (_, _) = wait_until("the flows to be counted", Duration::from_secs(5), || {
            let flows: u64 = agent.backends(GROUP)?.iter().map(|one| one.traffic.flows).sum();
            ensure!(flows >= 1, "{flows} flows");
            Ok(())
        })?;
        // The server saw one more connection (`other`), so the kept one is still the same.
        let log_after: u64 = site
            .servers
            .iter()
            .map(|server| {
                server
                    .nginx
                    .access_log()
                    .map(|log| log.without(PROBE_ADDRESS).connections())
            })
            .sum::<Result<u64>>()?;
        assert_eq!(log_after, log_before.iter().sum::<u64>() + 1);
    }
    Ok(())
}

#[test]
fn a_connection_survives_a_killed_agent() -> Result<()> {
    play(Site::web_configuration, |site, agent| {
        a_connection_survives(site, agent, Signal::SIGKILL, &site.web_configuration())
    })
}

#[test]
fn a_connection_survives_a_stop_that_keeps() -> Result<()> {
    play(keeping, |site, agent| {
        a_connection_survives(site, agent, Signal::SIGTERM, &keeping(site))
    })
}

#[test]
fn a_connection_survives_an_agent_that_makes_way_whatever_on_stop_says() -> Result<()> {
    play(Site::web_configuration, |site, agent| {
        a_connection_survives(site, agent, Signal::SIGUSR1, &site.web_configuration())
    })
}

/// The kernel lets go of a link some time after its pin is gone, and takes no other mode until then.
#[test]
fn an_interface_changes_its_mode_at_a_restart() -> Result<()> {
    let in_mode = |site: &Site, mode| site.web_configuration_with(&[("mode", mode)], "full", |_| 1);
    play(
        |site| in_mode(site, "native"),
        |site, mut agent| {
            for (mode, shown) in [
                ("generic", "xdpgeneric"),
                ("native", " xdp "),
                ("generic", "xdpgeneric"),
            ] {
                agent.end(Signal::SIGUSR1)?;
                agent = site.start_agent(&in_mode(site, mode), GROUP)?;
                let link = site.gateway.run("ip link show eth0")?;
                ensure!(link.contains(shown), "{mode}: {link}");
                ensure!(site.curl()?.body().is_some(), "{mode}");
            }
            Ok(())
        },
    )
}

/// Kills and starts the agent again and again while wrk runs; nothing may fail.
fn killed_under_load(site: &Site, mut agent: Agent, kind: Connections) -> Result<()> {
    let (restarts, load) = thread::scope(|scope| {
        let load = scope.spawn(|| wrk(site.client(), site.vip, PORT, kind, CONNECTIONS, LOAD));
        let mut restarts = 0;
        let mut restart = || {
            let before = counters(&agent)?;
            wait_until("traffic", Duration::from_secs(5), || {
                let now = counters(&agent)?;
                ensure!(
                    load.is_finished() || now.2 > before.2 + 1000,
                    "{before:?}, {now:?}"
                );
                Ok(())
            })?;
            agent.end(Signal::SIGKILL)?;
            agent = site.start_agent(&site.web_configuration(), GROUP)?;
            let after = counters(&agent)?;
            ensure!(
                after.0 >= before.0 && after.2 >= before.2,
                "counters went back: {before:?}, {after:?}"
            );
            // One that ended after the load has shown nothing.
            restarts += usize::from(!load.is_finished());
            anyhow::Ok(())
        };
        let mut outcome = Ok(());
        while outcome.is_ok() && !load.is_finished() {
            outcome = restart();
        }
        (outcome.map(|()| restarts), load.join())
    });
    let restarts = restarts?;
    let load = load.map_err(|_| anyhow::anyhow!("wrk's thread panicked"))??;
    println!("{kind:?}: {restarts} restarts, {load:?}");
    ensure!(restarts > 0, "the agent was not restarted in time");
    ensure!(
        load.requests > 0 && load.socket_errors == 0 && load.refused == 0,
        "requests failed: {load:?}"
    );
    Ok(())
}

#[test]
fn killed_agents_lose_no_request() -> Result<()> {
    for kind in [Connections::KeepAlive, Connections::PerRequest] {
        play(Site::web_configuration, |site, agent| {
            // As on any busy client; see netns_forward.
            site.client()
                .sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
            site.client().sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            killed_under_load(site, agent, kind)
        })?;
    }
    Ok(())
}

/// The pinned lists of free flows; nobody may be running on them for what is popped not to be missed.
fn free_lists(site: &Site) -> Result<Vec<Queue<MapData, u32>>> {
    let mut lists = Vec::new();
    for entry in std::fs::read_dir(site.lab.pin_directory())? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("FREE_FLOWS_"))
        {
            lists.push(Map::from_map_data(MapData::from_pin(&path)?)?.try_into()?);
        }
    }
    Ok(lists)
}

/// Whenever agents are killed, every binding is in use, or free and in the list, once.
#[test]
fn free_bindings_are_complete_after_kills() -> Result<()> {
    const CAPACITY: u32 = 1024;
    let configure = |site: &Site| site.web_configuration().agent_key("max_flows", "1024");
    play(configure, |site, mut agent| {
        for (lost, has_load) in [(5, false), (0, true)] {
            if has_load {
                // Far more connections than bindings: all are taken, some are refused.
                wrk(
                    site.client(),
                    site.vip,
                    PORT,
                    Connections::PerRequest,
                    8,
                    Duration::from_secs(1),
                )?;
            }
            agent.end(Signal::SIGKILL)?;
            // What a kill between two steps loses: numbers that somebody had in hand.
            let mut lists = free_lists(site)?;
            assert_eq!(lists.len(), 1);
            let in_use: u64 = u64::from(CAPACITY) - remaining(&mut lists[0], lost)?;
            agent = site.start_agent(&configure(site), GROUP)?;
            let log = std::fs::read_to_string(agent.log())?;
            let said = log
                .lines()
                .rfind(|line| line.contains("took over"))
                .context("the agent says that it took over")?;
            ensure!(
                said.contains(&format!("; {lost} free flows had been lost")),
                "{said}; {in_use} were in use"
            );
        }
        wait_until("the flows to be counted", Duration::from_secs(5), || {
            let pool = agent.status()?.pool;
            ensure!(pool.used > 0, "{pool:?}");
            Ok(())
        })?;
        // The sweep goes on: all flows end, and all bindings are free again.
        wait_until("all flows to end", Duration::from_secs(180), || {
            let pool = agent.status()?.pool;
            ensure!(pool.used == 0, "{pool:?}");
            Ok(())
        })?;
        agent.end(Signal::SIGKILL)?;
        let mut numbers = Vec::new();
        for list in &mut free_lists(site)? {
            while let Ok(number) = list.pop(0) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (0..CAPACITY).collect::<Vec<_>>());
        Ok(())
    })
}

/// Takes `lost` numbers out of a list for good and returns how many are left in it. New flows take some meanwhile, but
/// none comes here: the load has ended.
fn remaining(list: &mut Queue<MapData, u32>, lost: usize) -> Result<u64> {
    let mut all = Vec::new();
    while let Ok(number) = list.pop(0) {
        all.push(number);
    }
    // A list that is empty has nothing to lose.
    let kept = all.get(lost..).context("the list is too short")?;
    for number in kept {
        list.push(number, 0)?;
    }
    Ok(kept.len() as u64)
}

#[test]
fn a_second_agent_is_refused_and_told_who_holds_the_pins() -> Result<()> {
    play(Site::web_configuration, |site, agent| {
        let second = site.lab.directory().join("second.toml");
        let text = site
            .web_configuration()
            .to_string()
            .replace("control.sock", "second.sock")
            .replacen("[agent]\n", "[agent]\nmetrics_address = \"127.0.0.1:9470\"\n", 1);
        std::fs::write(&second, text)?;
        let path = second.to_str().context("the path is text")?;
        let output = agent.verb(&["run", "-c", path])?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        ensure!(
            stderr.contains(&format!("process id {} holds the pins", agent.pid())),
            "{stderr}"
        );
        // Nor can what it runs on be taken away.
        let output = agent.verb(&["detach", "-c", path])?;
        assert_eq!(output.status.code(), Some(3));
        ensure!(site.curl()?.body().is_some());
        Ok(())
    })
}

#[test]
fn a_data_path_without_an_agent_is_told_from_one_with_and_from_none() -> Result<()> {
    play(Site::web_configuration, |site, agent| {
        let ask = |agent: &Agent| -> Result<(Option<i32>, String)> {
            let output = agent.ask("status", &["-o", "json"])?;
            let said = if output.status.success() {
                &output.stdout
            } else {
                &output.stderr
            };
            Ok((output.status.code(), String::from_utf8_lossy(said).into_owned()))
        };
        assert_eq!(ask(&agent)?.0, Some(0));
        let pid = agent.pid();
        agent.end(Signal::SIGKILL)?;
        ensure!(site.curl()?.body().is_some());
        let (code, text) = ask(&agent)?;
        assert_eq!(code, Some(4), "{text}");
        for words in [
            format!("the last agent: process {pid}"),
            format!("pinned in {}, attached to ", site.lab.pin_directory().display()),
            "Nobody checks health".to_owned(),
            format!(
                "forwarder detach --pin-directory {}",
                site.lab.pin_directory().display()
            ),
        ] {
            ensure!(text.contains(&words), "{words:?} is not in {text}");
        }
        for interface in site.interfaces {
            ensure!(text.contains(&format!("{interface} (")), "{text}");
        }
        // One that cannot start on these tables is not the last agent.
        agent.rewrite(&site.web_configuration().agent_key("max_flows", "65536"))?;
        let file = agent.configuration().to_str().context("the path is text")?;
        assert_eq!(agent.verb(&["run", "-c", file])?.status.code(), Some(3));
        let (code, text) = ask(&agent)?;
        assert_eq!(code, Some(4), "{text}");
        ensure!(text.contains(&format!("the last agent: process {pid}")), "{text}");
        // It says since when: not much more than a second after the last sign of life.
        let since = |text: &str| -> Result<u64> {
            let (_, rest) = text.split_once("without one for ").context("since when")?;
            let (seconds, _) = rest.split_once(" s").context("in seconds")?;
            Ok(seconds.parse()?)
        };
        ensure!(since(&text)? < 10, "{text}");
        wait_until("the time to be told", Duration::from_secs(10), || {
            let text = ask(&agent)?.1;
            ensure!(since(&text)? >= 3, "{text}");
            Ok(())
        })?;

        let agent = site.start_agent(&site.web_configuration(), GROUP)?;
        assert_eq!(ask(&agent)?.0, Some(0));
        // One that hangs is there.
        agent.signal(Signal::SIGSTOP);
        std::fs::remove_file(agent.control_socket())?;
        let (code, text) = ask(&agent)?;
        agent.signal(Signal::SIGCONT);
        assert_eq!(code, Some(1), "{text}");
        ensure!(
            text.contains(&format!("(process {}) does not answer", agent.pid())),
            "{text}"
        );
        // Nothing is left of one that ends as usual.
        ensure!(agent.stop()?.success());
        let (code, text) = ask(&agent)?;
        assert_eq!(code, Some(1), "{text}");
        ensure!(text.contains("no agent answers on"), "{text}");
        Ok(())
    })
}

#[test]
fn another_layout_is_refused_with_the_way_out_and_traffic_goes_on() -> Result<()> {
    play(Site::web_configuration, |site, agent| {
        agent.end(Signal::SIGKILL)?;
        let programs_before = programs(site)?;
        for (configuration, expected) in [
            (
                site.web_configuration().agent_key("max_flows", "65536"),
                "(agent.max_flows)",
            ),
            (
                Configuration::default().raw(
                    &site
                        .web_configuration()
                        .to_string()
                        .replace("100.64.0.0/26", "100.64.1.0/26")
                        .replace("\"100.64.0.1\"", "\"100.64.1.1\""),
                ),
                "snat.prefixes",
            ),
        ] {
            agent.rewrite(&configuration)?;
            let file = agent.configuration().to_str().context("the path is text")?;
            let output = agent.verb(&["run", "-c", file])?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(3), "{stderr}");
            ensure!(
                stderr.contains(expected) && stderr.contains("forwarder detach"),
                "{stderr}"
            );
            // The old programs were not touched.
            ensure!(site.curl()?.body().is_some());
            assert_eq!(programs(site)?, programs_before);
        }
        let file = agent.configuration().to_str().context("the path is text")?;
        let output = agent.verb(&["detach", "-c", file])?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(!site.lab.pin_directory().exists());
        wait_until("the programs to be gone", Duration::from_secs(5), || {
            let programs = programs(site)?;
            ensure!(
                !programs.contains("xdp") || !programs.contains("forwarder"),
                "{programs}"
            );
            let addresses = site.gateway.run("ip -o address")?;
            ensure!(!addresses.contains(&PROBE_ADDRESS.to_string()), "{addresses}");
            Ok(())
        })?;
        site.start_agent(&site.web_configuration().agent_key("max_flows", "65536"), GROUP)?;
        ensure!(site.curl()?.body().is_some());
        Ok(())
    })
}
