//! Ring 3: the ways to select a backend, with real servers and clients.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, Agent, ShowLog},
    configuration::{Check, Configuration},
    load::{KeptConnection, curl},
    topology::{Extras, PORT, Site},
};

const GROUP: &str = "web";
const NAMES: [&str; 4] = ["ecs01", "ecs02", "ecs03", "ecs04"];

/// Runs `test` at a site with four servers of these weights, of a group with these keys.
fn play(keys: &str, weights: [u16; 4], test: impl FnOnce(&Site, &Agent) -> Result<()>) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let extras = Extras {
        second_servers: true,
        second_client: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&with(&site, keys, weights), GROUP)?;
    test(&site, &agent)?;
    show_log.all_is_well();
    Ok(())
}

fn with(site: &Site, keys: &str, weights: [u16; 4]) -> Configuration {
    let mut configuration = site.configuration(&[]).group(GROUP, "full", Check::Http);
    for (name, weight) in NAMES.into_iter().zip(weights) {
        let address = site.server(name).expect("a server of the site").address;
        configuration = configuration.backend(GROUP, name, address, PORT, weight);
    }
    let text = configuration
        .listener("web", site.vip, PORT, "tcp", GROUP)
        .to_string();
    let heading = format!("[group.{GROUP}]\n");
    assert!(text.contains(&heading), "{text}");
    Configuration::from_text(text.replace(&heading, &format!("{heading}{keys}\n")))
}

/// The name of the server with this page.
fn server_of(site: &Site, page: &str) -> Result<&'static str> {
    Ok(site.answered_by(page).context("nobody's page")?.name)
}

/// Who answers so many requests of the first client, each with a connection of its own.
fn answers(site: &Site, client: usize, requests: usize) -> Result<HashMap<&'static str, usize>> {
    let mut answers = HashMap::new();
    for _ in 0..requests {
        let answer = curl(&site.clients[client], site.vip, PORT)?;
        let page = answer.body().with_context(|| format!("{answer:?}"))?;
        *answers.entry(server_of(site, page)?).or_default() += 1;
    }
    Ok(answers)
}

fn apply(site: &Site, agent: &Agent, configuration: &Configuration) -> Result<()> {
    let file = site.lab.directory().join("next.toml");
    std::fs::write(&file, configuration.to_string())?;
    let output = agent.ask("apply", &["-c", file.to_str().context("the path is text")?])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn in_turn_each_server_gets_its_share_exactly() -> Result<()> {
    play("selection = \"round-robin\"", [100, 100, 200, 0], |site, _| {
        let expected = HashMap::from([("ecs01", 10), ("ecs02", 10), ("ecs03", 20)]);
        assert_eq!(answers(site, 0, 40)?, expected);
        Ok(())
    })
}

#[test]
fn by_least_connections_open_connections_are_even() -> Result<()> {
    play(
        "selection = \"least-connections\"",
        [100, 100, 200, 100],
        |site, agent| {
            let mut kept = Vec::new();
            let mut counts: HashMap<_, usize> = HashMap::new();
            for _ in 0..25 {
                let mut connection = KeptConnection::open(site.client(), site.vip, PORT)?;
                *counts.entry(server_of(site, &connection.get()?)?).or_default() += 1;
                kept.push(connection);
            }
            let expected = HashMap::from([("ecs01", 5), ("ecs02", 5), ("ecs03", 10), ("ecs04", 5)]);
            assert_eq!(counts, expected);
            // More weight takes what comes next.
            apply(
                site,
                agent,
                &with(site, "selection = \"least-connections\"", [100, 100, 200, 300]),
            )?;
            for _ in 0..10 {
                let mut connection = KeptConnection::open(site.client(), site.vip, PORT)?;
                assert_eq!(server_of(site, &connection.get()?)?, "ecs04");
                kept.push(connection);
            }
            Ok(())
        },
    )
}

#[test]
fn by_source_ip_a_client_has_one_server() -> Result<()> {
    play("selection = \"source-ip\"", [100; 4], |site, _| {
        for client in 0..site.clients.len() {
            let answers = answers(site, client, 12)?;
            assert_eq!(answers.len(), 1, "{answers:?}");
        }
        Ok(())
    })
}

#[test]
fn with_persistence_a_client_stays_when_the_weights_change() -> Result<()> {
    let keys = "persistence_timeout = \"1h\"";
    play(keys, [100; 4], |site, agent| {
        let before = answers(site, 0, 8)?;
        assert_eq!(before.len(), 1, "{before:?}");
        let server = *before.keys().next().context("a server")?;
        // Nearly all slots go to the others.
        let weights = NAMES.map(|name| if name == server { 1 } else { 10_000 });
        apply(site, agent, &with(site, keys, weights))?;
        assert_eq!(answers(site, 0, 8)?, before);
        let other = answers(site, 1, 8)?;
        assert_eq!(other.len(), 1, "{other:?}");
        let explained = agent.ask(
            "explain",
            &["tcp", "172.16.0.10:51000", &format!("{}:{PORT}", site.vip)],
        )?;
        let explained = String::from_utf8(explained.stdout)?;
        assert!(
            explained.contains("where its client's last flow went"),
            "{explained}"
        );
        Ok(())
    })
}
