//! A steady client: a request every few milliseconds on a connection of its own, whatever becomes of those before.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::lab::{Namespace, topology::PORT};

/// Between two requests.
pub(crate) const PERIOD: Duration = Duration::from_millis(5);
/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// What became of one request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) sent_at: Instant,
    pub(crate) took: Duration,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
}

/// Sends requests for `time`, and waits for the last answers.
pub(crate) fn steady(client: &Namespace, vip: Ipv4Addr, time: Duration) -> Result<Vec<Request>> {
    client.inside(|| {
        // On this thread alone: it is the one that is in the namespace.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut requests = JoinSet::new();
            let mut done = Vec::new();
            let mut ticks = interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let start = Instant::now();
            while start.elapsed() < time {
                tokio::select! {
                    _ = ticks.tick() => drop(requests.spawn(request(SocketAddrV4::new(vip, PORT)))),
                    Some(ended) = requests.join_next() => done.push(ended?),
                }
            }
            while let Some(ended) = requests.join_next().await {
                done.push(ended?);
            }
            Ok(done)
        })
    })?
}

async fn request(to: SocketAddrV4) -> Request {
    let sent_at = Instant::now();
    let failure = match timeout(PATIENCE, get(to)).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("no answer".to_owned()),
    };
    Request {
        sent_at,
        took: sent_at.elapsed(),
        failure,
    }
}

async fn get(to: SocketAddrV4) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    if answer.starts_with(b"HTTP/1.1 200 ") {
        Ok(())
    } else {
        Err(std::io::Error::other("another answer than status 200"))
    }
}
