//! Connections that begin with a SYN cookie: the gateway makes the handshake with the client, and once that has come
//! back, the same with the backend.
//!
//! 1. A SYN beyond the listener's budget becomes the SYN and ACK that answers it, with a cookie for a sequence number
//!    and a window of zero, so that the client sends nothing yet ([`answer`]). Nothing is remembered.
//! 2. The acknowledgment with that cookie opens the flow ([`admit`]), and becomes the SYN that the client had sent
//!    ([`pass`]). If it comes again before the backend has answered, so does that SYN.
//! 3. The backend's SYN and ACK becomes, for the client, the probe of a keepalive (RFC 9293 §3.8.4) that opens its
//!    window: one byte, before those that it waits for. It answers that at once, which completes the backend's
//!    handshake, also where the server is to speak first. Of a SYN and ACK that comes again every other one becomes a
//!    plain update of the window, as something on the way may not like the probe.
//! 4. From then on acknowledgments of the client are raised by the difference of the two sequence numbers, and sequence
//!    numbers of the backend lowered; windows are scaled from one side's scale to the other's.
//!
//! Time stamps (RFC 7323) are not announced: their clock would be the backend's, which nobody knows yet. So after that
//! there are no options but selective acknowledgments.
//!
//! Bytes behind the fixed header change only as long as there is no payload to speak of, before the common rewrite, so
//! that this sees a packet like any other. What is done here is seldom, and a function of its own in the kernel.

use bytemuck::{Pod, Zeroable};

use super::{
    ANSWER_TTL, Outcome, Packet, Stop, Tables, TrafficEvent, Verdict, Walk, admission,
    cookie::{self, Announced},
    echo, flow,
    fragment::part,
    parse::Frame,
    quota,
    transport_checksum::{self, Change},
};
use crate::{
    abi::{
        flow::{Direction, FlowEntry, FlowId, TcpEvents},
        handshake::{Handshake, NO_SCALE, SynBudget, stage},
        reason::Reason,
        settings::Settings,
    },
    wire::{
        Be16, Be32, Field16, Field32, WireHeader,
        checksum::Delta,
        ipv4::Ipv4Header,
        ipv6::Ipv6Header,
        tcp::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, TcpHeader},
    },
};

/// The window scale that cookies announce: that of Linux for its default buffers (6 MB). A backend's own scale is not
/// known yet; its windows are brought to this one, which can say 8 MB.
const OUR_SCALE: u32 = 7;
/// What every IPv6 path carries (RFC 8200 §5), and nearly every one of IPv4: where no MTU is known.
const LEAST_MTU: u32 = 1280;
/// Words of options at most (RFC 9293 §3.1).
const OPTION_WORDS: usize = 10;
/// More options than fit, if every one has the smallest length: the bound of a loop.
const MOST_OPTIONS: u32 = 40;

/// RFC 9293 §3.1, RFC 7323 §2.2, RFC 2018 §2: kinds of options.
mod option {
    pub(super) const END: u8 = 0;
    pub(super) const NOTHING: u8 = 1;
    pub(super) const SEGMENT_SIZE: u8 = 2;
    pub(super) const WINDOW_SCALE: u8 = 3;
    pub(super) const SELECTIVE_PERMITTED: u8 = 4;
    pub(super) const SELECTIVE: u8 = 5;
}

/// Options with what pads them to whole words.
const SELECTIVE_PERMITTED: u32 = word(option::NOTHING, option::NOTHING, option::SELECTIVE_PERMITTED, 2);
const NO_OPTIONS: u32 = word(option::NOTHING, option::NOTHING, option::NOTHING, option::NOTHING);
/// How selective acknowledgments begin, without their length.
const SELECTIVE: u32 = word(option::NOTHING, option::NOTHING, option::SELECTIVE, 0);

#[inline(always)]
const fn word(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_be_bytes([a, b, c, d])
}

