//! What has to change so that the kernel's table is the desired one. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use husk_overlay::kernel::{
    Addressee, Chain, CounterName, Map, MapValue, MatchValue, NftTable, Rule, Set, SetElement, Statement,
};
use husk_overlay::marks;
use husk_overlay::prefix::Prefix;
use serde::Serialize;
use serde_json::Value;

use super::compile::{canonical_elements, prefix_of, rule_comment};
use super::{ActualChain, ActualMap, ActualSet, ChainSpec, MapSpec, NftState, SetSpec, maps};

/// One change to the table `inet husk`. All changes of a pass are made in one transaction.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", tag = "change")]
pub enum NftChange {
    /// The table is missing.
    CreateTable {
        /// All of it.
        table: NftTable,
    },
    /// The table as a whole is not as it should be; deleted and created at once.
    ReplaceTable {
        /// All of it.
        table: NftTable,
        /// What is wrong with the present one.
        reason: String,
    },
    /// There shall be no table.
    DeleteTable,
    /// A counter is missing.
    AddCounter {
        /// Its name.
        counter: CounterName,
    },
    /// A set is missing.
    AddSet {
        /// Its name.
        name: String,
        /// The set with its elements.
        set: Set,
    },
    /// A set has another type or other flags. The chains that refer to it are rebuilt in the same transaction.
    ReplaceSet {
        /// Its name.
        name: String,
        /// The set with its elements.
        set: Set,
    },
    /// Elements are missing.
    AddElements {
        /// Name of the set.
        set: String,
        /// What to add.
        elements: BTreeSet<SetElement>,
    },
    /// Elements are too many.
    DeleteElements {
        /// Name of the set.
        set: String,
        /// What to delete.
        elements: BTreeSet<SetElement>,
    },
    /// A map is missing.
    AddMap {
        /// Its name.
        name: String,
        /// The map with its elements.
        map: Map,
    },
    /// A map has other types or flags. The chains that refer to it are rebuilt in the same transaction.
    ReplaceMap {
        /// Its name.
        name: String,
        /// The map with its elements.
        map: Map,
    },
    /// Elements of a map are missing.
    AddMappings {
        /// Name of the map.
        map: String,
        /// What to add.
        #[serde(serialize_with = "maps::serialize_elements")]
        elements: BTreeMap<Addressee, MapValue>,
    },
    /// Elements of a map are too many, or lead elsewhere.
    DeleteMappings {
        /// Name of the map.
        map: String,
        /// What to delete.
        #[serde(serialize_with = "maps::serialize_elements")]
        elements: BTreeMap<Addressee, MapValue>,
    },
    /// Elements of a form that Husk never writes: ranges, elements with a time-out or comment.
    DeleteForeignElements {
        /// Name of the set or map.
        set: String,
        /// The elements as nft printed them.
        elements: Vec<Value>,
    },
    /// A chain is missing.
    AddChain {
        /// Its name.
        name: String,
        /// The chain with its rules.
        chain: Chain,
    },
    /// A chain has another type, hook, priority or policy, none of which can be changed in place.
    ReplaceChain {
        /// Its name.
        name: String,
        /// The chain with its rules.
        chain: Chain,
        /// What it is at present.
        actual: String,
    },
    /// The rules of a chain are not the desired ones in the desired order.
    RebuildChain {
        /// Its name.
        name: String,
        /// All rules.
        rules: Vec<Rule>,
        /// What differs, for people.
        reason: String,
    },
    /// A chain that is not ours stands in our table.
    DeleteChain {
        /// Its name.
        name: String,
    },
    /// Any other object in our table that is not desired: a set, a counter, a map.
    DeleteObject {
        /// Kind as nft names it.
        kind: String,
        /// Its name.
        name: String,
    },
}

