//! Sequences of packets as bytes: what fuzzers change, and what the comparison of library and kernel draws at random.
//!
//! Any bytes are a script, so no change is for nothing; and every packet case is one (`of_case`), and what real clients have
//! sent (`cases::recorded`): so what is changed are packets that mean something, in tables where they do. A script names the
//! case whose tables it begins with, and then has steps: frames as they stand there; and packets made of earlier ones, which have the addresses and ports of flows
//! there are: their repetition, the answer to what left, ICMP errors about that, the pieces of a packet in any order.
//!
//! ```text
//! case     4 bytes   what its sentence, or a recording's name, sums up to
//! step     kind, then up to 4 bytes; a frame: way, length (2 bytes, little-endian), bytes
//! ```

use std::{collections::HashMap, net::IpAddr, sync::LazyLock};

use forwarder_common::datapath::{Action, Outcome};

use rand::{RngExt as _, rngs::StdRng};

use crate::{
    cases::{
        self, Case, Event,
        recorded::{Recording, recordings},
    },
    invariants::{Arrival, turned_back},
    layers::{self, Layer, protocol},
    packet::{Builder, crc32c, fold, segment, sum},
    tables::{CLIENT_SIDE, LINKS, MemoryTables, Program},
};

/// Packets that one script sends at most.
const MOST_PACKETS: usize = 200;
/// Bytes of a frame: below what BPF_PROG_TEST_RUN takes, with room for what tunnels add.
const MOST_BYTES: usize = 3400;

/// The tables that scripts begin with, in the order of their numbers.
static CONTEXTS: LazyLock<Vec<Context>> = LazyLock::new(|| {
    let cases = cases::with_twins().into_iter().map(Context::of_case);
    let recordings = recordings();
    let recorded = recordings.iter().flat_map(Context::of_recording);
    let mut contexts: Vec<Context> = cases.chain(recorded).collect();
    contexts.sort_by_key(|context| context.number);
    contexts
});
/// Of these, what was recorded.
static RECORDED: LazyLock<Vec<&Context>> =
    LazyLock::new(|| CONTEXTS.iter().filter(|context| context.is_recorded).collect());
/// One of so many scripts is of a recording, of which there are few.
const RECORDED_SHARE: u32 = 8;

/// A case with its number, or a recording.
struct Context {
    number: u32,
    name: String,
    world: MemoryTables,
    steps: Vec<Step>,
    changes: Vec<fn(&mut MemoryTables)>,
    /// UDP ports that mean a tunnel.
    ports: Vec<u16>,
    /// There is something in it that a run in the kernel cannot show.
    is_library_only: bool,
    is_recorded: bool,
}

impl Context {
    fn of_case(case: Case) -> Self {
        let changes = case.events.iter().filter_map(|event| match event {
            Event::Change(change) => Some(*change),
            Event::Packet(_) => None,
        });
        Self {
            number: number_of(&case.sentence),
            steps: steps_of(&case),
            changes: changes.collect(),
            ports: case.world.tunnel_ports.keys().copied().collect(),
            is_library_only: case.library_only.is_some(),
            is_recorded: false,
            name: case.sentence,
            world: case.world,
        }
    }

    /// In native and in generic XDP.
    fn of_recording(recording: &Recording) -> [Self; 2] {
        [(Program::Native, ""), (Program::Generic, " (generic XDP)")].map(|(program, mode)| {
            let Recording { name, world, frames } = recording.clone();
            let name = name + mode;
            let way = Way::of(program, CLIENT_SIDE.ifindex);
            let frames = frames.into_iter().map(|frame| Step::Frame { way, frame });
            Self {
                number: number_of(&name),
                name,
                world,
                steps: frames.collect(),
                changes: Vec::new(),
                ports: Vec::new(),
                is_library_only: false,
                is_recorded: true,
            }
        })
    }

    fn script(&self) -> Script {
        Script {
            number: self.number,
            steps: self.steps.clone(),
        }
    }

