//! From the typed model to the JSON of libnftables-json(5).
//!
//! A list of changes becomes one list of commands, which `nft` sends as one netlink transaction: packets see either the
//! rules before it or those after it. The commands are ordered so that nothing is deleted while a rule of the same
//! transaction still refers to it: rules go first, then chains, sets and counters; then what is new, rules last.

use std::collections::BTreeSet;

use husk_overlay::digest;
use husk_overlay::kernel::{Chain, ChainKind, ElementType, Hook, Map, NftTable, Rule, Set, SetElement};
use husk_overlay::marks;
use husk_overlay::prefix::Prefix;
use serde_json::{Value, json};

use super::statements::statements;
use super::{NftChange, maps};

/// Longest rule name that goes into a comment. nft limits a comment to 128 bytes (`NFTNL_UDATA_COMMENT_MAXLEN`); prefix,
/// digest and separators take 22 of them.
const MAX_RULE_NAME: usize = 100;

/// The comment that marks a rule as ours: `husk:<name>:<digest>`, the digest being the first 16 hexadecimal digits of
/// SHA-256 over the compiled statements. A rule whose comment is missing or differs is not the rule we want.
pub(super) fn rule_comment(rule: &Rule) -> String {
    let digest = digest::hex(&["nft-rule", &statements(rule).to_string()]);
    let mut end = rule.name.len().min(MAX_RULE_NAME);
    while !rule.name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}:{}:{}", marks::NFT_TABLE, &rule.name[..end], &digest[..16])
}

/// One transaction that makes all the changes.
pub(super) fn transaction(changes: &[NftChange]) -> Value {
    let mut commands = Commands::default();
    for change in changes {
        commands.change(change);
    }
    json!({ "nftables": commands.in_order() })
}

/// Commands by phase; within a phase in the order they came.
#[derive(Default)]
struct Commands {
    /// Removal of the whole table and its creation.
    tables: Vec<Value>,
    /// Emptying of chains.
    flush: Vec<Value>,
    /// Deletion of chains, then of what rules referred to.
    delete_chains: Vec<Value>,
    delete_objects: Vec<Value>,
    /// Creation of counters, sets, maps, elements and chains.
    add_objects: Vec<Value>,
    delete_elements: Vec<Value>,
    add_elements: Vec<Value>,
    add_chains: Vec<Value>,
    /// Rules.
    add_rules: Vec<Value>,
}

impl Commands {
    fn in_order(self) -> Vec<Value> {
        [
            self.tables,
            self.flush,
            self.delete_chains,
            self.delete_objects,
            self.add_objects,
            self.delete_elements,
            self.add_elements,
            self.add_chains,
            self.add_rules,
        ]
        .concat()
    }

    fn change(&mut self, change: &NftChange) {
        match change {
            NftChange::CreateTable { table } => self.table(table),
            NftChange::ReplaceTable { table, .. } => {
                self.tables.push(delete("table", json!({ "family": "inet", "name": marks::NFT_TABLE })));
                self.table(table);
            }
            NftChange::DeleteTable => {
                self.tables.push(delete("table", json!({ "family": "inet", "name": marks::NFT_TABLE })));
            }
            NftChange::AddCounter { counter } => self.add_objects.push(add("counter", named(counter))),
            NftChange::AddSet { name, set } => self.set(name, set),
            NftChange::ReplaceSet { name, set } => {
                self.delete_objects.push(delete("set", named(name)));
                self.set(name, set);
            }
            NftChange::AddElements { set, elements: new } => self.add_elements.push(add("element", elements(set, new))),
            NftChange::DeleteElements { set, elements: old } => {
                self.delete_elements.push(delete("element", elements(set, old)));
            }
            NftChange::DeleteForeignElements { set, elements: old } => {
                self.delete_elements.push(delete("element", raw_elements(set, old)));
            }
            NftChange::AddMap { name, map } => self.map(name, map),
            NftChange::ReplaceMap { name, map } => {
                self.delete_objects.push(delete("map", named(name)));
                self.map(name, map);
            }
            NftChange::AddMappings { map, elements: new } => {
                self.add_elements.push(add("element", raw_elements(map, &maps::elements(new))));
            }
            NftChange::DeleteMappings { map, elements: old } => {
                self.delete_elements.push(delete("element", raw_elements(map, &maps::elements(old))));
            }
            NftChange::AddChain { name, chain } => self.chain(name, chain),
            NftChange::ReplaceChain { name, chain, .. } => {
                self.flush_chain(name);
                self.delete_chains.push(delete("chain", named(name)));
                self.chain(name, chain);
            }
            NftChange::RebuildChain { name, rules, .. } => {
                self.flush_chain(name);
                self.rules(name, rules);
            }
            NftChange::DeleteChain { name } => {
                self.flush_chain(name);
                self.delete_chains.push(delete("chain", named(name)));
            }
            NftChange::DeleteObject { kind, name } => self.delete_objects.push(delete(kind, named(name))),
        }
    }

