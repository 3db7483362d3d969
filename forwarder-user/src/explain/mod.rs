//! What would happen to a packet, in words: the steps of a walk over the live maps, with names for numbers.
//!
//! The names of [`Explanation`]'s fields are the names in the JSON, which scripts rely on: add some, but rename none.

use std::net::SocketAddr;

use bytemuck::Zeroable as _;
use forwarder_common::{
    abi::{
        backend::{Backend, BackendGroup, BackendId, BackendState, Selection},
        flow::{Direction, FlowBinding, FlowEntry, FlowId, FlowState, HopKind},
    },
    datapath::{Action, Route},
    wire::{Be16, IpAddress},
};
use nix::net::if_::if_indextoname;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::frame::PacketSummary;
use crate::{
    datapath::view::{Step, Walk},
    flows::{FlowStatus, FlowTable},
    state::names::InterfaceName,
};

pub mod capture;
pub mod frame;

/// Packets to explain: the body of `POST /v1/explain`. Each sees what those before it would have changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainRequest {
    /// Where the packets arrive; none: for each the interface that leads to its source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    pub packets: Vec<Bytes>,
}

/// An Ethernet frame, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct Bytes(#[serde(with = "hex")] pub Vec<u8>);

/// The answer: one explanation per packet, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanations {
    pub packets: Vec<Explanation>,
}

/// What would happen to a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Where it arrives.
    pub interface: String,
    /// The program there: `xdp-native`, `xdp-generic` or `tcx`.
    pub attachment: String,
    pub packet: PacketSummary,
    /// A new flow: how its backend is chosen, as far as that went.
    pub choice: Option<Choice>,
    /// The flow that it belongs to, as it is before the packet.
    pub flow: Option<FlowStatus>,
    /// Which way it goes in its flow, existing or new: `request` or `reply`.
    pub direction: Option<String>,
    /// A new flow: the (address, port) that it would hold.
    #[schema(value_type = Option<String>)]
    pub binding: Option<SocketAddr>,
    /// `binding` is the very one, not only one of the free ones: false for the second new flow of a capture and those
    /// after it.
    pub is_binding_certain: bool,
    /// Its route, if the walk came that far.
    pub route: Option<RouteText>,
    /// `send`, `pass` or `drop`.
    pub verdict: String,
    /// `transmit` (out of the interface that it came by), `redirect`, `pass` (to the stack) or `drop`.
    pub action: String,
    /// Where it would leave.
    pub egress: Option<String>,
    /// Name of the reason, see docs/reasons.md.
    pub reason: String,
    pub text: String,
    /// What to do about it; empty where nothing is wrong.
    pub hint: String,
    /// The packet after the walk.
    pub packet_after: PacketSummary,
    pub bytes_before: Bytes,
    pub bytes_after: Bytes,
}

/// From listener to backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Choice {
    pub listener: String,
    pub group: Option<String>,
    /// The slot that decided, from 0.
    pub slot: Option<u32>,
    /// How many slots the group has.
    pub slots: Option<u32>,
    /// The group's way to select: `maglev`, `source-ip`, `round-robin` or `least-connections`.
    pub selection: Option<String>,
    /// What decided: `slot` of the group's table, `overflow`, a slot of the table behind it, or `persistence`, as the
    /// client's last flow went there.
    pub decided_by: Option<String>,
    pub backend: Option<BackendChoice>,
    /// Backends that were looked at before, which take no new flows or have more than the one chosen.
    pub passed_over: Vec<BackendChoice>,
}

/// A backend that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendChoice {
    pub name: String,
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// `healthy`, `unhealthy`, `draining` or `absent`.
    pub state: String,
    /// None: the configuration has it no more.
    pub weight: Option<u16>,
}

/// The kernel's answer about the rewritten packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RouteText {
    /// `neighbour` (its link address is known), `unresolved`, `none` or `forwarding-disabled`; `remembered`: the
    /// flow knows it from a packet before, and routes have not changed since.
    pub kind: String,
    pub interface: Option<String>,
}