    /// The one with this number, or the next: so scripts mean the same when cases come and go.
    fn get(number: u32) -> &'static Self {
        let at = CONTEXTS.partition_point(|context| context.number < number);
        &CONTEXTS[at % CONTEXTS.len()]
    }
}

fn number_of(name: &str) -> u32 {
    crc32c(name.as_bytes())
}

fn steps_of(case: &Case) -> Vec<Step> {
    let mut changes = 0;
    let steps = case.events.iter().map(|event| match event {
        Event::Packet(step) => Step::Frame {
            way: Way::of(step.program, step.ifindex),
            frame: step.frame.clone(),
        },
        Event::Change(_) => {
            changes += 1;
            Step::Change(changes - 1)
        }
    });
    steps.collect()
}

/// What steps a script may have: which of its bytes mean which.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kinds {
    /// All, mostly frames as they stand there.
    All,
    /// Mostly ICMP errors about packets that have left.
    Errors,
    /// Mostly pieces of packets.
    Pieces,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Step {
    Frame {
        way: u8,
        frame: Vec<u8>,
    },
    /// An earlier frame again, with this byte changed at this place, or not.
    Again {
        which: u8,
        at: u16,
        byte: u8,
    },
    /// The answer to what an earlier packet became, by `way`; of TCP with other flags.
    Answer {
        which: u8,
        flags: u8,
        way: u8,
    },
    /// An ICMP error about what an earlier packet became: type and code, how much is quoted.
    Error {
        which: u8,
        kind: u8,
        len: u8,
        rest: u8,
    },
    /// The pieces of an earlier frame: how large, in which order, which of them.
    Pieces {
        which: u8,
        size: u8,
        order: u8,
        mask: u8,
    },
    /// Somebody else writes the tables, as in the case.
    Change(u8),
}

/// Tables and what happens to them.
#[derive(Clone, Debug)]
pub struct Script {
    number: u32,
    steps: Vec<Step>,
}

impl Script {
    /// The script that any bytes are.
    pub fn read(bytes: &[u8], kinds: Kinds) -> Self {
        let mut reader = Reader(bytes);
        let number = u32::from_le_bytes(reader.array());
        let mut steps = Vec::new();
        while !reader.0.is_empty() && steps.len() < MOST_PACKETS {
            steps.push(reader.step(kinds));
        }
        Self { number, steps }
    }

