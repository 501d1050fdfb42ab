//! `huskctl policy` and `huskctl quarantine`

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::issue::Issue;
use husk_policy::object::{Direction, ObjectName, Tier};
use husk_policy::rules::{Effect, Level, Origin};
use serde::{Deserialize, Serialize};

use super::Counter;
use crate::engine::Programming;

/// `huskctl policy list`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// Policy is enforced (`policy.enabled`).
    pub enabled: bool,
    /// The cluster source has told of pods and policies, now or to an earlier daemon. Until then no pod gets a packet.
    pub known: bool,
    /// Pods of this node whose policy is known.
    pub pods: usize,
    /// Pods of this node that the source has not told of yet; they get no packet.
    pub unknown_pods: Vec<ObjectName>,
    /// Pods of this node that are cut off.
    pub quarantined: Vec<QuarantinedPod>,
    /// Packets: `denied_egress` and `denied_ingress` by policy, `unknown_pod` from or to pods that are not known, `stateless` of
    /// no connection; `passed` were forwarded.
    pub counters: BTreeMap<String, Counter>,
    /// How long it took to make and to program policy.
    pub programming: Programming,
    /// Policies of the cluster: cluster policies of tier Admin, NetworkPolicies, cluster policies of tier Baseline.
    pub policies: Vec<PolicyRow>,
    /// What of the objects could not be understood, and is closed therefore.
    pub issues: Vec<Issue>,
}

/// A pod that is cut off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuarantinedPod {
    /// The pod.
    pub pod: ObjectName,
    /// By its label `husk.dev/quarantine`.
    pub by_label: bool,
    /// By request (`huskctl quarantine`).
    pub by_request: bool,
}

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRow {
    /// Kind of the object.
    pub kind: PolicyKind,
    /// Namespace; none for cluster policies.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Tier of a cluster policy.
    pub tier: Option<Tier>,
    /// Priority of a cluster policy.
    pub priority: Option<u16>,
    /// Directions that it has rules for, or isolates.
    pub directions: Vec<Direction>,
    /// Pods of this node that it selects.
    pub pods: Vec<ObjectName>,
}

/// Kind of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum PolicyKind {
    /// networking.k8s.io
    NetworkPolicy,
    /// policy.networking.k8s.io
    ClusterNetworkPolicy,
}

impl std::fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        })
    }
}

/// `huskctl policy show`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodPolicyReport {
    /// The pod.
    pub pod: ObjectName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How it stands.
    pub state: PodPolicyState,
    /// It is cut off.
    pub quarantined: bool,
    /// What may go from it: rules in the order in which they are asked. Without any, everything.
    pub egress: Vec<RuleReport>,
    /// What may come to it, alike.
    pub ingress: Vec<RuleReport>,
}

/// How the policy of a pod stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", tag = "is")]
pub enum PodPolicyState {
    /// It is in the kernel.
    Enforced,
    /// It is not in the kernel yet.
    Pending,
    /// The cluster source has not told of the pod yet: it gets no packet.
    Unknown,
    /// Another node enforces it.
    Elsewhere {
        /// Name of that node, where it is known.
        node: Option<String>,
    },
    /// Policy does not reach it: it has its node's addresses.
    HostNetwork,
    /// Policy is not enforced at all (`policy.enabled`).
    Disabled,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleReport {
    /// Where it comes from.
    pub origin: Origin,
    /// Its tier.
    pub level: Level,
    /// What it does with what it matches.
    pub effect: Effect,
    /// Who is meant, in words; any of them.
    pub peers: Vec<String>,
    /// Which ports, in words; any of them.
    pub ports: Vec<String>,
}

/// `huskctl quarantine`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuarantineReport {
    /// The pod.
    pub pod: ObjectName,
    /// It is cut off now.
    pub quarantined: bool,
    /// The request changed something.
    pub changed: bool,
    /// Its label `husk.dev/quarantine` cuts it off, whatever was requested.
    pub by_label: bool,
    /// The kernel has it. If not, it will with one of the next passes, and the log tells why not yet.
    pub enforced: bool,
}
