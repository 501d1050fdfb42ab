//! From any table to any other.

use proptest::prelude::*;

use super::*;

/// Numbers at which ranges begin and end: the ends of the family, and neighbours in between.
fn bounds() -> impl Strategy<Value = Vec<(u8, u8)>> {
    prop::collection::vec((0_u8..24, 0_u8..5), 0..7).prop_map(|all| {
        let (mut ranges, mut next) = (Vec::new(), 0);
        for (gap, length) in all {
            let first = next + gap % 3;
            if first + length > 23 {
                break;
            }
            ranges.push((first, first + length));
            next = first + length + 1;
        }
        ranges
    })
}

/// The nth of 24 bounds of a space that ends at `last`: the first and the last of them are its ends.
fn spread(n: u8, last: u128) -> u128 {
    if n < 12 { n.into() } else { last - u128::from(23 - n) }
}

fn address(family: Family, n: u8) -> std::net::IpAddr {
    match family {
        Family::Ipv4 => u32::try_from(spread(n, u32::MAX.into())).unwrap().to_be_bytes().into(),
        Family::Ipv6 => spread(n, u128::MAX).to_be_bytes().into(),
    }
}

fn port(n: u8) -> u16 {
    u16::try_from(spread(n, u16::MAX.into())).unwrap()
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(Family::ALL.to_vec())
}

fn elements() -> impl Strategy<Value = (PolicyKey, Vec<PolicyElement>)> {
    let ranges = (family(), bounds()).prop_map(|(family, all)| {
        let element = |(first, last)| PolicyElement::AddressRange(address(family, first), address(family, last));
        (PolicyKey::AddressRange(family), all.into_iter().map(element).collect::<Vec<_>>())
    });
    let services = (0_u32..3, bounds(), any::<bool>()).prop_map(|(class, all, whole)| {
        let protocols = if whole { (0, 255) } else { (6, 17) };
        let element =
            |(first, last)| PolicyElement::ClassAndService { class, protocols, ports: (port(first), port(last)) };
        (PolicyKey::ClassAndService, all.into_iter().map(element).collect())
    });
    let numbers = || prop::collection::btree_set(0_u8..24, 0..6);
    let hosts = (family(), numbers()).prop_map(|(family, all)| {
        let element = |n| PolicyElement::Address(address(family, n));
        (PolicyKey::Address(family), all.into_iter().map(element).collect())
    });
    let pairs = (family(), numbers()).prop_map(|(family, all)| {
        let element = |n: u8| PolicyElement::AddressPair(address(family, n), address(family, 23 - n));
        (PolicyKey::AddressPair(family), all.into_iter().map(element).collect())
    });
    prop_oneof![4 => ranges, 2 => services, 1 => hosts, 1 => pairs]
}

fn any_set() -> impl Strategy<Value = Arc<PolicySet>> {
    (elements(), 0..3, prop::collection::vec(0_u8..4, 24)).prop_map(|((key, elements), kind, values)| {
        let verdicts = ["accept", "drop", "jump x", "goto y"];
        let (kind, value): (_, fn(u8, &[&str]) -> PolicyValue) = match kind {
            0 => (PolicyValueKind::None, |_, _| PolicyValue::None),
            1 => (PolicyValueKind::Class, |n, _| PolicyValue::Class(n.into())),
            _ => (PolicyValueKind::Verdict, |n, all| PolicyValue::Verdict(verdict(all[usize::from(n)]))),
        };
        let elements = elements.into_iter().zip(values).map(|(it, n)| (it, value(n, &verdicts))).collect();
        Arc::new(PolicySet { key, value: kind, elements })
    })
}

fn field(key: PolicyKey) -> Option<PolicyField> {
    match key {
        PolicyKey::Address(family) => Some(PolicyField::Source(family)),
        PolicyKey::AddressRange(family) => Some(PolicyField::Responder(family)),
        PolicyKey::AddressPair(family) => Some(PolicyField::OriginatorAndResponder(family)),
        PolicyKey::ClassAndService => None,
    }
}

/// The rules that use a set as its type allows.
fn rules(name: &PolicyName, set: &PolicySet) -> Vec<PolicyRule> {
    match (field(set.key), set.value) {
        (Some(field), PolicyValueKind::None) => vec![
            rule(&[PolicyMatch::In(field, name.clone())], act("return")),
            rule(&[PolicyMatch::NotIn(field, name.clone())], PolicyAction::Continue),
        ],
        (Some(field), PolicyValueKind::Verdict) => vec![rule(&[], PolicyAction::Lookup(field, name.clone()))],
        (None, PolicyValueKind::Verdict) => {
            let class = PolicyClass::Always(1);
            vec![rule(&[], PolicyAction::Judge { class, services: name.clone() })]
        }
        _ => Vec::new(),
    }
}

fn any_table() -> impl Strategy<Value = PolicyTable> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let sets = prop::collection::btree_map(name, any_set(), 0..4);
    (sets, any::<[bool; 3]>(), 0..3_i32).prop_map(|(sets, [used, counter, reverse], priority)| {
        let sets: BTreeMap<PolicyName, _> = sets.into_iter().map(|(name, set)| (name.into(), set)).collect();
        let mut all: Vec<_> = sets.iter().filter(|_| used).flat_map(|(name, set)| rules(name, set)).collect();
        if reverse {
            all.reverse();
        }
        if counter {
            all = all.into_iter().map(|rule| counted("n", rule)).collect();
        }
        let mut table = table(if counter { &["n"] } else { &[] }, vec![], vec![]);
        table.sets = sets;
        // Of the chains that elements may lead to those are there that are needed.
        let leads = |chain: &str| {
            let to = |it: &PolicyValue| matches!(it, PolicyValue::Verdict(PolicyVerdict::Jump(to) | PolicyVerdict::Goto(to)) if &**to == chain);
            table.sets.values().flat_map(|set| set.elements.values()).any(to)
        };
        let needed: Vec<&str> = ["x", "y"].into_iter().filter(|chain| leads(chain)).collect();
        table.chains = needed.into_iter().map(|name| (name.into(), chain(None, vec![]))).collect();
        table.chains.insert("base".into(), chain(Some((Hook::Forward, priority)), all));
        table
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_table_becomes_any_other(tables in prop::collection::vec(any_table(), 2..8)) {
        in_namespace(|| {
            let mut live = Live::default();
            for table in &tables {
                let changes = diff(Some(table), live.read().unwrap().as_deref());
                let applied = live.apply(&changes, Some(table)).unwrap_or_else(|error| panic!("{error}: {changes:#?}"));
                assert!(!applied.replaced, "{changes:#?}");
                is_as(table);
                assert_eq!(live.read().unwrap().as_deref(), Some(&ActualPolicy::of(table)));
            }
        });
    }

    #[test]
    fn no_difference_is_overlooked(one in any_table(), other in any_table()) {
        let changes = diff(Some(&other), Some(&ActualPolicy::of(&one)));
        let mut state = Some(Arc::new(ActualPolicy::of(&one)));
        changes.iter().for_each(|change| change.apply_to(&mut state));
        prop_assert_eq!(state.as_deref(), Some(&ActualPolicy::of(&other)));
        prop_assert_eq!(changes.is_empty(), one == other);
    }
}
