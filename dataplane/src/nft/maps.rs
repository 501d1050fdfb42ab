//! Maps in the JSON of libnftables-json(5): keys are concatenations, an element is a list of key and value.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::kernel::{Addressee, MapKeyType, MapValue, MapValueType};
use husk_overlay::port_mapping::TransportProtocol;
use husk_overlay::prefix::Family;
use serde::Serializer;
use serde_json::{Value, json};

use super::NftChange;
use super::statements::{address_field, meta, payload};

/// nft's name of a type of addresses.
pub(super) fn address_type(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ipv4_addr",
        Family::Ipv6 => "ipv6_addr",
    }
}

/// nft's names of the types that a key consists of.
pub(super) fn key_type(key: MapKeyType) -> Value {
    match key {
        MapKeyType::Port => json!(["inet_proto", "inet_service"]),
        MapKeyType::AddressAndPort(family) => json!([address_type(family), "inet_proto", "inet_service"]),
    }
}

/// nft's name of a type of values.
pub(super) fn value_type(value: MapValueType) -> &'static str {
    match value {
        MapValueType::Address(family) => address_type(family),
        MapValueType::Port => "inet_service",
    }
}

/// The key of a packet, as an expression. The port lies at the same place in all transport headers (`th`); a protocol
/// without ports is no key of any map.
pub(super) fn key(key: MapKeyType) -> Value {
    let (protocol, port) = (meta("l4proto"), payload("th", "dport"));
    match key {
        MapKeyType::Port => json!({ "concat": [protocol, port] }),
        MapKeyType::AddressAndPort(family) => json!({ "concat": [address_field(family, "daddr"), protocol, port] }),
    }
}

/// Elements as nft takes and prints them, but for the protocol: numbers do not depend on `/etc/protocols`.
pub(super) fn elements(elements: &BTreeMap<Addressee, MapValue>) -> Vec<Value> {
    let element = |(key, value): (&Addressee, &MapValue)| {
        let mut parts: Vec<Value> = key.address.iter().map(|address| json!(address)).collect();
        parts.extend([json!(key.protocol.number()), json!(key.port)]);
        let value = match value {
            MapValue::Address(address) => json!(address),
            MapValue::Port(port) => json!(port),
        };
        json!([{ "concat": parts }, value])
    };
    elements.iter().map(element).collect()
}

/// An element of a form Husk writes.
pub(super) fn parse(element: &Value) -> Option<(Addressee, MapValue)> {
    let [key, value] = element.as_array()?.as_slice() else { return None };
    let (address, protocol, port) = match key.get("concat")?.as_array()?.as_slice() {
        [protocol, port] => (None, protocol, port),
        [address, protocol, port] => (Some(parse_address(address)?), protocol, port),
        _ => return None,
    };
    let key = Addressee { address, protocol: parse_protocol(protocol)?, port: parse_port(port)? };
    let value = match value {
        Value::Number(_) => MapValue::Port(parse_port(value)?),
        _ => MapValue::Address(parse_address(value)?),
    };
    Some((key, value))
}

fn parse_address(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn parse_port(value: &Value) -> Option<u16> {
    value.as_u64()?.try_into().ok()
}

/// A protocol, which is printed as a number where `/etc/protocols` does not name it.
fn parse_protocol(value: &Value) -> Option<TransportProtocol> {
    let is = |protocol: &TransportProtocol| match value {
        Value::String(name) => name == protocol.name(),
        other => other.as_u64() == Some(protocol.number().into()),
    };
    TransportProtocol::ALL.into_iter().find(is)
}

/// The elements of `wanted` that `present` lacks or has with another value.
pub(super) fn missing_from(
    present: &BTreeMap<Addressee, MapValue>,
    wanted: &BTreeMap<Addressee, MapValue>,
) -> BTreeMap<Addressee, MapValue> {
    let missing = wanted.iter().filter(|(key, value)| present.get(key) != Some(value));
    missing.map(|(key, value)| (*key, *value)).collect()
}

/// The elements that are added, by map.
pub(super) fn replaced_elements(changes: &[NftChange]) -> BTreeSet<(String, Addressee)> {
    let mut added = BTreeSet::new();
    for change in changes {
        if let NftChange::AddMappings { map, elements } = change {
            added.extend(elements.keys().map(|key| (map.clone(), *key)));
        }
    }
    added
}

/// The changes without those that take away elements of maps that nothing takes the place of.
#[must_use]
pub fn without_removed_mappings(changes: Vec<NftChange>) -> Vec<NftChange> {
    let replaced = replaced_elements(&changes);
    let kept = changes.into_iter().filter_map(|change| match change {
        NftChange::DeleteMappings { map, mut elements } => {
            // The kernel takes no second element with the same key.
            elements.retain(|key, _| replaced.contains(&(map.clone(), *key)));
            (!elements.is_empty()).then_some(NftChange::DeleteMappings { map, elements })
        }
        other => Some(other),
    });
    kept.collect()
}

/// Serializes a map whose keys are structures as a list of pairs.
pub(super) fn serialize_elements<S: Serializer>(
    elements: &BTreeMap<Addressee, MapValue>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(elements)
}
