//! Which fault explains that a request failed.
//!
//! A fault is in force for a time, has a place, and can cause some kinds of failures and no others: a killed server resets
//! its own connections, not those of its neighbour; a link that is down resets nobody. A failure that no fault explains is
//! the forwarder's. New connections are explained by a fault of servers only until the forwarder had to know of it: from
//! then on they have to go elsewhere, as long as there is a server elsewhere.
//!
//! Times are moments of the monotonic clock in nanoseconds ([`crate::witness::now_ns`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use crate::witness::{Failure, Kind};

/// A span of time; without an end while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from_ns: u64,
    pub until_ns: Option<u64>,
}

impl Span {
    /// Whether some of it lies within `from_ns` and `until_ns`.
    const fn meets(self, from_ns: u64, until_ns: u64) -> bool {
        self.from_ns <= until_ns
            && match self.until_ns {
                Some(end_ns) => from_ns <= end_ns,
                None => true,
            }
    }
}

/// Whom a fault hits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// These servers, or the way to them.
    Servers(Vec<u16>),
    /// One server at one listener: the operator has taken it out.
    Backend { listener: u16, server: u16 },
    /// This client's link.
    Client(u16),
    /// Whoever opens a flow.
    Gateway,
}

impl Place {
    /// Whether both hit one and the same server.
    fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Servers(some), Self::Servers(others)) => some.iter().any(|one| others.contains(one)),
            _ => false,
        }
    }
}

/// A fault, and what it can cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub name: String,
    pub span: Span,
    pub place: Place,
    /// What it can do to connections that are open, and to those that are being opened.
    pub old: Vec<Kind>,
    pub new: Vec<Kind>,
    /// No connection that was open to one of its servers outlives it: the kernel of a process that was killed sends what the
    /// process had written, and the end after it. So whenever that end arrives, this is why.
    pub is_fatal: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, from {:.3} s", self.name, seconds(self.span.from_ns))?;
        match self.span.until_ns {
            Some(until_ns) => write!(f, " to {:.3} s", seconds(until_ns)),
            None => write!(f, " on"),
        }
    }
}

/// A moment as messages show it.
pub fn seconds(moment_ns: u64) -> f64 {
    Duration::from_nanos(moment_ns).as_secs_f64()
}

/// A listener as far as blame goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub servers: Vec<u16>,
    /// Resets of the gateway's own: `on_unhealthy = "reset"`.
    pub resets: bool,
    /// Flows that move: `on_unhealthy = "rehash"`.
    pub moves: bool,
}

/// Of TCP, before a client loses its patience: that is twice as long.
const LONGEST_PAUSE: Duration = Duration::from_secs(6);

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation<'a> {
    pub fault: &'a Fault,
    /// It had broken the connection long before, and that was told only now.
    pub is_late: bool,
}

/// Everything that happened.
#[derive(Clone, Debug)]
pub struct History {
    services: BTreeMap<u16, Service>,
    /// In order.
    pub absences: Vec<Span>,
    /// In order.
    pub faults: Vec<Fault>,
    /// Of each fault, by the client that may feel it, if its link has faults, and whether its connection was open; computed
    /// once, as there are thousands of faults in an hour, and of failures.
    felt: BTreeMap<(Option<u16>, bool), Vec<Span>>,
    bound: Duration,
    idle: Duration,
}

impl History {
    /// `services` by listener; `absences`: when there was no agent that could have found out; `bound`: from a fault until
    /// every new connection avoids it, and from its end until all is as before, while there is an agent; `idle`: how long
    /// a datagram's flow lasts without datagrams.
    pub fn new(
        services: BTreeMap<u16, Service>,
        mut absences: Vec<Span>,
        mut faults: Vec<Fault>,
        bound: Duration,
        idle: Duration,
    ) -> Self {
        absences.sort_by_key(|span| span.from_ns);
        faults.sort_by_key(|fault| fault.span.from_ns);
        let mut history = Self {
            services,
            absences,
            faults,
            felt: BTreeMap::new(),
            bound,
            idle,
        };
        let clients: BTreeSet<u16> = history
            .faults
            .iter()
            .filter_map(|fault| match fault.place {
                Place::Client(client) => Some(client),
                _ => None,
            })
            .collect();
        let mut felt = BTreeMap::new();
        for client in clients.into_iter().map(Some).chain([None]) {
            for is_open in [true, false] {
                let spans = history
                    .faults
                    .iter()
                    .map(|fault| history.felt_of(fault, client, is_open));
                felt.insert((client, is_open), spans.collect());
            }
        }
        history.felt = felt;
        history
    }

