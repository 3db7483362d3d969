//! The packet walk: what becomes of a packet, and why.
//!
//! `pipeline::forward` runs the stages in order. A stage is a pure function of the packet and two things from
//! outside, [`Tables`] (maps) and [`Env`] (routes). It returns what the next stage needs or a [`Stop`].
//! Nothing in the walk is random, and the clock ([`Tables::now_secs`]) is read only where entries age: of `persistence`,
//! of fragments, of the ICMP budget. So the same packet and tables give the same result in a test, in `forwarder
//! explain` and in the kernel.
//!
//! What stages hand on is one struct, [`Walk`]: in the kernel it stands in a map, as the stack has 512 bytes. Small
//! structs that may end up on the stack are aligned to 8: the verifier refuses misaligned accesses there ("misaligned
//! stack access", all kernels), while the compiler, which is told that packet bytes may be misaligned, merges copies
//! into 8-byte steps.
//!
//! Until `rewrite::apply` no byte of the packet is changed; from there on no policy decides. Answers are made in place,
//! by the stage that finds that there is one to give, and end the walk.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{
        backend::{Backend, BackendGroup, BackendHop, BackendId, GroupId},
        counter::{CarriedCounters, EventCounters, IcmpBudget, TrafficCounters},
        flow::{FlowBinding, FlowEntry, FlowId, FlowKey, FlowKeyV4, FlowReference},
        fragment::{FragmentFlow, FragmentKey, HeldKind},
        handshake::{Handshake, SynBudget},
        interface::{Interface, InterfaceKey},
        listener::{Listener, ListenerId, ListenerKey, ListenerRangeKey, SourceKey, Vip, VipKey},
        persistence::{Persistence, PersistenceKey},
        rate::{SourceRate, SourceRateKey},
        reason::Reason,
        settings::Settings,
        tunnel::{PeerId, TunnelEndpoint, TunnelEndpointKey, TunnelHopKey, TunnelPeer, TunnelPort},
    },
    wire::{LinkPair, WireHeader, checksum::Delta},
};

use hint::{Fingerprint, Hints};

pub mod admission;
pub mod arp;
pub mod backend;
pub mod capture;
pub mod cookie;
pub mod echo;
pub mod express;
pub mod flow;
pub mod fragment;
pub mod handshake;
pub mod hash;
pub mod hint;
pub mod icmp;
pub mod icmp_error;
pub mod inquiry;
pub mod listener;
pub mod mss;
pub mod neighbour;
pub mod next_hop;
pub mod open;
pub mod overlay;
pub mod parse;
pub mod persistence;
pub mod pipeline;
pub mod quota;
pub mod rate;
pub mod refuse;
pub mod rewrite;
pub mod sctp;
pub mod snat;
pub mod tcp_state;
pub mod translate;
pub mod translate_error;
pub mod transport_checksum;

/// RFC 1122 §3.2.1.7: a fresh TTL, as an answer is a packet of its own.
const ANSWER_TTL: u8 = 64;

/// What happens to a packet.
///
/// Not an enum with a payload: the compiler would leave the interface undefined where it has no meaning and might
/// still spill it, which the verifier refuses ("R2 !read_ok", Linux 6.18).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub action: Action,
    /// Egress interface of a redirect, else zero.
    pub ifindex: u32,
}

/// The kind of a verdict.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Out of the interface it came from.
    Transmit,
    /// Out of another interface.
    Redirect,
    /// Up to the stack.
    Pass,
    Drop,
}

impl Verdict {
    pub const TRANSMIT: Self = Self {
        action: Action::Transmit,
        ifindex: 0,
    };
    pub const PASS: Self = Self {
        action: Action::Pass,
        ifindex: 0,
    };
    pub const DROP: Self = Self {
        action: Action::Drop,
        ifindex: 0,
    };

    /// Out of this interface.
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self {
            action: Action::Redirect,
            ifindex,
        }
    }
}

/// The end of a packet's walk.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    pub reason: Reason,
}

/// An early end of the walk: the packet is unchanged, or has become the answer that is sent back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop(pub Outcome);

impl Stop {
    /// Leave the packet to the stack.
    #[inline(always)]
    pub const fn pass(reason: Reason) -> Self {
        Self(Outcome {
            verdict: Verdict::PASS,
            reason,
        })
    }

