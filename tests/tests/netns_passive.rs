//! Ring 3: the data path's counters tell that a server answers no more, long before a probe is due.
//! `--test-threads=1`, as the other labs.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    load::{Answer, Connections, Wrk, start_wrk},
    status::{BackendStatus, HEALTHY},
    tail,
    topology::{Extras, PORT, Site},
    wait_until,
};

const GROUP: &str = "web";
const EJECTED: &str = "ejected";
/// No probe after the first falls into a test, so whatever takes a backend out is passive.
const RARELY_PROBED: &[(&str, &str)] = &[("kind", "\"tcp\""), ("interval", "\"300s\"")];
const NOT_PROBED: &[(&str, &str)] = &[("kind", "\"none\"")];
/// Nobody comes back during a test, however long its requests take on a busy machine.
const OUT_FOR_LONG: &[(&str, &str)] = &[("ejection_time", "\"10m\""), ("max_ejection_time", "\"10m\"")];
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `test` at a site with four servers, while clients open connections all the time.
fn play(
    health: &[(&str, &str)],
    passive: &[(&str, &str)],
    test: impl FnOnce(&mut Site, &Agent) -> Result<()>,
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
    let agent = site.start_agent(&configuration(&site, health, passive), GROUP)?;
    let load = start_wrk(
        &site.lab,
        site.client(),
        &Wrk {
            url: &format!("http://{}:{PORT}/", site.vip),
            kind: Connections::PerRequest,
            connections: 16,
            threads: 2,
            // No test takes so long: each stops it.
            duration: Duration::from_secs(300),
            cpu: None,
            has_latency: false,
        },
    )?;
    wait_until("every server to answer", DEADLINE, || {
        let backends = agent.backends(GROUP)?;
        let idle = backends.iter().find(|one| one.traffic.connections_answered == 0);
        ensure!(idle.is_none(), "{idle:?}");
        Ok(())
    })?;
    test(&mut site, &agent)?;
    ensure!(load.ended().is_none(), "the load ended: {}", tail(load.log(), 10));
    load.stop()?;
    show_log.all_is_well();
    Ok(())
}

fn configuration(site: &Site, health: &[(&str, &str)], passive: &[(&str, &str)]) -> Configuration {
    let group = site
        .configuration(&[])
        .table("group.web", &[("nat", "\"full\"")])
        .table("group.web.health", health)
        .table("group.web.passive", passive);
    site.servers
        .iter()
        .fold(group, |configuration, server| {
            configuration.backend(GROUP, server.name, server.address, PORT, 100)
        })
        .listener("web", site.vip, PORT, "tcp", GROUP)
}

/// Waits until the agent calls a backend so.
fn await_health(agent: &Agent, name: &str, health: &str) -> Result<BackendStatus> {
    let (backend, _) = wait_until(&format!("{name} to be {health}"), DEADLINE, || {
        let backend = agent.backend(GROUP, name)?;
        ensure!(backend.health == health, "{} is {}", name, backend.health);
        Ok(backend)
    })?;
    Ok(backend)
}

/// Every one of many requests is answered, and not by these servers.
fn expect_answers_without(site: &Site, names: &[&str]) -> Result<()> {
    for number in 0..60 {
        match site.curl()? {
            Answer::Body(page) => {
                let server = site.answered_by(&page).map(|server| server.name);
                ensure!(
                    server.is_some_and(|name| !names.contains(&name)),
                    "{server:?} answered"
                );
            }
            Answer::Failed(why) => anyhow::bail!("request {number} failed: {why}"),
        }
    }
    Ok(())
}

fn log_has(agent: &Agent, text: &str) -> Result<bool> {
    Ok(fs::read_to_string(agent.log())?.contains(text))
}

#[test]
fn a_killed_server_is_ejected_and_no_request_goes_there() -> Result<()> {
    play(RARELY_PROBED, OUT_FOR_LONG, |site, agent| {
        site.kill_nginx("ecs03")?;
        let backend = await_health(agent, "ecs03", EJECTED)?;
        let ejection = backend.ejection.expect("it is ejected");
        assert_eq!((ejection.cause.as_str(), ejection.times), ("rejected", 1));
        assert!((570.0..=600.0).contains(&ejection.remaining_secs), "{ejection:?}");
        assert_eq!(backend.share, 0.0);
        expect_answers_without(site, &["ecs03"])?;
        let labels = [("group", GROUP), ("backend", "ecs03"), ("cause", "rejected")];
        let metrics = agent.metrics()?;
        assert_eq!(metrics.sum("forwarder_backend_ejections_total", &labels), 1.0);
        assert_eq!(metrics.sum("forwarder_backend_ejections_total", &[]), 1.0);
        assert!(log_has(
            agent,
            "new flows were answered by TCP resets, found at most"
        )?);
        Ok(())
    })
}

