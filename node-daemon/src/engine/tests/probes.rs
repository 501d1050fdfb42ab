//! What is probed follows the plan, and what is found limits the routes to that peer alone.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_dataplane::routes::ActualRoute;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::issue::{IssueKind, Severity};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Limit, Limits, Path, Report, Standing};

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
        let floor = if path.family == Family::Ipv4 { 576 } else { 1280 };
        assert_eq!((target.promised, target.floor), (1450, floor));
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
fn what_keeps_paths_from_being_watched_is_told_of_with_its_remedy() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    bed.pass();
    assert!(bed.state.borrow().issues.is_empty());
    bed.node.state().deaf = true;
    bed.node.state().ended = vec!["husk-probe"];
    bed.pass();
    let issues = bed.state.borrow().issues.clone();
    let kinds: BTreeSet<_> = issues.iter().map(|issue| (issue.kind, issue.severity)).collect();
    assert_eq!(kinds, [(IssueKind::ProbesDropped, Severity::Warning), (IssueKind::Defect, Severity::Error)].into());
    let remedy = |kind| issues.iter().find(|it| it.kind == kind).map(|it| it.remedy.clone()).unwrap_or_default();
    assert!(remedy(IssueKind::ProbesDropped).contains("4875"), "{issues:?}");
    assert!(remedy(IssueKind::Defect).contains("restart huskd"), "{issues:?}");
    assert!(bed.state.borrow().ready, "pods are served all the same");
    bed.node.state().deaf = false;
    bed.node.state().ended.clear();
    bed.pass();
    assert!(bed.state.borrow().issues.is_empty());
}

#[test]
fn a_path_that_carries_less_limits_the_routes_to_its_peer_and_is_told_of() {
    let mut bed = Bed::new(Mode::Vxlan, 3);
    bed.pass();
    assert_eq!((mtus(&bed, 1), mtus(&bed, 2)), ([Some(1450)].into(), [Some(1450)].into()));
    bed.node.state().probed = limits(1372, true);
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
fn a_dead_tunnel_is_one_issue_until_it_answers_or_its_peer_leaves_and_the_own_deafness_is_none() {
    let mut bed = Bed::new(Mode::Vxlan, 4);
    let kinds = |bed: &mut Bed| {
        bed.pass();
        assert!(bed.state.borrow().ready, "pods are served all the same");
        bed.state.borrow().issues.iter().map(|issue| (issue.kind, issue.severity)).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&mut bed), []);
    let paths = |index| Family::ALL.map(|family| Path { peer: name(index), family });
    bed.node.state().silent = paths(1).into_iter().chain(paths(2)).collect();
    bed.node.state().probed = limits(1372, true);
    assert_eq!(kinds(&mut bed), [(IssueKind::PeerSilent, Severity::Error)], "what it once swallowed is no news");
    assert_eq!(mtus(&bed, 1), [Some(1372)].into(), "it may come back as it was");
    let rows: Vec<MtuReport> = report(&mut bed, Request::Mtu);
    assert!(rows.iter().all(|row| row.mismatches.is_empty()), "{rows:?}");
    bed.source.state().snapshot.nodes.remove(&name(1));
    assert_eq!(kinds(&mut bed), [(IssueKind::PeerSilent, Severity::Error)]);
    bed.node.state().deaf = true;
    assert_eq!(kinds(&mut bed), [(IssueKind::ProbesDropped, Severity::Warning)], "nobody would be heard");
    bed.node.state().deaf = false;
    bed.node.state().silent.clear();
    assert_eq!(kinds(&mut bed), []);
}

/// So much passes to the first peer.
fn limits(bytes: u32, found: bool) -> Limits {
    [(name(1), Family::ALL.map(|family| (family, Limit { bytes, found })).into())].into()
}

#[test]
fn what_is_promised_beyond_what_was_verified_is_not_used_for_a_moment() {
    let mut bed = Bed::new(Mode::Vxlan, 3);
    bed.pass();
    // The peer has told that it takes more, and the path was not tried yet.
    bed.node.state().foreseen = Some(limits(1400, false));
    bed.pass();
    assert_eq!((mtus(&bed, 1), mtus(&bed, 2)), ([Some(1400)].into(), [Some(1450)].into()));
    assert!(bed.node.state().targets.values().all(|target| target.promised == 1450), "which is what is tried");
    assert!(bed.state.borrow().issues.is_empty(), "nothing is known to vanish");
    let rows: Vec<MtuReport> = report(&mut bed, Request::Mtu);
    let row = rows.iter().find(|row| row.node == name(1)).unwrap();
    assert_eq!((row.probed, row.mtu, row.mismatches.len()), (Some(1400), Some(1400), 0));
    bed.node.state().foreseen = Some(Limits::new());
    bed.pass();
    assert_eq!(mtus(&bed, 1), [Some(1450)].into());
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
    assert_eq!(report::<Vec<PathReport>>(&mut bed, Request::ProbesOf { peer: name(1) }), paths);
    assert!(report::<Vec<PathReport>>(&mut bed, Request::ProbesOf { peer: name(2) }).is_empty());
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
