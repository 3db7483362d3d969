//! What a packet costs: the programs run on one CPU by BPF_PROG_TEST_RUN, whose every output is checked.
//!
//! A figure is CPU time per packet, less that of the same packets through an empty program. All programs take turns,
//! and what is printed is the median of their trials and its ratio to the minimal program's of as many flows.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, ProgramArray, Queue},
    programs::{Program, ProgramFd, TestRun as _, TestRunOptions, Xdp},
};
use forwarder_bench_ebpf::{FloorEntry, FloorKey, Scenario};
use forwarder_tests::{
    cases::measured::{Gateway, MOST_FLOWS, Packets, Stream, Way},
    program::{Kernel, in_network},
};
use forwarder_user::datapath::pod::AsPod;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::markdown;

const TRIALS: usize = 15;
const MINIMAL: &str = "minimal program";
/// Packets of a run: some tens of milliseconds.
const RUN: u32 = 100_000;
/// New flows of a run: a table's worth in all trials together.
const NEW: u32 = MOST_FLOWS / (TRIALS as u32 + 1);
/// XDP_ABORTED to XDP_REDIRECT (linux/bpf.h).
const XDP_ABORTED: u32 = 0;

pub(crate) fn run(object: &Path, only: &str) -> Result<()> {
    let mut outcome = Ok(String::new());
    in_network(|| outcome = measure(object, only));
    println!("{}", outcome?);
    Ok(())
}

/// A program and its packets.
struct Subject {
    name: String,
    gateway: Gateway,
    /// Nobody else's: state does not leak from one measurement into another.
    kernel: Option<Kernel>,
    caller: Caller,
    stream: Stream,
    /// Of the program under test in `caller`, where it is one of the benchmark's own.
    floor: Option<&'static str>,
    /// Each packet opens a flow, so no run may repeat one.
    is_opening: bool,
    /// Nanoseconds per packet, of each trial.
    costs: Vec<f64>,
}

/// The program in front, with its scenario.
struct Caller(Ebpf);

impl Caller {
    fn load(object: &Path, floor_flows: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in ["FLOOR_FLOWS", "FLOOR_ENTRIES", "FLOOR_FREE"] {
            loader.map_max_entries(map, floor_flows);
        }
        let mut ebpf = loader
            .load_file(object)
            .with_context(|| format!("{}", object.display()))?;
        for (name, program) in ebpf.programs_mut() {
            if let Program::Xdp(program) = program {
                program.load().with_context(|| format!("load {name}"))?;
            }
        }
        Ok(Self(ebpf))
    }

    fn own(&self, name: &str) -> Result<ProgramFd> {
        let program: &Xdp = self.0.program(name).context(name.to_owned())?.try_into()?;
        Ok(program.fd()?.try_clone()?)
    }

    fn scenario(&mut self) -> Result<Array<&mut aya::maps::MapData, AsPod<Scenario>>> {
        Ok(Array::try_from(self.0.map_mut("SCENARIO").context("SCENARIO")?)?)
    }

    /// Runs packets of a stream through a program: nanoseconds of CPU time, and the last output.
    fn run(
        &mut self,
        program: &ProgramFd,
        stream: &Stream,
        scenario: &Scenario,
        count: u32,
    ) -> Result<(f64, Vec<u8>)> {
        self.scenario()?.set(0, AsPod(*scenario), 0)?;
        ProgramArray::try_from(self.0.map_mut("PROGRAM").context("PROGRAM")?)?.set(0, program, 0)?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, stream.frame.len() as u32, 0, stream.ifindex, 0, 0];
        let mut output = vec![0; 2048];
        let call: &Xdp = self.0.program("bench_call").context("bench_call")?.try_into()?;
        let began = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        let result = call.test_run(TestRunOptions {
            data_in: Some(&stream.frame),
            data_out: Some(&mut output),
            ctx_in: Some(bytemuck::bytes_of(&context)),
            repeat: count,
            ..TestRunOptions::new()
        })?;
        let ended = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        ensure!(result.return_value != XDP_ABORTED, "the caller gave up");
        output.truncate(result.data_size_out as usize);
        let nanoseconds =
            (ended.tv_sec() - began.tv_sec()) as f64 * 1e9 + (ended.tv_nsec() - began.tv_nsec()) as f64;
        let done = self.scenario()?.get(&0, 0)?.0;
        ensure!(
            done.good == count - 1 && done.bad == 0,
            "{} good and {} bad outputs of {count}",
            done.good,
            done.bad
        );
        Ok((nanoseconds, output))
    }
}

