//! Lives of flows: millions of random connections that open, talk, close, time out, are cut off and come back, through
//! the library and the agent's own sweep, in virtual time.
//!
//! Beside the tables stands what the hosts know: each packet carries the connection it belongs to, so whoever gets a
//! reply can be compared with whoever it was meant for.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddrV4},
    panic::resume_unwind,
    thread,
    time::Duration,
};

use forwarder_common::{
    abi::{
        backend::{BackendId, BackendState, NatMode},
        flow::{FlowEntry, FlowId, FlowState, TcpEvents},
        listener::ListenerId,
        reason::Reason,
    },
    datapath::tcp_state::CLOSED_TIMEOUT,
};
use forwarder_tests::{
    packet::{Builder, ETHERNET_LEN, segment},
    tables::{CLIENT_SIDE, MemoryTables, Program, SERVER_SIDE, mac_of},
};
use forwarder_user::datapath::flows::{EndCause, FlowStore as _, Sweeper, Timeouts};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

const VIP: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);
const SERVERS: [SocketAddrV4; 2] = [
    SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 205), 8080),
    SocketAddrV4::new(Ipv4Addr::new(172, 17, 0, 206), 8080),
];
const CLIENTS: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 18, 0, 10), Ipv4Addr::new(172, 18, 0, 11)];
const SNAT: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Listeners: two with full NAT and two with DNAT that share their backends, and one for UDP.
const LISTENERS: [(u16, u8, NatMode); 5] = [
    (80, TCP, NatMode::FULL),
    (81, TCP, NatMode::FULL),
    (8000, TCP, NatMode::DNAT),
    (8001, TCP, NatMode::DNAT),
    (53, UDP, NatMode::FULL),
];

const TIMEOUTS: Timeouts = Timeouts {
    idle: Duration::from_secs(300),
    closing: Duration::from_secs(240),
    half_open: Duration::from_secs(75),
    reset_on_idle: true,
};

/// A connection as its two hosts know it.
#[derive(Clone, Copy, Debug)]
struct Connection {
    client: SocketAddrV4,
    listener: usize,
    /// What the server takes for its client.
    peer: SocketAddrV4,
    server: SocketAddrV4,
    last_packet_secs: u64,
}

