//! What the test rings share; see the crate's modules. Nothing here is part of the product.

pub mod blame;
pub mod cases;
pub mod lab;
pub mod packet;
pub mod program;
pub mod tables;
pub mod terminal;
pub mod tunnel;
pub mod witness;