    /// The fault that explains a failure.
    pub fn explanation(&self, failure: &Failure) -> Option<Explanation<'_>> {
        let in_force = self
            .felt(failure)
            .find(|(fault, felt)| self.explains(fault, *felt, failure))
            .map(|(fault, _)| fault);
        let fatal = || self.faults.iter().find(|fault| was_fatal(fault, failure));
        in_force
            .map(|fault| Explanation {
                fault,
                is_late: false,
            })
            .or_else(|| fatal().map(|fault| Explanation { fault, is_late: true }))
    }

    /// All faults, and when something of them was felt by the client whose request failed.
    fn felt(&self, failure: &Failure) -> impl Iterator<Item = (&Fault, Span)> {
        let of = |client| self.felt.get(&(client, !failure.is_new));
        let felt = of(Some(failure.client)).or_else(|| of(None));
        self.faults.iter().zip(felt.into_iter().flatten().copied())
    }

    /// Faults that were in force around a failure, for messages.
    pub fn near(&self, failure: &Failure) -> Vec<&Fault> {
        let around = Duration::from_secs(15).as_nanos() as u64;
        let near = |fault: &&Fault| {
            fault
                .span
                .meets(failure.since_ns.saturating_sub(around), failure.at_ns + around)
        };
        self.faults.iter().filter(near).collect()
    }

    fn explains(&self, fault: &Fault, felt: Span, failure: &Failure) -> bool {
        let Some(service) = self.services.get(&failure.listener) else {
            return false;
        };
        if !felt.meets(failure.since_ns, failure.at_ns) || !hits(fault, failure, service) {
            return false;
        }
        let reset = service.resets && matches!(fault.place, Place::Servers(_));
        if !failure.is_new {
            let is_cause = fault.old.contains(&failure.kind) || (reset && failure.kind == Kind::Reset);
            // A datagram's flow that has moved is a new one.
            let has_moved = failure.is_udp && service.moves && fault.new.contains(&failure.kind);
            return is_cause || has_moved && self.has_moved(failure, service);
        }
        // A connection that was reset as soon as it was there may be one that its client takes for new.
        let is_cause = fault.new.contains(&failure.kind) || (reset && failure.kind == Kind::Reset);
        if !is_cause {
            return false;
        }
        let Place::Servers(_) = &fault.place else {
            return true;
        };
        failure.since_ns <= self.settled(fault.span.from_ns)
            || fault
                .span
                .until_ns
                .is_some_and(|until_ns| failure.at_ns >= until_ns)
            || self.is_everybody_hit(failure, service)
    }

    /// From a fault's begin until nothing of it is felt any more. What it has broken is told to the other end when the way
    /// is free, so faults of the same servers, and of this client's link, that follow each other are one.
    fn felt_of(&self, fault: &Fault, client: Option<u16>, is_open: bool) -> Span {
        let Some(until_ns) = fault.span.until_ns else {
            return fault.span;
        };
        let told = |fault: &Fault, from_ns, until_ns| {
            if is_open {
                self.told(fault, from_ns, until_ns)
            } else {
                self.settled(until_ns)
            }
        };
        let mut due_ns = told(fault, fault.span.from_ns, until_ns);
        for other in &self.faults {
            let is_on_the_way = matches!(other.place, Place::Client(other) if client == Some(other))
                || fault.place.meets(&other.place);
            if other.span.meets(fault.span.from_ns, due_ns) && is_on_the_way {
                let Some(until_ns) = other.span.until_ns else {
                    return Span {
                        until_ns: None,
                        ..fault.span
                    };
                };
                let from_ns = fault.span.from_ns.min(other.span.from_ns);
                due_ns = due_ns.max(told(other, from_ns, until_ns));
            }
        }
        Span {
            until_ns: Some(due_ns),
            ..fault.span
        }
    }

    /// When both ends of an open connection have heard of what was broken between two moments, at the end of which a fault has
    /// ended: an agent, and those to whom TCP repeats what was lost, after a pause as long as it was silent (RFC 6298 §5.5:
    /// each pause is twice the one before).
    fn told(&self, fault: &Fault, from_ns: u64, until_ns: u64) -> u64 {
        let pause_ns = if fault.old.contains(&Kind::Silence) {
            (until_ns - from_ns).min(LONGEST_PAUSE.as_nanos() as u64)
        } else {
            0
        };
        self.settled(until_ns).max(until_ns + pause_ns)
    }

    /// When an agent has had the time to adapt to what happened at `moment_ns`.
    fn settled(&self, moment_ns: u64) -> u64 {
        let bound_ns = self.bound.as_nanos() as u64;
        let mut due_ns = moment_ns.saturating_add(bound_ns);
        for absence in &self.absences {
            if absence.meets(moment_ns, due_ns) {
                due_ns = absence
                    .until_ns
                    .map_or(u64::MAX, |until_ns| until_ns.saturating_add(bound_ns));
            }
        }
        due_ns
    }

    /// Whether no server of a listener was without a fault all the time.
    fn is_everybody_hit(&self, failure: &Failure, service: &Service) -> bool {
        service.servers.iter().all(|server| {
            self.felt(failure).any(|(fault, felt)| {
                let is_out = match &fault.place {
                    Place::Servers(servers) => servers.contains(server) && !fault.new.is_empty(),
                    Place::Backend {
                        listener,
                        server: out,
                    } => *listener == failure.listener && out == server,
                    Place::Client(_) | Place::Gateway => false,
                };
                is_out && felt.meets(failure.since_ns, failure.at_ns)
            })
        })
    }

    /// Whether a datagram's flow may have gone to another server.
    fn has_moved(&self, failure: &Failure, service: &Service) -> bool {
        let since_ns = failure.since_ns.saturating_sub(self.idle.as_nanos() as u64);
        self.felt(failure).any(|(fault, felt)| {
            matches!(&fault.place, Place::Servers(servers) if servers.iter().any(|one| service.servers.contains(one)))
                && felt.meets(since_ns, failure.at_ns)
        })
    }
}

