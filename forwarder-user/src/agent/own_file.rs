//! The agent's own configuration file is looked at, if it says so (`reload_on_change`): a change of it is as good as a
//! SIGHUP.
//!
//! Editors write a file in place, or another one that takes its name, and Kubernetes changes a symbolic link in the way
//! to it. All of that shows in what `stat(2)` says of the path, which costs nothing once a second, and works on network
//! file systems and through any links, where `inotify(7)` would need a watch on every folder on the way. A file that is
//! still changing, is gone, or has the contents that it had changes nothing. Whether its contents are any good is for the
//! reload to say.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// The agent's file.
pub(super) struct OwnFile {
    path: PathBuf,
    /// Contents when it was read last.
    known: Option<Vec<u8>>,
    /// As those contents were found.
    read_as: Option<Look>,
    /// The last look.
    last: Option<Look>,
}

/// What tells one version of a file from the next: device, inode, length, last change of contents in seconds and
/// nanoseconds.
type Look = (u64, u64, u64, i64, i64);

impl OwnFile {
    /// A file that has just been read.
    pub(super) fn new(path: PathBuf) -> Self {
        let mut file = Self {
            path,
            known: None,
            read_as: None,
            last: None,
        };
        file.is_being_read();
        file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file is read now, for whatever reason: only what changes from here on is a change.
    pub(super) fn is_being_read(&mut self) {
        // The look comes first: a file that changes between the two is read again.
        self.read_as = self.look();
        self.last = self.read_as;
        self.known = fs::read(&self.path).ok();
    }

    /// Has it other contents than when it was read last, and the same as at the last look? To be asked now and then.
    pub(super) fn has_changed(&mut self) -> bool {
        let now = self.look();
        let is_quiet = now.is_some() && now == self.last;
        self.last = now;
        if !is_quiet || now == self.read_as {
            return false;
        }
        self.read_as = now;
        let contents = fs::read(&self.path).ok();
        contents.is_some() && contents != self.known
    }

    fn look(&self) -> Option<Look> {
        let found = fs::metadata(&self.path).ok()?;
        Some((
            found.dev(),
            found.ino(),
            found.len(),
            found.mtime(),
            found.mtime_nsec(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What several looks say, a change being read as the agent does.
    fn looks(file: &mut OwnFile) -> Vec<bool> {
        let look = |_| {
            let has_changed = file.has_changed();
            if has_changed {
                file.is_being_read();
            }
            has_changed
        };
        (0..4).map(look).collect()
    }

    const SEEN: [bool; 4] = [false, true, false, false];
    const NOTHING: [bool; 4] = [false; 4];

    #[test]
    fn a_file_that_is_written_or_replaced_is_seen_once_it_is_quiet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("forwarder.toml");
        fs::write(&path, "1").unwrap();
        let mut file = OwnFile::new(path.clone());
        assert_eq!(looks(&mut file), NOTHING);
        fs::write(&path, "22").unwrap();
        assert_eq!(looks(&mut file), SEEN);
        // While it is being written nobody looks into it.
        for length in 3..9 {
            fs::write(&path, "3".repeat(length)).unwrap();
            assert!(!file.has_changed());
        }
        assert!(file.has_changed());
        file.is_being_read();
        // As editors do.
        let other = folder.path().join(".forwarder.toml.swp");
        fs::write(&other, "4").unwrap();
        assert_eq!(looks(&mut file), NOTHING);
        fs::rename(&other, &path).unwrap();
        assert_eq!(looks(&mut file), SEEN);
        // The same contents, and none at all.
        fs::write(&other, "4").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(looks(&mut file), NOTHING);
        fs::remove_file(&path).unwrap();
        assert_eq!(looks(&mut file), NOTHING);
        fs::write(&path, "5").unwrap();
        assert_eq!(looks(&mut file), SEEN);
    }

    /// As Kubernetes exchanges the contents of a ConfigMap.
    #[test]
    fn a_link_that_leads_elsewhere_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("forwarder.toml"), version).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/forwarder.toml", at("forwarder.toml")).unwrap();
        let mut file = OwnFile::new(at("forwarder.toml"));
        symlink("2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_eq!(looks(&mut file), SEEN);
    }
}
