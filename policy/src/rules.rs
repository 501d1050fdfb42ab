//! Which rules a pod has: of all policies those that select it, in the order in which they are asked.
//!
//! Tiers are asked one after the other until one decides (policy.networking.k8s.io, `ClusterNetworkPolicySpec.tier`):
//! quarantine, cluster policies of tier Admin, NetworkPolicies, cluster policies of tier Baseline. What none decides passes.

use std::fmt;

use husk_overlay::prefix::Prefix;
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, LocalPod};
use crate::object::{ClusterAction, Direction, NamespaceChoice, ObjectName, Peer, Pod, PolicyRule, PortMatch, Tier};

/// The rules of a pod for one direction of its traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Rules in the order in which they are asked; the first one that matches acts.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Which tier it belongs to.
    pub level: Level,
    /// What it does with what it matches.
    pub effect: Effect,
    /// What it matches: any of the peers at any of the ports.
    pub matches: PolicyRule,
    /// Where it comes from.
    pub origin: Origin,
}

/// Tiers, in the order in which they are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Level {
    /// The pod is cut off.
    Quarantine,
    /// Cluster policies of tier Admin.
    Admin,
    /// NetworkPolicies.
    NetworkPolicy,
    /// Cluster policies of tier Baseline.
    Baseline,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// It passes.
    Allow,
    /// It is dropped.
    Deny,
    /// The next tier decides.
    Pass,
}

/// Where a rule comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// The pod is cut off, by its label or by request.
    Quarantine,
    /// A rule of a NetworkPolicy.
    NetworkPolicy {
        /// The policy.
        policy: ObjectName,
        /// Number of the rule within its direction, from 0.
        rule: usize,
    },
    /// NetworkPolicies isolate the pod, and none of them allows.
    DefaultDeny {
        /// Those that isolate it.
        policies: Vec<ObjectName>,
    },
    /// A rule of a ClusterNetworkPolicy.
    ClusterNetworkPolicy {
        /// The policy.
        policy: String,
        /// Tier.
        tier: Tier,
        /// Name of the rule, or its number.
        rule: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quarantine => f.write_str("quarantine"),
            Self::NetworkPolicy { policy, rule } => write!(f, "NetworkPolicy {policy} rule {rule}"),
            Self::DefaultDeny { policies } => {
                let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
                write!(f, "default deny by: {}", names.join(", "))
            }
            Self::ClusterNetworkPolicy { policy, tier, rule } => {
                write!(f, "ClusterNetworkPolicy {policy} ({tier:?}) rule {rule}")
            }
        }
    }
}

/// The rules of a pod of this node.
#[must_use]
pub fn rules_of(cluster: &Cluster, name: &ObjectName, local: &LocalPod, direction: Direction) -> Rules {
    let mut rules = Vec::new();
    if local.quarantined {
        quarantine(cluster, &mut rules);
    }
    cluster_tier(cluster, name, &local.pod, (Tier::Admin, direction), &mut rules);
    network_policies(cluster, name, &local.pod, direction, &mut rules);
    cluster_tier(cluster, name, &local.pod, (Tier::Baseline, direction), &mut rules);
    Rules { rules }
}

fn quarantine(cluster: &Cluster, rules: &mut Vec<Rule>) {
    let rule = |effect, peers| Rule {
        level: Level::Quarantine,
        effect,
        matches: PolicyRule { peers, ports: None },
        origin: Origin::Quarantine,
    };
    let allowed: Vec<Peer> = cluster.allowed_in_quarantine().iter().map(|cidr| block(*cidr)).collect();
    if !allowed.is_empty() {
        rules.push(rule(Effect::Pass, Some(allowed)));
    }
    rules.push(rule(Effect::Deny, None));
}

fn block(cidr: Prefix) -> Peer {
    Peer::Block { cidr, except: std::collections::BTreeSet::new() }
}

fn cluster_tier(
    cluster: &Cluster,
    name: &ObjectName,
    pod: &Pod,
    (tier, direction): (Tier, Direction),
    rules: &mut Vec<Rule>,
) {
    let namespace = cluster.namespace(&name.namespace);
    let selecting = cluster.objects().cluster_policies.iter().filter(|(_, policy)| {
        policy.tier == tier && policy.namespaces.selects(&namespace) && policy.pods.selects(&pod.labels)
    });
    let mut selecting: Vec<_> = selecting.collect();
    selecting.sort_by_key(|(name, policy)| (policy.priority, *name));
    for (policy, rule) in
        selecting.into_iter().flat_map(|(name, policy)| policy.rules(direction).iter().map(move |rule| (name, rule)))
    {
        rules.push(Rule {
            level: if tier == Tier::Admin { Level::Admin } else { Level::Baseline },
            effect: match rule.action {
                ClusterAction::Accept => Effect::Allow,
                ClusterAction::Deny => Effect::Deny,
                ClusterAction::Pass => Effect::Pass,
            },
            matches: rule.matches.clone(),
            origin: Origin::ClusterNetworkPolicy { policy: policy.clone(), tier, rule: rule.name.clone() },
        });
    }
}

fn network_policies(cluster: &Cluster, name: &ObjectName, pod: &Pod, direction: Direction, rules: &mut Vec<Rule>) {
    let first = ObjectName::new(&name.namespace, "");
    let of_namespace =
        cluster.objects().network_policies.range(first..).take_while(|(policy, _)| policy.namespace == name.namespace);
    let mut isolating = Vec::new();
    for (policy_name, policy) in of_namespace.filter(|(_, policy)| policy.selector.selects(&pod.labels)) {
        let Some(allowed) = policy.rules(direction) else { continue };
        isolating.push(policy_name.clone());
        for (index, rule) in allowed.iter().enumerate() {
            rules.push(Rule {
                level: Level::NetworkPolicy,
                effect: Effect::Allow,
                matches: rule.clone(),
                origin: Origin::NetworkPolicy { policy: policy_name.clone(), rule: index },
            });
        }
    }
    if !isolating.is_empty() {
        rules.push(Rule {
            level: Level::NetworkPolicy,
            effect: Effect::Deny,
            matches: PolicyRule::default(),
            origin: Origin::DefaultDeny { policies: isolating },
        });
    }
}

/// True if a pod in a namespace with these labels is one that the peer means.
#[must_use]
pub fn means_pod(peer: &Peer, cluster: &Cluster, name: &ObjectName, pod: &Pod) -> bool {
    let Peer::Pods { namespaces, pods } = peer else { return false };
    let in_namespace = match namespaces {
        NamespaceChoice::Named(namespace) => *namespace == name.namespace,
        NamespaceChoice::Selected(selector) => selector.selects(&cluster.namespace(&name.namespace)),
    };
    in_namespace && pods.selects(&pod.labels)
}

/// Port numbers that a pod's named ports have for a match; empty for a name that the pod does not have.
#[must_use]
pub fn named_ports(pod: &Pod, wanted: &PortMatch) -> Vec<PortMatch> {
    let PortMatch::Named(protocol, name) = wanted else { return vec![wanted.clone()] };
    let named = pod.ports.iter().filter(|port| port.name == *name);
    let named = named.filter(|port| protocol.is_none_or(|protocol| port.protocol == protocol));
    named.map(|port| PortMatch::Range(port.protocol, port.port, port.port)).collect()
}
