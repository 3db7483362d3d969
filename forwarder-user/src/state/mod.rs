//! What should be true, and how to get there: pure functions, no I/O, no aya.
//!
//! `ids` gives names their numbers, `desired` turns configuration, health and links into table contents, `plan`
//! lists the writes that lead from one desired state to the next.

pub mod desired;
pub mod ids;
pub mod names;
pub mod plan;