    /// Its bytes, for any [`Kinds`].
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.number.to_le_bytes().to_vec();
        for step in &self.steps {
            match step {
                Step::Frame { way, frame } => {
                    bytes.extend([0, *way]);
                    bytes.extend((frame.len() as u16).to_le_bytes());
                    bytes.extend(frame);
                }
                Step::Answer { which, flags, way } => bytes.extend([1, *which, *flags, *way]),
                Step::Again { which, at, byte } => {
                    bytes.extend([2, *which]);
                    bytes.extend(at.to_le_bytes());
                    bytes.push(*byte);
                }
                Step::Error {
                    which,
                    kind,
                    len,
                    rest,
                } => bytes.extend([4, *which, *kind, *len, *rest]),
                Step::Pieces {
                    which,
                    size,
                    order,
                    mask,
                } => bytes.extend([5, *which, *size, *order, *mask]),
                Step::Change(index) => bytes.extend([CHANGE, *index]),
            }
        }
        bytes
    }

    /// The script of a packet case.
    pub fn of_case(case: &Case) -> Self {
        Self {
            number: number_of(&case.sentence),
            steps: steps_of(case),
        }
    }

    /// The scripts of what real clients have sent.
    pub fn recorded() -> Vec<Self> {
        RECORDED.iter().map(|context| context.script()).collect()
    }

    /// The same before steps that seldom are in cases: some of what has left is answered, reported and cut.
    pub fn of_case_and(case: &Case, kinds: Kinds) -> Self {
        let mut script = Self::of_case(case);
        for which in 0..case.events.len().min(4) as u8 {
            script.steps.push(Step::Answer {
                which,
                flags: segment::SYN_ACK,
                way: 4,
            });
            match kinds {
                Kinds::All => {}
                Kinds::Errors => script.steps.push(Step::Error {
                    which,
                    kind: which * 3,
                    len: 28 + which * 40,
                    rest: 0,
                }),
                Kinds::Pieces => script.steps.push(Step::Pieces {
                    which,
                    size: 3,
                    order: which,
                    mask: 0,
                }),
            }
        }
        script
    }

    /// The tables that it begins with.
    pub fn world(&self) -> MemoryTables {
        Context::get(self.number).world.clone()
    }

    /// Is there something in the case that a run in the kernel cannot show?
    pub fn is_library_only(&self) -> bool {
        Context::get(self.number).is_library_only
    }

    /// Does each thing in turn: `forward` is given packets and the numbers of their groups, of which pieces of one packet
    /// share one, and says what became of them, or that they were left out; `change` is given changes.
    pub fn play(
        &self,
        mut forward: impl FnMut(&Arrival, Option<usize>) -> Option<(Outcome, Vec<u8>)>,
        mut change: impl FnMut(fn(&mut MemoryTables)),
    ) {
        let context = Context::get(self.number);
        let mut past: Vec<Past> = Vec::new();
        for (group, step) in self.steps.iter().enumerate() {
            if let Step::Change(index) = step {
                if !context.changes.is_empty() {
                    change(context.changes[usize::from(*index) % context.changes.len()]);
                }
                continue;
            }
            let is_in_pieces = matches!(step, Step::Pieces { .. });
            for arrival in step.arrivals(context, &past) {
                if past.len() >= MOST_PACKETS {
                    return;
                }
                if let Some((outcome, out)) = forward(&arrival, is_in_pieces.then_some(group)) {
                    past.push(Past {
                        arrival,
                        outcome,
                        out,
                    });
                }
            }
        }
    }

    /// For a look at it.
    pub fn describe(&self) -> String {
        let mut text = format!("tables of {:?}", Context::get(self.number).name);
        for step in &self.steps {
            text += &match step {
                Step::Frame { way, frame } => format!("\n  way {way:#04x}, frame {frame:02x?}"),
                other => format!("\n  {other:x?}"),
            };
        }
        text
    }

    /// The shortest that still fails, of those that lack some steps.
    pub fn shrunk(mut self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        let mut at = self.steps.len();
        while at > 0 {
            at -= 1;
            let mut shorter = self.clone();
            shorter.steps.remove(at);
            if fails(&shorter) {
                self = shorter;
            }
        }
        self
    }

    /// A script of a packet case or a recording, changed at random.
    pub fn random(rng: &mut StdRng) -> Self {
        any_context(rng).script().changed_again(rng)
    }

    /// The same tables, and the steps of the same case changed otherwise: a little, or made many.
    #[must_use]
    pub fn changed_again(&self, rng: &mut StdRng) -> Self {
        let mut script = Context::get(self.number).script();
        let most = if rng.random_range(0..4) == 0 { 4 } else { 120 };
        for _ in 0..rng.random_range(0..most) {
            script.change(&any_context(rng).steps, rng);
        }
        script
    }

    /// One change at random; `others` are steps that may be put in.
    fn change(&mut self, others: &[Step], rng: &mut StdRng) {
        let at = rng.random_range(0..=self.steps.len());
        let byte = |rng: &mut StdRng| rng.random::<u8>();
        match rng.random_range(0..20) {
            0 => {
                let other = others[rng.random_range(0..others.len())].clone();
                self.steps.insert(at, other);
            }
            1 if !self.steps.is_empty() => {
                let twice = self.steps[rng.random_range(0..self.steps.len())].clone();
                self.steps.insert(at, twice);
            }
            2 if self.steps.len() > 1 => {
                let last = self.steps.len() - 1;
                self.steps.remove(at.min(last));
            }
            3 if self.steps.len() > 1 => {
                let last = self.steps.len() - 1;
                self.steps.swap(at.min(last), rng.random_range(0..=last));
            }
            4..=6 => {
                let flags = [
                    segment::SYN_ACK,
                    segment::ACK,
                    segment::ACK,
                    segment::FIN,
                    segment::RST,
                    byte(rng),
                ];
                let step = Step::Answer {
                    which: byte(rng),
                    flags: flags[rng.random_range(0..flags.len())],
                    way: byte(rng) & 0x0f,
                };
                self.steps.insert(at, step);
            }
            7 | 8 => {
                let step = Step::Again {
                    which: byte(rng),
                    at: rng.random_range(0..80) | u16::from(rng.random::<bool>()) << 15,
                    byte: byte(rng),
                };
                self.steps.insert(at, step);
            }
            9 | 10 => {
                let step = Step::Error {
                    which: byte(rng),
                    kind: byte(rng),
                    len: byte(rng),
                    rest: byte(rng),
                };
                self.steps.insert(at, step);
            }
            11 => {
                let step = Step::Pieces {
                    which: byte(rng),
                    size: byte(rng),
                    order: byte(rng),
                    mask: if rng.random::<bool>() { 0 } else { byte(rng) },
                };
                self.steps.insert(at, step);
            }
            _ => {
                let count = self.steps.len().max(1);
                if let Some(Step::Frame { way, frame }) = self.steps.get_mut(at % count) {
                    if rng.random_range(0..8) == 0 {
                        *way = byte(rng) & 0x1f;
                    }
                    if rng.random::<bool>() {
                        *way |= Way::REPAIRED;
                    }
                    let other = match &others[rng.random_range(0..others.len())] {
                        Step::Frame { frame, .. } => frame.as_slice(),
                        _ => &[],
                    };
                    damage(frame, other, rng);
                }
            }
        }
    }
}

