//! The only code that writes the control maps: executes a plan, in order.

use aya::maps::lpm_trie::Key;
use forwarder_common::abi::listener::Source;

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
            MapWrite::Source(key) => maps
                .sources
                .insert(&trie_key(key), AsPod(Source { admitted: 1 }), 0),
            MapWrite::Listener(key, value) => maps.listeners.insert(AsPod(*key), AsPod(*value), 0),
            MapWrite::ListenerRange(key, value) => {
                maps.listener_ranges.insert(&trie_key(key), AsPod(*value), 0)
            }
        };
        outcome.map_err(|error| kernel_error(&format!("write {write}"), &error))?;
    }
    Ok(())
}

/// A trie's key as aya wants it: the number of bits, then three words.
fn trie_key<K: bytemuck::Pod>(key: &K) -> Key<[u32; 3]> {
    let [bits, words @ ..]: [u32; 4] = bytemuck::cast(*key);
    Key::new(bits, words)
}
