//! Whatever is not understood opens nothing.

use std::net::IpAddr;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::object::{ClusterAction, Direction, PolicyRule, Protocol};

fn any_json() -> impl Strategy<Value = Value> {
    let keys = [
        "podSelector",
        "namespaceSelector",
        "matchLabels",
        "matchExpressions",
        "key",
        "operator",
        "values",
        "ipBlock",
        "cidr",
        "except",
        "from",
        "to",
        "ports",
        "port",
        "endPort",
        "protocol",
        "protocols",
        "policyTypes",
        "ingress",
        "egress",
        "tier",
        "priority",
        "subject",
        "namespaces",
        "pods",
        "networks",
        "action",
        "name",
        "tcp",
        "destinationPort",
        "number",
        "range",
        "start",
        "end",
        "destinationNamedPort",
        "labels",
        "spec",
        "status",
        "containers",
        "x",
    ];
    let texts = [
        "",
        "a",
        "Accept",
        "Deny",
        "Pass",
        "Admin",
        "In",
        "Exists",
        "Ingress",
        "TCP",
        "10.0.0.0/8",
        "::/0",
        "10.0.0.0/9",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-1..70_000_i32).prop_map(Value::from),
        select(texts.to_vec()).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(7, 60, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(select(keys.to_vec()), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())),
        ]
    })
}

fn selector() -> impl Strategy<Value = Value> {
    let value = || select(vec!["x", "y"]);
    prop_oneof![
        Just(json!({})),
        value().prop_map(|value| json!({ "matchLabels": { "app": value } })),
        value().prop_map(
            |value| json!({ "matchExpressions": [{ "key": "app", "operator": "NotIn", "values": [value] }] })
        ),
        Just(json!({ "matchExpressions": [{ "key": "app", "operator": "Exists" }], "matchLabels": {} })),
    ]
}

fn cidr() -> impl Strategy<Value = Value> {
    select(vec![json!("10.0.0.0/8"), json!("10.0.0.0/31"), json!("0.0.0.0/0"), json!("192.0.2.0/24")])
}

fn list(key: &'static str, items: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop_oneof![Just(json!({})), prop::collection::vec(items, 0..3).prop_map(move |items| json!({ key: items })),]
}

fn merged(parts: Vec<Value>) -> Value {
    let entries = parts.into_iter().filter_map(|part| part.as_object().cloned()).flatten();
    Value::Object(entries.collect())
}

fn network_spec() -> impl Strategy<Value = Value> {
    let peer = || {
        prop_oneof![
            selector().prop_map(|it| json!({ "podSelector": it })),
            selector().prop_map(|it| json!({ "namespaceSelector": it })),
            (selector(), selector()).prop_map(|(a, b)| json!({ "podSelector": a, "namespaceSelector": b })),
            cidr().prop_map(|it| json!({ "ipBlock": { "cidr": it, "except": [] } })),
        ]
    };
    let port = || {
        select(vec![
            json!({}),
            json!({ "port": 80 }),
            json!({ "port": 1, "endPort": 90 }),
            json!({ "protocol": "UDP" }),
        ])
    };
    let rule = |peers: &'static str| (list(peers, peer()), list("ports", port())).prop_map(|(a, b)| merged(vec![a, b]));
    let types = vec![
        json!({}),
        json!({ "policyTypes": ["Ingress"] }),
        json!({ "policyTypes": ["Egress"] }),
        json!({ "policyTypes": ["Ingress", "Egress"] }),
    ];
    let subject = selector().prop_map(|it| json!({ "podSelector": it }));
    (subject, select(types), list("ingress", rule("from")), list("egress", rule("to")))
        .prop_map(|(a, b, c, d)| merged(vec![a, b, c, d]))
}

