//! Reading a TOML document key by key, keeping the place of everything and collecting every error.
//!
//! serde stops at the first value it does not like; an operator wants all of them at once, each with its
//! line. So the document is parsed into `toml`'s spanned tree, and [`Table`] reads keys from it: it knows
//! which keys a table has ([`Shape`]), reports the others with a suggestion, and reports what is missing or
//! of the wrong type or range. [`Reported`] is the receipt for an error: a value that could not be read is
//! `Err(Reported)`, so that later checks skip it instead of complaining about it again, and so that an
//! outcome without a value is always one with an error.
//!
//! Nothing here knows what the keys mean; that is `schema`.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::Display,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use toml::de::{DeInteger, DeTable, DeValue};

use crate::error::{Error, Errors, Location};

/// Longest piece of a wrong value that a message repeats, in characters.
const SHOWN_CHARACTERS: usize = 60;

/// How alike (Jaro, 0 to 1) two names must be for one to be suggested for the other; clap's value.
const ALIKE: f64 = 0.7;

/// A value and where it stands, as a byte offset into the file.
#[derive(Clone, Copy, Debug)]
pub struct At<T> {
    pub value: T,
    pub at: usize,
}

/// Receipt for an error that is in the [`Report`]; only [`Report::error`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Reported(());

/// A key that must be there.
pub type Field<T> = Result<At<T>, Reported>;

/// A key that may be absent.
pub type OptionalField<T> = Result<Option<At<T>>, Reported>;

/// The tables `[kind.NAME]` by name.
pub type Named<T> = Result<BTreeMap<String, Entry<T>>, Reported>;

/// One `[kind.NAME]` table.
#[derive(Clone, Debug)]
pub struct Entry<T> {
    /// Where the name stands.
    pub at: usize,
    pub body: Result<T, Reported>,
}

/// A table of the language.
#[derive(Debug)]
pub struct Shape {
    /// The header as documentation writes it, such as `group.NAME.health`; empty for the file itself.
    pub header: &'static str,
    /// Every key it may have, in the order in which messages list them.
    pub keys: &'static [&'static str],
}

/// A value that is not what its key asks for. The message reads "KEY must be MUST_BE, not VALUE".
#[derive(Debug)]
pub struct Wrong {
    must_be: String,
    hint: Option<String>,
}

impl Wrong {
    pub fn must_be(must_be: impl Into<String>) -> Self {
        Self {
            must_be: must_be.into(),
            hint: None,
        }
    }

    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// The value may be one of these words as well.
    #[must_use]
    pub fn or_else_be(self, words: &str) -> Self {
        Self {
            must_be: format!("{words}, or {}", self.must_be),
            ..self
        }
    }
}

/// The errors found so far in one file.
#[derive(Debug)]
pub struct Report {
    file: PathBuf,
    /// Offset of the first byte of each line.
    line_starts: Vec<usize>,
    errors: RefCell<Vec<(Option<usize>, Error)>>,
}

impl Report {
    pub fn new(file: &Path, text: &str) -> Self {
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(offset, _)| offset + 1))
            .collect();
        Self {
            file: file.to_owned(),
            line_starts,
            errors: RefCell::default(),
        }
    }

    /// The line, from 1, that holds the byte at `offset`.
    pub fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// Adds an error about what stands at `at`, or about the whole file. Its words may repeat any of the file as it is:
    /// what is not to be printed is escaped here.
    pub fn error(&self, at: impl Into<Option<usize>>, error: Error) -> Reported {
        let at = at.into();
        let line = at.map_or(0, |offset| self.line(offset));
        let mut error = error.at(Location {
            file: self.file.clone(),
            line,
        });
        error.what = printable(&error.what);
        error.hint = error.hint.as_deref().map(printable);
        self.errors.borrow_mut().push((at, error));
        Reported(())
    }

    /// The outcome if nothing was reported, else every error in the order of the file.
    pub fn finish<T>(self, outcome: Result<T, Reported>) -> Result<T, Errors> {
        let mut errors = self.errors.into_inner();
        match outcome {
            Ok(value) if errors.is_empty() => Ok(value),
            _ => {
                errors.sort_by_key(|(at, _)| *at);
                Err(Errors(errors.into_iter().map(|(_, error)| error).collect()))
            }
        }
    }
}

