//! Who is ejected, and until when. Pure: no clock, no I/O; times are since an epoch of the caller's.
//!
//! A backend that [`signs`](super::signs) make suspicious is ejected, unless too many of its group are out already,
//! for whatever reason: then the group fails open, as what looks like half of all servers is rather the gateway's own
//! trouble, and a bad server is better than none.
//!
//! The way back is exponential: `ejection_time`, then twice as long each time, up to `max_ejection_time`. Whoever was
//! back for as long as it was out, and has answered a flow, starts over. When the time is over, a backend with an
//! active check needs one probe that passes; a first ejection ends sooner, when as many probes in a row pass as the
//! check asks of an unhealthy backend. That brings a restarted server back at once. It does so once only, because
//! when a backend fails again, its probes have proved to say little about its traffic.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    time::Duration,
};

use forwarder_common::abi::backend::BackendId;

pub use super::signs::{Cause, Counts};
use super::signs::{Signs, Suspicion};
use crate::config::Passive;

/// One group and its backends.
#[derive(Clone, Debug)]
pub struct Group {
    pub limits: Passive,
    pub backends: Vec<Member>,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct Member {
    pub id: BackendId,
    /// By group and name.
    pub name: (String, String),
    /// Address and port; at another one it is another server.
    pub address: (IpAddr, u16),
    pub active: Active,
}

/// What active checks say of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Successes in a row that make an unhealthy backend healthy; `None`: it is not probed.
    pub rise: Option<u32>,
    /// Does it take new flows, as far as active checks are concerned?
    pub is_healthy: bool,
}

/// Something that the agent has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The backend takes no new flows from now on.
    Ejected {
        name: (String, String),
        cause: Cause,
        /// Flows rejected, or flows or requests without an answer.
        count: u64,
        /// Not longer ago than this was the first of them.
        detection: Duration,
        /// Its time is over then.
        until: Duration,
        /// Ejections in a row, this one included.
        times: u32,
    },
    /// It should be ejected, but too many others are out.
    Withheld {
        name: (String, String),
        cause: Cause,
        /// Backends of its group that take no new flows.
        out: usize,
        of: usize,
    },
    /// It takes new flows again if active checks agree.
    Readmitted {
        name: (String, String),
        /// How long it was out.
        after: Duration,
    },
}

#[derive(Clone, Copy, Debug)]
struct Ejection {
    at: Duration,
    until: Duration,
}

/// What is remembered of the last ejection.
#[derive(Clone, Copy, Debug)]
struct Past {
    ended_at: Duration,
    /// How long it was to last.
    time: Duration,
    flows_answered: u64,
}

#[derive(Debug)]
struct Backend {
    name: (String, String),
    address: (IpAddr, u16),
    group: usize,
    active: Active,
    signs: Signs,
    counts: Counts,
    ejection: Option<Ejection>,
    /// Ejections in a row.
    times: u32,
    past: Option<Past>,
    /// Probes that passed since it was ejected and since the last that failed.
    passed: u32,
    is_withheld: bool,
}

impl Backend {
    fn is_out(&self) -> bool {
        self.ejection.is_some() || !self.active.is_healthy
    }

    /// Starts an ejection, and says until when.
    fn eject(&mut self, now: Duration, limits: &Passive) -> Duration {
        let has_recovered = self.past.is_some_and(|past| {
            now.saturating_sub(past.ended_at) >= past.time && self.counts.flows_answered > past.flows_answered
        });
        if has_recovered {
            self.times = 0;
        }
        let factor = 1_u32.checked_shl(self.times).unwrap_or(u32::MAX);
        let time = limits
            .ejection_time
            .saturating_mul(factor)
            .min(limits.max_ejection_time);
        self.times = self.times.saturating_add(1).min(u32::BITS);
        let until = now.saturating_add(time);
        self.ejection = Some(Ejection { at: now, until });
        self.passed = 0;
        self.is_withheld = false;
        until
    }

    /// May it come back?
    fn may_return(&self, ejection: Ejection, now: Duration) -> bool {
        let is_over = now >= ejection.until;
        match self.active.rise {
            None => is_over,
            Some(rise) => (is_over && self.passed > 0) || (self.times <= 1 && self.passed >= rise),
        }
    }

