//! The SNAT pool: which (address, port) belongs to which flow.
//!
//! *Binding by index*: the (address, port) pairs of the pool are numbered, and the flow with number n holds
//! pair n, whatever its backend. So a free pair is a free flow entry: no probing, no collision, and the last
//! pair can be used. The price: one pair serves one flow instead of one per backend; addresses out of
//! 100.64.0.0/10 are plentiful.
//!
//! Numbers run through the ports of the first address, then those of the second: addresses added at the end
//! leave existing numbers alone.

use bytemuck::{Pod, Zeroable};

use super::flow::FlowId;
use crate::wire::{Be16, Ipv4Address};

/// Ports below are left to services (RFC 6056 §3.2 starts at 1024 as well).
pub const FIRST_PORT: u16 = 1024;
/// Ports 1024 to 65535.
pub const PORTS_PER_ADDRESS: u32 = 65536 - FIRST_PORT as u32;
/// Most runs of addresses a pool consists of: the data path looks at them one by one.
pub const MAX_RANGES: usize = 8;

/// A run of consecutive addresses.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SnatRange {
    /// `Ipv4Address::number` of the first address.
    pub first: u32,
    /// Number of addresses; zero: unused, as are all after it.
    pub count: u32,
}

/// The pool as a list of runs.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SnatPool {
    pub ranges: [SnatRange; MAX_RANGES],
}

/// One (address, port) of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnatBinding {
    pub address: Ipv4Address,
    pub port: Be16,
}

impl SnatPool {
    /// The pair that the flow `id` holds; `None` when the pool is smaller than that.
    #[inline(always)]
    pub fn binding(&self, id: FlowId) -> Option<SnatBinding> {
        let mut address_index = id.0 / PORTS_PER_ADDRESS;
        let port = FIRST_PORT + (id.0 % PORTS_PER_ADDRESS) as u16;
        for range in &self.ranges {
            if address_index < range.count {
                let address = Ipv4Address::from_number(range.first.wrapping_add(address_index));
                return Some(SnatBinding {
                    address,
                    port: Be16::new(port),
                });
            }
            address_index -= range.count;
        }
        None
    }

    /// Is this an address of the pool?
    #[inline(always)]
    pub fn contains(&self, address: Ipv4Address) -> bool {
        self.address_index(address).is_some()
    }

    /// The flow that holds this pair: `None` when the address is not of the pool, `Some(None)` when it is but
    /// no flow can hold this port.
    #[inline(always)]
    pub fn flow(&self, binding: SnatBinding) -> Option<Option<FlowId>> {
        let address_index = self.address_index(binding.address)?;
        let port = binding.port.get();
        if port < FIRST_PORT {
            return Some(None);
        }
        Some(Some(FlowId(
            address_index * PORTS_PER_ADDRESS + u32::from(port - FIRST_PORT),
        )))
    }

    #[inline(always)]
    fn address_index(&self, address: Ipv4Address) -> Option<u32> {
        let number = address.number();
        let mut before = 0;
        for range in &self.ranges {
            if range.count == 0 {
                return None;
            }
            let offset = number.wrapping_sub(range.first);
            if offset < range.count {
                return Some(before + offset);
            }
            before += range.count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool() -> SnatPool {
        let mut pool = SnatPool::default();
        pool.ranges[0] = SnatRange {
            first: Ipv4Address::new([100, 64, 0, 2]).number(),
            count: 61,
        };
        pool.ranges[1] = SnatRange {
            first: Ipv4Address::new([100, 64, 8, 0]).number(),
            count: 3,
        };
        pool
    }

    #[test]
    fn the_first_number_is_the_first_address_and_port() {
        let first = SnatBinding {
            address: Ipv4Address::new([100, 64, 0, 2]),
            port: Be16::new(1024),
        };
        assert_eq!(pool().binding(FlowId(0)), Some(first));
    }

    #[test]
    fn addresses_beside_the_runs_are_not_of_the_pool() {
        for octets in [[100, 64, 0, 1], [100, 64, 0, 63], [100, 64, 8, 3], [0, 0, 0, 0]] {
            assert!(!pool().contains(Ipv4Address::new(octets)), "{octets:?}");
        }
    }

    #[test]
    fn a_reserved_port_of_the_pool_is_ours_but_nobody_s() {
        let binding = SnatBinding {
            address: Ipv4Address::new([100, 64, 8, 1]),
            port: Be16::new(1023),
        };
        assert_eq!(pool().flow(binding), Some(None));
    }

    proptest! {
        #[test]
        fn every_number_has_one_pair_and_every_pair_one_number(id in 0u32..70 * PORTS_PER_ADDRESS) {
            match pool().binding(FlowId(id)) {
                Some(binding) => prop_assert_eq!(pool().flow(binding), Some(Some(FlowId(id)))),
                None => prop_assert!(id >= 64 * PORTS_PER_ADDRESS),
            }
        }
    }
}
