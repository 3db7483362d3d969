//! What the test rings share; see the crate's modules. Nothing here is part of the product.

pub mod bench;
pub mod cases;
pub mod handshake;
pub mod lab;
pub mod packet;
pub mod program;
pub mod tables;
pub mod terminal;
pub mod tunnel;
