//! Events of the own `Node` object.
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

/// Where events of objects without a namespace belong.
const NAMESPACE: &str = "default";

/// Longest text of an event in bytes (k8s.io/kubernetes pkg/apis/core/validation/events.go, `NoteLengthLimit`).
const LONGEST_MESSAGE: usize = 1024;

/// Events that are remembered, so as to be counted rather than made anew; with more, all are forgotten.
const REMEMBERED: usize = 256;

/// Makes events.
pub(super) struct Events {
    api: Api<Event>,
    node: NodeName,
    /// Name and count of the events made, by kind and subject of the issue: numbers in a message may change all the time.
    made: BTreeMap<(IssueKind, String), (String, i32)>,
}

impl Events {
    pub(super) fn new(client: Client, node: NodeName) -> Self {
        Self { api: Api::namespaced(client, NAMESPACE), node, made: BTreeMap::new() }
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
        // Names have 253 bytes at most, as the node's own may have.
        let node: String = self.node.as_str().chars().take(200).collect();
        let name = format!("{}.{:x}", node.trim_end_matches(['.', '-']), now.as_nanosecond());
        bounded(self.api.create(&PostParams::default(), &self.event(&name, issue.kind, message, now))).await?;
        if self.made.len() >= REMEMBERED {
            self.made.clear();
        }
        self.made.insert(about, (name, 1));
        Ok(())
    }

    fn event(&self, name: &str, kind: IssueKind, message: String, now: Timestamp) -> Event {
        let node = self.node.to_string();
        Event {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(NAMESPACE.into()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(node.clone()),
                // As the kubelet does it, and `kubectl describe node` looks for it.
                uid: Some(node.clone()),
                ..ObjectReference::default()
            },
            type_: Some("Warning".into()),
            reason: Some(format!("{kind:?}")),
            message: Some(message),
            source: Some(EventSource { component: Some("husk".into()), host: Some(node) }),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            ..Event::default()
        }
    }
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
