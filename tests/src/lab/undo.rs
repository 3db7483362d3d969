//! What the labs of this process made, and how it goes away again: in reverse order, exactly once.
//!
//! A lab can end in five ways, and leaves nothing behind in each: its owner drops it; the owner panics and
//! unwinds; the owner panics in a build that aborts (the panic hook here); a signal asks the process to end
//! (the handler here); the process is killed outright. In the last case the kernel ends the lab's processes
//! (they are started with a parent-death signal), and the next lab sweeps up the namespaces: their names
//! carry the id of the process they belonged to.
//!
//! Things are made *inside* the registry's lock, so a signal handler that holds it sees all of them and
//! nothing new can appear behind its back.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError, TryLockError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{command, process::Running, wait::wait_until};

/// Everything that is named after a lab starts so.
const PREFIX: &str = "fwd-";
/// Where labs keep their files. Not what `TMPDIR` says: a process with another one has to see which labs
/// are kept, or it would sweep them.
const DIRECTORIES: &str = "/tmp";
/// Where every system has its BPF file system.
const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";
/// Where the kernel's tracing has places of their own for several readers.
const TRACES: &str = "/sys/kernel/tracing/instances";
/// File in a lab's directory that says: do not sweep this.
const KEPT: &str = "kept";
/// Exit status of a process that ended because it was interrupted, as shells count it.
const INTERRUPTED: i32 = 130;

/// One lab of one process; its text is the common start of the names of what belongs to the lab.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LabId {
    pid: i32,
    /// Labs made by that process before this one.
    number: u32,
}

impl LabId {
    fn parse(text: &str) -> Option<Self> {
        let (pid, number) = text.strip_prefix(PREFIX)?.split_once('-')?;
        Some(Self {
            pid: pid.parse().ok()?,
            number: number.parse().ok()?,
        })
    }

    /// Where the lab keeps its files.
    pub(super) fn directory(&self) -> PathBuf {
        Path::new(DIRECTORIES).join(self.to_string())
    }

    /// Where an agent of the lab pins its maps and links.
    pub(super) fn pin_directory(&self) -> PathBuf {
        Path::new(BPF_FILE_SYSTEM).join(self.to_string())
    }

    /// Where the kernel records for the lab.
    pub(super) fn trace_directory(&self) -> PathBuf {
        Path::new(TRACES).join(self.to_string())
    }

    /// Name of the lab's namespace for `role`.
    pub(super) fn namespace(&self, role: &str) -> String {
        format!("{self}-{role}")
    }

    /// The lab a namespace belongs to, if it is one of a lab.
    fn of_namespace(name: &str) -> Option<Self> {
        let (id, _role) = name.match_indices('-').nth(2).map(|(at, _)| name.split_at(at))?;
        Self::parse(id)
    }

    fn is_abandoned(&self) -> bool {
        !Path::new(&format!("/proc/{}", self.pid)).exists() && !self.directory().join(KEPT).exists()
    }
}

impl std::fmt::Display for LabId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PREFIX}{}-{}", self.pid, self.number)
    }
}

/// One thing that a lab made.
#[derive(Debug)]
pub(super) enum Undo {
    Process(Arc<Running>),
    Namespace(String),
    Directory(PathBuf),
    Trace(PathBuf),
}

impl Undo {
    /// Removes it; a thing that is gone already is fine.
    fn run(self) {
        let done = match &self {
            Self::Process(process) => {
                process.stop();
                Ok(())
            }
            Self::Namespace(name) => remove_namespace(name),
            Self::Directory(path) => remove_directory(path),
            Self::Trace(path) => remove_trace(path),
        };
        if let Err(error) = done {
            eprintln!("warning: the lab could not remove {self:?}: {error:#}");
        }
    }
}

struct Registry {
    labs: BTreeMap<LabId, Vec<Undo>>,
    made: u32,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    labs: BTreeMap::new(),
    made: 0,
});
static HANDLERS: Once = Once::new();

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers a new lab and its directory, after removing what dead processes left.
pub(super) fn open() -> Result<LabId> {
    HANDLERS.call_once(install_handlers);
    sweep()?;
    let mut registry = registry();
    let id = LabId {
        pid: Pid::this().as_raw(),
        number: registry.made,
    };
    registry.made += 1;
    let directory = id.directory();
    fs::create_dir(&directory)
        .with_context(|| format!("cannot make the lab's directory {}", directory.display()))?;
    // Pins outlive an agent; what is in use of them ends with the namespaces.
    registry.labs.insert(
        id.clone(),
        vec![Undo::Directory(directory), Undo::Directory(id.pin_directory())],
    );
    Ok(id)
}

/// Makes something and notes how to remove it, as one step.
pub(super) fn make<T>(id: &LabId, make: impl FnOnce() -> Result<(T, Undo)>) -> Result<T> {
    let mut registry = registry();
    let steps = registry
        .labs
        .get_mut(id)
        .with_context(|| format!("lab {id} is closed"))?;
    let (value, undo) = make()?;
    steps.push(undo);
    Ok(value)
}

/// Forgets a process that its owner stopped.
pub(super) fn forget(id: &LabId, process: &Arc<Running>) {
    if let Some(steps) = registry().labs.get_mut(id) {
        steps.retain(|step| !matches!(step, Undo::Process(one) if Arc::ptr_eq(one, process)));
    }
}