struct World {
    sweeper: Sweeper<MemoryTables>,
    random: StdRng,
    now_secs: u64,
    /// What hosts remember, the newest last.
    connections: Vec<Connection>,
    /// How often each thing happened, to see that all did.
    happened: HashMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64, flows: usize) -> Self {
        let mut tables = MemoryTables::new(SNAT, 1);
        let backends =
            SERVERS.map(|server| tables.add_backend(*server.ip(), server.port(), BackendState::HEALTHY));
        for (port, protocol, nat) in LISTENERS {
            tables.add_listener(VIP, port, protocol, nat, &backends);
        }
        tables.flows = vec![bytemuck::Zeroable::zeroed(); flows];
        tables.free_flows.clear();
        tables.flow_keys = 2 * flows;
        Self {
            sweeper: Sweeper::start(tables).expect("tables in memory"),
            random: StdRng::seed_from_u64(seed),
            now_secs: 0,
            connections: Vec::new(),
            happened: HashMap::new(),
        }
    }

    fn saw(&mut self, what: &'static str) {
        *self.happened.entry(what).or_default() += 1;
    }

    /// Sends a packet of a client; its source and destination afterwards, if it is forwarded.
    fn send_request(&mut self, flags: u8, connection: &Connection) -> Result<[SocketAddrV4; 2], Reason> {
        let (port, protocol, _) = LISTENERS[connection.listener];
        let vip = SocketAddrV4::new(VIP, port);
        let packet = match protocol {
            TCP => Builder::tcp(flags, connection.client, vip),
            _ => Builder::udp(connection.client, vip),
        };
        let frame = packet
            .link(mac_of(*connection.client.ip()), CLIENT_SIDE.mac)
            .build();
        self.send(CLIENT_SIDE.ifindex, &frame, Reason::REQUEST_FORWARDED)
    }

    /// Sends a packet of a server.
    fn send_reply(&mut self, flags: u8, connection: &Connection) -> Result<[SocketAddrV4; 2], Reason> {
        let packet = match LISTENERS[connection.listener].1 {
            TCP => Builder::tcp(flags, connection.server, connection.peer),
            _ => Builder::udp(connection.server, connection.peer),
        };
        let frame = packet
            .link(mac_of(*connection.server.ip()), SERVER_SIDE.mac)
            .build();
        self.send(SERVER_SIDE.ifindex, &frame, Reason::REPLY_FORWARDED)
    }

    fn send(&mut self, ifindex: u32, frame: &[u8], forwarded: Reason) -> Result<[SocketAddrV4; 2], Reason> {
        let (outcome, out) = self.sweeper.store().forward(Program::Native, ifindex, frame);
        if outcome.reason == forwarded {
            Ok(addresses(&out))
        } else {
            Err(outcome.reason)
        }
    }

    fn open(&mut self) {
        // Few ports: clients come back from the same one, also while the old flow is still there.
        let client = SocketAddrV4::new(
            CLIENTS[self.random.random_range(0..CLIENTS.len())],
            50_000 + self.random.random_range(0..40),
        );
        let mut connection = Connection {
            client,
            listener: self.random.random_range(0..LISTENERS.len()),
            peer: client,
            server: SERVERS[0],
            last_packet_secs: self.now_secs,
        };
        match self.send_request(segment::SYN, &connection) {
            Ok([peer, server]) => {
                assert!(SERVERS.contains(&server), "{server}");
                (connection.peer, connection.server) = (peer, server);
                self.must_be_free(&connection);
                self.remember(connection);
                self.saw("opened");
            }
            Err(Reason::FLOW_TABLE_FULL | Reason::POOL_EXHAUSTED) => self.saw("full"),
            Err(Reason::FLOW_CONFLICT) => self.saw("conflict"),
            Err(reason) => panic!("{connection:?}: {reason:?}"),
        }
    }

    /// Nobody else may still be using the peer address of a connection towards its server.
    fn must_be_free(&self, new: &Connection) {
        for old in &self.connections {
            let is_same_place = (old.peer, old.server) == (new.peer, new.server)
                && LISTENERS[old.listener].1 == LISTENERS[new.listener].1;
            let is_same_connection = (old.client, old.listener) == (new.client, new.listener);
            // In DNAT the server knows the client itself, who may go through another listener once it has ended
            // there: then the two are told apart by that client's own TCP, as without a gateway.
            if is_same_place && !is_same_connection && old.client != new.client {
                let silent_secs = self.now_secs - old.last_packet_secs;
                assert!(
                    silent_secs >= CLOSED_TIMEOUT.as_secs(),
                    "{new:?} took the binding of {old:?}, silent for {silent_secs} s"
                );
            }
        }
    }

    fn remember(&mut self, connection: Connection) {
        self.connections
            .retain(|old| (old.client, old.listener) != (connection.client, connection.listener));
        self.connections.push(connection);
        if self.connections.len() > self.sweeper.store().flows.len() {
            self.connections.remove(0);
        }
    }

    /// One side of some connection says something, whether or not the gateway still knows it.
    fn talk(&mut self) {
        if self.connections.is_empty() {
            return;
        }
        let index = self.random.random_range(0..self.connections.len());
        let connection = self.connections[index];
        let flags = match self.random.random_range(0..10) {
            0 => segment::FIN,
            1 => segment::RST,
            2 => segment::SYN_ACK,
            _ => segment::ACK,
        };
        let is_udp = LISTENERS[connection.listener].1 == UDP;
        let is_reply = self.random.random_bool(0.5);
        let outcome = if is_reply {
            self.send_reply(flags, &connection)
        } else if is_udp {
            // A datagram may open a flow; `open` looks after those.
            return;
        } else {
            self.send_request(
                if flags == segment::SYN_ACK {
                    segment::ACK
                } else {
                    flags
                },
                &connection,
            )
        };
        match outcome {
            Ok([source, destination]) if is_reply => {
                let vip = SocketAddrV4::new(VIP, LISTENERS[connection.listener].0);
                let is_straggler = destination != connection.client || source != vip;
                // A binding may go to another client when its last user has been silent for the time that stragglers
                // take; a DNAT client may have gone on through another listener.
                let may_be = self.now_secs - connection.last_packet_secs >= CLOSED_TIMEOUT.as_secs()
                    || destination == connection.client;
                assert!(
                    !is_straggler || may_be,
                    "{connection:?}: a reply went from {source} to {destination}"
                );
                if is_straggler {
                    self.connections.remove(index);
                    self.saw("late reply");
                } else {
                    self.connections[index].last_packet_secs = self.now_secs;
                    self.saw("reply");
                }
            }
            Ok(there) => {
                assert_eq!(there, [connection.peer, connection.server], "{connection:?}");
                self.connections[index].last_packet_secs = self.now_secs;
                self.saw("request");
            }
            Err(Reason::NO_FLOW) => self.saw("reply without a flow"),
            Err(Reason::NOT_A_SYN) => self.saw("request without a flow"),
            // A DNAT reply whose flow is gone: a packet to nobody we know.
            Err(Reason::NOT_OURS) => self.saw("DNAT reply without a flow"),
            Err(reason) => panic!("{connection:?}: {reason:?}"),
        }
    }

    /// The operator ends a flow.
    fn cut_off(&mut self) {
        let id = FlowId(self.random.random_range(0..self.sweeper.store().capacity()));
        let entry: FlowEntry = self.sweeper.store().read(id);
        if entry.state == FlowState::LIVE && self.sweeper.unlink(id, &entry) {
            self.saw("cut off");
        }
    }

    /// A backend fails or has drained for long enough, and the agent ends flows on it.
    fn fail(&mut self) {
        let backend = BackendId(self.random.random_range(0..SERVERS.len() as u32));
        let cause =
            [EndCause::Drain, EndCause::Reset, EndCause::Rehash][self.random.random_range(0..3_usize)];
        for entry in self.sweeper.end(&HashSet::from([backend]), cause) {
            assert_eq!(entry.backend, backend);
            self.saw("ended with its backend");
        }
    }

    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now_secs += 1;
            let now = Duration::from_secs(self.now_secs);
            let census = self
                .sweeper
                .sweep(now, |_: ListenerId| TIMEOUTS)
                .expect("a sweep in memory");
            for _ in census.ended_idle {
                self.saw("ended idle");
            }
        }
    }

    fn must_be_sound(&mut self) {
        assert_eq!(self.sweeper.store().unsound(), Vec::<String>::new());
    }
}

