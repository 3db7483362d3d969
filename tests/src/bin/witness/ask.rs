//! The client: some threads for each listener, each with one connection at a time.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use forwarder_tests::witness::{
    Answer, Author, Content, DATAGRAM_STRIDE, Failure, HEADER_BYTES, Kind, Record, Request, Totals, mix,
    now_ns,
};
use socket2::{Domain, Socket, Type};

use crate::{Identity, Listeners, record};

/// How long a client waits for the next byte, or for a connection. Longer than any outage of a link in the runs and the
/// pause in which TCP repeats after it, so that only what is lost for good fails.
const PATIENCE: Duration = Duration::from_secs(12);
/// How long it waits for the answer to a datagram before it sends it again, and how often it sends it at all.
const REPEAT_AFTER: Duration = Duration::from_millis(700);
const TRIES: u32 = 3;
/// After a failure.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests from one socket for datagrams, so that there are new flows as well.
const PER_SOCKET: u64 = 200;
/// Piece of a request that is sent at once, in bytes, and the pause behind it in long transfers.
const PIECE_BYTES: usize = 16 << 10;
const PIECE_PAUSE: Duration = Duration::from_millis(20);

static HAS_TO_END: AtomicBool = AtomicBool::new(false);
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
static TOTALS: Mutex<BTreeMap<u16, Totals>> = Mutex::new(BTreeMap::new());

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    identity: Identity,
    #[command(flatten)]
    listeners: Listeners,
    #[arg(long)]
    vip: Ipv4Addr,
}

/// A way to use connections.
struct Manner {
    name: &'static str,
    /// Threads per listener.
    threads: usize,
    /// Bytes of a request and of an answer, at most.
    request_bytes: u64,
    answer_bytes: u64,
    /// Requests on one connection.
    requests: u64,
    /// Between two of them.
    pause: Duration,
    /// Between pieces of them.
    piece_pause: Duration,
}

const MANNERS: [Manner; 4] = [
    Manner {
        name: "short",
        threads: 1,
        request_bytes: 2_000,
        answer_bytes: 32_000,
        requests: 1,
        pause: Duration::from_millis(200),
        piece_pause: Duration::ZERO,
    },
    Manner {
        name: "kept",
        threads: 3,
        request_bytes: 2_000,
        answer_bytes: 8_000,
        requests: u64::MAX,
        pause: Duration::from_millis(100),
        piece_pause: Duration::ZERO,
    },
    Manner {
        name: "long answers",
        threads: 1,
        request_bytes: 2_000,
        answer_bytes: 4_000_000,
        requests: 4,
        pause: Duration::ZERO,
        piece_pause: PIECE_PAUSE,
    },
    Manner {
        name: "long requests",
        threads: 1,
        request_bytes: 4_000_000,
        answer_bytes: 2_000,
        requests: 4,
        pause: Duration::ZERO,
        piece_pause: PIECE_PAUSE,
    },
];
const DATAGRAMS: Manner = Manner {
    name: "datagrams",
    threads: 4,
    request_bytes: 1_000,
    answer_bytes: 1_000,
    requests: PER_SOCKET,
    pause: Duration::from_millis(50),
    piece_pause: Duration::ZERO,
};

/// Whom a thread asks.
#[derive(Clone, Copy)]
struct Target {
    client: u16,
    from: Ipv4Addr,
    to: SocketAddrV4,
}

impl Target {
    const fn listener(self) -> u16 {
        self.to.port()
    }

    /// A number that no other connection of the run has.
    fn connection(self) -> u64 {
        u64::from(self.client) << 48 | CONNECTIONS.fetch_add(1, Ordering::Relaxed)
    }

