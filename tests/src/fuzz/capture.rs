//! Capture files: those that the agent writes, read back by a reader of others, and those that somebody gives to
//! `forwarder explain --capture`.

use std::{io::Cursor, path::Path, time::Duration};

use bytemuck::Zeroable as _;
use forwarder_common::abi::capture::{CAPTURED_BYTES, CapturedPacket};
use forwarder_user::{
    capture::{TracedPacket, Writer},
    explain::{
        capture::{MAX_FRAMES, read_from},
        frame::PacketSummary,
    },
    state::names::Names,
};
use pcap_file::{
    DataLink,
    pcapng::{
        Block, PcapNgReader,
        blocks::{enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption},
    },
};

use super::Target;
use crate::cases::{self, Event};

pub(super) const CAPTURE: Target = Target {
    name: "capture",
    run: |bytes| {
        if let Some((kind, rest)) = bytes.split_first() {
            if kind & 1 == 0 {
                read(rest);
            } else {
                write(rest);
            }
        }
    },
    seeds,
};

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for case in cases::all().iter().step_by(5) {
        let mut file = Vec::new();
        let mut writer = Writer::new();
        writer.begin(&mut file).expect("a file");
        let mut classic: Vec<u8> = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        for event in &case.events {
            let Event::Packet(step) = event else {
                continue;
            };
            let len = step.frame.len() as u32;
            classic.extend([0, 0, len, len].iter().flat_map(|word| word.to_le_bytes()));
            classic.extend(&step.frame);
            let bytes = [&[step.reason.0 as u8, 1, 0, 0, 0, 0], &step.frame[..]].concat();
            seeds.push([&[1], &bytes[..]].concat());
            let packet = packet(&bytes);
            let time = Duration::new(1_700_000_000, 7);
            let traced = TracedPacket::of(&packet, time, 0, &Names::default());
            writer.write(&packet, time, &traced, &mut file).expect("a packet");
        }
        seeds.push([&[0], &file[..]].concat());
        seeds.push([&[0], &classic[..]].concat());
    }
    seeds
}

/// Reads what may be a capture.
fn read(bytes: &[u8]) {
    match read_from(Cursor::new(bytes), Path::new("fuzz.pcap")) {
        Ok(frames) => {
            assert!(frames.len() <= MAX_FRAMES);
            for frame in frames {
                assert!(!PacketSummary::of(&frame).protocol.is_empty());
            }
        }
        Err(error) => assert!(!error.what.is_empty()),
    }
}

/// A packet as the programs hand it over: reason, action, how much is cut off, what it becomes.
fn packet(bytes: &[u8]) -> Box<CapturedPacket> {
    let mut head = [0; 6];
    let (taken, frame) = bytes.split_at(bytes.len().min(6));
    head[..taken.len()].copy_from_slice(taken);
    let [reason, action, cut, listener, change, snap] = head;
    let mut packet = Box::new(CapturedPacket::zeroed());
    (packet.reason, packet.action) = (u32::from(reason % 64), u32::from(action % 4));
    (packet.listener, packet.backend) = (u32::from(listener), u32::from(listener >> 4));
    (packet.ingress_ifindex, packet.egress_ifindex) = (2, 3);
    packet.time_nanos = u64::from(snap) << 40;
    let mut after = frame.to_vec();
    if let Some(byte) = after.get_mut(usize::from(change)) {
        *byte ^= change;
    }
    after.truncate(frame.len() - usize::from(cut % 8).min(frame.len()));
    let most = if snap == 0 {
        CAPTURED_BYTES
    } else {
        usize::from(snap) * 8
    };
    let put = |room: &mut [u64], frame: &[u8]| {
        let captured = frame.len().min(most);
        bytemuck::cast_slice_mut::<_, u8>(room)[..captured].copy_from_slice(&frame[..captured]);
        captured as u32
    };
    packet.before_captured = put(&mut packet.before, frame);
    packet.after_captured = put(&mut packet.after, &after);
    (packet.before_len, packet.after_len) = (frame.len() as u32, after.len() as u32);
    packet
}

/// Writes a packet, and has somebody else read it.
fn write(bytes: &[u8]) {
    let packet = packet(bytes);
    let time = Duration::from_nanos(packet.time_nanos);
    let traced = TracedPacket::of(&packet, time, u64::from(packet.listener), &Names::default());
    check_line(&traced);
    let (mut writer, mut file) = (Writer::new(), Vec::new());
    writer.begin(&mut file).expect("the beginning of a file");
    // Twice, as an interface is described once.
    for _ in 0..2 {
        writer
            .write(&packet, time, &traced, &mut file)
            .expect("a packet in a file");
    }
    let comment = traced.comment(packet.reason);
    let before: &[u8] = &bytemuck::cast_slice(&packet.before)[..packet.before_captured as usize];
    let after: &[u8] = &bytemuck::cast_slice(&packet.after)[..packet.after_captured as usize];
    let mut wanted = vec![(before, packet.before_len, 1)];
    if traced.becomes.is_some() || traced.egress.is_some() {
        wanted.push((after, packet.after_len, 2));
    }
    wanted.extend(wanted.clone());

    let mut reader = PcapNgReader::new(&file[..]).expect("a section");
    let (mut names, mut links) = (Vec::new(), Vec::new());
    let mut found = 0;
    while let Some(block) = reader.next_block() {
        match block.expect("a block") {
            Block::InterfaceDescription(block) => {
                links.push(block.linktype);
                names.extend(block.options.iter().filter_map(|option| match option {
                    InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
                    _ => None,
                }));
            }
            Block::EnhancedPacket(block) => {
                let (bytes, len, direction) = wanted[found];
                found += 1;
                assert_eq!(&block.data[..], bytes);
                assert_eq!(block.original_len, len);
                let link = links[block.interface_id as usize];
                assert!(matches!(link, DataLink::ETHERNET | DataLink::RAW), "{link:?}");
                let mut options = block.options.iter();
                let is_said = options
                    .clone()
                    .any(|option| matches!(option, EnhancedPacketOption::Comment(text) if **text == comment));
                assert!(is_said, "the comment {comment:?}");
                let is_directed = options.any(
                    |option| matches!(option, EnhancedPacketOption::Flags(flags) if *flags == direction),
                );
                assert!(is_directed, "the direction {direction}");
            }
            _ => {}
        }
    }
    assert_eq!(found, wanted.len(), "packets");
    assert_eq!(names.len(), links.len(), "each interface has a name");
    assert_eq!(
        read_from(Cursor::new(&file), Path::new("own.pcapng"))
            .map_err(|error| error.what)
            .map(|frames| frames.len()),
        Ok(found)
    );
}

/// What is traced is one line, and means the same when it is read.
fn check_line(traced: &TracedPacket) {
    let line = serde_json::to_string(traced).expect("JSON");
    assert!(!line.contains('\n'));
    let again: TracedPacket = serde_json::from_str(&line).expect("what was just written");
    assert_eq!(*traced, again);
    assert!(
        !traced
            .to_string()
            .contains(|character: char| character.is_control() && character != '\n')
    );
}
