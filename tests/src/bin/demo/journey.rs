//! The three journeys, step by step. A step that does not hold is an error that says what was expected and
//! what was seen.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use forwarder_tests::lab::{
    Namespace,
    agent::Agent,
    load::Answer,
    status::{BackendStatus, DiagnosisStatus, HEALTHY},
    topology::{BACK_TO_ORIGIN, PORT, Site},
};

use crate::screen::Screen;

/// The group and listener of every journey.
const GROUP: &str = "web";
/// How long a backend may take to be taken out or in. The checks of the labs need 2 s at most; a busy
/// machine more.
const HEALTH_DEADLINE: Duration = Duration::from_secs(15);
/// Between two requests while a failover is watched: a client that refreshes its page.
const REFRESH: Duration = Duration::from_millis(200);
/// How long the agent's counters may lag behind the traffic.
const COUNTER_DEADLINE: Duration = Duration::from_secs(5);
/// Requests of the first look at a site.
const FIRST_REQUESTS: usize = 10;
/// Requests after which every server of a site must have answered; with two servers and a fair choice, one
/// run in 2³⁹ fails.
const MOST_REQUESTS: usize = 40;
/// Requests after a failover, none of which may fail.
const FURTHER_REQUESTS: usize = 20;

/// One of the things a remote backend cannot do without.
struct Need<'a> {
    what: &'a str,
    host: &'a Namespace,
    /// Command that takes it away.
    take: &'a str,
    /// Command that puts it back.
    give: &'a str,
    /// What the agent has to call it.
    cause: &'a str,
}

/// A journey under way.
pub(crate) struct Play {
    screen: Screen,
    pub(crate) site: Site,
    /// Requests sent so far.
    requests: usize,
    /// Connections that each backend must have been given so far.
    connections: BTreeMap<&'static str, u64>,
}

impl Play {
    pub(crate) fn new(screen: Screen, site: Site) -> Self {
        let connections = site.servers.iter().map(|server| (server.name, 0)).collect();
        Self {
            screen,
            site,
            requests: 0,
            connections,
        }
    }

    /// One remote server: its page appears on the VIP.
    pub(crate) fn peering(&mut self) -> Result<()> {
        let agent = self.start_agent()?;
        self.part_requests()?;
        self.show_counters(&agent)?;
        self.check_source()?;
        self.finish(&agent)
    }

    /// Two servers take turns; one fails and comes back.
    pub(crate) fn cross_region(&mut self) -> Result<()> {
        let agent = self.start_agent()?;
        self.part_requests()?;
        self.show_counters(&agent)?;
        self.fail_over(&agent, "ecs01")?;
        self.show_counters(&agent)?;
        self.come_back(&agent, "ecs01")?;
        self.show_counters(&agent)?;
        self.finish(&agent)
    }

    /// The three things a remote backend needs are taken away in turn; the agent names each.
    pub(crate) fn manual_routes(&mut self) -> Result<()> {
        let agent = self.start_agent()?;
        self.part_requests()?;
        let gateway = self.site.gateway.clone();
        let router = self.site.far_router.clone();
        let server = self.site.server("ecs02")?.namespace.clone();
        let needs = [
            Need {
                what: "the route to the remote CIDR, in the gateway's network",
                host: &gateway,
                take: "ip route delete 192.168.0.0/16",
                give: "ip route add 192.168.0.0/16 via 169.254.42.2",
                cause: "no-route",
            },
            Need {
                what: "the back-to-origin route, in the transit router of the remote region",
                host: &router,
                take: "ip route delete 100.64.0.0/26",
                give: "ip route add 100.64.0.0/26 via 169.254.42.1",
                cause: "no-return-route",
            },
            Need {
                what: "the inbound rule on the server",
                host: &server,
                take: &format!("nft delete element ip security_group admitted {{ {BACK_TO_ORIGIN} }}"),
                give: &format!("nft add element ip security_group admitted {{ {BACK_TO_ORIGIN} }}"),
                cause: "filtered",
            },
        ];
        for need in &needs {
            self.miss(&agent, need)?;
        }
        self.show_counters(&agent)?;
        self.finish(&agent)
    }

    fn start_agent(&self) -> Result<Agent> {
        let names: Vec<_> = self.site.servers.iter().map(|server| server.name).collect();
        self.screen
            .held(format!("the lab is up: nginx runs on {}", names.join(" and ")));
        let agent = self.site.start_agent(&self.site.web_configuration(), GROUP)?;
        self.screen.held(format!(
            "the agent is ready after {:.1} s; all backends are healthy",
            agent.ready_after.as_secs_f64()
        ));
        Ok(agent)
    }

