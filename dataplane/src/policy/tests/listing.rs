//! What is written is read back, by Husk and by `nft`.

use husk_overlay::kernel::policy::PolicyValueKind;

use super::*;

#[test]
fn a_table_of_every_feature_round_trips() {
    in_namespace(|| {
        assert_eq!(read().unwrap(), None);
        assert!(read_counters().unwrap().is_empty());
        let table = everything();
        let changes = converge(&table);
        assert_eq!(texts(&changes), ["create with 6 chains, 13 sets with 21 elements"]);
        assert_eq!(read_counters().unwrap().len(), 2);
        let mut live = Live::default();
        let delete = diff(None, live.read().unwrap().as_deref());
        assert_eq!(texts(&delete), ["delete"]);
        live.apply(&delete, None).unwrap();
        assert_eq!((live.read().unwrap(), read().unwrap()), (None, None));
    });
}

/// What the kernel holds is what was meant, in nft's own words, and nobody's `nft` fails for it.
#[test]
fn nft_prints_the_table() {
    in_namespace(|| {
        converge(&everything());
        let listing = listing();
        for expected in [
            "ct state invalid,untracked drop comment \"husk:",
            "iifname \"husk*\" iifname != \"husk-*\" oifname \"husk*\" oifname != \"husk-*\" jump pod",
            "limit rate 10/second burst 7 packets return",
            "ip saddr @hosts4 counter name \"seen\" accept",
            "ip daddr != @ranges4 return",
            "ip6 daddr @ranges6 counter name \"seen\" accept",
            "ct original ip saddr @hosts4",
            "ct reply ip6 saddr @ranges6",
            "ct original ip6 saddr . ct reply ip6 saddr @pairs6",
            "ip daddr vmap @pods4",
            "ct protocol . ct reply proto-src vmap @services comment \"husk:",
            "mark stands for originator map @peers6\"",
            "mark stands for 0x00000007\"",
            "counter name \"denied\" log prefix \"husk \"denied\" ä\" group 72 snaplen 128",
            "type filter hook forward priority filter - 10; policy accept;",
            "type mark . inet_proto . inet_service : verdict",
            "elements = { 0.0.0.0, 10.0.0.0-10.0.0.9",
            "255.255.255.255 }",
            "10.42.0.7 : goto pod",
            "fd42::/120 : jump pod",
            "10.42.1.0-255.255.255.255 : 0x12345678",
            "fd42::7 : 0x00000002",
            "fd00::1 . fd00::2",
            "tcp . 80-90 : accept",
        ] {
            assert!(listing.contains(expected), "{expected:?} is missing in\n{listing}");
        }
        for arguments in [&["list", "ruleset"][..], &["-j", "list", "ruleset"], &["-j", "list", "chains"]] {
            assert!(run("nft", arguments).contains("husk-policy"), "{arguments:?}");
        }
    });
}

/// Marks on packets are nobody's business here, though `nft` prints them where the class of a peer stands.
#[test]
fn a_comment_changes_with_its_rule_and_is_never_too_long() {
    let judge = |name: &str| {
        let class = PolicyClass::Of(PolicyField::Originator(V4), name.into());
        super::rule(&[], PolicyAction::Judge { class, services: "services".into() })
    };
    let (one, other) = (crate::policy::rule::comment(&judge("a")), crate::policy::rule::comment(&judge("b")));
    assert_ne!(one[..21], other[..21]);
    assert!(one.starts_with("husk:") && one[21..].starts_with(" mark stands for originator map @a"), "{one}");
    assert!(crate::policy::rule::comment(&judge(&"ä".repeat(120))).len() <= 127);
}

#[test]
fn one_element_is_found_as_a_packet_finds_it() {
    in_namespace(|| {
        assert_eq!(lookup("hosts4", &element("192.0.2.1", false)).unwrap(), None);
        let table = everything();
        converge(&table);
        let found = |set: &str, key: &str| {
            let found = lookup(set, &element(key, false)).unwrap();
            found.map(|(element, value)| format!("{element}{value}"))
        };
        for (set, key, expected) in [
            ("hosts4", "192.0.2.1", Some("192.0.2.1")),
            ("hosts4", "192.0.2.3", None),
            ("hosts4", "fd00::1", None),
            ("missing", "192.0.2.3", None),
            ("ranges4", "0.0.0.0", Some("0.0.0.0")),
            ("ranges4", "0.0.0.1", None),
            ("ranges4", "10.0.0.0", Some("10.0.0.0-10.0.0.9")),
            ("ranges4", "10.0.0.9", Some("10.0.0.0-10.0.0.9")),
            ("ranges4", "10.0.0.10", Some("10.0.0.10")),
            ("ranges4", "10.0.0.11", None),
            ("ranges4", "255.255.255.255", Some("255.255.255.255")),
            ("ranges6", "fd42::1", Some("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
            ("pods4", "10.42.0.7", Some("10.42.0.7 : goto pod")),
            ("pods6", "fd42::80", Some("fd42::-fd42::ff : jump pod")),
            ("pods6", "fd42::100", Some("fd42::100-fd42::1ff : accept")),
            ("peers4", "203.0.113.9", Some("10.42.1.0-255.255.255.255 : 0x12345678")),
            ("pairs6", "fd00::1 . fd00::2", Some("fd00::1 . fd00::2")),
            ("pairs6", "fd00::2 . fd00::1", None),
            ("services", "1 . 6 . 85", Some("0x00000001 . 6-6 . 80-90 : accept")),
            ("services", "1 . 6 . 91", None),
            ("services", "2 . 132 . 9", Some("0x00000002 . 0-255 . 0-65535 : return")),
        ] {
            assert_eq!(found(set, key).as_deref(), expected, "{set} {key}");
        }
    });
}

#[test]
fn changes_are_serialized_with_kind_name_and_elements() {
    let set = set_of(
        PolicyKey::Address(V4),
        PolicyValueKind::Verdict,
        &[("10.42.0.7", PolicyValue::Verdict(verdict("return")))],
    );
    let change = PolicyChange::AddElements { name: "e_3_ipv4".into(), elements: set.elements.clone(), set };
    assert_eq!(change.to_string(), "nft table inet husk-policy: set e_3_ipv4: add 10.42.0.7 : return");
    let expected = serde_json::json!({
        "change": "addElements", "name": "e_3_ipv4", "elements": ["10.42.0.7 : return"],
        "text": "nft table inet husk-policy: set e_3_ipv4: add 10.42.0.7 : return",
    });
    assert_eq!(serde_json::to_value(&change).unwrap(), expected);
}
