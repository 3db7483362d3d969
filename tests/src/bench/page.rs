//! The page of all benchmarks, `docs/benchmarks.md`, and its plots: made from `docs/benchmarks.json`, where each
//! benchmark's last outcome is kept. So one can be measured anew without the others, and a test sees that the page is
//! what its data say.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{Made, Measured, memory, nat, packets, plot, tables, targets, tunnels};

/// Where the data are, below the root of the sources.
const DATA: &str = "docs/benchmarks.json";
const PAGE: &str = "docs/benchmarks.md";
const IMAGES: &str = "docs/images";

/// What stands above all.
const INTRODUCTION: &str = "\
What the forwarder costs, beside the least that it could and beside what else could do its work. Absolute figures are one
machine's; ratios are of one run. `cargo xtask bench` measures all of it and writes this page (`cargo xtask bench packets`
prints one part, with `--write` it replaces that part here). Every benchmark fails, instead of
telling a figure, where a packet, a flow or an answer is not what it has to be; the tests break packets, flows and answers on
purpose to see that. What clients notice of failures: [failover](failover.md).";

/// A part of the page: what it is called, and the words that go with it.
struct Part {
    name: &'static str,
    title: &'static str,
    prose: &'static str,
}

/// In the page's order.
const PARTS: [Part; 5] = [
    Part {
        name: packets::NAME,
        title: packets::TITLE,
        prose: packets::PROSE,
    },
    Part {
        name: nat::NAME,
        title: nat::TITLE,
        prose: nat::PROSE,
    },
    Part {
        name: tunnels::NAME,
        title: tunnels::TITLE,
        prose: tunnels::PROSE,
    },
    Part {
        name: tables::NAME,
        title: tables::TITLE,
        prose: tables::PROSE,
    },
    Part {
        name: memory::NAME,
        title: memory::TITLE,
        prose: memory::PROSE,
    },
];

/// One benchmark's outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Outcome {
    made: Made,
    measured: Measured,
}

/// The last outcome of each benchmark.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results(BTreeMap<String, Outcome>);

impl Results {
    /// Those of these sources; none if there are none.
    pub fn load(root: &Path) -> Result<Self> {
        let path = root.join(DATA);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// Replaces the outcome of one benchmark.
    pub fn set(&mut self, name: &str, made: Made, measured: Measured) {
        self.0.insert(name.to_owned(), Outcome { made, measured });
    }

    /// A figure of a benchmark.
    pub fn figure(&self, benchmark: &str, name: &str) -> Option<f64> {
        self.0.get(benchmark)?.measured.figures.get(name).copied()
    }

    #[cfg(test)]
    pub(super) fn note(&mut self, benchmark: &str, name: &str, value: f64) {
        let outcome = self.0.entry(benchmark.to_owned()).or_insert_with(|| Outcome {
            made: Made {
                date: String::new(),
                processors: String::new(),
                kernel: String::new(),
                commit: String::new(),
                load: String::new(),
            },
            measured: Measured::default(),
        });
        outcome.measured.figure(name, value);
    }

    /// They, and everything that is made from them: text by path below the root of the sources.
    pub fn files(&self) -> Result<BTreeMap<PathBuf, String>> {
        let mut files = BTreeMap::from([
            (PathBuf::from(DATA), serde_json::to_string_pretty(self)? + "\n"),
            (PathBuf::from(PAGE), self.page()),
        ]);
        for outcome in self.0.values() {
            for picture in &outcome.measured.plots {
                files.insert(image(&picture.name), plot::svg(picture)?);
            }
        }
        Ok(files)
    }

    /// Writes all of that.
    pub fn write(&self, root: &Path) -> Result<()> {
        for (path, text) in self.files()? {
            let path = root.join(path);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    fn page(&self) -> String {
        let mut blocks = vec![
            "# Benchmarks".to_owned(),
            "<!-- Made by `cargo xtask bench` from benchmarks.json; its words are in tests/src/bench. -->"
                .to_owned(),
            INTRODUCTION.to_owned(),
            "## Targets".to_owned(),
            targets::markdown(self),
        ];
        for part in &PARTS {
            let Some(Outcome { made, measured }) = self.0.get(part.name) else {
                continue;
            };
            blocks.push(format!("## {}", part.title));
            blocks.push(format!("```sh\ncargo xtask bench {}\n```", part.name));
            blocks.push(part.prose.trim().to_owned());
            blocks.push(made_line(made));
            blocks.extend(remarks(measured));
            blocks.extend(measured.tables.iter().map(super::Table::markdown));
            blocks.extend(
                measured
                    .plots
                    .iter()
                    .map(|picture| format!("![{}](images/{}.svg)", picture.title, picture.name)),
            );
            if part.name == nat::NAME {
                blocks.push("### Configurations".to_owned());
                blocks.push(nat::configurations());
            }
        }
        blocks.join("\n\n") + "\n"
    }
}

fn image(name: &str) -> PathBuf {
    Path::new(IMAGES).join(format!("{name}.svg"))
}

fn made_line(made: &Made) -> String {
    format!(
        "{}, commit {}; {}, Linux {}, load before the run {}.",
        made.date, made.commit, made.processors, made.kernel, made.load
    )
}

fn remarks(measured: &Measured) -> Option<String> {
    let lines: Vec<_> = measured
        .remarks
        .iter()
        .map(|remark| format!("- {remark}"))
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// One benchmark's outcome, for a terminal.
pub fn print(made: &Made, measured: &Measured) -> String {
    let mut blocks = vec![made_line(made)];
    blocks.extend(remarks(measured));
    blocks.extend(measured.tables.iter().map(super::Table::markdown));
    blocks.join("\n\n")
}
