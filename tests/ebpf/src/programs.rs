//! The programs and their maps; for BPF only.

use core::{ffi::c_void, mem::offset_of};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md},
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_head},
    macros::{classifier, map, xdp},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, Queue},
    programs::{TcContext, XdpContext},
};
use forwarder_bench_ebpf::{Arrivals, CHECKED_BYTES, FloorEntry, FloorKey, Scenario, TEMPLATE_BYTES};
use forwarder_common::{abi::flow::FlowEntry, wire::checksum::fold};

/// The benchmark says how many there are.
const FLOWS: u32 = 1;
const STATE_WORDS: usize = size_of::<FlowEntry>() / size_of::<u64>();

#[map]
static SCENARIO: Array<Scenario> = Array::with_max_entries(1, 0);
#[map]
static ARRIVALS: Array<Arrivals> = Array::with_max_entries(1, 0);
/// The program under test.
#[map]
static PROGRAM: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static FLOOR_FLOWS: HashMap<FloorKey, u32> = HashMap::with_max_entries(FLOWS, 0);
#[map]
static FLOOR_ENTRIES: LruHashMap<FloorKey, FloorEntry> = LruHashMap::with_max_entries(FLOWS, 0);
#[map]
static FLOOR_FREE: Queue<u32> = Queue::with_max_entries(FLOWS, 0);
/// As large as the data path's entry of a flow.
#[map]
static FLOOR_STATES: Array<[u64; STATE_WORDS]> = Array::with_max_entries(FLOWS, 0);
/// The interfaces of a gateway that is a wire.
#[map]
static WIRE: Array<[u32; 2]> = Array::with_max_entries(1, 0);
/// Packets and bytes, of two objects.
#[map]
static COUNTERS: PerCpuArray<[u64; 2]> = PerCpuArray::with_max_entries(2, 0);

/// A packet pointer from a field of the context; see `forwarder-ebpf/src/packet.rs`, where the same is explained.
#[inline(always)]
fn pointer<const OFFSET: usize>(ctx: *const c_void) -> usize {
    let pointer: usize;
    // SAFETY: reads a field of the context, which the kernel passes in and keeps while the program runs.
    unsafe {
        core::arch::asm!(
            "{pointer} = *(u32 *)({ctx} + {offset})",
            pointer = lateout(reg) pointer,
            ctx = in(reg) ctx,
            offset = const OFFSET,
            options(pure, readonly, nostack)
        );
    }
    pointer
}

/// The first bytes of the frame, if there are as many.
#[inline(always)]
pub(crate) fn start<T>(ctx: &XdpContext) -> Option<&'static mut T> {
    let data = pointer::<{ offset_of!(xdp_md, data) }>(ctx.as_ptr());
    let end = pointer::<{ offset_of!(xdp_md, data_end) }>(ctx.as_ptr());
    if data + size_of::<T>() > end {
        return None;
    }
    // SAFETY: just compared with the packet's end; integers of alignment 1 where it matters to the verifier.
    Some(unsafe { &mut *(data as *mut T) })
}

#[inline(always)]
fn frame_len(ctx: &XdpContext) -> u32 {
    let data = pointer::<{ offset_of!(xdp_md, data) }>(ctx.as_ptr());
    let end = pointer::<{ offset_of!(xdp_md, data_end) }>(ctx.as_ptr());
    (end - data) as u32
}

#[inline(always)]
fn scenario() -> Option<&'static mut Scenario> {
    // SAFETY: one benchmark at a time, on one CPU.
    SCENARIO.get_ptr_mut(0).map(|scenario| unsafe { &mut *scenario })
}

#[repr(C, packed)]
pub(crate) struct Words<const N: usize>(pub(crate) [u32; N]);

#[repr(C, packed)]
struct Checked([u64; CHECKED_BYTES / 8]);

