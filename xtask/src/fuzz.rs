//! Ring 5: the fuzz targets, built with libFuzzer and run for a bounded time.
//!
//! `cargo-fuzz` is not needed: what libFuzzer must know of the code, every rustc can put into it by flags that are
//! stable, and the compiler is the workspace's own. Without a sanitizer, as the code that is fuzzed has no `unsafe`; panics,
//! overflows and failed assertions are what is found, and runs that take too long or too much memory.
//!
//! Inputs that reach something new stay in `target/fuzz/corpus`, so the next run begins with them. An input that breaks
//! something goes to `tests/fuzz/regressions`, where ring 1 tries it again for ever.

use std::{
    fs::{self, File},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::{self, ScopedJoinHandle},
};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// The programs in `tests/fuzz`, those first that have most to find.
const TARGETS: [&str; 6] = ["walk", "icmp", "fragments", "config", "api", "capture"];

/// For how long inputs are tried unless a number says so, in seconds; each target has its share of it. What CI has.
const SECONDS: u64 = 60;
/// How many targets run at a time: each keeps one processor busy, and the smallest machine has two.
const LANES: usize = 2;

/// Counters at the edges of the control flow, a table of them, and what is compared with what: as `cargo fuzz` has it.
const FLAGS: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Bytes of an input at most: some packets.
const MOST_BYTES: u32 = 8192;
/// How long one input may take, in seconds: all take less than a hundredth of one.
const MOST_SECONDS: u32 = 10;
/// Memory of one program, in megabytes.
const MOST_MEMORY: u32 = 4096;

/// What is to be run, and for how long together.
#[derive(Debug, PartialEq, Eq)]
struct Wanted<'a> {
    targets: Vec<&'a str>,
    seconds: u64,
}

impl<'a> Wanted<'a> {
    /// Names of targets, and a number of seconds.
    fn of(arguments: &'a [String]) -> Result<Self> {
        let mut wanted = Self {
            targets: Vec::new(),
            seconds: SECONDS,
        };
        for argument in arguments {
            if let Ok(seconds) = argument.parse() {
                wanted.seconds = seconds;
            } else if TARGETS.contains(&argument.as_str()) {
                wanted.targets.push(argument);
            } else {
                bail!(
                    "no fuzz target \"{argument}\"\n  hint: {}, and a number of seconds",
                    TARGETS.join(", ")
                );
            }
        }
        if wanted.targets.is_empty() {
            wanted.targets = TARGETS.to_vec();
        }
        Ok(wanted)
    }
}

/// Builds and runs the targets: the text for the summary, and whether all is well.
///
/// # Errors
/// A name is wrong, or something cannot be built or started.
pub(crate) fn run(arguments: &[String]) -> Result<(String, bool)> {
    let wanted = Wanted::of(arguments)?;
    let programs = build()?;
    let seconds = (wanted.seconds / wanted.targets.len() as u64).max(1);
    let mut broken = Vec::new();
    let mut total = 0;
    for targets in wanted.targets.chunks(LANES) {
        let outcomes: Vec<Result<_>> = thread::scope(|scope| {
            let run = |name| Fuzzing::new(name, &programs)?.run(seconds);
            let running: Vec<_> = targets
                .iter()
                .map(|name| scope.spawn(move || run(name)))
                .collect();
            let join = |one: ScopedJoinHandle<'_, _>| one.join().unwrap_or_else(|panic| resume_unwind(panic));
            running.into_iter().map(join).collect()
        });
        for outcome in outcomes {
            let outcome = outcome?;
            eprintln!("{outcome}");
            total += outcome.runs;
            if !outcome.is_ok {
                broken.push(outcome.name);
            }
        }
    }
    Ok(if broken.is_empty() {
        (format!("ok, {total} inputs"), true)
    } else {
        (format!("FAILED: {}", broken.join(", ")), false)
    })
}

/// Where everything of this ring is.
fn folder() -> PathBuf {
    workspace::target().join("fuzz")
}

/// Builds the programs; the folder that they are in.
fn build() -> Result<PathBuf> {
    let host = workspace::host()?;
    let mut command = workspace::cargo(&["build", "--locked", "--target", &host, "--target-dir"]);
    command
        .arg(folder())
        .current_dir(workspace::root().join("tests/fuzz"))
        // By a target of its own, flags are not for build scripts; see cargo's `build.rustflags`.
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        // That of the release binary: it is loaded by none of the targets, and takes long to build.
        .env("FORWARDER_BPF_OBJECT", workspace::bpf_object()?);
    workspace::run(&mut command).context(
        "the fuzz targets did not build\n  hint: after a change of dependencies, `cargo update --workspace --manifest-path tests/fuzz/Cargo.toml`",
    )?;
    Ok(folder().join(host).join("debug"))
}

