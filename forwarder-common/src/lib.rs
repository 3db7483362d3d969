//! The data path of the forwarder as a library.
//!
//! ```text
//! datapath   decides what becomes of a packet: generic over Packet, Tables, Env
//!    |
//!   abi      map keys and values, counters, reasons: everything that crosses the kernel boundary
//!    |
//!  wire      protocol headers as fixed-size byte structs, checksums
//! ```
//!
//! An arrow points at what a layer may import; nothing points back up. The crate runs in three places: the
//! XDP and tcx programs of `forwarder-ebpf`, `cargo test`, and the agent's read-only tools.
//!
//! Rules of this crate: `no_std`, no allocation, no `unsafe`, no statics, no logging; every loop is bounded by
//! a constant, because the kernel's verifier reads this code too.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod datapath;
pub mod maglev;
pub mod outer;
pub mod wire;