    /// Drop the packet.
    #[inline(always)]
    pub const fn drop(reason: Reason) -> Self {
        Self(Outcome {
            verdict: Verdict::DROP,
            reason,
        })
    }
}

/// What stages hand on.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Walk {
    /// What the packet is: by `parse`.
    pub frame: parse::Frame,
    /// The tunnel it came through, if the walk looks into one: by `overlay`.
    pub inside: overlay::Inside,
    /// What it wants, where it has no flow: by `admission`.
    pub listener: Listener,
    /// Its flow: by `flow::lookup` or `open`.
    pub hit: flow::Hit,
    /// The addresses of a new flow: by `snat::bind`.
    pub binding: FlowBinding,
    /// What an ICMP error quotes: by `icmp::find`.
    pub quote: icmp::Quote,
    /// Room for the one key that a stage builds.
    pub key: FlowKey,
    /// Of a handshake that the gateway makes: by `handshake`.
    pub room: handshake::Room,
}

/// Where the state "this transport checksum is not computed yet" lives; see `transport_checksum`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChecksumOffload {
    /// Nowhere once the frame leaves through the program, so it must be completed then (native XDP).
    LostOnSend,
    /// Beside the frame, on every way out (generic XDP).
    Kept,
    /// The kernel updates checksums itself on request (tcx).
    Kernel,
}

/// The bytes of a frame.
///
/// Headers are typed and of fixed size: the kernel's verifier refuses slices whose length is known only at run
/// time. A header borrows the packet, so none survives an operation that may move the bytes.
pub trait Packet {
    /// How this kind of packet treats checksums that are left to a device.
    const CHECKSUM_OFFLOAD: ChecksumOffload;

    /// The header at `offset` bytes from the frame's start.
    ///
    /// # Errors
    /// [`Reason::TRUNCATED`] when the frame ends before the header does.
    fn header<H: WireHeader>(&mut self, offset: usize) -> Result<&mut H, Stop>;

    /// Length of the frame in bytes.
    fn frame_len(&self) -> usize;

    /// Length of its first piece in bytes, where drivers may hand in several: all of it, as a rule.
    #[inline(always)]
    fn linear_len(&self) -> usize {
        self.frame_len()
    }

    /// Does it begin with Ethernet? Else with IP, as packets of some tunnels do.
    #[inline(always)]
    fn begins_with_link(&mut self) -> bool {
        true
    }

    /// Payload of each packet that this one will be sent as, in bytes, where the kernel has put several together
    /// (GRO, or a local sender's TSO); zero: it is one packet.
    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    /// Folded sum of `len` bytes at `offset`, in machine order; an odd last byte is padded with zero. Of more than 9000
    /// bytes any number, in the kernel: such are put together from several packets, whose checksum is still owed.
    ///
    /// # Errors
    /// [`Reason::TRUNCATED`] when the frame ends before that.
    fn sum(&mut self, offset: usize, len: usize) -> Result<u32, Stop>;

    /// CRC32c of `len` bytes at `offset`, as `wire::crc32c` has it. Asked for where `CHECKSUM_OFFLOAD` is `LostOnSend`.
    ///
    /// # Errors
    /// [`Reason::TRUNCATED`] when the frame ends before that.
    fn crc(&mut self, offset: usize, len: usize) -> Result<u32, Stop>;

    /// Applies deltas to the transport checksum at `offset`; called where `CHECKSUM_OFFLOAD` is `Kernel`.
    /// `is_optional`: a checksum of zero means "none", as in UDP and not in TCP.
    fn adjust_checksum(
        &mut self,
        offset: usize,
        addresses: Delta,
        ports: Delta,
        is_optional: bool,
    ) -> Result<(), Stop>;

    /// Moves the frame's start: `by` bytes further back, or forth when negative; new bytes have any content. Asked for
    /// where `CHECKSUM_OFFLOAD` is not `Kernel`.
    ///
    /// # Errors
    /// [`Reason::INTERNAL`] when there is no room, or the frame is shorter.
    fn move_start(&mut self, by: i32) -> Result<(), Stop>;

    /// Cuts the frame to `len` bytes.
    ///
    /// # Errors
    /// [`Reason::INTERNAL`] when it is shorter.
    fn cut(&mut self, len: usize) -> Result<(), Stop>;