    fn readmit(&mut self, ejection: Ejection, now: Duration) -> Event {
        self.ejection = None;
        self.past = Some(Past {
            ended_at: now,
            time: ejection.until.saturating_sub(ejection.at),
            flows_answered: self.counts.flows_answered,
        });
        self.signs.forget(now);
        Event::Readmitted {
            name: self.name.clone(),
            after: now.saturating_sub(ejection.at),
        }
    }
}

/// The judge of all groups.
#[derive(Debug, Default)]
pub struct Judge {
    limits: Vec<Passive>,
    backends: HashMap<BackendId, Backend>,
    ejected: BTreeSet<BackendId>,
    looked_at: Duration,
}

impl Judge {
    /// Replaces the whole list of groups. Backends that stay what they were keep their past; those that were ejected
    /// and are not on the list any more, or at another address, are readmitted.
    pub fn configure(&mut self, groups: Vec<Group>, now: Duration) -> Vec<Event> {
        let mut old = std::mem::take(&mut self.backends);
        self.limits.clear();
        for (number, group) in groups.into_iter().enumerate() {
            self.limits.push(group.limits);
            for member in group.backends {
                let is_same = |known: &Backend| known.name == member.name && known.address == member.address;
                // One at another address stays behind, and is readmitted below.
                let is_known = old.get(&member.id).is_some_and(is_same);
                let known = is_known.then(|| old.remove(&member.id)).flatten();
                let backend = match known {
                    Some(known) => Backend {
                        group: number,
                        active: member.active,
                        ..known
                    },
                    None => Backend {
                        name: member.name,
                        address: member.address,
                        group: number,
                        active: member.active,
                        signs: Signs::default(),
                        counts: Counts::default(),
                        ejection: None,
                        times: 0,
                        past: None,
                        passed: 0,
                        is_withheld: false,
                    },
                };
                self.backends.insert(member.id, backend);
            }
        }
        let was_ejected = std::mem::take(&mut self.ejected);
        let mut events = Vec::new();
        for id in was_ejected {
            match self.backends.get(&id) {
                Some(backend) if backend.ejection.is_some() => drop(self.ejected.insert(id)),
                _ => {
                    let gone = old.get_mut(&id);
                    events.extend(gone.and_then(|gone| Some(gone.readmit(gone.ejection?, now))));
                }
            }
        }
        events
    }

    /// A probe of an active check has ended.
    pub fn probed(&mut self, id: BackendId, passed: bool, is_healthy: bool, now: Duration) {
        let Some(backend) = self.backends.get_mut(&id) else {
            return;
        };
        backend.passed = if passed {
            backend.passed.saturating_add(1)
        } else {
            0
        };
        if is_healthy && !backend.active.is_healthy {
            // It starts anew; what was seen before says nothing about it.
            backend.signs.forget(now);
        }
        backend.active.is_healthy = is_healthy;
    }

