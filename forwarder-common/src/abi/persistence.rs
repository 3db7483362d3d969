//! Persistence: where a client's last flow went, so that its next one goes there too.

use bytemuck::{Pod, Zeroable};

use super::backend::{BackendId, GroupId};
use crate::wire::{Be16, Be32, Ipv4Address};

/// Key of the persistence table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct PersistenceKey {
    pub group: GroupId,
    /// The leading bits that clients share; the others are zero.
    pub client: Ipv4Address,
}

impl PersistenceKey {
    /// The key of a client; `bits` of its address count, at most 32.
    #[inline(always)]
    pub const fn new(group: GroupId, client: Ipv4Address, bits: u32) -> Self {
        // Shifted in 64 bits: by 32, which leaves none, a shift of 32 bits is undefined.
        let mask = !((u32::MAX as u64 >> bits) as u32);
        Self {
            group,
            client: Ipv4Address(Be32::from_raw(client.0.raw() & mask.to_be())),
        }
    }
}

/// Value of the persistence table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Persistence {
    pub backend: BackendId,
    /// The backend's address then: the number may have been given to another since.
    pub address: Ipv4Address,
    /// The backend's port then.
    pub port: Be16,
    pub reserved: u16,
    /// When the client's last flow was opened, in seconds of CLOCK_MONOTONIC.
    pub used_secs: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_prefix_share_a_key() {
        let key = |last, bits| PersistenceKey::new(GroupId(3), Ipv4Address::new([192, 0, 2, last]), bits);
        assert_eq!(key(7, 24), key(250, 24));
        assert_ne!(key(7, 32), key(6, 32));
        assert_eq!(key(7, 24).client, Ipv4Address::new([192, 0, 2, 0]));
        assert_ne!(key(7, 25), key(250, 25));
    }
}
