//! What policy is made of: pods, namespaces and policies, as the watches delivered them.
//!
//! Of a pod only what policy needs is kept, read once; what changes in its status most of the time is no news. A pod whose
//! namespace has not been told yet is held back: nobody can say which selectors mean it.
//!
//! ClusterNetworkPolicies are there only where somebody has applied their definition. A server without it answers "not found",
//! which is as good as an empty list; it is asked again now and then. A server that is starting may say so too, of kinds that it
//! does serve: policies that are known stay until the answer has been the same for a while.
//!
//! Nothing is told before all four have been listed, or found not to exist: a policy that is missing may be one that denies. There
//! is no [past](super::store) here: what an API server that was restored has forgotten is not in force.

mod objects;
mod watches;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use husk_policy::object::{ObjectName, Objects, Pod};
use husk_policy::read::{Object, Reading};
use husk_policy::selector::Labels;
use kube::runtime::watcher::Event;

use super::store::{Missing, TOLERANCE, Table, Trouble};
use super::watches::heard;

pub(super) use watches::start;

/// What is watched for policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyKind {
    /// `Pod`s.
    Pods,
    /// `Namespace`s.
    Namespaces,
    /// `NetworkPolicy`s.
    NetworkPolicies,
    /// `ClusterNetworkPolicy`s.
    ClusterPolicies,
}

#[derive(Default)]
struct Tables {
    pods: Table<Arc<Pod>, ObjectName>,
    namespaces: Table<Labels>,
    network_policies: Table<Reading, ObjectName>,
    cluster_policies: Table<Reading>,
    troubles: BTreeMap<PolicyKind, Trouble>,
    /// What the tables made.
    objects: Arc<Objects>,
    /// They make the same still.
    current: bool,
}

/// The store. Its methods never wait for the API server.
pub struct PolicyStore {
    tables: Mutex<Tables>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl PolicyStore {
    /// An empty store; `wake` is called when something is new.
    #[must_use]
    pub fn new(wake: Box<dyn Fn() + Send + Sync>) -> Self {
        Self { tables: Mutex::default(), wake }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take<T: PartialEq, K: Ord>(
        &self,
        kind: PolicyKind,
        table: impl Fn(&mut Tables) -> &mut Table<T, K>,
        event: Event<(K, T)>,
    ) {
        let mut tables = self.tables();
        let (heard, changed) = (heard(&event), table(&mut tables).take(event));
        self.finish(tables, kind, heard, changed);
    }

    fn finish(&self, mut tables: MutexGuard<'_, Tables>, kind: PolicyKind, heard: bool, changed: bool) {
        let recovered = heard && tables.troubles.remove(&kind).is_some();
        tables.current &= !changed;
        drop(tables);
        if changed || recovered {
            (self.wake)();
        }
    }

    /// Takes an event about pods.
    pub fn pod(&self, event: Event<(ObjectName, Arc<Pod>)>) {
        self.take(PolicyKind::Pods, |tables| &mut tables.pods, event);
    }

    /// Takes an event about namespaces.
    pub fn namespace(&self, event: Event<(String, Labels)>) {
        self.take(PolicyKind::Namespaces, |tables| &mut tables.namespaces, event);
    }

    /// Takes an event about NetworkPolicies.
    pub fn network_policy(&self, event: Event<(ObjectName, Reading)>) {
        self.take(PolicyKind::NetworkPolicies, |tables| &mut tables.network_policies, event);
    }

    /// Takes an event about ClusterNetworkPolicies.
    pub fn cluster_policy(&self, event: Event<(String, Reading)>) {
        self.take(PolicyKind::ClusterPolicies, |tables| &mut tables.cluster_policies, event);
    }

    /// The API server knows no ClusterNetworkPolicies. False if that is not believed yet.
    #[must_use]
    pub fn no_cluster_policies(&self, now: Instant) -> bool {
        let mut tables = self.tables();
        if !tables.cluster_policies.items.is_empty() {
            let reason = "it knows no ClusterNetworkPolicy any more".to_owned();
            let fresh = Trouble { since: now, reason };
            let since = tables.troubles.entry(PolicyKind::ClusterPolicies).or_insert(fresh).since;
            if now.duration_since(since) < TOLERANCE {
                return false;
            }
        }
        // As good as an empty list.
        tables.cluster_policies.take(Event::Init);
        let changed = tables.cluster_policies.take(Event::InitDone);
        self.finish(tables, PolicyKind::ClusterPolicies, true, changed);
        true
    }

    /// Takes note that a watch failed.
    pub fn failed(&self, kind: PolicyKind, reason: String, now: Instant) {
        let mut tables = self.tables();
        let since = tables.troubles.get(&kind).map_or(now, |trouble| trouble.since);
        tables.troubles.insert(kind, Trouble { since, reason });
    }

    /// The objects, once everything was listed and as long as it is not too old; the same value while nothing changes.
    ///
    /// # Errors
    /// Why there are none.
    pub fn objects(&self, now: Instant) -> Result<Arc<Objects>, Missing> {
        let mut tables = self.tables();
        tables.ready(now)?;
        if !tables.current {
            let objects = tables.assemble();
            if objects != *tables.objects {
                tables.objects = Arc::new(objects);
            }
            tables.current = true;
        }
        Ok(Arc::clone(&tables.objects))
    }
}

impl Tables {
    fn ready(&self, now: Instant) -> Result<(), Missing> {
        let listed = [
            (PolicyKind::Pods, self.pods.listed),
            (PolicyKind::Namespaces, self.namespaces.listed),
            (PolicyKind::NetworkPolicies, self.network_policies.listed),
            (PolicyKind::ClusterPolicies, self.cluster_policies.listed),
        ];
        for (kind, listed) in listed {
            if let Some(trouble) = self.troubles.get(&kind) {
                trouble.verdict(listed, now)?;
            }
        }
        if listed.iter().all(|(_, listed)| *listed) { Ok(()) } else { Err(Missing::NotYet) }
    }

    /// What is large is shared, so that this is quick with many thousand pods too.
    fn assemble(&self) -> Objects {
        let known = |name: &ObjectName| self.namespaces.items.contains_key(&name.namespace);
        let pods = self.pods.items.iter().filter(|(name, _)| known(name));
        let (mut network_policies, mut cluster_policies) = (BTreeMap::new(), BTreeMap::new());
        let readings = self.network_policies.items.values().chain(self.cluster_policies.items.values());
        let mut issues = Vec::new();
        for Reading { object, issues: found } in readings {
            issues.extend(found.iter().cloned());
            match object {
                Some(Object::NetworkPolicy(name, policy)) => insert(&mut network_policies, name, policy),
                Some(Object::ClusterNetworkPolicy(name, policy)) => insert(&mut cluster_policies, name, policy),
                Some(Object::Namespace(..) | Object::Pod(..)) | None => {}
            }
        }
        issues.sort();
        Objects {
            namespaces: self.namespaces.items.clone(),
            pods: pods.map(|(name, pod)| (name.clone(), Arc::clone(pod))).collect(),
            network_policies,
            cluster_policies,
            issues,
        }
    }
}

fn insert<K: Clone + Ord, T>(all: &mut BTreeMap<K, Arc<T>>, name: &K, policy: &Arc<T>) {
    all.insert(name.clone(), Arc::clone(policy));
}

#[cfg(test)]
mod tests;