impl Subject {
    fn program(&mut self) -> Result<ProgramFd> {
        match (&mut self.kernel, self.floor) {
            (Some(kernel), _) => Ok(kernel.xdp()?.try_clone()?),
            (None, Some(name)) => self.caller.own(name),
            (None, None) => anyhow::bail!("no program"),
        }
    }

    /// Runs packets through the program; the first one's number and how far apart flows are.
    fn through(&mut self, first: u32, stride: u32, count: u32) -> Result<(f64, Vec<u8>)> {
        let program = self.program()?;
        let scenario = Scenario {
            packets: first,
            stride,
            ..self.stream.scenario
        };
        let before = self.counted()?;
        let outcome = self
            .caller
            .run(&program, &self.stream, &scenario, count)
            .with_context(|| self.name.clone())?;
        let counted = self.counted()? - before;
        ensure!(
            self.kernel.is_none() || counted == u64::from(count),
            "{}: {counted} of {count} packets were {:?}",
            self.name,
            self.stream.reason
        );
        Ok(outcome)
    }

    fn counted(&mut self) -> Result<u64> {
        let Some(kernel) = &mut self.kernel else {
            return Ok(0);
        };
        Ok(kernel.reason_counters()?[self.stream.reason.0 as usize].packets)
    }

    /// The same packets through a program that does nothing.
    fn through_nothing(&mut self, first: u32, stride: u32, count: u32) -> Result<f64> {
        let empty = self.caller.own("bench_empty")?;
        let unchanged = Scenario {
            packets: first,
            stride,
            output_len: self.stream.scenario.frame_len,
            mask: [0; _],
            ..self.stream.scenario
        };
        Ok(self.caller.run(&empty, &self.stream, &unchanged, count)?.0)
    }

    /// Looks at some flows' outputs whole.
    fn verify(&mut self) -> Result<()> {
        for sample in self.stream.samples.clone() {
            let empty = self.caller.own("bench_empty")?;
            let scenario = Scenario {
                packets: sample.flow,
                stride: 1,
                ..self.stream.scenario
            };
            let (_, frame) = self.caller.run(&empty, &self.stream, &scenario, 1)?;
            ensure!(
                frame == sample.frame,
                "{}, flow {}: the generated frame\n{frame:02x?}\nis not\n{:02x?}",
                self.name,
                sample.flow,
                sample.frame
            );
            let (_, output) = self.through(sample.flow, 1, 1)?;
            ensure!(
                output == sample.output,
                "{}, flow {}: the output\n{output:02x?}\nis not\n{:02x?}",
                self.name,
                sample.flow,
                sample.output
            );
        }
        Ok(())
    }

    fn trial(&mut self, number: usize) -> Result<()> {
        let (first, stride, count) = if self.is_opening {
            (NEW * (number as u32 + 1), 1, NEW)
        } else {
            (1, self.stream.scenario.stride, RUN.max(self.gateway.flows))
        };
        let nothing = self.through_nothing(first, stride, count)?;
        let (all, _) = self.through(first, stride, count)?;
        self.costs.push((all - nothing) / f64::from(count));
        Ok(())
    }
}

/// Loads the data path and opens all flows.
fn gateway(object: &Path, name: &str, gateway: Gateway, packets: Packets) -> Result<Subject> {
    eprintln!("preparing: {name} ...");
    let mut kernel = Kernel::load(&gateway.sizes())?;
    let mut tables = gateway.tables();
    let is_opening = packets == Packets::Opening;
    if packets == Packets::Refused {
        tables.free_flows.clear();
    }
    kernel.fill(&tables)?;
    let mut subject = Subject {
        name: name.to_owned(),
        gateway,
        kernel: Some(kernel),
        caller: Caller::load(object, 1)?,
        stream: gateway.stream(packets)?,
        floor: None,
        is_opening,
        costs: Vec::new(),
    };
    if matches!(packets, Packets::Request | Packets::Reply) {
        let wanted = std::mem::replace(&mut subject.stream, gateway.stream(Packets::Opening)?);
        subject.through(0, 1, gateway.flows)?;
        if gateway.backends == 1 {
            subject.stream = gateway.stream(Packets::Answer)?;
            subject.through(0, 1, gateway.flows)?;
        }
        subject.stream = wanted;
    }
    if is_opening {
        // The samples' flows would be in the way of the trials'.
        subject.through(0, 1, NEW)?;
    } else {
        subject.verify()?;
    }
    Ok(subject)
}

