//! Real web servers: an nginx of its own configuration, files and process per server.
//!
//! Each nginx is one process (`master_process off`): when it is killed with the lab, no worker is left over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::{Lab, Namespace, Process, Service, find, tail, wait_until};

/// From the start of the process to the first connection; generous, as machines under test are busy.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// For an answer from its own host.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A server that answers every request with one text.
#[derive(Debug)]
pub struct Nginx {
    name: String,
    namespace: Namespace,
    ports: Vec<u16>,
    directory: PathBuf,
    process: Option<Process>,
}

impl Nginx {
    /// Writes the configuration and starts the server on all its host's addresses; it accepts connections
    /// when this returns.
    pub fn start(lab: &Lab, namespace: &Namespace, ports: &[u16], body: &str) -> Result<Self> {
        let name = format!("nginx-{}", namespace.role());
        let directory = lab.directory().join(&name);
        fs::create_dir(&directory)?;
        let listen: String = ports
            .iter()
            .map(|port| format!("listen {port}; listen [::]:{port};"))
            .collect();
        let path = directory.display();
        let configuration = format!(
            r#"# One process, in the foreground: the lab stops and starts it.
daemon off;
master_process off;
pid {path}/nginx.pid;
error_log {path}/error.log info;
events {{ worker_connections 8192; }}
http {{
    client_max_body_size 0;
    client_body_temp_path {path}/body;
    proxy_temp_path {path}/proxy;
    fastcgi_temp_path {path}/fastcgi;
    uwsgi_temp_path {path}/uwsgi;
    scgi_temp_path {path}/scgi;
    log_format lab "$remote_addr $remote_port $connection $connection_requests $status";
    access_log {path}/access.log lab;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    default_type text/plain;
    server {{
        {listen}
        location / {{ return 200 "{body}\n"; }}
        location = /written {{ access_log off; return 204; }}
        location = /large {{ root {path}; }}
        location /taken/ {{ root {path}; dav_methods PUT; create_full_put_path on; }}
    }}
}}
"#
        );
        let mut this = Self {
            name,
            namespace: namespace.clone(),
            ports: ports.to_vec(),
            directory,
            process: None,
        };
        fs::write(this.configuration(), configuration)?;
        fs::write(this.directory.join("large"), large_file())?;
        this.restart(lab)?;
        Ok(this)
    }

    /// Starts it (again) and waits until it accepts connections.
    pub fn restart(&mut self, lab: &Lab) -> Result<()> {
        let program = find("nginx").context("nginx is not installed")?;
        let configuration = self.configuration();
        let errors = self.error_log();
        let service = Service {
            name: &self.name,
            program: &program,
            arguments: &[
                "-c".as_ref(),
                configuration.as_ref(),
                "-e".as_ref(),
                errors.as_ref(),
            ],
            environment: &[],
            // What `systemctl stop nginx` sends.
            stop_signal: Signal::SIGQUIT,
            log: &errors,
        };
        let process = lab.spawn(&self.namespace, &service)?;
        for port in &self.ports {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            wait_until(
                &format!("{} to accept connections", self.name),
                START_DEADLINE,
                || {
                    if let Some(status) = process.ended() {
                        bail!("it ended with {status}: {}", tail(&errors, 3));
                    }
                    self.namespace.inside(|| TcpStream::connect(address))??;
                    Ok(())
                },
            )?;
        }
        self.process = Some(process);
        Ok(())
    }

    /// Stops the process, as an operator would.
    pub fn stop(&mut self) -> Result<()> {
        match self.process.take() {
            Some(process) => process.stop().map(drop),
            None => Ok(()),
        }
    }

    /// Ends the process at once, as `kill -9` does.
    pub fn kill(&mut self) -> Result<()> {
        match self.process.take() {
            Some(process) => {
                process.signal(Signal::SIGKILL);
                process.stop().map(drop)
            }
            None => Ok(()),
        }
    }

    /// Suspends the process: its host still accepts connections for it, and nobody answers.
    pub fn pause(&self) {
        if let Some(process) = &self.process {
            process.signal(Signal::SIGSTOP);
        }
    }

    /// How an operator would start the server; with `-s quit` behind it, how to stop it.
    pub fn command_line(&self) -> String {
        format!(
            "nginx -c {} -e {}",
            self.configuration().display(),
            self.error_log().display()
        )
    }

    fn configuration(&self) -> PathBuf {
        self.directory.join("nginx.conf")
    }

    fn error_log(&self) -> PathBuf {
        self.directory.join("error.log")
    }

    /// Everything it was asked, and answered, since it was made or [`Self::clear_logs`] was called.
    pub fn access_log(&self) -> Result<AccessLog> {
        if self.process.is_some() {
            self.wait_for_the_log()?;
        }
        let path = self.directory.join("access.log");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut log = AccessLog::parse(&text)?;
        log.add_silent(&fs::read_to_string(self.error_log())?);
        Ok(log)
    }

