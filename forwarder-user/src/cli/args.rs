//! What can be typed: the verbs and their arguments.
//!
//! Settings of a service have a twin in the environment, so that a unit file can give them. What the agent
//! does with traffic is not here but in the configuration file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Forwards traffic from listeners on VIPs to backends in other networks, by XDP.
#[derive(Debug, Parser)]
#[command(name = "forwarder", version, propagate_version = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 this host cannot.")]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Run(RunArgs),
    Check(CheckArgs),
    Status(StatusArgs),
}

/// Which configuration file is meant.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The configuration file (docs/configuration.md explains it)
    #[arg(short, long, value_name = "FILE", env = "FORWARDER_CONFIG")]
    pub config: PathBuf,
}

/// Load the data path, forward, check health, serve metrics; until SIGTERM or Ctrl-C
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// What to log: a level, or levels per module such as "info,forwarder_user::health=debug"
    /// [default: info]
    #[arg(long, value_name = "FILTER", env = "FORWARDER_LOG")]
    pub log: Option<String>,
    /// How to log
    #[arg(
        long,
        value_name = "FORMAT",
        env = "FORWARDER_LOG_FORMAT",
        default_value = "auto"
    )]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, else JSON
    Auto,
    /// One line of text per event
    Text,
    /// One JSON object per event
    Json,
}

/// Validate a configuration file; changes nothing and needs no privilege
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Show listeners, groups, backends with their health, flows and rates of the running agent
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The agent's control socket (`control_socket` in its configuration)
    #[arg(
        long,
        value_name = "PATH",
        env = "FORWARDER_SOCKET",
        default_value = crate::config::validate::DEFAULT_CONTROL_SOCKET
    )]
    pub socket: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// How an answer is written.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// How to write the answer
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory, FromArgMatches};

    use super::*;

    /// The arguments of a verb, read from what follows it on the command line.
    fn read<A: Args + FromArgMatches>(line: &[&str]) -> A {
        let command = A::augment_args(Command::new("verb").no_binary_name(true));
        command.clone().debug_assert();
        A::from_arg_matches(&command.get_matches_from(line)).unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_a_file_and_says_how_to_log() {
        let args: RunArgs = read(&["-c", "a.toml", "--log", "debug", "--log-format", "json"]);
        assert_eq!(args.config.config, PathBuf::from("a.toml"));
        assert_eq!(
            (args.log.as_deref(), args.log_format),
            (Some("debug"), LogFormat::Json)
        );
    }

    #[test]
    fn status_asks_the_default_socket_for_text() {
        let args: StatusArgs = read(&[]);
        assert_eq!(args.socket, PathBuf::from("/run/forwarder/control.sock"));
        assert_eq!(args.output.output, OutputFormat::Text);
    }
}