fn cluster_spec() -> impl Strategy<Value = Value> {
    let peer = |egress: bool| {
        let networks = cidr().prop_map(|it| json!({ "networks": [it] }));
        let namespaces = || selector().prop_map(|it| json!({ "namespaces": it }));
        let pods =
            (selector(), selector()).prop_map(|(a, b)| json!({ "pods": { "podSelector": a, "namespaceSelector": b } }));
        prop_oneof![namespaces(), pods, if egress { networks.boxed() } else { namespaces().boxed() }]
    };
    let protocol = || {
        select(vec![
            json!({ "tcp": { "destinationPort": { "number": 80 } } }),
            json!({ "udp": {} }),
            json!({ "tcp": { "destinationPort": { "range": { "start": 1, "end": 90 } } } }),
        ])
    };
    let action = || select(vec!["Accept", "Deny", "Pass"]);
    let protocols = || {
        prop_oneof![Just(json!({})), prop::collection::vec(protocol(), 1..3).prop_map(|it| json!({ "protocols": it }))]
    };
    let rule = move |key: &'static str| {
        (action(), prop::collection::vec(peer(key == "to"), 1..3), protocols()).prop_map(
            move |(action, peers, protocols)| merged(vec![json!({ "action": action, key: peers }), protocols]),
        )
    };
    let subject = prop_oneof![
        selector().prop_map(|it| json!({ "namespaces": it })),
        (selector(), selector()).prop_map(|(a, b)| json!({ "pods": { "podSelector": a, "namespaceSelector": b } })),
    ];
    (subject, list("ingress", rule("from")), list("egress", rule("to")))
        .prop_map(|(subject, a, b)| merged(vec![json!({ "tier": "Admin", "priority": 3, "subject": subject }), a, b]))
}

/// Every map whose keys are fixed.
fn maps(value: &mut Value, found: &mut Vec<*const Value>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| maps(item, found)),
        Value::Object(entries) => {
            let labels = entries.get("matchLabels").map(std::ptr::from_ref);
            for inner in entries.values_mut().filter(|inner| Some(std::ptr::from_ref::<Value>(*inner)) != labels) {
                maps(inner, found);
            }
            found.push(std::ptr::from_ref(value));
        }
        _ => {}
    }
}

/// Adds a key that nobody knows to one of the maps.
fn confused(spec: &Value, place: Index) -> Value {
    fn add(value: &mut Value, wanted: *const Value) {
        if std::ptr::eq(value, wanted) {
            value["new"] = json!(null);
            return;
        }
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| add(item, wanted)),
            Value::Object(entries) => entries.values_mut().for_each(|item| add(item, wanted)),
            _ => {}
        }
    }
    let mut spec = spec.clone();
    let mut found = Vec::new();
    maps(&mut spec, &mut found);
    let wanted = found[place.index(found.len())];
    add(&mut spec, wanted);
    spec
}

/// One end of a connection: a pod, or somebody outside.
struct End {
    namespace: &'static str,
    labels: Labels,
    address: IpAddr,
    is_pod: bool,
}

fn ends() -> Vec<End> {
    let end = |namespace, app: &str, address: &str, is_pod| End {
        namespace,
        labels: if app.is_empty() { Labels::new() } else { [("app".to_owned(), app.to_owned())].into() },
        address: address.parse().unwrap(),
        is_pod,
    };
    vec![
        end("shop", "x", "10.0.0.1", true),
        end("shop", "y", "10.0.0.2", true),
        end("shop", "", "10.0.0.3", true),
        end("other", "x", "10.0.0.4", true),
        end("", "", "192.0.2.1", false),
        end("", "", "198.51.100.1", false),
    ]
}

fn namespace_labels(name: &str) -> Labels {
    let app = if name == "shop" { "x" } else { "y" };
    [("app".to_owned(), app.to_owned())].into()
}

fn matches(rule: &PolicyRule, other: &End, port: (Protocol, u16)) -> bool {
    let at = |peer: &Peer| match peer {
        Peer::Pods { namespaces, pods } => {
            let there = match namespaces {
                NamespaceChoice::Named(name) => name == other.namespace,
                NamespaceChoice::Selected(selector) => selector.selects(&namespace_labels(other.namespace)),
            };
            other.is_pod && there && pods.selects(&other.labels)
        }
        Peer::Block { cidr, except } => {
            cidr.contains(other.address) && !except.iter().any(|it| it.contains(other.address))
        }
    };
    let by = |it: &PortMatch| match it {
        PortMatch::All(protocol) => *protocol == port.0,
        PortMatch::Range(protocol, first, last) => *protocol == port.0 && (*first..=*last).contains(&port.1),
        PortMatch::Named(..) => false,
    };
    rule.peers.as_ref().is_none_or(|all| all.iter().any(at)) && rule.ports.as_ref().is_none_or(|all| all.iter().any(by))
}

