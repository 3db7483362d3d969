//! A data path that goes on without an agent, looked at from outside: for a command that finds nobody to ask.
//!
//! It takes no lock, or an agent that starts just then would be refused, and changes nothing.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use forwarder_common::abi::map_name;
use nix::{
    net::if_::if_indextoname,
    sys::stat::{major, minor},
};

use super::{
    attach::AttachmentKind,
    pin::{AGENT, CONTROL_SOCKET, OWNER, USUAL_MOUNT, links_in},
};

/// Folders below the mount point that pins are looked for in.
const DEPTH: usize = 2;

/// What an agent has left, or holds without answering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    pub pin_directory: PathBuf,
    /// The names of interfaces that programs are attached to, or their numbers if they are elsewhere.
    pub interfaces: Vec<(String, AttachmentKind)>,
    /// Process id of the last agent that ran.
    pub agent: Option<String>,
    /// Process id of one that holds the pins: it starts, stops, or hangs.
    pub holder: Option<String>,
    /// Since the last agent was heard of; `None`: it is not known.
    pub silent_for: Option<Duration>,
}

/// The data path whose agent had, or has, this control socket. `default_pins`: where pins are that do not say so.
pub fn of_socket(socket: &Path, default_pins: Option<&Path>) -> Option<LeftBehind> {
    let socket = std::path::absolute(socket).ok()?;
    let directory = find(Path::new(USUAL_MOUNT), &socket, DEPTH)
        .or_else(|| default_pins.map(Path::to_owned))
        .filter(|directory| is_in_use(directory))?;
    let pid = |note: &str| {
        let pid = fs::read_link(directory.join(note)).ok()?;
        Some(pid.to_string_lossy().into_owned())
    };
    let last_sign = fs::symlink_metadata(directory.join(AGENT)).and_then(|found| found.modified());
    Some(LeftBehind {
        interfaces: links_in(&directory)
            .unwrap_or_default()
            .into_iter()
            .map(|link| (interface(link.ifindex), link.kind))
            .collect(),
        agent: pid(AGENT),
        holder: pid(OWNER).filter(|_| is_locked(&directory)),
        silent_for: last_sign
            .ok()
            .and_then(|sign| SystemTime::now().duration_since(sign).ok()),
        pin_directory: directory,
    })
}

/// The folder below `folder` with the note that names the socket.
fn find(folder: &Path, socket: &Path, depth: usize) -> Option<PathBuf> {
    if fs::read_link(folder.join(CONTROL_SOCKET)).is_ok_and(|found| found == socket) {
        return Some(folder.to_owned());
    }
    let depth = depth.checked_sub(1)?;
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .find_map(|entry| find(&entry.path(), socket, depth))
}

fn is_in_use(directory: &Path) -> bool {
    directory.join(map_name::FLOWS).exists() || links_in(directory).is_ok_and(|links| !links.is_empty())
}

fn interface(ifindex: u32) -> String {
    if_indextoname(ifindex).map_or_else(
        |_| format!("interface {ifindex}"),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Does somebody have the lock on it? `proc(5)`: a line of /proc/locks ends with device, inode and range.
fn is_locked(directory: &Path) -> bool {
    let (Ok(found), Ok(locks)) = (fs::metadata(directory), fs::read_to_string("/proc/locks")) else {
        return false;
    };
    let file = format!(
        "{:02x}:{:02x}:{}",
        major(found.dev()),
        minor(found.dev()),
        found.ino()
    );
    locks
        .lines()
        .any(|line| line.contains("FLOCK") && line.split_whitespace().any(|word| word == file))
}