    fn count(self, totals: Totals) {
        let mut all = TOTALS.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(self.listener()).or_default().add(totals);
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ctrlc::set_handler(|| HAS_TO_END.store(true, Ordering::Relaxed))?;
    let mut threads = Vec::new();
    let tcp = arguments.listeners.tcp.iter();
    let udp = arguments.listeners.udp.iter();
    let work = tcp
        .flat_map(|port| MANNERS.iter().map(move |manner| (port, manner, false)))
        .chain(udp.map(|port| (port, &DATAGRAMS, true)));
    for (port, manner, is_udp) in work {
        let target = Target {
            client: arguments.identity.number,
            from: arguments.identity.address,
            to: SocketAddrV4::new(arguments.vip, *port),
        };
        for number in 0..manner.threads {
            let thread = thread::Builder::new()
                .name(format!("{} {port}", manner.name))
                .spawn(move || {
                    // Not all at once.
                    thread::sleep(manner.pause * number as u32 / manner.threads as u32);
                    while !HAS_TO_END.load(Ordering::Relaxed) {
                        let outcome = if is_udp {
                            datagrams(target, manner)
                        } else {
                            connection(target, manner)
                        };
                        if let Err(trouble) = outcome {
                            record(&trouble);
                            thread::sleep(PAUSE);
                        }
                    }
                })
                .context("cannot start a thread")?;
            threads.push(thread);
        }
    }
    record(&Record::Ready);
    for thread in threads {
        if thread.join().is_err() {
            anyhow::bail!("a thread panicked");
        }
    }
    let totals = TOTALS.lock().unwrap_or_else(PoisonError::into_inner);
    record(&Record::Totals(totals.clone()));
    Ok(())
}

/// Why a connection was given up.
enum Trouble {
    Failed(io::Error),
    Wrong(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn kind(error: &io::Error) -> Kind {
    match error.kind() {
        ErrorKind::ConnectionRefused => Kind::Refused,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Kind::Silence,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
            Kind::Unreachable
        }
        _ => Kind::Reset,
    }
}

/// An open connection.
struct Connection<'a> {
    target: Target,
    manner: &'a Manner,
    number: u64,
    is_open: bool,
    /// The client's.
    port: u16,
    server: Option<u16>,
    /// Bytes so far.
    sent: u64,
    received: u64,
    good_at_ns: u64,
    totals: Totals,
}

/// Opens a connection, asks on it as often as the manner says, and closes it.
fn connection(target: Target, manner: &Manner) -> Result<(), Record> {
    let began_ns = now_ns();
    let mut this = Connection {
        target,
        manner,
        number: target.connection(),
        is_open: false,
        port: 0,
        server: None,
        sent: 0,
        received: 0,
        good_at_ns: began_ns,
        totals: Totals::default(),
    };
    let outcome = this.live();
    target.count(this.totals);
    outcome.map_err(|trouble| match trouble {
        Trouble::Wrong(what) => Record::Violation {
            at_ns: now_ns(),
            what: format!("client {}: {what}", target.client),
        },
        Trouble::Failed(error) => Record::Failure(Failure {
            began_ns,
            since_ns: this.good_at_ns,
            at_ns: now_ns(),
            kind: match kind(&error) {
                // Nobody resets what is not open: the kernel gave up without saying why, as no neighbour answered.
                Kind::Reset if !this.is_open && error.raw_os_error().is_none() => Kind::Unreachable,
                kind => kind,
            },
            is_new: !this.is_open,
            is_udp: false,
            client: target.client,
            listener: target.listener(),
            server: this.server,
            connection: this.number,
            what: format!(
                "{} from port {}, after {} requests, {} bytes sent and {} received: {error}",
                manner.name, this.port, this.totals.requests, this.sent, this.received
            ),
        }),
    })
}

impl Connection<'_> {
    fn live(&mut self) -> Result<(), Trouble> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddrV4::new(self.target.from, 0).into())?;
        socket.connect_timeout(&self.target.to.into(), PATIENCE)?;
        let mut stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        self.port = stream.local_addr()?.port();
        self.totals.connections += 1;
        self.is_open = true;
        self.good_at_ns = now_ns();
        for number in 0..self.manner.requests {
            self.ask(&mut stream, number)?;
            if HAS_TO_END.load(Ordering::Relaxed) {
                break;
            }
            thread::sleep(self.manner.pause);
        }
        Ok(())
    }

    fn ask(&mut self, stream: &mut TcpStream, number: u64) -> Result<(), Trouble> {
        let request = request(
            self.target,
            self.manner,
            self.number,
            number,
            self.sent,
            self.received,
        );
        stream.write_all(&request.to_bytes())?;
        let content = Content::new(self.number, Author::Client);
        let mut piece = [0; PIECE_BYTES];
        let mut left = request.length;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            content.fill(self.sent, piece);
            stream.write_all(piece)?;
            // What the kernel has taken need not have arrived; but then room must have been made before.
            self.sent += piece.len() as u64;
            left -= piece.len() as u64;
            if left > 0 {
                thread::sleep(self.manner.piece_pause);
            }
        }
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let answer = Answer::parse(&header)
            .ok_or_else(|| Trouble::Wrong(format!("{request:?} was answered by {header:?}")))?;
        if let Some(objection) = answer.objection(&request, self.server) {
            return Err(Trouble::Wrong(objection));
        }
        self.server = Some(answer.server);
        self.good_at_ns = now_ns();
        let content = Content::new(self.number, Author::Server(answer.server));
        let mut left = request.answer_length;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            stream.read_exact(piece)?;
            if let Some(at) = content.first_wrong(self.received, piece) {
                return Err(Trouble::Wrong(format!(
                    "a wrong byte at {at} of the answer of server {} to {request:?}",
                    answer.server
                )));
            }
            self.good_at_ns = now_ns();
            self.received += piece.len() as u64;
            left -= piece.len() as u64;
        }
        self.totals.requests += 1;
        self.totals.bytes += request.length + request.answer_length;
        Ok(())
    }
}