const PORTS: [(Protocol, u16); 4] =
    [(Protocol::Tcp, 80), (Protocol::Tcp, 85), (Protocol::Tcp, 443), (Protocol::Udp, 80)];

/// What NetworkPolicies of the namespace `shop` allow one of its pods.
fn allowed(policies: &[&NetworkPolicy], pod: &End, direction: Direction, other: &End, port: (Protocol, u16)) -> bool {
    let mine = policies.iter().filter(|policy| policy.selector.selects(&pod.labels));
    let rules: Vec<&[PolicyRule]> = mine.filter_map(|policy| policy.rules(direction)).collect();
    rules.is_empty() || rules.into_iter().flatten().any(|rule| matches(rule, other, port))
}

/// What a cluster policy decides; none where nothing of it matches.
fn decided(
    policy: &ClusterNetworkPolicy,
    pod: &End,
    direction: Direction,
    other: &End,
    port: (Protocol, u16),
) -> Option<ClusterAction> {
    let selected = policy.namespaces.selects(&namespace_labels(pod.namespace)) && policy.pods.selects(&pod.labels);
    let rule = policy.rules(direction).iter().find(|rule| matches(&rule.matches, other, port));
    rule.filter(|_| selected).map(|rule| rule.action)
}

proptest! {
    #[test]
    fn no_object_panics(spec in any_json(), metadata in any_json()) {
        for (version, kind) in [
            ("v1", "Pod"), ("v1", "Namespace"), ("networking.k8s.io/v1", "NetworkPolicy"),
            ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
        ] {
            let object = json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec, "status": spec });
            let reading = read(&object);
            prop_assert!(reading.object.is_some() || !reading.issues.is_empty());
            let _ = read(&json!({ "apiVersion": version, "kind": kind, "metadata": { "name": "x" }, "spec": spec }));
        }
        let _ = read(&spec);
    }

    #[test]
    fn a_network_policy_that_is_understood_less_allows_no_more(
        spec in network_spec(), others in prop::collection::vec(network_spec(), 0..2), place: Index,
    ) {
        let (clear, issues) = network_policy(spec.clone());
        prop_assert_eq!(issues, vec![]);
        let (unclear, issues) = network_policy(confused(&spec, place));
        // Only what does not count anyway is not looked at.
        prop_assert!(!issues.is_empty() || unclear == clear);
        let others: Vec<NetworkPolicy> = others.into_iter().map(|spec| network_policy(spec).0).collect();
        let with = |policy| others.iter().chain([policy]).collect::<Vec<&NetworkPolicy>>();
        let (before, after) = (with(&clear), with(&unclear));
        let ends = ends();
        for pod in &ends[..3] {
            for (direction, other, port) in connections(&ends) {
                let more = allowed(&after, pod, direction, other, port) && !allowed(&before, pod, direction, other, port);
                prop_assert!(!more, "{direction} {} {}", pod.address, other.address);
            }
        }
    }

    #[test]
    fn a_cluster_policy_that_is_understood_less_denies_no_less(spec in cluster_spec(), place: Index) {
        let (clear, issues) = cluster_policy(spec.clone());
        prop_assert_eq!(issues, vec![]);
        let (unclear, issues) = cluster_policy(confused(&spec, place));
        prop_assert!(!issues.is_empty());
        prop_assert!((unclear.tier, unclear.priority) == (clear.tier, clear.priority));
        let ends = ends();
        for pod in &ends[..4] {
            for (direction, other, port) in connections(&ends) {
                let before = decided(&clear, pod, direction, other, port);
                let after = decided(&unclear, pod, direction, other, port);
                // Passing and saying nothing are not comparable: either may open, by what others say.
                let closed = before == after || after == Some(ClusterAction::Deny) || before == Some(ClusterAction::Accept);
                prop_assert!(closed, "{direction} {} {}: {before:?} {after:?}", pod.address, other.address);
            }
        }
    }
}

fn connections(ends: &[End]) -> impl Iterator<Item = (Direction, &End, (Protocol, u16))> {
    let others = ends.iter().flat_map(|other| PORTS.map(|port| (other, port)));
    others.flat_map(|(other, port)| Direction::ALL.map(|direction| (direction, other, port)))
}
