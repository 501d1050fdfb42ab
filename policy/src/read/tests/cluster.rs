use super::*;
use crate::object::{ClusterAction, ClusterRule, Tier};

const SUBJECT: &str = r#"{ "namespaces": { "matchLabels": { "t": "x" } } }"#;

fn spec(rules: Value) -> Value {
    let subject: Value = serde_json::from_str(SUBJECT).unwrap();
    json!({ "tier": "Baseline", "priority": 7, "subject": subject, "egress": rules })
}

fn rules(rules: &[ClusterRule]) -> Vec<String> {
    rules.iter().map(|rule| format!("{} {:?} {}", rule.name, rule.action, shown(&rule.matches))).collect()
}

/// Peers and ports of a rule that must be understood.
fn understood(rule: Value) -> String {
    let (policy, issues) = cluster_policy(spec(json!([rule])));
    assert_eq!(issues, []);
    shown(&policy.egress[0].matches)
}

#[test]
fn a_policy_is_read() {
    let every = json!([{ "namespaces": {} }]);
    let (policy, issues) = cluster_policy(json!({
        "tier": "Admin", "priority": 1000,
        "subject": { "pods": { "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": "x" } } } },
        "ingress": [
            { "name": "first", "action": "Accept", "from": every },
            { "action": "Pass", "from": every, "protocols": null }, { "name": "", "action": "Deny", "from": every },
        ],
    }));
    assert_eq!(issues, []);
    assert_eq!((policy.tier, policy.priority), (Tier::Admin, 1000));
    assert_eq!((policy.namespaces.to_string(), policy.pods.to_string()), ("*".into(), "app=x".into()));
    let expected = ["first Accept", "1 Pass", "2 Deny"].map(|it| format!("{it} [* in <*>] everything"));
    assert_eq!(rules(&policy.ingress), expected);
    assert!(policy.egress.is_empty());
    let (policy, _) = cluster_policy(spec(json!(null)));
    assert_eq!((policy.tier, policy.priority), (Tier::Baseline, 7));
    assert_eq!((policy.namespaces.to_string(), policy.pods.to_string()), ("t=x".into(), "*".into()));
}

#[test]
fn both_versions_are_read_and_others_are_told() {
    let of = |version: &str, kind: &str| {
        let metadata = json!({ "name": "c" });
        let version = format!("policy.networking.k8s.io/{version}");
        read(&json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec(json!([])) }))
    };
    assert_eq!(of("v1alpha2", "ClusterNetworkPolicy"), of("v1beta1", "ClusterNetworkPolicy"));
    assert!(of("v1beta1", "ClusterNetworkPolicy").object.is_some());
    for (version, kind) in [("v1", "ClusterNetworkPolicy"), ("v1alpha1", "AdminNetworkPolicy")] {
        let reading = of(version, kind);
        assert_eq!(reading.object, None);
        let [issue] = reading.issues.as_slice() else { panic!("{reading:?}") };
        assert!(issue.message.starts_with("apiVersion: \"policy.networking.k8s.io/v1"), "{issue}");
        assert!(issue.message.ends_with("nothing of it is in force"), "{issue}");
    }
}

#[test]
fn peers_and_protocols_are_read() {
    let selector = json!({ "matchLabels": { "a": "b" } });
    for (peer, expected) in [
        (json!({ "namespaces": selector }), "* in <a=b>"),
        (json!({ "namespaces": selector, "pods": null }), "* in <a=b>"),
        (json!({ "pods": { "namespaceSelector": selector, "podSelector": {} } }), "* in <a=b>"),
        (json!({ "pods": { "podSelector": selector } }), "a=b in <*>"),
        (json!({ "networks": ["10.1.2.3/8", "fd00::/8"] }), "10.0.0.0/8; fd00::/8"),
    ] {
        assert_eq!(understood(json!({ "action": "Deny", "to": [peer] })), format!("[{expected}] everything"));
    }
    for (protocol, expected) in [
        (json!({ "tcp": {} }), "TCP"),
        (json!({ "udp": { "destinationPort": null } }), "UDP"),
        (json!({ "sctp": { "destinationPort": { "number": 80 } } }), "SCTP 80"),
        (json!({ "tcp": { "destinationPort": { "range": { "start": 1, "end": 65535 } } } }), "TCP 1-65535"),
        (json!({ "destinationNamedPort": "http" }), "http"),
    ] {
        let rule = json!({ "action": "Deny", "to": [{ "namespaces": {} }], "protocols": [protocol] });
        assert_eq!(understood(rule), format!("[* in <*>] [{expected}]"));
    }
}

