//! Ring 3: floods, at the highest rate that one CPU makes, while 10 000 connections are used. `--test-threads=1`, as the
//! other labs.
//!
//! Frames are made by a program in XDP (`tests/ebpf`), each with another source and number, on a link of their own. No
//! connection may be lost or answered wrongly, the gateway's memory stays as it is, new clients get in or are refused for
//! the reason that the metrics name, and those name every frame of the flood.
//!
//! The generator runs on CPU 0. What is left of all CPUs to the connections is the time that their processes had
//! (`/proc/…/schedstat`) and the time that nobody had (`idle` in `/proc/stat`); neither the flood's nor other programs' of the
//! machine is among it. Answers per second during the flood, divided by those before it, must be above half of the same
//! quotient of what was left; and of the CPUs without a generator, it has to be left enough.
//!
//! `FORWARDER_FLOODS_SECONDS` says how long each flood lasts. All come to listeners without keys against floods but a limit for
//! UDP; those that the keys are about come again to listeners with SYN cookies and a rate of new flows for each source prefix.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::{
    Ebpf,
    maps::Array,
    programs::{Program, TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use bytemuck::Zeroable as _;
use forwarder_bench_ebpf::{FLOOD_BYTES, Flood};
use forwarder_tests::{
    bench::frames,
    lab::{
        self, Lab, Lifetime, Namespace,
        agent::{self, Agent, ShowLog},
        configuration::Configuration,
        crowd::{Clients, Servers},
        status::Metrics,
    },
    packet::{Builder, Mac, segment},
};
use forwarder_user::datapath::pod::AsPod;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, gettid},
};

const CROWD: &str = env!("CARGO_BIN_EXE_crowd");
/// The generator's object, which `cargo xtask test` builds.
const OBJECT: &str = "BENCH_OBJECT";
const CONNECTIONS: usize = 10_000;
/// Clients that come during a flood.
const NEWCOMERS: usize = 20;
/// Four times the connections.
const MAX_FLOWS: u32 = 40_960;
const VIP: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 250);
const WEB_PORT: u16 = 80;
const DNS_PORT: u16 = 53;
const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 10);
const ATTACKER: Ipv4Addr = Ipv4Addr::new(172, 19, 0, 10);
/// Sources of the floods, routed to the attacker.
const SOURCES: u32 = 10 << 24;
const SOURCE_BITS: u32 = (1 << 24) - 1;
/// Frames that the kernel makes at once, and in one call.
const BATCH: u32 = 64;
const CALL: u32 = 20_000;
/// How long the connections are measured before and after each flood.
const REST: Duration = Duration::from_secs(3);
/// More than half of what is left.
const SHARE: f64 = 0.5;
/// Of what was left before a flood: of two CPUs, most of the one that makes no frames.
const LEFT: f64 = 0.3;

/// Keys of the listeners that are flooded, and what becomes of those floods that they are about.
struct Variant {
    name: &'static str,
    kinds: &'static [Kind],
    web_keys: &'static str,
    dns_keys: &'static str,
    ack_reasons: &'static [&'static str],
    udp_reasons: &'static [&'static str],
    syn_reasons: &'static [&'static str],
    /// Whether a SYN flood leaves flows for newcomers.
    leaves_room: bool,
}

const VARIANTS: [Variant; 2] = [
    Variant {
        name: "plain",
        kinds: &KINDS,
        web_keys: "",
        // UDP has no handshake that would keep a flood out of the table: a limit does.
        dns_keys: "max_flows = 2000\n",
        ack_reasons: &["not_a_syn"],
        udp_reasons: &["listener_limit"],
        syn_reasons: &["flow_table_full"],
        leaves_room: false,
    },
    Variant {
        name: "guarded",
        kinds: &[Kind::Ack, Kind::Udp, Kind::Syn],
        // The crowd's own connections are more than that, too.
        web_keys: "syn_cookies = 500\n",
        // All sources of the flood are of one prefix.
        dns_keys: "source_rate = 500\nsource_prefix = 8\n",
        // The crowd has come by cookies: each acknowledgment may be one.
        ack_reasons: &["not_a_syn", "syn_cookie_invalid"],
        udp_reasons: &["source_rate"],
        syn_reasons: &["syn_cookie_sent"],
        leaves_room: true,
    },
];

