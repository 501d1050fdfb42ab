//! Which address a pod gets. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::DualStack;

use super::{BootTime, Demand, Supply};
use crate::error::{Error, Shortage};

/// What the store holds.
#[derive(Debug, Default)]
pub(super) struct Stock {
    /// Leased addresses and the lease of each.
    pub(super) leased: BTreeMap<IpAddr, PathBuf>,
    /// Addresses that rest, and since when.
    pub(super) cooling: BTreeMap<IpAddr, BootTime>,
    /// The last address taken from each block.
    pub(super) cursors: BTreeMap<Prefix, IpAddr>,
}

/// One address of every family.
pub(super) fn choose(supply: &Supply<'_>, demand: &Demand, stock: &Stock) -> Result<DualStack, Error> {
    if supply.families.is_empty() {
        return Err(Error::NoFamily);
    }
    let mut chosen = requested(supply, demand, stock)?;
    let mut shortages = Vec::new();
    for family in supply.families {
        if chosen.get(*family).is_some() {
            continue;
        }
        let rested = || next_free(*family, supply, stock);
        let cooling = || demand.allow_cooling.then(|| longest_rested(*family, supply, stock)).flatten();
        match rested().or_else(cooling) {
            Some(address) => chosen.set(address),
            None => shortages.push(shortage(*family, supply, stock)),
        }
    }
    if shortages.is_empty() { Ok(chosen) } else { Err(Error::Exhausted(shortages)) }
}

fn requested(supply: &Supply<'_>, demand: &Demand, stock: &Stock) -> Result<DualStack, Error> {
    let mut chosen = DualStack::default();
    for address in &demand.addresses {
        let family = Family::of(*address);
        if let Some(first) = chosen.get(family) {
            return Err(Error::TwoOfAFamily { first, second: *address });
        }
        if !supply.families.contains(&family) {
            return Err(Error::FamilyNotServed(*address));
        }
        if !supply.blocks.iter().any(|block| block.contains(*address)) {
            let blocks = supply.blocks.iter().filter(|block| block.family() == family).copied().collect();
            return Err(Error::NotOurs { address: *address, blocks });
        }
        if supply.reserved.iter().any(|own| own == *address) {
            return Err(Error::Reserved(*address));
        }
        if let Some(file) = stock.leased.get(address) {
            return Err(Error::Taken { address: *address, file: file.clone() });
        }
        chosen.set(*address);
    }
    Ok(chosen)
}

/// The first address behind the cursor, around the block, that is neither leased nor resting; of the first block that
/// has one.
fn next_free(family: Family, supply: &Supply<'_>, stock: &Stock) -> Option<IpAddr> {
    supply.blocks.iter().filter(|block| block.family() == family).find_map(|block| {
        let size = block.size();
        let start = stock.cursors.get(block).and_then(|last| block.index_of(*last)).map_or(0, |last| (last + 1) % size);
        // Each address passed is leased, resting or reserved, so that the search ends soon in a block of any size.
        (start..size).chain(0..start).filter_map(|index| block.nth(index)).find(|address| {
            !stock.leased.contains_key(address)
                && !stock.cooling.contains_key(address)
                && !supply.reserved.iter().any(|own| own == *address)
        })
    })
}

fn longest_rested(family: Family, supply: &Supply<'_>, stock: &Stock) -> Option<IpAddr> {
    let ours = |address: &IpAddr| {
        Family::of(*address) == family
            && supply.blocks.iter().any(|block| block.contains(*address))
            && !supply.reserved.iter().any(|own| own == *address)
            && !stock.leased.contains_key(address)
    };
    let resting = stock.cooling.iter().filter(|(address, _)| ours(address));
    resting.min_by_key(|(address, since)| (**since, **address)).map(|(address, _)| *address)
}

fn shortage(family: Family, supply: &Supply<'_>, stock: &Stock) -> Shortage {
    let blocks: Vec<Prefix> = supply.blocks.iter().filter(|block| block.family() == family).copied().collect();
    let ours = |address: &IpAddr| blocks.iter().any(|block| block.contains(*address));
    Shortage {
        family,
        leased: stock.leased.keys().filter(|address| ours(address)).count(),
        cooling: stock.cooling.keys().filter(|it| ours(it) && !stock.leased.contains_key(it)).count(),
        blocks,
    }
}
