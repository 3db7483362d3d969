//! Ring 3: `forwarder top` on a real terminal, asking a real agent. `--test-threads=1`, as the other labs.

use std::time::Duration;

use anyhow::{Result, ensure};
use forwarder_tests::{
    lab::{
        self, Lifetime,
        agent::{self, Agent, ShowLog},
        topology::{Extras, Site},
    },
    terminal::Terminal,
};
use nix::sys::signal::Signal;

/// Patience with slow machines; nothing takes so long.
const DEADLINE: Duration = Duration::from_secs(30);

fn start(site: &Site, agent: &Agent) -> Result<Terminal> {
    let mut command = site.gateway.command(agent.binary());
    command.arg("top").arg("--socket").arg(agent.control_socket());
    Terminal::start(command, 120, 30)
}

#[test]
fn the_dashboard_shows_the_agent_s_numbers_and_gives_the_terminal_back() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let mut site = Site::cross_region(Lifetime::Process, Extras::default())?;
    let show_log = ShowLog::of(&site.lab);
    let agent = site.start_agent(&site.web_configuration(), "web")?;
    for _ in 0..3 {
        site.curl()?;
    }

    let mut terminal = start(&site, &agent)?;
    terminal.wait_for("listener with its connections", DEADLINE, |screen| {
        let text = screen.contents();
        text.contains("172.16.0.100:80/tcp") && text.contains("opened 3, answered 3")
    })?;
    ensure!(!terminal.is_as_before()?, "it has taken the terminal");
    terminal.write("2")?;
    terminal.wait_for("healthy backend behind the tunnel", DEADLINE, |screen| {
        let text = screen.contents();
        text.lines()
            .any(|line| line.contains("web/ecs02") && line.contains("healthy") && line.contains("cen"))
    })?;
    site.kill_nginx("ecs02")?;
    terminal.write("\x1b[B")?;
    terminal.wait_for("backend that is out, and why", DEADLINE, |screen| {
        let text = screen.contents();
        text.contains("unhealthy") && text.contains("refused: ")
    })?;
    terminal.write("3")?;
    terminal.wait_for("tunnel", DEADLINE, |screen| {
        screen.contents().contains("FAR SIDE")
    })?;

    // Three ways to end it, and each gives the terminal back.
    for end in ["q", "\x03", "SIGTERM"] {
        if end == "SIGTERM" {
            terminal.signal(Signal::SIGTERM)?;
        } else {
            terminal.write(end)?;
        }
        let status = terminal.end(DEADLINE)?;
        ensure!(status.success(), "{end:?}: {status}");
        ensure!(terminal.is_as_before()?, "{end:?} leaves the terminal as it is");
        terminal = start(&site, &agent)?;
        terminal.wait_for("dashboard", DEADLINE, |screen| {
            screen.contents().contains("172.16.0.100:80/tcp")
        })?;
    }

    // Without an agent it goes on, and says so.
    agent.stop()?;
    terminal.wait_for("word that the agent is gone", DEADLINE, |screen| {
        screen.contents().contains("no agent answers")
    })?;
    show_log.all_is_well();
    Ok(())
}
