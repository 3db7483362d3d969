//! What can be typed: the verbs and their arguments.
//!
//! Settings of a service have a twin in the environment, so that a unit file can give them. What the agent
//! does with traffic is not here but in the configuration file.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::{
    config::{Protocol, schema::parse_duration},
    explain::frame::Flag,
    flows::{DEFAULT_LIMIT, Endpoints, FlowPhase},
    orders::BackendPath,
};

/// Shortest time between two questions to the agent: rates are computed once a second.
const MIN_INTERVAL: Duration = Duration::from_millis(200);

/// Forwards traffic from listeners on VIPs to backends in other networks, by XDP.
#[derive(Debug, Parser)]
#[command(name = "forwarder", version, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 this host cannot, 4 (status) the data path \
                        forwards without an agent."
)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Run(RunArgs),
    Check(CheckArgs),
    Status(StatusArgs),
    Top(TopArgs),
    Explain(ExplainArgs),
    Flows(FlowsArgs),
    Capture(CaptureArgs),
    Trace(TraceArgs),
    Doctor(DoctorArgs),
    Plan(PlanArgs),
    Apply(ApplyArgs),
    Drain(DrainArgs),
    Undrain(UndrainArgs),
    Weight(WeightArgs),
    Detach(DetachArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Print completions for a shell: `forwarder completions bash > /usr/share/bash-completion/completions/forwarder`
#[derive(Debug, Args)]
#[command(hide = true)]
pub struct CompletionsArgs {
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Write the manual pages, one for each verb, into a directory, such as /usr/local/share/man/man8
#[derive(Debug, Args)]
#[command(hide = true)]
pub struct ManArgs {
    /// An existing directory
    pub directory: PathBuf,
}

/// Which configuration file is meant.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The configuration file (docs/configuration.md explains it)
    #[arg(short, long, value_name = "FILE", env = "FORWARDER_CONFIG")]
    pub config: PathBuf,
}

/// Load the data path, forward, check health, serve metrics; until SIGTERM or Ctrl-C
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// What to log: a level, or levels per module such as "info,forwarder_user::health=debug"
    /// [default: info]
    #[arg(long, value_name = "FILTER", env = "FORWARDER_LOG")]
    pub log: Option<String>,
    /// How to log
    #[arg(
        long,
        value_name = "FORMAT",
        env = "FORWARDER_LOG_FORMAT",
        default_value = "auto"
    )]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, for the journal under systemd, else JSON
    Auto,
    /// One line of text per event
    Text,
    /// One JSON object per event
    Json,
    /// Text for systemd's journal: a priority in front, no time
    Journal,
}

/// Validate a configuration file; changes nothing and needs no privilege
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Show listeners, groups, backends with their health, flows and rates of the running agent
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Show the same on the whole terminal, anew every second, with trends
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How often to ask the agent
    #[arg(long, value_name = "TIME", value_parser = interval, default_value = "1s")]
    pub interval: Duration,
    #[command(flatten)]
    pub agent: AgentArgs,
}

/// A time between two questions.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    if interval < MIN_INTERVAL {
        return Err(format!("at least {} ms", MIN_INTERVAL.as_millis()));
    }
    Ok(interval)
}

/// Which agent is asked.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The agent's control socket (`control_socket` in its configuration)
    #[arg(
        long,
        value_name = "PATH",
        env = "FORWARDER_SOCKET",
        default_value = crate::config::validate::DEFAULT_CONTROL_SOCKET
    )]
    pub socket: PathBuf,
}

/// Say what the data path would do to a packet, step by step, from its live tables; changes nothing
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    forwarder explain tcp 192.0.2.7:51000 198.51.100.10:443\n  \
    forwarder explain tcp 10.20.0.5:8443 100.64.0.2:20113 --flags syn,ack\n  \
    forwarder explain --pcap FILE --interface eth0")]
