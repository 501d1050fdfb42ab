//! What a pass says to the outside: `node.json` for the plugin, the state for those who wait, the log for people.

use std::collections::BTreeMap;
use std::sync::Arc;

use husk_dataplane::kernel::{Kernel, Table};
use husk_overlay::ipc::NodeFile;
use husk_overlay::issue::{Issue, Severity};
use husk_overlay::kernel::Map;
use husk_policy::cluster::{Cluster, Membership, Quarantine};
use husk_policy::object::Objects;

use super::{Engine, Node, Pass, State, blocks};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Writes `node.json` and tells those who wait. True if `node.json` says what it should.
    pub(super) fn announce(&mut self) -> bool {
        let Some(last) = &self.last else { return false };
        let families = self.parts.config.families().collect();
        let blocks = blocks::in_order(&last.plan);
        let reason = self.not_ready(last);
        let node_file = match (&reason, last.plan.pod_mtu) {
            (None, Some(pod_mtu)) => Some(NodeFile {
                version: husk_overlay::ipc::VERSION,
                boot_id: self.parts.boot_id.clone(),
                pod_mtu,
                blocks,
                families,
                router: last.plan.record.as_ref().map(|record| record.router).unwrap_or_default(),
                cluster_cidrs: self.parts.config.cluster_cidrs.clone(),
                cool_down: self.parts.config.ipam.cool_down,
                tunnel_ports: self.parts.config.tunnel_ports(),
            }),
            _ => None,
        };
        let (node_file, written) = match node_file {
            None => (None, self.parts.writer.not_ready()),
            Some(node_file) => match self.parts.writer.ready(&node_file) {
                Ok(()) => (Some(node_file), Ok(())),
                // What may lie there from before is not true any more; removing it works on a full disk too.
                Err(error) => (None, self.parts.writer.not_ready().and(Err(error))),
            },
        };
        let host_ports = host_ports(last);
        let pod_interfaces = Arc::new(last.facts.pod_interfaces.clone());
        let announced = written.is_ok();
        let reason = reason.or_else(|| written.err().map(|error| error.to_string()));
        let issues = self.all_issues();
        self.log_decisions(&issues);
        let was = self.state.borrow().clone();
        if was.reason != reason {
            match &reason {
                None => {
                    tracing::info!(pod_mtu = node_file.as_ref().map(|file| file.pod_mtu), "ready: pods can be added");
                }
                Some(reason) => tracing::warn!(reason, "not ready: pods have to wait"),
            }
        }
        for issue in issues.iter().filter(|issue| !was.issues.contains(issue)) {
            tracing::warn!(kind = ?issue.kind, subject = issue.subject, remedy = issue.remedy, "{}", issue.message);
        }
        let passes = self.passes;
        let ready = reason.is_none();
        let enforces_policy = self.parts.config.policy.enabled;
        let (enforced, cluster) = (self.policy.enforced(), self.known_cluster());
        let state = State {
            ready,
            reason,
            node_file,
            issues,
            host_ports,
            pod_interfaces,
            enforces_policy,
            enforced,
            cluster,
            passes,
        };
        self.state.send_replace(state);
        announced
    }

    pub(super) fn all_issues(&self) -> Vec<Issue> {
        let mut issues: Vec<Issue> = self.source_issue.iter().cloned().collect();
        if let Some(last) = &self.last {
            issues.extend(last.plan.issues.iter().cloned());
            issues.extend(last.issues.iter().cloned());
        }
        issues.extend(self.audit.logs.issues());
        issues.sort();
        issues.dedup();
        issues
    }

    /// The cluster as policy is made from it; where none is enforced, the pods of this node, whose names are known all the same.
    fn known_cluster(&self) -> Arc<Cluster> {
        if self.parts.config.policy.enabled {
            return self.policy.cluster();
        }
        let (objects, asked) = (Arc::new(Objects::default()), Quarantine::default());
        Arc::new(Cluster::new(objects, &self.leases.endpoints, Membership::Optional, &asked))
    }

    /// Why pods cannot be added, if they cannot.
    fn not_ready(&self, last: &Pass) -> Option<String> {
        let blocking = last.plan.blocking().chain(last.issues.iter().filter(|i| i.severity == Severity::Blocking));
        if let Some(issue) = blocking.into_iter().next() {
            return Some(issue.to_string());
        }
        let blocks = last.plan.record.as_ref().map(|record| &record.blocks);
        for family in self.parts.config.families() {
            if !blocks.is_some_and(|blocks| blocks.iter().any(|block| block.family() == family)) {
                return Some(match &self.source_issue {
                    Some(issue) => issue.to_string(),
                    None => format!("this node has no {family} address block yet"),
                });
            }
        }
        None
    }
}

/// What the kernel's maps hold after a pass: what was planned, unless something of the table could not be had.
fn host_ports(last: &Pass) -> Arc<BTreeMap<String, Map>> {
    let failed = last.outcome.failures.iter().any(|failure| failure.table == Table::Nft);
    let table = last.plan.desired.nft.as_ref().filter(|_| !failed);
    Arc::new(table.map(|table| table.maps.clone()).unwrap_or_default())
}
