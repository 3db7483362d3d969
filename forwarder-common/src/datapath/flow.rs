//! Flows: find the one a packet belongs to, open one, keep it up to date.

use bytemuck::{Pod, Zeroable};

use super::{Stop, Tables, Walk, admission, handshake, parse::Frame, rewrite::Rewrite, tcp_state::Phase};
use crate::{
    abi::{
        backend::{BackendId, BackendState},
        flow::{
            Direction, FlowEntry, FlowId, FlowKey, FlowReference, FlowState, HopKind, NextHop, TcpEvents,
        },
        listener::ListenerId,
        reason::Reason,
        settings::Settings,
        snat::SnatBinding,
    },
    wire::{
        Be32,
        tcp::{FLAG_ACK, FLAG_RST, FLAG_SYN},
    },
};

/// What a packet of a flow needs from its entry: a copy, so that no table stays borrowed.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Hit {
    pub id: FlowId,
    pub direction: Direction,
    pub listener: ListenerId,
    pub backend: BackendId,
    /// Non-zero: the backend's first answer to what opened the flow: of TCP the first SYN or reset, as a host that has
    /// remains of an older connection acknowledges a SYN before it decides (RFC 9293 §3.10.7.4).
    pub is_first_answer: u32,
    /// The flow's, which is not the packet's where that is an ICMP error.
    pub protocol: u32,
    /// Non-zero: a SYN cookie opened the flow, see `handshake`.
    pub by_cookie: u32,
    /// By how much the sequence numbers that an ICMP error quotes are raised: by `icmp::find`.
    pub difference: u32,
    pub rewrite: Rewrite,
    pub hop: NextHop,
}

impl Hit {
    /// Becomes what a packet of this direction needs.
    #[inline(always)]
    pub(super) fn set(&mut self, id: FlowId, direction: Direction, entry: &FlowEntry) {
        self.id = id;
        self.direction = direction;
        self.listener = entry.listener;
        self.backend = entry.backend;
        self.is_first_answer = 0;
        self.protocol = entry.binding.protocol;
        self.by_cookie = u32::from(handshake::is_of(entry));
        self.difference = 0;
        self.rewrite.set(entry, direction);
        self.hop = if direction == Direction::REQUEST {
            entry.request_hop.copied()
        } else {
            entry.reply_hop.copied()
        };
    }
}

/// What `lookup` found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// The packet belongs to a flow, and the walk has its [`Hit`].
    Hit,
    /// The packet opens a TCP connection in place of one that has ended, or is ending: of two FINs that pass on two
    /// CPUs at once one may go unrecorded, and a client that has one outstanding sends no SYN from that port. The new
    /// one takes over the entry and its binding: the client's own clock and sequence numbers tell the backend old
    /// from new (RFC 6191), just as without a gateway.
    ///
    /// Or the packet repeats a SYN that a backend has not answered which takes no new flows any more: what it opened
    /// has not begun yet, so it can as well begin elsewhere.
    Ended(FlowId),
    /// The packet has no flow; it may open one.
    Nothing,
}

impl Found {
    /// The entry that a new flow takes over, if any.
    #[inline(always)]
    pub const fn ended(&self) -> Option<FlowId> {
        match self {
            Self::Ended(id) => Some(*id),
            _ => None,
        }
    }
}

/// The flow of a packet.
///
/// # Errors
/// [`Reason::NO_FLOW`] for a packet to an SNAT address that belongs to no flow: it must not reach the stack,
/// which would answer a stranger's reply with a reset.
#[inline(always)]
pub fn lookup<T: Tables>(tables: &mut T, settings: &Settings, walk: &mut Walk) -> Result<Found, Stop> {
    let Walk { frame, hit, .. } = walk;
    let place = locate(tables, settings, &frame.key, hit)?;
    if place == Place::Nowhere {
        return Ok(Found::Nothing);
    }
    match touch(tables, frame, hit) {
        Found::Nothing if place == Place::Pool => Err(Stop::drop(Reason::NO_FLOW)),
        found => Ok(found),
    }
}

/// Where the flow of a 5-tuple was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// In the flow index.
    Index,
    /// By its SNAT address and port, whether or not there is such a flow.
    Pool,
}

/// Looks for the flow that a packet with this 5-tuple would belong to; `hit` gets its number and direction.
///
/// Not in the return value: where there is none, the compiler would leave the number undefined and might still spill
/// it, which the verifier refuses ("R1 !read_ok", Linux 6.18).
#[inline(always)]
fn locate<T: Tables>(tables: &T, settings: &Settings, key: &FlowKey, hit: &mut Hit) -> Result<Place, Stop> {
    let binding = SnatBinding {
        address: key.destination.copied(),
        port: key.destination_port,
    };
    if let Some(id) = settings.pool.flow(binding) {
        hit.id = id.ok_or(Stop::drop(Reason::NO_FLOW))?;
        hit.direction = Direction::REPLY;
        return Ok(Place::Pool);
    }
    match tables.flow_reference(key) {
        Some(reference) => {
            hit.id = reference.id;
            hit.direction = reference.direction;
            Ok(Place::Index)
        }
        None => Ok(Place::Nowhere),
    }
}

