//! What the witnesses of fault runs say to each other: requests and answers every byte of which is known beforehand, and
//! the records that clients and servers leave behind.
//!
//! A byte is derived from the connection's number, the direction, for answers also the server's number, and the byte's
//! place in the connection. So a byte that was changed, lost, repeated, or that belongs to another connection or comes
//! from another server is a wrong one, and whoever reads it says so. Headers name the listener that was meant, and what
//! the server has received: a request that arrived at another listener's server, or twice, is told from both ends.
//!
//! The program is `tests/src/bin/witness`; which fault explains what failed is in `blame`.

use std::{collections::BTreeMap, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Length of the header of requests and answers, in bytes.
pub const HEADER_BYTES: usize = 64;
/// A server's port is its listener's plus this.
pub const SERVER_PORTS: u16 = 8000;
/// What a datagram's offset is counted in: more than any carries.
pub const DATAGRAM_STRIDE: u64 = 1 << 12;

const REQUEST: u64 = u64::from_le_bytes(*b"question");
const ANSWER: u64 = u64::from_le_bytes(*b"response");

/// The monotonic clock, in nanoseconds: the same for all processes of the host.
pub fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}

/// Mixes a number well (the finalizer of SplitMix64, Steele et al., OOPSLA 2014).
pub const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Whose bytes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Author {
    Client,
    Server(u16),
}

/// The bytes of one direction of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Content(u64);

impl Content {
    pub const fn new(connection: u64, author: Author) -> Self {
        let author = match author {
            Author::Client => 1 << 32,
            Author::Server(number) => number as u64,
        };
        Self(mix(connection ^ mix(author)))
    }

    /// Writes the bytes that stand at `offset` and behind.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        let mut place = offset;
        let mut left = bytes;
        while !left.is_empty() {
            let word = mix(self.0 ^ (place / 8)).to_le_bytes();
            let known = &word[(place % 8) as usize..];
            let count = known.len().min(left.len());
            let (now, later) = left.split_at_mut(count);
            now.copy_from_slice(&known[..count]);
            left = later;
            place += count as u64;
        }
    }

    /// The place of the first byte of `bytes` that does not belong at `offset` and behind.
    pub fn first_wrong(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut wanted = vec![0; bytes.len()];
        self.fill(offset, &mut wanted);
        let found = wanted.iter().zip(bytes).position(|(wanted, byte)| wanted != byte);
        found.map(|at| offset + at as u64)
    }
}

/// What stands in front of a request's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The VIP's port.
    pub listener: u16,
    /// A datagram that wants no answer: it only holds a flow.
    pub is_silent: bool,
    pub connection: u64,
    /// Bytes sent on this connection before, headers apart; of a datagram its number times [`DATAGRAM_STRIDE`].
    pub offset: u64,
    /// Bytes that follow.
    pub length: u64,
    /// The same of the answer.
    pub answer_offset: u64,
    pub answer_length: u64,
    /// How long the server waits between two pieces of its answer.
    pub pause_ns: u64,
}

/// What stands in front of an answer's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub server: u16,
    /// The listener whose server this is, by the port that was reached.
    pub listener: u16,
    pub connection: u64,
    /// What the server has counted of the request.
    pub offset: u64,
    pub length: u64,
    /// Something was wrong with the request; the server's own record says what.
    pub is_wrong: bool,
    pub answer_offset: u64,
    pub answer_length: u64,
}

fn pack(words: [u64; HEADER_BYTES / 8]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn unpack(bytes: &[u8; HEADER_BYTES]) -> [u64; HEADER_BYTES / 8] {
    let mut words = [0; HEADER_BYTES / 8];
    for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut one = [0; 8];
        one.copy_from_slice(place);
        *word = u64::from_le_bytes(one);
    }
    words
}

impl Request {
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        pack([
            REQUEST,
            u64::from(self.listener) | u64::from(self.is_silent) << 16,
            self.connection,
            self.offset,
            self.length,
            self.answer_offset,
            self.answer_length,
            self.pause_ns,
        ])
    }

    /// `None`: these bytes are no request.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let [
            mark,
            listener,
            connection,
            offset,
            length,
            answer_offset,
            answer_length,
            pause_ns,
        ] = unpack(bytes);
        (mark == REQUEST && listener < 1 << 17).then_some(Self {
            listener: listener as u16,
            is_silent: listener >> 16 == 1,
            connection,
            offset,
            length,
            answer_offset,
            answer_length,
            pause_ns,
        })
    }
}

