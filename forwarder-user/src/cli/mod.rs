//! The command line: one file per verb, `args` with what can be typed, `output` with how it is answered,
//! `log` with how the agent's log looks.
//!
//! A verb returns `Result<(), Errors>`; `main` prints the errors and turns them into the exit code. Data goes
//! to stdout, talk and errors to stderr.

pub mod apply;
pub mod args;
pub mod ask;
pub mod capture;
pub mod check;
pub mod completions;
pub mod detach;
pub mod doctor;
pub mod drain;
pub mod explain;
pub mod flows;
pub mod log;
pub mod man;
pub mod output;
pub mod plan;
pub mod run;
pub mod status;
pub mod table;
pub mod top;