/// Room to work in, and what a stage leaves to the next.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Room {
    /// Options of a SYN; the length is a power of two, which bounds an index.
    options: [u8; 64],
    /// What that SYN announced, or what a cookie says that it did.
    pub announced: Announced,
    /// Sequence number of that SYN.
    pub client_first: u32,
    pub cookie: u32,
    /// What a packet becomes.
    becomes: Becomes,
}

/// A TCP header, and options.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
struct Becomes {
    sequence: u32,
    acknowledgment: u32,
    window: u32,
    flags: u32,
    /// In host byte order.
    options: [u32; 3],
    option_words: u32,
    /// One of zero behind the header, or none.
    payload_bytes: u32,
    reserved: u32,
}

/// May this be the packet that brings a cookie back? It may carry data, which the client then sends again.
#[inline(always)]
pub const fn may_have_cookie(frame: &Frame) -> bool {
    frame.fragment == part::WHOLE && frame.tcp_flags & (FLAG_SYN | FLAG_ACK | FLAG_RST | FLAG_FIN) == FLAG_ACK
}

/// Does the packet, which opens a flow, bring a cookie back? Nothing else that is no SYN is admitted.
#[inline(always)]
pub const fn is_opening(frame: &Frame) -> bool {
    frame.is_tcp() && !admission::is_opening(frame)
}

/// What [`admit`] says.
pub type Admitted = i64;
/// The packet may open a flow.
pub const ADMITTED: Admitted = -1;

/// [`admit`]'s answer as that of a stage.
///
/// # Errors
/// [`Reason::SYN_COOKIE_SENT`]: [`answer`] is to be called. Drops for what is neither SYN nor a cookie of ours.
#[inline(always)]
pub const fn outcome(admitted: Admitted) -> Result<(), Stop> {
    match admitted {
        ADMITTED => Ok(()),
        reason => Err(Stop::drop(Reason(reason as u32))),
    }
}

/// May this packet of TCP, whose listener sends cookies, open a flow? `ended`: one that it would take over, see
/// [`flow::Found::Ended`]; it is forgotten as a cookie is sent, or it would get the packet that brings that back.
#[inline(always)]
pub fn admit<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    ended: Option<FlowId>,
) -> Admitted {
    let now_secs = tables.now_secs();
    let listener = walk.listener.id;
    let limit = walk.listener.syns_per_cpu;
    let Some(budget) = tables.syn_budget(listener) else {
        return Admitted::from(Reason::INTERNAL.0);
    };
    if admission::is_opening(&walk.frame) {
        if has_room(budget, limit, now_secs) {
            return ADMITTED;
        }
        budget.cookie_secs = now_secs;
        if let Some(id) = ended {
            quota::leave_ended(tables, id);
            flow::forget(tables, id, walk);
        }
        return Admitted::from(Reason::SYN_COOKIE_SENT.0);
    }
    let has_sent_lately =
        budget.cookie_secs != 0 && now_secs.wrapping_sub(budget.cookie_secs) <= cookie::LIFETIME_SECS;
    let Ok(tcp) = packet.header::<TcpHeader>(walk.frame.transport_offset as usize) else {
        return Admitted::from(Reason::TRUNCATED.0);
    };
    let room = &mut walk.room;
    room.client_first = { tcp.sequence }.get().wrapping_sub(1);
    room.cookie = walk.frame.acknowledgment.get().wrapping_sub(1);
    let is_ours = cookie::read(
        settings.cookie_key,
        &walk.frame.key,
        room.client_first,
        room.cookie,
        now_secs,
        &mut room.announced,
    );
    if is_ours {
        tables.count_listener(listener, TrafficEvent::CookieAccepted);
        return ADMITTED;
    }
    if !has_sent_lately {
        return Admitted::from(Reason::NOT_A_SYN.0);
    }
    tables.count_listener(listener, TrafficEvent::CookieInvalid);
    Admitted::from(Reason::SYN_COOKIE_INVALID.0)
}

/// May one more SYN of this second open a flow?
#[inline(always)]
const fn has_room(budget: &mut SynBudget, limit: u32, now_secs: u32) -> bool {
    if budget.second != now_secs {
        budget.second = now_secs;
        budget.opened = 0;
    }
    if budget.opened >= limit {
        return false;
    }
    budget.opened += 1;
    true
}