impl Answer {
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        pack([
            ANSWER,
            u64::from(self.listener) | u64::from(self.server) << 16 | u64::from(self.is_wrong) << 32,
            self.connection,
            self.offset,
            self.length,
            self.answer_offset,
            self.answer_length,
            0,
        ])
    }

    /// `None`: these bytes are no answer.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let [
            mark,
            who,
            connection,
            offset,
            length,
            answer_offset,
            answer_length,
            rest,
        ] = unpack(bytes);
        (mark == ANSWER && rest == 0 && who < 1 << 33).then_some(Self {
            server: (who >> 16) as u16,
            listener: who as u16,
            connection,
            offset,
            length,
            is_wrong: who >> 32 == 1,
            answer_offset,
            answer_length,
        })
    }

    /// What is wrong with this as the answer to `request` of a server that may be known already.
    pub fn objection(&self, request: &Request, server: Option<u16>) -> Option<String> {
        let same = self.listener == request.listener
            && self.connection == request.connection
            && self.offset == request.offset
            && self.length == request.length
            && self.answer_offset == request.answer_offset
            && self.answer_length == request.answer_length;
        if !same {
            Some(format!("{request:?} was answered by {self:?}"))
        } else if self.is_wrong {
            Some(format!(
                "server {} has got another request than {request:?}",
                self.server
            ))
        } else {
            let other = server.filter(|server| *server != self.server)?;
            Some(format!(
                "server {} answers in the middle of a connection with {other}",
                self.server
            ))
        }
    }
}

/// How a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// A new connection was rejected.
    Refused,
    /// The network said that it cannot.
    Unreachable,
    /// An open connection ended too early.
    Reset,
    /// Nothing came for as long as the client has patience.
    Silence,
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When the client began to open the connection: a moment of the monotonic clock, as those below.
    pub began_ns: u64,
    /// When the connection was known to be well for the last time, or began.
    pub since_ns: u64,
    pub at_ns: u64,
    pub kind: Kind,
    /// The connection did not come about; of datagrams, nothing has been answered yet.
    pub is_new: bool,
    pub is_udp: bool,
    pub client: u16,
    pub listener: u16,
    /// Who answered on this connection before.
    pub server: Option<u16>,
    pub connection: u64,
    /// What the client was at, and the error.
    pub what: String,
}

/// What went well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub connections: u64,
    pub requests: u64,
    /// Both ways, headers apart.
    pub bytes: u64,
    /// Datagrams that had to be sent again.
    pub repeated: u64,
}

impl Totals {
    pub const fn add(&mut self, other: Self) {
        self.connections += other.connections;
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.repeated += other.repeated;
    }
}

/// A line that a witness writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// It serves, or asks.
    Ready,
    Failure(Failure),
    /// Something that no fault may cause.
    Violation {
        at_ns: u64,
        what: String,
    },
    /// A client's last line, by listener.
    Totals(BTreeMap<u16, Totals>),
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request = Request {
        listener: 83,
        is_silent: false,
        connection: 7,
        offset: 100,
        length: 3,
        answer_offset: 200,
        answer_length: 5,
        pause_ns: 1,
    };
    const ANSWER: Answer = Answer {
        server: 2,
        listener: 83,
        connection: 7,
        offset: 100,
        length: 3,
        is_wrong: false,
        answer_offset: 200,
        answer_length: 5,
    };

    #[test]
    fn bytes_do_not_depend_on_how_they_are_cut() {
        let content = Content::new(1, Author::Client);
        let mut whole = [0; 100];
        content.fill(5, &mut whole);
        for cut in 0..100 {
            let mut parts = [0; 100];
            content.fill(5, &mut parts[..cut]);
            content.fill(5 + cut as u64, &mut parts[cut..]);
            assert_eq!(whole, parts, "cut at {cut}");
        }
        assert_eq!(content.first_wrong(5, &whole), None);
    }

    #[test]
    fn bytes_of_another_place_connection_direction_or_server_are_wrong() {
        let content = Content::new(1, Author::Server(2));
        let mut bytes = [0; 64];
        content.fill(0, &mut bytes);
        assert_eq!(content.first_wrong(1, &bytes), Some(1));
        for other in [
            Content::new(2, Author::Server(2)),
            Content::new(1, Author::Server(3)),
            Content::new(1, Author::Client),
        ] {
            assert!(other.first_wrong(0, &bytes).is_some());
        }
        bytes[63] ^= 1;
        assert_eq!(content.first_wrong(0, &bytes), Some(63));
    }

    #[test]
    fn headers_come_out_as_they_went_in() {
        assert_eq!(Request::parse(&REQUEST.to_bytes()), Some(REQUEST));
        let silent = Request {
            is_silent: true,
            ..REQUEST
        };
        assert_eq!(Request::parse(&silent.to_bytes()), Some(silent));
        assert_eq!(Answer::parse(&ANSWER.to_bytes()), Some(ANSWER));
        assert_eq!(Answer::parse(&REQUEST.to_bytes()), None);
        assert_eq!(Request::parse(&ANSWER.to_bytes()), None);
    }

    #[test]
    fn answers_to_others_are_objected_to() {
        assert_eq!(ANSWER.objection(&REQUEST, None), None);
        assert_eq!(ANSWER.objection(&REQUEST, Some(2)), None);
        assert!(ANSWER.objection(&REQUEST, Some(3)).is_some());
        for other in [
            Answer {
                listener: 84,
                ..ANSWER
            },
            Answer {
                connection: 8,
                ..ANSWER
            },
            Answer {
                offset: 101,
                ..ANSWER
            },
            Answer { length: 4, ..ANSWER },
            Answer {
                is_wrong: true,
                ..ANSWER
            },
            Answer {
                answer_offset: 201,
                ..ANSWER
            },
            Answer {
                answer_length: 6,
                ..ANSWER
            },
        ] {
            assert!(other.objection(&REQUEST, None).is_some(), "{other:?}");
        }
    }
}
