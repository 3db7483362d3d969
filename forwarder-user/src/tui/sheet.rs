//! A tab's content before it is drawn: columns, rows, and what there is to say about the chosen row.
//!
//! A tab is a pure function from a status and its history to one of these; `Dashboard` draws them all alike.

use ratatui::{
    layout::HorizontalAlignment,
    style::{Color, Style},
};

use super::history::Trend;

/// One tab's table.
#[derive(Debug)]
pub(super) struct Sheet {
    pub(super) columns: Vec<(&'static str, HorizontalAlignment)>,
    pub(super) rows: Vec<Entry>,
    /// What is shown instead of rows if there are none.
    pub(super) empty: &'static str,
}

/// One row.
#[derive(Debug)]
pub(super) struct Entry {
    /// One for each column.
    pub(super) cells: Vec<(String, Style)>,
    /// Drawn behind the columns; sorts the rows, if they are sorted by traffic.
    pub(super) trend: Trend,
    /// What is not as usual, and what to do about it.
    pub(super) detail: Vec<String>,
}

/// A cell without meaning of its own.
pub(super) fn plain(text: impl Into<String>) -> (String, Style) {
    (text.into(), Style::new())
}

/// A number that is only worth a look if it is not zero.
pub(super) fn quiet_zero(text: String) -> (String, Style) {
    let style = if text == "0" {
        Style::new().dim()
    } else {
        Style::new()
    };
    (text, style)
}

/// A state in its colour.
pub(super) fn state(text: &str) -> (String, Style) {
    let colour = match text {
        "healthy" | "up" | "native" => Color::Green,
        "unhealthy" | "down" => Color::Red,
        "ejected" | "draining" | "drained" | "unknown" => Color::Yellow,
        _ => return plain(text),
    };
    (text.to_owned(), Style::new().fg(colour))
}
