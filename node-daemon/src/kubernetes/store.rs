//! What the watches have delivered: the one place where watching and asking meet.

mod past;

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use husk_overlay::config::BlockOrigin;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::Snapshot;
use kube::runtime::watcher::Event;
use tokio::sync::watch;

use self::past::Past;
use super::objects::Kept;
use super::watches::heard;

/// How long a watch may fail before what it delivered counts as possibly old: API servers are restarted one by one.
pub(super) const TOLERANCE: Duration = Duration::from_secs(10);

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watched {
    /// `OverlayNode`s.
    Records,
    /// `AddressPool`s.
    Pools,
    /// `AddressBlock`s.
    Blocks,
    /// `Node`s: the own one, or all where their CIDRs are the blocks.
    Nodes,
}

impl Watched {
    /// What has to be watched.
    #[must_use]
    pub fn needed(origin: BlockOrigin) -> &'static [Self] {
        match origin {
            BlockOrigin::Pools => &[Self::Records, Self::Pools, Self::Blocks, Self::Nodes],
            BlockOrigin::NodeCidrs => &[Self::Records, Self::Nodes],
        }
    }
}

/// The objects of one watch.
#[derive(Debug)]
pub(super) struct Table<T, K = String> {
    pub(super) items: BTreeMap<K, T>,
    /// A list that is still arriving.
    arriving: Option<BTreeMap<K, T>>,
    /// There was a full list.
    pub(super) listed: bool,
}

impl<T, K> Default for Table<T, K> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), arriving: None, listed: false }
    }
}

impl<T: PartialEq, K: Ord> Table<T, K> {
    /// Takes an event of a watch. True if what is known changed.
    pub(super) fn take(&mut self, event: Event<(K, T)>) -> bool {
        match event {
            Event::Init => {
                self.arriving = Some(BTreeMap::new());
                false
            }
            Event::InitApply((name, item)) => {
                self.arriving.get_or_insert_default().insert(name, item);
                false
            }
            Event::InitDone => {
                let arrived = self.arriving.take().unwrap_or_default();
                let changed = !self.listed || arrived != self.items;
                self.items = arrived;
                self.listed = true;
                changed
            }
            Event::Apply((name, item)) => {
                let changed = self.items.get(&name) != Some(&item);
                self.items.insert(name, item);
                changed
            }
            Event::Delete((name, _)) => self.items.remove(&name).is_some(),
        }
    }
}

/// A watch that fails.
#[derive(Debug, Clone)]
pub(super) struct Trouble {
    pub(super) since: Instant,
    pub(super) reason: String,
}

impl Trouble {
    /// Why there is nothing to tell, unless the failure is short and there was a full list before: what was never listed is not
    /// merely old.
    pub(super) fn verdict(&self, listed: bool, now: Instant) -> Result<(), Missing> {
        let lasts = now.duration_since(self.since) >= TOLERANCE;
        if lasts || !listed { Err(Missing::Failing(self.reason.clone())) } else { Ok(()) }
    }
}

#[derive(Default)]
struct Tables {
    records: Table<Kept>,
    pools: Table<Kept>,
    blocks: Table<Kept>,
    nodes: Table<Vec<Prefix>>,
    troubles: BTreeMap<Watched, Trouble>,
    /// What was known when a watch failed, until the time for others to say it again is over.
    past: Option<Past>,
    /// What the tables make; none while they are newer.
    assembled: Option<Snapshot>,
}

/// Why there is no snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// The first lists are on their way.
    NotYet,
    /// The API server does not answer as it should.
    Failing(String),
}

/// The store. Its methods never wait for the API server, but for [`Self::snapshot_within`].
pub struct Store {
    own: NodeName,
    origin: BlockOrigin,
    tables: Mutex<Tables>,
    changed: Condvar,
    wake: Box<dyn Fn() + Send + Sync>,
    distrust: watch::Sender<()>,
}

