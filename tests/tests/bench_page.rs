//! The page of benchmarks and its plots are what `docs/benchmarks.json` says, in the words that the benchmarks have now.

use std::{fs, path::Path};

use forwarder_tests::bench::page::Results;

#[test]
fn the_page_of_benchmarks_is_made_from_its_data() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let results = Results::load(&root).unwrap();
    if std::env::var_os("FORWARDER_BLESS").is_some_and(|value| value == "1") {
        results.write(&root).unwrap();
    }
    for (path, text) in results.files().unwrap() {
        let found = fs::read_to_string(root.join(&path)).unwrap_or_default();
        assert!(
            found == text,
            "{} is not what its data say; FORWARDER_BLESS=1 writes it",
            path.display()
        );
    }
}
