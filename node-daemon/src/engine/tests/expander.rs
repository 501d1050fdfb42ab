//! Order, split and repetition of what happens in a cluster make no difference to the end state.

use std::collections::BTreeMap;

use husk_dataplane::kernel::{Actual, Table};
use husk_overlay::ipc::NodeFile;
use husk_overlay::mode::Mode;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::NodeRecord;
use proptest::prelude::*;

use super::bed::{Bed, address, blocks, id, interface, name, public_key, record};

/// Nodes besides the own one.
const PEERS: u16 = 4;
const PODS: u16 = 3;

/// How a peer's record looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Gone,
    Present {
        /// Which of its addresses it has; the last one is another node's.
        address: u16,
        /// Which of its keys it has; the last one is another node's.
        key: u16,
        /// A node whose blocks it claims besides its own.
        claims: Option<u16>,
    },
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Peer(u16, Peer),
    /// Whether a pod is there.
    Pod(u16, bool),
    /// A pod's interface goes; it is back before the end.
    Unplugged(u16),
    /// Somebody flushes a table.
    Flushed(Table),
    /// Somebody deletes the tunnel devices.
    TunnelsGone,
    /// The daemon is restarted.
    Restart,
}

/// What is left when all is done.
#[derive(Debug, PartialEq)]
struct End {
    kernel: Actual,
    node_file: Option<NodeFile>,
    record: Option<NodeRecord>,
}

fn pod(index: u16) -> String {
    format!("pod{index}")
}

fn happen(bed: &mut Bed, event: Event) {
    match event {
        Event::Peer(index, Peer::Gone) => bed.leave(index),
        Event::Peer(index, Peer::Present { address: which, key, claims }) => {
            let mut record = record(index);
            let other = index % PEERS + 1;
            record.addresses = if which < 2 { address(index + 100 * which) } else { address(other) };
            record.wireguard[0].public_key = if key < 2 { public_key(index + 100 * key) } else { public_key(other) };
            record.blocks.extend(claims.into_iter().flat_map(blocks));
            bed.source.state().snapshot.nodes.insert(name(index), record);
        }
        Event::Pod(index, true) => {
            let addresses = blocks(0).iter().map(|block| block.nth(u128::from(index) + 5).unwrap()).collect();
            // A repetition finds the lease there.
            let own: Vec<Prefix> = blocks(0).into_iter().collect();
            let _ = bed.lease_from(&pod(index), &own, addresses);
            bed.plug(&pod(index));
        }
        Event::Pod(index, false) => {
            bed.unplug(&pod(index));
            bed.release(&pod(index));
        }
        Event::Unplugged(index) => bed.unplug(&pod(index)),
        Event::Flushed(table) => bed.kernel.flush(table),
        Event::TunnelsGone => bed.kernel.flush(Table::Links),
        Event::Restart => bed.restart(),
    }
}

/// Events that lead to the same state whatever came before.
fn last_words(events: &[Event]) -> Vec<Event> {
    let mut peers = BTreeMap::new();
    let mut pods = BTreeMap::new();
    for event in events {
        match event {
            Event::Peer(index, peer) => drop(peers.insert(*index, *peer)),
            Event::Pod(index, there) => drop(pods.insert(*index, *there)),
            _ => {}
        }
    }
    // Interfaces are plugged in again.
    let pods = (0..PODS).map(|index| Event::Pod(index, pods.get(&index).copied().unwrap_or(false)));
    peers.into_iter().map(|(index, peer)| Event::Peer(index, peer)).chain(pods).collect()
}