/// Removes what the lab made. Nothing happens the second time.
pub(super) fn close(id: &LabId) {
    let steps = registry().labs.remove(id);
    undo_all(steps.into_iter().flatten());
}

/// Lets the lab outlive this process; [`remove_kept`] takes it down.
pub(super) fn keep(id: &LabId) -> Result<()> {
    fs::write(id.directory().join(KEPT), "")?;
    registry().labs.remove(id);
    Ok(())
}

fn undo_all(steps: impl DoubleEndedIterator<Item = Undo>) {
    for step in steps.rev() {
        step.run();
    }
}

fn install_handlers() {
    // SIGINT, SIGTERM and SIGHUP. The handler runs in a thread of its own, so it may do all this.
    let handler = ctrlc::set_handler(|| {
        let mut registry = registry();
        eprintln!("interrupted: removing the lab");
        for (_, steps) in std::mem::take(&mut registry.labs) {
            undo_all(steps.into_iter());
        }
        process::exit(INTERRUPTED);
    });
    if let Err(error) = handler {
        eprintln!("warning: no signal handler, an interrupted lab stays until the next one starts: {error}");
    }
    if cfg!(panic = "abort") {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            previous(panic);
            // The panicking thread itself may hold the lock; then the next lab's sweep has to do it.
            let mut registry = match REGISTRY.try_lock() {
                Ok(registry) => registry,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            for (_, steps) in std::mem::take(&mut registry.labs) {
                undo_all(steps.into_iter());
            }
        }));
    }
}

/// Labs that have namespaces or a directory on this machine.
fn existing() -> Result<Vec<LabId>> {
    let mut labs: Vec<_> = namespaces()?
        .iter()
        .filter_map(|name| LabId::of_namespace(name))
        .collect();
    for entry in fs::read_dir(DIRECTORIES)? {
        labs.extend(entry?.file_name().to_str().and_then(LabId::parse));
    }
    labs.sort();
    labs.dedup();
    Ok(labs)
}

fn namespaces() -> Result<Vec<String>> {
    match fs::read_dir(super::namespace::DIRECTORY) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>(),
        // Nobody made a namespace since the machine started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Removes labs whose process no longer exists and that were not kept.
fn sweep() -> Result<()> {
    for lab in existing()?.iter().filter(|lab| lab.is_abandoned()) {
        if let Err(error) = dismantle(lab) {
            // Another lab may be sweeping it at the same time.
            eprintln!("warning: cannot remove all of {lab}, which a killed process left: {error:#}");
        }
    }
    Ok(())
}

/// Removes the labs that were kept, of all processes; returns how many there were.
pub(super) fn remove_kept() -> Result<usize> {
    let kept: Vec<_> = existing()?
        .into_iter()
        .filter(|lab| lab.directory().join(KEPT).exists())
        .collect();
    for lab in &kept {
        dismantle(lab)?;
    }
    Ok(kept.len())
}

/// Removes a lab of which only the names are known. Whatever runs in its namespaces belongs to it.
fn dismantle(lab: &LabId) -> Result<()> {
    let own: Vec<_> = namespaces()?
        .into_iter()
        .filter(|name| LabId::of_namespace(name).as_ref() == Some(lab))
        .collect();
    let pids = || -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for name in &own {
            let listed = command::run("ip", &["netns", "pids", name])?;
            pids.extend(
                listed
                    .split_whitespace()
                    .filter_map(|pid| pid.parse().ok())
                    .map(Pid::from_raw),
            );
        }
        Ok(pids)
    };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        for pid in pids()? {
            // It may have ended meanwhile.
            let _ = kill(pid, signal);
        }
        let ended = wait_until("the lab's processes to end", Duration::from_secs(5), || {
            let left = pids()?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        });
        if ended.is_ok() {
            break;
        }
    }
    for name in &own {
        remove_namespace(name)?;
    }
    remove_trace(&lab.trace_directory())?;
    remove_directory(&lab.pin_directory())?;
    remove_directory(&lab.directory())
}

fn remove_namespace(name: &str) -> Result<()> {
    if Path::new(super::namespace::DIRECTORY).join(name).exists() {
        command::run("ip", &["netns", "delete", name])?;
    }
    Ok(())
}

/// Ends a record of the kernel's; what is below goes with it.
fn remove_trace(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a directory and what is below it, be it on disks of the lab's own.
fn remove_directory(path: &Path) -> Result<()> {
    for disk in disks_below(path)? {
        umount2(&disk, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", disk.display()))?;
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What is mounted below a directory, the last one first.
fn disks_below(path: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let below = places.map(PathBuf::from).filter(|place| place.starts_with(path));
    Ok(below.collect::<Vec<_>>().into_iter().rev().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_name_leads_back_to_its_lab() {
        let id = LabId { pid: 4711, number: 3 };
        assert_eq!(id.namespace("transit-hangzhou"), "fwd-4711-3-transit-hangzhou");
        assert_eq!(LabId::of_namespace("fwd-4711-3-transit-hangzhou"), Some(id));
        assert_eq!(LabId::of_namespace("fwd-client"), None);
        assert_eq!(LabId::of_namespace("cni-4711-3-x"), None);
    }

    #[test]
    fn a_lab_of_a_living_process_is_not_abandoned() {
        assert!(
            !LabId {
                pid: Pid::this().as_raw(),
                number: 0
            }
            .is_abandoned()
        );
    }
}
