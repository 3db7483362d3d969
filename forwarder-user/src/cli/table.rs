//! Tables for people: columns without borders, one line per row, as `ip` and `kubectl` print them.
//!
//! A table is as wide as what is in it: a line that is too long is the terminal's to wrap, as an address cut in
//! two can't be copied. Numbers stand to the right, so that they can be compared at a glance.

use comfy_table::{CellAlignment, ContentArrangement, Row, Table as Grid, presets};

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Draws a table: the header first, then one line per row, without trailing spaces.
///
/// `rows` are as wide as `columns`, and no cell holds a line break.
#[must_use]
pub fn lines<const N: usize>(columns: [(&str, Align); N], rows: Vec<[String; N]>) -> Vec<String> {
    let mut grid = Grid::new();
    grid.load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .force_no_tty()
        .set_header(Row::from(columns.map(|(name, _)| name)))
        .add_rows(rows);
    for (column, (_, align)) in grid.column_iter_mut().zip(columns) {
        column.set_padding((0, 2));
        column.set_cell_alignment(match align {
            Align::Left => CellAlignment::Left,
            Align::Right => CellAlignment::Right,
        });
    }
    grid.lines().map(|line| line.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_left_and_numbers_right() {
        let rows = vec![
            ["web".to_owned(), "7".to_owned(), "a".to_owned()],
            ["x".to_owned(), "1200".to_owned(), String::new()],
        ];
        let columns = [
            ("NAME", Align::Left),
            ("FLOWS", Align::Right),
            ("GROUP", Align::Left),
        ];
        assert_eq!(
            lines(columns, rows),
            ["NAME  FLOWS  GROUP", "web       7  a", "x      1200"]
        );
    }

    #[test]
    fn a_table_without_rows_has_a_header() {
        assert_eq!(lines([("NAME", Align::Left)], Vec::new()), ["NAME"]);
    }
}