fn any_context(rng: &mut StdRng) -> &'static Context {
    if rng.random_range(0..RECORDED_SHARE) == 0 {
        RECORDED[rng.random_range(0..RECORDED.len())]
    } else {
        &CONTEXTS[rng.random_range(0..CONTEXTS.len())]
    }
}

/// Changes a frame: bits, length fields, its end, or its headers for those of another frame.
fn damage(frame: &mut Vec<u8>, other: &[u8], rng: &mut StdRng) {
    if frame.is_empty() {
        return;
    }
    let near = |rng: &mut StdRng, len: usize| {
        let most = if rng.random_range(0..4) == 0 {
            len
        } else {
            len.min(80)
        };
        rng.random_range(0..most)
    };
    let at = near(rng, frame.len());
    match rng.random_range(0..8) {
        0 | 1 => frame[at] ^= 1 << rng.random_range(0..8),
        2 => frame[at] = rng.random(),
        3 => frame.truncate(at),
        4 => {
            let more = rng.random_range(1..64);
            frame.resize(frame.len() + more, rng.random());
        }
        5 => {
            // Lengths of IPv4, of IPv6, and of UDP behind either.
            let place = [16, 18, 38, 58][rng.random_range(0..4)];
            if place + 1 < frame.len() {
                let value = i32::from(frame[place + 1]) + rng.random_range(-9..9);
                frame[place + 1] = value as u8;
            }
        }
        6 if !other.is_empty() => {
            let until = at.min(other.len());
            frame[..until].copy_from_slice(&other[..until]);
        }
        _ => {
            let from = near(rng, frame.len());
            let byte = frame[from];
            frame[at] = byte;
        }
    }
}

/// A packet of the script, and what became of it.
struct Past {
    arrival: Arrival,
    outcome: Outcome,
    out: Vec<u8>,
}

