//! A witness of fault runs: a server and clients that check every byte they read (`forwarder_tests::witness`) and tell,
//! a line of JSON each, what failed and what was wrong.
//!
//! A client asks in several ways at once: requests on connections of their own, on connections that are kept, long
//! transfers at a steady pace either way, datagrams. It ends at SIGTERM, when what is under way has ended, and sums up.
//! What fails is tried again on a new connection. Datagrams are repeated, as any protocol over UDP does.

mod ask;
mod serve;

use std::{net::Ipv4Addr, process::ExitCode};

use clap::Parser;
use forwarder_tests::witness::{Record, now_ns};

#[derive(Parser)]
enum Role {
    /// Answers at the ports of these listeners
    Serve(serve::Arguments),
    /// Asks these listeners
    Ask(ask::Arguments),
}

/// Where listeners are.
#[derive(clap::Args)]
struct Listeners {
    /// Ports of listeners of TCP
    #[arg(long, num_args = 0..)]
    tcp: Vec<u16>,
    /// The same of UDP
    #[arg(long, num_args = 0..)]
    udp: Vec<u16>,
}

/// Address and number of a witness.
#[derive(clap::Args)]
struct Identity {
    #[arg(long)]
    number: u16,
    #[arg(long)]
    address: Ipv4Addr,
}

fn main() -> ExitCode {
    let outcome = match Role::parse() {
        Role::Serve(arguments) => serve::run(&arguments),
        Role::Ask(arguments) => ask::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("witness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes a record; lines of several threads do not mix.
fn record(record: &Record) {
    match serde_json::to_string(record) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("witness: {error}"),
    }
}

fn violation(what: String) {
    record(&Record::Violation {
        at_ns: now_ns(),
        what,
    });
}
