//! Counters as numbers: the copies of all CPUs, added up.

use aya::maps::{MapData, MapError, PerCpuArray};
use forwarder_common::abi::{
    backend::{BackendId, GroupId},
    counter::{ReasonCounters, TrafficCounters},
    listener::ListenerId,
    reason::Reason,
};

use super::{maps::CounterMaps, object::kernel_error, pod::AsPod};
use crate::error::Error;

impl CounterMaps {
    /// Sum over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses, which no state of the table explains.
    pub fn listener(&self, id: ListenerId) -> Result<TrafficCounters, Error> {
        traffic(&self.listeners, id.0)
    }

    /// Sum over all CPUs.
    ///
    /// # Errors
    /// As for [`Self::listener`].
    pub fn backend(&self, id: BackendId) -> Result<TrafficCounters, Error> {
        traffic(&self.backends, id.0)
    }

    /// What backends of this group have counted that left it, and whose number is free again.
    ///
    /// # Errors
    /// As for [`Self::listener`].
    pub fn past(&self, id: GroupId) -> Result<TrafficCounters, Error> {
        match self.past.get(&AsPod(id), 0) {
            Ok(AsPod(past)) => Ok(past),
            Err(MapError::KeyNotFound) => Ok(TrafficCounters::default()),
            Err(error) => Err(kernel_error("read a counter", &error)),
        }
    }

    /// Sum over all CPUs.
    ///
    /// # Errors
    /// As for [`Self::listener`].
    pub fn reason(&self, reason: Reason) -> Result<ReasonCounters, Error> {
        let mut sum = ReasonCounters::default();
        for AsPod(one) in per_cpu(&self.reasons, reason.0)? {
            sum.packets += one.packets;
            sum.bytes += one.bytes;
        }
        Ok(sum)
    }
}

fn per_cpu<T: bytemuck::Pod>(
    map: &PerCpuArray<MapData, AsPod<T>>,
    index: u32,
) -> Result<Vec<AsPod<T>>, Error> {
    match map.get(&index, 0) {
        Ok(values) => Ok(values.to_vec()),
        Err(error) => Err(kernel_error("read a counter", &error)),
    }
}

pub(super) fn traffic(
    map: &PerCpuArray<MapData, AsPod<TrafficCounters>>,
    index: u32,
) -> Result<TrafficCounters, Error> {
    let mut sum = TrafficCounters::default();
    for AsPod(one) in per_cpu(map, index)? {
        add(&mut sum, &one);
    }
    Ok(sum)
}

/// Adds what another counts.
pub(super) fn add(sum: &mut TrafficCounters, one: &TrafficCounters) {
    sum.flows_opened += one.flows_opened;
    sum.request_packets += one.request_packets;
    sum.request_bytes += one.request_bytes;
    sum.reply_packets += one.reply_packets;
    sum.reply_bytes += one.reply_bytes;
    sum.client_resets += one.client_resets;
    sum.backend_resets += one.backend_resets;
    sum.flows_refused += one.flows_refused;
    sum.gateway_resets += one.gateway_resets;
    sum.flows_answered += one.flows_answered;
    sum.flows_rejected += one.flows_rejected;
    sum.cookies_sent += one.cookies_sent;
    sum.cookies_accepted += one.cookies_accepted;
    sum.cookies_invalid += one.cookies_invalid;
    sum.flows_limited += one.flows_limited;
}