/// The request `number` of a connection, of a size that only this number decides.
fn request(
    target: Target,
    manner: &Manner,
    connection: u64,
    number: u64,
    sent: u64,
    received: u64,
) -> Request {
    let size = |most: u64, salt: u64| mix(connection ^ mix(number ^ salt)) % (most + 1);
    Request {
        listener: target.listener(),
        is_silent: false,
        connection,
        offset: sent,
        length: size(manner.request_bytes, 0),
        answer_offset: received,
        answer_length: size(manner.answer_bytes, 1 << 63),
        pause_ns: manner.piece_pause.as_nanos() as u64,
    }
}

/// Asks by datagrams from one socket.
fn datagrams(target: Target, manner: &Manner) -> Result<(), Record> {
    let number = target.connection();
    let mut totals = Totals::default();
    let mut server = None;
    let began_ns = now_ns();
    let mut since_ns = began_ns;
    let outcome = (|| {
        let socket = UdpSocket::bind((target.from, 0))?;
        totals.connections += 1;
        // How often each was sent, less the answers to it.
        let mut owed = BTreeMap::new();
        for count in 0..manner.requests {
            let offset = count * DATAGRAM_STRIDE;
            let request = request(target, manner, number, count, offset, offset);
            server = Some(exchange(&socket, target, &request, &mut owed, &mut totals)?);
            since_ns = now_ns();
            totals.requests += 1;
            totals.bytes += request.length + request.answer_length;
            if HAS_TO_END.load(Ordering::Relaxed) {
                break;
            }
            thread::sleep(manner.pause);
        }
        Ok(())
    })();
    target.count(totals);
    outcome.map_err(|trouble| match trouble {
        Trouble::Wrong(what) => Record::Violation {
            at_ns: now_ns(),
            what: format!("client {}: {what}", target.client),
        },
        Trouble::Failed(error) => Record::Failure(Failure {
            began_ns,
            since_ns,
            at_ns: now_ns(),
            kind: kind(&error),
            is_new: server.is_none(),
            is_udp: true,
            client: target.client,
            listener: target.listener(),
            server,
            connection: number,
            what: format!("datagrams, after {} requests: {error}", totals.requests),
        }),
    })
}

/// Sends a datagram until it is answered; returns by whom.
fn exchange(
    socket: &UdpSocket,
    target: Target,
    request: &Request,
    owed: &mut BTreeMap<u64, u32>,
    totals: &mut Totals,
) -> Result<u16, Trouble> {
    let mut datagram = vec![0; HEADER_BYTES + request.length as usize];
    datagram[..HEADER_BYTES].copy_from_slice(&request.to_bytes());
    Content::new(request.connection, Author::Client).fill(request.offset, &mut datagram[HEADER_BYTES..]);
    let mut buffer = [0; 2048];
    let mut last_error = io::Error::from(ErrorKind::TimedOut);
    for number in 0..TRIES {
        totals.repeated += u64::from(number > 0);
        let began = Instant::now();
        match socket.send_to(&datagram, target.to) {
            Ok(_) => *owed.entry(request.offset).or_insert(0) += 1,
            // What the network says now it need not say at the next try.
            Err(error) => last_error = error,
        }
        while let Some(left) = REPEAT_AFTER
            .checked_sub(began.elapsed())
            .filter(|left| !left.is_zero())
        {
            socket.set_read_timeout(Some(left))?;
            let (length, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if kind(&error) == Kind::Silence => break,
                Err(error) => {
                    last_error = error;
                    continue;
                }
            };
            let answer = check(&buffer[..length], from, target, request).map_err(Trouble::Wrong)?;
            let one = owed.get_mut(&answer.answer_offset).filter(|owed| **owed > 0);
            match one {
                Some(owed) => *owed -= 1,
                None => {
                    return Err(Trouble::Wrong(format!(
                        "{answer:?} came more often than it was asked for"
                    )));
                }
            }
            if answer.answer_offset == request.answer_offset {
                return Ok(answer.server);
            }
            // Else it is late: an answer to what was repeated.
        }
    }
    Err(last_error.into())
}

/// What is right in itself: an answer to this request or an earlier one of the same socket.
fn check(bytes: &[u8], from: SocketAddr, target: Target, request: &Request) -> Result<Answer, String> {
    if from != SocketAddr::V4(target.to) {
        return Err(format!("{from} answers in place of {}", target.to));
    }
    let (answer, body) = bytes
        .split_first_chunk()
        .and_then(|(header, body)| Some((Answer::parse(header)?, body)))
        .ok_or_else(|| format!("{request:?} was answered by {bytes:?}"))?;
    if answer.answer_offset == request.answer_offset {
        if let Some(objection) = answer.objection(request, None) {
            return Err(objection);
        }
    } else if answer.connection != request.connection
        || answer.listener != request.listener
        || answer.is_wrong
    {
        return Err(format!("while {request:?} was asked, {answer:?} came"));
    }
    let content = Content::new(answer.connection, Author::Server(answer.server));
    match content.first_wrong(answer.answer_offset, body) {
        None if body.len() as u64 == answer.answer_length => Ok(answer),
        wrong => Err(format!(
            "{} bytes of {answer:?} came, the first wrong one at {wrong:?}",
            body.len()
        )),
    }
}
