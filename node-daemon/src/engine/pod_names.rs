//! How people name pods: by namespace and name, by name alone in the namespace `default`, or by an address.

use std::net::IpAddr;

use husk_policy::cluster::{Cluster, DEFAULT_NAMESPACE};
use husk_policy::object::{ObjectName, Pod};

/// What somebody has named.
pub(super) enum Named {
    /// A pod that the node knows, of whichever node it is; without its object where the source has not told of it.
    Pod(ObjectName, Option<Pod>),
    /// An address that is no pod's.
    Address(IpAddr),
}

/// Finds what a text names.
///
/// # Errors
/// When no such pod is known.
pub(super) fn find(cluster: &Cluster, text: &str) -> Result<Named, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(match cluster.owner(address) {
            Some((name, pod)) => Named::Pod(name.clone(), Some(pod.clone())),
            None => Named::Address(address),
        });
    }
    let (namespace, name) = text.split_once('/').unwrap_or((DEFAULT_NAMESPACE, text));
    let name = ObjectName::new(namespace, name);
    if let Some(local) = cluster.local().get(&name) {
        return Ok(Named::Pod(name, Some(local.pod.as_ref().clone())));
    }
    let known = cluster.objects().pods.get(&name).map(|pod| pod.as_ref().clone());
    if known.is_some() || cluster.is_unknown_pod(&name) {
        return Ok(Named::Pod(name, known));
    }
    // The name alone may be that of one pod in another namespace.
    let others = cluster.objects().pods.keys().chain(cluster.local().keys()).filter(|it| it.name == name.name);
    let mut others: Vec<String> = others.map(ToString::to_string).collect();
    others.sort();
    others.dedup();
    let hint = match others.as_slice() {
        [] => format!(
            "huskctl policy list and huskctl ipam show name its own. If it is another node's, give its address (kubectl get pod -n {} {} -o wide), or \
             ask on that node",
            name.namespace, name.name
        ),
        others => format!("do you mean {}?", others.join(" or ")),
    };
    Err(format!("no pod {name} is known on this node; {hint}"))
}
