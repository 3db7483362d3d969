//! What a packet costs: the programs run on one CPU by BPF_PROG_TEST_RUN, whose every output is checked.
//!
//! A figure is CPU time per packet, less that of the same packets through an empty program. All programs take turns,
//! and what is told is the median of their trials and its ratio to the minimal program's of as many flows.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, ProgramArray, Queue},
    programs::{Program, ProgramFd, TestRun as _, TestRunOptions, Xdp},
};
use forwarder_bench_ebpf::{FloorEntry, FloorKey, Scenario};
use forwarder_common::datapath::hint::{self, Hints};
use forwarder_user::datapath::pod::AsPod;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use super::{Bar, Effort, Line, Measured, Plot, PlotKind, Spread, Table, in_turns};
use crate::{
    cases::measured::{Gateway, MOST_FLOWS, Packets, Stream, Way},
    program::{Kernel, in_network},
};

pub const NAME: &str = "packets";
pub const TITLE: &str = "One packet in the programs";
pub const PROSE: &str = include_str!("packets.md");

const MINIMAL: &str = "minimal program";
const NOT_OURS: &str = "not for us";
/// XDP_ABORTED to XDP_REDIRECT (linux/bpf.h).
const XDP_ABORTED: u32 = 0;
/// Flows that the figures are about.
const FLOWS: [u32; 4] = [1, 4096, 65_536, MOST_FLOWS];
/// More in short runs would only take time: to fill the tables takes more of it than to look at the outputs.
const SHORT_FLOWS: u32 = 4096;
const SHORT_OTHERS: u32 = 100;

/// How many trials, of how many packets.
#[derive(Clone, Copy)]
struct Extent {
    trials: usize,
    /// Packets of a run: some tens of milliseconds, or more where there are more flows.
    run: u32,
}

impl Extent {
    fn of(effort: Effort) -> Self {
        Self {
            trials: effort.pick(15, 1),
            run: effort.pick(100_000, 5_000),
        }
    }

    /// New flows of a run: with those before the trials and in the cold one, a table's worth in all.
    fn new_flows(self, flows: u32) -> u32 {
        flows / (self.trials as u32 + 2)
    }
}

/// Measures all that has `only` in its name, and the minimal program.
pub fn run(object: &Path, only: &str, effort: Effort) -> Result<Measured> {
    let mut outcome = Ok(Measured::default());
    in_network(|| outcome = measure(object, only, effort));
    outcome
}

/// A program and its packets.
pub struct Subject {
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
    extent: Extent,
    /// Trials so far.
    turns: u32,
}

/// Nanoseconds per packet.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of the program.
    pub own: f64,
    /// Of the empty program, and of the caller in front of it.
    pub nothing: f64,
}

/// The program in front, with its scenario.
struct Caller(Ebpf);

