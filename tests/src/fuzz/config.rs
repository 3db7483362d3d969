//! Configuration files: read, checked, and made into tables. Nothing is asked of this host.

use std::{collections::BTreeMap, fs, path::Path};

use bytemuck::Zeroable as _;
use forwarder_common::abi::interface::Interface;
use forwarder_user::{
    config::{Config, TableSizes, load::parse},
    error::EXIT_USAGE,
    state::{
        desired::{Desired, Observations},
        difference::{differences, restart_needed},
        ids::{Capacity, NamesByNumber},
        plan::Applied,
    },
};

use super::Target;

pub(super) const CONFIG: Target = Target {
    name: "config",
    run,
    seeds: || texts().into_iter().map(String::into_bytes).collect(),
};

/// Slots of the slot table.
const SLOTS: u32 = 65_536;
/// Tables of configurations with more slots are not built: that takes seconds.
const MOST_SLOTS: u32 = 16_384;

/// All configurations of this repository.
pub(super) fn texts() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = Vec::new();
    for folder in ["../examples", "golden/cli", "golden/reconcile"] {
        let entries = fs::read_dir(root.join(folder)).expect("a folder of configurations");
        let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        files.sort();
        for file in files {
            let text = fs::read_to_string(&file).expect("a text");
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("toml") => texts.push(text),
                // A sentence, two configurations, and what is expected, each behind a line with dashes.
                Some("txt") => texts.extend(text.split("--- ").skip(1).take(2).map(|part| {
                    let common = "[snat]\nprefixes = [\"100.64.0.0/26\"]\n[interface.eth0]\n";
                    let (_, text) = part.split_once('\n').unwrap_or_default();
                    format!("{common}{text}")
                })),
                _ => {}
            }
        }
    }
    texts
}

fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let outcome = parse(text, Path::new("fuzz.toml"));
    match &outcome {
        Ok(config) => check_config(config),
        Err(errors) => {
            assert!(!errors.0.is_empty());
            assert_eq!(errors.exit_code(), EXIT_USAGE);
            let lines: Vec<usize> = errors
                .0
                .iter()
                .map(|error| error.location.as_ref().map_or(usize::MAX, |at| at.line))
                .collect();
            assert!(lines.is_sorted(), "in the order of the file: {lines:?}");
            let count = text.split('\n').count();
            assert!(lines.iter().all(|line| *line <= count), "{lines:?} of {count}");
            for error in &errors.0 {
                let message = format!("{}{}", error.what, error.hint.as_deref().unwrap_or_default());
                assert!(!error.what.is_empty());
                assert!(
                    !message.contains(char::is_control),
                    "a terminal obeys {message:?}"
                );
            }
        }
    }
}

/// What is valid can be planned: from nothing to tables, and then no further.
fn check_config(config: &Config) {
    assert_eq!(differences(Some(config), config), []);
    assert!(restart_needed(config, config).is_empty());
    for change in differences(None, config) {
        assert!(
            !change.to_string().contains(char::is_control),
            "a terminal obeys {change}"
        );
    }
    let slots = |group| TableSizes::of(group, &config.groups).sum();
    if config.groups.values().map(slots).sum::<u32>() > MOST_SLOTS {
        return;
    }
    let nothing = Applied::nothing(SLOTS);
    let ids = nothing
        .ids
        .next(config, &Capacity::UNLIMITED)
        .expect("numbers for everything");
    let sizes = config
        .groups
        .iter()
        .map(|(name, group)| (ids.groups[name], slots(group)));
    let placement = nothing.placement.arrange(sizes).expect("room for so few slots");
    let observed = Observations {
        interfaces: BTreeMap::from([(2, Interface::zeroed())]),
        route_generation: 1,
        ..Observations::default()
    };
    let mut applied = Applied {
        desired: Desired::of(config, &ids, &observed),
        ids,
        placement,
    };
    let writes = nothing.writes_to(&mut applied);
    let names = NamesByNumber::of(&[&applied.ids]);
    for write in &writes {
        assert!(!write.describe(&names).is_empty());
    }
    let mut again = applied.clone();
    let more = applied.writes_to(&mut again);
    assert!(more.is_empty(), "nothing is left to write, but {more:?}");
}
