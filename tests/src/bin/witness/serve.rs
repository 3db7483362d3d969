//! The server: one thread per connection, one per port of datagrams.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use forwarder_tests::witness::{Answer, Author, Content, HEADER_BYTES, Record, Request, SERVER_PORTS};

use crate::{Identity, Listeners, record, violation};

/// Piece of an answer that is sent at once, in bytes.
const PIECE_BYTES: usize = 16 << 10;
/// Of a thread that has little to do.
const STACK_BYTES: usize = 256 << 10;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    identity: Identity,
    #[command(flatten)]
    listeners: Listeners,
}

/// One server's place at one listener.
#[derive(Clone, Copy)]
struct Place {
    server: u16,
    listener: u16,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Identity { number, address } = arguments.identity;
    let place = |listener: u16| Place {
        server: number,
        listener,
    };
    let mut threads = Vec::new();
    for listener in &arguments.listeners.tcp {
        let place = place(*listener);
        let socket = TcpListener::bind((address, SERVER_PORTS + listener))
            .with_context(|| format!("cannot serve listener {listener}"))?;
        threads.push(spawn("accept", move || accept(&socket, place))?);
    }
    for listener in &arguments.listeners.udp {
        let place = place(*listener);
        let socket = UdpSocket::bind((address, SERVER_PORTS + listener))
            .with_context(|| format!("cannot serve listener {listener}"))?;
        threads.push(spawn("datagrams", move || datagrams(&socket, place))?);
    }
    record(&Record::Ready);
    for thread in threads {
        // They end with the process only.
        let _ = thread.join();
    }
    Ok(())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(work)
        .context("cannot start a thread")
}

fn accept(socket: &TcpListener, place: Place) {
    for stream in socket.incoming() {
        // One that was reset before it was accepted is the client's affair.
        let Ok(mut stream) = stream else { continue };
        let started = spawn("connection", move || {
            // However it ends: the client tells what it has seen.
            let _ = converse(&mut stream, place);
        });
        if let Err(error) = started {
            eprintln!("witness: {error:#}");
        }
    }
}

/// Answers requests until the connection ends.
fn converse(stream: &mut TcpStream, place: Place) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    let mut known = None;
    let (mut received, mut sent) = (0, 0);
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let Some(request) = Request::parse(&header) else {
            violation(format!(
                "{} has got bytes that are no request from {peer}",
                name(place)
            ));
            return Ok(());
        };
        let is_expected = request.listener == place.listener
            && !request.is_silent
            && known.is_none_or(|known| known == request.connection)
            && request.offset == received
            && request.answer_offset == sent;
        if !is_expected {
            violation(format!(
                "{}, after {received} and {sent} bytes of connection {known:?} from {peer}, has got {request:?}",
                name(place)
            ));
        }
        known = Some(request.connection);
        let content = Content::new(request.connection, Author::Client);
        let mut is_wrong = !is_expected;
        let mut left = request.length;
        let mut piece = [0; PIECE_BYTES];
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            stream.read_exact(piece)?;
            if !is_wrong && let Some(at) = content.first_wrong(received, piece) {
                is_wrong = true;
                violation(format!(
                    "{} has got a wrong byte at {at} of {request:?} from {peer}",
                    name(place)
                ));
            }
            received += piece.len() as u64;
            left -= piece.len() as u64;
        }
        let answer = Answer {
            server: place.server,
            listener: place.listener,
            connection: request.connection,
            offset: received - request.length,
            length: request.length,
            is_wrong,
            answer_offset: sent,
            answer_length: request.answer_length,
        };
        stream.write_all(&answer.to_bytes())?;
        let content = Content::new(request.connection, Author::Server(place.server));
        let mut left = request.answer_length;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            content.fill(sent, piece);
            stream.write_all(piece)?;
            sent += piece.len() as u64;
            left -= piece.len() as u64;
            if request.pause_ns > 0 {
                thread::sleep(Duration::from_nanos(request.pause_ns));
            }
        }
    }
}

fn datagrams(socket: &UdpSocket, place: Place) {
    let mut buffer = [0; 2048];
    loop {
        // Errors are ICMP's, about answers to clients that are gone.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let Some(answer) = datagram(&buffer[..length], peer, place) else {
            continue;
        };
        // The client tells whether it arrived.
        let _ = socket.send_to(&answer, peer);
    }
}

fn datagram(bytes: &[u8], peer: SocketAddr, place: Place) -> Option<Vec<u8>> {
    let Some((request, body)) = bytes
        .split_first_chunk()
        .and_then(|(header, body)| Some((Request::parse(header)?, body)))
    else {
        violation(format!(
            "{} has got a datagram that is no request from {peer}",
            name(place)
        ));
        return None;
    };
    let wrong = Content::new(request.connection, Author::Client).first_wrong(request.offset, body);
    let is_wrong =
        request.listener != place.listener || body.len() as u64 != request.length || wrong.is_some();
    if is_wrong {
        violation(format!(
            "{} has got {} bytes, the first wrong one at {wrong:?}, with {request:?} from {peer}",
            name(place),
            body.len()
        ));
    }
    if request.is_silent {
        return None;
    }
    let mut answer = vec![0; HEADER_BYTES + request.answer_length as usize];
    let (header, rest) = answer.split_at_mut(HEADER_BYTES);
    let head = Answer {
        server: place.server,
        listener: place.listener,
        connection: request.connection,
        offset: request.offset,
        length: body.len() as u64,
        is_wrong,
        answer_offset: request.answer_offset,
        answer_length: request.answer_length,
    };
    header.copy_from_slice(&head.to_bytes());
    Content::new(request.connection, Author::Server(place.server)).fill(request.answer_offset, rest);
    Some(answer)
}

fn name(place: Place) -> String {
    format!("server {} of listener {}", place.server, place.listener)
}