impl Past {
    /// Where what became of it is answered from.
    fn far_side(&self, way: u8) -> u32 {
        match self.outcome.verdict.action {
            Action::Redirect => self.outcome.verdict.ifindex,
            Action::Transmit => self.arrival.ifindex,
            Action::Pass | Action::Drop => Way(way).ifindex(),
        }
    }
}

/// Program, interface, and whether checksums are made right, in a byte.
#[derive(Clone, Copy)]
struct Way(u8);

impl Way {
    const REPAIRED: u8 = 0x10;

    fn of(program: Program, ifindex: u32) -> u8 {
        let program = match program {
            Program::Native => 0,
            Program::Generic => 1,
            Program::Tunnel => 2,
        };
        let link = LINKS.iter().position(|link| link.ifindex == ifindex).unwrap_or(0);
        program | (link as u8) << 2
    }

    fn program(self) -> Program {
        match self.0 & 3 {
            1 => Program::Generic,
            2 => Program::Tunnel,
            _ => Program::Native,
        }
    }

    fn ifindex(self) -> u32 {
        LINKS[usize::from(self.0 >> 2 & 3)].ifindex
    }

    fn arrival(self, mut frame: Vec<u8>, ports: &[u16]) -> Arrival {
        frame.truncate(MOST_BYTES);
        if self.0 & Self::REPAIRED != 0 {
            frame = layers::repaired(frame, ports);
        }
        Arrival {
            program: self.program(),
            ifindex: self.ifindex(),
            frame,
        }
    }
}

/// Kinds of steps as bytes; modulo a number that the kinds of scripts decide.
const CHANGE: u8 = 6;

struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, len: usize) -> &'b [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Zeros where there is nothing left.
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.take(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    fn step(&mut self, kinds: Kinds) -> Step {
        let [kind] = self.array();
        // The first seven numbers mean the same everywhere, so that seeds do.
        let kind = match (kind % 16, kinds) {
            (kind @ 0..=6, _) => kind,
            (7 | 8, _) => 1,
            (9, _) => 2,
            (_, Kinds::All) => 0,
            (_, Kinds::Errors) => 4,
            (_, Kinds::Pieces) => 5,
        };
        match kind {
            1 | 3 => {
                let [which, flags, way] = self.array();
                Step::Answer { which, flags, way }
            }
            2 => {
                let [which, low, high, byte] = self.array();
                let at = u16::from_le_bytes([low, high]);
                Step::Again { which, at, byte }
            }
            4 => {
                let [which, kind, len, rest] = self.array();
                Step::Error {
                    which,
                    kind,
                    len,
                    rest,
                }
            }
            5 => {
                let [which, size, order, mask] = self.array();
                Step::Pieces {
                    which,
                    size,
                    order,
                    mask,
                }
            }
            CHANGE => {
                let [index] = self.array();
                Step::Change(index)
            }
            _ => {
                let [way, low, high] = self.array();
                let len = usize::from(u16::from_le_bytes([low, high]));
                let frame = self.take(len).to_vec();
                Step::Frame { way, frame }
            }
        }
    }
}

impl Step {
    fn arrivals(&self, context: &Context, past: &[Past]) -> Vec<Arrival> {
        let ports = &context.ports;
        let earlier = |which: u8| past.get(usize::from(which) % past.len().max(1));
        match self {
            Self::Frame { way, frame } => vec![Way(*way).arrival(frame.clone(), ports)],
            Self::Again { which, at, byte } => earlier(*which)
                .map(|past| past.arrival.again(*at, *byte, ports))
                .into_iter()
                .collect(),
            Self::Answer { which, flags, way } => earlier(*which)
                .and_then(|past| answer(past, *flags, *way))
                .into_iter()
                .collect(),
            Self::Error {
                which,
                kind,
                len,
                rest,
            } => earlier(*which)
                .and_then(|past| error(past, *kind, *len, *rest))
                .into_iter()
                .collect(),
            Self::Pieces {
                which,
                size,
                order,
                mask,
            } => earlier(*which).map_or_else(Vec::new, |past| pieces(&past.arrival, *size, *order, *mask)),
            Self::Change(_) => Vec::new(),
        }
    }
}

