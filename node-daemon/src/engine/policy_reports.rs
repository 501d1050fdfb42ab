//! Answers to `huskctl policy` and `huskctl quarantine`.

use husk_dataplane::kernel::Kernel;
use husk_overlay::ipc::Response;
use husk_policy::cluster::{Cluster, LocalPod};
use husk_policy::object::{Direction, ObjectName, Peer, Pod, PortMatch, QUARANTINE_LABEL};
use husk_policy::rules::{Rule, rules_of};
use serde::Serialize;

use super::pod_names::{Named, find};
use super::{Engine, Node};
use crate::report::{
    PodPolicyReport, PodPolicyState, PolicyKind, PolicyReport, PolicyRow, QuarantineReport, QuarantinedPod, RuleReport,
};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// The policies, and what they do.
    pub(super) fn policy_report(&mut self) -> PolicyReport {
        let cluster = self.policy.cluster();
        let requested = self.policy.requested_quarantine();
        let quarantined =
            cluster.local().iter().filter(|(_, local)| local.quarantined).map(|(name, local)| QuarantinedPod {
                pod: name.clone(),
                by_label: has_quarantine_label(&local.pod),
                by_request: requested.contains(name),
            });
        PolicyReport {
            enabled: self.parts.config.policy.enabled,
            known: self.policy.is_known(),
            pods: cluster.local().len(),
            unknown_pods: cluster.unknown().values().cloned().collect(),
            quarantined: quarantined.collect(),
            counters: self.parts.node.policy_counters(),
            programming: self.policy.programming,
            policies: policies(&cluster),
            issues: cluster.objects().issues.clone(),
        }
    }

    /// The rules of a pod.
    pub(super) fn policy_of(&mut self, pod: &str) -> Response {
        let cluster = self.policy.cluster();
        let (name, object) = match find(&cluster, pod) {
            Ok(Named::Pod(name, object)) => (name, object),
            Ok(Named::Address(address)) => {
                let reason =
                    format!("no pod has the address {address}; huskctl ipam show lists those of this node's pods");
                return Response::Refused { reason };
            }
            Err(reason) => return Response::Refused { reason },
        };
        let own = cluster.local().get(&name).cloned();
        let is_own = own.is_some();
        let theirs = |pod: Pod| LocalPod { quarantined: has_quarantine_label(&pod), pod: pod.into() };
        let local = own.or_else(|| object.filter(|_| !cluster.is_unknown_pod(&name)).map(theirs));
        let state = match &local {
            _ if !self.parts.config.policy.enabled => PodPolicyState::Disabled,
            None => PodPolicyState::Unknown,
            Some(local) if local.pod.host_network => PodPolicyState::HostNetwork,
            Some(local) if !is_own => PodPolicyState::Elsewhere { node: local.pod.node.clone() },
            Some(_) if self.is_enforced(&name) => PodPolicyState::Enforced,
            Some(_) => PodPolicyState::Pending,
        };
        let asked = !matches!(state, PodPolicyState::HostNetwork);
        let rules = |direction| {
            let local = local.as_ref().filter(|_| asked);
            let rules = local.map(|local| rules_of(&cluster, &name, local, direction).rules).unwrap_or_default();
            rules.iter().map(rule_report).collect()
        };
        answer(&PodPolicyReport {
            addresses: local.iter().flat_map(|local| local.pod.addresses.iter().copied()).collect(),
            quarantined: asked && local.as_ref().is_some_and(|local| local.quarantined),
            egress: rules(Direction::Egress),
            ingress: rules(Direction::Ingress),
            pod: name,
            state,
        })
    }

    /// Cuts a pod off, or ends that; at once.
    pub(super) fn quarantine(&mut self, pod: &str, on: bool) -> Response {
        let refused = |reason: String| Response::Refused { reason };
        if !self.parts.config.policy.enabled {
            return refused(
                "network policy is not enforced on this node, so that no pod can be cut off; set policy.enabled".into(),
            );
        }
        let cluster = self.policy.cluster();
        let ours = |name: &ObjectName| cluster.local().contains_key(name) || cluster.is_unknown_pod(name);
        let name = match find(&cluster, pod) {
            Ok(Named::Pod(name, _)) if ours(&name) => name,
            Ok(Named::Pod(name, object)) => {
                let whom = object.and_then(|pod| pod.node).map_or_else(
                    || "it is not known which node it is on".to_owned(),
                    |node| format!("ask node {node}"),
                );
                return refused(format!("the pod {name} is not on this node; {whom}: huskctl quarantine {name} there"));
            }
            Ok(Named::Address(address)) => return refused(format!("no pod has the address {address}")),
            // One that is gone may still be in the list.
            Err(reason) => match self.policy.requested_quarantine().iter().find(|name| name.to_string() == pod) {
                Some(name) if !on => name.clone(),
                _ => return refused(reason),
            },
        };
        let changed = match self.policy.set_quarantine(&name, on) {
            Ok(changed) => changed,
            Err(error) => return refused(format!("the quarantine cannot be written down: {error:#}")),
        };
        if changed {
            let what = if on { "quarantine begins by request" } else { "quarantine ends by request" };
            tracing::warn!(pod = %name, "{what}");
        }
        self.enforce();
        let cluster = self.policy.cluster();
        let local = cluster.local().get(&name);
        answer(&QuarantineReport {
            quarantined: local.map_or(on, |local| local.quarantined),
            by_label: local.is_some_and(|local| has_quarantine_label(&local.pod)),
            enforced: local.is_none() || self.is_enforced(&name),
            pod: name,
            changed,
        })
    }

    /// The kernel has the policy of a pod of this node, as it is known now.
    fn is_enforced(&self, name: &ObjectName) -> bool {
        let enforced = self.policy.enforced();
        let own = |endpoint: &&husk_overlay::endpoint::Endpoint| husk_policy::cluster::pod_name(endpoint) == *name;
        let mut leases = self.leases.endpoints.values().filter(own).peekable();
        let is_there = |endpoint: &husk_overlay::endpoint::Endpoint| {
            enforced.as_ref().is_some_and(|enforced| enforced.get(&endpoint.id) == Some(endpoint))
        };
        leases.peek().is_some() && leases.all(is_there)
    }
}

