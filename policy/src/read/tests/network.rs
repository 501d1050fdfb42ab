use super::*;

/// What a spec makes of a direction: `-` where it does not isolate, else the rules.
fn direction(rules: Option<&Vec<crate::object::PolicyRule>>) -> String {
    rules.map_or("-".into(), |rules| format!("{:?}", rules.iter().map(shown).collect::<Vec<_>>()))
}

#[test]
fn directions_are_those_of_policy_types_or_of_what_is_there() {
    let all = r#"["everybody everything"]"#;
    for (spec, ingress, egress, issues) in [
        (json!({}), "[]", "-", 0),
        (json!(null), "[]", "-", 0),
        (json!({ "podSelector": null }), "[]", "-", 0),
        (json!({ "ingress": [] }), "[]", "-", 0),
        (json!({ "ingress": null, "egress": null }), "[]", "-", 0),
        (json!({ "ingress": [{}] }), all, "-", 0),
        (json!({ "egress": [{}] }), "[]", all, 0),
        (json!({ "egress": [] }), "[]", "-", 0),
        (json!({ "policyTypes": [] , "egress": [{}] }), "[]", all, 0),
        (json!({ "policyTypes": null }), "[]", "-", 0),
        (json!({ "policyTypes": ["Ingress"] }), "[]", "-", 0),
        (json!({ "policyTypes": ["Ingress"], "egress": [{}] }), "[]", "-", 0),
        (json!({ "policyTypes": ["Egress"] }), "-", "[]", 0),
        (json!({ "policyTypes": ["Egress"], "ingress": [{}] }), "-", "[]", 0),
        (json!({ "policyTypes": ["Egress", "Ingress"], "ingress": [{}], "egress": [{}] }), all, all, 0),
        // What is not understood isolates, and rules count where they are named.
        (json!({ "policyTypes": ["Ingress", "egress"], "ingress": [{}], "egress": [{}] }), all, "[]", 1),
        (json!({ "policyTypes": ["Sideways"], "ingress": [{}], "egress": [{}] }), "[]", "[]", 1),
        (json!({ "policyTypes": [null], "ingress": [{}] }), "[]", "[]", 1),
        (json!({ "policyTypes": "Ingress", "ingress": [{}] }), "[]", "[]", 1),
        (json!({ "ingress": [{}], "schedule": null }), "[]", "[]", 1),
        (json!({ "policyTypes": ["Ingress"], "ingress": [{}], "schedule": "night" }), "[]", "[]", 1),
        (json!("x"), "[]", "[]", 1),
        (json!({ "ingress": {} }), "[]", "-", 1),
        (json!({ "egress": "x" }), "[]", "[]", 1),
    ] {
        let (policy, found) = network_policy(spec.clone());
        let got = (direction(policy.ingress.as_ref()), direction(policy.egress.as_ref()), found.len());
        assert_eq!(got, (ingress.to_owned(), egress.to_owned(), issues), "{spec} {found:#?}");
        assert_eq!(policy.selector.to_string(), "*", "{spec}");
    }
}