#[test]
fn a_black_holed_server_is_ejected_and_no_request_goes_there() -> Result<()> {
    play(RARELY_PROBED, OUT_FOR_LONG, |site, agent| {
        // Behind the tunnel, so that the path is judged as well.
        site.server("ecs04")?.namespace.black_hole()?;
        let backend = await_health(agent, "ecs04", EJECTED)?;
        assert_eq!(backend.ejection.expect("it is ejected").cause, "silent");
        expect_answers_without(site, &["ecs04"])?;
        assert!(log_has(agent, "nothing came back for")?);
        Ok(())
    })
}

#[test]
fn when_all_servers_fail_half_of_them_stay() -> Result<()> {
    play(RARELY_PROBED, OUT_FOR_LONG, |site, agent| {
        let names: Vec<_> = site.servers.iter().map(|server| server.name).collect();
        for name in &names {
            site.kill_nginx(name)?;
        }
        wait_until("two to be ejected and two to be spared", DEADLINE, || {
            let ejected = agent
                .backends(GROUP)?
                .iter()
                .filter(|one| one.health == EJECTED)
                .count();
            let spared = fs::read_to_string(agent.log())?.matches("not ejected").count();
            ensure!((ejected, spared) == (2, 2), "{ejected} ejected, {spared} spared");
            Ok(())
        })?;
        let takes_flows = |one: &&BackendStatus| one.health == HEALTHY && one.share > 0.0;
        assert_eq!(agent.backends(GROUP)?.iter().filter(takes_flows).count(), 2);
        Ok(())
    })
}

#[test]
fn an_ejected_server_comes_back_and_one_that_fails_again_is_out_for_longer() -> Result<()> {
    let passive = [("ejection_time", "\"1s\""), ("max_ejection_time", "\"3s\"")];
    play(NOT_PROBED, &passive, |site, agent| {
        site.kill_nginx("ecs01")?;
        // Nobody probes it: it comes back, fails, and is out again.
        let (ejection, _) = wait_until("a second ejection", DEADLINE, || {
            let ejection = agent.backend(GROUP, "ecs01")?.ejection;
            ejection
                .filter(|ejection| ejection.times == 2)
                .ok_or_else(|| anyhow::anyhow!("not ejected twice"))
        })?;
        assert_eq!(ejection.cause, "rejected");
        site.start_nginx("ecs01")?;
        await_health(agent, "ecs01", HEALTHY)?;
        let answered = agent.backend(GROUP, "ecs01")?.traffic.connections_answered;
        wait_until("it to answer again", DEADLINE, || {
            let now = agent.backend(GROUP, "ecs01")?.traffic.connections_answered;
            ensure!(now > answered, "{now} connections answered");
            Ok(())
        })?;
        assert!(log_has(agent, "readmitted after")?);
        Ok(())
    })
}

#[test]
fn probes_that_pass_bring_a_restarted_server_back_early() -> Result<()> {
    // So many failures that active checks do not call it unhealthy meanwhile.
    let health = [
        ("kind", "\"tcp\""),
        ("interval", "\"500ms\""),
        ("rise", "2"),
        ("fall", "10"),
    ];
    play(&health, OUT_FOR_LONG, |site, agent| {
        site.kill_nginx("ecs02")?;
        await_health(agent, "ecs02", EJECTED)?;
        site.start_nginx("ecs02")?;
        await_health(agent, "ecs02", HEALTHY).map(drop)
    })
}

#[test]
fn a_group_that_wants_none_ejects_nobody() -> Result<()> {
    play(RARELY_PROBED, &[("enabled", "false")], |site, agent| {
        site.kill_nginx("ecs03")?;
        wait_until("many rejected connections", DEADLINE, || {
            let rejected = agent.backend(GROUP, "ecs03")?.traffic.connections_rejected;
            ensure!(rejected > 100, "{rejected} rejected connections");
            Ok(())
        })?;
        assert_eq!(agent.backend(GROUP, "ecs03")?.health, HEALTHY);
        Ok(())
    })
}
