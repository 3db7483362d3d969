//! The log does not drown: of one kind of message, a hundred in ten seconds are written, the others are counted, and how
//! many there were is said.
//!
//! A kind is a place in the source. When a tunnel with ten thousand backends behind it fails, the first hundred lines say
//! so; status and metrics have all of them. Messages for debugging have no limit, as whoever asks for them wants them,
//! but for those of the BPF programs and of libraries, which come at the rate of packets.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, callsite::Identifier, level_filters::LevelFilter, warn};
use tracing_subscriber::layer::{Context, Filter};

/// Messages of a kind in [`WINDOW`].
const BURST: u32 = 100;
const WINDOW: Duration = Duration::from_secs(10);
/// What messages of the `log` crate have as their target, among them those of the programs.
const FOREIGN: &str = "log";

/// What has been written and left out, by kind. The process has one log.
static KINDS: Mutex<Option<HashMap<Identifier, Kind>>> = Mutex::new(None);

/// A kind of message, by its place in the source.
struct Kind {
    metadata: &'static Metadata<'static>,
    window: Window,
}

/// Messages of one kind in the current window, and those left out that nobody has told yet.
struct Window {
    since: Instant,
    written: u32,
    left_out: u64,
}

impl Window {
    fn new(since: Instant) -> Self {
        Self {
            since,
            written: 0,
            left_out: 0,
        }
    }

    /// Is one more to be written?
    fn admit(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= WINDOW {
            self.since = now;
            self.written = 0;
        }
        let is_admitted = self.written < BURST;
        self.written += u32::from(is_admitted);
        self.left_out += u64::from(!is_admitted);
        is_admitted
    }
}

/// The limit as a filter of the log.
#[derive(Clone, Copy, Debug)]
pub struct LogLimit;

impl<S: Subscriber> Filter<S> for LogLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO && metadata.target() != FOREIGN {
            return true;
        }
        let now = Instant::now();
        let mut kinds = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
        kinds
            .get_or_insert_default()
            .entry(metadata.callsite())
            .or_insert_with(|| Kind {
                metadata,
                window: Window::new(now),
            })
            .window
            .admit(now)
    }
}

/// Says what was left out of the log since it was said last. To be called now and then.
pub fn tell_what_was_left_out() {
    let left_out: Vec<_> = {
        let mut kinds = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = kinds.iter_mut().flat_map(HashMap::values_mut);
        kinds
            .filter(|kind| kind.window.left_out > 0)
            .map(|kind| (std::mem::take(&mut kind.window.left_out), kind.metadata))
            .collect()
    };
    // Not while the table is locked: this is a message, too.
    for (count, metadata) in left_out {
        warn!(
            "{count} messages like the last ones of {}, line {}, were left out: more than {BURST} in {} s",
            metadata.target(),
            metadata.line().unwrap_or(0),
            WINDOW.as_secs()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use tracing::{debug, info};
    use tracing_subscriber::{Layer as _, layer::SubscriberExt as _};

    use super::*;

    #[test]
    fn a_flood_of_one_kind_is_cut_and_counted_and_others_pass() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(Arc::new(file.reopen().unwrap()))
            .with_filter(LogLimit);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for number in 0..1000 {
                info!("flood {number}");
                debug!("detail {number}");
            }
            info!("something else");
            tell_what_was_left_out();
            tell_what_was_left_out();
        });
        let text = fs::read_to_string(file.path()).unwrap();
        assert_eq!(text.matches("flood").count(), BURST as usize);
        assert_eq!(text.matches("detail").count(), 1000);
        assert_eq!(text.matches("something else").count(), 1);
        assert_eq!(
            text.matches("900 messages like the last ones").count(),
            1,
            "{text}"
        );
    }

    #[test]
    fn the_next_window_has_room_again() {
        let start = Instant::now();
        let mut window = Window::new(start);
        let mut admitted = |now| (0..BURST * 2).filter(|_| window.admit(now)).count();
        assert_eq!(admitted(start), BURST as usize);
        assert_eq!(admitted(start + WINDOW / 2), 0);
        assert_eq!(admitted(start + WINDOW), BURST as usize);
        assert_eq!(window.left_out, u64::from(BURST) * 4);
    }
}
