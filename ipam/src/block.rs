//! Node blocks: which one to claim, which one to give back. Pure; the lock that decides between two nodes is the cluster
//! source's (the creation of a file or of an API object whose name is the block).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::{DualStack, Pool};

/// How an attempt to claim a block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The block is ours.
    Created,
    /// Another node was faster.
    Taken,
}

/// Blocks of a family that could be claimed, best first: those of the first enabled pool that overlap no block anybody
/// owns (of whatever length), then those of the next pool.
///
/// `offset` is where the search in a pool starts, taken modulo the number of its blocks. Nodes that start at random
/// places rarely want the same block. The iterator does work only as it is advanced, at most twice per existing block.
pub fn candidates<'a>(
    pools: impl IntoIterator<Item = &'a Pool> + 'a,
    owners: &BTreeMap<Prefix, NodeName>,
    family: Family,
    offset: u128,
) -> impl Iterator<Item = Prefix> + 'a {
    let owned = merged_ranges(owners.keys().filter(|block| block.family() == family));
    pools.into_iter().filter(move |pool| !pool.disabled && pool.cidr.family() == family).flat_map(move |pool| {
        let start = offset.checked_rem(pool.cidr.subnet_count(pool.block_length)).unwrap_or(0);
        FreeBlocks { pool: pool.cidr, length: pool.block_length, owned: owned.clone(), start, step: 0 }
    })
}