/// A text without what a terminal would obey instead of showing it: control characters, and those that turn the
/// direction of writing around or have no width.
fn printable(text: &str) -> String {
    text.chars().fold(String::new(), |mut shown, character| {
        match character {
            // Rust would escape these as well, for its own syntax.
            '"' | '\'' | '\\' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
        shown
    })
}

/// One table being read.
#[derive(Debug)]
pub struct Table<'a> {
    report: &'a Report,
    shape: &'static Shape,
    /// What messages call it: `group "web", backend "ecs01"`; empty for the file itself.
    place: String,
    /// The NAME of a `[kind.NAME]` table.
    name: Option<&'a str>,
    /// Where its name stands; `None`: the file itself.
    at: Option<usize>,
    entries: &'a DeTable<'a>,
    /// Known keys that an unknown key was probably meant to be; they are not reported as missing.
    misspelt: BTreeMap<&'static str, Reported>,
}

impl<'a> Table<'a> {
    /// The whole file as a table.
    pub fn root(report: &'a Report, shape: &'static Shape, entries: &'a DeTable<'a>) -> Self {
        let (place, misspelt) = (String::new(), BTreeMap::new());
        Self {
            report,
            shape,
            place,
            name: None,
            at: None,
            entries,
            misspelt,
        }
        .without_unknown_keys()
    }

