//! Where the groups' tables stand in the slot table.
//!
//! Each group has a region with room for two tables of its size: the next one is written beside the one in use. A
//! group whose size changes gets another region, and nothing that is in use or was until now lies in it, so a
//! packet that has read the old place still reads the old table.

use std::collections::BTreeMap;

use forwarder_common::abi::backend::{BackendGroup, GroupId};

/// The regions of all groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Slots of the slot table.
    capacity: u32,
    regions: BTreeMap<GroupId, Region>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    first: u32,
    /// Slots of one table, with the overflow table behind it.
    size: u32,
    /// Room for how many tables: two, or one where an agent was killed while a group was moving.
    tables: u32,
    /// Which table is in use; `None`: none was written yet.
    side: Option<u32>,
}

impl Region {
    fn end(&self) -> u32 {
        self.first + self.tables * self.size
    }
}

/// The slot table is too small for the old and the new tables together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slot table has {capacity} slots and no {wanted} in a row are free")]
pub struct NoRoom {
    pub capacity: u32,
    pub wanted: u32,
}

impl Placement {
    /// An empty slot table of `capacity` slots.
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity,
            regions: BTreeMap::new(),
        }
    }

    /// Notes the region that an earlier agent gave to a group, and the table in use.
    pub fn restore(&mut self, id: GroupId, first: u32, size: u32, in_use: &BackendGroup) {
        let offset = in_use.first_slot.wrapping_sub(first);
        let slot_count = in_use.slot_count.saturating_add(in_use.overflow_slot_count);
        let region = if size > 0 && (offset == 0 || offset == size) && slot_count <= size {
            Region {
                first,
                size,
                tables: 2,
                side: Some(offset / size),
            }
        } else if slot_count > 0 {
            // It was about to move: what is in use is elsewhere.
            Region {
                first: in_use.first_slot,
                size: slot_count,
                tables: 1,
                side: Some(0),
            }
        } else {
            Region {
                first,
                size,
                tables: 2,
                side: None,
            }
        };
        self.regions.insert(id, region);
    }

    /// The placement for groups of these sizes; a group whose size stays keeps its region.
    ///
    /// # Errors
    /// There is no room; nothing was changed.
    pub fn arrange(&self, sizes: impl IntoIterator<Item = (GroupId, u32)>) -> Result<Self, NoRoom> {
        let mut next = Self::new(self.capacity);
        let mut moving = Vec::new();
        for (id, size) in sizes {
            match self.regions.get(&id) {
                Some(region) if region.size == size && region.tables == 2 => {
                    next.regions.insert(id, *region);
                }
                _ => moving.push((id, size)),
            }
        }
        // All old regions, also those that are given up: packets may still read them.
        let mut taken: Vec<(u32, u32)> = self
            .regions
            .values()
            .map(|region| (region.first, region.end()))
            .collect();
        for (id, size) in moving {
            let wanted = size.saturating_mul(2);
            taken.sort_unstable();
            let mut first = 0;
            for (start, end) in &taken {
                if start.saturating_sub(first) >= wanted {
                    break;
                }
                first = first.max(*end);
            }
            if self.capacity.saturating_sub(first) < wanted {
                return Err(NoRoom {
                    capacity: self.capacity,
                    wanted,
                });
            }
            taken.push((first, first + wanted));
            let region = Region {
                first,
                size,
                tables: 2,
                side: None,
            };
            next.regions.insert(id, region);
        }
        Ok(next)
    }

    /// First slot and size of one table of a group's region.
    pub fn region(&self, id: GroupId) -> Option<(u32, u32)> {
        self.regions.get(&id).map(|region| (region.first, region.size))
    }

    /// Do all groups stand where they do in `other`?
    pub(super) fn has_same_regions(&self, other: &Self) -> bool {
        let places = |placement: &Self| -> Vec<_> {
            let regions = placement.regions.iter();
            regions
                .map(|(id, region)| (*id, region.first, region.size))
                .collect()
        };
        places(self) == places(other)
    }

    /// Is there a table of this group?
    pub(super) fn is_written(&self, id: GroupId) -> bool {
        self.regions.get(&id).is_some_and(|region| region.side.is_some())
    }

    /// Takes the other side of a group's region into use; returns its first slot.
    pub(super) fn turn(&mut self, id: GroupId) -> Option<u32> {
        let region = self.regions.get_mut(&id)?;
        let side = region.side.map_or(0, |side| 1 - side);
        region.side = Some(side);
        Some(region.first + side * region.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable as _;
    use proptest::prelude::*;

    fn sizes(list: &[(u32, u32)]) -> Vec<(GroupId, u32)> {
        list.iter().map(|(id, size)| (GroupId(*id), *size)).collect()
    }

    #[test]
    fn a_group_that_stays_is_not_moved_and_one_that_grows_leaves_its_old_place_alone() {
        let before = Placement::new(100).arrange(sizes(&[(0, 10), (1, 10)])).unwrap();
        let after = before.arrange(sizes(&[(0, 20), (1, 10)])).unwrap();
        assert_eq!(after.region(GroupId(1)), before.region(GroupId(1)));
        assert_eq!(after.region(GroupId(0)), Some((40, 20)));
        // The next change may use what became free.
        let last = after.arrange(sizes(&[(0, 20), (1, 10), (2, 10)])).unwrap();
        assert_eq!(last.region(GroupId(2)), Some((0, 10)));
    }

    #[test]
    fn no_room_is_an_error() {
        let before = Placement::new(50).arrange(sizes(&[(0, 20)])).unwrap();
        let error = before.arrange(sizes(&[(0, 21)])).unwrap_err();
        assert_eq!((error.capacity, error.wanted), (50, 42));
    }

    #[test]
    fn a_group_that_an_agent_was_moving_when_it_died_keeps_what_is_in_use() {
        let mut placement = Placement::new(100);
        let in_use = BackendGroup {
            first_slot: 10,
            slot_count: 10,
            ..BackendGroup::zeroed()
        };
        // Its record names the region it was about to move to.
        placement.restore(GroupId(0), 40, 20, &in_use);
        let next = placement.arrange(sizes(&[(0, 20)])).unwrap();
        assert_eq!(next.region(GroupId(0)), Some((20, 20)));
        assert!(!next.is_written(GroupId(0)));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_what_was_or_is_in_use(
            changes in prop::collection::vec(prop::collection::btree_map(0u32..6, 1u32..40, 0..6), 1..20)
        ) {
            let mut placement = Placement::new(1000);
            for change in changes {
                let next = placement
                    .arrange(change.iter().map(|(id, size)| (GroupId(*id), *size)))
                    .unwrap();
                let mut all: Vec<_> = next.regions.values().map(|r| (r.first, r.end())).collect();
                all.extend(
                    placement
                        .regions
                        .iter()
                        .filter(|(id, region)| next.regions.get(id).map(|r| r.first) != Some(region.first))
                        .map(|(_, r)| (r.first, r.end())),
                );
                all.sort_unstable();
                prop_assert!(all.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{all:?}");
                prop_assert!(all.iter().all(|(_, end)| *end <= 1000));
                placement = next;
            }
        }
    }
}
