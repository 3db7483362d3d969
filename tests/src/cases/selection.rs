//! How a group selects a backend for a new flow: the ways beside Maglev, the overflow table, persistence.

use forwarder_common::abi::{
    backend::Selection,
    persistence::{Persistence, PersistenceKey},
};

use super::*;

const HEALTHY: BackendState = BackendState::HEALTHY;

/// Two healthy backends, in these slots, selected so.
fn world_selecting(selection: Selection, slots: &[u32]) -> MemoryTables {
    let mut world = world_with_slots([HEALTHY; 2], slots);
    world.groups[0].selection = selection;
    world
}

/// The same with the slots from number `first` on as the overflow table.
fn world_overflowing(selection: Selection, slots: &[u32], first: u32) -> MemoryTables {
    let mut world = world_selecting(selection, slots);
    world.groups[0].overflow_slot_count = slots.len() as u32 - first;
    world.groups[0].slot_count = first;
    world
}

/// Ten minutes of persistence, of clients that share so many bits.
fn world_persisting(bits: u32, slots: &[u32]) -> MemoryTables {
    let mut world = world_with_slots([HEALTHY; 2], slots);
    world.groups[0].persistence_secs = 600;
    world.groups[0].persistence_bits_v4 = bits;
    world
}

/// The n-th new flow, counting from zero: this client's SYN goes to this backend.
fn opening(number: u16, client: SocketAddrV4, backend: u32) -> Step {
    let packet = from_client(segment::SYN, client, WEB);
    let server = [SERVER, UDP_SERVER][backend as usize];
    Step::request(&packet, &to_server(&packet, binding(number), server))
        .counts(Traffic::Opened(WEB.listener, BackendId(backend)))
}

/// [`CLIENT`] from another port.
fn client(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(*CLIENT.ip(), port)
}

fn refused(reason: Reason) -> Step {
    Step::reset(&syn(WEB), reason).counts(WEB.refused())
}

/// Backend 0 has as many flows as it may have.
fn fill_first_backend(world: &mut MemoryTables) {
    world.backends[0].max_flows = 1;
}

fn forget_the_clock(world: &mut MemoryTables) {
    for kept in world.persistence.values_mut() {
        // One more: the kernel's coarse clock may begin a second a tick after the library's.
        kept.used_secs = kept.used_secs.wrapping_sub(601);
    }
}

pub(super) fn all() -> Vec<Case> {
    [others_than_maglev(), overflow(), persistence()].concat()
}

fn others_than_maglev() -> Vec<Case> {
    let source_ip = || world_selecting(Selection::SOURCE_IP, &[0, 1, 1, 0, 1, 0, 0, 1]);
    let mut by_source = Case::new(
        "By source IP, every flow of a client goes to the same backend",
        source_ip(),
    );
    for port in 0..8 {
        by_source = by_source.then(opening(port, client(50_000 + port), 1));
    }
    let mut in_turn = Case::new(
        "In turn, flows go from slot to slot, whatever their client",
        world_selecting(Selection::ROUND_ROBIN, &[0, 1, 0]),
    );
    for (number, backend) in (0..).zip([0, 1, 0, 0, 1, 0]) {
        in_turn = in_turn.then(opening(number, client(50_000 + number), backend));
    }
    let mut failed_turn = world_selecting(Selection::ROUND_ROBIN, &[0, 1]);
    failed_turn.backends[0].state = BackendState::UNHEALTHY;
    let mut no_turns = world_selecting(Selection::ROUND_ROBIN, &[0, 1]);
    no_turns.group_turns[0] = Live(u64::MAX);
    let least = || world_selecting(Selection::LEAST_CONNECTIONS, &[0, 1]);
    // The SYN of `CLIENT` starts from the second of two slots: `PINNED_SLOTS`.
    let mut least_connections = Case::new(
        "By least connections, the backend with fewer flows is next",
        least(),
    )
    .v4_only();
    for (number, backend) in (0..).zip([1, 0, 0, 1]) {
        let port = [50_000, 50_001, 50_003, 50_002][usize::from(number)];
        least_connections = least_connections.then(opening(number, client(port), backend));
    }
    let mut weighted = least();
    weighted.backends[0].weight = 3;
    let mut by_weight = Case::new(
        "By least connections, three flows count as one where the weight is three",
        weighted,
    );
    // By flows per weight: 1/3 and 1/1, 2/3, 3/3 beside 1/1, ...
    for (number, port, backend) in [(0, 50_000, 0), (1, 50_001, 0), (2, 50_002, 1), (3, 50_003, 0)] {
        by_weight = by_weight.then(opening(number, client(port), backend));
    }
    let mut least_failed = least();
    least_failed.backends[1].state = BackendState::UNHEALTHY;
    let mut least_full = least();
    least_full
        .backends
        .iter_mut()
        .for_each(|backend| backend.max_flows = 1);
    let mut least_none = least();
    least_none
        .backends
        .iter_mut()
        .for_each(|backend| backend.state = BackendState::DRAINING);
    let mut weightless = least();
    weightless.backends[1].weight = 0;
    vec![
        by_source,
        in_turn,
        Case::new(
            "A turn of an unhealthy backend goes to the next slot",
            failed_turn,
        )
        .then(opening(0, CLIENT, 1)),
        Case::new("Turns are counted beyond any number", no_turns).then(opening(0, CLIENT, 1)),
        least_connections,
        by_weight,
        Case::new(
            "By least connections, an unhealthy backend is passed over",
            least_failed,
        )
        .then(opening(0, CLIENT, 0)),
        Case::new(
            "By least connections, a backend without weight is passed over",
            weightless,
        )
        .then(opening(0, CLIENT, 0)),
        Case::new(
            "By least connections, a backend at its limit is passed over, and then there is none",
            least_full,
        )
        .v4_only()
        .then(opening(0, CLIENT, 1))
        .then(opening(1, OTHER_CLIENT, 0))
        .then(Step::reset(&syn(WEB).from(client(50_001)), Reason::BACKEND_LIMIT).counts(WEB.refused())),
        Case::new(
            "By least connections, no flow opens without a healthy backend",
            least_none,
        )
        .then(refused(Reason::NO_BACKEND)),
    ]
}

