//! Thousands of real TCP connections, held open: the two sides of the tests of the SNAT pool.
//!
//! A process holds as many as it may have files, so the tests start several of each kind. A server says who it is when
//! a connection comes in, and again whenever it is asked; a client obeys its standard input, a command a line, and
//! answers each with a line of JSON. Both end when their standard input does.

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use forwarder_tests::lab::crowd::Tally;
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// How long a client waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);
/// Failures after which a command is given up: each may have taken as long as the patience.
const ENOUGH: usize = 3;
/// A question: which connection it is, and which one of its.
const QUESTION_BYTES: usize = 8;
/// Connections that are asked before the first answer is awaited.
const TOGETHER: usize = 64;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

#[derive(Parser)]
enum Role {
    /// Accepts connections, says its identity, and answers each question with its identity and the question
    Serve {
        #[arg(long)]
        address: SocketAddrV4,
        #[arg(long)]
        identity: u8,
    },
    /// Opens, uses and closes connections as it is told: `open N`, `talk`, `close N`
    Connect {
        #[arg(long)]
        to: SocketAddrV4,
        /// Addresses to connect from, in turn
        #[arg(long, required = true, num_args = 1..)]
        from: Vec<Ipv4Addr>,
    },
}

fn main() -> ExitCode {
    let outcome = match Role::parse() {
        Role::Serve { address, identity } => serve(address, identity),
        Role::Connect { to, from } => connect(to, &from),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crowd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Several processes share an address: the kernel spreads connections over them.
#[tokio::main(flavor = "current_thread")]
async fn serve(address: SocketAddrV4, identity: u8) -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    println!("ready");
    let mut input = tokio::io::stdin();
    let mut byte = [0];
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut stream, _) = accepted.context("cannot accept")?;
                tokio::spawn(async move {
                    let mut answer = [0; 1 + QUESTION_BYTES];
                    answer[0] = identity;
                    let mut length = 1;
                    // Ends with the connection, however that ends: the client tells what it has seen.
                    while stream.write_all(&answer[..length]).await.is_ok()
                        && stream.read_exact(&mut answer[1..]).await.is_ok()
                    {
                        length = answer.len();
                    }
                });
            }
            read = input.read(&mut byte) => if read? == 0 {
                return Ok(());
            },
        }
    }
}

/// An open connection and who answered first.
struct Connection {
    stream: TcpStream,
    identity: u8,
    /// What it is asked next: half of it is the connection's.
    question: u64,
}

fn connect(to: SocketAddrV4, from: &[Ipv4Addr]) -> Result<()> {
    let mut connections = Vec::new();
    let mut sources = from.iter().cycle();
    let mut output = io::stdout().lock();
    writeln!(output, "ready")?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (verb, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: usize = number.parse().context("a number")?;
        let tally = match verb {
            "open" => open(&mut connections, number, to, &mut sources),
            "talk" => talk(&mut connections),
            "close" => Tally {
                done: connections.drain(..number.min(connections.len())).count(),
                ..Tally::default()
            },
            _ => bail!("an unknown command: {line:?}"),
        };
        serde_json::to_writer(&mut output, &tally)?;
        writeln!(output)?;
        output.flush()?;
    }
    Ok(())
}

fn open<'a>(
    connections: &mut Vec<Connection>,
    number: usize,
    to: SocketAddrV4,
    sources: &mut impl Iterator<Item = &'a Ipv4Addr>,
) -> Tally {
    let mut tally = Tally::default();
    for source in sources.take(number) {
        let first = (connections.len() as u64) << 32;
        match open_one(to, *source, first) {
            Ok(connection) => {
                connections.push(connection);
                tally.done += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => tally.refused += 1,
            Err(error) => tally.fail(&error),
        }
        if tally.failed >= ENOUGH {
            break;
        }
    }
    tally
}

fn open_one(to: SocketAddrV4, source: Ipv4Addr, question: u64) -> io::Result<Connection> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // The port is chosen when the destination is known, and need not differ from those towards others.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddrV4::new(source, 0).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut identity = [0];
    stream.read_exact(&mut identity)?;
    Ok(Connection {
        stream,
        identity: identity[0],
        question,
    })
}

/// Asks on some connections at a time: what is measured is work, not how long one answer takes.
fn talk(connections: &mut [Connection]) -> Tally {
    let mut tally = Tally::default();
    for some in connections.chunks_mut(TOGETHER) {
        let asked: Vec<_> = some
            .iter_mut()
            .map(|connection| connection.stream.write_all(&connection.question.to_le_bytes()))
            .collect();
        for (connection, asked) in some.iter_mut().zip(asked) {
            let question = connection.question.to_le_bytes();
            connection.question += 1;
            let mut answer = [0; 1 + QUESTION_BYTES];
            match asked.and_then(|()| connection.stream.read_exact(&mut answer)) {
                Ok(()) if answer[0] == connection.identity && answer[1..] == question => tally.done += 1,
                Ok(()) => tally.wrong += 1,
                Err(error) => tally.fail(&error),
            }
            if tally.failed >= ENOUGH {
                return tally;
            }
        }
    }
    tally
}
