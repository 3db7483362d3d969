//! A frame in memory, and the walk over it as each of the programs would do it.

use std::marker::PhantomData;

use bytemuck::Pod;

use forwarder_common::{
    abi::{reason::Reason, settings::Settings},
    datapath::{ChecksumOffload, Env, Outcome, Packet, Stop, Tables, pipeline},
    wire::{
        Be16, Field16, WireHeader,
        checksum::{self, Delta},
        crc32c,
    },
};

use super::attach::AttachmentKind;

/// Runs the library on a frame as the program of this kind would: what becomes of it, and its bytes then. `env`
/// stands for the same hook.
pub fn forward<T: Tables, E: Env>(
    kind: AttachmentKind,
    frame: &[u8],
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> (Outcome, Vec<u8>) {
    run(Way::Any, kind, frame, tables, env, settings)
}

/// The same, but every packet takes the long way; see `datapath::express`.
pub fn forward_the_long_way<T: Tables, E: Env>(
    kind: AttachmentKind,
    frame: &[u8],
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> (Outcome, Vec<u8>) {
    run(Way::Long, kind, frame, tables, env, settings)
}

#[derive(Clone, Copy)]
enum Way {
    Any,
    Long,
}

fn run<T: Tables, E: Env>(
    way: Way,
    kind: AttachmentKind,
    frame: &[u8],
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> (Outcome, Vec<u8>) {
    match kind {
        AttachmentKind::XdpNative => run_as::<Native, T, E>(way, frame, tables, env, settings),
        AttachmentKind::XdpGeneric => run_as::<Generic, T, E>(way, frame, tables, env, settings),
        AttachmentKind::Tcx => run_as::<Tunnel, T, E>(way, frame, tables, env, settings),
    }
}

fn run_as<K: Kind, T: Tables, E: Env>(
    way: Way,
    frame: &[u8],
    tables: &mut T,
    env: &mut E,
    settings: &Settings,
) -> (Outcome, Vec<u8>) {
    let mut packet = MemoryPacket::<K>::new(frame.to_vec());
    let mut walk = left_over();
    let outcome = match way {
        Way::Any => pipeline::forward(&mut packet, tables, env, settings, || Some(&mut walk)),
        Way::Long => pipeline::the_walk(&mut packet, tables, env, settings, &mut walk),
    };
    (outcome, packet.bytes)
}

/// In the kernel a walk begins with what the CPU's last packet left, so nothing may depend on that.
fn left_over<W: Pod>() -> W {
    bytemuck::pod_read_unaligned(&vec![0xa5; size_of::<W>()])
}

/// How a program's packets treat checksums, and what they begin with.
pub trait Kind {
    const CHECKSUM_OFFLOAD: ChecksumOffload;
    const BEGINS_WITH_LINK: bool = true;
}

/// As in native XDP.
pub struct Native;
/// Without a link header, as the agent sends them.
pub struct Bare;
struct Generic;
struct Tunnel;

impl Kind for Native {
    const CHECKSUM_OFFLOAD: ChecksumOffload = ChecksumOffload::LostOnSend;
}

impl Kind for Bare {
    const CHECKSUM_OFFLOAD: ChecksumOffload = ChecksumOffload::Kernel;
    const BEGINS_WITH_LINK: bool = false;
}

impl Kind for Generic {
    const CHECKSUM_OFFLOAD: ChecksumOffload = ChecksumOffload::Kept;
}

impl Kind for Tunnel {
    const CHECKSUM_OFFLOAD: ChecksumOffload = ChecksumOffload::Kernel;
}

/// A frame in memory.
pub struct MemoryPacket<K> {
    pub bytes: Vec<u8>,
    kind: PhantomData<K>,
}

impl<K: Kind> MemoryPacket<K> {
    pub fn new(bytes: Vec<u8>) -> Self {
        let kind = PhantomData;
        Self { bytes, kind }
    }
}

impl<K: Kind> Packet for MemoryPacket<K> {
    const CHECKSUM_OFFLOAD: ChecksumOffload = K::CHECKSUM_OFFLOAD;

    fn header<H: WireHeader>(&mut self, offset: usize) -> Result<&mut H, Stop> {
        match self.bytes.get_mut(offset..offset + size_of::<H>()) {
            Some(bytes) => Ok(bytemuck::from_bytes_mut(bytes)),
            None => Err(Stop::pass(Reason::TRUNCATED)),
        }
    }

    fn frame_len(&self) -> usize {
        self.bytes.len()
    }

    fn begins_with_link(&mut self) -> bool {
        K::BEGINS_WITH_LINK
    }

    fn sum(&mut self, offset: usize, len: usize) -> Result<u32, Stop> {
        let Some(bytes) = self.bytes.get(offset..offset + len) else {
            return Err(Stop::pass(Reason::TRUNCATED));
        };
        let sum = bytes.chunks(2).fold(0, |sum, pair| {
            let word = u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            u32::from(checksum::fold(sum + u32::from(word)))
        });
        Ok(sum)
    }

    fn crc(&mut self, offset: usize, len: usize) -> Result<u32, Stop> {
        let bytes = self.bytes.get(offset..offset + len);
        bytes.map(crc32c::of).ok_or(Stop::pass(Reason::TRUNCATED))
    }

    fn adjust_checksum(
        &mut self,
        offset: usize,
        addresses: Delta,
        ports: Delta,
        is_optional: bool,
    ) -> Result<(), Stop> {
        let header = self.header::<Field16>(offset)?;
        let (old, zero) = (header.value, Be16::new(0));
        if is_optional && old == zero {
            return Ok(());
        }
        let new = addresses.and(ports).apply(old);
        // RFC 768: a computed checksum of zero is sent as all ones, as zero means "none".
        header.value = if is_optional && new == zero {
            Be16::new(0xffff)
        } else {
            new
        };
        Ok(())
    }

    fn replace_headers(
        &mut self,
        network_offset: u32,
        end: u32,
        len: u32,
        _to_v4: bool,
    ) -> Result<u32, Stop> {
        let there = end - network_offset;
        match K::CHECKSUM_OFFLOAD {
            // As the kernel's helpers do: between the link header and what follows.
            ChecksumOffload::Kernel => {
                let room = std::iter::repeat_n(0, len as usize);
                self.bytes.splice(network_offset as usize..end as usize, room);
                Ok(network_offset + len)
            }
            _ if len <= there => Ok(end),
            _ => {
                self.move_start(-((len - there) as i32))?;
                Ok(end + len - there)
            }
        }
    }

    fn move_start(&mut self, by: i32) -> Result<(), Stop> {
        let distance = by.unsigned_abs() as usize;
        if by < 0 {
            self.bytes.splice(..0, std::iter::repeat_n(0, distance));
        } else if distance <= self.bytes.len() {
            self.bytes.drain(..distance);
        } else {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    fn cut(&mut self, len: usize) -> Result<(), Stop> {
        if len > self.bytes.len() {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        self.bytes.truncate(len);
        Ok(())
    }

    fn resize(&mut self, _kept: usize, len: usize) -> Result<(), Stop> {
        self.bytes.resize(len, 0);
        Ok(())
    }

    fn grow(&mut self, network_offset: usize, front: usize) -> Result<(), Stop> {
        if network_offset > self.bytes.len() {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        self.bytes
            .splice(network_offset..network_offset, std::iter::repeat_n(0, front));
        Ok(())
    }
}