/// A kind of flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ack,
    Echo,
    IcmpErrors,
    Fragments,
    Udp,
    /// The last one: without cookies, what it holds of the table is held for longer than the test takes.
    Syn,
}

const KINDS: [Kind; 6] = [
    Kind::Ack,
    Kind::Echo,
    Kind::IcmpErrors,
    Kind::Fragments,
    Kind::Udp,
    Kind::Syn,
];

impl Kind {
    /// A frame without its source and its number; where the number stands; whether IP's checksum covers it, and whether the
    /// other one covers the address and the number.
    fn flood(self, link: (Mac, Mac)) -> (Builder, u32, [u32; 3]) {
        const IDENTIFICATION: u32 = 14 + 4;
        const PORT: u32 = 14 + 20;
        const IDENTIFIER: u32 = 14 + 20 + 4;
        /// The destination's port of the packet inside of an error.
        const INNER_PORT: u32 = 14 + 20 + 8 + 20 + 2;
        let source = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        let web = SocketAddrV4::new(VIP, WEB_PORT);
        let dns = SocketAddrV4::new(VIP, DNS_PORT);
        let (builder, number, covered) = match self {
            Self::Ack => (Builder::tcp(segment::ACK, source, web), PORT, [0, 1, 1]),
            Self::Syn => (Builder::tcp(segment::SYN, source, web), PORT, [0, 1, 1]),
            Self::Udp => (Builder::udp(source, dns).payload(32), PORT, [0, 1, 1]),
            Self::Echo => (
                Builder::echo_request(source, SocketAddrV4::new(VIP, 0)).payload(32),
                IDENTIFIER,
                [0, 0, 1],
            ),
            // The later part of a datagram whose first part never comes.
            Self::Fragments => (
                Builder::udp(source, dns).payload(32).fragment(100),
                IDENTIFICATION,
                [1, 0, 0],
            ),
            Self::IcmpErrors => {
                let client = SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, 3), 0);
                let reply = Builder::tcp(segment::ACK, web, client).build();
                let builder = Builder::icmp(3, 1, Ipv4Addr::UNSPECIFIED, VIP).payload_of(&reply[14..14 + 28]);
                (builder, INNER_PORT, [0, 0, 1])
            }
        };
        (builder.link(link.0, link.1), number, covered)
    }

    /// Reasons that its frames may end for.
    const fn reasons(self, variant: &Variant) -> &'static [&'static str] {
        match self {
            Self::Ack => variant.ack_reasons,
            Self::Echo => &["echo_answered"],
            Self::IcmpErrors => &["not_ours"],
            Self::Fragments => &["fragment", "fragment_held"],
            Self::Udp => variant.udp_reasons,
            Self::Syn => variant.syn_reasons,
        }
    }
}

struct Site {
    gateway: Namespace,
    client: Namespace,
    attacker: Namespace,
    server: Namespace,
    lab: Lab,
}

const BACKENDS: [SocketAddrV4; 2] = [
    SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 10), 8080),
    SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 11), 8080),
];

impl Site {
    fn new() -> Result<Self> {
        let lab = Lab::open(Lifetime::Process)?;
        let (gateway, client, attacker, server) = (
            lab.namespace("gateway")?,
            lab.namespace("client")?,
            lab.namespace("attacker")?,
            lab.namespace("server")?,
        );
        gateway.forward()?;
        for (interface, host, network) in [
            ("eth0", &client, 18),
            ("eth1", &server, 17),
            ("eth2", &attacker, 19),
        ] {
            lab.cable((&gateway, interface), (host, "eth0"), 1500)?;
            gateway.address(interface, &format!("172.{network}.0.1/24"))?;
        }
        client.address("eth0", &format!("{CLIENT}/24"))?;
        client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        attacker.address("eth0", &format!("{ATTACKER}/24"))?;
        gateway.route("10.0.0.0/8", ATTACKER)?;
        for backend in BACKENDS {
            server.address("eth0", &format!("{}/24", backend.ip()))?;
        }
        server.sysctl("net/core/somaxconn", "4096")?;
        server.route("default", Ipv4Addr::new(172, 17, 0, 1))?;
        Ok(Self {
            gateway,
            client,
            attacker,
            server,
            lab,
        })
    }

