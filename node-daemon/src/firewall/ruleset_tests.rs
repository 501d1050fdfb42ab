//! Rules as nft 1.0.6 prints them.

use serde_json::json;

use super::*;

fn chain(family: &str, table: &str, name: &str, hook: Option<&str>, policy: &str) -> Value {
    match hook {
        Some(hook) => json!({"chain": {"family": family, "table": table, "name": name, "handle": 1, "type": "filter",
            "hook": hook, "prio": 0, "policy": policy}}),
        None => json!({"chain": {"family": family, "table": table, "name": name, "handle": 1}}),
    }
}

fn rule(family: &str, table: &str, chain: &str, handle: u64, expr: Value) -> Value {
    json!({"rule": {"family": family, "table": table, "chain": chain, "handle": handle, "expr": expr}})
}

fn ruleset(objects: Vec<Value>) -> Ruleset {
    Ruleset::parse(&json!({"nftables": objects}))
}

fn equal(left: Value, right: Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn vxlan_from(peer: &str) -> Packet {
    Packet {
        hooks: vec!["prerouting", "input"],
        input: Some("eth0".into()),
        output: Some(String::new()),
        source: Some(peer.parse().unwrap()),
        protocol: Some(17),
        port: Some(4789),
        ..Packet::default()
    }
}

fn pod_packet() -> Packet {
    Packet {
        hooks: vec!["prerouting", "forward", "postrouting"],
        input: Some("husk0123456789a".into()),
        output: Some("husk-vx".into()),
        source: Some("10.42.0.1".parse().unwrap()),
        destination: Some("10.42.1.1".parse().unwrap()),
        ..Packet::default()
    }
}

#[test]
fn the_rule_that_drops_is_found_wherever_it_is_called_from() {
    let rules = ruleset(vec![
        chain("inet", "fw", "in", Some("input"), "accept"),
        chain("inet", "fw", "udp", None, ""),
        rule("inet", "fw", "in", 4, json!([equal(payload("tcp", "dport"), json!(4789)), {"drop": null}])),
        rule("inet", "fw", "in", 5, json!([equal(meta("l4proto"), json!("udp")), {"jump": {"target": "udp"}}])),
        rule(
            "inet",
            "fw",
            "udp",
            6,
            json!([
            equal(payload("ip", "saddr"), json!({"prefix": {"addr": "192.0.2.0", "len": 25}})),
            equal(payload("udp", "dport"), json!({"set": [53, {"range": [4700, 4800]}]})),
            {"counter": {"packets": 3, "bytes": 300}}, {"drop": null}]),
        ),
    ]);
    let [place] = &rules.drops(&vxlan_from("192.0.2.7"))[..] else { panic!("one place") };
    assert_eq!((place.chain.as_str(), place.hook.as_str(), place.perhaps), ("udp", "input", false));
    let (handle, text) = place.rule.clone().unwrap();
    assert_eq!((handle, text.as_str()), (6, "ip saddr 192.0.2.0/25 udp dport { 53, 4700-4800 } drop"));
    assert_eq!(rules.drops(&vxlan_from("192.0.2.200")), []);
    assert_eq!(rules.drops(&pod_packet()), []);
}

#[test]
fn a_policy_drops_what_no_rule_accepts() {
    // As Docker leaves it.
    let forward = vec![
        chain("ip", "filter", "FORWARD", Some("forward"), "drop"),
        chain("ip", "filter", "DOCKER-USER", None, ""),
        rule(
            "ip",
            "filter",
            "FORWARD",
            2,
            json!([{"counter": {"packets": 0, "bytes": 0}}, {"jump": {"target": "DOCKER-USER"}}]),
        ),
        rule(
            "ip",
            "filter",
            "FORWARD",
            3,
            json!([equal(meta("oifname"), json!("docker0")),
            {"xt": {"type": "match", "name": "conntrack"}}, {"accept": null}]),
        ),
        rule("ip", "filter", "FORWARD", 4, json!([equal(payload("tcp", "dport"), json!(22)), {"accept": null}])),
    ];
    let [place] = &ruleset(forward.clone()).drops(&pod_packet())[..] else { panic!("one place") };
    assert_eq!((place.rule.clone(), place.perhaps), (None, false));
    let six = Packet { ipv6: true, source: None, destination: None, ..pod_packet() };
    assert_eq!(ruleset(forward.clone()).drops(&six), []);
    let with_user = |expr: Value| {
        let mut all = forward.clone();
        all.push(rule("ip", "filter", "DOCKER-USER", 9, expr));
        ruleset(all).drops(&pod_packet())
    };
    assert_eq!(with_user(json!([equal(meta("iifname"), json!("husk*")), {"accept": null}])), []);
    // What only a program of iptables can read may be anything.
    let doubtful = with_user(json!([{"xt": {"type": "match", "name": "addrtype"}}, {"accept": null}]));
    assert!(doubtful.len() == 1 && doubtful[0].perhaps, "{doubtful:?}");
    assert_eq!(
        with_user(json!([equal(json!({"ct": {"key": "state"}}), json!(["established", "related"])), {"accept": null}]))
            .len(),
        1
    );
}

#[test]
fn what_may_not_concern_us_is_not_blamed() {
    let input = |expr: Value| {
        let rules =
            ruleset(vec![chain("inet", "fw", "in", Some("input"), "accept"), rule("inet", "fw", "in", 2, expr)]);
        rules.drops(&vxlan_from("192.0.2.7")).len()
    };
    assert_eq!(input(json!([{"drop": null}])), 1);
    assert_eq!(input(json!([{"reject": {"type": "tcp reset"}}])), 1);
    assert_eq!(input(json!([equal(meta("iifname"), json!("lo")), {"drop": null}])), 0);
    assert_eq!(input(json!([{"match": {"op": "!=", "left": meta("iifname"), "right": "lo"}}, {"drop": null}])), 1);
    assert_eq!(input(json!([{"limit": {"rate": 10, "burst": 5, "per": "second"}}, {"drop": null}])), 0);
    assert_eq!(
        input(json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}])),
        0
    );
    assert_eq!(input(json!([equal(payload("ip6", "saddr"), json!("2001:db8::1")), {"drop": null}])), 0);
    assert_eq!(input(json!([equal(payload("udp", "sport"), json!(53)), {"drop": null}])), 0);
    assert_eq!(
        input(
            json!([equal(json!({"fib": {"result": "oif", "flags": ["saddr", "iif"]}}), json!(false)), {"drop": null}])
        ),
        0
    );
}