/// The flow that the walk's key is of, without a packet of it: nothing is marked or counted. The walk gets its hit.
///
/// # Errors
/// As of [`lookup`]; passes what is of no flow.
#[inline(always)]
pub fn find<T: Tables>(tables: &mut T, settings: &Settings, walk: &mut Walk) -> Result<(), Stop> {
    let Walk { hit, key, .. } = walk;
    let place = locate(tables, settings, key, hit)?;
    if place == Place::Nowhere {
        return Err(Stop::pass(Reason::NOT_OURS));
    }
    let (id, direction) = (hit.id, hit.direction);
    match tables.flow(id) {
        Some(entry) if entry.state == FlowState::LIVE && *key == entry.key(direction) => {
            hit.set(id, direction, entry);
            Ok(())
        }
        _ if place == Place::Pool => Err(Stop::drop(Reason::NO_FLOW)),
        _ => Err(Stop::pass(Reason::NOT_OURS)),
    }
}

/// Marks the flow as seen, counts the packet, follows connections.
#[inline(always)]
fn touch<T: Tables>(tables: &mut T, frame: &Frame, hit: &mut Hit) -> Found {
    let (id, direction) = (hit.id, hit.direction);
    let is_request = direction == Direction::REQUEST;
    let is_of_connection = frame.is_of_connection();
    let is_opening = is_request && is_of_connection && admission::is_opening(frame);
    let is_stranded = is_opening && is_stranded(tables, id);
    let Some(entry) = tables.flow(id) else {
        return Found::Nothing;
    };
    if entry.state != FlowState::LIVE || frame.key != entry.key(direction) {
        return Found::Nothing;
    }
    let mut is_first_answer = !is_request && entry.reply_packets == 0;
    if is_of_connection {
        if is_opening && (is_stranded || matches!(entry.tcp.phase(), Phase::Closing | Phase::Closed)) {
            return Found::Ended(id);
        }
        is_first_answer = !is_request
            && frame.tcp_flags & (FLAG_SYN | FLAG_RST) != 0
            && !entry.tcp.has(TcpEvents::ANSWERED)
            && !entry.tcp.has(TcpEvents::RESET);
        let tcp = entry.tcp.after(direction, frame.tcp_flags);
        // Written only when it changes, here and below: the cache line stays shared between CPUs.
        if tcp != entry.tcp {
            entry.tcp = tcp;
        }
    }
    if entry.seen == 0 {
        entry.seen = 1;
    }
    let bytes = u64::from(frame.total_len);
    let has_ack = frame.tcp_flags & FLAG_ACK != 0;
    if is_request {
        if has_ack {
            entry.client_expects = frame.acknowledgment;
        }
        entry.request_packets = entry.request_packets.wrapping_add(1);
        entry.request_bytes = entry.request_bytes.wrapping_add(bytes);
    } else {
        if has_ack {
            entry.backend_expects = frame.acknowledgment;
        }
        entry.reply_packets = entry.reply_packets.wrapping_add(1);
        entry.reply_bytes = entry.reply_bytes.wrapping_add(bytes);
    }
    hit.set(id, direction, entry);
    hit.is_first_answer = u32::from(is_first_answer);
    Found::Hit
}

/// Does a flow without an answer wait for a backend that takes no new flows?
#[inline(always)]
fn is_stranded<T: Tables>(tables: &mut T, id: FlowId) -> bool {
    let Some(entry) = tables.flow(id) else {
        return false;
    };
    let (events, backend) = (entry.tcp, entry.backend);
    !events.has(TcpEvents::ANSWERED)
        && tables
            .backend(backend)
            .is_none_or(|backend| backend.state != BackendState::HEALTHY)
}

