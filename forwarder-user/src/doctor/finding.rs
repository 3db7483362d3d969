//! Findings: what is wrong, what it breaks, and what mends it; the likeliest cause of all the others first.

use std::{cmp::Reverse, fmt};

use serde::{Serialize, Serializer};

use crate::diagnose::{self, fix::Fix};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Traffic flows, but not as well as it could, or not for long.
    Warning,
    /// Some traffic gets lost.
    Broken,
}

/// What is wrong; its name is stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An interface of the configuration does not exist.
    InterfaceMissing,
    /// It is a port of a bond or bridge, which is what packets come in by.
    InterfaceEnslaved,
    /// It has no Ethernet header.
    NotEthernet,
    /// `mode = "native"` is more than its driver can.
    NativeImpossible,
    /// Large receive offload merges packets that then cannot be forwarded.
    LroOn,
    /// The same in hardware, which drivers undo or which undoes native mode.
    GroHwOn,
    /// VLAN tags are taken out of frames before native XDP sees them.
    VlanTagsHidden,
    /// The host does not forward.
    ForwardingOff,
    /// An address or a route of this host lies inside a network that is elsewhere.
    OverlappingNetwork,
    /// A rule sends packets to a routing table that has no route for them.
    TableWithoutRoute,
    /// The network's route leads elsewhere than into its tunnel.
    WrongRoute,
    /// Packets that are forwarded go another way than those that this host sends.
    ForwardedElsewhere,
    /// Source validation drops rewritten requests.
    RpFilter,
    /// Replies come in where the data path is not attached.
    EgressNotAttached,
    /// Clients' packets come in where the data path is not attached.
    VipNotAttached,
    /// No network of this host holds the VIP.
    VipUnrouted,
    /// Another host answers ARP for the VIP.
    VipTaken,
    /// The path carries less than its first interface.
    MtuTooSmall,
    /// The server listens, but on another port.
    WrongPort,
    KernelTooOld,
    JitOff,
    /// Fewer queues than cores.
    FewQueues,
    /// What a diagnosis of a silent backend says.
    Path(diagnose::Cause),
}

impl Cause {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InterfaceMissing => "interface-missing",
            Self::InterfaceEnslaved => "interface-enslaved",
            Self::NotEthernet => "not-ethernet",
            Self::NativeImpossible => "native-impossible",
            Self::LroOn => "lro-on",
            Self::GroHwOn => "gro-hw-on",
            Self::VlanTagsHidden => "vlan-tags-hidden",
            Self::ForwardingOff => "forwarding-off",
            Self::OverlappingNetwork => "overlapping-network",
            Self::TableWithoutRoute => "table-without-route",
            Self::WrongRoute => "wrong-route",
            Self::ForwardedElsewhere => "forwarded-elsewhere",
            Self::RpFilter => "rp-filter",
            Self::EgressNotAttached => "egress-not-attached",
            Self::VipNotAttached => "vip-not-attached",
            Self::VipUnrouted => "vip-unrouted",
            Self::VipTaken => "vip-taken",
            Self::MtuTooSmall => "mtu-too-small",
            Self::WrongPort => "wrong-port",
            Self::KernelTooOld => "kernel-too-old",
            Self::JitOff => "jit-off",
            Self::FewQueues => "few-queues",
            Self::Path(cause) => cause.name(),
        }
    }

    /// How far down the path it sits: what has a lower depth can be why something deeper fails, never the other
    /// way round.
    fn depth(self) -> u8 {
        use diagnose::Cause as Path;
        match self {
            Self::KernelTooOld | Self::InterfaceMissing | Self::NotEthernet => 0,
            Self::Path(Path::TunnelDown | Path::InterfaceDown) | Self::InterfaceEnslaved => 1,
            Self::NativeImpossible | Self::LroOn | Self::GroHwOn | Self::VlanTagsHidden => 2,
            Self::ForwardingOff => 3,
            Self::OverlappingNetwork | Self::TableWithoutRoute => 4,
            Self::WrongRoute
            | Self::Path(Path::NoRoute | Path::Blackholed | Path::ProbeSourceNotLocal | Path::GatewayFault) => {
                5
            }
            Self::ForwardedElsewhere | Self::RpFilter | Self::EgressNotAttached => 6,
            Self::VipNotAttached | Self::VipUnrouted | Self::VipTaken => 7,
            Self::Path(Path::NoNeighbour | Path::NextHopSilent) => 8,
            Self::Path(Path::NoReturnRoute | Path::NoRouteBeyond) => 9,
            Self::MtuTooSmall => 10,
            Self::Path(
                Path::NoReturnRouteOrFiltered | Path::Filtered | Path::Rejected | Path::PortFiltered,
            ) => 11,
            Self::Path(Path::ServerDown | Path::ServerDownOrFiltered) => 12,
            Self::WrongPort
            | Self::Path(
                Path::Refused
                | Path::Reset
                | Path::BadStatus
                | Path::BadAnswer
                | Path::BadTls
                | Path::NotServing
                | Path::CommandFailed
                | Path::Timeout
                | Path::Unknown,
            ) => 13,
            Self::JitOff | Self::FewQueues => 14,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub cause: Cause,
    /// The thing it is about: an interface, a network, an address, a setting.
    #[serde(rename = "where")]
    pub place: String,
    /// What is wrong, in a sentence without a full stop.
    pub what: String,
    /// Backends (`group/backend`) and listeners that suffer from it, as far as that is known.
    pub affects: Vec<String>,
    /// Commands that mend it, in this order.
    pub fixes: Vec<Fix>,
    /// What else there is to say: how to make it last, what to do where no command can be known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    pub fn new(severity: Severity, cause: Cause, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            severity,
            cause,
            place: place.into(),
            what: what.into(),
            affects: Vec::new(),
            fixes: Vec::new(),
            advice: None,
        }
    }

    pub fn broken(cause: Cause, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Severity::Broken, cause, place, what)
    }

    pub fn warning(cause: Cause, place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, cause, place, what)
    }

    #[must_use]
    pub fn affects(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.affects.extend(names);
        self
    }

    #[must_use]
    pub fn fixes(mut self, fixes: impl IntoIterator<Item = Fix>) -> Self {
        self.fixes.extend(fixes);
        self
    }

    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// Makes one finding of those about the same thing, and puts causes before what follows from them.
