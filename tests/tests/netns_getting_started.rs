//! Ring 3: docs/getting-started.md, as a reader would follow it. Its commands are run as they stand there, each on the
//! host that its block names; its pieces of configuration are the file. `--test-threads=1`, as the other labs.
//!
//! Two things are not as on the page: sockets and pins are the lab's own, so that nothing of this machine is touched; and
//! the servers and their tunnel are there already.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    self, Lifetime, Namespace,
    agent::{self, Agent, ShowLog},
    configuration::Configuration,
    topology::{Extras, Site},
    wait_until,
};

const PAGE: &str = include_str!("../../docs/getting-started.md");
/// What `cargo xtask test` does itself, by the same functions.
const INSTALLATION: [&str; 3] = [
    "cargo xtask setup",
    "cargo xtask build",
    r#"export PATH="$PWD/target/release:$PATH""#,
];
const DEADLINE: Duration = Duration::from_secs(20);

/// A block of the page.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A piece of the configuration.
    Configuration(String),
    /// Commands for the host of this name; the agent's own start is apart.
    Commands {
        host: String,
        lines: Vec<String>,
    },
    Start,
}

/// The steps of a page, in their order. Blocks without a host are for the installation.
fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    // Every other part is a block: its kind, and its lines.
    for block in page.split("```").skip(1).step_by(2) {
        let (kind, text) = block.split_once('\n').unwrap_or((block, ""));
        let lines = || text.lines().map(str::to_owned).collect();
        match kind.split(' ').collect::<Vec<_>>()[..] {
            ["toml"] => steps.push(Step::Configuration(text.to_owned())),
            ["sh", "gateway", "run"] => {
                assert_eq!(text, "forwarder run -c forwarder.toml\n");
                steps.push(Step::Start);
            }
            ["sh", host] => steps.push(Step::Commands {
                host: host.to_owned(),
                lines: lines(),
            }),
            ["sh"] => assert_eq!(lines(), INSTALLATION),
            ["text"] => {}
            _ => panic!("what is a block of {kind:?}?"),
        }
    }
    steps
}

/// The lab's own places in front of what the page says.
fn configuration(site: &Site, text: &str) -> Configuration {
    let lab = Configuration::new(&agent::control_socket(&site.lab), &site.lab.pin_directory());
    Configuration::from_text(format!("{lab}\n{text}"))
}

fn host<'a>(site: &'a Site, name: &str) -> Result<&'a Namespace> {
    Ok(match name {
        "gateway" => &site.gateway,
        "client" => site.client(),
        server => &site.server(server)?.namespace,
    })
}

/// Runs a line of the page as the reader's shell would, where `forwarder` and the file are.
fn run(site: &Site, name: &str, line: &str) -> Result<String> {
    let binary = agent::binary()?;
    let folder = binary
        .parent()
        .context("a program lies in a folder")?
        .canonicalize()?;
    let script = format!(
        "cd {} && export PATH={}:$PATH FORWARDER_SOCKET={} && {line}",
        site.lab.directory().display(),
        folder.display(),
        agent::control_socket(&site.lab).display()
    );
    let output = host(site, name)?.output("sh", &["-c", &script])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "on {name}: {line}\n{}\n{said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(said)
}

#[test]
fn whoever_follows_the_page_has_traffic() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let mut text = String::new();
    let mut agent: Option<Agent> = None;
    let mut pages = Vec::new();
    for step in steps(PAGE) {
        match step {
            Step::Configuration(piece) => {
                text.push_str(&piece);
                text.push('\n');
                fs::write(
                    site.lab.directory().join("forwarder.toml"),
                    configuration(&site, &text).to_string(),
                )?;
            }
            Step::Start => {
                if let Some(running) = agent.take() {
                    ensure!(running.stop()?.success(), "Ctrl-C ends it well");
                }
                agent = Some(site.start_agent(&configuration(&site, &text), "web")?);
            }
            Step::Commands { host, lines } if host == "client" => {
                for line in lines {
                    pages.push(run(&site, &host, &line)?.trim_end().to_owned());
                }
            }
            Step::Commands { host, lines } => {
                for line in lines {
                    let said = run(&site, &host, &line)?;
                    if line == "forwarder status" {
                        ensure!(said.contains("ecs01") && said.contains("healthy"), "{said}");
                    }
                }
            }
        }
    }
    let [first, second, third] = &pages[..] else {
        bail!("the page has the client ask three times: {pages:?}");
    };
    let (ecs01, ecs02) = (&site.server("ecs01")?.page, &site.server("ecs02")?.page);
    ensure!(first == ecs01, "the only server: {first}");
    ensure!(second == ecs01 || second == ecs02, "{second}");
    ensure!(third == ecs02, "the other one is drained: {third}");

    // "Both servers answer now", and after the last commands again.
    let mut missing = vec![ecs01, ecs02];
    wait_until("both servers to answer", DEADLINE, || {
        let answer = site.curl()?;
        missing.retain(|page| answer.body() != Some(page.as_str()));
        ensure!(missing.is_empty(), "{missing:?} did not");
        Ok(())
    })?;
    let agent = agent.context("the page starts an agent")?;
    ensure!(agent.stop()?.success());
    show_log.all_is_well();
    Ok(())
}

#[test]
fn steps_of_a_page_are_read() {
    let page = "a `b`\n```toml\n[x]\n```\nc\n```sh gateway\nd\ne\n```\n```text\nf\n```\n```sh gateway run\nforwarder run -c forwarder.toml\n```\n";
    assert_eq!(
        steps(page),
        [
            Step::Configuration("[x]\n".to_owned()),
            Step::Commands {
                host: "gateway".to_owned(),
                lines: vec!["d".to_owned(), "e".to_owned()],
            },
            Step::Start,
        ]
    );
}
