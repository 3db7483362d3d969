//! `forwarder capture` and `forwarder trace`: packets as the data path of the running agent sees them.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Write},
    ops::ControlFlow,
    path::Path,
};

use super::{
    args::{CaptureArgs, CaptureFilterArgs, OutputFormat, TraceArgs},
    ask, output,
};
use crate::{
    api::{CAPTURE_PATH, TRACE_PATH},
    capture::{CaptureRequest, TracedPacket, reasons_of_drops},
    error::{Error, Errors},
};

/// Bytes of a packet that its line is made of: every header that is read.
const LINE_BYTES: u32 = 256;

/// Writes packets as pcapng until the agent or the user ends.
///
/// # Errors
/// No agent answers, the filter is not possible, or the file can't be written.
pub fn capture(args: &CaptureArgs) -> Result<(), Errors> {
    let mut target: Box<dyn Write> = match &args.write {
        Some(file) => Box::new(create(file)?),
        None if io::stdout().is_terminal() => {
            return Err(Error::usage("a capture is no text for a terminal")
                .hint("write it to a file with --write FILE, or pipe it: `forwarder capture | wireshark -k -i -`")
                .into());
        }
        None => Box::new(io::stdout()),
    };
    let request = request(&args.filter, args.snap);
    ask::stream(
        &args.agent.socket,
        CAPTURE_PATH,
        &request,
        args.filter.duration,
        |chunk| {
            match target.write_all(chunk).and_then(|()| target.flush()) {
                Ok(()) => Ok(ControlFlow::Continue(())),
                // Wireshark was closed.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
                Err(error) => Err(Error::failed(format!("cannot write the capture: {error}"))),
            }
        },
    )
}

fn create(file: &Path) -> Result<File, Error> {
    File::create(file).map_err(|error| Error::usage(format!("cannot write {}: {error}", file.display())))
}

/// Prints packets until the agent or the user ends.
///
/// # Errors
/// As [`capture`].
pub fn trace(args: &TraceArgs) -> Result<(), Errors> {
    let is_json = args.output.output == OutputFormat::Json;
    let request = request(&args.filter, LINE_BYTES);
    let mut rest = Vec::new();
    ask::stream(
        &args.agent.socket,
        TRACE_PATH,
        &request,
        args.filter.duration,
        |chunk| {
            rest.extend_from_slice(chunk);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let line = line.trim_ascii_end();
                if is_json {
                    output::text(&String::from_utf8_lossy(line))?;
                    continue;
                }
                let packet: TracedPacket = serde_json::from_slice(line).map_err(|error| {
                    Error::failed(format!("the agent's answer is of another shape: {error}"))
                        .hint("the agent is of another version: use its own binary, or restart it")
                })?;
                output::text(&packet.to_string())?;
            }
            Ok(ControlFlow::Continue(()))
        },
    )
}

fn request(args: &CaptureFilterArgs, snap_bytes: u32) -> CaptureRequest {
    CaptureRequest {
        network: args.network,
        port: args.port,
        protocol: args
            .protocol
            .map(|protocol| protocol.protocol().name().to_owned()),
        reasons: if args.dropped {
            reasons_of_drops()
        } else {
            args.reasons.clone()
        },
        one_in: Some(args.one_in),
        snap_bytes: Some(snap_bytes),
        packets: args.count,
    }
}
