//! A captured packet in words.

use std::{fmt, time::Duration};

use forwarder_common::abi::{
    backend::BackendId,
    capture::CapturedPacket,
    listener::ListenerId,
    reason::{Reason, VerdictKind},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{captured, is_bare, reason_name};
use crate::{explain::frame::PacketSummary, state::names::Names};

/// What the data path did with a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TracedPacket {
    /// Seconds since 1970, UTC, with nine decimals.
    pub time: String,
    /// Where it came in.
    pub interface: String,
    pub packet: PacketSummary,
    /// `send`, `pass` or `drop`.
    pub verdict: String,
    pub reason: String,
    /// Where it left, if straight from the program.
    pub egress: Option<String>,
    /// As it left, where it did not leave as it came.
    pub becomes: Option<PacketSummary>,
    pub listener: Option<String>,
    /// `GROUP/NAME`.
    pub backend: Option<String>,
    /// Packets before this one that should be here, and were lost on their way.
    pub lost: u64,
}

impl TracedPacket {
    /// Of a packet that came at this time since 1970, after `lost` that are missing.
    pub fn of(packet: &CapturedPacket, time: Duration, lost: u64, names: &Names) -> Self {
        let interface = |ifindex: u32| {
            let found = names.interfaces.iter().find(|one| one.ifindex == ifindex);
            found.map_or_else(|| format!("interface {ifindex}"), |one| one.name.clone())
        };
        let before = captured(&packet.before, packet.before_captured);
        let after = captured(&packet.after, packet.after_captured);
        let (verdict, egress) = match packet.action {
            0 => ("send", Some(interface(packet.ingress_ifindex))),
            1 => ("send", Some(interface(packet.egress_ifindex))),
            2 => ("pass", None),
            _ => ("drop", None),
        };
        let is_changed = before != after || packet.before_len != packet.after_len;
        let is_of_flow = matches!(
            Reason(packet.reason),
            Reason::REQUEST_FORWARDED
                | Reason::REPLY_FORWARDED
                | Reason::REQUEST_TO_STACK
                | Reason::REPLY_TO_STACK
                | Reason::ICMP_FORWARDED
                | Reason::ICMP_TO_STACK
                | Reason::FRAGMENTED
        );
        let backend = names.backend(BackendId(packet.backend as _));
        Self {
            time: format!("{}.{:09}", time.as_secs(), time.subsec_nanos()),
            interface: interface(packet.ingress_ifindex),
            packet: summary(before, packet.before_len),
            verdict: verdict.to_owned(),
            reason: reason_name(packet.reason),
            egress,
            becomes: (is_changed && packet.action != 3).then(|| summary(after, packet.after_len)),
            listener: is_of_flow.then(|| names.listener(ListenerId(packet.listener as _))),
            backend: is_of_flow.then(|| format!("{}/{}", backend.group, backend.name)),
            lost,
        }
    }

    /// Verdict and reason, with what goes with them: a comment on the packet.
    pub fn comment(&self, number: u32) -> String {
        let mut text = format!("{}: {}", self.verdict, self.reason);
        if let Some(egress) = &self.egress {
            text += &format!(" by {egress}");
        }
        if let (Some(listener), Some(backend)) = (&self.listener, &self.backend) {
            text += &format!("; listener {listener}, backend {backend}");
        }
        let description = Reason(number).description();
        if let Some(description) = description.filter(|one| one.verdict != VerdictKind::Send) {
            text += &format!(". {}", description.text);
        }
        if self.lost > 0 {
            text += &format!(" ({} packets before this one were lost)", self.lost);
        }
        text
    }
}

fn summary(frame: &[u8], len: u32) -> PacketSummary {
    if !is_bare(frame, len) {
        return PacketSummary::of(frame);
    }
    let ethertype = if frame[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    PacketSummary::of(&[&[0; 12], &ethertype[..], frame].concat())
}

/// `eth0 tcp 192.0.2.7:51000 > 198.51.100.10:80 SYN  request_forwarded  eth1 …`
impl fmt::Display for TracedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lost > 0 {
            writeln!(f, "… {} packets lost here", self.lost)?;
        }
        write!(f, "{} {} {}", self.time, self.interface, words(&self.packet))?;
        write!(f, "  {}", self.reason)?;
        if self.verdict != "drop"
            && let Some(becomes) = &self.becomes
        {
            write!(
                f,
                "  {} {}",
                self.egress.as_deref().unwrap_or("stack"),
                words(becomes)
            )?;
        }
        if let (Some(listener), Some(backend)) = (&self.listener, &self.backend) {
            write!(f, "  {listener} -> {backend}")?;
        }
        Ok(())
    }
}

fn words(packet: &PacketSummary) -> String {
    let mut text = packet.protocol.clone();
    if let (Some(source), Some(destination)) = (&packet.source, &packet.destination) {
        text += &format!(" {source} > {destination}");
    }
    if let Some(flags) = &packet.flags {
        text += &format!(" {flags}");
    }
    if let Some(length) = packet.length_bytes {
        text += &format!(" {length}");
    }
    text
}

#[cfg(test)]
pub(super) mod testing {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::explain::frame::{Flag, Wanted};

    /// A SYN that was sent on to a backend, with this many bytes captured.
    pub(in super::super) fn forwarded(snap: usize) -> Box<CapturedPacket> {
        let frame = |source: &str, destination: &str| {
            Wanted {
                protocol: crate::config::Protocol::Tcp,
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                flags: vec![Flag::Syn],
                ttl: 64,
                length_bytes: 0,
            }
            .frame()
        };
        let mut packet = Box::new(CapturedPacket::zeroed());
        let before = frame("192.0.2.7:51000", "198.51.100.10:80");
        let after = frame("100.64.0.2:1024", "10.0.0.5:8080");
        (packet.before_len, packet.after_len) = (before.len() as u32, after.len() as u32);
        let captured = before.len().min(snap);
        (packet.before_captured, packet.after_captured) = (captured as u32, captured as u32);
        bytemuck::cast_slice_mut::<_, u8>(&mut packet.before)[..captured]
            .copy_from_slice(&before[..captured]);
        bytemuck::cast_slice_mut::<_, u8>(&mut packet.after)[..captured].copy_from_slice(&after[..captured]);
        (packet.ingress_ifindex, packet.egress_ifindex, packet.action) = (2, 3, 1);
        packet.time_nanos = 5_000_000_001;
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forwarded_packet_is_told_with_what_it_becomes() {
        let packet = testing::forwarded(2048);
        let traced = TracedPacket::of(&packet, Duration::new(1, 1), 3, &Names::default());
        assert_eq!(
            traced.to_string(),
            "… 3 packets lost here\n1.000000001 interface 2 tcp 192.0.2.7:51000 > 198.51.100.10:80 SYN 40  \
             request_forwarded  interface 3 tcp 100.64.0.2:1024 > 10.0.0.5:8080 SYN 40  #0 -> ?/#0"
        );
        let comment = traced.comment(packet.reason);
        assert!(
            comment.starts_with("send: request_forwarded by interface 3; listener"),
            "{comment}"
        );
    }

    #[test]
    fn a_dropped_packet_is_told_with_why() {
        let mut packet = testing::forwarded(2048);
        (packet.reason, packet.action) = (Reason::NO_ROUTE.0, 3);
        let traced = TracedPacket::of(&packet, Duration::ZERO, 0, &Names::default());
        assert_eq!(
            (&traced.becomes, &traced.listener, &traced.egress),
            (&None, &None, &None)
        );
        assert!(
            traced.comment(packet.reason).contains("no usable route"),
            "{traced:?}"
        );
    }
}