    /// Requests until every server has answered.
    fn part_requests(&mut self) -> Result<()> {
        self.screen.part("The client asks the VIP");
        self.screen
            .command("client", &format!("curl http://{}:{PORT}/", self.site.vip));
        let mut answered: BTreeMap<&str, usize> = BTreeMap::new();
        for number in 1..=MOST_REQUESTS {
            let server = self.request()?;
            let Ok(server) = server else {
                bail!("expected a page on request {number}, but it failed")
            };
            *answered.entry(server).or_default() += 1;
            if number >= FIRST_REQUESTS && answered.len() == self.site.servers.len() {
                break;
            }
        }
        ensure!(
            answered.len() == self.site.servers.len(),
            "expected answers from all {} servers, saw only {answered:?}",
            self.site.servers.len()
        );
        let shares: Vec<_> = answered
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        self.screen
            .held(format!("every request was answered: {}", shares.join(", ")));
        Ok(())
    }

    /// One request; the server that answered, or why none did.
    fn request(&mut self) -> Result<Result<&'static str, String>> {
        self.requests += 1;
        match self.site.curl()? {
            Answer::Body(page) => {
                self.screen.request(self.requests, Ok(&page));
                let server = self.site.answered_by(&page);
                let name = server
                    .with_context(|| format!("{page:?} is not the page of any server"))?
                    .name;
                *self.connections.entry(name).or_default() += 1;
                Ok(Ok(name))
            }
            Answer::Failed(why) => {
                self.screen.request(self.requests, Err(&why));
                Ok(Err(why))
            }
        }
    }

    /// The agent's counters per backend; they must agree with what the client saw.
    fn show_counters(&self, agent: &Agent) -> Result<()> {
        self.screen.part("The agent's counters");
        let (backends, _) = self.screen.wait("the counters to agree", COUNTER_DEADLINE, || {
            let backends = agent.backends(GROUP)?;
            for backend in &backends {
                let (counted, own) = (
                    backend.traffic.connections_opened,
                    self.connections.get(&*backend.name),
                );
                ensure!(
                    own == Some(&counted),
                    "{}: the agent counts {counted} connections, the client {own:?}",
                    backend.name
                );
            }
            Ok(backends)
        })?;
        let rows: Vec<_> = backends.iter().map(row).collect();
        self.screen.table(
            [
                "backend",
                "address",
                "health",
                "connections",
                "packets to",
                "packets from",
            ],
            &rows,
        );
        self.screen
            .held("connections per backend are what the client counted");
        Ok(())
    }

    /// The remote server sees back-to-origin addresses only.
    fn check_source(&self) -> Result<()> {
        let server = &self.site.servers[0];
        let sources: Vec<_> = server.nginx.access_log()?.sources().collect();
        let own = sources.iter().all(|source| {
            let [a, b, c, d] = source.octets();
            [a, b, c] == [100, 64, 0] && d < 64
        });
        ensure!(
            own,
            "expected sources out of 100.64.0.0/26 in the server's access log, saw {sources:?}"
        );
        self.screen.held(format!(
            "{} saw only back-to-origin addresses (100.64.0.0/26)",
            server.name
        ));
        Ok(())
    }

    /// A server's nginx stops; after the agent noticed, no request fails.
    fn fail_over(&mut self, agent: &Agent, name: &'static str) -> Result<()> {
        self.screen.part(&format!("nginx stops on {name}"));
        self.screen.command(name, "systemctl stop nginx");
        self.site.stop_nginx(name)?;
        let stopped = Instant::now();
        let mut failed = 0;
        loop {
            if agent.backend(GROUP, name)?.health != HEALTHY {
                break;
            }
            ensure!(
                stopped.elapsed() < HEALTH_DEADLINE,
                "expected {name} to be taken out within {} s, but it is still called healthy",
                HEALTH_DEADLINE.as_secs()
            );
            if self.request()?.is_err() {
                failed += 1;
                // Only the stopped server refuses, and the agent counts the attempt as a connection of it.
                *self.connections.entry(name).or_default() += 1;
            }
            thread::sleep(REFRESH);
        }
        self.screen.held(format!(
            "the agent took {name} out after {:.1} s; {failed} of the requests until then failed",
            stopped.elapsed().as_secs_f64()
        ));
        for _ in 0..FURTHER_REQUESTS {
            match self.request()? {
                Ok(server) if server != name => {}
                other => bail!("expected an answer from another server than {name}, saw {other:?}"),
            }
        }
        self.screen.held(format!(
            "{FURTHER_REQUESTS} further requests, none failed, none went to {name}"
        ));
        Ok(())
    }

    /// A server's nginx starts again and gets requests again.
    fn come_back(&mut self, agent: &Agent, name: &'static str) -> Result<()> {
        self.screen.part(&format!("nginx starts again on {name}"));
        self.screen.command(name, "systemctl start nginx");
        self.site.start_nginx(name)?;
        let took = self.wait_until_healthy(agent, name)?;
        self.screen.held(format!(
            "{name} is healthy again after {:.1} s",
            took.as_secs_f64()
        ));
        self.answers_again(name)
    }

    /// Requests until a certain server answers one; none may fail.
    fn answers_again(&mut self, name: &str) -> Result<()> {
        for _ in 0..MOST_REQUESTS {
            match self.request()? {
                Ok(server) if server == name => {
                    self.screen.held(format!("{name} answers again"));
                    return Ok(());
                }
                Ok(_) => {}
                Err(why) => bail!("expected every request to be answered, saw {why}"),
            }
        }
        bail!("expected {name} to answer one of {MOST_REQUESTS} requests, but it answered none")
    }

    fn wait_until_healthy(&self, agent: &Agent, name: &str) -> Result<Duration> {
        let what = format!("{name} to be healthy");
        let ((), took) = self.screen.wait(&what, HEALTH_DEADLINE, || {
            let backend = agent.backend(GROUP, name)?;
            ensure!(backend.health == HEALTHY, "it is {}", backend.health);
            Ok(())
        })?;
        Ok(took)
    }

    /// Takes one need of ECS02 away, lets the agent name it, and puts it back.
    fn miss(&mut self, agent: &Agent, need: &Need<'_>) -> Result<()> {
        const REMOTE: &str = "ecs02";
        self.screen.part(&format!("Taken away: {}", need.what));
        self.screen.command(need.host.role(), need.take);
        need.host.run(need.take)?;
        let what = format!("the agent to say \"{}\" about {REMOTE}", need.cause);
        let (diagnosis, took) = self.screen.wait(&what, HEALTH_DEADLINE, || {
            let backend = agent.backend(GROUP, REMOTE)?;
            let cause = backend
                .diagnosis
                .as_ref()
                .map_or("none", |diagnosis| &*diagnosis.cause);
            ensure!(
                backend.health != HEALTHY && cause == need.cause,
                "it is {}, diagnosis: {cause}",
                backend.health
            );
            backend.diagnosis.context("a diagnosis")
        })?;
        self.screen.held(format!(
            "after {:.1} s the agent names it: {}",
            took.as_secs_f64(),
            diagnosis.cause
        ));
        self.screen.say(format!("  {}", diagnosis.text));
        if let Some(hint) = &diagnosis.hint {
            self.screen.say(format!("  hint: {hint}"));
        }
        for _ in 0..3 {
            let answer = self.request()?;
            ensure!(
                answer == Ok("ecs01"),
                "expected ecs01 to answer meanwhile, saw {answer:?}"
            );
        }
        let give = command_of(&diagnosis).unwrap_or_else(|| need.give.to_owned());
        self.screen.command(need.host.role(), &give);
        need.host.run(&give)?;
        let took = self.wait_until_healthy(agent, REMOTE)?;
        self.screen.held(format!(
            "put back: {REMOTE} is healthy again after {:.1} s",
            took.as_secs_f64()
        ));
        self.answers_again(REMOTE)
    }

    /// Stops the agent; it has to leave cleanly.
    fn finish(&self, agent: &Agent) -> Result<()> {
        if self.site.lab.is_keepable() {
            return Ok(());
        }
        let status = agent.stop()?;
        ensure!(
            status.success(),
            "expected the agent to end with status 0 on SIGTERM, saw {status}"
        );
        self.screen.say("");
        self.screen.held("the agent stopped cleanly");
        Ok(())
    }
}

fn row(backend: &BackendStatus) -> [String; 6] {
    [
        backend.name.clone(),
        backend.endpoint(),
        backend.health.clone(),
        backend.traffic.connections_opened.to_string(),
        backend.traffic.packets_in.to_string(),
        backend.traffic.packets_out.to_string(),
    ]
}

/// A command in the hint that can be run as it is: quoted in backticks, a single one, nothing to fill in.
fn command_of(diagnosis: &DiagnosisStatus) -> Option<String> {
    let hint = diagnosis.hint.as_deref()?;
    let command = hint
        .split('`')
        .skip(1)
        .step_by(2)
        .find(|text| text.starts_with("ip route "))?;
    (!command.contains(['<', ';'])).then(|| command.to_owned())
}
