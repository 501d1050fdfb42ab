use std::process::Command;

use husk_overlay::kernel::{
    ChainKind, Hook, MapKeyType, MapValueType, Match, MatchKey, MatchOperator, MatchValue, Rule, Set, Statement,
};
use husk_overlay::port_mapping::TransportProtocol;
use husk_overlay::prefix::Family;
use proptest::prelude::*;

use super::*;
use crate::netns::Netns;

fn matches(key: MatchKey, operator: MatchOperator, value: MatchValue) -> Statement {
    Statement::Match(Match { key, operator, value })
}

fn equal(key: MatchKey, value: MatchValue) -> Statement {
    matches(key, MatchOperator::Equal, value)
}

fn rule(name: &str, statements: Vec<Statement>) -> Rule {
    Rule { name: name.to_owned(), statements }
}

fn text(text: &str) -> MatchValue {
    MatchValue::Text(text.to_owned())
}

fn any_of(texts: &[&str]) -> MatchValue {
    MatchValue::AnyOf(texts.iter().map(|text| (*text).to_owned()).collect())
}

fn in_set(name: &str) -> MatchValue {
    MatchValue::Set(name.to_owned())
}

fn set(element_type: ElementType, elements: &[&str]) -> Set {
    let element = |text: &&str| match text.parse() {
        Ok(prefix) => SetElement::Prefix(prefix),
        Err(_) => SetElement::Address(text.parse().unwrap()),
    };
    Set { element_type, elements: elements.iter().map(element).collect() }
}

/// A map whose elements are written as nft does.
fn map(key: MapKeyType, value: MapValueType, elements: &[(&str, &str)]) -> Map {
    let element = |(key, value): &(&str, &str)| {
        let parts: Vec<&str> = key.split(" . ").collect();
        let [address @ .., protocol, port] = parts.as_slice() else { panic!("{key}") };
        let protocol = TransportProtocol::of_name(protocol).unwrap();
        let address = address.first().map(|it| it.parse().unwrap());
        let value = value.parse().map_or_else(|_| MapValue::Port(value.parse().unwrap()), MapValue::Address);
        (Addressee { address, protocol, port: port.parse().unwrap() }, value)
    };
    Map { key, value, elements: elements.iter().map(element).collect() }
}

/// Maps of every key and value, and a chain that uses them.
fn add_maps(table: &mut NftTable) {
    let mut rules = Vec::new();
    for (family, any, one) in [(Family::Ipv4, "10.42.0.5", "192.0.2.1"), (Family::Ipv6, "fd42::5", "2001:db8::1")] {
        let name = family.to_string().to_lowercase();
        let address = MapKeyType::AddressAndPort(family);
        let at = format!("{one} . tcp . 8080");
        for (kind, key, element) in [("any", MapKeyType::Port, "sctp . 8080"), ("one", address, at.as_str())] {
            let [addresses, ports] = ["address", "port"].map(|value| format!("{kind}_{value}_{name}"));
            table.maps.insert(addresses.clone(), map(key, MapValueType::Address(family), &[(element, any)]));
            table.maps.insert(ports.clone(), map(key, MapValueType::Port, &[(element, "80")]));
            let translate = Statement::TranslateDestination { family, key, addresses, ports };
            let local = equal(MatchKey::DestinationKind, text("local"));
            rules.push(rule(kind, vec![equal(MatchKey::NetworkFamily, MatchValue::Family(family)), local, translate]));
        }
        let elements = [SetElement::Pair(any.parse().unwrap(), any.parse().unwrap())].into();
        table.sets.insert(format!("itself_{name}"), Set { element_type: ElementType::Pair(family), elements });
        let itself = equal(MatchKey::AddressPair(family), in_set(&format!("itself_{name}")));
        rules.push(rule("itself", vec![itself, Statement::Accept]));
    }
    table.maps.insert("nothing".into(), map(MapKeyType::Port, MapValueType::Port, &[]));
    let nat = |hook| Chain { kind: ChainKind::Nat, hook, priority: -100, rules: rules.clone() };
    table.chains.insert("nat-prerouting".into(), nat(Hook::Prerouting));
    table.chains.insert("nat-output".into(), nat(Hook::Output));
}

fn chain(hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { kind: ChainKind::Filter, hook, priority, rules }
}

