//! A connection whose SYN is answered with a cookie, as both its ends would lead it, and what they must see.
//!
//! Frames depend on the cookie, and so on those before them and on the clock. So this is no list of cases but a
//! conversation, with whoever walks the packets: the library, or the kernel beside it.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use forwarder_common::{
    abi::{
        backend::{BackendState, NatMode},
        listener::{ListenerId, listener_flag},
        settings::flag,
        snat::FIRST_PORT,
    },
    datapath::Action,
};

use crate::{
    packet::{Builder, Checksum, ETHERNET_LEN, TcpNumbers, segment, wrong_checksums},
    tables::{CLIENT_SIDE, Link, MemoryTables, Program, SERVER_SIDE, mac_of},
};

const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 100), 80);
const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 10), 50000);
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 205), 8080);
const SNAT: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
const TCP: u8 = 6;
/// RFC 7323 §2.2: "none" where a window scale could be.
const NO_SCALE: u8 = 15;

/// Takes packets on their way.
pub trait Walker {
    /// What becomes of a frame that comes in by this link.
    ///
    /// # Errors
    /// Two of them disagree about it.
    fn walk(&mut self, program: Program, link: &Link, frame: &[u8]) -> Result<(Action, Vec<u8>)>;
}

/// What the ends choose.
#[derive(Clone, Debug)]
pub struct Choices {
    pub nat: NatMode,
    /// Which program sees the frames.
    pub program: Program,
    /// Checksums are left to a device, where that can be.
    pub is_partial: bool,
    pub client_first: u32,
    pub server_first: u32,
    pub segment_size: u16,
    /// At most 14; `None`: no scale.
    pub client_scale: Option<u8>,
    pub server_scale: Option<u8>,
    pub is_selective: bool,
    pub has_time_stamps: bool,
    /// The server sends its SYN and ACK so often.
    pub answers: u32,
    /// The client brings its cookie so often.
    pub acknowledgments: u32,
    /// What the ends then say: who, how far from its first number, how far it acknowledges, window, length, blocks.
    pub talk: Vec<Word>,
}

/// One segment of an open connection.
#[derive(Clone, Debug)]
pub struct Word {
    pub is_request: bool,
    pub flags: u8,
    pub offset: u32,
    pub acknowledged: u32,
    pub window: u16,
    pub payload_len: usize,
    /// Selective acknowledgments, as distances from the other's first number.
    pub blocks: Vec<[u32; 2]>,
}

impl Choices {
    /// An everyday connection.
    pub fn usual() -> Self {
        Self {
            nat: NatMode::FULL,
            program: Program::Native,
            is_partial: false,
            client_first: 0x1111_0000,
            server_first: 0xffff_fff0,
            segment_size: 1460,
            client_scale: Some(7),
            server_scale: Some(9),
            is_selective: true,
            has_time_stamps: true,
            answers: 1,
            acknowledgments: 1,
            talk: Vec::new(),
        }
    }

    fn checksum(&self) -> Checksum {
        if self.is_partial {
            Checksum::Partial
        } else {
            Checksum::Complete
        }
    }
}

/// Tables with a listener that answers every SYN with a cookie.
pub fn world(choices: &Choices) -> MemoryTables {
    let mut world = MemoryTables::new(SNAT, 2);
    world.settings.cookie_key = [0x0011_2233_4455_6677, 0x8899_aabb_ccdd_eeff];
    world.settings.least_mtu_bytes = 1450;
    if choices.is_partial {
        world.settings.flags |= flag::PARTIAL_CHECKSUMS;
    }
    let backend = world.add_backend(*SERVER.ip(), SERVER.port(), BackendState::HEALTHY);
    let listener = world.add_listener(*VIP.ip(), VIP.port(), TCP, choices.nat, &[backend; 4]);
    assert_eq!(listener, ListenerId(0));
    for entry in world.listener_mut(listener) {
        entry.flags |= listener_flag::COOKIES;
    }
    world
}

/// A TCP segment, read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Segment {
    /// Reads a frame of IPv4 without options; its checksums must be right, unless they are left to a device.
    fn read(frame: &[u8], is_partial: bool) -> Result<Self> {
        let wrong = wrong_checksums(frame);
        ensure!(wrong.is_empty() || is_partial, "wrong checksums: {wrong:?}");
        let ip = frame.get(ETHERNET_LEN..).context("an IP header")?;
        let total_len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        ensure!(
            total_len == ip.len(),
            "{total_len} bytes of IP in a frame with {}",
            ip.len()
        );
        let tcp = &ip[20..];
        let number = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let address = |at: usize, port: usize| {
            let address = Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
            SocketAddrV4::new(address, u16::from_be_bytes([tcp[port], tcp[port + 1]]))
        };
        let header_len = usize::from(tcp[12] >> 4) * 4;
        Ok(Self {
            source: address(12, 0),
            destination: address(16, 2),
            sequence: number(4),
            acknowledgment: number(8),
            flags: tcp[13],
            window: u16::from_be_bytes([tcp[14], tcp[15]]),
            options: tcp[20..header_len].to_vec(),
            payload: tcp[header_len..].to_vec(),
        })
    }
}

