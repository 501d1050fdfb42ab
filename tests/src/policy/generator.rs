//! Small random clusters, as the JSON that an API server sends or a person writes.
//!
//! Everything comes from small alphabets, so that rules meet pods, and each other. Lists shrink to fewer items, keys to missing ones.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::collection::{btree_set, vec};
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use super::{EXTERNALS, NODE, OTHER_NODE, SLOTS, Slot, World};

/// Ports that rules name.
pub static PORTS: [u16; 6] = [80, 81, 90, 443, 1, 65535];

/// CIDRs that rules name; those that hold a later one may except it.
static CIDRS: [&str; 20] = [
    "10.1.0.1/32",
    "10.1.0.2/31",
    "10.1.0.0/30",
    "10.1.0.0/24",
    "10.1.1.0/24",
    "10.1.0.0/16",
    "10.1.0.3/16",
    "192.0.2.0/24",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "fd01::1/128",
    "fd01::2/127",
    "fd01::/126",
    "fd01::/112",
    "fd01::1:0/112",
    "fd01::/16",
    "fd01::3/16",
    "2001:db8::/32",
    "fc00::/7",
    "::/0",
];

static NAMESPACES: [&str; 3] = ["a", "b", "c"];

static PORT_NAMES: [&str; 3] = ["web", "dns", "none"];

type Key = Option<Value>;

/// A map of the keys that are not missing.
fn map<const N: usize>(keys: [(&str, Key); N]) -> Value {
    let given = keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Value::Object(given.collect::<Map<_, _>>())
}

/// A key that is missing, null, or has a value.
fn key(value: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Key> {
    prop_oneof![3 => Just(None), 1 => Just(Some(Value::Null)), 6 => value.prop_map(Some)]
}

/// A key that has a value, or is missing.
fn given(value: impl Strategy<Value = Value> + 'static, probability: f64) -> impl Strategy<Value = Key> {
    weighted(probability, value)
}

fn list(item: impl Strategy<Value = Value> + 'static, most: usize) -> impl Strategy<Value = Value> {
    vec(item, 0..=most).prop_map(Value::Array)
}

fn nonempty(item: impl Strategy<Value = Value> + 'static, most: usize) -> impl Strategy<Value = Value> {
    vec(item, 1..=most).prop_map(Value::Array)
}

fn one_of(texts: &'static [&'static str]) -> impl Strategy<Value = Value> {
    select(texts).prop_map(Value::from)
}

/// Keys of labels with the values that there are; the last is nobody's.
type Alphabet = &'static [(&'static str, &'static [&'static str])];

static POD_LABELS: Alphabet = &[("app", &["w", "d", "z"]), ("tier", &["f", "b", "z"])];

static NAMESPACE_LABELS: Alphabet =
    &[("env", &["x", "y", "z"]), ("kubernetes.io/metadata.name", &["a", "b", "c", "z"])];

fn selector(labels: Alphabet) -> BoxedStrategy<Value> {
    let one = || select(labels).prop_flat_map(|(key, values)| (Just(key), select(values)));
    let equal = vec(one(), 0..=2).prop_map(|all| all.into_iter().map(|(key, value)| (key.to_owned(), value.into())));
    let equal = equal.prop_map(|all| Value::Object(all.collect()));
    let with_values = select(labels).prop_flat_map(|(key, values)| {
        let chosen = vec(one_of(values), 1..=2).prop_map(Value::Array);
        (select(&["In", "NotIn"][..]), chosen)
            .prop_map(move |(operator, values)| json!({"key": key, "operator": operator, "values": values}))
    });
    let empty = || prop_oneof![3 => Just(None), 1 => Just(Some(Value::Null)), 1 => Just(Some(json!([])))];
    let without =
        (select(labels), select(&["Exists", "DoesNotExist"][..]), empty()).prop_map(|(it, operator, values)| {
            map([("key", Some(it.0.into())), ("operator", Some(operator.into())), ("values", values)])
        });
    let expression = prop_oneof![2 => with_values, 1 => without];
    let both = (key(equal), key(list(expression, 2)));
    let full = both.prop_map(|(equal, expressions)| map([("matchLabels", equal), ("matchExpressions", expressions)]));
    prop_oneof![2 => Just(json!({})), 3 => full].boxed()
}

fn pod_labels() -> impl Strategy<Value = Value> {
    let quarantine = weighted(0.06, select(&["true", "true", "false"][..]));
    (weighted(0.7, select(&["w", "d"][..])), weighted(0.5, select(&["f", "b"][..])), quarantine).prop_map(
        |(app, tier, quarantine)| {
            let text = |it: Option<&str>| it.map(Value::from);
            map([("app", text(app)), ("tier", text(tier)), ("husk.dev/quarantine", text(quarantine))])
        },
    )
}

