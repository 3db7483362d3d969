//! Ring 2: what the agent would explain of a packet is what the programs then do with it, on random packets over
//! live maps. Needs CAP_BPF and CAP_NET_ADMIN.
//!
//! First all packets are explained as one capture, which must leave no trace in the maps; then each is explained
//! and run through the real program.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::maps::Array;
use bytemuck::Zeroable as _;
use forwarder_common::{
    abi::{
        flow::{FlowEntry, FlowReference, FlowState, TcpEvents},
        map_name,
        reason::{DESCRIPTIONS, Reason},
        settings::flag,
    },
    wire::Ipv4Address,
};
use forwarder_tests::{
    cases::{self, Case, Event},
    invariants::Arrival as Packet,
    program::{Kernel, action_of, with_kernel},
    tables::SIZES,
};
use forwarder_user::{
    datapath::{
        object::{self, Sizes},
        pod::AsPod,
        times::FlowTimes,
        view::{Arrival, Live, LiveMaps},
    },
    flows::{FlowPhase, FlowQuery, FlowTable},
    state::names::Names,
};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use crate::random::Scenario;

mod random;

/// How many packets are explained at least.
const PACKETS: u64 = 1000;

fn arrival(packet: &Packet) -> Arrival<'_> {
    Arrival {
        frame: &packet.frame,
        ifindex: packet.ifindex,
        kind: packet.program.kind(),
    }
}

/// Explains and runs a scenario's packets; counts them by reason.
fn compare(
    kernel: &mut Kernel,
    maps: &LiveMaps,
    scenario: &Scenario,
    reasons: &mut [u64],
) -> Result<(), TestCaseError> {
    let broken = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
    let settings = scenario.world.settings;
    kernel.fill(&scenario.world).map_err(broken)?;
    let arrivals: Vec<_> = scenario.packets.iter().map(arrival).collect();
    kernel.explain(maps, &arrivals).map_err(broken)?;
    let differences = kernel
        .read(&scenario.world)
        .map_err(broken)?
        .differences(&scenario.world);
    if !differences.is_empty() {
        return Err(TestCaseError::fail(format!(
            "explaining changed something: {}",
            differences.join("\n")
        )));
    }
    kernel.fill(&scenario.world).map_err(broken)?;
    let mut counted = kernel.reason_counters().map_err(broken)?;
    for (index, packet) in scenario.packets.iter().enumerate() {
        let walks = kernel.explain(maps, &[arrival(packet)]).map_err(broken)?;
        let walk = &walks[0];
        let (action, out) = kernel
            .run(packet.program, packet.ifindex, &packet.frame)
            .map_err(broken)?;
        let wanted = action_of(packet.program, walk.outcome.verdict, &settings);
        let reason = walk.outcome.reason;
        if (action, &out) != (wanted, &walk.frame) {
            return Err(TestCaseError::fail(format!(
                "packet {index} ({reason:?}): the kernel says {action:?}, explained {wanted:?}\n  kernel    \
                 {out:02x?}\n  explained {:02x?}\n  {:#?}",
                walk.frame, walk.steps
            )));
        }
        let after = kernel.reason_counters().map_err(broken)?;
        let expected = counted[reason.0 as usize].packets + 1;
        if after[reason.0 as usize].packets != expected {
            return Err(TestCaseError::fail(format!(
                "packet {index}: explained {reason:?}, the kernel counted another reason"
            )));
        }
        counted = after;
        reasons[reason.0 as usize] += 1;
        // The flow, its binding and its next hop, bit for bit.
        if let Some((id, expected)) = walk.flow {
            let found = kernel.flow(id).map_err(broken)?;
            if found != expected {
                return Err(TestCaseError::fail(format!(
                    "packet {index}, flow {id:?}:\n  kernel    {found:?}\n  explained {expected:?}"
                )));
            }
        }
    }
    Ok(())
}

/// What is explained wrongly of a case.
fn faults(kernel: &mut Kernel, maps: &LiveMaps, case: &Case) -> anyhow::Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut world = case.world.clone();
    for (index, event) in case.events.iter().enumerate() {
        let step = match event {
            Event::Change(change) => {
                change(&mut world);
                continue;
            }
            Event::Packet(step) => step,
        };
        // The view counts the keys of flows, and only a test enters keys without a flow, to fill the index up.
        let is_used = |key: &FlowReference| world.flows[key.id.0 as usize].state != FlowState::FREE;
        if !world.flow_index.values().all(is_used) {
            println!("not explained: {}", case.sentence);
            return Ok(faults);
        }
        kernel.fill(&world)?;
        let arrival = Arrival {
            frame: &step.frame,
            ifindex: step.ifindex,
            kind: step.program.kind(),
        };
        let walk = kernel.explain(maps, &[arrival])?.remove(0);
        let (outcome, out) = world.forward(step.program, step.ifindex, &step.frame);
        if (walk.outcome, &walk.frame) != (outcome, &out) {
            faults.push(format!(
                "packet {index}: {:?} {:02x?}\n  wanted  {outcome:?} {out:02x?}",
                walk.outcome, walk.frame
            ));
        }
    }
    Ok(faults)
}

