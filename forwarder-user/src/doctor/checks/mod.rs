//! What the facts say is wrong. Pure functions, one file per thing that is checked.

mod backends;
mod host;
mod interfaces;
mod listeners;
mod networks;
#[cfg(test)]
pub(super) mod testing;

pub(super) use backends::answer;
pub(super) use interfaces::mode;

use super::{
    facts::Facts,
    finding::{Finding, arrange},
};
use crate::diagnose::fix::Fix;

/// Everything that is wrong, the likeliest cause of the rest first.
#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let networks = networks::check(facts);
    let backends = backends::check(facts, &networks);
    let mut findings = host::check(facts);
    findings.extend(interfaces::check(facts));
    findings.extend(networks);
    findings.extend(listeners::check(facts));
    findings.extend(backends);
    arrange(findings)
}

/// The command that makes the agent read its configuration and its interfaces anew.
fn restart(facts: &Facts) -> Option<Fix> {
    let is_running = facts.host.agent.is_some();
    is_running.then(|| Fix::here("systemctl restart forwarder"))
}

/// The commands that attach the data path to one more interface.
fn attach(facts: &Facts, interface: &str) -> Vec<Fix> {
    let append = format!(r#"printf '\n[interface."%s"]\n' {interface} >> {}"#, file(facts));
    [Fix::here(append)].into_iter().chain(restart(facts)).collect()
}

/// The configuration file as one word of a shell.
fn file(facts: &Facts) -> String {
    let path = facts.file.display().to_string();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte);
    if path.bytes().all(is_plain) {
        path
    } else {
        format!("'{}'", path.replace('\'', r"'\''"))
    }
}
