//! Generations of WireGuard: both devices, and who is sent to in which.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_dataplane::wireguard::WireguardPeerStatus;
use husk_overlay::facts::WireguardSupport;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::record::{NodeRecord, WireguardRecord};

use super::bed::{Bed, interface, name, public_key, record};

fn settle(bed: &mut Bed) {
    for _ in 0..5 {
        bed.pass();
    }
}

/// All sessions with peers are there, as far as keys are configured.
fn handshake(bed: &Bed) {
    let mut kernel = bed.kernel.state();
    for device in kernel.own.wireguard.values_mut() {
        for status in device.status.values_mut() {
            // A response has 92 bytes (WireGuard paper, section 5.4.3).
            let received_bytes = status.received_bytes.max(92);
            *status = WireguardPeerStatus { last_handshake: Some(Duration::from_secs(1)), received_bytes, ..*status };
        }
    }
}

/// The peer is in these generations, with a key for each.
fn joins(bed: &Bed, index: u16, generations: &[u64]) {
    let device = |generation: &u64| {
        let slot = u8::try_from(generation % 2).unwrap();
        let seed = index + 1000 * u16::try_from(*generation).unwrap();
        WireguardRecord { slot, generation: *generation, port: 51820 + u16::from(slot), public_key: public_key(seed) }
    };
    let mut cluster = bed.source.state();
    cluster.snapshot.nodes.get_mut(&name(index)).unwrap().wireguard = generations.iter().map(device).collect();
}

fn generations(bed: &Bed) -> Vec<u64> {
    bed.node.state().generations.keys().copied().collect()
}

fn later(bed: &Bed, seconds: u64) {
    bed.node.state().uptime += Duration::from_secs(seconds);
}

fn has(bed: &Bed, device: &str) -> bool {
    bed.kernel.state().own.links.contains_key(&interface(device))
}

#[test]
fn of_two_nodes_that_learn_of_each_other_one_leaves_the_first_word_to_the_other() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    // It comes before host0 in the order of names.
    let early = NodeName::new("alpha").unwrap();
    bed.allocate(2);
    bed.join(2);
    {
        let mut cluster = bed.source.state();
        let record = cluster.snapshot.nodes.remove(&name(2)).unwrap();
        cluster
            .snapshot
            .blocks
            .values_mut()
            .filter(|owner| **owner == name(2))
            .for_each(|owner| *owner = early.clone());
        cluster.snapshot.nodes.insert(early.clone(), NodeRecord { name: early, ..record });
    }
    settle(&mut bed);
    let router = |index| record(index).router.iter().next().unwrap();
    let greeted = bed.node.state().greeted.clone();
    let when =
        |router| greeted.iter().filter(|(to, _)| *to == router).map(|(_, after)| *after).collect::<BTreeSet<_>>();
    assert_eq!(when(router(1)), [Duration::ZERO].into());
    assert!(when(router(2)).iter().all(|after| !after.is_zero()) && !when(router(2)).is_empty(), "{greeted:?}");
}

#[test]
fn a_generation_that_others_begin_takes_over_when_its_handshakes_are_done() {
    for support in [WireguardSupport::Kernel, WireguardSupport::Userspace] {
        let mut bed = Bed::new(Mode::Wireguard, 2);
        bed.node.state().wireguard = support.clone();
        settle(&mut bed);
        handshake(&bed);
        settle(&mut bed);
        assert!(has(&bed, "husk-wg0") && !has(&bed, "husk-wg1"));
        joins(&bed, 1, &[0, 1]);
        settle(&mut bed);
        assert_eq!(generations(&bed), [0, 1], "{support:?}");
        assert!(has(&bed, "husk-wg1"), "{support:?}: both devices while both are used");
        assert_eq!(bed.own_record().unwrap().wireguard.len(), 2);
        let used = |bed: &Bed| bed.engine.last.as_ref().unwrap().plan.peers[&name(1)].keys.own;
        assert_eq!(used(&bed), Some(0), "until the handshake in the new one is done");
        handshake(&bed);
        settle(&mut bed);
        assert_eq!(used(&bed), Some(1));
        // The other side lets go of the old one, which is quiet here too.
        later(&bed, 60);
        settle(&mut bed);
        joins(&bed, 1, &[1]);
        for _ in 0..3 {
            later(&bed, 60);
            settle(&mut bed);
        }
        assert_eq!(generations(&bed), [1], "{support:?}");
        assert!(!has(&bed, "husk-wg0") && has(&bed, "husk-wg1"), "{support:?}: the device goes with its key");
        assert!(bed.issues().is_empty(), "{:?}", bed.state.borrow().issues);
    }
}

/// gotatun has a last handshake as soon as it has answered, when nothing says yet that the answer arrived.
#[test]
fn a_userspace_device_that_has_only_answered_is_not_relied_on() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.node.state().wireguard = WireguardSupport::Userspace;
    settle(&mut bed);
    handshake(&bed);
    joins(&bed, 1, &[0, 1]);
    settle(&mut bed);
    let devices = bed.kernel.clone();
    let received = |bytes: u64, handshaken: Option<u64>| {
        let mut kernel = devices.state();
        let device = kernel.own.wireguard.get_mut(&interface("husk-wg1")).unwrap();
        for status in device.status.values_mut() {
            let last_handshake = handshaken.map(Duration::from_secs);
            *status = WireguardPeerStatus { last_handshake, received_bytes: bytes, ..*status };
        }
    };
    let used = |bed: &Bed| bed.engine.last.as_ref().unwrap().plan.peers[&name(1)].keys.own;
    received(2 * 148, Some(1));
    settle(&mut bed);
    assert_eq!(used(&bed), Some(0));
    received(2 * 148 + 32, Some(1));
    settle(&mut bed);
    assert_eq!(used(&bed), Some(1));
    // The device forgets a session that expired; both sides can receive all the same.
    received(2 * 148 + 32, None);
    settle(&mut bed);
    assert_eq!(used(&bed), Some(1));
}

#[test]
fn a_session_that_is_used_keeps_the_old_generation() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    joins(&bed, 1, &[0, 1]);
    settle(&mut bed);
    handshake(&bed);
    for round in 1..5 {
        {
            let mut kernel = bed.kernel.state();
            let old = kernel.own.wireguard.get_mut(&interface("husk-wg0")).unwrap();
            old.status.values_mut().for_each(|status| status.received_bytes = round * 128);
        }
        later(&bed, 20);
        settle(&mut bed);
        assert_eq!(bed.own_record().unwrap().wireguard.len(), 2, "somebody sends under the old key");
    }
    // What merely keeps it up does not count.
    {
        let mut kernel = bed.kernel.state();
        let old = kernel.own.wireguard.get_mut(&interface("husk-wg0")).unwrap();
        old.status.values_mut().for_each(|status| status.received_bytes += 148);
    }
    later(&bed, 31);
    settle(&mut bed);
    assert_eq!(bed.own_record().unwrap().wireguard.len(), 1);
}