/// Source and destination of a frame.
fn addresses(frame: &[u8]) -> [SocketAddrV4; 2] {
    let ip = &frame[ETHERNET_LEN..];
    let at = |address: usize, port: usize| {
        let octets: [u8; 4] = ip[address..address + 4].try_into().expect("four bytes");
        SocketAddrV4::new(octets.into(), u16::from_be_bytes([ip[port], ip[port + 1]]))
    };
    [at(12, 20), at(16, 22)]
}

/// How many rounds of four lives to run, for longer searches.
const ROUNDS_VARIABLE: &str = "FORWARDER_LIVES_ROUNDS";
/// Steps of one life.
const STEPS: u32 = 500_000;

fn live(seed: u64, flows: usize) -> HashMap<&'static str, u64> {
    let mut world = World::new(seed, flows);
    for step in 0..STEPS {
        match world.random.random_range(0..1000) {
            0..150 => world.open(),
            150..985 => world.talk(),
            985..996 => world.cut_off(),
            996 => world.fail(),
            _ => {
                let seconds = world.random.random_range(1..40);
                world.pass(seconds);
            }
        }
        if step % 64 == 0 {
            world.must_be_sound();
        }
    }
    println!("seed {seed}, {flows} flows: {:?}", world.happened);
    // Everybody goes away: nothing stays behind.
    world.pass(2 * TIMEOUTS.idle.as_secs());
    world.must_be_sound();
    let tables = world.sweeper.store();
    assert_eq!(tables.free_flows.len(), flows);
    assert!(tables.flow_index.is_empty());
    assert!(
        tables
            .listeners_live
            .iter()
            .chain(&tables.backends_live)
            .all(|live| live.0 == 0)
    );
    world.happened
}

