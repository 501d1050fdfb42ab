//! What policy means, four times: by the API's prose to the letter, by the verdict that people are shown, by the table that is
//! compiled, and by the answers that the documentation itself gives. On thousands of random clusters they are the same.
//!
//! `PROPTEST_CASES` is the number of clusters.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, anyhow};
use husk_overlay::kernel::Hook;
use husk_policy::compile::{STATELESS, UNKNOWN_POD, compile, denied_counter};
use husk_policy::verdict::{Connection, Scope as Judge, Verdict, verdict};
use husk_tests::Family;
use husk_tests::policy::generator::world;
use husk_tests::policy::interpreter::{Interface, Interpreter, Outcome, Packet};
use husk_tests::policy::oracle::{Oracle, Scope};
use husk_tests::policy::{EXTERNALS, Flow, PROTOCOLS, SLOTS, World};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseResult, TestError, TestRunner};
use serde_json::{Value, json};

/// Clusters, unless the environment says otherwise.
const CASES: u32 = 3_072;

/// Addresses at the ends of the CIDRs that rules name, which nobody has.
const STRANGERS: [[IpAddr; 2]; 3] = [
    [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 0)), IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 0))],
    [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 255)), IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 0xffff))],
    [IpAddr::V4(Ipv4Addr::BROADCAST), IpAddr::V6(Ipv6Addr::from_bits(u128::MAX))],
];

/// Addresses of the node.
const HOST: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 100)), IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 1, 0))];

/// Protocols without ports: ICMP of both families, and GRE.
const PORTLESS: [[u8; 2]; 2] = [[1, 58], [47, 47]];

/// Who may be at an end of a connection: an address, and the interface of the node that leads to it.
type End = (IpAddr, Interface);

fn ends(family: Family) -> Vec<End> {
    let index = usize::from(family == Family::Ipv6);
    let pods =
        SLOTS.iter().map(|slot| (slot.addresses[index], if slot.local { Interface::Pod } else { Interface::Tunnel }));
    let others = EXTERNALS.iter().chain(&STRANGERS).map(|it| (it[index], Interface::Other));
    pods.chain(others).collect()
}

/// A connection with the interfaces that its packets pass.
#[derive(Debug, Clone, Copy)]
struct Way {
    flow: Flow,
    from: Interface,
    to: Interface,
}

/// Every connection of a family that could tell a difference.
fn ways(world: &World, family: Family) -> Vec<Way> {
    let ports = world.ports();
    let mut ways = Vec::new();
    let (ends, strangers) = (ends(family), STRANGERS.map(|it| it[usize::from(family == Family::Ipv6)]));
    for (from, input) in &ends {
        for (to, output) in &ends {
            let mut add = |protocol, port| {
                let flow = Flow { from: *from, to: *to, protocol, port };
                ways.push(Way { flow, from: *input, to: *output });
            };
            PORTLESS.iter().for_each(|protocol| add(protocol[usize::from(family == Family::Ipv6)], 80));
            if [input, output].contains(&&Interface::Pod) {
                // That it is a stranger makes no difference at some ports only.
                let step = if strangers.contains(from) || strangers.contains(to) { 4 } else { 1 };
                let ports = || ports.iter().step_by(step);
                PROTOCOLS.iter().for_each(|(_, protocol)| ports().for_each(|port| add(*protocol, *port)));
            }
        }
    }
    ways
}

/// Some of them, others for every cluster: the rest is asked elsewhere.
fn some_ways(world: &World, family: Family) -> impl Iterator<Item = Way> {
    let some = world.objects.iter().map(|it| it.to_string().len()).sum::<usize>() % 7;
    ways(world, family).into_iter().skip(some).step_by(7)
}

/// Why a table can be evaluated.
const CHECKED: &str = "the table was checked";

/// What becomes of a packet that is forwarded.
fn forwarded(table: &Interpreter<'_>, packet: &Packet) -> Outcome {
    // Connection tracking comes after the first hook that asks (priority -200), and so does the route.
    let before = Packet { output: None, connection: None, ..*packet };
    let first = table.evaluate(Hook::Prerouting, &before).expect(CHECKED);
    if first.passes { table.evaluate(Hook::Forward, packet).expect(CHECKED) } else { first }
}

fn packet(Way { flow, from, to }: Way) -> Packet {
    let Flow { from: source, to: destination, .. } = flow;
    Packet { input: Some(from), output: Some(to), source, destination, connection: Some(flow) }
}