/// Options of a SYN, in Linux's order.
fn options(choices: &Choices, size: u16, scale: Option<u8>, is_selective: bool) -> Vec<u8> {
    let mut options = vec![2, 4];
    options.extend(size.to_be_bytes());
    match (is_selective, choices.has_time_stamps) {
        (true, true) => options.extend([4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 0]),
        (true, false) => options.extend([1, 1, 4, 2]),
        (false, true) => options.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 0]),
        (false, false) => {}
    }
    if let Some(scale) = scale {
        options.extend([1, 3, 3, scale]);
    }
    options
}

/// What the options of a SYN say: segment size, scale, whether selective acknowledgments are taken. Any other fails.
fn announced(mut options: &[u8]) -> Result<(Option<u16>, u8, bool)> {
    let mut found = (None, NO_SCALE, false);
    loop {
        options = match options {
            [] => return Ok(found),
            [1, rest @ ..] => rest,
            [2, 4, high, low, rest @ ..] => {
                found.0 = Some(u16::from_be_bytes([*high, *low]));
                rest
            }
            [3, 3, scale, rest @ ..] => {
                found.1 = *scale;
                rest
            }
            [4, 2, rest @ ..] => {
                found.2 = true;
                rest
            }
            other => anyhow::bail!("nobody asked for {other:?}"),
        };
    }
}

/// The scale that a cookie can say.
fn held(scale: Option<u8>) -> u8 {
    let known = [0, 2, 4, 6, 7, 8, 10];
    let below = |scale| known.into_iter().rfind(|known| *known <= scale);
    scale.map_or(NO_SCALE, |scale| below(scale).expect("zero is known"))
}

/// A window as the number of bytes that its receiver takes it for.
fn bytes(window: u16, scale: u8) -> u64 {
    if scale == NO_SCALE {
        u64::from(window)
    } else {
        u64::from(window) << scale
    }
}

struct Talk<'a, W> {
    choices: &'a Choices,
    walker: &'a mut W,
}

impl<W: Walker> Talk<'_, W> {
    fn of_client(&self, flags: u8, sequence: u32, acknowledgment: u32, window: u16) -> Builder {
        Builder::tcp(flags, CLIENT, VIP)
            .link(mac_of(*CLIENT.ip()), CLIENT_SIDE.mac)
            .numbers(TcpNumbers {
                sequence,
                acknowledgment,
                window,
            })
            .checksum(self.choices.checksum())
    }

    fn of_server(&self, flags: u8, sequence: u32, acknowledgment: u32, window: u16) -> Builder {
        Builder::tcp(flags, SERVER, self.binding())
            .link(mac_of(*SERVER.ip()), SERVER_SIDE.mac)
            .numbers(TcpNumbers {
                sequence,
                acknowledgment,
                window,
            })
            .checksum(self.choices.checksum())
    }

    /// What the server sees as its client.
    fn binding(&self) -> SocketAddrV4 {
        if self.choices.nat == NatMode::DNAT {
            CLIENT
        } else {
            SocketAddrV4::new(SNAT, FIRST_PORT)
        }
    }

    /// Sends a client's frame; what the server gets.
    fn up(&mut self, frame: &Builder) -> Result<Segment> {
        let out = self.send(&CLIENT_SIDE, frame)?;
        ensure!(
            (out.source, out.destination) == (self.binding(), SERVER),
            "{out:?}"
        );
        Ok(out)
    }

    /// Sends a server's frame; what the client gets.
    fn down(&mut self, frame: &Builder) -> Result<Segment> {
        let out = self.send(&SERVER_SIDE, frame)?;
        ensure!((out.source, out.destination) == (VIP, CLIENT), "{out:?}");
        Ok(out)
    }

    fn send(&mut self, link: &Link, frame: &Builder) -> Result<Segment> {
        let (action, out) = self.walker.walk(self.choices.program, link, &frame.build())?;
        ensure!(action == Action::Redirect, "{action:?} for {frame:?}");
        // Native XDP completes the checksum, generic XDP leaves that to the device.
        Segment::read(
            &out,
            self.choices.is_partial && self.choices.program == Program::Generic,
        )
    }

    /// Sends a frame of one side which must be dropped.
    fn lose(&mut self, link: &Link, frame: &Builder) -> Result<()> {
        let (action, _) = self.walker.walk(self.choices.program, link, &frame.build())?;
        ensure!(action == Action::Drop, "{action:?} for {frame:?}");
        Ok(())
    }
}