pub(crate) fn answer<T: Serialize>(report: &T) -> Response {
    match serde_json::to_value(report) {
        Ok(report) => Response::Report { report },
        Err(error) => Response::Refused { reason: error.to_string() },
    }
}

fn has_quarantine_label(pod: &Pod) -> bool {
    pod.labels.get(QUARANTINE_LABEL).is_some_and(|value| value == "true")
}

/// Policies in the order of their tiers, within one in that in which they are asked.
fn policies(cluster: &Cluster) -> Vec<PolicyRow> {
    let objects = cluster.objects();
    let selected = |selects: &dyn Fn(&ObjectName, &Pod) -> bool| -> Vec<ObjectName> {
        let selected = cluster.local().iter().filter(|(name, local)| selects(name, &local.pod));
        selected.map(|(name, _)| name.clone()).collect()
    };
    let mut rows: Vec<PolicyRow> = Vec::new();
    for (name, policy) in &objects.network_policies {
        let selects =
            |pod: &ObjectName, it: &Pod| pod.namespace == name.namespace && policy.selector.selects(&it.labels);
        rows.push(PolicyRow {
            kind: PolicyKind::NetworkPolicy,
            namespace: Some(name.namespace.clone()),
            name: name.name.clone(),
            tier: None,
            priority: None,
            directions: Direction::ALL.into_iter().filter(|it| policy.rules(*it).is_some()).collect(),
            pods: selected(&selects),
        });
    }
    for (name, policy) in &objects.cluster_policies {
        let selects = |pod: &ObjectName, it: &Pod| {
            policy.namespaces.selects(&cluster.namespace(&pod.namespace)) && policy.pods.selects(&it.labels)
        };
        rows.push(PolicyRow {
            kind: PolicyKind::ClusterNetworkPolicy,
            namespace: None,
            name: name.clone(),
            tier: Some(policy.tier),
            priority: Some(policy.priority),
            directions: Direction::ALL.into_iter().filter(|it| !policy.rules(*it).is_empty()).collect(),
            pods: selected(&selects),
        });
    }
    let tier = |row: &PolicyRow| match row.tier {
        Some(husk_policy::object::Tier::Admin) => 0,
        None => 1,
        Some(husk_policy::object::Tier::Baseline) => 2,
    };
    rows.sort_by(|one, other| {
        let key = |row: &PolicyRow| (tier(row), row.priority, row.namespace.clone(), row.name.clone());
        key(one).cmp(&key(other))
    });
    rows
}

fn rule_report(rule: &Rule) -> RuleReport {
    let anything = |what: &str| vec![what.to_owned()];
    RuleReport {
        origin: rule.origin.clone(),
        level: rule.level,
        effect: rule.effect,
        peers: match &rule.matches.peers {
            None => anything("anybody"),
            Some(peers) if peers.is_empty() => anything("nobody"),
            Some(peers) => peers.iter().map(peer_in_words).collect(),
        },
        ports: match &rule.matches.ports {
            None => anything("any"),
            Some(ports) if ports.is_empty() => anything("none"),
            Some(ports) => ports.iter().map(port_in_words).collect(),
        },
    }
}

fn peer_in_words(peer: &Peer) -> String {
    use husk_policy::object::NamespaceChoice;
    match peer {
        Peer::Pods { namespaces, pods } => {
            let pods = if pods.requirements.is_empty() { "all pods".to_owned() } else { format!("pods with {pods}") };
            match namespaces {
                NamespaceChoice::Named(namespace) => format!("{pods} in namespace {namespace}"),
                NamespaceChoice::Selected(selector) if selector.requirements.is_empty() => {
                    format!("{pods} in all namespaces")
                }
                NamespaceChoice::Selected(selector) => format!("{pods} in namespaces with {selector}"),
            }
        }
        Peer::Block { cidr, except } if except.is_empty() => cidr.to_string(),
        Peer::Block { cidr, except } => {
            let except: Vec<String> = except.iter().map(ToString::to_string).collect();
            format!("{cidr} without {}", except.join(", "))
        }
    }
}

fn port_in_words(port: &PortMatch) -> String {
    match port {
        PortMatch::All(protocol) => protocol.to_string(),
        PortMatch::Range(protocol, first, last) if first == last => format!("{protocol} {first}"),
        PortMatch::Range(protocol, first, last) => format!("{protocol} {first}-{last}"),
        PortMatch::Named(Some(protocol), name) => format!("{protocol} named {name}"),
        PortMatch::Named(None, name) => format!("port named {name}"),
    }
}
