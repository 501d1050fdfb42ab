//! Pods that live get their MTU; leases of pods that are gone go.

use husk_overlay::issue::{IssueKind, Severity};
use husk_overlay::mode::Mode;
use husk_overlay::record::NodeRecord;
use nix::errno::Errno;

use super::bed::{Asked, Bed, id, interface, record};

fn with_pod() -> Bed {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.pass();
    bed.lease("pod").unwrap();
    bed.plug("pod");
    bed.pass();
    bed
}

#[test]
fn a_living_pod_gets_a_smaller_mtu_before_and_a_larger_one_after_its_tunnel() {
    let mut bed = with_pod();
    let pod = id("pod").host_interface();
    assert_eq!(bed.node.state().pod_mtus[&pod], 1440);
    bed.node.state().tuned.clear();
    bed.pass();
    assert_eq!(bed.node.state().tuned, [], "nothing to do");
    for (underlay, pod_mtu, tunnel) in [(1400, 1340, 1440), (1500, 1440, 1440)] {
        bed.node.state().underlay_mtu = underlay;
        bed.pass();
        assert_eq!(bed.node.state().tuned, [(pod.clone(), pod_mtu, Some(tunnel))]);
        assert_eq!(bed.kernel.state().own.links[&interface("husk-wg0")].mtu, pod_mtu);
        bed.node.state().tuned.clear();
    }
}

/// The others stop sending what is too large before this node does anything, and send what is larger once it takes it.
#[test]
fn a_smaller_mtu_is_published_before_and_a_larger_one_after_tunnel_and_pods() {
    let mut bed = with_pod();
    for (underlay, before) in [(1400, true), (1500, false)] {
        bed.source.state().log.clear();
        bed.node.state().tuned.clear();
        bed.node.state().underlay_mtu = underlay;
        bed.pass();
        let log = bed.source.state().log.clone();
        let [Asked::Publish { record, kernel }] = log.as_slice() else { panic!("{log:?}") };
        assert_eq!(record.underlay_mtu, underlay);
        let tunnel = kernel.own.links[&interface("husk-wg0")].mtu;
        assert_eq!(tunnel, if before { 1440 } else { underlay - 60 }, "{underlay}");
    }
    // What cannot be told before is told after.
    bed.source.state().read_only = true;
    bed.node.state().underlay_mtu = 1400;
    bed.pass();
    assert_eq!(bed.kernel.state().own.links[&interface("husk-wg0")].mtu, 1340);
    bed.source.state().read_only = false;
    bed.pass();
    assert_eq!(bed.own_record().unwrap().underlay_mtu, 1400);
}

/// Who does not know how little is left would send what does not fit; pods keep what they have.
#[test]
fn an_mtu_that_is_too_small_for_a_family_is_published_too() {
    let mut bed = with_pod();
    bed.node.state().underlay_mtu = 1339;
    bed.pass();
    assert_eq!(bed.issues(), [IssueKind::MtuTooSmall].into());
    assert!(!bed.state.borrow().ready);
    assert_eq!(bed.own_record().unwrap().underlay_mtu, 1339);
    assert_eq!(bed.node.state().pod_mtus[&id("pod").host_interface()], 1440);
}

/// Who runs under another's name by mistake does not write into the other's record.
#[test]
fn a_smaller_mtu_is_not_published_in_somebody_elses_record() {
    let mut bed = with_pod();
    let own = bed.own_record().unwrap();
    let theirs = NodeRecord { instance: record(7).instance, ..own.clone() };
    bed.source.state().snapshot.nodes.insert(own.name, theirs.clone());
    bed.source.state().log.clear();
    bed.node.state().underlay_mtu = 1400;
    bed.pass();
    let written = bed.source.state().log.clone();
    assert!(
        !written
            .iter()
            .any(|asked| matches!(asked, Asked::Publish { record, .. } if record.instance == theirs.instance)),
        "{written:?}"
    );
}

#[test]
fn a_pod_that_refuses_its_mtu_is_an_issue_until_it_takes_it() {
    let mut bed = with_pod();
    bed.node.state().underlay_mtu = 1400;
    bed.node.state().untunable = Some(Errno::EINVAL);
    for _ in 0..2 {
        // The host's end has its MTU after the first attempt; the pod's is tried again all the same.
        bed.pass();
        let issues = bed.state.borrow().issues.clone();
        let [issue] = issues.as_slice() else { panic!("{issues:?}") };
        assert_eq!((issue.kind, issue.severity), (IssueKind::ApplyFailed, Severity::Error));
        assert!(issue.message.contains("1340 bytes") && !issue.remedy.is_empty(), "{issue}");
        assert!(bed.state.borrow().ready);
    }
    bed.node.state().untunable = None;
    bed.pass();
    assert!(bed.issues().is_empty());
    // A pod that goes meanwhile is nobody's fault.
    bed.node.state().underlay_mtu = 1500;
    bed.node.state().untunable = Some(Errno::ENODEV);
    bed.pass();
    assert!(bed.issues().is_empty());
}

#[test]
fn the_lease_of_a_pod_that_is_gone_is_released_and_no_other() {
    let mut bed = with_pod();
    bed.lease("gone").unwrap();
    let wired = bed.lease_being_wired("wired");
    bed.lease_in("alive", bed.directory.path());
    bed.engine.reclaim_leases();
    let has = |bed: &Bed, pod| bed.leases().has_lease(&id(pod)).unwrap();
    assert!(!has(&bed, "gone"), "no interface, no namespace");
    assert!(has(&bed, "pod"), "it has its interface");
    assert!(has(&bed, "wired"), "its ADD is under way");
    assert!(has(&bed, "alive"), "its namespace is there");
    drop(wired);
    bed.unplug("pod");
    bed.engine.reclaim_leases();
    assert!(!has(&bed, "pod") && !has(&bed, "wired") && has(&bed, "alive"));
}
