//! What a listener with SYN cookies, or with a rate for its clients, does with the first packets of a connection.
//! Whole connections are in `crate::handshake`.

use forwarder_common::{
    abi::{
        flow::FlowKey,
        listener::{ListenerId, listener_flag},
        reason::Reason,
    },
    datapath::{
        Verdict,
        cookie::{self, Announced},
    },
    wire::{Be16, IpAddress},
};

use super::{
    CLIENT, Case, OTHER_CLIENT, SERVER, Step, TCP, Traffic, WEB, binding, from_client, from_server, syn,
    to_server, world,
};
use crate::{
    packet::{Builder, ETHERNET_LEN, TcpNumbers, fold, segment},
    tables::{CLIENT_SIDE, MemoryTables, SERVER_SIDE},
};

/// When these packets come.
const NOW_SECS: u32 = 100_000;
const FIRST: u32 = TcpNumbers::DEFAULT.sequence;

/// [`world`], whose web listener takes so many SYNs in a second before it sends cookies.
fn guarded(syns_per_cpu: u32) -> MemoryTables {
    let mut world = world();
    world.clock_secs = Some(NOW_SECS);
    world.settings.cookie_key = [1, 2];
    world.settings.least_mtu_bytes = 1500;
    for listener in world.listener_mut(WEB.listener) {
        listener.flags |= listener_flag::COOKIES;
        listener.syns_per_cpu = syns_per_cpu;
    }
    world
}

/// The cookie that [`CLIENT`] gets for a SYN without options.
fn cookie() -> u32 {
    let key = FlowKey {
        source: IpAddress::from(*CLIENT.ip()),
        destination: IpAddress::from(*WEB.vip().ip()),
        source_port: Be16::new(CLIENT.port()),
        destination_port: Be16::new(WEB.port),
        protocol: u32::from(TCP),
    };
    cookie::make([1, 2], &key, FIRST, &Announced::NOTHING, NOW_SECS)
}

/// A segment with these numbers.
fn numbered(packet: Builder, sequence: u32, acknowledgment: u32, window: u16) -> Builder {
    packet.numbers(TcpNumbers {
        sequence,
        acknowledgment,
        window,
    })
}

/// A SYN, and the answer with the cookie.
fn sent() -> Step {
    let packet = syn(WEB);
    let answer = from_client(segment::SYN_ACK, CLIENT, WEB)
        .link_swapped()
        .from(WEB.vip())
        .to(CLIENT)
        .ttl(64)
        .tcp_options(vec![2, 4, 0x05, 0xb4]);
    let answer = numbered(answer, cookie(), FIRST.wrapping_add(1), 0);
    Step::new(
        &CLIENT_SIDE,
        packet.build(),
        Verdict::TRANSMIT,
        Reason::SYN_COOKIE_SENT,
    )
    .out(answer.build())
    .counts(Traffic::CookieSent(WEB.listener))
}

/// The acknowledgment of a cookie.
fn acknowledgment(cookie: u32) -> Builder {
    let packet = from_client(segment::ACK, CLIENT, WEB);
    numbered(packet, FIRST.wrapping_add(1), cookie.wrapping_add(1), 1000)
}

/// It opens the flow, as the SYN that there was.
fn accepted() -> Step {
    let opening = to_server(&syn(WEB), binding(0), SERVER).tcp_options(vec![2, 4, 0x02, 0x18]);
    let opening = numbered(opening, FIRST, 0, 1000);
    Step::request(&acknowledgment(cookie()), &opening).counts(Traffic::Accepted(WEB.listener, WEB.backend))
}

/// The packet, of IPv4 and with a header of 20 bytes, that says that its TCP header has so many words of four bytes.
fn claiming(packet: &Builder, words: u8) -> Vec<u8> {
    const WORD: usize = ETHERNET_LEN + 20 + 12;
    const CHECKSUM: usize = ETHERNET_LEN + 20 + 16;
    let mut frame = packet.build();
    let word = |frame: &[u8], at: usize| u64::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let before = word(&frame, WORD);
    frame[WORD] = words << 4;
    // RFC 1624: the checksum is right, so that nothing else is wrong.
    let sum = 0xffff - word(&frame, CHECKSUM) + (0xffff - before) + word(&frame, WORD);
    frame[CHECKSUM..][..2].copy_from_slice(&(!fold(sum)).to_be_bytes());
    frame
}

/// Cases whose bytes depend on the clock.
fn timed(sentence: &str, world: MemoryTables) -> Case {
    let mut case = Case::new(sentence, world).v4_only();
    case.library_only = Some("the kernel's clock is another; see program_handshakes");
    case
}