#[test]
fn a_rule_that_is_not_understood_accepts_nothing_or_denies_everything() {
    let every = json!([{ "namespaces": {} }]);
    let cases = [
        (json!({}), "spec.egress[0].to: the key is missing"),
        (json!({ "to": [] }), "spec.egress[0].to: []: a rule has at least one peer"),
        (json!({ "to": {} }), "to: {}: a list is expected"),
        (json!({ "to": [{}] }), "to[0]: {}: it has exactly one key"),
        (json!({ "to": [null] }), "to[0]: null: a map"),
        (json!({ "to": [{ "namespaces": {}, "networks": ["10.0.0.0/8"] }] }), "to[0]: a map: it has exactly one key"),
        (json!({ "to": [{ "nodes": {} }] }), "to[0].nodes: {}: Husk does not support"),
        (json!({ "to": [{ "domainNames": ["a.b"] }] }), "to[0].domainNames: a list: Husk does not support"),
        (json!({ "to": [{ "services": {} }] }), "to[0].services: {}: this version of Husk"),
        (json!({ "to": [{ "namespaces": { "x": 1 } }] }), "to[0].namespaces.x: 1"),
        (json!({ "to": [{ "pods": {} }] }), "to[0].pods.podSelector: the key is missing"),
        (json!({ "to": [{ "pods": { "podSelector": {}, "x": 1 } }] }), "to[0].pods.x: 1"),
        (json!({ "to": [{ "networks": [] }] }), "to[0].networks: []"),
        (json!({ "to": [{ "networks": ["x"] }] }), "to[0].networks[0]: \"x\": this is no CIDR"),
        (json!({ "to": every, "from": every }), "spec.egress[0].from: a list: this version"),
        (json!({ "to": every, "log": true }), "spec.egress[0].log: true: this version"),
        (json!({ "to": every, "name": 7 }), "spec.egress[0].name: 7: text"),
        (json!({ "to": every, "protocols": [] }), "protocols: []: the list has no protocol"),
        (json!({ "to": every, "protocols": {} }), "protocols: {}: a list"),
        (json!({ "to": every, "protocols": [{}] }), "protocols[0]: {}: it has exactly one key"),
        (json!({ "to": every, "protocols": [{ "icmp": {} }] }), "protocols[0].icmp"),
        (json!({ "to": every, "protocols": [{ "tcp": {}, "udp": {} }] }), "protocols[0]: a map: it has exactly"),
        (json!({ "to": every, "protocols": [{ "tcp": { "sourcePort": 1 } }] }), "protocols[0].tcp.sourcePort: 1"),
        (json!({ "to": every, "protocols": [{ "tcp": { "destinationPort": {} } }] }), "tcp.destinationPort: {}"),
        (json!({ "to": every, "protocols": [{ "tcp": { "destinationPort": { "number": 0 } } }] }), "number: 0"),
        (
            json!({ "to": every, "protocols": [{ "tcp": { "destinationPort": { "range": { "start": 2, "end": 1 } } } }] }),
            "range.end: 1: the range begins at 2",
        ),
        (
            json!({ "to": every, "protocols": [{ "tcp": { "destinationPort": { "range": { "start": 2 } } } }] }),
            "range.end: the key is missing",
        ),
        (json!({ "to": every, "protocols": [{ "destinationNamedPort": "" }] }), "destinationNamedPort: \"\""),
        (
            json!({ "to": [{ "networks": ["10.0.0.0/8"] }], "protocols": [{ "destinationNamedPort": "http" }] }),
            "protocols: a list: networks have no ports with names",
        ),
    ];
    for (rule, said) in cases {
        for (action, expected) in [
            (json!("Accept"), None),
            (json!("Deny"), Some("0 Deny everybody everything")),
            (json!("Pass"), Some("0 Deny everybody everything")),
        ] {
            let mut rule = rule.clone();
            rule["action"] = action;
            let (policy, issues) = cluster_policy(spec(json!([rule])));
            let expected: Vec<String> = expected.iter().map(|it| (*it).to_owned()).collect();
            assert_eq!(rules(&policy.egress), expected, "{rule}");
            let [issue] = issues.as_slice() else { panic!("{rule}: {issues:#?}") };
            assert!(issue.message.contains(said), "{rule}: {}", issue.message);
            let end = if expected.is_empty() { "the rule accepts nothing" } else { "the rule denies everything" };
            assert!(issue.message.ends_with(end), "{}", issue.message);
        }
    }
    for rule in [json!(null), json!("x"), json!({ "to": every }), json!({ "to": every, "action": "accept" })] {
        let (policy, issues) = cluster_policy(spec(json!([rule])));
        assert_eq!(
            (rules(&policy.egress), issues.len()),
            (vec!["0 Deny everybody everything".to_owned()], 1),
            "{rule}"
        );
    }
    // The rule keeps the name that people gave it, and nothing of it takes part in ingress.
    let (policy, _) = cluster_policy(spec(json!([{ "name": "n", "action": "Pass", "to": [] }])));
    assert_eq!((rules(&policy.egress), policy.ingress), (vec!["n Deny everybody everything".to_owned()], vec![]));
    // Networks are no peers of ingress.
    let rule = json!([{ "action": "Accept", "from": [{ "networks": ["10.0.0.0/8"] }] }]);
    let (policy, issues) =
        cluster_policy(json!({ "tier": "Admin", "priority": 0, "subject": { "namespaces": {} }, "ingress": rule }));
    assert_eq!((policy.ingress.len(), issues.len()), (0, 1));
}

