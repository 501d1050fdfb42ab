//! The cluster as one node's policy sees it: what the source delivered, completed by what the node itself knows better.
//!
//! The addresses of the node's own pods come from their leases, since the source learns them later, and may go on telling of a
//! pod that is gone. No other pod has these addresses, whatever the source says.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use husk_overlay::endpoint::{AttachmentId, Endpoints};
use husk_overlay::prefix::Prefix;

use crate::object::{ObjectName, Objects, Pod, QUARANTINE_LABEL};
use crate::selector::Labels;

/// Namespace of pods whose runtime names none, on hosts without Kubernetes.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What somebody asked this node for, besides what the objects say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quarantine {
    /// Pods of this node that are cut off, besides those with the label [`QUARANTINE_LABEL`].
    pub pods: BTreeSet<ObjectName>,
    /// Addresses that a pod that is cut off may still talk with, as far as policy lets it.
    pub allowed: BTreeSet<Prefix>,
}

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPod {
    /// The pod, with the addresses of its leases.
    pub pod: Arc<Pod>,
    /// It is cut off.
    pub quarantined: bool,
}

/// The cluster as this node sees it.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    objects: Arc<Objects>,
    local: BTreeMap<ObjectName, LocalPod>,
    unknown: BTreeMap<AttachmentId, ObjectName>,
    /// Who has which address; made when somebody asks.
    owners: OnceLock<HashMap<IpAddr, ObjectName>>,
    local_addresses: BTreeSet<IpAddr>,
    allowed: BTreeSet<Prefix>,
}

/// How attachments become pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// Every pod has an object, and a pod without one is not known yet.
    Objects,
    /// A pod without an object is one without labels, as on hosts without Kubernetes.
    Optional,
}

/// The name of an attachment's pod.
#[must_use]
pub fn pod_name(endpoint: &husk_overlay::endpoint::Endpoint) -> ObjectName {
    let namespace = endpoint.pod_namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let name = endpoint.pod_name.as_deref().unwrap_or(endpoint.id.container_id.as_str());
    ObjectName::new(namespace, name)
}

impl Cluster {
    /// Puts together what the source and the leases say.
    #[must_use]
    pub fn new(objects: Arc<Objects>, endpoints: &Endpoints, membership: Membership, asked: &Quarantine) -> Self {
        let mut local: BTreeMap<ObjectName, LocalPod> = BTreeMap::new();
        let mut unknown = BTreeMap::new();
        let mut local_addresses = BTreeSet::new();
        for endpoint in endpoints.values() {
            let name = pod_name(endpoint);
            local_addresses.extend(endpoint.addresses.iter());
            let known = match (objects.pods.get(&name), membership) {
                (Some(pod), _) if is_meant(pod, endpoint.pod_uid.as_deref()) => pod.as_ref().clone(),
                (None, Membership::Optional) => Pod::default(),
                _ => {
                    unknown.insert(endpoint.id.clone(), name);
                    continue;
                }
            };
            let quarantined =
                known.labels.get(QUARANTINE_LABEL).is_some_and(|value| value == "true") || asked.pods.contains(&name);
            let before = local.get(&name).map(|before| before.pod.addresses.clone()).unwrap_or_default();
            let addresses = endpoint.addresses.iter().chain(before).collect();
            // It has a network of its own, so it lives and is not on the host's.
            let pod = Arc::new(Pod { addresses, finished: false, host_network: false, ..known });
            local.insert(name, LocalPod { pod, quarantined });
        }
        let (owners, allowed) = (OnceLock::new(), asked.allowed.clone());
        Self { objects, local, unknown, owners, local_addresses, allowed }
    }

    /// What the source delivered.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The pods of this node whose policy is known.
    #[must_use]
    pub fn local(&self) -> &BTreeMap<ObjectName, LocalPod> {
        &self.local
    }

    /// Attachments whose pods the source does not know, or knows only another one of the same name: their policy is not known,
    /// and they get no packet.
    #[must_use]
    pub fn unknown(&self) -> &BTreeMap<AttachmentId, ObjectName> {
        &self.unknown
    }

    /// True if a pod of this name is attached, and none of this name is known.
    #[must_use]
    pub fn is_unknown_pod(&self, name: &ObjectName) -> bool {
        !self.local.contains_key(name) && self.unknown.values().any(|unknown| unknown == name)
    }

    /// True for an address of a pod whose policy is not known.
    #[must_use]
    pub fn is_unknown(&self, address: IpAddr) -> bool {
        self.local_addresses.contains(&address)
            && !self.owner(address).is_some_and(|(name, _)| self.local.contains_key(name))
    }

    /// What a pod that is cut off may still talk with.
    #[must_use]
    pub fn allowed_in_quarantine(&self) -> &BTreeSet<Prefix> {
        &self.allowed
    }

    /// Pods that have addresses of their own, with the addresses they have.
    pub fn pods(&self) -> impl Iterator<Item = (&ObjectName, &Pod, impl Iterator<Item = IpAddr>)> {
        let ours = self.local.iter().map(|(name, local)| (name, local.pod.as_ref(), true));
        let others = self
            .objects
            .pods
            .iter()
            .filter(|(name, pod)| !pod.host_network && !pod.finished && !self.local.contains_key(*name));
        let others = others.map(|(name, pod)| (name, pod.as_ref(), false));
        ours.chain(others).map(move |(name, pod, local)| {
            let addresses = pod.addresses.iter().copied();
            (name, pod, addresses.filter(move |address| local || !self.local_addresses.contains(address)))
        })
    }

    /// Labels of a namespace; of one that nobody has described its name.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Labels {
        self.objects
            .namespaces
            .get(name)
            .cloned()
            .unwrap_or_else(|| [(crate::object::NAMESPACE_NAME_LABEL.to_owned(), name.to_owned())].into())
    }

    /// The pod that has an address.
    #[must_use]
    pub fn owner(&self, address: IpAddr) -> Option<(&ObjectName, &Pod)> {
        let owners = self.owners.get_or_init(|| {
            let all = self.pods().flat_map(|(name, _, addresses)| addresses.map(|address| (address, name.clone())));
            // Of two pods that claim an address one is this node's, or the first by name has it.
            let mut owners = HashMap::new();
            all.for_each(|(address, name)| {
                owners.entry(address).or_insert(name);
            });
            owners
        });
        let name = owners.get(&address)?;
        match self.local.get_key_value(name) {
            Some((name, local)) => Some((name, local.pod.as_ref())),
            None => self.objects.pods.get_key_value(name).map(|(name, pod)| (name, pod.as_ref())),
        }
    }
}

/// True if the object is that of the pod which the runtime means. Another one of its name may be its predecessor, which had
/// other labels.
fn is_meant(pod: &Pod, uid: Option<&str>) -> bool {
    match uid {
        Some(uid) => pod.uids.is_empty() || pod.uids.contains(uid),
        None => true,
    }
}