fn protocol() -> impl Strategy<Value = Key> {
    key(one_of(&["TCP", "UDP", "SCTP"]))
}

/// Containers with a port each: names may occur again with another protocol.
fn containers() -> impl Strategy<Value = Value> {
    let name = given(one_of(&PORT_NAMES[..2]), 0.9);
    let port = (name, protocol(), select(&PORTS[..]));
    let port = port.prop_map(|(name, protocol, number)| {
        let port = map([("name", name), ("protocol", protocol), ("containerPort", Some(number.into()))]);
        json!({"name": "it", "ports": [port]})
    });
    list(port, 3)
}

/// What becomes of a place.
#[derive(Debug, Clone, Copy)]
enum State {
    Running,
    /// Its address is not in the object yet.
    Starting,
    Finished(&'static str),
    HostNetwork,
    /// The object is that of the pod that was there before.
    Predecessor,
    Missing,
}

fn pod(slot: &'static Slot) -> impl Strategy<Value = Option<Value>> {
    let state = if slot.local {
        prop_oneof![24 => Just(State::Running), 2 => Just(State::Starting), 1 => Just(State::Predecessor),
            1 => Just(State::Missing)]
        .boxed()
    } else {
        let finished = select(&["Succeeded", "Failed"][..]).prop_map(State::Finished);
        prop_oneof![12 => Just(State::Running), 1 => Just(State::HostNetwork), 1 => finished, 1 => Just(State::Missing)]
            .boxed()
    };
    // What ends before the pod begins has no ports, what runs beside it has.
    let first = (containers(), key(one_of(&["Always"]))).prop_map(|(mut all, policy)| {
        let policy = policy.unwrap_or_default();
        all.as_array_mut().into_iter().flatten().for_each(|it| it["restartPolicy"] = policy.clone());
        all
    });
    let ports = (containers(), given(first, 0.2));
    (state, pod_labels(), ports).prop_map(move |(state, labels, (containers, first))| {
        let uid = if matches!(state, State::Predecessor) { "uid-before".to_owned() } else { slot.uid() };
        let (phase, addresses) = match state {
            State::Missing => return None,
            State::Starting => ("Pending", None),
            State::HostNetwork => ("Running", Some(EXTERNALS[0])),
            State::Finished(phase) => (phase, Some(slot.addresses)),
            State::Running | State::Predecessor => ("Running", Some(slot.addresses)),
        };
        let node = if slot.local { NODE } else { OTHER_NODE };
        let host = matches!(state, State::HostNetwork).then(|| Value::from(true));
        let spec = [("nodeName", Some(node.into())), ("hostNetwork", host), ("containers", Some(containers))];
        let [node, host, containers] = spec;
        Some(object(
            (slot.namespace, slot.name),
            &uid,
            labels,
            map([node, host, containers, ("initContainers", first)]),
            (phase, addresses),
        ))
    })
}

type Status = (&'static str, Option<[IpAddr; 2]>);

fn object((namespace, name): (&str, &str), uid: &str, labels: Value, spec: Value, (phase, ips): Status) -> Value {
    let ips = ips.map(|ips| json!([{"ip": ips[0]}, {"ip": ips[1]}]));
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": uid, "labels": labels},
        "spec": spec,
        "status": map([("phase", Some(phase.into())), ("podIPs", ips)]),
    })
}

/// Pods that are gone, whose addresses are at a place now: they have ended, or the source has not noticed that another pod of the
/// node has them.
fn ghost() -> impl Strategy<Value = Value> {
    let place = select(&SLOTS[..]);
    (place, select(&NAMESPACES[..]), pod_labels(), containers(), any::<bool>()).prop_map(
        |(slot, namespace, labels, containers, finished)| {
            let (node, phase) = if slot.local && !finished { (NODE, "Running") } else { (OTHER_NODE, "Succeeded") };
            let spec = json!({"nodeName": node, "containers": containers});
            object((namespace, "ghost"), "uid-ghost", labels, spec, (phase, Some(slot.addresses)))
        },
    )
}

fn block() -> impl Strategy<Value = Value> {
    select(&CIDRS[..]).prop_flat_map(|cidr| {
        let within: Vec<Value> = CIDRS.iter().filter(|it| lies_within(it, cidr)).map(|it| (*it).into()).collect();
        let except = if within.is_empty() { Just(json!([])).boxed() } else { list(select(within), 2).boxed() };
        key(except).prop_map(move |except| json!({"ipBlock": map([("cidr", Some(cidr.into())), ("except", except)])}))
    })
}

