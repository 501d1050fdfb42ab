//! Large tables.

use std::time::Instant;

use super::*;

/// Ranges of three addresses with a gap of one between them, and classes for them.
fn ranges(count: u32) -> PolicySet {
    let element = |n: u32| {
        let first = 0x0a00_0000 + n * 4;
        let address = |number: u32| std::net::IpAddr::from(number.to_be_bytes());
        (PolicyElement::AddressRange(address(first), address(first + 2)), PolicyValue::Class(n % 1000))
    };
    PolicySet {
        key: PolicyKey::AddressRange(V4),
        value: PolicyValueKind::Class,
        elements: (0..count).map(element).collect(),
    }
}

#[test]
fn a_hundred_thousand_ranges_load_at_once_and_one_changes_alone() {
    in_namespace(|| {
        let mut set = ranges(100_000);
        let services = verdicts(PolicyKey::ClassAndService, &[("7 . 6 . 80-90", "drop")]);
        let class = PolicyClass::Of(PolicyField::Originator(V4), "peers".into());
        let judge = rule(&[], PolicyAction::Judge { class, services: "services".into() });
        let forward = chain(Some((Hook::Forward, 0)), vec![judge]);
        let of = |set: &PolicySet| {
            let sets = vec![("peers", Arc::new(set.clone())), ("services", services.clone())];
            table(&[], sets, vec![("forward", forward.clone())])
        };
        let mut live = Live::default();
        let mut change = |table: &PolicyTable| {
            let start = Instant::now();
            let actual = live.read().unwrap();
            let changes = diff(Some(table), actual.as_deref());
            let applied = live.apply(&changes, Some(table)).unwrap();
            println!("{} octets in {:?}: {}", applied.bytes, start.elapsed(), changes[0]);
            assert!(!applied.replaced);
            (texts(&changes), applied.bytes)
        };
        let (_, bytes) = change(&of(&set));
        assert!(bytes > 100_000 * 40, "{bytes}");
        let start = Instant::now();
        is_as(&of(&set));
        println!("read and compared in {:?}", start.elapsed());
        let (key, value) = set.elements.pop_last().unwrap();
        let (texts, bytes) = change(&of(&set));
        assert_eq!(texts, [format!("set peers: delete {key}{value}")]);
        assert!(bytes < 500, "{bytes}");
        is_as(&of(&set));
        // All of them change.
        for value in set.elements.values_mut() {
            *value = PolicyValue::Class(5);
        }
        change(&of(&set));
        is_as(&of(&set));
        let found = lookup("peers", &element("10.0.0.5", false)).unwrap().unwrap();
        assert_eq!(format!("{}{}", found.0, found.1), "10.0.0.4-10.0.0.6 : 0x00000005");
    });
}