pub struct ExplainArgs {
    /// The packet's protocol
    #[arg(
        value_name = "PROTOCOL",
        required_unless_present = "pcap",
        requires = "destination"
    )]
    pub protocol: Option<TransportName>,
    /// Where the packet is from
    #[arg(value_name = "SOURCE:PORT", value_parser = end)]
    pub source: Option<SocketAddr>,
    /// Where the packet goes
    #[arg(value_name = "DESTINATION:PORT", value_parser = end)]
    pub destination: Option<SocketAddr>,
    /// Explain the packets of a capture (pcap or pcapng) one after another, each as if those before it had passed
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["protocol", "source", "destination", "flags", "ttl", "length"]
    )]
    pub pcap: Option<PathBuf>,
    /// Where the packet arrives [default: the interface that leads to its source]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// TCP flags, separated by commas: syn, ack, fin, rst, psh, urg
    #[arg(long, value_name = "FLAGS", value_delimiter = ',', default_value = "syn")]
    pub flags: Vec<Flag>,
    /// Time to live
    #[arg(long, value_name = "HOPS", default_value_t = 64)]
    pub ttl: u8,
    /// Length of the IP packet [default: no payload]
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
    pub length: u16,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Write packets as the data path sees them, before and after translation, to a file for Wireshark (pcapng); what XDP
/// takes, tcpdump does not see
///
/// Each packet has its verdict and reason as a comment.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    forwarder capture --write web.pcapng --port 443 --count 1000\n  \
    forwarder capture --dropped --for 30s --write drops.pcapng\n  \
    forwarder capture | wireshark -k -i -")]
pub struct CaptureArgs {
    /// The file to write, which is replaced [default: standard output, unless that is a terminal]
    #[arg(long, short, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Bytes of each packet, before and after
    #[arg(long, value_name = "BYTES", default_value_t = 2048)]
    pub snap: u32,
    #[command(flatten)]
    pub filter: CaptureFilterArgs,
    #[command(flatten)]
    pub agent: AgentArgs,
}

/// Show packets as the data path sees them, a line each: what it is, its verdict and reason, and what it becomes
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    forwarder trace --dropped\n  \
    forwarder trace --network 192.0.2.7 --port 443")]
pub struct TraceArgs {
    #[command(flatten)]
    pub filter: CaptureFilterArgs,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Which packets, and how many.
#[derive(Debug, Args)]
pub struct CaptureFilterArgs {
    /// Only packets from or to this address or prefix, as they come
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_parser = network)]
    pub network: Option<IpNet>,
    /// Only packets from or to this port
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Only packets of this protocol
    #[arg(long, value_name = "PROTOCOL")]
    pub protocol: Option<TransportName>,
    /// Only packets with this reason, one of docs/reasons.md; may be given several times
    #[arg(long = "reason", value_name = "REASON")]
    pub reasons: Vec<String>,
    /// Only packets that go no further
    #[arg(long, conflicts_with = "reasons")]
    pub dropped: bool,
    /// Of so many packets one, on each CPU
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub one_in: u32,
    /// End after so many packets
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// End after so long
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,
}

/// An address, or a prefix.
fn network(text: &str) -> Result<IpNet, String> {
    let of_address = |_| text.parse::<IpAddr>().map(IpNet::from);
    text.parse()
        .or_else(of_address)
        .map_err(|_| "an address such as 192.0.2.7, or a prefix such as 192.0.2.0/24".to_owned())
}

/// A transport protocol that flows have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TransportName {
    Tcp,
    Udp,
    Sctp,
    /// Echo; the identifier stands for the client's port
    Icmp,
}

impl TransportName {
    /// What it names.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
            Self::Sctp => Protocol::Sctp,
            Self::Icmp => Protocol::Icmp,
        }
    }
}

/// An address with a port, or alone, as echo requests have none: then with port 0.
fn end(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse().map(|address: IpAddr| SocketAddr::new(address, 0)))
        .map_err(|_| "write it as ADDRESS:PORT".to_owned())
}

/// List, count or delete live flows
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    forwarder flows --client 192.0.2.0/24 --state established\n  \
    forwarder flows --count --backend web-eu/ecs01\n  \
    forwarder flows --delete --client 192.0.2.7")]
