//! Ring 3: frames of 9000 bytes, which the data path gets in several buffers, between a client and a local server.

use std::time::Duration;

use anyhow::{Result, ensure};
use aya::util::KernelVersion;
use forwarder_tests::lab::{
    self, Lifetime,
    agent::{self, ShowLog},
    crossing::transfer,
    topology::{Extras, Site},
    wait_until,
};

/// Sent in either direction.
const LENGTH_BYTES: u32 = 50_000_000;
/// How long counters may lag behind the traffic.
const COUNTER_DEADLINE: Duration = Duration::from_secs(5);

/// Transfers through the gateway, `mode` being that of its interfaces, which has to be `shown` by `ip link`.
fn play(mode: &str, shown: &str) -> Result<()> {
    if !lab::can_run_test(Some(agent::binary())) {
        return Ok(());
    }
    let extras = Extras {
        jumbo_frames: true,
        ..Extras::default()
    };
    let site = Site::cross_region(Lifetime::Process, extras)?;
    let show_log = ShowLog::of(&site.lab);
    let local_only = |server: &lab::topology::Server| u16::from(!server.is_remote);
    let configuration = site.web_configuration_with(&[("mode", mode)], "full", local_only);
    let agent = site.start_agent(&configuration, "web")?;
    for interface in site.interfaces {
        let link = site.gateway.run(&format!("ip link show dev {interface}"))?;
        ensure!(link.contains(shown), "{link}");
    }
    let server = site.server("ecs01")?;
    for offload in [true, false] {
        site.checksum_offload(offload)?;
        let before = agent.backend("web", server.name)?.traffic;
        let transferred = transfer(&site, site.client(), server, LENGTH_BYTES)?;
        println!("{mode}, checksum offload {offload}: {transferred}");
        wait_until("the transfers to be counted", COUNTER_DEADLINE, || {
            let after = agent.backend("web", server.name)?.traffic;
            let bytes = after.bytes_in + after.bytes_out - before.bytes_in - before.bytes_out;
            let packets = after.packets_in + after.packets_out - before.packets_in - before.packets_out;
            ensure!(bytes > 2 * u64::from(LENGTH_BYTES), "{bytes} bytes");
            // Half of them or fewer are acknowledgments.
            ensure!(bytes / packets > 3000, "{bytes} bytes in {packets} packets");
            Ok(())
        })?;
    }
    show_log.all_is_well();
    Ok(())
}

/// Before Linux 6.3 native XDP redirects no frame that is in several buffers, so that the agent must take the other mode,
/// although labs say there that frames can leave.
#[test]
fn jumbo_frames_are_forwarded_in_native_mode() -> Result<()> {
    let can_redirect = KernelVersion::current()? >= KernelVersion::new(6, 3, 0);
    if can_redirect {
        play("native", " xdp ")
    } else {
        play("auto", "xdpgeneric")
    }
}

#[test]
fn jumbo_frames_are_forwarded_in_generic_mode() -> Result<()> {
    play("generic", "xdpgeneric")
}
