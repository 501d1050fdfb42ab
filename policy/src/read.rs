//! From objects as JSON, of an API server or of a file, to the [objects of policy](crate::object).
//!
//! Everything of a policy that is invalid, unknown or not supported is closed, exactly there, and an
//! [`Issue`] tells field, value, reason, what is done instead and what a person can do:
//!
//! | not understood | becomes |
//! |---|---|
//! | a peer or a port of a NetworkPolicy | one that matches nothing |
//! | something else in a rule of a NetworkPolicy | a rule that matches nothing |
//! | its `policyTypes` | isolation in both directions; rules count for those that are named |
//! | its `podSelector` | every pod of the namespace, and no rule: rules may be meant for others only |
//! | something else in its `spec` | isolation in both directions without any rule |
//! | anything in a rule of a ClusterNetworkPolicy that accepts | no rule |
//! | anything in a rule that denies or passes, or has no known action | a rule that denies everything |
//! | its `subject`, `tier`, `priority` | every pod; `Admin`; 0 |
//! | these, or something else in its `spec` | besides, its rules that accept are left out, and those that pass deny |
//!
//! The rules of ClusterNetworkPolicies are those of its specification ("fail closed", network-policy-api, v1alpha2). A rule that
//! passes must deny where the policy's place is unclear: passing may open, by what it skips, and so may its absence.
//!
//! Reading order: `place` is how values are read and faults are told; `values` and `selector` the parts that several kinds have;
//! then one module per kind; [`collect`] puts readings together.

mod cluster_policy;
pub mod collect;
mod network_policy;
mod place;
pub mod pod;
mod selector;
mod values;

use std::sync::Arc;

use husk_overlay::issue::Issue;
use serde_json::Value;

use self::place::{Fault, Faults, Spot};
use crate::object::{ClusterNetworkPolicy, NAMESPACE_NAME_LABEL, NetworkPolicy, ObjectName, Pod};
use crate::selector::Labels;

/// Namespace of an object that names none (`metav1.NamespaceDefault`, which `kubectl` takes too).
const DEFAULT_NAMESPACE: &str = "default";

/// Group of ClusterNetworkPolicies.
const CLUSTER_POLICY_GROUP: &str = "policy.networking.k8s.io";

/// Versions of ClusterNetworkPolicies that are read. Their forms are the same.
pub const CLUSTER_POLICY_VERSIONS: [&str; 2] = ["v1alpha2", "v1beta1"];

/// An object of policy. What is large is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A namespace with its labels, the one with its name among them.
    Namespace(String, Labels),
    /// A pod.
    Pod(ObjectName, Arc<Pod>),
    /// A NetworkPolicy.
    NetworkPolicy(ObjectName, Arc<NetworkPolicy>),
    /// A ClusterNetworkPolicy.
    ClusterNetworkPolicy(String, Arc<ClusterNetworkPolicy>),
}

/// What an object says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// The object; none if it is not one of policy, or has no name to know it by.
    pub object: Option<Object>,
    /// What of it could not be understood.
    pub issues: Vec<Issue>,
}

/// Reads an object. Those that have nothing to do with policy are nothing.
#[must_use]
pub fn read(object: &Value) -> Reading {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    match (group, version, kind) {
        ("", "v1", "Pod") => pod::read(object),
        ("", "v1", "Namespace") => named(kind, object, Scope::Cluster, |name, _| {
            let labels = read_labels(object)?;
            Ok(namespace(&name.name, labels))
        }),
        ("networking.k8s.io", "v1", "NetworkPolicy") => named(kind, object, Scope::Namespace, |name, faults| {
            let policy = network_policy::read(&name.namespace, object.get("spec"), faults);
            Ok(Object::NetworkPolicy(name, Arc::new(policy)))
        }),
        (CLUSTER_POLICY_GROUP, version, "ClusterNetworkPolicy") if CLUSTER_POLICY_VERSIONS.contains(&version) => {
            named(kind, object, Scope::Cluster, |name, faults| {
                let policy = cluster_policy::read(object.get("spec"), faults);
                Ok(Object::ClusterNetworkPolicy(name.name, Arc::new(policy)))
            })
        }
        ("networking.k8s.io", _, "NetworkPolicy") | (CLUSTER_POLICY_GROUP, _, _) => {
            named(kind, object, Scope::Cluster, |_, _| Err(unsupported(kind, &object["apiVersion"])))
        }
        _ => Reading::default(),
    }
}

/// A namespace as it is known: with its name as a label, which nobody can give another value.
#[must_use]
pub fn namespace(name: &str, mut labels: Labels) -> Object {
    labels.insert(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned());
    Object::Namespace(name.to_owned(), labels)
}

fn unsupported(kind: &str, api_version: &Value) -> Fault {
    let known = format!(
        "NetworkPolicy of networking.k8s.io/v1 or ClusterNetworkPolicy of {CLUSTER_POLICY_GROUP}/{}",
        CLUSTER_POLICY_VERSIONS[0]
    );
    let remedy = format!("write it as {known}, or upgrade Husk");
    Spot::root("apiVersion", api_version).fault(format!("Husk reads no {kind:?} of this version"), remedy)
}

enum Scope {
    Namespace,
    Cluster,
}

/// Reads an object by its name. The closure fails where nothing can be made of the object at all.
fn named(
    kind: &str,
    object: &Value,
    scope: Scope,
    read: impl FnOnce(ObjectName, &mut Faults) -> Result<Object, Fault>,
) -> Reading {
    let none = Value::Null;
    let metadata = Spot::root("metadata", object.get("metadata").unwrap_or(&none));
    let name = || -> Result<ObjectName, Fault> {
        let metadata = metadata.map()?;
        let name = metadata.required("name")?.name()?;
        let namespace = match scope {
            Scope::Cluster => "",
            Scope::Namespace => match metadata.get("namespace") {
                Some(namespace) => namespace.name()?,
                None => DEFAULT_NAMESPACE,
            },
        };
        Ok(ObjectName::new(namespace, name))
    };
    let left_out = "the object is left out, and nothing of it is in force";
    let (object, faults) = match name() {
        Ok(name) => {
            let shown = if name.namespace.is_empty() { name.name.clone() } else { name.to_string() };
            let mut faults = Faults::new(format!("{kind} {shown}"));
            let object = read(name, &mut faults);
            (faults.settle(object, left_out), faults)
        }
        Err(fault) => {
            let mut faults = Faults::new(kind.to_owned());
            faults.add(fault, left_out);
            (None, faults)
        }
    };
    Reading { object, issues: faults.into_issues() }
}

fn read_labels(object: &Value) -> Result<Labels, Fault> {
    let none = Value::Null;
    let metadata = Spot::root("metadata", object.get("metadata").unwrap_or(&none));
    let metadata = metadata.map()?;
    let Some(labels) = metadata.get("labels") else { return Ok(Labels::new()) };
    let labels = labels.map()?;
    labels.entries().map(|(key, value)| Ok((key.to_owned(), value.text()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests;
