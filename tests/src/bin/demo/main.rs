//! The demonstration: the journeys of a user of cross-network backends, with real nginx servers, real curl
//! clients and the real agent, in network namespaces of this machine.
//!
//! Its exit status is 0 only if every step held. Whatever it made is removed again, also after a failure or
//! Ctrl-C, unless `--keep` says otherwise. It installs and builds nothing: `cargo xtask demo` does.

mod journey;
mod screen;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use forwarder_tests::lab::{
    self, Lifetime, agent,
    topology::{Extras, PORT, Site},
};

use crate::{journey::Play, screen::Screen};

/// Exit statuses of the project's programs.
const EXIT_FAILED: u8 = 1;
const EXIT_HOST: u8 = 3;

/// Lines of the agent's log that a failed step shows.
const LOG_LINES: usize = 25;

/// Shows the forwarder at work, in network namespaces of this machine. Needs root.
#[derive(Parser)]
#[command(name = "demo")]
struct Arguments {
    /// Show only this journey
    #[arg(long, value_enum)]
    journey: Option<Journey>,
    /// Leave the lab of the last journey up, and print commands to play with it
    #[arg(long)]
    keep: bool,
    /// Take down the labs that --keep left, and do nothing else
    #[arg(long, conflicts_with_all = ["journey", "keep"])]
    down: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Journey {
    /// One remote server behind a tunnel
    Peering,
    /// A local and a remote server behind one listener, and a failover
    CrossRegion,
    /// Each route and rule that a remote server needs, taken away in turn
    ManualRoutes,
}

impl Journey {
    fn title(self) -> &'static str {
        match self {
            Self::Peering => "Journey 1, peering: one remote backend",
            Self::CrossRegion => "Journey 2, cross-region: local and remote backends behind one listener",
            Self::ManualRoutes => "Journey 3, manual routes: what is missing, and who says so",
        }
    }

    fn site(self, lifetime: Lifetime) -> Result<Site> {
        match self {
            Self::Peering => Site::peering(lifetime),
            Self::CrossRegion => Site::cross_region(lifetime, Extras::default()),
            Self::ManualRoutes => Site::cross_region(
                lifetime,
                Extras {
                    security_groups: true,
                    ..Extras::default()
                },
            ),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let screen = Screen::new();
    let missing = lab::missing();
    if !missing.is_empty() {
        eprintln!("error: this host cannot run the demonstration; it lacks");
        for one in missing {
            eprintln!("  {one}");
        }
        return ExitCode::from(EXIT_HOST);
    }
    let outcome = if arguments.down {
        take_down(screen)
    } else {
        show(screen, &arguments)
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn take_down(screen: Screen) -> Result<()> {
    match lab::remove_kept()? {
        0 => screen.say("No lab was kept."),
        1 => screen.held("the lab is gone"),
        count => screen.held(format!("{count} labs are gone")),
    }
    Ok(())
}

/// Shows one journey after another, and stops at the first that fails.
fn show(screen: Screen, arguments: &Arguments) -> Result<()> {
    // Before anything is built up: without it nothing can be shown.
    agent::binary()?;
    let journeys = match arguments.journey {
        Some(one) => vec![one],
        None => Journey::value_variants().to_vec(),
    };
    for (index, journey) in journeys.iter().enumerate() {
        let keep = arguments.keep && index + 1 == journeys.len();
        show_one(screen, *journey, keep).with_context(|| format!("{} did not hold", name(*journey)))?;
    }
    screen.say("");
    let names: Vec<_> = journeys.iter().map(|journey| name(*journey)).collect();
    screen.held(format!("every step held: {}", names.join(", ")));
    Ok(())
}

fn name(journey: Journey) -> String {
    journey
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

fn show_one(screen: Screen, journey: Journey, keep: bool) -> Result<()> {
    screen.heading(journey.title());
    let lifetime = if keep {
        Lifetime::Keepable
    } else {
        Lifetime::Process
    };
    let site = journey.site(lifetime)?;
    screen.say(site.drawing);
    screen.say("");
    let mut play = Play::new(screen, site);
    let outcome = match journey {
        Journey::Peering => play.peering(),
        Journey::CrossRegion => play.cross_region(),
        Journey::ManualRoutes => play.manual_routes(),
    };
    let agent_log = agent::log(&play.site.lab);
    if let Err(error) = &outcome {
        screen.failed(format!("{error:#}"));
        screen.aside(format!(
            "the agent's log ends so:\n{}",
            lab::tail(&agent_log, LOG_LINES)
        ));
    }
    if keep {
        explain(screen, &play.site)?;
        play.site.lab.keep()?;
    }
    outcome
}

/// Prints what can be done with a lab that stays.
fn explain(screen: Screen, site: &Site) -> Result<()> {
    let (client, gateway, vip) = (site.client().enter(), site.gateway.enter(), site.vip);
    let forwarder = agent::binary()?;
    let socket = agent::control_socket(&site.lab);
    let mut commands = vec![
        (
            "a request of the client".to_owned(),
            format!("{client} curl http://{vip}:{PORT}/"),
        ),
        (
            "the agent's status".to_owned(),
            format!("{} status --socket {}", forwarder.display(), socket.display()),
        ),
        (
            "its metrics".to_owned(),
            format!("{gateway} curl http://{}/metrics", agent::METRICS_ADDRESS),
        ),
        (
            "its log".to_owned(),
            format!("tail -f {}", agent::log(&site.lab).display()),
        ),
    ];
    for server in &site.servers {
        let (name, nginx, enter) = (server.name, server.nginx.command_line(), server.namespace.enter());
        commands.push((format!("stop nginx on {name}"), format!("{nginx} -s quit")));
        commands.push((
            "start it again, in the background of this shell".to_owned(),
            format!("{enter} {nginx} &"),
        ));
    }
    for host in [&site.gateway, &site.far_router] {
        commands.push((
            format!("a shell on the {}", host.role()),
            format!("{} bash", host.enter()),
        ));
    }
    screen.part("The lab stays up. To play with it:");
    for (what, command) in commands {
        screen.aside(format!("  # {what}"));
        screen.say(format!("  {command}"));
    }
    screen.part("To take it down:");
    screen.say(format!("  {} --down", std::env::current_exe()?.display()));
    Ok(())
}