/// Compares the last output with what it has to be.
#[inline(always)]
fn check(ctx: &XdpContext, scenario: &mut Scenario) {
    let mut difference = u64::from(frame_len(ctx) ^ scenario.output_len);
    match start::<Checked>(ctx) {
        Some(output) => {
            for number in 0..CHECKED_BYTES / 8 {
                difference |= ({ output.0 }[number] ^ scenario.expected[number]) & scenario.mask[number];
            }
        }
        None => difference = 1,
    }
    if difference == 0 {
        scenario.good += 1;
    } else {
        scenario.bad += 1;
    }
}

/// The place of a field in the scenario's frame.
#[inline(always)]
fn field<T>(scenario: &mut Scenario, mut offset: u32) -> *mut T {
    // SAFETY: arithmetic on one register. The verifier sees the bound, which the compiler would drop.
    unsafe {
        core::arch::asm!(
            "{offset} &= 255",
            offset = inlateout(reg) offset,
            options(pure, nomem, nostack)
        );
    }
    let frame: *mut u8 = (&raw mut scenario.frame).cast();
    frame.wrapping_add(offset as usize).cast()
}

/// Makes the scenario's frame one of the next flow.
#[inline(always)]
fn next_flow(scenario: &mut Scenario) {
    let flow = scenario.packets.wrapping_mul(scenario.stride) & scenario.flow_mask;
    scenario.packets += 1;
    if scenario.ports == 0 || scenario.other_ports == 0 {
        return;
    }
    let address = (scenario.first_address + flow / scenario.ports).to_be();
    let port = ((scenario.first_port + flow % scenario.ports) as u16).to_be();
    let other = ((scenario.first_other_port + flow % scenario.other_ports) as u16).to_be();
    let address_sum = (address & 0xffff) + (address >> 16);
    let ip_checksum = !fold(scenario.ip_sum + address_sum);
    let sum = scenario.transport_sum + address_sum + u32::from(port) + u32::from(other);
    let transport_checksum = !fold(sum);
    // SAFETY: within the frame and the room behind it, whatever the offset.
    unsafe { field::<u32>(scenario, scenario.address_offset).write_unaligned(address) };
    for (offset, value) in [
        (scenario.port_offset, port),
        (scenario.other_port_offset, other),
        (scenario.ip_checksum_offset, ip_checksum),
        (scenario.transport_checksum_offset, transport_checksum),
    ] {
        if offset != 0 {
            // SAFETY: as above.
            unsafe { field::<u16>(scenario, offset).write_unaligned(value) };
        }
    }
}

/// Writes the scenario's frame into the packet.
#[inline(always)]
fn write(ctx: &XdpContext, scenario: &Scenario) -> Option<()> {
    let frame = start::<Words<{ TEMPLATE_BYTES / 4 }>>(ctx)?;
    let words = (&raw mut frame.0).cast::<u32>();
    for number in 0..TEMPLATE_BYTES / 4 {
        // SAFETY: one of the words of `frame`.
        unsafe { words.add(number).write_unaligned(scenario.frame[number]) };
    }
    Some(())
}

