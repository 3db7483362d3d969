pub mod cli;
pub mod config;
pub mod diagnose;
pub mod error;
pub mod health;
pub mod network;