    fn configuration(&self, variant: &Variant) -> Configuration {
        let mut text = format!(
            "[agent]\ncontrol_socket = \"{}\"\npin_directory = \"{}\"\nmax_flows = {MAX_FLOWS}\n\
             [snat]\nprefixes = [\"100.64.0.0/29\"]\nprobe_address = \"100.64.0.1\"\n\
             [interface.eth0]\n[interface.eth1]\n[interface.eth2]\n",
            agent::control_socket(&self.lab).display(),
            self.lab.pin_directory().display(),
        );
        for (name, port, protocol, keys) in [
            ("web", WEB_PORT, "tcp", variant.web_keys),
            ("dns", DNS_PORT, "udp", variant.dns_keys),
        ] {
            text += &format!("[group.{name}]\n[group.{name}.health]\nkind = \"none\"\n");
            for (number, backend) in BACKENDS.iter().enumerate() {
                text += &format!(
                    "[group.{name}.backend.b{number}]\naddress = \"{}\"\nport = {}\n",
                    backend.ip(),
                    backend.port()
                );
            }
            text += &format!(
                "[listener.{name}]\nvip = \"{VIP}\"\nport = {port}\nprotocol = \"{protocol}\"\ngroup = \"{name}\"\n\
                 idle_timeout = \"300s\"\n{keys}"
            );
        }
        Configuration::from_text(text)
    }

    /// Kernel memory of all pinned tables, in bytes.
    fn table_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(self.lab.pin_directory())? {
            let path = entry?.path();
            let output = self.gateway.output(
                "bpftool",
                &["-j", "map", "show", "pinned", &path.to_string_lossy()],
            )?;
            // A link is no map.
            if let Ok(shown) = serde_json::from_slice::<serde_json::Value>(&output.stdout) {
                bytes += shown["bytes_memlock"].as_u64().unwrap_or_default();
            }
        }
        ensure!(bytes > 1 << 20, "the tables take {bytes} bytes only");
        Ok(bytes)
    }
}

/// The sum of 16-bit words in machine order, unfolded.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    words
        .map(|word| {
            u32::from(u16::from_ne_bytes([
                word[0],
                word.get(1).copied().unwrap_or_default(),
            ]))
        })
        .sum()
}

/// A frame with zeros in its variable fields, and all that the generator has to know.
fn flood(kind: Kind, link: (Mac, Mac), ifindex: u32) -> (Vec<u8>, Flood) {
    const IP: usize = 14;
    const TRANSPORT: usize = 14 + 20;
    const ADDRESS: u32 = 14 + 12;
    let (builder, number_offset, [in_ip, address_in_transport, number_in_transport]) = kind.flood(link);
    let mut frame = builder.build();
    let end = frame.len();
    let checksum = match kind {
        // What a fragment carries is nobody's affair.
        Kind::Fragments => 0,
        Kind::Ack | Kind::Syn => TRANSPORT + 16,
        Kind::Udp => TRANSPORT + 6,
        Kind::Echo | Kind::IcmpErrors => TRANSPORT + 2,
    };
    let mut clear = |offset: usize| frame[offset..offset + 2].fill(0);
    clear(number_offset as usize);
    clear(IP + 10);
    if checksum != 0 {
        clear(checksum);
    }
    let mut transport_sum = sum(&frame[TRANSPORT..end]);
    if address_in_transport != 0 {
        // The rest of the pseudo-header: destination, protocol, length (RFC 9293 §3.1).
        transport_sum += sum(&frame[IP + 16..TRANSPORT]);
        transport_sum += u32::from(u16::from(frame[IP + 9]).to_be());
        transport_sum += u32::from(((end - TRANSPORT) as u16).to_be());
    }
    let mut all = Flood {
        ifindex,
        network: SOURCES,
        host_mask: SOURCE_BITS,
        address_offset: ADDRESS,
        number_offset,
        ip_checksum_offset: IP as u32 + 10,
        transport_checksum_offset: checksum as u32,
        ip_sum: sum(&frame[IP..TRANSPORT]),
        transport_sum,
        is_number_in_ip: in_ip,
        is_address_in_transport: address_in_transport,
        is_number_in_transport: number_in_transport,
        ..Flood::zeroed()
    };
    frame.resize(FLOOD_BYTES, 0);
    let place: &mut [u8] = bytemuck::cast_slice_mut(&mut all.frame);
    place[..FLOOD_BYTES].copy_from_slice(&frame);
    (frame, all)
}

/// Nanoseconds that a thread has run.
fn ran(thread: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{thread}/schedstat"))?;
    Ok(text
        .split_whitespace()
        .next()
        .context("an empty schedstat")?
        .parse()?)
}

