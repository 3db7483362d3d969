//! The programs around those that are measured.
//!
//! `BPF_PROG_TEST_RUN` runs a program many times on one buffer and restores nothing in between, so from the second time
//! on a program would see its own output. [`bench_call`] stands in front: it checks and counts the last output, restores
//! the frame, makes it one of the next flow and calls the program under test. What it costs itself is measured with
//! [`bench_empty`] behind it.
//!
//! The floors: [`bench_swap`]; [`bench_minimal`], the least that a NAT with state could do per packet;
//! [`bench_insert`], the least that a new flow takes; [`bench_wire`], the least that a gateway could do.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod flood;
#[cfg(target_arch = "bpf")]
mod programs;

/// For the host there is nothing; clippy and `cargo build --workspace` come by here.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
