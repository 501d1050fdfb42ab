//! The rules of others, and what becomes of a packet that meets them: `nft -j list ruleset` (libnftables-json(5), schema
//! version 1), walked as the kernel does.
//!
//! nftables asks every base chain of a hook in turn, and one refusal is final. So each chain is walked by itself, and only what it
//! drops counts. What cannot be understood, such as a match of an iptables extension, is never taken for a match; where it stands
//! before an acceptance, what is dropped behind it is dropped perhaps.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::marks;
use husk_overlay::prefix::Prefix;
use serde_json::Value;

/// Chains that call each other deeper than the kernel lets them (`NFT_JUMP_STACK_SIZE`, include/net/netfilter/nf_tables.h).
const DEEPEST: u8 = 16;

/// A packet of ours, as far as it is known; what is none may be anything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Packet {
    /// Hooks that it passes, as nft names them.
    pub(super) hooks: Vec<&'static str>,
    /// True for IPv6.
    pub(super) ipv6: bool,
    /// Interface it came by. Empty for packets of the host's own.
    pub(super) input: Option<String>,
    /// Interface it leaves by. Empty for packets for the host itself.
    pub(super) output: Option<String>,
    /// Source.
    pub(super) source: Option<IpAddr>,
    /// Destination.
    pub(super) destination: Option<IpAddr>,
    /// IANA protocol number.
    pub(super) protocol: Option<u8>,
    /// Destination port.
    pub(super) port: Option<u16>,
}

/// Where a packet is dropped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Family as nft names it.
    pub(super) family: String,
    /// Table.
    pub(super) table: String,
    /// Chain.
    pub(super) chain: String,
    /// Hook of the base chain that leads there.
    pub(super) hook: String,
    /// Handle and text of the rule; none for the policy of the chain.
    pub(super) rule: Option<(u64, String)>,
    /// An acceptance that could not be understood stands before it.
    pub(super) perhaps: bool,
}

/// Tables of others.
#[derive(Debug, Default)]
pub(in crate::doctor) struct Ruleset {
    chains: BTreeMap<Key, Chain>,
    sets: BTreeMap<Key, Vec<Value>>,
}

/// Family, table and name.
type Key = (String, String, String);

#[derive(Debug, Default)]
struct Chain {
    hook: Option<String>,
    /// Its type is `filter`: others see the first packet of a connection only, and are not for dropping.
    filters: bool,
    drops: bool,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    handle: u64,
    statements: Vec<Value>,
}

/// How far something fits a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    No,
    /// Some packets of ours, not all.
    Some,
    /// It cannot be told.
    Unknown,
    Yes,
}

/// What a chain does with a packet.
enum Fate {
    GoesOn,
    Accepted,
    Dropped(Place),
}

impl Ruleset {
    /// From a listing; what is not understood of it is left out.
    pub(in crate::doctor) fn parse(listing: &Value) -> Self {
        let mut ruleset = Self::default();
        let objects = listing["nftables"].as_array().into_iter().flatten().filter_map(Value::as_object).flatten();
        for (kind, body) in objects {
            let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
            let (family, table) = (text("family"), text("table"));
            let ours = family == "inet" && [marks::NFT_TABLE, marks::NFT_POLICY_TABLE].contains(&table.as_str());
            // Bridges and devices have hooks of the same name, which routed packets do not meet.
            if ours || !matches!(family.as_str(), "ip" | "ip6" | "inet") {
                continue;
            }
            match kind.as_str() {
                "chain" => {
                    let chain = ruleset.chains.entry((family, table, text("name"))).or_default();
                    chain.hook = body["hook"].as_str().map(str::to_owned);
                    chain.filters = body["type"] == "filter";
                    chain.drops = body["policy"] == "drop";
                }
                "rule" => {
                    let rule = Rule {
                        handle: body["handle"].as_u64().unwrap_or_default(),
                        statements: body["expr"].as_array().cloned().unwrap_or_default(),
                    };
                    ruleset.chains.entry((family, table, text("chain"))).or_default().rules.push(rule);
                }
                "set" | "map" => {
                    let elements = body["elem"].as_array().cloned().unwrap_or_default();
                    ruleset.sets.insert((family, table, text("name")), elements);
                }
                _ => {}
            }
        }
        ruleset
    }