fn overflow() -> Vec<Case> {
    let mut empty = world_overflowing(Selection::MAGLEV, &[1, 1], 0);
    empty.groups[0].first_slot = 0;
    let maglev = || world_overflowing(Selection::MAGLEV, &[0, 0, 1], 2);
    let mut no_room_anywhere = maglev();
    no_room_anywhere
        .backends
        .iter_mut()
        .for_each(|backend| backend.max_flows = 1);
    let mut all_failed = maglev();
    all_failed
        .backends
        .iter_mut()
        .for_each(|backend| backend.state = BackendState::UNHEALTHY);
    vec![
        Case::new(
            "The overflow table is not used while the first has room",
            maglev(),
        )
        .then(opening(0, CLIENT, 0))
        .then(opening(1, OTHER_CLIENT, 0)),
        Case::new(
            "What the first table has no room for goes to the overflow table",
            maglev(),
        )
        .then(opening(0, CLIENT, 0))
        .change(fill_first_backend)
        .then(opening(1, OTHER_CLIENT, 1)),
        Case::new(
            "What finds no healthy backend in the first table goes to the overflow table",
            maglev(),
        )
        .change(|world| world.backends[0].state = BackendState::UNHEALTHY)
        .then(opening(0, CLIENT, 1)),
        Case::new("A group with nothing but an overflow table uses it", empty).then(opening(0, CLIENT, 1)),
        Case::new(
            "In turn and by least connections, the overflow table is used as well",
            world_overflowing(Selection::LEAST_CONNECTIONS, &[0, 1], 1),
        )
        .then(opening(0, CLIENT, 0))
        .change(fill_first_backend)
        .then(opening(1, OTHER_CLIENT, 1)),
        Case::new(
            "Without room in either table the client is told so",
            no_room_anywhere,
        )
        .then(opening(0, CLIENT, 0))
        .then(opening(1, OTHER_CLIENT, 1))
        .then(Step::reset(&syn(WEB).from(client(50_001)), Reason::BACKEND_LIMIT).counts(WEB.refused())),
        Case::new(
            "Without a healthy backend in either table the client is told so",
            all_failed,
        )
        .then(refused(Reason::NO_BACKEND)),
    ]
}

fn persistence() -> Vec<Case> {
    let neighbour = SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 11), 50_007);
    let moved = |bits| {
        Case::new("", world_persisting(bits, &[0]))
            .then(opening(0, CLIENT, 0))
            .change(use_second_backend)
    };
    let named = |mut case: Case, sentence: &str| {
        case.sentence = sentence.to_owned();
        case
    };
    let of_client = PersistenceKey::new(GroupId(0), (*CLIENT.ip()).into(), 32);
    let mut another_s_number = world_persisting(32, &[0]);
    another_s_number.persistence.insert(
        of_client,
        Persistence {
            backend: BackendId(1),
            address: Ipv4Addr::new(172, 17, 0, 99).into(),
            port: Be16::new(UDP_SERVER.port()),
            reserved: 0,
            used_secs: u32::MAX / 2,
        },
    );
    vec![
        named(
            moved(32),
            "With persistence, a client's next flow goes where its last one went, whatever the table says",
        )
        .then(opening(1, client(50_001), 0)),
        named(
            moved(32),
            "With persistence, another client goes where the table says",
        )
        .then(opening(1, neighbour, 1)),
        named(moved(24), "With persistence by prefix, its clients stay together")
            .then(opening(1, neighbour, 0)),
        Case::new(
            "Without persistence, the next flow goes where the table says",
            world_with_slots([HEALTHY; 2], &[0]),
        )
        .then(opening(0, CLIENT, 0))
        .change(use_second_backend)
        .then(opening(1, client(50_001), 1)),
        named(
            moved(32),
            "With persistence, a client whose last flow is long ago goes where the table says",
        )
        .change(forget_the_clock)
        .then(opening(1, client(50_001), 1)),
        named(
            moved(32),
            "With persistence, a client of a second that another CPU has begun first is not forgotten",
        )
        .change(|world| {
            for kept in world.persistence.values_mut() {
                kept.used_secs = kept.used_secs.wrapping_add(1);
            }
        })
        .then(opening(1, client(50_001), 0)),
        named(
            moved(32),
            "With persistence, a client whose backend has failed goes where the table says, and stays there",
        )
        .change(|world| world.backends[0].state = BackendState::UNHEALTHY)
        .then(opening(1, client(50_001), 1))
        .change(|world| {
            world.backends[0].state = HEALTHY;
            world.slots.fill(BackendId(0));
        })
        .then(opening(2, client(50_002), 1)),
        named(
            moved(32),
            "With persistence, a client whose backend is full goes where the table says",
        )
        .change(fill_first_backend)
        .then(opening(1, client(50_001), 1)),
        Case::new(
            "With persistence, a backend that another has the number of is not taken for it",
            another_s_number,
        )
        .then(opening(0, CLIENT, 0)),
    ]
}
