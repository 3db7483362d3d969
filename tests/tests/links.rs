//! Ring 1: no link of the documentation is dead, as it is read in the repository, and every page is in the book. The
//! book's own pages are looked at by `cargo xtask book`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Folders with pages, from the root of the repository.
const FOLDERS: [&str; 3] = ["", "docs", "docs/adr"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What is read of a page.
#[derive(Debug, Default, PartialEq)]
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
}

impl Page {
    fn of(markdown: &str) -> Self {
        let mut page = Self::default();
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(markdown, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let text = heading.take().unwrap_or_default();
                    page.anchors.insert(anchor(&text));
                }
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor that a heading gets, in mdbook and on the hosts of repositories alike.
fn anchor(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter_map(|letter| match letter {
            ' ' => Some('-'),
            '-' | '_' => Some(letter),
            _ => letter.is_alphanumeric().then_some(letter),
        })
        .collect()
}

/// All pages by path from the root.
fn pages() -> Result<BTreeMap<PathBuf, Page>> {
    let mut pages = BTreeMap::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(root().join(folder))? {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let page = Page::of(&fs::read_to_string(&path)?);
                pages.insert(Path::new(folder).join(entry.file_name()), page);
            }
        }
    }
    Ok(pages)
}

#[test]
fn no_link_is_dead() {
    let pages = pages().unwrap();
    assert!(pages.len() > 30, "{:?}", pages.keys());
    let by_file: BTreeMap<PathBuf, &Page> = pages
        .iter()
        .map(|(path, page)| (root().join(path).canonicalize().unwrap(), page))
        .collect();
    let mut dead = Vec::new();
    let mut followed = 0;
    for (path, page) in &pages {
        for link in page.links.iter().filter(|link| !link.contains("://")) {
            let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
            let file = if target.is_empty() {
                root().join(path)
            } else {
                root().join(path.parent().unwrap()).join(target)
            };
            // A link to a file outside the repository works on this machine only.
            let file = file.canonicalize().ok();
            let file = file.filter(|file| file.starts_with(root().canonicalize().unwrap()));
            let is_alive = file.is_some_and(|file| {
                anchor.is_empty()
                    || by_file
                        .get(&file)
                        .is_some_and(|page| page.anchors.contains(anchor))
            });
            if !is_alive {
                dead.push(format!("{}: {link}", path.display()));
            }
            followed += 1;
        }
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
    assert!(followed > 100, "{followed} links");
}

#[test]
fn every_page_is_in_the_book() {
    let docs = root().join("docs");
    let summary = Page::of(&fs::read_to_string(docs.join("SUMMARY.md")).unwrap());
    let listed: BTreeSet<PathBuf> = summary
        .links
        .iter()
        .map(|link| Path::new("docs").join(link))
        .collect();
    let missing: Vec<_> = pages()
        .unwrap()
        .into_keys()
        .filter(|path| path.starts_with("docs") && !path.ends_with("SUMMARY.md") && !listed.contains(path))
        .collect();
    assert!(missing.is_empty(), "not in docs/SUMMARY.md: {missing:?}");
}

#[test]
fn a_page_s_links_and_anchors_are_read() {
    let page = Page::of("# A `b.c` d-e\n\nSee [x](y.md#z), ![i](p.png).\n\n```text\n[no](link)\n```\n");
    assert_eq!(page.links, ["y.md#z", "p.png"]);
    assert_eq!(page.anchors, BTreeSet::from(["a-bc-d-e".to_owned()]));
}