/// A daemon that sees the events with passes in between; `cuts` says after which ones.
fn run(mode: Mode, events: &[Event], cuts: &[bool]) -> End {
    let mut bed = Bed::new(mode, 1);
    for index in 1..=PEERS {
        bed.allocate(index);
    }
    for (event, cut) in events.iter().zip(cuts.iter().chain(std::iter::repeat(&false))) {
        happen(&mut bed, *event);
        if *cut {
            bed.pass();
        }
    }
    bed.pass();
    assert_eq!(bed.changes_of_a_pass(), 0, "one pass brings everything about");
    let mut kernel = bed.kernel.state().own.clone();
    // Threaded NAPI is only ever turned on, and only on a device with peers: one that has lost its last peer keeps it.
    let lonely = |name: &InterfaceName| kernel.wireguard.get(name).is_some_and(|device| device.peers.is_empty());
    kernel.napi.iter_mut().filter(|(name, _)| lonely(name)).for_each(|(_, threaded)| *threaded = false);
    End { kernel, node_file: bed.node_file(), record: bed.own_record() }
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let present = (0_u16..3, 0_u16..3, proptest::option::weighted(0.3, 0..=PEERS));
    prop_oneof![
        1 => Just(Peer::Gone),
        4 => present.prop_map(|(address, key, claims)| Peer::Present { address, key, claims }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (1..=PEERS, any_peer()).prop_map(|(index, peer)| Event::Peer(index, peer)),
        3 => (0..PODS, any::<bool>()).prop_map(|(index, there)| Event::Pod(index, there)),
        1 => (0..PODS).prop_map(Event::Unplugged),
        1 => proptest::sample::select(Table::ALL.to_vec()).prop_map(Event::Flushed),
        1 => Just(Event::TunnelsGone),
        1 => Just(Event::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_order_split_and_repetition_ends_in_the_same_state(
        mode in prop_oneof![Just(Mode::Direct), Just(Mode::Vxlan), Just(Mode::Wireguard)],
        (events, shuffled, last) in proptest::collection::vec(any_event(), 0..14).prop_flat_map(|events| {
            let last = Just(last_words(&events)).prop_shuffle();
            (Just(events.clone()), Just(events).prop_shuffle(), last)
        }),
        cuts in proptest::collection::vec(any::<bool>(), 0..40),
        repeated in proptest::collection::vec(any::<bool>(), 14),
    ) {
        let at_once = run(mode, &last_words(&events), &[]);

        let mut in_order = Vec::new();
        for (event, twice) in events.iter().zip(&repeated) {
            in_order.extend(std::iter::repeat_n(*event, if *twice { 2 } else { 1 }));
        }
        in_order.extend(last_words(&events));
        prop_assert_eq!(&run(mode, &in_order, &cuts), &at_once);

        let out_of_order: Vec<Event> = shuffled.into_iter().chain(last).collect();
        prop_assert_eq!(&run(mode, &out_of_order, &cuts), &at_once);
    }
}

#[test]
fn a_node_that_returns_with_another_address_and_key_disturbs_nobody_else() {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        let mut bed = Bed::new(mode, 4);
        bed.pass();
        let before = bed.kernel.state().own.clone();
        bed.leave(2);
        bed.pass();
        happen(&mut bed, Event::Peer(2, Peer::Present { address: 1, key: 1, claims: None }));
        bed.pass();
        let after = bed.kernel.state().own.clone();
        let others: Vec<Prefix> = [1, 3].into_iter().flat_map(blocks).collect();
        let of_others = |actual: &Actual| {
            let routes = actual.routes.clone().into_iter().filter(|(key, _)| others.contains(&key.destination));
            let peers = actual
                .wireguard
                .get(&interface("husk-wg0"))
                .map(|device| [1, 3].map(|index| device.peers.get(&public_key(index)).cloned()));
            (routes.collect::<Vec<_>>(), peers)
        };
        assert_eq!(of_others(&before), of_others(&after));
        assert_ne!(before, after, "{mode}: the node's own entries moved");
        assert!(bed.issues().is_empty(), "{:?}", bed.issues());
        for block in blocks(2) {
            assert!(after.routes.keys().any(|key| key.destination == block));
        }
    }
}

#[test]
fn a_pod_keeps_its_routes_through_a_restart() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    happen(&mut bed, Event::Pod(0, true));
    bed.pass();
    let whole = bed.kernel.state().own.clone();
    bed.restart();
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(bed.kernel.state().own, whole);
    assert!(bed.leases().find(&id("pod0")).unwrap().is_some());
}