    /// A client may have its answer before the line about it is written; the process does one after the other,
    /// so whoever asks it something else has his answer after the line.
    fn wait_for_the_log(&self) -> Result<()> {
        let port = self.ports.first().context("a server has a port")?;
        let mut stream = self
            .namespace
            .inside(|| TcpStream::connect((Ipv4Addr::LOCALHOST, *port)))??;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        stream.write_all(b"GET /written HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("{} does not answer its own host", self.name))?;
        ensure!(answer.starts_with("HTTP/1.1 204"), "{} said {answer}", self.name);
        Ok(())
    }

    /// The file that the server made of a `PUT` to `/taken/<name>`.
    pub fn taken(&self, name: &str) -> PathBuf {
        self.directory.join("taken").join(name)
    }

    /// Replaces what is at `/large`.
    pub fn serve_large(&self, content: &[u8]) -> Result<()> {
        Ok(fs::write(self.directory.join("large"), content)?)
    }

    /// Empties the logs; nothing may be under way.
    pub fn clear_logs(&self) -> Result<()> {
        // nginx appends, so it goes on at the new end.
        fs::write(self.directory.join("access.log"), "")?;
        Ok(fs::write(self.error_log(), "")?)
    }
}

/// What every server has at `/large`: enough for full-sized segments, windows that open and lost packets that
/// show; not a repeated pattern, so that swapped segments show too.
pub fn large_file() -> Vec<u8> {
    pattern(4 << 20)
}

/// `length_bytes` (a multiple of four) that repeat no part of themselves.
pub fn pattern(length_bytes: u32) -> Vec<u8> {
    (0..length_bytes / 4)
        .flat_map(|word| word.wrapping_mul(0x9E37_79B1).to_be_bytes())
        .collect()
}

/// What a server answered, by the address it was asked from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLog {
    sources: BTreeMap<Ipv4Addr, Served>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Served {
    /// (source port, nginx's connection number).
    connections: BTreeSet<(u16, u64)>,
    /// Connections that were closed before a request came.
    silent: u64,
    requests: u64,
    /// Requests with a status outside 200 to 299.
    refused: u64,
}

impl AccessLog {
    fn parse(text: &str) -> Result<Self> {
        let mut log = Self::default();
        for line in text.lines() {
            log.add(line)
                .with_context(|| format!("not a line of the lab's access log: {line:?}"))?;
        }
        Ok(log)
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let mut fields = line.split(' ');
        let served = self.sources.entry(fields.next()?.parse().ok()?).or_default();
        let port = fields.next()?.parse().ok()?;
        served.connections.insert((port, fields.next()?.parse().ok()?));
        let _number_on_its_connection: u64 = fields.next()?.parse().ok()?;
        let status: u16 = fields.next()?.parse().ok()?;
        served.requests += 1;
        served.refused += u64::from(!(200..300).contains(&status));
        fields.next().is_none().then_some(())
    }

    /// Adds what only the error log (level info) knows: connections that ended before their first request,
    /// `… *65 client closed connection while waiting for request, client: 100.64.0.2, server: 0.0.0.0:80`.
    fn add_silent(&mut self, errors: &str) {
        for line in errors.lines() {
            let Some((_, rest)) = line.split_once(" while waiting for request, client: ") else {
                continue;
            };
            let address = rest.split(',').next().and_then(|text| text.parse().ok());
            // The lab itself looks from there whether the server has started.
            if let Some(address) = address.filter(|address: &Ipv4Addr| !address.is_loopback()) {
                self.sources.entry(address).or_default().silent += 1;
            }
        }
    }

    /// The log without what `source` asked, such as the agent's probes.
    #[must_use]
    pub fn without(mut self, source: Ipv4Addr) -> Self {
        self.sources.remove(&source);
        self
    }

    /// Addresses that requests came from.
    pub fn sources(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.sources
            .iter()
            .filter(|(_, served)| served.requests > 0)
            .map(|(address, _)| *address)
    }

    /// Connections on which at least one request was answered.
    pub fn connections(&self) -> u64 {
        self.sources
            .values()
            .map(|served| served.connections.len() as u64)
            .sum()
    }

    /// Connections that were closed before a request came.
    pub fn silent_connections(&self) -> u64 {
        self.sources.values().map(|served| served.silent).sum()
    }

    pub fn requests(&self) -> u64 {
        self.sources.values().map(|served| served.requests).sum()
    }

    /// Requests answered with a status outside 200 to 299.
    pub fn refused(&self) -> u64 {
        self.sources.values().map(|served| served.refused).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_log_is_counted_by_connection_and_request() {
        let log = AccessLog::parse(
            "100.64.0.2 1024 7 1 200\n100.64.0.2 1024 7 2 200\n100.64.0.3 1024 8 1 404\n100.64.0.1 9 9 1 200\n",
        )
        .unwrap();
        let log = log.without(Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!((log.connections(), log.requests(), log.refused()), (2, 3, 1));
        assert_eq!(log.sources().count(), 2);
    }

    #[test]
    fn a_connection_without_a_request_is_in_the_error_log() {
        let mut log = AccessLog::default();
        log.add_silent(
            "2026/11/21 04:30:11 [notice] 1#1: using the \"epoll\" event method\n\
             2026/11/21 04:30:12 [info] 1#1: *65 client closed connection while waiting for request, client: 100.64.0.2, server: 0.0.0.0:80\n\
             2026/11/21 04:30:12 [info] 1#1: *66 client 100.64.0.2 closed keepalive connection\n",
        );
        assert_eq!((log.silent_connections(), log.connections()), (1, 0));
    }

    #[test]
    fn a_foreign_line_is_an_error() {
        assert!(AccessLog::parse("100.64.0.2 - - [10/Oct] \"GET / HTTP/1.1\" 200\n").is_err());
    }
}
