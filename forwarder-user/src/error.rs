//! Errors that a user reads: what happened, where, and how to fix it.

use std::{fmt, path::PathBuf};

/// Exit code of a command that failed while working.
pub const EXIT_FAILED: u8 = 1;
/// Exit code for a wrong command line or configuration.
pub const EXIT_USAGE: u8 = 2;
/// Exit code for a host that cannot do what is asked.
pub const EXIT_HOST: u8 = 3;
/// Exit code of `forwarder status` when no agent runs, but its data path does.
pub const EXIT_UNATTENDED: u8 = 4;

/// A place in a file, as editors count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub file: PathBuf,
    /// From 1; 0 when the whole file is meant.
    pub line: usize,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What is wrong, naming the object: `listener "web": backend group "wbe" does not exist`.
    pub what: String,
    pub location: Option<Location>,
    /// What to do about it.
    pub hint: Option<String>,
    /// One of the `EXIT_` constants.
    pub exit_code: u8,
}

impl Error {
    /// An error of work that failed.
    pub fn failed(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            location: None,
            hint: None,
            exit_code: EXIT_FAILED,
        }
    }

    /// An error of usage or configuration.
    pub fn usage(what: impl Into<String>) -> Self {
        Self {
            exit_code: EXIT_USAGE,
            ..Self::failed(what)
        }
    }

    /// An error of the host: a missing right, interface, kernel feature.
    pub fn host(what: impl Into<String>) -> Self {
        Self {
            exit_code: EXIT_HOST,
            ..Self::failed(what)
        }
    }

    #[must_use]
    pub fn at(mut self, location: Location) -> Self {
        self.location = Some(location);
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if let Some(Location { file, line }) = &self.location {
            write!(f, "\n  --> {}", file.display())?;
            if *line > 0 {
                write!(f, ":{line}")?;
            }
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Everything that is wrong at once; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors(pub Vec<Error>);

impl Errors {
    /// The highest exit code among them.
    pub fn exit_code(&self) -> u8 {
        self.0
            .iter()
            .map(|error| error.exit_code)
            .max()
            .unwrap_or(EXIT_FAILED)
    }
}

impl From<Error> for Errors {
    fn from(error: Error) -> Self {
        Self(vec![error])
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}
