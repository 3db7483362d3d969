//! What `deploy/` gives to Prometheus and Grafana, checked by Prometheus's own `promtool`: the alert rules, their tests,
//! and that no panel of the dashboard stays empty.
//!
//! For the last, a test of rules is made: its series are those of the golden metrics text, all of them growing, and
//! each expression of the dashboard has to find something among them. That names and labels exist is a unit test's
//! affair, which needs no promtool (`forwarder-user/src/metrics/expressions.rs`).

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{toolchain::find_program, workspace};

const DASHBOARD: &str = "deploy/grafana-dashboard.json";
/// The metrics of a gateway with everything on it and a backend in trouble.
const METRICS: &str = "tests/golden/status/metrics.txt";
/// Between two samples, in seconds, and their number: enough for the longest range that is asked for.
const INTERVAL_S: u32 = 30;
const SAMPLES: u32 = 120;

/// # Errors
/// promtool is missing, or does not like what it sees.
pub(crate) fn run() -> Result<()> {
    let program =
        find_program("promtool").context("promtool is missing\n  hint: `cargo xtask setup` installs it")?;
    let folder = workspace::root().join("target/promtool");
    fs::create_dir_all(&folder)?;
    let panels = folder.join("dashboard.test.json");
    fs::write(&panels, panels_test()?.to_string())?;
    let panels = panels.display().to_string();
    for arguments in [
        ["check", "rules", "deploy/prometheus-rules.yml"],
        ["test", "rules", "deploy/prometheus-rules.test.yml"],
        ["test", "rules", &panels],
    ] {
        let mut command = Command::new(&program);
        command.current_dir(workspace::root()).args(arguments);
        eprintln!("lint: {}", workspace::show(&command));
        workspace::run(&mut command)?;
    }
    Ok(())
}

/// A file for `promtool test rules`; JSON is YAML as well.
fn panels_test() -> Result<Value> {
    let read = |path| fs::read_to_string(workspace::root().join(path)).context(path);
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)?).context(DASHBOARD)?;
    let expressions = expressions(&dashboard);
    if expressions.is_empty() {
        bail!("{DASHBOARD} asks for nothing");
    }
    let asked: Vec<_> = expressions
        .iter()
        .map(|expression| {
            json!({
                "expr": format!("count({expression}) > bool 0"),
                "eval_time": format!("{}s", INTERVAL_S * SAMPLES),
                "exp_samples": [{ "labels": "{}", "value": 1 }],
            })
        })
        .collect();
    Ok(json!({
        "rule_files": [],
        "evaluation_interval": "1m",
        "tests": [{
            "interval": format!("{INTERVAL_S}s"),
            "input_series": series(&read(METRICS)?),
            "promql_expr_test": asked,
        }],
    }))
}

/// What the panels ask for, as Grafana asks it.
fn expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let variables = ["$instance", "$listener", "$group"];
    targets
        .filter_map(|target| target["expr"].as_str())
        .map(|text| text.replace("$__rate_interval", "5m"))
        .map(|text| variables.iter().fold(text, |text, name| text.replace(name, ".*")))
        .collect()
}

/// The samples of a metrics text as scraped from one gateway: each begins with its value and grows by as much, so that
/// a zero stays one.
fn series(text: &str) -> Vec<Value> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, value)| {
            let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
            let comma = if labels == "}" { "" } else { "," };
            json!({
                "series": format!("{name}{{instance=\"gateway\"{comma}{labels}"),
                "values": format!("{value}+{value}x{SAMPLES}"),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_becomes_a_series_of_one_gateway() {
        let found = series("# HELP a b.\na_total{x=\"1\"} 3\nb 0.5\n# EOF\n");
        assert_eq!(found[0]["series"], r#"a_total{instance="gateway",x="1"}"#);
        assert_eq!(found[0]["values"], "3+3x120");
        assert_eq!(found[1]["series"], r#"b{instance="gateway"}"#);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn variables_of_the_dashboard_are_filled_in() {
        let dashboard = json!({ "panels": [
            { "type": "row" },
            { "targets": [{ "expr": "rate(a{instance=~\"$instance\"}[$__rate_interval])" }] },
        ] });
        assert_eq!(expressions(&dashboard), [r#"rate(a{instance=~".*"}[5m])"#]);
    }
}