#[must_use]
pub fn arrange(findings: Vec<Finding>) -> Vec<Finding> {
    let mut arranged: Vec<Finding> = Vec::new();
    for finding in findings {
        let same = arranged
            .iter_mut()
            .find(|known| known.cause == finding.cause && known.place == finding.place);
        match same {
            None => arranged.push(finding),
            Some(known) => {
                // The worse one tells more.
                let is_worse = finding.severity > known.severity;
                let (mut kept, other) = if is_worse {
                    (finding, known.clone())
                } else {
                    (known.clone(), finding)
                };
                if kept.severity == other.severity || kept.fixes.is_empty() {
                    let new = other.fixes.into_iter().filter(|fix| !kept.fixes.contains(fix));
                    let new: Vec<_> = new.collect();
                    kept.fixes.extend(new);
                }
                kept.affects.extend(other.affects);
                *known = kept;
            }
        }
    }
    for finding in &mut arranged {
        finding.affects.sort();
        finding.affects.dedup();
    }
    arranged.sort_by_key(|finding| (Reverse(finding.severity), finding.cause.depth()));
    arranged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_come_before_what_follows_from_them() {
        let refused = Cause::Path(diagnose::Cause::Refused);
        let arranged = arrange(vec![
            Finding::warning(Cause::KernelTooOld, "host", ""),
            Finding::broken(refused, "192.168.1.10:80", "")
                .affects(["web/b".to_owned()])
                .fixes([Fix::here("a")]),
            Finding::broken(Cause::ForwardingOff, "host", ""),
            Finding::broken(refused, "192.168.1.10:80", "")
                .affects(["web/a".to_owned()])
                .fixes([Fix::here("a"), Fix::here("b")]),
        ]);
        let causes: Vec<_> = arranged.iter().map(|finding| finding.cause).collect();
        assert_eq!(causes, [Cause::ForwardingOff, refused, Cause::KernelTooOld]);
        assert_eq!(arranged[1].affects, ["web/a", "web/b"]);
        assert_eq!(arranged[1].fixes, [Fix::here("a"), Fix::here("b")]);
    }

    #[test]
    fn of_two_about_one_thing_the_worse_is_told() {
        let fix = Fix::here("true");
        let arranged = arrange(vec![
            Finding::warning(Cause::MtuTooSmall, "cen", "fragments").fixes([fix.clone()]),
            Finding::broken(Cause::MtuTooSmall, "cen", "lost"),
        ]);
        assert_eq!(arranged.len(), 1);
        assert_eq!(
            (arranged[0].what.as_str(), &arranged[0].fixes[..]),
            ("lost", &[fix][..])
        );
    }
}
