//! The commands of `huskctl` about network policy, against a daemon that gives canned answers.

// clippy.toml allows this in test functions; what they call belongs to the test as well.
#![allow(clippy::unwrap_used)]

mod canned;

use husk_node_daemon::report::{
    Counter, Decider, Flow, FlowEnd, FlowVerdict, FlowsReport, Live, Place, PodPolicyReport, PodPolicyState,
    PolicyKind, PolicyReport, PolicyRow, QuarantineReport, QuarantinedPod, RuleReport, TraceEnd, TraceReport,
    TraceSide,
};
use husk_overlay::ipc::{Request, Response};
use husk_policy::compile::path::Path;
use husk_policy::object::{Direction, ObjectName};
use husk_policy::rules::{Effect, Level, Origin};
use husk_policy::verdict::{Asked, Connection, Outcome, Scope, Side, Verdict};

use canned::{run, run_against, run_along, words};

fn pod(name: &str) -> ObjectName {
    ObjectName::new("shop", name)
}

fn default_deny() -> Origin {
    Origin::DefaultDeny { policies: vec![pod("db")] }
}

fn policy() -> PolicyReport {
    PolicyReport {
        enabled: true,
        known: true,
        pods: 3,
        unknown_pods: Vec::new(),
        quarantined: vec![QuarantinedPod { pod: pod("bad"), by_label: true, by_request: true }],
        counters: [("denied_ingress".to_owned(), Counter { packets: 7, bytes: 420 })].into(),
        programming: serde_json::from_value(serde_json::json!({
            "count": 2, "lastCompile": 1500, "lastApply": 500, "total": 5000, "slowest": 3000,
        }))
        .unwrap(),
        policies: vec![PolicyRow {
            kind: PolicyKind::NetworkPolicy,
            namespace: Some("shop".into()),
            name: "db".into(),
            tier: None,
            priority: None,
            directions: vec![Direction::Ingress],
            pods: ["a", "b", "c", "d", "e"].map(pod).to_vec(),
        }],
        issues: Vec::new(),
    }
}

#[test]
fn policies_are_listed_with_what_they_do() {
    let ran = run(&policy(), &["policy", "list"]);
    assert_eq!((ran.status, ran.request), (0, Request::Policy));
    let lines = words(&ran.text);
    for line in [
        "Enforced yes",
        "QUARANTINED shop/bad",
        "Programming 2 changes; last 2.0 ms (of which 0.5 ms in the kernel), mean 2.5 ms, slowest 3.0 ms",
        "denied_ingress 7 420 B",
        "NetworkPolicy shop/db - - ingress shop/a, shop/b, shop/c, shop/d and 1 more",
    ] {
        assert!(lines.iter().any(|it| it == line), "{line}: {}", ran.text);
    }
    let early = PolicyReport { known: false, policies: Vec::new(), ..policy() };
    assert_eq!(run(&early, &["policy", "list"]).status, 1);
}

fn pod_policy(state: PodPolicyState) -> PodPolicyReport {
    PodPolicyReport {
        pod: pod("db-0"),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        state,
        quarantined: false,
        egress: Vec::new(),
        ingress: vec![RuleReport {
            origin: default_deny(),
            level: Level::NetworkPolicy,
            effect: Effect::Deny,
            peers: vec!["anybody".into()],
            ports: vec!["any".into()],
        }],
    }
}

#[test]
fn the_rules_of_a_pod_are_shown_in_order() {
    let ran = run(&pod_policy(PodPolicyState::Enforced), &["policy", "show", "shop/db-0"]);
    assert_eq!((ran.status, ran.request), (0, Request::PolicyOf { pod: "shop/db-0".into() }));
    let lines = words(&ran.text);
    for line in [
        "Pod shop/db-0 (10.0.0.1)",
        "State enforced",
        "Egress (from the pod): no rules, everything is allowed",
        "1 DENY anybody any default deny by: shop/db",
    ] {
        assert!(lines.iter().any(|it| it == line), "{line}: {}", ran.text);
    }
    assert_eq!(run(&pod_policy(PodPolicyState::Pending), &["policy", "show", "db-0"]).status, 1);
    let elsewhere = run(&pod_policy(PodPolicyState::Elsewhere { node: Some("beta".into()) }), &["policy", "show", "x"]);
    assert!(elsewhere.text.contains("enforced by node beta") && elsewhere.status == 0);
}

