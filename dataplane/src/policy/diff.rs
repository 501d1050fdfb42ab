//! What has to change so that the kernel's table is the desired one. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use husk_overlay::kernel::policy::{
    PolicyAction, PolicyChain, PolicyClass, PolicyMatch, PolicyName, PolicyRule, PolicySet, PolicyTable,
};

use super::change::Elements;
use super::{ActualChain, ActualHook, ActualPolicy, ActualSet, PolicyChange, rule};

/// What has to change from `actual` to `desired`; none means no table. Empty exactly when nothing has to.
#[must_use]
pub fn diff(desired: Option<&PolicyTable>, actual: Option<&ActualPolicy>) -> Vec<PolicyChange> {
    match (desired, actual) {
        (None, None) => Vec::new(),
        (None, Some(_)) => vec![PolicyChange::DeleteTable],
        (Some(table), None) => vec![PolicyChange::CreateTable { table: table.clone() }],
        (Some(table), Some(state)) if state.dormant => {
            let reason = "it is dormant, so that none of its rules is in force".to_owned();
            vec![PolicyChange::ReplaceTable { table: table.clone(), reason }]
        }
        (Some(table), Some(state)) if state.unowned => {
            let reason = "it does not belong to the daemon, so that whoever flushes all rules takes it away".to_owned();
            vec![PolicyChange::ReplaceTable { table: table.clone(), reason }]
        }
        (Some(table), Some(state)) => table_diff(table, state),
    }
}

/// The changes that may be made while nothing is known of the cluster: what is missing altogether is made, and a table that is
/// not in force is as good as missing. Nothing that is in force is rebuilt, replaced or emptied.
#[must_use]
pub fn without_removals(changes: Vec<PolicyChange>) -> Vec<PolicyChange> {
    let makes = |change: &PolicyChange| match change {
        PolicyChange::CreateTable { .. }
        | PolicyChange::ReplaceTable { .. }
        | PolicyChange::AddCounter { .. }
        | PolicyChange::AddSet { .. }
        | PolicyChange::AddChain { .. } => true,
        PolicyChange::DeleteTable
        | PolicyChange::DeleteCounter { .. }
        | PolicyChange::ReplaceSet { .. }
        | PolicyChange::RefillSet { .. }
        | PolicyChange::AddElements { .. }
        | PolicyChange::DeleteElements { .. }
        | PolicyChange::DeleteSet { .. }
        | PolicyChange::ReplaceChain { .. }
        | PolicyChange::RebuildChain { .. }
        | PolicyChange::DeleteChain { .. }
        | PolicyChange::DeleteForeign { .. } => false,
    };
    changes.into_iter().filter(makes).collect()
}

fn table_diff(table: &PolicyTable, state: &ActualPolicy) -> Vec<PolicyChange> {
    let mut changes = Vec::new();
    for name in table.counters.difference(&state.counters) {
        changes.push(PolicyChange::AddCounter { name: name.clone() });
    }
    for name in state.counters.difference(&table.counters) {
        changes.push(PolicyChange::DeleteCounter { name: name.clone() });
    }
    let replaced = sets_diff(table, state, &mut changes);
    chains_diff(table, state, &replaced, &mut changes);
    changes.extend(state.foreign.iter().map(|object| PolicyChange::DeleteForeign { object: object.clone() }));
    changes
}

/// Returns the names of sets that are replaced.
fn sets_diff(table: &PolicyTable, state: &ActualPolicy, changes: &mut Vec<PolicyChange>) -> BTreeSet<PolicyName> {
    let mut replaced = BTreeSet::new();
    for (name, set) in &table.sets {
        let (name, set) = (name.clone(), set.clone());
        match state.sets.get(&name) {
            None => changes.push(PolicyChange::AddSet { name, set }),
            Some(ActualSet::Ours(present)) if Arc::ptr_eq(present, &set) => {}
            Some(ActualSet::Ours(present)) if present.key == set.key && present.value == set.value => {
                elements_diff(&name, &set, present, changes);
            }
            Some(ActualSet::Spoilt { key, value }) if *key == set.key && *value == set.value => {
                changes.push(PolicyChange::RefillSet { name, set });
            }
            Some(_) => {
                replaced.insert(name.clone());
                changes.push(PolicyChange::ReplaceSet { name, set });
            }
        }
    }
    for name in state.sets.keys().filter(|name| !table.sets.contains_key(*name)) {
        changes.push(PolicyChange::DeleteSet { name: name.clone() });
    }
    replaced
}

