//! What peers offer: of the generations they publish, those that are believed.
//!
//! The generations of all nodes decide which one is begun next, so a single node's nonsense must not drag the cluster along,
//! let alone to the end of the numbers: nobody is followed further than [`LEAP`] at once.

use std::collections::{BTreeMap, BTreeSet};

use super::super::Context;
use super::super::peers::Peer;
use crate::issue::{Issue, IssueKind, Severity};
use crate::keys::PublicKey;
use crate::marks;
use crate::name::NodeName;
use crate::record::WireguardRecord;

/// How far a peer's generation may be ahead: more rotations than a node can miss (one a minute for two years), and so few
/// that all the mistakes of a cluster's life do not use up the numbers.
pub(super) const LEAP: u64 = 1 << 20;

/// The highest generation there is. Far below what 64 bits hold, so that adding one never overflows.
pub(super) const LAST_GENERATION: u64 = 1 << 48;

/// What a peer publishes, by generation: at most one key per slot.
pub(super) type Offer = BTreeMap<u64, WireguardRecord>;

/// The offers of all admitted peers. A peer that offers nothing is refused.
pub(super) fn believe(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    issues: &mut Vec<Issue>,
) -> BTreeMap<NodeName, Offer> {
    let horizon = horizon(context, peers);
    let mut offers = BTreeMap::new();
    for (name, peer) in peers.iter_mut().filter(|(_, peer)| peer.plan.refused.is_none()) {
        let mut doubts = Vec::new();
        let offer = offer(&peer.record.wireguard, horizon, &mut doubts);
        if !offer.is_empty() {
            issues.extend(doubts.into_iter().map(|message| Issue {
                severity: Severity::Warning,
                kind: IssueKind::IncompletePeer,
                subject: name.to_string(),
                message,
                remedy: REMEDY.to_owned(),
            }));
            offers.insert(name.clone(), offer);
            continue;
        }
        match doubts.into_iter().next() {
            Some(message) => peer.refuse(issues, IssueKind::IncompletePeer, message, REMEDY.into()),
            None => {
                let message = "the node publishes no WireGuard key".to_owned();
                peer.refuse(issues, IssueKind::IncompletePeer, message, "use the same mode on all nodes".into());
            }
        }
    }
    offers
}

/// What to do about a key that is not believed.
const REMEDY: &str =
    "remove the WireGuard keys in /run/husk/keys on that node and restart its daemon; it makes new ones";

/// The highest generation that is believed. A node without any takes the most backward peer for the measure, which a peer far
/// ahead cannot move.
fn horizon(context: &Context<'_>, peers: &BTreeMap<NodeName, Peer>) -> u64 {
    let own = context.facts.wireguard_epochs.keys().next_back().copied();
    let admitted = peers.values().filter(|peer| peer.plan.refused.is_none());
    let newest = admitted.filter_map(|peer| peer.record.wireguard.iter().map(|published| published.generation).max());
    own.or_else(|| newest.min()).unwrap_or(0).saturating_add(LEAP).min(LAST_GENERATION)
}

/// Takes the newest key of each slot; `doubts` says why others are left out.
fn offer(published: &[WireguardRecord], horizon: u64, doubts: &mut Vec<String>) -> Offer {
    let mut newest_first: Vec<&WireguardRecord> = published.iter().collect();
    newest_first.sort_by_key(|record| std::cmp::Reverse((record.generation, record.public_key)));
    let mut slots = BTreeSet::new();
    let mut keys: BTreeSet<PublicKey> = BTreeSet::new();
    let mut offer = Offer::new();
    for record in newest_first {
        let generation = record.generation;
        if generation > horizon {
            doubts.push(format!(
                "the node publishes WireGuard generation {generation}; nothing above {horizon} can be right"
            ));
        } else if record.slot != marks::wireguard_slot(generation) {
            doubts.push(format!(
                "the node publishes WireGuard generation {generation} for device {}; its place is device {}",
                record.slot,
                marks::wireguard_slot(generation)
            ));
        } else if slots.contains(&record.slot) || keys.contains(&record.public_key) {
            doubts.push(format!(
                "the node publishes WireGuard generation {generation} with a device or a key that a newer generation has"
            ));
        } else {
            slots.insert(record.slot);
            keys.insert(record.public_key);
            offer.insert(generation, record.clone());
        }
    }
    offer
}
