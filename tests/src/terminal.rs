//! A terminal that a program believes to be on: keys go in, what it draws comes out as a screen, or as a picture.
//!
//! The bytes are read by `vt100`. The picture is SVG, made from the cells: text as text, blocks and lines as shapes,
//! which fonts draw too differently.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read as _, Write as _},
    num::NonZeroU16,
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::{OpenptyResult, Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::Pid,
};
use vt100::{Color, Parser, Screen};

/// A program on a terminal of its own; killed when this is dropped.
pub struct Terminal {
    child: Child,
    master: File,
    /// Kept, so that the terminal outlives its program.
    slave: OwnedFd,
    parser: Parser,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Terminal {
    /// Starts a program on a terminal of this size.
    pub fn start(mut command: Command, columns: u16, rows: u16) -> Result<Self> {
        let (some_rows, some_columns) = (NonZeroU16::new(rows), NonZeroU16::new(columns));
        let (some_rows, some_columns) = some_rows.zip(some_columns).context("a terminal without room")?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(&size, None)?;
        command
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave.try_clone()?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self {
            child,
            master: File::from(master),
            slave,
            parser: Parser::new(some_rows, some_columns, 0),
        })
    }

    /// Types.
    pub fn write(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Reads what is drawn until the screen is as wanted.
    pub fn wait_for(
        &mut self,
        what: &str,
        patience: Duration,
        is_there: impl Fn(&Screen) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if is_there(self.parser.screen()) {
                return Ok(());
            }
            if !self.read(deadline)? {
                bail!("no {what} on the terminal:\n{}", self.parser.screen().contents());
            }
        }
    }

    /// Reads for a while, whatever comes.
    pub fn watch(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while self.read(deadline)? {}
        Ok(())
    }

    /// Reads once; `false` when nothing came by then.
    fn read(&mut self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut awaited = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        match poll(&mut awaited, PollTimeout::try_from(left)?) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut bytes = [0; 1 << 16];
        let length = self.master.read(&mut bytes)?;
        self.parser.process(&bytes[..length]);
        Ok(true)
    }

    pub fn screen(&self) -> &Screen {
        self.parser.screen()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Reads until the program has ended, and returns how.
    pub fn end(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                while self.read(Instant::now())? {}
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("the program goes on:\n{}", self.parser.screen().contents());
            }
            self.read(deadline.min(Instant::now() + Duration::from_millis(50)))?;
        }
    }

    /// Is it as a program finds it: main screen, cursor shown, lines echoed and read as lines?
    pub fn is_as_before(&self) -> Result<bool> {
        let flags = tcgetattr(self.slave.as_fd())?.local_flags;
        let screen = self.parser.screen();
        let cooked = LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG;
        Ok(flags.contains(cooked) && !screen.alternate_screen() && !screen.hide_cursor())
    }
}

/// Width and height of a cell in the picture, in its pixels.
const CELL: (u32, u32) = (9, 20);
/// Around the cells.
const MARGIN: u32 = 16;
/// Default colours of the picture: text, ground.
const DEFAULTS: (&str, &str) = ("#d6dde8", "#11161d");
/// The sixteen colours of terminals.
const PALETTE: [&str; 16] = [
    "#3b4557", "#ff7b72", "#46c57f", "#e3b341", "#6f9bff", "#d2a8ff", "#39c9c3", "#d6dde8", "#5d6b80",
    "#ffa198", "#7ee2a8", "#f2cc60", "#a5c3ff", "#e2c5ff", "#7fe3de", "#ffffff",
];

/// A screen as a picture.
pub fn picture(screen: &Screen) -> String {
    let (rows, columns) = (screen.size().0.get(), screen.size().1.get());
    let width = u32::from(columns) * CELL.0 + 2 * MARGIN;
    let height = u32::from(rows) * CELL.1 + 2 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"10\" fill=\"{}\"/>\n\
         <g font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"15\">\n",
        DEFAULTS.1
    );
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            column += run(screen, row, column, &mut svg);
        }
    }
    svg + "</g>\n</svg>\n"
}

