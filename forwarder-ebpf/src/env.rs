//! `Env` over the kernel's forwarding table.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
        bpf_fib_lookup as FibLookup,
    },
    helpers::generated::{bpf_fib_lookup, bpf_ktime_get_coarse_ns},
};
use forwarder_common::{
    abi::flow::FlowKey,
    datapath::{Env, Hook, Route},
    wire::{LinkPair, MacAddress},
};

/// Linux's AF_INET.
const AF_INET: u8 = 2;

/// Parameters and answer of a route lookup. Aligned so that the compiler may clear it in 8-byte steps: the
/// verifier refuses misaligned stack accesses.
#[repr(C, align(8))]
struct Question(FibLookup);

impl Question {
    /// Link addresses of the answer.
    #[inline(always)]
    fn link(&self) -> LinkPair {
        let word = |byte: usize| {
            let pointer = (&raw const self.0).cast::<u16>();
            // SAFETY: inside the struct, whose fields from `smac` on are plain bytes. Volatile, or the compiler
            // reads the addresses in 4-byte steps, which are misaligned on the stack.
            unsafe { pointer.wrapping_add(byte / 2).read_volatile() }
        };
        let mac = |byte: usize| MacAddress::from_words([word(byte), word(byte + 2), word(byte + 4)]);
        LinkPair::new(
            mac(core::mem::offset_of!(FibLookup, dmac)),
            mac(core::mem::offset_of!(FibLookup, smac)),
        )
    }
}

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
        // SAFETY: plain integers and arrays of them, for which zero is a value.
        let mut question: Question = unsafe { core::mem::zeroed() };
        let lookup = &mut question.0;
        lookup.family = AF_INET;
        lookup.l4_protocol = key.protocol as u8;
        lookup.sport = key.source_port.raw();
        lookup.dport = key.destination_port.raw();
        lookup.ifindex = self.ingress_ifindex;
        // The length stays zero: no MTU check, which the stack or the egress device makes.
        lookup.__bindgen_anon_3.ipv4_src = key.source.0.raw();
        lookup.__bindgen_anon_4.ipv4_dst = key.destination.0.raw();
        // SAFETY: context and parameter block are valid for the call.
        let answer = unsafe { bpf_fib_lookup(self.ctx, lookup, size_of::<FibLookup>() as i32, 0) } as u32;
        match answer {
            BPF_FIB_LKUP_RET_SUCCESS => Route::Neighbour {
                ifindex: question.0.ifindex,
                link: question.link(),
            },
            BPF_FIB_LKUP_RET_NO_NEIGH => Route::Interface {
                ifindex: question.0.ifindex,
            },
            BPF_FIB_LKUP_RET_FWD_DISABLED => Route::ForwardingDisabled,
            _ => Route::None,
        }
    }
    #[inline(always)]
    fn now_secs(&mut self) -> u32 {
        // SAFETY: a helper without parameters.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }
}
