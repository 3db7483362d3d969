//! Executing a plan: all of it, or nothing.

use super::plan::MapWrite;
use crate::error::Error;

/// Tables that can be written.
pub trait Store {
    /// Executes one write. Returns the write that undoes it, or `None` where nothing needs to be undone.
    ///
    /// # Errors
    /// The write was refused, and changed nothing.
    fn exchange(&mut self, write: &MapWrite) -> Result<Option<MapWrite>, Error>;
}

/// Executes the writes in order. If one is refused, those before it are undone in reverse order, so that no reader
/// meets a dangling number on the way back either.
///
/// # Errors
/// The refused write's; it says so where undoing failed as well.
pub fn apply(store: &mut impl Store, plan: &[MapWrite]) -> Result<(), Error> {
    let mut undo = Vec::new();
    for write in plan {
        match store.exchange(write) {
            Ok(inverse) => undo.extend(inverse),
            Err(mut error) => {
                for inverse in undo.iter().rev() {
                    if let Err(second) = store.exchange(inverse) {
                        error.what.push_str(&format!(
                            "; undoing what was done before it failed, too: {}",
                            second.what
                        ));
                        error.hint =
                            Some("restart the agent: it repairs its tables and keeps flows".to_owned());
                        break;
                    }
                }
                return Err(error);
            }
        }
    }
    Ok(())
}