/// A table with every kind of object, key, value and statement that the model has.
fn everything() -> NftTable {
    let v4 = Family::Ipv4;
    let v6 = Family::Ipv6;
    let counter = || Statement::Counter("spoofed".to_owned());
    let prerouting = vec![
        rule(
            "spoofed-route",
            vec![
                equal(MatchKey::InputInterface, text("husk*")),
                equal(MatchKey::ReversePathInterface, MatchValue::Missing),
                counter(),
                Statement::Drop,
            ],
        ),
        rule(
            "has-route",
            vec![
                matches(MatchKey::ReversePathInterface, MatchOperator::NotEqual, MatchValue::Missing),
                equal(MatchKey::NetworkFamily, MatchValue::Family(v4)),
                Statement::Accept,
            ],
        ),
        rule("route-by-name", vec![equal(MatchKey::ReversePathInterface, text("husk-vx")), Statement::Accept]),
        rule(
            "vtep-v4",
            vec![
                matches(MatchKey::Source(v4), MatchOperator::NotEqual, in_set("nodes4")),
                equal(MatchKey::Protocol, text("udp")),
                equal(MatchKey::UdpDestinationPort, MatchValue::Number(4789)),
                Statement::Drop,
            ],
        ),
        rule("v6", vec![equal(MatchKey::NetworkFamily, MatchValue::Family(v6)), Statement::Accept]),
        rule(
            "link-local",
            vec![equal(MatchKey::Source(v6), MatchValue::Prefix("fe80::/10".parse().unwrap())), Statement::Drop],
        ),
        rule("cluster4", vec![equal(MatchKey::Destination(v4), text("10.42.0.0/16")), Statement::Accept]),
        rule("cluster6", vec![equal(MatchKey::Destination(v6), any_of(&["fd42::/48", "fd43::/48"])), Statement::Drop]),
        rule(
            "path-mtu-v4",
            vec![
                equal(MatchKey::IcmpType(v4), any_of(&["destination-unreachable"])),
                equal(MatchKey::IcmpCode, MatchValue::Number(4)),
                matches(MatchKey::IcmpMtu(v4), MatchOperator::Less, MatchValue::Number(1330)),
                equal(MatchKey::ConnectionDestination(v4), in_set("nodes4")),
                Statement::Drop,
            ],
        ),
        rule(
            "path-mtu-v6",
            vec![
                equal(MatchKey::IcmpType(v6), any_of(&["packet-too-big"])),
                matches(MatchKey::IcmpMtu(v6), MatchOperator::Less, MatchValue::Number(1350)),
                equal(MatchKey::ConnectionState, text("invalid")),
                equal(MatchKey::ConnectionSource(v6), in_set("blocks6")),
                Statement::Drop,
            ],
        ),
        rule("decrypted", vec![equal(MatchKey::Decrypted, MatchValue::Present), Statement::Accept]),
        rule("plaintext", vec![equal(MatchKey::Decrypted, MatchValue::Missing), counter(), Statement::Accept]),
    ];
    let forward = vec![
        rule(
            "mss",
            vec![
                equal(MatchKey::OutputInterface, text("husk*")),
                equal(MatchKey::Protocol, text("tcp")),
                equal(MatchKey::TcpSynRst, text("syn")),
                Statement::ClampMss,
            ],
        ),
        rule("protocols", vec![equal(MatchKey::Protocol, any_of(&["tcp", "udp"])), Statement::Accept]),
        rule(
            "not-out",
            vec![
                matches(MatchKey::OutputInterface, MatchOperator::NotEqual, any_of(&["husk-wg0", "husk-wg1", "x*"])),
                equal(MatchKey::Source(v6), in_set("blocks6")),
                counter(),
                Statement::Drop,
            ],
        ),
    ];
    let masquerade = rule(
        "masquerade \"quoted\" ä",
        vec![
            equal(MatchKey::Source(v4), in_set("blocks4")),
            matches(MatchKey::Destination(v4), MatchOperator::NotEqual, in_set("blocks4")),
            equal(MatchKey::Source(v4), text("10.42.0.0/16")),
            Statement::Masquerade,
        ],
    );
    let quoting = |family, error: &str| {
        let quoted = vec![
            equal(MatchKey::IcmpType(family), any_of(&["destination-unreachable", error])),
            equal(MatchKey::QuotedProtocol(family), MatchValue::Number(17)),
            equal(MatchKey::QuotedUdpDestinationPort(family), MatchValue::Number(4789)),
            Statement::Drop,
        ];
        rule(&format!("quoted-{family}"), quoted)
    };
    let translate = |family, address: &str| {
        let to = Statement::TranslateSource(address.parse().unwrap());
        let foreign = matches(MatchKey::Source(family), MatchOperator::NotEqual, in_set("blocks6"));
        rule(address, if family == v6 { vec![foreign, to] } else { vec![to] })
    };
    let postrouting = vec![
        rule("encrypted", vec![equal(MatchKey::Transformation, MatchValue::Present), Statement::Accept]),
        rule("unencrypted", vec![equal(MatchKey::Transformation, MatchValue::Missing), counter(), Statement::Accept]),
        quoting(v4, "parameter-problem"),
        quoting(v6, "packet-too-big"),
        rule(
            "whole",
            vec![
                equal(MatchKey::Destination(v4), in_set("nodes4")),
                equal(MatchKey::Protocol, MatchValue::Number(17)),
                equal(MatchKey::UdpSourcePort, MatchValue::Number(51820)),
                matches(MatchKey::Length, MatchOperator::Greater, MatchValue::Number(1340)),
                Statement::DontFragment,
            ],
        ),
    ];
    let mut table = NftTable {
        counters: ["leaked".to_owned(), "spoofed".to_owned()].into(),
        maps: BTreeMap::new(),
        sets: [
            ("nodes4".to_owned(), set(ElementType::Address(v4), &["192.0.2.1", "192.0.2.2"])),
            ("nodes6".to_owned(), set(ElementType::Address(v6), &["2001:db8::1"])),
            // Adjacent prefixes, a host prefix, one covered by another.
            (
                "blocks4".to_owned(),
                set(
                    ElementType::Prefix(v4),
                    &["10.42.0.0/26", "10.42.0.64/26", "10.9.9.9/32", "10.50.0.0/16", "10.50.1.0/24"],
                ),
            ),
            ("blocks6".to_owned(), set(ElementType::Prefix(v6), &["fd42::/122", "fd42::40/122", "fe80::1/128"])),
            ("empty".to_owned(), set(ElementType::Prefix(v6), &[])),
        ]
        .into(),
        chains: [
            ("raw-prerouting".to_owned(), chain(Hook::Prerouting, -300, prerouting)),
            ("input".to_owned(), chain(Hook::Input, 0, vec![])),
            ("forward".to_owned(), chain(Hook::Forward, -150, forward)),
            ("output".to_owned(), chain(Hook::Output, 10, vec![rule("count", vec![counter()])])),
            ("postrouting".to_owned(), chain(Hook::Postrouting, 300, postrouting)),
            (
                "nat-postrouting".to_owned(),
                Chain {
                    kind: ChainKind::Nat,
                    hook: Hook::Postrouting,
                    priority: 100,
                    rules: vec![masquerade, translate(v6, "fd42::1"), translate(v4, "10.42.0.1")],
                },
            ),
        ]
        .into(),
    };
    add_maps(&mut table);
    table
}

