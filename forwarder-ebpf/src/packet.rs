//! `Packet` over an XDP frame and over a socket buffer.
//!
//! The only code that turns packet pointers into references. A reference is made after its own bounds check,
//! in the pattern that the verifier recognises: pointer plus constant compared with the packet's end.

use core::{ffi::c_void, mem::offset_of};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_PSEUDO_HDR,
        bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
        bpf_hdr_start_off::BPF_HDR_START_NET,
        xdp_md,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_change_proto,
        bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_load_bytes_relative, bpf_skb_pull_data,
        bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
    },
    programs::{TcContext, XdpContext},
};
use forwarder_common::{
    abi::{flow::FlowId, reason::Reason, settings::Settings},
    datapath::{ChecksumOffload, Hook, Packet, Stop, Tables, Walk, handshake, overlay, translate},
    wire::{
        Field16, LinkPair, WireHeader,
        checksum::{Delta, fold},
        crc32c,
        ethernet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, EthernetHeader},
    },
};

use crate::{functions, maps};

/// Largest offset of anything that is read: keeps offsets within what the verifier tracks (MAX_PACKET_OFF,
/// 65 535) when a length from the packet went into one.
const OFFSET_MASK: u64 = 0x3fff;

/// Keeps lengths within the scratch buffer.
const SCRATCH_MASK: u64 = 511;
/// Size of the scratch buffer in 8-byte words: a block and its padding.
pub(crate) const SCRATCH_WORDS: usize = 65;
/// Bytes summed at once: a multiple of four, and no more than the kernel's helper takes in one call (512, its
/// own buffer).
const BLOCK: u32 = 508;
/// Enough blocks for a jumbo frame of 9000 bytes.
const BLOCKS: u32 = 18;

/// `BPF_F_MARK_MANGLED_0` (linux/bpf.h): leave a checksum of zero alone, write a computed zero as all ones.
const MARK_MANGLED_0: u64 = 1 << 5;

/// A packet pointer from the field at `OFFSET` bytes of a program's context.
///
/// The fields are 32 bits wide, and the kernel replaces the load by one of a pointer. A compiler that knows the
/// width clears the upper half by shifts wherever it likes, which the verifier refuses ("pointer arithmetic on
/// pkt_end prohibited", Linux 6.18). So the load is assembly, whose result is a 64-bit number.
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

/// A number that the verifier sees to be at most `MASK`. The mask is assembly, as the compiler would drop one
/// that it knows to change nothing, and the verifier of Linux 6.1 does not infer the bound.
#[inline(always)]
pub(crate) fn masked<const MASK: u64>(mut number: usize) -> usize {
    // SAFETY: arithmetic on one register.
    unsafe {
        core::arch::asm!(
            "{number} &= {mask}",
            number = inlateout(reg) number,
            mask = const MASK,
            options(pure, nomem, nostack)
        );
    }
    number
}

/// A pointer to `size` bytes at `offset`, if they lie within `data..data_end`.
#[inline(always)]
fn bounded(data: usize, data_end: usize, offset: usize, size: usize) -> Option<usize> {
    let start = data + masked::<OFFSET_MASK>(offset);
    if start + size > data_end {
        None
    } else {
        Some(start)
    }
}

/// Folded sum of a frame's bytes; negative when there are fewer. The function of a hook: its name, the context's
/// type, and the helper that copies bytes of a frame.
///
/// A function of its own in BPF as well: inlined, the verifier follows every number of blocks to the program's
/// end (more than 1 000 000 instructions, Linux 6.18).
macro_rules! sum_function {
    ($sum:ident $context:ty, $load:expr) => {
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $sum(ctx: *mut $context, mut offset: u32, mut left: u32) -> i64 {
            let Some(scratch) = maps::scratch() else {
                return -1;
            };
            let mut total = 0u32;
            for _ in 0..BLOCKS {
                if left == 0 {
                    break;
                }
                // The verifier refuses a length that may be zero, and that of Linux 6.1 learns nothing from a
                // comparison with zero ("R3 min value is outside of the allowed memory range"): one is added behind
                // the mask.
                let len = masked::<SCRATCH_MASK>(left.min(BLOCK) as usize - 1) as u32 + 1;
                // SAFETY: `len` is at most SCRATCH_MASK + 1, less than the scratch buffer's size; the helper checks the
                // offset.
                if unsafe { $load(ctx.cast(), offset, scratch.cast(), len) } < 0 {
                    return -1;
                }
                // The zeros that pad the block.
                let padding = scratch
                    .cast::<u8>()
                    .wrapping_add(len as usize)
                    .cast::<u32>();
                // SAFETY: `len` is at most SCRATCH_MASK + 1, and there are 8 bytes behind that.
                unsafe { padding.write_unaligned(0) };
                let padded = masked::<SCRATCH_MASK>(len as usize + 3) & !3;
                let nothing = core::ptr::null_mut();
                // SAFETY: these bytes of the buffer were just written; the helper only reads them.
                let block = unsafe { bpf_csum_diff(nothing, 0, scratch.cast(), padded as u32, 0) } as u32;
                total = u32::from(fold(total + u32::from(fold(block))));
                offset += len;
                left -= len;
            }
            i64::from(total)
        }
    };
}

