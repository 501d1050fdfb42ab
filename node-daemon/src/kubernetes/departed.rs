//! Nodes that are gone: what they left in the API is removed by whoever notices, and their blocks go back to the pool.
//!
//! A node is gone when its `Node` object is missing, and nothing of what it owns in the API has changed, for `ipam.releaseAfter`
//! without interruption, as one daemon saw it by its own clock. A live daemon whose `Node` object is missing touches its record
//! several times within that time: that is its sign of life, and its pods keep their addresses. So a block changes hands only
//! when its node is away from the API, too.
//!
//! Nobody watches all `Node` objects for this: their status changes all the time. Every daemon lists their names now and then,
//! the more seldom the more daemons there are, so that a cluster of any size does it about every ten seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_overlay::prefix::Prefix;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams, VersionMatch};
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client};
use serde_json::json;

use super::client::bounded;
use super::objects::{AddressBlock, Kept, OverlayNode};
use super::pools;
use super::source::delete_seen;
use super::store::{Store, Watched};
use super::watches::chance;

/// How often some daemon of the cluster looks.
const CLUSTER_INTERVAL: Duration = Duration::from_secs(10);

/// How often one daemon looks at most, while nobody is suspected.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(30);

/// Signs of life within the time after which a node counts as gone, and looks of who suspects that it is.
const SIGNS: u32 = 4;

/// Annotation that a sign of life changes.
const SIGN_OF_LIFE: &str = "husk.dev/sign-of-life";

/// One thing that a node has in the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Belonging {
    /// Kind.
    pub watched: Watched,
    /// Name.
    pub name: String,
    /// State.
    pub kept: Kept,
}

/// Nodes whose `Node` object is missing, since when, and what they have.
#[derive(Debug, Default)]
pub struct Suspects(BTreeMap<String, (Instant, Vec<Belonging>)>);

impl Suspects {
    /// Takes in what there is now; `present` are the names of the `Node` objects. Returns what belongs to nodes that are gone.
    pub fn observe(
        &mut self,
        belongings: BTreeMap<String, Vec<Belonging>>,
        present: &BTreeSet<String>,
        now: Instant,
        release_after: Duration,
    ) -> BTreeMap<String, Vec<Belonging>> {
        let before = std::mem::take(&mut self.0);
        for (node, have) in belongings.into_iter().filter(|(node, _)| !present.contains(node)) {
            let since = match before.get(&node) {
                Some((since, had)) if *had == have => *since,
                _ => now,
            };
            self.0.insert(node, (since, have));
        }
        let gone = self.0.iter().filter(|(_, (since, _))| now.duration_since(*since) >= release_after);
        gone.map(|(node, (_, have))| (node.clone(), have.clone())).collect()
    }

    /// True if no node is suspected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Looks for nodes that are gone, for ever, and on the way at the pools.
pub(super) async fn patrol(client: Client, store: Arc<Store>, release_after: Duration, cluster_cidrs: Vec<Prefix>) {
    let mut suspects = Suspects::default();
    let nodes: Api<Node> = Api::all(client.clone());
    // When a whole cluster starts, somebody still looks soon.
    let mut part = chance();
    loop {
        let everyone = u32::try_from(by_node(&store).len()).unwrap_or(u32::MAX).saturating_add(1);
        let relaxed = SHORTEST_INTERVAL.max(CLUSTER_INTERVAL.saturating_mul(everyone));
        let interval = if suspects.is_empty() { relaxed } else { relaxed.min(release_after / SIGNS) };
        tokio::time::sleep(interval.mul_f64(part)).await;
        part = 0.75 + chance() / 2.0;
        let Ok(snapshot) = store.snapshot(Instant::now()) else {
            // What the store has may be old, and a sign of life in what it has not.
            suspects = Suspects::default();
            continue;
        };
        if let Err(failure) = pools::tell(&client, &snapshot, &cluster_cidrs).await {
            tracing::debug!(%failure, "the status of the pools could not be written");
        }
        let Some(present) = names(&nodes).await else { continue };
        let gone = suspects.observe(by_node(&store), &present, Instant::now(), release_after);
        for (node, have) in gone {
            // The list may have come out of a cache.
            if let Ok(None) = bounded(nodes.get_metadata_opt(&node)).await {
                remove(&client, &node, &have).await;
            }
        }
    }
}

fn by_node(store: &Store) -> BTreeMap<String, Vec<Belonging>> {
    let mut all: BTreeMap<String, Vec<Belonging>> = BTreeMap::new();
    for (node, watched, name, kept) in store.belongings() {
        all.entry(node).or_default().push(Belonging { watched, name, kept });
    }
    all
}

async fn names(nodes: &Api<Node>) -> Option<BTreeSet<String>> {
    let cached = ListParams::default().at("0").matching(VersionMatch::NotOlderThan);
    let listed = bounded(nodes.list_metadata(&cached)).await;
    let listed = listed.inspect_err(|failure| tracing::debug!(%failure, "Node objects cannot be listed")).ok()?;
    Some(listed.items.into_iter().filter_map(|node| node.metadata.name).collect())
}

/// The record goes first: a sign of life changes it, and the API server refuses to delete what is not as it was seen.
async fn remove(client: &Client, node: &str, have: &[Belonging]) {
    let records: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<OverlayNode>(&()));
    let blocks: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<AddressBlock>(&()));
    let (record, others): (Vec<&Belonging>, Vec<&Belonging>) =
        have.iter().partition(|belonging| belonging.watched == Watched::Records);
    for Belonging { watched, name, kept } in record.into_iter().chain(others) {
        let api = if *watched == Watched::Records { &records } else { &blocks };
        match bounded(delete_seen(api, name, kept)).await {
            Ok(()) => {
                tracing::info!(node, object = name, ?watched, "the node is gone; what it left in the API was removed");
            }
            // Another daemon was quicker, or the node gave a sign of life.
            Err(failure) if failure.is_not_found() || failure.is_conflict() => return,
            Err(failure) => {
                tracing::warn!(node, object = name, %failure, "what a node that is gone left in the API cannot be removed");
                return;
            }
        }
    }
}

