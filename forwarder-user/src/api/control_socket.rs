//! The control socket: a Unix socket that is its owner's from its first moment on, and of one group if so configured.
//!
//! It replaces the socket of an agent that is no more, and leaves alone what is somebody else's.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, ErrorKind},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::unistd::Group;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::Error;

/// Connections that wait to be accepted on the control socket.
const BACKLOG: i32 = 128;
/// Only the agent's user, usually root, may ask.
const OWNER_MODE: u32 = 0o600;
/// Its group too, where one is configured.
const GROUP_MODE: u32 = 0o660;
/// The directory of the control socket, if it has to be made: everybody may look for the socket.
const DIRECTORY_MODE: u32 = 0o755;

/// The control socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// The file of a bound Unix socket.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that the file of another agent stays.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // If it can't be removed, the next agent finds it stale and removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Takes the control socket: makes its directory if need be, and replaces the socket of an agent that is no more.
/// Members of `group` may ask as well as the agent's user.
///
/// # Errors
/// Another agent answers there, something else than a socket is there, there is no such group, or rights are missing.
pub fn bind_control(path: &Path, group: Option<&str>) -> Result<ControlSocket, Error> {
    let group = group.map(find_group).transpose()?;
    let failed = |action: &str, error: &io::Error| {
        let what = format!("cannot {action} the control socket {}: {error}", path.display());
        let error_hint = match error.kind() {
            ErrorKind::PermissionDenied => {
                "run as root, or choose a place that you may write as agent.control_socket"
            }
            _ => "check the path, or choose another as agent.control_socket",
        };
        Error::host(what).hint(error_hint)
    };
    if let Some(directory) = path.parent() {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(directory);
        made.map_err(|error| failed("make the directory of", &error))?;
    }
    let listener = match listen(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            make_room(path, &failed)?;
            listen(path)
        }
        outcome => outcome,
    };
    let listener = listener.map_err(|error| failed("make", &error))?;
    let identity = identity(path).map_err(|error| failed("find", &error))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity,
    };
    if let Some(group) = group {
        // In this order nobody but the owner and this group may ever connect.
        chown(path, None, Some(group.gid.as_raw()))
            .and_then(|()| fs::set_permissions(path, Permissions::from_mode(GROUP_MODE)))
            .map_err(|error| {
                let what = format!(
                    "cannot give the control socket to the group {}: {error}",
                    group.name
                );
                Error::host(what).hint(
                    "this needs CAP_CHOWN, or that the agent's user is in the group; under systemd: \
                     `SupplementaryGroups=`",
                )
            })?;
    }
    Ok(ControlSocket { listener, file })
}

fn find_group(name: &str) -> Result<Group, Error> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group),
        Ok(None) => Err(
            Error::host(format!("agent.control_group: there is no group \"{name}\""))
                .hint(format!("`groupadd --system {name}` makes it")),
        ),
        Err(error) => Err(Error::host(format!(
            "cannot look the group \"{name}\" up: {error}"
        ))),
    }
}

/// Removes what a dead agent left at `path`.
fn make_room(path: &Path, failed: &dyn Fn(&str, &io::Error) -> Error) -> Result<(), Error> {
    let metadata = fs::symlink_metadata(path).map_err(|error| failed("replace", &error))?;
    if !metadata.file_type().is_socket() {
        let what = format!("{} is no socket, so it stays", path.display());
        return Err(Error::host(what).hint("move it away, or choose another path as agent.control_socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(
            Error::host(format!("another agent holds the control socket {}", path.display())).hint(format!(
                "stop it first; `ss -lxp | grep {}` shows its process. A second agent needs an agent.control_socket and \
                 an agent.metrics_address of its own",
                path.display()
            )),
        ),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("replace", &error))
        }
        Err(error) => Err(failed("replace", &error)),
    }
}

/// A socket whose file has [`OWNER_MODE`] from its first moment on.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux gives the file the mode of the unbound socket, less the umask; changing it after the bind would
    // leave a moment in which others may connect.
    let as_file = File::from(OwnedFd::from(socket));
    as_file.set_permissions(Permissions::from_mode(OWNER_MODE))?;
    let socket = Socket::from(OwnedFd::from(as_file));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(OwnedFd::from(socket).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_second_agent_is_refused_and_the_first_keeps_its_socket() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let first = bind_control(&path, None).unwrap();
        let error = bind_control(&path, None).unwrap_err();
        assert_eq!(
            error.what,
            format!("another agent holds the control socket {}", path.display())
        );
        assert_eq!(error.exit_code, crate::error::EXIT_HOST);
        assert!(error.hint.is_some());
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_of_a_dead_agent_is_replaced() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(bind_control(&path, None).unwrap());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        fs::write(&path, "mine").unwrap();
        let error = bind_control(&path, None).unwrap_err();
        assert!(error.what.ends_with("is no socket, so it stays"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn the_socket_of_a_successor_stays() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let first = bind_control(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind_control(&path, None).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }

    #[test]
    fn only_the_owner_may_ask_unless_a_group_is_named() {
        let directory = directory();
        let path = directory.path().join("run/forwarder/control.sock");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let socket = bind_control(&path, None).unwrap();
        assert_eq!(mode(&path), OWNER_MODE);
        drop(socket);
        assert!(!path.exists());

        // One's own group may always be given.
        let own = Group::from_gid(nix::unistd::getegid()).unwrap().unwrap();
        let _socket = bind_control(&path, Some(&own.name)).unwrap();
        assert_eq!(mode(&path), GROUP_MODE);
        assert_eq!(fs::metadata(&path).unwrap().gid(), own.gid.as_raw());
    }

    #[test]
    fn a_group_that_is_not_there_is_named() {
        let directory = directory();
        let path = directory.path().join("control.sock");
        let error = bind_control(&path, Some("no-such-group")).unwrap_err();
        assert_eq!(
            error.what,
            "agent.control_group: there is no group \"no-such-group\""
        );
        assert!(!path.exists());
    }
}