pub struct FlowsArgs {
    /// Only flows of these clients
    #[arg(long, value_name = "ADDRESS[/LENGTH][:PORT]")]
    pub client: Option<Endpoints>,
    /// Only flows to these VIPs
    #[arg(long, value_name = "ADDRESS[/LENGTH][:PORT]")]
    pub vip: Option<Endpoints>,
    /// Only flows of this backend: NAME, GROUP/NAME or ADDRESS[/LENGTH][:PORT]
    #[arg(long, value_name = "BACKEND")]
    pub backend: Option<String>,
    /// Only flows of this listener
    #[arg(long, value_name = "NAME")]
    pub listener: Option<String>,
    /// Only flows of this protocol
    #[arg(long, value_name = "PROTOCOL")]
    pub protocol: Option<TransportName>,
    /// Only flows in this state: half_open, established, closing, closed (TCP, SCTP), active, idle (UDP, ICMP)
    #[arg(long, value_name = "STATE")]
    pub state: Option<FlowPhase>,
    /// Most flows to list
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LIMIT)]
    pub limit: usize,
    /// Say how many there are, list none
    #[arg(long, conflicts_with_all = ["limit", "delete"])]
    pub count: bool,
    /// Delete them: connections break, and their bindings are free again after a minute
    #[arg(long, conflicts_with = "limit")]
    pub delete: bool,
    /// With --delete and without a filter: all flows
    #[arg(long, requires = "delete")]
    pub all: bool,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Check this host and the path to every backend; name what is wrong and the command that mends it
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 1 if something breaks traffic; warnings alone are no failure. Needs root."
)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Check only this backend group and its listeners
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Say what a configuration needs (addresses, memory, routes and rules on the far side) and what it would change
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Concurrent flows that each backend is to carry [default: all together what max_flows allows]
    #[arg(long, value_name = "N")]
    pub flows_per_backend: Option<u64>,
    /// The agent's control socket [default: `control_socket` of the configuration]
    #[arg(long, value_name = "PATH", env = "FORWARDER_SOCKET")]
    pub socket: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Have the running agent take a configuration over, all or nothing; flows and counters stay
#[derive(Debug, Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The agent's control socket [default: `control_socket` of the configuration]
    #[arg(long, value_name = "PATH", env = "FORWARDER_SOCKET")]
    pub socket: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Let a backend take no new flows while those it has finish; also across restarts, until `undrain`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    forwarder drain web/ecs01\n  \
    forwarder drain web/ecs01 --timeout 5m --wait")]
pub struct DrainArgs {
    #[command(flatten)]
    pub backend: BackendArgs,
    /// End the flows that are left after this long, with a reset to both ends [default: they may go on]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Wait until the backend has no flows any more
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Let a drained backend take new flows again
#[derive(Debug, Args)]
pub struct UndrainArgs {
    #[command(flatten)]
    pub backend: BackendArgs,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Give a backend another weight than the configured one; also across restarts, until --reset
#[derive(Debug, Args)]
pub struct WeightArgs {
    #[command(flatten)]
    pub backend: BackendArgs,
    /// Its share beside the other backends of its group; 0: no new flows
    #[arg(value_name = "N", required_unless_present = "reset")]
    pub weight: Option<u16>,
    /// The configured weight again
    #[arg(long, conflicts_with = "weight")]
    pub reset: bool,
    #[command(flatten)]
    pub agent: AgentArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Which backend is meant.
#[derive(Debug, Args)]
pub struct BackendArgs {
    /// The backend, with its group
    #[arg(value_name = "GROUP/BACKEND")]
    pub backend: BackendPath,
}

/// Remove everything that an agent has left in the kernel; traffic stops, flows end
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The configuration file whose `agent.pin_directory` is meant
    #[arg(short, long, value_name = "FILE", env = "FORWARDER_CONFIG")]
    pub config: Option<PathBuf>,
    /// The directory itself
    #[arg(long, value_name = "PATH")]
    pub pin_directory: Option<PathBuf>,
}

/// How an answer is written.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// How to write the answer
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory, FromArgMatches};

    use super::*;

    /// The arguments of a verb, read from what follows it on the command line.
    fn read<A: Args + FromArgMatches>(line: &[&str]) -> A {
        let command = A::augment_args(Command::new("verb").no_binary_name(true));
        command.clone().debug_assert();
        A::from_arg_matches(&command.get_matches_from(line)).unwrap()
    }