#[test]
fn a_selector_that_is_not_understood_selects_every_pod_and_brings_no_rule() {
    let labels = json!({ "app": "web", "example.com/tier": "" });
    let expressions = json!([
        { "key": "a", "operator": "In", "values": ["x", "y"] }, { "key": "b", "operator": "NotIn", "values": ["z"] },
        { "key": "c", "operator": "Exists" }, { "key": "d", "operator": "DoesNotExist", "values": [] },
    ]);
    let (policy, issues) = network_policy(json!({
        "podSelector": { "matchLabels": labels, "matchExpressions": expressions }, "ingress": [{}],
    }));
    assert_eq!(issues, []);
    assert_eq!(policy.selector.to_string(), "a in (x,y),app=web,b notin (z),c,!d,example.com/tier=");
    assert_eq!(direction(policy.ingress.as_ref()), r#"["everybody everything"]"#);
    for (selector, place) in [
        (json!([]), "spec.podSelector: []"),
        (json!({ "matchLabels": [] }), "spec.podSelector.matchLabels: []"),
        (json!({ "matchLabels": { "app": true } }), "spec.podSelector.matchLabels.app: true"),
        (json!({ "matchLabels": { "app": null } }), "spec.podSelector.matchLabels.app: null"),
        (json!({ "matchLabels": { "app": "web " } }), "spec.podSelector.matchLabels.app: \"web \""),
        (json!({ "matchLabels": { "app (again)": "web" } }), "spec.podSelector.matchLabels.app (again): \"web\""),
        (json!({ "matchLabels": { "Example.com/app": "web" } }), "spec.podSelector.matchLabels.Example.com/app"),
        (json!({ "matchLabels": {}, "matchNames": {} }), "spec.podSelector.matchNames: {}: this version"),
        (json!({ "matchExpressions": [{ "key": "a" }] }), "spec.podSelector.matchExpressions[0].operator: the key"),
        (
            json!({ "matchExpressions": [{ "operator": "Exists" }] }),
            "spec.podSelector.matchExpressions[0].key: the key",
        ),
        (json!({ "matchExpressions": [{ "key": "a", "operator": "In" }] }), "matchExpressions[0].operator: \"In\""),
        (json!({ "matchExpressions": [{ "key": "a", "operator": "NotIn", "values": [] }] }), "operator: \"NotIn\""),
        (json!({ "matchExpressions": [{ "key": "a", "operator": "In", "values": ["-"] }] }), "values[0]: \"-\""),
        (
            json!({ "matchExpressions": [{ "key": "a", "operator": "Exists", "values": ["x"] }] }),
            "operator: \"Exists\"",
        ),
        (json!({ "matchExpressions": [{ "key": "a", "operator": "Gt", "values": ["1"] }] }), "operator: \"Gt\""),
        (json!({ "matchExpressions": [{ "key": "a", "operator": "Exists", "x": 1 }] }), "matchExpressions[0].x: 1"),
    ] {
        let (policy, issues) = network_policy(json!({ "podSelector": selector, "ingress": [{}] }));
        assert_eq!((policy.selector.to_string().as_str(), &policy.ingress), ("*", &Some(vec![])), "{selector}");
        assert_eq!((&policy.egress, issues.len()), (&None, 1), "{selector}");
        let message = &issues[0].message;
        assert!(message.contains(place), "{message}");
        assert!(
            message.ends_with("the policy selects every pod of its namespace and allows them nothing"),
            "{message}"
        );
    }
}

#[test]
fn a_list_that_is_not_there_or_empty_is_everything_and_one_that_is_not_understood_nothing() {
    for (rule, expected, issues) in [
        (json!({}), "everybody everything", 0),
        (json!({ "from": null, "ports": null }), "everybody everything", 0),
        (json!({ "from": [], "ports": [] }), "everybody everything", 0),
        (json!({ "from": [{}] }), "[] everything", 1),
        (json!({ "from": [{}, { "podSelector": {} }, null] }), "[* in shop] everything", 2),
        (json!({ "ports": [{ "port": 0 }] }), "everybody []", 1),
        (json!({ "from": {}, "ports": "x" }), "[] []", 2),
        (json!({ "to": [] }), "[] everything", 1),
        (json!({ "from": [{ "podSelector": {} }], "hosts": null }), "[] everything", 1),
        (json!(null), "[] everything", 1),
        (json!("x"), "[] everything", 1),
    ] {
        let (policy, found) = network_policy(json!({ "ingress": [rule.clone()] }));
        let got: Vec<String> = policy.ingress.unwrap().iter().map(shown).collect();
        assert_eq!((got, found.len()), (vec![expected.to_owned()], issues), "{rule} {found:#?}");
    }
}

#[test]
fn peers_are_pods_or_addresses() {
    for (given, expected) in [
        (json!({ "podSelector": {} }), "* in shop"),
        (json!({ "podSelector": { "matchLabels": { "app": "x" } } }), "app=x in shop"),
        (json!({ "namespaceSelector": {} }), "* in <*>"),
        (json!({ "namespaceSelector": { "matchLabels": { "t": "x" } }, "podSelector": null }), "* in <t=x>"),
        (json!({ "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": "x" } } }), "app=x in <*>"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8" } }), "10.0.0.0/8"),
        (json!({ "ipBlock": { "cidr": "10.1.2.3/8", "except": null } }), "10.0.0.0/8"),
        (json!({ "ipBlock": { "cidr": "::ffff:10.1.2.3/104" } }), "10.0.0.0/8"),
        (json!({ "ipBlock": { "cidr": "FD00::1/8", "except": [] } }), "fd00::/8"),
        (json!({ "ipBlock": { "cidr": "0.0.0.0/0", "except": ["10.1.2.3/16"] } }), "0.0.0.0/0 but {10.1.0.0/16}"),
    ] {
        let (policy, issues) = network_policy(json!({ "egress": [{ "to": [given] }] }));
        assert_eq!(issues, []);
        assert_eq!(shown(&policy.egress.unwrap()[0]), format!("[{expected}] everything"));
    }
}

