//! `Env` over the kernel's forwarding table.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
        bpf_fib_lookup as FibLookup,
    },
    helpers::generated::{bpf_fib_lookup, bpf_skb_load_bytes, bpf_xdp_load_bytes},
};
use forwarder_common::{
    abi::{
        flow::FlowKey,
        fragment::{HELD_BYTES, HeldKind},
        reason::Reason,
        settings::Settings,
    },
    datapath::{Env, Hook, Outcome, Packet, Route, Stop, Tables, Walk, fragment, next_hop},
    wire::{Be32, LinkPair, MacAddress},
};

use crate::{
    capture, functions,
    maps::{self, KernelTables},
    packet::masked,
};

/// Linux's AF_INET.
const AF_INET: u8 = 2;
/// Linux's AF_INET6.
const AF_INET6: u8 = 10;

/// The kernel around a packet.
pub(crate) struct KernelEnv {
    /// The program's context, which the helpers ask for.
    pub(crate) ctx: *mut c_void,
    pub(crate) hook: Hook,
    pub(crate) ingress_ifindex: u32,
}

impl Env for KernelEnv {
    #[inline(always)]
    fn hook(&self) -> Hook {
        self.hook
    }

    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        self.ingress_ifindex
    }

    #[inline(always)]
    fn route(&mut self, key: &FlowKey) -> Route {
        // In a map, as the stack is short, and the verifier refuses misaligned accesses there, which the compiler
        // makes.
        let Some(lookup) = maps::scratch() else {
            return Route::None;
        };
        // SAFETY: this CPU's own buffer, larger than the struct, which consists of plain integers; nobody else uses it
        // until the answer is read.
        let lookup = unsafe { &mut *lookup.cast::<FibLookup>() };
        lookup.l4_protocol = key.protocol as u8;
        lookup.sport = key.source_port.raw();
        lookup.dport = key.destination_port.raw();
        // Zero, for no MTU check, which the stack or the egress device makes.
        lookup.__bindgen_anon_1.tot_len = 0;
        lookup.ifindex = KernelTables::bond_or(self.ingress_ifindex);
        // TOS or flow label.
        lookup.__bindgen_anon_2.flowinfo = 0;
        if key.is_v4() {
            lookup.family = AF_INET;
            lookup.__bindgen_anon_3.ipv4_src = key.source.low().0.raw();
            lookup.__bindgen_anon_4.ipv4_dst = key.destination.low().0.raw();
        } else {
            lookup.family = AF_INET6;
            lookup.__bindgen_anon_3.ipv6_src = key.source.0.map(Be32::raw);
            lookup.__bindgen_anon_4.ipv6_dst = key.destination.0.map(Be32::raw);
        }
        // SAFETY: context and parameter block are valid for the call.
        let answer = unsafe { bpf_fib_lookup(self.ctx, lookup, size_of::<FibLookup>() as i32, 0) } as u32;
        match answer {
            BPF_FIB_LKUP_RET_SUCCESS => Route::Neighbour {
                ifindex: lookup.ifindex,
                link: LinkPair::new(MacAddress::new(lookup.dmac), MacAddress::new(lookup.smac)),
            },
            BPF_FIB_LKUP_RET_NO_NEIGH => Route::Interface {
                ifindex: lookup.ifindex,
            },
            BPF_FIB_LKUP_RET_FWD_DISABLED => Route::ForwardingDisabled,
            _ => Route::None,
        }
    }

    #[inline(always)]
    fn find_next_hop<T: Tables>(
        &mut self,
        tables: &mut T,
        settings: &Settings,
        walk: &mut Walk,
    ) -> Result<(), Stop> {
        if self.hook == Hook::Tcx {
            return next_hop::find(tables, self, settings, walk);
        }
        maps::lend(walk);
        functions::next_hop(self)
    }

    #[inline(always)]
    fn pass_through<P: Packet, T: Tables>(
        &self,
        _: &mut P,
        _: &mut T,
        _: &Settings,
        walk: &Walk,
    ) -> Option<Outcome> {
        maps::lend(walk);
        functions::pass_through(self)
    }

    #[inline(always)]
    fn capture<P: Packet>(&mut self, _: &mut P, walk: &mut Walk) {
        maps::lend(walk);
        capture::before(self);
    }

    #[inline(always)]
    fn captured<P: Packet>(&mut self, _: &mut P, walk: &Walk, outcome: Outcome) {
        maps::lend(walk);
        capture::after(self, outcome);
    }

    #[inline(always)]
    fn hold<P: Packet>(&mut self, _: &mut P, walk: &Walk, why: HeldKind) -> bool {
        let frame = &walk.frame;
        if frame.total_len as usize > HELD_BYTES {
            return false;
        }
        let Some(mut entry) = maps::held_packet() else {
            return false;
        };
        // SAFETY: the kernel's memory, as large as the struct, for whose integers all bytes are values.
        let held = unsafe { &mut *entry.as_mut_ptr() };
        held.key = fragment::key(frame);
        held.kind = why;
        // The verifier refuses a length that may be zero; see `packet::forwarder_sum_xdp`.
        let len = masked::<{ HELD_BYTES as u64 - 1 }>(frame.total_len as usize - 1) as u32 + 1;
        held.len = len;
        let packet = held.packet.as_mut_ptr().cast();
        let offset = frame.network_offset;
        let loaded = match self.hook {
            // SAFETY: the helper writes `len` bytes at most, no more than the array has, and checks the offset.
            Hook::Tcx => unsafe { bpf_skb_load_bytes(self.ctx, offset, packet, len) },
            // SAFETY: as above.
            Hook::Xdp | Hook::XdpGeneric => unsafe {
                bpf_xdp_load_bytes(self.ctx.cast(), offset, packet, len)
            },
        };
        if loaded < 0 {
            entry.discard(0);
            return false;
        }
        entry.submit(0);
        true
    }

    #[inline(always)]
    fn icmp<P: Packet, T: Tables>(
        &mut self,
        _: &mut P,
        _: &mut T,
        _: &Settings,
        walk: &mut Walk,
    ) -> Result<(), Stop> {
        maps::lend(walk);
        functions::icmp(self)
    }

    #[inline(always)]
    fn answer_syn<P: Packet, T: Tables>(
        &mut self,
        _: &mut P,
        _: &mut T,
        _: &Settings,
        walk: &mut Walk,
    ) -> Outcome {
        maps::lend(walk);
        functions::answer_syn(self)
    }

    #[inline(always)]
    fn refuse<P: Packet, T: Tables>(
        &mut self,
        _: &mut P,
        _: &mut T,
        _: &Settings,
        walk: &Walk,
        reason: Reason,
    ) -> Outcome {
        maps::lend(walk);
        functions::refuse(self, reason)
    }
}