#[test]
fn flows_never_share_a_binding_and_replies_never_go_astray() {
    let rounds: u64 = match std::env::var(ROUNDS_VARIABLE) {
        Ok(value) => value.parse().expect("a number of rounds"),
        Err(_) => 1,
    };
    let mut happened: HashMap<&str, u64> = HashMap::new();
    for round in 0..rounds {
        // They have nothing in common, so each may have a processor.
        let lives = thread::scope(|scope| {
            [(1, 32), (2, 64), (3, 128), (4, 200)]
                .map(|(seed, flows)| scope.spawn(move || live(4 * round + seed, flows)))
                .map(|life| life.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        for (what, count) in lives.into_iter().flatten() {
            *happened.entry(what).or_default() += count;
        }
    }
    for what in [
        "opened",
        "full",
        "conflict",
        "request",
        "reply",
        "late reply",
        "reply without a flow",
        "request without a flow",
        "cut off",
        "ended with its backend",
        "ended idle",
    ] {
        assert!(
            happened.get(what).is_some_and(|count| *count > 100),
            "{what} hardly ever happened: {happened:?}"
        );
    }
}

/// Ages of a flow, in seconds, at which a sweep has its client asked again, if it is opened so; and the one at which it ends,
/// although the client answers each time.
fn asked_at(tcp: TcpEvents) -> (Vec<u64>, u64) {
    let mut world = World::new(8, 4);
    let client = SocketAddrV4::new(CLIENTS[0], 50_000);
    let connection = Connection {
        client,
        listener: 0,
        peer: client,
        server: SERVERS[0],
        last_packet_secs: 0,
    };
    let forwarded = world.send_request(segment::SYN, &connection);
    assert!(forwarded.is_ok(), "{forwarded:?}");
    let is_open = |flow: &&mut FlowEntry| flow.counted != 0;
    let mut flows = world.sweeper.store().flows.iter_mut();
    flows.find(is_open).expect("an open flow").tcp = tcp;
    let mut asked = Vec::new();
    // Found at the age of zero. One sweep in ten is a second late.
    for age_secs in (0..1000).filter(|age_secs| age_secs % 10 != 3) {
        let census = world
            .sweeper
            .sweep(Duration::from_secs(age_secs + 1), |_: ListenerId| TIMEOUTS)
            .expect("a sweep in memory");
        let Some(flow) = world.sweeper.store().flows.iter_mut().find(is_open) else {
            return (asked, age_secs);
        };
        if !census.unanswered.is_empty() {
            flow.seen = 1;
            asked.push(age_secs);
        }
    }
    panic!("it never ended");
}

#[test]
fn a_client_of_a_cookie_is_asked_again_until_a_backend_has_answered() {
    let opened = TcpEvents::OPENED.with(TcpEvents::BY_COOKIE);
    assert_eq!(asked_at(opened), (vec![1, 4, 7, 15, 31, 64], 75));
    assert_eq!(asked_at(opened.with(TcpEvents::ANSWERED)), (vec![], 75));
    assert_eq!(asked_at(TcpEvents::OPENED), (vec![], 75));
}

#[test]
fn a_failed_backend_loses_the_flows_that_its_group_says() {
    let mut world = World::new(7, 64);
    let mut opened = Vec::new();
    for port in 50_000..50_010 {
        // Half open, established, UDP.
        for (listener, packets) in [(0, 1), (1, 3), (4, 1)] {
            let client = SocketAddrV4::new(CLIENTS[0], port);
            let mut connection = Connection {
                client,
                listener,
                peer: client,
                server: SERVERS[0],
                last_packet_secs: 0,
            };
            [connection.peer, connection.server] = world.send_request(segment::SYN, &connection).unwrap();
            if packets == 3 {
                world.send_reply(segment::SYN_ACK, &connection).unwrap();
                world.send_request(segment::ACK, &connection).unwrap();
            }
            opened.push(connection);
        }
    }
    let on = |server: usize, listeners: &[usize]| {
        let mine = |one: &&Connection| one.server == SERVERS[server] && listeners.contains(&one.listener);
        opened.iter().filter(mine).count()
    };
    assert!(on(0, &[0]) > 0 && on(0, &[1]) > 0 && on(0, &[4]) > 0 && on(1, &[0, 1, 4]) > 0);
    let failed = HashSet::from([BackendId(0)]);
    assert_eq!(world.sweeper.end(&failed, EndCause::Rehash).len(), on(0, &[0, 4]));
    assert_eq!(world.sweeper.end(&failed, EndCause::Rehash).len(), 0);
    for connection in opened.iter().filter(|one| one.listener == 1) {
        world.send_request(segment::ACK, connection).unwrap();
    }
    assert_eq!(world.sweeper.end(&failed, EndCause::Reset).len(), on(0, &[1]));
    for connection in opened.iter().filter(|one| one.listener == 1) {
        let outcome = world.send_request(segment::ACK, connection);
        if connection.server == SERVERS[0] {
            assert_eq!(outcome, Err(Reason::NOT_A_SYN));
        } else {
            outcome.unwrap();
        }
    }
    world.must_be_sound();
}
