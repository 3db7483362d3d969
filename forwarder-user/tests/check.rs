//! `forwarder check` as a user meets it: the program is run, and its output and exit code are compared.
//!
//! `tests/golden/cli/*.toml` are broken configurations, each with the whole expected stderr beside it.
//! `FORWARDER_BLESS=1 cargo test -p forwarder-user --test check` writes those files anew; read the
//! difference before you commit it.

#![allow(
    clippy::unwrap_used,
    reason = "clippy takes the helpers of an integration test for ordinary code"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const BLESS: &str = "FORWARDER_BLESS";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn golden() -> PathBuf {
    workspace().join("tests/golden/cli")
}

/// Runs `forwarder` in `directory`, so that paths in its output are the same on every machine.
fn forwarder(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forwarder"))
        .args(arguments)
        .current_dir(directory)
        .env_remove("FORWARDER_CONFIG")
        .env_remove("CLICOLOR_FORCE")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The names of all `.toml` files in `directory`, sorted.
fn configurations(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    names
}

#[test]
fn every_broken_configuration_has_the_expected_errors_and_exit_code_2() {
    let names = configurations(&golden());
    assert!(names.len() >= 25, "only {} broken configurations", names.len());
    let mut failures = String::new();
    for name in &names {
        let output = forwarder(&golden(), &["check", "-c", name]);
        assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{name}: stdout is for answers");
        let file = golden().join(name).with_extension("stderr");
        if std::env::var_os(BLESS).is_some() {
            fs::write(&file, &output.stderr).unwrap();
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        if text(&output.stderr) != expected {
            failures += &format!(
                "--- {name}: expected\n{expected}--- got\n{}\n",
                text(&output.stderr)
            );
        }
    }
    assert!(
        failures.is_empty(),
        "{failures}if this is right, run again with {BLESS}=1 and read the difference"
    );
}

#[test]
fn no_expectation_is_left_of_a_removed_configuration() {
    for entry in fs::read_dir(golden()).unwrap() {
        let file = entry.unwrap().path();
        let owner = file.with_extension("toml");
        assert!(owner.exists(), "{} has no {}", file.display(), owner.display());
    }
}

#[test]
fn every_example_is_valid() {
    let examples = workspace().join("examples");
    for name in configurations(&examples) {
        let output = forwarder(&examples, &["check", "-c", &name]);
        assert_eq!(text(&output.stderr), "");
        assert_eq!(output.status.code(), Some(0));
        assert!(
            text(&output.stdout).starts_with(&format!("{name}: valid: ")),
            "{}",
            text(&output.stdout)
        );
    }
}

#[test]
fn a_valid_configuration_is_summed_up() {
    let output = forwarder(&workspace(), &["check", "-c", "examples/remote-backends.toml"]);
    assert_eq!(
        text(&output.stdout),
        "examples/remote-backends.toml: valid: 1 listener, 1 group, 2 backends, 2 networks, 2 interfaces, \
         1 tunnel, 61 SNAT addresses for traffic\n"
    );
}

#[test]
fn the_answer_as_json_counts_what_is_there() {
    let output = forwarder(&workspace(), &["check", "-c", "examples/dnat.toml", "-o", "json"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        answer,
        serde_json::json!({
            "file": "examples/dnat.toml", "valid": true,
            "listeners": 2, "groups": 1, "backends": 3, "networks": 0, "interfaces": 2, "tunnels": 0,
            "snat_addresses": 13,
            "errors": [],
        })
    );
}

#[test]
fn errors_as_json_go_to_stdout_and_their_text_still_to_stderr() {
    let output = forwarder(&golden(), &["check", "-c", "unknown_group.toml", "-o", "json"]);
    assert_eq!(output.status.code(), Some(2));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        answer,
        serde_json::json!({
            "file": "unknown_group.toml", "valid": false,
            "errors": [{
                "what": "listener \"web\": backend group \"wbe\" does not exist",
                "line": 18,
                "hint": "did you mean \"web-eu\"?  Known groups: web-eu, web-us",
            }],
        })
    );
    assert!(text(&output.stderr).starts_with("error: listener \"web\""));
}

#[test]
fn a_file_that_is_not_there_is_an_error_of_usage() {
    let output = forwarder(&workspace(), &["check", "-c", "examples/missing.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "error: cannot read the configuration file: No such file or directory (os error 2)\n  \
         --> examples/missing.toml\n  hint: name the file with -c, or in FORWARDER_CONFIG\n"
    );
}

#[test]
fn a_file_that_is_not_text_is_refused_with_the_line() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("latin1.toml"), b"# one\n# caf\xe9\n").unwrap();
    let output = forwarder(directory.path(), &["check", "-c", "latin1.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "error: the configuration file is not UTF-8 text\n  --> latin1.toml:2\n  hint: save it as UTF-8\n"
    );
}

#[test]
fn a_wrong_command_line_is_an_error_of_usage() {
    for arguments in [
        &["check"][..],
        &["chekc"],
        &["check", "-c", "x.toml", "-o", "yaml"],
    ] {
        let output = forwarder(&workspace(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
}

#[test]
fn the_configuration_can_be_named_in_the_environment() {
    let output = Command::new(env!("CARGO_BIN_EXE_forwarder"))
        .arg("check")
        .current_dir(workspace())
        .env("FORWARDER_CONFIG", "examples/minimal.toml")
        .output()
        .unwrap();
    assert!(
        text(&output.stdout).starts_with("examples/minimal.toml: valid"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn colour_is_for_terminals() {
    let output = forwarder(&golden(), &["check", "-c", "unknown_group.toml"]);
    assert!(!output.stderr.contains(&0x1b));
    let output = Command::new(env!("CARGO_BIN_EXE_forwarder"))
        .args(["check", "-c", "unknown_group.toml"])
        .current_dir(golden())
        .env_remove("NO_COLOR")
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    assert!(
        text(&output.stderr).starts_with("\u{1b}["),
        "{}",
        text(&output.stderr)
    );
}