/// Runs a test in a namespace of its own, which ends with it.
fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    Netns::new_unnamed().unwrap().run_in(test).unwrap()
}

/// `nft` as an outsider calls it.
fn nft(command: &str) -> String {
    let output = Command::new("nft").args(["-a", command]).output().unwrap();
    assert!(output.status.success(), "nft {command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn changes_to(table: &NftTable) -> Vec<NftChange> {
    diff(Some(table), read().unwrap().as_ref())
}

/// Brings the kernel to `table` and proves that nothing is left to do; returns what was changed.
fn converge(table: &NftTable) -> Vec<NftChange> {
    let changes = changes_to(table);
    apply(&changes).unwrap();
    assert_eq!(read().unwrap(), Some(NftState::of(table)));
    assert_eq!(changes_to(table), []);
    changes
}

#[test]
fn statements_compile_to_the_json_of_libnftables() {
    let table = everything();
    let json = compile::transaction(&[NftChange::RebuildChain {
        name: "raw-prerouting".to_owned(),
        rules: table.chains["raw-prerouting"].rules[..1].to_vec(),
        reason: String::new(),
    }]);
    let comment = compile::rule_comment(&table.chains["raw-prerouting"].rules[0]);
    assert!(comment.starts_with("husk:spoofed-route:"), "{comment}");
    assert_eq!(comment.len(), "husk:spoofed-route:".len() + 16);
    let expected = json!({ "nftables": [
        { "flush": { "chain": { "family": "inet", "table": "husk", "name": "raw-prerouting" } } },
        { "add": { "rule": { "family": "inet", "table": "husk", "chain": "raw-prerouting", "comment": comment, "expr": [
            { "match": { "op": "==", "left": { "meta": { "key": "iifname" } }, "right": "husk*" } },
            { "match": { "op": "==", "left": { "fib": { "result": "oif", "flags": ["saddr", "iif"] } }, "right": false } },
            { "counter": "spoofed" },
            { "drop": null },
        ] } } },
    ] });
    assert_eq!(json, expected);
}

#[test]
fn a_comment_changes_with_its_statements_and_is_never_too_long() {
    let one = rule("a", vec![Statement::Drop]);
    let other = rule("a", vec![Statement::Accept]);
    assert_ne!(compile::rule_comment(&one), compile::rule_comment(&other));
    let long = rule(&"ä".repeat(200), vec![]);
    assert!(compile::rule_comment(&long).len() <= 128);
}

/// Versions of nft print some expressions differently.
fn in_one_spelling(listing: &str) -> String {
    [
        ("meta l4proto udp udp dport", "udp dport"),
        ("meta l4proto tcp tcp flags", "tcp flags"),
        ("oif exists", "oif != missing"),
        ("oif != 0", "oif != missing"),
        ("flags & (syn | rst) == syn", "flags syn / syn,rst"),
        ("flags & (syn|rst) == syn", "flags syn / syn,rst"),
        ("flags & (rst | syn) == syn", "flags syn / syn,rst"),
        ("random,fully-random", "fully-random,random"),
    ]
    .iter()
    .fold(listing.to_owned(), |text, (one, other)| text.replace(one, other))
}

#[test]
fn a_table_of_every_feature_round_trips() {
    in_namespace(|| {
        assert_eq!(read().unwrap(), None);
        assert!(read_counters().unwrap().is_empty());
        let table = everything();
        let changes = converge(&table);
        assert!(matches!(changes.as_slice(), [NftChange::CreateTable { .. }]), "{changes:?}");
        // What the kernel holds is what was meant, in nft's own words.
        let listing = in_one_spelling(&nft("list table inet husk"));
        for expected in [
            "iifname \"husk*\" fib saddr . iif oif missing counter name \"spoofed\" drop",
            "fib saddr . iif oif != missing meta nfproto ipv4 accept",
            "fib saddr . iif oifname \"husk-vx\" accept",
            "meta ipsec exists accept",
            "meta ipsec missing counter name \"spoofed\" accept",
            "rt ipsec exists accept",
            "rt ipsec missing counter name \"spoofed\" accept",
            "ip saddr != @nodes4 udp dport 4789 drop",
            "icmp type { destination-unreachable, parameter-problem } @th,136,8 0x11 @th,240,16 0x12b5 drop",
            "icmpv6 type { destination-unreachable, packet-too-big } @th,112,8 0x11 @th,400,16 0x12b5 drop",
            "ip6 daddr { fd42::/48, fd43::/48 } drop",
            "oifname \"husk*\" tcp flags syn / syn,rst tcp option maxseg size set rt mtu",
            "oifname != { \"husk-wg0\", \"husk-wg1\", \"x*\" } ip6 saddr @blocks6 counter name \"spoofed\" drop",
            "ip saddr @blocks4 ip daddr != @blocks4 ip saddr 10.42.0.0/16 masquerade fully-random,random",
            "meta nfproto ipv4 fib daddr type local dnat ip to meta l4proto . th dport map @any_address_ipv4:meta \
             l4proto . th dport map @any_port_ipv4",
            "fib daddr type local dnat ip6 to ip6 daddr . meta l4proto . th dport map @one_address_ipv6:ip6 daddr . \
             meta l4proto . th dport map @one_port_ipv6",
            "ip saddr . ip daddr @itself_ipv4 accept",
            "elements = { 2001:db8::1 . tcp . 8080 : fd42::5 }",
            "elements = { sctp . 8080 : 80 }",
        ] {
            assert!(listing.contains(expected), "{expected:?} is missing in\n{listing}");
        }
        apply(&diff(None, read().unwrap().as_ref())).unwrap();
        assert_eq!(read().unwrap(), None);
    });
}

/// Handles of all rules; the kernel never uses one twice within a table.
fn rule_handles() -> Vec<String> {
    let listing = nft("list table inet husk");
    let rules = listing.lines().filter(|line| line.contains("comment \"husk:"));
    rules.map(|line| line.rsplit("# handle ").next().unwrap().to_owned()).collect()
}

#[test]
fn elements_change_one_by_one_and_leave_rules_and_counters_alone() {
    in_namespace(|| {
        let mut table = everything();
        // Not before a rule refers to it does a counter count; the loopback device gives it something to count.
        Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        converge(&table);
        Command::new("ping").args(["-c1", "-W1", "127.0.0.1"]).output().unwrap();
        let counted = read_counters().unwrap()["spoofed"];
        assert!(counted.packets > 0 && counted.bytes > 0, "{counted:?}");
        let handles = rule_handles();
        assert_eq!(handles.len(), 36);

        let nodes = table.sets.get_mut("nodes4").unwrap();
        nodes.elements.remove(&SetElement::Address("192.0.2.1".parse().unwrap()));
        nodes.elements.insert(SetElement::Address("192.0.2.3".parse().unwrap()));
        let blocks = table.sets.get_mut("blocks4").unwrap();
        blocks.elements.insert(SetElement::Prefix("10.60.0.0/16".parse().unwrap()));
        let changes: Vec<String> = converge(&table).iter().map(ToString::to_string).collect();
        assert_eq!(
            changes,
            [
                "nft table inet husk: set blocks4: add 10.60.0.0/16",
                "nft table inet husk: set nodes4: delete 192.0.2.1",
                "nft table inet husk: set nodes4: add 192.0.2.3",
            ]
        );
        assert_eq!(rule_handles(), handles);
        assert_eq!(read_counters().unwrap()["spoofed"], counted);

        // A port that leads to another pod: the kernel takes no second element with the same key.
        let addresses = MapValueType::Address(Family::Ipv4);
        let ports = table.maps["any_port_ipv4"].clone();
        let moved = [("sctp . 8080", "10.42.0.6"), ("udp . 53", "10.42.0.6")];
        table.maps.insert("any_address_ipv4".into(), map(MapKeyType::Port, addresses, &moved));
        let two = [("sctp . 8080", "80"), ("udp . 53", "5353")];
        table.maps.insert("any_port_ipv4".into(), map(MapKeyType::Port, MapValueType::Port, &two));
        let changes: Vec<String> = converge(&table).iter().map(ToString::to_string).collect();
        assert_eq!(
            changes,
            [
                "nft table inet husk: map any_address_ipv4: delete sctp . 8080 : 10.42.0.5",
                "nft table inet husk: map any_address_ipv4: add udp . 53 : 10.42.0.6, sctp . 8080 : 10.42.0.6",
                "nft table inet husk: map any_port_ipv4: add udp . 53 : 5353",
            ]
        );
        table.maps.insert("any_port_ipv4".into(), ports);
        table.maps.insert("any_address_ipv4".into(), map(MapKeyType::Port, addresses, &moved[..1]));
        assert_eq!(converge(&table).len(), 2);
        assert_eq!(rule_handles(), handles);

        // A prefix that grows to cover its neighbours: delete and add in one transaction.
        let blocks = table.sets.get_mut("blocks4").unwrap();
        blocks.elements.insert(SetElement::Prefix("10.42.0.0/16".parse().unwrap()));
        converge(&table);
        assert_eq!(rule_handles(), handles);
    });
}

#[test]
fn the_table_is_listed_again_only_when_rules_have_changed() {
    in_namespace(|| {
        let table = everything();
        let mut reader = Reader::default();
        assert_eq!(reader.read().unwrap(), None);
        converge(&table);
        assert_eq!(reader.read().unwrap(), Some(NftState::of(&table)));
        // What was never in the kernel comes from memory.
        let marked = NftState { foreign: vec![("mark".to_owned(), "x".to_owned())], ..NftState::of(&table) };
        reader.last.as_mut().unwrap().1 = Some(marked.clone());
        assert_eq!(reader.read().unwrap(), Some(marked));
        nft("add counter inet husk strangers");
        let seen = reader.read().unwrap().unwrap();
        assert!(seen.counters.contains("strangers") && seen.foreign.is_empty(), "{seen:?}");
        nft("add table inet husk { flags dormant; }");
        assert!(reader.read().unwrap().unwrap().dormant);
        nft("delete table inet husk");
        assert_eq!(reader.read().unwrap(), None);
    });
}

#[test]
fn counters_of_other_tables_and_other_objects_are_not_ours() {
    in_namespace(|| {
        assert!(read_counters().unwrap().is_empty());
        for table in ["inet stranger", "ip husk", "inet husk"] {
            nft(&format!("add table {table}"));
        }
        nft("add counter inet stranger theirs { packets 5 bytes 6 ; }");
        nft("add counter ip husk theirs { packets 5 bytes 6 ; }");
        nft("add counter inet husk spoofed { packets 7 bytes 4294967296 ; }");
        nft("add quota inet husk spent { 10 mbytes ; }");
        let value = CounterValue { packets: 7, bytes: 1 << 32 };
        assert_eq!(read_counters().unwrap(), [("spoofed".to_owned(), value)].into());
    });
}

#[test]
fn a_rebuilt_chain_keeps_counters_and_other_chains() {
    in_namespace(|| {
        let mut table = everything();
        Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        converge(&table);
        Command::new("ping").args(["-c1", "-W1", "127.0.0.1"]).output().unwrap();
        let counted = read_counters().unwrap();
        table.chains.get_mut("forward").unwrap().rules.reverse();
        let changes = converge(&table);
        assert_eq!(
            changes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["nft table inet husk: rebuild chain forward with 3 rules (order of rules)"]
        );
        assert_eq!(read_counters().unwrap(), counted);
    });
}

#[test]
fn what_an_outsider_broke_is_repaired_and_what_is_his_is_left_alone() {
    let sabotages: &[&str] = &[
        "flush chain inet husk forward",
        "delete rule inet husk output handle $RULE",
        "insert rule inet husk forward accept",
        "add rule inet husk input counter drop",
        "flush chain inet husk raw-prerouting; delete chain inet husk raw-prerouting",
        "delete element inet husk nodes4 { 192.0.2.1 }",
        "add element inet husk nodes4 { 198.51.100.1 }",
        "add element inet husk nodes4 { 198.51.100.1 comment \"mine\" }",
        "add element inet husk blocks4 { 10.1.0.1-10.1.0.6 }",
        "flush set inet husk blocks6",
        "delete set inet husk empty",
        "delete set inet husk empty; add set inet husk empty { type ipv4_addr; flags interval; }",
        "delete set inet husk empty; add set inet husk empty { type ipv6_addr; flags interval, timeout; timeout 5s; }",
        "delete counter inet husk leaked",
        "add counter inet husk mine",
        "add set inet husk mine { type inet_service; elements = { 80 } }",
        "add map inet husk mine { type ipv4_addr : verdict; }",
        "add quota inet husk mine { over 5 mbytes; }",
        "add chain inet husk mine; add rule inet husk mine accept",
        "add chain inet husk mine; add rule inet husk output jump mine",
        "add chain inet husk mine; add chain inet husk mine2; add rule inet husk mine2 jump mine",
        "add chain inet husk input { type filter hook input priority 0; policy drop; }",
        "delete chain inet husk input; add chain inet husk input { type filter hook input priority 7; }",
        "delete chain inet husk input; add chain inet husk input",
        "delete table inet husk",
        "flush ruleset",
        "flush table inet husk",
        "add table inet husk { flags dormant; }",
    ];
    in_namespace(|| {
        let table = everything();
        converge(&table);
        let counting = nft("list chain inet husk output");
        let handle = counting.lines().find(|line| line.contains("husk:count")).unwrap().rsplit(' ').next().unwrap();
        let foreign = "table inet theirs; table ip husk; add chain inet theirs c { type filter hook input priority 0; }; \
                       add chain ip husk c; add rule ip husk c drop";
        for sabotage in sabotages {
            nft(&foreign.replace("table inet theirs; table ip husk;", "add table inet theirs; add table ip husk;"));
            let theirs = || nft("list table inet theirs") + &nft("list table ip husk");
            let before = theirs();
            nft(&sabotage.replace("$RULE", handle));
            let survived = !sabotage.contains("ruleset");
            let changes = converge(&table);
            assert!(!changes.is_empty(), "{sabotage}: nothing was found wrong");
            if survived {
                assert_eq!(theirs(), before, "{sabotage}");
                nft("delete table inet theirs; delete table ip husk");
            }
            // The handle named above belongs to the first table.
            if sabotage.contains("$RULE") {
                assert!(matches!(changes.as_slice(), [NftChange::RebuildChain { .. }]), "{changes:?}");
            }
        }
    });
}

#[test]
fn a_set_of_another_type_is_replaced_under_the_rules_that_use_it() {
    in_namespace(|| {
        let mut table = everything();
        converge(&table);
        // An address set becomes a prefix set while a rule refers to it.
        table.sets.insert("nodes4".to_owned(), set(ElementType::Prefix(Family::Ipv4), &["192.0.2.0/24"]));
        let changes = converge(&table);
        assert!(changes.iter().any(|change| matches!(change, NftChange::ReplaceSet { .. })), "{changes:?}");
        assert!(changes.iter().any(|change| matches!(change, NftChange::RebuildChain { .. })), "{changes:?}");
    });
}

#[test]
fn a_refused_transaction_changes_nothing_and_says_why() {
    in_namespace(|| {
        let table = everything();
        converge(&table);
        let mut broken = table.clone();
        broken.counters.insert("another".to_owned());
        broken.chains.get_mut("input").unwrap().rules =
            vec![rule("no-such-set", vec![equal(MatchKey::Source(Family::Ipv4), in_set("missing"))])];
        let error = apply(&changes_to(&broken)).unwrap_err().to_string();
        assert!(error.starts_with("cannot change table inet husk with nft: "), "{error}");
        assert!(error.contains("No such file or directory"), "{error}");
        assert_eq!(changes_to(&table), []);
    });
}

#[test]
fn whole_families_round_trip_in_a_prefix_set() {
    in_namespace(|| {
        let all = [
            ("all4".to_owned(), set(ElementType::Prefix(Family::Ipv4), &["0.0.0.0/0"])),
            ("all6".to_owned(), set(ElementType::Prefix(Family::Ipv6), &["::/0"])),
            ("high".to_owned(), set(ElementType::Prefix(Family::Ipv4), &["128.0.0.0/1", "255.255.255.255/32"])),
        ];
        converge(&NftTable { sets: all.into(), ..NftTable::default() });
    });
}

fn any_prefix() -> impl Strategy<Value = SetElement> {
    (0_u32..64, 20_u8..=32).prop_map(|(low, length)| {
        let address = std::net::IpAddr::from((0x0a2a_0000_u32 + low * 97).to_be_bytes());
        SetElement::Prefix(husk_overlay::prefix::Prefix::containing(address, length).unwrap())
    })
}

/// Removals are withheld while it is not known which pods there are, but a port leads to one pod at a time.
#[test]
fn withheld_mappings_stay_unless_their_port_leads_elsewhere() {
    let table = |elements: &[(&str, &str)]| NftTable {
        maps: [("m".to_owned(), map(MapKeyType::Port, MapValueType::Address(Family::Ipv4), elements))].into(),
        ..NftTable::default()
    };
    let after = table(&[("tcp . 80", "10.42.0.9")]);
    in_namespace(|| {
        converge(&table(&[("tcp . 80", "10.42.0.5"), ("tcp . 81", "10.42.0.6")]));
        apply(&without_removals(changes_to(&after))).unwrap();
        let kept = table(&[("tcp . 80", "10.42.0.9"), ("tcp . 81", "10.42.0.6")]);
        assert_eq!(read().unwrap(), Some(NftState::of(&kept)));
    });
}

#[test]
fn what_an_outsider_did_to_a_map_is_undone() {
    in_namespace(|| {
        let mut table = everything();
        table.maps.insert("nothing".into(), map(MapKeyType::Port, MapValueType::Port, &[("tcp . 1", "2")]));
        for command in [
            "flush map inet husk any_address_ipv4",
            "add element inet husk any_address_ipv4 { tcp . 1 : 192.0.2.9, icmp . 0 : 192.0.2.9 }",
            "delete map inet husk nothing",
            "delete map inet husk nothing; add map inet husk nothing { type inet_service : inet_service; }",
            "delete map inet husk nothing; add set inet husk nothing { type inet_service; }",
            "add map inet husk stranger { type inet_service : inet_service; elements = { 1 : 2 }; }",
        ] {
            converge(&table);
            nft(command);
            assert!(!converge(&table).is_empty(), "{command}");
        }
    });
}

fn any_key() -> impl Strategy<Value = Addressee> {
    let protocol = prop::sample::select(TransportProtocol::ALL.to_vec());
    (protocol, 0_u16..4).prop_map(|(protocol, port)| Addressee { address: None, protocol, port })
}

fn any_table() -> impl Strategy<Value = NftTable> {
    let name = || prop::sample::select(vec!["a", "b", "c"]).prop_map(str::to_owned);
    let set = (any::<bool>(), prop::collection::btree_set(any_prefix(), 0..8)).prop_map(|(v4, elements)| Set {
        element_type: ElementType::Prefix(if v4 { Family::Ipv4 } else { Family::Ipv6 }),
        elements: if v4 { elements } else { BTreeSet::new() },
    });
    let rules = prop::collection::vec((name(), any::<bool>(), name()), 0..4).prop_map(|rules| {
        let statements = |drop, set: &str| {
            vec![
                equal(MatchKey::Source(Family::Ipv4), in_set(set)),
                if drop { Statement::Drop } else { Statement::Accept },
            ]
        };
        rules.into_iter().map(|(name, drop, set)| rule(&name, statements(drop, &set))).collect::<Vec<_>>()
    });
    let map = (any::<bool>(), prop::collection::btree_map(any_key(), 0_u8..3, 0..4)).prop_map(|(v4, elements)| {
        let value = if v4 { MapValueType::Address(Family::Ipv4) } else { MapValueType::Port };
        let found =
            |number: u8| if v4 { MapValue::Address([10, 0, 0, number].into()) } else { MapValue::Port(number.into()) };
        let elements = elements.into_iter().map(|(key, number)| (key, found(number))).collect();
        Map { key: MapKeyType::Port, value, elements }
    });
    let chain = (0..3, rules).prop_map(|(priority, rules)| chain(Hook::Input, priority, rules));
    (
        prop::collection::btree_set(name(), 0..3),
        prop::collection::btree_map(name(), set, 0..3),
        prop::collection::btree_map(name(), map, 0..3),
        prop::collection::btree_map(name(), chain, 0..3),
    )
        .prop_map(|(counters, sets, maps, chains)| NftTable { counters, sets, maps, chains })
}

#[test]
fn withheld_removals_stay_unless_something_new_lies_in_their_place() {
    let v4 = Family::Ipv4;
    let table = |elements: &[&str], chains: &[&str]| NftTable {
        sets: [("s".to_owned(), set(ElementType::Prefix(v4), elements))].into(),
        chains: chains.iter().map(|name| ((*name).to_owned(), chain(Hook::Input, 0, vec![]))).collect(),
        ..NftTable::default()
    };
    let before = table(&["10.0.0.0/24", "10.1.0.0/24"], &["a", "b"]);
    let after = table(&["10.0.0.0/16"], &["a"]);
    in_namespace(|| {
        converge(&before);
        let changes = without_removals(changes_to(&after));
        apply(&changes).unwrap();
        let kept = table(&["10.0.0.0/16", "10.1.0.0/24"], &["a"]);
        assert_eq!(read().unwrap(), Some(NftState::of(&kept)));
    });
    assert_eq!(without_removals(vec![NftChange::DeleteTable]), []);
}

proptest! {
    #[test]
    fn a_diff_leads_from_any_table_to_any_other(from in prop::option::of(any_table()), to in prop::option::of(any_table())) {
        let mut state = from.as_ref().map(NftState::of);
        for change in diff(to.as_ref(), state.clone().as_ref()) {
            change.apply_to(&mut state);
        }
        prop_assert_eq!(&state, &to.as_ref().map(NftState::of));
        prop_assert_eq!(diff(to.as_ref(), state.as_ref()), vec![]);
    }

    #[test]
    fn canonical_prefixes_mean_the_same_and_do_not_overlap(elements in prop::collection::btree_set(any_prefix(), 0..12)) {
        let original = Set { element_type: ElementType::Prefix(Family::Ipv4), elements };
        let canonical = compile::canonical_elements(&original);
        let prefixes = |set: &BTreeSet<SetElement>| set.iter().map(|it| match it {
            SetElement::Prefix(prefix) => *prefix,
            SetElement::Address(address) => husk_overlay::prefix::Prefix::host(*address),
            SetElement::Pair(..) => panic!("no prefix"),
        }).collect::<Vec<_>>();
        let kept = prefixes(&canonical);
        for (index, one) in kept.iter().enumerate() {
            prop_assert!(kept[index + 1..].iter().all(|other| !one.overlaps(other)));
            prop_assert!(original.elements.contains(&SetElement::Prefix(*one)));
        }
        for prefix in prefixes(&original.elements) {
            prop_assert!(kept.iter().any(|one| one.covers(&prefix)));
        }
    }

    #[test]
    fn any_listing_is_read_or_refused(kind in "[a-z]{1,8}", key in "[a-z]{1,5}", text in ".{0,8}", number in any::<i64>()) {
        for body in [json!(null), json!(text), json!({ key.clone(): text }), json!({ "name": text, key: number, "elem": [number, text] })] {
            let kind = kind.as_str();
            let listing = json!({ "nftables": [{ kind: body }, { "set": body }, { "chain": body }, { "rule": body }, { "counter": body }] });
            drop(parse::state(&listing));
        }
    }
}
