//! Tests: whatever `deploy/` asks Prometheus for, the agent exports.
//!
//! Every expression of the dashboard and of the alert rules is parsed; a metric, label or value of a label that no
//! family has would be a panel that stays empty, or an alert that never fires. That they also evaluate to something is
//! what `cargo xtask lint` has promtool find out.

use std::collections::{BTreeMap, BTreeSet};

use promql_parser::{
    label::MatchOp,
    parser::{self, Expr, LabelModifier, VectorSelector},
    util::{ExprVisitor, walk_expr},
};
use serde_json::Value;

use super::{Kind, families, render};
use crate::status::testing::sample;

const RULES: &str = include_str!("../../../deploy/prometheus-rules.yml");
const DASHBOARD: &str = include_str!("../../../deploy/grafana-dashboard.json");

/// Labels that Prometheus adds to what it scrapes.
const ADDED: [&str; 2] = ["instance", "job"];

/// Names of samples, with their labels.
fn exported() -> BTreeMap<String, BTreeSet<&'static str>> {
    let mut exported = BTreeMap::new();
    for family in families() {
        let labels: BTreeSet<_> = family.labels.iter().copied().chain(ADDED).collect();
        let suffixes: &[&str] = match family.kind {
            Kind::Counter => &["_total"],
            Kind::Gauge => &[""],
            Kind::Info => &["_info"],
            Kind::Histogram => &["_bucket", "_count", "_sum"],
        };
        for suffix in suffixes {
            let mut labels = labels.clone();
            if *suffix == "_bucket" {
                labels.insert("le");
            }
            exported.insert(format!("{}{suffix}", family.full_name()), labels);
        }
    }
    exported
}

/// The selectors of an expression, and the labels that it groups or joins by.
#[derive(Default)]
struct Asked {
    selectors: Vec<VectorSelector>,
    labels: BTreeSet<String>,
}

impl Asked {
    fn by(expression: &str) -> Self {
        let parsed = parser::parse(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
        let mut asked = Self::default();
        walk_expr(&mut asked, &parsed).unwrap();
        asked
    }

    fn joins(&mut self, modifier: Option<&LabelModifier>) {
        let labels = modifier
            .into_iter()
            .flat_map(|modifier| &modifier.labels().labels);
        self.labels.extend(labels.cloned());
    }
}

impl ExprVisitor for Asked {
    type Error = std::convert::Infallible;

    fn pre_visit(&mut self, expression: &Expr) -> Result<bool, Self::Error> {
        match expression {
            Expr::VectorSelector(selector) => self.selectors.push(selector.clone()),
            Expr::MatrixSelector(range) => self.selectors.push(range.vs.clone()),
            Expr::Aggregate(aggregate) => self.joins(aggregate.modifier.as_ref()),
            Expr::Binary(binary) => {
                let modifier = binary.modifier.as_ref();
                self.joins(modifier.and_then(|modifier| modifier.matching.as_ref()));
            }
            _ => {}
        }
        Ok(true)
    }
}

/// Panics if the expression asks for what is not exported; what it asks for is returned.
fn assert_answered(expression: &str) -> BTreeSet<String> {
    let exported = exported();
    let text = render(&sample());
    let asked = Asked::by(expression);
    let mut all = BTreeSet::new();
    let mut names = BTreeSet::new();
    for selector in &asked.selectors {
        let name = selector.name.as_deref().expect(expression);
        let labels = exported
            .get(name)
            .unwrap_or_else(|| panic!("{expression}: no metric is called {name}"));
        for matcher in &selector.matchers.matchers {
            let label = matcher.name.as_str();
            assert!(
                labels.contains(label),
                "{expression}: {name} has no label {label}"
            );
            if matches!(matcher.op, MatchOp::Equal) && !ADDED.contains(&label) {
                let value = format!("{label}=\"{}\"", matcher.value);
                assert!(
                    text.lines()
                        .any(|line| line.starts_with(name) && line.contains(&value)),
                    "{expression}: no {name} has {value}"
                );
            }
        }
        all.extend(labels.iter().map(|label| (*label).to_owned()));
        names.insert(name.to_owned());
    }
    for label in &asked.labels {
        assert!(
            all.contains(label),
            "{expression}: nothing in it has a label {label}"
        );
    }
    names
}

/// Every value of these keys, wherever it is.
fn collect<'a>(value: &'a Value, keys: &[&str], found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if keys.contains(&key.as_str()) => found.push(text),
                    value => collect(value, keys, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, keys, found)),
        _ => {}
    }
}

