//! What the benchmark and its programs in the kernel tell each other.
#![no_std]

use bytemuck::{Pod, Zeroable};

/// Bytes of a frame that are written anew for each packet: all headers that any program changes. Frames are longer.
pub const TEMPLATE_BYTES: usize = 192;
/// Bytes of an output that are looked at.
pub const CHECKED_BYTES: usize = 128;
/// Words of [`Scenario::frame`]: the template, and room behind it for offsets that the verifier cannot follow.
pub const FRAME_WORDS: usize = 66;

/// The packets of a scenario, and what has to become of them. Offsets are in bytes from the frame's start; zero: there
/// is no such field.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Scenario {
    /// The start of each frame, with zeros in the fields below.
    pub frame: [u32; FRAME_WORDS],
    pub expected: [u64; CHECKED_BYTES / 8],
    /// Ones where an output has to be as expected.
    pub mask: [u64; CHECKED_BYTES / 8],
    /// Length of each frame.
    pub frame_len: u32,
    /// Length of each output.
    pub output_len: u32,
    /// Where [`Flow`]'s fields stand: the last four bytes of an address, its port, and the port at the other end.
    pub address_offset: u32,
    pub port_offset: u32,
    pub other_port_offset: u32,
    pub ip_checksum_offset: u32,
    pub transport_checksum_offset: u32,
    /// Unfolded sums, in machine order, of what the two checksums cover besides those fields.
    pub ip_sum: u32,
    pub transport_sum: u32,
    /// Flow `n` has address `first_address + n / ports`, `first_port + n % ports` and `first_other_port + n %
    /// other_ports`; numbers in machine order.
    pub first_address: u32,
    pub first_port: u32,
    pub ports: u32,
    pub first_other_port: u32,
    pub other_ports: u32,
    /// How many flows there are, a power of two, less one.
    pub flow_mask: u32,
    /// Packet `n` is of flow `n * stride & flow_mask`; odd.
    pub stride: u32,
    /// The next packet's number.
    pub packets: u32,
    /// Non-zero: the buffer holds an output.
    pub is_output: u32,
    /// Outputs that were as they have to be, and others.
    pub good: u32,
    pub bad: u32,
    /// Where a generated packet goes.
    pub ifindex: u32,
    pub reserved: u32,
}

/// What packets that arrive at the far end have to be, and how many were.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Arrivals {
    /// The last eight bytes of all packets sent, in machine order.
    pub mark: u64,
    /// Packets that were as they have to be, and others that end with the mark.
    pub good: u64,
    pub bad: u64,
    /// Length of the frame.
    pub len: u32,
    /// How far from the end the inner IPv4 addresses stand, source first.
    pub addresses_back: u32,
    /// What they have to be, and ones where they have to be as said.
    pub source: u32,
    pub source_mask: u32,
    pub destination: u32,
    pub destination_mask: u32,
    /// Both addresses of the last packet, and its source port.
    pub last_source: u32,
    pub last_destination: u32,
    pub last_source_port: u16,
    pub reserved: [u16; 3],
}

/// A flow of the minimal program, by addresses and ports as they stand in a packet. Aligned as the verifier wants it on
/// the stack.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FloorKey {
    pub source: u32,
    pub destination: u32,
    pub ports: u32,
    pub protocol: u32,
}

/// What the minimal program makes of a flow's packets; as they stand in a packet.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FloorEntry {
    pub link: [u32; 3],
    pub source: u32,
    pub destination: u32,
    pub ports: u32,
    /// What the new addresses change in a sum, and the new ports; folded.
    pub address_delta: u32,
    pub port_delta: u32,
}

/// Length of the frames of a flood, padding included.
pub const FLOOD_BYTES: usize = 96;
/// Words of [`Flood::frame`]: the frame, and room behind it for offsets that the verifier cannot follow.
pub const FLOOD_WORDS: usize = 34;

/// The frames of a flood. Offsets are in bytes from the frame's start; zero: there is no such field.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Flood {
    /// Each frame, with zeros in the fields below.
    pub frame: [u32; FLOOD_WORDS],
    /// Frames so far.
    pub frames: u64,
    /// Where they go.
    pub ifindex: u32,
    /// The source's fixed bits, and those that are random; in machine order.
    pub network: u32,
    pub host_mask: u32,
    /// The source address, and 16 bits that are random: a port, an identifier, a number of fragments.
    pub address_offset: u32,
    pub number_offset: u32,
    pub ip_checksum_offset: u32,
    pub transport_checksum_offset: u32,
    /// Unfolded sums, in machine order, of what the two checksums cover besides those fields.
    pub ip_sum: u32,
    pub transport_sum: u32,
    /// One where a checksum covers the field, else zero. That of IP covers the address.
    pub is_number_in_ip: u32,
    pub is_address_in_transport: u32,
    pub is_number_in_transport: u32,
}
