mod any_table;
mod listing;
mod packets;
mod repair;
mod size;

use std::process::Command;

use husk_overlay::kernel::policy::{
    PolicyAction, PolicyClass, PolicyElement, PolicyField, PolicyLog, PolicyMatch, PolicyRule, PolicyValue,
    PolicyVerdict,
};
use husk_overlay::prefix::Family;

use super::*;
use crate::netns::Netns;

const V4: Family = Family::Ipv4;
const V6: Family = Family::Ipv6;

/// Runs a test in a namespace of its own, which ends with it.
fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    Netns::new_unnamed().unwrap().run_in(test).unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// `nft` as an outsider calls it.
fn nft(command: &str) -> String {
    run("nft", &["-a", command])
}

fn listing() -> String {
    nft("list table inet husk-policy")
}

/// An element as nft writes it: `192.0.2.1`, `192.0.2.1-192.0.2.9`, `192.0.2.1 . 192.0.2.2`, `7 . 6-17 . 80-90`.
fn element(text: &str, interval: bool) -> PolicyElement {
    let address = |text: &str| text.parse().unwrap();
    let ends = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        (first.to_owned(), last.to_owned())
    };
    match text.split(" . ").collect::<Vec<_>>().as_slice() {
        [class, protocols, ports] => {
            let (protocols, ports) = (ends(protocols), ends(ports));
            PolicyElement::ClassAndService {
                class: class.parse().unwrap(),
                protocols: (protocols.0.parse().unwrap(), protocols.1.parse().unwrap()),
                ports: (ports.0.parse().unwrap(), ports.1.parse().unwrap()),
            }
        }
        [one, other] => PolicyElement::AddressPair(address(one), address(other)),
        _ if interval => {
            let (first, last) = ends(text);
            PolicyElement::AddressRange(address(&first), address(&last))
        }
        _ => PolicyElement::Address(address(text)),
    }
}

fn verdict(text: &str) -> PolicyVerdict {
    match text.split_once(' ').unwrap_or((text, "")) {
        ("accept", _) => PolicyVerdict::Accept,
        ("drop", _) => PolicyVerdict::Drop,
        ("return", _) => PolicyVerdict::Return,
        ("jump", chain) => PolicyVerdict::Jump(chain.into()),
        ("goto", chain) => PolicyVerdict::Goto(chain.into()),
        _ => panic!("{text}"),
    }
}

fn set_of(key: PolicyKey, value: PolicyValueKind, elements: &[(&str, PolicyValue)]) -> Arc<PolicySet> {
    let interval = matches!(key, PolicyKey::AddressRange(_));
    let elements = elements.iter().map(|(key, value)| (element(key, interval), value.clone())).collect();
    Arc::new(PolicySet { key, value, elements })
}

fn set(key: PolicyKey, elements: &[&str]) -> Arc<PolicySet> {
    let elements: Vec<_> = elements.iter().map(|it| (*it, PolicyValue::None)).collect();
    set_of(key, PolicyValueKind::None, &elements)
}

fn verdicts(key: PolicyKey, elements: &[(&str, &str)]) -> Arc<PolicySet> {
    let elements: Vec<_> = elements.iter().map(|(key, it)| (*key, PolicyValue::Verdict(verdict(it)))).collect();
    set_of(key, PolicyValueKind::Verdict, &elements)
}

fn classes(key: PolicyKey, elements: &[(&str, u32)]) -> Arc<PolicySet> {
    let elements: Vec<_> = elements.iter().map(|(key, it)| (*key, PolicyValue::Class(*it))).collect();
    set_of(key, PolicyValueKind::Class, &elements)
}

fn rule(matches: &[PolicyMatch], action: PolicyAction) -> PolicyRule {
    PolicyRule { matches: matches.to_vec(), counter: None, log: None, action }
}

fn counted(counter: &str, rule: PolicyRule) -> PolicyRule {
    PolicyRule { counter: Some(counter.to_owned()), ..rule }
}

fn act(text: &str) -> PolicyAction {
    PolicyAction::Verdict(verdict(text))
}

fn is_in(field: PolicyField, set: &str) -> PolicyMatch {
    PolicyMatch::In(field, set.into())
}

fn chain(hook: Option<(Hook, i32)>, rules: Vec<PolicyRule>) -> Arc<PolicyChain> {
    Arc::new(PolicyChain { hook, rules })
}

fn table(counters: &[&str], sets: Vec<(&str, Arc<PolicySet>)>, chains: Vec<(&str, Arc<PolicyChain>)>) -> PolicyTable {
    PolicyTable {
        counters: counters.iter().map(|it| (*it).to_owned()).collect(),
        sets: sets.into_iter().map(|(name, it)| (name.into(), it)).collect(),
        chains: chains.into_iter().map(|(name, it)| (name.into(), it)).collect(),
    }
}

