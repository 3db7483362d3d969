//! `forwarder apply`: the running agent takes another configuration over, as a whole or not at all.

use std::fs;

use super::{
    args::{ApplyArgs, OutputFormat},
    ask, output,
};
use crate::{
    api::APPLY_PATH,
    change::{ChangeAnswer, Submission},
    config::load::load,
    error::{Error, Errors},
};

/// Checks the file, sends it to the agent, prints what has changed.
///
/// # Errors
/// What is wrong with the file, all at once; no agent answers; what the agent refuses. Then nothing has changed.
pub fn apply(args: &ApplyArgs) -> Result<(), Errors> {
    let file = &args.config.config;
    // Here first: the agent need not run for the file to be wrong.
    let config = load(file)?;
    let socket = args.socket.as_deref().unwrap_or(&config.agent.control_socket);
    let answer: ChangeAnswer = ask::submit(socket, APPLY_PATH, &submission(file)?)?;
    match args.output.output {
        OutputFormat::Text => output::text(&draw(&answer))?,
        OutputFormat::Json => output::json(&answer)?,
    }
    Ok(())
}

/// The file as it is sent to the agent.
pub(super) fn submission(file: &std::path::Path) -> Result<Submission, Error> {
    let text = fs::read_to_string(file)
        .map_err(|error| Error::usage(format!("cannot read {}: {error}", file.display())))?;
    Ok(Submission {
        file: file.to_owned(),
        text,
    })
}

/// The changes as text.
pub(super) fn draw(answer: &ChangeAnswer) -> String {
    let mut lines: Vec<String> = answer.changes.iter().map(ToString::to_string).collect();
    if lines.is_empty() {
        lines.push("nothing changes".to_owned());
    }
    if !answer.writes.is_empty() {
        let verb = if answer.applied {
            "written"
        } else {
            "to be written"
        };
        lines.push(String::new());
        lines.push(format!("tables, {} {verb} in this order", answer.writes.len()));
        lines.extend(answer.writes.iter().map(|write| format!("  {write}")));
    }
    lines.join("\n")
}
