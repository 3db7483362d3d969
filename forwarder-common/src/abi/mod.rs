//! Everything that crosses the kernel boundary: map keys and values, counters, reasons, settings.
//!
//! One definition, read by both sides. Each struct derives bytemuck's `Pod`, so hidden padding does not
//! compile; inside there is no `bool`, `char`, `usize`, `u128`, `Option` or Rust `enum`: an enumeration is an
//! integer newtype with constants, because a map may hold any bit pattern. Keys and values are aligned to at
//! least 4: the verifier wants aligned accesses on the BPF stack, where keys are built.

pub mod address_filter;
pub mod backend;
pub mod capture;
pub mod counter;
pub mod flow;
pub mod fragment;
pub mod handshake;
pub mod interface;
pub mod listener;
pub mod map_name;
pub mod persistence;
pub mod rate;
pub mod reason;
pub mod settings;
pub mod snat;
pub mod tunnel;

/// Number of the layout of everything in this module; it changes whenever a type here does.
pub const ABI_VERSION: u32 = 8;
