//! Pods that live get their MTU; leases of pods that are gone go.

use husk_overlay::issue::{IssueKind, Severity};
use husk_overlay::mode::Mode;
use nix::errno::Errno;

use super::bed::{Bed, id, interface};

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
