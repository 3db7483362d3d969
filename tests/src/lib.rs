//! What the test rings share; see the crate's modules. Nothing here is part of the product.

pub mod lab;