#[test]
fn every_case_is_explained_as_it_is() {
    with_kernel(|kernel| {
        let maps = kernel.live_maps().expect("the maps once more");
        let mut cases = cases::with_twins();
        // Which way a CPU remembers is not looked at: whoever explains asks for the route that it was.
        cases.retain(|case| case.library_only.is_none() && case.world.settings.flags & flag::ONE_WAY == 0);
        for case in &cases {
            let faults = faults(kernel, &maps, case).unwrap_or_else(|error| vec![format!("{error:#}")]);
            assert!(faults.is_empty(), "{}:\n{}", case.sentence, faults.join("\n"));
        }
        println!("{} cases are explained as they are", cases.len());
        assert!(!cases.is_empty());
    });
}

#[test]
fn a_million_flows_are_listed_and_counted_quickly() {
    const FLOWS: u32 = 1_000_000;
    with_kernel(|_| {
        let sizes = Sizes {
            flows: FLOWS,
            ..SIZES
        };
        let mut ebpf = object::load(&sizes).expect("a large flow table");
        let mut entry = FlowEntry::zeroed();
        entry.state = FlowState::LIVE;
        entry.binding.protocol = 6;
        entry.tcp = TcpEvents::OPENED;
        let mut flows: Array<_, AsPod<FlowEntry>> =
            Array::try_from(ebpf.map_mut(map_name::FLOWS).unwrap()).unwrap();
        for id in 0..FLOWS {
            entry.binding.client = Ipv4Address::from_number(id).into();
            flows.set(id, AsPod(entry), 0).unwrap();
        }
        let maps = LiveMaps::open(&ebpf).unwrap();
        let live = Live::new(maps, Arc::new(Mutex::new(ebpf)));
        let table = FlowTable {
            memory: live.flows(),
            times: &FlowTimes::new(FLOWS),
            names: &Names::default(),
        };
        let query = FlowQuery {
            client: Some("0.8.0.0/16".parse().unwrap()),
            state: Some(FlowPhase::HalfOpen),
            limit: Some(10),
            ..FlowQuery::default()
        };
        let started_at = Instant::now();
        let list = table.list(&query).unwrap();
        let took = started_at.elapsed();
        assert_eq!((list.matching, list.flows.len()), (65_536, 10));
        assert_eq!(list.flows[3].client.ip(), std::net::Ipv4Addr::new(0, 8, 0, 3));
        println!("1 000 000 flows filtered in {took:?}");
        // A slow build on a busy machine takes a tenth of this.
        assert!(took < Duration::from_secs(5), "{took:?}");
    });
}

#[test]
fn what_is_explained_is_what_the_programs_do() {
    with_kernel(|kernel| {
        let maps = kernel.live_maps().expect("the maps once more");
        let kernel = RefCell::new(kernel);
        let reasons = RefCell::new(vec![0; Reason::COUNT]);
        while reasons.borrow().iter().sum::<u64>() < PACKETS {
            let mut runner = TestRunner::new(Config {
                cases: 8,
                failure_persistence: None,
                ..Config::default()
            });
            let outcome = runner.run(&random::scenario(), |scenario| {
                compare(*kernel.borrow_mut(), &maps, &scenario, &mut reasons.borrow_mut())
            });
            match outcome {
                Ok(()) => {}
                Err(TestError::Fail(reason, scenario)) => {
                    println!("{:#?}", scenario.packets);
                    panic!("{reason}");
                }
                Err(TestError::Abort(reason)) => panic!("{reason}"),
            }
        }
        let reasons = reasons.into_inner();
        for (description, count) in DESCRIPTIONS.iter().zip(&reasons) {
            println!("{count:>6} {}", description.name);
        }
        println!(
            "{:>6} random packets, each done as explained",
            reasons.iter().sum::<u64>()
        );
        assert!(
            reasons[Reason::REQUEST_FORWARDED.0 as usize] > 0,
            "no packet was forwarded"
        );
    });
}