/// What has to change from `actual` to `desired`; none means no table. Empty exactly when nothing has to.
#[must_use]
pub fn diff(desired: Option<&NftTable>, actual: Option<&NftState>) -> Vec<NftChange> {
    match (desired, actual) {
        (None, None) => Vec::new(),
        (None, Some(_)) => vec![NftChange::DeleteTable],
        (Some(table), None) => vec![NftChange::CreateTable { table: table.clone() }],
        (Some(table), Some(state)) if state.dormant => {
            let reason = "it is dormant, so that none of its rules is in force".to_owned();
            vec![NftChange::ReplaceTable { table: table.clone(), reason }]
        }
        (Some(table), Some(state)) => table_diff(table, state),
    }
}

/// The changes without those that take away what may turn out to be desired once everything desired is known: the table and
/// elements of sets. Elements that overlap an added one go all the same, since the kernel does not take both. What is
/// rebuilt or replaced is not taken away.
#[must_use]
pub fn without_removals(changes: Vec<NftChange>) -> Vec<NftChange> {
    let mut added: BTreeMap<String, Vec<Prefix>> = BTreeMap::new();
    for change in &changes {
        if let NftChange::AddElements { set, elements } = change {
            added.entry(set.clone()).or_default().extend(elements.iter().filter_map(prefix_of));
        }
    }
    let kept = changes.into_iter().filter_map(|change| match change {
        NftChange::DeleteTable => None,
        NftChange::DeleteElements { set, mut elements } => {
            let new = added.get(&set)?;
            elements.retain(|old| prefix_of(old).is_some_and(|old| new.iter().any(|new| new.overlaps(&old))));
            (!elements.is_empty()).then_some(NftChange::DeleteElements { set, elements })
        }
        other => Some(other),
    });
    maps::without_removed_mappings(kept.collect())
}

fn table_diff(table: &NftTable, state: &NftState) -> Vec<NftChange> {
    let mut changes = Vec::new();
    for counter in table.counters.difference(&state.counters) {
        changes.push(NftChange::AddCounter { counter: counter.clone() });
    }
    for counter in state.counters.difference(&table.counters) {
        changes.push(NftChange::DeleteObject { kind: "counter".to_owned(), name: counter.clone() });
    }
    let mut replaced = set_diff(&table.sets, &state.sets, &mut changes);
    replaced.extend(map_diff(&table.maps, &state.maps, &mut changes));
    chain_diff(table, state, &replaced, &mut changes);
    for (kind, name) in &state.foreign {
        changes.push(NftChange::DeleteObject { kind: kind.clone(), name: name.clone() });
    }
    changes
}

/// Returns the names of sets that are replaced.
fn set_diff<'a>(
    desired: &'a BTreeMap<String, Set>,
    actual: &BTreeMap<String, ActualSet>,
    changes: &mut Vec<NftChange>,
) -> BTreeSet<&'a str> {
    let mut replaced = BTreeSet::new();
    for (name, set) in desired {
        let Some(present) = actual.get(name) else {
            changes.push(NftChange::AddSet { name: name.clone(), set: set.clone() });
            continue;
        };
        if present.spec != SetSpec::of(set.element_type) {
            replaced.insert(name.as_str());
            changes.push(NftChange::ReplaceSet { name: name.clone(), set: set.clone() });
            continue;
        }
        let wanted = canonical_elements(set);
        if !present.foreign.is_empty() {
            let elements = present.foreign.clone();
            changes.push(NftChange::DeleteForeignElements { set: name.clone(), elements });
        }
        let old: BTreeSet<_> = present.elements.difference(&wanted).cloned().collect();
        if !old.is_empty() {
            changes.push(NftChange::DeleteElements { set: name.clone(), elements: old });
        }
        let new: BTreeSet<_> = wanted.difference(&present.elements).cloned().collect();
        if !new.is_empty() {
            changes.push(NftChange::AddElements { set: name.clone(), elements: new });
        }
    }
    for name in actual.keys().filter(|name| !desired.contains_key(*name)) {
        changes.push(NftChange::DeleteObject { kind: "set".to_owned(), name: name.clone() });
    }
    replaced
}