#[test]
fn peers_that_are_not_understood_match_nothing() {
    for (given, said) in [
        (json!({}), "spec.ingress[0].from[1]: {}: a peer has one of"),
        (json!({ "podSelector": null }), "spec.ingress[0].from[1]: a map: a peer has one of"),
        (json!([]), "spec.ingress[0].from[1]: []: a map is expected"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8" }, "podSelector": {} }), "from[1]: a map: ipBlock stands for"),
        (json!({ "podSelector": {}, "nodeSelector": {} }), "from[1].nodeSelector: {}: this version of Husk knows no"),
        (json!({ "podSelector": { "x": 1 } }), "from[1].podSelector.x: 1"),
        (json!({ "namespaceSelector": { "x": 1 } }), "from[1].namespaceSelector.x: 1"),
        (json!({ "ipBlock": {} }), "from[1].ipBlock.cidr: the key is missing"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8", "x": 1 } }), "from[1].ipBlock.x: 1"),
        (json!({ "ipBlock": { "cidr": 8 } }), "from[1].ipBlock.cidr: 8: text is expected"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/33" } }), "from[1].ipBlock.cidr: \"10.0.0.0/33\": this is no CIDR"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0" } }), "this is no CIDR"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/08" } }), "this is no CIDR"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/+8" } }), "this is no CIDR"),
        (json!({ "ipBlock": { "cidr": "010.0.0.0/8" } }), "this is no CIDR"),
        (
            json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"] } }),
            "except[0]: \"11.0.0.0/16\": it does",
        ),
        (
            json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"] } }),
            "except[0]: \"10.0.0.0/8\": it does",
        ),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["fd00::/8"] } }), "except[0]: \"fd00::/8\": it does"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": "10.1.0.0/16" } }), "except: \"10.1.0.0/16\": a list"),
        (json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": [null] } }), "except[0]: null: text is expected"),
    ] {
        let (policy, issues) = network_policy(json!({ "ingress": [{ "from": [{ "podSelector": {} }, given] }] }));
        assert_eq!(shown(&policy.ingress.unwrap()[0]), "[* in shop] everything", "{given}");
        let [issue] = issues.as_slice() else { panic!("{given}: {issues:#?}") };
        assert!(issue.message.contains(said), "{}", issue.message);
        assert!(issue.message.ends_with("the peer is left out and matches nothing"), "{}", issue.message);
    }
}

#[test]
fn ports_are_numbers_ranges_or_names() {
    for (given, expected) in [
        (json!({}), "TCP"),
        (json!({ "protocol": "SCTP" }), "SCTP"),
        (json!({ "port": 80 }), "TCP 80"),
        (json!({ "port": 1, "endPort": 65535, "protocol": "UDP" }), "UDP 1-65535"),
        (json!({ "port": 80, "endPort": 80 }), "TCP 80"),
        (json!({ "port": "dns-tcp", "protocol": null }), "TCP dns-tcp"),
    ] {
        let (policy, issues) = network_policy(json!({ "ingress": [{ "ports": [given] }] }));
        assert_eq!(issues, []);
        assert_eq!(shown(&policy.ingress.unwrap()[0]), format!("everybody [{expected}]"));
    }
    for (given, said) in [
        (json!(null), "ports[0]: null: a map"),
        (json!({ "port": 0 }), "ports[0].port: 0: a port is a whole number"),
        (json!({ "port": 65536 }), "ports[0].port: 65536"),
        (json!({ "port": -1 }), "ports[0].port: -1"),
        (json!({ "port": 80.5 }), "ports[0].port: 80.5"),
        (json!({ "port": true }), "ports[0].port: true"),
        (json!({ "port": "80" }), "ports[0].port: \"80\": the name of a port"),
        (json!({ "port": "" }), "ports[0].port: \"\""),
        (json!({ "port": "Http" }), "ports[0].port"),
        (json!({ "port": "a--b" }), "ports[0].port"),
        (json!({ "port": "-a" }), "ports[0].port"),
        (json!({ "port": "abcdefghijklmnop" }), "ports[0].port"),
        (json!({ "endPort": 80 }), "ports[0].endPort: 80: a range begins"),
        (json!({ "port": "http", "endPort": 80 }), "ports[0].endPort: 80: a range begins"),
        (json!({ "port": 80, "endPort": 79 }), "ports[0].endPort: 79: the range begins at 80"),
        (json!({ "port": 80, "endPort": 65536 }), "ports[0].endPort: 65536"),
        (json!({ "port": 80, "endPort": "90" }), "ports[0].endPort: \"90\""),
        (json!({ "protocol": "tcp" }), "ports[0].protocol: \"tcp\": a protocol is one of"),
        (json!({ "protocol": "ICMP" }), "ports[0].protocol"),
        (json!({ "protocol": 6 }), "ports[0].protocol: 6"),
        (json!({ "port": 80, "host": "x" }), "ports[0].host: \"x\": this version"),
    ] {
        let (policy, issues) = network_policy(json!({ "ingress": [{ "ports": [given] }] }));
        assert_eq!(shown(&policy.ingress.unwrap()[0]), "everybody []", "{given}");
        let [issue] = issues.as_slice() else { panic!("{given}: {issues:#?}") };
        assert!(issue.message.contains(said), "{}", issue.message);
        assert!(issue.message.ends_with("the port is left out and matches nothing"), "{}", issue.message);
    }
}

#[test]
fn nobody_reads_a_thousand_issues() {
    let rules: Vec<Value> = vec![json!(null); 1000];
    let (policy, issues) = network_policy(json!({ "ingress": rules }));
    assert_eq!((policy.ingress.unwrap().len(), issues.len()), (1000, 21));
    assert!(issues[20].message.starts_with("980 more problems"), "{}", issues[20].message);
}