/// Leads a connection, and looks at all that comes out.
///
/// # Errors
/// Something else comes out than must.
pub fn converse<W: Walker>(choices: &Choices, walker: &mut W) -> Result<()> {
    let mut talk = Talk { choices, walker };
    let (isn, size) = (choices.client_first, choices.segment_size);
    let syn_options = options(choices, size, choices.client_scale, choices.is_selective);

    // 1. The SYN comes back with a cookie.
    let syn = talk
        .of_client(segment::SYN, isn, 0, 64240)
        .tcp_options(syn_options);
    let (action, out) = talk.walker.walk(choices.program, &CLIENT_SIDE, &syn.build())?;
    ensure!(action == Action::Transmit, "{action:?}");
    let answer = Segment::read(&out, choices.is_partial && choices.program == Program::Generic)?;
    ensure!((answer.source, answer.destination) == (VIP, CLIENT), "{answer:?}");
    ensure!(
        (answer.flags, answer.window) == (segment::SYN_ACK, 0),
        "{answer:?}"
    );
    ensure!(answer.acknowledgment == isn.wrapping_add(1), "{answer:?}");
    let our_scale = choices.client_scale.map_or(NO_SCALE, |_| 7);
    ensure!(
        announced(&answer.options)? == (Some(1410), our_scale, choices.is_selective),
        "{answer:?}"
    );
    let cookie = answer.sequence;
    let (next, ours) = (isn.wrapping_add(1), cookie.wrapping_add(1));

    // 2. With it the client opens the flow; data that it should not have sent yet it will send again.
    let client_scale = held(choices.client_scale);
    let window = 502;
    for repetition in 0..choices.acknowledgments.max(1) {
        let ack = talk
            .of_client(segment::ACK, next, ours, window)
            .payload(repetition as usize * 7);
        let opened = talk.up(&ack)?;
        ensure!(
            (opened.sequence, opened.flags) == (isn, segment::SYN),
            "{opened:?}"
        );
        ensure!(
            opened.payload.is_empty() && opened.acknowledgment == 0,
            "{opened:?}"
        );
        ensure!(
            u64::from(opened.window) == bytes(window, client_scale).min(0xffff),
            "{opened:?}"
        );
        let (told, scale, is_selective) = announced(&opened.options)?;
        let told = told.context("a segment size")?;
        let known = [216, 536, 1220, 1360, 1400, 1440, 1460, 8940];
        let wanted = known.into_iter().rfind(|known| *known <= size).unwrap_or(216);
        // A SYN towards a tunnel says less; there is none here, and no MTU.
        ensure!(told == wanted, "{told} of {size}");
        ensure!(
            (scale, is_selective) == (client_scale, choices.is_selective),
            "{opened:?}"
        );
    }
    // What cannot be sent on is not, and changes nothing.
    talk.lose(
        &CLIENT_SIDE,
        &talk.of_client(segment::ACK, next.wrapping_add(9), ours, 1),
    )?;
    talk.lose(
        &CLIENT_SIDE,
        &talk.of_client(segment::ACK, next, ours.wrapping_add(1), 1),
    )?;
    talk.lose(&CLIENT_SIDE, &talk.of_client(segment::SYN, isn, 0, 1))?;
    talk.lose(&SERVER_SIDE, &talk.of_server(segment::ACK, 5, 6, 7))?;

    // 3. The server's answer opens the client's window.
    let first = choices.server_first;
    // A scale is announced only to whoever has announced one.
    let offered = choices.server_scale.filter(|_| client_scale != NO_SCALE);
    let server_scale = offered.unwrap_or(NO_SCALE);
    let syn_ack_options = options(
        &Choices {
            has_time_stamps: false,
            ..choices.clone()
        },
        1400,
        offered,
        choices.is_selective,
    );
    let server_window = 65160_u16;
    for repetition in 0..choices.answers.max(1) {
        let syn_ack = talk
            .of_server(segment::SYN_ACK, first, next, server_window)
            .tcp_options(syn_ack_options.clone());
        let told = talk.down(&syn_ack)?;
        let is_probe = repetition % 2 == 0;
        ensure!(told.flags == segment::ACK && told.options.is_empty(), "{told:?}");
        ensure!(told.acknowledgment == next, "{told:?}");
        let (sequence, payload) = if is_probe {
            (cookie, vec![0])
        } else {
            (ours, Vec::new())
        };
        ensure!((told.sequence, &told.payload) == (sequence, &payload), "{told:?}");
        let field = if our_scale == NO_SCALE {
            server_window
        } else {
            server_window >> 7
        };
        ensure!(told.window == field, "{told:?}");
    }

    // 4. From then on each sees its own numbers.
    let difference = first.wrapping_sub(cookie);
    for word in &choices.talk {
        let (mine, theirs) = if word.is_request {
            (isn, cookie)
        } else {
            (first, isn)
        };
        let sequence = mine.wrapping_add(word.offset);
        let acknowledgment = theirs.wrapping_add(word.acknowledged);
        let mut blocks = Vec::new();
        let mut raised = Vec::new();
        for edge in word.blocks.iter().flatten() {
            let number = theirs.wrapping_add(*edge);
            blocks.extend(number.to_be_bytes());
            raised.extend(number.wrapping_add(difference).to_be_bytes());
        }
        let header = |blocks: &[u8]| {
            if blocks.is_empty() {
                Vec::new()
            } else {
                [&[1, 1, 5, blocks.len() as u8 + 2], blocks].concat()
            }
        };
        let said = if word.is_request {
            talk.of_client(word.flags, sequence, acknowledgment, word.window)
        } else {
            talk.of_server(word.flags, sequence, acknowledgment, word.window)
        };
        let said = said.tcp_options(header(&blocks)).payload(word.payload_len);
        let heard = if word.is_request {
            talk.up(&said)?
        } else {
            talk.down(&said)?
        };
        ensure!(heard.flags == word.flags, "{heard:?}");
        ensure!(heard.payload.len() == word.payload_len, "{heard:?}");
        if word.is_request {
            ensure!(heard.sequence == sequence, "{heard:?}");
            ensure!(
                heard.acknowledgment == acknowledgment.wrapping_add(difference),
                "{heard:?}"
            );
            ensure!(heard.options == header(&raised), "{heard:?}");
            // The server never takes the client's window for larger than it is.
            let real = bytes(word.window, choices.client_scale.unwrap_or(NO_SCALE));
            let scale = if server_scale == NO_SCALE {
                NO_SCALE
            } else {
                client_scale
            };
            ensure!(bytes(heard.window, scale) <= real, "{heard:?} of {real}");
            if choices.client_scale.is_none() || held(choices.client_scale) == real_scale(choices) {
                ensure!(
                    bytes(heard.window, scale) == real.min(bytes(0xffff, scale)),
                    "{heard:?} of {real}"
                );
            }
        } else {
            ensure!(heard.sequence == sequence.wrapping_sub(difference), "{heard:?}");
            ensure!(heard.acknowledgment == acknowledgment, "{heard:?}");
            ensure!(heard.options == header(&blocks), "{heard:?}");
            let real = bytes(word.window, server_scale);
            let seen = bytes(heard.window, our_scale);
            let unit = bytes(1, our_scale);
            ensure!(
                seen <= real && (real - seen < unit || heard.window == 0xffff),
                "{seen} of {real}"
            );
        }
    }

    // 5. A router before the client that carries less finds the server's own numbers in what it quotes.
    let reply = talk
        .of_server(segment::ACK, first.wrapping_add(77), next, 512)
        .payload(600);
    let seen = talk.down(&reply)?;
    let lost = Builder::tcp(segment::ACK, VIP, CLIENT)
        .link(CLIENT_SIDE.mac, mac_of(*CLIENT.ip()))
        .ttl(63)
        .numbers(TcpNumbers {
            sequence: seen.sequence,
            acknowledgment: seen.acknowledgment,
            window: seen.window,
        })
        .payload(600);
    let error = lost.reported(3, 4, 540).build();
    let (action, out) = talk.walker.walk(choices.program, &CLIENT_SIDE, &error)?;
    ensure!(action == Action::Redirect, "{action:?}");
    let wrong = wrong_checksums(&out);
    ensure!(wrong.is_empty(), "wrong checksums: {wrong:?}");
    let quoted = ETHERNET_LEN + 20 + 8 + 20 + 4;
    ensure!(
        out[quoted..quoted + 4] == first.wrapping_add(77).to_be_bytes(),
        "{:02x?}",
        &out[quoted..quoted + 4]
    );
    Ok(())
}

fn real_scale(choices: &Choices) -> u8 {
    choices.client_scale.unwrap_or(NO_SCALE)
}
