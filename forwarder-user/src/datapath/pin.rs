//! Pins: what makes the data path outlive the agent.
//!
//! One directory of a BPF file system holds the maps, the links that attach the programs, and, as symbolic links,
//! the few words that one agent leaves to the next: that file system knows no ordinary files. Whoever holds the
//! lock on the directory is the agent of these pins.
//!
//! ```text
//! FLOWS, LISTENERS, ...    maps, by their names in the object
//! NAMES                    which number is whose (`state::ids`)
//! PAST                     what backends have counted that left their group (`maps`)
//! FREE_FLOWS_7             the list of free flows that the agent number 7 made (`free_list`)
//! link-tcx-12              the link on the interface with number 12
//! owner -> 4711            process that holds the lock, or held it last
//! agent -> 4711            process of the last agent that ran on them; changed at the last sign of its life
//! control_socket -> /run/forwarder/control.sock   where that one is, or was, to be asked
//! probe_address -> 10.0.0.1   an address that an agent gave to `lo`
//! probe_address_v6 -> fd00::1   the same of IPv6
//! ```

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io::{self, ErrorKind},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process,
};

use forwarder_common::abi::map_name;
use nix::{
    fcntl::AT_FDCWD,
    mount::{MsFlags, mount},
    sys::{
        stat::{UtimensatFlags, utimensat},
        statfs::{BPF_FS_MAGIC, statfs},
        time::TimeSpec,
    },
};

use super::attach::AttachmentKind;
use crate::{config::PerFamily, error::Error};

/// Where every system has its BPF file system.
pub(super) const USUAL_MOUNT: &str = "/sys/fs/bpf";
/// Nobody else has business with the maps.
const MODE: u32 = 0o700;
pub(super) const OWNER: &str = "owner";
pub(super) const AGENT: &str = "agent";
pub(super) const CONTROL_SOCKET: &str = "control_socket";
const PROBE_ADDRESS: &str = "probe_address";
const PROBE_ADDRESS_V6: &str = "probe_address_v6";

/// A locked pin directory; the lock ends with this value, or with the process.
#[derive(Debug)]
pub struct PinDirectory {
    path: PathBuf,
    _lock: File,
}

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedLink {
    pub path: PathBuf,
    pub kind: AttachmentKind,
    pub ifindex: u32,
}