/// A table with every kind of set, match, field and action that the model has.
fn everything() -> PolicyTable {
    let fields = |family| {
        [
            (PolicyField::Source(family), "hosts"),
            (PolicyField::Destination(family), "ranges"),
            (PolicyField::Originator(family), "hosts"),
            (PolicyField::Responder(family), "ranges"),
            (PolicyField::OriginatorAndResponder(family), "pairs"),
        ]
    };
    let mut rules = vec![
        rule(&[PolicyMatch::Stateless], act("drop")),
        rule(&[PolicyMatch::FromPod, PolicyMatch::ToPod], act("jump pod")),
        rule(&[PolicyMatch::Below { rate: 10, burst: 7 }], act("return")),
    ];
    for (family, suffix) in [(V4, "4"), (V6, "6")] {
        for (field, set) in fields(family) {
            let set = format!("{set}{suffix}");
            rules.push(counted("seen", rule(&[is_in(field, &set)], act("accept"))));
            rules.push(rule(
                &[PolicyMatch::Family(family), PolicyMatch::NotIn(field, set.as_str().into())],
                act("return"),
            ));
        }
        let pods = PolicyName::from(format!("pods{suffix}"));
        rules.push(rule(&[], PolicyAction::Lookup(PolicyField::Destination(family), pods)));
        let peers = PolicyClass::Of(PolicyField::Originator(family), format!("peers{suffix}").into());
        rules.push(rule(&[], PolicyAction::Judge { class: peers, services: "services".into() }));
    }
    let always = PolicyAction::Judge { class: PolicyClass::Always(7), services: "services".into() };
    rules.push(rule(&[], always));
    let log = PolicyLog { group: 72, prefix: "husk \"denied\" ä".to_owned(), snap_length: 128 };
    rules.push(PolicyRule { log: Some(log), ..counted("denied", rule(&[], PolicyAction::Continue)) });
    table(
        &["seen", "denied"],
        vec![
            ("hosts4", set(PolicyKey::Address(V4), &["192.0.2.1", "192.0.2.2"])),
            ("hosts6", set(PolicyKey::Address(V6), &["2001:db8::1"])),
            (
                "ranges4",
                set(
                    PolicyKey::AddressRange(V4),
                    &["0.0.0.0-0.0.0.0", "10.0.0.0-10.0.0.9", "10.0.0.10-10.0.0.10", "255.255.255.255"],
                ),
            ),
            ("ranges6", set(PolicyKey::AddressRange(V6), &["::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"])),
            ("pairs4", set(PolicyKey::AddressPair(V4), &["10.0.0.1 . 10.0.0.2"])),
            ("pairs6", set(PolicyKey::AddressPair(V6), &["fd00::1 . fd00::2"])),
            (
                "pods4",
                verdicts(
                    PolicyKey::Address(V4),
                    &[("10.42.0.7", "goto pod"), ("10.42.0.8", "drop"), ("10.42.0.9", "return")],
                ),
            ),
            (
                "pods6",
                verdicts(
                    PolicyKey::AddressRange(V6),
                    &[("fd42::-fd42::ff", "jump pod"), ("fd42::100-fd42::1ff", "accept")],
                ),
            ),
            (
                "peers4",
                classes(
                    PolicyKey::AddressRange(V4),
                    &[("10.42.0.0-10.42.0.255", 1), ("10.42.1.0-255.255.255.255", 0x1234_5678)],
                ),
            ),
            ("peers6", classes(PolicyKey::Address(V6), &[("fd42::7", 2)])),
            (
                "services",
                verdicts(
                    PolicyKey::ClassAndService,
                    &[
                        ("1 . 6-6 . 80-90", "accept"),
                        ("1 . 17-17 . 0-65535", "goto pod"),
                        ("2 . 0-255 . 0-65535", "return"),
                    ],
                ),
            ),
            ("empty", set(PolicyKey::AddressRange(V6), &[])),
            ("nothing", verdicts(PolicyKey::AddressPair(V4), &[])),
        ],
        vec![
            ("pod", chain(None, vec![rule(&[], act("drop"))])),
            ("forward", chain(Some((Hook::Forward, -10)), rules)),
            ("input", chain(Some((Hook::Input, 10)), vec![])),
            ("prerouting", chain(Some((Hook::Prerouting, -300)), vec![])),
            ("output", chain(Some((Hook::Output, 0)), vec![rule(&[], PolicyAction::Continue)])),
            ("postrouting", chain(Some((Hook::Postrouting, i32::MAX)), vec![])),
        ],
    )
}

/// Brings the kernel to `table` and proves that nothing is left to do; returns what was changed.
fn converge(table: &PolicyTable) -> Vec<PolicyChange> {
    let mut live = Live::default();
    let changes = diff(Some(table), live.read().unwrap().as_deref());
    let applied = live.apply(&changes, Some(table)).unwrap_or_else(|error| panic!("{error}: {changes:#?}"));
    assert!(!applied.replaced, "{changes:?}");
    is_as(table);
    assert_eq!(live.read().unwrap().as_deref(), Some(&ActualPolicy::of(table)));
    changes
}

fn is_as(table: &PolicyTable) {
    let actual = read().unwrap();
    assert_eq!(actual.as_deref(), Some(&ActualPolicy::of(table)));
    assert_eq!(diff(Some(table), actual.as_deref()), []);
}

fn texts(changes: &[PolicyChange]) -> Vec<String> {
    let text =
        |change: &PolicyChange| change.to_string().strip_prefix("nft table inet husk-policy: ").unwrap().to_owned();
    changes.iter().map(text).collect()
}