    /// Tables by family and name.
    pub(super) fn tables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chains.keys().map(|(family, table, _)| (family.as_str(), table.as_str()))
    }

    /// Names of all chains with their table.
    pub(in crate::doctor) fn chains(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.chains.keys().map(|(family, table, chain)| (family.as_str(), table.as_str(), chain.as_str()))
    }

    /// Base chains.
    pub(super) fn base_chains(&self) -> usize {
        self.chains.values().filter(|chain| chain.hook.is_some()).count()
    }

    /// Everywhere a packet is dropped.
    pub(super) fn drops(&self, packet: &Packet) -> Vec<Place> {
        let bases = self.chains.iter().filter(|(key, chain)| {
            let hook = chain.hook.as_deref().is_some_and(|hook| packet.hooks.contains(&hook));
            let family = match key.0.as_str() {
                "ip" => !packet.ipv6,
                "ip6" => packet.ipv6,
                _ => true,
            };
            hook && family && chain.filters
        });
        let mut places = Vec::new();
        for (key, chain) in bases {
            let hook = chain.hook.as_deref().unwrap_or_default();
            let walk = Walk { ruleset: self, packet, hook, perhaps: Cell::new(false) };
            match walk.chain(key, DEEPEST) {
                Fate::Dropped(place) => places.push(place),
                Fate::GoesOn if chain.drops => places.push(walk.place(key, None)),
                Fate::GoesOn | Fate::Accepted => {}
            }
        }
        places
    }
}

struct Walk<'a> {
    ruleset: &'a Ruleset,
    packet: &'a Packet,
    hook: &'a str,
    perhaps: Cell<bool>,
}