pub(super) fn all() -> Vec<Case> {
    let mut lately = guarded(0);
    lately.syn_budgets[WEB.listener.0 as usize].cookie_secs = NOW_SECS - 128;
    let mut long_ago = guarded(0);
    long_ago.syn_budgets[WEB.listener.0 as usize].cookie_secs = NOW_SECS - 129;
    let mut limited = world();
    for listener in limited.listener_mut(WEB.listener) {
        listener.flags |= listener_flag::RATE;
        // None comes back, whatever the clock says.
        listener.source_flows_per_second = 0;
        listener.source_burst = 1;
        listener.source_bits_v4 = 96 + 31;
        listener.source_bits_v6 = 127;
    }
    let mut refilled = limited.clone();
    for listener in refilled.listener_mut(WEB.listener) {
        listener.source_flows_per_second = 1;
    }
    let other = from_client(segment::SYN, OTHER_CLIENT, WEB);
    let wrong = acknowledgment(cookie() ^ 1 << 9);
    let early = numbered(from_server(segment::ACK, WEB, binding(0)), 5, 6, 7);
    let mut without_backend = guarded(0);
    without_backend.backends[WEB.backend.0 as usize].state =
        forwarder_common::abi::backend::BackendState::UNHEALTHY;
    let reset = acknowledgment(cookie())
        .flags(segment::RST | segment::ACK)
        .link_swapped()
        .from(WEB.vip())
        .to(CLIENT)
        .ttl(64);
    let reset = numbered(reset, cookie().wrapping_add(1), FIRST.wrapping_add(1), 0);
    let opened = Step::request(&syn(WEB), &to_server(&syn(WEB), binding(0), SERVER)).counts(WEB.opened());
    let limited_too = Step::dropped(other.build(), Reason::SOURCE_RATE)
        .counts(Traffic::Limited(ListenerId(WEB.listener.0)));
    vec![
        timed(
            "A SYN beyond what a listener takes is answered with a cookie",
            guarded(0),
        )
        .then(sent()),
        timed(
            "The SYNs below that open flows, and of each second anew",
            guarded(1),
        )
        .then(opened.clone())
        .change(|world| {
            world.clock_secs = Some(NOW_SECS + 1);
        })
        .then(Step::request(&other, &to_server(&other, binding(1), SERVER)).counts(WEB.opened())),
        timed(
            "A cookie that comes back opens the flow with the SYN that there was",
            guarded(0),
        )
        .all([sent(), accepted()]),
        timed("A cookie is good for two minutes and no longer", guarded(0))
            .then(sent())
            .change(|world| world.clock_secs = Some(NOW_SECS + 128))
            .then(
                Step::dropped(acknowledgment(cookie()).build(), Reason::SYN_COOKIE_INVALID)
                    .counts(Traffic::CookieInvalid(WEB.listener)),
            ),
        timed(
            "An acknowledgment is no cookie of ours while some are under way",
            lately,
        )
        .then(
            Step::dropped(wrong.build(), Reason::SYN_COOKIE_INVALID)
                .counts(Traffic::CookieInvalid(WEB.listener)),
        ),
        timed(
            "An acknowledgment long after the last cookie is what it always was",
            long_ago,
        )
        .then(Step::dropped(wrong.build(), Reason::NOT_A_SYN)),
        Case::new(
            "Where cookies are, a SYN whose header is longer than the packet, or shorter than a header, is none",
            guarded(0),
        )
        .all([
            Step::dropped(claiming(&syn(WEB), 6), Reason::NOT_A_SYN),
            Step::dropped(claiming(&syn(WEB), 15), Reason::NOT_A_SYN),
            Step::dropped(claiming(&syn(WEB), 4), Reason::NOT_A_SYN),
        ]),
        timed("Before a backend has answered, only that is sent on", guarded(0)).all([
            sent(),
            accepted(),
            Step::dropped(early.build(), Reason::HANDSHAKE_PENDING).by(&SERVER_SIDE),
        ]),
        timed(
            "A client whose cookie comes back to no backend gets a reset that it takes",
            without_backend,
        )
        .all([
            sent(),
            Step::new(
                &CLIENT_SIDE,
                acknowledgment(cookie()).build(),
                Verdict::TRANSMIT,
                Reason::NO_BACKEND,
            )
            .out(reset.build())
            .counts(Traffic::AcceptedAndRefused(WEB.listener)),
        ]),
        Case::new("Clients of one prefix that open too fast are dropped", limited)
            .all([opened.clone(), limited_too.clone()]),
        Case::new(
            "A second that another CPU has begun first does not fill a prefix's bucket",
            refilled,
        )
        .then(opened)
        .change(|world| {
            for bucket in world.source_rates.values_mut() {
                // So many that the kernel's clock does not get there meanwhile.
                bucket.second = bucket.second.wrapping_add(600);
            }
        })
        .then(limited_too),
    ]
}
