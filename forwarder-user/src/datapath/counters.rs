//! Counters as numbers: the copies of all CPUs, added up.

use aya::{
    maps::{MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use forwarder_common::abi::{
    backend::{BackendId, GroupId},
    counter::{CarriedCounters, EventCounters, ReasonCounters, TrafficCounters},
    listener::ListenerId,
    reason::Reason,
};

use super::{
    maps::CounterMaps,
    memory::CarriedMemory,
    object::{kernel_error, possible_cpus},
    pod::AsPod,
};
use crate::error::Error;

impl CounterMaps {
    /// Sum over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses, which no state of the table explains.
    pub fn listener(&self, id: ListenerId) -> Result<TrafficCounters, Error> {
        self.listeners.sum(id.0)
    }

    /// Sum over all CPUs.
    ///
    /// # Errors
    /// As for [`Self::listener`].
    pub fn backend(&self, id: BackendId) -> Result<TrafficCounters, Error> {
        self.backends.sum(id.0)
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

/// What is counted per listener, or per backend.
pub struct TrafficMaps {
    carried: CarriedMemory,
    pub events: PerCpuArray<MapData, AsPod<EventCounters>>,
}

impl TrafficMaps {
    /// `carried`: of the same `ids` as `events`.
    ///
    /// # Errors
    /// When the kernel refuses to map it into memory.
    pub fn open(
        carried: MapData,
        events: PerCpuArray<MapData, AsPod<EventCounters>>,
        ids: u32,
        name: &str,
    ) -> Result<Self, Error> {
        Ok(Self {
            carried: CarriedMemory::map(carried, ids, possible_cpus()?, name)?,
            events,
        })
    }

    /// Sum over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses, which no state of the table explains.
    pub fn sum(&self, id: u32) -> Result<TrafficCounters, Error> {
        let mut sum = TrafficCounters::new(self.carried.sum(id), EventCounters::default());
        for AsPod(one) in per_cpu(&self.events, id)? {
            sum.add_all(&TrafficCounters::new(CarriedCounters::default(), one));
        }
        Ok(sum)
    }

    /// Takes all back to zero.
    ///
    /// # Errors
    /// The kernel's, for the events; then nothing has changed.
    pub fn clear(&mut self, id: u32) -> Result<(), MapError> {
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        let zeros = PerCpuValues::try_from(vec![AsPod(EventCounters::default()); cpus])?;
        self.events.set(id, zeros, 0)?;
        self.carried.clear(id);
        Ok(())
    }
}
