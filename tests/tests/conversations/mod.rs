//! Random connections that begin with a SYN cookie.

use forwarder_common::abi::backend::NatMode;
use forwarder_tests::{
    handshake::{Choices, Word},
    packet::segment,
    tables::Program,
};
use proptest::prelude::*;

/// Connections that begin with a SYN cookie.
pub(crate) fn choices() -> impl Strategy<Value = Choices> {
    let word = (
        any::<bool>(),
        prop::sample::select(vec![
            segment::ACK,
            segment::FIN,
            segment::ACK | 8,
            segment::RST | segment::ACK,
        ]),
        any::<u32>(),
        any::<u32>(),
        any::<u16>(),
        0_usize..1300,
        prop::collection::vec(any::<[u32; 2]>(), 0..5),
    );
    let word = word.prop_map(
        |(is_request, flags, offset, acknowledged, window, payload_len, blocks)| Word {
            is_request,
            flags,
            offset,
            acknowledged,
            window,
            payload_len,
            blocks,
        },
    );
    let numbers = (any::<u32>(), any::<u32>(), 100_u16..10_000);
    let scales = (
        prop::option::weighted(0.8, 0_u8..15),
        prop::option::weighted(0.8, 0_u8..15),
    );
    let ways = (
        prop::sample::select(vec![NatMode::FULL, NatMode::DNAT]),
        prop::sample::select(vec![Program::Native, Program::Generic]),
        any::<bool>(),
    );
    (
        ways,
        numbers,
        scales,
        any::<[bool; 2]>(),
        (1_u32..4, 1_u32..4),
        prop::collection::vec(word, 0..12),
    )
        .prop_map(|(ways, numbers, scales, flags, repetitions, talk)| Choices {
            nat: ways.0,
            program: ways.1,
            is_partial: ways.2,
            client_first: numbers.0,
            server_first: numbers.1,
            segment_size: numbers.2,
            client_scale: scales.0,
            server_scale: scales.1,
            is_selective: flags[0],
            has_time_stamps: flags[1],
            answers: repetitions.0,
            acknowledgments: repetitions.1,
            talk,
        })
}