impl Explanation {
    /// Puts a walk into words.
    pub fn of(walk: &Walk, frame: &[u8], interface: &InterfaceName, table: &FlowTable<'_>) -> Self {
        let packet = PacketSummary::of(frame);
        let taken = walk.steps.iter().find_map(|step| match step {
            Step::Taken { id, is_certain } => Some((*id, *is_certain)),
            _ => None,
        });
        let choice = choice(walk, table);
        let existing = if choice.is_none() {
            existing(walk, &packet)
        } else {
            None
        };
        let flow = existing.map(|(id, _)| id).and_then(|id| {
            let before = walk.steps.iter().find_map(|step| match step {
                Step::Flow(found, entry) if *found == id => Some(entry),
                _ => None,
            });
            before.map(|entry| table.status(id, entry))
        });
        // What it holds then, if the flow was opened after all.
        let opened = walk
            .flow
            .filter(|(_, entry)| choice.is_some() && entry.state == FlowState::LIVE);
        let direction = match existing {
            Some((_, direction)) => Some(direction),
            None => opened.map(|_| Direction::REQUEST),
        };
        let described = walk.outcome.reason.description();
        let action = walk.outcome.verdict.action;
        let asked = walk.steps.iter().rev().find_map(|step| match step {
            Step::Route(route) => Some(RouteText::of(*route)),
            _ => None,
        });
        let route = asked.or_else(|| RouteText::remembered(&walk.flow?.1, direction?));
        let egress = match action {
            Action::Transmit => Some(interface.name.clone()),
            Action::Redirect => Some(name_of(walk.outcome.verdict.ifindex)),
            Action::Pass | Action::Drop => None,
        };
        Self {
            interface: interface.name.clone(),
            attachment: interface.kind.name().to_owned(),
            choice,
            flow,
            direction: direction.map(|direction| {
                if direction == Direction::REQUEST {
                    "request".to_owned()
                } else {
                    "reply".to_owned()
                }
            }),
            binding: opened.map(|(_, entry)| at(entry.binding.snat, entry.binding.snat_port)),
            is_binding_certain: taken.is_none_or(|(_, is_certain)| is_certain),
            route,
            verdict: match action {
                Action::Transmit | Action::Redirect => "send",
                Action::Pass => "pass",
                Action::Drop => "drop",
            }
            .to_owned(),
            action: match action {
                Action::Transmit => "transmit",
                Action::Redirect => "redirect",
                Action::Pass => "pass",
                Action::Drop => "drop",
            }
            .to_owned(),
            egress,
            reason: described.map_or_else(String::new, |reason| reason.name.to_owned()),
            text: described.map_or_else(String::new, |reason| reason.text.to_owned()),
            hint: described.map_or_else(String::new, |reason| reason.hint.to_owned()),
            packet,
            packet_after: PacketSummary::of(&walk.frame),
            bytes_before: Bytes(frame.to_vec()),
            bytes_after: Bytes(walk.frame.clone()),
        }
    }
}

/// How the backend of a new flow was chosen; `None`: no listener was asked, or none has the destination.
fn choice(walk: &Walk, table: &FlowTable<'_>) -> Option<Choice> {
    let mut choice: Option<Choice> = None;
    let mut tables = BackendGroup::zeroed();
    for step in &walk.steps {
        match (step, &mut choice) {
            (Step::Listener(listener), None) => {
                choice = Some(Choice {
                    listener: table.names.listener(listener.id),
                    group: None,
                    slot: None,
                    slots: None,
                    selection: None,
                    decided_by: None,
                    backend: None,
                    passed_over: Vec::new(),
                });
            }
            (Step::Group(id, group), Some(choice)) => {
                choice.group = Some(table.names.group(*id));
                choice.selection = Some(selection_name(group.selection).to_owned());
                tables = *group;
            }
            (Step::Persistence(_), Some(choice)) => choice.decided_by = Some("persistence".to_owned()),
            (Step::Slot(index, _), Some(choice)) => {
                let slot = index.wrapping_sub(tables.first_slot);
                let (decided_by, slot, slots) = match slot.checked_sub(tables.slot_count) {
                    None => ("slot", slot, tables.slot_count),
                    Some(behind) => ("overflow", behind, tables.overflow_slot_count),
                };
                choice.decided_by = Some(decided_by.to_owned());
                (choice.slot, choice.slots) = (Some(slot), Some(slots));
            }
            (Step::Backend(id, backend), Some(choice)) => {
                let looked_at = BackendChoice::of(table, *id, backend);
                if let Some(before) = choice.backend.replace(looked_at)
                    && !choice.passed_over.contains(&before)
                {
                    choice.passed_over.push(before);
                }
            }
            _ => {}
        }
    }
    // The last one was passed over as well.
    if let Some(choice) = &mut choice
        && let Some(last) = choice.backend.take_if(|backend| backend.state != HEALTHY)
        && !choice.passed_over.contains(&last)
    {
        choice.passed_over.push(last);
    }
    // With least connections the one chosen is looked at again.
    if let Some(choice) = &mut choice {
        let chosen = choice.backend.clone();
        choice
            .passed_over
            .retain(|backend| Some(backend) != chosen.as_ref());
    }
    choice
}