fn answer(way: Way) -> Packet {
    let packet = packet(way);
    let Packet { input, output, source, destination, .. } = packet;
    Packet { input: output, output: input, source: destination, destination: source, ..packet }
}

/// Runs a property on random clusters, or a part of their number, and tells of the smallest one without it.
fn on_random_clusters(part: u32, property: impl Fn(World) -> TestCaseResult) -> Result<()> {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES);
    let config = ProptestConfig::with_cases(cases.div_ceil(part));
    let config = ProptestConfig { failure_persistence: None, max_shrink_iters: 4_000, ..config };
    TestRunner::new(config).run(&world(), property).map_err(|error| match error {
        TestError::Fail(reason, world) => anyhow!("{reason}\nin this cluster:\n{world:?}"),
        TestError::Abort(reason) => anyhow!("{reason}"),
    })
}

#[test]
fn the_table_does_what_the_prose_says_in_ipv4() -> Result<()> {
    the_table_does_what_the_prose_says(Family::Ipv4)
}

#[test]
fn the_table_does_what_the_prose_says_in_ipv6() -> Result<()> {
    the_table_does_what_the_prose_says(Family::Ipv6)
}

fn the_table_does_what_the_prose_says(family: Family) -> Result<()> {
    let seen = Cell::new([0_u64; 2]);
    on_random_clusters(2, |world| {
        let (oracle, compiled) = (Oracle::new(&world, Scope::Node), world.table());
        let table = Interpreter::new(&compiled).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        for (index, way) in ways(&world, family).into_iter().enumerate() {
            let expected = oracle.allows(&way.flow);
            let done = forwarded(&table, &packet(way));
            prop_assert_eq!(done.passes, expected, "{:?}: {:?}", way, done.counted);
            // As the first packet of a connection, so the last, whoever sends it.
            if index % 3 == 0 {
                let done = forwarded(&table, &answer(way));
                prop_assert_eq!(done.passes, expected, "the answer to {:?}: {:?}", way, done.counted);
            }
            let mut counts = seen.get();
            counts[usize::from(expected)] += 1;
            seen.set(counts);
        }
        Ok(())
    })?;
    let [denied, allowed] = seen.get();
    eprintln!("{family}: {allowed} connections were allowed, {denied} denied");
    assert!(
        denied.min(allowed) > (denied + allowed) / 10,
        "the clusters tell little: {allowed} allowed, {denied} denied"
    );
    Ok(())
}

#[test]
fn the_verdict_that_people_see_is_what_the_prose_says() -> Result<()> {
    on_random_clusters(1, |world| {
        let (oracle, cluster) = (Oracle::new(&world, Scope::Node), world.cluster());
        let compiled = compile(&cluster, &Family::ALL.into());
        let table = Interpreter::new(&compiled).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        for way in Family::ALL.into_iter().flat_map(|family| some_ways(&world, family)) {
            let Flow { from: originator, to: responder, protocol, port } = way.flow;
            let decision = verdict(&cluster, &Connection { originator, responder, protocol, port });
            prop_assert_eq!(decision.verdict == Verdict::Allow, oracle.allows(&way.flow), "{:?}: {:#?}", way, decision);
            // The counter is that of the side that denies, the first of them.
            let denied = decision.sides.iter().find(|side| side.verdict == Verdict::Deny);
            let counted = forwarded(&table, &packet(way)).counted.last().cloned();
            if let Some(side) = denied {
                let expected = if decision.sides.iter().any(|side| side.scope == Judge::Unknown) {
                    UNKNOWN_POD.to_owned()
                } else {
                    denied_counter(side.direction)
                };
                prop_assert_eq!(counted, Some(expected), "{:?}: {:#?}", way, decision);
            }
        }
        Ok(())
    })
}

#[test]
fn what_belongs_to_no_connection_passes_where_everything_does() -> Result<()> {
    on_random_clusters(1, |world| {
        let (oracle, compiled) = (Oracle::new(&world, Scope::Node), world.table());
        let table = Interpreter::new(&compiled).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let ways = Family::ALL.into_iter().flat_map(|family| some_ways(&world, family));
        for way in ways.filter(|way| way.flow.from != way.flow.to) {
            let done = forwarded(&table, &Packet { connection: None, ..packet(way) });
            if done.passes {
                prop_assert!(oracle.allows(&way.flow), "{:?} would not pass with a connection", way);
            } else {
                let counted = done.counted.last().map(String::as_str);
                prop_assert!([Some(STATELESS), Some(UNKNOWN_POD)].contains(&counted), "{:?}: {:?}", way, counted);
            }
        }
        Ok(())
    })
}

