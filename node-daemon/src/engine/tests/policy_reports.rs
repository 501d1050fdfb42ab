//! What `huskctl policy`, `trace` and `quarantine` are told.

use std::collections::BTreeSet;
use std::sync::Arc;

use husk_overlay::ipc::{Request, Response};
use husk_overlay::mode::Mode;
use husk_policy::compile::path::Path;
use husk_policy::object::{
    ClusterAction, ClusterNetworkPolicy, ClusterRule, Direction, NamespaceChoice, NetworkPolicy, ObjectName, Objects,
    Peer, Pod, PolicyRule, PortMatch, Protocol, QUARANTINE_LABEL, Tier,
};
use husk_policy::selector::{LabelSelector, Operator, Requirement};
use husk_policy::verdict::{Outcome, Scope, Verdict};
use serde::de::DeserializeOwned;

use super::bed::Bed;
use crate::engine::Ask;
use crate::report::{
    Decider, Live, Place, PodPolicyReport, PodPolicyState, PolicyKind, PolicyReport, QuarantineReport, TraceReport,
};

fn named(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn with_label(key: &str, value: &str) -> LabelSelector {
    let operator = Operator::In([value.to_owned()].into());
    LabelSelector { requirements: [Requirement { key: key.into(), operator }].into() }
}

fn pod(app: &str, node: Option<&str>, addresses: &[&str]) -> Arc<Pod> {
    Arc::new(Pod {
        labels: [("app".to_owned(), app.to_owned())].into(),
        node: node.map(str::to_owned),
        addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
        ..Pod::default()
    })
}

/// `db` and `web` are pods of this node, `far` one of host1. To `db` come pods `web` at TCP 5432; nobody comes to `far`.
fn objects() -> Objects {
    let web = Peer::Pods { namespaces: NamespaceChoice::Named("default".into()), pods: with_label("app", "web") };
    let rule = PolicyRule { peers: Some(vec![web]), ports: Some(vec![PortMatch::Range(Protocol::Tcp, 5432, 5432)]) };
    let isolate = |app, rules| NetworkPolicy { selector: with_label("app", app), ingress: Some(rules), egress: None };
    let admin = ClusterNetworkPolicy {
        tier: Tier::Admin,
        priority: 7,
        namespaces: LabelSelector::default(),
        pods: with_label("app", "db"),
        ingress: Vec::new(),
        egress: vec![ClusterRule {
            name: "0".into(),
            action: ClusterAction::Deny,
            matches: PolicyRule {
                peers: Some(vec![Peer::Block { cidr: "203.0.113.0/24".parse().unwrap(), except: BTreeSet::new() }]),
                ports: None,
            },
        }],
    };
    Objects {
        pods: [
            (named("db"), pod("db", Some("host0"), &[])),
            (named("web"), pod("web", Some("host0"), &[])),
            (named("far"), pod("far", Some("host1"), &["10.64.0.70"])),
            (ObjectName::new("shop", "cart"), pod("cart", Some("host1"), &["10.64.0.71"])),
        ]
        .into(),
        network_policies: [
            (named("db"), Arc::new(isolate("db", vec![rule]))),
            (named("far"), Arc::new(isolate("far", Vec::new()))),
        ]
        .into(),
        cluster_policies: [("no-tests".to_owned(), Arc::new(admin))].into(),
        ..Objects::default()
    }
}

fn bed() -> Bed {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    bed.source.state().objects = Arc::new(objects());
    bed.pass();
    for pod in ["db", "web"] {
        bed.plug(pod);
        bed.lease(pod).unwrap();
    }
    bed.pass();
    bed
}

fn answer(bed: &mut Bed, request: Request) -> Response {
    let (answer, mut receiver) = tokio::sync::oneshot::channel();
    bed.engine.answer(Ask { request, answer });
    receiver.try_recv().unwrap()
}

fn report<T: DeserializeOwned>(bed: &mut Bed, request: Request) -> T {
    match answer(bed, request) {
        Response::Report { report } => serde_json::from_value(report).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn refusal(bed: &mut Bed, request: Request) -> String {
    match answer(bed, request) {
        Response::Refused { reason } => reason,
        other => panic!("{other:?}"),
    }
}

fn trace(source: &str, destination: &str, port: u16) -> Request {
    Request::Trace { source: source.into(), destination: destination.into(), protocol: 6, port: Some(port), size: None }
}

fn policy_of(pod: &str) -> Request {
    Request::PolicyOf { pod: pod.into() }
}

fn quarantine(pod: &str, on: bool) -> Request {
    Request::Quarantine { pod: pod.into(), on }
}

#[test]
fn the_summary_lists_policies_in_the_order_of_their_tiers() {
    let mut bed = bed();
    // What is brought into the kernel without a pass is measured.
    let _: QuarantineReport = report(&mut bed, quarantine("web", true));
    let policy: PolicyReport = report(&mut bed, Request::Policy);
    assert!(policy.enabled && policy.known && policy.unknown_pods.is_empty());
    assert_eq!(policy.pods, 2);
    assert_eq!(policy.counters["denied_ingress"].packets, 3);
    assert!(policy.programming.count > 0);
    let rows: Vec<_> =
        policy.policies.iter().map(|row| (row.kind, row.name.as_str(), row.priority, row.pods.as_slice())).collect();
    assert_eq!(
        rows,
        [
            (PolicyKind::ClusterNetworkPolicy, "no-tests", Some(7), &[named("db")][..]),
            (PolicyKind::NetworkPolicy, "db", None, &[named("db")]),
            (PolicyKind::NetworkPolicy, "far", None, &[]),
        ]
    );
    assert_eq!(policy.policies[0].directions, [Direction::Egress]);
    assert_eq!(policy.policies[1].directions, [Direction::Ingress]);
}

#[test]
fn the_rules_of_a_pod_are_told_in_words() {
    let mut bed = bed();
    let db: PodPolicyReport = report(&mut bed, policy_of("db"));
    assert_eq!((&db.state, db.quarantined, db.addresses.len()), (&PodPolicyState::Enforced, false, 2));
    let words =
        |rule: &crate::report::RuleReport| (rule.origin.to_string(), rule.peers.join("|"), rule.ports.join("|"));
    let all: Vec<_> = db.egress.iter().chain(&db.ingress).map(words).collect();
    let expected = [
        ("ClusterNetworkPolicy no-tests (Admin) rule 0", "203.0.113.0/24", "any"),
        ("NetworkPolicy default/db rule 0", "pods with app=web in namespace default", "TCP 5432"),
        ("default deny by: default/db", "anybody", "any"),
    ];
    assert_eq!(all, expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned())));
    let by_address: PodPolicyReport = report(&mut bed, policy_of(&db.addresses[0].to_string()));
    assert_eq!(by_address, db);
    let far: PodPolicyReport = report(&mut bed, policy_of("default/far"));
    assert_eq!(far.state, PodPolicyState::Elsewhere { node: Some("host1".into()) });
    assert_eq!(far.ingress.len(), 1);
    let reason = refusal(&mut bed, policy_of("cart"));
    assert_eq!(reason, "no pod default/cart is known on this node; do you mean shop/cart?");
    assert!(refusal(&mut bed, policy_of("nobody")).contains("huskctl policy list"));
    assert!(refusal(&mut bed, policy_of("192.0.2.9")).contains("no pod has the address 192.0.2.9"));
}

#[test]
fn a_trace_tells_the_rules_and_whether_the_kernel_agrees() {
    let mut bed = bed();
    let allowed: TraceReport = report(&mut bed, trace("web", "db", 5432));
    assert_eq!(allowed.verdict, Verdict::Allow);
    assert_eq!(allowed.source.pod, Some(named("web")));
    let [egress, ingress] = allowed.sides.as_slice() else { panic!("two sides") };
    assert_eq!((&egress.decider, &egress.live), (&Decider::ThisNode, &Live::Agrees { path: Path::Free }));
    assert!(matches!(&ingress.live, Live::Agrees { path: Path::Judged { others: false, .. } }), "{ingress:?}");
    assert_eq!(ingress.side.asked.last().unwrap().outcome, Outcome::Matched);

    let denied: TraceReport = report(&mut bed, trace("web", "db", 80));
    assert_eq!(denied.verdict, Verdict::Deny);
    assert_eq!(denied.sides[1].side.decided_by.as_ref().unwrap().to_string(), "default deny by: default/db");
    assert_eq!(denied.sides[1].side.asked[0].outcome, Outcome::OtherPort);

    let outside: TraceReport = report(&mut bed, trace("192.0.2.9", "db", 5432));
    assert_eq!((&outside.source.place, outside.verdict), (&Place::External, Verdict::Deny));
    assert_eq!(outside.sides[0].decider, Decider::Nobody);
    assert!(matches!(outside.sides[1].live, Live::Agrees { path: Path::Judged { others: true, .. } }));
    assert!(
        refusal(
            &mut bed,
            Request::Trace { source: "web".into(), destination: "db".into(), protocol: 17, port: None, size: None }
        )
        .contains("--port")
    );
}

#[test]
fn what_another_node_decides_is_foretold_and_the_node_named() {
    let mut bed = bed();
    let far: TraceReport = report(&mut bed, trace("web", "far", 80));
    assert_eq!(far.destination.place, Place::PodElsewhere { node: Some("host1".into()) });
    let ingress = &far.sides[1];
    assert_eq!(ingress.decider, Decider::OtherNode { node: Some("host1".into()) });
    assert_eq!((ingress.side.scope, far.verdict), (Scope::Elsewhere, Verdict::Deny));
    assert_eq!(ingress.side.decided_by.as_ref().unwrap().to_string(), "default deny by: default/far");
    assert_eq!(ingress.live, Live::NotHere);
}

#[test]
fn a_nodes_own_traffic_with_its_pods_is_always_allowed() {
    let mut bed = bed();
    let own = super::bed::address(0).ipv4.unwrap().to_string();
    let to: TraceReport = report(&mut bed, trace(&own, "db", 80));
    assert_eq!((&to.source.place, to.verdict), (&Place::ThisNode, Verdict::Allow));
    assert_eq!(to.sides[1].decider, Decider::Host);
    let other = super::bed::address(1).ipv4.unwrap().to_string();
    let from: TraceReport = report(&mut bed, trace(&other, "db", 80));
    assert_eq!((&from.source.place, from.verdict), (&Place::OtherNode { node: "host1".into() }, Verdict::Deny));
}

#[test]
fn a_kernel_that_says_something_else_is_found() {
    let mut bed = bed();
    bed.kernel.flush(husk_dataplane::kernel::Table::Policy);
    let denied: TraceReport = report(&mut bed, trace("web", "db", 5432));
    assert_eq!(denied.sides[1].live, Live::Differs { path: Path::Unknown });
}

#[test]
fn a_pod_is_cut_off_at_once_and_let_onto_the_network_again() {
    let mut bed = bed();
    let begun: QuarantineReport = report(&mut bed, quarantine("web", true));
    assert_eq!((begun.quarantined, begun.changed, begun.by_label, begun.enforced), (true, true, false, true));
    let cut: TraceReport = report(&mut bed, trace("web", "db", 5432));
    assert_eq!(cut.verdict, Verdict::Deny);
    assert_eq!(cut.sides[0].side.decided_by.as_ref().unwrap().to_string(), "quarantine");
    assert!(matches!(cut.sides[0].live, Live::Agrees { .. }), "{:?}", cut.sides[0].live);
    let own = super::bed::address(0).ipv4.unwrap().to_string();
    let host: TraceReport = report(&mut bed, trace("web", &own, 80));
    assert_eq!(host.verdict, Verdict::Deny, "not even with its node");
    let back: TraceReport = report(&mut bed, trace(&own, "web", 80));
    assert_eq!(back.verdict, Verdict::Allow);
    let policy: PolicyReport = report(&mut bed, Request::Policy);
    assert_eq!(policy.quarantined.len(), 1);
    assert!(policy.quarantined[0].by_request && !policy.quarantined[0].by_label);

    bed.restart();
    bed.pass();
    let again: QuarantineReport = report(&mut bed, quarantine("web", true));
    assert!(!again.changed, "a daemon that starts anew knows it");
    let ended: QuarantineReport = report(&mut bed, quarantine("web", false));
    assert_eq!((ended.quarantined, ended.changed, ended.enforced), (false, true, true));
    let free: TraceReport = report(&mut bed, trace("web", "db", 5432));
    assert_eq!(free.verdict, Verdict::Allow);
}

#[test]
fn a_label_holds_against_a_release() {
    let mut bed = bed();
    let mut objects = objects();
    let mut web = objects.pods[&named("web")].as_ref().clone();
    web.labels.insert(QUARANTINE_LABEL.into(), "true".into());
    objects.pods.insert(named("web"), Arc::new(web));
    bed.source.state().objects = Arc::new(objects);
    bed.pass();
    let held: QuarantineReport = report(&mut bed, quarantine("web", false));
    assert_eq!((held.quarantined, held.by_label, held.changed), (true, true, false));
}

#[test]
fn only_pods_of_this_node_can_be_cut_off() {
    let mut bed = bed();
    let reason = refusal(&mut bed, quarantine("far", true));
    assert_eq!(reason, "the pod default/far is not on this node; ask node host1: huskctl quarantine default/far there");
    bed.engine.parts.config.policy.enabled = false;
    assert!(refusal(&mut bed, quarantine("web", true)).contains("policy.enabled"));
}

#[test]
fn flows_are_answered_without_the_loop() {
    let bed = Bed::new(Mode::Wireguard, 1);
    let Response::Report { report } =
        bed.ask(Request::Flows { after: None, denied: true, connections: true, follow: false })
    else {
        panic!("no loop runs here, and none is needed")
    };
    let report: crate::report::FlowsReport = serde_json::from_value(report).unwrap();
    assert_eq!(report, crate::report::FlowsReport::default());
}
