//! Watches the SNAT pool for flows that it had no binding for, and says once a minute what would help.

use std::time::{Duration, Instant};

use forwarder_common::abi::snat::PORTS_PER_ADDRESS;

/// How often it is said.
const INTERVAL: Duration = Duration::from_secs(60);

/// What has been refused, and said.
#[derive(Debug, Default)]
pub struct PoolWatch {
    /// All flows refused when it was said last.
    said: u64,
    said_at: Option<Instant>,
}

impl PoolWatch {
    /// A watch that knows nothing of the `refused` flows so far.
    pub fn new(refused: u64) -> Self {
        Self {
            said: refused,
            said_at: None,
        }
    }

    /// What to say now, if anything. `refused`: flows refused for want of a binding since the counters began;
    /// `bindings`: how many the pool has.
    ///
    /// The number of addresses is for the refused flows to have been there at the same time, which is what it takes
    /// if flows last a minute or longer; with shorter ones it is an upper bound.
    pub fn look(&mut self, now: Instant, refused: u64, bindings: u64) -> Option<String> {
        let new = refused.saturating_sub(self.said);
        let is_recent = self.said_at.is_some_and(|at| now.duration_since(at) < INTERVAL);
        if new == 0 || is_recent {
            return None;
        }
        self.said = refused;
        self.said_at = Some(now);
        let addresses = new.div_ceil(u64::from(PORTS_PER_ADDRESS));
        let plural = if addresses == 1 { "address" } else { "addresses" };
        let wanted = bindings + addresses * u64::from(PORTS_PER_ADDRESS);
        Some(format!(
            "the SNAT pool is used up: {new} new flows refused; add {addresses} {plural} to snat.prefixes and raise \
             agent.max_flows to {wanted}, or shorten idle timeouts"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_at_once_and_then_once_a_minute() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut watch = PoolWatch::new(7);
        assert_eq!(watch.look(at(0), 7, 1000), None);
        let said = watch.look(at(1), 8, 1000).unwrap();
        assert!(
            said.starts_with("the SNAT pool is used up: 1 new flows refused; add 1 address to"),
            "{said}"
        );
        assert!(said.contains("agent.max_flows to 65512"), "{said}");
        assert_eq!(watch.look(at(2), 70_000, 1000), None);
        assert_eq!(watch.look(at(60), 70_000, 1000), None);
        let said = watch.look(at(61), 70_000, 1000).unwrap();
        assert!(
            said.contains("69992 new flows refused; add 2 addresses"),
            "{said}"
        );
        assert_eq!(watch.look(at(200), 70_000, 1000), None);
    }
}