/// As Grafana does it before it asks.
fn without_variables(expression: &str) -> String {
    let with_range = expression.replace("$__rate_interval", "5m");
    ["instance", "listener", "group"]
        .iter()
        .fold(with_range, |text, name| text.replace(&format!("${name}"), ".*"))
}

#[test]
fn alert_rules_ask_for_what_there_is() {
    let expressions = RULES
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("expr: "));
    let alerts = RULES.matches("- alert: ").count();
    let names: Vec<_> = expressions.map(assert_answered).collect();
    assert!(alerts >= 9 && names.len() == alerts, "{alerts} alerts, {names:?}");
}

#[test]
fn every_panel_of_the_dashboard_asks_for_what_there_is() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut expressions = Vec::new();
    collect(&dashboard, &["expr"], &mut expressions);
    assert!(expressions.len() > 30, "{expressions:?}");
    let mut shown = BTreeSet::new();
    for expression in expressions {
        shown.extend(assert_answered(&without_variables(expression)));
    }
    // Every family is on it, but those that say the same by group as by listener and backend.
    for family in families() {
        let name = family.full_name();
        let is_shown = shown.iter().any(|shown| shown.starts_with(&name));
        let is_sum = family.labels.first() == Some(&"group") && family.labels.get(1) != Some(&"backend");
        let is_detail = family.labels.starts_with(&["group", "backend"]) || name.ends_with("_bytes");
        assert!(is_shown || is_sum || is_detail, "{name} is on no panel");
    }
}

#[test]
fn the_dashboard_s_variables_and_legends_name_labels_that_there_are() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut queries = Vec::new();
    collect(&dashboard["templating"], &["query"], &mut queries);
    let mut variables = 0;
    for query in queries
        .iter()
        .filter_map(|query| query.strip_prefix("label_values("))
    {
        let (selector, label) = query.trim_end_matches(')').rsplit_once(", ").unwrap();
        let names = assert_answered(&without_variables(selector));
        for name in names {
            assert!(exported()[&name].contains(label), "{query}");
        }
        variables += 1;
    }
    assert_eq!(variables, 3, "{queries:?}");
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let names = assert_answered(&without_variables(target["expr"].as_str().unwrap()));
            let labels: BTreeSet<_> = names.iter().flat_map(|name| exported()[name].clone()).collect();
            let legend = target["legendFormat"].as_str().unwrap();
            for part in legend.split("{{").skip(1) {
                let label = part.split("}}").next().unwrap();
                assert!(labels.contains(label), "{}: {legend}", panel["title"]);
            }
        }
    }
}

#[test]
fn what_is_not_exported_is_noticed() {
    for wrong in [
        "forwarder_listener_connections",
        r#"forwarder_packets_total{verdict="dropped"}"#,
        r#"forwarder_packets_total{listener="web"}"#,
        "sum by (tunnel) (forwarder_pool_used_ratio)",
        "sum by (group (forwarder_group_backends)",
    ] {
        assert!(
            std::panic::catch_unwind(|| assert_answered(wrong)).is_err(),
            "{wrong}"
        );
    }
}

#[test]
fn every_alert_is_tested_to_fire_and_not_to_fire() {
    let tests = include_str!("../../../deploy/prometheus-rules.test.yml");
    for line in RULES.lines() {
        let Some(alert) = line.trim_start().strip_prefix("- alert: ") else {
            continue;
        };
        assert!(
            tests.contains(&format!("alertname: {alert}, exp_alerts: [] }}")),
            "{alert}: not to fire"
        );
        assert!(
            tests.contains(&format!("alertname: {alert}\n        exp_alerts:\n")),
            "{alert}: to fire"
        );
    }
}
