//! Handshakes that the gateway makes with the client before there is a flow: SYN cookies.
//!
//! The gateway has to choose its sequence number before it knows the backend's, so the flow's packets are shifted by the
//! difference for as long as it lives. The numbers stand here and not in the flow entry, as few flows have any.

use bytemuck::{Pod, Zeroable};

/// SYNs to a listener in the current second, per CPU.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SynBudget {
    /// CLOCK_MONOTONIC.
    pub second: u32,
    /// Up to `Listener::syns_per_cpu`.
    pub opened: u32,
    /// When a cookie was sent last, in seconds of CLOCK_MONOTONIC; zero: never.
    pub cookie_secs: u32,
    pub reserved: u32,
}

/// What the gateway told either end of a connection that a cookie opened. In host byte order.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Handshake {
    /// The client's initial sequence number.
    pub client_first: u32,
    /// The gateway's towards the client: the cookie.
    pub cookie: u32,
    /// The backend's initial sequence number less the cookie, modulo 2^32; has a meaning with [`stage::ANSWERED`].
    pub difference: u32,
    /// The client's segment size, in bytes, as far as the cookie holds it.
    pub segment_size: u16,
    /// The client's window scale in the low four bits, the backend's in the high ones; [`NO_SCALE`]: none.
    pub scales: u8,
    /// Bits of [`stage`].
    pub stage: u8,
}

/// No window is scaled; no scale has this number (RFC 7323 §2.3: at most 14).
pub const NO_SCALE: u8 = 15;

/// Bits of [`Handshake::stage`].
pub mod stage {
    /// The backend has sent SYN and ACK.
    pub const ANSWERED: u8 = 1;
    /// The client was told so by a probe, not by a plain window update.
    pub const PROBED: u8 = 2;
    /// The client takes selective acknowledgments (RFC 2018).
    pub const SELECTIVE: u8 = 4;
}
