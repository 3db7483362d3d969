//! The agent and its command line as a library, so that tests can reach every part.
//!
//! ```text
//! cli -> doctor -> diagnose              facts of the host and of every path, judged by pure checks
//! cli -> agent -> state -> config        names and wishes become tables; pure
//!          |  \-> health, passive, network, diagnose   what is going on out there
//!          \---> datapath                     the kernel's objects; the only place that knows aya
//! privileges                             what the agent may do, and why something was refused
//! announce                               tells neighbours whose addresses these are
//! status -> metrics, api                 what is known, for people and programs; histogram: how long things took
//! log_limit                              keeps the log from drowning
//! tui -> cli -> api                      the same on a terminal, live; the only place that knows ratatui
//! explain, flows, capture -> inspect -> api   looks at the data path beside the agent's loop
//! ```

pub mod agent;
pub mod announce;
pub mod api;
pub mod capture;
pub mod change;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod diagnose;
pub mod doctor;
pub mod error;
pub mod explain;
pub mod flows;
pub mod fragments;
pub mod health;
pub mod histogram;
pub mod inspect;
pub mod log_limit;
pub mod metrics;
pub mod network;
pub mod orders;
pub mod passive;
pub mod pool_watch;
pub mod privileges;
pub mod requirements;
pub mod reset;
pub mod state;
pub mod status;
pub mod sweep;
pub mod tui;
