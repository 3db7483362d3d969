//! The `forwarder` program: reads the command line, runs the verb, prints its errors, exits.
//!
//! Nothing else is here, so that tests and the verbs share one library.

use std::process::ExitCode;

use clap::Parser;
use forwarder_user::cli::{
    apply::apply,
    args::{Cli, Verb},
    capture::{capture, trace},
    check::check,
    completions::completions,
    detach::detach,
    doctor::doctor,
    drain::{drain, undrain, weight},
    explain::explain,
    flows::flows,
    man::man,
    output,
    plan::plan,
    run::run,
    status::status,
    top::top,
};

fn main() -> ExitCode {
    // clap answers --help and --version itself, and exits with 2 on a wrong command line.
    let outcome = match Cli::parse().verb {
        Verb::Run(args) => run(&args),
        Verb::Check(args) => check(&args),
        Verb::Status(args) => status(&args),
        Verb::Top(args) => top(&args),
        Verb::Explain(args) => explain(&args),
        Verb::Flows(args) => flows(&args),
        Verb::Capture(args) => capture(&args),
        Verb::Trace(args) => trace(&args),
        Verb::Doctor(args) => doctor(&args),
        Verb::Plan(args) => plan(&args),
        Verb::Apply(args) => apply(&args),
        Verb::Drain(args) => drain(&args),
        Verb::Undrain(args) => undrain(&args),
        Verb::Weight(args) => weight(&args),
        Verb::Detach(args) => detach(&args),
        Verb::Completions(args) => completions(&args),
        Verb::Man(args) => man(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(errors) => {
            output::errors(&errors);
            ExitCode::from(errors.exit_code())
        }
    }
}
