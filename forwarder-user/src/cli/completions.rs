//! `forwarder completions`: what a shell needs to complete the command line, made from `args`.

use clap::CommandFactory as _;

use super::{
    args::{Cli, CompletionsArgs},
    output,
};
use crate::error::Errors;

/// Prints the completions of a shell.
///
/// # Errors
/// Stdout cannot be written to.
pub fn completions(args: &CompletionsArgs) -> Result<(), Errors> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "forwarder", &mut script);
    output::text(String::from_utf8_lossy(&script).trim_end())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap_complete::Shell;

    use super::*;

    #[test]
    fn shells_learn_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "forwarder", &mut script);
            let script = String::from_utf8(script).expect("text");
            assert!(script.contains("undrain") && script.contains("config"), "{shell}");
        }
    }
}