/// One of the benchmark's own programs, on the packets of full NAT.
fn floor(object: &Path, name: &str, program: &'static str, flows: u32, is_opening: bool) -> Result<Subject> {
    eprintln!("preparing: {name} ...");
    let gateway = Gateway {
        flows,
        ..Gateway::PLAIN
    };
    let mut caller = Caller::load(object, flows * 2)?;
    let mut stream = gateway.stream(if is_opening {
        Packets::Opening
    } else {
        Packets::Request
    })?;
    if program == "bench_minimal" {
        let mut index: HashMap<_, AsPod<FloorKey>, u32> =
            HashMap::try_from(caller.0.map_mut("FLOOR_FLOWS").context("FLOOR_FLOWS")?)?;
        for (number, (key, _)) in (0..).zip(gateway.floor()) {
            index.insert(AsPod(key), number, 0)?;
        }
        let mut entries: HashMap<_, AsPod<FloorKey>, AsPod<FloorEntry>> =
            HashMap::try_from(caller.0.map_mut("FLOOR_ENTRIES").context("FLOOR_ENTRIES")?)?;
        for (key, entry) in gateway.floor() {
            entries.insert(AsPod(key), AsPod(entry), 0)?;
        }
    } else {
        let is_swap = program == "bench_swap";
        for sample in &mut stream.samples {
            sample.output = sample.frame.clone();
            if is_swap {
                sample.output[..12].rotate_left(6);
            }
        }
        stream.scenario.mask = [0; _];
        // Both link addresses.
        stream.scenario.mask[0] = u64::MAX;
        let output = &stream.samples[0].output;
        stream.scenario.expected[0] = u64::from_ne_bytes(output[..8].try_into()?);
        stream.scenario.output_len = stream.scenario.frame_len;
    }
    if is_opening {
        let mut free: Queue<_, u32> = Queue::try_from(caller.0.map_mut("FLOOR_FREE").context("FLOOR_FREE")?)?;
        for number in 0..flows {
            free.push(number, 0)?;
        }
    }
    let mut subject = Subject {
        name: name.to_owned(),
        gateway,
        kernel: None,
        caller,
        stream,
        floor: Some(program),
        is_opening,
        costs: Vec::new(),
    };
    if is_opening {
        subject.through(0, 1, NEW)?;
    } else {
        subject.verify()?;
    }
    Ok(subject)
}

