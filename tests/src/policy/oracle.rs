//! What network policy allows, from the objects as they are written, as the API's reference and concepts put it in words: nested
//! loops, no preparation, nothing shared with what enforces it.
//!
//! - networking.k8s.io/v1 NetworkPolicy: the API reference, and "Network Policies" among Kubernetes' concepts.
//! - policy.networking.k8s.io ClusterNetworkPolicy: the comments of its types (network-policy-api, apis/v1alpha2).
//! - What Husk adds: pods that are cut off or not known yet, policies of one priority in the order of their names, and that the
//!   addresses of a node's own pods are those that it gave them.
//!
//! Objects are those that the API allows: what is not valid is for others to judge.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Flow, NODE, PROTOCOLS, SLOTS, Slot, World};

/// Whose sides of a connection are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Both, wherever the pods are.
    Cluster,
    /// Those of pods on [`NODE`].
    Node,
}

/// Direction of traffic as the pod sees it whose policy is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

/// Reads a cluster.
#[derive(Debug, Clone)]
pub struct Oracle<'w> {
    world: &'w World,
    scope: Scope,
    /// Pods that nobody has described, on a node where that is not needed.
    plain: Vec<Value>,
    /// Addresses of pods that nobody has described, where that is needed.
    unknown: BTreeSet<IpAddr>,
    namespaces: Vec<&'w Value>,
    pods: Vec<&'w Value>,
    network_policies: Vec<&'w Value>,
    /// In the order in which they are checked.
    cluster_policies: Vec<&'w Value>,
}

/// Somebody at one end of a connection.
#[derive(Clone, Copy)]
struct Party<'o> {
    address: IpAddr,
    /// None for who is no pod, or one that shares the network of its node.
    pod: Option<&'o Value>,
}

/// One side of a connection.
struct Side<'o> {
    direction: Direction,
    /// The pod whose policy is asked.
    own: &'o Value,
    /// Who is at the other end.
    other: Party<'o>,
    /// The pod that receives, whose ports have names.
    receiver: Option<&'o Value>,
    /// Protocol as the API names it; empty for others.
    protocol: &'static str,
    port: u16,
}

impl<'w> Oracle<'w> {
    /// Of a cluster.
    #[must_use]
    pub fn new(world: &'w World, scope: Scope) -> Self {
        let missing = SLOTS.iter().filter(|slot| slot.local && world.pod(slot).is_none());
        let plain = missing.map(|slot| {
            let metadata = json!({"namespace": slot.namespace, "name": slot.name});
            json!({"kind": "Pod", "metadata": metadata, "spec": {"nodeName": NODE}})
        });
        let unknown = SLOTS.iter().filter(|slot| world.is_unknown(slot)).flat_map(|slot| slot.addresses);
        let of = |kind: &str| world.objects.iter().filter(|object| object["kind"] == kind).collect::<Vec<&Value>>();
        // "Policies with lower priority values have higher precedence, and are checked before policies with higher priority values
        // in the same tier."
        let mut cluster_policies = of("ClusterNetworkPolicy");
        cluster_policies.sort_by_key(|it| (it["spec"]["priority"].as_u64(), it["metadata"]["name"].as_str()));
        Self {
            world,
            scope,
            plain: plain.collect(),
            unknown: unknown.collect(),
            namespaces: of("Namespace"),
            pods: of("Pod"),
            network_policies: of("NetworkPolicy"),
            cluster_policies,
        }
    }

