//! `cargo xtask book`: the documentation as a book, in `target/book`, without a dead link.
//!
//! `docs/` is its source and is read on its own as well, so pages link to each other and to files beside `docs/` as in
//! the repository. Those files are put beside the book's pages; every link of the finished pages is then followed, to
//! the anchor. What leads to other hosts is not: that would make the result depend on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{toolchain::find_program, workspace};

/// Folders of the repository that pages link to.
const BESIDE: [&str; 2] = ["deploy", "examples"];
/// Where in the book's folder its pages are: `book.toml` says so, too.
const PAGES: &str = "docs";

/// mdbook: the one that setup has built, else one of this machine.
pub(crate) fn mdbook() -> Option<PathBuf> {
    let own = workspace::tools().join("bin/mdbook");
    if own.is_file() {
        Some(own)
    } else {
        find_program("mdbook")
    }
}

/// # Errors
/// mdbook is missing or fails, or a link is dead; all of them are named.
pub(crate) fn run() -> Result<()> {
    let program = mdbook().context("mdbook is missing\n  hint: `cargo xtask setup` installs it")?;
    let root = workspace::root();
    let book = root.join("target/book");
    if book.exists() {
        fs::remove_dir_all(&book).with_context(|| book.display().to_string())?;
    }
    workspace::run(Command::new(program).arg("build").current_dir(root))?;
    for folder in BESIDE {
        copy_files(&root.join(folder), &book.join(folder))?;
    }
    let pages = read_pages(&book)?;
    let dead = dead_links(&book, &pages);
    if !dead.is_empty() {
        bail!("dead links in the book:\n  {}", dead.join("\n  "));
    }
    let start = book.join(PAGES).join("index.html");
    eprintln!("{} pages, no dead link: {}", pages.len(), start.display());
    Ok(())
}

/// Copies the files of a folder, not what is in folders below it.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            fs::copy(&path, to.join(name)).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// A page's links and the anchors in it.
#[derive(Debug, Default)]
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
}

impl Page {
    /// What mdbook writes has its attributes in double quotes.
    fn of(html: &str) -> Self {
        let values = |name: &str| {
            let opening = format!(" {name}=\"");
            let values: Vec<String> = html
                .split(&opening)
                .skip(1)
                .filter_map(|rest| rest.split('"').next())
                .map(|value| value.replace("&amp;", "&"))
                .collect();
            values
        };
        Self {
            links: [values("href"), values("src")].concat(),
            anchors: values("id").into_iter().collect(),
        }
    }
}

/// All pages below the book's folder, by path relative to it.
fn read_pages(book: &Path) -> Result<BTreeMap<PathBuf, Page>> {
    let mut pages = BTreeMap::new();
    let mut folders = vec![book.join(PAGES)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let is_page = path.extension().is_some_and(|extension| extension == "html");
            // It may be shown at any address, so its links are relative to none.
            let is_error_page = path.file_name().is_some_and(|name| name == "404.html");
            if path.is_dir() {
                folders.push(path);
            } else if is_page && !is_error_page {
                let html = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                pages.insert(path.strip_prefix(book)?.to_owned(), Page::of(&html));
            }
        }
    }
    Ok(pages)
}

/// Links that lead nowhere, with the page that has them.
fn dead_links(book: &Path, pages: &BTreeMap<PathBuf, Page>) -> Vec<String> {
    let mut dead = Vec::new();
    for (path, page) in pages {
        for link in &page.links {
            let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = target.split('?').next().unwrap_or_default();
            if is_elsewhere(target) {
                continue;
            }
            let found = if target.is_empty() {
                path.clone()
            } else {
                resolve(path.parent().unwrap_or(Path::new("")), target)
            };
            let is_there = book.join(&found).is_file();
            let has_anchor =
                anchor.is_empty() || pages.get(&found).is_none_or(|page| page.anchors.contains(anchor));
            if !is_there || !has_anchor {
                dead.push(format!("{}: {link}", path.display()));
            }
        }
    }
    dead
}

/// Does it name a scheme (RFC 3986 §3.1), so that it leads out of the book?
fn is_elsewhere(target: &str) -> bool {
    target
        .split_once(':')
        .is_some_and(|(scheme, _)| scheme.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// `target` as seen from `folder`, without `.` and `..`.
fn resolve(folder: &Path, target: &str) -> PathBuf {
    let mut found = PathBuf::new();
    for part in folder.join(target).components() {
        match part {
            Component::ParentDir => {
                found.pop();
            }
            Component::Normal(name) => found.push(name),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_anchors_of_a_page_are_found() {
        let page =
            Page::of(r##"<h2 id="a-b"><a class="x" href="b.html?x=1&amp;y#c">c</a></h2><img src="d.png">"##);
        assert_eq!(page.links, ["b.html?x=1&y#c", "d.png"]);
        assert!(page.anchors.contains("a-b"));
    }

    #[test]
    fn a_path_is_followed_from_its_page() {
        assert_eq!(
            resolve(Path::new("docs/adr"), "../a.html"),
            Path::new("docs/a.html")
        );
        assert_eq!(resolve(Path::new("docs"), "../deploy/x"), Path::new("deploy/x"));
        assert_eq!(resolve(Path::new("docs"), "./b.html"), Path::new("docs/b.html"));
    }

    #[test]
    fn only_links_with_a_scheme_lead_elsewhere() {
        assert!(is_elsewhere("https://docs.rs/") && is_elsewhere("mailto:a@b.example"));
        assert!(!is_elsewhere("a.html") && !is_elsewhere(""));
    }

    #[test]
    fn what_leads_nowhere_is_named_with_its_page() {
        let folder = std::env::temp_dir().join(format!("book-{}", std::process::id()));
        fs::create_dir_all(folder.join("docs")).unwrap();
        for name in ["a.html", "b.html"] {
            fs::write(folder.join("docs").join(name), "").unwrap();
        }
        let page = Page::of(
            r##"<a href="b.html#there"> <a href="b.html#gone"> <a href="c.html"> <a href="https://a.example/"> <a href="#self">"##,
        );
        let other = Page::of(r#"<h1 id="there"></h1>"#);
        let pages = [("docs/a.html", page), ("docs/b.html", other)];
        let pages = pages.map(|(path, page)| (PathBuf::from(path), page)).into();
        let dead = dead_links(&folder, &pages);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            dead,
            [
                "docs/a.html: b.html#gone",
                "docs/a.html: c.html",
                "docs/a.html: #self"
            ]
        );
    }
}
