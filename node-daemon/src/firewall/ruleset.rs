//! The rules of others, and what becomes of a packet that meets them: `nft -j list ruleset` (libnftables-json(5), schema
//! version 1), walked as the kernel does.
//!
//! nftables asks every base chain of a hook in turn, and one refusal is final. So each chain is walked by itself, and only what it
//! drops counts. What cannot be understood, such as a match of an iptables extension, is never taken for a match; where it stands
//! before an acceptance, what is dropped behind it is dropped perhaps.

mod walk;

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::marks;
use serde_json::Value;

use self::walk::{Fate, Walk};

/// A packet of ours. Protocol and port that are none may be anything; an interface or address that is none is one that is not known
/// here, without the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Packet {
    /// Hooks that it passes, as nft names them.
    pub(crate) hooks: Vec<&'static str>,
    /// True for IPv6.
    pub(crate) ipv6: bool,
    /// Interface it came by. Empty for packets of the host's own.
    pub(crate) input: Option<String>,
    /// Interface it leaves by. Empty for packets for the host itself.
    pub(crate) output: Option<String>,
    /// Source.
    pub(crate) source: Option<IpAddr>,
    /// Destination. One that is none while the source is known may be anything, too: a rule that asks for one means some of the packets.
    pub(crate) destination: Option<IpAddr>,
    /// IANA protocol number.
    pub(crate) protocol: Option<u8>,
    /// Destination port.
    pub(crate) port: Option<u16>,
}

/// Where a packet is dropped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Place {
    /// Family as nft names it.
    pub(crate) family: String,
    /// Table.
    pub(crate) table: String,
    /// Chain.
    pub(crate) chain: String,
    /// Hook of the base chain that leads there.
    pub(crate) hook: String,
    /// Handle and text of the rule; none for the policy of the chain.
    pub(crate) rule: Option<(u64, String)>,
    /// An acceptance that could not be understood stands before it.
    pub(crate) perhaps: bool,
}

/// Tables of others.
#[derive(Debug, Default)]
pub(crate) struct Ruleset {
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

impl Ruleset {
    /// From a listing; what is not understood of it is left out.
    pub(crate) fn parse(listing: &Value) -> Self {
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
    pub(crate) fn tables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chains.keys().map(|(family, table, _)| (family.as_str(), table.as_str()))
    }

    /// Names of all chains with their table.
    pub(crate) fn chains(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.chains.keys().map(|(family, table, chain)| (family.as_str(), table.as_str(), chain.as_str()))
    }

    /// Base chains.
    pub(crate) fn base_chains(&self) -> usize {
        self.chains.values().filter(|chain| chain.hook.is_some()).count()
    }

    /// Everywhere a packet is dropped.
    pub(crate) fn drops(&self, packet: &Packet) -> Vec<Place> {
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
            let walk = Walk::new(self, packet, hook);
            match walk.base(key) {
                Fate::Dropped(place) => places.push(place),
                Fate::GoesOn if chain.drops => places.push(walk.place(key, None)),
                Fate::GoesOn | Fate::Accepted => {}
            }
        }
        places
    }
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