impl Store {
    /// An empty store; `wake` is called when something is new.
    #[must_use]
    pub fn new(own: NodeName, origin: BlockOrigin, wake: Box<dyn Fn() + Send + Sync>) -> Self {
        let distrust = watch::Sender::new(());
        Self { own, origin, tables: Mutex::default(), changed: Condvar::new(), wake, distrust }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where blocks come from.
    #[must_use]
    pub fn origin(&self) -> BlockOrigin {
        self.origin
    }

    /// The own node's name.
    #[must_use]
    pub fn own(&self) -> &NodeName {
        &self.own
    }

    /// Has every watch begin anew, with a list.
    pub fn distrust_watches(&self) {
        self.distrust.send_replace(());
    }

    /// Changes when watches have to begin anew.
    pub(super) fn distrusted(&self) -> watch::Receiver<()> {
        self.distrust.subscribe()
    }

    fn finish(&self, mut tables: MutexGuard<'_, Tables>, watched: Watched, heard: bool, changed: bool) {
        let recovered = heard && tables.troubles.remove(&watched).is_some();
        if changed {
            tables.assembled = None;
        }
        drop(tables);
        if changed || recovered {
            self.changed.notify_all();
            (self.wake)();
        }
    }

    /// Takes an event about objects of Husk's kinds.
    pub fn object(&self, watched: Watched, event: Event<(String, Kept)>) {
        let mut tables = self.tables();
        let Tables { past, records, .. } = &mut *tables;
        // The status of a record changes too, and says nothing of what the node claims.
        let repeats = |name: &String, kept: &Kept| {
            watched == Watched::Records && records.items.get(name).is_some_and(|known| known.says_the_same(kept))
        };
        match (past, &event) {
            (Some(past), Event::Apply((name, kept))) if !repeats(name, kept) => past.heard(watched, name, kept),
            (Some(past), Event::Delete((name, kept))) => past.heard(watched, name, kept),
            _ => {}
        }
        let table = match watched {
            Watched::Records => &mut tables.records,
            Watched::Pools => &mut tables.pools,
            Watched::Blocks => &mut tables.blocks,
            Watched::Nodes => unreachable!("Nodes have a method of their own"),
        };
        let (heard, changed) = (heard(&event), table.take(event));
        self.finish(tables, watched, heard, changed);
    }

    /// Takes an event about `Node`s.
    pub fn node(&self, event: Event<(String, Vec<Prefix>)>) {
        let mut tables = self.tables();
        let (heard, changed) = (heard(&event), tables.nodes.take(event));
        self.finish(tables, Watched::Nodes, heard, changed);
    }

    /// Takes note that a watch failed.
    pub fn failed(&self, watched: Watched, reason: String, now: Instant) {
        let mut tables = self.tables();
        if tables.troubles.is_empty() && tables.ready(self.origin, now).is_ok() {
            let snapshot = tables.assemble(self.origin, &self.own);
            tables.past = Some(Past::of(&tables.records.items, &snapshot, &self.own, tables.past.as_ref()));
        }
        let since = tables.troubles.get(&watched).map_or(now, |trouble| trouble.since);
        tables.troubles.insert(watched, Trouble { since, reason });
        drop(tables);
        self.changed.notify_all();
    }

    /// The cluster's state, once there was a full list of everything and as long as it is not too old.
    ///
    /// # Errors
    /// Why there is none.
    pub fn snapshot(&self, now: Instant) -> Result<Snapshot, Missing> {
        let mut tables = self.tables();
        tables.ready(self.origin, now)?;
        if tables.troubles.is_empty() && tables.past.as_mut().is_some_and(|past| past.is_over(now)) {
            tables.past = None;
            tables.assembled = None;
        }
        let snapshot = tables.assembled.take().unwrap_or_else(|| tables.assemble(self.origin, &self.own));
        Ok(tables.assembled.insert(snapshot).clone())
    }

    /// As [`Self::snapshot`]; waits for the first lists while they are on their way.
    ///
    /// # Errors
    /// Why there is none.
    pub fn snapshot_within(&self, limit: Duration) -> Result<Snapshot, Missing> {
        let tables = self.tables();
        let not_yet = |tables: &mut Tables| tables.ready(self.origin, Instant::now()) == Err(Missing::NotYet);
        drop(self.changed.wait_timeout_while(tables, limit, not_yet));
        self.snapshot(Instant::now())
    }

    /// Version and uid of a record or block, as last seen.
    #[must_use]
    pub fn identity(&self, watched: Watched, name: &str) -> Option<Kept> {
        let tables = self.tables();
        match watched {
            Watched::Records => tables.records.items.get(name).cloned(),
            Watched::Pools => tables.pools.items.get(name).cloned(),
            Watched::Blocks => tables.blocks.items.get(name).cloned(),
            Watched::Nodes => None,
        }
    }

    /// Every object that a node other than the own one has: name of the node, where the object is, and its state.
    #[must_use]
    pub fn belongings(&self) -> Vec<(String, Watched, String, Kept)> {
        let tables = self.tables();
        let records = tables.records.items.iter().map(|(name, kept)| (name.clone(), Watched::Records, name, kept));
        let blocks = tables.blocks.items.iter().filter_map(|(name, kept)| match &kept.read {
            Ok(Manifest::Block { node, .. }) => Some((node.to_string(), Watched::Blocks, name, kept)),
            _ => None,
        });
        let all = records.chain(blocks).filter(|(node, ..)| *node != self.own.as_str());
        all.map(|(node, watched, name, kept)| (node, watched, name.clone(), kept.clone())).collect()
    }

    /// True if the own `Node` object is known to be missing.
    #[must_use]
    pub fn own_node_is_missing(&self) -> bool {
        let tables = self.tables();
        tables.nodes.listed && !tables.nodes.items.contains_key(self.own.as_str())
    }
}

impl Tables {
    fn ready(&self, origin: BlockOrigin, now: Instant) -> Result<(), Missing> {
        let needed = Watched::needed(origin);
        let listed = |watched: &Watched| match watched {
            Watched::Records => self.records.listed,
            Watched::Pools => self.pools.listed,
            Watched::Blocks => self.blocks.listed,
            Watched::Nodes => self.nodes.listed,
        };
        for watched in needed {
            if let Some(trouble) = self.troubles.get(watched) {
                trouble.verdict(listed(watched), now)?;
            }
        }
        if needed.iter().all(listed) { Ok(()) } else { Err(Missing::NotYet) }
    }

