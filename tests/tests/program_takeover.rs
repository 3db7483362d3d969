//! Ring 2: the list of free flows while an agent takes over from another.

// Helpers of tests, which clippy does not know as such.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use aya::Ebpf;
use forwarder_common::abi::flow::FlowId;
use forwarder_tests::{program::with_kernel, tables::SIZES};
use forwarder_user::datapath::{
    free_list::Handover,
    maps::{self, FlowMaps},
    object,
    pin::PinDirectory,
};

/// Pins of this test, which are gone with it.
struct Pins {
    directory: PinDirectory,
    path: PathBuf,
}

impl Pins {
    fn new() -> Self {
        let path = Path::new("/sys/fs/bpf").join(format!("fwd-takeover-{}", std::process::id()));
        Self {
            directory: PinDirectory::open(&path).unwrap(),
            path,
        }
    }

    /// What an agent does before its programs run: a new list beside the old ones. Programs, maps, old lists.
    fn load(&self) -> (Ebpf, FlowMaps, Vec<PathBuf>) {
        let (old, new) = self.directory.free_lists().unwrap();
        let mut ebpf = object::load_pinned(&SIZES, &self.directory, &new).unwrap();
        let (_, flows, _) = maps::take(&mut ebpf, &SIZES, Some(&self.directory)).unwrap();
        (ebpf, flows, old)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// All that programs with this list could still take, which is none then.
fn take_all(flows: &mut FlowMaps) -> Vec<FlowId> {
    std::iter::from_fn(|| flows.free.pop(0).ok().map(|id| id.0)).collect()
}

/// The new programs got the first 65 536 flows of the old list before they ran: of a small table all, and until the last
/// of the old programs was replaced, new connections were refused.
#[test]
fn old_and_new_programs_both_have_free_flows_while_an_agent_takes_over() {
    with_kernel(|_| {
        let pins = Pins::new();
        let (_first, mut old_flows, lists) = pins.load();
        let found = Handover::open(lists, SIZES.flows)
            .unwrap()
            .finish(&mut old_flows, Some(&pins.directory))
            .unwrap();
        assert_eq!(found, SIZES.flows);

        let (_second, mut new_flows, lists) = pins.load();
        assert_eq!(lists.len(), 1);
        let mut handover = Handover::open(lists, SIZES.flows).unwrap();
        handover.advance(&mut new_flows).unwrap();
        let (of_old, of_new) = (take_all(&mut old_flows), take_all(&mut new_flows));
        assert_eq!(of_old.len(), SIZES.flows as usize / 2);
        assert_eq!(of_new.len(), SIZES.flows as usize / 2);

        // Those that the old programs were left with are in no entry, so they are found; none is there twice.
        let found = handover.finish(&mut new_flows, Some(&pins.directory)).unwrap();
        assert_eq!(found as usize, of_old.len());
        let mut all = [take_all(&mut new_flows), of_new].concat();
        all.sort_unstable();
        assert_eq!(all, (0..SIZES.flows).map(FlowId).collect::<Vec<_>>());
    });
}
