//! What should be true, and how to get there: pure functions, no I/O, no aya.
//!
//! `overrides` are operators' orders for single backends. `ids` gives names their numbers and `names` the other way
//! round, `placement` gives groups their slots. `desired` turns configuration, health, orders and links into table
//! contents; `tiers` says which backends of a group serve, `tables` builds the groups' tables (`turns` for groups that
//! select in turn) and keeps them. `plan` lists the writes that lead from one state of the tables to the next, `apply`
//! executes them all or none, `inherit` is what an agent takes over of another's. `difference` compares configurations
//! for people. `vlans` and `bonds` are what the data path knows of VLAN devices and of the ports of bonds.

pub mod apply;
pub mod bonds;
pub mod desired;
pub mod difference;
pub mod ids;
pub mod inherit;
pub mod names;
pub mod overrides;
pub mod placement;
pub mod plan;
pub mod tables;
pub mod tiers;
pub mod tunnels;
pub mod turns;
pub mod vlans;