#[test]
fn objects_in_any_order_make_one_table() -> Result<()> {
    on_random_clusters(1, |mut world| {
        let compiled = world.table();
        let length = world.objects.len().max(1);
        for turn in [0, length / 2, 1] {
            world.objects.rotate_left(turn % length);
            world.objects.reverse();
            prop_assert_eq!(world.table(), compiled.clone());
        }
        Ok(())
    })
}

#[test]
fn pods_that_are_cut_off_do_not_reach_their_host() -> Result<()> {
    on_random_clusters(1, |world| {
        let compiled = world.table();
        let table = Interpreter::new(&compiled).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        for (index, slot) in SLOTS.iter().enumerate().filter(|(_, slot)| slot.local) {
            let labelled =
                world.pod(slot).is_some_and(|pod| pod["metadata"]["labels"]["husk.dev/quarantine"] == "true");
            let closed = labelled || world.quarantined.contains(&index) || world.is_unknown(slot);
            for (source, node) in slot.addresses.into_iter().zip(HOST) {
                let flow = Flow { from: source, to: node, protocol: 6, port: 80 };
                let asking = packet(Way { flow, from: Interface::Pod, to: Interface::Other });
                let asking = Packet { output: None, ..asking };
                let first = table.evaluate(Hook::Prerouting, &Packet { connection: None, ..asking }).unwrap();
                let passes = first.passes && table.evaluate(Hook::Input, &asking).unwrap().passes;
                prop_assert_eq!(passes, !closed, "{:?}", slot);
                // The node itself, a kubelet for example, reaches every pod that is known, and has its answers.
                let flow = Flow { from: node, to: source, ..flow };
                let answer = Packet { connection: Some(flow), ..asking };
                let passes = first.passes && table.evaluate(Hook::Input, &answer).unwrap().passes;
                prop_assert_eq!(passes, !world.is_unknown(slot), "the answer of {:?} to its host", slot);
            }
        }
        Ok(())
    })
}

/// A cluster with pods of these labels at the first places, all namespaces of the label `env` with their own name as its value.
fn described(labels: &[Value], policies: &[Value]) -> World {
    let pods = SLOTS.iter().zip(labels).map(|(slot, labels)| {
        json!({
            "kind": "Pod",
            "metadata": {"namespace": slot.namespace, "name": slot.name, "uid": slot.uid(), "labels": labels},
            "spec": {"nodeName": "here", "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": []},
        })
    });
    let namespace = |name: &&str| json!({"kind": "Namespace", "metadata": {"name": name, "labels": {"env": name}}});
    let objects = ["a", "b", "c"].iter().map(namespace).chain(pods).chain(policies.iter().cloned()).collect();
    World { objects, optional: false, quarantined: BTreeSet::new(), allowed: BTreeSet::new() }
}

fn network_policy(spec: Value) -> Value {
    json!({"kind": "NetworkPolicy", "metadata": {"namespace": "a", "name": "it"}, "spec": spec})
}

fn cluster_policy(name: &str, tier: &str, rule: &Value) -> Value {
    let spec = json!({"tier": tier, "priority": 10, "subject": {"namespaces": {}}, "ingress": [rule]});
    json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": spec})
}

/// Which TCP connections, given as `from>to:port`, are allowed. The first four places are 1 to 4.
fn allowed<'a>(world: &World, asked: &[&'a str]) -> Vec<&'a str> {
    let address = |text: &str| match text.parse::<usize>() {
        Ok(place) => SLOTS[place - 1].addresses[0],
        Err(_) => text.parse().expect("an address"),
    };
    let flow = |text: &str| {
        let (from, rest) = text.split_once('>').expect("two ends");
        let (to, port) = rest.split_once(':').expect("a port");
        Flow { from: address(from), to: address(to), protocol: 6, port: port.parse().expect("a number") }
    };
    let oracle = Oracle::new(world, Scope::Cluster);
    asked.iter().copied().filter(|text| oracle.allows(&flow(text))).collect()
}