/// Opens a flow with its first packet: both directions or neither.
///
/// `ended` is true where the entry is taken over, see [`Found::Ended`]; its request key is in the flow index already.
#[inline(always)]
pub fn open<T: Tables>(
    tables: &mut T,
    id: FlowId,
    ended: bool,
    backend: BackendId,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let Walk {
        frame,
        listener,
        hit,
        binding,
        key,
        room,
        ..
    } = walk;
    let (address_delta, port_delta) = Rewrite::deltas(binding);
    let entry = tables.flow(id).ok_or(Stop::drop(Reason::INTERNAL))?;
    let is_reply_key_new = entry.binding.is_dnat() && !entry.binding.has_replies_of(binding);
    *key = entry.binding.reply_key();
    entry.binding = binding.copied();
    entry.state = FlowState::LIVE;
    entry.seen = 1;
    let is_by_cookie = handshake::is_opening(frame);
    entry.tcp = if is_by_cookie {
        TcpEvents::OPENED.with(TcpEvents::BY_COOKIE)
    } else {
        TcpEvents::default().after(Direction::REQUEST, frame.tcp_flags)
    };
    entry.counted = 1;
    entry.listener = listener.id;
    entry.backend = backend;
    entry.address_delta = address_delta.folded();
    entry.port_delta = port_delta.folded();
    entry.request_hop.kind = HopKind::UNKNOWN;
    entry.reply_hop.kind = HopKind::UNKNOWN;
    // Of a cookie's flow both are known; the backend is to expect what comes behind the SYN that it gets.
    let (client_expects, backend_expects) = if is_by_cookie {
        (frame.acknowledgment, Be32::new(room.client_first.wrapping_add(1)))
    } else {
        (Be32::new(0), Be32::new(0))
    };
    entry.client_expects = client_expects;
    entry.backend_expects = backend_expects;
    entry.request_bytes = u64::from(frame.total_len);
    entry.reply_bytes = 0;
    entry.request_packets = 1;
    entry.reply_packets = 0;

    hit.set(id, Direction::REQUEST, entry);
    if ended && is_reply_key_new {
        tables.remove_flow_reference(key);
    }
    *key = binding.reply_key();
    link(tables, id, ended, binding.is_dnat(), &frame.key, key)
}

/// Enters the keys of a new flow into the flow index; takes back what it did if one cannot be entered.
#[inline(always)]
fn link<T: Tables>(
    tables: &mut T,
    id: FlowId,
    ended: bool,
    is_dnat: bool,
    request_key: &FlowKey,
    reply_key: &FlowKey,
) -> Result<(), Stop> {
    if is_dnat {
        let reply = FlowReference {
            id,
            direction: Direction::REPLY,
        };
        let is_present = tables
            .flow_reference(reply_key)
            .is_some_and(|found| found.id == id);
        if !is_present && !tables.insert_flow_reference(reply_key, reply) {
            return Err(unlink(tables, id, ended, request_key, reply_key));
        }
    }
    let request = FlowReference {
        id,
        direction: Direction::REQUEST,
    };
    if !ended && !tables.insert_flow_reference(request_key, request) {
        if is_dnat {
            tables.remove_flow_reference(reply_key);
        }
        return Err(unlink(tables, id, ended, request_key, request_key));
    }
    Ok(())
}

/// Gives the entry of a flow back whose key could not be entered, and says why it could not.
#[inline(always)]
fn unlink<T: Tables>(
    tables: &mut T,
    id: FlowId,
    ended: bool,
    request_key: &FlowKey,
    refused: &FlowKey,
) -> Stop {
    if ended {
        tables.remove_flow_reference(request_key);
    }
    if let Some(entry) = tables.flow(id) {
        entry.counted = 0;
        // The old connection's binding may still be in use by stragglers: then the agent frees it in its time.
        entry.state = if ended {
            FlowState::UNLINKED
        } else {
            FlowState::FREE
        };
    }
    if !ended {
        tables.return_flow(id);
    }
    // Another CPU may have opened the same flow just now: the client's next packet will find it.
    let is_taken = tables.flow_reference(refused).is_some();
    Stop::drop(if is_taken {
        Reason::FLOW_CONFLICT
    } else {
        Reason::FLOW_TABLE_FULL
    })
}

/// Takes the keys of a flow out of the flow index, whose next connection gets an entry of its own; the agent frees it
/// in its time. `walk` is room to work in; its frame is a request of the flow.
#[inline(always)]
pub fn forget<T: Tables>(tables: &mut T, id: FlowId, walk: &mut Walk) {
    let Walk { frame, key, .. } = walk;
    let Some(entry) = tables.flow(id) else { return };
    entry.state = FlowState::UNLINKED;
    let is_dnat = entry.binding.is_dnat();
    *key = entry.binding.reply_key();
    tables.remove_flow_reference(&frame.key);
    if is_dnat && tables.flow_reference(key).is_some_and(|found| found.id == id) {
        tables.remove_flow_reference(key);
    }
}

/// Is there a flow whose packets have this 5-tuple, or might there be one, as its destination is of the pool?
#[inline(always)]
pub fn is_known<T: Tables>(tables: &T, settings: &Settings, key: &FlowKey) -> bool {
    settings.pool.contains(key.destination) || tables.flow_reference(key).is_some()
}

/// Stores where packets of a direction go, for the packets after this one.
#[inline(always)]
pub fn store_hop<T: Tables>(tables: &mut T, id: FlowId, direction: Direction, hop: &NextHop) {
    if let Some(entry) = tables.flow(id) {
        if direction == Direction::REQUEST {
            entry.request_hop = hop.copied();
        } else {
            entry.reply_hop = hop.copied();
        }
    }
}