impl Arrival {
    /// With one byte changed, where the place is in the frame, and right checksums if the byte's place is odd twice over.
    fn again(&self, at: u16, byte: u8, ports: &[u16]) -> Self {
        let mut again = self.clone();
        if let Some(place) = again.frame.get_mut(usize::from(at & 0x0fff)) {
            *place = byte;
        }
        if at & 0x8000 != 0 {
            again.frame = layers::repaired(again.frame, ports);
        }
        again
    }
}

/// TCP flags, or the chunk that does the same, of the answer to what left.
fn answer(past: &Past, flags: u8, way: u8) -> Option<Arrival> {
    let left = layers::outermost(&past.out)?;
    let mut frame = match left.ends(&past.out) {
        Some(_) => turned_back(&past.out, &left)?,
        None => echo_turned_back(&past.out, &left)?,
    };
    let byte = match left.protocol {
        protocol::TCP => Some(13),
        protocol::SCTP => Some(12),
        _ => None,
    };
    if let Some(byte) = byte
        && let Some(place) = frame.get_mut(left.transport + byte)
    {
        *place = flags;
        left.repair(&mut frame);
    }
    Some(Arrival {
        program: Way(way).program(),
        ifindex: past.far_side(way),
        frame,
    })
}

/// The reply to an echo request.
fn echo_turned_back(frame: &[u8], layer: &Layer) -> Option<Vec<u8>> {
    let kind = match (layer.protocol, frame.get(layer.transport)?) {
        (protocol::ICMP, 8) => 0,
        (protocol::ICMPV6, 128) => 129,
        _ => return None,
    };
    let mut back = frame.to_vec();
    back[layer.transport] = kind;
    let (address, len) = if layer.is_v4 { (12, 4) } else { (8, 16) };
    for index in 0..len {
        back.swap(layer.start + address + index, layer.start + address + len + index);
    }
    layer.repair(&mut back);
    Some(back)
}

/// An ICMP error about a packet as it left, of the packet's family.
fn error(past: &Past, kind: u8, len: u8, rest: u8) -> Option<Arrival> {
    let layer = layers::outermost(&past.out)?;
    let [source, destination] = layer.addresses(&past.out);
    let packet = &past.out[layer.start..layer.end];
    // Little, or as much as there may be.
    let len = match len {
        0xff => packet.len(),
        len => usize::from(len) * 2,
    };
    let quoted = &packet[..len.min(packet.len()).min(1400)];
    // The packet's destination reports, or somebody on the way.
    let reporter: IpAddr = match (kind & 0x80 != 0, source) {
        (false, _) => destination,
        (true, IpAddr::V4(_)) => [172, 17, 0, 205].into(),
        (true, IpAddr::V6(_)) => crate::tables::in_v6([172, 17, 0, 205].into()).into(),
    };
    let types: &[u8] = if layer.is_v4 {
        &[3, 11, 12, 3, 4]
    } else {
        &[1, 2, 3, 4, 2]
    };
    let code = if kind & 0x40 != 0 {
        kind >> 1 & 0x0f
    } else {
        kind >> 3 & 3
    };
    let frame = Builder::icmp(types[usize::from(kind) % types.len()], code, reporter, source)
        .payload_of(quoted)
        .icmp_rest(u32::from(rest) * 8)
        .build();
    Some(Arrival {
        program: Way(rest & 1).program(),
        ifindex: past.far_side(past.out.len() as u8),
        frame,
    })
}

