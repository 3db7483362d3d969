//! What the agent may do: it keeps the few capabilities that it needs to go on, and gives up the others before it starts
//! a thread or listens to anybody.
//!
//! Capabilities belong to a thread, and a new thread has those of the one that starts it (capabilities(7)). So they are
//! given up once, in the first thread, before there is a second; no call of the kernel takes them from all threads of
//! a process. What needs more than [`KEPT`] happens before that (`agent::premises`). The four are needed for as long
//! as the agent runs: links appear, tunnels change, backends are probed and diagnosed.
//!
//! A program that the agent starts (a health check by command) gets none: the thread that starts it gives up the four as
//! well ([`renounce`]), and with `no_new_privs` an `execve` cannot bring them back, not even for user 0.
//!
//! When the kernel refuses all the same, [`Gates`] says which of its gates is closed. Nothing here knows BPF.

use std::{fmt, fs, io};

pub use rustix::thread::CapabilitySet;
use rustix::{
    io::Errno,
    thread::{
        CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

use crate::error::Error;

/// What the agent needs for as long as it runs: programs and maps; attaching them, addresses, routes and tunnels;
/// pointers in programs; echo requests, announcements and resets.
pub const KEPT: CapabilitySet = CapabilitySet::BPF
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::NET_RAW);

/// Gives up everything but [`KEPT`], for good. To be called while the process has one thread.
///
/// What the process does not have, it does not get: whether that is enough shows when something is refused. Without
/// CAP_SETPCAP the bounding set stays as it is, which changes nothing, as no `execve` can draw on it.
///
/// # Errors
/// The kernel refuses, which it does for no known reason.
pub fn keep_the_needed() -> Result<(), Error> {
    let give_up = || -> io::Result<()> {
        set_no_new_privs(true)?;
        if effective().contains(CapabilitySet::SETPCAP) {
            for capability in known() {
                remove_capability_from_bounding_set(capability)?;
            }
        }
        clear_ambient_capability_set()?;
        let kept = capabilities(None)?.permitted & KEPT;
        set_capabilities(
            None,
            CapabilitySets {
                effective: kept,
                permitted: kept,
                inheritable: CapabilitySet::empty(),
            },
        )?;
        Ok(())
    };
    give_up().map_err(|error| Error::host(format!("cannot give up privileges: {error}")))
}

/// Gives up all capabilities of the calling thread, which can start a program then that has none either.
///
/// # Errors
/// The kernel refuses, which it does for no known reason.
pub fn renounce() -> io::Result<()> {
    set_no_new_privs(true)?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(())
}

/// Capabilities of the calling thread that count now; none if the kernel does not say.
fn effective() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

/// Every capability that this kernel knows.
fn known() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS)
        .map(|bit| CapabilitySet::from_bits_retain(1 << bit))
        .take_while(|capability| capability_is_in_bounding_set(*capability) != Err(Errno::INVAL))
}

/// `CAP_BPF, CAP_NET_RAW`
struct Names(CapabilitySet);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, _)) in self.0.iter_names().enumerate() {
            let gap = if index > 0 { ", " } else { "" };
            write!(f, "{gap}CAP_{name}")?;
        }
        Ok(())
    }
}

/// What stands between this process and the kernel's network and BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gates {
    effective: CapabilitySet,
    /// User 0 of this process is not user 0 of the host: its capabilities say nothing to BPF.
    is_in_user_namespace: bool,
    /// A filter looks at its system calls.
    has_seccomp: bool,
    /// `integrity` or `confidentiality`; `None`: off, or not to be seen.
    lockdown: Option<String>,
    /// What AppArmor or SELinux call it; `None`: they do not confine it, or are off.
    label: Option<String>,
}

impl Gates {
    /// Looks at those of the calling thread.
    #[must_use]
    pub fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::of(
            effective(),
            &read("/proc/thread-self/uid_map"),
            &read("/proc/thread-self/status"),
            &read("/sys/kernel/security/lockdown"),
            &read("/proc/thread-self/attr/current"),
        )
    }

    /// From the files' contents; an empty text says nothing.
    fn of(effective: CapabilitySet, uid_map: &str, status: &str, lockdown: &str, label: &str) -> Self {
        // Of the initial user namespace: "0 0 4294967295" (user_namespaces(7)).
        let whole = ["0", "0", "4294967295"];
        let seccomp = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp:"))
            .map_or("0", str::trim);
        // "none [integrity] confidentiality"
        let lockdown = lockdown
            .split_whitespace()
            .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
            .filter(|level| *level != "none");
        let label = label.trim_matches(['\0', '\n', ' ']);
        let is_free = label.is_empty() || label.starts_with("unconfined") || label.contains(":unconfined_t:");
        Self {
            effective,
            is_in_user_namespace: !uid_map.is_empty() && !uid_map.split_whitespace().eq(whole),
            has_seccomp: seccomp != "0",
            lockdown: lockdown.map(str::to_owned),
            label: (!is_free).then(|| label.to_owned()),
        }
    }

    /// All of them in a line, for what needs the capabilities `needed`:
    /// `CAP_BPF missing, CAP_NET_ADMIN present, seccomp off, …`.
    #[must_use]
    pub fn describe(&self, needed: CapabilitySet) -> String {
        let mut words: Vec<String> = needed
            .iter_names()
            .map(|(name, capability)| {
                let state = if self.effective.contains(capability) {
                    "present"
                } else {
                    "missing"
                };
                format!("CAP_{name} {state}")
            })
            .collect();
        if self.is_in_user_namespace {
            words.push("in a user namespace".to_owned());
        }
        words.push(format!("seccomp {}", if self.has_seccomp { "on" } else { "off" }));
        words.push(format!("lockdown {}", self.lockdown.as_deref().unwrap_or("off")));
        words.push(format!("LSM {}", self.label.as_deref().unwrap_or("unconfined")));
        words.join(", ")
    }

    /// What to do about the closed gate that is the likeliest; `None`: all are open.
    #[must_use]
    pub fn hint(&self, needed: CapabilitySet) -> Option<String> {
        let missing = needed - self.effective;
        if !missing.is_empty() {
            return Some(format!(
                "run as root, or grant {}: docs/operations.md, \"Privileges\"",
                Names(missing)
            ));
        }
        if self.is_in_user_namespace {
            let hint = "the capabilities are those of a user namespace, and BPF asks for the host's: no rootless container, \
                        no `--userns`";
            return Some(hint.to_owned());
        }
        if self.has_seccomp {
            let hint = "a seccomp filter may forbid the call: under systemd `SystemCallFilter=bpf` admits it, in a container \
                        `--security-opt seccomp=unconfined` shows whether it is that";
            return Some(hint.to_owned());
        }
        if let Some(level) = &self.lockdown {
            return Some(format!(
                "the kernel is locked down ({level}): `lockdown=` on its command line, or secure boot"
            ));
        }
        let label = self.label.as_ref()?;
        Some(format!(
            "AppArmor or SELinux confine this process ({label}): look for `denied` in `journalctl -k`"
        ))
    }
}

