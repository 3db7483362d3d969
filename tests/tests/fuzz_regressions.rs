//! Ring 1: what a fuzzer begins with, and inputs that once broke something, through the fuzz targets without a fuzzer.
//!
//! An input that breaks something is put into `tests/fuzz/regressions/TARGET/` under the sentence that was false, with
//! hyphens for spaces: `the-reply-finds-its-flow-after-…`.

use std::{fs, panic, path::Path};

use forwarder_tests::fuzz::{TARGETS, Target};

/// Inputs of a target that once broke something, by name.
fn regressions(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/regressions")
        .join(target.name);
    let Ok(entries) = fs::read_dir(&folder) else {
        return Vec::new();
    };
    let mut inputs: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, fs::read(&path).expect("an input"))
        })
        .collect();
    inputs.sort();
    inputs
}

/// Whether the target has nothing against an input; what it has is printed.
fn is_fine(target: &Target, input: &[u8]) -> bool {
    panic::catch_unwind(|| (target.run)(input)).is_ok()
}

#[test]
fn what_once_broke_something_breaks_nothing() {
    let mut broken = Vec::new();
    for target in TARGETS {
        for (name, input) in regressions(&target) {
            if is_fine(&target, &input) {
                println!("ok      {}: {name}", target.name);
            } else {
                println!("FAILED  {}: {name}", target.name);
                broken.push(name);
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn inputs_that_broke_something_are_named_by_a_sentence() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        assert!(
            TARGETS.iter().any(|target| target.name == name),
            "no target {name}"
        );
    }
    for target in TARGETS {
        for (name, _) in regressions(&target) {
            let is_sentence = name.matches('-').count() >= 3
                && name.chars().all(|character| {
                    character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-'
                });
            assert!(is_sentence, "{name} of {} says nothing", target.name);
        }
    }
}

#[test]
fn what_a_fuzzer_begins_with_is_fine() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(seeds.len() > 50, "{}: {} seeds", target.name, seeds.len());
        let broken = seeds.iter().filter(|seed| !is_fine(&target, seed)).count();
        assert_eq!(
            broken,
            0,
            "{} of {} seeds of {}",
            broken,
            seeds.len(),
            target.name
        );
    }
}