    /// Cuts the frame to `len` bytes, or makes it as long; what is behind the first `kept` bytes has any content then.
    /// `kept` is even, as all headers are.
    ///
    /// # Errors
    /// [`Reason::INTERNAL`] when there is no room.
    fn resize(&mut self, kept: usize, len: usize) -> Result<(), Stop>;

    /// Makes room for `front` bytes before the IP header, at `network_offset`; these, and the link header, have any
    /// content then.
    ///
    /// # Errors
    /// [`Reason::INTERNAL`] when there is no room.
    fn grow(&mut self, network_offset: usize, front: usize) -> Result<(), Stop>;

    /// [`overlay::recognise`], wherever it runs.
    #[inline(always)]
    fn recognise<T: Tables>(&mut self, tables: &T, walk: &mut Walk)
    where
        Self: Sized,
    {
        overlay::recognise(self, tables, walk);
    }

    /// Makes room for `len` bytes of headers of the other family, which take the place of those from `network_offset`
    /// to `end`; where what stands at `end` starts then. They, and what is before them, have any content then.
    ///
    /// # Errors
    /// A drop where there is no room, or the kernel cannot.
    fn replace_headers(&mut self, network_offset: u32, end: u32, len: u32, to_v4: bool) -> Result<u32, Stop>;

    /// [`rewrite::apply_seldom`], wherever it runs.
    #[inline(always)]
    fn rewrite_seldom(&mut self, settings: &Settings, walk: &mut Walk) -> Result<(), Stop>
    where
        Self: Sized,
    {
        rewrite::apply_seldom(self, settings, walk)
    }

    /// [`translate_error::find`], wherever it runs.
    #[inline(always)]
    fn find_equal_error(&mut self, walk: &mut Walk) -> Result<(), Stop>
    where
        Self: Sized,
    {
        translate_error::find(self, walk)
    }

    /// [`translate::apply`], wherever it runs.
    #[inline(always)]
    fn translate(&mut self, walk: &mut Walk) -> Result<(), Stop>
    where
        Self: Sized,
    {
        translate::apply(self, walk)
    }

    /// [`handshake::admit`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn admit_handshake<T: Tables>(
        &mut self,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
        ended: Option<FlowId>,
    ) -> handshake::Admitted
    where
        Self: Sized,
    {
        handshake::admit(self, tables, settings, walk, ended)
    }

    /// [`handshake::pass`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn pass_handshake<T: Tables>(
        &mut self,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
    ) -> Result<(), Stop>
    where
        Self: Sized,
    {
        handshake::pass(self, tables, settings, walk)
    }

    /// [`handshake::next_option`], wherever it runs.
    #[inline(always)]
    fn next_option(&mut self, walk: &mut Walk, place: u32, len: u32) -> u32 {
        handshake::next_option(&mut walk.room, place, len)
    }

    /// [`overlay::enter`], wherever it runs.
    #[inline(always)]
    fn enter_tunnel<T: Tables>(
        &mut self,
        tables: &mut T,
        settings: &Settings,
        entrant: &overlay::Entrant,
    ) -> Result<(), Stop>
    where
        Self: Sized,
    {
        overlay::enter(self, tables, settings, entrant)
    }

    /// [`rewrite::leave`], wherever it runs.
    #[inline(always)]
    fn leave<T: Tables>(
        &mut self,
        tables: &T,
        hook: Hook,
        settings: &Settings,
        walk: &Walk,
    ) -> Result<(), Stop>
    where
        Self: Sized,
    {
        rewrite::leave(self, tables, hook, settings, walk)
    }
}

/// The tables that the agent fills and the walk reads.
pub trait Tables {
    type Gauge: Gauge;

