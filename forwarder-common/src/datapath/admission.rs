//! May this packet open a flow?

use super::{Stop, Tables, parse::Frame};
use crate::{
    abi::{
        listener::{Listener, SourceKey, VipKey, listener_flag},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        IpAddress,
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN},
    },
};

/// Is this the first segment of a TCP connection (RFC 9293 §3.5), or what corresponds to it?
#[inline(always)]
pub const fn is_opening(frame: &Frame) -> bool {
    frame.tcp_flags & (FLAG_SYN | FLAG_ACK | FLAG_RST | FLAG_FIN) == FLAG_SYN
}

/// Only a SYN opens a flow of TCP, an INIT one of SCTP: any other segment belongs to a connection that some backend
/// knows, and picking another backend would break it in silence.
#[inline(always)]
pub const fn admit(frame: &Frame) -> Result<(), Stop> {
    if frame.is_of_connection() && !is_opening(frame) {
        Err(Stop::drop(Reason::NOT_A_SYN))
    } else {
        Ok(())
    }
}

/// Is this one of our addresses, a VIP or an SNAT address?
#[inline(always)]
pub fn is_own<T: Tables>(tables: &T, settings: &Settings, address: IpAddress) -> bool {
    settings.pool.contains(address)
        || (settings.filters.vips.may_have(address) && tables.vip(&VipKey { address }).is_some())
}

/// A packet from one of our own addresses has come back to us, or is forged. In DNAT mode it would even keep that
/// source and so share its 5-tuple with the flow that holds the binding.
#[inline(always)]
pub fn refuse_own_source<T: Tables>(tables: &T, settings: &Settings, frame: &Frame) -> Result<(), Stop> {
    if is_own(tables, settings, frame.key.source) {
        return Err(Stop::drop(Reason::OWN_SOURCE));
    }
    Ok(())
}

/// A listener may admit clients of some networks only. Others are dropped in silence: an answer would tell them
/// that there is something to find.
#[inline(always)]
pub fn admit_source<T: Tables>(tables: &T, listener: &Listener, frame: &Frame) -> Result<(), Stop> {
    if listener.flags & listener_flag::SOURCES != 0
        && !tables.is_source_admitted(&SourceKey::new(listener.id, frame.key.source, IpAddress::BITS))
    {
        return Err(Stop::drop(Reason::SOURCE_NOT_ALLOWED));
    }
    Ok(())
}