/// Answers a SYN with a cookie: it becomes the SYN and ACK, and goes back.
#[inline(always)]
pub fn answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
) -> Outcome {
    let reason = Reason::SYN_COOKIE_SENT;
    match try_answer(packet, tables, settings, walk) {
        Ok(()) => {
            tables.count_listener(walk.listener.id, TrafficEvent::CookieSent);
            Outcome {
                verdict: Verdict::TRANSMIT,
                reason,
            }
        }
        Err(Stop(outcome)) => Stop::drop(outcome.reason).0,
    }
}

#[inline(always)]
fn try_answer<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    let now_secs = tables.now_secs();
    read_options(packet, walk).ok_or(Stop::drop(Reason::NOT_A_SYN))?;
    let Walk { frame, room, .. } = walk;
    let client_first = {
        packet
            .header::<TcpHeader>(frame.transport_offset as usize)?
            .sequence
    }
    .get();
    let cookie = cookie::make(
        settings.cookie_key,
        &frame.key,
        client_first,
        &room.announced,
        now_secs,
    );
    let becomes = &mut room.becomes;
    becomes.sequence = cookie;
    becomes.acknowledgment = client_first.wrapping_add(1);
    becomes.window = 0;
    becomes.flags = u32::from(FLAG_SYN | FLAG_ACK);
    becomes.payload_bytes = 0;
    let scale = if room.announced.scale < u32::from(NO_SCALE) {
        OUR_SCALE
    } else {
        u32::from(NO_SCALE)
    };
    becomes.announce(
        our_segment_size(settings, frame.is_v4()),
        room.announced.selective != 0,
        scale,
    );
    reshape(packet, settings, walk, true)?;
    let frame = &walk.frame;
    let tcp = packet.header::<TcpHeader>(frame.transport_offset as usize)?;
    // Swapped ports and addresses leave the sum as it is.
    (tcp.source_port, tcp.destination_port) = (tcp.destination_port, tcp.source_port);
    echo::turn(packet, frame, ANSWER_TTL)
}

/// The segment size that fits every way that a flow may take from here, in bytes.
#[inline(always)]
const fn our_segment_size(settings: &Settings, is_v4: bool) -> u32 {
    let mtu = match settings.least_mtu_bytes {
        0 => LEAST_MTU,
        known => known,
    };
    let ip = if is_v4 { Ipv4Header::LEN } else { Ipv6Header::LEN };
    let size = mtu.saturating_sub((ip + TcpHeader::LEN) as u32);
    if size > u16::MAX as u32 {
        u16::MAX as u32
    } else {
        size
    }
}

impl Becomes {
    /// The options of a SYN. The segment size is the first, where `mss` looks for it.
    #[inline(always)]
    const fn announce(&mut self, segment_size: u32, is_selective: bool, scale: u32) {
        self.options[0] = word(option::SEGMENT_SIZE, 4, 0, 0) | segment_size & 0xffff;
        self.options[1] = SELECTIVE_PERMITTED;
        self.options[2] = word(option::NOTHING, option::WINDOW_SCALE, 3, 0) | scale & 15;
        self.option_words = 3;
        if !is_selective {
            self.options[1] = self.options[2];
            self.option_words = 2;
        }
        if scale >= NO_SCALE as u32 {
            self.option_words -= 1;
        }
    }
}

