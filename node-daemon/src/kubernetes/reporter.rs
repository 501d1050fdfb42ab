//! What a node tells Kubernetes about itself: the status of its record, Events for issues, and that its network is there.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use husk_overlay::issue::Issue;
use husk_overlay::name::NodeName;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
// The generation of jiff that the types of Kubernetes are made of.
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{Failure, bounded};
use super::events::Events;
use super::objects::{OverlayNode, OverlayNodeStatus};
use super::quarantine::{Change, Quarantined};
use super::source::FIELD_MANAGER;
use crate::engine::State;

/// How long a state has to last before it is told: passes come many a second, and what heals at once is no news.
const SETTLE: Duration = Duration::from_secs(1);

/// How long to wait after the API server did not take what was told, and how often to look whether it still has it.
const RETRY: Duration = Duration::from_secs(5);
const REFRESH: Duration = Duration::from_secs(60);

/// Events within a minute; further ones wait. An issue is in the status of the record and in `huskctl status` anyway.
const EVENTS_PER_MINUTE: usize = 20;

/// What of a state is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    ready: bool,
    reason: Option<String>,
    issues: Vec<Issue>,
}

/// Tells Kubernetes how the node is.
pub struct Reporter {
    node: NodeName,
    records: Api<OverlayNode>,
    nodes: Api<Node>,
    events: Events,
    states: watch::Receiver<State>,
    /// What Kubernetes was told last, and when.
    told: Option<Told>,
    refreshed: Option<Instant>,
    /// Issues that have had their Event.
    with_event: BTreeSet<Issue>,
    quarantined: Quarantined,
    /// News of pods that have not had their Event.
    untold: VecDeque<Change>,
    /// Telling failed the last time, and the log says so.
    failing: bool,
    /// When Events were sent, within the last minute.
    sent: VecDeque<Instant>,
    /// Issues of the configuration, which the loop does not know of.
    config: watch::Receiver<Option<Issue>>,
}

impl Reporter {
    /// A reporter of a node's states.
    #[must_use]
    pub fn new(
        client: Client,
        node: NodeName,
        states: watch::Receiver<State>,
        config: watch::Receiver<Option<Issue>>,
    ) -> Self {
        Self {
            records: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            events: Events::new(client, node.clone()),
            node,
            states,
            told: None,
            refreshed: None,
            with_event: BTreeSet::new(),
            quarantined: Quarantined::default(),
            untold: VecDeque::new(),
            failing: false,
            sent: VecDeque::new(),
            config,
        }
    }

    /// Reports until the daemon ends.
    pub async fn run(mut self) {
        loop {
            match self.report().await {
                Ok(()) => self.failing = false,
                Err(failure) => {
                    if !self.failing {
                        tracing::warn!(%failure, "the node's state could not be told to Kubernetes; it is tried again");
                    }
                    self.failing = true;
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return },
                Ok(()) = self.config.changed() => {}
                () = tokio::time::sleep(REFRESH) => {}
            }
            tokio::time::sleep(SETTLE).await;
        }
    }

    async fn report(&mut self) -> Result<(), Failure> {
        let state = self.states.borrow_and_update().clone();
        if state.passes == 0 {
            return Ok(());
        }
        self.untold.extend(self.quarantined.changes(&state));
        self.tell_quarantine().await?;
        let issues = told_by_each(&state.issues, self.config.borrow_and_update().clone());
        // Most passes change nothing of what is told, and a cluster has many nodes: nothing is asked then.
        let now = Told { reason: state.reason.clone().filter(|_| !state.ready), issues, ready: state.ready };
        let fresh = self.refreshed.is_some_and(|at| at.elapsed() < REFRESH);
        if fresh && self.told.as_ref() == Some(&now) {
            return Ok(());
        }
        // Events come last: where they are limited, the rest is told all the same.
        if now.ready {
            self.clear_network_unavailable().await?;
        }
        self.update_status(&state, now.issues.len()).await?;
        self.tell_issues(&now.issues).await?;
        self.told = Some(now);
        self.refreshed = Some(Instant::now());
        Ok(())
    }

    async fn tell_quarantine(&mut self) -> Result<(), Failure> {
        while let Some(change) = self.untold.front() {
            if !may_send(&mut self.sent, Instant::now()) {
                // There will be room within a minute, and another look.
                return Ok(());
            }
            match self.events.tell_quarantine(change).await {
                // An answer that would be the same the next time must not hold up everything else.
                Err(failure) if failure.code.is_some() => {
                    tracing::warn!(%failure, pod = %change.pod, "the quarantine of a pod could not be told to Kubernetes");
                }
                other => other?,
            }
            self.untold.pop_front();
        }
        Ok(())
    }

    async fn tell_issues(&mut self, issues: &[Issue]) -> Result<(), Failure> {
        self.with_event.retain(|issue| issues.contains(issue));
        for issue in issues {
            if self.with_event.contains(issue) {
                continue;
            }
            if !may_send(&mut self.sent, Instant::now()) {
                return Ok(());
            }
            self.events.tell(issue).await?;
            self.with_event.insert(issue.clone());
        }
        Ok(())
    }

