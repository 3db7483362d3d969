//! VLAN tags, on the way in and on the way out.

use forwarder_common::{abi::reason::Reason, datapath::Verdict};

use super::{
    CLIENT, Case, DNS, SERVER, Step, UDP_SERVER, WEB, binding, from_server, query, syn, to_client, to_server,
    world,
};
use crate::{
    packet::segment,
    tables::{CLIENT_SIDE, MemoryTables, SERVER_SIDE},
};

/// [`world`], where the servers' side is a VLAN device with these identifiers, carried by the servers' interface.
fn world_with_vlans(vlans: [u16; 2]) -> MemoryTables {
    let mut world = world();
    for (key, interface) in &mut world.interfaces {
        if key.ifindex == SERVER_SIDE.ifindex {
            interface.carrier_ifindex = SERVER_SIDE.ifindex;
            interface.vlans = vlans;
        }
    }
    world
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, before) in [
        ("untagged", &[][..]),
        ("tagged", &[5]),
        ("doubly tagged", &[7, 5]),
    ] {
        for (to, after) in [
            ("untagged", &[][..]),
            ("tagged", &[9]),
            ("doubly tagged", &[11, 9]),
        ] {
            let mut vlans = [0; 2];
            vlans[..after.len()].copy_from_slice(after);
            let world = world_with_vlans(vlans);
            let packet = syn(WEB).vlans(before);
            let out = to_server(&packet, binding(0), SERVER).vlans(after);
            let mut case = Case::new(format!("A {name} request may leave {to}"), world.clone())
                .then(Step::request(&packet, &out).counts(WEB.opened()));
            case.is_v4_only = before.is_empty() && after.is_empty();
            let reply = from_server(segment::SYN_ACK, WEB, binding(0)).vlans(after);
            cases.push(
                case.then(
                    Step::reply(&reply, &to_client(&reply, WEB.vip(), CLIENT).vlans(&[]))
                        .counts(WEB.first_answer()),
                ),
            );
            let packet = query(DNS).vlans(before);
            let out = to_server(&packet, binding(0), UDP_SERVER).vlans(after);
            cases.push(
                Case::new(format!("A {name} datagram may leave {to}"), world)
                    .then(Step::request(&packet, &out).counts(DNS.opened())),
            );
        }
    }
    let mut full = world();
    full.free_flows.clear();
    let tagged = syn(WEB).vlans(&[5]);
    let answered = |frame: crate::packet::Builder, reply: crate::packet::Builder| {
        Step::new(
            &CLIENT_SIDE,
            frame.build(),
            Verdict::TRANSMIT,
            Reason::ECHO_ANSWERED,
        )
        .out(reply.build())
    };
    let echo = crate::packet::Builder::icmp(8, 0, *CLIENT.ip(), super::VIP).payload(8);
    let echo = echo
        .link(super::client_mac(CLIENT), CLIENT_SIDE.mac)
        .vlans(&[7, 5]);
    let reply = crate::packet::Builder::icmp(0, 0, super::VIP, *CLIENT.ip()).payload(8);
    let reply = reply
        .link(CLIENT_SIDE.mac, super::client_mac(CLIENT))
        .vlans(&[7, 5]);
    cases.extend([
        Case::new("The reset of a tagged SYN has its tag", full.clone())
            .then(Step::reset(&tagged, Reason::FLOW_TABLE_FULL).counts(WEB.not_bound())),
        Case::new("The ICMP message about a tagged datagram has its tags", full).then(
            Step::unreachable(&query(DNS).vlans(&[7, 5]), Reason::FLOW_TABLE_FULL).counts(DNS.not_bound()),
        ),
        Case::new("An echo reply has the tags of its request", world()).then(answered(echo, reply)),
        Case::new("A frame with three tags passes", world())
            .then(Step::passed(syn(WEB).vlans(&[3, 7, 5]).build(), Reason::NOT_IP)),
    ]);
    cases
}
