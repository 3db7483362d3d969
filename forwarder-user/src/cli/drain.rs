//! `forwarder drain`, `undrain` and `weight`: orders for one backend of the running agent.

use std::{path::Path, thread, time::Duration};

use super::{
    args::{AgentArgs, DrainArgs, OutputArgs, OutputFormat, UndrainArgs, WeightArgs},
    ask, output,
    status::duration,
};
use crate::{
    api::BACKEND_PATH,
    error::{Error, Errors},
    orders::{BackendOrder, BackendPath, Order},
    status::{BackendStatus, DrainStatus},
};

/// How often to ask how far it is; the agent counts once a second.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// Has a backend drained, and waits for its end if asked to.
///
/// # Errors
/// No agent answers, there is no such backend, or somebody undrains it while this waits.
pub fn drain(args: &DrainArgs) -> Result<(), Errors> {
    let timeout_secs = match args.timeout.map(|timeout| u32::try_from(timeout.as_secs())) {
        None => None,
        Some(Ok(secs)) => Some(secs),
        Some(Err(_)) => return Err(Error::usage("the timeout is longer than a century").into()),
    };
    let path = &args.backend.backend;
    let mut backend = order(&args.agent, path, Order::Drain { timeout_secs })?;
    if args.wait {
        backend = wait(&args.agent.socket, path, backend)?;
    }
    print(path, &backend, &args.output)
}

/// Lets a drained backend take new flows.
///
/// # Errors
/// No agent answers, or there is no such backend.
pub fn undrain(args: &UndrainArgs) -> Result<(), Errors> {
    let path = &args.backend.backend;
    let backend = order(&args.agent, path, Order::Undrain)?;
    print(path, &backend, &args.output)
}

/// Gives a backend another weight, or its own again.
///
/// # Errors
/// As for [`undrain`].
pub fn weight(args: &WeightArgs) -> Result<(), Errors> {
    let path = &args.backend.backend;
    let backend = order(&args.agent, path, Order::Weight { weight: args.weight })?;
    print(path, &backend, &args.output)
}

fn order(agent: &AgentArgs, path: &BackendPath, order: Order) -> Result<BackendStatus, Errors> {
    let order = BackendOrder {
        path: path.clone(),
        order,
    };
    ask::submit(&agent.socket, BACKEND_PATH, &order)
}

/// Asks until the backend has no flows; says how many there are whenever that is another number.
fn wait(socket: &Path, path: &BackendPath, mut backend: BackendStatus) -> Result<BackendStatus, Error> {
    let query = serde_urlencoded::to_string(path)
        .map_err(|error| Error::failed(format!("cannot write the request: {error}")))?;
    let mut said = None;
    loop {
        match &backend.drain {
            None => {
                return Err(Error::failed(format!("{path} takes new flows again"))
                    .hint("somebody has undrained it; drain it again"));
            }
            Some(drain) if drain.is_done => return Ok(backend),
            Some(drain) => {
                if said != Some(drain.flows_left) {
                    output::talk(&format!("{path}: {}", progress(drain)));
                    said = Some(drain.flows_left);
                }
            }
        }
        thread::sleep(ASK_INTERVAL);
        backend = ask::get(socket, &format!("{BACKEND_PATH}?{query}"))?;
    }
}

fn print(path: &BackendPath, backend: &BackendStatus, output: &OutputArgs) -> Result<(), Errors> {
    match output.output {
        OutputFormat::Text => output::text(&draw(path, backend))?,
        OutputFormat::Json => output::json(backend)?,
    }
    Ok(())
}

fn draw(path: &BackendPath, backend: &BackendStatus) -> String {
    let weight = match backend.ordered_weight {
        Some(weight) => format!("weight {weight} by order, {} as configured", backend.weight),
        None => format!("weight {}", backend.weight),
    };
    let state = match &backend.drain {
        Some(drain) => progress(drain),
        None => "takes new flows while it is healthy".to_owned(),
    };
    format!("{path}: {state}; {}, {weight}", backend.health)
}

/// How far a backend is with draining.
pub(super) fn progress(drain: &DrainStatus) -> String {
    if drain.is_done {
        return "drained".to_owned();
    }
    let mut text = format!(
        "draining, {} flow{} left",
        drain.flows_left,
        if drain.flows_left == 1 { "" } else { "s" }
    );
    match drain.ends_in_secs {
        Some(0) => text.push_str("; they are being ended"),
        Some(secs) => text.push_str(&format!("; ended in {}", duration(secs.into()))),
        None => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_clause() {
        let drain = |flows_left, is_done, ends_in_secs| {
            progress(&DrainStatus {
                by: "order".to_owned(),
                flows_left,
                is_done,
                ends_in_secs,
            })
        };
        assert_eq!(drain(41, false, None), "draining, 41 flows left");
        assert_eq!(
            drain(1, false, Some(61)),
            "draining, 1 flow left; ended in 1 min 1 s"
        );
        assert_eq!(drain(0, true, None), "drained");
    }
}
