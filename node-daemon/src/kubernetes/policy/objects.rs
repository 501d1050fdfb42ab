//! From objects of the API server to what is kept of them.

use std::sync::Arc;

use husk_policy::object::{ObjectName, Pod};
use husk_policy::read::pod::PodObject;
use husk_policy::read::{self, Object, Reading};
use husk_policy::selector::Labels;
use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::{ApiResource, DynamicObject};
use serde::Deserialize;
use serde_json::{Value, json};

/// As much of a `Pod` as is needed: ten thousand of them may arrive in one list.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = "v1::Pod")]
#[serde(from = "PodObject")]
pub(super) struct WatchedPod {
    /// What a watcher needs.
    metadata: ObjectMeta,
    object: PodObject,
}

impl From<PodObject> for WatchedPod {
    fn from(mut object: PodObject) -> Self {
        let metadata = ObjectMeta {
            name: object.metadata.name.clone(),
            namespace: object.metadata.namespace.clone(),
            resource_version: object.metadata.resource_version.take(),
            ..ObjectMeta::default()
        };
        Self { metadata, object }
    }
}

impl WatchedPod {
    pub(super) fn kept(self) -> Option<(ObjectName, Arc<Pod>)> {
        let (name, pod) = self.object.kept()?;
        Some((name, Arc::new(pod)))
    }
}

/// As much of a `Namespace` as is needed.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = "v1::Namespace")]
pub(super) struct WatchedNamespace {
    metadata: ObjectMeta,
}

impl WatchedNamespace {
    pub(super) fn kept(self) -> Option<(String, Labels)> {
        match read::namespace(&self.metadata.name?, self.metadata.labels.unwrap_or_default()) {
            Object::Namespace(name, labels) => Some((name, labels)),
            _ => None,
        }
    }
}

/// Name and content of a policy. Items of a list do not say what they are.
pub(super) fn policy(object: DynamicObject, resource: &ApiResource) -> Option<(ObjectName, Reading)> {
    let name = ObjectName::new(object.metadata.namespace.as_deref().unwrap_or_default(), &object.metadata.name?);
    let metadata = match object.metadata.namespace {
        Some(namespace) => json!({ "namespace": namespace, "name": name.name }),
        None => json!({ "name": name.name }),
    };
    let spec = object.data.get("spec").cloned().unwrap_or(Value::Null);
    let reading = read::read(&json!({
        "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "spec": spec,
    }));
    Some((name, reading))
}