/// Returns the names of maps that are replaced.
fn map_diff<'a>(
    desired: &'a BTreeMap<String, Map>,
    actual: &BTreeMap<String, ActualMap>,
    changes: &mut Vec<NftChange>,
) -> BTreeSet<&'a str> {
    let mut replaced = BTreeSet::new();
    for (name, map) in desired {
        let Some(present) = actual.get(name) else {
            changes.push(NftChange::AddMap { name: name.clone(), map: map.clone() });
            continue;
        };
        if present.spec != MapSpec::of(map) {
            replaced.insert(name.as_str());
            changes.push(NftChange::ReplaceMap { name: name.clone(), map: map.clone() });
            continue;
        }
        if !present.foreign.is_empty() {
            let elements = present.foreign.clone();
            changes.push(NftChange::DeleteForeignElements { set: name.clone(), elements });
        }
        let old = maps::missing_from(&map.elements, &present.elements);
        if !old.is_empty() {
            changes.push(NftChange::DeleteMappings { map: name.clone(), elements: old });
        }
        let new = maps::missing_from(&present.elements, &map.elements);
        if !new.is_empty() {
            changes.push(NftChange::AddMappings { map: name.clone(), elements: new });
        }
    }
    for name in actual.keys().filter(|name| !desired.contains_key(*name)) {
        changes.push(NftChange::DeleteObject { kind: "map".to_owned(), name: name.clone() });
    }
    replaced
}

fn chain_diff(table: &NftTable, state: &NftState, replaced_sets: &BTreeSet<&str>, changes: &mut Vec<NftChange>) {
    for (name, chain) in &table.chains {
        let Some(present) = state.chains.get(name) else {
            changes.push(NftChange::AddChain { name: name.clone(), chain: chain.clone() });
            continue;
        };
        if present.spec != ChainSpec::of(chain) {
            let (name, chain, actual) = (name.clone(), chain.clone(), present.spec.to_string());
            changes.push(NftChange::ReplaceChain { name, chain, actual });
            continue;
        }
        let reason = rules_differ(chain, present)
            .or_else(|| refers_to(chain, replaced_sets).map(|set| format!("{set} is replaced")));
        if let Some(reason) = reason {
            changes.push(NftChange::RebuildChain { name: name.clone(), rules: chain.rules.clone(), reason });
        }
    }
    for name in state.chains.keys().filter(|name| !table.chains.contains_key(*name)) {
        changes.push(NftChange::DeleteChain { name: name.clone() });
    }
}

fn refers_to<'a>(chain: &Chain, sets: &BTreeSet<&'a str>) -> Option<&'a str> {
    let named = chain.rules.iter().flat_map(|rule| &rule.statements).flat_map(|statement| match statement {
        Statement::Match(it) => match &it.value {
            MatchValue::Set(name) => vec![name.as_str()],
            _ => Vec::new(),
        },
        Statement::TranslateDestination { addresses, ports, .. } => vec![addresses.as_str(), ports.as_str()],
        _ => Vec::new(),
    });
    named.into_iter().find_map(|name| sets.get(name).copied())
}

/// Says what differs between the rules that should be and those that are; none when they are the same in the same order.
fn rules_differ(chain: &Chain, actual: &ActualChain) -> Option<String> {
    let wanted: Vec<String> = chain.rules.iter().map(rule_comment).collect();
    if wanted.iter().eq(actual.rules.iter().flatten()) && wanted.len() == actual.rules.len() {
        return None;
    }
    let present: BTreeSet<&String> = actual.rules.iter().flatten().collect();
    let missing: Vec<&str> = chain
        .rules
        .iter()
        .zip(&wanted)
        .filter(|(_, comment)| !present.contains(comment))
        .map(|(rule, _)| rule.name.as_str())
        .collect();
    let foreign = actual.rules.iter().filter(|rule| rule.as_ref().is_none_or(|it| !wanted.contains(it))).count();
    Some(match (missing.as_slice(), foreign) {
        ([], 0) => "order of rules".to_owned(),
        ([], foreign) => format!("{foreign} unknown"),
        (missing, 0) => format!("missing: {}", missing.join(", ")),
        (missing, foreign) => format!("missing: {}; {foreign} unknown or outdated", missing.join(", ")),
    })
}

