//! Short commands: run, awaited, with an error that shows the command and what it said.
//!
//! Commands that stay (servers, the agent) are in `process`.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, bail};

/// A command that dies with this process, whatever it is.
///
/// The parent-death signal is set by `setpriv`, which then becomes the program. It is tied to the *thread*
/// that starts the command. The command gets a process group of its own: a Ctrl-C in the terminal is for us
/// only, and we end our commands ourselves.
pub(super) fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .process_group(0);
    command
}

/// Runs a command on this host and returns its standard output.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = mortal(program);
    command.args(arguments);
    finish(command, None)
}

/// Runs `command` with `input` on its standard input and returns its standard output; an exit status other
/// than 0 is an error with the command line and its standard error in it.
pub(super) fn finish(command: Command, input: Option<&str>) -> Result<String> {
    let line = line(&command);
    let output = output(command, input)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` to its end, whatever its exit status is.
pub(super) fn output(mut command: Command, input: Option<&str>) -> Result<Output> {
    let line = line(&command);
    command.stdin(if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // Ours are far smaller than a pipe, so this cannot block; a command that does not read tells why
        // on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    child
        .wait_with_output()
        .with_context(|| format!("cannot await `{line}`"))
}

/// The command line without the words that only the lab needs.
fn line(command: &Command) -> String {
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let start = words.iter().rposition(|word| word == "--").map_or(0, |at| at + 1);
    words[start..].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_shown_with_what_it_said() {
        let error = run("sh", &["-c", "echo no >&2; exit 3"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`sh -c echo no >&2; exit 3` failed (exit status: 3): no"
        );
    }

    #[test]
    fn a_command_reads_its_input() {
        let mut command = mortal("tr");
        command.args(["a-z", "A-Z"]);
        assert_eq!(finish(command, Some("vip")).unwrap(), "VIP");
    }
}
