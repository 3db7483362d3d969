//! `forwarder check`: is this configuration file valid?
//!
//! Reads the file and nothing else: whether this host has the interfaces and rights that the configuration
//! asks for is found out by `run`.

use serde::Serialize;

use super::{
    args::{CheckArgs, OutputFormat},
    output,
};
use crate::{
    config::{Config, load::load},
    error::{Error, Errors},
};

/// The answer as JSON; the fields are documented in docs/configuration.md.
#[derive(Serialize)]
struct Answer<'a> {
    file: String,
    valid: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    counts: Option<Counts>,
    errors: Vec<Finding<'a>>,
}

/// How much a valid configuration holds.
#[derive(Serialize)]
struct Counts {
    listeners: usize,
    groups: usize,
    backends: usize,
    networks: usize,
    interfaces: usize,
    tunnels: usize,
    snat_addresses: u64,
}

/// One error.
#[derive(Serialize)]
struct Finding<'a> {
    what: &'a str,
    /// From 1; absent when the whole file is meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

/// Loads the configuration and says what it holds.
///
/// # Errors
/// What is wrong with the file, or that the answer can't be written.
pub fn check(args: &CheckArgs) -> Result<(), Errors> {
    let file = args.config.config.display().to_string();
    let outcome = load(&args.config.config);
    match args.output.output {
        OutputFormat::Text => {
            let counts = Counts::of(&outcome?);
            output::text(&format!("{file}: valid: {}", counts.sentence()))?;
        }
        OutputFormat::Json => {
            let errors = outcome.as_ref().err().map_or(&[][..], |errors| &errors.0);
            output::json(&Answer {
                file,
                valid: outcome.is_ok(),
                counts: outcome.as_ref().ok().map(Counts::of),
                errors: errors.iter().map(Finding::of).collect(),
            })?;
            outcome?;
        }
    }
    Ok(())
}

impl Counts {
    fn of(config: &Config) -> Self {
        Self {
            listeners: config.listeners.len(),
            groups: config.groups.len(),
            backends: config.groups.values().map(|group| group.backends.len()).sum(),
            networks: config.networks.len(),
            interfaces: config.interfaces.len(),
            tunnels: config.tunnels.len(),
            snat_addresses: config
                .snat
                .ranges
                .iter()
                .map(|(_, count)| u64::from(*count))
                .sum(),
        }
    }

    fn sentence(&self) -> String {
        let plural = |count: usize, noun| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        let addresses = if self.snat_addresses == 1 {
            "address"
        } else {
            "addresses"
        };
        [
            plural(self.listeners, "listener"),
            plural(self.groups, "group"),
            plural(self.backends, "backend"),
            plural(self.networks, "network"),
            plural(self.interfaces, "interface"),
            plural(self.tunnels, "tunnel"),
            format!("{} SNAT {addresses} for traffic", self.snat_addresses),
        ]
        .join(", ")
    }
}

impl<'a> Finding<'a> {
    fn of(error: &'a Error) -> Self {
        Self {
            what: &error.what,
            line: error
                .location
                .as_ref()
                .map(|location| location.line)
                .filter(|line| *line > 0),
            hint: error.hint.as_deref(),
        }
    }
}