impl Walk<'_> {
    fn place(&self, (family, table, chain): &Key, rule: Option<&Rule>) -> Place {
        Place {
            family: family.clone(),
            table: table.clone(),
            chain: chain.clone(),
            hook: self.hook.to_owned(),
            rule: rule.map(|rule| (rule.handle, words(&rule.statements))),
            perhaps: self.perhaps.get(),
        }
    }

    fn chain(&self, key: &Key, depth: u8) -> Fate {
        let Some(chain) = self.ruleset.chains.get(key).filter(|_| depth > 0) else { return Fate::GoesOn };
        for rule in &chain.rules {
            let mut fit = Fit::Yes;
            for statement in &rule.statements {
                let Some((kind, body)) = statement.as_object().and_then(|object| object.iter().next()) else {
                    continue;
                };
                let verdict = match kind.as_str() {
                    "match" => {
                        fit = fit.min(self.fit(key, body));
                        if fit == Fit::No {
                            break;
                        }
                        continue;
                    }
                    "limit" | "quota" | "xt" | "connlimit" => {
                        fit = fit.min(Fit::Unknown);
                        continue;
                    }
                    "vmap" => match self.look_up(key, body) {
                        Some((found, verdict)) => {
                            fit = fit.min(found);
                            verdict
                        }
                        None => {
                            if matches!(self.datum(&body["key"]), Datum::Unknown) {
                                self.perhaps.set(true);
                            }
                            break;
                        }
                    },
                    _ => statement,
                };
                let Some((kind, body)) = verdict.as_object().and_then(|object| object.iter().next()) else { continue };
                match (kind.as_str(), fit) {
                    ("drop" | "reject", Fit::Yes) => return Fate::Dropped(self.place(key, Some(rule))),
                    ("accept" | "queue", Fit::Yes) => return Fate::Accepted,
                    ("return", Fit::Yes) => return Fate::GoesOn,
                    ("jump" | "goto", Fit::Yes) => {
                        let target = (key.0.clone(), key.1.clone(), body["target"].as_str().unwrap_or_default().into());
                        match self.chain(&target, depth - 1) {
                            Fate::GoesOn if kind == "jump" => break,
                            fate => return fate,
                        }
                    }
                    // Whoever fits it only perhaps may have been accepted here, or have been sent round what follows.
                    ("accept" | "queue" | "return" | "jump" | "goto", Fit::Unknown) => {
                        self.perhaps.set(true);
                        break;
                    }
                    ("drop" | "reject" | "accept" | "queue" | "return" | "jump" | "goto", _) => break,
                    _ => {}
                }
            }
        }
        Fate::GoesOn
    }

    /// The verdict of a verdict map for the packet.
    fn look_up<'v>(&'v self, key: &Key, body: &'v Value) -> Option<(Fit, &'v Value)> {
        let elements = match &body["data"] {
            Value::String(name) => self.named(key, name)?,
            data => data["set"].as_array()?.as_slice(),
        };
        let datum = self.datum(&body["key"]);
        let pair = |element: &'v Value| Some((element.get(0)?, element.get(1)?));
        elements.iter().filter_map(pair).find_map(|(value, verdict)| {
            let fit = self.equals(key, &datum, value);
            (fit == Fit::Yes).then_some((fit, verdict))
        })
    }

    fn named(&self, key: &Key, name: &str) -> Option<&[Value]> {
        let set = (key.0.clone(), key.1.clone(), name.trim_start_matches('@').to_owned());
        self.ruleset.sets.get(&set).map(Vec::as_slice)
    }

    fn fit(&self, key: &Key, body: &Value) -> Fit {
        let datum = self.datum(&body["left"]);
        let equal = self.equals(key, &datum, &body["right"]);
        match body["op"].as_str() {
            Some("==" | "in") => equal,
            Some("!=") => match equal {
                Fit::Yes => Fit::No,
                Fit::No => Fit::Yes,
                other => other,
            },
            _ => match datum {
                Datum::Any => Fit::Some,
                Datum::None => Fit::No,
                _ => Fit::Unknown,
            },
        }
    }

    /// What an expression yields for the packet.
    fn datum(&self, expression: &Value) -> Datum {
        let packet = self.packet;
        let known = |value: Option<Datum>| value.unwrap_or(Datum::Any);
        let interface = |name: &Option<String>| known(name.clone().map(Datum::Text));
        if let Some(meta) = expression["meta"]["key"].as_str() {
            return match meta {
                "iifname" | "iif" => interface(&packet.input),
                "oifname" | "oif" if self.hook == "prerouting" || self.hook == "input" => Datum::Text(String::new()),
                "oifname" | "oif" => interface(&packet.output),
                "l4proto" => known(packet.protocol.map(|number| Datum::Number(number.into()))),
                "nfproto" => Datum::Text(if packet.ipv6 { "ipv6" } else { "ipv4" }.into()),
                "protocol" => Datum::Text(if packet.ipv6 { "ip6" } else { "ip" }.into()),
                "pkttype" => Datum::Text("host".into()),
                _ => Datum::Unknown,
            };
        }
        if let Some(ct) = expression["ct"]["key"].as_str() {
            return match ct {
                // The first packet of a connection: those that follow are let pass by whoever let pass this one.
                "state" => Datum::Text("new".into()),
                "direction" => Datum::Text("original".into()),
                _ => Datum::Unknown,
            };
        }
        let payload = &expression["payload"];
        match (payload["protocol"].as_str(), payload["field"].as_str()) {
            (Some("ip"), _) if packet.ipv6 => Datum::None,
            (Some("ip6"), _) if !packet.ipv6 => Datum::None,
            (Some("ip" | "ip6"), Some("saddr")) => known(packet.source.map(Datum::Address)),
            (Some("ip" | "ip6"), Some("daddr")) => known(packet.destination.map(Datum::Address)),
            (Some("ip"), Some("protocol")) | (Some("ip6"), Some("nexthdr")) => {
                known(packet.protocol.map(|number| Datum::Number(number.into())))
            }
            (
                Some(name @ ("udp" | "tcp" | "sctp" | "dccp" | "udplite" | "esp" | "ah" | "icmp" | "icmpv6" | "th")),
                field,
            ) => {
                let Some(protocol) = packet.protocol else { return Datum::Any };
                if name != "th" && number(name) != Some(protocol.into()) {
                    return Datum::None;
                }
                match field {
                    Some("dport") => known(packet.port.map(|port| Datum::Number(port.into()))),
                    _ => Datum::Any,
                }
            }
            _ => Datum::Unknown,
        }
    }

    fn equals(&self, key: &Key, datum: &Datum, value: &Value) -> Fit {
        match datum {
            Datum::None => return Fit::No,
            Datum::Any => return Fit::Some,
            Datum::Unknown => return Fit::Unknown,
            _ => {}
        }
        let any = |values: &[Value]| values.iter().map(|value| self.equals(key, datum, value)).max().unwrap_or(Fit::No);
        if let Some(values) = value.as_array() {
            return any(values);
        }
        if let Some(values) = value["set"].as_array() {
            return any(values);
        }
        // An element with a timeout, a counter or a comment.
        if !value["elem"]["val"].is_null() {
            return self.equals(key, datum, &value["elem"]["val"]);
        }
        if let Some(name) = value.as_str().filter(|name| name.starts_with('@')) {
            return self.named(key, name).map_or(Fit::Unknown, any);
        }
        let is = match datum {
            Datum::Number(wanted) => in_numbers(*wanted, value),
            Datum::Text(wanted) => value.as_str().map(|text| match text.strip_suffix('*') {
                Some(beginning) => wanted.starts_with(beginning),
                None => wanted == text,
            }),
            Datum::Address(address) => in_addresses(*address, value),
            Datum::None | Datum::Any | Datum::Unknown => None,
        };
        match is {
            Some(true) => Fit::Yes,
            Some(false) => Fit::No,
            None => Fit::Unknown,
        }
    }
}