/// The error of something that the kernel refused with EPERM, for want of rights as it seems: which, and what to do.
#[must_use]
pub fn refused(what: impl fmt::Display, needed: CapabilitySet) -> Error {
    let gates = Gates::look();
    let error = Error::host(format!("{what}\n  {}", gates.describe(needed)));
    error.hint(
        gates
            .hint(needed)
            .unwrap_or_else(|| "every gate that is known seems open: see `journalctl -k`".to_owned()),
    )
}

/// The error of a system call that needs the capabilities `needed`, whatever it failed for.
#[must_use]
pub fn failed(what: &str, error: &io::Error, needed: CapabilitySet) -> Error {
    let what = format!("{what}: {error}");
    match error.kind() {
        io::ErrorKind::PermissionDenied => refused(what, needed),
        _ => Error::host(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIAL: &str = "         0          0 4294967295\n";

    fn gates(effective: CapabilitySet) -> Gates {
        Gates::of(effective, INITIAL, "Name:\tx\nSeccomp:\t0\n", "", "")
    }

    #[test]
    fn a_missing_capability_is_named() {
        let gates = gates(CapabilitySet::NET_ADMIN | CapabilitySet::CHOWN);
        assert_eq!(
            gates.describe(KEPT),
            "CAP_NET_ADMIN present, CAP_NET_RAW missing, CAP_PERFMON missing, CAP_BPF missing, seccomp off, lockdown \
             off, LSM unconfined"
        );
        assert_eq!(
            gates.hint(KEPT).unwrap(),
            "run as root, or grant CAP_NET_RAW, CAP_PERFMON, CAP_BPF: docs/operations.md, \"Privileges\""
        );
        assert_eq!(gates.hint(CapabilitySet::NET_ADMIN), None);
    }

    #[test]
    fn capabilities_of_a_user_namespace_are_told_apart() {
        let rootless = Gates::of(KEPT, "0 1000 1\n1 100000 65536\n", "Seccomp:\t2\n", "", "");
        assert!(rootless.describe(KEPT).contains("in a user namespace"));
        assert!(rootless.hint(KEPT).unwrap().contains("user namespace"));
    }

    #[test]
    fn filters_lockdown_and_confinement_are_found() {
        let of =
            |status: &str, lockdown: &str, label: &str| Gates::of(KEPT, INITIAL, status, lockdown, label);
        let hint = |gates: &Gates| gates.hint(KEPT).unwrap();
        assert!(hint(&of("Seccomp:\t2\n", "", "")).contains("seccomp"));
        let locked = of("", "none integrity [confidentiality]\n", "");
        assert!(hint(&locked).contains("locked down (confidentiality)"));
        assert_eq!(of("", "[none] integrity confidentiality\n", "").hint(KEPT), None);
        assert!(hint(&of("", "", "docker-default (enforce)\n")).contains("docker-default"));
        assert_eq!(of("", "", "unconfined\n").hint(KEPT), None);
        let selinux = "system_u:system_r:container_t:s0:c1,c2\0";
        assert!(hint(&of("", "", selinux)).contains("container_t"));
    }

    #[test]
    fn a_thread_that_renounces_has_nothing_and_others_keep_what_they_have() {
        let before = effective();
        let after = std::thread::spawn(|| {
            renounce().unwrap();
            effective()
        });
        assert_eq!(after.join().unwrap(), CapabilitySet::empty());
        assert_eq!(effective(), before);
    }

    #[test]
    fn giving_up_leaves_no_more_than_the_needed() {
        let sets = std::thread::spawn(|| {
            let before = capabilities(None).unwrap().permitted;
            keep_the_needed().unwrap();
            let sets = capabilities(None).unwrap();
            assert_eq!(sets.permitted, before & KEPT);
            if before.contains(CapabilitySet::SETPCAP) {
                assert!(known().all(|one| !capability_is_in_bounding_set(one).unwrap()));
            }
            sets
        });
        let sets = sets.join().unwrap();
        assert_eq!(sets.effective, sets.permitted);
        assert_eq!(sets.inheritable, CapabilitySet::empty());
    }
}
