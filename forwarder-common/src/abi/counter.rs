//! Counters, one copy per CPU; the agent adds them up.

use bytemuck::{Pod, Zeroable};

/// What is counted per listener and per backend: [`CarriedCounters`] and [`EventCounters`], in this order. Bytes are IP
/// bytes: header and payload, no link header.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct TrafficCounters {
    pub request_packets: u64,
    pub request_bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
    pub flows_opened: u64,
    /// TCP resets that came from clients.
    pub client_resets: u64,
    /// TCP resets that came from backends.
    pub backend_resets: u64,
    /// New flows refused by the gateway: no backend, no binding, no room.
    pub flows_refused: u64,
    /// Answers of the gateway to refused flows: TCP resets and ICMP messages.
    pub gateway_resets: u64,
    /// Flows that their backend answered: TCP with SYN and ACK, UDP with anything.
    pub flows_answered: u64,
    /// Flows that their backend rejected: it answered with a TCP reset. Those that are opened and neither answered nor
    /// rejected have had no answer.
    pub flows_rejected: u64,
    /// SYNs that were answered with a cookie. Of listeners only, as what follows.
    pub cookies_sent: u64,
    /// Flows that were opened by a cookie that came back.
    pub cookies_accepted: u64,
    /// Acknowledgments without a flow, and without a cookie of ours, while cookies were sent.
    pub cookies_invalid: u64,
    /// New flows that came too fast from one prefix of clients.
    pub flows_limited: u64,
}

/// What every packet is counted in: as short as can be, so that those of many backends stay in a CPU's cache.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct CarriedCounters {
    pub request_packets: u64,
    pub request_bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
}

/// What few packets are counted in; see [`TrafficCounters`].
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct EventCounters {
    pub flows_opened: u64,
    pub client_resets: u64,
    pub backend_resets: u64,
    pub flows_refused: u64,
    pub gateway_resets: u64,
    pub flows_answered: u64,
    pub flows_rejected: u64,
    pub cookies_sent: u64,
    pub cookies_accepted: u64,
    pub cookies_invalid: u64,
    pub flows_limited: u64,
}

/// Numbers of each.
const CARRIED: usize = size_of::<CarriedCounters>() / 8;
const EVENTS: usize = size_of::<EventCounters>() / 8;

impl TrafficCounters {
    /// Of both parts.
    pub fn new(carried: CarriedCounters, events: EventCounters) -> Self {
        let mut words = [0; CARRIED + EVENTS];
        words[..CARRIED].copy_from_slice(&bytemuck::cast::<_, [u64; CARRIED]>(carried));
        words[CARRIED..].copy_from_slice(&bytemuck::cast::<_, [u64; EVENTS]>(events));
        bytemuck::cast(words)
    }

    /// Both parts.
    pub fn parts(&mut self) -> (&mut CarriedCounters, &mut EventCounters) {
        let words: &mut [u64; CARRIED + EVENTS] = bytemuck::cast_mut(self);
        let (carried, events) = words.split_at_mut(CARRIED);
        (
            bytemuck::from_bytes_mut(bytemuck::cast_slice_mut(carried)),
            bytemuck::from_bytes_mut(bytemuck::cast_slice_mut(events)),
        )
    }

    /// Adds what another counts; wraps around after centuries.
    pub fn add_all(&mut self, other: &Self) {
        let words: &mut [u64; CARRIED + EVENTS] = bytemuck::cast_mut(self);
        let others: &[u64; CARRIED + EVENTS] = bytemuck::cast_ref(other);
        for (word, other) in words.iter_mut().zip(others) {
            *word = word.wrapping_add(*other);
        }
    }
}

/// ICMP messages of our own in the current second, per CPU.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct IcmpBudget {
    /// CLOCK_MONOTONIC.
    pub second: u32,
    pub sent: u32,
}

/// What is counted per reason.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct ReasonCounters {
    pub packets: u64,
    /// Frame bytes, with the link header where there is one.
    pub bytes: u64,
}