fn elements_diff(name: &PolicyName, set: &Arc<PolicySet>, present: &PolicySet, changes: &mut Vec<PolicyChange>) {
    let old = missing_from(&set.elements, &present.elements);
    if !old.is_empty() {
        changes.push(PolicyChange::DeleteElements { name: name.clone(), elements: old, set: set.clone() });
    }
    let new = missing_from(&present.elements, &set.elements);
    if !new.is_empty() {
        changes.push(PolicyChange::AddElements { name: name.clone(), elements: new, set: set.clone() });
    }
}

/// Elements of `some` that `all` does not have with the same value. Both are sorted: one walk over both.
fn missing_from(all: &Elements, some: &Elements) -> Elements {
    let mut all = all.iter().peekable();
    let mut missing = Vec::new();
    for element in some {
        while all.next_if(|other| other.0 < element.0).is_some() {}
        if all.peek() != Some(&element) {
            missing.push((*element.0, element.1.clone()));
        }
    }
    missing.into_iter().collect()
}

fn chains_diff(
    table: &PolicyTable,
    state: &ActualPolicy,
    replaced: &BTreeSet<PolicyName>,
    changes: &mut Vec<PolicyChange>,
) {
    for (name, chain) in &table.chains {
        let (name, chain) = (name.clone(), chain.clone());
        let Some(present) = state.chains.get(&name) else {
            changes.push(PolicyChange::AddChain { name, chain });
            continue;
        };
        if present.hook != ActualHook::of(&chain) {
            changes.push(PolicyChange::ReplaceChain { name, chain, actual: present.hook });
            continue;
        }
        let differs = if present.is_known_as(&chain) { None } else { rules_differ(&chain, present) };
        let reason = differs.or_else(|| refers_to(&chain, replaced).map(|set| format!("set {set} is replaced")));
        if let Some(reason) = reason {
            changes.push(PolicyChange::RebuildChain { name, chain, reason });
        }
    }
    for name in state.chains.keys().filter(|name| !table.chains.contains_key(*name)) {
        changes.push(PolicyChange::DeleteChain { name: name.clone() });
    }
}

fn refers_to<'a>(chain: &PolicyChain, sets: &'a BTreeSet<PolicyName>) -> Option<&'a PolicyName> {
    if sets.is_empty() {
        return None;
    }
    chain.rules.iter().flat_map(sets_of).find_map(|name| sets.get(name))
}

/// Names of the sets and maps that a rule refers to.
fn sets_of(rule: &PolicyRule) -> impl Iterator<Item = &PolicyName> {
    let matched = rule.matches.iter().filter_map(|it| match it {
        PolicyMatch::In(_, name) | PolicyMatch::NotIn(_, name) => Some(name),
        _ => None,
    });
    let looked_up = match &rule.action {
        PolicyAction::Continue | PolicyAction::Verdict(_) => [None, None],
        PolicyAction::Lookup(_, name) => [Some(name), None],
        PolicyAction::Judge { class: PolicyClass::Of(_, classes), services } => [Some(classes), Some(services)],
        PolicyAction::Judge { class: PolicyClass::Always(_), services } => [Some(services), None],
    };
    matched.chain(looked_up.into_iter().flatten())
}

/// Says what differs between the rules that should be and those that are; none when they are the same in the same order.
fn rules_differ(chain: &PolicyChain, actual: &ActualChain) -> Option<String> {
    let wanted: Vec<String> = chain.rules.iter().map(rule::comment).collect();
    if wanted.iter().eq(actual.rules.iter().flatten()) && wanted.len() == actual.rules.len() {
        return None;
    }
    // How often each is wanted, less how often it is there.
    let mut balance: BTreeMap<&str, i64> = BTreeMap::new();
    wanted.iter().for_each(|comment| *balance.entry(comment).or_default() += 1);
    let (mut unknown, mut missing) = (0, 0);
    for rule in &actual.rules {
        match rule {
            Some(comment) => *balance.entry(comment).or_default() -= 1,
            None => unknown += 1,
        }
    }
    for count in balance.into_values() {
        missing += count.max(0);
        unknown += (-count).max(0);
    }
    Some(match (missing, unknown) {
        (0, 0) => "order of rules".to_owned(),
        (0, unknown) => format!("{unknown} unknown"),
        (missing, 0) => format!("{missing} missing"),
        (missing, unknown) => format!("{missing} missing, {unknown} unknown or outdated"),
    })
}
