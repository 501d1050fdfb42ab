//! What other nodes had said when a watch failed, and what of it still counts when a list comes afterwards that lacks it.
//!
//! An API server that was restored from an older state has forgotten records and blocks of nodes that live. Each of them says and
//! claims its own again as soon as it hears the API, but not all hear it at the same moment. Until then the others keep their
//! routes to it, and take no block for free that it uses.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use husk_overlay::manifest::Manifest;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::Snapshot;

use super::{Kept, Watched};

/// How long others may take to hear the API after this node does: the longest pause between two attempts, or the time until they
/// find their watches deaf, and some more.
const GRACE: Duration = Duration::from_secs(60);

/// Records and blocks of other nodes.
#[derive(Debug)]
pub(super) struct Past {
    records: BTreeMap<String, Kept>,
    blocks: BTreeMap<Prefix, NodeName>,
    /// When it is over; none while a watch still fails.
    until: Option<Instant>,
}

impl Past {
    /// Keeps what is known, but for what is the own node's, which knows better itself. `before` is a past that counts still.
    pub(super) fn of(
        listed: &BTreeMap<String, Kept>,
        snapshot: &Snapshot,
        own: &NodeName,
        before: Option<&Self>,
    ) -> Self {
        let mut records = listed.clone();
        let forgotten = before.into_iter().flat_map(|past| past.forgotten_in(listed));
        records.extend(forgotten.map(|(name, kept)| (name.clone(), kept.clone())));
        records.remove(own.as_str());
        let blocks = snapshot.blocks.iter().filter(|(_, owner)| *owner != own);
        Self { records, blocks: blocks.map(|(block, owner)| (*block, owner.clone())).collect(), until: None }
    }

    /// No watch fails, at the time `now`. True if the past counts no longer.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        now >= *self.until.get_or_insert(now + GRACE)
    }

    /// What a watch tells, other than a list, is news where it is not what was told before.
    pub(super) fn heard(&mut self, watched: Watched, name: &str, kept: &Kept) {
        match (watched, &kept.read) {
            (Watched::Records, _) => drop(self.records.remove(name)),
            (Watched::Blocks, Ok(Manifest::Block { cidr, .. })) => drop(self.blocks.remove(cidr)),
            _ => {}
        }
    }

    /// Records that a list lacks, or has in an older state.
    fn forgotten_in(&self, listed: &BTreeMap<String, Kept>) -> impl Iterator<Item = (&String, &Kept)> {
        let is_forgotten = |name: &str, past: &Kept| {
            // The version would not do: it grows with the status, also of a record in an older state.
            listed.get(name).is_none_or(|it| it.uid == past.uid && it.generation < past.generation)
        };
        self.records.iter().filter(move |(name, past)| is_forgotten(name, past))
    }

    /// Adds to a snapshot what it lacks, and what it has in an older state only.
    pub(super) fn complete(&self, snapshot: &mut Snapshot, listed: &BTreeMap<String, Kept>) {
        let present: BTreeMap<IpAddr, NodeName> = snapshot
            .nodes
            .values()
            .flat_map(|it| it.addresses.iter().map(|address| (address, it.name.clone())))
            .collect();
        for (_, past) in self.forgotten_in(listed) {
            let Ok(Manifest::Node(record)) = &past.read else { continue };
            // A machine that came back under another name: it is there, and the one that it was is not.
            let replaced = |address: IpAddr| present.get(&address).is_some_and(|name| *name != record.name);
            if !record.addresses.iter().any(replaced) {
                snapshot.nodes.insert(record.name.clone(), record.clone());
            }
        }
        for (block, owner) in &self.blocks {
            let used = snapshot.nodes.get(owner).is_some_and(|record| record.blocks.contains(block));
            // What somebody else was given meanwhile is theirs.
            if used && !snapshot.blocks.contains_key(block) && !snapshot.blocks.keys().any(|it| it.overlaps(block)) {
                snapshot.blocks.insert(*block, owner.clone());
            }
        }
    }
}
