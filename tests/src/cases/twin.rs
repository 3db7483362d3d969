//! What is true of a packet is true of its twin: the same case in generic XDP, and in IPv6.
//!
//! So a rule that holds for one family and not for the other shows without anybody having thought of it.

use std::{collections::HashMap, hash::Hash};

use forwarder_common::{
    abi::{flow::FlowState, settings::flag},
    wire::IpAddress,
};

use super::{Case, Event};
use crate::{
    packet,
    tables::{MemoryTables, Program, V6_PREFIX},
};

impl Case {
    /// The case and its twins.
    pub fn with_twins(self) -> Vec<Self> {
        let v6 = self.in_ipv6();
        let generic = self.in_generic_mode();
        [Some(self), generic, v6].into_iter().flatten().collect()
    }

    /// The same case with generic XDP instead of native; `None` where the two differ, which is in partial
    /// checksums and in tunnels, or where that would show nothing.
    fn in_generic_mode(&self) -> Option<Self> {
        if self.library_only.is_some()
            || self.world.settings.flags & (flag::PARTIAL_CHECKSUMS | flag::TUNNELS) != 0
        {
            return None;
        }
        let mut case = self.clone();
        case.sentence += " (generic XDP)";
        let mut is_native = false;
        for event in &mut case.events {
            if let Event::Packet(step) = event
                && step.program == Program::Native
            {
                step.program = Program::Generic;
                is_native = true;
            }
        }
        is_native.then_some(case)
    }

    /// A case whose packets are of IPv6 already, in a world that is, too.
    pub(super) fn in_ipv6_world(self) -> Self {
        Self {
            world: in_ipv6(&self.world),
            is_v4_only: true,
            ..self
        }
    }

    /// The same case in IPv6; `None` where a packet has no twin, or where the family matters: the hash of a flow, and
    /// what partial checksums and segment sizes are.
    fn in_ipv6(&self) -> Option<Self> {
        if self.is_v4_only {
            return None;
        }
        let mut case = self.clone();
        case.sentence += " (IPv6)";
        case.world = in_ipv6(&self.world);
        for event in &mut case.events {
            match event {
                Event::Packet(step) => {
                    step.frame = packet::in_ipv6(&step.frame, V6_PREFIX)?;
                    step.out = packet::in_ipv6(&step.out, V6_PREFIX)?;
                }
                Event::Change(_) => return None,
            }
        }
        Some(case)
    }
}

/// An IPv4 address behind the prefix of its twin.
fn twin(address: IpAddress) -> IpAddress {
    let mut octets = address.octets();
    octets[..12].copy_from_slice(&V6_PREFIX);
    IpAddress::new(octets)
}

/// Tables that say the same of IPv6.
pub(super) fn in_ipv6(tables: &MemoryTables) -> MemoryTables {
    let mut tables = tables.clone();
    rename(&mut tables.vips, |key| key.address = twin(key.address));
    rename(&mut tables.listeners, |key| key.vip = twin(key.vip));
    rename(&mut tables.listener_ranges, |key| key.vip = twin(key.vip));
    rename(&mut tables.sources, |key| key.address = twin(key.address));
    for backend in &mut tables.backends {
        backend.address = twin(backend.address);
    }
    tables.note_addresses();
    for group in &mut tables.groups {
        group.persistence_bits_v6 = IpAddress::V4_PREFIX_BITS + group.persistence_bits_v4;
    }
    rename(&mut tables.persistence, |key| key.client = twin(key.client));
    for kept in tables.persistence.values_mut() {
        kept.address = twin(kept.address);
    }
    let pool = &mut tables.settings.pool;
    pool.v6 = std::mem::take(&mut pool.v4);
    for run in &mut pool.v6.runs {
        run.first = twin(run.first);
    }
    rename(&mut tables.flow_index, |key| {
        (key.source, key.destination) = (twin(key.source), twin(key.destination));
    });
    assert!(tables.flows.iter().all(|flow| flow.state == FlowState::FREE));
    tables
}

fn rename<K: Eq + Hash, V>(map: &mut HashMap<K, V>, change: impl Fn(&mut K)) {
    *map = map
        .drain()
        .map(|(mut key, value)| {
            change(&mut key);
            (key, value)
        })
        .collect();
}
