//! What a pass decided, for the log of decisions: told as the difference to the pass before.

use std::collections::BTreeMap;

use husk_dataplane::kernel::Kernel;
use husk_overlay::endpoint::{AttachmentId, Endpoint, Endpoints};
use husk_overlay::issue::{Issue, IssueKind};
use husk_overlay::name::NodeName;
use husk_overlay::plan::{PeerPlan, Plan};
use husk_policy::cluster::pod_name;

use super::{Engine, Node};
use crate::line_log::{Event, Logs};
use crate::source::ClusterSource;

/// The log, and what it knows.
#[derive(Debug, Default)]
pub(super) struct Audit {
    pub(super) logs: Logs,
    /// None before the first pass, which tells nothing: what there was when the daemon started is no news.
    peers: Option<BTreeMap<NodeName, Option<String>>>,
    pods: Option<Endpoints>,
    issues: BTreeMap<(IssueKind, String), Issue>,
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Has decisions logged from now on.
    pub fn log_to(&mut self, logs: Logs) {
        self.audit.logs = logs;
    }

    /// Logs what a pass, or one that was given up, has changed.
    pub(super) fn log_decisions(&mut self, issues: &[Issue]) {
        if !self.audit.logs.wants_decisions() {
            return;
        }
        let logs = self.audit.logs.clone();
        let tell = |events: Vec<Event>| events.into_iter().for_each(|event| logs.decision(|| event));
        // What nobody has listed yet has not left.
        if self.delivered
            && let Some(last) = &self.last
        {
            tell(peers(&mut self.audit.peers, &last.plan));
        }
        if self.leases_known {
            tell(pods(&mut self.audit.pods, &self.leases.endpoints));
        }
        tell(changed_issues(&mut self.audit.issues, issues));
    }
}

fn peers(known: &mut Option<BTreeMap<NodeName, Option<String>>>, plan: &Plan) -> Vec<Event> {
    let Some(before) = known else {
        *known = Some(plan.peers.iter().map(|(name, peer)| (name.clone(), peer.refused.clone())).collect());
        return Vec::new();
    };
    let mut events = Vec::new();
    before.retain(|name, _| {
        let stays = plan.peers.contains_key(name);
        if !stays {
            events.push(Event::PeerLeft { peer: name.clone() });
        }
        stays
    });
    for (name, peer) in &plan.peers {
        if before.get(name) == Some(&peer.refused) {
            continue;
        }
        events.push(joined_or_refused(name, peer));
        before.insert(name.clone(), peer.refused.clone());
    }
    events
}

fn joined_or_refused(name: &NodeName, peer: &PeerPlan) -> Event {
    match &peer.refused {
        Some(reason) => Event::PeerRefused { peer: name.clone(), reason: reason.clone() },
        None => Event::PeerJoined { peer: name.clone(), addresses: peer.address.into_iter().collect() },
    }
}

/// Pods that are gone; those that come are told of when they are admitted.
fn pods(known: &mut Option<Endpoints>, endpoints: &Endpoints) -> Vec<Event> {
    let released = |(id, endpoint): (&AttachmentId, &Endpoint)| Event::PodReleased {
        pod: pod_name(endpoint).to_string(),
        addresses: endpoint.addresses.iter().collect(),
        container: id.container_id.to_string(),
    };
    if known.as_ref() == Some(endpoints) {
        return Vec::new();
    }
    let before = known.replace(endpoints.clone()).unwrap_or_default();
    before.iter().filter(|(id, _)| !endpoints.contains_key(*id)).map(released).collect()
}

/// Issues that have come or gone. One whose words change, as of a number in them, is the same one; one that is more or less severe
/// is told again.
fn changed_issues(known: &mut BTreeMap<(IssueKind, String), Issue>, issues: &[Issue]) -> Vec<Event> {
    let now: BTreeMap<_, _> = issues.iter().map(|issue| ((issue.kind, issue.subject.clone()), issue)).collect();
    let mut events = Vec::new();
    known.retain(|key, issue| {
        let stays = now.contains_key(key);
        if !stays {
            events.push(Event::IssueCleared { issue: issue.clone() });
        }
        stays
    });
    for (key, issue) in now {
        if known.get(&key).is_some_and(|before| before.severity == issue.severity) {
            continue;
        }
        events.push(Event::IssueRaised { issue: issue.clone() });
        known.insert(key, issue.clone());
    }
    events
}

#[cfg(test)]
mod tests {
    use husk_overlay::issue::Severity;

    use super::*;

    #[test]
    fn an_issue_that_becomes_more_severe_is_told_again_and_cleared_as_what_it_was_last() {
        let issue = |severity, message: &str| Issue {
            severity,
            kind: IssueKind::PathMtu,
            subject: "node-1".into(),
            message: message.into(),
            remedy: String::new(),
        };
        let mut known = BTreeMap::new();
        let warning = issue(Severity::Warning, "1300 bytes");
        let raised = |issue: &Issue| vec![Event::IssueRaised { issue: issue.clone() }];
        assert_eq!(changed_issues(&mut known, std::slice::from_ref(&warning)), raised(&warning));
        assert_eq!(changed_issues(&mut known, &[issue(Severity::Warning, "1200 bytes")]), []);
        let error = issue(Severity::Error, "none");
        assert_eq!(changed_issues(&mut known, std::slice::from_ref(&error)), raised(&error));
        assert_eq!(changed_issues(&mut known, std::slice::from_ref(&error)), []);
        assert_eq!(changed_issues(&mut known, &[]), [Event::IssueCleared { issue: error }]);
    }
}
