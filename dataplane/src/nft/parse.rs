//! From nft's JSON (libnftables-json(5), schema version 1) to [`NftState`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::kernel::SetElement;
use husk_overlay::marks;
use husk_overlay::prefix::Prefix;
use serde_json::Value;

use super::{ActualChain, ActualMap, ActualSet, ChainSpec, MapSpec, NftState, SetSpec, maps};
use crate::error::Error;

/// The objects of a listing as kind and body, in order.
pub(super) fn objects(listing: &Value) -> Result<Vec<(&str, &Value)>, Error> {
    let list = listing["nftables"].as_array().ok_or_else(|| malformed("there is no list `nftables`"))?;
    Ok(list.iter().filter_map(Value::as_object).flatten().map(|(kind, body)| (kind.as_str(), body)).collect())
}

/// What a listing of the table says; whether the table is dormant, it does not.
pub(super) fn state(listing: &Value) -> Result<NftState, Error> {
    let mut state = NftState::default();
    let mut found = false;
    // Rules are listed behind all chains, but relying on that would turn another order into lost rules.
    let mut rules: Vec<(&str, Option<String>)> = Vec::new();
    for (kind, body) in objects(listing)? {
        match kind {
            "metainfo" => {}
            "table" => found = true,
            "counter" => {
                state.counters.insert(name(body)?.to_owned());
            }
            "set" => {
                state.sets.insert(name(body)?.to_owned(), set(body));
            }
            "map" => {
                state.maps.insert(name(body)?.to_owned(), map(body));
            }
            "chain" => {
                state.chains.insert(name(body)?.to_owned(), ActualChain { spec: chain_spec(body), rules: Vec::new() });
            }
            "rule" => {
                let chain = body["chain"].as_str().ok_or_else(|| malformed("a rule without a chain"))?;
                rules.push((chain, body["comment"].as_str().map(str::to_owned)));
            }
            // Elements of a map or set that nft may list on their own belong to an object that is listed, too.
            "element" => {}
            other => state.foreign.push((other.to_owned(), name(body)?.to_owned())),
        }
    }
    if !found {
        return Err(malformed("the table is not in its own listing"));
    }
    for (chain, comment) in rules {
        let chain = state.chains.get_mut(chain).ok_or_else(|| malformed("a rule of a chain that is not listed"))?;
        chain.rules.push(comment);
    }
    Ok(state)
}

fn name(body: &Value) -> Result<&str, Error> {
    body["name"].as_str().ok_or_else(|| malformed("an object without a name"))
}

fn chain_spec(body: &Value) -> ChainSpec {
    let text = |key: &str| body[key].as_str().map(str::to_owned);
    ChainSpec { kind: text("type"), hook: text("hook"), priority: body["prio"].as_i64(), policy: text("policy") }
}

/// Flags of a set or map.
fn flags(body: &Value) -> BTreeSet<String> {
    let mut flags = strings(&body["flags"]);
    // Properties that nft prints apart from the flags change what the set accepts and are never ours either.
    flags.extend(
        ["timeout", "gc-interval", "size", "auto-merge"]
            .into_iter()
            .filter(|key| body[key].is_number() || body[key].as_bool() == Some(true))
            .map(str::to_owned),
    );
    flags
}

fn map(body: &Value) -> ActualMap {
    let key = SetSpec { kind: body["type"].clone(), flags: flags(body) };
    let mut map =
        ActualMap { spec: MapSpec { key, value: body["map"].clone() }, elements: BTreeMap::new(), foreign: Vec::new() };
    for value in body["elem"].as_array().into_iter().flatten() {
        match maps::parse(value) {
            Some((key, value)) => {
                map.elements.insert(key, value);
            }
            None => map.foreign.push(value.clone()),
        }
    }
    map
}

fn set(body: &Value) -> ActualSet {
    let flags = flags(body);
    let interval = flags.contains("interval");
    let mut set = ActualSet {
        spec: SetSpec { kind: body["type"].clone(), flags },
        elements: BTreeSet::new(),
        foreign: Vec::new(),
    };
    for value in body["elem"].as_array().into_iter().flatten() {
        match element(value, interval) {
            Some(element) => {
                set.elements.insert(element);
            }
            None => set.foreign.push(value.clone()),
        }
    }
    set
}

/// An element of a form Husk writes: an address, or in an interval set a prefix, which nft prints as a bare address when it
/// holds just one.
fn element(value: &Value, interval: bool) -> Option<SetElement> {
    if let Some(text) = value.as_str() {
        let address: IpAddr = text.parse().ok()?;
        return Some(if interval { SetElement::Prefix(Prefix::host(address)) } else { SetElement::Address(address) });
    }
    if let Some(parts) = value.get("concat") {
        let [one, other] = parts.as_array()?.as_slice() else { return None };
        return Some(SetElement::Pair(one.as_str()?.parse().ok()?, other.as_str()?.parse().ok()?));
    }
    let prefix = value.get("prefix")?;
    let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
    let address: IpAddr = prefix["addr"].as_str()?.parse().ok()?;
    Prefix::containing(address, length).ok().map(SetElement::Prefix)
}

/// A string or a list of strings.
fn strings(value: &Value) -> BTreeSet<String> {
    match value {
        Value::String(one) => BTreeSet::from([one.clone()]),
        Value::Array(many) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => BTreeSet::new(),
    }
}

fn malformed(reason: &str) -> Error {
    Error::Malformed {
        operation: "read",
        object: format!("nft table inet {}", marks::NFT_TABLE),
        reason: reason.to_owned(),
    }
}
