//! What the agent asks the kernel about a packet that is not there: where it would be routed, and which flow is
//! next. Written into the frame of a test run of `map_name::PROGRAM_ASK`, which writes the answer behind it.
//!
//! So `forwarder explain` gets its routes from the very lookup that packets get, not from one that resembles it.

use bytemuck::{Pod, Zeroable};

use super::Route;
use crate::{
    abi::flow::{FlowId, FlowKey},
    wire::{Be16, IpAddress, LinkPair, WireHeader},
};

/// A question, and room for its answer. It travels in a frame, so it is made like a header.
///
/// The ports are not side by side as in the kernel's route lookup: the compiler would copy both in one step, which is
/// misaligned on the stack.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Inquiry {
    source: IpAddress,
    source_port: Be16,
    destination: IpAddress,
    destination_port: Be16,
    protocol: u32,
    /// Interface the packet comes in by.
    pub ingress_ifindex: u32,
    route: u32,
    egress_ifindex: u32,
    link: LinkPair,
    has_free_flow: u32,
    free_flow: FlowId,
}

impl WireHeader for Inquiry {}

/// Values of `Inquiry::route`.
const NEIGHBOUR: u32 = 1;
const INTERFACE: u32 = 2;
const NONE: u32 = 3;
const FORWARDING_DISABLED: u32 = 4;

impl Inquiry {
    /// Asks about a packet with this 5-tuple.
    pub fn new(key: &FlowKey, ingress_ifindex: u32) -> Self {
        Self {
            source: key.source,
            destination: key.destination,
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol: key.protocol,
            ingress_ifindex,
            ..Self::zeroed()
        }
    }

    /// The 5-tuple asked about.
    #[inline(always)]
    pub fn key(&self) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
        }
    }

    /// Writes the answer.
    #[inline(always)]
    pub fn answer(&mut self, route: Route, free_flow: Option<FlowId>) {
        match route {
            Route::Neighbour { ifindex, link } => {
                self.route = NEIGHBOUR;
                self.egress_ifindex = ifindex;
                self.link = link;
            }
            Route::Interface { ifindex } => {
                self.route = INTERFACE;
                self.egress_ifindex = ifindex;
            }
            Route::None => self.route = NONE,
            Route::ForwardingDisabled => self.route = FORWARDING_DISABLED,
        }
        if let Some(id) = free_flow {
            self.has_free_flow = 1;
            self.free_flow = id;
        }
    }

    /// The kernel's route; `None` before the answer.
    pub fn route(&self) -> Option<Route> {
        let ifindex = self.egress_ifindex;
        match self.route {
            NEIGHBOUR => Some(Route::Neighbour {
                ifindex,
                link: self.link,
            }),
            INTERFACE => Some(Route::Interface { ifindex }),
            NONE => Some(Route::None),
            FORWARDING_DISABLED => Some(Route::ForwardingDisabled),
            _ => None,
        }
    }

    /// The flow that the next new one gets; `None`: there is no free one.
    pub fn free_flow(&self) -> Option<FlowId> {
        (self.has_free_flow != 0).then_some(self.free_flow)
    }
}
