//! Ring 1: the terminal after a dashboard that panicked, on a real terminal.

use std::{env, process::Command, time::Duration};

use anyhow::{Result, ensure};
use forwarder_tests::terminal::Terminal;
use forwarder_user::tui::terminal::Screen;

/// Set for the process that is to panic.
const CHILD: &str = "FORWARDER_TESTS_PANIC";
const DEADLINE: Duration = Duration::from_secs(30);

/// Does nothing unless the other test has started it.
#[test]
fn takes_the_terminal_and_panics() {
    if env::var_os(CHILD).is_none() {
        return;
    }
    let screen = Screen::take().unwrap();
    // The agent's program is built to end at once when it panics, so nothing is dropped there.
    std::mem::forget(screen);
    panic!("the dashboard is broken");
}

#[test]
fn a_panic_gives_the_terminal_back_and_can_be_read() -> Result<()> {
    let mut command = Command::new(env::current_exe()?);
    command
        .args(["--exact", "takes_the_terminal_and_panics", "--nocapture"])
        .env(CHILD, "1");
    let mut terminal = Terminal::start(command, 100, 30)?;
    let status = terminal.end(DEADLINE)?;
    ensure!(!status.success(), "it has not panicked");
    ensure!(
        terminal.is_as_before()?,
        "the terminal is as the dashboard left it"
    );
    let text = terminal.screen().contents();
    ensure!(text.contains("the dashboard is broken"), "{text}");
    Ok(())
}
