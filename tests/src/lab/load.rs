//! Clients: `curl` for a request that is looked at, `wrk` for many.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{Lab, Namespace, Process, Service, find};

/// What one request of curl's ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The body of a response with status 200.
    Body(String),
    /// Why there is none, in curl's words.
    Failed(String),
}

impl Answer {
    pub fn body(&self) -> Option<&str> {
        match self {
            Self::Body(body) => Some(body),
            Self::Failed(_) => None,
        }
    }
}

/// One `curl` on a connection of its own; it gives up after two seconds.
pub fn curl(client: &Namespace, vip: impl Into<IpAddr>, port: u16) -> Result<Answer> {
    let url = format!("http://{}/", SocketAddr::new(vip.into(), port));
    let output = client.output(
        "curl",
        &["--silent", "--show-error", "--fail", "--max-time", "2", &url],
    )?;
    Ok(if output.status.success() {
        Answer::Body(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    } else {
        Answer::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    })
}

/// A connection that a client keeps open, for one request after the other.
#[derive(Debug)]
pub struct KeptConnection(BufReader<TcpStream>);

impl KeptConnection {
    pub fn open(client: &Namespace, vip: Ipv4Addr, port: u16) -> Result<Self> {
        let stream = client.inside(|| TcpStream::connect((vip, port)))??;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// One request; returns the body of its response.
    pub fn get(&mut self) -> Result<String> {
        self.0
            .get_mut()
            .write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                bail!("the server closed the connection");
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            } else if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(String::from_utf8(body)?.trim_end().to_owned())
    }
}

/// How a client of `wrk` uses its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// Each thread keeps its share of them for all its requests.
    KeepAlive,
    /// A new one for each request.
    PerRequest,
}

/// What wrk counted.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Responses received completely.
    pub requests: u64,
    /// Connect, read, write errors and timeouts.
    pub socket_errors: u64,
    /// Responses with a status of 400 or above.
    pub refused: u64,
    /// Requests per second, as wrk prints it.
    pub rate: f64,
    /// Time from a request to its answer, of half of them and of 99 in 100, where [`Wrk::has_latency`].
    pub half_within: Option<Duration>,
    pub most_within: Option<Duration>,
    /// Of whole responses.
    pub bytes_per_second: f64,
}

/// A run of wrk.
#[derive(Clone, Copy, Debug)]
pub struct Wrk<'a> {
    pub url: &'a str,
    pub kind: Connections,
    /// Open at a time.
    pub connections: u32,
    pub threads: u32,
    /// Whole seconds.
    pub duration: Duration,
    /// Where all of it runs; `None`: anywhere.
    pub cpu: Option<usize>,
    pub has_latency: bool,
}

/// Runs `wrk` with two threads and `connections` connections open at a time.
pub fn wrk(
    client: &Namespace,
    vip: Ipv4Addr,
    port: u16,
    kind: Connections,
    connections: u32,
    duration: Duration,
) -> Result<Load> {
    run_wrk(
        client,
        &Wrk {
            url: &format!("http://{vip}:{port}/"),
            kind,
            connections,
            threads: 2,
            duration,
            cpu: None,
            has_latency: false,
        },
    )
}

impl Wrk<'_> {
    /// Its command line.
    fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(cpu) = self.cpu {
            words.extend(["taskset", "-c", &cpu.to_string()].map(str::to_owned));
        }
        words.extend([
            "wrk".to_owned(),
            format!("-t{}", self.threads),
            format!("-c{}", self.connections),
            format!("-d{}s", self.duration.as_secs()),
        ]);
        if self.has_latency {
            words.push("--latency".to_owned());
        }
        if self.kind == Connections::PerRequest {
            words.extend(["-H", "Connection: close"].map(str::to_owned));
        }
        words.push(self.url.to_owned());
        words
    }
}

/// Starts a `wrk` that may run into failures; whoever has the process stops it.
///
/// Once it runs, it goes on whatever becomes of its connections. But its very first one blocks it until that is answered:
/// a load of many short runs may be none while a server is silent.
pub fn start_wrk(lab: &Lab, client: &Namespace, wrk: &Wrk<'_>) -> Result<Process> {
    let words = wrk.words();
    let program = find(&words[0]).with_context(|| format!("{} is not installed", words[0]))?;
    let arguments: Vec<&OsStr> = words[1..].iter().map(OsStr::new).collect();
    let service = Service {
        name: "wrk",
        program: &program,
        arguments: &arguments,
        environment: &[],
        stop_signal: Signal::SIGTERM,
        log: &lab.directory().join("wrk.log"),
    };
    lab.spawn(client, &service)
}