fn ksoftirqd() -> Result<String> {
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if fs::read_to_string(format!("/proc/{name}/comm"))
            .unwrap_or_default()
            .trim()
            == "ksoftirqd/0"
        {
            return Ok(name);
        }
    }
    anyhow::bail!("no ksoftirqd/0")
}

/// What a flood was.
struct Flooded {
    frames: u64,
    took: Duration,
    /// CPU time of the generator and of what its frames caused on its CPU.
    cpu_ns: u64,
}

/// Sends frames until it is told to end, an hour at most; says when it begins.
fn generate(
    site: &Site,
    object: &Path,
    kind: Kind,
    begins: &Sender<()>,
    has_to_end: &AtomicBool,
) -> Result<Flooded> {
    let (generator, gateway) = ((&site.attacker, "eth0"), (&site.gateway, "eth2"));
    let (source, ifindex) = (frames::mac(generator)?, frames::ifindex(generator)?);
    let destination = frames::mac(gateway)?;
    let (frame, flood) = flood(kind, (source, destination), ifindex);
    let mut programs = Ebpf::load_file(object).with_context(|| format!("{}", object.display()))?;
    let program: &mut Xdp = programs
        .program_mut("bench_flood")
        .context("bench_flood")?
        .try_into()?;
    program.load()?;
    Array::try_from(programs.map_mut("FLOOD").context("FLOOD")?)?.set(0, AsPod(flood), 0)?;
    let Some(Program::Xdp(program)) = programs.program("bench_flood") else {
        anyhow::bail!("no generator");
    };
    let softirq = ksoftirqd()?;
    let (took, cpu_ns) = site.attacker.inside(|| -> Result<_> {
        let mut cpus = CpuSet::new();
        cpus.set(0)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
        let own = format!("self/task/{}", gettid());
        let cpu = || anyhow::Ok(ran(&own)? + ran(&softirq)?);
        let (before, began) = (cpu()?, Instant::now());
        begins.send(())?;
        while !has_to_end.load(Ordering::Relaxed) && began.elapsed() < Duration::from_secs(3600) {
            program.test_run(TestRunOptions {
                data_in: Some(&frame),
                repeat: CALL,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            })?;
        }
        Ok((began.elapsed(), cpu()? - before))
    })??;
    let sent: Array<_, AsPod<Flood>> = Array::try_from(programs.map("FLOOD").context("FLOOD")?)?;
    Ok(Flooded {
        frames: sent.get(&0, 0)?.0.frames,
        took,
        cpu_ns,
    })
}

/// What became of the connections for a while.
#[derive(Clone, Copy)]
struct Goodput {
    /// Answers per second.
    rate: f64,
    /// Share of all CPUs that they had, or could have had.
    left: f64,
}

/// Nanoseconds that the crowd's processes have run.
fn crowd_ran() -> Result<u64> {
    let mut all = 0;
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        if fs::read_link(process.join("exe")).is_ok_and(|program| program == Path::new(CROWD)) {
            for thread in fs::read_dir(process.join("task"))? {
                let thread = thread?.path();
                let name = thread.strip_prefix("/proc")?.to_string_lossy().into_owned();
                all += ran(&name).unwrap_or_default();
            }
        }
    }
    Ok(all)
}

/// Nanoseconds that CPUs were idle.
fn idle() -> Result<u64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("an empty /proc/stat")?;
    // proc_stat(5): user, nice, system, idle, iowait, in hundredths of a second.
    let numbers = line.split_whitespace().skip(4).take(2).map(str::parse::<u64>);
    Ok(numbers.sum::<Result<u64, _>>()? * 10_000_000)
}

/// Asks on all connections again and again. No answer may be missing or wrong.
fn goodput(clients: &mut Clients, length: Duration) -> Result<Goodput> {
    let cpus = thread::available_parallelism()?.get() as f64;
    let (began, before) = (Instant::now(), crowd_ran()? + idle()?);
    let mut answers = 0;
    while began.elapsed() < length {
        clients.talk()?.ensure_all(CONNECTIONS)?;
        answers += CONNECTIONS;
    }
    let took = began.elapsed();
    Ok(Goodput {
        rate: answers as f64 / took.as_secs_f64(),
        left: (crowd_ran()? + idle()? - before) as f64 / (took.as_nanos() as f64 * cpus),
    })
}

