//! See `forwarder_tests::fuzz`.

#![no_main]

forwarder_fuzz::program!("walk");