    fn table(&mut self, table: &NftTable) {
        self.tables.push(add("table", json!({ "family": "inet", "name": marks::NFT_TABLE })));
        for counter in &table.counters {
            self.add_objects.push(add("counter", named(counter)));
        }
        for (name, set) in &table.sets {
            self.set(name, set);
        }
        for (name, map) in &table.maps {
            self.map(name, map);
        }
        for (name, chain) in &table.chains {
            self.chain(name, chain);
        }
    }

    fn set(&mut self, name: &str, set: &Set) {
        let mut body = named(name);
        body["type"] = element_type(set.element_type);
        if matches!(set.element_type, ElementType::Prefix(_)) {
            body["flags"] = json!(["interval"]);
        }
        self.add_objects.push(add("set", body));
        let wanted = canonical_elements(set);
        if !wanted.is_empty() {
            self.add_elements.push(add("element", elements(name, &wanted)));
        }
    }

    fn map(&mut self, name: &str, map: &Map) {
        let mut body = named(name);
        body["type"] = maps::key_type(map.key);
        body["map"] = json!(maps::value_type(map.value));
        self.add_objects.push(add("map", body));
        if !map.elements.is_empty() {
            self.add_elements.push(add("element", raw_elements(name, &maps::elements(&map.elements))));
        }
    }

    fn flush_chain(&mut self, name: &str) {
        self.flush.push(json!({ "flush": { "chain": named(name) } }));
    }

    fn chain(&mut self, name: &str, chain: &Chain) {
        let mut body = named(name);
        body["type"] = json!(chain_kind_name(chain.kind));
        body["hook"] = json!(hook_name(chain.hook));
        body["prio"] = json!(chain.priority);
        body["policy"] = json!("accept");
        self.add_chains.push(add("chain", body));
        self.rules(name, &chain.rules);
    }

    fn rules(&mut self, chain: &str, rules: &[Rule]) {
        self.add_rules.extend(rules.iter().map(|rule| {
            add(
                "rule",
                json!({
                    "family": "inet", "table": marks::NFT_TABLE, "chain": chain,
                    "comment": rule_comment(rule), "expr": statements(rule),
                }),
            )
        }));
    }
}

fn add(kind: &str, body: Value) -> Value {
    json!({ "add": { kind: body } })
}

fn delete(kind: &str, body: Value) -> Value {
    json!({ "delete": { kind: body } })
}

/// The part that every object of our table has in common.
fn named(name: &str) -> Value {
    json!({ "family": "inet", "table": marks::NFT_TABLE, "name": name })
}

fn elements(set: &str, elements: &BTreeSet<SetElement>) -> Value {
    raw_elements(set, &elements.iter().map(element).collect::<Vec<_>>())
}

fn raw_elements(set: &str, elements: &[Value]) -> Value {
    let mut body = named(set);
    body["elem"] = json!(elements);
    body
}

fn element(element: &SetElement) -> Value {
    match element {
        SetElement::Address(address) => json!(address),
        SetElement::Prefix(it) => prefix(it),
        SetElement::Pair(one, other) => json!({ "concat": [one, other] }),
    }
}

pub(super) fn prefix(prefix: &Prefix) -> Value {
    json!({ "prefix": { "addr": prefix.address(), "len": prefix.length() } })
}

/// The elements in the form in which the kernel shows them: an address in a set of addresses, a prefix in a set of
/// prefixes. A prefix that another one covers is left out, since the kernel refuses overlapping intervals and the set
/// means the same without it.
pub(super) fn canonical_elements(set: &Set) -> BTreeSet<SetElement> {
    let prefixes: BTreeSet<Prefix> = set.elements.iter().filter_map(prefix_of).collect();
    match set.element_type {
        ElementType::Pair(_) => set.elements.clone(),
        ElementType::Address(_) => prefixes
            .into_iter()
            .map(|prefix| {
                let single = prefix.length() == prefix.family().bits();
                if single { SetElement::Address(prefix.address()) } else { SetElement::Prefix(prefix) }
            })
            .collect(),
        ElementType::Prefix(_) => {
            // Sorted by address and then length, a prefix follows every prefix that covers it, and all that lies between
            // them is covered too: comparing with the last one kept is enough.
            let mut kept: Vec<Prefix> = Vec::with_capacity(prefixes.len());
            for prefix in prefixes {
                if kept.last().is_none_or(|last| !last.covers(&prefix)) {
                    kept.push(prefix);
                }
            }
            kept.into_iter().map(SetElement::Prefix).collect()
        }
    }
}

/// The addresses an element covers; a pair covers none.
pub(super) fn prefix_of(element: &SetElement) -> Option<Prefix> {
    match element {
        SetElement::Address(address) => Some(Prefix::host(*address)),
        SetElement::Prefix(prefix) => Some(*prefix),
        SetElement::Pair(..) => None,
    }
}

/// nft's name of the element type, the same with and without flag `interval`.
pub(super) fn element_type(element_type: ElementType) -> Value {
    match element_type {
        ElementType::Address(family) | ElementType::Prefix(family) => json!(maps::address_type(family)),
        ElementType::Pair(family) => json!([maps::address_type(family), maps::address_type(family)]),
    }
}

/// nft's name of a chain type.
pub(super) fn chain_kind_name(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// nft's name of a hook.
pub(super) fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
    }
}