fn resident_kib(agent: &Agent) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word.context("VmRSS")?.parse()?)
}

/// CPU time of all threads of the agent, in seconds.
fn agents_cpu(agent: &Agent) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", agent.pid()))? {
        let name = thread?.file_name().to_string_lossy().into_owned();
        nanoseconds += ran(&format!("{}/task/{name}", agent.pid())).unwrap_or_default();
    }
    Ok(nanoseconds as f64 / 1e9)
}

fn packets(metrics: &Metrics, reason: &str) -> u64 {
    metrics.sum("forwarder_packets_total", &[("reason", reason)]) as u64
}

/// Floods the gateway in one way; `before` is what the connections were worth before it. Returns the same for the time after
/// it.
fn endure(
    site: &Site,
    agent: &Agent,
    object: &Path,
    clients: &mut Clients,
    (variant, kind): (&Variant, Kind),
    length: Duration,
    before: Goodput,
) -> Result<Goodput> {
    let (bytes, resident) = (site.table_bytes()?, resident_kib(agent)?);
    let (earlier, cpu_before) = (agent.metrics()?, agents_cpu(agent)?);
    let has_to_end = AtomicBool::new(false);
    let (begins, begun) = mpsc::channel();
    let (flooded, during, newcomers) = thread::scope(|scope| {
        let has_to_end = &has_to_end;
        let generator = scope.spawn(move || generate(site, object, kind, &begins, has_to_end));
        let outcome = (|| -> Result<_> {
            begun.recv().context("the flood does not begin")?;
            let during = goodput(clients, length)?;
            let vip = SocketAddrV4::new(VIP, WEB_PORT);
            let mut others = Clients::start(Path::new(CROWD), &site.client, vip, &[CLIENT], NEWCOMERS)?;
            let newcomers = others.open(NEWCOMERS)?;
            if newcomers.done == NEWCOMERS {
                others.talk()?.ensure_all(NEWCOMERS)?;
            }
            Ok((during, newcomers))
        })();
        has_to_end.store(true, Ordering::Relaxed);
        let flooded = generator
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the generator panicked")));
        // What the generator says explains what else is missing.
        let flooded = flooded?;
        let (during, newcomers) = outcome?;
        anyhow::Ok((flooded, during, newcomers))
    })?;
    let cpu = agents_cpu(agent)? - cpu_before;
    let later = agent.metrics()?;
    let rises: Vec<_> = kind
        .reasons(variant)
        .iter()
        .map(|reason| (*reason, packets(&later, reason) - packets(&earlier, reason)))
        .collect();
    let named: u64 = rises.iter().map(|(_, rise)| rise).sum();
    let opened = later.sum("forwarder_listener_connections_total", &[])
        - earlier.sum("forwarder_listener_connections_total", &[]);
    let after = goodput(clients, REST)?;
    // What else the machine does changes with time.
    let (rate, usual) = ((before.rate + after.rate) / 2.0, (before.left + after.left) / 2.0);
    let (share, left) = (during.rate / rate, during.left / usual);
    println!(
        "{kind:?}: {} frames in {:.1} s with {:.1} s of CPU time, {:.2} Mpps; {rises:?}, {opened} flows opened; {:.0} answers/s \
         before and after, {:.0} during: {share:.2}, {:.2} of the CPUs left before and after, {:.2} during: {left:.2}; newcomers: {newcomers:?}; \
         tables {bytes} to {} bytes, agent {resident} to {} KiB and {cpu:.1} s of CPU time",
        flooded.frames,
        flooded.took.as_secs_f64(),
        flooded.cpu_ns as f64 / 1e9,
        flooded.frames as f64 / flooded.took.as_secs_f64() / 1e6,
        rate,
        during.rate,
        usual,
        during.left,
        site.table_bytes()?,
        resident_kib(agent)?,
    );
    ensure!(flooded.frames > 100_000, "no flood: {} frames", flooded.frames);
    ensure!(
        named + opened as u64 >= flooded.frames / 100 * 99,
        "of {} frames the metrics name {named}: {rises:?}; of all: {:#?}",
        flooded.frames,
        agent.status()?.reasons
    );
    ensure!(
        share > SHARE * left,
        "goodput fell to {share:.2}, what was left of the CPUs to {left:.2}"
    );
    ensure!(
        left > LEFT,
        "the flood left {left:.2} of the CPUs, which it has not itself"
    );
    ensure!(
        site.table_bytes()? == bytes,
        "the tables have grown from {bytes} bytes"
    );
    ensure!(
        resident_kib(agent)? < resident + resident / 10 + 2048,
        "the agent has grown from {resident} to {} KiB",
        resident_kib(agent)?
    );
    if kind != Kind::Syn || variant.leaves_room {
        newcomers.ensure_all(NEWCOMERS)?;
    } else {
        ensure!(
            newcomers.done + newcomers.refused == NEWCOMERS && newcomers.wrong == 0,
            "newcomers were neither let in nor refused: {newcomers:?}"
        );
    }
    Ok(after)
}

