//! Paths to peers: what there is to be probed follows from the plan, what was found comes back with the facts.

use std::collections::BTreeMap;

use husk_dataplane::kernel::Kernel;
use husk_overlay::facts::Facts;
use husk_overlay::ipc::Response;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::name::NodeName;
use husk_overlay::plan::Plan;
use husk_overlay::prefix::Family;
use husk_overlay::probe::Report;

use super::{Engine, Node, Pass};
use crate::report::{PathReport, ProbeStarted};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// After a pass: the kernel has the routes that probes go by.
    pub(super) fn probe_paths(&mut self, plan: &Plan) {
        self.parts.node.probe(&plan.probe_targets());
    }

    /// Before anything is done: plans anew where the plan promises more than is known to pass.
    pub(super) fn promise_no_more_than_passes(&mut self, facts: &mut Facts, plan: &mut Plan) {
        let Some(limits) = self.parts.node.limits_under(&plan.probe_targets()) else { return };
        if limits != facts.probed {
            facts.probed = limits;
            *plan = self.plan(facts);
        }
    }

    /// What keeps paths from being probed as they should.
    pub(super) fn probing_issues(&mut self) -> Vec<Issue> {
        let ended = self.parts.node.ended().into_iter().map(|thread| Issue {
            severity: Severity::Error,
            kind: IssueKind::Defect,
            subject: thread.into(),
            message: format!(
                "the daemon's thread {thread} has ended, which is a bug: what it looks after is left alone"
            ),
            remedy: "restart huskd, which leaves the data plane as it is, and report what its log says of the panic"
                .into(),
        });
        let deaf = self.parts.node.is_deaf().then(|| Issue {
            severity: Severity::Warning,
            kind: IssueKind::ProbesDropped,
            subject: "probes of paths".into(),
            message: "probes of other nodes arrive through the tunnel, and a firewall of this host drops all of them and the \
                      answers to its own: no path is watched, and a black hole is not found"
                .into(),
            remedy: format!(
                "let UDP and TCP to port {PROBE_PORT} in from the interfaces husk-*, for example: \
                 `nft 'insert rule inet filter input iifname \"husk-*\" meta l4proto {{ tcp, udp }} th dport {PROBE_PORT} accept'`"
            ),
        });
        ended.chain(deaf).collect()
    }

    /// The paths to a peer that are probed.
    pub(super) fn paths_of(&mut self, peer: &NodeName) -> Vec<PathReport> {
        self.parts.node.probes_of(peer).into_iter().map(|(path, report)| PathReport { path, report }).collect()
    }

    /// All paths that are probed.
    pub(super) fn paths(&mut self) -> Vec<PathReport> {
        self.parts.node.probes().into_iter().map(|(path, report)| PathReport { path, report }).collect()
    }

    /// What was found of each peer's paths, by family.
    pub(super) fn paths_by_peer(&mut self) -> BTreeMap<NodeName, BTreeMap<Family, Report>> {
        let mut peers: BTreeMap<NodeName, BTreeMap<Family, Report>> = BTreeMap::new();
        for (path, report) in self.parts.node.probes() {
            peers.entry(path.peer).or_default().insert(path.family, report);
        }
        peers
    }

    /// Probes the paths to a peer now.
    pub(super) fn probe_peer(&mut self, peer: &str) -> Response {
        let refused = |reason: String| Response::Refused { reason };
        let Some(last) = &self.last else { return self.report(|_, _| ()) };
        let Some((name, plan)) = last.plan.peer_named(peer).map(|(name, plan)| (name.clone(), plan)) else {
            return refused(format!("{peer:?} is no other node of the cluster; huskctl peers lists them"));
        };
        if let Some(reason) = &plan.refused {
            return refused(format!("nothing is sent to {name}: {reason}"));
        }
        if plan.probe.is_empty() {
            return refused(format!("{name} has no address that could be probed yet; see huskctl peers"));
        }
        match self.parts.node.demand_probe(&name) {
            Some(begun) => self.report(|_, _: &Pass| ProbeStarted { peer: name, begun }),
            None => refused("this daemon does not probe paths".into()),
        }
    }
}
