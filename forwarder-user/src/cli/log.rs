//! Where the agent's log goes and how its lines look.
//!
//! Text on a terminal. Under systemd, whose journal has the time and asks for a priority, text with that in front of each
//! line (`sd-daemon(3)`), so that `journalctl -p warning` works and each line has all that is to be said, in words; the
//! journal's own protocol would put names of groups and backends into fields that `journalctl` does not show. Elsewhere
//! JSON, for programs. In each case what repeats itself too often is cut ([`LogLimit`]).

use std::{
    fmt,
    io::{self, IsTerminal as _},
    os::fd::AsFd,
};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::FilterExt as _,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{self, Writer},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use super::args::{LogFormat, RunArgs};
use crate::{error::Error, log_limit::LogLimit};

/// Starts logging to standard error.
///
/// # Errors
/// The filter is none.
pub fn start(args: &RunArgs) -> Result<(), Error> {
    let filter = args.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Error::usage(format!("--log \"{filter}\": {error}")).hint(
            "a level such as \"debug\", or levels per module such as \"info,forwarder_user::health=debug\"",
        )
    })?;
    let is_terminal = io::stderr().is_terminal();
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match chosen(args.log_format, is_terminal, is_journal(io::stderr())) {
        LogFormat::Json => layer.json().boxed(),
        LogFormat::Journal => layer.event_format(WithPriority).boxed(),
        LogFormat::Auto | LogFormat::Text => {
            let has_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            layer.with_target(false).with_ansi(has_colour).boxed()
        }
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter.and(LogLimit)))
        .try_init()
        .map_err(|error| Error::failed(format!("cannot start logging: {error}")))
}

/// The format, if the choice is left to us.
fn chosen(wanted: LogFormat, is_terminal: bool, is_journal: bool) -> LogFormat {
    match wanted {
        LogFormat::Auto if is_terminal => LogFormat::Text,
        LogFormat::Auto if is_journal => LogFormat::Journal,
        LogFormat::Auto => LogFormat::Json,
        wanted => wanted,
    }
}

/// Does this lead to the journal? `JOURNAL_STREAM` names it by device and inode (`systemd.exec(5)`).
fn is_journal(stream: impl AsFd) -> bool {
    let journal = std::env::var("JOURNAL_STREAM").ok();
    fstat(stream).is_ok_and(|found| journal == Some(format!("{}:{}", found.st_dev, found.st_ino)))
}

/// Lines of text for the journal: their priority, without time and colours.
struct WithPriority;

impl<S, N> FormatEvent<S, N> for WithPriority
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        format::format()
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_ansi(false)
            .format_event(context, Writer::new(&mut text), event)?;
        // syslog(3): err, warning, info, debug.
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        // Each line is a message of its own to the journal.
        text.lines()
            .try_for_each(|line| writeln!(writer, "<{priority}>{}", line.trim_start()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing::{error, warn};

    use super::*;

    #[test]
    fn the_format_follows_where_the_log_goes_unless_it_is_said() {
        for (wanted, is_terminal, is_journal, expected) in [
            (LogFormat::Auto, true, false, LogFormat::Text),
            (LogFormat::Auto, false, true, LogFormat::Journal),
            (LogFormat::Auto, false, false, LogFormat::Json),
            (LogFormat::Json, true, true, LogFormat::Json),
            (LogFormat::Text, false, true, LogFormat::Text),
            (LogFormat::Journal, false, false, LogFormat::Journal),
        ] {
            assert_eq!(chosen(wanted, is_terminal, is_journal), expected);
        }
    }

    #[test]
    fn the_journal_gets_priorities_and_all_fields() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(Arc::new(file.reopen().unwrap()))
            .event_format(WithPriority);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            warn!(group = "web", backend = "ecs01", "unhealthy: no answer");
            error!("two\nlines");
        });
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "<4>unhealthy: no answer group=\"web\" backend=\"ecs01\"\n<3>two\n<3>lines\n"
        );
    }

    #[test]
    fn a_stream_that_is_not_the_journal_is_none() {
        // Whatever runs the tests: a file of ours is no journal.
        assert!(!is_journal(tempfile::tempfile().unwrap()));
    }
}
