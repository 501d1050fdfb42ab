//! What ufw 0.36.2 and firewalld 1.3.3 make of a fresh host, and of the commands that [`remedy`](super::remedy) tells: as `nft -j list
//! ruleset` (1.0.6) printed it, reduced to chains that filter. Of ufw it is the table of IPv4.

use husk_overlay::issue::Severity;
use serde_json::{Value, json};

use super::*;

const UFW: [&str; 2] = [include_str!("recorded/ufw-before.json"), include_str!("recorded/ufw-after.json")];
const FIREWALLD: [&str; 2] =
    [include_str!("recorded/firewalld-before.json"), include_str!("recorded/firewalld-after.json")];

fn config(mode: Mode) -> Config {
    Config { mode, ..Config::new(vec!["10.42.0.0/16".parse().unwrap()]) }
}

fn status() -> Status {
    let status = json!({"node": "n1", "version": "", "mode": "vxlan", "encrypted": false, "ready": true,
        "addresses": {"ipv4": "192.0.2.1"}, "underlayInterface": "eth0", "underlayMtu": 1500, "blocks": ["10.42.0.0/26"],
        "router": {"ipv4": "10.42.0.0"}, "endpoints": 1, "peers": [1, 1], "source": "", "passes": 1,
        "lastPass": {"microseconds": 1, "changes": 0, "failures": 0}, "counters": {}, "xfrmErrors": {}, "issues": []});
    serde_json::from_value(status).unwrap()
}

fn peers() -> Vec<PeerReport> {
    let peer = json!({"node": "n2", "state": "configured", "endpoint": "192.0.2.2:4789", "router": {"ipv4": "10.42.0.64"},
        "blocks": ["10.42.0.64/26"]});
    vec![serde_json::from_value(peer).unwrap()]
}

fn ruleset(text: &str) -> Ruleset {
    Ruleset::parse(&serde_json::from_str::<Value>(text).unwrap())
}

fn findings(outcome: Outcome) -> Vec<Finding> {
    match outcome {
        Outcome::Found { findings } => findings,
        _ => Vec::new(),
    }
}

/// Everything that is told to do, for every finding.
fn commands(findings: &[Finding]) -> BTreeSet<String> {
    findings.iter().flat_map(|it| it.fix.commands.clone()).collect()
}

#[test]
fn what_is_told_to_do_clears_what_was_found() {
    let ufw = [
        "ufw allow 4789/udp",
        "ufw allow from 10.42.0.0/16",
        "ufw route allow from 10.42.0.0/16",
        "ufw route allow to 10.42.0.0/16",
    ];
    let firewalld = [
        "firewall-cmd --permanent --zone=public --add-port=4789/udp",
        "firewall-cmd --permanent --zone=trusted --add-source=10.42.0.0/16",
        "firewall-cmd --reload",
    ];
    // ufw's rules begin with `-m conntrack`, which may be anything.
    for ([before, after], told, severity) in
        [(UFW, &ufw[..], Severity::Warning), (FIREWALLD, &firewalld, Severity::Error)]
    {
        let look = |text: &str| findings(judge(&config(Mode::Vxlan), &ruleset(text), Some(&status()), &peers()));
        let found = look(before);
        assert!(found.len() >= 2 && found.iter().all(|it| it.severity == severity), "{found:#?}");
        assert_eq!(commands(&found), told.iter().map(ToString::to_string).collect());
        assert_eq!(look(after), []);
    }
}

#[test]
fn esp_is_opened_alike() {
    for ([before, after], told) in [
        (UFW, "ufw allow proto esp from any"),
        (FIREWALLD, "firewall-cmd --permanent --zone=public --add-protocol=esp"),
    ] {
        let look = |text: &str| findings(judge(&config(Mode::Ipsec), &ruleset(text), Some(&status()), &peers()));
        assert!(commands(&look(before)).contains(told));
        assert_eq!(look(after), []);
    }
}

#[test]
fn an_acceptance_that_asks_for_what_only_the_daemon_knows_leaves_doubt() {
    for [before, after] in [UFW, FIREWALLD] {
        let look = |text: &str| findings(judge(&config(Mode::Vxlan), &ruleset(text), None, &[]));
        assert!(look(before).len() >= 2);
        // The cluster's addresses may be ours, or not.
        assert!(look(after).iter().all(|it| it.severity == Severity::Warning), "{:#?}", look(after));
    }
    let rules = |accept: Value| {
        Ruleset::parse(&json!({"nftables": [
            {"chain": {"family": "inet", "table": "fw", "name": "in", "type": "filter", "hook": "input", "policy": "drop"}},
            {"rule": {"family": "inet", "table": "fw", "chain": "in", "handle": 2, "expr": [
                {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}, {"accept": null}]}},
            {"rule": {"family": "inet", "table": "fw", "chain": "in", "handle": 3, "expr": [
                {"match": accept}, {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 4789}},
                {"accept": null}]}}]}))
    };
    let from = json!({"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": {"prefix": {"addr": "192.0.2.0", "len": 24}}});
    let by = json!({"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"});
    let severity = |accept: &Value, status: Option<&Status>, peers: &[PeerReport]| {
        let found = findings(judge(&config(Mode::Vxlan), &rules(accept.clone()), status, peers));
        let tunnels = found.iter().filter(|it| it.cause.contains("UDP port 4789"));
        tunnels.map(|it| it.severity).max()
    };
    for accept in [from, by] {
        assert_eq!(severity(&accept, None, &[]), Some(Severity::Warning), "{accept}");
        assert_eq!(severity(&accept, Some(&status()), &peers()), None, "{accept}");
    }
}

#[test]
fn a_destination_among_all_does_not_let_pods_out() {
    let rules = Ruleset::parse(&json!({"nftables": [
        {"chain": {"family": "inet", "table": "fw", "name": "out", "type": "filter", "hook": "forward", "policy": "drop"}},
        {"rule": {"family": "inet", "table": "fw", "chain": "out", "handle": 2, "expr": [
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}},
                "right": {"set": [{"prefix": {"addr": "10.42.0.0", "len": 16}}, "198.51.100.1"]}}}, {"accept": null}]}}]}));
    let found = findings(judge(&config(Mode::Vxlan), &rules, Some(&status()), &peers()));
    assert!(found.len() == 1 && found[0].severity == Severity::Error, "{found:#?}");
}

#[test]
fn a_zone_is_known_by_its_chains() {
    let rules = ruleset(FIREWALLD[0]);
    let place = |chain: &str| Place { chain: chain.into(), table: "firewalld".into(), ..Place::default() };
    let remedy = |chain: &str| remedy(&place(chain), &[Kind::Udp(4789)], &rules, &[]).commands[0].clone();
    assert_eq!(remedy("filter_IN_public"), "firewall-cmd --permanent --zone=public --add-port=4789/udp");
    assert_eq!(remedy("filter_IN_public_deny"), remedy("filter_IN_public"));
    assert!(remedy("filter_IN_my_pre").contains("--zone=my_pre "));
    assert_eq!(remedy("filter_INPUT"), "firewall-cmd --permanent --add-port=4789/udp");
    assert_eq!(remedy("filter_IN_policy_allow-host-ipv6"), remedy("filter_INPUT"));
}