/// Runs `wrk` to its end.
pub fn run_wrk(client: &Namespace, wrk: &Wrk<'_>) -> Result<Load> {
    let words = wrk.words();
    let arguments: Vec<&str> = words[1..].iter().map(String::as_str).collect();
    let output = client.output(&words[0], &arguments)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!(
            "wrk failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    parse_wrk(&text).with_context(|| format!("wrk said something new: {text}"))
}

fn parse_wrk(text: &str) -> Option<Load> {
    let mut load = Load {
        requests: 0,
        socket_errors: 0,
        refused: 0,
        rate: 0.0,
        half_within: None,
        most_within: None,
        bytes_per_second: 0.0,
    };
    let mut is_complete = false;
    for line in text.lines().map(str::trim) {
        if let Some(errors) = line.strip_prefix("Socket errors: ") {
            for error in errors.split(", ") {
                load.socket_errors += error.rsplit(' ').next()?.parse::<u64>().ok()?;
            }
        } else if let Some(refused) = line.strip_prefix("Non-2xx or 3xx responses: ") {
            load.refused = refused.parse().ok()?;
        } else if let Some(rate) = line.strip_prefix("Requests/sec:") {
            load.rate = rate.trim().parse().ok()?;
            is_complete = true;
        } else if let Some(bytes) = line.strip_prefix("Transfer/sec:") {
            load.bytes_per_second = bytes_of(bytes.trim())?;
        } else if let Some(time) = line.strip_prefix("50% ") {
            load.half_within = Some(time_of(time.trim())?);
        } else if let Some(time) = line.strip_prefix("99% ") {
            load.most_within = Some(time_of(time.trim())?);
        } else if let Some((requests, _)) = line.split_once(" requests in ") {
            load.requests = requests.parse().ok()?;
        }
    }
    is_complete.then_some(load)
}

/// A number with its unit, apart.
fn split_unit(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|letter: char| letter.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit))
}

/// `1.91ms`
fn time_of(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(number * seconds))
}

/// `6.02MB`; wrk counts in steps of 1024.
fn bytes_of(text: &str) -> Option<f64> {
    let (number, unit) = split_unit(text)?;
    let power = match unit {
        "B" => 0,
        "KB" => 1,
        "MB" => 2,
        "GB" => 3,
        "TB" => 4,
        _ => return None,
    };
    Some(number * 1024_f64.powi(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_run_of_wrk_is_read() {
        let text = "Running 10s test @ http://172.16.0.100/\n  2 threads and 64 connections\n  Thread Stats   Avg      \
                    Stdev     Max   +/- Stdev\n    Latency     1.91ms    1.03ms  27.22ms   91.77%\n  342312 requests \
                    in 10.03s, 60.39MB read\nRequests/sec:  34123.91\nTransfer/sec:      6.02MB\n";
        let load = parse_wrk(text).unwrap();
        assert_eq!(
            load,
            Load {
                requests: 342_312,
                socket_errors: 0,
                refused: 0,
                rate: 34123.91,
                half_within: None,
                most_within: None,
                bytes_per_second: 6.02 * 1024.0 * 1024.0,
            }
        );
    }

    #[test]
    fn the_distribution_of_latency_is_read() {
        let text = "  Latency Distribution\n     50%  412.00us\n     75%    0.95ms\n     90%    1.20ms\n     99%    1.03s \n  \
                    10 requests in 1.00s, 1KB read\nRequests/sec:  10.00\nTransfer/sec:    820.00B\n";
        let load = parse_wrk(text).unwrap();
        assert_eq!(load.half_within, Some(Duration::from_micros(412)));
        assert_eq!(load.most_within, Some(Duration::from_millis(1030)));
        assert_eq!(load.bytes_per_second, 820.0);
    }

    #[test]
    fn errors_of_wrk_are_added_up() {
        let text = "  10 requests in 1.00s, 1KB read\n  Socket errors: connect 1, read 2, write 3, timeout 4\n  \
                    Non-2xx or 3xx responses: 5\nRequests/sec:  10.00\n";
        let load = parse_wrk(text).unwrap();
        assert_eq!((load.socket_errors, load.refused), (10, 5));
    }
}