/// The pieces of a frame's packet, of `size` times eight bytes: in order, turned round, or the first last; without some.
fn pieces(arrival: &Arrival, size: u8, order: u8, mask: u8) -> Vec<Arrival> {
    let frame = &arrival.frame;
    let Some(layer) = layers::outermost(frame).filter(|layer| layer.piece.is_none()) else {
        return Vec::new();
    };
    let size = usize::from(size % 64 + 1) * 8;
    let segment = layer.segment(frame);
    let count = segment.len().div_ceil(size).min(16);
    let identification = u32::from(order) << 8 | u32::from(size as u8);
    let mut pieces: Vec<Vec<u8>> = (0..count)
        .map(|index| {
            let is_last = index + 1 == count;
            let end = if is_last {
                segment.len()
            } else {
                (index + 1) * size
            };
            piece(frame, &layer, index * size..end, !is_last, identification)
        })
        .collect();
    match order & 3 {
        1 => pieces.reverse(),
        2 => pieces.rotate_left(1.min(count)),
        3 => pieces.extend_from_within(..),
        _ => {}
    }
    let kept = pieces.into_iter().enumerate();
    kept.filter(|(index, _)| mask >> (index % 8) & 1 == 0)
        .map(|(_, frame)| Arrival {
            frame,
            ..arrival.clone()
        })
        .collect()
}

/// One piece of a packet: of IPv4 with its options, of IPv6 with a fragment header behind all that it has.
fn piece(
    frame: &[u8],
    layer: &Layer,
    range: std::ops::Range<usize>,
    more: bool,
    identification: u32,
) -> Vec<u8> {
    let mut piece = frame[..layer.transport].to_vec();
    let part = &layer.segment(frame)[range.clone()];
    if layer.is_v4 {
        let ip = &mut piece[layer.start..];
        let total_len = ip.len() + part.len();
        ip[2..4].copy_from_slice(&(total_len as u16).to_be_bytes());
        ip[4..6].copy_from_slice(&(identification as u16).to_be_bytes());
        let field = (range.start / 8) as u16 | u16::from(more) << 13;
        ip[6..8].copy_from_slice(&field.to_be_bytes());
        ip[10..12].fill(0);
        let checksum = !fold(sum(ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        // The number of the transport header stands in the last header before it.
        let mut at = layer.start + 6;
        let mut next = layer.start + 40;
        while next < layer.transport {
            at = next;
            next += (usize::from(piece[next + 1]) + 1) * 8;
        }
        let protocol = std::mem::replace(&mut piece[at], protocol::FRAGMENT);
        piece.extend([protocol, 0]);
        piece.extend((range.start as u16 | u16::from(more)).to_be_bytes());
        piece.extend(identification.to_be_bytes());
        let payload_len = piece.len() - layer.start - 40 + part.len();
        piece[layer.start + 4..layer.start + 6].copy_from_slice(&(payload_len as u16).to_be_bytes());
    }
    piece.extend(part);
    piece
}

/// The packet that pieces make up; `None`: they overlap, or some are missing. The frame has the first piece's headers.
pub fn reassembled(pieces: &[&[u8]]) -> Option<(Layer, Vec<u8>)> {
    let mut parts: HashMap<usize, &[u8]> = HashMap::new();
    let (mut first, mut end) = (None, None);
    for frame in pieces {
        let layer = layers::outermost(frame)?;
        let (offset, more) = layer.piece?;
        let segment = layer.segment(frame);
        if parts
            .insert(offset, segment)
            .is_some_and(|before| before != segment)
        {
            return None;
        }
        if offset == 0 {
            first = Some((layer, frame));
        }
        if !more {
            end = Some(offset + segment.len());
        }
    }
    let ((layer, frame), end) = (first?, end?);
    let mut whole = Vec::new();
    while whole.len() < end {
        whole.extend(*parts.get(&whole.len()).filter(|part| !part.is_empty())?);
    }
    if whole.len() != end {
        return None;
    }
    let mut packet = frame[..layer.transport].to_vec();
    packet.extend(&whole);
    let layer = Layer {
        piece: None,
        end: packet.len(),
        ..layer
    };
    Some((layer, packet))
}
