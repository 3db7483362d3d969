//! How fast the clients of one prefix may open flows: a bucket of tokens for each, which every second fills up by the
//! listener's rate.
//!
//! A flow is charged as it opens, so a SYN that is answered with a cookie is not: sources that are forged wear neither
//! the table nor somebody else's bucket out. Packets of flows are never charged. Buckets are not locked: where two CPUs
//! take from one at once, one token may serve twice.

use super::{Stop, Tables, TrafficEvent, Walk};
use crate::{
    abi::{
        rate::{SourceRate, SourceRateKey},
        reason::Reason,
    },
    wire::IpAddress,
};

/// What [`charge`] says.
pub type Charged = i64;
/// The flow may be opened.
pub const PAID: Charged = -1;

/// Takes one token for the walk's frame, or says with the number of a reason why there is none.
#[inline(always)]
pub fn charge<T: Tables>(tables: &mut T, walk: &Walk) -> Charged {
    let listener = &walk.listener;
    let source: &IpAddress = &walk.frame.key.source;
    let bits = if source.is_v4() {
        u32::from(listener.source_bits_v4)
    } else {
        u32::from(listener.source_bits_v6)
    };
    let key = SourceRateKey::new(listener.id, source.copied(), bits);
    let (rate, burst) = (listener.source_flows_per_second, listener.source_burst);
    let now_secs = tables.now_secs();
    let left = match tables.source_rate(&key) {
        Some(bucket) => {
            // Signed: another CPU may have charged it in the second that begins here only now.
            let passed_secs = (now_secs.wrapping_sub(bucket.second) as i32).max(0) as u32;
            let gained = u64::from(passed_secs) * u64::from(rate);
            let left = (u64::from(bucket.left) + gained).min(u64::from(burst)) as u32;
            bucket.second = bucket.second.wrapping_add(passed_secs);
            bucket.left = left.saturating_sub(1);
            left
        }
        None => {
            let bucket = SourceRate {
                second: now_secs,
                left: burst.saturating_sub(1),
            };
            tables.keep_source_rate(&key, bucket);
            burst
        }
    };
    if left == 0 {
        tables.count_listener(listener.id, TrafficEvent::RateLimited);
        return Charged::from(Reason::SOURCE_RATE.0);
    }
    PAID
}

/// [`charge`]'s answer as that of a stage.
///
/// # Errors
/// [`Reason::SOURCE_RATE`], a drop: told, a flood's senders would only learn that they are heard.
#[inline(always)]
pub const fn outcome(charged: Charged) -> Result<(), Stop> {
    match charged {
        PAID => Ok(()),
        reason => Err(Stop::drop(Reason(reason as u32))),
    }
}
