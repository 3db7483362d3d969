//! Frames that a device refused to send.

use std::fs;

use crate::error::Error;

/// Position of the counter of dropped outgoing frames behind an interface's name in `/proc/net/dev`
/// (proc_net_dev(5): eight receive columns, then bytes, packets, errs, drop).
const TX_DROP: usize = 11;

/// How many outgoing frames the device called `interface` has dropped since it exists, in the network namespace of
/// the calling thread.
///
/// # Errors
/// When there is no such device.
pub fn dropped_frames(interface: &str) -> Result<u64, Error> {
    let path = "/proc/thread-self/net/dev";
    let text = fs::read_to_string(path).map_err(|error| Error::host(format!("cannot read {path}: {error}")))?;
    dropped(&text, interface)
        .ok_or_else(|| Error::host(format!("interface \"{interface}\" does not exist")).hint("see `ip link show`"))
}

fn dropped(text: &str, interface: &str) -> Option<u64> {
    let columns = text.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    columns.split_whitespace().nth(TX_DROP)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_column_of_dropped_outgoing_frames() {
        let text = "Inter-|   Receive    |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|\
                    bytes packets errs drop fifo colls carrier compressed\n  eth1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n \
                    eth10: 1 1 1 1 1 1 1 1 1 1 1 77 1 1 1 1\n";
        assert_eq!(dropped(text, "eth1"), Some(12));
        assert_eq!(dropped(text, "eth10"), Some(77));
        assert_eq!(dropped(text, "eth"), None);
    }
}
