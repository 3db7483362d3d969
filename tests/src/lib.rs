//! What the test rings share; see the crate's modules. Nothing here is part of the product.

pub mod bench;
pub mod blame;
pub mod cases;
pub mod fuzz;
pub mod handshake;
pub mod invariants;
pub mod lab;
pub mod layers;
pub mod packet;
pub mod program;
pub mod script;
pub mod tables;
pub mod terminal;
pub mod tunnel;
pub mod witness;