    /// True if a connection is allowed.
    #[must_use]
    pub fn allows(&self, flow: &Flow) -> bool {
        if self.unknown.contains(&flow.from) || self.unknown.contains(&flow.to) {
            return false;
        }
        let (from, to) = (self.party(flow.from), self.party(flow.to));
        // "A Pod cannot block access to itself."
        if let (Some(one), Some(other)) = (from.pod, to.pod)
            && std::ptr::eq(one, other)
        {
            return true;
        }
        // "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the source pod and
        // the ingress policy on the destination pod need to allow the connection."
        let protocol = PROTOCOLS.iter().find(|(_, number)| *number == flow.protocol).map_or("", |(name, _)| *name);
        let side = |direction, own: Party<'_>, other| {
            let Some(own) = own.pod else { return true };
            if self.scope == Scope::Node && own["spec"]["nodeName"] != NODE {
                return true;
            }
            self.allows_side(&Side { direction, own, other, receiver: to.pod, protocol, port: flow.port })
        };
        side(Direction::Egress, from, to) && side(Direction::Ingress, to, from)
    }

    /// Who has an address. Pods that have ended have none, and host-networked pods no other than their node.
    fn party(&self, address: IpAddr) -> Party<'_> {
        let pod = match local(address) {
            Some(slot) => self.pods.iter().copied().chain(&self.plain).find(|pod| slot.is(pod)),
            None => self.pods.iter().copied().find(|pod| {
                let ended = pod["status"]["phase"] == "Succeeded" || pod["status"]["phase"] == "Failed";
                let mut ips =
                    items(&pod["status"]["podIPs"]).filter_map(|it| it["ip"].as_str()?.parse::<IpAddr>().ok());
                !ended && pod["spec"]["hostNetwork"] != true && ips.any(|ip| ip == address)
            }),
        };
        Party { address, pod }
    }

    /// "Policy tiers are evaluated in the following order: Admin tier, NetworkPolicy tier, Baseline tier." "If a given connection
    /// wasn't allowed or denied by any of the tiers, the default kubernetes policy is applied, which says that all pods can
    /// communicate with each other."
    fn allows_side(&self, side: &Side<'_>) -> bool {
        let by_label = side.own["metadata"]["labels"]["husk.dev/quarantine"] == "true";
        let by_request = self.world.quarantined.iter().any(|index| SLOTS[*index].is(side.own));
        if (by_label || by_request) && !self.world.allowed.iter().any(|cidr| holds(cidr, side.other.address)) {
            return false;
        }
        let decided = self.cluster_tier("Admin", side);
        let decided = decided.or_else(|| self.network_policies(side));
        decided.or_else(|| self.cluster_tier("Baseline", side)).unwrap_or(true)
    }

    /// "A rule that appears at the top of the rules would take the highest precedence."
    fn cluster_tier(&self, tier: &str, side: &Side<'_>) -> Option<bool> {
        for policy in self.cluster_policies.iter().filter(|policy| policy["spec"]["tier"] == tier) {
            if !self.is_chosen(&policy["spec"]["subject"], side.own) {
                continue;
            }
            let (rules, peers) = match side.direction {
                Direction::Ingress => ("ingress", "from"),
                Direction::Egress => ("egress", "to"),
            };
            for rule in items(&policy["spec"][rules]) {
                let is_peer = items(&rule[peers]).any(|peer| {
                    side.other.pod.is_some_and(|pod| self.is_chosen(peer, pod))
                        || items(&peer["networks"]).any(|it| holds_text(it, side.other.address))
                });
                // "If unspecified, protocol-specific attributes will not be used to match traffic."
                let is_protocol =
                    rule["protocols"].is_null() || items(&rule["protocols"]).any(|it| is_cluster_protocol(it, side));
                if is_peer && is_protocol {
                    match rule["action"].as_str() {
                        Some("Accept") => return Some(true),
                        Some("Deny") => return Some(false),
                        // "Skips all further ClusterNetworkPolicy rules in the current tier for the selected traffic, and
                        // passes evaluation to the next tier."
                        _ => return None,
                    }
                }
            }
        }
        None
    }

    /// A subject or a peer of a ClusterNetworkPolicy: "Namespaces is used to select pods via namespace selectors. Pods is used to
    /// select pods via namespace AND pod selectors." A namespace selector, "if empty, selects all Namespaces".
    fn is_chosen(&self, choice: &Value, pod: &Value) -> bool {
        let namespaces = &choice["namespaces"];
        let pods = &choice["pods"];
        let by_namespace = !namespaces.is_null() && selects(namespaces, &self.namespace_labels(pod));
        let by_pod = !pods.is_null()
            && selects(&pods["namespaceSelector"], &self.namespace_labels(pod))
            && selects(&pods["podSelector"], &pod["metadata"]["labels"]);
        by_namespace || by_pod
    }

    /// Labels of the namespace of a pod. "The Kubernetes control plane sets an immutable label kubernetes.io/metadata.name on all
    /// namespaces, the value of the label is the namespace name."
    fn namespace_labels(&self, pod: &Value) -> Value {
        let name = &pod["metadata"]["namespace"];
        let object = self.namespaces.iter().find(|object| object["metadata"]["name"] == *name);
        let mut labels = object.map_or_else(|| json!({}), |object| object["metadata"]["labels"].clone());
        labels["kubernetes.io/metadata.name"] = name.clone();
        labels
    }

    /// "v1.NetworkPolicy always makes a final decision for selected pods."
    fn network_policies(&self, side: &Side<'_>) -> Option<bool> {
        let namespace = &side.own["metadata"]["namespace"];
        let mut isolated = false;
        for policy in self.network_policies.iter().filter(|policy| policy["metadata"]["namespace"] == *namespace) {
            let spec = &policy["spec"];
            // "An empty selector matches all pods in the policy's namespace."
            if !selects(&spec["podSelector"], &side.own["metadata"]["labels"]) {
                continue;
            }
            let (kind, rules, peers) = match side.direction {
                Direction::Ingress => ("Ingress", "ingress", "from"),
                Direction::Egress => ("Egress", "egress", "to"),
            };
            // "If no policyTypes are specified on a NetworkPolicy then by default Ingress will always be set and Egress will be set
            // if the NetworkPolicy has any egress rules."
            let applies = if items(&spec["policyTypes"]).next().is_none() {
                side.direction == Direction::Ingress || items(&spec["egress"]).next().is_some()
            } else {
                items(&spec["policyTypes"]).any(|it| it == kind)
            };
            if !applies {
                continue;
            }
            isolated = true;
            // "If this field is empty or missing, this rule matches all": true of peers and of ports.
            let matches = |rule: &Value| {
                let mut all_peers = items(&rule[peers]).peekable();
                let mut all_ports = items(&rule["ports"]).peekable();
                (all_peers.peek().is_none() || all_peers.any(|peer| self.is_peer(peer, namespace, &side.other)))
                    && (all_ports.peek().is_none() || all_ports.any(|port| is_port(port, side)))
            };
            if items(&spec[rules]).any(matches) {
                return Some(true);
            }
        }
        isolated.then_some(false)
    }

    /// A peer of a NetworkPolicy.
    fn is_peer(&self, peer: &Value, namespace: &Value, other: &Party<'_>) -> bool {
        let block = &peer["ipBlock"];
        if !block.is_null() {
            return holds_text(&block["cidr"], other.address)
                && !items(&block["except"]).any(|except| holds_text(except, other.address));
        }
        let Some(pod) = other.pod else { return false };
        let (pods, namespaces) = (&peer["podSelector"], &peer["namespaceSelector"]);
        // "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the pods matching podSelector in the
        // namespaces selected by namespaceSelector. Otherwise it selects the pods matching podSelector in the policy's own namespace."
        let in_namespace = if namespaces.is_null() {
            pod["metadata"]["namespace"] == *namespace
        } else {
            selects(namespaces, &self.namespace_labels(pod))
        };
        in_namespace && selects(pods, &pod["metadata"]["labels"])
    }
}