    fn vip(&self, key: &VipKey) -> Option<&Vip>;
    fn listener(&self, key: &ListenerKey) -> Option<&Listener>;
    /// The listener whose prefix is the longest that the key has.
    fn listener_range(&self, key: &ListenerRangeKey) -> Option<&Listener>;
    /// Is there a prefix that this key has?
    fn is_source_admitted(&self, key: &SourceKey) -> bool;
    fn group(&self, id: GroupId) -> Option<&BackendGroup>;
    /// The backend in a slot of the slot table.
    fn slot(&self, index: u32) -> Option<BackendId>;
    fn backend(&self, id: BackendId) -> Option<&Backend>;
    fn interface(&self, key: &InterfaceKey) -> Option<&Interface>;
    /// What a UDP destination port means.
    fn tunnel_port(&self, port: u16) -> Option<TunnelPort>;
    /// The tunnel that a packet came through.
    fn tunnel_endpoint(&self, key: &TunnelEndpointKey) -> Option<&TunnelEndpoint>;
    /// The far end that a next hop on a tunnel device stands for.
    fn tunnel_hop(&self, key: &TunnelHopKey) -> Option<PeerId>;
    fn tunnel_peer(&self, id: PeerId) -> Option<&TunnelPeer>;

    /// [`open::open`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn open(
        &mut self,
        settings: &Settings,
        walk: &mut Walk,
        backend: BackendId,
        ended: Option<FlowId>,
    ) -> open::Opened
    where
        Self: Sized,
    {
        open::open(self, settings, walk, backend, ended)
    }

    /// [`fragment::follow`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn follow(&mut self, settings: &Settings, walk: &mut Walk) -> fragment::Followed
    where
        Self: Sized,
    {
        fragment::follow(self, settings, walk)
    }

    /// [`backend::choose`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn choose(&mut self, walk: &Walk, hash: u32, now_secs: u32) -> backend::Found
    where
        Self: Sized,
    {
        backend::choose(self, walk, hash, now_secs)
    }

    /// [`rate::charge`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn charge(&mut self, walk: &Walk) -> rate::Charged
    where
        Self: Sized,
    {
        rate::charge(self, walk)
    }

    /// [`backend::search`], wherever it runs.
    #[inline(always)]
    fn search(&mut self, first_slot: u32, slot_count: u32, slot: u32) -> backend::Found
    where
        Self: Sized,
    {
        backend::search(self, first_slot, slot_count, slot)
    }

    /// [`backend::search_least`], wherever it runs.
    #[inline(always)]
    fn search_least(&mut self, first_slot: u32, slot_count: u32, slot: u32) -> backend::Found
    where
        Self: Sized,
    {
        backend::search_least(self, first_slot, slot_count, slot)
    }

    /// How many turns a group has taken.
    fn group_turns(&mut self, id: GroupId) -> Option<&mut Self::Gauge>;
    /// Where a client's last flow went.
    fn persistence(&mut self, key: &PersistenceKey) -> Option<&mut Persistence>;
    /// Keeps where a client's flow goes; of a full table, what was not used for longest makes room.
    fn keep_persistence(&mut self, key: &PersistenceKey, value: Persistence);

    /// A reference to the value, as all lookups have, and no copy: an option with a payload is undefined where there is
    /// none, and where two lookups meet the compiler might still spill it, which the verifier refuses ("R1 !read_ok",
    /// Linux 6.18).
    fn flow_reference(&self, key: &FlowKey) -> Option<&FlowReference>;
    /// The same of a short key.
    #[inline(always)]
    fn flow_reference_v4(&self, key: &FlowKeyV4) -> Option<&FlowReference> {
        self.flow_reference(&key.long())
    }
    /// The same of a key of IPv6.
    #[inline(always)]
    fn flow_reference_v6(&self, key: &FlowKey) -> Option<&FlowReference> {
        self.flow_reference(key)
    }
    fn flow(&mut self, id: FlowId) -> Option<&mut FlowEntry>;
    /// The bucket that may have a hint at the flow of these packets; `None`: there are no hints.
    #[inline(always)]
    fn hints(&mut self, _fingerprint: Fingerprint) -> Option<&mut Hints> {
        None
    }
    /// Inserts unless the key exists; `false`: it does, or there is no room.
    fn insert_flow_reference(&mut self, key: &FlowKey, reference: FlowReference) -> bool;
    fn remove_flow_reference(&mut self, key: &FlowKey);
    /// The flow that has been free for longest, so that stragglers of its last connection have died out.
    fn take_flow(&mut self) -> Option<FlowId>;
    /// Gives a flow back that no packet has used.
    fn return_flow(&mut self, id: FlowId);

    /// Live flows of a listener that count against its limit.
    fn listener_live(&mut self, id: ListenerId) -> Option<&mut Self::Gauge>;
    /// Live flows of a backend that count against its limit.
    fn backend_live(&mut self, id: BackendId) -> Option<&mut Self::Gauge>;

    /// This CPU's budget of SYNs for a listener.
    fn syn_budget(&mut self, id: ListenerId) -> Option<&mut SynBudget>;
    /// The handshake of a flow that a cookie opened; of others without a meaning.
    fn handshake(&mut self, id: FlowId) -> Option<&mut Handshake>;
    /// How fast clients of a prefix open flows.
    fn source_rate(&mut self, key: &SourceRateKey) -> Option<&mut SourceRate>;
    /// Keeps that of a prefix which has none yet; of a full table, what was not used for longest makes room.
    fn keep_source_rate(&mut self, key: &SourceRateKey, value: SourceRate);

    /// Seconds of CLOCK_MONOTONIC, by which entries age.
    fn now_secs(&mut self) -> u32;

    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentFlow>;
    /// Keeps the flow of a first fragment; of a full table, what was not used for longest makes room.
    fn keep_fragment(&mut self, key: &FragmentKey, flow: FragmentFlow);

    /// This CPU's budget of ICMP messages.
    fn icmp_budget(&mut self) -> Option<&mut IcmpBudget>;
    /// What this CPU knows of the way to a backend.
    fn backend_hop(&mut self, id: BackendId) -> Option<&mut BackendHop>;

    fn count_listener(&mut self, id: ListenerId, event: TrafficEvent);
    fn count_backend(&mut self, id: BackendId, event: TrafficEvent);
    fn count_reason(&mut self, reason: Reason, frame_bytes: usize);
}