sum_function!(forwarder_sum_xdp xdp_md, bpf_xdp_load_bytes);
sum_function!(forwarder_sum_tcx __sk_buff, bpf_skb_load_bytes);

#[inline(always)]
fn sum_of(number: i64) -> Result<u32, Stop> {
    if number < 0 {
        Err(Stop::pass(Reason::TRUNCATED))
    } else {
        Ok(number as u32)
    }
}

/// CRC32c of a frame's bytes; negative when there are fewer. For the same reason a function of its own.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_crc(ctx: *mut xdp_md, mut offset: u32, mut left: u32) -> i64 {
    let Some(scratch) = maps::scratch() else { return -1 };
    let mut register = crc32c::START;
    for _ in 0..BLOCKS {
        if left == 0 {
            break;
        }
        // As in `forwarder_sum_xdp`.
        let len = masked::<SCRATCH_MASK>(left.min(BLOCK) as usize - 1) as u32 + 1;
        // SAFETY: `len` is at most SCRATCH_MASK + 1, less than the scratch buffer's size; the helper checks the offset.
        if unsafe { bpf_xdp_load_bytes(ctx, offset, scratch.cast(), len) } < 0 {
            return -1;
        }
        register = forwarder_crc_block(register, len) as u32;
        offset += len;
        left -= len;
    }
    i64::from(crc32c::finish(register))
}

/// The register after the first `len` bytes of the scratch buffer, at most a block; `register` before them.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_crc_block(mut register: u32, len: u32) -> i64 {
    let Some(scratch) = maps::scratch() else { return -1 };
    // SAFETY: this CPU's own buffer, larger than a block; nobody else uses it until the caller goes on.
    let bytes = unsafe { &*scratch.cast::<[u8; BLOCK as usize]>() };
    for (index, byte) in bytes.iter().enumerate() {
        if index as u32 >= len {
            break;
        }
        register = crc32c::step(register, *byte);
    }
    i64::from(register)
}

/// Moves `len` bytes of a frame to its start, from `from` bytes behind it; negative when there are fewer. A function of
/// its own as well: what follows would be looked at once for each round.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn forwarder_shift(ctx: *mut xdp_md, len: u32, from: u32) -> i64 {
    let mut packet = XdpPacket::<false> {
        ctx: XdpContext::new(ctx),
    };
    for word in 0..SHIFTED_WORDS {
        let place = word * size_of::<Field16>();
        if place >= len as usize {
            return 0;
        }
        let Ok(field) = packet.header::<Field16>(place + from as usize) else {
            return -1;
        };
        let value = field.value;
        match packet.header::<Field16>(place) {
            Ok(field) => field.value = value,
            Err(_) => return -1,
        }
    }
    -1
}

/// Enough 16-bit words for all headers of a packet inside of a tunnel.
const SHIFTED_WORDS: usize = 128;

/// A frame in XDP; `GENERIC`: the program runs in generic mode, on a socket buffer in disguise.
pub(crate) struct XdpPacket<const GENERIC: bool> {
    pub(crate) ctx: XdpContext,
}

impl<const GENERIC: bool> XdpPacket<GENERIC> {
    #[inline(always)]
    fn data(&self) -> usize {
        pointer::<{ offset_of!(xdp_md, data) }>(self.ctx.as_ptr())
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        pointer::<{ offset_of!(xdp_md, data_end) }>(self.ctx.as_ptr())
    }
}

impl<const GENERIC: bool> Packet for XdpPacket<GENERIC> {
    const CHECKSUM_OFFLOAD: ChecksumOffload = if GENERIC {
        ChecksumOffload::Kept
    } else {
        ChecksumOffload::LostOnSend
    };

