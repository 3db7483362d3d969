//! `forwarder top`: the agent's status on the whole terminal, anew every second.
//!
//! ```text
//! terminal     takes the terminal, waits for keys and answers, gives the terminal back whatever happens
//! Dashboard    what is shown, and what keys do; draws on anything that ratatui can draw on
//! history      rates of the last minutes
//! listeners, backends, tunnels, drops     one tab each, as a `sheet`
//! ```
//!
//! It talks to the agent by its API only, and ratatui is known in this folder only.

use std::time::Duration;

use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    layout::{Constraint, HorizontalAlignment, Layout, Rect},
    style::{Color, Style, Stylize as _},
    text::{Line, Span},
    widgets::{
        Block, HighlightSpacing, Paragraph, RenderDirection, Row, Sparkline, Table, TableState, Tabs, Wrap,
    },
};

use self::{
    history::{History, Trend},
    sheet::{Entry, Sheet},
};
use crate::{
    cli::status::{byte_rate, duration, rate},
    error::Error,
    status::Status,
};

mod backends;
mod drops;
mod history;
mod listeners;
mod sheet;
pub mod terminal;
mod tunnels;

/// Lines of the charts above the table, borders included.
const CHARTS_HEIGHT: u16 = 6;
/// Below this many lines the charts are left out, as the table needs them.
const CHARTS_NEED: u16 = 22;
/// Lines for what there is to say about the chosen row.
const DETAIL_HEIGHT: u16 = 5;
/// Columns of the shortest trend that is worth drawing.
const SHORTEST_TREND: u16 = 8;
/// Between two columns.
const COLUMN_SPACING: u16 = 2;
/// Stands before the chosen row.
const CHOSEN: &str = "▸ ";
/// Rows that a page key moves by.
const PAGE: isize = 10;

/// What is shown below the charts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tab {
    Listeners,
    Backends,
    Tunnels,
    Drops,
}

impl Tab {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Listeners, "Listeners"),
        (Self::Backends, "Backends"),
        (Self::Tunnels, "Tunnels"),
        (Self::Drops, "Drops"),
    ];

    /// The tab `steps` to the right, around the end.
    fn moved(self, steps: usize) -> Self {
        Self::ALL[(self as usize + steps) % Self::ALL.len()].0
    }
}

/// A chart above the table: its name, what it shows, how its newest value is written, its colour.
type Chart = (&'static str, Trend, fn(f64) -> String, Color);

/// What a key asks for, beyond the dashboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Nothing,
    Quit,
}

/// Everything that is shown.
#[derive(Debug)]
pub struct Dashboard {
    tab: Tab,
    /// The chosen row of each tab.
    chosen: [TableState; Tab::ALL.len()],
    is_by_traffic: bool,
    /// Answers are not shown, so that one can read.
    is_paused: bool,
    status: Option<Status>,
    /// Why the last question was not answered.
    trouble: Option<Error>,
    history: History,
}

impl Default for Dashboard {
    fn default() -> Self {
        Self {
            tab: Tab::Listeners,
            chosen: std::array::from_fn(|_| TableState::new().with_selected(0)),
            is_by_traffic: false,
            is_paused: false,
            status: None,
            trouble: None,
            history: History::default(),
        }
    }
}

impl Dashboard {
    /// Takes what the agent has answered at the time `at`, by any clock that goes forward.
    pub fn heard(&mut self, answer: Result<Status, Error>, at: Duration) {
        match answer {
            Ok(status) => {
                self.trouble = None;
                if !self.is_paused {
                    self.history.add(&status, at);
                    self.status = Some(status);
                }
            }
            Err(error) => self.trouble = Some(error),
        }
    }