fn traced(verdict: Verdict, live: Live) -> TraceReport {
    let side = |direction, verdict, decided_by: Option<Origin>| Side {
        direction,
        pod: None,
        scope: Scope::ThisNode,
        verdict,
        asked: decided_by
            .iter()
            .map(|origin| Asked {
                origin: origin.clone(),
                level: Level::NetworkPolicy,
                effect: Effect::Deny,
                outcome: Outcome::Matched,
            })
            .collect(),
        decided_by,
    };
    let end = |address: &str, pod, place| TraceEnd { address: address.parse().unwrap(), pod, place };
    let (source, destination) = ("192.0.2.9", "10.0.0.1");
    TraceReport {
        connection: Connection {
            originator: source.parse().unwrap(),
            responder: destination.parse().unwrap(),
            protocol: 6,
            port: 5432,
        },
        source: end(source, None, Place::External),
        destination: end(destination, Some(pod("db-0")), Place::PodHere),
        verdict,
        hops: Vec::new(),
        broken: None,
        peer: None,
        translated: None,
        crossing: None,
        sides: vec![
            TraceSide {
                direction: Direction::Egress,
                decider: Decider::Nobody,
                side: side(Direction::Egress, Verdict::Allow, None),
                live: Live::NotHere,
            },
            TraceSide {
                direction: Direction::Ingress,
                decider: Decider::ThisNode,
                side: side(Direction::Ingress, verdict, (verdict == Verdict::Deny).then(default_deny)),
                live,
            },
        ],
    }
}

fn path(verdict: Verdict) -> Path {
    Path::Judged { chain: "ingress_0123456789ab".into(), class: Some(0x1234_abcd), others: true, verdict }
}

#[test]
fn a_trace_exits_with_1_for_what_is_denied() {
    let arguments = &["trace", "192.0.2.9", "shop/db-0", "--port", "5432"];
    let ran = run(&traced(Verdict::Deny, Live::Agrees { path: path(Verdict::Deny) }), arguments);
    let request = Request::Trace {
        source: "192.0.2.9".into(),
        destination: "shop/db-0".into(),
        protocol: 6,
        port: Some(5432),
        size: None,
    };
    assert_eq!((ran.status, ran.request), (1, request));
    let lines = words(&ran.text);
    for line in [
        "DENIED TCP 192.0.2.9 -> 10.0.0.1:5432",
        "from 192.0.2.9, outside of the cluster",
        "to 10.0.0.1 shop/db-0, pod of this node",
        "Egress: allowed (nobody decides)",
        "Ingress: DENIED by default deny by: shop/db (this node decides)",
        "1 default deny by: shop/db DENY matched",
        "live ruleset agrees: chain ingress_0123456789ab, class 0x1234abcd (that of all others) -> drop",
    ] {
        assert!(lines.iter().any(|it| it == line), "{line}: {}", ran.text);
    }
    let agrees = traced(Verdict::Allow, Live::Agrees { path: Path::Free });
    assert_eq!(run(&agrees, &["trace", "a", "b", "--protocol", "icmp"]).status, 0);
    let differs = run(&traced(Verdict::Allow, Live::Differs { path: path(Verdict::Deny) }), arguments);
    assert!(differs.text.contains("LIVE RULESET DIFFERS") && differs.status == 1, "{}", differs.text);
    let unread = Live::Unreadable { reason: "no nftables".into() };
    assert!(run(&traced(Verdict::Allow, unread), arguments).text.contains("could not be read: no nftables"));
}

fn flow(sequence: u64, name: &str) -> Flow {
    let end = |address: &str, port, pod: Option<&str>| FlowEnd {
        address: address.parse().unwrap(),
        port: Some(port),
        pod: pod.map(str::to_owned),
        namespace: pod.map(|_| "shop".to_owned()),
    };
    Flow {
        sequence,
        time: "2026-11-28T12:00:00.25Z".parse().unwrap(),
        count: 3,
        direction: Direction::Ingress,
        verdict: FlowVerdict::Denied,
        source: end("192.0.2.9", 40_000, None),
        destination: end("10.0.0.1", 5432, Some(name)),
        protocol: "TCP".into(),
        icmp: None,
        answer: false,
        length: 60,
        reason: default_deny().to_string(),
        policy: Some(default_deny()),
        changed_since: false,
        addressed: None,
        sent: None,
        received: None,
        milliseconds: None,
    }
}

