//! Empty: it enables the library target, so that cargo can track this crate as a build dependency.
#![no_std]