/// The place on the node that has an address.
fn local(address: IpAddr) -> Option<&'static Slot> {
    SLOTS.iter().find(|slot| slot.local && slot.addresses.contains(&address))
}

/// Items of a list; a key that is missing or null has none.
fn items(list: &Value) -> std::slice::Iter<'_, Value> {
    list.as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

/// "A label selector is a label query over a set of resources. The result of matchLabels and matchExpressions are ANDed. An empty
/// label selector matches all objects." Here one that is missing, too, as those that asks say.
fn selects(selector: &Value, labels: &Value) -> bool {
    let has = |key: &str| labels.get(key).and_then(Value::as_str);
    let equal = selector["matchLabels"].as_object();
    let equal = equal.is_none_or(|all| all.iter().all(|(key, value)| has(key) == value.as_str()));
    equal
        && items(&selector["matchExpressions"]).all(|it| {
            let value = has(it["key"].as_str().unwrap_or_default());
            let among = items(&it["values"]).any(|one| value == one.as_str());
            match it["operator"].as_str() {
                Some("In") => value.is_some() && among,
                // Objects without the key match, too.
                Some("NotIn") => value.is_none() || !among,
                Some("Exists") => value.is_some(),
                _ => value.is_none(),
            }
        })
}

fn holds_text(cidr: &Value, address: IpAddr) -> bool {
    cidr.as_str().is_some_and(|cidr| holds(cidr, address))
}

