//! What traffic is allowed: NetworkPolicy to verdicts to ruleset. No I/O happens here.
//!
//! This crate holds the types that a cluster source fills in; the semantics and the compiler to nftables sets and verdict
//! maps are not written yet, and nothing is enforced: `huskd` refuses no traffic between pods.

use std::collections::BTreeMap;

use husk_overlay::prefix::Prefix;
use serde::{Deserialize, Serialize};

/// Labels of a pod or a namespace.
pub type Labels = BTreeMap<String, String>;

/// Selects objects by their labels (`metav1.LabelSelector`). An empty selector selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that must have exactly these values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: Labels,
    /// Further requirements; all must hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// A requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// Relation to the values.
    pub operator: SelectorOperator,
    /// Values; empty for `Exists` and `DoesNotExist`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// Operators of a label selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SelectorOperator {
    /// The label has one of the values.
    In,
    /// The label is missing or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

/// Side of a pod's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

/// A port or range of ports. Absent altogether means every port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyPort {
    /// Transport protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Number or name; absent means every port of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortReference>,
    /// Last port of a range that starts with a numeric `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
}

/// A port by number, or by the name a container gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortReference {
    /// Port number.
    Number(u16),
    /// Name, which may mean another number in every pod.
    Name(String),
}

/// Who may talk to the selected pods, or be talked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyPeer {
    /// Pods by label, in the policy's own namespace or in those selected.
    Pods {
        /// Pods within the namespaces; absent selects all of them.
        pods: Option<LabelSelector>,
        /// Namespaces; absent means the policy's own.
        namespaces: Option<LabelSelector>,
    },
    /// Addresses.
    Block {
        /// All of these
        cidr: Prefix,
        /// but not these.
        except: Vec<Prefix>,
    },
}

/// One rule: any of the peers on any of the ports. An empty list stands for "all".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyRule {
    /// Peers; empty means everybody.
    #[serde(default)]
    pub peers: Vec<PolicyPeer>,
    /// Ports; empty means every port.
    #[serde(default)]
    pub ports: Vec<PolicyPort>,
}

/// A NetworkPolicy (networking.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkPolicy {
    /// Namespace of the policy and of the pods it selects.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Pods it applies to.
    pub selector: LabelSelector,
    /// Allowed traffic to the pods; none leaves that direction open, empty closes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Vec<PolicyRule>>,
    /// Allowed traffic from the pods; none leaves that direction open, empty closes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<PolicyRule>>,
}

/// What happens with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It passes.
    Allow,
    /// It is dropped.
    Deny,
}
