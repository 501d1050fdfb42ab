//! From the typed model to the JSON of libnftables-json(5).
//!
//! A list of changes becomes one list of commands, which `nft` sends as one netlink transaction: packets see either the
//! rules before it or those after it. The commands are ordered so that nothing is deleted while a rule of the same
//! transaction still refers to it: rules go first, then chains, sets and counters; then what is new, rules last.

use std::collections::BTreeSet;
use std::net::IpAddr;

use husk_overlay::digest;
use husk_overlay::kernel::{
    Chain, ChainKind, ElementType, Hook, Map, Match, MatchKey, MatchOperator, MatchValue, NftTable, Rule, Set,
    SetElement, Statement,
};
use husk_overlay::marks;
use husk_overlay::prefix::{Family, Prefix};
use serde_json::{Value, json};

use super::{NftChange, maps};

/// Longest rule name that goes into a comment. nft limits a comment to 128 bytes (`NFTNL_UDATA_COMMENT_MAXLEN`); prefix,
/// digest and separators take 22 of them.
const MAX_RULE_NAME: usize = 100;

/// Octets of an ICMP error before the packet that it quotes (RFC 792, RFC 4443 section 3).
const ICMP_HEADER: u32 = 8;

/// Where in a UDP header the destination port is (RFC 768).
const UDP_DESTINATION: u32 = 2;

/// The DF bit in the field of an IPv4 header that holds flags and fragment offset (RFC 791 section 3.1).
const DONT_FRAGMENT: u32 = 0x4000;

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

