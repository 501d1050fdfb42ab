//! Peers that roam, and peers that publish another address.

use std::net::SocketAddr;
use std::time::Duration;

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_overlay::mode::Mode;
use nix::errno::Errno;

use super::bed::{Bed, address, interface, name, public_key, record};

fn endpoint(bed: &Bed) -> Option<SocketAddr> {
    bed.kernel.state().own.wireguard[&interface("husk-wg0")].peers[&public_key(1)].endpoint
}

/// The peer is heard from elsewhere, in a session that is as young as can be.
fn roams(bed: &Bed, to: &str) {
    let mut state = bed.kernel.state();
    let device = state.own.wireguard.get_mut(&interface("husk-wg0")).unwrap();
    let read_at = device.read_at;
    let (peer, status) =
        (device.peers.get_mut(&public_key(1)).unwrap(), device.status.get_mut(&public_key(1)).unwrap());
    peer.endpoint = to.parse().ok();
    status.last_handshake = Some(read_at + Duration::from_secs(1));
}

fn publishes(bed: &Bed, which: u16) {
    let mut moved = record(1);
    moved.addresses = address(which);
    bed.source.state().snapshot.nodes.insert(name(1), moved);
}

#[test]
fn a_published_address_wins_over_a_session_and_a_session_over_an_old_one() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    let first = endpoint(&bed);
    assert!(first.is_some());
    roams(&bed, "192.0.2.77:7777");
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(endpoint(&bed), "192.0.2.77:7777".parse().ok(), "a peer that roamed is followed");
    publishes(&bed, 101);
    bed.pass();
    let second = endpoint(&bed);
    assert_eq!(second.map(|it| it.ip()), address(101).iter().next());
    // Said once: from then on the session counts again.
    roams(&bed, "192.0.2.78:7777");
    assert_eq!(bed.changes_of_a_pass(), 0);
    assert_eq!(endpoint(&bed), "192.0.2.78:7777".parse().ok());
}

#[test]
fn a_move_that_could_not_be_told_is_told_by_the_next_pass() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    roams(&bed, "192.0.2.77:7777");
    publishes(&bed, 101);
    bed.kernel.inject(Fault::Change(Table::Wireguard), Errno::ENOBUFS);
    bed.pass();
    assert_eq!(bed.issues().len(), 1);
    bed.kernel.heal();
    bed.pass();
    assert_eq!(endpoint(&bed).map(|it| it.ip()), address(101).iter().next());
    assert!(bed.issues().is_empty());
}

#[test]
fn a_device_that_is_gone_learns_where_its_peers_are_when_it_is_made_anew() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    publishes(&bed, 101);
    bed.kernel.flush(Table::Links);
    bed.pass();
    assert!(bed.issues().is_empty(), "{:?}", bed.state.borrow().issues);
    assert_eq!(endpoint(&bed).map(|it| it.ip()), address(101).iter().next());
}
