//! How answers and errors reach the user.
//!
//! Answers go to stdout, errors to stderr. A reader that goes away (`| head`) ends the output and is no
//! error. Colour appears on a terminal only, and not where `NO_COLOR` is set; `anstream` sees to both.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::error::{Error, Errors};

const ERROR: Style = AnsiColor::Red.on_default().bold();

/// Writes lines of text to stdout; a line break is added at the end.
///
/// # Errors
/// The output can't be written, for instance because a disk is full.
pub fn text(text: &str) -> Result<(), Error> {
    let mut stdout = anstream::stdout().lock();
    written(writeln!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// Writes a line of talk to stderr.
pub fn talk(text: &str) {
    // There is no other place to say that it can't be written.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// Writes `answer` to stdout as indented JSON.
///
/// # Errors
/// As [`text`].
pub fn json(answer: &impl Serialize) -> Result<(), Error> {
    match serde_json::to_string_pretty(answer) {
        Ok(json) => text(&json),
        Err(error) => Err(Error::failed(format!("cannot write the answer as JSON: {error}"))),
    }
}

fn written(outcome: io::Result<()>) -> Result<(), Error> {
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes every error to stderr, an empty line between two.
pub fn errors(errors: &Errors) {
    let mut stderr = anstream::stderr().lock();
    for (index, error) in errors.0.iter().enumerate() {
        let gap = if index > 0 { "\n" } else { "" };
        let text = error.to_string();
        let outcome = match text.strip_prefix("error:") {
            Some(rest) => writeln!(stderr, "{gap}{ERROR}error:{ERROR:#}{rest}"),
            None => writeln!(stderr, "{gap}{text}"),
        };
        if outcome.is_err() {
            // There is no other place to say so; the exit code still tells.
            return;
        }
    }
}