/// Whether a connection was open to a server when that was killed, so that it had to end early.
fn was_fatal(fault: &Fault, failure: &Failure) -> bool {
    let (Place::Servers(servers), Some(server)) = (&fault.place, failure.server) else {
        return false;
    };
    // Whoever began after the end of the fault is with another process.
    fault.is_fatal
        && servers.contains(&server)
        && failure.kind == Kind::Reset
        && !failure.is_udp
        && fault.span.meets(failure.began_ns, failure.at_ns)
}

fn hits(fault: &Fault, failure: &Failure, service: &Service) -> bool {
    match &fault.place {
        Place::Gateway => true,
        Place::Client(client) => *client == failure.client,
        Place::Backend { listener, server } => {
            *listener == failure.listener && failure.server.is_none_or(|one| one == *server)
        }
        Place::Servers(servers) => match failure.server {
            // A flow of datagrams may have moved since.
            Some(server) if !(failure.is_udp && service.moves) => servers.contains(&server),
            _ => servers.iter().any(|server| service.servers.contains(server)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn history(faults: Vec<Fault>) -> History {
        history_with(Vec::new(), faults)
    }

    fn history_with(absences: Vec<Span>, faults: Vec<Fault>) -> History {
        let service = |servers: &[u16]| Service {
            servers: servers.to_vec(),
            resets: false,
            moves: false,
        };
        History::new(
            BTreeMap::from([(80, service(&[1, 2])), (81, service(&[3]))]),
            absences,
            faults,
            Duration::from_secs(3),
            Duration::from_secs(10),
        )
    }

    fn killed(server: u16, from_s: u64, until_s: u64) -> Fault {
        Fault {
            name: format!("server {server} is killed"),
            span: Span {
                from_ns: from_s * SECOND,
                until_ns: Some(until_s * SECOND),
            },
            place: Place::Servers(vec![server]),
            old: vec![Kind::Reset],
            new: vec![Kind::Refused, Kind::Reset],
            is_fatal: true,
        }
    }

    fn failure(kind: Kind, server: Option<u16>, since_s: u64, at_s: u64) -> Failure {
        Failure {
            began_ns: since_s * SECOND,
            since_ns: since_s * SECOND,
            at_ns: at_s * SECOND,
            kind,
            is_new: server.is_none(),
            is_udp: false,
            client: 1,
            listener: 80,
            server,
            connection: 0,
            what: String::new(),
        }
    }

    #[test]
    fn a_killed_server_explains_resets_of_its_own_connections_only() {
        let history = history(vec![killed(1, 100, 110)]);
        let explained = |failure: &Failure| history.explanation(failure).is_some();
        assert!(explained(&failure(Kind::Reset, Some(1), 99, 100)));
        assert!(
            !explained(&failure(Kind::Reset, Some(2), 99, 100)),
            "a neighbour's"
        );
        assert!(
            !explained(&failure(Kind::Silence, Some(1), 99, 100)),
            "another kind"
        );
        assert!(!explained(&failure(Kind::Reset, Some(1), 90, 99)), "before");
        assert!(
            explained(&failure(Kind::Reset, Some(1), 112, 120)),
            "within the bound"
        );
        assert!(!explained(&failure(Kind::Reset, Some(1), 114, 120)), "after it");
    }

    #[test]
    fn a_connection_that_was_open_to_a_killed_server_ends_whenever_its_client_hears_of_it() {
        let history = history(vec![killed(1, 100, 102)]);
        let ended = Failure {
            began_ns: 99 * SECOND,
            ..failure(Kind::Reset, Some(1), 110, 110)
        };
        let explained = |failure: &Failure| history.explanation(failure).is_some_and(|why| why.is_late);
        assert!(explained(&ended));
        for (other, why) in [
            (
                Failure {
                    began_ns: 103 * SECOND,
                    ..ended.clone()
                },
                "with the next process",
            ),
            (
                Failure {
                    server: Some(2),
                    ..ended.clone()
                },
                "a neighbour's",
            ),
            (
                Failure {
                    server: None,
                    ..ended.clone()
                },
                "whose it was is not known",
            ),
            (
                Failure {
                    kind: Kind::Silence,
                    ..ended.clone()
                },
                "no end",
            ),
            (
                Failure {
                    is_udp: true,
                    ..ended.clone()
                },
                "no connection",
            ),
        ] {
            assert!(!explained(&other), "{why}");
            assert!(history.explanation(&other).is_none(), "{why}");
        }
        let cut = Fault {
            is_fatal: false,
            ..killed(1, 100, 102)
        };
        assert!(self::history(vec![cut]).explanation(&ended).is_none());
    }

    #[test]
    fn a_new_connection_avoids_a_fault_that_is_known() {
        let history = history(vec![killed(1, 100, 110)]);
        let explained = |failure: &Failure| history.explanation(failure).is_some();
        assert!(explained(&failure(Kind::Refused, None, 102, 102)));
        assert!(
            !explained(&failure(Kind::Refused, None, 105, 105)),
            "server 2 is well"
        );
        let mut elsewhere = failure(Kind::Refused, None, 101, 101);
        elsewhere.listener = 81;
        assert!(!explained(&elsewhere));
    }

    #[test]
    fn where_nobody_is_well_new_connections_fail_all_the_time() {
        let faults = vec![killed(1, 100, 110), killed(2, 104, 106)];
        let history = history(faults);
        let explained = |failure: &Failure| history.explanation(failure).is_some();
        assert!(explained(&failure(Kind::Refused, None, 105, 105)));
        assert!(
            explained(&failure(Kind::Refused, None, 108, 108)),
            "2 is not known to be back"
        );
        assert!(
            !explained(&failure(Kind::Refused, None, 110, 110).clone_at(109)),
            "2 is"
        );
    }

    #[test]
    fn what_one_fault_has_broken_is_told_after_the_next_one() {
        let late = failure(Kind::Reset, Some(1), 117, 117);
        let killed_alone = vec![killed(1, 100, 110)];
        assert!(history(killed_alone).explanation(&late).is_none());
        let cut = |server: u16| Fault {
            name: format!("the link of server {server} is down"),
            old: Vec::new(),
            new: Vec::new(),
            ..killed(server, 112, 116)
        };
        let mut faults = vec![killed(1, 100, 110), cut(2)];
        assert!(
            history(faults.clone()).explanation(&late).is_none(),
            "of another server"
        );
        faults.push(cut(1));
        assert!(history(faults).explanation(&late).is_some());
    }

    #[test]
    fn what_a_server_said_last_arrives_when_the_link_of_its_client_is_back() {
        let late = failure(Kind::Reset, Some(1), 117, 117);
        let cut = |client: u16| Fault {
            name: format!("the link of client {client} is down"),
            place: Place::Client(client),
            old: vec![Kind::Silence],
            new: vec![Kind::Silence],
            ..killed(0, 112, 116)
        };
        let judged = |cut: Fault| {
            history(vec![killed(1, 100, 110), cut])
                .explanation(&late)
                .is_some()
        };
        assert!(judged(cut(1)));
        assert!(!judged(cut(2)), "another client's");
    }

    #[test]
    fn what_was_lost_is_repeated_after_a_pause_as_long_as_the_way_was_cut() {
        let cut = Fault {
            name: "the way is cut".to_owned(),
            old: vec![Kind::Silence],
            ..killed(1, 99, 104)
        };
        let history = history(vec![killed(1, 100, 102), cut]);
        let explained = |second: u64| {
            let told = failure(Kind::Reset, Some(1), second, second);
            history.explanation(&told).is_some()
        };
        assert!(explained(109), "five seconds later");
        assert!(!explained(110));
        let new = failure(Kind::Refused, None, 109, 109);
        assert!(
            history.explanation(&new).is_none(),
            "nobody pauses before a new one"
        );
    }

    #[test]
    fn a_group_that_resets_may_reset_what_has_just_begun() {
        let reset = failure(Kind::Reset, None, 101, 101);
        let cut = || Fault {
            old: vec![Kind::Silence],
            new: vec![Kind::Silence],
            ..killed(1, 100, 110)
        };
        let mut history = history(vec![cut()]);
        assert!(history.explanation(&reset).is_none());
        history.services.get_mut(&80).expect("a service").resets = true;
        assert!(history.explanation(&reset).is_some());
    }

    #[test]
    fn an_order_to_end_connections_explains_those_that_had_no_answer_yet() {
        let ended = Fault {
            place: Place::Backend {
                listener: 80,
                server: 1,
            },
            ..killed(1, 100, 110)
        };
        let history = history(vec![ended]);
        let mut unanswered = failure(Kind::Reset, None, 105, 105);
        unanswered.is_new = false;
        assert!(history.explanation(&unanswered).is_some());
        unanswered.server = Some(2);
        assert!(history.explanation(&unanswered).is_none());
    }

    #[test]
    fn without_an_agent_nobody_finds_out() {
        let faults = vec![killed(1, 100, 120)];
        assert!(
            history(faults.clone())
                .explanation(&failure(Kind::Refused, None, 108, 108))
                .is_none()
        );
        let absence = Span {
            from_ns: 101 * SECOND,
            until_ns: Some(106 * SECOND),
        };
        let history = history_with(vec![absence], faults);
        assert!(
            history
                .explanation(&failure(Kind::Refused, None, 108, 108))
                .is_some()
        );
        assert!(
            history
                .explanation(&failure(Kind::Refused, None, 110, 110))
                .is_none()
        );
    }

    #[test]
    fn an_hour_of_faults_and_failures_is_judged_in_no_time() {
        // Each failure would look at every fault's followers, a quarter of a million million pairs.
        let hour =
            (0..5000).map(|number| killed(1 + (number % 2) as u16, 100 + 2 * number, 101 + 2 * number));
        let history = history(hour.collect());
        for moment in 0..10_000 {
            let unknown = failure(Kind::Silence, Some(1), 100 + moment / 2, 100 + moment / 2);
            assert!(history.explanation(&unknown).is_none());
        }
    }

    #[test]
    fn a_full_table_refuses_new_flows_only() {
        let full = Fault {
            name: "the table is full".to_owned(),
            place: Place::Gateway,
            old: Vec::new(),
            new: vec![Kind::Refused],
            ..killed(0, 100, 110)
        };
        let history = history(vec![full]);
        assert!(
            history
                .explanation(&failure(Kind::Refused, None, 105, 105))
                .is_some()
        );
        assert!(
            history
                .explanation(&failure(Kind::Reset, Some(1), 105, 105))
                .is_none()
        );
        assert!(
            history
                .explanation(&failure(Kind::Refused, Some(1), 105, 105))
                .is_none()
        );
    }

    impl Failure {
        fn clone_at(&self, second: u64) -> Self {
            Self {
                since_ns: second * SECOND + SECOND / 2,
                at_ns: second * SECOND + SECOND / 2,
                ..self.clone()
            }
        }
    }
}