/// Claims the first candidate that nobody else gets first; none when the candidates ran out.
///
/// # Errors
/// Passes on the first error of `try_create`.
pub fn claim<E>(
    candidates: impl IntoIterator<Item = Prefix>,
    mut try_create: impl FnMut(&Prefix) -> Result<Claim, E>,
) -> Result<Option<Prefix>, E> {
    for block in candidates {
        if try_create(&block)? == Claim::Created {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// Blocks that may be given back, the newest first. `blocks` is in the order of allocation; `in_use` holds addresses
/// that are leased or cooling down.
///
/// A block goes only when nothing of it is in use, the router address lies elsewhere, and the blocks that stay still
/// have half of its size free. A block is claimed when nothing is free, so between claim and release lies half a
/// block of pods: a single pod that comes and goes moves nothing.
#[must_use]
pub fn releasable(blocks: &[Prefix], in_use: &BTreeSet<IpAddr>, router: &DualStack) -> Vec<Prefix> {
    let mut leaving = Vec::new();
    for family in Family::ALL {
        let mut staying: Vec<Prefix> = blocks.iter().filter(|block| block.family() == family).copied().collect();
        for block in staying.clone().into_iter().rev() {
            let empty = !in_use.iter().any(|address| block.contains(*address));
            let has_router = router.get(family).is_some_and(|address| block.contains(address));
            let others = staying.iter().filter(|it| **it != block);
            let free_elsewhere = others.fold(0_u128, |sum, it| sum.saturating_add(free_in(it, in_use, router)));
            if empty && !has_router && staying.len() > 1 && free_elsewhere >= block.size().div_ceil(2) {
                staying.retain(|it| *it != block);
                leaving.push(block);
            }
        }
    }
    leaving
}

/// Addresses of a block that a pod could get now; `in_use` and `router` as in [`releasable`].
#[must_use]
pub fn free_in(block: &Prefix, in_use: &BTreeSet<IpAddr>, router: &DualStack) -> u128 {
    let reserved = router.iter().filter(|address| block.contains(*address) && !in_use.contains(address)).count();
    let used = in_use.iter().filter(|address| block.contains(**address)).count();
    block.size().saturating_sub((used + reserved) as u128)
}

/// First and last address, as numbers.
type Range = (u128, u128);

fn range_of(prefix: &Prefix) -> Range {
    let first = number(prefix.address());
    (first, first.saturating_add(prefix.size() - 1))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(it) => u128::from(u32::from(it)),
        IpAddr::V6(it) => u128::from(it),
    }
}

/// Disjoint ranges in ascending order. The blocks may overlap: a source may hold contradictions.
fn merged_ranges<'a>(blocks: impl Iterator<Item = &'a Prefix>) -> Vec<Range> {
    let mut ranges: Vec<Range> = blocks.map(range_of).collect();
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1 => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The free blocks of one pool, from `start` around to `start`.
struct FreeBlocks {
    pool: Prefix,
    length: u8,
    owned: Vec<Range>,
    start: u128,
    /// Blocks passed so far, counted from `start`.
    step: u128,
}

impl FreeBlocks {
    /// The owned range a block overlaps.
    fn overlapped(&self, block: &Prefix) -> Option<Range> {
        let (first, last) = range_of(block);
        let index = self.owned.partition_point(|owned| owned.1 < first);
        self.owned.get(index).copied().filter(|owned| owned.0 <= last)
    }

    /// The position after the owned range, so that a large foreign block is passed in one step. Never past the end of
    /// the pool, where the search wraps around.
    fn step_behind(&self, index: u128, owned: Range) -> u128 {
        let count = self.pool.subnet_count(self.length);
        let size = u32::from(self.pool.family().bits() - self.length);
        let offset = owned.1 - number(self.pool.address());
        let next = offset.checked_shr(size).unwrap_or(0).saturating_add(1).clamp(index + 1, count);
        self.step + (next - index)
    }
}

impl Iterator for FreeBlocks {
    type Item = Prefix;

    fn next(&mut self) -> Option<Prefix> {
        let count = self.pool.subnet_count(self.length);
        while self.step < count {
            // `start` and `step` are below `count`, so that one subtraction is the modulo, and nothing overflows.
            let index =
                if self.start < count - self.step { self.start + self.step } else { self.start - (count - self.step) };
            let block = self.pool.subnet(self.length, index)?;
            match self.overlapped(&block) {
                None => {
                    self.step += 1;
                    return Some(block);
                }
                Some(owned) => self.step = self.step_behind(index, owned),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use husk_overlay::plan::router_addresses;

    use super::*;
    use proptest::prelude::*;

    fn p(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    fn pool(cidr: &str, block_length: u8) -> Pool {
        Pool { name: cidr.to_owned(), cidr: p(cidr), block_length, disabled: false }
    }

    fn owners(blocks: &[&str]) -> BTreeMap<Prefix, NodeName> {
        blocks.iter().map(|block| (p(block), NodeName::new("other").unwrap())).collect()
    }

    fn all(pools: &[Pool], owners: &BTreeMap<Prefix, NodeName>, family: Family, offset: u128) -> Vec<String> {
        candidates(pools, owners, family, offset).map(|block| block.to_string()).collect()
    }

    #[test]
    fn the_search_starts_at_the_offset_and_wraps() {
        let pools = [pool("10.42.0.0/24", 26)];
        let want = ["10.42.0.192/26", "10.42.0.0/26", "10.42.0.64/26", "10.42.0.128/26"];
        assert_eq!(all(&pools, &owners(&[]), Family::Ipv4, 3), want);
        assert_eq!(all(&pools, &owners(&[]), Family::Ipv4, 4 * 1_000_000 + 3), want);
    }

    #[test]
    fn blocks_of_other_lengths_are_respected() {
        let pools = [pool("10.42.0.0/24", 26)];
        assert_eq!(all(&pools, &owners(&["10.42.0.0/25", "10.42.0.200/32"]), Family::Ipv4, 0), ["10.42.0.128/26"]);
        assert!(all(&pools, &owners(&["10.0.0.0/8"]), Family::Ipv4, 2).is_empty());
        assert_eq!(all(&pools, &owners(&["fd42::/16"]), Family::Ipv4, 0).len(), 4);
    }

    #[test]
    fn a_huge_pool_with_huge_foreign_blocks_is_searched_at_once() {
        let pools = [pool("fd42::/48", 122)];
        let taken = owners(&["fd42::/49", "fd42:0:0:8000::/50"]);
        for offset in [0, 1, u128::MAX / 3] {
            let first = candidates(&pools, &taken, Family::Ipv6, offset).next().unwrap();
            assert!(p("fd42:0:0:c000::/50").covers(&first), "{first}");
        }
        assert_eq!(candidates(&pools, &owners(&["fd00::/8"]), Family::Ipv6, 77).next(), None);
        let everything = [pool("::/0", 128)];
        assert!(candidates(&everything, &owners(&["::/1"]), Family::Ipv6, 0).next().is_some());
    }

    #[test]
    fn pools_are_tried_in_order_and_only_when_they_fit() {
        let mut pools =
            [pool("10.1.0.0/26", 26), pool("10.2.0.0/26", 26), pool("10.3.0.0/26", 26), pool("fd42::/64", 122)];
        pools[1].disabled = true;
        assert_eq!(all(&pools, &owners(&[]), Family::Ipv4, 9), ["10.1.0.0/26", "10.3.0.0/26"]);
        assert!(all(&[pool("10.0.0.0/26", 24)], &owners(&[]), Family::Ipv4, 1).is_empty());
    }

    #[test]
    fn a_lost_race_moves_on() {
        let pools = [pool("10.42.0.0/24", 26)];
        let mut tried = Vec::new();
        let got = claim::<()>(candidates(&pools, &owners(&[]), Family::Ipv4, 0), |block| {
            tried.push(*block);
            Ok(if tried.len() < 3 { Claim::Taken } else { Claim::Created })
        });
        assert_eq!(got, Ok(Some(p("10.42.0.128/26"))));
        assert_eq!(claim::<()>(candidates(&pools, &owners(&[]), Family::Ipv4, 0), |_| Ok(Claim::Taken)), Ok(None));
        assert_eq!(claim(candidates(&pools, &owners(&[]), Family::Ipv4, 0), |_| Err("disk full")), Err("disk full"));
    }

    #[test]
    fn a_block_goes_only_when_half_of_it_is_free_elsewhere() {
        let blocks = [p("10.42.0.0/26"), p("10.42.0.64/26"), p("10.42.0.128/26"), p("fd42::/122")];
        let router = router_addresses(&blocks.into());
        let use_first = |count: u128| (1..=count).map(|index| blocks[0].nth(index).unwrap()).collect::<BTreeSet<_>>();

        // Everything empty: the router's block stays, both others go, the newest first. The only IPv6 block stays.
        assert_eq!(releasable(&blocks, &use_first(0), &router), [blocks[2], blocks[1]]);
        // The first block is full: the newest may go because the second is free, the second must stay.
        assert_eq!(releasable(&blocks, &use_first(63), &router), [blocks[2]]);
        // 31 free addresses are less than half a block, 32 are enough.
        assert_eq!(releasable(&blocks[..2], &use_first(32), &router), []);
        assert_eq!(releasable(&blocks[..2], &use_first(31), &router), [blocks[1]]);
        // One address in use keeps a block.
        let mut one = use_first(0);
        one.insert(blocks[2].nth(5).unwrap());
        assert_eq!(releasable(&blocks, &one, &router), [blocks[1]]);
    }

    proptest! {
        #[test]
        fn candidates_are_free_distinct_and_complete(
            taken in proptest::collection::vec((0_u32..256, 24_u8..=32), 0..12),
            offset in any::<u128>(),
            length in 24_u8..=30,
        ) {
            let pools = [pool("10.42.0.0/24", length)];
            let owners: BTreeMap<Prefix, NodeName> = taken
                .iter()
                .map(|(low, length)| Prefix::containing(std::net::Ipv4Addr::from(0x0a2a_0000 + low).into(), *length).unwrap())
                .map(|block| (block, NodeName::new("other").unwrap()))
                .collect();
            let found: Vec<Prefix> = candidates(&pools, &owners, Family::Ipv4, offset).collect();
            let distinct: BTreeSet<Prefix> = found.iter().copied().collect();
            prop_assert_eq!(distinct.len(), found.len());
            let expected: BTreeSet<Prefix> = (0..pools[0].cidr.subnet_count(length))
                .filter_map(|index| pools[0].cidr.subnet(length, index))
                .filter(|block| !owners.keys().any(|owned| owned.overlaps(block)))
                .collect();
            prop_assert_eq!(distinct, expected);
        }
    }
}
