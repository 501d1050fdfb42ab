//! What is left for metrics and the page is what `huskctl` is told.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_overlay::ipc::{Request, Response};
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Path, Report, Standing};
use husk_overlay::record::Pool;

use super::bed::{Bed, address, interface, name, public_key, record};
use crate::metrics::{Live, Sample};
use crate::report::{PeerReport, PeerState};

/// The sample that a pass leaves.
fn sample(bed: &mut Bed) -> Sample {
    // Another one would be due a second later only.
    let live = Live::default();
    bed.engine.measure_with(live.clone());
    bed.pass();
    (*live.sample().0).clone()
}

fn told(bed: &mut Bed) -> BTreeMap<NodeName, (PeerState, Option<u32>)> {
    let (answer, mut receiver) = tokio::sync::oneshot::channel();
    bed.engine.answer(crate::engine::Ask { request: Request::Peers, answer });
    let Response::Report { report } = receiver.try_recv().unwrap() else { panic!("no report") };
    let peers: Vec<PeerReport> = serde_json::from_value(report).unwrap();
    peers.into_iter().map(|peer| (peer.node, (peer.state, peer.mtu))).collect()
}

fn of_sample(sample: &Sample) -> BTreeMap<NodeName, (PeerState, Option<u32>)> {
    sample.peers.iter().map(|peer| (peer.node.clone(), (peer.state, peer.mtu))).collect()
}

#[test]
fn peers_stand_as_they_are_reported() {
    for mode in [Mode::Wireguard, Mode::Vxlan, Mode::Ipsec] {
        let mut bed = Bed::new(mode, 4);
        // Two nodes with one address: one of them is refused.
        let mut twin = record(3);
        twin.addresses = address(2);
        bed.source.state().snapshot.nodes.insert(name(3), twin);
        bed.pass();
        if mode == Mode::Wireguard {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let mut state = bed.kernel.state();
            let device = state.own.wireguard.get_mut(&interface("husk-wg0")).unwrap();
            device.status.get_mut(&public_key(1)).unwrap().last_handshake = now.checked_sub(Duration::from_secs(60));
        }
        let sample = sample(&mut bed);
        assert_eq!(of_sample(&sample), told(&mut bed), "{mode}");
        let states: Vec<PeerState> = sample.peers.iter().map(|peer| peer.state).collect();
        assert!(states.contains(&PeerState::Refused), "{mode}: {states:?}");
        if mode == Mode::Wireguard {
            assert_eq!(sample.peers[0].state, PeerState::Connected);
            assert!(sample.peers[0].heard.is_some_and(|heard| heard.as_secs() >= 59 && heard.as_secs() < 120));
        }
        assert_eq!(sample.keys.is_some(), mode.encrypted(), "{mode}");
    }
}

#[test]
fn paths_addresses_and_the_source_are_in_it() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    bed.pass();
    bed.lease("a").unwrap();
    bed.plug("a");
    let report = Report {
        standing: Standing::Limited { passes: 1300 },
        promised: 1450,
        passes: Some(1300),
        rtt: Some(Duration::from_millis(2)),
        loss_per_mille: Some(30),
        sent: 3,
        answered: 2,
        since: Duration::from_secs(1),
        concluded: None,
        clock_skew: None,
    };
    bed.node.state().probes = [(Path { peer: name(1), family: Family::Ipv4 }, report)].into();
    let sample = sample(&mut bed);
    let path = sample.peers[0].paths[0];
    assert_eq!((path.passes, path.rtt, path.loss()), (Some(1300), Some(Duration::from_millis(2)), Some(0.03)));
    assert_eq!((sample.endpoints, sample.underlay_mtu, sample.pod_mtu), (1, Some(1500), Some(1450)));
    let v4 = sample.addresses[&Family::Ipv4];
    assert_eq!((v4.blocks, v4.total, v4.leased), (1, 63, 1));
    assert!(sample.pools.iter().all(|pool| pool.used == 2 && pool.blocks > 2), "{:?}", sample.pools);
    assert!(sample.source.up && sample.source.age.is_some());
}

#[test]
fn pools_that_are_disabled_are_not_measured() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    let pool = |name: &str, cidr: &str, disabled| {
        let pool = Pool { name: name.into(), cidr: cidr.parse().unwrap(), block_length: 26, disabled };
        (name.to_owned(), pool)
    };
    bed.source.state().snapshot.pools =
        [pool("full", "10.42.0.0/25", true), pool("next", "10.42.128.0/17", false)].into();
    let sample = sample(&mut bed);
    let pools: Vec<&str> = sample.pools.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!(pools, ["next"]);
}

#[test]
fn a_second_sample_waits_for_its_time() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    let live = Live::default();
    bed.engine.measure_with(live.clone());
    bed.pass();
    assert_eq!(live.sample().0.peers.len(), 1);
    bed.join(2);
    bed.pass();
    assert_eq!(live.sample().0.peers.len(), 1, "two passes in a row cost two samples");
}
