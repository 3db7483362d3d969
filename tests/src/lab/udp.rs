//! A UDP server that answers and remembers whom, and client sockets, inside namespaces.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use super::Namespace;

/// How often the server looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(20);
/// How long a client waits for an answer before it counts as lost.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// Answers each datagram with its name, a space and what it got.
#[derive(Debug)]
pub struct EchoServer {
    socket: UdpSocket,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Serves IPv4.
    pub fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        Self::start_on(namespace, Ipv4Addr::UNSPECIFIED, port)
    }

    /// Serves this address.
    pub fn start_on(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> Result<Self> {
        let socket = open(namespace, address, port)?;
        socket.set_read_timeout(Some(LOOK))?;
        let peers = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new()
            .name(format!("echo on {}", namespace.role()))
            .spawn({
                let (socket, peers, stop) = (socket.try_clone()?, Arc::clone(&peers), Arc::clone(&stop));
                let name = namespace.role().to_owned();
                move || answer(&socket, &name, &peers, &stop)
            })?;
        Ok(Self {
            socket,
            peers,
            stop,
            thread: Some(thread),
        })
    }

    /// Sources of the datagrams over IPv4 so far, in order.
    pub fn peers(&self) -> Vec<SocketAddrV4> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let v4 = peers.iter().filter_map(|peer| match peer {
            SocketAddr::V4(peer) => Some(*peer),
            SocketAddr::V6(_) => None,
        });
        v4.collect()
    }

    /// Has anybody asked?
    pub fn was_asked(&self) -> bool {
        !self
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    /// Sends a datagram that nobody asked for, from the server's own port.
    pub fn send(&self, payload: &[u8], to: SocketAddrV4) -> Result<()> {
        self.socket
            .send_to(payload, to)
            .map(drop)
            .context("cannot send from the server")
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed; the test notices missing answers.
            let _ = thread.join();
        }
    }
}

fn answer(socket: &UdpSocket, name: &str, peers: &Mutex<Vec<SocketAddr>>, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        // Errors are timeouts, or ICMP errors that answers to a closed client socket caused.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
        let reply = [name.as_bytes(), b" ", &buffer[..length]].concat();
        // The client tells whether it arrived.
        let _ = socket.send_to(&reply, peer);
    }
}

/// A client's socket.
#[derive(Debug)]
pub struct Client {
    socket: UdpSocket,
}

impl Client {
    /// Opens a socket on `port`, 0 for any, of all IPv4 addresses of the namespace.
    pub fn open(namespace: &Namespace, port: u16) -> Result<Self> {
        Self::open_on(namespace, Ipv4Addr::UNSPECIFIED, port)
    }

    /// Opens a socket on `port`, 0 for any, of this address.
    pub fn open_on(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> Result<Self> {
        let socket = open(namespace, address, port)?;
        socket.set_read_timeout(Some(ANSWER_DEADLINE))?;
        Ok(Self { socket })
    }

    /// The port it has.
    pub fn port(&self) -> Result<u16> {
        Ok(self.socket.local_addr()?.port())
    }

    pub fn send(&self, payload: &str, to: impl Into<SocketAddr>) -> Result<()> {
        self.socket
            .send_to(payload.as_bytes(), to.into())
            .map(drop)
            .context("cannot send from the client")
    }

    /// The next datagram over IPv4 and whom it came from; `None` when none comes for two seconds.
    pub fn receive(&self) -> Result<Option<(String, SocketAddrV4)>> {
        Ok(self.receive_any()?.and_then(|(text, from)| match from {
            SocketAddr::V4(from) => Some((text, from)),
            SocketAddr::V6(_) => None,
        }))
    }

    fn receive_any(&self) -> Result<Option<(String, SocketAddr)>> {
        let mut buffer = [0; 2048];
        match self.socket.recv_from(&mut buffer) {
            Ok((length, from)) => Ok(Some((
                String::from_utf8_lossy(&buffer[..length]).into_owned(),
                from,
            ))),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error).context("cannot receive on the client"),
        }
    }

    /// Sends `payload` and returns the name of the server that echoed it from the address it was sent to.
    pub fn ask(&self, payload: &str, to: impl Into<SocketAddr>) -> Result<String> {
        let to = to.into();
        self.send(payload, to)?;
        let (answer, from) = self
            .receive_any()?
            .with_context(|| format!("no answer to {} bytes from {to}", payload.len()))?;
        let (server, echoed) = answer.split_once(' ').context("an answer without a name")?;
        anyhow::ensure!(from == to, "asked {to}, but {from} answered");
        anyhow::ensure!(echoed == payload, "sent {payload:?}, got {echoed:?} back");
        Ok(server.to_owned())
    }
}

fn open(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> Result<UdpSocket> {
    let address = address.into();
    namespace
        .inside(|| UdpSocket::bind((address, port)))?
        .with_context(|| {
            format!(
                "cannot open UDP port {port} in the namespace {}",
                namespace.role()
            )
        })
}
