//! Persistence: where a client's last flow went, so that its next one goes there too.

use bytemuck::{Pod, Zeroable};

use super::backend::{BackendId, GroupId};
use crate::wire::{Be16, IpAddress};

/// Key of the persistence table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct PersistenceKey {
    pub group: GroupId,
    /// The leading bits that clients share; the others are zero.
    pub client: IpAddress,
}

impl PersistenceKey {
    /// The key of a client; `bits` of the 128 of its address count.
    #[inline(always)]
    pub const fn new(group: GroupId, client: IpAddress, bits: u32) -> Self {
        Self {
            group,
            client: client.prefix(bits),
        }
    }
}

/// Value of the persistence table.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Persistence {
    pub backend: BackendId,
    /// The backend's address then: the number may have been given to another since.
    pub address: IpAddress,
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
        let address = |last| IpAddress::from(core::net::Ipv4Addr::new(192, 0, 2, last));
        let key =
            |last, bits| PersistenceKey::new(GroupId(3), address(last), IpAddress::V4_PREFIX_BITS + bits);
        assert_eq!(key(7, 24), key(250, 24));
        assert_ne!(key(7, 32), key(6, 32));
        assert_eq!(key(7, 24).client, address(0));
        assert_ne!(key(7, 25), key(250, 25));
    }
}