#[test]
fn named_sets_and_verdict_maps_are_looked_up() {
    let rules = ruleset(vec![
        json!({"set": {"family": "inet", "table": "fw", "name": "bad", "type": "ipv4_addr", "handle": 3,
            "elem": [{"elem": {"val": "192.0.2.7", "timeout": 60}}, {"prefix": {"addr": "198.51.100.0", "len": 24}}]}}),
        chain("inet", "fw", "in", Some("prerouting"), "accept"),
        chain("inet", "fw", "closed", None, ""),
        rule(
            "inet",
            "fw",
            "in",
            4,
            json!([equal(payload("ip", "saddr"), json!("@bad")),
            {"vmap": {"key": payload("udp", "dport"), "data": {"set": [[53, {"accept": null}], [4789, {"goto": {"target": "closed"}}]]}}}]),
        ),
        rule("inet", "fw", "closed", 5, json!([{"drop": null}])),
    ]);
    assert_eq!(rules.drops(&vxlan_from("192.0.2.7"))[0].chain, "closed");
    assert_eq!(rules.drops(&vxlan_from("198.51.100.9")).len(), 1);
    assert_eq!(rules.drops(&vxlan_from("192.0.2.8")), []);
}

#[test]
fn a_map_by_interface_leaves_doubt_where_ours_is_not_known() {
    let rules = ruleset(vec![
        chain("inet", "fw", "in", Some("input"), "drop"),
        rule(
            "inet",
            "fw",
            "in",
            4,
            json!([{"vmap": {"key": meta("iifname"), "data": {"set": [["lo", {"accept": null}], ["eth0", {"accept": null}]]}}}]),
        ),
    ]);
    assert_eq!(rules.drops(&vxlan_from("192.0.2.7")), []);
    let unknown = Packet { input: None, ..vxlan_from("192.0.2.7") };
    assert!(rules.drops(&unknown)[0].perhaps);
}

#[test]
fn chains_that_call_themselves_end() {
    let rules = ruleset(vec![
        chain("inet", "fw", "in", Some("input"), "drop"),
        rule("inet", "fw", "in", 4, json!([{"jump": {"target": "in"}}])),
    ]);
    assert_eq!(rules.drops(&vxlan_from("192.0.2.7")).len(), 1);
}

#[test]
fn what_is_no_ruleset_drops_nothing() {
    for nonsense in
        [json!(null), json!({"nftables": [1, "x", {"chain": 3}, {"rule": {"expr": 7}}, {"set": {"elem": "x"}}]})]
    {
        assert_eq!(Ruleset::parse(&nonsense).drops(&vxlan_from("192.0.2.7")), []);
    }
}

#[test]
fn sets_of_concatenations_are_looked_into() {
    let key = json!({"concat": [payload("ip", "daddr"), meta("l4proto"), payload("th", "dport")]});
    let refuses = |element: Value| {
        ruleset(vec![
            chain("ip", "kube-proxy", "filter-forward", Some("forward"), "accept"),
            chain("ip", "kube-proxy", "reject-chain", None, ""),
            json!({"map": {"family": "ip", "table": "kube-proxy", "name": "none", "elem": [[element, {"goto": {"target": "reject-chain"}}]]}}),
            rule("ip", "kube-proxy", "filter-forward", 7, json!([{"vmap": {"key": key, "data": "@none"}}])),
            rule("ip", "kube-proxy", "reject-chain", 8, json!([{"reject": null}])),
        ])
    };
    let packet = Packet {
        hooks: vec!["forward"],
        destination: Some("10.96.0.7".parse().unwrap()),
        protocol: Some(6),
        port: Some(80),
        ..Packet::default()
    };
    let element = |address: &str, port: u16| json!({"concat": [address, "tcp", port]});
    let places = refuses(json!({"elem": {"val": element("10.96.0.7", 80), "comment": "shop/web"}})).drops(&packet);
    assert_eq!(places.len(), 1);
    assert_eq!((places[0].chain.as_str(), places[0].perhaps), ("reject-chain", false));
    for other in [element("10.96.0.7", 81), element("10.96.0.8", 80), json!({"concat": ["10.96.0.7", "udp", 80]})] {
        assert_eq!(refuses(other.clone()).drops(&packet), [], "{other}");
    }
}