    /// Does what a key stands for.
    pub fn pressed(&mut self, key: KeyEvent) -> Asked {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Asked::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return Asked::Quit,
            KeyCode::Tab | KeyCode::Right | KeyCode::Char('l') => self.tab = self.tab.moved(1),
            KeyCode::BackTab | KeyCode::Left | KeyCode::Char('h') => {
                self.tab = self.tab.moved(Tab::ALL.len() - 1);
            }
            KeyCode::Char(digit @ '1'..='4') => {
                self.tab = Tab::Listeners.moved(digit as usize - '1' as usize);
            }
            KeyCode::Down | KeyCode::Char('j') => self.choose(1),
            KeyCode::Up | KeyCode::Char('k') => self.choose(-1),
            KeyCode::PageDown => self.choose(PAGE),
            KeyCode::PageUp => self.choose(-PAGE),
            KeyCode::Home => self.choose(isize::MIN),
            KeyCode::End => self.choose(isize::MAX),
            KeyCode::Char('s') => self.is_by_traffic = !self.is_by_traffic,
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            _ => {}
        }
        Asked::Nothing
    }

    /// Moves by rows; drawing keeps the choice within the table.
    fn choose(&mut self, rows: isize) {
        let chosen = &mut self.chosen[self.tab as usize];
        let row = chosen.selected().unwrap_or(0).saturating_add_signed(rows);
        chosen.select(Some(row));
    }

    /// Draws everything.
    pub fn draw(&mut self, frame: &mut Frame<'_>) {
        let charts = if frame.area().height >= CHARTS_NEED {
            CHARTS_HEIGHT
        } else {
            0
        };
        let [head, charts, tabs, table, detail, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(charts),
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(DETAIL_HEIGHT),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(), head);
        self.draw_charts(frame, charts);
        let titles = Tab::ALL
            .iter()
            .enumerate()
            .map(|(number, (_, name))| format!("{} {name}", number + 1));
        let bar = Tabs::new(titles)
            .select(self.tab as usize)
            .highlight_style(Style::new().bold().reversed());
        frame.render_widget(bar, tabs);
        self.draw_table(frame, table, detail);
        frame.render_widget(self.foot(), foot);
    }

    fn head(&self) -> Line<'static> {
        if let Some(error) = &self.trouble {
            let hint = error.hint.as_deref().unwrap_or_default();
            return Line::from(vec![
                Span::styled(format!(" {} ", error.what), Style::new().bold().white().on_red()),
                Span::from(format!(" {hint}")).dim(),
            ]);
        }
        let Some(status) = &self.status else {
            return Line::from(" asking the agent…".dim());
        };
        let backends = status.groups.iter().flat_map(|group| &group.backends);
        let (healthy, all) = backends.fold((0, 0), |(healthy, all), backend| {
            (healthy + usize::from(backend.health == "healthy"), all + 1)
        });
        let flows: u64 = status
            .listeners
            .iter()
            .map(|listener| listener.traffic.flows)
            .sum();
        let mut spans = vec![
            Span::from(format!(" forwarder {}", status.version)).bold(),
            Span::from(format!("  up {}", duration(status.uptime_secs))),
            Span::styled(
                format!("  {healthy} of {all} backends healthy"),
                if healthy < all {
                    Style::new().fg(Color::Red)
                } else {
                    Style::new().fg(Color::Green)
                },
            ),
            Span::from(format!(
                "  {flows} flows, {:.1}% of the bindings",
                status.pool.usage() * 100.0
            )),
        ];
        let warnings = status.warnings.len();
        if warnings > 0 {
            let plural = if warnings == 1 { "" } else { "s" };
            let text = format!("  {warnings} warning{plural}");
            spans.push(Span::from(text).yellow());
        }
        if self.is_paused {
            spans.push(Span::from("  paused").yellow().bold());
        }
        Line::from(spans)
    }

    fn draw_charts(&self, frame: &mut Frame<'_>, area: Rect) {
        if area.height == 0 {
            return;
        }
        let charts: [Chart; 4] = [
            ("New flows/s", Trend::NewFlows, rate, Color::Cyan),
            ("Packets/s", Trend::Packets, rate, Color::Green),
            ("Bytes/s", Trend::Bytes, byte_rate, Color::Blue),
            ("Dropped/s", Trend::Dropped, rate, Color::Red),
        ];
        let areas = Layout::horizontal([Constraint::Fill(1); 4]).split(area);
        for ((name, trend, show, colour), area) in charts.into_iter().zip(areas.iter()) {
            let title = Line::from(vec![
                Span::from(format!(" {name} ")),
                Span::from(format!("{} ", show(self.history.rate(&trend)))).bold(),
            ]);
            let block = Block::bordered().border_style(Style::new().dim()).title(title);
            let points = self
                .history
                .points(&trend, usize::from(area.width.saturating_sub(2)));
            // The widget takes whole numbers; a thousandth is as fine as rates are.
            let points = points.into_iter().map(|rate| (rate * 1000.0) as u64);
            let chart = Sparkline::default()
                .block(block)
                .direction(RenderDirection::RightToLeft)
                .data(points.rev())
                .style(Style::new().fg(colour));
            frame.render_widget(chart, *area);
        }
    }

    fn sheet(&self, status: &Status) -> Sheet {
        let mut sheet = match self.tab {
            Tab::Listeners => listeners::sheet(status),
            Tab::Backends => backends::sheet(status),
            Tab::Tunnels => tunnels::sheet(status),
            Tab::Drops => drops::sheet(status, &self.history),
        };
        if self.is_by_traffic {
            let rate = |entry: &Entry| self.history.rate(&entry.trend);
            sheet.rows.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
        }
        sheet
    }

    fn draw_table(&mut self, frame: &mut Frame<'_>, area: Rect, detail: Rect) {
        let Some(status) = &self.status else {
            return;
        };
        let sheet = self.sheet(status);
        if sheet.rows.is_empty() {
            let text = Line::from(sheet.empty).dim().centered();
            frame.render_widget(Paragraph::new(vec![Line::default(), text]), area);
            return;
        }
        let widths: Vec<u16> = sheet
            .columns
            .iter()
            .enumerate()
            .map(|(column, (title, _))| {
                let cells = sheet.rows.iter().map(|row| row.cells[column].0.chars().count());
                cells.fold(title.len(), usize::max) as u16
            })
            .collect();
        let taken: u16 = widths.iter().map(|width| width + COLUMN_SPACING).sum();
        let marked = CHOSEN.chars().count() as u16;
        let trend_width = area.width.saturating_sub(taken + marked);
        let has_trend = trend_width >= SHORTEST_TREND;
        let aligned = |text: String, (_, alignment): &(&str, HorizontalAlignment)| {
            Line::from(text).alignment(*alignment)
        };

        let titles = sheet
            .columns
            .iter()
            .map(|column| aligned(column.0.to_owned(), column));
        let head = Row::new(titles.chain([Line::from("PACKETS/S").right_aligned()])).dim();
        let rows = sheet.rows.iter().map(|row| {
            let cells = row
                .cells
                .iter()
                .zip(&sheet.columns)
                .map(|((text, style), column)| aligned(text.clone(), column).style(*style));
            let trend = if has_trend {
                self.history.line(&row.trend, usize::from(trend_width))
            } else {
                String::new()
            };
            Row::new(cells.chain([Line::from(trend).green()]))
        });
        let last = if has_trend {
            Constraint::Length(trend_width)
        } else {
            Constraint::Length(0)
        };
        let table = Table::new(rows, widths.iter().copied().map(Constraint::Length).chain([last]))
            .header(head)
            .column_spacing(COLUMN_SPACING)
            .highlight_symbol(CHOSEN)
            .highlight_spacing(HighlightSpacing::Always)
            .row_highlight_style(Style::new().bold());
        let chosen = &mut self.chosen[self.tab as usize];
        let row = chosen.selected().unwrap_or(0).min(sheet.rows.len() - 1);
        chosen.select(Some(row));
        frame.render_stateful_widget(table, area, chosen);

        let lines: Vec<Line<'_>> = sheet.rows[row]
            .detail
            .iter()
            .map(|line| Line::from(line.as_str()))
            .collect();
        frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }), detail);
    }

    fn foot(&self) -> Line<'static> {
        let order = if self.is_by_traffic {
            "sort by name"
        } else {
            "sort by traffic"
        };
        let pause = if self.is_paused { "go on" } else { "pause" };
        let keys = [
            ("1-4 ←→", "tab"),
            ("↑↓", "row"),
            ("s", order),
            ("p", pause),
            ("q", "quit"),
        ];
        let spans = keys
            .into_iter()
            .flat_map(|(key, what)| [format!(" {key} ").bold().reversed(), format!(" {what}  ").into()]);
        Line::from_iter(spans)
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::status::testing::sample;

    /// A dashboard after three answers, with rates that change and packets that are dropped.
    fn dashboard() -> Dashboard {
        let mut dashboard = Dashboard::default();
        for second in 0..3_u32 {
            let mut status = sample();
            let factor = f64::from(second);
            for listener in &mut status.listeners {
                listener.traffic.rates.packets_in *= factor;
            }
            for group in &mut status.groups {
                group.traffic.rates.packets_in *= factor;
                for backend in &mut group.backends {
                    backend.traffic.rates.packets_in *= factor;
                }
            }
            for reason in &mut status.reasons {
                if reason.packets > 0 {
                    reason.packets += u64::from(second) * 40;
                }
            }
            dashboard.heard(Ok(status), Duration::from_secs(second.into()));
        }
        dashboard
    }

    fn press(dashboard: &mut Dashboard, code: KeyCode) -> Asked {
        dashboard.pressed(KeyEvent::from(code))
    }

    fn drawn(dashboard: &mut Dashboard, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| dashboard.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn every_tab_is_as_expected() {
        let mut dashboard = dashboard();
        for name in ["listeners", "backends", "tunnels", "drops"] {
            assert_snapshot!(name, drawn(&mut dashboard, 110, 26));
            press(&mut dashboard, KeyCode::Tab);
        }
        assert_eq!(dashboard.tab, Tab::Listeners, "around the end");
    }

    #[test]
    fn a_flood_is_told_when_its_listener_is_chosen() {
        let mut dashboard = dashboard();
        assert!(!drawn(&mut dashboard, 110, 26).contains("SYN cookies"));
        press(&mut dashboard, KeyCode::End);
        let text = drawn(&mut dashboard, 110, 26);
        assert!(text.contains("2700/s now, a flood; 81000 sent"), "{text}");
        assert!(text.contains("7 dropped"), "{text}");
    }

    #[test]
    fn a_backend_in_trouble_is_explained_when_it_is_chosen() {
        let mut dashboard = dashboard();
        press(&mut dashboard, KeyCode::Char('2'));
        let healthy = drawn(&mut dashboard, 110, 26);
        assert!(!healthy.contains("hint:"), "{healthy}");
        press(&mut dashboard, KeyCode::End);
        let text = drawn(&mut dashboard, 110, 26);
        assert!(text.contains("hint:"), "{text}");
        // The choice stayed within the table, so one step up is the one before.
        press(&mut dashboard, KeyCode::Up);
        assert_eq!(dashboard.chosen[Tab::Backends as usize].selected(), Some(1));
    }

    #[test]
    fn rows_can_be_sorted_by_traffic() {
        let mut dashboard = dashboard();
        let first = |dashboard: &mut Dashboard| {
            let text = drawn(dashboard, 110, 26);
            let mut lines = text.lines().skip_while(|line| !line.contains("LISTENER"));
            lines.nth(1).unwrap().to_owned()
        };
        assert!(first(&mut dashboard).contains("dns"));
        press(&mut dashboard, KeyCode::Char('s'));
        assert!(first(&mut dashboard).contains("web"));
    }

    #[test]
    fn a_paused_dashboard_stays_as_it_is() {
        let mut dashboard = dashboard();
        press(&mut dashboard, KeyCode::Char('p'));
        let before = drawn(&mut dashboard, 110, 26);
        assert!(before.contains("paused"), "{before}");
        let mut status = sample();
        status.listeners.clear();
        dashboard.heard(Ok(status), Duration::from_secs(9));
        assert_eq!(drawn(&mut dashboard, 110, 26), before);
    }

    #[test]
    fn an_agent_that_does_not_answer_is_told_and_the_last_answer_stays() {
        let mut dashboard = dashboard();
        let error = Error::failed("no agent answers on /run/x.sock").hint("start one");
        dashboard.heard(Err(error), Duration::from_secs(9));
        let text = drawn(&mut dashboard, 110, 26);
        assert!(text.contains("no agent answers on /run/x.sock"), "{text}");
        assert!(text.contains("start one") && text.contains("dns"), "{text}");
        dashboard.heard(Ok(sample()), Duration::from_secs(10));
        assert!(!drawn(&mut dashboard, 110, 26).contains("no agent"));
    }

    #[test]
    fn it_fits_any_terminal_and_any_gateway() {
        let mut empty = Dashboard::default();
        let mut bare = sample();
        bare.listeners.clear();
        bare.groups.clear();
        bare.tunnels.clear();
        for dashboard in [&mut dashboard(), &mut empty] {
            for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
                for _ in Tab::ALL {
                    drawn(dashboard, width, height);
                    press(dashboard, KeyCode::Right);
                }
            }
            dashboard.heard(Ok(bare.clone()), Duration::from_secs(20));
        }
        assert!(drawn(&mut empty, 80, 24).contains("no listener is configured"));
    }

    #[test]
    fn it_ends_on_q_escape_and_ctrl_c() {
        let mut dashboard = Dashboard::default();
        for key in [
            KeyEvent::from(KeyCode::Char('q')),
            KeyEvent::from(KeyCode::Esc),
            KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL),
        ] {
            assert_eq!(dashboard.pressed(key), Asked::Quit);
        }
        assert_eq!(press(&mut dashboard, KeyCode::Char('c')), Asked::Nothing);
    }
}