/// One target with its folders.
struct Fuzzing<'a> {
    name: &'a str,
    program: PathBuf,
    seeds: PathBuf,
    corpus: PathBuf,
    regressions: PathBuf,
    log: PathBuf,
}

impl<'a> Fuzzing<'a> {
    fn new(name: &'a str, programs: &Path) -> Result<Self> {
        let regressions = workspace::root().join("tests/fuzz/regressions").join(name);
        let this = Self {
            name,
            program: programs.join(name),
            seeds: folder().join("seeds").join(name),
            corpus: folder().join("corpus").join(name),
            log: folder().join(format!("{name}.log")),
            regressions,
        };
        // Of cases that are gone.
        if this.seeds.exists() {
            fs::remove_dir_all(&this.seeds).with_context(|| this.seeds.display().to_string())?;
        }
        for folder in [&this.corpus, &this.regressions] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let mut command = Command::new(&this.program);
        command
            .env("FORWARDER_FUZZ_SEEDS", &this.seeds)
            .stderr(Stdio::null());
        workspace::run(&mut command)?;
        Ok(this)
    }

    fn run(&self, seconds: u64) -> Result<Outcome<'a>> {
        let log = || File::create(&self.log).with_context(|| self.log.display().to_string());
        let mut command = Command::new(&self.program);
        command
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={MOST_BYTES}"))
            .arg(format!("-timeout={MOST_SECONDS}"))
            .arg(format!("-rss_limit_mb={MOST_MEMORY}"))
            .arg(format!("-artifact_prefix={}/", self.regressions.display()))
            .arg("-print_final_stats=1")
            .args([&self.corpus, &self.seeds, &self.regressions])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log()?);
        let status = command
            .status()
            .with_context(|| format!("can't run {}", workspace::show(&command)))?;
        let said = fs::read(&self.log).with_context(|| self.log.display().to_string())?;
        let said = String::from_utf8_lossy(&said);
        if !status.success() {
            let start = said.lines().count().saturating_sub(80);
            let tail: Vec<&str> = said.lines().skip(start).collect();
            eprintln!("{}", tail.join("\n"));
            eprintln!(
                "{}: the input is in {}; once it is mended, name it by the sentence that was false",
                self.name,
                self.regressions.display()
            );
        }
        // An empty folder is nothing to keep; git does not either.
        let _ = fs::remove_dir(&self.regressions);
        Ok(Outcome {
            name: self.name,
            runs: number_after(&said, "stat::number_of_executed_units:").unwrap_or(0),
            edges: number_after(&said, " cov: ").unwrap_or(0),
            seconds,
            is_ok: status.success(),
        })
    }
}

/// What became of one target.
struct Outcome<'a> {
    name: &'a str,
    runs: u64,
    /// Edges of the control flow that were reached, of our crates and of others.
    edges: u64,
    seconds: u64,
    is_ok: bool,
}

impl std::fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            runs,
            edges,
            seconds,
            is_ok,
        } = self;
        let verdict = if *is_ok { "ok" } else { "FAILED" };
        write!(
            f,
            "{name:<10} {verdict}: {runs} inputs, {edges} edges reached, {seconds} s"
        )
    }
}

/// The number behind the last of these words.
fn number_after(text: &str, words: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(words)?;
    let rest = rest.trim_start();
    let end = rest
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_seconds_are_read_in_any_order() {
        let words = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
        assert_eq!(
            Wanted::of(&words("walk 3600")).unwrap(),
            Wanted {
                targets: vec!["walk"],
                seconds: 3600
            }
        );
        assert_eq!(Wanted::of(&[]).unwrap().targets, TARGETS);
        assert!(Wanted::of(&words("wallk")).is_err());
    }

    #[test]
    fn libfuzzer_s_last_words_are_read() {
        let text = "#8192\tpulse  cov: 4000 ft: 9000 corp: 3/8b lim: 4 exec/s: 4096 rss: 90Mb\n\
                    #12000\tDONE   cov: 4123 ft: 9001 corp: 3/8b\n\
                    stat::number_of_executed_units: 12000\n";
        assert_eq!(number_after(text, " cov: "), Some(4123));
        assert_eq!(number_after(text, "stat::number_of_executed_units:"), Some(12000));
        assert_eq!(number_after("", " cov: "), None);
    }

    #[test]
    fn every_program_of_the_fuzz_crate_is_run() {
        let manifest = fs::read_to_string(workspace::root().join("tests/fuzz/Cargo.toml")).unwrap();
        let programs = manifest.matches("[[bin]]").count();
        assert_eq!(programs, TARGETS.len());
        for name in TARGETS {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        }
    }
}