    #[inline(always)]
    fn header<H: WireHeader>(&mut self, offset: usize) -> Result<&mut H, Stop> {
        match bounded(self.data(), self.data_end(), offset, size_of::<H>()) {
            // SAFETY: the bytes lie in the packet, `H` has alignment 1 and no invalid values, and the
            // borrow of `self` ends before the packet can move.
            Some(start) => Ok(unsafe { &mut *(start as *mut H) }),
            None => Err(Stop::pass(Reason::TRUNCATED)),
        }
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        // Of all buffers of the frame: the pointers are those of the first.
        // SAFETY: the context is the one the kernel passed in.
        unsafe { bpf_xdp_get_buff_len(self.ctx.ctx) as usize }
    }

    #[inline(always)]
    fn linear_len(&self) -> usize {
        self.data_end() - self.data()
    }

    #[inline(always)]
    fn sum(&mut self, offset: usize, len: usize) -> Result<u32, Stop> {
        sum_of(forwarder_sum_xdp(self.ctx.ctx, offset as u32, len as u32))
    }

    #[inline(always)]
    fn crc(&mut self, offset: usize, len: usize) -> Result<u32, Stop> {
        let crc = forwarder_crc(self.ctx.ctx, offset as u32, len as u32);
        if crc < 0 {
            Err(Stop::pass(Reason::TRUNCATED))
        } else {
            Ok(crc as u32)
        }
    }

    #[inline(always)]
    fn adjust_checksum(
        &mut self,
        _offset: usize,
        _addresses: Delta,
        _ports: Delta,
        _is_optional: bool,
    ) -> Result<(), Stop> {
        Err(Stop::drop(Reason::INTERNAL))
    }

