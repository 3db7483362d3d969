//! `forwarder plan`: what a configuration needs, and what it would change, before anything is applied.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use anstyle::Style;
use ipnet::IpNet;
use serde::Serialize;

use super::{
    apply::{draw, submission},
    args::{OutputFormat, PlanArgs},
    ask, output,
    table::{Align, lines},
};
use crate::{
    agent,
    api::PLAN_PATH,
    change::ChangeAnswer,
    config::{Config, Ports, load::load},
    datapath::object,
    error::{Error, Errors},
    network::Network,
    requirements::{NetworkNeeds, PoolNeeds, Requirements, TableNeeds},
    state::difference::differences,
};

const TITLE: Style = Style::new().bold();

/// The whole answer.
#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    requirements: Requirements,
    /// Is there an agent that this was compared with? If not, everything is created.
    agent_is_running: bool,
    #[serde(flatten)]
    change: ChangeAnswer,
}

/// Prints what the configuration needs and changes.
///
/// # Errors
/// What is wrong with the file; what the running agent would refuse.
pub fn plan(args: &PlanArgs) -> Result<(), Errors> {
    let file = &args.config.config;
    let config = load(file)?;
    let socket = args.socket.as_deref().unwrap_or(&config.agent.control_socket);
    let requirements = requirements(&config, args.flows_per_backend)?;
    let agent_is_running = ask::is_running(socket);
    let (change, refusal) = if agent_is_running {
        match change_by_agent(socket, file) {
            Ok(change) => (change, None),
            Err(errors) => (ChangeAnswer::default(), Some(errors)),
        }
    } else {
        let changes = differences(None, &config);
        (
            ChangeAnswer {
                changes,
                ..ChangeAnswer::default()
            },
            None,
        )
    };
    let answer = Answer {
        requirements,
        agent_is_running,
        change,
    };
    match args.output.output {
        OutputFormat::Text => output::text(&text(&answer, socket, refusal.is_some()))?,
        OutputFormat::Json => output::json(&answer)?,
    }
    refusal.map_or(Ok(()), Err)
}

fn change_by_agent(socket: &Path, file: &Path) -> Result<ChangeAnswer, Errors> {
    ask::submit(socket, PLAN_PATH, &submission(file)?)
}

fn requirements(config: &Config, flows_per_backend: Option<u64>) -> Result<Requirements, Error> {
    let sizes = agent::sizes(config).with_room();
    Ok(Requirements::of(
        config,
        flows_per_backend,
        &sizes,
        &object::layout()?,
        &own_addresses(config),
        object::possible_cpus()?,
    ))
}

/// The addresses that this host has on the devices of the configuration; on another host than the gateway, none.
fn own_addresses(config: &Config) -> BTreeMap<String, Vec<IpNet>> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return BTreeMap::new();
    };
    runtime.block_on(async {
        let mut all = BTreeMap::new();
        let Ok(network) = Network::open() else { return all };
        for name in config.interfaces.keys().chain(config.tunnels.keys()) {
            if let Ok(Some(link)) = network.interface(name).await
                && let Ok(addresses) = network.addresses(link.index).await
            {
                all.insert(name.clone(), addresses);
            }
        }
        all
    })
}

fn text(answer: &Answer, socket: &Path, is_refused: bool) -> String {
    let requirements = &answer.requirements;
    let mut text = vec![format!("{TITLE}SNAT pool{TITLE:#}")];
    text.extend(pool(&requirements.pool));
    text.push(format!("\n{TITLE}Memory{TITLE:#}"));
    text.extend(tables(&requirements.tables, requirements.memory_bytes));
    for network in &requirements.networks {
        text.extend(far_side(network));
    }
    text.push(format!("\n{TITLE}Changes{TITLE:#}"));
    if is_refused {
        text.push(format!(
            "the agent on {} refuses this configuration",
            socket.display()
        ));
    } else {
        if !answer.agent_is_running {
            text.push(format!(
                "no agent runs on {}: everything would be created",
                socket.display()
            ));
        }
        text.push(draw(&answer.change));
    }
    text.join("\n")
}

fn pool(pool: &PoolNeeds) -> Vec<String> {
    let PoolNeeds {
        backends,
        flows,
        flows_per_address,
        addresses,
        addresses_present,
        ..
    } = pool;
    let mut text = Vec::new();
    match (pool.flows_per_backend, pool.addresses_per_backend) {
        (Some(per_backend), Some(alone)) => text.push(format!(
            "{per_backend} flows x {backends} backends = {flows} flows ({alone} addresses for one backend alone)"
        )),
        _ => text.push(format!("{flows} flows of {backends} backends together (agent.max_flows)")),
    }
    text.push(format!(
        "{flows} flows / {flows_per_address} per address = {addresses} addresses; {addresses_present} are there"
    ));
    if pool.shortages.is_empty() {
        text.push("enough".to_owned());
    }
    text.extend(
        pool.shortages
            .iter()
            .map(|shortage| format!("missing: {shortage}")),
    );
    text
}

fn tables(tables: &[TableNeeds], memory_bytes: u64) -> Vec<String> {
    let columns = [
        ("TABLE", Align::Left),
        ("ENTRIES", Align::Right),
        ("BYTES EACH", Align::Right),
        ("KIB", Align::Right),
    ];
    let row = |table: &TableNeeds| {
        [
            table.name.clone(),
            table.entries.to_string(),
            table.entry_bytes.to_string(),
            table.memory_bytes.div_ceil(1024).to_string(),
        ]
    };
    let mut text = lines(columns, tables.iter().map(row).collect());
    text.push(format!(
        "{:.1} MiB in total, taken at start but for LISTENER_RANGES and SOURCES, which take theirs as they fill",
        memory_bytes as f64 / f64::from(1 << 20)
    ));
    text
}

fn far_side(network: &NetworkNeeds) -> Vec<String> {
    let name = &network.network;
    let through = match &network.tunnel {
        Some(tunnel) => format!(" behind {tunnel}"),
        None => String::new(),
    };
    let mut text = vec![format!("\n{TITLE}Network {name}{through}{TITLE:#}")];
    if network.admit.is_empty() {
        text.push("no backend is there".to_owned());
        return text;
    }
    let sources = |to: IpAddr| {
        let prefixes = network.prefixes.iter();
        let same = prefixes.filter(|prefix| prefix.addr().is_ipv4() == to.is_ipv4());
        same.map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    for (prefix, gateway) in network.routes() {
        let gateway = gateway.map_or_else(|| "the gateway".to_owned(), |gateway| gateway.to_string());
        text.push(format!("route      {prefix} to {gateway}"));
    }
    for rule in &network.admit {
        let ports = Ports {
            first: rule.first_port,
            last: rule.last_port,
        };
        let port = if ports == Ports::NONE {
            String::new()
        } else {
            format!(" port {ports}")
        };
        text.push(format!(
            "admit      {} from {} to {}{port} ({})",
            rule.protocol,
            sources(rule.to),
            rule.to,
            rule.purpose
        ));
    }
    text.push("on the routers there, and on servers that have the gateway as a neighbour:".to_owned());
    text.extend(network.iproute2.iter().map(|line| format!("  {line}")));
    text.push("on the servers, one of:".to_owned());
    text.extend(
        network
            .nftables
            .iter()
            .chain(&network.iptables)
            .map(|line| format!("  {line}")),
    );
    text.extend(network.notes.iter().map(|note| format!("note: {note}")));
    text
}
