//! Ring 4: every kind of tunnel that Linux has a device for, end to end: the gateway's end kept by the kernel or by the
//! data path, the other end an ordinary kernel tunnel.
//!
//! The modules that these kinds take are those of Debian's kernels, so the tests run in `cargo xtask test vm` only;
//! elsewhere they are skipped.

use std::env;

use anyhow::Result;
use forwarder_tests::lab::{
    self, agent,
    crossing::{Mode, cross},
    tunnel::Kind,
};

/// Set in the virtual machine only.
const MACHINE_VARIABLE: &str = "FORWARDER_TESTS_VM";
/// Sent in either direction.
const LENGTH_BYTES: u32 = 50_000_000;

fn play(kind: Kind, mode: Mode) -> Result<()> {
    if env::var_os(MACHINE_VARIABLE).is_none() {
        println!("SKIP: needs `cargo xtask test vm`");
        return Ok(());
    }
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    println!("{kind:?}, {mode:?}: {}", cross(kind, mode, LENGTH_BYTES)?);
    Ok(())
}

/// One test for each kind and mode.
macro_rules! tests {
    ($($name:ident: $kind:ident, $mode:ident;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            play(Kind::$kind, Mode::$mode)
        }
    )*};
}

tests! {
    vxlan_by_the_kernel: Vxlan, Kernel;
    vxlan_natively: Vxlan, Native;
    geneve_by_the_kernel: Geneve, Kernel;
    geneve_natively: Geneve, Native;
    gretap_by_the_kernel: Gretap, Kernel;
    gretap_natively: Gretap, Native;
    gre_by_the_kernel: Gre, Kernel;
    gre_natively: Gre, Native;
    ipip_by_the_kernel: Ipip, Kernel;
    ipip_natively: Ipip, Native;
    sit_by_the_kernel: Sit, Kernel;
    sit_natively: Sit, Native;
    ipv6_in_ipv4_by_the_kernel: Ipv6InIpv4, Kernel;
    ipv6_in_ipv4_natively: Ipv6InIpv4, Native;
    ipv4_in_ipv6_by_the_kernel: Ipv4InIpv6, Kernel;
    ipv4_in_ipv6_natively: Ipv4InIpv6, Native;
    ipv6_in_ipv6_by_the_kernel: Ipv6InIpv6, Kernel;
    ipv6_in_ipv6_natively: Ipv6InIpv6, Native;
    gre_over_ipv6_by_the_kernel: Gre6, Kernel;
    gre_over_ipv6_natively: Gre6, Native;
    vxlan_over_ipv6_by_the_kernel: Vxlan6, Kernel;
    vxlan_over_ipv6_natively: Vxlan6, Native;
    fou_by_the_kernel: Fou, Kernel;
    fou_natively: Fou, Native;
    gue_by_the_kernel: Gue, Kernel;
    gue_natively: Gue, Native;
    wireguard_by_the_kernel: Wireguard, Kernel;
    xfrm_by_the_kernel: Xfrm, Kernel;
    tun_by_the_kernel: Tun, Kernel;
}
