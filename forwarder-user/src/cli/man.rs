//! `forwarder man`: the manual pages, made from `args`: one of the program, one for each verb. Section 8, for those who
//! administer a host.

use clap::CommandFactory as _;
use clap_mangen::Man;

use super::{
    args::{Cli, ManArgs},
    output,
};
use crate::error::{Error, Errors};

const SECTION: &str = "8";

/// Writes the pages and names them.
///
/// # Errors
/// The directory does not exist or cannot be written to.
pub fn man(args: &ManArgs) -> Result<(), Errors> {
    let mut program = Cli::command();
    program.build();
    let verbs = program
        .get_subcommands()
        .filter(|verb| verb.get_name() != "help" && !verb.is_hide_set());
    let verbs = verbs.map(|verb| {
        let name = format!("forwarder-{}", verb.get_name());
        verb.clone().name(name)
    });
    let pages: Vec<_> = std::iter::once(program.clone()).chain(verbs).collect();
    for page in pages {
        let path = args.directory.join(format!("{}.{SECTION}", page.get_name()));
        let mut text = Vec::new();
        let written = Man::new(page)
            .section(SECTION)
            .render(&mut text)
            .and_then(|()| std::fs::write(&path, &text));
        written.map_err(|error| {
            Error::failed(format!("cannot write {}: {error}", path.display()))
                .hint("name a directory that exists and that you may write")
        })?;
        output::text(&path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page() {
        let directory = tempfile::tempdir().expect("a directory");
        let args = ManArgs {
            directory: directory.path().to_owned(),
        };
        man(&args).expect("pages");
        let page = |name: &str| std::fs::read_to_string(directory.path().join(name));
        assert!(page("forwarder.8").is_ok_and(|text| text.contains(".TH forwarder 8")));
        let drain = page("forwarder-drain.8").expect("a page of a verb");
        assert!(
            drain.contains(".TH forwarder-drain 8") && drain.contains("forwarder drain"),
            "{drain}"
        );
        assert!(page("forwarder-man.8").is_err());
    }
}