/// True if the address has the bits of the CIDR as far as its length goes.
fn holds(cidr: &str, address: IpAddr) -> bool {
    let Some((network, length)) = cidr.split_once('/') else { return false };
    let (Ok(network), Ok(length)) = (network.parse::<IpAddr>(), length.parse::<u32>()) else { return false };
    match (network, address) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            length == 0 || (one.to_bits() ^ other.to_bits()).checked_shr(32 - length) == Some(0)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => {
            length == 0 || (one.to_bits() ^ other.to_bits()).checked_shr(128 - length) == Some(0)
        }
        _ => false,
    }
}

/// Ports of a pod that have a name, with their protocols. Containers that end before the pod begins listen to nobody.
fn named<'p>(pod: Option<&'p Value>, name: &'p Value) -> impl Iterator<Item = (&'p str, u64)> {
    let containers = pod.map(|pod| items(&pod["spec"]["containers"])).into_iter().flatten();
    let first = pod.map(|pod| items(&pod["spec"]["initContainers"])).into_iter().flatten();
    let containers = containers.chain(first.filter(|it| it["restartPolicy"] == "Always"));
    containers
        .flat_map(|container| items(&container["ports"]))
        .filter(move |port| port["name"] == *name)
        .map(|port| (port["protocol"].as_str().unwrap_or("TCP"), port["containerPort"].as_u64().unwrap_or_default()))
}

/// A port of a NetworkPolicy: "The protocol which traffic must match. If not specified, this field defaults to TCP." "The port on
/// the given protocol. This can either be a numerical or named port on a pod. If this field is not provided, this matches all port
/// names and numbers." endPort: "If set, indicates that the range of ports from port to endPort, inclusive, should be allowed."
fn is_port(port: &Value, side: &Side<'_>) -> bool {
    let protocol = port["protocol"].as_str().unwrap_or("TCP");
    let number = u64::from(side.port);
    protocol == side.protocol
        && match &port["port"] {
            Value::Null => true,
            Value::String(_) => named(side.receiver, &port["port"]).any(|it| it == (protocol, number)),
            first => {
                let first = first.as_u64().unwrap_or_default();
                (first..=port["endPort"].as_u64().unwrap_or(first)).contains(&number)
            }
        }
}

/// A protocol of a ClusterNetworkPolicy. "DestinationNamedPort selects a destination port on a pod based on the ContainerPort name."
fn is_cluster_protocol(wanted: &Value, side: &Side<'_>) -> bool {
    let name = &wanted["destinationNamedPort"];
    let number = u64::from(side.port);
    if !name.is_null() {
        return named(side.receiver, name).any(|it| it == (side.protocol, number));
    }
    let Some(wanted) = wanted.get(side.protocol.to_lowercase()) else { return false };
    let port = &wanted["destinationPort"];
    let range = &port["range"];
    port.is_null()
        || port["number"].as_u64() == Some(number)
        || (!range.is_null() && (range["start"].as_u64()..=range["end"].as_u64()).contains(&Some(number)))
}