    /// The table under `key`, or under `key` and `name`, of this one.
    fn inner<'b>(
        &'b self,
        key: &str,
        name: Option<&'b str>,
        at: Option<usize>,
        shape: &'static Shape,
        entries: &'b DeTable<'b>,
    ) -> Table<'b> {
        let place = self.inner_place(key, name);
        Table {
            report: self.report,
            shape,
            place,
            name,
            at,
            entries,
            misspelt: BTreeMap::new(),
        }
        .without_unknown_keys()
    }

    fn inner_place(&self, key: &str, name: Option<&str>) -> String {
        let own = name.map_or_else(|| key.to_owned(), |name| format!("{key} {name:?}"));
        if self.place.is_empty() {
            own
        } else {
            format!("{}, {own}", self.place)
        }
    }

    /// Reports every unknown key.
    fn without_unknown_keys(mut self) -> Self {
        for (key, value) in self.entries {
            if !self.shape.keys.contains(&key.get_ref().as_ref()) {
                self.unknown(key.get_ref(), key.span().start, value.get_ref());
            }
        }
        self
    }

    fn unknown(&mut self, key: &str, at: usize, value: &DeValue<'_>) {
        let kind = if self.at.is_none() && value.is_table() {
            "table"
        } else {
            "key"
        };
        let known = format!("Known {kind}s: {}", self.shape.keys.join(", "));
        let similar = did_you_mean(key, self.shape.keys.iter().copied());
        // The dot of a VLAN interface's name is the trap: [interface.eth0.100] is a table inside "eth0".
        let hint = match (similar, self.name) {
            (Some(similar), _) => format!("did you mean {similar:?}?  {known}"),
            (None, Some(name)) if value.is_table() => {
                format!("a name with a dot is quoted, as in \"{name}.{key}\".  {known}")
            }
            _ => known,
        };
        let what = format!("{}unknown {kind} {key:?}", self.prefix());
        let reported = self.report.error(at, Error::usage(what).hint(hint));
        if let Some(similar) = similar {
            self.misspelt.insert(similar, reported);
        }
    }

    fn prefix(&self) -> String {
        if self.place.is_empty() {
            String::new()
        } else {
            format!("{}: ", self.place)
        }
    }

    /// The value of `key` with the offset of the key.
    fn get(&self, key: &'static str) -> Option<(usize, &'a DeValue<'a>)> {
        debug_assert!(
            self.shape.keys.contains(&key),
            "{key} is not in the shape of [{}]",
            self.shape.header
        );
        self.entries
            .get_key_value(key)
            .map(|(key, value)| (key.span().start, value.get_ref()))
    }

    fn missing(&self, key: &'static str, hint: &str) -> Reported {
        self.misspelt.get(key).copied().unwrap_or_else(|| {
            let what = format!("{}{key} is missing", self.prefix());
            self.report.error(self.at, Error::usage(what).hint(hint))
        })
    }

    /// The receipt for an unknown key that was probably meant to be `key`.
    pub fn misspelt(&self, key: &str) -> Option<Reported> {
        self.misspelt.get(key).copied()
    }

    fn wrong(&self, subject: &str, at: usize, value: &DeValue<'_>, wrong: Wrong) -> Reported {
        let what = format!(
            "{}{subject} must be {}, not {}",
            self.prefix(),
            wrong.must_be,
            show(value)
        );
        let error = Error::usage(what);
        self.report.error(
            at,
            if let Some(hint) = wrong.hint {
                error.hint(hint)
            } else {
                error
            },
        )
    }

    /// Reads a key that may be absent.
    pub fn optional<T>(
        &self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> OptionalField<T> {
        let Some((at, value)) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Ok(value) => Ok(Some(At { value, at })),
            Err(wrong) => Err(self.wrong(key, at, value, wrong)),
        }
    }

    /// Reads a key that must be there; `example` shows how it is written.
    pub fn required<T>(
        &self,
        key: &'static str,
        example: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Field<T> {
        self.optional(key, read)?
            .ok_or_else(|| self.missing(key, &format!("for example: {key} = {example}")))
    }

    /// Reads a list that may be absent. Entries are read one by one, so each has its own place and error.
    pub fn optional_list<T>(
        &self,
        key: &'static str,
        length: RangeInclusive<usize>,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> OptionalField<Vec<Field<T>>> {
        let Some((at, value)) = self.get(key) else {
            return Ok(None);
        };
        let Some(items) = value.as_array() else {
            let wrong = Wrong::must_be("a list").hint(format!("write it in brackets: {key} = [\"...\"]"));
            return Err(self.wrong(key, at, value, wrong));
        };
        if !length.contains(&items.len()) {
            let (first, last) = length.into_inner();
            let what = format!(
                "{}{key} must have {first} to {last} entries, not {}",
                self.prefix(),
                items.len()
            );
            return Err(self.report.error(at, Error::usage(what)));
        }
        let items = items.iter().map(|item| {
            let (at, value) = (item.span().start, item.get_ref());
            read(value)
                .map(|value| At { value, at })
                .map_err(|wrong| self.wrong(&format!("each entry of {key}"), at, value, wrong))
        });
        Ok(Some(At {
            value: items.collect(),
            at,
        }))
    }

    /// Reads a list that must be there; `example` shows how it is written.
    pub fn required_list<T>(
        &self,
        key: &'static str,
        example: &str,
        length: RangeInclusive<usize>,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Field<Vec<Field<T>>> {
        self.optional_list(key, length, read)?
            .ok_or_else(|| self.missing(key, &format!("for example: {key} = {example}")))
    }

    /// Reads the table `key`; an absent one reads as empty.
    pub fn table<T>(
        &self,
        key: &'static str,
        shape: &'static Shape,
        read: impl FnOnce(&Table<'_>) -> T,
    ) -> Result<T, Reported> {
        let Some((at, value)) = self.get(key) else {
            return Ok(read(&self.inner(key, None, self.at, shape, &DeTable::new())));
        };
        let Some(entries) = value.as_table() else {
            let wrong =
                Wrong::must_be("a table").hint(format!("write [{}] and its keys below", shape.header));
            return Err(self.wrong(key, at, value, wrong));
        };
        Ok(read(&self.inner(key, None, Some(at), shape, entries)))
    }

    /// Reads the table `key`, if it is there.
    pub fn optional_table<T>(
        &self,
        key: &'static str,
        shape: &'static Shape,
        read: impl FnOnce(&Table<'_>) -> T,
    ) -> Result<Option<T>, Reported> {
        if self.get(key).is_none() {
            return Ok(None);
        }
        self.table(key, shape, read).map(Some)
    }

    /// Reads the table `key`, which must be there.
    pub fn required_table<T>(
        &self,
        key: &'static str,
        shape: &'static Shape,
        read: impl FnOnce(&Table<'_>) -> T,
    ) -> Result<T, Reported> {
        if self.get(key).is_none() {
            return Err(self.missing_table(&format!("[{key}] table"), key, shape));
        }
        self.table(key, shape, read)
    }

    fn missing_table(&self, what: &str, key: &'static str, shape: &'static Shape) -> Reported {
        self.misspelt.get(key).copied().unwrap_or_else(|| {
            let hint = format!("write [{}]; its keys: {}", shape.header, shape.keys.join(", "));
            self.report.error(
                self.at,
                Error::usage(format!("{}there is no {what}", self.prefix())).hint(hint),
            )
        })
    }

    /// Reads the tables `[key.NAME]`; without any, the map is empty. `check_name` says what is wrong with a
    /// name, if anything.
    pub fn named<T>(
        &self,
        key: &'static str,
        shape: &'static Shape,
        check_name: impl Fn(&str) -> Option<&'static str>,
        read: impl Fn(&Table<'_>) -> T,
    ) -> Named<T> {
        let Some((at, value)) = self.get(key) else {
            return Ok(BTreeMap::new());
        };
        let write = format!("write [{}] and its keys below", shape.header);
        let Some(entries) = value.as_table() else {
            return Err(self.wrong(
                key,
                at,
                value,
                Wrong::must_be("a table of named tables").hint(write),
            ));
        };
        let entries = entries.iter().map(|(name, value)| {
            let (at, name) = (name.span().start, name.get_ref().to_string());
            let body = match value.get_ref() {
                DeValue::Table(entries) => {
                    if let Some(rule) = check_name(&name) {
                        let place = self.inner_place(key, Some(&name));
                        self.report.error(at, Error::usage(format!("{place}: {rule}")));
                    }
                    Ok(read(&self.inner(key, Some(&name), Some(at), shape, entries)))
                }
                other => {
                    let wrong = Wrong::must_be("a table").hint(write.clone());
                    Err(self.wrong(&format!("{key} {name:?}"), at, other, wrong))
                }
            };
            (name, Entry { at, body })
        });
        Ok(entries.collect())
    }

    /// Like [`Table::named`], and at least one must be there.
    pub fn required_named<T>(
        &self,
        key: &'static str,
        shape: &'static Shape,
        check_name: impl Fn(&str) -> Option<&'static str>,
        read: impl Fn(&Table<'_>) -> T,
    ) -> Named<T> {
        let entries = self.named(key, shape, check_name, read)?;
        if entries.is_empty() {
            return Err(self.missing_table(key, key, shape));
        }
        Ok(entries)
    }
}

/// The one of `known` that `name` was probably meant to be.
pub fn did_you_mean<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let name = name.to_lowercase();
    let mut best = (ALIKE, None);
    for candidate in known {
        let likeness = strsim::jaro(&name, &candidate.to_lowercase());
        if likeness > best.0 {
            best = (likeness, Some(candidate));
        }
    }
    best.1
}

/// A value as a message repeats it.
fn show(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if text.chars().nth(SHOWN_CHARACTERS).is_some() => {
            format!("{:?}...", text.chars().take(SHOWN_CHARACTERS).collect::<String>())
        }
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => as_written(number.as_str()),
        DeValue::Float(number) => as_written(number.as_str()),
        DeValue::Boolean(yes) => yes.to_string(),
        DeValue::Datetime(when) => when.to_string(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// A number as a message repeats it. Of one that is none the parser hands on what stands there, whatever it is.
fn as_written(number: &str) -> String {
    let shown: String = number.chars().take(SHOWN_CHARACTERS).collect();
    let more = if shown.len() < number.len() { "..." } else { "" };
    format!("{shown}{more}")
}

/// The value of a TOML integer, where it fits.
pub fn number<T: TryFrom<i128>>(integer: &DeInteger<'_>) -> Option<T> {
    let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok()?;
    T::try_from(number).ok()
}

/// Reads an integer within `range`.
pub fn integer<T: TryFrom<i128> + PartialOrd + Display>(
    range: RangeInclusive<T>,
) -> impl Fn(&DeValue<'_>) -> Result<T, Wrong> {
    move |value| {
        let wrong = || Wrong::must_be(format!("an integer from {} to {}", range.start(), range.end()));
        match value {
            DeValue::Integer(integer) => number(integer).filter(|n| range.contains(n)).ok_or_else(wrong),
            DeValue::String(text) if text.parse::<i64>().is_ok() => {
                Err(wrong().hint("write it without quotes"))
            }
            _ => Err(wrong()),
        }
    }
}

/// Reads one of a few words.
pub fn one_of<T: Copy>(words: &'static [(&'static str, T)]) -> impl Fn(&DeValue<'_>) -> Result<T, Wrong> {
    move |value| {
        let known = || words.iter().map(|(word, _)| *word);
        let text = value.as_str().unwrap_or_default();
        words
            .iter()
            .find(|(word, _)| *word == text)
            .map(|(_, meaning)| *meaning)
            .ok_or_else(|| {
                let must_be = known()
                    .map(|word| format!("{word:?}"))
                    .collect::<Vec<_>>()
                    .join(" or ");
                let wrong = Wrong::must_be(must_be);
                match did_you_mean(text, known()) {
                    Some(word) => wrong.hint(format!("did you mean {word:?}?")),
                    None => wrong,
                }
            })
    }
}
