//! Pods: of the whole object only what policy needs, so that a list of thousands stays small while it is read.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::place::{Fault, Spot};
use super::{Object, Reading, Scope, named};
use crate::object::{NamedPort, ObjectName, Pod, Protocol};
use crate::selector::Labels;

/// As much of a `Pod` object (`v1`) as policy needs.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct PodObject {
    /// `metadata`
    pub metadata: PodMetadata,
    /// `spec`
    #[serde(default, deserialize_with = "or_default")]
    pub spec: PodSpec,
    /// `status`
    #[serde(default, deserialize_with = "or_default")]
    pub status: PodStatus,
}

/// As much of its metadata.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodMetadata {
    /// Name.
    #[serde(default)]
    pub name: Option<String>,
    /// Namespace.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Identity.
    #[serde(default)]
    pub uid: Option<String>,
    /// Version of the object, for who watches.
    #[serde(default)]
    pub resource_version: Option<String>,
    /// Labels.
    #[serde(default, deserialize_with = "or_default")]
    pub labels: Labels,
    /// Annotations.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: PodAnnotations,
}

/// Annotations by which a kubelet says which pod a mirror pod stands for: the static pod's uid, as the kubelet gives it to runtimes
/// (Kubernetes, pkg/kubelet/types: `ConfigMirrorAnnotationKey`, `ConfigHashAnnotationKey`).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct PodAnnotations {
    #[serde(default, rename = "kubernetes.io/config.mirror")]
    mirror: Option<String>,
    #[serde(default, rename = "kubernetes.io/config.hash")]
    hash: Option<String>,
}

/// As much of its specification.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    host_network: bool,
    #[serde(default, deserialize_with = "or_default")]
    containers: Vec<Container>,
    #[serde(default, deserialize_with = "or_default")]
    init_containers: Vec<Container>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default)]
    restart_policy: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    ports: Vec<ContainerPort>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    protocol: Option<String>,
    container_port: u16,
}

/// As much of its status.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    #[serde(default)]
    phase: Option<String>,
    #[serde(default, rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(default, rename = "podIPs", deserialize_with = "or_default")]
    pod_ips: Vec<PodIp>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: Option<String>,
}

/// Null is what a missing key is.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl PodObject {
    /// The name and what policy knows of the pod; none of one without a name, which no API server sends.
    #[must_use]
    pub fn kept(self) -> Option<(ObjectName, Pod)> {
        let namespace = self.metadata.namespace.as_deref().unwrap_or(super::DEFAULT_NAMESPACE);
        let name = ObjectName::new(namespace, self.metadata.name.as_deref()?);
        Some((name, self.pod()))
    }

    fn pod(self) -> Pod {
        let PodMetadata { uid, annotations, labels, .. } = self.metadata;
        let uids = [uid, annotations.mirror, annotations.hash].into_iter().flatten().filter(|uid| !uid.is_empty());
        // Containers that are started before the others and run on have ports too; what ends before the pod begins has none.
        let sidecars =
            self.spec.init_containers.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let ports = self.spec.containers.iter().chain(sidecars).flat_map(|container| &container.ports);
        let addresses = self.status.pod_ips.iter().filter_map(|it| it.ip.as_deref());
        let addresses = addresses.chain(self.status.pod_ip.as_deref());
        let finished = self.status.phase.is_some_and(|phase| phase == "Succeeded" || phase == "Failed");
        Pod {
            uids: uids.collect(),
            labels,
            node: self.spec.node_name.filter(|node| !node.is_empty()),
            host_network: self.spec.host_network,
            finished,
            addresses: addresses.filter_map(address).collect(),
            ports: ports.filter_map(named_port).collect::<BTreeSet<NamedPort>>(),
        }
    }
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

fn named_port(port: &ContainerPort) -> Option<NamedPort> {
    let name = port.name.clone().filter(|name| !name.is_empty())?;
    let protocol = match port.protocol.as_deref() {
        None | Some("") => Protocol::default(),
        Some(given) => Protocol::ALL.into_iter().find(|protocol| protocol.to_string() == given)?,
    };
    Some(NamedPort { name, protocol, port: port.container_port })
}

pub(super) fn read(object: &Value) -> Reading {
    named("Pod", object, Scope::Namespace, |name, _| {
        let pod = PodObject::deserialize(object).map_err(|error| unreadable(object, &error))?;
        Ok(Object::Pod(name, Arc::new(pod.pod())))
    })
}

/// A pod that is not known is no peer of anybody, and what belongs to it is closed.
fn unreadable(object: &Value, error: &serde_json::Error) -> Fault {
    Spot::root("Pod", object).fault(format!("it cannot be read: {error}"), "correct the manifest of the pod")
}