#[test]
fn the_oracle_gives_the_answers_of_the_documentation() {
    let labels = [json!({"role": "db"}), json!({"role": "frontend"}), json!({}), json!({"role": "frontend"})];
    let ask = |policies: &[Value], asked: &[&'static str]| allowed(&described(&labels, policies), asked);

    // "Network Policies", section "The NetworkPolicy resource".
    let example = network_policy(json!({
        "podSelector": {"matchLabels": {"role": "db"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{
            "from": [
                {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}},
                {"namespaceSelector": {"matchLabels": {"env": "b"}}},
                {"podSelector": {"matchLabels": {"role": "frontend"}}},
            ],
            "ports": [{"protocol": "TCP", "port": 6379}],
        }],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 5978}]}],
    }));
    let asked =
        ["172.17.0.1>1:6379", "172.17.1.1>1:6379", "172.17.2.0>1:6379", "2>1:6379", "2>1:6380", "3>1:6379", "4>1:6379"];
    assert_eq!(
        ask(std::slice::from_ref(&example), &asked),
        ["172.17.0.1>1:6379", "172.17.2.0>1:6379", "2>1:6379", "3>1:6379"]
    );
    let asked = ["1>10.0.0.1:5978", "1>10.0.0.1:5979", "1>10.0.1.1:5978", "1>2:5978", "1>1:5978", "2>3:5978"];
    assert_eq!(ask(&[example], &asked), ["1>10.0.0.1:5978", "1>1:5978", "2>3:5978"]);

    // "Behavior of to and from selectors": one item with both, and two items.
    let from = |peers: Value| network_policy(json!({"podSelector": {}, "ingress": [{"from": peers}]}));
    let (space, role) = (json!({"matchLabels": {"env": "c"}}), json!({"matchLabels": {"role": "frontend"}}));
    let asked = ["2>1:80", "3>1:80", "4>1:80", "1>2:80"];
    let both = from(json!([{"namespaceSelector": space, "podSelector": role}]));
    assert_eq!(ask(&[both], &asked), ["4>1:80"]);
    let either = from(json!([{"namespaceSelector": space}, {"podSelector": role}]));
    assert_eq!(ask(&[either], &asked), ["2>1:80", "4>1:80"]);

    // "Default policies".
    let asked = ["2>1:80", "9.9.9.9>1:80", "1>9.9.9.9:80", "3>4:80"];
    assert_eq!(ask(&[network_policy(json!({"podSelector": {}}))], &asked), ["1>9.9.9.9:80", "3>4:80"]);
    assert_eq!(ask(&[network_policy(json!({"podSelector": {}, "ingress": [{}]}))], &asked), asked);
    let no_egress = network_policy(json!({"podSelector": {}, "policyTypes": ["Egress"]}));
    assert_eq!(ask(&[no_egress], &asked), ["9.9.9.9>1:80", "3>4:80"]);

    // "Targeting a range of ports", and ports with names.
    let ports = |ports: Value| network_policy(json!({"podSelector": {}, "ingress": [{"ports": ports}]}));
    let asked = ["2>1:8079", "2>1:8080", "2>1:8090", "2>1:8091"];
    assert_eq!(ask(&[ports(json!([{"port": 8080, "endPort": 8090}]))], &asked), ["2>1:8080", "2>1:8090"]);
    assert_eq!(ask(&[ports(json!([{"port": "web"}]))], &asked), ["2>1:8080"]);
    assert_eq!(ask(&[ports(json!([{"port": "web", "protocol": "UDP"}]))], &asked), [""; 0]);

    // ClusterNetworkPolicy: tiers, actions, and who goes first among equals.
    let rule = |action: &str, space: &str| json!({"action": action, "from": [{"namespaces": {"matchLabels": {"env": space}}}]});
    let isolated = || network_policy(json!({"podSelector": {}}));
    let asked = ["2>1:80", "3>1:80", "4>1:80", "1>4:80"];
    let admin = |action| cluster_policy("m", "Admin", &rule(action, "b"));
    assert_eq!(ask(&[admin("Accept"), isolated()], &asked), ["3>1:80", "1>4:80"]);
    assert_eq!(ask(&[admin("Deny")], &asked), ["2>1:80", "4>1:80", "1>4:80"]);
    assert_eq!(ask(&[admin("Pass"), cluster_policy("n", "Admin", &rule("Deny", "b"))], &asked), asked);
    assert_eq!(ask(&[admin("Pass"), isolated()], &asked), ["1>4:80"]);
    assert_eq!(ask(&[admin("Deny"), cluster_policy("l", "Admin", &rule("Accept", "b"))], &asked), asked);
    let baseline = |action, space| cluster_policy("m", "Baseline", &rule(action, space));
    assert_eq!(ask(&[baseline("Accept", "b"), isolated()], &asked), ["1>4:80"]);
    assert_eq!(ask(&[baseline("Deny", "a")], &asked), ["3>1:80", "4>1:80"]);
}
