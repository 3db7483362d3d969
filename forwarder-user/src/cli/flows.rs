//! `forwarder flows`: the live flows of the running agent, listed, counted or deleted.

use serde::Serialize;

use super::{
    args::{FlowsArgs, OutputFormat},
    ask, output,
    status::duration,
    table::{Align, lines},
};
use crate::{
    api::FLOWS_PATH,
    error::{Error, Errors},
    flows::{Deleted, FlowList, FlowQuery, FlowStatus},
};

/// The answer to `--count` as JSON.
#[derive(Serialize)]
struct Count {
    matching: u64,
}

/// Asks the agent and prints its answer.
///
/// # Errors
/// No agent answers, a filter names what does not exist, or the answer can't be written.
pub fn flows(args: &FlowsArgs) -> Result<(), Errors> {
    let query = query(args);
    let socket = &args.agent.socket;
    let is_json = args.output.output == OutputFormat::Json;
    if args.delete {
        if query.filters() == args.all {
            return Err(unclear(args.all).into());
        }
        let deleted: Deleted = ask::delete(socket, &path(&query)?)?;
        if is_json {
            output::json(&deleted)?;
        } else {
            output::text(&format!("{} deleted", flow_count(deleted.deleted)))?;
        }
        return Ok(());
    }
    let list: FlowList = ask::get(socket, &path(&query)?)?;
    match (args.count, is_json) {
        (true, true) => output::json(&Count {
            matching: list.matching,
        })?,
        (true, false) => output::text(&list.matching.to_string())?,
        (false, true) => output::json(&list)?,
        (false, false) => {
            output::text(&draw(&list.flows))?;
            let more = list.matching - list.flows.len() as u64;
            if more > 0 {
                output::talk(&format!("{} more; --limit N lists more", flow_count(more)));
            }
        }
    }
    Ok(())
}

fn unclear(all: bool) -> Error {
    if all {
        Error::usage("--all and a filter contradict each other").hint("leave one of them out")
    } else {
        Error::usage("which flows are to be deleted is not said")
            .hint("give a filter such as --client 192.0.2.7, or --all")
    }
}

fn query(args: &FlowsArgs) -> FlowQuery {
    FlowQuery {
        client: args.client,
        vip: args.vip,
        backend: args.backend.clone(),
        listener: args.listener.clone(),
        protocol: args
            .protocol
            .map(|protocol| protocol.protocol().name().to_owned()),
        state: args.state,
        limit: match (args.delete, args.count) {
            (true, _) => None,
            (_, true) => Some(0),
            _ => Some(args.limit),
        },
        all: args.all,
    }
}

fn path(query: &FlowQuery) -> Result<String, Error> {
    match serde_urlencoded::to_string(query) {
        Ok(query) => Ok(format!("{FLOWS_PATH}?{query}")),
        Err(error) => Err(Error::failed(format!("cannot write the request: {error}"))),
    }
}

fn flow_count(count: u64) -> String {
    format!("{count} flow{}", if count == 1 { "" } else { "s" })
}

fn draw(flows: &[FlowStatus]) -> String {
    let columns = [
        ("", Align::Left),
        ("CLIENT", Align::Left),
        ("VIP", Align::Left),
        ("LISTENER", Align::Left),
        ("BACKEND", Align::Left),
        ("BINDING", Align::Left),
        ("STATE", Align::Left),
        ("AGE", Align::Right),
        ("IDLE", Align::Right),
        ("PACKETS IN", Align::Right),
        ("BYTES IN", Align::Right),
        ("PACKETS OUT", Align::Right),
        ("BYTES OUT", Align::Right),
    ];
    let rows = flows.iter().map(|flow| {
        [
            flow.protocol.clone(),
            flow.client.to_string(),
            flow.vip.to_string(),
            flow.listener.clone(),
            format!("{}/{}", flow.group, flow.backend),
            flow.binding.to_string(),
            flow.state.to_string(),
            flow.age_secs
                .map_or_else(|| "new".to_owned(), |age| duration(age.into())),
            duration(flow.idle_secs.into()),
            flow.packets_in.to_string(),
            flow.bytes_in.to_string(),
            flow.packets_out.to_string(),
            flow.bytes_out.to_string(),
        ]
    });
    lines(columns, rows.collect()).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::FlowPhase;

    #[test]
    fn a_flow_is_one_line() {
        let flow = FlowStatus {
            protocol: "tcp".to_owned(),
            client: "192.0.2.7:51000".parse().unwrap(),
            vip: "198.51.100.10:443".parse().unwrap(),
            listener: "web".to_owned(),
            group: "web-eu".to_owned(),
            backend: "ecs01".to_owned(),
            backend_address: "10.20.0.5:8443".parse().unwrap(),
            binding: "100.64.0.2:20113".parse().unwrap(),
            state: FlowPhase::HalfOpen,
            age_secs: None,
            idle_secs: 61,
            packets_in: 1,
            bytes_in: 60,
            packets_out: 0,
            bytes_out: 0,
        };
        let text = draw(&[flow]);
        let line = text.lines().nth(1).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "tcp 192.0.2.7:51000 198.51.100.10:443 web web-eu/ecs01 100.64.0.2:20113 half_open new 1 min 1 s 1 60 0 0"
        );
    }

    #[test]
    fn deleting_asks_what() {
        assert!(unclear(false).hint.is_some_and(|hint| hint.contains("--all")));
        assert_eq!(unclear(true).exit_code, crate::error::EXIT_USAGE);
    }
}
