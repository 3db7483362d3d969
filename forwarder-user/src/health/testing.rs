//! Servers of every bad habit, on loopback, for this module's tests. Each serves one connection (or none).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

use super::origin::Origin;
use crate::config::{HttpProbe, Method, StatusRange};

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Probes of tests leave from here.
pub(super) fn loopback() -> Origin {
    Origin::Address(LOOPBACK)
}

/// A GET whose answer is good from 200 to 399.
pub(super) fn get(path: &str) -> HttpProbe {
    HttpProbe {
        method: Method::Get,
        path: path.to_owned(),
        host: None,
        expect: vec![StatusRange {
            first: 200,
            last: 399,
        }],
        body: None,
    }
}

pub(super) struct Server {
    pub(super) address: SocketAddr,
    task: JoinHandle<io::Result<Vec<u8>>>,
    peer: oneshot::Receiver<SocketAddr>,
}

impl Server {
    async fn serve<F>(behave: impl FnOnce(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = io::Result<Vec<u8>>> + Send,
    {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell_peer, peer) = oneshot::channel();
        let task = tokio::spawn(async move {
            let (stream, from) = listener.accept().await?;
            let _ = tell_peer.send(from);
            behave(stream).await
        });
        Self { address, task, peer }
    }

    /// Reads until the client closes; [`Server::ended`] yields what it read.
    pub(super) async fn read_to_end() -> Self {
        Self::greet(b"").await
    }

    /// Speaks first, then reads until the client closes.
    pub(super) async fn greet(greeting: &'static [u8]) -> Self {
        Self::serve(move |mut stream| async move {
            stream.write_all(greeting).await?;
            let mut read = Vec::new();
            stream.read_to_end(&mut read).await?;
            Ok(read)
        })
        .await
    }

    /// Reads the head of a request, sends `answer` and closes.
    pub(super) async fn answer(answer: &[u8]) -> Self {
        let answer = answer.to_vec();
        Self::serve(move |mut stream| async move {
            let request = read_head(&mut stream).await?;
            stream.write_all(&answer).await?;
            stream.shutdown().await?;
            Ok(request)
        })
        .await
    }

    /// Reads the head of a request, sends `answer` and keeps the connection open until the client closes.
    pub(super) async fn answer_and_stay(answer: &'static [u8]) -> Self {
        Self::serve(move |mut stream| async move {
            let request = read_head(&mut stream).await?;
            stream.write_all(answer).await?;
            stream.read_to_end(&mut Vec::new()).await?;
            Ok(request)
        })
        .await
    }

    /// Reads the head of a request and resets the connection.
    pub(super) async fn reset() -> Self {
        Self::serve(|mut stream| async move {
            let request = read_head(&mut stream).await?;
            stream.set_zero_linger()?;
            Ok(request)
        })
        .await
    }

    /// Listens with a full backlog, so that a further SYN gets no answer.
    pub(super) async fn never_accepting() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((LOOPBACK, 0).into()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        // A backlog of 0 holds one connection.
        let occupant = TcpStream::connect(address).await.unwrap();
        let (_, peer) = oneshot::channel();
        let task = tokio::spawn(async move {
            let _open = (listener, occupant);
            std::future::pending().await
        });
        Self { address, task, peer }
    }

    /// What the server read, once its connection is over; an error if that ended badly.
    pub(super) async fn ended(self) -> io::Result<Vec<u8>> {
        tokio::time::timeout(Duration::from_secs(10), self.task)
            .await
            .expect("the server must end")
            .unwrap()
    }

    /// Who connected.
    pub(super) async fn peer(self) -> SocketAddr {
        self.peer.await.unwrap()
    }
}

async fn read_head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(head)
}

/// An address where nothing listens, nor will while this process lives: a socket holds the port.
pub(super) fn refusing() -> SocketAddr {
    let holder = TcpSocket::new_v4().unwrap();
    holder.bind((LOOPBACK, 0).into()).unwrap();
    let address = holder.local_addr().unwrap();
    std::mem::forget(holder);
    address
}
