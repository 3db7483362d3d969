//! Ring 3: the kinds of tunnels that any kernel can make, end to end: a device with an Ethernet header, and one
//! without.
//!
//! `vm_tunnels.rs` does the same with all others, which take modules that a kernel may lack.

use anyhow::Result;
use forwarder_tests::lab::{
    self, agent,
    crossing::{Mode, cross},
    tunnel::Kind,
};

/// Sent in either direction.
const LENGTH_BYTES: u32 = 50_000_000;

fn play(kind: Kind, mode: Mode) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    println!("{kind:?}, {mode:?}: {}", cross(kind, mode, LENGTH_BYTES)?);
    Ok(())
}

#[test]
fn vxlan_by_the_kernel() -> Result<()> {
    play(Kind::Vxlan, Mode::Kernel)
}

#[test]
fn vxlan_natively() -> Result<()> {
    play(Kind::Vxlan, Mode::Native)
}

#[test]
fn tun_by_the_kernel() -> Result<()> {
    play(Kind::Tun, Mode::Kernel)
}
