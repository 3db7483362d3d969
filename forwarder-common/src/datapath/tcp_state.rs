//! A small TCP tracker: what has been seen of a connection, and so how long its flow lives. Of SCTP, too, whose
//! chunks are read as the segments that they correspond to (`sctp::flags`).
//!
//! It keeps a set of events instead of a state number: events only accumulate, so packets may arrive in any
//! order and on any CPU, and the phase is derived where it is needed. It does not check sequence numbers.

use core::time::Duration;

use crate::{
    abi::flow::{Direction, TcpEvents},
    wire::{
        ipv4::{PROTOCOL_SCTP, PROTOCOL_TCP},
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN},
    },
};

/// Does the IP protocol with this number have connections? Flows of others have no phases.
#[inline(always)]
pub const fn has_connections(protocol: u32) -> bool {
    protocol == PROTOCOL_TCP as u32 || protocol == PROTOCOL_SCTP as u32
}

impl TcpEvents {
    /// A SYN opened the flow.
    pub const OPENED: Self = Self(0x01);
    /// The backend sent SYN+ACK.
    pub const ANSWERED: Self = Self(0x02);
    /// The client acknowledged after that: the handshake is complete.
    pub const ESTABLISHED: Self = Self(0x04);
    /// The client sent FIN.
    pub const CLIENT_FIN: Self = Self(0x08);
    /// The backend sent FIN.
    pub const BACKEND_FIN: Self = Self(0x10);
    /// Either side sent RST.
    pub const RESET: Self = Self(0x20);
    /// A SYN cookie opened the flow: see `datapath::handshake`.
    pub const BY_COOKIE: Self = Self(0x40);

    /// Have all of these happened?
    #[inline(always)]
    pub const fn has(self, events: Self) -> bool {
        self.0 & events.0 == events.0
    }

    /// Both sets.
    #[inline(always)]
    pub const fn with(self, events: Self) -> Self {
        Self(self.0 | events.0)
    }

    /// After a segment with these flags in this direction.
    #[inline(always)]
    pub fn after(self, direction: Direction, flags: u8) -> Self {
        let mut events = self;
        if flags & FLAG_RST != 0 {
            events = events.with(Self::RESET);
        }
        if direction == Direction::REQUEST {
            if flags & FLAG_SYN != 0 {
                events = events.with(Self::OPENED);
            }
            if flags & FLAG_FIN != 0 {
                events = events.with(Self::CLIENT_FIN);
            }
            if flags & FLAG_ACK != 0 && events.has(Self::ANSWERED) {
                events = events.with(Self::ESTABLISHED);
            }
        } else {
            if flags & (FLAG_SYN | FLAG_ACK) == FLAG_SYN | FLAG_ACK {
                events = events.with(Self::ANSWERED);
            }
            if flags & FLAG_FIN != 0 {
                events = events.with(Self::BACKEND_FIN);
            }
        }
        events
    }

    /// Where the connection stands.
    #[inline(always)]
    pub const fn phase(self) -> Phase {
        if self.has(Self::RESET) || self.has(Self::CLIENT_FIN.with(Self::BACKEND_FIN)) {
            Phase::Closed
        } else if self.has(Self::CLIENT_FIN) || self.has(Self::BACKEND_FIN) {
            Phase::Closing
        } else if self.has(Self::ESTABLISHED) {
            Phase::Established
        } else {
            Phase::HalfOpen
        }
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The handshake is not complete.
    HalfOpen,
    Established,
    /// One side sent FIN; the other may still send for long (RFC 9293 §3.6).
    Closing,
    /// Both sent FIN, or one RST: only stragglers are left.
    Closed,
}

/// Twice the maximum segment lifetime that Linux assumes (TCP_TIMEWAIT_LEN): nothing of an old connection can
/// come after that, so its binding may serve another.
pub const CLOSED_TIMEOUT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn run(segments: &[(Direction, u8)]) -> Phase {
        segments
            .iter()
            .fold(TcpEvents::default(), |events, (direction, flags)| {
                events.after(*direction, *flags)
            })
            .phase()
    }

    const SYN: (Direction, u8) = (Direction::REQUEST, FLAG_SYN);
    const SYN_ACK: (Direction, u8) = (Direction::REPLY, FLAG_SYN | FLAG_ACK);
    const ACK: (Direction, u8) = (Direction::REQUEST, FLAG_ACK);

    #[test]
    fn a_handshake_establishes() {
        assert_eq!(run(&[SYN]), Phase::HalfOpen);
        assert_eq!(run(&[SYN, SYN_ACK]), Phase::HalfOpen);
        assert_eq!(run(&[SYN, SYN_ACK, ACK]), Phase::Established);
    }

    #[test]
    fn an_ack_without_an_answer_does_not_establish() {
        assert_eq!(run(&[SYN, ACK]), Phase::HalfOpen);
    }

    #[test]
    fn a_half_closed_connection_is_closing() {
        let phase = run(&[SYN, SYN_ACK, ACK, (Direction::REQUEST, FLAG_FIN | FLAG_ACK)]);
        assert_eq!(phase, Phase::Closing);
    }

    #[test]
    fn both_fins_or_one_reset_close() {
        let open = [SYN, SYN_ACK, ACK];
        let fins = [
            (Direction::REPLY, FLAG_FIN | FLAG_ACK),
            (Direction::REQUEST, FLAG_FIN | FLAG_ACK),
        ];
        assert_eq!(run(&[&open[..], &fins[..]].concat()), Phase::Closed);
        assert_eq!(
            run(&[&open[..], &[(Direction::REPLY, FLAG_RST)]].concat()),
            Phase::Closed
        );
    }
}
