//! The pictures of the documentation: the status page in a browser, `forwarder top` on a terminal, both of a real
//! agent with real traffic in a lab.
//!
//! `cargo xtask screenshots` calls it, and says where the pictures go.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use clap::Parser;
use forwarder_tests::{
    lab::{
        self, Lifetime,
        agent::{Agent, METRICS_ADDRESS},
        browser::{self, Browser, Screen},
        configuration::{Check, Configuration},
        load::{KeptConnection, curl},
        topology::{Extras, PORT, Site},
        wait_until,
    },
    terminal::{Terminal, picture},
};

/// Port of a listener that admits nobody in the lab.
const CLOSED_PORT: u16 = 8443;
/// How long traffic is watched before the pictures are taken: most of what a chart shows.
const TRAFFIC: Duration = Duration::from_secs(100);
/// The same after a server has failed.
const TRAFFIC_AFTER: Duration = Duration::from_secs(40);
/// Between two looks of a visitor.
const STEP: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes the pictures of the documentation. Needs root.
#[derive(Parser)]
#[command(name = "screenshots")]
struct Arguments {
    /// Where they go
    #[arg(long, value_name = "DIRECTORY")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match make(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn make(arguments: &Arguments) -> Result<()> {
    let missing: Vec<String> = lab::missing().into_iter().chain(browser::missing()).collect();
    ensure!(missing.is_empty(), "this host lacks {}", missing.join("; "));
    let extras = Extras {
        second_servers: true,
        ..Extras::default()
    };
    let mut site = Site::cross_region(Lifetime::Process, extras)?;
    let agent = site.start_agent(&configuration(&site), "web")?;
    let mut page = Browser::start(&site.lab, &site.gateway)?;
    page.open(&format!("http://{METRICS_ADDRESS}/"))?;
    let mut top = start_top(&site, &agent)?;

    eprintln!("traffic for {} s", TRAFFIC.as_secs());
    with_visitors(&site, || top.watch(TRAFFIC))?;
    site.kill_nginx("ecs04")?;
    with_visitors(&site, || take(&agent, &mut page, &mut top, arguments))
}

/// Does something while visitors come and go.
fn with_visitors(site: &Site, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let visitors = scope.spawn(|| visit(site, &is_over));
        let strangers = scope.spawn(|| knock(site, &is_over));
        let outcome = work();
        is_over.store(true, Ordering::Relaxed);
        match (visitors.join(), strangers.join()) {
            (Ok(visited), Ok(knocked)) => outcome.and(visited).and(knocked),
            _ => bail!("the visitors are gone"),
        }
    })
}

/// Two groups, and a listener that refuses everybody.
fn configuration(site: &Site) -> Configuration {
    let mut configuration = site.configuration(&[]).group("web", "full", Check::Http);
    for server in &site.servers {
        let weight = if server.is_remote { 50 } else { 100 };
        configuration = configuration.backend("web", server.name, server.address, PORT, weight);
    }
    configuration = configuration.group("admin", "full", Check::Http);
    for server in site.servers.iter().filter(|server| !server.is_remote) {
        configuration = configuration.backend("admin", server.name, server.address, PORT, 100);
    }
    configuration.listener("web", site.vip, PORT, "tcp", "web").table(
        "listener.admin",
        &[
            ("vip", &format!("\"{}\"", site.vip)),
            ("port", &CLOSED_PORT.to_string()),
            ("group", "\"admin\""),
            ("sources", "[\"10.0.0.0/8\"]"),
        ],
    )
}

fn start_top(site: &Site, agent: &Agent) -> Result<Terminal> {
    let mut command = site.gateway.command(agent.binary());
    command.arg("top").arg("--socket").arg(agent.control_socket());
    Terminal::start(command, 112, 30)
}

/// Clients that come and go, more and less of them.
fn visit(site: &Site, is_over: &AtomicBool) -> Result<()> {
    let client = site.client();
    let start = Instant::now();
    let mut kept = KeptConnection::open(client, site.vip, PORT)?;
    let mut step = 0_u32;
    while !is_over.load(Ordering::Relaxed) {
        let time = start.elapsed().as_secs_f64();
        let tide = 1.0 + 0.6 * (time / 9.0).sin() + 0.3 * (time / 2.3).sin();
        for _ in 0..(40.0 * tide) as u32 {
            // A server that has just failed takes its connections with it.
            if kept.get().is_err() {
                match KeptConnection::open(client, site.vip, PORT) {
                    Ok(connection) => kept = connection,
                    Err(_) => break,
                }
            }
        }
        if step.is_multiple_of(4) {
            curl(client, site.vip, PORT)?;
        }
        step += 1;
        thread::sleep(STEP);
    }
    Ok(())
}

/// Clients that are not admitted: each gives up when its SYNs are not answered.
fn knock(site: &Site, is_over: &AtomicBool) -> Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        curl(site.client(), site.vip, CLOSED_PORT)?;
    }
    Ok(())
}

fn take(agent: &Agent, page: &mut Browser, top: &mut Terminal, arguments: &Arguments) -> Result<()> {
    wait_until("the failure and its cause to be known", PATIENCE, || {
        let backend = agent.backend("web", "ecs04")?;
        ensure!(backend.diagnosis.is_some(), "{backend:?}");
        Ok(())
    })?;
    top.watch(TRAFFIC_AFTER)?;
    fs::create_dir_all(&arguments.out)?;
    let save = |name: &str, bytes: &[u8]| -> Result<()> {
        let path = arguments.out.join(name);
        fs::write(&path, bytes)?;
        eprintln!("{} ({} kB)", path.display(), bytes.len() / 1000);
        Ok(())
    };
    for (name, width, is_dark, is_phone) in [
        ("page-light.png", 1280, false, false),
        ("page-dark.png", 1280, true, false),
        ("page-phone.png", 390, false, true),
    ] {
        page.show_on(Screen {
            width,
            is_dark,
            is_phone,
        })?;
        wait_until("the page to be drawn anew", PATIENCE, || {
            let live = page.evaluate("document.getElementById('live').textContent")?;
            ensure!(live == "live", "{live}");
            Ok(())
        })?;
        top.watch(Duration::from_secs(2))?;
        save(name, &page.picture()?)?;
    }
    // The row of the backend that is out.
    top.write("2\x1b[F")?;
    top.wait_for("backend that is out", PATIENCE, |screen| {
        screen.contents().contains("hint:")
    })?;
    // The rest of what is drawn at a time.
    top.watch(STEP)?;
    save("top.svg", picture(top.screen()).as_bytes())
}