/// Checks the last output, restores the frame and calls the program under test.
#[xdp(frags)]
pub(crate) fn bench_call(ctx: XdpContext) -> u32 {
    let Some(scenario) = scenario() else {
        return xdp_action::XDP_ABORTED;
    };
    if scenario.is_output != 0 {
        check(&ctx, scenario);
    }
    scenario.is_output = 1;
    let longer = frame_len(&ctx) as i32 - scenario.frame_len as i32;
    // SAFETY: the context is valid; pointers into the packet are made anew below.
    if longer != 0 && unsafe { bpf_xdp_adjust_head(ctx.ctx, longer) } != 0 {
        return xdp_action::XDP_ABORTED;
    }
    next_flow(scenario);
    if write(&ctx, scenario).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: context and map are valid; this returns only where there is no program.
    unsafe { PROGRAM.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// Sends a packet of the next flow; for live frames, whose memory comes round again as its last user left it.
#[xdp(frags)]
pub(crate) fn bench_generate(ctx: XdpContext) -> u32 {
    let Some(scenario) = scenario() else {
        return xdp_action::XDP_ABORTED;
    };
    next_flow(scenario);
    if write(&ctx, scenario).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: a helper without pointers.
    unsafe { bpf_redirect(scenario.ifindex, 0) as u32 }
}

/// Takes packets at the far end: checks, counts and drops those that end with the mark. Others are for the next program,
/// which may be one of these with another mark.
#[classifier]
pub(crate) fn bench_take(ctx: TcContext) -> i32 {
    let Some(arrivals) = ARRIVALS.get_ptr_mut(0) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: one benchmark at a time, on one CPU.
    let arrivals = unsafe { &mut *arrivals };
    let len = ctx.len();
    let Ok(mark) = ctx.load::<u64>((len as usize).wrapping_sub(8)) else {
        return TC_ACT_UNSPEC;
    };
    if mark != arrivals.mark {
        return TC_ACT_UNSPEC;
    }
    let addresses = len.wrapping_sub(arrivals.addresses_back) as usize;
    let (Ok(source), Ok(destination), Ok(port)) = (
        ctx.load::<u32>(addresses),
        ctx.load::<u32>(addresses + 4),
        ctx.load::<u16>(addresses + 8),
    ) else {
        return TC_ACT_UNSPEC;
    };
    (arrivals.last_source, arrivals.last_source_port) = (source, port);
    arrivals.last_destination = destination;
    let is_from_there = (source ^ arrivals.source) & arrivals.source_mask == 0;
    let is_to_there = (destination ^ arrivals.destination) & arrivals.destination_mask == 0;
    if len == arrivals.len && is_from_there && is_to_there {
        arrivals.good += 1;
    } else {
        arrivals.bad += 1;
    }
    TC_ACT_SHOT
}

/// Nothing.
#[xdp(frags)]
pub(crate) fn bench_empty(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

#[repr(C, packed)]
struct Link {
    destination: [u16; 3],
    source: [u16; 3],
}

/// Sends the frame back to where it came from.
#[xdp(frags)]
pub(crate) fn bench_swap(ctx: XdpContext) -> u32 {
    let Some(link) = start::<Link>(&ctx) else {
        return xdp_action::XDP_DROP;
    };
    let [a, b, c] = link.destination;
    let [d, e, f] = link.source;
    link.destination = [d, e, f];
    link.source = [a, b, c];
    xdp_action::XDP_TX
}

/// Ethernet, IPv4 without options, TCP.
#[repr(C, packed)]
struct Segment {
    link: [u32; 3],
    ethertype: u16,
    version: u8,
    tos: u8,
    total_len: u16,
    identification: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
    ports: u32,
    numbers: [u32; 2],
    flags: u16,
    window: u16,
    transport_checksum: u16,
    urgent: u16,
}

#[inline(always)]
const fn key(segment: &Segment) -> FloorKey {
    FloorKey {
        source: segment.source,
        destination: segment.destination,
        ports: segment.ports,
        protocol: segment.protocol as u32,
    }
}

/// A segment that could be anybody's: IPv4 without options, TCP, whole.
#[inline(always)]
fn segment(ctx: &XdpContext) -> Option<&'static mut Segment> {
    let segment = start::<Segment>(ctx)?;
    let is_plain = segment.ethertype == 0x0800_u16.to_be()
        && segment.version == 0x45
        && segment.protocol == 6
        && segment.fragment & 0xff3f_u16.to_le() == 0
        && segment.ttl > 1;
    is_plain.then_some(segment)
}

/// Parses, looks one flow up in a hash and its entry in an LRU, rewrites, updates the checksums, counts twice.
#[xdp(frags)]
pub(crate) fn bench_minimal(ctx: XdpContext) -> u32 {
    let len = u64::from(frame_len(&ctx));
    let Some(segment) = segment(&ctx) else {
        return xdp_action::XDP_PASS;
    };
    let key = key(segment);
    // SAFETY: nobody changes the maps during the benchmark.
    let Some(_number) = (unsafe { FLOOR_FLOWS.get(&key) }) else {
        return xdp_action::XDP_DROP;
    };
    // SAFETY: as above.
    let Some(entry) = (unsafe { FLOOR_ENTRIES.get(&key) }) else {
        return xdp_action::XDP_DROP;
    };
    segment.link = [entry.link[0], entry.link[1], entry.link[2]];
    segment.source = entry.source;
    segment.destination = entry.destination;
    segment.ports = entry.ports;
    segment.ttl -= 1;
    // The TTL is the low byte, in memory, of its word.
    let ttl_delta = 0xffff - 1;
    segment.checksum = !fold(u32::from(!segment.checksum) + entry.address_delta + ttl_delta);
    segment.transport_checksum =
        !fold(u32::from(!segment.transport_checksum) + entry.address_delta + entry.port_delta);
    for number in 0..2 {
        if let Some(counters) = COUNTERS.get_ptr_mut(number) {
            // SAFETY: this CPU's own.
            let counters = unsafe { &mut *counters };
            counters[0] += 1;
            counters[1] += len;
        }
    }
    xdp_action::XDP_TX
}

/// Hands each frame over to the other interface as it is.
#[xdp(frags)]
pub(crate) fn bench_wire(ctx: XdpContext) -> u32 {
    let Some([near, far]) = WIRE.get(0).copied() else {
        return xdp_action::XDP_ABORTED;
    };
    let other = if ctx.ingress_ifindex() as u32 == near {
        far
    } else {
        near
    };
    // SAFETY: takes two numbers.
    unsafe { bpf_redirect(other, 0) as u32 }
}

/// A new flow's inserts: a number from a queue, one key, or two, and the entry that the number stands for.
#[inline(always)]
fn insert(ctx: &XdpContext, has_second: bool, has_entry: bool) -> u32 {
    let Some(segment) = segment(ctx) else {
        return xdp_action::XDP_PASS;
    };
    let Ok(Some(number)) = FLOOR_FREE.pop() else {
        return xdp_action::XDP_DROP;
    };
    let mut key = key(segment);
    if FLOOR_FLOWS.insert(&key, &number, u64::from(BPF_NOEXIST)).is_err() {
        return xdp_action::XDP_DROP;
    }
    if has_second {
        core::mem::swap(&mut key.source, &mut key.destination);
        if FLOOR_FLOWS.insert(&key, &number, u64::from(BPF_NOEXIST)).is_err() {
            return xdp_action::XDP_DROP;
        }
    }
    if !has_entry {
        return xdp_action::XDP_TX;
    }
    let Some(state) = FLOOR_STATES.get_ptr_mut(number) else {
        return xdp_action::XDP_DROP;
    };
    let addresses = u64::from(key.source) << 32 | u64::from(key.destination);
    for word in 0..STATE_WORDS {
        // SAFETY: within the entry, whose number nobody else has. Volatile, or it would be a call of a function that BPF
        // has not.
        unsafe { core::ptr::addr_of_mut!((*state)[word]).write_volatile(addresses) };
    }
    xdp_action::XDP_TX
}

#[xdp(frags)]
pub(crate) fn bench_insert(ctx: XdpContext) -> u32 {
    insert(&ctx, false, true)
}

#[xdp(frags)]
pub(crate) fn bench_insert_two(ctx: XdpContext) -> u32 {
    insert(&ctx, true, true)
}

#[xdp(frags)]
pub(crate) fn bench_insert_key(ctx: XdpContext) -> u32 {
    insert(&ctx, false, false)
}

#[xdp(frags)]
pub(crate) fn bench_insert_keys(ctx: XdpContext) -> u32 {
    insert(&ctx, true, false)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends its helpers to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