    /// Clouds say of a new node that its network is unavailable, and let no pod on it until the network says otherwise.
    async fn clear_network_unavailable(&self) -> Result<(), Failure> {
        let Some(node) = bounded(self.nodes.get_opt(self.node.as_str())).await? else { return Ok(()) };
        let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
        if conditions.iter().any(|it| it.type_ == "NetworkUnavailable" && it.status == "False") {
            return Ok(());
        }
        let now = Timestamp::now();
        let condition = json!({
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "HuskIsReady",
            "message": "Husk is ready on this node",
            "lastTransitionTime": Time(now),
            "lastHeartbeatTime": Time(now),
        });
        let patch = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
        bounded(self.nodes.patch_status(self.node.as_str(), &PatchParams::default(), &patch)).await.map(drop)
    }

    async fn update_status(&self, state: &State, issues: usize) -> Result<(), Failure> {
        // Before the record there is nothing whose status it could be.
        let Some(record) = bounded(self.records.get_opt(self.node.as_str())).await? else { return Ok(()) };
        let now = status(state, issues, record.metadata.generation, record.status.as_ref());
        if record.status.as_ref() == Some(&now) {
            return Ok(());
        }
        let patch = json!({ "status": now });
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        bounded(self.records.patch_status(self.node.as_str(), &parameters, &Patch::Merge(&patch))).await.map(drop)
    }
}

/// What each node tells of its issues. What all nodes find out about one of them is left out, of the Events as of the number in the
/// record's status: a node that goes away would have every other write both, and the API server send each record to every watcher,
/// which is 25 million messages among 5,000 nodes. `huskctl status`, the metrics and the log have it; of a node that is gone, its own
/// `Node` object tells.
fn told_by_each(issues: &[Issue], of_config: Option<Issue>) -> Vec<Issue> {
    issues.iter().cloned().chain(of_config).filter(|issue| !issue.kind.is_seen_by_all()).collect()
}

/// True if another Event may be sent now; it counts as sent then.
fn may_send(sent: &mut VecDeque<Instant>, now: Instant) -> bool {
    while sent.front().is_some_and(|sent| now.duration_since(*sent) > Duration::from_secs(60)) {
        sent.pop_front();
    }
    let may = sent.len() < EVENTS_PER_MINUTE;
    if may {
        sent.push_back(now);
    }
    may
}

/// The status of a record; what did not change keeps its time.
fn status(
    state: &State,
    issues: usize,
    generation: Option<i64>,
    before: Option<&OverlayNodeStatus>,
) -> OverlayNodeStatus {
    let value = if state.ready { "True" } else { "False" };
    let old = before.and_then(|status| status.conditions.iter().find(|condition| condition.type_ == "Ready"));
    let since = old.filter(|old| old.status == value).map(|old| old.last_transition_time.clone());
    let ready = Condition {
        type_: "Ready".into(),
        status: value.into(),
        reason: if state.ready { "PodsCanBeAdded" } else { "PodsHaveToWait" }.into(),
        // Never empty: the types leave an empty one out, and the definition of the kind asks for it.
        message: state.reason.clone().unwrap_or_else(|| "the node's network is as it should be".into()),
        last_transition_time: since.unwrap_or_else(|| Time(Timestamp::now())),
        observed_generation: generation,
    };
    OverlayNodeStatus {
        conditions: vec![ready],
        issues: i32::try_from(issues).ok(),
        pod_mtu: state.node_file.as_ref().and_then(|file| i32::try_from(file.pod_mtu).ok()),
        version: Some(env!("CARGO_PKG_VERSION").into()),
    }
}

#[cfg(test)]
mod tests {
    use husk_overlay::issue::{IssueKind, Severity};

    use super::*;

    #[test]
    fn a_node_that_goes_away_makes_no_other_write() {
        let issue = |kind| Issue {
            severity: Severity::Error,
            kind,
            subject: "s".into(),
            message: "m".into(),
            remedy: "r".into(),
        };
        let issues = [issue(IssueKind::PathMtu), issue(IssueKind::PeerSilent)];
        let told = told_by_each(&issues, Some(issue(IssueKind::BadConfig)));
        assert_eq!(told.iter().map(|it| it.kind).collect::<Vec<_>>(), [IssueKind::PathMtu, IssueKind::BadConfig]);
        // Nothing at all is asked where what is told stays the same.
        assert_eq!(told_by_each(&issues[1..], None), told_by_each(&[], None));
    }

    #[test]
    fn a_status_that_did_not_change_keeps_its_time() {
        let state = State { ready: true, passes: 1, ..State::default() };
        let first = status(&state, 0, Some(1), None);
        assert_eq!(status(&state, 0, Some(1), Some(&first)), first);
        let other = status(
            &State { ready: false, reason: Some("why".into()), passes: 2, ..State::default() },
            2,
            Some(1),
            Some(&first),
        );
        assert_eq!((other.conditions[0].status.as_str(), other.conditions[0].message.as_str()), ("False", "why"));
        assert_eq!(other.issues, Some(2));
    }
}