    /// Is anybody to be judged?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.backends.is_empty()
    }

    /// Every backend under watch.
    pub fn backends(&self) -> impl Iterator<Item = BackendId> + '_ {
        self.backends.keys().copied()
    }

    /// The counters were read: those of every backend that has changed since the look before, or carries flows.
    pub fn look(&mut self, now: Duration, reads: &[(BackendId, Counts)]) -> Vec<Event> {
        let before = std::mem::replace(&mut self.looked_at, now);
        let mut events = self.readmit(now);
        let mut suspects: Vec<(Suspicion, BackendId)> = Vec::new();
        for (id, counts) in reads {
            let Some(backend) = self.backends.get_mut(id) else {
                continue;
            };
            backend.counts = *counts;
            let suspicion = backend
                .signs
                .look(before, now, counts, &self.limits[backend.group]);
            match suspicion {
                Some(suspicion) if !backend.is_out() => suspects.push((suspicion, *id)),
                Some(_) => {}
                None => backend.is_withheld = false,
            }
        }
        if !suspects.is_empty() {
            suspects.sort_unstable_by_key(|(suspicion, id)| (suspicion.since, *id));
            self.eject(now, &suspects, &mut events);
        }
        events
    }

    fn readmit(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let backends = &mut self.backends;
        self.ejected.retain(|id| {
            let Some(backend) = backends.get_mut(id) else {
                return false;
            };
            match backend.ejection {
                Some(ejection) if backend.may_return(ejection, now) => {
                    events.push(backend.readmit(ejection, now));
                    false
                }
                ejection => ejection.is_some(),
            }
        });
        events
    }

    /// Ejects suspects, the oldest suspicion first, while their group allows.
    fn eject(&mut self, now: Duration, suspects: &[(Suspicion, BackendId)], events: &mut Vec<Event>) {
        // (out, all) by group.
        let mut sizes = vec![(0, 0); self.limits.len()];
        for backend in self.backends.values() {
            let (out, of) = &mut sizes[backend.group];
            *out += usize::from(backend.is_out());
            *of += 1;
        }
        for (suspicion, id) in suspects {
            let Some(backend) = self.backends.get_mut(id) else {
                continue;
            };
            let limits = &self.limits[backend.group];
            let (out, of) = &mut sizes[backend.group];
            let name = backend.name.clone();
            if (*out + 1) * 100 > usize::from(limits.max_ejected_percent) * *of {
                if !std::mem::replace(&mut backend.is_withheld, true) {
                    let (cause, out, of) = (suspicion.cause, *out, *of);
                    events.push(Event::Withheld { name, cause, out, of });
                }
                continue;
            }
            *out += 1;
            let until = backend.eject(now, limits);
            self.ejected.insert(*id);
            events.push(Event::Ejected {
                name,
                cause: suspicion.cause,
                count: suspicion.count,
                detection: now.saturating_sub(suspicion.since),
                until,
                times: backend.times,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::{super::signs::tests::limits, *};

    const LOOK: Duration = Duration::from_millis(50);

    fn name(number: u32) -> (String, String) {
        ("web".to_owned(), format!("web-{number}"))
    }

    fn member(number: u32, rise: Option<u32>) -> Member {
        Member {
            id: BackendId(number),
            name: name(number),
            address: (IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number)), 80),
            active: Active {
                rise,
                is_healthy: true,
            },
        }
    }

    /// A group, the counters of its backends, and a clock that goes from look to look.
    struct Scene {
        judge: Judge,
        now: Duration,
        counts: Vec<Counts>,
    }

    impl Scene {
        fn new(backends: u32, rise: Option<u32>, limits: Passive) -> Self {
            let mut scene = Self {
                judge: Judge::default(),
                now: Duration::from_secs(1),
                counts: vec![Counts::default(); backends as usize],
            };
            let events = scene.judge.configure(
                vec![Group {
                    limits,
                    backends: (0..backends).map(|number| member(number, rise)).collect(),
                }],
                scene.now,
            );
            assert_eq!(events, []);
            assert_eq!(scene.look(), []);
            scene
        }

        fn look(&mut self) -> Vec<Event> {
            self.now += LOOK;
            let reads: Vec<_> = (0..).map(BackendId).zip(self.counts.iter().copied()).collect();
            self.judge.look(self.now, &reads)
        }

        fn look_for(&mut self, time: Duration) -> Vec<Event> {
            let end = self.now + time;
            let mut events = Vec::new();
            while self.now < end {
                events.extend(self.look());
            }
            events
        }

        fn reject(&mut self, backend: u32, flows: u64) {
            let counts = &mut self.counts[backend as usize];
            counts.flows_opened += flows;
            counts.flows_rejected += flows;
            counts.requests += flows;
            counts.replies += flows;
        }

        fn answer(&mut self, backend: u32, flows: u64) {
            let counts = &mut self.counts[backend as usize];
            counts.flows_opened += flows;
            counts.flows_answered += flows;
            counts.requests += flows;
            counts.replies += flows;
        }

        /// Rejects until the backend is ejected; says for how long.
        fn ejected(&mut self, backend: u32) -> (Duration, u32) {
            self.reject(backend, 5);
            match self.look().as_slice() {
                [
                    Event::Ejected {
                        name: who,
                        until,
                        times,
                        ..
                    },
                ] if *who == name(backend) => (*until - self.now, *times),
                other => panic!("{other:?}"),
            }
        }
    }

    fn readmitted(events: &[Event]) -> Vec<u32> {
        let of = |event: &Event| match event {
            Event::Readmitted { name, .. } => name.1.strip_prefix("web-")?.parse().ok(),
            _ => None,
        };
        events.iter().filter_map(of).collect()
    }

    #[test]
    fn a_rejecting_backend_is_ejected_and_comes_back_when_its_time_is_over() {
        let mut scene = Scene::new(2, None, limits());
        scene.reject(1, 7);
        let events = scene.look();
        assert_eq!(
            events,
            [Event::Ejected {
                name: name(1),
                cause: Cause::Rejected,
                count: 7,
                detection: LOOK,
                until: scene.now + Duration::from_secs(10),
                times: 1,
            }]
        );
        assert_eq!(scene.look_for(Duration::from_millis(9_900)), []);
        assert_eq!(readmitted(&scene.look_for(LOOK * 2)), [1]);
        assert_eq!(
            scene.look_for(Duration::from_secs(60)),
            [],
            "its old signs are forgotten"
        );
    }

    #[test]
    fn a_silent_backend_is_ejected_within_the_window_and_two_looks() {
        let mut scene = Scene::new(2, None, limits());
        scene.counts[0].flows_opened = 6;
        let events = scene.look_for(Duration::from_millis(550));
        let [
            Event::Ejected {
                cause,
                count,
                detection,
                ..
            },
        ] = events.as_slice()
        else {
            panic!("{events:?}");
        };
        assert_eq!((*cause, *count), (Cause::Silent, 6));
        assert_eq!(*detection, Duration::from_millis(550));
    }

    #[test]
    fn no_more_are_ejected_than_the_limit_allows_and_that_is_said_once() {
        let mut scene = Scene::new(4, None, limits());
        for backend in 0..4 {
            scene.reject(backend, 5);
        }
        let events = scene.look_for(Duration::from_secs(5));
        let ejected = |event: &&Event| matches!(event, Event::Ejected { .. });
        assert_eq!(events.iter().filter(ejected).count(), 2, "{events:?}");
        let withheld = |event: &&Event| matches!(event, Event::Withheld { out: 2, of: 4, .. });
        assert_eq!(events.iter().filter(withheld).count(), 2, "{events:?}");
        assert_eq!(events.len(), 4);
    }

    #[test]
    fn who_was_spared_is_ejected_when_there_is_room_and_it_is_still_bad() {
        let mut scene = Scene::new(2, None, limits());
        scene.ejected(0);
        scene.reject(1, 5);
        assert!(matches!(scene.look().as_slice(), [Event::Withheld { .. }]));
        let events = scene.look_for(Duration::from_secs(11));
        assert_eq!(readmitted(&events), [0]);
        let is_ejected = |event: &Event| matches!(event, Event::Ejected { name: who, .. } if *who == name(1));
        assert!(events.iter().any(is_ejected), "{events:?}");
    }

    #[test]
    fn the_only_backend_is_never_ejected() {
        let mut scene = Scene::new(1, None, limits());
        scene.reject(0, 500);
        assert!(matches!(
            scene.look().as_slice(),
            [Event::Withheld { out: 0, of: 1, .. }]
        ));
    }

    #[test]
    fn backends_that_active_checks_took_out_count_as_well() {
        let mut scene = Scene::new(4, Some(2), limits());
        for backend in [0, 1] {
            scene.judge.probed(BackendId(backend), false, false, scene.now);
        }
        scene.reject(2, 5);
        assert!(matches!(
            scene.look().as_slice(),
            [Event::Withheld { out: 2, of: 4, .. }]
        ));
        scene.judge.probed(BackendId(0), true, true, scene.now);
        assert!(matches!(scene.look().as_slice(), [Event::Ejected { .. }]));
    }

    #[test]
    fn the_time_doubles_up_to_its_cap_and_starts_over_after_a_good_time() {
        let mut scene = Scene::new(2, None, limits());
        for (round, secs) in [10, 20, 40, 80, 160, 300, 300].into_iter().enumerate() {
            let (time, times) = scene.ejected(0);
            assert_eq!((time.as_secs(), times), (secs, round as u32 + 1));
            let events = scene.look_for(time + LOOK);
            assert_eq!(readmitted(&events), [0]);
        }
        // In use for as long as it was out, but nobody has asked it.
        scene.look_for(Duration::from_secs(301));
        assert_eq!(scene.ejected(0).0.as_secs(), 300);
        scene.look_for(Duration::from_secs(301));
        scene.answer(0, 1);
        scene.look_for(Duration::from_secs(301));
        assert_eq!(scene.ejected(0), (Duration::from_secs(10), 1));
    }

    #[test]
    fn probes_that_pass_end_a_first_ejection_early_but_not_a_second() {
        let mut scene = Scene::new(2, Some(2), limits());
        scene.ejected(0);
        scene.judge.probed(BackendId(0), true, true, scene.now);
        scene.judge.probed(BackendId(0), false, true, scene.now);
        scene.judge.probed(BackendId(0), true, true, scene.now);
        assert_eq!(scene.look(), [], "one in a row");
        scene.judge.probed(BackendId(0), true, true, scene.now);
        assert_eq!(readmitted(&scene.look()), [0]);

        let (time, times) = scene.ejected(0);
        assert_eq!((time, times), (Duration::from_secs(20), 2));
        for _ in 0..50 {
            scene.judge.probed(BackendId(0), true, true, scene.now);
        }
        assert_eq!(scene.look_for(Duration::from_millis(19_900)), []);
        assert_eq!(readmitted(&scene.look_for(LOOK * 2)), [0]);
    }

    #[test]
    fn a_probed_backend_waits_for_a_probe_that_passes() {
        let mut scene = Scene::new(2, Some(2), limits());
        let (time, _) = scene.ejected(0);
        assert_eq!(scene.look_for(time * 3), [], "nobody has probed it since");
        scene.judge.probed(BackendId(0), false, true, scene.now);
        assert_eq!(scene.look_for(time), []);
        scene.judge.probed(BackendId(0), true, true, scene.now);
        assert_eq!(readmitted(&scene.look()), [0]);
    }

    #[test]
    fn who_leaves_the_list_or_moves_is_readmitted_and_who_stays_is_not() {
        let mut scene = Scene::new(8, None, limits());
        for backend in 0..3 {
            scene.ejected(backend);
        }
        let mut moved = member(1, None);
        moved.address.1 = 81;
        let group = Group {
            limits: limits(),
            backends: vec![moved, member(2, None), member(3, None)],
        };
        let events = scene.judge.configure(vec![group], scene.now);
        let mut back = readmitted(&events);
        back.sort_unstable();
        assert_eq!((back, events.len()), (vec![0, 1], 2));
        assert_eq!(readmitted(&scene.look_for(Duration::from_secs(11))), [2]);
    }

    proptest! {
        /// Whatever happens: the limit holds, every event fits what was before it, and everybody comes back.
        #[test]
        fn the_limit_holds_and_everybody_comes_back(
            backends in 1_u32..12,
            percent in 0_u8..=100,
            rise in prop::option::of(1_u32..4),
            steps in prop::collection::vec((0_u32..12, 0_u8..6), 0..300),
        ) {
            let limits = Passive { max_ejected_percent: percent, ..limits() };
            let mut scene = Scene::new(backends, rise, limits);
            let mut ejected = BTreeSet::new();
            let mut check = |events: &[Event]| {
                for event in events {
                    match event {
                        Event::Ejected { name, until: _, times, detection, .. } => {
                            prop_assert!(ejected.insert(name.clone()), "ejected twice");
                            prop_assert!(*times >= 1);
                            prop_assert!(*detection >= LOOK);
                            prop_assert!(ejected.len() * 100 <= usize::from(percent) * backends as usize);
                        }
                        Event::Readmitted { name, .. } => prop_assert!(ejected.remove(name)),
                        Event::Withheld { name, .. } => prop_assert!(!ejected.contains(name)),
                    }
                }
                Ok(ejected.len())
            };
            for (backend, what) in steps {
                let backend = backend % backends;
                let id = BackendId(backend);
                let mut events = Vec::new();
                match what {
                    0 => scene.answer(backend, 3),
                    1 => scene.reject(backend, 3),
                    2 => scene.counts[backend as usize].flows_opened += 3,
                    3 if rise.is_some() => scene.judge.probed(id, true, true, scene.now),
                    4 if rise.is_some() => scene.judge.probed(id, false, true, scene.now),
                    _ => events = scene.look_for(Duration::from_secs(1)),
                }
                events.extend(scene.look());
                check(&events)?;
            }
            // From now on all is well.
            let mut left = 0;
            for _ in 0..800 {
                for backend in 0..backends {
                    scene.answer(backend, 1);
                    if rise.is_some() {
                        scene.judge.probed(BackendId(backend), true, true, scene.now);
                    }
                }
                scene.now += Duration::from_secs(1);
                let events = scene.look();
                left = check(&events)?;
            }
            prop_assert_eq!(left, 0);
        }
    }
}
