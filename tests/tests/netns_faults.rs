//! Ring 3: a gateway under random faults, with clients that check every byte. `--test-threads=1`, as the other labs.
//!
//! Faults of servers, links, tunnels, routes, the flow table, the agent, its clock and its disk come in an order that a seed
//! decides, some at the same time. No byte may be wrong, none may reach another than it was meant for, and each request that
//! fails has to be explained by a fault that was in force and can cause just that (`forwarder_tests::blame`). What is done
//! to the agent explains nothing. First the agent is left alive, and what it takes stays flat; then it is killed as well, and
//! its table filled. When all clients have ended, its tables are as they were before the first came.
//!
//! `FORWARDER_FAULTS_SECONDS` and `FORWARDER_SOAK_SECONDS` say how long, `FORWARDER_FAULTS_SEED` repeats an order. Time and
//! load differ from run to run, so a seed repeats what is done, not what comes of it.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use forwarder_tests::{
    blame::{Explanation, History, seconds},
    lab::{
        self,
        agent::{self, ShowLog},
        trace::Resets,
        wait_until,
    },
    witness::Kind,
};
use rand::{SeedableRng as _, rngs::StdRng};

mod faults;

use faults::{
    script::{AGENT_CARDS, AgentCard, GENTLE_AGENT_CARDS, HOST_CARDS, NETWORK_CARDS, Stage},
    site::{IDLE_TIMEOUT, LISTENERS, SINK, Site, Testimony},
    watch::{Sample, ensure_flat, tables, watch},
};

/// `timeout` + `fall` x `interval` of the checks, with their jitter, are 2 s; `rise` takes no longer. One more for a
/// machine with other work.
const BOUND: Duration = Duration::from_secs(3);
/// How long the last packet of a flow holds its binding, how long ends that did not hear of each other's end may go on
/// repeating (TCP doubles its pauses), and what sweep and status lag behind.
const HOLD: Duration = Duration::from_secs(60 + 45 + 15);
/// Without faults, at the end of each part.
const CALM: Duration = Duration::from_secs(4);

/// How long before a client knows of a reset the kernel's word about it may be.
const BEFORE_RESET_NS: u64 = 20_000_000;

fn variable(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is a number")),
        Err(_) => Ok(default),
    }
}

/// Plays faults for so long, while clients ask; returns what was seen of the agent. `is_rough`: it is killed as well, and
/// its table filled.
fn part(stage: &Stage<'_>, is_rough: bool, length: Duration, seed: u64) -> Result<Vec<Sample>> {
    let name = |client: usize| format!("client{}-{seed}", client + 1);
    let clients = [stage.site.ask(0, &name(0))?, stage.site.ask(1, &name(1))?];
    let is_watched = AtomicBool::new(false);
    let random = |player: u64| StdRng::seed_from_u64(seed.wrapping_mul(5).wrapping_add(player));
    let agent_cards: &[AgentCard] = if is_rough {
        &AGENT_CARDS
    } else {
        &GENTLE_AGENT_CARDS
    };
    let samples = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let outcome = watch(stage, &is_watched);
            if outcome.is_err() {
                stage.end();
            }
            outcome
        });
        let mut players = vec![
            scope.spawn(|| stage.play(&HOST_CARDS, random(1), Stage::play_host)),
            scope.spawn(|| stage.play(&NETWORK_CARDS, random(2), Stage::play_network)),
            scope.spawn(|| stage.play(agent_cards, random(3), Stage::play_agent)),
        ];
        if is_rough {
            players.push(scope.spawn(|| stage.fill_tables(length, random(4))));
        }
        stage.last(length);
        stage.end();
        let mut outcomes: Vec<Result<()>> = Vec::new();
        for player in players {
            outcomes.push(
                player
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a player panicked"))),
            );
        }
        // Nothing is awaited: clients go on without faults.
        thread::sleep(CALM);
        is_watched.store(true, Ordering::Relaxed);
        let samples = watcher
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the watcher panicked")));
        // One may be the cause of the other.
        for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            println!("a player gave up: {error:#}");
        }
        outcomes.into_iter().collect::<Result<()>>()?;
        samples
    })?;
    for client in &clients {
        ensure!(!client.has_ended(), "a client has ended by itself");
        client.end()?;
    }
    Ok(samples)
}

