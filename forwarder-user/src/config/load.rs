//! From a file to a [`Config`], or to everything that is wrong with the file.
//!
//! What is not TOML stops at the first error, as what follows it can't be told apart; all that comes after
//! (keys, values, references) is collected. The only I/O of the configuration is here: reading the file.

use std::{fs, path::Path};

use toml::de::DeTable;

use super::{
    Config,
    reader::{Report, Reported},
    schema::Document,
    validate::validate,
};
use crate::error::{Error, Errors, Location};

/// Reads and checks the configuration file at `path`.
///
/// # Errors
/// All with exit code 2: the file can't be read or is not UTF-8, or what [`parse`] finds.
pub fn load(path: &Path) -> Result<Config, Errors> {
    let whole_file = || Location {
        file: path.to_owned(),
        line: 0,
    };
    let bytes = fs::read(path).map_err(|error| {
        Error::usage(format!("cannot read the configuration file: {error}"))
            .at(whole_file())
            .hint("name the file with -c, or in FORWARDER_CONFIG")
    })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        Error::usage("the configuration file is not UTF-8 text")
            .at(Location { line, ..whole_file() })
            .hint("save it as UTF-8")
    })?;
    parse(&text, path)
}

/// Checks `text`; `path` is what errors call it, nothing is read from there.
///
/// # Errors
/// All with exit code 2 and in the order of the lines: the first syntax error, or else every unknown key,
/// wrong value and broken rule.
pub fn parse(text: &str, path: &Path) -> Result<Config, Errors> {
    let report = Report::new(path, text);
    match DeTable::parse(text) {
        Ok(root) => {
            let document = Document::read(root.get_ref(), &report);
            let config = validate(&document, &report);
            report.finish(config)
        }
        Err(error) => {
            let reported = syntax_error(&report, text, &error);
            report.finish(Err(reported))
        }
    }
}