/// Reads the options of a SYN, or of a SYN and ACK, into the walk's room; `None`: its header is not as long as it says.
#[inline(always)]
fn read_options<P: Packet>(packet: &mut P, walk: &mut Walk) -> Option<()> {
    let Walk { frame, room, .. } = walk;
    let offset = frame.transport_offset as usize;
    let header_len = packet.header::<TcpHeader>(offset).ok()?.header_len();
    if header_len < TcpHeader::LEN || header_len > frame.transport_len as usize {
        return None;
    }
    let len = header_len - TcpHeader::LEN;
    for index in 0..OPTION_WORDS {
        if index * 4 >= len {
            break;
        }
        let [a, b, c, d] = packet
            .header::<Field32>(offset + TcpHeader::LEN + index * 4)
            .ok()?
            .value
            .raw()
            .to_ne_bytes();
        room.options[index * 4] = a;
        room.options[index * 4 + 1] = b;
        room.options[index * 4 + 2] = c;
        room.options[index * 4 + 3] = d;
    }
    room.announced.segment_size = Announced::NOTHING.segment_size;
    room.announced.scale = Announced::NOTHING.scale;
    room.announced.selective = Announced::NOTHING.selective;
    room.announced.reserved = 0;
    let mut place = 0;
    for _ in 0..MOST_OPTIONS {
        place = packet.next_option(walk, place, len as u32);
        if place >= len as u32 {
            break;
        }
    }
    Some(())
}

/// Takes the option at `place` into account, of `len` bytes in all; where the next one is, or a number that is no less
/// than `len`.
#[inline(always)]
pub fn next_option(room: &mut Room, place: u32, len: u32) -> u32 {
    let at = |offset: u32| room.options[(place + offset) as usize & 63];
    let (kind, size) = (at(0), u32::from(at(1)));
    if kind == option::END {
        return len;
    }
    if kind == option::NOTHING {
        return place + 1;
    }
    if size < 2 || place + size > len {
        return len;
    }
    if kind == option::SEGMENT_SIZE && size == 4 {
        room.announced.segment_size = u32::from(at(2)) << 8 | u32::from(at(3));
    } else if kind == option::WINDOW_SCALE && size == 3 {
        // RFC 7323 §2.3: what is more than 14 counts as that.
        room.announced.scale = u32::from(at(2)).min(14);
    } else if kind == option::SELECTIVE_PERMITTED && size == 2 {
        room.announced.selective = 1;
    }
    place + size
}

/// Keeps what the handshake of a new flow needs, before anybody can find the flow.
#[inline(always)]
pub fn keep<T: Tables>(tables: &mut T, walk: &Walk, id: FlowId) {
    let room = &walk.room;
    let Some(kept) = tables.handshake(id) else { return };
    kept.client_first = room.client_first;
    kept.cookie = room.cookie;
    kept.difference = 0;
    kept.segment_size = room.announced.segment_size as u16;
    kept.scales = room.announced.scale as u8 | NO_SCALE << 4;
    kept.stage = if room.announced.selective != 0 {
        stage::SELECTIVE
    } else {
        0
    };
}

/// Changes a packet of a flow that a cookie opened into one of the connection on the other side, in everything but
/// addresses and ports.
///
/// # Errors
/// [`Reason::HANDSHAKE_PENDING`] for what cannot be sent on before the backend has answered.
#[inline(always)]
pub fn pass<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
) -> Result<(), Stop> {
    // It has no header to change.
    if walk.frame.fragment == part::LATER {
        return Ok(());
    }
    let broken = Stop::drop(Reason::INTERNAL);
    let kept = tables.handshake(walk.hit.id).ok_or(broken)?;
    let known = Handshake {
        client_first: kept.client_first,
        cookie: kept.cookie,
        difference: kept.difference,
        segment_size: kept.segment_size,
        scales: kept.scales,
        stage: kept.stage,
    };
    let is_answered = known.stage & stage::ANSWERED != 0;
    if walk.hit.direction == Direction::REQUEST {
        if is_answered {
            return request(packet, settings, walk, &known);
        }
        return open(packet, settings, walk, &known);
    }
    let flags = walk.frame.tcp_flags;
    if flags & (FLAG_SYN | FLAG_ACK | FLAG_RST) == FLAG_SYN | FLAG_ACK {
        return connect(packet, tables, settings, walk, &known);
    }
    if is_answered {
        return reply(packet, settings, walk, &known);
    }
    if flags & FLAG_RST != 0 && walk.frame.fragment == part::WHOLE {
        let becomes = &mut walk.room.becomes;
        // The client takes a reset with the number that it expects only (RFC 5961 §3.2).
        becomes.sequence = known.cookie.wrapping_add(1);
        becomes.acknowledgment = known.client_first.wrapping_add(1);
        becomes.window = 0;
        becomes.flags = u32::from(FLAG_RST | FLAG_ACK);
        becomes.option_words = 0;
        becomes.payload_bytes = 0;
        return reshape(packet, settings, walk, false);
    }
    Err(Stop::drop(Reason::HANDSHAKE_PENDING))
}

