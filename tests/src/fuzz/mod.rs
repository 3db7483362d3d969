//! What the fuzz targets do with bytes: each is a function that panics if something is wrong, so that an input that once
//! broke something is tried again by an ordinary test (`tests/fuzz_regressions.rs`), without a fuzzer.
//!
//! `tests/fuzz` makes programs of them, with libFuzzer, which looks for bytes that reach code not seen yet.
//! `cargo xtask test fuzz` builds and runs those.

use std::{fs, io, path::Path};

mod api;
mod capture;
mod config;
mod packets;

/// One kind of input.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As its program and its folders are called.
    pub name: &'static str,
    /// Tries an input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 6] = [
    packets::WALK,
    packets::ICMP,
    packets::FRAGMENTS,
    config::CONFIG,
    api::API,
    capture::CAPTURE,
];

/// The target with this name.
///
/// # Panics
/// When there is none.
pub fn target(name: &str) -> Target {
    let found = TARGETS.into_iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("no target {name}"))
}

impl Target {
    /// Writes the seeds into a folder, which is made if it isn't there.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn write_seeds(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        for (index, seed) in (self.seeds)().into_iter().enumerate() {
            fs::write(folder.join(format!("seed-{index:05}")), seed)?;
        }
        Ok(())
    }
}