/// What an expression yields.
enum Datum {
    /// The packet has no such thing.
    None,
    /// It may be anything.
    Any,
    /// The expression is not understood.
    Unknown,
    Number(u64),
    Text(String),
    Address(IpAddr),
}

fn in_numbers(wanted: u64, value: &Value) -> Option<bool> {
    if let Some(bounds) = value["range"].as_array() {
        let bound = |at: usize| bounds.get(at).and_then(single_number);
        return Some((bound(0)?..=bound(1)?).contains(&wanted));
    }
    Some(single_number(value)? == wanted)
}

fn single_number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| number(value.as_str()?))
}

/// IANA protocol numbers by the names nft prints.
fn number(name: &str) -> Option<u64> {
    Some(match name {
        "icmp" => 1,
        "tcp" => 6,
        "udp" => 17,
        "dccp" => 33,
        "esp" => 50,
        "ah" => 51,
        "ipv6-icmp" | "icmpv6" => 58,
        "sctp" => 132,
        "udplite" => 136,
        other => other.parse().ok()?,
    })
}

fn in_addresses(address: IpAddr, value: &Value) -> Option<bool> {
    let parse = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
    let prefix = &value["prefix"];
    if let Some(length) = prefix["len"].as_u64() {
        let prefix = Prefix::containing(parse(&prefix["addr"])?, u8::try_from(length).ok()?).ok()?;
        return Some(prefix.contains(address));
    }
    if let Some(bounds) = value["range"].as_array() {
        return Some((parse(bounds.first()?)?..=parse(bounds.get(1)?)?).contains(&address));
    }
    Some(parse(value)? == address)
}

/// A rule in words close to nft's, short.
fn words(statements: &[Value]) -> String {
    const MOST: usize = 160;
    let mut parts = Vec::new();
    for (kind, body) in statements.iter().filter_map(Value::as_object).flatten() {
        match kind.as_str() {
            "match" => {
                let op = body["op"].as_str().filter(|op| !matches!(*op, "==" | "in"));
                parts.extend([
                    Some(expression(&body["left"])),
                    op.map(str::to_owned),
                    Some(expression(&body["right"])),
                ]);
            }
            "counter" => {}
            "jump" | "goto" => parts.push(Some(format!("{kind} {}", body["target"].as_str().unwrap_or_default()))),
            "xt" => parts.push(Some(format!("[iptables {}]", body["name"].as_str().unwrap_or("extension")))),
            other => parts.push(Some(other.to_owned())),
        }
    }
    let text = parts.into_iter().flatten().collect::<Vec<_>>().join(" ");
    if text.chars().count() > MOST { text.chars().take(MOST).chain(['…']).collect() } else { text }
}

fn expression(value: &Value) -> String {
    let list = |values: &[Value]| format!("{{ {} }}", values.iter().map(expression).collect::<Vec<_>>().join(", "));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => list(values),
        Value::Object(object) => match object.iter().next() {
            Some((kind, body)) => match kind.as_str() {
                "payload" => format!("{} {}", text(&body["protocol"]), text(&body["field"])),
                "meta" => text(&body["key"]),
                "ct" => format!("ct {}", text(&body["key"])),
                "prefix" => format!("{}/{}", text(&body["addr"]), body["len"]),
                "set" => list(body.as_array().map(Vec::as_slice).unwrap_or_default()),
                "range" => format!("{}-{}", expression(&body[0]), expression(&body[1])),
                other => other.to_owned(),
            },
            None => String::new(),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
#[path = "ruleset_tests.rs"]
mod tests;
