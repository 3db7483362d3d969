//! May this packet open a flow?

use super::{Stop, parse::Frame};
use crate::{
    abi::reason::Reason,
    wire::tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN},
};

/// Is this the first segment of a TCP connection (RFC 9293 §3.5)?
#[inline(always)]
pub const fn is_opening(frame: &Frame) -> bool {
    frame.tcp_flags & (FLAG_SYN | FLAG_ACK | FLAG_RST | FLAG_FIN) == FLAG_SYN
}

/// Only a SYN opens a TCP flow: any other segment belongs to a connection that some backend knows, and
/// picking another backend would break it in silence.
#[inline(always)]
pub const fn admit(frame: &Frame) -> Result<(), Stop> {
    if frame.is_tcp() && !is_opening(frame) {
        Err(Stop::drop(Reason::NOT_A_SYN))
    } else {
        Ok(())
    }
}
