//! `cargo xtask test`: the rings of tests, from the cheapest to the most real.
//!
//! Which ring a file of integration tests belongs to is told by its name, so a new file is never left out: `netns_*`
//! need root and network namespaces, `package_*` a package and a clean system to install it on, `program_*` and `parity*`
//! the kernel's BPF, all others need nothing, and `vm_*` need a machine that only the `vm` ring boots. Here a test that can't run fails
//! (`FORWARDER_TESTS_STRICT=1`), and so does a ring in which no test ran; plain `cargo test` lets both pass.

use std::{
    collections::{BTreeSet, VecDeque},
    env,
    ffi::OsString,
    fs,
    io::{self, BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    bench, book, clean_root, fuzz, lint,
    package::{self, Architecture},
    setup, vm, workspace,
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only this ring, without setup and lint
    #[arg(value_enum)]
    ring: Option<Ring>,
    /// Passed to the test programs: a part of the tests' names, or options; for the vm ring, versions of kernels and
    /// parts of the test programs' names, as in `6.12 tunnels:natively`; for the fuzz ring, targets and for how many
    /// seconds, as in `walk 3600`
    #[arg(last = true, requires = "ring")]
    test_arguments: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ring {
    /// Ring 1: the data path as a library, the agent's logic, its command line
    Library,
    /// Ring 2: the same packets through the kernel's programs; needs the right to load BPF
    Program,
    /// Ring 5: hostile input, found by libFuzzer in half a minute on two processors; `-- walk 3600` has one target run for an
    /// hour
    Fuzz,
    /// Ring 3: real sockets in network namespaces; needs root
    Netns,
    /// Ring 3, installed: the Debian package on a clean system with systemd. Named, with the static binary; else, as that
    /// takes minutes to build, with the release binary
    Package,
    /// Ring 4: rings 2 and 3 on Debian's Linux 6.1 and 6.12 in QEMU; takes minutes, so only when asked for
    Vm,
}

impl Ring {
    /// Those that run unless one is named.
    const ALL: [Self; 5] = [
        Self::Library,
        Self::Program,
        Self::Fuzz,
        Self::Netns,
        Self::Package,
    ];

    /// The ring of the integration tests in `<stem>.rs`.
    fn of_file(stem: &str) -> Self {
        if stem.starts_with("netns_") {
            Self::Netns
        } else if stem.starts_with("package_") {
            Self::Package
        } else if stem.starts_with("vm_") {
            Self::Vm
        } else if stem.starts_with("program_") || stem.starts_with("parity") {
            Self::Program
        } else {
            Self::Library
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Library => "library",
            Self::Program => "program",
            Self::Fuzz => "fuzz",
            Self::Netns => "netns",
            Self::Package => "package",
            Self::Vm => "vm",
        }
    }
}

/// Files of ring 3 whose tests may run while another's do: they wait for most of their time, assert nothing about speed, and
/// look at nothing of the machine but their own labs. Those that take longest come first. All others, and so each new
/// one, have the machine for themselves.
const SIDE_BY_SIDE: [&str; 18] = [
    "netns_pool",
    "netns_doctor",
    "netns_rules",
    "netns_families",
    "netns_mtu",
    "netns_native",
    "netns_passive",
    "netns_tunnels",
    "netns_ipv6",
    "netns_echo",
    "netns_jumbo",
    "netns_selection",
    "netns_explain",
    "netns_capture",
    "netns_getting_started",
    "netns_top",
    "netns_api",
    "netns_fragments",
];
/// How many of them run at a time: as many as the smallest machine has processors.
const LANES: usize = 2;

/// Counts of finished tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    ignored: usize,
}

impl Tally {
    /// Adds the counts of a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn add_line(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        let words: Vec<&str> = counts.split_whitespace().collect();
        for pair in words.windows(2) {
            let Ok(count) = pair[0].parse::<usize>() else {
                continue;
            };
            match pair[1] {
                "passed;" => self.passed += count,
                "failed;" => self.failed += count,
                "ignored;" => self.ignored += count,
                _ => {}
            }
        }
    }
}

/// What became of one step, for the summary.
struct Outcome {
    step: &'static str,
    text: String,
    is_ok: bool,
    took: Duration,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { step, text, took, .. } = self;
        write!(f, "{step} {text} ({} s)", took.as_secs())
    }
}

