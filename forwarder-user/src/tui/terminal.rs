//! The terminal that the dashboard is on: taken at start, given back at the end, whatever the end is.
//!
//! Keys, the agent's answers and signals come by one channel, which is all that is waited for. A panic gives the
//! terminal back before it prints its message (`ratatui::try_init` sees to that).

use std::{
    io::IsTerminal as _,
    path::Path,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event as TerminalEvent, KeyEvent, KeyEventKind},
};

use super::{Asked, Dashboard};
use crate::{api::STATUS_PATH, cli::ask, error::Error, status::Status};

/// What happens.
enum Event {
    Key(KeyEvent),
    /// The terminal has another size, so all is drawn anew.
    Resized,
    Answered(Box<Result<Status, Error>>, Duration),
    /// SIGTERM, SIGINT or SIGHUP; or the terminal is gone.
    Stop,
}

/// Shows the dashboard until the user has enough.
///
/// # Errors
/// This is no terminal, or it cannot be drawn on.
pub fn show(socket: &Path, interval: Duration) -> Result<(), Error> {
    if !(std::io::stdout().is_terminal() && std::io::stdin().is_terminal()) {
        return Err(Error::usage("`forwarder top` needs a terminal")
            .hint("`forwarder status` prints the same once, `forwarder status -o json` for programs"));
    }
    let (sender, events) = mpsc::channel();
    let signalled = sender.clone();
    // Nobody listens any more: the end has come already.
    ctrlc::set_handler(move || drop(signalled.send(Event::Stop)))
        .map_err(|error| Error::failed(format!("cannot listen for signals: {error}")))?;
    let mut screen = Screen::take()?;
    let keys = sender.clone();
    thread::spawn(move || read_keys(&keys));
    let (_ends_with_this, ended) = mpsc::channel();
    let socket = socket.to_owned();
    thread::spawn(move || ask_again_and_again(&socket, interval, &sender, &ended));
    run(&mut screen.0, &events)
}

/// The terminal, until it is dropped.
pub struct Screen(DefaultTerminal);

impl Screen {
    /// # Errors
    /// There is no terminal, or it cannot be set.
    pub fn take() -> Result<Self, Error> {
        ratatui::try_init()
            .map(Self)
            .map_err(|error| cannot("take", &error))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

fn cannot(action: &str, error: &std::io::Error) -> Error {
    Error::failed(format!("cannot {action} the terminal: {error}"))
}

fn run(terminal: &mut DefaultTerminal, events: &Receiver<Event>) -> Result<(), Error> {
    let mut dashboard = Dashboard::default();
    loop {
        terminal
            .draw(|frame| dashboard.draw(frame))
            .map_err(|error| cannot("draw on", &error))?;
        let Ok(first) = events.recv() else {
            return Ok(());
        };
        // All that wait, so that a held key is not drawn step by step.
        for event in [first].into_iter().chain(events.try_iter()) {
            match event {
                Event::Key(key) => {
                    if dashboard.pressed(key) == Asked::Quit {
                        return Ok(());
                    }
                }
                Event::Resized => {}
                Event::Answered(answer, at) => dashboard.heard(*answer, at),
                Event::Stop => return Ok(()),
            }
        }
    }
}

fn read_keys(sender: &Sender<Event>) {
    loop {
        let event = match event::read() {
            Ok(TerminalEvent::Key(key)) if key.kind == KeyEventKind::Press => Event::Key(key),
            Ok(TerminalEvent::Resize(..)) => Event::Resized,
            Ok(_) => continue,
            Err(_) => Event::Stop,
        };
        let is_last = matches!(event, Event::Stop);
        if sender.send(event).is_err() || is_last {
            return;
        }
    }
}

fn ask_again_and_again(socket: &Path, interval: Duration, sender: &Sender<Event>, ended: &Receiver<()>) {
    let start = Instant::now();
    loop {
        let answer = ask::get(socket, STATUS_PATH);
        if sender
            .send(Event::Answered(Box::new(answer), start.elapsed()))
            .is_err()
        {
            return;
        }
        // Nothing is ever sent: it ends by being dropped.
        if ended.recv_timeout(interval) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}