    /// The CIDRs of all nodes. A node whose `Node` object is missing keeps those that its record names, as long as the record is
    /// there and nobody else has them: its pods run, and it may be back.
    fn node_cidrs(&self) -> Vec<Manifest> {
        let mut owners: BTreeMap<Prefix, NodeName> = BTreeMap::new();
        for (name, cidrs) in &self.nodes.items {
            let Ok(node) = NodeName::new(name) else { continue };
            owners.extend(cidrs.iter().map(|cidr| (*cidr, node.clone())));
        }
        let orphaned = self.records.items.iter().filter(|(name, _)| !self.nodes.items.contains_key(*name));
        for record in orphaned.filter_map(|(_, kept)| match &kept.read {
            Ok(Manifest::Node(record)) => Some(record),
            _ => None,
        }) {
            let free = record.blocks.iter().filter(|block| !owners.keys().any(|owned| owned.overlaps(block)));
            let theirs: Vec<Prefix> = free.copied().collect();
            owners.extend(theirs.into_iter().map(|block| (block, record.name.clone())));
        }
        owners.iter().map(|(cidr, node)| manifest::block(*cidr, node)).collect()
    }

    fn assemble(&self, origin: BlockOrigin, own: &NodeName) -> Snapshot {
        let mut manifests = Vec::new();
        let mut issues = Vec::new();
        for kept in [&self.records, &self.pools, &self.blocks].into_iter().flat_map(|table| table.items.values()) {
            match &kept.read {
                Ok(manifest) => manifests.push(manifest.clone()),
                Err(found) => issues.extend(found.iter().cloned()),
            }
        }
        if origin == BlockOrigin::NodeCidrs {
            manifests.extend(self.node_cidrs());
        }
        let mut snapshot = manifest::snapshot_from(manifests);
        if let Some(past) = &self.past {
            past.complete(&mut snapshot, &self.records.items);
        }
        if !self.nodes.items.contains_key(own.as_str()) {
            issues.push(node_missing(own));
        }
        snapshot.issues.extend(issues);
        snapshot.issues.sort();
        snapshot
    }
}

fn node_missing(own: &NodeName) -> Issue {
    Issue {
        severity: Severity::Warning,
        kind: IssueKind::NodeMissing,
        subject: format!("Node {own}"),
        message: "Kubernetes has no Node object of this name; this node keeps its blocks as long as its daemon runs"
            .into(),
        remedy: "restart the kubelet to register the node again, or uninstall Husk from a node that has left".into(),
    }
}

#[cfg(test)]
mod tests;
