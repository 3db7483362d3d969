//! Health checks as the configuration has them: of backend groups and of tunnels.
//!
//! `read` knows the keys and what each may be alone, `rules` what they mean together; here is what comes out.
//! How a probe is done is the module `health`'s.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

pub mod read;
pub mod rules;

/// How the backends of a group, or the far side of a tunnel, are probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: Probe,
    /// 100 ms to 300 s.
    pub interval: Duration,
    /// 50 ms to 300 s.
    pub timeout: Duration,
    /// Successes in a row that make an unhealthy target healthy, 1 to 10.
    pub rise: u32,
    /// Failures in a row that make a healthy target unhealthy, 1 to 10.
    pub fall: u32,
    /// How far a probe may be from its place in the schedule, in percent of the interval, 0 to 25.
    pub jitter_percent: u32,
    /// Port to probe; `None`: the backend's own.
    pub port: Option<u16>,
}

/// What a probe sends and expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A TCP handshake.
    Tcp,
    /// An HTTP/1.1 request.
    Http(HttpProbe),
    /// The same inside TLS.
    Https(HttpProbe, Trust),
    /// A datagram.
    Udp {
        /// At most 1024 bytes; may be empty.
        send: Vec<u8>,
        /// What the answer has to contain; `None`: silence is as good as any answer.
        answer: Option<Vec<u8>>,
    },
    /// `grpc.health.v1.Health/Check` over HTTP/2 without TLS.
    Grpc {
        /// The service asked about; empty: the server as a whole.
        service: String,
        /// The `:authority` of the request; `None`: the probed address and port.
        host: Option<String>,
    },
    /// An echo request.
    Icmp,
    /// A program of this host that probes in its own way: its path, then its arguments.
    Command(Vec<String>),
}

impl Probe {
    /// The word of `kind`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http(_) => "http",
            Self::Https(..) => "https",
            Self::Udp { .. } => "udp",
            Self::Grpc { .. } => "grpc",
            Self::Icmp => "icmp",
            Self::Command(_) => "command",
        }
    }

    /// Whether it goes to a port. A command may look at one, or not.
    #[must_use]
    pub fn needs_port(&self) -> bool {
        !matches!(self, Self::Icmp | Self::Command(_))
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("TCP check"),
            Self::Http(http) => write!(f, "HTTP check of {}", http.path),
            Self::Https(http, _) => write!(f, "HTTPS check of {}", http.path),
            Self::Udp { .. } => f.write_str("UDP check"),
            Self::Grpc { service, .. } if service.is_empty() => f.write_str("gRPC check"),
            Self::Grpc { service, .. } => write!(f, "gRPC check of {service}"),
            Self::Icmp => f.write_str("ICMP check"),
            Self::Command(command) => {
                write!(f, "check by {}", command.first().map_or("", String::as_str))
            }
        }
    }
}

/// An HTTP request and the answer that counts as good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProbe {
    pub method: Method,
    pub path: String,
    /// The Host header and, with TLS, the server name; `None`: the probed address and port.
    pub host: Option<String>,
    /// The status has to be one of these.
    pub expect: Vec<StatusRange>,
    /// The body has to match this as well.
    pub body: Option<BodyMatch>,
}

/// Methods without a body, whose answer tells something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Head,
    Options,
    Post,
}

impl Method {
    /// The word of HTTP.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Options => "OPTIONS",
            Self::Post => "POST",
        }
    }
}

/// What the body of an answer has to hold, within its first 64 KiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyMatch {
    /// These characters.
    Text(String),
    Pattern(Pattern),
}

impl BodyMatch {
    /// Does the body match?
    #[must_use]
    pub fn is_in(&self, body: &[u8]) -> bool {
        match self {
            Self::Text(text) => contains(body, text.as_bytes()),
            Self::Pattern(Pattern(pattern)) => pattern.is_match(body),
        }
    }
}

impl fmt::Display for BodyMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Pattern(Pattern(pattern)) => write!(f, "a match of {:?}", pattern.as_str()),
        }
    }
}

/// A regular expression; two are equal if they are written the same.
#[derive(Clone, Debug)]
pub struct Pattern(pub(crate) regex::bytes::Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

/// Are the bytes of `needle` somewhere in `whole`?
#[must_use]
pub fn contains(whole: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || whole.windows(needle.len()).any(|window| window == needle)
}

/// Whose certificates an HTTPS probe accepts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Any: the probe asks whether the server works, not who it is.
    Anyone,
    /// Those that this host's certificate authorities have signed.
    Host,
    /// Those that an authority in this file (PEM) has signed.
    File(PathBuf),
}

/// Inclusive range of HTTP status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRange {
    pub first: u16,
    pub last: u16,
}

/// How a tunnel is probed, apart from the backends behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelCheck {
    /// An address of the far side, which answers through the tunnel.
    pub address: IpAddr,
    /// [`Probe::Icmp`], or [`Probe::Tcp`] with a port.
    pub check: HealthCheck,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_holds_a_text_or_matches_a_pattern() {
        let text = BodyMatch::Text("ready".to_owned());
        assert!(text.is_in(b"all ready.") && !text.is_in(b"read y") && !text.is_in(b""));
        let pattern = BodyMatch::Pattern(Pattern(regex::bytes::Regex::new("^ok [0-9]+$").unwrap()));
        assert!(pattern.is_in(b"ok 17") && !pattern.is_in(b"ok none"));
        // A body need not be text.
        assert!(text.is_in(b"\xff\x00ready\xff"));
    }

    #[test]
    fn probes_are_told_by_their_names() {
        let command = Probe::Command(vec!["/usr/bin/check-db".to_owned(), "--fast".to_owned()]);
        assert_eq!(command.to_string(), "check by /usr/bin/check-db");
        let grpc = |service: &str| Probe::Grpc {
            service: service.to_owned(),
            host: None,
        };
        assert_eq!(grpc("").to_string(), "gRPC check");
        assert_eq!(grpc("shop.Cart").to_string(), "gRPC check of shop.Cart");
    }
}