impl fmt::Display for NftChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nft table inet {}: ", marks::NFT_TABLE)?;
        match self {
            Self::CreateTable { table } => write!(
                f,
                "create with {} chains, {} sets, {} counters",
                table.chains.len(),
                table.sets.len(),
                table.counters.len()
            ),
            Self::ReplaceTable { reason, .. } => write!(f, "replace, because {reason}"),
            Self::DeleteTable => write!(f, "delete"),
            Self::AddCounter { counter } => write!(f, "add counter {counter}"),
            Self::AddSet { name, set } => write!(f, "add set {name} with {}", Elements(&set.elements)),
            Self::ReplaceSet { name, set } => {
                write!(f, "replace set {name} (of another type) with {}", Elements(&set.elements))
            }
            Self::AddElements { set, elements } => write!(f, "set {set}: add {}", Elements(elements)),
            Self::DeleteElements { set, elements } => write!(f, "set {set}: delete {}", Elements(elements)),
            Self::DeleteForeignElements { set, elements } => {
                write!(f, "{set}: delete {} elements of a form Husk does not use", elements.len())
            }
            Self::AddMap { name, map } => write!(f, "add map {name} with {}", Mappings(&map.elements)),
            Self::ReplaceMap { name, map } => {
                write!(f, "replace map {name} (of other types) with {}", Mappings(&map.elements))
            }
            Self::AddMappings { map, elements } => write!(f, "map {map}: add {}", Mappings(elements)),
            Self::DeleteMappings { map, elements } => write!(f, "map {map}: delete {}", Mappings(elements)),
            Self::AddChain { name, chain } => write!(f, "add chain {name} with {} rules", chain.rules.len()),
            Self::ReplaceChain { name, chain, actual } => {
                write!(f, "replace chain {name} ({actual}) by {}", ChainSpec::of(chain))
            }
            Self::RebuildChain { name, rules, reason } => {
                write!(f, "rebuild chain {name} with {} rules ({reason})", rules.len())
            }
            Self::DeleteChain { name } => write!(f, "delete unknown chain {name}"),
            Self::DeleteObject { kind, name } => write!(f, "delete unwanted {kind} {name}"),
        }
    }
}

/// Up to three elements by name, more by number.
struct Elements<'a>(&'a BTreeSet<SetElement>);

impl fmt::Display for Elements<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() || self.0.len() > 3 {
            return write!(f, "{} elements", self.0.len());
        }
        for (index, element) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            match element {
                SetElement::Address(address) => write!(f, "{comma}{address}")?,
                SetElement::Prefix(prefix) => write!(f, "{comma}{prefix}")?,
                SetElement::Pair(one, other) => write!(f, "{comma}{one} . {other}")?,
            }
        }
        Ok(())
    }
}

/// Up to three elements of a map by name, more by number.
struct Mappings<'a>(&'a BTreeMap<Addressee, MapValue>);

impl fmt::Display for Mappings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() || self.0.len() > 3 {
            return write!(f, "{} elements", self.0.len());
        }
        for (index, (key, value)) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { ", " })?;
            match key.address {
                Some(address) => write!(f, "{address} . {} . {}", key.protocol, key.port)?,
                None => write!(f, "{} . {}", key.protocol, key.port)?,
            }
            match value {
                MapValue::Address(address) => write!(f, " : {address}")?,
                MapValue::Port(port) => write!(f, " : {port}")?,
            }
        }
        Ok(())
    }
}