/// The client's acknowledgment becomes its SYN.
#[inline(always)]
fn open<P: Packet>(
    packet: &mut P,
    settings: &Settings,
    walk: &mut Walk,
    known: &Handshake,
) -> Result<(), Stop> {
    let tcp = packet.header::<TcpHeader>(walk.frame.transport_offset as usize)?;
    let window = { tcp.window }.get();
    let distance = { tcp.sequence }.get().wrapping_sub(known.client_first);
    // A client that has something to say asks whether the window is open with the number before (RFC 9293 §3.8.6.1).
    if !may_have_cookie(&walk.frame)
        || distance > 1
        || walk.frame.acknowledgment.get() != known.cookie.wrapping_add(1)
    {
        return Err(Stop::drop(Reason::HANDSHAKE_PENDING));
    }
    let scale = u32::from(known.scales & 15);
    let becomes = &mut walk.room.becomes;
    becomes.sequence = known.client_first;
    becomes.acknowledgment = 0;
    // RFC 7323 §2.2: that of a SYN is never scaled.
    becomes.window = unscaled(window, scale);
    becomes.flags = u32::from(FLAG_SYN);
    becomes.payload_bytes = 0;
    becomes.announce(
        u32::from(known.segment_size),
        known.stage & stage::SELECTIVE != 0,
        scale,
    );
    reshape(packet, settings, walk, false)
}

/// The backend's SYN and ACK becomes a probe, or an update of the client's window.
#[inline(always)]
fn connect<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    settings: &Settings,
    walk: &mut Walk,
    known: &Handshake,
) -> Result<(), Stop> {
    let next = known.client_first.wrapping_add(1);
    if walk.frame.fragment != part::WHOLE || walk.frame.acknowledgment.get() != next {
        return Err(Stop::drop(Reason::HANDSHAKE_PENDING));
    }
    read_options(packet, walk).ok_or(Stop::drop(Reason::HANDSHAKE_PENDING))?;
    let tcp = packet.header::<TcpHeader>(walk.frame.transport_offset as usize)?;
    let (first, window) = ({ tcp.sequence }.get(), { tcp.window }.get());
    // A packet without any option has no room for the byte.
    let is_probe = known.stage & stage::PROBED == 0 && walk.frame.transport_len > TcpHeader::LEN as u32;
    let kept = tables
        .handshake(walk.hit.id)
        .ok_or(Stop::drop(Reason::INTERNAL))?;
    kept.difference = first.wrapping_sub(known.cookie);
    kept.scales = known.scales & 15 | (walk.room.announced.scale as u8) << 4;
    // Last: who sees this may use the others.
    kept.stage = (known.stage & !stage::PROBED) | stage::ANSWERED | if is_probe { stage::PROBED } else { 0 };
    let becomes = &mut walk.room.becomes;
    becomes.sequence = known.cookie.wrapping_add(u32::from(!is_probe));
    becomes.acknowledgment = next;
    becomes.window = scaled(u32::from(window), known.scales & 15 != NO_SCALE);
    becomes.flags = u32::from(FLAG_ACK);
    becomes.option_words = 0;
    becomes.payload_bytes = u32::from(is_probe);
    reshape(packet, settings, walk, false)
}

/// A window in bytes as the field of a client that was told [`OUR_SCALE`], if it takes scales.
#[inline(always)]
const fn scaled(bytes: u32, is_scaled: bool) -> u32 {
    let field = if is_scaled { bytes >> OUR_SCALE } else { bytes };
    if field > 0xffff { 0xffff } else { field }
}

