//! What the agent says about itself: `forwarder status -o json`, and the Prometheus text.

use std::collections::HashMap;

use anyhow::{Context, Result};
pub use forwarder_user::status::{BackendStatus, DiagnosisStatus, Status};

/// What the status calls a backend that takes new flows.
pub const HEALTHY: &str = "healthy";

pub(super) fn parse(json: &[u8]) -> Result<Status> {
    serde_json::from_slice(json)
        .with_context(|| format!("a status of another shape: {}", String::from_utf8_lossy(json)))
}

/// The backends of a group, in the agent's order.
pub(super) fn backends(status: Status, group: &str) -> Result<Vec<BackendStatus>> {
    let found = status.groups.into_iter().find(|one| one.name == group);
    Ok(found
        .with_context(|| format!("no group {group:?} in the status"))?
        .backends)
}

/// A scrape: samples in the text format of Prometheus.
#[derive(Clone, Debug)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Metrics {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let samples = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| Sample::parse(line).with_context(|| format!("not a sample: {line:?}")))
            .collect::<Result<_>>()?;
        Ok(Self { samples })
    }

    /// Sum of the samples of a metric that carry all of `labels`; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted = |sample: &&Sample| {
            sample.name == name
                && labels.iter().all(|(key, value)| {
                    sample
                        .labels
                        .iter()
                        .any(|(own_key, own)| own_key == key && own == value)
                })
        };
        self.samples
            .iter()
            .filter(wanted)
            .map(|sample| sample.value)
            .sum()
    }

    /// Counters that are lower than in an earlier scrape, in words; those that are missing from one of the two, as their
    /// object came or went, are left out.
    pub fn fallen_since(&self, before: &Self) -> Vec<String> {
        let earlier: HashMap<_, _> = before
            .samples
            .iter()
            .map(|sample| ((&sample.name, &sample.labels), sample.value))
            .collect();
        self.samples
            .iter()
            .filter(|sample| sample.name.ends_with("_total"))
            .filter_map(|sample| {
                let was = *earlier.get(&(&sample.name, &sample.labels))?;
                (sample.value < was).then(|| {
                    let Sample { name, labels, value } = sample;
                    format!("{name} {labels:?}: {value} after {was}")
                })
            })
            .collect()
    }
}

impl Sample {
    /// `name{label="value",…} 1`; no label of the agent's holds a comma or an escaped character.
    fn parse(line: &str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}')?),
            None => (series, ""),
        };
        let labels = labels
            .split(',')
            .filter(|label| !label.is_empty())
            .map(|label| {
                let (key, value) = label.split_once('=')?;
                Some((key.to_owned(), value.trim_matches('"').to_owned()))
            })
            .collect::<Option<_>>()?;
        Some(Self {
            name: name.to_owned(),
            labels,
            value: value.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_label() {
        let metrics = Metrics::parse(
            "# HELP x y\n# TYPE x counter\nx_total{group=\"web\",backend=\"a\"} 3\nx_total{group=\"web\",backend=\"b\"} 4\nup 1\n# EOF\n",
        )
        .unwrap();
        assert_eq!(metrics.sum("x_total", &[("group", "web")]), 7.0);
        assert_eq!(metrics.sum("x_total", &[("backend", "b")]), 4.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("down", &[]), 0.0);
    }

    #[test]
    fn only_counters_fall_that_are_in_both_scrapes() {
        let [before, after] = [
            "a_total{x=\"1\"} 3\na_total{x=\"2\"} 3\nb_total 3\ngauge 3\n# EOF\n",
            "a_total{x=\"1\"} 2\na_total{x=\"3\"} 1\nb_total 3\ngauge 2\n# EOF\n",
        ]
        .map(|text| Metrics::parse(text).unwrap());
        let fallen = after.fallen_since(&before);
        assert_eq!(fallen.len(), 1, "{fallen:?}");
        assert!(fallen[0].contains("2 after 3"), "{fallen:?}");
    }
}
