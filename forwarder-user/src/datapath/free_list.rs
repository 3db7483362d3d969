//! The list of free flows, handed from one agent's programs to the next one's.
//!
//! A flow whose number is in no list and in no entry is lost for good, one that is in a list twice serves two
//! clients with one binding. A queue map can't be looked through, and programs take from it at any time. So an
//! agent never adopts a list: it makes a new one, and the programs it loads use that. Once they have replaced
//! the old ones and no old one is running any more, the old list belongs to the agent alone, which moves what is
//! in it. Every free entry whose number it has not moved by then has been lost on the way (an agent was killed
//! between two steps) and is put back. An ADR has the whole argument: `docs/adr/0012`.

use std::{path::PathBuf, thread, time::Duration};

use aya::maps::{Map, MapData, Queue};
use forwarder_common::abi::flow::{FlowId, FlowState};
use rustix::thread::{MembarrierCommand, membarrier};

use super::{maps::FlowMaps, object::kernel_error, pin::PinDirectory, pod::AsPod};
use crate::error::Error;

/// Flows that the new programs get before they run: more than arrive until all the rest has been moved. Of a small table
/// half of the free ones, as the old programs open flows until the last of them is replaced.
const ADVANCE: u32 = 65_536;
/// In place of a grace period that the kernel refuses to wait for; a program runs for microseconds.
const GRACE: Duration = Duration::from_secs(1);

/// The lists of earlier agents, on their way into the new one.
pub struct Handover {
    lists: Vec<(PathBuf, Queue<MapData, AsPod<FlowId>>)>,
    /// By number: was in a list.
    moved: Vec<bool>,
}

impl Handover {
    /// Opens the lists at `paths`, for a table of `capacity` flows.
    ///
    /// # Errors
    /// One of the pins is no list of flows.
    pub fn open(paths: Vec<PathBuf>, capacity: u32) -> Result<Self, Error> {
        let open = |path: PathBuf| -> Result<_, Error> {
            let list = MapData::from_pin(&path)
                .and_then(Map::from_map_data)
                .and_then(Queue::try_from)
                .map_err(|error| kernel_error(&format!("open the pin {}", path.display()), &error))?;
            Ok((path, list))
        };
        Ok(Self {
            lists: paths.into_iter().map(open).collect::<Result<_, _>>()?,
            moved: vec![false; capacity as usize],
        })
    }

    /// Before the new programs run: gives them flows to go on with. The old ones may take some at the same time.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn advance(&mut self, maps: &mut FlowMaps) -> Result<(), Error> {
        let numbers = (0..maps.memory.capacity()).map(FlowId);
        let free = numbers
            .filter(|id| maps.memory.state(*id) == FlowState::FREE)
            .count();
        self.move_at_most(maps, ADVANCE.min(free as u32 / 2))
    }

    /// After the last old program was replaced or detached: moves all the rest, puts back what was lost, and
    /// removes the old lists. Returns how many were put back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn finish(mut self, maps: &mut FlowMaps, pins: Option<&PinDirectory>) -> Result<u32, Error> {
        if !self.lists.is_empty() {
            await_running_programs();
        }
        self.move_at_most(maps, u32::MAX)?;
        let mut found = 0;
        for number in 0..maps.memory.capacity() {
            let id = FlowId(number);
            if !self.moved[number as usize] && maps.memory.state(id) == FlowState::FREE {
                push(maps, id)?;
                found += 1;
            }
        }
        if let Some(pins) = pins {
            for (path, _) in &self.lists {
                pins.unpin(path)?;
            }
        }
        Ok(found)
    }

    /// First the flows that have been free for longest.
    fn move_at_most(&mut self, maps: &mut FlowMaps, at_most: u32) -> Result<(), Error> {
        let mut left = at_most;
        for (_, list) in &mut self.lists {
            while left > 0 {
                let Some(id) = pop(list)? else { break };
                // A number beyond the table or one that comes twice would be a fault; handing it out, too.
                if let Some(moved) = self.moved.get_mut(id.0 as usize)
                    && !*moved
                {
                    *moved = true;
                    push(maps, id)?;
                }
                left -= 1;
            }
        }
        Ok(())
    }
}

fn pop(list: &mut Queue<MapData, AsPod<FlowId>>) -> Result<Option<FlowId>, Error> {
    match list.pop(0) {
        Ok(AsPod(id)) => Ok(Some(id)),
        Err(aya::maps::MapError::ElementNotFound) => Ok(None),
        Err(error) => Err(kernel_error("read the list of free flows", &error)),
    }
}

fn push(maps: &mut FlowMaps, id: FlowId) -> Result<(), Error> {
    maps.free
        .push(AsPod(id), 0)
        .map_err(|error| kernel_error("fill the list of free flows", &error))
}

/// Returns when every program that was running has ended. Programs of network hooks run inside an RCU read-side
/// section, and a global memory barrier waits for all of those: it is the kernel's `synchronize_rcu`.
pub fn await_running_programs() {
    // Refused where CPUs run without a timer tick (nohz_full).
    if membarrier(MembarrierCommand::Global).is_err() {
        thread::sleep(GRACE);
    }
}