/// True if one CIDR is a proper part of another.
fn lies_within(part: &str, whole: &str) -> bool {
    let parse = |text: &str| {
        let (address, length) = text.split_once('/')?;
        husk_overlay::prefix::Prefix::containing(address.parse().ok()?, length.parse().ok()?).ok()
    };
    parse(whole).zip(parse(part)).is_some_and(|(whole, part)| whole.covers(&part) && whole != part)
}

/// A peer of a NetworkPolicy.
fn peer() -> BoxedStrategy<Value> {
    let pods = || selector(POD_LABELS);
    let namespaces = || selector(NAMESPACE_LABELS);
    prop_oneof![
        3 => pods().prop_map(|pods| json!({"podSelector": pods})),
        2 => (namespaces(), any::<bool>()).prop_map(|(namespaces, null)| {
            map([("namespaceSelector", Some(namespaces)), ("podSelector", null.then_some(Value::Null))])
        }),
        2 => (pods(), namespaces()).prop_map(|(pods, all)| json!({"podSelector": pods, "namespaceSelector": all})),
        3 => block(),
    ]
    .boxed()
}

/// Two ports in order.
fn range() -> impl Strategy<Value = (u16, u16)> {
    (select(&PORTS[..]), select(&PORTS[..])).prop_map(|(one, other)| (one.min(other), one.max(other)))
}

/// A port of a NetworkPolicy.
fn port() -> impl Strategy<Value = Value> {
    let number = select(&PORTS[..]).prop_map(|it| (Some(it.into()), None));
    let name = one_of(&PORT_NAMES).prop_map(|it| (Some(it), None));
    let range = range().prop_map(|(first, last)| (Some(first.into()), Some(last.into())));
    let port = prop_oneof![3 => number, 2 => name, 2 => range, 1 => Just((None, None))];
    (protocol(), port)
        .prop_map(|(protocol, (port, end))| map([("protocol", protocol), ("port", port), ("endPort", end)]))
}

fn rule(peers: &'static str) -> impl Strategy<Value = Value> {
    (key(list(peer(), 3)), key(list(port(), 3))).prop_map(move |(these, ports)| map([(peers, these), ("ports", ports)]))
}

fn policy() -> impl Strategy<Value = (&'static str, Value)> {
    let types = prop_oneof![
        3 => Just(None),
        1 => Just(Some(Value::Null)),
        1 => Just(Some(json!([]))),
        2 => Just(Some(json!(["Ingress"]))),
        2 => Just(Some(json!(["Egress"]))),
        4 => Just(Some(json!(["Ingress", "Egress"]))),
    ];
    let selector = prop_oneof![1 => Just(None), 9 => selector(POD_LABELS).prop_map(Some)];
    let rules = (key(list(rule("from"), 3)), key(list(rule("to"), 3)));
    (select(&NAMESPACES[..]), selector, types, rules).prop_map(|(namespace, selector, types, (ingress, egress))| {
        let rules = [("policyTypes", types), ("ingress", ingress), ("egress", egress)];
        let [types, ingress, egress] = rules;
        (namespace, map([("podSelector", selector), types, ingress, egress]))
    })
}

/// Pods in namespaces, as cluster policies select them.
fn cluster_pods() -> impl Strategy<Value = Value> {
    let pods = (key(selector(NAMESPACE_LABELS)), selector(POD_LABELS)).prop_map(
        |(namespaces, pods)| json!({"pods": map([("namespaceSelector", namespaces), ("podSelector", Some(pods))])}),
    );
    prop_oneof![selector(NAMESPACE_LABELS).prop_map(|it| json!({"namespaces": it})), pods]
}

/// A protocol of a cluster policy.
fn cluster_protocol() -> impl Strategy<Value = Value> {
    let number = select(&PORTS[..]).prop_map(|it| json!({"number": it}));
    let range = range().prop_filter("a range of cluster policies has two ends", |(first, last)| first < last);
    let range = range.prop_map(|(start, end)| json!({"range": {"start": start, "end": end}}));
    let port = key(prop_oneof![number, range]).prop_map(|port| map([("destinationPort", port)]));
    let numbered =
        (select(&["tcp", "udp", "sctp"][..]), port).prop_map(|(protocol, port)| map([(protocol, Some(port))]));
    prop_oneof![3 => numbered, 1 => one_of(&PORT_NAMES).prop_map(|name| json!({"destinationNamedPort": name}))]
}