    /// Is this wrong for a verb?
    fn refused<A: Args>(line: &[&str]) -> bool {
        let command = A::augment_args(Command::new("verb").no_binary_name(true));
        command.try_get_matches_from(line).is_err()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_a_file_and_says_how_to_log() {
        let args: RunArgs = read(&["-c", "a.toml", "--log", "debug", "--log-format", "json"]);
        assert_eq!(args.config.config, PathBuf::from("a.toml"));
        assert_eq!(
            (args.log.as_deref(), args.log_format),
            (Some("debug"), LogFormat::Json)
        );
    }

    #[test]
    fn status_asks_the_default_socket_for_text() {
        let args: StatusArgs = read(&[]);
        assert_eq!(args.agent.socket, PathBuf::from("/run/forwarder/control.sock"));
        assert_eq!(args.output.output, OutputFormat::Text);
    }

    #[test]
    fn top_asks_every_second_and_not_too_often() {
        let args: TopArgs = read(&[]);
        assert_eq!(args.interval, Duration::from_secs(1));
        assert!(refused::<TopArgs>(&["--interval", "10ms"]));
    }

    #[test]
    fn explain_takes_a_packet_or_a_capture() {
        let packet = ["tcp", "192.0.2.7:51000", "198.51.100.10:443"];
        let args: ExplainArgs = read(&[&packet[..], &["--flags", "fin,ack", "--ttl", "3"]].concat());
        assert_eq!(args.protocol, Some(TransportName::Tcp));
        assert_eq!(args.destination, Some("198.51.100.10:443".parse().unwrap()));
        assert_eq!((args.flags, args.ttl), (vec![Flag::Fin, Flag::Ack], 3));
        let args: ExplainArgs = read(&["--pcap", "a.pcap", "--interface", "eth0"]);
        assert_eq!(args.pcap, Some(PathBuf::from("a.pcap")));
        assert_eq!(args.flags, [Flag::Syn]);

        for line in [
            &[][..],
            &packet[..2],
            &["tcp", "192.0.2.7:x", "198.51.100.10:443"],
            &["gre", "192.0.2.7:1", "198.51.100.10:1"],
            &["--pcap", "a.pcap", "tcp", "192.0.2.7:51000", "198.51.100.10:443"],
            &[&packet[..], &["--flags", "xmas"]].concat(),
        ] {
            assert!(refused::<ExplainArgs>(line), "{line:?}");
        }
    }

    #[test]
    fn a_backend_is_drained_for_a_time_and_weighed() {
        let args: DrainArgs = read(&["web/ecs01", "--timeout", "5m", "--wait"]);
        assert_eq!(args.backend.backend.to_string(), "web/ecs01");
        assert_eq!((args.timeout, args.wait), (Some(Duration::from_secs(300)), true));
        let args: WeightArgs = read(&["web/ecs01", "--reset"]);
        assert_eq!((args.weight, args.reset), (None, true));
        for line in [&["web"][..], &["web/ecs01", "--timeout", "5"], &[]] {
            assert!(refused::<DrainArgs>(line), "{line:?}");
        }
        for line in [
            &["web/ecs01"][..],
            &["web/ecs01", "65536"],
            &["web/ecs01", "5", "--reset"],
        ] {
            assert!(refused::<WeightArgs>(line), "{line:?}");
        }
    }

    #[test]
    fn flows_are_filtered_counted_or_deleted() {
        let args: FlowsArgs = read(&["--client", "192.0.2.0/24:443", "--state", "half_open"]);
        assert_eq!(args.client, Some("192.0.2.0/24:443".parse().unwrap()));
        assert_eq!((args.state, args.limit), (Some(FlowPhase::HalfOpen), 1000));
        for line in [
            &["--client", "web"][..],
            &["--state", "open"],
            &["--count", "--delete"],
            &["--all"],
        ] {
            assert!(refused::<FlowsArgs>(line), "{line:?}");
        }
    }

    #[test]
    fn the_page_about_the_api_says_of_every_verb_what_it_asks() {
        let page = include_str!("../../../docs/api.md");
        let program = <Cli as clap::CommandFactory>::command();
        for verb in program.get_subcommands() {
            let name = verb.get_name();
            assert!(page.contains(&format!("`{name}")), "{name}");
        }
    }
}