/// A number that all CPUs and the agent count up and down.
pub trait Gauge {
    fn get(&self) -> u64;
    /// Adds, and says what it was before, as one step.
    fn add(&mut self, difference: i64) -> u64;
}

/// Something to count for a listener and a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrafficEvent {
    FlowOpened,
    FlowRefused,
    /// A refused flow's client was told.
    RefusalSent,
    /// Of SYN cookies.
    CookieSent,
    CookieAccepted,
    CookieInvalid,
    /// A flow that came too fast from its source.
    RateLimited,
    /// A request or reply of so many IP bytes.
    Request {
        bytes: u32,
        reset: bool,
    },
    Reply {
        bytes: u32,
        reset: bool,
        /// It answers what opened the flow.
        first: bool,
    },
}

impl TrafficEvent {
    /// Is it nothing but a packet that was carried? Then [`CarriedCounters`] are all that it changes.
    #[inline(always)]
    pub const fn is_carried_only(self) -> bool {
        matches!(
            self,
            Self::Request { reset: false, .. }
                | Self::Reply {
                    reset: false,
                    first: false,
                    ..
                }
        )
    }
}

impl TrafficCounters {
    /// Adds one event.
    pub fn add(&mut self, event: TrafficEvent) {
        let (carried, events) = self.parts();
        carried.add(event);
        events.add(event);
    }
}

impl CarriedCounters {
    /// Adds what of an event is of these; wraps around after centuries.
    #[inline(always)]
    pub fn add(&mut self, event: TrafficEvent) {
        match event {
            TrafficEvent::Request { bytes, .. } => {
                self.request_packets = self.request_packets.wrapping_add(1);
                self.request_bytes = self.request_bytes.wrapping_add(u64::from(bytes));
            }
            TrafficEvent::Reply { bytes, .. } => {
                self.reply_packets = self.reply_packets.wrapping_add(1);
                self.reply_bytes = self.reply_bytes.wrapping_add(u64::from(bytes));
            }
            _ => {}
        }
    }
}

impl EventCounters {
    /// Adds what of an event is of these; wraps around after centuries.
    #[inline(always)]
    pub fn add(&mut self, event: TrafficEvent) {
        match event {
            TrafficEvent::FlowOpened => self.flows_opened = self.flows_opened.wrapping_add(1),
            TrafficEvent::RefusalSent => self.gateway_resets = self.gateway_resets.wrapping_add(1),
            TrafficEvent::CookieSent => self.cookies_sent = self.cookies_sent.wrapping_add(1),
            TrafficEvent::CookieAccepted => self.cookies_accepted = self.cookies_accepted.wrapping_add(1),
            TrafficEvent::CookieInvalid => self.cookies_invalid = self.cookies_invalid.wrapping_add(1),
            TrafficEvent::RateLimited => self.flows_limited = self.flows_limited.wrapping_add(1),
            TrafficEvent::FlowRefused => self.flows_refused = self.flows_refused.wrapping_add(1),
            TrafficEvent::Request { reset, .. } => {
                self.client_resets = self.client_resets.wrapping_add(u64::from(reset));
            }
            TrafficEvent::Reply { reset, first, .. } => {
                self.backend_resets = self.backend_resets.wrapping_add(u64::from(reset));
                self.flows_answered = self.flows_answered.wrapping_add(u64::from(first && !reset));
                self.flows_rejected = self.flows_rejected.wrapping_add(u64::from(first && reset));
            }
        }
    }
}