/// Runs the tests and prints one line about all of them at the end.
///
/// # Errors
/// Something failed; the line before says what.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let rings = match arguments.ring {
        Some(ring) => vec![ring],
        None => Ring::ALL.to_vec(),
    };
    let mut outcomes = Vec::new();
    if arguments.ring.is_none() {
        // Nothing can be built without it, so nothing else would be worth trying.
        setup::run(&setup::Arguments::default())?;
        outcomes.push(measure("lint", || {
            lint::run().map(|()| (String::from("ok"), true))
        }));
        outcomes.push(measure("book", || {
            book::run().map(|()| (String::from("ok"), true))
        }));
    }
    let is_static = arguments.ring == Some(Ring::Package);
    let forwarder = if is_static {
        package::build_static(Architecture::default())?
    } else {
        let mut binaries = workspace::build_release(&["forwarder"])?;
        binaries.remove("forwarder").context("no binary was built")?
    };
    // Later rings run after a failure too: together they say more about its cause.
    for ring in rings {
        outcomes.push(measure(ring.name(), || {
            let surroundings = match ring {
                Ring::Package => installable(&forwarder, is_static)?,
                Ring::Netns => vec![(bench::OBJECT_VARIABLE, bench::build_programs()?.into())],
                _ => Vec::new(),
            };
            run_ring(ring, &arguments.test_arguments, &forwarder, &surroundings)
        }));
    }
    let summary: Vec<String> = outcomes.iter().map(Outcome::to_string).collect();
    eprintln!("\ntest: {}", summary.join(" · "));
    if outcomes.iter().any(|outcome| !outcome.is_ok) {
        bail!("not all tests passed");
    }
    Ok(())
}

fn measure(step: &'static str, action: impl FnOnce() -> Result<(String, bool)>) -> Outcome {
    eprintln!("\n==> {step}");
    let start = Instant::now();
    let (text, is_ok) = action().unwrap_or_else(|error| {
        crate::report(&error);
        (String::from("FAILED"), false)
    });
    Outcome {
        step,
        text,
        is_ok,
        took: start.elapsed(),
    }
}

/// What the tests of packages need, as variables: two packages of `forwarder` with rising versions, and a system to
/// install them on.
fn installable(forwarder: &Path, is_static: bool) -> Result<Vec<(&'static str, OsString)>> {
    let mut packages = Vec::new();
    for suffix in ["~test1", "~test2"] {
        packages.push(package::pack(&package::Contents {
            architecture: Architecture::default(),
            version: &package::version(suffix),
            binary: forwarder,
            runnable: forwarder,
            depends: if is_static { "" } else { "libc6, libgcc-s1" },
        })?);
    }
    Ok(vec![
        ("FORWARDER_PACKAGES", env::join_paths(packages)?),
        ("FORWARDER_CLEAN_ROOT", clean_root::get()?.into()),
    ])
}

/// Runs one ring, with more variables of its own: the text for the summary, and whether all is well.
fn run_ring(
    ring: Ring,
    test_arguments: &[String],
    forwarder: &Path,
    surroundings: &[(&str, OsString)],
) -> Result<(String, bool)> {
    if ring == Ring::Vm {
        return vm::run(forwarder, test_arguments);
    }
    if ring == Ring::Fuzz {
        return fuzz::run(test_arguments);
    }
    let files = test_files(ring)?;
    if ring != Ring::Library && files.is_empty() {
        bail!("the {} ring has no tests", ring.name());
    }
    let call = |arguments: &[&str], files: &[&str]| {
        let mut command = workspace::cargo(&["test", "--locked", "--no-fail-fast"]);
        command
            .args(arguments)
            .args(files.iter().flat_map(|file| ["--test", file]))
            .env("FORWARDER_TESTS_STRICT", "1")
            .env("FORWARDER_BIN", forwarder)
            .envs(surroundings.iter().cloned());
        if ring == Ring::Netns || !test_arguments.is_empty() {
            command.arg("--").args(test_arguments);
        }
        if ring == Ring::Netns {
            // Labs share the machine's few cores; wrk's figures want them alone.
            command.arg("--test-threads=1");
        }
        command
    };
    let all: Vec<&str> = files.iter().map(String::as_str).collect();
    let mut tally = Tally::default();
    let mut is_ok = true;
    // All of a ring in one call, and always for the same packages: dependencies are then built once.
    match ring {
        Ring::Library => {
            is_ok &= run_tests(&mut call(&["--lib", "--bins"], &all), &mut tally)?;
            is_ok &= run_tests(&mut call(&["--doc"], &[]), &mut tally)?;
        }
        Ring::Netns => {
            workspace::run(&mut call(&["--no-run"], &all))?;
            let (together, alone): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|file| SIDE_BY_SIDE.contains(file));
            is_ok &= run_side_by_side(&together, &|file| call(&[], &[file]), &mut tally)?;
            is_ok &= run_tests(&mut call(&[], &alone), &mut tally)?;
        }
        _ => is_ok &= run_tests(&mut call(&[], &all), &mut tally)?,
    }
    if tally.passed == 0 && test_arguments.is_empty() {
        bail!("no test of the {} ring passed", ring.name());
    }
    let verdict = if is_ok { "ok" } else { "FAILED" };
    let mut text = format!("{verdict}, {} passed", tally.passed);
    for (count, what) in [(tally.failed, "failed"), (tally.ignored, "ignored")] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    Ok((text, is_ok))
}

