//! How many issues one thing that is wrong makes, and how often the loop tries in vain.

use std::time::Duration;

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_dataplane::nft::ForeignChain;
use husk_overlay::issue::{IssueKind, Severity};
use husk_overlay::mode::Mode;
use husk_overlay::plan::LAST_METRIC;
use nix::errno::Errno;

use super::bed::{Bed, interface};
use super::inbox::Running;

#[test]
fn a_device_that_cannot_be_made_is_one_issue() {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        let mut bed = Bed::new(mode, 20);
        bed.kernel.inject(Fault::Change(Table::Links), Errno::EPERM);
        bed.pass();
        let issues = bed.state.borrow().issues.clone();
        let [issue] = issues.as_slice() else { panic!("{mode}: {issues:?}") };
        assert_eq!((issue.kind, issue.severity), (IssueKind::ApplyFailed, Severity::Blocking));
        assert!(issue.subject.contains("husk-") && issue.remedy.contains("root"), "{issue}");
    }
}

#[test]
fn a_device_that_vanishes_in_a_pass_is_one_issue() {
    let mut bed = Bed::new(Mode::Wireguard, 20);
    bed.pass();
    // The routes to 19 peers are lost, of two families each, and the device goes before they are made anew.
    bed.kernel.state().own.routes.retain(|key, _| key.metric == LAST_METRIC);
    bed.kernel.inject(Fault::Change(Table::Routes), Errno::ENODEV);
    bed.pass();
    let issues = bed.state.borrow().issues.clone();
    let [issue] = issues.as_slice() else { panic!("{issues:?}") };
    assert_eq!(issue.subject, "husk-wg0");
    assert!(issue.message.contains("37 more changes need it"), "{issue}");
}

/// It is the loop that tries again; pods that are added meanwhile get their ports all the same.
#[test]
fn connections_that_cannot_be_ended_are_an_issue_until_they_can() {
    let mut bed = Bed::new(Mode::Direct, 2);
    bed.kernel.inject(Fault::Connections, Errno::ENOBUFS);
    bed.pass();
    let state = bed.state.borrow().clone();
    let [issue] = state.issues.as_slice() else { panic!("{:?}", state.issues) };
    assert_eq!((issue.kind, issue.severity), (IssueKind::ApplyFailed, Severity::Error));
    assert!(issue.message.contains("port mappings") && issue.remedy.contains("memory"), "{issue}");
    assert!(state.ready && !state.host_ports.is_empty(), "{state:?}");
    bed.kernel.heal();
    bed.pass();
    assert!(bed.issues().is_empty(), "{:?}", bed.state.borrow().issues);
}

#[test]
fn a_pod_that_has_just_gone_is_no_issue() {
    let mut bed = Bed::new(Mode::Direct, 2);
    bed.pass();
    bed.lease("pod").unwrap();
    bed.plug("pod");
    bed.kernel.inject(Fault::Change(Table::Routes), Errno::ENODEV);
    bed.kernel.inject(Fault::Change(Table::Neighbours), Errno::ENODEV);
    bed.pass();
    assert!(bed.issues().is_empty(), "{:?}", bed.state.borrow().issues);
}

#[test]
fn a_difference_that_cannot_be_mended_costs_ever_fewer_passes() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    bed.kernel.inject(Fault::Change(Table::Wireguard), Errno::EPERM);
    bed.kernel.flush(Table::Wireguard);
    let before = running.passes();
    std::thread::sleep(Duration::from_millis(4500));
    // 0.4, 0.8, 1.6, 3.2: the time between looks doubles; it was 0.4 s for ever.
    let passes = running.passes() - before;
    assert!((1..=5).contains(&passes), "{passes} passes");
    bed.kernel.heal();
    running.handle.waker().wake();
    running.wait("mended", |state| state.ready && state.issues.is_empty());
}

#[test]
fn a_firewall_of_others_is_a_warning_with_a_command() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    let docker = ForeignChain::Drops { family: "ip".into(), table: "filter".into(), chain: "FORWARD".into() };
    bed.node.state().foreign_chains = vec![docker];
    bed.pass();
    assert!(bed.state.borrow().ready);
    let issues = bed.state.borrow().issues.clone();
    let [issue] = issues.as_slice() else { panic!("{issues:?}") };
    assert_eq!((issue.kind, issue.severity), (IssueKind::ForeignFirewall, Severity::Warning));
    assert!(issue.remedy.contains("iptables -I FORWARD -i husk+ -j ACCEPT"), "{issue}");
    bed.node.state().foreign_chains.clear();
    bed.pass();
    assert!(bed.issues().is_empty());
    assert!(bed.kernel.state().own.links.contains_key(&interface("husk-wg0")));
}
