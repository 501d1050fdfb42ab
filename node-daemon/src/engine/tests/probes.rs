//! What is probed follows the plan, and what is found limits the routes to that peer alone.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_dataplane::routes::ActualRoute;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::issue::IssueKind;
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Path, Report, Standing};

use super::bed::{Bed, blocks, name, record};
use crate::report::{MismatchKind, MtuReport, PathReport, PeerReport, ProbeStarted};

fn answer(bed: &mut Bed, request: Request) -> Response {
    let (answer, mut receiver) = tokio::sync::oneshot::channel();
    bed.engine.answer(crate::engine::Ask { request, answer });
    receiver.try_recv().unwrap()
}

fn report<T: serde::de::DeserializeOwned>(bed: &mut Bed, request: Request) -> T {
    match answer(bed, request) {
        Response::Report { report } => serde_json::from_value(report).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// MTUs of the routes to a peer's blocks.
fn mtus(bed: &Bed, index: u16) -> BTreeSet<Option<u32>> {
    let state = bed.kernel.state();
    let routes = state.own.routes.iter().filter(|(key, _)| blocks(index).contains(&key.destination));
    routes
        .map(|(_, route)| match route {
            ActualRoute::Plain(route) => route.mtu,
            ActualRoute::Other(words) => panic!("{words}"),
        })
        .collect()
}

fn found(standing: Standing) -> Report {
    Report {
        standing,
        promised: 1450,
        passes: None,
        rtt: None,
        loss_per_mille: None,
        clock_skew: None,
        sent: 3,
        answered: 2,
        since: Duration::from_secs(1),
        concluded: None,
    }
}

#[test]
fn every_peer_with_a_route_is_probed_in_both_families_until_it_leaves() {
    let mut bed = Bed::new(Mode::Vxlan, 3);
    bed.pass();
    let targets = bed.node.state().targets.clone();
    assert_eq!(targets.len(), 4, "{targets:?}");
    for (path, target) in &targets {
        let index = if path.peer == name(1) { 1 } else { 2 };
        assert_eq!(Some(target.address), record(index).router.get(path.family), "{path:?}");
        assert_eq!(Some(target.own), record(0).router.get(path.family), "{path:?}");
        assert_eq!((target.promised, target.floor), (1450, 1280));
    }
    // What is promised follows the underlay, in the same pass.
    bed.node.state().underlay_mtu = 1400;
    bed.pass();
    assert!(bed.node.state().targets.values().all(|target| target.promised == 1350));
    bed.source.state().snapshot.nodes.remove(&name(2));
    bed.pass();
    let left: BTreeSet<_> = bed.node.state().targets.keys().map(|path| path.peer.clone()).collect();
    assert_eq!(left, [name(1)].into());
}

#[test]
fn a_path_that_carries_less_limits_the_routes_to_its_peer_and_is_told_of() {
    let mut bed = Bed::new(Mode::Vxlan, 3);
    bed.pass();
    assert_eq!((mtus(&bed, 1), mtus(&bed, 2)), ([Some(1450)].into(), [Some(1450)].into()));
    bed.node.state().probed = [(name(1), 1372)].into();
    bed.pass();
    assert_eq!((mtus(&bed, 1), mtus(&bed, 2)), ([Some(1372)].into(), [Some(1450)].into()));
    let issues = bed.state.borrow().issues.clone();
    assert_eq!(issues.iter().map(|issue| issue.kind).collect::<Vec<_>>(), [IssueKind::PathMtu]);
    assert!(bed.state.borrow().ready, "pods are served");
    // What is promised stays what it was, so that it can be tried again.
    assert!(bed.node.state().targets.values().all(|target| target.promised == 1450));
    let rows: Vec<MtuReport> = report(&mut bed, Request::Mtu);
    let limited = rows.iter().find(|row| row.node == name(1)).unwrap();
    assert_eq!((limited.probed, limited.mtu, limited.ledger.inner), (Some(1372), Some(1372), Some(1450)));
    assert!(limited.mismatches.iter().any(|it| it.kind == MismatchKind::PathLimited));
    let other = rows.iter().find(|row| row.node == name(2)).unwrap();
    assert_eq!((other.probed, other.mtu, other.mismatches.len()), (None, Some(1450), 0));
    bed.node.state().probed.clear();
    bed.pass();
    assert_eq!(mtus(&bed, 1), [Some(1450)].into());
    assert!(bed.state.borrow().issues.is_empty());
}

#[test]
fn what_was_found_is_told_and_asked_for() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    bed.pass();
    let path = |family| Path { peer: name(1), family };
    let (four, six) = (found(Standing::Verified), found(Standing::Limited { passes: 1372 }));
    bed.node.state().probes = [(path(Family::Ipv4), four.clone()), (path(Family::Ipv6), six.clone())].into();
    let paths: Vec<PathReport> = report(&mut bed, Request::Probes);
    let both = [(path(Family::Ipv4), four.clone()), (path(Family::Ipv6), six.clone())];
    assert_eq!(paths, both.map(|(path, report)| PathReport { path, report }));
    let peers: Vec<PeerReport> = report(&mut bed, Request::Peers);
    assert_eq!(peers[0].paths, [(Family::Ipv4, four), (Family::Ipv6, six)].into());

    bed.node.state().uptime = Duration::from_secs(77);
    let started: ProbeStarted = report(&mut bed, Request::ProbePeer { peer: name(1).to_string() });
    assert_eq!(started, ProbeStarted { peer: name(1), begun: Duration::from_secs(77) });
    assert_eq!(bed.node.state().demanded, [name(1)]);
    for (peer, reason) in [("nobody", "no other node of the cluster"), ("host0", "no other node")] {
        let Response::Refused { reason: told } = answer(&mut bed, Request::ProbePeer { peer: peer.into() }) else {
            panic!("{peer} is probed");
        };
        assert!(told.contains(reason), "{told}");
    }
}
