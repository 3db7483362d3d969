//! The only code that writes the control maps: executes a plan, in order.

use super::{maps::ControlMaps, object::kernel_error, pod::AsPod};
use crate::{error::Error, state::plan::MapWrite};

/// Executes the writes in order; stops at the first that fails.
///
/// # Errors
/// Names the write that the kernel refused.
pub fn apply(maps: &mut ControlMaps, plan: &[MapWrite]) -> Result<(), Error> {
    for write in plan {
        let outcome = match write {
            MapWrite::Settings(value) => maps.settings.set(0, AsPod(**value), 0),
            MapWrite::Interface(key, value) => maps.interfaces.insert(AsPod(*key), AsPod(*value), 0),
            MapWrite::Backend(id, value) => maps.backends.set(id.0, AsPod(*value), 0),
            MapWrite::Slots { first, slots } => {
                maps.slots.write(*first, slots);
                Ok(())
            }
            MapWrite::Group(id, value) => maps.groups.set(id.0, AsPod(*value), 0),
            MapWrite::Vip(key, value) => maps.vips.insert(AsPod(*key), AsPod(*value), 0),
            MapWrite::Listener(key, value) => maps.listeners.insert(AsPod(*key), AsPod(*value), 0),
        };
        outcome.map_err(|error| kernel_error(&format!("write {write}"), &error))?;
    }
    Ok(())
}