fn selection_name(selection: Selection) -> &'static str {
    match selection {
        Selection::SOURCE_IP => "source-ip",
        Selection::ROUND_ROBIN => "round-robin",
        Selection::LEAST_CONNECTIONS => "least-connections",
        _ => "maglev",
    }
}

/// The live flow that a packet belongs to, and its direction there.
fn existing(walk: &Walk, packet: &PacketSummary) -> Option<(FlowId, Direction)> {
    let (source, destination) = (packet.source.as_deref()?, packet.destination.as_deref()?);
    let is =
        |(from, to): (SocketAddr, SocketAddr)| from.to_string() == source && to.to_string() == destination;
    walk.steps.iter().find_map(|step| match step {
        Step::Flow(id, entry) if entry.state == FlowState::LIVE => {
            let FlowBinding {
                client,
                vip,
                snat,
                backend,
                client_port,
                vip_port,
                snat_port,
                backend_port,
                ..
            } = entry.binding;
            if is((at(client, client_port), at(vip, vip_port))) {
                Some((*id, Direction::REQUEST))
            } else if is((at(backend, backend_port), at(snat, snat_port))) {
                Some((*id, Direction::REPLY))
            } else {
                None
            }
        }
        _ => None,
    })
}

const HEALTHY: &str = "healthy";

impl BackendChoice {
    fn of(table: &FlowTable<'_>, id: BackendId, backend: &Backend) -> Self {
        let name = table.names.backend(id);
        Self {
            name: name.name,
            address: at(backend.address, backend.port),
            state: match backend.state {
                BackendState::HEALTHY => HEALTHY,
                BackendState::UNHEALTHY => "unhealthy",
                BackendState::DRAINING => "draining",
                _ => "absent",
            }
            .to_owned(),
            weight: name.weight,
        }
    }
}

impl RouteText {
    fn remembered(entry: &FlowEntry, direction: Direction) -> Option<Self> {
        let hop = if direction == Direction::REQUEST {
            entry.request_hop
        } else {
            entry.reply_hop
        };
        (hop.kind != HopKind::UNKNOWN).then(|| Self {
            kind: "remembered".to_owned(),
            interface: Some(name_of(hop.ifindex)),
        })
    }

    fn of(route: Route) -> Self {
        let (kind, ifindex) = match route {
            Route::Neighbour { ifindex, .. } => ("neighbour", Some(ifindex)),
            Route::Interface { ifindex } => ("unresolved", Some(ifindex)),
            Route::None => ("none", None),
            Route::ForwardingDisabled => ("forwarding-disabled", None),
        };
        Self {
            kind: kind.to_owned(),
            interface: ifindex.map(name_of),
        }
    }
}

/// The interface's name, or its number if it is gone.
fn name_of(ifindex: u32) -> String {
    match if_indextoname(ifindex) {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("#{ifindex}"),
    }
}

fn at(address: IpAddress, port: Be16) -> SocketAddr {
    SocketAddr::new(address.to_std(), port.get())
}
