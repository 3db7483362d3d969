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
use crate::wire::{Be16, IpAddress, Ipv4Address};

/// Ports below are left to services (RFC 6056 §3.2 starts at 1024 as well).
pub const FIRST_PORT: u16 = 1024;
/// Ports 1024 to 65535.
pub const PORTS_PER_ADDRESS: u32 = 65536 - FIRST_PORT as u32;
/// Most runs of addresses a family has in the pool: the data path looks at them one by one.
pub const MAX_RANGES: usize = 8;

/// A run of consecutive addresses.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SnatRange {
    pub first: IpAddress,
    /// Number of addresses, which differ in the last four octets only; zero: unused, as are all after it.
    pub count: u32,
}

/// The pool as a list of runs for each family.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SnatPool {
    pub v4: SnatRanges,
    pub v6: SnatRanges,
}

/// The pool's addresses of one family.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct SnatRanges {
    pub runs: [SnatRange; MAX_RANGES],
}

/// One (address, port) of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnatBinding {
    pub address: IpAddress,
    pub port: Be16,
}

impl SnatPool {
    #[inline(always)]
    const fn ranges(&self, is_v4: bool) -> &SnatRanges {
        if is_v4 { &self.v4 } else { &self.v6 }
    }

    /// The pair of a family that the flow `id` holds; `None` when the pool is smaller than that.
    #[inline(always)]
    pub fn binding(&self, id: FlowId, is_v4: bool) -> Option<SnatBinding> {
        self.ranges(is_v4).binding(id)
    }

    /// Is this an address of the pool?
    #[inline(always)]
    pub fn contains(&self, address: IpAddress) -> bool {
        self.ranges(address.is_v4()).address_index(address).is_some()
    }

    /// The flow that holds this pair: `None` when the address is not of the pool, `Some(None)` when it is but
    /// no flow can hold this port.
    #[inline(always)]
    pub fn flow(&self, binding: SnatBinding) -> Option<Option<FlowId>> {
        let address_index = self
            .ranges(binding.address.is_v4())
            .address_index(binding.address)?;
        Some(numbered(address_index, binding.port))
    }
}

impl SnatPool {
    /// As [`Self::flow`], for an address of IPv6.
    #[inline(always)]
    pub fn flow_v6(&self, binding: SnatBinding) -> Option<Option<FlowId>> {
        let address_index = self.v6.address_index(binding.address)?;
        Some(numbered(address_index, binding.port))
    }

    /// As [`Self::flow`], for an address of IPv4.
    #[inline(always)]
    pub fn flow_v4(&self, address: Ipv4Address, port: Be16) -> Option<Option<FlowId>> {
        let mut before = 0;
        for run in &self.v4.runs {
            if run.count == 0 {
                return None;
            }
            let offset = address.0.get().wrapping_sub(run.first.low().0.get());
            if offset < run.count {
                return Some(numbered(before + offset, port));
            }
            before += run.count;
        }
        None
    }
}

/// The number of a pair; `None`: no flow can hold this port.
#[inline(always)]
fn numbered(address_index: u32, port: Be16) -> Option<FlowId> {
    let port = port.get();
    if port < FIRST_PORT {
        return None;
    }
    Some(FlowId(
        address_index * PORTS_PER_ADDRESS + u32::from(port - FIRST_PORT),
    ))
}

impl SnatRanges {
    #[inline(always)]
    fn binding(&self, id: FlowId) -> Option<SnatBinding> {
        let mut address_index = id.0 / PORTS_PER_ADDRESS;
        let port = FIRST_PORT + (id.0 % PORTS_PER_ADDRESS) as u16;
        for run in &self.runs {
            if address_index < run.count {
                return Some(SnatBinding {
                    address: run.first.plus(address_index),
                    port: Be16::new(port),
                });
            }
            address_index -= run.count;
        }
        None
    }

    #[inline(always)]
    fn address_index(&self, address: IpAddress) -> Option<u32> {
        let mut before = 0;
        for run in &self.runs {
            if run.count == 0 {
                return None;
            }
            if let Some(offset) = address.offset_from(run.first)
                && offset < run.count
            {
                return Some(before + offset);
            }
            before += run.count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn v4(octets: [u8; 4]) -> IpAddress {
        Ipv4Addr::from(octets).into()
    }

    fn v6(last: u16) -> IpAddress {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into()
    }

    fn pool() -> SnatPool {
        let mut pool = SnatPool::default();
        pool.v4.runs[0] = SnatRange {
            first: v4([100, 64, 0, 2]),
            count: 61,
        };
        pool.v4.runs[1] = SnatRange {
            first: v4([100, 64, 8, 0]),
            count: 3,
        };
        pool.v6.runs[0] = SnatRange {
            first: v6(1),
            count: 64,
        };
        pool
    }

    #[test]
    fn the_first_number_is_the_first_address_and_port_of_each_family() {
        for (is_v4, address) in [(true, v4([100, 64, 0, 2])), (false, v6(1))] {
            let first = SnatBinding {
                address,
                port: Be16::new(1024),
            };
            assert_eq!(pool().binding(FlowId(0), is_v4), Some(first));
        }
    }

    #[test]
    fn addresses_beside_the_runs_are_not_of_the_pool() {
        for octets in [[100, 64, 0, 1], [100, 64, 0, 63], [100, 64, 8, 3], [0, 0, 0, 0]] {
            assert!(!pool().contains(v4(octets)), "{octets:?}");
            assert_eq!(pool().flow_v4(Ipv4Address::new(octets), Be16::new(2000)), None);
        }
        assert!(!pool().contains(v6(0)) && pool().contains(v6(64)) && !pool().contains(v6(65)));
        let elsewhere = Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 1);
        assert!(!pool().contains(elsewhere.into()));
    }

    #[test]
    fn a_reserved_port_of_the_pool_is_ours_but_nobody_s() {
        let binding = SnatBinding {
            address: v4([100, 64, 8, 1]),
            port: Be16::new(1023),
        };
        assert_eq!(pool().flow(binding), Some(None));
        assert_eq!(pool().flow_v4(binding.address.low(), binding.port), Some(None));
    }

    proptest! {
        #[test]
        fn every_number_has_one_pair_and_every_pair_one_number(id in 0u32..70 * PORTS_PER_ADDRESS, is_v4: bool) {
            match pool().binding(FlowId(id), is_v4) {
                Some(binding) => {
                    prop_assert_eq!(pool().flow(binding), Some(Some(FlowId(id))));
                    if is_v4 {
                        prop_assert_eq!(pool().flow_v4(binding.address.low(), binding.port), Some(Some(FlowId(id))));
                    }
                }
                None => prop_assert!(id >= 64 * PORTS_PER_ADDRESS),
            }
        }
    }
}