fn prefix(prefix: &Prefix) -> Value {
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

fn statements(rule: &Rule) -> Value {
    rule.statements.iter().map(statement).collect()
}

fn statement(statement: &Statement) -> Value {
    match statement {
        Statement::Match(it) => match_statement(it),
        Statement::Counter(name) => json!({ "counter": name }),
        Statement::Accept => json!({ "accept": null }),
        Statement::Drop => json!({ "drop": null }),
        Statement::Masquerade => json!({ "masquerade": { "flags": ["random", "fully-random"] } }),
        Statement::TranslateSource(address) => {
            let family = match address {
                IpAddr::V4(_) => "ip",
                IpAddr::V6(_) => "ip6",
            };
            json!({ "snat": { "family": family, "addr": address, "flags": ["random", "fully-random"] } })
        }
        Statement::TranslateDestination { family, key, addresses, ports } => {
            let family = match family {
                Family::Ipv4 => "ip",
                Family::Ipv6 => "ip6",
            };
            let found = |map: &str| json!({ "map": { "key": maps::key(*key), "data": format!("@{map}") } });
            json!({ "dnat": { "family": family, "addr": found(addresses), "port": found(ports) } })
        }
        Statement::ClampMss => json!({ "mangle": {
            "key": { "tcp option": { "name": "maxseg", "field": "size" } },
            "value": { "rt": { "key": "mtu" } },
        } }),
        // nft knows the field as one of 16 bits.
        Statement::DontFragment => json!({ "mangle": { "key": payload("ip", "frag-off"), "value": DONT_FRAGMENT } }),
    }
}

fn match_statement(it: &Match) -> Value {
    let operator = match it.operator {
        MatchOperator::Equal => "==",
        MatchOperator::NotEqual => "!=",
        MatchOperator::Less => "<",
        MatchOperator::Greater => ">",
    };
    json!({ "match": { "op": operator, "left": left(it), "right": right(&it.value) } })
}

fn left(it: &Match) -> Value {
    match it.key {
        MatchKey::InputInterface => meta("iifname"),
        MatchKey::OutputInterface => meta("oifname"),
        MatchKey::Source(family) => address_field(family, "saddr"),
        MatchKey::Destination(family) => address_field(family, "daddr"),
        MatchKey::AddressPair(family) => {
            json!({ "concat": [address_field(family, "saddr"), address_field(family, "daddr")] })
        }
        MatchKey::DestinationKind => json!({ "fib": { "result": "type", "flags": ["daddr"] } }),
        MatchKey::Protocol => meta("l4proto"),
        MatchKey::Length => meta("length"),
        MatchKey::UdpSourcePort => payload("udp", "sport"),
        MatchKey::UdpDestinationPort => payload("udp", "dport"),
        MatchKey::TcpDestinationPort => payload("tcp", "dport"),
        MatchKey::IcmpType(Family::Ipv4) => payload("icmp", "type"),
        MatchKey::IcmpType(Family::Ipv6) => payload("icmpv6", "type"),
        MatchKey::IcmpCode => raw(1, 1),
        MatchKey::IcmpMtu(Family::Ipv4) => raw(6, 2),
        MatchKey::IcmpMtu(Family::Ipv6) => raw(4, 4),
        MatchKey::ConnectionState => json!({ "ct": { "key": "state" } }),
        MatchKey::ConnectionSource(family) => connection(family, "saddr"),
        MatchKey::ConnectionDestination(family) => connection(family, "daddr"),
        MatchKey::QuotedProtocol(family) => raw(ICMP_HEADER + protocol_offset(family), 1),
        MatchKey::QuotedUdpDestinationPort(family) => raw(ICMP_HEADER + header_length(family) + UDP_DESTINATION, 2),
        MatchKey::TcpSynRst => json!({ "&": [payload("tcp", "flags"), ["syn", "rst"]] }),
        MatchKey::ReversePathInterface => {
            // An interface is compared by name, since one of that name need not exist yet; a look-up that found nothing is
            // interface index 0, for which `false` stands.
            let result = if matches!(it.value, MatchValue::Present | MatchValue::Missing) { "oif" } else { "oifname" };
            json!({ "fib": { "result": result, "flags": ["saddr", "iif"] } })
        }
        MatchKey::NetworkFamily => meta("nfproto"),
        MatchKey::Decrypted => meta("ipsec"),
        MatchKey::Transformation => json!({ "rt": { "key": "ipsec" } }),
    }
}

/// An address of the first packet of a connection.
fn connection(family: Family, field: &str) -> Value {
    let family = match family {
        Family::Ipv4 => "ip",
        Family::Ipv6 => "ip6",
    };
    json!({ "ct": { "key": format!("{family} {field}"), "dir": "original" } })
}

pub(super) fn meta(key: &str) -> Value {
    json!({ "meta": { "key": key } })
}

pub(super) fn payload(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

/// Octets of the layer 4 header, and behind it, from an offset on.
fn raw(offset: u32, length: u32) -> Value {
    json!({ "payload": { "base": "th", "offset": offset * 8, "len": length * 8 } })
}

/// Where an IP header names the next one (RFC 791 section 3.1, RFC 8200 section 3).
fn protocol_offset(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 9,
        Family::Ipv6 => 6,
    }
}

/// Octets of an IP header without options or extensions (same sections).
fn header_length(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 20,
        Family::Ipv6 => 40,
    }
}

pub(super) fn address_field(family: Family, field: &str) -> Value {
    match family {
        Family::Ipv4 => payload("ip", field),
        Family::Ipv6 => payload("ip6", field),
    }
}

fn right(value: &MatchValue) -> Value {
    match value {
        MatchValue::Text(it) => text(it),
        MatchValue::AnyOf(all) => json!({ "set": all.iter().map(|it| text(it)).collect::<Vec<_>>() }),
        MatchValue::Number(number) => json!(number),
        MatchValue::Set(name) => json!(format!("@{name}")),
        MatchValue::Prefix(prefix) => {
            json!({ "prefix": { "addr": prefix.address().to_string(), "len": prefix.length() } })
        }
        MatchValue::Present => json!(true),
        MatchValue::Missing => json!(false),
        MatchValue::Family(Family::Ipv4) => json!("ipv4"),
        MatchValue::Family(Family::Ipv6) => json!("ipv6"),
    }
}

/// A prefix is an object of its own in nft's JSON; every other text stands for itself.
fn text(text: &str) -> Value {
    text.parse().map_or_else(|_| json!(text), |it| prefix(&it))
}
