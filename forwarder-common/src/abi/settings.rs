//! What the whole data path shares; a table of one, which the agent may change at any time.

use bytemuck::{Pod, Zeroable};

use super::{address_filter::AddressFilters, snat::SnatPool};

/// Bits of [`Settings::flags`].
pub mod flag {
    /// Some attached interface may hand us frames whose transport checksum its sender left to the device:
    /// veth, tap, virtio. Without it the data path does not look.
    pub const PARTIAL_CHECKSUMS: u32 = 1;
    /// Some interface in native mode takes frames back only by redirect: XDP_TX on a veth needs a program on its
    /// peer, a redirect to itself only NAPI there.
    pub const TRANSMIT_BY_REDIRECT: u32 = 2;
    /// The flow table has an entry for every binding of the pool: when none is free, the pool is used up.
    pub const POOL_IS_SMALLER: u32 = 4;
    /// Segment sizes that TCP announces are left alone.
    pub const KEEP_SEGMENT_SIZE: u32 = 8;
    /// There are tunnels that the programs handle. Without it the data path does not look inside of packets.
    pub const TUNNELS: u32 = 16;
    /// Somebody wants to see packets.
    pub const CAPTURE: u32 = 32;
    /// Which way packets to a backend of IPv4 leave depends on its address alone: no routing rule looks at anything
    /// else, and no route to a backend has several next hops.
    pub const ONE_WAY: u32 = 64;
}

/// The settings.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Settings {
    /// `ABI_VERSION` of whoever wrote the tables.
    pub abi_version: u32,
    /// Counts changes of routes and neighbours; a next hop of another generation is looked up again.
    pub route_generation: u32,
    /// Of the flow hash; the same on all gateways of a fleet, so that they pick the same backends.
    pub hash_seed: u32,
    pub flags: u32,
    /// Under which SYN cookies are made: random, and the same for as long as the tables live, as cookies of an agent
    /// before this one may still come back.
    pub cookie_key: [u64; 2],
    /// The smallest MTU of all interfaces and tunnels, in bytes: the segment size that a cookie announces fits it. Zero:
    /// unknown.
    pub least_mtu_bytes: u32,
    pub reserved: u32,
    pub pool: SnatPool,
    /// What tells packets that are not ours.
    pub filters: AddressFilters,
}
