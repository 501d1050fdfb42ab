//! From manifests to the snapshot of a cluster.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use super::Manifest;
use crate::issue::{Issue, IssueKind, Severity};
use crate::name::NodeName;
use crate::prefix::Prefix;
use crate::record::{NodeRecord, Pool, Snapshot};

/// Puts manifests together. Neither their order nor repetition makes a difference, nor how they were spread over files.
///
/// Where manifests of one object differ, one of them is used, the same one on every node, and an issue says so: of nodes
/// the one that was created first, as a late-comer under another's name is the more likely impostor, then the one with the
/// newest key; of blocks the owner with the lowest name; of pools the lowest CIDR, then the shortest blocks, then the
/// disabled one.
#[must_use]
pub fn snapshot_from(manifests: impl IntoIterator<Item = Manifest>) -> Snapshot {
    let mut nodes: BTreeMap<NodeName, Vec<NodeRecord>> = BTreeMap::new();
    let mut pools: BTreeMap<String, Vec<Pool>> = BTreeMap::new();
    let mut blocks: BTreeMap<Prefix, Vec<NodeName>> = BTreeMap::new();
    for manifest in manifests {
        match manifest {
            Manifest::Node(record) => nodes.entry(record.name.clone()).or_default().push(record),
            Manifest::Pool(pool) => pools.entry(pool.name.clone()).or_default().push(pool),
            Manifest::Block { cidr, node } => blocks.entry(cidr).or_default().push(node),
        }
    }
    let mut issues = Vec::new();
    let nodes = winners(nodes, "OverlayNode", &mut issues, |record| {
        let generation = record.wireguard.iter().map(|device| device.generation).max();
        let epoch = record.esp.iter().flat_map(|esp| &esp.epochs).map(|epoch| epoch.epoch).max();
        (record.created, Reverse((generation, epoch)), Manifest::Node(record.clone()).to_yaml())
    });
    let pools =
        winners(pools, "AddressPool", &mut issues, |pool| (pool.cidr, pool.block_length, Reverse(pool.disabled)));
    let blocks = winners(blocks, "AddressBlock", &mut issues, Clone::clone);
    issues.sort();
    Snapshot { nodes, pools, blocks, issues }
}

/// Of each object the variant of the lowest rank. Only equal variants have equal ranks.
fn winners<K: Ord + fmt::Display, T: PartialEq, R: Ord>(
    objects: BTreeMap<K, Vec<T>>,
    kind: &str,
    issues: &mut Vec<Issue>,
    rank: impl Fn(&T) -> R,
) -> BTreeMap<K, T> {
    let mut all = BTreeMap::new();
    for (key, mut variants) in objects {
        if variants.len() > 1 {
            variants.sort_by_cached_key(&rank);
            variants.dedup();
        }
        if variants.len() > 1 {
            issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::BadManifest,
                subject: format!("{kind} {key}"),
                message: format!("{} manifests of this object differ, and one of them is used", variants.len()),
                remedy: "find the manifests that name it and remove all but the right one".to_owned(),
            });
        }
        all.extend(variants.into_iter().next().map(|winner| (key, winner)));
    }
    all
}