/// Judges what the witnesses have written.
/// `resets`: the kernel's word about them, if it has one.
fn judge(stage: &Stage<'_>, resets: Option<&Resets>, seed: u64) -> Result<()> {
    let testimony = Testimony::of(stage.site)?;
    let history = History::new(
        stage.site.services(),
        stage.absences(),
        stage.faults(),
        BOUND,
        IDLE_TIMEOUT,
    );
    for (listener, totals) in &testimony.totals {
        println!("listener {listener}: {totals:?}");
    }
    let mut explained: BTreeMap<String, usize> = BTreeMap::new();
    let mut unexplained = Vec::new();
    for failure in &testimony.failures {
        match history.explanation(failure) {
            Some(Explanation { fault, is_late }) => {
                let late = if is_late { ", told late" } else { "" };
                let what = format!("{:?}: {}{late}", failure.kind, fault.name);
                *explained.entry(what).or_default() += 1;
            }
            None => unexplained.push(failure),
        }
    }
    println!(
        "{} faults, {} absences of the agent, {} failures",
        history.faults.len(),
        history.absences.len(),
        testimony.failures.len()
    );
    for (what, count) in &explained {
        println!("{count} x {what}");
    }
    for failure in &unexplained {
        println!(
            "UNEXPLAINED (seed {seed}), from {:.3} s to {:.3} s: {failure:?}",
            seconds(failure.since_ns),
            seconds(failure.at_ns)
        );
        for fault in history.near(failure) {
            println!("    near: {fault}");
        }
        for absence in &history.absences {
            if absence.from_ns <= failure.at_ns
                && absence
                    .until_ns
                    .is_none_or(|end| end + 15_000_000_000 >= failure.since_ns)
            {
                println!(
                    "    no agent from {:.3} s to {:.3} s",
                    seconds(absence.from_ns),
                    seconds(absence.until_ns.unwrap_or_default())
                );
            }
        }
    }
    for failure in unexplained.iter().filter(|failure| failure.kind == Kind::Reset) {
        let around = [failure.at_ns.saturating_sub(BEFORE_RESET_NS), failure.at_ns];
        let lines = resets.map_or(Ok(Vec::new()), |resets| resets.between(around[0], around[1]))?;
        println!("resets before {:.6} s: {lines:#?}", seconds(failure.at_ns));
    }
    ensure!(
        testimony.violations.is_empty(),
        "seed {seed}: {:#?}",
        testimony.violations
    );
    ensure!(
        unexplained.is_empty(),
        "seed {seed}: {} of {} failures have no explanation, see above",
        unexplained.len(),
        testimony.failures.len()
    );
    for listener in LISTENERS.iter().filter(|listener| listener.name != SINK.name) {
        let totals = testimony.totals.get(&listener.port).copied().unwrap_or_default();
        ensure!(
            totals.requests > 100,
            "hardly any request at {}: {totals:?}",
            listener.name
        );
    }
    Ok(())
}

#[test]
fn no_byte_is_wrong_and_every_failure_is_explained() -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let length = Duration::from_secs(variable("FORWARDER_FAULTS_SECONDS", 60)?);
    let soak = Duration::from_secs(variable("FORWARDER_SOAK_SECONDS", 30)?);
    let seed = match variable("FORWARDER_FAULTS_SEED", 0)? {
        0 => u64::from(rand::random::<u32>()) + 1,
        seed => seed,
    };
    println!("seed {seed}: FORWARDER_FAULTS_SEED={seed} plays the same faults again");
    let site = Site::new()?;
    let show_log = ShowLog::of(&site.lab);
    let resets =
        Resets::record(&site.lab).inspect_err(|error| println!("without the kernel's word: {error:#}"));
    let resets = resets.as_ref().ok();
    let stage = Stage::set(&site)?;
    stage.await_health()?;
    let before = tables(&site)?;

    if !soak.is_zero() {
        let samples = part(&stage, false, soak, seed)?;
        judge(&stage, resets, seed)?;
        ensure_flat(&samples)?;
    }
    if !length.is_zero() {
        stage.go_on();
        part(&stage, true, length, seed + 1)?;
        judge(&stage, resets, seed)?;
    }

    // Flows end, and nothing of them is left.
    stage.restore()?;
    let (_, after) = wait_until("all bindings to be free", HOLD, || {
        let gateway = stage.gateway();
        let agent = gateway.agent.as_ref().context("no agent")?;
        let used = agent.status()?.pool.used;
        if used > 0 {
            let flows = agent.ask("flows", &[])?.stdout;
            bail!("{used} are in use: {}", String::from_utf8_lossy(&flows));
        }
        Ok(())
    })?;
    println!("no flow was left after {:.0} s", after.as_secs_f64());
    let left = tables(&site)?;
    ensure!(left == before, "tables before: {before:#?}\nand after: {left:#?}");
    show_log.all_is_well();
    Ok(())
}