/// Where the generator is; nothing where it was not built.
fn object() -> Option<PathBuf> {
    let found = std::env::var_os(OBJECT).map(PathBuf::from);
    if found.is_none() {
        let is_strict = std::env::var_os("FORWARDER_TESTS_STRICT").is_some_and(|value| value == "1");
        assert!(!is_strict, "{OBJECT} does not say where the generator is");
        println!("SKIP: needs {OBJECT}, as `cargo xtask test netns` sets it");
    }
    found
}

#[test]
fn no_flood_costs_a_connection() -> Result<()> {
    let Some(object) = object() else {
        return Ok(());
    };
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let length = match std::env::var("FORWARDER_FLOODS_SECONDS") {
        Ok(text) => Duration::from_secs(text.parse().context("FORWARDER_FLOODS_SECONDS is a number")?),
        Err(_) => Duration::from_secs(4),
    };
    for variant in &VARIANTS {
        println!("variant {}", variant.name);
        let site = Site::new()?;
        let show_log = ShowLog::of(&site.lab);
        let _servers = (1..)
            .zip(BACKENDS)
            .map(|(identity, address)| {
                Servers::start(Path::new(CROWD), &site.server, address, identity, CONNECTIONS)
            })
            .collect::<Result<Vec<_>>>()?;
        let agent = Agent::start(&site.lab, &site.gateway, &site.configuration(variant))?;
        let vip = SocketAddrV4::new(VIP, WEB_PORT);
        // The attacker's neighbours know each other.
        site.attacker
            .output("ping", &["-c", "1", "-W", "1", "172.19.0.1"])?;
        let mut clients = Clients::start(Path::new(CROWD), &site.client, vip, &[CLIENT], CONNECTIONS)?;
        clients.open(CONNECTIONS)?.ensure_all(CONNECTIONS)?;
        // All of them say more together than the first that fails.
        let mut errors = Vec::new();
        let mut usual = goodput(&mut clients, REST)?;
        for &kind in variant.kinds {
            match endure(
                &site,
                &agent,
                &object,
                &mut clients,
                (variant, kind),
                length,
                usual,
            ) {
                Ok(after) => usual = after,
                Err(error) => errors.push(format!("{kind:?}: {error:#}")),
            }
        }
        clients.talk()?.ensure_all(CONNECTIONS)?;
        ensure!(errors.is_empty(), "{errors:#?}");
        show_log.all_is_well();
    }
    Ok(())
}

#[test]
fn frames_of_floods_have_valid_checksums() {
    for kind in KINDS {
        let (mut frame, flood) = flood(kind, ([2; 6], [4; 6]), 1);
        // As the generator does it.
        let (address, number) = (SOURCES | 0x0001_0203, 0x1234_u16);
        let word = address.to_be();
        let (address_sum, number_sum) = ((word & 0xffff) + (word >> 16), u32::from(number));
        let mut write = |offset: u32, bytes: &[u8]| {
            frame[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        };
        write(flood.address_offset, &word.to_ne_bytes());
        write(flood.number_offset, &number.to_ne_bytes());
        let ip = flood.ip_sum + address_sum + number_sum * flood.is_number_in_ip;
        let transport = flood.transport_sum
            + address_sum * flood.is_address_in_transport
            + number_sum * flood.is_number_in_transport;
        let folded = |sum| (!forwarder_common::wire::checksum::fold(sum)).to_ne_bytes();
        write(flood.ip_checksum_offset, &folded(ip));
        if flood.transport_checksum_offset != 0 {
            write(flood.transport_checksum_offset, &folded(transport));
        }
        let wrong = forwarder_tests::packet::wrong_checksums(&frame);
        assert!(wrong.is_empty(), "{kind:?}: {wrong:?}");
    }
}
