//! A rule's statements as the JSON of libnftables-json(5).

use std::net::IpAddr;

use husk_overlay::kernel::{Match, MatchKey, MatchOperator, MatchValue, Rule, Statement};
use husk_overlay::prefix::Family;
use serde_json::{Value, json};

use super::compile::prefix;
use super::maps;

/// Octets of an ICMP error before the packet that it quotes (RFC 792, RFC 4443 section 3).
const ICMP_HEADER: u32 = 8;

/// Where in a UDP header the destination port is (RFC 768).
const UDP_DESTINATION: u32 = 2;

/// The DF bit in the field of an IPv4 header that holds flags and fragment offset (RFC 791 section 3.1).
const DONT_FRAGMENT: u32 = 0x4000;

/// What a rule asks and does, in order.
pub(super) fn statements(rule: &Rule) -> Value {
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