/// toml's message with a hint for the usual slips.
fn syntax_error(report: &Report, text: &str, error: &toml::de::Error) -> Reported {
    let message = error.message();
    let span = error.span();
    let found = span.clone().and_then(|span| text.get(span)).unwrap_or_default();
    let found = found.trim_matches(['"', '\'']);
    let error = if message.starts_with("duplicate key") {
        Error::usage(format!("\"{found}\" is written twice"))
            .hint("keep one of the two; keys of one table stand together below its [header]")
    } else if ["string values must be quoted", "invalid boolean"]
        .iter()
        .any(|slip| message.starts_with(slip))
    {
        Error::usage(format!("not valid TOML: a value without quotes: {found}")).hint(
            "quote words, addresses and durations: \"tcp\", \"10.0.0.1\", \"2s\"; only numbers stand bare",
        )
    } else {
        Error::usage(format!("not valid TOML: {message}"))
    };
    report.error(span.map(|span| span.start), error)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::error::EXIT_USAGE;

    const EXAMPLES: [&str; 4] = [
        include_str!("../../../examples/minimal.toml"),
        include_str!("../../../examples/remote-backends.toml"),
        include_str!("../../../examples/dnat.toml"),
        include_str!("../../../examples/health-checks.toml"),
    ];

    /// What a slip of the hand, or malice, may put somewhere.
    const SCRAPS: [&str; 24] = [
        "",
        "0",
        "-1",
        "65536",
        "0xffff_ffff_ffff_ffff_ff",
        "1e999",
        "nan",
        "true",
        "2026-01-01",
        r#""""#,
        r#""web""#,
        r#""255.255.255.255""#,
        r#""0.0.0.0/0""#,
        r#""255.255.255.255/32""#,
        r#"["0.0.0.0/0", "128.0.0.0/1"]"#,
        "[]",
        "[[]]",
        "{}",
        "{ a = 1 }",
        r#""\u0000\u001b[31m""#,
        "\u{1b}[31m",
        "[snat]",
        "[group]",
        "\"9\u{e9}s\"",
    ];

    #[derive(Clone, Debug)]
    enum Slip {
        Remove(Index),
        Repeat(Index, Index),
        /// The value of a line becomes another.
        Value(Index, Index),
        /// Something is put in at any character.
        Insert(Index, Index),
        /// The text ends here.
        Cut(Index),
    }

    fn slip() -> impl Strategy<Value = Slip> {
        let place = any::<Index>;
        prop_oneof![
            2 => place().prop_map(Slip::Remove),
            2 => (place(), place()).prop_map(|(from, to)| Slip::Repeat(from, to)),
            12 => (place(), place()).prop_map(|(line, scrap)| Slip::Value(line, scrap)),
            1 => (place(), place()).prop_map(|(at, scrap)| Slip::Insert(at, scrap)),
            1 => place().prop_map(Slip::Cut),
        ]
    }

    fn apply(text: &str, slip: &Slip) -> String {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let boundaries: Vec<usize> = text
            .char_indices()
            .map(|(offset, _)| offset)
            .chain([text.len()])
            .collect();
        match slip {
            _ if lines.is_empty() => return text.to_owned(),
            Slip::Remove(line) => drop(lines.remove(line.index(lines.len()))),
            Slip::Repeat(from, to) => {
                let line = lines[from.index(lines.len())].clone();
                lines.insert(to.index(lines.len()), line);
            }
            Slip::Value(line, scrap) => {
                let values: Vec<usize> = (0..lines.len()).filter(|n| lines[*n].contains(" = ")).collect();
                if !values.is_empty() {
                    let line = &mut lines[values[line.index(values.len())]];
                    let key = line
                        .split_once(" = ")
                        .map(|(key, _)| key.to_owned())
                        .unwrap_or_default();
                    *line = format!("{key} = {}", SCRAPS[scrap.index(SCRAPS.len())]);
                }
            }
            Slip::Insert(at, scrap) => {
                let mut text = text.to_owned();
                text.insert_str(
                    boundaries[at.index(boundaries.len())],
                    SCRAPS[scrap.index(SCRAPS.len())],
                );
                return text;
            }
            Slip::Cut(at) => return text[..boundaries[at.index(boundaries.len())]].to_owned(),
        }
        lines.join("\n")
    }

    /// What holds of every outcome, whatever was read.
    fn check_outcome(text: &str) -> Result<(), TestCaseError> {
        let Err(errors) = parse(text, Path::new("test.toml")) else {
            return Ok(());
        };
        prop_assert!(!errors.0.is_empty());
        prop_assert_eq!(errors.exit_code(), EXIT_USAGE);
        let lines: Vec<usize> = errors
            .0
            .iter()
            .map(|error| error.location.as_ref().map_or(usize::MAX, |at| at.line))
            .collect();
        prop_assert!(lines.is_sorted(), "{:?}", lines);
        prop_assert!(
            lines.iter().all(|line| *line <= text.split('\n').count()),
            "{:?}",
            lines
        );
        for error in &errors.0 {
            let message = format!("{}{}", error.what, error.hint.as_deref().unwrap_or_default());
            prop_assert!(!message.contains(char::is_control), "{:?}", message);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn no_slip_panics_or_fails_without_a_reason(
            example in 0..EXAMPLES.len(),
            slips in vec(slip(), 1..8),
        ) {
            let text = slips.iter().fold(EXAMPLES[example].to_owned(), |text, slip| apply(&text, slip));
            check_outcome(&text)?;
        }

        #[test]
        fn no_text_panics_or_fails_without_a_reason(text in "\\PC*") {
            check_outcome(&text)?;
        }
    }

    #[test]
    fn every_example_is_valid() {
        for example in EXAMPLES {
            if let Err(errors) = parse(example, Path::new("example")) {
                panic!("{errors}");
            }
        }
    }

    #[test]
    fn lines_are_counted_in_files_of_other_systems() {
        let text = "\u{feff}[snat]\r\nprefixes = [\"100.64.0.0/26\"]\r\nprobe = 1\r\n";
        let errors = parse(text, Path::new("test.toml")).unwrap_err();
        let unknown = errors
            .0
            .iter()
            .find(|error| error.what.contains("unknown key"))
            .unwrap();
        assert_eq!(unknown.location.as_ref().unwrap().line, 3);
    }

    #[test]
    fn what_turns_the_direction_of_writing_around_is_shown_and_not_obeyed() {
        for text in ["\"a\u{202e}b\" = 1\n", "\"a\u{202e}b\" = 1\n\"a\u{202e}b\" = 2\n"] {
            let message = parse(text, Path::new("test.toml")).unwrap_err().to_string();
            assert!(message.contains(r"a\u{202e}b"), "{message}");
            assert!(!message.contains('\u{202e}'), "{message}");
        }
    }
}
