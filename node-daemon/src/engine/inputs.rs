//! What a pass starts from: the cluster as its source says, the leases as the plugin wrote them.

use husk_dataplane::kernel::Kernel;
use husk_overlay::issue::{Issue, IssueKind, Severity};

use super::{Engine, Node};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Takes the cluster source's current state; what was known stays in force when it does not answer.
    pub(super) fn read_source(&mut self) {
        match self.parts.source.snapshot() {
            Ok(mut snapshot) => {
                self.block_changes.apply_to(&mut snapshot, &self.parts.node_name);
                if let Some(own) = snapshot.nodes.get(&self.parts.node_name) {
                    self.created = own.created;
                }
                if snapshot != self.snapshot {
                    self.snapshot = snapshot;
                    self.keep_snapshot();
                }
                if !self.delivered {
                    tracing::info!(
                        nodes = self.snapshot.nodes.len(),
                        "the cluster source delivered its first full list"
                    );
                }
                self.delivered = true;
                self.source_answered = Some(std::time::Instant::now());
                self.source_issue = None;
            }
            Err(error) => {
                if self.source_issue.is_none() {
                    tracing::warn!(%error, "the cluster source cannot be read");
                }
                self.source_issue = Some(Issue {
                    severity: Severity::Error,
                    kind: IssueKind::SourceUnavailable,
                    subject: "cluster source".into(),
                    message: error.to_string(),
                    remedy: "make the source reachable again; nothing has to be restarted".into(),
                });
            }
        }
    }

    /// Hands the snapshot over for a start without the source.
    pub(super) fn keep_snapshot(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.keep(self.snapshot.clone());
        }
    }

    /// Takes the leases; unreadable ones are issues.
    pub(super) fn read_leases(&mut self, issues: &mut Vec<Issue>) {
        let loaded = self.parts.leases.load();
        self.leases_known = loaded.is_ok();
        match loaded {
            Ok(leases) => {
                issues.extend(leases.issues.iter().cloned());
                self.leases = leases;
            }
            Err(error) => issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::BadLease,
                subject: self.parts.leases.directory().display().to_string(),
                message: error.to_string(),
                remedy: "make the directory readable for root".into(),
            }),
        }
    }
}
