//! What operators have ordered for single backends, beside the configuration: to drain one, or another weight.
//!
//! Orders are in the records beside the tables ([`NameRecord`]), so the next agent finds them there. They belong to the
//! name, and end when the backend leaves the configuration.

use std::collections::BTreeMap;

use forwarder_common::abi::backend::BackendId;

use super::ids::{Ids, NameKey, NameKind, NameRecord, override_flag};

/// Orders for one backend; the default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Override {
    /// It takes no new flows.
    pub is_drained: bool,
    /// When the flows that are left then are ended: seconds of CLOCK_MONOTONIC. `None`: they may go on.
    pub drain_until_secs: Option<u32>,
    /// In place of the one in the configuration; 0: no new flows.
    pub weight: Option<u16>,
}

impl Override {
    /// Is there no order?
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Writes the orders into a backend's record.
    pub(super) fn write_to(self, record: &mut NameRecord) {
        record.override_flags = 0;
        for (flag, is_set) in [
            (override_flag::DRAINED, self.is_drained),
            (override_flag::UNTIL, self.drain_until_secs.is_some()),
            (override_flag::WEIGHT, self.weight.is_some()),
        ] {
            if is_set {
                record.override_flags |= flag;
            }
        }
        record.drain_until_secs = self.drain_until_secs.unwrap_or(0);
        record.weight = u32::from(self.weight.unwrap_or(0));
    }

    fn read_from(record: &NameRecord) -> Self {
        let has = |flag| record.override_flags & flag != 0;
        Self {
            is_drained: has(override_flag::DRAINED),
            drain_until_secs: has(override_flag::UNTIL).then_some(record.drain_until_secs),
            // What does not fit was not written by an agent.
            weight: u16::try_from(record.weight)
                .ok()
                .filter(|_| has(override_flag::WEIGHT)),
        }
    }
}

/// Orders by group and backend name; no entry: none.
pub type Overrides = BTreeMap<(String, String), Override>;

/// The orders in the records of an earlier agent.
pub fn restore(records: &BTreeMap<NameKey, NameRecord>) -> BTreeMap<BackendId, Override> {
    let backends = records.iter().filter(|(key, _)| key.kind == NameKind::BACKEND);
    backends
        .map(|(key, record)| (BackendId(key.id), Override::read_from(record)))
        .filter(|(_, orders)| !orders.is_none())
        .collect()
}

/// The same orders by name, of backends in the configuration.
pub fn named(orders: &BTreeMap<BackendId, Override>, ids: &Ids) -> Overrides {
    let backends = ids.backends.iter();
    backends
        .filter_map(|(name, id)| Some((name.clone(), *orders.get(id)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_keeps_orders(is_drained: bool, drain_until_secs: Option<u32>, weight: Option<u16>) {
            let orders = Override { is_drained, drain_until_secs, weight };
            let mut record = NameRecord::new("group", "backend");
            orders.write_to(&mut record);
            prop_assert_eq!(Override::read_from(&record), orders);
        }
    }
}