    #[inline(always)]
    fn move_start(&mut self, by: i32) -> Result<(), Stop> {
        // SAFETY: the context is the one the kernel passed in; the helper checks the length.
        if unsafe { bpf_xdp_adjust_head(self.ctx.ctx, by) } < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    #[inline(always)]
    fn replace_headers(
        &mut self,
        network_offset: u32,
        end: u32,
        len: u32,
        _to_v4: bool,
    ) -> Result<u32, Stop> {
        let there = end - network_offset;
        if len <= there {
            return Ok(end);
        }
        let more = len - there;
        self.move_start(-(more as i32))?;
        Ok(end + more)
    }

    #[inline(always)]
    fn rewrite_seldom(&mut self, _settings: &Settings, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::seldom_xdp(self.ctx.ctx, GENERIC)
    }

    #[inline(always)]
    fn find_equal_error(&mut self, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::equal_xdp(self.ctx.ctx)
    }

    #[inline(always)]
    fn translate(&mut self, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::translate_xdp(self.ctx.ctx)
    }

    #[inline(always)]
    fn cut(&mut self, len: usize) -> Result<(), Stop> {
        let ctx = self.ctx.ctx;
        let cut = len as i32 - self.frame_len() as i32;
        // SAFETY: the context is the one the kernel passed in; the helper checks the length.
        if cut < 0 && unsafe { bpf_xdp_adjust_tail(ctx, cut) } < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    #[inline(always)]
    fn resize(&mut self, kept: usize, len: usize) -> Result<(), Stop> {
        let more = len as i32 - self.frame_len() as i32;
        if more <= 0 {
            return self.cut(len);
        }
        // At its front: behind packets of local sockets (veth) there is no room.
        self.move_start(-more)?;
        if forwarder_shift(self.ctx.ctx, kept as u32, more as u32) < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    #[inline(always)]
    fn admit_handshake<T: Tables>(
        &mut self,
        _: &mut T,
        _: &Settings,
        walk: &mut Walk,
        ended: Option<FlowId>,
    ) -> handshake::Admitted {
        maps::lend(walk);
        functions::admit_xdp(self.ctx.ctx, ended)
    }

    #[inline(always)]
    fn pass_handshake<T: Tables>(&mut self, _: &mut T, _: &Settings, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::pass_xdp(self.ctx.ctx, GENERIC)
    }

    #[inline(always)]
    fn next_option(&mut self, walk: &mut Walk, place: u32, len: u32) -> u32 {
        maps::lend(walk);
        maps::next_option(place, len)
    }

    #[inline(always)]
    fn grow(&mut self, _network_offset: usize, front: usize) -> Result<(), Stop> {
        self.move_start(-(front as i32))
    }

    #[inline(always)]
    fn recognise<T: Tables>(&mut self, _tables: &T, walk: &mut Walk) {
        maps::lend(walk);
        functions::recognise(self.ctx.ctx);
    }

    #[inline(always)]
    fn enter_tunnel<T: Tables>(
        &mut self,
        _tables: &mut T,
        _settings: &Settings,
        entrant: &overlay::Entrant,
    ) -> Result<(), Stop> {
        functions::enter_tunnel(self.ctx.ctx, entrant)
    }

    #[inline(always)]
    fn leave<T: Tables>(
        &mut self,
        _tables: &T,
        hook: Hook,
        _settings: &Settings,
        walk: &Walk,
    ) -> Result<(), Stop> {
        maps::lend(walk);
        functions::leave(self.ctx.ctx, hook)
    }
}

/// A packet in tcx.
pub(crate) struct SkbPacket {
    pub(crate) ctx: TcContext,
}

/// Bytes asked to be contiguous: Ethernet, IP and TCP headers with all options.
const HEADERS: u32 = 14 + 60 + 60;

impl SkbPacket {
    #[inline(always)]
    pub(crate) fn new(ctx: TcContext) -> Self {
        let packet = Self { ctx };
        let wanted = packet.ctx.len().min(HEADERS);
        if packet.data() + wanted as usize > packet.data_end() {
            // SAFETY: the context is the one the kernel passed in. Failure shows when headers are read.
            unsafe { bpf_skb_pull_data(packet.ctx.skb.skb, wanted) };
        }
        packet
    }

    #[inline(always)]
    fn data(&self) -> usize {
        pointer::<{ offset_of!(__sk_buff, data) }>(self.ctx.as_ptr())
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        pointer::<{ offset_of!(__sk_buff, data_end) }>(self.ctx.as_ptr())
    }
}

impl SkbPacket {
    /// Puts an empty Ethernet header before a packet that begins with IP; `false`: the kernel refuses.
    #[inline(always)]
    pub(crate) fn push_link_header(&mut self, is_v4: bool) -> bool {
        // SAFETY: the context is the one the kernel passed in.
        if unsafe { bpf_skb_change_head(self.ctx.skb.skb, EthernetHeader::LEN as u32, 0) } < 0 {
            return false;
        }
        let Ok(ethernet) = self.header::<EthernetHeader>(0) else {
            return false;
        };
        ethernet.ethertype = if is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        true
    }
}

impl Packet for SkbPacket {
    const CHECKSUM_OFFLOAD: ChecksumOffload = ChecksumOffload::Kernel;

    #[inline(always)]
    fn header<H: WireHeader>(&mut self, offset: usize) -> Result<&mut H, Stop> {
        match bounded(self.data(), self.data_end(), offset, size_of::<H>()) {
            // SAFETY: as in `XdpPacket::header`; what may move the bytes takes `&mut self`.
            Some(start) => Ok(unsafe { &mut *(start as *mut H) }),
            None => Err(Stop::pass(Reason::TRUNCATED)),
        }
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.ctx.len() as usize
    }

    /// Compares its start with that of the network header, as the device does not tell: the kernel gives packets of
    /// an xfrm interface the link header of the packet they came in (`xfrm4_remove_tunnel_encap` of Linux 6.12).
    #[inline(always)]
    fn begins_with_link(&mut self) -> bool {
        let mut network = LinkPair::default();
        // SAFETY: the context is the one the kernel passed in; the helper writes the bytes of `network`.
        let status = unsafe {
            bpf_skb_load_bytes_relative(
                self.ctx.as_ptr(),
                0,
                (&raw mut network).cast(),
                size_of::<LinkPair>() as u32,
                BPF_HDR_START_NET,
            )
        };
        // A frame may repeat its link addresses where an IP header would be.
        let is_ip = |first: u8| first >> 4 == 4 || first >> 4 == 6;
        let is_network = |start: &mut EthernetHeader| {
            let link = { start.link };
            link == network && is_ip(link.destination().octets()[0])
        };
        status < 0 || !self.header(0).is_ok_and(is_network)
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: the kernel passes a valid context.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    #[inline(always)]
    fn sum(&mut self, offset: usize, len: usize) -> Result<u32, Stop> {
        sum_of(forwarder_sum_tcx(self.ctx.skb.skb, offset as u32, len as u32))
    }

    #[inline(always)]
    fn crc(&mut self, _offset: usize, _len: usize) -> Result<u32, Stop> {
        // Never asked for where the kernel keeps the checksum.
        Err(Stop::drop(Reason::INTERNAL))
    }

    #[inline(always)]
    fn adjust_checksum(
        &mut self,
        offset: usize,
        addresses: Delta,
        ports: Delta,
        is_optional: bool,
    ) -> Result<(), Stop> {
        let skb = self.ctx.skb.skb;
        let zero = if is_optional { MARK_MANGLED_0 } else { 0 };
        let update = |delta: Delta, flags: u64| {
            // SAFETY: the context is the one the kernel passed in; the helper checks the offset.
            unsafe { bpf_l4_csum_replace(skb, offset as u32, 0, u64::from(delta.folded()), flags | zero) }
        };
        if update(addresses, u64::from(BPF_F_PSEUDO_HDR)) < 0 || update(ports, 0) < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    #[inline(always)]
    fn replace_headers(&mut self, network_offset: u32, end: u32, len: u32, to_v4: bool) -> Result<u32, Stop> {
        let skb = self.ctx.skb.skb;
        let difference = translate::DIFFERENCE as i32;
        let (ethertype, done) = if to_v4 {
            (ETHERTYPE_IPV4, -difference)
        } else {
            (ETHERTYPE_IPV6, difference)
        };
        // SAFETY: the context is the one the kernel passed in.
        if unsafe { bpf_skb_change_proto(skb, ethertype.raw(), 0) } < 0 {
            return Err(Stop::drop(Reason::UNTRANSLATABLE));
        }
        // The kernel knows headers without options only; what else is more or less comes behind those.
        let rest = len as i32 - (end - network_offset) as i32 - done;
        // SAFETY: as above; the helper checks the length.
        if rest != 0 && unsafe { bpf_skb_adjust_room(skb, rest, BPF_ADJ_ROOM_NET, 0) } < 0 {
            return Err(Stop::drop(Reason::UNTRANSLATABLE));
        }
        // Else they are there only if the packet was in one piece.
        // SAFETY: as above. Failure shows when headers are written.
        unsafe { bpf_skb_pull_data(skb, network_offset + len) };
        Ok(network_offset + len)
    }

    #[inline(always)]
    fn rewrite_seldom(&mut self, _settings: &Settings, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::seldom_tcx(self.ctx.skb.skb)
    }

    #[inline(always)]
    fn find_equal_error(&mut self, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::equal_tcx(self.ctx.skb.skb)
    }

    #[inline(always)]
    fn translate(&mut self, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::translate_tcx(self.ctx.skb.skb)
    }

    #[inline(always)]
    fn move_start(&mut self, _by: i32) -> Result<(), Stop> {
        // Never asked for where the kernel writes the link header.
        Err(Stop::drop(Reason::INTERNAL))
    }

    #[inline(always)]
    fn cut(&mut self, len: usize) -> Result<(), Stop> {
        // SAFETY: the context is the one the kernel passed in; the helper checks the length.
        if unsafe { bpf_skb_change_tail(self.ctx.skb.skb, len as u32, 0) } < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }

    #[inline(always)]
    fn resize(&mut self, _kept: usize, len: usize) -> Result<(), Stop> {
        self.cut(len)?;
        // SAFETY: the context is the one the kernel passed in. Failure shows when headers are read.
        unsafe { bpf_skb_pull_data(self.ctx.skb.skb, len as u32) };
        Ok(())
    }

    #[inline(always)]
    fn admit_handshake<T: Tables>(
        &mut self,
        _: &mut T,
        _: &Settings,
        walk: &mut Walk,
        ended: Option<FlowId>,
    ) -> handshake::Admitted {
        maps::lend(walk);
        functions::admit_tcx(self.ctx.skb.skb, ended)
    }

    #[inline(always)]
    fn pass_handshake<T: Tables>(&mut self, _: &mut T, _: &Settings, walk: &mut Walk) -> Result<(), Stop> {
        maps::lend(walk);
        functions::pass_tcx(self.ctx.skb.skb)
    }

    #[inline(always)]
    fn next_option(&mut self, walk: &mut Walk, place: u32, len: u32) -> u32 {
        maps::lend(walk);
        maps::next_option(place, len)
    }

    #[inline(always)]
    fn grow(&mut self, _network_offset: usize, front: usize) -> Result<(), Stop> {
        let skb = self.ctx.skb.skb;
        // Behind the link header.
        // SAFETY: the context is the one the kernel passed in; the helper checks the length.
        if unsafe { bpf_skb_adjust_room(skb, front as i32, BPF_ADJ_ROOM_MAC, 0) } < 0 {
            return Err(Stop::drop(Reason::INTERNAL));
        }
        Ok(())
    }
}
