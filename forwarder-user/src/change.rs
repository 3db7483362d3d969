//! Changes of the configuration while the agent runs: what is asked for, and what is answered.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A configuration to be planned or applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Submission {
    /// What errors call it; nothing is read from there.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// The text of the file.
    pub text: String,
}

/// What a configuration changes, or has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChangeAnswer {
    /// `false`: nothing was changed.
    pub applied: bool,
    /// By object, as the configuration names them.
    pub changes: Vec<Change>,
    /// The writes to the tables, in their order.
    pub writes: Vec<String>,
}

/// What happens to one object of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    pub action: Action,
    /// `listener "web"`, `backend "web"/"a"`, …
    pub object: String,
    /// What it becomes.
    pub detail: String,
}

/// What happens to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Change,
    Remove,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.action {
            Action::Create => '+',
            Action::Change => '~',
            Action::Remove => '-',
        };
        write!(f, "{sign} {}", self.object)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}