impl PinDirectory {
    /// Makes the directory if need be, mounting the BPF file system at its usual place, and locks it.
    ///
    /// # Errors
    /// Another agent holds it; it is on another file system; rights are missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if !is_on_bpf_file_system(path) && path.starts_with(USUAL_MOUNT) {
            mount(
                Some("bpf"),
                USUAL_MOUNT,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                Some("mode=0700"),
            )
            .map_err(|error| {
                Error::host(format!(
                    "cannot mount the BPF file system on {USUAL_MOUNT}: {error}"
                ))
                .hint(format!(
                    "as root of the host: mount -t bpf bpf {USUAL_MOUNT}; into a container, `--volume \
                     {USUAL_MOUNT}:{USUAL_MOUNT}` brings the host's"
                ))
            })?;
        }
        if !is_on_bpf_file_system(path) {
            return Err(Error::host(format!(
                "agent.pin_directory {} is on no BPF file system, so nothing can be pinned there",
                path.display()
            ))
            .hint(format!(
                "take a directory below {USUAL_MOUNT}, or mount one: mount -t bpf bpf DIRECTORY"
            )));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(MODE)
            .create(path)
            .map_err(|error| failed("make", path, &error))?;
        Self::lock(path)
    }

    /// Locks the directory if it exists.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_existing(path: &Path) -> Result<Option<Self>, Error> {
        if path.is_dir() && is_on_bpf_file_system(path) {
            Self::lock(path).map(Some)
        } else {
            Ok(None)
        }
    }

    fn lock(path: &Path) -> Result<Self, Error> {
        let directory = File::open(path).map_err(|error| failed("open", path, &error))?;
        match directory.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = match fs::read_link(path.join(OWNER)) {
                    Ok(owner) => format!("the agent with process id {}", owner.display()),
                    Err(_) => "another agent".to_owned(),
                };
                return Err(
                    Error::host(format!("{holder} holds the pins in {}", path.display())).hint(
                        "stop it first; a second agent on this host needs an agent.pin_directory, an \
                         agent.control_socket and an agent.metrics_address of its own",
                    ),
                );
            }
            Err(TryLockError::Error(error)) => return Err(failed("lock", path, &error)),
        }
        // Made by somebody else, it may be open to all: who can open a map can change where traffic goes.
        let made = directory
            .metadata()
            .map_err(|error| failed("read", path, &error))?;
        if made.mode() & !MODE & 0o777 != 0 {
            let closed = directory.set_permissions(Permissions::from_mode(MODE));
            closed.map_err(|error| failed("close to others", path, &error))?;
        }
        let this = Self {
            path: path.to_owned(),
            _lock: directory,
        };
        this.write(OWNER, Some(&process::id().to_string()))?;
        Ok(this)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a map is pinned, or is to be.
    pub fn map(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Is this map pinned?
    pub fn has_map(&self, name: &str) -> bool {
        self.map(name).exists()
    }

    /// Is anything pinned that another agent has left?
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn is_in_use(&self) -> Result<bool, Error> {
        Ok(!self.links()?.is_empty() || self.has_map(map_name::FLOWS))
    }

    /// Where a link is pinned, or is to be.
    pub fn link(&self, kind: AttachmentKind, ifindex: u32) -> PathBuf {
        self.path.join(format!("link-{}-{ifindex}", kind.name()))
    }

    /// All pinned links.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn links(&self) -> Result<Vec<PinnedLink>, Error> {
        links_in(&self.path).map_err(|error| failed("read", &self.path, &error))
    }

    /// The lists of free flows, oldest first, and where the next one is to be pinned.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn free_lists(&self) -> Result<(Vec<PathBuf>, PathBuf), Error> {
        let numbered = |number: u64| self.path.join(format!("{}_{number}", map_name::FREE_FLOWS));
        let prefix = format!("{}_", map_name::FREE_FLOWS);
        let mut numbers: Vec<u64> = self
            .names()?
            .iter()
            .filter_map(|name| name.strip_prefix(&prefix)?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let next = numbers.last().map_or(0, |last| last + 1);
        Ok((numbers.into_iter().map(numbered).collect(), numbered(next)))
    }

    /// Notes that this process is the agent that runs on these pins, and where it is asked: for those who do not find it
    /// there any more. One that holds the lock and then cannot start is not.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn note_agent(&self, socket: &Path) -> Result<(), Error> {
        self.write(CONTROL_SOCKET, socket.to_str())?;
        self.write(AGENT, Some(&process::id().to_string()))
    }

    /// Notes that the agent is alive, so that it is known since when it is not. Nothing else depends on it.
    pub fn note_sign_of_life(&self) {
        let (note, now) = (self.path.join(AGENT), TimeSpec::UTIME_NOW);
        if let Err(error) = utimensat(AT_FDCWD, &note, &now, &now, UtimensatFlags::NoFollowSymlink) {
            tracing::debug!(%error, "no sign of life at {}", note.display());
        }
    }

    /// Notes that an agent gave this address to `lo`, or that it no longer is there.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn note_probe_addresses(&self, addresses: PerFamily) -> Result<(), Error> {
        let text = |address: Option<IpAddr>| address.map(|address| address.to_string());
        self.write(PROBE_ADDRESS, text(addresses.v4.map(IpAddr::V4)).as_deref())?;
        self.write(PROBE_ADDRESS_V6, text(addresses.v6.map(IpAddr::V6)).as_deref())
    }

    /// The addresses that an agent gave to `lo` and has not taken away.
    pub fn probe_addresses(&self) -> PerFamily {
        let read = |name: &str| {
            fs::read_link(self.path.join(name))
                .ok()?
                .to_str()?
                .parse::<IpAddr>()
                .ok()
        };
        [PROBE_ADDRESS, PROBE_ADDRESS_V6]
            .into_iter()
            .filter_map(read)
            .collect()
    }

    /// Removes one pin; one that is gone is fine.
    ///
    /// # Errors
    /// Rights are missing.
    pub fn unpin(&self, path: &Path) -> Result<(), Error> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove the pin", path, &error)),
            _ => Ok(()),
        }
    }

    /// Removes all pins and the directory: links first, so that no program runs on maps half gone.
    ///
    /// # Errors
    /// Rights are missing.
    pub fn remove(&self) -> Result<(), Error> {
        for link in self.links()? {
            self.unpin(&link.path)?;
        }
        for name in self.names()? {
            self.unpin(&self.path.join(name))?;
        }
        fs::remove_dir(&self.path).map_err(|error| failed("remove", &self.path, &error))
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        names_in(&self.path).map_err(|error| failed("read", &self.path, &error))
    }

    fn write(&self, name: &str, text: Option<&str>) -> Result<(), Error> {
        let path = self.path.join(name);
        self.unpin(&path)?;
        match text {
            Some(text) => symlink(text, &path).map_err(|error| failed("write", &path, &error)),
            None => Ok(()),
        }
    }
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The links that are pinned in a directory.
pub(super) fn links_in(directory: &Path) -> io::Result<Vec<PinnedLink>> {
    let mut links = Vec::new();
    for name in names_in(directory)? {
        let found = name
            .strip_prefix("link-")
            .and_then(|rest| rest.rsplit_once('-'))
            .and_then(|(kind, ifindex)| Some((AttachmentKind::named(kind)?, ifindex.parse().ok()?)));
        if let Some((kind, ifindex)) = found {
            links.push(PinnedLink {
                path: directory.join(&name),
                kind,
                ifindex,
            });
        }
    }
    Ok(links)
}

/// Looks at the nearest ancestor that exists.
fn is_on_bpf_file_system(path: &Path) -> bool {
    path.ancestors()
        .find(|path| path.exists())
        .and_then(|path| statfs(path).ok())
        .is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    let error_hint = match error.kind() {
        ErrorKind::ReadOnlyFilesystem => {
            "the BPF file system is read-only here: under systemd `ReadWritePaths=/sys/fs/bpf`, no `ProtectKernelTunables=`, in a container \
             `--volume /sys/fs/bpf:/sys/fs/bpf`"
        }
        _ => "run as root, or choose a directory that you may write as agent.pin_directory",
    };
    Error::host(format!("cannot {action} {}: {error}", path.display())).hint(error_hint)
}
