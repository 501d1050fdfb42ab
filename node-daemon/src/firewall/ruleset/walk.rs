//! The walk of one packet through chains, rule by rule, as the kernel does it; and what the expressions of rules yield for it.

use std::cell::Cell;
use std::net::IpAddr;

use husk_overlay::prefix::Prefix;
use serde_json::{Value, json};

use super::{Key, Packet, Place, Rule, Ruleset, words};

/// Chains that call each other deeper than the kernel lets them (`NFT_JUMP_STACK_SIZE`, include/net/netfilter/nf_tables.h).
const DEEPEST: u8 = 16;

/// ufw's chain that drops what is not for this host (/etc/ufw/before.rules). It tells so by `-m addrtype`, whose arguments nft does
/// not list as JSON.
const UFW_NOT_LOCAL: &str = "ufw-not-local";

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
pub(super) enum Fate {
    GoesOn,
    Accepted,
    Dropped(Place),
}

/// A packet on its way through the chains of one base chain.
pub(super) struct Walk<'a> {
    ruleset: &'a Ruleset,
    packet: &'a Packet,
    hook: &'a str,
    perhaps: Cell<bool>,
}

impl<'a> Walk<'a> {
    /// At the beginning.
    pub(super) fn new(ruleset: &'a Ruleset, packet: &'a Packet, hook: &'a str) -> Self {
        Self { ruleset, packet, hook, perhaps: Cell::new(false) }
    }

    /// What becomes of the packet in a base chain.
    pub(super) fn base(&self, key: &Key) -> Fate {
        self.chain(key, DEEPEST)
    }

    /// Where it is now.
    pub(super) fn place(&self, (family, table, chain): &Key, rule: Option<&Rule>) -> Place {
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
        if key.2 == UFW_NOT_LOCAL && self.is_for_host() {
            return Fate::GoesOn;
        }
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
                            if self.datum(&body["key"]).is_open() {
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

    /// It is for this host itself.
    fn is_for_host(&self) -> bool {
        self.hook == "input" || self.packet.output.as_deref() == Some("")
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
        if let Some(parts) = expression["concat"].as_array() {
            return Datum::Parts(parts.iter().map(|part| self.datum(part)).collect());
        }
        let known = |value: Option<Datum>| value.unwrap_or(Datum::Any);
        let interface = |name: &Option<String>| name.clone().map_or(Datum::Link, Datum::Text);
        // Ours has one, and what asks for it lets all of ours pass or none: which, only the daemon knows.
        let address = |end: Option<IpAddr>| end.map_or(Datum::Unknown, Datum::Address);
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
                // Nor has anybody translated its addresses.
                "status" => Datum::Text(String::new()),
                _ => Datum::Unknown,
            };
        }
        let fib = &expression["fib"];
        // What is for this host itself has one of its addresses (`RTN_LOCAL`), all else goes to single hosts elsewhere.
        if fib["result"] == "type" && (fib["flags"] == "daddr" || fib["flags"] == json!(["daddr"])) {
            return Datum::Text(if self.is_for_host() { "local" } else { "unicast" }.into());
        }
        let payload = &expression["payload"];
        match (payload["protocol"].as_str(), payload["field"].as_str()) {
            (Some("ip"), _) if packet.ipv6 => Datum::None,
            (Some("ip6"), _) if !packet.ipv6 => Datum::None,
            (Some("ip" | "ip6"), Some("saddr")) => address(packet.source),
            (Some("ip" | "ip6"), Some("daddr")) => match packet.destination {
                None if packet.source.is_some() => Datum::Any,
                destination => address(destination),
            },
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
        if let Datum::Parts(parts) = datum {
            let Some(values) = value["concat"].as_array().filter(|it| it.len() == parts.len()) else {
                return Fit::Unknown;
            };
            let fits = parts.iter().zip(values).map(|(part, value)| self.equals(key, part, value));
            return fits.min().unwrap_or(Fit::Unknown);
        }
        let is = match datum {
            Datum::Number(wanted) => in_numbers(*wanted, value),
            Datum::Text(wanted) => value.as_str().map(|text| match text.strip_suffix('*') {
                Some(beginning) => wanted.starts_with(beginning),
                None => wanted == text,
            }),
            Datum::Address(address) => in_addresses(*address, value),
            // Not the loopback device, and more is not known of it.
            Datum::Link => (value == "lo").then_some(false),
            Datum::None | Datum::Any | Datum::Unknown | Datum::Parts(_) => None,
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
    /// The expression is not understood, or what it yields is not known here.
    Unknown,
    /// The name of an interface that is not known here.
    Link,
    Number(u64),
    Text(String),
    Address(IpAddr),
    /// Several things at once, as sets of concatenations have them.
    Parts(Vec<Self>),
}

impl Datum {
    /// It, or a part of it, is not understood or not known.
    fn is_open(&self) -> bool {
        match self {
            Self::Unknown | Self::Link => true,
            Self::Parts(parts) => parts.iter().any(Self::is_open),
            _ => false,
        }
    }
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
