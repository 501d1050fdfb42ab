//! Rules of others, as nft prints them, against the packets of a connection.

use serde_json::{Value, json};

use super::super::tests::{crossing, healthy, report};
use super::*;

/// A table of a company with one base chain.
fn company(hook: &str, policy: &str, rules: &[Value]) -> Ruleset {
    let chain = json!({"chain": {"family": "inet", "table": "company", "name": "c", "type": "filter", "hook": hook,
        "prio": 0, "policy": policy}});
    let rules = rules.iter().zip(2..).map(|(expr, handle)| {
        json!({"rule": {"family": "inet", "table": "company", "chain": "c", "handle": handle, "expr": expr}})
    });
    Ruleset::parse(&json!({"nftables": std::iter::once(chain).chain(rules).collect::<Vec<_>>()}))
}

/// One match and a verdict.
fn when(left: Value, right: Value, verdict: &str) -> Value {
    json!([{"match": {"op": "==", "left": left, "right": right}}, {verdict: null}])
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

/// What becomes of the healthy connection (TCP 10.42.0.2 -> 10.42.1.2:80, VXLAN to another node).
fn judged(ruleset: Result<&Ruleset, &str>, legacy: &[(Family, String)]) -> TraceReport {
    let mut told = report(&healthy());
    filtered(&mut told, &Filters { ruleset, legacy });
    told
}

fn hop_of(report: &TraceReport) -> &Hop {
    report.hops.iter().find(|hop| hop.name == NAME).unwrap()
}

#[test]
fn what_another_table_drops_is_broken_whatever_our_own_says() {
    let port = || payload("tcp", "dport");
    let cases = [
        (
            "forward",
            "drop",
            vec![],
            "the policy of chain c (nftables table inet company, hook forward) drops TCP 10.42.0.2",
        ),
        ("forward", "accept", vec![when(port(), json!(80), "drop")], "rule 2 of chain c"),
        ("forward", "drop", vec![when(meta("iifname"), json!("docker0"), "accept")], "the policy of chain c"),
        (
            "input",
            "accept",
            vec![when(payload("udp", "dport"), json!(4789), "drop")],
            "the tunnels' packets (UDP port 4789)",
        ),
        ("postrouting", "accept", vec![when(payload("udp", "dport"), json!(4789), "drop")], "the tunnels' packets"),
    ];
    for (hook, policy, rules, cause) in cases {
        let told = judged(Ok(&company(hook, policy, &rules)), &[]);
        assert_eq!(told.broken, Some(NAME), "{hook}, {rules:?}");
        let HopStanding::Broken { cause: found, remedy, commands } = &hop_of(&told).standing else {
            panic!("{told:?}")
        };
        assert!(found.contains(cause), "{found}");
        assert!(remedy.contains("accept them in c") && !commands.is_empty(), "{remedy}");
        assert!(commands.iter().all(|it| it.starts_with("nft insert rule inet company c ")), "{commands:?}");
        let seen = hop_of(&told).evidence.last().unwrap();
        assert_eq!(seen, "seen with: nft --handle list chain inet company c");
    }
}

#[test]
fn what_concerns_others_passes_and_what_cannot_be_judged_is_said() {
    let port = || payload("tcp", "dport");
    for (hook, policy, rules) in [
        ("forward", "accept", vec![when(port(), json!(81), "drop")]),
        ("forward", "drop", vec![when(meta("iifname"), json!("husk*"), "accept")]),
        ("input", "drop", vec![when(meta("l4proto"), json!("udp"), "accept")]),
        // This connection's packets are forwarded, not sent.
        ("output", "accept", vec![when(port(), json!(80), "drop")]),
    ] {
        let told = judged(Ok(&company(hook, policy, &rules)), &[]);
        assert_eq!(hop_of(&told).standing, HopStanding::Passes, "{hook}, {rules:?}: {told:#?}");
        assert_eq!(hop_of(&told).evidence, ["1 chain of others lets it pass"]);
    }
    assert_eq!(hop_of(&judged(Ok(&Ruleset::default()), &[])).evidence, ["no chains of others"]);
    let accepts = json!([{"xt": {"type": "match", "name": "owner"}}, {"accept": null}]);
    let perhaps = judged(Ok(&company("forward", "drop", &[accepts])), &[]);
    let unread = judged(Err("nft is not installed"), &[]);
    let legacy = judged(Ok(&Ruleset::default()), &[(Family::Ipv4, "filter".into()), (Family::Ipv6, "raw".into())]);
    for (told, words) in [
        (&perhaps, "hook forward) may drop TCP"),
        (&unread, "could not be looked at: nft is not installed"),
        (&legacy, "cannot be seen into (IPv4 filter);"),
    ] {
        let HopStanding::Unknown { why } = &hop_of(told).standing else { panic!("{told:?}") };
        assert!(why.contains(words), "{why}");
        assert_eq!(told.broken, None);
    }
    let other_family = judged(Ok(&Ruleset::default()), &[(Family::Ipv6, "raw".into())]);
    assert_eq!(hop_of(&other_family).standing, HopStanding::Passes);
}

#[test]
fn where_packets_cross_decides_which_chains_they_meet() {
    let drops = |hook| company(hook, "drop", &[]);
    for (input, output, hook, command) in [
        (None, Some("husk0123456789a"), "output", "oifname '\"husk*\"' accept"),
        (Some("husk0123456789a"), None, "input", "iifname '\"husk*\"' accept"),
        (Some("husk0123456789a"), Some("husk0123456789b"), "forward", "iifname '\"husk*\"' accept"),
        (Some("eth0"), Some("husk0123456789a"), "forward", "iifname '\"husk*\"' accept"),
    ] {
        let mut evidence = healthy();
        evidence.crossing = Some(crossing(input, output));
        for tried in ["input", "output", "forward"] {
            let mut told = report(&evidence);
            filtered(&mut told, &Filters { ruleset: Ok(&drops(tried)), legacy: &[] });
            assert_eq!(told.broken.is_some(), tried == hook, "{input:?} -> {output:?}, {tried}");
            if let HopStanding::Broken { commands, .. } = &hop_of(&told).standing {
                assert!(commands[0].ends_with(command), "{commands:?}");
            }
        }
    }
    // What is between hosts is not ours to open.
    let mut evidence = healthy();
    evidence.crossing = Some(crossing(None, Some("eth0")));
    let mut told = report(&evidence);
    filtered(&mut told, &Filters { ruleset: Ok(&drops("output")), legacy: &[] });
    let HopStanding::Broken { remedy, commands, .. } = &hop_of(&told).standing else { panic!("{told:?}") };
    assert!(remedy.contains("accept packets from 10.42.0.2 to 10.42.1.2") && commands.is_empty(), "{remedy}");
    // A connection that does not get that far meets nobody's rules.
    evidence.crossing = None;
    let mut told = report(&evidence);
    filtered(&mut told, &Filters { ruleset: Ok(&drops("output")), legacy: &[] });
    assert_eq!(hop_of(&told).standing, HopStanding::NotHere);
}

#[test]
fn a_ping_of_ipv6_is_icmpv6_to_every_filter() {
    let mut evidence = healthy();
    evidence.connection.protocol = 1;
    (evidence.connection.originator, evidence.connection.responder) =
        ("fd42::2".parse().unwrap(), "fd42::1:2".parse().unwrap());
    let mut told = report(&evidence);
    let rules = company("forward", "accept", &[when(meta("l4proto"), json!("ipv6-icmp"), "drop")]);
    filtered(&mut told, &Filters { ruleset: Ok(&rules), legacy: &[] });
    let HopStanding::Broken { cause, .. } = &hop_of(&told).standing else { panic!("{told:?}") };
    assert!(cause.ends_with("drops ICMPv6 fd42::2 -> fd42::1:2"), "{cause}");
}
