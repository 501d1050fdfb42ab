//! The nftables table `inet husk`.
//!
//! - It is read with `nft -j list table inet husk` and changed with one `nft -j -f -` per pass: one netlink transaction,
//!   so that packets never meet half a ruleset, and a refused change leaves everything as it was.
//! - A rule cannot be read back as the statements it was made of, since the kernel stores something lower. So each rule
//!   carries a comment `husk:<name>:<digest of its statements>`, and a chain is right when its comments are, in order.
//! - A chain whose rules differ is emptied and filled in the same transaction; set elements are added and deleted one by
//!   one; neither touches counters, which are objects of their own.
//! - The table is ours alone: whatever else stands in it goes. Other tables are never touched; [`foreign_forward_drops`] only
//!   looks at them.
//! - Listing takes a process. The kernel numbers the generations of its rules, so that [`Reader`] lists only when somebody
//!   changed something.
//!
//! `nft` runs in the network namespace of the calling thread. It comes with the package `nftables`; version 1.0.6 was tested.

mod compile;
mod diff;
mod foreign;
mod maps;
mod model;
pub(crate) mod nfnetlink;
mod parse;
mod program;
mod statements;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use husk_overlay::kernel::{Addressee, Chain, CounterName, ElementType, Map, MapValue, NftTable, SetElement};
use husk_overlay::marks;
use husk_overlay::plan::PROBE_ARRIVED;
use serde::Serialize;
use serde_json::{Value, json};

pub use diff::{NftChange, diff, without_removals};
pub use foreign::{ForeignChain, foreign_forward_drops, ruleset};
pub use maps::without_removed_mappings;

use crate::error::Error;
use crate::netlink::Socket;

/// What the kernel holds of the table, as far as it can be compared with an [`NftTable`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NftState {
    /// Flag `dormant` of the table: its rules are not in force.
    pub dormant: bool,
    /// Named counters.
    pub counters: BTreeSet<CounterName>,
    /// Named sets.
    pub sets: BTreeMap<String, ActualSet>,
    /// Named maps.
    pub maps: BTreeMap<String, ActualMap>,
    /// Chains.
    pub chains: BTreeMap<String, ActualChain>,
    /// Objects of kinds that Husk never makes, as kind and name.
    pub foreign: Vec<(String, String)>,
}

/// A set in the kernel.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ActualSet {
    /// What cannot be changed in place.
    pub spec: SetSpec,
    /// Elements of the forms Husk writes.
    pub elements: BTreeSet<SetElement>,
    /// Elements of other forms, as nft prints them.
    pub foreign: Vec<Value>,
}

/// What cannot be changed of a set once it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SetSpec {
    /// Type as nft prints it; not a string for concatenations.
    #[serde(rename = "type")]
    kind: Value,
    /// Flags, sorted.
    flags: BTreeSet<String>,
}

/// A map in the kernel.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ActualMap {
    /// What cannot be changed in place.
    pub spec: MapSpec,
    /// Elements of the forms Husk writes.
    #[serde(serialize_with = "maps::serialize_elements")]
    pub elements: BTreeMap<Addressee, MapValue>,
    /// Elements of other forms, as nft prints them.
    pub foreign: Vec<Value>,
}

/// What cannot be changed of a map once it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MapSpec {
    /// Type of its keys, and its flags.
    #[serde(flatten)]
    key: SetSpec,
    /// Type of its values as nft prints it.
    value: Value,
}

impl MapSpec {
    fn of(map: &Map) -> Self {
        let key = SetSpec { kind: maps::key_type(map.key), flags: BTreeSet::new() };
        Self { key, value: json!(maps::value_type(map.value)) }
    }
}

impl SetSpec {
    fn of(element_type: ElementType) -> Self {
        let interval = matches!(element_type, ElementType::Prefix(_));
        Self {
            kind: compile::element_type(element_type),
            flags: interval.then(|| "interval".to_owned()).into_iter().collect(),
        }
    }
}

/// A chain in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ActualChain {
    /// What cannot be changed in place.
    pub spec: ChainSpec,
    /// Comments of the rules in order; none for a rule without.
    pub rules: Vec<Option<String>>,
}

/// What cannot be changed of a chain once it exists; for a chain that no hook leads to all is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ChainSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    hook: Option<String>,
    priority: Option<i64>,
    policy: Option<String>,
}

impl ChainSpec {
    fn of(chain: &Chain) -> Self {
        Self {
            kind: Some(compile::chain_kind_name(chain.kind).to_owned()),
            hook: Some(compile::hook_name(chain.hook).to_owned()),
            priority: Some(chain.priority.into()),
            policy: Some("accept".to_owned()),
        }
    }
}

