//! The demonstration's output: headings, marks, tables, and a line that shows what is being waited for.
//!
//! Plain text; colour and the moving line on a terminal only, and no colour where `NO_COLOR` is set
//! (no-color.org).

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::Result;
use forwarder_tests::lab::wait_until;

/// Width of headings.
const COLUMNS: usize = 96;

#[derive(Clone, Copy, Debug)]
enum Style {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
}

/// Where the demonstration is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Screen {
    is_terminal: bool,
    has_colour: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let is_terminal = io::stdout().is_terminal();
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Self {
            is_terminal: is_terminal && !is_dumb,
            has_colour: is_terminal && !is_dumb && !no_colour,
        }
    }

    fn styled(self, style: Style, text: &str) -> String {
        if self.has_colour {
            format!("\x1b[{}m{text}\x1b[0m", style as u8)
        } else {
            text.to_owned()
        }
    }

    /// Starts a journey.
    pub(crate) fn heading(self, text: &str) {
        let rule = "━".repeat(COLUMNS.saturating_sub(text.chars().count() + 4));
        println!("\n{}\n", self.styled(Style::Bold, &format!("━━ {text} {rule}")));
    }

    /// Starts a part of a journey.
    pub(crate) fn part(self, text: &str) {
        println!("\n{}", self.styled(Style::Bold, text));
    }

    pub(crate) fn say(self, text: impl Display) {
        println!("{text}");
    }

    /// Something beside the point.
    pub(crate) fn aside(self, text: impl Display) {
        println!("{}", self.styled(Style::Dim, &text.to_string()));
    }

    /// A command on one of the hosts, as its operator would type it.
    pub(crate) fn command(self, host: &str, command: &str) {
        println!("  {} {command}", self.styled(Style::Dim, &format!("{host}#")));
    }

    /// A step that held.
    pub(crate) fn held(self, text: impl Display) {
        println!("{} {text}", self.styled(Style::Green, "✓"));
    }

    /// A step that did not hold.
    pub(crate) fn failed(self, text: impl Display) {
        println!("{} {text}", self.styled(Style::Red, "✗"));
    }

    /// One request and what came of it.
    pub(crate) fn request(self, number: usize, answer: Result<&str, &str>) {
        match answer {
            Ok(page) => println!("  {number:>3}  {page}"),
            Err(why) => println!("  {number:>3}  {}", self.styled(Style::Red, why)),
        }
    }

    /// Rows under a header, each column as wide as its widest cell.
    pub(crate) fn table<const N: usize>(self, header: [&str; N], rows: &[[String; N]]) {
        let mut widths = header.map(|cell| cell.chars().count());
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: [&str; N]| {
            let padded: Vec<_> = cells
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            format!("  {}", padded.join("   ").trim_end())
        };
        println!("{}", self.styled(Style::Dim, &line(header)));
        for row in rows {
            println!("{}", line(row.each_ref().map(String::as_str)));
        }
    }

    /// [`wait_until`], with a moving line that says for what and how long already.
    pub(crate) fn wait<T>(
        self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut() -> Result<T>,
    ) -> Result<(T, Duration)> {
        let start = Instant::now();
        let outcome = wait_until(what, deadline, || {
            let seen = condition();
            if self.is_terminal
                && let Err(seen) = &seen
            {
                let line: String = format!("  … {what}: {:.1} s, {seen:#}", start.elapsed().as_secs_f64())
                    .chars()
                    .take(COLUMNS)
                    .collect();
                self.replace_line(&self.styled(Style::Dim, &line));
            }
            seen
        });
        if self.is_terminal {
            self.replace_line("");
        }
        outcome
    }

    fn replace_line(self, text: &str) {
        print!("\r\x1b[K{text}");
        // A terminal that is gone is noticed by the next println.
        let _ = io::stdout().flush();
    }
}
