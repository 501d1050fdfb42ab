//! Events of the own `Node` object and of its pods.
//!
//! In the older form (`v1`), as the kubelet's are: versions of Kubernetes differ in which namespace an event of the newer form
//! (`events.k8s.io`) about an object without one may be in, and `kubectl describe node` looks for neither of them everywhere.

use std::collections::BTreeMap;

use husk_overlay::issue::{Issue, IssueKind};
use husk_overlay::name::NodeName;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use super::client::{Failure, bounded};
use super::quarantine::Change;

/// Where events of objects without a namespace belong.
const NAMESPACE: &str = "default";

/// Longest text of an event in bytes (k8s.io/kubernetes pkg/apis/core/validation/events.go, `NoteLengthLimit`).
const LONGEST_MESSAGE: usize = 1024;

/// Events that are remembered, so as to be counted rather than made anew; with more, all are forgotten.
const REMEMBERED: usize = 256;

/// Makes events.
pub(super) struct Events {
    client: Client,
    api: Api<Event>,
    node: NodeName,
    /// Name and count of the events made, by kind and subject of the issue: numbers in a message may change all the time.
    made: BTreeMap<(IssueKind, String), (String, i32)>,
}

impl Events {
    pub(super) fn new(client: Client, node: NodeName) -> Self {
        Self { api: Api::namespaced(client.clone(), NAMESPACE), client, node, made: BTreeMap::new() }
    }

    /// Tells an issue. One that was told before is counted in the event there is.
    pub(super) async fn tell(&mut self, issue: &Issue) -> Result<(), Failure> {
        let now = Timestamp::now();
        let about = (issue.kind, issue.subject.clone());
        let message = shortened(&issue.to_string(), LONGEST_MESSAGE);
        if let Some((name, count)) = self.made.get_mut(&about) {
            let patch = json!({ "count": *count + 1, "lastTimestamp": Time(now), "message": message });
            let patch = Patch::Merge(patch);
            match bounded(self.api.patch(name, &PatchParams::default(), &patch)).await {
                Ok(_) => {
                    *count += 1;
                    return Ok(());
                }
                // Events live for an hour.
                Err(failure) if failure.is_not_found() => {}
                Err(failure) => return Err(failure),
            }
        }
        let told = Told { about: self.own_node(), warning: true, reason: format!("{:?}", issue.kind), message };
        let event = self.event(told, now);
        let name = event.metadata.name.clone().unwrap_or_default();
        bounded(self.api.create(&PostParams::default(), &event)).await?;
        if self.made.len() >= REMEMBERED {
            self.made.clear();
        }
        self.made.insert(about, (name, 1));
        Ok(())
    }

    /// Tells that a pod was cut off, or is so no more: of the pod, or where the daemon may make no events in its namespace, of
    /// the node.
    pub(super) async fn tell_quarantine(&self, change: &Change) -> Result<(), Failure> {
        let now = Timestamp::now();
        let message = change.message(&self.node);
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(change.pod.namespace.clone()),
            name: Some(change.pod.name.clone()),
            uid: change.uid.clone(),
            ..ObjectReference::default()
        };
        let told = |about, message: &str| Told {
            about,
            warning: change.on,
            reason: change.reason().into(),
            message: shortened(message, LONGEST_MESSAGE),
        };
        let of_namespace = Api::<Event>::namespaced(self.client.clone(), &change.pod.namespace);
        let event = self.event(told(about, &message), now);
        match bounded(of_namespace.create(&PostParams::default(), &event)).await {
            Err(failure) if failure.is_forbidden() => {
                let event = self.event(told(self.own_node(), &format!("pod {}: {message}", change.pod)), now);
                bounded(self.api.create(&PostParams::default(), &event)).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    fn own_node(&self) -> ObjectReference {
        let node = self.node.to_string();
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.clone()),
            // As the kubelet does it, and `kubectl describe node` looks for it.
            uid: Some(node),
            ..ObjectReference::default()
        }
    }

    fn event(&self, Told { about, warning, reason, message }: Told, now: Timestamp) -> Event {
        // Names have 253 bytes at most, as those of nodes and pods may have.
        let object: String = about.name.as_deref().unwrap_or_default().chars().take(200).collect();
        let name = format!("{}.{:x}", object.trim_end_matches(['.', '-']), now.as_nanosecond());
        Event {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: Some(about.namespace.clone().unwrap_or_else(|| NAMESPACE.into())),
                ..ObjectMeta::default()
            },
            involved_object: about,
            type_: Some(if warning { "Warning" } else { "Normal" }.into()),
            reason: Some(reason),
            message: Some(message),
            source: Some(EventSource { component: Some("husk".into()), host: Some(self.node.to_string()) }),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            ..Event::default()
        }
    }
}

/// What an event tells.
struct Told {
    about: ObjectReference,
    warning: bool,
    reason: String,
    message: String,
}

/// At most this many bytes.
fn shortened(text: &str, longest: usize) -> String {
    const MORE: &str = "…";
    if text.len() <= longest {
        return text.to_owned();
    }
    let mut end = longest - MORE.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{MORE}", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_fits_what_kubernetes_takes() {
        assert_eq!(shortened("short", 5), "short");
        assert_eq!(shortened("longer", 5), "lo…");
        let cut = shortened(&"ä".repeat(1000), LONGEST_MESSAGE);
        assert!(cut.len() <= LONGEST_MESSAGE && cut.ends_with("ä…"), "{cut}");
    }
}
