//! Ring 2: what the agent writes into map memory is what the programs read.

use aya::maps::{Array, Map, MapData};
use forwarder_common::abi::{backend::BackendId, map_name};
use forwarder_tests::{program::with_kernel, tables::SIZES};
use forwarder_user::datapath::{maps, object, pod::AsPod};

/// Elements of an array map stand a multiple of 8 bytes apart; slots are 4 bytes. Written 4 bytes apart, the second
/// table of a group was all zeros, and the group had no backend after the first change of health.
#[test]
fn slots_written_through_memory_are_where_the_program_reads_them() {
    with_kernel(|_| {
        let mut ebpf = object::load(&SIZES).unwrap();
        let id = match ebpf.map(map_name::SLOTS).unwrap() {
            Map::Array(slots) => slots.info().unwrap().id(),
            other => panic!("{other:?}"),
        };
        let slots: Array<MapData, AsPod<BackendId>> =
            Map::Array(MapData::from_id(id).unwrap()).try_into().unwrap();
        let (control, _flows, _counters) = maps::take(&mut ebpf, &SIZES, None).unwrap();
        let table = [7, 8, 9].map(BackendId);
        control.slots.write(3, &table);
        let read: Vec<_> = (2..7).map(|index| slots.get(&index, 0).unwrap().0.0).collect();
        assert_eq!(read, [0, 7, 8, 9, 0]);
    });
}
