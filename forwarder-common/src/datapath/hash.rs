//! The flow hash: which Maglev slot a flow starts from.
//!
//! Two rounds of a 64-bit multiply and fold (the finalizer of MurmurHash3, public domain), over the 5-tuple.
//! Not a defence against somebody who knows the seed: such a client can aim at one backend, as with any
//! consistent hash; it cannot make lookups slow, as the flow index has the kernel's own seeded hash.

use crate::{abi::flow::FlowKey, wire::IpAddress};

const ROUND_1: u64 = 0xff51_afd7_ed55_8ccd;
const ROUND_2: u64 = 0xc4ce_b9fe_1a85_ec53;

/// Hash of a flow's 5-tuple.
#[inline(always)]
pub const fn flow_hash(key: &FlowKey, seed: u32) -> u32 {
    let addresses = fold(key.source) as u64 | (fold(key.destination) as u64) << 32;
    let ports = key.source_port.raw().to_le() as u64
        | (key.destination_port.raw().to_le() as u64) << 16
        | (key.protocol as u64) << 32;
    rounds(addresses ^ seed as u64, ports)
}

/// Hash of a client's address alone.
#[inline(always)]
pub const fn source_hash(source: IpAddress, seed: u32) -> u32 {
    rounds(fold(source) as u64 ^ (seed as u64) << 32, 0)
}

/// 32 bits of an address: of IPv4 all, of IPv6 a hash, so that hosts of one network differ as well as networks.
#[inline(always)]
const fn fold(address: IpAddress) -> u32 {
    if address.is_v4() {
        return address.low().0.raw().to_le();
    }
    let [a, b, c, d] = address.0;
    let network = a.raw().to_le() as u64 | (b.raw().to_le() as u64) << 32;
    let host = c.raw().to_le() as u64 | (d.raw().to_le() as u64) << 32;
    rounds(network, host)
}

#[inline(always)]
const fn rounds(first: u64, second: u64) -> u32 {
    let mut hash = first.wrapping_mul(ROUND_1);
    hash ^= hash >> 32;
    hash = (hash ^ second).wrapping_mul(ROUND_2);
    hash ^= hash >> 29;
    hash = hash.wrapping_mul(ROUND_1);
    (hash >> 32) as u32
}

/// Maps a hash evenly to `0..count` without a division.
#[inline(always)]
pub const fn scale(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::wire::Be16;

    #[test]
    fn neighbouring_client_ports_spread_evenly() {
        const BINS: usize = 16;
        let mut bins = [0u32; BINS];
        for port in 1024..65024u16 {
            let key = FlowKey {
                source: Ipv4Addr::new(192, 0, 2, 7).into(),
                destination: Ipv4Addr::new(198, 51, 100, 10).into(),
                source_port: Be16::new(port),
                destination_port: Be16::new(443),
                protocol: 6,
            };
            bins[scale(flow_hash(&key, 7), BINS as u32) as usize] += 1;
        }
        for (bin, count) in bins.iter().enumerate() {
            assert!((3800..4200).contains(count), "bin {bin} has {count} of 4000");
        }
    }

    #[test]
    fn neighbouring_clients_spread_evenly() {
        const BINS: usize = 16;
        let mut bins = [0u32; BINS];
        for client in 0..64_000u32 {
            let address = Ipv4Addr::from_bits(0x0a00_0000 + client).into();
            bins[scale(source_hash(address, 7), BINS as u32) as usize] += 1;
        }
        for (bin, count) in bins.iter().enumerate() {
            assert!((3800..4200).contains(count), "bin {bin} has {count} of 4000");
        }
    }

    #[test]
    fn ipv6_clients_spread_evenly_by_network_and_by_host() {
        const BINS: usize = 16;
        let first = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).to_bits();
        for shift in [0, 64, 80] {
            let mut bins = [0u32; BINS];
            for client in 0..64_000u128 {
                let address = Ipv6Addr::from_bits(first + (client << shift)).into();
                bins[scale(source_hash(address, 7), BINS as u32) as usize] += 1;
            }
            for (bin, count) in bins.iter().enumerate() {
                assert!(
                    (3800..4200).contains(count),
                    "bin {bin} has {count} of 4000, shift {shift}"
                );
            }
        }
    }
}