/// Touches the own record again and again while the own `Node` object is missing, so that nobody takes this node for gone.
pub(super) async fn give_signs_of_life(client: Client, store: Arc<Store>, release_after: Duration) {
    let records: Api<DynamicObject> = Api::all_with(client, &ApiResource::erase::<OverlayNode>(&()));
    loop {
        tokio::time::sleep(release_after / SIGNS).await;
        let name = store.own().as_str();
        if !store.own_node_is_missing() || store.identity(Watched::Records, name).is_none() {
            continue;
        }
        let sign = jiff::Timestamp::now().to_string();
        let patch = Patch::Merge(json!({ "metadata": { "annotations": { SIGN_OF_LIFE: sign } } }));
        if let Err(failure) = bounded(records.patch(name, &PatchParams::default(), &patch)).await {
            tracing::debug!(%failure, "no sign of life could be given");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(300);

    fn has(version: &str) -> BTreeMap<String, Vec<Belonging>> {
        let kept = Kept { uid: "u".into(), version: version.into(), generation: 1, read: Err(Vec::new()) };
        let block = Belonging { watched: Watched::Blocks, name: "10.42.0.0-26".into(), kept };
        BTreeMap::from([("a".to_owned(), vec![block])])
    }

    #[test]
    fn a_node_is_gone_when_it_was_missing_and_silent_all_the_time() {
        let (mut suspects, start) = (Suspects::default(), Instant::now());
        let nobody = BTreeSet::new();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(suspects.observe(has("1"), &nobody, start, GRACE).is_empty());
        assert!(suspects.observe(has("1"), &nobody, after(299), GRACE).is_empty());
        assert_eq!(suspects.observe(has("1"), &nobody, after(300), GRACE), has("1"));
    }

    #[test]
    fn a_sign_of_life_and_a_return_begin_the_time_anew() {
        let (mut suspects, start) = (Suspects::default(), Instant::now());
        let (nobody, back) = (BTreeSet::new(), BTreeSet::from(["a".to_owned()]));
        let after = |seconds| start + Duration::from_secs(seconds);
        suspects.observe(has("1"), &nobody, start, GRACE);
        assert!(suspects.observe(has("2"), &nobody, after(299), GRACE).is_empty(), "it wrote something");
        assert!(suspects.observe(has("2"), &nobody, after(598), GRACE).is_empty());
        assert!(suspects.observe(has("2"), &back, after(599), GRACE).is_empty(), "its Node object is back");
        assert!(suspects.is_empty());
        assert!(suspects.observe(has("2"), &nobody, after(600), GRACE).is_empty());
        assert!(suspects.observe(has("2"), &nobody, after(899), GRACE).is_empty());
        assert_eq!(suspects.observe(has("2"), &nobody, after(900), GRACE).len(), 1);
    }

    #[test]
    fn who_has_nothing_is_nobodys_business() {
        let mut suspects = Suspects::default();
        suspects.observe(BTreeMap::new(), &BTreeSet::new(), Instant::now(), Duration::ZERO);
        assert!(suspects.is_empty());
    }
}
