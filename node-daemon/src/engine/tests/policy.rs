//! Policy in the loop: who waits for it, what is enforced while little is known, what a restart remembers.

use std::path::PathBuf;
use std::sync::Arc;

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_dataplane::policy::{ActualPolicy, ActualSet};
use husk_overlay::config::SourceConfig;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::issue::IssueKind;
use husk_overlay::mode::Mode;
use husk_policy::compile::closed;
use husk_policy::object::{NetworkPolicy, ObjectName, Objects, Pod};
use husk_policy::selector::LabelSelector;
use nix::errno::Errno;

use super::bed::{Bed, config, id};

fn of_kubernetes() -> Bed {
    let mut config = config(Mode::Wireguard);
    config.source = SourceConfig::Kubernetes { kubeconfig: Some(PathBuf::from("/nowhere")) };
    let bed = Bed::of(config);
    bed.allocate(0);
    bed
}

fn objects(pods: &[&str]) -> Objects {
    let deny = NetworkPolicy { selector: LabelSelector::default(), ingress: Some(Vec::new()), egress: None };
    let pod = |name: &&str| (ObjectName::new("default", name), Arc::new(Pod::default()));
    Objects {
        pods: pods.iter().map(pod).collect(),
        network_policies: [(ObjectName::new("default", "deny"), Arc::new(deny))].into(),
        ..Objects::default()
    }
}

fn know(bed: &Bed, pods: &[&str]) {
    bed.source.state().objects = Arc::new(objects(pods));
}

fn table(bed: &Bed) -> Option<ActualPolicy> {
    bed.kernel.state().own.policy.as_deref().cloned()
}

fn known_pods(bed: &Bed) -> usize {
    match table(bed).map(|table| table.sets["known_ipv4"].clone()) {
        Some(ActualSet::Ours(set)) => set.elements.len(),
        other => panic!("{other:?}"),
    }
}

/// The pod is wired, and asks to be admitted; the loop does what it is woken for.
fn admit(bed: &mut Bed, pod: &str) -> bool {
    bed.engine.enforce();
    let enforced = bed.state.borrow().enforced.clone();
    enforced.is_some_and(|enforced| enforced.contains_key(&id(pod)))
}

#[test]
fn a_pod_is_admitted_once_its_policy_is_in_the_kernel_without_a_whole_pass() {
    let mut bed = of_kubernetes();
    know(&bed, &[]);
    bed.pass();
    bed.plug("a");
    bed.lease("a").unwrap();
    let passes = bed.state.borrow().passes;
    assert!(!admit(&mut bed, "a"), "nobody knows the pod");
    assert_eq!(known_pods(&bed), 0);
    know(&bed, &["a"]);
    assert!(admit(&mut bed, "a"));
    assert_eq!(known_pods(&bed), 1);
    assert_eq!(bed.state.borrow().passes, passes, "no pass was needed");
    assert_eq!(bed.ask(Request::Admit { id: id("a") }), Response::Done);
}

#[test]
fn a_pod_whose_policy_the_kernel_refuses_is_not_admitted() {
    let mut bed = of_kubernetes();
    know(&bed, &["a"]);
    bed.pass();
    bed.plug("a");
    bed.lease("a").unwrap();
    bed.kernel.inject(Fault::Change(Table::Policy), Errno::ENOMEM);
    assert!(!admit(&mut bed, "a"));
    bed.kernel.heal();
    assert!(admit(&mut bed, "a"));
}

#[test]
fn without_any_word_of_the_source_everything_is_closed_and_what_is_there_stays() {
    let mut bed = of_kubernetes();
    bed.source.state().objects_down = true;
    bed.pass();
    assert_eq!(table(&bed), Some(ActualPolicy::of(&closed(&bed.config.families().collect()))));
    assert!(bed.issues().contains(&IssueKind::SourceUnavailable));
    assert!(!bed.state.borrow().ready, "no pod can be let onto the network");
    bed.source.state().objects_down = false;
    know(&bed, &["a"]);
    bed.pass();
    bed.plug("a");
    bed.lease("a").unwrap();
    bed.pass();
    let before = table(&bed);
    assert_eq!(known_pods(&bed), 1);
    // Another daemon, which knows what this one knew.
    bed.flush_policy();
    bed.source.state().objects_down = true;
    bed.restart();
    bed.pass();
    assert_eq!(table(&bed), before);
    assert!(bed.state.borrow().enforced.is_some());
    // And one whose memory is gone: what is in the kernel stays.
    std::fs::remove_file(bed.directory.path().join("policy.json")).unwrap();
    bed.restart();
    bed.pass();
    assert_eq!(table(&bed), before);
    assert!(bed.state.borrow().enforced.is_none(), "but nothing is claimed about it");
}

#[test]
fn switched_off_there_is_no_table_and_nobody_waits() {
    let mut config = config(Mode::Wireguard);
    config.policy.enabled = false;
    let mut bed = Bed::of(config);
    bed.allocate(0);
    bed.pass();
    assert_eq!(table(&bed), None);
    bed.plug("a");
    bed.lease("a").unwrap();
    assert_eq!(bed.ask(Request::Admit { id: id("a") }), Response::Done);
}