/// What is to be measured.
enum Plan {
    Floor(&'static str, u32, bool),
    Gateway(Gateway, Packets),
}

/// The subjects' names and what they are, in the order of the table.
fn plans() -> Vec<(String, Plan)> {
    let plain = Gateway::PLAIN;
    let mut plans = Vec::new();
    let floor =
        |name: &str, program, flows, is_opening| (name.to_owned(), Plan::Floor(program, flows, is_opening));
    let gateway = |name: &str, gateway, packets| (name.to_owned(), Plan::Gateway(gateway, packets));
    let ways = [("request", Packets::Request), ("reply", Packets::Reply)];

    plans.push(floor("swap of the link addresses", "bench_swap", 1, false));
    for flows in [1, 4096, 65_536, MOST_FLOWS] {
        plans.push(floor(MINIMAL, "bench_minimal", flows, false));
        for (name, packets) in ways {
            let many = Gateway { flows, ..plain };
            plans.push(gateway(&format!("{name}, full NAT"), many, packets));
        }
    }
    let dnat = Gateway {
        way: Way::Dnat,
        ..plain
    };
    let v6 = Gateway { is_v6: true, ..plain };
    for (name, packets) in ways {
        plans.push(gateway(&format!("{name}, DNAT"), dnat, packets));
        plans.push(gateway(&format!("{name}, full NAT, IPv6"), v6, packets));
    }
    for (tunnel, is_v6) in [
        ("VXLAN", false),
        ("VXLAN", true),
        ("Geneve", false),
        ("GRE", false),
        ("IPIP", false),
        ("GUE", false),
        ("FOU", false),
    ] {
        let way = Way::Tunnel(tunnel, is_v6);
        let over = if is_v6 { " over IPv6" } else { "" };
        let tunnelled = Gateway { way, ..plain };
        for ((_, packets), how) in ways.into_iter().zip(["request into", "reply out of"]) {
            plans.push(gateway(&format!("{how} {tunnel}{over}"), tunnelled, packets));
        }
    }
    let many = Gateway {
        flows: 65_536,
        ..plain
    };
    for listeners in [1, 10_000] {
        let name = format!("request, full NAT, listeners: {listeners}");
        plans.push(gateway(&name, Gateway { listeners, ..many }, Packets::Request));
    }
    for backends in [8, 10_000] {
        let name = format!("request, full NAT, backends: {backends}");
        plans.push(gateway(&name, Gateway { backends, ..many }, Packets::Request));
    }
    for (name, program, way) in [
        ("inserts of a flow with one key", "bench_insert", Way::FullNat),
        ("inserts of a flow with two keys", "bench_insert_two", Way::Dnat),
    ] {
        plans.push(floor(name, program, MOST_FLOWS, true));
        let new = Gateway {
            flows: MOST_FLOWS,
            way,
            ..plain
        };
        let name = if way == Way::Dnat {
            "new flow, DNAT"
        } else {
            "new flow, full NAT"
        };
        plans.push(gateway(name, new, Packets::Opening));
    }
    for (name, packets) in [
        ("SYN while no flow is free", Packets::Refused),
        ("to a VIP's port without a listener", Packets::NoListener),
        ("not for us", Packets::Others),
    ] {
        plans.push(gateway(name, plain, packets));
    }
    plans
}

/// Those whose names have `only` in them, and the first floor.
fn subjects(object: &Path, only: &str) -> Result<Vec<Subject>> {
    plans()
        .into_iter()
        .filter(|(name, plan)| {
            let one = matches!(plan, Plan::Gateway(of, _) if of.flows == 1);
            let few = std::env::var("FEW").is_ok();
            only.split('|').any(|only| {
                if few {
                    name.contains(only) && one
                } else {
                    name.contains(only)
                }
            }) || matches!(plan, Plan::Floor("bench_minimal", 1, _))
        })
        .map(|(name, plan)| match plan {
            Plan::Floor(program, flows, is_opening) => floor(object, &name, program, flows, is_opening),
            Plan::Gateway(of, packets) => gateway(object, &name, of, packets),
        })
        .collect()
}

fn measure(object: &Path, only: &str) -> Result<String> {
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    let mut subjects = subjects(object, only)?;
    for trial in 0..TRIALS {
        eprintln!("trial {} of {TRIALS} ...", trial + 1);
        for subject in &mut subjects {
            subject.trial(trial)?;
        }
    }
    let mut floors = BTreeMap::new();
    let mut rows = Vec::new();
    let mut inserts = None;
    for subject in &mut subjects {
        subject.costs.sort_by(f64::total_cmp);
        let median = subject.costs[subject.costs.len() / 2];
        if subject.floor == Some("bench_minimal") {
            floors.insert(subject.gateway.flows, median);
        }
        if subject.is_opening && subject.floor.is_some() {
            inserts = Some(median);
        }
        let reference = if subject.is_opening {
            inserts
        } else {
            floors.get(&subject.gateway.flows).copied()
        };
        rows.push([
            subject.name.clone(),
            subject.gateway.flows.to_string(),
            format!("{median:.0}"),
            format!(
                "{:.0} to {:.0}",
                subject.costs[0],
                subject.costs[subject.costs.len() - 1]
            ),
            reference.map_or_else(String::new, |reference| format!("{:.2}", median / reference)),
        ]);
    }
    let header = ["packets", "flows", "ns, median", "min to max", "ratio"];
    Ok(format!(
        "{TRIALS} trials of {RUN} packets or more, by turns, on one CPU; net of an empty program. The ratio is to the minimal \
         program with as many flows, for new flows to their inserts.\n\n{}",
        markdown(header, &rows)
    ))
}