impl crate::abi::counter::ReasonCounters {
    /// Counts one packet.
    #[inline(always)]
    pub fn add(&mut self, frame_bytes: usize) {
        self.packets = self.packets.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(frame_bytes as u64);
    }
}

/// Where the walk runs; it decides how a packet can be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Hook {
    /// Native XDP: frames can leave through interfaces marked so; both link addresses must be known.
    Xdp = 1,
    /// tcx: packets can leave through any interface; the kernel resolves the neighbour.
    Tcx = 2,
    /// Generic XDP: as native, with other interfaces.
    XdpGeneric = 3,
}

/// What the walk asks of its surroundings.
pub trait Env {
    fn hook(&self) -> Hook;
    /// Interface the packet came in by.
    fn ingress_ifindex(&self) -> u32;
    /// The kernel's route for a packet with this 5-tuple.
    fn route(&mut self, key: &FlowKey) -> Route;

    /// [`next_hop::find`], wherever it runs.
    #[inline(always)]
    fn find_next_hop<T: Tables>(
        &mut self,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
    ) -> Result<(), Stop>
    where
        Self: Sized,
    {
        next_hop::find(tables, self, settings, walk)
    }

    /// [`express::through`], wherever it runs; the walk has what is inside.
    #[inline(always)]
    fn pass_through<P: Packet, T: Tables>(
        &self,
        packet: &mut P,
        tables: &mut T,
        settings: &Settings,
        walk: &Walk,
    ) -> Option<Outcome>
    where
        Self: Sized,
    {
        express::through(packet, tables, self, settings, &walk.inside)
    }

    /// Captures a packet that comes, if the filter may be true of it (`capture`). The walk is room to work in, but for what
    /// it has of the inside.
    #[inline(always)]
    fn capture<P: Packet>(&mut self, _packet: &mut P, _walk: &mut Walk) {}

    /// Captures it once more, now that its reason is known, and hands both to the agent.
    #[inline(always)]
    fn captured<P: Packet>(&mut self, _packet: &mut P, _walk: &Walk, _outcome: Outcome) {}

    /// Hands a packet to the agent, which sends it on; `false`: it cannot.
    fn hold<P: Packet>(&mut self, packet: &mut P, walk: &Walk, why: HeldKind) -> bool;

    /// [`icmp::find`], wherever it runs; `walk` is the one of this packet.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn icmp<P: Packet, T: Tables>(
        &mut self,
        packet: &mut P,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
    ) -> Result<(), Stop>
    where
        Self: Sized,
    {
        icmp::find(packet, tables, settings, walk)
    }

    /// [`handshake::answer`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn answer_syn<P: Packet, T: Tables>(
        &mut self,
        packet: &mut P,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
    ) -> Outcome
    where
        Self: Sized,
    {
        handshake::answer(packet, tables, settings, walk)
    }

    /// [`refuse::answer`], wherever it runs; `walk` is the one of this packet.
    #[inline(always)]
    fn refuse<P: Packet, T: Tables>(
        &mut self,
        packet: &mut P,
        tables: &mut T,
        settings: &Settings,
        walk: &Walk,
        reason: Reason,
    ) -> Outcome
    where
        Self: Sized,
    {
        refuse::answer(packet, tables, settings, walk, reason)
    }
}

/// Answer of the kernel's forwarding table.
#[repr(align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// The neighbour is known.
    Neighbour { ifindex: u32, link: LinkPair },
    /// The interface is known, the neighbour's link address is not, or the interface has none.
    Interface { ifindex: u32 },
    /// No route, or one that forbids.
    None,
    /// The ingress interface does not forward.
    ForwardingDisabled,
}