fn cluster_rule(peers: &'static str) -> impl Strategy<Value = Value> {
    let networks = nonempty(one_of(&CIDRS), 3).prop_map(|it| json!({"networks": it}));
    let peer =
        if peers == "to" { prop_oneof![2 => cluster_pods(), 1 => networks].boxed() } else { cluster_pods().boxed() };
    let action = one_of(&["Accept", "Deny", "Pass"]);
    let protocols = prop_oneof![1 => Just(None), 1 => nonempty(cluster_protocol(), 3).prop_map(Some)];
    (action, nonempty(peer, 2), protocols).prop_map(move |(action, these, mut protocols)| {
        // Networks have no ports with names, and the API refuses them together.
        if these.as_array().is_some_and(|all| all.iter().any(|it| it.get("networks").is_some())) {
            let all = protocols.as_mut().and_then(Value::as_array_mut);
            all.into_iter().for_each(|all| all.retain(|it| it.get("destinationNamedPort").is_none()));
        }
        let protocols = protocols.filter(|it| it != &json!([]));
        map([("action", Some(action)), (peers, Some(these)), ("protocols", protocols)])
    })
}

fn cluster_policy() -> impl Strategy<Value = Value> {
    let priority = select(&[0, 5, 1000][..]).prop_map(Value::from);
    let rules = (key(list(cluster_rule("from"), 3)), key(list(cluster_rule("to"), 3)));
    (one_of(&["Admin", "Baseline"]), priority, cluster_pods(), rules).prop_map(|(tier, priority, subject, rules)| {
        let [tier, priority, subject] =
            [("tier", tier), ("priority", priority), ("subject", subject)].map(|(key, value)| (key, Some(value)));
        map([tier, priority, subject, ("ingress", rules.0), ("egress", rules.1)])
    })
}

fn namespaces() -> impl Strategy<Value = Vec<Value>> {
    let labels = weighted(0.8, weighted(0.8, select(&["x", "y"][..])));
    vec(labels, 3).prop_map(|all| {
        let described = NAMESPACES.iter().zip(all).filter_map(|(name, env)| Some((name, env?)));
        let object = |(name, env): (&&str, Option<&str>)| {
            let labels = map([("env", env.map(Value::from)), ("kubernetes.io/metadata.name", Some((*name).into()))]);
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        };
        described.map(object).collect()
    })
}

fn pods() -> impl Strategy<Value = Vec<Value>> {
    let [one, two, three, four, five, six] = SLOTS.each_ref().map(pod);
    let all = (one, two, three, four, five, six);
    let all = all.prop_map(|(one, two, three, four, five, six)| [one, two, three, four, five, six]);
    (all, weighted(0.2, ghost())).prop_map(|(all, ghost)| all.into_iter().flatten().chain(ghost).collect())
}

/// Clusters. Every object in them is one that the API allows.
pub fn world() -> impl Strategy<Value = World> {
    let policies = vec(policy(), 0..=4).prop_map(|all| {
        let object = |(index, (namespace, spec)): (usize, (&str, Value))| {
            let metadata = json!({"namespace": namespace, "name": format!("policy-{index}")});
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec})
        };
        all.into_iter().enumerate().map(object).collect::<Vec<Value>>()
    });
    let named = (cluster_policy(), select(&["p", "q"][..]), select(&["v1alpha2", "v1beta1"][..]));
    let cluster_policies = vec(named, 0..=4).prop_map(|all| {
        let object = |(index, (spec, letter, version)): (usize, (Value, &str, &str))| {
            let metadata = json!({"name": format!("{letter}{index}")});
            let version = format!("policy.networking.k8s.io/{version}");
            json!({"apiVersion": version, "kind": "ClusterNetworkPolicy", "metadata": metadata, "spec": spec})
        };
        all.into_iter().enumerate().map(object).collect::<Vec<Value>>()
    });
    let asked =
        (weighted(0.05, 0..4_usize), weighted(0.2, btree_set(select(&CIDRS[..]), 1..=2)), weighted(0.1, Just(())));
    (namespaces(), pods(), policies, cluster_policies, asked).prop_map(
        |(namespaces, pods, policies, cluster_policies, (quarantined, allowed, optional))| World {
            objects: [namespaces, pods, policies, cluster_policies].concat(),
            optional: optional.is_some(),
            quarantined: quarantined.into_iter().collect(),
            allowed: allowed.into_iter().flatten().map(canonical).collect::<BTreeSet<String>>(),
        },
    )
}

/// What is asked of a node in person has no bits behind its length.
fn canonical(cidr: &str) -> String {
    let cidr = if cidr == "10.1.0.3/16" { "10.1.0.0/16" } else { cidr };
    if cidr == "fd01::3/16" { "fd01::/16".to_owned() } else { cidr.to_owned() }
}
