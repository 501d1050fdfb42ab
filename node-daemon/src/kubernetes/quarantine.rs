//! Which pods of the node are cut off, and which of that is news: whether their label or a request changed it makes no
//! difference.

use std::collections::BTreeSet;

use husk_policy::object::ObjectName;

use crate::engine::State;

/// What is known of pods that are cut off.
#[derive(Debug, Default)]
pub(super) struct Quarantined {
    /// None before the first look: a daemon that starts anew has no news of what was before it.
    pods: Option<BTreeSet<ObjectName>>,
}

/// News of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) pod: ObjectName,
    /// Of the pod's object.
    pub(super) uid: Option<String>,
    /// It is cut off now.
    pub(super) on: bool,
}

impl Quarantined {
    /// What has changed since the last look.
    pub(super) fn changes(&mut self, state: &State) -> Vec<Change> {
        // After a pass that was given up nothing is known of pods.
        if !state.enforces_policy {
            return Vec::new();
        }
        let local = state.cluster.local();
        let now: BTreeSet<ObjectName> =
            local.iter().filter(|(_, pod)| pod.quarantined).map(|(name, _)| name.clone()).collect();
        let Some(before) = self.pods.replace(now.clone()) else { return Vec::new() };
        // A pod that is gone was not let onto the network.
        let changed = before.symmetric_difference(&now).filter_map(|pod| {
            let uid = local.get(pod)?.pod.uids.first().cloned();
            Some(Change { pod: pod.clone(), uid, on: now.contains(pod) })
        });
        changed.collect()
    }
}

impl Change {
    /// Reason of the Event.
    pub(super) fn reason(&self) -> &'static str {
        if self.on { "Quarantined" } else { "QuarantineReleased" }
    }

    /// Text of the Event.
    pub(super) fn message(&self, node: &husk_overlay::name::NodeName) -> String {
        if self.on {
            format!(
                "node {node} has cut the pod off from the network; huskctl quarantine --list there tells by whom, and \
                 huskctl quarantine {} --release ends it where that was by request",
                self.pod
            )
        } else {
            format!("node {node} has let the pod onto the network again, as far as policy lets it")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use husk_overlay::endpoint::Endpoint;
    use husk_policy::cluster::{Cluster, Membership, Quarantine};
    use husk_policy::object::Objects;

    use super::*;

    /// A node with these pods, of which some are cut off.
    fn state(pods: &[&str], cut_off: &[&str]) -> State {
        let endpoint = |name: &&str| {
            let endpoint: Endpoint = serde_json::from_value(serde_json::json!({
                "network": "husk", "containerId": name, "ifname": "eth0", "podName": name, "podNamespace": "shop",
                "hostInterface": "husk0123456789a", "netns": {"path": "/run/netns/a", "device": 4, "inode": 7},
                "addresses": {"ipv4": "10.0.0.1", "ipv6": null}, "podMac": "02:00:00:00:00:01",
            }))
            .unwrap();
            (endpoint.id.clone(), endpoint)
        };
        let endpoints = pods.iter().map(endpoint).collect();
        let pods = cut_off.iter().map(|name| ObjectName::new("shop", name)).collect();
        let asked = Quarantine { pods, ..Quarantine::default() };
        let cluster = Cluster::new(Arc::new(Objects::default()), &endpoints, Membership::Optional, &asked);
        State { enforces_policy: true, cluster: Arc::new(cluster), ..State::default() }
    }

    #[test]
    fn what_changes_is_news_and_what_was_there_or_went_is_not() {
        let mut known = Quarantined::default();
        let mut look = |state: &State| {
            let changes = known.changes(state);
            changes.into_iter().map(|it| (it.pod.name.clone(), it.on)).collect::<Vec<_>>()
        };
        assert_eq!(look(&state(&["a", "b", "c"], &["a"])), [], "it was so before the daemon began");
        assert_eq!(
            look(&state(&["a", "b", "c"], &["b", "c"])),
            [("a".into(), false), ("b".into(), true), ("c".into(), true)]
        );
        assert_eq!(look(&State::default()), [], "nothing is known of pods after a pass that was given up");
        assert_eq!(look(&state(&["a", "b", "c"], &["b", "c"])), []);
        assert_eq!(look(&state(&["a", "c"], &["b", "c"])), [], "the pod is gone");
    }
}