impl Caller {
    fn load(object: &Path, floor_flows: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in ["FLOOR_FLOWS", "FLOOR_ENTRIES", "FLOOR_FREE", "FLOOR_STATES"] {
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

    /// Runs the subject's packets once through nothing and once through the program.
    ///
    /// # Errors
    /// A packet did not come out as it has to, or was not counted as what it is.
    pub fn trial(&mut self) -> Result<Cost> {
        self.turns += 1;
        let (first, stride, count) = if self.is_opening {
            let new = self.extent.new_flows(self.gateway.flows);
            (new * self.turns, 1, new)
        } else {
            let count = self.extent.run.max(self.gateway.flows);
            (1, self.stream.scenario.stride, count)
        };
        let nothing = self.through_nothing(first, stride, count)?;
        let (all, _) = self.through(first, stride, count)?;
        Ok(Cost {
            own: (all - nothing) / f64::from(count),
            nothing: nothing / f64::from(count),
        })
    }

    /// Puts one of the benchmark's own programs where the data path is.
    pub fn pretend(&mut self, program: &'static str) {
        self.kernel = None;
        self.floor = Some(program);
    }

    /// Lets the gateway forget which flow a request belongs to.
    pub fn forget_flows(&mut self) -> Result<()> {
        let mut tables = self.gateway.tables();
        tables.hints = vec![Hints::default(); hint::buckets(self.gateway.flows) as usize];
        self.kernel.as_mut().context("a gateway")?.fill(&tables)
    }
}

/// Loads the data path and opens all flows; to be called [`in_network`].
pub fn gateway(
    object: &Path,
    name: &str,
    gateway: Gateway,
    packets: Packets,
    effort: Effort,
) -> Result<Subject> {
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
        extent: Extent::of(effort),
        turns: 0,
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
        subject.through(0, 1, subject.extent.new_flows(gateway.flows))?;
    } else {
        subject.verify()?;
    }
    Ok(subject)
}

/// One of the benchmark's own programs, on the packets of full NAT.
fn floor(
    object: &Path,
    name: &str,
    program: &'static str,
    flows: u32,
    is_opening: bool,
    effort: Effort,
) -> Result<Subject> {
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
        extent: Extent::of(effort),
        turns: 0,
    };
    if is_opening {
        subject.through(0, 1, subject.extent.new_flows(flows))?;
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
fn plans(effort: Effort) -> Vec<(String, Plan)> {
    let plain = Gateway::PLAIN;
    let many_flows = |flows: u32| effort.pick(flows, flows.min(SHORT_FLOWS));
    let mut flows_of_the_table = FLOWS.map(many_flows).to_vec();
    flows_of_the_table.dedup();
    let mut plans = Vec::new();
    let floor =
        |name: &str, program, flows, is_opening| (name.to_owned(), Plan::Floor(program, flows, is_opening));
    let gateway = |name: &str, gateway, packets| (name.to_owned(), Plan::Gateway(gateway, packets));
    let ways = [("request", Packets::Request), ("reply", Packets::Reply)];

    plans.push(floor("swap of the link addresses", "bench_swap", 1, false));
    for flows in flows_of_the_table {
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
    let few_or_many_flows = [1, 65_536].map(many_flows);
    for flows in few_or_many_flows {
        for (name, packets) in ways {
            plans.push(gateway(
                &format!("{name}, DNAT"),
                Gateway { flows, ..dnat },
                packets,
            ));
            plans.push(gateway(
                &format!("{name}, full NAT, IPv6"),
                Gateway { flows, ..v6 },
                packets,
            ));
        }
    }
    let tunnels = [
        ("VXLAN", false),
        ("VXLAN", true),
        ("Geneve", false),
        ("GRE", false),
        ("GRETAP", false),
        ("IPIP", false),
        ("GUE", false),
        ("FOU", false),
    ];
    // Without a checksum outside, which the generator would have to write anew for each flow.
    let tunnel_of_many = Way::Tunnel("GRE", false);
    // Each one loads the data path anew, which takes a second.
    let tunnels = effort.pick(&tunnels[..], &tunnels[..1]);
    for &(tunnel, is_v6) in tunnels {
        let way = Way::Tunnel(tunnel, is_v6);
        let over = if is_v6 { " over IPv6" } else { "" };
        // One shows what many flows cost, as the same stages write all of them.
        let flows = if way == tunnel_of_many {
            &few_or_many_flows[..]
        } else {
            &[1]
        };
        for &flows in flows {
            for ((_, packets), how) in ways.into_iter().zip(["request into", "reply out of"]) {
                let tunnelled = Gateway { way, flows, ..plain };
                plans.push(gateway(&format!("{how} {tunnel}{over}"), tunnelled, packets));
            }
        }
    }
    let many = Gateway {
        flows: many_flows(65_536),
        ..plain
    };
    let few_or_many = |few: u32| [few, effort.pick(10_000, SHORT_OTHERS)];
    for listeners in few_or_many(1) {
        let name = format!("request, full NAT, listeners: {listeners}");
        plans.push(gateway(&name, Gateway { listeners, ..many }, Packets::Request));
    }
    for backends in few_or_many(8) {
        let name = format!("request, full NAT, backends: {backends}");
        plans.push(gateway(&name, Gateway { backends, ..many }, Packets::Request));
    }
    for (keys, program, inserts, all, way) in [
        (
            "one key",
            "bench_insert_key",
            "one key and its entry",
            "bench_insert",
            Way::FullNat,
        ),
        (
            "two keys",
            "bench_insert_keys",
            "two keys and its entry",
            "bench_insert_two",
            Way::Dnat,
        ),
    ] {
        for (what, program) in [(keys, program), (inserts, all)] {
            let name = format!("inserts of a flow with {what}");
            plans.push(floor(&name, program, many_flows(MOST_FLOWS), true));
        }
        let new = Gateway {
            flows: many_flows(MOST_FLOWS),
            way,
            ..plain
        };
        if way == Way::Dnat {
            plans.push(gateway("new flow, DNAT", new, Packets::Opening));
            continue;
        }
        for (name, new) in [
            ("new flow, full NAT", new),
            (
                "new flow, full NAT, which asks for its way",
                Gateway { asks: true, ..new },
            ),
            ("new flow, full NAT, IPv6", Gateway { is_v6: true, ..new }),
        ] {
            plans.push(gateway(name, new, Packets::Opening));
        }
    }
    for (name, packets) in [
        ("SYN while no flow is free", Packets::Refused),
        ("to a VIP's port without a listener", Packets::NoListener),
        (NOT_OURS, Packets::Others),
    ] {
        plans.push(gateway(name, plain, packets));
    }
    plans.push(gateway(
        &format!("{NOT_OURS}, beside a group in DNAT"),
        dnat,
        Packets::Others,
    ));
    plans
}

/// Those whose names have `only` in them, and the first floor.
fn subjects(object: &Path, only: &str, effort: Effort) -> Result<Vec<Subject>> {
    plans(effort)
        .into_iter()
        .filter(|(name, plan)| name.contains(only) || matches!(plan, Plan::Floor("bench_minimal", 1, _)))
        .map(|(name, plan)| match plan {
            Plan::Floor(program, flows, is_opening) => {
                floor(object, &name, program, flows, is_opening, effort)
            }
            Plan::Gateway(of, packets) => gateway(object, &name, of, packets, effort),
        })
        .collect()
}

fn measure(object: &Path, only: &str, effort: Effort) -> Result<Measured> {
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    let mut subjects = subjects(object, only, effort)?;
    let extent = Extent::of(effort);
    eprintln!("{} trials of each ...", extent.trials);
    let costs = in_turns(&mut subjects, extent.trials, Subject::trial)?;
    let mut results = Vec::new();
    for (subject, costs) in subjects.into_iter().zip(costs) {
        let spread = |of: fn(&Cost) -> f64| Spread::of(costs.iter().map(of).collect()).context("no trial");
        results.push(Judged {
            own: spread(|cost| cost.own)?,
            nothing: spread(|cost| cost.nothing)?,
            subject,
        });
    }
    Ok(report(&results, extent))
}

/// What became of a subject.
struct Judged {
    subject: Subject,
    own: Spread,
    nothing: Spread,
}

/// The name of a figure.
pub fn figure(name: &str, flows: u32) -> String {
    format!("{name} @ {flows}")
}

fn report(results: &[Judged], extent: Extent) -> Measured {
    let mut measured = Measured::default();
    let floors: BTreeMap<u32, f64> = results
        .iter()
        .filter(|result| result.subject.floor == Some("bench_minimal"))
        .map(|result| (result.subject.gateway.flows, result.own.median))
        .collect();
    let mut inserts = None;
    let mut rows = Vec::new();
    for Judged {
        subject,
        own,
        nothing,
    } in results
    {
        if rows.is_empty() {
            rows.push([
                "empty program with what stands in front of it, subtracted below".to_owned(),
                "1".to_owned(),
                format!("{:.0}", nothing.median),
                format!("{:.0} to {:.0}", nothing.least, nothing.most),
                String::new(),
            ]);
        }
        let flows = subject.gateway.flows;
        if subject.is_opening && subject.floor.is_some() {
            inserts = Some(own.median);
        }
        let reference = if subject.is_opening {
            inserts
        } else {
            floors.get(&flows).copied()
        };
        measured.figure(&figure(&subject.name, flows), own.median);
        rows.push([
            subject.name.clone(),
            flows.to_string(),
            format!("{:.0}", own.median),
            format!("{:.0} to {:.0}", own.least, own.most),
            reference.map_or_else(String::new, |reference| format!("{:.2}", own.median / reference)),
        ]);
    }
    measured.tables.push(Table::new(
        &format!(
            "{} trials of {} packets or more, by turns, on one CPU; net of an empty program. The ratio is to the minimal \
             program with as many flows, for new flows to their inserts.",
            extent.trials, extent.run
        ),
        ["packets", "flows", "ns, median", "min to max", "ratio"],
        rows,
    ));
    measured.plots = plots(results);
    measured
}

fn plots(results: &[Judged]) -> Vec<Plot> {
    let lines = [MINIMAL, "request, full NAT", "reply, full NAT"].map(|name| Line {
        label: name.to_owned(),
        points: results
            .iter()
            .filter(|result| result.subject.name == name)
            .map(|result| (f64::from(result.subject.gateway.flows), result.own))
            .collect(),
    });
    let bars = results
        .iter()
        .filter(|result| result.subject.gateway.flows == 1 && !result.subject.is_opening)
        .map(|result| Bar {
            label: result.subject.name.clone(),
            colour: usize::from(result.subject.kernel.is_some()),
            spread: result.own,
        });
    vec![
        Plot {
            name: "bench-flows".to_owned(),
            title: "A packet of an established flow, by the number of flows".to_owned(),
            unit: "ns per packet".to_owned(),
            kind: PlotKind::Lines("flows".to_owned(), lines.to_vec()),
        },
        Plot {
            name: "bench-packets".to_owned(),
            title: "A packet while there is one flow".to_owned(),
            unit: "ns per packet".to_owned(),
            kind: PlotKind::Bars(bars.collect()),
        },
    ]
}
