//! The agent's side of the kernel's objects: load, attach, write, read. The only place that knows aya.
//!
//! `object` loads, `attach` hooks programs to interfaces, `maps` has typed handles, `writer` executes the plan,
//! `counters` and `flows` read, `memory` maps the two tables that are too large for system calls, `view` lets the walk
//! read without writing, `watch` reads what passive checks look at, `held` and `capture` take packets. `pin` makes all of
//! it outlive the agent; `reader` and `free_list` take over what an earlier agent has left, `left_behind` looks at it
//! while there is none.

pub mod attach;
pub mod capture;
pub mod counters;
pub mod flows;
pub mod free_list;
pub mod held;
pub mod left_behind;
pub mod maps;
pub mod memory;
pub mod object;
pub mod packet;
pub mod pin;
pub mod pod;
pub mod reader;
pub mod times;
pub mod view;
pub mod watch;
pub mod writer;
