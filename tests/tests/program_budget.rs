//! Ring 2: how many instructions the verifier follows, against the counts that were accepted.
//!
//! A program is refused at 1 000 000, and a small change can multiply the count. `golden/verifier_budget.txt` has a
//! line for each kernel and program: more than a tenth above it fails, and so does a program that has none while its
//! kernel has some. A kernel without lines has its counts printed, and only the kernel's own limit to keep. `FORWARDER_BLESS=1` writes the counts of this kernel.

use std::{collections::BTreeMap, env, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::program::with_kernel;

/// Accepted counts by kernel (`6.12`) and program.
type Budget = BTreeMap<(String, String), u32>;

fn file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/verifier_budget.txt")
}

fn read() -> Result<Budget> {
    let text = fs::read_to_string(file()).context("golden/verifier_budget.txt")?;
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let [kernel, program, count] = words[..] else {
                anyhow::bail!("not a kernel, a program and a count: {line:?}");
            };
            Ok(((kernel.to_owned(), program.to_owned()), count.parse()?))
        })
        .collect()
}

fn write(budget: &Budget) -> Result<()> {
    let mut text = String::from(
        "# Kernel, program, instructions that the verifier follows. See tests/program_budget.rs.\n",
    );
    for ((kernel, program), count) in budget {
        text += &format!("{kernel} {program} {count}\n");
    }
    Ok(fs::write(file(), text)?)
}

/// Major and minor number, as in `6.12`.
fn kernel() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let numbers: Vec<_> = release.split('.').take(2).map(str::trim).collect();
    Ok(numbers.join("."))
}

#[test]
fn the_verifier_follows_no_more_instructions_than_accepted() {
    with_kernel(|programs| {
        let counts = programs.verified_instructions().unwrap();
        assert!(!counts.is_empty(), "the kernel tells no counts");
        check(&counts).unwrap();
    });
}

fn check(counts: &BTreeMap<String, u32>) -> Result<()> {
    let kernel = kernel()?;
    let mut budget = read()?;
    if env::var_os("FORWARDER_BLESS").is_some() {
        budget.retain(|(of, _), _| *of != kernel);
        for (program, count) in counts {
            budget.insert((kernel.clone(), program.clone()), *count);
        }
        return write(&budget);
    }
    // Of other kernels nothing was accepted yet.
    let is_known = budget.keys().any(|(of, _)| *of == kernel);
    let mut above = Vec::new();
    for (program, count) in counts {
        println!("{kernel} {program} {count}");
        match budget.get(&(kernel.clone(), program.clone())) {
            Some(accepted) if *count > *accepted + *accepted / 10 => above.push(format!(
                "{program} takes {count} instructions, {accepted} are accepted"
            )),
            None if is_known => {
                above.push(format!("{program} takes {count} instructions, none are accepted"));
            }
            _ => {}
        }
    }
    ensure!(
        above.is_empty(),
        "Linux {kernel}: {}; if it has to be so, accept it with FORWARDER_BLESS=1",
        above.join("; ")
    );
    Ok(())
}