fn flows(flows: Vec<Flow>, newest: u64) -> serde_json::Value {
    let more = flows.last().is_some_and(|last| last.sequence < newest);
    serde_json::to_value(FlowsReport { flows, newest, more, ..FlowsReport::default() }).unwrap()
}

#[test]
fn flows_are_lines_and_read_to_their_end() {
    let reports = || vec![flows(vec![flow(1, "db-0"), flow(2, "db-1")], 3), flows(vec![flow(3, "db-0")], 3)];
    let ran = run_along(reports(), &["flows"]);
    assert_eq!(ran.status, 0, "{}", ran.errors);
    let lines = words(&ran.text);
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0], "TIME EVENT DIRECTION PROTO COUNT FROM -> TO");
    let line = "2026-11-28T12:00:00Z denied ingress TCP 3 192.0.2.9:40000 -> shop/db-0 10.0.0.1:5432 (default deny by: shop/db)";
    assert_eq!(lines[1], line);
    let ran = run_along(reports(), &["flows", "--pod", "shop/db-1", "-o", "json"]);
    let printed: Vec<Flow> = ran.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(printed, [flow(2, "db-1")]);
    assert_eq!(words(&run_along(reports(), &["flows", "--last", "1"]).text).len(), 2);
}

#[test]
fn what_keeps_flows_from_being_recorded_or_was_lost_is_told() {
    let report = FlowsReport { lost: 5, unavailable: Some("no NFLOG".into()), ..FlowsReport::default() };
    let ran = run(&report, &["flows", "--denied"]);
    assert_eq!(
        (ran.status, ran.request),
        (1, Request::Flows { after: Some(0), denied: true, connections: false, follow: false })
    );
    assert!(
        ran.errors.contains("not recorded: no NFLOG") && ran.errors.contains("5 flows were lost"),
        "{}",
        ran.errors
    );
}

#[test]
fn quarantine_says_what_it_did() {
    let report = |quarantined, changed, by_label| QuarantineReport {
        pod: pod("bad"),
        quarantined,
        changed,
        by_label,
        enforced: true,
    };
    let ran = run(&report(true, true, false), &["quarantine", "shop/bad"]);
    assert_eq!((ran.status, ran.text.as_str()), (0, "shop/bad is cut off.\n"));
    assert_eq!(ran.request, Request::Quarantine { pod: "shop/bad".into(), on: true });
    let held = run(&report(true, false, true), &["quarantine", "shop/bad", "--release"]);
    assert!(held.status == 1 && held.text.contains("stays cut off: by its label"), "{}", held.text);
    let list = run(&policy(), &["quarantine", "--list"]);
    assert_eq!(words(&list.text), ["POD BY", "shop/bad label husk.dev/quarantine, request"]);
    let refused = run_against(Response::Refused { reason: "not here".into() }, &["quarantine", "x"]);
    assert_eq!((refused.status, refused.errors.as_str()), (3, "huskctl: not here\n"));
}

#[test]
fn wrong_usage_is_status_2_and_help_explains() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [
        &["policy"][..],
        &["policy", "show"],
        &["trace", "a"],
        &["trace", "a", "b"],
        &["trace", "a", "b", "--port", "http"],
        &["trace", "a", "b", "--port", "80", "--protocol", "icmp"],
        &["trace", "a", "b", "--protocol", "igmp"],
        &["quarantine"],
        &["quarantine", "a", "--list"],
        &["quarantine", "--list", "--release"],
    ] {
        assert_eq!(canned::huskctl(directory.path(), arguments).status.code(), Some(2), "{arguments:?}");
    }
    for command in ["policy", "trace", "flows", "quarantine"] {
        let output = canned::huskctl(directory.path(), &[command, "--help"]);
        assert!(output.status.success() && output.stdout.len() > 200, "{command}");
    }
}
