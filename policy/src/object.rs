//! The objects that policy is made of, as a cluster source delivers them: pods and namespaces with their labels, and the
//! policies themselves.
//!
//! What of a policy could not be understood is closed already where it stands; [`read`](crate::read) tells how.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use husk_overlay::issue::Issue;
use husk_overlay::prefix::Prefix;
use serde::{Deserialize, Serialize};

use crate::selector::{LabelSelector, Labels};

/// Label that every namespace has: its name (well-known labels of Kubernetes; set by API servers from 1.21 on).
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Label that cuts a pod off while its value is `true`.
pub const QUARANTINE_LABEL: &str = "husk.dev/quarantine";

/// Everything that policy is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Objects {
    /// Labels of namespaces by name.
    pub namespaces: BTreeMap<String, Labels>,
    /// Pods.
    #[serde(with = "values")]
    pub pods: BTreeMap<ObjectName, Arc<Pod>>,
    /// NetworkPolicies (networking.k8s.io/v1).
    #[serde(with = "values")]
    pub network_policies: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    /// ClusterNetworkPolicies (policy.networking.k8s.io/v1alpha2).
    #[serde(with = "values")]
    pub cluster_policies: BTreeMap<String, Arc<ClusterNetworkPolicy>>,
    /// What of them could not be understood, and is closed therefore.
    pub issues: Vec<Issue>,
}

/// Namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ObjectName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectName {
    /// The name of an object in a namespace.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod, as far as policy needs to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// `metadata.uid` and, of a mirror pod, what the kubelet calls the pod that it mirrors; empty where nobody gives any.
    #[serde(default)]
    pub uids: BTreeSet<String>,
    /// `metadata.labels`
    #[serde(default)]
    pub labels: Labels,
    /// `spec.nodeName`
    #[serde(default)]
    pub node: Option<String>,
    /// `spec.hostNetwork`: it has the node's addresses, and no policy knows it.
    #[serde(default)]
    pub host_network: bool,
    /// It has succeeded or failed for good: its addresses may be another's by now.
    #[serde(default)]
    pub finished: bool,
    /// `status.podIPs`
    #[serde(default)]
    pub addresses: BTreeSet<IpAddr>,
    /// Ports of its containers that have names.
    #[serde(default)]
    pub ports: BTreeSet<NamedPort>,
}

/// A port of a container that has a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedPort {
    /// Name.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Number.
    pub port: u16,
}

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, the default.
    #[default]
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IANA protocol number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol of that number; none for one without ports.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Side of a pod's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// From the pod. What a connection has to pass first.
    Egress,
    /// To the pod.
    Ingress,
}

impl Direction {
    /// Both, in the order a connection meets them.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        })
    }
}

/// Ports that a rule names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortMatch {
    /// Every port of a protocol.
    All(Protocol),
    /// Ports from the first to the last, both included.
    Range(Protocol, u16, u16),
    /// The port that a container of the pod at the receiving end gives this name. Without a protocol, whatever the port has.
    Named(Option<Protocol>, String),
}

/// Who may be at the other end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Peer {
    /// Pods with pod network in selected namespaces.
    Pods {
        /// Where they are.
        namespaces: NamespaceChoice,
        /// Which of them.
        pods: LabelSelector,
    },
    /// Addresses, of pods or of others.
    Block {
        /// All of these
        cidr: Prefix,
        /// but none of these, which lie within.
        except: BTreeSet<Prefix>,
    },
}

/// Which namespaces are meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NamespaceChoice {
    /// This one: that of the policy.
    Named(String),
    /// Those with these labels.
    Selected(LabelSelector),
}

/// One rule: any of the peers at any of the ports. What is not understood among them is left out, and matches nothing
/// therefore.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRule {
    /// Peers; none given means everybody.
    pub peers: Option<Vec<Peer>>,
    /// Ports; none given means everything, also what has no ports.
    pub ports: Option<Vec<PortMatch>>,
}

/// A NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPolicy {
    /// Pods of its namespace that it applies to; all of them where it is not understood.
    pub selector: LabelSelector,
    /// What may come to the pods; none where the policy says nothing of ingress.
    pub ingress: Option<Vec<PolicyRule>>,
    /// What may go from the pods; none where the policy says nothing of egress.
    pub egress: Option<Vec<PolicyRule>>,
}

impl NetworkPolicy {
    /// The rules of a direction; none where the policy does not isolate it.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> Option<&[PolicyRule]> {
        match direction {
            Direction::Egress => self.egress.as_deref(),
            Direction::Ingress => self.ingress.as_deref(),
        }
    }
}

/// Tier of a cluster policy. NetworkPolicies are between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Tier {
    /// Before NetworkPolicies.
    Admin,
    /// For what no NetworkPolicy has decided.
    Baseline,
}

/// What a rule of a cluster policy does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ClusterAction {
    /// It passes; nothing further is asked.
    Accept,
    /// It is dropped; nothing further is asked.
    Deny,
    /// The rest of the tier is passed over.
    Pass,
}

/// A rule of a cluster policy. Where it is not understood the specification says what it becomes, and the reader has written
/// it so: an `Accept` that matches nothing is left out, `Deny` and `Pass` match everything and deny.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRule {
    /// Name, or number from 0 where it has none; for people.
    pub name: String,
    /// What it does.
    pub action: ClusterAction,
    /// Peers and ports; here, too, none given means everything.
    #[serde(flatten)]
    pub matches: PolicyRule,
}

/// A ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNetworkPolicy {
    /// Tier.
    pub tier: Tier,
    /// From 0 to 1000; the lowest comes first. Equal ones come in the order of the policies' names.
    pub priority: u16,
    /// Namespaces whose pods it applies to; all of them where it is not understood.
    pub namespaces: LabelSelector,
    /// Which of their pods.
    pub pods: LabelSelector,
    /// Rules for what comes to the pods, in order.
    pub ingress: Vec<ClusterRule>,
    /// Rules for what goes from the pods, in order.
    pub egress: Vec<ClusterRule>,
}

impl ClusterNetworkPolicy {
    /// The rules of a direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[ClusterRule] {
        match direction {
            Direction::Egress => &self.egress,
            Direction::Ingress => &self.ingress,
        }
    }
}

/// Maps with structured keys or shared values, as lists of pairs.
mod values {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, Arc<V>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map.iter().map(|(key, value)| (key, value.as_ref())))
    }

    pub(super) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, Arc<V>>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        let pairs = Vec::<(K, V)>::deserialize(deserializer)?;
        Ok(pairs.into_iter().map(|(key, value)| (key, Arc::new(value))).collect())
    }
}