/// The field of a window of this scale as bytes, as far as an unscaled field can say.
#[inline(always)]
fn unscaled(field: u16, scale: u32) -> u32 {
    bytes(field, scale).min(0xffff)
}

/// A window in bytes.
#[inline(always)]
const fn bytes(field: u16, scale: u32) -> u32 {
    if scale >= NO_SCALE as u32 {
        field as u32
    } else {
        (field as u32) << scale
    }
}

/// A packet of the client, once the backend has answered.
#[inline(always)]
fn request<P: Packet>(
    packet: &mut P,
    settings: &Settings,
    walk: &Walk,
    known: &Handshake,
) -> Result<(), Stop> {
    let frame = &walk.frame;
    let state = transport_checksum::state(packet, frame, settings)?;
    let offset = frame.transport_offset as usize;
    let tcp = packet.header::<TcpHeader>(offset)?;
    let header_len = tcp.header_len();
    // Without the flag it has no meaning.
    let has_acknowledgment = tcp.flags & FLAG_ACK != 0;
    let is_opening = tcp.flags & FLAG_SYN != 0;
    let (old_acknowledgment, old_window) = (tcp.acknowledgment, tcp.window);
    if has_acknowledgment {
        tcp.acknowledgment = raised(old_acknowledgment, known.difference);
    }
    let scale = u32::from(known.scales & 15);
    if known.scales >> 4 == NO_SCALE && !is_opening {
        // The backend takes no scales, so it reads windows as they stand.
        tcp.window = Be16::new(unscaled(old_window.get(), scale) as u16);
    }
    let mut words = Delta::ZERO
        .replace32(old_acknowledgment, tcp.acknowledgment)
        .replace16(old_window, tcp.window);
    // Words of blocks that are to come.
    let mut blocks = 0;
    for index in 0..OPTION_WORDS {
        let place = TcpHeader::LEN + index * 4;
        if is_opening || place >= header_len || place >= frame.transport_len as usize {
            break;
        }
        let field = packet.header::<Field32>(offset + place)?;
        let old = field.value;
        if blocks != 0 {
            blocks -= 1;
            field.value = raised(old, known.difference);
        } else if old.get() & !0xff == SELECTIVE {
            blocks = (old.get() & 0xff) / 4;
        } else {
            // None was agreed on, and blocks that stand anywhere else would be the other side's numbers.
            field.value = Be32::new(NO_OPTIONS);
        }
        words = Delta::from_folded(words.replace32(old, field.value).folded());
    }
    let change = Change {
        addresses: Delta::ZERO,
        words,
    };
    transport_checksum::update(packet, frame, change, state, false)
}

#[inline(always)]
const fn raised(number: Be32, by: u32) -> Be32 {
    Be32::new(number.get().wrapping_add(by))
}

/// A packet of the backend, once it has answered.
#[inline(always)]
fn reply<P: Packet>(packet: &mut P, settings: &Settings, walk: &Walk, known: &Handshake) -> Result<(), Stop> {
    let frame = &walk.frame;
    let state = transport_checksum::state(packet, frame, settings)?;
    let tcp = packet.header::<TcpHeader>(frame.transport_offset as usize)?;
    let (old_sequence, old_window) = (tcp.sequence, tcp.window);
    tcp.sequence = raised(old_sequence, 0u32.wrapping_sub(known.difference));
    let bytes = bytes(old_window.get(), u32::from(known.scales >> 4));
    tcp.window = Be16::new(scaled(bytes, known.scales & 15 != NO_SCALE) as u16);
    let change = Change {
        addresses: Delta::ZERO,
        words: Delta::ZERO
            .replace32(old_sequence, tcp.sequence)
            .replace16(old_window, tcp.window),
    };
    transport_checksum::update(packet, frame, change, state, false)
}

