//! What the dashboard remembers: rates of the last minutes, for trends.
//!
//! Rates of listeners and backends come from the agent. It counts drops and gives no rates of them, so those are the
//! difference of two answers.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use crate::status::{Status, Traffic};

/// Answers that are remembered: two minutes at one a second, more than a terminal is wide.
const POINTS: usize = 240;

/// Whose rate it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Trend {
    /// New flows per second, of all listeners.
    NewFlows,
    /// Forwarded packets per second, both ways, of all backends.
    Packets,
    /// Their bytes per second.
    Bytes,
    /// Packets per second that end in the data path.
    Dropped,
    /// Packets per second, both ways.
    Listener(String),
    /// By group and name; packets per second, both ways.
    Backend(String, String),
    /// Of the backends behind it; packets per second, both ways.
    Tunnel(String),
    /// Packets per second.
    Reason(String),
}

/// Rates so far; the last is the newest.
#[derive(Debug, Default)]
pub(super) struct History {
    points: HashMap<Trend, VecDeque<f64>>,
    /// When the last answer came, by any clock, and what it counted for each reason.
    last: Option<(Duration, HashMap<String, u64>)>,
}

impl History {
    /// Adds what the agent has said at the time `at`; what it says no more is forgotten.
    pub(super) fn add(&mut self, status: &Status, at: Duration) {
        let mut now: HashMap<Trend, f64> = HashMap::new();
        for listener in &status.listeners {
            *now.entry(Trend::NewFlows).or_default() += listener.traffic.rates.connections;
            now.insert(Trend::Listener(listener.name.clone()), packets(&listener.traffic));
        }
        for tunnel in &status.tunnels {
            now.insert(Trend::Tunnel(tunnel.name.clone()), 0.0);
        }
        for group in &status.groups {
            *now.entry(Trend::Packets).or_default() += packets(&group.traffic);
            *now.entry(Trend::Bytes).or_default() += bytes(&group.traffic);
            for backend in &group.backends {
                let rate = packets(&backend.traffic);
                now.insert(Trend::Backend(group.name.clone(), backend.name.clone()), rate);
                if let Some(tunnel) = &backend.tunnel {
                    *now.entry(Trend::Tunnel(tunnel.clone())).or_default() += rate;
                }
            }
        }
        let counted: HashMap<String, u64> = status
            .reasons
            .iter()
            .map(|reason| (reason.name.clone(), reason.packets))
            .collect();
        now.insert(Trend::Dropped, 0.0);
        for reason in status.reasons.iter().filter(|reason| ends(&reason.verdict)) {
            let rate = match &self.last {
                None => 0.0,
                Some((before, counts)) => {
                    let known = counts.get(&reason.name).copied().unwrap_or(reason.packets);
                    // A restarted agent may count from zero again.
                    reason.packets.saturating_sub(known) as f64 / (at - *before).as_secs_f64().max(1e-3)
                }
            };
            *now.entry(Trend::Dropped).or_default() += rate;
            now.insert(Trend::Reason(reason.name.clone()), rate);
        }
        self.last = Some((at, counted));
        self.points.retain(|trend, _| now.contains_key(trend));
        for (trend, rate) in now {
            let points = self.points.entry(trend).or_default();
            if points.len() == POINTS {
                points.pop_front();
            }
            points.push_back(rate);
        }
    }

    /// The newest rate, 0 if there is none.
    pub(super) fn rate(&self, trend: &Trend) -> f64 {
        self.points
            .get(trend)
            .and_then(VecDeque::back)
            .copied()
            .unwrap_or(0.0)
    }

    /// The last `width` rates, oldest first.
    pub(super) fn points(&self, trend: &Trend, width: usize) -> Vec<f64> {
        let Some(points) = self.points.get(trend) else {
            return Vec::new();
        };
        let skipped = points.len().saturating_sub(width);
        points.iter().skip(skipped).copied().collect()
    }

    /// The same as a line of text, as high as the highest of them.
    pub(super) fn line(&self, trend: &Trend, width: usize) -> String {
        const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let points = self.points(trend, width);
        let highest = points.iter().copied().fold(0.0, f64::max);
        let height = |rate: f64| {
            if highest <= 0.0 {
                return HEIGHTS[0];
            }
            let step = (rate / highest * (HEIGHTS.len() - 1) as f64).ceil() as usize;
            HEIGHTS[step.min(HEIGHTS.len() - 1)]
        };
        let line: String = points.iter().copied().map(height).collect();
        format!("{line:>width$}")
    }
}

/// Packets per second, both ways.
pub(super) fn packets(traffic: &Traffic) -> f64 {
    traffic.rates.packets_in + traffic.rates.packets_out
}

fn bytes(traffic: &Traffic) -> f64 {
    traffic.rates.bytes_in + traffic.rates.bytes_out
}

/// Does a packet with this verdict end in the data path?
pub(super) fn ends(verdict: &str) -> bool {
    matches!(verdict, "drop" | "refuse")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::testing::sample;

    #[test]
    fn drops_per_second_are_the_difference_of_two_answers() {
        let mut history = History::default();
        let mut status = sample();
        let dropped = status
            .reasons
            .iter()
            .position(|reason| reason.verdict == "drop")
            .unwrap();
        let trend = Trend::Reason(status.reasons[dropped].name.clone());
        history.add(&status, Duration::from_secs(10));
        assert_eq!(history.rate(&trend), 0.0, "what was counted before is no rate");
        status.reasons[dropped].packets += 50;
        history.add(&status, Duration::from_secs(12));
        assert_eq!(history.rate(&trend), 25.0);
        assert_eq!(history.rate(&Trend::Dropped), 25.0);
        // A restarted agent.
        status.reasons[dropped].packets = 1;
        history.add(&status, Duration::from_secs(13));
        assert_eq!(history.rate(&trend), 0.0);
    }

    #[test]
    fn a_line_is_as_high_as_its_highest_point() {
        let mut history = History::default();
        let mut status = sample();
        for (second, rate) in [0.0, 1.0, 10.0, 5.0].into_iter().enumerate() {
            status.listeners[0].traffic.rates.packets_in = rate;
            status.listeners[0].traffic.rates.packets_out = 0.0;
            history.add(&status, Duration::from_secs(second as u64));
        }
        let trend = Trend::Listener(status.listeners[0].name.clone());
        assert_eq!(history.line(&trend, 6), "  ▁▂█▅");
        assert_eq!(history.line(&trend, 2), "█▅");
        status.listeners.remove(0);
        history.add(&status, Duration::from_secs(9));
        assert_eq!(history.points(&trend, 9), Vec::<f64>::new(), "gone is forgotten");
    }
}