impl fmt::Display for ChainSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind: Some(kind), hook: Some(hook), priority: Some(priority), policy } = self else {
            return f.write_str("without a hook");
        };
        write!(f, "type {kind} hook {hook} priority {priority} policy {}", policy.as_deref().unwrap_or("none"))
    }
}

impl NftState {
    /// The state of a kernel that holds exactly this table.
    #[must_use]
    pub fn of(table: &NftTable) -> Self {
        let set = |set: &husk_overlay::kernel::Set| ActualSet {
            spec: SetSpec::of(set.element_type),
            elements: compile::canonical_elements(set),
            foreign: Vec::new(),
        };
        let map = |map: &Map| ActualMap { spec: MapSpec::of(map), elements: map.elements.clone(), foreign: Vec::new() };
        let chain = |chain: &Chain| ActualChain {
            spec: ChainSpec::of(chain),
            rules: chain.rules.iter().map(|rule| Some(compile::rule_comment(rule))).collect(),
        };
        Self {
            dormant: false,
            counters: table.counters.clone(),
            sets: table.sets.iter().map(|(name, it)| (name.clone(), set(it))).collect(),
            maps: table.maps.iter().map(|(name, it)| (name.clone(), map(it))).collect(),
            chains: table.chains.iter().map(|(name, it)| (name.clone(), chain(it))).collect(),
            foreign: Vec::new(),
        }
    }
}

/// Packets and bytes that passed a named counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Bytes, counted from the network header on.
    pub bytes: u64,
}

/// Reads the table in the calling thread's network namespace; none when there is none.
///
/// # Errors
/// [`Error::NoProgram`] and [`Error::Program`] when `nft` is missing, fails or does not end; [`Error::Malformed`] when its
/// answer is not understood; [`Error::Unsupported`] when the kernel has no nftables; the errors of a broken netlink exchange.
pub fn read() -> Result<Option<NftState>, Error> {
    list(&mut nfnetlink::open()?)
}

fn list(socket: &mut Socket) -> Result<Option<NftState>, Error> {
    let Some(table) = nfnetlink::find(socket, marks::NFT_TABLE)? else { return Ok(None) };
    let state =
        parse::state(&program::query("read", &program::table(), &["list", "table", "inet", marks::NFT_TABLE])?)?;
    Ok(Some(NftState { dormant: table.dormant, ..state }))
}

/// Reads the table again and again, listing it only when rules of any table have changed since.
#[derive(Debug, Default)]
pub struct Reader {
    socket: Option<Socket>,
    /// What was read last, and the generation that was in force before.
    last: Option<(u32, Option<NftState>)>,
}

impl Reader {
    /// Reads the table as [`read`] does, in the network namespace in which it was first called.
    ///
    /// # Errors
    /// As [`read`].
    pub fn read(&mut self) -> Result<Option<NftState>, Error> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => none.insert(nfnetlink::open()?),
        };
        // Asked for before the listing: what changes in between is seen the next time.
        let generation = nfnetlink::generation(socket)?;
        match self.last.take() {
            Some((seen, state)) if seen == generation => self.last = Some((seen, state)),
            _ => self.last = Some((generation, list(socket)?)),
        }
        Ok(self.last.as_ref().and_then(|(_, state)| state.clone()))
    }
}

/// Makes all changes in one transaction in the calling thread's network namespace: all of them or, on error, none.
///
/// # Errors
/// [`Error::NoProgram`] and [`Error::Program`] when `nft` is missing, refuses or does not end.
pub fn apply(changes: &[NftChange]) -> Result<(), Error> {
    if changes.is_empty() {
        return Ok(());
    }
    program::run("change", &compile::transaction(changes))
}

/// Values of the named counters of drops in the calling thread's network namespace; empty when there is no table.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel has no nftables, and the errors of a broken netlink exchange.
pub fn read_counters() -> Result<BTreeMap<CounterName, CounterValue>, Error> {
    let mut counters = nfnetlink::counters(&mut nfnetlink::open()?, marks::NFT_TABLE)?;
    counters.remove(PROBE_ARRIVED);
    Ok(counters)
}

/// Probes and answers to them that came through tunnels to the calling thread's network namespace, before firewalls of others had
/// a say; none where nobody counts them.
///
/// # Errors
/// As [`read_counters`].
pub fn arrived_probes() -> Result<Option<u64>, Error> {
    let counters = nfnetlink::counters(&mut nfnetlink::open()?, marks::NFT_TABLE)?;
    Ok(counters.get(PROBE_ARRIVED).map(|counter| counter.packets))
}

#[cfg(test)]
#[path = "nft/tests.rs"]
mod tests;