/// By how much the sequence number of a reply, which an ICMP error quotes as the client's side has seen it, is less than
/// that of the backend, which takes the error for a forgery else (RFC 5927 §4.1).
#[inline(always)]
pub fn difference<T: Tables>(tables: &mut T, id: FlowId) -> u32 {
    match tables.handshake(id) {
        Some(kept) if kept.stage & stage::ANSWERED != 0 => kept.difference,
        _ => 0,
    }
}

/// Gives the packet the header and options of the walk's room, and no payload; the walk's frame then says so.
/// `is_sent`: the frame leaves straight from the program.
#[inline(always)]
fn reshape<P: Packet>(
    packet: &mut P,
    settings: &Settings,
    walk: &mut Walk,
    is_sent: bool,
) -> Result<(), Stop> {
    let Walk { frame, room, .. } = walk;
    let becomes = &room.becomes;
    let state = transport_checksum::state(packet, frame, settings)?;
    let (offset, old_len) = (frame.transport_offset as usize, frame.transport_len);
    let rest = old_len - TcpHeader::LEN as u32;
    let old_rest = if rest == 0 {
        0
    } else {
        packet.sum(offset + TcpHeader::LEN, rest as usize)?
    };
    let header_len = TcpHeader::LEN as u32 + becomes.option_words * 4;
    let len = header_len + becomes.payload_bytes;
    packet.resize(offset + TcpHeader::LEN, offset + len as usize)?;

    let tcp = packet.header::<TcpHeader>(offset)?;
    let (sequence, acknowledgment) = (tcp.sequence, tcp.acknowledgment);
    let (flags, window, urgent) = (tcp.flags_word(), tcp.window, tcp.urgent);
    tcp.sequence = Be32::new(becomes.sequence);
    tcp.acknowledgment = Be32::new(becomes.acknowledgment);
    tcp.data_offset = (header_len << 2) as u8;
    tcp.flags = becomes.flags as u8;
    tcp.window = Be16::new(becomes.window as u16);
    tcp.urgent = Be16::ZERO;
    let mut words = Delta::ZERO
        .replace32(sequence, tcp.sequence)
        .replace32(acknowledgment, tcp.acknowledgment)
        .replace_raw(flags, tcp.flags_word())
        .replace16(window, tcp.window)
        .replace16(urgent, tcp.urgent)
        .replace_raw(old_rest as u16, 0);
    words = Delta::from_folded(words.folded());
    for index in 0..becomes.options.len() {
        if index as u32 >= becomes.option_words {
            break;
        }
        let value = Be32::new(becomes.options[index]);
        packet
            .header::<Field32>(offset + TcpHeader::LEN + index * 4)?
            .value = value;
        words = words.replace32(Be32::new(0), value);
    }
    if becomes.payload_bytes != 0 {
        // With the last byte of the header, which is zero as well: the verifier refuses to write one alone.
        packet.header::<Field16>(offset + header_len as usize - 1)?.value = Be16::ZERO;
    }

    let (before, after) = (Be16::new(old_len as u16), Be16::new(len as u16));
    let network_offset = frame.network_offset as usize;
    if frame.is_v4() {
        let ip = packet.header::<Ipv4Header>(network_offset)?;
        let old = ip.total_len;
        ip.total_len = Be16::new((frame.total_len - old_len + len) as u16);
        ip.checksum = Delta::ZERO.replace16(old, ip.total_len).apply(ip.checksum);
    } else {
        let ip = packet.header::<Ipv6Header>(network_offset)?;
        ip.payload_len = Be16::new({ ip.payload_len }.get() - old_len as u16 + len as u16);
    }
    let change = Change {
        addresses: Delta::ZERO.replace16(before, after),
        words,
    };
    transport_checksum::update(packet, frame, change, state, is_sent)?;
    frame.total_len = frame.total_len - old_len + len;
    frame.transport_len = len;
    frame.tcp_flags = becomes.flags as u8;
    Ok(())
}

/// Is the flow one that a cookie opened?
#[inline(always)]
pub const fn is_of(entry: &FlowEntry) -> bool {
    entry.tcp.has(TcpEvents::BY_COOKIE)
}