#[test]
fn a_policy_whose_place_is_not_understood_is_first_for_every_pod_and_only_denies() {
    let to = json!([{ "namespaces": { "matchLabels": { "a": "b" } } }]);
    let all = json!([
        { "name": "a", "action": "Accept", "to": to }, { "name": "p", "action": "Pass", "to": to },
        { "name": "d", "action": "Deny", "to": to },
    ]);
    for (key, value, said) in [
        ("tier", json!("admin"), "spec.tier: \"admin\""),
        ("tier", json!(null), "spec.tier: the key is missing"),
        ("priority", json!(1001), "spec.priority: 1001"),
        ("priority", json!(-1), "spec.priority: -1"),
        ("priority", json!("1"), "spec.priority: \"1\""),
        ("priority", json!(null), "spec.priority: the key is missing"),
        ("subject", json!({}), "spec.subject: {}: it has exactly one key"),
        ("subject", json!(null), "spec.subject: the key is missing"),
        ("subject", json!({ "namespaces": {}, "pods": { "podSelector": {} } }), "spec.subject: a map: it has exactly"),
        ("subject", json!({ "namespaces": { "x": 1 } }), "spec.subject.namespaces.x: 1"),
        ("subject", json!({ "nodes": {} }), "spec.subject.nodes: {}"),
        ("schedule", json!({}), "spec.schedule: {}: this version of Husk knows no"),
    ] {
        let mut spec = spec(all.clone());
        spec[key] = value;
        let (policy, issues) = cluster_policy(spec);
        assert_eq!(
            rules(&policy.egress),
            ["p Deny [* in <a=b>] everything", "d Deny [* in <a=b>] everything"],
            "{said}"
        );
        let tier = if key == "tier" { Tier::Admin } else { Tier::Baseline };
        let priority = if key == "priority" { 0 } else { 7 };
        let subject = if key == "subject" { "*" } else { "t=x" };
        assert_eq!((policy.tier, policy.priority, policy.namespaces.to_string().as_str()), (tier, priority, subject));
        let [issue] = issues.as_slice() else { panic!("{issues:#?}") };
        assert!(issue.message.starts_with(said), "{}", issue.message);
    }
    for spec in [json!("x"), json!([])] {
        let (policy, issues) = cluster_policy(spec);
        assert_eq!((policy.tier, policy.priority, issues.len()), (Tier::Admin, 0, 1));
        assert_eq!(rules(&policy.ingress), ["0 Deny everybody everything"]);
        assert_eq!(rules(&policy.egress), rules(&policy.ingress));
    }
    let (policy, issues) = cluster_policy(spec(json!({ "action": "Accept" })));
    assert_eq!((rules(&policy.egress), issues.len()), (vec!["0 Deny everybody everything".to_owned()], 1));
    assert_eq!(policy.egress[0].action, ClusterAction::Deny);
}
