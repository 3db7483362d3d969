//! Waiting with a deadline for something the kernel sends no event for.
//!
//! It holds the one polling loop of the labs. Where there is an event (a process ends, a readiness
//! message arrives) the lab blocks on that event instead.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Between two looks; short against everything a lab waits for, long against the cost of a look.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks at `condition` until it holds and returns its value and how long that took.
///
/// The condition fails with what it sees instead; the last such error is part of this one's when `deadline`
/// passes. It is asked at least once.
pub fn wait_until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<T>,
) -> Result<(T, Duration)> {
    let start = Instant::now();
    loop {
        let seen = match condition() {
            Ok(value) => return Ok((value, start.elapsed())),
            Err(seen) => seen,
        };
        if start.elapsed() >= deadline {
            bail!(
                "waited {:.1} s for {what}; last seen: {seen:#}",
                deadline.as_secs_f64()
            );
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_holds_at_once_needs_no_time() {
        let (value, _) = wait_until("nothing", Duration::ZERO, || Ok(7)).unwrap();
        assert_eq!(value, 7);
    }

    #[test]
    fn the_error_names_what_was_awaited_and_what_was_seen() {
        let error = wait_until("rain", Duration::ZERO, || -> Result<()> { bail!("sun") }).unwrap_err();
        assert_eq!(error.to_string(), "waited 0.0 s for rain; last seen: sun");
    }
}
