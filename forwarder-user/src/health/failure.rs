//! Why a probe failed: one name per thing that a user would do something else about.
//!
//! The kinds are told apart by errno and by how far the probe came, as that is what tells a dead process
//! (refused) from a dead path (timed out) and both from a fault of the gateway itself, which must not take a
//! backend out. *Where* on the path the fault sits is `diagnose`'s question.

use std::{io, net::IpAddr, time::Duration};

use nix::errno::Errno;
use thiserror::Error;

/// How far a probe came before time was up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The TCP handshake did not complete.
    Connect,
    /// Connected, but the TLS handshake did not complete.
    Tls,
    /// Connected, but no answer to the request.
    Answer,
}

/// Why a probe failed. Displays as one clause without a full stop, to follow "backend x: ".
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProbeFailure {
    /// The server (or a firewall in its name) answered the SYN with RST.
    #[error("connection refused: the server answers, but nothing listens on this port")]
    Refused,
    /// Nothing came back in time.
    #[error("{}", timed_out(*stage, *after))]
    TimedOut {
        stage: Stage,
        /// The check's timeout, or less where the kernel gave up first.
        after: Duration,
    },
    /// The kernel had no way to the server, or a router on the way said that it has none.
    #[error("{}", unreachable(*.0))]
    Unreachable(Errno),
    /// The server accepted and then sent RST.
    #[error("connection reset by the server before it answered")]
    Reset,
    /// The server accepted and then closed without an answer.
    #[error("the server closed the connection before it answered")]
    Closed,
    /// An HTTP answer with a status that the check does not expect.
    #[error("HTTP status {status}, expected {expected}")]
    UnexpectedStatus {
        status: u16,
        /// The ranges of the check as the configuration writes them.
        expected: String,
    },
    /// An answer that is not HTTP/1.
    #[error("the answer is not HTTP/1: {0}")]
    MalformedAnswer(String),
    /// The body of an HTTP answer, or its first part, without what the check expects.
    #[error("the body does not contain {expected}")]
    UnexpectedBody {
        /// As the configuration writes it.
        expected: String,
    },
    /// No TLS session came about, for example for a certificate that the check does not accept.
    #[error("TLS: {0}")]
    Tls(String),
    /// A datagram or an echo request that nobody answered.
    #[error("no answer within {after:?}")]
    NoAnswer {
        /// The check's timeout.
        after: Duration,
    },
    /// The server (or a firewall in its name) answered a datagram with ICMP "port unreachable".
    #[error("port unreachable: the server answers, but nothing listens on this UDP port")]
    PortUnreachable,
    /// A datagram came back, but not the one that the check expects.
    #[error("the answer does not contain {expected}; it is {answer}")]
    UnexpectedAnswer {
        /// As text, what is not printable escaped.
        expected: String,
        /// The same of what came, cut where it is long.
        answer: String,
    },
    /// An answer that is not gRPC.
    #[error("the answer is not gRPC: {0}")]
    NotGrpc(String),
    /// The server answered the call with an error of gRPC.
    #[error("gRPC status {code}{}", told(.message))]
    GrpcStatus {
        /// 1 to 16; 5 (not found): the server does not know the service.
        code: u32,
        message: String,
    },
    /// The server says that the service does not serve: the status of `grpc.health.v1`.
    #[error("the service says {0}")]
    NotServing(&'static str),
    /// The command ended with another status than 0.
    #[error("the command ended with {status}{}", told(.said))]
    CommandFailed {
        /// `exit status 1`, `signal 9`.
        status: String,
        /// The last line of its standard error; empty if there was none.
        said: String,
    },
    /// The command did not end in time and was killed.
    #[error("the command did not end within {after:?}{}", told(.said))]
    CommandTimedOut {
        /// The check's timeout.
        after: Duration,
        /// The last line of its standard error; empty if there was none.
        said: String,
    },
    /// This gateway lacks a file that the probe needs; see [`ProbeFailure::is_local`].
    #[error("this gateway could not probe: {0}")]
    CannotProbe(String),
    /// The probe address is not an address of this host; see [`ProbeFailure::is_local`].
    #[error("the probe address {0} is not an address of this gateway")]
    SourceNotLocal(IpAddr),
    /// The gateway lacked the means to send the probe; see [`ProbeFailure::is_local`].
    #[error("this gateway could not send the probe: {}", .0.desc())]
    NotSent(Errno),
    /// Anything else that the kernel reported.
    #[error("{}", .0.desc())]
    Other(Errno),
}

fn timed_out(stage: Stage, after: Duration) -> String {
    match stage {
        Stage::Connect => format!("no answer to the connection attempt within {after:?}"),
        Stage::Tls => format!("connected, but the TLS handshake did not complete within {after:?}"),
        Stage::Answer => format!("connected, but no answer to the request within {after:?}"),
    }
}

/// What somebody said about a failure, behind it.
fn told(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

fn unreachable(errno: Errno) -> String {
    match errno {
        // Without a route, or as a router on the way has none.
        Errno::ENETUNREACH => "network unreachable".to_owned(),
        // No answer to ARP, here or at the last router.
        Errno::EHOSTUNREACH => "host unreachable".to_owned(),
        // What connect() returns for a route of type blackhole and prohibit (fib_props of net/ipv4/fib_semantics.c).
        Errno::EINVAL => "unreachable: the route is a blackhole".to_owned(),
        Errno::EACCES => "unreachable: the route is prohibited".to_owned(),
        other => format!("unreachable: {}", other.desc().to_lowercase()),
    }
}

impl ProbeFailure {
    /// True for faults of the gateway itself, where no probe left it: they say nothing about the backend and
    /// do not change its health.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(
            self,
            Self::SourceNotLocal(_) | Self::NotSent(_) | Self::CannotProbe(_)
        )
    }

    /// A stable kebab-case name, for labels of metrics and JSON.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::TimedOut {
                stage: Stage::Connect,
                ..
            } => "connect-timeout",
            Self::TimedOut {
                stage: Stage::Answer, ..
            } => "answer-timeout",
            Self::TimedOut {
                stage: Stage::Tls, ..
            } => "tls-timeout",
            Self::UnexpectedBody { .. } => "unexpected-body",
            Self::Tls(_) => "tls",
            Self::NoAnswer { .. } => "no-answer",
            Self::PortUnreachable => "port-unreachable",
            Self::UnexpectedAnswer { .. } => "unexpected-answer",
            Self::NotGrpc(_) => "not-grpc",
            Self::GrpcStatus { .. } => "grpc-status",
            Self::NotServing(_) => "not-serving",
            Self::CommandFailed { .. } => "command-failed",
            Self::CommandTimedOut { .. } => "command-timeout",
            Self::CannotProbe(_) => "cannot-probe",
            Self::Unreachable(_) => "unreachable",
            Self::Reset => "reset",
            Self::Closed => "closed",
            Self::UnexpectedStatus { .. } => "unexpected-status",
            Self::MalformedAnswer(_) => "malformed-answer",
            Self::SourceNotLocal(_) => "source-not-local",
            Self::NotSent(_) => "not-sent",
            Self::Other(_) => "other",
        }
    }

    /// What an I/O error of a probe's socket means; `after` is the time since the probe began.
    pub(super) fn from_io(error: &io::Error, stage: Stage, after: Duration) -> Self {
        // An error without errno comes from a library above the socket, which saw the stream end.
        let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
            return Self::Closed;
        };
        match errno {
            Errno::ECONNREFUSED => Self::Refused,
            Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED => Self::Reset,
            Errno::ETIMEDOUT => Self::TimedOut { stage, after },
            Errno::ENETUNREACH
            | Errno::EHOSTUNREACH
            | Errno::ENETDOWN
            | Errno::EHOSTDOWN
            | Errno::EACCES
            | Errno::EPERM
            | Errno::EINVAL
            // ICMP "protocol unreachable" and "source route failed".
            | Errno::ENOPROTOOPT
            | Errno::EOPNOTSUPP => Self::Unreachable(errno),
            Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOBUFS
            | Errno::ENOMEM
            | Errno::EADDRINUSE
            | Errno::EAGAIN
            // At connect(): no free source port towards this backend.
            | Errno::EADDRNOTAVAIL => Self::NotSent(errno),
            other => Self::Other(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_errno(errno: Errno) -> ProbeFailure {
        ProbeFailure::from_io(
            &io::Error::from_raw_os_error(errno as i32),
            Stage::Connect,
            Duration::from_secs(1),
        )
    }

    #[test]
    fn errnos_of_the_path_are_told_from_those_of_the_gateway() {
        for errno in [
            Errno::ENETUNREACH,
            Errno::EHOSTUNREACH,
            Errno::EACCES,
            Errno::EINVAL,
        ] {
            assert_eq!(from_errno(errno), ProbeFailure::Unreachable(errno));
            assert!(!from_errno(errno).is_local());
        }
        for errno in [Errno::EMFILE, Errno::ENOBUFS, Errno::EADDRNOTAVAIL] {
            assert!(from_errno(errno).is_local(), "{errno}");
        }
        assert_eq!(from_errno(Errno::ECONNREFUSED), ProbeFailure::Refused);
        assert_eq!(from_errno(Errno::ETIMEDOUT).name(), "connect-timeout");
    }

    #[test]
    fn texts_are_clauses_that_name_the_thing() {
        let texts = [
            (
                ProbeFailure::Unreachable(Errno::ENETUNREACH).to_string(),
                "network unreachable",
            ),
            (
                ProbeFailure::Unreachable(Errno::EINVAL).to_string(),
                "unreachable: the route is a blackhole",
            ),
            (
                ProbeFailure::TimedOut {
                    stage: Stage::Connect,
                    after: Duration::from_millis(1500),
                }
                .to_string(),
                "no answer to the connection attempt within 1.5s",
            ),
            (
                ProbeFailure::UnexpectedStatus {
                    status: 500,
                    expected: "200-399".into(),
                }
                .to_string(),
                "HTTP status 500, expected 200-399",
            ),
        ];
        for (text, expected) in texts {
            assert_eq!(text, expected);
        }
    }
}