/// Names of the ring's files of integration tests, in any crate of the workspace.
pub(crate) fn test_files(ring: Ring) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for package in ["forwarder-common", "forwarder-user", "tests", "xtask"] {
        let folder = workspace::root().join(package).join("tests");
        if !folder.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs")
                && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
                && Ring::of_file(stem) == ring
            {
                files.insert(stem.to_owned());
            }
        }
    }
    Ok(files)
}

/// Runs one cargo call to its end, shows what it prints and adds its counts. Whether it succeeded.
fn run_tests(command: &mut Command, tally: &mut Tally) -> Result<bool> {
    eprintln!("test: {}", workspace::show(command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't run {}", workspace::show(command)))?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    // Bytes, not text: a failing test may print anything.
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tally.add_line(&line);
    }
    Ok(child.wait()?.success())
}

/// Runs the tests of `files`, some files at a time, and shows what each has printed when it ends. Whether all succeeded.
fn run_side_by_side(
    files: &[&str],
    call: &(impl Fn(&str) -> Command + Sync),
    tally: &mut Tally,
) -> Result<bool> {
    let left: VecDeque<&str> = SIDE_BY_SIDE
        .into_iter()
        .filter(|file| files.contains(file))
        .collect();
    let left = Mutex::new(left);
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let shown = Mutex::new((tally, true));
    let lane = || -> Result<()> {
        while let Some(file) = next() {
            let (text, is_ok) = run_quietly(call(file))?;
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            print!("{text}");
            for line in text.lines() {
                shown.0.add_line(line);
            }
            shown.1 &= is_ok;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().try_for_each(|lane| {
            lane.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    Ok(shown.into_inner().unwrap_or_else(PoisonError::into_inner).1)
}

/// Runs a command to its end: all that it printed, and whether it succeeded.
fn run_quietly(mut command: Command) -> Result<(String, bool)> {
    let shown = workspace::show(&command);
    eprintln!("test: {shown}");
    let (mut reader, writer) = io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("can't run {shown}"))?;
    // It holds the pipe's other end.
    drop(command);
    let mut printed = Vec::new();
    reader.read_to_end(&mut printed)?;
    Ok((
        String::from_utf8_lossy(&printed).into_owned(),
        child.wait()?.success(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_name_has_a_ring() {
        assert_eq!(Ring::of_file("netns_forward"), Ring::Netns);
        assert_eq!(Ring::of_file("program_cases"), Ring::Program);
        assert_eq!(Ring::of_file("parity"), Ring::Program);
        assert_eq!(Ring::of_file("vm_doctor"), Ring::Vm);
        assert_eq!(Ring::of_file("package_lives"), Ring::Package);
        assert_eq!(Ring::of_file("pipeline_cases"), Ring::Library);
        assert_eq!(Ring::of_file("cli"), Ring::Library);
    }

    #[test]
    fn whoever_runs_beside_others_is_there_and_once() {
        let files = test_files(Ring::Netns).unwrap();
        let once: BTreeSet<&str> = SIDE_BY_SIDE.into_iter().collect();
        assert_eq!(once.len(), SIDE_BY_SIDE.len());
        for file in once {
            assert!(files.contains(file), "{file}");
        }
    }

    #[test]
    fn files_side_by_side_are_all_run_and_counted_and_a_failure_is_kept() {
        let say = |file: &str| {
            let mut command = Command::new("sh");
            let passed = usize::from(file != "netns_rules");
            let failed = 1 - passed;
            command.args([
                "-c",
                &format!("echo 'test result: ok. {passed} passed; {failed} failed;'; exit {failed}"),
            ]);
            command
        };
        let mut tally = Tally::default();
        assert!(run_side_by_side(&["netns_mtu", "netns_api", "netns_top"], &say, &mut tally).unwrap());
        assert_eq!((tally.passed, tally.failed), (3, 0));
        assert!(!run_side_by_side(&["netns_mtu", "netns_rules"], &say, &mut tally).unwrap());
        assert_eq!((tally.passed, tally.failed), (4, 1));
    }

    #[test]
    fn counts_of_several_test_programs_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 4 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test a_test ... FAILED",
            "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.20s",
        ] {
            tally.add_line(line);
        }
        let expected = Tally {
            passed: 8,
            failed: 2,
            ignored: 1,
        };
        assert_eq!(tally, expected);
    }
}