/// Draws the cells from here on that look alike; returns how many.
fn run(screen: &Screen, row: u16, start: u16, svg: &mut String) -> u16 {
    let look = |column| {
        let cell = screen.cell(row, column)?;
        let (mut text, mut ground) = (colour(cell.fgcolor()), colour(cell.bgcolor()));
        if cell.inverse() {
            (text, ground) = (
                Some(ground.unwrap_or_else(|| DEFAULTS.1.to_owned())),
                Some(text.unwrap_or_else(|| DEFAULTS.0.to_owned())),
            );
        }
        let symbol = cell.contents().chars().next().unwrap_or(' ');
        Some((text, ground, cell.bold(), cell.dim(), is_shape(symbol), symbol))
    };
    let Some((text, ground, bold, dim, is_shape, first)) = look(start) else {
        return 1;
    };
    let mut symbols = String::from(first);
    let mut length = 1;
    while let Some(next) = look(start + length).filter(|_| start + length < screen.size().1.get()) {
        if (&next.0, &next.1, next.2, next.3, next.4) != (&text, &ground, bold, dim, is_shape) {
            break;
        }
        symbols.push(next.5);
        length += 1;
    }
    let (x, y) = (
        MARGIN + u32::from(start) * CELL.0,
        MARGIN + u32::from(row) * CELL.1,
    );
    let width = u32::from(length) * CELL.0;
    let fill = text.as_deref().unwrap_or(DEFAULTS.0);
    let faint = if dim { " opacity=\"0.6\"" } else { "" };
    // Writing to a String cannot fail.
    if let Some(ground) = ground {
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{}\" fill=\"{ground}\"/>",
            CELL.1
        );
    }
    if is_shape {
        for (place, symbol) in symbols.chars().enumerate() {
            let x = x + place as u32 * CELL.0;
            let _ = writeln!(
                svg,
                "<path d=\"{}\" fill=\"{fill}\"{faint}/>",
                shape(symbol, x, y)
            );
        }
    } else if !symbols.trim().is_empty() {
        let weight = if bold { " font-weight=\"bold\"" } else { "" };
        // Word by word, as browsers draw several spaces as one.
        let mut place = 0;
        for word in symbols.split(' ') {
            let (x, cells) = (x + place * CELL.0, word.chars().count() as u32);
            place += cells + 1;
            if cells > 0 {
                let word = word
                    .replace('&', "&amp;")
                    .replace('<', "&lt;")
                    .replace('>', "&gt;");
                let _ = writeln!(
                    svg,
                    "<text x=\"{x}\" y=\"{}\" textLength=\"{}\" lengthAdjust=\"spacingAndGlyphs\" fill=\"{fill}\"{weight}{faint}>{word}</text>",
                    y + 15,
                    cells * CELL.0
                );
            }
        }
    }
    length
}

fn colour(colour: Color) -> Option<String> {
    match colour {
        Color::Default => None,
        Color::Idx(number) => PALETTE
            .get(usize::from(number))
            .map(|colour| (*colour).to_owned()),
        Color::Rgb(red, green, blue) => Some(format!("#{red:02x}{green:02x}{blue:02x}")),
    }
}

/// Blocks of eighths, and thin lines.
fn is_shape(symbol: char) -> bool {
    matches!(symbol, '▁'..='█' | '─' | '│' | '┌' | '┐' | '└' | '┘')
}

/// The outline of a shape that fills its cell.
fn shape(symbol: char, x: u32, y: u32) -> String {
    let (width, height) = CELL;
    if let '▁'..='█' = symbol {
        let eighths = symbol as u32 - '▁' as u32 + 1;
        let top = f64::from(y) + f64::from(height) * f64::from(8 - eighths) / 8.0;
        return format!("M{x} {top}h{width}V{}h-{width}z", y + height);
    }
    let (middle_x, middle_y) = (x + width / 2, y + height / 2);
    let mut path = String::new();
    let mut bar = |x: u32, y: u32, width: u32, height: u32| {
        let _ = write!(path, "M{x} {y}h{width}v{height}h-{width}z");
    };
    if matches!(symbol, '─' | '┌' | '└') {
        bar(middle_x, middle_y, x + width - middle_x, 1);
    }
    if matches!(symbol, '─' | '┐' | '┘') {
        bar(x, middle_y, middle_x - x + 1, 1);
    }
    if matches!(symbol, '│' | '┌' | '┐') {
        bar(middle_x, middle_y, 1, y + height - middle_y);
    }
    if matches!(symbol, '│' | '└' | '┘') {
        bar(middle_x, y, 1, middle_y - y + 1);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_read_and_typed_to() {
        let mut terminal = Terminal::start(Command::new("cat"), 20, 3).unwrap();
        terminal.write("hello\r").unwrap();
        let patience = Duration::from_secs(5);
        terminal
            .wait_for("echo", patience, |screen| {
                screen.contents().matches("hello").count() == 2
            })
            .unwrap();
        assert!(terminal.is_as_before().unwrap());
        // The end of the input, at the start of a line.
        terminal.write("\x04").unwrap();
        assert!(terminal.end(patience).unwrap().success());
    }

    #[test]
    fn a_screen_becomes_text_and_shapes() {
        let size = (NonZeroU16::new(2).unwrap(), NonZeroU16::new(10).unwrap());
        let mut parser = Parser::new(size.0, size.1, 0);
        parser.process("\x1b[31;1m<a>\x1b[0m ▁█\x1b[7m b".as_bytes());
        let svg = picture(parser.screen());
        assert!(
            svg.contains("fill=\"#ff7b72\" font-weight=\"bold\">&lt;a&gt;</text>"),
            "{svg}"
        );
        assert_eq!(svg.matches("<path").count(), 2, "{svg}");
        assert!(svg.contains("fill=\"#11161d\""), "{svg}");
    }
}
