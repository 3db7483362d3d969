//! What the programs have in common. Built and run by `cargo xtask test fuzz`; what they do with an input is in
//! `forwarder_tests::fuzz`.

use std::{env, path::Path, process::exit};

pub use forwarder_tests::fuzz::{Target, target};
pub use libfuzzer_sys;

/// Names the folder that the target's seeds are to be written to, instead of fuzzing.
pub const SEEDS_VARIABLE: &str = "FORWARDER_FUZZ_SEEDS";

/// Writes the seeds and ends the program, if that is asked for.
pub fn begin(target: &Target) {
    let Some(folder) = env::var_os(SEEDS_VARIABLE) else {
        return;
    };
    match target.write_seeds(Path::new(&folder)) {
        Ok(()) => exit(0),
        Err(error) => {
            eprintln!("error: cannot write to {}: {error}", Path::new(&folder).display());
            exit(1);
        }
    }
}

/// The program of the target with this name.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        static TARGET: std::sync::LazyLock<$crate::Target> =
            std::sync::LazyLock::new(|| $crate::target($name));

        $crate::libfuzzer_sys::fuzz_target!(
            init: $crate::begin(&TARGET),
            |input: &[u8]| (TARGET.run)(input)
        );
    };
}
